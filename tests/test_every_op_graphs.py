"""What every op promises of compiled and exported graphs: all sizes and numbers, training."""

import copy

import pytest
import torch
from cases import logits
from registry import EVERY, LOSSES, OPS, VOCAB
from torch._dynamo.testing import CompileCounterWithBackend

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


# --- torch.compile ------------------------------------------------------------------------------


@of(EVERY)
def test_one_graph_serves_every_size(op):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    run = torch.compile(
        lambda student, given: op.call(student, **given).sum(),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    for batch in range(3, 14):
        student, given = student_of((batch, batch + 3)), op.tensors((batch, batch + 3))
        found = run(student, given)
        torch.testing.assert_close(found, op.call(student, **given).sum())
        if op.differentiable:
            (gradient,) = torch.autograd.grad(found, student)
            (right,) = torch.autograd.grad(op.call(student, **given).sum(), student)
            torch.testing.assert_close(gradient, right)
    assert counter.frame_count <= 2


@each(EVERY, lambda op: op.numbers)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_one_graph_serves_every_number(op, name, as_tensor):
    if as_tensor and name in ("epsilon", "softness"):
        as_tensor = False
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    run = torch.compile(
        lambda student, given, x: op.call(student, **given, **{name: x}).sum(),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    first, last = op.numbers[name]
    given = op.tensors(LEADING)
    for i in range(10):
        x = first + (last - first) * i / 9
        x = torch.tensor(x) if as_tensor else x
        student = student_of()
        found = run(student, given, x)
        torch.testing.assert_close(found, op.call(student, **given, **{name: x}).sum())
        if op.differentiable:
            found.backward()
            right = torch.autograd.grad(op.call(student, **given, **{name: x}).sum(), student)[0]
            torch.testing.assert_close(student.grad, right)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_inplace_in_a_graph(compiler):
    torch._dynamo.reset()

    def step(leaf, teacher, labels):
        student = leaf * 1
        loss = fastkd.softmax_divergence(student, teacher, labels=labels, inplace=True)
        return loss, student

    run = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    for rows in (3, 4, 5):
        leaf, teacher = logits((rows, 50)).requires_grad_(), logits((rows, 50))
        labels = torch.randint(0, 50, (rows,))
        (loss, student), (right, gradient) = (f(leaf, teacher, labels) for f in (run, step))
        # torch 2.10 compiles an in-place argument of an autograd Function into a copy.
        assert torch.equal(student, gradient) or torch.__version__ < "2.11"
        for value in (loss, right):
            leaf.grad = None
            value.backward()
            assert torch.equal(leaf.grad, gradient)


# --- torch.export -------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op = op
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, student, given):
        return self.op.call(student * self.scale, **given)


@of(OPS)
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_loss_trains(op, strict):
    plain = Model(op)
    batch = torch.export.Dim("batch", min=2, max=64)
    given = op.tensors(LEADING)
    sizes = {
        name: {0: batch} if value.dim() and value.shape[:2] == LEADING else {}
        for name, value in given.items()
    }
    program = torch.export.export(
        copy.deepcopy(plain),
        (student_of().detach(), given),
        dynamic_shapes=({0: batch}, sizes),
        strict=strict,
    )
    exported = program.module()
    for leading in (LEADING, (5, 6)):
        student, given = student_of(leading).detach(), op.tensors(leading)
        exported.zero_grad()
        plain.zero_grad()
        found, right = exported(student, given).sum(), plain(student, given).sum()
        torch.testing.assert_close(found, right)
        found.backward()
        right.backward()
        gradient = dict(exported.named_parameters())["scale"].grad
        torch.testing.assert_close(gradient, plain.scale.grad)


@of([op for op in OPS if op.name != "kl_div"])
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_loss_has_the_gradients_of_the_tensors_it_is_run_with(op, strict):
    """Traced with tensors that require none; second derivatives, too."""
    given = op.tensors(LEADING)

    class Bare(torch.nn.Module):
        def forward(self, student, given):
            return op.call(student, **given)

    program = torch.export.export(Bare(), (student_of().detach(), given), strict=strict)
    exported, student = program.module(), student_of()
    found, right = exported(student, given).sum(), op.call(student, **given).sum()
    pair = [torch.autograd.grad(x, student, create_graph=True)[0] for x in (found, right)]
    torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)
    second = [torch.autograd.grad(x.square().sum(), student)[0] for x in pair]
    torch.testing.assert_close(*second, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(exported(student, given).sum(), student)
    torch.testing.assert_close(gradient, pair[1].detach(), rtol=1e-5, atol=1e-5)


def test_an_exported_loss_trains_where_inplace_is_asked_for():
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, hidden, teacher):
            return fastkd.softmax_divergence(self.linear(hidden), teacher, inplace=True)

    model, inputs = Bare(), (torch.randn(4, 8), torch.randn(4, 8))
    model(*inputs).backward()
    right = model.linear.weight.grad.clone()
    for strict in (False, True):
        exported = torch.export.export(copy.deepcopy(model), inputs, strict=strict).module()
        exported.zero_grad()
        exported(*inputs).backward()
        found = dict(exported.named_parameters())["linear.weight"].grad
        torch.testing.assert_close(found, right)


@of(LOSSES)
def test_transforms_in_a_compiled_function(op):
    torch._dynamo.reset()
    given = op.tensors(LEADING)
    gradient = torch.func.grad(lambda x: op.call(x, **given))
    student = student_of().detach()
    compiled = torch.compile(lambda x: gradient(x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student), gradient(student))
