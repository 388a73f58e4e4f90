"""Quality of the very folder whose speed is printed, at the lengths that were timed."""

from collections.abc import Mapping
from typing import Any

CONTEXTS = 2
"""Of text, at each length."""
TRIALS = 8
"""Of each recall task."""


def quality(job: Mapping[str, Any]) -> dict[str, Any]:
    """KL from the original, and what is found far back, at one length.

    Args:
        job: ``model`` and ``original`` as `respike.bench.ours.load_model` takes them, ``length``.

    Returns:
        KL over all tokens and beyond the window, and the score of model and original in each task.
    """
    from respike.bench.ours import load_model
    from respike.errors import UsageError
    from respike.evaluation import Reference, Vocabulary, recall
    from respike.evaluation.columns import window_tokens
    from respike.tasks import make_trials
    from respike.text import contexts

    model, original, length = load_model(job["model"]), load_model(job["original"]), job["length"]
    text = contexts([], original.tokenizer, context_tokens=length, max_tokens=CONTEXTS * length)
    distances = Reference(original.decoder, text).compare(model.decoder)
    beyond = min(window_tokens(model.config), length // 2)
    far = distances.bucket(beyond, length)
    vocabulary = Vocabulary(original.tokenizer)
    scores, dropped = [], []
    for task in tasks_at(length):
        try:
            make_trials(vocabulary, task, 1)
        except UsageError as error:
            dropped.append(str(error))
            continue
        scores.append(
            {
                "task": task.name,
                "trials": TRIALS,
                **{
                    name: recall(who.decoder, vocabulary, task, trials=TRIALS).as_dict()
                    for name, who in (("model", model), ("original", original))
                },
            }
        )
    return {
        "length": length,
        "contexts": len(text),
        "kl_nats": distances.bucket(0, length)["kl_nats"],
        "beyond_tokens": beyond,
        "kl_beyond_nats": far["kl_nats"],
        "kl_beyond_95": far["kl_nats_95"],
        "recall": scores,
        "not_asked": dropped,
    }


def tasks_at(length: int) -> list[Any]:
    """Copying what stands half the length back, and a passkey a quarter in."""
    from respike.evaluation import Task

    return [Task("copy", length // 2), Task("passkey", length, 0.25)]
