"""Notebooks, really run: cells in a Jupyter kernel of their own, and the page that Jupyter makes of them.

Imports Jupyter when a notebook is made: nothing else needs it.
"""

from __future__ import annotations

import asyncio
import copy
import os
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

_CELL_S = 60
"""Seconds that a cell has. Chosen, not measured: those of ours take a few."""


class Notebook:
    """Cells of code that run one after the other, those after one that fails too, from when it is made.

    `folder`, which has to be empty, has all that Jupyter keeps. Close it when it has ended.
    """

    def __init__(self, cells: Sequence[str], folder: Path) -> None:
        import nbformat
        from nbclient import NotebookClient

        self._folder = folder
        self._notebook: Any = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        own = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
        environment = {
            **os.environ, **{variable: str(folder / variable.lower()) for variable in own},
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }  # fmt: skip
        client = NotebookClient(
            self._notebook, timeout=_CELL_S, kernel_name="python3", allow_errors=True, coalesce_streams=True
        )
        self._thread = ThreadPoolExecutor(1, "notebook")
        running = client.async_execute(env=environment, cwd=str(folder))
        self._running: Future[Any] = self._thread.submit(asyncio.run, running)

    def wait(self) -> None:
        """Return when all cells have run."""
        self._running.result()

    def has_put_out(self, cell: int, kind: str) -> str:
        """Return what a cell has put out so far.

        `kind` is "stdout", "stderr", "error" for the names and texts of exceptions, or that of a value or a display,
        such as "text/html".
        """
        texts = []
        for output in list(self._notebook.cells[cell].outputs):
            if output.output_type == "stream":
                texts.append(output.text if output.name == kind else "")
            elif output.output_type == "error":
                texts.append(f"{output.ename}: {output.evalue}" if kind == "error" else "")
            else:
                texts.append(output.data.get(kind, ""))
        return "".join(texts)

    def page(self, name: str) -> Path:
        """Return the path of a page with the notebook as it is now."""
        from nbconvert import HTMLExporter

        exporter = HTMLExporter(mathjax_url="", require_js_url="", mermaid_js_url="")  # which it would download
        text, _ = exporter.from_notebook_node(copy.deepcopy(self._notebook), {"metadata": {"name": name}})
        path = self._folder / f"{name}.html"
        path.write_text(text)
        return path

    def close(self) -> None:
        self._thread.shutdown()
