"""topk_divergence of columns split across processes."""

from typing import Any

import torch
from torch import Tensor

from fastkd._ops import shards as ops
from fastkd._ops.arguments import can_be_read
from fastkd._ops.op import Op
from fastkd._ops.shard_softmax import NO_HOLE, SoftmaxCall, SoftmaxNumbers
from fastkd._ops.shards import Shards
from fastkd.losses._sharded import LossRows, at_one, has_labels, label_term, side_table
from fastkd.reference import _topk_divergence as reference
from fastkd.reference._rows import (
    LARGEST_LOG_RATIO,
    exp,
    finite,
    from_largest,
    log_sum_exp,
    shifted,
)
from fastkd.reference._topk_divergence import PADDING_LOG_PROB


def topk_divergence(op: Op, values: dict[str, Any], shards: Shards, inplace: bool) -> Tensor:
    """`fastkd.topk_divergence` of columns split across processes.

    The entries' logits are sent to all processes, which evaluate the divergence alike. The other
    columns matter only through sums over them.
    """
    values = {**op.arguments.unpack(list(values.values())), "reduction": values["reduction"]}
    student = values["student_logits"]
    rows = LossRows(shards, student, values, values["teacher_log_probs"])
    tail, divergence = values["tail"], values["divergence"]
    k = values["teacher_log_probs"].size(-1)
    log_probs = values["teacher_log_probs"].reshape(rows.count, k)
    indices = values["teacher_indices"].reshape(rows.count, k).to(torch.int64)
    stored = (indices >= 0) & rows.read.unsqueeze(1)
    repeated = _repeated(torch.where(stored, indices, -1)) & stored
    _check_entries(shards, indices, log_probs, repeated, rows.read)
    stored = stored & ~(repeated & (log_probs <= PADDING_LOG_PROB))
    labelled = has_labels(rows)
    apart = labelled and not at_one(rows)
    share = rows.number("beta")
    forward, reverse = reference.plain(divergence, share)
    spread = tail == "uniform"
    if spread and divergence == "jsd" and (isinstance(share, Tensor) or not (forward or reverse)):
        raise NotImplementedError("topk_divergence: group takes no jsd with tail='uniform'")
    if spread and values["min_log_prob"] > -torch.inf:
        raise NotImplementedError(
            "topk_divergence: group takes no min_log_prob with tail='uniform'"
        )
    call = SoftmaxCall(
        shards,
        entropy=spread and bool(reverse),
        second=apart,
        token=labelled,
        total=spread and not reverse,
        inplace=inplace,
    )
    holes = torch.where(stored, shards.local(indices), NO_HOLE)
    base = side_table(rows, 1.0, "student_logit_softcap")
    found, lost = call.numbers(student, base, rows.token_ids(), holes=holes).cleaned()
    assert found.holes is not None
    tau = rows.column("temperature").unsqueeze(1)
    entries = torch.where(stored, found.holes, -torch.inf)
    rest = found.log_sum
    log_q_all = torch.cat([entries / tau, rest.unsqueeze(1)], 1)
    log_z = log_sum_exp(log_q_all)
    log_q, log_q_rest = shifted(log_q_all[:, :k], log_z), shifted(log_q_all[:, k:], log_z)
    others = shards.vocab - stored.sum(-1, keepdim=True)
    ratio = values["stored_temperature"] / rows.column("teacher_temperature").unsqueeze(1)
    log_p, log_p_rest, some = reference.teacher_entries(
        log_probs, stored, others, ratio, reverse, tail, torch.float64
    )
    outcomes = stored
    if tail == "renormalize":
        log_q, some_q = reference.normalized(from_largest(entries) / tau)
        some = some & some_q
    elif tail == "lump":
        log_p, log_q = torch.cat([log_p, log_p_rest], 1), torch.cat([log_q, log_q_rest], 1)
        outcomes = torch.cat([stored, others > 0], 1)
    losses = reference.support_loss(
        log_p, log_q, outcomes, divergence, share, tail, values["min_log_prob"]
    )
    if spread:
        losses = losses + _even_rest(
            found, log_p_rest, log_q_rest, log_z, others, tau, divergence, bool(reverse)
        )
    if tail == "renormalize":
        losses = torch.where((some | ~stored.any(-1, True)).squeeze(-1), losses, torch.nan)
    if values["square_temperature"]:
        losses = losses * tau.squeeze(1) ** 2
    cap = values["max_token_loss"]
    losses = torch.where(losses > cap, torch.ones_like(losses) * cap, losses)
    if labelled:
        assert found.token_logit is not None
        at_one_rest = rest if found.second_log_sum is None else found.second_log_sum
        all_at_one = torch.cat([entries, at_one_rest.unsqueeze(1)], 1)
        label_loss = log_sum_exp(all_at_one).squeeze(1) - rows.owned(found.token_logit)
        losses = losses + label_term(rows.number("label_weight", shifted=True), label_loss)
    return rows.divided(ops.poisoned(losses, lost))


def _even_rest(
    found: SoftmaxNumbers,
    log_p_rest: Tensor,
    log_q_rest: Tensor,
    log_z: Tensor,
    others: Tensor,
    tau: Tensor,
    divergence: str,
    reverse: bool,
) -> Tensor:
    """The terms of the tokens that are no entries, of which the teacher has equal shares."""
    p, q = exp(log_p_rest), exp(log_q_rest)
    others = others.to(torch.float64)
    count = others.clamp(min=1)
    log_each = log_p_rest - count.log()
    if reverse:
        assert found.entropy is not None
        # sum q (log q - log each) + p - q, where log q = log q_rest + the log of the share of rest.
        own = torch.where(q > 0, found.entropy.unsqueeze(1), 0.0)
        terms = q * (torch.where(q > 0, log_q_rest, 0.0) - own) - q * finite(log_each) + p - q
        lost = (q > 0) & (log_each == -torch.inf)
    else:
        assert found.total is not None
        log_q = found.total.unsqueeze(1) / tau - others * log_z
        lost = (p > 0) & (log_q == -torch.inf)
        even = torch.where(lost, -LARGEST_LOG_RATIO * others, log_q)
        terms = -p * even / count
        if divergence != "cross_entropy":
            terms = terms + p * finite(log_each) + q - p
    terms = torch.where(lost, terms + (torch.inf - terms).detach(), terms)
    return torch.where(others > 0, terms, 0.0).squeeze(1)


def _repeated(indices: Tensor) -> Tensor:
    """Which entries of a row are there several times."""
    ordered, order = indices.sort(-1)
    same = ordered[:, 1:] == ordered[:, :-1]
    no = torch.zeros_like(indices[:, :1], dtype=torch.bool)
    twice = torch.cat([no, same], 1) | torch.cat([same, no], 1)
    return torch.zeros_like(twice).scatter(1, order, twice)


def _check_entries(
    shards: Shards, indices: Tensor, log_probs: Tensor, repeated: Tensor, read: Tensor
) -> None:
    """Raise as the raw op does, where values can be read without waiting for a device."""
    if not can_be_read(indices) or not indices.numel():
        return
    function, counts = shards.function, read.unsqueeze(1) & (indices != -1)
    real = log_probs > PADDING_LOG_PROB
    wrong = {
        f"teacher_indices must lie in [0, {shards.vocab}) or be -1": (
            IndexError,
            counts & ((indices < 0) | (indices >= shards.vocab)),
        ),
        "teacher_log_probs must be log-probabilities, 0 at most": (
            ValueError,
            counts & (log_probs > 0.02),
        ),
        "teacher_indices must be distinct in a row": (
            ValueError,
            repeated & real & (_count_real(indices, counts & real) > 1),
        ),
    }
    for message, (kind, where) in wrong.items():
        if bool(where.any()):
            row, place = (int(x) for x in where.nonzero()[0])
            got = log_probs if "log_probs" in message else indices
            raise kind(f"{function}: {message}, got {got[row, place].item()} in row {row}")
    mass = torch.where(counts & real, log_probs.double().exp(), 0.0).sum(1)
    if bool((mass > 1.02).any()):
        row = int((mass > 1.02).nonzero()[0])
        raise ValueError(
            f"{function}: teacher_log_probs must have a mass of at most 1 in a row, got "
            f"{mass[row].item()} in row {row}"
        )


def _count_real(indices: Tensor, real: Tensor) -> Tensor:
    """2 for entries that are there several times among the real ones, else 1."""
    places = torch.arange(indices.size(1), device=indices.device)
    return _repeated(torch.where(real, indices, -2 - places)).long() + 1
