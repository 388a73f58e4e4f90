"""Writing a model as others know it: their names, their ``config.json``, nothing of ours.

Three layouts have a Hugging Face form: full softmax everywhere (llama, qwen2, qwen3),
SpikingBrain-7B and SpikingBrain2.0. Weights are written as they are stored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from respike.checkpoint import open_checkpoint, spikingbrain, spikingbrain2
from respike.checkpoint.families import expected_tensors
from respike.config import LayerConfig, ModelConfig
from respike.conversion.execute import check_out, staged
from respike.conversion.plan import describe
from respike.conversion.shards import SHARD_BYTES, write_json, write_shards
from respike.errors import UnsupportedError
from respike.loading import Progress, load_tokenizer

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True)
class Form:
    """A layout that others read.

    Attributes:
        holds: Whether it has room for a layer.
        config: Their ``config.json``.
        name: Their name of one of our tensors.
    """

    holds: Callable[[ModelConfig, LayerConfig], bool]
    config: Callable[[ModelConfig], dict[str, Any]]
    name: Callable[[str, ModelConfig], str]


def _plain(config: ModelConfig, layer: LayerConfig) -> bool:
    del config
    (part, *more) = layer.mixers
    return part.mixer == "full" and part.memory is None and not more and _bare(layer)


def _bare(layer: LayerConfig) -> bool:
    return layer.beside is None and layer.moe is None


def _brain1(config: ModelConfig, layer: LayerConfig) -> bool:
    (part, *more) = layer.mixers
    if more or not _bare(layer) or not config.qkv_bias or config.o_bias or config.qk_norm:
        return False
    if part.mixer == "window":
        return part.sink_tokens == 0 and part.memory is None
    if part.mixer != "linear" or part.memory.kind != "gla":
        return False
    gates = part.memory.gate_rank, part.memory.gate_normalizer
    return part.memory.feature == "relu" and gates == (16, 16)


def _brain2(config: ModelConfig, layer: LayerConfig) -> bool:
    (part, *more) = layer.mixers
    if more or layer.moe is not None or config.o_bias:
        return False
    if layer.beside is None:
        moba = (
            part.mixer == "blocks"
            and part.by_head
            and (part.window_tokens, part.sink_tokens, part.reach_tokens) == (1, 0, None)
            and part.summary_tokens == part.block_tokens
        )
        return moba or (part.mixer == "full" and part.memory is None)
    (memory, *others) = (mixer.memory for mixer in layer.beside.mixers)
    return (
        part.mixer == "window"
        and (part.sink_tokens, part.memory) == (0, None)
        and memory.kind == "sse"
        and (memory.gate, memory.rank) == ("released", config.head_dim)
        and not others
        and layer.beside.merge == "mean"
        and layer.beside.num_key_value_heads == config.num_attention_heads
    )


def _plain_config(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope
    raw: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "hidden_act": "silu",
        "attention_bias": config.qkv_bias,
        "rope_theta": rope.theta,
    }
    if rope.kind == "linear":
        raw["rope_scaling"] = {"rope_type": "linear", "factor": rope.factor}
    if rope.kind == "llama3":
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = {name: getattr(rope, name) for name in ("factor", *names)}
        raw["rope_scaling"] = {"rope_type": "llama3", **scaling}
    fields = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
        "max_position_embeddings", "tie_word_embeddings",
    )  # fmt: skip
    return raw | {name: getattr(config, name) for name in fields}


FORMS = {
    "full softmax": Form(_plain, _plain_config, lambda name, _: name),
    "SpikingBrain-7B": Form(
        _brain1, spikingbrain.their_config, lambda name, _: spikingbrain.their_name(name)
    ),
    "SpikingBrain2.0": Form(_brain2, spikingbrain2.their_config, spikingbrain2.their_name),
}


def form_of(config: ModelConfig) -> str:
    """The name in `FORMS` of the layout that holds this model.

    Raises:
        UnsupportedError: None does; names the layer of the best one that does not fit.
    """
    if config.spikes or config.learned_sinks:
        what = "spikes" if config.spikes else "learned sinks"
        raise UnsupportedError(f"no Hugging Face form that respike writes holds {what}")
    misfits = {}
    for name, form in FORMS.items():
        bad = [i for i, layer in enumerate(config.layers) if not form.holds(config, layer)]
        windows = {p.window_tokens for _, p in config.mixers() if p.mixer == "window"}
        blocks = {(p.block_tokens, p.top_blocks) for _, p in config.mixers() if p.mixer == "blocks"}
        known_rope = form.config is _plain_config or config.rope.kind == "default"
        same = len(windows) <= 1 and len(blocks) <= 1 and config.rope.kind != "factors"
        same &= known_rope and (config.family in ARCHITECTURES or name != "full softmax")
        if not bad and same and (name != "SpikingBrain2.0" or any(p.beside for p in config.layers)):
            return name
        misfits[name] = bad
    closest = min(misfits, key=lambda name: len(misfits[name]))
    bad = misfits[closest]
    why = f"layer {bad[0]} is {describe(config.layers[bad[0]])}" if bad else "its settings differ"
    raise UnsupportedError(
        f"no Hugging Face form holds this model; the nearest is {closest}, but {why}"
    )


def export(
    model: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write ``model`` to the folder ``out`` under the names and config that others read.

    Args:
        model: A folder or ``.gguf`` file.
        out: Folder to create.
        force: Replace ``out`` if respike wrote it and it holds nothing else.
        shard_bytes: Largest weight file.
        progress: Called with (tensors done, tensors).

    Returns:
        What was written: ``form``, ``model_type``, ``tensors``, ``files``.

    Raises:
        UnsupportedError: No form holds the model.
        UsageError: ``out`` may not be written.
    """
    source, out = open_checkpoint(model), Path(out)
    check_out(out, source.path, force)
    config = source.config
    name = form_of(config)
    form = FORMS[name]
    shapes = dict(expected_tensors(config))
    theirs = {form.name(ours, config): ours for ours in shapes}
    raw = form.config(config)
    raw["bos_token_id"], raw["eos_token_id"] = config.bos_token_id, list(config.eos_token_ids)
    raw["torch_dtype"] = str(source.stored_dtype).removeprefix("torch.")
    with staged(out) as folder:
        files = write_shards(
            folder,
            {new: shapes[ours] for new, ours in theirs.items()},
            lambda new: source.read(theirs[new]),
            source.stored_dtype,
            shard_bytes,
            progress,
        )
        write_json(folder / "config.json", raw)
        load_tokenizer(source).save(folder)
    return {
        "form": name,
        "model_type": raw["model_type"],
        "tensors": len(shapes),
        "files": [file.name for file in files],
    }
