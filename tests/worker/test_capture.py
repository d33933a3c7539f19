"""Pipes behind descriptors 1 and 2, and what is read of them as lines."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from skyward.worker.capture import Reader, pipes


@pytest.fixture
def ends() -> Iterator[tuple[Reader, int, int]]:
    """A reader, and the ends of its pipes to write to."""
    (output, to_output), (errors, to_errors) = os.pipe(), os.pipe()
    reader = Reader(output, errors)
    yield reader, to_output, to_errors
    reader.close()
    os.close(to_output)
    os.close(to_errors)


def test_a_line_waits_for_its_end_and_of_a_bar_the_last_state_counts(ends: tuple[Reader, int, int]) -> None:
    reader, to_output, to_errors = ends
    os.write(to_output, b"one\r\ntwo")
    os.write(to_errors, b"\r 10%|#  |\r 20%|## |\r")

    assert list(reader.read()) == [("stdout", "one")]
    assert reader.has_begun
    os.write(to_output, b" and a half\n")
    os.write(to_errors, b"\r 30%|###|\n")
    assert list(reader.read()) == [("stdout", "two and a half"), ("stderr", " 30%|###|")]
    assert not reader.has_begun


def test_a_long_line_is_cut_and_bytes_that_are_no_text_are_replaced(ends: tuple[Reader, int, int]) -> None:
    reader, to_output, _ = ends
    os.write(to_output, b"x" * 30_000)
    assert list(reader.read()) == []
    os.write(to_output, b"x" * 30_000 + b"\n\xff\n")

    (_, long), (_, odd) = reader.read()

    assert long == "x" * 10_000 + " ... cut after 10000 bytes"
    assert odd == "\ufffd"


def test_what_a_process_prints_outlives_it_in_order(tmp_path: Path) -> None:
    program = """if True:
        import os, sys
        from skyward.worker import capture
        capture.take_over(sys.argv[1])
        for i in range(3):
            print("out", i)
            print("wrong", i, file=sys.stderr)
        sys.stderr.write("x" * 9000 + "\\n")
        os._exit(1)
    """
    path = str(tmp_path / "output")

    with pipes(path) as reader:
        subprocess.run([sys.executable, "-c", program, path], check=False)
        lines = list(reader.read())

    assert lines == [
        ("stdout", "out 0"), ("stderr", "wrong 0"), ("stdout", "out 1"), ("stderr", "wrong 1"),
        ("stdout", "out 2"), ("stderr", "wrong 2"), ("stderr", "x" * 9000),
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []
