"""The command line: what every command must do. Commands have tests of their own beside this file."""

import subprocess
import sys

import pytest

import gradq
from gradq.cli.app import run


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"gradq {gradq.__version__}\n"


def test_help_lists_the_commands(capsys):
    assert run(["--help"]) == 0
    assert "doctor" in capsys.readouterr().out


def test_doctor_names_what_is_here(capsys):
    assert run(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "numba" in shown
    assert "int4" in shown


def test_an_unknown_command_is_an_error(capsys):
    assert run(["frobnicate"]) == 2
    assert "frobnicate" in capsys.readouterr().err


def test_an_error_of_gradq_ends_with_its_message(capsys, monkeypatch):
    monkeypatch.setenv("GRADQ_KERNELS", "abacus")
    from gradq.cli import doctor

    def raises():
        doctor.kernels_for(doctor.torch.device("cpu"))

    monkeypatch.setattr(doctor, "_cpu_kernels", raises)
    assert run(["doctor"]) == 2
    assert "GRADQ_KERNELS='abacus'" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_a_missing_package_names_its_extra(package):
    script = f"import sys; sys.modules[{package!r}] = None\nfrom gradq.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == f"the command line needs {package}: pip install 'gradq[cli]'"
