"""Benchmarks by name, run by lm-eval: the six of the published table, or any of its tasks. Needs the extra `eval`."""

from __future__ import annotations

import dataclasses
import logging
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import lm_eval
import lm_eval.evaluator
from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from falcon_relu.errors import FalconError
from falcon_relu.evaluation import harness
from falcon_relu.evaluation.local_data import local_note, local_task
from falcon_relu.progress import console

DEFAULT_SEED = 1234  # lm-eval's own
_ASKED = "asked"


class Benchmark(NamedTuple):
    """A line of a table.

    Attributes:
      name: as the table calls it.
      task: lm-eval's task or group.
      shots: examples before each question; the task's own number if None.
      metric: the metric to report, as lm-eval names it; all that the task has if None.
      folder: folder of lm-eval's task files to search; all of them if None.
    """

    name: str
    task: str
    shots: int | None = None
    metric: str | None = None
    folder: str | None = None


SUITES: Mapping[str, tuple[Benchmark, ...]] = {
    "open-llm-v1": (
        Benchmark("ARC-Challenge", "arc_challenge", 25, "acc_norm,none", "arc"),
        Benchmark("HellaSwag", "hellaswag", 10, "acc_norm,none", "hellaswag"),
        Benchmark("MMLU", "mmlu", 5, "acc,none", "mmlu"),
        Benchmark("TruthfulQA", "truthfulqa_mc2", 0, "acc,none", "truthfulqa"),
        Benchmark("Winogrande", "winogrande", 5, "acc,none", "winogrande"),
        Benchmark("GSM8K", "gsm8k", 5, "exact_match,strict-match", "gsm8k"),
    )
}


def evaluate(
    model: LM | Callable[[], LM],
    benchmarks: Sequence[Benchmark],
    *,
    data: Path | None = None,
    limit: int | None = None,
    seed: int = DEFAULT_SEED,
) -> dict[str, Any]:
    """Runs benchmarks.

    Args:
      model: a `harness.HarnessModel`, or a function that makes one, called once the questions are loaded.
      benchmarks: what to run.
      data: folder of local datasets; the hub is asked for what is not in it.
      limit: questions of each task (of each subject of MMLU), at most.
      seed: of the examples shown and of everything else that is random.

    Returns:
      Results by name.

      - rows: a mapping for each metric: benchmark, task, metric, shots, value (None where it could not be measured),
        error (standard error), questions, note (what is different or missing).
      - average: mean of the rows' values; None if one is missing.
      - samples: lm-eval's record of each question by task.
      - lm_eval: its version.

    Raises:
      FalconError: no such task, `data` is no folder, local questions that are not what the task expects, or a model
        cannot answer what a task asks.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if data is not None and not data.is_dir():
        raise FalconError(f"{data} is not a folder of local datasets; falcon-relu eval-data makes one")
    loaded, manager, notes = _load(benchmarks, data)
    found: dict[str, Any] = {}
    if loaded:
        answering = model if isinstance(model, LM) else model()
        # lm-eval asks git for the commit of the current folder, and git prints an error where that is no repository.
        no_commit = mock.patch.object(lm_eval.evaluator, "get_git_commit_hash", return_value=None, create=True)
        try:
            with no_commit:
                found = lm_eval.evaluator.simple_evaluate(
                    model=answering,
                    tasks=list(loaded.values()),
                    task_manager=manager,
                    limit=limit,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=None,
                    fewshot_random_seed=seed,
                )
        except FalconError:
            raise
        except Exception as error:  # of any kind, where questions lack what a task's own code takes from them
            if any(frame.f_code.co_filename == harness.__file__ for frame, _ in traceback.walk_tb(error.__traceback__)):
                raise
            raise FalconError(f"lm-eval cannot use the questions of {', '.join(loaded)}: {_reason(error)}") from error
    rows = [row for b in benchmarks for row in _rows(b, loaded.get(b.task), found, notes.get(b.task, ""))]
    values = [row["value"] for row in rows]
    average = None if None in values or not values else sum(values) / len(values)
    return {"rows": rows, "average": average, "samples": found.get("samples", {}), "lm_eval": lm_eval.__version__}


def _load(
    benchmarks: Sequence[Benchmark], data: Path | None
) -> tuple[dict[str, Task | Group], TaskManager, dict[str, str]]:
    """The tasks whose questions are available, lm-eval's index of all tasks, and notes on tasks for the table."""
    manager = _manager(benchmarks)
    loaded: dict[str, Task | Group] = {}
    notes: dict[str, str] = {}
    for benchmark in benchmarks:
        name = benchmark.task
        if name not in manager.task_index:
            raise FalconError(f"lm-eval {lm_eval.__version__} has no task {name!r}")
        settings: dict[str, Any] = {} if benchmark.shots is None else {"num_fewshot": benchmark.shots}
        datasets = _datasets(manager, name)
        if data is not None:
            local = {dataset: local_task(data, dataset) for dataset in datasets}
            if len(local) > 1 and any(local.values()):
                raise FalconError(f"{name} reads several datasets; ask for its tasks one by one to use local files")
            for dataset, found in local.items():
                settings |= found or {}
                notes[name] = local_note(data, dataset)
        console.print(f"questions of {name}", style="dim")
        try:
            asked = manager.load(_with_settings(manager, name, settings))
        except Exception as error:  # the datasets library raises many kinds, offline and for what it cannot read
            if "dataset_path" in settings:
                raise FalconError(
                    f"the questions in {settings['dataset_path']} cannot be read: {_reason(error)}"
                ) from error
            notes[name] = f"not measured: its questions are not to be had ({_reason(error)})"
            continue
        loaded[name] = asked["groups"].get(name) or asked["tasks"].get(name) or asked["groups"][_ASKED]
    return loaded, manager, notes


def _with_settings(manager: TaskManager, name: str, settings: Mapping[str, Any]) -> str:
    """Adds a task, group or tag with changed settings to lm-eval's index, as a group; returns the group's name."""
    entry = manager.task_index[name]
    if entry.cfg is None:
        members = [{"task": task, **settings} for task in sorted(entry.tags)]
    else:
        members = [{"group" if "group" in entry.cfg else "task": name, **settings}]
    group = {"kind": type(entry.kind)["GROUP"], "cfg": {"group": _ASKED, "task": members}}
    manager.task_index[_ASKED] = dataclasses.replace(entry, name=_ASKED, yaml_path=None, **group)
    return _ASKED


def _manager(benchmarks: Sequence[Benchmark]) -> TaskManager:
    """An index of lm-eval's tasks, of the needed folders only where these are known: all take half a minute."""
    root = Path(lm_eval.__file__).parent / "tasks"
    folders = [benchmark.folder for benchmark in benchmarks]
    if all(folder is not None and (root / folder).is_dir() for folder in folders):
        return TaskManager(include_path=[str(root / str(folder)) for folder in folders], include_defaults=False)
    return TaskManager()


def _datasets(manager: TaskManager, name: str) -> set[str]:
    """The hub's datasets that a task, group or tag reads."""
    entry = manager.task_index[name]
    members: Iterable[Any] = entry.tags if entry.cfg is None else entry.cfg.get("task")
    if isinstance(members, str):
        path = (entry.cfg or {}).get("dataset_path")
        return {path} if path else set()
    names = (m if isinstance(m, str) else m.get("task") or m.get("group") for m in members)
    return {d for member in names if isinstance(member, str) for d in _datasets(manager, member)}


def _rows(benchmark: Benchmark, task: Task | Group | None, found: Mapping[str, Any], note: str) -> list[dict[str, Any]]:
    about = {"benchmark": benchmark.name, "task": benchmark.task}
    if task is None:
        nothing = {"metric": benchmark.metric, "shots": benchmark.shots, "value": None, "error": None, "questions": 0}
        return [about | nothing | {"note": note}]
    leaves = task.get_all_tasks() if isinstance(task, Group) else [task]
    names = [leaf.task_name for leaf in leaves]
    questions = sum(found["n-samples"][name]["effective"] for name in names)
    shots = {found["n-shot"].get(name) for name in names}
    # A group without a metric of its own is shown as its tasks.
    shown = [benchmark.task] if _metrics(found["results"].get(benchmark.task, {})) else names
    return [
        about
        | {
            "task": name,
            "metric": metric,
            "shots": next(iter(shots)) if len(shots) == 1 else benchmark.shots,
            "value": found["results"][name][metric],
            "error": _number(found["results"][name].get(metric.replace(",", "_stderr,"))),
            "questions": questions if name == benchmark.task else found["n-samples"][name]["effective"],
            "note": note,
        }
        for name in shown
        for metric in ([benchmark.metric] if benchmark.metric else _metrics(found["results"][name]))
    ]


def _metrics(results: Mapping[str, Any]) -> list[str]:
    return [name for name in results if "," in name and "_stderr," not in name]


def _reason(error: Exception) -> str:
    """Kind and first line of what caused an error in a library."""
    cause = error.__cause__ or error
    first = next(iter(str(cause).strip().splitlines()), "")
    return f"{type(cause).__name__}: {first:.200}"


def _number(value: Any) -> float | None:
    return value if isinstance(value, float) else None  # lm-eval writes "N/A" for one
