"""Damaged and hostile inputs of all readers of text: the right documents and counts, or one line that names the file.

Each row of a table is an input. What is expected is either the documents and how many lines are counted as bad, or
words of the error. Seeded damage may also have no effect; what it may never do is change a document in silence.
"""

import gzip
import io
import json
import os
import random
import socket

import pytest

from falcon_relu.cli import main
from falcon_relu.errors import FalconError
from falcon_relu.tokenizer import Tokenizer
from tests.train.data.texts import make_documents, make_tokenizer, prepare_texts, read_documents
from train.data.batches import DataConfig, Source, validation_batches
from train.data.shards import read_manifest
from train.data.text import TextReader, text_of

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

DOCUMENTS = make_documents(40)
A = b'{"text": "a"}\n'
BOM = "\ufeff".encode()


def read(*inputs, field="text", **options):
    """(documents, number of bad lines)."""
    documents, bad = [], 0
    for record in TextReader([str(i) for i in inputs], field, **options):
        try:
            documents.append(text_of(record, field))
        except ValueError:
            bad += 1
    return documents, bad


def refused(words, *inputs, **options):
    with pytest.raises(FalconError, match=words) as error:
        read(*inputs, **options)
    assert "\n" not in str(error.value)


def error_or_equal(call, expected, where):
    """Whether a call raises an error of one line that names a file; else it must give what is expected."""
    try:
        found = call()
    except FalconError as error:
        message = str(error)
    else:
        assert found == expected
        return False
    assert str(where) in message
    assert "\n" not in message
    return True


def packed(data, window_log=20):
    """A .zst frame that does not say how long it is, as those packed from a pipe."""
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, write_checksum=True)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return frame.compress(data) + frame.flush()


def table(column, **options):
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": column}), file, write_page_checksum=True, **options)
    return file.getvalue()


def strings(*values):
    """A column of strings that are not all UTF-8."""
    raw = pyarrow.array(values, pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers(), raw.null_count)


def gz(data):
    return gzip.compress(data, mtime=0)  # the same bytes at any time


LONG = b"x" * (1 << 20)
FILES = [  # name, content, documents and bad lines or words of the error
    # JSON lines
    ("a.jsonl", b"", ([], 0)),
    ("a.jsonl", A, (["a"], 0)),
    ("a.jsonl", A[:-1], (["a"], 0)),
    ("a.jsonl", A + A[:7], (["a"], 1)),
    ("a.jsonl", A[5:] + A, (["a"], 1)),
    ("a.jsonl", A.replace(b"\n", b"\r\n") * 2, (["a", "a"], 0)),
    ("a.jsonl", BOM + A, (["a"], 0)),
    ("a.jsonl", BOM + A + BOM + A, (["a", "a"], 0)),
    ("a.jsonl", b"\n\n" + A + b"\n", (["a"], 3)),
    ("a.jsonl", b"\0" * 100 + b"\n" + A, (["a"], 1)),
    ("a.jsonl", '{"text": "é"}\n'.encode("latin-1") + A, (["a"], 1)),
    ("a.jsonl", A.decode().encode("utf-16"), ([], 2)),
    ("a.jsonl", '{"text": "a\u2028b\x85c"}\n'.encode(), (["a\u2028b\x85c"], 0)),
    ("a.jsonl", b'{"text": "\\u0000b"}\n', (["\0b"], 0)),
    ("a.jsonl", b'{"text": "\\ud83e\\udd85"}\n', (["🦅"], 0)),
    ("a.jsonl", b'{"text": "\\ud83e"}\n{"text": "\xed\xa0\x80"}\n' + A, (["a"], 2)),
    (
        "a.jsonl",
        b'{"text": null}\n{"text": ["a"]}\n{"text": {"a": 1}}\n{"text": 1e999}\n{"text": NaN}\n' + A,
        (["a"], 5),
    ),
    ("a.jsonl", b'[]\n"text"\n3\nnull\n' + A, (["a"], 4)),
    ("a.jsonl", b'{"text": "a", "text": "b"}\n', (["b"], 0)),
    ("a.jsonl", b'{"Text": "a"}\n{"text ": "a"}\n' + A, (["a"], 2)),
    ("a.jsonl", b'{"n": ' + b"9" * 10_000 + b', "text": "a"}\n' + A, (["a"], 1)),
    ("a.jsonl", b"[" * 200_000 + b"\n" + b'{"text":' * 100_000 + b"\n" + A, (["a"], 2)),
    ("a.jsonl", b'{"text": "  "}\n{"text": "\\u00a0\\u2003"}\n{"text": ""}\n', ([], 3)),
    ("a.jsonl", b"\xff" * 5000, ([], 1)),
    ("a.jsonl", b'{"text": "' + LONG + b'"}\n', ([LONG.decode()], 0)),
    # plain text
    ("a.txt", b"", ([], 1)),
    ("a.txt", BOM, ([], 1)),
    ("a.txt", BOM + b"a\r\n\r\nb\n", (["a\r\n\r\nb\n"], 0)),
    ("a.txt", b"a" + BOM, (["a\ufeff"], 0)),
    ("a.txt", "é".encode("latin-1"), ([], 1)),
    ("a.txt", "text".encode("utf-16"), ([], 1)),
    ("a.txt", b"\xf0\x9f\xa6", ([], 1)),
    ("a.txt", b"a\0b", (["a\0b"], 0)),
    ("a.txt.gz", gz(BOM + b"a"), (["a"], 0)),
    # packed
    ("a.jsonl.gz", b"", "empty"),
    ("a.jsonl.zst", b"", "empty"),
    ("a.txt.gz", b"", "empty"),
    ("a.jsonl.gz", A, "cut short or damaged"),
    ("a.jsonl.zst", A, "cut short or damaged"),
    ("a.jsonl.zst", gz(A), "cut short or damaged"),
    ("a.jsonl.gz", packed(A), "cut short or damaged"),
    ("a.jsonl.gz", gz(A) + b"junk", "cut short or damaged"),
    ("a.jsonl.zst", packed(A) + b"junk", "cut short or damaged"),
    ("a.jsonl.gz", gz(A) + b"\0" * 512, (["a"], 0)),
    ("a.jsonl.gz", gz(gz(A)), ([], 1)),
    ("a.jsonl.zst", packed(A) + packed(A), (["a", "a"], 0)),
    ("a.jsonl.zst", b"\x50\x2a\x4d\x18\x03\0\0\0abc" + packed(A), (["a"], 0)),  # a frame that is to be skipped
    ("a.jsonl.zst", packed(A, window_log=28), (["a"], 0)),
    ("a.jsonl.zst", packed(A, window_log=31), (["a"], 0)),
    ("a.jsonl.gz", gz(LONG * 257), "longer than 256 MiB"),
    ("a.txt.gz", gz(LONG * 257), "longer than 256 MiB"),
    ("a.jsonl.gz", gz(b"\n" * 9_000), ([], 9_000)),
    # Parquet
    ("a.parquet", b"", "cannot read"),
    ("a.parquet", A, "cannot read"),
    ("a.parquet", b"PAR1" * 4, "cannot read"),
    ("a.jsonl", b"PAR1\x15\x04\x15", ([], 1)),
    ("a.parquet", table(strings(b"a", b"\xff\xfe", None, "é".encode())), (["a", "é"], 2)),
    ("a.parquet", table(strings(b"\xff", *[b"a"] * 600)), (["a"] * 600, 1)),
    ("a.parquet", table(strings(b"a", b"\xed\xa0\x80").dictionary_encode()), (["a"], 1)),
    ("a.parquet", table(pyarrow.array(["a", None, " "], pyarrow.large_string())), (["a"], 2)),
    ("a.parquet", table(pyarrow.array([b"a", b"\xff"], pyarrow.binary())), (["a"], 1)),
    ("a.parquet", table(pyarrow.nulls(3)), ([], 3)),
    ("a.parquet", table(pyarrow.array([], pyarrow.string())), ([], 0)),
    ("a.parquet", table([1, 2]), "holds int64, not text"),
    ("a.parquet", table([["a"]]), "holds list.* not text"),
    ("a.parquet", table([{"text": "a"}]), "holds struct.* not text"),
    ("a.parquet", table(["a"], compression="gzip"), (["a"], 0)),
    # names
    ("a.json", A, "none of .jsonl"),
    ("a.jsonl.bz2", A, "none of .jsonl"),
    ("a", A, "none of .jsonl"),
    ("[red]b[.jsonl", A, (["a"], 0)),
    ("a*?[!b].jsonl", A, (["a"], 0)),
    ("new\nline.txt", b"a", (["a"], 0)),
    ("\udcff.jsonl", A, (["a"], 0)),  # a name that is not UTF-8
]


@pytest.mark.parametrize(("name", "content", "expected"), FILES, ids=[f"{i}-{f[0]!a}" for i, f in enumerate(FILES)])
def test_files(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    if isinstance(expected, str):
        refused(expected, path)
    else:
        assert read(path) == expected
        assert read(tmp_path) == expected


def test_a_zst_window_beyond_the_limit_names_the_option(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(packed(A, window_log=28))
    refused(r"a\.jsonl\.zst .* larger than the 255 MiB .* --zst-window-mb", path, zst_window_mb=255)
    assert read(path, zst_window_mb=256) == (["a"], 0)
    for wrong in (0, 2049):
        refused("zst_window_mb must be", path, zst_window_mb=wrong)


def test_what_is_no_regular_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    (tmp_path / "folder.jsonl").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.txt"))
        for name, words in (
            ("pipe.jsonl", "device or pipe"),
            ("zero.txt", "device or pipe"),
            ("s.txt", "device or pipe"),
            ("loop.jsonl", "cannot be read"),
            ("gone.jsonl", "link to nothing"),
        ):
            for given in (tmp_path / name, tmp_path / f"{name[:3]}*"):
                refused(rf"{name} .*{words}", given)
            folder = tmp_path / f"with {name}"
            folder.mkdir()
            (folder / "a.jsonl").write_bytes(A)
            (tmp_path / name).rename(folder / name)
            refused(rf"{name} .*{words}", folder)
    refused(r"folder\.jsonl is a folder", tmp_path / "*.jsonl")
    for given in ("", tmp_path / "none", tmp_path / "folder.jsonl", tmp_path / "*.parquet", "\0"):
        refused("no file at", given)


def test_linked_folders_are_followed_once_and_hidden_ones_left_out(tmp_path):
    for folder in ("text/deep", "elsewhere", "text/.cache"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("text/a", "text/deep/b", "elsewhere/c", "text/.cache/d", "text/.e"):
        (tmp_path / f"{name}.txt").write_text(name[-1])
    (tmp_path / "text" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "text" / "link2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "text" / "deep" / "up").symlink_to(tmp_path / "text")
    (tmp_path / "elsewhere" / "itself").symlink_to(".")
    (tmp_path / "text" / "f.txt").symlink_to(tmp_path / "elsewhere" / "c.txt")
    assert read(tmp_path / "text") == (["a", "b", "c", "c"], 0)


WHOLE = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_damage_is_never_taken_for_text_or_for_the_end(tmp_path, name):
    pack = {"gz": gz, "zst": packed, "parquet": lambda _: table(DOCUMENTS, row_group_size=15)}
    data = pack[name.rpartition(".")[2]](WHOLE)
    draw, errors = random.Random(0), 0
    for _ in range(60):
        damaged = damage(data, draw)
        (tmp_path / name).write_bytes(damaged)
        errors += error_or_equal(lambda: read(tmp_path / name), (DOCUMENTS, 0), name)
    assert errors > 30


def damage(data, draw):
    """`data` with a bit turned, some bytes gone, or cut short; often near its end, where formats keep tables."""
    damaged = bytearray(data)
    place = draw.randrange(len(data)) if draw.random() < 0.5 else draw.randrange(max(len(data) - 700, 0), len(data))
    kind = draw.randrange(3)
    if kind == 0:
        damaged[place] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del damaged[place : place + draw.randrange(1, 40)]
    else:
        del damaged[place:]
    return bytes(damaged)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    tokenizer = make_tokenizer(folder / "tokenizer.json")
    prepare_texts(folder / "tokens", DOCUMENTS, tokenizer.path, seq_len=32, validation_fraction=0.5)
    return folder


def test_damaged_tokenizers_are_named_or_work(prepared, tmp_path):
    """A change within a token's text gives another tokenizer, known by its hash; no other error may come of any."""
    data, draw, errors = (prepared / "tokenizer.json").read_bytes(), random.Random(0), 0
    path = tmp_path / "tokenizer.json"

    def use():
        tokenizer = Tokenizer(path)
        tokenizer.decode(tokenizer.encode("a falcon 鷹 stoops"))

    for _ in range(60):
        path.write_bytes(damage(data[:1500], draw) + data[1500:])
        errors += error_or_equal(use, None, path)
    assert errors > 30


def test_damaged_shards_and_manifests_are_named_or_read_right(prepared):
    tokens = prepared / "tokens"
    config = DataConfig(sources=(Source(tokens),), seq_len=32, batch_size=4, threads=1, prefetch=1)

    def rows():
        return [batch["tokens_BxT"].tolist() for batch in validation_batches(config)]

    whole, draw, errors = rows(), random.Random(0), 0
    shard = next(tokens.glob("validation-*"))
    for path, changes in ((shard, 25), (tokens / "manifest.json", 40)):
        data = path.read_bytes()
        for _ in range(changes):
            path.write_bytes(damage(data[:2000], draw) + data[2000:])
            errors += error_or_equal(rows, whole, tokens)
        path.write_bytes(data)
    assert errors > 40
    assert rows() == whole


def test_prepare_counts_what_it_cannot_use_and_lists_the_first(prepared, tmp_path, capsys):
    """Also where that is every line, as under a wrong --text-field: a hundred of them stand in the manifest."""
    (tmp_path / "a.parquet").write_bytes(table(strings(b"good", b"\xff", b"also good")))
    (tmp_path / "b.jsonl").write_bytes(b'{"body": "a"}\n' * 500)
    asked = ["--tokenizer", str(prepared), "--out", str(tmp_path / "out"), "--processes", "1"]
    asked += ["--validation-fraction", "0", "--json", str(tmp_path / "figures.json")]
    assert main(["prepare", str(tmp_path), *asked]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert json.loads((tmp_path / "figures.json").read_text())["bad lines"] == manifest.bad_lines == 501
    assert len(manifest.bad_examples) == 100
    assert manifest.bad_examples[0].startswith(f"{tmp_path / 'a.parquet'}:2: not UTF-8")
    tokenizer = Tokenizer(prepared)
    assert read_documents(tmp_path / "out", "train", 2048, tokenizer) == ["good", "also good"]
    for option in (
        "--seq-len=1000000000",
        "--seq-len=1",
        "--seed=-1",
        "--seed=1180591620717411303424",
        "--validation-fraction=nan",
        "--validation-fraction=1",
        "--unit-mb=0",
        "--unit-mb=nan",
        "--processes=-1",
        "--zst-window-mb=4096",
        "--shard=1/1",
    ):
        status = 1 if option == "--shard=1/1" else 2  # a field of its own is wrong usage, found while it is parsed
        assert main(["prepare", str(tmp_path / "a.parquet"), *asked, "--overwrite", option]) == status
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"falcon-relu prepare: {option[2:].partition('=')[0].replace('-', '_')}"), error
