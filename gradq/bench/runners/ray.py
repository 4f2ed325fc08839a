"""The Ray runner: ranks as actors, one bundle a node, spread strictly; a lost rank restarts all.

Records are fetched from the actors as they are made. If an actor or its node dies, its peers fail within
moments (Gloo) or at the group's timeout; all actors are then made anew and ranks go on from the newest
checkpoint that all of them find on their nodes' disks. Restarts are counted and stand in the record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradq
from gradq.bench.runners.base import RankLostError, Runner
from gradq.bench.runners.ray_rank import RankActor
from gradq.bench.scenario import Scenario
from gradq.bench.worker import Job
from gradq.errors import BenchError, ConfigError, MismatchError

__all__ = ["RayRunner"]

Record = dict[str, Any]


class RayRunner(Runner):
    """Actors in a placement group.

    Args:
        scenario: the scenario that is measured; its link says what the preflight should expect, nothing is
            shaped.
        cluster: "ray://head:10001", "head:6379", "auto" (the cluster of this machine), or "local" for one
            node of its own.
        link: what is known of the link, for the record's header.
        max_restarts: number of restarts of a seed before it is given up.
        patience_s: the time to wait for nodes and CPUs, in seconds.

    Raises:
        ConfigError: Ray is not installed.
    """

    name = "ray"

    def __init__(
        self,
        scenario: Scenario,
        cluster: str,
        *,
        link: Mapping[str, Any] | None = None,
        max_restarts: int = 3,
        patience_s: float = 180.0,
    ) -> None:
        super().__init__(scenario)
        self._token = _make_token() if cluster == "local" else None
        try:
            import ray
        except ImportError:
            self._drop_token()
            raise ConfigError("--cluster needs Ray: pip install 'gradq[ray]'") from None
        self._ray: Any = ray
        self._link = dict(link or {})
        self.cluster, self.max_restarts, self.patience_s = cluster, max_restarts, patience_s
        self.restarts = 0
        self._group: Any = None
        self._actors: list[Any] = []
        self._connected = False
        self._folder = f"{tempfile.gettempdir()}/gradq-bench-snapshots-{uuid.uuid4().hex[:12]}"

    def open(self) -> dict[str, Any]:
        """See `Runner.open`.

        Raises:
            BenchError: there is no such cluster, or it has not enough nodes, CPUs or GPUs.
        """
        _check_reachable(self.cluster)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.cluster == "local":
            options |= {
                "include_dashboard": False,
                "num_cpus": max(os.cpu_count() or 1, self.scenario.world_size),
            }
        try:
            self._ray.init(address=self.cluster, **options)
        except Exception as error:  # Ray raises bare ones too
            self._ray.shutdown()
            raise BenchError(f"cannot reach the Ray cluster {self.cluster}: {error}") from error
        self._connected = True
        alive = [node for node in self._ray.nodes() if node["Alive"]]
        if len(alive) < self.scenario.nodes:
            raise BenchError(
                f"{self.scenario.nodes} nodes are asked for (--nodes), {self.cluster} has {len(alive)}"
            )
        per_rank = self._cpus_per_rank(alive)
        bundle = {"CPU": float(per_rank * self.scenario.ranks_per_node)}
        if self.scenario.gpus_per_rank:
            self._check_gpus(alive)
            bundle["GPU"] = float(self.scenario.gpus_per_rank * self.scenario.ranks_per_node)
        self._group = self._ray.util.placement_group([bundle] * self.scenario.nodes, strategy="STRICT_SPREAD")
        self._wait_for_group(bundle)
        link = {"asked": str(self.scenario.link), **self._link, "cluster": self.cluster}
        return {"link": link, "ray": self._ray.__version__}

    def _cpus_per_rank(self, alive: list[Record]) -> int:
        counts = sorted((node["Resources"].get("CPU", 0.0) for node in alive), reverse=True)
        fewest = counts[self.scenario.nodes - 1]
        if fewest < self.scenario.ranks_per_node:
            raise BenchError(
                f"{self.scenario.ranks_per_node} ranks a node need as many CPUs; node {self.scenario.nodes} "
                f"of {self.cluster} has {fewest:g} (ray start --num-cpus)"
            )
        return max(1, int(fewest // self.scenario.ranks_per_node))

    def _check_gpus(self, alive: list[Record]) -> None:
        """Refuse at once what the cluster can never give; the placement group would wait for it."""
        needed = self.scenario.gpus_per_rank * self.scenario.ranks_per_node
        counts = [node["Resources"].get("GPU", 0.0) for node in alive]
        if sum(count >= needed for count in counts) < self.scenario.nodes:
            raise BenchError(
                f"{self.scenario.nodes} nodes with {needed} GPUs each are asked for (--gpus-per-node), "
                f"those of {self.cluster} have {', '.join(f'{count:g}' for count in counts)}: on CPUs say "
                "--ranks-per-node, or tell Ray of its GPUs (ray start --num-gpus)"
            )

    def _wait_for_group(self, bundle: dict[str, float]) -> None:
        try:
            self._ray.get(self._group.ready(), timeout=self.patience_s)
        except self._ray.exceptions.GetTimeoutError:
            raise BenchError(
                f"the cluster did not give {self.scenario.nodes} nodes with {bundle} free within "
                f"{self.patience_s:g} s; `ray status` says who has them"
            ) from None

    def _make_actors(self) -> list[Record]:
        """New actors on their bundles; returns where they are."""
        scenario = self.scenario
        # fetch and facts are answered while a job runs in its thread
        actor_class = self._actor_class(max_restarts=0, max_concurrency=2)
        cpus = self._group.bundle_specs[0]["CPU"] / scenario.ranks_per_node
        self._actors = [
            actor_class.options(
                num_cpus=cpus,
                num_gpus=scenario.gpus_per_rank,
                **self._on_node(rank // scenario.ranks_per_node),
            ).remote(rank)
            for rank in range(scenario.world_size)
        ]
        try:
            facts: list[Record] = self._ray.get(
                [actor.facts.remote("") for actor in self._actors], timeout=self.patience_s
            )
        except self._ray.exceptions.GetTimeoutError:
            raise BenchError(
                f"not all actors started within {self.patience_s:g} s: a node is gone or too busy"
            ) from None
        except self._ray.exceptions.RayError as error:
            raise BenchError(
                f"an actor cannot start; gradq must be installed on every node: {str(error)[-800:]}"
            ) from error
        for fact in facts:
            if fact["gradq"] != gradq.__version__:
                raise MismatchError(
                    f"rank {fact['rank']} on {fact['host']} has gradq {fact['gradq']}, this machine "
                    f"{gradq.__version__}: install the same everywhere"
                )
        return facts

    def run(self, seed: int) -> Iterator[tuple[int, Record]]:
        """See `Runner.run`."""
        for attempt in range(self.max_restarts + 1):
            try:
                yield from self._attempt(seed)
            except RankLostError as error:
                if attempt == self.max_restarts:
                    raise
                self._end_actors()
                self.restarts += 1
                yield (
                    0,
                    {
                        "record": "event",
                        "event": "restart",
                        "reason": str(error).partition("\n")[0],
                        "restarts": self.restarts,
                    },
                )
            else:
                self._clean_nodes()
                self._end_actors()
                return

    def _attempt(self, seed: int) -> Iterator[tuple[int, Record]]:
        facts = self._make_actors()
        several = self.scenario.nodes > 1
        port = self._ray.get(self._actors[0].free_port.remote(facts[0]["address"]))
        turns = -(-self.scenario.steps // self.scenario.block)
        every = self.scenario.checkpoint_every or max(1, turns // 8)
        for rank, actor in enumerate(self._actors):
            job = Job(
                scenario=dataclasses.replace(self.scenario, checkpoint_every=every),
                seed=seed,
                rank=rank,
                init_method=f"tcp://{facts[0]['address']}:{port}",
                interface=facts[rank]["interface"] if several else "lo",
                interface_ranks=self.scenario.ranks_per_node,
                threads=max(1, int(self._group.bundle_specs[0]["CPU"] / self.scenario.ranks_per_node)),
                snapshots=f"{self._folder}/seed{seed}",
                preflight=True,
            )
            actor.start.remote(job.to_json())
        yield 0, {"record": "nodes", "ranks": facts}
        yield from self._fetch()

    def _fetch(self) -> Iterator[tuple[int, Record]]:
        """The actors' records until all are done."""
        waiting = {actor.fetch.remote(1.0): rank for rank, actor in enumerate(self._actors)}
        errors: dict[int, Record] = {}
        deadline = 0.0
        while waiting:
            ready, _ = self._ray.wait(list(waiting), timeout=1.0)
            for reference in ready:
                rank = waiting.pop(reference)
                try:
                    records = self._ray.get(reference)
                except self._ray.exceptions.RayError as error:
                    reason = str(error).strip().splitlines()
                    errors[rank] = {"error": f"its actor died: {' '.join(reason[:2])[:300]}"}
                    deadline = deadline or time.monotonic() + 10.0
                    continue
                finished = False
                for record in records:
                    if record["record"] == "error":
                        errors[rank] = record
                        deadline = deadline or time.monotonic() + 10.0
                        finished = True
                    else:
                        finished = finished or record["record"] == "done"
                        yield rank, record
                if not finished:
                    waiting[self._actors[rank].fetch.remote(1.0)] = rank
            if deadline and time.monotonic() > deadline:
                break
        if errors:
            known = [error for error in errors.values() if error.get("known")]
            died = [rank for rank, error in errors.items() if "its actor died" in error["error"]]
            if known and not died:
                raise ConfigError(known[0]["error"])
            rank = (died or sorted(errors))[0]
            raise RankLostError(
                f"rank {rank}: {errors[rank]['error']}\n{errors[rank].get('traceback', '')}".strip()
            )

    def _end_actors(self) -> None:
        for actor in self._actors:
            try:
                self._ray.kill(actor, no_restart=True)
            except Exception:
                logging.getLogger("gradq").debug("an actor was gone already", exc_info=True)
        self._actors = []

    def close(self) -> None:
        """See `Runner.close`. Checkpoints are removed from every node that still answers."""
        try:
            self._disconnect()
        finally:
            self._drop_token()

    def _drop_token(self) -> None:
        if self._token is not None:
            for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
                os.environ.pop(name, None)
            shutil.rmtree(self._token.parent, ignore_errors=True)
            self._token = None

    def _disconnect(self) -> None:
        if not self._connected:
            return
        try:
            self._clean_nodes()
            self._end_actors()
            if self._group is not None:
                self._ray.util.remove_placement_group(self._group)
        finally:
            self._connected = False
            self._ray.shutdown()

    def _clean_nodes(self) -> None:
        """Remove the checkpoints, by actors that live; by new ones where none does."""
        waiting = {
            actor.clean.remote(self._folder): rank // self.scenario.ranks_per_node
            for rank, actor in enumerate(self._actors)
        }
        if not waiting:
            return
        done, _ = self._ray.wait(list(waiting), num_returns=len(waiting), timeout=15.0)
        cleaned = set()
        for reference in done:
            with contextlib.suppress(self._ray.exceptions.RayError):  # this actor is dead
                self._ray.get(reference)
                cleaned.add(waiting[reference])
        left = set(waiting.values()) - cleaned
        if left:
            actors = [self._actor_class(num_cpus=0).options(**self._on_node(node)).remote(0) for node in left]
            done = [actor.clean.remote(self._folder) for actor in actors]
            self._ray.wait(done, num_returns=len(done), timeout=60.0)

    def _actor_class(self, **options: Any) -> Any:
        return self._ray.remote(**options)(RankActor)

    def _on_node(self, node: int) -> dict[str, Any]:
        """Options that put an actor on a node of the group."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._group, placement_group_bundle_index=node
        )
        return {"scheduling_strategy": strategy}


def _check_reachable(cluster: str) -> None:
    """Knock at the address first: Ray itself goes on trying for minutes.

    Raises:
        BenchError: nobody answers.
    """
    host, colon, port = cluster.removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise BenchError(
            f"cannot reach the Ray cluster {cluster}: {error}; `ray start --head` prints the address"
        ) from None


def _make_token() -> Path | None:
    """A token for a cluster of one's own; else Ray would make one and leave it in the user's home.

    Ray reads the environment when it is imported, so this comes first.
    """
    if "RAY_AUTH_MODE" in os.environ or "ray" in sys.modules:
        return None
    token = Path(tempfile.mkdtemp(prefix=f"gradq-bench-{os.getpid()}-"), "token")
    token.write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    return token
