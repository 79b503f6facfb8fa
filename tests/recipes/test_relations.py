"""Recipes on relations of a batch against their definitions in loops."""

import inspect
import math
import operator
import re
from pathlib import Path

import pytest
import torch
from cases import logits
from recipe_checks import Entry, at_once, mixed_dtypes, one_graph, one_graph_for_all, promises
from test_attention import plain_kl
from test_features import smooth_l1
from test_mutual_information import infonce_problem, plain_infonce

import fastkd
from fastkd import recipes

N, WIDTH, OTHER = 5, 4, 3
#: Numbers of the paper that were not found.
REQUIRED = inspect.Parameter.empty


def both(dtype, student=(N, WIDTH), teacher=(N, OTHER), what="hidden"):
    return {f"student_{what}": logits(student, dtype), f"teacher_{what}": logits(teacher, dtype)}


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def length(a):
    return dot(a, a).sqrt()


def unit_rows(gram):
    return [[x / sum(y * y for y in row).sqrt() for x in row] for row in gram]


def gram_difference(student, teacher):
    """Of Gram matrices with rows of length 1."""
    grams = [unit_rows([[dot(a, b) for b in rows] for a in rows]) for rows in (student, teacher)]
    n = len(student)
    return sum((grams[0][i][j] - grams[1][i][j]) ** 2 for i in range(n) for j in range(n))


def plain_sp(student_hidden, teacher_hidden):
    flat = [x.flatten(1) for x in (student_hidden, teacher_hidden)]
    return gram_difference(*flat) / len(student_hidden) ** 2


def plain_ickd(student_maps, teacher_maps):
    pairs = zip(student_maps.flatten(2), teacher_maps.flatten(2), strict=True)
    return sum(gram_difference(s, t) for s, t in pairs) / (
        student_maps.size(0) * student_maps.size(1)
    )


def plain_distances(rows):
    return [[length(a - b) if a is not b else a[0] * 0 for b in rows] for a in rows]


def plain_rkd(student_hidden, teacher_hidden, weights=(25.0, 50.0)):
    sides = [list(x) for x in (student_hidden, teacher_hidden)]
    scaled = []
    for rows in sides:
        d = plain_distances(rows)
        scale = sum(sum(row) for row in d) / (N * (N - 1))
        scaled.append([[x / scale for x in row] for row in d])
    pairs = [(i, j) for i in range(N) for j in range(N)]
    first = sum(smooth_l1(scaled[0][i][j] - scaled[1][i][j]) for i, j in pairs) / N**2

    def angle(rows, i, j, k):
        a, b = rows[j] - rows[i], rows[k] - rows[i]
        return dot(a, b) / (length(a) * length(b))

    second = 0
    for i in range(N):
        for j in range(N):
            for k in range(N):
                if i not in (j, k):
                    second = second + smooth_l1(angle(sides[0], i, j, k) - angle(sides[1], i, j, k))
    return weights[0] * first + weights[1] * second / N**3


def plain_diswot(student_hidden, teacher_hidden, student_gradients, teacher_gradients):
    classes = len(student_gradients)
    semantic = gram_difference(student_gradients, teacher_gradients) / classes
    return -plain_sp(student_hidden, teacher_hidden) - semantic


def diswot_problem(dtype):
    return {**both(dtype), **both(dtype, (6, WIDTH), (6, OTHER), "gradients")}


def plain_cka(student_hidden, teacher_hidden):
    x, y = (z.flatten(1) - z.flatten(1).mean(0) for z in (student_hidden, teacher_hidden))

    def size(a, b):
        return sum(dot(a[:, i], b[:, j]) ** 2 for i in range(a.size(1)) for j in range(b.size(1)))

    return size(x, y) / (size(x, x) * size(y, y)).sqrt()


def plain_mmd(student_hidden, teacher_hidden, bandwidth):
    def kernel(a, b):
        values = [(-dot(x - y, x - y) / (2 * bandwidth**2)).exp() for x in a for y in b]
        return sum(values) / len(values)

    s, t = list(student_hidden), list(teacher_hidden)
    return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)


def centred(rows):
    d = plain_distances(list(rows))
    means = [sum(row) / N for row in d]
    overall = sum(means) / N
    return [[d[i][j] - means[i] - means[j] + overall for j in range(N)] for i in range(N)]


def plain_dcov(x, y):
    a, b = centred(x), centred(y)
    return sum(a[i][j] * b[i][j] for i in range(N) for j in range(N)) / N**2


def plain_dcor(x, y):
    return (plain_dcov(x, y) / (plain_dcov(x, x) * plain_dcov(y, y)).sqrt()).sqrt()


def two(dtype):
    return {"x": logits((N, WIDTH), dtype), "y": logits((N, 2), dtype)}


def plain_graph(rows, k, sigma):
    graph = []
    for i in range(len(rows)):
        square = [dot(rows[i] - rows[j], rows[i] - rows[j]) for j in range(len(rows))]
        order = sorted(range(len(rows)), key=lambda j: (j != i, float(square[j].detach())))
        near = set(order[: k + 1])
        zero = square[0] * 0
        graph.append(
            torch.stack(
                [(-square[j] / (2 * sigma)).exp() if j in near else zero for j in range(len(rows))]
            )
        )
    return graph


def plain_trg(student_hidden, teacher_hidden, k, sigma, weights, temperature=0.1):
    sides = [list(x.flatten(0, 1)) for x in (student_hidden, teacher_hidden)]
    graphs = [plain_graph(rows, k, sigma) for rows in sides]
    local = sum(
        plain_kl(t.softmax(-1), s.softmax(-1)) for s, t in zip(*graphs, strict=True)
    )  # KL(A_S || A_T)
    total = weights[0] * local
    if weights[1]:
        assert len(sides[0]) == N  # of plain_infonce
        total = total + weights[1] * plain_infonce(*sides, temperature)
    inner = 0
    patches = student_hidden.size(1)
    for s, t in zip(student_hidden, teacher_hidden, strict=True):
        for i in range(patches):
            rows = [
                torch.stack([dot(x[i], x[j]) / math.sqrt(len(x[i])) for j in range(patches)])
                for x in (s, t)
            ]
            inner = inner + (rows[0].softmax(-1) - rows[1].softmax(-1)).square().sum()
    return total + weights[2] * inner / (student_hidden.size(0) * patches**2)


def images(dtype):
    """The widths differ: without the global term."""
    return {
        "student_hidden": logits((2, 4, WIDTH), dtype, 0.7),
        "teacher_hidden": logits((2, 4, OTHER), dtype, 0.7),
    }


def one_image(dtype):
    return {k: x.unsqueeze(0) * 0.3 for k, x in infonce_problem(dtype).items()}


def near_tokens(dtype):
    """All nearer to each other than 1."""
    return {k: 0.1 * x for k, x in images(dtype).items()}


def maps(dtype):
    return both(dtype, (2, 3, 2, 2), (2, 3, 4, 1), "maps")


def entry(name, definition, problem=both, leaves=None, options=None, **more):
    return Entry(
        name,
        at_once(definition),
        options or {},
        problem,
        leaves or tuple(problem(torch.float32)),
        (),
        read=None,
        # Features of 8 bits times each other.
        bf16_error=2e-2,
        # torch.cdist has no second derivatives.
        twice=name not in ("mmd", "distance_covariance", "distance_correlation", "trg"),
        **more,
    )


ENTRIES = [
    entry("sp", plain_sp),
    entry("sp", plain_sp, lambda dtype: both(dtype, (N, 2, 2), (N, 3, 1))),
    entry("ickd", plain_ickd, maps),
    entry("rkd", plain_rkd, published={"weights": (25.0, 50.0)}),
    entry("diswot", plain_diswot, diswot_problem),
    entry("linear_cka", plain_cka, lambda dtype: both(dtype, (7, 3), (7, 2))),
    entry("linear_cka", plain_cka, lambda dtype: both(dtype, (3, 2, 3), (3, 4))),
    entry(
        "mmd",
        plain_mmd,
        lambda dtype: both(dtype, (N, OTHER), (N + 1, OTHER)),
        options={"bandwidth": 1.7},
    ),
    entry("distance_covariance", plain_dcov, two),
    entry("distance_correlation", plain_dcor, two),
    entry(
        "trg",
        plain_trg,
        images,
        options={"k": 3, "sigma": 2.0, "weights": (0.5, 0.0, 2.0)},
        published={"weights": (1.0, 1.0, 1.0), "k": REQUIRED, "sigma": REQUIRED},
    ),
    entry(
        "trg",
        plain_trg,
        near_tokens,
        options={"k": 3, "sigma": 0.02, "weights": (1.0, 0.0, 1.0)},
    ),
    entry(
        "trg",
        plain_trg,
        one_image,
        options={"k": 2, "sigma": 2.0, "weights": (0.5, 2.0, 1.0), "temperature": 0.3},
    ),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)
GIVEN = one_image(torch.float32)
test_one_graph_for_all_numbers = one_graph_for_all(
    {
        "trg": lambda x: recipes.trg(
            **GIVEN, k=2, sigma=10 * x, temperature=x, weights=(x, 1.0, x)
        ),
    }
)


def rotation(width):
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q


@pytest.mark.parametrize("name", ["sp", "rkd", "linear_cka"])
def test_rotations_and_scale_of_features_change_nothing(name):
    given = both(torch.float64)
    right = getattr(recipes, name)(**given)
    given["student_hidden"] = 0.01 * given["student_hidden"] @ rotation(WIDTH)
    torch.testing.assert_close(getattr(recipes, name)(**given), right)
    equal = getattr(recipes, name)(given["student_hidden"], -given["student_hidden"])
    expected = 1.0 if name == "linear_cka" else 0.0
    assert equal.item() == pytest.approx(expected, abs=1e-12)


def test_the_order_of_pixels_does_not_matter_to_ickd():
    given = maps(torch.float64)
    moved = given["student_maps"].flatten(2)[..., torch.randperm(4)]
    found = recipes.ickd(moved, given["teacher_maps"])
    torch.testing.assert_close(found, recipes.ickd(**given))


@pytest.mark.parametrize("name", ["sp", "rkd", "linear_cka", "distance_covariance"])
def test_zero_and_equal_rows_have_finite_gradients(name):
    student = torch.zeros(4, 3)
    student[3] = 1.0
    student.requires_grad_()
    getattr(recipes, name)(student, torch.randn(4, 3)).backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 1e3
    constant = torch.ones(4, 3, requires_grad=True)
    getattr(recipes, name)(constant, torch.randn(4, 3)).backward()
    assert constant.grad.isfinite().all()


def test_distance_correlation_knows_independence():
    x = torch.randn(400, 1, dtype=torch.float64)
    assert recipes.distance_correlation(x, torch.randn(400, 1)) < 0.15
    assert recipes.distance_correlation(x, x.square()) > 0.4
    assert recipes.distance_correlation(x, -2 * x + 1) == pytest.approx(1.0)
    assert recipes.distance_correlation(x, torch.ones_like(x)) == 0


def test_mmd_of_equal_sets_is_zero():
    x = torch.randn(6, 3, dtype=torch.float64)
    assert recipes.mmd(x, x[torch.randperm(6)], bandwidth=1.0).abs() < 1e-15


def test_trg_of_equal_features_has_only_its_global_term():
    x = images(torch.float64)["student_hidden"]
    options = {"k": 3, "sigma": 1.0}
    assert recipes.trg(x, x, **options, weights=(1.0, 0.0, 1.0)) == 0
    tokens = x.flatten(0, 1)
    expected = recipes.infonce(tokens, tokens, temperature=0.1)
    torch.testing.assert_close(recipes.trg(x, x, **options), expected)


def test_trg_does_not_depend_on_the_order_of_tokens():
    given = images(torch.float64)
    options = {"k": 3, "sigma": 2.0, "weights": (1.0, 0.0, 1.0)}
    order = torch.randperm(4)
    moved = {k: x[:, order] for k, x in given.items()}
    torch.testing.assert_close(recipes.trg(**moved, **options), recipes.trg(**given, **options))


def test_trg_on_some_tokens():
    given = images(torch.float32)
    layer = torch.nn.Linear(WIDTH, OTHER)
    options = {"k": 2, "sigma": 1.0, "projection": layer}

    def run(**more):
        generator = torch.Generator().manual_seed(3)
        return recipes.trg(**given, **options, generator=generator, **more)

    assert run(samples=3) == run(samples=3)
    assert run(samples=3) != run()
    torch.testing.assert_close(run(samples=4), run())  # all of them, in another order
    assert torch.autograd.grad(run(samples=2), layer.weight)[0].any()


def test_every_objective_of_the_survey_has_a_call():
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    table = text[text.index("## Objectives of the survey") :]
    calls = re.findall(r"`fastkd\.([\w.]+)`", table)
    assert len(calls) == 9
    for call in calls:
        assert callable(operator.attrgetter(call)(fastkd))


def test_errors_name_the_recipe_and_the_argument():
    x, image = torch.zeros(3, 4), torch.zeros(2, 3, 4)
    graph = {"k": 2, "sigma": 1.0}
    wrong = [
        (recipes.sp, (x, x[:2]), {}, r"teacher_hidden must be \[N, D\] with student_hidden's N"),
        (recipes.sp, (x[0], x), {}, r"student_hidden must be \[N, D\]"),
        (recipes.ickd, (image, image[:1]), {}, "student_maps and teacher_maps must be"),
        (recipes.rkd, (x, x), {"weights": (1.0,)}, "weights must be 2 numbers"),
        (recipes.rkd, (x, x.long()), {}, "teacher_hidden must be floating-point"),
        (recipes.diswot, (x, x, x, x[:2]), {}, "teacher_gradients must have student_gradients'"),
        (recipes.diswot, (x, x[:2], x, x), {}, "teacher_hidden must be"),
        (recipes.linear_cka, (x, x[:2]), {}, "teacher_hidden must be"),
        (recipes.mmd, (x, x[:, :2]), {"bandwidth": 1.0}, "teacher_hidden must have student_hid"),
        (recipes.mmd, (x, x), {"bandwidth": 0.0}, "bandwidth must be positive"),
        (recipes.distance_covariance, (x, x[:2]), {}, r"y must be \[N, D\] with x's N"),
        (recipes.distance_correlation, (x, "y"), {}, "y must be a tensor, got str"),
        (recipes.trg, (x, x), graph, r"student_hidden must be \[B, P, D\]"),
        (recipes.trg, (image, image[:, :2]), graph, "teacher_hidden must have student_hidden's"),
        (recipes.trg, (image, image[..., :2]), graph, "student_hidden must have teacher_hidden's"),
        (recipes.trg, (image, image), {**graph, "k": 6}, r"k must be in \[1, 6\)"),
        (recipes.trg, (image, image), {**graph, "samples": 4}, r"samples must be in \[1, 3\]"),
        (recipes.trg, (image, image), {"k": 1, "sigma": 0.0}, "sigma must be positive"),
    ]
    for function, arguments, options, message in wrong:
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            function(*arguments, **options)
        assert str(caught.value).startswith(f"{function.__name__}: ")
