"""Choosing by measurement which KV groups keep full softmax."""

from respike.selection.search import Budget, Selection, select, selected_recipe
from respike.selection.student import Group

__all__ = ["Budget", "Group", "Selection", "select", "selected_recipe"]
