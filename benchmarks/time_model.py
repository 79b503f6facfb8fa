"""The model of `benchmarks.predicted_time`: from counts of a call to its time on a GPU.

Everything here is arithmetic on figures of data sheets and on counts; nothing was timed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

SCHEDULERS, LANES, MUFU_A_CYCLE, REGISTERS = 4, 32, 16, 65536
#: The share of a memory's bandwidth that a copy reaches.
COPY_SHARE = 0.9
#: Seconds until a load from memory returns on a busy device: 600 to 1,000 ns.
LATENCY = 800e-9
#: Cycles from an instruction to the next one that needs its result, where one thread works alone.
DEPENDENT_CYCLES = 4
#: Seconds of a barrier of a cluster, with what it does to the memory's order.
CLUSTER_BARRIER = 500e-9

ASSUMPTIONS = f"""\
copy roof = {COPY_SHARE:.0%} of the data sheet's bandwidth
bytes     = bytes moved / copy roof
issue     = warp instructions / ({SCHEDULERS} a cycle and multiprocessor), all passes
mufu      = exponentials, logarithms, reciprocals / ({MUFU_A_CYCLE} a cycle and multiprocessor)
loads     = Little's law: bytes read x {LATENCY * 1e9:.0f} ns / bytes under way a multiprocessor
            (16 x loads in flight a thread x its threads; copies to shared memory: half of that)
serial    = rows x what one thread does alone a row ({DEPENDENT_CYCLES} cycles an instruction,
            {CLUSTER_BARRIER * 1e9:.0f} ns a cluster barrier) / rows at a time
at least  = the largest of the five: everything overlaps
sum       = each pass takes the largest of its own four; passes and serial work follow each other
predicted = at least + (sum - at least) / blocks a multiprocessor: blocks overlap each other
not in it: hits in the L2, the last wave of blocks, bank conflicts, divergent warps, the launch.
clock: the data sheet's highest. Instructions: SASS of sm_90 for every GPU."""


@dataclass(frozen=True)
class Gpu:
    """A GPU: bytes a second, Hz, multiprocessors, threads of each, compute capability."""

    name: str
    capability: int
    bandwidth: float
    clock: float
    multiprocessors: int
    threads: int
    shared_bytes: int  # of a multiprocessor

    @property
    def roof(self) -> float:
        """Bytes a second of a copy."""
        return COPY_SHARE * self.bandwidth

    def issue(self, thread_instructions: float) -> float:
        """Seconds to issue instructions of single threads, in whole warps."""
        return thread_instructions / (self.multiprocessors * SCHEDULERS * LANES * self.clock)

    def mufu(self, operations: float) -> float:
        """Seconds of the special function units."""
        return operations / (self.multiprocessors * MUFU_A_CYCLE * self.clock)

    def loads(self, bytes_read: float, under_way: float) -> float:
        """Seconds of reading if this many bytes a multiprocessor are under way at any time."""
        return bytes_read * LATENCY / (self.multiprocessors * under_way) if bytes_read else 0.0


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H200", 90, 4.8e12, 1.98e9, 132, 2048, 228 << 10),
        Gpu("H100", 90, 3.35e12, 1.98e9, 132, 2048, 228 << 10),  # SXM
        Gpu("A100", 80, 2.039e12, 1.41e9, 108, 2048, 164 << 10),  # SXM, 80 GB
        Gpu("L40S", 89, 0.864e12, 2.52e9, 142, 1536, 100 << 10),
        Gpu("B200", 100, 8.0e12, 1.965e9, 148, 2048, 228 << 10),
    )
}


class Launch(NamedTuple):
    """How a kernel runs, as the launch log has it."""

    threads: int
    cluster: int
    shared: int  # bytes a block
    resident: bool  # rows stay in shared memory between passes

    def blocks(self, gpu: Gpu, registers: int) -> int:
        """Blocks that run on a multiprocessor at a time."""
        by_shared = gpu.shared_bytes // (self.shared + 1024)
        warps = -(-self.threads // LANES)
        a_warp = -(-registers * LANES // 256) * 256  # registers are given out in 256
        by_registers = REGISTERS // a_warp // warps if registers else by_shared
        return max(1, min(by_shared, by_registers, gpu.threads // self.threads, 32))

    def teams(self, gpu: Gpu, registers: int) -> float:
        """Rows at a time on the device."""
        return gpu.multiprocessors * self.blocks(gpu, registers) / self.cluster


@dataclass(frozen=True)
class PassCount:
    """One pass over all rows: bytes, instructions of single threads, MUFU operations."""

    read: float
    written: float
    instructions: float
    mufu: float
    under_way: float  # bytes a multiprocessor


@dataclass(frozen=True)
class Stage:
    """One kernel of a call."""

    passes: tuple[PassCount, ...]
    serial: float  # seconds of serial work, all rows
    blocks: int  # a multiprocessor


class Times(NamedTuple):
    """Seconds of a call by cause, and what they add up to."""

    bytes: float
    issue: float
    mufu: float
    loads: float
    serial: float
    total: float  # nothing overlaps but what one pass does
    predicted: float

    @property
    def at_least(self) -> float:
        """Everything overlaps."""
        return max(self[:5])

    @property
    def binds(self) -> str:
        """The cause of the largest time."""
        return max(self._fields[:5], key=lambda name: getattr(self, name))


def times_of_stage(gpu: Gpu, stage: Stage) -> Times:
    """Apply the model to one kernel."""
    each = [
        (
            (x.read + x.written) / gpu.roof,
            gpu.issue(x.instructions),
            gpu.mufu(x.mufu),
            gpu.loads(x.read, x.under_way),
        )
        for x in stage.passes
    ]
    causes = [sum(column) for column in zip(*each, strict=True)]
    total = sum(max(x) for x in each) + stage.serial
    least = max(*causes, stage.serial)
    return Times(*causes, stage.serial, total, least + (total - least) / stage.blocks)


def times_of(gpu: Gpu, stages: Sequence[Stage]) -> Times:
    """Apply the model to a call: its kernels run one after another."""
    each = [times_of_stage(gpu, stage) for stage in stages]
    return Times(*(sum(column) for column in zip(*each, strict=True)))


@dataclass(frozen=True)
class Serial:
    """What one thread of a team does alone for a row, as read in the code and the SASS."""

    leader: int = 0  # instructions
    merge: int = 0  # instructions to merge the blocks' values, which lanes do together
    cluster_barriers: int = 0

    def seconds(self, gpu: Gpu, launch: Launch) -> float:
        """Seconds a row."""
        others = launch.cluster - 1
        cycles = DEPENDENT_CYCLES * (self.leader + (self.merge if others else 0))
        barriers = self.cluster_barriers if others else 0
        return cycles / gpu.clock + barriers * CLUSTER_BARRIER
