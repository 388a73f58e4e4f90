"""Conversion: recipe -> plan (pure data) -> execute (shard by shard) -> receipt."""

from respike.conversion.execute import convert
from respike.conversion.plan import Plan, TensorPlan, plan

__all__ = ["Plan", "TensorPlan", "convert", "plan"]
