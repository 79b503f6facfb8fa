"""The arguments of raw ops, for tests that call them without their public functions."""

import sys
from typing import Any

import torch

from fastkd._ops.arguments import with_defaults


def loss_arguments(function: Any, *inputs: Any, gradients: int = 0, **options: Any) -> tuple:
    """Of `_name` and `name`: `_name_into` takes the gradient before them."""
    module = sys.modules[function.__module__]
    given = module.given(*inputs, with_defaults(function, options))
    arguments = module.OP.arguments
    return (*arguments.eager(arguments.pack(inputs[0], given)), gradients)


def check(name: str, arguments: tuple, *, into: torch.Tensor | None = None) -> None:
    """Opcheck of an op, and of its twin without an autograd formula."""
    ops = torch.ops.fastkd
    if hasattr(ops, name):
        torch.library.opcheck(getattr(ops, name).default, arguments)
    torch.library.opcheck(getattr(ops, f"_{name}").default, arguments)
    if into is not None:
        torch.library.opcheck(getattr(ops, f"_{name}_into").default, (into, *arguments))


def byte_arguments(scores: torch.Tensor, vocab: Any, prefix: Any, valid: Any) -> tuple:
    """Of `_byte_log_probs`, after the logits."""
    from fastkd.tokenizers._byte_log_probs import given

    return tuple(given(scores, vocab, {"prefix": prefix, "valid": valid}).values())[1:]
