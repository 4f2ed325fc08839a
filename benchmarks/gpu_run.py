"""One command for the minutes in which a GPU is at hand: it proves as much as can be proven, worth first.

Every part runs in a process of its own, with a limit; one that fails or is cut off is recorded with its error
and the run goes on. Results stand in FOLDER/record.jsonl as soon as they are known, a line each, and
FOLDER/summary.md is written after every part, so that a run which is cut off keeps what it had. Run again
with the same folder, or with --resume and the record of another run, it takes the parts up that are missing.

    python benchmarks/gpu_run.py --minutes 8 --out out/gpu
    python benchmarks/gpu_run.py --dry-run --out out/dry    # the same parts, tiny, without a GPU

gradq need not be installed: the checkout that this file stands in is used. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # gradq of this checkout, installed or not

from gpu_parts.setting import RECORD, Setting, read_record  # noqa: E402

START_S = 12  # what a part's process takes to start: torch, and a GPU's context


@dataclass(frozen=True)
class Part:
    """A part of the run: where its function is, and how long it may take in a run of eight minutes."""

    name: str
    module: str
    function: str
    limit_s: int


# ordered by worth; the limits of those before `table` make eight minutes together, and most need less
PARTS = (
    Part("kernels", "equality", "kernels", 90),
    Part("averages", "training", "averages", 45),
    Part("speeds-100mb", "speeds", "speeds_100mb", 75),
    Part("waits", "waits", "waits", 45),
    Part("train-25m", "training", "train_25m", 75),
    Part("nccl", "training", "nccl", 60),
    Part("fsdp-2", "sharded", "fsdp_two_ranks", 40),
    Part("fsdp-1", "sharded", "fsdp_one_rank", 30),
    Part("memory", "training", "memory", 40),
    Part("int-mm", "int_mm", "int_mm", 40),
    Part("speeds-1gb", "speeds", "speeds_1gb", 45),
    Part("cold-start", "cold_start", "cold_start", 60),
    Part("train-124m", "training", "train_124m", 75),
    Part("table", "equality", "table", 120),
    Part("contract", "equality", "contract", 240),
)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(part.name for part in PARTS)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default: 8)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    parser.add_argument("--resume", type=Path, help=f"{RECORD} of an earlier run, whose results are kept")
    parser.add_argument("--only", default="", help=f"parts, with commas: {names}")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, without a GPU")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # how the run starts a part's process
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.only.split(",") if name and name not in names.split(", ")]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: no such part; choose from {names}")
    return arguments


def run_part(arguments: argparse.Namespace) -> int:
    """What a part's process does: call its function, and say how it ended."""
    part = next(part for part in PARTS if part.name == arguments.part)
    setting = Setting(part.name, arguments.out, arguments.deadline, arguments.dry_run)
    try:
        module = __import__(f"gpu_parts.{part.module}", fromlist=[part.function])
        function: Callable[[Setting], None] = getattr(module, part.function)
        function(setting)
    except BaseException:
        print(traceback.format_exc(), file=sys.stderr)
        return 1
    return 0


def facts(dry_run: bool) -> dict[str, Any]:
    """What a reader needs to judge the record."""
    import torch
    import triton

    from gradq.bench.records import environment, git_commit

    found = environment() | {"commit": git_commit(ROOT), "triton": triton.__version__, "dry_run": dry_run}
    if not dry_run:
        device = torch.cuda.get_device_properties(0)
        found |= {"gpu": device.name, "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda}
        found |= {"multiprocessors": device.multi_processor_count, "l2_bytes": device.L2_cache_size}
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the parts that are missing, until the time is up; the record's lines."""
    end = time.time() + 60 * arguments.minutes
    rows = read_record(arguments.out)
    ended = {row["part"]: row["status"] for row in rows if "status" in row}
    chosen = [p for p in PARTS if not arguments.only or p.name in arguments.only.split(",")]
    missing = [p for p in chosen if ended.get(p.name) != "ok"]
    missing.sort(key=lambda part: part.name in ended)  # what has failed before comes after the others
    scale = max(arguments.minutes / 8, 0.1)
    for part in missing:
        left = end - time.time()
        if left < START_S:
            break
        limit = left if arguments.dry_run else min(left, part.limit_s * scale)
        started = time.time()
        status, error = in_process(part, arguments, limit)
        seconds, setting = time.time() - started, Setting(part.name, arguments.out, end, arguments.dry_run)
        setting.add(status=status, seconds=round(seconds, 1), **({"error": error} if error else {}))
        rows = read_record(arguments.out)
        write_summary(arguments.out, rows)
        what = error.splitlines()[-1] if error else ""
        print(f"{part.name:14s} {status:8s} {seconds:6.1f} s  {what}", flush=True)
    write_summary(arguments.out, rows)
    return rows


def in_process(part: Part, arguments: argparse.Namespace, limit: float) -> tuple[str, str]:
    """Run a part in a process group of its own: how it ended, and the end of what it printed if not well."""
    command = [sys.executable, __file__, "--part", part.name, "--out", str(arguments.out)]
    command += ["--deadline", str(time.time() + limit), *(["--dry-run"] if arguments.dry_run else [])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    environment["GRADQ_KERNELS"] = "reference"  # the truth on the CPU; it needs no compiler
    if arguments.dry_run:
        environment |= {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore::RuntimeWarning"}
    log = arguments.out / f"{part.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = "ok" if process.wait(timeout=limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timeout"
        finally:
            end_group(process)
    text = log.read_text(errors="replace")[-4000:].strip()
    log.unlink()
    return status, "" if status == "ok" else text


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a part's process with its ranks and pools."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write_summary(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The record as a page: how each part ended, then its results, the newest of each part."""
    known = next((row for row in reversed(rows) if row["part"] == "environment"), {})
    lines = ["# GPU run", ""]
    lines += [f"- {key}: {value}" for key, value in known.items() if key != "part"]
    lines += ["", "| part | ended | seconds | error |", "|---|---|---|---|"]
    for part in PARTS:
        last = [row for row in rows if row["part"] == part.name and "status" in row]
        if last:
            error = last[-1].get("error", "").strip().splitlines()
            what = error[-1][:200].replace("|", "/") if error else ""
            lines.append(f"| {part.name} | {last[-1]['status']} | {last[-1]['seconds']} | {what} |")
        else:
            lines.append(f"| {part.name} | not reached | | |")
    for part in PARTS:
        own = [row for row in rows if row["part"] == part.name]
        ends = [k for k, row in enumerate(own[:-1]) if "status" in row]  # of earlier attempts
        results = [row for row in own[ends[-1] + 1 if ends else 0 :] if "status" not in row]
        if results:
            lines += ["", f"## {part.name}", ""]
            for row in results:
                lines.append("- " + ", ".join(f"{k} {_short(v)}" for k, v in row.items() if k != "part"))
    (folder / "summary.md").write_text("\n".join(lines) + "\n")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list):
        return "[" + " ".join(_short(v) for v in value) + "]"
    return str(value).strip().replace("\n", " / ")[:400]


def main() -> int:
    """Run; 0 if every part that was asked for ended well."""
    arguments = parse_arguments()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        return run_part(arguments)
    import torch

    if not arguments.dry_run and not torch.cuda.is_available():
        sys.exit("this run needs a CUDA device, and torch sees none; --dry-run needs none")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a part's processes are ended with the run
    if arguments.resume and arguments.resume.resolve() != arguments.out / RECORD:
        shutil.copyfile(arguments.resume, arguments.out / RECORD)
    environment = Setting("environment", arguments.out, 0.0, arguments.dry_run)
    environment.add(**facts(arguments.dry_run), minutes=arguments.minutes)
    rows = run(arguments)
    ended = {row["part"]: row["status"] for row in rows if "status" in row}
    wanted = [part.name for part in PARTS if not arguments.only or part.name in arguments.only.split(",")]
    good = [name for name in wanted if ended.get(name) == "ok"]
    print(f"{len(good)} of {len(wanted)} parts ended well; see {arguments.out / 'summary.md'}")
    return 0 if len(good) == len(wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
