"""Definitions of all ops in plain PyTorch, with which tests, benchmarks and docs compare.

They are written for clarity and for all derivatives, not for speed. Pass float64 inputs for float64
arithmetic. The ops themselves use them for second derivatives and under torch.func transforms.
"""

from fastkd.reference import acm
from fastkd.reference._alm_loss import alm_loss
from fastkd.reference._byte_log_probs import byte_log_probs, byte_log_probs_op
from fastkd.reference._chunk_log_likelihood import (
    chunk_log_likelihood,
    chunk_log_likelihood_op,
)
from fastkd.reference._clipped_divergence import clipped_divergence, clipped_divergence_op
from fastkd.reference._cross_entropy import cross_entropy, cross_entropy_op
from fastkd.reference._linear_softmax_divergence import linear_softmax_divergence
from fastkd.reference._rows import LARGEST_LOG_RATIO, divergence_rows
from fastkd.reference._softmax_divergence import kl_div, softmax_divergence, softmax_divergence_op
from fastkd.reference._token_log_probs import token_log_probs, token_log_probs_op
from fastkd.reference._token_stats import token_stats
from fastkd.reference._topk_divergence import teacher_topk, topk_divergence, topk_divergence_op
from fastkd.reference._topk_stats import topk_stats

__all__ = [
    "LARGEST_LOG_RATIO",
    "acm",
    "alm_loss",
    "byte_log_probs",
    "byte_log_probs_op",
    "chunk_log_likelihood",
    "chunk_log_likelihood_op",
    "clipped_divergence",
    "clipped_divergence_op",
    "cross_entropy",
    "cross_entropy_op",
    "divergence_rows",
    "kl_div",
    "linear_softmax_divergence",
    "softmax_divergence",
    "softmax_divergence_op",
    "teacher_topk",
    "token_log_probs",
    "token_log_probs_op",
    "token_stats",
    "topk_divergence",
    "topk_divergence_op",
    "topk_stats",
]
