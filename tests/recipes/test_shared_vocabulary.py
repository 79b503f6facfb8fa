"""strict_topk and gold against their definitions, token by token and chunk by chunk."""

import math

import pytest
import torch
from cases import logits
from recipe_checks import (
    Entry,
    mixed_dtypes,
    one_graph,
    one_graph_for_all,
    promises,
    with_unread_rows_spoilt,
)

import fastkd
from fastkd import recipes
from fastkd.recipes import _rowwise

CHUNKS, OURS, THEIRS = 5, 11, 9
SHARED = torch.tensor([3, -1, 0, 8, -1, 1, -1, 5, 2, -1])  # the last column is padding
STUDENT_CHUNKS = torch.tensor(
    [[0, 1, 1, 2, 3, 4, -1], [-1, 0, 1, 2, 2, 3, 4], [0, 0, 0, 1, 2, 3, -1]]
)
TEACHER_CHUNKS = torch.tensor([[0, 1, 2, 2, 3, 4], [-1, 0, 0, 1, 2, 3], [0, 1, 2, 2, 2, 3]])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks of rows, the last one short."""
    monkeypatch.setattr(_rowwise, "_ENTRIES", 40)


def texts(dtype, ids=True):
    tensors = {
        "student_logits": logits((3, 7, OURS), dtype, 1.5),
        "student_chunks": STUDENT_CHUNKS.clone(),
        "teacher_logits": logits((3, 6, THEIRS), dtype, 1.5),
        "teacher_chunks": TEACHER_CHUNKS.clone(),
        "num_chunks": CHUNKS,
        "shared": SHARED.clone(),
    }
    if ids:
        tensors["student_ids"] = torch.randint(0, OURS, STUDENT_CHUNKS.shape)
        tensors["teacher_ids"] = torch.randint(0, THEIRS, TEACHER_CHUNKS.shape)
    return tensors


def tokens_of(chunks, text, chunk):
    return [t for t, c in enumerate(chunks[text].tolist()) if c == chunk]


def pairs_of(tensors):
    """Student token and teacher token of each chunk of one token on both sides, by text."""
    for b in range(3):
        for chunk in range(CHUNKS):
            mine = tokens_of(tensors["student_chunks"], b, chunk)
            other = tokens_of(tensors["teacher_chunks"], b, chunk)
            if len(mine) == len(other) == 1 and mine[0] > 0 and other[0] > 0:
                yield b, mine[0], other[0]


def scored(tensors):
    found = torch.zeros(3, 7, dtype=torch.bool)
    for b, mine, _ in pairs_of(tensors):
        found[b, mine] = True
    return found & tensors["mask"] if "mask" in tensors else found


def plain_strict_topk(tensors, k=16, divergence="reverse_kl", temperature=1.0):
    losses, counted = torch.zeros(3, 7).double(), scored(tensors)
    shared = tensors["shared"].tolist()
    for b, mine, other in pairs_of(tensors):
        if not counted[b, mine]:
            continue
        z, y = tensors["student_logits"][b, mine - 1], tensors["teacher_logits"][b, other - 1]
        known = [v for v in range(len(shared)) if shared[v] >= 0]
        best = sorted(known, key=lambda v, z=z: -z[v].item())[:k]
        q = (torch.stack([z[v] for v in best]) / temperature).softmax(-1)
        p = (torch.stack([y[shared[v]] for v in best]) / temperature).softmax(-1)
        p, q = (p, q) if divergence == "forward_kl" else (q, p)
        loss = sum(p[i] * (p[i] / q[i]).log() for i in range(len(best)))
        losses = losses.index_put((torch.tensor(b), torch.tensor(mine)), loss)
    return losses


def merged(tensors, side, b, chunk, temperature, merge):
    """The chunk's distribution, or None if its first token is the text's."""
    places = tokens_of(tensors[f"{side}_chunks"], b, chunk)
    if not places or places[0] == 0:
        return None
    rows = [(tensors[f"{side}_logits"][b, t - 1] / temperature).softmax(-1) for t in places]
    ids = tensors[f"{side}_ids"][b, places].tolist()
    base = 0 if merge == "observed" else len(rows) - 1
    found = rows[base]
    for i, row in enumerate(rows):
        if i != base:
            found = found * row[ids[i]]
    return found


def chunks_that_count(tensors):
    found = torch.zeros(3, CHUNKS, dtype=torch.bool)
    for b in range(3):
        for chunk in range(CHUNKS):
            sides = (tensors["student_chunks"], tensors["teacher_chunks"])
            places = [tokens_of(x, b, chunk) for x in sides]
            found[b, chunk] = all(x and x[0] > 0 for x in places)
    return found & tensors["mask"] if "mask" in tensors else found


def plain_gold(tensors, beta=0.5, temperature=0.9, merge="observed", matched_weight=None):
    shared, losses = tensors["shared"].tolist(), []
    known = [v for v in range(len(shared)) if shared[v] >= 0]
    w = len(known) / THEIRS if matched_weight is None else matched_weight
    for b in range(3):
        for chunk in range(CHUNKS):
            if not chunks_that_count(tensors)[b, chunk]:
                losses.append(torch.zeros(()).double())
                continue
            options = (b, chunk, temperature, merge)
            q, p = (merged(tensors, side, *options) for side in ("student", "teacher"))
            loss = 0
            for v in known:
                mine, other = q[v], p[shared[v]]
                m = beta * other + (1 - beta) * mine
                if beta == 1:
                    loss = loss + w * mine * (mine / other).log()
                loss = loss + w * beta * other * (other / m).log()
                loss = loss + w * (1 - beta) * mine * (mine / m).log()
            mine = sorted((q[v] for v in range(OURS) if v not in known), reverse=True)
            other = sorted((p[v] for v in range(THEIRS) if v not in shared), reverse=True)
            for i in range(max(len(mine), len(other))):
                first = mine[i] if i < len(mine) else 0
                second = other[i] if i < len(other) else 0
                loss = loss + (1 - w) * abs(first - second)
            losses.append(loss)
    return torch.stack(losses).view(3, CHUNKS)


def with_mask(*shape):
    def make(dtype):
        tensors = texts(dtype, ids=shape[-1] == CHUNKS)
        tensors["mask"] = torch.rand(shape) < 0.8
        tensors["mask"][0] = True
        return tensors

    return make


ROWS = ("none", "sum", "mean", "batchmean", "sequence_mean")
GOLD = {"beta": 0.5, "temperature": 0.9, "merge": "observed", "matched_weight": None}
STRICT = {"reductions": ROWS, "counted": scored, "read": None}
CHUNKED = {
    "reductions": ROWS,
    "counted": chunks_that_count,
    "read": None,
    "default": "sequence_mean",
}
ENTRIES = [
    Entry(
        "strict_topk",
        plain_strict_topk,
        {"k": 3},
        problem=with_mask(3, 7),
        published={"k": 16, "divergence": "reverse_kl"},
        **STRICT,
    ),
    Entry(
        "strict_topk",
        plain_strict_topk,
        {"divergence": "forward_kl", "temperature": 2.0},
        problem=lambda dtype: texts(dtype, ids=False),
        **STRICT,
    ),
    Entry("gold", plain_gold, problem=texts, published=GOLD, **CHUNKED),
    Entry(
        "gold",
        plain_gold,
        {"merge": "bayesian", "beta": 0.2, "temperature": 1.5, "matched_weight": 0.3},
        problem=with_mask(3, CHUNKS),
        **CHUNKED,
    ),
    Entry("gold", plain_gold, {"beta": 1.0}, problem=texts, **CHUNKED),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)
GIVEN, STRICT_GIVEN = texts(torch.float32), texts(torch.float32, ids=False)
test_one_graph_for_all_numbers = one_graph_for_all(
    {
        "all": lambda x: (
            recipes.strict_topk(**STRICT_GIVEN, k=3, divergence="jsd", beta=x, temperature=x)
            + recipes.gold(**GIVEN, beta=x, temperature=x, matched_weight=x)
        )
    }
)


@pytest.mark.parametrize("entry", [ENTRIES[0], ENTRIES[2], ENTRIES[3]], ids=str)
def test_other_rows_are_not_read(entry):
    tensors, right, gradient = with_unread_rows_spoilt(entry)
    found = entry.call(tensors)
    torch.testing.assert_close(found, right)
    (again,) = torch.autograd.grad(found, tensors["student_logits"])
    torch.testing.assert_close(again, gradient)
    for side in ("student", "teacher"):
        tensors[f"{side}_chunks"][:] = -1
    nothing = entry.call(tensors)
    assert nothing == 0
    assert not torch.autograd.grad(nothing, tensors["student_logits"])[0].any()


def one_vocabulary():
    """Every token is a chunk on both sides."""
    chunks = torch.arange(6).expand(2, 6)
    ids = torch.randint(0, 8, (2, 6))
    z, y = logits((2, 2, 6, 8), torch.float64)
    return z, y, ids, chunks


def test_one_vocabulary():
    z, y, ids, chunks = one_vocabulary()
    sides = (z[:, :-1], y[:, :-1])
    same = torch.arange(8)
    found = recipes.strict_topk(z, chunks, y, chunks, 6, same)
    right = fastkd.softmax_divergence(*sides, divergence="reverse_kl")
    torch.testing.assert_close(found, right)
    places = (z, ids, chunks, y, ids, chunks, 6)
    for beta in (0.0, 0.3, 1.0):
        found = recipes.gold(*places, same, beta=beta, temperature=1.0)
        right = fastkd.softmax_divergence(*sides, divergence="jsd", beta=beta)
        torch.testing.assert_close(found, right)
    nothing = torch.full((8,), -1)
    found = recipes.gold(*places, nothing, temperature=1.0)
    torch.testing.assert_close(found, recipes.uld(*sides))
    assert recipes.gold(*places[:3], z, *places[4:], same) < 1e-12


def test_tokens_of_probability_zero():
    z, y, ids, chunks = one_vocabulary()
    z, y = z.clone(), y.clone()
    z[..., 0] = y[..., 1] = -math.inf
    z.requires_grad_()
    for loss in (
        recipes.strict_topk(z, chunks, y, chunks, 6, torch.arange(8), k=4),
        recipes.gold(z, ids.clamp(min=2), chunks, y, ids.clamp(min=2), chunks, 6, torch.arange(8)),
    ):
        (gradient,) = torch.autograd.grad(loss, z)
        assert gradient.isfinite().all()
        assert gradient.any()
    few = torch.tensor([-1, -1, 2, 3, -1, -1, -1, -1])  # fewer shared tokens than k
    y = y.clone()
    found = recipes.strict_topk(z, chunks, y, chunks, 6, few)
    right = fastkd.softmax_divergence(z[:, :-1, 2:4], y[:, :-1, 2:4], divergence="reverse_kl")
    torch.testing.assert_close(found, right)


def test_shared_tokens():
    ours = [b"a", b"", b"ab", b"a", None, b"c", b"zz"]
    theirs = [b"c", b"ab", b"ab", b"a", None, b"d"]
    vocabs = fastkd.ByteVocab(ours), fastkd.ByteVocab(theirs)
    assert recipes.shared_tokens(*vocabs).tolist() == [3, -1, 1, -1, -1, 0, -1]
    with pytest.raises(TypeError, match=r"shared_tokens: student_vocab must be a fastkd\.Byte"):
        recipes.shared_tokens(ours, vocabs[1])


def test_errors():
    tensors = texts(torch.float32)
    with pytest.raises(ValueError, match="gold: merge must be one of observed, bayesian"):
        recipes.gold(**tensors, merge="product")
    with pytest.raises(ValueError, match=r"gold: shared must be \[at most 11\], got shape \[12\]"):
        recipes.gold(**{**tensors, "shared": torch.zeros(12).long()})
    with pytest.raises(IndexError, match=r"gold: shared must lie in \[-1, 9\), got 9"):
        recipes.gold(**{**tensors, "shared": SHARED + 1})
    with pytest.raises(ValueError, match=r"gold: mask must be bool \[3, 5\]"):
        recipes.gold(**tensors, mask=torch.ones(3, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="gold: teacher_ids must have shape"):
        recipes.gold(**{**tensors, "teacher_ids": tensors["student_ids"]})
    tensors = texts(torch.float32, ids=False)
    with pytest.raises(ValueError, match="strict_topk: k must be positive, got 0"):
        recipes.strict_topk(**tensors, k=0)
    with pytest.raises(ValueError, match="strict_topk: teacher_logits takes no gradient"):
        recipes.strict_topk(**{**tensors, "teacher_logits": logits((3, 6, 9)).requires_grad_()})
    with pytest.raises(IndexError, match=r"strict_topk: student_chunks must lie in \[-1, 3\)"):
        recipes.strict_topk(**{**tensors, "num_chunks": 3})
