"""How fast healing trains, beside plain PyTorch finetuning of the same model on the same tokens.

    python benchmarks/heal_speed.py CONVERTED TOKENS --config quick [--steps 3] [-o FILE]

CONVERTED is a folder that `respike convert` wrote; TOKENS a folder of tokens, such as
OUT.healing/tokens. Plain finetuning is transformers' Llama or Qwen2 with fused attention and
torch's AdamW on float32 masters of every weight, next-token loss on all positions, one row at a
time. Both compute in what this machine trains in fastest and take the same rows; steps alternate;
the first of each is not counted. The first steps of `default` are taken without memories, which is
faster than the rest of it: `--set stages.0.memory_dropout.first_frac=0` and `last_frac` likewise.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from resultfile import write

from respike.bench.machine import provenance
from respike.checkpoint import open_checkpoint
from respike.data import Loader, TextSource, open_store
from respike.device import get_dtype, set_threads
from respike.healing import load_healing
from respike.healing.models import converted_folder, models, original_of
from respike.healing.parallel import World
from respike.healing.trainer import Trainer
from respike.loading import load_decoder, load_tokenizer


class Plain:
    """transformers' own model, finetuned as anybody would."""

    def __init__(self, folder: Any, dtype: str) -> None:
        import transformers

        config = folder.config
        fields = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "max_position_embeddings": config.max_position_embeddings,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope.theta},
            "tie_word_embeddings": config.tie_word_embeddings,
            "attn_implementation": "sdpa",
            "dtype": get_dtype(dtype),
        }
        kind = "Qwen2Config" if config.family == "qwen2" else "LlamaConfig"
        made = getattr(transformers, kind)(**fields)
        self.model = transformers.AutoModelForCausalLM.from_config(made).to(made.dtype)
        weights = load_decoder(original_of(folder, None), dtype=dtype).state_dict()
        self.model.load_state_dict(weights, strict=False)
        self.model.train()
        self.pairs = [(p, torch.nn.Parameter(p.detach().float())) for p in self.model.parameters()]
        self.adam = torch.optim.AdamW([master for _, master in self.pairs], lr=1e-5)

    def step(self, tokens: torch.Tensor) -> float:
        """One step on rows (B, T), a row at a time; seconds."""
        begun = time.perf_counter()
        for row in tokens:
            out = self.model(row[None], labels=row[None], use_cache=False)
            (out.loss / len(tokens)).backward()
        for parameter, master in self.pairs:
            master.grad = parameter.grad.float()
            parameter.grad = None
        self.adam.step()
        with torch.no_grad():
            for parameter, master in self.pairs:
                parameter.copy_(master)
        return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("converted")
    parser.add_argument("tokens")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--config", default="default")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    threads = set_threads(args.threads)
    folder = converted_folder(Path(args.converted))
    store, tokenizer = open_store(args.tokens), load_tokenizer(open_checkpoint(args.converted))
    healing = load_healing(args.config, tuple(args.set))
    trainer = Trainer(models(folder, None, healing), healing, store, tokenizer, World())
    stage = next(i for i, s in enumerate(healing.stages) if s.kind == "distil")
    trainer.where.stage = stage
    trainer.begin_stage()
    shape = healing.stages[stage]
    plain = Plain(folder, healing.compute)
    text = TextSource("text", store, min_document_tokens=shape.context_tokens)
    rows = Loader([(text, 1.0)], batch_size=shape.rows, context_tokens=shape.context_tokens)
    speeds: dict[str, list[float]] = {"healing": [], "plain": []}
    count = shape.rows * shape.context_tokens
    for number in range(args.steps + 1):
        line = trainer.step()
        seconds = plain.step(next(rows).tokens)
        if number:
            speeds["healing"].append(line["tokens_per_second"])
            speeds["plain"].append(count / seconds)
            last = (f"{name} {values[-1]:.0f}" for name, values in speeds.items())
            print(", ".join(last), "tokens/s", flush=True)
    middle = {name: statistics.median(values) for name, values in speeds.items()}
    report = {
        "command": shlex.join(["python", *sys.argv]),
        **provenance(),
        "threads": threads,
        "compute": healing.compute,
        "rows": shape.rows,
        "context_tokens": shape.context_tokens,
        "tokens_per_second": speeds,
        "median": middle,
        "ratio": middle["healing"] / middle["plain"],
    }
    print(json.dumps({"median": middle, "ratio": report["ratio"]}))
    if args.output:
        write(args.output, report)


if __name__ == "__main__":
    main()
