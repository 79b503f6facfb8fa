"""benchmarks.sass on small hand-written SASS, and on what nvcc makes of a small kernel."""

import shutil
import subprocess
from dataclasses import replace

import pytest
from sass_text import kernel_of, only_pass, text_of

from benchmarks import sass
from benchmarks.sass_code import is_range_checked, parse, parse_line
from benchmarks.sass_flow import WORDS_A_PACK, Work, blocks_of, loops_of

LOOP = """
    MOV R1, c[0x0][0x28]
    loop:
    LDG.E.128.CONSTANT R4, desc[UR4][R2.64]
    FADD R8, R8, R4
    MUFU.EX2 R9, R8
    IADD3 R2, R2, 0x10, RZ
    STG.E.128 desc[UR4][R2.64], R8
    DADD R10, R10, R12
    ISETP.GE.AND P0, PT, R2, R3, PT
    @!P0 BRA loop
    EXIT
"""


def test_a_line():
    found = parse_line("  /*00d0*/  @!P0 LDG.E.EF.128 R12, desc[UR8][R10.64] ;  /* 0x0 */")
    assert (found.address, found.guard, found.name) == (0xD0, "!P0", "LDG")
    assert found.load16
    assert found.conditional
    assert found.writes == {12, 13, 14, 15}
    assert found.reads == {10, 11}
    narrow = parse_line("/*0010*/ LDS.64 R2, [R4] ;")
    assert (narrow.shared_load16, replace(narrow, unit=8).shared_load16) == (0, 1)
    assert replace(found, unit=8).load16 == 2
    stored = parse_line("/*0010*/ STG.E.128 desc[UR4][R2.64], R8 ;")
    assert (stored.writes, stored.reads) == (frozenset(), {2, 3, 8, 9, 10, 11})
    assert parse_line("                        /* 0x000e220000000800 */") is None


def test_instructions_by_pipe():
    found = only_pass(LOOP)
    assert found.main.work == Work(loads=1, stores=1, mufu=1)
    assert found.main.instructions == 8
    assert found.main.pipes == {"fp": 1, "alu": 2, "mufu": 1, "fp64": 1, "memory": 2, "control": 1}


def test_local_memory_is_counted_anywhere():
    assert kernel_of(LOOP).local == 0
    assert kernel_of("STL [R1], R4\nLDL R4, [R1]\n" + LOOP).local == 2


# A pack that is cut by the row's end is loaded elsewhere, and sums get a new origin now and then.
DETOURS = """
    loop:
    @P1 BRA cut
    LDG.E.128 R4, desc[UR4][R2.64]
    here:
    FSETP.GT.AND P2, PT, R4, R9, PT
    @!P2 BRA same
    FMUL R9, R4, 1
    MUFU.EX2 R8, R9
    FMUL R10, R10, R8
    same:
    FADD R10, R10, R5
    ISETP.GE.AND P0, PT, R2, R3, PT
    @!P0 BRA loop
    EXIT
    cut:
    LDG.E.U16 R4, desc[UR4][R2.64]
    BRA here
"""


def test_the_main_path_has_the_most_packs_and_the_fewest_instructions():
    found = only_pass(DETOURS)
    assert found.size == 12
    assert found.main.instructions == 7  # neither the cut pack nor the new origin
    assert found.main.work == Work(loads=1)
    assert {tuple(x[:4]) for x in found.rounds} == {(1, 0, 0, 0), (0, 0, 0, 0)}


@pytest.mark.parametrize(
    ("body", "most"),
    [
        ("LDG.E.128 R4, [R2.64]\nFADD R1, R1, R4\nLDG.E.128 R8, [R2.64]\nFADD R1, R1, R8", 1),
        ("LDG.E.128 R4, [R2.64]\nLDG.E.128 R8, [R2.64]\nFADD R1, R4, R8", 2),
        # The last element of the first load is read between the two.
        ("LDG.E.128 R4, [R2.64]\nFADD R1, R1, R7\nLDG.E.128 R8, [R2.64]\nFADD R1, R1, R8", 1),
        # Loaded for the next round, whose first instruction reads it.
        ("FADD R1, R1, R4\nLDG.E.128 R8, [R2.64]\nLDG.E.128 R4, [R2.64]\nFADD R1, R1, R8", 2),
        ("LDG.E.64 R4, [R2.64]\nLDG.E.128 R8, [R2.64]\nFADD R1, R4, R8", 1),
    ],
)
def test_loads_in_flight(body, most):
    assert only_pass(f"loop:\n{body}\n@P0 BRA loop\nEXIT").main.in_flight == most


def test_a_loop_over_words_counts_once_for_each_word():
    found = only_pass("""
        loop:
        LDG.E.128 R4, desc[UR4][R2.64]
        words:
        MUFU.EX2 R8, R4
        FADD R9, R9, R8
        @P1 BRA words
        @P0 BRA loop
        EXIT
    """)
    assert found.main.instructions == 2 + 3 * WORDS_A_PACK
    assert found.main.work == Work(loads=1, mufu=WORDS_A_PACK)


def test_loops_with_a_shuffle_are_no_passes():
    assert not kernel_of(
        "loop:\nLDS.128 R4, [R2]\nSHFL.BFLY PT, R1, R4, 1, 31\n@P0 BRA loop"
    ).passes


@pytest.mark.parametrize("barrier", ["BAR.SYNC 0x0", "UCGABAR_WAIT"])
def test_a_loop_over_rows_is_no_pass(barrier):
    lines = f"""
        rows:
        STS.128 [R30], R4
        {barrier}
        loop:
        LDS.128 R4, [R2]
        @P0 BRA loop
        @P1 BRA rows
        EXIT
    """
    assert [x.begin for x in kernel_of(lines).passes] == [2 * 16]
    # A barrier after each chunk.
    assert kernel_of(f"loop:\nLDS.128 R4, [R2]\n{barrier}\n@P0 BRA loop").passes


def test_what_a_branch_says_of_guarded_accesses():
    """Loads under a guard and a branch under the same one: both or none."""
    found = only_pass("""
        loop:
        ISETP.NE.AND P1, PT, R20, RZ, PT
        @P1 LDS.128 R8, [R20]
        @P1 BRA have
        LDS.128 R8, [R21]
        LDGSTS.E.BYPASS.128 [R21], desc[UR4][R2.64]
        have:
        FADD R1, R1, R8
        @P0 BRA loop
        EXIT
    """)
    rounds = {work: x.instructions for work, x in found.rounds.items()}
    assert rounds == {Work(shared_loads=1): 5, Work(shared_loads=1, copies=1): 7}


def test_a_guard_that_changes_before_the_branch_says_nothing():
    found = only_pass("""
        loop:
        @P1 LDS.128 R8, [R20]
        ISETP.NE.AND P1, PT, R20, RZ, PT
        @P1 BRA have
        FADD R1, R1, R8
        have:
        @P0 BRA loop
        EXIT
    """)
    assert list(found.rounds) == [Work(shared_loads=1)]


def test_bulk_copies_and_a_wait_for_them():
    kernel = kernel_of("""
        chunks:
        UBLKCP.S.G [UR8], [UR6], UR5
        wait:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR5], R5
        @!P0 BRA wait
        LDS.128 R4, [R2]
        BAR.SYNC 0x0
        UBLKCP.G.S [UR6], [UR8], UR5
        @P1 BRA chunks
        EXIT
    """)
    assert kernel.copies == 1  # the other one goes to global memory
    (only,) = kernel.passes
    assert only.main.instructions == 7  # the wait once


def test_loops_that_move_less_than_16_bytes_are_no_passes():
    assert not kernel_of("loop:\nLDS.64 R4, [R2]\n@P0 BRA loop\nEXIT").passes


CHECKED_EXP2 = """
    FSETP.GEU.AND P4, PT, R2, -126, PT
    @!P4 FMUL R2, R2, 0.5
    MUFU.EX2 R3, R2
    @!P4 FMUL R3, R3, R3
"""
PLAIN_EXP2 = "FMUL R2, R2, 1.5\nMUFU.EX2 R3, R2\nFMUL R4, R3, R5"
CHECKED_LOG2 = """
    FSETP.GEU.AND P1, PT, |R2|, 1.175494350822287508e-38, PT
    @!P1 FMUL R2, R2, 16777216
    MUFU.LG2 R3, R2
    @!P1 FADD R3, R3, -24
"""
PLAIN_LOG2 = "FADD R2, R2, 1\nMUFU.LG2 R3, R2\nFADD R4, R4, R3"


@pytest.mark.parametrize(
    ("lines", "checked"),
    [(CHECKED_EXP2, 1), (PLAIN_EXP2, 0), (CHECKED_LOG2, 1), (PLAIN_LOG2, 0)],
)
def test_exponentials_that_take_denormals(lines, checked):
    (code,) = parse(text_of(lines)).values()
    assert sum(is_range_checked(code, i) for i in range(len(code))) == checked
    found = only_pass(f"loop:\nLDG.E.128 R8, [R10.64]\n{lines}\n@P0 BRA loop\nEXIT")
    assert found.main.checked == checked


def test_bsync_goes_on_where_its_bssy_says():
    found = only_pass("""
        loop:
        BSSY B1, out
        LDG.E.128 R4, desc[UR4][R2.64]
        @P1 BRA other
        FADD R8, R8, R4
        BSYNC B1
        out:
        @P0 BRA loop
        EXIT
        other:
        BSYNC B1
        FADD R9, R9, R9
    """)
    assert found.main.instructions == 5  # through `other`, whose BSYNC ends at `out`


def test_code_behind_a_jump_table_is_found():
    found = only_pass("""
        MOV R1, R2
        BRX R4 -0x20
        NOP
        loop:
        LDG.E.128 R4, desc[UR4][R2.64]
        @P0 BRA loop
        EXIT
    """)
    assert found.main.work.loads == 1


def test_natural_loops_nest():
    (code,) = parse(text_of("a:\nMOV R1, R1\nb:\nMOV R2, R2\n@P0 BRA b\n@P1 BRA a\nEXIT")).values()
    blocks = blocks_of(code)
    inner, outer = loops_of(blocks)
    assert inner.blocks < outer.blocks


SOURCE = """
__global__ void sum(const uint4* in, float* out, int packs) {
  float total = 0;
  for (int i = threadIdx.x; i < packs; i += 256) {
    const uint4 x = in[i];
    total += exp2f(__uint_as_float(x.x)) + exp2f(__uint_as_float(x.y)) + (x.z ^ x.w);
  }
  out[threadIdx.x] = total;
}
__device__ float fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__global__ void scale(const uint4* in, uint4* out, int packs) {
#pragma unroll 1
  for (int i = threadIdx.x; i < packs; i += 512) {
    uint4 x = in[i];
    const uint4 y = in[i + 256];
    x.x = __float_as_uint(fast(__uint_as_float(x.x)) + __uint_as_float(y.x));
    x.y ^= y.y, x.z ^= y.z, x.w ^= y.w;
    out[i] = x;
  }
}
"""


@pytest.mark.skipif(
    not (shutil.which("nvcc") and sass.find_tool("cuobjdump") and sass.find_tool("nvdisasm")),
    reason="needs nvcc, cuobjdump and nvdisasm",
)
def test_what_nvcc_makes_of_a_kernel(tmp_path):
    (tmp_path / "small.cu").write_text(SOURCE)
    command = ["nvcc", "-arch=sm_90", "-cubin", "-o", "small.cubin", "small.cu"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    binary = tmp_path / "small.cubin"
    found = sass.kernels(sass.disassemble(binary))
    total, scale = (next(x for n, x in found.items() if name in n) for name in ("3sum", "5scale"))
    assert (total.local, scale.local) == (0, 0)
    assert set(sass.registers(binary)) == set(found)
    hot = next(x for x in total.passes if x.hot)
    packs = hot.main.work.loads
    assert packs >= 1
    assert hot.main.work.mufu == hot.main.checked == 2 * packs
    (only,) = scale.passes
    assert only.main.work == Work(loads=2, stores=1, mufu=1)
    assert (only.main.checked, only.main.in_flight) == (0, 2)
    assert only.main.instructions < 40
