"""Recipes on attention and token relations against their definitions in loops."""

import math

import pytest
import torch
from cases import logits
from recipe_checks import (
    LENGTH,
    TEXTS,
    Entry,
    at_once,
    mixed_dtypes,
    one_graph,
    problem,
    promises,
)
from test_features import WIDTH, features, mean_over, plain_cross_entropy, plain_distance

from fastkd import recipes

HEADS = 2


def causal(dtype):
    """Attention of a causal model: zeros above the diagonal."""
    scores = logits((TEXTS, HEADS, LENGTH, LENGTH), dtype, 1.5)
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1)


def hidden_and(dtype, mask, **others):
    found = features(dtype, "student_hidden", "teacher_hidden")
    return {**{k: x for k, x in found.items() if mask or k != "mask"}, **others}


def ernie_problem(dtype, mask=True):
    attention = {"student_attention": causal(dtype), "teacher_attention": causal(dtype)}
    return hidden_and(dtype, mask, **attention)


def last_stage(dtype):
    found = problem(dtype, "labels")
    del found["mask"]
    return {**found, **ernie_problem(dtype)}


def relations_problem(dtype, mask=True):
    shape = (TEXTS, HEADS, LENGTH, LENGTH)
    relations = {f"{side}_relations": logits(shape, dtype, 1.5) for side in ("student", "teacher")}
    return hidden_and(dtype, mask, **relations)


def plain_kl(q, p):
    """KL(p || q) of probabilities, with 0 log 0 = 0."""
    return sum(p[v] * (p[v] / q[v]).log() for v in range(len(p)) if p[v] > 0)


def plain_relations(student, teacher, kept, distance):
    """Mean over heads and tokens that count, of rows of those tokens' columns."""

    def row(i, j):
        columns = kept[i].nonzero().flatten().tolist()
        heads = [distance(student[i, h, j, columns], teacher[i, h, j, columns]) for h in (0, 1)]
        return sum(heads) / HEADS

    return mean_over(kept, row)


def plain_ernie(
    student_hidden,
    teacher_hidden,
    student_attention,
    teacher_attention,
    mask=None,
    student_logits=None,
    teacher_logits=None,
    labels=None,
    weights=(1.0, 1.0, 1.0, 1.0),
    temperature=1.0,
):
    kept = torch.ones(TEXTS, LENGTH, dtype=torch.bool) if mask is None else mask
    total = weights[0] * mean_over(
        kept, lambda i, j: plain_distance(student_hidden[i, j], teacher_hidden[i, j])
    )
    total = total + weights[1] * plain_relations(
        student_attention,
        teacher_attention,
        kept,
        lambda a, b: plain_kl(a[a > 0] / a[a > 0].sum(), b[a > 0] / b.sum()),
    )
    if student_logits is not None:
        q, p = ((z / temperature).softmax(-1) for z in (student_logits, teacher_logits))
        rows = labels != -100
        total = total + weights[2] * mean_over(rows, lambda i, j: plain_kl(q[i, j], p[i, j]))
        total = total + weights[3] * mean_over(
            rows, lambda i, j: plain_cross_entropy(student_logits[i, j], labels[i, j])
        )
    return total


def plain_hybrid(
    student_relations, teacher_relations, student_hidden, teacher_hidden, mask=None, **options
):
    kept = torch.ones(TEXTS, LENGTH, dtype=torch.bool) if mask is None else mask
    relation, feature = options.get("relation", "kl"), options.get("feature", "smooth_l1")

    def distance(a, b):
        q, p = a.softmax(-1), b.softmax(-1)
        if relation == "kl":
            return plain_kl(q, p)
        # The mean is over all columns, of which those that do not count are equal.
        return plain_distance(q, p, relation) * len(q) / LENGTH

    features = mean_over(
        kept, lambda i, j: plain_distance(student_hidden[i, j], teacher_hidden[i, j], feature)
    )
    first, second = options.get("weights", (1.0, 1.0))
    relations = plain_relations(student_relations, teacher_relations, kept, distance)
    return first * relations + second * features


def plain_scores(query, key):
    rows = [
        sum(query[b, h, i, d] * key[b, h, j, d] for d in range(WIDTH)) / math.sqrt(WIDTH)
        for b in range(TEXTS)
        for h in range(HEADS)
        for i in range(3)
        for j in range(3)
    ]
    return torch.stack(rows).view(TEXTS, HEADS, 3, 3)


def scores_problem(dtype):
    return {name: logits((TEXTS, HEADS, 3, WIDTH), dtype) for name in ("query", "key")}


HIDDEN = ("student_hidden", "teacher_hidden")
UNMASKED = {"reductions": (), "read": None}
ENTRIES = [
    Entry(
        "ernie_tiny",
        at_once(plain_ernie),
        {},
        lambda dtype: ernie_problem(dtype, mask=False),
        ("student_attention", *HIDDEN),
        **UNMASKED,
        published={"weights": (1.0, 1.0, 1.0, 1.0), "temperature": 1.0},
        bf16_error=2e-2,  # the rows of rounded probabilities add up to 1 only nearly
    ),
    Entry(
        "ernie_tiny",
        at_once(plain_ernie),
        {"weights": (0.5, 2.0, 0.3, 0.7), "temperature": 2.0},
        last_stage,
        ("student_attention", "student_hidden", "student_logits", "teacher_logits"),
        **UNMASKED,
        bf16_error=2e-2,
    ),
    Entry(
        "hybrid_distill",
        at_once(plain_hybrid),
        {},
        lambda dtype: relations_problem(dtype, mask=False),
        ("student_relations", "teacher_relations", *HIDDEN),
        **UNMASKED,
        published={"weights": (1.0, 1.0)},
    ),
    *(
        Entry(
            "hybrid_distill",
            at_once(plain_hybrid),
            {"relation": relation, "feature": feature, "weights": (0.5, 2.0)},
            relations_problem,
            ("student_relations", *HIDDEN),
            **UNMASKED,
        )
        for relation, feature in (("smooth_l1", "cosine"), ("mse", "mse"), ("kl", "smooth_l1"))
    ),
    Entry(
        "token_relations", at_once(plain_scores), {}, scores_problem, ("query", "key"), **UNMASKED
    ),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)


@pytest.mark.parametrize("name", ["ernie_tiny", "hybrid_distill"])
def test_padding_is_neither_a_row_nor_a_column(name):
    given = (
        ernie_problem(torch.float32) if name == "ernie_tiny" else relations_problem(torch.float32)
    )
    kept = given["mask"]
    found = []
    for filler in (0.0, math.nan):
        mine = {}
        for key, x in given.items():
            if x.dim() == 4:
                used = kept[:, None, :, None] & kept[:, None, None, :]
                x = torch.where(used, x, filler)
            elif x.dim() == 3:
                x = torch.where(kept[..., None], x, filler)
            mine[key] = x.requires_grad_(x.is_floating_point())
        loss = getattr(recipes, name)(**mine)
        leaves = [x for x in mine.values() if x.requires_grad]
        found.append((loss, *torch.autograd.grad(loss, leaves)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert not found[1][1][~kept if found[1][1].dim() == 3 else slice(0, 0)].any()
    given["mask"] = torch.zeros_like(kept)
    assert getattr(recipes, name)(**given) == 0


def test_equal_models_have_no_loss():
    given = relations_problem(torch.float64)
    for what in ("relations", "hidden"):
        given[f"teacher_{what}"] = given[f"student_{what}"]
    for relation in ("kl", "smooth_l1", "mse"):
        assert recipes.hybrid_distill(**given, relation=relation) == 0
    given = ernie_problem(torch.float64)
    for what in ("attention", "hidden"):
        given[f"teacher_{what}"] = given[f"student_{what}"]
    assert recipes.ernie_tiny(**given) == 0


def test_the_order_of_tokens_does_not_matter():
    given = relations_problem(torch.float64, mask=False)
    order = torch.randperm(LENGTH)
    moved = {
        k: x[:, :, order][..., order] if x.dim() == 4 else x[:, order] for k, x in given.items()
    }
    torch.testing.assert_close(recipes.hybrid_distill(**moved), recipes.hybrid_distill(**given))


def test_relations_of_a_causal_model():
    given = relations_problem(torch.float32, mask=False)
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    for side in ("student", "teacher"):
        scores = given[f"{side}_relations"].masked_fill(later, -math.inf)
        given[f"{side}_relations"] = scores.requires_grad_()
    for relation in ("kl", "smooth_l1"):
        loss = recipes.hybrid_distill(**given, relation=relation)
        assert loss.isfinite()
        (gradient,) = torch.autograd.grad(loss, given["student_relations"])
        assert gradient.isfinite().all()
        assert not gradient[..., later].any()


def test_a_projection_to_the_teachers_width():
    given = ernie_problem(torch.float32)
    given["student_hidden"] = torch.randn(TEXTS, LENGTH, 9)
    given["student_hidden"][~given["mask"]] = math.nan
    layer = torch.nn.Linear(9, WIDTH)
    loss = recipes.ernie_tiny(**given, projection=layer, weights=(1.0, 0.0, 0.0, 0.0))
    kept = given["mask"]
    right = (layer(given["student_hidden"][kept]) - given["teacher_hidden"][kept]).square().mean()
    torch.testing.assert_close(loss, right)
    assert torch.autograd.grad(loss, layer.weight)[0].isfinite().all()


def test_errors_name_the_recipe_and_the_argument():
    h, a = torch.zeros(2, 3, 4), torch.full((2, 1, 3, 3), 1 / 3)
    z = torch.zeros(2, 5)
    wrong = [
        (recipes.ernie_tiny, (h, h, a, a[:1]), {}, "teacher_attention must have the shape"),
        (recipes.ernie_tiny, (h, h[:1], a, a), {}, "teacher_hidden must have the shape"),
        (recipes.ernie_tiny, (h, h, a[:1], a[:1]), {}, r"student_attention must be \[2, H, 3, 3\]"),
        (recipes.ernie_tiny, (h, h, a, a), {"weights": (1.0,)}, "weights must be 4 numbers"),
        (recipes.ernie_tiny, (h, h, a, a), {"student_logits": z}, "student_logits must be given"),
        (recipes.ernie_tiny, (h, h, a, a), {"teacher_logits": z}, "student_logits must be given"),
        (recipes.ernie_tiny, (h, h, a, a), {"temperature": -1.0}, "temperature must be positive"),
        (
            recipes.ernie_tiny,
            (h, h, a, a),
            {"student_logits": z, "labels": torch.tensor([0, 5])},
            r"labels must lie in \[0, 5\)",
        ),
        (recipes.hybrid_distill, (a, a, h[:1], h[:1]), {}, "student_relations must have student_h"),
        (recipes.hybrid_distill, (a, a, h, h), {"relation": "vv"}, "relation must be one of kl"),
        (recipes.hybrid_distill, (a, a, h, h), {"feature": "kl"}, "feature must be one of mse"),
        (recipes.token_relations, (h, h), {}, r"query must be \[B, H, P, d\]"),
        (recipes.token_relations, (a, a[:1]), {}, "key must have the shape"),
    ]
    for function, arguments, options, message in wrong:
        with pytest.raises((ValueError, TypeError, IndexError), match=message) as caught:
            function(*arguments, **options)
        assert str(caught.value).startswith(f"{function.__name__}: ")
