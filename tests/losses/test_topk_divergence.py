"""topk_divergence: values, gradients, tails against their definitions, special values, errors."""

import math

import pytest
import torch
from cases import (
    LOSS_ERROR,
    allowed_error,
    assert_derivatives,
    cases,
    logits,
    relative_error,
    top_k,
)
from raw import check, loss_arguments

import fastkd

CASES = cases("topk_divergence")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "cross_entropy")
TAILS = ("lump", "uniform", "renormalize", "drop")
SHAPES = ((0, 5), (1, 1), (4, 7), (2, 3, 33), (5, 1031), (2, 20011), (9,), (0, 3, 4))


def run(function, student, log_probs, indices, options):
    """Loss and both gradients of `function`."""
    inputs = [student.detach().requires_grad_(), log_probs.detach().requires_grad_()]
    loss = function(*inputs, indices, **options)
    torch.manual_seed(7)
    upstream = torch.rand(loss.shape).to(loss.dtype) + 0.5
    return loss.detach(), torch.autograd.grad(loss, inputs, upstream)


def assert_matches_float64(student, log_probs, indices, options):
    found, gradients = run(fastkd.topk_divergence, student, log_probs, indices, options)
    doubles = student.double(), log_probs.double(), indices
    true, exact = run(fastkd.reference.topk_divergence, *doubles, options)
    assert found.shape == true.shape
    float64 = torch.float64 in (student.dtype, log_probs.dtype)
    assert found.dtype == (torch.float64 if float64 else torch.float32)
    tolerance = LOSS_ERROR[student.dtype]
    torch.testing.assert_close(found.double(), true, rtol=tolerance, atol=tolerance)
    divergence = options.get("divergence", "forward_kl")
    for mine, right, source in zip(gradients, exact, (student, log_probs), strict=True):
        assert mine.dtype == source.dtype
        assert mine.shape == source.shape
        # Rounded, scaled by `upstream` and rounded again; one entry may hold nearly all of it.
        allowed = (4 / 3) * allowed_error(right, source.dtype, divergence)
        assert (mine.double() - right).norm() <= allowed


def make(case, shape, k=5, dtype=torch.float32, stored_dtype=torch.float32):
    options = case.build(shape[:-1], shape[-1])
    temperature = options.get("stored_temperature", 1.0)
    log_probs, indices = top_k(shape, k, temperature)
    return logits(shape, dtype), log_probs.to(stored_dtype), indices, options


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_values_and_gradients(backend, case):
    for shape in SHAPES:
        assert_matches_float64(*make(case, shape))
    assert_matches_float64(*make(case, (3, 700), k=200))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(backend, dtype):
    for case in CASES:
        assert_matches_float64(*make(case, (6, 1500), 40, dtype))
    if dtype != torch.float64:  # rounded log-probabilities may sum to more than 1
        for case in CASES[::5]:
            assert_matches_float64(*make(case, (6, 1500), 40, torch.float32, dtype))


@pytest.mark.parametrize("tail", TAILS)
def test_large_vocabulary(backend, tail):
    options = {"tail": tail, "reduction": "none"}
    log_probs, indices = top_k((3, 151_936), 64)
    assert_matches_float64(logits((3, 151_936)), log_probs, indices.long(), options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", ["lump", "uniform", "renormalize"])
def test_whole_vocabulary_is_the_dense_divergence(backend, divergence, tail):
    """With k = vocab nothing is cut off, and every tail gives the same."""
    student, teacher = logits((4, 50)), logits((4, 50))
    options = {"divergence": divergence, "reduction": "none", "temperature": 1.7}
    order = torch.randperm(50).expand(4, 50)
    log_probs = (teacher / 1.7).log_softmax(-1).gather(-1, order)
    stored = {**options, "tail": tail, "stored_temperature": 1.7}
    loss, (gradient, _) = run(fastkd.topk_divergence, student, log_probs, order, stored)
    student.requires_grad_()
    dense = fastkd.softmax_divergence(student, teacher, **options)
    torch.manual_seed(7)
    (right,) = torch.autograd.grad(dense, student, torch.rand(4) + 0.5)
    torch.testing.assert_close(loss, dense.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-6)
    # Other temperatures than the stored one are exact, too, where everything is stored.
    again = {**options, "tail": tail, "stored_temperature": 1.0, "teacher_temperature": 1.7}
    log_probs = teacher.log_softmax(-1).gather(-1, order)
    loss, _ = run(fastkd.topk_divergence, student, log_probs, order, again)
    torch.testing.assert_close(loss, dense.detach(), rtol=1e-5, atol=1e-6)


def test_tails_by_hand():
    """Each tail spelled out for one row: p stored for tokens 2 and 0 of five."""
    student = torch.tensor([[0.3, -1.0, 1.2, 0.4, 2.0]], dtype=torch.float64)
    q = student.softmax(-1)[0]
    p = torch.tensor([0.5, 0.2], dtype=torch.float64)
    at = torch.tensor([2, 0])
    kl = lambda a, b: (a * (a / b).log()).sum()  # noqa: E731
    rest = torch.tensor([0.3, 1 - q[at].sum()], dtype=torch.float64)
    lump = kl(torch.cat([p, rest[:1]]), torch.cat([q[at], rest[1:]]))
    whole = torch.full((5,), 0.1, dtype=torch.float64)
    whole[at] = p
    right = {
        "lump": lump,
        "uniform": kl(whole, q),
        "renormalize": kl(p / p.sum(), q[at] / q[at].sum()),
        "drop": kl(p, q[at]),
    }
    for tail, value in right.items():
        for function in (fastkd.topk_divergence, fastkd.reference.topk_divergence):
            found = function(student, p.log()[None], at[None], tail=tail)
            torch.testing.assert_close(found, value)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("tail", ["lump", "uniform", "renormalize"])
@pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-2, 1.0])
def test_never_negative(backend, divergence, tail, noise):
    """Complaint: a truncated KL below zero, hidden by a clamp in 89 % of the steps."""
    student = logits((64, 2000))
    teacher = student + noise * torch.randn_like(student)
    values, indices = teacher.log_softmax(-1).topk(20)
    options = {"divergence": divergence, "tail": tail, "reduction": "none"}
    assert (fastkd.topk_divergence(student, values, indices, **options) >= 0).all()


def test_drop_is_no_divergence(backend):
    """What it is documented for: negative where the student puts more on the support."""
    student = torch.tensor([[3.0, 0.0, 0.0]])
    loss = fastkd.topk_divergence(
        student, torch.tensor([[0.5]]).log(), torch.tensor([[0]]), tail="drop"
    )
    assert loss < 0


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("noise", [1e-3, 1e-2, 0.1])
def test_accurate_as_the_student_converges(backend, divergence, noise):
    teacher = logits((4, 50_257))
    student = teacher + noise * torch.randn_like(teacher)
    values, indices = teacher.double().log_softmax(-1).topk(64)
    options = {"divergence": divergence, "reduction": "none"}
    loss, (gradient, _) = run(fastkd.topk_divergence, student, values.float(), indices, options)
    true, (exact, _) = run(
        fastkd.reference.topk_divergence,
        student.double(),
        values.float().double(),
        indices,
        options,
    )
    assert (loss >= 0).all()
    assert ((loss - true).abs() / true).max() < 1e-4
    # The rest's gradient is a difference of two masses, and one of them a sum of floats.
    assert relative_error(gradient, exact) < 2e-6 + 1e-7 / noise


@pytest.mark.parametrize("tail", TAILS)
def test_padding_and_order_change_nothing(backend, tail):
    student = logits((6, 90))
    log_probs, indices = top_k((6, 90), 7)
    options = {"tail": tail, "reduction": "none"}
    loss, gradients = run(fastkd.topk_divergence, student, log_probs, indices, options)
    padded = torch.cat([torch.full((6, 2), 0.7), log_probs, torch.full((6, 1), math.nan)], -1)
    places = torch.cat([torch.full((6, 2), -1), indices, torch.full((6, 1), -1)], -1)
    order = torch.randperm(10)
    other, others = run(
        fastkd.topk_divergence, student, padded[:, order], places[:, order].long(), options
    )
    torch.testing.assert_close(other, loss)
    torch.testing.assert_close(others[0], gradients[0])
    back = others[1][:, order.argsort()]
    torch.testing.assert_close(back[:, 2:9], gradients[1])
    assert not back[:, [0, 1, 9]].any()


@pytest.mark.parametrize("tail", TAILS)
def test_rows_without_a_support(backend, tail):
    """All padding: the lump against the lump, a uniform teacher, nothing."""
    student, indices = logits((2, 40)), torch.full((2, 3), -1)
    loss, (gradient, _) = run(
        fastkd.topk_divergence,
        student,
        torch.zeros(2, 3),
        indices,
        {"tail": tail, "reduction": "none"},
    )
    if tail == "uniform":
        p = torch.full((2, 40), 1 / 40).log()
        dense = fastkd.softmax_divergence(student, p, reduction="none")
        torch.testing.assert_close(loss, dense)
    else:
        assert not loss.any()
        assert gradient.abs().max() < 1e-6
    empty = fastkd.topk_divergence(student, torch.zeros(2, 0), indices[:, :0], tail=tail)
    torch.testing.assert_close(empty, loss.mean())


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
def test_impossible_tokens(backend, divergence, tail):
    """-inf logits inside and outside the support, and a stored probability of 0."""
    student = logits((5, 60))
    log_probs, indices = top_k((5, 60), 6)
    indices = indices.long()
    student[0, indices[0, 2]] = -math.inf  # mass where the student has none
    outside = [v for v in range(60) if v not in indices[1]]
    student[1, outside[:20]] = -math.inf
    student[2, [v for v in range(60) if v not in indices[2]]] = -math.inf  # no rest at all
    log_probs[3, 1] = -math.inf
    student[4, indices[4, 0]] = log_probs[4, 0] = -math.inf
    options = {"divergence": divergence, "tail": tail, "reduction": "none"}
    loss, gradients = run(fastkd.topk_divergence, student, log_probs, indices, options)
    true, exact = run(
        fastkd.reference.topk_divergence, student.double(), log_probs.double(), indices, options
    )
    torch.testing.assert_close(loss.double(), true, rtol=1e-5, atol=1e-5)
    assert not loss.isnan().any()
    # Where the value is infinite, the gradient is that of a tiny probability: finite, of no mass.
    for mine, right in zip(gradients, exact, strict=True):
        assert mine.isfinite().all()
        kept = true.isfinite()
        torch.testing.assert_close(mine.double()[kept], right[kept], rtol=1e-4, atol=1e-5)
    if tail != "lump":  # whose rest in row 2 has no logit left to carry its share
        assert gradients[0].sum(-1).abs().max() < 1e-4


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_row_is_nan_alone(backend, tail, value):
    student = logits((4, 3000))
    log_probs, indices = top_k((4, 3000), 8)
    outside = next(v for v in range(3000) if v not in indices[1])
    student[1, outside] = value
    student[2, :] = -math.inf
    log_probs[3, 4] = math.nan
    options = {"tail": tail, "reduction": "none"}
    loss, gradients = run(fastkd.topk_divergence, student, log_probs, indices, options)
    assert loss.isnan().tolist() == [False, True, True, True]
    for gradient in gradients:
        assert gradient[0].isfinite().all()
    # Masked, nothing of them is read, neither logits nor indices.
    indices[1, 0], indices[2, :] = 10**6, 5
    mask = torch.tensor([True, False, False, False])
    kept, gradients = run(
        fastkd.topk_divergence, student, log_probs, indices, {**options, "mask": mask}
    )
    assert torch.equal(kept, torch.tensor([loss[0].item(), 0, 0, 0]))
    for gradient in gradients:
        assert not gradient[1:].any()


def test_masses_beyond_one_by_rounding_are_scaled_back(backend):
    """float16 and 8-bit stores: probabilities that sum to a little more than 1."""
    student = logits((3, 100))
    p = torch.softmax(logits((3, 4)), -1) * 1.01
    indices = torch.tensor([[5, 7, 90, 3]]).expand(3, 4)
    options = {"reduction": "none"}
    loss, _ = run(fastkd.topk_divergence, student, p.log(), indices, options)
    scaled, _ = run(
        fastkd.topk_divergence, student, (p / p.sum(-1, keepdim=True)).log(), indices, options
    )
    torch.testing.assert_close(loss, scaled, rtol=1e-4, atol=1e-4)


def test_layouts(backend):
    log_probs, indices = top_k((3, 5, 64), 6)
    student = logits((5, 3, 64)).transpose(0, 1)
    for other in (student, logits((3, 5, 128))[..., ::2], logits((3, 1, 64)).expand(3, 5, 64)):
        assert_matches_float64(
            other, log_probs.transpose(0, 2).contiguous().transpose(0, 2), indices, {}
        )


def test_vocab_size(backend):
    """Padded columns: not read, and a zero gradient."""
    student = logits((4, 100))
    student[:, 90:] = math.nan
    log_probs, indices = top_k((4, 90), 6)
    loss, (gradient, _) = run(
        fastkd.topk_divergence, student, log_probs, indices, {"vocab_size": 90}
    )
    right, _ = run(fastkd.topk_divergence, student[:, :90], log_probs, indices, {})
    torch.testing.assert_close(loss, right)
    assert not gradient[:, 90:].any()


@pytest.mark.only("cpu", "simt")
def test_threads_change_no_bit(backend):
    student = logits((3, 50_000))
    log_probs, indices = top_k((3, 50_000), 30)
    found = []
    threads = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(run(fastkd.topk_divergence, student, log_probs, indices, {"tail": "uniform"}))
    torch.set_num_threads(threads)
    for loss, gradients in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert all(torch.equal(a, b) for a, b in zip(gradients, found[0][1], strict=True))


ERRORS = {
    "index beyond": (
        IndexError,
        r"teacher_indices must lie in \[0, 40\) or be -1, got 40 in row 1",
    ),
    "index below": (IndexError, r"teacher_indices must lie in \[0, 40\) or be -1, got -2 in row 1"),
    "duplicate": (ValueError, r"teacher_indices must be distinct in a row, got 7 twice in row 1"),
    "positive": (ValueError, r"must be log-probabilities, 0 at most, got 1.5 in row 1"),
    "mass": (ValueError, r"teacher_log_probs must have a mass of at most 1 in a row, got 1.2"),
}


def bad_row(kind):
    log_probs = torch.tensor([0.4, 0.3, 0.1, 0.1]).log().repeat(3, 1)
    indices = torch.tensor([3, 7, 11, 1]).repeat(3, 1)
    if kind == "positive":
        log_probs[1, 2] = 1.5
    elif kind == "mass":
        log_probs[1] = math.log(0.3)
    else:
        indices[1, 2] = {"index beyond": 40, "index below": -2, "duplicate": 7}[kind]
    return log_probs, indices


@pytest.mark.only("cpu")
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("gradient", [False, True])
def test_values_that_are_errors(backend, kind, gradient):
    student = logits((3, 40)).requires_grad_(gradient)
    log_probs, indices = bad_row(kind)
    error, message = ERRORS[kind]
    with pytest.raises(error, match=f"topk_divergence: .*{message}"):
        fastkd.topk_divergence(student, log_probs, indices)


@pytest.mark.only("simt", "cuda")
@pytest.mark.parametrize("kind", ERRORS)
def test_values_no_check_could_see_become_nan(backend, kind):
    student = logits((3, 40)).requires_grad_()
    log_probs, indices = bad_row(kind)
    loss = fastkd.topk_divergence(student, log_probs, indices, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tail": "rest"}, ValueError, "tail must be one of lump, uniform, renormalize, drop"),
        (
            {"divergence": "tvd"},
            ValueError,
            "divergence must be one of forward_kl, reverse_kl, jsd",
        ),
        ({"beta": 1.5}, ValueError, r"beta must lie in \[0, 1\]"),
        ({"beta": torch.tensor([0, 1.5, 1])}, ValueError, r"beta.*\[0, 1\], got 1.5 in row 1"),
        ({"beta": torch.ones(4)}, ValueError, "beta must have one entry a row"),
        ({"beta": torch.ones(3).long()}, TypeError, "beta must be floating-point"),
        ({"beta": torch.ones(3).requires_grad_()}, ValueError, "beta takes no gradient"),
        ({"stored_temperature": 0.0}, ValueError, "stored_temperature must be positive"),
        ({"teacher_temperature": -1.0}, ValueError, "teacher_temperature must be positive"),
        ({"min_log_prob": 0.5}, ValueError, "min_log_prob must be negative, got 0.5"),
        ({"max_token_loss": -1.0}, ValueError, "max_token_loss must not be negative"),
        ({"vocab_size": 41}, ValueError, "vocab_size is 41"),
        ({"reduction": "average"}, ValueError, "reduction must be one of"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be bool"),
        ({"labels": torch.tensor([1, 40, 2])}, IndexError, r"labels must lie in \[0, 40\)"),
        ({"group": object()}, TypeError, "group must be a torch.distributed process group"),
    ],
)
@pytest.mark.only("cpu")
def test_argument_errors(backend, change, error, message):
    log_probs, indices = top_k((3, 40), 4)
    with pytest.raises(error, match=f"topk_divergence: .*{message}"):
        fastkd.topk_divergence(logits((3, 40)), log_probs, indices, **change)


@pytest.mark.only("cpu")
def test_tensor_errors(backend):
    student = logits((3, 40))
    log_probs, indices = top_k((3, 40), 4)
    for args, error, message in (
        (
            (student, log_probs[:2], indices),
            ValueError,
            r"leading dimensions \[3\], got shape \[2, 4\]",
        ),
        ((student, log_probs, indices[:, :3]), ValueError, r"shape \[3, 4\], got shape \[3, 3\]"),
        (
            (student, log_probs, indices.float()),
            TypeError,
            "teacher_indices must be int64 or int32",
        ),
        ((student, log_probs.long(), indices), TypeError, "teacher_log_probs must be float32"),
        ((student, log_probs.tolist(), indices), TypeError, "teacher_log_probs must be a tensor"),
    ):
        with pytest.raises(error, match=f"topk_divergence: .*{message}"):
            fastkd.topk_divergence(*args)
    with pytest.raises(ValueError, match="weight takes no gradient"):
        fastkd.topk_divergence(
            student, log_probs, indices, weight=torch.ones(3, requires_grad=True)
        )


@pytest.mark.only("cpu")  # float64
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
def test_gradcheck(backend, divergence, tail):
    student = logits((3, 9), torch.float64, 1.0).requires_grad_()
    log_probs, indices = top_k((3, 9), 3)
    log_probs = log_probs.double().requires_grad_()

    options = {"divergence": divergence, "beta": 0.3, "tail": tail}
    options |= {"temperature": 1.7, "stored_temperature": 1.3}
    labels = torch.tensor([2, 0, -100])

    def loss(s, t):
        return fastkd.topk_divergence(s, t, indices, labels=labels, **options)

    assert_derivatives(loss, (student, log_probs))


def test_second_derivatives_match_the_reference(backend):
    student = logits((3, 40))
    log_probs, indices = top_k((3, 40), 5)
    vectors = [torch.randn(3, 40), torch.randn(3, 5)]

    def products(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (student, log_probs)]
        gradients = torch.autograd.grad(function(*inputs, indices), inputs, create_graph=True)
        dot = sum((g * v).sum() for g, v in zip(gradients, vectors, strict=True))
        return torch.autograd.grad(dot, inputs)

    found = products(fastkd.topk_divergence, torch.float32)
    exact = products(fastkd.reference.topk_divergence, torch.float64)
    for mine, right in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradients", [0, 3])
def test_opcheck(gradients):
    log_probs, indices = top_k((3, 40), 5)
    for reduction, dtype in (("mean", torch.float32), ("none", torch.float16)):
        student = logits((3, 40), dtype)
        arguments = loss_arguments(
            fastkd.topk_divergence,
            student,
            log_probs,
            indices,
            gradients=gradients,
            reduction=reduction,
        )
        check("topk_divergence", arguments, into=torch.zeros_like(student))


@pytest.mark.only("cpu", "cuda")
def test_compile_fullgraph(backend):
    student = logits((4, 60)).requires_grad_()
    log_probs, indices = top_k((4, 60), 5)
    log_probs.requires_grad_()
    labels = torch.tensor([1, -100, 3, 4])

    @torch.compile(fullgraph=True)
    def step(student, log_probs):
        return 2 * fastkd.topk_divergence(student, log_probs, indices, labels=labels)

    plain = 2 * fastkd.topk_divergence(student, log_probs, indices, labels=labels)
    right = torch.autograd.grad(plain, (student, log_probs))
    found = step(student, log_probs)
    torch.testing.assert_close(found, plain)
    for a, b in zip(torch.autograd.grad(found, (student, log_probs)), right, strict=True):
        torch.testing.assert_close(a, b)


def test_functional_transforms(backend):
    student = logits((4, 30))
    log_probs, indices = top_k((4, 30), 5)
    gradient, value = torch.func.grad_and_value(
        lambda s: fastkd.topk_divergence(s, log_probs, indices)
    )(student)
    student.requires_grad_()
    loss = fastkd.topk_divergence(student, log_probs, indices)
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, student)[0])
