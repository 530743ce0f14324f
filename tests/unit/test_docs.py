"""What readers are told to look at is there: every link between the pages, every anchor, every file they name."""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
_LINK: Final = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_CODE: Final = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)
_NAMED: Final = re.compile(
    r"`((?:docs|tests|configs|benchmarks|kvtransfer|orchestrator|context_server|generation_server|disaggregated)"
    r"/[\w/.-]+\.\w+)`"
)
_MADE_BY_RUNNING: Final = {"benchmarks/results/transfer.md", "benchmarks/results/fault-matrix.md"}
"""Reports that `make bench-transfer` and `python -m benchmarks.faults` write; a page may lead where one will be."""


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """Each file that a page leads to, and the anchor in it, or ""."""
    for target in _LINK.findall(_CODE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        yield (page.parent / path).resolve() if path else page, anchor


@functools.cache
def anchors(page: Path) -> frozenset[str]:
    """Of the page's headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", _CODE.sub("", page.read_text()), flags=re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


@functools.cache
def in_repository(path: Path) -> bool:
    """Whoever clones it gets this file. True of all files where no repository is around them."""
    if not (ROOT / ".git").exists():
        return True
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return bool(listed.stdout)


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for path, anchor in links(page):
        assert path.exists() or str(path.relative_to(ROOT)) in _MADE_BY_RUNNING, f"{page.name}: {path}"
        assert not path.exists() or in_repository(path), f"{page.name}: {path} is not part of the repository"
        assert not anchor or anchor in anchors(path), f"{page.name}: {path.name} has no heading #{anchor}"


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_is_named_exists(page: Path) -> None:
    missing = {name for name in _NAMED.findall(page.read_text()) if not (ROOT / name).exists()}
    assert missing <= _MADE_BY_RUNNING, f"{page.name} names {missing}"


def test_every_page_is_reached_from_the_readme() -> None:
    found, to_read = set(), [ROOT / "README.md"]
    while to_read:
        page = to_read.pop()
        if page in found:
            continue
        found.add(page)
        to_read += [path for path, _ in links(page) if path.suffix == ".md" and path.exists()]
        to_read += [below for path, _ in links(page) if path.is_dir() for below in sorted(path.glob("*.md"))]
    assert set(pages()) <= found
