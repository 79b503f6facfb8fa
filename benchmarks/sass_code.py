"""Instructions of a GPU kernel, parsed from what `cuobjdump -sass` or `nvdisasm` prints."""

import re
from dataclasses import dataclass
from functools import cached_property

PIPES = ("fp", "alu", "mufu", "fp64", "memory", "control")

_FP64 = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX", "DMMA")
_FP = (
    *("FADD", "FMUL", "FFMA", "FSWZADD", "FCHK", "HADD2", "HMUL2", "HFMA2"),
    *("F2F", "F2FP", "I2F", "I2FP", "F2I", "FRND"),
)
_MEMORY = (
    *("LD", "LDG", "LDS", "LDL", "LDSM", "LDGSTS", "ST", "STG", "STS", "STL", "STSM"),
    *("ATOM", "ATOMS", "ATOMG", "RED", "SHFL", "UBLKCP", "SYNCS", "CCTL", "MEMBAR", "FENCE"),
    *("ERRBAR", "CGAERRBAR", "UTMALDG", "UTMASTG", "UTMACMDFLUSH", "LDGDEPBAR", "ARRIVES"),
)
_CONTROL = (
    *("BRA", "BRX", "BRXU", "BSSY", "BSYNC", "EXIT", "CALL", "RET", "BAR", "WARPSYNC", "NOP"),
    *("YIELD", "DEPBAR", "JMP", "BREAK", "BMOV", "UCGABAR_ARV", "UCGABAR_WAIT", "ENDCOLLECTIVE"),
)
#: Instructions whose first operand is read, not written.
_NO_RESULT = ("ST", "STG", "STS", "STL", "RED", "CCTL", "BRA", "EXIT", "BAR", "SYNCS", "UBLKCP")

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;")
_FUNCTION = re.compile(r"Function : (\S+)")
_GUARD = re.compile(r"^@(!?U?P[T\d]\w*)\s+")
_REGISTER = re.compile(r"\bR(\d+)(?:\.reuse)?(\.64)?")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_BARRIER = re.compile(r"\bB(\d+)\b")


@dataclass(frozen=True)
class Instruction:
    """One line: address, guard ("P0", "!P0" or ""), opcode with suffixes, operands.

    unit: how many bytes are counted as an access. With 8, one of 16 bytes counts as two.
    """

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]
    unit: int = 16

    @cached_property
    def name(self) -> str:
        """The opcode without suffixes."""
        return self.opcode.split(".")[0]

    @cached_property
    def pipe(self) -> str:
        """One of PIPES. Moves, selects, comparisons and integers are "alu"."""
        if self.name == "MUFU":
            return "mufu"
        for pipe, names in (
            ("fp64", _FP64),
            ("fp", _FP),
            ("memory", _MEMORY),
            ("control", _CONTROL),
        ):
            if self.name in names:
                return pipe
        return "alu"

    @cached_property
    def conditional(self) -> bool:
        """Whether a guard may switch it off."""
        return self.guard not in ("", "PT", "UPT")

    @cached_property
    def wide(self) -> int:
        """How many units it moves a thread: 1 if it moves 16 bytes."""
        suffixes = self.opcode.split(".")
        return next((n // 8 // self.unit for n in (128, 64) if str(n) in suffixes), 0)

    @cached_property
    def load16(self) -> int:
        """A 16-byte load from global memory to registers."""
        return self.wide if self.name == "LDG" else 0

    @cached_property
    def store16(self) -> int:
        """A 16-byte store to global memory."""
        return self.wide if self.name == "STG" else 0

    @cached_property
    def shared_load16(self) -> int:
        """A 16-byte load from shared memory."""
        return self.wide if self.name == "LDS" else 0

    @cached_property
    def shared_store16(self) -> int:
        """A 16-byte store to shared memory."""
        return self.wide if self.name == "STS" else 0

    @cached_property
    def copy16(self) -> int:
        """A copy of 16 bytes from global to shared memory that needs no register (cp.async)."""
        return self.wide if self.name == "LDGSTS" else 0

    @cached_property
    def bulk(self) -> bool:
        """A copy from global to shared memory of many bytes (cp.async.bulk, TMA)."""
        return self.name == "UTMALDG" or self.opcode.startswith("UBLKCP.S.G")

    @cached_property
    def local(self) -> bool:
        """A spill, or an array that is not in registers."""
        return self.name in ("LDL", "STL")

    @cached_property
    def target(self) -> int | None:
        """Where a branch goes, or the address that a BSSY reconverges at."""
        if self.name not in ("BRA", "BSSY", "JMP", "WARPSYNC"):
            return None
        found = _TARGET.search(self.operands[-1]) if self.operands else None
        return int(found[1], 16) if found else None

    @cached_property
    def barrier(self) -> str:
        """The convergence barrier that BSSY sets and BSYNC waits for."""
        found = _BARRIER.search(", ".join(self.operands[:1]))
        return found[0] if found else ""

    @cached_property
    def writes(self) -> frozenset[int]:
        """Numbers of the registers that it writes."""
        if self.name in _NO_RESULT or "SETP" in self.name or not self.operands:
            return frozenset()
        result = next((x for x in self.operands if x.startswith("R")), "")
        if result != self.operands[0] and not re.fullmatch(r"U?P[T\d]", self.operands[0]):
            return frozenset()
        numbers = _registers(result)
        if not numbers:
            return frozenset()
        suffixes = self.opcode.split(".")
        size = 4 if self.wide else 2 if "64" in suffixes or "WIDE" in suffixes else 1
        return frozenset(range(min(numbers), min(numbers) + max(size, len(numbers))))

    @cached_property
    def reads(self) -> frozenset[int]:
        """Numbers of the registers that it reads."""
        first = 0 if self.name in _NO_RESULT or "SETP" in self.name else 1
        numbers = _registers(", ".join(self.operands[first:]))
        if self.store16 or self.shared_store16:
            data = _registers(self.operands[-1])
            numbers |= {x + i for x in data for i in range(4)}
        return frozenset(numbers)


def _registers(text: str) -> set[int]:
    found = set()
    for number, pair in _REGISTER.findall(text):
        found.add(int(number))
        if pair:
            found.add(int(number) + 1)
    return found


def parse_line(line: str) -> Instruction | None:
    """Return the instruction of a line of SASS, None for any other line."""
    found = _LINE.match(line)
    if not found:
        return None
    text, guard = found[2], ""
    if head := _GUARD.match(text):
        guard, text = head[1], text[head.end() :]
    opcode, _, rest = text.partition(" ")
    operands = tuple(x.strip() for x in rest.split(",")) if rest.strip() else ()
    return Instruction(int(found[1], 16), guard, opcode, operands)


def parse(text: str) -> dict[str, list[Instruction]]:
    """Return the kernels of a disassembly by their mangled names."""
    kernels: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in text.splitlines():
        if head := _FUNCTION.search(line):
            code = kernels.setdefault(head[1], [])
        elif instruction := parse_line(line):
            code.append(instruction)
    return kernels


def is_range_checked(code: list[Instruction], place: int) -> bool:
    """Whether the MUFU at this place is part of an exp2 or log2 that also takes denormals.

    exp2: below -126 the argument is halved and the result squared (`@!P FMUL r, r, r`).
    log2: a denormal argument is multiplied by 2^24, and 24 is subtracted from the result.
    """
    mufu = code[place]
    if not mufu.opcode.startswith(("MUFU.EX2", "MUFU.LG2")):
        return False
    result = mufu.writes
    if mufu.opcode.startswith("MUFU.LG2"):
        source = mufu.reads
        for before in reversed(code[max(0, place - 40) : place]):
            if source & before.writes:
                if "16777216" in before.operands or "8388608" in before.operands:
                    return True
                if not before.conditional:
                    return False
        return False
    for after in code[place + 1 : place + 40]:
        if after.name == "FMUL" and after.conditional and _squares(after, result):
            return True
        if result & after.writes and not after.conditional:
            return False
    return False


def _squares(instruction: Instruction, registers: frozenset[int]) -> bool:
    factors = [_registers(x) for x in instruction.operands[1:3]]
    return len(factors) == 2 and all(x and x <= registers for x in factors)
