"""Write small PyTorch files and what they hold, for the tests of the reader that never runs a pickle.

usage: python tools/make_torch_fixtures.py        (needs torch and safetensors)

The files go to tests/fixtures/torch: the same state dict as a zip archive and in the format before PyTorch 1.6, a
trainer's file that holds it beside other things, and expected.safetensors with the values, floats of 8 bits and
float64 as float32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

TARGET = Path(__file__).parent.parent / "tests" / "fixtures" / "torch"
PLAIN = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
SMALL = ("float8_e4m3fn", "float8_e5m2")


def state_dict() -> dict[str, torch.Tensor]:
    """Every dtype, and every way in which a tensor can lie in its storage."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(-9, 9, (2, 3), generator=generator).float() + 0.25
    tensors = {f"plain.{name}": values.to(getattr(torch, name)) for name in PLAIN}
    base = torch.arange(24.0).reshape(4, 6)
    tensors |= {
        "view.whole": base,
        "view.transposed": base.T,
        "view.rows": base[1:3],
        "view.column": base[:, 2],
        "view.steps": base[::2, 1::3],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "positions": torch.arange(5).expand(1, -1),
    }
    return tensors


def main() -> None:
    """Write all files."""
    TARGET.mkdir(parents=True, exist_ok=True)
    tensors = state_dict()
    torch.save(tensors, TARGET / "legacy.bin", _use_new_zipfile_serialization=False)
    tensors |= {f"small.{name}": torch.randn(2, 5).to(getattr(torch, name)) for name in SMALL}
    torch.save(tensors, TARGET / "archive.bin")
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    trainer = {"epoch": 3, "loss": 0.5, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(trainer, TARGET / "trainer.ckpt")
    torch.save(trainer, TARGET / "trainer-legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(model, TARGET / "module.pt")
    wide = ("float8", "float64")
    expected = {name: t.detach().float() if str(t.dtype)[6:].startswith(wide) else t for name, t in tensors.items()}
    expected |= {f"trainer.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file({name: tensor.contiguous().clone() for name, tensor in expected.items()}, TARGET / "expected.safetensors")


if __name__ == "__main__":
    main()
