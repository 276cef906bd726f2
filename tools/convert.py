"""Convert a model without installing the package: what `mlxlm convert` does.

usage: python tools/convert.py --model PATH_OR_ID --output PATH [--to hf|mlx|gguf] ...
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from mlxlm.cli.main import run

if __name__ == "__main__":
    sys.argv[1:1] = ["convert"]
    run()
