"""How long `import skyward` takes, beside a bare start of Python.

Usage: python benchmarks/import_time.py [RUNS]
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time


def seconds(code: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started


def main(runs: int) -> None:
    bare: list[float] = []
    skyward: list[float] = []
    seconds("import skyward")  # compiles what has not been
    for _ in range(runs):  # in turns, so that a busy moment of the machine hits both alike
        bare.append(seconds("pass"))
        skyward.append(seconds("import skyward"))
    b, s = statistics.median(bare), statistics.median(skyward)
    print(f"Python {platform.python_version()}, median of {runs} runs each")
    print(f"  bare           {b * 1e3:6.1f} ms")
    print(f"  import skyward {s * 1e3:6.1f} ms   {s / b:.2f} times, {(s - b) * 1e3:+.1f} ms (limit: +100 ms)")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 21)
