"""Several source models against definitions in loops."""

import math

import pytest
import torch
from cases import logits
from recipe_checks import Entry, mixed_dtypes, one_graph, one_graph_for_all, problem, promises
from test_attention import plain_kl
from test_vision import without_elementmean

import fastkd
from fastkd import recipes

WIDTHS = (4, 11, 3)


def sources(dtype):
    """A tensor for each side of each source."""
    found = problem(dtype, "weight")
    names = [(side, k) for side in ("student", "teacher") for k in range(len(WIDTHS))]
    shape = found["mask"].shape
    sides = {f"{side}_{k}": logits((*shape, WIDTHS[k]), dtype, 1.5) for side, k in names}
    scores = torch.tensor([3.0, -1.0, 1.0], dtype=torch.float64)
    return {**sides, "scores": scores, "weight": found["weight"], "mask": found["mask"]}


def listed(tensors):
    """The arguments of the call."""
    rest = {k: x for k, x in tensors.items() if k in ("scores", "weight", "mask")}
    lists = {
        f"{side}_logits": [tensors[f"{side}_{k}"] for k in range(len(WIDTHS))]
        for side in ("student", "teacher")
    }
    return {**lists, **rest}


class Sources(Entry):
    def call(self, tensors, **options):
        return super().call(listed(tensors), **options)


def plain_weighted(tensors, power=1.0, temperature=1.0):
    tensors = listed(tensors)
    scores = [max(0.0, float(s)) ** power if s > 0 else 0.0 for s in tensors["scores"]]
    losses = torch.zeros(tensors["mask"].shape, dtype=torch.float64)
    for i, j in tensors["mask"].nonzero().tolist():
        total = 0
        for share, s, t in zip(
            scores, tensors["student_logits"], tensors["teacher_logits"], strict=True
        ):
            if share:
                q, p = ((z[i, j] / temperature).softmax(-1) for z in (s, t))
                total = total + share / sum(scores) * plain_kl(q, p)
        losses = losses.index_put(
            (torch.tensor(i), torch.tensor(j)), tensors["weight"][i, j] * total
        )
    return losses


def entry(**options):
    return Sources(
        "distill_weighted",
        plain_weighted,
        options,
        sources,
        ("student_0", "student_2"),
        without_elementmean(),
        published={"power": 1.0, "temperature": 1.0},
    )


ENTRIES = [entry(), entry(power=2.0, temperature=3.0)]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)
LOGITS = [logits((2, 5)) for _ in range(2)]
test_one_graph_for_all_numbers = one_graph_for_all(
    {"scores": lambda x: recipes.distill_weighted(LOGITS, LOGITS[::-1], [x, 1.0], power=x)}
)


def test_the_nearest_source_alone_is_distillation():
    given = listed(sources(torch.float64))
    given["scores"] = [0.0, 2.0, -3.0]
    pair = given["student_logits"][1], given["teacher_logits"][1]
    right = fastkd.softmax_divergence(*pair, weight=given["weight"], mask=given["mask"])
    torch.testing.assert_close(recipes.distill_weighted(**given), right)
    given["student_logits"][0][:] = math.nan  # not read
    torch.testing.assert_close(recipes.distill_weighted(**given), right)
    assert recipes.distill_weighted(**{**given, "scores": [-1.0, 0.0, -2.0]}) == 0
    del given["weight"]
    right = fastkd.softmax_divergence(*pair, mask=given["mask"])
    torch.testing.assert_close(recipes.distill_weighted(**given), right)


# ---- parc


def ranks_of(values):
    """Mean ranks, by counting."""
    values = [round(x, 10) for x in values]
    return [sum(y < x for y in values) + (sum(y == x for y in values) + 1) / 2 for x in values]


def plain_pearson(a, b):
    a, b = ([x - sum(v) / len(v) for x in v] for v in (a, b))
    top = sum(x * y for x, y in zip(a, b, strict=True))
    return top / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def plain_parc(features, labels, classes):
    n, width = features.shape
    columns = []
    for d in range(width):
        column = features[:, d].tolist()
        mean = sum(column) / n
        spread = math.sqrt(sum((x - mean) ** 2 for x in column) / n)
        columns.append([(x - mean) / (spread or 1) for x in column])
    rows = list(zip(*columns, strict=True))
    hot = [[float(c == label) for c in range(classes)] for label in labels.tolist()]
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    sides = [ranks_of([1 - plain_pearson(x[i], x[j]) for i, j in pairs]) for x in (rows, hot)]
    return 100 * plain_pearson(*sides)


def test_parc():
    labels = torch.randint(0, 3, (14,))
    features = torch.randn(14, 5, dtype=torch.float64)
    features[:, 3] = 2.0  # without variance
    features[4] = features[5]
    assert recipes.parc(features, labels, 3).item() == pytest.approx(
        plain_parc(features, labels, 3)
    )


def test_parc_of_the_labels_themselves():
    labels = torch.arange(28) % 4
    assert recipes.parc(torch.eye(4)[labels], labels, 4).item() == pytest.approx(100)
    features = torch.randn(300, 16)
    assert abs(recipes.parc(features, torch.randint(0, 4, (300,)), 4).item()) < 3


def test_errors_name_the_recipe_and_the_argument():
    x, wider = torch.zeros(2, 3), torch.zeros(2, 4)
    leaf = torch.zeros(2, 3, requires_grad=True)
    labels = torch.tensor([0, 1])
    function = recipes.distill_weighted
    wrong = [
        (function, (x, [x], [1.0]), {}, "student_logits must be a list of tensors, got Tensor"),
        (function, ([x], [x, x], [1.0]), {}, "teacher_logits must have 1 tensors"),
        (function, ([x], [wider], [1.0]), {}, r"teacher_logits\[0\] must have the shape"),
        (function, ([x, x[:1]], [x, x[:1]], [1, 1]), {}, r"student_logits\[1\] must have the lead"),
        (function, ([x], [leaf], [1.0]), {}, "teacher_logits takes no gradient"),
        (function, ([x], [x], [1.0]), {"weight": leaf[:, 0]}, "weight takes no gradient"),
        (function, ([x], [x], [1.0, 2.0]), {}, "scores must be 1 numbers"),
        (function, ([x], [x], [1.0]), {"power": -1.0}, "power must be finite and not negative"),
        (function, ([x], [x], [1.0]), {"mask": labels}, "mask must be bool"),
        (function, ([x], [x], [1.0]), {"weight": x}, "weight must be float"),
        (function, ([x], [x], [1.0]), {"reduction": "elementmean"}, "reduction elementmean has no"),
        (recipes.parc, (x, labels + 3, 3), {}, "labels must lie in"),
        (recipes.parc, (x, labels[:1], 3), {}, "labels must have shape"),
        (recipes.parc, (x[0], labels, 3), {}, r"features must be \[N, D\]"),
    ]
    for function, arguments, options, message in wrong:
        with pytest.raises((ValueError, TypeError, IndexError), match=message) as caught:
            function(*arguments, **options)
        assert str(caught.value).startswith(f"{function.__name__}: ")
