"""Modules of gated routing: learners with their gate, and the modules that they can replace."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastkd._ops.arguments import to_flag
from fastkd._ops.checks import check_positive
from fastkd.acm._arguments import check_count, check_integer
from fastkd.acm._gate import gate
from fastkd.acm._hard import hard, soft
from fastkd.acm._products import ACTIVATIONS

#: Names of the projections into and out of the hidden layer, in modules that are MLPs.
_MLP_NAMES = (
    ("gate_proj", "down_proj"),
    ("fc1", "fc2"),
    ("fc_in", "fc_out"),
    ("c_fc", "c_proj"),
    ("lin1", "lin2"),
    ("wi", "wo"),
    ("wi_0", "wo"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("w1", "w2"),
)


def projection_sizes(module: Any) -> tuple[int, int] | None:
    """Inputs and outputs of an ``nn.Linear`` or of a Conv1D of transformers, else None."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.size(0), weight.size(1)
    return None


class SplitMLP(nn.Sequential):
    """A module with a projection `dense` and an activation at its end, then a second projection."""


def mlp_sizes(module: nn.Module) -> tuple[int, int, int] | None:
    """Inputs, hidden units and outputs of a module that is an MLP by its submodules, else None.

    An MLP is a Sequential that begins with a projection and ends with another one (and dropout),
    with no parameters between them; or a module with two projections named as one of the pairs in
    _MLP_NAMES, and no other parameters except projections parallel to the first one.
    """
    if isinstance(module, SplitMLP):
        return _chained(module[0].dense, module[1])
    if next(module.parameters(recurse=False), None) is not None:
        return None
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    sizes = [projection_sizes(child) for child in children]
    if len(sizes) < 2 or not all(sizes):
        return None
    if isinstance(module, nn.Sequential):
        if len(children) > 2 or len(module) < 3 or module[0] is not children[0]:
            return None
        behind = list(module)[list(module).index(children[1]) + 1 :]
        if not all(isinstance(child, (nn.Dropout, nn.Identity)) for child in behind):
            return None
        return _chained(*children)
    pairs = [[getattr(module, name, None) for name in names] for names in _MLP_NAMES]
    ends = next((pair for pair in pairs if all(projection_sizes(end) for end in pair)), None)
    found = None if ends is None else _chained(*ends)
    if ends is None or found is None:
        return None
    beside = [size for child, size in zip(children, sizes, strict=True) if child is not ends[1]]
    return found if all(size == found[:2] for size in beside) else None


def _chained(first: Any, last: Any) -> tuple[int, int, int] | None:
    """Sizes of two projections if the second takes the outputs of the first, else None."""
    inner, outer = projection_sizes(first), projection_sizes(last)
    if inner is None or outer is None or inner[1] != outer[0]:
        return None
    return *inner, outer[1]


def _one_hot(choices: Tensor, learners: int, dtype: torch.dtype) -> Tensor:
    """As F.one_hot, which reads values and has no rule under vmap."""
    steps = torch.arange(learners + 1, device=choices.device)
    return (choices.unsqueeze(-1) == steps).to(dtype)


class ACMGate(nn.Module):
    """Choose how many of N learners each row runs.

    Training samples one-hot gates with the gradient of the Gumbel-softmax
    (:func:`fastkd.acm.gate`). Evaluation chooses the k with the largest ``logits - price * k``.
    ``price`` is a buffer, which is saved with the weights, and 0 until
    :func:`fastkd.acm.set_budget` sets it.

    Args:
        in_features: D.
        num_learners: N.
        depth: number of linear layers, with GELU between them. (The released code has no
            activation between them.)
        hidden: units between the layers.
        min_choice: the least number of learners.
        temperature: of :func:`fastkd.acm.gate`.
        device: of the parameters.
        dtype: of the parameters.

    >>> import torch, fastkd
    >>> gate = fastkd.nn.ACMGate(8, num_learners=4, min_choice=1)
    >>> gates = gate(torch.randn(2, 5, 8))
    >>> gates.shape, gates.sum().item(), gates[..., 0].any().item()
    (torch.Size([2, 5, 5]), 10.0, False)
    >>> gate.choices(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        in_features: int,
        num_learners: int,
        *,
        depth: int = 1,
        hidden: int = 16,
        min_choice: int = 0,
        temperature: float = 0.8,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features = check_count("ACMGate", "in_features", in_features)
        num_learners = check_count("ACMGate", "num_learners", num_learners)
        depth = check_count("ACMGate", "depth", depth)
        hidden = check_count("ACMGate", "hidden", hidden)
        check_positive("ACMGate", "temperature", temperature)
        min_choice = check_integer("ACMGate", "min_choice", min_choice)
        if not 0 <= min_choice <= num_learners:
            raise ValueError(
                f"ACMGate: min_choice must lie in [0, N = {num_learners}], got {min_choice}"
            )
        self.num_learners, self.min_choice = num_learners, min_choice
        self.temperature = temperature
        sizes = [in_features, *[hidden] * (depth - 1), num_learners + 1]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.GELU()] if layers else []
            layers.append(nn.Linear(inputs, outputs, device=device, dtype=dtype))
        self.layers = nn.Sequential(*layers)
        self.price: Tensor
        self.register_buffer("price", torch.zeros((), device=device, dtype=torch.float32))

    def logits(self, x: Tensor) -> Tensor:
        """``[..., N + 1]``, before prices; those of choices below ``min_choice`` are not used."""
        return self.layers(x)

    def choices(self, x: Tensor) -> Tensor:
        """int64 ``[...]``, the choices in evaluation; every learner where a logit is NaN."""
        logits = self.logits(x)[..., self.min_choice :].float()
        steps = torch.arange(logits.size(-1), device=logits.device)
        best = (logits - self.price.float() * steps).argmax(-1) + self.min_choice
        return torch.where(logits.isnan().any(-1), self.num_learners, best)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One-hot ``[..., N + 1]``: sampled in training, of :meth:`choices` in evaluation."""
        if self.training:
            return gate(
                self.logits(x),
                temperature=self.temperature,
                min_choice=self.min_choice,
                generator=generator,
            )
        return _one_hot(self.choices(x), self.num_learners, x.dtype)

    def extra_repr(self) -> str:
        """The options that the layers do not show."""
        return f"min_choice={self.min_choice}, temperature={self.temperature}"


class ACM(nn.Module):
    """N learners and a gate that chooses how many of them each row runs.

    Training runs :func:`fastkd.acm.soft` with the gate's one-hot gates, so that the gate gets a
    gradient from the task's loss. Evaluation runs :func:`fastkd.acm.hard` with the gate's choices,
    and only the learners chosen. Under autocast the operands are cast first, as for Linear.

    Args:
        in_features: D.
        out_features: D_out; None: D.
        num_learners: N.
        width: b, hidden units of a learner.
        activation: as for :func:`fastkd.acm.hard`.
        bias: whether there is an output bias ``[D_out]``; the paper has none.
        gate: whether there is a gate (:attr:`gate` is None otherwise, and every learner runs), or
            a module to use as gate: an :class:`ACMGate` or a module with its methods.
        min_choice: of the gate that is created.
        gate_depth: of the gate that is created.
        gate_hidden: of the gate that is created.
        device: of the parameters.
        dtype: of the parameters.

    >>> import torch, fastkd
    >>> module = fastkd.nn.ACM(8, num_learners=2, width=4).eval()
    >>> x = torch.randn(3, 8)
    >>> module(x).shape, module(x, torch.tensor([0, 1, 2]))[0].any().item()
    (torch.Size([3, 8]), False)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        num_learners: int = 4,
        width: int,
        activation: str = "gelu",
        bias: bool = False,
        gate: bool | nn.Module = True,
        min_choice: int = 0,
        gate_depth: int = 1,
        gate_hidden: int = 16,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        in_features = check_count("ACM", "in_features", in_features)
        out_features = check_count("ACM", "out_features", out_features)
        num_learners = check_count("ACM", "num_learners", num_learners)
        width = check_count("ACM", "width", width)
        gate_depth = check_count("ACM", "gate_depth", gate_depth)
        gate_hidden = check_count("ACM", "gate_hidden", gate_hidden)
        bias = to_flag("ACM", "bias", bias)
        if not isinstance(gate, nn.Module):
            gate = to_flag("ACM", "gate", gate)
        if not isinstance(activation, str):
            raise TypeError(f"ACM: activation must be a string, got {type(activation).__name__}")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"ACM: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}"
            )
        self.activation = activation
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.w1 = nn.Parameter(torch.empty(num_learners, in_features, width, **place))
        self.b1 = nn.Parameter(torch.empty(num_learners, width, **place))
        self.w2 = nn.Parameter(torch.empty(num_learners, width, out_features, **place))
        self.bias = nn.Parameter(torch.empty(out_features, **place)) if bias else None
        self.gate: Any = None
        if isinstance(gate, nn.Module):
            self.gate = gate
        elif gate:
            self.gate = ACMGate(
                *(in_features, num_learners),
                depth=gate_depth,
                hidden=gate_hidden,
                min_choice=min_choice,
                **place,
            )
        #: The module that this replaces, if it is kept: see :func:`fastkd.acm.convert`.
        self.original: nn.Module | None = None
        self._watch: Callable[[ACM, Tensor, Tensor | None], Tensor] | None = None
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Module, num_learners: int = 4, **options: Any) -> "ACM":
        r"""An ACM with as many parameters as a Linear: the paper's size for attention projections.

        :math:`b = \mathrm{round}((D + 1) D_\text{out} / (N (D + D_\text{out} + 1)))`. Defaults:
        activation ``"identity"`` and ``min_choice`` 1. The weights are new, not the Linear's.

        >>> import torch, fastkd
        >>> fastkd.nn.ACM.from_linear(torch.nn.Linear(768, 768)).w1.shape
        torch.Size([4, 768, 96])
        """
        sizes = projection_sizes(linear)
        if sizes is None:
            raise TypeError(
                f"ACM.from_linear: linear must be an nn.Linear, got {type(linear).__name__}"
            )
        num_learners = check_count("ACM.from_linear", "num_learners", num_learners)
        inputs, outputs = sizes
        width = round((inputs + 1) * outputs / (num_learners * (inputs + outputs + 1)))
        defaults = {"activation": "identity", "min_choice": 1, "width": max(width, 1)}
        return cls._like(linear, inputs, outputs, num_learners, defaults | options)

    @classmethod
    def from_mlp(cls, mlp: nn.Module, num_learners: int = 4, **options: Any) -> "ACM":
        r"""An ACM with an MLP's hidden units: :math:`b = \mathrm{round}(\text{hidden} / N)`.

        An MLP is a ``Sequential(Linear, activation, Linear)``, dropout allowed, or a module with
        projections named as in transformers (``gate_proj``, ``up_proj`` and ``down_proj``, ``fc1``
        and ``fc2``, ``c_fc`` and ``c_proj``, ...). The weights are new, not the MLP's.

        >>> import torch, fastkd
        >>> nn = torch.nn
        >>> mlp = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))
        >>> fastkd.nn.ACM.from_mlp(mlp).w1.shape
        torch.Size([4, 768, 768])
        """
        sizes = mlp_sizes(mlp) if isinstance(mlp, nn.Module) else None
        if sizes is None:
            raise TypeError(
                "ACM.from_mlp: mlp must be a Sequential(Linear, activation, Linear) or hold two "
                f"projections under known names, got {type(mlp).__name__}"
            )
        num_learners = check_count("ACM.from_mlp", "num_learners", num_learners)
        inputs, hidden, outputs = sizes
        width = max(round(hidden / num_learners), 1)
        return cls._like(mlp, inputs, outputs, num_learners, {"width": width} | options)

    @classmethod
    def _like(
        cls, module: nn.Module, inputs: int, outputs: int, learners: int, options: dict[str, Any]
    ) -> "ACM":
        """An ACM on the device of the module's parameters, and in their dtype."""
        weight = next(module.parameters())
        place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        return cls(inputs, outputs, num_learners=learners, **place | options)

    def reset_parameters(self) -> None:
        """Initialise each learner like two Linears: uniform up to 1 over the root of the inputs."""
        _, inputs, width = self.w1.shape
        for weight, fan_in in (
            *((self.w1, inputs), (self.b1, inputs)),
            *((self.w2, width), (self.bias, width)),
        ):
            if weight is not None:
                nn.init.uniform_(weight, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    @property
    def num_learners(self) -> int:
        """N."""
        return self.w1.size(0)

    @property
    def cost(self) -> int:
        """Multiply-adds of one learner for one row."""
        return self.w1.size(2) * (self.w1.size(1) + self.w2.size(2))

    def forward(self, x: Tensor, choices: Tensor | None = None) -> Tensor:
        """``[..., D]`` to ``[..., D_out]``.

        ``choices`` (integers ``[...]`` in 0..N) replace those of the gate.
        """
        if self._watch is not None:
            return self._watch(self, x, choices)
        return self.route(x, choices)[0]

    def route(self, x: Tensor, choices: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Output, and the gates ``[..., N + 1]``, None where the gate did not run."""
        operands, bias = self.operands(x)
        gates = None
        if choices is None and self.gate is not None and self.training:
            gates = self.gate(x)
            out = soft(*operands, gates, activation=self.activation)
            return out if bias is None else out + bias, gates
        if choices is None and self.gate is not None:
            choices = self.gate.choices(x)
            gates = _one_hot(choices, self.num_learners, x.dtype)
        elif choices is None:
            choices = torch.full(x.shape[:-1], self.num_learners, device=x.device)
        return hard(*operands, choices, activation=self.activation, bias=bias), gates

    def operands(self, x: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor | None]:
        """x, w1, b1, w2, and the bias, in autocast's dtype if it is enabled."""
        values = [x, self.w1, self.b1, self.w2, self.bias]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            values = [v if v is None or v.dtype == torch.float64 else v.to(dtype) for v in values]
        return tuple(values[:4]), values[4]  # type: ignore[return-value]

    def extra_repr(self) -> str:
        """Sizes."""
        learners, inputs, width = self.w1.shape
        return (
            f"{inputs}, {self.w2.size(2)}, num_learners={learners}, width={width}, "
            f"activation={self.activation!r}, bias={self.bias is not None}"
        )
