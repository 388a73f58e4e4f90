"""Measuring models: distances on text, recall, intervals."""

from respike.evaluation.distance import (
    Distances,
    Reference,
    negative_log_likelihood,
    position_buckets,
)
from respike.evaluation.recall import TASKS, Score, Task, Vocabulary, recall
from respike.evaluation.stats import mean_interval, wilson
from respike.evaluation.text import builtin_text, contexts, read_text

__all__ = [
    "TASKS",
    "Distances",
    "Reference",
    "Score",
    "Task",
    "Vocabulary",
    "builtin_text",
    "contexts",
    "mean_interval",
    "negative_log_likelihood",
    "position_buckets",
    "read_text",
    "recall",
    "wilson",
]
