"""AlmCollator: batches of texts for recipes.alm, against align_batch and by hand."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
import vocabularies
from torch.utils.data import DataLoader

import fastkd
from fastkd import ByteVocab, align_batch, recipes
from fastkd.tokenizers import AlmCollator

BYTES = ByteVocab([*(bytes([i]) for i in range(256)), None], special={"bos": [256]})
PAIRS = ByteVocab([bytes([i // 256, i % 256]) for i in range(1 << 16)] + [b"e", b"!", b"d"])
TEXTS = ["the cat", "a", "", "été, here!", "four score and seven"]


def by_bytes(text):
    return list(text.encode())


def by_pairs(text):
    data = text.encode()
    last = {b"e": 1 << 16, b"!": (1 << 16) + 1, b"d": (1 << 16) + 2}
    pairs = [data[i] * 256 + data[i + 1] for i in range(0, len(data) - 1, 2)]
    return pairs + [last[x] for x in [data[len(data) & ~1 :]] if x in last]


def made(**options):
    return AlmCollator(by_bytes, by_pairs, student_vocab=BYTES, teacher_vocab=PAIRS, **options)


def unpadded(batch, side):
    rows = zip(batch[f"{side}_ids"], batch[f"{side}_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("multiple", [None, 8])
def test_batches(padding_side, multiple):
    batch = made(padding_side=padding_side, pad_to_multiple_of=multiple)(TEXTS)
    assert unpadded(batch, "student") == [by_bytes(text) for text in TEXTS]
    assert unpadded(batch, "teacher") == [by_pairs(text) for text in TEXTS]
    expected = align_batch(*(unpadded(batch, x) for x in ("student", "teacher")), BYTES, PAIRS)
    assert batch["num_chunks"] == expected.num_chunks
    for side, chunks in (
        ("student", expected.student_chunks),
        ("teacher", expected.teacher_chunks),
    ):
        ids, mask = batch[f"{side}_ids"], batch[f"{side}_mask"]
        assert (ids.dtype, mask.dtype) == (torch.int64, torch.int64)
        assert batch[f"{side}_chunks"].dtype == torch.int32
        assert ids.shape == mask.shape == batch[f"{side}_chunks"].shape
        assert ids.size(1) % (multiple or 1) == 0
        assert (batch[f"{side}_chunks"][mask == 0] == -1).all()
        for found, row, some in zip(batch[f"{side}_chunks"], chunks, mask, strict=True):
            assert found[some.bool()].tolist() == row[: some.sum()].tolist()
        steps = mask.diff(dim=1)
        assert (steps <= 0).all() if padding_side == "right" else (steps >= 0).all()


def test_max_length():
    batch = made(max_length=(5, 3))(TEXTS)
    assert batch["student_ids"].shape == (5, 5)
    assert batch["teacher_ids"].shape == (5, 3)
    assert unpadded(batch, "student") == [by_bytes(text)[:5] for text in TEXTS]
    # 5 bytes, and 3 pairs: the third pair is not whole on the student's side.
    assert batch["teacher_chunks"][4].tolist() == [0, 1, -1]
    assert made(max_length=4)(TEXTS)["student_ids"].shape == (5, 4)


def test_dictionaries_and_columns():
    expected = made()(TEXTS)
    for key, options in (("text", {}), ("content", {"column": "content"})):
        found = made(**options)([{key: text, "id": 3} for text in TEXTS])
        assert all(np.array_equal(found[x], expected[x]) for x in expected)


def alm(batch, seed=0, **given):
    random = torch.Generator().manual_seed(seed)
    widths = {"student": len(BYTES), "teacher": len(PAIRS)}
    logits = {
        f"{side}_logits": torch.randn(*batch[f"{side}_ids"].shape, width, generator=random)
        for side, width in widths.items()
    }
    logits["student_logits"].requires_grad_()
    return recipes.alm(student_vocab=BYTES, teacher_vocab=PAIRS, **logits, **batch, **given)


def test_a_batch_goes_into_the_recipe():
    loss = alm(made()(TEXTS), reduction="none")
    assert loss.shape == (5, made()(TEXTS)["num_chunks"])
    assert loss.isfinite().all()
    assert (loss[0] > 0).any()
    loss.sum().backward()


def test_padding_on_the_left_changes_nothing():
    """With the masks, which say where a text begins."""
    right, left = (made(padding_side=side)(TEXTS) for side in ("right", "left"))
    torch.manual_seed(0)
    rows = torch.randn(5, right["student_ids"].size(1), len(BYTES))
    others = torch.randn(5, right["teacher_ids"].size(1), len(PAIRS))
    found = []
    for batch in (right, left):
        logits = []
        for side, values in (("student", rows), ("teacher", others)):
            mask = batch[f"{side}_mask"].bool()
            first = right[f"{side}_mask"].bool()
            placed = torch.zeros_like(values)
            placed[mask] = values[first]
            logits.append(placed)
        found.append(
            recipes.alm(
                student_logits=logits[0],
                teacher_logits=logits[1],
                student_vocab=BYTES,
                teacher_vocab=PAIRS,
                reduction="none",
                **batch,
            )
        )
    torch.testing.assert_close(found[0], found[1])
    assert found[0].any()


@pytest.mark.parametrize("workers", [0, 2])
def test_workers(workers):
    collate = made()
    again = pickle.loads(pickle.dumps(collate))
    texts = TEXTS * 4
    loader = DataLoader(
        texts, batch_size=3, collate_fn=again, num_workers=workers, timeout=60 * bool(workers)
    )
    batches = list(loader)
    assert len(batches) == 7
    for i, batch in enumerate(batches):
        expected = collate(texts[3 * i : 3 * i + 3])
        assert batch.keys() == expected.keys()
        assert all(np.array_equal(batch[x], expected[x]) for x in expected)


def tokenizers_of(kind):
    if kind == "tiktoken":
        tiktoken = pytest.importorskip("tiktoken")
        ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
        return tiktoken.Encoding(
            "small", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens={"<|end|>": 258}
        )
    parts = pytest.importorskip("tokenizers")
    alphabet = sorted(parts.pre_tokenizers.ByteLevel.alphabet())
    vocab = {x: i for i, x in enumerate([*alphabet, "th", "the", "<s>"])}
    tokenizer = parts.Tokenizer(parts.models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = parts.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = parts.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = parts.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    if kind == "tokenizers":
        return tokenizer
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<s>"
    )


@pytest.mark.parametrize("kind", ["tokenizers", "transformers", "tiktoken"])
def test_kinds_of_tokenizers(kind):
    tokenizer = tokenizers_of(kind)
    collate = AlmCollator(tokenizer, by_bytes, teacher_vocab=BYTES)
    collate = pickle.loads(pickle.dumps(collate))
    batch = collate(["the cat", "<|end|>"])
    vocab = collate.student_vocab
    texts = [vocab.decode(ids) for ids in unpadded(batch, "student")]
    assert texts == [b"the cat", b"<|end|>"]  # special tokens have no bytes; text is no token
    special = kind != "tiktoken"
    assert len(unpadded(batch, "student")[0]) == 5 + special
    assert batch["num_chunks"] == 7
    bare = AlmCollator(tokenizer, by_bytes, teacher_vocab=BYTES, add_special_tokens=False)
    assert len(unpadded(bare(["the cat"]), "student")[0]) == 5


def test_real_tokenizers():
    tokenizers = pytest.importorskip("tokenizers")
    try:
        path = vocabularies.folder(vocabularies.DEEPSEEK) / "tokenizer.json"
    except vocabularies.MissingPackage as missing:
        pytest.skip(str(missing))
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    collate = AlmCollator(tokenizer, by_bytes, teacher_vocab=BYTES)
    text = "Distillation — across tokenizers: 数百の言語, emoji 🙂 and code(x=1)\n\n" * 20
    batch = collate([text, text[:100]])
    ids = unpadded(batch, "student")
    for side in ("student", "teacher"):
        covered = batch[f"{side}_chunks"][batch[f"{side}_mask"].bool()]
        assert (covered >= 0).float().mean() > 0.98
    # Each token of whole characters is a chunk of its own, as the teacher's tokens are bytes.
    assert batch["num_chunks"] > 0.95 * len(ids[0])


def test_an_alignment_whole_and_masks_of_integers():
    batch = made()(TEXTS)
    ids = [batch["student_ids"], batch["teacher_ids"]]
    rows = [unpadded(batch, side) for side in ("student", "teacher")]
    whole = align_batch(*rows, BYTES, PAIRS)  # numpy arrays, padded to the same lengths
    sides = [torch.randn(5, x.size(1), n) for x, n in zip(ids, (257, len(PAIRS)), strict=True)]
    vocabs = {"student_vocab": BYTES, "teacher_vocab": PAIRS}
    masks = [batch["student_mask"], batch["teacher_mask"]]
    expected = recipes.alm(
        sides[0], ids[0], batch["student_chunks"], sides[1], ids[1], batch["teacher_chunks"],
        batch["num_chunks"], BYTES, PAIRS, student_mask=masks[0].bool(),
        teacher_mask=masks[1].bool(),
    )  # fmt: skip
    for kind in (torch.int64, torch.int32, torch.uint8, torch.bool):
        found = recipes.alm(
            sides[0], ids[0], whole, sides[1], ids[1], **vocabs,
            student_mask=masks[0].to(kind), teacher_mask=masks[1].to(kind),
        )  # fmt: skip
        assert torch.equal(found, expected)
    tensors = fastkd.Alignment(*map(torch.as_tensor, whole[:2]), whole.num_chunks)
    compiled = torch.compile(recipes.alm, fullgraph=True, backend="eager")
    given = {"student_mask": masks[0], "teacher_mask": masks[1]}
    found = compiled(sides[0], ids[0], tensors, sides[1], ids[1], **vocabs, **given)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="teacher_chunks and num_chunks must be None besides an"):
        recipes.alm(sides[0], ids[0], whole, sides[1], ids[1], whole[1], **vocabs)
    with pytest.raises(TypeError, match=r"alm: student_vocab must be a fastkd.ByteVocab, got None"):
        recipes.alm(sides[0], ids[0], whole, sides[1], ids[1])
    with pytest.raises(TypeError, match="alm: teacher_chunks must be a tensor, got NoneType"):
        recipes.alm(sides[0], ids[0], batch["student_chunks"], sides[1], ids[1], None, 3, **vocabs)
    with pytest.raises(ValueError, match="alm: student_mask must be bool"):
        recipes.alm(
            sides[0], ids[0], whole, sides[1], ids[1], **vocabs, student_mask=masks[0].float()
        )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"padding_side": "both"}, ValueError, "padding_side must be right or left, got 'both'"),
        ({"max_length": 0}, ValueError, "max_length must be 1 or more, got 0"),
        ({"max_length": (1, 2, 3)}, ValueError, r"two \(student, teacher\), got 3 entries"),
        ({"max_length": "5"}, TypeError, "max_length must be an integer, got str"),
        ({"pad_to_multiple_of": -8}, ValueError, "pad_to_multiple_of must be 1 or more"),
        ({"add_special_tokens": 1}, TypeError, "add_special_tokens must be True or False"),
        ({"student_vocab": [b"a"]}, TypeError, "student_vocab must be a fastkd.ByteVocab, got"),
        ({"teacher_vocab": None}, TypeError, "teacher_tokenizer: .* got builtins.function"),
        ({"student_tokenizer": 3}, TypeError, "student_tokenizer must be a tokenizer or a func"),
    ],
)
def test_errors(options, error, message):
    given = {"student_tokenizer": by_bytes, "teacher_tokenizer": by_pairs}
    given |= {"student_vocab": BYTES, "teacher_vocab": PAIRS, **options}
    first = [given.pop("student_tokenizer"), given.pop("teacher_tokenizer")]
    with pytest.raises(error, match=f"AlmCollator: .*{message}"):
        AlmCollator(*first, **given)


def failing(kind, text):
    return {"ids": [300], "floats": [0.5], "rows": [[1]], "one": 3}[kind]


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ([], ValueError, "items must hold a text or more, got none"),
        ([b"a"], TypeError, "item 0 must be a text, got bytes"),
        (["a", None], TypeError, "item 1 must be a text, got NoneType"),
        ([{"body": "a"}], KeyError, "item 0 must have the column 'text', got 'body'"),
        ("ids", IndexError, r"student_ids\[0\].*300|300"),
        ("floats", TypeError, "student_tokenizer's ids must hold integers, got float64"),
        ("rows", ValueError, r"student_tokenizer's ids must be \[length\], got shape \[1, 1\]"),
        ("one", ValueError, r"student_tokenizer's ids must be \[length\], got shape \[\]"),
    ],
)
def test_errors_of_a_call(items, error, message):
    collate = made()
    if isinstance(items, str):
        collate.student_tokenizer, items = partial(failing, items), ["a"]
    with pytest.raises(error, match=f"AlmCollator: .*{message}"):
        collate(items)


@pytest.mark.parametrize("items", ["cat", {"text": "cat"}, None])
def test_one_text_is_not_a_batch(items):
    vocab = fastkd.ByteVocab([b"c", b"a", b"t"])
    tokenizers = [lambda text: ["cat".index(x) for x in text]] * 2
    collate = fastkd.tokenizers.AlmCollator(*tokenizers, student_vocab=vocab, teacher_vocab=vocab)
    with pytest.raises(TypeError, match="items must be a sequence of texts, got"):
        collate(items)
