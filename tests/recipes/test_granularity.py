"""mgsr and its parts against their definitions."""

import math

import pytest
import torch
from cases import logits
from recipe_checks import (
    Entry,
    by_rows,
    kept_of,
    mixed_dtypes,
    one_graph,
    one_graph_for_all,
    problem,
    promises,
    reduced,
    with_leaves,
)

import fastkd
from fastkd import recipes
from fastkd.recipes import _rowwise


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks of rows, the last one short."""
    monkeypatch.setattr(_rowwise, "_ENTRIES", 40)


def with_spans(*extra):
    def make(dtype):
        tensors = problem(dtype, *extra)
        tensors["spans"] = torch.tensor([[0, 0, 0, 1, 1], [2, 2, 2, 2, -1], [0, 1, -1, -1, 2]])
        tensors["mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
        return tensors

    return make


def with_bounds(dtype):
    tensors = with_spans("labels")(dtype)
    shape = tensors["mask"].shape
    tensors["lower"], tensors["upper"] = (
        (torch.rand(shape, dtype=torch.float64) * 0.3 + low).to(dtype) for low in (0.1, 0.6)
    )
    return tensors


def pairs_of(tensors):
    kept, spans = kept_of(tensors), tensors["spans"]
    found = torch.zeros(3, 4, dtype=torch.bool)
    for b in range(3):
        for t in range(4):
            same = spans[b, t] == spans[b, t + 1] and spans[b, t] >= 0
            found[b, t] = kept[b, t] and kept[b, t + 1] and same
    return found


def plain_span(tensors, distance="l2"):
    losses, pairs = [], pairs_of(tensors)
    for b in range(3):
        for t in range(4):
            q, p = (
                x[b, t].softmax(-1) * x[b, t + 1].softmax(-1)
                for x in (tensors["student_logits"], tensors["teacher_logits"])
            )
            if not pairs[b, t]:
                losses.append(torch.zeros(()).double())
            elif distance == "l2":
                losses.append(sum((p[v] - q[v]) ** 2 for v in range(len(p))))
            else:
                q, p = q / q.sum(), p / p.sum()
                losses.append(sum(p[v] * (p[v] / q[v]).log() for v in range(len(p))))
    return torch.stack(losses).view(3, 4)


def plain_mgsr(tensors, weights=(1.0, 1.0, 1.0), softness=0.01, distance="l2", reduction="mean"):
    def row(student_logits, teacher_logits, labels, lower, upper, spans):
        q, p = student_logits.log_softmax(-1), teacher_logits.softmax(-1)
        low, high = (torch.quantile(p, level) for level in (lower, upper))
        total = -weights[0] * q[labels]
        for v in range(len(p)):
            inside = torch.sigmoid((p[v] - low) / softness) * torch.sigmoid(
                (high - p[v]) / softness
            )
            inside = torch.ones(()) if v == labels else inside
            total = total + weights[1] * inside * p[v] * (p[v].log() - q[v])
        return total

    first = reduced(by_rows(row)(tensors), kept_of(tensors), reduction)
    second = reduced(plain_span(tensors, distance), pairs_of(tensors), reduction)
    return first + weights[2] * second


SPAN = {
    "problem": with_spans(),
    "reductions": ("none", "sum", "mean", "batchmean", "sequence_mean"),
    "counted": pairs_of,
}
BOUNDED = {
    "problem": with_bounds,
    "leaves": ("student_logits", "lower", "upper"),
    "reductions": (),
}
ENTRIES = [
    Entry("mgsr_span", plain_span, published={"distance": "l2"}, **SPAN),
    Entry("mgsr_span", plain_span, {"distance": "kl"}, **SPAN),
    Entry(
        "mgsr",
        plain_mgsr,
        published={"weights": (1.0, 1.0, 1.0), "renormalize": "none", "softness": 0.01},
        bf16_error=0.1,  # of bounds rounded to bfloat16, at soft edges of width 0.01
        **BOUNDED,
    ),
    Entry(
        "mgsr",
        plain_mgsr,
        {"weights": (0.5, 2.0, 3.0), "softness": 0.1, "distance": "kl"},
        bf16_error=0.03,
        **BOUNDED,
    ),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)
GIVEN = with_bounds(torch.float32)
test_one_graph_for_all_numbers = one_graph_for_all(
    {"all": lambda x: recipes.mgsr(**GIVEN, weights=(x, x, x), softness=x)}
)


def test_mgsr_by_texts():
    tensors = with_leaves(ENTRIES[2], with_bounds(torch.float64))
    for reduction in ("sum", "batchmean", "sequence_mean"):
        found = recipes.mgsr(**tensors, reduction=reduction)
        torch.testing.assert_close(found, plain_mgsr(tensors, reduction=reduction))


def test_equal_models_and_short_spans():
    tensors = with_bounds(torch.float64)
    same = {**tensors, "student_logits": tensors["teacher_logits"]}
    label_only = recipes.sequence_kd(same["student_logits"], same["labels"], mask=same["mask"])
    torch.testing.assert_close(recipes.mgsr(**same), label_only)
    sides = (tensors["student_logits"], tensors["teacher_logits"])
    for distance in ("l2", "kl"):
        assert recipes.mgsr_span(*sides[1:], *sides[1:], same["spans"], distance=distance) < 1e-15
        apart = torch.arange(5).expand(3, 5)
        assert recipes.mgsr_span(*sides, apart, distance=distance) == 0
        nowhere = torch.full((3, 5), -1)
        assert recipes.mgsr_span(*sides, nowhere, distance=distance) == 0


def test_normalised_products_are_softmaxes_of_sums():
    z, y = logits((2, 9), torch.float64)
    product = z.softmax(-1) * y.softmax(-1)
    torch.testing.assert_close(product / product.sum(), (z + y).softmax(-1))


def test_mgsr_position():
    tensors = problem(torch.float32)
    z, y, mask = (tensors[x] for x in ("student_logits", "teacher_logits", "mask"))
    y[1] = z[1] * 0.5  # the same likeliest tokens
    right = []
    for b in range(3):
        worst, place = -math.inf, -1
        for t in mask[b].nonzero()[:, 0].tolist():
            value = fastkd.softmax_divergence(z[b, t], y[b, t]).item()
            if z[b, t].argmax() != y[b, t].argmax() and value > worst:
                worst, place = value, t
        right.append(place)
    assert right[0] >= 0
    assert right[1] == -1
    z, y = (torch.where(mask.unsqueeze(-1), x, math.nan) for x in (z, y))
    assert recipes.mgsr_position(z, y, mask).tolist() == right
    assert recipes.mgsr_position(z[:, :0], y[:, :0], mask[:, :0]).tolist() == [-1] * 3


def test_errors():
    tensors = with_bounds(torch.float32)
    with pytest.raises(ValueError, match="mgsr: weights must have a positive second number"):
        recipes.mgsr(**tensors, weights=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="mgsr: reduction must be one of mean, sum"):
        recipes.mgsr(**tensors, reduction="none")
    with pytest.raises(ValueError, match=r"mgsr_span: spans must have shape \[3, 5\]"):
        recipes.mgsr(**{**tensors, "spans": tensors["spans"][:, 1:]})
    sides = (tensors["student_logits"], tensors["teacher_logits"])
    with pytest.raises(ValueError, match="mgsr_span: distance must be one of l2, kl"):
        recipes.mgsr_span(*sides, tensors["spans"], distance="l1")
    with pytest.raises(ValueError, match=r"mgsr_span: .* must be \[B, T, vocab\], got"):
        recipes.mgsr_span(sides[0], sides[1][..., 1:], tensors["spans"])
    with pytest.raises(ValueError, match=r"mgsr_position: mask must be \[B, T\]"):
        recipes.mgsr_position(sides[0][0], sides[1][0], tensors["mask"][0])
