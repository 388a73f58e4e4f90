"""What is a part of a model worth? Run the same weights with the part switched off.

A mixer that can do without a part of itself names it in ``parts`` and heeds ``off`` in its forward;
what it stores stays as it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from respike.errors import UsageError
from respike.layers.mixer import Mixer
from respike.models.decoder import Decoder


def has_part(decoder: Decoder, part: str) -> bool:
    """Whether some mixer of the decoder has such a part to switch off."""
    return any(part in module.parts for module in decoder.modules() if isinstance(module, Mixer))


@contextmanager
def without(decoder: Decoder, part: str) -> Iterator[Decoder]:
    """The decoder with a part of its mixers switched off while the block runs.

    Args:
        decoder: Its mixers are changed, and as they were afterwards, come what may.
        part: ``memory`` or ``window``.

    Raises:
        UsageError: No mixer of the model has this part, so nothing would change.
    """
    # Mixers may hold mixers, and layers may share one: each is met once here.
    before = [(module, module.off) for module in decoder.modules() if isinstance(module, Mixer)]
    if not has_part(decoder, part):
        raise UsageError(f"no mixer of this model has a {part} to switch off")
    try:
        for mixer, off in before:
            mixer.off = off | {part}
        yield decoder
    finally:
        for mixer, off in before:
            mixer.off = off
