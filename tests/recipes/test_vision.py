"""Recipes of image classification and segmentation against their definitions in loops."""

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
)
from test_attention import plain_kl

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


def plain_cwd(student_maps, teacher_maps, temperature=4.0):
    losses = [
        temperature**2 * plain_kl((s / temperature).softmax(-1), (t / temperature).softmax(-1))
        for i in range(student_maps.size(0))
        for s, t in zip(student_maps[i].flatten(1), teacher_maps[i].flatten(1), strict=True)
    ]
    return sum(losses) / len(losses)


def maps(dtype):
    return {f"{side}_maps": logits((2, 3, 2, 4), dtype, 3.0) for side in ("student", "teacher")}


def two_paths(dtype):
    return dict(zip(("first_maps", "second_maps"), maps(dtype).values(), strict=True))


def plain_consistency(first_maps, second_maps, weight=5.0):
    there, back = (
        plain_cwd(a, b.detach()) for a, b in ((first_maps, second_maps), (second_maps, first_maps))
    )
    return weight * (there + back)


def plain_lelp(student_logits, teacher_logits, subclasses, temperature=1.0):
    p = (teacher_logits / temperature).softmax(-1)
    q = (student_logits / temperature).log_softmax(-1)
    classes, parts = subclasses.shape
    return -sum(
        p[c] * subclasses[c, s] * q[c * parts + s] for c in range(classes) for s in range(parts)
    )


def lelp_problem(dtype):
    found = problem(dtype)
    found["student_logits"] = logits((TEXTS, LENGTH, VOCAB * 2), dtype)
    found["subclasses"] = logits((TEXTS, LENGTH, VOCAB, 2), torch.float64, 1.0).softmax(-1)
    return found


def without_elementmean(reductions=ROW_REDUCTIONS):
    return tuple(r for r in reductions if r not in ("elementmean", "sequence_mean"))


UNMASKED = {"reductions": (), "read": None}
ENTRIES = [
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
    Entry(
        "cwd",
        at_once(plain_cwd),
        {},
        maps,
        tuple(maps(torch.float32)),
        **UNMASKED,
        published={"temperature": 4.0},
    ),
    Entry(
        "lad_consistency",
        at_once(plain_consistency),
        {},
        two_paths,
        ("first_maps", "second_maps"),
        **UNMASKED,
        published={"weight": 5.0, "temperature": 4.0},
    ),
    Entry(
        "lelp",
        by_rows(plain_lelp),
        {"temperature": 2.0},
        lelp_problem,
        ("student_logits", "teacher_logits"),
        without_elementmean(),
        published={"temperature": 1.0},
    ),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)
MAPS, BOTH = maps(torch.float32), both(torch.float32)
test_one_graph_for_all_numbers = one_graph_for_all(
    {
        "cwd": lambda x: recipes.cwd(**MAPS, temperature=x),
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
    one.requires_grad_()
    recipes.meal_v2(given["student_logits"], [one])  # no gradient, no error


def test_the_order_of_pixels_does_not_matter_to_cwd():
    given = maps(torch.float64)
    order = torch.randperm(8)
    moved = {k: x.flatten(2)[..., order] for k, x in given.items()}
    torch.testing.assert_close(recipes.cwd(**moved), recipes.cwd(**given))
    # T^2 KL of softmaxes tends to half the variance of the difference over pixels.
    difference = (given["student_maps"] - given["teacher_maps"]).flatten(2)
    limit = difference.var(-1, correction=0).mean() / 2
    torch.testing.assert_close(recipes.cwd(**given, temperature=1e4), limit, rtol=1e-3, atol=0)


def test_label_map():
    labels = torch.tensor([[0, 2, 1], [255, 2, -1]])
    generator = torch.Generator().manual_seed(1)
    values = torch.tensor([1.0, 2.0, 3.0])
    exact = recipes.lad_label_map(labels, 3, noise=0.0, values=values)
    assert exact.tolist() == [[100, 300, 200], [0, 300, 0]]
    found = [recipes.lad_label_map(labels.expand(500, 2, 3), 3, generator=generator) for _ in "ab"]
    assert not torch.equal(*found)
    for x in found:
        assert x.var(0).sqrt().mean().item() == pytest.approx(3.0, rel=0.1)  # 100 x 0.03
        assert (x[:, 0, 1] - x[:, 1, 1]).mean().abs() < 1
    again = torch.Generator().manual_seed(1)
    first = recipes.lad_label_map(labels.expand(500, 2, 3), 3, generator=again)
    assert torch.equal(first, found[0])


# ---- lelp


def embeddings():
    labels = torch.arange(40) % 4
    labels[labels == 3] = 0
    labels[7] = 3  # one example of class 3, none of class 4
    head = torch.randn(5, 9, dtype=torch.float64)
    hidden = torch.randn(40, 9, dtype=torch.float64)
    return hidden, labels, head


@pytest.mark.parametrize("null_space", [True, False])
def test_subclasses_are_softmaxes_of_principal_coordinates(null_space):
    hidden, labels, head = embeddings()
    options = {"temperature": 0.5, "null_space": null_space}
    generator = torch.Generator().manual_seed(0)
    found = recipes.lelp_subclasses(hidden, labels, head, 3, **options, generator=generator)
    torch.testing.assert_close(found.sum(-1), torch.ones(40, 5).double())
    assert (found[:, 3:] == 1 / 3).all()
    if null_space:
        hidden = hidden - hidden @ torch.linalg.pinv(head) @ head
    for label in range(3):
        own = hidden[labels == label]
        deviations = hidden - own.mean(0)
        _, vectors = torch.linalg.eigh(torch.cov(own.mT))
        coordinates = deviations @ vectors[:, -3:]
        # A rotation keeps distances between coordinates; softmax keeps their differences.
        logarithms = found[:, label].log() * options["temperature"]
        centred = logarithms - logarithms.mean(-1, keepdim=True)
        gram = centred @ centred.mT
        # One direction is lost to the softmax: of rank 2, and not above the whole.
        whole = coordinates @ coordinates.mT
        assert torch.linalg.matrix_rank(gram, rtol=1e-9) == 2
        assert torch.linalg.eigvalsh(whole - gram).min() > -1e-9
        assert torch.linalg.matrix_rank(whole - gram, rtol=1e-9) == 1


def test_subclasses_do_not_depend_on_a_shift_of_the_class():
    hidden, labels, head = embeddings()
    own = labels == 1

    def run(x):
        generator = torch.Generator().manual_seed(0)
        return recipes.lelp_subclasses(x, labels, head, 2, generator=generator)[own, 1]

    moved = torch.where(own.unsqueeze(-1), hidden + torch.randn(9), hidden)
    torch.testing.assert_close(run(moved), run(hidden))


def test_one_subclass_is_plain_distillation():
    given = lelp_problem(torch.float64)
    student = given["student_logits"][..., :VOCAB]
    found = recipes.lelp(student, given["teacher_logits"], torch.ones(TEXTS, LENGTH, VOCAB, 1))
    right = fastkd.softmax_divergence(student, given["teacher_logits"], divergence="cross_entropy")
    torch.testing.assert_close(found, right)


def test_a_student_that_knows_the_subclasses_has_the_teachers_classes():
    given = lelp_problem(torch.float64)
    best = given["teacher_logits"].log_softmax(-1).unsqueeze(-1) + given["subclasses"].log()
    student = best.flatten(-2).requires_grad_()
    recipes.lelp(student, given["teacher_logits"], given["subclasses"]).backward()
    assert student.grad.abs().max() < 1e-15
    classes = student.unflatten(-1, (VOCAB, 2)).logsumexp(-1)
    torch.testing.assert_close(classes, given["teacher_logits"].log_softmax(-1))


def test_errors_name_the_recipe_and_the_argument():
    x, wider, image = torch.zeros(2, 5), torch.zeros(2, 6), torch.zeros(2, 3, 4, 4)
    y = torch.zeros(2, dtype=torch.int64)
    h, head = torch.randn(8, 6), torch.randn(3, 6)
    labels = torch.arange(8) % 3
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
        (r.cwd, (x, x), {}, r"student_maps must be \[B, C, H, W\]"),
        (r.cwd, (image, image[:1]), {}, "teacher_maps must have the shape"),
        (r.cwd, (image, image), {"temperature": 0.0}, "temperature must be positive"),
        (r.lad_consistency, (image, image), {"weight": 0.0}, "weight must be positive"),
        (r.lad_label_map, (x, 5), {}, "labels must be int64 or int32"),
        (r.lad_label_map, (y, 0), {}, "num_classes must be positive"),
        (r.lad_label_map, (y, 3), {"values": x}, r"values must be \[3\]"),
        (r.lelp, (x, x, torch.ones(2, 5, 2)), {}, "student_logits must have 5 x 2 columns"),
        (r.lelp, (x, x, torch.ones(2, 4, 2)), {}, r"teacher_logits must be \[N, C\] and subcl"),
        (r.lelp_subclasses, (h, labels, head, 4), {}, r"num_sub must be in \[1, 3\]"),
        (r.lelp_subclasses, (h, labels, x, 1), {}, "head must have hidden's 6 channels"),
        (r.lelp_subclasses, (h, labels + 1, head, 1), {}, "labels must lie in"),
    ]
    for function, arguments, options, message in wrong:
        with pytest.raises((ValueError, TypeError, IndexError), match=message) as caught:
            function(*arguments, **options)
        assert str(caught.value).startswith(f"{function.__name__}: ")


def test_a_row_of_infinite_logits_in_bf16():
    """Masked columns are probability 0 on both sides."""
    given = {k: x.bfloat16() for k, x in both(torch.float32).items()}
    for x in given.values():
        x[:, -1] = -math.inf
    loss = recipes.meal_v2(given["student_logits"], [given["teacher_logits"]])
    assert loss.isfinite()
