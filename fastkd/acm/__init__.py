"""Adaptive computation modules: each token runs as many learners as its gate chooses.

The ops are :func:`hard`, :func:`soft`, :func:`prefix_loss`, :func:`gate`, :func:`oracle` and
:func:`regularizers`. :func:`convert` and the functions after it replace layers of an existing model
and train the new ones in three phases. The modules are :class:`fastkd.nn.ACM` and
:class:`fastkd.nn.ACMGate`.
"""

from fastkd.acm._convert import (
    Call,
    calls,
    convert,
    layers,
    set_budget,
    settings,
)
from fastkd.acm._gate import Regularizers, gate, regularizers
from fastkd.acm._hard import hard, soft
from fastkd.acm._phases import phase1_loss, phase2_loss, phase3_loss
from fastkd.acm._prefix_loss import oracle, prefix_loss
from fastkd.acm._pretrained import from_pretrained

__all__ = [
    "Call",
    "Regularizers",
    "calls",
    "convert",
    "from_pretrained",
    "gate",
    "hard",
    "layers",
    "oracle",
    "phase1_loss",
    "phase2_loss",
    "phase3_loss",
    "prefix_loss",
    "regularizers",
    "set_budget",
    "settings",
    "soft",
]
