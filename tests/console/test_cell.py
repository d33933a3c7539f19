"""A console in a notebook, without the notebook: what is handed to it to show."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import skyward as sky
from skyward.console import Console, PoolInfo, open_console
from skyward.console.cell import CellView
from skyward.console.model import Model
from tests.console.test_model import CLOUD, START
from tests.waiting import wait_until

HERE = PoolInfo("abcdef01", 2, 1, "<local>", is_here=True)


class Display:
    """Stands for IPython: keeps what is displayed, and can fail as a kernel that goes away does."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.fails = False

    def display(self, bundle: dict[str, str], *, raw: bool, display_id: bool) -> Display:
        assert raw
        assert display_id
        return self.update(bundle, raw=raw)

    def update(self, bundle: dict[str, str], *, raw: bool) -> Display:
        if self.fails:
            raise OSError("no kernel")
        self.shown.append(bundle["text/html"])
        return self


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> Display:
    """Lets this be a notebook."""
    display = Display()
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "IPython.display", display)  # type: ignore[arg-type]
    return display


@pytest.fixture
def console(display: Display) -> Iterator[Console]:
    console = open_console("auto", HERE)
    yield console
    console.close()


def view_of(info: PoolInfo) -> tuple[Model, CellView]:
    model = Model(info)
    return model, CellView(model)


def tell(model: Model, view: CellView, event: Any, now: float) -> None:
    model.hear(event, now)
    view.show(event, now)


def test_a_start_elsewhere_is_shown_with_what_each_machine_is_at(display: Display) -> None:
    model, view = view_of(CLOUD)
    at = view._changed_at
    for seconds, event in START[:13]:
        tell(model, view, event, at + seconds)

    view.refresh(at + 42)

    shown = display.shown[-1]
    assert "<b>starting 2 nodes × 2 slots on aws</b> · bootstrap · 1 of 2 nodes ready · 42 s" in shown
    assert all(f">{cell}</td>" in shown for cell in ("i-1", "m7i.large", "spot", "0.0300 USD/h", "ready", "upload"))


def test_progress_of_long_calls_is_a_bar_updated_at_most_twice_a_second(display: Display) -> None:
    model, view = view_of(HERE)
    at = view._changed_at
    tell(model, view, sky.InfraCreating(), at)
    tell(model, view, sky.PoolStarted(), at + 1)
    model.link = 'http://127.0.0.1:1/"status'
    tell(model, view, sky.TaskProgress(done=1, total=40), at + 2)
    before = len(display.shown)
    for step in range(100):
        tell(model, view, sky.TaskProgress(done=2, total=40), at + 3 + step / 100)

    assert len(display.shown) <= before + 2
    assert '<progress value="2" max="40"></progress> 2 of 40 calls' in display.shown[-1]
    assert "<b>2 nodes × 1 slot on &lt;local&gt;</b> · up in 1.0 s" in display.shown[-1]
    assert '<a href="http://127.0.0.1:1/&quot;status" target="_blank">dashboard</a>' in display.shown[-1]


def test_what_is_told_stays_and_at_the_end_there_is_what_it_came_to(display: Display) -> None:
    model, view = view_of(CLOUD)
    at = view._changed_at
    for seconds, event in START:
        tell(model, view, event, at + seconds)
    tell(model, view, sky.InstanceLost(instance_id="i-0", node=0, reason="<spot>"), at + 1000)
    tell(model, view, sky.TaskProgress(done=3, total=3), at + 1001)
    model.end(at + 1002)
    view.close(at + 1002)

    assert "ended after" in display.shown[-1]
    assert "3 calls, 1 machine lost" in display.shown[-1]
    assert "&lt;spot&gt;; its calls run again elsewhere</pre>" in display.shown[-1]


def test_in_a_notebook_only_what_workers_print_goes_to_the_streams(
    console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    for event in (sky.InfraCreating(), sky.PoolStarted()):
        console(event)
    console(sky.LogLine(node=0, instance_id="i", line="hello", timestamp=0.0))
    console.close()

    assert capsys.readouterr() == ("[node 0] hello\n", "")


def test_what_changes_is_shown_without_an_event(console: Console, display: Display) -> None:
    console(sky.InfraCreating())

    wait_until(lambda: "starting" in display.shown[-1])


@pytest.mark.parametrize("choice", ["log", "spinner"])
def test_lines_can_be_had_in_a_notebook_too(choice: str, display: Display, capsys: pytest.CaptureFixture[str]) -> None:
    console = open_console(choice, HERE)
    console(sky.InfraCreating())
    console(sky.PoolStarted())
    console.close()

    assert display.shown == []
    assert "up in" in capsys.readouterr().err


def test_a_notebook_that_fails_is_replaced_by_lines(
    console: Console, display: Display, capsys: pytest.CaptureFixture[str]
) -> None:
    display.fails = True
    console(sky.InfraCreating())
    wait_until(lambda: not console._view.moves)  # type: ignore[union-attr]
    console(sky.PoolStarted())

    assert "up in" in capsys.readouterr().err


def test_a_notebook_that_shows_nothing_from_the_start_gets_lines(
    display: Display, capsys: pytest.CaptureFixture[str]
) -> None:
    display.fails = True
    console = open_console("auto", HERE)
    console(sky.InfraCreating())
    console(sky.PoolStarted())
    console.close()

    assert "up in" in capsys.readouterr().err
