"""DistributedDataParallel with every option: all ranks get, to the bit, what the oracle predicts."""

from __future__ import annotations

import pytest
import torch
from oracle import Net, expected, plan_for, run, run_here

import gradq
from gradq.testing import run_ranks


def check(
    world_size: int,
    job: dict,
    *,
    two_phase: bool | None = None,
    unused: tuple[str, ...] = (),
    here: bool = False,
) -> list:
    """Compare every gradient of every step with the oracle.

    Args:
        world_size: number of ranks.
        job: what they do.
        two_phase: of the model's collective; what the job says by default.
        unused: starts of names that are not compared.
        here: all ranks in this process, without DDP; else real ones.
    """
    results = run_here(world_size, job) if here else run_ranks(run, world_size, job)
    put_in = [result[0] for result in results]
    model = Net(job.get("dtype", torch.float32), job.get("mixed", False))
    options = {key: value for key, value in job.get("compress", {}).items() if key in ("feedback", "exact")}
    plan = plan_for(model, job["spec"], world_size, **options)
    if two_phase is None:
        collective = job.get("compress", {}).get("collective", "auto")
        two_phase = collective == "two_phase"
    want = expected(put_in, plan, two_phase=two_phase, seed=job.get("compress", {}).get("seed", 0))
    for rank, (_, came_out, _) in enumerate(results):
        for step, gradients in enumerate(came_out):
            for name, gradient in gradients.items():
                if name.startswith(unused):
                    continue
                error = (gradient - want[step][name]).abs().max()
                assert torch.equal(gradient, results[0][1][step][name]), f"rank {rank}, step {step}, {name}"
                if gradient.dtype == torch.float64:  # nothing is compressed: DDP sums in an order of its own
                    summed = sum(inputs[step][name].abs().max() for inputs in put_in if name in inputs[step])
                    assert error <= 2 * torch.finfo(gradient.dtype).eps * summed, f"{name}: off by {error}"
                    continue
                assert torch.equal(gradient, want[step][name]), (
                    f"rank {rank}, step {step}, {name}: off by {error}"
                )
    return results


@pytest.mark.parametrize(
    ("world_size", "collective", "spec"),
    [
        (2, "direct", "int8"),
        (2, "two_phase", "int8(block_size=64)"),
        (3, "two_phase", "int4+int4"),
        (3, "direct", "fp16"),
        (4, "two_phase", "int3"),
        (4, "direct", "bf16"),
    ],
)
def test_some_specs(world_size: int, collective: str, spec: str) -> None:
    """All of them, with more ranks, are in test_collectives.py."""
    job = {"spec": spec, "compress": {"collective": collective}}
    job |= {"ddp": {"bucket_cap_mb": 0.02, "find_unused_parameters": True}}
    check(world_size, job, unused=("branch",))


def nothing(parameter: gradq.ParameterInfo) -> bool:
    """A predicate for `exact`: compress every parameter."""
    return False


ALTERNATE = {"find_unused_parameters": True, "bucket_cap_mb": 0.02}
UNUSED = ("branch", "second")
OPTIONS = {
    "one bucket": ({"find_unused_parameters": True}, {}),
    "bucket view": ({"find_unused_parameters": True, "gradient_as_bucket_view": True}, {}),
    "tiny buckets": ({"find_unused_parameters": True, "bucket_cap_mb": 0.001}, {}),
    "static graph": ({"static_graph": True, "bucket_cap_mb": 0.02}, {}),
    "accumulate in no_sync": (ALTERNATE, {"accumulate": 3}),
    "bf16 model": (ALTERNATE, {"dtype": torch.bfloat16}),
    "fp16 model": (ALTERNATE, {"dtype": torch.float16}),
    "mixed fp32 and fp64": (ALTERNATE, {"mixed": True}),
    "all fp64": (ALTERNATE, {"dtype": torch.float64}),
    "seed 7": (ALTERNATE, {"compress": {"seed": 7}}),
    "feedback at 8 bits": (ALTERNATE, {"spec": "int8", "compress": {"feedback": True}}),
    "no feedback at 4 bits": (ALTERNATE, {"compress": {"feedback": False}}),
    "exact by pattern": (ALTERNATE, {"compress": {"exact": ["second.*", "conv.weight"]}}),
    "nothing exact": (ALTERNATE, {"compress": {"exact": nothing}}),
    "skewed": (ALTERNATE, {"skew": 3}),
}
OURS = (
    "seed 7",
    "feedback at 8 bits",
    "no feedback at 4 bits",
    "exact by pattern",
    "nothing exact",
)
DTYPES = ("bf16 model", "fp16 model", "mixed fp32 and fp64", "all fp64")


def job_of(option: str, world_size: int) -> dict:
    ddp, changes = OPTIONS[option]
    job = {"spec": "int4+int4", "ddp": ddp, "steps": 5} | changes
    job["compress"] = {"collective": "two_phase" if world_size == 3 else "direct"} | job.get("compress", {})
    return job


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_option(world_size: int, option: str) -> None:
    """What is DDP's affair on real ranks; with two ranks also the dtypes, which the hook sees."""
    here = option in OURS or (option in DTYPES and world_size > 2)
    check(world_size, job_of(option, world_size), unused=("branch",), here=here)


def test_parameters_used_on_one_rank_only() -> None:
    """find_unused_parameters: rank 1 takes the branch, rank 0 does not; both get the same mean."""
    check(2, {"spec": "int4", "ddp": ALTERNATE, "branch": "rank 1", "steps": 4})


def test_branch_that_no_rank_takes_this_step() -> None:
    """A globally unused parameter keeps no gradient, as in plain DDP, and replicas stay equal."""
    results = run_ranks(run, 2, {"spec": "int8", "ddp": ALTERNATE, "branch": "alternate", "steps": 6})
    for step in range(6):
        idle = "second.weight" if step % 2 else "branch.weight"
        assert not results[0][1][step][idle].any()
        for name, gradient in results[0][1][step].items():
            assert torch.equal(gradient, results[1][1][step][name])


def test_none_is_plain_ddp() -> None:
    results = run_ranks(run, 2, {"spec": "none", "ddp": {"find_unused_parameters": True}})
    for step in range(4):
        for name, gradient in results[0][1][step].items():
            halves = [results[rank][0][step][name] / 2 for rank in range(2)]
            largest = max(float(half.abs().max()) for half in halves)  # the mean may nearly cancel
            torch.testing.assert_close(gradient, halves[0] + halves[1], rtol=1e-6, atol=1e-6 * largest)
            assert torch.equal(gradient, results[1][1][step][name])
    stats = results[0][2]["stats"]
    assert stats.wire_bytes == stats.dense_bytes > 0
    assert stats.steps == 4


def test_same_seed_same_bytes_in_two_runs_with_other_timing() -> None:
    job = {"spec": "int4+int8", "ddp": ALTERNATE, "compress": {"collective": "two_phase"}}
    first, second = (run_ranks(run, 3, job | {"skew": skew}) for skew in (1, 2))
    other = run_ranks(run, 3, job | {"compress": {"collective": "two_phase", "seed": 1}})
    for step in range(4):
        for name, gradient in first[0][1][step].items():
            assert torch.equal(gradient, second[0][1][step][name])
    assert any(not torch.equal(g, other[0][1][0][name]) for name, g in first[0][1][0].items())


def test_results_do_not_depend_on_the_bucket_layout() -> None:
    job = {"spec": "int4+int4", "compress": {"collective": "two_phase"}}
    layouts = [{"find_unused_parameters": True, "bucket_cap_mb": cap} for cap in (0.001, 0.02, 25)]
    runs = [run_ranks(run, 3, job | {"ddp": ddp}) for ddp in layouts]
    for step in range(4):
        for name, gradient in runs[0][0][1][step].items():
            assert torch.equal(gradient, runs[1][0][1][step][name])
            assert torch.equal(gradient, runs[2][0][1][step][name])
