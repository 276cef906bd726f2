"""`python -m mlxlm` is the command `mlxlm`."""

from mlxlm.cli.main import run

if __name__ == "__main__":
    run()
