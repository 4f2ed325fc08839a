"""Data sets for benchmarks. The batch of a step is a pure function of (seed, step, rank, micro-batch)."""

from __future__ import annotations

import pickle
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradq.errors import ConfigError

__all__ = [
    "Cifar10",
    "Dataset",
    "Digits",
    "Images",
    "Prototypes",
    "Text",
    "load_dataset",
    "standard_library_text",
]

NUM_HELD_OUT = 256


class Dataset(ABC):
    """Samples and their targets."""

    @abstractmethod
    def batch(self, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A random training batch: inputs [size, ...] and targets."""

    @abstractmethod
    def held_out(self, size: int, rank: int, world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the validation samples, in batches of at most size; never empty."""


class Text(Dataset):
    """Windows of bytes; the target of each byte is the next one.

    Args:
        train: the bytes to learn from, uint8 [n].
        val: the bytes held out, uint8 [m].
        seq_len: number of bytes in a window.
    """

    def __init__(self, train: Tensor, val: Tensor, seq_len: int) -> None:
        for part in (train, val):
            if len(part) < seq_len + 2:
                raise ConfigError(f"a text of {len(part)} bytes has no window of {seq_len + 1}")
        self.train, self.val, self.seq_len = train, val, seq_len

    def _windows(self, text: Tensor, starts: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        window_BT = text[torch.from_numpy(starts)[:, None] + torch.arange(self.seq_len + 1)].long()
        return window_BT[:, :-1], window_BT[:, 1:]

    def batch(self, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """See `Dataset.batch`: int64 [size, seq_len] twice."""
        return self._windows(self.train, rng.integers(len(self.train) - self.seq_len, size=size))

    def held_out(self, size: int, rank: int, world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Dataset.held_out`."""
        last = len(self.val) - self.seq_len - 1
        starts = np.linspace(0, last, NUM_HELD_OUT, dtype=np.int64)[rank::world_size]
        for start in range(0, len(starts), size):
            yield self._windows(self.val, starts[start : start + size])


class _Arrays(Dataset):
    """Everything in memory; every eighth sample is held out.

    Args:
        inputs: [n, ...].
        targets: int64 [n].
    """

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        held = torch.arange(len(inputs)) % 8 == 7
        self.inputs, self.targets = inputs[~held], targets[~held]
        self.held_inputs, self.held_targets = inputs[held], targets[held]

    def batch(self, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """See `Dataset.batch`."""
        chosen = torch.from_numpy(rng.integers(len(self.inputs), size=size))
        return self.inputs[chosen], self.targets[chosen]

    def held_out(self, size: int, rank: int, world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Dataset.held_out`."""
        own = slice(rank, NUM_HELD_OUT * 4, world_size)
        yield from zip(
            torch.split(self.held_inputs[own], size), torch.split(self.held_targets[own], size), strict=True
        )


class Digits(_Arrays):
    """Scikit-learn's 8×8 digits: fp32 [n, 1, 8, 8], 10 classes."""

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits  # type: ignore[import-untyped,unused-ignore]
        except ImportError:
            raise ConfigError("the digits need scikit-learn: pip install scikit-learn") from None
        digits = load_digits()
        images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
        super().__init__(images, torch.from_numpy(digits.target).long())


class Cifar10(_Arrays):
    """CIFAR-10 from its python batches: fp32 [n, 3, 32, 32], 10 classes.

    Args:
        folder: a folder with `data_batch_1` ... `data_batch_5`, as unpacked from cifar-10-python.tar.gz.
            They are pickles: read only files you trust.
    """

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("data_batch_*"))
        if not files:
            raise ConfigError(
                f"no data_batch_* in {folder}: unpack cifar-10-python.tar.gz and name its folder"
            )
        parts = [pickle.loads(file.read_bytes(), encoding="bytes") for file in files]
        images = np.concatenate([part[b"data"] for part in parts]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([part[b"labels"] for part in parts])
        super().__init__(torch.from_numpy(images).float() / 127.5 - 1, torch.from_numpy(labels).long())


class Images(Dataset):
    """A folder with one folder of images a class, as ImageNet is usually kept; read when needed.

    Args:
        folder: a folder with one folder for each class; if it has folders "train" and "val", these are used.
        size: the side to which images are resized; they are cropped in the middle.
    """

    def __init__(self, folder: Path, size: int = 224) -> None:
        self.size = size
        train, val = folder / "train", folder / "val"
        if train.is_dir() and val.is_dir():
            self.files, self.classes = _image_files(train)
            self.held, _ = _image_files(val)
        else:
            files, self.classes = _image_files(folder)
            self.files = [entry for index, entry in enumerate(files) if index % 8 != 7]
            self.held = files[7::8]
        if not self.files or not self.held:
            raise ConfigError(f"{folder} needs a folder for each class, with at least 8 images in all")

    def _load(self, entries: list[tuple[Path, int]]) -> tuple[Tensor, Tensor]:
        try:
            from PIL import Image, ImageOps
        except ImportError:
            raise ConfigError("image folders need Pillow: pip install pillow") from None
        images = []
        for path, _ in entries:
            with Image.open(path) as image:
                fitted = ImageOps.fit(image.convert("RGB"), (self.size, self.size))
            images.append(torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1)
        return torch.stack(images), torch.tensor([label for _, label in entries])

    def batch(self, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """See `Dataset.batch`: fp32 [size, 3, side, side]."""
        return self._load([self.files[int(index)] for index in rng.integers(len(self.files), size=size)])

    def held_out(self, size: int, rank: int, world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Dataset.held_out`."""
        own = self.held[:: max(1, len(self.held) // NUM_HELD_OUT)][rank::world_size] or self.held[:1]
        for start in range(0, len(own), size):
            yield self._load(own[start : start + size])


def _image_files(folder: Path) -> tuple[list[tuple[Path, int]], list[str]]:
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    suffixes = {".jpg", ".jpeg", ".png", ".bmp"}
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in suffixes
    ]
    return found, classes


class Prototypes(Dataset):
    """Which of 64 fixed random vectors is this, seen through noise? Needs no files; fp32 [n, width].

    Args:
        width: elements of a vector.
    """

    NUM_CLASSES = 64
    NOISE = 2.0

    def __init__(self, width: int) -> None:
        self.prototypes = torch.randn(self.NUM_CLASSES, width, generator=torch.Generator().manual_seed(1))

    def batch(self, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """See `Dataset.batch`."""
        targets = torch.from_numpy(rng.integers(self.NUM_CLASSES, size=size))
        noise = rng.standard_normal((size, self.prototypes.shape[1]), dtype=np.float32)
        return self.prototypes[targets] + self.NOISE * torch.from_numpy(noise), targets

    def held_out(self, size: int, rank: int, world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Dataset.held_out`."""
        rng = np.random.default_rng((7, rank))
        yield self.batch(max(1, NUM_HELD_OUT // world_size), rng)


def standard_library_text(limit: int = 4_000_000) -> tuple[Tensor, Tensor]:
    """The source of Python's standard library as uint8: for training, and every 16th file for validation.

    Args:
        limit: the largest number of bytes in all.

    Raises:
        ConfigError: the library's source is not here.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "site-packages", "dist-packages"}
    files = [file for file in sorted(root.rglob("*.py")) if not skip & set(file.relative_to(root).parts)]
    return _split(files, limit)


def _split(files: list[Path], limit: int) -> tuple[Tensor, Tensor]:
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for index, file in enumerate(files):
        if (size := file.stat().st_size) <= limit:
            parts[index % 16 == 15].append(file.read_bytes())
            limit -= size
    train, val = (torch.frombuffer(bytearray(b"\n".join(part) + b"\n"), dtype=torch.uint8) for part in parts)
    if min(len(train), len(val)) < 1000:
        raise ConfigError(f"no text to train on: {len(files)} files, the 16th of them are for validation")
    return train, val


def _read_text(path: Path) -> tuple[Tensor, Tensor]:
    """A file, its last sixteenth for validation; or all files of a folder."""
    if path.is_dir():
        return _split([file for file in sorted(path.rglob("*")) if file.is_file()], 1 << 30)
    try:
        text = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read text from {path}: {error}") from None
    cut = len(text) * 15 // 16
    return text[:cut], text[cut:]


def load_dataset(spec: str, *, seq_len: int, width: int = 0) -> Dataset:
    """The data set of a scenario.

    Args:
        spec: "text", "text:PATH", "digits", "prototypes", "cifar10:FOLDER" or "images:FOLDER".
        seq_len: number of bytes in a window, for text.
        width: elements of an input, for prototypes.

    Raises:
        ConfigError: unknown, or its files are not there.
    """
    kind, _, where = spec.partition(":")
    if kind == "text":
        return Text(*(_read_text(Path(where)) if where else standard_library_text()), seq_len)
    if kind == "digits":
        return Digits()
    if kind == "prototypes":
        return Prototypes(width or 2048)
    if kind == "cifar10" and where:
        return Cifar10(Path(where))
    if kind == "images" and where:
        return Images(Path(where))
    raise ConfigError(
        f"data={spec!r}: choose from text, text:PATH, digits, prototypes, cifar10:FOLDER, images:FOLDER"
    )
