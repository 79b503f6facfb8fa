"""What chunk_log_likelihood moves on CUDA, counted by the emulator, and what only CUDA does.

A row that is needed is read once, and once more by the backward pass, which writes its gradient. Of
the boundary set a block reads one bit a column, for all its rows together; and once a call the set
itself is read, a byte a column, to write those bits.
"""

import emulator
import pytest
import torch
from cases import logits

import fastkd

pytestmark = pytest.mark.skipif(not emulator.is_built(), reason="run through `make test`")

QWEN = 151_936
WIDE = [torch.bfloat16, torch.float32]
CHUNKS = torch.tensor([[0, 0, 1, -1, -1], [-1, 1, 1, 2, 4]])
SCORED, ENDED, NEEDED = 7, 4, 8  # rows of them: their own token, the one after a chunk, either


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    emulator.configure(90)
    fastkd.release_memory()
    monkeypatch.setattr(torch.ops, "fastkd", torch.ops.fastkd_simt)


def problem(vocab, dtype=torch.float32, chunks=CHUNKS):
    ids = torch.randint(0, vocab, chunks.shape)
    return logits((*chunks.shape, vocab), dtype), ids, chunks, 5


def size_of(scores):
    """Bytes of a row."""
    return scores.size(-1) * scores.element_size()


def bits(vocab):
    """Bytes of a boundary set: those read a block, and those of packing it."""
    return vocab / 8, vocab + vocab / 8


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("vocab", [50_257, QWEN])  # 50,257: each row begins elsewhere in a line
@pytest.mark.parametrize("capability", [80, 90])
def test_rows_are_read_once(capability, vocab, dtype):
    emulator.configure(capability)
    scores, *others = problem(vocab, dtype)
    alone = emulator.traffic_of(lambda: fastkd.chunk_log_likelihood(scores, *others))
    assert alone.moved <= 1.02 * SCORED * size_of(scores)
    assert alone.share_of_16 >= 0.99
    assert alone.launches == 2
    boundary = torch.rand(vocab) < 0.3
    found = emulator.traffic_of(
        lambda: fastkd.chunk_log_likelihood(scores, *others, boundary=boundary)
    )
    each, once = bits(vocab)
    assert found.moved <= 1.02 * (NEEDED * size_of(scores) + ENDED * each + once)
    assert found.share_of_16 >= 0.98  # bits are written two bytes at a time
    assert found.launches == 3


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("vocab", [50_257, QWEN])
@pytest.mark.parametrize("capability", [80, 90])
def test_backward_reads_once_and_writes_once(capability, vocab, dtype):
    emulator.configure(capability)
    scores, *others = problem(vocab, dtype)
    scores.requires_grad_()
    row, rows = size_of(scores), CHUNKS.numel()
    loss = fastkd.chunk_log_likelihood(scores, *others).log_likelihood.sum()
    alone = emulator.traffic_of(loss.backward)
    assert alone.moved <= 1.02 * (SCORED + rows) * row
    assert alone.share_of_16 >= 0.99
    assert alone.launches == 1
    found = fastkd.chunk_log_likelihood(scores, *others, boundary=torch.rand(vocab) < 0.3)
    loss = found.log_likelihood.sum() + found.boundary_log_prob.sum()
    both = emulator.traffic_of(loss.backward)
    each, once = bits(vocab)
    assert both.moved <= 1.02 * ((NEEDED + rows) * row + ENDED * each + once)
    assert both.share_of_16 >= 0.98
    assert both.launches == 2


def test_rows_without_an_upstream_gradient_are_not_read():
    scores, *others = problem(QWEN)
    found = fastkd.chunk_log_likelihood(scores.requires_grad_(), *others)
    backward = emulator.traffic_of(found.log_likelihood[0, 1].backward)
    assert backward.read <= 1.02 * size_of(scores)
    assert backward.written <= 1.02 * CHUNKS.numel() * size_of(scores)
    assert scores.grad.count_nonzero(-1).bool().nonzero().tolist() == [[0, 2]]


def test_one_copy_of_the_set_serves_all_rows_of_a_block():
    """Blocks are 2048 at most; theirs are rows of every kind."""
    rows, vocab = 3 * 2048, 2100
    place = torch.arange(rows)
    chunks = torch.where(place % 14 < 12, place, -1).unsqueeze(0)
    before = torch.cat([torch.full((1, 1), -1), chunks[:, :-1]], 1)
    needed = int(((chunks >= 0) | (before >= 0)).sum())
    scores, ids, *_ = problem(vocab, torch.bfloat16, chunks)
    arguments = scores.requires_grad_(), ids, chunks, rows
    out, boundary = [], torch.rand(vocab) < 0.3
    found = emulator.traffic_of(
        lambda: out.append(fastkd.chunk_log_likelihood(*arguments, boundary=boundary))
    )
    each, once = bits(vocab)
    numbers = 140  # bytes of a row's ids and sums
    assert found.moved <= needed * size_of(scores) + rows * numbers + 2048 * each + once
    (out[0].log_likelihood.sum() + out[0].boundary_log_prob.sum()).backward()
    assert scores.grad[0].isfinite().all()
    assert int(scores.grad[0].count_nonzero(-1).bool().sum()) == needed


def test_more_texts_than_blocks():
    chunks = torch.tensor([[0, 1, 1], [-1, 0, 2]]).repeat(1100, 1)
    scores, ids, *_ = problem(5, chunks=chunks)
    assert_matches(scores, ids, chunks, 3, boundary=torch.arange(5) < 2)


def test_only_a_row_whose_boundary_underflows_is_read_again():
    scores, *others = problem(QWEN)
    boundary = torch.arange(QWEN) < 1000
    scores[0, 2, boundary] = -200.0
    found = emulator.traffic_of(
        lambda: fastkd.chunk_log_likelihood(scores, *others, boundary=boundary)
    )
    each, once = bits(QWEN)
    assert found.moved <= 1.02 * ((NEEDED + 1) * size_of(scores) + ENDED * each + once)


@pytest.mark.parametrize("vocab", [300, 5000, QWEN])
def test_any_order_of_threads_gives_the_same_bits(vocab):
    scores, *others = problem(vocab)
    boundary, found = torch.rand(vocab) < 0.3, []
    for seed in (0, 1, 2):
        emulator.configure(90, seed)
        leaf = scores.clone().requires_grad_()
        out = fastkd.chunk_log_likelihood(leaf, *others, boundary=boundary)
        (out.log_likelihood.sum() + 2 * out.boundary_log_prob.sum()).backward()
        found.append((*out, leaf.grad))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def assert_matches(scores, *arguments, boundary):
    scores = scores.detach().requires_grad_()
    exact_scores = scores.detach().double().requires_grad_()
    found = fastkd.chunk_log_likelihood(scores, *arguments, boundary=boundary)
    exact = fastkd.reference.chunk_log_likelihood(exact_scores, *arguments, boundary=boundary)
    assert torch.equal(found.token_count, exact[2])
    for mine, right in zip(found[:2], exact[:2], strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=2e-6, atol=4e-6)
    (found.log_likelihood.sum() + 2 * found.boundary_log_prob.sum()).backward()
    (exact[0].sum() + 2 * exact[1].sum()).backward()
    error = 2e-6 if scores.dtype == torch.float32 else 4e-3
    assert (scores.grad.double() - exact_scores.grad).norm() <= error * exact_scores.grad.norm()


@pytest.mark.parametrize("longest", [1, 3, 50, 700])
def test_chunks_over_the_rows_of_several_threads(longest):
    """A thread has three rows of such a text."""
    chunks = torch.full((2, 700), -1)
    for text in chunks:
        place = 0
        for chunk in range(700):
            place += int(torch.randint(0, 4, ()))
            length = int(torch.randint(longest // 2 + 1, longest + 1, ()))
            text[place : place + length] = chunk
            place += length
    scores, ids, *_ = problem(9, chunks=chunks)
    assert_matches(scores, ids, chunks, 700, boundary=torch.arange(9) < 4)


@pytest.mark.parametrize("offset", [0, 1, 5, 15])
@pytest.mark.parametrize("vocab", [37, 2101, 5003])
@pytest.mark.parametrize("dtype", WIDE)
def test_boundary_anywhere_in_memory(dtype, vocab, offset):
    boundary = (torch.rand(vocab + offset) < 0.3)[offset:]
    assert_matches(*problem(vocab, dtype), boundary=boundary)


@pytest.mark.parametrize("dtype", WIDE)
def test_a_set_too_large_for_shared_memory(dtype):
    emulator.configure(75)
    vocab = 300_001
    scores, *others = problem(vocab, dtype, torch.tensor([[0, 1]]))
    assert_matches(scores, *others, boundary=torch.rand(vocab) < 0.3)
    found = emulator.traffic_of(
        lambda: fastkd.chunk_log_likelihood(scores, *others, boundary=torch.rand(vocab) < 0.3)
    )
    assert found.largest_shared_memory < 4096 + emulator.UNDER_WAY


LONG = torch.arange(600) // 2  # a stretch of three rows a thread


@pytest.mark.parametrize(
    ("chunks", "place", "chunk", "token"),
    [
        (CHUNKS[0], 1, 5, 0),
        (CHUNKS[0], 4, 5, 0),
        (CHUNKS[0], 4, 2**40, 0),
        (CHUNKS[0], 3, -2, 0),
        (CHUNKS[0], 0, 2, 0),  # descending
        (CHUNKS[0], 4, 1, 0),  # no neighbours
        (CHUNKS[0], 2, 1, 20),
        (CHUNKS[0], 0, 0, -1),
        (CHUNKS[0], 0, 0, -(2**40)),
        (LONG, 599, 0, 0),
        (LONG, 599, 298, 0),
        (LONG, 5, 299, 0),
        (LONG, 300, 150, 20),
    ],
)
def test_a_text_that_no_check_could_see_becomes_nan(chunks, place, chunk, token):
    """Chunks or tokens outside, or out of order: NaN, and nothing beyond the tensors is touched."""
    scores, ids, _, count = problem(20, chunks=torch.stack([chunks, chunks, chunks]))
    count = max(count, int(chunks.max()) + 1)
    boundary = torch.arange(20) < 7
    chunks = torch.stack([chunks, chunks, chunks])
    chunks[1, place], ids[1, place] = chunk, token
    found = fastkd.chunk_log_likelihood(
        scores.requires_grad_(), ids, chunks, count, boundary=boundary
    )
    assert found.log_likelihood[1].isnan().all()
    assert found.boundary_log_prob[1].isnan().all()
    assert not found.token_count[1].any()
    (found.log_likelihood.sum() + found.boundary_log_prob.sum()).backward()
    assert scores.grad[1][chunks[1] >= 0].isnan().all()
    others = torch.tensor([0, 2])
    alone = scores.detach()[others].requires_grad_()
    right = fastkd.chunk_log_likelihood(
        alone, ids[others], chunks[others], count, boundary=boundary
    )
    assert all(torch.equal(a[others], b) for a, b in zip(found, right, strict=True))
    (right.log_likelihood.sum() + right.boundary_log_prob.sum()).backward()
    assert torch.equal(scores.grad[others], alone.grad)


def test_an_impossible_boundary_takes_no_gradient():
    scores, *others = problem(20)
    boundary = torch.arange(20) < 7
    scores[:, :, boundary] = -torch.inf
    found = fastkd.chunk_log_likelihood(scores.requires_grad_(), *others, boundary=boundary)
    assert found.boundary_log_prob[0, :2].eq(-torch.inf).all()
    found.boundary_log_prob.sum().backward()
    assert not scores.grad.any()


def test_unscored_tokens_may_be_anything():
    scores, ids, chunks, count = problem(20)
    found = fastkd.chunk_log_likelihood(scores, ids, chunks, count)
    other = torch.where(chunks < 0, -100, ids)
    assert torch.equal(fastkd.chunk_log_likelihood(scores, other, chunks, count)[0], found[0])


def test_float64_is_for_the_cpu():
    scores, *others = problem(20, torch.float64)
    with pytest.raises(TypeError, match="chunk_log_likelihood: float64 logits are supported on"):
        fastkd.chunk_log_likelihood(scores, *others)
