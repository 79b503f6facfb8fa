"""fastkd's docstrings as Markdown, for the API reference (a griffe extension, `mkdocs.yml`).

The docstrings have Google's sections (Args, Returns, Raises), reStructuredText's roles, tables and
formulas, and doctests. mkdocstrings reads the Args; `markdown` converts everything else. Links go
to the objects that the pages of `docs/api` show.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import griffe

API = Path(__file__).parents[1] / "api"
_SHOWN = re.compile(r"^::: (fastkd[\w.]*)", re.MULTILINE)
_ROLE = re.compile(r":(func|class|meth|attr|mod|math):`([^`]+)`")
_SECTION = re.compile(r"(Args|Returns|Raises):")
_ERRORS = r"[A-Z]\w*Error(?:, [A-Z]\w*Error)*"


def shown() -> set[str]:
    """The names that the pages of `docs/api` show."""
    return {name for page in API.glob("*.md") for name in _SHOWN.findall(page.read_text("utf-8"))}


def markdown(text: str, link: Callable[[str], str | None]) -> str:
    """A docstring without indentation as Markdown. `link`: from a role's name to its identifier."""
    found = []
    for kind, lines in _parts(text.splitlines()):
        if kind == "text":
            found.append(_ROLE.sub(lambda x: _role(x[1], x[2], link), "\n".join(lines)))
        else:
            found.append("\n".join(lines))
    return _sections("\n".join(found))


def _role(kind: str, value: str, link: Callable[[str], str | None]) -> str:
    value = " ".join(value.split())
    if kind == "math":
        return rf"\({value}\)"
    named = re.fullmatch(r"(.+) <(.+)>", value)
    title, target = named.groups() if named else (value.lstrip("~."), value.lstrip("~."))
    identifier = link(target)
    return f"`{title}`" if identifier is None else f"[`{title}`][{identifier}]"


def _parts(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Text as it is; doctests, formulas, literal blocks and tables as Markdown."""
    text: list[str] = []
    i = 0
    while i < len(lines):
        line = lines[i]
        indent = " " * (len(line) - len(line.lstrip()))
        end, made = i + 1, None
        if line.lstrip().startswith(">>> "):
            while end < len(lines) and lines[end].strip():
                end += 1
            made = [indent + "```pycon"]
            made += [re.sub(r"  # doctest: \+SKIP$", "", x) for x in lines[i:end]]
            made.append(indent + "```")
        elif line.lstrip().startswith(".. math::"):
            end = _block_end(lines, i)
            made = _formula(lines[i:end], indent)
        elif line.endswith("::") and _block_end(lines, i) > i + 1:
            end = _block_end(lines, i)
            title = line[:-1] if line.strip() != "::" else ""
            body = inspect.cleandoc("\n".join(["", *lines[i + 1 : end]])).splitlines()
            made = [title, "", indent + "```python", *(indent + x for x in body), indent + "```"]
            yield "text", [*text, *made[:2]]
            text, made = [], made[2:]
        elif re.fullmatch(r" *=+( +=+)+ *", line):
            borders = [j for j in range(i + 1, len(lines)) if re.fullmatch(r"[= ]+", lines[j])]
            last = next(j for j in borders if j + 1 == len(lines) or not lines[j + 1].strip())
            end = last + 1
            rows = _table(lines[i:end], indent)
            yield "text", text
            yield "text", ["", *rows, ""]
            text, i = [], end
            continue
        if made is None:
            text.append(line)
        else:
            yield "text", text
            yield "code", made
            text = []
        i = end
    yield "text", text


def _block_end(lines: list[str], start: int) -> int:
    """The line after the indented block below a line."""
    own = len(lines[start]) - len(lines[start].lstrip())
    end = start + 1
    while end < len(lines) and (
        not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > own
    ):
        end += 1
    while not lines[end - 1].strip():
        end -= 1
    return end


def _formula(lines: list[str], indent: str) -> list[str]:
    body = [lines[0].split("::", 1)[1].strip(), *(x.strip() for x in lines[1:])]
    formula = [x for x in body if x]
    if any(r"\\" in x for x in formula):
        formula = [r"\begin{aligned}", *formula, r"\end{aligned}"]
    return ["", *(indent + x for x in (r"\[", *formula, r"\]")), ""]


def _table(lines: list[str], indent: str) -> list[str]:
    """A table whose borders are of `=`; a row without a first cell continues the one before."""
    starts = [x.start() for x in re.finditer(r"=+", lines[0])]
    rows: list[list[str]] = []
    header = []
    for line in lines[1:-1]:
        if re.fullmatch(r"[= ]+", line):
            header, rows = rows[0], []
            continue
        ends = [*starts[1:], None]
        cells = [line[a:b].strip() for a, b in zip(starts, ends, strict=True)]
        if not cells[0] and rows:
            rows[-1] = [f"{a} {b}".strip() for a, b in zip(rows[-1], cells, strict=True)]
        elif any(cells):
            rows.append(cells)
    header = header or [""] * len(starts)
    return [
        indent + "| " + " | ".join(_cell(x) for x in row) + " |"
        for row in (header, ["---"] * len(starts), *rows)
    ]


def _cell(text: str) -> str:
    """No bar in it, which would end the cell."""
    return " ".join(text.replace(r"\|", r"\Vert ").replace("|", r"\vert ").split())


def _sections(text: str) -> str:
    """Args: a line for each name. Returns, Raises: text, as their colons separate no types."""
    out: list[str] = []
    current = ""
    body: list[str] = []

    def finish() -> None:
        if current == "Raises":
            out.extend(["**Raises**", "", *_raises(body), ""])
        elif current == "Returns":
            out.extend(["**Returns**", "", *inspect.cleandoc("\n".join(body)).splitlines(), ""])
        elif current == "Args":
            out.extend(["Args:", *_arguments(body)])
        body.clear()

    for line in text.splitlines():
        begins = _SECTION.fullmatch(line)
        if begins or (current and line and not line.startswith(" ")):
            finish()
            current = begins[1] if begins else ""
            if begins:
                continue
        (body if current else out).append(line)
    finish()
    return "\n".join(out)


def _arguments(lines: list[str]) -> Iterator[str]:
    """`a, b: text` as two arguments with that text."""
    items: list[list[str]] = []
    for line in lines:
        if re.match(r" {4}\S", line) or not items:
            items.append([line])
        else:
            items[-1].append(line)
    # The names may go on in the next line, which is indented once more.
    for item in items:
        joined = re.match(r" {4}((?:\**\w+,\s+)+\**\w+):", "\n".join(item))
        if joined is None:
            yield from item
            continue
        rest = "\n".join(item)[joined.end() :].splitlines()
        for name in joined[1].split(","):
            yield f"    {name.strip()}:{rest[0] if rest else ''}"
            yield from rest[1:]


def _raises(lines: list[str]) -> list[str]:
    """A bullet for each kind of error."""
    text = " ".join(" ".join(lines).split())
    parts = re.split(rf"(?:^|(?<=[.)]) )(?={_ERRORS}: )", text)
    found = []
    for part in filter(None, parts):
        kinds, colon, what = part.partition(": ")
        names = ", ".join(f"`{kind}`" for kind in kinds.split(", "))
        found.append(f"- {names}: {what}" if colon else f"- {part}")
    return found


class Docstrings(griffe.Extension):
    """Converts every docstring once its package is read, and reads the comments of fields."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Convert."""
        self._identifiers = sorted(shown())
        for name in tuple(self._identifiers):
            found = pkg[name.removeprefix(f"{pkg.name}.")]
            if found.is_class:
                members = [m for m in found.members.values() if m.name[0] != "_" and m.docstring]
                self._identifiers += [f"{name}.{member.name}" for member in members]
        self._convert(pkg, "")

    def _convert(self, found: griffe.Object, owner: str) -> None:
        """Convert the docstrings of an object and of what is in it. `owner`: the class it is in."""
        if isinstance(found, griffe.Attribute) and found.docstring is None:
            found.docstring = _comment(found)
        owner = found.name if found.is_class else owner
        if found.docstring is not None:
            package = ".".join(found.canonical_path.split(".")[:2])
            link = partial(self._link, package, owner)
            found.docstring.value = markdown(found.docstring.value, link)
        if found.is_module or found.is_class:
            for member in found.members.values():
                if isinstance(member, griffe.Object):  # not a name that was imported
                    self._convert(member, owner)

    def _link(self, package: str, owner: str, name: str) -> str | None:
        """The identifier that a docstring means by a name; None where no page shows it."""
        if name.startswith("torch."):
            return None
        own = [x for x in self._identifiers if owner and x.endswith(f".{owner}.{name}")]
        others = [x for x in self._identifiers if x.endswith(f".{name}")]
        found = (name, *own, f"{package}.{name}", f"fastkd.{name}", *others)
        return next((x for x in found if x in self._identifiers), None)


def _comment(field: griffe.Attribute) -> griffe.Docstring | None:
    """The `#:` lines above a field."""
    if field.lineno is None or not isinstance(field.filepath, Path):
        return None
    lines = field.filepath.read_text(encoding="utf-8").splitlines()
    found: list[str] = []
    for line in reversed(lines[: field.lineno - 1]):
        if not line.strip().startswith("#:"):
            break
        found.insert(0, line.strip()[2:].strip())
    return griffe.Docstring("\n".join(found), parent=field) if found else None
