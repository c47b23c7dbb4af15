"""Text to token ids and back, by any `tokenizer.json` of the `tokenizers` library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, trainers

from falcon_relu.errors import FalconError
from falcon_relu.files import write_aside

END_OF_TEXT = "<|endoftext|>"
_BYTE_ALPHABET = 256


class Tokenizer:
    """A `tokenizer.json` file, loaded.

    Encoding adds no token of its own at either end: Falcon has no beginning-of-text token.

    Attributes:
      path: the file.
      sha256: of the file, in hex; what shards and checkpoints are matched by.
      vocab_size: smallest vocabulary that holds every id.
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
        path = Path(path)
        self.path = path / "tokenizer.json" if path.is_dir() else path
        try:
            raw = self.path.read_bytes()
        except OSError as error:
            raise FalconError(f"cannot read the tokenizer {self.path}: {error.strerror}") from None
        try:
            self._engine = Engine.from_buffer(raw)
        except Exception as error:  # the library raises plain Exception and ValueError
            raise FalconError(f"{self.path} is not a tokenizer.json of the `tokenizers` library: {error}") from None
        self._engine.no_truncation()
        self._engine.no_padding()
        self.sha256 = hashlib.sha256(raw).hexdigest()
        self.vocab_size = max(self._engine.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        eos_id = self._engine.token_to_id(eos_token)
        if eos_id is None:
            raise FalconError(f"{self.path} has no token {eos_token!r} to end a text with")
        self.eos_id: int = eos_id

    def check_fits(self, vocab_size: int) -> None:
        """Makes sure that a model with `vocab_size` embeddings has one for every id.

        Raises:
          FalconError: it has not.
        """
        if self.vocab_size > vocab_size:
            raise FalconError(
                f"{self.path} has ids up to {self.vocab_size - 1}, but the model's vocabulary ends at "
                f"{vocab_size - 1}: this tokenizer belongs to another model"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return self._engine.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on as many threads as the library uses."""
        # The fast call gives the same ids and leaves out the offsets, which nothing here reads.
        return [encoding.ids for encoding in self._engine.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`, special tokens included unless told otherwise; bytes not UTF-8 become U+FFFD."""
        return self._engine.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def stream(self) -> TextStream:
        """A decoder for ids that arrive one after another."""
        return TextStream(self)


class TextStream:
    """Ids in, text out as soon as it is certain: a character whose bytes span several tokens comes with the last one.

    What `push` and `finish` return, joined, is `decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._stream = decoders.DecodeStream(skip_special_tokens=False)
        self._ids: list[int] = []
        self._told = 0  # characters given out

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty where it ends inside a character."""
        self._ids.append(int(token_id))
        text = self._stream.step(self._tokenizer._engine, int(token_id)) or ""
        self._told += len(text)
        return text

    def finish(self) -> str:
        """What was held back at the end: an unfinished character, as U+FFFD."""
        return self._tokenizer.decode(self._ids)[self._told :]


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> Tokenizer:
    """Trains a byte-level BPE with `<|endoftext|>` as id 0 and writes it as a `tokenizer.json`.

    The same texts give the same file. Small texts may give fewer tokens than asked for.

    Args:
      texts: what to learn from.
      vocab_size: most tokens, at least 257 (every byte, and the end of text).
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
