"""One function for each published distillation method, built on the ops.

===================  ============================================================================
:func:`alm`          approximate likelihood matching of chunks of two tokenizers (2503.20083)
:func:`alm_latents`  hidden states at the ends of chunks (2503.20083)
:func:`uld`          sorted probabilities (2402.12030)
:func:`mined`        logits mapped by :func:`edit_distance_map` (2301.12726, 2401.10491)
:func:`dskd`         hidden states through the other model's head (2406.17328)
===================  ============================================================================

Each is a method's distillation term only. Add the cross-entropy on the text where it is needed.
"""

from fastkd.recipes.cross_tokenizer import alm, alm_latents, uld
from fastkd.recipes.dual_space import DskdSide, dskd
from fastkd.recipes.edit_distance import edit_distance_map
from fastkd.recipes.mapped_logits import mined

__all__ = ["DskdSide", "alm", "alm_latents", "dskd", "edit_distance_map", "mined", "uld"]
