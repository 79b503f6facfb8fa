"""teacher_topk: rows of one number, masks, and constants leave the log-probabilities right."""

import math

import pytest
import torch
from cases import logits
from test_teacher_topk import assert_matches

import fastkd

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def smallest(dtype):
    return torch.finfo(dtype).min


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [4, 700])
def test_rows_of_one_number(backend, dtype, vocab):
    for number in (smallest(dtype), torch.finfo(dtype).max, -(2.0**15)):
        for temperature in (0.1, 1.0, 20.0):
            teacher = torch.full((2, vocab), number, dtype=dtype)
            found = fastkd.teacher_topk(teacher, 3, temperature=temperature)
            right = torch.full((2, 3), -math.log(vocab))
            torch.testing.assert_close(found.log_probs, right, rtol=1e-6, atol=1e-6)
            assert torch.equal(found.indices, torch.arange(3, dtype=torch.int32).expand(2, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", ["inf", "smallest"])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 20.0])
def test_masked_columns_are_not_there(backend, dtype, fill, temperature):
    columns = torch.arange(1700)
    for mask in (columns < 1024, columns >= 512, columns % 2 == 0):
        kept = columns[~mask]
        teacher = (logits((2, 1700)) - 120).to(dtype)
        right = fastkd.teacher_topk(teacher[:, kept], 9, temperature=temperature)
        teacher[:, mask] = -math.inf if fill == "inf" else smallest(dtype)
        found = fastkd.teacher_topk(teacher, 9, temperature=temperature)
        assert torch.equal(found.indices.long(), kept[right.indices.long()])
        torch.testing.assert_close(found.log_probs, right.log_probs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_possible_token_beside_masked_ones(backend, dtype):
    """Of the masked ones those that are wanted, too: their logarithm is not above -1e3."""
    for fill in (-math.inf, smallest(dtype)):
        teacher = torch.full((2, 40), fill, dtype=dtype)
        teacher[:, 30] = -7.0
        found = fastkd.teacher_topk(teacher, 3)
        assert found.indices.tolist() == [[30, 0, 1]] * 2
        assert (found.log_probs[:, 0] == 0).all()
        assert (found.log_probs[:, 1:] < -1e3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_a_constant_is_not_seen(backend, dtype, temperature):
    """Also of a row with one token that is all but certain."""
    teacher = torch.round(1024 * logits((3, 600)).clamp(-30, 30)).to(dtype) / 1024
    teacher[1, 77] = 60.0
    right = fastkd.teacher_topk(teacher, 20, temperature=temperature)
    for constant in (4096.0, -8192.0):
        found = fastkd.teacher_topk(teacher + constant, 20, temperature=temperature)
        assert torch.equal(found.indices, right.indices)
        torch.testing.assert_close(found.log_probs, right.log_probs, rtol=1e-6, atol=1e-6)
    assert_matches(right, teacher, 20, temperature=temperature)


@pytest.mark.parametrize("spread", [0.2, 1e-4])
def test_many_close_logits_of_a_long_row(backend, spread):
    """More than are sorted share the leading bits: further bits are counted, by all blocks."""
    z = 1 + spread * torch.rand(2, 60_000)
    found = fastkd.teacher_topk(z, 50)
    exact = z.double().log_softmax(-1).sort(dim=-1, descending=True, stable=True)
    torch.testing.assert_close(found.log_probs.double(), exact.values[:, :50], rtol=1e-6, atol=0)
    assert found.indices.tolist() == exact.indices[:, :50].tolist()
