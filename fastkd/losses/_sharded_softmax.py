"""Losses and statistics of the softmaxes of rows split across processes: one collective each."""

from typing import Any

import torch
from torch import Tensor

from fastkd._ops import shards as ops
from fastkd._ops.arguments import CHOICES
from fastkd._ops.op import Op, Plain
from fastkd._ops.shard_softmax import SoftmaxCall, possible
from fastkd._ops.shards import Merged, Shards
from fastkd.losses._sharded import LossRows, side_table

_DIVERGENCES = CHOICES["softmax_divergence.divergence"]


def token_log_probs(
    op: Op, values: dict[str, Any], shards: Shards, inplace: bool
) -> tuple[Tensor, Tensor | None]:
    """`fastkd.token_log_probs` of columns split across processes."""
    logits = values["logits"]
    rows = LossRows(shards, logits, values, labels="token_ids")
    call = SoftmaxCall(shards, entropy=values["entropy"], token=True)
    found = call.numbers(logits, side_table(rows, 1.0, "logit_softcap"), rows.token_ids())
    found, lost = found.cleaned()
    assert found.token_logit is not None

    def result(x: Tensor) -> Tensor:
        x = ops.poisoned(x, lost)
        return torch.where(rows.kept, x, 0.0).reshape(rows.leading).to(ops.dtype_of(logits))

    token = rows.owned(found.token_logit)
    log_probs = possible(token) / rows.column("temperature") - found.log_sum
    return result(log_probs), None if found.entropy is None else result(found.entropy)


def cross_entropy(op: Op, values: dict[str, Any], shards: Shards, inplace: bool) -> Tensor:
    """`fastkd.cross_entropy` of columns split across processes."""
    logits = values["logits"]
    rows = LossRows(shards, logits, values)
    tau = rows.column("temperature")
    smoothing, of_entropy = values["label_smoothing"], values["entropy_weight"]
    z_loss = values["z_loss_weight"]
    some_entropy = not _is(of_entropy, 0)
    call = SoftmaxCall(
        shards,
        second=some_entropy,
        second_entropy=some_entropy,
        token=True,
        total=not _is(smoothing, 0),
        best=some_entropy and values["entropy_correct"],
        inplace=inplace,
    )
    base = side_table(rows, values["entropy_temperature"], "student_logit_softcap")
    found, lost = call.numbers(logits, base, rows.token_ids()).cleaned()
    losses = found.log_sum * 0
    if not _is(smoothing, 1):
        assert found.token_logit is not None
        token = rows.owned(found.token_logit)
        losses = losses - (1 - smoothing) * (possible(token) / tau - found.log_sum)
    if found.total is not None:
        losses = losses + smoothing * (found.log_sum - found.total / (tau * shards.vocab))
    if not _is(z_loss, 0):
        losses = losses + z_loss * (found.log_sum + found.origin / tau) ** 2
    if found.second_entropy is not None:
        entropy = found.second_entropy
        if values["entropy_mask"] is not None:
            entropy = torch.where(rows.flat(values["entropy_mask"]), entropy, 0.0)
        if found.best is not None and rows.labels is not None:
            entropy = torch.where(found.best == rows.labels, entropy, 0.0)
        losses = losses + of_entropy * entropy
    return rows.divided(ops.poisoned(losses, lost))


def _is(number: Any, value: float) -> bool:
    """Whether it is that number; while tracing it may be a tensor, whose value is not known."""
    return isinstance(number, (int, float)) and number == value


def token_stats(
    op: Plain, values: dict[str, Any], shards: Shards, inplace: bool
) -> tuple[Tensor, Tensor]:
    """The numbers and likeliest tokens of `fastkd.token_stats`, of columns split across processes.

    The logits of each side may have a soft cap, which the op of one process does not take.
    """
    student, teacher = values["student_logits"], values["teacher_logits"]
    caps = [values.get(f"{side}_logit_softcap", torch.inf) for side in ("student", "teacher")]
    rows = LossRows(shards, student, {**values, "ignore_index": -100})
    # Rows without a label have the other statistics.
    rows.kept = rows.read = torch.ones_like(rows.read)
    tau, token_ids = rows.column("temperature"), rows.token_ids()
    one = torch.ones_like(tau)
    sides = [student] if teacher is None else [student, teacher]
    wanted = (ops.ORIGIN, ops.SUM, ops.WEIGHTED, ops.TOKEN_LOGIT, ops.BEST_LOGIT, ops.BEST_COLUMN)
    sent = []
    for logits, cap in zip(sides, caps, strict=False):
        base = torch.stack([one, tau, one, one * cap])
        own = ops.statistics(shards, logits, base, token_ids, ops.ENTROPY + ops.BEST).clone()
        own[ops.BEST_COLUMN] += shards.start
        sent += [own[i] for i in wanted]
    every = shards.gather_first(torch.stack(sent), ops.sent_dtype(shards, *sides))
    numbers, likeliest, frames = [], [], []
    for side in every.split(len(wanted), 1):
        origins, sums, weighted, token, top, column = side.unbind(1)
        merged = Merged(origins)
        log_sum = merged.log_sum(sums, tau)
        best = torch.where(top == top.amax(0), column, torch.inf).amin(0)
        likeliest.append(torch.where(log_sum.isnan(), -1, best).to(torch.int64))
        label = torch.zeros_like(log_sum)
        if rows.labels is not None:
            label = (rows.owned(token.amax(0)) - merged.origin) / tau - log_sum
        top_prob = ((top.amax(0) - merged.origin) / tau - log_sum).exp()
        entropy = merged.entropy(sums, weighted, tau)
        numbers += [merged.origin / tau + log_sum, entropy, top_prob, label]
        frames += [merged.origin, log_sum / ops.LN2]
    if teacher is not None:
        pair = torch.stack([one, tau, tau, one, one, *(one * cap for cap in caps), *frames])
        found = []
        for divergence in ("forward_kl", "reverse_kl", "tvd"):
            place = _DIVERGENCES[divergence]
            found.append(ops.pair_sums(shards, student, teacher, pair, token_ids, place)[0])
        poison = frames[1] - frames[1] + (frames[3] - frames[3])
        both = shards.gather(torch.stack(found), ops.dtype_of(*sides)).sum(0) + poison
        numbers += both.unbind(0)
    stacked = [torch.stack(x).reshape(len(x), *rows.leading) for x in (numbers, likeliest)]
    return stacked[0].to(ops.dtype_of(*sides)), stacked[1]
