"""teachers.collate: padded and packed batches of a stored teacher, in workers and epochs."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import fastkd
from fastkd.integrations import labels_of
from fastkd.teachers import collate

pytest.importorskip("safetensors", reason='TeacherStore needs safetensors: "fastkd[store]"')

VOCAB, K = 40, 3
LENGTHS = [5, 1, 7, 3, 0, 4]


def text(number):
    random = torch.Generator().manual_seed(number)
    ids = torch.randint(VOCAB, (LENGTHS[number],), generator=random)
    logits = torch.randn(LENGTHS[number], VOCAB, generator=random)
    return ids, fastkd.teacher_topk(logits, K)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    settings = {"vocab_size": VOCAB, "k": K, "log_probs": "float16", "shard_tokens": 8}
    with fastkd.TeacherStore.create(path, **settings, keys=True, input_ids=True) as writer:
        for i in range(len(LENGTHS)):
            ids, best = text(i)
            writer.append(*best, key=f"text {i}", input_ids=ids)
    return fastkd.TeacherStore(path)


def item(number, **more):
    ids, best = text(number)
    columns = {"teacher_log_probs": best.log_probs, "teacher_indices": best.indices}
    return {"input_ids": ids.tolist(), **columns, **more}


def check_padded(batch, numbers):
    """Each row has its text, and nothing behind it."""
    for row, number in enumerate(numbers):
        (ids, best), n = text(number), LENGTHS[number]
        assert batch["input_ids"][row, :n].tolist() == ids.tolist()
        assert batch["attention_mask"][row].tolist() == [int(t < n) for t in range(max_of(batch))]
        assert batch["labels"][row, 1:n].tolist() == ids[1:].tolist()
        assert (batch["labels"][row, n:] == -100).all()
        assert batch["labels"][row, 0] == -100
        assert torch.equal(batch["teacher_indices"][row, :n], best.indices)
        torch.testing.assert_close(
            batch["teacher_log_probs"][row, :n], best.log_probs, atol=2e-3, rtol=2e-3
        )
        assert (batch["teacher_indices"][row, n:] == -1).all()
        assert (batch["teacher_log_probs"][row, n:] == -torch.inf).all()


def max_of(batch):
    return batch["input_ids"].size(1)


def test_columns_numbers_and_keys_are_the_same(store):
    numbers = [0, 2, 4, 1]
    by_column = collate([item(i) for i in numbers])
    by_number = collate(numbers, store=store)
    by_key = collate([{"key": f"text {i}"} for i in numbers], store=store)
    both = collate(
        [{"id": f"text {i}", "input_ids": text(i)[0]} for i in numbers], store=store, key="id"
    )
    assert set(by_column) == {
        "input_ids", "attention_mask", "labels", "teacher_log_probs", "teacher_indices"
    }  # fmt: skip
    for batch in (by_column, by_number, by_key, both):
        check_padded(batch, numbers)
        assert batch["input_ids"].shape == (4, 7)
        for name, tensor in batch.items():
            assert tensor.dtype == by_column[name].dtype
    assert by_column["teacher_log_probs"].dtype == torch.float32
    assert by_column["teacher_indices"].dtype == torch.int32
    tensors = collate([np.int64(3), torch.tensor(5)], store=store)
    check_padded(tensors, [3, 5])


def test_options_of_lengths():
    batch = collate([item(0), item(2)], pad_to_multiple_of=8, pad_id=39)
    assert batch["input_ids"].shape == (2, 8)
    assert (batch["input_ids"][0, 5:] == 39).all()
    cut = collate([item(0), item(2)], max_length=3)
    assert cut["input_ids"].tolist() == [text(0)[0][:3].tolist(), text(2)[0][:3].tolist()]
    assert cut["teacher_indices"].shape == (2, 3, K)
    assert cut["attention_mask"].all()


def test_labels_of_items():
    labels = [-100, -100, 3, 4, -100]
    batch = collate([item(0, labels=labels), item(1)], shift=True)
    assert batch["labels"].tolist() == [[-100, 3, 4, -100, -100], [-100] * 5]
    assert batch["mask"].tolist() == [[False, True, True, False, False], [False] * 5]


def test_short_and_missing_rows(store):
    """No teacher's token of the last token, of rows in between (-1; -inf), and of a text."""
    first = item(0)
    first["teacher_log_probs"] = first["teacher_log_probs"][:4]
    indices = first["teacher_indices"][:4].clone()
    indices[1] = -1
    first["teacher_indices"] = indices
    log_probs = first["teacher_log_probs"].clone()
    log_probs[3] = -torch.inf
    first["teacher_log_probs"] = log_probs
    second = {"input_ids": [1, 2, 3], "key": "text 99"}
    batch = collate([first, second], store=store, missing="empty", shift=True)
    assert batch["mask"].tolist() == [[True, False, True, False, False], [False] * 5]
    student = torch.randn(2, 5, VOCAB, requires_grad=True)
    teacher = batch["teacher_log_probs"], batch["teacher_indices"]
    loss = fastkd.topk_divergence(student, *teacher, mask=batch["mask"])
    loss.backward()
    assert loss.isfinite()
    rows = student.grad.abs().sum(-1) > 0
    assert torch.equal(rows, batch["mask"])
    with pytest.raises(KeyError, match="item 1: no sequence has the key 'text 99' in"):
        collate([first, second], store=store)


def test_the_loss_of_a_batch_is_that_of_its_texts(store):
    """Padded, packed, shifted here or in the loss."""
    numbers = [0, 2, 3]
    logits = [torch.randn(LENGTHS[i], VOCAB) for i in numbers]
    total, rows = 0.0, 0
    for z, i in zip(logits, numbers, strict=True):
        best = store[i]
        total += fastkd.topk_divergence(z[:-1], *(x[:-1] for x in best), reduction="sum").item()
        rows += LENGTHS[i] - 1
    padded = torch.zeros(3, 7, VOCAB)
    for row, z in zip(padded, logits, strict=True):
        row[: len(z)] = z
    packed = torch.cat(logits).unsqueeze(0)
    for student, pack in ((padded, False), (packed, True)):
        batch = collate(numbers, store=store, pack=pack, shift=True)
        teacher = batch["teacher_log_probs"], batch["teacher_indices"]
        found = fastkd.topk_divergence(student, *teacher, mask=batch["mask"])
        assert found.item() == pytest.approx(total / rows, rel=1e-5)
        batch = collate(numbers, store=store, pack=pack)
        teacher = batch["teacher_log_probs"], batch["teacher_indices"]
        found = fastkd.topk_divergence(
            student, *teacher, labels=batch["labels"], label_weight=0.0, shift=1
        )
        assert found.item() == pytest.approx(total / rows, rel=1e-5)


def test_packing():
    batch = collate([item(i) for i in (0, 1, 4, 3)], pack=True, pad_to_multiple_of=4, pad_id=7)
    ids = torch.cat([text(i)[0] for i in (0, 1, 4, 3)]).tolist()
    assert batch["input_ids"].tolist() == [[*ids, 7, 7, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 0, 1, 2, 0, 1, 2]]
    assert "attention_mask" not in batch
    assert (batch["labels"] == -100).nonzero()[:, 1].tolist() == [0, 5, 6, 9, 10, 11]
    assert batch["teacher_indices"].shape == (1, 12, K)
    found = labels_of(
        batch["input_ids"], torch.tensor([[1] * 9 + [0] * 3]), position_ids=batch["position_ids"]
    )
    shifted = collate([item(i) for i in (0, 1, 4, 3)], pack=True, pad_to_multiple_of=4, shift=True)
    assert torch.equal(found, shifted["labels"])


def test_a_model_keeps_packed_texts_apart():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    items = [item(i) for i in (0, 2, 3)]
    with torch.no_grad():
        packed = collate(items, pack=True)
        names = ("input_ids", "position_ids")
        found = model(**{name: packed[name] for name in names}, use_cache=False).logits[0]
        padded = collate(items)
        names = ("input_ids", "attention_mask")
        expected = model(**{name: padded[name] for name in names}).logits
    expected = expected[padded["attention_mask"].bool()]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_and_workers(store, workers):
    """Every epoch has each text once, in another order, whole."""
    rows = pickle.loads(pickle.dumps(partial(collate, store=store, shift=True)))
    random = torch.Generator().manual_seed(1)
    loader = DataLoader(
        range(len(store)), 2, shuffle=True, collate_fn=rows, num_workers=workers,
        persistent_workers=workers > 0, generator=random, timeout=60 * (workers > 0),
    )  # fmt: skip
    orders = []
    for _ in range(3):
        seen = []
        for batch in loader:
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                seen.append(row[mask.bool()].tolist())
        assert sorted(seen) == sorted(text(i)[0].tolist() for i in range(len(store)))
        orders.append(seen)
    assert orders[0] != orders[1] or orders[1] != orders[2]


@pytest.mark.parametrize("nothing", [[], [[]] * 5, torch.empty(5, 0), np.empty((0, 3))])
def test_a_batch_of_which_the_teacher_says_nothing(nothing):
    """Requests that failed, as data sets of lists have them: k is known of no text, or of some."""
    failed = item(0, teacher_log_probs=nothing, teacher_indices=nothing)
    batch = collate([failed, failed], shift=True)
    assert batch["teacher_indices"].tolist() == [[[-1]] * 5] * 2
    assert (batch["teacher_log_probs"] == -torch.inf).all()
    assert not batch["mask"].any()
    student = torch.randn(2, 5, VOCAB, requires_grad=True)
    teacher = batch["teacher_log_probs"], batch["teacher_indices"]
    loss = fastkd.topk_divergence(student, *teacher, mask=batch["mask"])
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()
    some = collate([failed, item(1)])
    assert some["teacher_indices"].shape == (2, 5, K)
    assert (some["teacher_indices"][0] == -1).all()


def test_columns_of_other_kinds(store):
    """float64, lists, and log-probabilities of padding that are anything."""
    best, expected = text(0)[1], collate([item(0)])
    log_probs, indices = best.log_probs.double(), best.indices.long()
    for kind in (torch.Tensor.numpy, torch.Tensor.tolist, torch.clone):
        columns = {"teacher_log_probs": kind(log_probs), "teacher_indices": kind(indices)}
        found = collate([item(0, **columns)])
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name])
            assert tensor.dtype == expected[name].dtype
    log_probs[1, 2], indices[1, 2] = torch.nan, -1
    found = collate([item(0, teacher_log_probs=log_probs, teacher_indices=indices)])
    assert found["teacher_log_probs"][0, 1, 2] == -torch.inf
    keys = [{"key": key} for key in store.keys()]  # noqa: SIM118
    check_padded(collate(keys, store=store), range(len(store)))


def column(name, value):
    """A column with another value in row 1."""
    values = item(0)[name].double() if name == "teacher_log_probs" else item(0)[name].long()
    values[1, 2] = value
    return item(0, **{name: values})


def without(name, number=0):
    return {x: value for x, value in item(number).items() if x != name}


@pytest.mark.parametrize(
    ("items", "options", "error", "message"),
    [
        ([], {}, ValueError, "items must hold a sequence or more, got none"),
        (["a"], {}, TypeError, "item 0 must be a dictionary or a number, got str"),
        ([True], {}, TypeError, "item 0 must be a dictionary or a number, got bool"),
        ([0], {}, ValueError, "item 0 is a number: it needs store"),
        ([item(0), without("teacher_indices")], {}, KeyError, "item 1 must have teacher_log_probs"),
        ([without("input_ids")], {}, ValueError, "item 0 must have input_ids, as the store has no"),
        ([item(0, input_ids=[1, 2])], {}, ValueError, "at most a row a token, 2, got 5"),
        (
            [item(0, input_ids=[0.5] * 5)],
            {},
            ValueError,
            r"input_ids must be integers \[T\], got t",
        ),
        ([item(0, input_ids=[[1]])], {}, ValueError, r"got torch.int64 \[1, 1\]"),
        ([item(0, labels=[1])], {}, ValueError, "labels must be one a token, 5, got 1"),
        ([item(0, teacher_indices=[[1, 2]])], {}, ValueError, r"must both be \[T, k\], got \[5, 3"),
        ([item(0, teacher_log_probs=torch.ones(5, 3).int())], {}, TypeError, "must be float and"),
        (5, {}, TypeError, "items must be a sequence, got int"),
        (
            [column("teacher_indices", 2**32 + 7)],
            {},
            IndexError,
            r"teacher_indices must lie in \[-1, 2\^31\), got 4294967303 at token 1",
        ),
        ([column("teacher_indices", 2**31)], {}, IndexError, "got 2147483648 at token 1"),
        ([column("teacher_indices", -2)], {}, IndexError, "got -2 at token 1"),
        (
            [column("teacher_log_probs", torch.nan)],
            {},
            ValueError,
            "teacher_log_probs must not be NaN or positive, got nan at token 1",
        ),
        ([column("teacher_log_probs", 0.5)], {}, ValueError, "positive, got 0.5 at token 1"),
        ([item(0, teacher_log_probs="a")], {}, TypeError, "teacher_log_probs must be a tensor, an"),
        ([item(0, input_ids=[[1], [2, 3]])], {}, TypeError, "input_ids must be a tensor, an array"),
        ([item(0, input_ids=torch.ones(5).bool())], {}, ValueError, "integers .*, got torch.bool"),
        ([item(0, labels=[1j] * 5)], {}, ValueError, "labels must be integers .*complex"),
        ([item(0)], {"store": "path"}, TypeError, "store must be a fastkd.TeacherStore or None"),
        ([item(0)], {"missing": "skip"}, ValueError, "missing must be error or empty, got 'skip'"),
        ([item(0)], {"max_length": 0}, ValueError, "max_length must be 1 or more, got 0"),
        ([item(0)], {"pad_to_multiple_of": 2.0}, TypeError, "pad_to_multiple_of must be an int"),
        ([item(0)], {"pack": 1}, TypeError, "pack must be True or False, got int"),
        ([item(0)], {"shift": 1}, TypeError, "shift must be True or False, got int"),
        ([item(0)], {"pad_id": None}, TypeError, "pad_id must be an integer, got NoneType"),
    ],
)
def test_errors(items, options, error, message):
    with pytest.raises(error, match=f"teachers.collate: .*{message}"):
        collate(items, **options)


def test_errors_with_a_store(store):
    wrong = {"key": "text 0", "input_ids": (text(0)[0] + 1) % VOCAB}
    with pytest.raises(ValueError, match="input_ids must be those that the teacher read, "):
        collate([wrong], store=store)
    shorter = collate([{"key": "text 0", "input_ids": text(0)[0][:2]}], store=store)
    assert shorter["teacher_indices"].shape == (1, 2, K)
    with pytest.raises(IndexError, match=r"must lie in \[-6, 5\], got 6"):
        collate([6], store=store)


# labels_of


def test_labels_of():
    ids = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    for kind in (torch.bool, torch.int64):
        assert labels_of(ids, mask.to(kind)).tolist() == [
            [-100, -100, 6, 7, -100],
            [4, 5, -100, -100, -100],
        ]
    lengths = torch.tensor([2, 1])
    assert labels_of(ids.int(), mask, prompt_length=lengths, ignore_index=-1).tolist() == [
        [-1, -1, -1, 7, -1],
        [4, 5, -1, -1, -1],
    ]
    assert labels_of(ids[0]).tolist() == [0, 5, 6, 7, -100]
    assert labels_of(ids[:, :0]).shape == (2, 0)
    logits = torch.randn(2, 5, 9)
    shifted, plain = labels_of(ids, mask), labels_of(ids, mask, shift=False)
    assert torch.equal(
        fastkd.cross_entropy(logits, shifted), fastkd.cross_entropy(logits, plain, shift=1)
    )


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"input_ids": [1, 2]}, TypeError, "input_ids must be a tensor of integers, got list"),
        ({"input_ids": torch.ones(3)}, TypeError, "got torch.float32"),
        ({"input_ids": torch.ones(3).bool()}, TypeError, "got torch.bool"),
        ({"input_ids": torch.tensor(3)}, ValueError, r"input_ids must be \[..., T\], got a 0-d"),
        ({"attention_mask": torch.ones(2)}, TypeError, "attention_mask must be a tensor of int"),
        ({"attention_mask": torch.ones(2).bool()}, ValueError, r"must be \[1, 3\], got \[2\]"),
        ({"prompt_length": 1.5}, TypeError, "prompt_length must be an integer, got float"),
        ({"prompt_length": -1}, ValueError, "prompt_length must not be negative, got -1"),
        ({"prompt_length": torch.tensor([-2])}, ValueError, "must not be negative, got -2"),
        ({"prompt_length": True}, TypeError, "prompt_length must be an integer, got bool"),
        ({"shift": "no"}, TypeError, "shift must be True or False, got str"),
        ({"shift": 2}, TypeError, "shift must be True or False, got int"),
        ({"prompt_length": torch.ones(2).int()}, ValueError, r"must be \[1\], got \[2\]"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an integer"),
        (
            {"position_ids": torch.zeros(1, 3).int(), "prompt_length": 1},
            ValueError,
            "prompt_length must be None with position_ids",
        ),
    ],
)
def test_errors_of_labels_of(given, error, message):
    given = {"input_ids": torch.ones(1, 3, dtype=torch.int64), **given}
    with pytest.raises(error, match=f"labels_of: {message}|labels_of: .*{message}"):
        labels_of(**given)
