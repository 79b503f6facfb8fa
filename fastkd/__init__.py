"""fastkd: fused kernels for knowledge-distillation losses in PyTorch."""

from fastkd import nn, reference
from fastkd._gradient import release_memory
from fastkd._library import cpu_capability
from fastkd.clipped_divergence import clipped_divergence
from fastkd.kl_div import kl_div
from fastkd.softmax_divergence import softmax_divergence
from fastkd.teacher_store import TeacherStore
from fastkd.teacher_topk import TeacherTopK, teacher_topk
from fastkd.token_stats import TokenStats, token_stats
from fastkd.topk_divergence import topk_divergence

__version__ = "0.1.0"
__all__ = [
    "TeacherStore",
    "TeacherTopK",
    "TokenStats",
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
