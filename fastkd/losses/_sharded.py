"""Losses over rows whose vocabulary is split across processes.

A loss's numbers a row are autograd Functions with two collectives (fastkd/_ops/shards.py); weights,
label terms and reductions are plain PyTorch on one number a row, the same on every process. The
gradient that a Function returns is that of this process's columns: nothing more is reduced.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._ops import shards as ops
from fastkd._ops.arguments import CHOICES, can_be_read
from fastkd._ops.shards import Merged, Shards, table

_ELEMENTS = 1 << 18  # of the rows of a chunk
REDUCTIONS = tuple(CHOICES["softmax_divergence.reduction"])


class LossRows:
    """The options of a loss over rows: rows that are read, weights, labels, the reduction."""

    def __init__(
        self,
        shards: Shards,
        logits: Tensor,
        values: dict[str, Any],
        *others: Tensor,
        labels: str = "labels",
    ) -> None:
        self.shards, self.values = shards, values
        #: Of the result.
        self.dtype = ops.dtype_of(logits, *others)
        self.logits = logits
        self.leading = logits.shape[:-1]
        self.count = 1
        for size in self.leading:
            self.count *= size
        self.shift = values.get("shift", 0)
        within = torch.ones(self.leading, dtype=torch.bool, device=logits.device)
        if not (isinstance(self.shift, int) and self.shift == 0):
            places = torch.arange(self.leading[-1], device=logits.device)
            within = within & (places < self.leading[-1] - self.shift)
        self.within = within.reshape(-1)
        kept = self.within
        mask = values.get("mask")
        if mask is not None:
            kept = kept & self.flat(mask)
        taught = values.get("teacher_rows")
        if taught is not None:
            kept = kept & (taught.reshape(-1) >= 0)
        given, ignored = values.get(labels), values.get("ignore_index", -100)
        self.labels = None
        if given is not None:
            ids = self.flat(given).to(torch.int64)
            kept = kept & (ids != ignored)
            self.labels = torch.where(kept, ids, -1)
            self._check_labels(labels, kept, ids, ignored)
        #: The rows that the mean counts.
        self.kept = kept
        weight = values.get("weight")
        self.weight = None if weight is None else self.flat(weight).to(torch.float64)
        #: The rows that are read.
        self.read = kept if self.weight is None else kept & (self.weight != 0)

    def flat(self, x: Tensor) -> Tensor:
        """One number a row, that of the row that the shift refers to."""
        if not (isinstance(self.shift, int) and self.shift == 0):
            x = x.roll(-self.shift, -1)
        return x.reshape(-1)

    def _check_labels(self, name: str, kept: Tensor, ids: Tensor, ignored: Any) -> None:
        if not can_be_read(ids) or not ids.numel():
            return
        wrong = kept & ((ids < 0) | (ids >= self.shards.vocab))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise IndexError(
                f"{self.shards.function}: {name} must lie in [0, {self.shards.vocab}) or be "
                f"ignore_index {ignored}, got {int(ids[row])} in row {row}"
            )

    def chunks(self) -> list[slice]:
        """A few rows at a time, for losses that copy logits to float64."""
        step = max(1, _ELEMENTS // max(self.shards.columns, 1))
        if torch.compiler.is_compiling():  # the number of chunks would be one of the graph
            step = max(self.count, 1)
        return [slice(begin, begin + step) for begin in range(0, self.count, step)]

    def number(self, name: str, *, shifted: bool = False) -> Any:
        """A number, or one a row."""
        each = self.values.get(f"{name}s")
        if each is None:
            return self.values[name]
        each = self.flat(each) if shifted else each.reshape(-1)
        return each.to(torch.float64)

    def column(self, name: str) -> Tensor:
        """The same as one a row. 1 for rows that are not read."""
        one = torch.ones(self.count, dtype=torch.float64, device=self.logits.device)
        return torch.where(self.read, one * self.number(name), 1.0)

    def token_ids(self) -> Tensor:
        """The labels as columns of this process, -1 for none."""
        if self.labels is None:
            return torch.full((self.count,), -1, dtype=torch.int64, device=self.logits.device)
        return self.shards.local(self.labels)

    def owned(self, token_logits: Tensor) -> Tensor:
        """NaN for labels that no process has, which are not checked on CUDA."""
        assert self.labels is not None
        some = (self.labels >= 0) & (self.labels < self.shards.vocab)
        return torch.where(some, token_logits, torch.nan)

    def divided(self, losses: Tensor) -> Tensor:
        """The reduction of float64 losses [rows], before their weights."""
        values = self.values
        if self.weight is not None:
            losses = losses * torch.where(self.read, self.weight, 0.0)
        losses = torch.where(self.read, losses, 0.0)
        reduction = REDUCTIONS[values["reduction"]]
        if reduction == "none":
            return losses.reshape(self.leading).to(self.dtype)
        if values["normalizer"] is not None:
            divisor = values["normalizer"]
        elif reduction == "mean":
            divisor = self.kept.sum()
        elif reduction == "batchmean":
            divisor = self.logits.size(0)
        elif reduction == "elementmean":
            divisor = self.within.sum() * self.shards.vocab
        else:
            divisor = values["denominator"]
        one = torch.ones((), dtype=torch.float64, device=losses.device)
        divisor = one * divisor
        empty = divisor == 0
        return torch.where(empty, 0, losses.sum() / torch.where(empty, 1, divisor)).to(self.dtype)


def label_term(weight: Any, loss: Tensor) -> Tensor:
    """weight x loss; 0 where the weight is 0, also of an infinite loss."""
    weight = torch.ones_like(loss) * weight
    return torch.where(weight == 0, 0.0, weight * torch.where(weight == 0, 0.0, loss))


def has_labels(rows: LossRows) -> bool:
    """Whether there is a label's term. The rows' numbers are not looked at."""
    weight = rows.number("label_weight")
    return rows.labels is not None and not (isinstance(weight, (int, float)) and weight == 0)


def at_one(rows: LossRows) -> bool:
    """Whether the student's temperature is 1, as the label's is."""
    temperature = rows.number("temperature")
    return isinstance(temperature, (int, float)) and temperature == 1


def normalisers(
    rows: LossRows,
    sides: tuple[Tensor, Tensor],
    bases: Sequence[Tensor],
    token_ids: Tensor,
    *,
    labelled: bool,
    apart: bool,
) -> tuple[Tensor, ...]:
    """What makes logits log-probabilities, one number a row, from one read and one all-gather.

    ``sides``, ``bases``: of student and teacher the logits, and what :func:`side_table` returns.
    ``apart``: the label's term has another temperature than the divergence. Returns the student's
    origin and log sum exp((z - origin) / temperature), the same of the teacher, that sum of the
    student at temperature 1, and the label's cross-entropy (without labels 0).
    """
    shards, (_, tau, one, _) = rows.shards, bases[0]
    own = ops.statistics(shards, sides[0], bases[0], token_ids, ops.SECOND * apart)
    own_t = ops.statistics(shards, sides[1], bases[1], torch.full_like(token_ids, -1))
    sent = [own[ops.ORIGIN], own[ops.SUM], own_t[ops.ORIGIN], own_t[ops.SUM]]
    if labelled:
        sent.append(own[ops.TOKEN_LOGIT])
    if apart:
        sent.append(own[ops.SECOND_SUM])
    every = shards.gather_first(torch.stack(sent), ops.dtype_of(*sides))
    merged, merged_t = Merged(every[:, 0]), Merged(every[:, 2])
    log_sum = merged.log_sum(every[:, 1], tau)
    log_sum_t = merged_t.log_sum(every[:, 3], bases[1][1])
    label_loss, label_log_sum = torch.zeros_like(tau), log_sum
    if labelled:
        label_log_sum = merged.log_sum(every[:, 5], one) if apart else log_sum
        logit = rows.owned(every[:, 4].amax(0))
        label_loss = label_log_sum - (logit - merged.origin)
    return merged.origin, log_sum, merged_t.origin, log_sum_t, label_log_sum, label_loss


def side_table(rows: LossRows, second: Any, softcap: str) -> Tensor:
    """What :class:`SoftmaxCall` takes of each row.

    ``second``: the second softmax's temperature; ``softcap``: the argument that has the soft cap.
    """
    return table(
        rows.count,
        rows.logits,
        rows.read,
        rows.column("temperature"),
        second,
        rows.values[softcap],
    )
