"""clipped_divergence: values, all gradients, the definition by hand, special values, errors."""

import math

import pytest
import torch
from cases import LOSS_ERROR, allowed_error, assert_derivatives, cases, logits
from raw import check, loss_arguments
from torch.utils.checkpoint import checkpoint

import fastkd

CASES = cases("clipped_divergence")
SHAPES = ((0, 5), (4, 7), (2, 3, 33), (5, 1031), (2, 20011), (9,))


def bounds(leading, vocab, quantile):
    """Lower and upper, one a row, that leave some inside and some outside."""
    if quantile:
        lower = 0.3 * torch.rand(leading)
        return lower, lower + 0.5 + 0.2 * torch.rand(leading)
    return torch.rand(leading) / (2 * vocab), torch.rand(leading) * 0.5 + 0.1


def run(function, student, teacher, lower, upper, options):
    """Loss and the gradients of student, teacher and, with soft edges, the bounds."""
    soft = "softness" in options
    inputs = [student.detach().requires_grad_(), teacher.detach().requires_grad_()]
    edges = [x.detach().requires_grad_(soft) for x in (lower, upper)]
    loss = function(*inputs, *edges, **options)
    torch.manual_seed(7)
    upstream = torch.rand(loss.shape).to(loss.dtype) + 0.5
    return loss.detach(), torch.autograd.grad(loss, [*inputs, *edges] if soft else inputs, upstream)


def assert_matches_float64(student, teacher, lower, upper, options):
    found, gradients = run(fastkd.clipped_divergence, student, teacher, lower, upper, options)
    true, exact = run(
        fastkd.reference.clipped_divergence,
        student.double(),
        teacher.double(),
        lower,
        upper,
        options,
    )
    assert found.shape == true.shape
    float64 = torch.float64 in (student.dtype, teacher.dtype)
    assert found.dtype == (torch.float64 if float64 else torch.float32)
    tolerance = LOSS_ERROR[student.dtype]
    torch.testing.assert_close(found.double(), true, rtol=tolerance, atol=tolerance)
    for mine, right, source in zip(gradients[:2], exact, (student, teacher), strict=False):
        assert mine.dtype == source.dtype
        assert (mine.double() - right).norm() <= (4 / 3) * allowed_error(right, source.dtype, "jsd")
    for mine, right in zip(gradients[2:], exact[2:], strict=True):
        # Sums over the vocabulary of terms of both signs, some 1 / softness large.
        size = right.abs().max().item() if right.numel() else 0
        torch.testing.assert_close(mine, right, rtol=2e-5, atol=2e-5 * size + 3e-6)


def make(case, shape, dtype=torch.float32, teacher_dtype=None):
    options = case.build(shape[:-1], shape[-1])
    edges = bounds(shape[:-1], shape[-1], options.get("quantile", False))
    return logits(shape, dtype), logits(shape, teacher_dtype or dtype), *edges, options


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_values_and_gradients(backend, case):
    for shape in SHAPES:
        assert_matches_float64(*make(case, shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(backend, dtype):
    for case in CASES:
        assert_matches_float64(*make(case, (6, 1500), dtype))
    for case in CASES[::6]:
        assert_matches_float64(*make(case, (6, 1500), dtype, torch.float32))


@pytest.mark.parametrize("quantile", [False, True])
def test_large_vocabulary(backend, quantile):
    shape = (3, 151_936)
    options = {"quantile": quantile, "tail": "lump", "reduction": "none"}
    edges = bounds((3,), shape[-1], quantile)
    assert_matches_float64(logits(shape), logits(shape), *edges, options)


def test_by_hand():
    p = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]], dtype=torch.float64)
    q = torch.tensor([[0.1, 0.3, 0.2, 0.3, 0.1]], dtype=torch.float64)
    label = torch.tensor([4])
    inside = torch.tensor([1, 2, 4])  # 0.15 and 0.2 by the bounds, 0.05 by the label
    a, b = p[0, inside], q[0, inside]
    bare = (a * (a / b).log()).sum()
    rest = (1 - a.sum()) * ((1 - a.sum()) / (1 - b.sum())).log()
    teacher = a / a.sum()
    right = {
        ("none", "drop"): bare,
        ("none", "lump"): bare + rest,
        ("teacher", "drop"): (teacher * (teacher / b).log()).sum(),
        ("both", "drop"): (teacher * (teacher / (b / b.sum())).log()).sum(),
    }
    for (renormalize, tail), value in right.items():
        for function in (fastkd.clipped_divergence, fastkd.reference.clipped_divergence):
            options = {"labels": label, "renormalize": renormalize, "tail": tail}
            found = function(q.log(), p.log(), 0.12, 0.4, label_weight=0.0, **options)
            torch.testing.assert_close(found, value)
    without = fastkd.clipped_divergence(
        q.log(), p.log(), 0.12, 0.4, labels=label, keep_label=False, label_weight=0.0
    )
    a, b = a[:2], b[:2]
    torch.testing.assert_close(without, (a * (a / b).log()).sum())


def test_quantiles_are_torch_quantiles(backend):
    student, teacher = logits((6, 500)), logits((6, 500))
    lower, upper = torch.tensor([0.0, 0.25, 0.3, 0.9, 0.5, 0.999]), torch.tensor(1.0)
    p = teacher.double().softmax(-1)
    levels = zip(p, lower.double(), strict=True)
    least = torch.stack([torch.quantile(row, level) for row, level in levels])
    right = fastkd.reference.clipped_divergence(
        student.double(), teacher.double(), least * (1 - 1e-9), 1.0, reduction="none"
    )
    found = fastkd.clipped_divergence(
        student, teacher, lower, upper, quantile=True, reduction="none"
    )
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantile", [False, True])
def test_everything_inside_is_forward_kl(backend, quantile):
    """Levels and bounds 0 and 1 leave out nothing, whatever a sum's last bit says."""
    student, teacher = logits((40, 300)), 5 * logits((40, 300))
    dense = fastkd.softmax_divergence(student, teacher, reduction="none")
    for renormalize in ("none", "teacher", "both"):
        found = fastkd.clipped_divergence(
            student, teacher, 0.0, 1.0, quantile=quantile, renormalize=renormalize, reduction="none"
        )
        torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("renormalize", "tail"), [("none", "lump"), ("teacher", "drop"), ("both", "drop")]
)
@pytest.mark.parametrize("softness", [None, 0.01])
@pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-2, 1.0])
def test_never_negative(backend, renormalize, tail, softness, noise):
    student = logits((64, 2000))
    teacher = student + noise * torch.randn_like(student)
    loss = fastkd.clipped_divergence(
        student,
        teacher,
        1e-3,
        0.5,
        renormalize=renormalize,
        tail=tail,
        softness=softness,
        reduction="none",
    )
    assert (loss >= (0 if renormalize != "teacher" else -1e-6)).all()


def test_an_empty_support_is_zero(backend):
    student, teacher = logits((3, 50)), logits((3, 50))
    for renormalize in ("none", "teacher", "both"):
        options = {"renormalize": renormalize, "reduction": "none"}
        lower = torch.full((3,), 2.0)
        loss, gradients = run(fastkd.clipped_divergence, student, teacher, lower, lower, options)
        assert not loss.any()
        assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("renormalize", ["none", "teacher", "both"])
@pytest.mark.parametrize("softness", [None, 0.05])
def test_special_values(backend, renormalize, softness):
    student, teacher = logits((7, 60)), logits((7, 60))
    student[0, 10:20] = teacher[0, 10:20] = -math.inf
    student[1, teacher[1].argmax()] = -math.inf  # infinite
    teacher[2, 30] = -math.inf
    student[3, 5] = math.nan
    teacher[4] = -math.inf
    teacher[5, 1] = math.inf
    options = {"renormalize": renormalize, "reduction": "none", "tail": "lump"}
    if softness:
        options["softness"] = softness
    edges = torch.full((7,), 1e-4), torch.full((7,), 1.0)
    loss, gradients = run(fastkd.clipped_divergence, student, teacher, *edges, options)
    true, exact = run(
        fastkd.reference.clipped_divergence, student.double(), teacher.double(), *edges, options
    )
    torch.testing.assert_close(loss.double(), true, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert loss.isnan().tolist() == [False, False, False, True, True, True, False]
    assert loss[1] == math.inf
    for mine, right in zip(gradients, exact, strict=True):
        assert mine[:3].isfinite().all()
        for row in (0, 2, 6):
            torch.testing.assert_close(
                mine[row].double(), right[row].double(), rtol=1e-4, atol=1e-5
            )
    mask = torch.tensor([True, True, True, False, False, False, True])
    loss, gradients = run(
        fastkd.clipped_divergence, student, teacher, *edges, {**options, "mask": mask}
    )
    assert not loss[3:6].any()
    assert not any(g[3:6].any() for g in gradients)


def test_layouts_and_padding(backend):
    for student in (
        logits((5, 3, 64)).transpose(0, 1),
        logits((3, 5, 128))[..., ::2],
        logits((3, 1, 64)).expand(3, 5, 64),
    ):
        for options in ({"tail": "lump"}, {"quantile": True, "renormalize": "both"}):
            edges = bounds((3, 5), 64, options.get("quantile", False))
            assert_matches_float64(student, logits((3, 5, 64)), *edges, options)
    student, teacher = logits((4, 100)), logits((4, 120))
    student[:, 90:], teacher[:, 90:] = math.nan, 100.0
    edges = bounds((4,), 90, True)
    options = {"quantile": True, "reduction": "none"}
    loss, gradients = run(
        fastkd.clipped_divergence, student, teacher, *edges, {**options, "vocab_size": 90}
    )
    right, _ = run(fastkd.clipped_divergence, student[:, :90], teacher[:, :90], *edges, options)
    torch.testing.assert_close(loss, right)
    assert not any(g[:, 90:].any() for g in gradients)


@pytest.mark.only("cpu", "simt")
def test_threads_change_no_bit(backend):
    student, teacher = logits((3, 50_000)), logits((3, 50_000))
    options = {"softness": 0.01, "tail": "lump"}
    edges = bounds((3,), 50_000, False)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(run(fastkd.clipped_divergence, student, teacher, *edges, options))
    torch.set_num_threads(threads)
    for loss, gradients in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, found[0][1], strict=True))


@pytest.mark.only("cpu")
@pytest.mark.parametrize(
    ("edges", "options", "error", "message"),
    [
        ((0.5, 0.4), {}, ValueError, "lower must not exceed upper, got 0.5 and 0.4 in row 0"),
        ((math.nan, 0.4), {}, ValueError, "lower must not exceed upper, got nan"),
        ((-0.1, 0.4), {"quantile": True}, ValueError, r"quantile levels, in \[0, 1\]; got -0.1"),
        ((torch.zeros(2), 0.4), {}, ValueError, r"lower must have one entry a row, shape \[3\]"),
        ((torch.zeros(3).long(), 0.4), {}, TypeError, "lower must be floating-point"),
        (
            (0.1, 0.4),
            {"renormalize": "student"},
            ValueError,
            "renormalize must be one of none, teacher",
        ),
        (
            (0.1, 0.4),
            {"tail": "uniform"},
            ValueError,
            "tail must be one of drop, lump; got 'uniform'",
        ),
        ((0.1, 0.4), {"softness": 0.0}, ValueError, "softness must be positive, got 0.0"),
        ((torch.zeros(3, requires_grad=True), 0.4), {}, ValueError, "lower requires a gradient"),
        ((0.1, 0.4), {"teacher_temperature": 0.0}, ValueError, "teacher_temperature must be"),
        ((0.1, 0.4), {"labels": torch.tensor([1, 40, 2])}, IndexError, r"lie in \[0, 40\)"),
        (
            (0.1, 0.4),
            {"group": object()},
            TypeError,
            "group must be a torch.distributed process group",
        ),
    ],
)
def test_errors(backend, edges, options, error, message):
    with pytest.raises(error, match=f"clipped_divergence: .*{message}"):
        fastkd.clipped_divergence(logits((3, 40)), logits((3, 40)), *edges, **options)


@pytest.mark.only("cpu")  # float64
@pytest.mark.parametrize("renormalize", ["none", "teacher", "both"])
@pytest.mark.parametrize("quantile", [False, True])
def test_gradcheck(backend, renormalize, quantile):
    student = logits((2, 7), torch.float64, 1.0).requires_grad_()
    teacher = logits((2, 7), torch.float64, 1.0).requires_grad_(not quantile)
    lower = torch.tensor([0.11, 0.23], dtype=torch.float64, requires_grad=True)
    upper = torch.tensor([0.57, 0.71], dtype=torch.float64, requires_grad=True)
    options = {"renormalize": renormalize, "tail": "lump", "softness": 0.1, "quantile": quantile}
    labels = torch.tensor([2, 0])

    def loss(*inputs):
        return fastkd.clipped_divergence(*inputs, labels=labels, temperature=1.3, **options)

    assert_derivatives(loss, (student, teacher, lower, upper))


@pytest.mark.parametrize("gradients", [0, 15])
def test_opcheck(gradients):
    student, teacher = logits((3, 40)), logits((3, 40))
    for options in ({"softness": 0.1}, {"softness": 0.1, "reduction": "none"}):
        arguments = loss_arguments(
            fastkd.clipped_divergence,
            student,
            teacher,
            *bounds((3,), 40, False),
            gradients=gradients,
            **options,
        )
        check("clipped_divergence", arguments, into=torch.zeros_like(student))


@pytest.mark.only("cpu", "cuda")
def test_compile_fullgraph(backend):
    inputs = [logits((4, 60)).requires_grad_(), logits((4, 60)).requires_grad_()]
    inputs += [x.requires_grad_() for x in bounds((4,), 60, False)]

    @torch.compile(fullgraph=True)
    def step(*inputs):
        return 2 * fastkd.clipped_divergence(*inputs, softness=0.05, tail="lump")

    plain = 2 * fastkd.clipped_divergence(*inputs, softness=0.05, tail="lump")
    right = torch.autograd.grad(plain, inputs)
    found = step(*inputs)
    torch.testing.assert_close(found, plain)
    for a, b in zip(torch.autograd.grad(found, inputs), right, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    student, teacher = (torch.randn(5, 40, requires_grad=True) for _ in range(2))
    bounds = [torch.full((5,), p, requires_grad=True) for p in (0.01, 0.2)]
    leaves = [student, teacher, *bounds]
    run = lambda *inputs: fastkd.clipped_divergence(*inputs, softness=0.05)  # noqa: E731
    right = torch.autograd.grad(run(*leaves), leaves)
    checkpoint(run, *leaves, use_reentrant=reentrant).backward()
    assert all(map(torch.equal, [leaf.grad for leaf in leaves], right))
