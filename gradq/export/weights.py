"""How weights stand in the file: 8-bit, 4-bit at INT8 speed, tables, and groups for MatMulNBits.

What ONNX Runtime does with each form (1.32, CPU): a ``Cast`` or ``Gather`` of constants is computed once at
load, so that the convolution behind it sees plain int8 weights. A ``DequantizeLinear`` of INT4 directly in
front of a convolution is not: it runs at half the speed of fp32.

Shapes: O outputs, I inputs, G groups a row, R scales.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gradq.export.nodes import Layer

__all__ = [
    "Builder",
    "codes_of",
    "float_weight",
    "integer_weight",
    "is_weight_constant",
    "nbits_weight",
    "pack_nibbles",
    "storage",
    "stored_codes",
]

Array = npt.NDArray[Any]
_SHARED_FROM = 4096  # bytes


class Builder:
    """Collects nodes and constants; equal large constants are stored once, so tied weights stay tied.

    Small ones are not shared: ONNX Runtime's u8 rewriting (``session.x64quantprecision``) takes every
    weight's zero point for the weight's own.
    """

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self._by_content: dict[bytes, str] = {}
        self._names: set[str] = set()

    def unique(self, name: str) -> str:
        """The name, with a number behind it if it is taken."""
        candidate, count = name, 1
        while candidate in self._names:
            candidate, count = f"{name}_{count}", count + 1
        self._names.add(candidate)
        return candidate

    def constant(self, name: str, value: Array, *, packed: str = "") -> str:
        """Store a constant.

        Args:
            name: wanted name.
            value: the array; for `packed` integers of any dtype.
            packed: ``INT4`` or ``UINT4`` to pack two elements into a byte, ``FLOAT8E4M3FN`` for e4m3's bits.

        Returns:
            The name it has.
        """
        import onnx

        value = np.asarray(value, order="C")
        if packed == "FLOAT8E4M3FN":
            kind, dims, raw = onnx.TensorProto.FLOAT8E4M3FN, value.shape, value.astype(np.uint8).tobytes()
        elif packed:
            kind, dims, raw = getattr(onnx.TensorProto, packed), value.shape, pack_nibbles(value)
        else:
            kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            dims, raw = value.shape, value.tobytes()
        key = hashlib.sha256(f"{kind} {dims} ".encode() + raw).digest() if len(raw) >= _SHARED_FROM else b""
        if key in self._by_content:
            return self._by_content[key]
        name = self.unique(name)
        self.constants[name] = onnx.TensorProto(data_type=kind, dims=dims, raw_data=raw, name=name)
        if key:
            self._by_content[key] = name
        return name

    def node(self, op: str, inputs: Sequence[str], name: str, *, output: str = "", **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        return self.nodes_out(op, inputs, name, 1, outputs=[output] if output else None, **attributes)[0]

    def nodes_out(
        self,
        op: str,
        inputs: Sequence[str],
        name: str,
        count: int,
        *,
        outputs: Sequence[str] | None = None,
        **attributes: Any,
    ) -> list[str]:
        """Add a node with several outputs."""
        import onnx

        name = self.unique(name)
        outputs = list(outputs or [f"{name}:{i}" if count > 1 else f"{name}:out" for i in range(count)])
        self.nodes.append(onnx.helper.make_node(op, list(inputs), outputs, name=name, **attributes))
        return outputs


def pack_nibbles(values: Array) -> bytes:
    """Two's-complement 4-bit elements, two a byte, the first in the low half."""
    flat = np.asarray(values).reshape(-1).astype(np.int64) & 0xF
    if flat.size % 2:
        flat = np.append(flat, 0)
    return (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8).tobytes()


def storage(layer: Layer) -> str:
    """``int8``, ``int4``, ``table`` or ``nbits``: the form a layer's weight takes.

    ``nbits`` is for weights in groups that MatMulNBits takes: uniform, the group a power of two from 16.
    """
    fmt = layer.quantizer.format
    if not fmt.is_uniform:
        return "table"
    size = fmt.group_size
    if layer.kind == "linear" and size >= 16 and size & (size - 1) == 0 and fmt.symmetric:
        return "nbits"
    return "int4" if fmt.bits <= 4 else "int8"


def codes_of(layer: Layer) -> tuple[Array, Array, Array]:
    """Codes (the rows this node computes), scales and zero points as the format has them.

    Returns:
        int32 (O, …), fp32 (R,), int32 (R,).
    """
    quantizer = layer.quantizer
    codes = quantizer.quantize(layer.weight.detach()).numpy()
    scale, zero = quantizer.scale.detach().numpy(), quantizer.zero_point.numpy()
    if layer.subpixel is not None:
        pixels = layer.subpixel
        return pixels.rearrange(codes, zero), pixels.repeat(scale), pixels.repeat(zero)
    if layer.rows is None:
        return codes, scale, zero
    if len(scale) > 1:
        per_row = len(scale) // len(codes)
        part = slice(layer.rows.start * per_row, layer.rows.stop * per_row)
        scale, zero = scale[part], zero[part]
    return codes[layer.rows], scale, zero


def _stored(builder: Builder, layer: Layer, codes: Array) -> str:
    """The codes as an INT8 (UINT8 if asymmetric) value, stored as narrow as the format allows."""
    import onnx

    fmt = layer.quantizer.format
    name = f"{layer.name}.codes"
    if not fmt.is_uniform:
        assert layer.quantizer.codebook is not None
        table = layer.quantizer.codebook.numpy().astype(np.int8)
        if not np.isin(codes, table).all():  # a phase without a tap, and a table without a zero
            return builder.constant(name, codes.astype(np.int8))
        index = np.searchsorted(table, codes)
        indices = builder.constant(f"{layer.name}.indices", index, packed="UINT4")
        wide = builder.node("Cast", [indices], f"{layer.name}.cast", to=onnx.TensorProto.INT32)
        return builder.node(
            "Gather", [builder.constant(f"{layer.name}.table", table), wide], f"{layer.name}.lookup", axis=0
        )
    return stored_codes(builder, name, codes, fmt.bits, symmetric=fmt.symmetric)


def stored_codes(builder: Builder, name: str, codes: Array, bits: int, *, symmetric: bool = True) -> str:
    """Codes as an INT8 value (UINT8 if not symmetric), two a byte if they have at most 4 bits."""
    import onnx

    if bits <= 4:
        kind, to = ("INT4", onnx.TensorProto.INT8) if symmetric else ("UINT4", onnx.TensorProto.UINT8)
        small = builder.constant(name, codes, packed=kind)
        return builder.node("Cast", [small], f"{name.removesuffix('.codes')}.cast", to=to)
    return builder.constant(name, codes.astype(np.int8 if symmetric else np.uint8))


def integer_weight(builder: Builder, layer: Layer) -> tuple[str, str, str, Array]:
    """A weight for an integer kernel.

    Returns:
        Names of the codes (O, …), the scales (O,) or () and the zero points, and the scales themselves.
    """
    codes, scale, zero = codes_of(layer)
    value = _stored(builder, layer, codes)
    dtype = np.int8 if layer.quantizer.format.symmetric else np.uint8
    shape = () if len(scale) == 1 else (len(scale),)
    names = (
        builder.constant(f"{layer.name}.scale", scale.reshape(shape)),
        builder.constant(f"{layer.name}.zero_point", zero.astype(dtype).reshape(shape)),
    )
    return value, *names, scale


def float_weight(builder: Builder, layer: Layer) -> str:
    """A weight that is stored narrow and becomes float once, at load: ``Cast`` and ``Mul`` of constants."""
    import onnx

    codes, scale, zero = codes_of(layer)
    value = _stored(builder, layer, codes)
    value = builder.node("Cast", [value], f"{layer.name}.to_float", to=onnx.TensorProto.FLOAT)
    rows = len(scale)
    outputs, elements = len(codes), codes[0].size
    grouped = rows > outputs
    name = layer.name
    if grouped:
        size = layer.quantizer.format.group_size
        groups = rows // outputs
        flat = builder.constant(f"{name}.flat", np.array([outputs, elements], np.int64))
        value = builder.node("Reshape", [value, flat], f"{name}.flatten")
        if groups * size != elements:
            pads = np.array([0, 0, 0, groups * size - elements], np.int64)
            value = builder.node("Pad", [value, builder.constant(f"{name}.pads", pads)], f"{name}.pad")
        blocks = builder.constant(f"{name}.blocks", np.array([outputs, groups, size], np.int64))
        value = builder.node("Reshape", [value, blocks], f"{name}.to_groups")
        shape: tuple[int, ...] = (outputs, groups, 1)
    else:
        shape = (rows, *(1,) * (codes.ndim - 1)) if rows > 1 else (1,)
    if zero.any():
        offset = builder.constant(f"{name}.offset", zero.astype(np.float32).reshape(shape))
        value = builder.node("Sub", [value, offset], f"{name}.shift")
    factor = builder.constant(f"{name}.scale", scale.reshape(shape))
    value = builder.node("Mul", [value, factor], f"{name}.dequantize")
    if grouped:
        whole = builder.constant(f"{name}.whole", np.array([outputs, -1], np.int64))
        value = builder.node("Reshape", [value, whole], f"{name}.from_groups")
        if groups * size != elements:
            ends = [np.array(v, np.int64) for v in ([0], [elements], [1])]
            cut = [builder.constant(f"{name}.cut{i}", v) for i, v in enumerate(ends)]
            value = builder.node("Slice", [value, *cut], f"{name}.unpad")
        back = builder.constant(f"{name}.shape", np.array(codes.shape, np.int64))
        value = builder.node("Reshape", [value, back], f"{name}.reshape")
    return value


def nbits_weight(builder: Builder, layer: Layer) -> tuple[list[str], dict[str, int]]:
    """A weight in groups, as MatMulNBits takes it.

    Returns:
        Names of the packed codes (O, G, bytes) and the scales (O·G,), and the node's attributes.
    """
    fmt = layer.quantizer.format
    codes, scale, _ = codes_of(layer)
    outputs, inputs = codes.shape
    size = fmt.group_size
    groups = -(-inputs // size)
    bits = 4 if fmt.bits <= 4 else 8
    half = 1 << (bits - 1)
    wide = np.zeros((outputs, groups * size), np.int64)
    wide[:, :inputs] = codes
    unsigned = (wide + half).reshape(outputs, groups, size)
    if bits == 4:
        packed = (unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)).astype(np.uint8)
    else:
        packed = unsigned.astype(np.uint8)
    names = [
        builder.constant(f"{layer.name}.packed", packed),
        builder.constant(f"{layer.name}.scale", scale.reshape(outputs, groups)),
    ]
    return names, {"K": inputs, "N": outputs, "bits": bits, "block_size": size}


def is_weight_constant(name: str) -> bool:
    """True for the constants this file makes of weights."""
    return name.endswith((".codes", ".indices", ".packed"))
