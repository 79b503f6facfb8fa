"""Recipes of rankings against their definitions in loops."""

import itertools
import math

import pytest
import torch
from cases import logits
from recipe_checks import Entry, at_once, mixed_dtypes, one_graph, one_graph_for_all, promises

import fastkd
from fastkd import recipes

B, N = 4, 6


def scores(dtype):
    return {f"{side}_scores": logits((B, N), dtype, 1.5) for side in ("student", "teacher")}


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def plain_rank_net(student_scores, teacher_scores):
    losses = []
    for s, t in zip(student_scores, teacher_scores.detach(), strict=True):
        for i, j in itertools.combinations(range(len(s)), 2):
            q, p = sigmoid(s[i] - s[j]), sigmoid(t[i] - t[j])
            losses.append(-p * q.log() - (1 - p) * (1 - q).log())
    return sum(losses) / len(losses)


def plain_list_net(student_scores, teacher_scores, temperature=1.0):
    total = 0
    for s, t in zip(student_scores, teacher_scores.detach(), strict=True):
        q, p = (s / temperature).softmax(-1), (t / temperature).softmax(-1)
        total = total + sum(p[i] * (p[i] / q[i]).log() for i in range(len(s)))
    return total / len(student_scores)


def plain_lambda(student_scores, relevance, k=5):
    total = pairs = 0
    for s, r in zip(student_scores, relevance, strict=True):
        n = len(s)
        k = n if k is None else k
        order = sorted(range(n), key=lambda i: -float(s[i].detach()))
        rank = {i: place + 1 for place, i in enumerate(order)}
        discount = [1 / math.log2(rank[i] + 1) if rank[i] <= k else 0.0 for i in range(n)]
        gains = [2 ** float(x) - 1 for x in r]
        best = sorted(gains, reverse=True)
        ideal = sum(g / math.log2(place + 2) for place, g in enumerate(best[:k]))
        for i, j in itertools.permutations(range(n), 2):
            pairs += 0.5
            if r[i] > r[j]:
                weight = abs(gains[i] - gains[j]) * abs(discount[i] - discount[j]) / ideal
                total = total + weight * (1 + (s[j] - s[i]).exp()).log()
    return total / pairs


def graded(dtype):
    found = scores(dtype)
    relevance = torch.randint(0, 4, (B, N)).to(dtype)
    relevance[1] = 2  # nothing to rank
    return {"student_scores": found["student_scores"], "relevance": relevance}


def hardly_graded(dtype):
    """The ideal of each list is below 1."""
    found = graded(dtype)
    return {**found, "relevance": found["relevance"] / 16}


def binary(like):
    found = torch.zeros_like(like)
    found[:, 0] = 1
    return found


def plain_dear(student_scores, teacher_scores, main="softmax_ce", alpha=0.3, temperature=2.0):
    positive = -student_scores.log_softmax(-1)[:, 0].mean()
    loss = {
        "softmax_ce": lambda: positive,
        "ranknet": lambda: plain_rank_net(student_scores, teacher_scores),
        "listnet": lambda: plain_list_net(student_scores, teacher_scores),
        "lambda": lambda: plain_lambda(student_scores, binary(student_scores)),
        "ranknet_softmax_ce": lambda: (
            (plain_rank_net(student_scores, binary(student_scores)) + positive) / 2
        ),
    }[main]()
    kl = plain_list_net(student_scores, teacher_scores, temperature)
    return (1 - alpha) * loss + alpha * temperature**2 * kl


def entry(name, definition, problem=scores, options=None, **more):
    return Entry(
        name,
        at_once(definition),
        options or {},
        problem,
        ("student_scores",),
        (),
        read=None,
        **more,
    )


ENTRIES = [
    entry("rank_net", plain_rank_net),
    entry("list_net", plain_list_net, published={"temperature": 1.0}),
    entry("list_net", plain_list_net, options={"temperature": 3.0}),
    entry("lambda_rank", plain_lambda, graded, published={"k": 5}),
    entry("lambda_rank", plain_lambda, graded, {"k": 2}),
    entry("lambda_rank", plain_lambda, hardly_graded),
    entry("lambda_rank", plain_lambda, graded, {"k": None}),
    entry("dear", plain_dear, published={"main": "softmax_ce", "alpha": 0.3, "temperature": 2.0}),
    *(
        entry("dear", plain_dear, options={"main": main, "alpha": 0.1})
        for main in ("ranknet", "listnet", "lambda", "ranknet_softmax_ce")
    ),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)
GIVEN = scores(torch.float32)
test_one_graph_for_all_numbers = one_graph_for_all(
    {
        "dear": lambda x: recipes.dear(**GIVEN, alpha=x, temperature=10 * x),
    }
)


@pytest.mark.parametrize("name", ["rank_net", "list_net", "lambda_rank"])
def test_the_order_of_passages_does_not_matter(name):
    student, teacher = scores(torch.float64).values()
    order = torch.randperm(N)
    function = getattr(recipes, name)
    grades = teacher.abs().round() if name == "lambda_rank" else teacher
    torch.testing.assert_close(
        function(student[:, order], grades[:, order]), function(student, grades)
    )


def test_the_ideal_order_has_the_least_lambda_loss():
    relevance = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    ideal = torch.tensor([3.0, 2.0, 1.0, 0.0])
    losses = {
        order: recipes.lambda_rank(ideal[list(order)].unsqueeze(0), relevance).item()
        for order in itertools.permutations(range(4))
    }
    assert min(losses, key=losses.get) == (0, 1, 2, 3)
    assert sorted(losses.values())[1] > losses[0, 1, 2, 3]


def test_two_passages_as_in_the_authors_code():
    """Its discount at the student's ranks is 1 / log2(rank + 2), that of the ideal 1."""
    student = logits((B, 2), torch.float64)
    relevance = binary(student)
    theirs = abs(1 / math.log2(3) - 1 / math.log2(4)) * -torch.nn.functional.logsigmoid(
        student[:, 0] - student[:, 1]
    )
    ratio = (1 - 1 / math.log2(3)) / abs(1 / math.log2(3) - 1 / math.log2(4))
    torch.testing.assert_close(recipes.lambda_rank(student, relevance), theirs.mean() * ratio)


def test_dear_is_distillation_alone():
    given = scores(torch.float64)
    kl = fastkd.softmax_divergence(*given.values(), temperature=2.0, square_temperature=True)
    torch.testing.assert_close(recipes.dear(**given, alpha=1.0), kl)
    own = recipes.dear(**given, main="ranknet", relevance="binary", alpha=0.0)
    other = recipes.dear(**given, main="ranknet", relevance=binary(own.expand(B, N)), alpha=0.0)
    assert own == other == recipes.rank_net(given["student_scores"], binary(own.expand(B, N)))


def test_lists_without_pairs():
    one = torch.zeros(3, 1, requires_grad=True)
    for name in ("rank_net", "list_net", "lambda_rank"):
        loss = getattr(recipes, name)(one, torch.ones(3, 1))
        loss.backward()
        assert loss == 0
    assert not one.grad.any()
    equal = torch.zeros(2, 4, requires_grad=True)
    recipes.lambda_rank(equal, torch.zeros(2, 4)).backward()
    assert not equal.grad.any()


def test_places_without_a_passage():
    student, teacher = scores(torch.float64).values()
    right = recipes.list_net(student[:, :4], teacher[:, :4])
    student, teacher = (x.clone() for x in (student, teacher))
    student[:, 4:] = teacher[:, 4:] = -math.inf
    torch.testing.assert_close(recipes.list_net(student, teacher), right)


def test_errors_name_the_recipe_and_the_argument():
    x, shorter = torch.zeros(2, 3), torch.zeros(2, 2)
    leaf = torch.zeros(2, 3, requires_grad=True)
    wrong = [
        (recipes.rank_net, (x, shorter), {}, "teacher_scores must have the shape"),
        (recipes.rank_net, (x, leaf), {}, "teacher_scores takes no gradient"),
        (recipes.lambda_rank, (x, leaf), {}, "relevance takes no gradient"),
        (recipes.dear, (x, leaf), {}, "teacher_scores takes no gradient"),
        (recipes.rank_net, (x[0], x[0]), {}, r"student_scores must be \[B, n\]"),
        (recipes.list_net, (x, x), {"temperature": 0.0}, "temperature must be positive"),
        (recipes.lambda_rank, (x, x - 1), {}, "relevance must not be negative"),
        (recipes.lambda_rank, (x, x), {"k": 0}, "k must be positive"),
        (recipes.lambda_rank, (x, x), {"k": 2.5}, "k must be an integer"),
        (recipes.dear, (x, x), {"main": "rank"}, "main must be one of softmax_ce"),
        (recipes.dear, (x, x), {"alpha": 1.5}, "alpha must lie in"),
        (recipes.dear, (x, x), {"relevance": "soft"}, "relevance must be one of teacher, binary"),
        (recipes.dear, (x, x), {"relevance": shorter}, "relevance must have the shape"),
        (
            recipes.dear,
            (x, x - 1),
            {"main": "lambda", "relevance": "teacher"},
            "relevance must not be negative",
        ),
    ]
    for function, arguments, options, message in wrong:
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            function(*arguments, **options)
        assert str(caught.value).startswith(f"{function.__name__}: ")
