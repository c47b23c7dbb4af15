"""Small made-up documents, their tokenizer, shards of them, and reading shards back without the code under test."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from falcon_relu.files import write_texts
from falcon_relu.tokenizer import Tokenizer, train_bpe
from train.data.prepare import PrepareConfig, prepare

WORDS = ["falcon", "stoops", "kestrel", "鷹", "hovers", "merlin", "naïve", "hobby", "gyr", "über", "plumage", "talon"]


def make_documents(count: int, seed: int = 0, words: int = 60) -> list[str]:
    draw = random.Random(seed)
    return [f"{seed}-{i}: " + " ".join(draw.choices(WORDS, k=draw.randint(1, words))) for i in range(count)]


def make_tokenizer(path: Path) -> Tokenizer:
    return train_bpe(make_documents(40), 400, path)


def prepare_texts(out: Path, texts: Iterable[str], tokenizer: Path, **fields: Any) -> Path:
    """Token shards of texts, made in this process."""
    source = out.with_suffix(".jsonl")
    write_texts(source, texts)
    prepare(PrepareConfig(inputs=(str(source),), tokenizer=tokenizer, out=out, **({"processes": 1} | fields)))
    return out


def read_rows(path: Path, seq_len: int, dtype: str = "<u2") -> list[tuple[np.ndarray, np.ndarray]]:
    """(token ids [T], run lengths) of each record, by the documented layout."""
    reader = ArrayRecordReader(str(path))
    records = reader.read_all()
    reader.close()
    size = np.dtype(dtype).itemsize * seq_len
    return [(np.frombuffer(r[:size], dtype), np.frombuffer(r[size:], "<u4")) for r in records]


def read_documents(folder: Path, split: str, seq_len: int, tokenizer: Tokenizer) -> list[str]:
    """The documents of a split, put together again from its shards."""
    documents = []
    for path in sorted(folder.glob(f"{split}-*.array_record")):
        rows = read_rows(path, seq_len)
        ids = np.concatenate([tokens[: runs.sum()] for tokens, runs in rows])
        ends = np.flatnonzero(ids == tokenizer.eos_id)
        assert ends[-1] == len(ids) - 1
        documents += [tokenizer.decode(piece[:-1]) for piece in np.split(ids, ends + 1)[:-1]]
    return documents
