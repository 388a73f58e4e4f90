"""``--set KEY=VALUE``: changes to what a YAML file says, before it is checked."""

from typing import Any

import yaml

from respike.errors import RespikeError


def set_value(raw: dict[Any, Any], override: str, error: type[RespikeError], example: str) -> None:
    """Change one value of nested mappings and lists, in place.

    Args:
        raw: What the file says.
        override: ``KEY=VALUE``; the key's parts are separated by dots, the value is YAML.
        error: What to raise.
        example: Of an override, for messages.

    Raises:
        RespikeError: An ``error``: no such form, or no such place.
    """
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise error(f"--set {override!r}: expected KEY=VALUE, such as {example}")
    node: Any = raw
    try:
        new = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as wrong:
        raise error(f"--set {override!r}: {value!r} is not valid YAML") from wrong
    try:
        *parents, last = [int(p) if p.lstrip("-").isdigit() else p for p in key.split(".")]
        for part in parents:
            if isinstance(node, dict) and part not in node:
                node[part] = {}
            node = node[part]
        node[last] = new
    except (KeyError, IndexError, TypeError, ValueError) as wrong:
        raise error(f"--set {override!r}: there is no such place") from wrong
