"""Products of bfloat16 matrices with float32 sums on the CPU, on every instruction set for them."""

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error

import fastkd

OPS = torch.ops.fastkd
SHAPES = [(1, 1, 1), (33, 65, 100), (70, 31, 519), (64, 600, 1000), (300, 1100, 2200), (5, 3, 8192)]


def usable():
    """The instruction sets that this machine runs."""
    chosen, found = OPS._bfloat16_capability(None), []
    for name in ("amx_bf16", "avx512_bf16"):
        try:
            found.append(OPS._bfloat16_capability(name))
        except RuntimeError:
            continue
    OPS._bfloat16_capability(chosen)
    return [name for name in found if name != "none"]


@pytest.fixture(params=usable() or ["none"])
def instructions(request):
    if request.param == "none":
        pytest.skip("this machine has no instructions for products of bfloat16")
    chosen = OPS._bfloat16_capability(None)
    OPS._bfloat16_capability(request.param)
    yield request.param
    OPS._bfloat16_capability(chosen)


def inside(rows, columns, dtype):
    """Random values within a larger matrix of NaN: rows are further apart than they are long."""
    whole = torch.full((rows + 2, columns + 3), torch.nan, dtype=dtype)
    part = whole[1 : rows + 1, 1 : columns + 1]
    part.copy_(torch.randn(rows, columns))
    return whole, part


def untouched(whole, part):
    """Whether nothing around the part has been written."""
    copy = whole.clone()
    copy[1 : part.size(0) + 1, 1 : part.size(1) + 1] = torch.nan
    return bool(copy.isnan().all())


def counted(gradient, of_rows):
    """What counts of a float32 gradient on AVX512_BF16: it rounded, and some units' remainders.

    A unit is 8 rows (columns, if not of_rows) and 2 of the others. Those left out have at most
    (7 / 8192)^2 of the gradient's energy: by bins of an exponent and two digits, at their upper
    edge.
    """
    if not of_rows:
        return counted(gradient.T, True).T
    high = gradient.bfloat16().float()
    rest = (gradient - high).bfloat16().double()
    whole = F.pad(rest, (0, -rest.size(1) % 2, 0, -rest.size(0) % 8))
    units = whole.unflatten(0, (-1, 8)).unflatten(2, (-1, 2)).square().sum((1, 3))
    bins = units.float().view(torch.int32) >> 21
    left, least = gradient.double().square().sum() * (7 / 8192) ** 2, 0.0
    for number, count in zip(*bins.unique(return_counts=True), strict=True):
        edges = (torch.stack([number, number + 1]) << 21).view(torch.float32)
        left -= count * edges[1].double()
        if left < 0:
            least = edges[0]
            break
    else:
        least = torch.inf
    some = (units.float() >= least).repeat_interleave(8, 0).repeat_interleave(2, 1)
    return high.double() + rest * some[: rest.size(0), : rest.size(1)]


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(instructions, shape, gradient_dtype):
    """Of a float32 gradient 16 digits count, of some only 8; nothing else is rounded before."""
    rows, features, vocab = shape
    _, hidden = inside(rows, features, torch.bfloat16)
    _, weight = inside(vocab, features, torch.bfloat16)
    _, gradient = inside(rows, vocab, gradient_dtype)
    bias = torch.randn(vocab)
    exact_hidden, exact_weight = hidden.double(), weight.double()
    by_rows = by_columns = gradient.bfloat16().double()
    if instructions == "amx_bf16":
        by_rows = by_columns = by_rows + (gradient - gradient.bfloat16()).bfloat16().double()
    elif gradient_dtype == torch.float32:
        by_rows, by_columns = counted(gradient, True), counted(gradient, False)

    logits = inside(rows, vocab, torch.float32)
    OPS._bfloat16_logits(logits[1], hidden, weight, bias, 0.5)
    assert relative_error(logits[1], 0.5 * exact_hidden @ exact_weight.T + bias) < 1e-6
    logits[1].fill_(torch.nan)
    OPS._bfloat16_logits(logits[1], hidden, weight, None, 1.0)
    assert relative_error(logits[1], exact_hidden @ exact_weight.T) < 1e-6
    low = inside(rows, vocab, torch.bfloat16)
    OPS._bfloat16_logits(low[1], hidden, weight, None, 1.0)
    assert torch.equal(low[1], logits[1].bfloat16())

    of_hidden = inside(rows, features, torch.float32)
    OPS._bfloat16_hidden_gradient(of_hidden[1], gradient, weight, 2.0)
    assert relative_error(of_hidden[1], 2 * by_rows @ exact_weight) < 2e-6
    low_hidden = inside(rows, features, torch.bfloat16)
    OPS._bfloat16_hidden_gradient(low_hidden[1], gradient, weight, 2.0)
    assert torch.equal(low_hidden[1], of_hidden[1].bfloat16())

    total = inside(vocab, features, torch.float32)
    before = total[1].double()
    OPS._bfloat16_weight_gradient(total[1], gradient, hidden, 2.0, True)
    true = 2 * by_columns.T @ exact_hidden
    assert relative_error(total[1], before + true) < 1e-6
    total[1].fill_(torch.nan)
    OPS._bfloat16_weight_gradient(total[1], gradient, hidden, 2.0, False)
    assert relative_error(total[1], true) < 1e-6
    assert all(untouched(*x) for x in (logits, low, of_hidden, low_hidden, total))


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0, 5), (3, 4, 0)], ids=str)
def test_empty(instructions, shape):
    rows, features, vocab = shape
    hidden = torch.ones(rows, features, dtype=torch.bfloat16)
    weight = torch.ones(vocab, features, dtype=torch.bfloat16)
    logits = torch.full((rows, vocab), torch.nan)
    OPS._bfloat16_logits(logits, hidden, weight, torch.full((vocab,), 3.0), 1.0)
    assert (logits == 3 + features).all()
    of_hidden = torch.full((rows, features), torch.nan)
    OPS._bfloat16_hidden_gradient(of_hidden, torch.ones_like(logits), weight, 1.0)
    assert (of_hidden == vocab).all()
    total = torch.full((vocab, features), torch.nan)
    OPS._bfloat16_weight_gradient(total, torch.ones_like(logits), hidden, 1.0, False)
    assert (total == rows).all()


def test_nan_and_infinity_stay_in_their_row(instructions):
    hidden, weight = torch.randn(40, 70).bfloat16(), torch.randn(90, 70).bfloat16()
    clean, found = torch.empty(40, 90), torch.empty(40, 90)
    OPS._bfloat16_logits(clean, hidden, weight, None, 1.0)
    hidden[7, 69], hidden[33, 0] = torch.nan, torch.inf
    OPS._bfloat16_logits(found, hidden, weight, None, 1.0)
    assert found[7].isnan().all()
    assert not found[33].isfinite().any()
    others = torch.arange(40)
    others = others[(others != 7) & (others != 33)]
    assert torch.equal(found[others], clean[others])
    gradient = torch.randn(40, 90)
    gradient[39, 89] = torch.nan
    total = torch.empty(90, 70)
    OPS._bfloat16_weight_gradient(total, gradient, hidden[:1].expand(40, 70).contiguous(), 1, False)
    assert total[89].isnan().all()
    assert total[:89].isfinite().all()


def test_same_bits_whatever_the_threads_and_the_other_rows(instructions):
    """Results are large enough to be written past the caches."""
    rows, features, vocab = 260, 200, 33_000
    hidden = torch.randn(rows, features).bfloat16()
    weight, gradient = torch.randn(vocab, features).bfloat16(), torch.randn(rows, vocab)
    found, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        logits, of_hidden = torch.empty(rows, vocab), torch.empty(rows, features)
        total = torch.empty(vocab, features)
        OPS._bfloat16_logits(logits, hidden, weight, None, 1.0)
        OPS._bfloat16_hidden_gradient(of_hidden, gradient, weight, 1.0)
        OPS._bfloat16_weight_gradient(total, gradient, hidden, 1.0, False)
        found.append((logits, of_hidden, total))
    torch.set_num_threads(threads)
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )
    logits, of_hidden, total = found[0]
    some = torch.empty(37, vocab)
    OPS._bfloat16_logits(some, hidden[:37], weight, None, 1.0)
    assert torch.equal(some, logits[:37])
    if instructions == "avx512_bf16":  # which remainders count depends on other rows
        gradient = gradient.bfloat16().float()
        OPS._bfloat16_hidden_gradient(of_hidden, gradient, weight, 1.0)
        OPS._bfloat16_weight_gradient(total, gradient, hidden, 1.0, False)
    few = torch.empty(37, features)
    OPS._bfloat16_hidden_gradient(few, gradient[:37], weight, 1.0)
    assert torch.equal(few, of_hidden[:37])
    part = torch.empty(1001, features)
    OPS._bfloat16_weight_gradient(part, gradient[:, :1001], hidden, 1.0, False)
    assert torch.equal(part, total[:1001])


def test_other_products_of_bfloat16_still_run(instructions):
    """PyTorch uses the same tiles: their shape is as it was before."""
    x = torch.randn(256, 256).bfloat16()
    before = x @ x
    out = torch.empty(256, 256)
    for _ in range(3):
        OPS._bfloat16_logits(out, x, x, None, 1.0)
        assert torch.equal(x @ x, before)


@pytest.mark.parametrize("strides", ["contiguous", "hidden", "weight"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "reverse_kl"])
@pytest.mark.parametrize("distance", [0.3, 1e-3], ids=["apart", "converged"])
def test_gradients_of_a_head(instructions, divergence, distance, strides):
    """Within the rounding of a bfloat16 gradient of float64, also where the sides nearly agree.

    All are bfloat16: the sides' difference is what bfloat16 leaves of it.
    """
    random = torch.Generator().manual_seed(3)
    hidden = torch.randn(96, 256, generator=random).bfloat16()
    weight = (torch.randn(3000, 256, generator=random) / 8).bfloat16()
    teacher = (hidden.float() + distance * torch.randn(96, 256, generator=random)).bfloat16()
    if strides == "hidden":
        hidden = hidden.T.contiguous().T
    if strides == "weight":
        weight = weight.T.contiguous().T
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    true = fastkd.reference.linear_softmax_divergence(
        *exact, teacher.double(), weight.double(), divergence=divergence
    )
    true.backward()
    mine = [x.clone().requires_grad_() for x in (hidden, weight)]
    found = fastkd.linear_softmax_divergence(
        *mine, teacher, weight.clone(), divergence=divergence, chunk_size=40
    )
    found.backward()
    # The logits' differences have errors of 1e-6 or so, and near convergence are 1e-3.
    assert relative_error(found, true) < (1e-5 if distance == 0.3 else 1e-4)
    for one, other in zip(mine, exact, strict=True):
        # Rounded to 8 digits at the end: 1.66e-3; and 7 / 8192 in the products before it.
        assert relative_error(one.grad, other.grad) < 2e-3


@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_products_of_float32_gradients(instructions, spread, scale):
    """Within 7 / 8192, whatever the distribution of the gradient's entries, and their size."""
    rows, features, vocab = 70, 128, 3000
    gradient = scale * torch.randn(rows, vocab) * (spread * torch.randn(rows, vocab)).exp()
    gradient[3, 5] = torch.nan  # of one row and one column
    gradient[9] = 0
    hidden, weight = torch.randn(rows, features).bfloat16(), torch.randn(vocab, features).bfloat16()
    of_hidden, total = torch.empty(rows, features), torch.empty(vocab, features)
    OPS._bfloat16_hidden_gradient(of_hidden, gradient, weight, 1.0)
    OPS._bfloat16_weight_gradient(total, gradient, hidden, 1.0, False)
    true, true_total = gradient.double() @ weight.double(), gradient.double().T @ hidden.double()
    rows_kept, columns_kept = torch.arange(rows) != 3, torch.arange(vocab) != 5
    assert of_hidden[3].isnan().all()
    assert total[5].isnan().all()
    assert relative_error(of_hidden[rows_kept], true[rows_kept]) < 1.1 * 7 / 8192
    assert relative_error(total[columns_kept], true_total[columns_kept]) < 1.1 * 7 / 8192


def test_errors():
    low, wide = torch.ones(4, 6, dtype=torch.bfloat16), torch.ones(4, 6)
    out = torch.empty(4, 4)
    for call, message in (
        (
            lambda: OPS._bfloat16_logits(out, wide, low, None, 1),
            "hidden must be bfloat16, got Float",
        ),
        (
            lambda: OPS._bfloat16_logits(out, low, low[:, :5], None, 1),
            r"shape \[4, 6\], got \[4, 5\]",
        ),
        (lambda: OPS._bfloat16_logits(out[0], low, low, None, 1), r"out must have shape \[4, 4\]"),
        (lambda: OPS._bfloat16_logits(out.double(), low, low, None, 1), "out must be bfloat16 or"),
        (lambda: OPS._bfloat16_logits(out, low, low, torch.ones(3), 1), "bias must be float32"),
        (lambda: OPS._bfloat16_logits(out, low[0], low, None, 1), "hidden must be a matrix"),
        (lambda: OPS._bfloat16_hidden_gradient(wide, out, low[:3], 1), "weight must have shape"),
        (lambda: OPS._bfloat16_hidden_gradient(wide, out.T, low, 1), "gradient must be on the CPU"),
        (lambda: OPS._bfloat16_weight_gradient(low, out, low, 1, False), "total must be float32"),
        (lambda: OPS._bfloat16_capability("sse9"), "instruction set 'sse9' is not compiled in"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_other_instruction_sets_do_without():
    """Kernels for AVX2 are not accompanied by products that need AVX-512."""
    chosen = fastkd.cpu_capability()
    fastkd.cpu_capability("x86_64_v3" if chosen.startswith("x86") else chosen)
    try:
        assert OPS._bfloat16_capability(None) == "none"
        x = torch.ones(4, 6, dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match="no instructions for products of bfloat16"):
            OPS._bfloat16_logits(torch.empty(4, 4), x, x, None, 1.0)
        y = x.clone().requires_grad_()
        fastkd.linear_softmax_divergence(y, x, -x, x).backward()
        assert y.grad.isfinite().all()
    finally:
        fastkd.cpu_capability(chosen)
