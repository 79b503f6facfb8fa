"""edit_distance_map against every distance, on small vocabularies, and on real ones."""

import random

import pytest
import vocabularies

import fastkd
from fastkd import recipes


def distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
    return row[-1]


def nearest(token, teachers):
    def rank(pair):
        prefix = next(
            (i for i, (x, y) in enumerate(zip(token, pair[1], strict=False)) if x != y), 9999
        )
        prefix = min(prefix, len(token), len(pair[1]))
        return distance(token, pair[1]), -prefix, pair[0]

    return min(((i, t) for i, t in enumerate(teachers) if t), key=rank)[0]


@pytest.mark.parametrize("seed", range(6))
def test_edit_distance_map(seed):
    generator = random.Random(seed)
    lengths = [1, 2, 3, 4, 5, 8, 13] if seed else [1, 70, 300]
    lists = [
        [
            bytes(generator.choices(b"abcd\xff", k=generator.choice(lengths))) if x % 9 else None
            for x in range(count)
        ]
        for count in (60, 80 if seed else 20)
    ]
    vocabs = [fastkd.ByteVocab(tokens) for tokens in lists]
    found = recipes.edit_distance_map(*vocabs).tolist()
    assert found == [-1 if token is None else nearest(token, lists[1]) for token in lists[0]]


def test_edit_distance_map_of_classes():
    student = fastkd.ByteVocab([None, None, None, b"x"], special={"bos": [1], "eos": [0]})
    teacher = fastkd.ByteVocab([b"x", None, None, None], special={"eos": [3, 1]})
    assert recipes.edit_distance_map(student, teacher).tolist() == [1, -1, -1, 0]


def test_edit_distance_map_of_real_vocabularies():
    try:
        small, large = (
            fastkd.ByteVocab(vocabularies.VOCABULARIES[name]()) for name in ("mistral-v1", "qwen")
        )
    except vocabularies.MissingPackage as missing:
        pytest.skip(str(missing))
    found = recipes.edit_distance_map(small, large)
    for token, other in zip(small.tokens, found.tolist(), strict=True):
        if token is not None and large.find(token):
            assert other == large.find(token)[0]


def test_edit_distance_map_errors():
    vocab = fastkd.ByteVocab([b"a"])
    with pytest.raises(TypeError, match="edit_distance_map: teacher_vocab must be a"):
        recipes.edit_distance_map(vocab, [b"a"])
    with pytest.raises(ValueError, match="edit_distance_map: teacher_vocab must have a token"):
        recipes.edit_distance_map(vocab, fastkd.ByteVocab([None]))
