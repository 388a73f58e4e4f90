"""Choosing by measurement which KV groups keep full softmax, and how much the others keep."""

from respike.selection.kept import KeptShares, recipe_with_shares, share_kept_tokens
from respike.selection.search import Budget, Selection, select, selected_recipe
from respike.selection.student import Group

__all__ = [
    "Budget",
    "Group",
    "KeptShares",
    "Selection",
    "recipe_with_shares",
    "select",
    "selected_recipe",
    "share_kept_tokens",
]
