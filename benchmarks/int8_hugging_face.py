"""Hugging Face's models from `gradq.quant.prepare` to a verified ONNX file.

    pip install transformers
    python benchmarks/int8_hugging_face.py                    # about 10 minutes
    python benchmarks/int8_hugging_face.py --models bert vit

The models are tiny and have random weights (those with batch norm learn digits for a moment); what is tested
is that their code gets through. The distances compare the file, run by ONNX Runtime, with the model as
transformers built it: signal to noise in dB, and cosine. "bert, trained" goes through quantization-aware
training first: a float model learns which of two tokens its sentences hold more often; prepared in training
mode with 4-bit weights it learns a little longer.

Each finished model is kept in benchmarks/results/int8_hugging_face.json, and the table beside it: a run that
was broken off goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradq import export, quant
from gradq.bench.records import environment

HERE = Path(__file__).parent
LENGTH = 12
TRAINED = "bert, trained"


def tokens(batch: int) -> dict[str, Tensor]:
    """Ids, and a mask that hides the end of every second sentence."""
    ids = torch.randint(5, 90, (batch, LENGTH))
    mask = torch.ones_like(ids)
    mask[1::2, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def ids_only(batch: int) -> dict[str, Tensor]:
    """Without a mask."""
    return {"input_ids": torch.randint(5, 90, (batch, LENGTH))}


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits, (1797, 3, 32, 32), and what they are."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    return functional.interpolate(images, size=(32, 32)).expand(-1, 3, -1, -1).contiguous(), torch.tensor(
        found.target
    )


def pixels(batch: int) -> dict[str, Tensor]:
    """Images."""
    return {"pixel_values": digits()[0][torch.randint(0, 1797, (batch,))]}


def models() -> dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Tensor]]]]:
    """Name → (model, inputs)."""
    import transformers as hf

    text = {"vocab_size": 99}
    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
    return {
        "bert": (lambda: hf.BertForSequenceClassification(
            hf.BertConfig(**text, **small, max_position_embeddings=64)), tokens),
        "distilbert": (lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(**text, dim=32, n_layers=2, n_heads=4, hidden_dim=64)), tokens),
        "gpt2": (lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(**text, n_embd=32, n_layer=2, n_head=4, n_positions=64, use_cache=False,
                          bos_token_id=0, eos_token_id=0)), ids_only),
        "llama": (lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(**text, **small, num_key_value_heads=2, use_cache=False)), ids_only),
        "vit": (lambda: hf.ViTForImageClassification(
            hf.ViTConfig(**small, image_size=32, patch_size=8)), pixels),
        "resnet": (lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic",
                            num_labels=10)), pixels),
        "mobilenet_v2": (lambda: hf.MobileNetV2ForImageClassification(
            hf.MobileNetV2Config(image_size=32, depth_multiplier=0.35, num_labels=10)), pixels),
        "convnext": (lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(hidden_sizes=[16, 32, 32, 32], depths=[1, 1, 1, 1], image_size=32)), pixels),
    }  # fmt: skip


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """A model in evaluation; one with batch norm learns digits for a moment: random weights only blur."""
    torch.manual_seed(0)
    model = make()
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        images, labels = digits()
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        model.train()
        for _ in range(120):
            chosen = torch.randint(0, len(images), (64,))
            loss = functional.cross_entropy(model(images[chosen]).logits, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def write(qmodel: nn.Module, model: nn.Module, inputs: Callable[[int], dict[str, Tensor]]) -> dict[str, Any]:
    """Export, verify, and compare with the model by hand."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        report = export.onnx(qmodel, path)
        seen = export.verify(path, qmodel, [inputs(4)], batch_sizes=(), strict=False, show_progress=False)
        running = export.session(path)
        fresh = inputs(32)
        with torch.no_grad():
            want = model(**fresh).logits.double().flatten()
        got = running.run(None, {i.name: fresh[i.name].numpy() for i in running.get_inputs()})[0]
    other = torch.from_numpy(got).double().flatten()
    noise = float((want - other).square().sum())
    return {
        "layers": report.forms, "float": len(report.float_islands),
        "db": float(10 * torch.log10(want.square().sum() / noise)) if noise else float("inf"),
        "cosine": float(functional.cosine_similarity(want, other, 0)),
        "failures": seen.failures,
    }  # fmt: skip


def post_training(make: Any, inputs: Any) -> dict[str, Any]:
    """prepare, calibrate, export, verify."""
    model = build(make)
    qmodel = quant.prepare(model, inputs(2))
    quant.calibrate(qmodel, [inputs(16) for _ in range(4)], show_progress=False)
    return write(qmodel, model, inputs)


def sentences(batch: int) -> tuple[dict[str, Tensor], Tensor]:
    """Sentences of the tokens 7 and 8 among others; the label says which of them is there more often."""
    ids = torch.randint(5, 12, (batch, LENGTH))
    sevens, eights = ((ids == token).sum(1) for token in (7, 8))
    ids[sevens == eights, 0] = 7
    labels = ((ids == 8).sum(1) > (ids == 7).sum(1)).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def train(model: nn.Module, steps: int, lr: float) -> None:
    """A little AdamW."""
    optimizer = torch.optim.AdamW(quant.param_groups(model, lr=lr, weight_decay=1e-2))
    model.train()
    for _ in range(steps):
        batch, labels = sentences(64)
        loss = functional.cross_entropy(model(**batch)["logits"], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def accuracy(run: Callable[[dict[str, Tensor]], Tensor]) -> float:
    """On 2,000 sentences, the same ones each time, in per cent."""
    torch.manual_seed(99)
    batch, labels = sentences(2000)
    with torch.no_grad():
        return 100 * float((run(batch).argmax(-1) == labels).double().mean())


def trained(make: Any) -> dict[str, Any]:
    """Float training; prepare in training mode with 4-bit weights; a little more training; export; verify."""
    torch.manual_seed(0)
    model = make()
    train(model, 400, 2e-3)
    config = quant.Config(weights="int4")
    qmodel = quant.prepare(model.train(), sentences(2)[0], config)
    quant.calibrate(qmodel, [sentences(64)[0] for _ in range(4)], show_progress=False)
    model.eval()
    before = accuracy(lambda b: qmodel.eval()(**b)["logits"])
    train(qmodel, 200, 3e-4)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        report = export.onnx(qmodel, path)
        torch.manual_seed(98)
        batch, labels = sentences(500)
        seen = export.verify(
            path, qmodel, [batch | {"labels": labels}], batch_sizes=(), strict=False, show_progress=False
        )
        running = export.session(path)

        def run(batch: dict[str, Tensor]) -> Tensor:
            feed = {i.name: batch[i.name].numpy() for i in running.get_inputs()}
            return torch.from_numpy(running.run(None, feed)[0])

        after = accuracy(run)
    return {
        "layers": report.forms, "float_accuracy": accuracy(lambda b: model(**b).logits), "before": before,
        "after": after, "failures": seen.failures,
    }  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """The record in Markdown."""
    facts = record["environment"]
    lines = [
        "# Hugging Face's models, from prepare to a verified file",
        "",
        f"`python benchmarks/int8_hugging_face.py`, {record['date']}, {facts['cpu']} ({record['target']}), "
        f"torch {facts['torch']}, transformers {record['transformers']}. Tiny models with "
        "random weights (resnet and mobilenet_v2 saw digits for 120 steps); "
        "the file in ONNX Runtime against the untouched model on 32 fresh inputs.",
        "",
        "| model | layers | dB | cosine | verify |",
        "|---|---|---|---|---|",
    ]
    for name, found in record["models"].items():
        layers = ", ".join(f"{n} {form}" for form, n in found["layers"].items())
        said = "; ".join(found["failures"]) or "ok"
        if name != TRAINED:
            lines.append(f"| {name} | {layers} | {found['db']:.1f} | {found['cosine']:.6f} | {said} |")
            continue
        lines += [
            "",
            f"bert with 4-bit weights ({layers}), accuracy on 2,000 sentences: float "
            f"{found['float_accuracy']:.2f} %, quantized {found['before']:.2f} %, "
            f"trained a little (200 steps) and written to a file "
            f"{found['after']:.2f} %; verify: {said}.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is not recorded yet, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", help="of the eight; all by default")
    parser.add_argument("--again", action="store_true", help="run what is recorded once more")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "int8_hugging_face.json")
    args = parser.parse_args()
    import transformers

    torch.set_num_threads(1)
    known = models()
    record = json.loads(args.out.read_text()) if args.out.exists() else {"models": {}}
    for name in args.models or [*known, TRAINED]:
        if name in record["models"] and not args.again:
            continue
        found = trained(known["bert"][0]) if name == TRAINED else post_training(*known[name])
        record |= {
            "date": time.strftime("%Y-%m-%d"), "environment": environment(), "target": quant.detect_target(),
            "transformers": transformers.__version__,
        }  # fmt: skip
        kept = record["models"] | {name: found}
        record["models"] = {n: kept[n] for n in [*known, TRAINED] if n in kept}
        print(name, found, flush=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(record))
    sys.exit(any(found["failures"] for found in record["models"].values()))


if __name__ == "__main__":
    main()
