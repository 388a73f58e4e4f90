"""The demo: convert a real model, compare it with the original, and write demo/report.html.

    python demo/run.py        after `make model`; `make demo` does both

Everything shown is measured in this run, computed from the config, or read from a result file in
benchmarks/results and labelled with its machine and date.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from committed import read_committed
from report import render, summary_lines
from stage import Run, perform
from steps import STEPS

from respike.bench.machine import provenance
from respike.device import set_threads
from respike.errors import RespikeError, UsageError

ROOT = Path(__file__).resolve().parents[1]
MODEL = Path("models/SmolLM2-135M-Instruct.gguf")
OUT = Path("demo/out")
REPORT = Path("demo/report.html")


def near(path: Path) -> Path:
    """A path of the repository, as short as it can be written from here."""
    absolute = ROOT / path
    return path if Path.cwd() == ROOT else absolute


def run_demo(options: argparse.Namespace) -> dict:
    """Do every step; returns the results, which are also kept in results.json."""
    model = options.model
    if not model.exists():
        raise UsageError(f"{model}: no such model", hint="run `make model` to download it")
    set_threads(options.threads)
    run = Run(model, options.recipe, near(OUT), options.threads, options.dtype)
    run.results |= provenance()
    perform(run, STEPS, total=len(STEPS) + 1)
    kept = run.out / "results.json"
    kept.write_text(json.dumps(run.results, indent=1) + "\n", encoding="utf-8")
    return run.results


def write_report(results: dict, path: Path) -> None:
    print(f"\n[{len(STEPS) + 1}/{len(STEPS) + 1}] Write the report")
    committed = read_committed(ROOT / "benchmarks" / "results")
    for line in committed.lines():
        print(f"  {line}")
    path.write_text(render(results, committed), encoding="utf-8")
    print("\nIn short")
    for line in summary_lines(results):
        print(textwrap.fill(line, 96, initial_indent="  - ", subsequent_indent="    "))
    print(f"\nreport: {path.resolve()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=near(MODEL))
    parser.add_argument("--recipe", default="retrieval-keep", help="built-in name or YAML file")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--dtype", help="f32, bf16 or f16; default: the checkpoint's own")
    parser.add_argument("--render", type=Path, metavar="RESULTS.json", help="only the report")
    parser.add_argument("-o", "--output", type=Path, default=near(REPORT))
    options = parser.parse_args()
    try:
        if options.render:
            results = json.loads(options.render.read_text(encoding="utf-8"))
        else:
            results = run_demo(options)
        write_report(results, options.output)
    except RespikeError as error:
        hint = f"\nhint: {error.hint}" if error.hint else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
