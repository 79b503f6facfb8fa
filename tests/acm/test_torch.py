"""acm, acm.soft, acm.prefix_loss under opcheck, export, batched gradients; what calls leave."""

import os
import subprocess
import sys

import pytest
import torch
from cases import relative_error
from test_hard import problem, some_choices

import fastkd
from fastkd.acm import _kernels, _products


def test_opcheck_of_the_kernels(backend):
    x, *weights = (v.detach() for v in problem((6,)))
    check, ops = torch.library.opcheck, torch.ops.fastkd
    check(ops._acm_route.default, (some_choices((6,)), 4))
    routing = _kernels.route(torch.full((6,), 4), 4)  # all room for pre-activations is used
    for keep, packed in ((True, True), (True, False), (False, True), (False, False)):
        arguments = (x, *weights, torch.randn(5, 10), *routing, 0, keep, packed)
        check(ops._acm_rows.default, arguments)
    check(ops._acm_value.default, (x, *weights, None, some_choices((6,)), 0))
    _, kept = ops._acm_rows(x, *weights, None, *routing, 0, True)
    needs = (True, False, True, True)
    arguments = (torch.randn(6, 10), x, *weights, *routing, kept, 0, *needs)
    check(ops._acm_rows_backward.default, arguments)
    routing = _kernels.route(some_choices((6,)), 4)
    _, kept = ops._acm_rows(x, *weights, None, *routing, 0, True, True)
    check(
        ops._acm_rows_backward.default, (torch.randn(6, 10), x, *weights, *routing, kept, 0, *needs)
    )


def test_large_layers_use_torchs_products(monkeypatch):
    """On a GPU in 16 bits; here the same path on the CPU."""
    assert _kernels.worth_waiting(8192, 2048, 4, 2048, 2048) is True
    assert _kernels.worth_waiting(8192, 768, 4, 768, 768) is False
    assert not _kernels.products_win(
        torch.ones(1 << 20, 8), torch.ones(4, 8, 8), torch.ones(4, 8, 8)
    )
    x, *weights = problem((6,))
    choices, bias = some_choices((6,)), torch.randn(10, requires_grad=True)
    inputs = (x, *weights, bias)
    found = []
    for large in (False, True):
        monkeypatch.setattr(_kernels, "products_win", lambda *_, large=large: large)
        out = fastkd.acm.hard(x, *weights, choices, bias=bias)
        found.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for kernels, products in zip(*found, strict=True):
        assert relative_error(products, kernels.double()) < 1e-6
    assert "_AcmBackward" in out.grad_fn.next_functions[0][0].next_functions[0][0].name()


def test_opcheck():
    x, *weights = (v.detach() for v in problem((6,)))
    choices, target = some_choices((6,)), torch.randn(6, 10)
    scale = torch.rand(4, 6)
    grad = torch.randn(6, 10)
    check = torch.library.opcheck
    for args in ((choices, None), (None, scale), (None, None)):
        # Where some learners do not run, the room for their pre-activations is left as it is.
        check(_products.forward.op, (x, *weights, *args, "gelu", args[0] is None, True))
        _, kept = _products.forward.kernel(x, *weights, *args, "gelu", True, True)
        needs = [True, True, False, True, args[1] is not None]
        for pre in (kept, None):
            check(_products.backward.op, (grad, x, *weights, *args, pre, "gelu", needs))
    needs = [True, True, False, True, True]
    arguments = (x, *weights, target, torch.rand(5), "gelu", False, needs)
    check(_products.prefixes.op, arguments)
    _, *found = _products.prefixes.kernel(*arguments)
    check(
        _products.prefixes_backward.op,
        (torch.rand(5), x, *weights, target, found, "gelu", False, needs, False),
    )


# Many vectors at once through backward

CALLS = {
    "acm.hard": lambda x, w1, b1, w2, bias: fastkd.acm.hard(x, w1, b1, w2, CHOICES, bias=bias),
    "acm.soft": fastkd.acm.soft,
    "straight_through": lambda *a: fastkd.acm.soft(*a, straight_through=True),
    "acm.prefix_loss": fastkd.acm.prefix_loss,
    "detach": lambda *a: fastkd.acm.prefix_loss(*a, detach=True),
}
CHOICES = torch.tensor([0, 4, 2, 1, 3, 3])


def arguments_of(name, dtype):
    """Leaves of a call of `CALLS`."""
    leaves = [v.detach() for v in problem((6,), dtype)]
    rest = {
        "acm.hard": lambda: torch.randn(5, 10),
        "acm.soft": lambda: torch.randn(6, 5).softmax(-1),
        "straight_through": lambda: torch.randn(6, 5).softmax(-1),
    }.get(name, lambda: torch.randn(6, 10))
    return [v.requires_grad_() for v in (*leaves, rest().to(dtype))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(CALLS))
def test_batched_gradients(name, dtype):
    leaves = arguments_of(name, dtype)
    out = CALLS[name](*leaves)
    directions = torch.randn(3, *out.shape).to(out.dtype)
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    options = {"is_grads_batched": True, "retain_graph": True}
    together = torch.autograd.grad(out, leaves, directions, **options)
    one_by_one = [torch.autograd.grad(out, leaves, d, retain_graph=True) for d in directions]
    for found, right, leaf in zip(together, zip(*one_by_one, strict=True), leaves, strict=True):
        assert found.dtype == leaf.dtype
        assert not found.requires_grad
        assert relative_error(found, torch.stack(right).double()) < limit
    # Only some need one.
    (of_w2,) = torch.autograd.grad(out, leaves[3:4], directions, **options)
    torch.testing.assert_close(of_w2, together[3])


@pytest.mark.parametrize("name", list(CALLS))
def test_jacobians(name):
    leaves = tuple(arguments_of(name, torch.float32))
    full = torch.autograd.functional.jacobian
    for found, right in zip(
        full(CALLS[name], leaves, vectorize=True), full(CALLS[name], leaves), strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


# Export


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_exported_module_trains(training, strict, dtype):
    module = fastkd.nn.ACM(8, 6, width=4, num_learners=3, bias=True, dtype=dtype).train(training)
    rows = torch.export.Dim("rows", max=1000)
    options = {"strict": strict, "dynamic_shapes": ({0: rows},)}
    exported = torch.export.export(module, (torch.randn(5, 8, dtype=dtype),), **options).module()
    for number in (2, 9, 300):
        x = torch.randn(number, 8, dtype=dtype)
        module.zero_grad()
        exported.zero_grad()
        values = []
        for run in (module, exported):
            torch.manual_seed(3)
            values.append(run(x))
            values[-1].square().sum().backward()
        torch.testing.assert_close(*values)
        gradients = {name: leaf.grad for name, leaf in exported.named_parameters()}
        for name, leaf in module.named_parameters():
            torch.testing.assert_close(gradients[name], leaf.grad)
    assert module.w1.grad is not None


@pytest.mark.filterwarnings("ignore")
def test_an_exported_module_without_gradients_is_kernels():
    module = fastkd.nn.ACM(8, 6, width=4).eval()
    with torch.no_grad():
        rows = {0: torch.export.Dim("rows", max=1000)}
        program = torch.export.export(module, (torch.randn(5, 8),), dynamic_shapes=(rows,))
        x = torch.randn(33, 8)
        assert torch.equal(program.module()(x), module(x))
    assert "fastkd._acm_rows" in str(program.graph)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", list(CALLS)[1:])
def test_exported_functions_train(name, strict):
    class Model(torch.nn.Module):
        def __init__(self, leaves):
            super().__init__()
            self.weights = torch.nn.ParameterList(v.detach() for v in leaves[1:4])

        def forward(self, x, other):
            w = self.weights  # not *self.weights, which torch 2.10 cannot trace
            return CALLS[name](x, w[0], w[1], w[2], other)

    leaves = arguments_of(name, torch.float32)
    model, (x, *_, other) = Model(leaves), (v.detach() for v in leaves)
    exported = torch.export.export(model, (x, other), strict=strict).module()
    out = CALLS[name](*leaves)
    found = exported(x, other)
    torch.testing.assert_close(found, out)
    right = torch.autograd.grad(out.sum(), leaves[1:4])
    weights = [leaf for _, leaf in sorted(exported.named_parameters())]
    for mine, exact in zip(torch.autograd.grad(found.sum(), weights), right, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)


def test_batches_of_any_size_compile_once():
    torch._dynamo.reset()
    compiled = torch.compile(fastkd.acm.hard, fullgraph=True, dynamic=True, backend="aot_eager")
    x, *weights = (v.detach() for v in problem((40,)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in range(2, 14):
            compiled(x[:rows], *weights, some_choices((rows,)))


# Errors, and what a call leaves


def test_what_goes_wrong_is_not_tried_again(monkeypatch):
    """Only arguments that the kernels do not take go another way."""

    def fail(*_):
        raise RuntimeError("CUDA error: out of memory")

    leaves = [v.detach() for v in problem((6,))]
    monkeypatch.setattr(torch.ops.fastkd, "_acm_value", fail)
    with torch.no_grad(), pytest.raises(RuntimeError, match="out of memory"):
        fastkd.acm.hard(*leaves, CHOICES)


def test_the_op_says_what_it_does_not_take():
    x, *weights = (v.detach() for v in problem((6,)))
    run = torch.ops.fastkd._acm_value
    assert torch.equal(run(x, *weights, None, CHOICES, 0), fastkd.acm.hard(x, *weights, CHOICES))
    for arguments in (
        *((x.T.contiguous().T, *weights, None, CHOICES, 0), (x, *weights, None, CHOICES[:5], 0)),
        *((x, *weights, None, CHOICES, 5), (x, *weights, None, CHOICES, -1)),
        (x, *(w.double() for w in weights), None, CHOICES, 0),
        (x, *weights, torch.ones(3), CHOICES, 0),
        (x, *weights, None, CHOICES.short(), 0),
        (x, weights[0][0], *weights[1:], None, CHOICES, 0),
    ):
        assert run(*arguments) is None
    with pytest.raises(
        RuntimeError, match=r"IndexError: acm\.hard: choices must lie in \[0, N = 4\]"
    ):
        run(x, *weights, None, CHOICES + 1, 0)


@pytest.mark.parametrize("place", range(7))
def test_raw_ops_take_no_meta_tensor_for_a_real_one(place):
    x, *weights = (v.detach() for v in problem((6,)))
    order, counts = _kernels.route(CHOICES, 4)
    ops = torch.ops.fastkd
    for op, tensors, rest in (
        (ops._acm_rows, [x, *weights, torch.ones(10), order, counts], (0, True)),
        (ops._acm_rows_backward, [torch.ones(6, 10), x, *weights, order, counts], None),
        (ops._acm_value, [x, *weights, torch.ones(10), CHOICES], (0,)),
    ):
        if place >= len(tensors):
            continue
        tensors[place] = tensors[place].to("meta")
        rest = (torch.ones(4, 6, 7), 0, *[True] * 4) if rest is None else rest
        with pytest.raises(RuntimeError, match=r"acm\.hard: all tensors must be on"):
            op(*tensors, *rest)


LEFT = """
import gc, torch, fastkd
def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4096
torch.set_num_threads(1)
x, w1, b1, w2 = torch.randn(2, 4), torch.randn(2, 4, 4), torch.randn(2, 4), torch.randn(2, 4, 4)
choices, bias, w1_grad = torch.tensor([1, 2]), torch.randn(4), w1.clone().requires_grad_()
def call():
    with torch.no_grad():
        fastkd.acm.hard(x, w1, b1, w2, choices, bias=bias)
def train():
    fastkd.acm.hard(x, w1_grad, b1, w2, choices, bias=bias).sum().backward()
    w1_grad.grad = None
for run, times in ((call, 60000), (train, 15000)):
    for _ in range(3000): run()
    before = resident()
    for _ in range(times): run()
    print((resident() - before) / times)
"""


@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""),
    reason="AddressSanitizer keeps freed memory for a while: the resident memory says nothing",
)
def test_a_call_leaves_nothing_behind():
    """Bytes a call: torch's boxing of a `str` leaves 48 of them, of which the ops take none."""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LEFT], capture_output=True, text=True, check=True
    )
    assert all(float(line) < 16 for line in found.stdout.split()), found.stdout
    schemas = [
        str(getattr(torch.ops.fastkd, name).default._schema)
        for name in ("_acm_route", "_acm_value", "_acm_rows", "_acm_rows_backward")
    ]
    assert not [schema for schema in schemas if "str " in schema]
    assert "SymInt learners" in schemas[0]
