"""Reading text: every format gives the same documents, and damage is never taken for the end."""

import gzip
import json

import pytest

from falcon_relu.errors import FalconError
from tests.train.data.texts import make_documents
from train.data.text import Record, TextReader, text_of

DOCUMENTS = make_documents(30)
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()


def read(*inputs, field="text"):
    return [text_of(record, field) for record in TextReader([str(i) for i in inputs], field)]


def test_json_lines_plain_and_packed(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    frames = JSONL.index(b"\n", 900) + 1
    pack = zstandard.ZstdCompressor().compress
    files = {
        "a.jsonl": JSONL,
        "a.jsonl.gz": gzip.compress(JSONL[:frames]) + gzip.compress(JSONL[frames:]),
        "a.jsonl.zst": pack(JSONL[:frames]) + pack(JSONL[frames:]),
    }
    for name, data in files.items():
        path = tmp_path / name
        path.write_bytes(data)
        reader = TextReader([str(path)], "text")
        assert [text_of(record, "text") for record in reader] == DOCUMENTS, name
        assert reader.position == reader.total_bytes == len(data)
        if name != "a.jsonl":
            for damaged in (data[:-9], data[: len(data) // 2]):
                path.write_bytes(damaged)
                with pytest.raises(FalconError, match="may be cut short or damaged"):
                    read(path)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [*DOCUMENTS, None], "id": range(31)}), path)
    records = list(TextReader([str(path)], "text"))
    assert [text_of(record, "text") for record in records[:-1]] == DOCUMENTS
    with pytest.raises(ValueError, match="empty"):
        text_of(records[-1], "text")
    with pytest.raises(FalconError, match="no column 'content'; it has: text, id"):
        read(path, field="content")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(FalconError, match="cannot read"):
        read(path)


def test_a_hugging_face_dataset(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(JSONL)
    assert read(f"hf:{tmp_path / 'set'}") == DOCUMENTS
    with pytest.raises(FalconError, match="has no column 'content'"):
        read(f"hf:{tmp_path / 'set'}", field="content")
    with pytest.raises(FalconError, match=r"cannot read the dataset hf:.*none"):
        read(f"hf:{tmp_path / 'none'}")


def test_folders_globs_and_plain_text(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("second\n\ndocument")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("first 鷹".encode()))
    (tmp_path / ".hidden").touch()
    assert read(tmp_path) == read(tmp_path / "**" / "*.txt*") == ["first 鷹", "second\n\ndocument"]
    assert read(tmp_path / "deep" / "b.txt", tmp_path / "a.txt.gz") == ["second\n\ndocument", "first 鷹"]
    (tmp_path / "notes.md").touch()
    with pytest.raises(FalconError, match=r"notes\.md is none of \.jsonl, \.txt, \.parquet"):
        read(tmp_path)
    with pytest.raises(FalconError, match="no file at"):
        read(tmp_path / "*.parquet")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"\n", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "no text under 'text'"),
        (b'{"text": 3}', "no text under 'text'"),
        (b'{"txt": "a"}', "no text under 'text'"),
        (b'{"text": "\\ud83d"}', "lone surrogate"),
        (b'{"text": " \\n"}', "empty"),
    ],
)
def test_lines_that_hold_no_text(line, reason):
    with pytest.raises(ValueError, match=reason):
        text_of(Record("a.jsonl", 1, line, True), "text")
    with pytest.raises(ValueError, match="not UTF-8"):
        text_of(Record("a.txt", 1, b"\xff", False), "text")
