"""The gate of adaptive computation modules: a differentiable choice, and its regularizers."""

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._ops.arguments import check_dense, to_flag
from fastkd._ops.checks import check_finite, check_positive
from fastkd.acm._arguments import check_integer
from fastkd.acm._kernels import traced


class Regularizers(NamedTuple):
    """Terms of phase III's loss, each a scalar, float32 (float64 if a gate is)."""

    #: Distance of the share of the whole computation from the target.
    budget: Tensor
    #: -1 where a sequence uses all choices of a layer equally, 0 where it uses only one.
    entropy: Tensor
    #: Smaller the more the sequences differ in the number of learners they use.
    diversity: Tensor


def gate(
    logits: Tensor,
    *,
    temperature: float = 0.8,
    hard: bool = True,
    min_choice: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Sample a choice from logits with a gradient for them (Gumbel-softmax).

    .. math:: \text{soft} = \mathrm{softmax}((z + g) / \tau), \qquad g_k = -\log E_k,
              \quad E_k \sim \mathrm{Exp}(1)

    ``hard``: exactly one-hot at the largest :math:`z + g`, which is a sample from softmax(z) at any
    temperature, with the gradient of the soft gate. The noise is drawn in the order of the
    logits' elements, whatever their strides, so that a seed gives the same gates again.

    Args:
        logits: ``[..., N + 1]`` float32, bfloat16, float16 or float64. ``-inf`` is never chosen. A
            row with a NaN or ``+inf``, or without a finite logit among the choices allowed, is NaN.
        temperature: :math:`\tau`, positive.
        hard: see above.
        min_choice: choices below it have probability 0 and a zero gradient; their logits are
            ignored.
        generator: of the logits' device; None: the default one, which torch.compile needs.

    Returns:
        ``[..., N + 1]`` in the dtype of the logits, computed in float32 or better.

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Sources: Jang et al. 2017 (arXiv 1611.01144); Wójcik et al. 2023 (arXiv 2312.10193).

    >>> import torch, fastkd
    >>> logits = torch.tensor([[0.0, 9.0, 0.0]], requires_grad=True)
    >>> gates = fastkd.acm.gate(logits, generator=torch.Generator().manual_seed(0))
    >>> gates.tolist()
    [[0.0, 1.0, 0.0]]
    """
    _check_gate("acm.gate", "logits", logits)
    if isinstance(temperature, Tensor) and temperature.device.type not in (
        "cpu",
        logits.device.type,
    ):
        raise ValueError(
            f"acm.gate: temperature must be on {logits.device} as logits is, or on the CPU, got "
            f"{temperature.device}"
        )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"acm.gate: generator must be a torch.Generator, got {type(generator).__name__}"
        )
    if generator is not None and generator.device.type != logits.device.type:
        raise ValueError(
            f"acm.gate: generator must be of {logits.device} as logits is, got {generator.device}"
        )
    check_positive("acm.gate", "temperature", temperature)
    hard = to_flag("acm.gate", "hard", hard)
    choices = logits.size(-1)
    min_choice = check_integer("acm.gate", "min_choice", min_choice)
    if not 0 <= min_choice < choices:
        raise ValueError(
            f"acm.gate: min_choice must lie in [0, {choices}), the choices of logits with shape "
            f"{list(logits.shape)}, got {min_choice}"
        )
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    allowed = logits[..., min_choice:].to(wide)
    noise = torch.empty_like(
        allowed, requires_grad=False, memory_format=torch.contiguous_format
    ).exponential_(generator=generator)
    scores = allowed - noise.clamp_min(torch.finfo(wide).tiny).log()
    # Less the largest: the scores themselves may overflow when divided by a small temperature.
    gates = ((scores - scores.detach().amax(-1, keepdim=True)) / temperature).softmax(-1)
    if hard:
        chosen = scores.detach().argmax(-1, keepdim=True)
        one_hot = torch.zeros_like(gates).scatter(-1, chosen, 1.0)
        # The difference is exactly 0, or NaN where the row is.
        gates = one_hot + (gates - gates.detach())
    return F.pad(gates, (min_choice, 0)).to(logits.dtype)


def regularizers(
    gates: Sequence[Tensor] | Tensor,
    costs: Sequence[float] | Tensor,
    target: float,
    *,
    mask: Tensor | None = None,
) -> Regularizers:
    r"""Terms that hold gates to a budget and make their choices vary.

    With gates :math:`g^l` of layer l, :math:`N_l` its learners and :math:`c_l` the cost of one:

    .. math:: L_b &= \Bigl| \frac{\sum_l c_l\, \mathrm{mean}_{i,t} \sum_k k\, g^l_{itk}}
              {\sum_l c_l N_l} - \text{target} \Bigr| \\
              L_e &= -\mathrm{mean}_{i,l}\, H(a^l_i) / \log(N_l + 1), \qquad
              a^l_{ik} = \frac{\sum_t g^l_{itk}}{\sum_{t,k'} g^l_{itk'}} \\
              L_d &= -2\, \mathrm{mean}_{i,j} |b_i - b_j|, \qquad
              b_i = \mathrm{mean}_{l,t}\, \frac{1}{N_l + 1} \sum_k k\, g^l_{itk}

    i and j are sequences of the batch (pairs of one with itself count), t tokens. :math:`L_d` has
    the sign of the released code, so that it falls as sequences differ; the paper prints the other
    sign. :math:`0 \log 0 = 0`, and a choice that a sequence never uses gets no gradient from the
    entropy. Phase III adds 0.1, 0.05 and 0.05 times these to the task's loss.

    Args:
        gates: one tensor a layer, ``[B, ..., N_l + 1]``: B sequences (the same in all layers), then
            tokens in any number of dimensions (none: one token a sequence). Or one tensor
            ``[layers, B, T, ..., N + 1]``.
        costs: one number a layer, :math:`c_l`: multiply-adds of a learner for one token. The values
            of a tensor on a GPU are not checked, which would synchronise.
        target: share of the cost of all learners, 0.25 to 0.75 in the paper.
        mask: bool or integers, one a token (``[B, ...]``, the same number of them in all layers):
            tokens with False or 0, such as padding, are in no mean and are not read. Nor is a
            sequence without any other.

    Returns:
        :class:`acm.Regularizers`. Without sequences or tokens, means are 0.

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: Wójcik et al. 2023 (arXiv 2312.10193).

    >>> import torch, fastkd
    >>> gates = torch.eye(3)[torch.tensor([[0, 1], [2, 2]])]  # 2 sequences, 2 tokens, N = 2
    >>> found = fastkd.acm.regularizers([gates], [1.0], target=0.5)
    >>> [round(x.item(), 4) for x in found]  # 5 of 8 learners ran
    [0.125, -0.3155, -0.5]
    """
    return regularized("acm.regularizers", gates, costs, target, mask)


def regularized(
    function: str, gates: Any, costs: Any, target: Any, mask: Tensor | None
) -> Regularizers:
    """:func:`regularizers`, in whose errors the function has this name."""
    if isinstance(gates, Tensor) and gates.dim() > 3:
        check_dense(function, "gates", gates)
        gates = gates.unbind()
    if not isinstance(gates, Sequence) or not gates:
        raise TypeError(
            f"{function}: gates must be a sequence of tensors, one a layer, got "
            f"{'none' if isinstance(gates, Sequence) else type(gates).__name__}"
        )
    for layer, gate in enumerate(gates):
        name = f"gates[{layer}]"
        _check_gate(function, name, gate)
        if gate.dim() < 2 or gate.size(-1) < 2 or gate.size(0) != gates[0].size(0):
            raise ValueError(
                f"{function}: {name} must have shape [{gates[0].size(0)}, ..., N + 1] with "
                f"N at least 1, got {list(gate.shape)}"
            )
        if gate.device != gates[0].device:
            raise ValueError(
                f"{function}: {name} must be on {gates[0].device} as gates[0] is, got {gate.device}"
            )
    costs = _costs(function, costs, gates)
    if isinstance(target, Tensor):
        check_dense(function, "target", target)
        if target.device.type not in ("cpu", gates[0].device.type):
            raise ValueError(
                f"{function}: target must be on {gates[0].device} as gates[0] is, or on the CPU, "
                f"got {target.device}"
            )
        if target.numel() != 1:
            shape = list(target.shape)
            raise ValueError(f"{function}: target must be a number, got shape {shape}")
    else:
        check_finite(function, "target", target)
    double = any(gate.dtype == torch.float64 for gate in gates)
    used, shares, entropies, counted = [], [], [], None
    for layer, gate in enumerate(gates):
        tokens = gate.to(torch.float64 if double else torch.float32)
        tokens = tokens.flatten(1, -2) if gate.dim() > 2 else tokens.unsqueeze(1)
        choices = tokens.size(-1)
        if mask is None:
            histogram = tokens.sum(1) / max(tokens.size(1), 1)
        else:
            kept = rows_mask(function, f"gates[{layer}]", mask, gate.shape[:-1], gate.device)
            kept = kept.view(tokens.shape[:2])
            count = kept.sum(1, keepdim=True)
            tokens = torch.where(kept.unsqueeze(-1), tokens, 0)
            histogram = tokens.sum(1) / count.clamp(min=1)
            counted = (count.squeeze(1) > 0).to(tokens.dtype)
        steps = torch.arange(choices, device=gate.device, dtype=tokens.dtype)
        learners = (histogram * steps).sum(-1)
        used.append(_mean(learners, counted))
        shares.append(learners / choices)
        total = histogram.sum(-1, keepdim=True)
        histogram = histogram / torch.where(total == 0, 1, total)
        log = torch.where(histogram == 0, 1, histogram).log()
        entropies.append(_mean(-(histogram * log).sum(-1), counted) / math.log(choices))
    whole: Any = sum(cost * (gate.size(-1) - 1) for cost, gate in zip(costs, gates, strict=True))
    spent = torch.stack([cost * mean for cost, mean in zip(costs, used, strict=True)]).sum() / whole
    share = torch.stack(shares).mean(0)
    differences = (share.unsqueeze(0) - share.unsqueeze(1)).abs()
    pairs = None if counted is None else counted.unsqueeze(0) * counted.unsqueeze(1)
    return Regularizers(
        (spent - target).abs(), -torch.stack(entropies).mean(), -2 * _mean(differences, pairs)
    )


def rows_mask(
    function: str, name: str, mask: Any, rows: torch.Size, device: torch.device
) -> Tensor:
    """A mask of rows as bool ``rows``, on a device.

    It may be flat where the rows are not, and the reverse: as a whole, or within each text.
    """
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{function}: mask must be a tensor of bool or integers, got {found}")
    check_dense(function, "mask", mask)
    if mask.is_meta and device.type != "meta":
        raise ValueError(f"{function}: mask must be on a device that holds values, got meta")
    in_order = mask.shape == rows or any(
        flat in (mask.dim(), len(rows)) and mask.shape[: flat - 1] == rows[: flat - 1]
        for flat in (1, 2)
    )
    if mask.numel() != rows.numel() or not in_order:
        raise ValueError(
            f"{function}: mask must have one entry a row of {name}, {list(rows)}, in their order, "
            f"got shape {list(mask.shape)}"
        )
    return (mask != 0).reshape(rows).to(device)


def _costs(function: str, costs: Any, gates: Sequence[Tensor]) -> list[Any]:
    """The costs of the layers, as numbers where they can be read without a synchronisation."""
    if isinstance(costs, Tensor):
        check_dense(function, "costs", costs)
        if costs.is_meta and not gates[0].is_meta:
            raise ValueError(
                f"{function}: costs must be on {gates[0].device} as gates[0] is, or on the "
                "CPU, got meta"
            )
        if costs.shape == (len(gates),) and (traced(costs) or costs.device.type != "cpu"):
            wide = torch.promote_types(costs.dtype, torch.float32)
            return list(costs.detach().to(gates[0].device, wide).unbind())
        costs = costs.tolist()
    if not isinstance(costs, Iterable):
        raise TypeError(f"{function}: costs must be a sequence, got {type(costs).__name__}")
    costs = list(costs)
    right = all(isinstance(cost, Real) and 0 < float(cost) < math.inf for cost in costs)
    if len(costs) != len(gates) or not right:
        raise ValueError(
            f"{function}: costs must be {len(gates)} positive numbers, one a layer, got {costs}"
        )
    return costs


def _mean(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """The mean, 0 for no values; with a weight of 0 or 1 each, of those with 1."""
    if weight is None:
        return values.sum() / max(values.numel(), 1)
    return torch.where(weight > 0, values, 0).sum() / weight.sum().clamp(min=1)


def _check_gate(function: str, name: str, value: Any) -> None:
    check_dense(function, name, value)
    if not value.dtype.is_floating_point:
        raise TypeError(
            f"{function}: {name} must have a floating-point dtype, got "
            f"{str(value.dtype).removeprefix('torch.')}"
        )
    if value.dim() == 0:
        raise ValueError(f"{function}: {name} must have shape [..., N + 1], got a scalar")
