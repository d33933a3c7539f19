"""The pages of errors: one has every class and message of the sources, the other tells of none that is not there."""

from __future__ import annotations

import inspect
import re
import runpy
from pathlib import Path

from skyward import errors

ROOT = Path(__file__).parent.parent
TOOL = runpy.run_path(str(ROOT / "tools" / "list-errors"))
CLASSES = {
    name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, errors.SkywardError)
}


def test_the_page_of_errors_is_what_the_sources_make_of_it() -> None:
    assert (ROOT / "docs" / "errors.md").read_text(encoding="utf-8") == TOOL["page"](), "run tools/list-errors"


def test_every_class_of_error_is_on_the_page() -> None:
    assert set(TOOL["WHAT_TO_DO"]) == CLASSES | {"Python's own errors"}
    assert set(TOOL["messages"]()) <= set(TOOL["WHAT_TO_DO"])


def test_the_words_to_look_for_are_words_of_messages() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    said = "\n".join(TOOL["page"]().split("## ")[1:])
    rows = re.findall(r"^\| (`\w+`[^|]*) \| ([^|]*) \|", page, re.MULTILINE)
    ours = [(classes, words) for classes, words in rows if set(re.findall(r"`(\w+)`", classes)) & CLASSES]
    unknown = {word for _, words in ours for word in re.findall(r"`([^`]+)`", words) if word.strip("… ") not in said}

    assert len(ours) > 20
    assert unknown == set()
