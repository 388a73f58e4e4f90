"""What `check --generate` adds: its options, both models' continuations, and its table."""

from typing import Any

import click

from respike.cli.show import given, number_option, progress, table
from respike.errors import UsageError


def generation_options(command: Any) -> Any:
    """How many continuations to compare, and how long they are."""
    for option in (
        number_option("--prompt-tokens", 1024, "With --generate: length of a prompt."),
        number_option("--prompts", 20, "With --generate: how many, of the same text."),
        click.option(
            "--generate",
            "new_tokens",
            type=click.IntRange(1),
            metavar="N",
            help="Also let both models continue prompts by N tokens, greedily, and compare.",
        ),
    ):
        command = option(command)
    return command


def refuse_generation_options(options: dict[str, Any]) -> None:
    """Options that mean nothing without --generate."""
    for name in ("prompts", "prompt_tokens"):
        if given(name) and options["new_tokens"] is None:
            raise UsageError(f"--{name.replace('_', '-')} means nothing without --generate")


def compare_continuations(a: Any, b: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Both models' continuations of the same prompts, held against each other."""
    from respike.evaluation import continuation_agreement, continuations
    from respike.text import contexts

    length = options["prompt_tokens"]
    prompts = contexts(
        options["data"],
        a.tokenizer,
        context_tokens=length,
        max_tokens=options["prompts"] * length,
    )
    never = sorted({*a.tokenizer.eos_token_ids, *a.config.eos_token_ids})
    written = []
    for name, model in (("A writes", a), ("B writes", b)):
        with progress(name) as step:
            written.append(
                continuations(
                    model.decoder, prompts, options["new_tokens"], never=never, progress=step
                )
            )
    return {"prompt_tokens": length, **continuation_agreement(*written)}


def continuation_text(found: dict[str, Any]) -> str:
    """The table of what `compare_continuations` found."""
    names = {
        "prefix_tokens": "tokens before the first difference",
        "agreement_frac": "same token at the same place",
        "repetition_reference_frac": "repeated 4-grams, A",
        "repetition_frac": "repeated 4-grams, B",
        "repetition_added_frac": "repeated 4-grams, B - A",
    }
    rows = []
    for name, label in names.items():
        digits = 1 if name.endswith("tokens") else 3
        low, high = found[f"{name}_95"]
        interval = f"{low:.{digits}f} to {high:.{digits}f}"
        rows.append((label, f"{found[name]:.{digits}f}", interval))
    header = (f"{found['new_tokens']} tokens after {found['prompts']} prompts", "mean")
    return table((*header, "95 % interval"), rows)
