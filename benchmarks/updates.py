"""Bits at equal error on updates of other kinds: is the flagship's gain that of one update?

python benchmarks/updates.py
python benchmarks/updates.py --save update.npz   # the second, for `python -m fedbw_sweep.codecs`
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from fedbw_sweep.bench.measures import error
from fedbw_sweep.bench.updates import BenchConfig
from fedbw_sweep.compression.base import Compressor, FloatVector, Layout
from fedbw_sweep.compression.ecsq import ECSQ
from fedbw_sweep.compression.eden import Eden
from fedbw_sweep.compression.lowrank_ecsq import LowRankECSQ
from fedbw_sweep.config.groups import ModelConfig
from fedbw_sweep.config.section import CONF
from fedbw_sweep.data.corpora import load_corpus
from fedbw_sweep.data.federate import federate
from fedbw_sweep.data.tokens import Tokens, windows
from fedbw_sweep.model.build import build_model
from fedbw_sweep.model.tokenizer import load_tokenizer
from fedbw_sweep.model.vector import layout_of, read_arrays
from fedbw_sweep.seeding import rng_for
from fedbw_sweep.training.local import ADAMW, train
from fedbw_sweep.training.process import prepare_process

NMSES = 0.133, 0.055, 0.0095
SIZES = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
GPT2 = {"model_type": "gpt2", "vocab_size": 512, "n_embd": 128, "n_layer": 4, "n_head": 4}
LLAMA = {"model_type": "llama", "intermediate_size": 344, **SIZES}
WIDE = {"model_type": "gpt_neox", **SIZES, "hidden_size": 512, "intermediate_size": 2048}
WIDE |= {"num_hidden_layers": 2}

Update = tuple[Layout, FloatVector]


class Bench:
    """One client's text and the model of the codec bench."""

    def __init__(self) -> None:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            self.config = BenchConfig.from_hydra(compose("codecs", []))
        c = self.config
        self.tokenize = load_tokenizer(c.model)
        text = federate(c.data, c.clients, c.sequence_length, c.seed, self.tokenize)
        self.sequences: Tokens = windows(text.clients[0], c.sequence_length)

    def anywhere(self, count: int) -> Tokens:
        """Draw sequences that start anywhere in the plays, speakers' names between speeches."""
        corpus = load_corpus(self.config.data)
        names = corpus["client"].str.partition("/")[2]
        tokens = self.tokenize("\n\n".join(names + "\n" + corpus["text"]))
        length = self.config.sequence_length + 1
        starts = rng_for(self.config.seed, "anywhere").integers(0, len(tokens) - length, count)
        return np.lib.stride_tricks.sliding_window_view(tokens, length)[starts]

    def update(
        self,
        steps: int,
        before: int = 0,
        architecture: dict[str, Any] | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] = ADAMW,
        lr: float = 1e-3,
        rounded: bool = False,
        sequences: Tokens | None = None,
    ) -> Update:
        """Train `before` steps, then `steps` more, whose update it is."""
        own = {"weights": "random", "architecture": architecture, "name_or_path": None}
        config = ModelConfig(name="other", **own) if architecture else self.config.model
        model = build_model(config, self.config.seed)
        for part, count in enumerate((before, steps)):
            start = read_arrays(model)[0]
            rng = rng_for(self.config.seed, "train", part)
            how: dict[str, Any] = {"epochs": 0, "steps": count, "lr": lr, "rng": rng}
            own_text = self.sequences if sequences is None else sequences
            train(model, own_text, batch_size=8, optimizer=optimizer, **how)
        end = read_arrays(model)[0]
        if rounded:  # weights that are kept in bfloat16
            start, end = (torch.from_numpy(v).bfloat16().float().numpy() for v in (start, end))
        return layout_of(model), end - start


def bits(compressor: Compressor, layout: Layout, update: FloatVector) -> tuple[float, float]:
    """Return bits per coordinate and NMSE."""
    payload = compressor.encode(update, layout, rng_for(0, "encode"))
    return 8 * len(payload) / layout.size, error(compressor.decode(payload, layout), update)


def main(save: str | None) -> None:
    prepare_process()
    bench = Bench()
    if save:
        layout, update = bench.update(100, sequences=bench.anywhere(800))
        np.savez(save, **{tensor.name: array for tensor, array in layout.split(update)})
        return
    sgd = partial(torch.optim.SGD, momentum=0.9)
    kinds: dict[str, Callable[[], Update]] = {
        "GPT-NeoX, 100 AdamW steps": lambda: bench.update(100),
        "the same, sequences from anywhere in the plays": lambda: bench.update(
            100, sequences=bench.anywhere(800)
        ),
        "the same, weights rounded to bf16": lambda: bench.update(100, rounded=True),
        "the same model, 20 steps after 500": lambda: bench.update(20, before=500),
        "the same model, 100 SGD steps": lambda: bench.update(100, optimizer=sgd, lr=0.1),
        "GPT-2, 60 AdamW steps": lambda: bench.update(60, architecture=GPT2),
        "Llama, 60 AdamW steps": lambda: bench.update(60, architecture=LLAMA),
        "GPT-NeoX of 512 x 2,048 matrices, 60 AdamW steps": lambda: bench.update(
            60, architecture=WIDE
        ),
    }
    methods = [
        (f"{name}, NMSE {nmse:g}", cls(target_nmse=nmse), nmse)
        for nmse in NMSES
        for name, cls in (("`lowrank_ecsq`", LowRankECSQ), ("`ecsq`", ECSQ))
    ]
    eden = [(f"`eden` {n} bits: NMSE", Eden(n)) for n in (2, 4)]
    heads = ["update", "coordinates", *(name for name, *_ in methods), *(name for name, _ in eden)]
    print("| " + " | ".join(heads) + " |\n|---|" + "---:|" * (len(heads) - 1))
    for kind, make in kinds.items():
        layout, update = make()
        cells = [kind, f"{layout.size:,}"]
        for _, compressor, nmse in methods:
            rate, found = bits(compressor, layout, update)
            assert found <= nmse * (1 + 1e-6), (kind, compressor, found)
            cells.append(f"{rate:.3f}")
        cells += [f"{bits(compressor, layout, update)[1]:.3g}" for _, compressor in eden]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save")
    main(parser.parse_args().save)
