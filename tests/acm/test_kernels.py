"""The ops under fastkd.acm on CUDA: routing, values and gradients against float64, hostile rows."""

import emulator
import pytest
import torch
from cases import relative_error

from fastkd import reference
from fastkd.acm._kernels import ACTIVATIONS

pytestmark = pytest.mark.only("simt", "cuda")

ERROR = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
GRADIENTS = ("x", "w1", "b1", "w2")


def problem(rows=21, n=3, d=12, b=7, out=10, dtype=torch.float32, bias=0):
    """x, w1, b1, w2, and a bias of so many dimensions."""
    shapes = [(rows, d), (n, d, b), (n, b), (n, b, out), *[(out,), (n + 1, out)][bias - 1 :]]
    sizes = [1, max(d, 1) ** -0.5, 1, max(b, 1) ** -0.5, 1]
    return [
        (torch.randn(shape, dtype=torch.float64) * size).to(dtype)
        for shape, size in zip(shapes[: 5 if bias else 4], sizes, strict=False)
    ]


def forward(x, w1, b1, w2, choices, activation="gelu", bias=None, keep=False):
    """Result, pre-activations and routes."""
    routes = torch.ops.fastkd._acm_route(choices, w1.size(0))
    number = ACTIVATIONS.index(activation)
    return *torch.ops.fastkd._acm_rows(x, w1, b1, w2, bias, *routes, number, keep), *routes


def check(tensors, choices, activation="gelu", error=None, wanted=(True,) * 4, direction=None):
    """Values with and without pre-activations kept, and the wanted gradients."""
    x, w1, b1, w2, *bias = tensors
    bias = bias[0] if bias else None
    limit = error or ERROR[x.dtype]
    runs = ((choices > 0) & (choices <= w1.size(0))).unsqueeze(-1)
    exact = [v.double().requires_grad_() for v in (torch.where(runs, x, 0), w1, b1, w2)]
    right = reference.acm.hard(
        *exact, choices, activation=activation, bias=None if bias is None else bias.double()
    )
    plain, nothing, *_ = forward(x, w1, b1, w2, choices, activation, bias)
    found, kept, *routes = forward(x, w1, b1, w2, choices, activation, bias, keep=True)
    assert nothing.numel() == 0
    torch.testing.assert_close(plain, found, rtol=0, atol=0, equal_nan=True)
    valid = ((choices >= 0) & (choices <= w1.size(0))).nonzero().squeeze(-1)
    assert found.isnan().all(-1).sum() >= len(choices) - len(valid) or found.size(1) == 0
    assert relative_error(found[valid], right[valid]) <= limit
    if direction is None:
        direction = torch.randn(right.shape, dtype=torch.float64).to(x.dtype)
    right[valid].backward(torch.where(runs, direction, 0)[valid].double())
    for pre, count in zip(kept, routes[1].tolist(), strict=False):
        pre[count:] = torch.nan  # nobody's
    gradients = torch.ops.fastkd._acm_rows_backward(
        direction, x, w1, b1, w2, *routes, kept, ACTIVATIONS.index(activation), *wanted
    )
    for name, mine, leaf, want in zip(GRADIENTS, gradients, exact, wanted, strict=True):
        if not want:
            assert mine.numel() == 0
            continue
        assert mine.shape == leaf.shape
        assert mine.dtype == x.dtype
        if name == "x":  # a row's NaN is its own
            assert relative_error(mine[valid], leaf.grad[valid]) <= limit
            assert (mine[choices <= 0] == 0).all()
        else:
            assert relative_error(mine, leaf.grad) <= limit, name
    return found


def some_choices(rows=21, n=3, low=0):
    return torch.randint(low, n + 1, (rows,))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("n", [1, 4, 37])
@pytest.mark.parametrize("rows", [0, 1, 33, 1000])
def test_routes(backend, rows, n, dtype):
    choices = torch.randint(-1, n + 2, (rows,), dtype=dtype)
    order, counts = torch.ops.fastkd._acm_route(choices, n)
    valid = (choices >= 0) & (choices <= n)
    falling = torch.where(valid, choices, -1).sort(stable=True, descending=True)
    assert order.dtype == counts.dtype == torch.int32
    assert order.tolist() == falling.indices.tolist()
    assert counts.tolist() == [int((falling.values > k).sum()) for k in range(n)] + [
        int(valid.sum())
    ]


def test_routes_to_the_most_learners(backend):
    choices = torch.randint(0, 1024, (3000,))
    choices[5], choices[7] = torch.iinfo(torch.int64).max, -(2**40)
    order, counts = torch.ops.fastkd._acm_route(choices, 1023)
    falling = torch.where(choices < 1024, choices, -1).sort(stable=True, descending=True)
    assert order[:-2].tolist() == falling.indices[:-2].tolist()
    assert order[-2:].tolist() == [5, 7]
    assert counts.tolist() == [int((falling.values > k).sum()) for k in range(1023)] + [2998]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", list(ERROR))
def test_values_and_gradients(backend, dtype, activation):
    check(problem(dtype=dtype), some_choices(), activation)


@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize("bias", [1, 2])
def test_bias(backend, bias, dtype):
    check(problem(dtype=dtype, bias=bias), some_choices())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [
        {"rows": 0},
        {"rows": 1},
        {"n": 1},
        {"n": 5, "rows": 5},
        {"d": 1, "b": 1, "out": 1},
        {"d": 0},
        {"b": 0},
        {"out": 0},
        {"rows": 150, "d": 40, "b": 16, "out": 24},  # more than a tile, in packs of 16 bytes
        {"rows": 70, "d": 136, "b": 129, "out": 131},  # more columns than a tile's
        {"rows": 16, "d": 33, "b": 64, "out": 136},
    ],
    ids=str,
)
def test_sizes(backend, sizes, dtype):
    tensors = problem(**sizes, dtype=dtype)
    check(tensors, some_choices(len(tensors[0]), len(tensors[1])))


@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize("rows", [8, 40])
def test_depth_in_parts(backend, rows, dtype):
    """Tiles too few for the device are added up from several blocks', learners begin within one."""
    check(problem(rows, 2, d=512, b=264, out=24, dtype=dtype), some_choices(rows, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_in_parts(backend, dtype):
    check(problem(300, 2, d=8, b=8, out=8, dtype=dtype), some_choices(300, 2))


@pytest.mark.parametrize("rows", [16, 130])
@pytest.mark.parametrize("choice", [0, 1, 3])
def test_one_choice(backend, choice, rows):
    check(problem(rows, bias=2), torch.full((rows,), choice))


@pytest.mark.parametrize("dtype", list(ERROR))
def test_before_sm_80(backend, dtype):
    if backend.type == "cuda":
        pytest.skip("emulated")
    emulator.configure(75)
    check(problem(dtype=dtype, bias=2), some_choices())
    check(problem(140, d=40, b=16, out=24, dtype=dtype), some_choices(140))
    check(problem(8, 2, d=264, b=264, out=8, dtype=dtype), some_choices(8, 2))


@pytest.mark.parametrize("number", range(16))
def test_each_subset_of_gradients(backend, number):
    wanted = [bool(number >> i & 1) for i in range(4)]
    check(problem(), some_choices(), wanted=wanted)
    if number == 4:  # b1's alone, in parts
        check(problem(300, b=8, d=8), some_choices(300), wanted=wanted)


@pytest.mark.parametrize("dtype", list(ERROR))
def test_out_of_range_choices(backend, dtype):
    choices = some_choices()
    choices[[0, 5, 20]] = torch.tensor([-1, 4, 2**31 - 1])
    found = check(problem(dtype=dtype, bias=2), choices)
    assert found[[0, 5, 20]].isnan().all()
    assert found.isnan().sum() == 3 * found.size(1)


@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize("size", [{}, {"d": 16, "b": 8, "out": 8, "rows": 140}], ids=str)
def test_rows_that_run_nothing_touch_nothing(backend, size, dtype):
    tensors = problem(**size, dtype=dtype)
    x, direction = tensors[0], torch.randn(len(tensors[0]), tensors[3].size(2)).to(dtype)
    choices = some_choices(len(x))
    choices[:8] = torch.tensor([0, 0, 0, -1, 7, 1, 1, 1])
    x[:4], x[4] = torch.nan, torch.inf
    direction[:5] = torch.nan
    found = check(tensors, choices, direction=direction)
    assert found[choices <= 3].isfinite().sum() >= (choices.clamp(-1, 3) >= 0).sum()


@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize("rows", [12, 70])
def test_learners_not_run_do_not_reach_a_row(backend, rows, dtype):
    """Infinite and NaN weights of learners that other rows of the tile run."""
    tensors = problem(rows, 4, d=16, b=40, out=8, dtype=dtype)
    clean = [v.clone() for v in tensors]
    for weight in tensors[1:]:
        weight[2], weight[3] = torch.nan, torch.inf
    choices = some_choices(rows, 4)
    few = choices <= 2
    found, kept, *routes = forward(*tensors, choices, keep=True)
    right, *_ = forward(*clean, choices)
    assert torch.equal(found[few], right[few])
    assert not found[~few].isfinite().any()
    of_x, *_ = torch.ops.fastkd._acm_rows_backward(
        found.new_ones(found.shape), *tensors, *routes, kept, 0, *(True,) * 4
    )
    assert of_x[few].isfinite().all()


@pytest.mark.parametrize("dtype", list(ERROR))
def test_infinite_rows_are_their_own(backend, dtype):
    tensors = problem(40, d=16, b=8, out=8, dtype=dtype)
    choices = some_choices(40, low=1)
    clean, *_ = forward(*tensors, choices)
    tensors[0][3], tensors[0][17] = torch.inf, torch.nan
    found, *_ = forward(*tensors, choices)
    others = [i for i in range(40) if i not in (3, 17)]
    assert torch.equal(found[others], clean[others])
    assert found[17].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_off_16_byte_lines(backend, dtype):
    tensors = []
    for value in problem(24, d=16, b=8, out=8, dtype=dtype, bias=1):
        room = value.new_zeros(value.numel() + 1)
        tensors.append(room[1:].view(value.shape).copy_(value))
    check(tensors, some_choices(24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_order_of_threads_gives_the_same_bits(backend, dtype, request):
    if backend.type == "cuda":
        pytest.skip("emulated")
    capability = int(request.node.callspec.params["backend"].split("-")[1])
    tensors, choices = problem(24, d=130, b=40, dtype=dtype), some_choices(24)
    found = []
    for seed in (0, 5):
        emulator.configure(capability, seed)
        out, kept, *routes = forward(*tensors, choices, keep=True)
        gradients = torch.ops.fastkd._acm_rows_backward(
            out, *tensors, *routes, kept, 0, *(True,) * 4
        )
        found.append((out, *routes, *gradients))
    assert all(map(torch.equal, *found))


def test_float64_is_for_the_cpu(backend):
    tensors = problem(dtype=torch.float64)
    with pytest.raises(
        RuntimeError, match=r"TypeError: acm\.hard: float64 is supported on the CPU only"
    ):
        forward(*tensors, some_choices())
