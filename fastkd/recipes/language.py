"""Language models with one tokenizer: a teacher's distribution for each token, and labels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._ops.arguments import check_no_gradient, to_integer
from fastkd._ops.checks import check_finite, check_tensors
from fastkd._ops.names import Divergence, Reduction, TextReduction
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.losses._token_stats import token_stats
from fastkd.recipes._chunks import check_dtype, reduced, wide
from fastkd.recipes._features import check_factors
from fastkd.recipes._rows import (
    check_choice,
    check_rows,
    check_share,
    check_width,
    kept_rows,
    label_log_probs,
    masked_mean,
    row_divergence,
    scaled_weight,
)


def kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    alpha: float = 0.9,
    temperature: float | Tensor = 2.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Knowledge distillation of Hinton et al.: the total, from one read of the logits.

    :math:`\alpha\, \tau^2 KL(p \| q) + (1 - \alpha) CE(labels, q_1)`, p and q at the temperature
    :math:`\tau`, :math:`q_1` at 1. Without labels the second term is left out.

    Args:
        student_logits: ``[..., vocab]``. Row t scores ``labels[t]``.
        teacher_logits: the same shape.
        labels: int64 or int32, one a row; rows with -100 drop out of both terms.
        alpha: weight of the divergence, in (0, 1].
        temperature: of both sides.
        mask: bool, one a row: rows with False are not read.
        weight: float, one a row, multiplies the row's loss.
        vocab_size: only the first ``vocab_size`` columns are used, on both sides.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` (over rows that count), ``"batchmean"``,
            ``"elementmean"``, or ``"sequence_mean"`` (over a text's rows, then over texts).
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type.

    Source: Hinton et al. 2015 (arXiv 1503.02531), which fixes neither number: 0.9 and 2 are usual.

    >>> import torch, fastkd
    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> round(fastkd.recipes.kd(student, teacher, torch.tensor([1])).item(), 4)
    0.4687
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_rows("kd", tensors, mask=mask, labels=labels, weight=weight)
    check_share("kd", "alpha", alpha)
    check_no_gradient("kd", alpha=alpha)
    if not alpha:
        raise ValueError("kd: alpha must be positive, got 0; use sequence_kd for labels alone")
    return row_divergence(
        "kd",
        student_logits,
        teacher_logits,
        temperature=temperature,
        square_temperature=True,
        label_weight=1.0 if labels is None else (1 - alpha) / alpha,
        vocab_size=vocab_size,
        mask=mask,
        labels=labels,
        weight=scaled_weight(student_logits, alpha, weight),
        reduction=reduction,
        normalizer=normalizer,
    )


def sequence_kd(
    student_logits: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Cross-entropy on a teacher's text (sequence-level distillation). The total.

    :math:`-w \log q(y)`. Skip-Thinking trains on one chunk of a rationale in each iteration: pass
    the chunk as ``mask``. The hierarchical autoregressive transformer's byte decoder is trained by
    this call too, with a column for each byte.

    Args:
        student_logits: ``[..., T, vocab]``. Row t scores ``labels[t]``.
        labels: int64 or int32 ``[..., T]``, the teacher's text; rows with -100 do not count.
        weight, mask: see :func:`kd`.
        temperature: of the student.
        reduction: ``"none"``, ``"sum"``, ``"mean"``, ``"batchmean"`` or ``"sequence_mean"``.
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if the logits are).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type.

    Sources: Skip-Thinking (arXiv 2505.18642), Not All Correct Answers Are Equal (2505.14464),
    FLAN-T5 for documents (2409.11282), HAT (2501.10322); DeepSeek-R1's distilled models.

    >>> import torch, fastkd
    >>> loss = fastkd.recipes.sequence_kd(torch.zeros(1, 2, 4), torch.tensor([[3, -100]]))
    >>> round(loss.item(), 4)
    1.3863
    """
    tensors = {"student_logits": student_logits}
    check_tensors("sequence_kd", {**tensors, "labels": labels})
    check_rows("sequence_kd", tensors, mask=mask, labels=labels, weight=weight)
    kept = kept_rows(student_logits, mask, labels)
    losses = -label_log_probs(student_logits, labels, mask=mask, temperature=temperature)
    if weight is not None:
        losses = losses * torch.where(kept, weight, 0)
    return reduced("sequence_kd", losses, kept, reduction, normalizer)


def distilbert(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    labels: Tensor,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    *,
    weights: tuple[float, float, float] = (5.0, 2.0, 1.0),
    temperature: float = 2.0,
    mask: Tensor | None = None,
) -> Tensor:
    r"""DistilBERT, also from several teachers as the Romanian models (recalled, not verified).

    The total: :math:`w_0 \tau^2 KL(\bar p \| q) + w_1 CE + w_2 (1 - \cos(h_S, h_T))`, with
    :math:`\bar p` the mean of the teachers' distributions.

    Args:
        student_logits: ``[..., vocab]``.
        teacher_logits: the same shape, or a list of them.
        labels: int64 or int32, one a row, the masked tokens; -100 elsewhere. Rows without a label
            add to neither of the first two terms, which are means over the others.
        student_hidden: ``[..., D]``.
        teacher_hidden: the same shape; gets no gradient.
        weights: of the three terms.
        temperature: of both sides.
        mask: bool, one a row: False for padding. The last term is a mean over the others.

    Returns:
        float32 (float64 if a side's logits are).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type.

    Sources: DistilBERT's weights and temperature; Avram et al. 2021 (arXiv 2112.12650), whose model
    card names two teachers. That they average distributions over one vocabulary is not verified.

    >>> import torch, fastkd
    >>> z, h = torch.zeros(1, 3, 4), torch.ones(1, 3, 2)
    >>> labels = torch.tensor([[2, -100, -100]])
    >>> round(fastkd.recipes.distilbert(z, [z, z], labels, h, h).item(), 4)  # 2 log 4
    2.7726
    """
    if not isinstance(teacher_logits, (Tensor, list, tuple)):
        raise TypeError(
            "distilbert: teacher_logits must be a tensor or a list of tensors, got "
            f"{type(teacher_logits).__name__}"
        )
    several = not isinstance(teacher_logits, Tensor)
    teachers = [teacher_logits] if isinstance(teacher_logits, Tensor) else list(teacher_logits)
    named = {
        f"teacher_logits[{i}]" if several else "teacher_logits": x for i, x in enumerate(teachers)
    }
    hidden = {"student_hidden": student_hidden, "teacher_hidden": teacher_hidden}
    given = {"student_logits": student_logits, **named, **hidden}
    check_tensors("distilbert", {"student_logits": student_logits, "labels": labels})
    check_rows("distilbert", given, mask=mask, labels=labels)
    check_width("distilbert", "student_hidden", student_hidden, "teacher_hidden", teacher_hidden)
    check_factors("distilbert", "weights", weights, 3)
    divergence_weight, label_weight, hidden_weight = weights
    if not divergence_weight > 0:
        raise ValueError(f"distilbert: weights must begin with a positive number, got {weights}")
    loss = softmax_divergence(
        student_logits,
        teachers if several else teachers[0],
        teacher_mix="probs" if several else "logits",
        temperature=temperature,
        square_temperature=True,
        labels=labels,
        label_weight=label_weight / divergence_weight,
        mask=mask,
        weight=scaled_weight(student_logits, divergence_weight, None),
    )
    kept = kept_rows(student_logits, mask)
    mine, other = (
        torch.where(kept.unsqueeze(-1), wide(x), 0)
        for x in (student_hidden, teacher_hidden.detach())
    )
    distance = 1 - F.cosine_similarity(mine, other, -1)
    return loss + hidden_weight * masked_mean(distance, kept).to(loss.dtype)


def ddk(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    gamma: float = 0.2,
    temperature: float | Tensor = 1.0,
    divergence: Divergence = "forward_kl",
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Cross-entropy and a divergence, on a mixture of domains (DDK). The total.

    :math:`CE(labels, q) + \gamma KL(p \| q)`, from one read of the logits. :func:`ddk_factors`
    gives the domains' shares of the next texts.

    Args:
        student_logits, teacher_logits, labels: see :func:`kd`.
        gamma: positive; 0.2 was best of 0 to 0.5.
        temperature: of the divergence; 1 was best of 0.1 to 2.
        divergence: see :func:`fastkd.softmax_divergence`. The paper calls the term the usual one
            but writes the student first: that reading is ``"reverse_kl"``.
        mask, weight, vocab_size, reduction, normalizer: see :func:`kd`.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type.

    Source: Liu et al. 2024 (arXiv 2407.16154), its text: there is no code.

    >>> import torch, fastkd
    >>> z = torch.zeros(1, 4)
    >>> round(fastkd.recipes.ddk(z, z, torch.tensor([1])).item(), 4)  # log 4
    1.3863
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_tensors("ddk", {**tensors, "labels": labels})
    check_rows("ddk", tensors, mask=mask, labels=labels, weight=weight)
    check_finite("ddk", "gamma", gamma)
    check_no_gradient("ddk", gamma=gamma)
    if not gamma > 0:
        raise ValueError(f"ddk: gamma must be positive, got {gamma}; sequence_kd has labels alone")
    return row_divergence(
        "ddk",
        student_logits,
        teacher_logits,
        divergence=divergence,
        temperature=temperature,
        label_weight=1 / gamma,
        vocab_size=vocab_size,
        mask=mask,
        labels=labels,
        weight=scaled_weight(student_logits, gamma, weight),
        reduction=reduction,
        normalizer=normalizer,
    )


def ddk_factors(
    factors: Tensor, student_perplexity: Tensor, teacher_perplexity: Tensor, *, alpha: float = 0.5
) -> Tensor:
    r"""Shares of the N domains in the next texts (DDK), from the last shares and perplexities.

    :math:`r_i' = \alpha\, \psi_i / \sum_j \psi_j + (1 - \alpha) / N` with :math:`\psi_i = r_i
    \exp(ppl_{S,i} / ppl_{T,i})`. The authors begin with equal shares and update every 1,000 steps,
    from 500 validation samples a domain.

    >>> import torch, fastkd
    >>> shares = torch.full((2,), 0.5)
    >>> fastkd.recipes.ddk_factors(shares, torch.tensor([8.0, 8.0]), torch.tensor([8.0, 8.0]))
    tensor([0.5000, 0.5000])
    """
    given = {"factors": factors, "student_perplexity": student_perplexity}
    given["teacher_perplexity"] = teacher_perplexity
    check_tensors("ddk_factors", given)
    for name, values in given.items():
        check_dtype("ddk_factors", name, values)
        if values.dim() != 1 or values.shape != factors.shape:
            raise ValueError(
                f"ddk_factors: {name} must be [domains], as factors are, got {list(values.shape)}"
            )
    check_share("ddk_factors", "alpha", alpha)
    share = torch.softmax(factors.log() + student_perplexity / teacher_perplexity, 0)
    return alpha * share + (1 - alpha) / len(factors)


def llava_mod(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    vocab_size: int = 151936,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Cross-entropy with the teacher's distribution (LLaVA-MoD's mimic distillation). A term.

    :math:`-\sum_v p_v \log q_v` over the first ``vocab_size`` columns, of which each side may have
    more or fewer.

    Args:
        student_logits: ``[..., vocab_S]``. Row t scores the token that follows it. The authors'
            code masks by labels that are not shifted, so that the first token of each response is
            not learned: here mask row t by whether token t + 1 counts.
        teacher_logits: ``[..., vocab_T]``.
        mask, weight, reduction, normalizer: see :func:`kd`.
        vocab_size: the number of columns used; 151,936 are Qwen's.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Source: Shu et al. 2024 (arXiv 2408.15881) and its code. The balance of experts is the model's;
    for the preference stage see :func:`preference`.

    >>> import torch, fastkd
    >>> loss = fastkd.recipes.llava_mod(torch.zeros(1, 4), torch.zeros(1, 6), vocab_size=4)
    >>> round(loss.item(), 4)
    1.3863
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_rows("llava_mod", tensors, mask=mask, weight=weight)
    vocab_size = to_integer("llava_mod", "vocab_size", vocab_size)
    return row_divergence(
        "llava_mod",
        student_logits,
        teacher_logits,
        divergence="cross_entropy",
        vocab_size=min(vocab_size, student_logits.size(-1), teacher_logits.size(-1)),
        mask=mask,
        weight=weight,
        reduction=reduction,
        normalizer=normalizer,
    )


def distillspec(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: Divergence = "tvd",
    beta: float | Tensor = 0.5,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""A draft model for speculative decoding (DistillSpec; recalled, not verified). A term.

    The target accepts a draft's token with probability :math:`1 - TVD(p, q)`: a mean total
    variation distance of :math:`\epsilon` is an acceptance rate of :math:`1 - \epsilon`. See
    :func:`acceptance`.

    Args:
        student_logits: of the draft, ``[..., vocab]``. Row t scores the token that follows it.
        teacher_logits: of the target, the same shape.
        divergence: ``"forward_kl"``, ``"reverse_kl"``, ``"jsd"`` or ``"tvd"``.
        beta: of ``jsd``.
        temperature: of both sides. For greedy decoding the target is a one-hot distribution: use
            :func:`sequence_kd` with its likeliest tokens.
        mask, weight, vocab_size, reduction, normalizer: see :func:`kd`.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Source: Zhou et al. 2023 (arXiv 2310.08461), by reviews of it.

    >>> import torch, fastkd
    >>> draft, target = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    >>> round(fastkd.recipes.distillspec(draft, target).item(), 4)
    0.4
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_rows("distillspec", tensors, mask=mask, weight=weight)
    choices = ("forward_kl", "reverse_kl", "jsd", "tvd")
    check_choice("distillspec", "divergence", divergence, choices)
    return row_divergence(
        "distillspec",
        student_logits,
        teacher_logits,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        vocab_size=vocab_size,
        mask=mask,
        weight=weight,
        reduction=reduction,
        normalizer=normalizer,
    )


def acceptance(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0
) -> Tensor:
    r"""Probability that the target accepts the draft's token, one a row, without a gradient.

    :math:`a = \sum_v \min(p_v, q_v) = 1 - TVD(p, q)`. With a mean of a, drafts of n tokens give
    :math:`(1 - a^{n+1}) / (1 - a)` tokens for each run of the target.

    >>> import torch, fastkd
    >>> draft, target = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    >>> [round(x, 4) for x in fastkd.recipes.acceptance(draft, target).tolist()]
    [0.6]
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_rows("acceptance", tensors)
    distance = token_stats(student_logits, teacher_logits, temperature=temperature).tvd
    assert distance is not None
    return 1 - distance
