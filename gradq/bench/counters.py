"""Counters of the operating system: bytes of an interface, processor time, how busy the machine is. Linux."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Counters", "interface_bytes", "interface_of"]


def interface_bytes(name: str) -> tuple[int, int]:
    """Bytes received and sent by an interface of this network namespace, link headers included.

    /proc/self/net/dev is of the namespace the process runs in; /sys/class/net may show another's. A packet
    that the card or kernel cuts up later (GSO) counts once, so header bytes read a few per cent low.

    Raises:
        LookupError: there is no such interface.
    """
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        left, colon, right = line.partition(":")
        if colon and left.strip() == name:
            fields = right.split()
            return int(fields[0]), int(fields[8])
    raise LookupError(f"no interface {name!r} here")


def interface_of(address: str) -> str:
    """The interface of this namespace that has an IPv4 address, "" if none has."""
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
            except OSError:
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return ""


@dataclass(frozen=True)
class Counters:
    """A reading; subtract two.

    Attributes:
        wall_s: a clock.
        cpu_s: processor time of this process, all threads.
        busy_s: processor time of the whole machine, all cores.
        sent_bytes: bytes that the interface sent; None where that is not known.
    """

    wall_s: float
    cpu_s: float
    busy_s: float
    sent_bytes: int | None

    @classmethod
    def read(cls, interface: str) -> Counters:
        """Read now."""
        first = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
        user, nice, system, _idle, _iowait, irq, softirq = (int(field) for field in first[:7])
        busy_s = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        try:
            sent = interface_bytes(interface)[1] if interface else None
        except LookupError:
            sent = None
        return cls(time.perf_counter(), time.process_time(), busy_s, sent)

    def __sub__(self, before: Counters) -> Counters:
        sent = None
        if self.sent_bytes is not None and before.sent_bytes is not None:
            sent = self.sent_bytes - before.sent_bytes
        return Counters(
            self.wall_s - before.wall_s, self.cpu_s - before.cpu_s, self.busy_s - before.busy_s, sent
        )
