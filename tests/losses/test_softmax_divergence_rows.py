"""softmax_divergence: what a softmax does not see (a constant, a masked column) changes nothing."""

import math
import random

import numpy as np
import pytest
import torch
from cases import DIVERGENCES, logits, relative_error

import fastkd
from fastkd._ops.library import usable_instruction_sets

INF = math.inf
BEST = f"cpu-{usable_instruction_sets()[0]}"
FILLS = ("-inf", "smallest", "-inf, smallest", "smallest, -inf")
TEMPERATURES = ((1.0, 1.0), (2.0, 0.7), (0.05, 0.05), (100.0, 30.0))


def run(function, student, teacher, **options):
    """Loss and gradients of a call that reduces nothing."""
    student = student.detach().requires_grad_()
    inputs = [student]
    if isinstance(teacher, torch.Tensor):
        teacher = teacher.detach().requires_grad_()
        inputs.append(teacher)
    loss = function(student, teacher, reduction="none", **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), inputs)


def doubled(teacher):
    return teacher.double() if isinstance(teacher, torch.Tensor) else [t.double() for t in teacher]


def exactly(student, teacher, **options):
    return run(fastkd.reference.softmax_divergence, student.double(), doubled(teacher), **options)


def quantised(x):
    """Multiples of 2^-10 below 2^6: float32 holds them, and their sums with 4096, exactly."""
    return (x * 1024).round().clamp(-65_000, 65_000) / 1024


OPTIONS = {
    "plain": {},
    "temperatures": {"temperature": 2.0, "teacher_temperature": 0.5},
    "labels": {"labels": torch.tensor([5, 700]), "temperature": 3.0},
    "logits": {"teacher_weights": [0.25, 0.75]},
    "probs": {"teacher_weights": [0.3, 0.7], "teacher_mix": "probs", "temperature": 0.5},
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("noise", [2.0**-9, 1.0])
def test_a_constant_changes_nothing(backend, divergence, kind, noise):
    student = quantised(logits((2, 1100)))
    teacher = [quantised(student + noise * torch.randn(2, 1100)) for _ in range(2)]
    options = {"divergence": divergence, "beta": 0.3, **OPTIONS[kind]}
    several = kind in ("logits", "probs")
    of = lambda by: [t + by for t in teacher] if several else teacher[0] + by  # noqa: E731
    loss, gradients = run(fastkd.softmax_divergence, student, of(0), **options)
    for by_student, by_teacher in ((1024, 0), (0, -4096), (4096, 1024)):
        moved, others = run(
            fastkd.softmax_divergence, student + by_student, of(by_teacher), **options
        )
        torch.testing.assert_close(moved, loss, rtol=1e-6, atol=1e-12)
        for mine, right in zip(others, gradients, strict=True):
            assert relative_error(mine, right.double()) < 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("offsets", [(50.0, 0.0), (-300.0, 1e4), (1e4, 1e4)])
def test_accurate_near_convergence_whatever_the_constant(backend, divergence, offsets):
    """As accurate as without: against float64 of the same float32 logits."""
    student = logits((4, 3000))
    teacher = student + 1e-3 * torch.randn(4, 3000) + offsets[1]
    student = student + offsets[0]
    options = {"divergence": divergence, "beta": 0.3}
    loss, gradients = run(fastkd.softmax_divergence, student, teacher, **options)
    true, exact = exactly(student, teacher, **options)
    assert ((loss - true).abs() / true).max() < 1e-4
    for mine, right in zip(gradients, exact, strict=True):
        assert relative_error(mine, right) < (1e-5 if divergence == "tvd" else 2e-6)


@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_mixtures_do_not_lose_what_a_constant_takes(backend, mix):
    student = logits((3, 2000))
    teachers = [logits((3, 2000)) + by for by in (1e4, -2000.0, 0.0)]
    for options in ({"teacher_temperature": 2.0}, {"divergence": "jsd", "temperature": 0.5}):
        options |= {"teacher_mix": mix, "teacher_weights": [0.2, 0.5, 0.3]}
        loss, gradients = run(fastkd.softmax_divergence, student, teachers, **options)
        true, exact = exactly(student, teachers, **options)
        torch.testing.assert_close(loss.double(), true, rtol=2e-6, atol=1e-7)
        assert relative_error(gradients[0], exact[0]) < 3e-6


# --- Masked columns --------------------------------------------------------------------------


def masks(vocab):
    """Columns to mask: some, and whole blocks and slices of the CPU's, first, between and last."""
    columns = torch.arange(vocab)
    for mask in (
        torch.rand(vocab) < 0.5,
        columns < vocab // 2,
        columns > vocab // 3,
        columns // 512 % 2 == 0,
        columns != vocab - 2,
    ):
        mask[vocab - 2] = False
        yield mask


def smallest(dtype):
    return torch.finfo(dtype).min


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("fills", FILLS)
def test_masked_columns_are_not_there(backend, divergence, dtype, fills, request):
    """The best instruction set gets every mask in every size; the others each mask in one.

    Which size that is depends on the fills: over all of them, it is every one.
    """
    every = request.node.callspec.params["backend"] == BEST
    turn = FILLS.index(fills)
    first, *rest = [-INF if x == "-inf" else smallest(dtype) for x in fills.split(", ")]
    second = rest[0] if rest else first
    for number, vocab in enumerate((5, 513, 1600, 9000)):
        temperature, teacher_temperature = TEMPERATURES[number]
        options = {"temperature": temperature, "teacher_temperature": teacher_temperature}
        if dtype == torch.float16 and temperature > 50:
            options = {}  # -65504 / 100 is not far below every other logit
        for place, mask in enumerate(masks(vocab)):
            student = logits((2, vocab)) - 100
            teacher = logits((2, vocab)) - 120
            if not every and (number + place + turn) % 4:
                continue
            student, teacher = student.to(dtype), teacher.to(dtype)
            cut = [x[:, ~mask] for x in (student, teacher)]
            student[:, mask], teacher[:, mask] = first, second
            options |= {"divergence": divergence, "beta": 0.3}
            loss, gradients = run(fastkd.softmax_divergence, student, teacher, **options)
            short, others = run(fastkd.softmax_divergence, *cut, **options)
            torch.testing.assert_close(loss, short, rtol=1e-5, atol=1e-6)
            for whole, part in zip(gradients, others, strict=True):
                assert not whole[:, mask].any()
                tolerance = {"rtol": 1e-2, "atol": 1e-3} if dtype.itemsize == 2 else {}
                if divergence == "mixed_kl" and dtype == torch.float32:
                    # Its gradient is the sum of two divergences', each with its own rounding.
                    tolerance = {"rtol": 2 * 1.3e-6, "atol": 1e-5}
                torch.testing.assert_close(whole[:, ~mask], part, **tolerance)


@pytest.mark.parametrize("mix", ["logits", "probs"])
@pytest.mark.parametrize("fill", [-INF, smallest(torch.float32)])
def test_masked_columns_of_several_teachers(backend, mix, fill):
    """For a token impossible for one teacher alone, too."""
    student, teachers = logits((2, 1500)), [logits((2, 1500)) for _ in range(3)]
    mask = torch.arange(1500) < 600
    options = {"teacher_mix": mix, "teacher_weights": [0.5, 0.3, 0.2], "divergence": "jsd"}
    cut = student[:, ~mask], [t[:, ~mask] for t in teachers]
    for x in (student, *teachers) if mix == "probs" else (student, teachers[1]):
        x[:, mask] = fill
    loss, gradients = run(fastkd.softmax_divergence, student, teachers, **options)
    short, others = run(fastkd.softmax_divergence, *cut, **options)
    torch.testing.assert_close(loss, short, rtol=1e-5, atol=1e-6)
    assert not gradients[0][:, mask].any()
    torch.testing.assert_close(gradients[0][:, ~mask], others[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("fill", [-INF, smallest(torch.float32), smallest(torch.bfloat16)])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_columns_masked_on_one_side(backend, divergence, fill, side):
    """Mass against -inf is infinite; against the smallest number huge, in range where it is."""
    for temperature in (1.0, 0.05, 20.0):
        student, teacher = logits((2, 1500)), logits((2, 1500))
        (student if side == "student" else teacher)[:, 3:900] = fill
        options = {"divergence": divergence, "temperature": temperature}
        loss, gradients = run(fastkd.softmax_divergence, student, teacher, **options)
        true, _ = exactly(student, teacher, **options)
        torch.testing.assert_close(loss, true.float(), rtol=1e-5, atol=1e-6)
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_row_of_the_smallest_number_is_uniform(backend, divergence, dtype):
    flat, other = torch.full((2, 600), smallest(dtype), dtype=dtype), logits((2, 600), dtype)
    options = {"divergence": divergence, "labels": torch.tensor([3, 599]), "temperature": 2.0}
    for student, teacher in ((flat, other), (other, flat), (flat, flat)):
        loss, gradients = run(fastkd.softmax_divergence, student, teacher, **options)
        zeros = [torch.zeros_like(x) if x is flat else x for x in (student, teacher)]
        right, others = run(fastkd.softmax_divergence, *zeros, **options)
        torch.testing.assert_close(loss, right)
        for mine, exact in zip(gradients, others, strict=True):
            torch.testing.assert_close(mine, exact)


# --- A beta for each row ---------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("vocab", [40, 5000])
def test_a_beta_for_each_row(backend, divergence, vocab):
    """The same bits as a call with that beta, at the ends as well, and where one side is -inf."""
    student, teacher = logits((2, 4, vocab)), logits((2, 4, vocab))
    student[:, 1, :5], teacher[:, 2, 7] = -INF, -INF
    student[0, 0] = teacher[0, 0] + 1e-3 * torch.randn(vocab)
    beta = torch.tensor([[0.3, 1.0, 0.0, 0.5], [0.0, 0.0, 1.0, 0.9]], dtype=torch.float64)
    loss, gradients = run(
        fastkd.softmax_divergence, student, teacher, divergence=divergence, beta=beta
    )
    for value in beta.unique().tolist():
        rows = beta == value
        alone, others = run(
            fastkd.softmax_divergence, student, teacher, divergence=divergence, beta=value
        )
        assert torch.equal(loss[rows], alone[rows])
        for mine, right in zip(gradients, others, strict=True):
            assert torch.equal(mine[rows], right[rows])
            assert mine[rows].isfinite().all()


def test_betas_of_rows_left_out_may_be_anything(backend):
    student, teacher = logits((4, 50)), logits((4, 50))
    options = {"divergence": "jsd", "mask": torch.tensor([True, False, True, False])}
    beta = torch.tensor([0.3, 7.0, 1.0, math.nan])
    loss, gradients = run(fastkd.softmax_divergence, student, teacher, beta=beta, **options)
    right, others = run(
        *(fastkd.softmax_divergence, student, teacher),
        **{"beta": beta.where(options["mask"], 0.5), **options},
    )
    assert torch.equal(loss, right)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


@pytest.mark.parametrize("given", [torch.tensor(0.25), torch.tensor(1), np.float32(0.25)])
def test_a_beta_of_no_dimension_is_that_of_all_rows(backend, given):
    student, teacher = logits((3, 50)), logits((3, 50))
    options = {"divergence": "jsd"}
    loss, _ = run(fastkd.softmax_divergence, student, teacher, beta=given, **options)
    right, _ = run(fastkd.softmax_divergence, student, teacher, beta=float(given), **options)
    assert torch.equal(loss, right)


# --- Labels, weights, single teachers --------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 17.0, 100.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "cross_entropy"])
def test_labels_at_another_temperature(backend, divergence, temperature):
    """A later block is much higher than the first, in units of the label's softmax."""
    student, teacher = logits((3, 20_000)), logits((3, 20_000))
    student[0, 700], student[1, 9000], student[2, 600:] = 90, 200, student[2, 600:] + 150
    options = {"temperature": temperature, "labels": torch.tensor([700, 5, 19_999])}
    options |= {"divergence": divergence, "label_weight": 0.5}
    loss, gradients = run(fastkd.softmax_divergence, student, teacher, **options)
    true, exact = exactly(student, teacher, **options)
    torch.testing.assert_close(loss.double(), true, rtol=2e-6, atol=1e-6)
    assert relative_error(gradients[0], exact[0]) < 2e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("fill", [-INF, smallest(torch.float32)])
def test_a_label_of_no_weight_adds_nothing(backend, divergence, fill):
    student, teacher = logits((2, 800)), logits((2, 800))
    student[:, 3] = teacher[:, 3] = fill
    options = {"divergence": divergence, "temperature": 2.0}
    loss, gradients = run(fastkd.softmax_divergence, student, teacher, **options)
    labels = torch.tensor([3, 7])
    for function in (fastkd.softmax_divergence, fastkd.reference.softmax_divergence):
        same, others = run(function, student, teacher, labels=labels, label_weight=0.0, **options)
        torch.testing.assert_close(same, loss, rtol=1e-5, atol=1e-6)
        assert all(g.isfinite().all() for g in others)
    found, others = run(
        fastkd.softmax_divergence, student, teacher, labels=labels, label_weight=0.0, **options
    )
    assert torch.equal(found, loss)
    assert all(torch.equal(a, b) for a, b in zip(others, gradients, strict=True))


@pytest.mark.parametrize("weight", [3.0, 0.3, 0.0, -0.5])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_single_teacher_is_weighted_too(backend, weight, divergence):
    student, teacher = logits((2, 700)), logits((2, 700))
    options = {"divergence": divergence, "teacher_temperature": 2.0}
    weighted = options | {"teacher_weights": [weight]}
    right, exact = exactly(student, weight * teacher.double(), **options)
    for given in ([teacher], teacher):
        for weights in ([weight], torch.full((2, 1), weight)):
            loss, gradients = run(
                fastkd.softmax_divergence, student, given, **weighted | {"teacher_weights": weights}
            )
            torch.testing.assert_close(loss.double(), right, rtol=1e-5, atol=1e-6)
            assert relative_error(gradients[0], exact[0]) < 6e-6
    error = (gradients[1].double() - weight * exact[1]).norm()
    assert error <= 6e-6 * exact[1].norm()
    if weight > 0:  # relative to their sum: a single one has no effect
        loss, _ = run(
            fastkd.softmax_divergence, student, [teacher], **weighted, teacher_mix="probs"
        )
        plain, _ = run(fastkd.softmax_divergence, student, teacher, **options)
        torch.testing.assert_close(
            loss, plain, rtol=4e-7, atol=0
        )  # on CUDA another kernel takes it


@pytest.mark.parametrize("divergence", ["skew_kl", "skew_reverse_kl"])
def test_skewed_wholly_to_its_own_side_is_nothing(backend, divergence):
    for vocab in (1, 2, 63, 513, 8200):
        for dtype in (torch.float32, torch.bfloat16):
            student, teacher = logits((4, vocab), dtype), logits((4, vocab), dtype)
            for temperature in (1.0, 0.3):
                loss, gradients = run(
                    fastkd.softmax_divergence,
                    *(student, teacher),
                    **{"divergence": divergence, "beta": 1.0, "temperature": temperature},
                )
                assert not loss.any()
                assert not any(g.any() for g in gradients)


def eager(student, teacher, divergence, beta, reduction):
    """What PyTorch users write."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    mix = lambda a, b: torch.logaddexp(a + math.log(beta), b + math.log(1 - beta))  # noqa: E731
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    if divergence == "jsd":
        return beta * kl(log_p, mix(log_p, log_q)) + (1 - beta) * kl(log_q, mix(log_p, log_q))
    return kl(log_q, mix(log_q, log_p))


@pytest.mark.parametrize(("vocab", "peak"), [(1000, 15.0), (50_000, 25.0)])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_gradients_with_a_certain_teacher(backend, vocab, peak, beta):
    """Complaint: skewed KLs and JSD lost up to 7e-3. All but skew_kl: as good as eager float32."""
    for divergence in ("skew_kl", "skew_reverse_kl", "jsd"):
        errors, others = [], []
        options = {"divergence": divergence, "beta": beta}
        for _ in range(5):
            student, teacher = torch.randn(1, vocab) * 2, torch.randn(1, vocab) * 2
            teacher[0, 7] += peak
            _, exact = exactly(student, teacher, **options)
            _, found = run(fastkd.softmax_divergence, student, teacher, **options)
            errors.append(relative_error(found[0], exact[0]))
            if divergence != "skew_kl":
                _, found = run(eager, student, teacher, **options)
                others.append(relative_error(found[0], exact[0]))
        if divergence == "skew_kl":
            assert max(errors) < 1e-5
        else:
            rounding = 16 * torch.finfo(torch.float32).eps  # below it neither is the better one
            assert sorted(errors)[2] <= max(sorted(others)[2], rounding)


# --- Everything together ---------------------------------------------------------------------


def _random_case(generator):
    """Rows with constants and masks, and options, from a random generator."""
    pick = generator.choice
    vocab = pick((1, 2, 7, 63, 511, 512, 513, 1500, 2049, 8193))
    dtype = pick((torch.float32,) * 3 + (torch.bfloat16, torch.float16))
    count, spread = pick((1, 1, 1, 2, 3)), pick((0.5, 2.0, 4.0))
    student = torch.randn(2, vocab) * spread
    teachers = [torch.randn(2, vocab) * spread for _ in range(count)]
    if pick((True, False, False, False)):
        teachers = [student + pick((1e-3, 0.1)) * torch.randn(2, vocab) for _ in teachers]
    offset = lambda: pick((0, 0, 50, -100, -3000, 1e4))  # noqa: E731
    student = (student + offset()).to(dtype)
    teachers = [(t + offset()).to(pick((dtype, torch.float32))) for t in teachers]
    if vocab > 2 and pick((True, False)):
        columns, middle = torch.arange(vocab), pick(range(1, vocab))
        mask = pick((columns < middle, columns > middle, torch.rand(vocab) < 0.6))
        mask[pick(range(vocab))] = False
        for x in (student, *teachers):
            x[:, mask] = pick((-INF, smallest(x.dtype)))
    options = {"divergence": pick(DIVERGENCES), "beta": pick((0.1, 0.5, 0.9))}
    options["temperature"] = pick((0.3, 1.0, 1.0, 2.0, 20.0, torch.tensor([0.5, 30.0])))
    options["teacher_temperature"] = pick((None, None, 0.3, 4.0))
    if pick((True, False, False)):
        options |= {"labels": torch.randint(0, vocab, (2,)), "label_weight": pick((0.0, 0.5))}
        for row, label in enumerate(options["labels"]):
            student[row, label] = student[row].max()
            for t in teachers:
                t[row, label] = t[row].max()
    if count > 1:
        weights = [pick((0.3, 0.5, 1.0)) for _ in range(count)]
        options |= {"teacher_mix": pick(("logits", "probs")), "teacher_weights": weights}
    return student, teachers if count > 1 else teachers[0], options


@pytest.mark.parametrize("block", range(8))
def test_random_rows_against_float64(backend, block):
    for seed in range(12 * block, 12 * block + 12):
        torch.manual_seed(seed)
        student, teacher, options = _random_case(random.Random(seed))
        loss, gradients = run(fastkd.softmax_divergence, student, teacher, **options)
        true, exact = exactly(student, teacher, **options)
        said = f"seed {seed}: {tuple(student.shape)} {student.dtype} {options}"
        torch.testing.assert_close(
            loss,
            true.float(),
            rtol=3e-5,
            atol=3e-5,
            equal_nan=True,
            msg=lambda m, s=said: f"{s}: {m}",
        )
        given = (options["temperature"], options["teacher_temperature"])
        temperatures = [torch.as_tensor(t).min().item() for t in given if t is not None]
        for mine, right in zip(gradients, exact, strict=True):
            fine = true.isfinite() & (true < 1e6)
            error = (mine.double() - right)[fine].norm().item()
            rounding = {torch.float32: 0.0, torch.bfloat16: 4e-3, torch.float16: 1e-3}[mine.dtype]
            # tvd's gradient jumps where p = q.
            rounding += 1e-3 if options["divergence"] == "tvd" else 1e-4
            allowed = rounding * right[fine].norm().item() + 1e-5 / min(1.0, *temperatures)
            assert error <= allowed, said


@pytest.mark.parametrize("vocab", [1000, 20_011])
@pytest.mark.parametrize("peak", [8.0, 12.0, 16.0, 20.0])
def test_reverse_kl_of_a_certain_student(backend, peak, vocab):
    """The token of nearly all the mass has the gradient of all others, with their digits."""
    for temperature in (1.0, 2.0):
        options = {"divergence": "reverse_kl", "temperature": temperature}
        student, teacher = (torch.randn(4, vocab).bfloat16().float() for _ in range(2))
        student[:, 7] = student.max() + peak * temperature
        _, exact = exactly(student, teacher, **options)
        _, found = run(fastkd.softmax_divergence, student, teacher, **options)
        assert relative_error(found[0], exact[0]) < 2e-6
        error = (found[0].double() - exact[0])[:, 7] / exact[0][:, 7]
        assert error.abs().max() < 2e-6
