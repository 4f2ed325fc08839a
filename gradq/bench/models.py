"""Models for benchmarks, and the task each one learns. B batch, T time, C channels."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradq.bench.data import Dataset, load_dataset
from gradq.bench.scenario import Scenario
from gradq.errors import ConfigError

__all__ = ["GPT", "MODELS", "Task", "check_model", "digits_cnn", "load_function", "load_task", "mlp"]


class GPT(nn.Module):
    """A decoder-only transformer over bytes, of torch's own layers."""

    def __init__(self, width: int, num_layers: int, num_heads: int, seq_len: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(seq_len, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                num_heads,
                4 * width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(num_layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for layer in (self.tokens, self.positions, self.head):
            nn.init.normal_(layer.weight, std=0.02)
        self.register_buffer(
            "mask", nn.Transformer.generate_square_subsequent_mask(seq_len), persistent=False
        )

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, 256] of the next byte."""
        length = tokens_BT.shape[1]
        assert isinstance(self.mask, Tensor)
        x_BTC = self.tokens(tokens_BT) + self.positions.weight[:length]
        for block in self.blocks:
            x_BTC = block(x_BTC, src_mask=self.mask[:length, :length], is_causal=True)
        logits: Tensor = self.head(self.norm(x_BTC))
        return logits


def mlp(width: int = 2048, depth: int = 6) -> nn.Module:
    """Square layers without bias: 25.2 M parameters, little computing for each."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width, bias=False), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")  # type: ignore[arg-type]
    return nn.Sequential(*layers[:-1])


def digits_cnn() -> nn.Module:
    """A small CNN for images [B, 1, 8, 8], 10 classes, 0.1 M parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 16, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


@dataclass(frozen=True)
class _BuiltIn:
    build: Callable[[int], nn.Module]  # of seq_len
    data: str
    optimizer: str
    lr: float


def _gpt(width: int, num_layers: int, num_heads: int) -> _BuiltIn:
    return _BuiltIn(lambda seq_len: GPT(width, num_layers, num_heads, seq_len), "text", "adamw", 1e-3)


MODELS = {
    "gpt-tiny": _gpt(32, 2, 2),
    "gpt-1m": _gpt(128, 5, 4),
    "gpt-5m": _gpt(256, 6, 4),
    "gpt-10m": _gpt(384, 6, 6),
    "mlp-25m": _BuiltIn(lambda _: mlp(), "prototypes", "sgd", 0.02),
    "mlp-tiny": _BuiltIn(lambda _: mlp(64, 3), "prototypes", "sgd", 0.02),
    "digits-cnn": _BuiltIn(lambda _: digits_cnn(), "digits", "adamw", 2e-3),
}


@dataclass(frozen=True)
class Task:
    """What is learned: a model, its data and its loss.

    Attributes:
        build: a model from a seed; the same seed gives the same weights.
        dataset: the data that the model is trained on; see `Dataset`.
        optimizer: "sgd" or "adamw".
        lr: learning rate.
    """

    build: Callable[[int], nn.Module]
    dataset: Dataset
    optimizer: str
    lr: float

    @staticmethod
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of outputs [..., classes] against targets [...], in nats."""
        return functional.cross_entropy(outputs.float().flatten(0, -2), targets.flatten())


def load_function(spec: str) -> Callable[..., object]:
    """The function that "path.py:function" names.

    Raises:
        ConfigError: no such file or function, or the file cannot be imported.
    """
    where, _, name = spec.rpartition(":")
    path = Path(where)
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(f"{spec!r}: there is no file {where or spec}; write path.py:function")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickles look there
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{path} has no function {name!r}")
    found: Callable[..., object] = function
    return found


def check_model(name: str) -> None:
    """Refuse a name that stands for no model, before any rank is started.

    Raises:
        ConfigError: it is not built in and names no file.
    """
    where = name.rpartition(":")[0]
    if ".py:" in name and not Path(where).is_file():
        raise ConfigError(f"model={name!r}: there is no file {where}")
    if ".py:" not in name and name not in MODELS:
        raise ConfigError(
            f"model={name!r}: choose from {', '.join(MODELS)}, or name your own as path.py:function"
        )


def load_task(scenario: Scenario) -> Task:
    """The task of a scenario.

    A user's function is called without arguments after torch.manual_seed and returns an nn.Module whose
    outputs are logits [..., classes].

    Raises:
        ConfigError: the model or its data is not there.
    """
    if scenario.model in MODELS:
        builtin = MODELS[scenario.model]
        data, optimizer, lr = builtin.data, builtin.optimizer, builtin.lr

        def make() -> nn.Module:
            return builtin.build(scenario.seq_len)
    else:
        check_model(scenario.model)
        function = load_function(scenario.model)

        def make() -> nn.Module:
            module = function()
            if not isinstance(module, nn.Module):
                raise ConfigError(f"{scenario.model} returned {type(module).__name__}, not an nn.Module")
            return module

        with torch.device("meta"):
            embeds = any(isinstance(module, nn.Embedding) for module in make().modules())
        data, optimizer, lr = "text" if embeds else "", "adamw", 1e-3
    if scenario.data != "auto":
        data = scenario.data
    if not data:
        raise ConfigError(
            f"{scenario.model} has no embedding, so it does not read text: say what it reads with --data"
        )
    with torch.device("meta"):
        width = next((m.in_features for m in make().modules() if isinstance(m, nn.Linear)), 0)

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return make()

    dataset = load_dataset(data, seq_len=scenario.seq_len, width=width)
    if scenario.optimizer != "auto":
        optimizer = scenario.optimizer
    return Task(build, dataset, optimizer, lr if scenario.lr is None else scenario.lr)
