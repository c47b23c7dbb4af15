"""How the 40B run lies on its devices, as a table to read and to hold the code to.

`python -m tests.train.plan.sharding_table` writes `falcon_40b_sharding.txt` beside this file anew.
"""

from __future__ import annotations

from pathlib import Path

from configs import falcon_40b, falcon_40b_v5e_256, falcon_40b_v5p_64
from falcon_relu.sharding import MESH_AXES
from train.config import TrainConfig
from train.plan.sharding_table import sharding_table

TABLE = Path(__file__).with_name("falcon_40b_sharding.txt")
RUNS = (
    ("40 devices", falcon_40b.CONFIG, (5, 8, 1)),
    ("v5p:4x4x4", falcon_40b_v5p_64.CONFIG, falcon_40b_v5p_64.CONFIG.mesh),
    ("v5e:16x16", falcon_40b_v5e_256.CONFIG, falcon_40b_v5e_256.CONFIG.mesh),
)


def table() -> str:
    """All runs' tables."""
    return "\n".join(_run_table(name, config, mesh) for name, config, mesh in RUNS)


def _run_table(name: str, config: TrainConfig, shape: tuple[int, int, int]) -> str:
    rows = sharding_table(config, shape)
    total = sum(row["bytes a device"] for row in rows)
    cells = [tuple(rows[0]), *(tuple(f"{v:,}" if isinstance(v, int) else v for v in row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    sizes = ", ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, shape, strict=True))
    return "\n".join([f"{name}: {sizes}", *lines, f"in all {total:,} bytes a device", ""])


if __name__ == "__main__":
    TABLE.write_text(table())
