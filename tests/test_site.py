"""The documentation site: its pages, its links, and a strict build where mkdocs is installed."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose !ENV takes a variable of the environment or a default."""


Loader.add_constructor("!ENV", lambda loader, node: loader.construct_sequence(node)[-1])


def nav(items=None):
    """Every page of the navigation."""
    items = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"] if items is None else items
    for item in items:
        for value in item.values():
            yield from nav(value) if isinstance(value, list) else [value]


def test_the_navigation_has_every_page_and_every_package():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} | {"index.md", "contributing.md", "changelog.md"}
    pages |= {f"api/{path.parent.name}.md" for path in (ROOT / "epo_jax").glob("*/__init__.py")}
    listed = list(nav())
    assert len(listed) == len(set(listed)) and set(listed) == pages


@pytest.fixture
def hooks():
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / ".ci" / "docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("folder", "text", "site"),
    [
        ("", "[x](docs/method.md#loss)", "[x](method.md#loss)"),
        ("", "![x](docs/figures/pilot.png)", "![x](figures/pilot.png)"),
        ("", "[x](CONTRIBUTING.md)", "[x](contributing.md)"),
        ("", "[x](epo_jax/training/loop.py)", "[x](HUB/blob/main/epo_jax/training/loop.py)"),
        ("docs", "[x](../README.md#sweeps)", "[x](index.md#sweeps)"),
        ("docs", "[x](tpu.md), [y](#z), [w](https://a.b/c)", "[x](tpu.md), [y](#z), [w](https://a.b/c)"),
        ("docs/notes", "[x](../results.md) and [y](../../README.md)", "[x](../results.md) and [y](../index.md)"),
    ],
)
def test_links_lead_to_pages_or_to_the_repository(hooks, folder, text, site):
    assert hooks.relinked(text, ROOT / folder, "HUB") == site
    assert hooks.relinked("[the loop](epo_jax/x.py)", ROOT, "") == "the loop"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "api" / "objectives" / "index.html").read_text()
    assert "epo_jax.objectives.loss.epo_loss" in page
    start = (tmp_path / "index.html").read_text()
    assert not re.search(r'href="[^"]*\.md[#"]', start), "a link that leads to a source"
