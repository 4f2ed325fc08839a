"""The namespaces runner: every host a network namespace of this machine, every link shaped and measured."""

from __future__ import annotations

from typing import Any

from gradq.bench.network import Network
from gradq.bench.runners.processes import ProcessRunner
from gradq.bench.scenario import Scenario

__all__ = ["NamespacesRunner"]


class NamespacesRunner(ProcessRunner):
    """Hosts made with `Network`. The ranks warm up over the unshaped link: nothing of it is measured."""

    name = "namespaces"

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        self._network: Network | None = None

    def open(self) -> dict[str, Any]:
        """See `Runner.open`.

        Raises:
            ConfigError: no root, no ip or tc. BenchError: the kernel refuses something.
        """
        super().open()
        self._network = Network(self.scenario.nodes, self.scenario.link)
        self._network.shape()
        return {"link": self._network.verify()}

    def place(self, rank: int) -> tuple[list[str], str]:
        """See `ProcessRunner.place`."""
        assert self._network is not None
        return self._network.inside(rank // self.scenario.ranks_per_node), "eth0"

    def before_warm_up(self) -> None:
        """See `ProcessRunner.before_warm_up`."""
        assert self._network is not None
        self._network.unshape()

    def before_measuring(self) -> None:
        """See `ProcessRunner.before_measuring`."""
        assert self._network is not None
        self._network.shape()

    def close(self) -> None:
        """See `Runner.close`."""
        if self._network is not None:
            self._network.close()
            self._network = None
