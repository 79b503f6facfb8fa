"""Differentiable numbers of the softmaxes of rows whose vocabulary is split across processes.

One read of this process's columns and one collective give, for each row, log-sum-exps, entropies,
the logit of a token, those of some chosen columns, and the sum of all. The backward pass reads the
columns again and writes their gradient. Losses are plain PyTorch on these numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd._ops import shard_definition as definition
from fastkd._ops import shards as ops
from fastkd._ops.shard_definition import DEAD, softcapped
from fastkd._ops.shards import Merged, Shards

#: In ``holes``, what fills up a row with fewer of them.
NO_HOLE = -2


class SoftmaxNumbers(NamedTuple):
    """One number a row, the same on every process. Logits are relative to ``origin``.

    The second softmax has another temperature, or a subset of the columns. None: not asked for.
    """

    #: log sum exp((z - origin) / temperature).
    log_sum: Tensor
    entropy: Tensor | None
    #: Relative to ``second_origin``, if that is given.
    second_log_sum: Tensor | None
    second_entropy: Tensor | None
    #: -inf where no process has the token.
    token_logit: Tensor | None
    #: sum (z - origin) over the columns but the holes.
    total: Tensor | None
    #: [rows, holes]: logits of the columns left out; -inf where no process has them.
    holes: Tensor | None
    #: A logit near the largest, NaN where the row is no distribution. No gradient.
    origin: Tensor
    #: A logit near the largest of the second softmax, where that has a subset of the columns; 0
    #: where none of them is possible. No gradient.
    second_origin: Tensor | None
    #: The likeliest token, of equal ones the lowest. No gradient.
    best: Tensor | None

    def cleaned(self) -> tuple["SoftmaxNumbers", Tensor]:
        """The same with 0 in rows that are no distribution, and a mask of these rows.

        Use `ops.poisoned` with the mask on what is computed from the numbers.
        """
        lost = self.origin.isnan() | self.log_sum.isnan()

        def one(x: Tensor | None) -> Tensor | None:
            if x is None or not x.is_floating_point():
                return x
            return ops.cleaned(x, lost if x.dim() == 1 else lost.unsqueeze(1))

        every: list[Any] = [one(x) for x in self]
        return SoftmaxNumbers(*every), lost


@dataclass(frozen=True)
class SoftmaxCall:
    """Which of :class:`SoftmaxNumbers` are asked for, beside ``log_sum`` and ``origin``."""

    shards: Shards
    entropy: bool = False
    second: bool = False
    second_entropy: bool = False
    token: bool = False
    total: bool = False
    best: bool = False
    inplace: bool = False

    def numbers(
        self,
        logits: Tensor,
        base: Tensor,
        token_ids: Tensor,
        columns: Tensor | None = None,
        holes: Tensor | None = None,
    ) -> SoftmaxNumbers:
        """The numbers of [..., width] logits.

        ``base``: float64 [4, rows]: whether the row is read, temperature, second temperature, cap.
        ``token_ids``: [rows] and ``holes``: [rows, holes], columns of this process or -1;
        `NO_HOLE` for holes that no process has. ``columns``: bool, those of the second softmax;
        None for all.
        """
        holes = None if holes is None else holes.contiguous()
        arguments = (logits, base, token_ids, columns, holes)
        if torch.is_grad_enabled() and logits.requires_grad:
            names = self.names(columns, holes)
            found = dict(zip(names, _Softmax.apply(self, *arguments), strict=True))
        else:
            found = self.forward(*arguments)
        every: list[Any] = [found.get(name) for name in SoftmaxNumbers._fields]
        return SoftmaxNumbers(*every)

    def names(self, columns: Tensor | None, holes: Tensor | None) -> list[str]:
        """The fields of SoftmaxNumbers that are asked for, in their order."""
        asked = {
            "entropy": self.entropy,
            "second_log_sum": self.second,
            "second_entropy": self.second_entropy,
            "token_logit": self.token,
            "total": self.total,
            "holes": holes is not None,
            "second_origin": columns is not None,
            "best": self.best,
        }
        return [name for name in SoftmaxNumbers._fields if asked.get(name, True)]

    def forward(
        self,
        logits: Tensor,
        base: Tensor,
        token_ids: Tensor,
        columns: Tensor | None,
        holes: Tensor | None,
    ) -> dict[str, Tensor]:
        """The numbers that are asked for, in the order of SoftmaxNumbers."""
        shards = self.shards
        wanted = ops.ENTROPY * (self.entropy or self.second_entropy) + ops.SECOND * self.second
        wanted += ops.BEST * self.best + ops.TOTAL_BIT * self.total
        own = ops.statistics(shards, logits, base, token_ids, wanted, columns, holes)
        sent = [own[ops.ORIGIN], own[ops.SUM]]
        places: dict[str, int] = {}

        def send(name: str, *numbers: Tensor) -> None:
            places[name] = len(sent)
            sent.extend(numbers)

        if self.entropy:
            send("weighted", own[ops.WEIGHTED])
        if self.second:
            send("second", own[ops.SECOND_SUM])
        if columns is not None:
            send("second_origin", own[ops.SECOND_ORIGIN])
        if self.second_entropy:
            send("second_weighted", own[ops.SECOND_WEIGHTED])
        if self.token:
            send("token", own[ops.TOKEN_LOGIT])
        if self.total:
            send("total", own[ops.TOTAL], own[ops.COLUMNS])
        if self.best:
            send("best", own[ops.BEST_LOGIT], own[ops.BEST_COLUMN] + shards.start)
        dtype = ops.sent_dtype(shards, logits) if self.best else ops.dtype_of(logits)
        every = shards.gather_first(torch.stack(sent), dtype)
        origins, hole_values = every[:, 0], base.new_empty(0)
        if holes is not None:
            hole_values = shards.sum(_hole_logits(logits, base, holes), dtype)
            hole_values = hole_values.masked_fill(holes == NO_HOLE, -torch.inf)
            # The holes count as one more process.
            largest = torch.cat([hole_values, torch.full_like(hole_values[:, :1], -torch.inf)], 1)
            origins = torch.cat([origins, largest.amax(1).unsqueeze(0)])
        merged = Merged(origins)
        sums, tau, tau_2 = self._with_holes(every[:, 1], holes), base[1], base[2]
        result = {"log_sum": merged.log_sum(sums, tau)}
        if self.entropy:
            weighted = self._with_holes(every[:, places["weighted"]], holes)
            result["entropy"] = merged.entropy(sums, weighted, tau)
        apart = merged
        if columns is not None:
            apart = Merged(every[:, places["second_origin"]], empty=True)
        if self.second:
            second = self._with_holes(every[:, places["second"]], holes)
            result["second_log_sum"] = apart.log_sum(second, tau_2)
            if self.second_entropy:
                weighted = self._with_holes(every[:, places["second_weighted"]], holes)
                result["second_entropy"] = apart.entropy(second, weighted, tau_2)
        if self.token:
            result["token_logit"] = every[:, places["token"]].amax(0) - merged.origin
        if self.total:
            at = places["total"]
            totals = self._with_holes(every[:, at], holes)
            result["total"] = merged.total(totals, self._with_holes(every[:, at + 1], holes))
        if holes is not None:
            result["holes"] = hole_values - merged.origin.unsqueeze(1)
        result["origin"] = merged.origin
        if columns is not None:
            result["second_origin"] = apart.origin
        if self.best:
            at = places["best"]
            logit, column = every[:, at], every[:, at + 1]
            best = torch.where(logit == logit.amax(0), column, torch.inf).amin(0)
            lost = result["log_sum"].isnan()
            result["best"] = torch.where(lost, -1, best).to(torch.int64)
        return result

    def define(
        self,
        logits: Tensor,
        base: Tensor,
        token_ids: Tensor,
        columns: Tensor | None,
        holes: Tensor | None,
    ) -> dict[str, Tensor]:
        """The numbers that have a gradient, up to constants, in plain PyTorch."""
        shards, (keep, tau, tau_2, cap) = self.shards, base
        z = definition.relative(shards, definition.capped(shards, logits, keep != 0, cap))
        hole = None if holes is None else definition.among(shards, holes)
        rest = definition.alive(z)
        rest = rest if hole is None else rest.masked_fill(hole, -torch.inf)
        found, some = {}, hole is not None

        def softmax(name: str, scaled: Tensor, entropy: bool, empty: bool) -> None:
            log_q, found[f"{name}log_sum"] = definition.log_softmax(shards, scaled, empty=empty)
            if entropy:
                found[f"{name}entropy"] = definition.entropy(shards, log_q)

        softmax("", rest / tau.unsqueeze(1), self.entropy, some)
        if self.second:
            part = rest
            if columns is not None and shards.columns > 0:
                part = rest.masked_fill(~columns, -torch.inf)
            scaled = part / tau_2.unsqueeze(1)
            softmax("second_", scaled, self.second_entropy, some or columns is not None)
        if self.token:
            found["token_logit"] = definition.chosen(shards, z, token_ids.unsqueeze(1)).squeeze(1)
        if self.total:
            counted = z if hole is None else z.masked_fill(hole, 0)
            found["total"] = definition.total(shards, counted.sum(1))
        if holes is not None:
            found["holes"] = definition.chosen(shards, z, holes)
        return found

    def _with_holes(self, sums: Tensor, holes: Tensor | None) -> Tensor:
        """A row of zeros for the holes, which have an origin of their own."""
        if holes is None:
            return sums
        return torch.cat([sums, torch.zeros_like(sums[:1])])

    def gradient(
        self,
        logits: Tensor,
        base: Tensor,
        token_ids: Tensor,
        columns: Tensor | None,
        holes: Tensor | None,
        found: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
    ) -> Tensor:
        """The gradient by this process's columns from those by the numbers."""
        if self.shards.columns == 0:
            return torch.zeros_like(logits)
        zero = torch.zeros_like(base[0])

        def factors(name: str, tau: Tensor) -> list[Tensor]:
            """Of q (constant + slope log2 q)."""
            into = grads.get(f"{name}entropy", zero)
            rest = torch.where(into == 0, 0.0, into * found.get(f"{name}entropy", zero))
            return [(grads.get(f"{name}log_sum", zero) - rest) / tau, -into * ops.LN2 / tau]

        def log2_sum(name: str) -> Tensor:
            # Of a softmax without a possible column any normaliser gives 0.
            log_sum = found.get(name, zero)
            return torch.where(log_sum == -torch.inf, 0.0, log_sum) / ops.LN2

        into_token = grads.get("token_logit", zero)
        numbers = [found["origin"], found.get("second_origin", found["origin"])]
        numbers += [log2_sum("log_sum"), log2_sum("second_log_sum")]
        numbers += [*factors("", base[1]), *factors("second_", base[2])]
        table = torch.cat([base, torch.stack([*numbers, into_token, grads.get("total", zero)])])
        given = [
            x if x.dim() == 1 else x.abs().sum(1) for n, x in grads.items() if n not in _CONSTANT
        ]
        table = torch.cat([ops.still_read(base[0], *given)[None], table[1:]])
        of_holes = None
        if holes is not None:
            here = (holes == token_ids.unsqueeze(1)) & (holes >= 0)
            of_holes = grads["holes"] + torch.where(here, into_token.unsqueeze(1), 0.0)
            of_holes = of_holes.contiguous()
        arguments = (logits, table, token_ids, columns, holes, self.shards.columns, of_holes)
        if self.inplace:
            gradient = logits.detach()
            torch.ops.fastkd._shard_softmax_gradient_into(gradient, *arguments)
            return gradient
        return ops.gradient_by("_shard_softmax_gradient", logits, *arguments)


def _hole_logits(logits: Tensor, base: Tensor, holes: Tensor) -> Tensor:
    """[rows, holes]: this process's logits of the columns left out, 0 for those of others."""
    if logits.size(-1) == 0:
        return base.new_zeros(holes.shape)
    at = holes.clamp(min=0).reshape(*logits.shape[:-1], holes.size(1))
    found = logits.detach().gather(-1, at).reshape(holes.shape)
    exact = torch.float64 if found.dtype == torch.float64 else torch.float32
    found = softcapped(found.to(exact), base[3].to(exact).unsqueeze(1))
    there = (holes >= 0) & (base[0] != 0).unsqueeze(1)
    return torch.where(there, found, 0).to(torch.float64)


def possible(logit: Tensor) -> Tensor:
    """A logit relative to the largest; one so far below it that it means probability 0 as -inf."""
    return logit + torch.where(logit < -DEAD, -torch.inf, 0.0)


#: Numbers without a gradient.
_CONSTANT = ("origin", "second_origin", "best")


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, logits, base, token_ids, columns, holes):
        found = call.forward(logits, base, token_ids, columns, holes)
        ctx.call, ctx.columns, ctx.holes, ctx.names = call, columns, holes, list(found)
        ctx.mark_non_differentiable(*(found[x] for x in _CONSTANT if x in found))
        # With inplace the gradient is written to the logits' own memory, in the backward pass.
        ctx.logits = logits.detach() if call.inplace else None
        if call.inplace:
            torch.autograd.graph.increment_version(logits)
            ctx.save_for_backward(base, token_ids, *found.values())
        else:
            ctx.save_for_backward(base, token_ids, *found.values(), logits)
        return tuple(found.values())

    @staticmethod
    def backward(ctx, *grads):
        again = ops.is_differentiated_again(ctx.call.shards, grads, ctx.call.inplace)
        base, token_ids, *found = ctx.saved_tensors
        logits = found.pop() if ctx.logits is None else ctx.logits
        if again:
            with torch.enable_grad():
                defined = ctx.call.define(logits, base, token_ids, ctx.columns, ctx.holes)
            wanted = [defined.get(name) for name in ctx.names]
            return None, *definition.differentiated(wanted, [logits], grads), None, None, None, None
        gradient = ctx.call.gradient(
            logits,
            base,
            token_ids,
            ctx.columns,
            ctx.holes,
            dict(zip(ctx.names, found, strict=True)),
            dict(zip(ctx.names, grads, strict=True)),
        )
        return None, gradient, None, None, None, None
