"""Data: text sources, tokenised stores on disk, and readers that give batches and whose position can be saved.

train, valid = prepare(["books/*.txt"], tokenizer, "cache", valid_fraction=0.01)
reader = TokenReader(train, objective, batch_size=16, max_length=512, epochs=3)
while (batch := reader.next()) is not None: ...

Supervised rows (chats, completions, labels ...) become examples with marks on what is to be learned:

rows = read_splits("folder")["train"]
examples, report = encode_rows(rows, tokenizer, Encoding(max_length=1024))
source = SupervisedSource(examples, batch_size=8, max_length=1024, epochs=3)
"""

from mlxlm.data.batch import IGNORE, Batch, BatchSource, RowObjective
from mlxlm.data.building import build_store, prepare
from mlxlm.data.jsonl import read_jsonl
from mlxlm.data.mixture import Mixture
from mlxlm.data.reader import TokenReader
from mlxlm.data.share import ColumnShare, RowShare, share_rows
from mlxlm.data.sources import Source, read_documents
from mlxlm.data.store import TokenStore
from mlxlm.data.supervised import TRUNCATIONS, Encoding, Example, Report, encode_rows, label_names
from mlxlm.data.supervised_batches import SupervisedSource, pack_examples, pad_examples
from mlxlm.data.supervised_chat import LOSS_ON, Scored, encode_chat_turns, encode_pieces, with_end
from mlxlm.data.supervised_rows import (
    FORMATS,
    SPLITS,
    Rows,
    check_rows,
    find_splits,
    read_rows,
    read_split,
    read_splits,
    renaming,
)

__all__ = [
    "FORMATS",
    "IGNORE",
    "LOSS_ON",
    "SPLITS",
    "TRUNCATIONS",
    "Batch",
    "BatchSource",
    "ColumnShare",
    "Encoding",
    "Example",
    "Mixture",
    "Report",
    "RowObjective",
    "RowShare",
    "Rows",
    "Scored",
    "Source",
    "SupervisedSource",
    "TokenReader",
    "TokenStore",
    "build_store",
    "check_rows",
    "encode_chat_turns",
    "encode_pieces",
    "encode_rows",
    "find_splits",
    "label_names",
    "pack_examples",
    "pad_examples",
    "prepare",
    "read_documents",
    "read_jsonl",
    "read_rows",
    "read_split",
    "read_splits",
    "renaming",
    "share_rows",
    "with_end",
]
