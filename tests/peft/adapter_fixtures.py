"""What the tests of other libraries' adapters share: how far a model is from the logits that a fixture expects."""

from __future__ import annotations

import mlx.core as mx
import numpy as np


def fixture_differences(model, folder):
    """Largest errors of the valid places of each row, relative to the largest logit if that is above 1.

    One row at a time, as padding might be treated differently.
    """
    expected = {key: np.array(array) for key, array in mx.load(str(folder / "expected.safetensors")).items()}
    worst = []
    for row, length in enumerate(expected["lengths"].tolist()):
        keywords = {"key_lengths": mx.array([length])}
        if "decoder_tokens" in expected:
            keywords["decoder_tokens"] = mx.array(expected["decoder_tokens"][row : row + 1])
        got = np.array(model(mx.array(expected["tokens"][row : row + 1]), **keywords)[0])
        wanted = expected["logits"][row]
        padded = wanted.ndim == 2 and "decoder_tokens" not in expected
        error = np.abs(got - wanted)
        worst.append((error[:length] if padded else error).max() / max(1.0, np.abs(wanted).max()))
    return worst
