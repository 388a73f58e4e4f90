"""Pieces of a self-contained HTML page: everything is escaped here, once."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

TIE = 1.3
"""Speeds closer than this factor are a tie: machines of this kind drift by 25 %."""


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; ``kind`` is a class of the style sheet."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{escape(text)}</p>"


def plural(count: int, word: str) -> str:
    """Such as 2 threads."""
    return f"{count} {word}{'s' * (count != 1)}"


def listing(items: Sequence[str], kind: str = "") -> str:
    """A bulleted list."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<ul{attribute}>" + "".join(f"<li>{escape(i)}</li>" for i in items) + "</ul>"


def commands(lines: Sequence[str]) -> str:
    """Commands as a reader would type them."""
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def quote(text: str) -> str:
    """Words of a model."""
    return f"<blockquote>{escape(text.strip()) or '(nothing)'}</blockquote>"


def pairs(items: Mapping[str, object]) -> str:
    """Names and values."""
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in items.items())
    return f"<dl>{rows}</dl>"


def figure(svg: str, caption: str, kind: str = "") -> str:
    """A drawing with its caption; ``svg`` is markup of ours."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<figure{attribute}>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table that scrolls by itself on a narrow screen; columns of numbers stand to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    right = [all(_numeric(row[i]) for row in cells) for i in range(len(header))]
    marks = [' class="number"' if r else "" for r in right]
    head = "".join(
        f'<th scope="col"{m}>{escape(h)}</th>' for h, m in zip(header, marks, strict=True)
    )
    body = ""
    for row in cells:
        line = "".join(f"<td{m}>{escape(c)}</td>" for c, m in zip(row, marks, strict=True))
        body += f"<tr>{line}</tr>"
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _numeric(text: str) -> bool:
    return text[:1].isdigit() or text[:1] in ("-", "+") or text.startswith("not ")


def interval(low_high: Sequence[float], digits: int) -> str:
    """Such as [0.012, 0.020]."""
    return f"[{low_high[0]:.{digits}f}, {low_high[1]:.{digits}f}]"


def times(faster: float, slower: float) -> str:
    """How many times, or that it is a tie."""
    ratio = slower / faster
    return "a tie" if 1 / TIE < ratio < TIE else f"{ratio:.1f}x"


def document(title: str, body: str) -> str:
    """The whole page."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )
