"""`falcon-relu teacher-cache`: a teacher's predictions for token shards, cached to distil from."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import tyro

from falcon_relu.cli.devices import Processes, together
from falcon_relu.cli.outputs import Made
from falcon_relu.cli.prepare import parse_shard
from falcon_relu.cli.report import report
from train.machine import keep_freed_memory
from train.teacher_cache import TeacherCacheConfig, write_teacher_cache

EPILOGUE = """The tokens are folders that `falcon-relu prepare` finished. Train from the cache with

  falcon-relu train --config ... --teacher None --data.teacher-cache teacher

Run the same command again to go on after an interruption."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(Processes):
    """Write the top k log-probabilities of a teacher, and the mass of the rest, beside the token shards."""

    cache: Annotated[TeacherCacheConfig, tyro.conf.arg(name="")]
    shard: str = "0/1"
    """i/n: do only the i-th of n parts, counted from 0, as one job of an array; all share the folders. The processes of
    one job have the same."""

    def written(self) -> list[Made]:
        """What is written besides `json`."""
        return [Made(folder / self.cache.name, goes_on=True, locked=False) for folder in self.cache.tokens]


def run(args: Args) -> None:
    """Writes, then reports."""
    keep_freed_memory()
    with together(args):
        cached = write_teacher_cache(args.cache, parse_shard(args.shard))
        results: dict[str, Any] = {
            "finished": all(manifest is not None for manifest in cached.manifests),
            "new rows": cached.new_rows,
            "new bytes": cached.bytes,
            "seconds": cached.seconds,
        }
        report(results, args)
