"""Distillation of quantised networks, and their quantiser."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._ops.arguments import check_no_gradient, to_flag, to_integer
from fastkd._ops.checks import check_positive, is_number
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.losses._token_stats import token_stats
from fastkd.recipes._chunks import wide
from fastkd.recipes._features import check_classes, check_floats, check_like, count_over
from fastkd.recipes._rows import check_choice, check_share, label_log_probs, masked_mean


def quantized_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.7,
    temperature: float = 2.0,
    ask: str = "always",
    cutoff: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Quantised distillation: soft and hard labels, the teacher asked for some. The total.

    Over the examples for which the teacher is asked, :math:`\alpha T^2` times the mean over
    examples *and classes* of the terms of :math:`KL(p \| q)`, which is 1/C of the usual mean, plus
    :math:`1 - \alpha` times their mean cross-entropy; plus the mean cross-entropy of the other
    examples, with factor 1.

    ====================  ==================================================================
    ``always``            the teacher is asked for all examples
    ``entropy``           where the student's entropy, in bits, is above ``cutoff``
    ``random_entropy``    with the probability entropy / log2 C
    ``wrong``             where the student's best class is not the label
    ====================  ==================================================================

    Args:
        student_logits: ``[..., C]``.
        teacher_logits: the same shape.
        labels: int64, one a row; rows with -100 do not count.
        alpha: 0.7 in the authors' code.
        temperature: of the first term; 2 in the authors' code, 1 for translation.
        ask: one of the table.
        cutoff: of ``"entropy"``, in bits; needed there, and only there.
        generator: of ``"random_entropy"``.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value, shape or type.

    Source: Polino et al. (arXiv 1802.05668; code antspy/quantized_distillation).

    >>> import torch, fastkd
    >>> student, teacher = torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])
    >>> labels = torch.tensor([0])
    >>> round(fastkd.recipes.quantized_distillation(student, teacher, labels).item(), 4)
    0.3633
    """
    name = "quantized_distillation"
    check_like(name, "teacher_logits", teacher_logits, "student_logits", student_logits)
    check_classes(name, labels, student_logits)
    check_share(name, "alpha", alpha)
    check_no_gradient(name, alpha=alpha)
    check_positive(name, "temperature", temperature)
    check_choice(name, "ask", ask, ("always", "entropy", "random_entropy", "wrong"))
    if (ask == "entropy") != is_number(cutoff) or (ask != "entropy" and cutoff is not None):
        raise ValueError(
            f"{name}: cutoff must be a number for ask='entropy' and None else, got {cutoff!r} for "
            f"{ask!r}"
        )
    kept = labels != -100
    asked = kept & _asked(student_logits.detach(), labels, ask, cutoff, generator)
    losses = -label_log_probs(student_logits, labels)
    total = (1 - alpha) * masked_mean(losses, asked) + masked_mean(losses, kept & ~asked)
    if not alpha:
        return total
    return total + softmax_divergence(
        student_logits,
        teacher_logits,
        temperature=temperature,
        square_temperature=True,
        mask=asked,
        normalizer=count_over(asked, alpha / student_logits.size(-1)),
    )


def _asked(
    logits: Tensor,
    labels: Tensor,
    ask: str,
    cutoff: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Rows for which the teacher is asked; of rows without a label the value means nothing."""
    if ask == "always":
        return torch.ones_like(labels, dtype=torch.bool)
    stats = token_stats(logits)
    if ask == "wrong":
        return stats.student_argmax != labels
    assert stats.student_entropy is not None
    bits = stats.student_entropy / math.log(2)
    if cutoff is not None:
        return bits > cutoff
    drawn = torch.rand(bits.shape, generator=generator, device=bits.device)
    return drawn < bits / math.log2(max(logits.size(-1), 2))


def bucket_quantize(
    x: Tensor, levels: int, bucket: int | None = 256, *, straight_through: bool = True
) -> Tensor:
    r"""Uniform quantisation of a tensor to a few levels in each bucket of consecutive values.

    Each bucket is scaled linearly from its smallest and largest value to [0, 1], rounded to
    multiples of 1 / (levels - 1), and scaled back. An error is at most the bucket's range over
    2 (levels - 1). A bucket of equal values (range below 1e-10) stays as it is.

    Args:
        x: floating-point, finite, any shape and strides; buckets take its values in the order of
            ``x.flatten()``.
        levels: at least 2: 2^b for b bits.
        bucket: values in a bucket, the last one may have fewer; None: all in one.
        straight_through: the gradient passes through the rounding as if it were not there; False:
            no gradient.

    Returns:
        x's shape and dtype.

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Source: Polino et al. (arXiv 1802.05668; code antspy/quantized_distillation).

    >>> import torch, fastkd
    >>> fastkd.recipes.bucket_quantize(torch.tensor([0.0, 0.3, 0.6, 1.0]), 3).tolist()
    [0.0, 0.5, 0.5, 1.0]
    """
    check_floats("bucket_quantize", x=x)
    straight_through = to_flag("bucket_quantize", "straight_through", straight_through)
    levels = to_integer("bucket_quantize", "levels", levels)
    if levels < 2:
        raise ValueError(f"bucket_quantize: levels must be at least 2, got {levels}")
    size = max(x.numel(), 1) if bucket is None else to_integer("bucket_quantize", "bucket", bucket)
    if size < 1:
        raise ValueError(f"bucket_quantize: bucket must be positive, got {size}")
    if not x.numel():
        return x if straight_through else x.detach()
    flat = wide(x.detach()).reshape(1, -1)
    # Filled up with the last value, which changes no bucket's range.
    buckets = F.pad(flat, (0, -flat.size(1) % size), mode="replicate").view(-1, size)
    lowest, highest = buckets.amin(1, keepdim=True), buckets.amax(1, keepdim=True)
    extent = highest - lowest
    scale = torch.where(extent < 1e-10, 1, extent) / (levels - 1)
    rounded = ((buckets - lowest) / scale).round() * scale + lowest
    rounded = torch.where(extent < 1e-10, buckets, rounded)
    found = rounded.flatten()[: x.numel()].view(x.shape).to(x.dtype)
    # x - x is exactly 0 where x is finite, and has the gradient 1.
    return found + (x - x.detach()) if straight_through else found
