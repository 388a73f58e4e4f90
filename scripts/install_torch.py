"""Installs the torch pinned in requirements.txt into this environment, as a CPU build.

    .venv/bin/python scripts/install_torch.py --constraint .venv/torch.txt

Tried in this order: what is installed already, a local wheel, PyTorch's CPU index, PyPI. One line
says what was chosen and why. torch's own dependencies come later, with the package; the constraint
file keeps that later install from replacing torch: `pip install -c .venv/torch.txt -e .`.
"""

import argparse
import importlib.metadata
import platform
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ANSWER_SECONDS = 5
REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"


def say(text: str) -> None:
    print(f"torch: {text}", flush=True)


def pinned() -> str:
    """The line `torch==X` of requirements.txt."""
    for line in REQUIREMENTS.read_text().splitlines():
        if line.startswith("torch=="):
            return line.strip()
    sys.exit(f"error: {REQUIREMENTS} has no line that starts with torch==")


def installed() -> tuple[str, str | None] | None:
    """(version, GPU library it was built for or None) of the torch that is here, if one is."""
    try:
        found = importlib.metadata.distribution("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    # Read, not imported: importing needs torch's dependencies, which may not be here yet.
    source = Path(str(found.locate_file("torch/version.py"))).read_text()
    built_for = re.findall(r"^(cuda|hip|xpu)\b[^=\n]*=\s*['\"]([^'\"]+)", source, re.MULTILINE)
    return found.version, " ".join(built_for[0]) if built_for else None


def pip_install(*arguments: str, quiet: bool = False) -> bool:
    # --force-reinstall: a GPU build of the same version must not pass for what was asked.
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--force-reinstall", *arguments]
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run(command, stdout=output, stderr=output, check=False).returncode == 0


def cpu_index_answers() -> bool:
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=ANSWER_SECONDS) as reply:
            return bool(reply.status == 200)
    except OSError:  # no name, no route, no answer in time, or an HTTP error
        return False


def arrived(where: str, keep: bool = False) -> bool:
    """Whether what pip just installed is a CPU build; says so, and removes it if not (or keeps)."""
    now = installed()
    if now is None:
        sys.exit(f"error: pip reported success, but torch from {where} is not installed")
    version, built_for = now
    if built_for is None or keep:
        say(f"{version}, {f'built for {built_for}' if built_for else 'CPU build'}, from {where}")
        return True
    say(f"{version} from {where} is built for {built_for}, not a CPU build: removed")
    command = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", "torch"]
    subprocess.run(command, check=True)
    return False


def from_pypi(pin: str) -> None:
    here, system, machine = installed(), platform.system(), platform.machine()
    nothing = f"no CPU build within reach (no local wheel, {CPU_INDEX} does not serve it)"
    if here:
        say(f"{nothing}: keeping {here[0]}, built for {here[1]}")
        return
    if (system, machine) == ("Linux", "x86_64"):
        say(f"{nothing}: downloading PyPI's GPU build and its vendor libraries, several GB in all")
    else:
        say(f"installing from PyPI, the usual source for {system} {machine}")
    if not pip_install(pin):
        sys.exit(f"error: pip could not install {pin} from PyPI; its own message is above")
    arrived("PyPI", keep=True)


def install(pin: str) -> None:
    here = installed()
    if here and here[1] is None:
        say(f"{here[0]}, CPU build, is already installed: kept")
        return
    if pip_install("--no-index", pin, quiet=True) and arrived("a local wheel"):
        return
    reachable = platform.system() == "Linux" and cpu_index_answers()
    if reachable and pip_install("--index-url", CPU_INDEX, pin) and arrived(CPU_INDEX):
        return
    from_pypi(pin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--constraint", type=Path, help="pip constraint file to write")
    constraint: Path | None = parser.parse_args().constraint
    install(pinned())
    if constraint:
        constraint.write_text(f"torch=={importlib.metadata.version('torch')}\n")


if __name__ == "__main__":
    main()
