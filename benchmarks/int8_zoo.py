"""The models of benchmarks/int8_architectures.py: what people bring, small, with random weights.

Speed does not depend on the weights, and how far INT8 is from fp32 hardly does. Batch norm gets the
statistics of some batches, so that activations have the scale they have in a trained network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from int8_models import MobileNet, ResNet, Transformer
from torch import Tensor, nn
from torch.nn import functional

Inputs = Callable[[int], tuple[Tensor, ...]]


def conv_norm(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution without bias, and batch norm."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Squeeze(nn.Module):
    """Squeeze and excitation: channels weighted by what the whole image holds."""

    def __init__(self, width: int, inner: int, gate: nn.Module):
        super().__init__()
        self.down, self.up, self.gate = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        y = torch.relu(self.down(functional.adaptive_avg_pool2d(x, 1)))
        return x * self.gate(self.up(y))


class Gated(nn.Module):
    """The block of MobileNetV3 and EfficientNet: wider, depthwise, squeezed, narrower."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        size: int,
        expand: int,
        act: type[nn.Module],
        gate: type[nn.Module],
    ):
        super().__init__()
        hidden = inputs * expand
        self.body = nn.Sequential(
            *conv_norm(inputs, hidden, 1), act(), *conv_norm(hidden, hidden, size, stride, hidden), act(),
            Squeeze(hidden, max(8, hidden // 4), gate()), *conv_norm(hidden, outputs, 1),
        )  # fmt: skip
        self.same = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, …)."""
        y = self.body(x)
        return x + y if self.same else y


class GatedNet(nn.Module):
    """MobileNetV3 with Hardswish, EfficientNet with SiLU."""

    def __init__(self, act: type[nn.Module], gate: type[nn.Module]):
        super().__init__()
        layers: list[nn.Module] = [*conv_norm(3, 16, 3, 2), act()]
        width = 16
        for outputs, blocks, stride, size in ((24, 2, 2, 3), (40, 3, 2, 5), (80, 3, 2, 3), (112, 2, 1, 5)):
            for i in range(blocks):
                layers.append(Gated(width, outputs, stride if i == 0 else 1, size, 4, act, gate))
                width = outputs
        self.features = nn.Sequential(*layers, *conv_norm(width, 480, 1), act())
        self.head = nn.Linear(480, 100)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to logits."""
        return self.head(self.features(x).mean((2, 3)))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7×7, layer norm over channels, two linear layers with GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(0.1 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(functional.gelu(self.wide(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Three stages."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256), blocks: tuple[int, ...] = (2, 2, 3)):
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width, count in zip(widths, blocks, strict=True):
            size = 4 if before == 3 else 2
            layers.append(nn.Conv2d(before, width, size, size))
            layers += [ConvNeXtBlock(width) for _ in range(count)]
            before = width
        self.features, self.norm, self.head = (
            nn.Sequential(*layers),
            nn.LayerNorm(before),
            nn.Linear(before, 100),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to logits."""
        return self.head(self.norm(self.features(x).mean((2, 3))))


class UNet(nn.Module):
    """Two levels; enlargement by bilinear interpolation or by transposed convolutions."""

    def __init__(self, width: int = 32, transposed: bool = False):
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                *conv_norm(inputs, outputs, 3), nn.ReLU(), *conv_norm(outputs, outputs, 3), nn.ReLU()
            )

        def up(inputs: int, outputs: int) -> nn.Module:
            if transposed:
                return nn.ConvTranspose2d(inputs, outputs, 2, 2)
            larger = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            return nn.Sequential(nn.Conv2d(inputs, outputs, 1), larger)

        self.one, self.two, self.middle = (
            block(3, width),
            block(width, 2 * width),
            block(2 * width, 4 * width),
        )
        self.up2, self.up1 = up(4 * width, 2 * width), up(2 * width, width)
        self.back2, self.back1 = block(4 * width, 2 * width), block(2 * width, width)
        self.pool, self.out = nn.MaxPool2d(2), nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 4, H, W)."""
        a = self.one(x)
        b = self.two(self.pool(a))
        y = self.back2(torch.cat([self.up2(self.middle(self.pool(b))), b], 1))
        return self.out(self.back1(torch.cat([self.up1(y), a], 1)))


class Attention(nn.Module):
    """Causal or full attention; with `rotary` as in Llama, keys and values shared by pairs of heads."""

    def __init__(self, width: int, heads: int, *, causal: bool, rotary: bool = False, bias: bool = True):
        super().__init__()
        self.heads, self.causal, self.rotary = heads, causal, rotary
        self.shared = 2 if rotary else 1
        self.size = width // heads
        self.query = nn.Linear(width, width, bias=bias)
        self.key, self.value = (nn.Linear(width, width // self.shared, bias=bias) for _ in range(2))
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        """(B, T, W) to the same shape."""
        q, k, v = (
            layer(x).view(x.shape[0], x.shape[1], -1, self.size).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        if angles is not None:
            q, k = turn(q, angles), turn(k, angles)
        if self.shared > 1:
            k, v = (t.repeat_interleave(self.shared, 1) for t in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(x.shape))


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions."""
    a, b = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()


class GPTBlock(nn.Module):
    """Pre-norm, GELU by tanh; not causal in ViT."""

    def __init__(self, width: int, causal: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, width // 64, causal=causal)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, W) to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.narrow(functional.gelu(self.wide(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2's layout, with the embedding as its head."""

    def __init__(self, width: int = 256, layers: int = 4, tokens: int = 64, vocabulary: int = 2048):
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*[GPTBlock(width, causal=True) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) ids to (B, T, vocabulary)."""
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


class ViT(nn.Module):
    """Patches of 16 pixels and a class token."""

    def __init__(self, width: int = 256, layers: int = 4, size: int = 128):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (size // 16) ** 2, width))
        self.blocks = nn.Sequential(*[GPTBlock(width, causal=False) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 100)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to logits."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class LlamaBlock(nn.Module):
    """RMS norm, rotary attention with shared keys, and a gated feed-forward part."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, width // 32, causal=True, rotary=True, bias=False)
        inner = 8 * width // 3 // 32 * 32
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """(B, T, W) to the same shape."""
        x = x + self.attention(self.norm1(x), angles)
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """Llama's layout."""

    def __init__(self, width: int = 256, layers: int = 4, tokens: int = 64, vocabulary: int = 2048):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([LlamaBlock(width) for _ in range(layers)])
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        rates = 10000.0 ** (-torch.arange(0, 32, 2) / 32)
        self.register_buffer("angles", (torch.arange(tokens)[:, None] * rates).repeat(1, 2))

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) ids to (B, T, vocabulary)."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.angles[: ids.shape[1]])
        return self.head(self.norm(x))


class DenseNet(nn.Module):
    """Every layer reads all before it: norm, ReLU, 1×1, norm, ReLU, 3×3, concatenation."""

    def __init__(self, growth: int = 24, blocks: tuple[int, ...] = (4, 6, 6)):
        super().__init__()
        width = 2 * growth
        layers: list[nn.Module] = [*conv_norm(3, width, 5, 2), nn.ReLU(), nn.MaxPool2d(2)]
        for i, count in enumerate(blocks):
            for _ in range(count):
                layers.append(DenseLayer(width, growth))
                width += growth
            if i + 1 < len(blocks):
                half = nn.Conv2d(width, width // 2, 1, bias=False)
                layers += [nn.BatchNorm2d(width), nn.ReLU(), half, nn.AvgPool2d(2)]
                width //= 2
        self.features, self.norm, self.head = (
            nn.Sequential(*layers),
            nn.BatchNorm2d(width),
            nn.Linear(width, 100),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to logits."""
        return self.head(torch.relu(self.norm(self.features(x))).mean((2, 3)))


class DenseLayer(nn.Module):
    """One of them."""

    def __init__(self, width: int, growth: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(4 * growth)
        self.conv1 = nn.Conv2d(width, 4 * growth, 1, bias=False)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C + growth, H, W)."""
        y = self.conv2(torch.relu(self.norm2(self.conv1(torch.relu(self.norm1(x))))))
        return torch.cat([x, y], 1)


class WaveNet(nn.Module):
    """Dilated 1-D convolutions, gated by tanh and sigmoid, with residual and skip sums."""

    def __init__(self, width: int = 64, layers: int = 8):
        super().__init__()
        self.first = nn.Conv1d(1, width, 1)
        self.dilated = nn.ModuleList(
            [nn.Conv1d(width, 2 * width, 3, padding=2**i, dilation=2**i) for i in range(layers)]
        )
        self.residual = nn.ModuleList([nn.Conv1d(width, width, 1) for _ in range(layers)])
        self.skip = nn.ModuleList([nn.Conv1d(width, width, 1) for _ in range(layers)])
        self.last, self.out = nn.Conv1d(width, width, 1), nn.Conv1d(width, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, T) to (B, 64, T)."""
        x = self.first(x)
        total: Any = 0
        for dilated, residual, skip in zip(self.dilated, self.residual, self.skip, strict=True):
            a, b = dilated(x).chunk(2, 1)
            y = torch.tanh(a) * torch.sigmoid(b)
            total = skip(y) + total
            x = x + residual(y)
        return self.out(torch.relu(self.last(torch.relu(total))))


class Recurrent(nn.Module):
    """A sentence classifier: embedding, two layers of LSTM, a linear layer."""

    def __init__(self, vocabulary: int = 4096, width: int = 192):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, 2, batch_first=True)
        self.wide, self.head = nn.Linear(width, 4 * width), nn.Linear(4 * width, 100)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) ids to logits."""
        y, _ = self.lstm(self.embed(ids))
        return self.head(torch.relu(self.wide(y[:, -1])))


class DLRM(nn.Module):
    """Dense features and categories; products of all pairs; a deep part behind them."""

    def __init__(self, tables: int = 16, rows: int = 2000, width: int = 64):
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(rows, width) for _ in range(tables)])
        self.bottom = nn.Sequential(
            nn.Linear(13, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, width), nn.ReLU()
        )
        pairs = (tables + 1) * tables // 2
        self.top = nn.Sequential(
            nn.Linear(pairs + width, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 256),
            nn.ReLU(), nn.Linear(256, 1), nn.Sigmoid(),
        )  # fmt: skip
        rows_, columns = torch.tril_indices(tables + 1, tables + 1, -1)
        self.register_buffer("rows", rows_)
        self.register_buffer("columns", columns)

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        """(B, 13) and (B, tables) to (B, 1)."""
        x = self.bottom(dense)
        features = torch.stack([x, *[table(ids[:, i]) for i, table in enumerate(self.tables)]], 1)
        products = torch.bmm(features, features.transpose(1, 2))[:, self.rows, self.columns]
        return self.top(torch.cat([x, products], 1))


class SuperResolution(nn.Module):
    """EDSR's layout: residual blocks without norm, a long skip, and sub-pixels."""

    def __init__(self, width: int = 48, blocks: int = 4):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
                )
                for _ in range(blocks)
            ]
        )
        self.last = nn.Conv2d(width, width, 3, padding=1)
        self.up, self.out = nn.Conv2d(width, 4 * width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 3, 2H, 2W)."""
        first = y = self.first(x)
        for block in self.blocks:
            y = y + block(y)
        return self.out(functional.pixel_shuffle(self.up(self.last(y) + first), 2))


class Diffusion(nn.Module):
    """Residual blocks of a diffusion model: group norm, SiLU, 3×3."""

    def __init__(self, width: int = 64, blocks: int = 3):
        super().__init__()
        self.first, self.out = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(8, width) for _ in range(2 * blocks + 1)])
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(2 * blocks)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to the same shape."""
        x = self.first(x)
        for i in range(0, len(self.convs), 2):
            y = self.convs[i](functional.silu(self.norms[i](x)))
            x = x + self.convs[i + 1](functional.silu(self.norms[i + 1](y)))
        return self.out(functional.silu(self.norms[-1](x)))


def _images(size: int) -> Callable[[torch.Generator], Inputs]:
    return lambda g: lambda batch: (torch.randn(batch, 3, size, size, generator=g),)


def _ids(length: int, vocabulary: int) -> Callable[[torch.Generator], Inputs]:
    return lambda g: lambda batch: (torch.randint(0, vocabulary, (batch, length), generator=g),)


def _sound(length: int) -> Callable[[torch.Generator], Inputs]:
    return lambda g: lambda batch: (torch.randn(batch, 1, length, generator=g),)


def _clicks(g: torch.Generator) -> Inputs:
    return lambda batch: (
        torch.randn(batch, 13, generator=g), torch.randint(0, 2000, (batch, 16), generator=g)
    )  # fmt: skip


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Inputs]]] = {
    "resnet": (lambda: ResNet(32, (2, 2, 2, 2), 100), _images(128)),
    "mobilenet_v2": (lambda: MobileNet(classes=100), _images(128)),
    "mobilenet_v3": (lambda: GatedNet(nn.Hardswish, nn.Hardsigmoid), _images(128)),
    "efficientnet": (lambda: GatedNet(nn.SiLU, nn.Sigmoid), _images(128)),
    "convnext": (ConvNeXt, _images(128)),
    "unet_bilinear": (UNet, _images(64)),
    "unet_transposed": (lambda: UNet(transposed=True), _images(64)),
    "vit": (ViT, _images(128)),
    "bert": (lambda: Transformer(256, 4, 64, 2048), _ids(64, 2048)),
    "gpt2": (GPT, _ids(64, 2048)),
    "llama": (Llama, _ids(64, 2048)),
    "densenet": (DenseNet, _images(128)),
    "wavenet": (WaveNet, _sound(1024)),
    "lstm": (Recurrent, _ids(32, 4096)),
    "dlrm": (DLRM, _clicks),
    "super_resolution": (SuperResolution, _images(48)),
    "diffusion": (Diffusion, _images(32)),
}


@torch.no_grad()
def build(name: str) -> tuple[nn.Module, Inputs]:
    """A model in evaluation and a function batch size → random inputs; the same ones in every process."""
    torch.manual_seed(0)
    make, source = ARCHITECTURES[name]
    model, inputs = make(), source(torch.Generator().manual_seed(1))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    if norms:
        model.train()
        for _ in range(2):
            model(*inputs(8))
    return model.eval(), inputs
