"""Log-likelihoods of chunks: runs of tokens that cover the same bytes in two tokenizations."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastkd import reference
from fastkd._ops.arguments import can_be_read, check_tensor, to_integer
from fastkd._ops.differentiable import Differentiable
from fastkd._ops.dtensor import is_dtensor, rows_of_dtensors
from fastkd._ops.linear.logits import LinearLogits, check_logits
from fastkd._ops.shard_softmax import SoftmaxCall, possible
from fastkd._ops.shards import Shards, dtype_of, poisoned, shards_of, table


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
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
) -> ChunkLogLikelihood:
    r"""Log-likelihood of every chunk of tokens, and of a token boundary after it, from one read.

    With :math:`q_t = \mathrm{softmax}(z_t / \tau)` and chunk c the tokens t with ``chunk_ids`` c:

    .. math:: \ell_c = \sum_{t \in c} \log q_t(\text{token}_t), \qquad
              b_c = \log \sum_{v \in \text{boundary}} q_{t_c + 1}(v)

    with :math:`t_c` the chunk's last token. Row t of the logits scores token t: for a causal model
    pass ``logits[:, :-1]`` with the ids ``[:, 1:]`` and the chunks ``[:, 1:]``. A chunk with the
    text's first token, which no row scores, then lacks it.

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
        group: the vocabulary is split across this process group, see
            :func:`fastkd.softmax_divergence`, as for DTensors.
            Ids and ``boundary`` are those of the whole vocabulary. One all-gather of 12 bytes a
            row, 20 with ``boundary``.
        vocab_start: with ``group``, the first of this process's columns.
        vocab_size: only the first ``vocab_size`` columns are used.

    Returns:
        :class:`ChunkLogLikelihood`, float32 (float64 for float64 logits).

    Raises:
        IndexError: a chunk or token id out of range (on CUDA such a text is NaN instead).
        ValueError, TypeError: chunks whose tokens are not contiguous, or another argument of the
            wrong value or type.
        NotImplementedError: ``torch.func`` transforms and batches of gradients with ``group``.

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
    if is_dtensor(logits):
        options = {
            "temperature": temperature,
            "group": group,
            "vocab_start": vocab_start,
            "vocab_size": vocab_size,
        }
        others = {"token_ids": token_ids, "chunk_ids": chunk_ids}
        whole = {"num_chunks": num_chunks, "boundary": boundary}
        return rows_of_dtensors(chunk_log_likelihood, logits, others, options, whole)
    check_logits(function, "logits", logits)
    if boundary is not None:
        if isinstance(boundary, np.ndarray):
            boundary = torch.tensor(boundary, device=logits.device)
        check_tensor(function, "boundary", boundary)
        boundary = boundary.contiguous()
    given = {
        "logits": logits,
        "token_ids": token_ids,
        "chunk_ids": chunk_ids,
        "num_chunks": num_chunks,
        "boundary": boundary,
        "temperature": temperature,
    }
    shards = shards_of(function, logits, group, vocab_start, vocab_size)
    if shards is None:
        width = logits.size(-1) if logits.dim() else 0
        size = width if vocab_size is None else to_integer(function, "vocab_size", vocab_size)
        if not 0 <= size <= width:
            raise ValueError(f"{function}: vocab_size is {size}, logits has {width} columns")
        if size < width:
            given["logits"] = logits = _narrowed(logits, size)
    likelihood, boundary_log_prob, count = OP(logits, given, shards=shards)
    return ChunkLogLikelihood(likelihood, None if boundary is None else boundary_log_prob, count)


def _narrowed(logits: Tensor | LinearLogits, size: int) -> Tensor | LinearLogits:
    """The logits of the first tokens."""
    if not isinstance(logits, LinearLogits):
        return logits[..., :size]
    bias = None if logits.bias is None else logits.bias[:size]
    return logits.replaced(logits.hidden, logits.weight[:size], bias)


def _sharded(
    op: Differentiable, values: dict[str, Any], shards: Shards, inplace: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The likelihoods of columns split across processes."""
    function, logits, boundary = shards.function, values["logits"], values["boundary"]
    for name in ("token_ids", "chunk_ids"):
        ids = values[name]
        check_tensor(function, name, ids)
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{function}: {name} must be int64 or int32, got {ids.dtype}")
        if logits.dim() < 2 or ids.shape != logits.shape[:-1]:
            raise ValueError(
                f"{function}: {name} must have one entry a row, shape {list(logits.shape[:-1])}, "
                f"got shape {list(ids.shape)}"
            )
    if boundary is not None and (boundary.dtype != torch.bool or boundary.shape != (shards.vocab,)):
        raise ValueError(
            f"{function}: boundary must be bool of shape [{shards.vocab}], that of the vocabulary, "
            f"got {boundary.dtype} of shape {list(boundary.shape)}"
        )
    chunks_in_all, temperature = values["num_chunks"], values["temperature"]
    if not torch.compiler.is_compiling() and not 0 < temperature < math.inf:
        raise ValueError(f"{function}: temperature must be positive and finite, got {temperature}")
    tokens, chunks = values["token_ids"].long(), values["chunk_ids"].long()
    before = torch.cat([torch.full_like(chunks[..., :1], -1), chunks[..., :-1]], -1)
    scored = chunks >= 0
    _check_chunks(shards, tokens, chunks, before, chunks_in_all)
    ended = (before >= 0) & (before != chunks) & (boundary is not None)
    read = (scored | ended).reshape(-1)
    base = table(read.numel(), logits, read, temperature, temperature, math.inf)
    columns = None
    if boundary is not None:
        columns = boundary[shards.start : shards.start + shards.columns].contiguous()
    call = SoftmaxCall(shards, second=boundary is not None, token=True)
    ids = shards.local(torch.where(scored, tokens, -1).reshape(-1))
    found, lost = call.numbers(logits, base, ids, columns).split()
    assert found.token_logit is not None
    dtype, shape = dtype_of(logits), (*logits.shape[:-2], chunks_in_all)
    in_range = ((tokens >= 0) & (tokens < shards.vocab)).reshape(-1)
    token = torch.where(in_range, found.token_logit, math.nan)

    def summed(values: Tensor, where: Tensor, of: Tensor) -> Tensor:
        """Sums by chunk; those of no chunk go to an entry more, which is dropped."""
        of = torch.where(where & (of >= 0) & (of < chunks_in_all), of, chunks_in_all)
        of = of.reshape(-1, of.size(-1))
        out = values.new_zeros((of.size(0), chunks_in_all + 1))
        rows = torch.arange(of.size(0), device=of.device).unsqueeze(1).expand_as(of)
        # Unlike scatter_add, this adds in a fixed order on a GPU, too.
        out = out.index_put((rows, of), values.reshape(of.shape), accumulate=True)
        return out[:, :-1].reshape(shape)

    of_tokens = _at_most_0(possible(token) / temperature - found.log_sum)
    of_tokens = torch.where(scored.reshape(-1), poisoned(of_tokens, lost), 0.0)
    likelihood = summed(of_tokens, scored, chunks).to(dtype)
    count = summed(scored.reshape(-1).long(), scored, chunks)
    if found.second_log_sum is None:
        return likelihood, None, count
    mass, second_origin = found.second_log_sum, found.second_origin
    assert second_origin is not None
    below = second_origin - found.origin
    none = (mass == -math.inf) | (possible(below) == -math.inf)
    log_prob = (mass + below / temperature).masked_fill(none, 0) - found.log_sum
    log_prob = _at_most_0(log_prob.masked_fill(none, -math.inf))
    log_prob = torch.where(ended.reshape(-1), poisoned(log_prob, lost), 0.0)
    return likelihood, summed(log_prob, ended, before).to(dtype), count


def _at_most_0(log_prob: Tensor) -> Tensor:
    """Without what rounding exceeds 0 by."""
    return log_prob - log_prob.detach().clamp(min=0)


def _check_chunks(
    shards: Shards, tokens: Tensor, chunks: Tensor, before: Tensor, num_chunks: int
) -> None:
    """Raise as the raw op does, where values can be read without waiting for a device."""
    function = shards.function
    if num_chunks < 0:
        raise ValueError(f"{function}: num_chunks must not be negative, got {num_chunks}")
    if not can_be_read(chunks) or not chunks.numel():
        return
    earlier = torch.cat(
        [torch.full_like(chunks[..., :1], -1), chunks.cummax(-1).values[..., :-1]], -1
    )
    scored = chunks >= 0
    wrong = [
        (
            f"chunk_ids must lie in [-1, num_chunks = {num_chunks})",
            IndexError,
            chunks,
            (chunks < -1) | (chunks >= num_chunks),
        ),
        (
            "chunk_ids must ascend, with the tokens of a chunk contiguous",
            ValueError,
            chunks,
            scored & (chunks != before) & (chunks <= earlier),
        ),
        (
            f"token_ids must lie in [0, {shards.vocab})",
            IndexError,
            tokens,
            scored & ((tokens < 0) | (tokens >= shards.vocab)),
        ),
    ]
    for message, kind, values, where in wrong:
        if bool(where.any()):
            row = int(where.reshape(-1).nonzero()[0])
            raise kind(f"{function}: {message}, got {int(values.reshape(-1)[row])} in row {row}")


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
OP.sharded = _sharded
