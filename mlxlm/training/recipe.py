"""Recipes: a pretraining run as one YAML file, checked as a whole before anything is loaded.

model: {model_type: ..., hidden_size: ...}      # values of a config.json, or the path of one; weights are drawn
tokenizer: runs/first/tokenizer                 # a folder
data: {train: [books/*.txt], valid_fraction: 0.01, max_length: 512, batch_size: 16, cache: runs/first/cache}
objective: {name: causal}
training: {steps: 1000, learning_rate: 1e-3}    # see TrainSettings
output: runs/first/run
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mlxlm import runtime
from mlxlm.checkpoint import read_json, write_bytes_atomic
from mlxlm.data import Source as TextSource
from mlxlm.data import TokenReader, prepare
from mlxlm.distributed import Joined, Mesh, connect
from mlxlm.errors import ConfigError, DataError, MlxlmError, UsageError, nearest
from mlxlm.models import Transformer, TransformerConfig
from mlxlm.models.families import family_of
from mlxlm.models.saving import save
from mlxlm.models.source import Source
from mlxlm.objectives import OBJECTIVES
from mlxlm.objectives.spans import raw_length
from mlxlm.tokenizers import Tokenizer, load_tokenizer
from mlxlm.training import plan as plans
from mlxlm.training.checkpoints import Checkpoints
from mlxlm.training.initialisation import initialise
from mlxlm.training.plan_mesh import plan_here
from mlxlm.training.reporters import Reporter
from mlxlm.training.settings import TrainSettings
from mlxlm.training.tasks import PLACES, WordLoss
from mlxlm.training.tracking import REPORTERS
from mlxlm.training.trainer import Trainer
from mlxlm.training.yaml_files import of_type, read_yaml, unknown_keys

SECTIONS = ("model", "tokenizer", "data", "objective", "training", "output", "memory", "loss_chunk", "report_to")
MEMORY = ("check", "auto", "off")
_DATA = ("train", "valid", "valid_fraction", "max_length", "batch_size", "cache", "seed", "processes")
# Arguments of objectives that come from the tokenizer, beside those that end in _id.
_FROM_TOKENIZER = ("sentinels", "words", "starts", "ends")
# What a resumed run may have otherwise than it had before.
_MAY_CHANGE = (
    "output",
    "memory",
    "report_to",
    "data.cache",
    "data.processes",
    "training.steps",
    "training.report_every",
    "training.save_every",
    "training.evaluate_every",
    "training.val_batches",
    "training.patience",
    "training.keep_last",
    "training.final_weights",
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    values: as in the file, overrides applied and defaults filled in.  config: of the model.  model_values: its
    config.json.  settings: of the trainer.
    """

    values: dict[str, Any]
    model_values: dict[str, Any]
    config: TransformerConfig
    settings: TrainSettings

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.values["output"]).expanduser()

    def plan_settings(self) -> plans.PlanSettings:
        """What the memory plan depends on."""
        data, settings = self.values["data"], self.settings
        return plans.PlanSettings(
            batch_size=data["batch_size"], length=data["max_length"], accumulation=settings.accumulation,
            dtype=settings.dtype or "float32", master_weights=settings.master_weights, optimizer=settings.optimizer,
            average=settings.ema_decay is not None, recompute_layers=settings.recompute_layers,
            chunk=self.values["loss_chunk"], **self._targets(),
        )  # fmt: skip

    def _targets(self) -> dict[str, Any]:
        """How many targets the objective gives: the length of its decoder's rows, or the share of the tokens."""
        given = self.values["objective"]
        kind = OBJECTIVES[given["name"]]
        if hasattr(kind, "target_length"):
            density, mean_span = (given.get(name, getattr(kind, name)) for name in ("density", "mean_span"))
            return {"target_length": raw_length(self.values["data"]["max_length"], density, mean_span)[1]}
        share = given.get("rate", getattr(kind, "rate", 1.0)) + 1 / PLACES
        return {"targets": share if 2 * share <= 1 else 1.0}

    def fitted(self, limit: int | None = None, *, joined: Joined | None = None) -> Recipe:
        """The recipe as its `memory` says: refused when it can't fit ("check"), or made to fit ("auto").

        limit: bytes, default the machine's working set.  joined: the processes that share the work, each of which must
        have room for its part; "auto" is for one.  Raises MemoryPlanError.
        """
        if self.values["memory"] == "auto" or self.settings.recompute_layers:
            runtime.small_command_graphs()
        if joined is not None and not joined.alone:
            if self.values["memory"] == "auto":
                raise UsageError("memory: auto chooses settings for one process; set them yourself under --mesh")
            if self.values["memory"] == "check":
                joined.check(self.config, self.values["data"]["batch_size"])
                plan_here(self.config, self.plan_settings(), joined, refuse=True, limit=limit)
            return self
        if self.values["memory"] == "check":
            plans.check(self.config, self.plan_settings(), limit)
        if self.values["memory"] != "auto":
            return self
        chosen = plans.fit(self.config, self.plan_settings(), limit)
        return check(
            override(self.values, [
                ("data.batch_size", chosen.batch_size), ("training.accumulation", chosen.accumulation),
                ("training.recompute_layers", chosen.recompute_layers), ("loss_chunk", chosen.chunk),
            ])
        )  # fmt: skip

    @contextlib.contextmanager
    def held(self, limit: int | None = None, *, joined: Joined | None = None) -> Iterator[None]:
        """Hold this process to the plan for a while, where `memory` is not "off"; see `held_to`."""
        if self.values["memory"] == "off":
            yield
            return
        if joined is None or joined.alone:
            plan = plans.predict(self.config, self.plan_settings())
        else:
            plan = plan_here(self.config, self.plan_settings(), joined, refuse=False)
        with plans.held_to(plan, limit):
            yield

    def save(self) -> None:
        """Write `recipe.yaml` into the run's folder, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.values, sort_keys=False, allow_unicode=True)
        write_bytes_atomic(self.folder / "recipe.yaml", text.encode())

    def trainer(
        self, reporters: Sequence[Reporter] = (), *, resume: bool = False, joined: Joined | None = None
    ) -> Trainer:
        """Everything made ready: tokenised data, drawn weights. The run saves the recipe in its folder when it starts.

        joined: the processes that train together; the batch size is that of all of them.
        Raises UsageError when the folder holds a run and resume is False, or a run of another recipe and it is True.
        """
        joined = joined or Joined(connect(alone=True), Mesh())
        joined.check(self.config, self.values["data"]["batch_size"])
        found = joined.world.share(Checkpoints(self.folder, self.settings.keep_last).steps())
        if found and not resume:
            raise UsageError(
                f"{self.folder} holds a run of {found[-1]} steps: --resume it, or choose another --output for a new one"
            )
        if found and (self.folder / "recipe.yaml").is_file():
            self._compare(check(read(self.folder / "recipe.yaml")).values)  # with defaults of settings it had not yet
        tokenizer = load_tokenizer(Path(self.values["tokenizer"]).expanduser())
        vocab_size = self.config.embeddings.vocab_size
        if tokenizer.vocab_size > vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}; "
                f"set model.vocab_size to {tokenizer.vocab_size} or more"
            )
        objective = self._objective(tokenizer)
        with joined.world.first_alone():
            train, valid = self._stores(tokenizer)
        data, seed = self.values["data"], self.settings.seed
        sizes = {"batch_size": data["batch_size"], "max_length": data["max_length"], "seed": seed}
        model = Transformer(self.config)
        initialise(model, seed, evaluate=not joined.parallel)
        ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ("bos", "eos", "pad")}
        known = {name: id for name, id in ids.items() if id is not None and self.model_values.get(name) is None}
        model.source = Source(
            family=family_of(self.model_values), path=self.folder, values={**self.model_values, **known},
            config=self.config,
        )  # fmt: skip
        parallel = joined.share_model(model)
        return Trainer(
            model,
            WordLoss(chunk=self.values["loss_chunk"]),
            joined.rows(TokenReader(train, objective, **sizes)),
            self.settings,
            self.folder,
            # In a drawn order, the same at every evaluation and in every run: some of it then stands for all.
            valid=(lambda: joined.rows(TokenReader(valid, objective, **sizes | {"seed": data["seed"]}, epochs=1)))
            if len(valid)
            else None,
            reporters=[_Keeper(self), *reporters],
            save_model=lambda folder: joined.save(model, lambda whole: save(whole, tokenizer, folder)),
            config=self.values,
            communicator=parallel,
        )

    def _objective(self, tokenizer: Tokenizer) -> Any:
        settings = {name: value for name, value in self.values["objective"].items() if name != "name"}
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        try:
            return OBJECTIVES[self.values["objective"]["name"]].from_tokenizer(tokenizer, **settings)
        except TypeError as error:
            raise ConfigError(f"objective: a value is of the wrong type ({error})") from error

    def _stores(self, tokenizer: Tokenizer) -> tuple[Any, Any]:
        data = self.values["data"]
        cache = Path(data["cache"] or self.folder / "cache").expanduser()
        shared = {"processes": data["processes"]}
        train, valid = prepare(
            data["train"], tokenizer, cache, valid_fraction=data["valid_fraction"], seed=data["seed"], **shared
        )
        if data["valid"]:
            valid, _ = prepare(data["valid"], tokenizer, cache, **shared)
        elif data["valid_fraction"] and not len(valid):
            raise DataError(
                f"valid_fraction {data['valid_fraction']} of {len(train)} documents gives none for validation; "
                "set a larger one, or data.valid"
            )
        return train, valid

    def _compare(self, before: Mapping[str, Any]) -> None:
        then, now = _flat(before), _flat(self.values)
        differ = [
            f"{name} was {then.get(name)!r}, is {now.get(name)!r}"
            for name in sorted({*then, *now})
            if name not in _MAY_CHANGE and then.get(name) != now.get(name)
        ]
        if differ:
            raise UsageError(f"{self.folder} holds a run of another recipe: {'; '.join(differ)}")


class _Keeper(Reporter):
    """Saves the recipe when the run starts, and so not into the folder of another run that is under way."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def on_start(self, trainer: Trainer) -> None:
        """Save it."""
        self.recipe.save()


def read(path: str | Path) -> dict[str, Any]:
    """The values of a recipe file, unchecked. Raises ConfigError when it is no YAML mapping."""
    return read_yaml(path, f"a recipe is a mapping with {', '.join(SECTIONS[:6])}")


def override(values: Mapping[str, Any], changes: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A copy with values set by dotted names. Raises UsageError for a name below something that has no parts."""
    result = copy.deepcopy(dict(values))
    for name, value in changes:
        *parents, last = name.split(".")
        place = result
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise UsageError(f"--set {name}: {parent} is {place!r}, which has no parts to set")
        place[last] = value
    return result


def check(values: Mapping[str, Any]) -> Recipe:
    """The recipe of these values. Raises ConfigError that lists everything that is wrong with them."""
    values = copy.deepcopy(dict(values))
    problems = unknown_keys("", values, SECTIONS)
    for name in SECTIONS[:6]:
        if values.get(name) is None:
            problems.append(f"{name} is missing")
    for name in ("data", "objective", "training"):
        if values.get(name) is not None and not isinstance(values[name], dict):
            problems.append(f"{name} is {values[name]!r}; expected a mapping")
    for name in ("tokenizer", "output"):
        if values.get(name) is not None and not isinstance(values[name], str):
            problems.append(f"{name} is {values[name]!r}; expected a path")
    values.setdefault("memory", "check")
    values.setdefault("loss_chunk", None)
    _check_reporters(values, problems)
    values["memory"] = "off" if values["memory"] is False else values["memory"]  # YAML 1.1 reads off as false
    if values["memory"] not in MEMORY:
        problems.append(f"memory is {values['memory']!r}{nearest(str(values['memory']), MEMORY)}")
    if values["loss_chunk"] is not None and not _whole(values["loss_chunk"], 1):
        problems.append(f"loss_chunk is {values['loss_chunk']!r}; expected a number of words, or null")
    model_values, config = _model(values.get("model"), problems)
    if isinstance(values.get("data"), dict):
        _check_data(values["data"], problems)
    if isinstance(values.get("objective"), dict):
        _check_objective(values["objective"], problems)
    settings = _settings(values["training"], problems) if isinstance(values.get("training"), dict) else None
    if config is not None and not config.predicts_words:
        problems.append("model: it has no head that predicts words; set model.architectures to a class that has")
    if problems:
        raise ConfigError("the recipe can't be used: " + "; ".join(problems))
    assert config is not None
    assert settings is not None
    values["training"] = settings.to_json()
    return Recipe(values, model_values, config, settings)


def _check_reporters(values: dict[str, Any], problems: list[str]) -> None:
    given = values.get("report_to") or []
    values["report_to"] = [given] if isinstance(given, str) else given
    if not isinstance(values["report_to"], list):
        problems.append(f"report_to is {given!r}; expected a list of {', '.join(REPORTERS)}")
        return
    problems += [f"report_to: unknown {one!r}{nearest(str(one), REPORTERS)}" for one in given if one not in REPORTERS]


def _model(given: Any, problems: list[str]) -> tuple[dict[str, Any], TransformerConfig | None]:
    if given is None:
        return {}, None
    try:
        if isinstance(given, str):
            path = Path(given).expanduser()
            given = read_json(path / "config.json" if path.is_dir() else path)
        if not isinstance(given, dict):
            raise ConfigError(f"{given!r}; expected the values of a config.json, or a path")
        return given, family_of(given).read_config(given)
    except MlxlmError as error:
        problems.append(f"model: {error}")
        return {}, None


def _check_data(data: dict[str, Any], problems: list[str]) -> None:
    problems += unknown_keys("data.", data, _DATA)
    defaults = {"valid": None, "valid_fraction": 0.0, "cache": None, "seed": 0, "processes": None}
    for name, value in defaults.items():
        data.setdefault(name, value)
    for name in ("train", "valid"):
        if data.get(name) is None:
            continue
        data[name] = data[name] if isinstance(data[name], list) else [data[name]]
        for one in data[name]:
            try:
                if not isinstance(one, (str, dict)):
                    raise UsageError(f"{one!r}; expected a path, a pattern or a mapping with location")
                TextSource.parse(one)
            except (MlxlmError, TypeError) as error:
                problems.append(f"data.{name}: {error}")
    if not data.get("train"):
        problems.append("data.train is missing")
    for name, least in (("max_length", 1), ("batch_size", 1), ("seed", 0), ("processes", 1)):
        if name in defaults and data[name] is None:
            continue
        if not _whole(data.get(name), least):
            problems.append(f"data.{name} is {data.get(name)!r}; expected a whole number of at least {least}")
    fraction = data["valid_fraction"]
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction < 1:
        problems.append(f"data.valid_fraction is {fraction!r}; expected a number from 0 to below 1")
    elif fraction and data["valid"]:
        problems.append("data has both valid and valid_fraction; expected one of them")
    if data["cache"] is not None and not isinstance(data["cache"], str):
        problems.append(f"data.cache is {data['cache']!r}; expected a path")


def _check_objective(objective: dict[str, Any], problems: list[str]) -> None:
    kind = OBJECTIVES.get(objective.get("name", ""))  # type: ignore[call-overload]
    if kind is None:
        problems.append(f"objective.name is {objective.get('name')!r}{nearest(str(objective.get('name')), OBJECTIVES)}")
        return
    names = [field.name for field in dataclasses.fields(kind)]
    names = [name for name in names if not name.endswith("_id") and name not in _FROM_TOKENIZER]
    arguments = inspect.signature(kind.from_tokenizer).parameters.values()
    names += [one.name for one in arguments if one.kind is one.KEYWORD_ONLY and one.name not in names]
    problems += unknown_keys("objective.", objective, ["name", *names])


def _settings(given: dict[str, Any], problems: list[str]) -> TrainSettings | None:
    fields = {field.name: field for field in dataclasses.fields(TrainSettings)}
    before = len(problems)
    problems += unknown_keys("training.", given, fields)
    if "steps" not in given:
        problems.append("training.steps is missing")
    for name, value in given.items():
        kind = str(fields[name].type) if name in fields else ""
        if kind and not of_type(value, kind):
            problems.append(f"training.{name} is {value!r}; expected {kind.replace('None', 'null')}")
    if len(problems) > before:
        return None
    try:
        return TrainSettings.from_json(given)
    except MlxlmError as error:
        problems.append(f"training: {error}")
        return None


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
