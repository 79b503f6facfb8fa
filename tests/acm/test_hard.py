"""acm, acm.soft against masks in float64, hostile rows; all four: derivatives, graphs, errors."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import fastkd
from fastkd.acm import _kernels
from fastkd.acm._products import ACTIVATIONS

GRADIENT_ERROR = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    # Rounded: pre-activations, activations, each learner's product.
    torch.bfloat16: 1.5e-2,
    torch.float16: 2e-3,
}


def learners(n=4, d=12, b=7, out=10, dtype=torch.float32):
    """w1, b1, w2."""
    return (
        (torch.randn(n, d, b, dtype=torch.float64) / d**0.5).to(dtype),
        torch.randn(n, b, dtype=torch.float64).to(dtype),
        (torch.randn(n, b, out, dtype=torch.float64) / b**0.5).to(dtype),
    )


def problem(rows=(3, 11), dtype=torch.float32, **sizes):
    """x, w1, b1, w2 that require grad."""
    weights = learners(dtype=dtype, **sizes)
    x = torch.randn(*rows, weights[0].size(1), dtype=torch.float64).to(dtype)
    return [v.requires_grad_() for v in (x, *weights)]


def some_choices(rows=(3, 11), n=4):
    return torch.randint(0, n + 1, rows)


def exactly(tensors):
    return [v.detach().double().requires_grad_(v.requires_grad) for v in tensors]


def assert_same(found, exact, leaves, exact_leaves, error=None):
    """Values, and gradients of all leaves from a random direction."""
    dtype = found.dtype
    limit = error or GRADIENT_ERROR[dtype]
    assert found.shape == exact.shape
    assert relative_error(found, exact) <= limit
    direction = torch.randn(exact.shape, dtype=torch.float64).to(dtype)
    found.backward(direction)
    exact.backward(direction.double())
    for mine, right in zip(leaves, exact_leaves, strict=True):
        assert mine.grad.dtype == mine.dtype
        assert mine.grad.shape == right.grad.shape
        assert relative_error(mine.grad, right.grad) <= limit


def check_acm(leaves, choices, activation="gelu", error=None):
    exact_leaves = exactly(leaves)
    with torch.no_grad():
        plain = fastkd.acm.hard(*leaves, choices, activation=activation)
    found = fastkd.acm.hard(*leaves, choices, activation=activation)
    exact = fastkd.reference.acm.hard(*exact_leaves, choices, activation=activation)
    if _kernels.has_kernels(leaves[0], found.dtype):
        assert torch.equal(plain, found.detach())
    else:  # torch's products: on some processors their last bits depend on where operands lie
        torch.testing.assert_close(plain, found.detach())
    assert_same(found, exact, leaves, exact_leaves, error)
    return found


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", list(GRADIENT_ERROR))
def test_acm(backend, activation, dtype):
    check_acm(problem(dtype=dtype), some_choices(), activation)


def test_processors_without_products_of_16_bits(monkeypatch):
    """There float32 takes their place, and results are the better for it."""
    monkeypatch.setattr(_kernels, "CPU_PRODUCTS", {torch.bfloat16: False, torch.float16: False})
    for dtype, error in ((torch.bfloat16, 6e-3), (torch.float16, 1e-3)):
        check_acm(problem(dtype=dtype), some_choices(), error=error)
        leaves = problem(dtype=dtype)
        gates = torch.randn(3, 11, 5).softmax(-1).to(dtype).requires_grad_()
        exact = exactly([*leaves, gates])
        found = fastkd.acm.soft(*leaves, gates)
        assert_same(found, fastkd.reference.acm.soft(*exact), [*leaves, gates], exact, error)
        losses = fastkd.acm.prefix_loss(*leaves, torch.ones(3, 11, 10, dtype=dtype))
        assert losses.dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    sizes=st.tuples(*[st.integers(1, 5)] * 4),
    data=st.data(),
    kind=st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]),
)
def test_acm_on_any_shape(rows, sizes, data, kind):
    n, d, b, out = sizes
    choices = data.draw(st.lists(st.integers(0, n), min_size=rows, max_size=rows))
    leaves = problem((rows,), torch.float64, n=n, d=d, b=b, out=out)
    check_acm(leaves, torch.tensor(choices, dtype=kind), error=1e-11)


@pytest.mark.parametrize("rows", [(), (0,), (0, 3), (1,), (2, 1, 3)])
@pytest.mark.parametrize("choice", [0, 1, 4])
def test_all_rows_choose_the_same(backend, rows, choice):
    found = check_acm(problem(rows), torch.full(rows, choice))
    if choice == 0:
        assert not found.any()


def test_the_largest_choice_runs_its_last_learner():
    """Choices [4, 2] ran 3 and 2 learners in the released code, and [1] none."""
    leaves = problem((2,))
    for choices in ([4, 2], [1, 0], [1, 1]):
        found = check_acm(leaves, torch.tensor(choices))
        for row, choice in enumerate(choices):
            x, w1, b1, w2 = (v.detach() for v in leaves)
            parts = torch.nn.functional.gelu(x[row] @ w1 + b1).unsqueeze(1) @ w2
            torch.testing.assert_close(found[row].detach(), parts[:choice].sum((0, 1)))
        for leaf in leaves:
            leaf.grad = None


def test_batch_mates_do_not_matter():
    x, *weights = (v.detach() for v in problem((40,)))
    choices = some_choices((40,))
    together = fastkd.acm.hard(x, *weights, choices)
    alone = torch.cat(
        [fastkd.acm.hard(x[i : i + 1], *weights, choices[i : i + 1]) for i in range(40)]
    )
    assert torch.equal(together, alone)
    order = torch.randperm(40)
    assert torch.equal(together[order], fastkd.acm.hard(x[order], *weights, choices[order]))
    wide = [v.double() for v in (x, *weights)]
    torch.testing.assert_close(fastkd.acm.hard(*wide, choices).float(), together)


@pytest.mark.only("cpu")
def test_few_rows_and_many_have_the_same_bits(backend):
    """Threads share out columns, or rows; sizes that no tile divides, more than a panel is deep."""
    leaves = problem((701,), n=3, d=801, b=155, out=141)
    choices = some_choices((701,), 3)
    many = fastkd.acm.hard(*leaves, choices)
    direction = torch.randn(701, 141)
    gradients = torch.autograd.grad(many, leaves, direction)
    for rows in (1, 2, 3, 8, 12, 13, 24, 25, 31):
        few = fastkd.acm.hard(leaves[0][:rows], *leaves[1:], choices[:rows])
        assert torch.equal(many[:rows], few)
        (of_x,) = torch.autograd.grad(few, leaves[0], direction[:rows])
        assert torch.equal(gradients[0][:rows], of_x[:rows])
    exact = exactly(leaves)
    right = fastkd.reference.acm.hard(*exact, choices)
    assert relative_error(many, right) < 2e-6
    right.backward(direction.double())
    for mine, leaf in zip(gradients, exact, strict=True):
        assert relative_error(mine, leaf.grad) < 2e-6


def on_threads(run):
    """What run() gives with one, two and three threads."""
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    return results


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (17, {"n": 3, "d": 40, "b": 61, "out": 50}),
        (900, {"n": 3, "d": 40, "b": 61, "out": 50}),
        (800, {"n": 2, "d": 30, "b": 700, "out": 1500}),  # blocks of fewer rows than a chunk
    ],
)
def test_any_number_of_threads_gives_the_same_bits(rows, sizes):
    leaves = problem((rows,), **sizes)
    choices, direction = some_choices((rows,), sizes["n"]), torch.randn(rows, sizes["out"])

    def run():
        out = fastkd.acm.hard(*leaves, choices)
        return [out, *torch.autograd.grad(out, leaves, direction)]

    first, *others = on_threads(run)
    for found in others:
        assert all(map(torch.equal, found, first))


@pytest.mark.parametrize("shape", [(1,), (5, 1), (3,)])
def test_bias_gradients_have_the_same_bits_on_any_number_of_threads(shape):
    bias = torch.zeros(shape, requires_grad=True)
    leaves = problem((100_000,), d=1, b=1, out=shape[-1])
    choices, direction = some_choices((100_000,)), torch.randn(100_000, shape[-1])

    def run():
        out = fastkd.acm.hard(*leaves, choices, bias=bias)
        return torch.autograd.grad(out, bias, direction)[0]

    first, *others = on_threads(run)
    assert all(torch.equal(found, first) for found in others)
    rows = choices if len(shape) == 2 else torch.zeros_like(choices)
    exact = torch.zeros(5, shape[-1], dtype=torch.float64).index_add(0, rows, direction.double())
    assert relative_error(first, exact if len(shape) == 2 else exact[0]) < 1e-5


def test_backward_in_several_threads_at_once():
    """What backward works in is kept for the next call: each has its own."""
    leaves, choices = problem((500,), n=3, d=70, b=90, out=50), some_choices((500,), 3)
    direction = torch.randn(500, 50)

    def gradients(_):
        found = torch.autograd.grad(fastkd.acm.hard(*leaves, choices), leaves, direction)
        fastkd.release_memory()
        return found

    right = gradients(None)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(gradients, range(40)):
            assert all(map(torch.equal, found, right))


def test_rows_that_are_not_run_are_not_read():
    leaves = problem((6,))
    choices = torch.tensor([2, 0, 4, 0, 1, 0])
    with torch.no_grad():
        leaves[0][choices == 0] = torch.nan
        leaves[1][3] = torch.nan  # learner 4 is for row 2 alone
    out = fastkd.acm.hard(*leaves, choices)
    assert out.isnan().any(-1).tolist() == [False, False, True, False, False, False]
    out[choices < 4].sum().backward()
    assert leaves[0].grad.isfinite().all(-1).tolist() == [True, True, False, True, True, True]
    for weight in leaves[1:]:
        assert weight.grad[:3].isfinite().all()
    spoiled = leaves[0].detach().clone()
    spoiled[2] = torch.inf
    found = fastkd.acm.hard(spoiled, *leaves[1:], torch.tensor([2, 0, 1, 0, 1, 0]))
    assert found.isfinite().all(-1).tolist() == [True, True, False, True, True, True]


def test_layouts(backend):
    x, w1, _, w2 = problem((8, 4))
    choices = some_choices((4, 8))
    leaves = [
        x.detach().transpose(0, 1).requires_grad_(),
        w1.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
        torch.randn(4, 14)[:, ::2].requires_grad_(),
        w2.detach().flip(0).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
    ]
    check_acm(leaves, choices)
    check_acm(problem((4, 8)), some_choices((8, 4)).T)
    x, *weights = problem((4, 8))
    fastkd.acm.hard(x, *weights, choices).sum().backward()  # a gradient without strides
    exact = exactly([x, *weights])
    fastkd.reference.acm.hard(*exact, choices).sum().backward()
    assert relative_error(weights[0].grad, exact[1].grad) < 2e-6


def test_only_what_needs_a_gradient(backend):
    for wanted in range(4):
        leaves = problem()
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i == wanted)
        exact, choices = exactly(leaves), some_choices()
        fastkd.acm.hard(*leaves, choices).sum().backward()
        fastkd.reference.acm.hard(*exact, choices).sum().backward()
        assert relative_error(leaves[wanted].grad, exact[wanted].grad) < 2e-6


@pytest.mark.parametrize("shape", [(10,), (5, 10)])
def test_bias(backend, shape):
    leaves, choices = problem(), some_choices()
    bias = torch.randn(shape, requires_grad=True)
    exact = exactly([*leaves, bias])
    found = fastkd.acm.hard(*leaves, choices, bias=bias)
    right = fastkd.reference.acm.hard(*exact[:4], choices, bias=exact[4])
    assert_same(found, right, [*leaves, bias], exact)
    assert fastkd.acm.hard(*problem((0,)), torch.zeros(0).long(), bias=bias).shape == (0, 10)


def test_mixed_dtypes_and_autocast():
    x, *weights = problem()
    half = x.detach().bfloat16().requires_grad_()
    choices = some_choices()
    found = fastkd.acm.hard(half, *weights, choices)
    assert found.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        same = fastkd.acm.hard(half, *weights, choices)
        soft = fastkd.acm.soft(half, *weights, torch.rand(3, 11, 5))
        loss = fastkd.acm.prefix_loss(half, *weights, torch.randn(3, 11, 10))
        (same.sum() + soft.sum() + loss.sum()).backward()
        mapped = torch.func.vmap(lambda row, k: fastkd.acm.hard(row, *weights, k))(x, choices)
    assert torch.equal(found, same)
    torch.testing.assert_close(mapped, fastkd.acm.hard(x, *weights, choices))
    assert {v.dtype for v in (soft, loss)} == {torch.float32}
    assert half.grad.dtype == torch.bfloat16
    assert weights[0].grad.dtype == torch.float32


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    leaves = problem((5,), torch.float64, n=2, d=3, b=2, out=2)
    choices = torch.tensor([2, 0, 1, 2, 1])
    gates = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    runs = {
        "acm.hard": (lambda *a: fastkd.acm.hard(*a, choices, activation=activation), leaves),
        "soft": (lambda *a: fastkd.acm.soft(*a, activation=activation), [*leaves, gates]),
        "prefix": (
            lambda *a: fastkd.acm.prefix_loss(*a, activation=activation),
            [*leaves, target],
        ),
    }
    for run, inputs in runs.values():
        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs)


def test_second_derivatives_of_detached_and_straight_through():
    leaves = problem((5,), torch.float64, n=2, d=3, b=2, out=2)
    extras = (torch.rand(5, 3).double().requires_grad_(), torch.randn(5, 2).double())
    for name, extra, options in (
        ("soft", extras[0], {"straight_through": True}),
        ("prefix_loss", extras[1], {"detach": True}),
    ):
        second = []
        for module in (fastkd.acm, fastkd.reference.acm):
            out = getattr(module, name)(*leaves, extra, **options)
            first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
            second.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
        for mine, right in zip(*second, strict=True):
            assert relative_error(mine, right) < 1e-11


def test_function_transforms():
    leaves = [v.detach() for v in problem((5,), torch.float64)]
    choices, gates = some_choices((5,)), torch.rand(5, 5).double()
    x, *weights = leaves
    single = torch.func.vmap(lambda row, k: fastkd.acm.hard(row, *weights, k))(x, choices)
    torch.testing.assert_close(single, fastkd.acm.hard(*leaves, choices))
    gradient = torch.func.grad(lambda x: fastkd.acm.hard(x, *weights, choices).square().sum())(x)
    leaf = x.clone().requires_grad_()
    fastkd.acm.hard(leaf, *weights, choices).square().sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)
    losses = torch.func.jacrev(lambda x: fastkd.acm.prefix_loss(x, *weights, x[:, :10]))(x)
    assert losses.shape == (5, 5, 12)
    soft = torch.func.vmap(lambda row, g: fastkd.acm.soft(row, *weights, g))(x, gates)
    torch.testing.assert_close(soft, fastkd.acm.soft(*leaves, gates))


@pytest.mark.parametrize("dtype", list(GRADIENT_ERROR))
def test_soft(dtype):
    leaves = problem(dtype=dtype)
    gates = torch.randn(3, 11, 5, dtype=torch.float64).softmax(-1).to(dtype).requires_grad_()
    exact = exactly([*leaves, gates])
    for activation in ACTIVATIONS:
        for leaf in (*leaves, gates, *exact):
            leaf.grad = None
        found = fastkd.acm.soft(*leaves, gates, activation=activation)
        right = fastkd.reference.acm.soft(*exact, activation=activation)
        assert_same(found, right, [*leaves, gates], exact)
        assert not gates.grad[..., 0].any()


@pytest.mark.parametrize("activation", ["gelu", "identity"])
def test_straight_through(activation):
    leaves = problem()
    gates = torch.randn(3, 11, 5).softmax(-1).requires_grad_()
    hard = fastkd.acm.soft(*leaves, gates, activation=activation, straight_through=True)
    assert torch.equal(hard, fastkd.acm.hard(*leaves, gates.argmax(-1), activation=activation))
    exact = exactly([*leaves, gates])
    right = fastkd.reference.acm.soft(*exact, activation=activation, straight_through=True)
    assert_same(hard, right, [*leaves, gates], exact)
    with torch.no_grad():
        again = fastkd.acm.soft(*leaves, gates, activation=activation, straight_through=True)
    assert torch.equal(hard.detach(), again)
    direction = torch.randn(3, 11, 10)
    first, second = (
        torch.autograd.grad(
            fastkd.acm.soft(*leaves, gates, straight_through=straight), [*leaves, gates], direction
        )
        for straight in (False, True)
    )
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def test_one_hot_gates_are_choices():
    leaves, choices = [v.detach() for v in problem()], some_choices()
    gates = torch.nn.functional.one_hot(choices, 5).float()
    hard = fastkd.acm.hard(*leaves, choices)
    torch.testing.assert_close(fastkd.acm.soft(*leaves, gates), hard)
    gates[1, 2, 0] = torch.nan
    found = fastkd.acm.soft(*leaves, gates, straight_through=True)
    assert found[1, 2].isnan().all()
    assert found.isnan().any(-1).sum() == 1


def saved_by_acm(leaves, choices, name):
    """Shapes of what backward keeps besides the arguments."""
    out = fastkd.acm.hard(*leaves, choices)
    inputs = {v.untyped_storage().data_ptr() for v in (*leaves, choices)}
    node = out.grad_fn
    while node.name() != name:
        node = node.next_functions[0][0]
    saved = [v for v in node.saved_tensors if v is not None]
    return [list(v.shape) for v in saved if v.untyped_storage().data_ptr() not in inputs]


def test_backward_keeps_no_gathered_rows():
    """Pre-activations, and the routing."""
    choices = torch.arange(64) % 3
    leaves = problem((64,), n=4, d=8, b=16, out=8)
    assert saved_by_acm(leaves, choices, "_AcmRoutedBackward") == [[64], [5], [1, 63, 16]]
    leaves = problem((64,), torch.float64, n=4, d=8, b=16, out=8)  # torch's products everywhere
    assert saved_by_acm(leaves, choices, "_AcmBackward") == [[int(choices.sum()), 16]]


def test_compile_fullgraph():
    leaves, choices = problem(), some_choices()
    gates = torch.randn(3, 11, 5).softmax(-1).requires_grad_()
    target = torch.randn(3, 11, 10)
    everything = [*leaves, gates]

    def run(x, w1, b1, w2, gates):
        hard = fastkd.acm.hard(x, w1, b1, w2, choices)
        soft = fastkd.acm.soft(x, w1, b1, w2, gates)
        straight = fastkd.acm.soft(x, w1, b1, w2, gates, straight_through=True)
        losses = fastkd.acm.prefix_loss(x, w1, b1, w2, target)
        uneven = fastkd.acm.prefix_loss(x, w1, b1, w2, target, detach=True)[1]
        return (hard.square() + soft + straight.square()).sum() + losses.sum() + uneven

    plain = run(*everything)
    expected = torch.autograd.grad(plain, everything)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = compiled(*everything)
    torch.testing.assert_close(found, plain)
    for mine, right in zip(torch.autograd.grad(found, everything), expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
    run = torch.compile(fastkd.acm.hard, fullgraph=True)
    hard = fastkd.acm.hard(*leaves, choices)
    torch.testing.assert_close(run(*leaves, choices), hard)
    first, second = (
        torch.autograd.grad(out.square().sum(), leaves) for out in (run(*leaves, choices), hard)
    )
    for mine, right in zip(first, second, strict=True):
        torch.testing.assert_close(mine, right)
    labels = torch.compile(fastkd.acm.oracle, fullgraph=True, backend="aot_eager")(*leaves, target)
    assert torch.equal(labels, fastkd.acm.oracle(*leaves, target))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"choices must lie in \[0, N = 4\]"):
        run(*leaves, choices + 4)


def test_meta():
    leaves = [v.detach().to("meta") for v in problem()]
    assert fastkd.acm.hard(*leaves, some_choices().to("meta")).shape == (3, 11, 10)
    assert fastkd.acm.prefix_loss(*leaves, torch.randn(3, 11, 10, device="meta")).shape == (5,)


def test_choices_of_inference_mode():
    """An oracle's, for example: autograd keeps them."""
    x, w1 = torch.randn(4, 3, requires_grad=True), torch.randn(2, 3, 5)
    rest = torch.randn(2, 5), torch.randn(2, 5, 3)
    choices = torch.tensor([0, 1, 2, 2])
    with torch.inference_mode():
        others = choices.clone()
    grads = [
        torch.autograd.grad(fastkd.acm.hard(x, w1, *rest, c).sum(), x)[0] for c in (choices, others)
    ]
    assert torch.equal(*grads)
