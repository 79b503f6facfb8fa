"""kl_div against torch.nn.functional.kl_div: everything torch does, bit for bit or to rounding."""

import math
import subprocess
import sys
import warnings

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.common_methods_invocations import op_db

import fastkd

REDUCTIONS = ("none", "sum", "mean", "batchmean")
ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 2e-2,  # torch rounds every intermediate, fastkd only the result
    torch.float16: 2e-3,
}

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean'", "ignore:size_average and")


def outcome(function, input, target, upstream=None, **options):
    """Value, gradients and warnings, or the error, of a call."""
    input = input.detach().requires_grad_(input.is_floating_point())
    target = target.detach().requires_grad_(target.is_floating_point())
    wanted = [x for x in (input, target) if x.requires_grad]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            loss = function(input, target, **options)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            return type(error), str(error), [str(w.message) for w in caught]
    gradients = ()
    if loss.requires_grad:
        torch.manual_seed(1)
        upstream = torch.rand(loss.shape).to(loss.dtype) + 0.5
        gradients = torch.autograd.grad(loss, wanted, upstream)
    return loss.detach(), gradients, [str(w.message) for w in caught]


def assert_like_torch(input, target, **options):
    mine, theirs = (outcome(f, input, target, **options) for f in (fastkd.kl_div, F.kl_div))
    assert mine[2] == theirs[2]
    if isinstance(theirs[0], type):
        assert mine[:2] == theirs[:2]
        return
    tolerance = ROUNDING.get(theirs[0].dtype, 1e-6)
    for a, b in zip((mine[0], *mine[1]), (theirs[0], *theirs[1]), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a.isnan(), b.isnan())
        size = b.abs().nan_to_num(0, 0, 0).max().item() if b.numel() else 0
        torch.testing.assert_close(
            a, b, rtol=10 * tolerance, atol=tolerance * max(size, 1e-6), equal_nan=True
        )


def assert_rounded_once(input, target, **options):
    """Half precision: torch rounds every intermediate; compare with float64 of the same inputs."""
    mine = outcome(fastkd.kl_div, input, target, **options)
    double = outcome(F.kl_div, input.double(), target.double(), **options)
    error = {torch.bfloat16: 6e-3, torch.float16: 1e-3}[input.dtype]
    floor = 2**-25 if input.dtype == torch.float16 else 1e-30
    for a, b in zip((mine[0], *mine[1]), (double[0], *double[1]), strict=True):
        assert a.dtype == input.dtype
        assert a.shape == b.shape
        allowed = error * b.norm() + floor * b.numel() ** 0.5
        assert (a.double() - b).norm() <= allowed


def distributions(shape, dtype=torch.float32, log_target=False):
    target = torch.randn(shape, dtype=torch.float64).log_softmax(-1)
    input = torch.randn(shape, dtype=torch.float64).log_softmax(-1)
    return input.to(dtype), (target if log_target else target.exp()).to(dtype)


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_and_gradients(backend, dtype, reduction, log_target):
    for shape in ((1, 1), (3, 7), (2, 3, 50), (5, 3001), (9,), (70, 1000)):
        input, target = distributions(shape, dtype, log_target)
        check = assert_rounded_once if dtype.itemsize == 2 else assert_like_torch
        check(input, target, reduction=reduction, log_target=log_target)


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_special_values(backend, reduction, log_target):
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-30, 1e-37, 60.0, 200.0, -200.0, -95.0])
    odd = torch.tensor([math.inf, -math.inf, math.nan])
    every = torch.cat([values, odd])
    for x in every:
        for t in every:
            assert_like_torch(
                x.view(1, 1).clone(),
                t.view(1, 1).clone(),
                reduction=reduction,
                log_target=log_target,
            )


def test_subnormal_probabilities(backend):
    target = torch.tensor([[1e-42, 3e-39, 1.2e-38]])
    input = torch.zeros(1, 3)
    double = target.double().requires_grad_()
    F.kl_div(input.double(), double, reduction="sum").backward()
    target.requires_grad_()
    fastkd.kl_div(input, target, reduction="sum").backward()
    torch.testing.assert_close(target.grad.double(), double.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_samples_of_torch(backend, dtype):
    (info,) = [op for op in op_db if op.name == "nn.functional.kl_div"]
    count = 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        count += 1
        assert_like_torch(sample.input, *sample.args, **sample.kwargs)
    assert count > 5


@pytest.mark.parametrize("patched", [False, True])
def test_arguments_of_other_types(monkeypatch, patched):
    """The same error of the same type, or the same value and warnings, as torch's."""
    torchs = F.kl_div
    if patched:
        monkeypatch.setattr(F, "kl_div", fastkd.kl_div)
    x, t = distributions((3, 4))
    array, flag, text = x.numpy(), torch.tensor(True), np.str_("sum")
    calls = [
        *((x, t, {"reduction": "sum", "log_target": v}) for v in (1, 0, 1.0, None, "yes", flag)),
        (x, t, {"reduction": "sum", "log_target": np.True_}),
        *((x, t, {"reduction": r}) for r in (text, "SUM", "", None, 1, b"sum", ["sum"], array)),
        (x, t, {"reduction": "elementwise_mean"}),
        *((a, b, {"reduction": "sum"}) for a, b in ((array, t), (x, array), (None, t), (x, 1.0))),
        (x, [[0.1] * 4] * 3, {}),
        *((x, t, {"size_average": v}) for v in (False, True, 0, 1, "no")),
        *((x, t, {"reduce": v, "reduction": "batchmean"}) for v in (False, True, 0)),
        *((a.bool(), b, {"reduction": "sum"}) for a, b in ((x, t), (t, x.long()))),
        (x.cfloat(), t, {}),
        (x.to("meta"), t, {"reduction": "sum"}),
        (x, t.to("meta"), {"reduction": "sum"}),
        (x.to_sparse(), t, {"reduction": "sum"}),
    ]
    for input, target, options in calls:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = []
            for function in (fastkd.kl_div, torchs):
                try:
                    found.append(function(input, target, **options))
                except Exception as error:
                    found.append((type(error), str(error)))
        mine, theirs = found
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(mine, theirs, check_device=True)
        else:
            assert mine == theirs, options
        half = len(caught) // 2
        assert len(caught) % 2 == 0
        for a, b in zip(caught[:half], caught[half:], strict=True):
            assert (str(a.message), a.category) == (str(b.message), b.category)
    with pytest.raises(TypeError, match="log_target"):
        fastkd.kl_div(x, t, reduction="sum", log_target=1)


def test_a_warning_names_the_line_of_the_caller():
    x, t = distributions((3, 4))
    for target in (t, t[:1]):  # fastkd's kernel, torch's
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fastkd.kl_div(x, target)
        assert [w.filename for w in caught] == [__file__]


_PATCH = """
import torch, torch.nn.functional as F
original = F.kl_div
late = LATE
def lazily(*arguments, **options):
    import fastkd
    return fastkd.kl_div(*arguments, **options)
def numbered(input, target, reduction=1, *, log_target=False):
    name = ("none", "mean", "sum")[reduction]
    return lazily(input, target, reduction=name, log_target=log_target)
if late:
    F.kl_div = torch.nn.modules.loss.F.kl_div = lazily
    torch.kl_div = numbered
import fastkd
if not late:
    F.kl_div = fastkd.kl_div
    torch.kl_div = numbered
torch.nn.KLDivLoss = fastkd.nn.KLDivLoss
x, t = torch.randn(3, 4).log_softmax(-1).requires_grad_(), torch.randn(3, 4).softmax(-1)
class Sub(torch.Tensor): pass
for a, b in ((x, t), (x, t[:1]), (x.double(), t), (x.as_subclass(Sub), t), (x[:0], t[:0])):
    for reduction in ("none", "sum", "batchmean", "mean"):
        for call in (F.kl_div, lambda *p, reduction: torch.nn.KLDivLoss(reduction=reduction)(*p)):
            loss = call(a, b, reduction=reduction)
            terms = torch.xlogy(b, b) - b * a
            divisor = {"mean": terms.numel(), "batchmean": len(a)}.get(reduction, 1)
            want = terms if reduction == "none" else terms.sum() / divisor
            torch.testing.assert_close(loss, want, equal_nan=True, check_dtype=False)
            loss.sum().backward()
print("done")
"""


@pytest.mark.parametrize("late", [False, True])
def test_in_the_place_of_torchs(late):
    """F.kl_div, torch.kl_div and nn.KLDivLoss replaced, before and after fastkd is imported."""
    script = _PATCH.replace("LATE", str(late))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("kind", ["float32 subclass", "inference", "fake"])
def test_modes_and_subclasses(kind):
    """Warm caches and kept memory of one mode must not reach another."""
    input, target = distributions((40, 1000))
    if kind == "inference":
        with torch.inference_mode():
            loss = fastkd.kl_div(input, target, reduction="sum")
            torch.testing.assert_close(loss, F.kl_div(input, target, reduction="sum"))
            with torch.enable_grad():
                x = input.clone().requires_grad_()
                assert not fastkd.kl_div(x, target, reduction="sum").requires_grad
            teacher = target.clone()
        assert_like_torch(input, target, reduction="sum")
        x = input.clone().requires_grad_()
        fastkd.kl_div(x, teacher, reduction="sum").backward()  # torch refuses: it keeps target
        torch.testing.assert_close(x.grad, -target)
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            fastkd.kl_div(x, teacher, reduction="none")
    elif kind == "fake":
        with FakeTensorMode() as mode:
            x = mode.from_tensor(input).requires_grad_()
            loss = fastkd.kl_div(x, mode.from_tensor(target), reduction="batchmean")
            assert loss.shape == ()
            loss.backward()
            assert x.grad.shape == input.shape
            for function in (fastkd.kl_div, F.kl_div):
                with pytest.raises(Exception, match=r"convert all Tensors to FakeTensors"):
                    function(input, target, reduction="sum")
        assert_like_torch(input, target, reduction="batchmean")
    else:
        calls = []

        class Logged(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                calls.append(function)
                return super().__torch_function__(function, types, args, kwargs or {})

        loss = fastkd.kl_div(input.as_subclass(Logged), target, reduction="sum")
        assert type(loss) is Logged
        assert calls[0] is F.kl_div


FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@hypothesis.settings(max_examples=80, deadline=None)
@hypothesis.given(
    sizes=st.lists(st.integers(0, 4), max_size=3),
    broadcast=st.sampled_from(["same", "row", "scalar", "leading", "misfit"]),
    dtypes=st.tuples(st.sampled_from((*FLOATS, torch.int64)), st.sampled_from(FLOATS)),
    layout=st.sampled_from(["contiguous", "transposed"]),
    reduction=st.sampled_from((*REDUCTIONS, "median")),
    log_target=st.booleans(),
    legacy=st.sampled_from([{}, {"size_average": False}, {"reduce": True}, {"reduce": False}]),
    seed=st.integers(0, 1000),
)
def test_anything_like_torch(sizes, broadcast, dtypes, layout, reduction, log_target, legacy, seed):
    torch.manual_seed(seed)
    shape = tuple(sizes)
    other = {
        "same": shape,
        "row": shape[-1:],
        "scalar": (),
        "leading": (2, *shape),
        "misfit": (*shape[:-1], 7),
    }[broadcast]
    input = -torch.rand(shape).mul(4).to(dtypes[0])
    target = torch.rand(other).to(dtypes[1])
    if layout == "transposed" and input.dim() > 1:
        input = input.transpose(0, -1)
        target = target.transpose(0, -1) if target.shape == shape else target
    assert_like_torch(input, target, reduction=reduction, log_target=log_target, **legacy)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice(backend, reduction):
    input, target = (x.requires_grad_() for x in distributions((4, 50)))
    loss = fastkd.kl_div(input, target, reduction=reduction)
    upstream = torch.full_like(loss, 3.0)
    first = torch.autograd.grad(loss, (input, target), upstream, retain_graph=True)
    second = torch.autograd.grad(loss, (input, target), 2 * upstream)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)


def test_float16_gradients_survive_the_mean(backend):
    input, target = distributions((64, 3000), torch.float16)
    input.requires_grad_()
    (fastkd.kl_div(input, target, reduction="mean").float() * 32768.0).backward()
    exact = -target.double() * 32768.0 / input.numel()
    error = (input.grad.double() - exact).norm() / exact.norm()
    assert error < 2e-3


def test_same_bits_on_any_number_of_threads(backend):
    input, target = (x.requires_grad_() for x in distributions((7, 30_011)))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            loss = fastkd.kl_div(input, target, reduction="sum")
            results.append((loss, *torch.autograd.grad(loss, (input, target))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


def test_raw_op_checks_its_arguments():
    op, loss = torch.ops.fastkd._kl_div, torch.ops.fastkd._kl_div_loss
    x = torch.zeros(3, 4)
    with pytest.raises(
        RuntimeError, match=r"kl_div: target must be contiguous.*\[3, 4\].*\[3, 5\]"
    ):
        op(x, torch.zeros(3, 5), False, 2, False, False)
    with pytest.raises(RuntimeError, match=r"kl_div: target must be float32.*got Double"):
        op(x, x.double(), False, 2, False, False)
    with pytest.raises(RuntimeError, match="kl_div: input must be contiguous"):
        op(x.t(), x.t(), False, 2, False, False)
    with pytest.raises(RuntimeError, match="kl_div: reduction expected 0 to 3, got 4"):
        op(x, x, False, 4, False, False)
    with pytest.raises(RuntimeError, match=r"target must have input's shape \[3, 4\], got \[4\]"):
        loss(x, x[0], False, 2)
    with pytest.raises(RuntimeError, match="input is needed for the gradient of target"):
        torch.ops.fastkd._kl_div_backward(x, None, x, False, 2, False, True)
    for other in (op, lambda *arguments: loss(*arguments[:4])):
        with pytest.raises(ValueError, match="target must be on the device of input, cpu"):
            other(x, x.to("meta"), False, 2, False, False)


@pytest.mark.parametrize("log_target", [False, True])
def test_op_of_graphs(backend, log_target):
    """Of any strides and sizes."""
    input, target = distributions((6, 8), log_target=log_target)
    numbers = {"none": 0, "mean": 1, "sum": 2, "batchmean": 3}
    for x, t in (
        (input, target),
        (input.t(), target.t()),
        (input[:, ::2], target[:, ::2]),
        (input[0].expand(5, 8), target[:5]),
        (input[:0], target[:0]),
        (input[:, :0], target[:, :0]),
        (input[0, 0], target[0, 0]),
    ):
        for reduction, number in numbers.items():
            found = torch.ops.fastkd._kl_div_loss(x, t, log_target, number)
            expected = F.kl_div(x, t, reduction=reduction, log_target=log_target)
            torch.testing.assert_close(found, expected, equal_nan=True)


def test_torch_func_and_autocast():
    input, target = distributions((3, 6), torch.float64)
    each = torch.func.vmap(lambda x, t: fastkd.kl_div(x, t, reduction="sum"))(input, target)
    torch.testing.assert_close(each, F.kl_div(input, target, reduction="none").sum(-1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = [x.bfloat16() for x in (input, target)]
        mine, theirs = (f(*low, reduction="sum") for f in (fastkd.kl_div, F.kl_div))
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(mine, theirs)


def test_module_is_a_drop_in():
    ours = fastkd.nn.KLDivLoss(reduction="batchmean", log_target=True)
    theirs = torch.nn.KLDivLoss(reduction="batchmean", log_target=True)
    input, target = distributions((4, 9), log_target=True)
    assert isinstance(ours, torch.nn.KLDivLoss)
    assert repr(ours) == repr(theirs)
    torch.testing.assert_close(ours(input, target), theirs(input, target))
    with pytest.warns(UserWarning, match="'mean' divides the total loss"):
        fastkd.nn.KLDivLoss()(input, target)


def test_gradients_stay_their_owners_while_steps_go_on():
    """The next step may reuse a freed gradient's memory, never one that somebody still holds."""
    fastkd.release_memory()
    input, target = distributions((8, 16384))
    input.requires_grad_()
    (held,) = torch.autograd.grad(fastkd.kl_div(input, target, reduction="sum"), input)
    address, before = held.data_ptr(), held.clone()
    (other,) = torch.autograd.grad(fastkd.kl_div(2 * input, target, reduction="sum"), input)
    assert other.data_ptr() != address
    assert torch.equal(held, before)
    torch.testing.assert_close(other, 2 * held)
    del other, held
    first = torch.autograd.grad(fastkd.kl_div(input, target, reduction="sum"), input)[0].data_ptr()
    again = torch.autograd.grad(fastkd.kl_div(input, target, reduction="sum"), input)[0].data_ptr()
    assert first == again
