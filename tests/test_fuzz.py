"""Random problems of every op against `fastkd.reference` in float64, for `--fuzz-seconds` each.

Shapes, strides, types, options, and values that real logits seldom have: huge spreads, ties, masks,
rows without a finite logit, NaN. A failure names its seed; `--fuzz-seed` begins there.

What float32 cannot hold, and the reference therefore not decide, is defined here:

- A loss above 1e20 (mass on a token whose logit is below -1e20) is infinite or above 1e18; its row's
  gradients are finite, not compared.
- A float32 op rounds the distance of a logit from its row's maximum, and each exponential: it may be
  as far off as such a rounding of all of them moves the exact results, and a few roundings of its own.
"""

import math
import random
import time
from dataclasses import replace

import pytest
import torch
from cases import DIVERGENCES
from row_problems import (
    ALM_DIVERGENCES,
    TAILS,
    Draw,
    Problem,
    byte_vocab,
    dtype_of,
    edge_room,
    evaluate,
    gradient_room,
    in_float64,
    mapped,
    tolerance,
)

import fastkd

HUGE = 1e20
VOCABULARIES = (1, 2, 3, 5, 17, 33, 100, 511, 512, 513, 1025, 4097, 8193, 9000)
TEMPERATURES = (0.05, 0.1, 0.5, 1.0, 1.0, 1.0, 2.0, 7.0, 20.0, 100.0)
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Fuzz:
    """Draws the parts of problems."""

    def __init__(self, seed: int, on_cpu: bool) -> None:
        self.pick = random.Random(seed)
        self.seed, self.on_cpu = seed, on_cpu
        self.generator = torch.Generator().manual_seed(seed)
        vocabularies = VOCABULARIES if on_cpu else VOCABULARIES[:7]
        self.vocab = self.pick.choice(vocabularies)
        self.leading = self.pick.choice(((), (1,), (3,), (2, 3), (4, 1), (2, 1, 2), (0,), (2, 0)))
        self.dtypes = [d for d in DTYPES if on_cpu or d != torch.float64]
        self.dtype = self.pick.choice(self.dtypes)
        self.spreads: tuple[float, ...] = (0.0, 1e-3, 1.0, 3.0, 3.0, 10.0, 100.0, 1e3)
        self.only_finite = False
        # One kind of mask: where one side is finite and the other is not, see test_invariance.
        self.mask = self.pick.choice(("", "inf", "inf", "min"))

    def rand(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator)

    def randint(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def often(self, share: float) -> bool:
        return self.pick.random() < share

    def layout(self, x: torch.Tensor) -> torch.Tensor:
        """The same numbers in memory of another shape."""
        how = self.pick.choice(("plain", "plain", "step", "columns first", "offset", "wide"))
        if how == "step":
            return torch.stack([x, x + 1], -1).flatten(-2)[..., ::2]
        if how == "columns first" and x.dim() > 1:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if how == "offset":
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        if how == "wide":
            return torch.cat([x, x[..., :1]], -1)[..., : x.size(-1)]
        return x

    def masked(self, x: torch.Tensor) -> torch.Tensor:
        """Some columns of some rows impossible, in runs or alone."""
        if not self.mask:
            return x
        value = -math.inf if self.mask == "inf" else torch.finfo(x.dtype).min
        rows = self.rand(*x.shape[:-1], 1) < 0.7
        if self.often(0.5):
            columns = self.rand(x.size(-1)) < self.pick.choice((0.01, 0.3, 0.9))
        else:
            begin = self.pick.choice((0, 512, self.pick.randrange(x.size(-1))))
            length = self.pick.choice((1, 512, 1024, 8192))
            columns = (torch.arange(x.size(-1)) - begin).clamp(-1, length) % (length + 1) < length
            columns = (torch.arange(x.size(-1)) >= begin) & (torch.arange(x.size(-1)) < begin + length)
        return x.masked_fill(rows & columns, value)

    def numbers(self, shape: tuple[int, ...]) -> torch.Tensor:
        spread = self.pick.choice(self.spreads)
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64) * spread
        if self.often(0.2):
            x = x.round()  # ties
        if self.often(0.3):
            x = x + self.pick.choice((-1, 1)) * 10 ** self.pick.uniform(0, 4)
        if self.often(0.1) and len(self.spreads) > 3:
            x[..., self.pick.randrange(shape[-1])] += self.pick.choice((15.0, 200.0, 6e4))
        return x

    def logits(self, near: torch.Tensor | None = None) -> torch.Tensor:
        """Of self.dtype or another one; `near`: sometimes those with a little noise."""
        shape = (*self.leading, self.vocab)
        dtype = self.dtype if self.often(0.8) else self.pick.choice(self.dtypes)
        x = self.numbers(shape)
        if near is not None and self.often(0.3):
            x = near.double() + x * 10 ** self.pick.uniform(-6, -1)
            x = x.nan_to_num(0, 100, -100).clamp(-6e4, 6e4)
        x = self.masked(x.to(dtype))
        if self.often(0.2) and x.numel() and not self.only_finite:
            row = self.pick.randrange(max(1, x[..., 0].numel()))
            bad = self.pick.choice((math.nan, math.inf, -math.inf))
            rows = x.view(-1, self.vocab)
            rows[row, ... if bad == -math.inf else self.pick.randrange(self.vocab)] = bad
        return self.layout(x)

    def temperature(self):
        if self.often(0.15):
            return self.rand(*self.leading) * 3 + 0.2
        return self.pick.choice(TEMPERATURES)

    def row_options(self) -> dict:
        """What all losses over rows take."""
        options: dict = {"temperature": self.temperature()}
        if self.often(0.4):
            options["teacher_temperature"] = self.temperature()
        if self.often(0.3):
            options["weight"] = self.rand(*self.leading) * (self.rand(*self.leading) < 0.7)
        if self.often(0.3):
            options["mask"] = self.rand(*self.leading) < 0.6
        if self.often(0.4):
            width = options["vocab_size"] = self.pick.randint(1, self.vocab)
            if self.often(0.6):
                del options["vocab_size"]
                width = self.vocab
            labels = self.randint(0, width, *self.leading)
            options["labels"] = torch.where(self.rand(*self.leading) < 0.2, -100, labels)
            options["label_weight"] = self.pick.choice((0.0, 0.3, 1.0))
        options["reduction"] = self.pick.choice(
            ("none", "none", "sum", "mean", "elementmean", *(["batchmean"] if self.leading else []))
        )
        if options["reduction"] != "none" and self.often(0.2):
            options["normalizer"] = self.pick.choice((7.0, torch.tensor(3.0)))
        options["square_temperature"] = self.often(0.2)
        return options


def softmax(f: Fuzz) -> Problem:
    options = f.row_options()
    divergence = f.pick.choice(DIVERGENCES)
    # Skewed divergences at beta 1: test_skewed_divergences_at_beta_1.
    betas = (0.0, 0.1, 0.5, 0.9) if "skew" in divergence else (0.0, 0.1, 0.5, 0.9, 1.0)
    beta = f.pick.choice(betas)
    student = f.logits()
    if f.often(0.2):
        teachers: object = [f.logits(student) for _ in range(f.pick.choice((2, 3)))]
        options["teacher_mix"] = f.pick.choice(("logits", "probs"))
        weights = [f.pick.choice((0.0, 0.3, 0.7, 1.0)) for _ in teachers]
        if sum(weights) and f.often(0.7):
            options["teacher_weights"] = weights
    else:
        teachers = f.logits(student)
    options |= {"divergence": divergence, "beta": beta}
    wanted = ["student_logits"]
    if not isinstance(teachers, list) and f.often(0.5):
        wanted.append("teacher_logits")
    logits = {"student_logits": student, "teacher_logits": teachers}
    return Problem("softmax_divergence", logits, options=options, wanted=tuple(wanted))


def topk(f: Fuzz) -> Problem:
    options = f.row_options()
    width = options.get("vocab_size", f.vocab)
    k = f.pick.choice((1, min(2, width), min(5, width), min(40, width), min(3, width)))
    student = f.logits()
    spread = f.pick.choice((1.0, 3.0, 10.0, 100.0))
    teacher = torch.randn((*f.leading, width), generator=f.generator, dtype=torch.float64) * spread
    log_probs, indices = teacher.log_softmax(-1).topk(k, -1)
    # A mass within rounding of 1 leaves a rest that float64 sums in another order do not agree on.
    log_probs = log_probs - f.pick.choice((0.01, 0.2, 2.0))
    if f.often(0.2):
        indices = torch.where(f.rand(*f.leading, k) < 0.2, -1, indices)
    if f.often(0.1):
        log_probs = torch.where(f.rand(*f.leading, k) < 0.3, -math.inf, log_probs)
    if f.often(0.3):
        options["min_log_prob"] = f.pick.choice((-2.0, -8.0, -30.0))
    if f.often(0.3):
        options["max_token_loss"] = f.pick.choice((0.0, 0.7, 5.0))
    if f.often(0.4):
        options["stored_temperature"] = f.pick.choice((0.7, 1.0, 2.0))
    stored = f.pick.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
    if not f.on_cpu and stored == torch.float64:
        stored = torch.float32
    options |= {
        "teacher_log_probs": f.layout(log_probs.to(stored)),
        "teacher_indices": indices.to(f.pick.choice((torch.int32, torch.int64))),
        "divergence": f.pick.choice(("forward_kl", "reverse_kl", "jsd", "cross_entropy")),
        "beta": f.pick.choice((0.0, 0.1, 0.5, 1.0)),
        "tail": f.pick.choice(TAILS),
    }
    wanted = ("student_logits", "teacher_log_probs")
    return Problem("topk_divergence", {"student_logits": student}, options=options, wanted=wanted)


def least(x: torch.Tensor) -> float:
    return x[x > -1e30].min().item() if (x > -1e30).any() else 0.0


def largest(x: torch.Tensor) -> float:
    return x.max().item() if x.numel() else 0.0


def clipped(f: Fuzz) -> Problem:
    options = f.row_options()
    student = f.logits()
    options |= {
        "renormalize": f.pick.choice(("none", "teacher", "both")),
        "tail": f.pick.choice(("drop", "lump")),
        "quantile": f.often(0.3),
        "keep_label": f.often(0.7),
    }
    wanted = ["student_logits", "teacher_logits"]
    if options["quantile"]:
        lower, upper = 0.4 * f.rand(*f.leading), 0.5 + 0.5 * f.rand(*f.leading)
    else:
        lower, upper = f.rand(*f.leading) / (2 * f.vocab), f.rand(*f.leading) * 0.5 + 0.5
    options |= {"lower": lower, "upper": upper}
    if f.often(0.3):
        options["softness"] = f.pick.choice((0.01, 0.05, 0.3))
        wanted += ["lower", "upper"]
    logits = {"student_logits": student, "teacher_logits": f.logits(student)}
    if options["keep_label"] and options.get("label_weight") == 0:
        options["label_weight"] = 0.3  # see label_weight_of_0
    # The definition takes masses, not their logarithms: in float64 they must not underflow. A mass that
    # underflows in float32 beside an impossible token is infinite or not, as the sums' order has it.
    most = 80 if f.mask == "inf" else 600
    options.setdefault("teacher_temperature", options["temperature"])
    for name, x in zip(("temperature", "teacher_temperature"), logits.values(), strict=True):
        low, high = (g(x.double().nan_to_num(y, y, y)) for g, y in ((least, 1e9), (largest, -1e9)))
        least_temperature = max(high - low, 0) / most
        if isinstance(options[name], torch.Tensor):
            options[name] = options[name].clamp(min=least_temperature)
        else:
            options[name] = max(options[name], least_temperature)
    return Problem("clipped_divergence", logits, options=options, wanted=tuple(wanted))


def stats(f: Fuzz) -> Problem:
    logits = {"student_logits": f.logits()}
    if f.often(0.7):
        logits["teacher_logits"] = f.logits(logits["student_logits"])
    options = {"temperature": f.temperature()}
    width = f.pick.randint(1, f.vocab) if f.often(0.2) else f.vocab
    if width < f.vocab:
        options["vocab_size"] = width
    if f.often(0.6):
        labels = f.randint(0, width, *f.leading)
        options["labels"] = torch.where(f.rand(*f.leading) < 0.2, -100, labels)
    return Problem("token_stats", logits, options=options)


def teacher_topk(f: Fuzz) -> Problem:
    options = {"k": f.pick.randint(1, min(f.vocab, 100)), "temperature": f.temperature()}
    return Problem("teacher_topk", {"teacher_logits": f.logits()}, options=options)


def chunks(f: Fuzz, shape: tuple[int, ...], count: int) -> torch.Tensor:
    """Ascending numbers in runs, -1 between."""
    steps = f.randint(0, 2, *shape).cumsum(-1)
    return torch.where((steps % 3 == 2) | (steps >= count), -1, steps)


def chunk(f: Fuzz) -> Problem:
    f.leading = (*f.leading, f.pick.choice((1, 2, 7)))
    count = f.pick.choice((1, 3, 8))
    options = {
        "token_ids": f.randint(0, f.vocab, *f.leading),
        "chunk_ids": chunks(f, f.leading, count),
        "num_chunks": count,
        "temperature": f.pick.choice(TEMPERATURES),
    }
    if f.often(0.6):
        options["boundary"] = f.rand(f.vocab) < f.pick.choice((0.0, 0.05, 0.5, 1.0))
    return Problem(
        "chunk_log_likelihood", {"logits": f.logits()}, options=options, wanted=("logits",)
    )


def alm(f: Fuzz) -> Problem:
    """Likelihoods are finite here, and not the same on both sides, where some losses have a kink."""
    f.spreads = (1.0, 3.0, 10.0)
    f.mask, f.only_finite = "", True
    batch, count = f.pick.choice((1, 3)), f.pick.choice((1, 3, 8))
    logits, options = {}, {}
    both = f.often(0.7)
    for side in ("student", "teacher"):
        f.leading = (batch, f.pick.choice((1, 3, 8)))
        f.vocab = f.pick.choice((2, 40, 600) if f.on_cpu else (2, 40))
        logits[f"{side}_logits"] = f.logits()
        options[f"{side}_ids"] = f.randint(0, f.vocab, *f.leading)
        options[f"{side}_chunks"] = chunks(f, f.leading, count)
        if both:
            options[f"{side}_boundary"] = torch.arange(f.vocab) % 2 == 0
    options |= {
        "num_chunks": count,
        "divergence": f.pick.choice(ALM_DIVERGENCES),
        "temperature": f.pick.choice((10.0, 100.0)),
        "reduction": f.pick.choice(("none", "mean", "sum", "batchmean")),
        "debias": f.often(0.5),
        # A likelihood near 1 is off by a rounding of 1: it must be little beside epsilon.
        "epsilon": 1e-2,
    }
    if both and f.often(0.3):
        options["merge_threshold"] = 0.4
    wanted = ("student_logits", "teacher_logits")
    return Problem("alm_loss", logits, options=options, wanted=wanted)


def byte(f: Fuzz) -> Problem:
    draw = Draw(f.seed, torch.float32, 1, max(f.vocab, 2))
    options: dict = {"vocab": byte_vocab(draw)}
    f.vocab = draw.vocab + f.pick.choice((0, 3))
    options["prefix"] = f.pick.choice((b"", b"a", b"ab", b"zz"))
    if f.often(0.4):
        options["valid"] = f.rand(*f.leading, f.vocab) < 0.6
    return Problem("byte_log_probs", {"logits": f.logits()}, options=options, wanted=("logits",))


def centred(problem: Problem) -> Problem:
    """Relative to the rows' maxima, in float64: the reference's own sums round at the logits' size."""
    return mapped(problem, lambda name, x: x - maxima(problem, x))


def maxima(problem: Problem, x: torch.Tensor) -> torch.Tensor:
    """The largest logit of each row among the columns that count; 0 where it is not finite."""
    if not x.numel():
        return x.new_zeros((*x.shape[:-1], 1))
    top = x[..., : problem.options.get("vocab_size")].amax(-1, keepdim=True)
    return torch.where(top.isfinite(), top, 0)


def rounded_distances(problem: Problem, double: bool, seed: int) -> Problem:
    """Logits relative to their row's maximum, each off by a rounding, and so its exponential."""
    generator = torch.Generator().manual_seed(seed)
    eps = 2.0**-52 if double else 2.0**-23

    def noise(x: torch.Tensor) -> torch.Tensor:
        return eps * torch.randn(x.shape, generator=generator, dtype=x.dtype).clamp(-2, 2)

    def move(name: str, x: torch.Tensor) -> torch.Tensor:
        temperature = problem.options.get("temperature", 1.0)
        if name.startswith("teacher"):
            temperature = problem.options.get("teacher_temperature", temperature)
        if problem.op == "alm_loss":
            temperature = 1.0
        if isinstance(temperature, torch.Tensor) and temperature.dim():
            temperature = temperature.unsqueeze(-1)
        return torch.where(x.isfinite(), x * (1 + noise(x)) + temperature * noise(x), x)

    return mapped(problem, move)


def label_weight_of_0(problem: Problem) -> Problem:
    """Without a label's term of no weight, which the definition multiplies with what may be infinite."""
    options = dict(problem.options)
    if options.get("label_weight") != 0 or options.get("keep_label", False):
        return problem
    kept = options.pop("labels") != -100
    options["mask"] = kept & options["mask"] if "mask" in options else kept
    return replace(problem, options=options)


class Exact:
    """The results in float64, and how far roundings move them, which is found when it is needed."""

    def __init__(self, problem: Problem) -> None:
        self.problem = label_weight_of_0(centred(in_float64(problem)))
        self.double = dtype_of(problem) == torch.float64
        self.outputs, self.gradients = evaluate(fastkd.reference, self.problem)
        self.constants: dict[str, torch.Tensor] = {}
        for side in ("student", "teacher"):
            if f"{side}_lse" in self.outputs:  # the only results that see a constant
                logits, t = problem.logits[f"{side}_logits"], problem.options["temperature"]
                self.constants[f"{side}_lse"] = maxima(problem, logits.double()).squeeze(-1) / t
        for name, constant in self.constants.items():
            self.outputs[name] = self.outputs[name] + constant
        self._moved: list[tuple[dict, dict]] = []

    def moved(self, name: str, gradient: bool) -> torch.Tensor:
        """The largest change of an output or gradient, entry by entry."""
        if not self._moved:
            for seed in range(4):
                moved = rounded_distances(self.problem, self.double, seed)
                self._moved.append(evaluate(fastkd.reference, moved, self.outputs))
        right = self.gradients[name] if gradient else self.outputs[name]
        others = [x[gradient][name] + self.constants.get(name, 0) for x in self._moved]
        return torch.stack([(x - right).abs().nan_to_num(0, 0, 0) for x in others]).amax(0).double()


def check(problem: Problem, label: str) -> None:
    exact = Exact(problem)
    found, gradients = evaluate(fastkd, problem, exact.outputs)
    where = f"{label}: {problem}"
    for name, value in exact.outputs.items():
        check_output(problem, exact, name, found[name], value, where)
    for name, value in exact.gradients.items():
        check_gradient(problem, exact, name, gradients[name], value, where)


def check_output(problem, exact, name, mine, value, where) -> None:
    assert mine.shape == value.shape, f"{where}: {name} has shape {list(mine.shape)}"
    if not value.is_floating_point():
        assert torch.equal(mine, value.to(mine.dtype)), f"{where}: {name} {mine} for {value}"
        return
    rtol, atol = tolerance(problem, dtype_of(problem))
    if problem.op == "teacher_topk":
        rtol, atol = 2e-6, 4e-6
    mine, huge = mine.double(), value.abs() > HUGE
    good = huge & (mine.abs() > 1e18) & (mine.sign() == value.sign())
    good |= (mine == value) | (mine.isnan() & value.isnan())
    good |= (mine - value).abs() <= atol + rtol * value.abs()
    if not good.all():
        good |= (mine - value).abs() <= 8 * exact.moved(name, False) + atol + rtol * value.abs()
    at = int((~good).flatten().double().argmax()) if good.numel() else 0
    assert good.all(), (
        f"{where}: {name} is {mine.flatten()[at]:.9g} for {value.flatten()[at]:.9g} at {at}"
    )


def check_gradient(problem, exact, name, mine, value, where) -> None:
    given = problem.logits[name] if name in problem.logits else problem.options[name]
    assert mine.dtype == given.dtype
    assert mine.shape == given.shape
    if not mine.numel():
        return
    # Rows whose loss is not finite are not compared: what stands for an infinite slope is a convention.
    skip = torch.zeros(value.shape[: max(value.dim() - 1, 0)], dtype=torch.bool)
    if "loss" in exact.outputs and problem.op != "alm_loss":
        loss = exact.outputs["loss"]
        lost = (loss.abs() > HUGE) | ~loss.isfinite()
        skip = lost if loss.shape == skip.shape else skip | lost.any()
        if name in ("lower", "upper"):
            skip = lost.any()
    rows = (1, 1) if value.dim() == 0 else (-1, value.size(-1))
    right, found = value.reshape(rows), mine.double().reshape(rows)
    for number, row in enumerate(right):
        if bool(skip.flatten()[number if skip.numel() > 1 else 0]):
            continue
        at = f"{where}: the gradient of {name} in row {number}"
        if row.isnan().any():
            # Or zero: the incoming gradient of a result that is not finite is 0 here.
            assert found[number].isnan().any() or not found[number].any(), f"{at} is not nan"
            continue
        error = (found[number] - row).norm().item()
        # Of alm_loss what a row's gradient is multiplied with is the chunk's, often large.
        room = gradient_room(problem, right if problem.op == "alm_loss" else row, mine.dtype)
        if name in ("lower", "upper"):
            room = 2e-5 * row.abs().max().item() + edge_room(exact.problem, row)
        if not error <= room:
            room += 8 * exact.moved(name, True).reshape(rows)[number].norm().item()
        assert error <= room, f"{at} is {error:.3g} off, {room:.3g} allowed"


BUILDERS = {
    function.__name__: function
    for function in (softmax, topk, clipped, stats, teacher_topk, chunk, alm, byte)
}


@pytest.mark.parametrize("op", BUILDERS)
def test_random_problems(backend, op, request):
    on_cpu = "cpu-" in request.node.callspec.id
    seed = request.config.getoption("--fuzz-seed")
    end = time.monotonic() + request.config.getoption("--fuzz-seconds")
    while time.monotonic() < end:
        problem = BUILDERS[op](Fuzz(seed, on_cpu))
        check(problem, f"--fuzz-seed {seed}")
        seed += 1


@pytest.mark.filterwarnings("ignore")
def test_random_kl_div(backend, request):
    """Against torch's own in float64."""
    seed = request.config.getoption("--fuzz-seed")
    end = time.monotonic() + request.config.getoption("--fuzz-seconds")
    while time.monotonic() < end:
        f = Fuzz(seed, "cpu-" in request.node.callspec.id)
        shape = (*f.leading, f.vocab)
        log_target = f.often(0.5)
        x, y = (f.masked(f.numbers(shape).clamp(-300, 300).log_softmax(-1).to(f.dtype)) for _ in "xy")
        if not log_target:
            y = torch.where(f.rand(*shape) < 0.1, -1.0, y.double()).exp().to(f.dtype)
        reduction = f.pick.choice(("none", "sum", "mean", "batchmean") if f.leading else ("none", "sum"))
        options = {"reduction": reduction, "log_target": log_target}
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        doubles = [z.detach().double().requires_grad_() for z in leaves]
        found = fastkd.kl_div(*leaves, **options)
        right = torch.nn.functional.kl_div(*doubles, **options)
        right_gradients = torch.autograd.grad(right.sum(), doubles)
        gradients = torch.autograd.grad(found.sum(), leaves)
        what = f"--fuzz-seed {seed}: kl_div({list(shape)} {f.dtype}, mask {f.mask!r}, {options})"
        eps = max(4 * torch.finfo(f.dtype).eps, 1e-5 if f.dtype == torch.float32 else 0)
        size = right.detach().abs().nan_to_num(0, 0, 0).max().item() if right.numel() else 0.0
        if reduction != "none":  # a sum of both signs
            terms = torch.nn.functional.kl_div(
                *(z.detach() for z in doubles), reduction="none", log_target=log_target
            )
            size = terms.abs().nan_to_num(0, 0, 0).sum().item()
        limit = torch.finfo(f.dtype).max
        for mine, exact, scale in (
            (found, right, size),
            *((g, e, 0.0) for g, e in zip(gradients, right_gradients, strict=True)),
        ):
            mine, exact = mine.detach().double(), exact.detach()
            over = exact.abs() > limit / 4
            ok = (mine - exact).abs() <= eps * (exact.abs() + scale) + torch.finfo(f.dtype).tiny
            ok |= (mine == exact) | (mine.isnan() & exact.isnan())
            ok |= over & (mine.abs() > limit / 8)
            assert ok.all(), f"{what}: {mine[~ok][:4]} for {exact[~ok][:4]}"
        seed += 1


def test_what_float32_cannot_hold(backend):
    """Mass on a token whose logit is the smallest number: infinite or as large, never NaN or small."""
    student = torch.zeros(2, 40)
    student[:, 3] = torch.finfo(torch.float32).min
    for divergence in ("forward_kl", "cross_entropy"):
        leaf = student.clone().requires_grad_()
        loss = fastkd.softmax_divergence(
            leaf, torch.zeros(2, 40), divergence=divergence, reduction="none"
        )
        loss.sum().backward()
        assert (loss > 1e18).all()
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("divergence", ["skew_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("masked", [0, 30, 600])
def test_skewed_divergences_at_beta_1(backend, divergence, masked):
    """The mixture is the side itself: 0, and no gradient."""
    student, teacher = torch.randn(3, 700) * 3, torch.randn(3, 700) * 3
    student[:, :masked] = teacher[:, :masked] = -math.inf
    leaf = student.requires_grad_()
    options = {"divergence": divergence, "beta": 1.0, "reduction": "none"}
    loss = fastkd.softmax_divergence(leaf, teacher, **options)
    loss.sum().backward()
    assert (loss >= 0).all()
    assert loss.max() < 1e-6
    assert leaf.grad.norm() < 1e-6


def test_problems_are_repeated_by_their_seed():
    for builder in BUILDERS.values():
        one, two = (builder(Fuzz(3, True)) for _ in range(2))
        assert str(one) == str(two)
        assert str(replace(one)) == str(two)
