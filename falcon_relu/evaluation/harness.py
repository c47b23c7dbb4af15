"""A model as EleutherAI's lm-eval wants it, with a journal of answers so that a killed run goes on where it stopped.

Needs the extra `eval`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from falcon_relu.errors import FalconError
from falcon_relu.evaluation.scoring import Engine, Request, plan_rows
from falcon_relu.generation import Sampling
from falcon_relu.progress import progress
from falcon_relu.tokenizer import Tokenizer

_ENCODED_TOGETHER = 256  # requests
_MAX_NEW_TOKENS = 256  # where a task does not say; lm-eval's own


class Journal:
    """Answers by key, kept as JSON lines; a line that a killed process left unfinished is dropped.

    Args:
      path: the file, made if it is not there; in memory alone if None.
      write: whether this process adds to the file.

    Raises:
      FalconError: a line other than the last is damaged.
    """

    def __init__(self, path: Path | None = None, *, write: bool = True):
        self._answers: dict[str, Any] = {}
        self._file = None
        if path is None:
            return
        whole = 0
        if path.exists():
            for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    key, answer = json.loads(line)
                    self._answers[str(key)] = answer
                except (ValueError, TypeError):
                    raise FalconError(f"{path}, line {number}, is damaged: remove the file to start anew") from None
                whole += len(line)
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            self._file.truncate(whole)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keeps new answers, on disk when this returns."""
        self._answers.update(answers)
        if self._file is not None:
            self._file.write("".join(json.dumps(pair) + "\n" for pair in answers.items()).encode())
            self._file.flush()


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
        for instance in requests:
            generation = self._generation(*instance.args)
            key = generation.key()
            if generation.sampling.temperature:  # asked again, a sampled text is another one
                key += f"-{sum(key == earlier[: len(key)] for earlier in keys)}"
            wanted[key] = generation
            keys.append(key)
        parts = list(enumerate(self._together(wanted)))
        todo = [(number, part) for number, part in parts if not all(key in self._journal for key in part)]
        with progress("generate", sum(len(part) for _, part in todo), "texts") as advance:
            for number, part in todo:
                prompts, first = [wanted[key].prompt for key in part], wanted[part[0]]
                sampling = dataclasses.replace(first.sampling, seed=self._seed + number)
                found = self._engine.generate(prompts, sampling, self._enough(first.until))
                self._journal.add({key: self._text(ids, first.until) for key, ids in zip(part, found, strict=True)})
                advance(len(part))
        return [self._journal[key] for key in keys]

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        """Token ids as lm-eval pairs them: a context gives its last spaces to the continuation."""
        contexts = [context.rstrip() for context, _ in pairs]
        texts = dict.fromkeys([*contexts, *("".join(pair) for pair in pairs)])
        ids = dict(zip(texts, self._tokens.encode_batch(list(texts)), strict=True))
        found = []
        for (context, continuation), stripped in zip(pairs, contexts, strict=True):
            whole = ids[context + continuation]
            if stripped:
                known = ids[stripped]
                found.append(Request(np.array(known, np.int32), whole[len(known) :]))
            elif whole[:1] == [self.prefix_token_id]:
                found.append(Request(whole[:1], whole[1:]))
            else:
                found.append(Request([self.prefix_token_id], whole))
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
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments), _MAX_NEW_TOKENS))
        until = handle_stop_sequences(kwargs.pop("until", None), self._tokens.decode([self.eot_token_id]))
        if not kwargs.pop("do_sample", False):
            kwargs["temperature"] = 0.0
        try:
            sampling = Sampling(
                max_new_tokens=kwargs.pop("max_gen_toks"),
                temperature=kwargs.pop("temperature", 1.0),
                top_k=kwargs.pop("top_k", 0),
                top_p=kwargs.pop("top_p", 1.0),
                stop_tokens=(self.eot_token_id, self._engine.config.eos_token_id),
            )
        except TypeError as error:
            raise FalconError(f"a task asks for generation with {dict(arguments)}: {error}") from None
        if kwargs:
            raise FalconError(f"a task asks for generation with {', '.join(kwargs)}, which this model does not know")
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
        text: str = postprocess_generated_text(self._tokens.decode(ids, skip_special=True), list(until), None)
        return text


@dataclasses.dataclass(frozen=True)
class _Generation:
    prompt: list[int]
    sampling: Sampling
    until: tuple[str, ...]

    def alike(self) -> str:
        return json.dumps([dataclasses.astuple(self.sampling), self.until])

    def key(self) -> str:
        return _key("generate", self.prompt, self.alike().encode())


def _key(kind: str, *parts: Sequence[int] | np.ndarray | bytes) -> str:
    """What an answer is kept under: a digest of the kind of request and of its ids."""
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for part in parts:
        raw = part if isinstance(part, bytes) else np.asarray(part, "<u4").tobytes()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
