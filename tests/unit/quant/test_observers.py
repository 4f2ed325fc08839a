"""Observers: what each rule says, histograms that nest, agreement over ranks, and calibration."""

import math

import pytest
import torch
import torch.distributed as dist
from models import build
from torch import nn

from gradq import quant
from gradq.errors import CalibrationError, ConfigError, NonFiniteError
from gradq.quant.calibrate import quantizers
from gradq.quant.formats import parse_format
from gradq.quant.observers import OBSERVERS, affine, make_observer
from gradq.testing import run_ranks

ACT = parse_format("int8", "activations")
ACT4 = parse_format("int4", "activations")
SYM4 = parse_format("int4", "weights")


def nmse(x, scale, zero_point, fmt):
    code = ((x / scale).round() + zero_point).clamp(fmt.qmin, fmt.qmax)
    return float((((code - zero_point) * scale - x) ** 2).sum() / (x**2).sum())


@pytest.mark.parametrize("kind", OBSERVERS)
@pytest.mark.parametrize("fmt", [ACT, ACT4, parse_format("int8-sym", "activations")], ids=str)
class TestEveryObserver:
    def test_covers_usual_data_well(self, kind, fmt):
        x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
        observer = make_observer(kind, fmt)
        for part in x.split(4000):
            observer.update(part)
        limit = {8: 3e-3, 4: 0.06}[fmt.bits]
        assert nmse(x, *observer.range(), fmt) < limit

    def test_zero_is_a_code(self, kind, fmt):
        for x in (torch.rand(1000) + 5, -torch.rand(1000) - 5, torch.zeros(10), torch.full((10,), 1e-30)):
            observer = make_observer(kind, fmt)
            observer.update(x)
            scale, zero_point = observer.range()
            assert float(scale) > 0
            assert math.isfinite(float(scale))
            assert fmt.qmin <= int(zero_point) <= fmt.qmax

    def test_order_of_batches_of_different_size_does_not_matter(self, kind, fmt):
        if kind == "average":
            pytest.skip("a moving average depends on the order")
        small, large, zeros = torch.randn(500) * 0.01, torch.randn(500) * 37, torch.zeros(50)
        ranges = []
        for order in ((small, large, zeros), (zeros, large, small), (torch.cat([large, zeros, small]),)):
            observer = make_observer(kind, fmt)
            for x in order:
                observer.update(x)
            ranges.append(observer.range())
        for scale, zero_point in ranges[1:]:
            assert torch.allclose(scale, ranges[0][0])
            assert torch.equal(zero_point, ranges[0][1])

    def test_errors(self, kind, fmt):
        observer = make_observer(kind, fmt, name="layer1.out")
        with pytest.raises(CalibrationError, match=r"layer1\.out saw no values"):
            observer.range()
        for bad in (math.nan, math.inf):
            with pytest.raises(NonFiniteError, match=r"layer1\.out holds NaN or Inf"):
                observer.update(torch.tensor([1.0, bad]))
        observer.update(torch.ones(0))
        assert observer.batches == 0


def test_rules_differ_as_they_should():
    """One outlier in 10 000: minmax keeps it, the others give it up, mse has the smallest error at 4 bits."""
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    x[0] = 60.0
    found = {}
    for kind in OBSERVERS:
        observer = make_observer(kind, ACT4)
        observer.update(x)
        found[kind] = observer.range()
    highs = {k: float((15 - z) * s) for k, (s, z) in found.items()}
    assert highs["minmax"] == pytest.approx(60, rel=0.1)
    assert highs["percentile"] < 6
    assert highs["entropy"] < 30
    errors = {k: nmse(x[1:], s, z, ACT4) for k, (s, z) in found.items()}
    assert errors["mse"] < errors["minmax"]
    assert nmse(x, *found["mse"], ACT4) == min(nmse(x, *r, ACT4) for r in found.values())


def test_entropy_survives_discrete_values_and_relu():
    """Pixels of 17 levels, and a spike of exact zeros: both broke naive histograms."""
    g = torch.Generator().manual_seed(0)
    for x, limit in (
        (torch.randint(0, 17, (20_000,), generator=g) / 16.0, 1e-4),
        (torch.randn(50_000, generator=g).relu(), 1e-3),
    ):
        observer = make_observer("entropy", ACT)
        observer.update(x)
        assert nmse(x, *observer.range(), ACT) < limit


def test_average_moves_slowly():
    observer = make_observer("average", ACT)
    observer.update(torch.tensor([-1.0, 1.0]))
    observer.update(torch.tensor([-1.0, 11.0]))
    assert float(observer.high_C) == pytest.approx(2.0)
    with pytest.raises(ConfigError, match="momentum is 0"):
        OBSERVERS["average"](ACT, momentum=0)
    with pytest.raises(ConfigError, match="percentile is 101"):
        OBSERVERS["percentile"](ACT, percentile=101)
    with pytest.raises(ConfigError, match="observer is 'best'; legal: average"):
        make_observer("best", ACT)


@pytest.mark.parametrize("kind", OBSERVERS)
def test_channels_get_their_own_ranges(kind):
    x = (
        torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 100.0, 0.01])[:, None]
    )
    observer = make_observer(kind, SYM4, 3)
    observer.update(x)
    scale, zero_point = observer.range()
    assert scale.shape == (3,)
    assert not zero_point.any()
    for row, s in zip(x, scale, strict=True):
        assert nmse(row, s, 0, SYM4) < 0.08


def test_affine_ranges():
    scale, zero_point = affine(torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([3.0, 0.0, 4.0]), ACT)
    assert zero_point.tolist() == [64, 0, 0]
    assert scale.tolist() == pytest.approx([4 / 255, 1.0, 4 / 255])
    scale, _ = affine(torch.tensor([-8.0]), torch.tensor([7.0]), SYM4)
    assert float(scale) == 1.0


# --- calibration -------------------------------------------------------------------------------------------


def test_calibration_errors_name_what_is_missing():
    model, batches = build("mlp")
    qmodel = quant.prepare(model, batches[0])
    with pytest.raises(CalibrationError, match="yielded no batch"):
        quant.calibrate(qmodel, [], show_progress=False)
    with pytest.raises(NonFiniteError, match="x holds NaN"):
        quant.calibrate(qmodel, [batches[0] * math.nan], show_progress=False)
    with pytest.raises(CalibrationError, match="has no range yet"):
        qmodel(batches[0])
    with pytest.raises(CalibrationError, match="MLP has no quantizers"):
        quant.calibrate(model, batches)
    with pytest.raises(ConfigError, match="num_batches is 0"):
        quant.calibrate(qmodel, batches, num_batches=0, show_progress=False)
    with pytest.raises(ConfigError, match="a batch is a str"):
        quant.calibrate(qmodel, ["x"], show_progress=False)


def test_any_iterable_of_batches():
    model, batches = build("mlp")
    scales = []
    for loader, to_inputs in (
        (batches, None),
        (iter(batches), None),
        ([(b, torch.zeros(6)) for b in batches], None),
        ([[b, 1] for b in batches], None),
        ([{"x": b, "label": 1} for b in batches], None),
        ([{"image": b} for b in batches], lambda batch: batch["image"]),
        (torch.utils.data.DataLoader(torch.cat(batches), batch_size=6), None),
    ):
        qmodel = quant.prepare(model, batches[0])
        quant.calibrate(qmodel, loader, to_inputs=to_inputs, show_progress=False)
        scales.append([float(q.scale.detach()) for q in quantizers(qmodel).values()])
    assert all(s == scales[0] for s in scales)


def test_progress_bar(capsys):
    model, batches = build("mlp")
    quant.calibrate(quant.prepare(model, batches[0]), batches)
    err = capsys.readouterr().err
    assert "calibrating" in err
    assert "3/3" in err


def test_calibration_restores_modes_and_leaves_statistics():
    model, batches = build("cnn")
    qmodel = quant.prepare(model.train(), batches[0], quant.Config(batch_norm="train"))
    before = qmodel.stem.bn.running_mean.clone()
    quant.calibrate(qmodel, batches, show_progress=False)
    assert qmodel.training
    assert qmodel.stem.bn.training
    assert torch.equal(qmodel.stem.bn.running_mean, before)


def calibrate_and_train(rank, kind):
    """What a rank ends up with: (ranges, weights after three steps under DDP), or its error."""
    torch.set_num_threads(1)
    world = dist.get_world_size()
    model, _ = build("cnn")
    data = torch.randn(12, 4, 1, 12, 12, generator=torch.Generator().manual_seed(5))
    share = list(data[rank::world]) if rank or kind != "uneven" else list(data[:1])
    qmodel = quant.prepare(
        model, data[0], quant.Config(observer="mse" if kind in ("uneven", "fails") else kind)
    )
    if kind == "fails" and rank == 1:
        share[1] = share[1] * math.nan
    try:
        quant.calibrate(qmodel, share, show_progress=False)
    except (NonFiniteError, CalibrationError) as error:
        return f"{type(error).__name__}: {error}"
    ranges = {k: (float(q.log2_scale.detach()), int(q.zero_point)) for k, q in quantizers(qmodel).items()}
    ddp = nn.parallel.DistributedDataParallel(qmodel.train())
    optimizer = torch.optim.Adam(quant.param_groups(ddp, lr=1e-3))
    for step in range(3):
        ddp(share[step % len(share)]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return ranges, [float(p.detach().double().sum()) for p in qmodel.parameters()]


@pytest.mark.parametrize("kind", ["entropy", "average", "uneven"])
def test_ranks_agree_bit_for_bit_and_stay_equal_under_ddp(kind):
    first, second = run_ranks(calibrate_and_train, 2, kind)
    assert first == second
    if kind == "entropy":  # merged statistics are those of all data seen by one process
        model, _ = build("cnn")
        data = torch.randn(12, 4, 1, 12, 12, generator=torch.Generator().manual_seed(5))
        alone = quant.prepare(model, data[0], quant.Config(observer=kind))
        quant.calibrate(alone, list(data), show_progress=False)
        expected = {
            k: (float(q.log2_scale.detach()), int(q.zero_point)) for k, q in quantizers(alone).items()
        }
        assert first[0] == expected


def test_a_failure_on_one_rank_is_an_error_on_every_rank():
    first, second = run_ranks(calibrate_and_train, 2, "fails")
    assert "CalibrationError: calibration failed on rank 1" in first
    assert "NonFiniteError" in second
