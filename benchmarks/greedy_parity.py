"""Our engine against transformers on a real GGUF file: greedy tokens and logits, in float32.

    python benchmarks/greedy_parity.py MODEL.gguf [--tokens 64]

transformers dequantises the same file by its own code, so this checks reader, tokenizer and engine.
Exit code 1 if any token differs. Needs transformers (`make test` installs it); its load is slow.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch

from respike.generation import stream
from respike.loading import load

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea, there lived",
    "Question: Why is the sky blue?\nAnswer:",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        options.model.parent, gguf_file=options.model.name, dtype=torch.float32
    ).eval()
    ours = load(options.model, dtype="f32")
    failed = 0
    for prompt in PROMPTS:
        ids = ours.tokenizer.encode(prompt)
        tokens = torch.tensor([ids])
        with torch.inference_mode():
            difference = (theirs(tokens).logits - ours.decoder(tokens)[0]).abs().max()
            reply = theirs.generate(tokens, max_new_tokens=options.tokens, do_sample=False)
        expected = reply[0, len(ids) :].tolist()
        result = stream(ours, ids, max_tokens=options.tokens)
        list(result)
        got = result.result.tokens
        # transformers keeps the end token, we do not.
        same = got == [t for t in expected if t not in ours.config.eos_token_ids]
        failed += not same
        print(
            f"{'same' if same else 'DIFFERENT'}  {len(got)} tokens, largest logit difference "
            f"{difference:.2e}, prompt {prompt[:40]!r}",
            flush=True,
        )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
