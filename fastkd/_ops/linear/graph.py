"""The ops ``fastkd::linear`` and ``fastkd::linear_backward``: a call as one node of a graph.

A call is encoded as a text that says where everything is, the tensors, the integers, and a tensor
of the numbers. A graph is therefore made once for each kind of call, for all sizes and numbers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.arguments import traced_number
from fastkd._ops.checks import check_devices
from fastkd._ops.gradient import differentiable_gradients, product
from fastkd._ops.library import is_tracing
from fastkd._ops.linear import products
from fastkd._ops.linear.call import OPS, Call, Side, stand_in
from fastkd._ops.linear.driver import (
    Results,
    half,
    loss_dtype,
    run_backward,
    run_loss,
    run_rows,
)
from fastkd._ops.linear.logits import LinearLogits
from fastkd._ops.linear.stats import shapes
from fastkd._ops.shards import Shards, group_name

_DTYPES = {
    "d": torch.float64,
    "s": torch.float32,
    "b": torch.bfloat16,
    "h": torch.float16,
    "-": None,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_COMPACT = {None: "-", False: "n", True: "y"}

Encoded = tuple[str, list[Tensor], list[int], Tensor]


class _Writer:
    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.integers: list[Any] = []
        self.numbers: list[Any] = []

    def side(self, side: Side) -> str:
        linear = side.linear
        self.tensors += [linear.hidden, linear.weight]
        if linear.bias is not None:
            self.tensors.append(linear.bias)
        self.numbers += [linear.scale, 1.0 if side.cap is None else side.cap]
        bias = "n" if linear.bias is None else "y"
        cap = "n" if side.cap is None else "y"
        reduced = "y" if linear.reduce_hidden_grad else "n"
        return f"L{bias}{cap}{_CODES[linear.options[0]]}{reduced}"

    def value(self, value: Any, kind: str) -> str:
        if value is None:
            return "N"
        if isinstance(value, Tensor) and kind != "float":
            self.tensors.append(value)
            return "T"
        if kind == "float":
            self.numbers.append(value)
            return "F"
        if isinstance(value, bool):
            return "1" if value else "0"
        if kind == "choice":
            return f"C{value}"
        self.integers.append(value)
        return "I"


def encode(call: Call) -> Encoded:
    """The call as arguments of a raw op."""
    writer, words = _Writer(), []
    sides = {(side.place, side.item): side for side in call.sides}
    for place, kind in enumerate(call.op.arguments.kinds.values()):
        value = call.packed[place]
        if (place, None) in sides:
            words.append(writer.side(sides[place, None]))
        elif isinstance(value, (list, tuple)):
            inner = [
                writer.side(sides[place, item])
                if (place, item) in sides
                else writer.value(each, kind)
                for item, each in enumerate(value)
            ]
            words.append("[" + " ".join(inner) + "]")
        else:
            words.append(writer.value(value, kind))
    chunk = "n" if call.chunk_size is None else "y"
    if call.chunk_size is not None:
        writer.integers.append(call.chunk_size)
    options = f"{chunk}{_COMPACT[call.compact]}{'y' if call.stats else 'n'}"
    shards, split = call.shards, "-"
    if shards is not None:
        split = f"{shards.function}/{shards.size}/{group_name(shards.group)}"
        writer.integers += [shards.start, shards.columns, shards.vocab]
    layout = "|".join([call.op.name, options, split, *words])
    numbers = [traced_number(x) for x in writer.numbers]
    numbers.append(torch.ones(1, dtype=torch.float64, device="cpu"))
    return layout, writer.tensors, writer.integers, torch.cat(numbers)


def decode(layout: str, tensors: Sequence[Any], integers: Sequence[Any], numbers: Any) -> Call:
    """The call of :func:`encode`. ``numbers``: a list, or None where their values are unknown."""
    name, options, split, *words = layout.split("|")
    op, sides = OPS[name], []
    tensor, integer = iter(tensors), iter(integers)
    number = iter([1.0] * 64 if numbers is None else numbers)

    def side(word: str, place: int, item: int | None) -> Tensor:
        hidden, weight = next(tensor), next(tensor)
        linear = LinearLogits.__new__(LinearLogits)
        linear.hidden, linear.weight = hidden, weight
        linear.bias = next(tensor) if word[1] == "y" else None
        linear.scale, cap = next(number), next(number)
        linear.softcap, linear.called = None, (name, "")
        linear.options = (_DTYPES[word[3]], None, None)
        linear.reduce_hidden_grad = word[4] == "y"
        sides.append(Side(place, item, linear, cap if word[2] == "y" else None))
        return stand_in(linear)

    def value(word: str, place: int, item: int | None = None) -> Any:
        if word[0] == "L":
            return side(word, place, item)
        if word == "T":
            return next(tensor)
        if word == "F":
            return next(number)
        if word == "I":
            return next(integer)
        if word[0] == "C":
            return int(word[1:])
        return None if word == "N" else word == "1"

    packed: list[Any] = []
    for place, word in enumerate(words):
        if word[0] == "[":
            inner = word[1:-1].split()
            packed.append([value(each, place, item) for item, each in enumerate(inner)])
        else:
            packed.append(value(word, place))
    chunk = next(integer) if options[0] == "y" else None
    compact = {"-": None, "n": False, "y": True}[options[1]]
    shards = None
    if split != "-":
        function, size, group = split.split("/", 2)
        shards = Shards(function, group, int(size), next(integer), next(integer), next(integer))
    return Call(op, packed, sides, (chunk, compact), options[2] == "y", shards)


def wanted_text(wanted: Sequence[bool]) -> str:
    """Which slots' gradients are wanted, as the ops take it."""
    return "".join("1" if want else "0" for want in wanted)


def _flags(call: Call, wanted: str) -> list[bool]:
    """The inverse; an empty text stands for none."""
    return [each == "1" for each in wanted] or [False] * len(call.slots)


# --- The ops. A loss returns the loss, a pending factor (empty: 1), the statistics where wanted,
# and the gradients that are wanted; another op returns its results.


def _linear(
    layout: str, tensors: list[Tensor], integers: list[int], numbers: Tensor, wanted: str
) -> list[Tensor]:
    call = decode(layout, tensors, integers, numbers.tolist())
    if call.kind != "loss":
        return list(run_rows(call))
    return flat_results(run_loss(call, _flags(call, wanted)), call)


def flat_results(results: Results, call: Call) -> list[Tensor]:
    """A loss's results as the op returns them."""
    pending = results.pending
    if pending is None:
        pending = torch.empty(0, dtype=torch.float32, device=call.rows.device)
    return [
        results.loss,
        pending,
        *results.stats,
        *(x for x in results.gradients if x is not None),
    ]


def _linear_backward(
    layout: str,
    tensors: list[Tensor],
    integers: list[int],
    numbers: Tensor,
    wanted: str,
    gradients: list[Tensor],
) -> list[Tensor]:
    call = decode(layout, tensors, integers, numbers.tolist())
    found = run_backward(call, gradients, _flags(call, wanted))
    return [x for x in found if x is not None]


def _fake_gradients(call: Call, wanted: str) -> list[Tensor]:
    found = []
    for slot, tensor, want in zip(call.slots, call.inputs(), _flags(call, wanted), strict=True):
        if want and tensor is not None:
            by_row = slot.part in ("hidden", "rows")
            dtype = tensor.dtype if by_row else products.sum_dtype(tensor.dtype)
            found.append(tensor.new_empty(tensor.shape, dtype=dtype))
    return found


def _checked(call: Call) -> None:
    arguments = call.op.arguments
    values = dict(zip(arguments.fields, call.packed, strict=False))
    check_devices(arguments.function, values, arguments.tensors, arguments.called)


def _fake(
    layout: str, tensors: list[Tensor], integers: list[Any], numbers: Tensor, wanted: str
) -> list[Tensor]:
    call = decode(layout, tensors, integers, None)
    _checked(call)
    op, rows = call.op, call.rows
    if call.kind != "loss":
        fields = dict(zip(op.arguments.fields, call.packed, strict=False))
        return list(op.fake(**fields)[: op.results])
    names = tuple(op.arguments.names["reduction"])
    none = names[call.value("reduction")] == "none"
    wait = not none and any(_flags(call, wanted)) and half(call, _flags(call, wanted))
    return [
        rows.new_empty(rows.shape[:-1] if none else (), dtype=loss_dtype(call)),
        rows.new_empty(() if wait else (0,), dtype=torch.float32),
        *(shapes(call) if call.stats else ()),
        *_fake_gradients(call, wanted),
    ]


def _fake_backward(
    layout: str,
    tensors: list[Tensor],
    integers: list[Any],
    numbers: Tensor,
    wanted: str,
    gradients: list[Tensor],
) -> list[Tensor]:
    return _fake_gradients(decode(layout, tensors, integers, None), wanted)


_ARGUMENTS = "str layout, Tensor[] tensors, SymInt[] integers, Tensor numbers, str wanted"
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library = torch.library.Library("fastkd", "FRAGMENT")
_library.define(f"linear({_ARGUMENTS}) -> Tensor[]", tags=_TAGS)
_library.define(f"linear_backward({_ARGUMENTS}, Tensor[] gradients) -> Tensor[]", tags=_TAGS)
_library.impl("linear", _linear, "CompositeExplicitAutograd")
_library.impl("linear_backward", _linear_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fastkd::linear", _fake)
torch.library.register_fake("fastkd::linear_backward", _fake_backward)


def trace(call: Call, wanted: Sequence[bool]) -> list[Tensor]:
    """The call as a node of a graph."""
    text = "" if call.again or not any(wanted) else wanted_text(wanted)
    return torch.ops.fastkd.linear(*encode(call), text)


def _context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    layout, tensors, integers, numbers, wanted = inputs
    ctx.layout, ctx.integers, ctx.wanted = layout, list(integers), wanted
    ctx.count = len(tensors)
    ctx.set_materialize_grads(False)
    results = output if wanted else []
    # Autograd cannot save tensors made under torch.inference_mode.
    ctx.unsaved = [x if x.is_inference() else None for x in tensors]
    saved = [None if x.is_inference() else x for x in tensors]
    ctx.save_for_backward(numbers, *saved, *results)


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    numbers, *saved = ctx.saved_tensors
    tensors, results = saved[: ctx.count], saved[ctx.count :]
    tensors = [y if x is None else x for x, y in zip(tensors, ctx.unsaved, strict=True)]
    needs = ctx.needs_input_grad[1]
    needs = [needs] * ctx.count if isinstance(needs, bool) else list(needs)
    found: list[Tensor | None] = [None] * ctx.count
    tracing = is_tracing(numbers)
    call = decode(ctx.layout, tensors, ctx.integers, None if tracing else numbers.tolist())
    places = _places(call, tensors)
    wanted = [place is not None and bool(needs[place]) for place in places]
    if any(g is not None for g in grads):
        if torch.is_grad_enabled() and not tracing:
            gradients = by_definition(call, grads, wanted)
        else:
            gradients = _gradients(ctx, call, grads, wanted, numbers, tensors, results)
        for place, gradient in zip(places, gradients, strict=True):
            if place is not None and gradient is not None:
                found[place] = gradient.to(tensors[place].dtype)
    return None, found, None, None, None


def _places(call: Call, tensors: Sequence[Tensor]) -> list[int | None]:
    """The place of each slot's tensor among the tensors."""
    at = {id(x): i for i, x in reversed(list(enumerate(tensors)))}
    found: list[int | None] = []
    seen: dict[int, int] = {}
    for x in call.inputs():
        if x is None:
            found.append(None)
            continue
        # A tensor that is given twice has two places.
        later = [i for i, y in enumerate(tensors) if y is x and i >= seen.get(id(x), 0)]
        place = later[0] if later else at[id(x)]
        seen[id(x)] = place + 1
        found.append(place)
    return found


def _gradients(
    ctx: Any,
    call: Call,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
    numbers: Tensor,
    tensors: Sequence[Tensor],
    results: Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradients of the slots: those computed with the loss, or computed now."""
    stored = _flags(call, ctx.wanted)
    if ctx.wanted and all(s or not w for s, w in zip(stored, wanted, strict=True)):
        grad = grads[0]
        if grad is None:
            return [None] * len(wanted)
        pending, computed = results[1], iter(results[2 + 2 * call.stats :])
        if pending.numel():
            grad = grad * pending
        ready = [next(computed) if s else None for s in stored]
        return [
            product(x, grad) if w and x is not None else None
            for w, x in zip(wanted, ready, strict=True)
        ]
    given = list(grads[:1]) if call.kind == "loss" else list(grads)
    like = results if results else None
    if like is None and any(g is None for g in given):
        like = _fake(ctx.layout, list(tensors), ctx.integers, numbers, "")
    filled = [
        torch.zeros_like(like[i]) if g is None and like is not None else g
        for i, g in enumerate(given)
    ]
    backward = torch.ops.fastkd.linear_backward
    computed = backward(
        ctx.layout, list(tensors), ctx.integers, numbers, wanted_text(wanted), filled
    )
    found = iter(computed)
    return [next(found) if w else None for w in wanted]


def by_definition(
    call: Call, grads: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of the slots by the definition, which can be differentiated again."""
    inputs = call.inputs()
    with torch.enable_grad():
        results = call.define()
    results = (results,) if isinstance(results, Tensor) else results
    constant = getattr(call.op, "constant", ())
    pairs = [
        (result, grad)
        for i, (result, grad) in enumerate(zip(results, grads, strict=False))
        if i not in constant and result is not None and grad is not None
    ]
    if not pairs:
        return [None] * len(inputs)
    outputs, cotangents = zip(*pairs, strict=True)
    needs = [w and x is not None for w, x in zip(wanted, inputs, strict=True)]
    return list(differentiable_gradients(outputs, inputs, needs, cotangents))  # type: ignore[arg-type]


torch.library.register_autograd("fastkd::linear", _backward, setup_context=_context)
