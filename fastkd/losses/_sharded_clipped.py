"""clipped_divergence of columns split across processes.

Rows are taken a few at a time in plain PyTorch: each process sums over its part of the support, and
the sums of all are merged in the second collective. The backward pass forms the terms again.
The gradients of the teacher and of the bounds are sums over all columns, too: one collective more,
and only where they are asked for.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._ops import shards as ops
from fastkd._ops.op import Op
from fastkd._ops.shard_softmax import softcapped
from fastkd._ops.shards import Shards
from fastkd.losses._sharded import LossRows, at_one, has_labels, label_term, normalisers
from fastkd.reference import _clipped_divergence as reference
from fastkd.reference._rows import NO_WEIGHT, exp, finite

#: What each process sums over its part of the support: p (log p - log q); the logarithms of the
#: masses inside and outside, of the teacher and of the student; p where q is not 0; how many have
#: mass where q is 0, which makes the value infinite.
_DIVERGENCE, _MASS, _STUDENT_MASS, _REST, _STUDENT_REST, _ALIVE, _LOST = range(7)


@torch.compiler.disable  # the backward pass forms terms by autograd
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
    if any(needs):
        sums, label_loss, poison = _Sums.apply(call, needs, *inputs)
    else:
        (sums, label_loss, poison), _ = call.forward(*inputs)
    losses = call.value(sums) + poison
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
        if torch.compiler.is_compiling() or lower.device.type != "cpu" or not lower.numel():
            return
        wrong = self.rows.read & ~(lower <= upper)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"clipped_divergence: lower must be at most upper, got {lower[row].item()} and "
                f"{upper[row].item()} in row {row}"
            )

    def value(self, sums: Tensor) -> Tensor:
        """The rows' divergences from the sums of all processes."""
        loss = self._finite_value(sums)
        lost = (sums[_LOST] > 0) & loss.isfinite()
        return torch.where(lost, loss + (torch.inf - loss).detach(), loss)

    def _finite_value(self, sums: Tensor) -> Tensor:
        total, mass, other, rest, rest_other = sums[:5]
        empty = mass == -torch.inf
        if self.values["renormalize"] != "none":
            log_mass = mass.masked_fill(empty, 0)
            loss = torch.where(empty, 0.0, total / exp(log_mass) - log_mass)
            if self.values["renormalize"] == "both":
                none = other == -torch.inf
                loss = loss + torch.where(empty | none, 0.0, other.masked_fill(none, 0))
                loss = torch.where(none & ~empty, torch.inf, loss)
            return loss
        if self.values["tail"] == "lump":
            none = rest == -torch.inf
            safe = rest.masked_fill(none, 0)
            tail = exp(safe) * (safe - finite(rest_other))
            tail = torch.where(none, 0.0, tail)
            lost = ~none & (rest_other == -torch.inf)
            total = total + torch.where(lost, tail + (torch.inf - tail).detach(), tail)
        return total

    def forward(
        self, student: Tensor, teacher: Tensor, lower: Tensor, upper: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """The sums [7, rows], the label's loss, 0 or NaN; and the normalisers."""
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
        first, logs, alive = every[:, :1].sum(0), every[:, 1:5].logsumexp(0), every[:, 5:].sum(0)
        poison = (frame[1] - frame[1]) + (frame[3] - frame[3])
        poison = torch.where(self.rows.read, poison, 0.0)
        return (torch.cat([first, logs, alive]), label_loss, poison), frame

    def chunk(
        self, chunk: slice, student: Tensor, teacher: Tensor, frame: Tensor
    ) -> tuple[Tensor, Tensor]:
        """log q and log p of these rows and this process's columns."""
        found = []
        for i, logits in enumerate((student, teacher)):
            z = self.logits(chunk, logits, i)
            origin, log_sum = frame[2 * i : 2 * i + 2, chunk].unsqueeze(2)
            tau = self.temperatures[i][chunk].unsqueeze(1)
            found.append((z - origin) / tau - log_sum)
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
        if self.shards.columns == 0:
            empty = log_q.new_full((7, lower.numel()), -torch.inf)
            empty[_DIVERGENCE] = empty[_ALIVE] = empty[_LOST] = 0
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
        own = reference.product(share, log_p)
        weight = own.masked_fill(own == -torch.inf, 0)
        terms = exp(weight) * (finite(log_p) - finite(log_q))
        terms = torch.where(own == -torch.inf, 0.0, terms)
        lost = (own >= NO_WEIGHT) & (log_q == -torch.inf)
        logs = [own, reference.product(share, log_q)]
        logs += [reference.product(rest, log_p), reference.product(rest, log_q)]
        alive = torch.where((own == -torch.inf) | (log_q == -torch.inf), 0.0, exp(weight)).sum(1)
        return torch.stack([terms.sum(1), *(reference.total(x) for x in logs), alive, lost.sum(1)])

    def gradients(
        self,
        frame: Tensor,
        sums: Tensor,
        inputs: Sequence[Tensor],
        needs: Sequence[bool],
        into: Tensor,
        into_label: Tensor,
    ) -> list[Tensor | None]:
        """The gradients by the inputs from those by the sums of all processes."""
        if any(needs[1:]):
            own = []
            for chunk in self.rows.chunks():
                q, p, low, high = self.slopes(frame, sums, inputs, into, chunk)
                own.append(torch.stack([q.sum(1), p.sum(1), low, high]))
            whole = torch.cat(own, 1) if own else frame.new_zeros((4, 0))
            whole = self.shards.gather(whole, torch.float64).sum(0)
        else:
            none = sums[1:5] == -torch.inf
            of_logs = torch.where(none, 0.0, into[1:5])
            total = of_logs[_STUDENT_MASS - 1] + of_logs[_STUDENT_REST - 1]
            whole = (total - into[_DIVERGENCE] * sums[_ALIVE]).unsqueeze(0)
        found: list[Tensor | None] = [None] * 4
        for i in range(2):
            if not needs[i]:
                continue
            found[i] = gradient = torch.zeros_like(inputs[i], memory_format=torch.contiguous_format)
            for chunk in self.rows.chunks():
                if self.shards.columns == 0:
                    continue
                slope = self.slopes(frame, sums, inputs, into, chunk)[i]
                share = exp(self.chunk(chunk, inputs[0], inputs[1], frame)[i])
                tau = self.temperatures[i][chunk].unsqueeze(1)
                part = (slope - share * whole[i, chunk].unsqueeze(1)) / tau
                if i == 0 and self.labelled:
                    part = part + self.label_gradient(chunk, inputs[0], frame, into_label)
                self.write(gradient, chunk, part, inputs[i], i)
        for i in (2, 3):
            # Rows that are not read have no normalizer.
            found[i] = torch.where(self.rows.read, whole[i], 0.0) if needs[i] else None
        return found

    def slopes(
        self, frame: Tensor, sums: Tensor, inputs: Sequence[Tensor], into: Tensor, chunk: slice
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
            own = self.sums(leaves[0], leaves[1], leaves[2], leaves[3], chunk)[:5]
        # The logarithm of a sum over processes: this one has its share of the gradient.
        logs = own[1:].detach()
        part = torch.where(logs == -torch.inf, 0.0, (logs - sums[1:5, chunk]).exp())
        given = torch.cat([into[:1, chunk], into[1:5, chunk] * part])
        found = torch.autograd.grad(own, leaves, given, allow_unused=True)
        pairs = zip(found, leaves, strict=True)
        return tuple(torch.zeros_like(x) if one is None else one for one, x in pairs)

    def label_gradient(self, chunk: slice, student: Tensor, frame: Tensor, into: Tensor) -> Tensor:
        z = self.logits(chunk, student, 0)
        q = (z - frame[0, chunk].unsqueeze(1) - frame[4, chunk].unsqueeze(1)).exp()
        columns = torch.arange(z.size(1), device=z.device)
        q = q - (columns == self.token_ids[chunk].unsqueeze(1)).to(q.dtype)
        return q * into[chunk].unsqueeze(1)

    def write(self, out: Tensor, chunk: slice, gradient: Tensor, logits: Tensor, side: int) -> None:
        """Into the rows of `out`, as the gradient of the logits as given."""
        rows = self.rows
        cap = self.caps[side]
        if not (isinstance(cap, float) and cap == torch.inf):
            flat = logits.detach().reshape(rows.count, logits.size(-1))
            z = flat[chunk, : self.shards.columns].to(torch.float64)
            slope = 1 / torch.cosh((z / cap).clamp(-350, 350)) ** 2
            gradient = gradient * torch.where(z.isinf(), 1.0, slope)
        gradient = torch.where(rows.read[chunk].unsqueeze(1), gradient, 0.0)
        out.view(rows.count, -1)[chunk, : self.shards.columns] = gradient.to(out.dtype)


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
        ops.check_first_order(ctx.call.shards)
        frame, sums, *saved = ctx.saved_tensors
        inputs = [y if x is None else x for x, y in zip(saved, ctx.inputs, strict=True)]
        return None, None, *ctx.call.gradients(frame, sums, inputs, ctx.needs, into, into_label)
