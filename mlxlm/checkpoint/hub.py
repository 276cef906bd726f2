"""From what a user calls a model (folder, GGUF file, hub id) to a local path with everything needed in it.

huggingface_hub is imported when a hub id has to be looked up or downloaded.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fnmatch
import glob
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mlxlm.checkpoint.files import read_json
from mlxlm.checkpoint.torch_files import torch_files
from mlxlm.errors import MlxlmError, ModelNotFoundError, UsageError, listing

ConfigCheck = Callable[[dict[str, Any]], None]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# The same for PyTorch's files, which serve where there are no safetensors; see torch_files.py.
_TORCH_SINGLE, _TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_NUMBERED = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_HUB_GGUF = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/(.+\.gguf)", re.ASCII)

# Of a hub repository's top folder: what configures the model and its tokenizer.
_SMALL_FILES = ("*.json", "*.jinja", "*.model", "vocab*.txt", "merges*.txt")
_MODULE = re.compile(r"\d+_\w+/config\.json")  # how sentence-transformers pools, and what else it does
_NOT_OURS = ("*.bin.index.json", "*.h5.index.json", "*.msgpack.index.json", "*.onnx*", "openvino*", "coreml*")
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab*.txt", "vocab.json", "tokenizer_config.json")
_FOREIGN_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".npz")


def resolve_model(
    path_or_hub_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    offline: bool | None = None,
    check_config: ConfigCheck | None = None,
    progress: bool = True,
) -> Path:
    """The local folder (or .gguf file) of a model, downloaded if need be.

    path_or_hub_id: a folder with config.json and *.safetensors or PyTorch's *.bin, a .gguf file, a hub id ("org/name"),
    or a GGUF file on the hub ("org/name/file.gguf"). A path that exists wins over a hub id.
    revision: branch, tag or commit on the hub, default its main branch.
    offline: never use the network; default: as HF_HUB_OFFLINE says. What is complete in the local cache is used without
    asking the hub for news (`hf download org/name` fetches them).
    check_config: called with the parsed config.json; raises to refuse the model, and does so before any weight is
    downloaded. Not called for GGUF.
    progress: show download bars on stderr, if that is a terminal.

    Raises ModelNotFoundError, saying what was tried; UsageError for a revision of a local path; what check_config
    raises.
    """
    name = os.fspath(path_or_hub_id)
    local = Path(name).expanduser()
    if name and os.path.exists(local):
        if revision is not None:
            raise UsageError(
                f"revision {revision!r} was given, but {name!r} is a local path; only hub ids have revisions"
            )
        return _local_model(local, check_config)
    if match := _HUB_GGUF.fullmatch(name):
        return _hub_file(match[1], match[2], revision=revision, offline=_is_offline(offline), progress=progress)
    if not _HUB_ID.fullmatch(name) or name.endswith(".gguf"):
        raise ModelNotFoundError(_no_such_path(name))
    return _hub_model(name, revision, _is_offline(offline), check_config, progress)


# ---------------------------------------------------------------------------------------------------- local


def _local_model(path: Path, check_config: ConfigCheck | None) -> Path:
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        raise ModelNotFoundError(f"{path} is a file, but neither a folder nor a .gguf file; give the folder it is in")
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise ModelNotFoundError(f"{path} can't be read: {error.strerror}") from error
    if not names:
        raise ModelNotFoundError(f"{path} is an empty folder; a model is config.json with *.safetensors")
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if "config.json" not in names:
        if ggufs:
            hint = f"; it holds GGUF files, give one of them: {listing(str(path / name) for name in ggufs)}"
        elif "adapter_config.json" in names:
            hint = "; it is an adapter: give its base model, and this folder as the adapter"
        else:
            hint = f"; it holds {listing(names, 5)}"
        raise ModelNotFoundError(f"{path} has no config.json{hint}")
    if check_config is not None:
        check_config(read_json(path / "config.json"))
    safetensors = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)
    if not safetensors and (ggufs or not torch_files(names)):
        raise ModelNotFoundError(f"{path} has no *.safetensors{_weights_hint(names)}")
    return path


def _weights_hint(names: Iterable[str]) -> str:
    """What to do about a model that has weights, but not such as we read."""
    names = list(names)
    if ggufs := [name for name in names if name.lower().endswith(".gguf")]:
        return f"; it has GGUF files, give one of them: {listing(ggufs, 5)}"
    if foreign := [name for name in names if PurePosixPath(name).suffix.lower() in _FOREIGN_WEIGHTS]:
        return f", only {listing(foreign, 3)}, which mlxlm doesn't read"
    return ": it holds no weights"


def _no_such_path(name: str) -> str:
    """Which part of a path is missing, and what stands there under a similar name."""
    if not name:
        return "no model was named; give a folder, a .gguf file or a hub id (org/name)"
    missing = Path(name).expanduser().absolute()
    while not os.path.isdir(missing.parent):
        missing = missing.parent
    return f"no such path: {name} ({missing.name!r} is not in {missing.parent}){_similar_paths(missing)}"


def _similar_paths(missing: Path) -> str:
    """A hint at what stands under a similar name where a path should be; empty if there is nothing."""
    try:
        close = difflib.get_close_matches(missing.name, os.listdir(missing.parent), n=3, cutoff=0.6)
    except OSError:
        return ""
    return f"; did you mean {' or '.join(repr(str(missing.parent / name)) for name in close)}?" if close else ""


# ---------------------------------------------------------------------------------------------------- hub


def _is_offline(offline: bool | None) -> bool:
    if offline is not None:
        return offline
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in ("1", "ON", "YES", "TRUE")


def _hub_model(
    repository: str, revision: str | None, offline: bool, check_config: ConfigCheck | None, progress: bool
) -> Path:
    cached = _cached_snapshot(repository, revision)
    lacking = _lacking(cached) if cached else ["config.json"]
    if cached and not lacking and (offline or _has_tokenizer(cached)):
        return _local_model(cached, check_config)
    if offline:
        state = f"only in part ({listing(lacking, 5)} missing)" if cached else "not"
        raise ModelNotFoundError(
            f"{_naming(repository, revision)} is {state} in the local cache ({_cache_folder()}), and the network is "
            f"switched off (offline, or HF_HUB_OFFLINE is set){_similar_paths(Path(repository))}"
        )
    with _hub_errors(repository, revision), _progress_bars(progress):
        return _download(repository, revision, check_config)


def _download(repository: str, revision: str | None, check_config: ConfigCheck | None) -> Path:
    """config.json first, then the other small files, then the weights: the last thing to come makes it complete."""
    import huggingface_hub

    files = _files(repository, revision)
    names = [name for name in files if "/" not in name]
    if "config.json" not in names:
        ggufs = [f"{repository}/{name}" for name in names if name.lower().endswith(".gguf")]
        hint = f"; it has GGUF files, give one of them: {listing(ggufs, 5)}" if ggufs else ""
        raise ModelNotFoundError(f"{_naming(repository, revision)} on the hub has no config.json{hint}")
    config = Path(huggingface_hub.hf_hub_download(repository, "config.json", revision=revision))
    if check_config is not None:
        check_config(read_json(config))
    if not any(name.endswith(".safetensors") or name in (_TORCH_SINGLE, _TORCH_INDEX) for name in names):
        raise ModelNotFoundError(
            f"{_naming(repository, revision)} on the hub has no *.safetensors{_weights_hint(names)}"
        )
    commit = config.parent.name  # the rest comes from the same commit, even if the branch moves on meanwhile
    small = [name for name in names if _matches(name, _SMALL_FILES) and not _matches(name, _NOT_OURS)]
    small += [name for name in files if _MODULE.fullmatch(name)]
    small += [name for name in names if name == _TORCH_INDEX and not any(map(_is_safetensors, names))]
    folder = _snapshot(repository, commit, small)
    return _snapshot(repository, commit, _weight_files(names, folder))


def _files(repository: str, revision: str | None) -> list[str]:
    import huggingface_hub

    # `list_repo_files` would try again for half a minute when there is no network; this fails at once.
    siblings = huggingface_hub.HfApi().model_info(repository, revision=revision).siblings
    return [sibling.rfilename for sibling in siblings or []]


def _snapshot(repository: str, commit: str, names: list[str]) -> Path:
    import huggingface_hub

    patterns = [glob.escape(name) for name in names]
    return Path(huggingface_hub.snapshot_download(repository, revision=commit, allow_patterns=patterns))


def _weight_files(names: list[str], folder: Path) -> list[str]:
    """The weights of a repository, each once: many carry the same in several layouts."""
    for single, index in ((_SINGLE, _INDEX), (_TORCH_SINGLE, _TORCH_INDEX)):
        if single in names:
            return [single]
        if index in names:
            return sorted(_shards(folder / index) & set(names))
        if any(map(_is_safetensors, names)):
            return sorted(filter(_is_safetensors, names))
    return []


def _is_safetensors(name: str) -> bool:
    return name.endswith(".safetensors")


def _shards(index: Path) -> set[str]:
    """File names in an index; what is wrong with it is said when it is opened."""
    weight_map = read_json(index).get("weight_map")
    return {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()


def _hub_file(repository: str, name: str, *, revision: str | None, offline: bool, progress: bool) -> Path:
    cached = _cached_snapshot(repository, revision)
    if cached and (cached / name).is_file():
        return cached / name
    if offline:
        raise ModelNotFoundError(
            f"{name} of {_naming(repository, revision)} is not in the local cache ({_cache_folder()}), and the network "
            "is switched off (offline, or HF_HUB_OFFLINE is set)"
        )
    import huggingface_hub

    with _hub_errors(repository, revision), _progress_bars(progress):
        names = _files(repository, revision)
        if name not in names:
            ggufs = [file for file in names if file.lower().endswith(".gguf")]
            hint = f"; it has: {listing(ggufs)}" if ggufs else "; it has no GGUF files"
            raise ModelNotFoundError(f"{_naming(repository, revision)} on the hub has no {name}{hint}")
        return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision))


# ---------------------------------------------------------------------------------------------------- the cache


def _cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _cached_snapshot(repository: str, revision: str | None) -> Path | None:
    """The folder of a revision in the hub's cache, if there is one; it may be incomplete."""
    folder = _cache_folder() / f"models--{repository.replace('/', '--')}"
    commit = revision or "main"
    with contextlib.suppress(OSError, ValueError):
        commit = (folder / "refs" / commit).read_text(encoding="utf-8").strip()
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and ".." not in Path(commit).parts and snapshot.is_dir() else None


def _lacking(folder: Path) -> list[str]:
    """What a snapshot needs and doesn't have: an interrupted download leaves some."""
    lacking = [] if (folder / "config.json").is_file() else ["config.json"]
    for single, index in ((_SINGLE, _INDEX), (_TORCH_SINGLE, _TORCH_INDEX)):
        if (folder / single).is_file():
            return lacking
        if (folder / index).is_file():
            shards = _shards(folder / index)
            return lacking + sorted(shard for shard in shards if not os.path.isfile(folder / shard))
    names = [file.name for file in folder.glob("*.safetensors") if file.is_file()]
    numbered = [_NUMBERED.fullmatch(name) for name in names]
    if not names or any(numbered):  # numbered shards come with an index; without it nobody knows whether all are there
        lacking.append("*.safetensors" if not names else _INDEX)
    return lacking


def _has_tokenizer(folder: Path) -> bool:
    return any(_matches(file.name, _TOKENIZER_FILES) for file in folder.iterdir())


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


# ---------------------------------------------------------------------------------------------------- errors, bars


def _naming(repository: str, revision: str | None) -> str:
    return f"{repository} (revision {revision})" if revision else repository


@contextlib.contextmanager
def _hub_errors(repository: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub and its network library raise into one clear line."""
    try:
        yield
    except MlxlmError:
        raise
    except Exception as error:
        text = _explanation(error, repository, revision)
        if text is None:
            raise
        raise ModelNotFoundError(text) from error


def _explanation(error: Exception, repository: str, revision: str | None) -> str | None:
    """What went wrong with a download, None if it isn't one of the known ways."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repository} is gated: accept its terms at https://huggingface.co/{repository}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} on the hub has no revision {revision!r}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repository!r} is neither a local path nor a public model on the hub; a private one needs "
            f"`hf auth login` or HF_TOKEN{_similar_paths(Path(repository))}"
        )
    if isinstance(error, errors.HFValidationError):
        return f"{repository!r} is neither a local path nor a possible hub id: {error}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the hub refuses access to {repository} ({status}): log in with `hf auth login` or set HF_TOKEN"
    if status is not None:
        return f"the hub answered {status} for {_naming(repository, revision)}; try again later"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left for {repository} in the cache ({_cache_folder()}); HF_HUB_CACHE moves it elsewhere"
    if _is_network_error(error):
        return (
            f"{_naming(repository, revision)} is neither a local path nor complete in the local cache "
            f"({_cache_folder()}), and the hub can't be reached ({type(error).__name__})"
            f"{_similar_paths(Path(repository))}"
        )
    return f"downloading {repository} failed: {error}" if isinstance(error, OSError) else None


def _is_network_error(error: Exception) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    # huggingface_hub has changed its network library twice; their errors share no base, and we import none of them.
    library = type(error).__module__.partition(".")[0]
    networks = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
    kinds = (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, TimeoutError)
    return isinstance(error, kinds) or library in networks


@contextlib.contextmanager
def _progress_bars(wanted: bool) -> Iterator[None]:
    """Switch huggingface_hub's bars off for a while, unless they are wanted and stderr is a terminal."""
    from huggingface_hub import constants, utils

    fixed = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None  # the environment has decided
    if fixed or utils.are_progress_bars_disabled() or (wanted and sys.stderr is not None and sys.stderr.isatty()):
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()
