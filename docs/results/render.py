"""Fill this folder's pages with what the report makes of recorded runs.

python docs/results/render.py PAGE...
python docs/results/render.py --recorded PAGE...
python docs/results/render.py --verify SWEEP/RUN_ID...

A page names its commands in its first block of code: those that train, then the report's. This runs
the report's, on what the others left in ``outputs/``, and replaces what stands between a mark and
``<!-- end -->``: ``<!-- table NAME -->``, ``<!-- runs SWEEP -->``, ``<!-- hashes SWEEP -->`` or
``<!-- codecs -->``. The figures shown of ``SWEEP/`` are those of the last report that reads it
first. The results.csv and rounds.csv of what the page trains are kept in ``SWEEP/`` beside it, so
that its tables can be made again: ``tests/test_experiments.py`` does, and ``--recorded`` fills a
page from them, when the report has changed and the runs have not. ``--verify``, in the repository's
root, does runs again and puts what it found into README.md, in the place of what it said of their
sweeps.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from fedbw_sweep.records.labels import run_labels
from fedbw_sweep.records.read import Records, load, load_records
from fedbw_sweep.records.schema import RESULTS, ROUNDS
from fedbw_sweep.report.__main__ import main as report
from fedbw_sweep.report.measure import settings_of
from fedbw_sweep.verify import main as verify

HERE = Path(__file__).parent
BLOCK = re.compile(r"(<!-- ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
VERIFIED = re.compile(r"^- docs/results/(\w+)/\w+: .*\n", re.MULTILINE)
FIGURE = re.compile(r"!\[[^]]*\]\((\w+)/(\w+)\.png\)")
SHOWN = ("python", "torch", "transformers", "flwr", "ray", "numpy")
TIMED = {"table diloco", "table communication_time"}
"""Tables that have seconds, which only the runs' folders tell."""


def commands(page: str) -> list[list[str]]:
    """Return a page's commands, without ``python -m``."""
    [block] = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)[:1]
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[2:] for line in lines if line.startswith("python -m ")]


def reports(page: str) -> list[list[str]]:
    """Return the arguments of a page's reports."""
    return [rest for module, *rest in commands(page) if module == "fedbw_sweep.report"]


def sweeps(arguments: list[str]) -> list[Path]:
    """Return the folders that a report reads."""
    return [Path(word) for word in arguments if word.startswith("outputs/")]


def trained(page: str) -> list[str]:
    """Name the sweeps that a page's commands train: an experiment's has its name, or is given."""
    words = [
        dict(word.split("=", 1) for word in rest if "=" in word)
        for module, *rest in commands(page)
        if module == "fedbw_sweep"
    ]
    return list(dict.fromkeys(given.get("sweep", given["experiment"]) for given in words))


def newly_trained(page: str) -> list[str]:
    """Name those of a page's sweeps that are in ``outputs/``."""
    if new := [sweep for sweep in trained(page) if Path("outputs", sweep).exists()]:
        return new
    raise SystemExit(f"outputs/ has none of {', '.join(trained(page))}: run the page's commands")


def kept(page: str) -> dict[str, Path]:
    """Return the folders beside the pages that stand for those that a page's reports read."""
    read = [folder for arguments in reports(page) for folder in sweeps(arguments)]
    return {str(folder): HERE / folder.name for folder in read}


def make_report(arguments: list[str], moved: Mapping[str, Path], out: Path) -> None:
    """Run a report on folders that stand for those it names."""
    said = StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = report([*(str(moved.get(word, word)) for word in arguments), "--out", str(out)])
    if code:
        raise SystemExit(said.getvalue())


def fill(page: str, blocks: Mapping[str, str]) -> str:
    """Put what is known of a page's blocks, by their names, between their marks."""
    return BLOCK.sub(lambda m: f"{m[1]}{blocks[m[2]]}{m[3]}" if m[2] in blocks else m[0], page)


def tables(out: Path) -> dict[str, str]:
    """Return a report's tables as blocks."""
    return {f"table {p.stem}": p.read_text(encoding="utf-8") for p in out.glob("tables/*.md")}


def hashes(sweep: str) -> str:
    """List the runs kept of a sweep by their hashes: a row per configuration, a column per seed."""
    runs = load(HERE / sweep)
    runs = runs.sort_values(settings_of(runs), kind="stable")
    labels = run_labels(runs, settings_of(runs))
    runs = runs.assign(configuration=labels, run_id="`" + runs["run_id"] + "`")
    listed = runs.pivot_table("run_id", "configuration", "seed", "first", sort=False).fillna("")
    rows = [["run", *(f"seed {seed}" for seed in listed)], ["---"] * (1 + len(listed.columns))]
    rows += [[label, *ids] for label, *ids in listed.itertuples()]
    lines = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    return f"<details><summary>The hash of each run</summary>\n\n{lines}\n</details>\n"


def codecs(path: Path) -> str:
    """Write what the codec bench measured, without its speed."""
    shown = {"bits": ".3f", "nmse": ".3g", "bound_bits": ".3f", "mean_nmse": ".3g"}
    rows = [["method", *shown], ["---", *("---:" for _ in shown)]]
    for row in pd.read_csv(path).to_dict("records"):
        rows.append([row["method"], *(format(row[name], how) for name, how in shown.items())])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows).replace("_", " ")


def timed_blocks(page: str) -> dict[str, str]:
    """Return what stands in a page of times, which recorded numbers do not tell."""
    known = {f"{m[2]}": m[0][len(m[1]) : -len(m[3])] for m in BLOCK.finditer(page)}
    return {block: known[block] for block in TIMED & set(known)}


def describe(records: Records) -> str:
    """Say how many runs there are and, of those with a folder, versions and clients' time."""
    environments = [
        {key: versions[key] for key in SHOWN} for versions in records.environments.values()
    ]
    if any(versions != environments[0] for versions in environments):
        raise SystemExit("the runs are of different versions or machines")
    minutes = records.timing["train_seconds"].sum() / 60
    versions = ", ".join(f"{key} {value}" for key, value in environments[0].items())
    runs, timed = records.results, len(environments)
    whose = "their clients" if timed == len(runs) else f"the clients of {timed} of them"
    return (
        f"{(runs['status'] == 'done').sum()} of {len(runs)} runs finished, with seeds "
        f"{', '.join(map(str, sorted(runs['seed'].unique())))}; {whose} trained for {minutes:.0f} "
        f"minutes in all. {versions}.\n"
    )


def keep(name: str) -> dict[str, str]:
    """Keep the numbers of what was trained for a page; return what only run folders tell."""
    blocks = {}
    for sweep in newly_trained((HERE / f"{name}.md").read_text(encoding="utf-8")):
        blocks[f"runs {sweep}"] = describe(load_records(Path("outputs", sweep)))
        (HERE / sweep).mkdir(exist_ok=True)
        for file in (RESULTS, ROUNDS):
            shutil.copy(Path("outputs", sweep, file), HERE / sweep / file)
    if (bench := Path("outputs", f"{name}_codecs", "codecs.csv")).exists():
        blocks["codecs"] = codecs(bench)
    return blocks


def render(name: str, blocks: dict[str, str], moved: Mapping[str, Path]) -> None:
    """Fill one page with these blocks, its reports' tables and figures, and its runs' hashes."""
    path = HERE / f"{name}.md"
    page = path.read_text(encoding="utf-8")
    for arguments in reports(page):
        with TemporaryDirectory() as out:
            make_report(arguments, moved, Path(out))
            blocks = tables(Path(out)) | blocks
            for folder, figure in FIGURE.findall(page):
                if folder == sweeps(arguments)[0].name:
                    drawn = Path(out) / "figures" / f"{figure}.png"
                    shutil.copy(drawn, HERE / folder / f"{figure}.png")
    blocks |= {f"hashes {sweep}": hashes(sweep) for sweep in trained(page)}
    path.write_text(fill(page, blocks), encoding="utf-8")


def render_new(name: str) -> None:
    """Fill one page from its runs in ``outputs/``, and from what else pages have kept."""
    blocks = keep(name)
    page = (HERE / f"{name}.md").read_text(encoding="utf-8")
    own = {str(Path("outputs", sweep)) for sweep in newly_trained(page)}
    timed = [sweeps(arguments) for arguments in reports(page) if "--network" in arguments]
    if not all(str(folder) in own for folders in timed for folder in folders):
        blocks = timed_blocks(page) | blocks
    render(name, blocks, {word: path for word, path in kept(page).items() if word not in own})


def render_recorded(name: str) -> None:
    """Fill one page from the numbers kept beside it, but for what only run folders tell."""
    page = (HERE / f"{name}.md").read_text(encoding="utf-8")
    render(name, timed_blocks(page), kept(page))


def verify_samples(runs: list[str]) -> None:
    """Do recorded runs again, each named ``SWEEP/RUN_ID``; say in README.md what came of it."""
    readme = HERE / "README.md"
    page = readme.read_text(encoding="utf-8")
    found = {m[1]: m[0] for m in VERIFIED.finditer(page)}
    for run in runs:
        said = StringIO()
        with redirect_stdout(said):
            verify([str(Path("docs", "results", run))])
        found[run.partition("/")[0]] = f"- {said.getvalue()}"
    readme.write_text(fill(page, {"verified": "".join(found.values())}), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--verify"]:
        verify_samples(sys.argv[2:])
    elif sys.argv[1:2] == ["--recorded"]:
        for given in sys.argv[2:]:
            render_recorded(given)
    else:
        for given in sys.argv[1:]:
            render_new(given)
