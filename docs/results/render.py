"""Fill this folder's pages with what the report makes of recorded runs.

python docs/results/render.py PAGE...
python docs/results/render.py --recorded PAGE...
python docs/results/render.py --verify PAGE...

A page names its commands in its first block of code: those that train, then the report's. This runs
the report's, on ``outputs/`` when the others have been run, and replaces what stands between
``<!-- table NAME -->``, ``<!-- codecs -->`` or ``<!-- runs -->`` and ``<!-- end -->``, and the
figures that the page shows. The runs' results.csv and rounds.csv are kept in a folder beside the
page, so that its tables can be made again: ``tests/test_experiments.py`` does, and ``--recorded``
fills a page from them, when the report has changed and the runs have not. ``--verify`` does a run
of each page's experiment again and puts what it found into README.md.
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

from fedbw_sweep.report.__main__ import main as report
from fedbw_sweep.results import RESULTS, ROUNDS, Records, load_records
from fedbw_sweep.verify import main as verify

HERE = Path(__file__).parent
BLOCK = re.compile(r"(<!-- ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
FIGURE = re.compile(r"!\[[^]]*\]\((\w+)/(\w+)\.png\)")
SHOWN = ("python", "torch", "transformers", "flwr", "ray", "numpy")


def commands(page: str) -> list[list[str]]:
    """Return a page's commands, without ``python -m``."""
    [block] = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)[:1]
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[2:] for line in lines if line.startswith("python -m ")]


def make_report(page: str, moved: Mapping[str, Path], out: Path) -> None:
    """Run a page's report on folders that stand for those it names."""
    [arguments] = [rest for module, *rest in commands(page) if module == "fedbw_sweep.report"]
    arguments = [str(moved.get(word, word)) for word in arguments]
    said = StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = report([*arguments, "--out", str(out)])
    if code:
        raise SystemExit(said.getvalue())


def fill(page: str, blocks: Mapping[str, str]) -> str:
    """Put what is known of a page's blocks, by their names, between their marks."""
    return BLOCK.sub(lambda m: f"{m[1]}{blocks[m[2]]}{m[3]}" if m[2] in blocks else m[0], page)


def tables(out: Path) -> dict[str, str]:
    """Return a report's tables as blocks."""
    return {f"table {p.stem}": p.read_text(encoding="utf-8") for p in out.glob("tables/*.md")}


def codecs(path: Path) -> str:
    """Write what the codec bench measured, without its speed."""
    shown = {"bits": ".3f", "nmse": ".3g", "bound_bits": ".3f", "mean_nmse": ".3g"}
    rows = [["method", *shown], ["---", *("---:" for _ in shown)]]
    for row in pd.read_csv(path).to_dict("records"):
        rows.append([row["method"], *(format(row[name], how) for name, how in shown.items())])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows).replace("_", " ")


def describe(records: Records) -> str:
    """Say how many runs there are, what they ran on and how long their clients trained."""
    environments = [
        {key: versions[key] for key in SHOWN} for versions in records.environments.values()
    ]
    if any(versions != environments[0] for versions in environments):
        raise SystemExit("the runs are of different versions or machines")
    minutes = records.timing["train_seconds"].sum() / 60
    versions = ", ".join(f"{key} {value}" for key, value in environments[0].items())
    done = int((records.results["status"] == "done").sum())
    return (
        f"{done} of {len(records.results)} runs finished, with seeds "
        f"{', '.join(map(str, sorted(records.results['seed'].unique())))}; their clients trained "
        f"for {minutes:.0f} minutes of one core. {versions}.\n"
    )


def sweeps(page: str) -> list[Path]:
    """Return the folders that a page's report reads."""
    [arguments] = [rest for module, *rest in commands(page) if module == "fedbw_sweep.report"]
    return [Path(word) for word in arguments if word.startswith("outputs/")]


def keep(name: str) -> dict[str, str]:
    """Keep the numbers of a page's runs beside it; return what only their folders tell."""
    folders = sweeps((HERE / f"{name}.md").read_text(encoding="utf-8"))
    blocks = {"runs": describe(load_records(folders))}
    if (bench := Path("outputs", f"{name}_codecs", "codecs.csv")).exists():
        blocks["codecs"] = codecs(bench)
    for folder in folders:
        (HERE / folder.name).mkdir(exist_ok=True)
        for file in (RESULTS, ROUNDS):
            shutil.copy(folder / file, HERE / folder.name / file)
    return blocks


def render(name: str, blocks: Mapping[str, str], moved: Mapping[str, Path]) -> None:
    """Fill one page with these blocks and a report's tables and figures; see `make_report`."""
    path = HERE / f"{name}.md"
    page = path.read_text(encoding="utf-8")
    with TemporaryDirectory() as out:
        make_report(page, moved, Path(out))
        for folder, figure in FIGURE.findall(page):
            shutil.copy(Path(out) / "figures" / f"{figure}.png", HERE / folder / f"{figure}.png")
        path.write_text(fill(page, {**blocks, **tables(Path(out))}), encoding="utf-8")


def render_recorded(name: str) -> None:
    """Fill one page from the numbers kept beside it, but for what only run folders tell."""
    page = (HERE / f"{name}.md").read_text(encoding="utf-8")
    render(name, {}, {str(folder): HERE / folder.name for folder in sweeps(page)})


def verify_a_sample(names: list[str]) -> None:
    """Do the first finished run of each experiment again; say in README.md what came of it."""
    lines = []
    for name in names:
        results = pd.read_csv(Path("outputs", name, RESULTS))
        said = StringIO()
        run = results.loc[results["status"] == "done", "run_id"].min()
        with redirect_stdout(said):
            verify([str(Path("outputs", name, run))])
        lines.append(f"- {said.getvalue()}")
    readme = HERE / "README.md"
    page_text = fill(readme.read_text(encoding="utf-8"), {"verified": "".join(lines)})
    readme.write_text(page_text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--verify"]:
        verify_a_sample(sys.argv[2:])
    elif sys.argv[1:2] == ["--recorded"]:
        for given in sys.argv[2:]:
            render_recorded(given)
    else:
        for given in sys.argv[1:]:
            render(given, keep(given), {})
