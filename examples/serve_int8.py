"""Serve an exported model over HTTP: predictions, health, and metrics for Prometheus.

    pip install 'gradq[export,serve]'
    python examples/serve_int8.py model.zip --port 8000
    curl -X POST localhost:8000/predict -H 'content-type: application/json' -d '{"inputs": [[0.1, 0.2, 0.3]]}'

`model.zip` is a bundle from gradq.export.bundle (the variant that is fastest here runs), or one .onnx file.
Bodies: JSON, nested lists under "inputs" (name → lists if the model takes several), or one array in numpy's
.npy format as application/x-npy, answered in kind. Wrong shapes, types, NaN are status 422 with the reason.
"""

from __future__ import annotations

import argparse
import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from serve_metrics import Metrics

from gradq import export
from gradq.errors import GradqError
from gradq.export.runtime import feed

DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}  # other inputs only as .npy
NPY, MAX_BYTES = "application/x-npy", 64 << 20


def read_arrays(kind: str, body: bytes, wanted: list[Any]) -> list[np.ndarray]:
    """The arrays of a request in the model's order; ValueError says why a body cannot be read."""
    if kind == NPY:
        return [np.lib.format.read_array(io.BytesIO(body), allow_pickle=False)]
    given, names = json.loads(body), [spec.name for spec in wanted]
    if not isinstance(given, dict) or "inputs" not in given:
        raise ValueError('the body must be a JSON object with "inputs"')
    values = given["inputs"] if isinstance(given["inputs"], dict) else {names[0]: given["inputs"]}
    if set(values) != set(names):
        raise ValueError(f"inputs are {sorted(values)}; the model takes {names}")
    arrays = []
    for spec in wanted:
        array = np.asarray(values[spec.name])  # ragged lists raise
        dtype = np.dtype(DTYPES.get(spec.type, np.float32))
        if array.dtype.kind not in {"f": "if", "i": "i"}[dtype.kind]:
            raise ValueError(f"input {spec.name} holds {array.dtype}; the model takes {dtype}")
        with np.errstate(over="ignore"):  # too large for fp32 becomes Inf, which `check` refuses
            arrays.append(array.astype(dtype))
    return arrays


def check(arrays: list[np.ndarray], running: Any, max_batch: int) -> dict[str, np.ndarray]:
    """What the session is fed; ValueError (ConfigError is one) names what the model does not take."""
    fed = feed(running, arrays)
    for name, array in fed.items():
        if array.ndim and not 1 <= len(array) <= max_batch:
            raise ValueError(f"input {name} is a batch of {len(array)}; legal: 1 to {max_batch}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"input {name} holds NaN or Inf")
    return fed


def build_app(model: export.Bundle, *, workers: int, max_batch: int) -> FastAPI:
    """The service around a loaded model; at most `workers` inferences run at once, others wait."""
    app, metrics, slots = FastAPI(title="gradq INT8"), Metrics(), threading.BoundedSemaphore(workers)
    wanted = model.session.get_inputs()

    @app.middleware("http")
    async def count(request: Request, call_next):
        response = await call_next(request)
        known = request.url.path in ("/predict", "/health", "/metrics")
        metrics.add_request(request.url.path if known else "other", response.status_code)
        return response

    @app.get("/health")
    def health() -> dict[str, Any]:
        takes = {i.name: f"{i.type} {i.shape}" for i in wanted}
        return {"status": "ok", "variant": model.chosen, "why": model.why, "inputs": takes}

    @app.get("/metrics")
    def show_metrics() -> Response:
        return Response(metrics.text(model.chosen), media_type="text/plain; version=0.0.4")

    def infer(kind: str, body: bytes) -> Response:
        try:
            fed = check(read_arrays(kind, body, wanted), model.session, max_batch)
            with slots:
                started = time.perf_counter()
                outputs = model.session.run(None, fed)
                seconds = time.perf_counter() - started
        except (ValueError, EOFError, MemoryError, RecursionError) as error:  # of gradq, json and numpy
            return JSONResponse({"detail": str(error)}, 422)
        except InvalidArgument as error:  # of the runtime: a token that the vocabulary lacks, for one
            return JSONResponse({"detail": f"the model cannot run on this input: {error}"}, 422)
        metrics.add_inference(seconds, len(next(iter(fed.values()))))
        if kind == NPY:
            np.save(file := io.BytesIO(), outputs[0])
            return Response(file.getvalue(), media_type=NPY)
        return JSONResponse({"outputs": [o.tolist() for o in outputs], "milliseconds": 1e3 * seconds})

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        body, kind = bytearray(), request.headers.get("content-type", "").split(";")[0]
        async for part in request.stream():
            body += part
            if len(body) > MAX_BYTES:
                return JSONResponse({"detail": f"the body has over {MAX_BYTES} bytes"}, 413)
        return await run_in_threadpool(infer, kind, bytes(body))

    return app


def main() -> None:
    """Load and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="a bundle (folder or .zip) or an .onnx file")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1, help="inferences at once")
    parser.add_argument("--threads", type=int, default=1, help="threads of one inference")
    parser.add_argument("--max-batch", type=int, default=64)
    args = parser.parse_args()
    try:
        if args.model.suffix != ".onnx":
            model = export.load(args.model, threads=args.threads)
        else:
            model = export.Bundle(
                args.model.stem, "the only file", {}, export.session(args.model, threads=args.threads), {}
            )
    except GradqError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{args.model.name}: {model.why}", flush=True)
    app = build_app(model, workers=args.workers, max_batch=args.max_batch)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
