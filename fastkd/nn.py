"""Modules for each loss and for gated routing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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


class _Loss(torch.nn.Module):
    """A loss function with options from the constructor; a call may add or replace some."""

    function: Callable[..., Any]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = self.function.__kwdefaults__ or {}
        for name in options:
            if name not in known:
                raise TypeError(
                    f"{type(self).__name__}: unknown option {name!r}; {self.function.__name__} "
                    f"takes {', '.join(known)}"
                )
        self.options = options

    def forward(self, *inputs: Any, **batch: Any) -> Tensor:
        """Call the function; ``batch`` adds or replaces options."""
        return self.function(*inputs, **{**self.options, **batch})

    def extra_repr(self) -> str:
        """The options passed to the constructor."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class SoftmaxDivergence(_Loss):
    """:func:`fastkd.softmax_divergence` with its options fixed at construction.

    Args:
        options: the keyword arguments of :func:`fastkd.softmax_divergence` that stay the same
            from batch to batch (divergence, temperature, reduction, ...).

    Call it with student_logits and teacher_logits. Pass options that change with the batch
    (``weight``, ``mask``, ``labels``, ``teacher_weights``, ``normalizer``, and temperatures, beta,
    alpha and label_weight of each row) to the call.

    >>> import torch, fastkd
    >>> loss = fastkd.nn.SoftmaxDivergence(divergence="jsd", reduction="sum")
    >>> loss
    SoftmaxDivergence(divergence='jsd', reduction='sum')
    >>> round(loss(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])).item(), 4)
    0.1109
    """

    function = staticmethod(softmax_divergence)


class LinearSoftmaxDivergence(_Loss):
    """:func:`fastkd.linear_softmax_divergence` with its options fixed at construction.

    Args:
        options: its keyword arguments that stay the same from batch to batch.

    Call it with student_hidden, student_weight, teacher_hidden and teacher_weight.

    >>> import torch, fastkd
    >>> loss = fastkd.nn.LinearSoftmaxDivergence(divergence="jsd", chunk_size=1024)
    >>> hidden, head = torch.ones(3, 2), torch.eye(4, 2)
    >>> loss(hidden, head, hidden, head).item()
    0.0
    """

    function = staticmethod(linear_softmax_divergence)


class TopKDivergence(_Loss):
    """:func:`fastkd.topk_divergence` with its options fixed at construction.

    Args:
        options: its keyword arguments that stay the same from batch to batch.

    Call it with student_logits, teacher_log_probs and teacher_indices.

    >>> import torch, fastkd
    >>> loss = fastkd.nn.TopKDivergence(tail="renormalize")
    >>> best = fastkd.teacher_topk(torch.tensor([[0.0, 1.0, 2.0]]), 2)
    >>> round(loss(torch.tensor([[5.0, 1.0, 2.0]]), *best).item(), 4)
    0.0
    """

    function = staticmethod(topk_divergence)


class KDLoss(_Loss):
    r"""What recipes of NeMo Automodel, torchtune, Model-Optimizer and Lightning call a KD loss.

    ``forward(student_logits, teacher_logits, labels=None, num_batch_labels=None)`` is the mean of
    :func:`fastkd.softmax_divergence` over the rows whose label is not ``ignore_index``; with
    ``num_batch_labels`` the sum over them, divided by it. Labels are shifted already: row t is
    scored by ``labels[t]``. They choose the rows; their cross-entropy counts only with a
    ``label_weight`` (0 here).

    Logits may be DTensors whose vocabulary is sharded, as tensor parallelism leaves them; the
    result is then the whole loss, the same on each rank.

    Args:
        ignore_index: of labels whose rows drop out.
        temperature: of both sides.
        square_temperature: multiplies the loss by temperature².
        options: further keyword arguments of :func:`fastkd.softmax_divergence`.

    Raises:
        TypeError: an unknown option, or one that ``forward`` gives.

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
        temperature: float = 1.0,
        square_temperature: bool = True,
        **options: Any,
    ) -> None:
        for name in ("labels", "normalizer", "reduction", "inplace"):
            if name in options:
                raise TypeError(f"KDLoss: {name} is not an option: forward takes what a step has")
        super().__init__(
            **{"label_weight": 0.0, **options},
            ignore_index=ignore_index,
            temperature=temperature,
            square_temperature=square_temperature,
        )
        # Recipes read these two.
        self.ignore_index = ignore_index
        self.temperature = temperature

    def forward(  # type: ignore[override]
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        num_batch_labels: float | Tensor | None = None,
    ) -> Tensor:
        """See the class."""
        options = {
            **self.options,
            "ignore_index": self.ignore_index,
            "temperature": self.temperature,
        }
        if labels is None:
            del options["label_weight"]
        loss = softmax_divergence(
            student_logits, teacher_logits, labels=labels, normalizer=num_batch_labels, **options
        )
        whole = getattr(loss, "full_tensor", None)  # of a DTensor
        return loss if whole is None else whole()


class ClippedDivergence(_Loss):
    """:func:`fastkd.clipped_divergence` with its options fixed at construction.

    Args:
        options: its keyword arguments that stay the same from batch to batch.

    Call it with student_logits, teacher_logits, lower and upper.

    >>> import torch, fastkd
    >>> loss = fastkd.nn.ClippedDivergence(tail="lump")
    >>> loss(torch.zeros(1, 3), torch.zeros(1, 3), 0.1, 0.9).item()
    0.0
    """

    function = staticmethod(clipped_divergence)


class CrossEntropy(_Loss):
    """:func:`fastkd.cross_entropy` with its options fixed at construction.

    Args:
        options: its keyword arguments that stay the same from batch to batch.

    Call it with logits and labels.

    >>> import torch, fastkd
    >>> loss = fastkd.nn.CrossEntropy(label_smoothing=0.1)
    >>> round(loss(torch.zeros(1, 2), torch.tensor([1])).item(), 4)
    0.6931
    """

    function = staticmethod(cross_entropy)


class AlmLoss(_Loss):
    """:func:`fastkd.alm_loss` with its options fixed at construction.

    Args:
        options: its keyword arguments that stay the same from batch to batch, including boundary
            sets.

    Call it with logits, token ids and chunk ids of the student, the same of the teacher, and
    num_chunks.

    >>> import torch, fastkd
    >>> loss = fastkd.nn.AlmLoss(divergence="k2", temperature=1.0)
    >>> logits, ids = torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.long)
    >>> loss(logits, ids, ids, logits, ids, ids, 1).item()
    0.0
    """

    function = staticmethod(alm_loss)
