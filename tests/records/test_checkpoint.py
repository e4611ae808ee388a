"""States on disk: what goes in comes out, and a write that fails leaves the one before."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedbw_sweep.errors import DamagedError
from fedbw_sweep.records import checkpoint, trees
from fedbw_sweep.records.checkpoint import Made, Store, read_checkpoint
from fedbw_sweep.records.trees import parse_tree, write_tree

MADE = Made("0123456789ab", {"torch": "2"}, "cpu")

arrays = hnp.arrays(
    st.sampled_from([np.dtype(name) for name in ("f4", "f8", "i8", "u1", "?")]),
    hnp.array_shapes(min_dims=0, min_side=0),
)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    plain | st.binary() | arrays,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        alike = isinstance(b, np.ndarray) and (a.dtype, a.shape) == (b.dtype, b.shape)
        return bool(alike and a.tobytes() == b.tobytes())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@given(tree=values)
def test_a_tree_comes_back(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    path = tmp_path_factory.mktemp("t") / "tree"
    size, _ = write_tree(path, tree)
    data = path.read_bytes()
    assert len(data) == size
    assert same(parse_tree(path, data), tree)


@given(tree=values, cut=st.floats(0, 1), flip=st.integers(0, 10**6))
def test_a_damaged_tree_is_an_error_or_a_tree(
    tmp_path_factory: pytest.TempPathFactory, tree: Any, cut: float, flip: int
) -> None:
    path = tmp_path_factory.mktemp("t") / "tree"
    write_tree(path, tree)
    data = bytearray(path.read_bytes())
    data[flip % len(data)] ^= 1 + flip % 255
    for damaged in (bytes(data), bytes(data[: int(cut * len(data))])):
        try:
            parse_tree(path, damaged)
        except DamagedError:
            continue


def test_what_a_tree_cannot_hold_is_refused(tmp_path: Path) -> None:
    for value in (object(), {1, 2}, np.float64(1), np.array([object()], dtype=object)):
        with pytest.raises((TypeError, ValueError)):
            write_tree(tmp_path / "tree", [value])


def store_in(folder: Path, start: Any = None) -> Store:
    return Store(folder, MADE, "a processor", math.inf, start, print)


def save(store: Store, number: int, **parts: Any) -> None:
    store.append("rounds", f"{number}\n".encode())
    store.save(number, False, parts.items())


class Disk:
    """Refuses the write of a number, and all after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
        self.left = allowed
        for where, name in (
            (trees.np.lib.format, "write_array"),
            (checkpoint, "_write_synced"),
            (checkpoint._Log, "_write"),
            (checkpoint.os, "fsync"),
        ):
            monkeypatch.setattr(where, name, self.counting(getattr(where, name)))

    def counting(self, write: Any) -> Any:
        def refused(*arguments: Any, **keywords: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return write(*arguments, **keywords)

        return refused


@pytest.mark.parametrize("allowed", range(16))
def test_a_save_that_fails_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    """At each write; the next save that succeeds has all of it."""
    store = store_in(tmp_path)
    vector = np.arange(5, dtype=np.float32)
    with monkeypatch.context() as patched:
        save(store, 1, server=vector, client=vector + 1)
        disk = Disk(patched, allowed)
        with suppress(OSError):
            save(store, 2, server=vector + 2)
        found = read_checkpoint(tmp_path)
        assert found is not None
        found.check()
        saved = found.round
        assert saved == 2 or disk.left < 0
        assert found.log("rounds") == b"1\n2\n"[: 2 * saved]
        assert found.tree("server").tolist() == (vector + 2 * (saved - 1)).tolist()
        assert found.tree("client").tolist() == (vector + 1).tolist()
    save(store, 3, server=vector + 3)
    found = read_checkpoint(tmp_path)
    assert found is not None
    found.check()
    assert found.log("rounds") == b"1\n2\n3\n"
    names = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert names == {"state.json", "rounds", "updates", "server.3", "client.1"}


def test_what_was_written_after_the_last_save_is_cut(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save(store, 1, server=[1])
    store.append("rounds", b"2, whose process was killed\n")
    found = read_checkpoint(tmp_path)
    again = store_in(tmp_path, found)
    save(again, 2, server=[2])
    found = read_checkpoint(tmp_path)
    assert found is not None
    assert found.log("rounds") == b"1\n2\n"


def test_a_copy_is_whole_and_its_own(tmp_path: Path) -> None:
    store = store_in(tmp_path / "long")
    (tmp_path / "long").mkdir()
    (tmp_path / "short").mkdir()
    save(store, 1, server=[1])
    store.copy_to(tmp_path / "short")
    save(store, 2, server=[2])
    copy = read_checkpoint(tmp_path / "short")
    assert copy is not None
    copy.check()
    assert (copy.round, copy.tree("server"), copy.log("rounds")) == (1, [1], b"1\n")


def test_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    save(store, 1, server=[1])
    path = tmp_path / "checkpoint" / "state.json"
    text = path.read_text().replace("server.1", "../server")
    path.write_text(text)
    with pytest.raises(DamagedError):
        read_checkpoint(tmp_path)
