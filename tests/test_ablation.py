"""Parts of a model switched off: what is seen then, and that they come back."""

from itertools import pairwise

import pytest
import torch

from respike.config import Mixer
from respike.errors import UsageError
from respike.layers.softmax import WindowSoftmax
from respike.models.ablation import without
from tiny import full, model_config, random_decoder, random_tokens, window
from tolerance import assert_close

WIDE = (
    (window(0, 1, 2, tokens=7, sinks=3, reach=20),),
    (window(1, tokens=1, sinks=3, reach=20), window(0, 2, tokens=9, sinks=3, reach=20)),
    (full(0), window(1, 2, tokens=6, sinks=0)),
)
NARROW = (
    (window(0, 1, 2, tokens=1, sinks=3, reach=20),),
    (window(1, tokens=1, sinks=3, reach=20), window(0, 2, tokens=1, sinks=3, reach=20)),
    (full(0), window(1, 2, tokens=1, sinks=0)),
)


@pytest.mark.parametrize("cuts", [(), (1,), (4, 5, 6, 7, 8, 30, 31)], ids=str)
def test_without_its_window_a_query_sees_the_sinks_and_itself(cuts: tuple[int, ...]) -> None:
    """As a model whose windows are one token long; past the sinks' reach, and in any split."""
    wide, narrow = (random_decoder(model_config(layers)) for layers in (WIDE, NARROW))
    tokens, chunks = random_tokens(2, 37), [0, *cuts, 37]
    with torch.inference_mode():
        expected, _ = narrow(tokens)
        full_sight, _ = wide(tokens)
        state, outputs = wide.init_state(2), []
        with without(wide, "window"):
            for begin, end in pairwise(chunks):
                logits, state = wide(tokens[:, begin:end], state)
                outputs.append(logits)
    assert_close(torch.cat(outputs, 1), expected)
    assert (full_sight - expected).abs().max() > 0.1


def test_a_window_that_is_off_is_still_stored() -> None:
    decoder = random_decoder(model_config(WIDE))
    tokens = random_tokens(1, 23)
    with torch.inference_mode():
        _, on = decoder(tokens)
        with without(decoder, "window"):
            _, off = decoder(tokens)
    for mine, theirs in zip(on.layers, off.layers, strict=True):
        assert [p.k.shape for p in mine] == [p.k.shape for p in theirs]  # type: ignore[attr-defined]
    first_on, first_off = on.layers[0][0], off.layers[0][0]
    assert torch.equal(first_on.k, first_off.k)  # type: ignore[attr-defined]
    assert on.nbytes() == off.nbytes()


def test_parts_come_back_also_after_an_error_and_when_layers_share_a_mixer() -> None:
    decoder = random_decoder(model_config(WIDE))
    shared = WindowSoftmax(5, 2, 99)
    for layer in decoder.layers[:2]:
        layer.self_attn.set_mixers([((0, 1, 2), shared)])
    last = decoder.layers[2].self_attn.mixers[1]
    last.off = frozenset({"something"})  # type: ignore[attr-defined]

    def fails() -> None:
        with without(decoder, "window"):
            assert shared.off == {"window"}
            assert last.off == {"something", "window"}  # type: ignore[attr-defined]
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fails()
        assert shared.off == frozenset()
        assert last.off == {"something"}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("layers", "part"), [(((full(0, 1, 2),),), "window"), (WIDE, "memory"), (WIDE, "magic")]
)
def test_a_part_that_nothing_has_is_refused_and_nothing_changes(
    layers: tuple[tuple[Mixer, ...], ...], part: str
) -> None:
    decoder = random_decoder(model_config(layers))
    with pytest.raises(UsageError, match=part), without(decoder, part):
        pass
    for layer in decoder.layers:
        assert all(not mixer.off for mixer in layer.self_attn.mixers)
