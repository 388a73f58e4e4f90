"""Conversion: recipe -> plan (pure data) -> execute (shard by shard) -> receipt."""

from respike.conversion.execute import check_out, convert
from respike.conversion.plan import Plan, TensorPlan, plan

__all__ = ["Plan", "TensorPlan", "check_out", "convert", "plan"]
