"""The instruments: time of interleaved steps, peak memory of a step, the roof."""

import ctypes
import gc
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.shapes import Traffic

Step = Callable[[], object]

MIB = 1 << 20

MINIMAL_ROUNDS, MAXIMAL_ROUNDS = 3, 200
#: Short steps are repeated within a sample, so that reading the clock stays far below 1 %.
SAMPLE_SECONDS = 1e-3
#: Seconds that a GPU waits before a step, while the host launches the step's kernels. A step that
#: waits for the device itself always takes the host longer than that.
LEAST_WAIT, MOST_WAIT = 1e-3, 5e-3


@dataclass(frozen=True)
class Timing:
    """Seconds of one step over the rounds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range over the median: what the machine's noise leaves open."""
        if len(self.samples) < 2:
            return math.nan
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / self.median


def time_interleaved(
    steps: dict[str, Step],
    device: torch.device,
    budget: float,
    on_round: Callable[[float], None] = lambda done: None,
) -> dict[str, Timing]:
    """Run all steps in turn, again and again, until `budget` seconds are spent.

    A machine slows down and speeds up over seconds: whoever is compared must share each moment.
    The order rotates, so that everybody finds everybody else's leavings in the caches.
    Every step must have run before, which also compiles it.
    """
    take = _cuda_sampler(device) if device.type == "cuda" else _cpu_sample
    calls = {name: _calls_a_sample(step, device) for name, step in steps.items()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    start = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(MAXIMAL_ROUNDS):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(take(steps[name], calls[name]))
            spent = time.perf_counter() - start
            on_round(min(1.0, spent / budget))
            if spent > budget and turn + 1 >= MINIMAL_ROUNDS:
                break
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


def cpu_seconds_of_others() -> float | None:
    """Return the core seconds that all other processes and virtual machines took since boot.

    Two threads that share a core with a stranger wait for each other at every barrier: a result
    is worth its ratios only where this hardly grew. None where the system does not say.
    """
    try:
        user, nice, system, _, _, irq, softirq, steal = (
            int(ticks) for ticks in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
        )
    except (OSError, ValueError):
        return None
    everybody = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return everybody - time.process_time()


def _calls_a_sample(step: Step, device: torch.device) -> int:
    if device.type == "cuda":
        return 1
    return max(1, min(1000, math.ceil(SAMPLE_SECONDS / min(_cpu_sample(step, 1) for _ in "12"))))


def _cpu_sample(step: Step, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def _cuda_sampler(device: torch.device) -> Callable[[Step, int], float]:
    """Time on the device, with the L2 overwritten first.

    Then the device waits for longer than the host needs to launch the step (for twice what it last
    took), so that the step's kernels are in the queue and launch latency stays out of the time.
    """
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(max(4 * l2_bytes, 1 << 28), dtype=torch.uint8, device=device)
    cycles = _cycles_a_second()
    host: dict[int, float] = {}

    def take(step: Step, calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        wait = min(max(LEAST_WAIT, 2 * calls * host.get(id(step), 0.0)), MOST_WAIT)
        torch.cuda._sleep(int(wait * cycles))
        begin.record()
        start = time.perf_counter()
        for _ in range(calls):
            step()
        host[id(step)] = (time.perf_counter() - start) / calls
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / calls

    return take


def _cycles_a_second() -> float:
    """Of the clock that torch.cuda._sleep counts by, now."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for cycles in (1_000_000, 10_000_000):  # the first to wake the device
        begin.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
    return 10_000_000 / (begin.elapsed_time(end) * 1e-3)


@dataclass(frozen=True)
class Memory:
    """Bytes of a step beyond what was held before: the most during it, and what stays after it."""

    peak: int
    kept: int


def memory_of(step: Step, device: torch.device) -> Memory | None:
    """Return what `step` takes; None where the system does not say.

    On the CPU that is resident memory: Linux keeps its high-water mark and lets a process reset
    its own. Memory freed earlier but kept by malloc is given back first, or it would hide in the
    start. `step` must have run before; what it keeps from then must have been released.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        peak, after = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        return Memory(peak - before, after - before)
    try:
        _give_back_free_memory()
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident_bytes("VmRSS")
        step()
        peak = _resident_bytes("VmHWM")
        _give_back_free_memory()
        return Memory(max(0, peak - before), max(0, _resident_bytes("VmRSS") - before))
    except (OSError, AttributeError):
        return None


def _give_back_free_memory() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _resident_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that a step may still take, None where unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith("MemAvailable:")]
    return int(found[0].split()[1]) * 1024 if found else None


def roofs(first: Tensor, second: Tensor, traffic: Traffic) -> dict[str, Step]:
    """Plain kernels that move the bytes of `traffic` and do nothing else worth mentioning.

    The bytes are taken as float32, whatever they hold: converting bfloat16 is arithmetic, which
    the roof must be free of. Which reader is fastest depends on the machine (dot products run at
    memory speed here, sums and maxima do not everywhere): all run, the fastest is the roof. On a
    GPU a raw kernel runs too, where CuPy is installed.
    """
    a, b = _as_float32(first), _as_float32(second)
    return _torch_roofs(a, b, traffic) | (_cupy_roof(a, b, traffic) if a.is_cuda else {})


def _cupy_roof(a: Tensor, b: Tensor, traffic: Traffic) -> dict[str, Step]:
    from benchmarks import cupy_roofs

    try:
        return {"16-byte packs": cupy_roofs.step(a, b, traffic)}
    except ImportError as error:
        print(f"!!! no raw kernel among the roofs ({error}): pip install cupy-cuda12x")
        return {}


def _torch_roofs(a: Tensor, b: Tensor, traffic: Traffic) -> dict[str, Step]:
    norm = torch.linalg.vector_norm
    if (traffic.reads, traffic.writes) == (1, 1):
        c = torch.empty_like(a)
        return {"Tensor.copy_": lambda: c.copy_(a)}
    if (traffic.reads, traffic.writes) == (1, 0):
        return {"norm": lambda: norm(a), "sum": lambda: a.sum()}
    if (traffic.reads, traffic.writes) == (2, 1):
        c = torch.empty_like(a)
        return {"torch.add": lambda: torch.add(a, b, out=c)}
    if (traffic.reads, traffic.writes) == (2, 0):
        return {"torch.dot": lambda: torch.dot(a, b), "2 norms": lambda: (norm(a), norm(b))}
    if (traffic.reads, traffic.writes) == (3, 1):
        c, d = torch.empty_like(a), torch.ones_like(a)
        return {
            "torch.addcmul": lambda: torch.addcmul(a, b, d, out=c),
            "torch.add, norm": lambda: (torch.add(a, b, out=c), norm(d)),
        }
    raise ValueError(f"no plain kernel is known that moves {traffic}")


def _as_float32(tensor: Tensor) -> Tensor:
    raw = tensor.detach().reshape(-1).view(torch.uint8)
    return raw[: raw.numel() // 4 * 4].view(torch.float32)
