"""Small models that between them hold every kind of layer."""

import torch
from torch import nn
from torch.nn import functional


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, groups=2), nn.BatchNorm2d(width)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return functional.relu6(x + self.bn2(self.conv2(y)))


class CNN(nn.Module):
    """Residual, strided, depthwise, with functional dropout and a global pool."""

    def __init__(self, width=8):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Residual(width), Residual(width))
        self.depthwise = nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = functional.max_pool2d(torch.relu(self.bn(self.stem(x))), 2)
        x = self.relu(self.depthwise(self.blocks(x)))
        x = functional.dropout(x, 0.5, training=self.training)
        return self.head(x.mean((2, 3)))


class MLP(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(12, 24, bias), nn.ReLU(), nn.Linear(24, 24, bias), nn.ReLU(), nn.Linear(24, 4)
        )

    def forward(self, x):
        return self.layers(x)


class TinyGPT(nn.Module):
    """Tied embedding, positions from torch.arange, attention by SDPA, an optional second argument."""

    def __init__(self, width=16, vocabulary=11, length=8):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens, targets=None):
        B, T = tokens.shape
        assert T <= 8, "too long"
        x = self.tokens(tokens) + self.positions(torch.arange(T))
        q, k, v = self.qkv(self.norm(x)).view(B, T, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        rate = 0.1 if self.training else 0.0
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)
        logits = self.head(x + self.proj(y.transpose(1, 2).reshape(B, T, -1)))
        if targets is None:
            return logits
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Transformer(nn.Module):
    """torch's own encoder and decoder layers and a bare nn.MultiheadAttention."""

    def __init__(self, width=16):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True, norm_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoderLayer(width, 2, 32, batch_first=True, dropout=0.0)
        self.attention = nn.MultiheadAttention(width, 4)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        memory = self.encoder(x)
        y = self.decoder(x, memory).transpose(0, 1)
        z, _ = self.attention(y, y, y)
        return self.head(z.transpose(0, 1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.head = nn.LSTMCell(6, 10), nn.GRUCell(10, 10), nn.Linear(10, 3)

    def forward(self, x):
        h, c = self.lstm(x)
        h, c = self.lstm(x, (h, c))
        return self.head(self.gru(h))


class Volume(nn.Module):
    """One- and three-dimensional convolutions, a concatenation, sigmoid gating, average pooling."""

    def __init__(self):
        super().__init__()
        self.line, self.block = nn.Conv1d(3, 4, 3, padding=1), nn.Conv3d(1, 2, 3, padding=1)
        self.mix = nn.Conv1d(8, 6, 1)
        self.pool = nn.AvgPool1d(2)

    def forward(self, x):
        y = self.line(x)
        z = torch.cat([y, torch.sigmoid(y) * y], 1)
        deep = self.block(x[:, None, :, :, None]).flatten(2)
        return self.mix(self.pool(z)).flatten(1), deep


def build(name, seed=0):
    """(model in evaluation, list of batches)."""
    torch.manual_seed(seed)
    if name == "cnn":
        model, batches = CNN(), [torch.randn(4, 1, 12, 12) for _ in range(3)]
        for batch in batches:
            model(batch)  # batch norm needs statistics
    elif name == "mlp":
        model, batches = MLP(), [torch.randn(6, 12) for _ in range(3)]
    elif name == "gpt":
        model, batches = TinyGPT(), [torch.randint(0, 11, (3, 8)) for _ in range(3)]
    elif name == "transformer":
        model, batches = Transformer(), [torch.randn(3, 5, 16) for _ in range(3)]
    elif name == "recurrent":
        model, batches = Recurrent(), [torch.randn(4, 6) for _ in range(3)]
    else:
        model, batches = Volume(), [torch.randn(2, 3, 8) for _ in range(3)]
    return model.eval(), batches


NAMES = ("cnn", "mlp", "gpt", "transformer", "recurrent", "volume")
