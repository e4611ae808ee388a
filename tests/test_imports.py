"""The package's modules import one way, and what must stay light imports nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT

PACKAGE = ROOT / "fedbw_sweep"

ORDER = [
    "errors",
    "seeding",
    "compression.layout",
    "compression.base",
    "compression.coding.ans",
    "compression.coding.tables",
    "compression.coding",
    "compression.quantiser",
    "compression",
    "config",
    "cells",
    "console",
    "network",
    "theory",
    "metering",
    "data",
    "modeling",
    "federated.downlink",
    "prediction",
    "trainable",
    "layouts",
    "federated.wire",
    "federated.client",
    "federated.diloco",
    "federated.strategy",
    "federated.nursery",
    "federated.node",
    "federated.broker",
    "federated.grid",
    "federated.simulation",
    "results",
    "run",
    "report.table",
    "report.measure",
    "report.render",
    "report.spec",
    "report.figure",
    "report",
    "status",
    "verify",
    "plan",
    "sweep",
    "peers",
    "codecs",
    "__main__",
]
"""From what all may import down to what none may; a package stands for its other files."""


MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")
}


def rank(module: str) -> int:
    """The place of a module in the order, by its longest listed prefix."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in ORDER:
            return ORDER.index(name)
    raise AssertionError(f"{module} has no place in the import order: add it to ORDER")


def imported(path: Path) -> set[str]:
    """Name the package's own modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if node.module == "fedbw_sweep":
                found |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith("fedbw_sweep."):
                module = node.module.removeprefix("fedbw_sweep.")
                inside = {f"{module}.{alias.name}" for alias in node.names} & MODULES
                found |= inside or {module}
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            found |= {n.removeprefix("fedbw_sweep.") for n in names if n.startswith("fedbw_sweep.")}
    return found


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for other in imported(path):
        same_package = rank(other) == rank(module)
        assert same_package or rank(other) < rank(module), f"{module} imports {other}"


def test_only_one_file_knows_the_coder_and_one_the_simulator() -> None:
    def users(*names: str) -> set[str]:
        return {
            str(path.relative_to(PACKAGE))
            for path in FILES
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if (isinstance(node, ast.ImportFrom) and (node.module or "").startswith(names))
            or (isinstance(node, ast.Import) and any(a.name.startswith(names) for a in node.names))
        }

    assert users("constriction") == {"compression/coding/ans.py"}
    ray = {f"federated/{name}.py" for name in ("broker", "grid", "node", "simulation")}
    assert users("ray") == ray
    assert users("flwr.supercore") == {"federated/grid.py"}
    assert users("flwr.simulation") == {"federated/simulation.py"}


LIGHT = {
    *("compression", "report", "results", "config", "data"),
    *("status", "verify", "cells", "network", "plan"),
}


def test_light_packages_import_neither_torch_nor_ray_nor_flower() -> None:
    modules = [
        ".".join(("fedbw_sweep", *path.relative_to(PACKAGE).with_suffix("").parts))
        for path in FILES
        if path.relative_to(PACKAGE).parts[0].removesuffix(".py") in LIGHT
    ]
    assert len(modules) > len(LIGHT)
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'ray', 'flwr'} & set(sys.modules)\n"
        "    if heavy: sys.exit(f'{name} imports {heavy}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *modules], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
