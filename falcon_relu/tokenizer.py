"""Text to token ids and back, by any `tokenizer.json` of the `tokenizers` library."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, trainers

from falcon_relu.errors import FalconError, check_text
from falcon_relu.files import regular_file, write_aside

END_OF_TEXT = "<|endoftext|>"
_BYTE_ALPHABET = 256
_MOST_IDS = 1 << 31  # token ids are int32
_STDERR = threading.Lock()
_BYTE_TOKEN = re.compile(r"<0x..>", re.DOTALL)


class Tokenizer:
    """A `tokenizer.json` file, loaded.

    Encoding adds no token of its own at either end: Falcon has no beginning-of-text token.

    Attributes:
      path: the file.
      sha256: of the file, in hex; token shards are matched with tokenizers by it.
      vocab_size: the highest id plus one.
      eos_id: id of the token that ends a text.
    """

    def __init__(self, path: Path, *, eos_token: str = END_OF_TEXT):
        """Loads a tokenizer.

        Args:
          path: a `tokenizer.json`, or a folder with one.
          eos_token: the token that ends a text.

        Raises:
          FalconError: the file is missing or damaged, or `eos_token` is not in it.
        """
        self.path = tokenizer_file(path)
        raw = self.path.read_bytes()
        with _explained(f"{self.path} is not a tokenizer.json of the `tokenizers` library"):
            self._engine = Engine.from_buffer(raw)
            self._engine.no_truncation()
            self._engine.no_padding()
            ids = self._engine.get_vocab(with_added_tokens=True).values()
            eos_id = self._engine.token_to_id(eos_token)
        self.sha256 = hashlib.sha256(raw).hexdigest()
        self.vocab_size = max(ids, default=-1) + 1
        if self.vocab_size > _MOST_IDS:
            raise FalconError(f"{self.path} has a token of the id {self.vocab_size - 1}; ids are below {_MOST_IDS}")
        if eos_id is None:
            raise FalconError(f"{self.path} has no token {eos_token!r} to end a text with")
        self.eos_id: int = eos_id

    def check_fits(self, vocab_size: int) -> None:
        """Checks that a model with `vocab_size` embeddings has one for every id.

        Raises:
          FalconError: some ids have no embedding.
        """
        if self.vocab_size > vocab_size:
            raise FalconError(
                f"{self.path} has ids up to {self.vocab_size - 1}, but the model's vocabulary ends at "
                f"{vocab_size - 1}: this tokenizer belongs to another model"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`.

        Raises:
          FalconError: the text holds bytes from outside that are not UTF-8, or the library fails on it.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on as many threads as the library uses; errors as `encode`."""
        for text in texts:
            check_text("a text to encode", text)
        with _explained(f"the tokenizer {self.path} cannot encode a text"):
            # encode_batch_fast gives the same ids without computing offsets.
            return [encoding.ids for encoding in self._engine.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`, special tokens included unless `skip_special`; bytes not UTF-8 become U+FFFD."""
        with _explained(f"the tokenizer {self.path} cannot decode token ids"):
            return self._engine.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token(self, token_id: int) -> str | None:
        """The vocabulary's entry for an id; None if there is none, in which case `decode` skips the id."""
        return self._engine.id_to_token(token_id)

    def stream(self) -> TextStream:
        """A decoder for ids that arrive one after another."""
        return TextStream(self)


class TextStream:
    """Decodes ids one by one, returning text as soon as later ids cannot change it.

    A character whose bytes span several tokens is returned with the last one. The results of `push` and `finish`,
    joined, are `decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last ids whose text was returned, as context for decoding; then pending ids
        self._returned = ""  # text of the former
        self._n_returned = 0  # how many they are

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while later ids can still change it."""
        token = self._tokenizer.token(int(token_id))
        if token is None:
            return ""
        self._ids.append(int(token_id))
        if _is_byte(token):  # a run of byte tokens decodes to text or to one U+FFFD each, known only at its end
            return ""
        text = self._decode(self._ids)
        if text.endswith("\ufffd") or not text.startswith(self._returned):  # perhaps an unfinished character
            return ""
        piece = text[len(self._returned) :]
        latest = self._ids[self._n_returned :]
        alone = self._decode(latest)
        # Decoders treat the start of a text differently (they may drop its first space), so the context is never empty.
        self._ids, self._returned = (latest, alone) if alone else (self._ids, text)
        self._n_returned = len(self._ids)
        return piece

    def finish(self) -> str:
        """The text of the pending ids: an unfinished character becomes U+FFFD."""
        return self._tokenizer.decode(self._ids)[len(self._returned) :]

    def _decode(self, ids: list[int]) -> str:
        try:
            return self._tokenizer.decode(ids)
        except FalconError:  # some decoders fail on a part of a text that they can decode as a whole
            return ""


def tokenizer_file(path: Path) -> Path:
    """The `tokenizer.json` at a path: the file itself, or the one in a folder.

    Raises:
      FalconError: it does not exist or cannot be read.
    """
    path = Path(path)
    return regular_file(path / "tokenizer.json" if path.is_dir() else path)


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> Tokenizer:
    """Trains a byte-level BPE with `<|endoftext|>` as id 0 and writes it as a `tokenizer.json`.

    The same texts give the same file. From little text it may have fewer tokens than asked for.

    Args:
      texts: the training texts.
      vocab_size: number of tokens at most; at least 257 (every byte, and the end of text).
      path: the file to write; an existing one is replaced.

    Raises:
      FalconError: `vocab_size` is too small.
    """
    if vocab_size < _BYTE_ALPHABET + 1:
        raise FalconError(f"a byte-level vocabulary needs at least {_BYTE_ALPHABET + 1} tokens, got {vocab_size}")
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[tokenizers.AddedToken(END_OF_TEXT, special=True)],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    with write_aside(path, replace=True) as aside:
        engine.save(str(aside))
    return Tokenizer(path)


def _is_byte(token: str) -> bool:
    """Whether a token may stand for one byte, as in vocabularies with byte fallback."""
    return _BYTE_TOKEN.fullmatch(token) is not None


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns an error of the library into a one-line FalconError that starts with `what`.

    The library raises plain exceptions; a bug in its Rust code raises a PanicException, which is not an `Exception`.
    """
    try:
        with _without_panic_report():
            yield
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise FalconError(f"{what}: {reason}") from None


@contextlib.contextmanager
def _without_panic_report() -> Iterator[None]:
    """Suppresses what Rust prints on a panic to file descriptor 2, and nothing else that is printed meanwhile."""
    if not hasattr(os, "memfd_create"):
        yield
        return
    with _STDERR, contextlib.ExitStack() as undo:
        try:
            stderr = os.dup(2)
        except OSError:  # closed
            yield
            return
        undo.callback(os.close, stderr)
        held = os.memfd_create("stderr")
        undo.callback(os.close, held)
        os.dup2(held, 2)
        panic = False
        try:
            yield
        except BaseException as error:
            panic = _is_panic(error)
            raise
        finally:
            os.dup2(stderr, 2)
            if not panic and (size := os.lseek(held, 0, os.SEEK_CUR)):  # printed by other threads
                os.write(2, os.pread(held, size, 0))


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"
