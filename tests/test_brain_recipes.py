"""SpikingBrain's models by recipe: counts at full size, small twins, upcycling, released names."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from respike.account import (
    largest_unit_parameters,
    num_active_parameters,
    num_embedding_parameters,
    num_parameters,
    sharded_bytes,
    state_parts,
)
from respike.bench.shapes import shape_config
from respike.checkpoint import open_checkpoint
from respike.checkpoint.families import expected_tensors
from respike.cli.main import main
from respike.config import ModelConfig
from respike.conversion import convert, plan
from respike.conversion.export import export
from respike.errors import CheckpointError, RecipeError, UnsupportedError
from respike.loading import load, load_decoder
from respike.models.balance import watch_balance
from respike.models.decoder import Decoder
from respike.models.engine import engine_layers
from respike.recipe import apply_recipe, load_recipe
from respike.text import contexts
from tiny import D, F, K, V, random_tokens, save_tiny
from tolerance import assert_close

F32 = "weights=f32"
TWIN_76B = (
    "moe.experts=4", "moe.at=[1, 3]", "learned_sinks.count=5", "layers.0.at=[3]",
    "layers.1.sink_tokens=5", F32,
)  # fmt: skip
TWIN_5B = ("blocks.block_tokens=4", "blocks.summary_tokens=4", "layers.1.at=[0]", F32)
"""In four layers every kind would be at relative depths of its own, so places are given."""
TWINS = {
    "spikingbrain-7b": ("layers.1.window_tokens=9", F32),
    "spikingbrain-76b": (*TWIN_76B, "layers.1.window_tokens=9"),
    "spikingbrain-2-5b": (*TWIN_5B, "layers.2.window_tokens=9"),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("sources")
    return {name: save_tiny(place / name, name) for name in ("llama", "qwen2", "qwen3")}


def of(recipe: str, target: str, *overrides: str) -> ModelConfig:
    return apply_recipe(load_recipe(recipe, overrides), shape_config(target))


# ---- counts ----------------------------------------------------------------------------------


def test_the_7b_has_exactly_its_parameters() -> None:
    assert num_parameters(of("spikingbrain-7b", "qwen2.5-7b")) == 7_616_542_976


def test_the_5b_has_its_parameters() -> None:
    config = of("spikingbrain-2-5b", "qwen3-4b")
    assert num_parameters(config) == 5_166_215_168
    assert num_parameters(config) - num_embedding_parameters(config) == 4_777_259_008
    (sse,) = {layer for layer in config.layers if layer.beside}
    kinds = [layer.mixers[0].mixer for layer in config.layers]
    assert [i for i, kind in enumerate(kinds) if kind == "blocks"] == [
        0,
        1,
        2,
        3,
        6,
        12,
        17,
        21,
        24,
    ]
    assert kinds.index("full") == 35
    assert sum(layer == sse for layer in config.layers) == 26
    # The facts' 260 MiB of memory and 40 KiB a token; windows of 128 in 26 layers.
    parts = state_parts(config, 1000)
    assert parts["memory"] == 260 << 20
    assert parts["window"] == 26 * 128 * 2 * 8 * 128 * 2
    assert 40 << 10 <= parts["softmax"] / 1000 < 41 << 10


@pytest.mark.parametrize(
    ("projections", "total", "active"),
    [("separate", 76_878_154_752, 12_717_100_032), ("shared", 76_055_745_024, 11_894_690_304)],
)
def test_the_76b_has_its_parameters_in_both_readings(
    projections: str, total: int, active: int
) -> None:
    config = of("spikingbrain-76b", "qwen2.5-7b", f"beside.projections={projections}")
    assert num_parameters(config) == total
    assert num_active_parameters(config) == active
    assert sum(layer.moe is not None for layer in config.layers) == 21
    dense = [i for i, layer in enumerate(config.layers) if layer.moe is None]
    assert dense == [0, 1, 2, 4, 6, 8, 10]
    whole = [i for i, layer in enumerate(config.layers) if layer.mixers[0].mixer == "full"]
    assert whole == [6, 13, 20, 27]


def test_counts_are_those_of_modules_without_weights() -> None:
    for name, target in (("spikingbrain-76b", "qwen2.5-7b"), ("spikingbrain-2-5b", "qwen3-4b")):
        config = of(name, target)
        with torch.device("meta"):
            decoder = Decoder(config)
        named = {n: tuple(p.shape) for n, p in decoder.named_parameters()}
        assert named == dict(expected_tensors(config))


def test_shards_are_shares_and_a_layer_is_gathered() -> None:
    config = of("spikingbrain-76b", "qwen2.5-7b")
    layer = [s for n, s in expected_tensors(config) if n.startswith("model.layers.27.")]
    assert largest_unit_parameters(config) == sum(torch.Size(shape).numel() for shape in layer)
    got, count = sharded_bytes(config, 64), num_parameters(config)
    assert got["run"] == -(-2 * count // 64)
    assert got["train"] == -(-16 * count // 64)
    assert got["gathered"] == 2 * largest_unit_parameters(config)
    assert sharded_bytes(config, 1)["gathered"] == 0


# ---- twins -----------------------------------------------------------------------------------


def logits(decoder: Decoder, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return decoder(tokens)[0]


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_twins_convert_load_and_run_alike(
    name: str, family: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    made = plan(sources[family], load_recipe(name, TWINS[name]))
    report = convert(made, tmp_path / "twin")
    assert sum(report["engine_layers"].values()) == 4
    plain, ids = load_decoder(open_checkpoint(tmp_path / "twin")), random_tokens(2, 33)
    wanted = logits(plain, ids)
    assert wanted.isfinite().all()
    fast = load(tmp_path / "twin")
    torch.testing.assert_close(logits(fast.decoder, ids), wanted, rtol=1e-4, atol=1e-4)
    state = fast.decoder.init_state(2)
    outs = []
    with torch.no_grad():
        for begin, end in ((0, 7), (7, 8), (8, 33)):
            out, state = fast.decoder(ids[:, begin:end], state)
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), wanted, rtol=1e-4, atol=1e-4)
    assert engine_layers(plain.config) == report["engine_layers"]


@pytest.mark.parametrize("name", TWINS)
def test_twins_train_save_and_load(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    convert(plan(sources["qwen3"], load_recipe(name, TWINS[name])), tmp_path / "twin")
    decoder = load_decoder(open_checkpoint(tmp_path / "twin")).requires_grad_(True).train()
    ids, losses = random_tokens(2, 24), []
    optimiser = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    for _ in range(12):
        with watch_balance(decoder) as balance:
            out, _ = decoder(ids)
            loss = cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            (loss + 0.001 * balance()).backward()
        losses.append(float(loss.detach()))
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    decoder.eval().requires_grad_(False)
    weights = {n: p.detach().contiguous() for n, p in decoder.named_parameters()}
    save_file(weights, tmp_path / "twin" / "model.safetensors", metadata={"format": "pt"})
    again = load_decoder(open_checkpoint(tmp_path / "twin"))
    assert torch.equal(logits(again, ids), logits(decoder, ids))


# ---- where the norms of a merge begin --------------------------------------------------------

SILENT = ("layers=[{at: all, mixer: window, window_tokens: 64, beside: sse}]", F32)


@pytest.mark.parametrize(("merge", "unit"), [("sum", 1.0), ("mean", 2.0)])
def test_norms_begin_at_the_size_of_the_sources_attention(
    merge: str, unit: float, sources: dict[str, Path], tmp_path: Path
) -> None:
    options = (*SILENT, f"beside.merge={merge}", "beside.memory_scale=0.25")
    report = convert(plan(sources["qwen2"], load_recipe("identity", options)), tmp_path / "out")
    source = open_checkpoint(sources["qwen2"])
    tokenizer = load(sources["qwen2"]).tokenizer
    count = report["attention_sizes"]["text_tokens"]
    text = contexts([], tokenizer, context_tokens=count, max_tokens=count, use="calibrate")
    original, seen = load_decoder(source), []
    for layer in original.layers:
        layer.self_attn.register_forward_hook(lambda _m, _i, out: seen.append(out[0]))
    logits(original, text)
    decoder = load_decoder(open_checkpoint(tmp_path / "out"))
    for out, layer, size in zip(
        seen, decoder.layers, report["attention_sizes"]["rms"], strict=True
    ):
        words = float(np.sqrt((out.double().numpy() ** 2).mean(-1)).mean())
        assert size == pytest.approx(words, rel=1e-4)
        assert layer.beside is not None
        for norm, scale in ((layer.beside.softmax_norm, 1.0), (layer.beside.memory_norm, 0.25)):
            assert_close(norm.weight, torch.full_like(norm.weight, scale * unit * words))


def test_what_has_merges_already_is_not_measured(sources: dict[str, Path], tmp_path: Path) -> None:
    convert(plan(sources["llama"], load_recipe("identity", SILENT)), tmp_path / "merged")
    again = plan(tmp_path / "merged", load_recipe("identity", (*SILENT, "sse.partitions=3")))
    assert not again.measures  # the norms are there


# ---- upcycling -------------------------------------------------------------------------------


def upcycled(source: Path, out: Path, *options: str) -> float:
    """Relative difference of the logits of a model with experts from its source's."""
    recipe = load_recipe("identity", (F32, *options))
    convert(plan(source, recipe), out)
    ids = random_tokens(2, 31)
    before, after = (logits(load_decoder(open_checkpoint(path)), ids) for path in (source, out))
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize(
    "moe",
    [
        "{experts: 4, chosen: 1, shared: 1}",
        "{experts: 6, chosen: 3, shared: 2, router: sigmoid, router_spread: 1.0}",
        "{experts: 5, chosen: 2, shared: 0, at: [1, -1]}",
    ],
)
def test_upcycling_preserves_the_function(
    moe: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    assert upcycled(sources["llama"], tmp_path / "out", f"moe={moe}") < 1e-5


def test_halves_preserve_it_in_bf16_too(sources: dict[str, Path], tmp_path: Path) -> None:
    """Rounding the source once and halving is rounding the half: the very bits."""
    for name, moe in (("dense", ()), ("moe", ("moe={experts: 4, chosen: 1, shared: 1}",))):
        convert(plan(sources["llama"], load_recipe("identity", moe)), tmp_path / name)
    ids = random_tokens(2, 31)
    dense, moe = (
        logits(load_decoder(open_checkpoint(tmp_path / n)), ids) for n in ("dense", "moe")
    )
    torch.testing.assert_close(moe, dense, rtol=2**-7, atol=2**-7)
    weights = [load_file(tmp_path / n / "model.safetensors") for n in ("dense", "moe")]
    down = "model.layers.1.mlp.{}down_proj.weight"
    for expert in ("experts.3.", "shared_experts.0."):
        assert torch.equal(2 * weights[1][down.format(expert)], weights[0][down.format("")])


def test_the_reports_factors_do_not_preserve_it(sources: dict[str, Path], tmp_path: Path) -> None:
    off = {}
    for how in ("cube-root", "literal"):
        moe = f"moe={{experts: 4, chosen: 1, shared: 1, normalised: false, upcycling: {how}}}"
        off[how] = upcycled(sources["llama"], tmp_path / how, moe)
    assert 1e-3 < off["cube-root"] < 0.5
    assert 1e-3 < off["literal"] < 0.5


def test_every_tensor_of_an_upcycled_model_has_its_reason(sources: dict[str, Path]) -> None:
    made = plan(sources["qwen2"], load_recipe("spikingbrain-76b", TWIN_76B))
    actions = {t.name: t for t in made.tensors}
    expert = actions["model.layers.3.mlp.experts.2.down_proj.weight"]
    assert (expert.action, expert.reason) == (
        "derive", "model.layers.3.mlp.down_proj.weight times 0.5"
    )  # fmt: skip
    gone = actions["model.layers.3.mlp.down_proj.weight"]
    assert (gone.action, gone.reason) == ("drop", "experts are made of it")
    sinks = actions["model.learned_sinks"]
    assert sinks.reason.startswith("row ")
    assert actions["model.layers.1.beside.q_proj.bias"].origin is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("moe={experts: 4, chosen: 9}",), "moe.chosen 9 is more than moe.experts 4"),
        (("moe={at: [99]}",), "moe.at names layer 99"),
        (("moe={normalised: false}",), "sum to one"),
        (("moe={at: evn}",), "'evn' is not one of all"),
        (("learned_sinks.count=3", "layers=[{at: all, mixer: window, sink_tokens: 2}]"), "hides"),
        (("learned_sinks.count=3", "layers=[{at: all, mixer: blocks}]"), "block-sparse"),
        (("layers=[{at: all, mixer: full, memory: far}]",), "nothing is far"),
        (("layers=[{at: all, mixer: linear, memory: gla, beside: sse}]",), "beside means nothing"),
        (("sse.chosen=9", "layers=[{at: all, mixer: full, beside: sse}]"), "sse.chosen 9"),
        (("layers=[{at: {layers: [4], of: 4}, mixer: full}]",), "less than of"),
        (("beside.projections=shared", "layers=[{at: all, mixer: blocks, beside: sse}]"), "share"),
        (("beside.projection=shared",), "unknown key"),
    ],
    ids=str,
)
def test_what_a_recipe_may_not_say(
    options: Sequence[str], words: str, sources: dict[str, Path]
) -> None:
    with pytest.raises(RecipeError, match=words):
        plan(sources["llama"], load_recipe("identity", options))


# ---- released names, both ways ---------------------------------------------------------------

# Widths of the pico qwen3: 6 heads of 20 in 2 groups; what the released code would name and shape.
H, G, HEAD, RANK, N = 6, 2, 20, 20, 4


def released_shapes(layers: Sequence[int] = (0,), full: Sequence[int] = (3,)) -> dict[str, Any]:
    shapes: dict[str, Any] = {"model.embeddings.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(4):
        attn: dict[str, Any]
        if i in (*layers, *full):
            attn = {"q_proj.weight": (H * HEAD, D), "o_proj.weight": (D, H * HEAD)}
            attn |= dict.fromkeys(("k_proj.weight", "v_proj.weight"), (G * HEAD, D))
            attn |= dict.fromkeys(("q_norm.weight", "k_norm.weight"), (HEAD,))
        else:
            wide = ("sse_q_proj", "sse_k_proj", "sse_v_proj", "swa_q_proj")
            attn = {f"{name}.weight": (H * HEAD, D) for name in wide}
            attn |= dict.fromkeys(("sse_o_proj.weight", "swa_o_proj.weight"), (D, H * HEAD))
            attn |= dict.fromkeys(("swa_k_proj.weight", "swa_v_proj.weight"), (G * HEAD, D))
            attn |= dict.fromkeys(("swa_q_norm.weight", "swa_k_norm.weight"), (HEAD,))
            for name in ("lora_q_proj", "lora_k_proj"):
                attn |= {f"{name}.0.weight": (RANK, D), f"{name}.1.weight": (H * HEAD, RANK)}
            attn |= dict.fromkeys(("sse_a_proj.weight", "sse_b_proj.weight"), (2 * H, D))
            attn |= {"A_log": (2 * H,), "dt_bias": (2 * H,), "sse_e_proj.weight": (N, D)}
            attn |= {"sse_o_norm.weight": (HEAD,)}
            attn |= dict.fromkeys(("sse_merge_norm.weight", "swa_merge_norm.weight"), (D,))
        layer = {f"attn.{name}": shape for name, shape in attn.items()}
        layer |= {"attn_norm.weight": (D,), "mlp_norm.weight": (D,)}
        layer |= {"mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D)}
        layer |= {"mlp.down_proj.weight": (D, F)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


RELEASED = {
    "model_type": "sse_swa_moba", "vocab_size": V, "hidden_size": D, "intermediate_size": F,
    "num_hidden_layers": 4, "num_heads": H, "head_dim": HEAD, "max_position_embeddings": 256,
    "norm_eps": 1e-5, "swa_dropout": -1, "eos_token_id": 2, "use_output_gate": False,
    "attn": {
        "layers": [0], "full_layers": [3], "num_heads": H, "num_kv_heads": G, "rope_theta": 1e4,
        "window_size": 6, "moba_chunk_size": 5, "moba_topk": 2,
    },
}  # fmt: skip


def save_released(folder: Path, tokenizer: Path, **changes: Any) -> Path:
    folder.mkdir()
    r = torch.Generator().manual_seed(0)
    weights = {n: 0.2 * torch.randn(s, generator=r) for n, s in released_shapes().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(RELEASED | changes), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    return folder


def test_the_released_2_0_is_read_converted_and_written_back(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    theirs = save_released(tmp_path / "theirs", sources["qwen3"])
    source, ids = open_checkpoint(theirs), random_tokens(2, 33)
    config = source.config
    assert [layer.mixers[0].mixer for layer in config.layers] == [
        "blocks", "window", "window", "full"
    ]  # fmt: skip
    assert config.layers[0].mixers[0].top_blocks == 1  # type: ignore[union-attr]
    wanted = logits(load_decoder(source), ids)
    convert(plan(theirs, load_recipe("identity", (F32,))), tmp_path / "ours")
    assert torch.equal(logits(load_decoder(open_checkpoint(tmp_path / "ours")), ids), wanted)
    report = export(tmp_path / "ours", tmp_path / "back")
    assert report["model_type"] == "sse_swa_moba"
    before, after = (load_file(p / "model.safetensors") for p in (theirs, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = open_checkpoint(tmp_path / "back")
    assert again.config.layers == config.layers
    assert torch.equal(logits(load_decoder(again), ids), wanted)


def test_the_twin_of_the_5b_has_the_released_names(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    made = plan(sources["qwen3"], load_recipe("spikingbrain-2-5b", TWIN_5B))
    convert(made, tmp_path / "twin")
    export(tmp_path / "twin", tmp_path / "theirs")
    shapes = {
        n: tuple(t.shape) for n, t in load_file(tmp_path / "theirs/model.safetensors").items()
    }
    kinds = [layer.mixers[0].mixer for layer in made.config.layers]
    blocks = [i for i, kind in enumerate(kinds) if kind == "blocks"]
    expected = released_shapes(blocks, [kinds.index("full")])
    assert shapes == expected | ({} if made.config.tie_word_embeddings else
                                 {"lm_head.weight": (V, D)})  # fmt: skip


def test_a_plain_model_goes_back_to_its_family(sources: dict[str, Path], tmp_path: Path) -> None:
    ids = random_tokens(2, 21)
    for family, source in sources.items():
        convert(plan(source, load_recipe("identity", (F32,))), tmp_path / family)
        report = export(tmp_path / family, tmp_path / f"{family}-hf")
        assert report["model_type"] == family
        again = open_checkpoint(tmp_path / f"{family}-hf")
        wanted = logits(load_decoder(open_checkpoint(source)), ids)
        assert torch.equal(logits(load_decoder(again), ids), wanted)


def test_the_7b_goes_back_to_its_names(sources: dict[str, Path], tmp_path: Path) -> None:
    convert(plan(sources["qwen2"], load_recipe("spikingbrain-7b", (F32,))), tmp_path / "ours")
    assert export(tmp_path / "ours", tmp_path / "theirs")["form"] == "SpikingBrain-7B"
    ours, theirs = (open_checkpoint(tmp_path / name) for name in ("ours", "theirs"))
    assert theirs.config.layers == ours.config.layers
    names = set(load_file(tmp_path / "theirs" / "model.safetensors"))
    assert {"model.embeddings.weight", "model.layers.0.attn.gk_proj.1.bias"} <= names
    ids = random_tokens(2, 21)
    assert torch.equal(logits(load_decoder(theirs), ids), logits(load_decoder(ours), ids))


def test_what_no_form_holds_is_refused_by_its_layer(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    convert(plan(sources["llama"], load_recipe("identity", ("moe={at: [2]}",))), tmp_path / "moe")
    with pytest.raises(UnsupportedError, match=r"layer 2 is full; 16 \+ 1 experts"):
        export(tmp_path / "moe", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"use_short_conv": True}, UnsupportedError, "use_short_conv"),
        ({"linear_attn_type": "gla"}, UnsupportedError, "linear_attn_type"),
        ({"num_reader": 3}, UnsupportedError, "differ"),
        ({"attn": [1]}, CheckpointError, "attn is missing"),
        ({"attn": {**RELEASED["attn"], "layers": [9]}}, CheckpointError, "layer 9"),  # type: ignore[dict-item]
        ({"num_writer": 7, "num_reader": 7}, CheckpointError, "chosen=7"),
        ({"num_sparse_partition": 3}, CheckpointError, "sse_e_proj"),
    ],
    ids=str,
)
def test_released_configs_that_cannot_be_are_refused(
    changes: dict[str, Any],
    error: type[Exception],
    words: str,
    sources: dict[str, Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=words):
        open_checkpoint(save_released(tmp_path / "theirs", sources["qwen3"], **changes))


def test_head_dim_is_the_rank() -> None:
    config = of("spikingbrain-2-5b", "smollm2-135m")
    (memory,) = {layer.beside.mixers[0].memory for layer in config.layers if layer.beside}
    assert memory.kind == "sse"
    assert memory.rank == config.head_dim == 64 != K


# ---- the verbs -------------------------------------------------------------------------------


@pytest.fixture
def respike(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout and stderr of a call."""
    monkeypatch.setenv("COLUMNS", "100")

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["respike", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return call


Call = Callable[..., tuple[int, str, str]]


def test_plan_prints_active_parameters_choices_and_shares(respike: Call, tmp_path: Path) -> None:
    plot = tmp_path / "plan.png"
    words = (
        "plan",
        "spikingbrain-76b",
        "--target",
        "qwen2.5-7b",
        "--no-time",
        "--length",
        "1k,128k",
    )
    code, text, err = respike(*words, "--ranks", "1,64", "--plot", plot)
    assert code == 0, err
    assert "12,717,100,032 a token" in text
    assert "beside.projections: separate" in text
    assert re.search(r"64\s+2\.2 GiB", text)
    assert max(map(len, text.splitlines())) < 200
    assert plot.stat().st_size > 10_000
    _, text, _ = respike(*words, "--set", "beside.projections=shared", "--json")
    found = json.loads(text)
    assert found["parameters"] == 76_055_745_024
    assert found["rows"][1]["moved_bytes_per_token"] > found["rows"][0]["moved_bytes_per_token"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--ranks", "1,0"), "--ranks '1,0'"),
        (("--ranks", "many"), "--ranks 'many'"),
        (("--plot", "plan.jpg"), "ends in .png"),
        (("--set", "moe.expert=4"), "did you mean `experts`?"),
    ],
    ids=str,
)
def test_plan_refuses_what_means_nothing(
    options: tuple[str, ...], words: str, respike: Call
) -> None:
    code, _, err = respike(
        "plan", "spikingbrain-76b", "--target", "qwen2.5-7b", "--no-time", *options
    )
    assert code != 0
    assert words in err


def test_export_says_what_it_wrote_and_what_it_cannot(
    sources: dict[str, Path], tmp_path: Path, respike: Call
) -> None:
    code, text, err = respike("export", sources["llama"], tmp_path / "out", "--json")
    assert code == 0, err
    assert json.loads(text)["model_type"] == "llama"
    code, _, err = respike("export", sources["llama"], tmp_path / "out")
    assert code == 2
    assert "already exists" in err
    code, _, err = respike("export", tmp_path / "nowhere", tmp_path / "out2")
    assert code == 1
    assert "no such folder or file" in err
