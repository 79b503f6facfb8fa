"""topk_stats: against its definition, by hand, and what rows may hold."""

import math

import pytest
import torch
from cases import logits

import fastkd

FIELDS = fastkd.TopKStats._fields


def problem(rows=(3, 2), vocab=50, k=6, dtype=torch.float32):
    teacher = fastkd.teacher_topk(logits((*rows, vocab)), k)
    indices = teacher.indices.clone()
    log_probs = teacher.log_probs.clone()
    indices[0, 0, -2:] = -1  # a short row
    log_probs[1, 1, -1] = -1e9  # padding with an id
    indices[1, 1, -1] = indices[1, 1, 0]
    return logits((*rows, vocab), dtype), log_probs, indices


def assert_is_the_definition(student, log_probs, indices, **options):
    found = fastkd.topk_stats(student, log_probs, indices, **options)
    true = fastkd.reference.topk_stats(student, log_probs, indices, **options)
    for name, mine, right in zip(FIELDS, found, true, strict=True):
        torch.testing.assert_close(
            mine.double(), right.double(), rtol=1e-5, atol=1e-6, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0, "tail": "drop", "divergence": "reverse_kl"},
        {"temperature": torch.tensor([[0.5, 1.0], [2.0, 3.0], [1.0, 1.0]]), "tail": "renormalize"},
        {"vocab_size": 45, "divergence": "jsd", "beta": 0.3},
        {"mask": torch.tensor([[True, True], [False, True], [True, False]])},
        {"stored_temperature": 2.0, "teacher_temperature": 1.0},
    ],
    ids=str,
)
def test_definition(backend, dtype, options):
    student, log_probs, indices = problem(dtype=dtype)
    limit = options.get("vocab_size", 50)
    log_probs[indices >= limit], indices[indices >= limit] = -math.inf, -1
    assert_is_the_definition(student, log_probs, indices, **options)


def test_by_hand():
    student = torch.tensor([[3.0, 1.0, 1.0, -math.inf]])
    log_probs, indices = torch.tensor([[0.5, 0.2]]).log(), torch.tensor([[0, 2]])
    found = fastkd.topk_stats(student, log_probs, indices)
    e = math.exp(-2)
    assert found.student_mass.item() == pytest.approx((1 + e) / (1 + 2 * e), rel=1e-6)
    assert found.teacher_mass.item() == pytest.approx(0.7, rel=1e-6)
    assert found.overlap.item() == 1  # 1 and 2 are equally likely
    assert fastkd.topk_stats(student, log_probs, torch.tensor([[0, 3]])).overlap.item() == 0.5


def test_rows_that_are_no_distribution_or_masked(backend):
    student, log_probs, indices = problem()
    student[0, 1], student[1, 0], student[2, 0] = math.nan, -math.inf, math.nan
    mask = torch.ones(3, 2, dtype=torch.bool)
    mask[2, 0] = False
    indices[2, 0] = 10**6  # not read
    found = fastkd.topk_stats(student, log_probs, indices, mask=mask)
    for name, x in zip(FIELDS, found, strict=True):
        lost = torch.tensor([[False, True], [True, False], [False, False]])
        if name != "teacher_mass":
            assert torch.equal(x.isnan(), lost), name
        assert x[2, 0] == 0, name


def test_no_stored_token_and_no_rows(backend):
    student, log_probs, indices = problem()
    indices[2, 1] = -1
    found = fastkd.topk_stats(student, log_probs, indices)
    assert found.student_mass[2, 1] == found.teacher_mass[2, 1] == 0
    assert found.overlap[2, 1].isnan()
    empty = fastkd.topk_stats(student[:0], log_probs[:0], indices[:0])
    assert all(x.shape == (0, 2) for x in empty)


def test_no_gradient_and_errors(backend, request):
    student, log_probs, indices = problem()
    student.requires_grad_()
    assert not any(x.requires_grad for x in fastkd.topk_stats(student, log_probs, indices))
    if "cpu" in request.node.callspec.id:
        with pytest.raises(IndexError, match="teacher_indices"):
            fastkd.topk_stats(student, log_probs, indices + 50)
    else:
        found = fastkd.topk_stats(student, log_probs, indices + 50)
        assert all(x[2].isnan().all() for x in found)
    with pytest.raises(TypeError, match=r"^topk_stats: student_logits"):
        fastkd.topk_stats(None, log_probs, indices)


@pytest.mark.parametrize("linear", [False, True])
def test_errors_name_the_function(linear):
    student, log_probs, indices = problem()
    if linear:
        student = fastkd.LinearLogits(torch.randn(3, 2, 4), torch.randn(student.size(-1), 4))
    for error, given, options in (
        (IndexError, (log_probs, indices + 50), {}),
        (TypeError, (log_probs, indices.float()), {}),
        (TypeError, (None, indices), {}),
        (ValueError, (log_probs, indices), {"temperature": -1.0}),
        (ValueError, (log_probs, indices), {"divergence": "tvd"}),
        (TypeError, (log_probs, indices), {"mask": torch.ones(3, 2)}),
        (TypeError, (log_probs, indices), {"vocab_size": 2.5}),
    ):
        with pytest.raises(error, match=r"^topk_stats: "):
            fastkd.topk_stats(student, *given, **options)


def test_one_graph_for_all_sizes(backend):
    torch._dynamo.reset()
    compiled = torch.compile(fastkd.topk_stats, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, k, temperature in (((3, 2), 6, 1.0), ((4, 3), 7, 2.0), ((5, 4), 8, 0.7)):
        given = problem(rows, k=k)
        found = compiled(*given, temperature=temperature)
        right = fastkd.topk_stats(*given, temperature=temperature)
        for mine, other in zip(found, right, strict=True):
            torch.testing.assert_close(mine, other, equal_nan=True)
