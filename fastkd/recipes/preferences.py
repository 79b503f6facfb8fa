"""Preferences between two texts, with the teacher as the reference."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._ops.checks import check_finite, check_positive, check_tensors
from fastkd._ops.names import Reduction
from fastkd.recipes._rows import (
    check_choice,
    check_rows,
    kept_rows,
    label_log_probs,
    other_label_log_probs,
)

_LOSSES = ("sigmoid", "hinge", "ipo", "kto_pair")


def preference(
    student_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Preference optimisation with a teacher as the reference (DPO, KTO; LLaVA-MoD). A term.

    With :math:`r = \log q(text) - \log p(text)` of each text, the sums over its rows, the chosen
    texts' c, the rejected texts' e, and d = c - e of a pair:

    ============  ==================================================================================
    ``sigmoid``   :math:`-(1 - s) \log \sigma(\beta d) - s \log \sigma(-\beta d)`, s the smoothing
    ``hinge``     :math:`\max(0, 1 - \beta d)`
    ``ipo``       :math:`(d - 1 / (2 \beta))^2`
    ``kto_pair``  of each text :math:`1 - \sigma(\beta (c - \bar e))` and :math:`1 - \sigma(\beta
                  (\bar c - e))`, the means over the batch, at least 0
    ============  ==================================================================================

    Args:
        student_logits: ``[2 B, T, vocab]``, the B chosen texts and then the B rejected ones. Row t
            scores ``labels[t]``.
        reference_logits: of the teacher, the same shape, or its log-probabilities of the labels,
            ``[2 B, T]``. No gradient flows to it.
        labels: int64 or int32 ``[2 B, T]``; rows with -100 do not count.
        mask: bool ``[2 B, T]``: rows with False (a prompt, padding) are not read.
        loss: one of the table.
        beta: positive.
        label_smoothing: of ``sigmoid``, in [0, 1/2).
        reduction: ``"mean"``, ``"sum"`` or ``"none"``: ``[B]``, and for ``kto_pair`` ``[2 B]``.

    Returns:
        float32 (float64 if the student's logits are).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type.

    Sources: DPO (arXiv 2305.18290), IPO (2310.12036), KTO (2402.01306), as in the code of LLaVA-MoD
    (2408.15881), where the means of ``kto_pair`` carry gradients, as here. With the teacher as the
    reference, and its own text chosen over the student's, ``sigmoid`` is DPKD (2406.19774;
    recalled, not verified).

    >>> import torch, fastkd
    >>> z = torch.zeros(2, 3, 5)
    >>> labels = torch.randint(0, 5, (2, 3))
    >>> round(fastkd.recipes.preference(z, z, labels).item(), 4)  # equal models: log 2
    0.6931
    """
    check_tensors("preference", {"student_logits": student_logits, "labels": labels})
    check_rows("preference", {"student_logits": student_logits}, mask=mask, labels=labels)
    check_choice("preference", "loss", loss, _LOSSES)
    check_choice("preference", "reduction", reduction, ("mean", "sum", "none"))
    check_positive("preference", "beta", beta)
    if student_logits.dim() != 3 or student_logits.size(0) % 2:
        raise ValueError(
            "preference: student_logits must be [2 B, T, vocab], chosen and then rejected texts, "
            f"got shape {list(student_logits.shape)}"
        )
    check_finite("preference", "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss != "sigmoid"):
        raise ValueError(
            "preference: label_smoothing must lie in [0, 1/2), and be 0 for losses other than "
            f"sigmoid, got {label_smoothing} for {loss}"
        )
    kept = kept_rows(student_logits, mask, labels)
    log_q = label_log_probs(student_logits, labels, mask=mask)
    log_p = other_label_log_probs(
        "preference", "reference_logits", reference_logits, student_logits, labels, kept
    )
    chosen, rejected = (log_q - log_p).sum(1).chunk(2)
    margin = beta * (chosen - rejected)
    if loss == "sigmoid":
        losses = -F.logsigmoid(margin)
        if label_smoothing:
            losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margin)
    elif loss == "hinge":
        losses = torch.relu(1 - margin)
    elif loss == "ipo":
        losses = (chosen - rejected - 1 / (2 * beta)).square()
    else:
        of_chosen, of_rejected = (_mean(x).clamp(min=0) for x in (chosen, rejected))
        signed = torch.cat([chosen - of_rejected, of_chosen - rejected])
        losses = torch.sigmoid(-beta * signed)  # 1 - sigmoid
    if reduction == "mean":
        return _mean(losses)
    return losses.sum() if reduction == "sum" else losses


def _mean(values: Tensor) -> Tensor:
    """0 where there are none."""
    return values.sum() / max(1, values.numel())
