"""Made-up questions in the layout of the hub's datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

_WORDS = ["ash", "birch", "cedar", "elm", "fir", "hazel", "larch", "maple", "oak", "pine", "rowan", "willow", "yew"]


def phrase(rng: np.random.Generator, n: int) -> str:
    """Random words."""
    return " ".join(rng.choice(_WORDS, n))


def _write_dataset(folder: Path, config: str, splits: dict[str, list[dict]]) -> None:
    files = []
    for split, documents in splits.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
        files.append({"split": split, "path": f"{split}.jsonl"})
    header = json.dumps([{"config_name": config, "data_files": files}])
    (folder / "README.md").write_text(f"---\nconfigs: {header}\n---\n")


def write_questions(data: Path) -> None:
    """A few made-up questions in the layout of three of the hub's datasets, below a folder."""
    rng = np.random.default_rng(0)

    def arc(i: int) -> dict[str, Any]:
        choices = [phrase(rng, 1 + j % 3) for j in range(4)]
        choices[1] = f"{choices[0]} {phrase(rng, 1)}"  # one that begins with another
        return {
            "id": str(i),
            "question": phrase(rng, 5 + i),
            "choices": {"text": choices, "label": list("ABCD")},
            "answerKey": "ABCD"[i % 4],
        }

    def winogrande(i: int) -> dict[str, Any]:
        a, b = rng.choice(_WORDS, 2, replace=False)
        return {"sentence": f"{phrase(rng, 6)} _ {phrase(rng, 4)}.", "option1": a, "option2": b, "answer": "12"[i % 2]}

    def gsm8k(i: int) -> dict[str, Any]:
        return {"question": f"{phrase(rng, 8)} {i}?", "answer": f"{phrase(rng, 4)}\n#### {i}"}

    for name, config, make, splits in (
        ("allenai/ai2_arc", "ARC-Challenge", arc, ("train", "validation", "test")),
        ("allenai/winogrande", "winogrande_xl", winogrande, ("train", "validation")),
        ("openai/gsm8k", "main", gsm8k, ("train", "test")),
    ):
        _write_dataset(data / name, config, {split: [make(i) for i in range(12)] for split in splits})
