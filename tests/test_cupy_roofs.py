"""The raw kernel of the GPU's roofs, compiled by g++ and run thread by thread on the CPU."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest

from benchmarks.cupy_roofs import NAME, THREADS, source
from benchmarks.shapes import Traffic

# Just enough of CUDA for a kernel without barriers; loads and stores are counted.
PROLOGUE = """
struct Index { unsigned x; };
static thread_local Index threadIdx, blockIdx, blockDim, gridDim;
struct alignas(16) uint4 { unsigned x, y, z, w; };
#define __device__
#define __global__
#define __restrict__
"""
EPILOGUE = """
extern "C" void run(unsigned blocks, unsigned threads, void** in, void** out, long long packs) {
  blockDim.x = threads, gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) NAME(ARGUMENTS, packs);
  }
}
"""
GUARD = 0xABABABAB


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on the PATH")
@pytest.mark.parametrize(("reads", "writes"), [(1, 0), (2, 0), (1, 1), (2, 1), (3, 1)])
def test_every_pack_is_moved_once(tmp_path, reads, writes):
    text = source(Traffic(reads, writes))
    assert "pragma unroll" in text
    arguments = [f"(const uint4*)in[{i}]" for i in range(reads)]
    arguments += [f"(uint4*)out[{i}]" for i in range(max(writes, 1))]
    end = EPILOGUE.replace("NAME", NAME).replace("ARGUMENTS", ", ".join(arguments))
    (tmp_path / "kernel.cpp").write_text(PROLOGUE + text + end)
    subprocess.run(
        ["g++", "-O1", "-shared", "-fPIC", "-w", "-o", "kernel.so", "kernel.cpp"],
        cwd=tmp_path,
        check=True,
    )
    run = ctypes.CDLL(str(tmp_path / "kernel.so")).run
    random = np.random.default_rng(0)
    # Whole chunks for some blocks, a cut one, and less than a chunk.
    for packs in (1, THREADS, 4 * THREADS * 7, 4 * THREADS * 7 + 1029):
        inputs = random.integers(0, 2**32, (reads, packs, 4), dtype=np.uint32)
        right = np.bitwise_xor.reduce(inputs, 0)
        outputs = np.full((max(writes, 1), packs + 1, 4), GUARD, np.uint32)
        if not writes:
            # What no random data gives: the kernel says that it has read everything.
            last = np.bitwise_xor.reduce(right, 0)
            inputs[0, 0, :2] ^= last[:2] ^ np.array([0x9E3779B9, 0x7F4A7C15], np.uint32)
        for blocks, threads in ((3, THREADS), (1, 1)):
            if not writes and (blocks, threads) != (1, 1):
                continue  # each thread has a part: only one thread has seen all
            outputs[:] = GUARD
            pointers = ctypes.c_void_p * 4
            run(
                *(blocks, threads),
                pointers(*(x.ctypes.data for x in inputs)),
                pointers(*(x.ctypes.data for x in outputs)),
                ctypes.c_longlong(packs),
            )
            if writes:
                assert (outputs[:, :packs] == right).all()
                assert (outputs[:, packs] == GUARD).all()
            else:
                assert outputs[0, 0, 0] == 0x9E3779B9


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
def test_nvcc_compiles_it_without_local_memory(tmp_path):
    for reads, writes in ((1, 0), (3, 1)):
        (tmp_path / "kernel.cu").write_text(source(Traffic(reads, writes)))
        done = subprocess.run(
            ["nvcc", "-arch=sm_90", "-Xptxas=-v", "-cubin", "-o", "kernel.cubin", "kernel.cu"],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        )
        assert "0 bytes stack frame, 0 bytes spill stores" in done.stderr, done.stderr
