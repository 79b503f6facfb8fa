"""clipped_divergence of columns split across processes.

Rows are taken a few at a time in plain PyTorch: each process sums over its part of the support,
relative to the mass that it has there, and the sums of all are merged in the second collective. The
backward pass forms the terms again. The gradients of the teacher and of the bounds are sums over
all columns, too: one collective more, and only where they are asked for.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._ops import shard_definition as definition
from fastkd._ops import shards as ops
from fastkd._ops.arguments import can_be_read
from fastkd._ops.op import Op
from fastkd._ops.shard_definition import softcapped
from fastkd._ops.shard_softmax import possible
from fastkd._ops.shards import Shards
from fastkd.losses._sharded import LossRows, at_one, has_labels, label_term, normalisers
from fastkd.reference import _clipped_divergence as reference
from fastkd.reference._rows import NO_WEIGHT, exp, finite

#: What each process sums over its part of the support, where it has the masses m (of the teacher)
#: and n (of the student). All numbers stay representable where m and n are far below 1.
#:
#: _DIVERGENCE: sum of p / m (log p' - log q'). p' is p / m where the divergence renormalizes the
#: teacher, else p; q' is q / n where it renormalizes both, else q.
#: _MASS, _STUDENT_MASS: log m, log n. _REST, _STUDENT_REST: the same outside of the support.
#: _ALIVE: sum of p / m where q is not 0.
#: _LOST: the largest log p where q is 0. Such mass makes the value infinite.
_DIVERGENCE, _MASS, _STUDENT_MASS, _REST, _STUDENT_REST, _ALIVE, _LOST = range(7)
_SUMS = 5  # those with a gradient


def clipped_divergence(op: Op, values: dict[str, Any], shards: Shards, inplace: bool) -> Tensor:
    """`fastkd.clipped_divergence` of columns split across processes."""
    if values["quantile"]:
        raise NotImplementedError("clipped_divergence: group takes no quantile=True")
    values = {**op.arguments.unpack(list(values.values())), "reduction": values["reduction"]}
    student = values["student_logits"]
    rows = LossRows(shards, student, values, values["teacher_logits"])
    call = _Clipped(rows, values)
    bounds = [values[name].reshape(-1).to(torch.float64) for name in ("lower", "upper")]
    call.check(*bounds)
    inputs = (student, values["teacher_logits"], *bounds)
    needs = [torch.is_grad_enabled() and x.requires_grad for x in inputs]
    if any(needs) and torch.compiler.is_compiling():
        # A graph has the definition, as its own compiler derives the backward pass.
        every, label_loss, poison = call.define(*inputs)
    elif any(needs):
        every, label_loss, poison = _Sums.apply(call, needs, *inputs)
    else:
        (every, label_loss, poison), _ = call.forward(*inputs)
    # Rows that are read and no distribution.
    lost = poison.isnan()
    losses = call.value(ops.cleaned(every, lost | ~rows.read))
    losses = ops.poisoned(losses, lost)
    if values["square_temperature"]:
        losses = losses * rows.column("temperature") ** 2
    if call.labelled:
        weight = rows.number("label_weight", shifted=True)
        losses = losses + label_term(weight, label_loss)
    return rows.divided(losses)


class _Clipped:
    def __init__(self, rows: LossRows, values: dict[str, Any]) -> None:
        self.rows, self.shards, self.values = rows, rows.shards, values
        self.labelled = has_labels(rows)
        self.apart = self.labelled and not at_one(rows)
        self.temperatures = rows.column("temperature"), rows.column("teacher_temperature")
        self.caps = [values["student_logit_softcap"], values["teacher_logit_softcap"]]
        self.token_ids = rows.token_ids()

    def check(self, lower: Tensor, upper: Tensor) -> None:
        """Raise where values can be read without waiting for a device."""
        if not can_be_read(lower) or not lower.numel():
            return
        wrong = self.rows.read & ~(lower <= upper)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"clipped_divergence: lower must be at most upper, got {lower[row].item()} and "
                f"{upper[row].item()} in row {row}"
            )

    def value(self, every: Tensor) -> Tensor:
        """The rows' divergences from the sums of all processes, [processes, 7, rows]."""
        parts, masses, others, rests, others_rests, _, lost = every.unbind(1)
        mass, other = _merged(masses), _merged(others)
        empty = mass == -torch.inf
        share, by = exp(masses), torch.zeros_like(mass)
        if self.values["renormalize"] != "none":
            by = mass.masked_fill(empty, 0)
            # Each process's sum is relative to its own masses: here to those of all.
            apart = finite_or_0(masses) - by
            share = exp(torch.where(masses == -torch.inf, masses, finite_or_0(masses) - by))
            if self.values["renormalize"] == "both":
                apart = apart - (finite_or_0(others) - finite_or_0(other))
            parts = parts + apart
        loss = torch.where(share == 0, 0.0, share * parts).sum(0)
        infinite = lost.amax(0) - by >= NO_WEIGHT
        if self.values["renormalize"] == "both":
            infinite = infinite | (~empty & (other == -torch.inf))
        if self.values["renormalize"] == "none" and self.values["tail"] == "lump":
            rest, other = _merged(rests), _merged(others_rests)
            none = rest == -torch.inf
            safe = rest.masked_fill(none, 0)
            loss = loss + torch.where(none, 0.0, exp(safe) * (safe - finite(other)))
            infinite = infinite | (~none & (other == -torch.inf))
        return torch.where(infinite & ~loss.isnan(), loss + (torch.inf - loss).detach(), loss)

    def forward(
        self, student: Tensor, teacher: Tensor, lower: Tensor, upper: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """The sums [processes, 7, rows], the label's loss, 0 or NaN; and the normalisers."""
        one = torch.ones_like(self.temperatures[0])
        read = one * self.rows.read
        bases = [
            torch.stack([read, t, one, one * cap])
            for t, cap in zip(self.temperatures, self.caps, strict=True)
        ]
        *numbers, label_loss = normalisers(
            self.rows,
            (student, teacher),
            bases,
            self.token_ids,
            labelled=self.labelled,
            apart=self.apart,
        )
        frame = torch.stack(numbers)
        parts = [
            self.sums(
                *self.chunk(chunk, student, teacher, frame), lower[chunk], upper[chunk], chunk
            )
            for chunk in self.rows.chunks()
        ]
        sums = torch.cat(parts, 1) if parts else frame.new_zeros((7, 0))
        every = self.shards.gather(sums, ops.dtype_of(student, teacher))
        poison = (frame[1] - frame[1]) + (frame[3] - frame[3])
        poison = torch.where(self.rows.read, poison, 0.0)
        return (every, label_loss, poison), frame

    def chunk(
        self, chunk: slice, student: Tensor, teacher: Tensor, frame: Tensor
    ) -> tuple[Tensor, Tensor]:
        """log q and log p of these rows and this process's columns."""
        found = []
        for i, logits in enumerate((student, teacher)):
            z = self.logits(chunk, logits, i)
            origin, log_sum = frame[2 * i : 2 * i + 2, chunk].unsqueeze(2)
            tau = self.temperatures[i][chunk].unsqueeze(1)
            found.append(possible(z - origin) / tau - log_sum)
        return found[0], found[1]

    def logits(self, chunk: slice, logits: Tensor, side: int) -> Tensor:
        columns = self.shards.columns
        z = logits.detach().reshape(self.rows.count, logits.size(-1))[chunk, :columns]
        z = torch.where(self.rows.read[chunk].unsqueeze(1), z.to(torch.float64), 0.0)
        return softcapped(z, torch.ones((), dtype=z.dtype, device=z.device) * self.caps[side])

    def sums(
        self, log_q: Tensor, log_p: Tensor, lower: Tensor, upper: Tensor, chunk: slice
    ) -> Tensor:
        """What this process adds to the sums of these rows."""
        if log_q.size(1) == 0:
            empty = log_q.new_full((7, lower.numel()), -torch.inf)
            empty[_DIVERGENCE] = empty[_ALIVE] = 0
            return empty
        softness, p = self.values["softness"], exp(log_p)
        if softness:
            share, rest = reference.log_shares(p, lower, upper, softness)
        else:
            inside = (p >= lower.unsqueeze(1)) & (p <= upper.unsqueeze(1))
            share = torch.zeros_like(p).masked_fill(~inside, -torch.inf)
            rest = torch.zeros_like(p).masked_fill(inside, -torch.inf)
        if self.values["keep_label"] and self.rows.labels is not None:
            columns = torch.arange(p.size(1), device=p.device)
            kept = columns == self.token_ids[chunk].unsqueeze(1)
            share, rest = share.masked_fill(kept, 0), rest.masked_fill(kept, -torch.inf)
        own, other = reference.product(share, log_p), reference.product(share, log_q)
        mass, mass_q = reference.total(own), reference.total(other)
        none = mass == -torch.inf
        weight = own - mass.masked_fill(none, 0).unsqueeze(1)
        weight = torch.where(own == -torch.inf, 0.0, exp(weight.masked_fill(own == -torch.inf, 0)))
        by_p = by_q = torch.zeros_like(mass)
        if self.values["renormalize"] != "none":
            by_p = finite_or_0(mass)
        if self.values["renormalize"] == "both":
            by_q = finite_or_0(mass_q)
        ratio = (finite(log_p) - by_p.unsqueeze(1)) - (finite(log_q) - by_q.unsqueeze(1))
        terms = torch.where(own == -torch.inf, 0.0, weight * ratio)
        rests = [reference.total(reference.product(rest, x)) for x in (log_p, log_q)]
        alive = torch.where(log_q == -torch.inf, 0.0, weight).sum(1)
        lost = torch.where(log_q == -torch.inf, own, -torch.inf).amax(1)
        return torch.stack([terms.sum(1), mass, mass_q, *rests, alive, lost])

    def gradients(
        self,
        frame: Tensor,
        every: Tensor,
        inputs: Sequence[Tensor],
        needs: Sequence[bool],
        into: Tensor,
        into_label: Tensor,
    ) -> list[Tensor | None]:
        """The gradients by the inputs from those by the sums of all processes."""
        if any(needs[1:]):
            own = []
            for chunk in self.rows.chunks():
                q, p, low, high = self.slopes(frame, inputs, into, chunk)
                own.append(torch.stack([q.sum(1), p.sum(1), low, high]))
            whole = torch.cat(own, 1) if own else frame.new_zeros((4, 0))
            whole = self.shards.gather(whole, torch.float64).sum(0)
        else:
            # By a constant added to all log q of a process.
            _, _, others, _, rests, alive, _ = every.unbind(1)
            slope = -alive
            if self.values["renormalize"] == "both":
                some = (others != -torch.inf) & (every[:, _MASS] != -torch.inf)
                slope = slope + torch.where(some, 1.0, 0.0)
            whole = into[:, _DIVERGENCE] * slope
            whole = whole + torch.where(others == -torch.inf, 0.0, into[:, _STUDENT_MASS])
            whole = whole + torch.where(rests == -torch.inf, 0.0, into[:, _STUDENT_REST])
            whole = whole.sum(0).unsqueeze(0)
        # Of rows that nothing depends on a NaN makes no gradient.
        read = self.rows.read & ((into != 0).flatten(0, 1).any(0) | (into_label != 0))
        found: list[Tensor | None] = [None] * 4
        for i in range(2):
            if not needs[i]:
                continue
            found[i] = gradient = torch.zeros_like(inputs[i], memory_format=torch.contiguous_format)
            for chunk in self.rows.chunks():
                if self.shards.columns == 0:
                    continue
                slope = self.slopes(frame, inputs, into, chunk)[i]
                share = exp(self.chunk(chunk, inputs[0], inputs[1], frame)[i])
                tau = self.temperatures[i][chunk].unsqueeze(1)
                part = (slope - share * whole[i, chunk].unsqueeze(1)) / tau
                if i == 0 and self.labelled:
                    part = part + self.label_gradient(chunk, inputs[0], frame, into_label)
                self.write(gradient, chunk, part, inputs[i], i, read)
        for i in (2, 3):
            # Rows that are not read have no normalizer.
            found[i] = torch.where(read, whole[i], 0.0) if needs[i] else None
        return found

    def slopes(
        self, frame: Tensor, inputs: Sequence[Tensor], into: Tensor, chunk: slice
    ) -> tuple[Tensor, ...]:
        """The gradients by log q, log p and the bounds of these rows, at fixed normalisers."""
        student, teacher, lower, upper = inputs
        leaves = [*self.chunk(chunk, student, teacher, frame)]
        leaves += [x[chunk].detach().clone() for x in (lower, upper)]
        if self.shards.columns == 0:
            return tuple(torch.zeros_like(x) for x in leaves)
        for x in leaves:
            x.requires_grad_()
        with torch.enable_grad():
            own = self.sums(leaves[0], leaves[1], leaves[2], leaves[3], chunk)[:_SUMS]
        given = into[self.shards.rank, :_SUMS, chunk]
        found = torch.autograd.grad(own, leaves, given, allow_unused=True)
        pairs = zip(found, leaves, strict=True)
        return tuple(torch.zeros_like(x) if one is None else one for one, x in pairs)

    def define(
        self, student: Tensor, teacher: Tensor, lower: Tensor, upper: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What :meth:`forward` gives of rows, in plain PyTorch."""
        rows, shards = self.rows, self.shards
        one, logs = torch.ones_like(self.temperatures[0]), []
        label_loss, poison = torch.zeros_like(one), torch.zeros_like(one)
        for i, x in enumerate((student, teacher)):
            z = definition.relative(
                shards, definition.capped(shards, x, rows.read, one * self.caps[i])
            )
            scaled = definition.alive(z) / self.temperatures[i].unsqueeze(1)
            log, lse = definition.log_softmax(shards, scaled)
            logs.append(log)
            poison = torch.where(rows.read, poison + (lse - lse).detach(), 0.0)
            if i == 0 and self.labelled:
                if self.apart:
                    lse = definition.log_sum_exp(shards, definition.alive(z))
                target = definition.chosen(shards, z, self.token_ids.unsqueeze(1)).squeeze(1)
                label_loss = rows.owned(lse - target)
        bounds = [definition.copied(shards, x) for x in (lower, upper)]
        own = self.sums(logs[0], logs[1], bounds[0], bounds[1], slice(0, rows.count))
        return definition.gathered(shards, own), label_loss, poison

    def label_gradient(self, chunk: slice, student: Tensor, frame: Tensor, into: Tensor) -> Tensor:
        z = self.logits(chunk, student, 0)
        q = (z - frame[0, chunk].unsqueeze(1) - frame[4, chunk].unsqueeze(1)).exp()
        columns = torch.arange(z.size(1), device=z.device)
        q = q - (columns == self.token_ids[chunk].unsqueeze(1)).to(q.dtype)
        return q * into[chunk].unsqueeze(1)

    def write(
        self,
        out: Tensor,
        chunk: slice,
        gradient: Tensor,
        logits: Tensor,
        side: int,
        read: Tensor,
    ) -> None:
        """Into the rows of `out`, as the gradient of the logits as given."""
        rows = self.rows
        cap = self.caps[side]
        if not (isinstance(cap, float) and cap == torch.inf):
            flat = logits.detach().reshape(rows.count, logits.size(-1))
            z = flat[chunk, : self.shards.columns].to(torch.float64)
            slope = 1 / torch.cosh((z / cap).clamp(-350, 350)) ** 2
            gradient = gradient * torch.where(z.isinf(), 1.0, slope)
        gradient = torch.where(read[chunk].unsqueeze(1), gradient, 0.0)
        out.view(rows.count, -1)[chunk, : self.shards.columns] = gradient.to(out.dtype)


def finite_or_0(log: Tensor) -> Tensor:
    """A logarithm, 0 for that of 0."""
    return log.masked_fill(log == -torch.inf, 0)


def _merged(logs: Tensor) -> Tensor:
    """The logarithm of the sum over processes, whose gradient is finite where all are 0."""
    return reference.total(logs.movedim(0, -1))


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, needs, student, teacher, lower, upper):
        found, frame = call.forward(student, teacher, lower, upper)
        ctx.call, ctx.needs = call, needs
        # Autograd cannot save some tensors, such as those made under torch.inference_mode.
        pairs = list(zip(needs, (student, teacher, lower, upper), strict=True))
        ctx.inputs = [None if need else x for need, x in pairs]
        ctx.save_for_backward(frame, found[0], *(x if need else None for need, x in pairs))
        ctx.mark_non_differentiable(found[2])
        return found

    @staticmethod
    def backward(ctx, into, into_label, _):
        again = ops.is_differentiated_again(ctx.call.shards, (into, into_label))
        frame, every, *saved = ctx.saved_tensors
        inputs = [y if x is None else x for x, y in zip(saved, ctx.inputs, strict=True)]
        if again:
            with torch.enable_grad():
                defined = ctx.call.define(*inputs)
            wanted = [x for x, need in zip(inputs, ctx.needs, strict=True) if need]
            each = iter(definition.differentiated(defined[:2], wanted, [into, into_label]))
            return None, None, *(next(each) if need else None for need in ctx.needs)
        return None, None, *ctx.call.gradients(frame, every, inputs, ctx.needs, into, into_label)
