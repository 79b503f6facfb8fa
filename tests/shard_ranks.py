"""A process of a group, and its comparisons with one process on the whole vocabulary."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from cases import NEED_LABELS
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
SIZES = (2, 4)


class Ranks:
    """This process in its group, and the columns that it has of a vocabulary."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.group = rank, size, dist.group.WORLD

    def even(self, width: int) -> slice:
        return slice(self.rank * width, (self.rank + 1) * width)

    def compare(
        self,
        function: Callable[..., Any],
        tensors: list[Tensor],
        *,
        tolerance: float,
        columns: slice | None = None,
        relative: bool = False,
        collectives: int | None = None,
        gradients_of_infinite: bool = True,
        **options: Any,
    ) -> Tensor:
        """Compare with one process. function(*tensors, **place): a tensor; the tensors: logits.

        Returns the loss of the group.
        """
        vocab = tensors[0].size(-1)
        columns = self.even(vocab // self.size) if columns is None else columns
        whole = [x.clone().requires_grad_() for x in tensors]
        local = [x[..., columns].clone().requires_grad_() for x in tensors]
        expected = function(*whole)
        with counted() as count:
            found = function(*local, group=self.group, **options)
        scale = expected.detach().abs().clamp(min=1) if not relative else expected.detach().abs()
        scale = torch.where(scale.isfinite(), scale, 1)
        torch.testing.assert_close(
            (found / scale).double(),
            (expected / scale).double(),
            rtol=0,
            atol=tolerance,
            equal_nan=True,
        )
        if collectives is not None:
            assert count() == collectives, f"{count()} collectives"
        if expected.requires_grad:
            weights = torch.linspace(0.5, 1.5, max(expected.numel(), 1)).to(expected.dtype)
            if not gradients_of_infinite:  # finite, but not defined
                weights = weights * expected.detach().isfinite().reshape(-1)
            for x in (found, expected):
                x.reshape(-1).backward(weights)
            if collectives is not None:
                assert count() == collectives, f"{count()} collectives with the backward pass"
        for x, y in zip(local, whole, strict=True):
            if y.grad is not None:
                torch.testing.assert_close(
                    x.grad, y.grad[..., columns], rtol=0, atol=tolerance, equal_nan=True
                )
        self.same_bits(found.detach())
        return found.detach()

    def same_bits(self, x: Tensor) -> None:
        """Every process has the same bits."""
        found = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(found, x.contiguous())
        bits = torch.int64 if x.dtype == torch.float64 else torch.int32
        for other in found:
            assert torch.equal(other.view(bits), x.contiguous().view(bits))


@contextlib.contextmanager
def counted() -> Iterator[Callable[[], int]]:
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as mode:
        yield mode.get_total_counts
        # The backward pass is counted, too.
        mode.__exit__ = lambda *_: None


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


ROWS, WIDTH = 6, 13
LABELS = {size: torch.arange(ROWS) * (WIDTH * size - 1) // (ROWS - 1) for size in SIZES}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "labels": {"labels": True, "temperature": 2.0, "square_temperature": True, "weight": True},
    "one": {"labels": True, "label_weight": 0.5, "mask": True, "reduction": "sum"},
    "rows": {"temperature": "rows", "reduction": "none", "labels": True, "label_weight": "rows"},
    "shift": {"labels": True, "shift": 2, "mask": True, "weight": True, "label_weight": "rows"},
    "softcap": {"logit_softcap": 5.0, "normalizer": 3.0},
}


def needed(name: str, size: int) -> dict[str, Any]:
    """The options that a divergence cannot be without."""
    if name not in NEED_LABELS:
        return {}
    return {"labels": LABELS[size].clone(), "label_weight": 0.0}


def row_options(name: str, size: int) -> dict[str, Any]:
    """The options of that name, with their tensors."""
    tensors = {
        "labels": LABELS[size].clone(),
        "weight": torch.linspace(0, 1.5, ROWS),
        "mask": torch.arange(ROWS) != 2,
        "temperature": torch.linspace(0.7, 2, ROWS),
        "label_weight": torch.linspace(0, 2, ROWS),
    }
    tensors["labels"][1] = -100
    return {
        k: tensors[k] if (v is True and k in tensors) or v == "rows" else v
        for k, v in OPTIONS[name].items()
    }
