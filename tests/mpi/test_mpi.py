"""The backend mpi4py on MPICH and on Open MPI: torch's smoke cases, every operation, gradq's conformance."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import cases
import pytest
import torch
from harness import Call, run_mpi
from oracle import Net, expected, plan_for, run
from test_contracts import PLACES, VALUES, native_form, poison
from test_fsdp import check_replicas, check_shards, compare, replica_jobs, shard_jobs
from test_local_sgd import JOBS, check_averages, check_steps, train

from gradq.testing import RankError

RANKS = [
    pytest.param("mpich", 2, id="mpich-2"),
    *(
        pytest.param(library, world_size, id=f"{library}-{world_size}", marks=pytest.mark.slow)
        for library, world_size in itertools.product(["mpich", "openmpi"], [2, 3, 4])
        if (library, world_size) != ("mpich", 2)
    ),
]
SMOKE: dict[str, Call] = {
    "environment": (cases.environment, ()),
    "default all-reduce": (cases.ddp, ({}, ["both"])),
    "find unused": (cases.ddp, ({"find_unused_parameters": True}, ["left", "right"])),
    "static graph": (cases.ddp, ({"static_graph": True}, ["left"])),
    "objects": (cases.objects, ()),
    "barrier": (cases.barrier, ()),
    "batched p2p": (cases.batched_p2p, ()),
    "reductions": (cases.reductions, ()),
    "movements": (cases.movements, ()),
    "coalesced": (cases.coalesced, ()),
    "messages": (cases.messages, ()),
    "groups": (cases.groups, ()),
}
SPECS = ["fp32", "bf16", "int8", "int4", "int4+int4"]
COLLECTIVES = ["direct", "two_phase"]


def job(spec: str, collective: str) -> dict[str, Any]:
    ddp = {"bucket_cap_mb": 0.02, "find_unused_parameters": True}
    return {"spec": spec, "compress": {"collective": collective}, "ddp": ddp}


GRADQ: dict[str, Call] = {
    **{f"{s} {c}": (run, (job(s, c),)) for s, c in itertools.product(SPECS, COLLECTIVES)},
    "poison": (poison, ("int4+int4", "two_phase", 1)),
    "diloco": (train, (JOBS,)),
}


@functools.cache
def outcome(library: str, world_size: int) -> dict[str, list] | RankError:
    """Everything that runs under one mpiexec, or why it failed: once, whatever the outcome."""
    try:
        return run_mpi(library, world_size, SMOKE | GRADQ)
    except RankError as error:
        return error


def results(library: str, world_size: int) -> dict[str, list]:
    """What each rank returned, by case."""
    got = outcome(library, world_size)
    if isinstance(got, RankError):
        raise got
    return got


@pytest.mark.timeout(320)
@pytest.mark.parametrize(("library", "world_size"), RANKS)
class TestOneLaunch:
    """All that one mpiexec ran; the first test pays for it."""

    @pytest.mark.parametrize("case", SMOKE)
    def test_torch(self, library: str, world_size: int, case: str) -> None:
        """The cases check themselves; a rank that fails ends the launch."""
        assert len(results(library, world_size)[case]) == world_size

    @pytest.mark.parametrize("case", ["default all-reduce", "find unused", "static graph"])
    def test_replicas_get_the_same_gradients(self, library: str, world_size: int, case: str) -> None:
        histories = results(library, world_size)[case]
        for history in histories[1:]:
            for mine, theirs in zip(histories[0], history, strict=True):
                assert mine.keys() == theirs.keys()
                assert all(torch.equal(mine[name], theirs[name]) for name in mine)

    def test_the_environment_is_torchruns(self, library: str, world_size: int) -> None:
        for rank, env in enumerate(results(library, world_size)["environment"]):
            assert env == {
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(world_size),
            }

    @pytest.mark.parametrize("collective", COLLECTIVES)
    @pytest.mark.parametrize("spec", SPECS)
    def test_gradients_are_the_oracles(
        self, library: str, world_size: int, spec: str, collective: str
    ) -> None:
        """The bits that Gloo gives: the mean exact for fp32, quantized as predicted for the others."""
        outcomes = results(library, world_size)[f"{spec} {collective}"]
        put_in = [outcome[0] for outcome in outcomes]
        want = expected(put_in, plan_for(Net(), spec), two_phase=collective == "two_phase")
        for _, came_out, _ in outcomes:
            for step, gradients in enumerate(came_out):
                for name, gradient in gradients.items():
                    if not name.startswith("branch"):
                        assert torch.equal(gradient, want[step][name]), (step, name)

    def test_non_finite_survives(self, library: str, world_size: int) -> None:
        outcomes = results(library, world_size)["poison"]
        for rank_outcomes in outcomes:
            for number, ((target, _), _) in enumerate(itertools.product(PLACES, VALUES)):
                _, poisoned, _, after = rank_outcomes[number]
                assert not torch.isfinite(poisoned[target]).all()
                assert all(torch.isfinite(g).all() for name, g in poisoned.items() if name != target)
                assert all(torch.equal(g, outcomes[0][number][3][name]) for name, g in after.items())

    @pytest.mark.parametrize("name", JOBS)
    def test_local_steps(self, library: str, world_size: int, name: str) -> None:
        outcomes = [outcome[name] for outcome in results(library, world_size)["diloco"]]
        check_averages(outcomes, JOBS[name])
        check_steps(outcomes, JOBS[name])


@pytest.mark.slow
@pytest.mark.timeout(320)
@pytest.mark.parametrize("library", ["mpich", "openmpi"])
def test_subgroups_with_gradq(library: str) -> None:
    first, second, outsider = run_mpi(library, 3, {"subgroup": (native_form, ())})["subgroup"]
    assert first[0] == second[0] == 1
    assert outsider is None
    assert all(torch.equal(gradient, second[1][name]) for name, gradient in first[1].items())


@pytest.mark.slow
@pytest.mark.timeout(320)
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("library", ["mpich", "openmpi"])
def test_dtensor_and_fsdp(library: str, world_size: int) -> None:
    run_mpi(library, world_size, {"sharded": (cases.sharded, ())})


@pytest.mark.slow
@pytest.mark.timeout(320)
@pytest.mark.parametrize("mesh", [(2, 1), (3, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("library", ["mpich", "openmpi"])
def test_fsdp_with_gradq(library: str, mesh: tuple[int, int]) -> None:
    """FSDP2 and HSDP against the same without gradq, over the same backend."""
    names = ["fp32", "accumulated", "tied", "int8", "int4", "int4 with feedback", "none"]
    calls: dict[str, Call] = {
        "shards": (compare, (shard_jobs(names),)),
        "replicas": (compare, (replica_jobs(mesh),)),
    }
    outcomes = run_mpi(library, math.prod(mesh), calls)
    check_shards(outcomes["shards"], names)
    check_replicas(outcomes["replicas"], mesh)


@pytest.mark.slow
@pytest.mark.timeout(320)
@pytest.mark.parametrize("library", ["mpich", "openmpi"])
def test_a_checkpoint_is_resumed_bit_for_bit(library: str, tmp_path) -> None:
    from test_checkpoint import equal, resume, save

    folder, spec = str(tmp_path / "c"), "int4+int4"
    calls = {"save": (save, (folder, spec, {})), "resume": (resume, (folder, spec, {}))}
    outcomes = run_mpi(library, 2, calls)
    for (saved, history, weights), (loaded, step, replayed, resumed, lines) in zip(
        outcomes["save"], outcomes["resume"], strict=True
    ):
        assert step == 5
        assert not lines
        assert equal(saved, loaded)
        assert all(equal(want, got) for want, got in zip(history, replayed, strict=True))
        assert equal(weights, resumed)
