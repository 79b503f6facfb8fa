"""Teachers served by SGLang, by the form of its `meta_info` (recalled)."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastkd.integrations._served import Entries, check_k, check_sequence, entry, packed
from fastkd.teachers._teacher_topk import TopK

_NAME = "sglang.teacher_topk"


def teacher_topk(meta_info: Mapping[str, Any] | Sequence[Mapping[str, Any] | None], k: int) -> TopK:
    """A teacher's k likeliest tokens of each position, out of SGLang's ``input_top_logprobs``.

    Ask for them by ``return_logprob``, ``logprob_start_len=0`` and ``top_logprobs_num=k``. Entry i
    says which tokens could have stood at position i, as triples of log-probability, token id and
    text; the first is None. Here row t has entry t + 1, and the last row has none.

    Args:
        meta_info: of one answer, or a list of them, and of None for requests that failed. Where it
            has ``prompt_tokens``, there must be as many entries: a larger ``logprob_start_len``
            leaves entries out.
        k: tokens of a row, at most what was asked of the server. Fewer are padded.

    Returns:
        :class:`fastkd.TopK`, as :func:`fastkd.integrations.vllm.teacher_topk`.

    Raises:
        ValueError, TypeError: an entry is not of that form; the entries are not those of a whole
            prompt.

    >>> from fastkd.integrations.sglang import teacher_topk
    >>> meta = {"input_top_logprobs": [None, [[-0.1, 7, None], [-2.5, 3, None]]]}
    >>> teacher_topk(meta, k=2).indices.tolist()
    [[7, 3], [-1, -1]]
    """
    k = check_k(_NAME, k)
    single = isinstance(meta_info, Mapping)
    answers = [meta_info] if single else check_sequence(_NAME, "meta_info", meta_info)
    texts: list[list[Entries]] = []
    for answer in answers:
        if answer is None and not single:
            texts.append([])
            continue
        if not isinstance(answer, Mapping) or "input_top_logprobs" not in answer:
            found = sorted(answer) if isinstance(answer, Mapping) else type(answer).__name__
            raise ValueError(
                f"{_NAME}: meta_info must have input_top_logprobs (return_logprob, "
                f"top_logprobs_num), got {found}"
            )
        rows = check_sequence(_NAME, "input_top_logprobs", answer["input_top_logprobs"])
        tokens = answer.get("prompt_tokens", len(rows))
        if len(rows) != tokens:
            raise ValueError(
                f"{_NAME}: input_top_logprobs must have an entry for each of the {tokens} "
                f"prompt_tokens (logprob_start_len=0), got {len(rows)}; pass None for a request "
                "that failed"
            )
        texts.append([_entries(row) for row in rows])
    return packed(_NAME, texts, k, not single)


def _entries(row: Any) -> Entries:
    if row is None:
        return None
    found = []
    for token in check_sequence(_NAME, "an entry of input_top_logprobs", row):
        values = check_sequence(_NAME, "a token", token)
        if len(values) < 2:
            raise TypeError(f"{_NAME}: a token must be [log-probability, id, text], got {token!r}")
        found.append(entry(_NAME, values[0], values[1]))
    return sorted(found, key=lambda x: (-x[0], x[1]))
