"""fastkd: fused kernels for knowledge-distillation losses in PyTorch."""

from fastkd import acm, integrations, nn, recipes, reference
from fastkd._ops.gradient import release_memory
from fastkd._ops.library import VERSION as __version__
from fastkd._ops.library import cpu_capability
from fastkd._ops.linear.logits import LinearLogits
from fastkd.losses import (
    TokenLogProbs,
    TokenStats,
    TopKStats,
    clipped_divergence,
    cross_entropy,
    kl_div,
    linear_softmax_divergence,
    softmax_divergence,
    token_log_probs,
    token_stats,
    topk_divergence,
    topk_stats,
)
from fastkd.teachers import TeacherStore, TopK, teacher_topk
from fastkd.tokenizers import (
    Alignment,
    ByteStream,
    ByteVocab,
    ChunkLogLikelihood,
    align,
    align_batch,
    alm_loss,
    byte_log_probs,
    chunk_log_likelihood,
)

__all__ = [
    "Alignment",
    "ByteStream",
    "ByteVocab",
    "ChunkLogLikelihood",
    "LinearLogits",
    "TeacherStore",
    "TokenLogProbs",
    "TokenStats",
    "TopK",
    "TopKStats",
    "__version__",
    "acm",
    "align",
    "align_batch",
    "alm_loss",
    "byte_log_probs",
    "chunk_log_likelihood",
    "clipped_divergence",
    "cpu_capability",
    "cross_entropy",
    "integrations",
    "kl_div",
    "linear_softmax_divergence",
    "nn",
    "recipes",
    "reference",
    "release_memory",
    "softmax_divergence",
    "teacher_topk",
    "token_log_probs",
    "token_stats",
    "topk_divergence",
    "topk_stats",
]
