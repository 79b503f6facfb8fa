"""Hand-written SASS for the tests of its reader."""

import re

from benchmarks import sass


def text_of(lines, name="kernel"):
    """SASS as cuobjdump prints it. A line "x:" is a label, which other lines name."""
    code, labels = [], {}
    for line in lines.strip().splitlines():
        if line.strip().endswith(":"):
            labels[line.strip()[:-1]] = f"0x{16 * len(code):x}"
        elif line.strip():
            code.append(line.strip())
    out = [f"\t\tFunction : {name}"]
    for i, line in enumerate(code):
        known = re.sub(r"(\w+)$", lambda m: labels.get(m[1], m[1]), line)
        out.append(f"        /*{16 * i:04x}*/  {known} ;   /* 0x0000000000000000 */")
        out.append("                                 /* 0x000e220000000800 */")
    return "\n".join(out)


def kernel_of(lines):
    (found,) = sass.kernels(text_of(lines)).values()
    return found


def only_pass(lines):
    (found,) = kernel_of(lines).passes
    return found
