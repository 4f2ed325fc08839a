"""Sensitivity, mixed bits, sizes, QAT's parameter groups and schedule, refinements, presets."""

import copy

import pytest
import torch
from models import build
from torch import nn

from gradq import quant
from gradq.errors import CalibrationError, ConfigError
from gradq.quant.calibrate import weights
from gradq.quant.config import chosen_config, processor_notice
from gradq.quant.sensitivity import SensitivityReport, SensitivityRow


def ready(name="cnn", config=None):
    model, batches = build(name)
    qmodel = quant.prepare(model, batches[0], config or quant.Config())
    quant.calibrate(qmodel, batches, show_progress=False)
    return model, batches, qmodel


def report_of(costs):
    return SensitivityReport(
        [SensitivityRow(n, b, size, c) for (n, size), row in costs.items() for b, c in row.items()]
    )


@torch.no_grad()
def test_sensitivity_measures_and_leaves_the_model_as_it_was(tmp_path):
    _, batches, qmodel = ready()
    before, out = copy.deepcopy(qmodel.state_dict()), qmodel(batches[0])
    report = quant.sensitivity(qmodel, batches, widths=(2, 4, 8), show_progress=False)
    assert torch.equal(qmodel(batches[0]), out)
    for (key, a), b in zip(before.items(), qmodel.state_dict().values(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, key
    assert len(report.rows) == 3 * 7
    for name in report.names():
        assert report.cost(name, 8) < report.cost(name, 2)
    assert report.names()[0] in str(report)
    report.to_csv(tmp_path / "r.csv")
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 22
    report.plot(tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 5000
    with pytest.raises(ConfigError, match=r"no row for stem\.weight at 5 bits"):
        report.cost("stem.weight", 5)
    with pytest.raises(ConfigError, match="metric is 'l1'; legal: kl, mse"):
        quant.sensitivity(qmodel, batches, metric="l1")
    with pytest.raises(CalibrationError, match="no batch"):
        quant.sensitivity(qmodel, [], show_progress=False)


def test_greedy_spares_the_sensitive_layer():
    report = report_of(
        {
            ("a", 100): {2: 9.0, 4: 5.0, 8: 0.0},
            ("b", 100): {2: 0.1, 4: 0.01, 8: 0.0},
            ("c", 200): {2: 0.2, 4: 0.0, 8: 0.0},
        }
    )
    assert quant.choose_bits(report, average_bits=4.0) == {"a": 8, "b": 4, "c": 2}
    assert quant.choose_bits(report, average_bits=8) == {"a": 8, "b": 8, "c": 8}
    assert quant.choose_bits(report, max_cost=0.02) == {"a": 8, "b": 4, "c": 4}
    for kw in ({}, {"average_bits": 3, "max_cost": 1}, {"average_bits": 1.5}, {"max_cost": -1.0}):
        with pytest.raises(ConfigError):
            quant.choose_bits(report, **kw)


def test_greedy_holds_the_budget_and_uses_it():
    generator = torch.Generator().manual_seed(0)
    layers = {(f"l{i}", int(torch.randint(50, 5000, (1,), generator=generator))): {} for i in range(20)}
    for row in layers.values():
        cost = float(torch.rand(1, generator=generator))
        for bits in (2, 3, 4, 6, 8):
            row[bits] = cost * 4.0**-bits
    total = sum(size for _, size in layers)
    for budget in (2.0, 2.7, 3.0, 4.0, 5.5):
        chosen = quant.choose_bits(report_of(layers), average_bits=budget)
        used = sum(size * chosen[name] for name, size in layers) / total
        assert budget - 0.15 < used <= budget


@torch.no_grad()
def test_assign_bits_sets_widths_and_sizes():
    _, batches, qmodel = ready()
    report = quant.sensitivity(qmodel, batches, widths=(2, 3, 4, 8), show_progress=False)
    whole = quant.model_bytes(qmodel)
    chosen = quant.assign_bits(qmodel, report, average_bits=4)
    assert quant.average_bits(qmodel) <= 4
    assert {n: q.format.bits for n, (_, q) in weights(qmodel).items()} == chosen
    assert quant.model_bytes(qmodel) < 0.75 * whole
    fresh = ready()[2]
    fresh.load_state_dict(qmodel.state_dict())  # widths travel in the state
    assert quant.average_bits(fresh) == quant.average_bits(qmodel)
    assert torch.equal(fresh(batches[0]), qmodel(batches[0]))
    other = ready("mlp")[2]
    with pytest.raises(ConfigError, match="another model"):
        quant.assign_bits(other, report, average_bits=4)


def test_model_bytes_by_hand():
    _, _, qmodel = ready("mlp")
    weights = 12 * 24 + 24 * 24 + 24 * 4
    scales = (24 + 24 + 4) * 4
    biases = (24 + 24 + 4) * 4
    activations = 3 * 5
    assert quant.model_bytes(qmodel) == weights + scales + biases + activations
    _, _, tied = ready("gpt")
    codes = 11 * 16 + 16 * 48 + 16 * 16  # the tied table once; positions below
    scales = 4 * (11 + 48 + 16)
    others = 4 * (48 + 16) + 4 * 2 * 16 + 3 * 5  # biases, layer norm, activations
    positions = 8 * 16 + 4 * 8
    assert quant.model_bytes(tied) == codes + scales + others + positions


def test_param_groups_keep_decay_from_scales():
    _, _, qmodel = ready()
    groups = quant.param_groups(qmodel, lr=1e-3, weight_decay=0.1, scale_lr=1e-4)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0, 0.0]
    assert [g["lr"] for g in groups] == [1e-3, 1e-3, 1e-4]
    assert sum(len(g["params"]) for g in groups) == len(list(qmodel.parameters()))
    assert len(groups[2]["params"]) == sum(n.endswith("log2_scale") for n, _ in qmodel.named_parameters())
    with pytest.raises(ConfigError, match="lr is 0"):
        quant.param_groups(qmodel, lr=0)


def test_schedule_holds_learns_and_freezes():
    _, batches, qmodel = ready("mlp")
    schedule = quant.RangeSchedule(qmodel, learn_from=2, freeze_at=4)
    optimizer = torch.optim.Adam(quant.param_groups(qmodel, lr=1e-2))
    scale = qmodel.get_submodule("layers.0").weight_quant.log2_scale
    changed = []
    for _ in range(6):
        before = scale.detach().clone()
        qmodel(batches[0]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        changed.append(not torch.equal(before, scale.detach()))
    assert changed == [False, False, True, True, False, False]
    other = quant.RangeSchedule(qmodel, learn_from=2, freeze_at=4)
    other.load_state_dict(schedule.state_dict())
    assert other.is_frozen
    with pytest.raises(ConfigError, match="legal: 0 ≤ learn_from ≤ freeze_at"):
        quant.RangeSchedule(qmodel, learn_from=3, freeze_at=1)


@torch.no_grad()
def test_bias_correction_removes_the_shift_of_the_mean():
    model, batches, qmodel = ready("cnn", quant.Config(weights="int3"))
    target = torch.cat([model(b) for b in batches]).mean(0)
    before = (torch.cat([qmodel(b) for b in batches]).mean(0) - target).abs().max()
    quant.correct_bias(qmodel, batches, num_batches=None, show_progress=False)
    after = (torch.cat([qmodel(b) for b in batches]).mean(0) - target).abs().max()
    assert after < 0.1 * before


def test_weight_rounding_lowers_the_error_and_stays_on_the_grid():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    mix = torch.randn(16, 16)
    batches = [
        torch.randn(64, 16) @ mix for _ in range(4)
    ]  # correlated inputs: rounding to nearest is not best
    qmodel = quant.prepare(model, batches[0], quant.Config(weights="int3", activations=None))
    layer = qmodel.get_submodule("0")
    nearest = layer.weight_quant.quantize(layer.weight)
    with torch.no_grad():
        before = sum((qmodel(b) - model(b)).square().mean() for b in batches)
    quant.round_weights(qmodel, batches, steps=300, show_progress=False)
    with torch.no_grad():
        after = sum((qmodel(b) - model(b)).square().mean() for b in batches)
    codes = layer.weight_quant.quantize(layer.weight)
    assert after < 0.8 * before
    assert torch.equal(layer.weight_quant(layer.weight), layer.weight)
    assert (codes - nearest).abs().sum() > 0
    assert (codes - nearest).abs().max() == 1
    with pytest.raises(ConfigError, match="steps is 0"):
        quant.round_weights(qmodel, batches, steps=0)


class TestConfig:
    def test_targets(self):
        found = {t: quant.Config.for_target(t) for t in ("x86-vnni", "x86-avx2", "arm", "gpu", "edge-int4")}
        assert found["x86-avx2"].weight_format("a").bits == 7
        assert not found["x86-vnni"].activation_format().symmetric
        assert found["arm"].activation_format().symmetric
        edge = found["edge-int4"]
        assert str(edge.weight_format("a")) == "int4-sym-g32"
        assert str(edge.weight_format("a", convolution=True)) == "int4-sym-channel"
        assert edge.activation_format().range == "token"
        assert edge.activation_format(convolution=True).range == "static"
        assert quant.Config.for_target("auto") == found[quant.detect_target()]
        with pytest.raises(ConfigError, match="target is 'tpu'; legal: x86-vnni"):
            quant.Config.for_target("tpu")

    def test_who_gives_no_configuration_gets_weights_that_do_not_saturate(self):
        old, new = "flags : fpu avx2", "flags : fpu avx2 avx512f avx512_vnni"
        assert chosen_config(None, old).weight_format("a").bits == 7
        assert chosen_config(None, new) == quant.Config()
        assert chosen_config(quant.Config(), old) == quant.Config()  # what is given is taken as it is

    def test_weights_that_saturate_here_are_said_with_the_remedy(self):
        old, new = "flags : fpu avx2", "flags : fpu avx2 avx512f avx512_vnni"
        said = processor_notice(quant.Config(), old)
        assert "no VNNI" in said
        assert "Config.for_target('x86-avx2')" in said
        assert not processor_notice(quant.Config(), new)
        for quiet in (
            quant.Config.for_target("x86-avx2"), quant.Config.for_target("x86-vnni"),
            quant.Config(weights="int4"), quant.Config(activations=None), quant.Config(target="x86-vnni"),
        ):  # fmt: skip
            assert not processor_notice(quiet, old)
        with pytest.raises(ConfigError, match=r"Config\.target is 'tpu'"):
            quant.Config(target="tpu")

    @pytest.mark.parametrize(
        ("flags", "target"),
        [
            ("flags : fpu avx2 avx512f avx512_vnni", "x86-vnni"),
            ("flags : fpu avx2 avx_vnni", "x86-vnni"),
            ("flags : fpu avx2", "x86-avx2"),
            ("Features : fp asimd", "arm"),
        ],
    )
    def test_detection(self, flags, target):
        assert quant.detect_target(flags) == target

    def test_an_unknown_machine_is_an_error(self):
        with pytest.raises(ConfigError, match="pass one of x86-vnni"):
            quant.detect_target("flags : fpu")

    @pytest.mark.parametrize(
        ("field", "value", "match"),
        [
            ("observer", "best", r"Config\.observer is 'best'; legal: average"),
            ("placement", "some", "legal: auto, full, matmul"),
            ("batch_norm", "keep", "legal: fold, train"),
            ("weights", "int1", "bits is 1"),
            ("skip", "head", "give a tuple of patterns"),
            ("overrides", ("a",), "pair"),
            ("activations", "nf4", "activations are uniform"),
        ],
    )
    def test_bad_values(self, field, value, match):
        with pytest.raises(ConfigError, match=match):
            quant.Config(**{field: value})
