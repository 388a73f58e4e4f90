"""Fails when code outside src/respike/device.py names a device or a vendor's package.

    python scripts/check_devices.py [ROOT]

Comments count too: a chip that is named is a chip somebody will special-case.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("src", "native", "demo", "benchmarks")
ALLOWED = Path("src/respike/device.py")
SUFFIXES = {".c", ".cmake", ".cpp", ".h", ".hpp", ".py", ".pyi", ".sh", ".toml", ".txt", ".yaml"}

# Also as the start of a longer word (cudaMalloc, triton_ops). flash_attn_type is no package but a
# setting of llama.cpp's processor build, which `bench` switches.
STEMS = (
    "cambricon cublas cuda cudnn flash_?attn(?!_type) flashinfer habana hccl ipex miopen "
    "nccl nvcc nvidia oneapi rocm tilelang torch_npu torch_xla triton xformers"
)
# Only as a whole word: short enough to turn up inside others.
WORDS = "ascend gaudi hip hpu mlu mps mtia musa npu tpu xla xpu"
NAMED = re.compile(
    rf"(?<![a-z])(?:(?:{'|'.join(STEMS.split())})|(?:{'|'.join(WORDS.split())})(?![a-z]))",
    re.IGNORECASE,
)


def source_files(root: Path) -> Iterator[Path]:
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SUFFIXES and path.relative_to(root) != ALLOWED:
                yield path


def mentions(root: Path) -> Iterator[str]:
    for path in source_files(root):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if found := NAMED.search(line):
                yield f"{path.relative_to(root)}:{number}: {found[0]!r} in: {line.strip()}"


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent
    lines = list(mentions(root))
    for line in lines:
        print(line)
    if lines:
        print(f"error: {len(lines)} lines name a device or vendor; only {ALLOWED} may")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
