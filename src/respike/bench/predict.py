"""How long a prompt will take to read here, before it is read.

Layers of each kind the model has, of their true width, with random weights, read chunks where a
text begins and deep in it; what that took is scaled to all layers and drawn out to any length. Of a
small layer as many stand one on the other as the model has, up to a limit: what a chunk costs
beside its layers is then shared out as it will be. A layer whose groups have several mixers costs
their mean by share of groups. Assumed: between the depths that were timed, and beyond them, a chunk
costs more in proportion to what is before it; nothing else runs; what does not fit in memory is not
foreseen.
"""

import json
import time
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from respike import __version__
from respike.account import num_parameters, state_bytes
from respike.bench.machine import commit, kernel_names, processor, read_bytes_per_second
from respike.bench.ours import load_options
from respike.bench.shapes import RandomCheckpoint
from respike.config import LayerConfig, Mixer, ModelConfig
from respike.device import set_threads
from respike.errors import DataError
from respike.files import replace_text
from respike.layers.state import MixerState
from respike.loading import fast_decoder
from respike.models.decoder import PREFILL_CHUNK_TOKENS, Decoder
from respike.models.state import DecoderState
from respike.ops import backends
from respike.recipe import load_recipe

BUDGET_SECONDS = 0.7
"""For the chunks of one kind of layer at one depth, if they are not slower than that each."""
FEWEST_CHUNKS, MOST_CHUNKS = 3, 16
MOST_PARAMETERS, MOST_CACHE_BYTES = 32 << 20, 256 << 20
"""Of the layers that stand one on the other, if one alone has not more."""
DEEP_TOKENS = {"full": 16_384, "blocks": 65_536}
"""Before the last chunks that are timed, where a cache grows. Softmax costs so much more for every
token before it; blocks too while there are few to choose from, then less and less."""
TORCH_TOKENS = 16_384
"""Without native kernels no deeper: masks are made of all that is before a chunk."""
ROOM_TOKENS = MOST_CHUNKS * PREFILL_CHUNK_TOKENS
KEPT_SECONDS = 3600.0
"""Measurements older than this are made again: machines get busy and idle, warm and cold."""
VOCABULARY = 256
CACHE_FILE = "plan.json"


@dataclass(frozen=True)
class Cost:
    """Seconds of a chunk in a layer, all groups with one mixer, by the tokens before it.

    Attributes:
        points: (tokens before, seconds), ascending in tokens. A straight line leads from each to
            the next and on beyond the last two, but never down.
    """

    points: tuple[tuple[float, float], ...]

    def at(self, before: int) -> float:
        """Of the chunk that has so many tokens before it."""
        if len(self.points) == 1 or before <= self.points[0][0]:
            return self.points[0][1]
        right = min(bisect(self.points, (before,)), len(self.points) - 1)
        (x, low), (end, high) = self.points[right - 1 : right + 1]
        slope = (high - low) / (end - x)
        return high + (before - end) * (slope if before < end else max(slope, 0.0))

    def of(self, length: int) -> float:
        """Of all chunks of ``length`` tokens."""
        size = PREFILL_CHUNK_TOKENS
        if len(self.points) == 1:
            return self.points[0][1] * length / size
        whole, rest = divmod(length, size)
        last = self.at(whole * size) * rest / size
        return last + sum(self.at(size * index) for index in range(whole))


def predict(
    config: ModelConfig,
    lengths: Sequence[int],
    threads: int,
    options: Mapping[str, Any],
    cache_folder: Path,
    *,
    fresh: bool = False,
) -> dict[str, Any]:
    """Seconds to read each length, and what this machine reads.

    Args:
        config: The model.
        lengths: In tokens.
        threads: As it will run.
        options: As `respike.bench.ours.load_options` takes them.
        cache_folder: Measurements of this machine are kept there.
        fresh: Measure again.
    """
    set_threads(threads)
    how = load_options(options)
    how["dtype"] = how["dtype"] or "bf16"
    cache = _Cache(cache_folder / CACHE_FILE, threads, how, fresh)
    shares: dict[LayerConfig, list[float]] = {}
    for layer in config.layers:
        for part in layer.mixers:
            share = len(part.groups) / config.num_key_value_heads
            shares.setdefault(_measurable(config, layer, part), []).append(share)
    seconds = dict.fromkeys(lengths, 0.0)
    for layer, found in shares.items():
        name = _name(config, layer, len(found))
        measure = _Measure(config, layer, len(found), how)
        points = cache.get(name, measure)
        cost = Cost(tuple((float(before), float(took)) for before, took in points))
        for length in lengths:
            seconds[length] += sum(found) * cost.of(length)
    read = cache.get("read", lambda: read_bytes_per_second(threads))
    cache.write()
    return {
        "seconds": {str(length): value for length, value in seconds.items()},
        "read_bytes_per_second": read,
        "layers_measured": len(shares),
    }


def _measurable(config: ModelConfig, layer: LayerConfig, part: Mixer) -> LayerConfig:
    """``layer`` with ``part`` for all groups, and no more experts than a token passes."""
    everyone = tuple(range(config.num_key_value_heads))
    moe = layer.moe and layer.moe.model_copy(update={"experts": layer.moe.chosen})
    mixers = (part.model_copy(update={"groups": everyone}),)
    return layer.model_copy(update={"mixers": mixers, "moe": moe})


def _name(config: ModelConfig, layer: LayerConfig, count: int) -> str:
    sizes = (
        config.hidden_size, config.intermediate_size, config.num_attention_heads,
        config.num_key_value_heads, config.head_dim,
    )  # fmt: skip
    return f"{'/'.join(map(str, sizes))} x {count} {layer.model_dump_json()}"


@dataclass(frozen=True)
class _Measure:
    """Finds the points of a `Cost`.

    Attributes:
        config: The model.
        layer: One of its kinds of layers.
        count: How many of this kind it has.
        options: For `respike.loading.fast_decoder`.
    """

    config: ModelConfig
    layer: LayerConfig
    count: int
    options: Mapping[str, Any]

    def __call__(self) -> list[tuple[float, float]]:
        """Tokens before, and seconds of a chunk in one layer."""
        decoder = self._decoder()
        draw = torch.Generator().manual_seed(0)
        tokens = torch.randint(VOCABULARY, (1, PREFILL_CHUNK_TOKENS), generator=draw)
        points = []
        with torch.inference_mode():
            decoder(tokens, logits="none")  # the first call is slow once
            for depth in self._depths():
                state = decoder.init_state(1)
                if depth:
                    _, state = decoder(tokens, state, logits="none")
                    state = at_depth(state, depth)
                befores, times = zip(*_timed(decoder, tokens, state), strict=True)
                points.append((float(mean(befores)), median(times) / len(decoder.layers)))
        return points

    def _depths(self) -> list[int]:
        beside = () if self.layer.beside is None else self.layer.beside.mixers
        found = {d for part in (*self.layer.mixers, *beside) for d in depths(part)}
        most = TORCH_TOKENS if backends.kernels() is None else max(found)
        return sorted(d for d in found if d <= most)

    def _decoder(self) -> Decoder:
        def of(count: int) -> ModelConfig:
            return self.config.model_copy(
                update={
                    "layers": (self.layer,) * count,
                    "num_hidden_layers": count,
                    "vocab_size": VOCABULARY,
                    "tie_word_embeddings": True,
                    "learned_sinks": 0,
                }
            )

        cache = state_bytes(of(1), self._depths()[-1] + ROOM_TOKENS)
        fitting = min(MOST_PARAMETERS // num_parameters(of(1)), MOST_CACHE_BYTES // cache)
        copies = of(max(1, min(self.count, fitting)))
        return fast_decoder(RandomCheckpoint(copies, load_recipe("constant")), **self.options)


def _timed(decoder: Decoder, tokens: Tensor, state: DecoderState) -> Iterator[tuple[int, float]]:
    """Tokens before, and seconds, of one chunk after the other."""
    spent, count = 0.0, 0
    while count < FEWEST_CHUNKS or (count < MOST_CHUNKS and spent < BUDGET_SECONDS):
        before, start = state.num_tokens, time.perf_counter()
        _, state = decoder(tokens, state, logits="none")
        took = time.perf_counter() - start
        spent, count = spent + took, count + 1
        yield before, took


def depths(part: Mixer) -> tuple[int, ...]:
    """Tokens before a chunk, between which its cost in a mixer runs straight enough."""
    if part.mixer == "full":
        return 0, DEEP_TOKENS["full"]
    if part.mixer == "blocks":
        seen = part.window_tokens + part.sink_tokens + part.top_blocks * part.block_tokens
        return 0, seen, 4 * seen, max(DEEP_TOKENS["blocks"], 16 * seen)
    return (PREFILL_CHUNK_TOKENS + (part.window_tokens if part.mixer == "window" else 0),)


def at_depth(state: DecoderState, depth: int) -> DecoderState:
    """As if ``depth`` tokens had been read: what grows is filled with noise, the rest stays.

    Args:
        state: After some chunks; consumed. No cache has to grow for `ROOM_TOKENS` more.
        depth: In tokens.
    """
    noise: dict[tuple[Any, ...], Tensor] = {}

    def filled(name: str, like: Tensor) -> Tensor:
        shape = (*like.shape[:2], depth + ROOM_TOKENS, *like.shape[3:])
        key = shape, like.dtype
        if key not in noise:
            made = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(1)) - 1
            noise[key] = (127 * made if like.dtype == torch.int8 else made).to(like.dtype)
        return noise[key].abs() if name.endswith("_scale") else noise[key].clone()

    def deepened(part: MixerState) -> MixerState:
        growing = {name for name, tensor in part.tensors(0).items() if tensor.shape[2] == 0}
        held = part.tensors(state.num_tokens)
        part.restore({n: filled(n, t) if n in growing else t for n, t in held.items()})
        return part

    layers = tuple(tuple(deepened(part) for part in layer) for layer in state.layers)
    return DecoderState(layers, torch.full_like(state.tokens_seen, depth))


class _Cache:
    """Measurements of this machine, by what they depend on; those that are too old are left out."""

    def __init__(self, path: Path, threads: int, options: Mapping[str, Any], fresh: bool) -> None:
        self.path = path
        kernels = sorted(set(kernel_names().values()))
        key = (
            f"{processor()}, {threads} threads, {', '.join(kernels)}, {dict(options)}, "
            f"respike {__version__} {commit()}"
        )
        oldest = time.time() - KEPT_SECONDS
        self.all = {} if fresh else _read_cache(path, oldest)
        self.mine = self.all.setdefault(key, {})

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """What was measured before, or now."""
        if name not in self.mine:
            self.mine[name] = {"time": time.time(), "found": measure()}
        return self.mine[name]["found"]

    def write(self) -> None:
        """A cache that cannot be written costs seconds and nothing else."""
        with suppress(OSError, DataError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.path, json.dumps(self.all, indent=1))


Measurements = dict[str, dict[str, dict[str, Any]]]


def _read_cache(path: Path, oldest: float) -> Measurements:
    """Those that are not older, seconds since the epoch."""
    try:
        everything = json.loads(path.read_text(encoding="utf-8"))
        return {
            key: {name: one for name, one in some.items() if one["time"] >= oldest}
            for key, some in everything.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return {}  # of another version
