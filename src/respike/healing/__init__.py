"""Healing: a converted model learns from its original what conversion lost."""

from respike.healing.config import Healing, builtin_healings, load_healing
from respike.healing.heal import apply, heal, summary
from respike.healing.run import Request

__all__ = ["Healing", "Request", "apply", "builtin_healings", "heal", "load_healing", "summary"]
