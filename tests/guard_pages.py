"""Tensors that touch an inaccessible page; as a program, every op over rows on such tensors.

`python tests/guard_pages.py BACKEND` prints each case before it runs and ends with a signal at the
first access outside a tensor. tests/test_guard_pages.py runs it: a crash must not end the tests.
"""

import ctypes
import itertools
import mmap
import sys
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
PAGE = mmap.PAGESIZE


def guarded(x: Tensor, at_end: bool = True, step: int = 1) -> Tensor:
    """The same numbers in memory of their own between two inaccessible pages.

    Its last element ends where a page begins, or its first one begins where a page ends. With
    `step` the last dimension has that stride.
    """
    count = x.numel() * step - (step - 1) if x.numel() else 0
    size = count * x.element_size()
    inner = (max(size, 1) + PAGE - 1) // PAGE * PAGE
    memory = mmap.mmap(-1, inner + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + PAGE + inner):
        if _libc.mprotect(page, PAGE, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    if not count:
        return torch.empty_like(x)
    offset = PAGE + (inner - size if at_end else 0)
    flat = torch.frombuffer(memory, dtype=x.dtype, count=count, offset=offset)
    strides = [step * stride for stride in x.contiguous().stride()]
    out = flat.as_strided(x.shape, strides)
    with torch.no_grad():
        out.copy_(x)
    return out


def every_tensor(value: Any, function: Any) -> Any:
    """The value with function applied to each tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(every_tensor(x, function) for x in value)
    if isinstance(value, dict):
        return {name: every_tensor(x, function) for name, x in value.items()}
    return value


def guarded_problem(problem: Any, at_end: bool, step: int) -> Any:
    """All tensors of the problem so; logits with that stride."""
    plain = lambda x: guarded(x, at_end)  # noqa: E731
    return replace(
        problem,
        logits=every_tensor(problem.logits, lambda x: guarded(x, at_end, step)),
        columns=every_tensor(problem.columns, plain),
        sets=every_tensor(problem.sets, plain),
        options=every_tensor(problem.options, plain),
    )


def with_row_options(problem: Any, draw: Any) -> Any:
    """A loss over rows with a weight, mask and temperature for each."""
    if problem.op not in ("softmax_divergence", "topk_divergence", "clipped_divergence"):
        return problem
    options = {
        "weight": draw.rand(draw.rows).float(),
        "mask": draw.rand(draw.rows) < 0.9,
        "temperature": draw.rand(draw.rows).float() + 0.5,
        "teacher_temperature": draw.rand(draw.rows).double() + 0.5,
    }
    return replace(problem, options={**problem.options, **options})


def results(problem: Any) -> list[Tensor]:
    """Outputs and gradients; upstream gradients are guarded, too."""
    import fastkd

    leaves = {
        name: x if isinstance(x, list) else x.detach().requires_grad_(name in problem.wanted)
        for name, x in problem.logits.items()
    }
    options = dict(problem.options)
    for name in problem.wanted:
        if name in options:
            options[name] = leaves[name] = options[name].detach().requires_grad_()
    found = getattr(fastkd, problem.op)(**{**leaves, **problem.columns, **problem.sets, **options})
    outputs = [x for x in ([found] if isinstance(found, Tensor) else found) if x is not None]
    grown = [x for x in outputs if x.requires_grad]
    if not grown:
        return [x.detach() for x in outputs]
    upstream = [guarded(torch.full_like(x, 0.5)) for x in grown]
    wanted = [leaves[name] for name in problem.wanted]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(grown, wanted, upstream))


def raw_byte_tables(problem: Any) -> None:
    """The vocabulary's own tables at the edge of a page, which the public op does not take."""
    from raw import byte_arguments

    valid, options = problem.sets.get("valid"), problem.options
    logits = problem.logits["logits"]
    tables = byte_arguments(logits, options["vocab"], options["prefix"], valid)
    tables = every_tensor(tables, lambda x: guarded(x))
    out, sums = torch.ops.fastkd._byte_log_probs(logits, *tables)
    torch.ops.fastkd._byte_log_probs_backward_into(
        guarded(torch.zeros_like(logits)), guarded(sums), guarded(0 * out + 1), logits, *tables
    )


def run_kl_div(dtype: torch.dtype, vocab: int, at_end: bool) -> None:
    import fastkd

    for log_target, reduction in itertools.product((False, True), ("none", "sum")):
        x, y = (torch.randn(3, vocab).log_softmax(-1).to(dtype) for _ in range(2))
        leaves = [guarded(z, at_end).requires_grad_() for z in (x, y if log_target else y.exp())]
        loss = fastkd.kl_div(*leaves, reduction=reduction, log_target=log_target)
        torch.autograd.grad(loss, leaves, guarded(torch.ones_like(loss)))


def run_in_place(dtype: torch.dtype, vocab: int, at_end: bool) -> None:
    import fastkd

    for divergence in ("forward_kl", "jsd"):
        student = guarded(torch.randn(3, vocab).to(dtype), at_end).requires_grad_()
        teacher = guarded(torch.randn(3, vocab).to(dtype), at_end)
        fastkd.softmax_divergence(student, teacher, divergence=divergence, inplace=True).backward()


def run_bfloat16_products(at_end: bool) -> None:
    """On each instruction set; nothing where the kernels in use have none."""
    ops = torch.ops.fastkd
    if (chosen := ops._bfloat16_capability(None)) == "none":
        return
    for name, (rows, features, vocab) in itertools.product(
        {"avx512_bf16", chosen}, ((33, 17, 35), (3, 64, 513), (1, 1, 1))
    ):
        ops._bfloat16_capability(name)
        hidden = guarded(torch.randn(rows, features).bfloat16(), at_end)
        weight = guarded(torch.randn(vocab, features).bfloat16(), at_end)
        for dtype in (torch.float32, torch.bfloat16):
            logits = guarded(torch.randn(rows, vocab).to(dtype), at_end)
            ops._bfloat16_logits(logits, hidden, weight, guarded(torch.ones(vocab), at_end), 1.0)
            ops._bfloat16_hidden_gradient(
                guarded(torch.zeros(rows, features, dtype=dtype), at_end), logits, weight, 1.0
            )
            total = guarded(torch.zeros(vocab, features), at_end)
            ops._bfloat16_weight_gradient(total, logits, hidden, 1.0, True)
    ops._bfloat16_capability(chosen)


def select(backend: str) -> bool:
    """Use that backend, as conftest.py does -> whether it is the emulator."""
    import fastkd

    kind, _, which = backend.partition("-")
    if kind == "cpu":
        fastkd.cpu_capability(which)
        return False
    import emulator

    from fastkd.acm import _kernels

    emulator.configure(int(which))
    torch.ops.fastkd = emulator.ops()
    _kernels.DTYPES["cpu"] = (torch.float32, torch.bfloat16, torch.float16)
    return True


def main(backend: str) -> None:
    """Every kind of problem; gradients go to guarded memory as well."""
    from row_kinds import KINDS, Draw

    from fastkd._ops.gradient import GradientMemory

    emulated = select(backend)
    warnings.simplefilter("ignore")
    turn = itertools.cycle((True, False))
    GradientMemory.take = lambda self, like: guarded(torch.zeros_like(like), next(turn))
    GradientMemory.keep = lambda self, gradient: None
    vocabularies = (2, 19, 37, 67) if emulated else (2, 19, 37, 513, 1027, 8195)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64][: 3 if emulated else 4]
    for dtype, vocab, at_end in itertools.product(dtypes, vocabularies[1:], (True, False)):
        print(f"kl_div, in place: {dtype} {vocab}", flush=True)
        run_kl_div(dtype, vocab, at_end)
        run_in_place(dtype, vocab, at_end)
    for at_end in () if emulated else (True, False):
        print("products of bfloat16", flush=True)
        run_bfloat16_products(at_end)
    for number, (kind, dtype) in enumerate(itertools.product(KINDS, dtypes)):
        vocab = vocabularies[number % len(vocabularies)]
        draw = Draw(number, dtype, 3, vocab)
        problem = KINDS[kind](draw)
        if number % 2:
            problem = with_row_options(problem, draw)
        layouts = ((True, 1), (False, 1)) if number % 3 else ((True, 2), (False, 3))
        right = results(problem)
        for at_end, step in layouts:
            print(
                f"{kind}: at the {'end' if at_end else 'start'}, step {step}: {problem}", flush=True
            )
            found = results(guarded_problem(problem, at_end, step))
            for mine, exact in zip(found, right, strict=True):
                room = 1e-2 if exact.dtype in (torch.bfloat16, torch.float16) else 1e-4
                torch.testing.assert_close(mine, exact, rtol=room, atol=room, equal_nan=True)
        if problem.op == "byte_log_probs":
            raw_byte_tables(guarded_problem(problem, True, 1))
    print("done")


if __name__ == "__main__":
    if sys.argv[1] == "crash":  # what test_guard_pages.py proves the pages with
        x = guarded(torch.zeros(5), at_end=sys.argv[2] == "end")
        ctypes.string_at(x.data_ptr() + (x.nbytes if sys.argv[2] == "end" else -1), 1)
    else:
        main(sys.argv[1])
