"""What a node pays for telling how busy it is: CPU time per sample, as a share of one core.

Usage: python benchmarks/metrics_overhead.py
"""

from __future__ import annotations

import json
import os
import platform
import time

from skyward.node import metrics

SAMPLES = 500


def main() -> None:
    metrics.sample()
    began = time.process_time()
    for _ in range(SAMPLES):
        line = json.dumps({"event": "metrics", **metrics.sample()})
    took = (time.process_time() - began) / SAMPLES
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores; told each time: {line}")
    print(f"{took * 1e3:.2f} ms per sample, one every {metrics.PERIOD_S:g} s: {took / metrics.PERIOD_S:.4%} of a core")


if __name__ == "__main__":
    main()
