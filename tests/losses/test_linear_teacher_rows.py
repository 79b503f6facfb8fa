"""teacher_rows with logits of heads: the hidden states of the rows that teach."""

import pytest
import torch
from heads import compiled, gradients, head

import fastkd
from fastkd import LinearLogits

VOCAB, ROWS = 19, torch.tensor([[3, -1, 3], [0, 2, -1]])
OPTIONS = (
    {},
    {"labels": torch.tensor([[1, 2, 3], [4, -100, 6]]), "label_weight": 0.4},
    {"shift": 1, "mask": torch.tensor([[True, True, False], [True, False, True]])},
    {"divergence": "jsd", "reduction": "none", "temperature": 1.7},
    {"shift": 5},
)


def problem(dtype=torch.float64):
    """Hidden states of 2 x 3 rows, and of a teacher with 4."""
    torch.manual_seed(5)
    return [*head((2, 3), 5, VOCAB, dtype), *head(4, 3, VOCAB, dtype)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_is_the_definition(options, chunk_size):
    """Whichever side is a head; also gradients of the teacher's head."""
    inputs = problem()
    h, w, b, t, v, c = inputs
    student = LinearLogits(h, w, b, chunk_size=chunk_size)
    teacher = LinearLogits(t, v, c, chunk_size=chunk_size)
    dense = student.logits()
    given = {"teacher_rows": ROWS, **options}
    chosen = t[ROWS.clamp(min=0)] @ v.T + c
    within = torch.arange(3) < 3 - options.get("shift", 0)
    mask = options.get("mask", torch.ones(2, 3, dtype=torch.bool))
    shift = options.get("shift", 0)
    mask = (ROWS >= 0) & mask.roll(-shift, -1) & within
    plain = {k: x for k, x in options.items() if k not in ("mask", "shift")}
    true = fastkd.softmax_divergence(dense, chosen, mask=mask, **plain)
    exact = gradients(true, inputs)
    found = fastkd.softmax_divergence(student, teacher, **given)
    torch.testing.assert_close(found, true)
    torch.testing.assert_close(gradients(found, inputs), exact)
    torch.testing.assert_close(fastkd.softmax_divergence(dense, teacher, **given), true)
    found = fastkd.softmax_divergence(student, teacher.logits().detach(), **given)
    torch.testing.assert_close(found, true)
    torch.testing.assert_close(gradients(found, [h, w, b]), exact[:3])
    found = fastkd.softmax_divergence(dense, [teacher.detach()] * 2, **given)
    torch.testing.assert_close(found, true)
    reference = fastkd.reference.linear_softmax_divergence(
        h, w, t, v, student_bias=b, teacher_bias=c, **given
    )
    torch.testing.assert_close(reference, true)


def test_unread_rows_statistics_and_nothing():
    h, w, b, t, v, c = problem()
    with torch.no_grad():
        h[ROWS < 0] = torch.nan
        t[1] = torch.nan  # teaches nobody
    loss, stats = fastkd.linear_softmax_divergence(
        h, w, t, v, teacher_rows=ROWS, return_stats=True, student_bias=b, teacher_bias=c
    )
    found = gradients(loss, [h, w, b, t, v, c])
    assert all(x.isfinite().all() for x in found)
    assert (found[0][ROWS < 0] == 0).all()
    assert (found[3][1] == 0).all()
    assert torch.equal(stats.student_argmax == -1, ROWS < 0)
    none = torch.full_like(ROWS, -1)
    for count in (0, 4):
        loss = fastkd.linear_softmax_divergence(h, w, t[:count], v, teacher_rows=none)
        assert loss == 0
        assert all((x == 0).all() for x in gradients(loss, [h, w, v]))


def test_one_graph_and_second_derivatives():
    inputs = [x.detach() for x in problem()]
    h, w, _, t, v, _ = inputs

    def losses(h, w, t, v, rows):
        student = LinearLogits(h, w)
        other = fastkd.softmax_divergence(student, t @ v.T, teacher_rows=rows, shift=1)
        return fastkd.linear_softmax_divergence(h, w, t, v, teacher_rows=rows, shift=1) + other

    graph, counter = compiled(losses, "aot_eager")
    for rows, others in ((2, 4), (3, 6), (5, 9)):
        at = torch.arange(3 * rows).view(rows, 3) % (others + 1) - 1
        h, w, t, v = torch.randn(rows, 3, 5), torch.randn(7, 5), torch.randn(others, 3), v[:7]
        parts = [h.requires_grad_(), w.requires_grad_(), t, v.float()]
        found, true = graph(*parts, at), losses(*parts, at)
        torch.testing.assert_close(found, true)
        torch.testing.assert_close(gradients(found, parts[:2]), gradients(true, parts[:2]))
    assert counter.frame_count <= 2
    leaves = [x.requires_grad_() for x in (inputs[0], inputs[1], inputs[3], inputs[4])]
    assert torch.autograd.gradgradcheck(
        lambda h, w, t, v: fastkd.linear_softmax_divergence(h, w, t, v, teacher_rows=ROWS),
        leaves,
        fast_mode=True,
    )


def test_errors():
    h, w, _, t, v, _ = (x.detach() for x in problem())
    student, teacher, f = LinearLogits(h, w, chunk_size=2), LinearLogits(t, v), None
    f = fastkd.softmax_divergence
    for other in (teacher, teacher.logits()):
        with pytest.raises(IndexError, match=r"teacher_rows must lie in \[-1, 4\), got 4 in row 4"):
            f(student, other, teacher_rows=torch.tensor([[0, 1, -1], [0, 4, 1]]))
        with pytest.raises(IndexError, match=r"teacher_rows must lie in \[-1, 4\), got -2"):
            f(student, other, teacher_rows=ROWS - 1)
        with pytest.raises(TypeError, match="teacher_rows must be int64 or int32, got"):
            f(student, other, teacher_rows=ROWS.float())
        with pytest.raises(ValueError, match="teacher_rows must have one entry a row"):
            f(student, other, teacher_rows=ROWS[:1])
        with pytest.raises(ValueError, match="mask must have one entry a row"):
            f(student, other, teacher_rows=ROWS, mask=ROWS[:1] > 0)
    with pytest.raises(IndexError, match=r"^linear_softmax_divergence: teacher_rows must lie in"):
        fastkd.linear_softmax_divergence(h, w, t, v, teacher_rows=ROWS + 1)
    with pytest.raises(NotImplementedError, match="all LinearLogits, or all tensors"):
        f(student, [teacher, teacher.logits()], teacher_rows=ROWS)
    with pytest.raises(ValueError, match="teacher_logits must all have the same number of rows"):
        f(student, [teacher, LinearLogits(t[:2], v)], teacher_rows=ROWS)
    with pytest.raises(ValueError, match="take no gradient with teacher_rows"):
        f(student, teacher.logits().requires_grad_(), teacher_rows=ROWS)
    with pytest.raises(ValueError, match="teacher_rows must be on the device"):
        f(student, teacher, teacher_rows=ROWS.to("meta"))
