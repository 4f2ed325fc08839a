"""What computes nothing is not quantized: sums that start with 0, branches that no output needs."""

import torch
from torch import nn

from gradq import quant
from gradq.quant.fake import ActQuant


class Sums(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1) for _ in range(3)])
        self.unused = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        total = sum(part(x) for part in self.parts)
        self.unused(total)
        return self.head(torch.relu(total).mean((2, 3)))


@torch.no_grad()
def test_a_sum_that_starts_with_zero_has_no_addition_more_and_dead_layers_no_quantizer():
    torch.manual_seed(0)
    model, x = Sums().eval(), torch.randn(2, 3, 8, 8)
    q = quant.prepare(model, x, quant.Config(weights="int8", target="x86-vnni"))
    additions = [n for n in q.graph.nodes if n.op == "call_function" and "add" in str(n.target)]
    assert len(additions) == 2
    # the input, three convolutions, two sums (the last behind its ReLU), the mean
    assert sum(isinstance(m, ActQuant) for m in q.modules()) == 7
    assert type(q.unused) is nn.Conv2d
    quant.calibrate(q, [x], show_progress=False)
    back = quant.restore(q)
    assert torch.equal(back(x), model(x))
