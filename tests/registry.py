"""Every op over rows of logits with a call of it, for the tests of what all of them promise."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import ROW_NUMBERS, betas, label_weights, logits

import fastkd

VOCAB = 12
BYTES = fastkd.ByteVocab([bytes([65 + i]) for i in range(VOCAB)])
BOUNDARY = torch.arange(VOCAB) % 3 == 0


@dataclass(frozen=True)
class Entry:
    """An op: `call(student, **tensors)` returns a tensor that depends on every logit."""

    name: str
    call: Callable[..., torch.Tensor]
    #: From the leading sizes, the tensors beside the student's logits, by argument.
    tensors: Callable[[tuple[int, ...]], dict[str, torch.Tensor]]
    #: Numbers that a schedule may change, with two values of each.
    numbers: dict[str, tuple[float, float]] = field(default_factory=dict)
    differentiable: bool = True


def _rows(leading: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {
        "labels": torch.randint(0, VOCAB, leading),
        "mask": torch.rand(leading) < 0.9,
        "weight": torch.rand(leading) + 0.5,
    }


def _numbers(leading: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {"beta": betas(leading), "label_weight": label_weights(leading)}


def _teacher(leading: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {"teacher_logits": logits((*leading, VOCAB)), **_rows(leading)}


def _topk(leading: tuple[int, ...]) -> dict[str, torch.Tensor]:
    best = fastkd.teacher_topk(logits((*leading, VOCAB)), 3)
    return {
        "teacher_log_probs": best.log_probs,
        "teacher_indices": best.indices,
        **_rows(leading),
    }


def _bounds(leading: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {
        **_teacher(leading),
        "lower": torch.rand(leading) * 0.05,
        "upper": torch.rand(leading) * 0.2 + 0.5,
    }


def _chunks(leading: tuple[int, ...]) -> dict[str, torch.Tensor]:
    length = leading[-1]
    ids = (torch.arange(length) // 2).expand(leading).contiguous()
    return {
        "token_ids": torch.randint(0, VOCAB, leading),
        "chunk_ids": ids,
        "boundary": BOUNDARY.clone(),
    }


def _chunk_sum(student: torch.Tensor, **given: Any) -> torch.Tensor:
    found = fastkd.chunk_log_likelihood(student, num_chunks=student.size(-2), **given)
    return found.log_likelihood.sum() + 0.5 * found.boundary_log_prob.sum()


def _alm(student: torch.Tensor, **given: Any) -> torch.Tensor:
    ids, chunks = given.pop("token_ids"), given.pop("chunk_ids")
    teacher = given.pop("teacher_logits")
    sides = (student, ids, chunks, teacher, ids, chunks)
    return fastkd.alm_loss(*sides, student.size(-2), **{"temperature": 2.0, **given})


def _token_sum(student: torch.Tensor, **given: Any) -> torch.Tensor:
    found = fastkd.token_log_probs(student, entropy=True, **given)
    return found.log_probs.sum() + 0.5 * found.entropy.sum()


LOSSES = [
    Entry(
        "cross_entropy",
        lambda student, **given: fastkd.cross_entropy(
            student, given.pop("labels"), **{"entropy_weight": 0.5, **given}
        ),
        _rows,
        {
            **{k: v for k, v in ROW_NUMBERS.items() if k != "label_weight"},
            "label_smoothing": (0.1, 0.2),
            "entropy_weight": (0.4, 0.6),
            "entropy_temperature": (1.3, 1.9),
            "z_loss_weight": (1e-3, 1e-2),
        },
    ),
    Entry(
        "softmax_divergence",
        lambda student, **given: fastkd.softmax_divergence(student, divergence="jsd", **given),
        _teacher,
        {**ROW_NUMBERS, "beta": (0.3, 0.6), "teacher_temperature": (1.2, 2.2)},
    ),
    Entry(
        "topk_divergence",
        fastkd.topk_divergence,
        _topk,
        {
            **ROW_NUMBERS,
            "stored_temperature": (1.2, 0.8),
            "min_log_prob": (-9.0, -7.0),
            "max_token_loss": (5.0, 8.0),
            "beta": (0.2, 0.4),
        },
    ),
    Entry(
        "softmax_divergence",
        lambda student, **given: fastkd.softmax_divergence(student, divergence="jsd", **given),
        lambda leading: {**_teacher(leading), **_numbers(leading)},
    ),
    Entry(
        "topk_divergence",
        lambda student, **given: fastkd.topk_divergence(student, divergence="jsd", **given),
        lambda leading: {**_topk(leading), **_numbers(leading)},
    ),
    Entry(
        "softmax_divergence",
        lambda student, **given: fastkd.softmax_divergence(
            student, divergence="alpha_beta", **given
        ),
        _teacher,
        {"alpha": (0.2, 0.4), "beta": (0.7, 0.3)},
    ),
    Entry(
        "clipped_divergence",
        lambda student, **given: fastkd.clipped_divergence(
            student,
            given.pop("teacher_logits"),
            given.pop("lower"),
            given.pop("upper"),
            **{"softness": 0.1, **given},
        ),
        _bounds,
        {**ROW_NUMBERS, "softness": (0.1, 0.2)},
    ),
]
OPS = [
    *LOSSES,
    Entry(
        "token_log_probs",
        _token_sum,
        lambda leading: {
            "token_ids": torch.randint(0, VOCAB, leading),
            "mask": torch.rand(leading) < 0.9,
        },
        {"temperature": (1.5, 2.5), "logit_softcap": (3.0, 5.0)},
    ),
    Entry(
        "token_log_probs",
        lambda student, **given: fastkd.token_log_probs(student, **given).sum(),
        lambda leading: {
            "token_ids": torch.randint(0, VOCAB, leading),
            "temperature": torch.rand(leading) + 0.5,
        },
    ),
    Entry("chunk_log_likelihood", _chunk_sum, _chunks, {"temperature": (1.5, 2.5)}),
    Entry(
        "byte_log_probs",
        lambda student, **given: fastkd.byte_log_probs(student, BYTES)[..., 65:77].square().sum(),
        lambda leading: {},
    ),
    Entry(
        "alm_loss",
        _alm,
        lambda leading: {
            **{k: v for k, v in _chunks(leading).items() if k != "boundary"},
            "teacher_logits": logits((*leading, VOCAB)),
        },
        {"epsilon": (1e-6, 1e-5), "normalizer": (3.0, 7.0), "temperature": (2.0, 3.0)},
    ),
    Entry(
        "kl_div",
        lambda student, **given: fastkd.kl_div(
            student.log_softmax(-1), given["target"], reduction="batchmean"
        ),
        lambda leading: {"target": logits((*leading, VOCAB)).softmax(-1)},
    ),
]
PLAIN = [
    Entry(
        "token_stats",
        lambda student, **given: fastkd.token_stats(student, **given).reverse_kl,
        lambda leading: {
            "teacher_logits": logits((*leading, VOCAB)),
            "labels": torch.randint(0, VOCAB, leading),
        },
        {"temperature": (1.5, 2.5)},
        differentiable=False,
    ),
    Entry(
        "teacher_topk",
        lambda student, **given: fastkd.teacher_topk(student, 3, **given).log_probs,
        lambda leading: {},
        {"temperature": (1.5, 2.5)},
        differentiable=False,
    ),
]
EVERY = [*OPS, *PLAIN]
