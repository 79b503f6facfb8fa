"""Across tokenizers: the student's distribution projected onto the teacher's vocabulary."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._ops.arguments import check_has_value, check_no_gradient, to_integer
from fastkd._ops.checks import check_positive, check_tensors
from fastkd._ops.library import is_tracing
from fastkd._ops.names import TextReduction
from fastkd._ops.shift import following
from fastkd.recipes import _rowwise
from fastkd.recipes._chunks import (
    added,
    check_batch,
    check_callable,
    check_integers,
    check_mask,
    check_number,
    check_range,
    check_vocabs,
    chunk_ends,
    chunk_slots,
    log_softmax,
    readable,
    reduced,
    softmax,
    wide,
)
from fastkd.recipes._rows import check_choice, check_share, number_type
from fastkd.recipes._rowwise import at_rows, by_blocks, chosen
from fastkd.recipes.shared_vocabulary import LEAST_LOG, shared_tokens, terms
from fastkd.tokenizers._byte_vocab import ByteVocab

#: Teacher ids and their weights for each student id, ``[vocab_S, n]``; id -1 for none.
Projection = tuple[Tensor, Tensor]
#: From a slice of the chunks and their rows' logits, student's and teacher's: a loss a chunk.
_ChunkLoss = Callable[[slice, Tensor, Tensor], Tensor]


def token_projection(
    student_vocab: ByteVocab,
    teacher_vocab: ByteVocab,
    encode: Callable[[bytes], Sequence[int]],
    *,
    n: int = 4,
) -> Projection:
    r"""Which teacher tokens each student token stands for, and with which weights.

    A student token whose bytes are a teacher token's has that one, with the weight 1. Others have
    the first ``n`` tokens that the teacher's tokenizer makes of their bytes, the i-th (from 0) with
    a weight proportional to :math:`10^{-i}`; the weights sum to 1. For :func:`x_token`.

    Args:
        student_vocab: see :class:`fastkd.ByteVocab`.
        teacher_vocab: the teacher's.
        encode: the teacher's ids of some bytes, without special tokens; none for bytes that the
            tokenizer does not take, such as parts of a character.
        n: the most teacher tokens of a student token.

    Returns:
        ids: int64 ``[vocab_S, n]``, -1 for none.
        weights: float32 ``[vocab_S, n]``, 0 for none.

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type.

    Source: NVIDIA's NeMo-RL, whose tools also map the teacher's tokens to the student's, and
    special tokens by the similarity of their names.

    >>> import fastkd
    >>> student = fastkd.ByteVocab([b"a", b"201", None])
    >>> teacher = fastkd.ByteVocab([b"0", b"1", b"2", b"a"])
    >>> ids, weights = fastkd.recipes.token_projection(
    ...     student, teacher, lambda text: [teacher.tokens.index(bytes([x])) for x in text], n=2
    ... )
    >>> ids.tolist()
    [[3, -1], [2, 0], [-1, -1]]
    >>> [[round(x, 4) for x in row] for row in weights.tolist()]
    [[1.0, 0.0], [0.9091, 0.0909], [0.0, 0.0]]
    """
    check_vocabs("token_projection", student_vocab, teacher_vocab)
    check_callable("token_projection", "encode", encode, needed=True)
    n = to_integer("token_projection", "n", n)
    if n < 1:
        raise ValueError(f"token_projection: n must be positive, got {n}")
    shared = shared_tokens(student_vocab, teacher_vocab)
    ids = torch.full((len(shared), n), -1)
    for i, (token, same) in enumerate(zip(student_vocab.tokens, shared.tolist(), strict=True)):
        found = [same] if same >= 0 else list(encode(token))[:n] if token else []
        ids[i, : len(found)] = torch.tensor(found, dtype=torch.int64)
    check_range("token_projection", "ids from encode", ids, -1, len(teacher_vocab.tokens))
    weights = torch.where(ids < 0, 0, 10.0 ** -torch.arange(n))
    return ids, weights / weights.sum(-1, keepdim=True).clamp(min=1)


def x_token(
    student_logits: Tensor,
    student_chunks: Tensor,
    teacher_logits: Tensor,
    teacher_chunks: Tensor,
    num_chunks: int,
    projection: Projection,
    *,
    kind: str = "p_kl",
    k: int = 8192,
    threshold: float = 0.6,
    cap: int = 8192,
    divergence: Literal["forward_kl", "reverse_kl"] = "forward_kl",
    temperature: float = 1.0,
    epsilon: float = 1e-10,
    mask: Tensor | None = None,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Divergence through a sparse matrix W from the student's to the teacher's tokens (X-Token).

    A term. With q and p the softmaxes of the logits over the temperature :math:`\tau`, and means
    over the rows of a chunk, which score its tokens, a chunk's loss is for ``kind="p_kl"``

    .. math:: \tau^2 \sum_{u \in K} P_u \log \frac{P_u}{Q_u}, \qquad
              Q \propto \operatorname{mean}(q W)_K, \qquad
              P = \exp \operatorname{mean} \log \frac{p_K}{\sum_{u \in K} p_u}

    where K are the k teacher tokens with the largest logits of the rows that count. To the
    probabilities Q, and to the sum that they are divided by, ``epsilon`` is added. For
    ``kind="h_kl"``

    .. math:: \tau^2 \sum_{common} P_u \log \frac{P_u}{Q_v}
              + \tau^2 \sum_{i \le m} |Q_{(i)} - P_{(i)}|, \qquad
              Q = \exp \operatorname{mean} \log q, \qquad P = \exp \operatorname{mean} \log p

    Common are pairs of a student token v and the teacher token u with its largest weight in W (the
    first of several), if that is at least ``threshold``; of several v for one u the one with the
    largest weight, then the first. The others' probabilities are sorted descending, and the m
    largest compared: all of the vocabulary that has fewer of them, at most ``cap``. With a
    threshold of 1 only tokens of the same bytes are common (the authors' "gold" loss).

    Row t scores token t + 1. A chunk counts if rows score some of its tokens on both sides. Rows
    are read in blocks; of all rows only the student's gradient is stored.

    The authors multiply this at each step by a constant that makes it as large as the cross-entropy
    on the text, and add both: ``ce + fastkd.recipes.balanced(fastkd.recipes.x_token(...), ce)``.

    Args:
        student_logits: ``[B, T_S, vocab_S]`` float32, bfloat16, float16 or float64, all rows of
            whole texts.
        student_chunks: int64 or int32 ``[B, T_S]``, from :func:`fastkd.align_batch`; -1 for none.
        teacher_logits: ``[B, T_T, vocab_T]``, its own dtype; gets no gradient. Leave out columns
            that are no tokens: ``teacher_logits[..., :n]``.
        teacher_chunks: the same, ``[B, T_T]``.
        num_chunks: the largest number of chunks of a text.
        projection: W, from :func:`token_projection`: teacher ids, int64 or int32, and weights, not
            negative, both ``[at most vocab_S, n]``; -1 for none. Weights of an id that a row has
            twice are added.
        kind: ``"p_kl"`` or ``"h_kl"``.
        k: of ``"p_kl"``: size of K, at most the teacher's vocabulary.
        threshold: of ``"h_kl"``, in [0, 1].
        cap: of ``"h_kl"``: the most probabilities that are compared sorted.
        divergence: ``"forward_kl"``, or ``"reverse_kl"``: :math:`Q \log (Q / P)`.
        temperature: of both sides.
        epsilon: of ``"p_kl"``, positive.
        mask: bool ``[B, num_chunks]``, False for chunks that are not to be learned.
        reduction: over the chunks that count: ``"none"`` (``[B, num_chunks]``), ``"sum"``,
            ``"mean"``, ``"batchmean"`` or ``"sequence_mean"`` (over a text's chunks, then over
            texts).
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type.

    Source: Sreenivas et al. 2026 (arXiv 2605.21699), by the code of NVIDIA's NeMo-RL.

    >>> import torch, fastkd
    >>> student, teacher = torch.zeros(1, 2, 2), torch.tensor([[[1.0, 0.0, 0.0], [0.0] * 3]])
    >>> chunks = torch.tensor([[0, 1]])
    >>> projection = torch.tensor([[0, -1], [1, 2]]), torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    >>> loss = fastkd.recipes.x_token(student, chunks, teacher, chunks, 2, projection)
    >>> round(loss.item(), 4)  # of softmax(1, 0, 0) from (1/2, 1/4, 1/4)
    0.0116
    """
    tensors = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_tensors("x_token", tensors)
    for name, logits in tensors.items():
        check_batch("x_token", name, logits, student_logits)
    check_no_gradient("x_token", teacher_logits=teacher_logits)
    check_choice("x_token", "kind", kind, ("p_kl", "h_kl"))
    check_choice("x_token", "divergence", divergence, ("forward_kl", "reverse_kl"))
    check_share("x_token", "threshold", threshold)
    for name, value in (("temperature", temperature), ("epsilon", epsilon)):
        check_positive("x_token", name, value)
    k, cap = to_integer("x_token", "k", k), to_integer("x_token", "cap", cap)
    for name, number in (("k", k), ("cap", cap)):
        if number < 1:
            raise ValueError(f"x_token: {name} must be positive, got {number}")
    sizes = student_logits.size(-1), teacher_logits.size(-1)
    ids, weights = _checked(projection, *sizes, student_logits.device)
    num_chunks = check_number("x_token", num_chunks)
    sides = []
    for side, logits, chunks in (
        ("student", student_logits, student_chunks),
        ("teacher", teacher_logits, teacher_chunks),
    ):
        check_integers("x_token", f"{side}_chunks", chunks, logits.shape[:-1], logits.device)
        check_range("x_token", f"{side}_chunks", chunks, -1, num_chunks)
        chunks = following(chunks, -1)
        _, count = chunk_ends("x_token", f"{side}_chunks", logits, chunks, num_chunks)
        sides.append((chunks, count))
    kept = (sides[0][1] > 0) & (sides[1][1] > 0)
    check_mask("x_token", "mask", mask, kept.shape, kept.device)
    kept = kept if mask is None else kept & mask
    mine, other = (_ChunkRows(chunks, kept) for chunks, _ in sides)
    student, teacher = (x.flatten(0, 1) for x in (student_logits, teacher_logits))
    width, beta = max(*sizes), float(divergence == "reverse_kl")
    if kind == "p_kl":
        best = _largest(teacher, other, k)
        entries = _entries(ids, weights, best, sizes[1])
        width = max(width, entries[0].numel())
        of_chunks = _projected(mine, other, best, entries, epsilon, beta)
    else:
        common = _common(ids, weights, threshold, *sizes)
        of_chunks = _hybrid(mine, other, common, min(cap, *sizes), beta)

    def loss(block: slice, logits: Tensor) -> Tensor:
        chunks = mine.of(block)
        y = wide(at_rows(teacher, other.rows[other.span(chunks)], other.scored)) / temperature
        values = of_chunks(chunks, wide(logits) / temperature, y)
        return mine.spread(chunks, values * temperature * temperature)

    values = by_blocks(loss, [student], [mine.rows], mine.scored, width, mine.ends)
    dtype = torch.promote_types(number_type(student), number_type(teacher))
    return reduced("x_token", mine.losses(values).to(dtype), kept, reduction, normalizer)


class _ChunkRows:
    """Rows of one side that score tokens of the chunks that count, one chunk after the other.

    Where shapes must not depend on data, in a compiled graph and on the meta device, all rows and
    all chunks, and one more for the rows that do not count.

    Args:
        chunks: of the token that each row scores, ``[B, T]``.
        kept: the chunks that count, ``[B, num_chunks]``; all have a row.
    """

    def __init__(self, chunks: Tensor, kept: Tensor) -> None:
        self._shape = kept.shape
        self._counted = kept.numel()
        slots = chunk_slots(chunks, kept.size(1))
        first = kept.size(1) * torch.arange(kept.size(0), device=kept.device).unsqueeze(-1)
        self.scored = F.pad(kept, (0, 1)).gather(1, slots)
        slots = torch.where(self.scored, first + slots, self._counted).flatten()
        self.ends: list[int] | None = None
        tracing = is_tracing(kept)
        if tracing:
            self.rows = torch.arange(slots.numel(), device=slots.device)
            self._numbers, self._slots, count = slots, slots, self._counted + 1
        else:
            (rows,) = self.scored.flatten().nonzero(as_tuple=True)
            self.rows = rows[slots[rows].argsort(stable=True)]
            self._slots = slots[self.rows]
            numbers = kept.flatten().cumsum(0)
            self._numbers, count = numbers[self._slots] - 1, int(numbers[-1:].sum())
        ones = torch.ones_like(self._numbers)
        self._sizes = ones.new_zeros(count).index_add(0, self._numbers, ones)
        if not tracing:
            self.ends = [0, *self._sizes.cumsum(0).tolist()]

    def of(self, rows: slice) -> slice:
        """The chunks of these rows."""
        if self.ends is None:
            return rows
        return slice(bisect_left(self.ends, rows.start), bisect_left(self.ends, rows.stop))

    def span(self, chunks: slice) -> slice:
        """The rows of these chunks."""
        if self.ends is None:
            return chunks
        return slice(self.ends[chunks.start], self.ends[chunks.stop])

    def means(self, chunks: slice, values: Tensor) -> Tensor:
        """Of each of the chunks the mean of its rows' values, ``[rows of the chunks, width]``."""
        sizes = self._sizes[chunks].clamp(min=1).unsqueeze(-1)
        total = values.new_zeros(sizes.size(0), values.size(-1))
        return total.index_add(0, self._within(chunks), values) / sizes

    def spread(self, chunks: slice, losses: Tensor) -> Tensor:
        """Each chunk's loss in equal parts on its rows."""
        return (losses / self._sizes[chunks].clamp(min=1))[self._within(chunks)]

    def losses(self, values: Tensor) -> Tensor:
        """The chunks' losses, ``[B, num_chunks]``, from the parts of :meth:`spread` of all rows."""
        total = values.new_zeros(self._counted + 1).index_add(0, self._slots, values)
        return total[:-1].view(self._shape)

    def _within(self, chunks: slice) -> Tensor:
        return self._numbers[self.span(chunks)] - (chunks.start or 0)


def _projected(
    mine: _ChunkRows,
    other: _ChunkRows,
    best: Tensor,
    entries: tuple[Tensor, Tensor, Tensor],
    epsilon: float,
    beta: float,
) -> _ChunkLoss:
    sources, places, factors = entries

    def loss(chunks: slice, z: Tensor, y: Tensor) -> Tensor:
        moved = softmax(z)[:, sources] * factors.to(z.dtype)
        q = mine.means(chunks, added(moved, places, best.numel()))
        log_q = (q / (q.sum(-1, keepdim=True) + epsilon) + epsilon).log()
        log_p = other.means(chunks, log_softmax(y[:, best])).clamp(min=LEAST_LOG)
        return terms(log_p, log_q, beta).sum(-1)

    return loss


def _hybrid(
    mine: _ChunkRows,
    other: _ChunkRows,
    common: tuple[Tensor, Tensor, Tensor],
    cap: int,
    beta: float,
) -> _ChunkLoss:
    known, columns, taken = common
    places = torch.arange(cap, device=known.device)
    compared = (places < (~known).sum()) & (places < (~taken).sum())

    def loss(chunks: slice, z: Tensor, y: Tensor) -> Tensor:
        log_q, log_p = (
            rows.means(chunks, log_softmax(x)).clamp(min=LEAST_LOG)
            for rows, x in ((mine, z), (other, y))
        )
        matched = torch.where(known, terms(log_p[:, columns], log_q, beta), 0).sum(-1)
        q, p = (
            x.exp().masked_fill(done, 0).topk(cap).values
            for x, done in ((log_q, known), (log_p, taken))
        )
        return matched + torch.where(compared, (q - p).abs(), 0).sum(-1)

    return loss


def _largest(teacher: Tensor, rows: _ChunkRows, k: int) -> Tensor:
    """The columns with the largest logits in the rows that count."""
    width = teacher.size(-1)
    best = teacher.new_full((width,), -math.inf)
    if rows.ends is None:
        scored = rows.scored.flatten().unsqueeze(-1)
        best = torch.cat([torch.where(scored, teacher, -math.inf), best.unsqueeze(0)]).amax(0)
    else:
        for some in rows.rows.split(max(1, _rowwise._ENTRIES // max(1, width))):
            best = torch.maximum(best, teacher[some].amax(0)) if some.numel() else best
    return best.topk(min(k, width)).indices


def _entries(
    ids: Tensor, weights: Tensor, best: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of W in the columns ``best``: the student's id, the place in ``best``, the weight."""
    numbers = torch.arange(best.numel(), device=best.device)
    places = best.new_full((width + 1,), -1).index_copy(0, best, numbers)[ids]
    sources = torch.arange(ids.size(0), device=ids.device).unsqueeze(-1).expand_as(ids)
    inside = places >= 0
    return chosen(sources, inside), chosen(places, inside), chosen(weights, inside)


def _common(
    ids: Tensor, weights: Tensor, threshold: float, width: int, teacher_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which student columns are common, the teacher's column of each, which teacher columns are."""
    weights = _sums(ids, weights)
    best, at = torch.where(ids < teacher_width, weights, -1).max(1)
    to = ids.gather(1, at.unsqueeze(-1)).squeeze(-1)
    to = torch.where(best >= threshold, to, teacher_width)
    largest = best.new_full((teacher_width + 1,), -1).scatter_reduce(0, to, best, "amax")
    to = torch.where(best >= largest[to], to, teacher_width)
    numbers = torch.arange(to.numel(), device=to.device)
    first = numbers.new_full((teacher_width + 1,), width).scatter_reduce(0, to, numbers, "amin")
    to = torch.where(numbers == first[to], to, teacher_width)
    to = F.pad(to, (0, width - to.numel()), value=teacher_width)
    known = to < teacher_width
    taken = torch.zeros(teacher_width + 1, dtype=torch.bool, device=to.device)
    return known, torch.where(known, to, 0), taken.index_fill(0, to, True)[:-1]


def _sums(ids: Tensor, weights: Tensor) -> Tensor:
    """At each id of a row, the sum of the weights that the row gives to that id."""
    ids, order = ids.sort(-1)
    numbers = F.pad((ids[:, 1:] != ids[:, :-1]).cumsum(-1), (1, 0))  # of a row's distinct ids
    numbers = torch.empty_like(numbers).scatter(1, order, numbers)
    sums = torch.zeros_like(weights, dtype=torch.float64)
    sums = sums.scatter_add(1, numbers, weights.double())
    return sums.gather(1, numbers).to(weights.dtype)


def _checked(
    projection: Any, width: int, teacher_width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids, int64, those for none ``teacher_width``, and weights, 0 for none."""
    if not isinstance(projection, Sequence) or len(projection) != 2:
        raise TypeError(
            "x_token: projection must be a pair of tensors, teacher ids and weights, got "
            f"{type(projection).__name__}"
        )
    ids, weights = projection
    names = "projection's ids", "projection's weights"
    check_tensors("x_token", dict(zip(names, projection, strict=True)))
    if ids.dim() != 2 or ids.size(0) > width or not ids.size(1):
        raise ValueError(
            f"x_token: {names[0]} must be [at most {width}, at least 1], got shape "
            f"{list(ids.shape)}"
        )
    check_integers("x_token", names[0], ids, ids.shape)
    check_range("x_token", names[0], ids, -1, teacher_width)
    if not weights.is_floating_point() or weights.shape != ids.shape:
        raise ValueError(
            f"x_token: {names[1]} must be float {list(ids.shape)}, got {weights.dtype} "
            f"{list(weights.shape)}"
        )
    check_no_gradient("x_token", **{names[1]: weights})
    if device.type != "meta":
        check_has_value("x_token", names[0], ids)
    if readable(weights) and not ((weights >= 0) & (weights < math.inf)).all():
        raise ValueError(f"x_token: {names[1]} must be finite and not negative")
    ids, weights = ids.to(device).long(), weights.to(device)
    none = ids < 0
    return torch.where(none, teacher_width, ids), torch.where(none, 0, weights)
