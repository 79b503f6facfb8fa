"""Modules: one for each loss."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.kl_div import kl_div
from fastkd.softmax_divergence import softmax_divergence

__all__ = ["KLDivLoss", "SoftmaxDivergence"]


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


class SoftmaxDivergence(torch.nn.Module):
    """:func:`fastkd.softmax_divergence` with its options fixed at construction.

    Args:
        options: the keyword arguments of :func:`fastkd.softmax_divergence` that stay the same
            from batch to batch (divergence, temperature, reduction, ...).

    Those that change with the batch (``weight``, ``mask``, ``labels``, ``teacher_weights``,
    ``normalizer``, per-row temperatures) are passed when calling.

    >>> import torch, fastkd
    >>> loss = fastkd.nn.SoftmaxDivergence(divergence="jsd", reduction="sum")
    >>> loss
    SoftmaxDivergence(divergence='jsd', reduction='sum')
    >>> round(loss(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])).item(), 4)
    0.1109
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = softmax_divergence.__kwdefaults__ or {}
        for name in options:
            if name not in known:
                raise TypeError(
                    f"SoftmaxDivergence: unknown option {name!r}; softmax_divergence takes "
                    f"{', '.join(known)}"
                )
        self.options = options

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor | Sequence[Tensor], **batch: Any
    ) -> Tensor:
        """See :func:`fastkd.softmax_divergence`; ``batch`` adds to or replaces the options."""
        return softmax_divergence(student_logits, teacher_logits, **{**self.options, **batch})

    def extra_repr(self) -> str:
        """The options, as passed."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
