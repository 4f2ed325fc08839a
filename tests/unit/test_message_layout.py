"""MessageLayout: small exact parameters travel as one, and their bytes and means stay the same."""

from __future__ import annotations

import pytest
import torch

from gradq.codecs import from_spec
from gradq.collectives import Direct, Segment, Setting, Step, TwoPhase
from gradq.metrics import Metrics
from gradq.sync.feedback import Feedback

WORLD_SIZE = 3
CPU = torch.device("cpu")


class Bus:
    """A rank's channel; the test carries the messages."""

    def __init__(self):
        self.posted, self.sent = [], []

    def post(self, send, receive, header):
        for message in send:
            message[:16] = torch.frombuffer(bytearray(header.pack()), dtype=torch.uint8)
        self.posted.append((send, receive))
        self.sent.append([message.clone() for message in send])
        return self

    def wait(self):
        pass


def averages(kind, segments, dtype, sample):
    """All ranks' messages and means of two steps, driven in lockstep."""
    numel = segments[-1].start + segments[-1].numel
    ranks = []
    for rank in range(WORLD_SIZE):
        bus, store = Bus(), Feedback()
        setting = Setting(
            rank=rank,
            world_size=WORLD_SIZE,
            seed=5,
            channels=[bus, bus],
            feedback=store,
            metrics=Metrics(),
            device=CPU,
        )
        ranks.append((bus, store, kind(segments, dtype, setting)))
    means = []
    for step in range(2):
        flats = [
            torch.randn(numel, generator=torch.Generator().manual_seed(10 * step + rank)).to(dtype)
            for rank in range(WORLD_SIZE)
        ]
        flats[1][3] = float("nan")
        jobs = [
            r[2].average(flat, Step(step, 0, sample=sample)) for r, flat in zip(ranks, flats, strict=True)
        ]
        while [None for job in jobs if next(job, None) is not None]:
            posted = [bus.posted[-1] for bus, _, _ in ranks]
            for receiver, (_, receive) in enumerate(posted):
                for sender, (send, _) in enumerate(posted):
                    if sender != receiver:
                        receive[sender].copy_(send[receiver])
        for _, store, _ in ranks:
            store.finish(True)
        means.append(flats)
    return [bus.sent for bus, _, _ in ranks], means


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("kind", [Direct, TwoPhase])
@pytest.mark.parametrize(
    ("specs", "dtype"),
    [
        (["fp32"], torch.float32),
        (["bf16", "fp32", "fp16"], torch.float32),
        (["fp64"], torch.float64),
        (["int4(rounding=nearest)", "fp32", "fp32"], torch.float32),
    ],
)
def test_bytes_and_means_are_those_of_one_after_another(kind, specs, dtype):
    segments, start = [], 0
    for index, numel in enumerate([1, 7, 64, 3, 300, 1, 1, 2, 5000, 8, 31, 2, 0, 260, 5, 16]):
        codec = from_spec(specs[index % len(specs)])
        feedback = codec.element_bytes == 0
        segments.append(Segment(f"p{index}", start, numel, index, codec, codec, feedback, feedback))
        start += numel
    together, alone = (averages(kind, segments, dtype, sample) for sample in (False, True))
    for ours, theirs in zip(together[0], alone[0], strict=True):
        for some, other in zip(ours, theirs, strict=True):
            for one, two in zip(some, other, strict=True):
                assert torch.equal(one, two)
    for ours, theirs in zip(together[1], alone[1], strict=True):
        for one, two in zip(ours, theirs, strict=True):
            assert torch.equal(bits(one), bits(two))
            assert torch.equal(bits(one), bits(ours[0]))


def test_thousands_of_parameters_are_few_operations():
    codec = from_spec("fp32")
    segments = [Segment(f"p{i}", 5 * i, 5, i, codec, codec, False, False) for i in range(2000)]
    store = Feedback()
    for kind in (Direct, TwoPhase):
        setting = Setting(
            rank=0,
            world_size=WORLD_SIZE,
            seed=0,
            channels=[Bus(), Bus()],
            feedback=store,
            metrics=Metrics(),
            device=CPU,
        )
        collective = kind(segments, torch.float32, setting)
        flat = torch.randn(10_000)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in collective.average(flat, Step(0, 0)):
                pass
        assert sum(event.count for event in profile.key_averages()) < 200
