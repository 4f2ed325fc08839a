"""What each rank of a benchmark runs. `measure` is a generator of records, whoever runs it.

Codecs take turns, a block of steps each, in one run: what disturbs the machine disturbs all of them. Every
codec has a model and an optimizer of its own. Nothing is taken out of a step: forward, backward, exchange,
optimizer.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gradq.bench import snapshot
from gradq.bench.collectives import measure_collectives
from gradq.bench.contenders import Contender, open_contender
from gradq.bench.counters import Counters
from gradq.bench.models import Task, load_task
from gradq.bench.preflight import preflight
from gradq.bench.scenario import Scenario
from gradq.errors import GradqError

__all__ = ["Job", "main", "measure"]

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One rank's part of one seed of a scenario.

    Attributes:
        scenario: the scenario that is measured.
        seed: one of the scenario's seeds.
        rank: rank of this process.
        init_method: address where ranks meet: "file://..." or "tcp://host:port".
        interface: the interface that carries the gradients; "" is left to Gloo and not counted.
        interface_ranks: the number of ranks that share it.
        threads: number of threads to compute with.
        snapshots: folder of checkpoints; "" for none.
        preflight: whether to check collectives first; see `gradq.bench.preflight`.
        phases: the links to measure over, one after another, with the same models: (turns, budget_s) of each.
            Empty means one, as the scenario says.
        collective_bytes: the sizes of all-reduces to measure instead of training.
    """

    scenario: Scenario
    seed: int
    rank: int
    init_method: str
    interface: str
    interface_ranks: int = 1
    threads: int = 1
    snapshots: str = ""
    preflight: bool = False
    phases: tuple[tuple[int, float | None], ...] = ()
    collective_bytes: tuple[int, ...] = ()

    def to_json(self) -> str:
        """Text for another process."""
        return json.dumps(vars(self) | {"scenario": self.scenario.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job of a text."""
        values = json.loads(text)
        values["scenario"] = Scenario.from_dict(values["scenario"])
        values["phases"] = tuple((turns, budget_s) for turns, budget_s in values["phases"])
        values["collective_bytes"] = tuple(values["collective_bytes"])
        return cls(**values)


def measure(job: Job) -> Iterator[Record]:
    """Run a job; all ranks do it together.

    Yields:
        Records: "preflight" if asked for, "refused" (a codec that cannot run here), "start", "warm" (at the
        beginning of a phase: the link may be changed now), "block" (one codec's turn), "checkpoint", "final"
        (a codec's metric at the end), "done"; "collective" where these are measured.

    Raises:
        GradqError: the model or the data is not there. RuntimeError: a peer was lost.
    """
    torch.set_num_threads(job.threads)
    if job.interface:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = job.interface
    scenario = job.scenario
    task = None if job.collective_bytes else load_task(scenario)
    on_gpu = scenario.gpus_per_rank > 0
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        init_method=job.init_method,
        rank=job.rank,
        world_size=scenario.world_size,
        timeout=timedelta(seconds=scenario.timeout_s),
    )
    try:
        control = dist.new_group(backend="gloo")
        if job.preflight:
            rate = scenario.link.rate_bps
            found = preflight(job.interface, job.interface_ranks, rate, device, control)
            yield {"record": "preflight", **found}
        if task is None:
            yield {"record": "warm", "phase": 0, "turn": 0}
            yield from measure_collectives(scenario.codecs, job.collective_bytes, control)
        else:
            yield from _train(job, task, device, control)
        yield {"record": "done"}
    finally:
        dist.destroy_process_group()


def _train(job: Job, task: Task, device: torch.device, control: dist.ProcessGroup) -> Iterator[Record]:
    """Everything from the first contender's construction to the last one's metric."""
    scenario = job.scenario
    contenders: list[Contender] = []
    try:
        for name in scenario.contenders:
            contender, reason = _try_to_open(name, job, task, device, control)
            if contender is None:
                yield {"record": "refused", "codec": name, "reason": reason}
            else:
                contenders.append(contender)
        first = snapshot.load(job.snapshots, job.rank, contenders, control) if job.snapshots else 0
        numel = sum(p.numel() for p in contenders[0].model.parameters())
        start = {"parameters": numel, "interface": job.interface, "first_turn": first}
        start |= {"interface_ranks": job.interface_ranks, "codecs": [c.name for c in contenders]}
        yield {"record": "start", "pid": os.getpid(), **start}
        yield from _take_turns(job, task, contenders, first, control)
        for contender in contenders if scenario.evaluate else ():
            if contender.learns:
                yield {"record": "final", "codec": contender.name, **_evaluate(job, task, contender, control)}
    finally:
        for contender in contenders:
            contender.close()


def _try_to_open(
    name: str, job: Job, task: Task, device: torch.device, control: dist.ProcessGroup
) -> tuple[Contender | None, str]:
    """A contender, or why some rank cannot have it."""
    contender, reason = None, ""
    try:
        contender = open_contender(name, job.scenario, task, job.seed, device)
    except (GradqError, RuntimeError, ImportError) as error:
        reason = f"{type(error).__name__}: {error}"
    failed = torch.tensor([0.0 if contender else 1.0])
    dist.all_reduce(failed, group=control)
    if failed.item() and contender is not None:
        contender.close()
        contender, reason = None, "another rank cannot run it"
    return contender, reason


def _take_turns(
    job: Job, task: Task, contenders: list[Contender], first: int, control: dist.ProcessGroup
) -> Iterator[Record]:
    """All blocks of all contenders: warm-up, then phase by phase."""
    scenario = job.scenario
    turns = -(-scenario.steps // scenario.block)
    turn = first
    for _ in range(scenario.warmup):
        yield from _turn(job, task, contenders, turn, control, warmup=True)
        turn += 1
    for phase, (count, budget_s) in enumerate(job.phases or [(turns - turn, scenario.budget_s)]):
        dist.barrier(control)
        yield {"record": "warm", "phase": phase, "turn": turn}
        dist.barrier(control)
        start = time.monotonic()
        for done in range(1, count + 1):
            yield from _turn(job, task, contenders, turn, control, warmup=False)
            turn += 1
            if job.snapshots and scenario.checkpoint_every and turn % scenario.checkpoint_every == 0:
                snapshot.save(job.snapshots, job.rank, contenders, turn)
                yield {"record": "checkpoint", "turn": turn}
            elapsed_s = time.monotonic() - start
            if budget_s is not None and done >= scenario.min_turns and _agree(elapsed_s, control) > budget_s:
                break


def _turn(
    job: Job,
    task: Task,
    contenders: list[Contender],
    turn: int,
    control: dist.ProcessGroup,
    *,
    warmup: bool,
) -> Iterator[Record]:
    """A block of every contender; the order rotates from turn to turn."""
    shift = turn % len(contenders)
    for contender in contenders[shift:] + contenders[:shift]:
        yield _block(job, task, contender, turn, control) | {"warmup": warmup}


def _agree(value: float, control: dist.ProcessGroup) -> float:
    """The largest of all ranks' values."""
    shared = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(shared, dist.ReduceOp.MAX, group=control)
    return float(shared)


def _block(job: Job, task: Task, contender: Contender, turn: int, control: dist.ProcessGroup) -> Record:
    """One contender's steps of a turn, timed from a common start."""
    scenario = job.scenario
    left = scenario.steps - turn * scenario.block
    steps = scenario.block if job.phases else min(scenario.block, left)
    batches = [_batches(job, task, turn * scenario.block + index) for index in range(steps)]
    dist.barrier(control)
    sent, timings = contender.sent(), contender.timings_ms()
    before = Counters.read(job.interface)
    losses = [_step(scenario, task, contender, micros) for micros in batches]
    if losses[0].is_cuda:
        torch.cuda.synchronize()
    spent = Counters.read(job.interface) - before
    dist.barrier(control)  # the slowest rank's packets belong to this block
    all_sent = (Counters.read(job.interface) - before).sent_bytes
    now_sent = contender.sent()
    record: Record = {
        "record": "block",
        "turn": turn,
        "codec": contender.name,
        "steps": steps,
        "step_ms": 1e3 * spent.wall_s / steps,
        "cpu_ms": 1e3 * spent.cpu_s / steps,
        "busy": spent.busy_s / spent.wall_s / (os.cpu_count() or 1),
        "loss": float(torch.stack(losses).mean()) if contender.learns else None,
    }
    if sent is not None and now_sent is not None:
        record["wire_bytes"] = (now_sent - sent) / steps
    if all_sent is not None:
        record["interface_bytes"] = all_sent / steps
    for kind, now in contender.timings_ms().items():
        record[kind] = (now - timings[kind]) / steps
    return record


def _batches(job: Job, task: Task, step: int) -> list[tuple[Tensor, Tensor]]:
    """The micro-batches of a step; loading them is not timed."""
    return [
        task.dataset.batch(job.scenario.batch_size, np.random.default_rng((job.seed, step, job.rank, micro)))
        for micro in range(job.scenario.accumulate)
    ]


def _step(
    scenario: Scenario, task: Task, contender: Contender, micros: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """One optimizer step; returns this rank's mean loss, detached."""
    total = torch.zeros(())
    device = next(contender.model.parameters()).device
    for index, (inputs, targets) in enumerate(micros):
        last = index == len(micros) - 1
        with nullcontext() if last and contender.communicates else contender.model.no_sync():
            with torch.autocast(device.type, torch.bfloat16, enabled=scenario.precision == "bf16"):
                outputs = contender.model(inputs.to(device))
            loss = task.loss(outputs, targets.to(device)) / len(micros)
            loss.backward()  # type: ignore[no-untyped-call]
        total = total.to(device) + loss.detach()
    contender.optimizer.step()
    contender.optimizer.zero_grad()
    contender.steps += 1
    return total


@torch.no_grad()
def _evaluate(job: Job, task: Task, contender: Contender, control: dist.ProcessGroup) -> Record:
    """Mean loss and accuracy over the held-out samples of all ranks."""
    sums = torch.zeros(3, dtype=torch.float64)
    module = contender.model.module.eval()
    device = next(module.parameters()).device
    for inputs, targets in task.dataset.held_out(16, job.rank, job.scenario.world_size):
        outputs = module(inputs.to(device)).cpu()
        correct = (outputs.argmax(-1) == targets).sum()
        sums += torch.tensor([float(task.loss(outputs, targets)) * targets.numel(), correct, targets.numel()])
    dist.all_reduce(sums, group=control)
    return {"val_loss": float(sums[0] / sums[2]), "val_accuracy": float(sums[1] / sums[2])}


def main() -> None:
    """The process of a rank: a job on the command line, records as JSON lines on stdout, "go" on stdin.

    It ends itself when stdin ends, so a parent that is gone leaves no orphan.
    """
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a user's model prints must not stand between records
    go: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            go.put(line)
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    try:
        for record in measure(Job.from_json(Path(sys.argv[1]).read_text())):
            out.write(json.dumps(record) + "\n")
            if record["record"] == "warm":
                go.get()
    except BaseException as error:
        known = isinstance(error, GradqError)
        text = str(error) if known else "".join(traceback.format_exception_only(error)).strip()
        with_trace = None if known else traceback.format_exc()
        out.write(
            json.dumps({"record": "error", "known": known, "error": text, "traceback": with_trace}) + "\n"
        )
        out.flush()
        os._exit(1)  # a broken process group may not be destroyed: its threads would hang here
    out.close()
    os._exit(0)


if __name__ == "__main__":
    main()
