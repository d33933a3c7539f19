"""Run a call once on every node with `@`, and once on every slot with `@ pool.slots`."""

from __future__ import annotations

import skyward as sky


@sky.compute
def where() -> str:
    info = sky.instance_info()
    assert info is not None
    return f"node {info.node} of {info.total_nodes}, worker {info.worker} of {info.workers_per_node}"


def main() -> None:
    with sky.ComputePool(nodes=2, concurrency=2) as pool:
        print("every node:", *(where() @ pool), sep="\n  ")
        print("every slot:", *(where() @ pool.slots), sep="\n  ")


if __name__ == "__main__":
    main()
