"""Names that options take, as types: annotate your own functions with them.

>>> import torch, fastkd
>>> from fastkd.typing import Divergence
>>> def loss(student: torch.Tensor, teacher: torch.Tensor, divergence: Divergence = "jsd"):
...     return fastkd.softmax_divergence(student, teacher, divergence=divergence)

A type checker then refuses ``loss(x, y, "jds")``, and so it does in fastkd's own functions. A name
that is text from a configuration file is ``str``: narrow it, or ``typing.cast(Divergence, name)``;
the call itself checks it too.
"""

from fastkd._ops.names import (
    AlmDivergence,
    ClippedTail,
    Divergence,
    Reduction,
    Renormalize,
    StoredLogProbs,
    Tail,
    TeacherMix,
    TextReduction,
    TopKDivergence,
)

__all__ = [
    "AlmDivergence",
    "ClippedTail",
    "Divergence",
    "Reduction",
    "Renormalize",
    "StoredLogProbs",
    "Tail",
    "TeacherMix",
    "TextReduction",
    "TopKDivergence",
]
