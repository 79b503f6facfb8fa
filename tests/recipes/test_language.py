"""Language models with one tokenizer against their definitions."""

import pytest
import torch
import torch.nn.functional as F
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
    with_,
)

import fastkd
from fastkd import recipes

ALL_BUT_COLUMNS = ("none", "sum", "mean", "batchmean", "sequence_mean")


def log_softmaxes(student, teacher, temperature=1.0):
    return [(z / temperature).log_softmax(-1) for z in (student, teacher)]


def kl(log_p, log_q):
    return sum(log_p[v].exp() * (log_p[v] - log_q[v]) for v in range(len(log_p)))


def plain_kd(student_logits, teacher_logits, labels=None, alpha=0.9, temperature=2.0):
    q, p = log_softmaxes(student_logits, teacher_logits, temperature)
    loss = alpha * temperature**2 * kl(p, q)
    if labels is not None:
        loss = loss - (1 - alpha) * student_logits.log_softmax(-1)[labels]
    return loss


def plain_sequence_kd(student_logits, labels, temperature=1.0):
    return -(student_logits / temperature).log_softmax(-1)[labels]


def plain_ddk(student_logits, teacher_logits, labels, gamma=0.2, divergence="forward_kl"):
    q, p = log_softmaxes(student_logits, teacher_logits)
    return gamma * (kl(p, q) if divergence == "forward_kl" else kl(q, p)) - q[labels]


def plain_llava_mod(student_logits, teacher_logits, vocab_size=151936):
    columns = min(vocab_size, len(student_logits), len(teacher_logits))
    q, p = log_softmaxes(student_logits[:columns], teacher_logits[:columns])
    return -sum(p[v].exp() * q[v] for v in range(columns))


def plain_distillspec(student_logits, teacher_logits, divergence="tvd", beta=0.5, temperature=1.0):
    q, p = log_softmaxes(student_logits, teacher_logits, temperature)
    if divergence == "tvd":
        return sum((p[v].exp() - q[v].exp()).abs() for v in range(len(p))) / 2
    if divergence == "jsd":
        m = (beta * p.exp() + (1 - beta) * q.exp()).log()
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    return kl(p, q) if divergence == "forward_kl" else kl(q, p)


def two_widths(dtype):
    tensors = problem(dtype)
    tensors["teacher_logits"] = logits((*tensors["mask"].shape, 16), dtype)
    return tensors


def without_teacher(*extra):
    def make(dtype):
        tensors = problem(dtype, "labels", *extra)
        del tensors["teacher_logits"]
        return tensors

    return make


def with_hidden(teachers):
    def make(dtype):
        tensors = problem(dtype, "labels")
        shape = tensors["student_logits"].shape
        if teachers:
            tensors["teacher_logits"] = [logits(shape, dtype) for _ in range(teachers)]
        for side in ("student", "teacher"):
            tensors[f"{side}_hidden"] = logits((*shape[:-1], 6), dtype)
        return tensors

    return make


def plain_distilbert(tensors, weights=(5.0, 2.0, 1.0), temperature=2.0):
    mask, labels, teachers = (tensors[x] for x in ("mask", "labels", "teacher_logits"))
    teachers = teachers if isinstance(teachers, list) else [teachers]
    first, count, third = 0, 0, 0
    for b, t in mask.nonzero().tolist():
        z = tensors["student_logits"][b, t]
        s, h = (tensors[f"{side}_hidden"][b, t] for side in ("student", "teacher"))
        third = third + 1 - (s @ h) / (s.norm() * h.norm())
        if labels[b, t] == -100:
            continue
        p = sum((x[b, t] / temperature).softmax(-1) for x in teachers) / len(teachers)
        q = (z / temperature).log_softmax(-1)
        first = first + weights[0] * temperature**2 * kl(p.log(), q)
        first = first - weights[1] * z.log_softmax(-1)[labels[b, t]]
        count += 1
    return first / count + weights[2] * third / int(mask.sum())


ENTRIES = [
    Entry(
        "kd",
        by_rows(plain_kd),
        problem=with_("labels"),
        published={"alpha": 0.9, "temperature": 2.0},
    ),
    Entry("kd", by_rows(plain_kd), {"alpha": 0.5, "temperature": 3.0}, with_("weight")),
    Entry(
        "sequence_kd",
        by_rows(plain_sequence_kd),
        problem=without_teacher("weight"),
        reductions=ALL_BUT_COLUMNS,
        published={"temperature": 1.0},
    ),
    Entry(
        "distilbert",
        plain_distilbert,
        problem=with_hidden(2),
        leaves=("student_logits", "student_hidden"),
        reductions=(),
        read=lambda tensors: tensors["mask"],
        published={"weights": (5.0, 2.0, 1.0), "temperature": 2.0},
    ),
    Entry(
        "distilbert",
        plain_distilbert,
        {"weights": (1.0, 0.5, 3.0), "temperature": 1.0},
        problem=with_hidden(0),
        leaves=("student_logits", "student_hidden"),
        reductions=(),
        read=lambda tensors: tensors["mask"],
    ),
    Entry(
        "ddk",
        by_rows(plain_ddk),
        problem=with_("labels"),
        published={"gamma": 0.2, "temperature": 1.0, "divergence": "forward_kl"},
    ),
    Entry(
        "ddk",
        by_rows(plain_ddk),
        {"gamma": 0.5, "divergence": "reverse_kl"},
        problem=with_("labels", "weight"),
    ),
    Entry(
        "llava_mod",
        by_rows(plain_llava_mod),
        problem=two_widths,
        reductions=ALL_BUT_COLUMNS,
        published={"vocab_size": 151936},
    ),
    Entry("distillspec", by_rows(plain_distillspec), published={"divergence": "tvd", "beta": 0.5}),
    Entry("distillspec", by_rows(plain_distillspec), {"divergence": "jsd", "beta": 0.3}),
    Entry("distillspec", by_rows(plain_distillspec), {"divergence": "reverse_kl"}),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)
GIVEN, HIDDEN = problem(torch.float32, "labels"), with_hidden(2)(torch.float32)
TEXT, SIDES = without_teacher()(torch.float32), problem(torch.float32)
SHARES = torch.tensor([0.2, 0.3, 0.5])
test_one_graph_for_all_numbers = one_graph_for_all(
    {
        "all": lambda x: (
            recipes.kd(**GIVEN, alpha=x, temperature=x)
            + recipes.sequence_kd(**TEXT, temperature=x)
            + recipes.distilbert(**HIDDEN, weights=(x, x, x), temperature=x)
            + recipes.ddk(**GIVEN, gamma=x, temperature=x)
            + recipes.ddk_factors(SHARES, SHARES, SHARES, alpha=x).sum()
            + recipes.distillspec(**SIDES, divergence="jsd", beta=x, temperature=x)
        )
    }
)


def test_kd_of_alpha_one_is_the_divergence():
    tensors = problem(torch.float64)
    found = recipes.kd(**tensors, alpha=1.0, temperature=3.0)
    right = fastkd.softmax_divergence(**tensors, temperature=3.0, square_temperature=True)
    assert found == right


def test_sequence_kd_of_chunks():
    """The chunks' sums add up to the text's, which is torch's cross-entropy."""
    tensors = without_teacher()(torch.float64)
    z, labels = tensors["student_logits"], tensors["labels"]
    whole = F.cross_entropy(z.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(recipes.sequence_kd(z, labels), whole)
    place = torch.arange(labels.size(1)).expand_as(labels)
    chunks = [
        recipes.sequence_kd(z, labels, mask=place // 2 == chunk, reduction="sum")
        for chunk in range(3)
    ]
    torch.testing.assert_close(sum(chunks), recipes.sequence_kd(z, labels, reduction="sum"))


def test_distilbert_of_copies_of_a_teacher():
    tensors = with_hidden(0)(torch.float64)
    one = recipes.distilbert(**tensors)
    copies = [tensors["teacher_logits"]] * 3
    found = recipes.distilbert(**{**tensors, "teacher_logits": copies})
    torch.testing.assert_close(found, one)


def test_acceptance():
    tensors = problem(torch.float64)
    q, p = (tensors[f"{side}_logits"].softmax(-1) for side in ("student", "teacher"))
    found = recipes.acceptance(tensors["student_logits"], tensors["teacher_logits"])
    torch.testing.assert_close(found, torch.minimum(p, q).sum(-1))
    distance = recipes.distillspec(**tensors)
    accepted = reduced(found, kept_of(tensors), "none")[tensors["mask"]].mean()
    torch.testing.assert_close(accepted, 1 - distance)


def test_ddk_factors():
    r, student, teacher = (torch.rand(5, dtype=torch.float64) + 0.5 for _ in range(3))
    r = r / r.sum()
    psi = [r[i] * (student[i] / teacher[i]).exp() for i in range(5)]
    right = [0.3 * x / sum(psi) + 0.7 / 5 for x in psi]
    found = recipes.ddk_factors(r, student, teacher, alpha=0.3)
    torch.testing.assert_close(found, torch.stack(right))
    torch.testing.assert_close(found.sum(), torch.ones(()).double())
    one = recipes.ddk_factors(*(torch.ones(1) * x for x in (1.0, 30.0, 7.0)))
    assert one == 1
    equal = torch.full((4,), 0.25)
    torch.testing.assert_close(recipes.ddk_factors(equal, *(torch.full((4,), 9.0),) * 2), equal)
    huge = recipes.ddk_factors(equal, torch.tensor([1e4, 1.0, 1.0, 1.0]), torch.ones(4))
    torch.testing.assert_close(huge, torch.tensor([0.625, 0.125, 0.125, 0.125]))


def test_errors():
    tensors = problem(torch.float32, "labels")
    for alpha, message in ((0.0, "positive, got 0"), (1.5, r"lie in \[0, 1\], got 1.5")):
        with pytest.raises(ValueError, match=f"kd: alpha must (be )?{message}"):
            recipes.kd(**tensors, alpha=alpha)
    with pytest.raises(ValueError, match="ddk: gamma must be positive, got 0"):
        recipes.ddk(**tensors, gamma=0.0)
    with pytest.raises(ValueError, match=r"sequence_kd: labels must have shape \[3, 5\]"):
        recipes.sequence_kd(tensors["student_logits"], tensors["labels"][:1])
    with pytest.raises(ValueError, match="distillspec: divergence must be one of forward_kl, rev"):
        recipes.distillspec(tensors["student_logits"], tensors["teacher_logits"], divergence="kl")
    with pytest.raises(ValueError, match=r"ddk_factors: teacher_perplexity must be \[domains\]"):
        recipes.ddk_factors(torch.ones(3), torch.ones(3), torch.ones(2))
    hidden = with_hidden(2)(torch.float32)
    with pytest.raises(ValueError, match="distilbert: weights must begin with a positive number"):
        recipes.distilbert(**hidden, weights=(0.0, 1.0, 1.0))
    hidden["teacher_logits"][1] = torch.zeros(3, 4, 11)
    with pytest.raises(ValueError, match=r"distilbert: teacher_logits\[1\] must have the leading"):
        recipes.distilbert(**hidden)
