"""What goes wrong in a federation: what fails a run, with its reason, and what does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, Message

from fedbw_sweep.config.run import RunConfig
from fedbw_sweep.federation import runs
from fedbw_sweep.federation.job import Job
from fedbw_sweep.federation.ledger import METRICS, SENT_PAYLOAD
from fedbw_sweep.federation.runs import Sink
from fedbw_sweep.records.checkpoint import Store
from fedbw_sweep.records.collect import collect
from fedbw_sweep.records.write import RunRecord
from fedbw_sweep.sweeps import run
from tests.conftest import SMALL, Execute
from tests.local import LocalBackend

pytestmark = pytest.mark.slow

TINY_BYTES = 5_283_840


def test_divergence_fails_the_run_with_its_reason(execute: Execute, tmp_path: Path) -> None:
    record = execute("lr=1e30", "local_steps=4")
    assert record.status == "failed"
    assert record.error is not None
    assert "loss is nan" in record.error
    assert "lower lr" in record.error
    assert "Traceback" not in record.error
    results, _ = collect(tmp_path / "s")
    assert results["status"].tolist() == ["failed"]
    assert results["loss"].isna().all()


@pytest.mark.parametrize(
    ("loss", "why"),
    [(709.7, None), (709.8, "709.8"), (1e30, "1e+30"), (math.inf, "inf"), (math.nan, "nan")],
)
def test_a_loss_without_a_perplexity_is_a_divergence(
    execute: Execute, monkeypatch: pytest.MonkeyPatch, loss: float, why: str | None
) -> None:
    """The largest float64 is e to the 709.78."""
    losses = iter([5.0, loss, loss])
    monkeypatch.setattr(runs, "heldout_loss", lambda model, windows: next(losses))
    record = execute()
    if why is None:
        assert record.error is None
        assert record.summary["perplexity"] == math.exp(loss)
        return
    assert (record.status, record.end) == ("failed", "diverged")
    assert record.error == (
        f"round 1: held-out loss is {why}, which has no finite perplexity; lower lr"
    )


def test_a_count_that_differs_fails_the_run(execute: Execute) -> None:
    def lie(reply: Message) -> Message:
        reply.content.metric_records[METRICS][SENT_PAYLOAD] -= 1  # type: ignore[operator]
        return reply

    record = execute(tamper=lie)
    assert record.error == (
        "round 1, client "
        f"{record_first_client(record)}: sent-payload-bytes is {TINY_BYTES - 1} "
        f"by the client's count and {TINY_BYTES} by the server's"
    )


def record_first_client(record: RunRecord) -> int:
    assert record.error is not None
    return int(record.error.split("client ")[1].split(":")[0])


def test_a_damaged_payload_fails_the_run(execute: Execute) -> None:
    def damage(reply: Message) -> Message:
        array = reply.content.array_records["arrays"]["payload"]
        flipped = bytes([array.data[0] ^ 1]) + array.data[1:]
        reply.content["arrays"] = ArrayRecord(
            {"payload": Array(array.dtype, array.shape, array.stype, flipped)}
        )
        return reply

    record = execute("compression=int8", tamper=damage)
    assert record.error is not None
    assert "payload was not made by" in record.error


def test_a_client_that_never_answers_fails_the_run(execute: Execute) -> None:
    record = execute("backend.client_timeout_s=5", tamper=lambda reply: None)
    assert record.error is not None
    assert "no reply within backend.client_timeout_s=5 s" in record.error


def test_a_clients_own_traceback_is_reported(
    execute: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr("fedbw_sweep.federation.client.train", broken)
    record = execute()
    assert record.error is not None
    assert "RuntimeError: disk on fire" in record.error
    assert "test_failures.py" in record.error


def test_a_client_that_drops_out_was_still_sent_the_model(execute: Execute) -> None:
    record = execute("num_clients=20", "fraction_fit=1.0", "clients.dropout=0.5", "local_steps=1")
    assert record.error is None
    sent = [row for row in record.messages if row["direction"] == "downlink"]
    received = [row for row in record.messages if row["direction"] == "uplink"]
    assert len(sent) == 2 * 20
    # Binomial(40, 0.5) lies outside in one of 10^4 seeds; this seed is fixed.
    assert 8 < len(received) < 32
    replied = [{row["client"] for row in received if row["round"] == n} for n in (1, 2)]
    assert replied[0] != replied[1]
    assert [row["clients"] for row in record.rounds[1:]] == [len(clients) for clients in replied]
    assert record.summary["downlink_bytes"] == 40 * TINY_BYTES
    assert record.summary["uplink_bytes"] == len(received) * TINY_BYTES
    assert record.summary["prediction"] == "exact"
    assert record.summary["predicted_bytes"] == record.summary["total_bytes"]
    again = execute(
        "num_clients=20", "fraction_fit=1.0", "clients.dropout=0.5", "local_steps=1", order=3
    )
    assert again.rounds == record.rounds


def test_a_round_without_replies_leaves_the_model(execute: Execute) -> None:
    record = execute("num_clients=1", "fraction_fit=1.0", "clients.dropout=0.99")
    assert record.error is None
    assert [row["clients"] for row in record.rounds] == [0, 0, 0]
    assert record.parts == []
    assert record.summary["loss"] == record.summary["initial_loss"]
    assert record.summary["downlink_bytes"] == 2 * TINY_BYTES


def test_a_backend_that_ends_without_a_result_fails_the_run(
    run_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nothing(LocalBackend):
        def run(self, job: Job, sinks: Sequence[Sink], store: Store | None = None) -> None:
            """End at once."""

    monkeypatch.setattr(run, "backend_of", Nothing())
    record = run.execute(run_config(*SMALL), tmp_path)
    assert (record.status, record.error) == ("failed", "backend=ray ended without a result")
