"""`mlxlm families`: what models are supported, and how that is verified."""

from __future__ import annotations

_HOW = """
Each family is tested on small random models. Its logits differ from those of the reference by less than 1e-4 in
float32, padded rows give what they give alone, steps with a cache what one pass gives, the config reads the same in
the dialects of transformers 4 and 5, and what is saved has the names, shapes and values of what was loaded."""


def families() -> None:
    """List the supported families: their model_type in config.json and what their logits are compared with."""
    from mlxlm.models import families as all_families

    rows = [(one.name, ", ".join(one.model_types), "yes" if one.gguf else "", one.reference) for one in all_families()]
    rows.insert(0, ("family", "model_type", "GGUF", "reference"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]))
    print(_HOW)
