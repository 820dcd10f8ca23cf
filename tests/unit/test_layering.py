"""Each layer imports only the layers above it; help and `import mifo` stay free of torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mifo

SOURCE = Path(mifo.__file__).parent
LAYERS = (
    "errors", "types", "config", "core", "methods", "data", "rewards", "rollout", "train", "eval", "lab", "report",
    "backends", "cli",
)  # fmt: skip
PART_OF = {
    "commands": "cli",
    "lab_verbs": "cli",
    "lab_commands": "cli",
    "compare_verb": "cli",
    "paper_verb": "cli",
    "compare_commands": "cli",
    "paper_commands": "cli",
    "signals": "train",
    "training_probe_verbs": "cli",
    "training_probe_commands": "cli",
    "__main__": "cli",
    "recipes": "config",
    "printable": "errors",
}
ALLOWED_ROOTS = {"__version__"}  # names that any layer may take from the package itself


def layer_of(module):
    """The layer of `mifo.x.y`; None for the package itself."""
    parts = module.split(".")
    return PART_OF.get(parts[1], parts[1]) if len(parts) > 1 else None


def imports_of(source, module):
    """Every project module that a source imports, at its top or inside a function, relative imports resolved."""
    package = module.split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "mifo")
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) if node.level else ""
            target = ".".join(part for part in (base, node.module or "") if part)
            if target == "mifo":
                yield from (f"mifo.{alias.name}" for alias in node.names if alias.name not in ALLOWED_ROOTS)
            elif target.startswith("mifo."):
                yield target


def modules():
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(("mifo", *(part for part in parts if part != "__init__")))
        if name != "mifo":  # the package itself hands out the core's names, lazily
            yield pytest.param(path, name, id=name)


def test_reading_imports():
    source = "import mifo.core.freeze\nfrom mifo import __version__, types\nfrom mifo.data import tasks\nimport torch\n"
    assert list(imports_of(source, "mifo.train.x")) == ["mifo.core.freeze", "mifo.types", "mifo.data"]
    assert list(imports_of("def f():\n    from . import y\n    from ..eval.score import z", "mifo.train.x")) == [
        "mifo.train",
        "mifo.eval.score",
    ]
    assert layer_of("mifo.commands") == "cli"
    assert layer_of("mifo.train.run") == "train"


@pytest.mark.parametrize(("path", "module"), list(modules()))
def test_a_layer_imports_only_layers_above_it(path, module):
    own = layer_of(module)
    assert own in LAYERS, f"{module} belongs to no layer"
    allowed = {"types", "errors", "core"} if own == "core" else set(LAYERS[: LAYERS.index(own) + 1])
    for target in imports_of(path.read_text(encoding="utf-8"), module):
        assert layer_of(target) in allowed, f"{module} imports {target}, which is below {own}"


@pytest.mark.parametrize(
    "statement",
    [
        "import mifo",
        "import mifo.cli",
        "import mifo.types, mifo.errors",
        "from mifo.config.load import load_config; load_config('tiny')",
        "from mifo.data import tasks",
        "import mifo.rewards",
    ],
)
def test_light_modules_load_no_heavy_library(statement):
    script = f"{statement}\nimport sys\nprint([m for m in ('torch', 'transformers', 'sympy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_core_loads_no_transformers():
    names = [f"mifo.core.{path.stem}" for path in (SOURCE / "core").glob("*.py")]
    script = f"import {', '.join(names)}, sys; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
