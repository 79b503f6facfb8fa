"""fastkd: fused kernels for knowledge-distillation losses in PyTorch."""

from fastkd import _library, nn, recipes, reference
from fastkd._gradient import release_memory
from fastkd._library import cpu_capability
from fastkd.acm_gate import AcmRegularizers, acm_gate, acm_regularizers
from fastkd.acm_prefix_loss import acm_oracle, acm_prefix_loss
from fastkd.acmize import (
    AcmCall,
    acm_calls,
    acm_layers,
    acm_phase1_loss,
    acm_phase2_loss,
    acm_phase3_loss,
    acm_set_budget,
    acmize,
)
from fastkd.alignment import Alignment, align, align_batch
from fastkd.alm_loss import alm_loss
from fastkd.byte_log_probs import byte_log_probs
from fastkd.byte_stream import ByteStream
from fastkd.byte_vocab import ByteVocab
from fastkd.chunk_log_likelihood import ChunkLogLikelihood, chunk_log_likelihood
from fastkd.clipped_divergence import clipped_divergence
from fastkd.gated_routing import acm, acm_soft
from fastkd.kl_div import kl_div
from fastkd.softmax_divergence import softmax_divergence
from fastkd.teacher_store import TeacherStore
from fastkd.teacher_topk import TeacherTopK, teacher_topk
from fastkd.token_stats import TokenStats, token_stats
from fastkd.topk_divergence import topk_divergence

__version__ = _library.VERSION
__all__ = [
    "AcmCall",
    "AcmRegularizers",
    "Alignment",
    "ByteStream",
    "ByteVocab",
    "ChunkLogLikelihood",
    "TeacherStore",
    "TeacherTopK",
    "TokenStats",
    "acm",
    "acm_calls",
    "acm_gate",
    "acm_layers",
    "acm_oracle",
    "acm_phase1_loss",
    "acm_phase2_loss",
    "acm_phase3_loss",
    "acm_prefix_loss",
    "acm_regularizers",
    "acm_set_budget",
    "acm_soft",
    "acmize",
    "align",
    "align_batch",
    "alm_loss",
    "byte_log_probs",
    "chunk_log_likelihood",
    "clipped_divergence",
    "cpu_capability",
    "kl_div",
    "nn",
    "recipes",
    "reference",
    "release_memory",
    "softmax_divergence",
    "teacher_topk",
    "token_stats",
    "topk_divergence",
]
