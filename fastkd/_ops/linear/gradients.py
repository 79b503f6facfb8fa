"""The gradients of hidden states, weights and biases, from those of the logits of chunks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd._ops.linear import products
from fastkd._ops.linear.call import Slot
from fastkd._ops.linear.chunks import Chunks
from fastkd._ops.linear.rows import RowResult


class Gradients:
    """The gradients of the slots, from those of a chunk's logits."""

    def __init__(self, chunks: Chunks, wanted: Sequence[bool]) -> None:
        self.chunks, self.wanted = chunks, tuple(wanted)
        self.found: list[Tensor | None] = []
        self.rows: list[RowResult | None] = []
        call = chunks.call
        for slot, tensor, want in zip(call.slots, call.inputs(), wanted, strict=True):
            out = None
            if want and tensor is not None:
                out = self._memory(slot, tensor)
            self.found.append(out)
            by_row = out is not None and slot.part in ("hidden", "rows")
            leading = len(chunks.rows.leading)
            self.rows.append(
                RowResult(out, 0, leading, chunks.rows.index)
                if by_row and out is not None
                else None
            )

    def _memory(self, slot: Slot, tensor: Tensor) -> Tensor:
        some = self.chunks.rows.count > 0
        if slot.part in ("hidden", "rows"):
            whole = some and self.chunks.rows.index is None
            make = torch.empty if whole else torch.zeros
            dtype = tensor.dtype
            if slot.part == "hidden" and self.chunks.call.shards is not None:
                dtype = products.sum_dtype(dtype)  # a part of the sum over processes
            return make(tensor.shape, dtype=dtype, device=tensor.device)
        dtype = products.sum_dtype(tensor.dtype)
        if slot.part == "bias":
            return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)
        total = products.gradient_of_weight(tensor)
        total[self.chunks.vocab if some else 0 :].zero_()
        return total

    def of_bit(self, bit: int) -> bool:
        """Whether one of the gradients comes from the op's gradient of that number."""
        pairs = zip(self.chunks.call.slots, self.wanted, strict=True)
        return any(want and slot.bit == bit for slot, want in pairs)

    def add(self, bit: int, gradient: Tensor, hidden: list[Tensor], first: int, last: int) -> None:
        """Take the gradient of a chunk's tensor number ``bit`` of the op."""
        call, chunks = self.chunks.call, self.chunks
        narrow: Tensor | None = None
        for i, slot in enumerate(call.slots):
            if slot.bit != bit or self.found[i] is None:
                continue
            out, result = self.found[i], self.rows[i]
            assert out is not None
            if slot.side is None:
                assert result is not None
                result.put(first, last, gradient)
                continue
            which = call.sides.index(slot.side)
            linear, weight = slot.side.linear, chunks.weights[which]
            if narrow is None:
                rows = gradient.reshape(hidden[which].size(0), chunks.vocab)
                narrow = self._narrow(rows, hidden[which])
            if slot.part == "hidden":
                assert result is not None
                part = result.part(first, last)
                if part is None:
                    part = torch.empty_like(hidden[which], dtype=out.dtype)
                    products.to_hidden(part, narrow, weight, linear.scale)
                    result.put(first, last, part)
                else:
                    part = part.view(hidden[which].shape)
                    products.to_hidden(part, narrow, weight, linear.scale)
            elif slot.part == "weight":
                total = out[: chunks.vocab]
                products.add_to_weight(total, narrow, hidden[which], linear.scale, first > 0)
            else:
                out[: chunks.vocab] += narrow.sum(0, dtype=out.dtype)

    def _narrow(self, gradient: Tensor, hidden: Tensor) -> Tensor:
        """The gradient in the dtype of its products."""
        dtype = products.gradient_dtype(gradient.dtype, hidden)
        if dtype == gradient.dtype:
            return gradient
        flat = self.chunks.memory("gradient", self.chunks.vocab, dtype)
        return flat[: gradient.numel()].view(gradient.shape).copy_(gradient)

    def finish(self) -> None:
        """Keep the memory of the weight's gradient; sum that of hidden states over processes."""
        call = self.chunks.call
        inputs = call.inputs()
        for i, (slot, out) in enumerate(zip(call.slots, self.found, strict=True)):
            if out is None:
                continue
            if slot.part == "weight":
                products.weight_memory.keep(out)
            tensor = inputs[i]
            if slot.part == "hidden" and call.shards is not None and tensor is not None:
                assert slot.side is not None
                if slot.side.linear.reduce_hidden_grad:
                    call.shards.add_up(out)
                self.found[i] = products.converted(out, tensor.dtype)
