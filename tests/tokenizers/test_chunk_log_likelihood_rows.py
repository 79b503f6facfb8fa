"""chunk_log_likelihood: rows of one number, masks, boundary sets without a possible token."""

import math

import pytest
import torch
from cases import logits
from test_chunk_log_likelihood import assert_matches

import fastkd

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDS, CHUNKS = torch.tensor([[1, 2, 0, 3]]), torch.tensor([[0, 0, 1, -1]])


def smallest(dtype):
    return torch.finfo(dtype).min


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 20.0])
def test_rows_of_one_number(backend, dtype, temperature):
    boundary = torch.tensor([True, False, False, False])
    for number in (smallest(dtype), torch.finfo(dtype).max, 0.0):
        scores = torch.full((1, 4, 4), number, dtype=dtype)
        options = {"boundary": boundary, "temperature": temperature}
        found = assert_matches(scores, IDS, CHUNKS, 2, **options)
        quarter = math.log(1 / 4)
        right = torch.tensor([[2 * quarter, quarter]]).to(found.log_likelihood)
        torch.testing.assert_close(found.log_likelihood.detach(), right)
        right = torch.tensor([[quarter, quarter]]).to(found.log_likelihood)
        torch.testing.assert_close(found.boundary_log_prob.detach(), right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", ["smallest", "largest", "0"])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_an_empty_boundary_set_is_impossible(backend, dtype, number, temperature):
    """Also where the row's own sum lies at the end of the range."""
    info = torch.finfo(dtype)
    value = {"smallest": info.min, "largest": info.max, "0": 0.0}[number]
    scores = torch.full((1, 4, 4), value, dtype=dtype)
    boundary = torch.zeros(4, dtype=torch.bool)
    found = assert_matches(scores, IDS, CHUNKS, 2, boundary=boundary, temperature=temperature)
    assert (found.boundary_log_prob == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", ["inf", "smallest"])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 20.0])
def test_masked_columns_are_not_there(backend, dtype, fill, temperature):
    """A whole block, the first or the last; the boundary set inside it and beside it."""
    vocab, columns = 1700, torch.arange(1700)
    for mask in (columns < 1024, columns >= 512, columns != 600):
        kept = columns[~mask]
        scores = (logits((1, 4, vocab)) - 120).to(dtype)
        ids = kept[torch.arange(4) % len(kept)].view(1, 4)
        boundary = columns % 3 == 0
        options = {"temperature": temperature}
        right = fastkd.chunk_log_likelihood(
            scores[..., kept], torch.arange(4).view(1, 4) % len(kept), CHUNKS, 2,
            boundary=boundary[kept], **options,
        )  # fmt: skip
        scores[..., mask] = -math.inf if fill == "inf" else smallest(dtype)
        found = assert_matches(scores, ids, CHUNKS, 2, boundary=boundary, **options)
        torch.testing.assert_close(found[0].detach(), right[0], rtol=2e-6, atol=4e-6)
        impossible = boundary & mask
        found = assert_matches(scores, ids, CHUNKS, 2, boundary=impossible, **options)
        assert (found.boundary_log_prob < -1e3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0.0, 8192.0, -16384.0])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_near_certain_rows(backend, dtype, shift, temperature):
    scores = torch.round(logits((1, 4, 40)))
    scores[0, torch.arange(4), IDS[0]] = torch.tensor([18.0, 120.0, 900.0, 2.0])
    boundary = torch.arange(40) >= 4
    scores = (scores + shift).to(dtype)
    assert_matches(scores, IDS, CHUNKS, 2, boundary=boundary, temperature=temperature)
