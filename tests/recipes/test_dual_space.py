"""dskd against its definition, text by text, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import logits
from test_cross_tokenizer import check_gradients

import fastkd
from fastkd import recipes
from fastkd.recipes import _rowwise


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks of rows, the last one short."""
    monkeypatch.setattr(_rowwise, "_ENTRIES", 100)


def dskd_problem(dtype=torch.float32, same=False):
    """Two sides with what they hold of padding poisoned, ids, maps."""
    shapes = ((2, 6, 40, 4), (2, 6 if same else 5, 30, 3 if not same else 4))
    parts, masks = [], []
    for batch, length, vocab, width in shapes:
        hidden, embeddings = (logits((batch, length, width), dtype, 1.0) for _ in range(2))
        parts.append([logits((batch, length, vocab), dtype), hidden, embeddings])
        masks.append(torch.arange(length).expand(batch, -1) < torch.tensor([[length], [4]]))
    heads = [logits((vocab, width), dtype, 1.0) for *_, vocab, width in shapes]
    maps = [logits(shape, dtype, 0.5) for shape in ((6, 8), (4, 3), (3, 4))]
    return parts, masks, heads, maps, torch.randint(0, 40, (2, 6))


def plain_dskd(parts, masks, heads, maps, ids, only_correct, divergence):
    """Text by text, on the rows that lead to a token that counts."""
    (s, t), (query, to_student, to_teacher) = parts, maps
    steps = [[[u - 1 for u in row.nonzero()[:, 0].tolist() if u] for row in mask] for mask in masks]

    def of(side, which, shift):
        rows = [
            side[which][text, [u + shift for u in own]] for text, own in enumerate(steps[side is t])
        ]
        return rows

    index = [
        [torch.cat(x, -1) for x in zip(of(side, 2, 0), of(side, 2, 1), strict=True)]
        for side in parts
    ]
    spread = [torch.cat(x).std() for x in (index[1], of(t, 1, 0), of(t, 2, 1))]
    totals, counts = [0, 0], [0, 0]
    for text, (own, its) in enumerate(zip(*steps, strict=True)):
        scores = (index[0][text] @ query.T) @ (index[1][text] / spread[0]).T / math.sqrt(6)
        values = of(t, 1, 0)[text] / spread[1] + of(t, 2, 1)[text] / spread[2]
        z = scores.softmax(-1) @ (values @ to_student.T) @ heads[0].T
        label = ids[text, [u + 1 for u in own]]
        kd = fastkd.reference.softmax_divergence(
            s[0][text, own], z.detach(), divergence=divergence, beta=0.1, reduction="none"
        )
        kd = kd * (z.argmax(-1) == label) if only_correct else kd
        totals[0] = totals[0] + kd.sum() + F.cross_entropy(z, label, reduction="sum")
        back = scores.T.softmax(-1) @ (of(s, 1, 0)[text] @ to_teacher.T) @ heads[1].T
        totals[1] = totals[1] + fastkd.reference.softmax_divergence(
            back, t[0][text, its], reduction="sum"
        )
        counts = [counts[0] + len(own), counts[1] + len(its)]
    return totals[0] / counts[0] + totals[1] / counts[1]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "skew_kl"])
@pytest.mark.parametrize("only_correct", [True, False])
def test_dskd(divergence, only_correct):
    parts, masks, heads, maps, ids = dskd_problem()
    options = {"only_correct": only_correct, "divergence": divergence, "beta": 0.1}

    def run(z, hidden, embeddings, *maps):
        poison = [torch.where(m.unsqueeze(-1), 0, math.nan) for m in masks]
        # Rows of padding whose next token counts for nothing, and the last one, are not looked at.
        student = recipes.DskdSide(
            z + poison[0], hidden + poison[0], embeddings, heads[0], masks[0]
        )
        teacher = recipes.DskdSide(*parts[1], heads[1], masks[1])
        functions = [lambda x, w=w: x @ w.T for w in maps]
        names = ("query", "to_student", "to_teacher")
        return recipes.dskd(
            student, teacher, ids, **dict(zip(names, functions, strict=True)), **options
        )

    def exact(z, hidden, embeddings, *maps):
        wide = [[z, hidden, embeddings], [x.double() for x in parts[1]]]
        others = [x.double() for x in heads], maps, ids
        return plain_dskd(wide, masks, *others, only_correct, divergence)

    check_gradients(run, exact, (*parts[0], *maps), tolerance=5e-5)


def test_dskd_of_one_tokenizer():
    parts, masks, heads, _, ids = dskd_problem(same=True)
    student, teacher = (
        recipes.DskdSide(*p, h, masks[0]) for p, h in zip(parts, heads, strict=True)
    )
    weight = torch.randn(4, 4)
    options = {"query": None, "to_teacher": None, "reduction": "sum"}
    loss = recipes.dskd(student, teacher, ids, to_student=lambda x: x @ weight.T, **options)
    z = (teacher.hidden @ weight.T @ heads[0].T)[:, :-1][masks[0][:, 1:]]
    labels = ids[:, 1:][masks[0][:, 1:]]
    rows = student.logits[:, :-1][masks[0][:, 1:]]
    kl = fastkd.softmax_divergence(rows, z, reduction="sum")
    torch.testing.assert_close(loss, kl + F.cross_entropy(z, labels, reduction="sum"))
    half = recipes.dskd(
        student, teacher, ids, to_student=lambda x: x @ weight.T, normalizer=(2.0, 1.0), **options
    )
    torch.testing.assert_close(half, loss / 2)


def test_dskd_without_tokens():
    parts, masks, heads, maps, ids = dskd_problem()
    masks[1][:] = False
    leaf = parts[0][0].requires_grad_()
    student, teacher = (
        recipes.DskdSide(*p, h, m) for p, h, m in zip(parts, heads, masks, strict=True)
    )
    names = ("query", "to_student", "to_teacher")
    functions = {name: (lambda x, w=w: x @ w.T) for name, w in zip(names, maps, strict=True)}
    loss = recipes.dskd(student, teacher, ids, **functions)
    loss.backward()
    assert loss == 0
    assert not leaf.grad.any()


@pytest.mark.parametrize("space", ["student", "teacher"])
def test_dskd_gradcheck(space):
    """In the student's space of its logits: to what makes the target, that is a constant."""
    parts, _, heads, maps, ids = dskd_problem(torch.float64)
    parts = [[x[:1, :4] for x in own] for own in parts]
    teacher = recipes.DskdSide(*parts[1], heads[1])

    def run(z, hidden, embeddings, *maps):
        student = recipes.DskdSide(z, hidden, embeddings, heads[0])
        functions = [lambda x, w=w: x @ w.T for w in maps]
        named = dict(zip(("query", "to_student", "to_teacher"), functions, strict=True))
        named["to_teacher" if space == "student" else "to_student"] = None
        return recipes.dskd(student, teacher, ids[:1, :4], only_correct=False, **named)

    leaves = [*parts[0], *maps]
    for number in (0,) if space == "student" else (1, 2, 3, 5):
        leaf = leaves[number].clone().requires_grad_()

        def of_one(x, number=number):
            return run(*(x if i == number else y for i, y in enumerate(leaves)))

        assert torch.autograd.gradcheck(of_one, leaf)
        assert torch.autograd.gradgradcheck(of_one, leaf)
        assert torch.autograd.grad(of_one(leaf), leaf)[0].any()


def test_dskd_errors():
    parts, masks, heads, maps, ids = dskd_problem()
    student, teacher = (
        recipes.DskdSide(*p, h, m) for p, h, m in zip(parts, heads, masks, strict=True)
    )
    query, to_student, to_teacher = ((lambda x, w=w: x @ w.T) for w in maps)
    given = {"query": query, "to_student": to_student, "to_teacher": to_teacher}
    hidden, leaf = student.hidden, teacher.logits.clone().requires_grad_()
    for changes, options, error, message in (
        ((tuple(student), teacher), {}, TypeError, "dskd: student must be a DskdSide, got tuple"),
        (
            (student._replace(hidden=hidden[:, 1:]), teacher),
            {},
            ValueError,
            "dskd: student.hidden must have logits' 6 rows a text, got 5",
        ),
        (
            (student._replace(head=heads[1]), teacher),
            {},
            ValueError,
            r"dskd: student.head must be \[40, 4\], got \[30, 3\]",
        ),
        ((student._replace(mask=ids), teacher), {}, ValueError, "dskd: student.mask must be bool"),
        (
            (student, teacher._replace(logits=leaf)),
            {},
            ValueError,
            "dskd: teacher.logits takes no gradient",
        ),
        (
            (student, teacher),
            {"to_student": None, "to_teacher": None},
            ValueError,
            "dskd: to_student or to_teacher must be given",
        ),
        ((student, teacher), {"query": None}, ValueError, "dskd: without a query .* 6 rows .* 5"),
        (
            (student, teacher),
            {"query": lambda x: x},
            ValueError,
            "dskd: query must give 6 channels, .* got 8",
        ),
        ((student, teacher), {"reduction": "none"}, ValueError, "dskd: reduction must be mean"),
        ((student, teacher), {"normalizer": 3.0}, ValueError, "dskd: normalizer must be two"),
    ):
        with pytest.raises(error, match=message):
            recipes.dskd(*changes, ids, **{**given, **options})
    with pytest.raises(IndexError, match=r"dskd: student_ids must lie in \[0, 40\), got 40"):
        recipes.dskd(student, teacher, ids.clone().fill_(40), **given)
