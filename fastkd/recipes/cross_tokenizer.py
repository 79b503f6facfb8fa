"""Methods for a teacher whose tokenizer is not the student's."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd._ops import hints
from fastkd._ops.arguments import check_no_gradient, to_flag
from fastkd._ops.checks import check_finite, check_positive, check_tensors
from fastkd._ops.names import AlmDivergence, Reduction, TextReduction
from fastkd._ops.shift import following
from fastkd.recipes._chunks import (
    attention_mask,
    boundaries,
    boundary_of,
    check_batch,
    check_callable,
    check_integers,
    check_mask,
    check_number,
    check_range,
    chunk_ends,
    chunk_slots,
    readable,
    reduced,
    softmax,
    unscored_chunks,
    wide,
)
from fastkd.recipes._rowwise import at_rows, by_blocks, chosen, placed
from fastkd.tokenizers._alignment import Alignment
from fastkd.tokenizers._alm_loss import alm_loss
from fastkd.tokenizers._byte_vocab import ByteVocab

_NORMS = ("l2_channelwise", "l2", "l1_channelwise", "l1")


def alm(
    student_logits: Tensor,
    student_ids: Tensor,
    student_chunks: Tensor | Alignment,
    teacher_logits: Tensor,
    teacher_ids: Tensor,
    teacher_chunks: Tensor | None = None,
    num_chunks: int | None = None,
    student_vocab: ByteVocab | None = None,
    teacher_vocab: ByteVocab | None = None,
    *,
    student_mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    divergence: AlmDivergence = "binary_ce",
    temperature: float = 100.0,
    epsilon: float = 1e-6,
    merge_threshold: float | None = 0.1,
    debias: bool = True,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Approximate likelihood matching of two causal models' outputs, with the published defaults.

    This is :func:`fastkd.alm_loss` for the chunks of :func:`fastkd.align_batch`, or for a batch of
    :class:`fastkd.tokenizers.AlmCollator`. Row t of the
    logits scores token t + 1; nothing is copied for the shift. A token begins a word if its bytes
    start with a space, tab or newline, or if it has none (:meth:`fastkd.ByteVocab.boundary`). The
    row of a text's last token has the probability that a word begins after it, so that the last
    chunk is debiased like the others.

    No row scores the first token of a text. A chunk that contains it on either side is left out on
    both, as its other tokens cover different bytes in the two models, whose likelihoods cannot be
    compared. (The paper's code leaves out only that token.) Where both texts begin with a token
    without bytes, no chunk is left out.

    Args:
        student_logits: ``[B, T_S, vocab_S]``, all rows; at least as many columns as the vocabulary
            has ids. Additional columns are not in the boundary set.
        student_ids: ``[B, T_S]``, the input tokens. Those in chunks must be ids of the vocabulary
            (checked on the CPU, outside of compiled graphs).
        student_chunks: int32 or int64 ``[B, T_S]``, -1 for none. Or the whole
            :class:`fastkd.Alignment`, without the arguments of the next two.
        teacher_logits: ``[B, T_T, vocab_T]``.
        teacher_ids: ``[B, T_T]``.
        teacher_chunks: ``[B, T_T]``.
        num_chunks: the largest number of chunks of a text.
        student_vocab: for its boundary set.
        teacher_vocab: for its boundary set, which is also used for merging.
        student_mask: ``[B, T_S]``, bool or integers as a model's ``attention_mask`` has them, False
            or 0 for padding. A chunk with such a token on either side is left out on both, and so
            is one with the first token after it, which no row scores. Needed where texts are padded
            on the left, or several texts are in a row with padding between them.
        teacher_mask: ``[B, T_T]``.
        divergence: see :func:`fastkd.alm_loss`, as for the others.
        temperature: divides the log-likelihoods of chunks, not the logits.
        epsilon: keeps likelihoods below 1.
        merge_threshold: joins chunks that the teacher continues.
        debias: adds the probability that a word begins after the chunk. Where no token of a
            vocabulary begins one, no chunk has a gradient, and a warning says so.
        reduction: over the chunks that are left.
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type.

    Source: Minixhofer et al. 2025 (arXiv 2503.20083) and its code.

    >>> import torch, fastkd
    >>> vocab = fastkd.ByteVocab([b"a", b" b", b"c", None])
    >>> student, ids = torch.zeros(1, 3, 4, requires_grad=True), torch.tensor([[3, 0, 1]])
    >>> chunks = fastkd.align_batch(ids, ids, vocab, vocab)
    >>> sides = (student, ids, chunks[0], 2 * student.detach(), ids, chunks[1], chunks[2])
    >>> loss = fastkd.recipes.alm(*sides, vocab, vocab, divergence="k2")
    >>> loss.item()
    0.0
    >>> vocabs = {"student_vocab": vocab, "teacher_vocab": vocab}
    >>> loss = fastkd.recipes.alm(student, ids, chunks, student.detach(), ids, **vocabs)
    >>> loss.requires_grad
    True
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_tensors("alm", tensors)
    for name, logits in tensors.items():
        check_batch("alm", name, logits, student_logits)
    alignment = _aligned(student_chunks, teacher_chunks, num_chunks)
    vocabs: tuple[Any, Any] = (student_vocab, teacher_vocab)
    num_chunks = check_number("alm", alignment[2])
    student_mask = attention_mask("alm", "student_mask", student_mask)
    teacher_mask = attention_mask("alm", "teacher_mask", teacher_mask)
    found, places = [], []
    for name, logits, ids, chunks, mask, vocab in (
        ("student", student_logits, student_ids, alignment[0], student_mask, vocabs[0]),
        ("teacher", teacher_logits, teacher_ids, alignment[1], teacher_mask, vocabs[1]),
    ):
        if isinstance(chunks, np.ndarray):
            chunks = torch.as_tensor(chunks, device=logits.device)
        check_integers("alm", f"{name}_ids", ids, logits.shape[:-1], logits.device)
        check_integers("alm", f"{name}_chunks", chunks, logits.shape[:-1], logits.device)
        check_mask("alm", f"{name}_mask", mask, logits.shape[:-1], logits.device)
        if not isinstance(vocab, ByteVocab):
            raise TypeError(
                f"alm: {name}_vocab must be a fastkd.ByteVocab, got {type(vocab).__name__}"
            )
        if vocab._size > logits.size(-1):
            raise ValueError(
                f"alm: {name}_vocab must be the vocabulary of {name}_logits, which have "
                f"{logits.size(-1)} columns, got one of {vocab._size} ids"
            )
        if readable(ids):
            check_range("alm", f"{name}_ids in chunks", ids[chunks >= 0], 0, vocab._size)
        found.append(chunks)
        places.append(chunk_slots(chunks, num_chunks))
    lost = unscored_chunks(student_mask, places[0], num_chunks)
    lost |= unscored_chunks(teacher_mask, places[1], num_chunks)
    student, teacher = (
        (logits, following(ids, 0), following(torch.where(lost.gather(1, at), -1, chunks), -1))
        for logits, ids, chunks, at in (
            (student_logits, student_ids, found[0], places[0]),
            (teacher_logits, teacher_ids, found[1], places[1]),
        )
    )
    debias = to_flag("alm", "debias", debias)
    compiling = torch.compiler.is_compiling()
    if debias and not compiling:
        sets = {"student_vocab": vocabs[0], "teacher_vocab": vocabs[1]}
        hints.check_boundaries("alm", {name: boundary_of(x) for name, x in sets.items()})
    student_boundary, teacher_boundary = boundaries(
        vocabs[0], student_logits, vocabs[1], teacher_logits
    )
    with nullcontext() if compiling else hints.silent():  # its boundaries are checked
        return alm_loss(
            *student,
            *teacher,
            num_chunks,
            student_boundary=student_boundary,
            teacher_boundary=teacher_boundary,
            divergence=divergence,
            temperature=temperature,
            epsilon=epsilon,
            debias=debias,
            merge_threshold=merge_threshold,
            reduction=reduction,
            normalizer=normalizer,
        )


def _aligned(student_chunks: Any, teacher_chunks: Any, num_chunks: Any) -> tuple[Any, Any, Any]:
    """Chunks of both sides and their number, out of an alignment where one is given."""
    if not isinstance(student_chunks, Alignment):
        return student_chunks, teacher_chunks, num_chunks
    if teacher_chunks is not None or num_chunks is not None:
        raise ValueError(
            "alm: teacher_chunks and num_chunks must be None besides an Alignment, which has them"
        )
    return student_chunks.student_chunks, student_chunks.teacher_chunks, student_chunks.num_chunks


def alm_latents(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_chunks: Tensor,
    teacher_chunks: Tensor,
    num_chunks: int,
    *,
    norm: str = "l2_channelwise",
    projection: Callable[[Tensor], Tensor] | None = None,
    epsilon: float = 1e-8,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Relative distance of two models' hidden states at the last token of each chunk.

    With :math:`s_c` and :math:`t_c` the two rows of chunk c, D channels and n chunks that have
    tokens on both sides, a chunk's loss is :math:`\frac1D \sum_d |s_{cd} - t_{cd}|^k /
    (v_d + \epsilon)` with :math:`v_d = \frac1n \sum_c |t_{cd}|^k`:

    ==================  =========================================================
    ``l2_channelwise``  k = 2
    ``l1_channelwise``  k = 1
    ``l2``, ``l1``      the same with one v for all channels, the mean of the above
    ==================  =========================================================

    Rows in no chunk are ignored. All inputs that require a gradient get one. For several layers,
    add up their losses.

    Args:
        student_hidden: ``[B, T_S, D_S]``.
        teacher_hidden: ``[B, T_T, D]``.
        student_chunks: ``[B, T_S]``, from :func:`fastkd.align_batch`; -1 for none.
        teacher_chunks: ``[B, T_T]``.
        num_chunks: the largest number of chunks of a text.
        norm: one of the table.
        projection: maps the student's rows ``[B, num_chunks, D_S]`` to D channels, for example an
            ``nn.Linear``; needed where the widths differ.
        epsilon: see above.
        reduction: over chunks that have tokens on both sides: ``"mean"``, ``"sum"``,
            ``"batchmean"`` (over B), ``"elementmean"`` (over B x num_chunks), ``"sequence_mean"``
            (over a text's chunks, then over texts), or ``"none"``: ``[B, num_chunks]``, 0 where
            there is no chunk.
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type.

    Source: Minixhofer et al. 2025 (arXiv 2503.20083) and its code.

    >>> import torch, fastkd
    >>> student, teacher = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[2.0]]])
    >>> both, one = torch.tensor([[0, 0]]), torch.tensor([[0]])
    >>> fastkd.recipes.alm_latents(student, teacher, both, one, 1).item()  # (3 - 2)^2 / 2^2
    0.25
    """
    if norm not in _NORMS:
        raise ValueError(f"alm_latents: norm must be one of {', '.join(_NORMS)}; got {norm!r}")
    check_callable("alm_latents", "projection", projection)
    check_finite("alm_latents", "epsilon", epsilon)
    check_no_gradient("alm_latents", normalizer=normalizer)
    check_tensors(
        "alm_latents", {"student_hidden": student_hidden, "teacher_hidden": teacher_hidden}
    )
    rows, ends = [], []
    for name, hidden, chunks in (
        ("student", student_hidden, student_chunks),
        ("teacher", teacher_hidden, teacher_chunks),
    ):
        check_batch("alm_latents", f"{name}_hidden", hidden, student_hidden)
        ends.append(chunk_ends("alm_latents", f"{name}_chunks", hidden, chunks, num_chunks)[0])
    kept = ((ends[0] >= 0) & (ends[1] >= 0)).unsqueeze(-1)
    for hidden, last in zip((student_hidden, teacher_hidden), ends, strict=True):
        texts = torch.arange(hidden.size(0), device=hidden.device).unsqueeze(-1)
        rows.append(torch.where(kept, hidden[texts, last.clamp(min=0)], 0))
    student, teacher = rows[0] if projection is None else projection(rows[0]), wide(rows[1])
    if student.shape != teacher.shape:
        raise ValueError(
            f"alm_latents: student_hidden must have teacher_hidden's {teacher.size(-1)} channels, "
            f"or a projection that gives them, got {student.size(-1)}"
        )
    size = torch.square if norm.startswith("l2") else torch.abs
    chunks = kept.sum().clamp(min=1)
    scale = size(teacher).sum((0, 1)) / chunks
    if not norm.endswith("channelwise"):
        scale = scale.mean()
    distance = size(torch.where(kept, wide(student) - teacher, 0))
    loss = (distance / (scale + epsilon)).mean(-1)
    return reduced("alm_latents", loss, kept, reduction, normalizer)


def uld(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    student_chunks: Tensor | None = None,
    teacher_chunks: Tensor | None = None,
    num_chunks: int | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Universal logit distillation: distance between two vocabularies' sorted probabilities.

    With q and p the softmaxes of a pair of rows, sorted descending and padded with zeros to the
    wider vocabulary, a row's loss is :math:`\sum_i |q_{(i)} - p_{(i)}|`. It depends only on the
    probabilities of the first, second, ... token, not on which tokens these are.

    Rows are paired by position. With chunks, the rows of the last tokens of each chunk are paired,
    where both models have read the same bytes. Rows are sorted in blocks; of all rows only the
    student's gradient is stored.

    Args:
        student_logits: ``[..., vocab_S]``; with chunks ``[B, T_S, vocab_S]``.
        teacher_logits: ``[..., vocab_T]``, gets no gradient; with chunks ``[B, T_T, vocab_T]``.
        student_chunks: ``[B, T_S]``, from :func:`fastkd.align_batch`. Pass this, teacher_chunks and
            num_chunks, or none of them.
        teacher_chunks: ``[B, T_T]``.
        num_chunks: the largest number of chunks of a text.
        mask: bool, the shape of the loss of rows: False leaves a row out.
        temperature: of the student, positive.
        teacher_temperature: None: the same.
        reduction: over the rows that are left: ``"mean"``, ``"sum"``, ``"batchmean"``,
            ``"elementmean"``, ``"sequence_mean"`` (over a text's rows, then over texts), or
            ``"none"``: the leading dimensions, with chunks ``[B, num_chunks]``, 0 where a row is
            left out.
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type.

    Source: Boizard et al. 2024 (arXiv 2402.12030) and its code (Nicolas-BZRD/llm-recipes), which
    adds 1.5 times this with ``reduction="sequence_mean"`` to the cross-entropy, at temperature 1.
    The code pairs rows by position from the beginning of the answer, truncated to the shorter one,
    without the student's end of text: pass slices or a mask for that.

    >>> import torch, fastkd
    >>> student, teacher = torch.tensor([[0.0, 9.0]]), torch.tensor([[9.0, 0.0, -50.0]])
    >>> round(fastkd.recipes.uld(student, teacher).item(), 6)
    0.0
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_tensors("uld", tensors)
    check_no_gradient(
        "uld",
        teacher_logits=teacher_logits,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        normalizer=normalizer,
    )
    tau, tau_teacher = temperature, teacher_temperature
    if tau_teacher is None:
        tau_teacher = tau
    check_positive("uld", "temperature", tau)
    check_positive("uld", "teacher_temperature", tau_teacher)
    given = [x is not None for x in (student_chunks, teacher_chunks, num_chunks)]
    for name, logits in tensors.items():
        if not logits.dim():
            raise ValueError(f"uld: {name} must be [..., vocab], got a 0-d tensor")
    student, teacher = (x.reshape(-1, x.size(-1)) for x in (student_logits, teacher_logits))
    if student_chunks is not None and teacher_chunks is not None and num_chunks is not None:
        for name, logits in tensors.items():
            check_batch("uld", name, logits, student_logits)
        last, _ = chunk_ends("uld", "student_chunks", student_logits, student_chunks, num_chunks)
        other, _ = chunk_ends("uld", "teacher_chunks", teacher_logits, teacher_chunks, num_chunks)
        kept = (last >= 0) & (other >= 0)
        check_mask("uld", "mask", mask, kept.shape, kept.device)
        kept = kept if mask is None else kept & mask
        rows, teacher_rows = (
            chosen(x + logits.size(1) * torch.arange(len(x), device=x.device).unsqueeze(-1), kept)
            for x, logits in ((last, student_logits), (other, teacher_logits))
        )
    elif any(given):
        raise ValueError(
            "uld: student_chunks, teacher_chunks and num_chunks must be given together, got "
            f"{sum(given)} of them"
        )
    else:
        if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
            raise ValueError(
                "uld: teacher_logits must have student_logits' leading dimensions "
                f"{list(student_logits.shape[:-1])}, got {list(teacher_logits.shape[:-1])}; pass "
                "chunks to pair rows by them"
            )
        check_mask("uld", "mask", mask, student_logits.shape[:-1], student_logits.device)
        kept = student_logits.new_ones(student_logits.shape[:-1], dtype=torch.bool)
        kept = kept if mask is None else mask
        places = torch.arange(kept.numel(), device=kept.device).view(kept.shape)
        rows = teacher_rows = chosen(places, kept)

    def loss(block: slice, logits: Tensor) -> Tensor:
        other = at_rows(teacher, teacher_rows[block], kept)
        q, p = (
            softmax(wide(x) / t).sort(-1, descending=True).values
            for x, t in ((logits, tau), (other, tau_teacher))
        )
        both = min(q.size(-1), p.size(-1))
        differences = (q[:, :both] - p[:, :both]).abs().sum(-1)
        return differences + q[:, both:].sum(-1) + p[:, both:].sum(-1)

    values = by_blocks(loss, [student], [rows], kept, max(student.size(-1), teacher.size(-1)))
    return reduced("uld", placed(values, kept), kept, reduction, normalizer)
