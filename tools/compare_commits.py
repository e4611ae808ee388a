"""Do a covering set of small runs at two commits; compare every byte count, loss and model hash.

python tools/compare_commits.py BEFORE AFTER --allow server=fedadam --ignore predicted_bytes

BEFORE and AFTER are commits, or folders with a checkout; --python names a Python for each. Which
runs, and which keys were renamed, is in compare_commits.yaml: every pair of two factors' values is
in some run, but for those of a method up and a method down, of which each run has one. Runs are
kept in --output and done again if code or packages change. The exit code is 1 if a run failed, or
differs and no --allow names a setting of it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from math import inf
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from omegaconf import OmegaConf

Settings = dict[str, Any]
"""Dotted keys, as on a command line, and their values."""

Pair = frozenset[tuple[str, Any]]
"""Two factors, each with a value."""

Tables = dict[str, pd.DataFrame]
"""A run's rows of each recorded file."""

RUNS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
WAYS = {"compression", "downlink"}
NEVER = [frozenset(pair.items()) for pair in RUNS["never"]]

ROWS = {
    "results.csv": ["seed"],
    "rounds.csv": ["round"],
    "messages.parquet": ["round", "client", "direction"],
    "parts.csv": ["tensor", "part"],
}
"""The recorded files, each with the columns that tell a run's rows apart."""

LOSSES = "initial_loss", "loss", "train_loss"
COMPARED = *LOSSES, "model_hash", "clients", "bytes"
"""Columns that are compared, with all whose names end in ``_bytes``."""


# --- Which runs ----------------------------------------------------------------------------------


def pairs_of(row: Settings) -> set[Pair]:
    """Return a row's pairs of values, but for that of the two methods."""
    pairs = combinations(row.items(), 2)
    return {frozenset(pair) for pair in pairs if {key for key, _ in pair} != WAYS}


def possible(factors: Mapping[str, Sequence[Any]]) -> set[Pair]:
    """Return every pair of two factors' values that a run can have."""
    rows = (
        {first: value, second: other}
        for first, second in combinations(factors, 2)
        for value in factors[first]
        for other in factors[second]
    )
    return {pair for row in rows for pair in pairs_of(row) if pair not in NEVER}


def cover(factors: Mapping[str, Sequence[Any]], seed: int = 2) -> list[Settings]:
    """Return rows of values that have every possible pair, few of them, always the same.

    Each row is the best of 20 built greedily, a value at a time (AETG: Cohen et al. 1997).
    """
    rng, rows, missing = random.Random(seed), [], possible(factors)
    others = [factor for factor in factors if factor not in WAYS]

    def build(needed: Counter[tuple[str, Any]]) -> Settings:
        row: Settings = {}
        for factor in (*sorted(WAYS), *rng.sample(others, len(others))):
            ranked = []
            for place, value in enumerate(factors[factor]):
                new = [frozenset({(factor, value), other}) for other in row.items()]
                if not any(pair in NEVER for pair in new):
                    gain = sum(pair in missing for pair in new)
                    ranked.append((gain, needed[factor, value], rng.random(), place))
            row[factor] = factors[factor][max(ranked)[-1]]
        return row

    while missing:
        needed = Counter(value for pair in missing for value in pair)
        built = [build(needed) for _ in range(20)]
        rows.append(max(built, key=lambda row: len(pairs_of(row) & missing)))
        missing -= pairs_of(rows[-1])
    return rows


def cases(methods: Sequence[str]) -> list[Settings]:
    """Return the settings of every run; each has a seed of its own."""
    used: Counter[tuple[str, Any, int]] = Counter()

    def variant(choices: Mapping[Any, list[Settings]], row: Settings, factor: str) -> Settings:
        own, feedback = choices.get(row[factor], [{}]), row.get(f"{factor}.error_feedback")
        fit = [i for i, v in enumerate(own) if v.get("error_feedback", feedback) == feedback]
        chosen = min(fit, key=lambda i: used[factor, row[factor], i])
        used[factor, row[factor], chosen] += 1
        return own[chosen]

    found, factors = [], {**dict.fromkeys(sorted(WAYS), methods), **RUNS["factors"]}
    for seed, row in enumerate(cover(factors), 1):
        case = {**RUNS["small"], "seed": seed, **row}
        for factor in RUNS["factors"]:
            case |= variant(RUNS["variants"].get(factor, {}), row, factor)
        for way in sorted(WAYS):
            parameters = variant(RUNS["methods"], row, way)
            case |= {f"{way}.{key}": value for key, value in parameters.items()}
        found.append(case)
    return found


# --- Doing them ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tree:
    """A checkout, and the Python that runs it."""

    root: Path
    python: str

    def methods(self) -> set[str]:
        """Name the choices of ``conf/compression``."""
        return {path.stem for path in (self.root / "conf/compression").glob("*.yaml")}

    def group(self, key: str) -> Path | None:
        """Return the folder that a key chooses a file of; None if it chooses none."""
        folder = self.root / "conf" / key.replace("downlink", "compression")
        return folder if folder.is_dir() else None

    def own(self, case: Settings) -> Settings:
        """Call a case's keys what they are called here."""
        renamed = {}
        for key, value in case.items():
            head, _, tail = key.partition(".")
            folder = self.group(head)
            if folder and (new := RUNS["renames"].get(folder.name, {}).get(tail)):
                choice = yaml.safe_load((folder / f"{case[head]}.yaml").read_text("utf-8"))
                key = f"{head}.{new}" if new in choice and tail not in choice else key
            renamed[key] = value
        return renamed

    def write(self, case: Settings, path: Path) -> None:
        """Write a case as a choice of the presets' group."""
        lines, values = ["# @package _global_", "defaults:"], OmegaConf.create()
        for key, value in case.items():
            if self.group(key):
                name = key.replace("downlink", "compression@downlink")
                lines.append(f"  - override /{name}: {value}")
            else:
                OmegaConf.update(values, key, value)
        path.write_text("\n".join([*lines, OmegaConf.to_yaml(values)]), encoding="utf-8")

    def do(self, *arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
        """Run Python with this tree's packages."""
        environment = {**os.environ, "PYTHONPATH": str(self.root), "HF_HUB_OFFLINE": "1"}
        command = [self.python, *arguments]
        return subprocess.run(command, cwd=self.root, env=environment, text=True, **settings)

    def fingerprint(self) -> str:
        """Hash code, configs and installed packages; end if Python imports another tree's code."""
        code = (
            "import fedbw_sweep, importlib.metadata as m; print(fedbw_sweep.__path__[0]);"
            "print(sorted({f'{d.name} {d.version}' for d in m.distributions()}))"
        )
        printed = self.do("-c", code, capture_output=True, check=True).stdout
        where, packages = printed.splitlines()
        if Path(where) != self.root / "fedbw_sweep":
            sys.exit(f"{self.python} imports {where}, not the package in {self.root}")
        hashed = hashlib.sha256(packages.encode())
        for folder in ("conf", "fedbw_sweep", "hydra_plugins"):
            for path in sorted((self.root / folder).rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    hashed.update(str(path.relative_to(self.root)).encode() + path.read_bytes())
        return hashed.hexdigest()

    def run(self, cases: Sequence[Settings], output: Path) -> Path:
        """Do all cases in one command, unless they are there; return the sweep's folder."""
        text = self.fingerprint() + yaml.safe_dump(list(cases))
        folder = output / hashlib.sha256(text.encode()).hexdigest()[:12]
        sweep, log, complete = (folder / name for name in ("sweep", "log", "complete"))
        if complete.exists():
            print(f"{self.root}: kept in {folder}")
            return sweep
        preset = "preset" if self.group("preset") else "way"  # its new name, its old one
        (folder / preset).mkdir(parents=True, exist_ok=True)
        names = [f"case{case['seed']:02}" for case in cases]
        for name, case in zip(names, cases, strict=True):
            self.write(self.own(case), folder / preset / f"{name}.yaml")
        command = "-m", "fedbw_sweep", "-m", f"--config-dir={folder}", f"hydra.sweep.dir={sweep}"
        print(f"{self.root}: {len(cases)} runs, logged in {log}", flush=True)
        with log.open("w", encoding="utf-8") as out:
            code = self.do(
                *command, f"{preset}={','.join(names)}", stdout=out, stderr=out
            ).returncode
        results = sweep / "results.csv"
        if code not in (0, 1) or not results.exists() or len(read(results)) < len(cases):
            sys.exit(f"{self.root}: ended with {code}\n{log.read_text(encoding='utf-8')[-4000:]}")
        complete.touch()
        return sweep


@contextmanager
def checkout(name: str, python: str) -> Iterator[Tree]:
    """Yield the tree of a folder, or of a commit, which is checked out meanwhile."""
    if Path(name).is_dir():
        yield Tree(Path(name).resolve(), python)
        return
    git = ["git", "-C", str(Path(__file__).parent), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve() / "tree"
        subprocess.run([*git, "add", "--quiet", "--detach", place, name], check=True)
        try:
            yield Tree(place, python)
        finally:
            subprocess.run([*git, "remove", "--force", place], check=True)


# --- Comparing them ------------------------------------------------------------------------------


def read(path: Path) -> pd.DataFrame:
    """Read a table, all of it text; one without rows if there is no such file."""
    if not path.exists():
        return pd.DataFrame(columns=ROWS[path.name])
    if path.suffix == ".parquet":
        return pd.read_parquet(path).astype(str)
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def same(value: Any, text: str) -> bool:
    """Whether a setting is what stands in a table, or on the command line."""
    written = "" if value is None else str(value)
    try:
        return written.lower() == text.lower() or float(written) == float(text)
    except ValueError:
        return False


def row_of(case: Settings, results: pd.DataFrame) -> dict[str, str]:
    """Return the row that has a case's settings; a `ValueError` if none has, or several have."""
    [row] = results[results["seed"] == str(case["seed"])].to_dict("records")
    for key, value in case.items():
        is_plain = not isinstance(value, list | dict)
        if is_plain and key in row and not same(value, row[key]):
            raise ValueError(f"a run was asked for with {key}={value}, and has {row[key]}")
    return {str(key): value for key, value in row.items()}


def tables(sweep: Path, case: Settings) -> Tables:
    """Read a case's rows of every table, under what tells them apart."""
    run_id = row_of(case, read(sweep / "results.csv"))["run_id"]
    found = {}
    for name, keys in ROWS.items():
        of_all = (sweep / name).exists()
        table = read(sweep / name if of_all else sweep / run_id / name)
        found[name] = (table[table["run_id"] == run_id] if of_all else table).set_index(keys)
    return found


def apart(before: str, after: str) -> float:
    """Return how far a value is from what it was, as a fraction of that; infinite for text."""
    if before == after:
        return 0.0
    try:
        first, second = float(before), float(after)
        change = 0.0 if first == second else abs(second / first - 1)
    except (ValueError, ZeroDivisionError):
        return inf
    return change if change < inf else inf  # NaN is infinitely far from numbers


@dataclass(frozen=True)
class Difference:
    """What is farthest apart in a column of one run."""

    column: str
    relative: float
    before: str
    after: str


def differences(
    before: Tables, after: Tables, compared: Counter[str], tolerance: float, ignored: list[str]
) -> list[Difference]:
    """Compare a run's tables, and count in `compared` the values of each column.

    Losses may differ by a fraction `tolerance`; above 0, models' hashes may differ as well.
    A run that failed has no hash, and is listed even if it failed both times.
    """
    found = []
    allowed = {**dict.fromkeys(LOSSES, tolerance), "model_hash": inf if tolerance else 0.0}
    for name in ROWS:
        ours, theirs = before[name].sort_index(), after[name].sort_index()
        if list(ours.index) != list(theirs.index):
            found.append(Difference(f"{name} rows", inf, str(len(ours)), str(len(theirs))))
            continue
        for column in ours.columns.union(theirs.columns).difference(ignored):
            if not len(ours) or not (column in COMPARED or column.endswith("_bytes")):
                continue
            if column not in ours or column not in theirs:
                compared[f"{name} {column}, which only one has"] += 0
                continue
            compared[f"{name} {column}"] += len(ours)
            pairs = zip(ours[column], theirs[column], strict=True)
            change, *values = max((apart(*pair), *pair) for pair in pairs)
            if change > allowed.get(column, 0) or (column == "model_hash" and "" in values):
                found.append(Difference(f"{name} {column}", change, *values))
    return found


def shared(differing: set[int], cases: Sequence[Settings]) -> Iterator[tuple[str, set[int]]]:
    """Group the runs that differ by settings that they share and that few other runs have."""
    having: dict[str, set[int]] = {}
    for number, case in enumerate(cases):
        for key in case.keys() - {"seed"}:
            having.setdefault(f"{key}={case[key]}", set()).add(number)
    left = set(differing)
    while left:
        some = [setting for setting in sorted(having) if having[setting] & left]
        best = max(some, key=lambda own: len(having[own] & left) - len(having[own] - differing))
        of = f"{len(having[best] & differing)} of {len(having[best])} runs"
        yield f"{best} ({of})", having[best] & left
        left -= having[best]


def sizes(differences: Iterable[Difference]) -> Iterator[str]:
    """Describe what differs in some runs, a line for each column."""
    columns: dict[str, list[Difference]] = {}
    for difference in differences:
        columns.setdefault(difference.column, []).append(difference)
    for column, own in columns.items():
        most = max(own, key=lambda one: one.relative)
        size = f"by up to {most.relative:.1e} of it, " if most.relative < inf else ""
        yield f"{column}: {len(own)} runs, {size}{most.before:.20} -> {most.after:.20}"


def report(cases: Sequence[Settings], found: Sequence[list[Difference]], allow: list[str]) -> int:
    """Print what differs, grouped; return 0 if all of it is allowed, 1 if not."""
    differing = {number for number, own in enumerate(found) if own}
    print(f"\n{len(cases) - len(differing)} of {len(cases)} runs agree")
    for setting, runs in shared(differing, cases):
        print(f"\n{setting}", *sizes(one for run in sorted(runs) for one in found[run]), sep="\n  ")
    for key, _, value in (pair.partition("=") for pair in allow):
        differing -= {n for n, case in enumerate(cases) if key in case and same(case[key], value)}
    if differing:
        print("\nnot allowed to differ: seeds", *sorted(cases[n]["seed"] for n in differing))
    return 1 if differing else 0


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("trees", nargs=2, metavar="TREE")
    parser.add_argument("--python", nargs=2, default=[sys.executable] * 2)
    parser.add_argument("--output", type=Path, default=Path("outputs/compare_commits"))
    parser.add_argument("--allow", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--ignore", action="append", default=[], metavar="COLUMN")
    parser.add_argument("--tolerance", type=float, default=0.0, help="of losses")
    options = parser.parse_args()
    compared: Counter[str] = Counter()
    found = []
    with ExitStack() as stack:
        asked = zip(options.trees, options.python, strict=True)
        old, new = (stack.enter_context(checkout(*tree)) for tree in asked)
        chosen = cases(sorted(old.methods() & new.methods()))
        before = old.run(chosen, options.output.resolve() / "before")
        after = new.run(chosen, options.output.resolve() / "after")
        for case in chosen:
            both = tables(before, old.own(case)), tables(after, new.own(case))
            found.append(differences(*both, compared, options.tolerance, options.ignore))
    print("| column | values | runs that differ |\n|---|---:|---:|")
    for column, count in compared.items():
        runs = sum(column == one.column for own in found for one in own)
        print(f"| {column} | {count} | {runs} |")
    return report(chosen, found, options.allow)


if __name__ == "__main__":
    sys.exit(main())
