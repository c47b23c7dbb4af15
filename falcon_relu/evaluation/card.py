"""The model card: Markdown from measured figures alone. What was not measured is shown as missing, never filled in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MISSING = "*not measured*"

Facts = Mapping[str, Any]


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
- Trained mostly on English text from the web: it repeats the stereotypes and mistakes found there, and has no reliable
  knowledge of other languages. It is a base model, not tuned to follow instructions.
- The MLPs' activation is not GELU. A program that loads the weights as GELU in silence gives nonsense: `config.json`
  says `"activation": "{activation}"`, and a loader must obey it.
- Sparse decoding reads only the neurons that a predictor chooses. It is an approximation, whose cost is in the tables
  above where it was measured; exact decoding is not.
- Assess risks and set up guardrails before any use that people depend on."""


def render(facts: Facts) -> str:
    """The card.

    Args:
      facts: any of name, base (on the hub, or None), training (a run's config.json), data (manifests of token shards by
        name), relu, original and sparse (results.json of falcon-relu eval), held_out, sparsity and speeds (a list), as
        the commands write them.
    """
    licence = LICENCES.get(facts.get("base") or "")
    parts = [
        _front_matter(facts, licence),
        f"# {facts['name']}\n",
        _about(facts),
        "## Data\n",
        _data(facts.get("data") or {}),
        "## Training\n",
        _training(facts.get("training")),
        "## Evaluation\n",
        _evaluation(facts),
        "## Sparsity\n",
        _sparsity(facts.get("sparsity")),
        "## Speed\n",
        _speeds(facts.get("speeds") or []),
        "## Limitations\n",
        _LIMITATIONS.format(activation=_get(facts, "training.activation") or "relu") + "\n",
        "## Licence\n",
        f"{licence.text if licence else 'Licence of the base model: *not stated*.'}\n",
    ]
    return "\n".join(parts)


def _front_matter(facts: Facts, licence: Licence | None) -> str:
    fields: dict[str, Any] = {
        "language": ["en"],
        "pipeline_tag": "text-generation",
        "tags": ["falcon", "relu", "sparse"],
    }
    if licence is not None:
        fields |= {"license": licence.tag, "base_model": facts["base"]}
    return "---\n" + "".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items()) + "---\n"


def _about(facts: Facts) -> str:
    base = facts.get("base")
    origin = f"[{base}](https://huggingface.co/{base})" if base else "A Falcon"
    activation = _get(facts, "training.activation") or MISSING
    return (
        f"{origin} with the activation of its MLPs replaced (now: {activation}) and fine-tuned to behave as "
        "before. Most activations are then zero, so that a CPU can decode while reading a small part of the weights.\n"
    )


def _data(manifests: Mapping[str, Facts]) -> str:
    rows = []
    for name, manifest in manifests.items():
        splits = manifest.get("splits") or {}
        tokens, held = (_get(splits, f"{split}.tokens") for split in ("train", "validation"))
        documents = _get(splits, "train.documents")
        rows.append([name, _number(documents, ",.0f"), _number(tokens, ",.0f"), _number(held, ",.0f")])
    return _table(["source", "documents", "tokens", "held-out tokens"], rows)


def _training(run: Facts | None) -> str:
    run = run or {}
    tokens = None
    sizes = [run.get("steps"), _get(run, "data.batch_size"), _get(run, "data.seq_len")]
    if None not in sizes:
        tokens = sizes[0] * sizes[1] * sizes[2]
    weights = [f"{what} {_number(_get(run, path), 'g')}" for what, path in _LOSS.items()]
    rows = [
        ["tokens", _number(tokens, ",.0f")],
        ["steps", _number(run.get("steps"), ",.0f")],
        [
            "batch",
            f"{_number(_get(run, 'data.batch_size'), ',.0f')} x {_number(_get(run, 'data.seq_len'), ',.0f')} tokens",
        ],
        ["loss", ", ".join(weights)],
        ["teacher", str(run.get("teacher") or MISSING)],
        [
            "learning rate",
            _number(_get(run, "optimizer.learning_rate"), "g")
            + ", cosine to "
            + _number(_get(run, "optimizer.final_learning_rate"), "g"),
        ],
        ["warm-up steps", _number(_get(run, "optimizer.warmup_steps"), ",.0f")],
        ["weight decay", _number(_get(run, "optimizer.weight_decay"), "g")],
        ["products in", str(run.get("compute_dtype") or MISSING)],
    ]
    return _table(["", ""], rows)


_LOSS = {
    "next token": "loss.lm_weight",
    "KL(teacher || student)": "loss.kd_weight",
    "temperature": "loss.temperature",
}


def _evaluation(facts: Facts) -> str:
    """The benchmarks, ReLU beside original beside sparse decoding, then held-out text."""
    columns = {"ReLU": "relu", "original": "original", "ReLU, sparse decoding": "sparse"}
    shown = {heading: facts.get(key) for heading, key in columns.items()}
    names: dict[tuple[str, str], None] = {}
    for results in shown.values():
        for row in (results or {}).get("rows", []):
            names[row["benchmark"], row["metric"] or ""] = None
    rows = []
    for benchmark, metric in names:
        found = {heading: _row(results, benchmark, metric) for heading, results in shown.items()}
        shots = {row["shots"] for row in found.values() if row and row.get("shots") is not None}
        label = f"{benchmark} ({', '.join(map(str, sorted(shots)))}-shot)" if shots else benchmark
        rows.append([label, *(_score(row) for row in found.values())])
    if rows:
        averages = [_number(_percent(_get(results or {}, "average")), ".2f") for results in shown.values()]
        rows.append(["average", *averages])
    text = _table(["benchmark, %", *columns], rows)
    text += "\n" + "\n".join(_remarks(shown)) + "\n"
    held = facts.get("held_out") or {}
    figures = [
        ["perplexity", _number(held.get("perplexity"), ",.3f")],
        ["KL(original || ReLU), nats a token", _number(held.get("kl"), ".4f")],
        ["same likeliest next token as the original", _number(_percent(held.get("agreement")), ".2f", " %")],
        ["KL(dense || sparse), nats a token", _number(_get(held, "sparse.kl"), ".4f")],
        ["same likeliest next token, dense and sparse", _number(_percent(_get(held, "sparse.agreement")), ".2f", " %")],
        ["neurons read by sparse decoding", _number(_percent(_get(held, "sparse.read")), ".1f", " %")],
    ]
    return f"{text}\n{_table(['held-out text', ''], figures)}"


def _score(row: Facts | None) -> str:
    if not row or row.get("value") is None:
        return MISSING
    error = _percent(row.get("error"))
    return f"{_percent(row['value']):.2f}" + (f" ± {error:.2f}" if error is not None else "")


def _remarks(shown: Mapping[str, Facts | None]) -> list[str]:
    """What limits the figures, each once."""
    found: dict[str, None] = {}
    for heading, results in shown.items():
        limit = (results or {}).get("limit")
        if limit is not None:
            found[f"- {heading}: at most {limit} questions of each task."] = None
        for row in (results or {}).get("rows", []):
            if row.get("note"):
                found[f"- {row['benchmark']}: {row['note']}."] = None
    return list(found)


def _sparsity(sparsity: Facts | None) -> str:
    sparsity = sparsity or {}
    layers = sparsity.get("layers") or []
    text = f"Zero activations on held-out text: {_number(_percent(sparsity.get('zeros')), '.1f', ' %')}.\n"
    if layers:
        least, most = (pick(layers, key=lambda row: row["zeros"]) for pick in (min, max))
        text += (
            f"From {100 * least['zeros']:.1f} % (layer {least['layer']}) to {100 * most['zeros']:.1f} % (layer "
            f"{most['layer']}).\n"
        )
    union = [[str(row["batch"]), f"{100 * row['fires']:.1f} %"] for row in sparsity.get("union") or []]
    allowed = [
        [f"{row['allowed kl']:g}", f"{row['kl']:.4f}", f"{100 * row['read']:.1f} %"]
        for row in sparsity.get("allowed") or []
    ]
    text += "\n" + _table(["sequences decoded together", "neurons that fire in any"], union)
    return text + "\n" + _table(["allowed KL(dense || sparse)", "measured", "neurons read"], allowed)


def _speeds(speeds: Sequence[Facts]) -> str:
    """Every measured way, with machine and bandwidth."""
    if not speeds:
        return f"{MISSING}\n"
    parts = []
    for found in speeds:
        machine = found.get("machine") or {}
        cpu, cores = machine.get("cpu") or MISSING, _number(machine.get("cores"), ".0f")
        text = f"Machine: {cpu}, {cores} cores, {_number(machine.get('memory_gb'), '.0f')} GB of memory.\n"
        if "tokens" in found:
            text += f"Random weights at the widths of {found.get('model')}, {found.get('layers')} layers.\n"
        table = found["tokens"] if isinstance(found.get("tokens"), list) else [found]
        rows = [{name: value for name, value in row.items() if isinstance(value, str | int | float)} for row in table]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        parts.append(text + "\n" + _table(columns, [[_cell(row.get(name)) for name in columns] for row in rows]))
    return "\n".join(parts)


def _row(results: Facts | None, benchmark: str, metric: str) -> Facts | None:
    rows = (results or {}).get("rows", [])
    return next((row for row in rows if (row["benchmark"], row["metric"] or "") == (benchmark, metric)), None)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return f"{', '.join(filter(None, headings))}: {MISSING}\n"
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(_escaped(cell) for cell in line)} |\n" for line in lines)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def _cell(value: Any) -> str:
    if value is None:
        return MISSING
    return value if isinstance(value, str) else f"{value:,.4g}" if isinstance(value, float) else str(value)


def _number(value: Any, spec: str, unit: str = "") -> str:
    return MISSING if value is None else format(value, spec) + unit


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _get(facts: Facts, path: str) -> Any:
    """What lies at a dotted path, None where any part is missing."""
    value: Any = facts
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
