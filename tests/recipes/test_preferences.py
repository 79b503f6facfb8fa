"""preference against its definition."""

import math

import pytest
import torch
from cases import logits
from recipe_checks import Entry, kept_of, mixed_dtypes, one_graph, one_graph_for_all, promises

import fastkd
from fastkd import recipes


def texts(dtype, stored=False):
    """Two chosen and two rejected texts."""
    shape = (4, 5)
    tensors = {
        "student_logits": logits((*shape, 11), dtype, 1.5),
        "reference_logits": logits((*shape, 11), dtype, 1.5),
        "labels": torch.randint(0, 11, shape),
        "mask": torch.arange(5) < torch.tensor([[5], [3], [4], [1]]),
    }
    tensors["labels"][0, 1] = -100
    if stored:
        labels = tensors["labels"].clamp(min=0).unsqueeze(-1)
        log_p = tensors["reference_logits"].double().log_softmax(-1).gather(-1, labels)
        tensors["reference_logits"] = log_p.squeeze(-1).to(dtype)
    return tensors


def plain_preference(tensors, loss="sigmoid", beta=0.1, label_smoothing=0.0, reduction="mean"):
    ratios = []
    for b in range(4):
        total = 0
        for t in kept_of(tensors)[b].nonzero()[:, 0].tolist():
            label = tensors["labels"][b, t]
            p = tensors["reference_logits"][b, t]
            p = p.log_softmax(-1)[label] if p.dim() else p
            total = total + tensors["student_logits"][b, t].log_softmax(-1)[label] - p
        ratios.append(total)
    losses = []
    for c, r in ((ratios[0], ratios[2]), (ratios[1], ratios[3])):
        d = c - r
        if loss == "sigmoid":
            value = -(1 - label_smoothing) * torch.sigmoid(beta * d).log()
            losses.append(value - label_smoothing * torch.sigmoid(-beta * d).log())
        elif loss == "hinge":
            losses.append(max(1 - beta * d, torch.zeros(()).double()))
        elif loss == "ipo":
            losses.append((d - 1 / (2 * beta)) ** 2)
    if loss == "kto_pair":
        zero = torch.zeros(()).double()
        chosen, rejected = (max((ratios[i] + ratios[i + 1]) / 2, zero) for i in (0, 2))
        losses = [1 - torch.sigmoid(beta * (c - rejected)) for c in ratios[:2]]
        losses += [1 - torch.sigmoid(beta * (chosen - r)) for r in ratios[2:]]
    return sum(losses) / (len(losses) if reduction == "mean" else 1)


def entry(options, stored=False, published=None):
    return Entry(
        "preference",
        plain_preference,
        options,
        problem=lambda dtype: texts(dtype, stored),
        reductions=(),
        read=None,
        published=published or {},
    )


ENTRIES = [
    entry({}, published={"loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0}),
    entry({"label_smoothing": 0.2, "beta": 0.5}, stored=True),
    entry({"loss": "hinge", "reduction": "sum"}),
    entry({"loss": "ipo", "beta": 0.3}),
    entry({"loss": "kto_pair", "beta": 0.7}),
    entry({"loss": "kto_pair", "reduction": "sum"}, stored=True),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)
GIVEN = texts(torch.float32)
test_one_graph_for_all_numbers = one_graph_for_all(
    {
        "all": lambda x: (
            recipes.preference(**GIVEN, beta=x, label_smoothing=x)
            + recipes.preference(**GIVEN, beta=x, loss="ipo")
        )
    }
)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "kto_pair"])
def test_masked_rows_are_not_read(loss):
    tensors = texts(torch.float32)
    tensors["student_logits"].requires_grad_()
    right = recipes.preference(**tensors, loss=loss)
    with torch.no_grad():
        for name in ("student_logits", "reference_logits"):
            tensors[name][~kept_of(tensors)] = math.nan
    found = recipes.preference(**tensors, loss=loss)
    assert found == right
    (gradient,) = torch.autograd.grad(found, tensors["student_logits"])
    assert not gradient[~kept_of(tensors)].any()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("loss", "value"), [("sigmoid", math.log(2)), ("hinge", 1), ("ipo", 25), ("kto_pair", 0.5)]
)
def test_equal_models(loss, value):
    tensors = texts(torch.float64)
    tensors["reference_logits"] = tensors["student_logits"]
    found = recipes.preference(**tensors, loss=loss)
    torch.testing.assert_close(found, torch.tensor(value).double())
    rows = recipes.preference(**tensors, loss=loss, reduction="none")
    assert rows.shape == ((4,) if loss == "kto_pair" else (2,))
    torch.testing.assert_close(rows.mean(), found)


def test_stored_log_probabilities():
    tensors = texts(torch.float64)
    right = recipes.preference(**tensors)
    labels = torch.where(kept_of(tensors), tensors["labels"], -100)
    stats = fastkd.token_stats(tensors["reference_logits"], labels=labels)
    tensors["reference_logits"] = stats.student_label_log_prob  # NaN where there is no label
    torch.testing.assert_close(recipes.preference(**tensors), right)


@pytest.mark.parametrize("loss", ["sigmoid", "kto_pair"])
def test_no_pairs(loss):
    tensors = {name: x[:0] for name, x in texts(torch.float32).items()}
    tensors["student_logits"].requires_grad_()
    found = recipes.preference(**tensors, loss=loss)
    assert found == 0
    found.backward()


def test_errors():
    tensors = texts(torch.float32)
    with pytest.raises(ValueError, match="preference: loss must be one of sigmoid, hinge, ipo"):
        recipes.preference(**tensors, loss="dpo")
    with pytest.raises(ValueError, match=r"preference: student_logits must be \[2 B, T, vocab\]"):
        recipes.preference(*(tensors[x][:3] for x in tensors))
    with pytest.raises(ValueError, match="preference: beta must be positive"):
        recipes.preference(**tensors, beta=0.0)
    for options in ({"label_smoothing": 0.5}, {"label_smoothing": 0.1, "loss": "ipo"}):
        with pytest.raises(ValueError, match="preference: label_smoothing must lie in"):
            recipes.preference(**tensors, **options)
    tensors["reference_logits"].requires_grad_()
    with pytest.raises(ValueError, match="preference: reference_logits takes no gradient"):
        recipes.preference(**tensors)
