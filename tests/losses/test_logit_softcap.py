"""logit_softcap in all losses over logits: cap tanh(z / cap), its slopes, masks, modes, errors."""

import math
import sys

import pytest
import torch
from cases import assert_derivatives, logits, relative_error, top_k
from raw import check, loss_arguments
from torch._dynamo.testing import CompileCounterWithBackend

import fastkd

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INFINITIES = (math.inf, -math.inf, math.nan)


def softmax(module, student, teacher, cap, **options):
    return module.softmax_divergence(student, teacher, logit_softcap=cap, **options)


def clipped(module, student, teacher, cap, **options):
    options = {"tail": "lump", "keep_label": False, **options}
    return module.clipped_divergence(student, teacher, 1e-4, 0.3, logit_softcap=cap, **options)


def topk(module, student, teacher, cap, **options):
    draws = torch.arange(student.numel()).reshape(student.shape) * 0.618 % 5
    log_probs, indices = draws.log_softmax(-1).topk(4)
    cap = cap[0] if isinstance(cap, tuple) else cap
    options = {"tail": "uniform", **options}
    return module.topk_divergence(student, log_probs, indices, logit_softcap=cap, **options)


ALL = pytest.mark.parametrize("loss", [softmax, clipped, topk])


def gradients(loss, module, student, teacher, cap, **options):
    inputs = [x.detach().requires_grad_() for x in (student, teacher)]
    value = loss(module, *inputs, cap, **options)
    found = torch.autograd.grad(value.sum(), inputs, allow_unused=True, materialize_grads=True)
    return value.detach(), *found


def by_hand(x, cap):
    return x if cap is None else cap * (x / cap).tanh()


# --- values and slopes ------------------------------------------------------------------------


@pytest.mark.only("cpu")  # float64
@ALL
@pytest.mark.parametrize("cap", [(2.0, 2.0), (None, 3.0), (3.0, None), (20.0, 0.5)])
def test_is_the_formula_outside(backend, loss, cap):
    labels = torch.randint(0, 600, (5,))
    student, teacher = (logits((5, 600), torch.float64) for _ in range(2))
    student.requires_grad_(), teacher.requires_grad_()
    options = {"labels": labels, "label_weight": 0.4, "temperature": 1.5}
    found = loss(fastkd, student, teacher, cap, **options)
    plain = [by_hand(x, c) for x, c in zip((student, teacher), cap, strict=True)]
    right = loss(fastkd, *plain, None, **options)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-13)
    inputs = [student] if loss is topk else [student, teacher]
    for mine, exact in zip(*(torch.autograd.grad(x, inputs) for x in (found, right)), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("cap", [1e-3, 0.5, 5.0, 30.0, 50.0, 1e4, 1e8, 1e30])
def test_capped_logits_are_accurate(backend, cap):
    """An empty support leaves the label's term, log(1 + e^-u) of the logits u and 0."""
    z = -torch.cat([torch.logspace(-6, 6, 400), torch.linspace(0.1, 100, 400)])
    student = torch.stack([z, torch.zeros_like(z)], -1)
    label = torch.zeros(len(z), dtype=torch.long)
    options = {"labels": label, "keep_label": False, "reduction": "none"}
    found = fastkd.clipped_divergence(student, student, 2.0, 3.0, logit_softcap=cap, **options)
    right = torch.nn.functional.softplus(-by_hand(z.double(), cap), threshold=100)
    assert ((found.double() - right) / right).abs().max() < 4 * 2.0**-24 + 3e-7 * (cap < 1e3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [0.5, 20.0])
def test_slopes_of_saturated_logits(backend, dtype, cap):
    """1 - t^2 is e-13 there: not what cancellation leaves of 1."""
    torch.manual_seed(3)
    student = ((torch.rand(4, 300) * 9 + 5) * torch.randn(4, 300).sign() * cap).to(dtype)
    teacher = torch.randn(4, 300).to(dtype)
    found = gradients(softmax, fastkd, student, teacher, (cap, None), reduction="sum")[1]
    size, capped = student.double().abs() / cap, by_hand(student.double(), cap)
    exact = gradients(softmax, fastkd.reference, capped, teacher.double(), None, reduction="sum")[1]
    exact = exact * size.cosh() ** -2  # 1 - tanh^2 would cancel in float64, too
    masses = capped.softmax(-1) + teacher.double().softmax(-1)
    # The slope's error grows with |z| / cap, that of q - p is the rounding of the capped logits.
    rounding = torch.finfo(dtype).eps + 2.0**-23 * (2 + 4 * size)
    floor = (2.0**-22 + 4 * cap * 2.0**-24) * masses * 4 * (-2 * size).exp()
    floor = floor + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((found.double() - exact).abs() <= rounding * exact.abs() + floor).all()


@ALL
def test_a_large_cap_changes_nothing(backend, loss, request):
    student, teacher = logits((4, 1100)), logits((4, 1100))
    options = {"labels": torch.randint(0, 1100, (4,)), "temperature": 1.5, "reduction": "none"}
    found = gradients(loss, fastkd, student, teacher, 1e30, **options)
    for mine, plain in zip(
        found, gradients(loss, fastkd, student, teacher, None, **options), strict=True
    ):
        if "cpu" in request.node.callspec.id:
            assert torch.equal(mine, plain)
        torch.testing.assert_close(mine, plain, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_kl"])
@pytest.mark.parametrize("noise", [1e-2, 0.1])
def test_accurate_as_the_student_converges(backend, divergence, noise):
    """As far as the capped logits' own rounding lets them: a few 2^-24 of their size."""
    cap, shape = 30.0, (4, 20_011)
    teacher = logits(shape, spread=6.0)
    student = teacher + noise * torch.randn_like(teacher)
    options = {"divergence": divergence, "reduction": "none"}
    found = gradients(softmax, fastkd, student, teacher, cap, **options)
    doubles = student.double(), teacher.double()
    exact = gradients(softmax, fastkd.reference, *doubles, cap, **options)
    assert (found[0] >= 0).all()
    size = by_hand(teacher.double(), cap).abs().max().item()
    allowed = 4e-6 + 6 * 2.0**-24 * size / noise
    for mine, right in zip(found, exact, strict=True):
        assert relative_error(mine, right) < allowed


# --- special values -----------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_stays_a_mask(backend, loss, dtype):
    """Columns of -inf on both sides are as if they were not there."""
    student, teacher = logits((3, 700), dtype, 9.0), logits((3, 700), dtype, 9.0)
    wide = [torch.full((3, 1300), -math.inf, dtype=dtype) for _ in range(2)]
    place = torch.randperm(1300)[:700].sort().values
    for x, y in zip(wide, (student, teacher), strict=True):
        x[:, place] = y
    options = {"reduction": "none"}
    if loss is topk:
        log_probs, indices = top_k((3, 700), 4)
        call = lambda s, at: fastkd.topk_divergence(  # noqa: E731
            s, log_probs, at, logit_softcap=6.0, **options
        )
        leaves = [x.detach().requires_grad_() for x in (wide[0], student)]
        found, right = call(leaves[0], place[indices.long()]), call(leaves[1], indices)
        mine = torch.autograd.grad(found.sum(), leaves[0])
        plain = torch.autograd.grad(right.sum(), leaves[1])
    else:
        found, *mine = gradients(loss, fastkd, *wide, 6.0, **options)
        right, *plain = gradients(loss, fastkd, student, teacher, 6.0, **options)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a[:, place], b, rtol=2e-2, atol=1e-6)
        rest = a.clone()
        rest[:, place] = 0
        assert not rest.any()


@ALL
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_masks_are_capped(backend, loss, dtype):
    student, teacher = logits((3, 90), dtype, 9.0), logits((3, 90), dtype, 9.0)
    for x in (student, teacher):
        x[:, 60:] = torch.finfo(dtype).min
    found = gradients(loss, fastkd, student, teacher, 4.0, reduction="none")
    plain = [by_hand(x.double(), 4.0).float() for x in (student, teacher)]
    assert (plain[0][:, 60:] == -4).all()
    right = gradients(loss, fastkd, *plain, None, reduction="none")
    torch.testing.assert_close(found[0], right[0], rtol=1e-5, atol=1e-6)
    for mine in found[1:]:
        assert mine.isfinite().all()
        assert not mine[:, 60:].any()


@ALL
@pytest.mark.parametrize("bad", INFINITIES)
def test_rows_that_are_not_finite(backend, loss, bad):
    student, teacher = logits((4, 50)), logits((4, 50))
    student[1] = bad if bad == -math.inf else student[1]
    student[1, 7] = bad
    found = gradients(loss, fastkd, student, teacher, 5.0, reduction="none")
    assert found[0].isnan().tolist() == [False, True, False, False]
    assert not found[1][[0, 2, 3]].isnan().any()


@ALL
@pytest.mark.parametrize("cap", [1e-40, 1e-30, 1.0, 1e30, 1e38, 3.6e38, 1e300])
def test_extreme_logits_and_caps(backend, loss, cap):
    student = torch.randn(5, 40) * torch.tensor([1e-30, 1.0, 1e3, 1e20, 1e37]).unsqueeze(-1)
    student[2, 3], student[2, 4] = 3.4e38, -3.4e38
    teacher = torch.randn(5, 40)
    found = gradients(loss, fastkd, student, teacher, (cap, None), reduction="none")
    doubles = student.double(), teacher.double()
    exact = gradients(loss, fastkd.reference, *doubles, (cap, None), reduction="none")
    small = exact[0] < 1e4
    torch.testing.assert_close(found[0][small].double(), exact[0][small], rtol=1e-5, atol=1e-5)
    assert not found[0].isnan().any()
    for mine, right in zip(found[1:], exact[1:], strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine[small].double(), right[small], rtol=1e-4, atol=1e-6)


# --- beside other arguments ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "reverse_kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_inplace(backend, dtype, divergence, temperature):
    labels = torch.randint(0, 9000, (3,))
    options = {"divergence": divergence, "labels": labels, "temperature": temperature}
    for student in (logits((3, 9000), dtype, 8.0), logits((3, 18000), dtype, 8.0)[:, ::2]):
        near = student if divergence == "jsd" else logits((3, 9000), dtype)
        teacher = near + 1e-3 * torch.randn(3, 9000).to(dtype)
        leaf = student.clone().requires_grad_()
        right = softmax(fastkd, leaf, teacher, (6.0, None), **options)
        (plain,) = torch.autograd.grad(right, leaf)
        leaf = student.clone().requires_grad_()
        loss = softmax(fastkd, leaf * 1, teacher, (6.0, None), inplace=True, **options)
        assert torch.equal(loss, right)
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], plain)


@ALL
def test_vocab_size_mask_weight_and_shift(backend, loss):
    student, teacher = logits((2, 5, 60), spread=9.0), logits((2, 5, 60), spread=9.0)
    options = {
        "vocab_size": 50,
        "shift": 1,
        "mask": torch.rand(2, 5) < 0.7,
        "weight": torch.rand(2, 5),
        "labels": torch.randint(0, 50, (2, 5)),
    }
    if loss is topk:
        del options["vocab_size"]
    found = gradients(loss, fastkd, student, teacher, 5.0, **options)
    doubles = student.double(), teacher.double()
    exact = gradients(loss, fastkd.reference, *doubles, 5.0, **options)
    for mine, right in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-6)


# --- PyTorch ------------------------------------------------------------------------------------


@pytest.mark.only("cpu")  # float64
@ALL
def test_gradcheck(backend, loss):
    student, teacher = (logits((3, 6), torch.float64, 1.0).requires_grad_() for _ in range(2))
    labels = torch.tensor([2, 0, 5])
    run = lambda s, t: loss(fastkd, s, t, (1.3, 2.1), labels=labels, temperature=1.7)  # noqa: E731
    inputs = (student, teacher.detach()) if loss is topk else (student, teacher)
    assert_derivatives(run, inputs)


@ALL
def test_second_derivatives(backend, loss):
    student, teacher, vector = logits((3, 40)), logits((3, 40)), torch.randn(3, 40)

    def product(module, dtype):
        leaf = student.to(dtype).requires_grad_()
        value = loss(module, leaf, teacher.to(dtype), 4.0, temperature=1.5, reduction="sum")
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        return torch.autograd.grad((gradient * vector).sum(), leaf)[0]

    exact = product(fastkd.reference, torch.float64)
    found = product(fastkd, torch.float32)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


@ALL
def test_opcheck_export_and_transforms(loss):
    student, teacher = logits((4, 30)), logits((4, 30))
    log_probs, indices = top_k((4, 30), 4)
    arguments = {
        softmax: (fastkd.softmax_divergence, student, teacher),
        clipped: (fastkd.clipped_divergence, student, teacher, 0.01, 0.5),
        topk: (fastkd.topk_divergence, student, log_probs, indices),
    }[loss]
    raw = loss_arguments(*arguments, logit_softcap=5.0, gradients=1)
    check(arguments[0].__name__, raw)
    function = lambda x: loss(fastkd, x, teacher, 5.0)  # noqa: E731
    leaf = student.clone().requires_grad_()
    right = function(leaf)
    (gradient,) = torch.autograd.grad(right, leaf)
    torch.testing.assert_close(torch.func.grad(function)(student), gradient, rtol=1e-4, atol=1e-6)
    tangent = torch.randn(4, 30)
    found, slope = torch.func.jvp(function, (student,), (tangent,))
    torch.testing.assert_close(found, right.detach())
    torch.testing.assert_close(slope, (gradient * tangent).sum(), rtol=1e-4, atol=1e-5)
    rows = torch.func.vmap(lambda x: loss(fastkd, x, teacher, 5.0))(torch.stack([student] * 2))
    torch.testing.assert_close(rows, right.detach().expand(2))

    class Model(torch.nn.Module):
        def forward(self, x):
            return function(x)

    exported = torch.export.export(Model(), (student,)).module()
    value = exported(leaf)
    torch.testing.assert_close(value, right)
    torch.testing.assert_close(torch.autograd.grad(value, leaf)[0], gradient)


@pytest.mark.parametrize("loss", [softmax, clipped])
def test_one_graph_serves_every_pair(loss):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    run = torch.compile(
        lambda s, t, a, b: loss(fastkd, s, t, (a, b)), fullgraph=True, dynamic=True, backend=counter
    )
    for i in range(8):
        student, teacher = logits((3 + i, 12)), logits((3 + i, 12))
        caps = 2.0 + i, 9.5 - i
        found = run(student, teacher, *caps)
        torch.testing.assert_close(found, loss(fastkd, student, teacher, caps))
    assert counter.frame_count <= 2


def test_modules_take_it():
    student, teacher = logits((4, 30)), logits((4, 30))
    module = fastkd.nn.SoftmaxDivergence(logit_softcap=(5.0, None))
    assert torch.equal(module(student, teacher), softmax(fastkd, student, teacher, (5.0, None)))


# --- errors -------------------------------------------------------------------------------------


@ALL
def test_errors(loss):
    student, teacher = logits((4, 30)), logits((4, 30))
    name = f"{loss.__name__}.*: logit_softcap"
    for bad in (0, -1.0, math.inf, math.nan, torch.tensor(-2.0)):
        for call in (
            lambda s, x=bad: loss(fastkd, s, teacher, x),
            lambda s, x=bad: loss(fastkd.reference, s, teacher, x),
            lambda s, x=bad: loss(fastkd, s, teacher, (x, None)),
        ):
            with pytest.raises(ValueError, match=f"{name} must be positive and finite, got"):
                call(student)
            with pytest.raises(ValueError, match=f"{name} must be positive and finite, got"):
                torch.func.grad(call)(student)
    for bad in ("high", torch.nn.Identity()):
        with pytest.raises(TypeError, match=f"{name} must be a number, got"):
            loss(fastkd, student, teacher, bad)
    function = getattr(fastkd, f"{loss.__name__}_divergence")
    others = top_k((4, 30), 4) if loss is topk else (teacher, 0.1, 0.9)
    others = (teacher,) if loss is softmax else others
    for bad in ((), (3.0,), (1.0, 2.0, 3.0)):
        with pytest.raises(ValueError, match=rf"{name} must be a number or .*, got \("):
            function(student, *others, logit_softcap=bad)
    if loss is topk:
        with pytest.raises(ValueError, match=r"must be a number or \(number, None\), as the teach"):
            function(student, *others, logit_softcap=(3.0, 3.0))
        assert torch.equal(
            function(student, *others, logit_softcap=(3.0, None)),
            function(student, *others, logit_softcap=3.0),
        )


@pytest.mark.parametrize("cap", [0.0, -3.0, math.nan])
def test_the_raw_op_checks_it(backend, cap):
    student, teacher = logits((4, 30)), logits((4, 30))
    raw = list(loss_arguments(fastkd.softmax_divergence, student, teacher))
    fields = sys.modules["fastkd.losses._softmax_divergence"].OP.arguments.fields
    raw[fields.index("teacher_logit_softcap")] = cap
    with pytest.raises(RuntimeError, match="softmax_divergence: logit_softcap must be positive"):
        torch.ops.fastkd._softmax_divergence(*raw)
