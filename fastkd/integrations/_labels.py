"""Labels of token ids, as losses and trainers take them."""

from typing import Any

import torch
from torch import Tensor

from fastkd._ops.arguments import can_be_read, to_flag, to_integer
from fastkd._ops.shift import IGNORED, following

_NAME = "labels_of"


def labels_of(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    prompt_length: int | Tensor | None = None,
    position_ids: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = IGNORED,
) -> Tensor:
    """The label of each row of a causal model's logits: the token after it, where that counts.

    Args:
        input_ids: int64 or int32 ``[..., T]``.
        attention_mask: bool or integers, the same shape: 0 for padding, which is no label.
        prompt_length: number of a text's first tokens, not counting padding before them, that are
            no labels: one for all texts, or integers ``[...]``, one a text. Not negative.
        position_ids: the same shape, of several texts in one row (packing): where they do not
            ascend by 1 a text begins, and its first token is no label of the text before.
        shift: True: row t has token t + 1, and the last row nothing, for losses without ``shift``.
            False: row t has token t, as trainers take labels, and losses with ``shift=1``.
        ignore_index: where there is no label.

    Returns:
        int64, the shape of ``input_ids``.

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    >>> import torch
    >>> from fastkd.integrations import labels_of
    >>> ids, mask = torch.tensor([[5, 6, 7, 0]]), torch.tensor([[1, 1, 1, 0]])
    >>> labels_of(ids, mask).tolist(), labels_of(ids, mask, prompt_length=2).tolist()
    ([[6, 7, -100, -100]], [[-100, 7, -100, -100]])
    >>> labels_of(ids, mask, shift=False).tolist()
    [[-100, 6, 7, -100]]
    """
    _check(input_ids, "input_ids", None)
    shift = to_flag(_NAME, "shift", shift)
    ignore_index = to_integer(_NAME, "ignore_index", ignore_index)
    kept = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        _check(attention_mask, "attention_mask", input_ids.shape)
        kept = attention_mask != 0
    number = kept.cumsum(-1)  # 1 for a text's first token
    first = number == 1
    if position_ids is not None:
        _check(position_ids, "position_ids", input_ids.shape)
        before = position_ids.roll(1, -1)
        first = first | (position_ids != before + 1)
        if prompt_length is not None:
            raise ValueError(f"{_NAME}: prompt_length must be None with position_ids")
    if prompt_length is not None:
        if isinstance(prompt_length, Tensor):
            _check(prompt_length, "prompt_length", input_ids.shape[:-1])
            readable = can_be_read(prompt_length) and prompt_length.numel() > 0
            least = int(prompt_length.amin()) if readable else 0
            prompt_length = prompt_length.unsqueeze(-1)
        else:
            least = prompt_length = to_integer(_NAME, "prompt_length", prompt_length)
        if least < 0:
            raise ValueError(f"{_NAME}: prompt_length must not be negative, got {least}")
        first = first | (number <= prompt_length)
    labels = torch.where(kept & ~first, input_ids.long(), ignore_index)
    return following(labels, ignore_index) if shift else labels


def _check(values: Any, name: str, shape: torch.Size | None) -> None:
    integers = isinstance(values, Tensor) and not (
        values.is_floating_point() or values.is_complex()
    )
    if not integers or (values.dtype == torch.bool and name != "attention_mask"):
        found = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{_NAME}: {name} must be a tensor of integers, got {found}")
    if shape is None and not values.dim():
        raise ValueError(f"{_NAME}: {name} must be [..., T], got a 0-d tensor")
    if shape is not None and values.shape != shape:
        raise ValueError(f"{_NAME}: {name} must be {list(shape)}, got {list(values.shape)}")
