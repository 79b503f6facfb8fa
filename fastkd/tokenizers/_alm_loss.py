"""Approximate likelihood matching: distillation between models with different tokenizers."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd._ops import hints
from fastkd._ops.arguments import check_no_gradient, to_flag, to_integer
from fastkd._ops.checks import (
    check_normalizer,
    check_positive,
    check_tensors,
    is_number,
    is_too_large,
    reduced,
)
from fastkd._ops.linear.logits import LinearLogits
from fastkd._ops.names import AlmDivergence, Reduction
from fastkd.tokenizers._chunk_log_likelihood import ChunkLogLikelihood, chunk_log_likelihood

#: Replaces a log-likelihood of -inf: e^-10,000 is 0 in float64.
_IMPOSSIBLE = -1e4
#: Arguments of chunk_log_likelihood that have another name here, after "student_" or "teacher_".
_NAMES = {"token_ids": "ids", "chunk_ids": "chunks"}


def alm_loss(
    student_logits: Tensor | LinearLogits,
    student_ids: Tensor,
    student_chunks: Tensor,
    teacher_logits: Tensor | LinearLogits,
    teacher_ids: Tensor,
    teacher_chunks: Tensor,
    num_chunks: int,
    *,
    divergence: AlmDivergence = "binary_ce",
    temperature: float = 100.0,
    epsilon: float = 1e-6,
    student_boundary: Tensor | np.ndarray | None = None,
    teacher_boundary: Tensor | np.ndarray | None = None,
    debias: bool = True,
    merge_threshold: float | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Match the likelihoods of chunks of text that two tokenizers cover with whole tokens.

    With :math:`\ell` the log-likelihood of a chunk under a model (see
    :func:`fastkd.chunk_log_likelihood`), :math:`a = \ell_T / \tau - \epsilon` and
    :math:`b = \ell_S / \tau - \epsilon`, a chunk's loss is

    ====================  ==================================================================
    ``binary_ce``         :math:`-e^a b - (1 - e^a) \log(1 - e^b)`
    ``reverse_binary_kl`` :math:`e^b (b - a) + (1 - e^b) (\log(1 - e^b) - \log(1 - e^a))`
    ``binary_kl_limit``   the limit of :math:`\tau` times the forward binary KL for
                          :math:`\tau \to \infty`: with :math:`\ell - \epsilon` for
                          :math:`\ell`, :math:`\ell_T - \ell_S + \ell_T \log(\ell_S / \ell_T)`
    ``abs``               :math:`|a - b|`
    ``abs_exp``           :math:`|e^a - e^b|`
    ``renyi``             Rényi divergence of order 1/2 of the two binary distributions,
                          :math:`-2 \log(\sqrt{e^{a + b}} + \sqrt{(1 - e^a)(1 - e^b)})`
    ``k2``                :math:`(a - b)^2 / 2`
    ``k3``                :math:`e^{a - b} - 1 - (a - b)`
    ====================  ==================================================================

    ``debias`` adds, on both sides, the log-probability that the chunk ends in a token boundary
    (``student_boundary``, ``teacher_boundary``). Without it a model with longer tokens also pays
    for the text that its next token covers. Where a chunk ends the text, no row has that
    probability, and it is left out on both sides.

    ``merge_threshold`` joins each chunk with the one before unless the teacher's probability of a
    boundary after that one is larger than this: likelihoods add up, and the boundary is that of the
    last chunk. The student's probabilities are not used.

    Both models' logits are read once; the backward pass reads the student's again and writes its
    gradient. The arithmetic on chunks is in float64, with :math:`\log(1 - e^x)` in two branches.
    Gradients flow to the teacher where it requires them. A chunk with probability 0 on one side
    has the true value, often infinity, and gives no gradient.

    Args:
        student_logits: ``[B, T_S, vocab_S]``; row t scores ``student_ids[:, t]``: pass
            ``logits[:, :-1]`` with ``ids[:, 1:]`` and ``chunks[:, 1:]``. No row scores the first
            token of a text. Where that is in a chunk on either side (no token of the beginning
            stands before the text), set this chunk to -1 on both sides, or the rest of it, which
            has other bytes on each side, is compared. :func:`fastkd.recipes.alm` does so. Or a
            :class:`fastkd.LinearLogits`, as ``teacher_logits``.
        student_ids: ``[B, T_S]``, the student's tokens.
        student_chunks: ``[B, T_S]``, from :func:`fastkd.align_batch`; -1 for none.
        teacher_logits: ``[B, T_T, vocab_T]``.
        teacher_ids: ``[B, T_T]``.
        teacher_chunks: ``[B, T_T]``.
        num_chunks: the largest number of chunks of a text.
        divergence: one of the table.
        temperature: :math:`\tau`, of chunk likelihoods, not of logits; positive.
        epsilon: keeps likelihoods below 1.
        student_boundary: bool ``[vocab_S]``, the tokens that begin a word
            (:meth:`fastkd.ByteVocab.boundary`). Both boundaries or none, for ``debias``.
        teacher_boundary: bool ``[vocab_T]``; ``merge_threshold`` needs it.
        debias: see above; without boundary sets nothing is added. Where no token of a side begins a
            word, no chunk has a gradient, and a warning says so (on the CPU).
        merge_threshold: a probability; the paper's code has 0.1. None: no chunks are joined.
        reduction: over chunks that have tokens on both sides: ``"mean"``, ``"sum"``,
            ``"batchmean"`` (over B), ``"elementmean"`` (over B x num_chunks), or ``"none"``:
            ``[B, num_chunks]``, 0 where there is no chunk.
        normalizer: replaces the denominator; for a mean over the global batch, its number of
            chunks.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type.

    Source: Minixhofer et al. 2025 (arXiv 2503.20083) and its code (tokenkit). ``k2`` and ``k3`` are
    the estimators of a KL divergence by Schulman 2020, here of likelihoods of chunks.

    >>> import torch, fastkd
    >>> student, teacher = torch.zeros(1, 2, 4, requires_grad=True), torch.zeros(1, 1, 8)
    >>> ids, chunks = torch.tensor([[1, 2]]), torch.tensor([[0, 0]])
    >>> loss = fastkd.alm_loss(student, ids, chunks, teacher, ids[:, :1], chunks[:, :1], 1,
    ...                        divergence="k2", temperature=1.0)
    >>> round(loss.item(), 4)  # (log 1/16 - log 1/8)^2 / 2
    0.2402
    """
    check_tensors(
        "alm_loss",
        {
            "student_logits": _tensor(student_logits),
            "student_ids": student_ids,
            "student_chunks": student_chunks,
            "teacher_logits": _tensor(teacher_logits),
            "teacher_ids": teacher_ids,
            "teacher_chunks": teacher_chunks,
        },
    )
    for name, boundary in (
        ("student_boundary", student_boundary),
        ("teacher_boundary", teacher_boundary),
    ):
        if boundary is not None and not isinstance(boundary, (Tensor, np.ndarray)):
            raise TypeError(
                f"alm_loss: {name} must be a tensor or an array, got {type(boundary).__name__}"
            )
    num_chunks = to_integer("alm_loss", "num_chunks", num_chunks)
    if not isinstance(divergence, str) or divergence not in _DIVERGENCES:
        raise ValueError(
            f"alm_loss: divergence must be one of {', '.join(_DIVERGENCES)}; got {divergence!r}"
        )
    for name, value in (("temperature", temperature), ("epsilon", epsilon)):
        check_positive("alm_loss", name, value)
    if isinstance(epsilon, bool):  # tensors of numbers have no difference with one
        epsilon = float(epsilon)
    if isinstance(merge_threshold, np.ndarray) and merge_threshold.ndim == 0:
        merge_threshold = merge_threshold.item()
    debias = to_flag("alm_loss", "debias", debias)
    if (student_boundary is None) != (teacher_boundary is None) and debias:
        raise ValueError(
            "alm_loss: debias needs student_boundary and teacher_boundary, or neither, got one"
        )
    if merge_threshold is not None and teacher_boundary is None:
        raise ValueError("alm_loss: merge_threshold needs teacher_boundary, got None")
    if merge_threshold is not None and not is_number(merge_threshold):
        raise TypeError(
            f"alm_loss: merge_threshold must be a number, got {type(merge_threshold).__name__}"
        )
    check_no_gradient("alm_loss", merge_threshold=merge_threshold, normalizer=normalizer)
    # While compiling, the value is not known.
    if (
        not torch.compiler.is_compiling()
        and merge_threshold is not None
        and (is_too_large(merge_threshold) or math.isnan(merge_threshold))
    ):
        raise ValueError(f"alm_loss: merge_threshold must be a number, got {merge_threshold}")
    check_normalizer("alm_loss", normalizer)
    student = _likelihoods(
        "student", student_logits, student_ids, student_chunks, num_chunks, student_boundary
    )
    teacher = _likelihoods(
        "teacher", teacher_logits, teacher_ids, teacher_chunks, num_chunks, teacher_boundary
    )
    if student.log_likelihood.shape != teacher.log_likelihood.shape:
        raise ValueError(
            "alm_loss: teacher_logits must have student_logits' batch "
            f"{list(student_logits.shape[:-2])}, got {list(teacher_logits.shape[:-2])}"
        )
    if debias and student_boundary is not None and teacher_boundary is not None:
        sets = {"student_boundary": student_boundary, "teacher_boundary": teacher_boundary}
        hints.check_boundaries("alm_loss", sets)
    kept = (student.token_count > 0) & (teacher.token_count > 0)
    likelihoods = [x.log_likelihood.double() for x in (student, teacher)]
    last = torch.arange(num_chunks, device=kept.device).expand_as(kept)
    if merge_threshold is not None and teacher.boundary_log_prob is not None:
        ends = (teacher.boundary_log_prob.exp() > merge_threshold) & kept
        segment = ends.long().cumsum(-1) - ends.long()
        likelihoods = [_merged(torch.where(kept, x, 0), segment) for x in likelihoods]
        last = torch.zeros_like(segment).scatter_reduce(
            -1, segment, torch.where(kept, last, 0), "amax"
        )
        kept = _merged(kept.long(), segment) > 0
    if debias:
        known = _row_follows(last, student_chunks) & _row_follows(last, teacher_chunks)
        likelihoods = [
            likelihood
            if chunks.boundary_log_prob is None
            else likelihood + torch.where(known, chunks.boundary_log_prob.gather(-1, last), 0)
            for likelihood, chunks in zip(likelihoods, (student, teacher), strict=True)
        ]
    loss = _losses(divergence, likelihoods, kept, temperature, epsilon)
    double = torch.float64 in (student_logits.dtype, teacher_logits.dtype)
    dtype = torch.float64 if double else torch.float32
    return reduced("alm_loss", loss, kept, reduction, normalizer).to(dtype)


def _tensor(logits: Any) -> Any:
    """Logits, or those of a head their hidden states."""
    return logits.hidden if isinstance(logits, LinearLogits) else logits


def _likelihoods(
    side: str,
    logits: Tensor | LinearLogits,
    ids: Tensor,
    chunks: Tensor,
    num_chunks: int,
    boundary: Tensor | np.ndarray | None,
) -> ChunkLogLikelihood:
    """chunk_log_likelihood of a side; in its errors the names are those of alm_loss's arguments."""
    if torch.compiler.is_compiling():
        return chunk_log_likelihood(logits, ids, chunks, num_chunks, boundary=boundary)
    try:
        return chunk_log_likelihood(logits, ids, chunks, num_chunks, boundary=boundary)
    except (IndexError, NotImplementedError, TypeError, ValueError) as error:
        function, colon, message = str(error).partition(": ")
        if not colon or function != "chunk_log_likelihood":
            raise
        message = re.sub(
            r"\b(logits|token_ids|chunk_ids|boundary)\b",
            lambda found: f"{side}_{_NAMES.get(found[0], found[0])}",
            message,
        )
        raise type(error)(f"alm_loss: {message}") from None


def _row_follows(chunk: Tensor, chunk_ids: Tensor) -> Tensor:
    """Whether a row scores the token after these chunks: False for a chunk that ends the text."""
    if chunk_ids.size(-1) == 0:
        return torch.ones_like(chunk, dtype=torch.bool)
    return chunk != chunk_ids[..., -1:]


def _merged(values: Tensor, segment: Tensor) -> Tensor:
    """Sums by segment."""
    return torch.zeros_like(values).scatter_add(-1, segment, values)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0; each of the two branches gets only the x for which it is accurate."""
    far = x < -math.log(2)
    by_log1p = torch.log1p(-torch.where(far, x, -1.0).exp())
    return torch.where(far, by_log1p, (-torch.expm1(torch.where(far, -1.0, x))).log())


def _losses(
    divergence: AlmDivergence,
    likelihoods: list[Tensor],
    kept: Tensor,
    temperature: float,
    epsilon: float,
) -> Tensor:
    """Each chunk's loss from the student's and the teacher's log-likelihood, 0 without a chunk."""
    student, teacher = likelihoods
    scale = 1.0 if divergence == "binary_kl_limit" else temperature
    student_lost, teacher_lost = student == -math.inf, teacher == -math.inf
    function, by_student, by_teacher = _DIVERGENCES[divergence]
    infinite = by_student & student_lost & ~teacher_lost | by_teacher & teacher_lost & ~student_lost
    values, counts = [], kept & ~infinite
    for likelihood, lost in ((teacher, teacher_lost), (student, student_lost)):
        finite = torch.where(counts & ~lost, likelihood, -1.0) / scale
        values.append(finite.masked_fill(counts & lost, _IMPOSSIBLE) - epsilon)
    return torch.where(kept, torch.where(infinite, math.inf, function(*values)), 0)


def _binary_ce(a: Tensor, b: Tensor) -> Tensor:
    return -(a.exp() * b - torch.expm1(a) * _log1mexp(b))


def _reverse_binary_kl(a: Tensor, b: Tensor) -> Tensor:
    return b.exp() * (b - a) - torch.expm1(b) * (_log1mexp(b) - _log1mexp(a))


def _binary_kl_limit(a: Tensor, b: Tensor) -> Tensor:
    return a - b + a * ((-b).log() - (-a).log())


def _abs(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs()


def _abs_exp(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() - b.exp()).abs()


def _renyi(a: Tensor, b: Tensor) -> Tensor:
    affinity = torch.logaddexp((a + b) / 2, (_log1mexp(a) + _log1mexp(b)) / 2)
    return -2 * affinity.clamp(max=0)


def _k2(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square() / 2


def _k3(a: Tensor, b: Tensor) -> Tensor:
    return torch.expm1(a - b) - (a - b)


#: Function of a, b; whether it is inf where only the student's, or the teacher's, likelihood is 0.
_DIVERGENCES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool, bool]] = {
    "binary_ce": (_binary_ce, True, False),
    "reverse_binary_kl": (_reverse_binary_kl, False, True),
    "binary_kl_limit": (_binary_kl_limit, True, True),
    "abs": (_abs, True, True),
    "abs_exp": (_abs_exp, False, False),
    "renyi": (_renyi, False, False),
    "k2": (_k2, True, True),
    "k3": (_k3, True, True),
}
