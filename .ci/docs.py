"""Hooks of the documentation site (mkdocs.yml).

README, CONTRIBUTING and CHANGELOG become pages, and each package gets a page of its docstrings. Links are written for GitHub;
those that leave docs/ are changed to lead to these pages, to the repository (REPO_URL), or, without one, nowhere.
"""

import ast
import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files, config):
    """Adds the pages that are not files in docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=relinked((ROOT / source).read_text(), ROOT, config.repo_url)))
    for package in packages():
        files.append(File.generated(config, f"api/{package}.md", content=api_page(package)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Changes the links of a page in docs/."""
    source = page.file.abs_src_path
    return relinked(markdown, Path(source).parent, config.repo_url) if source else markdown


def packages() -> list[str]:
    """The packages below epo_jax, without those inside them."""
    return sorted(path.parent.name for path in (ROOT / "epo_jax").glob("*/__init__.py"))


def api_page(package: str) -> str:
    """The page of a package: its own docstring, then those of its modules."""
    folder = ROOT / "epo_jax" / package
    lines = [f"# {package}", "", ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), ""]
    for path in sorted(folder.rglob("*.py")):
        if path.name not in ("__init__.py", "__main__.py"):
            lines += [f"::: epo_jax.{'.'.join(path.relative_to(ROOT / 'epo_jax').with_suffix('').parts)}", ""]
    return "\n".join(lines)


def relinked(markdown: str, folder: Path, repository: str | None) -> str:
    """The text with links that work on the site, of a file in `folder`."""

    def changed(match: re.Match) -> str:
        before, path, anchor, after = (part or "" for part in match.groups())
        target = Path(os.path.normpath(folder / path)) if path else None
        if target is None or re.match(r"[a-z]+:", path):
            return match[0]
        name = str(target.relative_to(ROOT))
        if name in PAGES:
            return f"{before}{os.path.relpath(ROOT / 'docs' / PAGES[name], page_folder(folder))}{anchor}{after}"
        if target.is_relative_to(ROOT / "docs"):
            return f"{before}{os.path.relpath(target, page_folder(folder))}{anchor}{after}"
        return f"{before}{repository}/blob/main/{name}{anchor}{after}" if repository else unlinked(before)

    return re.sub(r"(!?\[[^\]]*\]\()([^)#\s]*)(#[^)\s]*)?(\))", lambda m: changed(m) if m[2] else m[0], markdown)


def page_folder(folder: Path) -> Path:
    """Where a page of a file in `folder` is: pages of files at the root are in docs/."""
    return ROOT / "docs" if folder == ROOT else folder


def unlinked(before: str) -> str:
    """The text of a link: `[text](`."""
    return before.lstrip("!")[1:-2]
