"""A hash that identifies a tokenizer or a model."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def fingerprint(tokenizer: Any = None, model: Any = None) -> str:
    """A hash of 16 hex digits that identifies a tokenizer or a model.

    Args:
        tokenizer: anything with ``get_vocab()`` (text to id; transformers and tokenizers objects
            have it), or every id's bytes in order, None for ids without. Hashed: each id's token.
        model: a module or its state dict. Hashed: names, shapes, dtypes and 64 evenly spaced values
            of each tensor; not the device.

    Returns:
        the same text in every process and on every machine.

    Raises:
        TypeError: an argument has another type. ValueError: both are None, or a tensor has no
            values, or the model has no tensors.

    >>> from fastkd.teachers import fingerprint
    >>> fingerprint([b"a", b"b", None])
    '857025ba045a1e52'
    >>> fingerprint([b"b", b"a", None]) == fingerprint([b"a", b"b", None])
    False
    """
    if tokenizer is None and model is None:
        raise ValueError("fingerprint: tokenizer or model must be given, got neither")
    digest = hashlib.sha256()
    if tokenizer is not None:
        _hash_tokenizer(digest.update, tokenizer)
    if model is not None:
        _hash_model(digest.update, model)
    return digest.hexdigest()[:16]


def _hash_tokenizer(update: Callable[[bytes], Any], tokenizer: Any) -> None:
    if hasattr(tokenizer, "get_vocab"):
        update(b"vocabulary\0")
        for text, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[::-1]):
            token = text.encode(errors="surrogatepass") if isinstance(text, str) else text
            update(b"%d %d %s" % (index, len(token), token))
        return
    if not isinstance(tokenizer, Iterable):
        raise TypeError(
            "fingerprint: tokenizer must have get_vocab() or be an iterable of bytes and None, "
            f"got {type(tokenizer).__name__}"
        )
    update(b"tokens\0")
    for token in tokenizer:
        if token is not None and not isinstance(token, bytes):
            raise TypeError(
                "fingerprint: tokenizer must hold bytes and None, got an entry of type "
                f"{type(token).__name__}"
            )
        update(b"-" if token is None else b"%d %s" % (len(token), token))


def _hash_model(update: Callable[[bytes], Any], model: Any) -> None:
    state = model.state_dict() if hasattr(model, "state_dict") else model
    if not isinstance(state, Mapping):
        raise TypeError(
            "fingerprint: model must be a module or a state dict, got " + type(model).__name__
        )
    if not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("fingerprint: model must have tensors, got none")
    update(b"model\0")
    for name in sorted(state):
        value = state[name]
        if not isinstance(value, Tensor):  # a module's extra state
            continue
        if value.is_meta:
            raise ValueError(f"fingerprint: model must have values, {name} is on the meta device")
        update(f"{name}\0{tuple(value.shape)}\0{value.dtype}\0".encode())
        if value.numel():
            flat = value.detach().reshape(-1)
            steps = min(64, len(flat))
            places = torch.arange(steps, device=flat.device) * (len(flat) - 1) // max(steps - 1, 1)
            update(flat[places].cpu().view(torch.uint8).numpy().tobytes())
