"""respike: open-weights Transformers into brain-inspired, linear-time language models.

The names below are the library's public face, one for each verb of the command line. They load on
first use, so that ``import respike`` and ``respike --help`` do not wait for torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("respike")

_HOMES = {
    "Model": "respike.loading",
    "ModelConfig": "respike.config",
    "Recipe": "respike.recipe",
    "RespikeError": "respike.errors",
    "convert": "respike.conversion",
    "generate": "respike.generation",
    "load": "respike.loading",
    "load_recipe": "respike.recipe",
    "plan": "respike.conversion",
    "recall": "respike.evaluation",
    "select": "respike.selection",
    "spike": "respike.spiking",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'respike' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
