"""Recipes of image classification against their definitions in loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import logits
from recipe_checks import (
    LENGTH,
    ROW_REDUCTIONS,
    TEXTS,
    VOCAB,
    Entry,
    at_once,
    by_rows,
    mixed_dtypes,
    one_graph,
    one_graph_for_all,
    problem,
    promises,
    with_,
)

import fastkd
from fastkd import recipes

N, CLASSES = 6, 5


def images(dtype, *names):
    return {name: logits((N, CLASSES), dtype, 1.5) for name in names}


def both(dtype):
    return images(dtype, "student_logits", "teacher_logits")


def correlation(a, b):
    n = len(a)
    a, b = ([x - sum(v) / n for x in v] for v in (list(a), list(b)))
    sizes = [sum(x * x for x in v).sqrt() for v in (a, b)]
    return sum(x * y for x, y in zip(a, b, strict=True)) / (sizes[0] * sizes[1] + 1e-8)


def plain_dist(student_logits, teacher_logits, beta=1.0, gamma=1.0, temperature=1.0, **options):
    q, p = ((z / temperature).softmax(-1) for z in (student_logits, teacher_logits))
    rows = sum(1 - correlation(q[i], p[i]) for i in range(N)) / N
    columns = sum(1 - correlation(q[:, c], p[:, c]) for c in range(CLASSES)) / CLASSES
    factor = temperature**2 if options.get("square_temperature") else 1
    return factor * (beta * rows + gamma * columns)


def plain_deit(class_logits, distillation_logits, teacher_logits, labels, alpha=0.5, **options):
    weights = options.get("class_weights", torch.ones(CLASSES).double())
    hard = [-class_logits[i].log_softmax(-1)[c] for i, c in enumerate(labels) if c >= 0]
    target = [int(teacher_logits[i].argmax()) for i in range(N)]
    taught = sum(
        -weights[c] * distillation_logits[i].log_softmax(-1)[c] for i, c in enumerate(target)
    )
    return (1 - alpha) * sum(hard) / len(hard) + alpha * taught / sum(weights[c] for c in target)


def deit_problem(dtype):
    labels = torch.randint(0, CLASSES, (N,))
    labels[2] = -100
    return {
        **images(dtype, "class_logits", "distillation_logits", "teacher_logits"),
        "labels": labels,
    }


def weighted_deit(dtype):
    return {**deit_problem(dtype), "class_weights": torch.rand(CLASSES, dtype=torch.float64) + 0.1}


def plain_meal(student_logits, teacher_logits, teacher_weights=(1.0, 1.0, 1.0)):
    share = [w / sum(teacher_weights) for w in teacher_weights]
    p = sum(w * z.softmax(-1) for w, z in zip(share, teacher_logits, strict=True))
    return -sum(p[v] * student_logits.log_softmax(-1)[v] for v in range(VOCAB))


def meal_rows(tensors, teacher_weights=(1.0, 1.0, 1.0)):
    students = tensors["student_logits"]
    return torch.stack(
        [
            torch.stack(
                [
                    plain_meal(
                        students[i, j],
                        [t[i, j] for t in tensors["teacher_logits"]],
                        teacher_weights,
                    )
                    for j in range(LENGTH)
                ]
            )
            for i in range(TEXTS)
        ]
    )


def meal_problem(dtype):
    found = problem(dtype)
    teachers = [logits((TEXTS, LENGTH, VOCAB), dtype, 1.5) for _ in range(3)]
    return {"student_logits": found["student_logits"], "teacher_logits": teachers}


def plain_fkd(student_logits, stored_log_probs, stored_indices, kind="marginal_smoothing"):
    """The soft label is written out, as the authors recover it, and compared."""
    kept = [
        (v, p)
        for v, p in zip(stored_indices.tolist(), stored_log_probs.exp(), strict=True)
        if v >= 0
    ]
    if kind == "marginal_renorm":
        label = dict.fromkeys(range(VOCAB), 0.0)
        label.update({v: p / sum(p for _, p in kept) for v, p in kept})
    else:
        rest = (1 - sum(p for _, p in kept)) / (VOCAB - len(kept))
        label = {**dict.fromkeys(range(VOCAB), rest), **dict(kept)}
    q = student_logits.log_softmax(-1)
    return -sum(label[v] * q[v] for v in range(VOCAB))


def stored(k, padded=False):
    def make(dtype):
        found = problem(dtype)
        best = found.pop("teacher_logits").double().log_softmax(-1).topk(k)
        found["stored_log_probs"], found["stored_indices"] = best.values.to(dtype), best.indices
        if padded:
            found["stored_indices"][0, 0, -1] = -1
        return found

    return make


def without_elementmean(reductions=ROW_REDUCTIONS):
    return tuple(r for r in reductions if r not in ("elementmean", "sequence_mean"))


UNMASKED = {"reductions": (), "read": None}


def plain_dkd(student_logits, teacher_logits, labels, alpha=1.0, beta=8.0, temperature=4.0):
    """Of a row, entry by entry."""
    sides = [[x.exp() for x in z / temperature] for z in (teacher_logits, student_logits)]
    label, value = int(labels), 0.0
    (p_t, p_rest, p_sum), (q_t, q_rest, q_sum) = (
        (e[label], [x for v, x in enumerate(e) if v != label], sum(e)) for e in sides
    )
    p, q = p_t / p_sum, q_t / q_sum
    value = alpha * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    for a, b in zip(p_rest, q_rest, strict=True):
        a, b = a / sum(p_rest), b / sum(q_rest)
        value += beta * a * (a / b).log()
    return temperature**2 * value


ENTRIES = [
    Entry(
        "dkd",
        by_rows(plain_dkd),
        {},
        with_("labels"),
        ("student_logits", "teacher_logits"),
        published={"alpha": 1.0, "beta": 8.0, "temperature": 4.0},
    ),
    Entry("dkd", by_rows(plain_dkd), {"alpha": 0.5, "beta": 2.0}, with_("labels", "weight")),
    Entry(
        "dist",
        at_once(plain_dist),
        {},
        both,
        ("student_logits", "teacher_logits"),
        **UNMASKED,
        published={"beta": 1.0, "gamma": 1.0, "temperature": 1.0},
    ),
    Entry(
        "dist",
        at_once(plain_dist),
        {"beta": 0.3, "gamma": 2.0, "temperature": 4.0, "square_temperature": True},
        both,
        **UNMASKED,
    ),
    Entry(
        "deit_lt",
        at_once(plain_deit),
        {},
        deit_problem,
        ("class_logits", "distillation_logits"),
        **UNMASKED,
        published={"alpha": 0.5, "class_weights": None},
    ),
    Entry(
        "deit_lt",
        at_once(plain_deit),
        {"alpha": 0.7},
        weighted_deit,
        ("class_logits", "distillation_logits"),
        **UNMASKED,
    ),
    Entry(
        "meal_v2",
        meal_rows,
        {},
        meal_problem,
        reductions=without_elementmean(),
        read=None,
        published={"teacher_weights": None},
    ),
    Entry(
        "meal_v2",
        meal_rows,
        {"teacher_weights": (0.5, 0.0, 2.0)},
        meal_problem,
        reductions=without_elementmean(),
        read=None,
    ),
    *(
        Entry(
            "fkd",
            by_rows(plain_fkd),
            {"kind": kind},
            stored(k, padded),
            reductions=without_elementmean(),
        )
        for kind, k, padded in (
            ("marginal_smoothing", 5, False),
            ("smoothing", 1, False),
            ("marginal_renorm", 5, True),
        )
    ),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)
BOTH = both(torch.float32)
test_one_graph_for_all_numbers = one_graph_for_all(
    {
        "dist": lambda x: recipes.dist(**BOTH, beta=x, temperature=10 * x),
    }
)


def test_dist_of_rows_without_variance():
    given = both(torch.float32)
    given["student_logits"][1] = 0.0
    leaf = given["student_logits"].requires_grad_()
    recipes.dist(leaf, given["teacher_logits"]).backward()
    assert leaf.grad.isfinite().all()
    same = given["teacher_logits"].double()
    assert recipes.dist(same, 1 + same).abs() < 1e-6


def test_deit_lt_is_torchs_weighted_cross_entropy():
    given = weighted_deit(torch.float64)
    found = recipes.deit_lt(**given, alpha=1.0)
    right = F.cross_entropy(
        given["distillation_logits"],
        given["teacher_logits"].argmax(-1),
        weight=given["class_weights"],
    )
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(
        recipes.deit_lt(**given, alpha=0.0), F.cross_entropy(given["class_logits"], given["labels"])
    )


def test_class_weights():
    counts = [5000, 300, 20]
    found = recipes.class_balanced_weights(torch.tensor(counts))
    right = [(1 - 0.9999) / (1 - 0.9999**n) for n in counts]
    torch.testing.assert_close(found, torch.tensor([x * 3 / sum(right) for x in right]))
    assert recipes.class_balanced_weights([7, 7, 7]).tolist() == [1, 1, 1]
    assert recipes.class_balanced_weights([7, 1], beta=0.0).tolist() == [1, 1]


def test_the_discriminator_is_not_fooled():
    """Cooperative: the student's gradient lowers the loss, as the discriminator's does."""
    student = torch.randn(4, CLASSES, dtype=torch.float64, requires_grad=True)
    teachers = [torch.randn(4, CLASSES, dtype=torch.float64) for _ in range(2)]
    layer = torch.nn.Linear(CLASSES, 2).double()
    loss = recipes.meal_v2_discrimination(layer, student, teachers)
    terms = []
    for rows, target in ((student, (1, 0)), ((teachers[0] + teachers[1]) / 2, (0, 1))):
        for row in rows:
            for z, y in zip(layer(row), target, strict=True):
                terms.append((1 + z.exp()).log() - y * z)
    torch.testing.assert_close(loss, sum(terms) / len(terms))
    loss.backward()
    moved = recipes.meal_v2_discrimination(layer, student - 0.01 * student.grad, teachers)
    assert moved < loss


def test_equal_teachers_are_one():
    given = meal_problem(torch.float64)
    one = given["teacher_logits"][0]
    found = recipes.meal_v2(given["student_logits"], [one] * 3)
    right = fastkd.softmax_divergence(given["student_logits"], one, divergence="cross_entropy")
    torch.testing.assert_close(found, right)


def test_errors_name_the_recipe_and_the_argument():
    x, wider = torch.zeros(2, 5), torch.zeros(2, 6)
    leaf = torch.zeros(2, 5, requires_grad=True)
    y = torch.zeros(2, dtype=torch.int64)
    store = (torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int64))
    r = recipes
    wrong = [
        (r.dist, (x, wider), {}, "teacher_logits must have the shape"),
        (r.dist, (x, x), {"beta": -1.0}, "beta must be finite and not negative"),
        (r.deit_lt, (x, wider, x, y), {}, "distillation_logits must have the shape"),
        (r.deit_lt, (x, x, x, y + 5), {}, "labels must lie in"),
        (r.deit_lt, (x, x, x, y), {"class_weights": x}, r"class_weights must be \[5\]"),
        (r.deit_lt, (x, x, x, y), {"alpha": -0.1}, "alpha must lie in"),
        (r.class_balanced_weights, ([1, 0],), {}, "counts must be a list of positive numbers"),
        (r.class_balanced_weights, ([1, 2],), {"beta": 1.0}, "counts must be a list of positive"),
        (r.meal_v2, (x, [leaf]), {}, "teacher_logits takes no gradient"),
        (r.deit_lt, (x, x, leaf, y), {}, "teacher_logits takes no gradient"),
        (r.meal_v2, (x, x), {}, "teacher_logits must be a list of tensors"),
        (r.meal_v2, (x, [x, wider]), {}, r"teacher_logits\[1\] must have the shape"),
        (
            r.meal_v2_discrimination,
            (lambda z: z, x, [x]),
            {},
            r"discriminator must return \[4, 2\]",
        ),
        (r.fkd, (x, *store), {"kind": "hard"}, "kind must be one of marginal_smoothing"),
        (r.fkd, (x, *store), {"kind": "smoothing"}, "kind smoothing needs one stored class a row"),
        (
            r.fkd,
            (x[:1], *store),
            {"kind": "marginal_renorm"},
            "stored_log_probs must have the leading dimensions",
        ),
    ]
    for function, arguments, options, message in wrong:
        with pytest.raises((ValueError, TypeError, IndexError), match=message) as caught:
            function(*arguments, **options)
        assert str(caught.value).startswith(f"{function.__name__}: ")


def test_rows_that_a_server_padded():
    """With id 0 and -1e9, all of a row or its end: as with -1 and -inf."""
    student, (log_probs, indices) = logits((3, 7)), fastkd.teacher_topk(logits((3, 7)), 3)
    padding = torch.tensor([[False] * 3, [True] * 3, [False, False, True]])
    given = log_probs.masked_fill(padding, -1e9), indices.masked_fill(padding, 0)
    plain = log_probs.masked_fill(padding, -math.inf), indices.masked_fill(padding, -1)
    options = {"kind": "marginal_renorm", "reduction": "none"}
    expected = recipes.fkd(student, *plain, **options)
    assert torch.equal(recipes.fkd(student, *given, **options), expected)
    assert expected[1] == 0


def test_a_row_of_infinite_logits_in_bf16():
    """Masked columns are probability 0 on both sides."""
    given = {k: x.bfloat16() for k, x in both(torch.float32).items()}
    for x in given.values():
        x[:, -1] = -math.inf
    loss = recipes.meal_v2(given["student_logits"], [given["teacher_logits"]])
    assert loss.isfinite()
