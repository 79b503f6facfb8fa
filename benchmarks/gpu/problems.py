"""Every op with a call of it at any size: what the report's stages check, time and profile."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import fastkd
from benchmarks.byte_level import Texts, vocabulary
from benchmarks.shapes import DIVERGENCES, divergence_options

LOWER, UPPER = 1e-6, 0.5
#: x, learners, hidden units and outputs of acm's problem.
WIDTH, LEARNERS, HIDDEN = 256, 3, 64

Make = Callable[[int, int, torch.dtype, torch.device], list[Tensor]]


@dataclass(frozen=True)
class Problem:
    """An op with options.

    `call(module, tensors)` calls it; the module is `fastkd` or `fastkd.reference`, the tensors are
    those of `make`, or the same in float64. `read(tensors, outputs)` makes of the outputs
    floating-point tensors that can be compared.
    """

    name: str
    op: str
    make: Make
    call: Callable[[Any, Sequence[Tensor]], Sequence[Tensor]]
    #: So many of the tensors, the first, take gradients.
    leaves: int
    #: Logits tensors that a step with a gradient of the first tensor must read and write.
    reads: int = 2
    writes: int = 1
    #: Whether the second tensor may have another dtype than the first.
    mixes: bool = False
    #: Whether there is a vocabulary, on which the launch depends.
    rows: bool = True
    most_vocab: int = 1 << 40
    divergence: str = ""
    read: Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]] = lambda _, found: [*found]


def logits(
    rows: int, vocab: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Tensor:
    """Random logits whose softmax has a few hundred tokens that matter."""
    random = torch.Generator(device).manual_seed(seed)
    return torch.randn(rows, vocab, device=device, generator=random).mul_(3).to(dtype)


def labels(rows: int, vocab: int, device: torch.device) -> Tensor:
    """A label a row."""
    return 7919 * torch.arange(rows, device=device) % vocab


def pair(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Student and teacher."""
    return [logits(rows, vocab, dtype, device, seed) for seed in (0, 1)]


def pair_and_labels(
    rows: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Student, teacher and labels."""
    return [*pair(rows, vocab, dtype, device), labels(rows, vocab, device)]


def one_and_labels(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """A student and labels."""
    return [logits(rows, vocab, dtype, device), labels(rows, vocab, device)]


def all_by_row(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Student, teacher, labels, mask and weight."""
    row = torch.arange(rows, device=device)
    return [*pair_and_labels(rows, vocab, dtype, device), row % 4 != 1, 1.0 + row % 3]


def three(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """A student and two teachers."""
    return [logits(rows, vocab, dtype, device, seed) for seed in (0, 1, 2)]


def one(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """A student, or a teacher."""
    return [logits(rows, vocab, dtype, device)]


def stored(k: int, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """A student, and a teacher's best k."""
    student, teacher = pair(rows, vocab, dtype, device)
    log_probs, indices = fastkd.reference.teacher_topk(teacher, min(k, vocab))
    return [student, log_probs.float(), indices.int()]


def probabilities(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Log-probabilities and probabilities, none of which is 0 in float16."""
    student, teacher = pair(rows, vocab, torch.float32, device)
    return [student.log_softmax(-1).to(dtype), teacher.softmax(-1).clamp(min=1e-4).to(dtype)]


def learners(
    factor: int, rows: int, _: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """x, w1, b1, w2 and choices of acm."""
    random = torch.Generator(device).manual_seed(0)
    shapes = ((rows * factor, WIDTH), (LEARNERS, WIDTH, HIDDEN), (LEARNERS, HIDDEN))
    shapes += ((LEARNERS, HIDDEN, WIDTH),)
    found = [torch.randn(shape, device=device, generator=random) for shape in shapes]
    found = [x / (x.size(-2) ** 0.5 if x.dim() == 3 else 1) for x in found]
    choices = torch.randint(0, LEARNERS + 1, (rows * factor,), device=device, generator=random)
    return [*(x.to(dtype) for x in found), choices]


def _divergence(name: str, module: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    options = divergence_options(name, tensors[0])
    return [module.softmax_divergence(*tensors, **options, reduction="none")]


def _labelled(softcap: float | None, module: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    student, teacher, labels, mask, weight = tensors
    options = {"temperature": 2.0, "teacher_temperature": 0.7, "logit_softcap": softcap}
    options |= {"labels": labels, "label_weight": 0.3, "mask": mask, "weight": weight}
    return [module.softmax_divergence(student, teacher, divergence="jsd", **options)]


def _teachers(module: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    student, *teachers = tensors
    return [module.softmax_divergence(student, teachers, teacher_mix="probs", reduction="none")]


def _topk(module: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [module.topk_divergence(*tensors, reduction="none")]


def _clipped(options: dict[str, Any], module: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    found = module.clipped_divergence(*tensors, LOWER, UPPER, **options, reduction="none")
    return [found]


def _cross_entropy(options: dict[str, Any], module: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [module.cross_entropy(*tensors, **options, reduction="none")]


def _tokens(entropy: bool, module: Any, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    found = module.token_log_probs(*tensors, entropy=entropy)
    return found if entropy else [found]


def _stats(module: Any, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    *logits, labels = tensors
    return module.token_stats(*logits, labels=labels)


def _stats_read(tensors: Sequence[Tensor], found: Sequence[Tensor]) -> list[Tensor]:
    sides = {"student": tensors[0], "teacher": tensors[1]}
    named = zip(fastkd.TokenStats._fields, found, strict=True)
    # Of several largest logits, any.
    return [
        value if value.is_floating_point() else _at(sides[name.partition("_")[0]], value)
        for name, value in named
        if value is not None
    ]


def _at(logits: Tensor, column: Tensor) -> Tensor:
    return logits.gather(-1, column.long().unsqueeze(-1)).squeeze(-1)


def _best(k: int, module: Any, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return module.teacher_topk(tensors[0], min(k, tensors[0].size(-1)))


def _best_read(tensors: Sequence[Tensor], found: Sequence[Tensor]) -> list[Tensor]:
    return [found[0], tensors[0].gather(-1, found[1].long())]


@lru_cache(maxsize=8)
def _texts(rows: int, vocab: int) -> Texts:
    return Texts(rows, vocab)


def _chunks(module: Any, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    texts = _texts(*tensors[0].shape)
    *arguments, boundary = texts.of(tensors[0])
    return module.chunk_log_likelihood(
        texts.cut(tensors[0]), *arguments, texts.num_chunks, boundary=boundary
    )


def _alm(module: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    texts = _texts(*tensors[0].shape)
    ids, chunks, boundary = texts.of(tensors[0])
    student, teacher = (texts.cut(x) for x in tensors)
    sides = (student, ids, chunks, teacher, ids, chunks, texts.num_chunks)
    both = {"student_boundary": boundary, "teacher_boundary": boundary}
    return [module.alm_loss(*sides, **both, reduction="sum")]


def _bytes(module: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [module.byte_log_probs(tensors[0], vocabulary(tensors[0].size(-1)))]


def _kl_div(module: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [module.kl_div(*tensors, reduction="batchmean")]


def _acm(module: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [module.acm.hard(*tensors)]


def _problems() -> list[Problem]:
    both = {"leaves": 2, "mixes": True}
    stats = {"leaves": 0, "writes": 0, "read": _stats_read}
    found = [
        Problem(
            f"softmax_divergence {name}",
            *("softmax_divergence", pair, partial(_divergence, name)),
            **both,
            divergence=name,
        )
        for name in DIVERGENCES
    ]
    found += [
        Problem(
            f"softmax_divergence {name}",
            *("softmax_divergence", all_by_row, partial(_labelled, softcap)),
            **both,
            divergence="jsd",
        )
        for name, softcap in (("labels", None), ("softcap", 20.0))
    ]
    found += [
        Problem("softmax_divergence teachers", "softmax_divergence", three, _teachers, 1, reads=3),
    ]
    found += [
        Problem(f"topk_divergence k={k}", "topk_divergence", partial(stored, k), _topk, 1, reads=1)
        for k in (64, 512)
    ]
    clipped = {"fixed": {"tail": "lump"}, "quantile": {"quantile": True, "softness": 0.05}}
    found += [
        Problem(
            f"clipped_divergence {name}",
            *("clipped_divergence", pair, partial(_clipped, options)),
            **both,
        )
        for name, options in clipped.items()
    ]
    found += [
        Problem("token_stats pair", "token_stats", pair_and_labels, _stats, mixes=True, **stats),
        Problem("token_stats one", "token_stats", one_and_labels, _stats, reads=1, **stats),
    ]
    terms = {
        "": {},
        " entropy": {"entropy_weight": 0.5, "entropy_mask": "correct"},
        " apart": {"entropy_weight": 0.5, "entropy_temperature": 2.0, "label_smoothing": 0.1},
    }
    found += [
        Problem(
            f"cross_entropy{name}",
            *("cross_entropy", one_and_labels, partial(_cross_entropy, options), 1),
            reads=1,
        )
        for name, options in terms.items()
    ]
    # The logits are read again for the gradient.
    found += [
        Problem(name, "token_log_probs", one_and_labels, partial(_tokens, entropy), 1)
        for name, entropy in (("token_log_probs", False), ("token_log_probs entropy", True))
    ]
    found += [
        Problem(
            f"teacher_topk k={k}",
            *("teacher_topk", one, partial(_best, k), 0),
            reads=1,
            writes=0,
            read=_best_read,
        )
        for k in (64, 512)
    ]
    # The student's logits are read again for the gradient.
    texts = {"most_vocab": 300_000}
    found += [
        Problem(
            "chunk_log_likelihood",
            *("chunk_log_likelihood", one, _chunks, 1),
            read=lambda _, found: [*found[:2]],
            **texts,
        ),
        Problem("byte_log_probs", "byte_log_probs", one, _bytes, 1, **texts),
        Problem("alm_loss", "alm_loss", pair, _alm, 1, reads=3, **texts),
        Problem("kl_div", "kl_div", probabilities, _kl_div, 2),
    ]
    for rows in (1, 64):
        tensors = partial(learners, rows)
        found.append(Problem(f"acm {rows} x", "acm", tensors, _acm, 4, rows=False))
    return found


PROBLEMS = {problem.name: problem for problem in _problems()}
