"""``python -m tests.clouds aws|digitalocean|verda [--no-machines]``: start an emulated cloud and wait for Ctrl-C."""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys

from tests.cloudbox import why_not
from tests.clouds.rack import Rack

CLOUDS = {"aws": "AwsCloud", "digitalocean": "DigitalOceanCloud", "verda": "VerdaCloud"}


def main() -> None:
    boots = "--no-machines" not in sys.argv
    names = [word for word in sys.argv[1:] if word != "--no-machines"]
    if len(names) != 1 or names[0] not in CLOUDS:
        sys.exit(__doc__)
    if boots and (reason := why_not()):
        sys.exit(f"{reason}; with --no-machines there is the API alone")
    module = importlib.import_module(f"tests.clouds.{names[0]}")
    with contextlib.ExitStack() as stack:
        rack = Rack(boots=boots)
        stack.callback(rack.close)
        cloud = getattr(module, CLOUDS[names[0]])(rack)
        stack.callback(cloud.close)
        print(f"{names[0]} at {cloud.url}")
        for name, value in getattr(cloud, "environment", {}).items():
            print(f"export {name}={value}")
        print("Ctrl-C ends it.", flush=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
