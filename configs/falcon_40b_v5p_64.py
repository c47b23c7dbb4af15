"""The published run on a v5p:4x4x4 (64 chips of 95 GB): the same batches, worked through as these chips like it."""

import dataclasses

from configs import falcon_40b

CONFIG = dataclasses.replace(
    falcon_40b.CONFIG,
    # Gathered over 16, a plane of the torus: over all 64 the compiler makes an all-reduce of it, twice the bytes.
    mesh=(4, 16, 1),
    microbatches=15,  # 2 rows a chip
    remat="dots",
)
