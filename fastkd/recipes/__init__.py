"""One function for each published distillation method, built on the ops.

A function is named as its paper calls the method. Its arguments are the student's logits, the
teacher's, then what the rows are, then the paper's own numbers, whose defaults are the authors'.
Each is the method's distillation term unless its documentation says that it is the total: add the
cross-entropy on the text where it is needed. ``RECIPES`` is the table of all of them, as in
``docs/recipes.md``: number, arXiv, title, calls, evidence, how it was checked.

"""

from fastkd.recipes._table import RECIPES, Recipe, listing
from fastkd.recipes.attention import ernie_tiny, hybrid_distill, token_relations
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
from fastkd.recipes.lelp import lelp, lelp_subclasses
from fastkd.recipes.mapped_logits import mined
from fastkd.recipes.mutual_information import MiCritic, infonce, mi_alpha
from fastkd.recipes.on_policy import gkd
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
from fastkd.recipes.segmentation import cwd, lad_consistency, lad_label_map
from fastkd.recipes.token_graph import trg
from fastkd.recipes.transfer import distill_weighted, parc
from fastkd.recipes.vision import (
    class_balanced_weights,
    deit_lt,
    dist,
    fkd,
    meal_v2,
    meal_v2_discrimination,
)

__doc__ = f"{__doc__}{listing()}"

__all__ = [
    "RECIPES",
    "DskdSide",
    "MiCritic",
    "R2rFeatures",
    "Recipe",
    "StreamDitInputs",
    "alm",
    "alm_latents",
    "bucket_quantize",
    "class_balanced_weights",
    "cwd",
    "dear",
    "deit_lt",
    "dist",
    "distance_correlation",
    "distance_covariance",
    "distill_weighted",
    "diswot",
    "dm_codec",
    "dskd",
    "edit_distance_map",
    "ernie_tiny",
    "fair_latent",
    "feature_distance",
    "fkd",
    "fspad",
    "gkd",
    "had",
    "hybrid_distill",
    "ickd",
    "infonce",
    "lad_consistency",
    "lad_label_map",
    "lambda_rank",
    "lelp",
    "lelp_subclasses",
    "linear_cka",
    "list_net",
    "lm_spt",
    "meal_v2",
    "meal_v2_discrimination",
    "mi_alpha",
    "mined",
    "mmd",
    "parc",
    "quantized_distillation",
    "r2r",
    "r2r_features",
    "r2r_log_u",
    "rank_net",
    "rkd",
    "semantic_distillation",
    "semcot",
    "sid_generator",
    "sid_score",
    "sp",
    "stream_dit",
    "stream_dit_inputs",
    "token_relations",
    "trg",
    "uld",
]
