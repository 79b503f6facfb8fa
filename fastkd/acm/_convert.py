"""Replace the Linears and MLPs of a model by adaptive computation modules, and train these."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd.acm._arguments import check_count, check_integer
from fastkd.acm._gate import Regularizers, regularizers
from fastkd.acm._modules import ACM, ACMGate, SplitMLP, mlp_sizes, projection_sizes
from fastkd.acm._prefix_loss import oracle, prefix_loss

_KINDS = ("mlp", "linear")
#: Modules whose children are not replaced.
_WHOLE = (ACM, ACMGate, nn.MultiheadAttention, nn.TransformerEncoderLayer)


class Call(NamedTuple):
    """One call of an :class:`fastkd.nn.ACM`, recorded by :func:`acm.calls`."""

    #: The module's name in the model.
    name: str
    module: ACM
    #: ``[..., D]``, without gradient.
    input: Tensor
    #: ``[..., D_out]``; where originals run it is the original's, without gradient.
    output: Tensor
    #: ``[..., N + 1]``; None where originals run, choices were given, or there is no gate.
    gates: Tensor | None


def convert(
    model: nn.Module,
    *,
    num_learners: int = 4,
    kinds: Sequence[str] = ("mlp",),
    select: Callable[[str, nn.Module], bool] | None = None,
    min_choice: int | None = None,
    gate_depth: int = 1,
    gate_hidden: int = 16,
    keep_original: bool = True,
) -> nn.Module:
    r"""Replace MLPs and Linears of a model by :class:`fastkd.nn.ACM`, in place.

    ``"mlp"`` replaces every ``Sequential(Linear, activation, Linear)`` (dropout allowed), every
    module with projections named as in transformers (Llama, Mistral, Qwen, Gemma, ViT, CLIP, GPT-2,
    NeoX, T5, ...), and the pair ``intermediate`` and ``output.dense`` of BERT and similar models:
    the ACM replaces ``intermediate``, and ``output.dense`` becomes the identity. ``"linear"``
    replaces every ``nn.Linear`` that is not part of such an MLP, of ``nn.MultiheadAttention`` or of
    ``nn.TransformerEncoderLayer``, which read the weights themselves. Sizes are the paper's
    (:meth:`ACM.from_mlp <fastkd.nn.ACM.from_mlp>`, :meth:`ACM.from_linear
    <fastkd.nn.ACM.from_linear>`). The weights are new: the model must be trained before it is
    useful.

    Training has three phases::

        fastkd.acm.convert(model)
        # I: learners imitate the originals            # II: gates learn what learners suffice
        with torch.no_grad(), fastkd.acm.calls(model, originals=True) as calls:
            model(batch)
        fastkd.acm.phase1_loss(calls).backward()       # or fastkd.acm.phase2_loss(calls)
        # III: all together, with the task's loss, in model.train()
        with fastkd.acm.calls(model) as made:
            task_loss = criterion(model(batch), labels)
        fastkd.acm.phase3_loss(task_loss, calls, target=0.5).backward()

    After training, :func:`acm.set_budget` makes the model keep to a budget.

    A replaced module's parameters and buffers are in ``state_dict`` under ``<name>.original`` if
    they are kept. To load such a dictionary, call ``acm.convert`` with the same arguments on a new
    model.

    Args:
        model: changed in place, unless it is itself replaced.
        num_learners: N.
        kinds: any of ``"mlp"`` and ``"linear"``.
        select: from a candidate's name and module, whether it is replaced. None: all are. With
            ``"linear"`` these include output layers, so select by name, for example:
            ``lambda name, module: name.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))``.
        min_choice: the least number of learners. None: 0 for MLPs, which have a residual
            connection around them, and 1 for Linears.
        gate_depth: of :class:`fastkd.nn.ACMGate`.
        gate_hidden: of :class:`fastkd.nn.ACMGate`.
        keep_original: keep each replaced module, as :attr:`ACM.original`, for phases I and II. Set
            it to None after them.

    Returns:
        ``model``, or the ACM in its place.

    Raises:
        ValueError: nothing to replace, or an argument has the wrong value.

    Source: Wójcik et al. 2023 (arXiv 2312.10193).

    >>> import torch, fastkd
    >>> nn = torch.nn
    >>> mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    >>> fastkd.acm.convert(nn.Sequential(nn.LayerNorm(8), mlp))[1]
    ACM(
      8, 8, num_learners=4, width=4, activation='gelu', bias=False
      (gate): ACMGate(
        min_choice=0, temperature=0.8
        (layers): Sequential(
          (0): Linear(in_features=8, out_features=5, bias=True)
        )
      )
      (original): Sequential(
        (0): Linear(in_features=8, out_features=16, bias=True)
        (1): GELU(approximate='none')
        (2): Linear(in_features=16, out_features=8, bias=True)
      )
    )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"acm.convert: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(kinds, str) or not isinstance(kinds, Iterable):
        raise TypeError(f"acm.convert: kinds must be a sequence of names, got {kinds!r}")
    kinds = tuple(kinds)
    for kind in kinds:
        if kind not in _KINDS:
            raise ValueError(f"acm.convert: kinds must be of {', '.join(_KINDS)}; got {kind!r}")
    num_learners = check_count("acm.convert", "num_learners", num_learners)
    if select is not None and not callable(select):
        raise TypeError(f"acm.convert: select must be a function, got {type(select).__name__}")
    made: dict[nn.Module, ACM] = {}

    def replacement(name: str, module: nn.Module) -> ACM | None:
        """The ACM for a module, the same one for a module that is found twice."""
        is_mlp = mlp_sizes(module) is not None
        if ("mlp" if is_mlp else "linear") not in kinds:
            return None
        if not is_mlp and projection_sizes(module) is None:
            return None
        if module not in made:
            if select is not None and not select(name, module):
                return None
            options = {"gate_depth": gate_depth, "gate_hidden": gate_hidden}
            if min_choice is not None:
                options["min_choice"] = min_choice
            make = ACM.from_mlp if is_mlp else ACM.from_linear
            made[module] = make(module, num_learners, **options).train(module.training)
            made[module].original = module if keep_original else None
        return made[module]

    passed_over: set[nn.Module] = set()

    def walk(parent: nn.Module, prefix: str) -> None:
        split = _split_mlp(parent)
        if split is not None:
            passed_over.update(split)
            new = replacement(f"{prefix}intermediate", split)
            if new is not None:
                behind = nn.Identity().train(split.training)
                parent.intermediate, parent.output.dense = new, behind  # type: ignore
        for name, child in list(parent._modules.items()):
            if child is None or child in passed_over or isinstance(child, _WHOLE):
                continue
            new = replacement(prefix + name, child)
            if new is not None:
                setattr(parent, name, new)
            elif mlp_sizes(child) is None:
                walk(child, f"{prefix}{name}.")

    whole = None if isinstance(model, ACM) else replacement("", model)
    if whole is not None:
        return whole
    walk(model, "")
    if not made:
        raise ValueError(
            f"acm.convert: nothing of kinds {', '.join(kinds)} to replace in {type(model).__name__}"
            f"{' that select agrees to' if select is not None else ''}"
        )
    return model


def _split_mlp(module: nn.Module) -> SplitMLP | None:
    """The MLP whose halves are `intermediate` and `output.dense`, as in BERT's layers."""
    first = getattr(module, "intermediate", None)
    last = getattr(getattr(module, "output", None), "dense", None)
    if not (
        isinstance(first, nn.Module) and hasattr(first, "dense") and isinstance(last, nn.Module)
    ):
        return None
    split = SplitMLP(first, last)
    split.training = first.training
    return None if mlp_sizes(split) is None else split


def layers(model: nn.Module) -> dict[str, ACM]:
    """Every :class:`fastkd.nn.ACM` of a model by its name, each once.

    >>> import torch, fastkd
    >>> list(fastkd.acm.layers(torch.nn.Sequential(fastkd.nn.ACM(8, width=4))))
    ['0']
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, ACM)}


@contextmanager
def calls(model: nn.Module, *, originals: bool = False) -> Iterator[list[Call]]:
    """Record every call of an ACM inside the context.

    Args:
        model: of :func:`fastkd.acm.convert`.
        originals: run the replaced modules instead, without gradients: this is the model before
            :func:`acm.convert`, whose inputs and outputs are needed in phases I and II.

    Returns:
        A context manager that returns a list of :class:`acm.Call`, empty at first. Use it in one
        thread. In a nested context the calls go to the inner list only.

    Raises:
        ValueError: the model has no ACM, or ``originals`` is set and an original was dropped.

    >>> import torch, fastkd
    >>> nn = torch.nn
    >>> mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    >>> model = fastkd.acm.convert(mlp)
    >>> with fastkd.acm.calls(model, originals=True) as calls:
    ...     torch.equal(model(torch.ones(3, 8)), mlp(torch.ones(3, 8)))
    True
    >>> calls[0].output.shape
    torch.Size([3, 8])
    """
    found = layers(model)
    if not found:
        raise ValueError(f"acm.calls: model has no ACM, got {type(model).__name__}")
    made: list[Call] = []

    def watch(name: str) -> Callable[[ACM, Tensor, Tensor | None], Tensor]:
        def run(module: ACM, x: Tensor, choices: Tensor | None) -> Tensor:
            gates = None
            if originals:
                with torch.no_grad():
                    out = module.original(x)  # type: ignore[misc]
            else:
                out, gates = module.route(x, choices)
            made.append(Call(name, module, x.detach(), out, gates))
            return out

        return run

    for name, module in found.items():
        if originals and module.original is None:
            raise ValueError(f"acm.calls: {name or 'the model'} has dropped its original")
    before = {module: module._watch for module in found.values()}
    try:
        for name, module in found.items():
            module._watch = watch(name)
        yield made
    finally:
        for module, outer in before.items():
            module._watch = outer


def phase1_loss(calls: Sequence[Call], *, detach: bool = False) -> Tensor:
    """Squared error of learners against the replaced modules, mean over modules and prefixes.

    Modules do not depend on each other; gates get no gradient.

    Args:
        calls: of :func:`acm.calls` with ``originals=True``.
        detach: as for :func:`fastkd.acm.prefix_loss`.

    >>> import torch, fastkd
    >>> nn = torch.nn
    >>> model = fastkd.acm.convert(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))
    >>> with fastkd.acm.calls(model, originals=True) as calls:
    ...     _ = model(torch.ones(3, 8))
    >>> fastkd.acm.phase1_loss(calls).backward()
    >>> model.w1.grad.any().item()
    True
    """
    losses = []
    for module, operands, target in _imitations("acm.phase1_loss", calls):
        found = prefix_loss(*operands, target, activation=module.activation, detach=detach)
        losses.append(found.mean())
    return torch.stack(losses).mean()


def phase2_loss(
    calls: Sequence[Call], *, threshold: float = 1 / 1.2, rule: str = "paper"
) -> Tensor:
    """Cross-entropy of the gates with the numbers of learners that :func:`fastkd.acm.oracle` finds.

    The mean over modules; learners and the layers before them get no gradient. The loss is computed
    from the gates' logits: the released code takes the logarithm of sampled one-hot gates, which
    has gradients of 1e20. Labels below a gate's ``min_choice`` are replaced by ``min_choice``.

    Args:
        calls: of :func:`acm.calls` with ``originals=True``.
        threshold: as for :func:`fastkd.acm.oracle`.
        rule: as for :func:`fastkd.acm.oracle`.

    >>> import torch, fastkd
    >>> nn = torch.nn
    >>> model = fastkd.acm.convert(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))
    >>> with fastkd.acm.calls(model, originals=True) as calls:
    ...     _ = model(torch.ones(3, 8))
    >>> fastkd.acm.phase2_loss(calls).backward()
    >>> model.w1.grad is None, model.gate.layers[0].weight.grad.any().item()
    (True, True)
    """
    losses = []
    for module, operands, target in _imitations("acm.phase2_loss", calls):
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


def _imitations(
    function: str, calls: Sequence[Call]
) -> Iterator[tuple[ACM, tuple[Tensor, Tensor, Tensor, Tensor], Tensor]]:
    """Modules, their operands, and the target of their learners."""
    if not calls:
        raise ValueError(f"{function}: calls is empty; no ACM ran inside acm.calls")
    for call in calls:
        operands, bias = call.module.operands(call.input)
        target = call.output.detach()
        yield call.module, operands, target if bias is None else target - bias


def phase3_loss(
    task_loss: Tensor,
    calls: Sequence[Call],
    *,
    target: float,
    budget_weight: float = 0.1,
    entropy_weight: float = 0.05,
    diversity_weight: float = 0.05,
) -> Tensor:
    """The task's loss and :func:`fastkd.acm.regularizers` of the gates, weighted and added.

    Args:
        task_loss: scalar, of a model in training mode inside :func:`acm.calls`.
        calls: of that context. The first dimension of their gates is the batch.
        target: share of the computation of all learners; 0.25 to 0.75 in the paper.
        budget_weight: of the distance from the target.
        entropy_weight: of the entropy term.
        diversity_weight: of the diversity term.

    >>> import torch, fastkd
    >>> model = fastkd.nn.ACM(8, width=4)
    >>> with fastkd.acm.calls(model) as made:
    ...     task_loss = model(torch.ones(3, 8)).square().mean()
    >>> fastkd.acm.phase3_loss(task_loss, made, target=0.5).backward()
    >>> model.gate.layers[0].weight.grad.any().item()
    True
    """
    found = _regularizers("acm.phase3_loss", calls, target)
    return (
        task_loss
        + budget_weight * found.budget
        + entropy_weight * found.entropy
        + diversity_weight * found.diversity
    )


def _regularizers(function: str, calls: Sequence[Call], target: float) -> Regularizers:
    gated = [(call.gates, call.module.cost) for call in calls if call.gates is not None]
    if not gated:
        raise ValueError(
            f"{function}: calls hold no gates; run the model inside acm.calls(model), without "
            "originals or choices"
        )
    gates, costs = zip(*gated, strict=True)
    return regularizers(gates, costs, target)


def set_budget(
    model: nn.Module, budget: float, batches: Iterable[Any], *, steps: int = 16
) -> float:
    r"""Make the gates keep to a budget on average, by the smallest price of a learner that does.

    Evaluation chooses the k with the largest :math:`z_k - \lambda_l k`, where :math:`\lambda_l` is
    a common price times the ratio of the cost of a learner of that layer to the largest such cost.
    The price is found by bisection. Each step is a run over ``batches``, in which the inputs of
    later layers depend on the choices of earlier ones. The price that is set meets the budget on
    ``batches``; on other data the share depends on how similar they are. The learners that a row
    runs never depend on the other rows of its batch.

    Args:
        model: with gated ACMs; its prices are overwritten.
        budget: share of the multiply-adds of all learners, in (0, 1].
        batches: a list of representative inputs: tensors, or tuples or dictionaries of arguments.
        steps: of the bisection.

    Returns:
        The share used on ``batches``.

    Raises:
        ValueError: the budget is out of range or below what ``min_choice`` needs, the model has no
            gated ACM, or there are no rows.

    >>> import torch, fastkd
    >>> model, x = fastkd.nn.ACM(8, width=4), torch.randn(100, 8)
    >>> fastkd.acm.set_budget(model, 0.3, [x]) <= 0.3
    True
    """
    if not isinstance(budget, Real):
        raise TypeError(f"acm.set_budget: budget must be a number, got {type(budget).__name__}")
    steps = check_integer("acm.set_budget", "steps", steps)
    if not 0 < budget <= 1:
        raise ValueError(f"acm.set_budget: budget must lie in (0, 1], got {budget}")
    gated = [m for m in layers(model).values() if isinstance(m.gate, ACMGate)]
    batches = list(batches)
    if not gated or not batches:
        raise ValueError(
            f"acm.set_budget: {'batches is empty' if gated else 'model has no ACM with an ACMGate'}"
        )
    largest = max(module.cost for module in gated)
    before = [module.gate.price.clone() for module in gated]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()

    def share(price: float) -> float:
        for module in gated:
            module.gate.price.fill_(price * module.cost / largest)
        used = whole = 0.0
        with torch.no_grad(), calls(model) as made:
            for batch in batches:
                _run(model, batch)
                for call in made:
                    if call.gates is not None:
                        steps = torch.arange(call.gates.size(-1), device=call.gates.device)
                        used += call.module.cost * (call.gates.double() * steps).sum().item()
                        rows = call.gates.shape[:-1].numel()
                        whole += call.module.cost * call.module.num_learners * rows
                made.clear()
        if whole == 0:
            raise ValueError("acm.set_budget: batches hold no rows that a gate sees")
        return used / whole

    try:
        low, high, found = 0.0, 1.0, share(0.0)
        if found <= budget:
            return found
        while (found := share(high)) > budget:
            low, high = high, 4 * high
            if high > 1e12:
                raise ValueError(
                    f"acm.set_budget: budget {budget} is below the {found:.3f} that the least "
                    "choices (min_choice) take"
                )
        for _ in range(steps):
            middle = (low + high) / 2
            tried = share(middle)
            if tried > budget:
                low = middle
            else:
                high, found = middle, tried
        share(high)
        return found
    except BaseException:
        for module, price in zip(gated, before, strict=True):
            module.gate.price.copy_(price)
        raise
    finally:
        for part, training in modes:
            part.training = training


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)
