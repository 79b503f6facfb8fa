"""softmax_divergence of columns split across processes: the passes over both sides."""

from typing import Any

import torch
from torch import Tensor

from fastkd._ops import shards as ops
from fastkd._ops.op import Op
from fastkd._ops.shards import Shards, table
from fastkd.losses._sharded import LossRows, at_one, has_labels, label_term, normalisers
from fastkd.losses._sharded_teachers import mixture, taught


def softmax_divergence(op: Op, values: dict[str, Any], shards: Shards, inplace: bool) -> Tensor:
    """`fastkd.softmax_divergence` of columns split across processes."""
    if values["divergence"] == op.arguments.names["divergence"]["decoupled_kl"]:
        raise NotImplementedError(
            f"{shards.function}: divergence 'decoupled_kl' is not available with group"
        )
    student, teachers = values["student_logits"], values["teacher_logits"]
    rows = LossRows(shards, student, values, *teachers)
    if values["teacher_rows"] is not None:
        teachers = [taught(rows, x) for x in teachers]
    teacher, factor = mixture(rows, teachers)
    value, label_loss = pair_numbers(rows, student, teacher, values["divergence"], inplace)
    losses = value if factor is None else value * factor
    if values["square_temperature"]:
        losses = losses * rows.column("temperature") ** 2
    if label_loss is not None:
        weight = rows.number("label_weight", shifted=True)
        losses = losses + label_term(weight, label_loss)
    return rows.divided(losses)


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
        origin, log_sum, origin_t, log_sum_t, label_log_sum, label_loss = normalisers(
            self.rows,
            (student, teacher),
            [torch.stack([keep, tau, one, softcap]), torch.stack([keep, tau_t, one, softcap_t])],
            token_ids,
            labelled=self.labelled,
            apart=self.apart,
        )
        frame = [origin, log_sum / ops.LN2, origin_t, log_sum_t / ops.LN2]
        numbers = torch.cat([base, torch.stack(frame)])
        sums = ops.pair_sums(self.shards, student, teacher, numbers, self.divergence)
        wanted = [True, student_gradient, teacher_gradient]
        sent = [sums[i] for i in range(3) if wanted[i]]
        found = self.shards.gather(torch.stack(sent), ops.dtype_of(student, teacher)).sum(0)
        # A NaN of any process, also of one whose sums did not meet it.
        value = found[0] + (log_sum - log_sum) + (log_sum_t - log_sum_t)
        stored = torch.cat([numbers, value[None], found[1:], label_log_sum[None] / ops.LN2])
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
