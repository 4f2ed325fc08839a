"""torchao PT2E on a model of benchmarks/int8.py or int8_architectures.py, as ONNX.

For an environment with torch, torchao, onnxscript.

    python benchmarks/int8_torchao.py cnn out.onnx

Called by both with --torchao. Post-training quantization for x86, the weights per channel.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import warnings
from pathlib import Path

import torch
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples"), str(HERE.parent)]

import int8_models as zoo  # noqa: E402
from int8_zoo import ARCHITECTURES, build  # noqa: E402


def main() -> None:
    """Convert and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=(*zoo.KINDS, *ARCHITECTURES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument(
        "--reduce-range", action="store_true", help="7-bit weights, for processors without VNNI"
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of packages that are not ours; what goes wrong raises
    torch.set_num_threads(1)
    if args.kind in ARCHITECTURES:
        model, inputs = build(args.kind)
    else:
        model, one = zoo.large(args.kind, args.smoke)

        def inputs(size: int) -> tuple[torch.Tensor, ...]:
            return (one(size),)

    batch = torch.export.Dim("batch")
    example = inputs(2)
    free = tuple({0: batch} for _ in example)
    exported = torch.export.export(model, example, dynamic_shapes=free).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(reduce_range=args.reduce_range))
    prepared = prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        for _ in range(2):
            prepared(*inputs(4))
    converted = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)
    torch.onnx.export(
        converted, example, str(args.out), dynamo=True, opset_version=20, dynamic_shapes=free,
        input_names=list(inspect.signature(model.forward).parameters), external_data=False, verbose=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
