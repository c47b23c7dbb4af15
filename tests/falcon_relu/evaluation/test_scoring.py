"""Scores of planned rows against a forward pass for every request."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_relu.config import family
from falcon_relu.errors import FalconError
from falcon_relu.evaluation.scoring import Engine, FlaxEngine, Request, Row, Score, plan_rows
from falcon_relu.model import Falcon
from falcon_relu.sharding import make_mesh, param_shardings, use_mesh
from tests.conftest import random_params


def questions(seed: int, vocab: int, n: int = 6) -> list[Request]:
    """Choices behind contexts, some that follow the same examples, one far too long, one with hardly a context."""
    rng = np.random.default_rng(seed)
    words = lambda low, high: rng.integers(1, vocab, rng.integers(low, high)).tolist()  # noqa: E731
    examples = words(60, 61)
    found = [Request(words(1, 2), words(9, 10)), Request(words(400, 401), words(5, 6))]
    for i in range(n):
        question = (examples if i % 2 else words(30, 50)) + words(3, 20)
        for _ in range(3):
            found.append(Request(question, words(1, 6)))
        found.append(Request(question, [*found[-1].continuation, *words(1, 3)]))  # one that another begins with
        found += [Request(question, [token]) for token in (7, 8)]  # and two of one token
    return found


def one_by_one(model: Falcon, params, requests: list[Request]) -> list[tuple[float, bool]]:
    context = model.config.max_positions
    forward = jax.jit(lambda tokens_BxT: jax.nn.log_softmax(model.apply({"params": params}, tokens_BxT)))
    found = []
    for request in requests:
        ids = [*request.context, *request.continuation][-(context + 1) :]
        n, T = len(request.continuation), len(ids) - 1
        log_nxV = np.asarray(forward(np.array([ids[:-1] + [0] * (context - T)], np.int32))[0, T - n : T], np.float64)
        targets = np.array(ids[-n:])
        found.append((log_nxV[np.arange(n), targets].sum(), bool((log_nxV.argmax(-1) == targets).all())))
    return found


def score(engine: Engine, rows: list[Row]) -> dict[int, Score]:
    return {k: v for batch in engine.batches(rows) for k, v in engine.score(batch).items()}


def check(found: dict, requests: list[Request], model: Falcon, params) -> None:
    assert sorted(found) == list(range(len(requests)))
    for number, (logprob, greedy) in enumerate(one_by_one(model, params, requests)):
        assert found[number].logprob == pytest.approx(logprob, abs=2e-4)
        assert found[number].greedy == greedy


def test_rows_score_as_the_requests_do_alone(tiny_name):
    config = family(tiny_name)
    model, params = Falcon(config), random_params(config)
    requests = questions(0, config.vocab_size)
    likeliest = int(jax.jit(model.apply)({"params": params}, np.array([[5, 6]], np.int32))[0, -1].argmax())
    requests.append(Request([5, 6], [likeliest]))
    rows = plan_rows(requests, config.max_positions)
    assert sum(row.n_tokens for row in rows) < sum(len(r.context) for r in requests) / 2
    found = score(FlaxEngine(model, params), rows)
    check(found, requests, model, params)
    assert found[len(requests) - 1].greedy


def test_rows_score_alike_on_a_mesh():
    config = family("tiny-40b")
    model, params, mesh = Falcon(config), random_params(config), make_mesh((2, 2, 2))
    requests = questions(1, config.vocab_size, 2)
    with use_mesh(mesh):
        placed = jax.device_put(params, param_shardings(config, mesh))
    rows = plan_rows(requests, config.max_positions)
    found = score(FlaxEngine(model, placed, mesh), rows)
    check(found, requests, model, params)


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=40)


@settings(max_examples=200)
@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=20), st.integers(40, 70))
def test_plan_holds_every_request_once_whole_and_unscored_in_its_prefix(pairs, context):
    requests = [Request([1] * 30 + before, after) for before, after in pairs]
    rows = plan_rows(requests, context)
    seen = {}
    for row in rows:
        assert max(row.n_tokens, row.n_scored) <= context or len(row.branches) == 1
        for branch in row.branches:
            for number, targets in branch.requests:
                assert number not in seen
                whole = (row.prefix + branch.tokens)[: len(row.prefix) + branch.known + len(targets) - 1]
                seen[number] = (whole, branch.known + len(row.prefix), targets)
                assert branch.known >= 1
    for number, request in enumerate(requests):
        whole, known, targets = seen.pop(number)
        wanted = [*request.context, *request.continuation][-(context + 1) : -1]
        assert (whole, targets) == (wanted, request.continuation)
        assert known + len(targets) - 1 == len(wanted)
    assert not seen


def test_what_cannot_be_scored_is_named():
    for request, says in (
        (Request([], [1]), "empty"),
        (Request([1], []), "empty"),
        (Request([1], [1] * 9), "9 tokens"),
    ):
        with pytest.raises(FalconError, match=says):
            plan_rows([Request([1], [2]), request], 8)
