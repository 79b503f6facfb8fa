"""Recipes on hidden states against their definitions in loops."""

import inspect
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import logits
from recipe_checks import (
    LENGTH,
    TEXTS,
    Entry,
    at_once,
    by_rows,
    kept_of,
    mixed_dtypes,
    one_graph,
    one_graph_for_all,
    problem,
    promises,
)

import fastkd
from fastkd import recipes

WIDTH = 4
REDUCTIONS = ("none", "sum", "mean", "batchmean", "sequence_mean")


def features(dtype, *names):
    """Hidden states by name, and the mask of the other problems."""
    shape = (TEXTS, LENGTH, WIDTH)
    found = {name: logits(shape, dtype, 1.5) for name in names}
    return {**found, "mask": problem(dtype)["mask"]}


def pair(dtype):
    return features(dtype, "student_hidden", "teacher_hidden")


def smooth_l1(x, beta=1.0):
    return x * x / (2 * beta) if abs(x) < beta else abs(x) - beta / 2


def plain_cosine(s, t):
    sizes = [sum(x[d] ** 2 for d in range(len(x))).sqrt() for x in (s, t)]
    return sum(s[d] * t[d] for d in range(len(s))) / (sizes[0] * sizes[1])


def plain_distance(student_hidden, teacher_hidden, kind="mse", beta=1.0):
    s, t = student_hidden, teacher_hidden
    differences = [s[d] - t[d] for d in range(len(s))]
    if kind == "mse":
        return sum(x**2 for x in differences) / len(s)
    if kind == "l1":
        return sum(abs(x) for x in differences) / len(s)
    if kind == "smooth_l1":
        return sum(smooth_l1(x, beta) for x in differences) / len(s)
    if kind == "pkd":
        sizes = [sum(x[d] ** 2 for d in range(len(x))).sqrt() for x in (s, t)]
        return sum((s[d] / sizes[0] - t[d] / sizes[1]) ** 2 for d in range(len(s)))
    cosine = plain_cosine(s, t)
    return 1 - cosine if kind == "cosine" else (1 + (-cosine).exp()).log()


def mean_over(kept, value):
    """The mean of value(text, row) over the rows that count."""
    places = kept.nonzero().tolist()
    return sum(value(i, j) for i, j in places) / len(places)


def plain_cross_entropy(z, label):
    return -(z[label] - sum(x.exp() for x in z).log())


def plain_fspad(draft_logits, teacher_logits, draft_hidden, teacher_hidden, mask, weights):
    def term(i, j):
        p = teacher_logits[i, j].softmax(-1)
        z = draft_logits[i, j]
        soft = sum(p[v] * plain_cross_entropy(z, v) for v in range(len(z)))
        rows = draft_hidden[i, j], teacher_hidden[i, j]
        return weights[0] * soft + weights[1] * plain_distance(*rows, "smooth_l1")

    return mean_over(mask, term)


def fspad_problem(dtype):
    found = problem(dtype)
    found["draft_logits"] = found.pop("student_logits")
    return {**found, **features(dtype, "draft_hidden", "teacher_hidden")}


def plain_semantic(features, targets, axis="channel", lambda_sim=1.0):
    length = min(features.size(1), targets.size(1))
    terms, differences = [], []
    for f, t in zip(features[:, :length], targets[:, :length], strict=True):
        if axis == "channel":
            cosines = [plain_cosine(f[:, d], t[:, d]) for d in range(f.size(1))]
        else:
            cosines = [plain_cosine(f[i], t[i]) for i in range(length)]
            differences += [abs(a - b) for a, b in zip(f.flatten(), t.flatten(), strict=True)]
        terms += [(1 + (-x).exp()).log() for x in cosines]
    loss = sum(terms) / len(terms)
    return loss if axis == "channel" else sum(differences) / len(differences) + lambda_sim * loss


def semantic_problem(dtype):
    return {
        "features": logits((TEXTS, LENGTH, WIDTH), dtype),
        "targets": logits((TEXTS, LENGTH + 2, WIDTH), dtype),
    }


def dm_codec_problem(dtype):
    targets = [logits((TEXTS, length, WIDTH), dtype) for length in (LENGTH - 1, LENGTH + 1)]
    found = {"features": semantic_problem(dtype)["features"]}
    return {**found, "lm_targets": targets[0], "speech_targets": targets[1]}


def plain_had(student_logits, labels, student_hidden, teacher_hidden, visible, weight=1.0):
    seen = weight * mean_over(
        visible, lambda i, j: plain_distance(student_hidden[i, j], teacher_hidden[i, j])
    )
    masked = ~visible & (labels != -100)
    return seen + mean_over(
        masked, lambda i, j: plain_cross_entropy(student_logits[i, j], labels[i, j])
    )


def had_problem(dtype):
    found = problem(dtype, "labels")
    visible = found.pop("mask")
    visible[1, 1] = False
    del found["teacher_logits"]
    hidden = features(dtype, "student_hidden", "teacher_hidden")
    del hidden["mask"]
    return {**found, **hidden, "visible": visible}


def plain_fair(student_latent, teacher_latent, student_logits, teacher_logits, weights=(1.0, 1.0)):
    count = len(student_latent)
    quality = sum(plain_distance(s, t) for s, t in zip(student_latent, teacher_latent, strict=True))
    utility = 0
    for s, t in zip(student_logits, teacher_logits, strict=True):
        q, p = s.softmax(-1), t.softmax(-1)
        utility = utility + sum(p[v] * (p[v] / q[v]).log() for v in range(len(p)))
    return (weights[0] * quality + weights[1] * utility) / count


def fair_problem(dtype):
    names = ("student_latent", "teacher_latent", "student_logits", "teacher_logits")
    return {name: logits((6, 5), dtype, 1.5) for name in names}


def plain_semcot(student_logits, labels, student_embedding, teacher_embedding, alpha):
    rows = zip(student_embedding, teacher_embedding, strict=True)
    meaning = sum(1 - plain_cosine(s, t) for s, t in rows) / len(student_embedding)
    answer = mean_over(
        labels != -100, lambda i, j: plain_cross_entropy(student_logits[i, j], labels[i, j])
    )
    return alpha * meaning + (1 - alpha) * answer


def semcot_problem(dtype):
    found = problem(dtype, "labels")
    found["student_embedding"] = logits((TEXTS, WIDTH), dtype)
    found["teacher_embedding"] = logits((TEXTS, WIDTH), dtype)
    return {k: x for k, x in found.items() if k not in ("mask", "teacher_logits")}


def plain_dm_codec(features, lm_targets, speech_targets, weights=(0.5, 0.5), **options):
    lm, speech = (plain_semantic(features, x, **options) for x in (lm_targets, speech_targets))
    return weights[0] * lm + weights[1] * speech


def plain_lm_spt(features, targets, mask, weight=100.0):
    return weight * mean_over(mask, lambda i, j: plain_distance(features[i, j], targets[i, j]))


BOTH = ("student_hidden", "teacher_hidden")
UNMASKED = {"reductions": (), "read": None}
ENTRIES = [
    *(
        Entry(
            "feature_distance",
            by_rows(plain_distance),
            {"kind": kind, **more},
            pair,
            BOTH,
            REDUCTIONS,
            published={"kind": "mse", "beta": 1.0},
            twice=kind != "l1",
        )
        for kind, more in [
            ("mse", {}),
            ("l1", {}),
            ("smooth_l1", {"beta": 0.7}),
            ("cosine", {}),
            ("log_sigmoid_cosine", {}),
            ("pkd", {}),
        ]
    ),
    Entry(
        "fspad",
        at_once(plain_fspad),
        {"weights": (0.1, 1.0)},
        fspad_problem,
        ("draft_logits", "teacher_logits", "draft_hidden", "teacher_hidden"),
        (),
        published={"weights": (0.1, 1.0), "beta": 1.0},
    ),
    Entry(
        "semantic_distillation",
        at_once(plain_semantic),
        {},
        semantic_problem,
        ("features", "targets"),
        **UNMASKED,
        published={"axis": "channel", "lambda_sim": 1.0},
    ),
    Entry(
        "semantic_distillation",
        at_once(plain_semantic),
        {"axis": "time", "lambda_sim": 0.3},
        semantic_problem,
        ("features", "targets"),
        **UNMASKED,
    ),
    Entry(
        "dm_codec",
        at_once(plain_dm_codec),
        {},
        dm_codec_problem,
        ("features",),
        **UNMASKED,
        published={"weights": (0.5, 0.5), "axis": "channel"},
    ),
    Entry(
        "lm_spt",
        at_once(plain_lm_spt),
        {},
        lambda dtype: features(dtype, "features", "targets"),
        ("features", "targets"),
        (),
        published={"weight": 100.0},
    ),
    Entry(
        "had",
        at_once(plain_had),
        {},
        had_problem,
        ("student_logits", *BOTH),
        **UNMASKED,
        published={"weight": 1.0},
    ),
    Entry(
        "fair_latent",
        at_once(plain_fair),
        {},
        fair_problem,
        tuple(fair_problem(torch.float32)),
        **UNMASKED,
        published={"weights": (1.0, 1.0)},
    ),
    Entry(
        "semcot",
        at_once(plain_semcot),
        {"alpha": 0.25},
        semcot_problem,
        ("student_logits", "student_embedding", "teacher_embedding"),
        **UNMASKED,
        published={"alpha": inspect.Parameter.empty},  # by data set
    ),
]
ENTRIES += [
    replace(entry, options=options)
    for entry in ENTRIES
    for name, options in (
        ("dm_codec", {"weights": (0.3, 2.0), "axis": "time", "lambda_sim": 0.3}),
        ("lm_spt", {"weight": 3.0}),
        ("had", {"weight": 0.3}),
        ("fair_latent", {"weights": (0.3, 2.0)}),
    )
    if entry.name == name
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)
SAME = tuple(fair_problem(torch.float32).values())[:2]
test_one_graph_for_all_numbers = one_graph_for_all(
    {
        "beta": lambda x: recipes.feature_distance(*SAME, kind="smooth_l1", beta=x),
        "weights": lambda x: recipes.fspad(*SAME, *SAME, weights=(x, 1 - x)),
    }
)


def test_fspad_is_each_of_its_terms_alone():
    given = fspad_problem(torch.float64)
    soft = fastkd.softmax_divergence(
        given["draft_logits"],
        given["teacher_logits"],
        divergence="cross_entropy",
        mask=given["mask"],
    )
    torch.testing.assert_close(recipes.fspad(**given, weights=(1.0, 0.0)), soft)
    kept = given["mask"]
    hidden = F.smooth_l1_loss(given["draft_hidden"][kept], given["teacher_hidden"][kept])
    torch.testing.assert_close(recipes.fspad(**given, weights=(0.0, 1.0)), hidden)


def test_equal_features_of_a_codec():
    """log(1 + 1/e), not 0."""
    f = torch.randn(2, 5, 3, dtype=torch.float64)
    expected = torch.tensor(math.log1p(math.exp(-1)), dtype=torch.float64)
    torch.testing.assert_close(recipes.semantic_distillation(f, f), expected)
    torch.testing.assert_close(recipes.dm_codec(f, f, 2 * f), expected)


def test_a_projection_sees_no_padding():
    given = features(torch.float32, "student_hidden")
    given["student_hidden"][~given["mask"]] = math.nan
    layer = torch.nn.Linear(WIDTH, 7)
    teacher = torch.randn(TEXTS, LENGTH, 7)
    loss = recipes.feature_distance(
        given["student_hidden"], teacher, projection=layer, mask=given["mask"]
    )
    kept = given["mask"]
    right = F.mse_loss(layer(given["student_hidden"][kept]), teacher[kept])
    mine, true = (torch.autograd.grad(x, layer.weight)[0] for x in (loss, right))
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("kind", ["cosine", "log_sigmoid_cosine", "pkd"])
def test_zero_rows_have_no_direction(kind):
    student, teacher = torch.zeros(2, 3, requires_grad=True), torch.randn(2, 3)
    recipes.feature_distance(student, teacher, kind=kind).backward()
    assert not student.grad.any()
    student = torch.full((2, 3), 1e-30, requires_grad=True)
    recipes.feature_distance(student, teacher, kind=kind).backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("visible", [True, False])
def test_had_without_one_of_its_terms(visible):
    given = had_problem(torch.float64)
    given["visible"] = torch.full((TEXTS, LENGTH), visible)
    given["student_hidden" if not visible else "student_logits"][:] = math.nan
    loss = recipes.had(**given)
    if visible:
        right = F.mse_loss(given["student_hidden"], given["teacher_hidden"])
    else:
        right = F.cross_entropy(given["student_logits"].flatten(0, 1), given["labels"].flatten())
    torch.testing.assert_close(loss, right)


def test_nothing_to_compare():
    none = torch.zeros(2, 0, 3)
    assert recipes.semantic_distillation(none[:0], none[:0], axis="time") == 0
    assert recipes.feature_distance(none, none) == 0
    assert recipes.lm_spt(none, none, mask=torch.ones(2, 0, dtype=torch.bool)) == 0
    given = semcot_problem(torch.float32)
    given["labels"][:] = -100
    right = recipes.feature_distance(
        given["student_embedding"], given["teacher_embedding"], kind="cosine"
    )
    torch.testing.assert_close(recipes.semcot(**given, alpha=0.5), right / 2)


def test_errors_name_the_recipe_and_the_argument():
    x, wider = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)
    labels = torch.zeros(2, 3, dtype=torch.int64)
    wrong = [
        (
            recipes.feature_distance,
            (x, wider),
            {},
            "teacher_hidden must have the shape .* of student_hidden",
        ),
        (recipes.feature_distance, (x, x), {"kind": "l3"}, "kind must be one of mse, l1"),
        (recipes.feature_distance, (x, x), {"beta": 0.0}, "beta must be positive"),
        (recipes.feature_distance, (x, x), {"mask": labels}, r"mask must be bool \[2, 3\]"),
        (recipes.feature_distance, (x, x.long()), {}, "teacher_hidden must be floating-point"),
        (
            recipes.fspad,
            (x, wider, x, x),
            {},
            "teacher_logits must have the shape .* of draft_logits",
        ),
        (recipes.fspad, (x, x, x[:1], x[:1]), {}, "draft_hidden must have draft_logits' rows"),
        (recipes.fspad, (x, x, x, x), {"weights": (1.0,)}, "weights must be 2 numbers"),
        (recipes.fspad, (x, x, x, x), {"weights": (1.0, -1.0)}, "weights must be finite and not"),
        (recipes.semantic_distillation, (x[0], x), {}, r"features must be \[B, T, D\]"),
        (recipes.semantic_distillation, (x, x), {"axis": "d"}, "axis must be one of channel, time"),
        (recipes.dm_codec, (x, x, wider), {}, "speech_targets must have the shape"),
        (recipes.lm_spt, (x, wider), {}, "targets must have the shape"),
        (recipes.had, (x, labels + 4, x, x, labels > 0), {}, "labels must lie in"),
        (recipes.had, (x, labels, x, x, labels), {}, "visible must be bool"),
        (recipes.fair_latent, (x, wider, x, x), {}, "teacher_latent must have the shape"),
        (recipes.semcot, (x, labels[:1], x[0], x[0]), {"alpha": 0.5}, "labels must have shape"),
        (recipes.semcot, (x, labels, x[0], x[0]), {"alpha": 2.0}, "alpha must lie in"),
    ]
    for function, arguments, options, message in wrong:
        with pytest.raises((ValueError, TypeError, IndexError), match=message) as caught:
            function(*arguments, **options)
        assert str(caught.value).startswith(f"{function.__name__}: ")


def test_masks_of_the_problems_leave_rows_out():
    assert 0 < kept_of(pair(torch.float32)).sum() < TEXTS * LENGTH
