"""A copy of the repository, to change and to test."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from .conftest import ROOT

LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", "__pycache__", "outputs", "build", "dist", "*.egg-info"
)


def copy_of_the_repository(folder: Path) -> Path:
    return shutil.copytree(ROOT, folder / "copy", ignore=LEFT_OUT)


def run(copy: Path, *arguments: str) -> str:
    """Run Python in a copy, of the copy's own package; return what it printed."""
    path = filter(None, [os.environ.get("PYTHONPATH")])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(copy), *path]), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}{done.stderr}"
    return done.stdout


def passes(copy: Path, *tests: str, which: str = "not slow and not ray") -> int:
    """Run tests in a copy, the quick ones unless told; return how many passed."""
    printed = run(
        copy, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", which, *tests
    )
    return int(re.search(r"(\d+) passed", printed)[1])  # type: ignore[index]


def recipe(copy: Path) -> list[list[str]]:
    """Do what CONTRIBUTING says of a compressor, to the letter; return the commands it names."""
    chapter = _chapter(copy)
    blocks = re.findall(r"<!-- (file|last row of): (\S+) -->\n```\w+\n(.*?)```", chapter, re.DOTALL)
    for kind, name, content in blocks:
        path = copy / name
        if kind == "last row of":
            head, rule, body = path.read_text(encoding="utf-8").partition("|---|")
            table, end, rest = body.partition("\n\n")
            content = head + rule + table + "\n" + content.strip() + end + rest
        path.write_text(content, encoding="utf-8")
    return commands(copy)


def commands(copy: Path) -> list[list[str]]:
    """The commands that the recipe ends with."""
    [lines] = re.findall(r"<!-- then -->\n```sh\n(.*?)```", _chapter(copy), re.DOTALL)
    return [line.split("#")[0].split() for line in lines.splitlines()]


def _chapter(copy: Path) -> str:
    text = (copy / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [chapter] = re.findall(r"^## Adding a compress.*?(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return str(chapter)
