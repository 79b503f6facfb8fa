"""Replace the Linears and MLPs of a model by adaptive computation modules, and train these."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd._ops.arguments import to_flag
from fastkd.acm._arguments import check_count, check_integer, check_module
from fastkd.acm._modules import ACM, ACMGate, SplitMLP, mlp_sizes, projection_sizes

_KINDS = ("mlp", "linear")
#: Of a model or its configuration: what it was converted by.
SETTINGS = "fastkd_acm"
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
    select: Callable[[str, nn.Module], bool] | Collection[str] | None = None,
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
        fastkd.acm.phase3_loss(task_loss, made, target=0.5).backward()

    After training, :func:`acm.set_budget` makes the model keep to a budget.

    A replaced module's parameters and buffers are in ``state_dict`` under ``<name>.original`` if
    they are kept. Such a dictionary fits a new model that is converted in the same way:
    :func:`acm.settings` says how. A model of transformers saves that with its configuration, and
    :func:`acm.from_pretrained` loads it.

    Args:
        model: changed in place, unless it is itself replaced.
        num_learners: N.
        kinds: any of ``"mlp"`` and ``"linear"``.
        select: from a candidate's name and module, whether it is replaced. None: all are. With
            ``"linear"`` these include output layers, so select by name, for example:
            ``lambda name, module: name.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))``. Or
            the names of those to replace.
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
    check_module("acm.convert", "model", model)
    if isinstance(kinds, str) or not isinstance(kinds, Iterable):
        raise TypeError(f"acm.convert: kinds must be a sequence of names, got {kinds!r}")
    kinds = tuple(kinds)
    for kind in kinds:
        if kind not in _KINDS:
            raise ValueError(f"acm.convert: kinds must be of {', '.join(_KINDS)}; got {kind!r}")
    num_learners = check_count("acm.convert", "num_learners", num_learners)
    gate_depth = check_count("acm.convert", "gate_depth", gate_depth)
    gate_hidden = check_count("acm.convert", "gate_hidden", gate_hidden)
    keep_original = to_flag("acm.convert", "keep_original", keep_original)
    if min_choice is not None:
        min_choice = check_integer("acm.convert", "min_choice", min_choice)
        if not 0 <= min_choice <= num_learners:
            raise ValueError(
                f"acm.convert: min_choice must lie in [0, num_learners = {num_learners}], got "
                f"{min_choice}"
            )
    named = isinstance(select, Collection) and not isinstance(select, (str, Tensor))
    names: Any = select if named else None
    if select is not None and names is None and not callable(select):
        raise TypeError(
            f"acm.convert: select must be a function or names, got {type(select).__name__}"
        )
    made: dict[nn.Module, ACM] = {}
    places: list[str] = []

    def replacement(name: str, module: nn.Module) -> ACM | None:
        """The ACM for a module, the same one for a module that is found twice."""
        is_mlp = mlp_sizes(module) is not None
        if ("mlp" if is_mlp else "linear") not in kinds:
            return None
        if not is_mlp and projection_sizes(module) is None:
            return None
        if module not in made:
            if names is not None:
                if name not in names:
                    return None
            elif callable(select) and not select(name, module):
                return None
            places.append(name)
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
    if whole is None:
        walk(model, "")
    if made and names is not None and len(places) < len(names):
        absent = next(name for name in names if name not in places)
        raise ValueError(f"acm.convert: select must name what can be replaced, got {absent!r}")
    if not made:
        raise ValueError(
            f"acm.convert: nothing of kinds {', '.join(kinds)} to replace in {type(model).__name__}"
            f"{' that select agrees to' if select is not None else ''}"
        )
    record(
        model if whole is None else whole,
        {
            "num_learners": num_learners,
            "kinds": list(kinds),
            "select": places,
            "min_choice": min_choice,
            "gate_depth": gate_depth,
            "gate_hidden": gate_hidden,
            "keep_original": bool(keep_original),
        },
    )
    return model if whole is None else whole


def record(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Add a conversion to those of a model, and to its configuration, which is saved with it.

    Several modules may have one configuration: a model and the model inside it.
    """
    model.__dict__[SETTINGS] = [*getattr(model, SETTINGS, ()), arguments]
    config = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):  # of transformers
        before = [x for x in getattr(config, SETTINGS, None) or () if x != arguments]
        setattr(config, SETTINGS, [*before, arguments])


def settings(model: nn.Module) -> list[dict[str, Any]]:
    """How :func:`acm.convert` has converted a model, or modules in it: its arguments.

    They are plain data (JSON), with the names of the replaced modules as ``select``. A new model
    converted by them has the same parameters, so that a saved ``state_dict`` fits::

        torch.save({"acm": fastkd.acm.settings(model), "state": model.state_dict()}, file)

        saved = torch.load(file)
        for arguments in saved["acm"]:
            new = fastkd.acm.convert(new, **arguments)
        new.load_state_dict(saved["state"])

    There is a dictionary for each call, and two where originals of some modules have been dropped
    since: these are not kept.

    Raises:
        ValueError: the model was not converted.

    >>> import torch, fastkd
    >>> nn = torch.nn
    >>> mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    >>> model = fastkd.acm.convert(nn.Sequential(nn.LayerNorm(8), mlp), num_learners=2)
    >>> fastkd.acm.settings(model)[0]["select"]
    ['1']
    """
    check_module("acm.settings", "model", model)
    modules = layers(model)
    kept = {name: module.original is not None for name, module in modules.items()}
    found = []
    for place, part in model.named_modules():
        for arguments in getattr(part, SETTINGS, ()):
            names = [f"{place}.{name}".strip(".") for name in arguments["select"]]
            found += split(arguments, [name for name in names if name in modules], kept)
    if not found:
        raise ValueError(f"acm.settings: model was not converted, got {type(model).__name__}")
    return found


def split(
    arguments: dict[str, Any], names: Sequence[str], kept: Mapping[str, bool]
) -> list[dict[str, Any]]:
    """A conversion of these modules as two: of those whose originals are kept, and the others."""
    chosen = {keep: [name for name in names if kept[name] == keep] for keep in (True, False)}
    return [
        {**arguments, "select": some, "keep_original": keep}
        for keep, some in chosen.items()
        if some
    ]


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
    check_module("acm.layers", "model", model)
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
    check_module("acm.calls", "model", model)
    originals = to_flag("acm.calls", "originals", originals)
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
    check_module("acm.set_budget", "model", model)
    if not isinstance(batches, Iterable) or isinstance(batches, str):
        raise TypeError(
            f"acm.set_budget: batches must be a list of inputs, got {type(batches).__name__}"
        )
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
