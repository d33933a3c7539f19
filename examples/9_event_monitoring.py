"""Handle all events of a pool: machines, costs, printed lines, progress."""

from __future__ import annotations

from collections import Counter

import skyward as sky


@sky.compute
def work(n: int) -> int:
    print(f"working on {n}")
    return n * n


def main() -> None:
    seen: Counter[str] = Counter()

    def count(event: sky.SkywardEvent) -> None:
        seen[type(event).__name__] += 1

    def show(event: sky.SkywardEvent) -> None:
        match event:
            case sky.InstanceProvisioned(node=node, provider=provider):
                print(f"node {node} is there, from {provider}")
            case sky.LogLine(node=node, line=line):
                print(f"node {node} says: {line}")

    with sky.ComputePool(nodes=2, display="quiet", on_event=sky.compose(count, show)) as pool:
        sky.gather(*(work(n) for n in range(4))) >> pool

    print("events:", ", ".join(sorted(seen)))


if __name__ == "__main__":
    main()
