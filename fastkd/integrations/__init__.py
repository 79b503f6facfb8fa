"""Seams to trainers and servers. This package imports torch alone; a module its trainer, when used.

| module | for |
|---|---|
| `fastkd.integrations` | loops: `call_through`, `lm_head`, `labels_of`, `normalizer`, `KDOptions` |
| `.transformers` | Trainer: `DistillationMixin`, `DistillationTrainer` |
| `.trl` | GKDTrainer, GOLDTrainer, DistillationTrainer: the same functions, `enable` |
| `.vllm`, `.sglang` | `teacher_topk`: what a served teacher returns |
| `.verl` | `register`: a top-k divergence as a distillation loss |

For loops that call ``loss(student_logits, teacher_logits, labels)`` there is
:class:`fastkd.nn.KDLoss`.
"""

import importlib
from types import ModuleType

from fastkd.integrations._counts import normalizer
from fastkd.integrations._labels import labels_of
from fastkd.integrations._modules import LinearHead, call_through, lm_head
from fastkd.integrations._options import KDOptions

__all__ = ["KDOptions", "LinearHead", "call_through", "labels_of", "lm_head", "normalizer"]

_LAZY = ("sglang", "transformers", "trl", "verl", "vllm")


def __getattr__(name: str) -> ModuleType:
    """Import a trainer's or server's module at its first use: ``fastkd.integrations.trl``."""
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
