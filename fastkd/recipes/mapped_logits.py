"""Teacher logits mapped to the student's vocabulary, token by token."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._ops.arguments import check_has_value, check_no_gradient
from fastkd._ops.checks import check_tensors
from fastkd._ops.names import Divergence, TextReduction
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.recipes._chunks import (
    check_batch,
    check_integers,
    check_mask,
    check_range,
    reduced,
    single_token_rows,
)
from fastkd.recipes._rowwise import at_rows, by_blocks, chosen, placed


def mined(
    student_logits: Tensor,
    student_ids: Tensor,
    student_chunks: Tensor,
    teacher_logits: Tensor,
    teacher_chunks: Tensor,
    num_chunks: int,
    vocab_map: Tensor,
    *,
    mask: Tensor | None = None,
    unmatched: str = "label",
    match: str = "scored",
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Divergence from teacher logits mapped to the student's vocabulary by edit distance.

    Row t of the student scores token t + 1. It has a teacher row if one of the tokens t and t + 1
    is the only token of its chunk on both sides. With u the teacher's token of that chunk,
    ``match`` says which token that is:

    ============  ===================================================================
    ``"scored"``  token t + 1, with the row u - 1 of the teacher, which scores the
                  same text; needs u > 0
    ``"read"``    token t, with the row u of the teacher, which has read the same
                  text and may score a longer or a shorter token
    ============  ===================================================================

    The row's target has for the student's token v the teacher's logit of ``vocab_map[v]``
    (:math:`-\infty` where that is -1). Rows without a teacher row have the one-hot distribution of
    token t + 1, or none. The loss of a row is :func:`fastkd.softmax_divergence` of the two.

    Teacher rows are gathered in blocks; of all rows only the student's gradient is stored.

    Args:
        student_logits: ``[B, T_S, vocab_S]``, all rows: row t scores token t + 1.
        student_ids: ``[B, T_S]``.
        student_chunks: ``[B, T_S]``, from :func:`fastkd.align_batch`; -1 for none.
        teacher_logits: ``[B, T_T, vocab_T]``, all rows; gets no gradient.
        teacher_chunks: ``[B, T_T]``.
        num_chunks: the largest number of chunks of a text.
        vocab_map: int64, a teacher id or -1 for each student id, from
            :func:`fastkd.recipes.edit_distance_map`. Columns of the student after its end have
            probability 0.
        mask: bool ``[B, T_S]``, False for tokens that are not to be learned (padding, a prompt).
            The first token of a row is never learned.
        unmatched: for rows without a teacher row: ``"label"``, the one-hot target, or ``"drop"``.
        match: ``"scored"`` or ``"read"``, see above; the sources have ``"read"``.
        divergence, beta, temperature, teacher_temperature: see :func:`fastkd.softmax_divergence`.
            ``"reverse_kl"`` is infinite for a one-hot target and needs ``unmatched="drop"``.
        reduction: over the tokens that are left: ``"mean"``, ``"sum"``, ``"batchmean"`` (over B),
            ``"elementmean"`` (over B x T_S), ``"sequence_mean"`` (over a text's tokens, then over
            texts), or ``"none"``: ``[B, T_S]``, of row t at token t + 1.
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type.

    Sources: Fu et al. 2023 (arXiv 2301.12726; code FlanT5-CoT-Specialization) and FuseLLM (arXiv
    2401.10491; code FuseAI), which pair a row of the student with the row of the teacher at the
    aligned token, ``match="read"``. The former keeps the teacher's 5 largest probabilities; the
    latter adds 0.1 times the cross-entropy with the target to 0.9 times that of the text. One-hot
    targets are used in the code of DSKD (arXiv 2406.17328). That code also takes the largest of
    several teacher entries that map to one student token, and uses a teacher row only where the two
    tokens of a chunk map to each other. Here each student token has the one entry of ``vocab_map``,
    and every chunk of one token on both sides has a teacher row.

    >>> import torch, fastkd
    >>> student, teacher = torch.zeros(1, 2, 3), torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
    >>> ids, chunks = torch.tensor([[0, 1]]), torch.tensor([[0, 1]])
    >>> vocab_map = torch.tensor([1, 0, -1])
    >>> loss = fastkd.recipes.mined(student, ids, chunks, teacher, chunks, 2, vocab_map)
    >>> round(loss.item(), 4)  # KL of (1/2, 1/2, 0) and (1/3, 1/3, 1/3)
    0.4055
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_tensors("mined", tensors)
    for name, logits in tensors.items():
        check_batch("mined", name, logits, student_logits)
    check_no_gradient("mined", teacher_logits=teacher_logits, normalizer=normalizer)
    check_integers(
        "mined", "student_ids", student_ids, student_logits.shape[:-1], student_logits.device
    )
    check_mask("mined", "mask", mask, student_logits.shape[:-1], student_logits.device)
    width = student_logits.size(-1)
    check_tensors("mined", {"vocab_map": vocab_map})
    if vocab_map.dim() != 1 or vocab_map.size(0) > width:
        raise ValueError(
            f"mined: vocab_map must be [at most {width}], got shape {list(vocab_map.shape)}"
        )
    check_integers("mined", "vocab_map", vocab_map, vocab_map.shape)
    if not student_logits.is_meta:
        check_has_value("mined", "vocab_map", vocab_map)
    check_range("mined", "vocab_map", vocab_map, -1, teacher_logits.size(-1))
    check_range("mined", "student_ids", student_ids, 0, width)
    if unmatched not in ("label", "drop"):
        raise ValueError(f"mined: unmatched must be label or drop, got {unmatched!r}")
    if match not in ("scored", "read"):
        raise ValueError(f"mined: match must be scored or read, got {match!r}")
    if divergence == "reverse_kl" and unmatched == "label":
        raise ValueError(
            "mined: unmatched must be drop with divergence reverse_kl, which is infinite for a "
            f"one-hot target; got {unmatched!r}"
        )
    sides = (student_logits, student_chunks, teacher_logits, teacher_chunks)
    matched, taught_by = single_token_rows("mined", *sides, num_chunks, match)
    texts = torch.arange(matched.size(0), device=matched.device).unsqueeze(-1)
    tokens = torch.arange(matched.size(1), device=matched.device).expand_as(matched)
    kept = tokens > 0
    kept = kept if mask is None else kept & mask
    kept = kept & matched if unmatched == "drop" else kept
    rows = chosen(texts * student_logits.size(1) + tokens - 1, kept)
    has_teacher, labels = chosen(matched, kept), chosen(student_ids, kept)
    taught_by = torch.where(matched, texts * teacher_logits.size(1) + taught_by, 0)
    teacher_rows = chosen(taught_by, kept)
    flat = teacher_logits.flatten(0, 1)
    columns = F.pad(vocab_map.to(flat.device), (0, width - vocab_map.numel()), value=-1)
    known = (columns >= 0) & (columns < flat.size(-1))
    columns = torch.where(known, columns, 0)

    def loss(block: slice, logits: Tensor) -> Tensor:
        taught, label = has_teacher[block], labels[block].unsqueeze(-1)
        one_hot = torch.arange(width, device=label.device) == label
        target = torch.where(one_hot, 0, -math.inf).to(flat.dtype)
        if torch.compiler.is_compiling():
            mapped = at_rows(flat, teacher_rows[block], taught)[:, columns]
            mapped = mapped.masked_fill(~known, -math.inf)
            target = torch.where(taught.unsqueeze(-1), mapped, target)
        else:
            mapped = flat[teacher_rows[block][taught]][:, columns]
            target[taught] = mapped.masked_fill(~known, -math.inf)
        return softmax_divergence(
            logits,
            target,
            divergence=divergence,
            beta=beta,
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            reduction="none",
        )

    values = by_blocks(loss, [student_logits.flatten(0, 1)], [rows], kept, width)
    return reduced("mined", placed(values, kept), kept, reduction, normalizer)
