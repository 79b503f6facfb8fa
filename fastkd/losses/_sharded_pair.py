"""A student and a teacher whose columns are split across processes: the passes over both sides."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd._ops import shard_definition as definition
from fastkd._ops import shards as ops
from fastkd._ops.arguments import CHOICES
from fastkd.losses._sharded import LossRows, at_one, has_labels, normalisers
from fastkd.reference._rows import divergence_rows

_NAMES = tuple(CHOICES["softmax_divergence.divergence"])


class PairCall:
    """The passes over student and teacher, and the collectives between them."""

    def __init__(self, rows: LossRows, divergence: int, inplace: bool) -> None:
        self.rows, self.shards = rows, rows.shards
        self.divergence, self.inplace = divergence, inplace
        self.labelled = has_labels(rows)
        #: Whether the label's term has another temperature.
        self.apart = self.labelled and not at_one(rows)

    def numbers(
        self, base: Tensor, token_ids: Tensor, student: Tensor, teacher: Tensor
    ) -> tuple[Tensor, ...]:
        """Each row's numbers that the loss is made of, the divergence's value first.

        ``base``: float64 [7, rows], the first rows of the table of `_shard_sums`.
        """
        needs = [torch.is_grad_enabled() and x.requires_grad for x in (student, teacher)]
        if any(needs):
            return _Pair.apply(self, base, token_ids, student, teacher, *needs)
        return self.forward(base, token_ids, student, teacher, False, False)[0]

    def losses(self, base: Tensor, found: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """Each row's divergence, and the label's cross-entropy at temperature 1."""
        return found[0], found[1] if self.labelled else None

    def normalised(
        self, base: Tensor, token_ids: Tensor, student: Tensor, teacher: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Both sides' origins and log-sum-exps, and the label's; the numbers after the value."""
        keep, tau, tau_t, _, _, softcap, softcap_t = base
        one = torch.ones_like(tau)
        *frame, label_loss = normalisers(
            self.rows,
            (student, teacher),
            [torch.stack([keep, tau, one, softcap]), torch.stack([keep, tau_t, one, softcap_t])],
            token_ids,
            labelled=self.labelled,
            apart=self.apart,
        )
        return tuple(frame), (label_loss,)

    def forward(
        self,
        base: Tensor,
        token_ids: Tensor,
        student: Tensor,
        teacher: Tensor,
        student_gradient: bool,
        teacher_gradient: bool,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The numbers, and what the gradients need."""
        frame, others = self.normalised(base, token_ids, student, teacher)
        origin, log_sum, origin_t, log_sum_t, label_log_sum = frame
        both = [origin, log_sum / ops.LN2, origin_t, log_sum_t / ops.LN2]
        numbers = torch.cat([base, torch.stack(both)])
        sums = ops.pair_sums(self.shards, student, teacher, numbers, token_ids, self.divergence)
        wanted = [True, student_gradient, teacher_gradient]
        sent = [sums[i] for i in range(3) if wanted[i]]
        found = self.shards.gather(torch.stack(sent), ops.dtype_of(student, teacher)).sum(0)
        # A NaN of any process, also of one whose sums did not meet it.
        value = found[0] + (log_sum - log_sum) + (log_sum_t - log_sum_t)
        stored = torch.cat([numbers, value[None], found[1:], label_log_sum[None] / ops.LN2])
        return (value, *others), stored

    def factors(
        self, base: Tensor, grads: Sequence[Tensor], of_teacher: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the gradients of the numbers multiply, of one side.

        The divergence's gradient; the side's softmax; the label's column; the student's softmax at
        temperature 1.
        """
        into_value, into_label = grads
        zero = torch.zeros_like(into_value)
        label = zero if of_teacher else into_label
        return into_value, zero, -label, label

    def gradient(
        self,
        stored: Tensor,
        token_ids: Tensor,
        tensors: tuple[Tensor, Tensor],
        grads: Sequence[Tensor],
        slope_sum: Tensor,
        of_teacher: bool,
    ) -> Tensor:
        """The gradient of one side from those of the numbers."""
        student, teacher = tensors
        wanted = teacher if of_teacher else student
        if self.shards.columns == 0:
            return torch.zeros_like(wanted)
        factors = self.factors(stored[:7], grads, of_teacher)
        extra = [stored[11], slope_sum, *factors, stored[-1]]
        keep = ops.still_read(stored[0], *factors)
        numbers = torch.cat([keep[None], stored[1:11], torch.stack(extra)])
        columns = self.shards.columns
        arguments = (student, teacher, numbers, token_ids, self.divergence, columns, of_teacher)
        if self.inplace and not of_teacher:
            gradient = student.detach()
            torch.ops.fastkd._shard_gradient_into(gradient, *arguments)
            return gradient
        return ops.gradient_by("_shard_gradient", wanted, *arguments)

    def define(
        self, base: Tensor, token_ids: Tensor, student: Tensor, teacher: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The numbers that have a gradient, up to constants, in plain PyTorch."""
        shards, (keep, tau, tau_t, beta, alpha, cap, cap_t) = self.shards, base
        z, w = (
            definition.relative(shards, definition.capped(shards, x, keep != 0, softcap))
            for x, softcap in ((student, cap), (teacher, cap_t))
        )
        log_q, lse = definition.log_softmax(shards, definition.alive(z) / tau.unsqueeze(1))
        log_p, _ = definition.log_softmax(shards, definition.alive(w) / tau_t.unsqueeze(1))
        terms = divergence_rows(log_p, log_q, _NAMES[self.divergence], beta, alpha)
        label_loss = None
        if self.labelled:
            if self.apart:
                lse = definition.log_sum_exp(shards, definition.alive(z))
            label_loss = lse - definition.chosen(shards, z, token_ids.unsqueeze(1)).squeeze(1)
        return definition.total(shards, terms), label_loss


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, base, token_ids, student, teacher, student_gradient, teacher_gradient):
        found, stored = call.forward(
            base, token_ids, student, teacher, student_gradient, teacher_gradient
        )
        ctx.call, ctx.needs = call, (student_gradient, teacher_gradient)
        ctx.mark_non_differentiable(*(x for x in found if not x.is_floating_point()))
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
    def backward(ctx, *grads):
        call, needs = ctx.call, ctx.needs
        again = ops.is_differentiated_again(call.shards, grads, call.inplace and needs[0])
        stored, token_ids, *others = ctx.saved_tensors
        teacher = others[0] if ctx.teacher is None else ctx.teacher
        student = others[1] if ctx.student is None else ctx.student
        sides = (student, teacher)
        found: list[Tensor | None] = [None, None]
        if again:
            with torch.enable_grad():
                defined = call.define(stored[:7], token_ids, *sides)
            wanted = [i for i in range(2) if needs[i]]
            each = definition.differentiated(defined, [sides[i] for i in wanted], grads)
            for i, gradient in zip(wanted, each, strict=True):
                found[i] = gradient
            return None, None, None, *found, None, None
        # The teacher's first: the student's may overwrite the student's logits.
        if needs[1]:
            slope = stored[12 + needs[0]]
            found[1] = call.gradient(stored, token_ids, sides, grads, slope, True)
        if needs[0]:
            found[0] = call.gradient(stored, token_ids, sides, grads, stored[12], False)
        return None, None, None, *found, None, None
