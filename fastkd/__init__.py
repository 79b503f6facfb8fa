"""fastkd: fused kernels for knowledge-distillation losses in PyTorch."""

from fastkd import nn, reference
from fastkd._gradient import release_memory
from fastkd._library import cpu_capability
from fastkd.alignment import Alignment, align, align_batch
from fastkd.alm_loss import alm_loss
from fastkd.byte_log_probs import byte_log_probs
from fastkd.byte_vocab import ByteVocab
from fastkd.chunk_log_likelihood import ChunkLogLikelihood, chunk_log_likelihood
from fastkd.clipped_divergence import clipped_divergence
from fastkd.kl_div import kl_div
from fastkd.softmax_divergence import softmax_divergence
from fastkd.teacher_store import TeacherStore
from fastkd.teacher_topk import TeacherTopK, teacher_topk
from fastkd.token_stats import TokenStats, token_stats
from fastkd.topk_divergence import topk_divergence

__version__ = "0.1.0"
__all__ = [
    "Alignment",
    "ByteVocab",
    "ChunkLogLikelihood",
    "TeacherStore",
    "TeacherTopK",
    "TokenStats",
    "align",
    "align_batch",
    "alm_loss",
    "byte_log_probs",
    "chunk_log_likelihood",
    "clipped_divergence",
    "cpu_capability",
    "kl_div",
    "nn",
    "reference",
    "release_memory",
    "softmax_divergence",
    "teacher_topk",
    "token_stats",
    "topk_divergence",
]
