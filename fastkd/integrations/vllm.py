"""Teachers served by vLLM, by the form of its `prompt_logprobs` (V1 engine, recalled)."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastkd.integrations._served import Entries, check_k, check_sequence, entry, packed
from fastkd.teachers._teacher_topk import TopK

_NAME = "vllm.teacher_topk"


def teacher_topk(prompt_logprobs: Sequence[Any], k: int) -> TopK:
    """A teacher's k likeliest tokens of each position, out of vLLM's ``prompt_logprobs``.

    vLLM's entry i says which tokens could have stood at position i; the first is None. Here row t
    scores the token that follows it, as everywhere in fastkd: row t has entry t + 1, and the last
    row has none. An entry holds k tokens by rank, and one more where the prompt's own token is not
    among them: that one is left out.

    Args:
        prompt_logprobs: of one text (a list of None and dictionaries from token id to vLLM's
            ``Logprob``, or the same as JSON: ids as text, ``{"logprob": ..., "rank": ...}``), or
            a list of such lists, and of None (or ``[]``) for requests that failed. ``[None]`` is a
            text of one token; two or more None and nothing else are failed requests.
        k: tokens of a row, at most what was asked of the server. Fewer are padded.

    Returns:
        :class:`fastkd.TopK`: log_probs float32 and indices int32, ``[T, k]`` or ``[B, T, k]``,
        shorter texts padded at their end; T is the most entries of a text, 0 where all requests
        failed. Where there is nothing, the index is -1: in the last row, for entries that are
        None, and for a request that failed. Rows without tokens must be masked in a loss:
        ``mask=found.indices[..., 0] >= 0``. A :class:`fastkd.TeacherStore` keeps them
        (``append_batch``), and :func:`fastkd.teachers.collate` makes the mask.

    Raises:
        ValueError, TypeError: an entry is not of that form; the first entry of a text has tokens,
            so that the entries are not those of a whole prompt.

    >>> from fastkd.integrations.vllm import teacher_topk
    >>> served = [None, {"7": {"logprob": -0.1, "rank": 1}, "3": {"logprob": -2.5, "rank": 2}}]
    >>> teacher_topk(served, k=2).indices.tolist()
    [[7, 3], [-1, -1]]
    """
    k = check_k(_NAME, k)
    rows = check_sequence(_NAME, "prompt_logprobs", prompt_logprobs)
    failed = len(rows) > 1 and all(row is None for row in rows)
    batched = failed or any(isinstance(row, Sequence) for row in rows)
    texts = (
        [() if x is None else check_sequence(_NAME, "prompt_logprobs", x) for x in rows]
        if batched
        else [rows]
    )
    return packed(_NAME, [[_entries(row, k) for row in text] for text in texts], k, batched)


def _entries(row: Any, k: int) -> Entries:
    if row is None:
        return None
    if not isinstance(row, Mapping):
        raise TypeError(
            f"{_NAME}: an entry must be None or a dictionary by token id, got {type(row).__name__}"
        )
    found = []
    for token, value in row.items():
        log_prob = value if isinstance(value, int | float) else _field(value, "logprob")
        rank = None if isinstance(value, int | float) else _field(value, "rank", None)
        if not isinstance(rank, int | None):
            raise TypeError(f"{_NAME}: a rank must be an integer or None, got {rank!r}")
        if rank is None or rank <= k:
            found.append((rank, *entry(_NAME, log_prob, token)))
    # By rank where there is one: a server rounds log-probabilities.
    found.sort(key=lambda x: (-x[1], x[0] or 0, x[2]))
    return [(value, token) for _, value, token in found]


_REQUIRED = object()


def _field(value: Any, name: str, default: Any = _REQUIRED) -> Any:
    found = (
        value.get(name, default) if isinstance(value, Mapping) else getattr(value, name, default)
    )
    if found is _REQUIRED:
        raise TypeError(f"{_NAME}: a token must have a {name}, got {value!r}")
    return found
