"""Conversion and checks of an op's arguments, by the schema of its raw op."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd._ops.library import CUDA_ARCHITECTURES, is_tracing

_PLAIN = (Tensor, torch.nn.Parameter)
_TENSOR, _OPTIONAL, _NUMBER, _INTEGER, _FLAG = "Tensor", "Optional[Tensor]", "float", "int", "bool"
_CHOICE = "choice"
_TENSORS = (_TENSOR, _OPTIONAL)
#: The type of most values of a kind, which need no check or conversion.
_USUAL = {_NUMBER: float, _OPTIONAL: type(None), _FLAG: bool}
_MOST = 2**63 - 1
_NUMBERS = (Real, torch.SymFloat, torch.SymInt)
#: Tensors of numbers that are checked although no row is read, and must be positive.
_POSITIVE = frozenset({"teacher_weights"})


def _parse_choices() -> dict[str, dict[str, int]]:
    """``{"op.field": {name: index}}``, from the lists in csrc/arguments/op.h."""
    found = {}
    for entry in torch.ops.fastkd._choices().rstrip(";").split(";"):
        field, names = entry.split("=")
        found[field] = {name: place for place, name in enumerate(names.split(","))}
    return found


CHOICES = _parse_choices()


def choices(op: str, field: str) -> tuple[str, ...]:
    """The allowed values of an op's string argument, for tests and benchmarks."""
    return tuple(CHOICES[f"{op}.{field}"])


def check_tensor(function: str, name: str, value: Any) -> None:
    """Raise unless the value is a dense, strided tensor and no wrapper subclass."""
    if (
        type(value) is Tensor
        and value.layout is torch.strided
        and not (value.is_quantized or value.is_nested)
    ):
        return
    check_dense(function, name, value)
    if type(value) not in _PLAIN and torch.utils._python_dispatch.is_traceable_wrapper_subclass(
        value
    ):
        raise TypeError(
            f"{function}: {name} must be a plain tensor, got {type(value).__name__}; pass its "
            "local or dense tensor"
        )


def check_dense(function: str, name: str, value: Any) -> None:
    """Raise unless the value is a dense, strided tensor; it may be a wrapper."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        found = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{function}: {name} must be a dense tensor, got {found}")
    if value.is_quantized:
        raise TypeError(f"{function}: {name} must be a plain tensor, got dtype {value.dtype}")


def check_no_gradient(function: str, **values: Any) -> None:
    """Raise if an argument requires a gradient that is not computed."""
    if not torch.is_grad_enabled():
        return
    for name, value in values.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{function}: {name} takes no gradient, but it requires one; detach it, or use "
                "reduction='none' and multiply the losses by it"
            )


def to_integer(function: str, name: str, value: Any) -> Any:
    """The integer in a Python or numpy number or a 0-d tensor."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{function}: {name} must be an integer, got {type(value).__name__}"
        ) from None


def to_number(function: str, name: str, value: Any) -> Any:
    """The number in a number or a tensor of one element; while tracing such a tensor itself."""
    if type(value) is float:
        return value
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{function}: {name} must be a number, got a tensor of shape {list(value.shape)}"
            )
        check_no_gradient(function, **{name: value})
        check_has_value(function, name, value)
        return value if is_tracing(value) else value.item()
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, _NUMBERS):
        raise TypeError(f"{function}: {name} must be a number, got {type(value).__name__}")
    if torch.compiler.is_compiling():
        return value
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{function}: {name} must be a finite number, got {value}") from None


def check_has_value(function: str, name: str, value: Tensor) -> None:
    """Raise if the value of a tensor cannot be read or has a derivative of any kind."""
    if torch.compiler.is_compiling():
        return
    if value.is_meta:
        raise ValueError(f"{function}: {name} must be on a device that holds values, got meta")
    if not has_values(value):
        raise ValueError(
            f"{function}: {name} takes no gradient, tangent or batch dimension; detach it and pass "
            "it as it is"
        )


def can_be_read(value: Tensor) -> bool:
    """Whether reading values neither waits for a device nor is part of a graph or a transform."""
    return (
        value.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not is_tracing(value)
        and has_values(value)
    )


def to_flag(function: str, name: str, value: Any) -> bool:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{function}: {name} must be True or False, got {type(value).__name__}")
    return bool(value)


class Arguments:
    """Converts the arguments of a public function to those of its raw op, in the schema's order.

    The type of each field is that of the schema. If the schema has a number ``x`` and a field
    ``xs``, the argument ``x`` may also be a tensor with one entry a row, which is passed as ``xs``.
    Losses over rows have the fields ``reduction``, ``denominator`` and ``normalizer``; the caller
    passes the first and the last. If the schema has the numbers ``student_x`` and ``teacher_x``,
    the argument is ``x``: a limit of each side's logits, see :meth:`_both_limits`.

    Args:
        name: of the raw op, and of the public function.
        differentiable: fields that may require a gradient.
        absent: the value for None, by field; the name of a field stands for that field's value.
    """

    def __init__(
        self,
        name: str,
        differentiable: Sequence[str] = (),
        absent: Mapping[str, Any] | None = None,
    ) -> None:
        self.function = name
        schema = getattr(torch.ops.fastkd, f"_{name}").default._schema
        kinds = {argument.name: str(argument.type) for argument in schema.arguments}
        self.traced = kinds.pop("traced", None) is not None
        kinds.pop("gradients", None)
        self.names = {
            field: CHOICES[f"{name}.{field}"] for field in kinds if f"{name}.{field}" in CHOICES
        }
        self.kinds = {
            field: _CHOICE if field in self.names else kind for field, kind in kinds.items()
        }
        self.fields = tuple(self.kinds)
        self.tensors = tuple(field for field, kind in self.kinds.items() if "Tensor" in kind)
        self.differentiable = tuple(self.fields.index(field) for field in differentiable)
        self._absent = {"vocab_size": -1, **(absent or {})}
        self._free = frozenset(differentiable)
        self._reduces = "denominator" in kinds
        self._each = {field: f"{field}s" for field in kinds if f"{field}s" in kinds}
        converters = {
            _CHOICE: self._choice,
            _INTEGER: self._integer,
            _NUMBER: self._number,
            _FLAG: self._flag,
            _TENSOR: self._tensor,
            _OPTIONAL: self._tensor,
        }
        self._plan = tuple(
            (field, _USUAL.get(kind), converters.get(kind, self._tensors))
            for field, kind in self.kinds.items()
        )

        self._limits = tuple(
            (field.removeprefix("student_"), field, field.replace("student", "teacher"))
            for field, kind in kinds.items()
            if kind == _NUMBER and field.startswith("student_")
        )
        ones = [*self._each.values(), *_POSITIVE.intersection(self.fields)]
        self._ones = [self.fields.index(field) for field in ones]
        #: The public argument of a field that has its tensor with one entry a row.
        self.called = {each: field for field, each in self._each.items()}

    def pack(self, rows: Tensor, given: dict[str, Any]) -> list[Any]:
        """Check the arguments and return those of the raw op up to ``traced``.

        ``rows``: the logits, whose leading dimensions are rows. ``given``: the public arguments by
        name, changed in place.
        """
        check_device_has_kernels(self.function, self.fields[0], rows)
        if self._reduces:
            self._reduce(rows, given)
        for name, student, teacher in self._limits:
            value = given.get(name)
            both = (math.inf, math.inf) if value is None else self._both_limits(name, value)
            given[student], given[teacher] = both
        packed = []
        for field, usual, convert in self._plan:
            value = given.get(field)
            packed.append(value if type(value) is usual else convert(field, value, rows, given))
        return packed

    def _tensor(self, field: str, value: Any, rows: Tensor, given: dict[str, Any]) -> Any:
        check_tensor(self.function, field, value)
        if field not in self._free and value.is_floating_point() and value.requires_grad:
            check_no_gradient(self.function, **{field: value})
        return value

    def _tensors(self, field: str, value: Any, rows: Tensor, given: dict[str, Any]) -> Any:
        for tensor in value or ():
            self._tensor(field, tensor, rows, given)
        return value

    def _flag(self, field: str, value: Any, rows: Tensor, given: dict[str, Any]) -> bool:
        return to_flag(self.function, field, value)

    def _number(self, field: str, value: Any, rows: Tensor, given: dict[str, Any]) -> Any:
        name = field
        if value is None:
            value = self._absent.get(field)
            if isinstance(value, str):
                name, value = value, given[value]
        if type(value) is float:
            return value
        each = self._each.get(field)
        if each is not None and isinstance(value, Tensor):
            check_tensor(self.function, name, value)
            check_no_gradient(self.function, **{name: value})
            if _has_tangent(value):
                check_has_value(self.function, name, value)
            if value.dim() == 0:
                if value.is_meta and not rows.is_meta:
                    check_has_value(self.function, name, value)
                number = value if value.is_floating_point() else value.to(torch.float64)
                value = number.to(rows.device).expand(rows.shape[:-1])
            given[each] = value
            return 1.0
        return to_number(self.function, name, value)

    def _integer(self, field: str, value: Any, rows: Tensor, given: dict[str, Any]) -> Any:
        if type(value) is int and 0 <= value <= _MOST:
            return value
        if value is None and field in self._absent:
            return self._absent[field]
        value = to_integer(self.function, field, value)
        if torch.compiler.is_compiling():
            return value
        if not -_MOST <= value <= _MOST:
            raise ValueError(f"{self.function}: {field} must fit into 64 bits, got {value}")
        if field == "vocab_size" and value < 0:
            raise ValueError(f"{self.function}: vocab_size must not be negative, got {value}")
        return value

    def _choice(self, field: str, value: Any, rows: Tensor, given: dict[str, Any]) -> int:
        try:
            return self.names[field][value]
        except (KeyError, TypeError):
            known = ", ".join(self.names[field])
        if not isinstance(value, str):
            raise TypeError(
                f"{self.function}: {field} must be a string, one of {known}; got "
                f"{type(value).__name__}"
            )
        raise ValueError(f"{self.function}: {field} must be one of {known}; got {value!r}")

    def _both_limits(self, name: str, value: Any) -> list[Any]:
        """The limits of the student's and the teacher's logits by an argument: a number or a pair.

        A number is for both sides. Limits are positive and finite; None in a pair is none, which
        is infinite. Without the teacher's logits there is no limit of the teacher.
        """
        alone = "teacher_logits" not in self.kinds
        sides = value if isinstance(value, (tuple, list)) else (value, None if alone else value)
        if len(sides) != 2 or (alone and sides[1] is not None):
            expected = "(number, None)" if alone else "a pair (student, teacher)"
            why = ", as the teacher's logits are not given" if alone else ""
            raise ValueError(
                f"{self.function}: {name} must be a number or {expected}{why}, got {value}"
            )
        both: list[Any] = [math.inf, math.inf]
        for side, one in enumerate(sides):
            if one is None:
                continue
            both[side] = number = to_number(self.function, name, one)
            if torch.compiler.is_compiling() or isinstance(number, Tensor):
                continue
            if not (number > 0 and math.isfinite(number)):
                raise ValueError(f"{self.function}: {name} must be positive and finite, got {one}")
        return both

    def _reduce(self, rows: Tensor, given: dict[str, Any]) -> None:
        """Replace the denominator by the normalizer: a number, or a tensor, without a sync."""
        normalizer, given["denominator"] = given.get("normalizer"), 1.0
        if normalizer is None:
            return
        self._choice("reduction", given["reduction"], rows, given)
        if given["reduction"] == "none":
            raise ValueError(
                f"{self.function}: normalizer has no meaning with reduction='none', which divides "
                "by nothing"
            )
        given["reduction"] = "sum"
        if isinstance(normalizer, Tensor):
            check_no_gradient(self.function, normalizer=normalizer)
            if not (normalizer.is_meta and rows.is_meta):
                check_has_value(self.function, "normalizer", normalizer)
            if normalizer.numel() != 1:
                raise ValueError(
                    f"{self.function}: normalizer must be a number or a 0-d tensor, got a tensor "
                    f"of shape {list(normalizer.shape)}"
                )
            given["normalizer"] = normalizer.detach().reshape(()).to(rows.device, torch.float64)
        else:
            number = to_number(self.function, "normalizer", normalizer)
            if not torch.compiler.is_compiling() and not number >= 0:
                raise ValueError(
                    f"{self.function}: normalizer must not be negative, got {normalizer}"
                )
            given["denominator"] = number
            given["normalizer"] = None

    def eager(self, packed: list[Any]) -> tuple[Any, ...]:
        """The packed arguments, with None for ``traced``."""
        return (*packed, None) if self.traced else tuple(packed)

    def graph(self, packed: list[Any]) -> tuple[Any, ...]:
        """The same while tracing: numbers are in a tensor, so that a graph works for all values."""
        if not self.traced:
            return tuple(packed)
        numbers = []
        packed = list(packed)
        for i, kind in enumerate(self.kinds.values()):
            if kind == _NUMBER:
                numbers.append(traced_number(packed[i]))
                packed[i] = 1.0
        return (*packed, torch.cat(numbers))

    def untraced(self, arguments: Sequence[Any]) -> list[Any]:
        """The inverse of :meth:`graph`: packed arguments, with numbers as numbers."""
        packed = list(arguments[: len(self.fields)])
        if self.traced and arguments[len(self.fields)] is not None:
            numbers = iter(arguments[len(self.fields)].tolist())
            for i, kind in enumerate(self.kinds.values()):
                if kind == _NUMBER:
                    packed[i] = next(numbers)
        return packed

    def emptied(self, packed: Sequence[Any]) -> list[Any]:
        """Arguments with the same shapes, types and numbers, masked so that no row is read.

        Tensors without values of their own, of a transform or on the meta device, become zeros.
        """

        def empty(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [empty(x) for x in value]
            if not isinstance(value, Tensor) or has_values(value):
                return value
            device = "cpu" if value.is_meta else value.device
            # Tables must be contiguous; logits need no memory.
            shape = () if value.is_floating_point() else value.shape
            return torch.zeros(shape, dtype=value.dtype, device=device).expand(value.shape)

        values = [empty(value) for value in packed]
        for place in self._ones:
            value = values[place]
            if value is not None and not has_values(packed[place]):
                # 1 is a valid temperature, beta and weight, also where no row is masked.
                one = torch.ones((), dtype=value.dtype, device=value.device)
                values[place] = one.expand(value.shape)
        if "mask" in self.fields:
            no_row = torch.zeros((), dtype=torch.bool, device=values[0].device)
            mask = values[self.fields.index("mask")]
            shape = values[0].shape[:-1] if mask is None else mask.shape
            if mask is None or mask.dtype == torch.bool:
                values[self.fields.index("mask")] = no_row.expand(shape)
        return values

    def unpack(self, packed: Sequence[Any]) -> dict[str, Any]:
        """Every field by name, for the definitions: choices as names."""
        values = dict(zip(self.fields, packed, strict=False))
        for field, names in self.names.items():
            values[field] = tuple(names)[values[field]]
        return values


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor is neither a transform's nor on the meta device."""
    return not (
        tensor.is_meta
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or _has_tangent(tensor)
    )


def _has_tangent(tensor: Tensor) -> bool:
    return (
        torch.autograd.forward_ad._current_level >= 0
        and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None
    )


def traced_number(value: Any) -> Tensor:
    """A number as a tensor of one element, which is no constant of the graph."""
    if isinstance(value, Tensor):
        return value.detach().reshape(1).to("cpu", torch.float64)
    # A product, as torch.full and torch.tensor would make the number a constant of the graph.
    return torch.ones(1, dtype=torch.float64, device="cpu") * value


def check_device_has_kernels(function: str, name: str, tensor: Tensor) -> None:
    if tensor.is_cuda and not CUDA_ARCHITECTURES:
        raise RuntimeError(
            f"{function}: {name} is a CUDA tensor, but this fastkd has no CUDA kernels; build it "
            "where nvcc is found: `pip install --no-build-isolation .`"
        )


def with_defaults(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a public function, with the defaults of those not given."""
    known = function.__kwdefaults__ or {}
    for name in options:
        if name not in known:
            raise TypeError(f"{function.__name__}: unknown argument {name!r}")
    return {**known, **options}


def numbers_tensor(function: str, name: str, values: Any, like: Tensor) -> Tensor:
    """A sequence or an array of numbers as a float64 tensor on the device of ``like``."""
    if isinstance(values, np.ndarray) and values.ndim == 1:
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise TypeError(
            f"{function}: {name} must be a tensor or a sequence of numbers, got "
            f"{type(values).__name__}"
        )
    numbers = [to_number(function, name, value) for value in values]
    if torch.compiler.is_compiling():  # numbers have no values that a check could read
        return torch.cat([traced_number(value) for value in numbers]).to(like.device)
    for number in numbers:
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"{function}: {name} must be finite, got {number}")
    with torch._C._DisableFuncTorch():  # a transform's tensor would have no values to check
        return torch.tensor(numbers, dtype=torch.float64, device=like.device)
