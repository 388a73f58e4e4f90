"""Documents: read once, ask many."""

from respike.documents.reader import Keeper, read
from respike.documents.reading import Reading, load_model_of, load_reading, read_facts
from respike.documents.sources import Source, open_sources

__all__ = [
    "Keeper",
    "Reading",
    "Source",
    "load_model_of",
    "load_reading",
    "open_sources",
    "read",
    "read_facts",
]
