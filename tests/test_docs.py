"""The pages: their code runs, their names exist, the API reference is complete, the site builds.

A page's blocks share one namespace. A comment above a block says that it is not run everywhere:
`<!-- needs: accelerate, transformers>=5 -->` runs it where these packages are installed, `<!-- not
run: REASON -->` nowhere. All blocks are compiled.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import fastkd

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
PAGE_NAMES = [path.name for path in PAGES]

_BLOCK = re.compile(
    r"(?:^<!--(?P<mark>[^\n]*?)-->\n+)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
_MARK = re.compile(r" (?:needs: (?P<needs>\w\S*(?:, \w\S*)*)|not run: (?P<reason>\w+ \w.*)) ")
#: A name of fastkd in inline code, with or without `fastkd.` in front; arguments are left out.
_NAME = re.compile(
    r"(?<!`)`(?P<name>(?:fastkd|acm|integrations|nn|recipes|reference)(?:\.\w+)+)(?:\([^`]*\))?`"
)
_CALL = re.compile(r"(?<!`)`(fastkd\.[\w.]+\([^`]*\))`")
_FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)


def lacking(requirements):
    """Those that are not installed, or in another version."""
    found = []
    for text in requirements.split(", "):
        requirement = Requirement(text)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(text)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(text)
    return found


@pytest.mark.parametrize("path", PAGES, ids=PAGE_NAMES)
def test_code_runs(path, tmp_path, monkeypatch):
    """And calls in the cells of tables, after the page's blocks."""
    monkeypatch.chdir(tmp_path)
    # On the CPU, also where there is a GPU that this fastkd was not built for.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = path.read_text(encoding="utf-8")
    namespace = {"__name__": "page"}
    blocks = list(_BLOCK.finditer(text))
    assert len(blocks) == len(re.findall(r"^ *`{3,}python", text, re.MULTILINE)), "an odd fence"
    for block in blocks:
        line = text.count("\n", 0, block.start("code"))
        code = compile("\n" * line + block["code"], str(path), "exec")
        mark = block["mark"] and _MARK.fullmatch(block["mark"])
        assert mark or block["mark"] is None, f"{path.name}:{line}: {block['mark']}"
        if not mark or (mark["needs"] and not lacking(mark["needs"])):
            exec(code, namespace)
    for row in re.findall(r"^\|.*\|$", text, re.MULTILINE):
        for call in _CALL.findall(row):
            eval(call, namespace)


@cache
def resolved(name):
    """What a name says: a module, or an attribute of one."""
    found = fastkd
    for i, part in enumerate(name.split(".")[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(name.split(".")[:i]))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("path", PAGES, ids=PAGE_NAMES)
def test_names_exist(path):
    text = _FENCED.sub("", path.read_text(encoding="utf-8"))
    for found in _NAME.finditer(text):
        name = found["name"]
        resolved(name if name.startswith("fastkd.") else f"fastkd.{name}")


def test_marks_are_read():
    text = "<!-- needs: a, b>=2 -->\n```python\nx\n```\n\n"
    text += "<!-- not run: no GPU -->\n\n```python\ny\n```\n"
    first, second = _BLOCK.finditer(text)
    assert _MARK.fullmatch(first["mark"])["needs"] == "a, b>=2"
    assert _MARK.fullmatch(second["mark"])["reason"] == "no GPU"
    assert not _MARK.fullmatch(" not run: ")
    assert lacking("torch>=2, no-such-package") == ["no-such-package"]
    assert lacking("torch>=999") == ["torch>=999"]


def test_links_of_the_readme():
    """Those of other pages are checked where the site is built."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]


def shown():
    """The names that the API reference shows."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    return re.findall(r"^::: (fastkd[\w.]*)$", text, re.MULTILINE)


def test_every_public_name_is_in_the_api_reference():
    names = shown()
    assert len(names) == len(set(names))
    objects = [resolved(name) for name in names]
    packages = ["acm", "integrations", "nn", "recipes", "reference", "teachers", "tokenizers"]
    packages += [f"integrations.{x}" for x in ("sglang", "transformers", "trl", "verl", "vllm")]
    for package in [fastkd, *(importlib.import_module(f"fastkd.{x}") for x in packages)]:
        public = getattr(package, "__all__", None) or [
            name
            for name, value in vars(package).items()
            if name[0] != "_" and getattr(value, "__module__", None) == package.__name__
        ]
        assert public
        for name in public:
            if name == "DistillationTrainer":  # made when it is asked for; needs transformers
                assert f"#{package.__name__}.{name}}}" in (DOCS / "api/integrations.md").read_text()
                continue
            value = getattr(package, name)
            if not isinstance(value, type(fastkd)):
                path = f"{package.__name__}.{name}"
                assert path in names or any(value is x for x in objects), path


def build(folder, site):
    """`make docs`, into another folder: whether it passed, and its messages."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers"):
        if not importlib.util.find_spec(package):
            pytest.skip(f"{package} is missing: pip install 'fastkd[docs]'")
    # With --quiet mkdocs counts no warnings, and --strict passes.
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    return built.returncode == 0, built.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    passed, messages = build(ROOT, folder)
    assert passed, messages
    return folder


def test_bad_links_are_errors(tmp_path):
    """As mkdocs.yml has it."""
    text = (ROOT / "mkdocs.yml").read_text()
    (validation,) = re.findall(r"^validation:\n(?: .*\n)+", text, re.MULTILINE)
    (tmp_path / "mkdocs.yml").write_text(f"site_name: x\n{validation}")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "index.md"
    page.write_text("# Title\n\n[a](#title)\n")
    assert build(tmp_path, tmp_path / "site")[0]
    bad = ("nowhere.md", "#nowhere", "/absolute")
    page.write_text("# Title\n" + "".join(f"\n[a]({target})\n" for target in bad))
    passed, messages = build(tmp_path, tmp_path / "site")
    assert not passed
    for target in bad:
        assert target in messages


def test_site(site):
    """Names in the pages lead to the API reference, whose docstrings have become HTML."""
    assert '#fastkd.softmax_divergence"' in (site / "losses" / "index.html").read_text()
    assert (site / "demo.png").exists()
    assert not (site / "tools").exists()
    api = {path.parent.name: path.read_text() for path in (site / "api").glob("*/index.html")}
    for name in shown():
        assert any(f'id="{name}"' in page for page in api.values()), name
    for name, page in api.items():
        text = re.sub(r"<(code|script)\b.*?</\1>", "", page, flags=re.DOTALL)
        left = re.findall(r":(?:class|func|math|meth):|\.\. math|={4,}|``|&gt;&gt;&gt;", text)
        assert not left, (name, left)


def test_docstrings_as_markdown(monkeypatch):
    pytest.importorskip("griffe")
    monkeypatch.syspath_prepend(DOCS / "tools")
    docstrings = importlib.import_module("docstrings")
    text = r"""One line with :math:`a | b` and :func:`there`, not :func:`here`.

.. math:: x = 1

=====  =====================
``a``  :math:`a \| b`,
       continued
=====  =====================

Like this::

    f(x)

Args:
    x, y: numbers.
    z: more,
        in two lines.

Returns:
    float32 (float64 of float64): a number.

Raises:
    ValueError, TypeError: wrong. IndexError: out of range.

>>> 1 + 1  # doctest: +SKIP
2
"""
    expected = r"""One line with \(a | b\) and [`there`][found.there], not `here`.


\[
x = 1
\]



|  |  |
| --- | --- |
| ``a`` | \(a \Vert b\), continued |


Like this:

```python
f(x)
```

Args:
    x: numbers.
    y: numbers.
    z: more,
        in two lines.

**Returns**

float32 (float64 of float64): a number.

**Raises**

- `ValueError`, `TypeError`: wrong.
- `IndexError`: out of range.

```pycon
>>> 1 + 1
2
```"""
    links = {"there": "found.there"}
    found = docstrings.markdown(text, links.get)
    assert re.sub(r"\n{2,}", "\n\n", found) == re.sub(r"\n{2,}", "\n\n", expected)


def test_every_benchmark_has_a_row():
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks").glob("bench_*.py"):
        assert f"| `python -m benchmarks.{path.stem}` |" in text, path


def test_the_command_and_the_workflow():
    """`make docs` and the workflow that publishes what it builds."""
    makefile = (ROOT / "Makefile").read_text()
    assert "mkdocs build --strict\n" in makefile  # no --quiet: see `build`
    assert re.search(r"^\.PHONY:[^:]*\bdocs\b", makefile, re.MULTILINE)  # there is a folder docs
    workflow = (ROOT / ".github/workflows/docs.yml").read_text()
    assert "make docs" in workflow
    assert "path: build/site" in workflow
    assert "site_dir: build/site" in (ROOT / "mkdocs.yml").read_text()
