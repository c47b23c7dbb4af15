"""The published run on a v5e:16x16 (256 chips of 16 GB): the same batches, worked through as these chips like it."""

import dataclasses

from configs import falcon_40b

CONFIG = dataclasses.replace(
    falcon_40b.CONFIG,
    mesh=(1, 128, 2),
    microbatches=15,  # 1 row on a pair of chips
    remat="full",
)
