"""Where mkdocs and GitHub read the same page differently: links out of docs/, and pipes in tables."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the page with ``](../file)`` made absolute, as GitHub's own view of the page has it."""

    def absolute(link: re.Match[str]) -> str:
        target, _, anchor = link[1].partition("#")
        if not (ROOT / target).exists():
            raise PluginError(f"{page.file.src_uri} links to ../{target}, which is not there")
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{target}{'#' if anchor else ''}{anchor})"

    return re.sub(r"\]\(\.\./([^)\s]+)\)", absolute, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    r"""Return the page's HTML with ``\|`` in the cells of tables as ``|``, which is what GitHub shows."""
    return re.sub(r"<td[ >].*?</td>", lambda cell: cell[0].replace("\\|", "|"), html, flags=re.DOTALL)
