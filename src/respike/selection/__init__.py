"""Choosing by measurement which KV groups keep full softmax."""

from respike.selection.search import Budget, Group, Selection, select, selected_recipe

__all__ = ["Budget", "Group", "Selection", "select", "selected_recipe"]
