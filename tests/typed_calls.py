"""Calls that mypy must accept, and calls that it must refuse: an unused ``ignore`` is an error.

`make lint` checks it (``[tool.mypy]`` in pyproject.toml); nothing runs it.
"""

import torch

import fastkd
from fastkd.typing import Divergence, Reduction


def accepted(x: torch.Tensor, rows: torch.Tensor, divergence: Divergence, how: Reduction) -> None:
    """Names of all kinds, as literals and as the types of a caller."""
    fastkd.softmax_divergence(x, x, divergence="jsd", reduction="batchmean", teacher_mix="probs")
    fastkd.softmax_divergence(x, x, divergence=divergence, reduction=how)
    fastkd.topk_divergence(x, x, rows, divergence="reverse_kl", tail="drop")
    fastkd.clipped_divergence(x, x, 0.1, 0.9, tail="lump", renormalize="both")
    fastkd.cross_entropy(x, rows, reduction="none")
    fastkd.recipes.uld(x, x, reduction="sequence_mean")
    fastkd.nn.SoftmaxDivergence(divergence="tvd", reduction=how, beta=rows)
    fastkd.nn.TopKDivergence(tail="renormalize")
    fastkd.nn.KDLoss(divergence=divergence, temperature=2.0)
    fastkd.integrations.KDOptions(divergence=divergence, tail="drop", head="logits")
    fastkd.TeacherStore.create("teacher", vocab_size=9, k=2, log_probs="float16")


def refused(x: torch.Tensor, rows: torch.Tensor, name: str) -> None:
    """Names that do not exist, and text that may be anything."""
    fastkd.softmax_divergence(x, x, divergence="kl")  # type: ignore[arg-type]
    fastkd.softmax_divergence(x, x, divergence=name)  # type: ignore[arg-type]
    fastkd.softmax_divergence(x, x, reduction="average")  # type: ignore[arg-type]
    fastkd.softmax_divergence(x, x, reduction="sequence_mean")  # type: ignore[arg-type]
    fastkd.topk_divergence(x, x, rows, divergence="tvd")  # type: ignore[arg-type]
    fastkd.topk_divergence(x, x, rows, tail="rest")  # type: ignore[arg-type]
    fastkd.clipped_divergence(x, x, 0.1, 0.9, tail="uniform")  # type: ignore[arg-type]
    fastkd.nn.SoftmaxDivergence(divergence="kl")  # type: ignore[arg-type]
    fastkd.nn.SoftmaxDivergence(temprature=2.0)  # type: ignore[call-arg]
    fastkd.nn.TopKDivergence(tail="rest")  # type: ignore[arg-type]
    fastkd.nn.KDLoss(reduction="sum")  # type: ignore[call-arg]
    fastkd.integrations.KDOptions(divergence="kl")  # type: ignore[arg-type]
    fastkd.integrations.KDOptions(head="plain")  # type: ignore[arg-type]
    fastkd.TeacherStore.create("t", vocab_size=9, k=2, log_probs="4bit")  # type: ignore[arg-type]
