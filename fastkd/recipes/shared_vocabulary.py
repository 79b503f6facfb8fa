"""Across tokenizers: the tokens that both vocabularies have."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._ops.arguments import check_has_value, check_no_gradient, to_integer
from fastkd._ops.checks import check_positive, check_tensors
from fastkd._ops.names import Divergence, TextReduction
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.recipes._chunks import (
    check_batch,
    check_integers,
    check_mask,
    check_range,
    check_vocabs,
    chunk_ends,
    chunk_slots,
    log_softmax,
    reduced,
    single_token_rows,
    wide,
)
from fastkd.recipes._rows import check_choice, check_share, label_log_probs, number_type
from fastkd.recipes._rowwise import at_rows, by_blocks, chosen, placed
from fastkd.tokenizers._byte_vocab import ByteVocab

#: Log-probabilities are not taken below this: 0 log 0 is then 0, and its gradient finite.
LEAST_LOG = -80.0


def shared_tokens(student_vocab: ByteVocab, teacher_vocab: ByteVocab) -> Tensor:
    """The teacher's id of the same bytes for each student id, int64 ``[vocab_S]``, or -1.

    Of ids with the same bytes in one vocabulary the first is used, so that no two student ids have
    one teacher id. For :func:`strict_topk` and :func:`gold`.

    >>> import fastkd
    >>> student = fastkd.ByteVocab([b"a", b"ab", None, b"a"])
    >>> fastkd.recipes.shared_tokens(student, fastkd.ByteVocab([b"b", b"ab", b"a"])).tolist()
    [2, 1, -1, -1]
    """
    check_vocabs("shared_tokens", student_vocab, teacher_vocab)
    ids: dict[bytes, int] = {}
    for i, token in enumerate(teacher_vocab.tokens):
        if token:
            ids.setdefault(token, i)
    return torch.tensor(
        [ids.pop(token, -1) if token else -1 for token in student_vocab.tokens], dtype=torch.int64
    )


def strict_topk(
    student_logits: Tensor,
    student_chunks: Tensor,
    teacher_logits: Tensor,
    teacher_chunks: Tensor,
    num_chunks: int,
    shared: Tensor,
    *,
    k: int = 16,
    divergence: Divergence = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""The student's likeliest shared tokens, where both have one token (strict top-k). A term.

    Row t scores token t + 1. It counts where that token is the only one of its chunk on both sides;
    its teacher row scores the teacher's token. Both distributions are restricted to the k shared
    tokens that the student finds likeliest, and made to sum to 1. Teacher rows are gathered in
    blocks; of all rows only the student's gradient is stored.

    Args:
        student_logits: ``[B, T_S, vocab_S]``, all rows of whole texts.
        student_chunks: ``[B, T_S]``, from :func:`fastkd.align_batch`; -1 for none.
        teacher_logits: ``[B, T_T, vocab_T]``, all rows; gets no gradient.
        teacher_chunks: ``[B, T_T]``.
        num_chunks: the largest number of chunks of a text.
        shared: int64 or int32, a teacher id or -1 for each student id, from :func:`shared_tokens`.
        k: tokens of the student.
        divergence, beta, temperature: see :func:`fastkd.softmax_divergence`.
        mask: bool ``[B, T_S]``, False for tokens that are not to be learned.
        reduction: over the tokens that count: ``"none"`` (``[B, T_S]``, of row t at token t + 1),
            ``"sum"``, ``"mean"``, ``"batchmean"`` or ``"sequence_mean"`` (over a text's tokens,
            then over texts).
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type.

    Source: arXiv 2610.08448, by accounts of it.

    >>> import torch, fastkd
    >>> student, teacher = torch.zeros(1, 2, 3), torch.tensor([[[0.0, 2.0], [0.0, 0.0]]])
    >>> chunks, shared = torch.tensor([[0, 1]]), torch.tensor([1, 0, -1])
    >>> loss = fastkd.recipes.strict_topk(student, chunks, teacher, chunks, 2, shared)
    >>> round(loss.item(), 4)  # of softmax(0, 0) from softmax(2, 0)
    0.4338
    """
    known, columns = _checked("strict_topk", student_logits, teacher_logits, shared)
    check_mask("strict_topk", "mask", mask, student_logits.shape[:-1], student_logits.device)
    k = to_integer("strict_topk", "k", k)
    if k < 1:
        raise ValueError(f"strict_topk: k must be positive, got {k}")
    sides = (student_logits, student_chunks, teacher_logits, teacher_chunks)
    matched, taught_by = single_token_rows("strict_topk", *sides, num_chunks)
    texts = torch.arange(matched.size(0), device=matched.device).unsqueeze(-1)
    tokens = torch.arange(matched.size(1), device=matched.device).expand_as(matched)
    kept = matched & (tokens > 0)
    kept = kept if mask is None else kept & mask
    rows = chosen(texts * student_logits.size(1) + tokens - 1, kept)
    teacher_rows = chosen(texts * teacher_logits.size(1) + taught_by, kept)
    student, teacher = (x.flatten(0, 1) for x in (student_logits, teacher_logits))
    k = min(k, student.size(-1))

    def loss(block: slice, logits: Tensor) -> Tensor:
        best, at = logits.masked_fill(~known, -math.inf).topk(k, -1)
        other = at_rows(teacher, teacher_rows[block], kept).gather(1, columns[at])
        return softmax_divergence(
            best,
            other.masked_fill(best == -math.inf, -math.inf),
            divergence=divergence,
            beta=beta,
            temperature=temperature,
            reduction="none",
        )

    values = by_blocks(loss, [student], [rows], kept, max(student.size(-1), teacher.size(-1)))
    return reduced("strict_topk", placed(values, kept), kept, reduction, normalizer)


def gold(
    student_logits: Tensor,
    student_ids: Tensor,
    student_chunks: Tensor,
    teacher_logits: Tensor,
    teacher_ids: Tensor,
    teacher_chunks: Tensor,
    num_chunks: int,
    shared: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 0.9,
    merge: str = "observed",
    matched_weight: float | None = None,
    mask: Tensor | None = None,
    reduction: TextReduction = "sequence_mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Shared tokens by divergence, others by sorted probabilities, chunk by chunk (GOLD). A term.

    A chunk's distribution is that of its first row, times the probabilities that the model gives
    the chunk's later tokens (``"observed"``); or that of its last row, times those of the earlier
    tokens (``"bayesian"``). It sums to less than 1. With p the teacher's and q the student's, a
    chunk's loss is

    .. math:: w \sum_{shared} \left(\beta p \log \frac pm + (1-\beta) q \log \frac qm\right)
              + (1 - w) \sum_i |q_{(i)} - p_{(i)}|, \qquad m = \beta p + (1-\beta) q

    with the other tokens' probabilities sorted descending. The first sum can be negative where a
    chunk has several tokens. w is the number of shared tokens over the teacher's columns.

    Row t scores token t + 1. Chunks with the first token of a text do not count. Rows are read in
    blocks; of all rows only the student's gradient is stored.

    Args:
        student_logits: ``[B, T_S, vocab_S]``, all rows of whole texts.
        student_ids: int64 or int32 ``[B, T_S]``.
        student_chunks: ``[B, T_S]``, from :func:`fastkd.align_batch`; -1 for none.
        teacher_logits: ``[B, T_T, vocab_T]``; gets no gradient.
        teacher_ids: ``[B, T_T]``.
        teacher_chunks: ``[B, T_T]``.
        num_chunks: the largest number of chunks of a text.
        shared: int64 or int32, a teacher id or -1 for each student id, from :func:`shared_tokens`.
        beta: share of the teacher in m; 0 and 1 stand for :math:`p \log (p / q)` and the reverse.
        temperature: of both sides.
        merge: see above.
        matched_weight: w in [0, 1]; None: as above.
        mask: bool ``[B, num_chunks]``, False for chunks that are not to be learned.
        reduction: over the chunks that count: ``"none"`` (``[B, num_chunks]``), ``"sum"``,
            ``"mean"``, ``"batchmean"`` or ``"sequence_mean"`` (over a text's chunks, then over
            texts).
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type.

    Source: TRL's GOLD trainer, which builds on ULD (arXiv 2402.12030). The trainer takes no
    probability of a later token below 1e-8.

    >>> import torch, fastkd
    >>> student, teacher = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    >>> ids, chunks = torch.tensor([[0, 1]]), torch.tensor([[0, 1]])
    >>> shared = torch.tensor([0, 1, -1])
    >>> places = (student, ids, chunks, teacher, ids, chunks, 2)
    >>> abs(fastkd.recipes.gold(*places, shared).item()) < 1e-6
    True
    """
    known, columns = _checked("gold", student_logits, teacher_logits, shared)
    check_choice("gold", "merge", merge, ("observed", "bayesian"))
    check_positive("gold", "temperature", temperature)
    check_share("gold", "beta", beta)
    width = teacher_logits.size(-1)
    share: Any = known.sum().double() / max(1, width)
    if matched_weight is not None:
        check_share("gold", "matched_weight", matched_weight)
        share = matched_weight
    firsts, later, usable = [], [], []
    for side, logits, ids, chunks in (
        ("student", student_logits, student_ids, student_chunks),
        ("teacher", teacher_logits, teacher_ids, teacher_chunks),
    ):
        check_integers("gold", f"{side}_ids", ids, logits.shape[:-1], logits.device)
        last, count = chunk_ends("gold", f"{side}_chunks", logits, chunks, num_chunks)
        scored = label_log_probs(
            logits[:, :-1], ids[:, 1:], mask=chunks[:, 1:] >= 0, temperature=temperature
        )
        scored = F.pad(scored, (1, 0))
        total = scored.new_zeros(scored.size(0), last.size(1) + 1)
        total = total.scatter_add(1, chunk_slots(chunks, last.size(1)), scored)[:, :-1]
        first = last - count + 1
        token = (first if merge == "observed" else last).clamp(min=0)
        usable.append((count > 0) & (first > 0))
        firsts.append(token - 1)
        later.append((total - scored.gather(1, token)).reshape(-1, 1))
    kept = usable[0] & usable[1]
    check_mask("gold", "mask", mask, kept.shape, kept.device)
    kept = kept if mask is None else kept & mask
    texts = torch.arange(kept.size(0), device=kept.device).unsqueeze(-1)
    rows, teacher_rows = (
        chosen(texts * logits.size(1) + place, kept)
        for logits, place in zip((student_logits, teacher_logits), firsts, strict=True)
    )
    places = chosen(torch.arange(kept.numel(), device=kept.device).view(kept.shape), kept)
    student, teacher = (x.flatten(0, 1) for x in (student_logits, teacher_logits))
    taken = torch.zeros(width + 1, dtype=torch.bool, device=kept.device)
    taken = taken.index_fill(0, torch.where(known, columns, width), True)[:-1]

    def loss(block: slice, logits: Tensor, of_later: Tensor) -> Tensor:
        other = at_rows(teacher, teacher_rows[block], kept)
        scale = at_rows(later[1], places[block], kept)
        log_q, log_p = (
            (log_softmax(wide(z) / temperature) + s).clamp(min=LEAST_LOG)
            for z, s in ((logits, of_later), (other, scale))
        )
        matched = torch.where(known, terms(log_p[:, columns], log_q, beta), 0).sum(-1)
        q, p = (
            x.exp().masked_fill(done, 0).sort(-1, descending=True).values
            for x, done in ((log_q, known), (log_p, taken))
        )
        both = min(q.size(-1), p.size(-1))
        apart = (q[:, :both] - p[:, :both]).abs().sum(-1)
        apart = apart + q[:, both:].sum(-1) + p[:, both:].sum(-1)
        return share * matched + (1 - share) * apart

    inputs, at = [student, later[0]], [rows, places]
    values = by_blocks(loss, inputs, at, kept, max(student.size(-1), width))
    dtype = torch.promote_types(number_type(student), number_type(teacher))
    return reduced("gold", placed(values, kept).to(dtype), kept, reduction, normalizer)


def terms(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """The terms of the divergence, whose sums need not be 1."""
    if beta == 0:
        return log_p.exp() * (log_p - log_q)
    if beta == 1:
        return log_q.exp() * (log_q - log_p)
    # Products, as logarithms of the number would make it a constant of a compiled graph.
    one = torch.ones((), dtype=log_p.dtype, device=log_p.device)
    log_m = torch.logaddexp(log_p + (one * beta).log(), log_q + (one * (1 - beta)).log())
    return beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)


def _checked(
    function: str, student_logits: Tensor, teacher_logits: Tensor, shared: Tensor
) -> tuple[Tensor, Tensor]:
    """Which student columns are shared, and the teacher's column of each, 0 for the others."""
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_tensors(function, tensors)
    check_tensors(function, {"shared": shared})
    for name, logits in tensors.items():
        check_batch(function, name, logits, student_logits)
    check_no_gradient(function, teacher_logits=teacher_logits)
    width = student_logits.size(-1)
    if shared.dim() != 1 or shared.size(0) > width:
        raise ValueError(
            f"{function}: shared must be [at most {width}], got shape {list(shared.shape)}"
        )
    check_integers(function, "shared", shared, shared.shape)
    if not student_logits.is_meta:
        check_has_value(function, "shared", shared)
    check_range(function, "shared", shared, -1, teacher_logits.size(-1))
    columns = F.pad(shared.to(student_logits.device), (0, width - shared.numel()), value=-1)
    known = columns >= 0
    return known, torch.where(known, columns, 0).long()
