"""Training data: documents in, packed batches out; public corpora from manifests."""

from respike.data.documents import Document, read_documents
from respike.data.packing import Batch, Loader
from respike.data.recall import Curriculum, RecallSource
from respike.data.sources import Mixture, Sample, Source, TextSource
from respike.data.store import TokenStore, open_store, prepare

__all__ = [
    "Batch",
    "Curriculum",
    "Document",
    "Loader",
    "Mixture",
    "RecallSource",
    "Sample",
    "Source",
    "TextSource",
    "TokenStore",
    "open_store",
    "prepare",
    "read_documents",
]
