"""The losses of the three phases that train a converted model."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.arguments import to_flag
from fastkd._ops.checks import check_finite
from fastkd.acm._arguments import check_float
from fastkd.acm._convert import Call
from fastkd.acm._gate import Regularizers, regularized, rows_mask
from fastkd.acm._modules import ACM
from fastkd.acm._prefix_loss import check_rule, oracle, prefix_loss


def phase1_loss(
    calls: Sequence[Call], *, detach: bool = False, mask: Tensor | None = None
) -> Tensor:
    """Squared error of learners against the replaced modules, mean over modules and prefixes.

    Modules do not depend on each other; gates get no gradient.

    Args:
        calls: of :func:`acm.calls` with ``originals=True``.
        detach: as for :func:`fastkd.acm.prefix_loss`.
        mask: bool or integers, one a row, such as a batch's ``attention_mask``: rows with False or
            0 do not count and are not read. None: all count.

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    >>> import torch, fastkd
    >>> nn = torch.nn
    >>> model = fastkd.acm.convert(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))
    >>> with fastkd.acm.calls(model, originals=True) as calls:
    ...     _ = model(torch.ones(3, 8))
    >>> fastkd.acm.phase1_loss(calls).backward()
    >>> model.w1.grad.any().item()
    True
    """
    detach = to_flag("acm.phase1_loss", "detach", detach)
    losses = []
    for module, operands, target in _imitations("acm.phase1_loss", calls, mask):
        found = prefix_loss(*operands, target, activation=module.activation, detach=detach)
        losses.append(found.mean())
    return torch.stack(losses).mean()


def phase2_loss(
    calls: Sequence[Call],
    *,
    threshold: float = 1 / 1.2,
    rule: str = "paper",
    mask: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the gates with the numbers of learners that :func:`fastkd.acm.oracle` finds.

    The mean over modules; learners and the layers before them get no gradient. The loss is computed
    from the gates' logits: the released code takes the logarithm of sampled one-hot gates, which
    has gradients of 1e20. Labels below a gate's ``min_choice`` are replaced by ``min_choice``.

    Args:
        calls: of :func:`acm.calls` with ``originals=True``.
        threshold: as for :func:`fastkd.acm.oracle`.
        rule: as for :func:`fastkd.acm.oracle`.
        mask: bool or integers, one a row, such as a batch's ``attention_mask``: rows with False or
            0 do not count and are not read. None: all count.

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    >>> import torch, fastkd
    >>> nn = torch.nn
    >>> model = fastkd.acm.convert(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))
    >>> with fastkd.acm.calls(model, originals=True) as calls:
    ...     _ = model(torch.ones(3, 8))
    >>> fastkd.acm.phase2_loss(calls).backward()
    >>> model.w1.grad is None, model.gate.layers[0].weight.grad.any().item()
    (True, True)
    """
    check_rule("acm.phase2_loss", threshold, rule)
    losses = []
    for module, operands, target in _imitations("acm.phase2_loss", calls, mask):
        if module.gate is None:
            raise ValueError("acm.phase2_loss: calls hold a module without a gate")
        least = module.gate.min_choice
        labels = oracle(
            *operands, target, activation=module.activation, threshold=threshold, rule=rule
        )
        logits = module.gate.logits(operands[0].to(module.w1.dtype))[..., least:]
        log_probs = logits.float().log_softmax(-1)
        labels = labels.clamp(min=least).unsqueeze(-1) - least
        losses.append(-log_probs.gather(-1, labels).sum() / max(labels.numel(), 1))
    return torch.stack(losses).mean()


def _check_calls(function: str, calls: Any) -> None:
    """Raise unless the value is a list of calls."""
    if not isinstance(calls, (list, tuple)):
        raise TypeError(
            f"{function}: calls must be the list of acm.calls, got {type(calls).__name__}"
        )
    for call in calls:
        if not isinstance(call, Call):
            raise TypeError(f"{function}: calls must hold only acm.Call, got {type(call).__name__}")


def _imitations(
    function: str, calls: Sequence[Call], mask: Tensor | None
) -> Iterator[tuple[ACM, tuple[Tensor, Tensor, Tensor, Tensor], Tensor]]:
    """Modules, their operands, and the target of their learners."""
    _check_calls(function, calls)
    if not calls:
        raise ValueError(f"{function}: calls is empty; no ACM ran inside acm.calls")
    for call in calls:
        if call.gates is not None:  # a gate chose: the output is the learners' own
            raise ValueError(
                f"{function}: calls must be of acm.calls(model, originals=True), got a call of "
                f"{call.name!r} in which its learners ran"
            )
        x, target = call.input, call.output.detach()
        if mask is not None:
            kept = rows_mask(function, f"the input of {call.name!r}", mask, x.shape[:-1], x.device)
            x, target = x[kept], target[kept]
        operands, bias = call.module.operands(x)
        yield call.module, operands, target if bias is None else target - bias


def phase3_loss(
    task_loss: Tensor,
    calls: Sequence[Call],
    *,
    target: float,
    budget_weight: float = 0.1,
    entropy_weight: float = 0.05,
    diversity_weight: float = 0.05,
    mask: Tensor | None = None,
) -> Tensor:
    """The task's loss and :func:`fastkd.acm.regularizers` of the gates, weighted and added.

    Args:
        task_loss: scalar, of a model in training mode inside :func:`acm.calls`.
        calls: of that context. The first dimension of their gates is the batch.
        target: share of the computation of all learners; 0.25 to 0.75 in the paper.
        budget_weight: of the distance from the target.
        entropy_weight: of the entropy term.
        diversity_weight: of the diversity term.
        mask: as for :func:`fastkd.acm.regularizers`, one a row of each call's gates.

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    >>> import torch, fastkd
    >>> model = fastkd.nn.ACM(8, width=4)
    >>> with fastkd.acm.calls(model) as made:
    ...     task_loss = model(torch.ones(3, 8)).square().mean()
    >>> fastkd.acm.phase3_loss(task_loss, made, target=0.5).backward()
    >>> model.gate.layers[0].weight.grad.any().item()
    True
    """
    name = "acm.phase3_loss"
    check_float(name, "task_loss", task_loss)
    if task_loss.numel() != 1:
        raise ValueError(f"{name}: task_loss must be a scalar, got shape {list(task_loss.shape)}")
    for weight, value in (
        ("budget_weight", budget_weight),
        ("entropy_weight", entropy_weight),
        ("diversity_weight", diversity_weight),
    ):
        check_finite(name, weight, value)
    found = _regularizers(name, calls, target, mask)
    return (
        task_loss
        + budget_weight * found.budget
        + entropy_weight * found.entropy
        + diversity_weight * found.diversity
    )


def _regularizers(
    function: str, calls: Sequence[Call], target: float, mask: Tensor | None
) -> Regularizers:
    _check_calls(function, calls)
    gated = [(call.gates, call.module.cost) for call in calls if call.gates is not None]
    if not gated:
        raise ValueError(
            f"{function}: calls hold no gates; run the model inside acm.calls(model), without "
            "originals or choices"
        )
    gates, costs = zip(*gated, strict=True)
    return regularized(function, gates, costs, target, mask)
