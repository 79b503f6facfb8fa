"""Statistics of each row, from the logits of a chunk before a loss overwrites them."""

import math
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.linear.call import OPS, Call
from fastkd._ops.linear.logits import softcapped
from fastkd._ops.linear.rows import ChunkedRows, RowResult

#: Rows whose capped logits are stored at a time.
_SLICE = 16


class RowStats:
    """The results of token_stats of the rows that a loss reads, 0 in the others."""

    def __init__(self, call: Call, rows: ChunkedRows) -> None:
        self.call, self.rows = call, rows
        self.op = OPS["token_stats"]
        numbers, argmax = shapes(call)
        self.numbers = torch.zeros_like(numbers)
        self.argmax = torch.full_like(argmax, -1)
        leading = len(rows.leading)
        self._numbers = RowResult(self.numbers, 1, leading, rows.index)
        self._argmax = RowResult(self.argmax, 1, leading, rows.index)
        self.labels = rows.get("labels") is not None
        self.capped = [
            (name, cap)
            for name in ("student", "teacher")
            if (cap := call.value(f"{name}_logit_softcap")) not in (None, math.inf)
        ]

    def add(self, values: list[Any], first: int, last: int) -> None:
        """Take a chunk: the loss's arguments of it."""
        named = dict(zip(self.call.op.arguments.fields, values, strict=False))
        student, teacher = named["student_logits"], _teacher(named)
        unread = self.rows.unread(first, last)
        labels = named.get("labels")
        if labels is not None:
            labels = torch.where(labels == named["ignore_index"], -100, labels)
            if unread is not None:
                labels = labels.masked_fill(unread.squeeze(-1), -100)
        temperatures = named.get("temperatures")
        step = _SLICE if self.capped and self.call.shards is None else last - first
        parts = []
        for begin in range(0, last - first, max(1, step)):
            at = slice(begin, begin + step)
            sides = {"student": student[at], "teacher": None if teacher is None else teacher[at]}
            given = {
                "student_logits": sides["student"],
                "teacher_logits": sides["teacher"],
                "labels": None if labels is None else labels[at],
                "temperature": named["temperature"],
                "temperatures": None if temperatures is None else temperatures[at],
                "vocab_size": named["vocab_size"],
            }
            parts.append(self._numbers_of(given))
        numbers = torch.cat([x for x, _ in parts], 1)
        argmax = torch.cat([x for _, x in parts], 1)
        if unread is not None:
            numbers = numbers.masked_fill(unread.mT, 0)
            argmax = argmax.masked_fill(unread.mT, -1)
        self._numbers.put(first, last, numbers)
        self._argmax.put(first, last, argmax)

    def _numbers_of(self, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The results of token_stats of some rows."""
        shards, arguments = self.call.shards, self.op.arguments
        if shards is not None:
            caps = {f"{side}_logit_softcap": cap for side, cap in self.capped}
            return self.op.sharded(self.op, {**given, **caps}, shards, False)
        for side, cap in self.capped:
            if given[f"{side}_logits"] is not None:
                given[f"{side}_logits"] = softcapped(given[f"{side}_logits"], cap)
        return self.op.raw()(*arguments.eager([given[name] for name in arguments.fields]))

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The results of token_stats."""
        return self.numbers, self.argmax


def _teacher(named: dict[str, Any]) -> Any:
    """The only teacher's logits, None where there are several or none."""
    teachers = named.get("teacher_logits")
    if isinstance(teachers, (list, tuple)):
        return teachers[0] if len(teachers) == 1 else None
    return teachers


def shapes(call: Call) -> tuple[Tensor, Tensor]:
    """Uninitialised results of token_stats for a loss's call."""
    named = dict(zip(call.op.arguments.fields, call.packed, strict=False))
    return OPS["token_stats"].fake(named["student_logits"], _teacher(named))
