"""ByteStream: against enumeration of the definition, with and without an encoder."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import smollm2
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastkd
from fastkd import ByteStream, ByteVocab


class Toy:
    """Random logits that depend on all ids before, the same on every call; counts its calls."""

    def __init__(self, vocab, seed=0, scale=2.0, **tensor):
        self.vocab, self.seed, self.scale, self.tensor = vocab, seed, scale, tensor
        self.calls = Counter()

    def __call__(self, ids):
        assert isinstance(ids, list)
        assert not torch.is_grad_enabled()
        self.calls[tuple(ids)] += 1
        return torch.tensor(self.logits(ids), **self.tensor)

    def logits(self, ids):
        generator = np.random.default_rng([self.seed, len(ids), *ids])
        return self.scale * generator.standard_normal(len(self.vocab) + 2)

    def probs(self, ids):
        return torch.tensor(self.logits(ids))[: len(self.vocab)].softmax(-1).tolist()


def inside_character(text):
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


class Definition:
    """The definition, token by token; without `encode` every token sequence is valid."""

    def __init__(self, model, encode=None):
        self.model, self.vocab, self.encode = model, model.vocab, encode

    def valid(self, ids):
        if self.encode is None:
            return True
        text = self.vocab.decode(ids)
        try:
            longer = self.encode(text + b"a")
            return tuple(ids) in (tuple(self.encode(text)), tuple(longer[: len(ids)]))
        except UnicodeDecodeError:
            return inside_character(text) and self.valid(ids[:-1])

    def sequences(self, text):
        """All token sequences that decode to the text, and their probabilities."""
        found = {0: [((), 1.0)]}
        for end in range(1, len(text) + 1):
            found[end] = [
                ((*ids, id), p * self.model.probs(ids)[id])
                for start in range(end)
                for id in self.vocab.find(text[start:end])
                for ids, p in found[start]
            ]
        return found[len(text)]

    def joint(self, text):
        """Unnormalised probabilities of [256 + special classes] after the text."""
        total = np.zeros(256 + len(self.vocab.special_classes))
        for end in range(len(text) + 1):
            rest = text[end:]
            for ids, p in self.sequences(text[:end]):
                if self.valid(ids):
                    for id, q in enumerate(self.model.probs(ids)):
                        token = self.vocab[id]
                        if token is None:
                            total[self.vocab.columns[id] - 1] += 0.0 if rest else p * q
                        elif token.startswith(rest) and token != rest and self.valid((*ids, id)):
                            total[token[len(rest)]] += p * q
        return total

    def next_byte_probs(self, text):
        joint = self.joint(text)
        return torch.tensor(joint / joint.sum())

    def log_prob(self, text, more):
        parts = (self.next_byte_probs(text + more[:i])[more[i]] for i in range(len(more)))
        return sum(math.log(p) if p else -math.inf for p in parts)


def greedy(vocab, *, backwards=False):
    """Longest match from the left: prefixes of encodings are encodings; from the right not."""
    tokens = sorted((t for t in vocab.tokens if t), key=len, reverse=True)

    def encode(text):
        ids = []
        while text:
            end = bytes.endswith if backwards else bytes.startswith
            token = next((t for t in tokens if end(text, t)), None)
            if token is None:
                raise ValueError("no token")
            ids.append(vocab.find(token)[0])
            text = text[: -len(token)] if backwards else text[len(token) :]
        return ids[::-1] if backwards else ids

    return encode


def byte_pairs(vocab):
    """Merge the neighbours whose merge has the lowest id."""

    def encode(text):
        ids = [vocab.find(text[i : i + 1])[0] for i in range(len(text))]
        while True:
            merges = [
                (vocab.find(vocab.decode(ids[i : i + 2]))[:1], i) for i in range(len(ids) - 1)
            ]
            merges = [merge for merge in merges if merge[0]]
            if not merges:
                return ids
            (new,), i = min(merges)
            ids[i : i + 2] = [new]

    return encode


def of_characters(encode):
    """An encoder of text, which does not know halves of characters."""
    return lambda text: encode(text.decode().encode())


def assert_follows(stream, expected, atol=1e-9):
    found = stream.next_byte_log_probs()
    assert found.dtype == torch.float64
    assert found.shape == expected.shape
    assert abs(found.exp().sum().item() - 1) < 1e-12
    torch.testing.assert_close(found.exp(), expected, rtol=1e-8, atol=atol)
    assert (found[expected == 0] == -math.inf).all()


LETTERS = ByteVocab(
    [b"a", b"b", b"ab", b"ba", b"aab", b"b", None, b"bab", b"ca", b"c", b"</s>", b"bb", None],
    special={"eos": [10], "pad": [6, 12]},
)
# Letters of one, two and four bytes; parts of them, one across their border, and the wholes.
CHARACTERS = ByteVocab(
    [
        *(b"a", b"\xc3", b"\xa9", b"\xa8", b"\xf0", b"\x9f", b"\x8e", b"\x89"),
        *("é".encode(), b"\xf0\x9f", b"\x8e\x89", b"a\xc3", b"\xa9a", "🎉".encode()[:3], None),
    ]
)


@pytest.mark.parametrize(
    "encode",
    [greedy(LETTERS), byte_pairs(LETTERS), greedy(LETTERS, backwards=True)],
    ids=["greedy", "byte pairs", "not closed under prefixes"],
)
@pytest.mark.parametrize("tolerance", [0, 1e-9])
def test_valid_encodings_count(encode, tolerance):
    model = Toy(LETTERS)
    right = Definition(model, encode)
    for letters in itertools.islice(itertools.product(b"abc", repeat=5), 0, None, 9):
        text = bytes(letters)
        pushed = ByteStream(model, LETTERS, b"", encode=encode, tolerance=tolerance)
        for i, byte in enumerate(text):
            assert_follows(pushed, right.next_byte_probs(text[:i]))
            if pushed.next_byte_log_probs()[byte] == -math.inf:
                with pytest.raises(ValueError, match=r"ByteStream: byte must be possible"):
                    pushed.push(byte)
                break
            pushed.push(byte)
            prompted = ByteStream(model, LETTERS, pushed.text, encode=encode, tolerance=tolerance)
            assert_follows(prompted, right.next_byte_probs(pushed.text))
            assert [c[:2] for c in prompted.covers] == [c[:2] for c in pushed.covers]


tokens = st.lists(st.binary(min_size=1, max_size=3).map(lambda x: bytes(b"abc"[i % 3] for i in x)))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_vocabularies(data):
    drawn = data.draw(tokens)
    some = [None] * data.draw(st.integers(0, 2))
    vocab = ByteVocab([*drawn, b"a", *some, b"b", b"c"])
    model = Toy(vocab, seed=data.draw(st.integers(0, 99)), dtype=torch.float64)
    encode = data.draw(st.sampled_from([None, greedy(vocab), byte_pairs(vocab)]))
    text = bytes(data.draw(st.lists(st.sampled_from(b"abc"), max_size=5)))
    cut = data.draw(st.integers(0, len(text)))
    right = Definition(model, encode)
    stream = ByteStream(model, vocab, text[:cut], encode=encode, tolerance=0)
    assert_follows(stream, right.next_byte_probs(text[:cut]), 1e-12)
    expected = right.log_prob(text[:cut], text[cut:])
    assert stream.log_prob(text[cut:]) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    stream.push(text[cut:])
    assert_follows(stream, right.next_byte_probs(text), 1e-12)
    assert set(model.calls.values()) == {1}


@pytest.mark.parametrize("encode", [None, byte_pairs(LETTERS)])
def test_log_prob_is_the_chain(encode):
    model = Toy(LETTERS)
    stream = ByteStream(model, LETTERS, b"ab", encode=encode, tolerance=0)
    before = stream.next_byte_log_probs()
    for byte in b"abcz":
        found = stream.log_prob(bytes([byte]))
        assert found == pytest.approx(before[byte].item(), abs=1e-12)
    whole = stream.log_prob(b"abcab")
    assert stream.log_prob(b"") == 0.0
    assert stream.log_prob(b"abzab") == -math.inf
    assert stream.text == b"ab"
    assert torch.equal(stream.next_byte_log_probs(), before)
    other = stream.copy()
    other.push(b"abc")
    assert whole == pytest.approx(stream.log_prob(b"abc") + other.log_prob(b"ab"), abs=1e-12)
    assert (stream.text, other.text) == (b"ab", b"ababc")
    with pytest.raises(ValueError, match="got b'z' after b'ababcab'"):
        other.push(b"abz")
    assert other.text == b"ababc"
    assert set(model.calls.values()) == {1}


def test_covers():
    stream = ByteStream(Toy(LETTERS), LETTERS, b"ab")
    covers = stream.covers
    assert {LETTERS.decode(cover.ids) + cover.remainder for cover in covers} == {b"ab"}
    assert sum(math.exp(cover.log_weight) for cover in covers) == pytest.approx(1)
    assert covers == sorted(covers, key=lambda cover: -cover.log_weight)
    assert {cover.ids for cover in covers if not cover.remainder} == {(0, 1), (0, 5), (2,)}
    assert (0,) in {cover.ids for cover in covers}  # "bab" and "bb" may follow
    assert () not in {cover.ids for cover in covers}  # no token is longer than "ab" and starts so


@pytest.mark.parametrize("encode", [None, greedy(LETTERS)])
def test_max_covers(encode):
    model = Toy(LETTERS, scale=1.0)
    text = b"ababcabbacab"
    options = {"encode": encode, "tolerance": 0}
    exact = ByteStream(model, LETTERS, b"a", **options)
    same = ByteStream(model, LETTERS, b"a", max_covers=10_000, **options)
    exact.push(text)
    same.push(text)
    torch.testing.assert_close(same.next_byte_log_probs(), exact.next_byte_log_probs())
    errors = []
    for kept in (1, 2, 4, 16):
        stream = ByteStream(model, LETTERS, b"a", max_covers=kept, **options)
        for byte in text:
            stream.push(byte)
            probs = stream.next_byte_log_probs().exp()
            assert probs.sum().item() == pytest.approx(1)
            assert len(stream.covers) <= kept + 1
            assert (probs[list(b"abc")] > 0).all() or encode
        errors.append((probs - exact.next_byte_log_probs().exp()).abs().sum().item())
    assert errors[-1] <= min(0.1, errors[0])


def test_max_covers_breaks_ties_by_length_and_ids():
    vocab = ByteVocab([b"a", b"a", b"aa"])
    flat = ByteStream(lambda ids: torch.zeros(3), vocab, b"a", max_covers=2)
    assert [cover[:2] for cover in flat.covers] == [((), b"a"), ((0,), b"")]
    flat = ByteStream(lambda ids: torch.zeros(3), vocab, b"aa", max_covers=2)
    assert [cover[:2] for cover in flat.covers] == [((2,), b""), ((0,), b"a")]


def test_model_calls():
    model = Toy(LETTERS)
    ByteStream(model, LETTERS, b"")
    assert not model.calls
    stream = ByteStream(model, LETTERS, b"abbaabcab", encode=greedy(LETTERS))
    stream.next_byte_log_probs()
    # Only what the last few bytes can be in, and nothing that all of it begins with.
    assert max(model.calls.values()) == 1
    assert len(model.calls) <= 3
    assert min(map(len, model.calls)) >= 3
    stream.push(b"ab")
    stream.log_prob(b"abc")
    stream.push(b"abc")
    assert max(model.calls.values()) == 1
    assert len(model.calls) <= 10


def test_answers_are_forgotten(monkeypatch):
    monkeypatch.setattr("fastkd.tokenizers._byte_stream._CACHE_BYTES", 0)  # 16 answers
    model = Toy(LETTERS)
    stream = ByteStream(model, LETTERS, b"ababba")
    assert_follows(stream, Definition(model).next_byte_probs(b"ababba"), 1e-12)
    assert len(model.calls) > 16 == len(stream._model._nodes)


def test_prompt_that_ends_inside_a_token():
    """After "city of Par" a model that only saw encodings puts "is" into " Paris", never after."""
    vocab = ByteVocab([b"city", b" of", b" Par", b" Paris", b"is", b"\xc3", b"\xad", b"s", b"."])
    names = {name: vocab.find(name)[0] for name in vocab.tokens}

    def next_token_logits(ids):
        text = vocab.decode(ids)
        after = {b"city": {b" of": 1.0}, b"city of": {b" Paris": 0.9, b" Par": 0.1}}
        after[b"city of Par"] = {b"\xc3": 0.99, b".": 0.01}  # "í"
        logits = torch.full((len(vocab),), -math.inf)
        for name, p in after.get(text, {b"city": 1.0} if not text else {b".": 1.0}).items():
            logits[names[name]] = math.log(p)
        return logits

    naive = next_token_logits([names[b"city"], names[b" of"], names[b" Par"]]).exp()
    assert naive[names[b"is"]] == 0
    assert naive[names[b"\xc3"]] == pytest.approx(0.99)
    for encode in (None, greedy(vocab)):
        probs = ByteStream(next_token_logits, vocab, b"city of Par", encode=encode)
        probs = probs.next_byte_log_probs().exp()
        assert probs[ord("i")].item() == pytest.approx(0.9, rel=1e-6)
        assert probs[0xC3].item() == pytest.approx(0.099, rel=1e-6)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("text", [*"aé🎉", "éa", "aé🎉", "🎉🎉", "éé"])
@pytest.mark.parametrize("make", [greedy, byte_pairs])
def test_characters_of_several_tokens(make, text, strict):
    model = Toy(CHARACTERS)
    encode = of_characters(make(CHARACTERS))
    right = Definition(model, encode)
    if not strict:  # what is inside a character comes back as other bytes
        encode = lambda x: make(CHARACTERS)(x.decode(errors="ignore").encode())  # noqa: E731
    text = text.encode()
    pushed = ByteStream(model, CHARACTERS, b"", encode=encode, tolerance=0)
    for i in range(len(text) + 1):
        expected = right.next_byte_probs(text[:i])
        assert_follows(pushed, expected, 1e-12)
        assert_follows(ByteStream(model, CHARACTERS, text[:i], encode=encode), expected)
        if i < len(text):
            pushed.push(text[i])
    assert pushed.log_prob("aé".encode()) > -math.inf


def test_bytes_that_are_no_text():
    model = Toy(CHARACTERS)
    stream = ByteStream(model, CHARACTERS, b"a", encode=of_characters(greedy(CHARACTERS)))
    probs = stream.next_byte_log_probs().exp()
    assert probs[0xF0] > probs[0x9F] == 0  # the middle of a character, where one has to begin
    with pytest.raises(ValueError, match=r"got b'\\x9f' after b'a'"):
        stream.push(0x9F)
    assert stream.log_prob(b"\xc3a") == -math.inf


def test_byte_level_tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the city of\n\n\nParis, über été 🎉🎊 語 語る " * 9], trainer)
    vocab = ByteVocab.from_tokenizer(tokenizer)
    asked = Counter()

    def encode(text):
        asked[text] += 1
        return tokenizer.encode(text.decode()).ids

    model = Toy(vocab, scale=3.0)
    right = Definition(model, encode)
    assert encode(b"a\n\nc")[:2] != encode(b"a\n\n")  # the encoder looks ahead
    for text in ("a c", "🎉", "it's", "a\n\nc"):
        stream = ByteStream(model, vocab, b"", encode=encode, tolerance=0)
        for byte in text.encode():
            stream.push(byte)
            assert_follows(stream, right.next_byte_probs(stream.text), 1e-12)
    asked.clear()
    stream = ByteStream(model, vocab, b"the ci", encode=encode, tolerance=0)
    exact, all_asked = stream.next_byte_log_probs(), asked.total()
    for tolerance in (1e-9, 1e-2):
        asked.clear()
        stream = ByteStream(model, vocab, b"the ci", encode=encode, tolerance=tolerance)
        found = stream.next_byte_log_probs()
        assert (found.exp() - exact.exp()).abs().max() <= 2 * tolerance
    assert asked.total() < all_asked / 3


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_what_encode_may_return(kind):
    vocab = ByteVocab([b"a", b"b", b"ab", None], special={"bos": [3]})
    plain, model = greedy(vocab), Toy(vocab)
    stream = ByteStream(model, vocab, b"", encode=lambda x: kind([3, *plain(x)]), tolerance=0)
    stream.push(b"ab")
    assert {cover.ids for cover in stream.covers} == {(3, 2)}  # one without bytes in front
    assert all(ids[0] == 3 for ids in model.calls)


def test_impossible_tokens():
    vocab = ByteVocab([b"a", b"b", b"ab"])
    model = lambda ids: torch.tensor([0.0, -math.inf, -math.inf])  # noqa: E731
    for encode in (None, greedy(vocab)):
        stream = ByteStream(model, vocab, b"aa", encode=encode)
        expected = torch.full((256,), -math.inf, dtype=torch.float64)
        expected[ord("a")] = 0.0
        assert torch.equal(stream.next_byte_log_probs(), expected)
        assert stream.log_prob(b"b") == -math.inf
        with pytest.raises(ValueError, match="got b'b' after b'aa'"):
            stream.push(b"ab"[1])
    with pytest.raises(ValueError, match="got b'b' after b'a'"):
        ByteStream(model, vocab, b"ab")
    with pytest.raises(ValueError, match="prompt must be possible, got b'c'"):
        ByteStream(model, vocab, b"c", encode=greedy(vocab))
    lone = ByteVocab([b"\xc3"])
    stream = ByteStream(Toy(lone), lone, b"\xc3", encode=of_characters(greedy(lone)))
    with pytest.raises(ValueError, match=r"must have an encoding that goes on, got b'\\xc3'"):
        stream.next_byte_log_probs()


@pytest.mark.parametrize("prompt", [b"", b"a"])
def test_encoders_that_do_not_round_trip(prompt):
    vocab = ByteVocab([b"a", b" a", b" ", None], special={"eos": [3]})
    for encode in (lambda text: greedy(vocab)(b" " + text) if text else [], lambda text: [0] * 3):
        with pytest.raises(ValueError, match="encode must return ids that decode to the text, got"):
            ByteStream(Toy(vocab), vocab, prompt, encode=encode).next_byte_log_probs()


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("next_token_logits", 3, TypeError, "next_token_logits must be callable, got int"),
        ("vocab", [b"a"], TypeError, "vocab must be a fastkd.ByteVocab, got list"),
        ("prompt", "a", TypeError, "prompt must be bytes, got str"),
        ("encode", 3, TypeError, "encode must be callable or None, got int"),
        ("max_covers", 2.0, TypeError, "max_covers must be an integer, got float"),
        ("max_covers", 0, ValueError, "max_covers must be 1 or more, got 0"),
        ("tolerance", "1", TypeError, "tolerance must be a number, got str"),
        ("tolerance", 1.0, ValueError, r"tolerance must lie in \[0, 1\), got 1.0"),
        ("next_token_logits", len, TypeError, "floating-point logits, got int"),
        ("next_token_logits", lambda _: torch.arange(2), TypeError, "got torch.int64"),
        ("next_token_logits", lambda _: torch.zeros(1, 9), ValueError, r"wider, got \[1, 9\]"),
        ("next_token_logits", lambda _: torch.zeros(1), ValueError, r"\[2\] or wider, got \[1\]"),
        ("next_token_logits", lambda _: torch.zeros(2) / 0, ValueError, "a distribution, got NaN"),
        ("encode", lambda _: ["a"], TypeError, "what encode returns must hold integers"),
        ("encode", lambda _: [5], ValueError, r"encode must return ids < 2, got \[5\]"),
    ],
)
def test_errors(name, value, error, message):
    arguments = {"next_token_logits": lambda _: torch.zeros(2), "prompt": b"aa"}
    arguments["vocab"] = ByteVocab([b"a", b"b"])
    with pytest.raises(error, match=f"ByteStream: .*{message}"):
        ByteStream(**{**arguments, name: value}).next_byte_log_probs()


def test_errors_of_methods():
    stream = ByteStream(lambda ids: torch.zeros(2), ByteVocab([b"a", b"b"]), b"")
    for value, error in ((256, ValueError), (-1, ValueError), ("a", TypeError), (1.5, TypeError)):
        with pytest.raises(error, match=r"ByteStream.push: byte must be an integer in \[0, 255\]"):
            stream.push(value)
    with pytest.raises(TypeError, match=r"ByteStream.log_prob: text must be bytes, got str"):
        stream.log_prob("a")


@pytest.mark.slow
def test_a_real_model():
    tokenizer, model = smollm2.load()

    def next_token_logits(ids):
        return model(torch.tensor([[0, *ids]])).logits[0, -1]

    def encode(text):
        return tokenizer.backend_tokenizer.encode(text.decode(), add_special_tokens=False).ids

    vocab = ByteVocab.from_tokenizer(tokenizer)
    prompt = b"They live in France, in the city of Par"
    naive = fastkd.byte_log_probs(next_token_logits(encode(prompt)).detach(), vocab)
    assert naive[0xC3] > naive[ord("i")]
    stream = ByteStream(next_token_logits, vocab, prompt, encode=encode, tolerance=1e-4)
    probs = stream.next_byte_log_probs().exp()
    assert probs.sum().item() == pytest.approx(1, abs=1e-12)
    assert probs[ord("i")] > 0.98 > 0.01 > probs[0xC3]
    few = ByteStream(next_token_logits, vocab, prompt, max_covers=3).next_byte_log_probs().exp()
    assert (few - probs).abs().sum() < 0.02
    text = "is.\n\nIl fait été".encode()
    tokens, first = encode(prompt + text), len(encode(prompt)) - 1
    scores = model(torch.tensor([[0, *tokens]])).logits[0].double().log_softmax(-1)
    one_way = sum(scores[i, tokens[i]].item() for i in range(first, len(tokens)))
    assert one_way < stream.log_prob(text) < 0
