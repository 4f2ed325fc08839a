"""Hosts in network namespaces, joined by a switch, every link shaped in both directions. Linux, root.

    host 0            switch namespace            host 1
    eth0 ==veth== p0 --[ bridge ]-- p1 ==veth== eth0
     tbf            tbf            tbf            tbf

The token buckets hold at least 128 KiB and at least 1 ms of the rate: a smaller one makes the kernel cut
packets up again, which slows big messages and would flatter compression. The queue is about 20 ms. Congestion
control is cubic. Delay and loss come from netem where the kernel has it, else every port has a bridge of its
own with a TAP device in it, and a program (`switch.py`) carries packets between these.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gradq.bench.link import Link
from gradq.errors import BenchError, ConfigError

__all__ = ["Network", "remove_stale_namespaces"]

BURST_BYTES = 128 * 1024
QUEUE_S = 0.02
PAYLOAD_SHARE = 1448 / 1514  # of the bytes tbf counts, for full packets with time stamps
TOLERANCE = 0.05
_NETWORK = "10.86.0"
_PREFIX = "gradq"
_HERE = Path(__file__).parent


def _owner() -> str:
    """This process, told from later ones with the same number by its start time."""
    return f"{os.getpid()}-{_start_time(os.getpid())}"


def _start_time(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _call(*command: str, check: bool = True) -> str:
    """Run ip or tc.

    Raises:
        BenchError: it failed; its message is in it.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise BenchError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _namespaces() -> list[str]:
    return [
        line.split()[0] for line in _call("ip", "netns", "list", check=False).splitlines() if line.strip()
    ]


def _remove(namespace: str) -> None:
    """End what runs in a namespace and delete it with all its devices."""
    for pid in _call("ip", "netns", "pids", namespace, check=False).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    _call("ip", "netns", "delete", namespace, check=False)


def remove_stale_namespaces() -> list[str]:
    """Remove namespaces whose owner is gone without having cleaned up; returns their names."""
    stale = []
    for name in _namespaces():
        parts = name.split("-")
        if (
            len(parts) == 4
            and parts[0] == _PREFIX
            and parts[1].isdigit()
            and _start_time(int(parts[1])) != parts[2]
        ):
            _remove(name)
            stale.append(name)
    return stale


class Network:
    """Makes the hosts; `close` removes everything.

    Args:
        num_hosts: the number of hosts, 2 or more.
        link: rate and delay of the link of every host.

    Raises:
        ConfigError: no root, or no ip or tc. BenchError: the kernel refuses something.
    """

    def __init__(self, num_hosts: int, link: Link) -> None:
        if not 2 <= num_hosts <= 250:
            raise ConfigError(f"{num_hosts} hosts: from 2 to 250")
        for tool in ("ip", "tc"):
            if shutil.which(tool) is None:
                raise ConfigError(f"making hosts needs {tool}: apt-get install iproute2")
        if os.geteuid() != 0:
            raise ConfigError("making hosts needs root: run the same command with sudo")
        remove_stale_namespaces()
        self.link = link
        self.hosts = [f"{_PREFIX}-{_owner()}-h{index}" for index in range(num_hosts)]
        self._hub = f"{_PREFIX}-{_owner()}-hub"
        self._switch: subprocess.Popen[str] | None = None
        self._shaped = False
        self.delay_by = ""
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def address(self, host: int) -> str:
        """IPv4 address of a host."""
        return f"{_NETWORK}.{host + 1}"

    def inside(self, host: int) -> list[str]:
        """The prefix of a command that puts it on a host."""
        return ["ip", "netns", "exec", self.hosts[host]]

    def _make(self) -> None:
        try:
            _call("ip", "netns", "add", self._hub)
        except BenchError as error:
            raise ConfigError(
                f"this system does not let root make network namespaces ({error}); in a container add "
                "--cap-add NET_ADMIN --cap-add SYS_ADMIN"
            ) from None
        needs_switch = bool(self.link.delay_ms or self.link.loss) and not self._has_netem()
        if not needs_switch:
            _call("ip", "-n", self._hub, "link", "add", "br0", "type", "bridge")
            _call("ip", "-n", self._hub, "link", "set", "br0", "up")
        for index, host in enumerate(self.hosts):
            _call("ip", "netns", "add", host)
            port = f"p{index}"
            _call(
                "ip",
                "link",
                "add",
                "eth0",
                "netns",
                host,
                "type",
                "veth",
                "peer",
                "name",
                port,
                "netns",
                self._hub,
            )
            bridge = f"br{index}" if needs_switch else "br0"
            if needs_switch:
                _call("ip", "-n", self._hub, "link", "add", bridge, "type", "bridge")
                _call("ip", "-n", self._hub, "link", "set", bridge, "up")
            _call("ip", "-n", self._hub, "link", "set", port, "master", bridge, "up")
            address = self.address(index)
            _call("ip", "-n", host, "link", "set", "lo", "up")
            _call("ip", "-n", host, "address", "add", f"{address}/24", "dev", "eth0")
            _call("ip", "-n", host, "link", "set", "eth0", "up")
            route = ["route", "change", f"{_NETWORK}.0/24", "dev", "eth0", "proto", "kernel", "scope", "link"]
            _call("ip", "-n", host, *route, "src", address, "congctl", "cubic")
        if needs_switch:
            self._start_switch()

    def _has_netem(self) -> bool:
        done = subprocess.run(
            ["tc", "-n", self._hub, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"],
            capture_output=True,
            check=False,
        )
        _call("tc", "-n", self._hub, "qdisc", "del", "dev", "lo", "root", check=False)
        return done.returncode == 0

    def _start_switch(self) -> None:
        """The program that delays and drops; every port's bridge gets one of its TAP devices."""
        self.delay_by = "TAP switch"
        taps = [f"tap{index}" for index in range(len(self.hosts))]
        options = [str(self.link.delay_ms), str(self.link.loss), *taps]
        self._switch = subprocess.Popen(
            ["ip", "netns", "exec", self._hub, sys.executable, "-I", str(_HERE / "switch.py"), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._switch.stdout is not None
        if self._switch.stdout.readline().strip() != "ready":
            assert self._switch.stderr is not None
            raise BenchError(f"the switch does not start: {self._switch.stderr.read().strip()[-500:]}")
        for index, tap in enumerate(taps):
            _call("ip", "-n", self._hub, "link", "set", tap, "master", f"br{index}", "up")

    def shape(self) -> None:
        """Give every link its rate, both ways (and netem's delay and loss). Idempotent."""
        self.unshape()
        for index, host in enumerate(self.hosts):
            for namespace, device in ((host, "eth0"), (self._hub, f"p{index}")):
                self._shape_device(namespace, device, outward=device == "eth0")
        self._shaped = True

    def _shape_device(self, namespace: str, device: str, *, outward: bool) -> None:
        add = ["tc", "-n", namespace, "qdisc", "add", "dev", device]
        parent = ["root"]
        if self.link.rate_bps is not None:
            rate = self.link.rate_bps
            burst = max(BURST_BYTES, int(rate / 8 * 1e-3))
            queue = max(2 * BURST_BYTES, int(rate / 8 * QUEUE_S))
            handle = [
                "handle",
                "1:",
                "tbf",
                "rate",
                f"{rate:.0f}bit",
                "burst",
                str(burst),
                "limit",
                str(queue),
            ]
            _call(*add, *parent, *handle)
            parent = ["parent", "1:1"]
        if outward and (self.link.delay_ms or self.link.loss) and self._switch is None:
            self.delay_by = "netem"
            packets = 1000 + int((self.link.rate_bps or 1e10) / 8 / 1500 * self.link.delay_ms / 1e3 * 2)
            netem = ["netem", "limit", str(packets), "delay", f"{self.link.delay_ms}ms"]
            _call(*add, *parent, *netem, *(["loss", f"{100 * self.link.loss}%"] if self.link.loss else []))

    def unshape(self) -> None:
        """Take the rates off. Idempotent."""
        if self._shaped:
            for index, host in enumerate(self.hosts):
                _call("tc", "-n", host, "qdisc", "del", "dev", "eth0", "root", check=False)
                _call("tc", "-n", self._hub, "qdisc", "del", "dev", f"p{index}", "root", check=False)
            self._shaped = False

    def verify(self, seconds: float = 1.0, attempts: int = 3) -> dict[str, Any]:
        """Measure every link with raw TCP, around a ring, one after another.

        Args:
            seconds: duration of each measurement, after the start-up.
            attempts: the number of tries until one is within 5 % of what the rate allows.

        Returns:
            "asked", "measured" (a list of from, to, mbit_s, round_trip_ms) and "verified": whether every
            payload rate is within 5 % of the rate times 1448/1514; None if the link is not shaped.
        """
        measured, verified = [], True
        for source in range(len(self.hosts)):
            target = (source + 1) % len(self.hosts)
            for _ in range(attempts):
                found = self._probe(source, target, seconds)
                allowed = (self.link.rate_bps or 0.0) / 1e6 * PAYLOAD_SHARE
                # delay and loss hold TCP itself below the rate, so there the figure is recorded, not judged
                fits = not self._judged or abs(found["mbit_s"] / allowed - 1) <= TOLERANCE
                if fits:
                    break
            verified = verified and fits
            measured.append({"from": source, "to": target, **found})
        return {
            "asked": str(self.link),
            "measured": measured,
            "verified": verified if self._judged else None,
            "delay_by": self.delay_by,
            "congestion_control": "cubic",
        }

    @property
    def _judged(self) -> bool:
        return self.link.rate_bps is not None and not self.link.delay_ms and not self.link.loss

    def _probe(self, source: int, target: int, seconds: float) -> dict[str, float]:
        script = [sys.executable, "-I", str(_HERE / "tcp_probe.py")]
        receiver = subprocess.Popen(
            [*self.inside(target), *script, "receive", self.address(target)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            assert receiver.stdout is not None
            port = receiver.stdout.readline().strip()
            _call(*self.inside(source), *script, "send", self.address(target), port, str(seconds))
            output, errors = receiver.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            raise BenchError(f"host {target} received nothing from host {source}") from None
        finally:
            if receiver.poll() is None:
                receiver.kill()
            receiver.communicate()
        if not output.strip():
            raise BenchError(f"the link from host {source} to {target} cannot be measured: {errors[-300:]}")
        found: dict[str, float] = json.loads(output)
        return found

    def close(self) -> None:
        """Remove all hosts, the switch and what runs there. Idempotent."""
        if self._switch is not None:
            self._switch.kill()
            self._switch.communicate()
            self._switch = None
        existing = set(_namespaces())
        for name in (*self.hosts, self._hub):
            if name in existing:
                _remove(name)
        deadline = time.monotonic() + 5
        while set(_namespaces()) & {*self.hosts, self._hub} and time.monotonic() < deadline:
            time.sleep(0.1)
