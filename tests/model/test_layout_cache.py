"""Layouts without weights are the models' own.

``python -m tests.model.test_layout_cache`` writes those that the package has.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbw_sweep.config.groups import ModelConfig
from fedbw_sweep.config.section import CONF
from fedbw_sweep.model.build import build_model
from fedbw_sweep.model.layout_cache import ASSETS, Shapes, find_layout, write_layout
from fedbw_sweep.model.trainable import freeze, shapes
from fedbw_sweep.model.vector import layout_of
from tests.conftest import config_of


def built_in_choices() -> list[str]:
    """The choices of conf/model that list their architecture."""
    texts = {path.stem: path.read_text() for path in (CONF / "model").glob("*.yaml")}
    return [choice for choice, text in texts.items() if "architecture: null" not in text]


@pytest.mark.slow
@pytest.mark.parametrize("choice", built_in_choices())
def test_layouts_among_the_assets_are_the_models(choice: str) -> None:
    config = config_of(f"model={choice}")
    stored = find_layout(config)
    assert stored == shapes(config)[:2]
    if choice != "pythia-12b":  # 47 GB
        assert stored == (layout_of(build_model(config.model, 1)), 0)


def test_nothing_else_is_among_the_assets() -> None:
    assert len(list(ASSETS.glob("*.json"))) == len(built_in_choices())


SMALL = {
    "gpt_neox": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
    "gpt2": {"n_embd": 8, "n_layer": 1, "n_head": 2},  # its embeddings are tied
    "bloom": {"hidden_size": 8, "n_layer": 1, "n_head": 2},
}


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("gpt_neox", {"gpt_neox.embed_in.weight", "lm_head.weight"}),
        ("gpt2", {"transformer.wte.weight"}),  # the head is tied to it
        ("bloom", {"transformer.word_embeddings.weight"}),
    ],
)
def test_arrays_with_a_row_for_each_token_are_marked(kind: str, named: set[str]) -> None:
    architecture = {"model_type": kind, "vocab_size": 300, **SMALL[kind]}
    model = ModelConfig(name=kind, weights="random", name_or_path=None, architecture=architecture)
    layout = layout_of(build_model(model, 1))
    assert {tensor.name for tensor in layout.tensors if tensor.tokens} == named


@pytest.mark.parametrize("kind", SMALL)
def test_a_derived_layout_is_the_models_and_is_kept(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    architecture = {"model_type": kind, "vocab_size": 300, **SMALL[kind]}
    model = ModelConfig(name=kind, weights="random", name_or_path=None, architecture=architecture)
    config = config_of().model_copy(update={"model": model})
    layout = find_layout(config)
    built = build_model(model, 1)
    assert layout == (layout_of(built), 0)
    [kept] = tmp_path.rglob("*.json")
    monkeypatch.setattr("fedbw_sweep.model.trainable.shapes", None)
    assert find_layout(config) == layout  # from the cache
    saved = tmp_path / "saved"
    built.save_pretrained(saved)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from_folder = ModelConfig(
        name="hub", weights="pretrained", name_or_path=str(saved), architecture=None
    )
    assert find_layout(config.model_copy(update={"model": from_folder})) == layout
    kept.write_text("{")
    assert find_layout(config) == layout  # a damaged one is derived again


@pytest.mark.parametrize("trainable", ["head", "body", "lora"])
def test_what_is_frozen_counts_as_well(
    trainable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = config_of("model=tiny", f"trainable={trainable}")
    model = build_model(config.model, 1)
    whole = layout_of(model).dense_bytes
    freeze(model, config.trainable, 1)
    layout, frozen = find_layout(config)
    assert layout == layout_of(model)
    added = layout.dense_bytes if trainable == "lora" else 0
    assert layout.dense_bytes + frozen == whole + added
    assert find_layout(config) == (layout, frozen)  # from the cache


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    architecture = {"model_type": "gpt_neox", "vocab_size": 256, **SMALL["gpt_neox"]}
    model = ModelConfig(name="x", weights="random", name_or_path=None, architecture=architecture)
    layout, _ = find_layout(config_of().model_copy(update={"model": model}))
    assert layout.tensors


if __name__ == "__main__":
    for old in ASSETS.glob("*.json"):
        old.unlink()
    for choice in built_in_choices():
        config = config_of(f"model={choice}")
        write_layout(Shapes(*shapes(config)), config, ASSETS)
