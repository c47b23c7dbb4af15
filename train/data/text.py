"""Input text: JSON lines, plain text, Parquet and Hugging Face datasets as one sequence of numbered records."""

from __future__ import annotations

import codecs
import glob
import gzip
import importlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple

from falcon_relu.errors import FalconError, check_number
from falcon_relu.files import regular_file

HUB_PREFIX = "hf:"
_KINDS = (".jsonl", ".txt", ".parquet")
_COMPRESSED = (".gz", ".zst")
_RECORD_LIMIT = 256 << 20  # maximum size of a document in bytes
_PARQUET_ROWS = 256  # read at a time
ZST_WINDOW_LIMIT = 2048  # MiB: the longest window that zstd writes, with --long=31


class Record(NamedTuple):
    """One line or row of an input, not parsed yet.

    Attributes:
      source: the file or dataset that it is from.
      number: number of the line or row, from 1.
      data: a JSON object, or the text itself in UTF-8.
      is_json: whether `data` is a JSON object.
    """

    source: str
    number: int
    data: bytes
    is_json: bool


class TextReader:
    """All records of some inputs, always in the same order.

    Attributes:
      sources: the files (folders and globs expanded, sorted) and datasets.
      total_bytes: size of the files on disk; None where a dataset's size is not known.
      position: number of those bytes read so far.
    """

    def __init__(self, inputs: Sequence[str], text_field: str, zst_window_mb: int = ZST_WINDOW_LIMIT):
        """Finds the input files, without reading them.

        Args:
          inputs: files, folders, globs; `hf:NAME[:CONFIG[:SPLIT]]` for a Hugging Face dataset. Files are `.jsonl` (one
            JSON object a line), `.txt` (one document a file) or `.parquet`; the first two also `.gz` or `.zst`.
          text_field: the JSON key or column that holds the text.
          zst_window_mb: maximum window of a `.zst` file, in MiB of memory. Files compressed with `zstd --long=31` need
            2,048.

        Raises:
          FalconError: an input is missing, of an unknown kind, or no regular file.
        """
        check_number("zst_window_mb", zst_window_mb, low=1, high=ZST_WINDOW_LIMIT)
        self.sources = [source for given in inputs for source in _expand(given)]
        self.total_bytes = (
            None
            if any(source.startswith(HUB_PREFIX) for source in self.sources)
            else sum(Path(source).stat().st_size for source in self.sources)
        )
        self.position = 0
        self._field = text_field
        self._zst_window_mb = zst_window_mb

    def __iter__(self) -> Iterator[Record]:
        self.position = 0
        for source in self.sources:
            start = self.position
            if source.startswith(HUB_PREFIX):
                yield from _read_hub(source, self._field)
            elif source.endswith(".parquet"):
                yield from _read_parquet(source, self._field)
            else:
                with regular_file(Path(source)).open("rb") as raw:
                    for record in _read_lines(source, raw, self._zst_window_mb):
                        self.position = start + raw.tell()
                        yield record
            if not source.startswith(HUB_PREFIX):
                self.position = start + Path(source).stat().st_size


def text_of(record: Record, text_field: str) -> str:
    """The text of a record.

    Raises:
      ValueError: the record has no usable text; the message gives the reason.
    """
    if record.is_json:
        try:
            value = json.loads(record.data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON: {error}") from None
        if not isinstance(value, dict) or not isinstance(value.get(text_field), str):
            raise ValueError(f"no text under {text_field!r}")
        text = value[text_field]
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("a lone surrogate, which UTF-8 cannot hold") from None
    else:
        try:
            text = record.data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: {error}") from None
    if not text.strip():
        raise ValueError("empty")
    return text


def _expand(given: str) -> list[str]:
    if given.startswith(HUB_PREFIX):
        return [given]
    if given and os.path.isdir(given):  # noqa: PTH112  Path.is_dir raises where a folder may not be entered
        found = _files_below(given)
    elif os.path.lexists(given):
        found = [given]
    else:
        found = sorted(glob.glob(given, recursive=True))  # noqa: PTH207  Path.glob takes no absolute pattern
    if not found:
        raise FalconError(f"no file at {given!r}")
    for path in found:
        if _suffix(path) not in _KINDS:
            raise FalconError(
                f"{path} is none of {', '.join(_KINDS)} (the first two also {' or '.join(_COMPRESSED)}); name the "
                "files that you want with a glob, such as 'folder/*.jsonl'"
            )
        regular_file(Path(path))
    return found


def _files_below(folder: str) -> list[str]:
    """All files but hidden ones, below linked folders too; each folder is visited once, so that loops end."""

    def refuse(error: OSError) -> None:
        raise FalconError(f"{error.filename} cannot be read: {error.strerror}")

    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for here, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        about = Path(here).stat()
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        found += [str(Path(here) / name) for name in files if name[0] != "."]
    return sorted(found)


def _suffix(path: str) -> str:
    unpacked = Path(path).with_suffix("") if Path(path).suffix in _COMPRESSED else Path(path)
    return unpacked.suffix


def _read_lines(source: str, raw: IO[bytes], zst_window_mb: int) -> Iterator[Record]:
    try:
        stream = _unpack(source, raw, zst_window_mb)
        if _suffix(source) == ".txt":
            text = stream.read(_RECORD_LIMIT + 1).removeprefix(codecs.BOM_UTF8)
            yield Record(source, 1, _limited(text, source, 1), False)
            return
        number = 0
        while line := stream.readline(_RECORD_LIMIT + 1):
            number += 1
            yield Record(source, number, _limited(line, source, number), True)
    except (OSError, EOFError, zlib.error) as error:
        raise FalconError(f"cannot read {source} to its end; it may be cut short or damaged: {error}") from None


def _limited(data: bytes, source: str, number: int) -> bytes:
    if len(data) > _RECORD_LIMIT:
        raise FalconError(f"{source}:{number} is longer than {_RECORD_LIMIT >> 20} MiB: cut it into documents first")
    return data


def _unpack(source: str, raw: IO[bytes], zst_window_mb: int) -> io.BufferedIOBase:
    if source.endswith(_COMPRESSED) and not os.fstat(raw.fileno()).st_size:
        raise EOFError("it is empty")
    if source.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if source.endswith(".zst"):
        return io.BufferedReader(_ZstFile(source, raw, zst_window_mb), 1 << 20)
    return io.BufferedReader(raw, 1 << 20)  # type: ignore[type-var]


class _ZstFile(io.RawIOBase):
    """The decompressed bytes of a .zst file, which may have several frames.

    A truncated file raises EOFError; the stream reader of the zstandard package does not detect it.
    """

    def __init__(self, source: str, raw: IO[bytes], window_mb: int):
        self._source, self._raw, self._window_mb = source, raw, window_mb
        self._zstandard = _extra("zstandard", source)
        self._frame: Any = None
        self._packed = self._unpacked = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._unpacked and self._advance():
            pass
        taken = self._unpacked[: len(buffer)]
        self._unpacked = self._unpacked[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)

    def _advance(self) -> bool:
        self._packed = self._packed or self._raw.read(1 << 14)
        if not self._packed:
            if self._frame is not None:
                raise EOFError("the last frame has no end")
            return False
        if self._frame is None:
            unpacker = self._zstandard.ZstdDecompressor(max_window_size=self._window_mb << 20)
            self._frame = unpacker.decompressobj()
        try:
            self._unpacked = self._frame.decompress(self._packed)
        except MemoryError:
            raise OSError("there is not enough memory for its window") from None
        except self._zstandard.ZstdError as error:
            if "memory" not in str(error):  # which errors about the window contain
                raise OSError(str(error)) from None
            raise FalconError(
                f"{self._source} was compressed with a window larger than the {self._window_mb} MiB of memory "
                f"allowed for it or than what is free: raise --zst-window-mb, to {ZST_WINDOW_LIMIT} at most, or free "
                "memory"
            ) from None
        self._packed = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None
        return True


def _read_parquet(source: str, text_field: str) -> Iterator[Record]:
    pyarrow = _extra("pyarrow", source)
    parquet = _extra("pyarrow.parquet", source)
    try:
        with parquet.ParquetFile(regular_file(Path(source)), page_checksum_verification=True) as file:
            if text_field not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise FalconError(f"{source} has no column {text_field!r}; it has: {names}")
            kind = file.schema_arrow.field(text_field).type
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field]):
                try:  # as bytes: a value that is not UTF-8 must not make the whole batch fail
                    values = batch.column(0).cast(pyarrow.large_binary()).to_pylist()
                except pyarrow.ArrowNotImplementedError:
                    raise FalconError(f"{source}: the column {text_field!r} holds {kind}, not text") from None
                for data in values:
                    number += 1
                    yield Record(source, number, _limited(data or b"", source, number), False)
            if number != file.metadata.num_rows:
                raise FalconError(f"{source} has {number} rows and not the {file.metadata.num_rows} of its metadata")
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise FalconError(f"cannot read {source}: {_one_line(error)}") from None


def _read_hub(source: str, text_field: str) -> Iterator[Record]:
    datasets = _extra("datasets", source)
    name, config, split = [*source.removeprefix(HUB_PREFIX).split(":"), "", ""][:3]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            if text_field not in row:
                raise FalconError(f"{source} has no column {text_field!r}; it has: {', '.join(row)}")
            text = row[text_field]
            if text is not None and not isinstance(text, str):
                raise FalconError(f"{source}:{number} holds {type(text).__name__}, not text")
            yield Record(source, number, (text or "").encode("utf-8", "surrogatepass"), False)
    except FalconError:
        raise
    except Exception as error:  # the loaders pass on exceptions of many libraries
        raise FalconError(f"cannot read the dataset {source} (is this machine offline?): {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _extra(module: str, source: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise FalconError(f"{source} needs the package {package}: pip install 'falcon-relu[data]'") from None
