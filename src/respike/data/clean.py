"""What is done to text before it is trained on, and which of it is left out.

`Cleaner` sees every document once, in order. It leaves out paragraphs it has seen before (licence
texts, boilerplate, what two versions of a page share), paragraphs that stand in held-out texts,
documents that are nearly one it has kept, and what is too short to learn from.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from respike.errors import BackendError

MIN_CHARS = 200
"""Of a document, after cleaning."""
REPEATED_CHARS = 60
"""Shorter paragraphs may be repeated: headings, signatures, single lines of code."""
SHINGLE_WORDS, GRAM_WORDS = 5, 8
EDGE_PARAGRAPHS, EDGE_DOCUMENTS, EDGE_FRAC = 25, 8, 0.05
"""A page's furniture: in the first or last 25 paragraphs of 8 pages at least and of 5 %."""
NEAR_FRAC = 0.7
"""Estimated share of common shingles at which two documents are the same."""
PERMUTATIONS, BANDS = 128, 32
NEAR_HELDOUT_FRAC = 0.5
"""Share of a paragraph's runs of eight words found in held-out texts, at which it is left out."""
LOST_FRAC = 0.3
"""Share of a document lost that way, at which the whole document is left out."""

ANSI = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|[@-Z\\-_])")
OVERSTRIKE = re.compile(r".\x08")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u200b\ufeff\u00b6]")


def plain(text: str) -> str:
    """Text without terminal codes and control characters, with even line ends and spacing."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n\n")
    text = CONTROL.sub("", OVERSTRIKE.sub("", ANSI.sub("", text))).replace("\u00a0", " ")
    *lines, last = text.split("\n")
    text = "\n".join((*(line.rstrip(" \t") for line in lines), last))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def frequent_edges(texts: Iterable[str]) -> frozenset[str]:
    """Short paragraphs that many documents of one source begin or end with: menus, dates."""
    counts: Counter[str] = Counter()
    documents = 0
    for text in texts:
        documents += 1
        parts = text.split("\n\n")
        edges = parts[:EDGE_PARAGRAPHS] + parts[-EDGE_PARAGRAPHS:]
        counts.update({part.strip() for part in edges if len(part) < REPEATED_CHARS})
    least = max(EDGE_DOCUMENTS, EDGE_FRAC * documents)
    return frozenset(part for part, count in counts.items() if count >= least)


def without_edges(text: str, edges: Collection[str]) -> str:
    """The text from its first to its last paragraph that is not one of ``edges``."""
    parts = text.split("\n\n")
    kept = [i for i, part in enumerate(parts) if part.strip() not in edges]
    return "\n\n".join(parts[kept[0] : kept[-1] + 1]) if kept else ""


def words_of(text: str) -> list[str]:
    """Words for comparing, in lower case."""
    return re.findall(r"\w+", text.lower())


def shingles(words: list[str], size: int) -> Iterator[str]:
    """Every run of ``size`` words."""
    return (" ".join(words[i : i + size]) for i in range(len(words) - size + 1))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Cleaner:
    """Decides paragraph by paragraph and document by document what to keep.

    Args:
        heldout: Texts that will be measured on.

    Raises:
        BackendError: rensa, which finds the near-duplicates, is not installed.
    """

    def __init__(self, heldout: Iterable[str] = ()) -> None:
        try:
            from rensa import RMinHash, RMinHashLSH
        except ImportError:
            raise BackendError(
                "building a corpus needs rensa, which is not installed",
                hint="run `pip install 'respike[train]'`",
            ) from None
        self._minhash = RMinHash
        self._near = RMinHashLSH(NEAR_FRAC, PERMUTATIONS, BANDS)
        self._kept: list[RMinHash] = []
        self._paragraphs: set[int] = set()
        self._heldout = {_hash(g) for text in heldout for g in shingles(words_of(text), GRAM_WORDS)}
        self.dropped: Counter[str] = Counter()

    def clean(self, text: str) -> str | None:
        """What is kept of a document, or None; `dropped` counts the rest."""
        text = plain(text)
        kept, lost = [], 0
        new: set[int] = set()  # not seen before, should the document be dropped
        for paragraph in text.split("\n\n"):
            if self._is_heldout(paragraph):
                self.dropped["paragraphs_near_heldout"] += 1
                lost += len(paragraph)
            elif self._is_repeated(paragraph, new):
                self.dropped["paragraphs_repeated"] += 1
                self.dropped["repeated_characters"] += len(paragraph)
            else:
                kept.append(paragraph)
        if lost > LOST_FRAC * len(text):
            self.dropped["documents_near_heldout"] += 1
            return None
        result = "\n\n".join(kept).strip()
        if len(result) < MIN_CHARS or not re.search(r"\w{2}", result):
            self.dropped["documents_short"] += 1
            return None
        if self._is_near(result):
            self.dropped["documents_near_duplicate"] += 1
            return None
        self._paragraphs |= new
        return result

    def _is_heldout(self, paragraph: str) -> bool:
        if not self._heldout:
            return False
        grams = [_hash(gram) for gram in shingles(words_of(paragraph), GRAM_WORDS)]
        found = sum(gram in self._heldout for gram in grams)
        return bool(grams) and found >= NEAR_HELDOUT_FRAC * len(grams)

    def _is_repeated(self, paragraph: str, new: set[int]) -> bool:
        if len(paragraph) < REPEATED_CHARS:
            return False
        digest = _hash(" ".join(paragraph.lower().split()))
        seen = digest in self._paragraphs or digest in new
        new.add(digest)
        return seen

    def _is_near(self, text: str) -> bool:
        """Whether a kept document is nearly this one; if not, this one is kept."""
        words = words_of(text)
        sketch = self._minhash(PERMUTATIONS, 0)
        sketch.update(list(shingles(words, SHINGLE_WORDS)) or words)
        if any(self._kept[i].jaccard(sketch) >= NEAR_FRAC for i in self._near.query(sketch)):
            return True
        self._near.insert(len(self._kept), sketch)
        self._kept.append(sketch)
        return False
