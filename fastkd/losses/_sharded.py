"""Losses over rows whose vocabulary is split across processes.

A loss's numbers a row are autograd Functions with two collectives (fastkd/_ops/shards.py); weights,
label terms and reductions are plain PyTorch on one number a row, the same on every process. The
gradient that a Function returns is that of this process's columns: nothing more is reduced.
"""

from typing import Any

import torch
from torch import Tensor

from fastkd._ops import shards as ops
from fastkd._ops.arguments import CHOICES
from fastkd._ops.op import Op
from fastkd._ops.shards import Merged, Shards, table

_LN2 = 0.6931471805599453
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
        if torch.compiler.is_compiling() or ids.device.type != "cpu" or not ids.numel():
            return
        wrong = kept & ((ids < 0) | (ids >= self.shards.vocab))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise IndexError(
                f"{self.shards.function}: {name} must lie in [0, {self.shards.vocab}) or be "
                f"ignore_index {ignored}, got {int(ids[row])} in row {row}"
            )

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


def softmax_divergence(op: Op, values: dict[str, Any], shards: Shards, inplace: bool) -> Tensor:
    """`fastkd.softmax_divergence` of columns split across processes."""
    function = shards.function
    if len(values["teacher_logits"]) != 1 or values["teacher_weights"] is not None:
        raise NotImplementedError(
            f"{function}: group takes one teacher without teacher_weights, got a list"
        )
    if values["teacher_rows"] is not None:
        raise NotImplementedError(f"{function}: group takes no teacher_rows")
    if values["divergence"] == op.arguments.names["divergence"]["decoupled_kl"]:
        raise NotImplementedError(
            f"{function}: divergence 'decoupled_kl' is not available with group"
        )
    student, (teacher,) = values["student_logits"], values["teacher_logits"]
    rows = LossRows(shards, student, values, teacher)
    value, label_loss = pair_numbers(rows, student, teacher, values["divergence"], inplace)
    losses = value
    if values["square_temperature"]:
        losses = losses * rows.column("temperature") ** 2
    if label_loss is not None:
        weight = rows.number("label_weight", shifted=True)
        losses = losses + label_term(weight, label_loss)
    return rows.divided(losses)


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


def pair_numbers(
    rows: LossRows, student: Tensor, teacher: Tensor, divergence: int, inplace: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Each row's divergence, and the label's cross-entropy at temperature 1."""
    values = rows.values
    base = table(
        rows.count,
        student,
        rows.read,
        rows.column("temperature"),
        rows.column("teacher_temperature"),
        rows.column("beta"),
        rows.column("alpha"),
        values["student_logit_softcap"],
        values["teacher_logit_softcap"],
    )
    call = _PairCall(rows, divergence, has_labels(rows), at_one(rows), inplace)
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (student, teacher)]
    if any(needs):
        found = _Pair.apply(call, base, rows.token_ids(), student, teacher, *needs)
    else:
        found, _ = call.forward(base, rows.token_ids(), student, teacher, False, False)
    value, label_loss = found
    return value, label_loss if call.labelled else None


class _PairCall:
    """The passes over student and teacher, and the collectives between them."""

    def __init__(
        self, rows: LossRows, divergence: int, labelled: bool, at_one: bool, inplace: bool
    ) -> None:
        self.rows, self.shards = rows, rows.shards
        self.divergence, self.labelled, self.inplace = divergence, labelled, inplace
        self.apart = labelled and not at_one

    def forward(
        self,
        base: Tensor,
        token_ids: Tensor,
        student: Tensor,
        teacher: Tensor,
        student_gradient: bool,
        teacher_gradient: bool,
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The two numbers, and what the gradients need."""
        keep, tau, tau_t, _, _, softcap, softcap_t = base
        one = torch.ones_like(tau)
        dtype = ops.dtype_of(student, teacher)
        of_student = ops.statistics(
            self.shards,
            student,
            torch.stack([keep, tau, one, softcap]),
            token_ids,
            ops.SECOND if self.apart else 0,
        )
        no_token = torch.full_like(token_ids, -1)
        of_teacher = ops.statistics(
            self.shards, teacher, torch.stack([keep, tau_t, one, softcap_t]), no_token
        )
        sent = [of_student[ops.ORIGIN], of_student[ops.SUM]]
        sent += [of_teacher[ops.ORIGIN], of_teacher[ops.SUM]]
        if self.labelled:
            sent.append(of_student[ops.TOKEN_LOGIT])
        if self.apart:
            sent.append(of_student[ops.SECOND_SUM])
        all_ranks = self.shards.gather(torch.stack(sent), dtype)
        merged, merged_t = Merged(all_ranks[:, 0]), Merged(all_ranks[:, 2])
        log_sum = merged.log_sum(all_ranks[:, 1], tau)
        log_sum_t = merged_t.log_sum(all_ranks[:, 3], tau_t)
        label_loss, label_log_sum = torch.zeros_like(tau), log_sum
        if self.labelled:
            if self.apart:
                label_log_sum = merged.log_sum(all_ranks[:, 5], one)
            logit = self.rows.owned(all_ranks[:, 4].amax(0))
            label_loss = label_log_sum - (logit - merged.origin)
        frame = [merged.origin, log_sum / _LN2, merged_t.origin, log_sum_t / _LN2]
        numbers = torch.cat([base, torch.stack(frame)])
        sums = ops.pair_sums(self.shards, student, teacher, numbers, self.divergence)
        wanted = [True, student_gradient, teacher_gradient]
        sent = [sums[i] for i in range(3) if wanted[i]]
        found = self.shards.gather(torch.stack(sent), dtype).sum(0)
        # A NaN of any process, also of one whose sums did not meet it.
        value = found[0] + (log_sum - log_sum) + (log_sum_t - log_sum_t)
        stored = torch.cat([numbers, value[None], found[1:], label_log_sum[None] / _LN2])
        return (value, label_loss), stored

    def gradient(
        self,
        stored: Tensor,
        token_ids: Tensor,
        tensors: tuple[Tensor, Tensor],
        factors: list[Tensor],
        slope_sum: Tensor,
        of_teacher: bool,
    ) -> Tensor:
        """The gradient of one side from the incoming ones of value and label's loss."""
        student, teacher = tensors
        wanted = teacher if of_teacher else student
        if self.shards.columns == 0:
            return torch.zeros_like(wanted)
        extra = [stored[11], slope_sum, *factors, stored[-1]]
        numbers = torch.cat([stored[:11], torch.stack(extra)])
        arguments = (student, teacher, numbers, self.divergence, self.shards.columns)
        if self.inplace and not of_teacher:
            gradient = student.detach()
            torch.ops.fastkd._shard_gradient_into(gradient, *arguments, token_ids, False)
            return gradient
        return ops.gradient_by("_shard_gradient", wanted, *arguments, token_ids, of_teacher)


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, base, token_ids, student, teacher, student_gradient, teacher_gradient):
        found, stored = call.forward(
            base, token_ids, student, teacher, student_gradient, teacher_gradient
        )
        ctx.call, ctx.needs = call, (student_gradient, teacher_gradient)
        # Autograd cannot save some tensors, such as those made under torch.inference_mode.
        ctx.teacher = None if teacher_gradient else teacher
        saved = [stored, token_ids, teacher if teacher_gradient else None]
        if call.inplace and student_gradient:
            # Its gradient is written to its own memory, in the backward pass.
            ctx.student = student.detach()
            torch.autograd.graph.increment_version(student)
            ctx.save_for_backward(*saved)
        else:
            ctx.student = None if student_gradient else student
            ctx.save_for_backward(*saved, student if student_gradient else None)
        return found

    @staticmethod
    def backward(ctx, into_value, into_label):
        ops.check_first_order(ctx.call.shards)
        stored, token_ids, *others = ctx.saved_tensors
        teacher = others[0] if ctx.teacher is None else ctx.teacher
        student = others[1] if ctx.student is None else ctx.student
        factors = [into_value, into_label]
        found: list[Tensor | None] = [None, None]
        # The teacher's first: the student's may overwrite the student's logits.
        if ctx.needs[1]:
            place = 12 + ctx.needs[0]
            found[1] = ctx.call.gradient(
                stored, token_ids, (student, teacher), factors, stored[place], True
            )
        if ctx.needs[0]:
            found[0] = ctx.call.gradient(
                stored, token_ids, (student, teacher), factors, stored[12], False
            )
        return None, None, None, *found, None, None


def side_table(rows: LossRows, second: Any, softcap: str) -> Tensor:
    """What :class:`SoftmaxCall` takes of each row."""
    return table(
        rows.count,
        rows.logits,
        rows.read,
        rows.column("temperature"),
        second,
        rows.values[softcap],
    )
