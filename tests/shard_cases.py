"""Cases of vocabularies split across processes, which every process of a group runs.

A case is a function of the process's :class:`Ranks`; it compares with the op of one process on the
whole vocabulary. ``run`` is what a spawned process calls: it runs all cases and saves what failed.
"""

import functools
import traceback
from collections.abc import Callable
from typing import Any

import shard_errors as errors
import shard_head_modes as head_modes
import shard_heads as heads
import shard_modes as modes
import shard_rows as rows
import shard_second as second
import shard_values as values
import torch
import torch.distributed as dist
from cases import ALL_DIVERGENCES
from group_end import leave
from shard_ranks import OPTIONS, TOLERANCE, WIDTH, Ranks

from fastkd._ops.arguments import choices

SIZES = (2, 4)
Case = Callable[[Ranks], None]


def cases(size: int) -> dict[str, Case]:
    """The cases of a group of this size, by name."""
    found: dict[str, Case] = {}

    def add(function: Callable[..., None], *arguments: Any) -> None:
        words = [str(x).removeprefix("torch.") for x in arguments]
        name = "-".join([function.__name__.removesuffix("_case"), *words])
        found[name] = functools.partial(function, *arguments)

    for i, name in enumerate(ALL_DIVERGENCES):
        for j, options in enumerate(OPTIONS):
            for dtype in TOLERANCE:
                # Each divergence with two option sets in float64; the plain one in both.
                if options == "plain" or (dtype == torch.float64 and (i + j) % 2 == size // 4):
                    add(values.divergence_case, name, options, dtype)
        if name not in ("cross_entropy",):
            add(values.near_case, name, torch.float32)
        if size == 2:
            add(values.bfloat16_case, name)
    for divergence in choices("topk_divergence", "divergence"):
        for tail in choices("topk_divergence", "tail"):
            # All pairs with two processes, each divergence and each tail with four.
            if size == 2 and (divergence, tail) != ("jsd", "uniform"):
                add(values.topk_case, divergence, tail, torch.float64)
            elif divergence == "forward_kl" or tail == "lump":
                add(values.topk_case, divergence, tail, torch.float32)
    for renormalize in choices("clipped_divergence", "renormalize"):
        if size == 2 or renormalize == "both":
            add(values.clipped_case, renormalize, (torch.float64, torch.float32)[size // 4])
    for mix in choices("softmax_divergence", "teacher_mix"):
        add(values.teachers_case, mix, (torch.float64, torch.float32)[size // 4])
    add(values.teacher_rows_case)
    for case in (
        values.cross_entropy_case,
        values.token_log_probs_case,
        values.token_stats_case,
        values.teacher_topk_case,
        values.chunk_case,
    ):
        for dtype in TOLERANCE:
            add(case, dtype)
    for dtype in TOLERANCE:
        for name in ("forward_kl", "jsd") if dtype == torch.float32 else ALL_DIVERGENCES:
            add(heads.head_divergence_case, name, "plain", dtype)
        for options in OPTIONS:
            add(heads.head_divergence_case, "reverse_kl", options, dtype)
        add(heads.head_ops_case, dtype)
    for dtype in (torch.bfloat16, torch.float16):
        add(head_modes.head_dtype_case, dtype)
    for vocab in (5, 7, 203):
        add(heads.head_width_case, vocab)
        add(rows.width_case, vocab)
    for vocab in (WIDTH - 3, WIDTH * size - 2):
        add(heads.head_padding_case, vocab)
        add(rows.padding_case, vocab)
    for kind in ("vocab", "rows", "neither") if size == 2 else ("vocab", "both"):
        add(modes.dtensor_case, kind)
        add(head_modes.head_dtensor_case, kind)
    for arguments in second.second_cases(size):
        add(*arguments)
    for case in (
        *(
            values.topk_gradient_case,
            values.clipped_bounds_case,
            rows.infinite_case,
            rows.infinite_support_case,
            rows.nan_case,
            rows.masked_case,
            rows.far_case,
            rows.shape_case,
            rows.bounds_of_unread_rows_case,
            rows.nan_boundary_case,
            rows.rare_boundary_case,
            rows.rare_support_case,
            rows.unused_row_case,
        ),
        *(
            rows.edge_label_case,
            rows.label_error_case,
            rows.width_error_case,
            errors.columns_error_case,
            errors.numbers_error_case,
            errors.transform_error_case,
            errors.fake_case,
            modes.repeat_case,
            modes.alone_case,
            modes.inference_case,
            modes.inplace_case,
        ),
        heads.head_rows_case,
    ):
        add(case)
    if size == 4:
        add(head_modes.head_fsdp_case)
    if size == 2:
        for case in (
            *(
                modes.payload_case,
                modes.compile_case,
                modes.dtensor_error_case,
            ),
            head_modes.head_modes_case,
            head_modes.head_payload_case,
            head_modes.head_unreduced_case,
            head_modes.head_error_case,
            head_modes.head_dtensor_error_case,
            modes.torch_is_wrong_case,
        ):
            add(case)
    return found


def run(rank: int, size: int, folder: str) -> None:
    """All cases, in a spawned process. Saves what failed, by the case's name."""
    from datetime import timedelta

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    results = {}
    for name, case in cases(size).items():
        try:
            case(Ranks(rank, size))
            results[name] = ""
        except Exception:  # the others go on
            results[name] = f"process {rank}: {traceback.format_exc()}"
        torch.save(results, f"{folder}/{rank}")
    leave()
