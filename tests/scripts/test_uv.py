"""The program that machines without pip fetch uv with, against an index that is served here."""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from skyward.scripts import uv

PROGRAM = b"#!/bin/sh\necho a uv\n"


class Index:
    """A package index that has one wheel of uv, for those who know its password."""

    def __init__(self) -> None:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("uv-1.data/scripts/uvx", b"")
            file.writestr("uv-1.data/scripts/uv", PROGRAM)
        self.wheel = archive.getvalue()
        self.sha256 = hashlib.sha256(self.wheel).hexdigest()
        wheel = self.wheel

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = self.headers.get("Authorization") == "Basic " + base64.b64encode(b"me:p@ss").decode()
                link = b'<a href="../../files/uv-1.whl#sha256=0">uv-1.whl</a>'
                pages = {"/simple/uv/": link, "/files/uv-1.whl": wheel}
                body = pages.get(self.path) if known else None
                self.send_response(200 if body else 404 if known else 401)
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def index() -> Iterator[Index]:
    index = Index()
    yield index
    index.close()


def fetch(target: Path, sha256: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-IS", "-c", uv._FETCH, "uv-1.whl", sha256, str(target)]
    return subprocess.run(command, env={"PATH": os.environ["PATH"], **variables}, capture_output=True, text=True)


def test_it_is_fetched_from_the_index_of_the_machine(index: Index, tmp_path: Path) -> None:
    target = tmp_path / "bin" / "uv"

    fetch(target, index.sha256, UV_DEFAULT_INDEX=f"http://me:p%40ss@{index.host}/simple")

    assert subprocess.run([target], capture_output=True).stdout == b"a uv\n"


def test_an_index_that_has_it_not_is_followed_by_the_next(index: Index, tmp_path: Path) -> None:
    target = tmp_path / "uv"

    done = fetch(
        target, index.sha256, UV_INDEX=f"own=http://{index.host}/simple file:///nowhere",
        UV_DEFAULT_INDEX=f"http://me:p%40ss@{index.host}/simple/",
    )  # fmt: skip

    assert target.read_bytes() == PROGRAM
    assert f"http://{index.host}/simple: HTTP Error 401" in done.stdout


def test_it_is_taken_from_a_folder_that_has_it(index: Index, tmp_path: Path) -> None:
    (tmp_path / "uv-1.whl").write_bytes(index.wheel)

    fetch(tmp_path / "uv", index.sha256, UV_FIND_LINKS=str(tmp_path), UV_DEFAULT_INDEX="file:///nowhere")

    assert (tmp_path / "uv").read_bytes() == PROGRAM


def test_another_content_is_refused_and_named_without_the_password(index: Index, tmp_path: Path) -> None:
    done = fetch(tmp_path / "uv", "0" * 64, UV_DEFAULT_INDEX=f"http://me:p%40ss@{index.host}/simple")

    assert done.returncode == 1
    assert not (tmp_path / "uv").exists()
    assert f"uv-1.whl has the SHA-256 {index.sha256} instead of {'0' * 64}" in done.stdout
    assert "p%40ss" not in done.stdout + done.stderr


def test_settings_are_read_as_pip_reads_them(tmp_path: Path) -> None:
    folder = tmp_path / ".config" / "pip"
    folder.mkdir(parents=True)
    (folder / "pip.conf").write_text(
        "[global]\nindex-url = https://one/simple\nextra-index-url =\n  https://two\n  https://three\n"
        "[install]\ncert = /cert\n"
    )
    variables = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PIP_INDEX_URL": "https://four/simple"}
    names = "index-url extra-index-url cert"
    read = f"home=$HOME; mkdir -p $home/logs; read_pip_settings; for name in {names}; do setting $name; done"

    def settings(shell: str) -> list[str]:
        text = f"{uv.SHELL}\n{shell}\n{read}"
        done = subprocess.run(["sh"], input=text, env=variables, capture_output=True, text=True)
        return [line.strip() for line in done.stdout.splitlines()]

    without_pip = 'python3() { [ "$1" != -m ] && command python3 "$@"; }'

    assert settings(without_pip) == ["https://four/simple", "https://two https://three", "/cert"]
    assert settings(without_pip) == settings("python3() { " + sys.executable + ' "$@"; }')
