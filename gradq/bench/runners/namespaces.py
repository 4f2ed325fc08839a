"""The namespaces runner: every host a network namespace of this machine, every link shaped and measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradq.bench.network import Network
from gradq.bench.runners.processes import ProcessRunner
from gradq.bench.scenario import Scenario
from gradq.errors import ConfigError

__all__ = ["NamespacesRunner", "SweepRunner"]


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

    def before_phase(self, phase: int) -> None:
        """See `ProcessRunner.before_phase`."""
        assert self._network is not None
        self._network.shape()

    def close(self) -> None:
        """See `Runner.close`."""
        if self._network is not None:
            self._network.close()
            self._network = None


class SweepRunner(NamespacesRunner):
    """Scenarios that differ in their link only, by the same ranks: models are made and warmed up once.

    Args:
        scenarios: the scenarios, which are measured one after another; the phase of a record is an index of
            this list.
        budgets_s: time limits of each, in seconds; see `Scenario.budget_s`.

    Raises:
        ConfigError: the links differ in more than their rates.
    """

    def __init__(self, scenarios: Sequence[Scenario], budgets_s: Sequence[float | None]) -> None:
        super().__init__(scenarios[0])
        if len({(scenario.link.delay_ms, scenario.link.loss) for scenario in scenarios}) > 1:
            raise ConfigError("the links of a sweep may differ in their rates only, not in delay and loss")
        self.scenarios = scenarios
        self.facts: dict[int, dict[str, Any]] = {}
        self.phases = tuple(
            (-(-scenario.steps // scenario.block) - scenario.warmup, budget_s)
            for scenario, budget_s in zip(scenarios, budgets_s, strict=True)
        )

    def open(self) -> dict[str, Any]:
        """Make the hosts; each link is measured when its phase begins."""
        ProcessRunner.open(self)
        self._network = Network(self.scenario.nodes, self.scenarios[0].link)
        return {}

    def before_phase(self, phase: int) -> None:
        """Shape and measure the link of a phase while the ranks wait."""
        assert self._network is not None
        self._network.link = self.scenarios[phase].link
        self._network.shape()
        self.facts[phase] = {"link": self._network.verify()}
