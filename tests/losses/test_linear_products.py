"""Linear heads: how many products, how much memory, in which dtypes."""

import pytest
import torch
from cases import relative_error
from heads import count_products, head

import fastkd
from benchmarks.measure import memory_of
from fastkd import LinearLogits
from fastkd._ops.linear import products

ROWS, FEATURES, VOCAB = 64, 8, 96


def problem(dtype=torch.float32, rows=ROWS, features=FEATURES, vocab=VOCAB):
    """A student near its teacher, as training makes it."""
    hidden, weight = head(rows, features, vocab, torch.float64, bias=False)
    teacher = hidden.detach() + 0.1 * torch.randn(rows, features, dtype=torch.float64)
    other = weight.detach() + 0.05 * torch.randn(vocab, features, dtype=torch.float64)
    student = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
    return *student, teacher.to(dtype), other.to(dtype)


def products_of(monkeypatch, call, size=2 * ROWS * FEATURES * VOCAB):
    """Products of all rows, features and columns in a call with its backward pass."""
    with monkeypatch.context() as patch:
        counter = count_products(patch)
        loss = call()
        if loss.requires_grad:
            loss.sum().backward()
    return counter.operations / size, counter.calls


@pytest.mark.parametrize("chunk_size", [None, 16])
def test_number_of_products(monkeypatch, chunk_size):
    h, w, t, v = problem()
    chunks = 1 if chunk_size is None else 4

    def divergence(h, w, t, v, **options):
        return lambda: fastkd.linear_softmax_divergence(
            h, w, t, v, chunk_size=chunk_size, **options
        )

    count = lambda call: products_of(monkeypatch, call)  # noqa: E731
    frozen, still = w.detach(), h.detach()
    assert count(divergence(h, w, t, v)) == (4, 4 * chunks)
    assert count(divergence(h, frozen, t, v)) == (3, 3 * chunks)
    assert count(divergence(still, w, t, v)) == (3, 3 * chunks)
    assert count(divergence(still, frozen, t, v)) == (2, 2 * chunks)
    assert count(divergence(h, w, t, v, return_stats=False, divergence="jsd"))[0] == 4
    assert count(divergence(h, w, t, v, reduction="none"))[0] == 6
    # Tied heads: both sides' logits are one product.
    assert count(divergence(h, w, t, w.detach())) == (4, 3 * chunks)
    assert count(divergence(h, w, t, v, mask=torch.arange(ROWS) % 2 > 0))[0] == 2
    mask = torch.arange(ROWS) % 2 > 0
    assert count(divergence(h, w, t, v, mask=mask, compact=False))[0] == 4
    assert count(divergence(h, w, t, v, mask=torch.zeros_like(mask)))[0] == 0
    assert count(divergence(h, w, t, v, vocab_size=VOCAB // 2))[0] == 2
    logits = LinearLogits(h, w, chunk_size=chunk_size)
    best = fastkd.teacher_topk(t @ v.T, 4)
    assert count(lambda: fastkd.topk_divergence(logits, *best)) == (3, 3 * chunks)
    labels = torch.arange(ROWS)
    assert count(lambda: fastkd.cross_entropy(logits, labels)) == (3, 3 * chunks)
    assert count(lambda: fastkd.token_log_probs(logits, labels))[0] == 4
    with torch.no_grad():
        assert count(divergence(h, w, t, v)) == (2, 2 * chunks)
        assert count(lambda: fastkd.token_log_probs(logits, labels)) == (1, chunks)


def test_backward_does_nothing_where_the_gradient_is_1():
    h, w, t, v = problem()
    loss = fastkd.linear_softmax_divergence(h, w, t, v)
    first = torch.autograd.grad(loss, [h, w], retain_graph=True)
    second = torch.autograd.grad(loss, [h, w], torch.tensor(2.0), retain_graph=True)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(2 * one, two)
    with torch.profiler.profile() as profile:
        loss.backward()
    names = {event.name for event in profile.events()}
    assert "aten::mul" not in names and "aten::mul_" not in names  # noqa: PT018


def test_chunks_are_equal_and_follow_the_rule():
    from fastkd._ops.linear.call import make
    from fastkd._ops.linear.chunks import Chunks
    from fastkd.losses._softmax_divergence import OP, given

    h, w, t, v = problem(rows=1030, features=600, vocab=7)
    options = {**fastkd.softmax_divergence.__kwdefaults__}
    options = {k: options[k] for k in options if k not in ("inplace", "group")}

    def sizes(student, teacher, trained=True):
        call = make(OP, given(student, teacher, dict(options)))
        chunks = Chunks(call, [trained, trained, False, False, False, False])
        return [last - first for first, last in chunks]

    assert sizes(LinearLogits(h, w), LinearLogits(t, v)) == [344, 344, 342]  # 512 at the most
    assert sizes(LinearLogits(h, w), LinearLogits(t, v), False) == [1030]
    assert sizes(LinearLogits(h, w, chunk_size=400), LinearLogits(t, v)) == [344, 344, 342]
    half = [x.bfloat16() for x in (h, w, t, v)]
    assert sizes(LinearLogits(*half[:2]), LinearLogits(*half[2:])) == [515, 515]  # 1,024
    with pytest.raises(ValueError, match="chunk_size must be the same in all LinearLogits"):
        sizes(LinearLogits(h, w, chunk_size=400), LinearLogits(t, v, chunk_size=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory(dtype):
    """Within 5 % of the formula in the documentation."""
    rows, features, vocab, chunk = 1024, 128, 32768, 512
    h, w, t, v = problem(dtype, rows, features, vocab)

    def step():
        loss = fastkd.linear_softmax_divergence(h, w, t, v, chunk_size=chunk)
        loss.backward()
        h.grad = w.grad = None

    step()
    fastkd.release_memory()
    memory = memory_of(step, torch.device("cpu"))
    fastkd.release_memory()
    if memory is None:
        pytest.skip("this system does not tell the peak of resident memory")
    expected = chunk * vocab * 8 + rows * features * h.itemsize + vocab * features * 4
    if dtype == torch.bfloat16:  # the weight converted, and its gradient at the end
        expected += products.SLICE * features * 4 + vocab * features * 2
    assert memory.peak < 1.05 * expected
    assert memory.peak > 0.8 * expected  # else something else has been measured


@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.bfloat16, 3e-3), (torch.float16, 6e-4)], ids=str
)
def test_16_bit_heads(monkeypatch, dtype, error, multiplies):
    """float32 logits; products of the gradient in float32, or of the rounded gradient."""
    monkeypatch.setattr(products, "multiplies", lambda dtype, device: multiplies)
    monkeypatch.setattr(products, "SLICE", 40)
    h, w, t, v = problem(dtype)
    exact = [x.detach().double().requires_grad_() for x in (h, w, t, v)]
    true = fastkd.reference.linear_softmax_divergence(*exact, divergence="reverse_kl")
    true.backward()
    bias = torch.zeros(VOCAB, dtype=dtype, requires_grad=True)
    for options in ({}, {"chunk_size": 16}, {"student_bias": bias}):
        loss = fastkd.linear_softmax_divergence(h, w, t, v, divergence="reverse_kl", **options)
        torch.testing.assert_close(loss.double(), true, rtol=2e-5, atol=0)
        loss.backward()
        for mine, exactly in zip((h, w), exact, strict=False):
            assert mine.grad.dtype == dtype
            assert relative_error(mine.grad, exactly.grad) < error
            mine.grad = None
    assert bias.grad.dtype == dtype


def test_16_bit_logits_are_worse():
    """What `logits_dtype` costs, and that it does what it says."""
    h, w, t, v = problem(torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (h, w, t, v)]
    fastkd.reference.linear_softmax_divergence(*exact).backward()
    errors = []
    for dtype in (None, torch.bfloat16):
        fastkd.linear_softmax_divergence(h, w, t, v, logits_dtype=dtype).backward()
        errors.append(relative_error(h.grad, exact[0].grad))
        h.grad = None
    assert errors[0] < 3e-3 < 1e-2 < errors[1]


def test_float16_gradients_do_not_underflow():
    """The division by the number of rows waits for the loss scale."""
    h, w, t, v = problem(torch.float16)
    loss = fastkd.linear_softmax_divergence(h, w, t, v, normalizer=2.0**24)
    loss.backward(torch.tensor(2.0**24))
    wide = [x.detach().double().requires_grad_() for x in (h, w, t, v)]
    fastkd.reference.linear_softmax_divergence(*wide, reduction="sum").backward()
    assert relative_error(h.grad, wide[0].grad) < 2e-3
    assert relative_error(w.grad, wide[1].grad) < 2e-3
    assert fastkd.linear_softmax_divergence(h, w, t, v, normalizer=0.0).item() == 0


def test_memory_of_a_chunk_is_used_again():
    """And no result is in it."""
    h, w, t, v = problem(rows=1024, features=64, vocab=512)
    fastkd.release_memory()
    first = fastkd.linear_softmax_divergence(h, w, t, v)
    places = {k: x.data_ptr() for k, x in products.workspace._kept.items()}
    assert places
    gradient = torch.autograd.grad(first, w)[0]
    copy = gradient.clone()
    second = fastkd.linear_softmax_divergence(h, w, t + 1, v)
    assert {k: x.data_ptr() for k, x in products.workspace._kept.items()} == places
    assert torch.equal(gradient, copy)  # not in memory that is used again while it is alive
    address = gradient.data_ptr()
    del first, second, gradient
    third = fastkd.linear_softmax_divergence(h, w, t, v)
    assert torch.equal(torch.autograd.grad(third, w)[0], copy)
    assert address
    fastkd.release_memory()
    assert not products.workspace._kept


def test_same_bits_again():
    """Also in memory that other calls have used."""
    h, w, t, v = problem(rows=512, features=32, vocab=1000)
    found = []
    for _ in range(2):
        loss = fastkd.linear_softmax_divergence(h, w, t, v, chunk_size=100)
        found.append((loss.detach(), *torch.autograd.grad(loss, [h, w])))
        fastkd.linear_softmax_divergence(h + 1, w, t, v)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
