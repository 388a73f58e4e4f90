"""Measuring models: distances on text, recall, intervals."""

from respike.evaluation.continuation import continuation_agreement, continuations
from respike.evaluation.distance import (
    Distances,
    Reference,
    negative_log_likelihood,
    position_buckets,
)
from respike.evaluation.recall import Score, recall
from respike.evaluation.share import MemoryShare, memory_shares
from respike.evaluation.stats import mean_interval, paired_interval, wilson
from respike.material import Vocabulary
from respike.tasks import Task, make_trials

__all__ = [
    "Distances",
    "MemoryShare",
    "Reference",
    "Score",
    "Task",
    "Vocabulary",
    "continuation_agreement",
    "continuations",
    "make_trials",
    "mean_interval",
    "memory_shares",
    "negative_log_likelihood",
    "paired_interval",
    "position_buckets",
    "recall",
    "wilson",
]
