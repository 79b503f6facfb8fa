"""Log-likelihoods of chunks: runs of tokens that cover the same bytes for two tokenizers."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastkd import reference
from fastkd._arguments import check_tensors
from fastkd._gradient import differentiable_gradients, gradient_for, memory
from fastkd._library import raise_as_python, transforms_active


class ChunkLogLikelihood(NamedTuple):
    """What a model says of each chunk, ``[..., num_chunks]``. Logarithms are natural."""

    #: Sum of the log-probabilities of the chunk's tokens; 0 for a chunk without tokens.
    log_likelihood: Tensor
    #: Log-probability that the token after the chunk is one of the boundary set; 0 where no row
    #: scores that token (the chunk ends the text) or the chunk has no tokens.
    boundary_log_prob: Tensor | None
    #: int64, tokens in the chunk.
    token_count: Tensor


def chunk_log_likelihood(
    logits: Tensor,
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

    with :math:`t_c` the chunk's last token. Row t of the logits scores token t: of a causal model
    pass ``logits[:, :-1]`` with the ids ``[:, 1:]`` and the chunks ``[:, 1:]``.

    Each row of logits that is needed is read once (the backward pass reads it again and writes its
    gradient); rows of tokens in no chunk are not read, add nothing, and get a zero gradient even
    where they hold NaN. No ``[tokens, chunks]`` matrix is formed. ``-inf`` logits are probability
    0; a row with a NaN or without a finite logit makes the chunks that need it NaN.

    Args:
        logits: ``[..., T, vocab]`` float32, bfloat16, float16 or float64, any strides.
        token_ids: ``[..., T]`` int64 or int32. Ids of tokens in no chunk are not looked at.
        chunk_ids: ``[..., T]`` int64 or int32: -1 for none, else a chunk. The tokens of a chunk
            are neighbours and chunks ascend, as :func:`fastkd.align` gives them.
        num_chunks: how many chunks a text may have.
        boundary: bool ``[vocab]``, a tensor or an array, for instance
            :meth:`fastkd.ByteVocab.boundary`. A set without a possible token has log-probability
            ``-inf``, which takes no gradient.
        temperature: positive.

    Returns:
        :class:`ChunkLogLikelihood`, float32 (float64 for float64 logits).

    Raises:
        IndexError: a chunk or token id out of range (on CUDA such a text is NaN instead).
        ValueError, TypeError: chunks whose tokens are no neighbours, or another argument of the
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
    tensors = {"logits": logits, "token_ids": token_ids, "chunk_ids": chunk_ids}
    check_tensors("chunk_log_likelihood", tensors)
    if boundary is not None:
        if isinstance(boundary, np.ndarray):
            boundary = torch.tensor(boundary, device=logits.device)
        check_tensors("chunk_log_likelihood", {"boundary": boundary})
        boundary = boundary.contiguous()
    arguments = (token_ids, chunk_ids, num_chunks, boundary, float(temperature))
    if transforms_active():
        return ChunkLogLikelihood(*reference.chunk_log_likelihood_op(logits, *arguments))
    try:
        if torch.is_grad_enabled() and logits.requires_grad:
            likelihood, boundary_log_prob, count = _ChunkLogLikelihood.apply(logits, *arguments)
        else:
            likelihood, boundary_log_prob, count, _ = torch.ops.fastkd._chunk_log_likelihood(
                logits, *arguments
            )
    except RuntimeError as error:
        raise_as_python(error)
    return ChunkLogLikelihood(likelihood, None if boundary is None else boundary_log_prob, count)


class _ChunkLogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        token_ids: Tensor,
        chunk_ids: Tensor,
        num_chunks: int,
        boundary: Tensor | None,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        likelihood, boundary_log_prob, count, numbers = torch.ops.fastkd._chunk_log_likelihood(
            logits, token_ids, chunk_ids, num_chunks, boundary, temperature
        )
        ctx.save_for_backward(logits, token_ids, chunk_ids, boundary, numbers)
        ctx.num_chunks, ctx.temperature = num_chunks, temperature
        ctx.mark_non_differentiable(count)
        return likelihood, boundary_log_prob, count

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        of_likelihood, of_boundary, _ = grad_outputs
        logits, token_ids, chunk_ids, boundary, numbers = ctx.saved_tensors
        arguments = (token_ids, chunk_ids, ctx.num_chunks, boundary, ctx.temperature)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            likelihood, boundary_log_prob, _ = reference.chunk_log_likelihood_op(logits, *arguments)
            outputs, grads = [likelihood], [of_likelihood]
            if boundary_log_prob is not None:
                outputs, grads = [likelihood, boundary_log_prob], [of_likelihood, of_boundary]
            (gradient,) = differentiable_gradients(outputs, [logits], [True], grads)
            return gradient, None, None, None, None, None
        gradient = gradient_for(logits)
        torch.ops.fastkd._chunk_log_likelihood_backward(
            gradient,
            logits,
            *arguments,
            numbers,
            of_likelihood.contiguous(),
            None if boundary is None else of_boundary.contiguous(),
        )
        memory.keep(gradient)
        return gradient, None, None, None, None, None


@torch.library.register_fake("fastkd::_chunk_log_likelihood")
def _(
    logits: Tensor, token_ids: Tensor, chunk_ids: Tensor, num_chunks: int, boundary: Any, *_: Any
) -> tuple[Tensor, ...]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    shape = (*logits.shape[:-2], num_chunks)
    return (
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(0 if boundary is None else shape, dtype=dtype),
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty((4, logits.shape[:-1].numel()), dtype=torch.float64),
    )


@torch.library.register_fake("fastkd::_chunk_log_likelihood_backward")
def _(*_: Any) -> None:
    return None
