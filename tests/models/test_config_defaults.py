"""A key that a config.json leaves away means what transformers' config class says."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from mlxlm.errors import ConfigError
from mlxlm.models import family, model_types

transformers = pytest.importorskip("transformers", reason="needs the `parity` extra")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

# Layouts of remote code or of nobody, which transformers has no class for.
FOREIGN = ("chatglm", "glm_original", "palm")


@pytest.mark.parametrize("model_type", [name for name in model_types() if name not in FOREIGN])
def test_absent_keys_mean_the_defaults_of_transformers(model_type):
    full = transformers.AutoConfig.for_model(model_type).to_dict()
    ours = family(model_type)
    expected = ours.read_config(full)
    sparse = {"model_type": model_type}
    while True:
        try:
            found = ours.read_config(sparse)
            break
        except ConfigError as error:  # keys that every config has: sizes
            key = re.search(r"lacks '(\w+)'", str(error)).group(1)
            assert key not in sparse
            sparse[key] = full[key]
    assert len(sparse) < 12, sparse
    # A length that nobody wrote down is no limit here; what needs one to compute raises an error.
    assert replace(found, max_length=expected.max_length) == expected
