"""The conformance kit finds what it is for: one broken codec for every check."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from gradq import codecs
from gradq.codecs import UniformCodec
from gradq.conformance import CHECKS, check_codec
from gradq.errors import ConfigError

frozen = dataclasses.dataclass(frozen=True, kw_only=True)


def replaced(context, **changes):
    return dataclasses.replace(context, **changes)


@frozen
class ForgetsAnOption(UniformCodec):
    """configuration"""

    def __str__(self):
        return self.name


class Melts(UniformCodec):
    """configuration"""

    __hash__ = object.__hash__


@frozen
class WrongBits(UniformCodec):
    """sizes"""

    def wire_bits_per_element(self, numel):
        return float(self.num_bits)


@frozen
class BytesForNothing(UniformCodec):
    """sizes"""

    def nbytes(self, numel):
        return super().nbytes(max(numel, 1))


@frozen
class LeavesABlank(UniformCodec):
    """memory"""

    def nbytes(self, numel):
        return super().nbytes(numel) + (1 if numel else 0)

    def encode(self, x, payload, **rest):
        super().encode(x, payload[: super().nbytes(x.numel())], **rest)


@frozen
class Overruns(UniformCodec):
    """memory"""

    def encode(self, x, payload, **rest):
        super().encode(x, payload, **rest)
        if payload.storage_offset() >= 8:
            payload.as_strided((1,), (1,), payload.storage_offset() - 1).fill_(0)


@frozen
class Scribbles(UniformCodec):
    """memory"""

    def encode(self, x, payload, **rest):
        super().encode(x, payload, **rest)
        x.zero_()


@frozen
class AddsUp(UniformCodec):
    """memory"""

    def decode(self, payload, out):
        before = out.clone()
        super().decode(payload, out)
        out.add_(before * 1e-3)


@frozen
class Forgetful(UniformCodec):
    """determinism"""

    def encode(self, x, payload, *, context, **rest):
        key = int(torch.randint(1 << 60, ()))
        super().encode(x, payload, context=replaced(context, key=key), **rest)


@frozen
class SameForAllRanks(UniformCodec):
    """determinism"""

    def encode(self, x, payload, *, context, **rest):
        super().encode(x, payload, context=replaced(context, shift=0), **rest)


@frozen
class HalfAKey(UniformCodec):
    """determinism"""

    def encode(self, x, payload, *, context, **rest):
        super().encode(x, payload, context=replaced(context, key=context.key & 0xFFFFFFFF), **rest)


@frozen
class NeverZero(UniformCodec):
    """values"""

    def decode(self, payload, out):
        super().decode(payload, out)
        out[out == 0] = 1e-20


@frozen
class LosesNaN(UniformCodec):
    """nonfinite"""

    def decode(self, payload, out):
        super().decode(payload, out)
        out.nan_to_num_()


@frozen
class LosesNaNInTheLastElement(UniformCodec):
    """nonfinite"""

    def encode(self, x, payload, **rest):
        if x.numel():
            x = x.clone()
            x[-1] = x[-1].nan_to_num()
        super().encode(x, payload, **rest)


@frozen
class MeanLosesNaN(UniformCodec):
    """nonfinite"""

    def decode_mean(self, payloads, out):
        super().decode_mean(payloads, out)
        out.nan_to_num_()


@frozen
class SumsBackwards(UniformCodec):
    """decode_mean"""

    def decode_mean(self, payloads, out):
        super().decode_mean(payloads.flip(0), out)


@frozen
class MultipliesByTheInverse(UniformCodec):
    """decode_mean"""

    def decode_mean(self, payloads, out):
        super().decode_mean(payloads, out)
        out.mul_(payloads.shape[0]).mul_(1 / payloads.shape[0])


@frozen
class ForgetsWhereItStands(UniformCodec):
    """pieces"""

    def encode(self, x, payload, *, context, **rest):
        first = 0 if context.first_block == 0 else 1  # determinism is content with that
        super().encode(x, payload, context=replaced(context, first_block=first), **rest)


@frozen
class KeepsNoDtype(UniformCodec):
    """roundtrip"""

    def roundtrip(self, x, **rest):
        return super().roundtrip(x.float() if x.is_floating_point() else x, **rest)


@frozen
class TakesIntegers(UniformCodec):
    """roundtrip"""

    def roundtrip(self, x, **rest):
        return super().roundtrip(x if x.is_floating_point() else x.float(), **rest)


@frozen
class ClaimsUnbiased(UniformCodec):
    """unbiased"""

    unbiased = True
    rounding: str = "nearest"

    def encode(self, x, payload, *, context, **rest):
        # enough noise in the smallest element to look random
        noisy = x.clone()
        noisy[:1] += 0.02 * ((context.key + context.shift + context.first_block) % 7) * noisy[:1]
        super().encode(noisy, payload, context=context, **rest)


@frozen
class Shrinks(UniformCodec):
    """unbiased"""

    def decode(self, payload, out):
        super().decode(payload, out)
        out.mul_(0.98)


@frozen
class OffToOneSide(UniformCodec):
    """unbiased"""

    def decode(self, payload, out):
        super().decode(payload, out)
        out.add_(0.02 / 31)  # 2 % of a step of 6 bits


@frozen
class ClaimsContractive(UniformCodec):
    """contractive"""

    contractive = True


@frozen
class NoResidual(UniformCodec):
    """residual"""

    def encode(self, x, payload, *, context, residual=None, new_residual=None):
        if residual is not None:
            raise ConfigError("none")
        super().encode(x, payload, context=context)


@frozen
class SendsResidualTwice(UniformCodec):
    """residual"""

    def encode(self, x, payload, *, context, residual=None, new_residual=None):
        if residual is not None:
            residual = 2 * residual
        super().encode(x, payload, context=context, residual=residual, new_residual=new_residual)


@frozen
class RoughResidual(UniformCodec):
    """residual"""

    def encode(self, x, payload, *, context, residual=None, new_residual=None):
        super().encode(x, payload, context=context, residual=residual, new_residual=new_residual)
        if new_residual is not None:
            new_residual.copy_(new_residual.bfloat16())


@frozen
class ForgetsAtNaN(UniformCodec):
    """residual_nonfinite"""

    def encode(self, x, payload, *, context, residual=None, new_residual=None):
        super().encode(x, payload, context=context, residual=residual, new_residual=new_residual)
        if new_residual is not None:
            new_residual[: self.block_size][~x[: self.block_size].isfinite()] = 0.0


@frozen
class DropsTheSmall(UniformCodec):
    """residual_zero"""

    def encode(self, x, payload, *, context, residual=None, new_residual=None):
        super().encode(x, payload, context=context, residual=residual, new_residual=new_residual)
        if new_residual is not None:
            new_residual[new_residual.abs() < 2.0**-126] = 0.0


@frozen
class IgnoresTheLossScale(UniformCodec):
    """loss_scale"""

    def encode(self, x, payload, *, context, **rest):
        super().encode(x, payload, context=replaced(context, loss_scale=1.0), **rest)


BROKEN = [
    (ForgetsAnOption, {"block_size": 64}),
    (Melts, {}),
    (WrongBits, {}),
    (BytesForNothing, {}),
    (LeavesABlank, {}),
    (Overruns, {}),
    (Scribbles, {}),
    (AddsUp, {}),
    (Forgetful, {}),
    (SameForAllRanks, {}),
    (HalfAKey, {}),
    (NeverZero, {}),
    (LosesNaN, {}),
    (LosesNaNInTheLastElement, {}),
    (MeanLosesNaN, {}),
    (SumsBackwards, {}),
    (MultipliesByTheInverse, {}),
    (ForgetsWhereItStands, {}),
    (KeepsNoDtype, {}),
    (TakesIntegers, {}),
    (ClaimsUnbiased, {}),
    (Shrinks, {}),
    (OffToOneSide, {}),
    (ClaimsContractive, {"num_bits": 2}),
    (NoResidual, {"num_bits": 4}),
    (SendsResidualTwice, {}),
    (RoughResidual, {}),
    (ForgetsAtNaN, {}),
    (DropsTheSmall, {}),
    (IgnoresTheLossScale, {}),
]


@pytest.mark.parametrize(("broken", "options"), BROKEN, ids=[broken.__name__ for broken, _ in BROKEN])
def test_check_finds_the_broken_codec(broken, options):
    codec = broken(**{"num_bits": 6, "block_size": 64, **options})
    with pytest.raises(AssertionError) as failure:
        CHECKS[broken.__doc__](codec)
    assert str(failure.value), "a check says what broke"


def test_every_check_has_a_broken_codec():
    assert {broken.__doc__ for broken, _ in BROKEN} == set(CHECKS)


def test_check_codec_names_codec_check_and_input(monkeypatch):
    check_codec(UniformCodec(num_bits=6, block_size=64))
    codecs.names()  # plugins register once: not in the registry of this test
    monkeypatch.setattr(codecs, "_REGISTRY", {"int6": LosesNaN})
    message = r"int6\(block_size=64\) breaks the contract, nonfinite: nan at element 0 of 133 is lost"
    with pytest.raises(AssertionError, match=message):
        check_codec(LosesNaN(num_bits=6, block_size=64))


def test_codecs_that_lose_nothing_are_not_asked_for_random_bits():
    check_codec(codecs.from_spec("fp32"))
    assert math.isfinite(codecs.from_spec("fp32").wire_bits_per_element(1))
