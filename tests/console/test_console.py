"""Consoles on streams and terminals: what is written where, and that nothing of it ends a run."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import skyward as sky
from skyward.console import Console, PoolInfo, open_console
from skyward.console.progress_bar import LiveView
from tests.console.terminal import Terminal
from tests.console.test_model import CLOUD, START, provisioned
from tests.waiting import wait_until

HERE = PoolInfo("abcdef01", 2, 1, "local", is_here=True)
HERE_START = [
    sky.InfraCreating(),
    sky.InstanceProvisioned(instance_id="local-0", node=0, spot=False, provider="local"),
    sky.ProvisioningCompleted(),
    sky.BootstrapCompleted(instance_id="local-0"),
    sky.PoolStarted(),
]


def line(text: str, node: int = 0) -> sky.LogLine:
    return sky.LogLine(node=node, instance_id="i", line=text, timestamp=0.0)


@pytest.fixture
def open_() -> Iterator[Callable[..., Console]]:
    """Opens consoles, which are closed after the test."""
    opened: list[Console] = []

    def open_(display: str = "auto", info: PoolInfo = HERE) -> Console:
        opened.append(open_console(display, info))
        return opened[-1]

    yield open_
    for console in opened:
        console.close()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Terminal]]:
    """Puts standard output and error on a terminal."""
    made: list[Terminal] = []
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def put(**options: Any) -> Terminal:
        made.append(Terminal(**options))
        monkeypatch.setattr(sys, "stdout", made[-1].stream)
        monkeypatch.setattr(sys, "stderr", made[-1].stream)
        return made[-1]

    yield put
    for one in made:
        one.close()


def tell(console: Console, *events: Any) -> None:
    for event in events:
        console(event)


# --- plain --------------------------------------------------------------------------------------------------


def stripped(text: str) -> list[str]:
    """Check the time stamps, and return the lines without them."""
    lines = []
    for found in text.splitlines():
        time.strptime(found[:8], "%H:%M:%S") if found[:1].strip() else None
        lines.append(found[9:])
    return lines


def test_without_a_terminal_there_is_a_line_for_what_matters(
    open_: Callable[..., Console], capsys: pytest.CaptureFixture[str]
) -> None:
    console = open_("auto", CLOUD)
    for _, event in START[:-1]:
        console(event)
    console.link = "http://127.0.0.1:1/status"
    tell(console, sky.PoolStarted(), line("hello"), sky.PoolStopping())
    console.close()

    out, err = capsys.readouterr()
    told = stripped(err)
    assert out == "[node 0] hello\n"
    assert told[:-2] == [
        "skyward: pool abcdef01: 2 nodes × 2 slots on aws",
        "skyward: launching 1 × m7i.large on aws in us-east-1",
        "skyward: launching 1 × m7i.large on aws in us-east-1",
        "skyward: node 0: i-0, m7i.large, on-demand, 0.1000 USD/h",
        "skyward: node 1: i-1, m7i.large, spot, 0.0300 USD/h",
        "skyward: node 0: waiting for SSH",
        "skyward: node 1: waiting for SSH",
        "skyward: node 0: upload",
        "skyward: node 1: upload",
        "skyward: node 0: packages",
        "skyward: 1 of 2 nodes ready",
        "skyward: 2 of 2 nodes ready",
        "skyward: 2 nodes × 2 slots on aws up in 0.0 s, dashboard at http://127.0.0.1:1/status",
        "skyward: ending 2 machines",
    ]
    assert told[-2] == "skyward: ended after 0.0 s"


def test_a_local_pool_is_two_lines(open_: Callable[..., Console], capsys: pytest.CaptureFixture[str]) -> None:
    console = open_("log")
    tell(console, *HERE_START, sky.TaskProgress(done=3, total=3, failed=1), sky.PoolStopping())
    console.close()
    console.close()

    assert stripped(capsys.readouterr().err) == [
        "skyward: 2 nodes × 1 slot on local up in 0.0 s",
        "skyward: ended after 0.0 s: 3 calls, 1 failed",
    ]


def test_many_nodes_are_told_of_together(open_: Callable[..., Console], capsys: pytest.CaptureFixture[str]) -> None:
    console = open_("log", PoolInfo("abcdef01", 100, 1, "aws"))
    tell(console, sky.InfraCreating(), *(provisioned(n, spot=False) for n in range(100)), sky.ProvisioningCompleted())
    tell(console, *(sky.BootstrapProgress(instance_id=f"i-{n}", step="packages") for n in range(100)))
    tell(console, *(sky.BootstrapCompleted(instance_id=f"i-{n}") for n in range(100)))

    told = stripped(capsys.readouterr().err)
    assert told[-2:] == ["skyward: 1 of 100 nodes ready", "skyward: 100 of 100 nodes ready"]
    assert len(told) < 15


def test_a_start_that_fails_is_told_calmly(open_: Callable[..., Console], capsys: pytest.CaptureFixture[str]) -> None:
    console = open_("log", CLOUD)
    for _, event in START[:12]:
        console(event)
    capsys.readouterr()
    error = "root@10.0.0.5 could not be made ready: step 'packages' failed; its last lines:\n  no such\nDo"
    tell(console, sky.Error(message=error, instance_id="i-1"), sky.PoolStopping())
    console.close()

    assert stripped(capsys.readouterr().err) == [
        f"skyward: node 1 failed: {error.splitlines()[0]}",
        "    no such",
        "  Do",
        "skyward: ending 2 machines",
        "skyward: 2 nodes × 2 slots on aws did not start; ended after 0.0 s",
    ]


def test_quiet_writes_nothing_not_even_warnings(
    open_: Callable[..., Console], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a program of its own: Python prints warnings that nobody handles.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    console = open_("quiet")
    tell(console, *HERE_START, line("hello"), sky.Error(message="no"), sky.PoolStopping())
    logging.getLogger("skyward.cluster").warning("something of ours")
    console.close()

    assert capfd.readouterr() == ("", "")


def test_warnings_of_ours_are_shown_once_and_not_what_an_event_tells(
    open_: Callable[..., Console], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    logger = logging.getLogger("skyward.cluster")
    open_("log")
    open_("log")
    logger.warning("no more %s", "nodes")
    logger.warning("lost i-1", extra={"told_by_event": True})
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
    logger.warning("for the program's own handlers")

    assert stripped(capsys.readouterr().err) == ["skyward: no more nodes"]


def test_what_an_encoding_lacks_is_written_without_it(
    open_: Callable[..., Console], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    console = open_("auto")
    tell(console, *HERE_START, line("größer → ☃"))

    out.flush()
    assert b"2 nodes x 1 slot on local up" in err.buffer.getvalue()  # type: ignore[attr-defined]
    assert out.buffer.getvalue() == b"[node 0] gr\\xf6\\xdfer \\u2192 \\u2603\n"  # type: ignore[attr-defined]


def test_a_stream_that_nobody_reads_harms_nobody(
    open_: Callable[..., Console], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(sys, "stderr", None)
    console = open_("log")

    tell(console, *HERE_START, line("hello"), sky.PoolStopping())
    console.close()


# --- live ---------------------------------------------------------------------------------------------------


def shows(terminal: Terminal, text: str) -> Callable[[], bool]:
    return lambda: any(text in line for line in terminal.lines)


def test_a_cloud_s_pool_is_drawn_below_what_is_printed(
    open_: Callable[..., Console], terminal: Callable[..., Terminal]
) -> None:
    shown = terminal()
    console = open_("auto", CLOUD)
    for _, event in START[:12]:
        console(event)
    wait_until(shows(shown, "packages"))
    print("from the program")
    console(line("from a worker", node=1))
    wait_until(lambda: shows(shown, "packages")() and shows(shown, "from a worker")())

    lines = shown.lines
    assert lines[:3] == ["from the program", "[node 1] from a worker", ""]
    assert "skyward 2 nodes × 2 slots on aws, starting" in lines[3]
    assert [text.split()[1] for text in lines[4:8]] == ["plan", "launch", "boot", "bootstrap"]
    assert lines[8].split() == ["node", "0", "i-0", "m7i.large", "on-demand", "0.1000", "USD/h", "packages"]
    assert lines[9].split() == ["node", "1", "i-1", "m7i.large", "spot", "0.0300", "USD/h", "upload"]


def test_the_end_leaves_a_summary_and_restores_the_streams(
    open_: Callable[..., Console], terminal: Callable[..., Terminal]
) -> None:
    shown = terminal()
    original = sys.stdout
    console = open_("auto", CLOUD)
    for _, event in START:
        console(event)
    wait_until(shows(shown, "running"))
    console(sky.PoolStopping())
    console.close()
    print("afterwards")

    assert sys.stdout is original
    lines = shown.lines
    assert lines[0] == "skyward: 2 nodes × 2 slots on aws up in 0.0 s"
    assert lines[1].startswith("skyward: ended after ")
    assert lines[2].startswith("  running ")
    assert lines[3:] == ["afterwards", ""]


def test_calls_are_shown_with_rate_and_time_left(
    open_: Callable[..., Console], terminal: Callable[..., Terminal]
) -> None:
    shown = terminal()
    console = open_("auto")
    tell(console, *HERE_START, sky.TaskProgress(done=0, total=100))
    time.sleep(0.1)
    console(sky.TaskProgress(done=10, total=100))

    wait_until(shows(shown, "10 of 100 calls, "))

    assert "left" in shown.lines[-1]
    console(sky.TaskProgress(done=100, total=100))
    wait_until(lambda: not shows(shown, "of 100 calls")())


@pytest.mark.parametrize("display", ["auto", "spinner"])
def test_a_line_that_somebody_holds_is_left_alone(
    display: str, open_: Callable[..., Console], terminal: Callable[..., Terminal]
) -> None:
    shown = terminal()
    console = open_(display, CLOUD)
    tell(console, sky.InfraCreating())
    wait_until(shows(shown, "plan"))
    for percent in range(0, 100, 10):  # as tqdm does
        sys.stderr.write(f"\r {percent}%|####      |")
        sys.stderr.flush()
        time.sleep(0.06)  # long enough for drawing in between, if it were to be drawn
    assert shown.lines == [" 90%|####      |"]
    console(line("from a worker"))
    sys.stderr.write("\r 100%|##########|\n")
    wait_until(shows(shown, "plan"))

    assert shown.lines[:3] == ["[node 0] from a worker", " 100%|##########|", ""]


def test_what_is_written_past_us_stays(open_: Callable[..., Console], terminal: Callable[..., Terminal]) -> None:
    shown = terminal()
    past = sys.stderr  # as a logging handler keeps it
    console = open_("auto", CLOUD)
    tell(console, sky.InfraCreating())
    wait_until(shows(shown, "plan"))
    past.write("WARNING: something\n")
    past.flush()
    before = len(shown.written)
    wait_until(lambda: len(shown.written) > before and shows(shown, "plan")())

    assert shown.lines[:2] == ["WARNING: something", ""]


def test_a_narrow_terminal_is_not_overrun(open_: Callable[..., Console], terminal: Callable[..., Terminal]) -> None:
    shown = terminal(columns=60)
    console = open_("auto", CLOUD)
    for _, event in START[:12]:
        console(event)
    wait_until(shows(shown, "packages"))

    assert max(map(len, shown.lines)) < 60
    assert ["node", "1", "m7i.large", "spot", "0.0300", "USD/h", "upload"] in [text.split() for text in shown.lines]


@pytest.mark.parametrize(("no_color", "expected"), [("1", False), ("", True)])
def test_colours_are_left_out_when_they_are_not_wanted(
    no_color: str, expected: bool, open_: Callable[..., Console], terminal: Callable[..., Terminal],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shown = terminal()
    monkeypatch.setenv("NO_COLOR", no_color)
    console = open_("auto")
    tell(console, *HERE_START, sky.TaskProgress(done=0, total=100), sky.TaskProgress(done=50, total=100))
    wait_until(shows(shown, "50 of 100 calls"))

    assert ("\x1b[38;5;" in shown.written) is expected


def test_a_terminal_without_unicode_gets_none(
    open_: Callable[..., Console], terminal: Callable[..., Terminal]
) -> None:
    shown = terminal(encoding="ascii")
    console = open_("auto", CLOUD)
    for _, event in START[:12]:
        console(event)

    wait_until(shows(shown, "packages"))  # which decodes it

    assert any("2 nodes x 2 slots" in text for text in shown.lines)


def test_a_view_that_fails_is_replaced_by_plain_lines_and_the_run_goes_on(
    open_: Callable[..., Console], terminal: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = terminal()

    def fail(self: LiveView, now: float) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(LiveView, "refresh", fail)
    original = sys.stdout
    console = open_("auto", CLOUD)
    wait_until(lambda: sys.stdout is original)
    for _, event in START:
        console(event)
    console(line("hello"))

    assert shows(shown, "up in 0.0 s")()
    assert shown.lines[-2:] == ["[node 0] hello", ""]


def test_a_pipe_for_output_gets_what_workers_print_and_nothing_else(
    open_: Callable[..., Console], terminal: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = terminal()
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    console = open_("auto", CLOUD)
    for _, event in START[:12]:
        console(event)
    wait_until(shows(shown, "packages"))
    console(line("hello"))
    print("from the program")

    assert pipe.getvalue() == "[node 0] hello\nfrom the program\n"


def test_lines_go_where_calls_print_them_and_bare_without_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    console = open_console("log", HERE, prefix=False)
    console(line("result"))
    console(sky.LogLine(node=0, instance_id="i", line="warning", timestamp=0.0, stream="stderr"))
    console.close()

    assert capsys.readouterr() == ("result\n", "warning\n")


def test_a_question_has_the_terminal_to_itself(
    open_: Callable[..., Console], terminal: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    import builtins

    shown = terminal()
    asked = builtins.input
    during: list[list[str]] = []

    def ask(prompt: str = "") -> str:
        time.sleep(0.5)
        during.append(shown.lines)
        return "yes"

    monkeypatch.setattr(builtins, "input", ask)
    console = open_("auto", CLOUD)
    tell(console, sky.InfraCreating())
    wait_until(shows(shown, "plan"))

    assert input("go on? ") == "yes"
    assert during == [[""]]
    wait_until(shows(shown, "plan"))
    console.close()
    assert builtins.input is ask
    assert asked is not ask


def test_two_consoles_at_once_share_the_terminal_and_leave_it_as_it_was(
    open_: Callable[..., Console], terminal: Callable[..., Terminal]
) -> None:
    shown = terminal()
    original = sys.stdout
    first, second = open_("auto", CLOUD), open_("auto", CLOUD)
    for console in (first, second):
        for _, event in START[:12]:
            console(event)
    wait_until(shows(shown, "packages"))
    first(line("of the first"))
    second(line("of the second"))
    first.close()
    second.close()
    print("afterwards")

    assert sys.stdout is original
    lines = shown.lines
    assert lines[:2] == ["[node 0] of the first", "[node 0] of the second"]
    assert [text.partition(" did not start")[0] for text in lines[2:4]] == ["skyward: 2 nodes × 2 slots on aws"] * 2
    assert lines[4:] == ["afterwards", ""]
