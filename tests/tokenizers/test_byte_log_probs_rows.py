"""byte_log_probs: rows of one number, masks, columns far below the rest, near-certain tokens."""

import math

import pytest
import torch
from cases import allowed_error, logits

import fastkd

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOKENS = [b"a", b"b", b"ab", b"ac", None]


def smallest(dtype):
    return torch.finfo(dtype).min


def letters(size):
    """Tokens of two bytes, the first one of five letters in turn."""
    return fastkd.ByteVocab([bytes([97 + i % 5, 97 + i // 5 % 7]) for i in range(size)])


def assert_right(scores, vocab, **options):
    """Values and gradients against those of the reference in float64; -> the values."""
    leaf, exact_leaf = scores.detach().requires_grad_(), scores.detach().double().requires_grad_()
    found = fastkd.byte_log_probs(leaf, vocab, **options)
    exact = fastkd.reference.byte_log_probs(exact_leaf, vocab, **options)
    room = {"rtol": 1e-12, "atol": 1e-12} if scores.dtype == torch.float64 else {}
    torch.testing.assert_close(
        found.double(), exact, **({"rtol": 2e-6, "atol": 4e-6} | room), equal_nan=True
    )
    weights, kept = torch.randn_like(exact), exact.isfinite()
    (mine,) = torch.autograd.grad(torch.where(kept, found, 0).mul(weights).sum(), leaf)
    (right,) = torch.autograd.grad(torch.where(kept, exact, 0).mul(weights).sum(), exact_leaf)
    assert mine.isfinite().all()
    assert (mine.double() - right).norm() <= allowed_error(right, scores.dtype)
    return found.detach()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_one_number(backend, dtype):
    vocab = fastkd.ByteVocab(TOKENS)
    for number in (smallest(dtype), torch.finfo(dtype).max, -(2.0**15), 0.0):
        scores = torch.full((2, 5), number, dtype=dtype)
        found = assert_right(scores, vocab).exp()
        right = torch.tensor([0.6, 0.2, 0.2]).expand(2, 3).to(found.dtype)
        torch.testing.assert_close(found[:, [ord("a"), ord("b"), 257]], right)
        found = assert_right(scores, vocab, prefix=b"a").exp()
        right = torch.full((2, 3), 1 / 3, dtype=found.dtype)
        torch.testing.assert_close(found[:, [ord("b"), ord("c"), 256]], right)
        valid = torch.tensor([True, True, False, False, True])
        found = assert_right(scores, vocab, valid=valid).exp()
        torch.testing.assert_close(
            found[0, [ord("a"), ord("b"), 257]], torch.full_like(right[0], 1 / 3)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [5, 600, 9000])
def test_wide_rows_of_the_smallest_number(backend, dtype, size):
    found = assert_right(torch.full((2, size), smallest(dtype), dtype=dtype), letters(size))
    right = torch.full((2, 5), -math.log(5), dtype=found.dtype)
    torch.testing.assert_close(found[:, 97:102], right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", ["inf", "smallest"])
@pytest.mark.parametrize("place", ["block first", "block last", "column", "all but one"])
def test_masked_ids_are_not_there(backend, dtype, fill, place):
    size, vocab = 1700, letters(1700)
    ids = torch.arange(size)
    mask = {
        "block first": ids < 1024,
        "block last": ids >= 512,
        "column": ids % 5 == 2,
        "all but one": ids != 1030,
    }[place]
    scores = (logits((2, size)) - 120).to(dtype)
    right = fastkd.byte_log_probs(scores, vocab, valid=~mask)
    scores[:, mask] = -math.inf if fill == "inf" else smallest(dtype)
    found = assert_right(scores, vocab)
    if fill == "smallest" and dtype == torch.float16:  # -65504 is possible
        found = torch.where(found < -1e4, -math.inf, found)
    torch.testing.assert_close(found, right, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("constant", [0.0, 1e4, 1e9])
@pytest.mark.parametrize("far", [-70.0, -1e4, -1e7, -1e9, -1e15, -1e24])
def test_columns_far_below_have_a_softmax_of_their_own(backend, dtype, constant, far):
    """Beyond the exponents, and beyond where a double tells the far logits' sum from their size."""
    for prefix in (b"", b"a"):
        size = 60
        vocab = fastkd.ByteVocab([prefix + bytes([97 + i % 3, 97 + i]) for i in range(size)])
        scores = logits((2, size)).double() + constant
        scores[:, ::3] = far + torch.randn(2, 20).double()
        scores[0, 1::3] = 0.5 * far
        assert_right(scores.to(dtype), vocab, prefix=prefix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_lies_1e25_below_is_impossible(backend, dtype):
    vocab = fastkd.ByteVocab([b"a", b"b", b"b"])
    for most, low, dead in ((0.0, -1e24, False), (0.0, -1.1e25, True), (2e38, 1e38, True)):
        scores = torch.tensor([most, low, low], dtype=dtype)
        found = assert_right(scores, vocab)
        assert found[ord("a")] == 0
        assert (found[ord("b")] == -math.inf) == dead
        # A column of the smallest numbers beside one near it.
        assert_right(torch.cat([scores[:1], torch.full((2,), smallest(dtype), dtype=dtype)]), vocab)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0.0, 8192.0, -16384.0])
def test_near_certain_rows(backend, dtype, shift):
    vocab = letters(40)
    scores = torch.round(logits((3, 40)))
    scores[:, 7] = torch.tensor([18.0, 120.0, 900.0])
    scores = (8 * scores if dtype in (torch.float16, torch.bfloat16) else scores) + shift
    scores = scores.to(dtype)
    found = assert_right(scores, vocab)
    assert (found <= 0).all()
    assert found[:, 97 + 2].min() > -1e-4
    assert_right(scores, vocab, prefix=b"c")


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_beside_impossible_ids(backend, dtype):
    """Of a column, of which nothing else is possible."""
    vocab = fastkd.ByteVocab([b"a", b"a", b"ab", b"ac", b"b"])
    for bad in (math.nan, math.inf):
        scores = torch.zeros(5, dtype=dtype)
        scores[:2] = torch.tensor([-math.inf, bad])
        valid = torch.tensor([False, True, True, True, True])
        for options in ({}, {"prefix": b"a"}, {"valid": valid, "prefix": b"a"}):
            assert fastkd.byte_log_probs(scores, vocab, **options).isnan().all()
        assert fastkd.byte_log_probs(scores, vocab, prefix=b"b")[256] == 0
