"""The command line: what every command must do. Commands have tests of their own beside this file."""

import subprocess
import sys

import pytest

import gradq
from gradq.cli.app import run
from gradq.cli.bench_run import split_codecs


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
        doctor.BACKENDS.on(doctor.torch.device("cpu"))

    monkeypatch.setattr(doctor, "_cpu_kernels", raises)
    assert run(["doctor"]) == 1
    assert "GRADQ_KERNELS='abacus'" in capsys.readouterr().err


def without(package, *arguments):
    """The command in a process where a package is missing."""
    script = f"import sys; sys.modules[{package!r}] = None\nfrom gradq.cli import main\nmain()"
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_a_missing_package_names_its_extra(package):
    done = without(package)
    assert done.returncode == 1
    assert done.stderr.strip() == f"the command line needs {package}: pip install 'gradq[cli]'"


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_version_and_doctor_need_no_extra(package):
    done = without(package, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"gradq {gradq.__version__}\n", "")
    done = without(package, "doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert "CPU kernels" in done.stdout


def test_python_m_gradq():
    command = [sys.executable, "-m", "gradq", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"gradq {gradq.__version__}\n")


def test_doctor_shows_commands_to_copy(capsys, monkeypatch):
    """Brackets belong to the command, and what is missing is said on one line each."""
    from gradq.cli import doctor

    monkeypatch.setattr(doctor, "_version", lambda package: None)
    assert run(["doctor"]) == 0
    shown = capsys.readouterr().out
    for extra in ("cli", "ray", "mpi", "gpu", "export", "plot", "serve"):
        assert f"pip install 'gradq[{extra}]'\n" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("width", [60, 80, 240])
def test_doctor_fits_the_terminal(width):
    from gradq.cli.doctor import _aligned

    advice = "for gradq bench --cluster: pip install 'gradq[ray]'"
    rows = [("", "here", "what to do"), ("ray", "missing", advice), ("codecs", "int8, " * 40, "")]
    lines = _aligned(rows, width).splitlines()
    assert max(map(len, lines)) <= width
    assert " ".join(" ".join(lines).split()).count("int8,") == 40
    assert any(line.endswith(advice) for line in lines) == (width > 60)


EXPORT = ["export", "m.py:f", "--calibrate", "x.npy", "--out", "o"]
COMMANDS = [[], ["doctor"], ["report"], ["export"], ["bench"], ["bench", "codecs"], ["bench", "collectives"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command, capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert run([*command, "--help"]) == 0
    shown = capsys.readouterr()
    assert "Usage: gradq" in shown.out
    assert "\x1b" not in shown.out
    assert shown.err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--ranks", "0"], "--ranks"),
        (["bench", "--ranks", "two"], "--ranks"),
        (["bench", "--seeds", "0"], "--seeds"),
        (["bench", "--steps", "-1"], "--steps"),
        (["bench", "--gpus-per-node", "0", "--cluster", "auto"], "--gpus-per-node"),
        (["bench", "--hosts", "2", "--loss", "nan"], "a packet loss of nan"),
        (["bench", "--hosts", "2", "--packet-loss", "1"], "a packet loss of 1.0: a fraction"),
        (["bench", "--hosts", "2", "--packet-loss", "-0.1"], "a packet loss of -0.1"),
        (["bench", "--hosts", "2", "--delay", "nan"], "'nan' is not a delay"),
        (["bench", "--hosts", "2", "--delay", "infms"], "is not a delay"),
        (["bench", "--hosts", "2", "--delay", "5"], "write for instance 0.2ms"),
        (["bench", "--hosts", "2", "--link", "nangbit"], "is not a rate"),
        (["bench", "--hosts", "2", "--link", "1000"], "is not a rate"),
        (["bench", "--hosts", "2", "--link", "-1gbit"], "is not a rate"),
        (["bench", "--codecs", "int8,"], "a spec is empty"),
        (["bench", "--codecs", "int8", "--precision", "fp8"], "choose fp32 or bf16"),
        (["bench", "--ranks-per-node", "2"], "--ranks-per-node goes with --cluster"),
        (["bench", "--link-record", "x.json"], "--link-record goes with --cluster"),
        (["bench", "collectives", "--ranks", "1"], "--ranks"),
        (["bench", "collectives", "--factor", "1"], "--factor"),
        (["bench", "collectives", "--from", "nanKB"], "is not a size"),
        (["bench", "collectives", "--from", "2B"], "from 4 bytes"),
        (["bench", "codecs", "--ranks", "0"], "--ranks"),
        ([*EXPORT, "--seconds", "nan"], "--seconds"),
        ([*EXPORT, "--max-loss", "nan"], "--max-loss"),
        (
            ["export", "m.py:f", "--calibrate", "x.npy", "--out", "o", "--average-bits", "inf"],
            "--average-bits",
        ),
        ([*EXPORT, "--batches", "0"], "--batches"),
        (["export"], "Missing argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_make_no_sense_are_usage_errors(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""
    assert "\x1b" not in shown.err
    assert list(tmp_path.iterdir()) == []


def test_a_comma_inside_brackets_belongs_to_its_spec():
    assert split_codecs("int8, topk(percent=0.1,block_size=64),none") == (
        "int8",
        "topk(percent=0.1,block_size=64)",
        "none",
    )


@pytest.mark.parametrize("words", ["", "stopped: half of it is in out/"])
def test_ctrl_c_says_what_is_kept(words, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt(words)

    monkeypatch.setattr("gradq.cli.report.write_report", interrupted)
    assert run(["report", "."]) == 130
    assert capsys.readouterr().err.strip() == (words or "stopped: nothing was kept")
