"""token_stats: every field against float64, special values, errors."""

import math

import pytest
import torch
from cases import logits

import fastkd

DTYPES_OF_THREE = (torch.float32, torch.bfloat16, torch.float32)

SHAPES = ((0, 5), (3, 1), (4, 7), (2, 3, 33), (5, 1031), (2, 20011), (7,))


def doubled(x):
    return None if x is None else x.double()


def assert_matches(student, teacher=None, *, rtol=2e-6, atol=2e-6, **options):
    found = fastkd.token_stats(student, teacher, **options)
    exact = fastkd.reference.token_stats(student.double(), doubled(teacher), **options)
    dtypes = {student.dtype, student.dtype if teacher is None else teacher.dtype}
    for name, mine, right in zip(found._fields, found, exact, strict=True):
        if right is None:
            assert mine is None, name
            continue
        assert mine.shape == student.shape[:-1], name
        if "argmax" in name:
            assert mine.dtype == torch.int64
            assert torch.equal(mine, right), name
            continue
        assert mine.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
        torch.testing.assert_close(
            mine.double(),
            right,
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_values(backend, shape):
    labels = torch.randint(0, shape[-1], shape[:-1])
    assert_matches(logits(shape))
    assert_matches(logits(shape), logits(shape))
    assert_matches(logits(shape), logits(shape), labels=labels, temperature=1.7)
    assert_matches(logits(shape), labels=torch.where(torch.rand(shape[:-1]) < 0.5, -100, labels))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(backend, dtype):
    labels = torch.randint(0, 1500, (6,)).int()
    assert_matches(logits((6, 1500), dtype), logits((6, 1500), dtype), labels=labels)
    assert_matches(logits((6, 1500), dtype), logits((6, 1500)), labels=labels)
    assert_matches(logits((2, 151_936), dtype), logits((2, 151_936), dtype))


def test_ties_go_to_the_lower_column(backend):
    student = torch.randint(0, 3, (6, 40_000)).float()
    student[0] = 0.0
    found = assert_matches(student, student.flip(-1))
    assert found.student_argmax[0] == 0


@pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0])
def test_divergences_stay_accurate_near_zero(backend, noise):
    teacher = logits((4, 50_257))
    student = teacher + noise * torch.randn_like(teacher)
    found = fastkd.token_stats(student, teacher)
    exact = fastkd.reference.token_stats(student.double(), teacher.double())
    for mine, right in zip(found[-4:-1], exact[-4:-1], strict=True):
        assert (mine >= 0).all()
        if noise:
            assert ((mine - right).abs() / right).max() < 2e-4
        else:
            assert not mine.any()


def test_a_reference(backend):
    student, teacher, reference = (logits((2, 3, 900), dtype) for dtype in DTYPES_OF_THREE)
    given = {"temperature": 1.5, "vocab_size": 800, "reference_logits": reference}
    found = fastkd.token_stats(student, teacher, **given)
    right = fastkd.softmax_divergence(
        reference, teacher, temperature=1.5, vocab_size=800, reduction="none"
    )
    torch.testing.assert_close(found.reference_kl, right, rtol=1e-5, atol=1e-6)
    exact = fastkd.reference.token_stats(student, teacher, **given)
    torch.testing.assert_close(found.reference_kl, exact[-1], rtol=1e-4, atol=1e-5)
    del given["reference_logits"]
    assert fastkd.token_stats(student, teacher, **given).reference_kl is None


def test_errors_of_a_reference():
    student = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"token_stats: teacher_logits must be given with refer"):
        fastkd.token_stats(student, reference_logits=student)
    with pytest.raises(ValueError, match=r"token_stats: reference_logits must .* got \[2, 4\]"):
        fastkd.token_stats(student, student, reference_logits=student[:, :4])
    with pytest.raises(TypeError, match=r"token_stats: reference_logits must be a Tensor|tensor"):
        fastkd.token_stats(student, student, reference_logits=[1.0])


def test_same_as_softmax_divergence(backend):
    student, teacher = logits((9, 3000)), logits((9, 3000))
    found = fastkd.token_stats(student, teacher, temperature=2.0)
    for name in ("forward_kl", "reverse_kl", "tvd"):
        right = fastkd.softmax_divergence(
            student, teacher, divergence=name, temperature=2.0, reduction="none"
        )
        torch.testing.assert_close(getattr(found, name), right, rtol=1e-5, atol=1e-6)


def test_special_values(backend):
    student, teacher = logits((9, 3000)), logits((9, 3000))
    student[0, 1000:2000] = teacher[0, 1000:2000] = -math.inf
    student[1, 5] = -math.inf  # infinite forward KL
    teacher[2, 5] = -math.inf  # infinite reverse KL
    student[3, 7] = math.nan
    teacher[4, 2999] = math.nan
    student[5] = -math.inf
    teacher[6, 3] = math.inf
    student[7] = teacher[7] = -math.inf
    student[7, 2500] = teacher[7, 2500] = 1.0  # certain and equal
    student[8, :] *= 1e4
    found = assert_matches(student, teacher, labels=torch.full((9,), 5))
    assert found.student_argmax.tolist()[3] == found.student_argmax.tolist()[5] == -1
    assert found.forward_kl[1] == found.reverse_kl[2] == math.inf
    assert found.forward_kl[7] == found.student_entropy[7] == 0


def test_layouts_and_options(backend):
    for student in (
        logits((5, 3, 64)).transpose(0, 1),
        logits((3, 5, 128))[..., ::2],
        logits((3, 1, 64)).expand(3, 5, 64),
    ):
        assert_matches(student, logits((3, 5, 64)))
    temperature = torch.rand(3, 5) + 0.5
    student, teacher = logits((3, 5, 64)), logits((3, 5, 70))
    student[..., 60:] = math.nan
    assert_matches(student, teacher, temperature=temperature, vocab_size=60)


@pytest.mark.only("cpu", "simt")
def test_threads_change_no_bit(backend):
    student, teacher = logits((2, 100_000)), logits((2, 100_000))
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(fastkd.token_stats(student, teacher, labels=torch.tensor([4, 5])))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other[:-1], found[0][:-1], strict=True))


@pytest.mark.only("cpu")
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((logits((3, 40)), logits((3, 41))), {}, ValueError, "teacher_logits has 41 columns"),
        ((logits((3, 40)), logits((2, 40))), {}, ValueError, r"leading dimensions \[3\]"),
        ((logits((3, 40)),), {"labels": torch.tensor([1, 40, 2])}, IndexError, r"lie in \[0, 40\)"),
        ((logits((3, 40)),), {"labels": torch.tensor([1, -1, 2])}, IndexError, "got -1 in row 1"),
        ((logits((3, 40)),), {"labels": torch.ones(3)}, TypeError, "labels must be int64 or int32"),
        ((logits((3, 40)),), {"labels": torch.ones(2, 1).long()}, ValueError, "one entry a row"),
        ((logits((3, 40)),), {"temperature": -1.0}, ValueError, "temperature must be positive"),
        ((logits((3, 40)).long(),), {}, TypeError, "student_logits must be float32"),
        ((logits((3, 40)), 3.0), {}, TypeError, "teacher_logits must be a tensor, got float"),
    ],
)
def test_errors(backend, arguments, options, error, message):
    with pytest.raises(error, match=f"token_stats: .*{message}"):
        fastkd.token_stats(*arguments, **options)


def test_no_gradient(backend):
    student = logits((3, 40)).requires_grad_()
    assert not any(x.requires_grad for x in fastkd.token_stats(student, student)[:4])


def test_opcheck(backend):
    for teacher in (None, logits((3, 40))):
        torch.library.opcheck(
            torch.ops.fastkd._token_stats.default,
            (logits((3, 40)), teacher, None, 1.0, None, -1, None),
        )


@pytest.mark.only("cpu", "cuda")
def test_compile_fullgraph(backend):
    student, teacher = logits((4, 60)), logits((4, 60))
    found = torch.compile(fastkd.token_stats, fullgraph=True)(student, teacher)
    plain = fastkd.token_stats(student, teacher)
    for mine, right in zip(found, plain, strict=True):
        assert mine is right is None or torch.equal(mine, right)
