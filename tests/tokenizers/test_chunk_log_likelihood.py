"""chunk_log_likelihood: values and gradients against float64, rows not read, errors."""

import math

import pytest
import torch
from cases import allowed_error, assert_derivatives, logits
from chunks import chunks_of
from hypothesis import given, settings
from hypothesis import strategies as st
from raw import check

import fastkd

SHAPES = (
    (0, 3, 5),
    (1, 1, 1),
    (2, 9, 7),
    (3, 4, 33),
    (2, 5, 1031),
    (1, 6, 20011),
    (7, 11),
    (2, 0, 4),
)


def problem(shape, dtype=torch.float32, num_chunks=6):
    ids = torch.randint(0, shape[-1], shape[:-1])
    return logits(shape, dtype), ids, chunks_of(shape[:-1], num_chunks), num_chunks


def assert_matches(scores, *arguments, gradients=True, **options):
    scores = scores.detach().requires_grad_(gradients)
    exact_scores = scores.detach().double().requires_grad_(gradients)
    found = fastkd.chunk_log_likelihood(scores, *arguments, **options)
    exact = fastkd.reference.chunk_log_likelihood(exact_scores, *arguments, **options)
    assert torch.equal(found.token_count, exact[2])
    values, rights = [], []
    for mine, right in zip(found[:2], exact[:2], strict=True):
        if right is None:
            assert mine is None
            continue
        assert mine.dtype == (torch.float64 if scores.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(mine.double(), right, rtol=2e-6, atol=4e-6, equal_nan=True)
        values.append(mine)
        rights.append(right)
    if not gradients:
        return found
    weights = [torch.randn(right.shape, dtype=torch.float64) for right in rights]
    keep = [torch.isfinite(right) for right in rights]

    def gradient_of(outputs, wrt):
        total = sum(
            torch.where(k, x, 0).mul(w.to(x.dtype)).sum()
            for x, w, k in zip(outputs, weights, keep, strict=True)
        )
        return torch.autograd.grad(total, wrt)[0]

    mine, right = gradient_of(values, scores), gradient_of(rights, exact_scores)
    assert mine.dtype == scores.dtype
    assert (mine.double() - right).norm() <= allowed_error(right, scores.dtype)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("boundary", [False, True])
def test_values_and_gradients(backend, shape, boundary):
    options = {"boundary": torch.rand(shape[-1]) < 0.3} if boundary else {}
    assert_matches(*problem(shape), **options)
    assert_matches(*problem(shape), temperature=1.7, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(backend, dtype):
    boundary = torch.rand(1500) < 0.3
    assert_matches(*problem((2, 6, 1500), dtype), boundary=boundary)
    scores, ids, chunks, count = problem((1, 3, 151_936), dtype)
    assert_matches(scores, ids.int(), chunks.long(), count, boundary=torch.rand(151_936) < 0.3)


def test_rows_of_no_chunk_are_not_read(backend):
    scores, ids, chunks, count = problem((3, 12, 40))
    ids = torch.where(chunks < 0, -100, ids)
    before = torch.cat([torch.full((3, 1), -1), chunks[:, :-1]], 1)
    unread = (chunks < 0) & (before < 0)
    scores[unread] = math.nan
    assert unread.any()
    scores.requires_grad_()
    found = fastkd.chunk_log_likelihood(scores, ids, chunks, count, boundary=torch.rand(40) < 0.5)
    assert found.log_likelihood.isfinite().all()
    found.log_likelihood.sum().backward()
    assert not scores.grad[unread].any()
    assert scores.grad.isfinite().all()
    assert_matches(scores.nan_to_num(), ids, chunks, count)


def test_special_values(backend):
    scores, ids = logits((1, 8, 300)), torch.randint(0, 300, (1, 8))
    chunks = torch.arange(8).unsqueeze(0)
    boundary = torch.arange(300) < 100
    scores[0, 1, 50:200] = -math.inf
    scores[0, 2, ids[0, 2]] = -math.inf  # impossible token
    scores[0, 3, :100] = -math.inf  # impossible boundary
    scores[0, 4, 7] = math.nan
    scores[0, 5] = -math.inf
    scores[0, 6, :100] = -120.0  # a boundary that underflows beside the rest
    scores[0, 7] *= 1e4
    found = assert_matches(scores, ids, chunks, 8, boundary=boundary, gradients=False)
    assert found.log_likelihood[0, 2] == -math.inf
    assert found.boundary_log_prob[0, 2] == -math.inf
    assert found.log_likelihood[0, 4:6].isnan().all()
    assert -130 < found.boundary_log_prob[0, 5] < -100
    assert_matches(scores[:, [0, 1, 2, 3, 6]], ids[:, :5], chunks[:, :5], 8, boundary=boundary)


def test_a_chunk_at_the_end_has_no_boundary(backend):
    scores, ids = logits((1, 3, 20)), torch.randint(0, 20, (1, 3))
    found = fastkd.chunk_log_likelihood(
        scores, ids, torch.tensor([[-1, 0, 0]]), 2, boundary=torch.arange(20) < 3
    )
    assert found.boundary_log_prob.tolist() == [[0.0, 0.0]]
    assert found.token_count.tolist() == [[2, 0]]


def test_layouts(backend):
    scores, ids, chunks, count = problem((2, 6, 64))
    for layout in (
        scores.transpose(0, 1).contiguous().transpose(0, 1),
        logits((2, 6, 128))[..., ::2],
        logits((1, 6, 64)).expand(2, 6, 64),
    ):
        assert_matches(layout, ids, chunks, count, boundary=(torch.rand(128) < 0.3)[::2])


@pytest.mark.only("cpu", "simt")
def test_threads_change_no_bit(backend):
    boundary = torch.rand(100_000) < 0.3
    scores, *others = problem((1, 3, 100_000))
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        leaf = scores.clone().requires_grad_()
        out = fastkd.chunk_log_likelihood(leaf, *others, boundary=boundary)
        (out.log_likelihood.sum() + out.boundary_log_prob.sum()).backward()
        found.append((*out, leaf.grad))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.only("cpu")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"chunk_ids": torch.tensor([[0, 0, 6]])}, IndexError, r"lie in \[-1, num_chunks = 6\)"),
        ({"chunk_ids": torch.tensor([[0, -2, 1]])}, IndexError, "got -2 in row 1"),
        ({"chunk_ids": torch.tensor([[0, 1, 0]])}, ValueError, "must be neighbours"),
        ({"chunk_ids": torch.tensor([[0, -1, 0]])}, ValueError, "must be neighbours"),
        ({"chunk_ids": torch.tensor([[0, 1]])}, ValueError, r"shape \[1, 3\], got shape \[1, 2\]"),
        ({"chunk_ids": torch.ones(1, 3)}, TypeError, "chunk_ids must be int64 or int32"),
        ({"token_ids": torch.tensor([[0, 20, 0]])}, IndexError, r"token_ids must lie in \[0, 20\)"),
        ({"token_ids": torch.tensor([[0, -1, 0]])}, IndexError, "got -1 in row 1"),
        ({"num_chunks": -1}, ValueError, "num_chunks"),
        ({"boundary": torch.ones(21).bool()}, ValueError, r"boundary must have .* shape \[20\]"),
        ({"boundary": torch.ones(20)}, TypeError, "boundary must be bool"),
        ({"boundary": [True] * 20}, TypeError, "boundary must be a tensor"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"logits": torch.zeros(1, 3, 20).long()}, TypeError, "logits must be float32"),
        ({"logits": torch.zeros(20)}, ValueError, "at least two dimensions"),
        ({"vocab_size": -1}, ValueError, "vocab_size is -1, logits has 20 columns"),
        ({"vocab_size": 21}, ValueError, "vocab_size is 21, logits has 20 columns"),
        ({"vocab_size": 2.5}, TypeError, "vocab_size must be an integer, got float"),
    ],
)
def test_errors(backend, change, error, message):
    arguments = {
        "logits": torch.zeros(1, 3, 20),
        "token_ids": torch.zeros(1, 3).long(),
        "chunk_ids": torch.tensor([[0, 0, 1]]),
        "num_chunks": 6,
    }
    with pytest.raises(error, match=f"chunk_log_likelihood: .*{message}"):
        fastkd.chunk_log_likelihood(**{**arguments, **change})


def in_order(chunks, num_chunks):
    """Whether every text's chunks are runs of neighbours with ascending ids."""
    for text in chunks:
        runs = [c for i, c in enumerate(text) if i == 0 or c != text[i - 1]]
        found = [c for c in runs if c >= 0]
        if found != sorted(set(found)) or min(text) < -1 or max(text) >= num_chunks:
            return False
    return True


@pytest.mark.only("cpu")
def test_any_ids_give_an_error_or_the_definition(backend):
    ids = st.lists(st.integers(-2, 6), min_size=4, max_size=4)
    chunks = st.lists(st.integers(-2, 4), min_size=4, max_size=4)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.lists(ids, min_size=2, max_size=2), st.lists(chunks, min_size=2, max_size=2))
    def run(token_ids, chunk_ids):
        scores = logits((2, 4, 5))
        pairs = [
            p for a, b in zip(token_ids, chunk_ids, strict=True) for p in zip(a, b, strict=True)
        ]
        fine = in_order(chunk_ids, 4) and all(0 <= i < 5 for i, chunk in pairs if chunk >= 0)
        arguments = (scores, torch.tensor(token_ids), torch.tensor(chunk_ids), 4)
        if fine:
            assert_matches(*arguments, boundary=torch.arange(5) < 2)
        else:
            with pytest.raises((IndexError, ValueError), match="chunk_log_likelihood"):
                fastkd.chunk_log_likelihood(*arguments)

    run()


@pytest.mark.only("cpu")
def test_gradcheck(backend):
    scores, *others = problem((2, 5, 6), torch.float64)
    boundary = torch.tensor([True, False, True, False, False, False])

    def run(x):
        return fastkd.chunk_log_likelihood(x, *others, boundary=boundary, temperature=1.3)[:2]

    scores.requires_grad_()
    assert_derivatives(run, scores)
    assert torch.func.grad(lambda x: run(x)[0].sum())(scores.detach()).isfinite().all()


def test_opcheck():
    scores, *others = problem((2, 5, 40))
    for boundary in (None, torch.rand(40) < 0.3):
        arguments = (scores, *others, boundary, 1.5, None)
        check("chunk_log_likelihood", arguments)
        found = torch.ops.fastkd._chunk_log_likelihood(*arguments)
        upstream = (
            torch.ones_like(found[0]),
            None if boundary is None else torch.ones_like(found[1]),
        )
        backward = (found[3], *upstream, *arguments)
        torch.library.opcheck(torch.ops.fastkd.chunk_log_likelihood_backward.default, backward)
        torch.library.opcheck(
            torch.ops.fastkd._chunk_log_likelihood_backward_into.default,
            (torch.empty_like(scores), *backward),
        )


@pytest.mark.only("cpu", "cuda")
def test_compile_fullgraph(backend):
    scores, *others = problem((2, 5, 40))
    boundary = torch.rand(40) < 0.3

    def run(x):
        found = fastkd.chunk_log_likelihood(x, *others, boundary=boundary)
        return found.log_likelihood.sum() + 2 * found.boundary_log_prob.sum()

    plain, compiled = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    run(plain).backward()
    torch.compile(run, fullgraph=True)(compiled).backward()
    torch.testing.assert_close(compiled.grad, plain.grad)
