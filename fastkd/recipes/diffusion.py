"""Distillation of diffusion and flow-matching models into fewer steps."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd._ops.arguments import check_no_gradient
from fastkd._ops.checks import is_number
from fastkd.recipes._chunks import check_mask, wide
from fastkd.recipes._features import check_floats, check_like, mean_of_rows, only
from fastkd.recipes._rows import check_row_values, check_share


def _samples(function: str, **samples: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Which samples ``[B, ...]`` have no NaN, and all of them with 0 for those that have."""
    (name, first), *others = samples.items()
    check_floats(function, **{name: first})
    if not first.dim():
        raise ValueError(f"{function}: {name} must be [B, ...], got a 0-d tensor")
    for other, values in others:
        check_like(function, other, values, name, first)
    whole = torch.ones(first.shape[:1], dtype=torch.bool, device=first.device)
    for values in samples.values():
        whole = whole & ~values.isnan().reshape(len(values), -1).any(1)
    return whole, [wide(only(values, whole)) for values in samples.values()]


def sid_generator(x: Tensor, real: Tensor, fake: Tensor, *, alpha: float = 1.0) -> Tensor:
    r"""SiD: the generator's loss, score identity distillation. The total.

    :math:`\frac1B \sum (r - f) \cdot ((r - x) - \alpha (r - f)) / w`, with w each sample's mean
    :math:`|x - r|`, at least 1e-5 and held constant. With alpha 1 this is
    :math:`(r - f)(f - x) / w`.

    Gradients flow through ``real`` and ``fake``: do not compute them under ``torch.no_grad()`` or
    detach them. Freeze the networks' parameters instead.

    Args:
        x: ``[B, ...]``, the generator's samples.
        real: the same shape: x, noised and denoised by the teacher.
        fake: the same shape: the same noised x, denoised by the network that learns the
            generator's distribution.
        alpha: the authors' code has a case of its own for 1. The default is ours
            (recalled, not verified): 1 in SiD-LSG, 1.2 in SiD.

    Returns:
        a scalar, float32 (float64 if an argument is). Samples with a NaN in any argument add
        nothing; B counts them.

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: SiD (arXiv 2404.04057), few steps (2505.12674); code mingyuanzhou/SiD-LSG.

    >>> import torch, fastkd
    >>> x = torch.zeros(1, 2)
    >>> fastkd.recipes.sid_generator(x, x + 1, x + 3).item()  # 2 x (1 - 3) x 3 / 1
    -12.0
    """
    if not is_number(alpha):
        raise TypeError(f"sid_generator: alpha must be a number, got {type(alpha).__name__}")
    _, (x, real, fake) = _samples("sid_generator", x=x, real=real, fake=fake)
    size = (x - real).detach().abs().reshape(len(x), -1).mean(1).clamp(min=1e-5)
    gap = real - fake
    losses = gap * ((real - x) - alpha * gap)
    return (losses.reshape(len(x), -1).sum(1) / size).sum() / max(len(x), 1)


def sid_score(prediction: Tensor, target: Tensor, *, snr: Tensor | None = None) -> Tensor:
    r"""SiD: the loss of the network that learns the generator's distribution.

    :math:`\frac1B \sum (\hat\epsilon - \epsilon)^2`, the noise it predicts for the generator's
    noised samples and that noise. For networks that predict the velocity, the target is the
    velocity and each sample's term is multiplied by :math:`\mathrm{snr} / (\mathrm{snr} + 1)`.

    Args:
        prediction: ``[B, ...]``.
        target: the same shape.
        snr: ``[B]``, signal-to-noise ratio at each sample's time, or None.

    Returns:
        a scalar, float32 (float64 if an argument is). Samples with a NaN add nothing; B counts
        them.

    Raises:
        ValueError, TypeError: an argument has the wrong shape or type.

    Source: SiD (arXiv 2404.04057, 2505.12674); code mingyuanzhou/SiD-LSG.

    >>> import torch, fastkd
    >>> fastkd.recipes.sid_score(torch.zeros(2, 3), torch.ones(2, 3)).item()
    3.0
    """
    whole, (found, right) = _samples("sid_score", prediction=prediction, target=target)
    losses = (found - right).square().reshape(len(found), -1).sum(1)
    if snr is not None:
        check_row_values("sid_score", "snr", snr, whole.shape, whole.device)
        ratio = only(snr, whole).to(losses.dtype)
        losses = losses * (ratio / (ratio + 1))
    return losses.sum() / max(len(losses), 1)


class StreamDitInputs(NamedTuple):
    """A noised video and the velocity that the network must predict there."""

    #: ``[B, F, ...]``
    inputs: Tensor
    #: ``[B, F, ...]``
    velocity: Tensor


def stream_dit_inputs(
    clean: Tensor, noise: Tensor, t: Tensor, *, sigma_min: float
) -> StreamDitInputs:
    r"""StreamDiT: frames of a buffer, each at a noise level of its own.

    :math:`X = t X_1 + (1 - (1 - s) t) X_0` and :math:`V = dX/dt = X_1 - (1 - s) X_0`, with
    :math:`X_1` the clean frames, :math:`X_0` the noise and s ``sigma_min``. In a buffer of N parts
    the levels of part i are uniform in :math:`[(i - 1) T / N, i T / N)`.

    Args:
        clean: ``[B, F, ...]``.
        noise: the same shape.
        t: ``[B, F]``, one a frame, or ``[B]``; 0 is noise, 1 is clean.
        sigma_min: in [0, 1]; the paper's value was not found.

    Returns:
        :class:`StreamDitInputs`, in the precision of the arguments.

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: StreamDiT (arXiv 2507.03745), from a detailed review; no code was found.

    >>> import torch, fastkd
    >>> clean, noise, t = torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([[0.25, 1.0]])
    >>> fastkd.recipes.stream_dit_inputs(clean, noise, t, sigma_min=0.0).inputs.tolist()
    [[0.25, 1.0]]
    """
    name = "stream_dit_inputs"
    check_like(name, "noise", noise, "clean", clean)
    check_floats(name, clean=clean, t=t)
    check_share(name, "sigma_min", sigma_min)
    if not 1 <= t.dim() <= clean.dim() or t.shape != clean.shape[: t.dim()]:
        raise ValueError(
            f"{name}: t must be one a video or frame of clean {list(clean.shape)}, got "
            f"{list(t.shape)}"
        )
    t = t.reshape(*t.shape, *[1] * (clean.dim() - t.dim()))
    kept = 1 - sigma_min
    return StreamDitInputs(t * clean + (1 - kept * t) * noise, clean - kept * noise)


def stream_dit(
    prediction: Tensor,
    velocity: Tensor,
    *,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""StreamDiT: flow matching, and with it the distillation of steps.

    The mean over frames of :math:`w \cdot \mathrm{mean}((u - V)^2)`.

    The distillation of steps is the same call: ``velocity`` is then what the teacher reaches inside
    a segment in several steps with guidance, and ``prediction`` what the student reaches in one
    step without. The paper goes from 128 guided steps to 8.

    Args:
        prediction: ``[B, F, ...]``.
        velocity: the same shape.
        weight: float ``[B, F]`` or ``[B]``, gets no gradient. Divide it by its mean for a weighted
            mean.
        mask: bool, as weight: frames that count.

    Returns:
        a scalar, float32 (float64 if an argument is).

    Raises:
        ValueError, TypeError: an argument has the wrong shape or type.

    Source: StreamDiT (arXiv 2507.03745), from a detailed review; no code was found.

    >>> import torch, fastkd
    >>> fastkd.recipes.stream_dit(torch.zeros(1, 2, 3), torch.full((1, 2, 3), 2.0)).item()
    4.0
    """
    check_like("stream_dit", "velocity", velocity, "prediction", prediction)
    dims = max([1, *(x.dim() for x in (mask, weight) if isinstance(x, Tensor))])
    rows = prediction.shape[: min(dims, prediction.dim())]
    if mask is not None:
        check_mask("stream_dit", "mask", mask, rows, prediction.device)
    if weight is not None:
        check_row_values("stream_dit", "weight", weight, rows, prediction.device)
        check_no_gradient("stream_dit", weight=weight)
    student, teacher = wide(only(prediction, mask)), wide(only(velocity, mask))
    squares = (student - teacher).square()
    losses = squares.flatten(len(rows)).mean(-1) if squares.dim() > len(rows) else squares
    if weight is not None:
        losses = losses * only(weight, mask).to(losses.dtype)
    return mean_of_rows("stream_dit", losses, mask)
