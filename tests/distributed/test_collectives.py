"""Every collective with every kind of codec, to the bit what the oracle says; all ranks in one process.

The real collectives, channels apart: messages go through `gradq.testing.Network`. Timing, faults and what DDP
does are tested on real ranks in the other files, which take these jobs too.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import run_here
from test_contracts import PLACES, VALUES, check_poisoned
from test_ddp import check
from test_hierarchical import check_near_the_mean, check_share, check_two_nodes, hierarchical_jobs
from test_mixed_collectives import check_mixed
from test_powersgd import JOBS as LOW_RANK_JOBS
from test_sparse import JOBS as SPARSE_JOBS
from test_sparse import SPEC as TOPK
from test_sparse import check_owners
from test_wire_bytes import BYTES, CountingNetwork, check_bytes, one_step_of

from gradq.options import SyncConfig
from gradq.policy import FixedPolicy, ParameterInfo, Spec
from gradq.sync.gradient_sync import GradientSync
from gradq.testing import InProcessGroup, Network, run_in_process

SPECS = ["fp32", "bf16", "fp16", "int8", "int4", "int3", "int4+int4", "int2+int8", "int8(block_size=64)"]
UNUSED = ("branch",)


@pytest.mark.parametrize(
    ("world_size", "spec"),
    [*itertools.product((2, 3, 4), SPECS), (5, "int8"), (5, "int4+int4"), (8, "int4+int4")],
)
@pytest.mark.parametrize("collective", ["direct", "two_phase"])
def test_every_spec(world_size: int, collective: str, spec: str) -> None:
    job = {"spec": spec, "compress": {"collective": collective}, "ddp": {"bucket_cap_mb": 0.02}}
    check(world_size, job, unused=UNUSED, here=True)


@pytest.mark.parametrize("job", SPARSE_JOBS)
def test_top_k(job: str) -> None:
    world_size, changes = SPARSE_JOBS[job]
    check(world_size, {"ddp": {"bucket_cap_mb": 0.02}, "steps": 5} | changes, unused=UNUSED, here=True)


def test_top_k_from_5_ranks_on_owners_average_and_the_rest_stays_direct() -> None:
    check_owners(run_here(5, {"spec": TOPK, "ddp": {"bucket_cap_mb": 0.02}, "steps": 3}))


@pytest.mark.parametrize("job", LOW_RANK_JOBS)
def test_low_rank(job: str) -> None:
    """Eight steps, so that a basis comes from a factor from the left and from the right several times."""
    world_size, changes = LOW_RANK_JOBS[job]
    check(world_size, {"ddp": {"bucket_cap_mb": 0.02}, "steps": 8} | changes, unused=UNUSED, here=True)


@pytest.mark.parametrize("bucket_cap_mb", [0.001, 0.02, 25])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_parameter_takes_its_own_collective(world_size: int, bucket_cap_mb: float) -> None:
    check_mixed(world_size, bucket_cap_mb, run_here)


@pytest.mark.parametrize(
    ("world_size", "local_world_size"),
    [
        (2, 2),
        (3, 1),
        (4, 2),
        (6, 2),
        pytest.param(6, 3, marks=pytest.mark.slow),
        pytest.param(8, 4, marks=pytest.mark.slow),
    ],
)
def test_hierarchical_replicas_are_equal_and_near_the_mean(world_size: int, local_world_size: int) -> None:
    for job in hierarchical_jobs(local_world_size):
        check_near_the_mean(job, run_here(world_size, job))


@pytest.mark.parametrize("spec", ["int8", "int4"])
def test_hierarchical_two_nodes_to_the_bit(spec: str) -> None:
    check_two_nodes(spec, run_here)


def test_hierarchical_nodes_of_one_rank_are_the_flat_form() -> None:
    options = [{"collective": "hierarchical", "local_world_size": 1}, {"collective": "two_phase"}]
    both = [run_here(3, {"spec": "int4+int4", "compress": one, "steps": 3}) for one in options]
    for hierarchical, flat in zip(*both, strict=True):
        for step in range(3):
            for name, got in hierarchical[1][step].items():
                assert torch.equal(got, flat[1][step][name])


def sent(group: InProcessGroup, options: dict) -> tuple[int, int, int, str]:
    """The bytes of one step of one matrix."""
    infos = [ParameterInfo(name="w", shape=(500, 700), dtype=torch.float32, index=0)]
    sync = GradientSync(infos, FixedPolicy(spec=Spec.parse("int8")), "int8", group, SyncConfig(**options))
    generator = torch.Generator().manual_seed(group.rank())
    sync.average_buckets([(torch.randn(350_000, generator=generator), ["w"])])[0].wait()
    stats = sync.stats()
    sync.close()
    return stats.wire_bytes, stats.inter_node_bytes, stats.intra_node_bytes, str(stats)


@pytest.mark.parametrize(("world_size", "local_world_size"), [(4, 2), (6, 2), (6, 3)])
def test_between_nodes_travels_a_share_of_the_flat_form(world_size: int, local_world_size: int) -> None:
    options = {"collective": "hierarchical", "local_world_size": local_world_size}
    flat, between = (run_in_process(sent, world_size, one) for one in ({"collective": "two_phase"}, options))
    results = list(map(list, zip(flat, between, strict=True)))
    check_share(world_size, local_world_size, results, 4 * 350_000)


@pytest.mark.parametrize(("spec", "most"), BYTES)
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_bytes_on_the_wire_relative_to_fp32(world_size: int, spec: str, most: float) -> None:
    network = CountingNetwork(world_size)
    counted = run_in_process(lambda group: one_step_of(group, spec), world_size, network=network)
    results = [(network.sent[rank], *rest) for rank, rest in enumerate(counted)]
    check_bytes(spec, most, world_size, results)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3, 4))])
def test_no_order_of_delivery_changes_a_bit(seed: int) -> None:
    """Several buckets under way on both channels."""
    job = {"spec": "int4+int4", "compress": {"collective": "two_phase"}, "ddp": {"bucket_cap_mb": 0.001}}
    usual = run_here(4, job)
    for (_, ours, _), (_, theirs, _) in zip(run_here(4, job, Network(4, shuffle=seed)), usual, strict=True):
        for step, reduced in enumerate(ours):
            assert all(torch.equal(mean, theirs[step][name]) for name, mean in reduced.items())


# --- non-finite ----------------------------------------------------------------------------------------

SHAPES = {
    "0.weight": (70, 50),
    "0.bias": (70,),
    "2.weight": (90, 70),
    "2.bias": (90,),
    "4.weight": (8, 90),
    "4.bias": (8,),
}


def poison(group: InProcessGroup, spec: str, collective: str, culprit: int):
    """For every place and value: a good step, one with the value planted on one rank, and a good one."""
    infos = [
        ParameterInfo(name=name, shape=shape, dtype=torch.float32, index=index)
        for index, (name, shape) in enumerate(SHAPES.items())
    ]
    policy = FixedPolicy(spec=Spec.parse(spec), feedback=True)
    sync = GradientSync(infos, policy, spec, group, SyncConfig(collective=collective))
    buckets = (["4.bias", "4.weight", "2.bias"], ["2.weight"], ["0.bias", "0.weight"])
    outcomes = []

    def residuals() -> dict[str, torch.Tensor]:
        kinds = {"local": sync.feedback.local, "shard": sync.feedback.shard}
        return {
            f"{kind} {name}": store.current(name).clone()
            for kind, store in kinds.items()
            for name in store.names()
        }

    def step(number: int, target: str = "", element: int = 0, value: float = 0.0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(100 * number + group.rank())
        gradients = {info.name: torch.randn(info.numel, generator=generator) for info in infos}
        if target and group.rank() == culprit:
            gradients[target][element] = value
        flats = [torch.cat([gradients[name] for name in bucket]) for bucket in buckets]
        for future in sync.average_buckets(zip(flats, buckets, strict=True)):
            future.wait()
        sizes = {info.name: info.numel for info in infos}
        return {
            name: part
            for bucket, flat in zip(buckets, flats, strict=True)
            for name, part in zip(bucket, flat.split([sizes[name] for name in bucket]), strict=True)
        }

    for target, element in PLACES:
        for value in VALUES:
            step(1)
            before = residuals()
            poisoned, during = step(2, target, element, value), residuals()
            outcomes.append((before, poisoned, during, step(3)))
    sync.close()
    return outcomes


@pytest.mark.parametrize("collective", ["direct", "two_phase"])
@pytest.mark.parametrize("spec", ["int8", "int4+int4", "topk(percent=5,block_size=256)"])
def test_non_finite_is_seen_everywhere_and_never_remembered(spec: str, collective: str) -> None:
    check_poisoned(run_in_process(poison, 3, spec, collective, 1), collective)
