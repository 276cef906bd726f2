"""The model card of a result: what it was made from, how, and what was lost."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import yaml

from mlxlm.conversion.recipes import recipe_json
from mlxlm.conversion.targets import GgufTarget, MlxTarget
from mlxlm.models import OpenedModel
from mlxlm.tokenizers import Tokenizer
from mlxlm.version import __version__

if TYPE_CHECKING:
    from mlxlm.conversion.conversion import Conversion, Target

_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_CARRIED = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
_MAX_CARD_BYTES = 1_000_000


def model_card(
    result: Conversion,
    opened: OpenedModel,
    target: Target,
    tokenizer: Tokenizer | None,
    *,
    origin: str | None,
    notes: str,
) -> str:
    """The card as Markdown with the hub's front matter; licence and languages are the source's.

    origin: what to call the source, default its folder's name.  notes: Markdown that goes in as it is.
    """
    source = opened.source
    name = origin or source.path.name
    front = _front_matter(opened)
    front["library_name"] = "mlx" if isinstance(target, MlxTarget) else "gguf" if _is_gguf(target) else "transformers"
    front["tags"] = sorted({*front.pop("tags", []), front["library_name"]})
    if origin and re.fullmatch(r"[\w.-]+/[\w.-]+", origin):
        front["base_model"] = origin
    text = ["---", yaml.safe_dump(front, allow_unicode=True, sort_keys=True).strip(), "---", ""]
    text += [f"# {result.output.stem if _is_gguf(target) else result.output.name}", ""]
    text += [f"Made from `{name}` ({source.family.name}) with mlxlm {__version__} (`mlxlm convert`).", ""]
    text += _table(result, opened, target, tokenizer)
    if isinstance(target, MlxTarget) and target.recipe is not None:
        text += ["", "Recipe:", "", "```json", _json(recipe_json(target.recipe)), "```"]
    if result.errors:
        text += ["", "Largest relative errors of weights (norm of the change by norm of the weight):", ""]
        text += ["| module | error |", "|---|---|"]
        text += [f"| {module} | {error:.4f} |" for module, error in result.worst()]
    if notes:
        text += ["", notes.strip()]
    return "\n".join(text) + "\n"


def _is_gguf(target: Target) -> bool:
    return isinstance(target, GgufTarget)


def _table(result: Conversion, opened: OpenedModel, target: Target, tokenizer: Tokenizer | None) -> list[str]:
    kinds = Counter(info.dtype for info in opened.checkpoint.tensors.values())
    template = tokenizer is not None and tokenizer.chat_template is not None
    carried = (
        "none in the source" if tokenizer is None else "carried along" + (" with chat template" if template else "")
    )
    rows = [
        ("source tensors", ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())),
        ("result", _describe(target)),
        ("parameters", f"{result.parameters:,}"),
        ("size before", f"{result.source_bytes / 1e6:,.1f} MB"),
        ("size after", f"{result.nbytes / 1e6:,.1f} MB ({result.bits_per_weight:.2f} bits a weight)"),
        ("tokenizer", "none in the source" if tokenizer is None else carried),
    ]
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]


def _describe(target: Target) -> str:
    if isinstance(target, GgufTarget):
        wide = f", table of tokens and head {target.embeddings}" if target.embeddings else ""
        return f"GGUF, matrices {target.kind}{wide}, vectors F32"
    dtype = target.dtype or "each tensor's own dtype"
    if isinstance(target, MlxTarget):
        way = "the source's packed weights, unchanged" if target.recipe is None else "quantized by the recipe below"
        return f"MLX, {way}; floats in {dtype}"
    return f"Hugging Face safetensors, {dtype}"


def _front_matter(opened: OpenedModel) -> dict[str, object]:
    """Licence and the like from the source's card or metadata, as far as they are there and plain."""
    path = opened.source.path
    if path.is_file():
        metadata = opened.checkpoint.metadata
        keys = {"general.license": "license", "general.languages": "language"}
        return {ours: metadata[key] for key, ours in keys.items() if isinstance(metadata.get(key), (str, list))}
    card = path / "README.md"
    if not card.is_file() or card.stat().st_size > _MAX_CARD_BYTES:
        return {}
    match = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
    if match is None or re.search(r"(^|\s)[&*]\w", match[1]):  # anchors could grow without bound
        return {}
    try:
        values = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    return {key: values[key] for key in _CARRIED if isinstance(values.get(key), (str, list))}


def _json(value: object) -> str:
    import json

    return json.dumps(value, indent=2)
