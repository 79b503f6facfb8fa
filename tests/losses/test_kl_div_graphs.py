"""kl_div in compiled and exported graphs."""

import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import fastkd

REDUCTIONS = ("none", "sum", "mean", "batchmean")
NUMBERS = {"none": 0, "mean": 1, "sum": 2, "batchmean": 3}

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean'", "ignore:size_average and")


def distributions(shape, log_target=False, dtype=torch.float32):
    input, target = (torch.randn(shape, dtype=dtype).log_softmax(-1) for _ in range(2))
    return input, (target if log_target else target.exp())


def compiled(function, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def value_and_gradients(function, *tensors):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    loss = function(*leaves)
    upstream = torch.arange(1.0, 1.0 + loss.numel()).view(loss.shape)
    return (loss.detach(), *torch.autograd.grad(loss, leaves, upstream))


def compare(mine, theirs, *tensors):
    found = [value_and_gradients(function, *tensors) for function in (mine, theirs)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_graph_serves_every_size(reduction, log_target):
    def loss(function):
        return lambda x, t: function(x, t, reduction=reduction, log_target=log_target)

    counter = CompileCounterWithBackend("aot_eager")
    step = compiled(loss(fastkd.kl_div), counter)
    for rows in range(2, 14):
        tensors = distributions((rows, 9 + rows), log_target)
        compare(step, loss(F.kl_div), *tensors)
    assert counter.frame_count == 1
    targets = [node.target for graph in counter.graphs for node in graph.graph.nodes]
    assert torch.ops.fastkd._kl_div_loss in targets


@pytest.mark.parametrize(
    "change",
    [
        lambda x, t: (x, t),
        lambda x, t: (x.t(), t.t()),
        lambda x, t: (x[:, ::2], t[:, ::2]),
        lambda x, t: (x[:1].expand(5, 8), t[:5]),
        lambda x, t: (x, t[:1]),
        lambda x, t: (x, t.double()),
        lambda x, t: (x[:0], t[:0]),
        lambda x, t: (x[0, 0], t[0, 0]),
    ],
)
def test_layouts(change):
    for reduction in REDUCTIONS:

        def loss(function, reduction=reduction):
            return lambda x, t: function(*change(x, t), reduction=reduction)

        compare(compiled(loss(fastkd.kl_div)), loss(F.kl_div), *distributions((6, 8)))


def test_rows_chosen_by_a_mask():
    keep = torch.arange(6) % 2 == 0, torch.arange(6) < 3
    for first, second in ((0, 0), (0, 1)):  # one number of rows; two that need not be equal

        def loss(function, keep_x=keep[first], keep_t=keep[second]):
            return lambda x, t: function(x[keep_x], t[keep_t], reduction="batchmean")

        compare(compiled(loss(fastkd.kl_div)), loss(F.kl_div), *distributions((6, 8)))


def test_the_module_and_legacy_arguments():
    compare(compiled(fastkd.nn.KLDivLoss()), torch.nn.KLDivLoss(), *distributions((4, 9)))
    for options in ({"size_average": False}, {"reduce": False}, {"reduction": "elementwise_mean"}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mine = compiled(lambda x, t, options=options: fastkd.kl_div(x, t, **options))
            compare(
                mine,
                lambda x, t, options=options: F.kl_div(x, t, **options),
                *distributions((4, 9)),
            )


def test_the_warning_comes_when_a_graph_is_traced():
    step = compiled(lambda x, t: fastkd.kl_div(x, t))
    with pytest.warns(UserWarning, match="'mean' divides the total loss"):
        step(*distributions((4, 9)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(*distributions((4, 9)))


def test_transforms_and_autocast_in_a_graph():
    x, t = distributions((4, 9))
    transforms = {
        "vmap": lambda f: lambda x, t: torch.func.vmap(lambda a, b: f(a, b, reduction="sum"))(x, t),
        "grad": lambda f: lambda x, t: torch.func.grad(lambda a: f(a, t, reduction="sum"))(x),
        "jvp": lambda f: (
            lambda x, t: torch.func.jvp(lambda a: f(a, t, reduction="batchmean"), (x,), (t,))[1]
        ),
    }
    for make in transforms.values():
        torch.testing.assert_close(compiled(make(fastkd.kl_div))(x, t), make(F.kl_div)(x, t))

    def low(function):
        def call(x, t):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return function(x.bfloat16(), t.bfloat16(), reduction="sum")

        return call

    mine, theirs = compiled(low(fastkd.kl_div))(x, t), low(F.kl_div)(x, t)
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(mine, theirs)


class Scaled(torch.nn.Module):
    """A loss with a parameter on either side."""

    def __init__(self, function, reduction, log_target):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1.5))
        self.call = lambda x, t: function(x, t, reduction=reduction, log_target=log_target)

    def forward(self, x, t):
        return self.call(x * self.weight, t * self.weight)


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_loss_trains(strict, reduction, log_target):
    """After a round trip through a file, at other batch sizes, twice differentiable."""
    batch = torch.export.Dim("batch")
    shapes = {"x": {0: batch}, "t": {0: batch}}
    model = Scaled(fastkd.kl_div, reduction, log_target).double()
    program = torch.export.export(
        model,
        distributions((4, 9), log_target, torch.float64),
        strict=strict,
        dynamic_shapes=shapes,
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    program = torch.export.load(file).run_decompositions()
    targets = [node.target for node in program.graph.nodes]
    assert torch.ops.fastkd._kl_div_loss.default in targets
    exported, eager = program.module(), Scaled(F.kl_div, reduction, log_target).double()
    for rows in (2, 4, 7):
        found = []
        tensors = distributions((rows, 9), log_target, torch.float64)
        for module in (exported, eager):
            leaves = [x.clone().requires_grad_() for x in tensors]
            loss = module(*leaves)
            inputs = [*leaves, *module.parameters()]
            first = torch.autograd.grad(loss.square().sum(), inputs, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
            found.append((loss, *first, *second))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def test_an_exported_loss_of_fixed_tensors_trains():
    """What is exported from tensors that take no gradient may be called with those that do."""

    class Loss(torch.nn.Module):
        def forward(self, x, t):
            return fastkd.kl_div(x, t, reduction="batchmean")

    tensors = distributions((4, 9))
    for strict in (False, True):
        exported = torch.export.export(Loss(), tensors, strict=strict).module()
        compare(exported, lambda x, t: F.kl_div(x, t, reduction="batchmean"), *tensors)


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_opcheck(reduction, log_target):
    input, target = distributions((3, 8), log_target)
    ops, number = torch.ops.fastkd, NUMBERS[reduction]
    for gradients in ((True, True), (False, False), (True, False)):
        torch.library.opcheck(ops._kl_div.default, (input, target, log_target, number, *gradients))
    into = (torch.empty_like(input), input, target, log_target, number, True)
    torch.library.opcheck(ops._kl_div_into.default, into)
    upstream = torch.rand(3, 8) if reduction == "none" else torch.tensor(2.0)
    for x, need in ((input, True), (None, False)):
        arguments = (upstream, x, target, log_target, number, True, need)
        torch.library.opcheck(ops._kl_div_backward.default, arguments)
    for tensors in ((input, target), (input.t(), target.t())):
        leaves = [x.clone().requires_grad_() for x in tensors]
        torch.library.opcheck(ops._kl_div_loss.default, (*leaves, log_target, number))
