"""Log-probabilities that servers return, as tensors in fastkd's layout."""

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fastkd._ops.arguments import to_integer
from fastkd.teachers._teacher_topk import TopK

#: (log-probability, token id) of one position, likeliest first; None: the server gave none.
Entries = list[tuple[float, int]] | None


def entry(function: str, log_prob: Any, token: Any) -> tuple[float, int]:
    """One token, checked."""
    try:
        value = float(log_prob)
        number = int(token) if isinstance(token, str) else operator.index(token)
    except (TypeError, ValueError):
        raise TypeError(
            f"{function}: an entry must be a log-probability and a token id, got {log_prob!r} and "
            f"{token!r}"
        ) from None
    if math.isnan(value) or value > 1e-3:
        raise ValueError(f"{function}: a log-probability must be at most 0, got {value}")
    if not 0 <= number < 2**31:
        raise ValueError(f"{function}: a token id must be in [0, 2**31), got {number}")
    return min(value, 0.0), number


def check_k(function: str, k: Any) -> int:
    """How many tokens a row has."""
    k = to_integer(function, "k", k)
    if k < 1:
        raise ValueError(f"{function}: k must be 1 or more, got {k}")
    return k


def packed(function: str, texts: Sequence[Sequence[Entries]], k: int, batched: bool) -> TopK:
    """Rows of texts: row t has the server's tokens of position t + 1; the last has none.

    A whole prompt has no tokens in entry 0. Where there are some, entries are missing before it.
    """
    length = max((len(text) for text in texts), default=0)
    log_probs = torch.full((len(texts), length, k), -math.inf)
    indices = torch.full((len(texts), length, k), -1, dtype=torch.int32)
    for b, text in enumerate(texts):
        if text and text[0]:
            raise ValueError(
                f"{function}: the first entry of a text must be None, as nothing stands before its "
                f"first token, got {len(text[0])} tokens in text {b}: pass a whole prompt's entries"
            )
        for t, entries in enumerate(text[1:]):
            if not entries:
                continue
            kept = entries[:k]
            tokens = [token for _, token in kept]
            if len(set(tokens)) < len(tokens):
                raise ValueError(f"{function}: position {t + 1} has a token twice, {tokens}")
            log_probs[b, t, : len(kept)] = torch.tensor([value for value, _ in kept])
            indices[b, t, : len(kept)] = torch.tensor(tokens, dtype=torch.int32)
    return TopK(log_probs, indices) if batched else TopK(log_probs[0], indices[0])


def check_sequence(function: str, name: str, value: Any) -> Sequence[Any]:
    """A list, not a text or a mapping."""
    if isinstance(value, Iterable) and isinstance(value, Sequence) and not isinstance(value, str):
        return value
    raise TypeError(f"{function}: {name} must be a list, got {type(value).__name__}")
