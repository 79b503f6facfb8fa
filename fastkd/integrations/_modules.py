"""Running a loss inside a wrapped module's forward, and finding a model's output head."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastkd._ops import hints

Result = TypeVar("Result")

#: Wrappers whose forward calls that of `module`; by name, as some are in packages not needed here.
_WRAPPERS = {
    "DataParallel",
    "DeepSpeedEngine",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
}


def call_through(
    module: nn.Module, function: Callable[..., Result], *args: Any, **kwargs: Any
) -> Result:
    """Run a function as a module's own forward, so that all its hooks act.

    A loss that reads ``lm_head.weight`` without calling ``lm_head`` bypasses what its wrappers do
    in forward: DistributedDataParallel prepares the reduction of gradients there, FSDP gathers
    parameters, tensor parallelism redistributes inputs. Inside ``call_through`` the function finds
    gathered parameters, and gradients are reduced as after an ordinary forward.

    Nest two calls where the output head may be an FSDP unit of its own::

        call_through(model, lambda: call_through(lm_head, loss, hidden))

    Args:
        module: as it is called in training: wrapped by DistributedDataParallel,
            FullyShardedDataParallel, ``fully_shard`` or DeepSpeed, or not at all. A module that
            torch.compile returned runs the function eagerly.
        function: what to run. It may call the module in the ordinary way.
        args: for the function. Pass tensors that need a gradient here rather than in a closure:
            FSDP's hooks look at the arguments of forward and at its result.
        kwargs: the same.

    Returns:
        what the function returns, after the module's forward hooks.

    Raises:
        TypeError: ``module`` is no module, or ``function`` cannot be called.

    >>> import torch
    >>> from fastkd.integrations import call_through
    >>> head = torch.nn.Linear(2, 3)
    >>> call_through(head, lambda x: (x @ head.weight.T).shape, torch.ones(4, 2))
    torch.Size([4, 3])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"call_through: module must be a torch.nn.Module, got {type(module).__name__}"
        )
    if not callable(function):
        raise TypeError(f"call_through: function must be callable, got {type(function).__name__}")
    entry = _eager(module)
    target = _innermost(entry)
    own = target.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            target.__dict__.pop("forward", None)
        else:
            target.__dict__["forward"] = own

    def forward(*inner_args: Any, **inner_kwargs: Any) -> Result:
        restore()  # the function may call the module itself
        return function(*inner_args, **inner_kwargs)

    target.__dict__["forward"] = forward
    try:
        return entry(*args, **kwargs)
    finally:
        restore()


def unwrapped(module: nn.Module) -> nn.Module:
    """The module within wrappers and compiled modules."""
    return _innermost(_eager(module))


def _eager(module: nn.Module) -> nn.Module:
    while isinstance(inner := module.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
        module = inner
    return module


def _innermost(module: nn.Module) -> nn.Module:
    while any(kind.__name__ in _WRAPPERS for kind in type(module).__mro__):
        inner = getattr(module, "module", None)
        if not isinstance(inner, nn.Module):
            break
        module = inner
    # A compiled module inside a wrapper has no forward to replace: what it compiled has.
    return _eager(module)


#: Names of the soft cap in the configurations of models.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class LinearHead(NamedTuple):
    """A model's output layer: logits = softcap(logit_scale x (hidden @ weight.T + bias))."""

    #: The layer; call through it before reading its weight.
    module: nn.Module
    logit_scale: float
    #: c of c tanh(z / c), or None.
    logit_softcap: float | None

    @property
    def weight(self) -> Tensor:
        """``[vocab, features]``, as it is now."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """``[vocab]`` or None."""
        return getattr(self.module, "bias", None)

    @property
    def is_plain(self) -> bool:
        """Whether the layer is an ``nn.Linear`` and no more: not quantised, not with an adapter."""
        module = self.module
        return (
            isinstance(module, nn.Linear)
            and type(module).forward is nn.Linear.forward
            and "forward" not in module.__dict__
            and module.weight.is_floating_point()
        )


def lm_head(model: nn.Module) -> LinearHead:
    """The output layer of a causal language model of transformers, with its scale and softcap.

    Models differ in what follows the layer: Cohere and HyperCLOVA X multiply the logits, Falcon-H1
    (``lm_head_multiplier``) and Muse Glimmer (``output_multiplier``) too, Granite divides them,
    MiniCPM and Inkling divide the hidden states, Gemma, RecurrentGemma and xLSTM cap the logits.
    All of it is read off the configuration (transformers 5.24). A model may have
    other layers between ``base_model`` and this one, as BERT has; they are not part of the result.

    Args:
        model: wrapped or not; a PEFT model too.

    Raises:
        TypeError: the model is no module, has no ``get_output_embeddings``, or that returns None.
        ValueError: the configuration has a ``logits_scaling`` of unknown meaning.

    >>> import torch
    >>> from fastkd.integrations import lm_head
    >>> class Model(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.head = torch.nn.Linear(2, 3, bias=False)
    ...     def get_output_embeddings(self):
    ...         return self.head
    >>> lm_head(Model()).logit_scale
    1.0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"lm_head: model must be a torch.nn.Module, got {type(model).__name__}")
    inner = base_of(model)
    found = getattr(inner, "get_output_embeddings", None)
    module = found() if callable(found) else None
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"lm_head: model must have an output layer (get_output_embeddings), got "
            f"{type(inner).__name__}"
        )
    config = _text_config(inner)
    scale = 1.0
    softcaps = [getattr(config, name, None) for name in _SOFTCAPS]
    softcap = next((x for x in softcaps if x is not None), None)
    kind = getattr(config, "model_type", "")
    if divisor := getattr(config, "logits_scaling", None):
        if kind.startswith(("granite", "minicpm")):
            scale /= divisor
        elif kind.startswith("hyperclovax"):
            scale *= divisor
        else:
            raise ValueError(
                f"lm_head: logits_scaling of a model whose type is granite, minicpm or hyperclovax "
                f"is known, got {kind!r}: whether it multiplies or divides is not"
            )
    outer = getattr(getattr(inner, "config", None), "model_type", "")
    unscaled = outer in ("aya_vision", "cohere2_vision")  # around a text model of Cohere's
    if kind.startswith("cohere") and getattr(config, "logit_scale", None) and not unscaled:
        scale *= config.logit_scale
    for name in ("lm_head_multiplier", "output_multiplier"):
        if getattr(config, name, None):
            scale *= getattr(config, name)
    if getattr(config, "logits_mup_width_multiplier", None):
        scale /= config.logits_mup_width_multiplier
    return LinearHead(module, float(scale), None if softcap is None else float(softcap))


#: The absolute value of a logit that every softcap changes.
_LARGE = 200.0
#: Errors of a model that needs more than token ids, or other processes.
_NEEDS_MORE = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)
#: Errors of the device. They are RuntimeErrors, but say nothing about the model.
_LOST = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))


def reads_backbone(model: nn.Module) -> bool:
    """Whether a model's logits are those of :func:`lm_head` on its ``base_model``'s output.

    Models such as BERT have a layer between the two, whose parameters are in neither. A step
    without parameters is found by comparing the logits of a short text, if the parameters have
    values (not under ZeRO-3, for example). If the model does not run on token ids alone, a warning
    gives its error.
    """
    inner: Any = base_of(model)
    backbone = getattr(inner, "base_model", inner)
    if backbone is inner:
        return False
    head = lm_head(model)
    known = {id(x) for part in (backbone, head.module) for x in part.parameters()}
    if not all(id(x) in known for x in inner.parameters()):
        return False
    if not head.is_plain or any(x.is_meta or not x.numel() for x in inner.parameters()):
        return True
    return _agree(inner, backbone, head)


@torch.no_grad()
def _agree(model: Any, backbone: nn.Module, head: LinearHead) -> bool:
    """Whether a model's logits are its output layer's, with the scale and the softcap.

    The backbone's output is multiplied so that logits of untrained weights show a softcap, too.
    """
    modes = [(module, module.training) for module in model.modules()]
    seen: list[Tensor] = []

    def enlarge(module: Any, arguments: Any, output: Any) -> None:
        hidden = output[0]
        if not seen:
            logits, size = head.logit_scale * head.module(hidden), hidden.abs().max().float()
            factor = torch.minimum(_LARGE / logits.abs().max().float(), 50 * _LARGE / size)
            hidden.copy_(hidden.float() * torch.where(factor.isfinite(), factor, 1))
            seen.append(hidden.clone())

    model.eval()
    hook = backbone.register_forward_hook(enlarge)
    try:
        embedding = model.get_input_embeddings().weight
        ids = (embedding.size(0) // 2 + torch.arange(4, device=embedding.device)).unsqueeze(0)
        ids = ids % embedding.size(0)
        outputs = model(input_ids=ids, **without_cache(model))
        expected = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if not seen:  # it runs its backbone in another way
            hook.remove()
            seen.append(backbone(input_ids=ids, **without_cache(backbone))[0])
        found = head.logit_scale * head.module(seen[0])
    except _LOST:
        raise
    except _NEEDS_MORE as error:
        hints.warn(
            f"{type(model).__name__} could not be run on token ids alone, to compare its logits "
            "with those of its output layer, which are now taken for the same: "
            f"{type(error).__name__}: {error}"
        )
        return True
    finally:
        hook.remove()
        for module, mode in modes:
            module.training = mode
    if head.logit_softcap is not None:
        found = head.logit_softcap * torch.tanh(found / head.logit_softcap)
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max().item()
    return found.shape == expected.shape and bool(
        found.to(expected.dtype).isclose(expected, rtol=0, atol=tolerance, equal_nan=True).all()
    )


def without_cache(model: nn.Module) -> dict[str, Any]:
    """The option of a model's forward by which it keeps no keys and values, where it has one."""
    known = inspect.signature(base_of(model).forward).parameters.values()
    takes = any(x.name == "use_cache" or x.kind == x.VAR_KEYWORD for x in known)
    return {"use_cache": False} if takes else {}


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    return text() if callable(text) else config


def base_of(model: nn.Module) -> nn.Module:
    """The model of transformers within wrappers and a PEFT model."""
    inner = unwrapped(model)
    get = getattr(inner, "get_base_model", None)
    return get() if callable(get) else inner
