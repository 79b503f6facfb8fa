"""What the CUDA kernels move, and the time that this takes at least.

No GPU is needed: the emulator of tests/simt counts the bytes (`make build/simt/.built` builds it).
A prediction is bytes over bandwidth, a bound from below: nothing here ran on a GPU.
"""

import argparse
from dataclasses import dataclass

import torch

import fastkd
from benchmarks.report import require_extra
from tests import emulator

#: Bytes a second of an H100 SXM's memory, as its data sheet has it.
H100 = 3.35e12
ROWS, VOCAB, COUNTED_ROWS = 8192, 151_936, 2


@dataclass(frozen=True)
class Count:
    """Reads and writes of a whole logits tensor, for loss and gradient."""

    name: str
    tensors: float
    how: str


#: From the sequence of their kernels, every tensor in the logits' dtype and read once by each.
PEERS = (
    Count("speculators", 4 + 2 + 1, "by hand: 4 reads forward; 2 reads, 1 write backward"),
    Count(
        "Liger (LigerKLDIVLoss)",
        (1 + 1) + (1 + 1) + 2 + (1 + 1) + (2 + 1),
        "by hand: log_softmax, softmax, loss, its gradient, log_softmax's gradient",
    ),
)


def counted(divergence: str, capability: int, dtype: torch.dtype) -> Count:
    """Run a few emulated rows and return what they moved."""
    emulator.configure(capability)
    student = torch.randn(COUNTED_ROWS, VOCAB, dtype=dtype).requires_grad_()
    teacher = torch.randn(COUNTED_ROWS, VOCAB, dtype=dtype)
    fastkd.release_memory()
    traffic = emulator.traffic_of(
        lambda: fastkd.softmax_divergence(student, teacher, divergence=divergence)
    )
    kind = f"cluster of {traffic.largest_cluster}" if traffic.largest_cluster > 1 else "one block"
    share = f"{traffic.share_of_16:.1%} in 16-byte accesses"
    size = student.numel() * student.element_size()
    name = f"fastkd {divergence}, sm_{capability}, {kind}"
    return Count(name, traffic.moved / size, f"counted: {share}")


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    dtype = getattr(torch, options.parse_args().dtype)
    require_extra()
    if not emulator.is_built():
        raise SystemExit(f"{emulator.PATH} is missing: run `make build/simt/.built`")
    from rich.console import Console
    from rich.table import Table

    real, torch.ops.fastkd = torch.ops.fastkd, emulator.ops()
    try:
        ours = [counted(d, c, dtype) for c in (90, 80) for d in ("forward_kl", "reverse_kl", "jsd")]
    finally:
        torch.ops.fastkd = real
    size = ROWS * VOCAB * dtype.itemsize
    table = Table(
        title=f"Loss and gradient of {ROWS:,} x {VOCAB:,} {dtype}: bytes over 3.35 TB/s (H100)"
    )
    for column in ("who", "tensors moved", "GB", "at least, ms", "how it was counted"):
        table.add_column(column, justify="left" if column.startswith(("who", "how")) else "right")
    for count in (*ours, *PEERS):
        moved = count.tensors * size
        milliseconds = f"{moved / H100 * 1e3:.2f}"
        table.add_row(
            count.name, f"{count.tensors:.3f}", f"{moved / 1e9:.1f}", milliseconds, count.how
        )
    Console(width=132).print(table)


if __name__ == "__main__":
    main()
