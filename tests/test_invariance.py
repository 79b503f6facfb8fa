"""A softmax does not see a constant, and a masked column is not there.

For every op over rows of logits: adding a constant to a row changes nothing, masked columns change
nothing, rows of one number are uniform. What is right comes from `fastkd.reference` in float64 on
the logits before they were shifted or widened, so that the oracle meets neither.
"""

import itertools
import math
import random
import zlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import DIVERGENCES
from row_kinds import COUNTS_COLUMNS, KINDS, Draw, softmax_problem
from row_problems import (
    BITS,
    COLUMN_OUTPUTS,
    Problem,
    centred,
    dtype_of,
    edge_room,
    evaluate,
    gradient_room,
    in_float64,
    mapped,
    shifted,
    side_of,
    tolerance,
    widened,
)

import fastkd
from fastkd._ops.library import usable_instruction_sets

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TEMPERATURES = ((1.0, 1.0), (0.1, 0.1), (20.0, 20.0), (0.1, 1.0), (20.0, 1.0), (1.0, 20.0))
BEST = f"cpu-{usable_instruction_sets()[0]}"
# A sixteen-bit number near 10,000 is a multiple of 8 or 64: logits are then multiples of that, too.
REACHES = {
    torch.float64: (64.0, 16384.0),
    torch.float32: (64.0, 16384.0),
    torch.float16: (64.0, 1024.0, 16384.0),
    torch.bfloat16: (64.0, 512.0, 16384.0),
}


def draw_for(seed: int, dtype: torch.dtype, on_cpu: bool) -> tuple[Draw, float, random.Random]:
    """What a problem is drawn from, and how large its offsets may be."""
    pick = random.Random(seed)
    reach = pick.choice(REACHES[dtype])
    grid = max(2.0**-10, reach / 2 ** BITS[dtype])
    vocab = pick.choice((37, 700, 1500)) if on_cpu else pick.choice((19, 70))
    temperature, teacher_temperature = pick.choice(TEMPERATURES)
    draw = Draw(
        *(seed, dtype, 4 if on_cpu else 3, vocab, temperature, teacher_temperature, grid),
        spread=max(pick.choice((1.0, 3.0)), 2 * grid),
    )
    return draw, min(1e4, reach / 2), pick


def offsets(draw: Draw, most: float, pick: random.Random):
    """A constant for each row of one side or both, exact in the logits' format."""
    step = max(draw.grid, 0.125)
    sides = pick.choice((("student",), ("teacher",), ("student", "teacher")))

    def offset(name: str, x: torch.Tensor) -> torch.Tensor | None:
        if side_of(name) not in sides and name != "logits":
            return None
        rows = draw.rand(*x.shape[:-1])
        sizes = most * (0.5 + 0.5 * rows) if draw.seed % 2 else most**rows
        signs = torch.where(draw.rand(*x.shape[:-1]) < 0.5, -1.0, 1.0)
        return (signs * sizes / step).round() * step

    return offset


def assert_same(
    found: dict[str, torch.Tensor],
    right: dict[str, torch.Tensor],
    problem: Problem,
    what: str,
    places=None,
) -> None:
    """Outputs against the base problem's in float64."""
    rtol, atol = tolerance(problem, dtype_of(problem))
    for name, exact in right.items():
        mine = found[name]
        if places is not None and name in COLUMN_OUTPUTS:
            exact = places[exact.long()].to(exact.dtype)
        if not exact.is_floating_point():
            assert torch.equal(mine, exact.to(mine.dtype)), f"{what}: {name} {mine} for {exact}"
            continue
        if problem.op == "teacher_topk":
            rtol, atol = 2e-6, 4e-6  # float32, whatever the input
        # Tokens masked by a finite number have a logarithm that is finite, too.
        gone = exact == -math.inf
        assert (mine[gone] < -1e3).all(), f"{what}: {name} {mine[gone]} for -inf"
        mine, exact = mine.double()[~gone], exact[~gone]
        try:
            torch.testing.assert_close(mine, exact, rtol=rtol, atol=atol, equal_nan=True)
        except AssertionError as error:
            raise AssertionError(f"{what}: {name}: {error}") from None


def assert_gradients(found, right, problem: Problem, what: str, places=None) -> None:
    """Gradients against the base problem's in float64; masked columns have none."""
    for name, exact in right.items():
        mine, dtype = found[name], found[name].dtype
        if places is not None and name in problem.logits:
            width, at = places(name)
            masked = torch.ones(width, dtype=torch.bool)
            masked[at] = False
            assert not mine[..., masked].any(), f"{what}: the gradient of {name} at masked columns"
            mine = mine[..., at]
        if name in ("lower", "upper"):
            error = (mine.double() - exact.double()).abs().max().item()
            room = 2e-5 * exact.abs().max().item() + edge_room(problem, exact)
            assert error <= room, (
                f"{what}: the gradient of {name} is {error:.3g} off, {room:.3g} allowed"
            )
            continue
        error = (mine.double() - exact).norm().item()
        room = gradient_room(problem, exact, dtype, name)
        assert error <= room, (
            f"{what}: the gradient of {name} is {error:.3g} off, {room:.3g} allowed"
        )


def seeds_of(kind: str, dtype: torch.dtype, count: int):
    first = zlib.crc32(f"{kind} {dtype}".encode()) % 100_000 * 100
    return range(first, first + count)


def rounds(request, most: int) -> tuple[int, bool]:
    """How many problems, all on one of the instruction sets, and whether block-crossing ones."""
    backend = request.node.callspec.params["backend"]
    return most if backend == BEST else 1, backend.startswith("cpu-")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_is_not_seen(backend, kind, dtype, request):
    count, on_cpu = rounds(request, 6 if dtype == torch.float32 else 2)
    for seed in seeds_of(kind, dtype, count):
        draw, most, pick = draw_for(seed, dtype, on_cpu)
        base = KINDS[kind](draw)
        right, exact = evaluate(fastkd.reference, in_float64(base))
        offset, by = offsets(draw, most, pick), {}

        def remembered(name, x, offset=offset, by=by):
            by[name] = offset(name, x)
            return by[name]

        problem = shifted(base, remembered)
        what = f"seed {seed}, {problem}"
        if kind.startswith("token_stats"):  # the only results that do see it
            for name, constant in by.items():
                if constant is not None:
                    lse = f"{side_of(name)}_lse"
                    right[lse] = right[lse] + constant / draw.temperature
        found, gradients = evaluate(fastkd, problem, right)
        assert_same(found, right, problem, what)
        assert_gradients(gradients, exact, problem, what)


def layout(draw: Draw, pick: random.Random, vocab: int, on_cpu: bool) -> tuple[int, torch.Tensor]:
    """A width and the columns that are not masked: single ones are missing, or whole runs."""
    if pick.random() < 0.3:
        missing = pick.choice((1, 5, vocab))
        runs = [1] * missing
    else:
        sizes = (512, 1024, 8192, 511, 8193) if on_cpu else (32, 256)
        runs = [pick.choice(sizes) for _ in range(pick.choice((1, 1, 2, 3)))]
    # Where in the vocabulary each run stands: often first or last, and where a block begins.
    cuts = sorted(
        pick.choice((0, vocab, 512 % (vocab + 1), pick.randrange(vocab + 1))) for _ in runs
    )
    kept = torch.arange(vocab)
    for cut, run in zip(cuts, runs, strict=True):
        kept[cut:] += run
    return vocab + sum(runs), kept


def masks(dtype: torch.dtype):
    return (-math.inf, torch.finfo(dtype).min)


def masked_places(draw: Draw, pick: random.Random, op: str, on_cpu: bool):
    """Of both sides the same columns, but for alm_loss, whose vocabularies differ."""
    sides: dict[str, tuple[int, torch.Tensor]] = {}

    def places(name: str) -> tuple[int, torch.Tensor]:
        side = side_of(name) if op == "alm_loss" else ""
        if side not in sides:
            sides[side] = layout(draw, pick, draw.vocab, on_cpu)
        return sides[side]

    return places


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["inf", "min"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in COUNTS_COLUMNS])
def test_a_masked_column_is_not_there(backend, kind, mask, dtype, request):
    """Also where the logits that are left carry a constant."""
    count, on_cpu = rounds(request, 3)
    for seed in seeds_of(kind + mask, dtype, count):
        draw, most, pick = draw_for(seed, dtype, on_cpu)
        base = KINDS[kind](draw)
        right, exact = evaluate(fastkd.reference, in_float64(base))
        if kind.startswith("token_stats"):
            most = 0.0
        moved = shifted(base, offsets(draw, most, pick)) if most and pick.random() < 0.5 else base
        places = masked_places(draw, pick, base.op, on_cpu)
        fill = masks(dtype)[mask == "min"]
        problem = widened(moved, places, lambda name, x, fill=fill: fill)
        what = f"seed {seed}, {problem}"
        found, gradients = evaluate(fastkd, problem, right)
        assert_same(found, right, problem, what, places("logits")[1])
        assert_gradients(gradients, exact, problem, what, places)


# The side whose mass counts has -inf, the other one the smallest number: no mass is lost.
WEIGHTED = {"forward_kl": "teacher", "cross_entropy": "teacher", "reverse_kl": "student"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_each_side_may_have_a_mask_of_its_own(backend, divergence, dtype, request):
    count, on_cpu = rounds(request, 3)
    for seed in seeds_of(divergence, dtype, count):
        draw, _, pick = draw_for(seed, dtype, on_cpu)
        base = softmax_problem(draw, divergence)
        right, exact = evaluate(fastkd.reference, in_float64(base))
        impossible = WEIGHTED.get(divergence, pick.choice(("student", "teacher")))
        places = masked_places(draw, pick, base.op, on_cpu)
        problem = widened(
            base,
            places,
            lambda name, x, side=impossible: masks(x.dtype)[side_of(name) != side],
        )
        what = f"seed {seed}, -inf in {impossible}, {problem}"
        found, gradients = evaluate(fastkd, problem, right)
        assert_same(found, right, problem, what)
        assert_gradients(gradients, exact, problem, what, places)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_one_number_is_uniform(backend, kind, dtype, request):
    """Whatever the number: the smallest, the largest, and some between."""
    count, on_cpu = rounds(request, 3)
    numbers = (torch.finfo(dtype).min, torch.finfo(dtype).max, -(2.0**15))[:count]
    for number, seed in itertools.product(numbers, seeds_of(kind, dtype, 1)):
        draw, _, pick = draw_for(seed, dtype, on_cpu)
        base = KINDS[kind](draw)
        sides = pick.choice((("student", ""), ("teacher", ""), ("student", "teacher", "")))
        if kind.endswith("-teachers-logits") and abs(number) > 1e30:
            sides = ("student",)  # a sum of two such rows depends on the order of the additions

        def flat(name, x, number, sides=sides):
            return 0 * x + number if side_of(name) in sides else x

        zero, problem = (mapped(base, partial(flat, number=n)) for n in (0.0, number))
        right, exact = evaluate(fastkd.reference, in_float64(zero))
        what = f"seed {seed}, rows of {number:g}, {problem}"
        if kind.startswith("token_stats"):
            for side in ("student", "teacher"):
                if side in sides and f"{side}_lse" in right:
                    lse = right[f"{side}_lse"] + number / draw.temperature
                    # Beyond float32 the log-sum-exp is infinite; nothing else is.
                    right[f"{side}_lse"] = lse if dtype == torch.float64 else lse.float().double()
        found, gradients = evaluate(fastkd, problem, right)
        assert_same(found, right, problem, what)
        assert_gradients(gradients, exact, problem, what)


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "cross_entropy"])
def test_digits_near_convergence_do_not_depend_on_a_constant(backend, divergence, request):
    """docs/numerics.md's 1e-4 of the value and 2e-6 of the gradient, for s + c against t + d.

    In one problem of two the logits are any float32 numbers, rounded where the constant is added:
    what is right is then that of the rounded ones.
    """
    count, on_cpu = rounds(request, 6)
    for seed in seeds_of(divergence, torch.float32, count):
        draw, most, pick = draw_for(seed, torch.float32, on_cpu)
        draw.temperature = draw.teacher_temperature = pick.choice((1.0, 2.0))
        draw.grid, draw.spread, most = 2.0**-10, 3.0, 1e4
        base = softmax_problem(draw, divergence)
        teacher = base.logits["teacher_logits"]
        noise = draw.integers(-2, 3, draw.rows, draw.vocab) * draw.grid
        if seed % 2:
            teacher = teacher + torch.rand(teacher.shape)
        student = teacher + noise.float()
        base = replace(
            base,
            logits={"student_logits": student, "teacher_logits": teacher},
            wanted=("student_logits",),
        )
        if seed % 2:
            constant = (most ** draw.rand(draw.rows, 1)).float()
            problem = replace(base, logits={**base.logits, "student_logits": student + constant})
        else:
            problem = shifted(base, offsets(draw, most, pick))
        right, exact = evaluate(fastkd.reference, centred(in_float64(problem)))
        what = f"seed {seed}, {problem}"
        found, gradients = evaluate(fastkd, problem, right)
        error = ((found["loss"].double() - right["loss"]).abs() / right["loss"]).max().item()
        # Each log-ratio is off by a rounding of a logit; these are of either sign.
        room = 1e-4 * max(1, (1000 / draw.vocab) ** 0.5)
        assert error < room, f"{what}: the loss is {error:.2g} of itself off"
        error = (gradients["student_logits"] - exact["student_logits"]).norm().item()
        size = exact["student_logits"].norm().item()
        # tvd's gradient jumps where p = q.
        room = (1e-3 if divergence == "tvd" else 5e-4 if seed % 2 else 2e-5) * size
        assert error <= room, f"{what}: the gradient is {error / size:.2g} of itself off"


@pytest.mark.parametrize("tail", ["lump", "renormalize", "drop"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "cross_entropy"])
@pytest.mark.parametrize("mask", [-math.inf, -1e4, torch.finfo(torch.float32).min])
def test_top_k_of_which_nothing_is_left_outside(backend, tail, divergence, mask):
    """The teacher's mass is 1 inside the k, and the student's outside is 0: the k tokens alone."""
    log_probs = torch.tensor([[0.5, 0.25, 0.25]]).log()
    inside = torch.tensor([[1.0, 0.0, 2.0]])
    options = {"divergence": divergence, "reduction": "none"}
    sides = inside.double(), log_probs.double()
    leaf = sides[0].clone().requires_grad_()
    right = fastkd.reference.softmax_divergence(leaf, sides[1], **options)
    (exact,) = torch.autograd.grad(right.sum(), leaf)
    # Not less than 1 by a rounding, which would be mass on what is impossible. What is more is
    # scaled back, except by drop.
    log_probs = log_probs if tail == "drop" else log_probs + 1e-5
    for others in (1, 5, 700):
        student = torch.cat([inside, torch.full((1, others), mask)], 1).requires_grad_()
        found = fastkd.topk_divergence(
            student, log_probs, torch.tensor([[0, 1, 2]]), tail=tail, **options
        )
        found.sum().backward()
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(student.grad[:, :3].double(), exact, rtol=1e-5, atol=1e-6)
        assert not student.grad[:, 3:].any()


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_div_of_masked_columns(backend, log_target, dtype):
    """Its inputs are log-probabilities. finfo.min is a mask; -inf is NaN, as for torch."""
    for width, run in ((37, 1), (700, 512), (100, 8192)):
        draw = Draw(width, dtype, 3, width)
        log_q = draw.logits().double().log_softmax(-1).to(dtype)
        log_p = draw.logits().double().log_softmax(-1).to(dtype)
        for mask in masks(dtype):
            target = log_p if log_target else log_p.exp()
            gap = torch.full((3, run), mask, dtype=dtype)
            hole = gap if log_target else torch.zeros_like(gap)
            wide = torch.cat([log_q[:, :9], gap, log_q[:, 9:]], 1).requires_grad_()
            wide_target = torch.cat([target[:, :9], hole, target[:, 9:]], 1)
            kept = torch.cat([torch.arange(9), torch.arange(9 + run, width + run)])
            leaf = log_q.clone().requires_grad_()
            options = {"reduction": "none", "log_target": log_target}
            found = fastkd.kl_div(wide, wide_target, **options)
            right = torch.nn.functional.kl_div(leaf.double(), target.double(), **options)
            found.sum().backward()
            right.sum().backward()
            rtol = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(found[:, kept].double(), right, rtol=rtol, atol=rtol)
            torch.testing.assert_close(wide.grad[:, kept], leaf.grad, rtol=rtol, atol=rtol)
            outside = torch.ones(width + run, dtype=torch.bool)
            outside[kept] = False
            torches = torch.nn.functional.kl_div(wide.detach(), wide_target, **options)
            assert torch.equal(found[:, outside].isnan(), torches[:, outside].isnan())
            assert mask == -math.inf or not found[:, outside].any()
            assert not wide.grad[:, outside].any()
