"""Routing of tokens between a small and a large model."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._ops.arguments import to_integer
from fastkd._ops.checks import check_positive, check_tensors
from fastkd.losses._token_stats import token_stats
from fastkd.recipes._chunks import check_mask, wide
from fastkd.recipes._features import check_floats, mean_of_rows, only
from fastkd.teachers._teacher_topk import teacher_topk


class R2rFeatures(NamedTuple):
    """What R2R's router reads of the small model's next-token logits, ``[...]`` rows."""

    #: The k largest logits as they are, ``[..., k]``, descending.
    top_logits: Tensor
    #: Their tokens, int32 ``[..., k]``.
    top_indices: Tensor
    #: In nats.
    entropy: Tensor
    #: The largest probability.
    top_prob: Tensor


@torch.no_grad()
def r2r_features(logits: Tensor, k: int = 100) -> R2rFeatures:
    r"""R2R: the small model's logits as its router reads them. No gradient.

    The router has them beside the last hidden state and the sampled token's embedding. Simple
    routers of the paper call the large model where the entropy is above 0.45, or where the
    aleatoric uncertainty of :func:`r2r_log_u` is above 2.275.

    Args:
        logits: ``[..., vocab]``.
        k: 100 in the authors' code; at most the vocabulary.

    Returns:
        :class:`R2rFeatures`.

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Source: R2R (arXiv 2505.21600; code thu-nics/R2R).

    >>> import torch, fastkd
    >>> found = fastkd.recipes.r2r_features(torch.tensor([[1.0, 3.0, 2.0]]), k=2)
    >>> found.top_logits.tolist(), found.top_indices.tolist()
    ([[3.0, 2.0]], [[1, 2]])
    """
    check_floats("r2r_features", logits=logits)
    k = to_integer("r2r_features", "k", k)
    width = logits.size(-1) if logits.dim() else 0
    if not 1 <= k <= width:
        raise ValueError(f"r2r_features: k must be in [1, {width}], the vocabulary, got {k}")
    logits = logits.detach()
    indices, stats = teacher_topk(logits, k).indices, token_stats(logits)
    assert stats.student_entropy is not None
    assert stats.student_top_prob is not None
    top = logits.gather(-1, indices.long())
    return R2rFeatures(top, indices, stats.student_entropy, stats.student_top_prob)


def r2r(
    router_logits: Tensor,
    divergent: Tensor,
    *,
    recall_factor: float = 1.0,
    pos_weight: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""R2R's router loss: is this token one where the small model leaves the large one's path?

    The mean of :math:`-w y \log \sigma(z) - (1 - y) \log(1 - \sigma(z))`, w = ``pos_weight`` x
    ``recall_factor``.

    Args:
        router_logits: ``[...]``, one a token.
        divergent: bool or float in [0, 1], the same shape: y.
        recall_factor: above 1 for a router that misses fewer divergent tokens.
        pos_weight: neutral over divergent tokens of the whole data set, not of the batch; None: 1.
        mask: bool, the same shape.

    Returns:
        a scalar, float32 (float64 if the logits are).

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: R2R (arXiv 2505.21600; code thu-nics/R2R).

    >>> import torch, fastkd
    >>> divergent = torch.tensor([True, False])
    >>> round(fastkd.recipes.r2r(torch.zeros(2), divergent, pos_weight=3.0).item(), 4)  # 2 log 2
    1.3863
    """
    check_floats("r2r", router_logits=router_logits)
    check_tensors("r2r", {"router_logits": router_logits, "divergent": divergent})
    if divergent.shape != router_logits.shape:
        raise ValueError(
            f"r2r: divergent must have router_logits' shape {list(router_logits.shape)}, got "
            f"{list(divergent.shape)}"
        )
    if divergent.dtype != torch.bool and not divergent.is_floating_point():
        raise TypeError(f"r2r: divergent must be bool or floating-point, got {divergent.dtype}")
    check_positive("r2r", "recall_factor", recall_factor)
    if pos_weight is not None:
        check_positive("r2r", "pos_weight", pos_weight)
    check_mask("r2r", "mask", mask, router_logits.shape, router_logits.device)
    z = wide(only(router_logits, mask))
    y = only(divergent.to(z.dtype), mask)
    weight = recall_factor * (1.0 if pos_weight is None else pos_weight)
    losses = weight * y * F.softplus(-z) + (1 - y) * F.softplus(z)
    return mean_of_rows("r2r", losses, mask)


def r2r_log_u(top_logits: Tensor) -> tuple[Tensor, Tensor]:
    r"""Aleatoric and epistemic uncertainty of a token from its largest raw logits.

    With a the K logits taken as evidence, A their sum and :math:`\psi` the digamma function:
    :math:`AU = -\sum_i \frac{a_i}{A} (\psi(a_i + 1) - \psi(A + 1))`, :math:`EU = K / (A + K)`.

    Both are NaN for a token with A not positive or a logit not above -1, where they are undefined.

    Args:
        top_logits: ``[..., K]``; K = 10 in the authors' code:
            ``r2r_features(logits).top_logits[..., :10]``.

    Returns:
        both ``[...]``, float32 (float64 if the logits are).

    Raises:
        TypeError: top_logits has the wrong type.

    Source: LogU, as R2R uses it (arXiv 2505.21600; code thu-nics/R2R).

    >>> import torch, fastkd
    >>> aleatoric, epistemic = fastkd.recipes.r2r_log_u(torch.ones(10))
    >>> round(aleatoric.item(), 4), epistemic.item()
    (1.929, 0.5)
    """
    check_floats("r2r_log_u", top_logits=top_logits)
    evidence = wide(top_logits)
    total = evidence.sum(-1)
    defined = (evidence > -1).all(-1) & (total > 0)
    evidence = torch.where(defined.unsqueeze(-1), evidence, 1)
    total = torch.where(defined, total, evidence.size(-1)).unsqueeze(-1)
    spread = torch.digamma(evidence + 1) - torch.digamma(total + 1)
    aleatoric = -(evidence / total * spread).sum(-1)
    epistemic = evidence.size(-1) / (total.squeeze(-1) + evidence.size(-1))
    return (
        torch.where(defined, aleatoric, torch.nan),
        torch.where(defined, epistemic, torch.nan),
    )
