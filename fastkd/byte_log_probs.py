"""Byte-level probabilities of a model of tokens: what follows some bytes inside one token."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import reference
from fastkd._arguments import check_tensors
from fastkd._gradient import differentiable_gradients, gradient_for, memory
from fastkd._library import raise_as_python, transforms_active
from fastkd.byte_vocab import ByteVocab


def byte_log_probs(
    logits: Tensor,
    vocab: ByteVocab,
    *,
    prefix: bytes | Sequence[Any] = b"",
    valid: Tensor | None = None,
) -> Tensor:
    r"""Log-probability of each next byte inside a token that is known to start with ``prefix``.

    With :math:`q = \mathrm{softmax}(z)` and :math:`T(x)` the tokens whose bytes start with x:

    .. math:: \text{out}_b = \log \sum_{v \in T(\text{prefix} \cdot b)} q_v
              - \log \sum_{v \in T(\text{prefix})} q_v

    Columns 0 to 255 are the next byte, column 256 a token that ends at the prefix (``-inf`` for the
    empty one), and from 257 on the classes of special ids (``-inf`` for a non-empty prefix): each
    row of the result sums to 1. ``T(b"")`` is every id of the vocabulary.

    For the empty prefix each row of logits is read once, and its gradient written once; for
    another one only the tokens that start with it are read. No ``[257, vocab]`` matrix is formed.
    The result is the same on any number of threads, bit for bit.

    ``-inf`` logits are probability 0. What is impossible is ``-inf`` and takes no gradient; a row
    with a NaN, ``+inf``, or no possible token that starts with the prefix is NaN.

    Args:
        logits: ``[..., width]`` float32, bfloat16, float16 or float64, any strides; columns from
            ``len(vocab)`` on count nothing.
        vocab: see :class:`fastkd.ByteVocab`.
        prefix: bytes, or one for each row, nested as the leading dimensions are.
        valid: bool ``[..., width]``, broadcast to the logits: False takes an id out, as if its
            logit were ``-inf``.

    Returns:
        ``[..., vocab.num_columns]`` float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: Phan et al. 2024 (arXiv 2410.09303), whose step this is; :class:`fastkd.ByteStream` is
    the whole of it.

    >>> import torch, fastkd
    >>> vocab = fastkd.ByteVocab([b"a", b"ab", b"b", None])
    >>> out = fastkd.byte_log_probs(torch.zeros(4), vocab).exp()
    >>> out[ord("a")].item(), out[ord("b")].item(), out[256].item(), out[257].item()
    (0.5, 0.25, 0.0, 0.25)
    >>> out = fastkd.byte_log_probs(torch.zeros(4), vocab, prefix=b"a").exp()
    >>> out[ord("b")].item(), out[256].item()
    (0.5, 0.5)
    """
    arguments = op_arguments(logits, vocab, prefix, valid)
    if transforms_active():
        return reference.byte_log_probs_op(logits, *arguments)
    try:
        if torch.is_grad_enabled() and logits.requires_grad:
            return _ByteLogProbs.apply(logits, *arguments)
        return torch.ops.fastkd._byte_log_probs(logits, *arguments)[0]
    except RuntimeError as error:
        raise_as_python(error)


def op_arguments(
    logits: Tensor, vocab: ByteVocab, prefix: Any, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int, Tensor | None]:
    """The raw op's arguments after the logits."""
    if not isinstance(vocab, ByteVocab):
        raise TypeError(
            f"byte_log_probs: vocab must be a fastkd.ByteVocab, got {type(vocab).__name__}"
        )
    tensors = {"logits": logits} if valid is None else {"logits": logits, "valid": valid}
    check_tensors("byte_log_probs", tensors)
    if valid is not None:
        try:
            valid = valid.expand(logits.shape)
        except RuntimeError as error:
            raise ValueError(
                f"byte_log_probs: valid must have logits' shape {list(logits.shape)} or broadcast "
                f"to it, got shape {list(valid.shape)}"
            ) from error
    order, columns = _tables(vocab, str(logits.device))
    if isinstance(prefix, bytes):
        (segments,), whole = (
            _segments(vocab, prefix, str(logits.device)),
            0 if prefix == b"" else -1,
        )
        index = None
    else:
        segments, index, whole = _segments_of_rows(
            vocab, prefix, tuple(logits.shape[:-1]), str(logits.device)
        )
    return order, columns, segments, index, whole, valid


def _cached(vocab: ByteVocab, key: Any, make: Any) -> Any:
    """Tensors of a vocabulary, which never changes, made once."""
    kept = vocab.__dict__.setdefault("_tensors", {})
    if key not in kept:
        kept[key] = make()
    return kept[key]


@torch.compiler.assume_constant_result
def _tables(vocab: ByteVocab, device: str) -> tuple[Tensor, Tensor]:
    return _cached(
        vocab,
        device,
        lambda: tuple(torch.tensor(x, device=device) for x in (vocab.order, vocab.columns)),
    )


@torch.compiler.assume_constant_result
def _segments(vocab: ByteVocab, prefix: bytes, device: str) -> tuple[Tensor]:
    # A tuple: the compiler takes two constant tensors of one function for the same.
    def make() -> tuple[Tensor]:
        return (torch.tensor(vocab.segments(prefix)[None], device=device),)

    return _cached(vocab, device + "-whole", make) if prefix == b"" else make()


@torch.compiler.assume_constant_result
def _segments_of_rows(
    vocab: ByteVocab, prefixes: Any, leading: tuple[int, ...], device: str
) -> tuple[Tensor, Tensor, int]:
    """The segments of distinct prefixes, which of them each row has, and which is the empty one."""
    flat = list(prefixes)
    for size in leading[:-1]:
        flat = [inner for outer in flat for inner in outer] if size else []
    rows = math.prod(leading)
    if len(flat) != rows or any(not isinstance(x, bytes) for x in flat):
        raise ValueError(
            "byte_log_probs: prefix must be bytes, or have bytes for each row, shape "
            f"{list(leading)}, got {len(flat)} of "
            f"{', '.join(sorted({type(x).__name__ for x in flat})) or 'nothing'}"
        )
    segments, index = vocab.segments_of(flat)
    whole = next((int(i) for i, x in zip(index, flat, strict=True) if x == b""), -1)
    if not rows:
        segments = vocab.segments(b"")[None]
    return (
        torch.tensor(segments, device=device),
        torch.tensor(index, device=device).view(leading),
        whole,
    )


class _ByteLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        order: Tensor,
        columns: Tensor,
        segments: Tensor,
        prefix: Tensor | None,
        whole: int,
        valid: Tensor | None,
    ) -> Tensor:
        out, sums = torch.ops.fastkd._byte_log_probs(
            logits, order, columns, segments, prefix, whole, valid
        )
        ctx.save_for_backward(logits, order, columns, segments, prefix, valid, sums)
        ctx.whole = whole
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        logits, *tables, prefix, valid, sums = ctx.saved_tensors
        arguments = (*tables, prefix, ctx.whole, valid)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            log_probs = reference.byte_log_probs_op(logits, *arguments)
            (gradient,) = differentiable_gradients(log_probs, [logits], [True], grad_output)
        else:
            gradient = gradient_for(logits)
            torch.ops.fastkd._byte_log_probs_backward(
                gradient, logits, *arguments, sums, grad_output.contiguous()
            )
            memory.keep(gradient)
        return gradient, None, None, None, None, None, None


@torch.library.register_fake("fastkd::_byte_log_probs")
def _(
    logits: Tensor, order: Tensor, columns: Tensor, segments: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        logits.new_empty((*logits.shape[:-1], segments.size(1)), dtype=dtype),
        logits.new_empty((logits.shape[:-1].numel(), segments.size(1) + 1), dtype=torch.float64),
    )


@torch.library.register_fake("fastkd::_byte_log_probs_backward")
def _(*_: Any) -> None:
    return None
