"""Using a model: generation, chat, embeddings, filling masks."""

from mlxlm.generation.beam import Beams, Hypothesis, beam_search
from mlxlm.generation.blanks import BLANKS, Filled, fill_blanks
from mlxlm.generation.choice import Likelihood, likelihoods
from mlxlm.generation.classification import Classified, classify, head_labels, label_logits, marked, tag
from mlxlm.generation.conversation import Conversation
from mlxlm.generation.decoding import Piece, generate, generate_batch, stream_generate
from mlxlm.generation.embedding import POOLINGS, embed
from mlxlm.generation.evaluation import EvaluationSettings, RowScores, as_predictions, evaluate_rows
from mlxlm.generation.fill_mask import Candidate, fill_mask
from mlxlm.generation.harness import Requests, harness_model, run_harness
from mlxlm.generation.label_scores import ClassScores, LabelScores, entities, score_labels
from mlxlm.generation.perplexity import TextScores, perplexity
from mlxlm.generation.sampling import Sampling
from mlxlm.generation.scoring import Score, score_examples

__all__ = [
    "BLANKS",
    "POOLINGS",
    "Beams",
    "Candidate",
    "ClassScores",
    "Classified",
    "Conversation",
    "EvaluationSettings",
    "Filled",
    "Hypothesis",
    "LabelScores",
    "Likelihood",
    "Piece",
    "Requests",
    "RowScores",
    "Sampling",
    "Score",
    "TextScores",
    "as_predictions",
    "beam_search",
    "classify",
    "embed",
    "entities",
    "evaluate_rows",
    "fill_blanks",
    "fill_mask",
    "generate",
    "generate_batch",
    "harness_model",
    "head_labels",
    "label_logits",
    "likelihoods",
    "marked",
    "perplexity",
    "run_harness",
    "score_examples",
    "score_labels",
    "stream_generate",
    "tag",
]
