"""Loading a converted model of transformers with its learners."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd.acm._convert import SETTINGS, convert, layers, split
from fastkd.acm._modules import ACM

#: Options of ``from_pretrained`` that say where the files are.
_WHERE = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "trust_remote_code")


def from_pretrained(model_class: Any, path: Any, **options: Any) -> Any:
    """Load a model of transformers that was saved after :func:`acm.convert`, with its learners.

    ``model_class.from_pretrained`` alone makes the model as it was before, and drops the learners.
    This converts the new model in the same way before its weights are loaded, and otherwise does
    the same: dtypes, device maps and sharded files included. An original is kept where the files
    have it. The class may be another one than that of the saved model, with or without a head. What
    was converted may also be a submodule whose ``config`` is that of the model or is inside it, as
    a text model's is.

    Args:
        model_class: the model's class, or an Auto class such as ``AutoModelForCausalLM``.
        path: as for its ``from_pretrained``.
        options: the same.

    Returns:
        the model, in ``eval`` mode; with ``output_loading_info=True`` a pair of the model and that
        information.

    Raises:
        TypeError: the class has no ``from_pretrained``.
        ValueError: the configuration has no conversion, because the model was saved before it or
            because a submodule without a configuration was converted; or the class has none of the
            converted modules; or a name fits several of them.

    >>> import tempfile, transformers, fastkd
    >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    >>> config = transformers.LlamaConfig(vocab_size=9, num_attention_heads=2, **sizes)
    >>> model = fastkd.acm.convert(transformers.LlamaForCausalLM(config), num_learners=2)
    >>> folder = tempfile.mkdtemp()
    >>> model.save_pretrained(folder)
    >>> again = fastkd.acm.from_pretrained(transformers.LlamaForCausalLM, folder)
    >>> list(fastkd.acm.layers(again))
    ['model.layers.0.mlp']
    """
    if not callable(getattr(model_class, "from_pretrained", None)):
        kind = getattr(model_class, "__name__", type(model_class).__name__)
        raise TypeError(
            f"acm.from_pretrained: model_class must be a model's class of transformers, got {kind}"
        )
    import transformers

    config = options.pop("config", None)
    if config is None:
        where = {name: options[name] for name in _WHERE if name in options}
        config = transformers.AutoConfig.from_pretrained(path, **where)
    plain = type(config).from_dict(config.to_dict())
    conversions = _pop_conversions(plain)
    if not conversions:
        raise ValueError(
            f"acm.from_pretrained: the configuration of {path} must say how the model was "
            f"converted ({SETTINGS}), got none: use {model_class.__name__}.from_pretrained, or "
            "convert the model itself, with select, before it is saved"
        )
    saved = _saved_names(Path(path) / str(options.get("subfolder", "")))
    if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
        with torch.device("meta"):  # which class an Auto class chooses
            model_class = type(model_class.from_config(plain))

    class Converted(model_class):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, *args: Any, **more: Any) -> None:
            super().__init__(config, *args, **more)
            for arguments in _renamed(self, conversions, saved):
                convert(self, **arguments)
            for module in self.modules():
                # transformers' initialisation may expect a Linear where there is an ACM now.
                if any(isinstance(child, ACM) for child in module.children()):
                    module._is_hf_initialized = True  # type: ignore[assignment]

    Converted.__name__, Converted.__qualname__ = model_class.__name__, model_class.__qualname__
    Converted.__module__ = model_class.__module__
    wanted = options.pop("output_loading_info", False)
    model, info = Converted.from_pretrained(path, config=plain, output_loading_info=True, **options)
    model.__class__ = model_class
    absent = info["missing_keys"]
    for name, module in layers(model).items():
        own = {key for key in absent if key.startswith(f"{name}.original.")}
        if own:  # they are in no file, which _saved_names could not tell
            module.original = None
            absent = info["missing_keys"] = type(absent)(key for key in absent if key not in own)
    return (model, info) if wanted else model


def _pop_conversions(config: Any) -> list[dict[str, Any]]:
    """Remove the conversions from a configuration and those inside it, and return them."""
    found = list(getattr(config, SETTINGS, None) or ())
    if hasattr(config, SETTINGS):
        delattr(config, SETTINGS)
    for part in list(vars(config).values()):
        if hasattr(part, "to_json_string"):
            found += _pop_conversions(part)
    return found


def _renamed(
    model: Any, conversions: list[dict[str, Any]], saved: Collection[str] | None
) -> list[dict[str, Any]]:
    """The conversions of a new model, with the names that the modules have in it.

    Names are of the module that was converted: of this class, of one with a head around it or
    inside it, or of a part of that. A later conversion replaces an earlier one.
    """
    base = f"{model.base_model_prefix}."
    names = {name.removeprefix(base): name for name, _ in model.named_modules()}
    kept: dict[str, bool] = {}
    if saved is not None:
        files = [name.removeprefix(base) for name in saved]
        learners = {name.removesuffix(".w1") for name in files if name.endswith(".w1")}
        originals = {name.partition(".original.")[0] for name in files if ".original." in name}
        names = {short: name for short, name in names.items() if short in learners}
        kept = {name: short in originals for short, name in names.items()}
    found: list[dict[str, Any]] = []
    done: set[str] = set()
    for arguments in reversed(conversions):
        places = []
        for name in arguments["select"]:
            short = name.removeprefix(base)
            fits = [short] if short in names else [x for x in names if x.endswith(f".{short}")]
            if len(fits) > 1:
                raise ValueError(
                    f"acm.from_pretrained: a part of the model was converted, and {name!r} in it "
                    f"may be {' or '.join(map(repr, fits))}; convert the model itself, with select"
                )
            places += [names[x] for x in fits if names[x] not in done]
        done.update(places)
        keep = {name: kept.get(name, arguments["keep_original"]) for name in places}
        found = split(arguments, places, keep) + found
    if not found:
        raise ValueError(
            f"acm.from_pretrained: model_class must have the modules that were converted, such as "
            f"{conversions[0]['select'][0]!r}, got {type(model).__name__}"
        )
    return found


def _saved_names(folder: Path) -> Collection[str] | None:
    """The names of the tensors in a folder of safetensors; None where this is not known."""
    index, single = (
        folder / name for name in ("model.safetensors.index.json", "model.safetensors")
    )
    if index.is_file():
        return json.loads(index.read_text())["weight_map"]
    if single.is_file():
        with single.open("rb") as file:
            return json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return None
