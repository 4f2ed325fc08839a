"""The house: imports go one way, heavy extras stay out, public names are listed and documented."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradq

ROOT = Path(gradq.__file__).parent

# A unit is a module or package directly in gradq/. A unit may import units of earlier rows, and itself.
LAYERS = [
    {"errors", "rng", "saved", "wire", "metrics"},
    {"kernels", "transport"},
    {"codecs"},
    {"contrib"},
    {"collectives"},
    {"policy"},
    {"options"},
    {"sync"},
    {"checkpoint"},
    {"hooks"},
    {"local_steps"},
    {"gradq"},  # gradq/__init__.py
    {"backends", "conformance", "testing"},
    {"bench"},
    {"cli"},  # and quant and export: it is the door to both halves
    {"_preload", "__main__"},
]
# Rows apart from this order: what they may import, whole.
APART = {
    "errors": set(),
    "rng": {"errors"},
    "saved": {"errors"},
    "wire": {"errors"},
    "metrics": {"errors", "rng", "wire"},
    "backends": {"errors"},
    "quant": {"errors", "kernels"},
    "export": {"errors", "kernels", "quant"},
}
VECTORS = ("gradq.kernels.vector.blocks", "gradq.kernels.vector.ir", "gradq.kernels.vector.operations")
# Extra packages, and the modules that may import them at the top.
HEAVY = {
    "numba": {
        "gradq.kernels.numba_blocks",
        "gradq.kernels.numba_cache",
        "gradq.kernels.numba_compile",
        "gradq.kernels.numba_tools",
        *VECTORS,
    },
    "llvmlite": {
        "gradq.kernels.numba_blocks",
        "gradq.kernels.numba_cache",
        "gradq.kernels.numba_tools",
        *VECTORS,
    },
    "triton": {
        "gradq.codecs.exact.cuda",
        "gradq.codecs.rotated.cuda_decode",
        "gradq.codecs.rotated.cuda_encode",
        "gradq.codecs.rotated.cuda_tail",
        "gradq.codecs.rotated.cuda_rotation",
        "gradq.kernels.triton_tools",
        "gradq.codecs.uniform.cuda",
        "gradq.codecs.uniform.cuda_decode",
        "gradq.codecs.uniform.cuda_encode",
        "gradq.codecs.uniform.cuda_scales",
    },
    "mpi4py": set(),
    "ray": set(),
    "onnx": set(),
    "onnxruntime": set(),
    "onnxscript": set(),
    "executorch": set(),
    "matplotlib": set(),
    "rich": {
        "gradq.cli.app",
        "gradq.cli.bench_codecs",
        "gradq.cli.bench_terminal",
        "gradq.cli.export",
    },
    "typer": {
        "gradq.cli.app",
        "gradq.cli.bench",
        "gradq.cli.bench_codecs",
        "gradq.cli.bench_collectives",
        "gradq.cli.bench_run",
        "gradq.cli.bench_terminal",
        "gradq.cli.export",
        "gradq.cli.report",
        "gradq.cli.warm_up",
    },
    "fastapi": set(),
}
MAX_LINES, MAX_LINES_OF_SYNC = 600, 330


def allowed(unit: str) -> set[str]:
    """The other units that a unit may import.

    Raises:
        LookupError: the unit has no place yet.
    """
    if unit in APART:
        return APART[unit]
    for row, units in enumerate(LAYERS):
        if unit in units:
            return set().union(*LAYERS[:row]) | ({"quant", "export"} if unit == "cli" else set())
    raise LookupError(
        f"gradq/{unit} has no place in the house: give it one in LAYERS or APART, and in the design"
    )


def unit_of(module: str) -> str:
    """gradq.codecs.base -> codecs; gradq -> gradq."""
    return module.split(".")[1] if "." in module else "gradq"


def modules() -> dict[str, Path]:
    """All modules of gradq by dotted name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ["gradq", *path.relative_to(ROOT).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported_modules(tree: ast.AST, top_only: bool = False) -> set[str]:
    """Dotted names a module imports: inside functions and under TYPE_CHECKING too, unless top_only.

    `from gradq import wire` counts as gradq.wire; a name that is no module counts as its module.
    """
    names = set()
    for node in _top_level(tree) if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they go"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in MODULES else node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return names


def _top_level(tree: ast.AST):
    """Statements that run at import: not in functions, not under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _top_level(node)


def parse(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def violations(module: str, tree: ast.AST) -> list[str]:
    """Imports that go up or sideways."""
    unit = unit_of(module)
    may = allowed(unit) | {unit}
    ours = {name for name in imported_modules(tree) if name.split(".")[0] == "gradq"}
    return [f"{module} imports {name}" for name in sorted(ours) if unit_of(name) not in may]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    assert not violations(module, parse(module))


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("gradq.kernels.")])
def test_kernels_do_not_import_their_users_by_name(module):
    """`loader` loads backends by name; no string may name a unit above."""
    strings = [n.value for n in ast.walk(parse(module)) if isinstance(n, ast.Constant)]
    named = {s for s in strings if isinstance(s, str) and s in MODULES}
    assert all(unit_of(name) == "kernels" for name in named), named


@pytest.mark.parametrize("module", MODULES)
def test_heavy_extras_are_imported_where_they_are_used(module):
    top = {name.split(".")[0] for name in imported_modules(parse(module), top_only=True)}
    early = {name for name in top & HEAVY.keys() if module not in HEAVY[name]}
    assert not early, f"{module} imports {early} at the top: import it in the function that needs it"


@pytest.mark.parametrize("half", ["quant", "export"])
def test_quantization_of_models_and_communication_do_not_know_each_other(half):
    communication = set().union(*LAYERS) - {"errors", "kernels", "bench", "cli", "_preload"}
    assert not allowed(half) & communication
    for unit in communication:
        assert half not in allowed(unit)


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("gradq.codecs.base", "from gradq.policy import Spec", "gradq.policy"),
        ("gradq.codecs.base", "from gradq.sync import feedback", "gradq.sync.feedback"),
        ("gradq.transport.channels", "def f():\n    import gradq.codecs.exact.codec", "gradq.codecs.exact"),
        ("gradq.collectives.base", "if TYPE_CHECKING:\n    from gradq.policy import Spec", "gradq.policy"),
        ("gradq.codecs.base", "import importlib\nimportlib.import_module('gradq.policy')", "policy"),
        ("gradq.codecs.uniform.cpu", "from gradq import metrics, sync", "gradq.sync"),
        ("gradq.metrics", "from gradq.kernels import loader", "gradq.kernels.loader"),
        ("gradq.sync.gradient_sync", "from gradq.hooks.ddp import hook", "gradq.hooks.ddp"),
        ("gradq.sync.gradient_sync", "import gradq", "gradq"),
        ("gradq.policy.fixed", "from gradq import ConfigError", "gradq"),
        ("gradq.hooks.ddp", "from gradq.conformance import CHECKS", "gradq.conformance"),
        ("gradq.quant.modules", "from gradq.codecs import Codec", "gradq.codecs"),
        ("gradq.hooks.ddp", "import gradq.quant.observers", "gradq.quant.observers"),
        ("gradq.bench", "from gradq.export import onnx", "gradq.export"),
    ],
)
def test_the_import_test_sees(module, source, complaint):
    assert any(complaint in violation for violation in violations(module, ast.parse(source)))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gradq.codecs.base", "from gradq.kernels.loader import Kernels\nfrom gradq import rng"),
        ("gradq.codecs.exact.codec", "from gradq.codecs.base import Codec"),
        ("gradq.quant.modules", "from gradq.kernels import loader\nimport torch"),
        ("gradq.export.onnx", "from gradq.quant import modules"),
        ("gradq.conformance", "from gradq import codecs, wire"),
    ],
)
def test_the_import_test_allows(module, source):
    assert not violations(module, ast.parse(source))


def test_a_new_unit_must_be_given_a_place():
    with pytest.raises(LookupError, match="gradq/shiny has no place in the house"):
        allowed("shiny")


def test_the_heavy_test_sees_only_the_top():
    source = "try:\n    import ray\nexcept ImportError:\n    pass\ndef f():\n    import onnx"
    assert imported_modules(ast.parse(source), top_only=True) == {"ray"}


def test_importing_gradq_is_light():
    script = (
        "import sys, gradq\n"
        f"heavy = {sorted(HEAVY)}\n"
        "print(*[name for name in heavy if name in sys.modules and name not in before])"
    )
    script = (
        "import sys, torch; before = set(sys.modules)\n" + script
    )  # what torch itself loads is its affair
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# --- public names --------------------------------------------------------------------------------------


def isort_key(name: str) -> tuple[int, list[str | int]]:
    """Constants, classes, the rest, numbers by value: the order of ruff's RUF022."""
    parts = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), parts


@pytest.mark.parametrize("module", [m for m in MODULES if not any(p.startswith("_") for p in m.split("."))])
def test_all_lists_what_is_public(module):
    tree = parse(module)
    defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    public = {name for name in defined if not name.startswith("_")}
    imported = importlib.import_module(module)
    listed = getattr(imported, "__all__", None)
    if listed is None:
        bare = all(isinstance(node, ast.Expr) for node in tree.body)  # a docstring
        assert bare, f"{module} has no __all__"
        return
    assert listed == sorted(listed, key=isort_key), f"{module}.__all__ is not sorted"
    assert len(listed) == len(set(listed))
    missing = [name for name in listed if not hasattr(imported, name)]
    assert not missing, f"{module}.__all__ names {missing}, which do not exist"
    exempt = (
        {name for name in public if name.startswith("check_")} if module == "gradq.conformance" else set()
    )
    unlisted = public - set(listed) - exempt
    assert not unlisted, f"{module} defines {unlisted}: list it in __all__ or call it _private"


@pytest.mark.parametrize("name", gradq.__all__)
def test_every_public_name_is_documented(name):
    documentation = getattr(gradq, name).__doc__ or ""
    assert len(documentation) > 20
    assert not documentation.startswith(f"{name}("), "that is the docstring dataclass makes"


def test_everything_raised_is_a_gradq_error():
    from gradq import errors

    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.GradqError)
        assert getattr(gradq, name) is getattr(errors, name), f"{name} cannot be reached"


def test_what_was_public_can_be_reached():
    """Names that `gradq.__all__` had in version 0.1 and that scripts may use."""
    from gradq import metrics, policy

    assert len(gradq.__all__) < 16
    for name in ("Assignment", "FixedPolicy", "GradientStatistics", "ParameterInfo", "allocate_bits"):
        assert getattr(gradq, name) is getattr(policy, name)
    for name in ("Event", "ParameterStats"):
        assert getattr(gradq, name) is getattr(metrics, name)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        gradq.Nothing  # noqa: B018


# --- size ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_files_can_be_read_in_one_sitting(module):
    limit = MAX_LINES_OF_SYNC if module == "gradq.sync.gradient_sync" else MAX_LINES
    lines = len(MODULES[module].read_text().splitlines())
    assert lines < limit, f"{MODULES[module].name} has {lines} lines: split it, or say less"
