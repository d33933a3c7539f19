"""``python -m tests.cloudbox up N``: boot N machines, say how to reach them, and wait for Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cloudbox import Machine, Network, cloud_config, why_not


def main() -> None:
    if sys.argv[1:2] != ["up"] or len(sys.argv) > 3:
        sys.exit(__doc__)
    if reason := why_not():
        sys.exit(reason)
    count = int(sys.argv[2]) if len(sys.argv) == 3 else 1
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        key = Path(folder) / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        network = Network()
        stack.callback(network.close)
        user_data = cloud_config(ssh_authorized_keys=[key.with_suffix(".pub").read_text()])
        known = Path(folder) / "known_hosts"
        with known.open("w") as hosts:
            for number in range(count):
                machine = Machine(network, f"box-{number}", user_data)
                stack.callback(machine.destroy)
                hosts.write(f"{machine.address} {machine.host_key()}\n")
                print(f"ssh -i {key} -o UserKnownHostsFile={known} root@{machine.address}   # {machine.name}")
        print("Ctrl-C destroys them.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
