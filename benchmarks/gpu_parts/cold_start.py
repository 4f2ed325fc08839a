"""How long the first step waits for Triton: `Codec.warm_up` with an empty cache, then with a full one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_parts.setting import Setting

__all__ = ["cold_start"]

SPECS = ("int8", "int4", "int3", "rot4", "bf16")
CODE = """
import sys, time
import torch
from gradq.codecs import from_spec
if sys.argv[2] == "cuda":
    torch.zeros(1, device="cuda")
start = time.perf_counter()
from_spec(sys.argv[1]).warm_up(torch.device(sys.argv[2]), 2)
if sys.argv[2] == "cuda":
    torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def cold_start(setting: Setting) -> None:
    """A process of its own for each codec, twice with the same cache."""
    root = str(Path(__file__).parents[2])
    for spec in SPECS[:1] if setting.dry_run else SPECS:
        with tempfile.TemporaryDirectory(prefix="gradq-triton-") as cache:
            environment = os.environ | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": root}
            if setting.dry_run:
                environment["GRADQ_KERNELS"] = "triton"
            seconds = []
            for _ in range(2):
                command = [sys.executable, "-c", CODE, spec, setting.device.type]
                done = subprocess.run(
                    command, env=environment, capture_output=True, text=True, timeout=max(5, setting.left - 2)
                )
                assert done.returncode == 0, f"{spec}: {done.stderr[-1000:]}"
                seconds.append(float(done.stdout))
            files = sum(path.is_file() for path in Path(cache).rglob("*"))
        setting.add(codec=spec, cold_s=round(seconds[0], 3), warm_s=round(seconds[1], 3), files=files)
