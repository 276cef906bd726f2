"""Using a model: generation, chat, embeddings, filling masks."""

from mlxlm.generation.beam import Beams, Hypothesis, beam_search
from mlxlm.generation.blanks import BLANKS, Filled, fill_blanks
from mlxlm.generation.choice import Likelihood, likelihoods
from mlxlm.generation.conversation import Conversation
from mlxlm.generation.decoding import Piece, generate, generate_batch, stream_generate
from mlxlm.generation.embedding import POOLINGS, embed
from mlxlm.generation.fill_mask import Candidate, fill_mask
from mlxlm.generation.sampling import Sampling

__all__ = [
    "BLANKS",
    "POOLINGS",
    "Beams",
    "Candidate",
    "Conversation",
    "Filled",
    "Hypothesis",
    "Likelihood",
    "Piece",
    "Sampling",
    "beam_search",
    "embed",
    "fill_blanks",
    "fill_mask",
    "generate",
    "generate_batch",
    "likelihoods",
    "stream_generate",
]
