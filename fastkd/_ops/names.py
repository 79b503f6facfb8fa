"""Names that options take, for type checkers; the library's own tables are compared with them.

:mod:`fastkd.typing` makes them public.
"""

from typing import Literal

#: Of :func:`fastkd.softmax_divergence`, in the order of csrc/math/divergence.h.
Divergence = Literal[
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_kl",
    "skew_reverse_kl",
    "tvd",
    "cross_entropy",
    "mixed_kl",
    "skew_reverse_kl_detached",
    "alpha_beta",
    "decoupled_kl",
]
#: Of :func:`fastkd.topk_divergence`.
TopKDivergence = Literal["forward_kl", "reverse_kl", "jsd", "cross_entropy"]
#: Of :func:`fastkd.alm_loss`.
AlmDivergence = Literal[
    "binary_ce",
    "reverse_binary_kl",
    "binary_kl_limit",
    "abs",
    "abs_exp",
    "renyi",
    "k2",
    "k3",
]
#: Of :func:`fastkd.topk_divergence`.
Tail = Literal["lump", "uniform", "renormalize", "drop"]
#: Of :func:`fastkd.clipped_divergence`.
ClippedTail = Literal["drop", "lump"]
#: Of :func:`fastkd.clipped_divergence`.
Renormalize = Literal["none", "teacher", "both"]
#: Of :func:`fastkd.softmax_divergence`.
TeacherMix = Literal["logits", "probs", "contrast", "share"]
#: Of all losses.
Reduction = Literal["none", "mean", "sum", "batchmean", "elementmean"]
#: Of the recipes over texts.
TextReduction = Literal["none", "mean", "sum", "batchmean", "elementmean", "sequence_mean"]
#: How a :class:`fastkd.TeacherStore` holds log-probabilities.
StoredLogProbs = Literal["8bit", "float16"]

#: By op and field, as the library lists its own.
NAMES = {
    "softmax_divergence.divergence": Divergence,
    "softmax_divergence.teacher_mix": TeacherMix,
    "softmax_divergence.reduction": Reduction,
    "topk_divergence.divergence": TopKDivergence,
    "topk_divergence.tail": Tail,
    "topk_divergence.reduction": Reduction,
    "clipped_divergence.renormalize": Renormalize,
    "clipped_divergence.tail": ClippedTail,
    "clipped_divergence.reduction": Reduction,
    "cross_entropy.reduction": Reduction,
}
