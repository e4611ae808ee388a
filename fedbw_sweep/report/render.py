"""A table as it goes into a paper or a page: CSV, Markdown, LaTeX and HTML."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "—": "---",
    "-": "{-}",  # no ligature: --target-loss stays two hyphens
    "\n": " ",
}


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

    def to_markdown(self, rows: int | None = None) -> str:
        """Return the table in Markdown, only its first `rows` if given."""
        cells = self._marked(_markdown, "**{}**").head(rows or len(self.frame))
        lines = [[_markdown(name) for name in cells.columns]]
        lines.append(["---:" if _numeric(self.frame[name]) else "---" for name in self.frame])
        lines += cells.to_numpy().tolist()
        left = len(self.frame) - len(cells)
        notes = [*([f"{left} more rows are in {self.name}.md"] if left else []), *self.notes]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([f"**{_markdown(self.title)}**", table, *map(_markdown, notes)]) + "\n"

    def to_latex(self) -> str:
        r"""Return a LaTeX table for ``\usepackage{booktabs}``, of long ones a ``longtable``."""
        cells = self._marked(escape_latex, r"\textbf{{{}}}")
        cells.columns = pd.Index([rf"\textbf{{{escape_latex(name)}}}" for name in cells.columns])
        widths = [self.frame[name].str.len().max() for name in self.frame]
        text = [
            0 if _numeric(self.frame[n]) else w for n, w in zip(self.frame, widths, strict=True)
        ]
        share = max(0.15, 0.7 / max(1, sum(width > WIDE for width in text)))
        paragraph = rf"p{{{share:.2f}\linewidth}}"
        style = "".join("r" if not w else paragraph if w > WIDE else "l" for w in text)
        long = len(self.frame) > LONG
        table = cells.style.hide(axis="index").to_latex(
            hrules=True,
            column_format=style,
            caption=escape_latex(self.title),
            label=f"tab:{self.name}",
            environment="longtable" if long else "table",
            position=None if long else "htbp",
            position_float=None if long else "centering",
        )
        notes = "".join(f"\n\\par\\smallskip {escape_latex(note)}" for note in self.notes)
        if long:
            return f"{{\\footnotesize\n{table}{notes}\n}}\n"
        head, end = "\\centering\n", "\\end{table}"
        table = table.replace(head, f"{head}\\footnotesize\n", 1)
        return table.replace(end, f"{notes.lstrip()}\n{end}" if notes else end)

    def to_html(self) -> str:
        """Return an HTML ``table`` element and its notes."""
        cells = self._marked(html.escape, "<strong>{}</strong>")
        cells.columns = pd.Index([html.escape(name) for name in cells.columns])
        table = cells.to_html(index=False, escape=False, border=0, table_id=self.name)
        caption = f"<caption>{html.escape(self.title)}</caption>"
        table = table.replace("\n  <thead>", f"\n  {caption}\n  <thead>", 1)
        return "\n".join([table, *(f"<p>{html.escape(note)}</p>" for note in self.notes)]) + "\n"

    def write(self, folder: Path) -> None:
        """Write ``name.csv``, ``name.md``, ``name.tex`` and ``name.html`` into `folder`."""
        self.data.to_csv(folder / f"{self.name}.csv", index=False)
        texts = {"md": self.to_markdown(), "tex": self.to_latex(), "html": self.to_html()}
        for suffix, text in texts.items():
            (folder / f"{self.name}.{suffix}").write_text(text, encoding="utf-8")

    def _marked(self, escape: Callable[[str], str], bold: str) -> pd.DataFrame:
        """Return the text escaped, and the best in bold."""
        marked = self.frame.copy()
        for at, name in enumerate(self.frame):
            column = [escape(text) for text in self.frame[name]]
            best = self.best[name]
            marked.isetitem(
                at, [bold.format(t) if b else t for t, b in zip(column, best, strict=True)]
            )
        return marked


def escape_latex(text: str) -> str:
    """Make any text safe for pdfLaTeX; characters beyond its fonts become question marks."""
    known = "".join(_LATEX.get(c, c if c.isprintable() else " ") for c in text)
    return known.encode("latin-1", "replace").decode("latin-1")


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
            r"\usepackage[T1]{fontenc}",
            r"\usepackage[margin=2cm]{geometry}",
            r"\usepackage{booktabs,longtable,graphicx}",
            r"\begin{document}",
            *body,
            r"\end{document}",
            "",
        ]
    )


def _markdown(text: str) -> str:
    """Escape what would start a cell, emphasis or a tag; underscores inside words are safe."""
    for character in "\\|*<`":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def _numeric(column: pd.Series) -> bool:
    """Whether a column's text starts with digits: such columns are set flush right."""
    return bool(column.str.match(r"[-+]?\d|—|$|(failed|missing)").all())
