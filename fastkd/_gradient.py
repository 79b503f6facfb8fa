"""What every op's backward shares: gradients computed in the forward call, still to be scaled."""

import torch
from torch import Tensor

from fastkd import _library  # noqa: F401  (registers the ops)


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Gradient x factor (a scalar, or one a row), as a backward pass returns it.

    In place, since the gradient was computed for this; a copy where the graph lives on and may ask
    for it again. A factor of 1 costs nothing.
    """
    if torch.compiler.is_compiling():
        factor = factor.unsqueeze(-1) if factor.dim() else factor
        return (gradient * factor).to(gradient.dtype)
    if torch._C._autograd._get_current_graph_task_keep_graph():
        gradient = gradient.clone()
    torch.ops.fastkd._scale_rows_(gradient, factor)
    return gradient


@torch.library.register_fake("fastkd::_scale_rows_")
def _(gradient, factor):
    return None
