"""Methods that learn from the sampled token alone: policy gradients of the reverse KL."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._ops.arguments import check_no_gradient, to_flag
from fastkd._ops.checks import check_finite, check_positive, check_tensors
from fastkd._ops.names import TextReduction
from fastkd.losses._token_stats import token_stats
from fastkd.recipes._chunks import reduced
from fastkd.recipes._rows import (
    check_choice,
    check_row_values,
    check_rows,
    check_share,
    kept_rows,
    label_log_probs,
    number_type,
    other_label_log_probs,
    row_divergence,
)


def opd(
    student_logits: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    estimator: str = "k1",
    old_log_probs: Tensor | None = None,
    clip: float | None = None,
    coefficient: float = 1.0,
    discount: float = 0.0,
    baseline: str | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""On-policy distillation from the sampled token alone (OPD). A term.

    With y the token that the student sampled, q and p the probabilities that student and teacher
    give it, a row's loss is

    ========  ================================================  ================================
    k1        :math:`-\rho A`, the policy gradient              expected gradient: KL(q \| p)
    k2        :math:`\frac12 (\log p - \log q)^2`               expected gradient: KL(q \| p)
    k3        :math:`p/q - 1 - \log(p/q)`                       expected gradient: **KL(p \| q)**
    ========  ================================================  ================================

    The expectation is over y from q. With :math:`r_t = \log p - \log q` of row t, the advantage is
    :math:`A_t = coefficient \sum_{u \ge t} discount^{u-t} r_u`, without a gradient, and
    :math:`\rho = q / q_{old}` is 1 where the student is the one that sampled. The value of k1 is
    then an estimate of KL(q || p). Back-propagating k3 minimises the *forward* KL: for the reverse
    KL use k1 or k2. With ``clip`` the loss is PPO's :math:`-\min(\rho A, \mathrm{clamp}(\rho,
    1 - clip, 1 + clip) A)`.

    Args:
        student_logits: ``[..., T, vocab]``: row t scores ``labels[t]``.
        teacher: its logits, ``[..., T, vocab]``, or its log-probabilities of the labels,
            ``[..., T]``, as a server returns them. No gradient flows to it.
        labels: int64 or int32 ``[..., T]``, the sampled tokens; -100 for none.
        estimator: ``"k1"``, ``"k2"`` or ``"k3"``.
        old_log_probs: for k1, log-probabilities of the labels under the student that sampled them;
            None: the student as it is.
        clip: for k1, see above; None: no limit.
        coefficient: multiplies the loss.
        discount: for k1, of later rows' rewards, in [0, 1].
        baseline: for k1: ``"kl"`` adds the row's exact :math:`KL(q \| p)`, a constant, to the
            advantage, whose expectation is then 0: less noise, the same expected gradient (vOPD).
            Needs the teacher's logits.
        mask: bool ``[..., T]``: rows with False are not read.
        temperature: of both sides, that of sampling.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` (over rows that count), ``"batchmean"``, or
            ``"sequence_mean"`` (over a text's rows, then over texts).
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if the student's logits are).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type.

    Sources: Thinking Machines' on-policy distillation (Tinker cookbook: k1, coefficient 1, discount
    0); MiniLLM (arXiv 2306.08543); vOPD (2605.07865). verl's ``k3`` with ``use_policy_gradient``
    off is the k3 above.

    >>> import torch, fastkd
    >>> student = torch.tensor([[0.0, 0.0]], requires_grad=True)
    >>> log_p = torch.tensor([-0.1])  # of token 1, from a server
    >>> loss = fastkd.recipes.opd(student, log_p, torch.tensor([1]))
    >>> round(loss.item(), 4)  # log(1/2) + 0.1
    -0.5931
    >>> loss.backward()
    >>> [round(x, 4) for x in student.grad[0].tolist()]
    [0.2966, -0.2966]
    """
    check_tensors("opd", {"student_logits": student_logits, "labels": labels})
    check_rows("opd", {"student_logits": student_logits}, mask=mask, labels=labels)
    check_finite("opd", "coefficient", coefficient)
    _check_clip("opd", "clip", clip)
    check_choice("opd", "estimator", estimator, ("k1", "k2", "k3"))
    check_share("opd", "discount", discount)
    check_no_gradient("opd", old_log_probs=old_log_probs)
    only_k1 = {"old_log_probs": old_log_probs, "clip": clip, "baseline": baseline}
    for name, value in only_k1.items():
        if value is not None and estimator != "k1":
            raise ValueError(f"opd: {name} needs estimator k1, got {estimator!r}")
    if discount and estimator != "k1":
        raise ValueError(f"opd: discount needs estimator k1, got {estimator!r}")
    kept = kept_rows(student_logits, mask, labels)
    log_q = label_log_probs(student_logits, labels, mask=mask, temperature=temperature)
    log_p = other_label_log_probs(
        "opd", "teacher", teacher, student_logits, labels, kept, temperature
    )
    log_ratio = log_p - log_q
    if estimator == "k2":
        losses = 0.5 * coefficient * log_ratio.square()
    elif estimator == "k3":
        losses = coefficient * (torch.expm1(log_ratio) - log_ratio)
    else:
        rewards = log_ratio.detach()
        advantage = _discounted(rewards, discount)
        if baseline is not None:
            check_choice("opd", "baseline", baseline, ("kl",))
            if teacher.dim() != student_logits.dim():
                raise ValueError("opd: baseline kl needs the teacher's logits, got log-probs")
            stats = token_stats(student_logits.detach(), teacher, temperature=temperature)
            assert stats.reverse_kl is not None
            advantage = advantage + torch.where(kept, stats.reverse_kl, 0)
        ratio = _importance("opd", log_q, old_log_probs, kept)
        losses = _policy_gradient(ratio, coefficient * advantage, clip)
    losses = torch.where(kept, losses, 0)
    return reduced("opd", losses, kept, reduction, normalizer)


def minillm(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    old_log_probs: Tensor | None = None,
    gamma: float = 0.95,
    clip: float | None = 0.2,
    length_norm: bool = True,
    single_step: bool = True,
    reward_clip: float = 100.0,
    sampling_weight: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Policy gradient of the reverse KL of texts, and each row's own KL (MiniLLM). A term.

    With :math:`r_t = \log p - \log q` of the sampled token, within :math:`\pm` ``reward_clip``, the
    return of row t is :math:`\sum_{u \ge t} \gamma^{u-t} r_u`, over the number of the text's rows
    from t on (``length_norm``). Returns minus their mean over their standard deviation are the
    advantages A. The loss is PPO's :math:`-\min(\rho A, \mathrm{clamp}(\rho, 1 - clip, 1 + clip)
    A)` with :math:`\rho = w\, q / q_{old}`, plus :math:`KL(q \| p)` of the row (``single_step``).

    Args:
        student_logits: ``[B, T, vocab]``: row t scores ``labels[t]``.
        teacher_logits: the same shape; gets no gradient.
        labels: int64 or int32 ``[B, T]``, the sampled tokens; -100 for none.
        old_log_probs: ``[B, T]``, log-probabilities of the labels under the student that sampled
            them; rewards are taken with these. None: the student as it is.
        gamma: discount of later rewards.
        clip: limits the ratio; None: no limit.
        length_norm, single_step: see above.
        reward_clip: limit of a row's reward.
        sampling_weight: w, float ``[B, T]``: for texts from a mixture of both models, the student's
            probability over the mixture's. The authors mix the teacher in with a share of 0.2.
        mask: bool ``[B, T]``: rows with False are not read.
        temperature: of both sides, that of sampling.
        reduction: ``"none"``, ``"sum"``, ``"mean"``, ``"batchmean"`` or ``"sequence_mean"``.
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type.

    Source: Gu et al. 2023 (arXiv 2306.08543) and its code (microsoft/LMOps). The code always
    normalises by length, and takes the mean and standard deviation of the advantages over padding
    as well; here only over rows that count. Add the cross-entropy on pre-training text.

    >>> import torch, fastkd
    >>> student, teacher = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
    >>> fastkd.recipes.minillm(student, teacher, torch.tensor([[0, 1]])).item()
    0.0
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_tensors("minillm", {**tensors, "labels": labels})
    check_rows("minillm", tensors, mask=mask, labels=labels)
    _check_clip("minillm", "clip", clip)
    check_positive("minillm", "reward_clip", reward_clip)
    length_norm = to_flag("minillm", "length_norm", length_norm)
    single_step = to_flag("minillm", "single_step", single_step)
    check_no_gradient("minillm", old_log_probs=old_log_probs)
    check_share("minillm", "gamma", gamma)
    kept = kept_rows(student_logits, mask, labels)
    log_q = label_log_probs(student_logits, labels, mask=mask, temperature=temperature)
    log_p = other_label_log_probs(
        "minillm", "teacher_logits", teacher_logits, student_logits, labels, kept, temperature
    )
    ratio = _importance("minillm", log_q, old_log_probs, kept)
    sampled = log_q.detach() if old_log_probs is None else torch.where(kept, old_log_probs, 0)
    rewards = (log_p - sampled).clamp(-reward_clip, reward_clip)
    returns = _discounted(rewards, gamma)
    if length_norm:
        left = kept.flip(-1).cumsum(-1).flip(-1)
        returns = returns / left.clamp(min=1)
    count = kept.sum().clamp(min=1)
    centred = torch.where(kept, returns - torch.where(kept, returns, 0).sum() / count, 0)
    advantage = centred * torch.rsqrt(centred.square().sum() / count + 1e-8)
    if sampling_weight is not None:
        place = labels.shape, labels.device
        check_row_values("minillm", "sampling_weight", sampling_weight, *place)
        ratio = ratio * torch.where(kept, sampling_weight, 0)
    losses = torch.where(kept, _policy_gradient(ratio, advantage, clip), 0)
    found = reduced("minillm", losses, kept, reduction, normalizer)
    if not single_step:
        return found
    return found + row_divergence(
        "minillm",
        student_logits,
        teacher_logits,
        divergence="reverse_kl",
        temperature=temperature,
        mask=kept,
        reduction=reduction,
        normalizer=normalizer,
    )


def _check_clip(function: str, name: str, value: float | None) -> None:
    if value is not None:
        check_positive(function, name, value)


def _discounted(rewards: Tensor, discount: float) -> Tensor:
    """Sums of each row's and all later rewards of its text, each a step later counting less."""
    step, factor = 1, discount
    while discount and step < rewards.size(-1):  # sums of 2, 4, 8, ... rows
        later = F.pad(rewards[..., step:], (0, step))
        rewards, step, factor = rewards + factor * later, 2 * step, factor * factor
    return rewards


def _importance(function: str, log_q: Tensor, old: Tensor | None, kept: Tensor) -> Tensor:
    """The ratio of the probabilities of the student and of the one that sampled."""
    if old is None:
        return torch.exp(log_q - log_q.detach())
    check_row_values(function, "old_log_probs", old, kept.shape, kept.device)
    return torch.exp(torch.where(kept, log_q - old.to(number_type(log_q)), 0))


def _policy_gradient(ratio: Tensor, advantage: Tensor, clip: float | None) -> Tensor:
    losses = -ratio * advantage
    if clip is None:
        return losses
    return torch.maximum(losses, -ratio.clamp(1 - clip, 1 + clip) * advantage)
