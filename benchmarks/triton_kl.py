"""Forward KL from logits with its gradient as a Triton kernel: what fastkd is compared with.

A program has one row and goes over it twice. The first pass keeps for each of its lanes a running
maximum m of each side and, relative to it, the sums of an online softmax,

    z_s = sum exp(s - m_s),  z_t = sum exp(t - m_t),  w = sum exp(t - m_t) (t - s),

which meet only after the pass, so that no lane waits for another within it. Then the row's loss is
w / z_t - lse(t) + lse(s). The second pass writes (q - p) / rows. Both run in the forward call;
backward multiplies by the incoming gradient, and returns at once where that is 1.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
#: Below every finite logit, and finite: no difference of two of these is NaN.
LOWEST = tl.constexpr(-1e38)

INTERPRETED = triton.knobs.runtime.interpret
CONFIGS = [
    triton.Config({"BLOCK": block}, num_warps=warps)
    for block, warps in ((2048, 4), (4096, 8), (4096, 16), (8192, 16), (16384, 32))
]


@triton.jit
def _kl_kernel(
    student_ptr,
    teacher_ptr,
    loss_ptr,
    gradient_ptr,
    vocab,
    scale,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * vocab
    teacher_ptr += row * vocab
    lane = tl.arange(0, BLOCK)

    max_s = tl.full([BLOCK], LOWEST, tl.float32)
    max_t = tl.full([BLOCK], LOWEST, tl.float32)
    sum_s = tl.zeros([BLOCK], tl.float32)
    sum_t = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        column = start + lane
        inside = column < vocab
        # In units of log 2: exp2 is the instruction.
        s = tl.load(student_ptr + column, mask=inside, other=-float("inf")).to(tl.float32) * LOG2_E
        t = tl.load(teacher_ptr + column, mask=inside, other=-float("inf")).to(tl.float32) * LOG2_E
        new_s = tl.maximum(max_s, s)
        new_t = tl.maximum(max_t, t)
        shrink = tl.exp2(max_t - new_t)
        p = tl.exp2(t - new_t)
        sum_s = sum_s * tl.exp2(max_s - new_s) + tl.exp2(s - new_s)
        sum_t = sum_t * shrink + p
        cross = cross * shrink + tl.where(t > -float("inf"), p * (t - s), 0.0)
        max_s = new_s
        max_t = new_t

    top_s = tl.max(max_s, 0)
    top_t = tl.max(max_t, 0)
    share = tl.exp2(max_t - top_t)
    z_s = tl.sum(sum_s * tl.exp2(max_s - top_s), 0)
    z_t = tl.sum(sum_t * share, 0)
    lse_s = top_s + tl.log2(z_s)
    lse_t = top_t + tl.log2(z_t)
    tl.store(loss_ptr + row, (tl.sum(cross * share, 0) / z_t - lse_t + lse_s) * LN_2)

    if WITH_GRADIENT:
        gradient_ptr += row * vocab
        for start in range(0, vocab, BLOCK):
            column = start + lane
            inside = column < vocab
            s = tl.load(student_ptr + column, mask=inside, other=0.0).to(tl.float32) * LOG2_E
            t = tl.load(teacher_ptr + column, mask=inside, other=0.0).to(tl.float32) * LOG2_E
            gradient = (tl.exp2(s - lse_s) - tl.exp2(t - lse_t)) * scale
            tl.store(
                gradient_ptr + column,
                gradient.to(gradient_ptr.dtype.element_ty),
                mask=inside,
            )


@triton.jit
def _scale_kernel(gradient_ptr, incoming_ptr, count, BLOCK: tl.constexpr):
    incoming = tl.load(incoming_ptr).to(tl.float32)
    if incoming == 1.0:
        return
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    value = tl.load(gradient_ptr + place, mask=inside, other=0.0).to(tl.float32) * incoming
    tl.store(gradient_ptr + place, value.to(gradient_ptr.dtype.element_ty), mask=inside)


# The interpreter has no clock to choose by.
_tuned_kl_kernel = (
    _kl_kernel
    if INTERPRETED
    else triton.autotune(CONFIGS, key=["vocab", "WITH_GRADIENT"])(_kl_kernel)
)


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        rows, vocab = student.shape
        with_gradient = ctx.needs_input_grad[0]
        losses = torch.empty(rows, dtype=torch.float32, device=student.device)
        gradient = torch.empty_like(student) if with_gradient else student
        options = {"BLOCK": 1024} if INTERPRETED else {}
        _tuned_kl_kernel[(rows,)](
            *(student, teacher, losses, gradient, vocab, 1 / rows),
            WITH_GRADIENT=with_gradient,
            **options,
        )
        if with_gradient:
            ctx.gradient = gradient
        return losses.sum() / rows

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor, None]:
        gradient, block = ctx.gradient, 4096
        ctx.gradient = None  # it is scaled in place
        grid = (triton.cdiv(gradient.numel(), block),)
        _scale_kernel[grid](gradient, incoming[0], gradient.numel(), BLOCK=block)
        return gradient, None


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(teacher) || softmax(student)), with a gradient of the student.

    Both are contiguous ``[rows, vocab]``, float32 or bfloat16.
    """
    if student.shape != teacher.shape or student.dim() != 2:
        raise ValueError(f"forward_kl: shapes {student.shape} and {teacher.shape}")
    if not (student.is_contiguous() and teacher.is_contiguous()):
        raise ValueError("forward_kl: the logits must be contiguous")
    return _ForwardKL.apply(student, teacher)
