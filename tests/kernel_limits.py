"""What the kernels may cost: limits on what benchmarks.predicted_time finds in their SASS.

A line is an op and dtype (benchmarks/predicted_ops.py) at 8,192 x 151,936 on an H200, with the
kernels of sm_90. Each figure is today's; beside it stands the figure that is wanted. Where a kernel
gets better, change its line: instructions and checked go down, of_roof and kib_under_way up.
"""

from typing import NamedTuple

#: Bytes that must be under way on each multiprocessor to keep the memory busy, in KiB.
KIB_WANTED = 32


class Limit(NamedTuple):
    """(today's, wanted); wanted None: no figure was set."""

    instructions: tuple[float, float | None]  # an entry or pair, all passes, at most
    of_roof: tuple[float, float | None]  # predicted share of the copy roof, at least
    kib_under_way: float  # on a multiprocessor, at least; wanted: KIB_WANTED
    checked: float  # exp2 and log2 an entry that also take denormals, at most; wanted: 0


# The wanted share of topk_divergence with k = 512 is within 10 % of that with k = 64.
LIMITS = {
    "softmax_divergence forward_kl, bfloat16": Limit((95.5, 32), (0.25, 0.8), 6, 4),
    "softmax_divergence forward_kl, float32": Limit((111.5, 50), (0.13, 0.85), 3, 4),
    "softmax_divergence reverse_kl, bfloat16": Limit((90.2, 38), (0.25, 0.75), 6, 5),
    "softmax_divergence reverse_kl, float32": Limit((106, 60), (0.13, 0.85), 3, 5),
    "softmax_divergence jsd, bfloat16": Limit((333, 65), (0.11, 0.55), 6, 7),
    "softmax_divergence jsd, float32": Limit((357.8, 90), (0.09, 0.75), 3, 7),
    "softmax_divergence skew_kl, bfloat16": Limit((270, 65), (0.13, 0.55), 6, 7),
    "softmax_divergence skew_kl, float32": Limit((290.8, 90), (0.1, 0.75), 3, 7),
    "softmax_divergence skew_reverse_kl, bfloat16": Limit((259.7, 65), (0.13, 0.55), 6, 7),
    "softmax_divergence skew_reverse_kl, float32": Limit((283, 90), (0.1, 0.75), 3, 7),
    "softmax_divergence tvd, bfloat16": Limit((153, 42), (0.2, 0.7), 6, 7),
    "softmax_divergence tvd, float32": Limit((177.3, 65), (0.11, 0.8), 3, 7),
    "softmax_divergence cross_entropy, bfloat16": Limit((94.4, None), (0.25, None), 6, 4),
    "softmax_divergence cross_entropy, float32": Limit((110.3, None), (0.13, None), 3, 4),
    "softmax_divergence mixed_kl, bfloat16": Limit((198.2, None), (0.16, None), 6, 7),
    "softmax_divergence mixed_kl, float32": Limit((223.3, None), (0.11, None), 3, 7),
    "token_stats pair, bfloat16": Limit((67.8, 38), (0.17, 0.65), 6, 4),
    "token_stats pair, float32": Limit((70.8, None), (0.09, None), 3, 4),
    "teacher_topk k=64, bfloat16": Limit((26.9, 14), (0.19, 0.7), 6, 1),
    "teacher_topk k=64, float32": Limit((32.3, None), (0.19, None), 6, 1),
    "topk_divergence k=64, bfloat16": Limit((68.5, 18), (0.21, 0.75), 6, 4),
    "topk_divergence k=64, float32": Limit((82.3, None), (0.28, None), 6, 4),
    "topk_divergence k=512, bfloat16": Limit((68.5, 18), (0, 0.75), 6, 4),
    "topk_divergence k=512, float32": Limit((82.3, None), (0.01, None), 6, 4),
    "clipped_divergence fixed bounds, bfloat16": Limit((156.5, 60), (0.19, 0.6), 6, 6),
    "clipped_divergence fixed bounds, float32": Limit((178, None), (0.11, None), 3, 6),
    "chunk_log_likelihood forward, bfloat16": Limit((21.4, 14), (0.46, 0.75), 12, 1),
    "chunk_log_likelihood forward, float32": Limit((27.3, None), (0.46, None), 12, 1),
    "chunk_log_likelihood backward, bfloat16": Limit((46.2, 30), (0.7, 0.75), 12, 2),
    "chunk_log_likelihood backward, float32": Limit((58.8, None), (0.7, None), 12, 2),
    "byte_log_probs forward, bfloat16": Limit((26.7, 20), (0.17, 0.6), 6, 0),
    "byte_log_probs forward, float32": Limit((26.3, None), (0.22, None), 12, 0),
    "kl_div, bfloat16": Limit((44.2, 36), (0.99, 0.85), 48, 0),
    "kl_div, float32": Limit((43.3, 36), (0.99, 0.85), 48, 0),
}
