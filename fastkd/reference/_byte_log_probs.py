"""byte_log_probs."""

import math
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.op import declared
from fastkd.reference._origin import relative_to_largest
from fastkd.reference._rows import log_sum_exp


def byte_log_probs_op(
    logits: Tensor,
    order: Tensor,
    columns: Tensor,
    segments: Tensor,
    prefix: Tensor | None,
    whole: int,
    valid: Tensor | None,
) -> Tensor:
    """The raw op in plain PyTorch: a log-sum-exp for each column of each row's prefix."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scaled = logits.to(dtype)
    if valid is not None:
        scaled = scaled.masked_fill(~valid, -math.inf)
    scaled = scaled[..., : order.numel()]
    index = torch.zeros_like(scaled[..., 0], dtype=torch.long) if prefix is None else prefix.long()
    sums = (
        scaled[..., :1]
        .expand(*index.shape, segments.size(1))
        .masked_fill(index.unsqueeze(-1) >= 0, -math.inf)
    )
    for number, columns_of_prefix in enumerate(segments.tolist()):
        ids = torch.cat([order[begin:end] for begin, end in columns_of_prefix]).long()
        own = relative_to_largest(scaled.index_select(-1, ids))
        sizes = [end - begin for begin, end in columns_of_prefix]
        found = [log_sum_exp(part).squeeze(-1) for part in own.split(sizes, -1)]
        sums = torch.where((index == number).unsqueeze(-1), torch.stack(found, -1), sums)
    total = log_sum_exp(sums)
    total = torch.where(total.isfinite(), total, math.nan)
    dead = sums == -math.inf
    return torch.where(dead & ~total.isnan(), -math.inf, sums.masked_fill(dead, 0) - total)


def byte_log_probs(logits: Tensor, vocab: Any, *, prefix: Any = b"", valid: Any = None) -> Tensor:
    """`fastkd.byte_log_probs` in plain PyTorch, with the same arguments."""
    (log_probs,) = declared("byte_log_probs").by_definition(
        logits, vocab, prefix=prefix, valid=valid
    )
    return log_probs
