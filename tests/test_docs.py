"""README and docs: every public name has its place in the reference, every link leads somewhere, and the site builds without a warning."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

import tinyonn

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples/README.md", *sorted(DOCS.rglob("*.md"))]
COMMANDS = {"cli"}  # what is not imported, but run
FENCE = re.compile(r"^ *(```+).*?^ *\1 *$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#{1,6} +(.+?)\s*$", re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="needs the checkout")


def public_packages() -> list[str]:
    modules = [module.name for module in pkgutil.iter_modules(tinyonn.__path__)]
    return ["tinyonn", *(f"tinyonn.{name}" for name in modules if not name.startswith("_") and name not in COMMANDS)]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@cache
def text_of(page: Path) -> str:
    """A page without its code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


@cache
def documented() -> list[str]:
    return [
        name for page in sorted((DOCS / "api").glob("*.md")) for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)
    ]


@pytest.mark.parametrize("package", public_packages())
def test_every_public_name_is_in_the_reference(package):
    names = set(importlib.import_module(package).__all__) - {"__version__"}
    listed = [name.rpartition(".")[2] for name in documented() if name.rpartition(".")[0] == package]
    assert len(listed) == len(set(listed))
    assert set(listed) == names, f"docs/api/ and __all__ of {package} differ"


def test_the_reference_has_no_other_packages():
    assert {name.rpartition(".")[0] for name in documented()} <= set(public_packages())


def slugs(heading: str) -> Iterator[str]:
    """The anchor of a heading on the site, and on GitHub."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    ascii_text = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
    yield re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_text).strip().lower())
    yield re.sub(r" ", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def anchors(page: Path) -> set[str]:
    """Anchors that lead to the same heading on the site and on GitHub; those of the site alone within the reference."""
    both = [tuple(slugs(heading)) for heading in HEADING.findall(text_of(page))]
    return {site for site, github in both if site == github}


def links(page: Path) -> Iterator[tuple[str, str]]:
    for target in LINK.findall(text_of(page)):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)} links to {path}, which is not there"
        assert DOCS not in page.parents or DOCS in target.parents, f"{name_of(page)} links to {path}, which is not on the site"
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)} links to {path}#{anchor}; {name_of(target)} has {sorted(anchors(target))}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lists_and_tables_begin_after_an_empty_line(page):
    """GitHub draws them in any case, the site only so."""
    item, before = re.compile(r"([-*]|\d+\.) "), ""
    for line in text_of(page).splitlines():
        begins = bool(item.match(line)) and not item.match(before.lstrip()) and not before.startswith("  ")
        begins = begins or (line.startswith("|") and not before.startswith("|"))
        assert not (begins and before.strip()), f"{name_of(page)}: {line[:60]}"
        before = line


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=name_of)
def test_code_is_not_cut_at_the_width_of_the_site(page):
    """On a screen of 1,300 pixels a code block shows 97 columns. What programs print may be wider."""
    blocks = re.findall(r"^```(?:python|py|bash|sh|shell)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert not [line for block in blocks for line in block.splitlines() if len(line) > 95]


def test_every_page_is_reached_from_the_menu():
    menu = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert menu == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def rows(page: Path) -> set[str]:
    return {
        " ".join(line.split("|")[2].split() + line.split("|")[4].split()) for line in text_of(page).splitlines() if line.count("|") == 5
    }


def test_figures_of_the_front_page_are_those_of_the_benchmarks_page():
    front = rows(ROOT / "README.md") - {"tinyonn ratio", "--- ---"}
    assert len(front) == 6
    assert front <= rows(DOCS / "benchmarks.md")


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    elsewhere = re.compile(
        r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["'](?:https?:)?//|<link\b[^>]*rel=["']?stylesheet[^>]*(?:https?:)?//"""
    )
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        found = elsewhere.search(text)
        assert found is None, f"{page.name}: {found[0] if found else ''}"
    for page in (tmp_path / "site/api").glob("*.html"):
        text = page.read_text(encoding="utf-8")
        modules = re.findall(
            r'<h3 id="([\w.]+)" class="doc doc-heading">\s*<code class="doc-symbol doc-symbol-heading doc-symbol-module"', text
        )
        assert not modules, f"api/{page.name} shows modules in the place of {modules}"


def test_every_figure_of_the_evidence_is_on_the_page_of_a_study():
    """Also in the form in which a page prints it; a study that ran again changes its page, and the evidence must follow."""
    pages = "\n".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "studies").glob("*.md")))
    figures = re.findall(r"(?<![\d.])[+-]?\d+\.\d{2,}(?![\d.])", (DOCS / "evidence.md").read_text(encoding="utf-8"))
    assert len(figures) > 20
    known = set(re.findall(r"[+-]?\d+\.\d{2,}", pages))
    assert [figure for figure in figures if figure not in known] == []
