"""Tables as text: what is special in each format is escaped, numbers are flush right."""

from __future__ import annotations

import pandas as pd
import pytest

from fedbw_sweep.report.render import Rendered, escape_latex


def test_special_characters_are_escaped() -> None:
    assert escape_latex("a_b & 5% $#{}") == r"a\_b \& 5\% \$\#\{\}"
    assert escape_latex("\\~^") == r"\textbackslash{}\textasciitilde{}\textasciicircum{}"
    frame = pd.DataFrame({"a|b": ["<x> | *y*"]})
    table = Rendered("n", "t", frame, pd.DataFrame(True, frame.index, frame.columns), frame)
    assert r"| **\<x> \| \*y\*** |" in table.to_markdown()
    assert "<strong>&lt;x&gt; | *y*</strong>" in table.to_html()


@pytest.mark.parametrize(
    ("texts", "side"),
    [
        (["1.0 ± 0.0", "failed", ""], "---:"),
        (["2 of 3: 1 failed", "3"], "---:"),
        (["— (not reached in 2 rounds)", "-1.5e-05 (10.0x)"], "---:"),
        (["failed", "missing"], "---"),
        (["59277e12ab01"], "---"),  # a run_id
        (["topk density=0.1"], "---"),
    ],
)
def test_columns_of_numbers_are_flush_right(texts: list[str], side: str) -> None:
    frame = pd.DataFrame({"a": texts})
    table = Rendered("n", "t", frame, frame == "?", frame)
    assert f"| {side} |" in table.to_markdown()
    assert ('<td class="number">' in table.to_html()) == (side == "---:")
    column = table.to_latex().split("tabular}{")[1][0]
    assert column == ("r" if side == "---:" else "l")
