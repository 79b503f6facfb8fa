"""What every op promises: batched gradients, modes of PyTorch, arguments, memory, shift."""

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from cases import logits
from registry import EVERY, LOSSES, OPS, VOCAB

import fastkd

LEADING = (2, 6)


def of(entries):
    return pytest.mark.parametrize("op", entries, ids=lambda op: op.name)


def each(entries, names):
    """Every op with every one of some names of its own."""
    return pytest.mark.parametrize(
        "op,name",
        [(op, name) for op in entries for name in names(op)],
        ids=lambda x: str(getattr(x, "name", x)),
    )


def student_of(leading=LEADING):
    return logits((*leading, VOCAB)).requires_grad_()


# --- autograd -----------------------------------------------------------------------------------


@of(OPS)
def test_batches_of_gradients(op):
    given = op.tensors(LEADING)
    function = lambda x: op.call(x, **given)  # noqa: E731
    student = student_of().detach()
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(
        jacobian(function, student, vectorize=True),
        jacobian(function, student),
        rtol=1e-5,
        atol=1e-5,
    )
    student.requires_grad_()
    loss = function(student).sum()
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=loss.dtype)
    (batch,) = torch.autograd.grad(
        loss, student, upstream, is_grads_batched=True, retain_graph=True
    )
    (one,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(
        batch, upstream.view(-1, 1, 1, 1).to(one.dtype) * one, rtol=1e-5, atol=1e-5
    )


@of(LOSSES)
def test_batches_of_gradients_for_each_row(op):
    given = op.tensors(LEADING)
    function = lambda x: op.call(x, **given, reduction="none")  # noqa: E731
    jacobian = torch.autograd.functional.jacobian
    student = student_of().detach()
    torch.testing.assert_close(
        jacobian(function, student, vectorize=True), jacobian(function, student)
    )


@of(OPS)
def test_checkpoints(op):
    given = op.tensors(LEADING)
    student = student_of()
    right = torch.autograd.grad(op.call(student, **given).sum(), student)[0]
    for reentrant in (False, True):
        loss = torch.utils.checkpoint.checkpoint(
            lambda x: op.call(x, **given).sum(), student, use_reentrant=reentrant
        )
        if reentrant:
            student.grad = None
            loss.backward()
            found = student.grad
        else:
            (found,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(found, right)


@of(OPS)
def test_second_derivatives_of_a_temporary(op):
    """The logits are nobody's but the graph's."""
    hidden = torch.randn(*LEADING, 5, dtype=torch.float64, requires_grad=True)
    head = torch.randn(5, VOCAB, dtype=torch.float64)
    given = op.tensors(LEADING)
    (gradient,) = torch.autograd.grad(
        op.call(hidden @ head, **given).sum(), hidden, create_graph=True
    )
    (second,) = torch.autograd.grad(gradient.square().sum(), hidden)
    assert second.isfinite().all()
    assert second.any()


# --- modes --------------------------------------------------------------------------------------


@of(EVERY)
def test_after_and_beside_other_modes(op):
    student, given = student_of(), op.tensors(LEADING)
    right = op.call(student, **given).sum()
    with torch.inference_mode():
        torch.testing.assert_close(op.call(student, **given).sum(), right.detach())
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {name: mode.from_tensor(value) for name, value in given.items()}
        fake = op.call(mode.from_tensor(student.detach()), **fakes)
    found = op.call(student, **given)
    assert type(found) is torch.Tensor
    assert fake.shape == found.shape
    assert fake.dtype == found.dtype
    torch.testing.assert_close(found.sum(), right)
    if op.differentiable:
        found.sum().backward()
        assert student.grad.isfinite().all()


@of(OPS)
def test_logits_of_inference_mode(op):
    """As a teacher gives them that is run under it."""
    with torch.inference_mode():
        given = op.tensors(LEADING)
    student = student_of()
    op.call(student, **given).sum().backward()
    plain = {name: value.clone() for name, value in given.items()}
    (right,) = torch.autograd.grad(op.call(student, **plain).sum(), student)
    torch.testing.assert_close(student.grad, right)


@of(LOSSES)
def test_a_traced_function_returns_memory_of_its_own(op):
    from torch.fx.experimental.proxy_tensor import make_fx

    student, given = logits((64, 40, VOCAB)), op.tensors((64, 40))

    def gradient(x):
        return torch.autograd.grad(op.call(x, **given), x)[0]

    gradient(student.clone().requires_grad_())
    traced = make_fx(gradient)(student.clone().requires_grad_())
    first = traced(student.clone().requires_grad_())
    right = first.clone()
    traced((2 * student).requires_grad_())
    assert torch.equal(first, right)
    torch.testing.assert_close(first, gradient(student.clone().requires_grad_()))


def taken(op, *names):
    """Those of the names that are arguments: cross_entropy has no term beside its labels'."""
    known = getattr(fastkd, op.name).__kwdefaults__
    return [name for name in names if name in known or name == "labels"]


@of(LOSSES)
def test_numbers_take_no_tangent(op):
    student, given = student_of().detach(), op.tensors(LEADING)
    for name in taken(op, "label_weight", "normalizer"):
        with pytest.raises(ValueError, match=f"{op.name}: {name} takes no gradient, tangent"):
            torch.func.jvp(
                lambda x, name=name: op.call(student, **{**given, name: x}),
                (torch.tensor(2.0),),
                (torch.tensor(1.0),),
            )


# --- arguments ----------------------------------------------------------------------------------


@each([op for op in EVERY if op.name != "kl_div"], lambda op: op.tensors(LEADING))
def test_a_tensor_of_another_device_is_an_error(op, name):
    for student in (student_of(), student_of().detach()):
        given = op.tensors(LEADING)
        given[name] = given[name].to("meta")
        with pytest.raises((ValueError, RuntimeError), match="device"):
            op.call(student, **given)
    given = {key: value for key, value in op.tensors(LEADING).items()}
    with pytest.raises((ValueError, RuntimeError), match="device"):
        op.call(student_of().to("meta"), **given)


@each(LOSSES, lambda op: op.numbers)
def test_an_argument_without_a_gradient_says_so(op, name):
    given = op.tensors(LEADING)
    value = torch.tensor(op.numbers[name][0], requires_grad=True)
    with pytest.raises(ValueError, match=rf"{op.name}: {name} takes no gradient"):
        op.call(student_of(), **given, **{name: value})
    with torch.no_grad():
        op.call(student_of(), **given, **{name: value})


@of(LOSSES)
def test_types(op):
    given = op.tensors(LEADING)
    rows = np.ones(LEADING)
    for name, bad in (
        ("weight", rows.tolist()),
        ("weight", rows),
        ("mask", rows.astype(bool)),
        ("labels", rows.astype(int).tolist()),
        ("label_weight", "half"),
        ("temperature", "hot"),
        ("ignore_index", 0.5),
        ("vocab_size", True),
        ("vocab_size", "all"),
        ("shift", None),
        ("square_temperature", "yes"),
        ("reduction", 3),
    ):
        if not taken(op, name):
            continue
        with pytest.raises(TypeError, match=rf"{op.name}: {name} must be"):
            op.call(student_of(), **{**given, name: bad})
    plain = student_of().detach()
    jagged = torch.nested.nested_tensor(list(plain), layout=torch.jagged)
    for wrapped in (plain.to_sparse(), jagged, torch.nested.nested_tensor(list(plain))):
        with pytest.raises(TypeError, match=rf"{op.name}: (student_)?logits must be a"):
            op.call(wrapped, **given)
    for name, value in (("ignore_index", 10**30), ("vocab_size", -7), ("shift", 10**30)):
        with pytest.raises(ValueError, match=rf"{op.name}: {name} must"):
            op.call(student_of(), **{**given, name: value})
    for name in taken(op, "label_weight", "normalizer"):
        with pytest.raises(ValueError, match=rf"{op.name}: {name} must be on a device"):
            op.call(student_of(), **{**given, name: torch.tensor(1.0, device="meta")})
    quantized = torch.quantize_per_tensor(plain, 0.1, 0, torch.quint8)
    with pytest.raises(TypeError, match=rf"{op.name}: (student_)?logits must be"):
        op.call(quantized, **given)


@of(LOSSES)
def test_numbers_of_other_kinds(op):
    given = op.tensors(LEADING)
    given.pop("label_weight", None)
    student = student_of()
    share = (taken(op, "label_weight") or ["label_smoothing"])[0]
    right = op.call(student, **given, **{share: 0.5}, vocab_size=VOCAB, temperature=2.0)
    for number, integer in (
        (np.float32(0.5), np.int64(VOCAB)),
        (torch.tensor(0.5), torch.tensor(VOCAB)),
        (np.float64(0.5), np.uint8(VOCAB)),
    ):
        found = op.call(
            student, **given, **{share: number}, vocab_size=integer, temperature=np.float32(2.0)
        )
        assert torch.equal(found, right)


# --- memory -------------------------------------------------------------------------------------


def test_calls_leave_nothing_behind():
    program = """
import gc, sys
sys.path.insert(0, "tests")
import torch
from registry import EVERY, VOCAB
from cases import logits
def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4096
for op in EVERY:
    student, given = logits((1, 2, VOCAB)), op.tensors((1, 2))
    def run(n):
        for _ in range(n):
            op.call(student, **given)
    run(2000)
    before = resident()
    run(20000)
    print(op.name, (resident() - before) / 20000)
"""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True
    )
    lines = [line.split() for line in found.stdout.splitlines()]
    assert len(lines) == len(EVERY)
    assert [name for name, size in lines if float(size) >= 16] == []


@pytest.mark.parametrize("layout", ["overlapping", "the teacher's", "one row on", "the weights'"])
def test_inplace_beside_others_in_its_memory(layout):
    base = torch.rand(9, 40)
    student, teacher, options = base[:8], torch.randn(8, 40), {}
    if layout == "overlapping":
        student = torch.as_strided(base, (8, 40), (20, 1))
    elif layout == "the teacher's":
        teacher = student.detach()
    elif layout == "one row on":
        teacher = base[1:]
    else:
        options["weight"] = base[0, :8]
    student = student.detach().requires_grad_()
    with pytest.raises(ValueError, match="softmax_divergence: inplace"):
        fastkd.softmax_divergence(student, teacher, inplace=True, **options)


def test_inplace_is_for_plain_logits():
    teacher = torch.randn(4, 9)
    for student in (
        torch.nn.Parameter(torch.randn(4, 9)),
        torch._neg_view(torch.randn(4, 9).requires_grad_()),
    ):
        with pytest.raises(ValueError, match="inplace needs plain student_logits"):
            fastkd.softmax_divergence(student, teacher, inplace=True)


def test_inplace_beside_a_teacher_in_the_other_half_of_its_memory():
    both = torch.randn(8, 80)
    want = fastkd.softmax_divergence(both[:, :40].clone(), both[:, 40:].clone())
    student = both[:, :40].detach().requires_grad_()
    found = fastkd.softmax_divergence(student, both[:, 40:], inplace=True)
    assert torch.equal(found, want)


# --- Checks where the raw op is not called ---------------------------------------------------


CHECKED = [op for op in EVERY if op.name not in ("kl_div", "alm_loss")]


@of(CHECKED)
def test_arguments_are_checked_under_transforms_and_on_the_meta_device(op):
    given, student = op.tensors(LEADING), student_of().detach()
    wrong = [(given, {name: -1.0}) for name in op.numbers if name == "temperature"]
    for name, value in given.items():
        if name not in ("boundary",):
            wrong.append(({**given, name: value[:, :-1]}, {}))
    if op.name == "teacher_topk":
        wrong.append((given, {"vocab_size": VOCAB + 1}))
    for tensors, numbers in wrong:
        with pytest.raises(ValueError, match=f"^{op.name}: "):
            op.call(student, **tensors, **numbers)
        if op.differentiable:
            with pytest.raises(ValueError, match=f"^{op.name}: "):
                torch.func.grad(lambda x, o=(tensors, numbers): op.call(x, **o[0], **o[1]))(student)
        on_meta = {name: value.to("meta") for name, value in tensors.items()}
        with pytest.raises(ValueError, match=f"^{op.name}: "):
            op.call(student.to("meta"), **on_meta, **numbers)
    on_meta = {name: value.to("meta") for name, value in given.items()}
    if op.name != "byte_log_probs":  # its table is made for a device with values
        assert op.call(student.to("meta"), **on_meta).is_meta


@of(LOSSES)
def test_normalizers(op):
    given, student = op.tensors(LEADING), student_of().detach()
    right = op.call(student, **given, normalizer=3.0)
    for normalizer in (np.array(3.0), torch.tensor(3), torch.tensor([3.0])):
        assert torch.equal(op.call(student, **given, normalizer=normalizer), right)
    for normalizer in (-1.0, torch.tensor(-1.0), math.nan):
        with pytest.raises(ValueError, match=f"{op.name}: normalizer must not be negative"):
            op.call(student, **given, normalizer=normalizer)


@pytest.mark.parametrize("weight", [math.inf, math.nan])
def test_teacher_weights_are_finite(weight):
    teacher = torch.randn(2, 9)
    with pytest.raises(ValueError, match="teacher_weights must be finite, got"):
        fastkd.softmax_divergence(
            torch.randn(2, 9), [teacher, teacher], teacher_weights=[1.0, weight]
        )


# --- shift --------------------------------------------------------------------------------------


@of(LOSSES)
@pytest.mark.parametrize("shift", [1, 2, 5, 6, 9])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "batchmean", "elementmean"])
def test_shift_reads_labels_their_weights_mask_and_weight_ahead(backend, op, shift, reduction):
    leading = (3, 6)
    student = logits((*leading, VOCAB)).requires_grad_()
    given = op.tensors(leading)
    found = op.call(student, **given, shift=shift, reduction=reduction)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    rows = [name for name, value in given.items() if value.shape[:2] == leading]
    ahead = ("labels", "label_weight", "mask", "weight")
    kept = max(leading[1] - shift, 0)
    cut = {
        name: value
        if name not in rows
        else value[:, leading[1] - kept :]
        if name in ahead
        else value[:, :kept]
        for name, value in given.items()
    }
    part = student.detach()[:, :kept].requires_grad_()
    right = op.call(part, **cut, reduction=reduction)
    if reduction == "none":
        torch.testing.assert_close(found[:, :kept], right)
        assert not found[:, kept:].any()
    else:
        torch.testing.assert_close(found, right)
    (exact,) = torch.autograd.grad(right.sum(), part)
    torch.testing.assert_close(gradient[:, :kept], exact)
    assert not gradient[:, kept:].any()
    definition = getattr(fastkd.reference, op.name)
    if op.name == "softmax_divergence" or "beta" in given:
        given["divergence"] = "alpha_beta" if "alpha" in op.numbers else "jsd"
    if op.name == "clipped_divergence":
        given["softness"] = 0.1
    if op.name == "cross_entropy":
        given["entropy_weight"] = 0.5
    again = definition(student, **given, shift=shift, reduction=reduction)
    torch.testing.assert_close(found, again, rtol=1e-4, atol=1e-5)


def test_a_shift_beyond_every_sequence_leaves_no_row():
    found = fastkd.softmax_divergence(
        torch.randn(2, 3, 5),
        torch.randn(2, 3, 5),
        labels=torch.randint(0, 5, (2, 3)),
        shift=2**63 - 2,
        reduction="none",
    )
    assert not found.any()


def test_shift_needs_a_sequence():
    with pytest.raises(ValueError, match="shift needs student_logits with a sequence dimension"):
        fastkd.softmax_divergence(torch.zeros(5), torch.zeros(5), shift=1)
    with pytest.raises(ValueError, match="shift must not be negative, got -1"):
        fastkd.softmax_divergence(torch.zeros(2, 5), torch.zeros(2, 5), shift=-1)


# --- hints --------------------------------------------------------------------------------------


@of(LOSSES)
def test_hints_come_once(op):
    from fastkd._ops import hints

    labelled = taken(op, "label_weight")
    left = ("labels", "label_weight") if labelled else ("label_weight",)
    given = {k: v for k, v in op.tensors(LEADING).items() if k not in left}
    of_labels = [
        ({"label_weight": x}, student_of(), "labels is None") for x in (0.5, torch.rand(LEADING))
    ]
    for options, student, message in (
        *(of_labels if labelled else ()),
        ({"normalizer": 0}, student_of(), "normalizer is 0"),
        ({}, student_of().detach().softmax(-1), "logits are expected, not probabilities"),
    ):
        hints.forget()
        with pytest.warns(UserWarning, match=rf"{op.name}: .*{message}") as found:
            op.call(student, **given, **options)
        assert "fastkd/_ops" not in found[0].filename
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            op.call(student, **given, **options)
    hints.forget()


@of(LOSSES)
def test_hints_look_at_no_batch_of_logits(op):
    from fastkd._ops import hints

    given, student = op.tensors(LEADING), student_of().detach()
    hints.forget()
    together = torch.func.vmap(lambda x: op.call(x, **given))(student.expand(3, *student.shape))
    torch.testing.assert_close(together[1], op.call(student, **given))
