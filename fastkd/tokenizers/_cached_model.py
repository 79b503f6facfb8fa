"""A causal language model of transformers, with its key-value cache, as ByteStream's callable."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._ops import hints
from fastkd._ops.padding import positive_or_none
from fastkd.tokenizers._byte_stream import shared
from fastkd.tokenizers._byte_vocab import integers

#: Names of the cache in a model's arguments and results, the newer first.
_NAMES = ("cache", "past_key_values")
#: Length of the two texts that show whether a model is causal.
_PROBE = 8
#: Errors of caches that cannot be cut, or not to this length.
_CANNOT = (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError)


def _can_be_cut(cache: Any) -> bool:
    return bool(getattr(cache, "is_croppable", hasattr(cache, "crop")))


def _length(cache: Any, unknown: int) -> int:
    """Number of tokens in a cache, with those of a learned prompt; unknown if it does not say."""
    try:
        return int(cache.get_seq_length())
    except _CANNOT:
        return unknown


class CachedModel:
    """A causal language model that computes only the tokens that its last call did not have.

    ``model(ids)`` are the logits of the token after a text of ids, for any sequence of texts. The
    key-value cache is that of the last text. Of a new text the tokens after the common beginning
    are computed, at least the last one, and the cache is cut to that beginning first. A
    :class:`fastkd.ByteStream` calls it for texts that differ in their last few tokens::

        model = fastkd.tokenizers.CachedModel(AutoModelForCausalLM.from_pretrained(...))
        stream = fastkd.ByteStream(model, vocab, b"The capital of Fran", encode=encode)

    Where the cache cannot be cut (states of a recurrent model; a sliding window that has moved on)
    or has more tokens than the text (PEFT's learned prompts), the text is computed from its
    beginning, and a warning says so once. The logits are the same but for roundings, as sums are
    taken in another order. They have no gradient.

    Args:
        model: a causal language model of transformers (also wrapped by PEFT), in ``eval`` mode,
            in any dtype, on any device: ids go to the device of its token embedding. It is not
            changed. Call :meth:`clear` after changing its weights. When this object is made, the
            model runs on texts of 8 tokens, twice, and once more with derivatives: it must return
            logits over the vocabulary, and those of a token must not depend on later tokens.
        prefix: ids before every text, for example that of a beginning-of-text token. None: the
            ``bos_token_id`` of the model's configuration. ``()``: nothing; an empty text then has
            no logits.
        max_length: the most tokens of prefix and text; None: the configuration's
            ``max_position_embeddings``, if it has that.

    Raises:
        TypeError: the model is no causal language model but one without an output layer
            (``AutoModel``), a classifier, an encoder (BERT) or an encoder-decoder (T5).
            ValueError: it is in training mode, or has no ``bos_token_id`` and no prefix is given.
        A call raises IndexError for an id that the model does not have, and ValueError for a text
        that is too long, or empty without a prefix.

    A copy or a pickle of it has an empty cache. One thread at a time may use it.

    >>> import torch, transformers, fastkd
    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> config = transformers.LlamaConfig(vocab_size=257, intermediate_size=8, **sizes)
    >>> model = transformers.LlamaForCausalLM(config).eval()
    >>> cached = fastkd.tokenizers.CachedModel(model, prefix=256)
    >>> vocab = fastkd.ByteVocab([*(bytes([i]) for i in range(256)), None])
    >>> stream = fastkd.ByteStream(cached, vocab, b"to", max_covers=1)
    >>> stream.push(b"p")
    >>> expected = model(torch.tensor([[256, *b"top"]])).logits[0, -1]
    >>> torch.allclose(cached(list(b"top")), expected, atol=1e-6)
    True
    >>> cached.computed  # the prefix, "t", "o" and "p", each once
    4
    """

    def __init__(
        self,
        model: Any,
        *,
        prefix: int | Sequence[int] | None = None,
        max_length: int | None = None,
    ) -> None:
        get = getattr(model, "get_input_embeddings", None)
        if not isinstance(model, torch.nn.Module) or not callable(get):
            raise TypeError(
                "CachedModel: model must be a causal language model of transformers, got "
                f"{type(model).__name__}"
            )
        config: Any = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise TypeError(
                "CachedModel: model must be a decoder alone, got the encoder-decoder "
                f"{type(model).__name__}"
            )
        if model.training:
            raise ValueError("CachedModel: model must be in eval mode, got one in training mode")
        text = getattr(config, "get_text_config", None)
        config = text() if callable(text) else config
        if prefix is None:
            prefix = getattr(config, "bos_token_id", None)
            if prefix is None:
                raise ValueError(
                    f"CachedModel: prefix must be given, as {type(model).__name__} has no "
                    "bos_token_id; () is none"
                )
        if max_length is None:
            max_length = getattr(config, "max_position_embeddings", None)
        else:
            max_length = positive_or_none("CachedModel", "max_length", max_length)
        self.model: Any = model
        self._prefix: list[int] = []
        self._max_length = max_length
        #: Number of tokens that the model has computed.
        self.computed = 0
        self._warned = False
        base = getattr(model, "get_base_model", None)  # of PEFT
        parameters = inspect.signature((base() if callable(base) else model).forward).parameters
        self._name = next((name for name in _NAMES if name in parameters), None)
        # Logits of the last token alone, where the model can.
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self.clear()
        one = isinstance(prefix, int)
        self._prefix = self._checked("prefix", [prefix] if one else prefix)
        self._check_model()

    def __getstate__(self) -> dict[str, Any]:
        """The state with an empty cache."""
        return {**self.__dict__, "_cache": None, "_seen": []}

    def __copy__(self) -> "CachedModel":
        """Return a copy with an empty cache."""
        other = object.__new__(CachedModel)
        other.__dict__.update(self.__getstate__())
        return other

    def __repr__(self) -> str:
        """The model's class, the prefix, and how much is cached."""
        return (
            f"CachedModel({type(self.model).__name__}, prefix={self._prefix}, "
            f"{len(self._seen)} tokens cached)"
        )

    def clear(self) -> None:
        """Forget the cache: after a change of the model's weights, or to free its memory."""
        self._cache: Any = None
        self._seen: list[int] = []

    def __call__(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Logits of the token after these ids, ``[vocab]``, of the model's dtype and device.

        Args:
            ids: the text's, without the prefix: integers, a sequence or a tensor ``[length]``.
        """
        text = [*self._prefix, *self._checked("ids", ids)]
        if not text:
            raise ValueError("CachedModel: ids must not be empty without a prefix")
        if self._max_length is not None and len(text) > self._max_length:
            raise ValueError(
                f"CachedModel: ids must have at most {self._max_length} tokens with the prefix, "
                f"got {len(text)}"
            )
        if self.model.training:
            raise ValueError("CachedModel: model must be in eval mode, got one in training mode")
        keep = min(shared(text, self._seen), len(text) - 1)
        if self._cache is not None and not self._cut(keep):
            self.clear()
        start = 0 if self._cache is None else keep
        try:
            logits = self._run(text[start:])
        except BaseException:
            self.clear()  # layers may differ in what they have
            raise
        if self._cache is not None and _length(self._cache, len(text)) != len(text):
            self._say(f"the cache of {type(self.model).__name__} has other tokens than the text")
            self.clear()
        self._seen = text if self._cache is not None else []
        return logits

    @torch.no_grad()
    def _check_model(self) -> None:
        """Raise unless the model returns logits of tokens that no later token changes."""
        embedding = self.model.get_input_embeddings().weight
        kind, size = type(self.model).__name__, embedding.size(0)
        length = min(_PROBE, self._max_length or _PROBE)
        # From the middle of the vocabulary: placeholders of images are near its ends.
        ids = (size // 2 + torch.arange(2 * length, device=embedding.device)) % size
        options = {} if self._name is None else {"use_cache": False}
        causal = f"CachedModel: model must be causal, got {kind}, whose logits of a token"
        rows = []
        # Two texts of one length that share their first token.
        for text in (ids[:length], torch.cat([ids[:1], ids[length + 1 :]])):
            found = getattr(self.model(input_ids=text[None], **options), "logits", None)
            if found is None:
                raise TypeError(
                    "CachedModel: model must return logits, as a model of AutoModelForCausalLM "
                    f"does, got {kind}, which returns none"
                )
            head = getattr(self.model, "get_output_embeddings", lambda: None)()
            width = min(size, getattr(head, "weight", embedding).size(0))
            if found.dim() != 3 or found.size(1) < length or found.size(2) < width:
                raise TypeError(
                    "CachedModel: model must return logits over the vocabulary, [1, "
                    f"{length}, {width}] for {length} tokens, got {list(found.shape)} of {kind}"
                )
            rows.append(found[0, -length])  # PEFT may put tokens before the text
        first, second = rows
        # Values of untrained 16-bit weights differ by less than roundings; derivatives show it.
        if self._has_later_derivatives(ids[:length], options):
            raise TypeError(f"{causal} have derivatives by later tokens")
        scale = torch.where(first.isfinite(), first, 0).abs().max().item()
        tolerance = scale * torch.finfo(first.dtype).eps ** 0.5
        if not first.isclose(second, rtol=0, atol=tolerance, equal_nan=True).all():
            raise TypeError(f"{causal} change with later tokens")

    def _has_later_derivatives(self, text: Tensor, options: dict[str, Any]) -> bool:
        """Whether the first token's logits depend on later embeddings; False if unknown.

        In a causal model these derivatives are 0, but for roundings of convolutions by FFT.
        """
        leaves: list[Tensor] = []

        def cut(module: Any, arguments: Any, embedded: Tensor) -> Tensor:
            leaves.append(embedded.detach().requires_grad_())
            return leaves[-1]

        hook = self.model.get_input_embeddings().register_forward_hook(cut)
        try:
            eager = torch.compiler.set_stance("force_eager")
            with torch.inference_mode(False), torch.enable_grad(), eager:
                row = self.model(input_ids=text.clone()[None], **options).logits[0, -len(text)]
                if len(leaves) != 1:
                    return False
                signs = 1 - 2 * (torch.arange(row.numel(), device=row.device) % 2)
                (slopes,) = torch.autograd.grad(row, leaves, signs.to(row.dtype))
        except RuntimeError:  # kernels without derivatives, weights made in inference mode
            return False
        finally:
            hook.remove()
        if slopes.shape[:2] != (1, len(text)):
            return False
        own, later = slopes[0, 0].float(), slopes[0, 1:].float()
        bound = 8 * torch.finfo(torch.float32).eps * own.abs().max()
        return bool((later.abs() > bound).any())

    @torch.no_grad()
    def _run(self, new: list[int]) -> Tensor:
        device = self.model.get_input_embeddings().weight.device
        # Recurrent models continue their state by one token alone: of several they begin anew.
        step = len(new) if self._cache is None or _can_be_cut(self._cache) else 1
        for start in range(0, len(new), step):
            some, options = new[start : start + step], dict(self._options)
            if self._name is not None:
                options["use_cache"] = True
                if self._cache is not None:
                    options[self._name] = self._cache
            found = self.model(input_ids=torch.tensor([some], device=device), **options)
            self.computed += len(some)
            self._cache = getattr(found, self._name, None) if self._name else None
        if self._cache is None:
            self._say(f"{type(self.model).__name__} returns no key-value cache")
        return found.logits[0, -1]

    def _cut(self, length: int) -> bool:
        """Cut the cache to a number of tokens, if it can be."""
        remove = len(self._seen) - length
        if remove == 0:
            return True
        cache = self._cache
        try:
            if not _can_be_cut(cache):
                raise NotImplementedError
            cache.crop(-remove)
            if _length(cache, -1) == length:
                return True
        except _CANNOT:
            pass
        self._say(f"the cache of {type(self.model).__name__} cannot be cut")
        return False

    def _say(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            hints.warn(f"CachedModel: {why}; texts are computed from their beginning")

    def _checked(self, name: str, ids: Any) -> list[int]:
        size = self.model.get_input_embeddings().weight.size(0)
        array = integers(f"CachedModel: {name}", ids)
        if array.ndim != 1:
            raise ValueError(f"CachedModel: {name} must be [length], got shape {list(array.shape)}")
        found: list[int] = array.tolist()
        for one in found:
            if not 0 <= one < size:
                raise IndexError(f"CachedModel: {name} must lie in [0, {size}), got {one}")
        return found
