"""What ranks do in test_loading_parts.py: models whose weights each reads from disk as far as it keeps them."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from small_models import save_small_model

from mlxlm.distributed import Joined, parse_mesh
from mlxlm.models.loading import load_model


def saved(folder, cases):
    """A checkpoint of the model of each case."""
    for name in {case.split(" ")[0] for case in cases}:
        save_small_model(name, folder / name)


PREPARE = {"parts": saved}


def parts(world, folder, *cases):
    """For each case "model mesh zero": bytes that this rank read and keeps, and how far its parts are from the whole.

    Of a quantized model also when it is to be computed in floats, "values".
    """
    result = {}
    for case in cases:
        name, mesh, zero = case.split(" ")
        for kept, label in [(True, case), (False, f"{case} values")] if name == "quantized" else [(None, case)]:
            options = {"dtype": "float32", "quantized": kept}
            whole = dict(tree_flatten(load_model(folder / name, **options).parameters()))
            model = load_model(folder / name, **options, lazy=True)
            stored, begun = model._stored, system_bytes()
            parallel = Joined(world, parse_mesh(mesh, world.size), int(zero)).share_model(model)
            held = dict(tree_flatten(model.parameters()))
            mx.eval(held)
            result[f"{label}/elsewhere"] = system_bytes() - begun
            result[f"{label}/read"] = stored.bytes_read
            result[f"{label}/kept"] = sum(array.nbytes for array in held.values())
            result[f"{label}/file"] = sum(array.nbytes for array in whole.values())
            result[f"{label}/apart"] = max(
                difference(parallel.pieces[key], held[key], whole[key]) for key in held if whole[key].size
            )
    return result


def system_bytes():
    """Bytes that the system says this process has read by calls, which mapped files don't count in; 0 elsewhere."""
    path = Path("/proc/self/io")
    return int(path.read_text().split()[1]) if path.exists() else 0


def difference(piece, own, whole):
    part = piece.cut(whole)
    own = own[tuple(slice(0, n) for n in piece.size)]
    return float(mx.abs(part.astype(mx.float32) - own.astype(mx.float32)).max()) if part.size else 0.0
