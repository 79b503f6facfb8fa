"""The distribution of the next byte under a language model of tokens, over all tokenisations."""

import codecs
import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastkd._ops.padding import positive_or_none
from fastkd.tokenizers._byte_log_probs import byte_log_probs
from fastkd.tokenizers._byte_vocab import ByteVocab, integers

#: Largest memory of a model's cached results, in bytes.
_CACHE_BYTES = 1 << 28
_UNASKED, _VALID, _INVALID = 0, 1, 2

Ids = tuple[int, ...]


def _log_sum_exp(scores: np.ndarray) -> float:
    top = scores.max(initial=-math.inf)
    return float(top + np.log(np.exp(scores - top).sum())) if top > -math.inf else -math.inf


def _unfinished(text: bytes) -> int | None:
    """Length of an incomplete UTF-8 character at the text's end; None: not UTF-8 before it."""
    try:
        return len(text) - codecs.utf_8_decode(text, "strict", False)[1]
    except UnicodeDecodeError:
        return None


def _shown(text: bytes) -> str:
    return repr(text) if len(text) <= 40 else f"...{text[-40:]!r}"


def shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix."""
    return sum(1 for _ in takewhile(lambda x: x[0] == x[1], zip(first, second, strict=False)))


@dataclass(slots=True)
class _Node:
    """The token after some ids: log-probabilities, float64 [vocab], verdicts, uint8 [vocab]."""

    log_probs: np.ndarray
    verdicts: np.ndarray


class _Model:
    """The user's callables, with a cache of their last results."""

    def __init__(self, next_token_logits: Any, vocab: ByteVocab, encode: Any) -> None:
        self.next_token_logits, self.vocab, self.encode = next_token_logits, vocab, encode
        self.probe = b"a" if vocab.find(b"a") else next((x for x in vocab.tokens if x), b"")
        self._nodes: OrderedDict[Ids, _Node] = OrderedDict()

    def node(self, ids: Ids) -> _Node:
        """The model's result for these ids, from the cache if it is there."""
        node = self._nodes.pop(ids, None)
        if node is None:
            node = _Node(self._log_probs(ids), np.zeros(len(self.vocab), dtype=np.uint8))
        self._nodes[ids] = node
        if len(self._nodes) > max(16, _CACHE_BYTES // (9 * len(self.vocab) + 1024)):
            self._nodes.popitem(last=False)
        return node

    def _log_probs(self, ids: Ids) -> np.ndarray:
        with torch.no_grad():
            logits = self.next_token_logits(list(ids))
        size, where = len(self.vocab), "ByteStream: next_token_logits must return"
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            kind = getattr(logits, "dtype", type(logits).__name__)
            raise TypeError(f"{where} a tensor of floating-point logits, got {kind}")
        if logits.dim() != 1 or len(logits) < size:
            raise ValueError(f"{where} shape [{size}] or wider, got {list(logits.shape)}")
        log_probs = logits.detach()[:size].to("cpu", torch.float64).log_softmax(-1)
        if log_probs.isnan().any():
            raise ValueError(f"{where} a distribution, got NaN, +inf or only -inf")
        return log_probs.numpy()

    def relative_log_probs(self, sequences: list[Ids]) -> list[float]:
        """log P of token sequences, given their common prefix."""
        same = min((shared(sequences[0], ids) for ids in sequences), default=0)
        return [
            sum(float(self.node(ids[:i]).log_probs[ids[i]]) for i in range(same, len(ids)))
            for ids in sequences
        ]

    def _encoded(self, text: bytes) -> Ids | None:
        try:
            found = self.encode(text)
        except ValueError:
            return None
        if not isinstance(found, (list, tuple)):
            found = np.atleast_1d(integers("ByteStream: what encode returns", found)).tolist()
        return tuple(found)

    def _decoded(self, ids: Ids) -> bytes:
        try:
            return self.vocab.decode(integers("ByteStream: what encode returns", ids))
        except IndexError:
            size, last = len(self.vocab), list(ids[-8:])
            raise ValueError(f"ByteStream: encode must return ids < {size}, got {last}") from None

    def beginnings(self, text: bytes) -> list[Ids]:
        """The token sequences that decode to a text and are a prefix of a valid encoding."""
        found: list[Ids] = []
        for more in (b"", self.probe):
            ids = self._encoded(text + more)
            decoded = None if ids is None else self._decoded(ids)
            if ids is not None and decoded == text + more:
                size, rest = len(ids), len(more)
                while rest > 0:
                    size -= 1
                    rest -= len(self.vocab.tokens[ids[size]] or b"")
                if rest == 0 and ids[:size] not in found:
                    found.append(tuple(map(int, ids[:size])))
            elif decoded is not None and not more and _unfinished(text) == 0:
                raise ValueError(
                    "ByteStream: encode must return ids that decode to the text, got ids of "
                    f"{_shown(decoded)} for {_shown(text)}"
                )
        return found

    def is_valid(self, ids: Ids, text: bytes) -> bool:
        """Whether ids that decode to a text begin a valid encoding, or this cannot be checked."""
        found = self._encoded(text)
        if found == ids:
            return True
        if _unfinished(text):
            return found is None or self._decoded(found) != text
        longer = self._encoded(text + self.probe) or ()
        return longer[: len(ids)] == ids and self._decoded(longer) == text + self.probe


@dataclass(slots=True)
class _Cover:
    """Tokens T, the first `end` bytes of a text, and log P(T) up to a constant of the stream."""

    ids: Ids
    end: int
    log_prob: float
    node: Any = None


@dataclass(slots=True)
class _Part:
    """The next tokens v of a cover T that start with the remainder, the text after T."""

    cover: _Cover
    #: The tokens v; the first `equal` ones end where the text does.
    ids: np.ndarray
    equal: int
    #: log P(T v), -inf for invalid v; `special`: of all special ids, which follow a whole text.
    scores: np.ndarray
    special: float

    @property
    def mass(self) -> float:
        """log P(T) M_T(remainder)."""
        return float(np.logaddexp(_log_sum_exp(self.scores), self.special))

    @property
    def ahead(self) -> float:
        """The part of `mass` that continues after the text."""
        return float(np.logaddexp(_log_sum_exp(self.scores[self.equal :]), self.special))


class Cover(NamedTuple):
    """Tokens of the text's beginning, and the bytes that the next token must start with."""

    ids: Ids
    #: The text's end, inside the next token; ``b""`` if the tokens are the whole text.
    remainder: bytes
    #: Log of this cover's share of the probability of all continuations of the text.
    log_weight: float


class ByteStream:
    r"""A tokenised language model as a model of bytes: a sum over the tokenisations of a text.

    For a prompt that ends inside a token ("the city of Par", where the vocabulary has " Paris"), a
    model gives wrong predictions from the prompt's tokens. A sum over tokenisations is right. The
    covers of a text x are the token sequences :math:`t_1 \ldots t_k` that decode to x or more, and
    without the last token to less:

    .. math:: P(x) = \sum_{t \in \text{cover}(x)} \prod_i p(t_i \mid t_{<i}), \qquad
              P(b \mid x) = P(x b) / P(x)

    and for a class c of special ids (end of text, for example), which has no bytes,
    :math:`P(c \mid x) = \sum_{\text{decode}(t) = x} P(t) \, p(c \mid t) / P(x)`.

    **Which tokenisations.** Without ``encode`` all token sequences are used: exact, with a model
    call for each (exponential in the text's length), or the ``max_covers`` likeliest. With
    ``encode`` only prefixes of an encoding are valid, as in the training data of models: about one
    model call a byte. t is valid if :math:`\text{encode}(\text{decode}(t) + s)` begins with t, for
    s empty or "a" (another token if "a" is none): encoders that look ahead split a blank line
    differently if text follows. Other sequences are left out, and the result is normalised.

    **Cost of encode.** For each cover it checks once which tokens may follow, the likeliest first,
    until the rest has less than ``tolerance`` of the probability of all continuations; the rest is
    treated as valid. Vocabularies have long tails: 1e-9 checks nearly every token, 1e-4 one in six
    of SmolLM2's. ``encode`` gets the whole text, and may cache the ids of the text before a
    position where its tokenizer always splits.

    **Inside a character.** Where the text ends inside a UTF-8 character and ``encode`` raises
    ValueError (as UnicodeDecodeError is) or returns other bytes, tokens cannot be checked: all
    continuations of the valid tokens are used until the character is complete. So a prompt may end
    anywhere. Covers of whole characters are exact; inside one, useless partial tokens count too.

    Args:
        next_token_logits: from a list of ids, ``[]`` for no text (it may prepend a token for the
            beginning), to ``[width]`` logits of the next one, any dtype and device; columns from
            ``len(vocab)`` on are ignored. Called without gradients. The last results are cached,
            up to 256 MiB. Covers share all but their last tokens: for a model of transformers use
            :class:`fastkd.tokenizers.CachedModel`, which computes only the others.
        vocab: see :class:`fastkd.ByteVocab`.
        prompt: bytes that the text begins with. Without ``encode`` they cost as much as pushing
            them, with it a few model calls.
        encode: bytes to ids that decode to the same bytes. Ids without bytes may precede them.
        max_covers: number of covers kept after each byte, those of the largest share of the
            continuations (of equal ones the one whose tokens end first, then by ids), and the
            likeliest that ends with the text if none of them does, so that the text can go on. With
            ``encode``, a byte that only dropped covers give is -inf, but can be pushed. None: all.
        tolerance: see above; 0 checks every token.

    Raises:
        TypeError: an argument, or what a callable returns, has the wrong type. ValueError: it has
            the wrong value or shape; the prompt is impossible; ``encode`` does not round-trip.

    Source: Phan et al. 2024 (arXiv 2410.09303).

    >>> import math, torch, fastkd
    >>> vocab = fastkd.ByteVocab([b"P", b"ar", b"Par", b"Paris", b"is", None], special={"eos": [5]})
    >>> def next_token_logits(ids):  # "Paris" is one token; after "Par" comes "ar", never "is"
    ...     probs = [0.0, 0.8, 0.0, 0.0, 0.0, 0.2] if ids else [0.0, 0.0, 0.1, 0.9, 0.0, 0.0]
    ...     return torch.tensor(probs).log()
    >>> stream = fastkd.ByteStream(next_token_logits, vocab, b"Par")
    >>> probs = stream.next_byte_log_probs().exp()
    >>> round(probs[ord("i")].item(), 4), round(probs[ord("a")].item(), 4), len(probs)
    (0.9, 0.08, 257)
    >>> round(math.exp(stream.log_prob(b"is")), 4)
    0.9
    >>> stream.push(b"i")
    """

    def __init__(
        self,
        next_token_logits: Callable[[list[int]], Tensor],
        vocab: ByteVocab,
        prompt: bytes,
        *,
        encode: Callable[[bytes], Sequence[int]] | None = None,
        max_covers: int | None = None,
        tolerance: float = 1e-9,
    ) -> None:
        for name, value, fits, wanted in (
            ("next_token_logits", next_token_logits, callable(next_token_logits), "callable"),
            ("vocab", vocab, isinstance(vocab, ByteVocab), "a fastkd.ByteVocab"),
            ("prompt", prompt, isinstance(prompt, bytes), "bytes"),
            ("encode", encode, encode is None or callable(encode), "callable or None"),
            ("tolerance", tolerance, isinstance(tolerance, int | float | np.number), "a number"),
        ):
            if not fits:
                raise TypeError(f"ByteStream: {name} must be {wanted}, got {type(value).__name__}")
        max_covers = positive_or_none("ByteStream", "max_covers", max_covers)
        if not 0 <= tolerance < 1:
            raise ValueError(f"ByteStream: tolerance must lie in [0, 1), got {tolerance}")
        self._model = _Model(next_token_logits, vocab, encode)
        self._max_covers, self._tolerance = max_covers, tolerance
        self._text, self._covers = b"", [_Cover((), 0, 0.0)]
        if encode is None:
            self.push(prompt)
        elif not self._begin(prompt):
            raise ValueError(f"ByteStream: prompt must be possible, got {_shown(prompt)}")

    @property
    def text(self) -> bytes:
        """Prompt and pushed bytes."""
        return self._text

    @property
    def covers(self) -> list[Cover]:
        """The covers of the text, the likeliest first."""
        parts = self._parts(self._text, self._covers)
        total = _log_sum_exp(np.array([part.ahead for part in parts]))
        found = [Cover(x.cover.ids, self._text[x.cover.end :], x.ahead - total) for x in parts]
        alive = [x for x in found if x.log_weight > -math.inf]
        return sorted(alive, key=lambda x: (-x.log_weight, -len(x.remainder), x.ids))

    def copy(self) -> "ByteStream":
        """Return an independent stream with the same text; the cache of model results is shared."""
        return copy.copy(self)

    def next_byte_log_probs(self) -> Tensor:
        """Log-probabilities of the next byte or special class, ``-inf`` where impossible.

        Returns:
            float64 ``[256 + special classes]`` on the CPU: each next byte, then each class of
            ``vocab.special_classes``; their probabilities sum to 1.

        Raises:
            ValueError: nothing can follow (only with ``encode``).
        """
        parts = self._parts(self._text, self._covers)
        parts = [part for part in parts if part.ahead > -math.inf]
        if not parts:
            raise ValueError(
                f"ByteStream: the text must have an encoding that goes on, got {_shown(self._text)}"
            )
        valid = None
        if self._model.encode is not None:
            valid = torch.from_numpy(
                np.stack([part.cover.node.verdicts != _INVALID for part in parts])
            )
        rows = byte_log_probs(
            torch.from_numpy(np.stack([part.cover.node.log_probs for part in parts])),
            self._model.vocab,
            prefix=[self._text[part.cover.end :] for part in parts],
            valid=valid,
        )
        # Rows are conditional on a next token that starts with the remainder: P(T) M_T(remainder).
        joint = rows + torch.from_numpy(np.array([[part.mass] for part in parts]))
        follows = torch.cat((joint[:, :256], joint[:, 257:]), 1).logsumexp(0)
        return follows - follows.logsumexp(0)

    def push(self, byte: int | bytes) -> None:
        """Append a byte, or any number of them.

        Raises:
            ValueError: a byte is impossible; the stream is unchanged. TypeError: no byte or bytes.
        """
        try:
            data = byte if isinstance(byte, bytes) else bytes([byte])
        except (TypeError, ValueError) as error:
            kinds = "an integer in [0, 255] or bytes"
            raise type(error)(f"ByteStream.push: byte must be {kinds}, got {byte!r}") from None
        stream, dropped = self.copy(), self._max_covers is not None and self._model.encode
        for number in data:
            text, one = stream._text, bytes([number])
            if stream._step(number) == -math.inf and not (dropped and stream._begin(text + one)):
                message = f"ByteStream: byte must be possible, got {one!r} after {_shown(text)}"
                raise ValueError(message)
        self._text, self._covers = stream._text, stream._covers

    def log_prob(self, text: bytes) -> float:
        """Log-probability that these bytes come next, one after the other.

        ``-inf`` if impossible, 0 for ``b""``; the stream is unchanged. With ``encode`` the relative
        error of each byte is within ``tolerance``, in :meth:`next_byte_log_probs` the absolute one.

        Raises:
            TypeError: not bytes.
        """
        if not isinstance(text, bytes):
            raise TypeError(f"ByteStream.log_prob: text must be bytes, got {type(text).__name__}")
        stream, found = self.copy(), 0.0
        for byte in text:
            parts = stream._parts(stream._text, stream._covers)
            total = _log_sum_exp(np.array([part.ahead for part in parts]))
            joint = stream._step(byte)
            if joint == -math.inf:
                return joint
            found += min(0.0, joint - total)
        return found

    def _begin(self, prompt: bytes) -> bool:
        """Set the text to a prompt with its valid covers, if there are any."""
        model, vocab = self._model, self._model.vocab
        longest = max((len(token) for token in vocab.tokens if token), default=0)
        known: dict[int, list[Ids]] = {}

        def into(end: int) -> list[Ids]:
            """Tokens for prompt[:end]; inside a character all that continue valid ones before."""
            if end not in known:
                text = prompt[:end]
                known[end] = model.beginnings(text)
                if not known[end] and _unfinished(text):
                    known[end] = [
                        (*ids, id)
                        for start in range(max(0, end - longest), end)
                        for id in vocab.find(text[start:])
                        for ids in into(start)
                    ]
            return known[end]

        def reaching(end: int) -> list[Ids]:
            """Those with a valid next token; up to 64 checks are cheaper than a model call."""
            some = vocab.order[slice(*vocab.interval(prompt[end:]))].tolist()
            if end == len(prompt) or len(some) > 64:
                return into(end)
            texts = [(id, prompt[:end] + (vocab.tokens[id] or b"")) for id in some]
            asked = into(end) if some else []
            return [x for x in asked if any(model.is_valid((*x, id), text) for id, text in texts)]

        ends = range(max(0, len(prompt) - longest), len(prompt) + 1)
        found = [(ids, end) for end in ends for ids in reaching(end)]
        weights = model.relative_log_probs([ids for ids, _ in found])
        covers = [_Cover(*one, weight) for one, weight in zip(found, weights, strict=True)]
        before = [x for x in covers if x.end < len(prompt) and x.log_prob > -math.inf]
        whole = [x for x in covers if x.end == len(prompt)]
        return self._keep(prompt, self._parts(prompt, before), whole)

    def _step(self, byte: int) -> float:
        """Append a byte and return log P(text), or -inf and change nothing."""
        text = self._text + bytes([byte])
        parts = self._parts(text, self._covers)
        joint = _log_sum_exp(np.array([part.mass for part in parts]))
        possible = joint > -math.inf and self._model.encode is not None
        whole = []
        for ids in self._model.beginnings(text) if possible else ():
            near = max(self._covers, key=lambda cover: shared(cover.ids, ids))
            old, new = self._model.relative_log_probs([near.ids, ids])
            if old == -math.inf:  # All covers have -inf then: their common prefix is impossible.
                parts, old = [], near.log_prob
            whole.append(_Cover(ids, len(text), near.log_prob + new - old))
        if not whole and (self._model.encode is None or _unfinished(text)):
            whole = [
                _Cover((*part.cover.ids, id), len(text), score)
                for part in parts
                for id, score in zip(part.ids[: part.equal].tolist(), part.scores, strict=False)
            ]
        return joint if self._keep(text, parts, whole) else -math.inf

    def _keep(self, text: bytes, parts: list[_Part], whole: list[_Cover]) -> bool:
        """Set the text and the likeliest of its covers, if any is possible."""
        shares = [(part.ahead, part.cover) for part in parts]
        shares += [(cover.log_prob, cover) for cover in whole]
        alive = sorted((-share, x.end, x.ids, x) for share, x in shares if share > -math.inf)
        survivors = alive[: self._max_covers]
        if all(one[1] < len(text) for one in survivors):
            survivors += [one for one in alive if one[1] == len(text)][:1]
        if survivors:
            self._text, self._covers = text, [one[3] for one in survivors]
        return bool(survivors)

    def _parts(self, text: bytes, covers: list[_Cover]) -> list[_Part]:
        """The possible next tokens of each cover, given the text."""
        vocab, parts = self._model.vocab, []
        for cover in covers:
            node = cover.node = cover.node or self._model.node(cover.ids)
            remainder = text[cover.end :]
            begin, end = vocab.interval(remainder)
            ids, others = vocab.order[begin:end], vocab.order[len(vocab) if remainder else end :]
            scores = cover.log_prob + node.log_probs[ids]
            special = cover.log_prob + _log_sum_exp(node.log_probs[others])
            parts.append(_Part(cover, ids, len(vocab.find(remainder)), scores, special))
        if self._model.encode is not None and parts:
            self._check(text, parts)
        return parts

    def _check(self, text: bytes, parts: list[_Part]) -> None:
        """Check which tokens are valid, the likeliest first; set scores of invalid ones to -inf."""
        model, unasked, valid, special = self._model, [], -math.inf, -math.inf
        for part in parts:
            verdicts = part.cover.node.verdicts[part.ids]
            part.scores[verdicts == _INVALID] = -math.inf
            special = np.logaddexp(special, part.special)
            valid = np.logaddexp(valid, _log_sum_exp(part.scores[verdicts == _VALID]))
            unasked.append(np.flatnonzero((verdicts == _UNASKED) & (part.scores > -math.inf)))
        owners = np.repeat(np.arange(len(parts)), [len(at) for at in unasked])
        places = np.concatenate(unasked)
        scores = np.concatenate([part.scores[at] for part, at in zip(parts, unasked, strict=True)])
        likeliest = np.argsort(-scores, kind="stable")
        left = np.logaddexp.accumulate(scores[likeliest][::-1])[::-1]
        allowed, refused = math.log(self._tolerance) if self._tolerance else -math.inf, b""
        for index, rest in zip(likeliest.tolist(), left.tolist(), strict=True):
            if rest <= allowed + np.logaddexp(valid, special):
                break
            part, id = parts[owners[index]], int(parts[owners[index]].ids[places[index]])
            whole = text[: part.cover.end] + (model.vocab.tokens[id] or b"")
            if model.is_valid((*part.cover.ids, id), whole):
                valid = np.logaddexp(valid, scores[index])
                part.cover.node.verdicts[id] = _VALID
            else:
                refused = refused or whole
                part.scores[places[index]] = -math.inf
                part.cover.node.verdicts[id] = _INVALID
        if refused and valid == -math.inf:
            model.beginnings(refused)  # Raises if the encoder does not round-trip.
