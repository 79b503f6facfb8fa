"""TRL's distillation losses by fastkd: the functions themselves, and `enable` for its trainers.

Checked with TRL 1.16: GKDTrainer, GOLDTrainer and DistillationTrainer.
"""

import inspect
import math
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastkd._ops.arguments import to_flag, to_number
from fastkd.losses._linear_softmax_divergence import linear_softmax_divergence
from fastkd.losses._softmax_divergence import softmax_divergence

VERSION = "1.16"
_Result = TypeVar("_Result")

#: Arguments of linear_softmax_divergence that have another name in TRL.
_NAMES = {
    **{
        f"{side}_{theirs}": f"{side}_{ours}"
        for side in ("student", "teacher")
        for theirs, ours in (
            ("hidden", "hidden_states"),
            ("weight", "lm_head_weight"),
            ("bias", "lm_head_bias"),
        )
    },
    "mask": "completion_mask",
    "normalizer": "num_items_in_batch",
    "logit_softcap": "final_logit_softcapping",
}


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | Tensor | None = None,
    logits_are_probs: bool = False,
) -> Tensor:
    r"""The loss of TRL's GKDTrainer and GOLDTrainer, argument for argument.

    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q; beta 0 and 1 are the
    forward and the reverse KL. float32 or better, also from 16-bit logits.

    Args:
        student_logits: ``[..., vocab]``, shifted: row t scores ``labels[t]``.
        teacher_logits: the same rows; columns that one side alone has do not count.
        labels: ``[...]``: rows with -100 drop out.
        beta: in [0, 1].
        temperature: of both sides.
        reduction: ``"batchmean"``: the mean over the rows kept, or without labels the sum over
            ``size(0)``; ``"sum"``; ``"mean"``: over rows kept times columns.
        num_items_in_batch: replaces the denominator.
        logits_are_probs: both are probabilities of some tokens, which need not sum to 1 (GOLD's
            matched tokens): plain PyTorch on such small tables.

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type;
            ``reduction="none"``, which gives TRL a value for each column, is not offered.

    >>> import torch
    >>> from fastkd.integrations.trl import generalized_jsd_loss
    >>> student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    >>> round(generalized_jsd_loss(student, teacher).item(), 4)
    0.1109
    """
    _check("generalized_jsd_loss", student_logits=student_logits, teacher_logits=teacher_logits)
    if labels is not None:
        _check("generalized_jsd_loss", labels=labels)
        if labels.shape != student_logits.shape[:-1]:
            raise ValueError(
                "generalized_jsd_loss: labels must be one a row, "
                f"{list(student_logits.shape[:-1])}, got {list(labels.shape)}"
            )
    if reduction not in ("batchmean", "sum", "mean"):
        raise ValueError(
            f"generalized_jsd_loss: reduction must be batchmean, sum or mean, got {reduction!r}"
        )
    if to_flag("generalized_jsd_loss", "logits_are_probs", logits_are_probs):
        if teacher_logits.shape != student_logits.shape:
            raise ValueError(
                "generalized_jsd_loss: teacher_logits must have student_logits' shape "
                f"{list(student_logits.shape)}, got {list(teacher_logits.shape)}"
            )
        beta = to_number("generalized_jsd_loss", "beta", beta)
        if not 0 <= beta <= 1:
            raise ValueError(f"generalized_jsd_loss: beta must lie in [0, 1], got {beta}")
        rows = _of_probs(student_logits, teacher_logits, beta)
        kept = torch.ones_like(rows, dtype=torch.bool) if labels is None else labels != -100
        total = torch.where(kept, rows, 0).sum()
        count = _denominator(student_logits, labels, reduction, num_items_in_batch)
        return total if count is None else total / count
    widths = student_logits.size(-1), teacher_logits.size(-1)
    count = _denominator(student_logits, labels, reduction, num_items_in_batch)
    return _called(
        "generalized_jsd_loss",
        {"normalizer": "num_items_in_batch"},
        softmax_divergence,
        student_logits,
        teacher_logits,
        divergence="jsd",
        beta=beta,
        temperature=temperature,
        vocab_size=min(widths) if widths[0] != widths[1] else None,
        reduction="sum",
        normalizer=count,
        mask=None if labels is None else labels != -100,
    )


def _called(
    function: str, names: dict[str, str], loss: Callable[..., _Result], *args: Any, **options: Any
) -> _Result:
    """The loss; in its errors the names are those of this function and its arguments."""
    if torch.compiler.is_compiling():
        return loss(*args, **options)
    try:
        return loss(*args, **options)
    except (IndexError, NotImplementedError, TypeError, ValueError) as error:
        inner, _, message = str(error).partition(": ")
        if inner != loss.__name__:
            raise
        pattern = rf"\b({'|'.join(names)})\b"
        message = re.sub(pattern, lambda found: names[found[0]], message)
        raise type(error)(f"{function}: {message}") from None


def _check(function: str, **tensors: Any) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{function}: {name} must be a tensor, got {type(value).__name__}")
        if not value.dim():
            raise ValueError(f"{function}: {name} must have a dimension or more, got a 0-d tensor")


def _denominator(
    logits: Tensor, labels: Tensor | None, reduction: str, items: int | Tensor | None
) -> float | Tensor | None:
    if isinstance(items, Tensor) and items.numel() == 1:
        return items.reshape(()).to(logits.device)
    if items is not None:
        count = to_number("generalized_jsd_loss", "num_items_in_batch", items)
        if not count >= 0:
            raise ValueError(
                f"generalized_jsd_loss: num_items_in_batch must not be negative, got {count}"
            )
        return count
    if reduction == "sum":
        return None
    if reduction == "mean":
        columns = logits.size(-1)
        return columns * (
            max(logits[..., 0].numel(), 1)
            if labels is None
            else (labels != -100).sum().clamp(min=1)
        )
    return max(logits.size(0), 1) if labels is None else (labels != -100).sum().clamp(min=1)


def _of_probs(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Sums over columns; probabilities below 1e-8 count as that, as in TRL."""
    log_q, log_p = (x.clamp_min(1e-8).log() for x in (student, teacher))
    if beta == 0:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if beta == 1:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_m = torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))
    terms = beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)
    return terms.sum(-1)


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of TRL's DistillationTrainer, argument for argument: from hidden states.

    Args:
        student_hidden_states: ``[B, K, H]``: row t scores the completion's token t.
        teacher_hidden_states: ``[B, K, H_T]``.
        student_lm_head_weight: ``[V, H]``; a DTensor that FSDP2 shards over one mesh dimension is
            gathered, and its gradient averaged over the ranks.
        teacher_lm_head_weight: ``[V, H_T]``.
        completion_mask: ``[B, K]``, 0 where a row drops out.
        beta: of the JSD; 0 and 1 are the forward and the reverse KL.
        num_items_in_batch: replaces the denominator, the number of rows kept.
        student_lm_head_bias, teacher_lm_head_bias: ``[V]``.
        student_logit_scale, teacher_logit_scale: multiply the logits, with the bias in them.
        student_final_logit_softcapping, teacher_final_logit_softcapping: c of the softcap
            c tanh(z / c) of the scaled logits; None: no softcap.
        temperature: divides the logits of both sides, after scale and softcap.

    Returns:
        the loss; the sum of the student's entropies at that temperature, without a gradient; the
        number of rows kept.

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    >>> import torch
    >>> from fastkd.integrations.trl import chunked_divergence_loss
    >>> head, hidden = torch.eye(3, 2), torch.ones(1, 4, 2)
    >>> mask = torch.tensor([[1, 1, 0, 0]])
    >>> loss, entropy, count = chunked_divergence_loss(hidden, hidden, head, head, mask, 0.5)
    >>> loss.item(), round(entropy.item(), 4), count.item()
    (0.0, 2.0347, 2)
    """
    _check(
        "chunked_divergence_loss",
        student_hidden_states=student_hidden_states,
        teacher_hidden_states=teacher_hidden_states,
        student_lm_head_weight=student_lm_head_weight,
        teacher_lm_head_weight=teacher_lm_head_weight,
        completion_mask=completion_mask,
    )
    kept = completion_mask != 0
    biases, scales = [], []
    softcaps = student_final_logit_softcapping, teacher_final_logit_softcapping
    for side, bias, scale, hidden, softcap in (
        ("student", student_lm_head_bias, student_logit_scale, student_hidden_states, softcaps[0]),
        ("teacher", teacher_lm_head_bias, teacher_logit_scale, teacher_hidden_states, softcaps[1]),
    ):
        if softcap is not None:
            to_number("chunked_divergence_loss", f"{side}_final_logit_softcapping", softcap)
        if bias is not None:
            _check("chunked_divergence_loss", **{f"{side}_lm_head_bias": bias})
        number = to_number("chunked_divergence_loss", f"{side}_logit_scale", scale)
        biases.append(None if bias is None else number * _gathered(bias, hidden.dtype))
        scales.append(number)
    loss, stats = _called(
        "chunked_divergence_loss",
        _NAMES,
        linear_softmax_divergence,
        student_hidden_states,
        _gathered(student_lm_head_weight, student_hidden_states.dtype),
        teacher_hidden_states,
        _gathered(teacher_lm_head_weight, teacher_hidden_states.dtype),
        student_bias=biases[0],
        teacher_bias=biases[1],
        logit_scale=tuple(scales),
        logit_softcap=softcaps,
        return_stats=True,
        divergence="jsd",
        beta=beta,
        temperature=temperature,
        mask=kept,
        reduction="mean",
        normalizer=num_items_in_batch,
    )
    entropy = torch.where(kept, stats.student_entropy, 0).sum()
    return loss, entropy, kept.sum()


def _gathered(x: Any, dtype: torch.dtype) -> Any:
    """A whole tensor; what FSDP shards gets the mean of the ranks' gradients.

    DTensor.full_tensor() alone takes each rank's gradient for the whole one.
    """
    if x is None or not hasattr(x, "full_tensor"):
        return x
    from torch.distributed.tensor import Partial

    if x.device_mesh.ndim != 1:
        raise ValueError(
            "chunked_divergence_loss: a DTensor must be sharded over a mesh of one dimension, got "
            f"{x.device_mesh.ndim}; call the loss through the head (call_through) instead"
        )
    return x.full_tensor(grad_placements=[Partial("avg")]).to(dtype)


def _gkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    return generalized_jsd_loss(
        student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch
    )


def _gold_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    logits_are_probs: bool = False,
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    return generalized_jsd_loss(
        student_logits,
        teacher_logits,
        labels,
        beta,
        temperature,
        reduction,
        num_items_in_batch,
        logits_are_probs,
    )


class Enabled:
    """What `enable` did. Call it, or leave its ``with`` block, to undo that."""

    def __init__(self, replaced: list[tuple[Any, str, Any]]) -> None:
        self._replaced = replaced

    def __call__(self) -> None:
        """Put back what was there; a second call does nothing."""
        while self._replaced:
            owner, name, old = self._replaced.pop()
            setattr(owner, name, old)

    def __enter__(self) -> "Enabled":
        """Nothing to do: it is enabled."""
        return self

    def __exit__(self, *error: object) -> None:
        """Undo."""
        self()


def enable(*trainers: type) -> Enabled:
    """Let TRL's trainers use these losses, until undone.

    ::

        from trl.experimental.gkd import GKDTrainer

        with fastkd.integrations.trl.enable(GKDTrainer):
            trainer.train()

    Args:
        trainers: GKDTrainer, GOLDTrainer, DistillationTrainer or subclasses. What is replaced is
            the static method ``generalized_jsd_loss``, or ``_chunked_divergence_loss`` of the
            module of the trainer; all or none.

    Returns:
        a context manager; calling it undoes the change, too.

    Raises:
        TypeError: a class has neither, or with another signature than TRL 1.16's: then the class
            is left as it is.
    """
    if not trainers:
        raise TypeError("enable: trainers must be one class of TRL or more, got none")
    found = [_seam(trainer) for trainer in trainers]
    done = Enabled([])
    for owner, name, new, static in found:
        old = owner.__dict__[name]
        done._replaced.append((owner, name, old))
        setattr(owner, name, staticmethod(new) if static else new)
    return done


def _seam(trainer: type) -> tuple[Any, str, Callable[..., Any], bool]:
    if not isinstance(trainer, type):
        raise TypeError(f"enable: a trainer must be a class, got {type(trainer).__name__}")
    for kind in trainer.__mro__:
        if "generalized_jsd_loss" in kind.__dict__:
            theirs = kind.generalized_jsd_loss  # type: ignore[attr-defined]
            for new in (_gkd_loss, _gold_loss):
                if _parameters(theirs) == _parameters(new):
                    return kind, "generalized_jsd_loss", new, True
            raise _unknown(f"{kind.__name__}.generalized_jsd_loss", theirs)
        module = sys.modules.get(kind.__module__)
        theirs = getattr(module, "_chunked_divergence_loss", None)
        if callable(theirs):
            if _parameters(theirs) != _parameters(chunked_divergence_loss):
                raise _unknown(f"{kind.__module__}._chunked_divergence_loss", theirs)
            return module, "_chunked_divergence_loss", chunked_divergence_loss, False
    raise TypeError(
        f"enable: {trainer.__name__} must have generalized_jsd_loss, or its module "
        "_chunked_divergence_loss, as GKDTrainer, GOLDTrainer and DistillationTrainer do"
    )


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found]


def _unknown(name: str, theirs: Callable[..., Any]) -> TypeError:
    return TypeError(
        f"enable: {name} must have the signature of TRL {VERSION}, got {inspect.signature(theirs)}"
    )
