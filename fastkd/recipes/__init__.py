"""One function for each published distillation method, built on the ops.

A function is named as its paper calls the method. Its arguments are the student's logits, the
teacher's, then what the rows are, then the paper's own numbers, whose defaults are the authors'.
Each is the method's distillation term unless its documentation says that it is the total: add the
cross-entropy on the text where it is needed. ``RECIPES`` is the table of all of them, as in
``docs/recipes.md``: number, arXiv, title, calls, evidence, how it was checked.

"""

from fastkd.acm import phase1_loss as acm_phase1_loss
from fastkd.acm import phase2_loss as acm_phase2_loss
from fastkd.acm import phase3_loss as acm_phase3_loss
from fastkd.recipes._table import RECIPES, Recipe, listing
from fastkd.recipes.adaptive_mixture import align_distil
from fastkd.recipes.byte_level import bpm, byte_kd, prefix_map
from fastkd.recipes.conditioned import mend, swing
from fastkd.recipes.cross_tokenizer import alm, alm_latents, uld
from fastkd.recipes.dual_space import DskdSide, dskd
from fastkd.recipes.edit_distance import edit_distance_map
from fastkd.recipes.granularity import mgsr, mgsr_position, mgsr_span
from fastkd.recipes.language import (
    acceptance,
    ddk,
    ddk_factors,
    distilbert,
    distillspec,
    kd,
    llava_mod,
    sequence_kd,
)
from fastkd.recipes.mapped_logits import mined
from fastkd.recipes.masked_diffusion import dparallel
from fastkd.recipes.on_policy import gkd, minitron, opd_topk
from fastkd.recipes.preferences import preference
from fastkd.recipes.sampled_token import minillm, opd
from fastkd.recipes.selective import adaspec, eopd, select_tkd, tip, token_budget
from fastkd.recipes.shared_vocabulary import gold, shared_tokens, strict_topk
from fastkd.recipes.skewed import (
    Pair,
    TaidSchedule,
    akl,
    bild,
    distillm,
    distillm2,
    distillm2_alphas,
    taid,
)

__doc__ = f"{__doc__}{listing()}"

__all__ = [
    "RECIPES",
    "DskdSide",
    "Pair",
    "Recipe",
    "TaidSchedule",
    "acceptance",
    "acm_phase1_loss",
    "acm_phase2_loss",
    "acm_phase3_loss",
    "adaspec",
    "akl",
    "align_distil",
    "alm",
    "alm_latents",
    "bild",
    "bpm",
    "byte_kd",
    "ddk",
    "ddk_factors",
    "distilbert",
    "distillm",
    "distillm2",
    "distillm2_alphas",
    "distillspec",
    "dparallel",
    "dskd",
    "edit_distance_map",
    "eopd",
    "gkd",
    "gold",
    "kd",
    "llava_mod",
    "mend",
    "mgsr",
    "mgsr_position",
    "mgsr_span",
    "mined",
    "minillm",
    "minitron",
    "opd",
    "opd_topk",
    "preference",
    "prefix_map",
    "select_tkd",
    "sequence_kd",
    "shared_tokens",
    "strict_topk",
    "swing",
    "taid",
    "tip",
    "token_budget",
    "uld",
]
