"""The documents say what the code does."""

import re
import subprocess
import sys
from pathlib import Path

from respike.cli.main import VERBS
from respike.recipe import builtin_recipes

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_generated_pages_are_current():
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "docs.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_the_readme_lists_exactly_the_verbs_there_are():
    table = README.split("## The verbs")[1].split("Every option")[0]
    listed = re.findall(r"`([a-z]+)[ `]", "\n".join(re.findall(r"^\|(.*?)\|", table, re.M)))
    assert sorted(listed) == sorted(VERBS)


def test_every_file_on_the_readme_map_exists():
    lines = README.split("```text")[1].split("```")[0].splitlines()
    at_top = [
        name for line in lines if not line.startswith(" ") for name in line.split("  ")[0].split()
    ]
    for name in at_top:
        assert list(ROOT.glob(name.rstrip("/"))), name
    for line in lines:
        if line.startswith("  ") and line[2] != " ":
            for name in re.split(r"\s{2,}", line.strip())[0].split():
                assert (ROOT / "src" / "respike" / name).exists(), name


def test_every_top_level_module_is_on_the_readme_map():
    tree = README.split("src/respike/")[1].split("tests/")[0]
    for path in (ROOT / "src" / "respike").iterdir():
        if path.name.startswith("_") or path.name == "py.typed":
            continue
        assert path.name in tree, path.name


def test_the_python_example_uses_only_public_names():
    import respike

    code = README.split("```python")[1].split("```")[0]
    names = set(re.findall(r"respike\.([a-z_]+)\(", code))
    assert names <= set(respike.__all__)
    for name in respike.__all__:
        assert getattr(respike, name) is not None


def test_recipes_named_in_the_readme_exist():
    for name in re.findall(r"--recipe ([a-z][a-z0-9.-]+)", README):
        assert name in builtin_recipes()
