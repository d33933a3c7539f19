"""Loaded by the process that workers are forked from: it adopts orphans, and kills all below it when the agent is gone.

It reaps whatever child of it ends, as the agent can't: that waits for certain ones.
"""

from __future__ import annotations

import atexit
import os
import warnings

from skyward.node.descendants import adopt_orphans, kill_descendants

warnings.filterwarnings("ignore", "forkserver: waitpid returned unexpected pid")  # that of an orphan
adopt_orphans()
atexit.register(kill_descendants, os.getpid())  # workers end without: `os._exit`
