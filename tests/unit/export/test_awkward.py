"""Models as people write them: prepared, written and verified, or refused with a remedy that works."""

import dataclasses

import pytest
import torch
from torch import nn

from gradq import export, quant
from gradq.errors import TraceError, UnsupportedError

pytest.importorskip("onnxruntime")


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    hidden: torch.Tensor


class Opaque:
    def __init__(self, logits):
        self.logits = logits


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 4)


class Dataclass(Base):
    def forward(self, x):
        h = self.first(x).relu()
        return Result(self.head(h), h)


class ManyKeywords(Base):
    def forward(self, *, x, scale=2.0, **more):
        return self.head((self.first(x) * scale).relu())


class LastIsADict(Base):
    def forward(self, batch):
        return [self.head(self.first(batch["in"]["x"]).relu()), {"n": batch["in"]["x"]}]


class Bag(Base):
    def __init__(self, mode):
        super().__init__()
        self.words = nn.EmbeddingBag(20, 8, mode=mode)

    def forward(self, ids):
        return self.head(self.first(self.words(ids)).relu())


CASES = {
    "a dataclass out": (Dataclass, (torch.randn(4, 8),)),
    "keywords that nothing reads": (ManyKeywords, {"x": torch.randn(4, 8)}),
    "a dict as the last input, with a name in it": (
        LastIsADict, ({"in": {"x": torch.randn(4, 8)}, "name": 3},),
    ),
    "a bag of rows, summed": (lambda: Bag("sum"), (torch.randint(0, 20, (4, 6)),)),
    "a bag of rows, mean": (lambda: Bag("mean"), (torch.randint(0, 20, (4, 6)),)),
    "a bag of rows, largest": (lambda: Bag("max"), (torch.randint(0, 20, (4, 6)),)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_from_prepare_to_a_verified_file(case, tmp_path):
    torch.manual_seed(0)
    make, x = CASES[case]
    model = make().eval()
    q = quant.prepare(model, x)
    quant.calibrate(q, [x], to_inputs=lambda batch: batch, show_progress=False)
    report = export.onnx(q, tmp_path / "model.onnx")
    assert report.float_islands == []
    seen = export.verify(tmp_path / "model.onnx", q, [x], batch_sizes=(), show_progress=False)
    assert seen.fidelity.sqnr_db > 25
    if isinstance(model, Bag):
        back = quant.restore(q)
        assert type(back.words) is nn.EmbeddingBag
        assert torch.equal(back(*x), model(*x))


@torch.no_grad()
def test_parameters_without_values_are_refused_by_name_and_the_remedy_works():
    x = torch.randn(4, 8)
    lazy = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 4))
    for call in (lambda m: quant.prepare(m, x), quant.swap):
        with pytest.raises(UnsupportedError, match=r"0\.weight belongs to a lazy module.*run the model"):
            call(lazy)
    lazy(x)
    quant.prepare(lazy.eval(), x)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    for call in (lambda m: quant.prepare(m, x), quant.swap):
        with pytest.raises(UnsupportedError, match=r"parameter 0\.weight is on the meta device.*to_empty"):
            call(empty)
    full = empty.to_empty(device="cpu")
    full.load_state_dict({key: torch.randn_like(value) for key, value in full.state_dict().items()})
    quant.prepare(full.eval(), x)


def test_autocast_inside_forward_is_refused_with_the_line_and_swap_works():
    class Model(Base):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                y = self.first(x)
            return self.head(y.float().relu())

    model, x = Model().eval(), torch.randn(4, 8)
    with pytest.raises(TraceError, match=r"torch\.autocast.*take it out of forward"):
        quant.prepare(model, x)
    swapped = quant.swap(model)
    quant.calibrate(swapped, [x], show_progress=False)
    with torch.no_grad():
        assert swapped(x).shape == (4, 4)


def test_outputs_in_an_object_that_torch_does_not_know_are_compared_too():
    class Random(Base):
        """Its graph computes something else: a number that forward draws from outside of torch."""

        calls = 0

        def forward(self, x):
            Random.calls += 1
            return Opaque(self.head(self.first(x)) * Random.calls)

    with pytest.raises(TraceError, match=r"keeps state|does not compute"):
        quant.prepare(Random().eval(), torch.randn(4, 8))


def test_what_torch_export_says_of_a_branch_stays_off_the_terminal(capfd):
    class Model(Base):
        def forward(self, x):
            y = self.first(x)
            if y.sum() > 0:
                y = y * 2
            return self.head(y)

    with pytest.raises(TraceError, match=r"if y\.sum\(\) > 0"):
        quant.prepare(Model().eval(), torch.randn(4, 8))
    out = capfd.readouterr()
    assert not out.out
    assert not out.err
