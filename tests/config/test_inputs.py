"""What a run reads enters its id by content, wherever it lies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedbw_sweep.config import inputs
from fedbw_sweep.config.inputs import with_contents
from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.data.corpora import load_corpus
from fedbw_sweep.errors import ConfigError
from fedbw_sweep.model.build import locate

Build = Callable[..., RunConfig]

PARAGRAPHS = "one two\n\nthree four\n\nfive six\n"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def text(run_config: Build, path: Path) -> RunConfig:
    return with_contents(run_config("data=text", f"data.path={path}"))


def model(run_config: Build, path: Path | str, *overrides: str) -> RunConfig:
    return with_contents(run_config("model=hub", f"model.name_or_path={path}", *overrides))


def test_a_text_that_is_read_in_another_way_is_another(run_config: Build, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text\nsome\nmore\n")
    as_lines = text(run_config, path)
    as_table = text(run_config, path.rename(tmp_path / "a.csv"))
    assert as_lines.data.content == as_table.data.content
    assert as_lines.run_id != as_table.run_id
    again = text(run_config, (tmp_path / "a.csv").rename(tmp_path / "b.TXT"))
    assert again.run_id == as_lines.run_id


def test_an_edit_within_one_tick_of_the_clock_is_seen(run_config: Build, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    now = time.time_ns()
    seen = set()
    for words in ("one two", "two one"):
        path.write_text(words)
        os.utime(path, ns=(now, now))
        seen.add(text(run_config, path).run_id)
    assert len(seen) == 2


def test_a_large_file_is_hashed_once(
    run_config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(PARAGRAPHS)
    os.utime(path, (1, 1))
    hashed: list[str] = []
    digest = inputs._digest
    monkeypatch.setattr(
        inputs, "_digest", lambda *about: (hashed.append(about[0]), digest(*about))[1]
    )
    first = text(run_config, path).run_id
    inputs._hash.cache_clear()  # as in another process
    assert text(run_config, path).run_id == first
    assert hashed == [str(path)]
    for damaged in ("{", "[]", '{"x": [1'):
        inputs._place().write_text(damaged)
        inputs._hash.cache_clear()
        assert text(run_config, path).run_id == first
    assert len(hashed) == 4


def test_an_edited_text_is_another_corpus_in_the_same_process(
    run_config: Build, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(PARAGRAPHS)
    assert load_corpus(text(run_config, path).data)["text"][0] == "one two"
    path.write_text(PARAGRAPHS.replace("one", "eleven"))
    assert load_corpus(text(run_config, path).data)["text"][0] == "eleven two"


def test_what_was_edited_is_refused_where_it_was_recorded(
    run_config: Build, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(PARAGRAPHS)
    recorded = text(run_config, path)
    assert with_contents(recorded) == recorded
    path.write_text("something else")
    with pytest.raises(ConfigError, match="edited, or is another one; restore it") as caught:
        with_contents(recorded)
    assert str(path) in str(caught.value)
    assert str(recorded.data.content) in str(caught.value)
    path.unlink()
    with pytest.raises(ConfigError, match="is not there now"):
        with_contents(recorded)
    with pytest.raises(ConfigError, match=r"data\.content=x"):
        with_contents(run_config("data.content=x"))


def test_of_a_models_folder_enters_what_transformers_reads(
    run_config: Build, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    (folder / "checkpoint-1").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    first = model(run_config, folder).run_id
    for unread in ("README.md", ".gitattributes", "optimizer.pt", "checkpoint-1/config.json"):
        (folder / unread).write_text("a word")
        assert model(run_config, folder).run_id == first
    for read in ("model.safetensors", "pytorch_model.bin", "tokenizer.model", "merges.txt"):
        (folder / read).write_text("a word")
        assert model(run_config, folder).run_id != first
        (folder / read).rename(folder / f"another-{read}")
        (folder / f"another-{read}").unlink()
        assert model(run_config, folder).run_id == first


def test_a_gguf_file_is_known_with_the_tokenizer_beside_it(
    run_config: Build, tmp_path: Path
) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF")
    alone = model(run_config, path)
    assert model(run_config, path.rename(tmp_path / "b.gguf")).run_id == alone.run_id
    (tmp_path / "notes.txt").write_text("read by nobody")
    assert model(run_config, tmp_path / "b.gguf").run_id == alone.run_id
    (tmp_path / "tokenizer.json").write_text("{}")
    assert model(run_config, tmp_path / "b.gguf").run_id != alone.run_id


def test_of_a_data_folder_enters_where_in_it_a_file_is(run_config: Build, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "a.csv").write_text("text\nsome\n")

    def of(path: Path) -> str:
        return with_contents(run_config("data=hub", f"data.path={path}")).run_id

    first = of(folder)
    assert of(folder.rename(tmp_path / "moved")) == first
    (tmp_path / "moved" / "train").rename(tmp_path / "moved" / "test")  # another split
    assert of(tmp_path / "moved") != first


def test_the_hub_is_asked_where_nothing_is_cached(
    run_config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    asked: list[tuple[str, str]] = []

    def repo_info(self: Any, name: str, *, repo_type: str, timeout: float) -> SimpleNamespace:
        asked.append((name, repo_type))
        return SimpleNamespace(sha="c0ffee")

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    inputs._of_hub.cache_clear()
    config = model(run_config, "someone/small", "data=hub", "data.path=someone/texts")
    assert (config.model.content, config.data.content) == ("revision:c0ffee", "revision:c0ffee")
    assert asked == [("someone/texts", "dataset"), ("someone/small", "model")]
    assert locate(config.model)["revision"] == "c0ffee"
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    inputs._of_hub.cache_clear()
    assert model(run_config, "someone/small").model.content is None
    # A recorded revision stands, whatever the hub has since.
    assert with_contents(config) == config
    inputs._of_hub.cache_clear()


LOADS = """
import sys
from fedbw_sweep.config.groups import ModelConfig
from fedbw_sweep.model.build import build_model
for commit in ("a" * 40, "b" * 40):
    config = ModelConfig(name="hub", weights="pretrained", name_or_path="someone/small",
                         architecture=None, content=f"revision:{commit}")
    print(build_model(config, 0).config.vocab_size)
"""


@pytest.mark.slow
def test_the_revision_of_its_name_is_loaded(run_config: Build, tmp_path: Path) -> None:
    from fedbw_sweep.model.build import build_model

    home = tmp_path / "models--someone--small"
    for commit, vocabulary in (("a" * 40, 300), ("b" * 40, 301)):
        built = build_model(run_config("model=tiny", f"model.architecture.vocab_size={vocabulary}",
                                       "model.architecture.hidden_size=8").model, 1)  # fmt: skip
        built.save_pretrained(home / "snapshots" / commit)  # type: ignore[operator]
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("b" * 40)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOADS], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["300", "301"]


@pytest.mark.slow
def test_editing_moving_and_restoring_a_model_with_its_tokenizer(
    run_config: Build, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from fedbw_sweep.model.build import build_model

    folder = tmp_path / "model"
    small = run_config("model=tiny", "model.architecture.hidden_size=8").model
    build_model(small, 1).save_pretrained(folder)  # type: ignore[operator]
    words = Tokenizer(models.WordLevel({"?": 0, "to": 1, "be": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    first = model(run_config, folder).run_id
    folder = folder.rename(tmp_path / "moved")
    assert model(run_config, folder).run_id == first
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        assert model(run_config, folder).run_id != first
        (folder / name).write_bytes(whole)
        assert model(run_config, folder).run_id == first
