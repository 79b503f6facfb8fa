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
    "softmax_divergence forward_kl, bfloat16": Limit((30, 32), (0.88, 0.8), 80, 0),
    "softmax_divergence forward_kl, float32": Limit((37.3, 50), (0.8, 0.85), 77, 0),
    "softmax_divergence forward_kl, float32+bfloat16": Limit((61, 50), (0.76, 0.7), 77, 0.5),
    "softmax_divergence reverse_kl, bfloat16": Limit((34.3, 38), (0.88, 0.75), 80, 0),
    "softmax_divergence reverse_kl, float32": Limit((43, 60), (0.8, 0.85), 77, 0),
    "softmax_divergence jsd, bfloat16": Limit((66.3, 65), (0.59, 0.55), 80, 0),
    "softmax_divergence jsd, float32": Limit((73.8, 90), (0.68, 0.75), 77, 0),
    "softmax_divergence skew_kl, bfloat16": Limit((67.3, 65), (0.56, 0.55), 80, 0),
    "softmax_divergence skew_kl, float32": Limit((74.8, 90), (0.67, 0.75), 77, 0),
    "softmax_divergence skew_reverse_kl, bfloat16": Limit((66.3, 65), (0.51, 0.55), 80, 0),
    "softmax_divergence skew_reverse_kl, float32": Limit((73.8, 90), (0.67, 0.75), 77, 0),
    "softmax_divergence tvd, bfloat16": Limit((44.5, 42), (0.78, 0.7), 80, 0),
    "softmax_divergence tvd, float32": Limit((50.3, 65), (0.71, 0.8), 77, 0),
    "softmax_divergence cross_entropy, bfloat16": Limit((31, None), (0.88, None), 80, 0),
    "softmax_divergence cross_entropy, float32": Limit((38.3, None), (0.8, None), 77, 0),
    "softmax_divergence mixed_kl, bfloat16": Limit((49, None), (0.77, None), 80, 0),
    "softmax_divergence mixed_kl, float32": Limit((58.5, None), (0.71, None), 77, 0),
    "token_stats pair, bfloat16": Limit((33.4, 38), (0.69, 0.65), 78, 0),
    "token_stats pair, float32": Limit((37.8, None), (0.59, None), 76, 0),
    "cross_entropy, bfloat16": Limit((18.7, None), (0.95, None), 98, 0),
    "cross_entropy, float32": Limit((25.3, None), (0.95, None), 98, 0),
    "cross_entropy entropy, bfloat16": Limit((22, None), (0.95, None), 98, 0),
    "cross_entropy entropy, float32": Limit((28, None), (0.95, None), 98, 0),
    "token_log_probs forward, bfloat16": Limit((10, None), (0.97, None), 42, 0),
    "token_log_probs forward, float32": Limit((15, None), (0.97, None), 42, 0),
    "token_log_probs backward, bfloat16": Limit((22.9, None), (0.99, None), 42, 0),
    "token_log_probs backward, float32": Limit((34, None), (0.99, None), 42, 0),
    "token_log_probs entropy forward, bfloat16": Limit((12, None), (0.97, None), 42, 0),
    "token_log_probs entropy forward, float32": Limit((17, None), (0.97, None), 42, 0),
    "token_log_probs entropy backward, bfloat16": Limit((26.9, None), (0.99, None), 42, 0),
    "token_log_probs entropy backward, float32": Limit((38, None), (0.99, None), 42, 0),
    "teacher_topk k=64, bfloat16": Limit((11.4, 14), (0.75, 0.7), 99, 0),
    "teacher_topk k=64, float32": Limit((18.3, None), (0.75, None), 97, 0),
    "topk_divergence k=64, bfloat16": Limit((17, 18), (0.83, 0.75), 68, 0),
    "topk_divergence k=64, float32": Limit((22, None), (0.82, None), 83, 0),
    "topk_divergence k=512, bfloat16": Limit((17, 18), (0.82, 0.75), 98, 0),
    "topk_divergence k=512, float32": Limit((22, None), (0.82, None), 98, 0),
    "clipped_divergence fixed bounds, bfloat16": Limit((50.2, 60), (0.67, 0.6), 60, 0),
    "clipped_divergence fixed bounds, float32": Limit((56.8, None), (0.7, None), 77, 0),
    "chunk_log_likelihood forward, bfloat16": Limit((9.7, 14), (0.99, 0.75), 81, 0),
    "chunk_log_likelihood forward, float32": Limit((14.3, None), (0.99, None), 98, 0),
    "chunk_log_likelihood backward, bfloat16": Limit((31.8, 30), (0.99, 0.75), 81, 1),
    "chunk_log_likelihood backward, float32": Limit((42.8, None), (0.99, None), 81, 1),
    "byte_log_probs forward, bfloat16": Limit((17.1, 20), (0.62, 0.6), 32, 0),
    "byte_log_probs forward, float32": Limit((17.5, None), (0.71, None), 36, 0),
    "kl_div, bfloat16": Limit((44.4, 36), (0.99, 0.85), 48, 0),
    "kl_div, float32": Limit((42.3, 36), (0.99, 0.85), 64, 0),
}
