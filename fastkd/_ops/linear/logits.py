"""Logits as the product of hidden states and a head's weight, which ops take in place of logits."""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.arguments import can_be_read, check_tensor, to_flag, to_integer, to_number

_AUTOCAST = ("cpu", "cuda")  # other devices may not know it
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LinearLogits:
    r"""The logits of a linear head, for ops that compute them a chunk of rows at a time.

    .. math:: z = s \, h W^\top + b, \qquad \text{with } \mathrm{softcap}\ c{:}\quad
              c \tanh\big((s \, h W^\top + b) / c\big)

    It stands wherever an op takes logits: :func:`fastkd.softmax_divergence` (also in a list of
    teachers), :func:`fastkd.topk_divergence`, :func:`fastkd.clipped_divergence`,
    :func:`fastkd.cross_entropy`, :func:`fastkd.token_log_probs`, :func:`fastkd.token_stats`,
    :func:`fastkd.teacher_topk`, :func:`fastkd.topk_stats`, :func:`fastkd.chunk_log_likelihood` and
    :func:`fastkd.alm_loss`.
    The op computes the logits of a chunk of rows, its results of them, and the chunk's part of the
    gradients of ``hidden``, ``weight`` and ``bias``. ``[rows, vocab]`` is never stored.

    Matrix products of a training step of ``softmax_divergence`` with a student and a teacher: 4;
    with a frozen student head, or of ``topk_divergence``: 3; without gradients: 2. The gradients
    are computed in the forward call, those of the weight summed in float32, and the backward pass
    multiplies them by the incoming gradient, or does nothing where that is 1. With
    ``reduction="none"``, in :func:`fastkd.token_log_probs` and in
    :func:`fastkd.chunk_log_likelihood` the backward pass computes the logits again. Where the heads
    of student and teacher are one tensor, their logits are one product.

    On the CPU, rows that are masked, ignored or of weight 0 are left out of the products. On CUDA
    they are only with ``compact=True``, because their number has to be read back.

    Memory beyond the inputs: the logits of a chunk on each side, a gradient of ``hidden``, and the
    gradient of the weight in float32. On the CPU the memory of a chunk is kept for the next call;
    :func:`fastkd.release_memory` frees it.

    With ``group=`` in the op, the weight and bias are this process's rows of a head that is split
    across the processes of the group (``[vocab / processes, features]``), of each side; the hidden
    states are the same on all processes. The op's collectives (of ``softmax_divergence`` two
    all-gathers) are done for each chunk of rows, as a row's gradient overwrites its logits before
    the next chunk. The gradients of weights and biases are those of this process's rows. Those of
    hidden states are the same on all processes: one all-reduce in float32, 4 bytes a feature, sums
    them over the group (see ``reduce_hidden_grad``). What decides about chunks must be the same on
    all processes: ``chunk_size``, ``compact``, dtypes, which tensors require gradients, masks and
    labels.

    Inside :class:`torch.autocast`, hidden states, weight and bias are cast as
    :func:`torch.nn.functional.linear` casts them. Under ``torch.func`` transforms, which ``group``
    does not take, and for second derivatives the logits are stored whole, see :meth:`logits`.

    Args:
        hidden: ``[..., features]`` float32, bfloat16, float16 or float64. The leading dimensions
            are rows (tokens).
        weight: ``[vocab, features]``, of the dtype of ``hidden``. A DTensor where tensor
            parallelism splits the vocabulary: Shard(0) over at most one dimension of the mesh, over
            which ``hidden``, a DTensor on that mesh, is replicated; where the mesh shards the rows
            of ``hidden``, the weight is replicated. A weight that data parallelism shards (FSDP2)
            is an error: run the loss inside the forward of the module that owns it, with
            :func:`fastkd.integrations.call_through`.
        bias: ``[vocab]``, or None. A DTensor placed as the weight where that is one.
        scale: s, a number.
        softcap: c, a positive number, or None for none. It is an error to give ``logit_softcap``
            to the op, too.
        logits_dtype: of a chunk's logits. None: float32 for 16-bit weights, the weight's dtype
            else. 16-bit logits save memory, and time where the machine multiplies such matrices
            faster and has no products of them with float32 results (a CPU with AVX512_FP16 and
            float16 heads); they spoil the gradient of a student near its teacher by up to 15 %.
        chunk_size: rows in a chunk. None: chosen so that the logits take about as much memory as
            the gradient of the weight.
            :func:`fastkd.chunk_log_likelihood` takes whole texts, at least one.
        compact: whether rows that are not read are left out of the products. None: on the CPU only.
        reduce_hidden_grad: with ``group`` or a weight that tensor parallelism splits, whether the
            gradients of the hidden states are summed over the processes. False where something
            before the head does that, such as the backward pass of the gather of Megatron's
            sequence parallelism (a reduce-scatter). Each process then has its part of the sum, in
            the dtype of ``hidden``; a DTensor gets a gradient with placement Partial. It changes
            nothing where the vocabulary is not split.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit each other.

    >>> import torch, fastkd
    >>> hidden = torch.tensor([[1.0, 2.0]], requires_grad=True)
    >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], requires_grad=True)
    >>> logits = fastkd.LinearLogits(hidden, weight)
    >>> logits.shape
    torch.Size([1, 3])
    >>> loss = fastkd.cross_entropy(logits, torch.tensor([1]))
    >>> round(loss.item(), 4)
    0.4076
    >>> loss.backward()
    >>> [round(x, 4) for x in hidden.grad[0].tolist()]
    [0.2447, -0.3348]
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        logits_dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
        compact: bool | None = None,
        reduce_hidden_grad: bool = True,
    ) -> None:
        self._set(hidden, weight, bias, scale, softcap)
        self.reduce_hidden_grad = to_flag("LinearLogits", "reduce_hidden_grad", reduce_hidden_grad)
        self.options = checked_options("LinearLogits", logits_dtype, chunk_size, compact)

    def _set(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Any,
        softcap: Any,
        called: tuple[str, str] = ("LinearLogits", ""),
    ) -> None:
        """Check and set. ``called``: the function, and what its arguments' names begin with."""
        function, side = called
        self.hidden, self.weight, self.bias, self.called = hidden, weight, bias, called
        placed = _is_placed(hidden) and _is_placed(weight)
        _check(function, f"{side}hidden", hidden, None, placed)
        _check(function, f"{side}weight", weight, 2, placed)
        if hidden.dim() < 1 or hidden.size(-1) != weight.size(1):
            raise ValueError(
                f"{function}: {side}hidden must have shape [..., {weight.size(1)}], as "
                f"{side}weight has shape {list(weight.shape)}; got shape {list(hidden.shape)}"
            )
        if bias is not None:
            _check(function, f"{side}bias", bias, 1, placed)
            if bias.size(0) != weight.size(0):
                raise ValueError(
                    f"{function}: {side}bias must have shape [{weight.size(0)}], got shape "
                    f"{list(bias.shape)}"
                )
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.device != hidden.device:
                raise ValueError(
                    f"{function}: {side}{name} must be on the device of {side}hidden, "
                    f"{hidden.device}, got {tensor.device}"
                )
        if placed:
            _check_placements(function, side, hidden, weight, bias)
        name = f"{side}scale" if side == "" else "logit_scale"
        self.scale = to_number(function, name, scale)
        # Logits are at least float32.
        type_ = torch.promote_types(hidden.dtype, torch.float32)
        if not torch.compiler.is_compiling() and not abs(self.scale) <= torch.finfo(type_).max:
            raise ValueError(f"{function}: {name} must be finite in {type_}, got {scale}")
        self.softcap: Any = None
        if softcap is not None:
            self.softcap = to_number(function, "softcap", softcap)
            if not torch.compiler.is_compiling() and not 0 < self.softcap < math.inf:
                raise ValueError(f"{function}: softcap must be positive and finite, got {softcap}")

    @property
    def placed(self) -> bool:
        """Whether it is of DTensors."""
        return _is_placed(self.weight)

    @property
    def device_mesh(self) -> Any:
        """That of its DTensors."""
        return self.weight.device_mesh  # type: ignore[attr-defined]

    @property
    def placements(self) -> tuple[Any, ...]:
        """Those of the logits, of DTensors."""
        from torch.distributed.tensor import Shard

        of_hidden: Any = self.hidden.placements  # type: ignore[attr-defined]
        of_weight: Any = self.weight.placements  # type: ignore[attr-defined]
        pairs = zip(of_hidden, of_weight, strict=True)
        return tuple(Shard(self.dim() - 1) if x == Shard(0) else rows for rows, x in pairs)

    def to_local(self) -> "LinearLogits":
        """The same of this process's parts; their gradients become those of the DTensors."""
        hidden: Any = self.hidden

        def local(x: Any) -> Any:
            from torch.distributed.tensor import Partial

            # Processes with other rows have other parts of the gradient.
            pairs = zip(hidden.placements, x.placements, strict=True)
            parts = [Partial("sum") if rows.is_shard() else own for rows, own in pairs]
            # The backward pass of this one sums them.
            return x.redistribute(placements=x.placements).to_local(grad_placements=parts)

        bias = None if self.bias is None else local(self.bias)
        return self.replaced(self._local_hidden(), local(self.weight), bias)

    def _local_hidden(self) -> Tensor:
        """This process's hidden states; their gradient may be a part of a sum over processes."""
        from torch.distributed.tensor import Partial

        hidden: Any = self.hidden
        if self.reduce_hidden_grad:
            return hidden.to_local()
        of_weight: Any = self.weight.placements  # type: ignore[attr-defined]
        pairs = zip(hidden.placements, of_weight, strict=True)
        parts = [Partial("sum") if own.is_shard() else rows for rows, own in pairs]
        return hidden.to_local(grad_placements=parts)

    @property
    def shape(self) -> torch.Size:
        """That of the logits, ``[..., vocab]``."""
        return torch.Size((*self.hidden.shape[:-1], self.weight.size(0)))

    @property
    def dtype(self) -> torch.dtype:
        """That of the logits, outside of autocast."""
        return logits_dtype_of(self.hidden, self.options[0])

    @property
    def device(self) -> torch.device:
        """That of the hidden states."""
        return self.hidden.device

    @property
    def requires_grad(self) -> bool:
        """Whether hidden states, weight or bias require a gradient."""
        return any(x is not None and x.requires_grad for x in (self.hidden, self.weight, self.bias))

    def __repr__(self) -> str:
        """Sizes and dtypes, and what is not as by default."""
        of = self.hidden
        words = [f"shape={list(self.shape)}", f"features={of.size(-1)}", f"dtype={of.dtype}"]
        words += [f"device='{self.device}'", f"bias={self.bias is not None}"]
        words += [f"scale={self.scale}"] if self.scale != 1 else []
        words += [f"softcap={self.softcap}"] if self.softcap is not None else []
        return f"LinearLogits({', '.join(words)})"

    def dim(self) -> int:
        """Number of dimensions of the logits."""
        return self.hidden.dim()

    def size(self, dimension: int) -> int:
        """Size of a dimension of the logits."""
        return self.shape[dimension]

    def detach(self) -> "LinearLogits":
        """The same without gradients."""
        return self.replaced(
            self.hidden.detach(),
            self.weight.detach(),
            None if self.bias is None else self.bias.detach(),
        )

    def replaced(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> "LinearLogits":
        """The same logits of other tensors of the same shapes."""
        other = LinearLogits.__new__(LinearLogits)
        other.hidden, other.weight, other.bias = hidden, weight, bias
        other.scale, other.softcap, other.options = self.scale, self.softcap, self.options
        other.called, other.reduce_hidden_grad = self.called, self.reduce_hidden_grad
        return other

    def chosen(self, rows: Tensor, function: str) -> "LinearLogits":
        """The logits of these rows of the flattened leading dimensions.

        Where ``rows`` is -1, those of any row. A row out of range is an error on the CPU, else NaN.
        """
        hidden = self.hidden.reshape(-1, self.hidden.size(-1))
        count = hidden.size(0)
        wrong = (rows < -1) | (rows >= count)
        if can_be_read(rows) and bool(wrong.any()):
            flat = wrong.reshape(-1)
            row = int(flat.nonzero()[0])
            raise IndexError(
                f"{function}: teacher_rows must lie in [-1, {count}), got "
                f"{int(rows.reshape(-1)[row])} in row {row}"
            )
        if rows.device != hidden.device:
            raise ValueError(
                f"{function}: teacher_rows must be on the device of student_logits, "
                f"{hidden.device}, got {rows.device}"
            )
        shape = (*rows.shape, hidden.size(-1))
        if isinstance(count, int) and count == 0:
            found = hidden.new_zeros(shape)
        else:
            at = rows.reshape(-1).clamp(0, count - 1)
            found = hidden.index_select(0, at).view(shape)
        found = found.masked_fill(wrong.unsqueeze(-1), math.nan)
        return self.replaced(found, self.weight, self.bias)

    def logits(self) -> Tensor:
        """All logits, stored whole, in plain PyTorch: the definition.

        >>> import torch, fastkd
        >>> head = fastkd.LinearLogits(torch.ones(1, 2), torch.eye(2), scale=3.0)
        >>> head.logits().tolist()
        [[3.0, 3.0]]
        """
        found = self.uncapped_logits()
        return found if self.softcap is None else softcapped(found, self.softcap)

    def uncapped_logits(self) -> Tensor:
        """The same before the soft cap."""
        dtype = self.dtype
        with without_autocast(self.device):
            found = self.hidden.to(dtype) @ self.weight.to(dtype).mT * self.scale
            return (found if self.bias is None else found + self.bias).to(dtype)

    def prepared(self) -> "LinearLogits":
        """The same as products take it: cast where autocast is active, with dtypes that agree."""
        kind, (function, side) = self.device.type, self.called
        hidden, weight, bias = self.hidden, self.weight, self.bias
        if kind in _AUTOCAST and torch.is_autocast_enabled(kind):
            to = torch.get_autocast_dtype(kind)
            hidden = hidden if hidden.dtype == torch.float64 else hidden.to(to)
            weight = weight if weight.dtype == torch.float64 else weight.to(to)
        if hidden.dtype != weight.dtype:
            raise TypeError(
                f"{function}: {side}weight must have the dtype of {side}hidden, {hidden.dtype}, "
                f"got {weight.dtype}"
            )
        return self.replaced(hidden, weight, bias)


def without_autocast(device: torch.device) -> Any:
    """A context in which products have the dtypes that they are given."""
    if device.type not in _AUTOCAST:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def logits_dtype_of(hidden: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of logits: float32 of 16-bit hidden states, unless another one is wanted."""
    if wanted is not None:
        return wanted
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def softcapped(logits: Tensor, cap: Any) -> Tensor:
    """Cap tanh(logits / cap); infinite logits stay."""
    infinite = logits.isinf()
    finite = logits.masked_fill(infinite, 0)
    return torch.where(infinite, logits, cap * torch.tanh(finite / cap))


def checked_options(
    function: str, logits_dtype: Any, chunk_size: Any, compact: Any
) -> tuple[torch.dtype | None, int | None, bool | None]:
    """The options of products, checked."""
    if logits_dtype is not None and logits_dtype not in FLOATS:
        raise TypeError(
            f"{function}: logits_dtype must be float32, float64, bfloat16, float16 or None, got "
            f"{logits_dtype!r}"
        )
    if chunk_size is not None:
        chunk_size = to_integer(function, "chunk_size", chunk_size)
        if not chunk_size >= 1:
            raise ValueError(f"{function}: chunk_size must be positive, got {chunk_size}")
    if compact is not None:
        compact = to_flag(function, "compact", compact)
    return logits_dtype, chunk_size, compact


def _is_placed(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and type(tensor).__name__ == "DTensor"


_GATHER = (
    "run the loss inside the forward of the module that owns it, where it is gathered: "
    "fastkd.integrations.call_through(module, loss)"
)


_BOTH = (
    "Where tensor parallelism splits the vocabulary, hidden states and weight must both be "
    "DTensors (or pass the local tensors with group)"
)


def _check_placements(function: str, side: str, hidden: Any, weight: Any, bias: Any) -> None:
    """Raise unless each dimension of the mesh shards the vocabulary, rows, or nothing."""
    from torch.distributed.tensor import Replicate, Shard

    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.device_mesh != hidden.device_mesh:
            raise ValueError(
                f"{function}: {side}{name} must be on the mesh of {side}hidden, "
                f"{hidden.device_mesh}, got {x.device_mesh}"
            )
    if bias is not None and bias.placements != weight.placements:
        raise ValueError(
            f"{function}: {side}bias must have the placements of {side}weight, "
            f"{weight.placements}, got {bias.placements}"
        )
    last = hidden.dim() - 1
    for rows, own in zip(hidden.placements, weight.placements, strict=True):
        of_rows = type(rows) is Shard and rows.dim % hidden.dim() < last
        of_vocab = type(own) is Shard and own.dim % 2 == 0
        if of_vocab and of_rows:
            raise ValueError(
                f"{function}: a dimension of the mesh shards both {side}weight and the rows of "
                f"{side}hidden, placements {weight.placements} and {hidden.placements}, as data "
                f"parallelism does; {_GATHER}"
            )
        whole = type(rows) is Replicate
        if not ((of_vocab and whole) or (type(own) is Replicate and (whole or of_rows))):
            raise ValueError(
                f"{function}: each dimension of the mesh must shard the first dimension of "
                f"{side}weight, or leading dimensions of {side}hidden, or neither; got placements "
                f"{weight.placements} and {hidden.placements}"
            )


def _check(function: str, name: str, tensor: Any, dimensions: int | None, placed: bool) -> None:
    if _is_placed(tensor) != placed and isinstance(tensor, torch.Tensor):
        kind = "a DTensor, as the others are" if placed else "a plain tensor"
        advice = "" if placed else f"; {_GATHER}. {_BOTH}"
        raise TypeError(f"{function}: {name} must be {kind}, got {type(tensor).__name__}{advice}")
    if not (placed and _is_placed(tensor)):
        check_tensor(function, name, tensor)
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{function}: {name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}"
        )
    if dimensions is not None and tensor.dim() != dimensions:
        raise ValueError(
            f"{function}: {name} must have {dimensions} dimension{'s' * (dimensions > 1)}, got "
            f"shape {list(tensor.shape)}"
        )


def linear_side(
    function: str,
    side: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Any,
    options: tuple[Any, Any, Any],
    reduce_hidden_grad: bool,
) -> LinearLogits:
    """One side's logits by a function's own arguments, whose names begin with ``side``."""
    found = LinearLogits.__new__(LinearLogits)
    found._set(hidden, weight, bias, scale, None, (function, side))
    found.options, found.reduce_hidden_grad = options, reduce_hidden_grad
    return found


def check_logits(function: str, name: str, value: Any) -> None:
    """Raise unless the value is a plain tensor or logits of a linear head."""
    if not isinstance(value, LinearLogits):
        check_tensor(function, name, value)
