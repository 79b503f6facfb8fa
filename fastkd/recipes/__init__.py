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
from fastkd.recipes.segmentation import cwd, lad_consistency, lad_label_map
from fastkd.recipes.token_graph import trg
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
    "Recipe",
    "alm",
    "alm_latents",
    "class_balanced_weights",
    "cwd",
    "deit_lt",
    "dist",
    "distance_correlation",
    "distance_covariance",
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
    "lelp",
    "lelp_subclasses",
    "linear_cka",
    "lm_spt",
    "meal_v2",
    "meal_v2_discrimination",
    "mi_alpha",
    "mined",
    "mmd",
    "rkd",
    "semantic_distillation",
    "semcot",
    "sp",
    "token_relations",
    "trg",
    "uld",
]
