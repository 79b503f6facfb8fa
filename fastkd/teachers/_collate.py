"""Batches of a stored teacher's sequences: what a training loop or a Trainer reads."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastkd._ops.arguments import to_flag, to_integer
from fastkd._ops.padding import padded, padded_length, positive_or_none
from fastkd._ops.shift import IGNORED, following
from fastkd.teachers._store import TeacherStore
from fastkd.teachers._teacher_topk import TopK, stored_entries

_NAME = "teachers.collate"
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
#: Of an item, or of a batch: the teacher's rows.
COLUMNS = ("teacher_log_probs", "teacher_indices")


def collate(
    items: Iterable[Any],
    *,
    store: TeacherStore | None = None,
    key: str = "key",
    missing: Literal["error", "empty"] = "error",
    pad_id: int = 0,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
    pack: bool = False,
    shift: bool = False,
) -> dict[str, Tensor]:
    """A batch of texts with a stored teacher's rows: a DataLoader's or a Trainer's collator.

    Row t of a text has the teacher's k likeliest tokens at t + 1, as :func:`fastkd.teacher_topk`
    gives them for row t of the teacher's logits. Give the options by :func:`functools.partial`,
    which can be pickled for a DataLoader's workers; each worker opens the store's files itself::

        rows = functools.partial(fastkd.teachers.collate, store=store, shift=True)
        for batch in DataLoader(range(len(store)), 8, shuffle=True, collate_fn=rows, num_workers=2):
            logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            teacher = batch["teacher_log_probs"], batch["teacher_indices"]
            loss = fastkd.topk_divergence(logits, *teacher, mask=batch["mask"])

    The same partial, without ``shift``, is a Trainer's ``data_collator``. Where items have a column
    with keys, the Trainer needs ``remove_unused_columns=False``.

    Args:
        items: a text each, in one of two forms:

            * an integer: the number of a sequence in ``store``. The store must have input ids.
            * a dictionary with ``input_ids`` (integers ``[T]``) and optionally ``labels`` (integers
              ``[T]``, -100 for a token that is no label). The teacher's rows are the item's columns
              ``teacher_log_probs`` and ``teacher_indices`` ``[T, k]`` (fewer than T rows: the last
              tokens have none; ``[]``: no row at all). An item without these columns has its key
              in the column ``key``, and the rows are those of the store's sequence with that key.
              If such an item has no ``input_ids`` either, the store's input ids are taken.

            Where both the item and the store have input ids, the shorter ones must be the beginning
            of the others.
        store: has the rows of integers, and of items without columns of their own.
        key: the item's column with its key in the store. Its entry is a key, also if it is an
            integer (see :class:`fastkd.TeacherStore`).
        missing: what an item whose key is not in the store gives: ``"error"``: KeyError;
            ``"empty"``: a text whose rows have no teacher's tokens.
        pad_id: input id of padding.
        max_length: the most tokens of a text; a longer one is cut off at its end.
        pad_to_multiple_of: the length of the batch is rounded up to a multiple of this.
        pack: True: all texts one behind the other in one row, without padding between them.
            ``position_ids`` begin at 0 in each text. Models of transformers find the texts by that
            if they are called with ``use_cache=False`` and without ``attention_mask`` (checked with
            5.24); with a cache, tokens attend to earlier texts. False: each text in a row of its
            own, padded at its end.
        shift: False: row t has label t, as trainers and losses with ``shift=1`` take labels. True:
            row t has label t + 1, for losses without ``shift``, and the batch has ``mask``.

    Returns:
        a dictionary of tensors, ``[B, T]`` (packed ``[1, total]``):

        ======================  ===================================================================
        ``input_ids``           int64
        ``attention_mask``      int64, 0 for padding; packed: absent
        ``position_ids``        int64; only packed
        ``labels``              int64: the item's, or its input ids; -100 for padding and for a
                                text's first token, which no row scores
        ``teacher_log_probs``   float32 ``[B, T, k]``, -inf where there is no teacher's token
        ``teacher_indices``     int32 ``[B, T, k]``, -1 where there is no teacher's token
        ``mask``                bool, with ``shift``: rows with a label and at least one teacher's
                                token whose log-probability is above -1e4
        ======================  ===================================================================

        k is the largest of the texts'; 1 if no text has a row.

    Raises:
        TypeError, ValueError, IndexError, KeyError: an item or option is not as above, an index is
            not in [-1, 2^31), or a log-probability is NaN or positive. The message names the item,
            what was expected and what came.

    >>> import torch, fastkd
    >>> best = fastkd.teacher_topk(torch.eye(3, 9), 1)
    >>> columns = {"teacher_log_probs": best.log_probs, "teacher_indices": best.indices}
    >>> items = [{"input_ids": [4, 5, 6], **columns}, {"input_ids": [7, 8, 1], **columns}]
    >>> batch = fastkd.teachers.collate(items, max_length=2, shift=True)
    >>> batch["labels"].tolist(), batch["teacher_indices"][0].tolist()
    ([[5, -100], [8, -100]], [[0], [1]])
    >>> batch = fastkd.teachers.collate(items, pack=True)
    >>> batch["position_ids"].tolist(), batch["labels"].tolist()
    ([[0, 1, 2, 0, 1, 2]], [[-100, 5, 6, -100, 8, 1]])
    """
    if store is not None and not isinstance(store, TeacherStore):
        kind = type(store).__name__
        raise TypeError(f"{_NAME}: store must be a fastkd.TeacherStore or None, got {kind}")
    if missing not in ("error", "empty"):
        raise ValueError(f"{_NAME}: missing must be error or empty, got {missing!r}")
    pack, shift = to_flag(_NAME, "pack", pack), to_flag(_NAME, "shift", shift)
    pad_id = to_integer(_NAME, "pad_id", pad_id)
    longest = positive_or_none(_NAME, "max_length", max_length)
    multiple = positive_or_none(_NAME, "pad_to_multiple_of", pad_to_multiple_of) or 1
    if not isinstance(items, Iterable):
        raise TypeError(f"{_NAME}: items must be a sequence, got {type(items).__name__}")
    read = [_read(i, item, store, key, missing == "empty") for i, item in enumerate(items)]
    if not read:
        raise ValueError(f"{_NAME}: items must hold a sequence or more, got none")
    columns: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "position_ids": []}
    for ids, labels, _ in read:
        labels = labels.clone()
        labels[:1] = IGNORED
        columns["input_ids"].append(ids[:longest])
        columns["labels"].append(labels[:longest])
        columns["position_ids"].append(torch.arange(len(ids[:longest])))
    ids_fill = {"input_ids": pad_id, "labels": IGNORED, "position_ids": 0}
    lengths = [len(x) for x in columns["input_ids"]]
    columns["attention_mask"] = [torch.ones(n, dtype=torch.int64) for n in lengths]
    k = max(1, *(best.indices.size(-1) for _, _, best in read))
    wide = [_filled(best, n, k) for (_, _, best), n in zip(read, lengths, strict=True)]
    columns |= {name: [best[i] for best in wide] for i, name in enumerate(COLUMNS)}
    if pack:
        columns = {name: [torch.cat(values)] for name, values in columns.items()}
        lengths = [sum(lengths)]
    length = padded_length(lengths, multiple)
    fills: dict[str, float] = {**ids_fill, "attention_mask": 0, COLUMNS[0]: -torch.inf}
    batch = {name: padded(values, length, fills.get(name, -1)) for name, values in columns.items()}
    if pack:
        del batch["attention_mask"]
        rest = length - lengths[0]
        batch["position_ids"][0, lengths[0] :] = torch.arange(rest)  # padding: a text of its own
    else:
        del batch["position_ids"]
    if shift:
        batch["labels"] = following(batch["labels"], IGNORED)
        best = stored_entries(*(batch[name] for name in COLUMNS)).any(-1)
        batch["mask"] = (batch["labels"] != IGNORED) & best
    return batch


def _read(
    number: int, item: Any, store: TeacherStore | None, key: str, empty: bool
) -> tuple[Tensor, Tensor, TopK]:
    """Input ids, labels and the teacher's rows of an item."""
    where = f"{_NAME}: item {number}"
    if isinstance(item, Mapping):
        sequence: Any = None
        best = _columns(where, item)
        if best is None:
            if store is None or key not in item:
                raise KeyError(
                    f"{where} must have {' and '.join(COLUMNS)}, or a store and the column {key!r}"
                    f" (a Trainer drops it unless remove_unused_columns=False), got "
                    f"{', '.join(map(repr, item))}"
                )
            sequence = item[key]
            if sequence not in store:
                if not empty:
                    raise KeyError(f"{where}: no sequence has the key {sequence!r} in {store.path}")
                sequence = None
                best = TopK(torch.empty(0, store.k), torch.empty(0, store.k, dtype=torch.int32))
        found = item
    elif isinstance(item, (int, np.integer, Tensor)) and not isinstance(item, bool):
        if store is None:
            raise ValueError(f"{where} is a number: it needs store")
        sequence, best, found = to_integer(where, "number", item), None, {}
    else:
        raise TypeError(f"{where} must be a dictionary or a number, got {type(item).__name__}")
    ids = _integers(where, "input_ids", found.get("input_ids"))
    if best is None:
        assert store is not None
        place = sequence if not found else store.find(sequence)
        best = store[place]
        if store.has_input_ids:
            theirs = store.input_ids(place)
            ids = theirs if ids is None else ids
            same = min(len(ids), len(theirs))
            if not torch.equal(ids[:same], theirs[:same]):
                first = int((ids[:same] != theirs[:same]).nonzero()[0])
                raise ValueError(
                    f"{where}: input_ids must be those that the teacher read, {int(theirs[first])} "
                    f"at {first}, got {int(ids[first])}"
                )
    if ids is None:
        raise ValueError(f"{where} must have input_ids, as the store has none")
    if sequence is not None:  # the item may be the text's beginning
        best = TopK(*(x[: len(ids)] for x in best))
    if len(best.indices) > len(ids):
        raise ValueError(
            f"{where}: {COLUMNS[1]} must have at most a row a token, {len(ids)}, got "
            f"{len(best.indices)}"
        )
    labels = _integers(where, "labels", found.get("labels"))
    if labels is None:
        labels = ids
    if len(labels) != len(ids):
        raise ValueError(f"{where}: labels must be one a token, {len(ids)}, got {len(labels)}")
    return ids, labels, best


def _columns(where: str, item: Mapping[str, Any]) -> TopK | None:
    values = [item.get(name) for name in COLUMNS]
    if any(x is None for x in values):
        return None
    log_probs, indices = (_tensor(where, *x) for x in zip(COLUMNS, values, strict=True))
    if log_probs.numel() == indices.numel() == 0:  # [] of a request that failed: k is not known
        return TopK(torch.empty(0, 0), torch.empty(0, 0, dtype=torch.int32))
    if log_probs.dim() != 2 or log_probs.shape != indices.shape:
        raise ValueError(
            f"{where}: {COLUMNS[0]} and {COLUMNS[1]} must both be [T, k], got "
            f"{list(log_probs.shape)} and {list(indices.shape)}"
        )
    if not log_probs.is_floating_point() or indices.dtype not in _INTEGERS:
        raise TypeError(
            f"{where}: {COLUMNS[0]} must be float and {COLUMNS[1]} integers, got "
            f"{log_probs.dtype} and {indices.dtype}"
        )
    indices = indices.long()
    log_probs = log_probs.float().masked_fill(indices == -1, -torch.inf)
    for rule, bad, found in (
        (f"{COLUMNS[1]} must lie in [-1, 2^31)", (indices < -1) | (indices > 2**31 - 1), indices),
        (f"{COLUMNS[0]} must not be NaN or positive", ~(log_probs <= 1e-3), log_probs),
    ):
        if bad.any():
            token, j = bad.nonzero()[0].tolist()
            error = IndexError if found is indices else ValueError
            raise error(f"{where}: {rule}, got {found[token, j].item()} at token {token}")
    return TopK(log_probs, indices.int())


def _tensor(where: str, name: str, values: Any) -> Tensor:
    try:
        return torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{where}: {name} must be a tensor, an array or lists of numbers, got "
            f"{type(values).__name__}: {error}"
        ) from None


def _integers(where: str, name: str, values: Any) -> Tensor | None:
    if values is None:
        return None
    found = _tensor(where, name, values)
    if found.numel() == 0:
        found = found.long()
    if found.dim() != 1 or found.dtype not in _INTEGERS:
        raise ValueError(
            f"{where}: {name} must be integers [T], got {found.dtype} {list(found.shape)}"
        )
    return found.long()


def _filled(best: TopK, tokens: int, k: int) -> TopK:
    """The rows of the first tokens, k wide; -inf and -1 where there are none."""
    log_probs = torch.full((tokens, k), -torch.inf)
    indices = torch.full((tokens, k), -1, dtype=torch.int32)
    some, width = min(tokens, len(best.indices)), best.indices.size(-1)
    log_probs[:some, :width] = best.log_probs[:some]
    indices[:some, :width] = best.indices[:some]
    return TopK(log_probs, indices)
