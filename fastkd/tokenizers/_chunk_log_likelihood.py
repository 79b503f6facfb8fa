"""Log-likelihoods of chunks: runs of tokens that cover the same bytes in two tokenizations."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastkd import reference
from fastkd._ops.arguments import check_tensor
from fastkd._ops.differentiable import Differentiable
from fastkd._ops.linear.logits import LinearLogits, check_logits


class ChunkLogLikelihood(NamedTuple):
    """A model's likelihoods of each chunk, ``[..., num_chunks]``. Logarithms are natural."""

    #: Sum of the log-probabilities of the chunk's tokens; 0 for a chunk without tokens.
    log_likelihood: Tensor
    #: Log-probability that the token after the chunk is one of the boundary set; 0 where no row
    #: scores that token (the chunk ends the text) or the chunk has no tokens.
    boundary_log_prob: Tensor | None
    #: int64, tokens in the chunk.
    token_count: Tensor


def chunk_log_likelihood(
    logits: Tensor | LinearLogits,
    token_ids: Tensor,
    chunk_ids: Tensor,
    num_chunks: int,
    *,
    boundary: Tensor | np.ndarray | None = None,
    temperature: float = 1.0,
) -> ChunkLogLikelihood:
    r"""Log-likelihood of every chunk of tokens, and of a token boundary after it, from one read.

    With :math:`q_t = \mathrm{softmax}(z_t / \tau)` and chunk c the tokens t with ``chunk_ids`` c:

    .. math:: \ell_c = \sum_{t \in c} \log q_t(\text{token}_t), \qquad
              b_c = \log \sum_{v \in \text{boundary}} q_{t_c + 1}(v)

    with :math:`t_c` the chunk's last token. Row t of the logits scores token t: for a causal model
    pass ``logits[:, :-1]`` with the ids ``[:, 1:]`` and the chunks ``[:, 1:]``.

    Each row of logits that is needed is read once (the backward pass reads it again and writes its
    gradient). Rows of tokens in no chunk are not read, add nothing, and get a zero gradient even
    where they hold NaN. No ``[tokens, chunks]`` matrix is formed. ``-inf`` logits are probability
    0; a row with a NaN or without a finite logit makes the chunks that need it NaN.

    Args:
        logits: ``[..., T, vocab]`` float32, bfloat16, float16 or float64, any strides. Or a
            :class:`fastkd.LinearLogits`.
        token_ids: ``[..., T]`` int64 or int32. Ids of tokens in no chunk are ignored.
        chunk_ids: ``[..., T]`` int64 or int32: the token's chunk, -1 for none. The tokens of a
            chunk are contiguous and chunks ascend, as :func:`fastkd.align` returns them.
        num_chunks: the largest number of chunks of a text.
        boundary: bool ``[vocab]``, a tensor or an array, for instance
            :meth:`fastkd.ByteVocab.boundary`. A set without a possible token has log-probability
            ``-inf``, which gets no gradient.
        temperature: positive.

    Returns:
        :class:`ChunkLogLikelihood`, float32 (float64 for float64 logits).

    Raises:
        IndexError: a chunk or token id out of range (on CUDA such a text is NaN instead).
        ValueError, TypeError: chunks whose tokens are not contiguous, or another argument of the
            wrong value or type.

    Source: Minixhofer et al. 2025 (arXiv 2503.20083).

    >>> import torch, fastkd
    >>> logits = torch.zeros(1, 3, 4)  # every token has probability 1/4
    >>> chunks = torch.tensor([[0, 0, 1]])
    >>> boundary = torch.tensor([True, True, False, False])
    >>> found = fastkd.chunk_log_likelihood(logits, chunks, chunks, 2, boundary=boundary)
    >>> found.log_likelihood.exp().tolist(), found.boundary_log_prob.exp().tolist()
    ([[0.0625, 0.25]], [[0.5, 1.0]])
    """
    function = "chunk_log_likelihood"
    check_logits(function, "logits", logits)
    if boundary is not None:
        if isinstance(boundary, np.ndarray):
            boundary = torch.tensor(boundary, device=logits.device)
        check_tensor(function, "boundary", boundary)
        boundary = boundary.contiguous()
    likelihood, boundary_log_prob, count = OP(
        logits,
        {
            "logits": logits,
            "token_ids": token_ids,
            "chunk_ids": chunk_ids,
            "num_chunks": num_chunks,
            "boundary": boundary,
            "temperature": temperature,
        },
    )
    return ChunkLogLikelihood(likelihood, None if boundary is None else boundary_log_prob, count)


def _fake(logits: Tensor, num_chunks: int, boundary: Tensor | None, **_: Any) -> tuple[Tensor, ...]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    shape = (*logits.shape[:-2], num_chunks)
    return (
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(0 if boundary is None else shape, dtype=dtype),
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty((4, math.prod(logits.shape[:-1])), dtype=torch.float64),
    )


OP = Differentiable(
    "chunk_log_likelihood",
    "logits",
    reference.chunk_log_likelihood_op,
    fake=_fake,
    constant=(2,),
    count=3,
    unit=1,
)
