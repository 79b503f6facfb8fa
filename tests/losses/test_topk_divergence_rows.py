"""topk_divergence: masked columns, constants, supports far from the rest, padding."""

import math

import pytest
import torch
from cases import logits
from row_kinds import TAILS

import fastkd

INF = math.inf
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "cross_entropy")


def run(module, student, stored, indices, **options):
    """Losses and both gradients, in the student's precision."""
    leaves = [x.detach().clone().requires_grad_() for x in (student, stored)]
    loss = module.topk_divergence(*leaves, indices, reduction="none", **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaves)


def assert_right(student, stored, indices, rtol=1e-4, atol=2e-6, **options):
    loss, gradients = run(fastkd, student, stored, indices, **options)
    exact, exact_gradients = run(
        fastkd.reference, student.double(), stored.double(), indices, **options
    )
    torch.testing.assert_close(loss.double(), exact, rtol=rtol, atol=atol, equal_nan=True)
    for found, right in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=rtol, atol=atol, equal_nan=True)


def a_teacher(rows=2, vocab=8, k=3):
    best = fastkd.teacher_topk(logits((rows, vocab)), k)
    return best.log_probs - 0.2, best.indices


# --- Masked columns -------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("fill", [-INF, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_a_masked_block_beside_low_logits(backend, tail, fill, temperature):
    """512 masked columns, as many as a kernel's block, before logits far below 0."""
    stored, indices = a_teacher()
    student = torch.full((2, 520), fill)
    student[:, 512:] = logits((2, 8)) - 300
    if tail == "uniform":  # it puts mass on every column
        indices, student = indices.long(), student[:, 504:]
        assert_right(student[:, 8:], stored, indices, tail=tail, temperature=temperature)
        return
    for divergence in DIVERGENCES:
        assert_right(
            student,
            stored,
            indices.long() + 512,
            tail=tail,
            temperature=temperature,
            divergence=divergence,
            labels=torch.tensor([515, 519]),
        )


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "cross_entropy"])
@pytest.mark.parametrize("outside", [-1e4, torch.finfo(torch.float32).min, -INF])
def test_nothing_left_outside_the_support(backend, divergence, outside):
    student = torch.full((1, 40), outside)
    student[0, :3] = torch.tensor([1.0, 2.0, 0.5])
    stored = torch.tensor([[0.5, 0.3, 0.2]]).log() + 1e-5  # rounded above 1
    loss, gradients = run(fastkd, student, stored, torch.tensor([[0, 1, 2]]), divergence=divergence)
    assert loss.isfinite().all()
    assert all(x.isfinite().all() for x in gradients)
    assert not gradients[0][0, 3:].any()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_of_the_smallest_number_are_flat(backend, tail, dtype):
    stored, indices = a_teacher()
    flat = torch.full((2, 8), torch.finfo(dtype).min, dtype=dtype)
    for divergence in DIVERGENCES:
        options = {"tail": tail, "divergence": divergence, "labels": torch.tensor([0, 7])}
        loss, gradients = run(fastkd, flat, stored, indices, **options)
        zero, zero_gradients = run(fastkd, torch.zeros_like(flat), stored, indices, **options)
        torch.testing.assert_close(loss, zero)
        torch.testing.assert_close(gradients, zero_gradients)


# --- Constants, temperatures ----------------------------------------------------------------------


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("constant", [8192.0, -1e4])
def test_a_constant_changes_nothing(backend, tail, constant):
    stored, indices = a_teacher(vocab=40)
    student = (logits((2, 40)) * 64).round() / 64
    for divergence in DIVERGENCES:
        options = {"tail": tail, "divergence": divergence, "temperature": 0.7}
        loss, gradients = run(fastkd, student + constant, stored, indices, **options)
        right, right_gradients = run(fastkd, student, stored, indices, **options)
        torch.testing.assert_close(loss, right, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(gradients, right_gradients, rtol=2e-5, atol=2e-6)


def test_a_label_at_a_high_temperature_beside_a_far_higher_block(backend):
    stored, indices = a_teacher(vocab=40)
    student = torch.cat([logits((2, 600)) - 500, logits((2, 600)) + 500], 1)
    assert_right(student, stored, indices, temperature=20.0, labels=torch.tensor([3, 800]))


# --- Supports far from the rest -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_support_of_masked_columns_is_a_distribution_of_its_own(backend, dtype):
    """renormalize asks for the student inside the support only, however far that lies."""
    student = torch.zeros(1, 30, dtype=dtype)
    student[0, :2] = torch.finfo(dtype).min
    stored = torch.tensor([[0.6, 0.3]]).log().to(dtype)
    loss, _ = run(fastkd, student, stored, torch.tensor([[0, 1]]), tail="renormalize")
    p = torch.tensor([2 / 3, 1 / 3])
    right = (p * (p / 0.5).log()).sum()
    torch.testing.assert_close(loss.float(), right.reshape(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_renormalize_without_mass_is_nan(backend, side, cap):
    student, stored = torch.zeros(2, 9), torch.tensor([[0.6, 0.3]] * 2).log()
    if side == "student":
        student[0, :2] = -INF
    else:
        stored[0] = -INF
    loss, _ = run(
        fastkd, student, stored, torch.tensor([[0, 1]] * 2), tail="renormalize", max_token_loss=cap
    )
    assert loss[0].isnan()
    assert loss[1].isfinite()


# --- The rest of a stored mass near 1 -------------------------------------------------------------


@pytest.mark.parametrize("tail", ["lump", "uniform"])
def test_reverse_kl_does_not_depend_on_the_last_bit_of_the_mass(backend, tail):
    """A teacher renormalised inside its k leaves a rest that rounding has as 0 or as 1e-7."""
    student, losses = torch.zeros(1, 50), []
    for nudge in (-1e-7, -3e-8, 0.0, 3e-8, 1e-7):
        stored = torch.tensor([[0.5, 0.3, 0.2]]).log() + nudge
        losses.append(
            run(
                fastkd,
                student,
                stored,
                torch.tensor([[0, 1, 2]]),
                tail=tail,
                divergence="reverse_kl",
            )[0].item()
        )
    assert all(math.isfinite(x) for x in losses)
    assert max(losses) - min(losses) < 0.1 * max(losses)


# --- Padding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [-INF, -1e9, -1e4])
def test_repeated_ids_that_are_padding(backend, padding):
    student = logits((1, 30))
    stored, indices = torch.tensor([[-0.5, -1.5]]), torch.tensor([[0, 7]])
    padded = torch.tensor([[-0.5, -1.5, padding, padding]]), torch.tensor([[0, 7, 0, 0]])
    for tail in TAILS:
        right, _ = run(fastkd, student, stored, indices, tail=tail)
        found, (_, gradient) = run(fastkd, student, *padded, tail=tail)
        torch.testing.assert_close(found, right)
        assert not gradient[0, 2:].any()


@pytest.mark.only("cpu")
def test_repeated_ids_that_are_none_are_an_error(backend):
    stored, indices = torch.tensor([[-0.5, -1.5, -9000.0]]), torch.tensor([[0, 7, 0]])
    with pytest.raises(ValueError, match=r"topk_divergence: .*-1"):
        fastkd.topk_divergence(torch.zeros(1, 30), stored, indices)


# --- A beta for each row --------------------------------------------------------------------------


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_beta_for_each_row(backend, tail, divergence):
    """The same bits as a call with that beta, at the ends as well."""
    stored, indices = a_teacher(6, 40, 4)
    student = logits((6, 40))
    beta = torch.tensor([0.3, 1.0, 0.0, 0.5, 1.0, 0.0])
    options = {"tail": tail, "divergence": divergence}
    loss, gradients = run(fastkd, student, stored, indices, beta=beta, **options)
    for value in beta.unique().tolist():
        alone, others = run(fastkd, student, stored, indices, beta=value, **options)
        assert torch.equal(loss[beta == value], alone[beta == value])
        for mine, right in zip(gradients, others, strict=True):
            assert torch.equal(mine[beta == value], right[beta == value])


def test_betas_of_rows_left_out_may_be_anything(backend):
    stored, indices = a_teacher(3)
    student, beta = logits((3, 8)), torch.tensor([0.5, math.nan, -3.0])
    options = {"divergence": "jsd", "mask": torch.tensor([True, False, False])}
    loss, gradients = run(fastkd, student, stored, indices, beta=beta, **options)
    right, others = run(fastkd, student, stored, indices, beta=0.5, **options)
    assert torch.equal(loss, right)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


@pytest.mark.only("simt", "cuda")
def test_a_beta_no_check_could_see_is_nan(backend):
    stored, indices = a_teacher(4)
    beta = torch.tensor([0.5, 1.5, math.nan, -0.1])
    for divergence in DIVERGENCES:
        loss, _ = run(fastkd, logits((4, 8)), stored, indices, beta=beta, divergence=divergence)
        assert loss.isnan().tolist() == [False, True, True, True]
