"""What mkdocs does beside: links to files of the repository, and a look that no page needs the network.

A page links to a file outside of docs/ as on GitHub, [slurm.sh](../configs/slurm.sh). The site has no address of the
repository to link to, so it holds a copy of each such file, as text, in the folder `files`.
"""

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"\]\((\.\./[^)#\s]+)\)")
LOADED = re.compile(r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?((?:https?:)?//[^"'\s>]+)""")
LINKED = re.compile(r"""<link\b(?=[^>]*rel=["']?(?:style|preconnect|icon))[^>]*href=["']?((?:https?:)?//[^"'\s>]+)""")
COPIES = "files"

log = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a copy of each file of the repository that a page links to."""
    root, there = Path(config.config_file_path).parent, set()
    for page in files.documentation_pages():
        for link in LINK.findall(page.content_string):
            place = _place(page, link)
            if place is not None and (root / place).is_file() and place not in there:
                there.add(place)
                content = (root / place).read_text(encoding="utf-8")
                files.append(File.generated(config, f"{COPIES}/{place}.txt", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead each link to a file of the repository to its copy; what is not there, mkdocs reports as any broken link."""

    def lead(match: re.Match) -> str:
        place = _place(page.file, match[1])
        if place is None or f"{COPIES}/{place}.txt" not in files.src_uris:
            return match[0]
        copy = posixpath.relpath(f"{COPIES}/{place}.txt", posixpath.dirname(page.file.src_uri) or ".")
        return f"]({copy})"

    return LINK.sub(lead, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Warn, and so end a strict build, where a page loads something from elsewhere."""
    for address in [*LOADED.findall(output), *LINKED.findall(output)]:
        log.warning("%s loads %s; the site has to be readable without a network.", page.file.src_uri, address)
    return output


def _place(page: File, link: str) -> str | None:
    """Find the path in the repository of what a page links to; None if it is in docs/."""
    place = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.src_uri), link))
    return None if place.startswith("docs/") else place
