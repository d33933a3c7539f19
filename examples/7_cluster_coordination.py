"""Give nodes different roles: one serves numbers over a socket, the others request them."""

from __future__ import annotations

import socket
import time

import skyward as sky

PORT = 28_517


@sky.compute
def play() -> str:
    info = sky.instance_info()
    assert info is not None
    if info.is_head:
        with socket.create_server((info.network.address, PORT)) as server:
            for number in range(info.total_nodes - 1):
                connection, _ = server.accept()
                with connection:
                    connection.sendall(str(number).encode())
        return f"served {info.total_nodes - 1} nodes"
    with _connect(info.head_addr) as connection:
        return f"got number {connection.recv(100).decode()}"


def _connect(host: str) -> socket.socket:
    while True:  # all nodes begin together, so the head may be a moment behind
        try:
            return socket.create_connection((host, PORT), timeout=30)
        except ConnectionRefusedError:
            time.sleep(0.1)


def main() -> None:
    with sky.ComputePool(nodes=3, timeout=600) as pool:
        for node, did in enumerate(play() @ pool):
            print(f"node {node} {did}")


if __name__ == "__main__":
    main()
