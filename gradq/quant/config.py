"""What `gradq.quant.prepare` is told: formats, observers, placement, and presets for runtimes."""

from __future__ import annotations

import functools
import logging
import platform
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from gradq.errors import ConfigError
from gradq.quant.formats import Format, parse_format
from gradq.quant.observers import OBSERVERS

__all__ = ["TARGETS", "Config", "chosen_config", "detect_target", "processor_notice"]

_log = logging.getLogger("gradq")

PLACEMENTS = ("auto", "full", "matmul")
BATCH_NORMS = ("fold", "train")
TARGETS = ("x86-vnni", "x86-avx2", "arm", "gpu", "edge-int4")


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a model is quantized.

    Args:
        weights: format of the weights of linear layers and convolutions; None leaves them in float.
        activations: format of the activations; None quantizes weights only. A dynamic format holds for linear
            layers; convolutions then take the static format of the same width (dynamic convolutions are
            slow). Likewise a grouped weight format: convolutions take it per channel.
        embeddings: format of embedding tables; None leaves them in float.
        observer: rule that chooses activation ranges: minmax, average, percentile, mse, entropy.
        weight_observer: the same for weights.
        placement: ``full`` quantizes every activation that convolutions, additions and poolings read or
            write; ``matmul`` only the inputs of weight layers; ``auto`` takes ``matmul`` for models with
            attention or layer norm and ``full`` otherwise.
        batch_norm: ``fold`` into the convolution at prepare, statistics frozen; ``train`` keeps updating
            statistics during QAT and is folded by `gradq.quant.finalize`.
        skip: names (``fnmatch`` patterns) of modules left in float.
        overrides: pairs (pattern, weights format); the first match holds.
        equalize: cross-layer equalization before quantizing (for models with ReLU between convolutions).
        target: name of the target that the formats were chosen for, as `for_target` notes it; formats that
            were chosen for no target are compared with this machine's processor in `prepare`.

    Raises:
        ConfigError: a value outside its legal range; SpecError for a format that cannot be read.
    """

    weights: str | Format | None = "int8"
    activations: str | Format | None = "int8"
    embeddings: str | Format | None = "int8"
    observer: str = "mse"
    weight_observer: str = "mse"
    placement: str = "auto"
    batch_norm: str = "fold"
    skip: tuple[str, ...] = ()
    overrides: tuple[tuple[str, str], ...] = ()
    equalize: bool = False
    target: str | None = None

    def __post_init__(self) -> None:
        """Read every format once, so that a mistake is an error here."""
        for name, value, legal in (
            ("observer", self.observer, tuple(OBSERVERS)),
            ("weight_observer", self.weight_observer, tuple(OBSERVERS)),
            ("placement", self.placement, PLACEMENTS),
            ("batch_norm", self.batch_norm, BATCH_NORMS),
        ):
            if value not in legal:
                raise ConfigError(f"Config.{name} is {value!r}; legal: {', '.join(legal)}")
        if self.target not in (None, *TARGETS):
            raise ConfigError(f"Config.target is {self.target!r}; legal: None, {', '.join(TARGETS)}")
        if isinstance(self.skip, str):
            raise ConfigError(
                f"Config.skip is the string {self.skip!r}; give a tuple of patterns: ({self.skip!r},)"
            )
        for spec, role in (
            (self.weights, "weights"),
            (self.activations, "activations"),
            (self.embeddings, "weights"),
        ):
            if spec is not None:
                parse_format(spec, role)
        for pair in self.overrides:
            if not (isinstance(pair, tuple) and len(pair) == 2):
                raise ConfigError(
                    f"Config.overrides holds {pair!r}; each must be a pair (pattern, weights format)"
                )
            parse_format(pair[1], "weights")

    def is_skipped(self, name: str) -> bool:
        """True if a module stays in float."""
        return any(fnmatchcase(name, pattern) for pattern in self.skip)

    def weight_format(
        self, name: str, *, convolution: bool = False, embedding: bool = False
    ) -> Format | None:
        """Format of a module's weight.

        Args:
            name: the module's qualified name.
            convolution: True for convolutions, which take grouped formats per channel.
            embedding: True for embeddings.
        """
        spec: str | Format | None = next(
            (s for pattern, s in self.overrides if fnmatchcase(name, pattern)), None
        )
        spec = spec or (self.embeddings if embedding else self.weights)
        if spec is None:
            return None
        fmt = parse_format(spec, "weights")
        if convolution and fmt.granularity == "group":
            fmt = replace(fmt, granularity="channel", group_size=0)
        return fmt

    def activation_format(self, *, convolution: bool = False) -> Format | None:
        """Format of an activation that a linear layer (or a convolution) reads."""
        if self.activations is None:
            return None
        fmt = parse_format(self.activations, "activations")
        return replace(fmt, range="static") if convolution else fmt

    @classmethod
    def for_target(cls, target: str = "auto") -> Config:
        """Formats for a runtime environment.

        * ``x86-vnni``: u8 asymmetric activations, s8 per-channel weights: the fast path of ONNX Runtime.
        * ``x86-avx2``: the same with 7-bit weights: without VNNI two u8·s8 products overflow 16 bits.
        * ``arm``: s8 symmetric activations and weights.
        * ``gpu``: s8 symmetric activations and weights, which TensorRT and ``torch._int_mm`` take.
        * ``edge-int4``: 4-bit weights in groups of 32 and activations dynamic per token for linear layers;
          per channel and static for convolutions.
        * ``auto``: what `detect_target` finds on this machine.

        Args:
            target: one of the above.

        Raises:
            ConfigError: another name.
        """
        if target == "auto":
            target = detect_target()
        presets = {
            "x86-vnni": cls(weights="int8-sym-channel", activations="int8-asym"),
            "x86-avx2": cls(weights="int7-sym-channel", activations="int8-asym"),
            "arm": cls(weights="int8-sym-channel", activations="int8-sym"),
            "gpu": cls(weights="int8-sym-channel", activations="int8-sym"),
            "edge-int4": cls(weights="int4-sym-g32", activations="int8-asym-token"),
        }
        if target not in presets:
            raise ConfigError(f"target is {target!r}; legal: {', '.join(TARGETS)}, auto")
        return replace(presets[target], target=target)


def chosen_config(config: Config | None, cpuinfo: str | None = None) -> Config:
    """The configuration that was given, or the one for who gives none.

    That is `Config()`, with weights of 7 bits where this machine is an x86 processor without VNNI: weights of
    8 bits saturate there in ONNX Runtime's fast kernel. A given configuration is taken as it is; if its
    weights saturate on this machine and it names no target, the log says so once, and what to do.

    Args:
        config: the configuration as given to `gradq.quant.prepare`.
        cpuinfo: text of ``/proc/cpuinfo``; read from this machine if None.
    """
    if config is None:
        without_vnni = _processor(cpuinfo) == "x86-avx2"
        return Config(weights="int7", target="x86-avx2") if without_vnni else Config()
    notice = processor_notice(config, cpuinfo)
    if notice:
        _say_once(notice)
    return config


@functools.cache
def _say_once(notice: str) -> None:
    _log.warning(notice)


def processor_notice(config: Config, cpuinfo: str | None = None) -> str:
    """What is wrong with a configuration's formats on this machine's processor; empty if nothing is.

    Args:
        config: formats.
        cpuinfo: text of ``/proc/cpuinfo``; read from this machine if None.
    """
    if config.target is not None or config.weights is None or config.activations is None:
        return ""
    weights = parse_format(config.weights, "weights")
    if (
        weights.bits < 8
        or weights.is_float8
        or weights.granularity == "group"
        or _processor(cpuinfo) != "x86-avx2"
    ):
        return ""
    return (
        f"weights {weights}: this processor has no VNNI, and its fast integer kernel saturates with weights "
        "of 8 bits. Files take a slower, correct kernel here (gradq.export.session turns it on; other "
        "loaders must set session.x64quantprecision). To run on processors like this one prepare with "
        "quant.Config.for_target('x86-avx2'); if the file is for another machine, name it: "
        "quant.Config(target='x86-vnni', ...)"
    )


def _processor(cpuinfo: str | None) -> str:
    """`detect_target` of the processor, whatever GPU is there; empty if it is none of them."""
    path = Path("/proc/cpuinfo")
    try:
        return detect_target(path.read_text() if cpuinfo is None and path.exists() else cpuinfo)
    except ConfigError:
        return ""


def detect_target(cpuinfo: str | None = None) -> str:
    """Which of `TARGETS` this machine is: ``gpu`` if CUDA is there, else by the processor's flags.

    Args:
        cpuinfo: text of ``/proc/cpuinfo``; read from this machine if None.

    Returns:
        ``gpu``, ``x86-vnni``, ``x86-avx2`` or ``arm``.

    Raises:
        ConfigError: a processor that no preset is for; the message says what to pass instead.
    """
    if cpuinfo is None:
        if torch.cuda.is_available():
            return "gpu"
        machine = platform.machine().lower()
        if machine in ("aarch64", "arm64"):
            return "arm"
        path = Path("/proc/cpuinfo")
        cpuinfo = (
            path.read_text() if path.exists() else f"flags: {torch.backends.cpu.get_cpu_capability().lower()}"
        )
    flags = set(cpuinfo.replace(":", " ").split())
    if flags & {"avx512_vnni", "avx_vnni", "amx_int8"}:
        return "x86-vnni"
    if flags & {"avx2", "avx512", "avx512f"}:
        return "x86-avx2"
    if flags & {"asimd", "neon"}:
        return "arm"
    raise ConfigError(
        f"cannot tell which target this machine is; pass one of {', '.join(TARGETS)} to Config.for_target"
    )
