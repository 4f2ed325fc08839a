"""Files that people saved with torch or NumPy, loaded without running code; a broken one is named."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from gradq.errors import ConfigError

__all__ = ["damaged_part", "load_saved"]


def load_saved(path: Path, remedy: str) -> Any:
    """What a file holds.

    Args:
        path: the file: of `numpy.save` (.npy), `numpy.savez` (.npz), or else of `torch.save`.
        remedy: the advice at the end of a message, such as "save a state dict with torch.save".

    Returns:
        A tensor for .npy, tensors by name for .npz, and what torch.load gives for the rest.

    Raises:
        ConfigError: the file is not there, is empty, cut off, of another format, or holds objects that only
            running code can load, or bytes of it have changed (which .npy files do not show); the message
            names the file and the remedy.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    try:
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on the protocol: the error says enough
            if not file.peek(1):
                raise ConfigError(f"cannot read {path}: it is empty; {remedy}")
            if path.suffix == ".npy":
                return torch.from_numpy(np.load(file, allow_pickle=False))
            if path.suffix == ".npz":
                arrays = np.load(file, allow_pickle=False)
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
            if (part := damaged_part(file)) is not None:
                raise ConfigError(
                    f"cannot read {path}: {part} has another CRC-32 than when it was saved; {remedy}"
                )
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except Exception as error:  # zipfile's, pickle's, zlib's, torch's and NumPy's own errors
        raise ConfigError(f"cannot read {path}: {_reason(error)}; {remedy}") from error


def damaged_part(file: IO[bytes]) -> str | None:
    """The first part of a zip file, such as torch.save writes, whose bytes have changed since it was saved.

    torch.load does not compare the CRC-32 that torch.save writes (unless
    `torch.serialization.set_crc32_options(False)` was called: such files look damaged here).

    Returns:
        The name of the part; None if there is none, or the file is no zip file.
    """
    if not zipfile.is_zipfile(file):
        return None
    with zipfile.ZipFile(file) as archive:
        return archive.testzip()


def _reason(error: Exception) -> str:
    """Why, in a few words; torch and NumPy advise to run the file's code."""
    text = str(error)
    if (blocked := re.search(r"GLOBAL ([\w.]+)", text)) is not None:
        return f"it holds a {blocked[1]}, which only running its code could load"
    if "allow_pickle" in text or "Weights only load failed" in text:
        return "it is no such file, or holds Python objects, which only running their code could load"
    line = text.strip().partition("\n")[0].partition(". ")[0]
    return f"it is cut off, damaged or of another format ({type(error).__name__}: {line[:100]})"
