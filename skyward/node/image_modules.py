"""Loaded last by the process that workers are forked from: imports the modules of `Image(preload=...)`."""

from __future__ import annotations

from skyward.worker import warm_parent

warm_parent.load()
