"""`bundle` packs a model for several processors; `load` picks the variant for this one.

A bundle is a folder or a zip file that holds ``manifest.json`` and one ONNX file for each variant. `load`
looks at the processor and drops the variants that would be wrong or cannot run here. It takes the variant
made for this processor unless another one is clearly faster here, and says what it chose and why.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from gradq.errors import ConfigError, ExportError
from gradq.export.capture import example_inputs_of
from gradq.export.comparison import input_names, split_batch
from gradq.export.files import atomic, require
from gradq.export.inputs import named_leaves
from gradq.export.report import VerifyReport
from gradq.export.runtime import DTYPES, features, feed, session
from gradq.export.timing import interleave, summarize
from gradq.export.variants import VARIANTS, variant
from gradq.export.verification import verify
from gradq.export.write import ExportReport, float_onnx, onnx
from gradq.quant.batches import unwrap

__all__ = ["Bundle", "bundle", "load", "verify_bundle"]

_CLEARLY_FASTER = 1.2  # ratio that another variant must reach in nine tenths of the rounds to be taken
_FORMAT = 1
_FLOAT = "float"  # name of the variant that is right on every processor
_MANIFEST = "manifest.json"
# Processor → the variants that are right on it, best first. For "other" processors no kernels are known.
_SUITS = {
    "x86-vnni": ("x86-vnni", "edge-int4", "x86-avx2", "arm"),
    "x86-avx2": ("x86-avx2", "edge-int4", "x86-vnni"),
    "arm": ("arm", "edge-int4", "x86-vnni", "x86-avx2"),
    "other": ("x86-vnni", "x86-avx2", "arm", "edge-int4"),
}


def bundle(
    models: nn.Module | Mapping[str, nn.Module],
    out: str | os.PathLike[str],
    *,
    variants: Sequence[str] = ("x86-vnni", "x86-avx2", "arm"),
    include_float: bool = True,
    example_inputs: Any = None,
    accuracy: Mapping[str, float] | None = None,
) -> dict[str, ExportReport]:
    """Write a model for several processors as one folder or zip file.

    Args:
        models: a calibrated model, from which `gradq.export.variant` makes the variants; or a mapping from
            target to a model prepared for it (``quant.Config.for_target``).
        out: a name that ends with ``.zip``, or a folder to make; what stood there is replaced at the end.
        variants: targets for which variants are made if `models` is one model: ``x86-vnni``, ``x86-avx2``,
            ``arm``, ``edge-int4`` (for batch 1).
        include_float: whether the bundle holds the float model, too, as the variant ``float``, for processors
            on which it is clearly faster.
        example_inputs: inputs to trace with, as for `gradq.export.onnx`.
        accuracy: target → accuracy of that variant, which the manifest keeps.

    Returns:
        Target → report of what was written.

    Raises:
        ConfigError: an unknown target, or no target at all.
        ExportError: the errors of `gradq.export.onnx`; nothing is left behind.
    """
    named = dict(models) if isinstance(models, Mapping) else {t: variant(models, t) for t in variants}
    unknown = set(named) - set(VARIANTS)
    if unknown or not named:
        raise ConfigError(f"variants are {sorted(named)}; legal: {', '.join(VARIANTS)}, at least one")
    target = Path(out)
    reports: dict[str, ExportReport] = {}
    manifest: dict[str, Any] = {"format": _FORMAT, "variants": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for processor, model in named.items():
            file = folder / f"{processor}.onnx"
            report = onnx(model, file, example_inputs=example_inputs, metadata={"gradq.target": processor})
            reports[processor] = report
            manifest["variants"].append(
                {
                    "name": processor,
                    "file": file.name,
                    "sha256": _digest(file),
                    "size_bytes": report.size_bytes,
                    "average_weight_bits": round(report.average_bits, 3),
                    "accuracy": (accuracy or {}).get(processor),
                }
            )
        if include_float:
            file = folder / f"{_FLOAT}.onnx"
            size = float_onnx(next(iter(named.values())), file, example_inputs=example_inputs)
            known = (accuracy or {}).get(_FLOAT)
            manifest["variants"].append(
                {"name": _FLOAT, "file": file.name, "sha256": _digest(file), "size_bytes": size,
                 "average_weight_bits": 32, "accuracy": known}
            )  # fmt: skip
        manifest["gradq"] = report.metadata["gradq.version"]
        manifest["inputs"] = _describe(next(iter(named.values())), example_inputs, folder / file.name)
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        _place(folder, target)
    return reports


def _describe(model: nn.Module, example_inputs: Any, file: Path) -> list[dict[str, Any]]:
    """Name, type, shape of one sample, and the largest integer of every input: enough to time a variant."""
    args, kwargs = example_inputs_of(unwrap(model), example_inputs)
    names = input_names(unwrap(model), args, kwargs)
    inputs, _ = split_batch((*args, *(kwargs[n] for n in names[len(args) :])), names)
    leaves = named_leaves(inputs)
    out = []
    for name in [i.name for i in session(file, precise=False).get_inputs()]:
        value = leaves[name]
        array = value.numpy() if isinstance(value, Tensor) else np.asarray(value)
        high = int(array.max(initial=1)) if array.dtype.kind in "iu" else None
        out.append({"name": name, "dtype": str(array.dtype), "shape": list(array.shape), "high": high})
    return out


def _place(folder: Path, target: Path) -> None:
    """Move the finished files to their place, all of them or none."""
    if target.suffix == ".zip":
        with atomic(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for file in sorted(folder.iterdir()):
                archive.write(file, file.name)
        return
    if target.exists() and not (target / _MANIFEST).exists():
        raise ExportError(f"{target} exists and is no bundle; remove it or choose another name")
    try:
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error.strerror} ({target.parent})") from error
    try:
        for file in folder.iterdir():
            shutil.copy2(file, beside / file.name)
        beside.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        hasher = hashlib.sha256()
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


@dataclass
class Bundle:
    """A loaded bundle, which is called with arrays or tensors.

    Attributes:
        chosen: name of the variant that runs.
        why: one sentence that says why this variant runs.
        timings_ms: variant → median latency in milliseconds, for the variants that were timed.
        session: the ``onnxruntime.InferenceSession``.
        manifest: contents of the bundle's ``manifest.json``.
    """

    chosen: str
    why: str
    timings_ms: dict[str, float]
    session: Any = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)

    def __call__(self, *inputs: Any) -> list[Any]:
        """Run the model.

        Args:
            inputs: arrays or tensors, in the order of the model's inputs.

        Returns:
            numpy arrays.

        Raises:
            ConfigError: the inputs do not fit; names, types and shapes are in the message.
        """
        result: list[Any] = self.session.run(None, feed(self.session, inputs))
        return result


def load(
    path: str | os.PathLike[str],
    *,
    batch_size: int = 1,
    threads: int = 1,
    seconds: float = 1.0,
    processor: str | None = None,
    choose: str | None = None,
) -> Bundle:
    """Load the variant of a bundle for this processor.

    The variant made for the processor is taken, unless another one (the float model included) was at least a
    fifth faster in nine tenths of the rounds: replicas on equal machines take the same one. To pin the choice
    pass `choose`, or ``seconds=0``, which times nothing.

    Args:
        path: folder or zip file that `bundle` wrote.
        batch_size: batch size of the inputs that the variants are timed with.
        threads: number of threads of the session.
        seconds: time for timing all variants together; with 0 the first variant that suits the processor is
            taken.
        processor: name of the processor to choose for; this machine's if None.
        choose: name of the variant to take; the rule above decides if None.

    Raises:
        ExportError: no such bundle, a damaged file, or no variant for this processor.
        ConfigError: `choose` names no variant.
    """
    require("onnxruntime")
    with _opened(Path(path)) as folder:  # a session holds the file in memory
        manifest = _manifest(folder, path)
        found = {v["name"]: v for v in manifest["variants"]}
        if choose is not None and choose not in found:
            raise ConfigError(f"choose is {choose!r}; the bundle has {', '.join(found)}")
        here = processor or features()
        names = [choose] if choose else [n for n in _suits(here) if n in found]
        if not names:
            raise ExportError(f"{path} has no variant for {here}; it has {', '.join(found)}")
        sessions: dict[str, Any] = {}
        for name in names:
            file = folder / found[name]["file"]
            if not file.is_file():
                raise ExportError(f"{path} has no file {file.name}, which its manifest names")
            if _digest(file) != found[name]["sha256"]:
                raise ExportError(
                    f"{file.name} in {path} is damaged: its checksum differs from the manifest's; "
                    "export it again"
                )
            sessions[name] = session(file, threads=threads)
    timings = {}
    if len(names) > 1 and seconds > 0:
        sample = _sample(manifest["inputs"], batch_size, sessions[names[0]])
        calls = {n: lambda s=s: s.run(None, sample) for n, s in sessions.items()}
        clock = time.thread_time if threads == 1 else time.perf_counter
        times = summarize(interleave(calls, seconds=seconds, min_rounds=5, clock=clock), names[0])
        timings = {n: latency.median_ms for n, latency in times.items()}
        faster = [n for n in names[1:] if times[n].ratio_low > _CLEARLY_FASTER]
        chosen = min(faster, key=timings.__getitem__, default=names[0])
    else:
        chosen = names[0]
    return Bundle(
        chosen=chosen,
        why=_reason(here, chosen, choose, timings, batch_size, sorted(set(found) - set(names)), names[0]),
        timings_ms=timings,
        session=sessions[chosen],
        manifest=manifest,
    )


def _suits(processor: str) -> tuple[str, ...]:
    """Variants that are right on a processor, best first."""
    return (*_SUITS.get(processor, _SUITS["other"]), _FLOAT)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Path]:
    """The folder of a bundle; a zip file is unpacked into a temporary one."""
    if path.is_dir():
        yield path
        return
    if not path.exists():
        raise ExportError(f"{path} does not exist")
    with tempfile.TemporaryDirectory(prefix="gradq-bundle-", ignore_cleanup_errors=True) as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if Path(name).name != name:
                        raise ExportError(f"{path} is no bundle: it holds the path {name!r}")
                archive.extractall(folder)
        except ExportError:
            raise
        except Exception as error:  # of zipfile or zlib; also for passwords and unknown compressions
            raise ExportError(
                f"{path} is neither a bundle's folder nor its zip file, or it is damaged: {error}; export it "
                "again"
            ) from error
        yield Path(folder)


def _manifest(folder: Path, path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path} has no readable {_MANIFEST}: {error}; export it again") from error
    if not isinstance(manifest, dict):
        raise ExportError(f"{path}: {_MANIFEST} holds a {type(manifest).__name__}, no table; export it again")
    if manifest.get("format") != _FORMAT:
        raise ExportError(
            f"{path} has format {manifest.get('format')!r}; this gradq reads {_FORMAT}: export it again"
        )
    if problem := _problem(manifest):
        raise ExportError(f"{path}: {_MANIFEST} is damaged: {problem}; export it again")
    return manifest


def _problem(manifest: Mapping[str, Any]) -> str:
    """The first thing that `load` needs and the manifest lacks, as text; empty if it lacks nothing."""
    variants, inputs = manifest.get("variants"), manifest.get("inputs")
    if not isinstance(variants, list) or not variants:
        return "it lists no variants"
    for number, entry in enumerate(variants):
        for key in ("name", "file", "sha256"):
            if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
                return f"variant {number} has no {key}"
        if Path(entry["file"]).name != entry["file"]:
            return f"variant {number} names the file {entry['file']!r} outside of the bundle"
    if not isinstance(inputs, list):
        return "it lists no inputs"
    for number, entry in enumerate(inputs):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            return f"input {number} has no name"
        shape, dtype, high = entry.get("shape"), entry.get("dtype"), entry.get("high")
        if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**31 for size in shape):
            return f"the shape of input {entry['name']!r} is {shape!r}"
        if dtype not in DTYPES.values():
            return f"the type of input {entry['name']!r} is {dtype!r}"
        if high is not None and (type(high) is not int or not 0 <= high < 2**63 - 1):
            return f"the largest value of input {entry['name']!r} is {high!r}"
    return ""


def _sample(inputs: Sequence[Mapping[str, Any]], batch_size: int, running: Any) -> dict[str, Any]:
    """Random inputs with the shapes that the manifest gives."""
    wanted = [i.name for i in running.get_inputs()]
    if [spec["name"] for spec in inputs] != wanted:
        raise ExportError(f"the manifest's inputs are not the model's, {wanted}; export the bundle again")
    generator = np.random.default_rng(0)
    sample = {}
    for spec, free in zip(inputs, running.get_inputs(), strict=True):
        shape = list(spec["shape"])
        if free.shape and not isinstance(free.shape[0], int):
            shape[0] = batch_size
        if spec["high"] is None:
            value = generator.standard_normal(shape).astype(spec["dtype"])
        else:
            value = generator.integers(0, spec["high"] + 1, shape).astype(spec["dtype"])
        sample[spec["name"]] = value
    return sample


def _reason(
    here: str,
    chosen: str,
    asked: str | None,
    timings: Mapping[str, float],
    batch_size: int,
    out: Sequence[str],
    first: str,
) -> str:
    if asked is not None:
        return f"{chosen}: asked for"
    text = f"{chosen}: on {here} "
    if timings:
        others = ", ".join(f"{n} {t:.3g} ms" for n, t in timings.items() if n != chosen)
        text += f"{timings[chosen]:.3g} ms at batch {batch_size}, against {others}"
        text += (
            " (the one made for it)" if chosen == first else f" ({first} is made for it, and clearly slower)"
        )
    else:
        text += "the first that suits"
    if out:
        text += f"; not for this processor: {', '.join(out)}"
    return text


def verify_bundle(
    path: str | os.PathLike[str],
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    processor: str | None = None,
    **options: Any,
) -> dict[str, VerifyReport]:
    """Check every variant of a bundle that is right on this processor against the float model.

    Args:
        path: bundle that was made from one model.
        model: quantized model that the bundle was made from.
        loader: batches, as for `gradq.export.verify`; it is iterated once for each variant.
        processor: name of the processor whose variants are checked; this machine's if None.
        options: further arguments for `gradq.export.verify`. By default nothing is timed, and a variant that
            fails raises no error.

    Returns:
        Variant → its report.

    Raises:
        ExportError: no such bundle, or a damaged one.
    """
    reports = {}
    with _opened(Path(path)) as folder:
        found = {v["name"]: v for v in _manifest(folder, path)["variants"]}
        for name in [n for n in _suits(processor or features()) if n in found and n != _FLOAT]:
            chosen: dict[str, Any] = {"batch_sizes": (), "strict": False, "show_progress": False, **options}
            reports[name] = verify(folder / found[name]["file"], variant(model, name), loader, **chosen)
    return reports
