"""The models of benchmarks/int8.py: large ones for size and latency, small ones trained on digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import qat_digits as digits
import torch
from torch import Tensor, nn

KINDS = ("cnn", "mobile", "transformer", "mlp")


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1, added to the (projected) input."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        project = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.down = nn.Identity() if same else nn.Sequential(*project)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, 4·width, …)."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + self.down(x))


class ResNet(nn.Module):
    """ResNet-50's layout: 25.6 M parameters at width 64."""

    def __init__(self, width: int = 64, counts: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, 1)
        layers: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(counts):
            for i in range(count):
                layers.append(Bottleneck(inputs, width << stage, 2 if i == 0 and stage > 0 else 1))
                inputs = 4 * width << stage
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to logits."""
        x = self.layers(self.pool(torch.relu(self.bn(self.stem(x)))))
        return self.head(x.mean((2, 3)))


class Inverted(nn.Module):
    """MobileNetV2's block: 1×1 wider, 3×3 depthwise, 1×1 narrower, ReLU6."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int):
        super().__init__()
        hidden = inputs * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden),
            nn.ReLU6(), nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        ]  # fmt: skip
        self.body, self.same = nn.Sequential(*layers), stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, …)."""
        y = self.body(x)
        return x + y if self.same else y


class MobileNet(nn.Module):
    """MobileNetV2's layout: 3.5 M parameters at width 1.

    Args:
        stages: (expansion, channels, blocks, stride) of each stage.
        stem: channels and stride of the first convolution.
        last: channels of the last one.
        inputs: image channels.
        classes: outputs.
    """

    def __init__(
        self,
        stages: tuple[tuple[int, int, int, int], ...] = (
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
            (6, 320, 1, 1),
        ),
        stem: tuple[int, int] = (32, 2),
        last: int = 1280,
        inputs: int = 3,
        classes: int = 1000,
    ):  # fmt: skip
        super().__init__()
        width = stem[0]
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, width, 3, stem[1], 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6()
        ]  # fmt: skip
        for expand, channels, blocks, stride in stages:
            for i in range(blocks):
                layers.append(Inverted(width, channels, stride if i == 0 else 1, expand))
                width = channels
        layers += [nn.Conv2d(width, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6()]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to logits."""
        return self.head(self.features(x).mean((2, 3)))


class Transformer(nn.Module):
    """A classifier over tokens: torch's own encoder layers, GELU, pre-norm."""

    def __init__(self, width: int = 512, layers: int = 8, tokens: int = 128, vocabulary: int = 8192):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        layer = nn.TransformerEncoderLayer(
            width, max(2, width // 64), 4 * width, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        for parameter in self.encoder.parameters():
            if parameter.ndim > 1:  # torch starts all layers equal; equal weights would be stored once
                nn.init.xavier_uniform_(parameter)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) ids to logits."""
        return self.head(self.norm(self.encoder(self.embed(ids) + self.positions)).mean(1))


def mlp(width: int = 1920, inputs: int = 784, classes: int = 1000, hidden: int = 4) -> nn.Sequential:
    """Linear layers and ReLU: 14.5 M parameters at width 1920."""
    layers: list[nn.Module] = [nn.Linear(inputs, width), nn.ReLU()]
    for _ in range(hidden - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


@torch.no_grad()
def large(kind: str, smoke: bool) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """A model in evaluation and a function batch size → random input.

    Weights are random: speed does not depend on them. Batch norm gets statistics of some batches.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    size = 32 if smoke else 224

    def images(batch: int) -> Tensor:
        return torch.randn(batch, 3, size, size, generator=generator)

    def rows(batch: int) -> Tensor:
        return torch.randn(batch, 784, generator=generator)

    tokens = 16 if smoke else 128

    def ids(batch: int) -> Tensor:
        return torch.randint(0, 256 if smoke else 8192, (batch, tokens), generator=generator)

    if kind == "cnn":
        model: nn.Module = ResNet(8, (1, 1, 1, 1), 10) if smoke else ResNet()
        inputs = images
    elif kind == "mobile":
        model = MobileNet(((1, 8, 1, 1), (6, 16, 2, 2)), (8, 2), 32) if smoke else MobileNet()
        inputs = images
    elif kind == "transformer":
        model, inputs = (Transformer(32, 2, tokens, 256) if smoke else Transformer()), ids
    else:
        model, inputs = (mlp(64) if smoke else mlp()), rows
    if kind in ("cnn", "mobile"):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        model.train()
        for _ in range(2):
            model(inputs(4))
    return model.eval(), inputs


def trained(kind: str, seed: int, smoke: bool) -> tuple[nn.Module, list[Tensor], Tensor, Tensor]:
    """A small model of a kind trained on digits; calibration batches; held-out images and labels."""
    images, labels, test, answers = digits.load_digits()
    torch.manual_seed(seed)
    if kind == "cnn":
        model: nn.Module = digits.CNN()
    elif kind == "mobile":
        model = MobileNet(((1, 16, 1, 1), (4, 24, 2, 2), (4, 32, 2, 1)), (16, 1), 96, 1, 10)
    elif kind == "transformer":
        model = digits.ViT()
    else:
        model = nn.Sequential(nn.Flatten(), *mlp(128, 64, 10, 3))
    epochs = 1 if smoke else 20
    digits.fit(model, images, labels, epochs=epochs, lr=2e-3, seed=seed)
    return model.eval(), list(images[:256].split(32)), test, answers


def plot(rows: list[Any], path: Path) -> None:
    """How much smaller and how much faster, one panel a batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    batches = sorted({r.batch for r in rows})
    figure, axes = plt.subplots(1, len(batches), figsize=(6 * len(batches), 4.5), squeeze=False)
    marks = dict(zip(dict.fromkeys(r.model for r in rows), "osD^", strict=False))
    colours = {name: f"C{i % 10}" for i, name in enumerate(dict.fromkeys(r.contender for r in rows))}
    for axis, batch in zip(axes[0], batches, strict=True):
        for r in (r for r in rows if r.batch == batch and r.contender != "fp32"):
            spread = [[r.faster - r.faster_low], [r.faster_high - r.faster]]
            axis.errorbar(
                r.smaller, r.faster, yerr=spread, fmt=marks[r.model], color=colours[r.contender],
                label=f"{r.model}: {r.contender}", markersize=7, capsize=2,
            )  # fmt: skip
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xlabel="times smaller than fp32", ylabel="times faster than fp32", title=f"batch {batch}")
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
