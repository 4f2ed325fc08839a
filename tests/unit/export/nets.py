"""A residual network on 450 inputs, and what the tests do with every model."""

import torch
from torch import nn

from gradq import quant

INPUTS = 450


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    """Two residual blocks around a strided convolution, a global pool, a linear head."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.block1, self.down, self.block2 = Residual(16), nn.Conv2d(16, 32, 3, 2, 1), Residual(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.block1(torch.relu(self.bn(self.stem(x))))
        return self.head(self.block2(torch.relu(self.down(x))).mean((2, 3)))


@torch.no_grad()
def residual(spec="int8", **config):
    """(calibrated model, its 450 inputs); spec ``mixed`` chooses bits by sensitivity."""
    torch.manual_seed(0)
    model, data = Net(), torch.rand(INPUTS, 1, 8, 8)
    for _ in range(20):
        model(data[:64])
    model.eval()
    weights = "int8" if spec == "mixed" else spec
    qmodel = quant.prepare(model, data[:2], quant.Config(weights=weights, **config))
    quant.calibrate(qmodel, data[:128].split(32), show_progress=False)
    if spec == "mixed":
        report = quant.sensitivity(qmodel, [data[:32]], show_progress=False)
        assert len(set(quant.assign_bits(qmodel, report, average_bits=4).values())) > 1
    return qmodel, data


def prepared(model, batches, **config):
    """A calibrated model from a float one."""
    qmodel = quant.prepare(model, batches[0], quant.Config(**config))
    return quant.calibrate(qmodel, batches, show_progress=False)
