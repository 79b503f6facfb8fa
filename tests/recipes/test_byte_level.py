"""byte_kd, prefix_map and bpm against their definitions, enumerated over small vocabularies."""

import math

import pytest
import torch
from cases import logits, relative_error
from recipe_checks import Entry, kept_of, mixed_dtypes, one_graph, one_graph_for_all, promises

import fastkd
from fastkd import recipes
from fastkd.recipes import _rowwise

OURS = [b"a", b"b", b"ab", b"ba", b"c", b"abc", None, b"bab", b"b", b"ca", b"\x00"]
THEIRS = [b"b", b"a", b"cab", b"abca", None, b"aa", b"bb", b"c", b"a", b"ab"]
VOCABS = fastkd.ByteVocab(OURS), fastkd.ByteVocab(THEIRS)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks of rows, the last one short."""
    monkeypatch.setattr(_rowwise, "_ENTRIES", 40)


def two_vocabularies(dtype):
    tensors = {
        "student_logits": logits((3, 5, len(OURS)), dtype, 1.5),
        "teacher_logits": logits((3, 5, len(THEIRS)), dtype, 1.5),
        "mask": torch.arange(5) < torch.tensor([[5], [3], [1]]),
    }
    tensors["mask"][0, 1] = False
    return tensors


def with_vocabs(dtype):
    names = ("student_vocab", "teacher_vocab")
    return {**two_vocabularies(dtype), **dict(zip(names, VOCABS, strict=True))}


def next_bytes(row, tokens, prefix):
    """Probabilities of the byte after the prefix, or of the end of the token, by enumeration."""
    q, found = row.softmax(-1), {}
    for v, token in enumerate(tokens):
        if token and token.startswith(prefix):
            rest = token[len(prefix) :]
            at = rest[0] if rest else 256
            found[at] = found.get(at, 0) + q[v]
    total = sum(found.values())
    return {at: mass / total for at, mass in found.items()}


def plain_byte_kd(
    tensors,
    divergence="jsd",
    beta=0.5,
    student_prefix=b"",
    teacher_prefix=b"",
    temperature=1.0,
):
    kept, losses = kept_of(tensors), torch.zeros(3, 5).double()
    for b, t in kept.nonzero().tolist():
        sides = []
        for side, tokens, prefix in (
            ("student", OURS, student_prefix),
            ("teacher", THEIRS, teacher_prefix),
        ):
            prefix = prefix if isinstance(prefix, bytes) else prefix[b][t]
            masses = next_bytes(tensors[f"{side}_logits"][b, t], tokens, prefix)
            powers = {at: mass ** (1 / temperature) for at, mass in masses.items()}
            sides.append({at: x / sum(powers.values()) for at, x in powers.items()})
        q, p = sides
        loss = 0
        for at in set(q) | set(p):
            m = beta * p.get(at, 0) + (1 - beta) * q.get(at, 0)
            if divergence == "tvd":
                loss = loss + abs(p.get(at, 0) - q.get(at, 0)) / 2
                continue
            loss = loss + (beta * p[at] * (p[at] / m).log() if at in p else 0)
            loss = loss + ((1 - beta) * q[at] * (q[at] / m).log() if at in q else 0)
        losses = losses.index_put((torch.tensor(b), torch.tensor(t)), loss)
    return losses


def with_mapping(dtype):
    mapping = torch.tensor([0, 3, 3, -1, 5, 0, 10, 3, -1, 7])
    return {**two_vocabularies(dtype), "mapping": mapping}


def plain_bpm(tensors, residual="drop"):
    kept, losses = kept_of(tensors), torch.zeros(3, 5).double()
    mapping = tensors["mapping"].tolist()
    for b, t in kept.nonzero().tolist():
        q = tensors["student_logits"][b, t].softmax(-1)
        p = tensors["teacher_logits"][b, t].softmax(-1)
        images = sorted({u for u in mapping if u >= 0})
        mass = {u: sum(p[v] for v in range(len(p)) if mapping[v] == u) for u in images}
        rest = 1 - sum(mass.values())
        if residual == "drop":
            loss = sum((x / (1 - rest)) * (x / (1 - rest) / q[u]).log() for u, x in mass.items())
        else:
            loss = sum(x * (x / q[u]).log() for u, x in mass.items())
            others = sum(q[u] for u in range(len(q)) if u not in mass)
            loss = loss + rest * (rest / others).log()
        losses = losses.index_put((torch.tensor(b), torch.tensor(t)), loss)
    return losses


ROWS = ("none", "sum", "mean", "batchmean", "sequence_mean")
PREFIXES = [[b"a", b"", b"ab", b"b", b""], [b"a"] * 5, [b"b"] * 5]
ENTRIES = [
    Entry(
        "byte_kd",
        plain_byte_kd,
        problem=with_vocabs,
        reductions=ROWS,
        published={"divergence": "jsd", "beta": 0.5, "temperature": 1.0},
    ),
    Entry(
        "byte_kd",
        plain_byte_kd,
        {"student_prefix": b"a", "teacher_prefix": b"ab", "temperature": 2.0, "beta": 0.2},
        problem=with_vocabs,
        reductions=ROWS,
    ),
    Entry("byte_kd", plain_byte_kd, {"divergence": "tvd"}, problem=with_vocabs, reductions=ROWS),
    Entry("bpm", plain_bpm, problem=with_mapping, reductions=ROWS, published={"residual": "drop"}),
    Entry("bpm", plain_bpm, {"residual": "lump"}, problem=with_mapping, reductions=ROWS),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)
GIVEN = with_vocabs(torch.float32)
test_one_graph_for_all_numbers = one_graph_for_all(
    {"all": lambda x: recipes.byte_kd(**GIVEN, beta=x, temperature=x)}
)


def test_grouping_by_bytes_never_increases_the_divergence():
    """Of one vocabulary; the byte's distribution is a function of the token's."""
    letters = [bytes([97 + i % 5]) + b"x" * (i // 5) for i in range(40)]
    vocab = fastkd.ByteVocab(letters)
    z, y = logits((2, 300, 40), torch.float64, 2.0)
    for divergence in ("forward_kl", "reverse_kl", "jsd", "tvd"):
        options = {"divergence": divergence, "reduction": "none"}
        tokens = fastkd.softmax_divergence(z, y, **options)
        grouped = recipes.byte_kd(z, y, vocab, vocab, **options)
        assert (grouped <= tokens + 1e-12).all()
        assert (grouped < 0.9 * tokens).any()
        assert recipes.byte_kd(z, z, vocab, vocab, divergence=divergence) == 0


def test_a_prefix_for_each_row():
    tensors = with_vocabs(torch.float64)
    found = recipes.byte_kd(**tensors, teacher_prefix=PREFIXES, student_prefix=b"a")
    losses = plain_byte_kd(tensors, teacher_prefix=PREFIXES, student_prefix=b"a")
    torch.testing.assert_close(found, losses.sum() / tensors["mask"].sum())


def test_a_side_that_is_bytes_already():
    tensors = with_vocabs(torch.float64)
    right = recipes.byte_kd(**tensors)
    for side in ("student", "teacher"):
        vocab = tensors.pop(f"{side}_vocab")
        tensors[f"{side}_logits"] = fastkd.byte_log_probs(tensors[f"{side}_logits"], vocab)
        tensors[f"{side}_vocab"] = None
        torch.testing.assert_close(recipes.byte_kd(**tensors), right)


def test_prefix_map():
    right = []
    for token in THEIRS:
        begins = [i for i, mine in enumerate(OURS) if mine and token and token.startswith(mine)]
        right.append(max(begins, key=lambda i: len(OURS[i])) if begins else -1)
    assert recipes.prefix_map(*VOCABS).tolist() == right
    assert right[THEIRS.index(b"abca")] == OURS.index(b"abc")
    assert right[THEIRS.index(None)] == -1
    assert recipes.prefix_map(fastkd.ByteVocab([]), VOCABS[1]).tolist() == [-1] * len(THEIRS)


@pytest.mark.parametrize("residual", ["drop", "lump"])
def test_bpm_of_an_identity_map(residual):
    z, y = logits((2, 4, 9), torch.float64)
    z.requires_grad_()
    found = recipes.bpm(z, y, torch.arange(9), residual=residual)
    right = fastkd.softmax_divergence(z, y)
    torch.testing.assert_close(found, right)
    gradients = [torch.autograd.grad(x, z)[0] for x in (found, right)]
    torch.testing.assert_close(*gradients)
    nothing = torch.full((9,), -1)
    assert recipes.bpm(z, y, nothing, residual="lump").abs() < 1e-12


def test_thousands_of_tokens_for_one():
    """Each has a probability below the last digit of the sum."""
    y = torch.full((1, 30_002), -18.0)
    y[:, :2] = 0
    z = torch.tensor([[0.0, 1e-2]])
    mapping = torch.cat([torch.tensor([0, 1]), torch.zeros(30_000).long()])

    def step(z, y):
        z = z.clone().requires_grad_()
        return torch.autograd.grad(recipes.bpm(z, y, mapping), z)[0]

    assert relative_error(step(z, y), step(z.double(), y.double())) < 2e-5


def test_mass_is_conserved():
    """A permutation of the teacher's tokens changes nothing; nor does a token split in two."""
    tensors = with_mapping(torch.float64)
    for residual in ("drop", "lump"):
        right = recipes.bpm(**tensors, residual=residual)
        order = torch.randperm(len(THEIRS))
        changed = {"teacher_logits": tensors["teacher_logits"][..., order]}
        changed["mapping"] = tensors["mapping"][order]
        found = recipes.bpm(**{**tensors, **changed}, residual=residual)
        torch.testing.assert_close(found, right)
        y = tensors["teacher_logits"]
        halves = torch.cat([y[..., :1] - math.log(2), y[..., 1:], y[..., :1] - math.log(2)], -1)
        mapping = torch.cat([tensors["mapping"], tensors["mapping"][:1]])
        changed = {"teacher_logits": halves, "mapping": mapping}
        found = recipes.bpm(**{**tensors, **changed}, residual=residual)
        torch.testing.assert_close(found, right)


def test_errors():
    tensors = with_vocabs(torch.float32)
    with pytest.raises(ValueError, match="byte_kd: teacher_logits without teacher_vocab must have"):
        recipes.byte_kd(**{**tensors, "teacher_vocab": None})
    wide = {"teacher_vocab": None, "teacher_logits": torch.zeros(3, 5, 257)}
    with pytest.raises(ValueError, match="byte_kd: teacher_prefix needs teacher_vocab"):
        recipes.byte_kd(**{**tensors, **wide}, teacher_prefix=b"a")
    with pytest.raises(ValueError, match="byte_kd: teacher_logits must have the leading"):
        recipes.byte_kd(**{**tensors, "teacher_logits": torch.zeros(3, 4, 10)})
    with pytest.raises(TypeError, match=r"prefix_map: teacher_vocab must be a fastkd\.ByteVocab"):
        recipes.prefix_map(VOCABS[0], THEIRS)
    tensors = with_mapping(torch.float32)
    for wrong, kind, message in (
        (tensors["mapping"][1:], ValueError, r"bpm: mapping must have shape \[10\], got \[9\]"),
        (tensors["mapping"].float(), TypeError, "bpm: mapping must be int64 or int32"),
        (tensors["mapping"] + 1, IndexError, r"bpm: mapping must lie in \[-1, 11\), got 11"),
    ):
        with pytest.raises(kind, match=message):
            recipes.bpm(**{**tensors, "mapping": wrong})
    with pytest.raises(ValueError, match="bpm: residual must be one of drop, lump"):
        recipes.bpm(**tensors, residual="none")
