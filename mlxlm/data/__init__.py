"""Reading data."""

from mlxlm.data.jsonl import read_jsonl

__all__ = ["read_jsonl"]
