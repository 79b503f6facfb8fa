"""The CUDA kernels as the emulator runs them: ops `fastkd_simt` for CPU tensors."""

import ctypes
import os
import re
import sys
from functools import cache
from pathlib import Path

import torch
from torch._library import simple_registry

import fastkd

PATH = Path(
    os.environ.get("FASTKD_SIMT_LIBRARY", Path(__file__).parents[1] / "build/simt/_simt.so")
)
# The seed of a GPU's rounding errors (--rounding), which another library has. 0: correctly rounded.
rounding = 0

# Shared memory in bytes for a tensor whose rows do not stay there, at 192 threads: four packs a
# thread under way, and the two ends of a row.
UNDER_WAY = (4 * 192 + 2) * 16

# What FASTKD_LOG=launch prints of a launch.
LAUNCH_HEAD = (
    r": (?P<op>[\w.]+) \((?P<role>[^)]+)\) (?P<rows>\d+)x(?P<columns>\d+) (?P<dtype>\w+) "
    r"sm_(?P<sm>\d+) threads=(?P<threads>\d+) cluster=(?P<cluster>\d+) shared=(?P<shared>\d+)"
)
LAUNCH_LINE = re.compile(
    rf"fastkd launch{LAUNCH_HEAD} blocks=(?P<blocks>\d+) resident=(?P<resident>yes|no): "
    r"(?P<reason>\S.*)"
)

OPS = (
    *(fastkd.softmax_divergence, fastkd.topk_divergence, fastkd.clipped_divergence),
    *(fastkd.chunk_log_likelihood, fastkd.byte_log_probs),
    *(fastkd.cross_entropy, fastkd.token_log_probs, fastkd.token_stats, fastkd.teacher_topk),
)
FAKES = (
    *("_scale_rows_", "_gradient_like", "_kl_div", "_kl_div_into", "_kl_div_backward"),
    *("_shard_statistics", "_shard_sums", "_shard_gradient", "_shard_gradient_into"),
    *("_shard_softmax_gradient", "_shard_softmax_gradient_into"),
    *("_acm_route", "_acm_value", "_acm_rows", "_acm_rows_backward"),
)


class Traffic(ctypes.Structure):
    """Bytes of global memory, those moved in 16-byte accesses, the launches' extents and calls."""

    _fields_ = [
        (name, ctypes.c_ulonglong)
        for name in (
            *("read", "written", "read_16", "written_16"),
            *("launches", "largest_cluster", "largest_shared_memory"),
            *("attributes_set", "occupancy_queries"),
        )
    ]

    @property
    def moved(self) -> int:
        """All bytes."""
        return self.read + self.written

    @property
    def share_of_16(self) -> float:
        """The share of the bytes in 16-byte accesses."""
        return (self.read_16 + self.written_16) / self.moved


def is_built() -> bool:
    """Whether `make test` has built the emulated kernels."""
    return PATH.exists()


@cache
def library() -> ctypes.CDLL:
    """Load the ops, with the fakes of their models."""
    path = PATH.with_name("_simt_rounded.so") if rounding else PATH
    torch.ops.load_library(path)
    assert fastkd.softmax_divergence  # its fakes are registered
    for name in FAKES:
        _share_fake(name)
    for function in OPS:
        sys.modules[function.__module__].OP.register("fastkd_simt")
    found = ctypes.CDLL(str(path))
    if rounding:
        found.simt_round(ctypes.c_uint(rounding))
    return found


def _share_fake(name: str) -> None:
    fake = simple_registry.singleton.find(f"fastkd::{name}").fake_impl.kernel
    function = fake.func
    if name == "_acm_rows":  # the CUDA kernels do not pack, whatever the last argument
        function = lambda *arguments: fake.func(*arguments[:9])  # noqa: E731
    torch.library.register_fake(f"fastkd_simt::{name}")(function)


def ops():
    """Return the namespace of the emulated ops."""
    library()
    return torch.ops.fastkd_simt


def configure(capability: int, seed: int = 0, *, clusters: bool | int = True) -> None:
    """Emulate this compute capability, and an order of threads: 0 theirs, else a random one.

    clusters=False: a device that refuses clusters of several blocks; a number: of more blocks.
    """
    library().simt_configure(capability, ctypes.c_uint(seed))
    library().simt_limit_clusters(16 if clusters is True else max(1, clusters))


def traffic_of(run) -> Traffic:
    """Run something and return what its launches moved."""
    library().simt_reset()
    run()
    found = Traffic()
    library().simt_traffic(ctypes.byref(found))
    return found
