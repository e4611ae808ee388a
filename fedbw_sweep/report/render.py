"""A table as it goes into a paper or a page: CSV, Markdown, LaTeX and HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from textwrap import wrap
from unicodedata import normalize

import pandas as pd

LONG = 40
"""Rows from which a LaTeX table may break over pages (package ``longtable``)."""

WIDE = 40
"""Characters from which a column of text wraps in LaTeX."""

_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "±": r"$\pm$",
    "—": "---",
    "…": r"\dots{}",
    "-": "{-}",  # no ligature: --target-loss stays two hyphens
    "/": r"/\allowbreak{}",  # paths wrap
    "\n": " ",
}


_SIZES = {"footnotesize": 105, "scriptsize": 134, "tiny": 10**9}
"""The LaTeX font size for as many characters across, so that tables fit a page's width."""


@dataclass(frozen=True)
class Rendered:
    """A finished table.

    Attributes
    ----------
    name : str
        Stem of its files.
    title : str
        Its caption.
    frame : pandas.DataFrame
        What people read: text, units in the headers.
    best : pandas.DataFrame of bool
        Shape and labels of `frame`: the cells in bold.
    data : pandas.DataFrame
        What programs read: the same as numbers.
    notes : tuple of str
        Remarks below the table.
    """

    name: str
    title: str
    frame: pd.DataFrame
    best: pd.DataFrame
    data: pd.DataFrame
    notes: tuple[str, ...] = ()

    @cached_property
    def numeric(self) -> list[bool]:
        """Which columns are numbers: they are set flush right."""
        return [_is_numeric(self.frame[name]) for name in self.frame]

    def to_markdown(self, rows: int | None = None) -> str:
        """Return the table in Markdown, only its first `rows` if given."""
        header, cells = self._marked(_markdown, "**{}**", rows)
        rule = ["---:" if is_numeric else "---" for is_numeric in self.numeric]
        table = "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *cells])
        left = len(self.frame) - len(cells)
        notes = [*([f"{left} more rows are in {self.name}.md"] if left else []), *self.notes]
        return "\n\n".join([f"**{_markdown(self.title)}**", table, *map(_markdown, notes)]) + "\n"

    def to_latex(self) -> str:
        r"""Return a LaTeX table for ``\usepackage{booktabs}``, of long ones a ``longtable``."""
        _, cells = self._marked(escape_latex, r"\textbf{{{}}}")
        names = [_lines(str(name)) for name in self.frame]
        header = [r"\shortstack{" + r"\\".join(map(escape_latex, parts)) + "}" for parts in names]
        widths = [self.frame[name].str.len().max() for name in self.frame]
        wide = sum(width > WIDE for width in widths)
        paragraph = rf"p{{{0.4 / max(1, wide):.2f}\linewidth}}"
        columns = "".join(
            "r" if is_numeric else paragraph if width > WIDE else "l"
            for is_numeric, width in zip(self.numeric, widths, strict=True)
        )
        across = sum(
            2 + max(min(width, WIDE), *map(len, parts))
            for width, parts in zip(widths, names, strict=True)
        )
        size = next(name for name, most in _SIZES.items() if across <= most)
        gap = "2pt" if size == "tiny" else "4pt"
        lines = [" & ".join(line) + r" \\" for line in [header, *cells]]
        head = ["\\toprule", lines[0], "\\midrule"]
        caption = rf"\caption{{{escape_latex(self.title)}}}\label{{tab:{self.name}}}"
        notes = [rf"\par\smallskip {escape_latex(note)}" for note in self.notes]
        if len(cells) > LONG:
            text = [
                rf"{{\{size}\setlength{{\tabcolsep}}{{{gap}}}",
                rf"\begin{{longtable}}{{{columns}}}",
                caption + r" \\",
                *head,
                r"\endhead",
                *lines[1:],
                r"\bottomrule",
                r"\end{longtable}",
                *notes,
                "}",
            ]
        else:
            text = [
                r"\begin{table}[htbp]",
                rf"\centering\{size}\setlength{{\tabcolsep}}{{{gap}}}",
                caption,
                rf"\begin{{tabular}}{{{columns}}}",
                *head,
                *lines[1:],
                r"\bottomrule",
                r"\end{tabular}",
                *notes,
                r"\end{table}",
            ]
        return "\n".join([*text, ""])

    def to_html(self) -> str:
        """Return an HTML ``table`` element and its notes; numbers have the class ``number``."""
        header, cells = self._marked(html.escape, "<strong>{}</strong>")
        kinds = [' class="number"' if is_numeric else "" for is_numeric in self.numeric]
        head, row = (
            "<tr>" + "".join(f"<{tag}{kind}>{{}}</{tag}>" for kind in kinds) + "</tr>"
            for tag in ("th", "td")
        )
        lines = [
            f'<table id="{self.name}">',
            f"<caption>{html.escape(self.title)}</caption>",
            f"<thead>{head.format(*header)}</thead>",
            "<tbody>",
            *(row.format(*line) for line in cells),
            "</tbody>",
            "</table>",
            *(f"<p>{html.escape(note)}</p>" for note in self.notes),
        ]
        return "\n".join([*lines, ""])

    def write(self, folder: Path) -> None:
        """Write ``name.csv``, ``name.md``, ``name.tex`` and ``name.html`` into `folder`."""
        self.data.to_csv(folder / f"{self.name}.csv", index=False)
        texts = {"md": self.to_markdown(), "tex": self.to_latex(), "html": self.to_html()}
        for suffix, text in texts.items():
            (folder / f"{self.name}.{suffix}").write_text(text, encoding="utf-8")

    def _marked(
        self, escape: Callable[[str], str], bold: str, rows: int | None = None
    ) -> tuple[list[str], list[list[str]]]:
        """Return the header and the rows, escaped, the best in bold."""
        text, best = self.frame.head(rows or len(self.frame)), self.best
        marked = text.apply(lambda column: column.map({t: escape(t) for t in column.unique()}))
        for name in text:
            bold_rows = best[name].head(len(text)).to_numpy()
            marked.loc[bold_rows, name] = marked.loc[bold_rows, name].map(bold.format)
        return [escape(str(name)) for name in text.columns], marked.to_numpy().tolist()


def file_stem(name: str) -> str:
    r"""Name a table's files so that LaTeX's ``\input`` and HTML's ``id`` can name them as well."""
    plain = normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "_", plain).strip(".") or "_"


def escape_latex(text: str) -> str:
    """Make any text safe for pdfLaTeX's own fonts: accents go, what is left is a question mark."""
    return "".join(map(_escaped, text))


@cache
def _escaped(character: str) -> str:
    return _LATEX.get(character) or _plain(character)


def _plain(character: str) -> str:
    plain = normalize("NFKD", character).encode("ascii", "ignore").decode()
    return (plain or "?") if character.isprintable() else " "


def document(tables: list[Rendered], figures: list[str]) -> str:
    """Return a LaTeX article that shows every table and figure of the report's folder."""
    body = [rf"\input{{tables/{table.name}.tex}}" for table in tables]
    body += [
        rf"\begin{{figure}}[htbp]\centering\includegraphics[width=\linewidth]{{figures/{name}.pdf}}"
        rf"\caption{{{escape_latex(name.replace('_', ' '))}}}\end{{figure}}"
        for name in figures
    ]
    return "\n".join(
        [
            r"\documentclass{article}",
            r"\usepackage[margin=2cm]{geometry}",
            r"\usepackage{booktabs,longtable,graphicx}",
            r"\begin{document}",
            *body,
            r"\end{document}",
            "",
        ]
    )


def _lines(name: str) -> list[str]:
    """Break a header into short lines, after spaces, underscores and dots."""
    breakable = re.sub(r"([_.])(?=\w)", "\\1\u200b ", name)
    return [re.sub("\u200b ?", "", line) for line in wrap(breakable, 12, break_long_words=False)]


def _markdown(text: str) -> str:
    """Escape what would start a cell, emphasis or a tag; underscores inside words are safe."""
    for character in "\\|*<`":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


_NUMBER = re.compile(r"(?P<number>[-+]?(\d[\d.,]*(e[-+]?\d+)?%?|inf|nan)|—)( .*)?|failed|missing|")


def _is_numeric(column: pd.Series) -> bool:
    """Whether a column's text is numbers, with what may stand for or follow one."""
    found = [_NUMBER.fullmatch(text) for text in column.unique()]
    return all(found) and any(match["number"] for match in found if match)
