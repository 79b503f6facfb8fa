"""kl_div's derivatives: what is kept for them, second and batched ones, transforms, checkpoints."""

import gc
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils.checkpoint import checkpoint

import fastkd

REDUCTIONS = ("none", "sum", "mean", "batchmean")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SIDES = [(True, False), (False, True), (True, True)]

pytestmark = [
    pytest.mark.filterwarnings("ignore:reduction. 'mean'"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # vmap of torch.kl_div
]
everything = pytest.mark.parametrize("reduction", REDUCTIONS)
both_targets = pytest.mark.parametrize("log_target", [False, True])
sides = pytest.mark.parametrize("sides", SIDES, ids=["input", "target", "both"])


def distributions(shape, dtype=torch.float32, log_target=False):
    input, target = (torch.randn(shape, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    return input.to(dtype), (target if log_target else target.exp()).to(dtype)


def arguments(sides, *tensors):
    """Each as the result of an operation, which may be changed in place."""
    leaves = [x.clone().requires_grad_(side) for x, side in zip(tensors, sides, strict=True)]
    return leaves, [x * 1 for x in leaves], [x for x in leaves if x.requires_grad]


def close(mine, theirs, dtype=torch.float32):
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 4e-2, torch.float32: 1e-5}.get(dtype, 1e-10)
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            size = max(1.0, b.abs().max().item()) if b.numel() else 1.0
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * size)


@sides
@both_targets
@everything
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("changed", ["input", "target", "loss", "all"])
def test_changes_in_place_before_backward(backend, dtype, reduction, log_target, sides, changed):
    """The gradients of what was passed, wherever torch lets that be; else its error, or those."""
    if dtype == torch.bfloat16 and reduction != "none":
        return  # as float32
    tensors = distributions((3, 40), dtype, log_target)
    found = []
    for function in (F.kl_div, fastkd.kl_div):
        _, (x, t), wanted = arguments(sides, *tensors)
        loss = function(x, t, reduction=reduction, log_target=log_target)
        total = (loss.clone() if changed in ("loss", "all") else loss).sum()
        with torch.no_grad():
            for name, tensor in (("input", x), ("target", t), ("loss", loss)):
                if changed in (name, "all"):
                    tensor.add_(1)
        try:
            found.append(torch.autograd.grad(total * 3, wanted))
        except RuntimeError as error:
            found.append(None)
            if "modified by an inplace operation" not in str(error):
                raise
    theirs, mine = found
    if theirs is not None:
        close(mine, theirs, dtype)
    elif mine is not None:  # less is kept than torch keeps
        assert reduction != "none"
        _, (x, t), wanted = arguments(sides, *tensors)
        loss = F.kl_div(x, t, reduction=reduction, log_target=log_target)
        close(mine, torch.autograd.grad(loss * 3, wanted), dtype)


def kept(sides, input, target, **options):
    """A loss, which arguments outlive the call, and how many tensors of their size are saved."""
    sizes = []

    def size(tensor):
        sizes.append(tensor.numel())
        return tensor

    _, passed, _ = arguments(sides, input, target)
    alive = [weakref.ref(x) for x in passed]
    with torch.autograd.graph.saved_tensors_hooks(size, lambda x: x):
        loss = fastkd.kl_div(*passed, **options)
    del passed
    gc.collect()
    names = [n for n, x in zip(("input", "target"), alive, strict=True) if x() is not None]
    return loss, names, sum(sizes) // input.numel()


# What the table in kl_div's docstring says: reduced, log_target, sides -> arguments alive, tensors
# of their size.
KEPT = {
    (True, False, (True, False)): ([], 1),
    (True, False, (False, True)): (["input", "target"], 3),
    (True, False, (True, True)): (["input", "target"], 4),
    (False, False, (True, False)): (["target"], 1),
    (False, False, (False, True)): (["input", "target"], 2),
    (False, False, (True, True)): (["input", "target"], 2),
    (True, True, (True, False)): ([], 1),
    (True, True, (False, True)): (["target"], 3),
    (True, True, (True, True)): ([], 4),
    (False, True, (True, False)): ([], 1),
    (False, True, (False, True)): (["target"], 3),
    (False, True, (True, True)): ([], 4),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_is_kept(case):
    reduced, log_target, sides = case
    tensors = distributions((4, 50), log_target=log_target)
    reduction = "batchmean" if reduced else "none"
    loss, *found = kept(sides, *tensors, reduction=reduction, log_target=log_target)
    assert loss.requires_grad
    assert tuple(found) == KEPT[case]


@pytest.mark.parametrize("log_target", [False, True])
def test_a_reduced_loss_keeps_one_tensor(log_target):
    """Where only input takes a gradient, neither argument outlives the call."""
    input, target = distributions((64, 1024), log_target=log_target)
    leaf = input.clone().requires_grad_()
    x, t = leaf * 1, target * 1
    alive = weakref.ref(x), weakref.ref(t)
    loss = fastkd.kl_div(x, t, reduction="sum", log_target=log_target)
    del x, t
    assert [a() for a in alive] == [None, None]
    loss.backward()
    torch.testing.assert_close(leaf.grad, -(target.exp() if log_target else target))


@pytest.mark.only("cpu")  # float64
@sides
@both_targets
@everything
def test_second_and_third_derivatives(backend, reduction, log_target, sides):
    tensors = distributions((3, 4), torch.float64, log_target)
    input, target = (x.requires_grad_(side) for x, side in zip(tensors, sides, strict=True))

    def loss(x, t, function=fastkd.kl_div):
        return function(x, t, reduction=reduction, log_target=log_target)

    assert torch.autograd.gradcheck(loss, (input, target), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, (input, target), check_batched_grad=True)
    found = []
    for function in (fastkd.kl_div, F.kl_div):
        inputs = [x for x in (input, target) if x.requires_grad]
        values = [loss(input, target, function).pow(2).sum()]
        for _ in range(3):
            gradients = torch.autograd.grad(
                values[-1], inputs, create_graph=True, allow_unused=True
            )
            values.append(sum(g.pow(3).sum() for g in gradients if g is not None))
            found.append(values[-1].detach())
            if not values[-1].requires_grad:
                break
    half = len(found) // 2
    close(found[:half], found[half:], torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@sides
@both_targets
@everything
def test_second_derivatives_after_the_first(backend, dtype, reduction, log_target, sides):
    """First without a graph, then with one: nothing that the second needs was overwritten."""
    tensors = distributions((3, 40), dtype, log_target)
    found = []
    for function in (F.kl_div, fastkd.kl_div):
        _, passed, wanted = arguments(sides, *tensors)
        loss = function(*passed, reduction=reduction, log_target=log_target)
        upstream = torch.full_like(loss, 3.0).requires_grad_()
        first = torch.autograd.grad(loss, wanted, 2 * upstream, retain_graph=True)
        again = torch.autograd.grad(loss, wanted, upstream, create_graph=True)
        total = sum(g.float().pow(2).sum() for g in again)
        second = torch.autograd.grad(total, [*wanted, upstream], allow_unused=True)
        found.append((*first, *(g.detach() for g in again), *second))
    close(found[1], found[0], dtype)


@pytest.mark.only("cpu")  # float64
def test_second_derivatives_of_torchs_samples(backend):
    (info,) = [op for op in op_db if op.name == "nn.functional.kl_div"]
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True):
        tensors = (sample.input, *sample.args)
        leaves = [x.detach().requires_grad_() for x in tensors]

        def loss(x, t, options=sample.kwargs):
            return fastkd.kl_div(x, t, **options)

        assert torch.autograd.gradcheck(loss, leaves)
        assert torch.autograd.gradgradcheck(loss, leaves)


@sides
@both_targets
@everything
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_batched_gradients(backend, dtype, reduction, log_target, sides):
    tensors = distributions((3, 4), dtype, log_target)
    found = []
    for function in (fastkd.kl_div, F.kl_div):
        _, passed, wanted = arguments(sides, *tensors)
        loss = function(*passed, reduction=reduction, log_target=log_target)
        upstream = (
            torch.arange(1.0, 3.0).to(dtype).view(2, *[1] * loss.dim()).expand(2, *loss.shape)
        )
        batch = torch.autograd.grad(
            loss, wanted, upstream, is_grads_batched=True, retain_graph=True
        )
        each = torch.func.vmap(lambda v: torch.autograd.grad(loss, wanted, v, retain_graph=True))  # noqa: B023
        found.append((*batch, *each(upstream)))
    close(*found, dtype)


@both_targets
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_jacobians_and_transforms(reduction, log_target):
    input, target = distributions((3, 4), torch.float64, log_target)

    def results(function):
        def loss(x, t):
            return function(x, t, reduction=reduction, log_target=log_target)

        full, both = torch.autograd.functional.jacobian, (0, 1)
        yield from full(loss, (input, target), vectorize=True)
        yield from full(loss, (input, target), vectorize=True, strategy="forward-mode")
        yield from torch.autograd.functional.hessian(
            lambda x, t: loss(x, t).sum(), (input, target), vectorize=True
        )[1]
        yield from torch.func.grad(lambda x, t: loss(x, t).sum(), both)(input, target)
        yield from torch.func.jacrev(loss, both)(input, target)
        yield from torch.func.jacfwd(loss, both)(input, target)
        yield torch.func.vmap(loss)(input, target)
        yield from torch.func.jvp(loss, (input, target), (target, input))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(input, target)
            yield torch.autograd.forward_ad.unpack_dual(loss(dual, target)).tangent

    close(list(results(fastkd.kl_div)), list(results(F.kl_div)), torch.float64)


@pytest.mark.parametrize("reentrant", [False, True])
@sides
def test_checkpoints(backend, reentrant, sides):
    for reduction, log_target in itertools.product(("none", "batchmean"), (False, True)):
        tensors = distributions((8, 8192), log_target=log_target)
        found = []
        for function in (fastkd.kl_div, F.kl_div):

            def loss(x, t, function=function, options=(reduction, log_target)):
                return function(x * 1, t, reduction=options[0], log_target=options[1]).sum() * 2

            leaves, _, wanted = arguments(sides, *tensors)
            found.append(torch.autograd.grad(loss(*leaves), wanted))
            leaves, _, wanted = arguments(sides, *tensors)
            checkpoint(loss, *leaves, use_reentrant=reentrant).backward()
            found.append([x.grad for x in wanted])
        close(found[0], found[2])
        close(found[1], found[3])


@sides
@both_targets
def test_gradients_carry_no_graph(backend, sides, log_target):
    """Without create_graph, neither .grad nor what a hook sees leads back to the loss's graph."""
    leaves, passed, wanted = arguments(sides, *distributions((4, 50), log_target=log_target))
    seen = []
    for x in passed:
        if x.requires_grad:
            x.register_hook(lambda g: seen.append(g.requires_grad))
    fastkd.kl_div(*passed, reduction="sum", log_target=log_target).backward()
    assert seen == [False] * len(wanted)
    assert not any(x.grad.requires_grad for x in wanted)
    assert all(x.grad is None for x in leaves if not x.requires_grad)
