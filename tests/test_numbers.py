"""Numbers in every form that a caller has them in, and numbers that no op takes."""

import math

import numpy as np
import pytest
import torch

import fastkd
from fastkd import recipes

STUDENT, TEACHER = torch.randn(3, 5), torch.randn(3, 5)
LABELS = torch.tensor([0, 4, 2])
BEST = fastkd.teacher_topk(TEACHER, 2)
IDS, CHUNKS = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 0, 1]])
VOCAB = fastkd.ByteVocab([b"a", b" b", b"c", b"d", None])


def alm(function, *more, **options):
    side = (STUDENT.unsqueeze(0), IDS, CHUNKS)
    return function(*side, 2 * side[0], *side[1:], 2, *more, **options)


LOSSES = {
    "softmax_divergence": lambda n: fastkd.softmax_divergence(STUDENT, TEACHER, normalizer=n),
    "topk_divergence": lambda n: fastkd.topk_divergence(STUDENT, *BEST, normalizer=n),
    "clipped_divergence": lambda n: fastkd.clipped_divergence(
        STUDENT, TEACHER, 0.0, 1.0, normalizer=n
    ),
    "cross_entropy": lambda n: fastkd.cross_entropy(STUDENT, LABELS, normalizer=n),
    "alm_loss": lambda n: alm(fastkd.alm_loss, normalizer=n),
    "alm": lambda n: alm(recipes.alm, VOCAB, VOCAB, normalizer=n),
    "uld": lambda n: recipes.uld(STUDENT, TEACHER, normalizer=n),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_negative_normalizer(name):
    """As a number, an array and a tensor."""
    loss = LOSSES[name]
    for bad in (-2, -2.0, np.array(-2.0), np.float32(-2), torch.tensor(-2), torch.tensor(-2.0)):
        with pytest.raises(ValueError, match=r"\w+: normalizer must not be negative, got -2"):
            loss(bad)
    right = loss(2.0)
    for good in (2, np.array(2), np.int64(2), torch.tensor(2), torch.tensor(2.0)):
        assert torch.equal(loss(good), right)
    for none in (0, 0.0, np.array(0), torch.tensor(0)):
        assert loss(none) == 0


def test_a_compiled_loss_reads_no_normalizer():
    run = torch.compile(
        lambda n: recipes.uld(STUDENT, TEACHER, normalizer=n), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(run(torch.tensor(2.0)), LOSSES["uld"](2.0))


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_weights_of_teachers_that_are_not_finite(number, mix):
    teachers = [TEACHER, STUDENT]
    for weights in ([0.5, number], torch.tensor([0.5, number]), np.array([0.5, number])):
        with pytest.raises(ValueError, match=f"teacher_weights must be finite, got {number}"):
            fastkd.softmax_divergence(STUDENT, teachers, teacher_weights=weights, teacher_mix=mix)


def test_a_row_of_weights_that_are_not_finite_is_nan():
    weights = torch.full((3, 2), 0.5)
    weights[1, 0] = math.nan
    losses = fastkd.softmax_divergence(
        STUDENT, [TEACHER, STUDENT], teacher_weights=weights, reduction="none"
    )
    assert losses.isnan().tolist() == [False, True, False]


def test_weights_in_an_array():
    teachers, weights = [TEACHER, STUDENT], [0.25, 0.75]
    right = fastkd.softmax_divergence(STUDENT, teachers, teacher_weights=weights)
    for same in (np.array(weights), np.array(weights, dtype=np.float32), torch.tensor(weights)):
        found = fastkd.softmax_divergence(STUDENT, teachers, teacher_weights=same)
        torch.testing.assert_close(found, right)
    with pytest.raises(
        TypeError, match="teacher_weights must be a tensor or a sequence of numbers"
    ):
        fastkd.softmax_divergence(STUDENT, teachers, teacher_weights=np.ones((3, 2)))


def test_arrays_of_no_dimension():
    options = {
        "divergence": "jsd",
        "beta": 0.3,
        "temperature": 2.0,
        "label_weight": 0.5,
        "ignore_index": 4,
        "vocab_size": 5,
        "shift": 1,
        "logit_softcap": 5.0,
        "square_temperature": True,
    }
    right = fastkd.softmax_divergence(STUDENT, TEACHER, labels=LABELS, **options)
    for name, value in options.items():
        if name == "divergence":
            continue
        found = fastkd.softmax_divergence(
            STUDENT, TEACHER, labels=LABELS, **{**options, name: np.array(value)}
        )
        assert torch.equal(found, right), name
    with pytest.raises(TypeError, match="square_temperature must be True or False, got int"):
        fastkd.softmax_divergence(STUDENT, TEACHER, square_temperature=np.array(1))


def test_arguments_in_transforms_and_without_values():
    """By the op's own checks where it does not run: shapes, numbers, and indices."""
    meta = torch.empty(3, 5, device="meta")
    for call in (
        lambda x: fastkd.softmax_divergence(x, TEACHER.to(x.device), beta=3.0, divergence="jsd"),
        lambda x: fastkd.softmax_divergence(x, TEACHER.to(x.device)[:, :4]),
        lambda x: fastkd.cross_entropy(x, LABELS.to(x.device)[:2]),
        lambda x: fastkd.topk_divergence(x, BEST[0].to(x.device), BEST[1].to(x.device)[:, :1]),
    ):
        for run in (call, torch.func.grad(call), torch.func.grad(lambda x, f=call: f(x).sum())):
            with pytest.raises(ValueError, match=r"^\w+: "):
                run(STUDENT)
        with pytest.raises(ValueError, match=r"^\w+: "):
            call(meta)
    for name, call in (
        ("softmax_divergence", lambda x: fastkd.softmax_divergence(x, TEACHER, labels=LABELS + 1)),
        ("cross_entropy", lambda x: fastkd.cross_entropy(x, LABELS + 1)),
        ("token_log_probs", lambda x: fastkd.token_log_probs(x, LABELS + 1).sum()),
        ("topk_divergence", lambda x: fastkd.topk_divergence(x, BEST[0], BEST[1] + 4)),
    ):
        for run in (call, torch.func.grad(call)):
            with pytest.raises(IndexError, match=f"{name}: .*must lie in"):
                run(STUDENT)


@pytest.mark.parametrize("bad", [2, "no", None])
def test_inplace_is_a_flag(bad):
    for call in (
        lambda: fastkd.softmax_divergence(STUDENT, TEACHER, inplace=bad),
        lambda: fastkd.cross_entropy(STUDENT, LABELS, inplace=bad),
    ):
        with pytest.raises(TypeError, match=r"\w+: inplace must be True or False, got"):
            call()
