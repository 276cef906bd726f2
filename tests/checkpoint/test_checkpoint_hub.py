"""Finding models: local folders, the hub's cache, and downloads through a stand-in for huggingface_hub."""

from __future__ import annotations

import errno
import fnmatch
import json
import os
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors, utils

from mlxlm.checkpoint import resolve_model
from mlxlm.errors import ModelNotFoundError, UnsupportedModelError, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ONE, TWO, INDEX = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"
CONFIG = '{"model_type": "x"}'
SHARDS = json.dumps({"weight_map": {"a": ONE, "b": TWO}})
TORCH_INDEX = "pytorch_model.bin.index.json"
TORCH_SHARDS = json.dumps({"weight_map": {"a": "b-1.bin", "b": "b-2.bin"}})


def folder(path: Path, *names: str, config: str = CONFIG) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        contents = {"config.json": config, INDEX: SHARDS, TORCH_INDEX: TORCH_SHARDS}
        (path / name).write_text(contents.get(name, ""))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, a working directory without models, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def unexpected(*args, **kwargs):
        raise AssertionError("the network was asked")

    for owner, name in (
        (huggingface_hub, "hf_hub_download"),
        (huggingface_hub, "snapshot_download"),
        (huggingface_hub.HfApi, "model_info"),
    ):
        monkeypatch.setattr(owner, name, unexpected)
    return tmp_path / "cache"


def cached(cache: Path, repository: str, *names: str, commit: str = COMMIT, ref: str | None = "main") -> Path:
    """A snapshot as huggingface_hub lays it out, files as links to blobs."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    blobs = folder(root / "blobs", *names)
    snapshot.mkdir(parents=True)
    for name in names:
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    if ref is not None:
        folder(root / "refs")
        (root / "refs" / ref).write_text(commit)
    assert blobs.is_dir()
    return snapshot


class Hub:
    """A hub with one repository, in place of huggingface_hub's three functions; it notes what is asked."""

    def __init__(self, cache: Path, repository: str, *names: str) -> None:
        self.cache, self.repository, self.names = cache, repository, names
        self.log: list[str] = []

    def install(self, monkeypatch) -> Hub:
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.hf_hub_download)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, *a, **k: self.model_info(*a, **k))
        return self

    @property
    def snapshot(self) -> Path:
        return self.cache / f"models--{self.repository.replace('/', '--')}" / "snapshots" / COMMIT

    def model_info(self, repository, *, revision=None):
        assert repository == self.repository
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names])

    def hf_hub_download(self, repository, filename, *, revision=None):
        assert repository == self.repository
        assert filename in self.names
        self.log.append(f"{filename} at {revision}")
        folder(self.snapshot, filename)
        refs = folder(self.snapshot.parent.parent / "refs")
        (refs / (revision or "main")).write_text(COMMIT)
        return str(self.snapshot / filename)

    def snapshot_download(self, repository, *, revision, allow_patterns):
        assert (repository, revision) == (self.repository, COMMIT)
        wanted = [name for name in self.names if any(fnmatch.fnmatchcase(name, p) for p in allow_patterns)]
        self.log.append(" ".join(sorted(wanted)))
        folder(self.snapshot, *wanted)
        return str(self.snapshot)


# ---------------------------------------------------------------------------------------------------- local


def test_a_local_folder_and_a_gguf_file_are_returned_as_they_are(tmp_path):
    model = folder(tmp_path / "model", "config.json", "model.safetensors")
    gguf = folder(tmp_path / "other", "x.Q4_0.GGUF") / "x.Q4_0.GGUF"
    assert resolve_model(model) == resolve_model(str(model)) == model
    assert resolve_model(gguf) == gguf
    assert resolve_model(os.path.relpath(model)) == Path("../model")


def test_a_home_relative_path_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder(tmp_path / "model", "config.json", "model.safetensors")
    assert resolve_model("~/model") == tmp_path / "model"


def test_a_folder_wins_over_a_hub_id(tmp_path, cache):
    folder(tmp_path / "work" / "org" / "name", "config.json", "model.safetensors")
    cached(cache, "org/name", "config.json", "model.safetensors", "tokenizer.json")
    assert resolve_model("org/name") == Path("org/name")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "is an empty folder"),
        (["notes.txt"], r"has no config\.json; it holds notes\.txt"),
        (["a.gguf", "b.gguf"], r"it holds GGUF files, give one of them: .*a\.gguf, .*b\.gguf"),
        (["adapter_config.json", "adapters.safetensors"], "it is an adapter: give its base model"),
        (["config.json"], r"has no \*\.safetensors: it holds no weights"),
        (["config.json", "tf_model.h5"], r"only tf_model\.h5, which mlxlm doesn't read"),
        (["config.json", "a.gguf", "x.bin"], r"has no \*\.safetensors; it has GGUF files, give one of them: a\.gguf"),
    ],
    ids=["empty", "no config", "gguf folder", "adapter", "no weights", "foreign", "gguf beside config"],
)
def test_a_folder_that_is_no_model_says_what_it_lacks(tmp_path, names, message):
    with pytest.raises(ModelNotFoundError, match=message):
        resolve_model(folder(tmp_path / "model", *names))


def test_a_file_that_is_not_gguf_is_refused(tmp_path):
    folder(tmp_path / "model", "model.safetensors")
    with pytest.raises(ModelNotFoundError, match=r"is a file, but neither a folder nor a \.gguf file"):
        resolve_model(tmp_path / "model" / "model.safetensors")


@pytest.mark.parametrize("name", ["{}/modle", "{}/modle/deeper/x.gguf", "../modle", "./../modle"])
def test_a_path_that_is_not_there_names_its_nearest_sibling(tmp_path, name):
    folder(tmp_path / "model", "config.json")
    with pytest.raises(ModelNotFoundError, match=r"no such path: .*'modle' is not in .*did you mean '.*model'\?"):
        resolve_model(name.format(tmp_path))


def test_a_hub_id_that_is_a_mistyped_local_folder_gets_the_hint(tmp_path):
    folder(tmp_path / "work" / "runs" / "my-model", "config.json")
    with pytest.raises(ModelNotFoundError, match="did you mean 'runs/my-model'"):
        resolve_model("runs/my-modle", offline=True)


@pytest.mark.parametrize("name", ["", "a/b/c", "org/name:Q4_0", "-x", "x.gguf", "org/", "nul\0byte", "http://x/y"])
def test_what_is_neither_path_nor_hub_id_is_refused_without_asking_the_hub(name):
    with pytest.raises(ModelNotFoundError, match=r"no such path|no model was named"):
        resolve_model(name)


def test_a_revision_of_a_local_folder_is_a_mistake(tmp_path):
    model = folder(tmp_path / "model", "config.json", "model.safetensors")
    with pytest.raises(UsageError, match="only hub ids have revisions"):
        resolve_model(model, revision="main")


def refuse(config):
    raise UnsupportedModelError(f"model_type {config['model_type']} is not supported")


def test_the_config_is_checked_before_the_weights_are_missed(tmp_path):
    with pytest.raises(UnsupportedModelError, match="model_type x"):
        resolve_model(folder(tmp_path / "model", "config.json"), check_config=refuse)


# ---------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize(
    "names", [["model.safetensors"], [INDEX, ONE, TWO], ["weights.safetensors"]], ids=["one", "shards", "another name"]
)
def test_a_complete_snapshot_is_used_without_the_network(cache, names):
    snapshot = cached(cache, "org/name", "config.json", "tokenizer.json", *names)
    assert resolve_model("org/name") == snapshot
    assert resolve_model("org/name", revision=COMMIT) == snapshot


def test_a_model_without_organisation_and_a_revision_are_found(cache):
    cached(cache, "name", "config.json", "vocab.txt", "model.safetensors", commit="1" * 40)
    other = cache / "models--name" / "snapshots" / ("2" * 40)
    folder(other, "config.json", "vocab.txt", "model.safetensors")
    (cache / "models--name" / "refs" / "v2").write_text("2" * 40)
    assert resolve_model("name").name == "1" * 40
    assert resolve_model("name", revision="v2").name == "2" * 40


def test_offline_a_snapshot_without_tokenizer_will_do(cache):
    snapshot = cached(cache, "org/name", "config.json", "model.safetensors")
    assert resolve_model("org/name", offline=True) == snapshot


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_and_not_cached(how, monkeypatch):
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ModelNotFoundError, match=r"org/name is not in the local cache \(.*\), and the network is switched"
    ):
        resolve_model("org/name", offline=True if how == "argument" else None)
    with pytest.raises(ModelNotFoundError, match=r"x\.gguf of org/name is not in the local cache"):
        resolve_model("org/name/x.gguf", offline=True if how == "argument" else None)


@pytest.mark.parametrize(
    ("names", "lacking"),
    [
        (["config.json", INDEX, ONE], TWO),
        (["config.json", ONE], INDEX),
        (["config.json"], r"\*\.safetensors"),
        (["model.safetensors"], r"config\.json"),
    ],
    ids=["a shard", "the index", "the weights", "the config"],
)
def test_an_interrupted_download_is_told_offline_and_finished_online(cache, monkeypatch, names, lacking):
    cached(cache, "org/name", *names)
    with pytest.raises(ModelNotFoundError, match=rf"only in part \({lacking} missing\)"):
        resolve_model("org/name", offline=True)
    hub = Hub(cache, "org/name", "config.json", INDEX, ONE, TWO, "tokenizer.json").install(monkeypatch)
    assert set(os.listdir(resolve_model("org/name"))) >= set(hub.names)


def test_the_config_of_a_cached_model_is_checked(cache):
    cached(cache, "org/name", "config.json", "tokenizer.json", "model.safetensors")
    with pytest.raises(UnsupportedModelError):
        resolve_model("org/name", check_config=refuse)


# ---------------------------------------------------------------------------------------------------- downloads

SMALL = ["config.json", "chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer.model"]
SMALL += ["vocab.txt", "merges.txt", "spiece.model", "tokenizer_config.json"]
UNWANTED = ["README.md", "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack"]
UNWANTED += ["onnx/model.onnx", "original/params.json", "original/model.safetensors", "x.gguf", "modeling_x.py"]


@pytest.mark.parametrize(
    ("weights", "besides"),
    [
        ([INDEX, ONE, TWO], ["consolidated.safetensors"]),
        (["model.safetensors"], ["model.fp16.safetensors"]),
        (["a.safetensors", "b.safetensors"], []),
    ],
    ids=["shards of the index", "one file", "any"],
)
def test_only_what_is_needed_is_downloaded_the_weights_last(cache, monkeypatch, weights, besides):
    hub = Hub(cache, "org/name", *UNWANTED, *besides, *weights, *SMALL).install(monkeypatch)
    assert resolve_model("org/name") == hub.snapshot
    shards = [name for name in weights if name.endswith(".safetensors")]
    small = sorted([*SMALL, *(name for name in weights if name == INDEX)])
    assert hub.log == ["config.json at None", " ".join(small), " ".join(shards)]
    assert sorted(os.listdir(hub.snapshot)) == sorted({*SMALL, *weights})
    hub.log.clear()
    assert resolve_model("org/name") == hub.snapshot
    assert hub.log == []


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_without_safetensors_the_weights_of_pytorch_are_downloaded(cache, monkeypatch, sharded):
    weights = [TORCH_INDEX, "b-1.bin", "b-2.bin"] if sharded else ["pytorch_model.bin"]
    hub = Hub(cache, "org/name", *weights, "training_args.bin", "tokenizer.json", "config.json").install(monkeypatch)
    assert resolve_model("org/name") == hub.snapshot
    assert sorted(os.listdir(hub.snapshot)) == sorted([*weights, "tokenizer.json", "config.json"])
    hub.log.clear()
    assert resolve_model("org/name") == hub.snapshot
    assert hub.log == []


def test_a_model_that_is_refused_costs_one_small_download(cache, monkeypatch):
    hub = Hub(cache, "org/name", "config.json", "model.safetensors", "tokenizer.json").install(monkeypatch)
    with pytest.raises(UnsupportedModelError, match="model_type x"):
        resolve_model("org/name", check_config=refuse, revision="v1")
    assert hub.log == ["config.json at v1"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["config.json", "tf_model.h5"], r"no \*\.safetensors, only tf_model\.h5, which mlxlm doesn't read"),
        (["a.Q8_0.gguf"], r"no config\.json; it has GGUF files, give one of them: org/name/a\.Q8_0\.gguf"),
        (["README.md"], r"no config\.json$"),
        (["config.json"], r"no \*\.safetensors: it holds no weights$"),
    ],
    ids=["foreign", "gguf", "nothing", "no weights"],
)
def test_a_repository_that_is_no_model_says_what_it_lacks(cache, monkeypatch, names, message):
    hub = Hub(cache, "org/name", *names).install(monkeypatch)
    with pytest.raises(ModelNotFoundError, match=rf"org/name on the hub has {message}"):
        resolve_model("org/name")
    assert len(hub.log) <= 1


def test_a_gguf_file_of_the_hub(cache, monkeypatch):
    hub = Hub(cache, "org/name", "x.Q4_0.gguf", "x.Q8_0.gguf").install(monkeypatch)
    path = resolve_model("org/name/x.Q8_0.gguf")
    assert path == hub.snapshot / "x.Q8_0.gguf"
    assert hub.log == ["x.Q8_0.gguf at None"]
    assert resolve_model("org/name/x.Q8_0.gguf", offline=True) == path
    with pytest.raises(ModelNotFoundError, match=r"no x\.Q2\.gguf; it has: x\.Q4_0\.gguf, x\.Q8_0\.gguf"):
        resolve_model("org/name/x.Q2.gguf")


# ---------------------------------------------------------------------------------------------------- failures


def http_error(kind: type[Exception], status: int) -> Exception:
    """One of the hub's errors as it comes, without the request that its constructor wants."""
    error = kind.__new__(kind)
    error.args = (f"{status} Client Error",)
    error.response = SimpleNamespace(status_code=status, headers={})
    return error


NetworkError = type("ConnectError", (Exception,), {"__module__": "httpx._exceptions"})
FAILURES = {
    "not found": (
        http_error(errors.RepositoryNotFoundError, 404),
        "neither a local path nor a public model on the hub",
    ),
    "gated": (http_error(errors.GatedRepoError, 403), r"is gated: accept its terms at .*org/name.*hf auth login"),
    "unauthorized": (http_error(errors.HfHubHTTPError, 401), r"refuses access to org/name \(401\): log in"),
    "forbidden": (http_error(errors.HfHubHTTPError, 403), r"refuses access to org/name \(403\): log in"),
    "server down": (http_error(errors.HfHubHTTPError, 503), "the hub answered 503"),
    "revision": (http_error(errors.RevisionNotFoundError, 404), "has no revision 'v1'"),
    "impossible id": (errors.HFValidationError("no --"), "nor a possible hub id: no --"),
    "unreachable": (errors.LocalEntryNotFoundError("no network"), "the hub can't be reached"),
    "connection": (ConnectionError("refused"), r"the hub can't be reached \(ConnectionError\)"),
    "http library": (NetworkError("name resolution"), r"the hub can't be reached \(ConnectError\)"),
    "switched off": (errors.OfflineModeIsEnabled("offline"), "the hub can't be reached"),
    "disk full": (OSError(errno.ENOSPC, "full"), "no space left for org/name in the cache"),
    "other": (PermissionError(errno.EACCES, "denied"), "downloading org/name failed: .*denied"),
}


@pytest.mark.parametrize("case", FAILURES)
@pytest.mark.parametrize("name", ["org/name", "org/name/x.gguf"])
def test_a_failing_hub_is_one_clear_line(monkeypatch, case, name):
    error, message = FAILURES[case]

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(ModelNotFoundError, match=message) as caught:
        resolve_model(name, revision="v1")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_a_bug_is_not_dressed_up_as_a_missing_model(monkeypatch):
    def fail(*args, **kwargs):
        raise TypeError("a bug")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(TypeError, match="a bug"):
        resolve_model("org/name")


@pytest.mark.parametrize(
    ("terminal", "progress", "shown"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_bars_are_shown_on_a_terminal_only(cache, monkeypatch, terminal, progress, shown):
    hub = Hub(cache, "org/name", "config.json", "model.safetensors").install(monkeypatch)
    seen = []
    original = hub.model_info
    hub.model_info = lambda *a, **k: seen.append(not utils.are_progress_bars_disabled()) or original(*a, **k)
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: terminal, write=lambda text: None))
    resolve_model("org/name", progress=progress)
    assert seen
    assert set(seen) == {shown}
    assert not utils.are_progress_bars_disabled()
