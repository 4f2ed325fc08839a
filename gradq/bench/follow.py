"""Run a script under torchrun on this machine and follow the JSON lines it logs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradq.bench.reading import read_lines
from gradq.errors import BenchError

__all__ = ["follow_torchrun"]

Record = dict[str, Any]


def follow_torchrun(
    script: Path,
    options: Mapping[str, object],
    *,
    num_ranks: int,
    log: Path,
    flags: Sequence[str] = (),
    show: Callable[[list[Record]], None] = lambda lines: None,
    poll_s: float = 0.25,
) -> list[Record]:
    """Run `torchrun script --name=value ...` to its end.

    Args:
        script: a script that takes `--log-file` and writes JSON lines there.
        options: the options of the command by name; underscores become dashes.
        num_ranks: the number of processes on this machine.
        log: the file; an old one is removed.
        flags: the further arguments.
        show: a function that is called with all lines so far, every `poll_s` seconds.
        poll_s: time between two calls of `show`, in seconds.

    Returns:
        The lines of the log.

    Raises:
        BenchError: the script failed; its last words are in the message.
    """
    log.unlink(missing_ok=True)
    errors = log.with_suffix(".stderr")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), str(script)]
    command += flags
    given = {**options, "log_file": log}
    command += [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | os.environ
    with (
        errors.open("w") as stderr,
        subprocess.Popen(command, env=environment, stdout=stderr, stderr=stderr) as process,
    ):
        try:
            while process.poll() is None:
                time.sleep(poll_s)
                show(read_lines(log))
        finally:
            process.terminate()
    if process.returncode:
        raise BenchError(f"{script.name} with {dict(options)} failed:\n{errors.read_text()[-3000:]}")
    errors.unlink()
    return read_lines(log)
