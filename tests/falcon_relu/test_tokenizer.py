"""The tokenizer wrapper: against the library, on real text, and id by id."""

import json
import os

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from falcon_relu import corpora
from falcon_relu.errors import FalconError
from falcon_relu.tokenizer import Tokenizer, train_bpe

SAMPLE = ["Grüße, 世界! 🦅🦅 naïve café", "def f(x):\n    return x  # done\n", "The falcon stoops at 300 km/h.\n\n"]


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    return train_bpe(SAMPLE * 3, 300, tmp_path_factory.mktemp("bpe") / "tokenizer.json")


@pytest.fixture(scope="module")
def falcon():
    try:
        return Tokenizer(corpora.falcon_tokenizer())
    except FalconError as error:
        pytest.skip(f"the real Falcon tokenizer could not be fetched: {error}")


def test_the_real_tokenizer_on_real_text(falcon):
    library = tokenizers.Tokenizer.from_file(str(falcon.path))
    texts = list(corpora.documents("wikipedia-sample"))[:30]
    assert falcon.vocab_size == 65024
    assert falcon.eos_id == 11
    ids = falcon.encode_batch(texts)
    assert ids == [encoding.ids for encoding in library.encode_batch(texts)]
    assert ids[0] == falcon.encode(texts[0])
    assert [falcon.decode(row) for row in ids] == texts


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory):
    """As SentencePiece gives: 256 tokens of a byte each, ids 3 to 258, for what the vocabulary lacks."""
    singles = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<|endoftext|>", "<unk>", "▁", *singles, "a", "▁a", "鷹", "", "\ufffd"]
    engine = tokenizers.Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    engine.decoder = decoders.Sequence(parts)
    path = tmp_path_factory.mktemp("fallback") / "tokenizer.json"
    engine.save(str(path))
    return Tokenizer(path)


def _bytes_or_tokens(size):
    """Ids up to a little beyond a vocabulary, those of the bytes of one character often among them."""
    some = [3 + byte for byte in "鷹é\n".encode()]
    return st.lists(st.one_of(st.integers(0, size + 3), st.sampled_from([0, 2, 259, *some])), max_size=40)


@pytest.mark.parametrize("name", ["small", "byte_fallback"])
@given(data=st.data())
def test_streamed_text_is_the_decoded_text(name, request, data):
    tokenizer = request.getfixturevalue(name)
    ids = data.draw(_bytes_or_tokens(tokenizer.vocab_size))
    stream, told = tokenizer.stream(), ""
    whole = tokenizer.decode(ids)
    for i in ids:
        told += stream.push(i)
        assert whole.startswith(told)  # nothing given out is ever taken back
    assert told + stream.finish() == whole


def test_text_is_streamed_as_soon_as_it_is_certain(small, byte_fallback):
    for tokenizer, text in ((small, SAMPLE[0]), (byte_fallback, "a a\n鷹é a")):
        ids, stream = tokenizer.encode(text), tokenizer.stream()
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) == text
        assert sum(map(bool, pieces)) > 3


@given(st.text())
def test_round_trip_and_no_half_characters(small, text):
    ids = small.encode(text)
    assert small.decode(ids) == text
    if "\ufffd" not in text:
        stream = small.stream()
        assert "\ufffd" not in "".join(stream.push(i) for i in ids)


def test_training_is_deterministic_and_sized(tmp_path, small):
    again = train_bpe(iter(SAMPLE * 3), 300, tmp_path / "again.json")
    assert (again.sha256, again.eos_id, again.vocab_size) == (small.sha256, 0, 300)
    small.check_fits(300)
    with pytest.raises(FalconError, match="belongs to another model"):
        small.check_fits(299)
    with pytest.raises(FalconError, match="at least 257"):
        train_bpe(SAMPLE, 256, tmp_path / "tiny.json")


def test_a_folder_or_a_file_and_clear_errors(tmp_path, small):
    assert Tokenizer(small.path.parent).encode(SAMPLE[0]) == small.encode(SAMPLE[0])
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("none.json", "does not exist"), ("pipe", "device or pipe")):
        with pytest.raises(FalconError, match=reason):
            Tokenizer(tmp_path / name)
    (tmp_path / "odd.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(FalconError, match=r"odd\.json is not a tokenizer\.json"):
        Tokenizer(tmp_path / "odd.json")
    with pytest.raises(FalconError, match="has no token '</s>'"):
        Tokenizer(small.path, eos_token="</s>")


def test_truncation_and_padding_in_the_file_are_not_obeyed(tmp_path, small):
    engine = tokenizers.Tokenizer.from_file(str(small.path))
    engine.enable_truncation(2)
    engine.enable_padding(length=50)
    engine.save(str(tmp_path / "cut.json"))
    assert Tokenizer(tmp_path / "cut.json").encode_batch(SAMPLE) == small.encode_batch(SAMPLE)


def test_what_the_library_cannot_encode_is_one_line_that_names_the_file(tmp_path, small, capfd):
    """Its Rust code panics on the first, which is no Exception, and writes to stderr by itself."""
    vocabulary = {"a": 0, "b": 1, "<|endoftext|>": 2}
    slow = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    slow.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("(a+a+)+$"), "isolated")
    unknown = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    for name, engine, text, reason in (
        ("slow", slow, "a" * 200 + "b", "retry-limit"),
        ("unknown", unknown, "z", "UNK"),
    ):
        engine.save(str(tmp_path / f"{name}.json"))
        with pytest.raises(FalconError, match=rf"{name}\.json cannot encode a text: .*{reason}") as error:
            Tokenizer(tmp_path / f"{name}.json").encode(text)
        assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""
    with pytest.raises(FalconError, match="not UTF-8 text, from character 4"):
        small.encode("abc\udcff")
