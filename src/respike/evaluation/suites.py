"""Which recall tasks to run: suites by name, single tasks, and what is too long."""

from collections.abc import Sequence

from respike.errors import UsageError, did_you_mean
from respike.material import Vocabulary
from respike.tasks import FAMILIES, Task, parse_task

DEPTHS = (0.1, 0.25, 0.5, 0.75, 0.9)
LENGTHS = (1024, 2048, 4096, 8192)


def quick(window_tokens: int) -> list[Task]:
    """A few minutes on a processor; one or two settings a family."""
    del window_tokens
    return [
        Task("copy", 128),
        Task("copy", 512),
        *(Task("passkey", 1024, depth) for depth in (0.1, 0.5, 0.9)),
        Task("multi-query", 32),
    ]


def complete(window_tokens: int) -> list[Task]:
    """Every family from well inside the window to far beyond it."""
    lags = (max(2, window_tokens // 2), *(window_tokens << i for i in range(6)))
    return [
        *(Task("copy", lag) for lag in lags),
        *(Task("multi-query", 8 << i) for i in range(7)),
        *(
            Task(family, length, depth)
            for family in ("passkey", "needles")
            for length in LENGTHS
            for depth in DEPTHS
        ),
        *(Task(family, length) for family in ("multi-needle", "questions") for length in LENGTHS),
        *(Task("variables", length, hops=hops) for length in (1024, 4096) for hops in (2, 3, 4)),
    ]


SUITES = {"quick": quick, "complete": complete}


def tasks_of(settings: Sequence[str], window_tokens: int) -> list[Task]:
    """Tasks by the names of suites or by their own settings, each once, in order.

    Args:
        settings: Such as ``complete`` or ``copy:512``.
        window_tokens: The converted model's window, which a suite measures lags in.

    Raises:
        UsageError: A setting is neither a suite nor a task.
    """
    tasks: list[Task] = []
    for setting in settings:
        try:
            suite = SUITES.get(setting)
            tasks += suite(window_tokens) if suite else [parse_task(setting)]
        except UsageError as error:
            hint = did_you_mean(setting, SUITES) or f"or a suite: {', '.join(SUITES)}"
            raise UsageError(str(error), hint=hint) from None
    return list(dict.fromkeys(tasks))


def split_by_length(
    vocabulary: Vocabulary, tasks: Sequence[Task], max_tokens: int
) -> tuple[list[Task], list[Task]]:
    """Tasks whose trials have at most ``max_tokens`` tokens, and those that are longer."""
    long = [t for t in tasks if FAMILIES[t.family].tokens(vocabulary, t) > max_tokens]
    return [t for t in tasks if t not in long], long
