"""A Hugging Face config.json, read so that no key can be ignored by accident."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mlxlm.errors import ConfigError, UnsupportedModelError, listing, nearest

_REQUIRED = object()

# Keys that every config may have and that say nothing about the maths of a forward pass.
_WITHOUT_EFFECT = frozenset(
    """
    _attn_implementation _commit_hash _diffusers_version _name_or_path _num_labels _unsloth_temporary_patches
    architectures auto_map bos_token_id chunk_size_feed_forward custom_pipelines decoder_start_token_id dtype
    eos_token_id finetuning_task gradient_checkpointing id2label initializer_factor initializer_range
    is_encoder_decoder keys_to_ignore_at_inference label2id language license model_type output_attentions
    output_hidden_states output_past pad_token_id prefix problem_type quantization quantization_config return_dict
    _attn_implementation_autoset eos_token_ids is_llama_config loss_type max_sequence_length num_labels
    sbert_ce_default_activation_function sentence_transformers sep_token_id suppress_tokens task_specific_params
    tokenizer_class torch_dtype torchscript transformers.js_config transformers_version unsloth_fixed unsloth_version
    use_bfloat16 use_cache
    """.split()
)

# Options of generation that transformers 4 wrote into model configs.
_GENERATION = frozenset(
    """
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate temperature tf_legacy_loss top_k top_p typical_p
    """.split()
)

# Keys that tools write into configs of models that don't use them: without effect at these values only.
_WITHOUT_EFFECT_AT: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "is_decoder": (False,),
    "pruned_heads": ({},),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False,),
}

_LAYER_COUNTS = frozenset({"num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"})
_MAX_LAYERS = 1000

_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "quick_gelu": "gelu_sigmoid",
    "silu": "silu",
    "swish": "silu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "relu2": "squared_relu",
    "linear": "identity",
}
_ACTIVATIONS_BACK = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "gelu_sigmoid": "quick_gelu",
    "silu": "silu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "squared_relu": "relu2",
    "identity": "linear",
}


class HubConfig:
    """The keys of a config.json, each of which a family's parser must account for.

    `take` reads a key that shapes the model, `note` names keys that are known to have no effect, `expect` refuses
    values that are not implemented. `finish` then raises for every key that nobody accounted for.

    values: the parsed JSON.  weights: names of the checkpoint's tensors where it is at hand, for the few facts that
    only the weights tell (`contains`).
    """

    def __init__(self, values: dict[str, Any], weights: Iterable[str] | None = None):
        self.values = values
        self.weights = None if weights is None else frozenset(weights)
        self._known: set[str] = set(_WITHOUT_EFFECT | _GENERATION)

    @property
    def model_type(self) -> str:
        """The family's name in the hub's vocabulary."""
        return str(self.values.get("model_type", ""))

    @property
    def architecture(self) -> str:
        """The class that transformers would build, such as "LlamaForCausalLM", or "" where the config doesn't say."""
        names = self.values.get("architectures") or [""]
        return str(names[0])

    def take(self, *names: str, default: Any = _REQUIRED) -> Any:
        """The value of the first of `names` (one key and its synonyms) that is present and not null.

        Raises ConfigError when none is and there is no default.
        """
        self._known.update(names)
        for name in names:
            if self.values.get(name) is not None:
                return _plausible(name, self.values[name])
        if default is _REQUIRED:
            raise ConfigError(f"config.json of a {self.model_type or 'model'} lacks {names[0]!r}")
        return default

    def note(self, *names: str) -> None:
        """Mark keys as read that have no effect on what is computed."""
        self._known.update(names)

    def expect(self, name: str, *allowed: Any) -> None:
        """Raise UnsupportedModelError when key `name` is present with a value other than those implemented."""
        self._known.add(name)
        value = self.values.get(name)
        if value is not None and value not in allowed:
            choices = " or ".join(repr(choice) for choice in allowed or (None,))
            only = f", only {choices}" if allowed else ""
            raise UnsupportedModelError(f"config.json: {name} = {value!r} is not implemented{only}")

    def activation(self, *names: str, default: str | None = None) -> str:
        """The activation function that the key names, in this project's vocabulary."""
        name = self.take(*names) if default is None else self.take(*names, default=default)
        if name not in _ACTIVATIONS:
            raise UnsupportedModelError(
                f"config.json: activation {names[0]} = {name!r} is not implemented{nearest(name, _ACTIVATIONS)}"
            )
        return _ACTIVATIONS[name]

    def contains(self, suffix: str, default: bool) -> bool:
        """Whether a tensor whose name is or ends in `.suffix` is stored; `default` when the weights aren't at hand."""
        if self.weights is None:
            return default
        return any(name == suffix or name.endswith("." + suffix) for name in self.weights)

    def unsupported_head(self, *supported: str) -> UnsupportedModelError:
        """The error for an `architectures` entry whose head the family doesn't have."""
        return UnsupportedModelError(
            f"config.json: architecture {self.architecture!r} is not supported; supported here: {', '.join(supported)}"
        )

    def finish(self) -> None:
        """Raise ConfigError that lists every key nobody accounted for."""
        for name, allowed in _WITHOUT_EFFECT_AT.items():
            if name not in self._known:
                self.expect(name, *allowed)
        unknown = sorted(name for name in self.values if name not in self._known)
        if unknown:
            hints = listing(name + _hint(name, self._known) for name in unknown)
            raise ConfigError(
                f"config.json of a {self.model_type} has keys that mlxlm does not know "
                f"and that may change the maths: {hints}"
            )


def _plausible(name: str, value: Any) -> Any:
    """Refuses a number of layers that no model has: a damaged config would otherwise fill the memory with specs."""
    if name in _LAYER_COUNTS and isinstance(value, int) and not 0 < value <= _MAX_LAYERS:
        raise ConfigError(f"config.json: {name} = {value}, expected 1 to {_MAX_LAYERS} layers")
    return value


def _hint(name: str, known: Iterable[str]) -> str:
    hint = nearest(name, known, 1)
    return hint if hint.startswith("; did you mean") else ""


def notes(values: dict[str, Any]) -> dict[str, Any]:
    """The keys of a config.json that say nothing about the maths, such as token ids and labels."""
    return {name: value for name, value in values.items() if name in _WITHOUT_EFFECT | _GENERATION}


def hub_activation(name: str) -> str:
    """The hub's name of one of this project's activations."""
    return _ACTIVATIONS_BACK[name]
