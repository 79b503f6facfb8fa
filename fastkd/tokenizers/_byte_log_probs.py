"""Byte-level probabilities of a model of tokens: the next byte inside a token."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd import reference
from fastkd._ops.checks import check_tensors
from fastkd._ops.constants import fake_mode_of, tensors_of
from fastkd._ops.differentiable import Differentiable
from fastkd.tokenizers._byte_vocab import ByteVocab


def byte_log_probs(
    logits: Tensor,
    vocab: ByteVocab,
    *,
    prefix: bytes | Sequence[Any] = b"",
    valid: Tensor | None = None,
) -> Tensor:
    r"""Log-probability of each next byte inside a token that is known to start with ``prefix``.

    With :math:`q = \mathrm{softmax}(z)`, and :math:`T(x)` the tokens whose bytes start with x:

    .. math:: \text{out}_b = \log \sum_{v \in T(\text{prefix} \cdot b)} q_v
              - \log \sum_{v \in T(\text{prefix})} q_v

    Columns 0 to 255 are the next byte, column 256 is a token that ends at the prefix (``-inf`` for
    the empty one), and columns from 257 on are the classes of special ids (``-inf`` for a non-empty
    prefix). The probabilities of a row sum to 1. ``T(b"")`` is every id of the vocabulary.

    For the empty prefix each row of logits is read once, and its gradient written once; for
    another prefix only the tokens that start with it are read. No ``[257, vocab]`` matrix is
    formed. The result is bitwise the same on any number of threads.

    ``-inf`` logits are probability 0. Entries of probability 0 are ``-inf`` and get no gradient. A
    row with a NaN, ``+inf``, or no possible token that starts with the prefix is NaN.

    Args:
        logits: ``[..., width]`` float32, bfloat16, float16 or float64, any strides; columns from
            ``len(vocab)`` on are ignored.
        vocab: see :class:`fastkd.ByteVocab`.
        prefix: bytes for all rows, or for each row, nested as the leading dimensions.
        valid: bool ``[..., width]``, broadcast to the logits: False excludes an id, as a logit of
            ``-inf`` does.

    Returns:
        ``[..., vocab.num_columns]`` float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: Phan et al. 2024 (arXiv 2410.09303). This is one step of the method;
    :class:`fastkd.ByteStream` is the whole.

    >>> import torch, fastkd
    >>> vocab = fastkd.ByteVocab([b"a", b"ab", b"b", None])
    >>> out = fastkd.byte_log_probs(torch.zeros(4), vocab).exp()
    >>> out[ord("a")].item(), out[ord("b")].item(), out[256].item(), out[257].item()
    (0.5, 0.25, 0.0, 0.25)
    >>> out = fastkd.byte_log_probs(torch.zeros(4), vocab, prefix=b"a").exp()
    >>> out[ord("b")].item(), out[256].item()
    (0.5, 0.5)
    """
    (log_probs,) = OP(logits, given(logits, vocab, {"prefix": prefix, "valid": valid}))
    return log_probs


def given(logits: Tensor, vocab: ByteVocab, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, as the op takes them."""
    prefix, valid = options["prefix"], options["valid"]
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
    device, mode = str(logits.device), fake_mode_of(logits)
    order, columns = _tables(vocab, device, mode)
    if isinstance(prefix, bytes):
        (segments,) = _segments(vocab, prefix, device, mode)
        index, whole = None, 0 if prefix == b"" else -1
    else:
        leading = tuple(logits.shape[:-1])
        segments, index = _segments_of_rows(vocab, prefix, leading, device, mode)
        whole = 0
    return {
        "logits": logits,
        "order": order,
        "columns": columns,
        "segments": segments,
        "prefix": index,
        "whole": whole,
        "valid": valid,
    }


@torch.compiler.assume_constant_result
def _tables(vocab: ByteVocab, device: str, mode: Any) -> tuple[Tensor, ...]:
    return vocab._constants.tensors("tables", device, lambda: (vocab.order, vocab.columns), mode)


@torch.compiler.assume_constant_result
def _segments(vocab: ByteVocab, prefix: bytes, device: str, mode: Any) -> tuple[Tensor, ...]:
    # A tuple: the compiler treats two constant tensors of one function as the same.
    if prefix == b"":
        return vocab._constants.tensors(
            "segments", device, lambda: (vocab.segments(b"")[None],), mode
        )
    return tensors_of((vocab.segments(prefix)[None],), device, mode)


@torch.compiler.assume_constant_result
def _segments_of_rows(
    vocab: ByteVocab, prefixes: Any, leading: tuple[int, ...], device: str, mode: Any
) -> tuple[Tensor, ...]:
    """The segments of distinct prefixes, the empty one first, and each row's index into them."""
    flat = [prefixes]
    for size in leading:
        if size and not all(isinstance(outer, (Sequence, np.ndarray)) for outer in flat):
            break
        flat = [inner for outer in flat for inner in outer] if size else []
    rows = math.prod(leading)
    if len(flat) != rows or any(not isinstance(x, bytes) for x in flat):
        raise ValueError(
            "byte_log_probs: prefix must be bytes, or have bytes for each row, shape "
            f"{list(leading)}, got {len(flat)} of "
            f"{', '.join(sorted({type(x).__name__ for x in flat})) or 'nothing'}"
        )
    segments, index = vocab.segments_of([b"", *flat])
    return tensors_of((segments, index[1:].reshape(leading)), device, mode)


def _fake(logits: Tensor, segments: Tensor, **_: Any) -> tuple[Tensor, ...]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    leading, columns = logits.shape[:-1], segments.size(1)
    return (
        logits.new_empty((*leading, columns), dtype=dtype),
        logits.new_empty((math.prod(leading), columns + 2), dtype=torch.float64),
    )


OP = Differentiable(
    "byte_log_probs",
    "logits",
    lambda **fields: (reference.byte_log_probs_op(**fields),),
    fake=_fake,
)
OP.serves(byte_log_probs, given)
