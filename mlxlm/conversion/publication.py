"""Putting a result on the hub, after a person has said yes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxlm.errors import UsageError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def check_repository(repository: str) -> None:
    """Raise UsageError for what is no hub id of the form "owner/name"."""
    if not _HUB_ID.fullmatch(repository):
        raise UsageError(f"{repository!r} is no repository on the hub: give OWNER/NAME")


def upload(
    path: str | Path, repository: str, *, confirm: Callable[[str], bool], private: bool = False, api: Any = None
) -> str | None:
    """Upload a result to the hub; returns its address, None when not confirmed.

    path: a folder, or a .gguf file with its card beside it.
    confirm: is shown what would be made public, and says whether to.  private: make a new repository private.
    api: in place of `huggingface_hub.HfApi()`, which uses the token of `hf auth login` or HF_TOKEN.
    Raises UsageError for a repository name that isn't one, for a path with nothing in it, and when the hub refuses.
    """
    path = Path(path)
    check_repository(repository)
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else _gguf_files(path)
    if not files:
        raise UsageError(f"{path}: there is nothing to upload")
    size = sum(one.stat().st_size for one in files)
    kind = "private" if private else "public"
    question = f"upload {len(files)} files ({size / 1e6:,.1f} MB) from {path} to the {kind} repository {repository}?"
    if not confirm(question):
        return None
    if api is None:
        import huggingface_hub

        api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if path.is_dir():
            api.upload_folder(repo_id=repository, folder_path=str(path), commit_message="Upload with mlxlm")
        else:
            for file in files:
                name = "README.md" if file.suffix == ".md" else file.name
                api.upload_file(repo_id=repository, path_or_fileobj=str(file), path_in_repo=name)
    except (OSError, ValueError) as error:
        raise UsageError(f"the hub did not take {repository}: {str(error).splitlines()[0]}") from error
    return f"https://huggingface.co/{repository}"


def _gguf_files(path: Path) -> list[Path]:
    return [one for one in (path, path.with_suffix(".md")) if one.is_file()]
