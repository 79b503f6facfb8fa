"""Language models that fill in masked tokens, many at a time."""

import torch
from torch import Tensor

from fastkd._ops.checks import check_finite, check_tensors
from fastkd._ops.names import Reduction
from fastkd.losses._token_stats import token_stats
from fastkd.recipes._rows import (
    check_choice,
    check_rows,
    entropy,
    kept_rows,
    label_log_probs,
    masked_mean,
)


def dparallel(
    student_logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    beta: float = 2.0,
    temperature: float = 0.5,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Certainty of a masked diffusion model on its own trajectory (dParallel). The total.

    The cross-entropy of the masked tokens, averaged over them, plus :math:`\beta` times the entropy
    :math:`H(\mathrm{softmax}(z / \tau))`, averaged over those of them whose likeliest token is the
    label. Which those are has no gradient; where there are none the second term is 0.

    Args:
        student_logits: ``[..., T, vocab]``: row t scores ``labels[t]``. LLaDA's rows score their
            own token; Dream's score the next one: pass ``logits[:, :-1]`` and ``labels[:, 1:]``.
        labels: int64 or int32 ``[..., T]``, the tokens of the teacher's trajectory; -100 for none.
        mask: bool ``[..., T]``, the tokens that are masked. The authors add the loss with the
            complementary mask: call twice.
        beta: 2 for LLaDA, 1 for Dream.
        temperature: of the entropy.
        reduction: ``"mean"`` as above, ``"sum"``, or ``"none"``: both terms of each row.

    Returns:
        float32 (float64 if the logits are).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type.

    Source: Chen et al. 2025 (arXiv 2509.26488) and its code (czg1225/dParallel), which takes the
    logarithm of p + 1e-12. Its loop for LLaDA overwrites the masks of a batch; here each text has
    its own.

    >>> import torch, fastkd
    >>> logits = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    >>> labels, mask = torch.tensor([[1, 1]]), torch.tensor([[True, True]])
    >>> round(fastkd.recipes.dparallel(logits, labels, mask).item(), 4)
    1.5439
    """
    tensors = {"student_logits": student_logits, "labels": labels, "mask": mask}
    check_tensors("dparallel", tensors)
    check_finite("dparallel", "beta", beta)
    check_rows("dparallel", {"student_logits": student_logits}, mask=mask, labels=labels)
    check_choice("dparallel", "reduction", reduction, ("mean", "sum", "none"))
    kept = kept_rows(student_logits, mask, labels)
    correct = kept & (token_stats(student_logits.detach()).student_argmax == labels)
    surprise = -label_log_probs(student_logits, labels, mask=mask)
    uncertainty = entropy(student_logits, temperature=temperature, mask=correct)
    if reduction == "mean":
        return masked_mean(surprise, kept) + beta * masked_mean(uncertainty, correct)
    losses = surprise + beta * torch.where(correct, uncertainty, 0)
    return losses.sum() if reduction == "sum" else losses
