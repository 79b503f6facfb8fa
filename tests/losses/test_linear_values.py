"""Every op that takes logits, of a linear head: the same values and gradients as of its logits."""

import pytest
import torch
from cases import DIVERGENCES
from heads import gradients, head

import fastkd
from fastkd import LinearLogits

ROWS, FEATURES, VOCAB = (3, 13), 6, 29
CHUNKS = ({"chunk_size": 5}, {}, {"chunk_size": 7, "compact": False})


def kernels():
    """The dtype that the kernels in use are tested with, and how far from the whole logits."""
    if torch.ops.fastkd.name == "fastkd":
        return torch.float64, 1e-9
    return torch.float32, 2e-5


def sides(dtype=None, options=None, rows=ROWS):
    dtype = dtype or kernels()[0]
    student, teacher = head(rows, FEATURES, VOCAB, dtype), head(rows, 4, VOCAB, dtype)
    options = options or {}
    return (
        LinearLogits(*student, scale=0.5, **options),
        LinearLogits(*teacher, scale=0.8, **options),
        [*student, *teacher],
    )


def agree(call, inputs):
    """`call(True)` takes linear logits, `call(False)` the same stored whole."""
    error = kernels()[1]
    found, true = call(True), call(False)
    pairs = [(found, true)] if isinstance(found, torch.Tensor) else zip(found, true, strict=True)
    for mine, exact in pairs:
        assert (mine is None) == (exact is None)
        if mine is not None:
            assert mine.dtype == exact.dtype
            assert mine.shape == exact.shape
            torch.testing.assert_close(mine, exact, rtol=error, atol=error, equal_nan=True)
    if any(x is not None and x.requires_grad for x in pairs_of(true)):
        for mine, exact in zip(gradients(found, inputs), gradients(true, inputs), strict=True):
            torch.testing.assert_close(mine, exact, rtol=error, atol=error)


def pairs_of(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def whole(logits, linear):
    return logits if linear else logits.logits()


OPTIONS = {
    "mean": {},
    "none": {"reduction": "none", "temperature": 2.0},
    "mask": {"mask": torch.arange(39).view(ROWS) % 3 > 0},
    "no-row": {"mask": torch.zeros(ROWS, dtype=torch.bool)},
    "mask-none": {"mask": torch.arange(39).view(ROWS) % 3 > 0, "reduction": "none"},
    "weight": {"weight": (torch.arange(39).view(ROWS) % 4).double(), "reduction": "batchmean"},
    "labels": {
        "labels": torch.where(torch.arange(39).view(ROWS) % 5 > 0, 3, -100),
        "label_weight": torch.linspace(0, 1, 39).view(ROWS),
    },
    "shift": {
        "shift": 2,
        "labels": (torch.arange(39) % VOCAB).view(ROWS),
        "mask": torch.arange(39).view(ROWS) % 3 > 0,
        "reduction": "none",
    },
    "shift-all": {"shift": 20},
    "shift-elements": {"shift": 1, "reduction": "elementmean"},
    "vocab": {"vocab_size": 20, "reduction": "elementmean"},
    "numbers": {
        "divergence": "jsd",
        "beta": torch.linspace(0, 1, 39).view(ROWS),
        "temperature": torch.linspace(0.5, 2, 39).view(ROWS),
        "teacher_temperature": 1.5,
        "square_temperature": True,
    },
    "softcap": {"logit_softcap": (2.0, 3.0)},
    "normalizer": {"normalizer": 3.0},
    "normalizer-tensor": {"normalizer": torch.tensor(7.0)},
    "normalizer-zero": {"normalizer": torch.tensor(0.0)},
}


@pytest.mark.parametrize("chunks", CHUNKS, ids=("small", "default", "not-compact"))
@pytest.mark.parametrize("name", OPTIONS)
def test_softmax_divergence(name, chunks, backend):
    student, teacher, inputs = sides(options=chunks)
    agree(
        lambda linear: fastkd.softmax_divergence(
            whole(student, linear), whole(teacher, linear), **OPTIONS[name]
        ),
        inputs,
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence(divergence):
    student, teacher, inputs = sides(options={"chunk_size": 16})
    agree(
        lambda linear: fastkd.softmax_divergence(
            whole(student, linear), whole(teacher, linear), divergence=divergence, beta=0.3
        ),
        inputs,
    )


def test_one_side_linear():
    """The other is a tensor, whose gradient is its own."""
    student, _, inputs = sides(options={"chunk_size": 16})
    logits = torch.randn(*ROWS, VOCAB, dtype=torch.float64).mT.contiguous().mT.requires_grad_()
    mask = torch.arange(39).view(ROWS) % 3 > 0
    for sides_of in (lambda x: (x, logits), lambda x: (logits, x)):
        agree(
            lambda linear, order=sides_of: fastkd.softmax_divergence(
                *order(whole(student, linear)), mask=mask, divergence="jsd"
            ),
            [*inputs[:3], logits],
        )


@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_lists_of_teachers(mix):
    student, teacher, inputs = sides(options={"chunk_size": 16})
    capped = LinearLogits(*(x.detach() for x in head(ROWS, 5, VOCAB)), softcap=2.0)
    dense = torch.randn(*ROWS, VOCAB, dtype=torch.float64)
    teacher = teacher.detach()
    for weights in ([0.2, 0.3, 0.5], torch.rand(*ROWS, 3)):
        agree(
            lambda linear, weights=weights: fastkd.softmax_divergence(
                whole(student, linear),
                [whole(teacher, linear), dense, whole(capped, linear)],
                teacher_weights=weights,
                teacher_mix=mix,
            ),
            inputs[:3],
        )


@pytest.mark.parametrize("rows", [(3, 13), (7,), ()], ids=str)
def test_other_ops(rows, backend):
    """Rows of any rank, also of one row without leading dimensions."""
    student, teacher, inputs = sides(options={"chunk_size": 5}, rows=rows)
    mine = inputs[:3]
    best = fastkd.teacher_topk(teacher, 4)
    agree(lambda k: fastkd.teacher_topk(whole(teacher, k), 4, vocab_size=20), [])
    mask, taus = torch.rand(rows) < 0.7, torch.rand(rows) + 0.5
    ids = torch.randint(0, VOCAB, rows)
    agree(
        lambda k: fastkd.topk_divergence(whole(student, k), *best, mask=mask, tail="uniform"), mine
    )
    agree(lambda k: fastkd.topk_stats(whole(student, k), *best, mask=mask, temperature=2.0), [])
    lower = torch.full(rows, 0.01, dtype=kernels()[0], requires_grad=True)
    agree(
        lambda k: fastkd.clipped_divergence(
            whole(student, k), whole(teacher, k), lower, 0.9, softness=0.1, mask=mask
        ),
        [*inputs, lower],
    )
    agree(
        lambda k: fastkd.token_stats(
            whole(student, k), whole(teacher, k), labels=ids, temperature=taus
        ),
        [],
    )
    agree(lambda k: fastkd.token_stats(whole(student, k)), [])
    agree(
        lambda k: fastkd.cross_entropy(
            whole(student, k), ids, entropy_weight=0.1, entropy_mask="correct", z_loss_weight=0.1
        ),
        mine,
    )
    for entropy in (True, False):
        agree(
            lambda k, entropy=entropy: fastkd.token_log_probs(
                whole(student, k), ids, mask=mask, entropy=entropy
            ),
            mine,
        )


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"softcap": 2.0, "chunk_size": 5}])
def test_soft_caps_in_every_op(options):
    """Also in those that have no option for it."""
    parts = head(ROWS, FEATURES, VOCAB), head(ROWS, 4, VOCAB)
    student, teacher = (LinearLogits(*x, **options) for x in parts)
    ids, chunks = torch.randint(0, VOCAB, ROWS), (torch.arange(39) % 13 // 3).view(ROWS)
    best = fastkd.teacher_topk(teacher, 4)
    boundary = torch.arange(VOCAB) % 3 == 0

    def alm(s, t):
        given = ids, chunks
        both = {"student_boundary": boundary, "teacher_boundary": boundary}
        return fastkd.alm_loss(s, *given, t, *given, 5, temperature=2.0, **both)

    agree(lambda k: fastkd.topk_stats(whole(student, k), *best), [])
    agree(lambda k: fastkd.teacher_topk(whole(teacher, k), 4), [])
    agree(lambda k: fastkd.token_stats(whole(student, k), whole(teacher, k)), [])
    agree(lambda k: fastkd.topk_divergence(whole(student, k), *best), parts[0])
    agree(lambda k: fastkd.cross_entropy(whole(student, k), ids), parts[0])
    agree(lambda k: fastkd.token_log_probs(whole(student, k), ids), parts[0])
    agree(
        lambda k: fastkd.clipped_divergence(whole(student, k), whole(teacher, k), 0.01, 0.9),
        parts[0],
    )
    agree(lambda k: alm(whole(student, k), whole(teacher, k)), [*parts[0], *parts[1]])


def test_shifted_ops(backend):
    student, _, inputs = sides(options={"chunk_size": 5})
    ids = torch.randint(0, VOCAB, ROWS)
    chosen = torch.rand(ROWS) < 0.7
    agree(
        lambda k: fastkd.cross_entropy(
            whole(student, k), ids, entropy_weight=0.1, entropy_mask=chosen, shift=1
        ),
        inputs[:3],
    )
    agree(
        lambda k: fastkd.token_log_probs(whole(student, k), ids, mask=chosen, shift=1), inputs[:3]
    )


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_chunk_log_likelihood(softcap, backend):
    """Whole texts, each of several chunks of rows."""
    for rows in ((5, 13), (2, 2, 13), (13,)):
        inputs = head(rows, FEATURES, VOCAB, kernels()[0])
        logits = LinearLogits(*inputs, softcap=softcap, chunk_size=30)
        ids = torch.randint(0, VOCAB, rows)
        chunks = (torch.arange(13) // 3).expand(rows)
        agree(
            lambda k, logits=logits, ids=ids, chunks=chunks: fastkd.chunk_log_likelihood(
                whole(logits, k), ids, chunks, 6, boundary=torch.arange(VOCAB) % 3 == 0
            ),
            inputs,
        )


def test_softcaps_of_heads(backend):
    """A head's soft cap is the op's where it has one."""
    student, teacher, inputs = sides()
    capped = LinearLogits(*inputs[:3], softcap=1.5)
    best = fastkd.teacher_topk(teacher, 4)
    ids = torch.randint(0, VOCAB, ROWS)
    agree(lambda k: fastkd.topk_divergence(whole(capped, k), *best), inputs[:3])
    agree(lambda k: fastkd.softmax_divergence(whole(capped, k), whole(teacher, k)), inputs)
    agree(lambda k: fastkd.softmax_divergence(student.logits(), whole(capped, k)), inputs[:3])
    agree(lambda k: fastkd.token_log_probs(whole(capped, k), ids), inputs[:3])
    agree(lambda k: fastkd.teacher_topk(whole(capped, k), 3), [])
    agree(lambda k: fastkd.token_stats(whole(capped, k), whole(teacher, k)), [])


def test_the_function_in_one_call():
    student, teacher, inputs = sides()
    h, w, b, ht, wt, bt = inputs
    options = {"divergence": "jsd", "labels": torch.randint(0, 25, ROWS), "vocab_size": 25}
    more = {"student_bias": b, "teacher_bias": bt, "logit_scale": (0.5, 0.8), "logit_softcap": 4.0}
    found = fastkd.linear_softmax_divergence(h, w, ht, wt, **more, **options)
    true = fastkd.reference.linear_softmax_divergence(h, w, ht, wt, **more, **options)
    torch.testing.assert_close(found, true)
    for mine, exact in zip(gradients(found, inputs), gradients(true, inputs), strict=True):
        torch.testing.assert_close(mine, exact)
    module = fastkd.nn.LinearSoftmaxDivergence(divergence="jsd", **more)
    again = module(h, w, ht, wt, labels=options["labels"], vocab_size=25)
    assert torch.equal(again, found)
    definition = fastkd.reference.softmax_divergence(student, teacher)
    torch.testing.assert_close(definition, fastkd.softmax_divergence(student, teacher))


@pytest.mark.parametrize("compact", [None, False])
@pytest.mark.parametrize("softcap", [None, (2.0, 3.0)])
def test_statistics_from_the_same_logits(softcap, compact):
    h, w, b, ht, wt, bt = head(ROWS, FEATURES, VOCAB) + head(ROWS, 4, VOCAB)
    labels = torch.randint(0, VOCAB, ROWS)
    labels[0, :3] = -1
    mask = torch.arange(39).view(ROWS) % 3 > 0
    with torch.no_grad():
        student = LinearLogits(h, w, b, softcap=softcap and 2.0).logits()
        teacher = LinearLogits(ht, wt, bt, softcap=softcap and 3.0).logits()
    read = mask & (labels != -1)
    true = fastkd.token_stats(
        student, teacher, labels=torch.where(read, labels, -100), temperature=2.0
    )
    for reduction in ("mean", "none"):
        loss, stats = fastkd.linear_softmax_divergence(
            h, w, ht, wt, student_bias=b, teacher_bias=bt, mask=mask, labels=labels,
            ignore_index=-1, logit_softcap=softcap, return_stats=True, chunk_size=7,
            compact=compact, reduction=reduction, temperature=2.0,
        )  # fmt: skip
        alone = fastkd.linear_softmax_divergence(
            h, w, ht, wt, student_bias=b, teacher_bias=bt, mask=mask, labels=labels,
            ignore_index=-1, logit_softcap=softcap, reduction=reduction, temperature=2.0,
        )  # fmt: skip
        torch.testing.assert_close(loss, alone)
        assert loss.requires_grad
        for name, mine, exact in zip(stats._fields[:-1], stats[:-1], true[:-1], strict=True):
            assert not mine.requires_grad
            absent = -1 if "argmax" in name else 0
            torch.testing.assert_close(mine, torch.where(read, exact, absent))
    teachers = [x.detach() for x in (ht, wt)]
    _, stats = fastkd.linear_softmax_divergence(h, w, *teachers, return_stats=True)
    assert stats.student_label_log_prob is None
    assert stats.forward_kl.shape == ROWS
