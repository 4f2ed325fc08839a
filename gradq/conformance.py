"""The conformance kit: run any codec through the contract of `gradq.codecs.Codec`.

A codec author writes one test::

    @pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
    def test_contract(check):
        check(MyCodec())

or calls `check_codec(MyCodec())`. A check raises AssertionError saying which contract broke for which input;
one whose contract a codec does not claim (unbiased, contractive, feedback) returns at once. Inside
`with torch.device("cuda"):` a check runs on CUDA tensors.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gradq import codecs, rng, wire
from gradq.codecs import Codec
from gradq.errors import ConfigError
from gradq.rng import EncodeContext

__all__ = ["CHECKS", "Check", "check_codec"]

Check = Callable[[Codec], None]

_NAN = math.nan
_MISS = 1e-9  # the chance that a statistical check fails a codec that is right
_LOSS_SCALE = 1024.0


def check_codec(codec: Codec) -> None:
    """Run every check of `CHECKS`.

    Raises:
        AssertionError: naming the codec, the check and the input.
    """
    for name, check in CHECKS.items():
        try:
            check(codec)
        except AssertionError as error:
            raise AssertionError(f"{codec} breaks the contract, {name}: {error}") from error


# --- helpers -------------------------------------------------------------------------------------------


def _sizes(codec: Codec) -> list[int]:
    block = codec.block_size
    return [0, 1, 7, block - 1, block, block + 1, 3 * block + 5]


def _random(numel: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator, dtype=torch.float64, device="cpu")
    return x.to(torch.get_default_device(), dtype)


def _inputs(codec: Codec) -> Iterator[tuple[str, Tensor]]:
    """Named awkward inputs, finite, of awkward sizes."""
    for numel in _sizes(codec):
        x = _random(numel, codec.work_dtype, numel)
        ramp = torch.linspace(-1, 1, numel, dtype=codec.work_dtype)
        spike = torch.full_like(x, 1e-3)
        spike[-1:] = -1e3
        shapes = {
            "random": x,
            "zeros": torch.zeros_like(x),
            "negative zeros": -torch.zeros_like(x),
            "ramp": ramp,
            "spike": spike,
            "denormals": ramp * 1e-39,
            "smallest denormals": torch.full_like(x, 2.0**-149),
            "tiny": ramp * 1e-36,
            "huge": ramp * 3e38,
        }
        for name, value in shapes.items():
            yield f"{name}[{numel}]", value


def _context(seed: int = 0, shift: int = 0, first_block: int = 0, loss_scale: float = 1.0) -> EncodeContext:
    key = rng.dither_key(seed, 0, 0, 1)
    return EncodeContext(key=key, shift=shift, first_block=first_block, loss_scale=loss_scale)


def _encode(codec: Codec, x: Tensor, context: EncodeContext | None = None, **residuals: Tensor) -> Tensor:
    payload = torch.empty(codec.nbytes(x.numel()), dtype=torch.uint8)
    codec.encode(x, payload, context=context or _context(), **residuals)
    return payload


def _decode(codec: Codec, payload: Tensor, numel: int) -> Tensor:
    out = torch.full((numel,), _NAN, dtype=codec.work_dtype)
    codec.decode(payload, out)
    return out


def _through(codec: Codec, x: Tensor, context: EncodeContext | None = None) -> Tensor:
    return _decode(codec, _encode(codec, x, context), x.numel())


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, all NaNs being one."""
    bits = {4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    a, b = (torch.where(t.isnan(), torch.full_like(t, _NAN), t) for t in (a, b))
    return a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))


def _takes_residuals(codec: Codec) -> bool:
    zeros = torch.zeros(1, dtype=codec.work_dtype)
    try:
        _encode(codec, zeros, residual=torch.zeros(1), new_residual=torch.zeros(1))
    except ConfigError:
        return False
    return True


def _is_random(codec: Codec) -> bool:
    """Unbiased and lossy is possible only with random bits."""
    x = _random(3 * codec.block_size + 5, codec.work_dtype)
    return codec.unbiased and not _same(_through(codec, x), x)


# --- configuration -------------------------------------------------------------------------------------


def check_configuration(codec: Codec) -> None:
    """A frozen, hashable, picklable dataclass; its spec makes it again; its relatives fit it."""
    assert dataclasses.is_dataclass(codec), "a codec is a dataclass"
    assert type(codec).__dataclass_params__.frozen, "the dataclass is not frozen"
    copy = pickle.loads(pickle.dumps(codec))
    assert copy == codec, f"unpickled, it is {copy}"
    assert hash(copy) == hash(codec), "equal codecs have different hashes"
    again = codecs.from_spec(str(codec))
    assert again == codec, f"its spec {str(codec)!r} makes {again!r}"
    assert codec.name == str(codec).partition("(")[0], f"its name {codec.name!r} is not how its spec starts"
    assert codec.block_size >= 1, f"block_size is {codec.block_size}"
    assert isinstance(codec.default_phase2(), Codec), "default_phase2() is no codec"
    for feedback in (False, True):
        decided = codec.for_feedback(feedback)
        where = f"for_feedback({feedback}) gives {decided}"
        assert decided.for_feedback(feedback) == decided, f"{where}, which is not decided yet"
        assert decided.nbytes(1000) == codec.nbytes(1000), f"{where}, which has another size on the wire"
        assert decided.block_size == codec.block_size, f"{where}, which has another block_size"


def check_sizes(codec: Codec) -> None:
    """An empty segment takes no bytes; wire_bits_per_element is 8 * nbytes / n."""
    assert codec.nbytes(0) == 0, f"nbytes(0) is {codec.nbytes(0)}"
    assert codec.wire_bits_per_element(0) == 0.0, "wire_bits_per_element(0) is not 0"
    for fewer, numel in itertools.pairwise(_sizes(codec)):
        nbytes, bits = codec.nbytes(numel), codec.wire_bits_per_element(numel)
        assert nbytes >= codec.nbytes(fewer), f"nbytes({numel}) = {nbytes}, nbytes({fewer}) is more"
        assert bits == 8 * nbytes / numel, f"wire_bits_per_element({numel}) = {bits}, nbytes {nbytes}"


# --- memory --------------------------------------------------------------------------------------------


def check_memory(codec: Codec) -> None:
    """Writes every byte of payload and out and no other, reads nothing around x, changes no input."""
    for name, x in _inputs(codec):
        numel, nbytes = x.numel(), codec.nbytes(x.numel())
        around = torch.full((numel + 16,), _NAN, dtype=x.dtype)
        inside = around[8 : 8 + numel].copy_(x)
        payloads = []
        for fill in (0xA5, 0x5A):
            buffer = torch.full((nbytes + 32,), fill, dtype=torch.uint8)
            codec.encode(inside, buffer[16 : 16 + nbytes], context=_context())
            edges = torch.cat((buffer[:16], buffer[16 + nbytes :]))
            assert bool((edges == fill).all()), f"encode of {name} wrote outside nbytes({numel}) = {nbytes}"
            payloads.append(buffer[16 : 16 + nbytes])
        differ = (payloads[0] != payloads[1]).nonzero()
        assert not len(differ), (
            f"encode of {name} left byte {int(differ[0])} of nbytes({numel}) = {nbytes} unwritten"
        )
        assert torch.equal(payloads[0], _encode(codec, x)), f"encode of {name} read outside x"
        assert _same(inside, x), f"encode of {name} changed x"
        for held in (_NAN, 7.0):
            out = torch.full((numel + 16,), held, dtype=x.dtype)
            codec.decode(payloads[0], out[8 : 8 + numel])
            edges = torch.cat((out[:8], out[8 + numel :]))
            assert _same(edges, torch.full_like(edges, held)), f"decode of {name} wrote outside out"
            expected = _decode(codec, payloads[1], numel)
            assert _same(out[8 : 8 + numel], expected), f"decode of {name} depends on what out held"
        assert torch.equal(*payloads), f"decode of {name} changed the payload"


# --- values --------------------------------------------------------------------------------------------


def check_determinism(codec: Codec) -> None:
    """The same context gives the same bytes; random bits follow key, shift and first_block."""
    for name, x in _inputs(codec):
        assert torch.equal(_encode(codec, x), _encode(codec, x)), f"{name}: two encodings differ"
    if _is_random(codec):
        x = _random(3 * codec.block_size + 5, codec.work_dtype)
        usual = _encode(codec, x)
        others = {
            "key": _context(seed=1),
            "high half of the key": EncodeContext(key=_context().key ^ (1 << 40)),
            "shift": _context(shift=rng.dither_shift(1, 2)),
            "first_block": _context(first_block=1),
        }
        for name, context in others.items():
            assert not torch.equal(_encode(codec, x, context), usual), f"another {name} gives the same bytes"


def check_values(codec: Codec) -> None:
    """Zeros decode to zeros, denormals to nothing larger, moderate values to finite ones."""
    for name, x in _inputs(codec):
        out = _through(codec, x)
        if "zeros" in name:
            assert bool((out == 0).all()), f"{name} decodes to {out[out != 0][:3].tolist()}"
        elif "denormals" in name:
            wrong = ~(out.abs() <= 2.0**-125)
            assert not bool(wrong.any()), f"{name} decodes to {out[wrong][:3].tolist()}"
        elif "huge" not in name:
            assert bool(out.isfinite().all()), f"{name} decodes to {out[~out.isfinite()][:3].tolist()}"


def check_nonfinite(codec: Codec) -> None:
    """One NaN or Inf at any position is seen by whoever decodes, alone and in the mean with finite rows."""
    numel = 2 * codec.block_size + 5
    x = _random(numel, codec.work_dtype)
    finite = _encode(codec, x)
    stride = max(13, numel // 64 | 1)
    for position in sorted({*range(0, numel, stride), *range(8), *range(numel - 8, numel), codec.block_size}):
        for value in (_NAN, -_NAN, math.inf, -math.inf):
            bad = x.clone()
            bad[position] = value
            payload = _encode(codec, bad)
            where = f"{value} at element {position} of {numel}"
            out = _decode(codec, payload, numel)
            assert not bool(out.isfinite().all()), f"{where} is lost by encode and decode"
            payloads = torch.stack((finite, payload, finite))
            codec.decode_mean(payloads, out)
            assert not bool(out.isfinite().all()), f"{where} is lost by decode_mean"


def check_decode_mean(codec: Codec) -> None:
    """decode_mean of W rows, strided as in a message, is the sum of decodes in row order / W, bit for bit."""
    for world_size in (1, 2, 3, 5):
        for name, x in _inputs(codec):
            numel, nbytes = x.numel(), codec.nbytes(x.numel())
            messages = torch.zeros(world_size, wire.align(nbytes) + 24, dtype=torch.uint8)
            payloads = messages[:, 8 : 8 + nbytes]
            for rank, row in enumerate(payloads):
                value = x if rank == 0 else 10.0 ** (-2 * rank) * _random(numel, x.dtype, rank)
                shift = rng.dither_shift(rank, world_size)
                codec.encode(value, row, context=_context(shift=shift))
            expected = _decode(codec, payloads[0], numel)
            for row in payloads[1:]:
                expected = expected + _decode(codec, row, numel)
            expected = (expected.cpu() / world_size).to(x.device)  # a GPU multiplies by 1 / world_size
            for rows, form in ((payloads, "strided"), (payloads.contiguous(), "contiguous")):
                out = torch.full_like(x, _NAN)
                codec.decode_mean(rows, out)
                assert _same(out, expected), f"decode_mean of {world_size} {form} rows, {name} the first"


def check_pieces(codec: Codec) -> None:
    """Cut at block boundaries, with first_block, a parameter decodes to what it decodes to in one piece."""
    block = codec.block_size
    for name, x in _inputs(codec):
        whole = _through(codec, x, _context(first_block=2))
        for cuts in ((block,), (2 * block,), (block, 3 * block)):
            bounds = [0, *(cut for cut in cuts if cut < x.numel()), x.numel()]
            pieces = [
                _through(codec, x[start:stop].clone(), _context(first_block=2 + start // block))
                for start, stop in itertools.pairwise(bounds)
            ]
            assert _same(torch.cat(pieces), whole), f"{name} cut at {bounds[1:-1]} decodes otherwise"


def check_roundtrip(codec: Codec) -> None:
    """Roundtrip keeps shape and dtype, computes in work_dtype, takes any strides, refuses integers."""
    x = _random(6 * 40).reshape(6, 40)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for value in (x.to(dtype), x.to(dtype).t(), x[0, 0].to(dtype), x[:0].to(dtype)):
            out = codec.roundtrip(value, rank=1, world_size=3)
            where = f"roundtrip of {dtype} {list(value.shape)}"
            assert (out.dtype, out.shape) == (dtype, value.shape), f"{where} is {out.dtype} {out.shape}"
            worked = codec.roundtrip(value.to(codec.work_dtype).contiguous(), rank=1, world_size=3)
            assert torch.equal(out, worked.to(dtype)), f"{where} differs from that in {codec.work_dtype}"
    grad = codec.roundtrip(x.clone().requires_grad_())
    assert not grad.requires_grad, "roundtrip records gradients"
    try:
        codec.roundtrip(torch.arange(3))
    except ConfigError:
        return
    raise AssertionError("roundtrip of integers is not a ConfigError")


# --- error ---------------------------------------------------------------------------------------------


def check_unbiased(codec: Codec) -> None:
    """The mean over many keys is x, for every rank's shift, within Hoeffding's bound at 1 - 1e-9.

    Errors of an element are bounded by the widest spread seen. Three sums are tested: every element over the
    keys; and over keys and elements the error along sign(x), which finds a codec that shrinks, and along 1,
    which finds one that is off to one side. A step of a 16-bit dither, 2**-16 of the largest value, is fine.
    """
    if not codec.unbiased:
        return
    block, keys = codec.block_size, 1024
    x = torch.linspace(-1, 1, min(block, 256), dtype=codec.work_dtype)
    x = torch.cat((x, 0.37 * x, x[:5]))
    allowed = float(x.abs().max()) * 2.0**-16
    for shift in (0, rng.dither_shift(1, 3)):
        seen = torch.stack([_through(codec, x, _context(seed=1 + k, shift=shift)) for k in range(keys)])
        spread = float((seen.amax(0) - seen.amin(0)).max())
        error = seen.double().mean(0) - x.double()
        bound = spread * math.sqrt(math.log(2 * x.numel() / _MISS) / (2 * keys)) + allowed
        worst = int(error.abs().argmax())
        assert abs(float(error[worst])) <= bound, (
            f"claims to be unbiased, but {float(x[worst]):.5f} has mean error {float(error[worst]):.2e} over "
            f"{keys} keys with shift {shift}; {bound:.2e} is possible by chance"
        )
        bound = spread * math.sqrt(math.log(2 / _MISS) / (2 * keys * x.numel())) + allowed
        for direction, sign in (("sign(x)", x.double().sign()), ("1", torch.ones_like(error))):
            along = float((error * sign).mean())
            assert abs(along) <= bound, (
                f"claims to be unbiased, but its mean error along {direction} is {along:.2e} with shift "
                f"{shift}; {bound:.2e} is possible by chance"
            )


def check_contractive(codec: Codec) -> None:
    """‖x - Q(x)‖² < ‖x‖² in the mean over keys: random x, and one spike among many small equal elements."""
    if not codec.contractive:
        return
    block = codec.block_size
    cases = {f"random, {n} elements": _random(n, codec.work_dtype, n) for n in _sizes(codec)[1:]}
    cases["heavy tails"] = torch.tan(torch.linspace(-1.57, 1.57, 3 * block, dtype=codec.work_dtype))
    half_steps = [0.5 / ((1 << (bits - 1)) - 1) for bits in range(2, 9)]
    for level in [*half_steps, *(0.98 * 2.0 ** (-k / 4) for k in range(48))]:
        x = torch.full((block,), level, dtype=codec.work_dtype)
        x[1::2] *= -1
        x[block // 2] = 1.0
        cases[f"a spike of 1 and the rest ±{level:.4f}"] = x
    for name, x in cases.items():
        errors = [
            float((x - _through(codec, x, _context(seed=k))).double().square().sum()) for k in range(16)
        ]
        ratio = sum(errors) / len(errors) / float(x.double().square().sum())
        assert ratio < 1.0, f"claims to be contractive, but ‖x - Q(x)‖² = {ratio:.4f} ‖x‖² for {name}"


# --- feedback ------------------------------------------------------------------------------------------


def check_residual(codec: Codec) -> None:
    """new_residual = x + residual - decoded, to one rounding; x + residual is what is encoded."""
    codec = codec.for_feedback(True)
    if not _takes_residuals(codec):
        assert not codec.wants_feedback, "wants feedback but takes no residual"
        return
    for name, x in _inputs(codec):
        for old in (torch.zeros_like(x), 0.3 * x.flip(0)):
            canaries = torch.full((x.numel() + 16,), 7.0)
            new, kept = canaries[8 : 8 + x.numel()], old.clone()
            payload = _encode(codec, x, residual=old, new_residual=new)
            decoded = _decode(codec, payload, x.numel())
            assert _same(old, kept), f"{name}: encode changed the old residual"
            assert torch.equal(payload, _encode(codec, x + old)), f"{name}: x + residual is not what is sent"
            outside = torch.cat((canaries[:8], canaries[8 + x.numel() :]))
            assert bool((outside == 7.0).all()), f"{name}: wrote outside new_residual"
            lost = x.double() + old.double() - decoded.double()
            slack = 2.0**-23 * ((x + old).double().abs() + lost.abs())
            close = ((new.double() - lost).abs() <= slack) | ~decoded.isfinite()
            assert bool(close.all()), (
                f"{name}: new_residual is {new[~close][:3].tolist()}, not {lost[~close][:3].tolist()}"
            )


def check_residual_nonfinite(codec: Codec) -> None:
    """A block that decodes to NaN leaves its residual as it was, bit for bit; the others get theirs."""
    codec = codec.for_feedback(True)
    if not _takes_residuals(codec):
        return
    block = codec.block_size
    x, old = _random(2 * block + 5), 1e-2 * _random(2 * block + 5, seed=1)
    clean = torch.empty_like(x)
    _encode(codec, x, residual=old, new_residual=clean)
    for position in (0, block - 1, block, 2 * block + 4):
        for value in (_NAN, math.inf, -math.inf):
            bad, new = x.clone(), torch.full_like(x, 7.0)
            bad[position] = value
            _encode(codec, bad, residual=old, new_residual=new)
            hit = torch.arange(x.numel()) // block == position // block
            expected = torch.where(hit, old, clean)
            assert _same(new, expected), f"{value} at {position}: its block's residual changed, or another's"


def check_residual_zero(codec: Codec) -> None:
    """What is too small to be sent stays in the residual, whole."""
    codec = codec.for_feedback(True)
    if not _takes_residuals(codec):
        return
    for numel in _sizes(codec):
        x = torch.linspace(-1, 1, numel) * 1e-39
        old, new = x.flip(0) * 0.5, torch.full_like(x, 7.0)
        payload = _encode(codec, x, residual=old, new_residual=new)
        total = _decode(codec, payload, numel) + new
        assert torch.equal(total, x + old), f"{numel} denormals: decoded + new_residual is not x + residual"


def check_loss_scale(codec: Codec) -> None:
    """Residuals are in unscaled units: scaling x by a power of two scales what is sent, exactly."""
    codec = codec.for_feedback(True)
    if not _takes_residuals(codec):
        return
    for numel in _sizes(codec):
        x, old = _random(numel), 1e-2 * _random(numel, seed=1)
        new, new_scaled = torch.empty_like(x), torch.empty_like(x)
        plain = _encode(codec, x, residual=old, new_residual=new)
        context = _context(loss_scale=_LOSS_SCALE)
        scaled = _encode(codec, x * _LOSS_SCALE, context, residual=old, new_residual=new_scaled)
        sent, sent_scaled = _decode(codec, plain, numel), _decode(codec, scaled, numel)
        assert _same(sent * _LOSS_SCALE, sent_scaled), f"{numel} elements: a loss scale changes what is sent"
        assert _same(new, new_scaled), f"{numel} elements: a loss scale changes the residual"


CHECKS: dict[str, Check] = {
    "configuration": check_configuration,
    "sizes": check_sizes,
    "memory": check_memory,
    "determinism": check_determinism,
    "values": check_values,
    "nonfinite": check_nonfinite,
    "decode_mean": check_decode_mean,
    "pieces": check_pieces,
    "roundtrip": check_roundtrip,
    "unbiased": check_unbiased,
    "contractive": check_contractive,
    "residual": check_residual,
    "residual_nonfinite": check_residual_nonfinite,
    "residual_zero": check_residual_zero,
    "loss_scale": check_loss_scale,
}
