"""A whole conversion as a person asks for it: recipe, calibration, result, comparison, card, upload."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxlm.checkpoint import Quantization
from mlxlm.conversion.calibrated import Prepared, prepare
from mlxlm.conversion.calibration import Calibration, calibration, check_language_model, perplexity, read_text
from mlxlm.conversion.conversion import Conversion, Progress, Target, check_output, convert, read_tokenizer
from mlxlm.conversion.recipes import Module, Recipe, quantizable, quantization
from mlxlm.conversion.sensitivity import Said, sensitive_recipe
from mlxlm.conversion.targets import GgufTarget, MlxTarget
from mlxlm.conversion.verification import Verification, verify
from mlxlm.errors import DataError, UsageError
from mlxlm.models import Transformer, find, load_model, open_model
from mlxlm.models.loading import checkpoint_dtype, parse_dtype

Method = Literal["round", "gptq", "awq", "awq+gptq"]
METHODS: tuple[Method, ...] = ("round", "gptq", "awq", "awq+gptq")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for.

    model: a directory, a .gguf file or a hub id.  output: a folder, for GGUF a file; nothing may stand there.
    target: see `HubTarget`, `MlxTarget`, `GgufTarget`.  revision: of a hub id.
    target_bits: bits a weight, of all weights, for a recipe by sensitivity in place of the target's default.
    forms: to choose from then, default affine 2 to 8 bits in the default's groups, and 4 bits in groups of other sizes.
    method: how linear modules in layers are rounded.  text: a file to calibrate on and to judge by, default the Python
    language reference.  rows, length: of tokens, for calibration and again for judging.
    measure: perplexity before and after; needs memory for the float model.  verify: compare layer by layer.
    """

    model: str
    output: Path
    target: Target
    revision: str | None = None
    target_bits: float | None = None
    forms: tuple[Quantization, ...] = ()
    method: Method = "round"
    text: Path | None = None
    rows: int = 16
    length: int = 256
    measure: bool = False
    verify: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}; valid: {', '.join(METHODS)}")
        quantizes = isinstance(self.target, MlxTarget) and self.target.recipe is not None
        if not quantizes and (self.target_bits is not None or self.method != "round"):
            raise UsageError("a method or a target size is for results that are quantized for MLX")
        if self.rows < 1 or self.length < 8:
            raise UsageError("calibration needs at least 1 row of 8 tokens")

    @property
    def calibrates(self) -> bool:
        """Whether the float model has to be loaded before the conversion."""
        return self.target_bits is not None or self.method != "round"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came of it.

    before, after: perplexity on text that nothing was calibrated on.  verification: of hidden states and logits.
    """

    conversion: Conversion
    target: Target
    before: float | None = None
    after: float | None = None
    verification: Verification | None = None


def fulfil(request: Request, *, say: Said | None = None, progress: Progress | None = None) -> Report:
    """Do all that is asked for but the upload.

    say: told what goes on.  progress: see `convert`. Raises what the steps raise; nothing stands at the output then.
    """
    check_output(request.output, request.target)
    path = find(request.model, revision=request.revision)
    say = say or (lambda text: None)
    target, notes = request.target, []
    data, before = None, None
    if isinstance(target, MlxTarget) and target.recipe is not None and (held := open_model(path).quantizations):
        bits = " and ".join(str(bits) for bits in sorted({form.bits for form in held.values()}))
        say(f"the source is quantized to {bits} bits and is rounded once more; --keep takes its weights as they are")
    if request.calibrates or request.measure:
        data = _calibration(path, request)
    if request.calibrates:
        assert data is not None
        assert isinstance(target, MlxTarget)
        model = load_model(path, dtype="float32", quantized=False)
        if request.measure:
            before = perplexity(model, data.held_out)
        target = _calibrated(model, path, request, target, data, say)
        del model
        notes.append(_calibration_note(request, data))
    elif request.measure:
        assert data is not None
        before = perplexity(load_model(path, dtype="float32", quantized=False), data.held_out)
    if before is not None:
        say(f"perplexity before: {before:.3f}")
    judge = _Judge(request, path, data, before, say)
    origin = request.model if not Path(request.model).exists() else None
    conversion = convert(
        path, request.output, target, origin=origin, notes="\n\n".join(notes), progress=progress, judge=judge
    )
    return Report(
        conversion=conversion, target=target, before=before, after=judge.after, verification=judge.verification
    )


class _Judge:
    """Measures a result that is whole but has no name yet."""

    def __init__(
        self, request: Request, source: Path, data: Calibration | None, before: float | None, say: Said
    ) -> None:
        self.request, self.source, self.data, self.before, self.say = request, source, data, before, say
        self.after: float | None = None
        self.verification: Verification | None = None

    def __call__(self, result: Path) -> str:
        """Markdown for the card. Raises CheckpointError when a float result computes something else than its source."""
        notes = []
        if self.request.verify:
            self.say("comparing with the source")
            self.verification = verify(self.source, result)
            dtype = _stored_floats(self.request.target, self.source)
            if dtype is not None:
                self.verification.check(dtype)
            notes.append(self.verification.markdown())
        if self.before is not None and self.data is not None:
            self.after = perplexity(load_model(result, dtype="float32", quantized=False), self.data.held_out)
            self.say(f"perplexity after: {self.after:.3f}")
            rows, length = self.data.held_out.shape
            text = "the Python language reference" if self.request.text is None else f"`{self.request.text.name}`"
            notes.append(
                f"Perplexity on {rows} x {length} tokens of {text} that nothing was calibrated on: "
                f"{self.before:.3f} before, {self.after:.3f} after."
            )
        return "\n\n".join(notes)


def _stored_floats(target: Target, source: Path) -> str | None:
    """The dtype of a result's floats; None when it is quantized, so that it may differ as it will."""
    if isinstance(target, GgufTarget):
        return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(target.kind)
    if isinstance(target, MlxTarget):
        return "float16" if target.recipe is None else None
    opened = open_model(source)
    dtype = parse_dtype(target.dtype) if target.dtype else checkpoint_dtype(opened.source.values, opened.checkpoint)
    return str(dtype).removeprefix("mlx.core.")


def _calibration(path: Path, request: Request) -> Calibration:
    opened = open_model(path)
    tokenizer = read_tokenizer(opened)
    if tokenizer is None:
        raise DataError(f"{path} has no tokenizer, so no text can be read to it")
    limit = opened.source.config.max_length or request.length
    return calibration(tokenizer, read_text(request.text), rows=request.rows, length=min(request.length, limit))


def _calibrated(
    model: Transformer, path: Path, request: Request, target: MlxTarget, data: Calibration, say: Said
) -> MlxTarget:
    """The target with the recipe and the weights that the calibration gives."""
    check_language_model(model)
    opened = open_model(path)
    named = target.dtype or opened.source.values.get("dtype") or opened.source.values.get("torch_dtype")
    dtype = parse_dtype(named) if named else checkpoint_dtype(opened.source.values, opened.checkpoint)
    modules = quantizable(opened.source.config, opened.source.family.rules(opened.source.config, "mlx"))
    recipe = target.recipe
    assert recipe is not None
    if request.target_bits is not None:
        recipe = _sensitive(model, modules, data, request, recipe, dtype, say)
    prepared = Prepared()
    if request.method != "round":
        prepared = prepare(
            model,
            recipe.forms(modules),
            data.measured,
            compensate="gptq" in request.method,
            scale="awq" in request.method,
            dtype=dtype,
            say=say,
        )
    method = request.method
    if method != "round":  # other text, other weights: such a conversion must not go on with these
        method += " " + sha256(bytes(memoryview(data.measured))).hexdigest()[:16]
    return replace(target, recipe=recipe, prepared=prepared.prepared, floats=prepared.floats, method=method)


def _sensitive(
    model: Transformer,
    modules: list[Module],
    data: Calibration,
    request: Request,
    recipe: Recipe,
    dtype: mx.Dtype,
    say: Said,
) -> Recipe:
    assert request.target_bits is not None
    default = recipe.default or quantization()
    if default.mode != "affine" and not request.forms:
        raise UsageError(f"a target size chooses among bits, but {default.mode} has one number of them; use affine")
    sizes = [size for size in (32, 64, 128) if size != default.group_size]
    usual = [quantization(bits, default.group_size) for bits in (2, 3, 4, 5, 6, 8)]
    forms = request.forms or (*usual, *(quantization(4, size) for size in sizes))
    parameters = sum(array.size for _, array in tree_flatten(model.parameters()))
    return sensitive_recipe(
        model,
        modules,
        data.measured,
        total_bytes=int(parameters * request.target_bits / 8),
        forms=forms,
        dtype=dtype,
        fixed=recipe,
        say=say,
    )


def _calibration_note(request: Request, data: Calibration) -> str:
    rows, length = data.measured.shape
    text = "the Python language reference" if request.text is None else f"`{request.text.name}`"
    ways = {
        "gptq": "error compensation (GPTQ)",
        "awq": "scaling (AWQ)",
        "awq+gptq": "scaling (AWQ), then error compensation (GPTQ)",
        "round": "",
    }
    done = [f"bits by sensitivity for {request.target_bits} bits a weight"] if request.target_bits is not None else []
    done += [ways[request.method]] if request.method != "round" else []
    return f"Calibrated on {rows} x {length} tokens of {text}: {'; '.join(done)}."
