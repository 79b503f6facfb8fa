"""Loading a converted model of transformers with its learners."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd.acm._convert import SETTINGS, convert

#: Options of ``from_pretrained`` that say where the files are.
_WHERE = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "trust_remote_code")


def from_pretrained(model_class: Any, path: Any, **options: Any) -> Any:
    """Load a model of transformers that was saved after :func:`acm.convert`, with its learners.

    ``model_class.from_pretrained`` alone makes the model as it was before, and drops the learners.
    This converts the new model in the same way before its weights are loaded, and otherwise does
    the same: dtypes, device maps and files in parts included. Originals are kept where the files
    have them.

    Args:
        model_class: the model's class, or an Auto class such as ``AutoModelForCausalLM``.
        path: as for its ``from_pretrained``.
        options: the same.

    Returns:
        the model, in ``eval`` mode.

    Raises:
        TypeError: the class has no ``from_pretrained``. ValueError: the configuration says nothing
        of a conversion: it was saved without one.

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
    conversions: list[dict[str, Any]] | None = getattr(config, SETTINGS, None)
    if not conversions:
        raise ValueError(
            f"acm.from_pretrained: the configuration of {path} must say how the model was "
            f"converted ({SETTINGS}), got none: use {model_class.__name__}.from_pretrained"
        )
    names = _saved_names(Path(path) / str(options.get("subfolder", "")))
    if names is not None:
        kept = any(".original." in name for name in names)
        conversions = [{**x, "keep_original": x["keep_original"] and kept} for x in conversions]
    found = conversions
    if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
        with torch.device("meta"):  # which class an Auto class chooses
            model_class = type(model_class.from_config(config))
    plain = type(config).from_dict(config.to_dict())
    delattr(plain, SETTINGS)

    class Converted(model_class):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, *args: Any, **more: Any) -> None:
            super().__init__(config, *args, **more)
            for arguments in found:
                convert(self, **arguments)

    Converted.__name__, Converted.__qualname__ = model_class.__name__, model_class.__qualname__
    Converted.__module__ = model_class.__module__
    model = Converted.from_pretrained(path, config=plain, **options)
    model.__class__ = model_class
    return model


def _saved_names(folder: Path) -> Iterable[str] | None:
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
