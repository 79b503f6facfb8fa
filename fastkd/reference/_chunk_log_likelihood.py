"""chunk_log_likelihood."""

import math

import torch
from torch import Tensor

from fastkd.reference._origin import relative_to_largest
from fastkd.reference._rows import log_sum_exp


def chunk_log_likelihood_op(
    logits: Tensor,
    token_ids: Tensor,
    chunk_ids: Tensor,
    num_chunks: int,
    boundary: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The raw op in plain PyTorch: likelihoods, boundary log-probabilities, token counts."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    shape = (*logits.shape[:-2], num_chunks)
    scored = chunk_ids >= 0
    before = torch.cat([torch.full_like(chunk_ids[..., :1], -1), chunk_ids[..., :-1]], -1)
    ended = (before >= 0) & (before != chunk_ids) & (boundary is not None)
    read = (scored | ended).unsqueeze(-1)
    scaled = relative_to_largest(torch.where(read, logits.to(dtype), 0.0)) / temperature
    lse = scaled.logsumexp(-1)
    lse = torch.where(lse.isfinite(), lse, math.nan)
    label = scaled.gather(-1, torch.where(scored, token_ids, 0).long().unsqueeze(-1)).squeeze(-1)

    def summed(values: Tensor, chunks: Tensor) -> Tensor:
        """Sums of the values by chunk; those of chunk -1 go to an extra entry that is dropped."""
        places = torch.where(chunks < 0, num_chunks, chunks).long()
        out = values.new_zeros((*shape[:-1], num_chunks + 1))
        return out.scatter_add(-1, places, values)[..., :-1]

    likelihood = summed(torch.where(scored, label - lse, 0.0), chunk_ids)
    count = summed(scored.long(), chunk_ids)
    if boundary is None:
        return likelihood, None, count
    mass = log_sum_exp(scaled.masked_fill(~boundary, -math.inf)).squeeze(-1)
    log_prob = torch.where(mass == -math.inf, mass.detach() + 0 * lse.detach(), mass - lse)
    return (
        likelihood,
        summed(torch.where(ended, log_prob, 0.0), torch.where(ended, before, -1)),
        count,
    )


def chunk_log_likelihood(
    logits: Tensor,
    token_ids: Tensor,
    chunk_ids: Tensor,
    num_chunks: int,
    *,
    boundary: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`fastkd.chunk_log_likelihood` in plain PyTorch, with the same arguments."""
    return chunk_log_likelihood_op(logits, token_ids, chunk_ids, num_chunks, boundary, temperature)
