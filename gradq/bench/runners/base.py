"""What a runner is, and `execute`, which drives one through all seeds of a scenario into a record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from gradq.bench.recording import Recorder, finished_seeds
from gradq.bench.scenario import Scenario
from gradq.errors import BenchError

__all__ = ["RankLostError", "Runner", "execute"]

Record = dict[str, Any]


class RankLostError(BenchError):
    """A rank died or lost its peers; a runner that can restart does."""


class Runner(ABC):
    """Runs one seed of a scenario after another on the same hosts. A context manager: leaving it cleans up.

    Args:
        scenario: the scenario that is measured.
    """

    name: str

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario

    @abstractmethod
    def open(self) -> dict[str, Any]:
        """Make hosts and links ready.

        Returns:
            Facts for the record's header.

        Raises:
            GradqError: they cannot be made; what was made is removed.
        """

    @abstractmethod
    def run(self, seed: int) -> Iterator[tuple[int, Record]]:
        """Run all ranks of a seed.

        Yields:
            (rank, record) as they come, those of `gradq.bench.worker.measure` and "event"s of the runner's
            own.

        Raises:
            GradqError: a rank failed.
        """

    @abstractmethod
    def close(self) -> None:
        """Leave the machine as it was. Idempotent; called whatever happened."""

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def execute(runner: Runner, path: Path, show: Callable[[Record], None] = lambda record: None) -> Path:
    """Measure what is not in the record yet.

    Args:
        runner: the runner, not open yet.
        path: path of the record; a finished one is left alone.
        show: a function that is called with every line that is written.

    Returns:
        The path.

    Raises:
        GradqError: something failed; finished samples are in the record, and the same call continues.
    """
    scenario = runner.scenario
    finished = finished_seeds(path, scenario)
    todo = [seed for seed in scenario.seeds if seed not in finished]
    if not todo:
        return path
    with runner:
        facts = runner.open()
        recorder = Recorder(path, scenario, {"runner": runner.name, **facts})
        try:
            for seed in todo:
                for rank, record in runner.run(seed):
                    if record.get("event") == "restart":
                        recorder.forget()
                    if (written := recorder.take(seed, rank, record)) is not None:
                        show(written)
                recorder.write("end", {"seed": seed})
        except BaseException as error:
            text = str(error) or type(error).__name__
            if not recorder.broken:
                recorder.write("event", {"event": "stopped", "reason": text[:2000]})
            raise
        finally:
            recorder.close()
    return path
