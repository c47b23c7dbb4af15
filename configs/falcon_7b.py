"""Falcon-7B to a ReLU Falcon-7B on about 5 billion tokens, on 8 devices of 80 GB.

Nobody published this run: what is not said here is as in `configs/falcon_40b.py`, and all of it is our choice.
"""

import dataclasses
from pathlib import Path

from configs import falcon_40b

CONFIG = dataclasses.replace(
    falcon_40b.CONFIG,
    out=Path("runs/falcon_7b"),
    init_from="tiiuae/falcon-7b",
    teacher="tiiuae/falcon-7b",
    mesh=(1, -1, 1),  # its one key-value head and 71 query heads cannot be split
    microbatches=60,  # 4 rows a device at a time on 8 devices
)
