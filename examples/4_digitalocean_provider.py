"""DigitalOcean's machines, by the hour, in a region of your choice.

With DIGITALOCEAN_TOKEN set and `pip install 'skyward[digitalocean]'`, two droplets are created, used and destroyed.
Without it, the same runs on this machine.
"""

from __future__ import annotations

import os

import skyward as sky


@sky.compute
def cores() -> int:
    return os.cpu_count() or 1


def main() -> None:
    has_token = "DIGITALOCEAN_TOKEN" in os.environ
    provider = sky.DigitalOcean(region="fra1") if has_token else sky.Local()
    needs = {"cpu": 2, "memory": "4GB", "max_cost": 1.0} if has_token else {}
    with sky.ComputePool(provider, nodes=2, timeout=1800, **needs) as pool:
        for node, count in enumerate(cores() @ pool):
            print(f"node {node}: {count} cores")
        print(f"so far: {pool.cost:.4f} USD")


if __name__ == "__main__":
    main()
