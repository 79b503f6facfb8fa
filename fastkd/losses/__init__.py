"""Losses and statistics over rows of logits, one module per op.

Each module has the public function with its documentation, and the declaration of its op.
"""

from fastkd.losses._clipped_divergence import clipped_divergence
from fastkd.losses._cross_entropy import cross_entropy
from fastkd.losses._kl_div import kl_div
from fastkd.losses._linear_softmax_divergence import linear_softmax_divergence
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.losses._token_log_probs import TokenLogProbs, token_log_probs
from fastkd.losses._token_stats import TokenStats, token_stats
from fastkd.losses._topk_divergence import topk_divergence
from fastkd.losses._topk_stats import TopKStats, topk_stats

__all__ = [
    "TokenLogProbs",
    "TokenStats",
    "TopKStats",
    "clipped_divergence",
    "cross_entropy",
    "kl_div",
    "linear_softmax_divergence",
    "softmax_divergence",
    "token_log_probs",
    "token_stats",
    "topk_divergence",
    "topk_stats",
]
