"""FLOPs of the matrix products and bytes of the collectives of a compiled program, counted from its HLO text.

XLA's own `cost_analysis` counts the body of a loop once. Here every computation counts as often as it runs, by the trip
counts of loops, which the text states or which follow from the loops' conditions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8} | {
    f"{kind}{bits}": max(bits // 8, 1) for kind in "su" for bits in (2, 4, 8, 16, 32, 64)
}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# Matrix products for a tile in each kernel of splash attention; the gradient kernels recompute the scores.
_SPLASH_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}


class Array(NamedTuple):
    """Type and shape of one array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes, without padding by layouts."""
        return self.size * _BYTES.get(self.dtype, 1)


class Instruction(NamedTuple):
    """One instruction of the HLO text; `arrays` are its results, several for a tuple."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str


class Collective(NamedTuple):
    """A collective operation: `bytes` that a device receives each time, and the number of `times` that it runs."""

    kind: str
    group: tuple[int, ...]
    bytes: float
    times: float


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one device in one run of a program.

    Attributes:
      flops: of dots, convolutions and attention kernels; two a multiply-add.
      collectives: every collective operation.
    """

    flops: float
    collectives: tuple[Collective, ...]

    def bytes_by_kind(self) -> dict[str, float]:
        """Bytes that a device receives, by kind of collective."""
        total: Counter[str] = Counter()
        for c in self.collectives:
            total[c.kind] += c.bytes * c.times  # type: ignore[assignment]
        return dict(total)


def count(text: str) -> Work:
    """The work of a compiled module, per device.

    Args:
      text: what `jax.stages.Compiled.as_text` returns.

    Raises:
      ValueError: the trip count of a loop is unknown.
    """
    entry, computations = parse(text)
    flops, collectives = 0.0, []
    for times, name, instruction in _runs(entry, computations):
        named = computations[name]
        flops += times * _flops(instruction, named)
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            if name.startswith("all-reduce-scatter"):  # a reduce-scatter in a TPU program
                kind = "reduce-scatter"
            group = _group(instruction.attributes)
            collectives.append(Collective(kind, group, _received(kind, instruction, named, len(group)), times))
    return Work(flops, tuple(collectives))


def arrays(text: str) -> Iterator[Array]:
    """Every array that a compiled module makes, those inside fusions included."""
    for computation in parse(text)[1].values():
        for instruction in computation.values():
            yield from instruction.arrays


def parse(text: str) -> tuple[str, dict[str, dict[str, Instruction]]]:
    """The name of the entry computation, and all computations as instructions by name."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            current = start[2]
            computations[current] = {}
            entry = current if start[1] else entry
        elif current and (name := _INSTRUCTION.match(line)):
            computations[current][name[1]] = _instruction(name[1], line[name.end() :])
    return entry, computations


def _instruction(name: str, rest: str) -> Instruction:
    shape_end = _balanced(rest, 0) if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, shape_end)
    if opcode is None:
        return Instruction(name, "", (), (), rest)
    end = _balanced(rest, opcode.end() - 1)
    inside = rest[opcode.end() : end - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or (inside,)
    made = tuple(_array(*found) for found in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", rest[:shape_end])))
    return Instruction(name, opcode[1], made, operands, rest[end:])


def _balanced(text: str, start: int) -> int:
    """The end of the parenthesis that opens at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"unbalanced: {text[:80]}")


def _array(dtype: str, shape: str) -> Array:
    return Array(dtype, tuple(int(n) for n in shape.split(",") if n))


_Computations = Mapping[str, Mapping[str, Instruction]]


def _runs(name: str, computations: _Computations, times: float = 1.0) -> Iterator[tuple[float, str, Instruction]]:
    """(how often it runs, its computation, instruction) for every instruction reached from a computation."""
    for instruction in computations[name].values():
        yield times, name, instruction
        each = times * _trips(instruction, computations, name) if instruction.opcode == "while" else times
        called = _CALLED.findall(instruction.attributes)
        for branches in _BRANCHES.findall(instruction.attributes):
            called += re.findall(r"%?([\w.\-]+)", branches)
        for other in called:
            if other in computations:
                yield from _runs(other, computations, each)


def _trips(loop: Instruction, computations: _Computations, where: str) -> int:
    stated = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if stated:
        return int(stated[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    body = computations[condition[1]] if condition else {}
    limits = [int(i.operands[0]) for i in body.values() if i.opcode == "constant" and i.operands[0].isdigit()]
    directions = [m[1] for i in body.values() if (m := re.search(r"direction=(\w+)", i.attributes))]
    if len(limits) != 1 or (directions and directions != ["LT"]):
        raise ValueError(f"the trip count of loop {loop.name} in {where} cannot be told from its condition")
    return limits[0]  # JAX's loops count from 0 in steps of 1


def _flops(i: Instruction, named: Mapping[str, Instruction]) -> float:
    match i.opcode:
        case "dot":
            lhs = named[i.operands[0]].arrays[0].shape
            found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
            contracted = math.prod(lhs[int(d)] for d in found[1].split(",") if d) if found else 1
            return 2.0 * i.arrays[0].size * contracted
        case "convolution":
            return _convolution_flops(i, named)
        case "custom-call" if splash := re.match(r"splash_\w+?_(fwd|dkv|dq)_", i.name):
            return _splash_flops(i, named, _SPLASH_PRODUCTS[splash[1]])
    return 0.0


def _convolution_flops(i: Instruction, named: Mapping[str, Instruction]) -> float:
    """FLOPs of a convolution without the taps on padding: TPU programs have products written as such convolutions."""
    lhs, rhs = (named[o].arrays[0].shape for o in i.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels is not None
    groups = re.search(r"batch_group_count=(\d+)", i.attributes)
    flops = 2.0 * math.prod(i.arrays[0].shape[labels[3].index(label)] for label in "bf")
    flops *= rhs[labels[2].index("i")] / (int(groups[1]) if groups else 1)
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}

    def field(name: str, n: int) -> list[str]:
        return fields[name].split("x") if name in fields else [""] * n

    spatial = sorted(label for label in labels[1] if label.isdigit())
    n = len(spatial)
    columns = ("size", "stride", "pad", "lhs_dilate", "rhs_dilate")
    for label, size, stride, pad, lhs_dilate, rhs_dilate in zip(
        spatial, *(field(name, n) for name in columns), strict=True
    ):
        low = int(pad.split("_")[0]) if pad else 0
        flops *= _taps(
            inputs=lhs[labels[1].index(label)],
            outputs=i.arrays[0].shape[labels[3].index(label)],
            size=int(size or 1),
            stride=int(stride or 1),
            low=low,
            lhs_dilate=int(lhs_dilate or 1),
            rhs_dilate=int(rhs_dilate or 1),
        )
    return flops


@functools.cache
def _taps(inputs: int, outputs: int, size: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Pairs of an output position and a tap of the window that read an input, along one axis."""
    places = (o * stride + k * rhs_dilate - low for o in range(outputs) for k in range(size))
    return sum(0 <= p <= (inputs - 1) * lhs_dilate and p % lhs_dilate == 0 for p in places)


def _splash_flops(i: Instruction, named: Mapping[str, Instruction], products: int) -> float:
    """FLOPs of a splash attention kernel: the tiles under the causal mask, times the products for each tile."""
    operands = (array for o in i.operands for array in named[o].arrays)
    of_queries = next(a.shape for a in operands if a.dtype.startswith(("f", "bf")))  # after the mask's tables
    block = i.arrays[0].shape[-2]  # of a scratch buffer
    T, H = of_queries[-2:]
    tiles = T // block * (T // block + 1) / 2
    return products * 2.0 * math.prod(of_queries[:-2]) * tiles * block * block * H


def _group(attributes: str) -> tuple[int, ...]:
    """The devices of the first group; ranks within the group where the text names mesh axes."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(int(n) for n in found[1].split(","))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape = [int(n) for n in found[3].split(",")]
        order = [int(n) for n in found[4].split(",")] if found[4] else list(range(len(shape)))
        return tuple(_iota(shape, order)[: int(found[2])])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes):
        return _mesh_group(found[1], found[2], re.findall(r"'(\w+)'", found[3]))
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    return (int(pairs[1]), int(pairs[2])) if pairs else (0,)


def _mesh_group(mesh: str, device_ids: str | None, axes: list[str]) -> tuple[int, ...]:
    """The devices along `axes` of a mesh, from its first device on."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    devices = list(range(math.prod(sizes.values())))
    if found := re.match(r"\[([\d,]+)\]T\(([\d,]+)\)", device_ids or ""):
        devices = _iota([int(n) for n in found[1].split(",")], [int(n) for n in found[2].split(",")])
    names = list(sizes)
    strides = {name: math.prod(sizes[n] for n in names[k + 1 :]) for k, name in enumerate(names)}
    places = [0]
    for name in axes:
        places = [place + step * strides[name] for place in places for step in range(sizes[name])]
    return tuple(devices[place] for place in places)


def _iota(shape: list[int], order: list[int]) -> list[int]:
    """0, 1, ... in `shape`, transposed by `order`, flattened."""
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    numbers = [0]
    for d in order:
        numbers = [n + step * strides[d] for n in numbers for step in range(shape[d])]
    return numbers


def _received(kind: str, i: Instruction, named: Mapping[str, Instruction], n: int) -> float:
    """Bytes that a device receives at least, whatever the algorithm."""
    operands = sum(a.bytes for o in i.operands if o in named for a in named[o].arrays)
    match kind:
        case "all-gather":
            return float(operands * (n - 1))
        case "all-reduce":
            return 2 * operands * (n - 1) / n
        case "collective-permute":
            return float(operands)
    return operands * (n - 1) / n
