"""Pretraining objectives: pure functions from raw rows of tokens to batches with inputs and targets."""

from mlxlm.objectives.blank_infilling import BlankInfilling
from mlxlm.objectives.causal import CausalLM, PrefixLM
from mlxlm.objectives.masked import MaskedLM
from mlxlm.objectives.objective import Objective
from mlxlm.objectives.span_corruption import SpanCorruption, TextToText, mixing_rates

# Objectives by the names that recipes give them.
OBJECTIVES = {
    "causal": CausalLM,
    "prefix": PrefixLM,
    "masked": MaskedLM,
    "span-corruption": SpanCorruption,
    "text-to-text": TextToText,
    "blank-infilling": BlankInfilling,
}

__all__ = [
    "OBJECTIVES",
    "BlankInfilling",
    "CausalLM",
    "MaskedLM",
    "Objective",
    "PrefixLM",
    "SpanCorruption",
    "TextToText",
    "mixing_rates",
]
