"""softmax_divergence in PyTorch's machinery: autograd, inplace, opcheck, torch.compile, errors."""

import pytest
import torch
from cases import DIVERGENCES, assert_derivatives, cases, logits, spread
from raw import check, loss_arguments

import fastkd
from fastkd._ops.gradient import memory

CASES = cases("softmax_divergence")


@pytest.mark.only("cpu")  # float64
@pytest.mark.parametrize(
    # Not tvd, which has kinks, nor what is not the derivative of its value.
    "divergence",
    [d for d in DIVERGENCES if d not in ("tvd", "skew_reverse_kl_detached")],
)
def test_gradcheck(backend, divergence):
    student = logits((3, 6), torch.float64, 1.0).requires_grad_()
    teacher = logits((3, 6), torch.float64, 1.0).requires_grad_()
    mask = torch.tensor([True, False, True])
    labels = torch.tensor([2, 0, 5])

    def loss(s, t):
        return fastkd.softmax_divergence(
            s, t, divergence=divergence, beta=0.3, temperature=1.7, mask=mask, labels=labels
        )

    assert_derivatives(loss, (student, teacher))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_second_derivatives_match_the_reference(backend, divergence):
    """A Hessian-vector product in float32, against float64."""
    student, teacher = logits((3, 40)), logits((3, 40))
    vectors = [torch.randn(3, 40) for _ in range(2)]

    def products(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (student, teacher)]
        loss = function(*inputs, divergence=divergence, reduction="sum", temperature=1.5)
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)
        dot = sum((g * v).sum() for g, v in zip(gradients, vectors, strict=True))
        return torch.autograd.grad(dot, inputs)

    found = products(fastkd.softmax_divergence, torch.float32)
    exact = products(fastkd.reference.softmax_divergence, torch.float64)
    for mine, right in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-5)


def test_only_asked_gradients_are_made(backend):
    student, teacher = logits((2, 9)).requires_grad_(), logits((2, 9))
    fastkd.softmax_divergence(student, teacher).backward()
    assert teacher.grad is None
    student, teacher = logits((2, 9)), logits((2, 9)).requires_grad_()
    fastkd.softmax_divergence(student, teacher).backward()
    assert student.grad is None
    with torch.no_grad():
        assert not fastkd.softmax_divergence(student, teacher).requires_grad


def test_gradient_is_not_copied(backend):
    """The gradient made in the forward call becomes .grad itself, without one more tensor."""
    student, teacher = logits((64, 4096)).requires_grad_(), logits((64, 4096))
    loss = fastkd.softmax_divergence(student, teacher)
    made = loss.grad_fn.saved_tensors[0].data_ptr()
    loss.backward()
    assert student.grad.data_ptr() == made


def _step(student, teacher):
    loss = fastkd.softmax_divergence(student, teacher, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, student)
    return gradient


def test_gradient_memory_is_used_again(backend):
    """The next step's gradient lies where the last one did, once nothing refers to that."""
    memory.release()
    student, teacher = logits((64, 40_000)).requires_grad_(), logits((64, 40_000))
    first = _step(student, teacher)
    right, address = first.clone(), first.data_ptr()
    second = _step(student, teacher)  # `first` still lives
    assert second.data_ptr() != address
    array = second.numpy()
    address = second.data_ptr()
    del second
    assert _step(student, teacher).data_ptr() != address  # an array still refers to it
    assert (torch.from_numpy(array) == right).all()
    del array
    third = _step(student, teacher)
    address = third.data_ptr()
    view = third[3]
    del third
    assert _step(student, teacher).data_ptr() != address  # a view does
    assert torch.equal(view, right[3])
    del view
    address = _step(student, teacher).data_ptr()
    again = _step(student, teacher)
    assert again.data_ptr() == address
    assert torch.equal(again, right)
    loss = fastkd.softmax_divergence(student, teacher, reduction="sum")  # a graph holds its own
    other = _step(student.detach().clone().requires_grad_(), teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.data_ptr() != other.data_ptr()
    assert torch.equal(gradient, right)
    small = logits((2, 10)).requires_grad_()
    _step(small, logits((2, 10)))
    memory.release()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(backend, reduction):
    student, teacher = logits((4, 50)).requires_grad_(), logits((4, 50)).requires_grad_()
    loss = fastkd.softmax_divergence(student, teacher, reduction=reduction)
    upstream = torch.full_like(loss, 3.0)
    first = torch.autograd.grad(loss, (student, teacher), upstream, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, (student, teacher), 2 * upstream, retain_graph=True)
    third = torch.autograd.grad(loss, (student, teacher), upstream)
    for a, b, c, k in zip(first, second, third, kept, strict=True):
        torch.testing.assert_close(a * 2, b)
        assert torch.equal(a, k)
        assert torch.equal(c, k)


def test_upstream_zero_switches_rows_off(backend):
    student, teacher = logits((3, 20)), logits((3, 20))
    student[1] = float("nan")
    student.requires_grad_()
    loss = fastkd.softmax_divergence(student, teacher, reduction="none")
    loss.backward(torch.tensor([1.0, 0.0, 1.0]))
    assert not student.grad[1].any()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_inplace(backend, case):
    shape = (4, 1100)
    options = case.build(shape[:-1], shape[-1])
    teacher = [logits(shape) for _ in range(case.teachers)] or logits(shape)
    source = logits(shape)
    for layout in (source, logits((1100, 4)).t(), source.bfloat16()):
        plain = layout.clone().requires_grad_()
        fastkd.softmax_divergence(plain, teacher, **options).sum().backward()
        leaf = layout.clone().requires_grad_()
        student = leaf * 1
        version, pointer = student._version, student.data_ptr()
        loss = fastkd.softmax_divergence(student, teacher, inplace=True, **options)
        assert student._version > version
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert gradient.data_ptr() == pointer
        assert torch.equal(gradient, plain.grad)


def test_inplace_refusals(backend):
    teacher = logits((3, 8))
    student = logits((1, 8)).requires_grad_().expand(3, 8)
    with pytest.raises(ValueError, match="inplace needs student_logits"):
        fastkd.softmax_divergence(student, teacher, inplace=True)
    student = logits((3, 8)).requires_grad_()
    loss = fastkd.softmax_divergence(student * 1, teacher, inplace=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(loss, student, create_graph=True)
    hidden = logits((3, 8)).requires_grad_()
    student = hidden.exp()  # its backward needs the values that are overwritten
    loss = fastkd.softmax_divergence(student, teacher, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.no_grad():  # nothing to write without a gradient
        before = student.clone()
        fastkd.softmax_divergence(student, teacher, inplace=True)
        assert torch.equal(student, before)


@pytest.mark.parametrize("gradients", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_opcheck(gradients, dtype, reduction):
    student = logits((2, 3, 16), dtype)
    arguments = loss_arguments(
        fastkd.softmax_divergence,
        student,
        [logits((2, 3, 16))],
        gradients=gradients,
        divergence="jsd",
        teacher_temperature=2.0,
        reduction=reduction,
        mask=torch.rand(2, 3) < 0.5,
        labels=torch.randint(0, 16, (2, 3)),
    )
    check("softmax_divergence", arguments, into=torch.empty_like(student))
    factor = torch.rand(2, 3) if reduction == "none" else torch.tensor(2.0)
    torch.library.opcheck(torch.ops.fastkd._scale_rows_.default, (student, factor))


@pytest.mark.parametrize("case", spread(CASES), ids=lambda c: c.name)
def test_compile_fullgraph(case):
    torch._dynamo.reset()
    shape = (2, 3, 40)
    options = case.build(shape[:-1], shape[-1])
    teacher = [logits(shape) for _ in range(case.teachers)] or logits(shape)
    step = torch.compile(
        lambda s, t: fastkd.softmax_divergence(s * 2, t, **options).sum() * 3,
        fullgraph=True,
        backend="aot_eager",
    )
    compiled, eager = (logits(shape).requires_grad_() for _ in range(2))
    eager.data.copy_(compiled.data)
    step(compiled, teacher).backward()
    (fastkd.softmax_divergence(eager * 2, teacher, **options).sum() * 3).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)
    with torch.no_grad():
        torch.testing.assert_close(
            step(compiled, teacher),
            fastkd.softmax_divergence(compiled * 2, teacher, **options).sum() * 3,
        )


@pytest.mark.parametrize("inplace", [False, True])
def test_compile_inductor(inplace):
    torch._dynamo.reset()
    student, teacher = logits((4, 64), torch.bfloat16), logits((4, 64), torch.bfloat16)

    def step(s, t):
        return fastkd.softmax_divergence(s + 1, t, divergence="reverse_kl", inplace=inplace)

    compiled, eager = student.clone().requires_grad_(), student.clone().requires_grad_()
    torch.compile(step, fullgraph=True)(compiled, teacher).backward()
    step(eager, teacher).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


def test_compile_with_dynamic_rows():
    torch._dynamo.reset()
    step = torch.compile(
        fastkd.softmax_divergence, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for rows in (3, 5, 8):
        student, teacher = logits((rows, 30)), logits((rows, 30))
        torch.testing.assert_close(
            step(student, teacher), fastkd.softmax_divergence(student, teacher)
        )


def test_meta_tensors():
    student = torch.empty(4, 10, device="meta", dtype=torch.bfloat16)
    loss = fastkd.softmax_divergence(student, student, reduction="none")
    assert loss.shape == (4,)
    assert loss.dtype == torch.float32


def test_autocast():
    student, teacher = logits((3, 50)), logits((3, 50), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fastkd.softmax_divergence(student, teacher)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, fastkd.softmax_divergence(student, teacher))


def test_torch_func():
    student, teacher = logits((3, 12), torch.float64), logits((3, 12), torch.float64)
    loss = lambda s: fastkd.softmax_divergence(s, teacher, divergence="jsd")  # noqa: E731
    exact = torch.autograd.functional.hessian(loss, student)
    torch.testing.assert_close(torch.func.hessian(loss)(student), exact)
    each = torch.func.vmap(lambda s, t: fastkd.softmax_divergence(s, t))(student, teacher)
    torch.testing.assert_close(each, fastkd.softmax_divergence(student, teacher, reduction="none"))
    _, tangent = torch.func.jvp(loss, (student,), (torch.ones_like(student),))
    torch.testing.assert_close(tangent, torch.zeros((), dtype=torch.float64))


def test_mean_over_a_batch_split_across_processes():
    """A `normalizer` that all ranks share makes the sum of their losses the whole batch's mean."""
    student, teacher = logits((6, 30)), logits((6, 30))
    whole = fastkd.softmax_divergence(student, teacher)
    parts = [
        fastkd.softmax_divergence(student[i::2], teacher[i::2], normalizer=6) for i in range(2)
    ]
    torch.testing.assert_close(sum(parts), whole)


S, T = torch.zeros(3, 5), torch.zeros(3, 5)
REFUSALS = [
    ((S, [1, 2]), {}, TypeError, "teacher_logits must be a tensor, got int"),
    ((S, 3), {}, TypeError, "teacher_logits must be a tensor or a list of tensors, got int"),
    ((S, []), {}, ValueError, "teacher_logits must hold at least one tensor"),
    ((S.long(), T), {}, TypeError, "student_logits must be float32.*got Long"),
    ((S, T.bool()), {}, TypeError, "teacher_logits must be float32.*got Bool"),
    ((torch.zeros(()), torch.zeros(())), {}, ValueError, "at least one dimension"),
    ((S, torch.zeros(4, 5)), {}, ValueError, r"leading dimensions \[3\], got shape \[4, 5\]"),
    ((S, torch.zeros(3, 6)), {}, ValueError, "teacher_logits has 6 columns, student_logits has 5"),
    ((S, torch.zeros(3, 1, 5)), {}, ValueError, "leading dimensions"),
    ((torch.zeros(3, 0), torch.zeros(3, 0)), {}, ValueError, "at least one column"),
    ((S, T), {"vocab_size": 6}, ValueError, "vocab_size is 6, .*_logits has only 5"),
    ((S, T), {"vocab_size": 0}, ValueError, "at least one column, got 0"),
    ((S, T), {"divergence": "kl"}, ValueError, "divergence must be one of forward_kl.*'kl'"),
    ((S, T), {"divergence": "jsd", "beta": 1.5}, ValueError, r"beta must lie in \[0, 1\], got 1.5"),
    ((S, T), {"beta": float("nan")}, ValueError, "beta must lie"),
    ((S, T), {"beta": torch.tensor([0, 1.5, 1])}, ValueError, r"beta.*\[0, 1\], got 1.5 in row 1"),
    ((S, T), {"beta": torch.tensor([0, 1, -0.1])}, ValueError, r"beta must lie.*in row 2"),
    ((S, T), {"beta": torch.tensor(float("nan"))}, ValueError, "beta must lie"),
    ((S, T), {"beta": torch.ones(2)}, ValueError, r"beta must have one entry a row.*\[3\].*\[2\]"),
    ((S, T), {"beta": torch.ones(3).long()}, TypeError, "beta must be floating-point, got Long"),
    ((S, T), {"beta": torch.ones(3).requires_grad_()}, ValueError, "beta takes no gradient"),
    ((S, T), {"beta": torch.tensor(0.5, device="meta")}, ValueError, "beta must be on a device"),
    ((S, T), {"beta": torch.ones(3, device="meta")}, ValueError, "beta must be on the device"),
    ((S, T), {"beta": [0.5, 0.5, 0.5]}, TypeError, "beta must be a number, got list"),
    ((S, T), {"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0"),
    ((S, T), {"teacher_temperature": -1.0}, ValueError, "teacher_temperature must be positive"),
    ((S, T), {"temperature": float("inf")}, ValueError, "temperature must be positive and finite"),
    ((S, T), {"temperature": torch.tensor([1.0, 0.0, 1.0])}, ValueError, "got 0 in row 1"),
    ((S, T), {"temperature": torch.ones(2)}, ValueError, r"temperature must have.*\[3\].*\[2\]"),
    ((S, T), {"weight": torch.ones(3, 5)}, ValueError, r"weight must have one entry a row"),
    (
        (S, T),
        {"weight": torch.ones(3).long()},
        TypeError,
        "weight must be floating-point, got Long",
    ),
    ((S, T), {"weight": torch.ones(3).requires_grad_()}, ValueError, "weight takes no gradient"),
    ((S, T), {"mask": torch.ones(3)}, TypeError, "mask must be bool, got Float"),
    ((S, T), {"mask": torch.ones(4).bool()}, ValueError, r"mask must have one entry a row"),
    ((S, T), {"labels": torch.tensor([0, 5, 1])}, IndexError, r"labels.*\[0, 5\).*got 5 in row 1"),
    ((S, T), {"labels": torch.tensor([0, -1, 1])}, IndexError, "got -1 in row 1"),
    ((S, T), {"labels": torch.zeros(3)}, TypeError, "labels must be int64 or int32, got Float"),
    ((S, T), {"labels": torch.zeros(2).long()}, ValueError, "labels must have one entry a row"),
    ((S, T), {"label_weight": float("nan")}, ValueError, "label_weight must be finite"),
    (
        (S, [T, T]),
        {"teacher_mix": "log"},
        ValueError,
        "teacher_mix must be one of logits, probs, contrast, share",
    ),
    ((S, [T, T]), {"teacher_weights": [1.0]}, ValueError, "teacher_weights must be 2 numbers"),
    ((S, [T, T]), {"teacher_weights": [1, -1], "teacher_mix": "probs"}, ValueError, "negative"),
    ((S, [T, T]), {"teacher_weights": [0, 0], "teacher_mix": "probs"}, ValueError, "all be zero"),
    ((S, [T, T, T]), {"teacher_mix": "contrast"}, ValueError, "must hold two tensors .* got 3"),
    ((S, T), {"teacher_mix": "share"}, ValueError, "must hold two tensors .*'share', got 1"),
    (
        (S, [T, T]),
        {"teacher_mix": "share", "teacher_weights": [1.0, 0.0]},
        ValueError,
        "teacher_weights must be positive and finite with teacher_mix='share', got 0",
    ),
    (
        (S, [T, T]),
        {"teacher_mix": "contrast", "teacher_rows": torch.tensor([0, 1, 2])},
        ValueError,
        "teacher_rows are not available with teacher_mix='contrast'",
    ),
    ((S, [T, T.clone().requires_grad_()]), {}, ValueError, "in a list take no gradient"),
    ((S, T), {"reduction": "avg"}, ValueError, "reduction must be one of none, mean.*'avg'"),
    ((S, T), {"normalizer": -1.0}, ValueError, "normalizer must not be negative, got -1.0"),
    ((S, T), {"normalizer": torch.ones(2)}, ValueError, "normalizer must be a number or a 0-d"),
    ((S, T), {"normalizer": 2, "reduction": "none"}, ValueError, "normalizer has no meaning"),
    ((S, T), {"group": object()}, TypeError, "group must be a torch.distributed process group"),
]


@pytest.mark.parametrize("arguments,options,error,message", REFUSALS)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=f"(?s)softmax_divergence: .*{message}"):
        fastkd.softmax_divergence(*arguments, **options)
    student = arguments[0].clone()
    if student.is_floating_point():  # the same where a gradient is wanted
        with pytest.raises(error, match=message):
            fastkd.softmax_divergence(student.requires_grad_(), arguments[1], **options)


def test_raw_op_raises_runtime_error():
    arguments = loss_arguments(fastkd.softmax_divergence, S, torch.zeros(3, 6))
    with pytest.raises(RuntimeError, match="ValueError: softmax_divergence: teacher_logits has 6"):
        torch.ops.fastkd._softmax_divergence(*arguments)


def test_module():
    module = fastkd.nn.SoftmaxDivergence(divergence="jsd", temperature=2.0)
    student, teacher = logits((3, 9)), logits((3, 9))
    mask = torch.tensor([True, False, True])
    expected = fastkd.softmax_divergence(
        student, teacher, divergence="jsd", temperature=2.0, mask=mask
    )
    assert torch.equal(module(student, teacher, mask=mask), expected)
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        fastkd.nn.SoftmaxDivergence(temprature=2.0)


@pytest.mark.only("cpu")
def test_large_gradient_is_streamed(backend):
    """Over 32 MB gradients bypass the cache: the same bits, also with odd widths and offsets."""
    student, teacher = logits((260, 33_003)), logits((260, 33_003))
    for dtype in (torch.float32, torch.bfloat16):
        x = student.to(dtype, copy=True).requires_grad_()
        fastkd.softmax_divergence(x, teacher, reduction="sum", divergence="jsd").backward()
        rows = student[-3:].to(dtype, copy=True).requires_grad_()
        fastkd.softmax_divergence(rows, teacher[-3:], reduction="sum", divergence="jsd").backward()
        assert torch.equal(x.grad[-3:], rows.grad)
