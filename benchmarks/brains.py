"""Small twins of SpikingBrain's models: converted, run, trained a little, saved, loaded, timed.

    python benchmarks/brains.py twins MODEL --work DIR --steps 200 --distance -o brains_X.json
    python benchmarks/brains.py context MODEL --work DIR --lengths 1k,8k,64k -o lengths_X.json

A second call measures only what is not there yet: twins in the result file, points in DIR. `twins`
writes DIR/<recipe> and says of each: KL from the original as converted, the loss of every training
step (all weights, Adam, cross entropy, the balance loss), and whether a trained model that was
saved and loaded gives the same logits. Training is for showing that it goes down, not for quality;
it takes 16 bytes a parameter, 2 to 7 GB here. `context` runs `respike bench` on the folders (after
`twins --steps 0`) and draws all of them with the original, in a PNG file beside the results.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from resultfile import rows_before, write
from safetensors.torch import save_file
from tables import brains_table, context_table
from torch.nn.functional import cross_entropy

from respike import generate, load
from respike.account import num_active_parameters, num_parameters
from respike.bench.machine import provenance
from respike.bench.plot import draw
from respike.checkpoint import open_checkpoint
from respike.conversion import convert, plan
from respike.device import set_threads
from respike.evaluation import Reference
from respike.loading import load_decoder
from respike.models.balance import watch_balance
from respike.models.decoder import Decoder
from respike.recipe import load_recipe
from respike.text import contexts

TWINS: dict[str, tuple[str, ...]] = {
    "spikingbrain-7b": (),
    "spikingbrain-76b": ("moe.experts=4", "learned_sinks.count=4"),
    "spikingbrain-2-5b": (),
}
BALANCE = 0.001
"""Of the balance loss, as SpikingBrain2.0 has it."""


def train(decoder: Decoder, tokens: torch.Tensor, steps: int, rate: float) -> list[float]:
    """Losses of ``steps`` steps, each on one row of ``tokens`` in turn, in float32."""
    decoder.float().requires_grad_(True).train()
    optimiser = torch.optim.Adam(decoder.parameters(), lr=rate)
    losses = []
    for step in range(steps):
        row = tokens[step % len(tokens)][None]
        with watch_balance(decoder) as balance:
            logits, _ = decoder(row)
            loss = cross_entropy(logits[0, :-1], row[0, 1:])
            (loss + BALANCE * balance()).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
        sys.stderr.write(f"\r{step + 1}/{steps} {losses[-1]:.3f} ")
    sys.stderr.write("\n")
    decoder.eval().requires_grad_(False)
    return losses


def trained(folder: Path, tokens: torch.Tensor, steps: int, rate: float) -> dict[str, Any]:
    """Train what is in ``folder``, save it beside, load it again and compare."""
    decoder = load_decoder(open_checkpoint(folder), dtype="f32")
    losses = train(decoder, tokens, steps, rate)
    out = folder.with_name(f"{folder.name}-trained")
    out.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((folder / name).read_bytes())
    weights = {n: p.detach().contiguous() for n, p in decoder.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    again = load_decoder(open_checkpoint(out))
    with torch.inference_mode():
        same = torch.equal(again(tokens[:1])[0], decoder(tokens[:1])[0])
    tenth = max(1, steps // 10)
    return {
        "steps": steps,
        "first_tenth_nats": sum(losses[:tenth]) / tenth,
        "last_tenth_nats": sum(losses[-tenth:]) / tenth,
        "losses_nats": losses,
        "same_logits_when_loaded": same,
    }


def twins(args: argparse.Namespace) -> None:
    original = load(args.model)
    asked = {"steps": args.steps, "rate": args.rate, "context_tokens": args.context_tokens}
    asked |= {"original": original.fingerprint, "dtype": "f32", "distance": args.distance}
    rows = {row["name"]: row for row in rows_before(Path(args.output), asked)}
    size = {"context_tokens": args.context_tokens, "max_tokens": args.context_tokens * 16}
    text = contexts([], original.tokenizer, **size)
    reference = Reference(original.decoder, text[-2:]) if args.distance else None
    for name, overrides in TWINS.items():
        if name in rows or (args.only and name not in args.only):
            continue
        folder = args.work / name
        if not folder.exists():
            convert(plan(args.model, load_recipe(name, overrides)), folder)
        model = load(folder)
        row: dict[str, Any] = {
            "name": name,
            "overrides": overrides,
            "fingerprint": model.fingerprint,
            "parameters": num_parameters(model.config),
            "active_parameters": num_active_parameters(model.config),
            "says": generate(model, "The capital of France is", max_tokens=12),
        }
        if reference is not None:
            far = reference.compare(model.decoder).bucket(0, args.context_tokens)
            row["kl_nats"], row["nats_added"] = far["kl_nats"], far["nats_added"]
        if args.steps:
            row |= trained(folder, text[:-2], args.steps, args.rate)
        rows[name] = row
        shown = {key: value for key, value in row.items() if key != "losses_nats"}
        sys.stderr.write(f"{name}: {json.dumps(shown)}\n")
        report = {"benchmark": "brains", "model": Path(args.model).name, "asked": asked}
        done = [rows[twin] for twin in TWINS if twin in rows]
        write(Path(args.output), report | provenance() | {"rows": done})
    print(brains_table(json.loads(Path(args.output).read_text(encoding="utf-8"))))


def context(args: argparse.Namespace) -> None:
    """One picture of every twin in the work folder and of the original."""
    rows: list[Any] = []
    fitted: list[Any] = []
    for number, name in enumerate(TWINS):
        command = [sys.executable, "-m", "respike", "bench", str(args.work / name), "--json"]
        command += ["--lengths", args.lengths, "--repeats", "1", "--original", args.model]
        command += ["-o", str(args.work / f"context-{name}.json"), "--no-quality"]
        command += ["--time-limit", str(args.time_limit), "--weights", args.weights]
        command += ["--dtype", args.dtype]
        if args.threads:
            command += ["--threads", str(args.threads)]
        command += ["--vs", "original"] * (number == 0)
        ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(ran.stdout)
        for kind, into in (("rows", rows), ("fitted", fitted)):
            for row in found[kind]:
                into.append(row | {"contender": name} if row["group"] == "ours" else row)
    quoted = list(dict.fromkeys(row["contender"] for row in rows))
    draw(rows, fitted, quoted, Path(args.output).with_suffix(".png"))
    asked = {"dtype": args.dtype, "weights": args.weights}
    asked["threads"] = found["settings"]["threads"]
    report = {"benchmark": "context", "model": Path(args.model).name, **provenance()}
    write(Path(args.output), report | {"asked": asked, "rows": rows, "fitted": fitted})
    print(context_table(json.loads(Path(args.output).read_text(encoding="utf-8"))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["twins", "context"])
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--only", nargs="*", help="Some recipes instead of all.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--context-tokens", type=int, default=256)
    parser.add_argument("--distance", action="store_true", help="KL from the original too.")
    parser.add_argument("--lengths", default="1k,2k,4k,8k,16k,32k,64k,128k")
    parser.add_argument("--time-limit", type=float, default=20.0, help="minutes, of a point")
    parser.add_argument("--weights", default="stored", help="of `context`")
    parser.add_argument("--dtype", default="bf16", help="of `context`")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    set_threads(args.threads)
    if args.what == "context":
        context(args)
        return
    twins(args)


if __name__ == "__main__":
    main()
