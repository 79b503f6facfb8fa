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
    "softmax_divergence forward_kl, bfloat16": Limit((27.4, 32), (0.91, 0.8), 80, 0),
    "softmax_divergence forward_kl, float32": Limit((32.3, 50), (0.85, 0.85), 77, 0),
    "softmax_divergence forward_kl, float32+bfloat16": Limit((47.2, 50), (0.82, 0.7), 77, 0),
    "softmax_divergence reverse_kl, bfloat16": Limit((31.7, 38), (0.91, 0.75), 80, 0),
    "softmax_divergence reverse_kl, float32": Limit((37.5, 60), (0.85, 0.85), 77, 0),
    "softmax_divergence jsd, bfloat16": Limit((63.8, 65), (0.61, 0.55), 80, 0),
    "softmax_divergence jsd, float32": Limit((68.5, 90), (0.7, 0.75), 77, 0),
    "softmax_divergence skew_kl, bfloat16": Limit((64.8, 65), (0.56, 0.55), 80, 0),
    "softmax_divergence skew_kl, float32": Limit((69.5, 90), (0.69, 0.75), 77, 0),
    "softmax_divergence skew_reverse_kl, bfloat16": Limit((56.3, 65), (0.56, 0.55), 80, 0),
    "softmax_divergence skew_reverse_kl, float32": Limit((61.5, 90), (0.7, 0.75), 77, 0),
    "softmax_divergence tvd, bfloat16": Limit((38.8, 42), (0.8, 0.7), 80, 0),
    "softmax_divergence tvd, float32": Limit((41.5, 65), (0.73, 0.8), 77, 0),
    "softmax_divergence cross_entropy, bfloat16": Limit((28.4, None), (0.91, None), 80, 0),
    "softmax_divergence cross_entropy, float32": Limit((33.3, None), (0.85, None), 77, 0),
    "softmax_divergence mixed_kl, bfloat16": Limit((46.4, None), (0.79, None), 80, 0),
    "softmax_divergence mixed_kl, float32": Limit((53.3, None), (0.73, None), 77, 0),
    "token_stats pair, bfloat16": Limit((30.8, 38), (0.7, 0.65), 78, 0),
    "token_stats pair, float32": Limit((32.5, None), (0.59, None), 76, 0),
    "cross_entropy, bfloat16": Limit((16.7, None), (0.92, None), 78, 0),
    "cross_entropy, float32": Limit((21.3, None), (0.92, None), 78, 0),
    "cross_entropy entropy, bfloat16": Limit((20, None), (0.95, None), 98, 0),
    "cross_entropy entropy, float32": Limit((24, None), (0.95, None), 98, 0),
    "token_log_probs forward, bfloat16": Limit((10.7, None), (0.96, None), 35, 0),
    "token_log_probs forward, float32": Limit((16.3, None), (0.96, None), 35, 0),
    "token_log_probs backward, bfloat16": Limit((24.4, None), (0.98, None), 35, 0),
    "token_log_probs backward, float32": Limit((37.5, None), (0.98, None), 35, 0),
    "token_log_probs entropy forward, bfloat16": Limit((12.7, None), (0.96, None), 35, 0),
    "token_log_probs entropy forward, float32": Limit((18.3, None), (0.96, None), 35, 0),
    "token_log_probs entropy backward, bfloat16": Limit((28.3, None), (0.98, None), 35, 0),
    "token_log_probs entropy backward, float32": Limit((41.3, None), (0.98, None), 35, 0),
    "teacher_topk k=64, bfloat16": Limit((9.3, 14), (0.75, 0.7), 99, 0),
    "teacher_topk k=64, float32": Limit((14, None), (0.75, None), 97, 0),
    "topk_divergence k=64, bfloat16": Limit((15, 18), (0.83, 0.75), 69, 0),
    "topk_divergence k=64, float32": Limit((18, None), (0.82, None), 83, 0),
    "topk_divergence k=512, bfloat16": Limit((15, 18), (0.82, 0.75), 98, 0),
    "topk_divergence k=512, float32": Limit((18, None), (0.82, None), 98, 0),
    "clipped_divergence fixed bounds, bfloat16": Limit((47.3, 60), (0.69, 0.6), 60, 0),
    "clipped_divergence fixed bounds, float32": Limit((51.5, None), (0.7, None), 77, 0),
    "chunk_log_likelihood forward, bfloat16": Limit((10.3, 14), (0.99, 0.75), 82, 0),
    "chunk_log_likelihood forward, float32": Limit((15.5, None), (0.99, None), 82, 0),
    "chunk_log_likelihood backward, bfloat16": Limit((30, 30), (0.99, 0.75), 82, 0),
    "chunk_log_likelihood backward, float32": Limit((43, None), (0.99, None), 82, 0),
    "byte_log_probs forward, bfloat16": Limit((16, 20), (0.65, 0.6), 32, 0),
    "byte_log_probs forward, float32": Limit((16.3, None), (0.72, None), 36, 0),
    "kl_div, bfloat16": Limit((32.3, 36), (0.99, 0.85), 64, 0),
    "kl_div, float32": Limit((34, 36), (0.99, 0.85), 64, 0),
}
