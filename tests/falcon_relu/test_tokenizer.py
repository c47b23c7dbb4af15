"""The tokenizer wrapper: against the library, on real text, and id by id."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

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


@settings(deadline=None)
@given(st.lists(st.integers(0, 299), max_size=40))
def test_streamed_text_is_the_decoded_text(small, ids):
    stream, told = small.stream(), ""
    whole = small.decode(ids)
    for i in ids:
        told += stream.push(i)
        assert whole.startswith(told)  # nothing given out is ever taken back
    assert told + stream.finish() == whole


@settings(deadline=None)
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
    with pytest.raises(FalconError, match="cannot read"):
        Tokenizer(tmp_path / "none.json")
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
