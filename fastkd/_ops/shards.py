"""Vocabularies split across the processes of a group: one process's columns, and sums over all.

Each process reads its columns and sends a few numbers a row. All processes receive all numbers, in
the order of their ranks, and merge them in the same way: every process has the same bits. The
numbers of a row are a logit near the largest, the origin, and sums relative to it, for example
``sum exp((z - origin) / temperature)``.

The raw ops take a table, float64 [numbers, rows] (csrc/arguments/shards_entry.h has its rows).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.arguments import can_be_read, to_integer
from fastkd._ops.gradient import gradient_for, memory
from fastkd._ops.library import is_batched
from fastkd._ops.linear.logits import LinearLogits

#: The largest whole number below which float32 holds all of them.
_WHOLE = 1 << 24
#: The rows of `_shard_statistics`' result.
ORIGIN, SUM, WEIGHTED, SECOND_SUM, SECOND_WEIGHTED = range(5)
TOKEN_LOGIT, BEST_LOGIT, BEST_COLUMN, TOTAL, COLUMNS, SECOND_ORIGIN = range(5, 11)
#: Names of the ops' arguments that are logits.
LOGITS = ("logits", "student_logits", "teacher_logits")
LN2 = 0.6931471805599453
#: Bits of `_shard_statistics`' argument `wanted`.
ENTROPY, SECOND, BEST, TOTAL_BIT = 1, 2, 4, 8
_NONE = -torch.inf
_EMPTY = (_NONE, 0.0, 0.0, 0.0, 0.0, _NONE, _NONE, 0.0, 0.0, 0.0, _NONE)


@dataclass(frozen=True)
class Shards:
    """The columns of this process.

    ``columns``: how many of them the vocabulary has; those after them are padding. ``start``: the
    vocabulary's number of the first one. ``vocab``: the vocabulary's size. ``group``: the process
    group, in a graph its name.
    """

    function: str
    group: Any
    size: int
    start: int
    columns: int
    vocab: int

    def gather(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers [n, rows] of all processes, float64 [size, n, rows], sent in this dtype."""
        from torch.distributed import _functional_collectives as collectives

        # PyTorch 2.13 renamed it.
        gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
        found = _waited(gather(numbers.to(dtype).contiguous(), 0, self.group))
        return found.view(self.size, *numbers.shape).to(torch.float64)

    def gather_first(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """The same of a call's first numbers, n >= 2, with a check of the processes' columns.

        Two rows more are sent, with each process's first column, number of columns and vocabulary.
        On a GPU, and in a graph, all is NaN where the check fails. Vocabularies whose numbers the
        dtype does not hold are not checked.
        """
        each = (self.start, self.vocab, self.columns, self.vocab)
        place = torch.cat([numbers.new_full((1,), x) for x in each]).view(2, 2)
        place = torch.cat([place, numbers.new_zeros((numbers.size(0) - 2, 2))])
        every = self.gather(torch.cat([numbers, place], 1), dtype)
        found, places = every[:, :, :-2], every[:, :2, -2:]
        if self.vocab >= _WHOLE and dtype != torch.float64:
            return found
        starts, columns, vocab = places[:, 0, 0], places[:, 1, 0], places[:, 0, 1]
        # A process must begin where the columns of those before it end. Of processes with the same
        # first column, one of which may have columns, the lower rank counts as before.
        order = torch.arange(self.size, device=starts.device)
        earlier = starts.unsqueeze(0) == starts.unsqueeze(1)
        earlier = earlier & (order.unsqueeze(0) < order.unsqueeze(1))
        earlier = earlier | (starts.unsqueeze(0) < starts.unsqueeze(1))
        before = torch.where(earlier, columns.unsqueeze(0), 0.0).sum(1)
        right = ((columns == 0) | (before == starts)) & (vocab == vocab[0])
        all_right = right.all() & (columns.sum() == vocab[0])
        if not can_be_read(numbers):
            return torch.where(all_right, found, torch.nan)
        if not bool(all_right):
            spans = [(int(x), int(x + n)) for x, n in zip(starts, columns, strict=True)]
            sizes = sorted({int(x) for x in vocab})
            raise ValueError(
                f"{self.function}: the processes of group must have each column of one vocabulary "
                f"once, got the columns {spans} and vocab_size {sizes}"
            )
        return found

    def sum(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum over all processes of numbers of which all but one process's are 0: exact."""
        from torch.distributed import _functional_collectives as collectives

        found = collectives.all_reduce(numbers.to(dtype).contiguous(), "sum", self.group)
        return _waited(found).to(torch.float64)

    def add_up(self, x: Tensor) -> None:
        """Replace a tensor by the sum over all processes."""
        torch.distributed.all_reduce(x, group=self._process_group())

    @property
    def rank(self) -> int:
        """The place of this process in the group."""
        return torch.distributed.get_rank(self._process_group())

    def _process_group(self) -> Any:
        from torch.distributed import distributed_c10d

        resolve: Any = distributed_c10d._resolve_process_group
        return resolve(self.group) if isinstance(self.group, str) else self.group

    def local(self, token_ids: Tensor) -> Tensor:
        """Token ids as columns of this process; -1 for those of other processes."""
        column = token_ids.to(torch.int64) - self.start
        return torch.where((column >= 0) & (column < self.columns), column, -1)


def group_name(group: Any) -> str:
    """The name of a group in graphs."""
    return group if isinstance(group, str) else group.group_name


def _waited(tensor: Tensor) -> Tensor:
    from torch.distributed import _functional_collectives as collectives

    if isinstance(tensor, collectives.AsyncCollectiveTensor):
        return tensor.wait()
    return tensor


def shards_of(
    function: str, logits: Any, group: Any, vocab_start: Any, vocab_size: Any
) -> Shards | None:
    """The part of this process in a call, or None if it has all columns.

    The raw op of a single process checks ``vocab_size`` where there is no group.
    """
    if group is None:
        if vocab_start is not None:
            raise ValueError(
                f"{function}: vocab_start needs group, the processes of the other columns"
            )
        return None
    import torch.distributed as dist

    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"{function}: group must be a process group or a mesh of one dimension, got a mesh "
                f"of {group.ndim}"
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{function}: group must be a torch.distributed process group, got "
            f"{type(group).__name__}"
        )
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError(f"{function}: this process is not in group")
    if not isinstance(logits, (Tensor, LinearLogits)):
        raise TypeError(
            f"{function}: with group, logits must be a tensor or LinearLogits, got "
            f"{type(logits).__name__}"
        )
    if logits.dim() < 1:
        raise ValueError(f"{function}: logits must have at least one dimension, got a scalar")
    width = logits.size(-1)
    if vocab_size is not None:
        vocab_size = to_integer(function, "vocab_size", vocab_size)
        if vocab_size < 1:
            raise ValueError(f"{function}: vocab_size must be positive, got {vocab_size}")
    if vocab_start is not None:
        start = to_integer(function, "vocab_start", vocab_start)
        if vocab_size is None:
            raise ValueError(f"{function}: vocab_start needs vocab_size, that of all processes")
        if start < 0:
            raise ValueError(f"{function}: vocab_start must not be negative, got {start}")
    else:
        start = rank * width
        vocab_size = size * width if vocab_size is None else vocab_size
        if vocab_size > size * width:
            raise ValueError(
                f"{function}: vocab_size is {vocab_size}, the {size} processes have only "
                f"{size * width} columns"
            )
    if size == 1:
        if start != 0:
            raise ValueError(f"{function}: vocab_start must be 0 in a group of one, got {start}")
        return None
    columns = min(max(vocab_size - start, 0), width)
    return Shards(function, group, size, start, columns, vocab_size)


def check_widths(shards: Shards, fields: Sequence[str], packed: Sequence[Any]) -> None:
    """Raise unless all logits have as many columns: they are the same part of the vocabulary."""
    first, width = fields[0], None
    for field, value in zip(fields, packed, strict=True):
        if field not in LOGITS:
            continue
        for x in value if isinstance(value, (list, tuple)) else (value,):
            if x is None or x.dim() < 1:
                continue
            width = x.size(-1) if width is None else width
            if x.size(-1) != width:
                raise ValueError(
                    f"{shards.function}: with group, {field} must be the same columns as {first}, "
                    f"{width}, got {x.size(-1)}"
                )


def with_columns(fields: Sequence[str], packed: Sequence[Any]) -> list[Any]:
    """Packed arguments, where logits without a column get one, for the raw op's checks."""

    def one(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [one(x) for x in value]
        if isinstance(value, Tensor) and value.dim() > 0 and value.size(-1) == 0:
            return value.new_zeros(()).expand(*value.shape[:-1], 1)
        return value

    pairs = zip(fields, packed, strict=True)
    return [one(value) if field in LOGITS else value for field, value in pairs]


def one_column(fields: Sequence[str], packed: Sequence[Any]) -> list[Any]:
    """Packed arguments of a vocabulary of one token, for the raw op's checks of all others."""
    given = dict(zip(fields, packed, strict=True))
    ignored = given.get("ignore_index", -100)

    def first(x: Tensor, number: float) -> Tensor:
        return torch.full((*x.shape[:-1], 1), number, dtype=x.dtype, device=x.device)

    for field, value in given.items():
        if field in LOGITS:
            listed = value if isinstance(value, (list, tuple)) else [value]
            zeros = [
                None if x is None or not x.dim() else x.new_zeros(()).expand(*x.shape[:-1], 1)
                for x in listed
            ]
            given[field] = zeros if isinstance(value, (list, tuple)) else zeros[0]
        elif field in ("labels", "token_ids") and value is not None:
            given[field] = torch.where(value == ignored, value, 0)
        elif field == "teacher_indices" and value.dim():
            given[field] = first(value, 0)
        elif field == "teacher_log_probs" and value.dim():
            given[field] = first(value, -1)
        elif field in ("vocab_size", "k"):
            given[field] = 1
    return [given[field] for field in fields]


def table(rows: int, like: Tensor, *numbers: Any) -> Tensor:
    """Numbers, or tensors with one number a row, as a float64 table [numbers, rows]."""
    one = torch.ones(rows, dtype=torch.float64, device=like.device)
    return torch.stack([one * x for x in numbers])


def statistics(
    shards: Shards,
    logits: Tensor,
    numbers: Tensor,
    token_ids: Tensor,
    wanted: int = 0,
    columns: Tensor | None = None,
    holes: Tensor | None = None,
) -> Tensor:
    """`_shard_statistics` of this process's columns; also where it has none."""
    if shards.columns == 0:
        empty = torch.tensor(_EMPTY, dtype=torch.float64, device=logits.device)
        return empty.unsqueeze(1).expand(-1, numbers.size(1))
    return torch.ops.fastkd._shard_statistics(
        logits, numbers, token_ids, columns, holes, shards.columns, wanted
    )


def pair_sums(
    shards: Shards,
    student: Tensor,
    teacher: Tensor,
    numbers: Tensor,
    token_ids: Tensor,
    divergence: int,
) -> Tensor:
    """`_shard_sums` of this process's columns; also where it has none."""
    if shards.columns == 0:
        return numbers.new_zeros((3, numbers.size(1)))
    return torch.ops.fastkd._shard_sums(
        student, teacher, numbers, token_ids, divergence, shards.columns
    )


def dtype_of(*logits: Tensor) -> torch.dtype:
    """The dtype of what is sent, and of results."""
    double = any(x.dtype == torch.float64 for x in logits)
    return torch.float64 if double else torch.float32


def sent_dtype(shards: Shards, *logits: Tensor) -> torch.dtype:
    """The same where columns' numbers are sent."""
    return torch.float64 if shards.vocab >= _WHOLE else dtype_of(*logits)


class Merged:
    """Origins of all processes, [processes, rows], merged.

    ``origin``: the largest, NaN where the row has no finite logit, or +inf; with ``empty`` 0 where
    it has none.
    """

    def __init__(self, origins: Tensor, *, empty: bool = False) -> None:
        self._origins = origins
        self._top = origins.amax(0)
        self.origin = self._top + (self._top - self._top)
        if empty:
            self.origin = torch.where(self._top == -torch.inf, 0.0, self.origin)

    def factors(self, temperature: Tensor) -> Tensor:
        """What makes sums at this temperature relative to `origin`."""
        apart = (self._origins - self._top) / temperature
        return torch.where(self._origins == self._top, 1.0, apart.exp())

    def log_sum(self, sums: Tensor, temperature: Tensor) -> Tensor:
        """log sum exp((z - origin) / temperature), from the sums of all processes."""
        # In logarithms: without its holes, a row may be far below the largest logit.
        apart = torch.where(
            self._origins == self._top, 0.0, (self._origins - self._top) / temperature
        )
        return (sums.log() + apart).logsumexp(0) + (self.origin - self.origin)

    def entropy(self, sums: Tensor, weighted: Tensor, temperature: Tensor) -> Tensor:
        """The entropy, from sums of e and of e log2(e)."""
        factors = self.factors(temperature)
        moved = (self._origins - self._top) / temperature
        moved = torch.where((self._origins == self._top) | (factors == 0), 0.0, moved)
        total = (sums * factors).sum(0)
        found = total.log() - ((weighted * LN2 + sums * moved) * factors).sum(0) / total
        return found.clamp(min=0) + (self.origin - self.origin)

    def total(self, totals: Tensor, columns: Tensor) -> Tensor:
        """The sum of z - origin over all columns."""
        moved = (
            torch.where(self._origins == -torch.inf, -self._top, self._origins - self._top)
            * columns
        )
        return torch.where(columns > 0, totals + moved, 0.0).sum(0)


def cleaned(numbers: Tensor, lost: Tensor) -> Tensor:
    """Numbers with 0 in rows that have no distribution, so that no gradient is 0 x NaN."""
    return _Cleaned.apply(numbers, lost)


def poisoned(losses: Tensor, lost: Tensor) -> Tensor:
    """Losses with NaN in rows that have no distribution, and NaN as their gradient.

    Where nothing depends on such a row, its gradient stays 0.
    """
    return _Poisoned.apply(losses, lost)


class _Cleaned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, numbers, lost):
        return torch.where(lost, 0.0, numbers)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Poisoned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, losses, lost):
        ctx.save_for_backward(lost)
        return torch.where(lost, torch.nan, losses)

    @staticmethod
    def backward(ctx, grad):
        (lost,) = ctx.saved_tensors
        return torch.where(lost & (grad != 0), torch.nan, grad), None


def still_read(keep: Tensor, *grads: Tensor) -> Tensor:
    """Which rows the backward pass reads: those whose numbers have gradients other than 0."""
    used = grads[0] != 0
    for grad in grads[1:]:
        used = used | (grad != 0)
    return torch.where(used, keep, 0.0)


def is_differentiated_again(
    shards: Shards, grads: Sequence[Tensor | None], inplace: bool = False
) -> bool:
    """Whether the backward pass that runs is to be differentiated, too (create_graph=True).

    Raises for batches of gradients, and where ``inplace`` has overwritten the logits.
    """
    if not torch.compiler.is_compiling() and is_batched(*grads):
        raise NotImplementedError(
            f"{shards.function}: group has no batches of gradients (is_grads_batched=True)"
        )
    again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if again and inplace:
        raise RuntimeError(
            f"{shards.function}: second derivatives need the logits that inplace=True overwrote"
        )
    return again


def gradient_by(name: str, logits: Tensor, *arguments: Any) -> Tensor:
    """The gradient of these logits by a raw op, in reused memory where possible."""
    if torch.compiler.is_compiling() or type(logits) is not Tensor:
        return getattr(torch.ops.fastkd, name)(*arguments)
    gradient = gradient_for(logits)
    getattr(torch.ops.fastkd, f"{name}_into")(gradient, *arguments)
    memory.keep(gradient)
    return gradient


def _rows(logits: Tensor) -> int:
    rows = 1
    for size in logits.shape[:-1]:
        rows *= size
    return rows


@torch.library.register_fake("fastkd::_shard_statistics")
def _(logits, numbers, token_ids, columns, holes, vocab_size, wanted):
    return logits.new_empty((len(_EMPTY), _rows(logits)), dtype=torch.float64)


@torch.library.register_fake("fastkd::_shard_sums")
def _(student_logits, teacher_logits, numbers, token_ids, divergence, vocab_size):
    return student_logits.new_empty((3, _rows(student_logits)), dtype=torch.float64)


@torch.library.register_fake("fastkd::_shard_gradient")
def _(student_logits, teacher_logits, numbers, token_ids, divergence, vocab_size, of_teacher):
    return torch.empty_like(teacher_logits if of_teacher else student_logits)


@torch.library.register_fake("fastkd::_shard_softmax_gradient")
def _(logits, *others):
    return torch.empty_like(logits)


@torch.library.register_fake("fastkd::_shard_gradient_into")
def _(gradient, *others):
    return None


@torch.library.register_fake("fastkd::_shard_softmax_gradient_into")
def _(gradient, *others):
    return None
