"""Calls whose launches tests/test_launch.py reads from stderr; arguments: groups of them.

A process of its own, since FASTKD_LOG is read once. "== name" precedes the lines of a call.
"""

import sys

import emulator
import registry
import torch
from cases import logits, top_k

import fastkd

BF16 = torch.bfloat16


def begin(name: str) -> None:
    print(f"== {name}", file=sys.stderr, flush=True)


def pair(vocab: int, dtype: torch.dtype = BF16, rows: int = 2) -> tuple[torch.Tensor, ...]:
    return logits((rows, vocab), dtype), logits((rows, vocab), dtype)


def devices() -> None:
    """The same call on every device, and on those that refuse clusters, or large ones."""
    for capability in (75, 80, 86, 89, 90, 100, 120):
        emulator.configure(capability)
        begin(f"{capability}")
        fastkd.softmax_divergence(*pair(32_000))
    emulator.configure(90, clusters=False)
    begin("refused")
    fastkd.softmax_divergence(*pair(32_000))
    begin("refused twice")
    fastkd.softmax_divergence(*pair(151_936))
    emulator.configure(90, clusters=8)
    begin("sixteen refused")
    fastkd.softmax_divergence(*pair(151_936))
    emulator.configure(90, clusters=False)
    student, teacher = pair(60_000, torch.float32)
    vocab = fastkd.ByteVocab([bytes([i % 256, i // 256]) for i in range(60_000)])
    for op, arguments in {
        fastkd.topk_divergence: (student, *top_k((2, 60_000), 20)),
        fastkd.clipped_divergence: (student, teacher, 1e-6, 0.5),
        fastkd.cross_entropy: (student, torch.tensor([1, 2])),
        fastkd.token_log_probs: (student, torch.tensor([1, 2])),
        fastkd.token_stats: (student, teacher),
        fastkd.teacher_topk: (teacher, 20),
        fastkd.byte_log_probs: (student, vocab),
    }.items():
        begin(f"{op.__name__} refused")
        op(*arguments)


def rows() -> None:
    """Rows of every kind on sm_90."""
    emulator.configure(90)
    begin("short")
    fastkd.softmax_divergence(*pair(1000, rows=6))
    begin("dtypes differ")
    fastkd.softmax_divergence(logits((2, 5000)), logits((2, 5000), BF16))
    begin("offsets differ")
    fastkd.softmax_divergence(logits((2, 5001))[:, 1:], logits((2, 5000)))
    begin("one pass")
    fastkd.token_stats(logits((2, 5000)))
    begin("short, one pass")
    fastkd.token_stats(logits((6, 1000)))
    begin("block per row")
    fastkd.teacher_topk(logits((2, 100)), 3)
    best = top_k((2, 1000), 900)
    emulator.configure(86)
    begin("warps' memory")
    fastkd.topk_divergence(logits((2, 1000)), *best)
    begin("no rows")
    fastkd.softmax_divergence(*pair(1000, rows=0), reduction="none")


def every_op() -> None:
    emulator.configure(90)
    for entry in registry.EVERY:
        begin(entry.name)
        student = logits((2, 6, registry.VOCAB)).requires_grad_(entry.differentiable)
        out = entry.call(student, **entry.tensors((2, 6)))
        if entry.differentiable:
            (3 * out.sum()).backward()
    begin("reduction")
    fastkd.softmax_divergence(*pair(100), reduction="none")
    begin("lump")
    fastkd.clipped_divergence(*pair(100), 0.1, 0.9, tail="lump")
    begin("acm")
    ops, choices = emulator.ops(), torch.arange(40) % 4
    tensors = [torch.randn(shape) for shape in ((40, 256), (3, 256, 32), (3, 32), (3, 32, 64))]
    routes = ops._acm_route(choices, 3)
    out, kept = ops._acm_rows(*tensors, None, *routes, 0, True)
    ops._acm_rows_backward(out, *tensors, *routes, kept, 0, *[True] * 4)


def asked() -> None:
    """How often the driver is asked: a line a call."""
    for vocab, clusters in (
        *((50_257, True), (50_257, True), (32_000, True)),
        *((50_257, False), (50_257, False), (50_257, True)),
    ):
        emulator.configure(90, clusters=clusters)
        student, teacher = pair(vocab)
        found = emulator.traffic_of(lambda: fastkd.softmax_divergence(student, teacher))  # noqa: B023
        assert (found.largest_cluster > 1) == clusters
        print(found.attributes_set, found.occupancy_queries, file=sys.stderr)


if __name__ == "__main__":
    torch.manual_seed(0)
    emulator.library()
    torch.ops.fastkd = torch.ops.fastkd_simt
    for name in sys.argv[1:]:
        {"devices": devices, "rows": rows, "every_op": every_op, "asked": asked}[name]()
