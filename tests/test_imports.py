"""Modules import one way, what must stay light imports nothing heavy, tests mirror the package."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import fedbw_sweep.compression

from .conftest import ROOT

PACKAGE = ROOT / "fedbw_sweep"

ORDER = [
    "errors",
    "extras",
    "seeding",
    "environment",
    "shutdown",
    "config.section",
    "config.defaults",
    "config.renames",
    "console",
    "compression.layout",
    "compression.tiles",
    "compression.base",
    "compression.coding.ans",
    "compression.coding.tables",
    "compression.coding",
    "compression.quantiser",
    "compression",
    "testing",
    "sampling",
    "config.groups",
    "config.identity",
    "config",
    "data",
    "model",
    "training",
    "records.schema",
    "records",
    "cost",
    "federation",
    "backends.ray",
    "backends",
    "report",
    "bench",
    "sweeps",
    "api",
    "status",
    "clean",
    "verify",
    "plan",
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
    ray = {f"backends/ray/{name}.py" for name in ("cluster", "grid", "node")}
    assert users("ray") == ray
    assert not users("ray._private", "ray._raylet")
    assert users("flwr.supercore") == {"backends/ray/grid.py"}
    assert users("flwr.simulation") == {"backends/flower.py"}
    assert users("hydra.core.override_parser.overrides_parser") == {"sweeps/grid.py"}
    assert not users("hydra._internal", "omegaconf._")


LIGHT = {
    *("compression", "report", "records", "config", "data", "sampling", "cost"),
    *("status", "clean", "verify", "plan", "testing"),
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


SMALL = 60
"""Lines up to which a module needs no file of tests of its own name."""

TESTED_BY = {
    "backends.base": "backends/test_flower.py",  # through each backend
    "backends.ray.backend": "sweeps/test_simulation.py",
    "backends.ray.nursery": "backends/ray/test_node.py",  # which starts it
    "compression.base": "compression/test_contract.py",  # with every method
    "compression.coding.decoder": "compression/coding/test_stream.py",
    "compression.coding.encoder": "compression/coding/test_stream.py",
    "compression.coding.tables": "compression/coding/test_stream.py",
    "compression.contexts": "compression/test_factors.py",
    "compression.layout": "compression/test_sizes.py",
    "compression.rows": "compression/test_ecsq.py",
    "compression.lowrank_ecsq": "compression/test_ecsq.py",  # as one of the methods with targets
    "config.foreign": "test_trust.py",
    "config.groups": "config/test_run.py",  # as sections of a run's config
    "config.renames": "config/test_identity.py",
    "config.section": "config/test_run.py",
    "cost.downlink": "federation/test_downlink.py",  # against what is sent
    "federation.chain": "federation/test_downlink.py",
    "federation.rebuild": "federation/test_downlink.py",
    "data.federate": "data/test_partition.py",  # as everything that divides text
    "federation.books": "sweeps/test_trajectories.py",  # as none and lossless
    "federation.client": "federation/test_rounds.py",
    "federation.exchange": "federation/test_rounds.py",
    "federation.job": "federation/test_rounds.py",
    "federation.rows": "federation/test_rounds.py",
    "federation.shared": "federation/test_frozen.py",
    "federation.keeper": "sweeps/test_trajectories.py",  # through what goes on
    "federation.runs": "sweeps/test_trajectories.py",
    "federation.packing": "federation/test_ledger.py",  # by the bytes that are counted
    "model.architecture": "model/test_reported.py",
    "clean": "records/test_disk.py",
    "records.check": "records/test_damage.py",
    "records.collect": "records/test_write.py",
    "records.files": "records/test_strangers.py",
    "records.find": "records/test_read.py",
    "records.folder": "records/test_damage.py",
    "records.labels": "report/test_spec.py",  # by the rows of tables
    "records.running": "test_status.py",
    "records.place": "records/test_waiting.py",
    "records.status": "records/test_damage.py",
    "records.schema": "test_docs.py",  # against the page of columns
    "records.tables": "records/test_read.py",
    "records.trees": "records/test_checkpoint.py",
    "report.build": "report/test_spec.py",
    "report.charts": "report/test_page.py",  # in a browser
    "report.drawing": "report/test_figure.py",
    "report.ranking": "report/test_reported.py",
    "report.table": "test_main.py",  # as the command prints it
    "sweeps.grid": "test_plan.py",
    "sweeps.plugin": "test_main.py",
    "sweeps.preflight": "test_main.py",
    "sweeps.progress": "test_main.py",
    "sweeps.run": "test_main.py",
    "sweeps.sweep": "test_main.py",
    "testing": "compression/test_contract.py",
    "training.check": "training/test_reported.py",
    "training.state": "training/test_reported.py",
}
"""Larger modules without a file of tests of their own name, and the file that tests each."""


def test_the_tests_mirror_the_package() -> None:
    tests = ROOT / "tests"
    files = {str(path.relative_to(tests)) for path in tests.rglob("test_*.py")}
    for file in files:
        folder = Path(file).parent
        assert (PACKAGE / folder).is_dir() or (ROOT / folder).is_dir(), f"{file} mirrors nothing"
    alone = set()
    for path in FILES:
        module = path.relative_to(PACKAGE)
        own = str(module.with_name(f"test_{module.stem.strip('_')}.py"))
        if own not in files and len(path.read_text(encoding="utf-8").splitlines()) > SMALL:
            alone.add(".".join(module.with_suffix("").parts))
    assert alone == set(TESTED_BY), "give it a file of tests, or say in TESTED_BY which tests it"
    assert set(TESTED_BY.values()) <= files


def test_compression_imports_numpy_alone() -> None:
    modules = [
        module.name
        for module in pkgutil.walk_packages(
            fedbw_sweep.compression.__path__, "fedbw_sweep.compression."
        )
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "heavy = {'torch', 'ray', 'flwr', 'hydra', 'omegaconf', 'pandas', 'transformers'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
