"""Where compiled kernels are kept and who compiles them: nothing stale, broken or foreign; no hang."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import gradq
from gradq.codecs.rotated import cpu as rotated
from gradq.codecs.topk import cpu as topk
from gradq.codecs.uniform import cpu as uniform
from gradq.kernels import numba_cache, turns
from gradq.kernels.numba_compile import variant

SOURCES = Path(gradq.__file__).parent


def python(code: str, *, cwd: Path | None = None, **variables: str) -> str:
    """Run code in a new process with these variables; returns stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


# the smallest kernel there is: compiled in about a second
MEAN = """
    import torch
    from gradq.codecs.exact import cpu
    from gradq.codecs.exact.format import ExactFormat
    rows = torch.arange(24.0).reshape(2, 12)
    out = torch.zeros(12)
    cpu.decode_mean(rows.view(torch.uint8), out, ExactFormat(torch.float32))
    assert torch.equal(out, rows.mean(0)), out
    print("misses", sum(cpu._exact_mean.stats.cache_misses.values()))
"""


# --- the place -----------------------------------------------------------------------------------------


def test_kernels_of_other_sources_are_never_used(tmp_path: Path) -> None:
    """Two ranks could send different bytes under one version of the wire format."""
    shutil.copytree(SOURCES, tmp_path / "gradq", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from gradq.kernels.numba_cache import digest; import gradq; print(gradq.__file__, digest())"
    variables = {"PYTHONPATH": str(tmp_path)}
    where, same = python(code, cwd=tmp_path, **variables).split()
    assert Path(where).is_relative_to(tmp_path)
    assert same == numba_cache.digest()
    changed = tmp_path / "gradq" / "kernels" / "numba_tools.py"
    changed.write_text(changed.read_text() + "\n# a change\n")
    assert python(code, cwd=tmp_path, **variables).split()[1] != same


def test_without_a_place_kernels_are_compiled_and_the_remedy_is_said_once() -> None:
    code = MEAN + "    cpu.decode_mean(rows.view(torch.uint8), out, ExactFormat(torch.bfloat16))\n"
    said = python(code, NUMBA_CACHE_DIR="/proc/gradq")
    assert said.count("set NUMBA_CACHE_DIR to a folder that this user can write to") == 1
    assert "misses 1" in said


def double(x):
    return x + x


def test_kernels_of_one_name_in_two_modules_have_two_files() -> None:
    """The folders of the algorithms all have a module `cpu` with functions of the same names."""
    names = {
        numba_cache.KernelCache(kernel.py_func, "8")._name
        for kernel in (uniform._decoder(8, 256), topk._decoder(8), rotated._decoder(4, False))
    }
    assert len(names) == 3, names


def start() -> int:
    """A new process, as far as the cache can tell: how often it had to compile."""
    kernel = variant("tested")(double)
    assert kernel(21) == 42
    return sum(kernel.stats.cache_misses.values())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch):
    """An empty cache; the folder that kernels will be in."""
    monkeypatch.setattr(numba_cache.config, "CACHE_DIR", str(tmp_path))
    numba_cache.folders.cache_clear()
    yield tmp_path / f"gradq-kernels-{numba_cache.digest()}"
    numba_cache.folders.cache_clear()


def test_a_broken_file_is_compiled_again(folder: Path, caplog) -> None:
    assert (start(), start()) == (1, 0)
    for data in folder.glob("*.nbc"):
        data.write_bytes(data.read_bytes()[:1000])
    assert (start(), start()) == (1, 0)
    assert "cannot read the compiled kernel" in caplog.text
    for index in folder.glob("*.nbi"):
        index.write_bytes(b"nothing")
    assert start() == 1


def test_kernels_that_an_image_brought_are_used_where_nothing_can_be_written(
    folder: Path, monkeypatch
) -> None:
    assert start() == 1
    numba_cache.folders.cache_clear()
    monkeypatch.setattr(numba_cache, "_can_write", lambda folder: False)
    assert start() == 0


def test_a_full_disk_is_said_and_does_not_stop_training(tmp_path: Path) -> None:
    full = "    import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
    said = python(MEAN.replace("    rows =", full + "    rows =", 1), NUMBA_CACHE_DIR=str(tmp_path))
    assert "cannot keep its compiled kernels" in said
    assert "misses 1" in said


def test_folders_that_nobody_uses_are_removed(folder: Path, tmp_path: Path) -> None:
    old, recent = tmp_path / "gradq-kernels-old", tmp_path / "gradq-kernels-recent"
    for other in (old, recent):
        other.mkdir()
        (other / "kernel.nbc").write_bytes(b"")
    month_ago = time.time() - 31 * 24 * 3600
    os.utime(old, (month_ago, month_ago))
    assert numba_cache.folders() == ((folder,), folder)
    assert not old.exists()
    assert recent.exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_kernels_of_another_user_are_not_used(folder: Path, tmp_path: Path, caplog) -> None:
    """A compiled kernel is code: in a folder like /tmp anybody could have put it there."""
    tmp_path.chmod(0o1777)
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    assert numba_cache.folders() == ((), None)
    assert "belong to another user" in caplog.text
    tmp_path.chmod(0o755)  # a folder of the user's own choice that others cannot write to is trusted
    numba_cache.folders.cache_clear()
    assert numba_cache.folders() == ((folder,), folder)


# --- who compiles --------------------------------------------------------------------------------------

HOLD = """
    import sys, time
    from pathlib import Path
    from gradq.kernels.turns import Lock
    lock = Lock()
    assert lock.take_or_wait(Path(sys.argv[1]), lambda: None) is None
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held(tmp_path: Path):
    """A lock that another process holds: its path and the process."""
    path = tmp_path / "kernel.lock"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield path, process
    process.kill()
    process.wait()
    process.stdout.close()


def test_what_another_process_compiles_comes_last_and_is_loaded(held) -> None:
    path, _ = held
    done, looks, lock = [], iter([None] * 5 + ["loaded"] * 5), turns.Lock()
    turns.in_turns(
        [
            lambda: done.append(lock.take_or_wait(path, lambda: next(looks))),
            lambda: done.append("other"),
        ]
    )
    assert done == ["other", "loaded"]


def test_the_lock_of_a_process_that_died_is_free(held) -> None:
    path, process = held
    process.kill()
    lock = turns.Lock()
    assert lock.take_or_wait(path, lambda: None) is None
    lock.drop()


def test_a_process_that_hangs_holds_nobody_up(held, monkeypatch) -> None:
    path, process = held
    process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(turns, "PATIENCE", 0.3)
    start = time.monotonic()
    assert turns.Lock().take_or_wait(path, lambda: None) is None
    assert time.monotonic() - start >= 0.3


def test_threads_take_turns_each_for_itself(tmp_path: Path) -> None:
    """Ranks may be threads: one that begins within another's turn and ends after it leaves nothing behind."""
    begun, ended = threading.Event(), threading.Event()
    lock, path = turns.Lock(), tmp_path / "kernel.lock"

    def first() -> None:
        turns.in_turns([lambda: lock.take_or_wait(path, lambda: None), begun.set, lambda: ended.wait(60)])

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(60)
    turns.in_turns([lambda: None])
    looks = iter([None] * 3 + ["loaded"])
    assert turns.Lock().take_or_wait(path, lambda: next(looks)) == "loaded", (
        "the first one has its lock still"
    )
    ended.set()
    thread.join(60)
    assert turns.Lock().take_or_wait(path, lambda: None) is None, "the lock is free, and nobody is in a turn"


def test_an_error_frees_the_locks(tmp_path: Path) -> None:
    path = tmp_path / "kernel.lock"
    first, second = turns.Lock(), turns.Lock()

    def compile_badly() -> None:
        first.take_or_wait(path, lambda: None)
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        turns.in_turns([compile_badly])
    turns.in_turns([lambda: second.take_or_wait(path, lambda: None)])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_share_the_work(tmp_path: Path) -> None:
    """Every kernel is compiled by one of two processes that start together."""
    code = textwrap.dedent("""
        from gradq.codecs import from_spec
        from gradq.codecs.uniform import cpu
        from_spec("int8").warm_up()
        kernels = [cpu._encoder(8, True, False, 256), cpu._decoder(8, 256)]
        print(sum(sum(kernel.stats.cache_misses.values()) for kernel in kernels))
    """)
    variables = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(2)
    ]
    assert sum(int(process.communicate(timeout=500)[0]) for process in processes) == 2
