"""Names of the API in the pages' inline code become links to the API reference (an mkdocs hook).

On GitHub the same text is inline code.
"""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from docstrings import shown

#: Code as it is, fenced or inline; a link or a heading around it stays as it is.
_CODE = re.compile(
    r"^( *)(`{3,}).*?^\1\2 *$|^#.*?$|\[[^\[\]]*\]\([^)]*\)|(?<!`)`([^`\n]+)`(?!`)",
    re.MULTILINE | re.DOTALL,
)
_NAME = re.compile(r"(?:fastkd\.)?((?:acm|integrations|nn|recipes|reference)\.)?(\w[\w.]*)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Link the names that the API reference shows."""
    if page.file.src_uri.startswith("api/"):
        return markdown
    names = shown()

    def linked(found: re.Match[str]) -> str:
        code = found[3]
        if code is None or not _NAME.fullmatch(code):
            return found[0]
        identifier = code if code.startswith("fastkd.") else f"fastkd.{code}"
        prefixed = code.startswith("fastkd.") or "." in code
        return f"[`{code}`][{identifier}]" if prefixed and identifier in names else found[0]

    return _CODE.sub(linked, markdown)
