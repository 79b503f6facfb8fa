"""infonce and mi_alpha against loops, and bounds where the information is known."""

import math

import pytest
import torch
from cases import logits
from recipe_checks import Entry, at_once, mixed_dtypes, one_graph, one_graph_for_all, promises
from test_features import plain_cosine

from fastkd import recipes

N = 5


def plain_infonce(student_hidden, teacher_hidden, temperature=1.0):
    losses = []
    for i in range(N):
        scores = [
            (plain_cosine(student_hidden[i], teacher_hidden[j]) / temperature).exp()
            for j in range(N)
        ]
        losses.append(-(scores[i] / sum(scores)).log())
    return sum(losses) / N


def infonce_problem(dtype):
    return {name: logits((N, 4), dtype) for name in ("student_hidden", "teacher_hidden")}


def plain_mi_alpha(scores, log_baseline, alpha=0.5):
    def m(i, j):
        batch = sum(scores[i, k].exp() for k in range(N) if k != j) / (N - 1)
        return alpha * batch + (1 - alpha) * log_baseline[i].exp()

    pairs = [(i, j) for i in range(N) for j in range(N) if i != j]
    joint = sum(scores[i, i] - m(i, j).log() for i, j in pairs)
    marginal = sum(scores[i, j].exp() / m(i, i) for i, j in pairs)
    return (marginal - joint) / len(pairs) - 1


def scores_problem(dtype):
    return {"scores": logits((N, N), dtype, 1.5), "log_baseline": logits((N,), dtype, 1.0)}


UNMASKED = {"reductions": (), "read": None}
ENTRIES = [
    Entry(
        "infonce",
        at_once(plain_infonce),
        {},
        infonce_problem,
        ("student_hidden", "teacher_hidden"),
        **UNMASKED,
        published={"temperature": 1.0},
    ),
    Entry(
        "infonce",
        at_once(plain_infonce),
        {"temperature": 0.2},
        infonce_problem,
        ("student_hidden",),
        **UNMASKED,
    ),
    Entry(
        "mi_alpha",
        at_once(plain_mi_alpha),
        {},
        scores_problem,
        ("scores", "log_baseline"),
        **UNMASKED,
        published={"alpha": 0.5},
        # Differences of exponentials of numbers with 8 bits.
        bf16_error=3e-2,
    ),
    *(
        Entry(
            "mi_alpha",
            at_once(plain_mi_alpha),
            {"alpha": alpha},
            scores_problem,
            ("scores", "log_baseline") if alpha < 1 else ("scores",),
            **UNMASKED,
            bf16_error=3e-2,
        )
        for alpha in (0.0, 0.3, 1.0)
    ),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)
GIVEN = scores_problem(torch.float32)
test_one_graph_for_all_numbers = one_graph_for_all(
    {
        "alpha": lambda x: recipes.mi_alpha(**GIVEN, alpha=x),
    }
)


def test_infonce_of_equal_orthogonal_rows():
    expected = math.log((math.e + N - 1) / math.e)
    assert recipes.infonce(torch.eye(N).double(), torch.eye(N).double()) == pytest.approx(expected)


def test_infonce_with_zero_rows():
    student = torch.randn(N, 3)
    student[1] = 0
    student.requires_grad_()
    recipes.infonce(student, torch.randn(N, 3)).backward()
    assert student.grad.isfinite().all()
    assert not student.grad[1].any()


def test_a_dominant_score_loses_no_digits():
    """The sum of the others, where one score is all of float32's sum."""
    scores = torch.zeros(N, N)
    scores[:, 0] = 30.0
    scores.requires_grad_()
    baseline = torch.zeros(N)
    exact = scores.detach().double().requires_grad_()
    mine, true = (
        torch.autograd.grad(loss, leaf)[0]
        for loss, leaf in (
            (recipes.mi_alpha(scores, baseline, alpha=1.0), scores),
            (plain_mi_alpha(exact, baseline.double(), alpha=1.0), exact),
        )
    )
    torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-6)


def test_the_bound_stays_below_the_information_of_gaussians():
    """Correlated Gaussians have -log(1 - rho^2) / 2 nats; the optimal critic is known."""
    n, rho = 64, 0.8
    information = -math.log(1 - rho**2) / 2
    found = []
    for _ in range(200):
        x = torch.randn(n, dtype=torch.float64)
        y = rho * x + math.sqrt(1 - rho**2) * torch.randn(n, dtype=torch.float64)
        # log p(y | x) - log p(y)
        joint = -((y - rho * x.unsqueeze(-1)) ** 2) / (2 * (1 - rho**2)) + y**2 / 2 + information
        found.append([-recipes.mi_alpha(joint, torch.zeros(n), alpha=a) for a in (0.0, 0.5, 1.0)])
    for bound in torch.tensor(found).mean(0).tolist():
        assert information - 0.1 < bound < information + 0.02


def test_the_order_of_the_batch_does_not_matter():
    given, order = scores_problem(torch.float64), torch.randperm(N)
    moved = recipes.mi_alpha(given["scores"][order][:, order], given["log_baseline"][order])
    torch.testing.assert_close(moved, recipes.mi_alpha(**given))


def test_a_critic_learns():
    x = torch.randn(256, 2)
    y = torch.cat([x, torch.randn(256, 1)], -1)
    critic = recipes.MiCritic(2, 3, hidden=32, dim=16)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = recipes.mi_alpha(*critic(x[:64], y[:64]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(p.grad is not None for p in critic.parameters())


def test_errors_name_the_recipe_and_the_argument():
    x = torch.zeros(3, 4)
    square = torch.zeros(3, 3)
    wrong = [
        (recipes.infonce, (x, x[:2]), {}, "teacher_hidden must have the shape"),
        (recipes.infonce, (x[0], x[0]), {}, r"student_hidden must be \[N, D\]"),
        (recipes.infonce, (x, x), {"temperature": 0}, "temperature must be positive"),
        (recipes.mi_alpha, (x, x[:, 0]), {}, r"scores must be \[n, n\] with n at least 2"),
        (recipes.mi_alpha, (square[:1, :1], x[:1, 0]), {}, r"scores must be \[n, n\] with n"),
        (recipes.mi_alpha, (square, x[0]), {}, r"log_baseline must be \[3\]"),
        (recipes.mi_alpha, (square, square[0]), {"alpha": 1.5}, "alpha must lie in"),
    ]
    for function, arguments, options, message in wrong:
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            function(*arguments, **options)
        assert str(caught.value).startswith(f"{function.__name__}: ")
