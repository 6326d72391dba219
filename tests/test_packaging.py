"""What surrounds the code: package data, the workflow, templates, hooks, the citation and the changelog."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_an_installation_has_every_file_that_is_not_a_module():
    """setuptools copies modules by itself, and other files only if a pattern of package-data names them."""
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    others = [file for file in (ROOT / "epo_jax").rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")]
    assert {file.name for file in others} >= {"py.typed", "report.html"}
    for file in others:
        named = [
            pattern for package, globs in patterns.items() for pattern in globs
            if fnmatch(str(file), str(ROOT / package.replace(".", "/") / pattern))
        ]  # fmt: skip
        assert named, f"{file} is in no pattern of package-data"


def test_the_workflow_runs_the_script_on_every_python_that_the_package_takes():
    (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)
    low, high = (int(n) for n in re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["project"]["requires-python"]).groups())
    assert job["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in range(low, high)]


@pytest.mark.parametrize("name", ["bug", "feature", "question"])
def test_issue_templates_are_forms(name):
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert {"name", "description", "body"} <= form.keys()
    fields = [item for item in form["body"] if item["type"] != "markdown"]
    assert fields and len({item["id"] for item in fields}) == len(fields) and all(item["attributes"]["label"] for item in fields)


def test_hooks_run_the_linter_of_the_environment():
    hooks = [hook for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"] for hook in repo["hooks"]]
    assert hooks and all(hook["entry"].startswith(".venv/bin/ruff ") and hook["language"] == "system" for hook in hooks)


def test_citation_and_changelog_name_the_version_of_the_package():
    version = PROJECT["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version and citation["license"] == PROJECT["project"]["license"]
    assert "2509.22576" in citation["references"][0]["url"]
    headings = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[:2] == ["Unreleased", version]


def test_moved_modules_of_the_changelog_are_where_it_says():
    moved = re.findall(r"^\| `(epo_jax[\w.]+)`[^|]* \| `(epo_jax[a-z_.]+)` \|", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert len(moved) > 20
    for old, new in moved:
        path = ROOT / new.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), f"{old} -> {new}"


def headings(page):
    """The anchors that GitHub gives to the headings of a page."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_local_links_of_the_documents_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert len(pages) > 10
    for page in pages:
        for path, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
            if not path.startswith(("http:", "https:", "mailto:")):
                target = page.parent / path if path else page
                assert target.exists(), f"{page.relative_to(ROOT)}: {path}"
                assert not anchor or anchor in headings(target), f"{page.relative_to(ROOT)}: {path}#{anchor}"
