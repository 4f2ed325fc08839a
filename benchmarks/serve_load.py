"""The service of examples/serve_int8.py under load: fp32 and int8, one after the other, in turns.

    python benchmarks/serve_load.py                       # the CNN; about 4 minutes
    python benchmarks/serve_load.py --smoke               # tiny model, under half a minute
    python benchmarks/serve_load.py --files fp32.onnx model.zip --shape 1 3 224 224

Each turn starts one service on localhost, sends requests from `--clients` threads that each wait for their
answer before they send again (a closed loop), and ends it by its pid. Bodies are .npy arrays: the model is
to be measured, not JSON. Latency is what a client sees: HTTP, queue and inference. Clients run on the same
machine and take processor time from the service.

Writes benchmarks/results/serve_load.md and a JSON record.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
sys.path[:0] = [str(HERE), str(EXAMPLES)]

import int8_models as zoo  # noqa: E402

from gradq import export, quant  # noqa: E402
from gradq.bench.records import environment, write_record  # noqa: E402

PATHS = ("out", "files")  # of this machine: not for the record
NPY = {"content-type": "application/x-npy"}


def make_files(kind: str, smoke: bool, folder: Path) -> tuple[dict[str, Path], list[int]]:
    """The fp32 file and a bundle of the same model, and the shape of one request."""
    model, inputs = zoo.large(kind, smoke)
    config = quant.Config(weights="int8", observer="minmax", weight_observer="minmax")
    qmodel = quant.prepare(model, inputs(2), config)
    quant.calibrate(qmodel, [inputs(4)], show_progress=False)
    files = {"fp32": folder / "fp32.onnx", "int8": folder / "int8.zip"}
    export.float_onnx(qmodel, files["fp32"])
    export.bundle(qmodel, files["int8"], variants=("x86-vnni", "x86-avx2", "arm"))
    return files, list(inputs(1).shape)


class Service:
    """One running service; a context manager that ends it by its pid."""

    def __init__(self, path: Path, workers: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, str(EXAMPLES / "serve_int8.py"), str(path)]
        command += ["--port", str(port), "--workers", str(workers)]
        paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        variables = {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.DEVNULL)

    def __enter__(self) -> Service:
        """Wait until it answers."""
        end = time.monotonic() + 120
        while True:
            try:
                self.health = httpx.get(f"{self.url}/health", trust_env=False).json()
                return self
            except httpx.TransportError:
                if self.process.poll() is not None or time.monotonic() > end:
                    self.__exit__()
                    raise RuntimeError("the service did not start; its message is above") from None
                time.sleep(0.1)

    def __exit__(self, *exception: Any) -> None:
        """End it."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGTERM)
        self.process.wait(30)


def press(url: str, body: bytes, clients: int, seconds: float) -> tuple[list[float], float]:
    """Seconds of every request, and how long all of it took."""
    latencies: list[float] = []
    failures: list[str] = []
    end = time.perf_counter() + seconds

    def client() -> None:
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as session:
            while time.perf_counter() < end:
                started = time.perf_counter()
                answer = session.post("/predict", content=body, headers=NPY)
                latencies.append(time.perf_counter() - started)
                if answer.status_code != 200:
                    failures.append(answer.text)
                    return

    with httpx.Client(base_url=url, timeout=60, trust_env=False) as session:
        for _ in range(3):  # warm
            session.post("/predict", content=body, headers=NPY)
    started = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise RuntimeError(f"the service refused a request: {failures[0]}")
    return latencies, time.perf_counter() - started


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="cnn", choices=zoo.KINDS)
    parser.add_argument("--files", nargs=2, type=Path, metavar=("FP32", "INT8"), help="instead of --model")
    parser.add_argument("--shape", nargs="+", type=int, help="of one request, with --files; fp32")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--seconds", type=float, default=15.0, help="per turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--workers", type=int, default=1, help="inferences at once in the service")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "serve_load.md")
    args = parser.parse_args()
    if (args.files is None) != (args.shape is None):
        parser.error("--files and --shape go together")
    if args.smoke:
        args.seconds, args.rounds = min(args.seconds, 1.0), 1
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        if args.files:
            files, shape = dict(zip(("fp32", "int8"), args.files, strict=True)), args.shape
        else:
            files, shape = make_files(args.model, args.smoke, Path(name))
        if args.files or args.model != "transformer":
            array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        else:
            array = np.zeros(shape, np.int64)
        np.save(file := io.BytesIO(), array)
        found: dict[tuple[int, str], list[tuple[list[float], float]]] = {}
        variants = {}
        for turn in range(args.rounds):
            for contender in list(files)[:: 1 if turn % 2 == 0 else -1]:
                with Service(files[contender], args.workers) as service:
                    variants[contender] = service.health["variant"]
                    for clients in args.clients:
                        got = press(service.url, file.getvalue(), clients, args.seconds)
                        found.setdefault((clients, contender), []).append(got)
                        print(turn, contender, clients, "clients:", len(got[0]), "requests", flush=True)
    for (clients, contender), turns in sorted(found.items()):
        ms = 1e3 * np.concatenate([latencies for latencies, _ in turns])
        rates = [len(latencies) / seconds for latencies, seconds in turns]
        rows.append(
            {
                "clients": clients, "contender": contender, "variant": variants[contender],
                "requests": len(ms), "p50_ms": float(np.percentile(ms, 50)),
                "p99_ms": float(np.percentile(ms, 99)), "requests_per_s": float(np.median(rates)),
                "lowest_turn": min(rates), "highest_turn": max(rates),
            }
        )  # fmt: skip
    facts = environment()
    lines = [
        "# The service under load",
        "",
        f"`python benchmarks/serve_load.py {' '.join(sys.argv[1:])}`, {time.strftime('%Y-%m-%d')}, "
        f"{facts['cpu']} ({export.features()}), model {args.model if not args.files else 'of the caller'}, "
        f"requests of {shape}, {args.workers} inference at once on 1 thread, {args.rounds} turns of "
        f"{args.seconds:g} s each, clients on the same machine; load average at the start {load:.1f}.",
        "",
        "| clients | contender | p50, ms | p99, ms | requests/s (turns) | requests |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        shown = r["contender"] if r["contender"] == "fp32" else f"int8 ({r['variant']})"
        lines.append(
            f"| {r['clients']} | {shown} | {r['p50_ms']:.1f} | {r['p99_ms']:.1f} | "
            f"{r['requests_per_s']:.1f} ({r['lowest_turn']:.1f} … {r['highest_turn']:.1f}) | "
            f"{r['requests']} |"
        )
    for clients in args.clients:
        a, b = (next(r for r in rows if r["clients"] == clients and r["contender"] == c) for c in files)
        lines += ["" if clients == args.clients[0] else None]
        lines.append(
            f"{clients} clients: int8 answers {b['requests_per_s'] / a['requests_per_s']:.2f} times as many "
            f"requests, p50 {a['p50_ms'] / b['p50_ms']:.2f} and p99 {a['p99_ms'] / b['p99_ms']:.2f} times as "
            "fast."
        )
    text = "\n".join(line for line in lines if line is not None) + "\n"
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    write_record(
        args.out.parent, args.out.stem, settings={k: str(v) for k, v in vars(args).items() if k not in PATHS},
        environment=facts, load_average=load, rows=rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
