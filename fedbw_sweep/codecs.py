"""``python -m fedbw_sweep.codecs``: bits, error and speed of every method on real updates."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import hydra
import pandas as pd
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.table import Table

from fedbw_sweep.bench.apart import measure_peers
from fedbw_sweep.bench.codec import Codec
from fedbw_sweep.bench.measures import measure
from fedbw_sweep.bench.updates import BenchConfig, load_update, train_updates
from fedbw_sweep.compression.layout import Layout
from fedbw_sweep.config.groups import CompressionConfig
from fedbw_sweep.config.section import CONF
from fedbw_sweep.console import Fitted, errors_end_the_command, output_console
from fedbw_sweep.report.figure import rate_distortion
from fedbw_sweep.training.process import prepare_process

SHOWN = {
    "bits": ".3f",
    "ratio": ",.1f",
    "nmse": ".3g",
    "bound_bits": ".3f",
    "one_variance_bits": ".3f",
    "unbiased_bits": ".3f",
    "lloyd_max_nmse": ".3g",
    "percent_of_bound": ".0f",
    "index_bound_bits": ".3f",
    "encode_mb_s": ",.0f",
    "decode_mb_s": ",.0f",
    "encode_memcpy": ".1f",
    "decode_memcpy": ".1f",
    "mean_nmse_8": ".3g",
    "mean_nmse": ".3g",
}


BOUND_NOTE = (
    "percent of bound: what a method's bits would be at least, at its error, if coordinates were "
    "independent Gaussians (bound bits; unbiased bits for unbiased methods), over what they are. "
    "Coordinates of real updates may depend on one another, as low-rank ones do: methods that use "
    "it can be above 100."
)
"""Below the table."""


def main() -> None:
    """Run the command line."""
    sys.argv[1:] = [
        "peers=true" if argument == "--peers" else argument for argument in sys.argv[1:]
    ]
    _bench_command()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="codecs")
def _bench_command(cfg: DictConfig) -> None:
    with errors_end_the_command():
        config = BenchConfig.from_hydra(cfg)
        prepare_process()
        sources = HydraConfig.get().runtime.config_sources
        folders = [Path(s.path) for s in reversed(sources) if s.schema == "file"]
        choices = [
            (label, choice.build())
            for method in config.methods
            for label, choice in CompressionConfig.expand(method, folders)
        ]
        layout, updates = load_update(config.update) if config.update else train_updates(config)
        codecs = [Codec.of(*choice, layout) for choice in choices]
        tables = [measure(layout, updates, codecs, config.seed, config.repeats)]
        if config.peers:
            tables.extend(measure_peers(layout, updates, config.seed, config.repeats))
        table = pd.concat(tables, ignore_index=True)
        folder = Path(config.output)
        folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(folder / "codecs.csv", index=False)
        (folder / "codecs.md").write_text(_markdown(table), encoding="utf-8")
        rate_distortion(table, *(folder / f"rate_distortion.{suffix}" for suffix in ("png", "svg")))
        _show(table, layout, len(updates))
        print(f"{folder}/: codecs.csv, codecs.md, rate_distortion.png, rate_distortion.svg")


def _show(measured: pd.DataFrame, layout: Layout, clients: int) -> None:
    table = Table(title=f"{layout.size:,} coordinates, {clients} clients", title_justify="left")
    header, *rows = _shown(measured)
    table.add_column(header[0], no_wrap=True)
    for name in header[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    output_console().print(Fitted(table))
    output_console().print(BOUND_NOTE, soft_wrap=True)


def _shown(measured: pd.DataFrame) -> Iterator[list[str]]:
    """Yield the header, then each row, as people read them."""
    yield ["method", *(name.replace("_", " ") for name in SHOWN)]
    for row in measured.to_dict("records"):
        cells = (format(row[n], f) if pd.notna(row[n]) else "-" for n, f in SHOWN.items())
        yield [row["method"], *cells]


def _markdown(measured: pd.DataFrame) -> str:
    header, *rows = ("| " + " | ".join(cells) + " |" for cells in _shown(measured))
    rule = "|---|" + "---:|" * len(SHOWN)
    return "\n".join([header, rule, *rows, "", BOUND_NOTE, ""])


if __name__ == "__main__":
    main()
