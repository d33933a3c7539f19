"""Run a function on a machine that exists only for it.

Runs on this machine; `SKYWARD_PROVIDER=aws python 1_hello.py` runs it on AWS, as for all examples.
"""

from __future__ import annotations

import platform

import skyward as sky


@sky.compute
def hello(name: str) -> str:
    return f"Hello {name}, from {platform.node()}"


def main() -> None:
    with sky.ComputePool() as pool:
        print(hello("world") >> pool)


if __name__ == "__main__":
    main()
