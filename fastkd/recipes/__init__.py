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
from fastkd.recipes.attention import ernie_tiny, hybrid_distill, token_relations
from fastkd.recipes.byte_level import bpm, byte_kd, prefix_map
from fastkd.recipes.conditioned import mend, mft, swing
from fastkd.recipes.cross_tokenizer import alm, alm_latents, uld
from fastkd.recipes.diffusion import (
    StreamDitInputs,
    sid_generator,
    sid_score,
    stream_dit,
    stream_dit_inputs,
)
from fastkd.recipes.dual_space import DskdSide, dskd
from fastkd.recipes.edit_distance import edit_distance_map
from fastkd.recipes.features import (
    dm_codec,
    fair_latent,
    feature_distance,
    fspad,
    had,
    lm_spt,
    semantic_distillation,
    semcot,
)
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
from fastkd.recipes.mutual_information import MiCritic, infonce, mi_alpha
from fastkd.recipes.on_policy import balanced, gkd, minitron, opd_topk
from fastkd.recipes.preferences import preference
from fastkd.recipes.projected_vocabulary import token_projection, x_token
from fastkd.recipes.quantization import bucket_quantize, quantized_distillation
from fastkd.recipes.ranking import dear, lambda_rank, list_net, rank_net
from fastkd.recipes.relations import (
    distance_correlation,
    distance_covariance,
    diswot,
    ickd,
    linear_cka,
    mmd,
    rkd,
    sp,
)
from fastkd.recipes.routing import R2rFeatures, r2r, r2r_features, r2r_log_u
from fastkd.recipes.sampled_token import minillm, opd
from fastkd.recipes.segmentation import cwd, lad_consistency, lad_label_map
from fastkd.recipes.selective import adaspec, eopd, select_tkd, tip, token_budget
from fastkd.recipes.shared_vocabulary import gold, shared_tokens, strict_topk
from fastkd.recipes.skewed import (
    Pair,
    TaidSchedule,
    abkd,
    akl,
    bild,
    distillm,
    distillm2,
    distillm2_alphas,
    taid,
)
from fastkd.recipes.subclasses import lelp, lelp_subclasses
from fastkd.recipes.token_graph import trg
from fastkd.recipes.transfer import distill_weighted, parc
from fastkd.recipes.vision import (
    class_balanced_weights,
    deit_lt,
    dist,
    dkd,
    fkd,
    meal_v2,
    meal_v2_discrimination,
)

__doc__ = f"{__doc__}{listing()}"

__all__ = [
    "RECIPES",
    "DskdSide",
    "MiCritic",
    "Pair",
    "R2rFeatures",
    "Recipe",
    "StreamDitInputs",
    "TaidSchedule",
    "abkd",
    "acceptance",
    "acm_phase1_loss",
    "acm_phase2_loss",
    "acm_phase3_loss",
    "adaspec",
    "akl",
    "align_distil",
    "alm",
    "alm_latents",
    "balanced",
    "bild",
    "bpm",
    "bucket_quantize",
    "byte_kd",
    "class_balanced_weights",
    "cwd",
    "ddk",
    "ddk_factors",
    "dear",
    "deit_lt",
    "dist",
    "distance_correlation",
    "distance_covariance",
    "distilbert",
    "distill_weighted",
    "distillm",
    "distillm2",
    "distillm2_alphas",
    "distillspec",
    "diswot",
    "dkd",
    "dm_codec",
    "dparallel",
    "dskd",
    "edit_distance_map",
    "eopd",
    "ernie_tiny",
    "fair_latent",
    "feature_distance",
    "fkd",
    "fspad",
    "gkd",
    "gold",
    "had",
    "hybrid_distill",
    "ickd",
    "infonce",
    "kd",
    "lad_consistency",
    "lad_label_map",
    "lambda_rank",
    "lelp",
    "lelp_subclasses",
    "linear_cka",
    "list_net",
    "llava_mod",
    "lm_spt",
    "meal_v2",
    "meal_v2_discrimination",
    "mend",
    "mft",
    "mgsr",
    "mgsr_position",
    "mgsr_span",
    "mi_alpha",
    "mined",
    "minillm",
    "minitron",
    "mmd",
    "opd",
    "opd_topk",
    "parc",
    "preference",
    "prefix_map",
    "quantized_distillation",
    "r2r",
    "r2r_features",
    "r2r_log_u",
    "rank_net",
    "rkd",
    "select_tkd",
    "semantic_distillation",
    "semcot",
    "sequence_kd",
    "shared_tokens",
    "sid_generator",
    "sid_score",
    "sp",
    "stream_dit",
    "stream_dit_inputs",
    "strict_topk",
    "swing",
    "taid",
    "tip",
    "token_budget",
    "token_projection",
    "token_relations",
    "trg",
    "uld",
    "x_token",
]
