"""Random problems of every op, with values that real logits seldom have: `BUILDERS`, by name."""

import math
import random
from dataclasses import replace

import torch
from cases import DIVERGENCES
from row_kinds import ALM_DIVERGENCES, TAILS, Draw, byte_vocab
from row_problems import Problem, mapped

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
        # One kind of mask. That of the smallest number is the same on all sides: beside a finite
        # logit it makes terms of a tiny weight times 3e38, see test_invariance.
        self.mask = self.pick.choice(("", "inf", "inf", "min"))
        self.smallest: torch.Tensor | None = None

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
        if self.smallest is not None and self.smallest.shape == x.shape:
            return x.masked_fill(self.smallest, torch.finfo(x.dtype).min)
        rows = self.rand(*x.shape[:-1], 1) < 0.7
        if self.often(0.5):
            columns = self.rand(x.size(-1)) < self.pick.choice((0.01, 0.3, 0.9))
        else:
            begin = self.pick.choice((0, 512, self.pick.randrange(x.size(-1))))
            length = self.pick.choice((1, 512, 1024, 8192))
            place = torch.arange(x.size(-1)) - begin
            columns = (place >= 0) & (place < length)
        if self.mask == "inf":
            return x.masked_fill(rows & columns, -math.inf)
        self.smallest = rows & columns
        return x.masked_fill(self.smallest, torch.finfo(x.dtype).min)

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
            x = x.contiguous()
            rows = x.view(-1, self.vocab)
            rows[row, ... if bad == -math.inf else self.pick.randrange(self.vocab)] = bad
        return self.layout(x)

    def temperature(self):
        if self.often(0.15):
            return self.rand(*self.leading) * 3 + 0.2
        return self.pick.choice(TEMPERATURES)

    def share(self, values: tuple[float, ...]):
        """One of these, or one of them for each row."""
        if self.often(0.15):
            return torch.tensor(values)[self.randint(0, len(values), *self.leading)]
        return self.pick.choice(values)

    def row_options(self, two_sides: bool = True) -> dict:
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
            options["label_weight"] = self.share((0.0, 0.3, 1.0))
        options["reduction"] = self.pick.choice(
            ("none", "none", "sum", "mean", "elementmean", *(["batchmean"] if self.leading else []))
        )
        if options["reduction"] != "none" and self.often(0.2):
            options["normalizer"] = self.pick.choice((7.0, torch.tensor(3.0)))
        options["square_temperature"] = self.often(0.2)
        if self.often(0.3):
            options["logit_softcap"] = self.softcap(two_sides)
        return options

    def softcap(self, two_sides: bool) -> float | tuple[float | None, float | None]:
        caps = [self.pick.choice((0.3, 5.0, 30.0, 50.0, 1e4, 1e30)) for _ in range(2)]
        if not two_sides:
            return self.pick.choice((caps[0], (caps[0], None)))
        return self.pick.choice((caps[0], (caps[0], caps[1]), (None, caps[1]), (caps[0], None)))


def as_read(problem: Problem) -> tuple[Problem, dict[str, torch.Tensor]]:
    """A problem in float64 whose logits are those that the op reads, without the options for that.

    Also the derivatives of its logits by the logits as given, by argument, where they are not 1.
    """
    caps = problem.options.get("logit_softcap")
    if caps is None:
        return problem, {}
    caps = caps if isinstance(caps, tuple) else (caps, caps)
    sides = dict(zip(("student_logits", "teacher_logits"), caps, strict=True))
    sides["logits"] = caps[0]
    options = {name: x for name, x in problem.options.items() if name != "logit_softcap"}

    def cap(name: str, x: torch.Tensor) -> torch.Tensor:
        c = sides[name]
        return x if c is None else torch.where(x.isinf(), x, c * (x / c).tanh())

    slopes = {
        name: torch.where(x.isfinite(), (x / sides[name]).cosh() ** -2, 1.0)
        for name, x in problem.logits.items()
        if sides[name] is not None and not isinstance(x, list)
    }
    return replace(mapped(problem, cap), options=options), slopes


def softmax(f: Fuzz) -> Problem:
    options = f.row_options()
    divergence = f.pick.choice(DIVERGENCES)
    # Skewed divergences at beta 1: test_skewed_divergences_at_beta_1.
    betas = (0.0, 0.1, 0.5, 0.9) if "skew" in divergence else (0.0, 0.1, 0.5, 0.9, 1.0)
    beta = f.share(betas)
    student = f.logits()
    if f.often(0.2):
        teachers: object = [f.logits(student) for _ in range(f.pick.choice((2, 3)))]
        options["teacher_mix"] = f.pick.choice(("logits", "probs"))
        weights = [f.pick.choice((0.0, 0.3, 0.7, 1.0)) for _ in teachers]
        if sum(weights) and f.often(0.7):
            options["teacher_weights"] = weights
        if len(teachers) == 2 and f.often(0.3):
            options["teacher_mix"] = f.pick.choice(("contrast", "share"))
            options["teacher_weights"] = [f.pick.choice((0.1, 0.5, 2.0)), f.pick.choice((0.1, 1.0))]
    else:
        teachers = f.logits(student)
    options |= {"divergence": divergence, "beta": beta}
    if divergence == "alpha_beta":
        options["alpha"] = f.share((0.2, 0.5, 1.0))
    wanted = ["student_logits"]
    if not isinstance(teachers, list) and f.often(0.5):
        wanted.append("teacher_logits")
    logits = {"student_logits": student, "teacher_logits": teachers}
    return Problem("softmax_divergence", logits, options=options, wanted=tuple(wanted))


def topk(f: Fuzz) -> Problem:
    options = f.row_options(two_sides=False)
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
        "beta": f.share((0.0, 0.1, 0.5, 1.0)),
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
    if options["quantile"] and "softness" not in options:
        # Saturated logits may be equal in float32: which of them a quantile keeps is open.
        options.pop("logit_softcap", None)
    weight = options.get("label_weight", 1.0)
    if options["keep_label"] and not isinstance(weight, torch.Tensor) and weight == 0:
        options["label_weight"] = 0.3  # see label_weight_of_0
    # The definition takes masses, not their logarithms: in float64 they must not underflow. Whether
    # a mass that underflows in float32 beside an impossible token makes the loss infinite is open.
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


def cross_entropy(f: Fuzz) -> Problem:
    options = f.row_options(two_sides=False)
    options.pop("teacher_temperature", None), options.pop("label_weight", None)
    options.pop("square_temperature")
    if "labels" not in options:
        labels = f.randint(0, f.vocab, *f.leading)
        options["labels"] = torch.where(f.rand(*f.leading) < 0.2, -100, labels)
    if f.often(0.5):
        options["entropy_weight"] = f.pick.choice((0.5, -0.2))
        options["entropy_temperature"] = f.pick.choice((1.0, 2.0))
        options["entropy_mask"] = f.rand(*f.leading) < 0.5 if f.often(0.5) else None
    return Problem("cross_entropy", {"logits": f.logits()}, options=options, wanted=("logits",))


def token(f: Fuzz) -> Problem:
    width = f.pick.randint(1, f.vocab) if f.often(0.2) else f.vocab
    ids = f.randint(0, width, *f.leading)
    options = {
        "token_ids": torch.where(f.rand(*f.leading) < 0.2, -100, ids),
        "temperature": f.temperature(),
        "entropy": f.often(0.6),
    }
    if width < f.vocab:
        options["vocab_size"] = width
    if f.often(0.3):
        options["mask"] = f.rand(*f.leading) < 0.7
    if f.leading and f.often(0.2):
        options["shift"] = f.pick.choice((1, 2))
    return Problem("token_log_probs", {"logits": f.logits()}, options=options, wanted=("logits",))


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
    """Finite likelihoods, not the same on both sides, where some losses have a kink."""
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


BUILDERS = {
    function.__name__: function
    for function in (
        softmax,
        topk,
        clipped,
        cross_entropy,
        token,
        stats,
        teacher_topk,
        chunk,
        alm,
        byte,
    )
}
