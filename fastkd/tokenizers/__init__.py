"""Distillation across tokenizers: token bytes, alignment, likelihoods of chunks and bytes."""

from fastkd.tokenizers._alignment import Alignment, align, align_batch
from fastkd.tokenizers._alm_collator import AlmCollator
from fastkd.tokenizers._alm_loss import alm_loss
from fastkd.tokenizers._byte_log_probs import byte_log_probs
from fastkd.tokenizers._byte_stream import ByteStream
from fastkd.tokenizers._byte_vocab import ByteVocab
from fastkd.tokenizers._cached_model import CachedModel
from fastkd.tokenizers._chunk_log_likelihood import ChunkLogLikelihood, chunk_log_likelihood

__all__ = [
    "Alignment",
    "AlmCollator",
    "ByteStream",
    "ByteVocab",
    "CachedModel",
    "ChunkLogLikelihood",
    "align",
    "align_batch",
    "alm_loss",
    "byte_log_probs",
    "chunk_log_likelihood",
]
