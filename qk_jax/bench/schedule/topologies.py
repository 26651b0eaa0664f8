"""TPU slices: which exist, what one device of them can do, and what a collective costs on them.

libtpu makes a topology of any shape, also of machines that nobody can rent; here only the slices
that Google lists exist. Figures are per JAX device: a v4 or v5p chip is one device of two
TensorCores, a TPU7x chip is two devices of one. Sources, where a line names none: the system
architecture pages of docs.cloud.google.com/tpu (v4, v5e, v5p, v6e, tpu7x).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from qk_jax.base.errors import InputError
from qk_jax.training import flops

GIB = 2**30
# For a process that compiles for a slice of which it is no part; set before libtpu loads. Without
# the first, libtpu asks for the metadata of a TPU VM; without the second, processes exclude each
# other.
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
# Least time of one hop over ICI (scaling book, chapter 3).
HOP_SECONDS = 1e-6


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generation of TPUs; sizes are per JAX device unless they say chip.

    Attributes:
      device_kind: JAX's name, the key of `flops.PEAK_TFLOPS`.
      dimensions: of the torus.
      cores: TensorCores per chip, which a slice's name counts.
      chip_devices: JAX devices per chip.
      cycle_flops: bfloat16 FLOPs of one of the compiler's cycles when every MXU is busy:
        TensorCores x MXUs x side^2 x 2. On v6e and TPU7x a cycle of the estimate does two passes
        of the two 256 x 256 MXUs (large matmuls reach 93 % of that, none exceeds it).
      hbm_bytes: usable, by libtpu's own out-of-memory message.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s one way over one ICI link of a chip; the scaling book's, a tenth
        under the published headline.
      dcn_bandwidth: bytes/s out of one chip over the data-centre network.
      die_bandwidth: bytes/s one way between the two devices of a chip; 0 if it has one.
    """

    device_kind: str
    dimensions: int
    cores: int
    chip_devices: int
    cycle_flops: int
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float
    die_bandwidth: float = 0.0

    @property
    def peak_flops(self) -> float:
        """bfloat16 FLOP/s."""
        return flops.PEAK_TFLOPS[self.device_kind] * 1e12

    @property
    def clock_hz(self) -> float:
        """Cycles of the compiler's estimates per second: 1.05, 1.50, 1.75, 1.75 and 2.20 GHz.

        The published peak over the FLOPs of a cycle, so that a matmul without a lost cycle is at
        100 % of the peak. The v4 paper states 1050 MHz and the scaling book 1.5 GHz for v5e.
        """
        return self.peak_flops / self.cycle_flops


# The scaling book has no figures of TPU7x: its headline (1,200 GB/s both ways over six links) is
# v5p's, and so is its link here; between the dies the page says six times a link. v4's DCN is the
# scaling book's 25 GB/s of a host of four chips.
GENERATIONS = {
    "v4": Generation(
        "TPU v4", 3, 2, 1, 2 * 4 * 128**2 * 2, int(30.75 * GIB), 1.2e12, 4.5e10, 6.25e9
    ),
    "v5e": Generation(
        "TPU v5 lite", 2, 1, 1, 4 * 128**2 * 2, int(15.75 * GIB), 8.19e11, 4.5e10, 3.125e9
    ),
    "v5p": Generation(
        "TPU v5", 3, 2, 1, 2 * 4 * 128**2 * 2, int(95.74 * GIB), 2.765e12, 9e10, 6.25e9
    ),
    "v6e": Generation(
        "TPU v6 lite", 2, 1, 1, 2 * 2 * 256**2 * 2, int(31.25 * GIB), 1.638e12, 9e10, 1.25e10
    ),
    "tpu7x": Generation(
        "TPU7x", 3, 2, 2, 2 * 2 * 256**2 * 2, int(94.75 * GIB), 3.69e12, 9e10, 1.25e10, 5.4e11
    ),
}  # fmt: skip
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x"}


@functools.cache
def shapes(generation: str) -> dict[int, tuple[int, ...]]:
    """{chips: shape in chips} of the slices of a generation that can be rented.

    Up to half a cube a 3-D slice is one of four blocks; above, it is the most compact cuboid of
    whole cubes of 4x4x4. Sizes follow the accelerator types of the TPU pages and MaxText's
    accelerator_to_spec_map: v5p jobs end at 6,144 chips, v4 ones at 2,048, TPU7x at 9,216.
    """
    if GENERATIONS[generation].dimensions == 2:
        return {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8),
                128: (8, 16), 256: (16, 16)}  # fmt: skip
    blocks = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
    cubes: Sequence[int] = range(1, 97)
    if generation == "v4":
        cubes = (1, 2, 3, 4, 8, 12, 16, 32)
    elif generation == "tpu7x":
        blocks = {1: (1, 1, 1), **blocks}
        cubes = (*cubes, 108, 128, 140, 144)
    found = {64 * count: _cuboid(count) for count in cubes}
    return {**blocks, **{chips: shape for chips, shape in found.items() if shape[2] <= 248}}


def _cuboid(cubes: int) -> tuple[int, int, int]:
    """Chips along each side of the most compact cuboid of so many 4x4x4 cubes."""
    sides = [
        (a, b, cubes // (a * b))
        for a in range(1, cubes + 1)
        for b in range(a, cubes // a + 1)
        if cubes % (a * b) == 0 and cubes // (a * b) >= b
    ]
    a, b, c = min(sides, key=lambda s: s[0] * s[1] + s[1] * s[2] + s[0] * s[2])
    return 4 * a, 4 * b, 4 * c


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice, or `count` equal ones joined over the data-centre network; see `parse`.

    Attributes:
      generation: key of `GENERATIONS`.
      chips: of one slice.
      count: of slices.
    """

    generation: str
    chips: int
    count: int = 1

    def __str__(self) -> str:
        return self.name if self.count == 1 else f"{self.count}x {self.name}"

    @property
    def name(self) -> str:
        """Google's name of one slice, which counts TensorCores: 'v5p-128' is 64 chips."""
        return f"{self.generation}-{self.chips * self.spec.cores}"

    @property
    def spec(self) -> Generation:
        """The figures of its devices."""
        return GENERATIONS[self.generation]

    @property
    def shape(self) -> tuple[int, ...]:
        """Chips along each axis of one slice."""
        return shapes(self.generation)[self.chips]

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which axes are rings: all of whole cubes in 3-D, those of 16 chips in 2-D."""
        if self.spec.dimensions == 3:
            return (self.chips >= 64,) * 3
        return tuple(side == 16 for side in self.shape)

    @property
    def total_chips(self) -> int:
        """Chips of all slices."""
        return self.count * self.chips

    @property
    def total_devices(self) -> int:
        """JAX devices of all slices."""
        return self.total_chips * self.spec.chip_devices


def parse(text: str) -> Slice:
    """A slice from Google's name: 'v5p-128', 'v5litepod-16', '2x v5e-256', '2xv5e-256'.

    Raises:
      InputError: another form, an unknown generation, or a size that nobody rents out; names the
        nearest that exist.
    """
    match = re.fullmatch(r"(?:(\d+)\s*x\s*)?([a-z0-9]+)-(\d+)", text.strip().lower())
    if not match:
        raise InputError(f"the slice {text!r} is not of the form v5p-128 or '2x v5e-256'")
    count, family, size = int(match[1] or 1), match[2], int(match[3])
    family = ALIASES.get(family, family)
    if family not in GENERATIONS:
        raise InputError(
            f"the slice {text!r} is of no known generation; known are {', '.join(GENERATIONS)}"
        )
    if count < 1:
        raise InputError(f"the slice {text!r} needs a positive number of slices")
    known = shapes(family)
    cores = GENERATIONS[family].cores
    if size % cores or size // cores not in known:
        near = sorted(known, key=lambda chips: abs(math.log(max(size, 1) / (chips * cores))))[:3]
        names = ", ".join(f"{family}-{chips * cores}" for chips in sorted(near))
        raise InputError(f"there is no slice {family}-{size}; the nearest are {names}")
    return Slice(family, size // cores, count)


def devices(where: Slice) -> list[Any]:
    """Devices to compile for, of a slice that need not be here.

    They have `coords`, `core_on_chip`, `slice_index` (None for a single slice) and `device_kind`,
    and hold no arrays.

    Raises:
      InputError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "compiling for a TPU slice needs the libtpu wheel; pip install 'qk_jax[bench]'"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Not at the top: it imports compilers, which the table does not need.
    from jax.experimental import topologies

    shape = (*where.shape, 1)[:3]
    hosts = tuple(map(min, shape, (2, 4 if where.shape == (2, 4) else 2, 1)))
    options: dict[str, Any] = {
        # v4's default is one device per TensorCore; cloud machines join the two.
        "chip_config_name": "megacore" if where.generation == "v4" else "default",
        "chips_per_host_bounds": hosts,
        "wrap": (*where.wraps, False)[:3],
    }
    if where.count > 1:
        options["num_slices"] = where.count
    sides = "x".join(map(str, where.shape))
    description = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{where.generation}:{sides}", **options
    )
    return list(description.devices)


def collective_seconds(kind: str, nbytes: float, group: Sequence[Any], where: Slice) -> float:
    """Seconds of one collective at the published bandwidths, alone on its links.

    A ring runs both ways over every axis of the torus that the group spans, all axes at once; an
    axis that is no ring, or of which the group has a part, has half the bandwidth (scaling book,
    chapter 3). Groups over several slices first work within each slice, then every device takes
    its share over the data-centre network. The two devices of a TPU7x chip share its links.

    Args:
      kind: one of `hlo_text.COLLECTIVES`.
      nbytes: of one device's array, where it is larger: the result of an all-gather, the operand
        of everything else.
      group: devices of one replica group (all groups work at once), or source and target of a
        permute; anything with `coords`, `core_on_chip` and `slice_index`.
      where: the slice that they are of.
    """
    spec = where.spec
    slices = len(set(map(slice_index, group)))
    inside = [device for device in group if slice_index(device) == slice_index(group[0])]
    dcn = spec.dcn_bandwidth / spec.chip_devices
    if len(group) < 2:
        return 0.0
    if kind == "collective-permute":
        return nbytes / (dcn if slices > 1 else _torus(inside, where).link)
    torus = _torus(inside, where)
    if kind == "all-to-all":
        across = nbytes * (slices - 1) / slices / dcn
        return across + torus.exchange(nbytes / slices)
    across = nbytes / len(inside) * (slices - 1) / slices / dcn
    once = across + torus.gather(nbytes)
    return 2 * once if kind == "all-reduce" else once


def slice_index(device: Any) -> int:
    """The slice of a device; those of a single slice may have none."""
    return getattr(device, "slice_index", None) or 0


@dataclasses.dataclass(frozen=True)
class _Torus:
    """The links of one slice that a group can use.

    Attributes:
      devices: of the group.
      chips: under them.
      axes: (chips, bytes/s into a chip, hops) of each axis that the group spans.
      link: bytes/s from a device to a neighbour.
      die: bytes/s between the devices of a chip, 0 if at most one is in the group.
    """

    devices: int
    chips: int
    axes: tuple[tuple[int, float, int], ...]
    link: float
    die: float

    def gather(self, nbytes: float) -> float:
        """Seconds until every device holds `nbytes`, of which each had an equal share."""
        if self.devices == 1:
            return 0.0
        die = nbytes / self.devices * (self.devices // self.chips - 1) / self.die if self.die else 0
        if not self.axes:
            return die
        bandwidth = sum(speed for _, speed, _ in self.axes)
        hops = sum(steps for _, _, steps in self.axes)
        return max(die, HOP_SECONDS * hops, nbytes * (self.chips - 1) / self.chips / bandwidth)

    def exchange(self, nbytes: float) -> float:
        """Seconds of an all-to-all in which every device sends `nbytes` in equal shares.

        Half the bytes of a line's chips cross its middle, so the longest axis decides.
        """
        if self.devices == 1:
            return 0.0
        die = nbytes / self.devices / self.die if self.die else 0.0
        loads = [nbytes * self.devices / self.chips * n / 4 / speed for n, speed, _ in self.axes]
        return max([die, *(HOP_SECONDS * hops for _, _, hops in self.axes), *loads])


def _torus(inside: Sequence[Any], where: Slice) -> _Torus:
    """The links that devices of one slice can use."""
    spec = where.spec
    chips = len({tuple(device.coords) for device in inside})
    both = chips < len(inside)
    # A device alone on its chip shares the links with its sibling, which is in another group.
    link = spec.link_bandwidth / (1 if both else spec.chip_devices)
    die = spec.die_bandwidth if both else 0.0
    axes = []
    for axis, (side, wraps) in enumerate(zip(where.shape, where.wraps, strict=True)):
        at = sorted({device.coords[axis] for device in inside})
        if len(at) < 2:
            continue
        steps = {b - a for a, b in itertools.pairwise(at)}
        stride = max(steps)  # groups with chips between each other's share the links
        ring = wraps and len(steps) == 1 and stride * len(at) == side
        hops = side // 2 if ring else at[-1] - at[0]
        axes.append((len(at), link * (2 if ring else 1) / stride, hops))
    if math.prod(count for count, _, _ in axes) != chips:
        # No block of the torus: a ring through its chips, one way in and one way out.
        axes = [(chips, link, chips - 1)]
    return _Torus(len(inside), chips, tuple(axes), link if axes else die, die)
