"""Model FLOPs: what a step has to compute, whatever the program recomputes; and what chips can do at most."""

from __future__ import annotations

import dataclasses

from falcon_relu.config import FalconConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One JAX device, as its vendor describes it.

    Attributes:
      name: what it is called in reports.
      kinds: its `jax.Device.device_kind`.
      topology: how the names of topologies made of it begin; None for GPUs.
      memory_gb: 1e9 bytes.
      tflops: 1e12 dense bf16 FLOPs a second, at most.
      link_gb_s: 1e9 bytes a second that it receives from its neighbours, over all links together.
      node: devices that share those links; None where all do.
      network_gb_s: 1e9 bytes a second that it receives from other nodes.
    """

    name: str
    kinds: tuple[str, ...] = ()
    topology: str | None = None
    memory_gb: float
    tflops: float
    link_gb_s: float
    node: int | None = None
    network_gb_s: float = 0.0


def _gpu(name: str, kind: str, memory_gb: float, tflops: float, link_gb_s: float, network_gb_s: float) -> Chip:
    return Chip(
        name=name,
        kinds=(kind,),
        memory_gb=memory_gb,
        tflops=tflops,
        link_gb_s=link_gb_s,
        node=8,
        network_gb_s=network_gb_s,
    )


A100 = _gpu("A100-80G", "NVIDIA A100-SXM4-80GB", 80, 312, 300, 25)
# From Google's pages on system architecture and NVIDIA's data sheets; networks as in the usual servers of 8.
CHIPS = (
    Chip(name="TPU v4", kinds=("TPU v4",), topology="v4", memory_gb=32, tflops=275, link_gb_s=300),
    Chip(name="TPU v5e", kinds=("TPU v5 lite", "TPU v5e"), topology="v5e", memory_gb=16, tflops=197, link_gb_s=200),
    Chip(name="TPU v5p", kinds=("TPU v5", "TPU v5p"), topology="v5p", memory_gb=95, tflops=459, link_gb_s=600),
    Chip(name="TPU v6e", kinds=("TPU v6 lite", "TPU v6e"), topology="v6e", memory_gb=32, tflops=918, link_gb_s=448),
    A100,
    _gpu("A100-40G", "NVIDIA A100-SXM4-40GB", 40, 312, 300, 25),
    _gpu("A100-80G PCIe", "NVIDIA A100 80GB PCIe", 80, 312, 32, 25),
    _gpu("H100 PCIe", "NVIDIA H100 PCIe", 80, 756, 64, 50),
    _gpu("H100 SXM", "NVIDIA H100 80GB HBM3", 80, 989, 450, 50),
    _gpu("H200", "NVIDIA H200", 141, 989, 450, 50),
    _gpu("B200", "NVIDIA B200", 180, 2250, 900, 50),
)
TPUS = {chip.topology: chip for chip in CHIPS if chip.topology is not None}


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOPs a second of a `jax.Device.device_kind`, at most; None where it is not known."""
    return next((chip.tflops * 1e12 for chip in CHIPS if device_kind in chip.kinds), None)


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
