"""Links of pages at the root and in docs/ to each other lead somewhere, to a heading too. Others: `make links`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def _prose(page: Path) -> str:
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(`+).+?\1", "`", text)


def _links(page: Path) -> set[str]:
    text = _prose(page)
    inline = re.findall(r"\]\(\s*<?([^\s)>]+)", text)
    return {*inline, *re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE)}


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and Python-Markdown make them of plain ones."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_other_pages_lead_somewhere(page: Path) -> None:
    broken = []
    for link in _links(page):
        place, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        there = (page.parent / place).resolve() if place else page
        if not there.exists() or (anchor and anchor not in _anchors(there)):
            broken.append(link)

    assert broken == []


def test_links_are_found_at_all() -> None:
    assert "docs/security.md" in _links(ROOT / "README.md")
    assert "permissions" in _anchors(ROOT / "docs" / "providers" / "aws.md")
    assert sum(len(_links(page)) for page in PAGES) > 80
