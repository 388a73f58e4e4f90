"""HellaSwag's texts without the marks that its WikiHow half still carries."""

import re
from typing import Any


def without_marks(text: str) -> str:
    """``[title]`` begins a sentence; what else stands in brackets is no text."""
    text = re.sub(r"\s*\[title\]", ".", text.strip())
    return " ".join(re.sub(r"\[[^\]]*\]", " ", text).split())


def readable(dataset: Any) -> Any:
    """Adds ``query``, and cleans the endings."""

    def clean(doc: dict[str, Any]) -> dict[str, Any]:
        return {
            "query": without_marks(f"{doc['activity_label']}: {doc['ctx']}"),
            "endings": [without_marks(ending) for ending in doc["endings"]],
        }

    return dataset.map(clean)
