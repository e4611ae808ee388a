"""What the text weighs, by hand and by other libraries, and that it is the text that trains."""

from __future__ import annotations

import lzma

import numpy as np
import pyarrow as pa
import pytest

from fedbw_sweep.data import weight
from fedbw_sweep.data.federate import client_texts, federate
from fedbw_sweep.data.weight import weigh
from fedbw_sweep.federation.shared import text_weight
from fedbw_sweep.model.tokenizer import load_tokenizer
from tests.conftest import SMALL, config_of


def test_each_text_is_weighed_by_itself() -> None:
    texts = ["to be " * 500, "or not \u00fc", ""]
    found = weigh(texts)
    assert found.text_bytes == 3000 + 9
    each = [weigh([text]) for text in texts]
    assert found.text_bytes_xz == sum(one.text_bytes_xz or 0 for one in each)
    assert found.text_bytes_zstd == sum(one.text_bytes_zstd or 0 for one in each)
    assert (each[0].text_bytes_xz or 0) < 150
    assert (each[0].text_bytes_zstd or 0) < 50
    assert each[2].text_bytes_xz == len(lzma.compress(b"")) == 32


def test_what_is_counted_can_be_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the programs that its names promise: their formats' marks, and the text again."""
    text, packed = "a rose is a rose " * 40, dict[str, bytes]()

    class Codec(pa.Codec):  # type: ignore[misc]
        def compress(self, *arguments: object, **keywords: object) -> pa.Buffer:
            made = super().compress(*arguments, **keywords)
            packed["zstd"] = made.to_pybytes()
            return made

    monkeypatch.setattr(weight.pa, "Codec", Codec)
    found = weigh([text])
    assert found.text_bytes_zstd == len(packed["zstd"])
    assert packed["zstd"].startswith(b"\x28\xb5\x2f\xfd")
    unpacked = pa.decompress(packed["zstd"], len(text), codec="zstd", asbytes=True)
    assert unpacked == text.encode()
    assert lzma.compress(text.encode()).startswith(b"\xfd7zXZ")


def test_much_text_is_not_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight, "MOST_BYTES", 9)
    assert weigh(["12345", "6789"]).text_bytes_xz is not None
    assert weigh(["12345", "67890"]) == weight.TextWeight(10, None, None)


@pytest.mark.parametrize(
    "overrides", [(), ("num_clients=9", "data.partition=iid", "seed=3")], ids=["natural", "iid"]
)
def test_it_is_the_text_that_clients_train_on(overrides: tuple[str, ...]) -> None:
    config = config_of(*SMALL, *overrides)
    tokenize = load_tokenizer(config.model)
    arguments = config.data, config.num_clients, config.sequence_length, config.seed, tokenize
    texts, clients = list(client_texts(*arguments)), federate(*arguments).clients
    for number, text in enumerate(texts):
        assert np.array_equal(tokenize(text), clients[number])
    assert text_weight(config) == weigh(texts)
