"""``python -m fedbw_sweep.codecs``: bits, error and speed of every method on real updates."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import hydra
import numpy as np
import pandas as pd
from omegaconf import DictConfig
from pydantic import Field
from rich.progress import track
from rich.table import Table
from safetensors import SafetensorError

from fedbw_sweep.compression.layout import FloatVector, Layout, TensorSpec
from fedbw_sweep.config import (
    CONF,
    CompressionConfig,
    DataConfig,
    ModelConfig,
    Section,
    TrainableConfig,
)
from fedbw_sweep.console import errors_end_the_command, output_console
from fedbw_sweep.data import federate, windows
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.modeling import (
    layout_of,
    load_tokenizer,
    prepare_process,
    read_arrays,
    train,
    write_arrays,
)
from fedbw_sweep.peers import Codec, installed
from fedbw_sweep.report.figure import rate_distortion
from fedbw_sweep.seeding import rng_for
from fedbw_sweep.theory import (
    LLOYD_MAX_NMSE,
    gaussian_rate,
    log2_choose,
    reverse_water_filling,
    unbiased_gaussian_rate,
)
from fedbw_sweep.trainable import build_trainable

COLUMNS = {
    "method": "choice of conf/compression and its parameters, or the peer package's codec",
    "bytes": "payload bytes",
    "bits": "payload bits per coordinate",
    "ratio": "dense fp32 bytes over payload bytes",
    "nmse": "squared error over energy of the update",
    "bound_bits": "bits per coordinate that Gaussian tensors of these variances need at this NMSE",
    "one_variance_bits": "the same for Gaussian coordinates of one variance",
    "unbiased_bits": "the same for an unbiased code of one variance",
    "lloyd_max_nmse": "least NMSE of a scalar quantiser of Gaussians at these whole bits",
    "percent_of_bound": "100 x bound_bits / bits, of unbiased methods 100 x unbiased_bits / bits; "
    "above 100 the update is not Gaussian noise",
    "index_bound_bits": "log2 C(n, k) / n for the k coordinates that arrive, if fewer than half do",
    "encode_mb_s": "dense MB encoded per second, median",
    "decode_mb_s": "dense MB decoded per second, median",
    "encode_memcpy": "encoding time over the time to copy the update, medians",
    "decode_memcpy": "decoding time over the same",
    "mean_nmse": "NMSE of the mean of all clients' decoded updates",
}
"""Columns of ``codecs.csv``."""

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
    "mean_nmse": ".3g",
}


class BenchConfig(Section):
    """The keys of ``conf/codecs.yaml``, validated."""

    model: ModelConfig
    trainable: TrainableConfig
    data: DataConfig
    update: str | None
    clients: int = Field(ge=1, description="updates, at least 1")
    steps: int = Field(ge=1, description="steps, at least 1")
    batch_size: int = Field(ge=1, description="sequences, at least 1")
    sequence_length: int = Field(ge=1, description="tokens, at least 1")
    lr: float = Field(gt=0, allow_inf_nan=False, description="above 0")
    seed: int = Field(ge=0, description="at least 0")
    repeats: int = Field(ge=1, description="at least 1")
    peers: bool
    output: str
    methods: list[str]


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
        choices = [
            (label, choice.build())
            for method in config.methods
            for label, choice in CompressionConfig.expand(method)
        ]
        layout, updates = load_update(config.update) if config.update else train_updates(config)
        codecs = [Codec.of(*choice, layout) for choice in choices]
        if config.peers:
            codecs.extend(installed(layout, updates[0]))
        table = measure(config, layout, updates, codecs)
        folder = Path(config.output)
        folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(folder / "codecs.csv", index=False)
        (folder / "codecs.md").write_text(_markdown(table), encoding="utf-8")
        rate_distortion(table, *(folder / f"rate_distortion.{suffix}" for suffix in ("png", "svg")))
        _show(table, layout, len(updates))
        print(f"{folder}/: codecs.csv, codecs.md, rate_distortion.png, rate_distortion.svg")


def load_update(path: str) -> tuple[Layout, list[FloatVector]]:
    """Read one update's arrays from an ``.npz`` or ``.safetensors`` file, as float32.

    Raises
    ------
    ConfigError
        If the file is missing, unreadable, of another kind or holds no floating-point array.
    """
    file = Path(path)
    try:
        if file.suffix == ".npz":
            with np.load(file) as archive:
                arrays = dict(archive)
        elif file.suffix == ".safetensors":
            from safetensors.torch import load_file  # torch's reader knows bfloat16

            arrays = {
                name: tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
                for name, tensor in load_file(file).items()
            }
        else:
            raise ConfigError("update", path, "must be an .npz or .safetensors file")
    except (OSError, ValueError, BadZipFile, SafetensorError) as error:
        raise ConfigError("update", path, f"cannot be read: {error}") from None
    floats = {name: a for name, a in arrays.items() if np.issubdtype(a.dtype, np.floating)}
    if not floats:
        raise ConfigError("update", path, "holds no floating-point array")
    layout = Layout(tuple(TensorSpec(name, array.shape) for name, array in floats.items()))
    return layout, [np.concatenate([a.astype(np.float32).ravel() for a in floats.values()])]


def train_updates(config: BenchConfig) -> tuple[Layout, list[FloatVector]]:
    """Make each client's real update: its own text, the same initial weights."""
    text = federate(
        config.data,
        config.clients,
        config.sequence_length,
        config.seed,
        load_tokenizer(config.model),
    )
    model = build_trainable(config.model, config.trainable, config.seed)
    before, exact = read_arrays(model)
    updates = []
    for client in track(range(config.clients), "training", transient=True):
        write_arrays(model, before, exact)
        train(
            model,
            windows(text.clients[client], config.sequence_length),
            epochs=0,
            steps=config.steps,
            batch_size=config.batch_size,
            lr=config.lr,
            rng=rng_for(config.seed, "train", client),
        )
        updates.append(read_arrays(model)[0] - before)
    return layout_of(model), updates


def measure(
    config: BenchConfig, layout: Layout, updates: list[FloatVector], codecs: list[Codec]
) -> pd.DataFrame:
    """Run every codec over the updates.

    Returns
    -------
    pandas.DataFrame
        A row per codec, `COLUMNS`. Bytes, error and speed are of the first update.
    """
    first = updates[0]
    memcpy = _seconds(first.copy, 4 * config.repeats)
    energies = [float(np.square(t, dtype=np.float64).sum()) for _, t in layout.split(first)]
    sizes = [tensor.size for tensor in layout.floats]
    rows = []
    for codec in track(codecs, "measuring", transient=True):
        payloads, decoded = [], []
        for client, update in enumerate(updates):
            payloads.append(_encode(codec, update, config.seed, client))
            decoded.append(codec.decode(payloads[-1]))
        encode = _seconds(partial(_encode, codec, first, config.seed), config.repeats)
        decode = _seconds(partial(codec.decode, payloads[0]), config.repeats)
        nmse, bits = error(decoded[0], first), 8 * len(payloads[0]) / layout.size
        bound = reverse_water_filling(energies, sizes, nmse)
        unbiased = unbiased_gaussian_rate(nmse)
        kept = int(np.count_nonzero(decoded[0]))
        rows.append(
            {
                "method": codec.name,
                "bytes": len(payloads[0]),
                "bits": bits,
                "ratio": 32 / bits,
                "nmse": nmse,
                "bound_bits": bound,
                "one_variance_bits": gaussian_rate(nmse),
                "unbiased_bits": unbiased,
                "lloyd_max_nmse": LLOYD_MAX_NMSE.get(int(bits)),
                "percent_of_bound": 100 * (unbiased if codec.unbiased else bound) / bits,
                "index_bound_bits": log2_choose(layout.size, kept) / layout.size
                if 2 * kept < layout.size
                else None,
                "encode_mb_s": first.nbytes / 1e6 / encode,
                "decode_mb_s": first.nbytes / 1e6 / decode,
                "encode_memcpy": encode / memcpy,
                "decode_memcpy": decode / memcpy,
                "mean_nmse": error(np.mean(decoded, axis=0), np.mean(updates, axis=0)),
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def error(decoded: FloatVector, update: FloatVector) -> float:
    """Squared error over energy, ``|x - x'|^2 / |x|^2``."""
    difference = np.subtract(update, decoded, dtype=np.float64)
    return float(difference @ difference / np.square(update, dtype=np.float64).sum())


def _encode(codec: Codec, update: FloatVector, seed: int, client: int = 0) -> bytes:
    return codec.encode(update, rng_for(seed, "encode", client))


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def _show(measured: pd.DataFrame, layout: Layout, clients: int) -> None:
    table = Table(title=f"{layout.size:,} coordinates, {clients} clients", title_justify="left")
    header, *rows = _shown(measured)
    table.add_column(header[0], no_wrap=True)
    for name in header[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    output_console().print(table)


def _shown(measured: pd.DataFrame) -> Iterator[list[str]]:
    """Yield the header, then each row, as people read them."""
    yield ["method", *(name.replace("_", " ") for name in SHOWN)]
    for row in measured.to_dict("records"):
        cells = (format(row[n], f) if pd.notna(row[n]) else "-" for n, f in SHOWN.items())
        yield [row["method"], *cells]


def _markdown(measured: pd.DataFrame) -> str:
    header, *rows = ("| " + " | ".join(cells) + " |" for cells in _shown(measured))
    rule = "|---|" + "---:|" * len(SHOWN)
    return "\n".join([header, rule, *rows, ""])


if __name__ == "__main__":
    main()
