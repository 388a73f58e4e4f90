"""What our schemas share: their base, and the bounds of a recipe and of a model."""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_serializer

# The upper bounds are far above what makes sense.
WindowTokens = Annotated[int, Field(gt=0, le=1 << 24)]
SinkTokens = Annotated[int, Field(ge=0, le=1 << 16)]
ReachTokens = Annotated[int, Field(gt=0, le=1 << 32)]
TrueTokens = Annotated[int, Field(ge=0, le=1 << 32)]
BlockTokens = Annotated[int, Field(gt=0, le=1 << 12)]
BlockCount = Annotated[int, Field(gt=0, le=1 << 16)]
FeatureCount = Annotated[int, Field(gt=0, le=1 << 12)]
KeptCount = Annotated[int, Field(ge=0, le=1 << 12)]
GateRank = Annotated[int, Field(gt=0, le=1 << 12)]
GateNormalizer = Annotated[float, Field(ge=2**-10, le=1 << 10)]
PartitionCount = Annotated[int, Field(gt=0, le=256)]
ExpertCount = Annotated[int, Field(gt=0, le=1 << 12)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Frozen(BaseModel):
    """Base of all our schemas: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Lean(Frozen):
    """Written without the fields of ``later`` that are at their default.

    So that a model without a newer feature has the very config, and so the fingerprint, that it had
    before there was one.
    """

    later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _as_before(self, handler: Callable[[Any], Any]) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        known = type(self).model_fields
        unused = {n for n in self.later if getattr(self, n) == known[n].default}
        return {name: value for name, value in fields.items() if name not in unused}
