"""A decoder with a cache of keys and values, in a file that takes any number of tokens and of past ones."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from gradq import export, quant

WIDTH, HEADS, LAYERS, WORDS, LONGEST = 32, 2, 2, 23, 16


class Decoder(nn.Module):
    """Tokens and the keys and values so far → logits, and the keys and values with the new ones."""

    def __init__(self):
        super().__init__()
        self.embed, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids, past):
        before, count = past[0].shape[2], ids.shape[1]
        at = torch.arange(before, before + count)
        mask = torch.arange(before + count)[None] <= at[:, None]
        x, cache = self.embed(ids) + self.positions(at), []
        for i in range(LAYERS):
            qkv = self.qkv[i](self.norms[i](x)).view(x.shape[0], count, 3 * HEADS, -1).transpose(1, 2)
            q, k, v = qkv.chunk(3, 1)
            k, v = torch.cat([past[2 * i], k], 2), torch.cat([past[2 * i + 1], v], 2)
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x, cache = x + self.out[i](y.transpose(1, 2).reshape(x.shape)), [*cache, k, v]
        return self.head(x), tuple(cache)


def cache(batch, length):
    return tuple(torch.zeros(batch, HEADS, length, WIDTH // HEADS) for _ in range(2 * LAYERS))


@pytest.mark.parametrize("weights", ["int4-g16", "int8-g16", None])
@torch.no_grad()
def test_steps_through_the_cache_give_the_logits_of_one_pass(tmp_path, weights):
    torch.manual_seed(0)
    model, ids = Decoder().eval(), torch.randint(WORDS, (1, 9))
    example = (torch.randint(WORDS, (2, 3)), cache(2, 4))
    qmodel = quant.prepare(model, example, quant.Config(weights=weights or "int8", activations=None))
    quant.gptq(qmodel, [(ids, cache(1, 0))], show_progress=False)
    axes = {"ids": {1: "tokens"}} | {f"past.{i}": {2: "before"} for i in range(2 * LAYERS)}
    write = export.onnx if weights else export.float_onnx
    report = write(qmodel, tmp_path / "decoder.onnx", dynamic_axes=axes)
    if weights:  # eight bits behind float inputs would be far slower than float as MatMulNBits
        assert ("nbits" in report.forms) == (weights == "int4-g16")
    session = export.session(tmp_path / "decoder.onnx")
    names = [i.name for i in session.get_inputs()]
    whole = (qmodel if weights else model)(ids, cache(1, 0))[0].numpy()

    def run(tokens, past):
        logits, *past = session.run(None, dict(zip(names, [tokens.numpy(), *past], strict=True)))
        return logits, past

    past, steps = [t.numpy() for t in cache(1, 0)], []
    for part in ids.split([4, 1, 1, 2, 1], 1):  # a prompt, and tokens one or two at a time
        logits, past = run(part, past)
        steps.append(logits)
    assert past[0].shape == (1, HEADS, 9, WIDTH // HEADS)
    assert np.abs(np.concatenate(steps, 1) - whole).max() < 1e-4 * np.abs(whole).max()
