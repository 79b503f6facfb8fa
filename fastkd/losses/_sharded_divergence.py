"""softmax_divergence of columns split across processes."""

from typing import Any

from torch import Tensor

from fastkd._ops.arguments import CHOICES
from fastkd._ops.op import Op
from fastkd._ops.shards import Shards, table
from fastkd.losses._sharded import LossRows, label_term
from fastkd.losses._sharded_decoupled import DecoupledCall
from fastkd.losses._sharded_pair import PairCall
from fastkd.losses._sharded_teachers import mixture, taught

_DECOUPLED = CHOICES["softmax_divergence.divergence"]["decoupled_kl"]


def softmax_divergence(op: Op, values: dict[str, Any], shards: Shards, inplace: bool) -> Tensor:
    """`fastkd.softmax_divergence` of columns split across processes."""
    student, teachers = values["student_logits"], values["teacher_logits"]
    rows = LossRows(shards, student, values, *teachers)
    if values["teacher_rows"] is not None:
        teachers = [taught(rows, x) for x in teachers]
    teacher, factor = mixture(rows, teachers)
    base = table(
        rows.count,
        student,
        rows.read,
        rows.column("temperature"),
        rows.column("teacher_temperature"),
        rows.column("beta"),
        rows.column("alpha"),
        rows.values["student_logit_softcap"],
        rows.values["teacher_logit_softcap"],
    )
    divergence = values["divergence"]
    kind = DecoupledCall if divergence == _DECOUPLED else PairCall
    call = kind(rows, divergence, inplace)
    found = call.numbers(base, rows.token_ids(), student, teacher)
    value, label_loss = call.losses(base, found)
    losses = value if factor is None else value * factor
    if values["square_temperature"]:
        losses = losses * rows.column("temperature") ** 2
    if label_loss is not None:
        weight = rows.number("label_weight", shifted=True)
        losses = losses + label_term(weight, label_loss)
    return rows.divided(losses)
