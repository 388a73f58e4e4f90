"""Write the golden files anew: ``python tests/golden/regenerate.py``. Say why in the commit.

help/*.txt   what ``respike --help`` and each ``respike VERB --help`` print, 80 columns wide
"""

from pathlib import Path

from click.testing import CliRunner

from respike.cli.main import VERBS, program

HELP = Path(__file__).parent / "help"


def pages() -> dict[str, str]:
    """File name -> help text."""
    runner = CliRunner(env={"COLUMNS": "80"})
    found = {}
    for verb in ("", *VERBS):
        arguments = [verb] * bool(verb) + ["--help"]
        result = runner.invoke(program, arguments, prog_name="respike")
        found[f"{verb or 'respike'}.txt"] = result.output
    return found


if __name__ == "__main__":
    HELP.mkdir(exist_ok=True)
    for old in HELP.glob("*.txt"):
        old.unlink()
    for name, text in pages().items():
        (HELP / name).write_text(text, encoding="utf-8")
