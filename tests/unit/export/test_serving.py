"""examples/serve_int8.py as a real process on a real port: answers, refusals, counts."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from nets import prepared

from gradq import export

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

EXAMPLES = Path(__file__).parents[3] / "examples"


def environment():
    """This one, with the gradq that is tested, and one thread."""
    paths = [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """(client, bundle): the service runs until the tests are over and is ended by its pid."""
    torch.set_num_threads(1)
    model, batches = models.build("mlp")
    path = tmp_path_factory.mktemp("serve") / "model.zip"
    export.bundle(prepared(model, batches), path, variants=("x86-avx2",))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        str(EXAMPLES / "serve_int8.py"),
        str(path),
        "--port",
        str(port),
        "--max-batch",
        "8",
    ]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10, trust_env=False) as client:
            for _ in range(300):
                assert process.poll() is None, process.stdout.read()
                try:
                    client.get("/health")
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield client, path
    finally:
        os.kill(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        finally:
            process.kill()
            process.stdout.close()


def npy(array):
    np.save(file := io.BytesIO(), array)
    return file.getvalue()


def test_predictions_are_those_of_the_bundle(service):
    client, path = service
    health = client.get("/health").json()
    assert health["status"] == "ok"
    assert health["inputs"] == {"x": "tensor(float) ['batch', 12]"}
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)).numpy()
    expected = export.load(path, choose=health["variant"])(x)[0]
    for inputs in (x.tolist(), {"x": x.tolist()}):
        answer = client.post("/predict", json={"inputs": inputs})
        assert answer.status_code == 200
        assert np.array_equal(np.array(answer.json()["outputs"][0], np.float32), expected)
    binary = client.post("/predict", content=npy(x), headers={"content-type": "application/x-npy"})
    assert np.array_equal(np.load(io.BytesIO(binary.content)), expected)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"inputs": [[1.0, 2.0]]}, r"input x is float32 \[1, 2\]; the model takes float32"),
        ({"inputs": [1.0] * 12}, r"input x is float32 \[12\]"),
        ({"inputs": [["a"] * 12]}, "input x holds <U1; the model takes float32"),
        ({"inputs": [[True] * 12]}, "input x holds bool"),
        ({"inputs": [[float("nan")] * 12]}, "input x holds NaN or Inf"),
        ({"inputs": [[1e300] * 12]}, "input x holds NaN or Inf"),
        ({"inputs": [[1.0] * 12, [1.0]]}, "inhomogeneous"),
        ({"inputs": [[1.0] * 12] * 9}, "input x is a batch of 9; legal: 1 to 8"),
        ({"inputs": {"y": [[1.0] * 12]}}, r"inputs are \['y'\]; the model takes \['x'\]"),
        ({"data": 1}, 'must be a JSON object with "inputs"'),
        (b"{", "Expecting property name"),
        (b"\xff\xff", "codec can't decode"),
    ],
)
def test_bad_json_is_422_with_the_reason(service, body, said):
    content = body if isinstance(body, bytes) else json.dumps(body)
    answer = service[0].post("/predict", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert re.search(said, answer.json()["detail"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (npy(np.zeros((2, 12))), "input x is float64"),
        (npy(np.full((2, 12), np.inf, np.float32)), "input x holds NaN or Inf"),
        (npy(np.zeros((2, 12), np.float32))[:-4], "expected 96 bytes got 92"),
        (b"nonsense", "magic string"),
        (b"", "EOF"),
    ],
)
def test_bad_arrays_are_422_with_the_reason(service, body, said):
    answer = service[0].post("/predict", content=body, headers={"content-type": "application/x-npy"})
    assert answer.status_code == 422
    assert said in answer.json()["detail"]


def test_metrics_count_what_happened(service):
    client, _ = service

    def read():
        answer = client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    before = read()
    client.post("/predict", json={"inputs": [[0.5] * 12] * 4})
    client.post("/predict", json={"inputs": []})
    client.get("/nothing")
    after = read()

    def grew(name):
        return after[name] - before.get(name, 0)

    assert grew('http_requests_total{path="/predict",status="200"}') == 1
    assert grew('http_requests_total{path="/predict",status="422"}') == 1
    assert grew('http_requests_total{path="other",status="404"}') == 1
    assert grew("inference_samples_total") == 4
    assert (
        grew("inference_duration_seconds_count") == grew('inference_duration_seconds_bucket{le="+Inf"}') == 1
    )
    assert grew("inference_duration_seconds_sum") > 0
    assert sum(name.startswith("model_info{variant=") for name in after) == 1


def test_a_missing_model_is_an_error_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import serve_int8

    monkeypatch.setattr(sys, "argv", ["serve_int8.py", str(tmp_path / "none.zip")])
    with pytest.raises(SystemExit) as caught:
        serve_int8.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none.zip'} does not exist\n"
