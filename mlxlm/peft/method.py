"""What a fine-tuning method is: settings, and what they put into a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from mlx import nn

from mlxlm.errors import UsageError, nearest
from mlxlm.peft.places import Part, base_modules, base_parameters, fits, hub_path, rules_of

if TYPE_CHECKING:
    import mlx.core as mx

    from mlxlm.layers import VirtualTokens
    from mlxlm.models import Transformer
    from mlxlm.tokenizers import Tokenizer


@dataclass
class Content:
    """What one adapter consists of.

    parts: by the canonical path of the module that each goes around.  added: by the path of the residual sum that each
    adds to.  prompt: virtual tokens.  own: values of base parameters that the adapter has instead, by canonical name.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    added: dict[str, Part] = field(default_factory=dict)
    prompt: VirtualTokens | None = None
    own: dict[str, mx.array] = field(default_factory=dict)

    def modules(self) -> list[nn.Module]:
        """All modules that the adapter brings."""
        return [*self.parts.values(), *self.added.values(), *([] if self.prompt is None else [self.prompt])]


@dataclass(frozen=True, kw_only=True)
class Method:
    """Settings that all methods share.

    modules_to_save: modules (canonical or hub names, or their ends) that are trained as a whole beside the method, such
    as "head" for a new task; default none.
    """

    name: ClassVar[str]
    modules_to_save: tuple[str, ...] = ()

    def content(self, model: Transformer, tokenizer: Tokenizer | None = None) -> Content:
        """Fresh content for a model, drawn from MLX's global random state."""
        content = self.build(model, tokenizer)
        content.own.update(saved_modules(model, self.modules_to_save))
        return content

    def build(self, model: Transformer, tokenizer: Tokenizer | None) -> Content:
        """What the method itself adds; `modules_to_save` come on top."""
        raise NotImplementedError


def saved_modules(model: Transformer, names: tuple[str, ...]) -> dict[str, Any]:
    """The parameters of whole modules by canonical name. Raises UsageError for a name without parameters."""
    rules = rules_of(model)
    parameters = base_parameters(model)
    chosen: dict[str, Any] = {}
    for name in names:
        places = [path for path, _ in base_modules(model) if fits(name, (path, hub_path(rules, path)))]
        found = {key: array for key, array in parameters.items() if any(key.startswith(f"{p}.") for p in places)}
        if not found:
            known = {path.split(".")[-1] for path, _ in base_modules(model)}
            raise UsageError(f"modules_to_save: the model has no module {name!r} with weights{nearest(name, known)}")
        if any(key.endswith(".scales") for key in found):
            raise UsageError(f"modules_to_save: {name!r} is quantized and can't be trained; load with quantized=False")
        chosen.update(found)
    return chosen


def positive(**values: float) -> None:
    """Raise UsageError for a value that isn't above 0."""
    for name, value in values.items():
        if not value > 0:
            raise UsageError(f"{name} is {value}, expected more than 0")


def share(**values: float) -> None:
    """Raise UsageError for a value outside [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise UsageError(f"{name} is {value}, expected at least 0 and less than 1")
