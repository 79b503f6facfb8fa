"""Models with different tokenizers, compared by bytes or by what begins their tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.arguments import check_no_gradient
from fastkd._ops.checks import check_tensors
from fastkd._ops.names import Divergence, TextReduction
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.recipes._chunks import (
    added,
    check_integers,
    check_range,
    check_vocabs,
    reduced,
    softmax,
    wide,
)
from fastkd.recipes._rows import (
    check_choice,
    check_rows,
    kept_rows,
    number_type,
    row_divergence,
)
from fastkd.recipes._rowwise import at_rows, by_blocks, chosen, placed
from fastkd.tokenizers._byte_log_probs import byte_log_probs
from fastkd.tokenizers._byte_vocab import ByteVocab

#: The 256 next bytes, and a token that ends where the prefix does.
_COLUMNS = 257


def byte_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_vocab: ByteVocab | None,
    teacher_vocab: ByteVocab | None,
    *,
    student_prefix: bytes | Sequence[Any] = b"",
    teacher_prefix: bytes | Sequence[Any] = b"",
    divergence: Divergence = "jsd",
    beta: float | Tensor = 0.5,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Divergence of the two models' distributions of the next byte. A term.

    Rows are paired: both have read the same bytes, up to a prefix inside a token. The next byte's
    distribution is :func:`fastkd.byte_log_probs`; ids without bytes are left out, and the rest
    sums to 1. It supposes that the text before is tokenized as it was read, a single cover:
    :meth:`fastkd.ByteStream.next_byte_log_probs` is exact.

    Args:
        student_logits: ``[..., width]``. Row t scores what follows it.
        teacher_logits: ``[..., width]`` of the same rows.
        student_vocab: see :class:`fastkd.ByteVocab`; None where the logits are of bytes already,
            ``[..., 257]``: a byte head, or log-probabilities of a stream.
        teacher_vocab: as the student's.
        student_prefix: what has been read of the next token: bytes for all rows, or for each row,
            nested as the leading dimensions.
        teacher_prefix: as the student's.
        divergence, beta, mask, weight: see :func:`fastkd.softmax_divergence`.
        temperature: of both sides' byte distributions.
        reduction: as there, or ``"sequence_mean"``: over a text's rows, then over texts.
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Sources: Phan et al. 2024 (arXiv 2410.09303), the text; BLD (2604.07466) gives the student a
    head for bytes, and adds the cross-entropies of its next token and next byte.

    >>> import torch, fastkd
    >>> ours, theirs = fastkd.ByteVocab([b"a", b"b"]), fastkd.ByteVocab([b"ab", b"a", b"b"])
    >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> loss = fastkd.recipes.byte_kd(student, teacher, ours, theirs, divergence="forward_kl")
    >>> round(loss.item(), 4)  # of (3/4, 1/4) from (1/2, 1/2)
    0.1308
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_rows("byte_kd", tensors, mask=mask, weight=weight)
    sides = (
        ("student", student_logits, student_vocab, student_prefix),
        ("teacher", teacher_logits, teacher_vocab, teacher_prefix),
    )
    student, teacher = (_bytes_of(*side) for side in sides)
    return row_divergence(
        "byte_kd",
        student,
        teacher,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        mask=mask,
        weight=weight,
        reduction=reduction,
        normalizer=normalizer,
    )


def _bytes_of(side: str, logits: Tensor, vocab: ByteVocab | None, prefix: Any) -> Tensor:
    if not isinstance(prefix, (bytes, list, tuple)):
        raise TypeError(
            f"byte_kd: {side}_prefix must be bytes, or bytes for each row, got "
            f"{type(prefix).__name__}"
        )
    if vocab is not None:
        if not isinstance(vocab, ByteVocab):
            raise TypeError(
                f"byte_kd: {side}_vocab must be a fastkd.ByteVocab, got {type(vocab).__name__}"
            )
        return byte_log_probs(logits, vocab, prefix=prefix)[..., :_COLUMNS]
    if logits.size(-1) < _COLUMNS:
        raise ValueError(
            f"byte_kd: {side}_logits without {side}_vocab must have at least {_COLUMNS} columns, "
            f"got {logits.size(-1)}"
        )
    if prefix != b"":
        raise ValueError(f"byte_kd: {side}_prefix needs {side}_vocab, got None")
    return logits[..., :_COLUMNS]


def prefix_map(student_vocab: ByteVocab, teacher_vocab: ByteVocab) -> Tensor:
    """The longest student token that each teacher token begins with, int64 ``[vocab_T]``.

    -1 for teacher ids without bytes or without such a student token; of student ids with the same
    bytes the first. For :func:`bpm`.

    >>> import fastkd
    >>> student = fastkd.ByteVocab([b"a", b"ab", b"c"])
    >>> teacher = fastkd.ByteVocab([b"abc", b"a", b"ad", b"b", None])
    >>> fastkd.recipes.prefix_map(student, teacher).tolist()
    [1, 0, 0, -1, -1]
    """
    check_vocabs("prefix_map", student_vocab, teacher_vocab)
    ids: dict[bytes, int] = {}
    for i, token in enumerate(student_vocab.tokens):
        if token:
            ids.setdefault(token, i)
    longest = max((len(token) for token in ids), default=0)
    found = []
    for token in teacher_vocab.tokens:
        lengths = range(min(len(token or b""), longest), 0, -1)
        found.append(next((ids[token[:n]] for n in lengths if token[:n] in ids), -1))  # type: ignore[index]
    return torch.tensor(found, dtype=torch.int64)


def bpm(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mapping: Tensor,
    *,
    residual: str = "drop",
    mask: Tensor | None = None,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Teacher mass moved to the student's tokens that begin its own (BPM; recalled, not verified).

    A term. Rows are paired: both have read the same bytes. With the map m of :func:`prefix_map`,
    :math:`p'_u = \sum_{v: m(v) = u} p_v` and the residual R is the mass of unmapped tokens. The
    loss is :math:`KL(p' / (1 - R) \| q)`, or with ``residual="lump"`` the divergence of :math:`(p',
    R)` from q with one outcome for all student tokens that nothing maps to. Rows are mapped in
    blocks; of all rows only the student's gradient is stored.

    Args:
        student_logits: ``[..., vocab_S]``. Row t scores what follows it.
        teacher_logits: ``[..., vocab_T]`` of the same rows; gets no gradient.
        mapping: int64 or int32 ``[vocab_T]``, a student id or -1.
        residual: ``"drop"`` or ``"lump"``, which is infinite where there is a residual but no
            student token that nothing maps to.
        mask: bool, one a row: rows with False are not read.
        reduction: ``"none"``, ``"sum"``, ``"mean"``, ``"batchmean"`` or ``"sequence_mean"`` (over a
            text's rows, then over texts).
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type.

    Source: arXiv 2607.22334, by accounts of it. Inside a student token that is a part of a teacher
    token the method restricts the teacher to the tokens that go on: mask the others with -inf.

    >>> import torch, fastkd
    >>> student, teacher = torch.zeros(1, 3), torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> mapping = torch.tensor([0, 0, -1])  # p' = (3/4, 0, 0), R = 1/4
    >>> for residual in ("drop", "lump"):
    ...     print(round(fastkd.recipes.bpm(student, teacher, mapping, residual=residual).item(), 4))
    1.0986
    0.363
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_rows("bpm", tensors, mask=mask)
    check_choice("bpm", "residual", residual, ("drop", "lump"))
    check_no_gradient("bpm", teacher_logits=teacher_logits)
    check_tensors("bpm", {"mapping": mapping})
    check_integers("bpm", "mapping", mapping, teacher_logits.shape[-1:], teacher_logits.device)
    width = student_logits.size(-1)
    check_range("bpm", "mapping", mapping, -1, width)
    kept = kept_rows(student_logits, mask)
    places = torch.arange(kept.numel(), device=kept.device).view(kept.shape)
    rows = chosen(places, kept)
    student, teacher = (x.reshape(-1, x.size(-1)) for x in (student_logits, teacher_logits))
    columns = torch.where(mapping < 0, width, mapping).long()
    reached = torch.zeros(width + 1, dtype=torch.bool, device=kept.device)
    reached = reached.index_fill(0, columns, True)[:-1]

    def loss(block: slice, logits: Tensor) -> Tensor:
        p = softmax(at_rows(teacher, rows[block], kept))
        mass = added(p, columns, width + 1)
        target = mass[:, :-1].log()
        if residual == "drop":
            return softmax_divergence(logits, target, reduction="none")
        z = wide(logits)
        others = z.masked_fill(reached, -torch.inf).logsumexp(-1, keepdim=True)
        return softmax_divergence(
            torch.cat([z.masked_fill(~reached, -torch.inf), others], -1),
            torch.cat([target, mass[:, -1:].log()], -1),
            reduction="none",
        )

    values = by_blocks(loss, [student], [rows], kept, max(width, teacher.size(-1)))
    dtype = torch.promote_types(number_type(student), number_type(teacher))
    return reduced("bpm", placed(values, kept).to(dtype), kept, reduction, normalizer)
