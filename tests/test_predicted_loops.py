"""Which loop of a kernel is which pass of an op, on hand-written SASS."""

from dataclasses import replace

import pytest
from sass_text import kernel_of, text_of

from benchmarks.predicted_loops import count_kernel
from benchmarks.predicted_ops import DTYPES, MIXED, Over
from benchmarks.sass import read
from benchmarks.sass_code import parse
from benchmarks.sass_flow import Work


def test_of_an_unrolled_loop_and_its_remainder_the_first_is_hot():
    unrolled = """
        big:
        LDG.E.128 R4, desc[UR4][R2.64]
        LDG.E.128 R8, desc[UR4][R2.64+0x10]
        FADD R12, R4, R8
        @P0 BRA big
        rest:
        LDG.E.128 R4, desc[UR4][R2.64]
        FADD R12, R12, R4
        @P1 BRA rest
        EXIT
    """
    big, rest = kernel_of(unrolled).passes
    assert (big.hot, rest.hot) == (True, False)
    over = Over(1, again=False, mufu=0)
    (count,) = count_kernel(kernel_of(unrolled), (over,), "bfloat16").reread
    assert count.instructions == 4 / 16  # of the unrolled loop: 2 packs of 8 entries
    assert count.in_flight == 2


# Rows that are copied to shared memory by a loop of their own (cp.async) and stay there, or that
# each pass copies ahead of what it reads.
COPIED = """
    start:
    LDGSTS.E.BYPASS.128 [R20], desc[UR4][R2.64]
    LDGSTS.E.BYPASS.128 [R20+0x8000], desc[UR4][R4.64]
    IADD3 R20, R20, 0x1000, RZ
    @P1 BRA start
    pass:
    LDS.128 R8, [R20]
    LDS.128 R12, [R20+0x8000]
    @P2 BRA stays
    LDGSTS.E.BYPASS.128 [R20], desc[UR4][R2.64]
    LDGSTS.E.BYPASS.128 [R20+0x8000], desc[UR4][R4.64]
    stays:
    MUFU.EX2 R16, R8
    @P0 BRA pass
    EXIT
"""


def test_copies_to_shared_memory():
    kernel = kernel_of(COPIED)
    assert kernel.copies == 4
    start, over = kernel.passes
    assert start.main.work == Work(copies=2)
    assert over.main.work == Work(shared_loads=2, copies=2, mufu=1)
    found = count_kernel(kernel, (Over(2, again=False, mufu=0),), "float32")
    assert [x.instructions * 4 for x in found.kept] == [4 + 5]
    assert [x.instructions * 4 for x in found.reread] == [7]
    assert found.copies == 4


def test_bulk_copies():
    """One thread copies the rows that stay; the loop of copies is for others."""
    bulk = "UBLKCP.S.G [UR8], [UR6], UR5"
    kernel = kernel_of(f"{bulk}\n{bulk}\n{COPIED}")
    assert (kernel.copies, kernel.bulk) == (6, 2)
    found = count_kernel(kernel, (Over(2, again=False, mufu=0),), "float32")
    assert [x.instructions * 4 for x in found.kept] == [5]
    assert [x.instructions * 4 for x in found.reread] == [7]
    assert found.copies == 6


# Two passes of a pair in one kernel: the first fills shared memory, the second reads it, or memory
# again, and writes. A third loop does what the second does with more instructions.
TWO_PASSES = """
    first:
    LDG.E.128 R4, desc[UR4][R2.64]
    LDG.E.128 R8, desc[UR4][R2.64+0x10]
    @P6 BRA lost
    STS.128 [R20], R4
    STS.128 [R20+0x10], R8
    lost:
    MUFU.EX2 R12, R4
    @P0 BRA first
    rare:
    LDS.128 R4, [R20]
    LDS.128 R8, [R20+0x10]
    MUFU.EX2 R12, R4
    FADD R12, R12, R5
    FADD R12, R12, R5
    FADD R12, R12, R5
    FADD R12, R12, R5
    STG.E.128 desc[UR4][R2.64], R8
    @P1 BRA rare
    second:
    @P6 BRA again
    LDS.128 R4, [R20]
    LDS.128 R8, [R20+0x10]
    BRA have
    again:
    LDG.E.128 R4, desc[UR4][R2.64]
    LDG.E.128 R8, desc[UR4][R2.64+0x10]
    have:
    @P5 BRA one
    STG.E.128 desc[UR4][R22.64], R4
    one:
    MUFU.EX2 R12, R4
    STG.E.128 desc[UR4][R2.64], R8
    @P2 BRA second
    EXIT
"""
PAIR = (Over(2, again=False, mufu=0), Over(2, 1, mufu=0))


def test_passes_of_an_op():
    found = count_kernel(kernel_of(TWO_PASSES), PAIR, "float32")
    assert [x.instructions * 4 for x in found.kept] == [7, 8]
    assert [x.instructions * 4 for x in found.reread] == [5, 7]
    assert [x.in_flight for x in found.reread] == [2, 2]
    assert [x.pipes["mufu"] for x in found.kept] == [0.25, 0.25]


def test_a_pass_takes_a_loop_without_a_barrier():
    lines = """
        sort:
        LDS.128 R4, [R20]
        BAR.SYNC 0x0
        @P0 BRA sort
        pass:
        LDS.128 R4, [R20]
        FADD R1, R1, R4
        FADD R1, R1, R5
        @P1 BRA pass
        EXIT
    """
    (count,) = count_kernel(kernel_of(lines), (Over(1, mufu=0),), "float32").kept
    assert count.instructions == 4 / 4


def test_a_pass_that_writes_nothing_takes_a_loop_that_cannot():
    lines = """
        write:
        LDS.128 R4, [R20]
        @P3 STG.E.128 desc[UR4][R22.64], R4
        @P3 BRA stored
        STG.E.U16 desc[UR4][R22.64], R4
        stored:
        @P0 BRA write
        sums:
        LDS.128 R4, [R20]
        FADD R1, R1, R4
        FADD R1, R1, R5
        FADD R1, R1, R6
        FADD R1, R1, R7
        @P1 BRA sums
        EXIT
    """
    found = count_kernel(kernel_of(lines), (Over(1, mufu=0), Over(1, 1, mufu=0)), "float32").kept
    assert [x.instructions * 4 for x in found] == [6, 4]


def test_a_pass_has_its_mufu_operations():
    with pytest.raises(LookupError, match="no loop is the pass"):
        count_kernel(kernel_of(TWO_PASSES), (Over(2, 1, mufu=1),), "float32")


def test_of_two_dtypes_no_loop_with_more_than_one_pack():
    # Both gradients: the parameters' two loads of 8 bytes would make up a second pack.
    lines = """
        both:
        LDS.64 R20, [R40]
        LDS.64 R22, [R40+0x8]
        LDS.128 R8, [R30]
        LDS.128 R12, [R31]
        STG.E.128 desc[UR4][R2.64], R8
        STG.E.128 desc[UR4][R4.64], R12
        @P0 BRA both
        one:
        LDS.128 R8, [R30]
        LDS.64 R12, [R31]
        FADD R8, R8, R12
        STG.E.128 desc[UR4][R2.64], R8
        @P1 BRA one
        EXIT
    """
    ((name, code),) = parse(text_of(lines)).items()
    kernel = read(name, [replace(x, unit=DTYPES[MIXED].unit) for x in code])
    (found,) = count_kernel(kernel, (Over(2, 1, mufu=0),), MIXED).kept
    assert found.instructions * 4 == 5
