"""Quantised distillation and its quantiser against loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import logits
from recipe_checks import Entry, at_once, mixed_dtypes, one_graph, one_graph_for_all, promises

from fastkd import recipes

N, CLASSES = 8, 5


def images(dtype):
    labels = torch.randint(0, CLASSES, (N,))
    labels[3] = -100
    return {
        "student_logits": logits((N, CLASSES), dtype, 1.5),
        "teacher_logits": logits((N, CLASSES), dtype, 1.5),
        "labels": labels,
    }


def bits(z):
    p = z.detach().softmax(-1)
    return -sum(float(x) * math.log2(float(x)) for x in p)


def plain_total(
    student_logits, teacher_logits, labels, alpha=0.7, temperature=2.0, ask="always", cutoff=None
):
    soft, hard, other = [], [], []
    for z, t, label in zip(student_logits, teacher_logits, labels.tolist(), strict=True):
        if label < 0:
            continue
        asked = {
            "always": True,
            "entropy": cutoff is not None and bits(z) > cutoff,
            "wrong": int(z.argmax()) != label,
        }[ask]
        ce = -z.log_softmax(-1)[label]
        if asked:
            q, p = (z / temperature).softmax(-1), (t / temperature).softmax(-1)
            soft += [p[c] * (p[c] / q[c]).log() for c in range(CLASSES)]
            hard.append(ce)
        else:
            other.append(ce)
    total = alpha * temperature**2 * sum(soft) / len(soft) + (1 - alpha) * sum(hard) / len(hard)
    return total + (sum(other) / len(other) if other else 0)


def entry(leaves=("student_logits", "teacher_logits"), **options):
    return Entry(
        "quantized_distillation",
        at_once(plain_total),
        options,
        images,
        leaves,
        (),
        read=None,
        published={"alpha": 0.7, "temperature": 2.0, "ask": "always", "cutoff": None},
    )


ENTRIES = [
    entry(),
    entry(ask="entropy", cutoff=1.3),
    entry(ask="wrong"),
    entry(alpha=0.4, temperature=1.0),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)
GIVEN = images(torch.float32)
test_one_graph_for_all_numbers = one_graph_for_all(
    {
        "alpha, temperature": lambda x: recipes.quantized_distillation(
            **GIVEN, alpha=x, temperature=x
        ),
    }
)


def test_every_row_asked_is_torchs_two_losses():
    given = images(torch.float64)
    kept = given["labels"] != -100
    s, t, labels = (x[kept] for x in given.values())
    soft = F.kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="none").mean()
    right = 0.7 * 4 * soft + 0.3 * F.cross_entropy(s, labels)
    torch.testing.assert_close(recipes.quantized_distillation(**given), right)


def test_rows_not_asked_have_cross_entropy_with_weight_one():
    given = images(torch.float64)
    found = recipes.quantized_distillation(**given, ask="entropy", cutoff=100.0)
    right = F.cross_entropy(given["student_logits"], given["labels"])
    torch.testing.assert_close(found, right)
    given["labels"] = given["student_logits"].argmax(-1)
    assert recipes.quantized_distillation(**given, ask="wrong") == F.cross_entropy(
        given["student_logits"], given["labels"]
    )


def test_random_rows_are_asked_as_often_as_the_entropy_says():
    student = torch.tensor([[0.0, 0, 0, 0], [3.0, 0, 0, 0]]).repeat(2000, 1).requires_grad_()
    teacher, labels = torch.randn(4000, 4), torch.zeros(4000, dtype=torch.int64)

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        options = {"alpha": 1.0, "ask": "random_entropy", "generator": generator}
        return recipes.quantized_distillation(student, teacher, labels, **options)

    assert run(1) == run(1)
    assert run(1) != run(2)
    # With alpha 1 a row that is asked has no cross-entropy, and where the teacher agrees no loss.
    with torch.no_grad():
        teacher.copy_(student)
    (gradient,) = torch.autograd.grad(run(1), student)
    shares = [1 - gradient[k::2].any(1).double().mean().item() for k in (0, 1)]
    expected = [bits(student[k]) / 2 for k in (0, 1)]
    assert expected[0] == pytest.approx(1)
    assert shares[0] == 1
    assert 0.2 < expected[1] < 0.8
    assert shares[1] == pytest.approx(expected[1], abs=0.05)


def test_rows_without_a_label_are_not_read():
    given = images(torch.float32)
    given["labels"][5] = -100
    right = recipes.quantized_distillation(**given, ask="wrong")
    for name in ("student_logits", "teacher_logits"):
        given[name][3] = math.nan
        given[name].requires_grad_()
    for ask, cutoff in (("wrong", None), ("always", None), ("entropy", 0.5)):
        loss = recipes.quantized_distillation(**given, ask=ask, cutoff=cutoff)
        leaves = given["student_logits"], given["teacher_logits"]
        for gradient in torch.autograd.grad(loss, leaves):
            assert not gradient[3].any()
            assert gradient.isfinite().all()
    torch.testing.assert_close(recipes.quantized_distillation(**given, ask="wrong"), right)
    given["labels"][:] = -100
    assert recipes.quantized_distillation(**given) == 0


# ---- bucket_quantize


def plain_quantize(values, levels, bucket):
    found = []
    for start in range(0, len(values), bucket):
        part = values[start : start + bucket]
        low, high = min(part), max(part)
        step = (high - low) / (levels - 1)
        found += [low if high - low < 1e-10 else low + round((x - low) / step) * step for x in part]
    return found


@pytest.mark.parametrize("bucket", [1, 7, 64, 256, None])
@pytest.mark.parametrize("levels", [2, 4, 16])
def test_levels_and_errors_of_a_bucket(levels, bucket):
    x = torch.randn(10, 21, dtype=torch.float64)
    x[2] = 0.25
    found = recipes.bucket_quantize(x, levels, bucket)
    size = bucket or x.numel()
    right = plain_quantize(x.flatten().tolist(), levels, size)
    torch.testing.assert_close(found.flatten(), torch.tensor(right, dtype=torch.float64))
    for before, after in zip(x.flatten().split(size), found.flatten().split(size), strict=True):
        assert len(after.unique()) <= levels
        extent = before.max() - before.min()
        assert (after - before).abs().max() <= extent / (2 * (levels - 1)) * (1 + 1e-9)
        assert after.min() == before.min()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_passes_straight_through(dtype):
    x = torch.randn(3, 100).to(dtype).requires_grad_()
    found = recipes.bucket_quantize(x, 4)
    assert found.dtype == dtype
    weights = torch.randn(3, 100).to(dtype)
    (gradient,) = torch.autograd.grad((found * weights).sum(), x)
    assert torch.equal(gradient, weights)
    stopped = recipes.bucket_quantize(x, 4, straight_through=False)
    assert not stopped.requires_grad
    assert torch.equal(stopped, found)


def test_quantising_again_changes_nothing():
    x = torch.randn(1000, dtype=torch.float64)
    once = recipes.bucket_quantize(x, 8, 100)
    torch.testing.assert_close(recipes.bucket_quantize(once, 8, 100), once)
    assert recipes.bucket_quantize(torch.zeros(0), 4).shape == (0,)


def test_a_column_major_tensor():
    x = torch.randn(6, 50).mT
    right = recipes.bucket_quantize(x.contiguous(), 4, 30)
    assert torch.equal(recipes.bucket_quantize(x, 4, 30), right)


def test_the_quantiser_compiles():
    x = torch.randn(5, 100)
    torch._dynamo.reset()
    compiled = torch.compile(recipes.bucket_quantize, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, 4), recipes.bucket_quantize(x, 4))


def test_errors_name_the_recipe_and_the_argument():
    x, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    call, given = recipes.quantized_distillation, (x, x, labels)
    wrong = [
        (call, (x, x[:1], labels), {}, "teacher_logits must have the shape"),
        (call, (x, x, labels + 2), {}, "labels must lie in"),
        (call, given, {"alpha": 1.2}, "alpha must lie in"),
        (call, given, {"temperature": 0.0}, "temperature must be positive"),
        (call, given, {"ask": "never"}, "ask must be one of always"),
        (call, given, {"ask": "entropy"}, "cutoff must be a number for ask='entropy'"),
        (call, given, {"cutoff": 1.0}, "cutoff must be a number for ask='entropy'"),
        (recipes.bucket_quantize, (x, 1), {}, "levels must be at least 2"),
        (recipes.bucket_quantize, (x, 2.5), {}, "levels must be an integer"),
        (recipes.bucket_quantize, (x, 4), {"bucket": 0}, "bucket must be positive"),
        (recipes.bucket_quantize, (labels, 4), {}, "x must be floating-point"),
    ]
    for function, arguments, options, message in wrong:
        with pytest.raises((ValueError, TypeError, IndexError), match=message) as caught:
            function(*arguments, **options)
        assert str(caught.value).startswith(f"{function.__name__}: ")
