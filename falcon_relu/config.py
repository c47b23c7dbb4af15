"""What a Falcon is: the architecture config, the family table, and the activation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

from falcon_relu.errors import FalconError, check_number

Activation = Literal["gelu", "relu", "shifted_relu", "relu2"]
Block = Literal["parallel", "parallel_two_norms", "sequential"]
Position = Literal["rotary", "alibi"]

# The most that a size may be: far above any Falcon, and far below what would use up a machine.
_MOST = {
    "d_model": 1 << 20,
    "n_layers": 1 << 12,
    "n_heads": 1 << 14,
    "n_kv_heads": 1 << 14,
    "d_ff": 1 << 24,
    "vocab_size": 1 << 24,
    "max_positions": 1 << 24,  # the rotary angles are computed in float32, which counts no further
    "bos_token_id": 1 << 24,
    "eos_token_id": 1 << 24,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FalconConfig:
    """Architecture of one Falcon model.

    Attributes:
      d_model: D, width of the residual stream.
      n_layers: L, decoder blocks.
      n_heads: N, query heads.
      n_kv_heads: K, key-value heads; every one serves G = N / K query heads.
      d_ff: F, neurons in each MLP.
      activation: MLP non-linearity. "gelu" is the exact erf form that Falcon was trained with, "shifted_relu"
        is max(x - activation_shift, 0), "relu2" is max(x, 0)^2.
      activation_shift: shift of "shifted_relu"; must be 0 for the others.
      vocab_size: V, token ids of the vocabulary.
      max_positions: context length in tokens.
      block: "parallel" (attention and MLP read one LayerNorm: 7B, 11B), "parallel_two_norms" (one LayerNorm
        each: 40B, 180B) or "sequential" (attention, then MLP: RW).
      position: "rotary" or "alibi".
      rope_theta: base of the rotary frequencies.
      norm_eps: epsilon of every LayerNorm.
      use_bias: whether the linear maps carry biases (RW).
      tied_embeddings: whether the vocabulary head is the embedding matrix.
      bos_token_id: id that starts a text, where one is used.
      eos_token_id: id that ends a text.

    Raises:
      FalconError: a field is of another type or out of range, or two contradict each other; the message names them.
    """

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    activation: Activation = "gelu"
    activation_shift: float = 0.0
    vocab_size: int = 65024
    max_positions: int = 2048
    block: Block = "parallel_two_norms"
    position: Position = "rotary"
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    use_bias: bool = False
    tied_embeddings: bool = True
    bos_token_id: int = 11
    eos_token_id: int = 11

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            value = getattr(self, name)
            low = 0 if name.endswith("_id") else 1
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= most:
                raise FalconError(f"FalconConfig.{name} must be an integer from {low} to {most:,}, got {value!r}")
        check_number("FalconConfig.rope_theta", self.rope_theta, low=1, high=1e12)
        check_number("FalconConfig.norm_eps", self.norm_eps, low=1e-12, high=1)
        check_number("FalconConfig.activation_shift", self.activation_shift, low=-1e6, high=1e6)
        for name in ("use_bias", "tied_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise FalconError(f"FalconConfig.{name} must be true or false, got {getattr(self, name)!r}")
        if self.d_model % self.n_heads:
            raise FalconError(f"FalconConfig.d_model ({self.d_model}) must be a multiple of n_heads ({self.n_heads})")
        if self.n_heads % self.n_kv_heads:
            raise FalconError(
                f"FalconConfig.n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})"
            )
        for name, allowed in (("activation", Activation), ("block", Block), ("position", Position)):
            if getattr(self, name) not in get_args(allowed):
                known = ", ".join(get_args(allowed))
                raise FalconError(f"FalconConfig.{name} must be one of {known}, got {getattr(self, name)!r}")
        if self.position == "rotary" and self.head_dim % 2:
            raise FalconError(f"FalconConfig.head_dim must be even for rotary positions, got {self.head_dim}")
        if self.activation != "shifted_relu" and self.activation_shift:
            raise FalconError(
                f"FalconConfig.activation_shift is only used by 'shifted_relu', not by {self.activation!r}"
            )
        for name in ("bos_token_id", "eos_token_id"):
            if getattr(self, name) >= self.vocab_size:
                raise FalconError(f"FalconConfig.{name} must lie in the vocabulary of {self.vocab_size}")

    @property
    def head_dim(self) -> int:
        """H, width of one head."""
        return self.d_model // self.n_heads

    @property
    def q_per_kv(self) -> int:
        """G, query heads a key-value head."""
        return self.n_heads // self.n_kv_heads

    @property
    def n_params(self) -> int:
        """Parameters counted by hand, that is weights, norms and biases."""
        D, F = self.d_model, self.d_ff
        qkv_rows = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
        matrices = qkv_rows * D + D * D + 2 * F * D
        biases = (qkv_rows + D + F + D) if self.use_bias else 0
        norms = 2 * D * (1 if self.block == "parallel" else 2)
        heads = self.vocab_size * D * (1 if self.tied_embeddings else 2)
        return self.n_layers * (matrices + biases + norms) + heads + 2 * D

    def replace(self, **changes: object) -> FalconConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def with_activation(self, activation: Activation, shift: float = 0.0) -> FalconConfig:
        """The same model under another MLP non-linearity: the swap that this project is about."""
        return self.replace(activation=activation, activation_shift=shift)


def _tiny(**changes: object) -> FalconConfig:
    fields: dict[str, object] = dict(
        d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=256, vocab_size=512, max_positions=256
    )
    return FalconConfig(**(fields | changes))  # type: ignore[arg-type]


# Widths and switches as published in the checkpoints' config files.
FAMILY: Mapping[str, FalconConfig] = MappingProxyType(
    {
        "falcon-40b": FalconConfig(d_model=8192, n_layers=60, n_heads=128, n_kv_heads=8, d_ff=32768),
        "falcon-180b": FalconConfig(d_model=14848, n_layers=80, n_heads=232, n_kv_heads=8, d_ff=59392),
        "falcon-7b": FalconConfig(d_model=4544, n_layers=32, n_heads=71, n_kv_heads=1, d_ff=18176, block="parallel"),
        "falcon2-11b": FalconConfig(
            d_model=4096,
            n_layers=60,
            n_heads=32,
            n_kv_heads=8,
            d_ff=16384,
            max_positions=8192,
            block="parallel",
            rope_theta=500_042.0,
            tied_embeddings=False,
        ),
        "falcon-rw-1b": FalconConfig(
            d_model=2048,
            n_layers=24,
            n_heads=32,
            n_kv_heads=32,
            d_ff=8192,
            vocab_size=50304,
            block="sequential",
            position="alibi",
            use_bias=True,
            bos_token_id=1,
            eos_token_id=2,
        ),
        # One tiny stand-in for every way in which the members differ; the tests run on these.
        "tiny-40b": _tiny(),
        "tiny-7b": _tiny(d_model=48, n_heads=3, n_kv_heads=1, d_ff=192, block="parallel"),
        "tiny-11b": _tiny(block="parallel", rope_theta=500_042.0, tied_embeddings=False),
        "tiny-rw": _tiny(n_kv_heads=4, block="sequential", position="alibi", use_bias=True),
        # Small enough to train from nothing on two CPU cores in minutes; `falcon-relu demo` does.
        "demo": FalconConfig(
            d_model=192,
            n_layers=4,
            n_heads=6,
            n_kv_heads=2,
            d_ff=768,
            vocab_size=2048,
            max_positions=512,
            bos_token_id=0,
            eos_token_id=0,
        ),
        # The same in a quarter of an hour.
        "laptop": FalconConfig(
            d_model=384,
            n_layers=6,
            n_heads=6,
            n_kv_heads=2,
            d_ff=1536,
            vocab_size=4096,
            max_positions=1024,
            bos_token_id=0,
            eos_token_id=0,
        ),
    }
)


def family(name: str) -> FalconConfig:
    """The config of a named member of the family.

    Raises:
      FalconError: no such member; the message lists the ones there are.
    """
    if name not in FAMILY:
        raise FalconError(f"unknown model {name!r}; known: {', '.join(FAMILY)}")
    return FAMILY[name]
