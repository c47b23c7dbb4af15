"""Model FLOPs: what a step has to compute, whatever the program recomputes; and what chips can do at most."""

from __future__ import annotations

from falcon_relu.config import FalconConfig

# Peak dense bf16 FLOPs a second of one JAX device, by `jax.Device.device_kind`, from the vendors' data sheets.
PEAK_FLOPS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def forward_flops(config: FalconConfig, batch: int, seq_len: int) -> float:
    """FLOPs of one forward pass over [batch, seq_len] tokens: matrix products alone, two FLOPs a multiply-add.

    Every matrix counts once a token (the embedding only as vocabulary head), and attention only the T (T + 1) / 2
    pairs of a query and a key that is not after it, so that work done under the mask is not counted as useful.
    """
    D, H = config.d_model, config.head_dim
    attention = (config.n_heads + 2 * config.n_kv_heads) * H * D + config.n_heads * H * D
    matrices = config.n_layers * (attention + 2 * config.d_ff * D) + config.vocab_size * D
    pairs = seq_len * (seq_len + 1) / 2
    products = config.n_layers * 2 * pairs * config.n_heads * H  # scores, then the weighted sum of values
    return 2.0 * batch * (seq_len * matrices + products)


def model_flops(config: FalconConfig, teacher: FalconConfig | None, batch: int, seq_len: int) -> float:
    """FLOPs that one training step needs: forward and backward of the student (6 N a token), teacher forward (2 N).

    Args:
      config: the student.
      teacher: the online teacher; None without one, or with a cached one.
      batch: B, rows of the global batch.
      seq_len: T.
    """
    taught = 0.0 if teacher is None else forward_flops(teacher, batch, seq_len)
    return 3 * forward_flops(config, batch, seq_len) + taught
