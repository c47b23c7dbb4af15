"""A model behind the interface of EleutherAI's lm-eval, with a journal of its answers. Needs the extra `eval`."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from falcon_relu.errors import FalconError
from falcon_relu.evaluation.journal import Journal
from falcon_relu.evaluation.scoring import Engine, Request, plan_rows
from falcon_relu.generation import Sampling
from falcon_relu.progress import console, progress
from falcon_relu.tokenizer import Tokenizer

_ENCODED_TOGETHER = 256  # requests
_MAX_NEW_TOKENS = 256  # where a task does not set it; lm-eval's own default
_STOP_MARGIN = 2  # a stop sequence of n tokens is searched for in the last n + 2; lm-eval's own
_NAMED = 5  # requests that a warning shows; the others are counted
_DRAWING = ("temperature", "top_k", "top_p")  # settings of sampled generation
# Generation settings of transformers with the values that have no effect, which are accepted and ignored.
_NEUTRAL = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "early_stopping": False,
}


class HarnessModel(TemplateLM):
    """An engine and its tokenizer behind lm-eval's interface.

    The same request is answered once, whatever number of tasks ask it.

    Args:
      engine: runs the model.
      tokenizer: the model's.
      journal: answers known already, and where new ones go.
      seed: of sampled generation.

    Raises:
      FalconError: the tokenizer belongs to another model.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, journal: Journal | None = None, seed: int = 0):
        super().__init__()
        tokenizer.check_fits(engine.config.vocab_size)
        self._engine, self._tokens, self._seed = engine, tokenizer, seed
        self._journal = journal or Journal()
        self.max_length = engine.config.max_positions

    @property
    def eot_token_id(self) -> int:
        """Ends a text, and stands before one that has no context."""
        return self._tokens.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; Falcon adds no special ones."""
        return self._tokens.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability and greedy flag of every (context, continuation)."""
        pairs = [instance.args for instance in requests]
        encoded: list[Request] = []
        with progress("tokenise", len(pairs), "requests") as advance:
            for start in range(0, len(pairs), _ENCODED_TOGETHER):
                some = pairs[start : start + _ENCODED_TOGETHER]
                encoded += self._encode_pairs(some)
                advance(len(some))
        return self._scores(encoded)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._scores([Request(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of every text, in windows of the context's length, each token predicted once."""
        windows: list[list[Request]] = []
        for instance in requests:
            found = get_rolling_token_windows(
                self.tok_encode(instance.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            windows.append([Request(*make_disjoint_window(window)) for window in found])
        scores = iter(self._scores([request for found in windows for request in found]))
        return [sum(next(scores)[0] for _ in found) for found in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows every context, up to the first of its stop sequences."""
        wanted: dict[str, _Generation] = {}
        keys: list[str] = []
        asked: collections.Counter[str] = collections.Counter()
        for instance in requests:
            generation = self._generation(*instance.args)
            key = generation.key()
            if generation.sampling.temperature:  # asked again, a sampled text is another one
                asked[key] += 1
                key += f"-{asked[key]}"
            wanted[key] = generation
            keys.append(key)
        parts = [(part, self._draw(part, wanted)) for part in self._together(wanted)]
        names = {key: name for part, (_, kept) in parts for key, name in zip(part, kept, strict=True)}
        todo = [(part, seed) for part, (seed, kept) in parts if not all(name in self._journal for name in kept)]
        with progress("generate", sum(len(part) for part, _ in todo), "texts") as advance:
            for part, seed in todo:
                prompts, first = [wanted[key].prompt for key in part], wanted[part[0]]
                sampling = dataclasses.replace(first.sampling, seed=seed)
                found = self._engine.generate(prompts, sampling, self._enough(first.until))
                texts = (self._text(ids, first.until) for ids in found)
                self._journal.add({names[key]: text for key, text in zip(part, texts, strict=True)})
                advance(len(part))
        return [self._journal[names[key]] for key in keys]

    def _draw(self, part: Sequence[str], wanted: Mapping[str, _Generation]) -> tuple[int, list[str]]:
        """The seed for prompts that are continued together, and what their answers are kept under.

        What is drawn depends on the seed and on the other prompts of the batch: another --seed or --limit draws anew.
        """
        if not wanted[part[0]].sampling.temperature:
            return 0, list(part)
        drawn = _key("draw", str(self._seed).encode(), *(key.encode() for key in part))
        return int(drawn[:8], 16), [f"{drawn}-{place}" for place in range(len(part))]

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        """Token ids as lm-eval pairs them: a context gives its last spaces to the continuation.

        Where the continuation's first characters are part of the context's last token, lm-eval's own model stops with
        an error; here that token is scored.
        """
        contexts = [context.rstrip() for context, _ in pairs]
        texts = dict.fromkeys([*contexts, *("".join(pair) for pair in pairs)])
        ids = dict(zip(texts, self._tokens.encode_batch(list(texts)), strict=True))
        found, merged = [], []
        for (context, continuation), stripped in zip(pairs, contexts, strict=True):
            whole = ids[context + continuation] or [self.prefix_token_id]
            known = ids[stripped] if stripped else []
            if known and len(known) >= len(whole):
                merged.append((context, continuation))
                known = whole[:-1]
            if known:
                found.append(Request(np.array(known, np.int32), whole[len(known) :]))
            elif whole[:1] == [self.prefix_token_id] and len(whole) > 1:
                found.append(Request(whole[:1], whole[1:]))
            else:
                found.append(Request([self.prefix_token_id], whole))
        for context, continuation in merged[:_NAMED]:
            note = f"context {context[-40:]!r} and continuation {continuation!r} share a token, all of which is scored"
            console.print(note, style="yellow", soft_wrap=True)
        if len(merged) > _NAMED:
            console.print(f"and {len(merged) - _NAMED:,} others", style="yellow")
        return found

    def _scores(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        keys = [_key("score", request.context, request.continuation) for request in requests]
        unique = dict(zip(keys, requests, strict=True))
        names = list(unique)
        batches = self._engine.batches(plan_rows(list(unique.values()), self.max_length))
        asked = [(batch, [names[number] for row in batch for number in row.requests]) for batch in batches]
        todo = [(batch, of) for batch, of in asked if not all(key in self._journal for key in of)]
        with progress("score", sum(len(of) for _, of in todo), "requests") as advance:
            for batch, of in todo:
                self._journal.add({names[number]: list(score) for number, score in self._engine.score(batch).items()})
                advance(len(of))
        return [(logprob, greedy) for logprob, greedy in map(self._journal.__getitem__, keys)]

    def _generation(self, context: str, arguments: Mapping[str, Any]) -> _Generation:
        asked = f"a task asks for generation with {dict(arguments)}"
        try:
            kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments), _MAX_NEW_TOKENS))
            until = handle_stop_sequences(kwargs.pop("until", None), self._tokens.decode([self.eot_token_id]))
        except (TypeError, ValueError) as error:
            raise FalconError(f"{asked}: {error}") from None
        sampled = kwargs.pop("do_sample", False)
        drawing = {name: kwargs.pop(name) for name in _DRAWING if name in kwargs}
        for name, value in _NEUTRAL.items():
            if kwargs.get(name, value) == value:
                kwargs.pop(name, None)
        new_tokens = kwargs.pop("max_gen_toks")
        if kwargs:
            raise FalconError(f"{asked}: this model does not know {', '.join(kwargs)}")
        try:
            sampling = Sampling(
                max_new_tokens=new_tokens,
                stop_tokens=(self.eot_token_id, self._engine.config.eos_token_id),
                **({"temperature": 1.0} | drawing if sampled else {}),
            )
        except (TypeError, FalconError) as error:
            raise FalconError(f"{asked}: {error}") from None
        room = self.max_length - sampling.max_new_tokens
        if room < 1:
            raise FalconError(
                f"a task wants {sampling.max_new_tokens} new tokens, which the context of {self.max_length} cannot hold"
            )
        prompt = self.tok_encode(context)[-room:] or [self.eot_token_id]
        return _Generation(prompt, sampling, tuple(until))

    def _together(self, wanted: Mapping[str, _Generation]) -> list[list[str]]:
        """Keys of prompts to continue together: alike in all but the prompt, and of about the same length."""
        order = sorted(wanted, key=lambda key: (wanted[key].alike(), -len(wanted[key].prompt)))
        most = self._engine.prompts_together
        parts = []
        for _, same in itertools.groupby(order, lambda key: wanted[key].alike()):
            keys = list(same)
            parts += [keys[start : start + most] for start in range(0, len(keys), most)]
        return parts

    def _enough(self, until: Sequence[str]) -> Callable[[list[int]], bool]:
        return lambda ids: any(stop in self._tokens.decode(ids) for stop in until if stop)

    def _text(self, ids: Sequence[int], until: Sequence[str]) -> str:
        kept = self._tokens.decode(ids[: self._end(ids, until)], skip_special=True)
        text: str = postprocess_generated_text(kept, list(until), None)
        return text

    def _end(self, ids: Sequence[int], until: Sequence[str]) -> int:
        """How many tokens come up to the end of the first stop sequence, which may hold special tokens."""
        looks = [(stop, len(self.tok_encode(stop)) + _STOP_MARGIN) for stop in until if stop]
        for n in range(1, len(ids)):
            if any(stop in self._tokens.decode(ids[max(n - back, 0) : n]) for stop, back in looks):
                return n
        return len(ids)


@dataclasses.dataclass(frozen=True)
class _Generation:
    prompt: list[int]
    sampling: Sampling
    until: tuple[str, ...]

    def alike(self) -> str:
        return json.dumps([dataclasses.astuple(self.sampling), self.until])

    def key(self) -> str:
        return _key("text", self.prompt, self.alike().encode())


def _key(kind: str, *parts: Sequence[int] | np.ndarray | bytes) -> str:
    """What an answer is kept under: a digest of the kind of request and of its ids."""
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for part in parts:
        raw = part if isinstance(part, bytes) else np.asarray(part, "<u4").tobytes()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
