"""Falcon2-11B to a ReLU Falcon2-11B on about 5 billion tokens, on 8 devices of 80 GB.

Nobody published this run: what is not said here is as in `configs/falcon_40b.py`, and all of it is our choice. The
model's licence is the TII Falcon License 2.0.
"""

import dataclasses
from pathlib import Path

from configs import falcon_40b

CONFIG = dataclasses.replace(
    falcon_40b.CONFIG,
    out=Path("runs/falcon_11b"),
    init_from="tiiuae/falcon-11B",
    teacher="tiiuae/falcon-11B",
    data=dataclasses.replace(
        falcon_40b.CONFIG.data,
        seq_len=8192,  # the context that it was trained with; make the shards with --seq-len 8192
        batch_size=480,  # as many tokens a step as in the published run
    ),
    mesh=(1, -1, 1),
    microbatches=60,  # 1 row a device at a time on 8 devices
)
