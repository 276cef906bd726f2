"""Data: text sources, tokenised stores on disk, and readers that give batches and whose position can be saved.

train, valid = prepare(["books/*.txt"], tokenizer, "cache", valid_fraction=0.01)
reader = TokenReader(train, objective, batch_size=16, max_length=512, epochs=3)
while (batch := reader.next()) is not None: ...
"""

from mlxlm.data.batch import IGNORE, Batch, BatchSource, RowObjective
from mlxlm.data.building import build_store, prepare
from mlxlm.data.jsonl import read_jsonl
from mlxlm.data.mixture import Mixture
from mlxlm.data.reader import TokenReader
from mlxlm.data.sources import Source, read_documents
from mlxlm.data.store import TokenStore

__all__ = [
    "IGNORE",
    "Batch",
    "BatchSource",
    "Mixture",
    "RowObjective",
    "Source",
    "TokenReader",
    "TokenStore",
    "build_store",
    "prepare",
    "read_documents",
    "read_jsonl",
]
