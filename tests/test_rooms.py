"""Which file may include or import which: rooms go down, and nothing goes round in a circle."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom up; a room may use itself and those before it that are named.
CSRC = {
    "math": (),
    "arguments": ("math",),
    "host": (),
    "cpu/common": ("math", "arguments"),
    "cpu": ("math", "arguments", "cpu/common"),
    "cpu/kernels": ("math", "arguments", "cpu/common", "cpu"),
    "cuda/common": ("math", "arguments"),
    "cuda": ("math", "arguments", "cuda/common"),
}
FASTKD = {
    "_ops": (),
    "typing": ("_ops",),
    "reference": ("_ops",),
    "teachers": ("_ops", "reference"),
    "losses": ("_ops", "reference", "teachers"),
    "tokenizers": ("_ops", "reference"),
    "acm": ("_ops", "reference"),
    "nn": ("_ops", "reference", "losses", "teachers", "tokenizers", "acm"),
    "recipes": ("_ops", "reference", "losses", "teachers", "tokenizers", "acm"),
    "integrations": ("_ops", "reference", "losses", "teachers", "tokenizers", "acm"),
}


def circle(edges: dict[str, set[str]]) -> list[str]:
    """A path that ends where it begins, or nothing."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for following in sorted(edges.get(node, ())):
            if found := walk(following, [*path, node]):
                return found
        done.add(node)
        return []

    for node in sorted(edges):
        if found := walk(node, []):
            return found
    return []


# --- C++ ------------------------------------------------------------------------------------------


def includes() -> dict[str, set[str]]:
    csrc, found = ROOT / "csrc", {}
    for path in csrc.rglob("*"):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh"):
            continue
        names = re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)
        targets = [(path.parent / name).resolve() for name in names]
        found[path.relative_to(csrc).as_posix()] = {
            target.relative_to(csrc).as_posix() for target in targets if target.exists()
        }
    return found


def room_of(path: str) -> str:
    return path.rpartition("/")[0]


def test_includes_go_down():
    found = includes()
    assert len(found) > 80
    for path, targets in found.items():
        room = room_of(path)
        if room == "":  # library.cpp
            continue
        for target in targets:
            allowed = (room, *CSRC[room])
            assert room_of(target) in allowed, f"csrc/{path} includes csrc/{target}"
    assert circle(found) == []


# --- Python ---------------------------------------------------------------------------------------


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(everywhere: bool) -> dict[str, set[str]]:
    """Of each module of fastkd, the modules of fastkd that it imports.

    everywhere: inside functions, too.
    """
    paths = sorted((ROOT / "fastkd").rglob("*.py"))
    modules = {module_of(path) for path in paths}
    found: dict[str, set[str]] = {}
    for path in paths:
        name = module_of(path)
        tree = ast.parse(path.read_text())
        nodes = ast.walk(tree) if everywhere else tree.body
        targets = set()
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    targets.add(inner if inner in modules else node.module)
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
        found[name] = {x for x in targets if x.split(".")[0] == "fastkd"} - {name}
    return found


def test_imports_go_down():
    found = imports(everywhere=True)
    assert len(found) > 40
    for module, targets in found.items():
        if module in ("fastkd", "fastkd.__main__"):
            continue
        room = module.split(".")[1]
        for target in targets:
            assert target != "fastkd", f"{module} imports the package that imports it"
            other = target.split(".")[1]
            compiled = room == "tokenizers" and other == "_host"
            assert compiled or other in (room, *FASTKD[room]), f"{module} imports {target}"
    assert circle(found) == []


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c", "b"]),
    ],
)
def test_circles_are_found(edges, expected):
    assert circle(edges) == expected


def test_no_module_is_called_like_what_it_holds():
    import fastkd

    for room in ("losses", "teachers", "tokenizers", "acm"):
        names = {path.stem for path in (ROOT / "fastkd" / room).glob("*.py")}
        assert not names & set(dir(fastkd)) - {"__init__"}
