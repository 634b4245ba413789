"""Links that leave docs/ lead to the repository's files, which are shown as pages of the site.

The same links work where the pages are read in the repository.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LINK = re.compile(r"\]\((?P<path>\.\./[^)#\s]+)(?:#[^)]*)?\)")
_FENCE = "`" * 4


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every file of the repository that a page links to."""
    root = Path(config.docs_dir).parent
    for page in list(files.documentation_pages()):
        for link in _LINK.finditer(page.content_string):
            path = _outside(page.src_uri, link["path"])
            if path is None or files.get_file_from_path(_page_of(path)):
                continue
            if not (root / path).is_file():
                raise PluginError(f"{page.src_uri}: {link['path']} is no file; link to a file")
            content = _source_page(path, (root / path).read_text())
            files.append(File.generated(config, _page_of(path), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that leave docs/ into links to those pages."""

    def local(link: re.Match[str]) -> str:
        path = _outside(page.file.src_uri, link["path"])
        if path is None:
            return link[0]
        return f"]({posixpath.relpath(_page_of(path), posixpath.dirname(page.file.src_uri) or '.')})"

    return _LINK.sub(local, markdown)


def _outside(page: str, link: str) -> str | None:
    """Return the path in the repository that a page's link leads to, or None for one inside docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith("docs/") else path


def _page_of(path: str) -> str:
    return f"repository/{path}.md"


def _source_page(path: str, text: str) -> str:
    language = os.path.splitext(path)[1].lstrip(".")
    if language == "ipynb":
        text, language = _notebook_text(text), "python"
    front = "---\nsearch: {exclude: true}\nhide: [toc]\n---\n"
    return f"{front}\n# {path}\n\n{_FENCE}{language}\n{text}\n{_FENCE}\n"


def _notebook_text(text: str) -> str:
    """Return a notebook's cells as a script, prose as comments."""
    cells = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        cells.append(
            source if cell["cell_type"] == "code" else re.sub(r"^", "# ", source, flags=re.MULTILINE)
        )
    return "\n\n".join(cells)
