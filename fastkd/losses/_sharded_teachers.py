"""Several teachers of columns split across processes, as one teacher, whose logits are stored.

One all-gather of 8 bytes a row and teacher says what the logits are relative to; ``"contrast"`` and
``"share"`` take another, of 4 bytes a row: how far the two are apart.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd._ops import shards as ops
from fastkd._ops.arguments import CHOICES
from fastkd._ops.shard_definition import softcapped
from fastkd._ops.shards import Merged
from fastkd.losses._sharded import LossRows
from fastkd.reference._rows import DEAD

_MIXES = tuple(CHOICES["softmax_divergence.teacher_mix"])
_TVD = CHOICES["softmax_divergence.divergence"]["tvd"]


def taught(rows: LossRows, teacher: Tensor) -> Tensor:
    """The teacher's rows that ``teacher_rows`` names."""
    places = rows.values["teacher_rows"].long()
    count, width = math.prod(teacher.shape[:-1]), teacher.size(-1)
    if count == 0:
        return teacher.new_zeros((*places.shape, width))
    found = teacher.detach().reshape(count, width)[places.clamp(0, count - 1)]
    # Of places that are not checked on CUDA.
    return torch.where((places < count).unsqueeze(-1), found, math.nan)


def mixture(rows: LossRows, teachers: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """The mixture's logits, and a factor of the rows' divergences, None for 1.

    Replaces the teacher's temperature and soft cap in ``rows.values`` by the mixture's own.
    """
    values, shards = rows.values, rows.shards
    mix, weights, count = _MIXES[values["teacher_mix"]], values["teacher_weights"], len(teachers)
    if count == 1 and (weights is None or mix == "probs"):
        return teachers[0], None
    if torch.is_grad_enabled() and any(x.requires_grad for x in teachers):
        raise NotImplementedError(
            f"{shards.function}: group takes no gradient of a teacher with teacher_weights"
        )
    one = torch.ones(rows.count, dtype=torch.float64, device=rows.logits.device)
    each = [one / count] * count
    if weights is not None:
        weights = weights.to(torch.float64).expand(*rows.leading, count)
        each = list(weights.reshape(rows.count, count).unbind(1))
    tau = rows.column("teacher_temperature") if mix == "probs" else one
    cap = one * values["teacher_logit_softcap"]
    base = torch.stack([one * rows.read, tau, one, cap])
    no_token = torch.full((rows.count,), -1, dtype=torch.int64, device=one.device)
    own = [ops.statistics(shards, x, base, no_token)[: ops.SUM + 1] for x in teachers]
    dtype = ops.dtype_of(rows.logits, *teachers)
    frames = []
    for numbers in shards.gather_first(torch.cat(own), dtype).split(2, 1):
        merged = Merged(numbers[:, ops.ORIGIN])
        frames.append((merged.origin, merged.log_sum(numbers[:, ops.SUM], tau)))
    factor = None
    if mix in ("contrast", "share"):
        (strength, coefficient), pair = each, torch.stack([base[0], *[one] * 4, cap, cap])
        framed = [x for origin, log_sum in frames for x in (origin, log_sum / ops.LN2)]
        numbers = torch.cat([pair, torch.stack(framed)])
        apart = ops.pair_sums(shards, teachers[0], teachers[1], numbers, no_token, _TVD)[:1]
        a = 2 * strength * shards.gather(apart, dtype).sum(0)[0] + 1e-3
        each = [1 + a, -a] if mix == "contrast" else [a, 1 - a]
        factor = torch.where(rows.read, coefficient / a, 1.0)
    out = torch.empty((rows.count, shards.columns), dtype=dtype, device=one.device)
    for chunk in rows.chunks():
        terms = []
        for teacher, weight, (origin, log_sum) in zip(teachers, each, frames, strict=True):
            flat = teacher.detach().reshape(rows.count, teacher.size(-1))
            z = flat[chunk, : shards.columns].to(torch.float64)
            c, w, top, total, t = (
                x[chunk].unsqueeze(1) for x in (cap, weight, origin, log_sum, tau)
            )
            moved = softcapped(z, c) - top
            terms.append((moved / t - total + w.log() if mix == "probs" else moved, w))
        mixed = _log_sum(terms) if mix == "probs" else _sum(terms)
        out[chunk] = torch.where(rows.read[chunk].unsqueeze(1), mixed, 0.0).to(dtype)
    rows.values = {**values, "teacher_logit_softcap": math.inf}
    if mix == "probs":
        rows.values.update(teacher_temperature=1.0, teacher_temperatures=None)
    return out.reshape(*rows.leading, shards.columns), factor


def _log_sum(terms: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Log of the sum of the exponentials, without those of weight 0. Terms: (logit, weight)."""
    return torch.stack([torch.where(w == 0, -math.inf, x) for x, w in terms]).logsumexp(0)


def _sum(terms: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The weighted sum; -inf where one of nonzero weight is impossible, NaN of NaN and +inf."""
    total, lost = torch.zeros_like(terms[0][0]), torch.zeros_like(terms[0][0], dtype=torch.bool)
    for x, w in terms:
        dead = (x < -DEAD) & (w != 0)
        lost = lost | dead
        total = total + torch.where(dead | (w == 0), 0.0, x * w)
    return torch.where(lost & total.isfinite(), -math.inf, total + (total - total))
