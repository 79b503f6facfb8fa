"""token_log_probs."""

import math

import torch
from torch import Tensor

from fastkd.reference._origin import relative_to_largest
from fastkd.reference._rows import DEAD, Rows, exp, finite, from_largest, log_softmax


def token_log_probs_op(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    shift: int,
    vocab_size: int,
    logit_softcap: float,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """The raw op in plain PyTorch: log-probabilities, entropies."""
    rows = Rows(
        logits,
        (),
        temperature=temperature,
        temperatures=temperatures,
        weight=None,
        mask=mask,
        labels=token_ids,
        label_weight=0.0,
        label_weights=None,
        student_logit_softcap=logit_softcap,
        teacher_logit_softcap=math.inf,
        ignore_index=-100,
        vocab_size=vocab_size,
        shift=shift,
        square_temperature=False,
        reduction="none",
        denominator=1.0,
        normalizer=None,
    )
    lse = (relative_to_largest(rows.student) / rows.tau).logsumexp(-1, keepdim=True)
    lse = torch.where(lse.isfinite(), lse, math.nan)
    assert rows.labels is not None
    at = torch.where(rows.kept, rows.labels, 0).long().unsqueeze(-1)
    # Of a token of probability 0 the value is -inf, and the gradient 1[v = token] - q_v, too.
    token = from_largest(rows.student).gather(-1, at)
    token = token / rows.tau + torch.where(token < -DEAD, -math.inf, 0.0)
    log_probs = torch.where(rows.kept, (token - lse).squeeze(-1), 0.0)
    if not entropy:
        return log_probs, None
    log_q = log_softmax(rows.student, rows.tau)
    return log_probs, torch.where(rows.kept, -(exp(log_q) * finite(log_q)).sum(-1), 0.0)


def token_log_probs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    shift: int = 0,
    vocab_size: int | None = None,
    logit_softcap: float | None = None,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """`fastkd.token_log_probs` in plain PyTorch, with the same arguments."""
    each = temperature if isinstance(temperature, Tensor) and temperature.dim() else None
    found = token_log_probs_op(
        logits,
        token_ids,
        mask,
        float(temperature) if each is None else 1.0,
        each,
        shift,
        -1 if vocab_size is None else vocab_size,
        math.inf if logit_softcap is None else logit_softcap,
        entropy,
    )
    return found if entropy else found[0]
