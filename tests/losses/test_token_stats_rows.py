"""token_stats: what a softmax does not see (a constant, a masked column) changes nothing."""

import math

import pytest
import torch
from cases import logits

import fastkd

INF = math.inf


def smallest(dtype):
    return torch.finfo(dtype).min


def fields(student, teacher, **options):
    return fastkd.token_stats(student, teacher, **options)._asdict()


def assert_same(found, right, rtol=2e-6, atol=2e-6, but=()):
    for name in found:
        if name in but or right[name] is None:
            continue
        torch.testing.assert_close(
            found[name].double(),
            right[name].double(),
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def quantised(x):
    """Multiples of 2^-10 below 2^6: float32 holds them, and their sums with 4096, exactly."""
    return (x * 1024).round().clamp(-65_000, 65_000) / 1024


@pytest.mark.parametrize("noise", [2.0**-9, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
def test_a_constant_moves_only_the_log_sum_exp(backend, noise, temperature):
    student = quantised(logits((2, 9000)))
    teacher = quantised(student + noise * torch.randn(2, 9000))
    options = {"temperature": temperature, "labels": torch.tensor([5, 8999])}
    right = fields(student, teacher, **options)
    for by_student, by_teacher in ((1024, 0), (0, -4096), (4096, 1024)):
        found = fields(student + by_student, teacher + by_teacher, **options)
        assert_same(found, right, atol=1e-12, but=("student_lse", "teacher_lse"))
        for side, by in (("student_lse", by_student), ("teacher_lse", by_teacher)):
            torch.testing.assert_close(found[side], right[side] + by / temperature)


@pytest.mark.parametrize("offsets", [(50.0, 0.0), (-300.0, 1e4)])
def test_divergences_stay_accurate_whatever_the_constant(backend, offsets):
    student = logits((4, 3000))
    teacher = student + 1e-3 * torch.randn(4, 3000) + offsets[1]
    student = student + offsets[0]
    found = fastkd.token_stats(student, teacher)
    exact = fastkd.reference.token_stats(student.double(), teacher.double())
    for mine, right in zip(found[-4:-1], exact[-4:-1], strict=True):
        assert ((mine - right).abs() / right).max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("fills", ["-inf", "smallest", "-inf, smallest", "smallest, -inf"])
def test_masked_columns_are_not_there(backend, dtype, fills):
    first, *rest = [-INF if x == "-inf" else smallest(dtype) for x in fills.split(", ")]
    second = rest[0] if rest else first
    for vocab, temperature in ((5, 1.0), (513, 2.0), (1600, 0.05), (9000, 1.0)):
        columns = torch.arange(vocab)
        for mask in (columns < vocab // 2, columns > vocab // 3, columns // 512 % 2 == 0):
            mask[vocab - 2] = False
            student = (logits((2, vocab)) - 100).to(dtype)
            teacher = (logits((2, vocab)) - 120).to(dtype)
            right = fields(student[:, ~mask], teacher[:, ~mask], temperature=temperature)
            student[:, mask], teacher[:, mask] = first, second
            found = fields(student, teacher, temperature=temperature)
            kept = columns[~mask]
            for side in ("student_argmax", "teacher_argmax"):
                assert torch.equal(found[side], kept[right[side]])
            nothing = ("student_argmax", "teacher_argmax")
            right, found = ({k: v for k, v in x.items() if v is not None} for x in (right, found))
            assert_same(found, right, rtol=1e-5, atol=1e-6, but=nothing)


@pytest.mark.parametrize("fill", [-INF, smallest(torch.float32), smallest(torch.bfloat16)])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_columns_masked_on_one_side(backend, fill, side):
    for temperature in (1.0, 0.05, 20.0):
        student, teacher = logits((2, 1500)), logits((2, 1500))
        (student if side == "student" else teacher)[:, 3:900] = fill
        options = {"labels": torch.tensor([5, 1400]), "temperature": temperature}
        found = fastkd.token_stats(student, teacher, **options)
        exact = fastkd.reference.token_stats(student.double(), teacher.double(), **options)
        for name, mine, right in zip(found._fields[:-1], found[:-1], exact[:-1], strict=True):
            torch.testing.assert_close(
                mine, right.to(mine.dtype), rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_row_of_the_smallest_number_is_uniform(backend, dtype):
    flat, other = torch.full((2, 600), smallest(dtype), dtype=dtype), logits((2, 600), dtype)
    options = {"labels": torch.tensor([3, 599]), "temperature": 2.0}
    for student, teacher in ((flat, other), (other, flat), (flat, flat)):
        found = fields(student, teacher, **options)
        zeros = [torch.zeros_like(x) if x is flat else x for x in (student, teacher)]
        assert_same(found, fields(*zeros, **options), but=("student_lse", "teacher_lse"))
        for x, name in ((student, "student_lse"), (teacher, "teacher_lse")):
            if x is flat:
                right = smallest(dtype) / 2 + math.log(600)
                torch.testing.assert_close(
                    found[name].double(), torch.full((2,), right, dtype=torch.float64)
                )
