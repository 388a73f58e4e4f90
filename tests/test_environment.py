import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from zipfile import ZipFile

import torch

ROOT = Path(__file__).parent.parent


def test_torch_is_the_pinned_one() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    (pin,) = [line.removeprefix("torch==") for line in lines if line.startswith("torch==")]
    assert torch.__version__.split("+")[0] == pin


def test_a_cpu_build_of_torch_brings_no_vendor_libraries() -> None:
    if torch.version.cuda or torch.version.hip:
        return  # a GPU build was asked for, and needs them
    names = {d.metadata["Name"].lower() for d in distributions()}
    assert sorted(n for n in names if n.startswith(("nvidia-", "triton", "pytorch-triton"))) == []


def test_a_wheel_holds_the_whole_package(tmp_path: Path) -> None:
    """`make setup` installs in place, so nothing else would miss what a wheel leaves out."""
    build = "import sys; from scikit_build_core.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        cwd=ROOT, env={**os.environ, "RESPIKE_NATIVE": "0"}, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.iterdir()
    held = {name for name in ZipFile(wheel).namelist() if name.startswith("respike/")}
    files = {f for f in (ROOT / "src/respike").rglob("*") if f.is_file()}
    there = {f.relative_to(ROOT / "src").as_posix() for f in files if "__pycache__" not in f.parts}
    assert held == there


def check_devices(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/check_devices.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_no_device_is_named_outside_device_py() -> None:
    done = check_devices()
    assert (done.stdout, done.returncode) == ("", 0)


def test_a_named_device_is_found_in_code_and_comments(tmp_path: Path) -> None:
    package = tmp_path / "src/respike"
    package.mkdir(parents=True)
    (package / "device.py").write_text("torch.cuda.is_available()\n")
    (package / "fine.py").write_text("dumps = inputs + tuple_of_xpubs  # input, whip\n")
    (package / "bad.py").write_text("x = 1\ny = x.to('cuda:1')\n# is_npu: faster there\n")
    (tmp_path / "native").mkdir()
    (tmp_path / "native/bad.cpp").write_text("cudaMalloc(&p, 1);\n")
    done = check_devices(tmp_path)
    found = [line.split(": ")[0] for line in done.stdout.splitlines()[:-1]]
    assert found == ["src/respike/bad.py:2", "src/respike/bad.py:3", "native/bad.cpp:1"]
    assert done.returncode == 1
