"""Ranks in one process: every order gives the same bits, what goes wrong is an error, nothing hangs."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from gradq import wire
from gradq.codecs import from_spec
from gradq.collectives import Collective, Direct, Hierarchical, Segment, Setting, Step, TwoPhase
from gradq.errors import MismatchError, PeerError, WireError
from gradq.metrics import Metrics
from gradq.options import SyncConfig
from gradq.policy import FixedPolicy, ParameterInfo, Spec
from gradq.sync.feedback import Feedback
from gradq.sync.gradient_sync import GradientSync
from gradq.testing import InProcessGroup, Network, RankError, Route, run_in_process

NUMELS = (700, 3, 256, 1025)


def collectives(network: Network, kind: type[Collective], spec: str, local: int = 1) -> list[Collective]:
    """One a rank, over four parameters."""
    codec, segments, start = from_spec(spec), [], 0
    for index, numel in enumerate(NUMELS):
        segments.append(Segment(f"p{index}", start, numel, index, codec, codec, False, False))
        start += numel
    made = []
    for rank, channels in enumerate(network.channels(kind.num_channels)):
        store = Feedback()
        setting = Setting(
            rank=rank,
            world_size=network.world_size,
            seed=0,
            channels=channels,
            feedback=store,
            metrics=Metrics(),
            device=torch.device("cpu"),
            local_world_size=local,
        )
        made.append(kind(segments, torch.float32, setting))
    return made


def gradients(world_size: int, step: int) -> list[torch.Tensor]:
    return [
        torch.randn(sum(NUMELS), generator=torch.Generator().manual_seed(100 * step + rank))
        for rank in range(world_size)
    ]


def averages(network: Network, kind: type[Collective], spec: str, local: int = 1) -> list[torch.Tensor]:
    """Means of two steps under way at once, of all ranks."""
    made = collectives(network, kind, spec, local)
    flats = [gradients(network.world_size, step) for step in range(2)]

    def job(rank: int) -> Iterator:
        for step in range(2):
            yield from made[rank].average(flats[step][rank], Step(step, 0))

    network.drive([job(rank) for rank in range(network.world_size)])
    for means in flats:
        assert all(torch.equal(mean, means[0]) for mean in means)
    return [means[0] for means in flats]


@pytest.mark.parametrize(
    ("kind", "world_size", "local"),
    [
        (Direct, 2, 1),
        (Direct, 5, 1),
        (TwoPhase, 2, 1),
        (TwoPhase, 8, 1),
        (Hierarchical, 4, 2),
        (Hierarchical, 6, 2),
        (Hierarchical, 6, 3),
    ],
)
@pytest.mark.parametrize("spec", ["int8", "fp32"])
def test_every_order_gives_the_same_bits(kind, world_size, local, spec) -> None:
    usual = averages(Network(world_size), kind, spec, local)
    for seed in range(10):
        shuffled = averages(Network(world_size, shuffle=seed), kind, spec, local)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(shuffled, usual, strict=True))
    for step, mean in enumerate(usual):
        exact = sum(x.double() for x in gradients(world_size, step)) / world_size
        error = float((mean.double() - exact).norm() / exact.norm())
        assert error < (0.05 if spec == "int8" else 1e-6)


def lose(*routes: Route):
    return lambda route: "drop" if route in routes else None


@pytest.mark.parametrize("kind", [Direct, TwoPhase])
def test_a_lost_message_is_an_error_that_names_both_ranks(kind) -> None:
    network = Network(3, fault=lose(Route(kind.num_channels - 1, 1, 2, 0)))
    with pytest.raises(PeerError, match=r"rank 0: receiving from rank 2 failed in step 1.*lost"):
        averages(network, kind, "int8")


def test_a_message_that_comes_late_is_refused_by_its_header() -> None:
    late = Route(0, 1, 2, 0)
    network = Network(3, fault=lambda route: "late" if route == late else None)
    with pytest.raises(WireError, match=r"message from rank 2.*its step is 0, expected 1"):
        averages(network, Direct, "int8")
    network = Network(3, fault=lambda route: "late" if route.number == 0 else None)
    with pytest.raises(WireError, match="not a gradq message"):  # nothing came before it
        averages(network, Direct, "int8")


class Hasty(Direct):
    """Writes into its message while that is still under way."""

    def average(self, flat, step):
        for pending in super().average(flat, step):
            self._messages_WN[self.setting.rank, wire.HEADER_BYTES :] = 0
            yield pending


def test_a_message_that_is_touched_too_early_is_not_what_arrives() -> None:
    """Messages are copied when they are delivered: a transport may read them as late as that."""
    assert not torch.equal(averages(Network(2), Hasty, "fp32")[0], averages(Network(2), Direct, "fp32")[0])


class Short(TwoPhase):
    """Rank 1 leaves the second exchange out."""

    def average(self, flat, step):
        stages = super().average(flat, step)
        yield next(stages)
        if self.setting.rank != 1:
            yield from stages


def test_a_message_that_nobody_sends_is_found_at_once() -> None:
    with pytest.raises(PeerError, match=r"nobody sends what these wait for: .*for rank 1"):
        averages(Network(3), Short, "int8")


def test_unequal_sizes_are_an_error_and_not_an_abort() -> None:
    network = Network(2)
    (first,), (second,) = network.channels(1)
    nothing = torch.zeros(0, dtype=torch.uint8)

    def job(rank: int, channel, out: int, into: int) -> Iterator:
        messages = [torch.zeros(size, dtype=torch.uint8) for size in (out, into)]
        send, receive = [nothing, messages[0]], [nothing, messages[1]]
        if rank:
            send, receive = send[::-1], receive[::-1]
        yield channel.post(send, receive, wire.Header(1, rank, 0, 0, 0))

    with pytest.raises(WireError, match="rank 0 sends 40 bytes to rank 1, which expects 48"):
        network.drive([job(0, first, 40, 24), job(1, second, 24, 48)])


# --- GradientSync --------------------------------------------------------------------------------------


def make_sync(group: InProcessGroup, spec: str, **options) -> GradientSync:
    infos = [
        ParameterInfo(name=f"p{index}", shape=shape, dtype=torch.float32, index=index)
        for index, shape in enumerate([(50, 40), (7,), (64, 64)])
    ]
    return GradientSync(infos, FixedPolicy(spec=Spec.parse(spec)), spec, group, SyncConfig(**options))


def train(group: InProcessGroup, spec: str, collective: str) -> tuple[list[torch.Tensor], int]:
    """Three steps of two buckets; the means of all."""
    sync, means = make_sync(group, spec, collective=collective), []
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + group.rank())
        flats = [torch.randn(numel, generator=generator) for numel in (64 * 64, 2007)]
        names = (["p2"], ["p0", "p1"])
        for future in sync.average_buckets(zip(flats, names, strict=True)):
            future.wait()
        means += flats
    sent = sync.stats().wire_bytes
    sync.close()
    return means, sent


@pytest.mark.parametrize(
    ("spec", "world_size"), [("int4+int4", 2), ("int8", 5), ("powersgd:2", 3), ("fp32", 16)]
)
@pytest.mark.parametrize("collective", ["direct", "two_phase"])
def test_the_real_sync_runs_on_it(spec: str, world_size: int, collective: str) -> None:
    """The bits are the same on all ranks and in every order of delivery."""
    usual = run_in_process(train, world_size, spec, collective)
    shuffled = run_in_process(train, world_size, spec, collective, network=Network(world_size, shuffle=1))
    for means, sent in [*usual, *shuffled]:
        assert sent > 0
        assert all(torch.equal(mean, first) for mean, first in zip(means, usual[0][0], strict=True))


def test_without_a_policy_torch_sums() -> None:
    def plain(group: InProcessGroup) -> torch.Tensor:
        sync = GradientSync([], None, "none", group, SyncConfig())
        flat = torch.full((5,), float(group.rank()))
        sync.average_buckets([(flat, [])])[0].wait()
        sync.close()
        return flat

    assert all(torch.equal(flat, torch.full((5,), 1.5)) for flat in run_in_process(plain, 4))


def test_ranks_that_disagree_are_told() -> None:
    def disagree(group: InProcessGroup) -> str:
        try:
            make_sync(group, "int8" if group.rank() else "int4")
        except MismatchError as error:
            return str(error)
        return "no error"

    for message in run_in_process(disagree, 3):
        assert "rank 1" in message
        assert "'int8'" in message


def test_a_rank_that_fails_ends_all_at_once() -> None:
    def fail(group: InProcessGroup) -> None:
        sync = make_sync(group, "int8")
        if group.rank() == 2:
            raise ZeroDivisionError("deliberate")
        sync.average_buckets([(torch.zeros(64 * 64), ["p2"])])[0].wait()

    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 2:.*ZeroDivisionError: deliberate") as caught:
        run_in_process(fail, 3, timeout=60)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert time.monotonic() - start < 30


def test_a_lost_message_reaches_every_rank_with_the_reason() -> None:
    def watch(group: InProcessGroup) -> str:
        sync = make_sync(group, "int8", collective="two_phase")
        try:
            for _ in range(3):
                sync.average_buckets([(torch.zeros(64 * 64), ["p2"])])[0].wait()
        except RuntimeError as error:
            return str(error)
        return "no error"

    messages = run_in_process(watch, 3, network=Network(3, fault=lose(Route(0, 1, 0, 1)), timeout=30))
    assert "rank 1: receiving from rank 0 failed in step 1" in messages[1]
    assert "lost" in messages[1]
    for rank in (0, 2):
        assert "no error" not in messages[rank]
        assert "rank 1" in messages[rank]


def test_ranks_in_different_operations_are_told() -> None:
    def differ(group: InProcessGroup) -> str:
        try:
            dist.barrier(group=group) if group.rank() == 0 else dist.all_reduce(torch.ones(1), group=group)
        except PeerError as error:
            return str(error)
        return "no error"

    assert run_in_process(differ, 2) == [
        "rank 0 is in barrier, and rank 1 in allreduce",
        "rank 1 is in allreduce, and rank 0 in barrier",
    ]
    with pytest.raises(RankError, match="barrier without rank 1, which has returned"):
        run_in_process(lambda group: dist.barrier(group=group) if group.rank() == 0 else None, 2)


def test_the_time_is_limited() -> None:
    def sleep(group: InProcessGroup) -> None:
        time.sleep(2 * group.rank())

    with pytest.raises(RankError, match=r"ranks \[1\] did not finish within 0.5 s"):
        run_in_process(sleep, 2, timeout=0.5)
