"""x_token against its definition, chunk by chunk, and the projection that it takes."""

import inspect
import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from cases import logits, relative_error
from recipe_checks import (
    Entry,
    mixed_dtypes,
    one_graph,
    one_graph_for_all,
    promises,
    with_unread_rows_spoilt,
)
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import recipes
from fastkd.recipes import _rowwise

CHUNKS, OURS, THEIRS = 5, 11, 9
SIDES = ("student", "teacher")
STUDENT_CHUNKS = torch.tensor(
    [[0, 1, 1, 2, 3, 4, -1], [-1, 0, 1, 2, 2, 3, 4], [0, 0, 0, 1, 2, 3, -1]]
)
TEACHER_CHUNKS = torch.tensor([[0, 1, 2, 2, 3, 4], [-1, 0, 0, 1, 2, 3], [0, 1, 2, 2, 2, 4]])
#: For nine student ids; the last two columns are padding. Ids 1 and 4 want one teacher id.
IDS = torch.tensor(
    [[3, -1], [6, 2], [-1, -1], [0, 8], [6, 1], [5, -1], [1, 1], [7, 4], [2, 3]], dtype=torch.int32
)
WEIGHTS = torch.tensor(
    [[1, 0], [0.7, 0.3], [0, 0], [0.5, 0.5], [0.9, 0.1], [1, 9], [0.3, 0.3], [0.1, 0.65], [0.6, 0]]
)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks of chunks, some with one chunk of more rows than a block should have."""
    monkeypatch.setattr(_rowwise, "_ENTRIES", 40)


def texts(dtype):
    return {
        "student_logits": logits((3, 7, OURS), dtype, 1.5),
        "student_chunks": STUDENT_CHUNKS.clone(),
        "teacher_logits": logits((3, 6, THEIRS), dtype, 1.5),
        "teacher_chunks": TEACHER_CHUNKS.clone(),
        "num_chunks": CHUNKS,
        "projection": (IDS.clone(), WEIGHTS.clone()),
    }


def masked_texts(dtype):
    mask = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 0, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    return {**texts(dtype), "mask": mask}


def rows_of(tensors, side, text, chunk):
    """Logits that score the chunk's tokens."""
    chunks = tensors[f"{side}_chunks"][text].tolist()
    rows = [t - 1 for t, c in enumerate(chunks) if c == chunk and t > 0]
    return [tensors[f"{side}_logits"][text, t] for t in rows]


def chunks_that_count(tensors):
    found = torch.zeros(3, CHUNKS, dtype=torch.bool)
    for b in range(3):
        for c in range(CHUNKS):
            found[b, c] = all(rows_of(tensors, s, b, c) for s in SIDES)
    return found & tensors["mask"] if "mask" in tensors else found


def best_columns(tensors, k):
    """The teacher's largest logits in the rows that count."""
    largest = [-math.inf] * THEIRS
    for b, c in chunks_that_count(tensors).nonzero().tolist():
        for row in rows_of(tensors, "teacher", b, c):
            largest = [max(x, y) for x, y in zip(largest, row.tolist(), strict=True)]
    return sorted(range(THEIRS), key=lambda u: -largest[u])[:k]


def kl(p, q, reverse):
    p, q = (q, p) if reverse else (p, q)
    return sum(x * (x / y).log() for x, y in zip(p, q, strict=True))


def by_chunks(of_chunk):
    def losses(tensors, divergence="forward_kl", temperature=1.0, kind="p_kl", **options):
        found, counted = [], chunks_that_count(tensors)
        for b in range(3):
            for c in range(CHUNKS):
                if not counted[b, c]:
                    found.append(torch.zeros(()).double())
                    continue
                z, y = (
                    [row / temperature for row in rows_of(tensors, side, b, c)] for side in SIDES
                )
                reverse = divergence == "reverse_kl"
                found.append(temperature**2 * of_chunk(tensors, z, y, reverse, **options))
        return torch.stack(found).view(3, CHUNKS)

    return losses


@by_chunks
def plain_p_kl(tensors, z, y, reverse, k=8192, epsilon=1e-10):
    ids, weights = (x.tolist() for x in tensors["projection"])
    best, mass = best_columns(tensors, k), [0] * THEIRS
    for row in z:
        q = row.softmax(-1)
        for v, (some, factors) in enumerate(zip(ids, weights, strict=True)):
            for u, w in zip(some, factors, strict=True):
                if u >= 0:
                    mass[u] = mass[u] + q[v] * w / len(z)
    total = sum(mass[u] for u in best) + epsilon
    q = [mass[u] / total + epsilon for u in best]
    logs = [row[best].log_softmax(-1) for row in y]
    p = [(sum(row[i] for row in logs) / len(y)).exp() for i in range(len(best))]
    return kl(p, torch.stack([torch.as_tensor(x) for x in q]), reverse)


def plain_common(tensors, threshold):
    """The teacher's id of each student id that is common."""
    wanted, projection = {}, (x.tolist() for x in tensors["projection"])
    for v, (some, factors) in enumerate(zip(*projection, strict=True)):
        sums = {}
        for u, w in zip(some, factors, strict=True):
            if u >= 0:
                sums[u] = sums.get(u, 0) + w
        best = max(sums, key=sums.get, default=None)
        if sums and torch.tensor(sums[best]) >= torch.tensor(threshold):
            wanted.setdefault(best, []).append((-sums[best], v))
    return {min(candidates)[1]: u for u, candidates in wanted.items()}


@by_chunks
def plain_h_kl(tensors, z, y, reverse, threshold=0.6, cap=8192):
    common = plain_common(tensors, threshold)
    q, p = ((sum(row.log_softmax(-1) for row in x) / len(x)).exp() for x in (z, y))
    loss = kl([p[u] for u in common.values()], [q[v] for v in common], reverse)
    mine = sorted((q[v] for v in range(OURS) if v not in common), reverse=True)
    other = sorted((p[u] for u in range(THEIRS) if u not in common.values()), reverse=True)
    return loss + sum(abs(a - b) for a, b in list(zip(mine, other, strict=False))[:cap])


CHUNKED = {
    "reductions": ("none", "sum", "mean", "batchmean", "sequence_mean"),
    "counted": chunks_that_count,
    "read": None,
}
PUBLISHED = {
    "kind": "p_kl",
    "k": 8192,
    "threshold": 0.6,
    "cap": 8192,
    "divergence": "forward_kl",
    "temperature": 1.0,
    "epsilon": 1e-10,
}
ENTRIES = [
    Entry("x_token", plain_p_kl, problem=texts, published=PUBLISHED, **CHUNKED),
    Entry(
        "x_token",
        plain_p_kl,
        {"k": 4, "temperature": 1.7, "divergence": "reverse_kl", "epsilon": 1e-3},
        problem=masked_texts,
        **CHUNKED,
    ),
    Entry("x_token", plain_h_kl, {"kind": "h_kl"}, problem=masked_texts, **CHUNKED),
    Entry(
        "x_token",
        plain_h_kl,
        {"kind": "h_kl", "cap": 2, "divergence": "reverse_kl", "temperature": 0.6},
        problem=texts,
        **CHUNKED,
    ),
    Entry("x_token", plain_h_kl, {"kind": "h_kl", "threshold": 1.0}, problem=texts, **CHUNKED),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)
GIVEN = texts(torch.float32)
test_one_graph_for_all_numbers = one_graph_for_all(
    {
        "all": lambda x: (
            recipes.x_token(**GIVEN, temperature=1 + x, epsilon=x)
            + recipes.x_token(**GIVEN, kind="h_kl", temperature=x, threshold=x)
        )
    }
)


@pytest.mark.parametrize("entry", ENTRIES[1:3], ids=str)
def test_other_rows_are_not_read(entry):
    tensors, right, gradient = with_unread_rows_spoilt(entry)
    compiled = torch.compile(entry.call, fullgraph=True, backend="eager")
    for call in (entry.call, compiled):
        found = call(tensors)
        torch.testing.assert_close(found, right)
        (again,) = torch.autograd.grad(found, tensors["student_logits"])
        torch.testing.assert_close(again, gradient)
    for side in SIDES:
        tensors[f"{side}_chunks"][:] = -1
    nothing = entry.call(tensors)
    assert nothing == 0
    assert not torch.autograd.grad(nothing, tensors["student_logits"])[0].any()


def test_thousands_of_tokens_for_one():
    """Each has a probability below the last digit of the sum."""
    z = torch.full((1, 2, 30_002), -20.0)
    z[..., :2] = 0
    y = torch.tensor([[[0.0, 1e-2]] * 2])
    chunks = torch.tensor([[0, 1]])
    ids = torch.cat([torch.tensor([0, 1]), torch.zeros(30_000).long()])

    def step(z, y):
        z = z.clone().requires_grad_()
        places = (z, chunks, y, chunks, 2, (ids.unsqueeze(-1), torch.ones(len(ids), 1)))
        return torch.autograd.grad(recipes.x_token(*places), z)[0]

    assert relative_error(step(z, y), step(z.double(), y.double())) < 2e-5


@pytest.mark.parametrize("kind", ["p_kl", "h_kl"])
def test_one_graph_for_every_batch(kind):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def run(z, y, *chunks):
        return recipes.x_token(z, chunks[0], y, chunks[1], 3, (IDS, WEIGHTS), kind=kind, k=4)

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for batch, length in ((2, 5), (3, 6), (4, 8)):
        z = logits((batch, length, OURS)).requires_grad_()
        chunks = [torch.arange(length).expand(batch, length).clamp(max=3) - 1 for _ in range(2)]
        rest = (logits((batch, length, THEIRS)), *chunks)
        found, right = (torch.autograd.grad(f(z, *rest), z)[0] for f in (compiled, run))
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint(reentrant):
    tensors = texts(torch.float32)
    z = tensors.pop("student_logits").requires_grad_()

    def run(z):
        return recipes.x_token(z, **tensors)

    (right,) = torch.autograd.grad(run(z), z)
    checkpoint(run, z, use_reentrant=reentrant).backward()
    torch.testing.assert_close(z.grad, right)


@pytest.mark.parametrize("kind", ["p_kl", "h_kl"])
def test_one_vocabulary(kind):
    """W is the identity, every token a chunk: the divergence of all tokens."""
    z, y = logits((2, 2, 6, 8), torch.float64)
    chunks = torch.arange(6).expand(2, 6)
    identity = torch.arange(8).unsqueeze(-1), torch.ones(8, 1)
    places = (z, chunks, y, chunks, 6, identity)
    for divergence in ("forward_kl", "reverse_kl"):
        options = {"divergence": divergence, "temperature": 2.0}
        found = recipes.x_token(*places, kind=kind, epsilon=1e-30, **options)
        right = fastkd.softmax_divergence(z[:, :-1], y[:, :-1], **options, square_temperature=True)
        torch.testing.assert_close(found, right)
    assert abs(recipes.x_token(z, chunks, z, *places[3:], kind=kind)) < 1e-8
    nothing = torch.full((8, 1), -1), torch.ones(8, 1)
    if kind == "h_kl":
        found = recipes.x_token(*places[:5], nothing, kind=kind)
        torch.testing.assert_close(found, recipes.uld(z[:, :-1], y[:, :-1]))


def test_tokens_of_several_teacher_tokens():
    """The numeral 201 of the paper: where the teacher is sure of 2, so is the student of 201."""
    student = torch.zeros(1, 2, 3, requires_grad=True)  # a, 201, 7
    teacher = torch.tensor([[[0.0, 9.0, 0.0, 0.0], [0.0] * 4]])  # a, 2, 0, 1
    chunks = torch.tensor([[0, 1]])
    weights = torch.tensor([[1.0, 0, 0], [0.9, 0.09, 0.01], [0, 0, 0]])
    projection = torch.tensor([[0, -1, -1], [1, 2, 3], [-1, -1, -1]]), weights
    loss = recipes.x_token(student, chunks, teacher, chunks, 2, projection)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[0, 0, 1] < 0 < gradient[0, 0, 0]


def test_tokens_of_probability_zero():
    tensors = texts(torch.float32)
    tensors["student_logits"][..., 0] = -math.inf
    tensors["teacher_logits"][..., 3] = -math.inf
    tensors["teacher_logits"][..., 6] = -math.inf
    z = tensors["student_logits"].requires_grad_()
    for kind in ("p_kl", "h_kl"):
        loss = recipes.x_token(**tensors, kind=kind)
        (gradient,) = torch.autograd.grad(loss, z)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert gradient.any()


def test_a_chunk_in_two_places():
    """Its rows are averaged as if they followed each other; numbers may be of numpy or torch."""
    tensors = texts(torch.float64)
    tensors["student_chunks"][:] = torch.tensor([0, 3, 1, 3, 1, 3, 1])
    z = tensors["student_logits"].requires_grad_()
    right = plain_p_kl(tensors, k=4).sum()
    for number in (np.int64(4), torch.tensor(4)):
        found = recipes.x_token(**tensors, k=number, reduction="sum")
        torch.testing.assert_close(found, right)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (found, right)))
    none = {f"{side}_chunks": torch.full_like(tensors[f"{side}_chunks"], -1) for side in SIDES}
    assert recipes.x_token(**{**tensors, **none, "num_chunks": 0}) == 0


def test_no_texts():
    for batch, length in ((0, 4), (2, 0)):
        z, y = (torch.zeros(batch, length, n, requires_grad=n == 3) for n in (3, 2))
        chunks = torch.zeros(batch, length, dtype=torch.int64)
        identity = torch.tensor([[0], [1]]), torch.ones(2, 1)
        for kind in ("p_kl", "h_kl"):
            loss = recipes.x_token(z, chunks, y, chunks, 1, identity, kind=kind)
            assert loss == 0
            assert torch.autograd.grad(loss, z)[0].shape == z.shape


def test_token_projection():
    ours = [b"a", b"201", None, b"", b"ab", b"a", b"\xff", b"aaaaa"]
    theirs = [b"0", b"1", b"2", b"a", b"b", None]
    vocabs = fastkd.ByteVocab(ours), fastkd.ByteVocab(theirs)

    def encode(text):
        return [] if text == b"\xff" else [theirs.index(bytes([x])) for x in text]

    ids, weights = recipes.token_projection(*vocabs, encode, n=3)
    none = [-1, -1, -1]
    right = [[3, -1, -1], [2, 0, 1], none, none, [3, 4, -1], [3, -1, -1], none, [3, 3, 3]]
    assert ids.tolist() == right
    assert ids.dtype == torch.int64
    three = torch.tensor([1, 0.1, 0.01]) / 1.11
    right = torch.zeros(8, 3)
    right[0, 0] = right[5, 0] = 1
    right[1] = right[7] = three
    right[4, :2] = torch.tensor([1, 0.1]) / 1.1
    torch.testing.assert_close(weights, right)
    assert inspect.signature(recipes.token_projection).parameters["n"].default == 4
    with pytest.raises(TypeError, match=r"token_projection: teacher_vocab must be a fastkd\.Byte"):
        recipes.token_projection(vocabs[0], theirs, encode)
    with pytest.raises(ValueError, match="token_projection: n must be positive, got 0"):
        recipes.token_projection(*vocabs, encode, n=0)
    with pytest.raises(IndexError, match=r"ids from encode must lie in \[-1, 6\), got 7"):
        recipes.token_projection(*vocabs, lambda text: [7])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"kind": "gold"}, ValueError, "kind must be one of p_kl, h_kl; got 'gold'"),
        ({"divergence": "jsd"}, ValueError, "divergence must be one of forward_kl, reverse_kl"),
        ({"k": 0}, ValueError, "k must be positive, got 0"),
        ({"cap": 1.5}, TypeError, "cap must be an integer, got float"),
        ({"threshold": 1.1}, ValueError, r"threshold must lie in \[0, 1\], got 1.1"),
        ({"temperature": 0}, ValueError, "temperature must be positive and finite, got 0"),
        ({"epsilon": -1.0}, ValueError, "epsilon must be positive and finite, got -1.0"),
        ({"num_chunks": 4}, IndexError, r"student_chunks must lie in \[-1, 4\), got 4"),
        ({"teacher_chunks": STUDENT_CHUNKS}, ValueError, "teacher_chunks must have shape"),
        ({"mask": torch.ones(3, 7) > 0}, ValueError, r"mask must be bool \[3, 5\]"),
        ({"projection": IDS}, TypeError, "projection must be a pair of tensors, .* got Tensor"),
        ({"projection": (IDS,)}, TypeError, "projection must be a pair of tensors"),
        ({"projection": (IDS, 1.0)}, TypeError, "projection's weights must be a tensor, got float"),
        ({"projection": (IDS[0], WEIGHTS)}, ValueError, r"ids must be \[at most 11, at least 1\]"),
        ({"projection": (IDS, WEIGHTS.T)}, ValueError, r"weights must be float \[9, 2\]"),
        ({"projection": (IDS, IDS)}, ValueError, r"weights must be float .*, got torch.int32"),
        ({"projection": (IDS, -WEIGHTS)}, ValueError, "weights must be finite and not negative"),
        ({"projection": (IDS, WEIGHTS / 0)}, ValueError, "weights must be finite"),
        ({"projection": (IDS + 1, WEIGHTS)}, IndexError, r"ids must lie in \[-1, 9\), got 9"),
        ({"projection": (WEIGHTS, WEIGHTS)}, TypeError, "ids must be int64 or int32"),
        ({"projection": (IDS.to("meta"), WEIGHTS)}, ValueError, "weights must be on the device"),
        (
            {"projection": (IDS.to("meta"), WEIGHTS.to("meta"))},
            ValueError,
            "ids must be on a device that holds values, got meta",
        ),
    ],
)
def test_errors(changed, error, message):
    with pytest.raises(error, match=f"^x_token: .*{message}"):
        recipes.x_token(**{**texts(torch.float32), **changed})


def test_nothing_but_the_student_takes_a_gradient():
    tensors = texts(torch.float32)
    with pytest.raises(ValueError, match="x_token: teacher_logits takes no gradient"):
        recipes.x_token(**{**tensors, "teacher_logits": logits((3, 6, 9)).requires_grad_()})
    weights = WEIGHTS.clone().requires_grad_()
    with pytest.raises(ValueError, match="x_token: projection's weights takes no gradient"):
        recipes.x_token(**{**tensors, "projection": (IDS, weights)})


def test_balanced():
    """As large as the cross-entropy at each step, as the authors add it."""
    tensors = texts(torch.float32)
    z = tensors["student_logits"].requires_grad_()
    kd, ce = recipes.x_token(**tensors), (z**2).mean()
    found = recipes.balanced(kd, ce)
    torch.testing.assert_close(found, ce)
    mine, right = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (found, kd))
    torch.testing.assert_close(mine, right * (ce / kd).detach())
    zero = torch.zeros((), requires_grad=True)
    assert torch.autograd.grad(recipes.balanced(zero, ce), zero)[0] == 1
    with pytest.raises(ValueError, match=r"balanced: other must have the shape \[\] of loss"):
        recipes.balanced(kd, z)
    with pytest.raises(TypeError, match="balanced: other must be a tensor, got float"):
        recipes.balanced(kd, 1.0)
