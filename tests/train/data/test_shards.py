"""The record format: nothing lost in packing, nothing unchecked in reading."""

import resource

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_relu.errors import FalconError
from train.data.shards import decode_row, encode_row, pack, token_dtype, write_shard


@given(st.lists(st.integers(1, 40), max_size=20), st.integers(2, 17), st.sampled_from([500, 65_536, 65_537]))
def test_packing_keeps_every_token_and_every_boundary(lengths, seq_len, vocab_size):
    draw = np.random.default_rng(sum(lengths))
    documents = [draw.integers(0, vocab_size, n).astype(token_dtype(vocab_size)) for n in lengths]
    records = [encode_row(*row) for row in pack(documents, seq_len)]
    rows = [decode_row(record, seq_len, vocab_size) for record in records]

    assert [int(runs.sum()) for _, runs in rows[:-1]] == [seq_len] * (len(rows) - 1)  # only the last is padded
    kept = [tokens[: runs.sum()] for tokens, runs in rows]
    np.testing.assert_array_equal(np.concatenate([*kept, []]), np.concatenate([*documents, []]))
    assert not any(tokens[runs.sum() :].any() for tokens, runs in rows)
    # The run ends are the document ends and the row ends.
    ends = {r * seq_len + int(end) for r, (_, runs) in enumerate(rows) for end in np.cumsum(runs)}
    row_ends = {r * seq_len for r in range(1, len(rows))}
    assert ends == set(np.cumsum(lengths, dtype=int).tolist()) | row_ends


def test_damaged_records_are_refused():
    good = encode_row(np.arange(8, dtype="<u2"), np.array([3, 5]))
    assert decode_row(good, 8, 8)[1].tolist() == [3, 5]
    for record, vocab_size, message in (
        (good[:15], 8, "no row of 8"),
        (good + b"\0", 8, "no row of 8"),
        (good + b"\0" * 4, 8, "do not fit"),
        (good[:-8] + np.array([3, 6], "<u4").tobytes(), 8, "do not fit"),
        (good, 7, "token id 7, beyond the vocabulary of 7"),
    ):
        with pytest.raises(FalconError, match=message):
            decode_row(record, 8, vocab_size)


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path):
    rows = [(np.random.default_rng(i).integers(0, 1 << 16, 2048).astype("<u2"), np.array([2048])) for i in range(200)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # writing on fails as on a full disk
    try:
        with pytest.raises(FalconError, match=r"could not write .*train\.array_record"):
            write_shard(tmp_path / "train.array_record", rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    assert write_shard(tmp_path / "train.array_record", rows).rows == 200
