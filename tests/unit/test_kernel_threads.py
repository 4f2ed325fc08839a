"""Kernels on many threads at once, among other allocations: their scratch is theirs until they return."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

SPECS = ["int8", "int4", "int3", "bf16", "rot4", "rot2", "rot4(levels=trellis)"]

PROGRAM = textwrap.dedent("""
    import sys, threading
    import torch
    from gradq.codecs import from_spec
    from gradq.rng import EncodeContext

    spec, seconds = sys.argv[1], float(sys.argv[2])
    codec = from_spec(spec).for_feedback(True)
    feedback = codec.contractive and spec != "bf16"
    context = EncodeContext(key=12345)
    x, old = torch.randn(50_000), torch.randn(50_000) * 1e-3

    def once():
        payload = torch.zeros(3, codec.nbytes(len(x)), dtype=torch.uint8)
        new, out = torch.zeros_like(x), torch.zeros_like(x)
        options = {"residual": old, "new_residual": new} if feedback else {}
        codec.encode(x, payload[0], context=context, **options)
        payload[1:] = payload[0]
        codec.decode_mean(payload, out)
        return payload, new, out

    want = once()
    stop, wrong = threading.Event(), []

    def work():
        torch.set_num_threads(1)
        while not stop.is_set():
            if not all(torch.equal(a, b) for a, b in zip(once(), want)):
                wrong.append(spec)
                stop.set()

    def churn():  # allocations of the sizes of the kernels' scratch, filled at once
        while not stop.is_set():
            kept = [bytearray(b"\\xff" * size) for size in (1856, 4160, 4096, 7232, 1040) for _ in range(20)]
            del kept

    threads = [threading.Thread(target=target) for target in [work] * 20 + [churn] * 4]
    for thread in threads:
        thread.start()
    stop.wait(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    sys.exit(f"{spec}: a wrong result" if wrong else 0)
""")


@pytest.mark.parametrize("spec", SPECS)
def test_results_are_right_on_many_threads(spec: str) -> None:
    command = [sys.executable, "-c", PROGRAM, spec, "1.5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
