"""What each objective teaches, on a language whose right answers are determined.

A text counts through 24 symbols, round and round, from any of them, in ones or, where an objective is quick to learn,
in ones or fives: whatever is hidden follows from what is left. After a short training most hidden symbols of new texts
must be found.
"""

from __future__ import annotations

import numpy as np
import pytest

import mlxlm  # noqa: F401  before mlx.core, so that a fast BLAS can be loaded
from mlxlm.objectives import BlankInfilling, CausalLM, MaskedLM, PrefixLM, SpanCorruption

PAD, EOS, CLS, SEP, MASK, SENTENCE, GENERATION, START, END = range(9)
SENTINELS = tuple(range(9, 16))
FIRST, SYMBOLS = 16, 24
VOCABULARY = FIRST + SYMBOLS
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_attention_heads": 4}
DECODER = {
    **SMALL, "model_type": "llama", "intermediate_size": 128, "num_hidden_layers": 2, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
ENCODER = {
    **SMALL, "model_type": "bert", "architectures": ["BertForMaskedLM"], "intermediate_size": 128,
    "num_hidden_layers": 2, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
BOTH = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": VOCABULARY, "d_model": 64,
    "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2, "dropout_rate": 0.0,
    "feed_forward_proj": "relu", "tie_word_embeddings": True,
}  # fmt: skip
BLANKS = {
    **SMALL, "model_type": "glm", "block_position_encoding": True, "num_layers": 2, "max_sequence_length": 64,
    "embedding_dropout_prob": 0.0, "attention_dropout_prob": 0.0, "output_dropout_prob": 0.0,
}  # fmt: skip
INFILLING = BlankInfilling(
    mask_id=MASK, sentence_id=SENTENCE, generation_id=GENERATION, start_id=START, end_id=END, ends=(),
    rates=(0.5, 0.0, 0.5),
)  # fmt: skip
WORDS = np.arange(FIRST, VOCABULARY, dtype=np.int32)
CASES = {
    "the next symbol": (DECODER, CausalLM(packed=False), (1, 5), (16,), 150),
    "the next symbol of packed texts": (DECODER, CausalLM(), (1, 5), (16, 16), 150),
    "the rest of a text": (DECODER, PrefixLM(min_prefix=0.2, max_prefix=0.8), (1, 5), (16,), 150),
    "masked symbols": (ENCODER, MaskedLM(mask_id=MASK, cls_id=CLS, sep_id=SEP, words=WORDS), (1,), (16,), 400),
    "masked symbols and what follows": (
        ENCODER | {"architectures": ["BertForPreTraining"]},
        MaskedLM(mask_id=MASK, cls_id=CLS, sep_id=SEP, words=WORDS, next_sentence=True),
        (1,),
        (16,),
        800,
    ),
    "spans behind sentinels": (BOTH, SpanCorruption(sentinels=SENTINELS, eos_id=EOS), (1,), (40,), 500),
    "blanks": (BLANKS, INFILLING, (1, 5), (16,), 400),
}


def text(rng, strides, length):
    """Symbols (length,) from a drawn one on."""
    counted = rng.integers(0, SYMBOLS) + rng.choice(strides) * np.arange(length)
    return (FIRST + counted % SYMBOLS).astype(np.int32)


class Texts:
    """Batches of new texts, made by an objective.  strides: of their counting.  lengths: of the texts of a row."""

    epoch = num_tokens = 0

    def __init__(self, objective, strides, lengths, rows, seed):
        self.objective, self.strides, self.lengths, self.rows = objective, strides, lengths, rows
        self.rng = np.random.default_rng(seed)
        # No wider than the rows need.
        self.columns = next(number for number in range(8, 64) if objective.row_length(number) >= sum(lengths))

    def next(self):
        rows = [[text(self.rng, self.strides, length) for length in self.lengths] for _ in range(self.rows)]
        return self.objective.batch(rows, self.rng, self.columns)

    def state(self):
        return {}


def found(model, batch):
    """Share of the targets that the model thinks most likely; the first two symbols of a text are anyone's guess."""
    import mlx.core as mx

    given = {name: mx.array(array) for name, array in batch.items() if name not in ("targets", "next_sentence_labels")}
    best = np.array(model(given.pop("tokens"), **given).argmax(-1))
    counted = batch["targets"] != -100
    if "positions" in batch and batch["positions"].ndim == 2:
        counted &= batch["positions"] > 0
    elif batch.keys() == {"tokens", "targets"}:
        counted[:, 0] = False
    return (best == batch["targets"])[counted].mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_more_than_90_percent_of_what_is_hidden_is_found(name):
    from mlxlm.models import Transformer, family_of
    from mlxlm.training import Trainer, TrainSettings, WordLoss
    from mlxlm.training.initialisation import initialise

    values, *made_of, steps = CASES[name]
    model = Transformer(family_of(values).read_config(values))
    initialise(model, 0)
    settings = TrainSettings(
        steps=steps, learning_rate=3e-3, warmup_steps=20, betas=(0.9, 0.98), report_every=0, compile=False
    )
    batch = Texts(*made_of, rows=256, seed=1).next()
    before = found(model, batch)
    Trainer(model, WordLoss(), Texts(*made_of, rows=64, seed=2), settings).run()
    assert before < 0.2
    assert found(model, batch) > 0.9
    if "next_sentence_labels" in batch:
        assert follows(model, batch) > 0.8


def follows(model, batch):
    """Share of the pairs of which the model knows whether the second is the next."""
    import mlx.core as mx

    given = {name: mx.array(batch[name]) for name in ("key_lengths", "token_types")}
    logits = model.pooler.next_sentence(model.pooler(model.hidden(mx.array(batch["tokens"]), **given)))
    return (np.array(logits.argmax(-1)) == batch["next_sentence_labels"]).mean()
