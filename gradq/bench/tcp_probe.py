"""Raw TCP between two hosts: how fast, and how long a round trip. Runs as a script, without gradq.

receive ADDRESS prints a port, then the result as JSON; send ADDRESS PORT SECONDS is the other end. The first
0.3 s are not counted: the token bucket is full and TCP is finding its rate.
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import time

__all__ = ["main"]

_START_UP_S = 0.3
_CHUNK = 1 << 18
_ROUND_TRIPS = 11


def _receive(address: str) -> None:
    with socket.create_server((address, 0)) as server:
        server.settimeout(20)
        print(server.getsockname()[1], flush=True)  # noqa: T201
        connection, _ = server.accept()
    with connection:
        connection.settimeout(20)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        round_trips = []
        for _ in range(_ROUND_TRIPS):
            start = time.perf_counter()
            connection.sendall(b"?")
            connection.recv(1)
            round_trips.append(time.perf_counter() - start)
        connection.sendall(b"!")
        buffer = bytearray(_CHUNK)
        begin = time.perf_counter()
        first = last = 0.0
        received = 0
        while count := connection.recv_into(buffer):
            now = time.perf_counter()
            if first:
                received += count
                last = now
            elif now - begin >= _START_UP_S:
                first = now
    mbit_s = received * 8 / (last - first) / 1e6 if received else 0.0
    found = {"mbit_s": round(mbit_s, 2), "round_trip_ms": round(1e3 * statistics.median(round_trips), 3)}
    print(json.dumps(found), flush=True)  # noqa: T201


def _send(address: str, port: int, seconds: float) -> None:
    with socket.create_connection((address, port), timeout=20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(_ROUND_TRIPS):
            connection.recv(1)
            connection.sendall(b".")
        connection.recv(1)
        chunk = bytes(_CHUNK)
        end = time.perf_counter() + _START_UP_S + seconds
        while time.perf_counter() < end:
            connection.sendall(chunk)


def main(arguments: list[str]) -> None:
    """Be one end."""
    if arguments[0] == "receive":
        _receive(arguments[1])
    else:
        _send(arguments[1], int(arguments[2]), float(arguments[3]))


if __name__ == "__main__":
    main(sys.argv[1:])
