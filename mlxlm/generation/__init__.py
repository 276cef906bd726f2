"""Using a model: generation, chat, embeddings, filling masks."""

from mlxlm.generation.batching import best_of, generate_tokens
from mlxlm.generation.beam import Beams, Hypothesis, beam_search
from mlxlm.generation.blanks import BLANKS, Filled, fill_blanks
from mlxlm.generation.choice import Likelihood, likelihoods
from mlxlm.generation.classification import Classified, classify, head_labels, label_logits, marked, tag
from mlxlm.generation.constraint import Constraint, grammar, json_schema, regex
from mlxlm.generation.contrastive import ContrastiveSearch
from mlxlm.generation.conversation import Conversation
from mlxlm.generation.decoding import Piece, batch_generate, generate, stream_generate
from mlxlm.generation.embedding import POOLINGS, embed
from mlxlm.generation.engine import Engine, EngineBusyError, EngineStatistics, Handle
from mlxlm.generation.evaluation import EvaluationSettings, RowScores, as_predictions, evaluate_rows
from mlxlm.generation.fill_mask import Candidate, fill_mask
from mlxlm.generation.guidance import Guidance
from mlxlm.generation.harness import Requests, check_harness, harness_model, run_harness
from mlxlm.generation.label_scores import ClassScores, LabelScores, entities, score_labels
from mlxlm.generation.penalties import CountPenalties
from mlxlm.generation.perplexity import TextScores, perplexity
from mlxlm.generation.plan import GenerationPlan, plan_generation
from mlxlm.generation.prompt_cache import PromptCache, load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlxlm.generation.requests import Completion, Processor, Request, TokenChoice
from mlxlm.generation.sampling import Sampling
from mlxlm.generation.scoring import Score, score_examples
from mlxlm.generation.speculation import Speculation

__all__ = [
    "BLANKS",
    "POOLINGS",
    "Beams",
    "Candidate",
    "ClassScores",
    "Classified",
    "Completion",
    "Constraint",
    "ContrastiveSearch",
    "Conversation",
    "CountPenalties",
    "Engine",
    "EngineBusyError",
    "EngineStatistics",
    "EvaluationSettings",
    "Filled",
    "GenerationPlan",
    "Guidance",
    "Handle",
    "Hypothesis",
    "LabelScores",
    "Likelihood",
    "Piece",
    "Processor",
    "PromptCache",
    "Request",
    "Requests",
    "RowScores",
    "Sampling",
    "Score",
    "Speculation",
    "TextScores",
    "TokenChoice",
    "as_predictions",
    "batch_generate",
    "beam_search",
    "best_of",
    "check_harness",
    "classify",
    "embed",
    "entities",
    "evaluate_rows",
    "fill_blanks",
    "fill_mask",
    "generate",
    "generate_tokens",
    "grammar",
    "harness_model",
    "head_labels",
    "json_schema",
    "label_logits",
    "likelihoods",
    "load_prompt_cache",
    "make_prompt_cache",
    "marked",
    "perplexity",
    "plan_generation",
    "regex",
    "run_harness",
    "save_prompt_cache",
    "score_examples",
    "score_labels",
    "stream_generate",
    "tag",
]
