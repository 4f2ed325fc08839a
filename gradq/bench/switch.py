"""A switch of TAP devices in user space that delays and drops packets, for kernels without netem.

Runs as a script in the hub's network namespace, without gradq: DELAY_MS LOSS TAP... It says "ready" and ends
when its standard input does. Packets are forwarded by MAC address, broadcasts to all. Big packets stay whole
(the virtio header is handed on), so it carries 1 to 2 Gbit/s; it is for latency and loss, not for fast links.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque

__all__ = ["main"]

_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_CSUM_TSO4_TSO6 = 0x01 | 0x02 | 0x04
_VNET_HEADER = 10


def _open_tap(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
    fcntl.ioctl(fd, _TUNSETOFFLOAD, _CSUM_TSO4_TSO6)
    return fd


def main(arguments: list[str]) -> None:
    """Forward until standard input ends."""
    delay_s, loss = float(arguments[0]) / 1e3, float(arguments[1])
    taps = [_open_tap(name) for name in arguments[2:]]
    print("ready", flush=True)  # noqa: T201
    ports: dict[bytes, int] = {}
    waiting: deque[tuple[float, int, bytes]] = deque()  # by time: the delay is the same for all
    drop = random.Random(0)
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable, _, _ = select.select([0, *taps], [], [], timeout)
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, target, packet = waiting.popleft()
            _write(target, packet)
        for fd in readable:
            if fd == 0:
                if not os.read(0, 1):
                    return
                continue
            packet = os.read(fd, 1 << 17)
            destination = packet[_VNET_HEADER : _VNET_HEADER + 6]
            ports[packet[_VNET_HEADER + 6 : _VNET_HEADER + 12]] = fd
            if loss and drop.random() < loss:
                continue
            target = ports.get(destination, -1) if not destination[0] & 1 else -1
            for other in taps if target < 0 else [target]:
                if other != fd:
                    waiting.append((now + delay_s, other, packet))


def _write(fd: int, packet: bytes) -> None:
    with contextlib.suppress(OSError):  # a full queue drops, as a switch does
        os.write(fd, packet)


if __name__ == "__main__":
    main(sys.argv[1:])
