"""The local runner: all ranks on this machine, over loopback: the fastest link there is, the hardest test."""

from __future__ import annotations

from typing import Any

from gradq.bench.runners.processes import ProcessRunner
from gradq.errors import ConfigError

__all__ = ["LocalRunner"]


class LocalRunner(ProcessRunner):
    """Processes over loopback; it cannot shape a link."""

    name = "local"

    def open(self) -> dict[str, Any]:
        """See `Runner.open`.

        Raises:
            ConfigError: the scenario asks for a link.
        """
        link = self.scenario.link
        if link.shaped:
            raise ConfigError(f"loopback cannot be {link}: say how many hosts to make, --hosts 2")
        super().open()
        return {"link": {"asked": "loopback"}}

    def place(self, rank: int) -> tuple[list[str], str]:
        """See `ProcessRunner.place`."""
        return [], "lo"

    @property
    def interface_ranks(self) -> int:
        """All of them: loopback is one."""
        return self.scenario.world_size
