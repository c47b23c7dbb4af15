"""The model card: Markdown from measured figures alone. What was not measured is shown as missing, never filled in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from falcon_relu.checkpoints.schema import parse
from falcon_relu.evaluation.card_facts import (
    Facts,
    Figure,
    HeldOut,
    Manifest,
    Results,
    SparseText,
    Sparsity,
    Split,
    Training,
    speeds_of,
)
from falcon_relu.progress import NOT_MEASURED, format_value

MISSING = f"*{NOT_MEASURED}*"


class Licence(NamedTuple):
    """What a base model may be used for.

    Attributes:
      tag: of the hub's metadata.
      text: what the card says.
    """

    tag: str
    text: str


_APACHE = Licence(
    "apache-2.0",
    "Apache-2.0, the licence of the base model. The same restrictions and disclaimer as for the base model apply.",
)
_OTHER = "The weights are derived from the base model and stay under its licence: {}."

LICENCES: Mapping[str, Licence] = {
    "tiiuae/falcon-40b": _APACHE,
    "tiiuae/falcon-7b": _APACHE,
    "tiiuae/falcon-rw-1b": _APACHE,
    "SparseLLM/ReluFalcon-40B": _APACHE,
    "tiiuae/falcon-180B": Licence(
        "other",
        _OTHER.format("the Falcon-180B TII License, with its acceptable use policy, which hosting falls under too"),
    ),
    "tiiuae/falcon-11B": Licence("other", _OTHER.format("the TII Falcon License 2.0, with its acceptable use policy")),
}

_LIMITATIONS = """\
- What the base model's card says of its data, languages, stereotypes and mistakes holds here, too; none of it was
  measured again.
- The MLPs' activation is the one that `config.json` states under `"activation"`{activation}. A program that ignores it
  and computes GELU gives nonsense without an error.
- Sparse decoding reads only the neurons that a predictor chooses. It is an approximation, whose cost is in the tables
  above where it was measured; exact decoding is not.
- Assess risks and set up guardrails before any use that people depend on."""


def render(facts: Mapping[str, Any]) -> str:
    """The card. All text in the facts is shown as text, whatever is in it.

    Args:
      facts: name and any of base (on the hub, or None), training (a run's config.json), data (manifests of token shards
        by name), relu, original and sparse (results.json of falcon-relu eval), held_out, sparsity and speeds (a list),
        as the commands write them.

    Raises:
      FalconError: a fact is of another type than its command writes; the message names it.
    """
    f = parse(Facts, facts, "the card's facts", unknown_keys=True)
    licence = LICENCES.get(f.base or "")
    training = f.training or Training(steps=None)
    parts = [
        _front_matter(f.base, licence),
        f"# {f.name}\n",
        _about(f.base if licence else None, training),
        "## Data\n",
        _data(f.data),
        "## Training\n",
        _training(training),
        "## Evaluation\n",
        _evaluation(f),
        "## Sparsity\n",
        _sparsity(f.sparsity),
        "## Speed\n",
        _speeds(f.speeds),
        "## Limitations\n",
        _LIMITATIONS.format(activation=f" ({training.activation})" if training.activation else "") + "\n",
        "## Licence\n",
        f"{licence.text if licence else 'Licence of the base model: *not stated*.'}\n",
    ]
    return "\n".join(parts)


def _front_matter(base: str | None, licence: Licence | None) -> str:
    fields: dict[str, Any] = {
        "pipeline_tag": "text-generation",
        "tags": ["falcon", "relu", "sparse"],
    }
    if licence is not None:
        fields |= {"license": licence.tag, "base_model": base}
    return "---\n" + "".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items()) + "---\n"


def _about(base: str | None, training: Training) -> str:
    origin = f"[{base}](https://huggingface.co/{base})" if base else "A Falcon"
    return (
        f"{origin} with the activation of its MLPs replaced (now: {training.activation or MISSING}) and fine-tuned to "
        "behave as before. A neuron whose activation is zero need not be read when decoding: how many are is under "
        "Sparsity, what that gains under Speed.\n"
    )


def _data(manifests: Mapping[str, Manifest]) -> str:
    rows = []
    for name, manifest in manifests.items():
        train, held = (manifest.splits.get(split, Split()) for split in ("train", "validation"))
        counts = (train.documents, train.tokens, held.tokens)
        rows.append([name, *(_number(count, ",.0f") for count in counts)])
    return _table(["source", "documents", "tokens", "held-out tokens"], rows)


def _training(run: Training) -> str:
    steps, B, T = run.steps, run.data.batch_size, run.data.seq_len
    tokens = None if steps is None or B is None or T is None else steps * B * T
    loss, optimizer = run.loss, run.optimizer
    weights = {
        "next token": loss.lm_weight,
        "KL(teacher || student)": loss.kd_weight,
        "temperature": loss.temperature,
    }
    rates = (_number(rate, "g") for rate in (optimizer.learning_rate, optimizer.final_learning_rate))
    rows = [
        ["tokens", _number(tokens, ",.0f")],
        ["steps", _number(steps, ",.0f")],
        ["batch", f"{_number(B, ',.0f')} x {_number(T, ',.0f')} tokens"],
        ["loss", ", ".join(f"{what} {_number(weight, 'g')}" for what, weight in weights.items())],
        ["teacher", run.teacher or MISSING],
        ["learning rate", ", cosine to ".join(rates)],
        ["warm-up steps", _number(optimizer.warmup_steps, ",.0f")],
        ["weight decay", _number(optimizer.weight_decay, "g")],
        ["products in", run.compute_dtype or MISSING],
    ]
    return _table(["", ""], rows)


def _evaluation(facts: Facts) -> str:
    """The benchmarks, ReLU beside original beside sparse decoding, then held-out text."""
    shown = {"ReLU": facts.relu, "original": facts.original, "ReLU, sparse decoding": facts.sparse}
    names: dict[tuple[str, str], None] = {}
    for results in shown.values():
        for row in results.rows if results else ():
            names[row.benchmark, row.metric or ""] = None
    rows = []
    for benchmark, metric in names:
        found = [_row(results, benchmark, metric) for results in shown.values()]
        shots = {row.shots for row in found if row and row.shots is not None}
        label = f"{benchmark} ({', '.join(map(str, sorted(shots)))}-shot)" if shots else benchmark
        rows.append([label, *map(_score, found)])
    if rows:
        averages = [_number(_percent(results.average if results else None), ".2f") for results in shown.values()]
        rows.append(["average", *averages])
    text = _table(["benchmark, %", *shown], rows)
    text += "\n" + "\n".join(_remarks(shown)) + "\n"
    held = facts.held_out or HeldOut(perplexity=None)
    sparse = held.sparse or SparseText()
    quality = [
        ["perplexity", _number(held.perplexity, ",.3f")],
        ["KL(original || ReLU), nats a token", _number(held.kl, ".4f")],
        ["same likeliest next token as the original", _number(_percent(held.agreement), ".2f", " %")],
        ["KL(dense || sparse), nats a token", _number(sparse.kl, ".4f")],
        ["same likeliest next token, dense and sparse", _number(_percent(sparse.agreement), ".2f", " %")],
        ["neurons read by sparse decoding", _number(_percent(sparse.read), ".1f", " %")],
    ]
    return f"{text}\n{_table(['held-out text', ''], quality)}"


def _score(row: Figure | None) -> str:
    if row is None or row.value is None:
        return MISSING
    return f"{100 * row.value:.2f}" + (f" ± {100 * row.error:.2f}" if row.error is not None else "")


def _remarks(shown: Mapping[str, Results | None]) -> list[str]:
    """What limits the figures, each once."""
    found: dict[str, None] = {}
    for heading, results in shown.items():
        if results is None:
            continue
        if results.limit is not None:
            found[f"- {heading}: at most {results.limit} questions of each task."] = None
        for row in results.rows:
            if row.note:
                found[f"- {row.benchmark}: {row.note}."] = None
    return list(found)


def _sparsity(sparsity: Sparsity | None) -> str:
    zeros = None if sparsity is None else sparsity.zeros
    text = f"Zero activations on held-out text: {_number(_percent(zeros), '.1f', ' %')}.\n"
    if sparsity is not None and sparsity.layers:
        least, most = (pick(sparsity.layers, key=lambda row: row.zeros) for pick in (min, max))
        text += (
            f"From {100 * least.zeros:.1f} % (layer {least.layer}) to {100 * most.zeros:.1f} % (layer {most.layer}).\n"
        )
    union = [[str(row.batch), f"{100 * row.fired:.1f} %"] for row in (sparsity.union if sparsity else ())]
    allowed = [
        [
            f"{row.allowed:g}",
            f"{row.kl:.4f}" + (" (not kept)" if row.kl > row.allowed else ""),
            f"{100 * row.read:.1f} %",
        ]
        for row in (sparsity.allowed if sparsity else ())
    ]
    text += "\n" + _table(["sequences decoded together", "neurons that fire in any"], union)
    return text + "\n" + _table(["allowed KL(dense || sparse)", "measured", "neurons read"], allowed)


def _speeds(measurements: Sequence[Any]) -> str:
    """A table for each measurement, below what was measured and on which machine."""
    if not measurements:
        return f"{MISSING}\n"
    parts = []
    for measurement in measurements:
        machine, what, rows = speeds_of(measurement, "speeds")
        text = f"Machine: {machine.cpu or MISSING}, {_number(machine.cores, '.0f')} cores, "
        text += f"{_number(machine.memory_gb, '.0f')} GB of memory.\n{what}\n"
        parts.append(text + "\n" + _table([*rows[0]], [[*map(_cell, row.values())] for row in rows]))
    return "\n".join(parts)


def _row(results: Results | None, benchmark: str, metric: str) -> Figure | None:
    rows = results.rows if results else []
    return next((row for row in rows if (row.benchmark, row.metric or "") == (benchmark, metric)), None)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return f"{', '.join(filter(None, headings))}: {MISSING}\n"
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(_bars_escaped(cell) for cell in line)} |\n" for line in lines)


def _bars_escaped(cell: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", cell)


def _cell(value: str | int | float | None) -> str:
    if value is None:
        return MISSING
    return value if isinstance(value, str) else format_value(value)


def _number(value: float | None, spec: str, unit: str = "") -> str:
    return MISSING if value is None else format(value, spec) + unit


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
