"""Files of torch and NumPy: what is in whole ones, and what broken ones are told."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch

from gradq.errors import ConfigError
from gradq.saved import load_saved

REMEDY = "save a state dict with torch.save"


def torch_bytes(value: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def numpy_bytes(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


STATE = torch_bytes({"weight": torch.ones(64, 4)})
LEGACY = torch_bytes({"weight": torch.ones(64, 4)}, _use_new_zipfile_serialization=False)
ARRAYS = numpy_bytes(weight=np.ones((64, 4), np.float32))
ARRAY = npy_bytes(np.ones((64, 4), np.float32))


class Payload:
    """What an attacker would put into a file."""

    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize(("name", "data"), [("a.pt", STATE), ("a.pt", LEGACY), ("a.npz", ARRAYS)])
def test_whole_files(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert load_saved(tmp_path / name, REMEDY)["weight"].sum() == 256


def test_an_array(tmp_path):
    (tmp_path / "a.npy").write_bytes(ARRAY)
    assert load_saved(tmp_path / "a.npy", REMEDY).shape == (64, 4)


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 64]) + data[middle + 64 :]


BROKEN = {
    "empty.pt": (b"", "it is empty"),
    "empty.npz": (b"", "it is empty"),
    "text.pt": (b"hello, world\n", "another format|only running"),
    "text.npz": (b"hello, world\n", "no such file, or holds Python objects"),
    "text.npy": (b"hello, world\n", "no such file, or holds Python objects"),
    "half.pt": (STATE[: len(STATE) // 2], "cut off"),
    "half-old.pt": (LEGACY[: len(LEGACY) // 2], "cut off"),
    "start.pt": (STATE[:3], "cut off|only running"),
    "start-old.pt": (LEGACY[:20], "cut off|only running"),
    "half.npz": (ARRAYS[: len(ARRAYS) // 2], "cut off"),
    "start.npz": (ARRAYS[:3], "cut off|no such file"),
    "half.npy": (ARRAY[: len(ARRAY) // 2], "cut off"),
    "start.npy": (ARRAY[:8], "cut off"),
    "flipped.npz": (flipped(ARRAYS), "cut off, damaged"),
    "flipped.pt": (flipped(STATE), "has another CRC-32 than when it was saved"),
    "numpy.pt": (ARRAYS, "damaged or of another format"),
    "torch.npz": (STATE, "damaged or of another format|no such file|only running"),
    "onnx.pt": (bytes(range(256)) * 8, "cut off, damaged or of another format|only running"),
    "module.pt": (torch_bytes(torch.nn.Linear(2, 2)), "it holds a torch.nn.modules.linear.Linear"),
    "payload.pt": (torch_bytes(Payload()), "only running its code could load"),
    "payload-raw.pt": (pickle.dumps(Payload()), "only running"),
    "objects.npy": (npy_bytes(np.array([Payload()], dtype=object)), "only running their code"),
    "words.npy": (npy_bytes(np.array(["a", "b"])), "TypeError"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(tmp_path, name, capsys):
    data, message = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=message) as error:
        load_saved(tmp_path / name, REMEDY)
    assert str(error.value).startswith(f"cannot read {tmp_path / name}: ")
    assert str(error.value).endswith(f"; {REMEDY}")
    assert len(str(error.value)) < 500
    assert capsys.readouterr().out == "", "nothing of the file was run"


@pytest.mark.parametrize(("name", "message"), [("none.pt", "No such file"), ("folder.pt", "Is a directory")])
def test_what_is_not_there(tmp_path, name, message):
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(ConfigError, match=message):
        load_saved(tmp_path / name, REMEDY)
