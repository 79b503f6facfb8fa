"""Methods that learn from the whole distribution, on the student's own texts or on others."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._ops.arguments import check_no_gradient, to_flag
from fastkd._ops.checks import check_positive, check_tensors
from fastkd._ops.names import Tail, TextReduction, TopKDivergence
from fastkd.losses._token_stats import token_stats
from fastkd.losses._topk_divergence import topk_divergence
from fastkd.recipes._chunks import check_dtype, check_tuple, reduced, wide
from fastkd.recipes._rows import (
    best_log_probs,
    check_choice,
    check_rows,
    check_width,
    kept_rows,
    log_probs_at,
    row_divergence,
    row_options,
)
from fastkd.teachers._teacher_topk import teacher_topk


def gkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float | Tensor = 0.5,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Generalised Jensen-Shannon divergence, on the student's texts or on others (GKD). A term.

    :math:`\beta KL(p \| m) + (1-\beta) KL(q \| m)` with :math:`m = \beta p + (1-\beta) q`, p the
    teacher's and q the student's distribution. ``beta`` 0 is forward and 1 is reverse KL.

    Args:
        student_logits: ``[..., vocab]``. Row t scores the token that follows it.
        teacher_logits: the same shape.
        beta: share of the teacher in the mixture. TRL's GKD trainer has 0.5, its trainer of
            distillation 1.0.
        temperature: of both sides; TRL samples at 0.9.
        mask, weight, vocab_size: see :func:`fastkd.softmax_divergence`.
        reduction: as there, or ``"sequence_mean"``: over a text's rows, then over texts.
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Source: Agarwal et al. 2023 (arXiv 2306.13649); TRL's convention of ``beta``.

    >>> import torch, fastkd
    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> round(fastkd.recipes.gkd(student, teacher, beta=0.0).item(), 4)  # KL(p || q)
    0.1109
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_rows("gkd", tensors, mask=mask, weight=weight)
    return row_divergence(
        "gkd",
        student_logits,
        teacher_logits,
        divergence="jsd",
        beta=beta,
        temperature=temperature,
        vocab_size=vocab_size,
        mask=mask,
        weight=weight,
        reduction=reduction,
        normalizer=normalizer,
    )


def opd_topk(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    k: int = 100,
    support: str = "student",
    divergence: TopKDivergence = "reverse_kl",
    beta: float | Tensor = 0.5,
    tail: Tail = "lump",
    max_token_loss: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Divergence over the k likeliest tokens and one outcome for all others. A term.

    The support is the student's k likeliest tokens, the teacher's, or both of them. With P and Q
    the two sides' masses on it, ``tail="lump"`` adds the outcome of all other tokens, whose
    probabilities are 1 - P and 1 - Q. A sum over the support alone (``tail="drop"``) can be
    negative and is not minimal at q = p.

    Args:
        student_logits: ``[..., vocab]``. Row t scores the token that follows it.
        teacher_logits: the same shape; gets no gradient.
        k: tokens of one side's support.
        support: ``"student"``, ``"teacher"`` or ``"both"``: a token in both counts once.
        divergence, beta, tail, max_token_loss: see :func:`fastkd.topk_divergence`.
        temperature: of both sides.
        mask, weight: see :func:`fastkd.softmax_divergence`.
        reduction: as there, or ``"sequence_mean"``: over a text's rows, then over texts.
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Sources: SDFT (arXiv 2601.19897) and SDPO (2601.20802), whose support is the student's best 100;
    TRL's option of a tail; verl's RFC 7856 asks for it where the support is the teacher's. TRL
    weighs rows by the sampled token's :math:`q / q_{old}`, at most 2: pass it, detached, as weight.

    >>> import torch, fastkd
    >>> student, teacher = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[3.0, 1.0, -1.0]])
    >>> round(fastkd.recipes.opd_topk(student, teacher, k=1).item(), 4)
    0.0087
    >>> round(fastkd.softmax_divergence(student, teacher, divergence="reverse_kl").item(), 4)
    0.048
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_rows("opd_topk", tensors, mask=mask, weight=weight)
    check_no_gradient("opd_topk", teacher_logits=teacher_logits)
    check_choice("opd_topk", "support", support, ("student", "teacher", "both"))
    check_positive("opd_topk", "temperature", temperature)
    check_width("opd_topk", "teacher_logits", teacher_logits, "student_logits", student_logits)
    if support == "teacher":
        log_probs, indices = best_log_probs(teacher_logits, k, temperature)
    else:
        indices = teacher_topk(student_logits, k).indices
        if support == "both":
            indices = torch.cat([indices, teacher_topk(teacher_logits, k).indices], -1)
            indices = indices.sort(-1).values
            repeated = F.pad(indices[..., 1:] == indices[..., :-1], (1, 0))
            indices = torch.where(repeated, -1, indices)
        lse = token_stats(teacher_logits, temperature=temperature).student_lse
        log_probs = log_probs_at(teacher_logits, indices.clamp(min=0), lse, temperature)
    return topk_divergence(
        student_logits,
        log_probs,
        indices,
        divergence=divergence,
        beta=beta,
        tail=tail,
        max_token_loss=max_token_loss,
        temperature=temperature,
        stored_temperature=temperature,
        **row_options(
            "opd_topk",
            student_logits,
            mask=mask,
            weight=weight,
            reduction=reduction,
            normalizer=normalizer,
        ),
    )


def minitron(
    student_logits: Tensor,
    teacher_logits: Tensor,
    pairs: Sequence[tuple[Tensor, Tensor]] = (),
    *,
    temperature: float | Tensor = 1.0,
    hidden: str = "cosine",
    balance: bool = True,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""KL of the logits and a distance of hidden states of the same size (Minitron). A term.

    :math:`KL(p \| q)`, without a temperature squared, plus the mean over the pairs of
    :math:`1 - \cos(h_S, h_T)` or of :math:`(h_S - h_T)^2` averaged over channels. With ``balance``
    the latter is multiplied by a constant that makes it equal to the former.

    Args:
        student_logits: ``[..., vocab]``. Row t scores the token that follows it.
        teacher_logits: the same shape.
        pairs: hidden states of pairs of layers, student's and teacher's ``[..., D]``. Project the
            student's where the widths differ; the authors share one projection among all pairs. No
            gradient flows to the teacher's.
        temperature: of both sides.
        hidden: ``"cosine"`` or ``"mse"``.
        balance: see above.
        mask: bool, one a row: rows with False are not read.
        vocab_size: only the first ``vocab_size`` columns are used, on both sides.
        reduction: ``"sum"``, ``"mean"``, ``"batchmean"`` or ``"sequence_mean"``.
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if the logits are).

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Source: Muralidharan et al. 2024 (arXiv 2407.14679) and NVIDIA's Model-Optimizer, which leaves
    out the cross-entropy on the text by default. Its variant of the teacher's top k is
    :func:`opd_topk` with ``support="teacher", k=1024, divergence="forward_kl"`` and
    ``tail="renormalize"``.

    >>> import torch, fastkd
    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> layers = [(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))]
    >>> round(fastkd.recipes.minitron(student, teacher).item(), 4)
    0.1109
    >>> round(fastkd.recipes.minitron(student, teacher, layers).item(), 4)  # twice as much
    0.2219
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_rows("minitron", tensors, mask=mask)
    check_choice("minitron", "hidden", hidden, ("cosine", "mse"))
    balance = to_flag("minitron", "balance", balance)
    if not isinstance(pairs, (list, tuple)):
        raise TypeError(f"minitron: pairs must be a list of pairs, got {type(pairs).__name__}")
    for number, pair in enumerate(pairs):
        check_tuple("minitron", f"pairs[{number}]", pair, 2)
    check_choice("minitron", "reduction", reduction, ("sum", "mean", "batchmean", "sequence_mean"))
    loss = row_divergence(
        "minitron",
        student_logits,
        teacher_logits,
        temperature=temperature,
        vocab_size=vocab_size,
        mask=mask,
        reduction=reduction,
        normalizer=normalizer,
    )
    if not pairs:
        return loss
    kept = kept_rows(student_logits, mask)
    total = torch.zeros((), dtype=loss.dtype, device=loss.device)
    for student, teacher in pairs:
        given = {
            "student_logits": student_logits,
            "pairs (student)": student,
            "pairs (teacher)": teacher,
        }
        check_rows("minitron", given)
        if student.shape != teacher.shape:
            raise ValueError(
                f"minitron: pairs must have one width, got {student.size(-1)} and "
                f"{teacher.size(-1)}"
            )
        mine, other = (
            torch.where(kept.unsqueeze(-1), wide(x), 0) for x in (student, teacher.detach())
        )
        if hidden == "cosine":
            distance = 1 - F.cosine_similarity(mine, other, -1)
        else:
            distance = (mine - other).square().mean(-1)
        distance = torch.where(kept, distance, 0)
        total = total + reduced("minitron", distance, kept, reduction, normalizer)
    total = total / len(pairs)
    return loss + (balanced(total, loss) if balance else total)


def balanced(loss: Tensor, other: Tensor) -> Tensor:
    r"""A loss times a constant that makes it as large as another one.

    The constant is :math:`|\text{other}| / |\text{loss}|`, or 1 where the loss is 0. No gradient
    flows through it, nor to the other loss.

    Args:
        loss: float32, float64, bfloat16 or float16, any shape.
        other: the same shape, its own dtype.

    Returns:
        The shape and dtype of the loss.

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Sources: NVIDIA's Model-Optimizer (:func:`minitron`) and NeMo-RL (:func:`x_token`).

    >>> import torch, fastkd
    >>> loss = torch.tensor(4.0, requires_grad=True)
    >>> found = fastkd.recipes.balanced(loss, torch.tensor(2.0))
    >>> found.item(), torch.autograd.grad(found, loss)[0].item()
    (2.0, 0.5)
    """
    tensors = {"loss": loss, "other": other}
    check_tensors("balanced", tensors)
    for name, values in tensors.items():
        check_dtype("balanced", name, values)
    if loss.shape != other.shape:
        raise ValueError(
            f"balanced: other must have the shape {list(loss.shape)} of loss, got "
            f"{list(other.shape)}"
        )
    size = loss.detach().abs()
    known = size > 0
    factor = torch.where(known, other.detach().abs() / torch.where(known, size, 1), 1)
    return loss * factor.to(loss.dtype)
