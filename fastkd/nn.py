"""Modules for each loss and for gated routing.

A loss module has its function's keyword arguments that stay the same from batch to batch, checked
when it is made: a wrong name or value raises the function's error at once. Tensors among them move
with the module and keep their dtype. Those that change with the batch (``weight``, ``mask``,
``labels``, ``teacher_rows``) go to the call, which may replace others, too. Its ``repr`` shows the
options that are not the defaults.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd._ops import hints
from fastkd._ops.loss_module import LossModule, columns
from fastkd._ops.names import (
    AlmDivergence,
    ClippedTail,
    Divergence,
    Reduction,
    Renormalize,
    Tail,
    TeacherMix,
)
from fastkd._ops.names import TopKDivergence as TopKDivergenceName
from fastkd.acm._modules import ACM, ACMGate
from fastkd.losses._clipped_divergence import clipped_divergence
from fastkd.losses._cross_entropy import cross_entropy
from fastkd.losses._kl_div import kl_div
from fastkd.losses._linear_softmax_divergence import linear_softmax_divergence
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.losses._topk_divergence import topk_divergence
from fastkd.tokenizers._alm_loss import alm_loss

__all__ = [
    "ACM",
    "ACMGate",
    "AlmLoss",
    "ClippedDivergence",
    "CrossEntropy",
    "KDLoss",
    "KLDivLoss",
    "LinearSoftmaxDivergence",
    "SoftmaxDivergence",
    "TopKDivergence",
]


class KLDivLoss(torch.nn.KLDivLoss):
    """Drop-in for :class:`torch.nn.KLDivLoss` on :func:`fastkd.kl_div`.

    >>> import torch, fastkd
    >>> loss = fastkd.nn.KLDivLoss(reduction="batchmean")
    >>> x = torch.tensor([[0.5, 0.5]]).log()
    >>> round(loss(x, torch.tensor([[0.25, 0.75]])).item(), 4)
    0.1308
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """See :func:`fastkd.kl_div`."""
        return kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


def _call_divergence(one: Tensor, options: dict[str, Any]) -> None:
    logits, weights = columns(one, options), options.get("teacher_weights")
    labels = one.new_zeros(one.shape[:-1], dtype=torch.int64)
    teachers: Any = logits
    if isinstance(weights, Tensor) and weights.dim():
        teachers = [logits] * weights.size(-1)
    elif isinstance(weights, Sequence) and not isinstance(weights, str):
        teachers = [logits] * len(weights)
    softmax_divergence(logits, teachers, labels=labels, **options)


class SoftmaxDivergence(LossModule):
    """:func:`fastkd.softmax_divergence` with its options fixed at construction.

    Call it with student_logits and teacher_logits, and with what changes with the batch:
    ``weight``, ``mask``, ``labels``, ``teacher_rows``, and mostly ``teacher_weights``,
    ``normalizer``, and temperatures, beta, alpha and label_weight of each row.

    Raises:
        ValueError, TypeError: an option has the wrong name, value or type.

    >>> import torch, fastkd
    >>> loss = fastkd.nn.SoftmaxDivergence(divergence="jsd", reduction="sum")
    >>> loss
    SoftmaxDivergence(divergence='jsd', reduction='sum')
    >>> round(loss(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])).item(), 4)
    0.1109
    """

    function = staticmethod(softmax_divergence)

    def __init__(
        self,
        *,
        divergence: Divergence = "forward_kl",
        beta: float | Tensor = 0.5,
        alpha: float | Tensor = 1.0,
        temperature: float | Tensor = 1.0,
        teacher_temperature: float | Tensor | None = None,
        teacher_weights: Sequence[float] | Tensor | None = None,
        teacher_mix: TeacherMix = "logits",
        label_weight: float | Tensor = 1.0,
        ignore_index: int = -100,
        shift: int = 0,
        vocab_size: int | None = None,
        logit_softcap: float | tuple[float | None, float | None] | None = None,
        reduction: Reduction = "mean",
        normalizer: float | Tensor | None = None,
        square_temperature: bool = False,
        inplace: bool = False,
        group: Any = None,
        vocab_start: int | None = None,
    ) -> None:
        super().__init__(locals())

    def _call(self, one: Tensor, options: dict[str, Any]) -> None:
        _call_divergence(one, options)


class LinearSoftmaxDivergence(LossModule):
    """:func:`fastkd.linear_softmax_divergence` with its options fixed at construction.

    Call it with student_hidden, student_weight, teacher_hidden and teacher_weight. A bias that is a
    Parameter is one of the module's parameters.

    >>> import torch, fastkd
    >>> loss = fastkd.nn.LinearSoftmaxDivergence(divergence="jsd", chunk_size=1024)
    >>> hidden, head = torch.ones(3, 2), torch.eye(4, 2)
    >>> loss(hidden, head, hidden, head).item()
    0.0
    """

    function = staticmethod(linear_softmax_divergence)
    learned = ("student_bias", "teacher_bias")

    def __init__(
        self,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        logit_scale: float | tuple[float, float] = 1.0,
        logit_softcap: float | tuple[float | None, float | None] | None = None,
        chunk_size: int | None = None,
        compact: bool | None = None,
        logits_dtype: torch.dtype | None = None,
        return_stats: bool = False,
        reduce_hidden_grad: bool = True,
        divergence: Divergence = "forward_kl",
        beta: float | Tensor = 0.5,
        alpha: float | Tensor = 1.0,
        temperature: float | Tensor = 1.0,
        teacher_temperature: float | Tensor | None = None,
        teacher_weights: Sequence[float] | Tensor | None = None,
        teacher_mix: TeacherMix = "logits",
        label_weight: float | Tensor = 1.0,
        ignore_index: int = -100,
        shift: int = 0,
        vocab_size: int | None = None,
        reduction: Reduction = "mean",
        normalizer: float | Tensor | None = None,
        square_temperature: bool = False,
        group: Any = None,
        vocab_start: int | None = None,
    ) -> None:
        super().__init__(locals())

    def _call(self, one: Tensor, options: dict[str, Any]) -> None:
        biases = (options["student_bias"], options["teacher_bias"])
        sizes = [x.numel() for x in biases if isinstance(x, Tensor)] or [1]
        student, teacher = (
            columns(one.new_zeros(1), options, least=size).unsqueeze(-1) for size in (sizes * 2)[:2]
        )
        labels = one.new_zeros(one.shape[:-1], dtype=torch.int64)
        linear_softmax_divergence(one, student, one, teacher, labels=labels, **options)


class TopKDivergence(LossModule):
    """:func:`fastkd.topk_divergence` with its options fixed at construction.

    Call it with student_logits, teacher_log_probs and teacher_indices.

    >>> import torch, fastkd
    >>> loss = fastkd.nn.TopKDivergence(tail="renormalize")
    >>> best = fastkd.teacher_topk(torch.tensor([[0.0, 1.0, 2.0]]), 2)
    >>> round(loss(torch.tensor([[5.0, 1.0, 2.0]]), *best).item(), 4)
    0.0
    """

    function = staticmethod(topk_divergence)

    def __init__(
        self,
        *,
        divergence: TopKDivergenceName = "forward_kl",
        beta: float | Tensor = 0.5,
        tail: Tail = "lump",
        temperature: float | Tensor = 1.0,
        stored_temperature: float = 1.0,
        teacher_temperature: float | Tensor | None = None,
        min_log_prob: float | None = None,
        max_token_loss: float | None = None,
        label_weight: float | Tensor = 1.0,
        ignore_index: int = -100,
        shift: int = 0,
        vocab_size: int | None = None,
        logit_softcap: float | tuple[float | None, float | None] | None = None,
        reduction: Reduction = "mean",
        normalizer: float | Tensor | None = None,
        square_temperature: bool = False,
        group: Any = None,
        vocab_start: int | None = None,
    ) -> None:
        super().__init__(locals())

    def _call(self, one: Tensor, options: dict[str, Any]) -> None:
        index = one.new_zeros(one.shape, dtype=torch.int64)
        topk_divergence(columns(one, options, least=2), one, index, **options)


class KDLoss(LossModule):
    r"""What recipes of NeMo Automodel, torchtune, Model-Optimizer and Lightning call a KD loss.

    ``forward(student_logits, teacher_logits, labels=None, num_batch_labels=None)`` is the mean of
    :func:`fastkd.softmax_divergence` over the rows whose label is not ``ignore_index``; with
    ``num_batch_labels`` the sum over them, divided by it. Labels are shifted already: row t is
    scored by ``labels[t]``. They choose the rows; their cross-entropy counts only with a
    ``label_weight`` (0 here). A call without labels warns once if there is one.

    Logits may be DTensors whose vocabulary is sharded, as tensor parallelism leaves them; the
    result is then the whole loss, the same on each rank.

    Args:
        ignore_index: of labels whose rows drop out.
        temperature: of both sides.
        square_temperature: multiplies the loss by temperature².
        divergence: as for :func:`fastkd.softmax_divergence`, and so the others.

    Raises:
        ValueError, TypeError: an option has the wrong name, value or type.

    >>> import torch, fastkd
    >>> loss = fastkd.nn.KDLoss(temperature=2.0)
    >>> labels = torch.tensor([1, -100])
    >>> student, teacher = torch.zeros(2, 2), torch.tensor([[0.0, 2.0], [9.0, 0.0]])
    >>> round(loss(student, teacher, labels).item(), 4)
    0.4438
    >>> round(loss(student, teacher, labels, num_batch_labels=2).item(), 4)
    0.2219
    """

    function = staticmethod(softmax_divergence)

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        temperature: float | Tensor = 1.0,
        square_temperature: bool = True,
        divergence: Divergence = "forward_kl",
        beta: float | Tensor = 0.5,
        alpha: float | Tensor = 1.0,
        teacher_temperature: float | Tensor | None = None,
        teacher_weights: Sequence[float] | Tensor | None = None,
        teacher_mix: TeacherMix = "logits",
        label_weight: float | Tensor = 0.0,
        shift: int = 0,
        vocab_size: int | None = None,
        logit_softcap: float | tuple[float | None, float | None] | None = None,
        group: Any = None,
        vocab_start: int | None = None,
    ) -> None:
        super().__init__(locals())

    def _call(self, one: Tensor, options: dict[str, Any]) -> None:
        _call_divergence(one, options)

    @property
    def ignore_index(self) -> int:
        """Of labels whose rows drop out. Recipes read and set it."""
        return self.options["ignore_index"]

    @ignore_index.setter
    def ignore_index(self, value: int) -> None:
        self.options["ignore_index"] = value

    @property
    def temperature(self) -> float | Tensor:
        """Of both sides. Recipes read and set it."""
        return self.options["temperature"]

    @temperature.setter
    def temperature(self, value: float | Tensor) -> None:
        self.options["temperature"] = value

    def forward(  # type: ignore[override]
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        num_batch_labels: float | Tensor | None = None,
    ) -> Tensor:
        """See the class."""
        options = dict(self.options)
        if labels is None:
            hints.check_label_weight("KDLoss", options.pop("label_weight"))
        loss = softmax_divergence(
            student_logits, teacher_logits, labels=labels, normalizer=num_batch_labels, **options
        )
        whole = getattr(loss, "full_tensor", None)  # of a DTensor
        return loss if whole is None else whole()


class ClippedDivergence(LossModule):
    """:func:`fastkd.clipped_divergence` with its options fixed at construction.

    Call it with student_logits, teacher_logits, lower and upper.

    >>> import torch, fastkd
    >>> loss = fastkd.nn.ClippedDivergence(tail="lump")
    >>> loss(torch.zeros(1, 3), torch.zeros(1, 3), 0.1, 0.9).item()
    0.0
    """

    function = staticmethod(clipped_divergence)

    def __init__(
        self,
        *,
        keep_label: bool = True,
        renormalize: Renormalize = "none",
        tail: ClippedTail = "drop",
        softness: float | None = None,
        quantile: bool = False,
        temperature: float | Tensor = 1.0,
        teacher_temperature: float | Tensor | None = None,
        label_weight: float | Tensor = 1.0,
        ignore_index: int = -100,
        shift: int = 0,
        vocab_size: int | None = None,
        logit_softcap: float | tuple[float | None, float | None] | None = None,
        reduction: Reduction = "mean",
        normalizer: float | Tensor | None = None,
        square_temperature: bool = False,
        group: Any = None,
        vocab_start: int | None = None,
    ) -> None:
        super().__init__(locals())

    def _call(self, one: Tensor, options: dict[str, Any]) -> None:
        logits = columns(one, options)
        clipped_divergence(logits, logits, 0.0, 1.0, **options)


class CrossEntropy(LossModule):
    """:func:`fastkd.cross_entropy` with its options fixed at construction.

    Call it with logits and labels.

    >>> import torch, fastkd
    >>> loss = fastkd.nn.CrossEntropy(label_smoothing=0.1)
    >>> round(loss(torch.zeros(1, 2), torch.tensor([1])).item(), 4)
    0.6931
    """

    function = staticmethod(cross_entropy)

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        label_smoothing: float = 0.0,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 1.0,
        entropy_mask: Tensor | str | None = None,
        z_loss_weight: float = 0.0,
        ignore_index: int = -100,
        shift: int = 0,
        vocab_size: int | None = None,
        logit_softcap: float | None = None,
        reduction: Reduction = "mean",
        normalizer: float | Tensor | None = None,
        inplace: bool = False,
        group: Any = None,
        vocab_start: int | None = None,
    ) -> None:
        super().__init__(locals())

    def _call(self, one: Tensor, options: dict[str, Any]) -> None:
        labels = one.new_zeros(one.shape[:-1], dtype=torch.int64)
        cross_entropy(columns(one, options), labels, **options)


class AlmLoss(LossModule):
    """:func:`fastkd.alm_loss` with its options fixed at construction.

    Call it with logits, token ids and chunk ids of the student, the same of the teacher, and
    num_chunks.

    >>> import torch, fastkd
    >>> loss = fastkd.nn.AlmLoss(divergence="k2", temperature=1.0)
    >>> logits, ids = torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.long)
    >>> loss(logits, ids, ids, logits, ids, ids, 1).item()
    0.0
    """

    function = staticmethod(alm_loss)

    def __init__(
        self,
        *,
        divergence: AlmDivergence = "binary_ce",
        temperature: float = 100.0,
        epsilon: float = 1e-06,
        student_boundary: Tensor | np.ndarray | None = None,
        teacher_boundary: Tensor | np.ndarray | None = None,
        debias: bool = True,
        merge_threshold: float | None = None,
        reduction: Reduction = "mean",
        normalizer: float | Tensor | None = None,
    ) -> None:
        super().__init__(locals())

    def _call(self, one: Tensor, options: dict[str, Any]) -> None:
        ids = torch.zeros(1, 0, dtype=torch.int64, device="cpu")
        sides: list[Any] = []
        for side in ("student", "teacher"):
            boundary = options[f"{side}_boundary"]
            is_set = isinstance(boundary, Tensor | np.ndarray) and boundary.ndim == 1
            width = len(boundary) if is_set else 1
            like = ids.to(boundary.device) if isinstance(boundary, Tensor) else ids
            sides += [like.new_zeros(1, 0, width, dtype=torch.float32), like, like]
        student, teacher = sides[:3], sides[3:]
        alm_loss(*student, *teacher, 0, **options)  # type: ignore[call-arg, arg-type]
