"""Divergences from mixtures of both models, or of both directions, and logit differences."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd._ops.arguments import check_no_gradient, to_integer, to_number
from fastkd._ops.checks import check_finite, check_positive, check_tensors
from fastkd._ops.names import Reduction, TextReduction
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.losses._token_stats import token_stats
from fastkd.recipes._chunks import check_mask, check_tuple, reduced, wide
from fastkd.recipes._rows import (
    check_choice,
    check_row_values,
    check_rows,
    check_share,
    check_width,
    kept_rows,
    log_probs_at,
    number_type,
    row_divergence,
    scaled_weight,
)
from fastkd.teachers._teacher_topk import teacher_topk


def distillm(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: str = "skew_kl",
    beta: float | Tensor = 0.1,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Skewed KL divergences (DistiLLM). A term.

    ``"skew_kl"``: :math:`KL(p \| \beta p + (1-\beta) q)`; ``"skew_reverse_kl"``:
    :math:`KL(q \| \beta q + (1-\beta) p)`, whose gradient flows through the mixture too.

    Args:
        student_logits: ``[..., vocab]``. Row t scores the token that follows it.
        teacher_logits: the same shape.
        kind: see above.
        beta: share of the first side in the mixture, a number or one a row.
        temperature: of both sides.
        mask, weight, vocab_size: see :func:`fastkd.softmax_divergence`.
        reduction: as there, or ``"sequence_mean"``: over a text's rows, then over texts.
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Source: Ko et al. 2024 (arXiv 2402.03898) and its code (jongwooko/distillm).

    >>> import torch, fastkd
    >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    >>> round(fastkd.recipes.distillm(student, teacher).item(), 4)
    0.3071
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_rows("distillm", tensors, mask=mask, weight=weight)
    check_choice("distillm", "kind", kind, ("skew_kl", "skew_reverse_kl"))
    return row_divergence(
        "distillm",
        student_logits,
        teacher_logits,
        divergence=kind,
        beta=beta,
        temperature=temperature,
        vocab_size=vocab_size,
        mask=mask,
        weight=weight,
        reduction=reduction,
        normalizer=normalizer,
    )


class Pair(NamedTuple):
    """Both models' logits of the same texts, for :func:`distillm2`."""

    #: ``[B, T, vocab]``: row t scores the token that follows it.
    student_logits: Tensor
    #: The same shape; gets no gradient.
    teacher_logits: Tensor
    #: bool ``[B, T]``: rows with False are not read.
    mask: Tensor | None = None


def distillm2(
    chosen: Pair,
    rejected: Pair,
    *,
    alphas: tuple[float | Tensor, float | Tensor] = (0.1, 0.1),
    beta: float = 1.0,
    temperature: float | Tensor = 1.0,
    reduction: TextReduction = "sequence_mean",
) -> Tensor:
    r"""Skewed KL on the teacher's texts, skewed reverse KL on the student's (DistiLLM-2). A term.

    :math:`(2 - \beta) KL(p \| \alpha_1 p + (1-\alpha_1) q)` over ``chosen`` plus :math:`\beta KL(q
    \| \alpha_2 q + (1-\alpha_2) p)` over ``rejected``. The mixture of the second is a constant.

    Args:
        chosen: logits of the teacher's texts.
        rejected: logits of the student's texts; their number may differ.
        alphas: shares of the mixtures, each a number or float ``[B]``, one a text, as
            :func:`distillm2_alphas` gives them.
        beta: in [0, 2]; the authors let it grow from 1 to 1.5 (recalled, not verified).
        temperature: of both sides.
        reduction: of each part: ``"sequence_mean"`` (over a text's rows, then over texts),
            ``"mean"`` or ``"sum"``.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Source: Ko et al. 2025 (arXiv 2503.07067) and its code (jongwooko/distillm-2).

    >>> import torch, fastkd
    >>> student, teacher = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.9, 0.1]]]).log()
    >>> texts = fastkd.recipes.Pair(student, teacher)
    >>> round(fastkd.recipes.distillm2(texts, texts).item(), 4)
    0.6725
    """
    check_finite("distillm2", "beta", beta)
    if not 0 <= beta <= 2:
        raise ValueError(f"distillm2: beta must lie in [0, 2], got {beta}")
    check_choice("distillm2", "reduction", reduction, ("sequence_mean", "mean", "sum"))
    check_no_gradient("distillm2", beta=beta)
    check_tuple("distillm2", "alphas", alphas, 2)
    total: Any = 0
    parts = (("chosen", chosen, 2 - beta), ("rejected", rejected, beta))
    for (name, pair, factor), alpha in zip(parts, alphas, strict=True):
        check_tuple("distillm2", name, pair, 3)
        student, teacher, mask = pair
        sides = {f"{name}.student_logits": student, f"{name}.teacher_logits": teacher}
        check_rows("distillm2", sides, mask=mask)
        check_no_gradient("distillm2", **{f"{name}.teacher_logits": teacher})
        share = _share_of_rows(name, alpha, student)
        total = total + row_divergence(
            "distillm2",
            student,
            teacher,
            divergence="skew_kl" if name == "chosen" else "skew_reverse_kl_detached",
            beta=share,
            temperature=temperature,
            mask=mask,
            weight=scaled_weight(student, factor, None),
            reduction=reduction,
        )
    return total


def _share_of_rows(name: str, alpha: float | Tensor, student: Tensor) -> Tensor:
    """A number or one a text as a tensor with one entry a row."""
    rows = student.shape[:-1]
    if not isinstance(alpha, Tensor):
        check_finite("distillm2", "alphas", alpha)
    if isinstance(alpha, Tensor) and alpha.dim():
        if alpha.dim() != 1 or alpha.shape[:1] != rows[:1]:
            raise ValueError(
                f"distillm2: alphas must be numbers or one a text, [{rows[0]}] for {name}, got "
                f"shape {list(alpha.shape)}"
            )
        alpha = alpha.reshape(-1, *[1] * (len(rows) - 1))
    return scaled_weight(student, alpha, None)


def distillm2_alphas(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    mask: Tensor,
    anchor: float | Tensor,
    *,
    base: float = 0.1,
) -> Tensor:
    r"""Each text's share of the mixture for :func:`distillm2`, ``[B]``.

    :math:`\mathrm{clip}(1 - (1 - base)\, anchor / (\bar p - \bar q + 10^{-5}), 0.01, base)` where
    :math:`\bar p` and :math:`\bar q` are the exponentials of the text's mean log-probabilities
    under the teacher and the student, of the teacher's texts. For the student's texts swap the
    first two arguments (recalled, not verified).

    Args:
        student_log_probs: ``[B, T]``, of the tokens, as the field ``student_label_log_prob`` of
            :func:`fastkd.token_stats` has them. No gradient flows.
        teacher_log_probs: the same shape.
        mask: bool ``[B, T]``.
        anchor: the mean of :math:`\bar p - \bar q` that was logged first.
        base: the largest share.

    >>> import torch, fastkd
    >>> q, p, mask = torch.tensor([[-2.0]]), torch.tensor([[-1.0]]), torch.tensor([[True]])
    >>> [round(x, 4) for x in fastkd.recipes.distillm2_alphas(q, p, mask, 0.24).tolist()]
    [0.0712]
    """
    given = {"student_log_probs": student_log_probs, "teacher_log_probs": teacher_log_probs}
    check_tensors("distillm2_alphas", {**given, "mask": mask})
    for name, values in given.items():
        check_row_values("distillm2_alphas", name, values, mask.shape)
    if mask.dim() != 2:
        raise ValueError(f"distillm2_alphas: mask must be [B, T], got {list(mask.shape)}")
    check_mask("distillm2_alphas", "mask", mask, mask.shape)
    base = to_number("distillm2_alphas", "base", base)
    check_finite("distillm2_alphas", "anchor", anchor)
    count = mask.sum(1).clamp(min=1)
    q, p = ((torch.where(mask, wide(x.detach()), 0).sum(1) / count).exp() for x in given.values())
    return (1 - (1 - base) * anchor / (p - q + 1e-5)).clamp(0.01, base)


def taid(
    student_logits: Tensor,
    teacher_logits: Tensor,
    t: float | Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Cross-entropy with a teacher between the student and the teacher (TAID). A term.

    The target is :math:`\mathrm{softmax}((1 - t) z_S + t z_T)`, of which nothing is stored and
    through which no gradient flows. t grows from 0.4 to 1 by :class:`TaidSchedule`.

    Args:
        student_logits: ``[..., vocab]``. Row t scores the token that follows it.
        teacher_logits: the same shape; gets no gradient.
        t: a number, or a 0-d tensor.
        temperature: of both sides.
        mask, weight, vocab_size, reduction, normalizer: see :func:`distillm`.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Source: Shing et al. 2025 (arXiv 2501.16937) and its code (SakanaAI/TAID).

    >>> import torch, fastkd
    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> round(fastkd.recipes.taid(student, teacher, 0.4).item(), 4)
    0.6931
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_rows("taid", tensors, mask=mask, weight=weight)
    check_no_gradient("taid", teacher_logits=teacher_logits, t=t)
    check_share("taid", "t", t)
    share = scaled_weight(student_logits, t, None)
    return row_divergence(
        "taid",
        student_logits,
        [student_logits.detach(), teacher_logits],
        divergence="cross_entropy",
        teacher_weights=torch.stack([1 - share, share], -1),
        temperature=temperature,
        vocab_size=vocab_size,
        mask=mask,
        weight=weight,
        reduction=reduction,
        normalizer=normalizer,
    )


@dataclass
class TaidSchedule:
    r"""The t of :func:`taid`, which grows at least with the progress of training.

    With the relative fall of the loss :math:`c = (L_{last} - L) / (L_{last} + 10^{-15})`, its
    average :math:`m \leftarrow \beta m + (1 - \beta) c`, and :math:`t \leftarrow \min(end,
    \max(start + (end - start)\, progress,\, t + \alpha\, \sigma(m) (1 - t)))`.

    >>> import fastkd
    >>> schedule = fastkd.recipes.TaidSchedule()
    >>> [round(schedule.step(loss, progress), 3) for loss, progress in ((3.0, 0.0), (2.0, 0.5))]
    [0.4, 0.7]
    """

    start: float = 0.4
    end: float = 1.0
    alpha: float = 5e-4
    beta: float = 0.99
    #: As it stands; None: ``start``.
    t: float | None = None
    momentum: float = 0.0
    last_loss: float = math.inf

    def step(self, loss: float, progress: float) -> float:
        """The next t, from the last loss and the share of training done, in [0, 1]."""
        loss = to_number("TaidSchedule", "loss", loss.detach() if torch.is_tensor(loss) else loss)
        progress = to_number("TaidSchedule", "progress", progress)
        check_share("TaidSchedule", "progress", progress)
        if self.t is None:
            self.t = self.start
        if math.isfinite(self.last_loss):
            change = (self.last_loss - loss) / (self.last_loss + 1e-15)
            self.momentum = self.beta * self.momentum + (1 - self.beta) * change
            faster = self.t + self.alpha * (1 - self.t) / (1 + math.exp(-self.momentum))
            target = self.start + (self.end - self.start) * progress
            self.t = min(self.end, max(target, faster))
        self.last_loss = loss
        return self.t


def akl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mu: float = 0.5,
    k: int = 256,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Forward and reverse KL, by where the row's distributions differ (adaptive KL). A term.

    The head are the teacher's likeliest tokens whose probabilities add up to at most ``mu``, at
    least one. With :math:`g_h = \sum_{head} |p - q|` and :math:`g` the sum over all tokens, the
    loss is :math:`\beta KL(p \| q) + (1 - \beta) KL(q \| p)` with the constant :math:`\beta = g_h /
    g`.

    Args:
        student_logits: ``[..., vocab]``. Row t scores the token that follows it.
        teacher_logits: the same shape; gets no gradient.
        mu: see above.
        k: the longest head; on CUDA 1,024 at most. The head of a teacher that needs more tokens
            for that mass is cut.
        temperature: of both sides.
        mask, weight, reduction, normalizer: see :func:`distillm`.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Source: Wu et al. 2024 (arXiv 2404.02657) and its code (wutaiqiang/LLM_KD_AKL).

    >>> import torch, fastkd
    >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    >>> round(fastkd.recipes.akl(student, teacher).item(), 4)  # half of each
    0.4394
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_rows("akl", tensors, mask=mask, weight=weight)
    check_share("akl", "mu", mu)
    check_no_gradient("akl", teacher_logits=teacher_logits)
    check_positive("akl", "temperature", temperature)
    k = to_integer("akl", "k", k)
    student = student_logits.detach()
    stats = token_stats(student, teacher_logits, temperature=temperature)
    assert stats.tvd is not None
    assert stats.teacher_lse is not None
    indices = teacher_topk(
        teacher_logits, min(k, student.size(-1)), temperature=temperature
    ).indices
    p, q = (
        log_probs_at(z, indices, lse, temperature).exp()
        for z, lse in ((teacher_logits, stats.teacher_lse), (student, stats.student_lse))
    )
    head = p.cumsum(-1) <= mu
    head = torch.cat([torch.ones_like(head[..., :1]), head[..., 1:]], -1)
    total = 2 * stats.tvd
    near = torch.where(head, (p - q).abs(), 0).sum(-1)
    share = torch.where(total > 0, near / torch.where(total > 0, total, 1), 0.5).clamp(0, 1)
    return row_divergence(
        "akl",
        student_logits,
        teacher_logits,
        divergence="mixed_kl",
        beta=share,
        temperature=temperature,
        mask=mask,
        weight=weight,
        reduction=reduction,
        normalizer=normalizer,
    )


def abkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float | Tensor = 0.2,
    beta: float | Tensor = 0.7,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""The Alpha-Beta divergence (ABKD). A term.

    :math:`-\frac{1}{\alpha \beta} \sum_v p^\alpha q^\beta - \frac{\alpha}{\alpha + \beta}
    p^{\alpha + \beta} - \frac{\beta}{\alpha + \beta} q^{\alpha + \beta}`, with its limits: (1, 0)
    is forward and (0, 1) reverse KL. Where :math:`\alpha + \beta = 0` the authors' code lacks a
    factor :math:`1 / \alpha`.

    Arguments are those of :func:`distillm`, ``alpha`` and ``beta`` a number or one a row.

    Source: Wang et al. 2025 (arXiv 2505.04560) and its code (ghwang-s/abkd), GPT-2's setting.

    >>> import torch, fastkd
    >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    >>> round(fastkd.recipes.abkd(student, teacher, alpha=1.0, beta=1.0).item(), 4)
    0.16
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_rows("abkd", tensors, mask=mask, weight=weight)
    more: dict[str, Any] = {"mask": mask, "weight": weight, "reduction": reduction}
    return row_divergence(
        "abkd",
        *(student_logits, teacher_logits),
        divergence="alpha_beta",
        alpha=alpha,
        beta=beta,
        temperature=temperature,
        vocab_size=vocab_size,
        normalizer=normalizer,
        **more,
    )


def bild(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    k: int = 8,
    temperature: float = 3.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""KL of the softmaxes of logit differences, both models leading (BiLD). A term.

    For the k likeliest tokens of the teacher, in its order, d are the k (k - 1) / 2 differences of
    each logit and a later one. The loss is :math:`KL(\mathrm{softmax}(d_T / \tau) \|
    \mathrm{softmax}(d_S / \tau))`, plus the same for the k likeliest tokens of the student.

    Args:
        student_logits: ``[..., vocab]``. Row t scores the token that follows it.
        teacher_logits: the same shape; gets no gradient.
        k: from 2 to the size of the vocabulary; on CUDA 1,024 at most.
        temperature: of both sides.
        mask, reduction, normalizer: see :func:`distillm`; no ``"elementmean"``.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Source: Li et al. 2024 (arXiv 2406.13555) and its code (fpcsong/BiLD).

    >>> import torch, fastkd
    >>> student, teacher = torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[4.0, 1.0, 0.0]])
    >>> round(fastkd.recipes.bild(student, teacher, k=3).item(), 4)
    0.0173
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_rows("bild", tensors, mask=mask)
    check_no_gradient("bild", teacher_logits=teacher_logits)
    check_positive("bild", "temperature", temperature)
    check_width("bild", "teacher_logits", teacher_logits, "student_logits", student_logits)
    k = to_integer("bild", "k", k)
    if not 2 <= k <= student_logits.size(-1):
        raise ValueError(f"bild: k must lie in [2, {student_logits.size(-1)}], got {k}")
    kept = kept_rows(student_logits, mask)
    first, second = torch.triu_indices(k, k, 1, device=student_logits.device)
    dtype = torch.promote_types(number_type(student_logits), number_type(teacher_logits))
    losses = torch.zeros(kept.shape, dtype=dtype, device=kept.device)
    for leader in (teacher_logits, student_logits.detach()):
        indices = teacher_topk(leader, k).indices.long()
        chosen = (wide(x.gather(-1, indices)) for x in (student_logits, teacher_logits))
        mine, other = (x[..., first] - x[..., second] for x in chosen)
        losses = losses + softmax_divergence(
            mine, other, temperature=temperature, mask=mask, reduction="none"
        )
    return reduced("bild", losses, kept, reduction, normalizer)
