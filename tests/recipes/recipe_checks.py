"""What every recipe over rows promises, tested from an entry: its call, a problem, its definition.

A file of tests has its entries in a list and the line `test_promises = promises(ENTRIES)`.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import logits, relative_error
from torch._dynamo.testing import CompileCounter
from wrong_values import unclear

from fastkd import recipes

TEXTS, LENGTH, VOCAB = 3, 5, 11
#: Of values and gradients, relative: by dtype of the inputs.
ERRORS = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 1e-2}
ROW_REDUCTIONS = ("none", "sum", "mean", "batchmean", "elementmean", "sequence_mean")

Tensors = dict[str, Any]


def problem(dtype: torch.dtype, *extra: str) -> Tensors:
    """Logits of both sides and a mask: all rows of a text, some, one; and what `extra` names."""
    length = torch.tensor([[LENGTH], [LENGTH - 2], [1]])
    found: Tensors = {
        "student_logits": logits((TEXTS, LENGTH, VOCAB), dtype, 1.5),
        "teacher_logits": logits((TEXTS, LENGTH, VOCAB), dtype, 1.5),
        "mask": torch.arange(LENGTH) < length,
    }
    found["mask"][0, 1] = False
    makers = {
        "labels": lambda: torch.randint(0, VOCAB, (TEXTS, LENGTH)),
        "reference_logits": lambda: logits((TEXTS, LENGTH, VOCAB), dtype, 1.5),
        "weight": lambda: torch.rand(TEXTS, LENGTH),
    }
    for name in extra:
        found[name] = makers[name]()
    if "labels" in extra:
        found["labels"][0, 2] = -100
    return found


def with_(*extra: str) -> Callable[[torch.dtype], Tensors]:
    return lambda dtype: problem(dtype, *extra)


def kept_of(tensors: Tensors) -> torch.Tensor:
    """Rows that count."""
    if "mask" in tensors:
        kept = tensors["mask"]
    else:
        kept = torch.ones(tensors["student_logits"].shape[:-1], dtype=torch.bool)
    return kept & (tensors["labels"] != -100) if "labels" in tensors else kept


def by_rows(row: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Losses of all rows from the definition of one, in loops; 0 where a row does not count."""

    def losses(tensors: Tensors, **options: Any) -> torch.Tensor:
        kept, found = kept_of(tensors), []
        leading = kept.shape
        for place in torch.cartesian_prod(*(torch.arange(n) for n in leading)).tolist():
            at = tuple(place)
            mine = {
                name: x[at] if isinstance(x, torch.Tensor) and x.shape[: len(at)] == leading else x
                for name, x in tensors.items()
                if name not in ("mask", "weight")
            }
            value = row(**mine, **options) if kept[at] else torch.zeros(()).double()
            found.append(value * tensors["weight"][at] if "weight" in tensors else value)
        return torch.stack(found).view(leading)

    return losses


def at_once(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """What the call returns, from a definition that takes the arguments by name."""
    return lambda tensors, **options: function(**tensors, **options)


#: Recipes that torch.func does not differentiate (ernie_tiny: with logits), as ops take no
#: normalizer of a transform.
COUNTED_BY_VALUES = ("ernie_tiny", "fspad", "quantized_distillation")


@dataclass(frozen=True)
class Entry:
    """A call of a recipe with its definition.

    `losses(tensors, **options)`, in float64: the loss of each row, or what the call returns if
    `reductions` is empty.
    """

    name: str
    losses: Callable[..., torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    #: From a dtype, the tensors by argument.
    problem: Callable[[torch.dtype], Tensors] = problem
    #: Arguments that get a gradient.
    leaves: tuple[str, ...] = ("student_logits",)
    reductions: tuple[str, ...] = ROW_REDUCTIONS
    #: The reduction that the published method has.
    default: str = "mean"
    #: Published numbers by argument, as the signature must have them.
    published: dict[str, Any] = field(default_factory=dict)
    compiled: bool = True
    #: Which rows a mean counts, where that is not all that count.
    counted: Callable[[Tensors], torch.Tensor] = kept_of
    #: Which rows are read; None: the call has no mask that leaves rows out.
    read: Callable[[Tensors], torch.Tensor] | None = kept_of
    #: Whether it has second derivatives that are not 0.
    twice: bool = True
    #: Of gradients in bfloat16, relative.
    bf16_error: float = ERRORS[torch.bfloat16]

    def call(self, tensors: Tensors, **options: Any) -> torch.Tensor:
        return getattr(recipes, self.name)(**tensors, **{**self.options, **options})

    def definition(self, tensors: Tensors) -> torch.Tensor:
        return self.losses(in_float64(tensors), **self.options)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{x}" for x in self.options.values())])


def mapped(function: Callable[[torch.Tensor], torch.Tensor], tensors: Tensors) -> Tensors:
    """The tensors changed, also in lists and tuples."""

    def one(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            parts = [one(y) for y in x]
            return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
        return function(x) if isinstance(x, torch.Tensor) else x

    return {name: one(x) for name, x in tensors.items()}


def in_float64(tensors: Tensors) -> Tensors:
    return mapped(lambda x: x.double() if x.is_floating_point() else x, tensors)


def with_leaves(entry: Entry, tensors: Tensors) -> Tensors:
    leaves = {name: tensors[name].detach().clone().requires_grad_() for name in entry.leaves}
    return {**tensors, **leaves}


def gradients(entry: Entry, tensors: Tensors, loss: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensors[name] for name in entry.leaves]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def reduced(losses: torch.Tensor, counted: torch.Tensor, reduction: str) -> torch.Tensor:
    """The published reductions in loops."""
    if reduction == "none":
        return losses
    if reduction == "sequence_mean":
        texts = [sum(row) / max(1, int(n.sum())) for row, n in zip(losses, counted, strict=True)]
        return sum(texts) / len(texts)
    total = sum(losses.flatten())
    if reduction == "mean":
        return total / max(1, int(counted.sum()))
    if reduction == "batchmean":
        return total / len(losses)
    return total / (losses.numel() * VOCAB) if reduction == "elementmean" else total


def compare(entry: Entry, dtype: torch.dtype, reduction: str | None, **options: Any) -> None:
    error = ERRORS[dtype]
    tensors = with_leaves(entry, entry.problem(dtype))
    exact = with_leaves(entry, in_float64(tensors))
    right = entry.definition(exact)
    if reduction is not None:
        options["reduction"] = reduction
    if reduction is not None or entry.reductions:
        right = reduced(right, entry.counted(exact), reduction or entry.default)
    found = entry.call(tensors, **options)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), right, rtol=error, atol=error)
    factors = torch.rand(found.shape, dtype=torch.float64) + 0.5
    mine = gradients(entry, tensors, (found * factors).sum())
    true = gradients(entry, exact, (right * factors).sum())
    allowed = entry.bf16_error if dtype == torch.bfloat16 else error
    for one, other in zip(mine, true, strict=True):
        assert other.any()
        assert relative_error(one, other) < allowed


def check_float64(entry: Entry) -> None:
    compare(entry, torch.float64, None)
    if "none" in entry.reductions:
        compare(entry, torch.float64, "none")


def check_second_derivatives(entry: Entry) -> None:
    """Products with the second derivatives, whose constants are the definition's constants."""
    if not entry.twice:
        return
    tensors = with_leaves(entry, entry.problem(torch.float64))
    right = entry.definition(tensors)
    if entry.reductions:
        right = reduced(right, entry.counted(tensors), entry.default)
    leaves = [tensors[name] for name in entry.leaves]
    directions = [torch.randn_like(x) for x in leaves]
    products = []
    for loss in (entry.call(tensors), right):
        first = torch.autograd.grad(loss.sum(), leaves, create_graph=True)
        along = sum((g * v).sum() for g, v in zip(first, directions, strict=True))
        products.append(torch.autograd.grad(along, leaves))
    for one, other in zip(*products, strict=True):
        assert other.any()
        assert relative_error(one, other) < 1e-7


def check_float32(entry: Entry) -> None:
    compare(entry, torch.float32, None)


def check_bfloat16(entry: Entry) -> None:
    compare(entry, torch.bfloat16, None)


def check_reductions(entry: Entry) -> None:
    if not entry.reductions:
        return
    tensors = entry.problem(torch.float64)
    losses, counted = entry.definition(tensors), entry.counted(tensors)
    for reduction in entry.reductions:
        found = entry.call(tensors, reduction=reduction)
        torch.testing.assert_close(found, reduced(losses, counted, reduction), rtol=1e-9, atol=1e-9)
    for seven in (7.0, torch.tensor(7)):
        found = entry.call(tensors, normalizer=seven, reduction="sum")
        torch.testing.assert_close(found, losses.sum() / 7, rtol=1e-9, atol=1e-9)


def check_masked_rows_are_not_read(entry: Entry) -> None:
    """NaN there changes nothing and has a zero gradient; tensors are views of longer ones."""
    if entry.read is None:
        return
    tensors = with_leaves(entry, entry.problem(torch.float32))
    kept = entry.read(tensors)
    right = entry.call(tensors)
    poison = torch.where(kept, 0, math.nan)

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point() or x.shape[: kept.dim()] != kept.shape:
            return x
        longer = torch.cat([x.detach(), torch.full_like(x[:, :1], math.nan)], 1)
        longer += torch.cat([poison, poison[:, :1]], 1).view(
            *longer.shape[:2], *[1] * (x.dim() - 2)
        )
        return longer[:, :-1].requires_grad_(x.requires_grad)

    bad = mapped(poisoned, tensors)
    found = entry.call(bad)
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-7)
    both = gradients(entry, bad, found), gradients(entry, tensors, right)
    for one, other in zip(*both, strict=True):
        assert not one[~kept].any()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def with_unread_rows_spoilt(entry: Entry) -> tuple[Tensors, torch.Tensor, torch.Tensor]:
    """A problem with NaN in the rows that have no gradient; its loss and gradient before that."""
    tensors = with_leaves(entry, entry.problem(torch.float32))
    right = entry.call(tensors)
    (gradient,) = torch.autograd.grad(right, tensors["student_logits"])
    read = gradient.any(-1)
    assert read.any()
    assert not read.all()
    with torch.no_grad():
        tensors["student_logits"][~read] = math.nan
        tensors["teacher_logits"][:, -1] = math.nan  # scores what follows the text
    return tensors, right, gradient


def check_no_rows(entry: Entry) -> None:
    if entry.read is None:
        return
    tensors = with_leaves(entry, entry.problem(torch.float32))
    tensors["mask"] = torch.zeros_like(kept_of(tensors))
    loss = entry.call(tensors)
    assert loss == 0
    for gradient in gradients(entry, tensors, loss):
        assert not gradient.any()


def check_no_texts(entry: Entry) -> None:
    """None at all, or all of length 0."""
    if entry.read is None:
        return
    tensors = entry.problem(torch.float32)
    shape = kept_of(tensors).shape
    for dim in range(2):
        shorter = mapped(
            lambda x, dim=dim: x.narrow(dim, 0, 0) if x.shape[:2] == shape else x, tensors
        )
        shorter = with_leaves(entry, shorter)
        loss = entry.call(shorter, reduction="sum") if entry.reductions else entry.call(shorter)
        assert loss == 0
        for gradient in gradients(entry, shorter, loss):
            assert gradient.shape[dim] == 0


def check_autocast(entry: Entry) -> None:
    """Inputs are read as they are, and the arithmetic stays in their precision or float32."""
    tensors = with_leaves(entry, entry.problem(torch.float32))
    right = entry.call(tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = entry.call(tensors)
    assert torch.equal(found, right)
    both = (gradients(entry, tensors, x.sum()) for x in (found, right))
    for one, other in zip(*both, strict=True):
        assert torch.equal(one, other)


def check_meta_tensors(entry: Entry) -> None:
    """Shapes alone, as where a model is built without memory."""
    tensors = with_leaves(entry, entry.problem(torch.float32))
    right = entry.call(tensors)
    found = entry.call(mapped(lambda x: x.detach().to("meta"), tensors))
    assert found.is_meta
    assert (found.shape, found.dtype) == (right.shape, right.dtype)


def check_inference_tensors(entry: Entry) -> None:
    """What no gradient flows to may come from inference mode, as teachers run there."""
    tensors = with_leaves(entry, entry.problem(torch.float32))
    right = entry.call(tensors)
    with torch.inference_mode():
        others = mapped(torch.clone, {k: v for k, v in tensors.items() if k not in entry.leaves})
    given = {**tensors, **others}
    found = entry.call(given)
    assert torch.equal(found, right)
    both = ([*gradients(entry, x, y.sum())] for x, y in ((given, found), (tensors, right)))
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other)


def check_torch_func(entry: Entry) -> None:
    """The gradient of torch.func is autograd's; of recipes COUNTED_BY_VALUES an error says why."""
    tensors = with_leaves(entry, entry.problem(torch.float32))
    expected = gradients(entry, tensors, entry.call(tensors).sum())

    def loss(leaves: Tensors) -> torch.Tensor:
        return entry.call({**tensors, **leaves}).sum()

    leaves = {name: tensors[name].detach() for name in entry.leaves}
    refused = ""
    try:
        found = torch.func.grad(loss)(leaves)
    except ValueError as error:
        if entry.name not in COUNTED_BY_VALUES:
            raise
        refused = str(error)
    if refused:
        assert "normalizer takes no gradient, tangent or batch dimension" in refused
        return
    for name, gradient in zip(entry.leaves, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def check_wrong_values(entry: Entry) -> None:
    given = {**entry.problem(torch.float32), **entry.options}
    if "student_0" not in given:  # lists that the entry's own call makes
        assert unclear(getattr(recipes, entry.name), given) == []


def check_published_numbers(entry: Entry) -> None:
    parameters = inspect.signature(getattr(recipes, entry.name)).parameters
    found = {name: parameters[name].default for name in entry.published}
    assert found == entry.published
    if "reduction" in parameters:
        assert parameters["reduction"].default == entry.default


CHECKS = (
    check_float64,
    check_second_derivatives,
    check_float32,
    check_bfloat16,
    check_reductions,
    check_masked_rows_are_not_read,
    check_no_rows,
    check_no_texts,
    check_autocast,
    check_meta_tensors,
    check_inference_tensors,
    check_torch_func,
    check_wrong_values,
    check_published_numbers,
)


def promises(entries: list[Entry]) -> Callable[..., None]:
    """A test of all checks for each entry."""

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
    @pytest.mark.parametrize("entry", entries, ids=str)
    def test(entry: Entry, check: Callable[[Entry], None]) -> None:
        check(entry)

    return test


def one_graph(entries: list[Entry]) -> Callable[[], None]:
    """A test that compiles the calls of all entries together, without a graph break."""

    def test() -> None:
        chosen = [entry for entry in entries if entry.compiled]
        given = [with_leaves(entry, entry.problem(torch.float32)) for entry in chosen]

        def total(all_tensors: list[Tensors]) -> torch.Tensor:
            pairs = zip(chosen, all_tensors, strict=True)
            return sum(entry.call(tensors).sum() for entry, tensors in pairs)

        torch._dynamo.reset()
        compiled = torch.compile(total, fullgraph=True, backend="eager")
        found, right = (
            torch.autograd.grad(
                f(given),
                [
                    x
                    for e, t in zip(chosen, given, strict=True)
                    for x in (t[name] for name in e.leaves)
                ],
            )
            for f in (compiled, total)
        )
        for one, other in zip(found, right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

    return test


def mixed_dtypes(entries: list[Entry]) -> Callable[[Entry], None]:
    """A test of each entry with one side in float64 and the other in bfloat16."""

    @pytest.mark.parametrize("entry", entries, ids=str)
    def test(entry: Entry) -> None:
        tensors = entry.problem(torch.bfloat16)
        floating = [k for k, x in tensors.items() if torch.is_tensor(x) and x.is_floating_point()]
        for name in floating[1::2]:
            tensors[name] = tensors[name].double()
        right = entry.definition(tensors)
        if entry.reductions:
            right = reduced(right, entry.counted(tensors), entry.default)
        found = entry.call(tensors).double()
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)

    return test


def one_graph_for_all(calls: dict[str, Callable[[float], torch.Tensor]]) -> Callable[..., None]:
    """A test that numbers which a schedule changes are no constants of a compiled graph."""

    @pytest.mark.parametrize("name", calls)
    def test(name: str) -> None:
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(calls[name], fullgraph=True, backend=counter)
        for number in (0.15, 0.25, 0.35, 0.45):
            torch.testing.assert_close(compiled(number), calls[name](number))
        assert counter.frame_count <= 2

    return test
