"""The machine under the models, and what importing costs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

import mlxlm
from mlxlm import interruption, runtime


def python(code, **environment):
    """What a fresh Python prints."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_mlxlm_imports_nothing_heavy():
    heavy = ["mlx.core", "numpy", "torch", "transformers", "tokenizers", "sentencepiece", "jinja2", "huggingface_hub"]
    assert python(f"import sys, mlxlm; print(sorted(set({heavy}) & set(sys.modules)))") == "[]"


def test_help_imports_neither_mlx_nor_a_tokenizer():
    code = (
        "import sys\nsys.argv = ['mlxlm', 'generate', '--help']\nfrom mlxlm.cli.main import run\n"
        "try:\n    run()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'mlx.core', 'numpy', 'tokenizers', 'jinja2', 'huggingface_hub'} & set(sys.modules)))"
    )
    assert python(code).split("\n")[-1] == "[]"


def test_every_public_name_can_be_had():
    for name in mlxlm.__all__:
        assert getattr(mlxlm, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_that"):
        _ = mlxlm.nothing_like_that


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a BLAS is loaded on Linux only")
class TestBlas:
    """MLXLM_BLAS and the order of imports decide; nothing ever fails."""

    def test_off(self):
        assert python("import mlxlm; print(mlxlm.runtime.load_blas().status)", MLXLM_BLAS="off") == "off"

    def test_a_library_that_is_not_there(self):
        code = "import mlxlm; b = mlxlm.runtime.load_blas(); print(b.status, '/', b.advice()[:7])"
        assert python(code, MLXLM_BLAS="libnothing.so.7") == "not found / install"

    def test_a_library_that_is_no_blas(self):
        assert python("import mlxlm; print(mlxlm.runtime.load_blas().status)", MLXLM_BLAS="libc.so.6") == "not found"

    def test_mlx_imported_first_is_too_late(self):
        code = "import mlx.core, mlxlm; b = mlxlm.runtime.load_blas(); print(b.status, '/', b.advice()[:12])"
        assert python(code, MLXLM_BLAS="") == "too late / import mlxlm"

    def test_products_are_right_whatever_is_found(self):
        code = (
            "import mlxlm, mlx.core as mx, numpy as np\n"
            "a, b = np.random.rand(37, 53).astype('f'), np.random.rand(53, 29).astype('f')\n"
            "print(np.abs(np.array(mx.array(a) @ mx.array(b)) - a.astype('d') @ b).max() < 1e-4)"
        )
        assert python(code) == "True"


def test_memory_figures_are_plausible():
    import mlx.core as mx

    kept = mx.zeros((1000, 1000))
    mx.eval(kept)
    memory = runtime.memory()
    assert memory.active >= kept.nbytes
    assert memory.peak >= memory.active
    assert memory.total is None or memory.total > 10**8


def test_the_default_dtype_follows_the_backend(monkeypatch):
    import mlx.core as mx

    monkeypatch.setattr(runtime, "backend", lambda: "metal")
    assert runtime.default_dtype(mx.bfloat16) == mx.bfloat16
    monkeypatch.setattr(runtime, "backend", lambda: "cpu")
    assert runtime.default_dtype(mx.bfloat16) == mx.float32


GRAPHS = "import os, mlxlm; print(mlxlm.runtime.small_command_graphs(), os.environ.get('MLX_MAX_MB_PER_BUFFER'))"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere command graphs are small anyway")
class TestSmallCommandGraphs:
    """What MLX is told before it does anything on a GPU."""

    def test_they_are_asked_for_in_time(self):
        assert python(GRAPHS, MLX_MAX_MB_PER_BUFFER="") == "True 50"
        assert python(f"import mlx.core; {GRAPHS}", MLX_MAX_MB_PER_BUFFER="") == "True 50"

    def test_what_the_user_has_set_stays(self):
        assert python(GRAPHS, MLX_MAX_MB_PER_BUFFER="200") == "True 200"

    def test_after_the_first_operation_it_is_too_late(self):
        code = f"import mlx.core as mx; mx.eval(mx.zeros(9)); {GRAPHS}"
        assert python(f"import os; os.environ.pop('MLX_MAX_MB_PER_BUFFER', 0); {code}") == "False None"


def test_macos_needs_no_small_command_graphs(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delenv("MLX_MAX_MB_PER_BUFFER", raising=False)
    assert runtime.small_command_graphs()
    assert "MLX_MAX_MB_PER_BUFFER" not in os.environ


@pytest.mark.parametrize(
    ("program", "wanted"),
    [("-m", True), ("/usr/bin/mlxlm", True), ("C:\\bin\\mlxlm.exe", True), ("mlxlm.py", False), ("", False)],
)
def test_only_the_command_says_of_ctrl_c_in_one_line(program, wanted):
    assert interruption.is_command(program) == wanted


@pytest.mark.parametrize(("name", "lines"), [("mlxlm", 1), ("other.py", 4)])
def test_ctrl_c_while_the_package_is_imported(tmp_path, name, lines):
    (tmp_path / name).write_text("import mlxlm\nraise KeyboardInterrupt\n")
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(mlxlm.__file__))}
    result = subprocess.run(
        [sys.executable, tmp_path / name], capture_output=True, text=True, timeout=60, env=environment
    )
    assert result.returncode in (130, -signal.SIGINT)
    assert len(result.stderr.splitlines()) == lines, result.stderr
    assert ("interrupted" in result.stderr) == (name == "mlxlm")
