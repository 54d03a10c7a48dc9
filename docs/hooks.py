"""Makes a site of pages that GitHub shows too: `mkdocs.yml` names this module, and mkdocs calls its functions.

The README is the first page. A link that leaves `docs/` leads to the repository.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

CODE = re.compile(r"(\[?)<code>([^<>]*)</code>(\]?)")
LINK = re.compile(r"(?<=\]\()(?!https?://|mailto:|#)([^)\s]+)(?=\))")


def link_from(page: str, link: str, repository: str) -> str:
    """A link of a page of `docs/`, or of the README as `index.md`, for the site.

    Args:
        page: the path of the page below `docs/`.
        link: as it stands in the file, relative to where that lies in the repository.
        repository: the address of the repository.
    """
    source = "README.md" if page == "index.md" else f"docs/{page}"
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    target = re.sub(r"^README\.md(?=#|$)", "docs/index.md", target)
    if target.startswith("docs/"):
        return posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(page) or ".")
    return f"{repository}/blob/main/{target}"


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File  # The tests import this module without mkdocs.

    readme = Path(config.config_file_path).with_name("README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=readme))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    return LINK.sub(lambda link: link_from(page.file.src_uri, link[1], config.repo_url), markdown)


def plain_code(html: str) -> str:
    """Code of a docstring in the form of Hugging Face, without its marks: types in backticks, names in brackets."""

    def without_marks(found: re.Match[str]) -> str:
        before, code, after = found.groups()
        if before and after:  # [`~page.render`]
            before, code, after = "", code.removeprefix("~"), ""
        return f"{before}<code>{code.replace('`', '').replace('*optional*', 'optional')}</code>{after}"

    return CODE.sub(without_marks, html)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    return plain_code(html) if page.file.src_uri.startswith("api/") else html
