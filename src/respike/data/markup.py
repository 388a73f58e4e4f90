"""Markup to running text: HTML, man pages, pod."""

import re
from collections.abc import Collection
from html.parser import HTMLParser

BLOCKS = frozenset({"p", "li", "h1", "h2", "h3", "h4", "h5", "pre", "dt", "dd", "tr", "div", "br"})
HIDDEN = frozenset({"script", "style", "head"})
CONTENT = frozenset({"body", "p", "h1", "h2", "h3", "div", "pre", "ul", "ol", "table", "main"})
"""What can only stand behind a head."""
FURNITURE = frozenset(
    {
        "nav", "footer", "header", "@navigation", "@search", "@contentinfo", "#footer",
        ".navheader", ".navfooter", ".related", ".sphinxsidebar", ".sphinxsidebarwrapper",
        ".headerlink", ".toc", ".toctree-wrapper", ".breadcrumbs", ".wy-breadcrumbs",
        ".wy-nav-side", ".skip-link", ".sidebar", ".mobile-title-bar", ".copyright",
        ".nav-wrapper", ".nav-wide-wrapper", ".menu-bar", ".menu", ".mainmenu", ".nosearch",
        ".trail", ".autolinkskeyword", ".linenos", ".browse-nav", ".book-navigation",
        ".console-blocks", ".footer",
    }
)  # fmt: skip
"""What stands around a page's text: elements, ``.class``, ``#id`` and ``@role``."""
VOID = frozenset(
    {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}
)


class _Visible(HTMLParser):
    """Collects what a reader sees.

    Args:
        furniture: What to leave out, spelled as in `FURNITURE`.
        reflow: Whether line ends mean nothing outside ``pre``, as in a browser.
    """

    def __init__(self, furniture: Collection[str], reflow: bool) -> None:
        super().__init__()
        self.furniture, self.reflow = furniture, reflow
        self.parts: list[str] = []
        self.hidden = self.preformatted = 0
        self.skipped: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin an element."""
        self.hidden += tag in HIDDEN
        if tag in CONTENT:  # that a head ends may be left unsaid
            self.hidden = 0
        self.preformatted += tag == "pre"
        if self.skipped:
            self.skipped += [tag] * (tag == self.skipped[0])
        elif self.furniture and tag not in VOID:
            self.skipped += [tag] * (not _names(tag, attrs).isdisjoint(self.furniture))
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """End one."""
        self.hidden = max(0, self.hidden - (tag in HIDDEN))
        self.preformatted = max(0, self.preformatted - (tag == "pre"))
        if self.skipped and tag == self.skipped[0]:
            self.skipped.pop()
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        """Keep text that is seen."""
        if self.hidden or self.skipped:
            return
        if self.reflow and not self.preformatted:
            data = re.sub(r"\s+", " ", data)
            if not self.parts or self.parts[-1].endswith(("\n", " ")):
                data = data.lstrip(" ")
        if data:
            self.parts.append(data)


def _names(tag: str, attrs: list[tuple[str, str | None]]) -> set[str]:
    """What an element can be called in `FURNITURE`."""
    signs = {"class": ".", "id": "#", "role": "@"}
    words = ((signs[key], word) for key, value in attrs if key in signs
             for word in (value or "").lower().split())  # fmt: skip
    return {tag, *(sign + word for sign, word in words)}


def html_text(page: str) -> str:
    """Visible text of a page, a line for each block; lines of the source stay lines."""
    parser = _Visible((), reflow=False)
    parser.feed(page)
    parser.close()
    text = re.sub(r"[ \t]+", " ", "".join(parser.parts))
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", text).strip()


def page_text(page: str) -> str:
    """Text of a page as a browser lays it out: paragraphs on one line, ``pre`` as it is.

    Navigation, sidebars and footers (`FURNITURE`) are left out.
    """
    parser = _Visible(FURNITURE, reflow=True)
    parser.feed(page)
    parser.close()
    text = re.sub(r"[ \t]+\n", "\n", "".join(parser.parts))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


ESCAPES = {
    r"\-": "-", r"\e": "\\", r"\&": "", r"\|": "", r"\^": "", r"\ ": " ", r"\~": " ", r"\0": " ",
    r"\(aq": "'", r"\(dq": '"', r"\(bu": "*", r"\(em": "-", r"\(en": "-", r"\(co": "(C)",
    r"\(lq": '"', r"\(rq": '"', r"\(oq": "'", r"\(cq": "'", r"\(ga": "`", r"\(ha": "^",
    r"\(ti": "~", r"\*(Aq": "'", r"\*(L\"": '"', r"\*(R\"": '"', r"\*(C`": "", r"\*(C'": "",
    r"\*(--": "-", r"\c": "", r"\/": "", r"\,": "", r"\:": "", r"\%": "",
}  # fmt: skip
ROFF = re.compile(r"\\f(?:\[\w*\]|\(..|.)|\\s[-+]?\d+|\\\".*|\\\*?\(..|\\\*\[\w+\]|\\.")
BREAKS = frozenset({"PP", "P", "LP", "IP", "TP", "sp", "br", "RS", "RE", "Sp", "TQ", "HP"})
FONTS = frozenset({"B", "I", "R", "BR", "RB", "BI", "IB", "IR", "RI", "SM", "SB"})


def man_text(page: str) -> str:
    """Text of a man page (the ``man`` macros, those of pod2man too): a paragraph is one line.

    Lines between ``.nf`` and ``.fi`` (or ``.Vb`` and ``.Ve``) stay as they are. Macro definitions,
    tables and comments are left out.
    """
    blocks: list[list[str]] = [[]]
    verbatim, skip_to = False, ""
    _, title, body = page.partition("\n.TH ")  # before it: pod2man's definitions
    page = body.partition("\n")[2] if title else page
    for line in page.splitlines():
        if skip_to:
            skip_to = "" if line.startswith(skip_to) else skip_to
            continue
        if not line.startswith((".", "'")):
            text = _unescaped(line) if line.strip() else ""
            blocks += [[text]] if verbatim or not line.strip() else []
            if not verbatim:
                blocks[-1].append(text)
            continue
        words = line[1:].split(None, 1)
        name, rest = [*words, "", ""][:2]
        if name in ("de", "ig", "TS"):
            skip_to = ".TE" if name == "TS" else ".."
        elif name in ("nf", "fi", "Vb", "Ve", "EX", "EE"):
            verbatim = name in ("nf", "Vb", "EX")
            blocks.append([])
        elif name in ("SH", "SS"):
            blocks += [[""], [_unescaped(rest.strip('"'))], [""], []]
        elif name in BREAKS:
            tag = _arguments(rest)[:1] if name == "IP" else []
            bullet = [_unescaped(word) for word in tag]
            blocks += [[""], bullet] + [[]] * (len("".join(bullet)) > 3)
        elif name in FONTS:
            joined = ("" if len(name) == 2 and name not in ("SM", "SB") else " ").join(
                _arguments(rest)
            )
            blocks[-1].append(_unescaped(joined))
    lines = [" ".join(part.strip() for part in block if part.strip()) if len(block) > 1
             else "".join(block).rstrip() for block in blocks]  # fmt: skip
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _arguments(rest: str) -> list[str]:
    return [a or b for a, b in re.findall(r'"((?:[^"]|"")*)"?|(\S+)', rest)]


def _unescaped(line: str) -> str:
    return ROFF.sub(lambda m: ESCAPES.get(m[0], ""), line)


POD_CODE = re.compile(r"[A-Z](?:<<+ (.*?) >>+|<([^<>]*)>)", re.DOTALL)


def pod_text(page: str) -> str:
    """Text of Perl's documentation format: paragraphs rejoined, verbatim blocks as they are."""
    parts = []
    inside, skipped = False, False
    for block in re.split(r"\n\s*\n", page):
        command = re.match(r"=(\w+)\s*(.*)", block.lstrip("\n"), re.DOTALL)
        if command:
            name, rest = command[1], " ".join(command[2].split())
            inside = name != "cut"
            skipped = name in ("begin", "for") or (skipped and name != "end")
            if inside and not skipped and name not in ("over", "back", "encoding", "pod", "end"):
                parts.append(_pod_plain(rest))
        elif inside and not skipped and block.strip():
            verbatim = block.lstrip("\n")[:1] in (" ", "\t")
            parts.append(block.strip("\n") if verbatim else _pod_plain(" ".join(block.split())))
    return "\n\n".join(part for part in parts if part)


def _pod_plain(text: str) -> str:
    """Text without formatting codes, innermost first."""
    entities = {"lt": "<", "gt": ">", "verbar": "|", "sol": "/"}
    text = re.sub(r"E<(\w+)>", lambda m: "\0" + m[1] + "\0", text)
    text = re.sub(r"[ZX]<[^<>]*>", "", text)
    for _ in range(6):
        shorter = POD_CODE.sub(lambda m: (m[1] or m[2] or "").split("|")[0].lstrip("/"), text)
        if shorter == text:
            break
        text = shorter
    return re.sub("\0(\\w+)\0", lambda m: entities.get(m[1], ""), text)
