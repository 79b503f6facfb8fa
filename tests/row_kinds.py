"""A random problem of every kind of call to an op over rows: `KINDS`, by name."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cases import DIVERGENCES, NEED_LABELS, betas
from row_problems import BITS, Problem
from torch import Tensor

import fastkd


@dataclass
class Draw:
    """Random numbers of one problem. Logits are multiples of `grid`, and shifting them is exact."""

    seed: int
    dtype: torch.dtype
    rows: int
    vocab: int
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    grid: float = 2.0**-10
    spread: float = 3.0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def choice(self, values: Any) -> Any:
        return values[int(self.integers(0, len(values)))]

    def logits(self, *shape: int) -> Tensor:
        shape = shape or (self.rows, self.vocab)
        normal = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        steps = (normal * self.spread / self.grid).round()
        most = 2 ** (BITS[self.dtype] - 2) if BITS[self.dtype] < 50 else 2**22
        return (steps.clamp(-most, most) * self.grid).to(self.dtype)

    def temperatures(self) -> dict[str, float]:
        return {"temperature": self.temperature, "teacher_temperature": self.teacher_temperature}

    def labels(self) -> Tensor:
        return self.integers(0, self.vocab, self.rows)


def softmax_problem(draw: Draw, divergence: str, teachers: int = 1, **options: Any) -> Problem:
    student = draw.logits()
    teacher: Any = [draw.logits() for _ in range(teachers)]
    if teachers == 1:
        (teacher,) = teacher
    labels = {"labels": draw.labels()} if options.pop("labelled", False) else {}
    # Not 0 and 1, where a row is of another divergence: those are kinds of their own.
    beta = draw.choice([0.1, 0.5, 0.9, 0.1 + 0.8 * betas((draw.rows,), draw.generator)])
    wanted = ("student_logits",)
    if teachers == 1 and draw.choice([True, False]):
        wanted = ("student_logits", "teacher_logits")
    return Problem(
        "softmax_divergence",
        {"student_logits": student, "teacher_logits": teacher},
        labels,
        options={
            "divergence": divergence,
            "beta": beta,
            "reduction": "none",
            **draw.temperatures(),
            **options,
        },
        wanted=wanted,
    )


def topk_problem(draw: Draw, divergence: str, tail: str, **options: Any) -> Problem:
    k = min(5, draw.vocab - 1)
    log_probs = (draw.logits().double() / draw.teacher_temperature).log_softmax(-1)
    values, indices = log_probs.topk(k, -1)
    # A rest that is not within the rounding of a sum of probabilities: its logarithm counts.
    values = values - math.log(1.25)
    order = torch.randperm(k, generator=draw.generator)
    columns = {"teacher_indices": indices[:, order].int()}
    if options.pop("labelled", False):
        columns["labels"] = draw.labels()
    stored = torch.float64 if draw.dtype == torch.float64 else torch.float32
    return Problem(
        "topk_divergence",
        {"student_logits": draw.logits()},
        columns,
        options={
            "teacher_log_probs": values[:, order].to(stored),
            "divergence": divergence,
            "tail": tail,
            "stored_temperature": draw.teacher_temperature,
            "reduction": "none",
            **draw.temperatures(),
            **options,
        },
        wanted=("student_logits", "teacher_log_probs"),
    )


def clipped_problem(draw: Draw, renormalize: str, tail: str, **options: Any) -> Problem:
    lower = (draw.rand(draw.rows) / (2 * draw.vocab)).clamp(max=0.1)
    upper = draw.rand(draw.rows) * 0.5 + 0.1
    if options.get("quantile"):
        lower, upper = 0.3 * draw.rand(draw.rows), 0.6 + 0.4 * draw.rand(draw.rows)
    labels = {"labels": draw.labels()} if options.pop("labelled", False) else {}
    soft = ("lower", "upper") if "softness" in options else ()
    student, teacher = draw.logits(), draw.logits()
    # The definition takes masses, not their logarithms: they must not underflow in float64.
    temperatures = {
        name: max(value, (x.max() - x.min()).item() / 600)
        for (name, value), x in zip(draw.temperatures().items(), (student, teacher), strict=True)
    }
    bound = torch.float64 if draw.dtype == torch.float64 else torch.float32
    return Problem(
        "clipped_divergence",
        {"student_logits": student, "teacher_logits": teacher},
        labels,
        options={
            "lower": lower.to(bound),
            "upper": upper.to(bound),
            "renormalize": renormalize,
            "tail": tail,
            "reduction": "none",
            **temperatures,
            **options,
        },
        wanted=("student_logits", "teacher_logits", *soft),
    )


def cross_entropy_problem(draw: Draw, **options: Any) -> Problem:
    options = {"reduction": "none", "temperature": draw.temperature, **options}
    columns = {"labels": draw.labels()}
    return Problem(
        "cross_entropy", {"logits": draw.logits()}, columns, options=options, wanted=("logits",)
    )


def stats_problem(draw: Draw, both: bool = True) -> Problem:
    logits = {"student_logits": draw.logits()}
    if both:
        logits["teacher_logits"] = draw.logits()
    return Problem(
        "token_stats", logits, {"labels": draw.labels()}, options={"temperature": draw.temperature}
    )


def token_problem(draw: Draw, entropy: bool = True) -> Problem:
    options = {"temperature": draw.temperature, "entropy": entropy}
    columns = {"token_ids": draw.labels()}
    return Problem(
        "token_log_probs", {"logits": draw.logits()}, columns, options=options, wanted=("logits",)
    )


def teacher_topk_problem(draw: Draw) -> Problem:
    options = {"k": min(9, draw.vocab), "temperature": draw.temperature}
    return Problem("teacher_topk", {"teacher_logits": draw.logits()}, options=options)


def _chunks(draw: Draw) -> Tensor:
    """One text: pairs of tokens, some in no chunk, the last one of one token."""
    chunks = torch.arange(draw.rows) // 2
    return torch.where(chunks % 3 == 2, -1, chunks).unsqueeze(0)


def chunk_problem(draw: Draw, boundary: bool = True) -> Problem:
    ids = draw.integers(0, draw.vocab, 1, draw.rows)
    sets = {"boundary": draw.rand(draw.vocab) < 0.4} if boundary else {}
    options = {
        "chunk_ids": _chunks(draw),
        "num_chunks": draw.rows,
        "temperature": draw.temperature,
    }
    logits = {"logits": draw.logits(1, draw.rows, draw.vocab)}
    return Problem("chunk_log_likelihood", logits, {"token_ids": ids}, sets, options, ("logits",))


def alm_problem(draw: Draw, divergence: str) -> Problem:
    logits, columns, sets, options = {}, {}, {}, {}
    for side in ("student", "teacher"):
        logits[f"{side}_logits"] = draw.logits(1, draw.rows, draw.vocab)
        columns[f"{side}_ids"] = draw.integers(0, draw.vocab, 1, draw.rows)
        sets[f"{side}_boundary"] = draw.rand(draw.vocab) < 0.4
        options[f"{side}_chunks"] = _chunks(draw)
    options |= {
        "num_chunks": draw.rows,
        "divergence": divergence,
        "temperature": 30.0,
        "reduction": "none",
    }
    wanted = ("student_logits", "teacher_logits")
    return Problem("alm_loss", logits, columns, sets, options, wanted)


def byte_vocab(draw: Draw) -> fastkd.ByteVocab:
    """Tokens of few letters, which share prefixes; the first id and the last stand for no bytes."""
    letters = draw.integers(0, 4, draw.vocab, 4).tolist()
    lengths = draw.integers(1, 5, draw.vocab).tolist()
    tokens: list[bytes | None] = [
        bytes(b"ab \xff"[i] for i in row[:n]) for row, n in zip(letters, lengths, strict=True)
    ]
    tokens[0] = tokens[-1] = None
    return fastkd.ByteVocab(tokens, special={"eos": [0]})


def byte_problem(draw: Draw, prefix: bytes = b"", valid: bool = False) -> Problem:
    sets = {}
    if valid:
        sets["valid"] = draw.rand(draw.rows, draw.vocab) < 0.7
    options = {"vocab": byte_vocab(draw), "prefix": prefix}
    return Problem("byte_log_probs", {"logits": draw.logits()}, {}, sets, options, ("logits",))


TAILS = ("lump", "uniform", "renormalize", "drop")
ALM_DIVERGENCES = (
    *("binary_ce", "reverse_binary_kl", "binary_kl_limit", "abs"),
    *("abs_exp", "renyi", "k2", "k3"),
)


def _kinds() -> dict[str, Callable[[Draw], Problem]]:
    kinds: dict[str, Callable[[Draw], Problem]] = {}
    for d in DIVERGENCES:
        kinds[f"softmax-{d}"] = lambda draw, d=d: softmax_problem(draw, d)
        kinds[f"softmax-{d}-labels"] = lambda draw, d=d: softmax_problem(
            draw, d, labelled=True, label_weight=0.3
        )
    for d in NEED_LABELS:
        for weight in (0.0, 0.3):
            kinds[f"softmax-{d}-{weight}"] = lambda draw, d=d, weight=weight: softmax_problem(
                draw, d, labelled=True, label_weight=weight
            )
    for d in ("forward_kl", "jsd"):
        for mix in ("logits", "probs"):
            kinds[f"softmax-{d}-teachers-{mix}"] = lambda draw, d=d, mix=mix: softmax_problem(
                draw, d, 2, teacher_mix=mix, teacher_weights=[0.25, 0.75]
            )
    for tail in TAILS:
        for d in ("forward_kl", "reverse_kl", "jsd", "cross_entropy"):
            kinds[f"topk-{d}-{tail}"] = lambda draw, d=d, t=tail: topk_problem(draw, d, t)
        kinds[f"topk-{tail}-labels"] = lambda draw, t=tail: topk_problem(
            draw, "forward_kl", t, labelled=True, label_weight=0.3
        )
    for renormalize in ("none", "teacher", "both"):
        for tail in ("drop", "lump"):
            for name, options in (
                ("hard", {}),
                ("soft", {"softness": 0.02}),
                ("quantile", {"quantile": True}),
                ("labels", {"labelled": True, "label_weight": 0.3}),
            ):
                kinds[f"clipped-{renormalize}-{tail}-{name}"] = (
                    lambda draw, r=renormalize, t=tail, o=options: clipped_problem(draw, r, t, **o)
                )
    kinds["cross_entropy"] = cross_entropy_problem
    kinds["cross_entropy-entropy"] = lambda draw: cross_entropy_problem(
        draw,
        entropy_weight=0.5,
        entropy_mask=draw.choice([None, "correct"]),
        entropy_temperature=draw.choice([draw.temperature, draw.teacher_temperature]),
    )
    kinds["token_stats"] = stats_problem
    kinds["token_stats-student"] = lambda draw: stats_problem(draw, both=False)
    kinds["token_log_probs"] = lambda draw: token_problem(draw, entropy=False)
    kinds["token_log_probs-entropy"] = token_problem
    kinds["teacher_topk"] = teacher_topk_problem
    kinds["chunk"] = lambda draw: chunk_problem(draw, boundary=False)
    kinds["chunk-boundary"] = chunk_problem
    kinds["byte"] = byte_problem
    kinds["byte-prefix"] = lambda draw: byte_problem(draw, b"a")
    kinds["byte-valid"] = lambda draw: byte_problem(draw, valid=True)
    for d in ALM_DIVERGENCES:
        kinds[f"alm-{d}"] = lambda draw, d=d: alm_problem(draw, d)
    return kinds


KINDS = _kinds()
# What depends on how many columns there are, masked or not: a rest spread over them, quantiles.
COUNTS_COLUMNS = tuple(k for k in KINDS if "uniform" in k or "quantile" in k)
