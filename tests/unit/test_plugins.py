"""Codecs of other packages: an entry point makes their names specs; one that fails is named."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

# the least that a codec of one's own needs: decode_mean comes with the base class
CODEC = """
    from dataclasses import dataclass
    import torch
    from gradq import codecs
    from gradq.errors import ConfigError

    @dataclass(frozen=True, kw_only=True)
    class Halves(codecs.Codec):
        name = "halves"
        block_size = 8
        unbiased = False
        contractive = True

        def nbytes(self, numel):
            return 2 * numel

        def encode(self, x, payload, *, context, residual=None, new_residual=None):
            if residual is not None:
                raise ConfigError("halves has no error feedback")
            payload.view(torch.bfloat16).copy_(x)

        def decode(self, payload, out):
            out.copy_(payload.view(torch.bfloat16))

        @classmethod
        def from_name(cls, name):
            return cls()

    def register():
        codecs.register(Halves, "halves")
"""


def install(folder: Path, code: str) -> None:
    """What pip leaves of a package."""
    (folder / "halves_package.py").write_text(textwrap.dedent(code))
    info = folder / "halves-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halves\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gradq.codecs]\nhalves = halves_package:register\n")


def python(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(folder), *(path for path in sys.path if path)])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_a_package_brings_a_codec_that_passes_the_contract(tmp_path: Path) -> None:
    install(tmp_path, CODEC)
    done = python(
        tmp_path,
        """
        from gradq import codecs
        from gradq.conformance import CHECKS
        assert "halves" in codecs.names()
        codec = codecs.from_spec("halves")
        for name, check in CHECKS.items():
            check(codec)
        """,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_package_that_fails_is_named(tmp_path: Path) -> None:
    install(tmp_path, "def register():\n    raise ValueError('no such luck')")
    done = python(tmp_path, "from gradq import codecs; codecs.from_spec('int4')")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "the package 'halves' cannot register its codecs" in last
    assert "no such luck" in last
