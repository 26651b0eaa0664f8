"""Reads the scheduled HLO that libtpu prints: computations, instructions, sources, trip counts.

One pass over the lines, since a real step is tens of megabytes. Nothing here knows about time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from qk_jax.base.errors import InputError

# Bytes of an element by HLO's name of its type; what is not listed (tokens, opaque) has none.
ELEMENT_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
    "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3b11fnuz": 1, "f4e2m1fn": 0.5,
}  # fmt: skip
# Matrix products of a splash kernel, 2 T S D FLOPs per head each: the forward has Q K^T and P V;
# the backward kernels form Q K^T and dO V^T again, then dQ, or dK and dV, or all three.
PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "fused": 5}
LANES = 128  # of a vector register
COLLECTIVES = frozenset(
    "all-gather reduce-scatter all-reduce all-to-all collective-permute".split()
)
# Kinds of what is sent between slices, by libtpu's names.
MEGASCALE = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
# These take no time: they name, or address, what is there.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id "
    "opt-barrier add-dependency domain send-done".split()
)
FREE_TARGETS = frozenset(
    "AllocateBuffer ConcatBitcast SliceId PrepareAsyncCallStart PrepareAsyncCallDone Sharding "
    "AssumeGatherIndicesInBound GatherScatterIndicesBitpacked".split()
)
# These move or map elements, so that without an estimate (scalars mostly) bytes tell their time.
MOVES = frozenset(
    "copy transpose reshape slice concatenate pad reverse broadcast iota dynamic-slice "
    "dynamic-update-slice".split()
)
MAPS = frozenset(
    "add subtract multiply divide remainder power maximum minimum abs negate sign sqrt rsqrt cbrt "
    "exponential exponential-minus-one log log-plus-one logistic tanh tan sine cosine atan2 erf "
    "floor ceil round-nearest-afz round-nearest-even compare select clamp convert bitcast-convert "
    "and or xor not shift-left shift-right-logical shift-right-arithmetic popcnt clz is-finite "
    "reduce-precision stochastic-convert rng-bit-generator rng-get-and-update-state reduce map "
    "real imag complex".split()
)
# Files that every layer calls into, so that their caller tells more.
HELPERS = ("layers.py", "sharding.py")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\]")
_HEADER = re.compile(r"(ENTRY )?%(\S+) \(")
_ASSIGN = re.compile(r"\s+(ROOT )?%(\S+) = ")
_OPCODE = re.compile(r"\s*([a-z][a-z0-9-]*)\(")
_OPERAND = re.compile(r"%([^\s,()]+)")
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|branch_computations|true_computation|false_computation|"
    r"called_computations)="
    r"(?:%([^\s,{}]+)|\{([^}]*)\})"
)
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_METADATA = re.compile(r'(?<!\w)metadata=\{(?:op_type="[^"]*" )?(?:op_name="([^"]*)")?[^}]*\}')
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(((?:[^()]|\([^()]*\))*)\))? ?\{([^}]*)\}"
)
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_FILE = re.compile(r'source_file="([^"]*)" source_line=(\d+)')


@dataclasses.dataclass(frozen=True, slots=True)
class Array:
    """One array of a shape.

    Attributes:
      dtype: HLO's name of the element type.
      dims: sizes.
    """

    dtype: str
    dims: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes without the padding of tiles."""
        return math.ceil(ELEMENT_BYTES.get(self.dtype, 0) * math.prod(self.dims))


@functools.lru_cache(maxsize=1 << 16)
def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape, a tuple's in order."""
    return tuple(
        Array(dtype, tuple(map(int, dims.split(","))) if dims else ())
        for dtype, dims in _ARRAY.findall(shape)
    )


@dataclasses.dataclass(slots=True)
class Instruction:
    """One scheduled instruction.

    Attributes:
      name: without the '%'.
      opcode: 'fusion', 'all-gather', ...
      shape: of the result, as it is printed.
      operands: names; of a constant, the literal.
      attributes: everything behind the operands.
      root: whether it is its computation's result.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def nbytes(self) -> int:
        """Of the result."""
        return sum(array.nbytes for array in arrays(self.shape))

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate of one execution, None where it made none."""
        match = _CYCLES.search(self.attributes)
        return int(match[1]) if match else None

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it calls, in order; a loop's are condition and body."""
        found: list[str] = []
        for one, several in _CALLED.findall(self.attributes):
            found += [one] if one else _OPERAND.findall(several)
        return tuple(found)

    @property
    def scope(self) -> str:
        """JAX's name stack, '' where there is none."""
        match = _METADATA.search(self.attributes)
        return (match[1] or "") if match else ""

    @property
    def target(self) -> str:
        """Of a custom call, what it calls."""
        return self.attribute("custom_call_target").strip('"')

    @property
    def rendezvous(self) -> str:
        """What joins a send between slices to its receive."""
        match = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', self.attributes)
        return match[1] if match else self.name

    def attribute(self, name: str) -> str:
        """The text of `name=...` up to the next comma outside brackets, '' where it is absent."""
        start = self.attributes.find(f", {name}=")
        if start < 0:
            return ""
        start += len(name) + 3
        return self.attributes[start : _end(self.attributes, start)]


def _end(text: str, start: int) -> int:
    """Where the value that begins at `start` ends: at a comma outside of brackets."""
    depth = 0
    for match in re.compile(r"[\[({\])},]").finditer(text, start):
        if match[0] in "[({":
            depth += 1
        elif match[0] == ",":
            if not depth:
                return match.start()
        else:
            depth -= 1
    return len(text)


@dataclasses.dataclass(frozen=True)
class Module:
    """A scheduled module.

    Attributes:
      entry: name of the computation that runs.
      computations: instructions of each by name, in the order of the schedule.
      partitions: devices that it runs on; of several slices, those of one.
      frames: (file, line, parent's id) by stack_frame_id.
    """

    entry: str
    computations: dict[str, dict[str, Instruction]]
    partitions: int
    frames: dict[int, tuple[str, int, int]]

    @functools.cached_property
    def loops(self) -> dict[str, tuple[str, Instruction]]:
        """The computation and the while instruction that run each loop's body and condition."""
        found = {}
        for computation, instructions in self.computations.items():
            for one in instructions.values():
                if one.opcode == "while":
                    found.update(dict.fromkeys(one.called, (computation, one)))
        return found

    def root(self, computation: str) -> Instruction:
        """The instruction whose result a computation returns."""
        return next(one for one in self.computations[computation].values() if one.root)

    def strip(self, computation: str, name: str) -> Instruction:
        """The instruction behind the copies and bitcasts that `name` may be."""
        one = self.computations[computation][name]
        while one.opcode in ("copy", "bitcast", "copy-done", "copy-start", "convert"):
            one = self.computations[computation][one.operands[0]]
        return one

    def element(self, computation: str, name: str) -> int | None:
        """Which element of a loop's state `name` is, None when it is none."""
        one = self.strip(computation, name)
        if one.opcode != "get-tuple-element":
            return None
        from_ = self.computations[computation][one.operands[0]]
        return int(one.attribute("index")) if from_.opcode == "parameter" else None

    def initial(self, caller: str, loop: Instruction, element: int) -> str:
        """Name, in the caller, of what an element of a loop's state is at first."""
        return self.computations[caller][loop.operands[0]].operands[element]

    def constant(self, computation: str, name: str) -> int | None:
        """The integer that `name` always is, also where loops hand it through; None otherwise."""
        one = self.strip(computation, name)
        if one.opcode == "constant":
            return int(one.operands[0]) if re.fullmatch(r"-?\d+", one.operands[0]) else None
        element = self.element(computation, name)
        if element is None or computation not in self.loops:
            return None
        caller, loop = self.loops[computation]
        body = loop.attribute("body").lstrip("%")
        if self.element(body, self.root(body).operands[element]) != element:
            return None
        return self.constant(caller, self.initial(caller, loop, element))

    def operand_bytes(self, computation: str, instruction: Instruction) -> int:
        """Bytes of all operands."""
        here = self.computations[computation]
        return sum(here[name].nbytes for name in instruction.operands if name in here)

    def width(self, computation: str, instruction: Instruction) -> float:
        """Bytes of an op's operands and results over those that its estimate is for.

        Outside of matrix products libtpu 0.0.42 estimates narrow elements as if they had 32 bits:
        x * x * x + x of 16384 x 16384 is 1.07 ms on v5p and 1.62 ms on v6e in float32, bfloat16
        and int8 alike. In float32 that is 0.72 and 0.81 of the bandwidth of HBM.
        """
        here = self.computations[computation]
        results = arrays(instruction.shape)
        largest = max((math.prod(array.dims) for array in results), default=0)
        slices = "dynamic-slice" in self._opcodes_of(instruction)
        nbytes = 0.0
        words = 0
        for one in (instruction, *(here[name] for name in instruction.operands if name in here)):
            for array in arrays(one.shape):
                count = math.prod(array.dims)
                # Of what it cuts a slice from, an op reads no more than it writes.
                count = min(count, largest) if slices else count
                size = ELEMENT_BYTES.get(array.dtype, 0)
                nbytes += size * count
                words += max(size, 4) * count if size else 0
        return nbytes / words if words else 1.0

    def started(self, computation: str, done: Instruction) -> str:
        """Name of the start that a done waits for."""
        while not done.opcode.endswith("-start"):
            done = self.computations[computation][done.operands[0]]
        return done.name

    def collective(self, computation: str) -> Instruction | None:
        """The collective of a computation that a fusion or an asynchronous op calls."""
        inside = self.computations[computation].values()
        return next((one for one in inside if one.opcode in COLLECTIVES), None)

    def kind(self, instruction: Instruction) -> str:
        """The opcode; of fusions 'convolution fusion', 'copy fusion' (moves only) or 'fusion'."""
        if instruction.opcode != "fusion":
            return instruction.opcode
        opcodes = self._opcodes_of(instruction)
        if opcodes & {"convolution", "dot"}:
            return "convolution fusion"
        return "copy fusion" if opcodes <= FREE | MOVES | {"convert"} else "fusion"

    def _opcodes_of(self, instruction: Instruction) -> set[str]:
        """Its own, or those of what is fused into it."""
        if instruction.opcode != "fusion":
            return {instruction.opcode}
        inside = self.computations[instruction.called[0]].values()
        return set().union(*(self._opcodes_of(one) for one in inside))

    def origin(self, computation: str, instruction: Instruction, hops: int = 8) -> Instruction:
        """The instruction whose metadata tells where another comes from.

        Of a fusion around a matrix product, the product; of what the compiler put in, such as a
        copy, the producer of what it copies, in a loop that of the iteration before.
        """
        inside = []
        if instruction.opcode == "fusion":
            inside = [one for one in self.computations[instruction.called[0]].values() if one.scope]
        products = [one for one in inside if one.opcode in ("convolution", "dot")]
        if products or instruction.scope:
            return products[0] if products else instruction
        if inside or not hops:
            return inside[-1] if inside else instruction
        place = 1 if instruction.opcode.startswith("dynamic-update-slice") else 0
        here = self.computations[computation]
        element = self.element(computation, instruction.name)
        if element is not None and computation in self.loops:
            body = self.loops[computation][1].attribute("body").lstrip("%")
            before = self.root(body).operands[element]
            if self.element(body, before) != element:
                return self.origin(body, self.computations[body][before], hops - 1)
        if len(instruction.operands) <= place or instruction.operands[place] not in here:
            return instruction
        return self.origin(computation, here[instruction.operands[place]], hops - 1)

    def source(self, instruction: Instruction) -> str:
        """'file.py:123', the innermost line outside of packages and helpers; '' where unknown."""
        plain = _FILE.search(instruction.attributes)
        if plain:
            return f"{plain[1].rsplit('/', 1)[-1]}:{plain[2]}"
        match = _FRAME.search(instruction.attributes)
        frame = int(match[1]) if match else 0
        inner = ""
        while frame in self.frames:
            file, line, frame = self.frames[frame]
            name = file.rsplit("/", 1)[-1]
            here = f"{name}:{line}"
            if "site-packages/" not in file and name not in HELPERS:
                return here
            inner = inner or here
        return inner


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`.

    Raises:
      InputError: it is no scheduled module of partitioned HLO.
    """
    head = text[:200_000].split("\n", 1)[0]
    if not head.startswith("HloModule "):
        raise InputError(
            f"the text {head[:40]!r} is no HLO module; give compiled.as_text() of a program "
            "compiled for a TPU"
        )
    if "is_scheduled=true" not in head:
        raise InputError(
            f"{head.split(',')[0]} is not scheduled; give the text of the compiled program, not "
            "of the lowered one"
        )
    entry, computations = "", {}
    here: dict[str, Instruction] = {}
    for lines in _logical_lines(text):
        header = _HEADER.match(lines)
        if header:
            here = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        else:
            one = _instruction(lines)
            here[one.name] = one
    if not entry:
        raise InputError(f"{head.split(',')[0]} has no ENTRY computation; is the text cut off?")
    match = re.search(r"num_partitions=(\d+)", head)
    return Module(entry, computations, int(match[1]) if match else 1, _frames(text))


def _logical_lines(text: str) -> Iterator[str]:
    """Headers of computations and instructions, those that span several lines joined."""
    open_, inside = "", False
    for line in text.splitlines():
        if not inside:
            if line.endswith("{") and _HEADER.match(line):
                inside = True
                yield line
        elif line == "}" or line.startswith("}, execution_thread="):
            if open_:
                yield open_
            open_, inside = "", False
        elif _ASSIGN.match(line):
            if open_:
                yield open_
            open_ = line
        else:
            open_ += line


def _instruction(line: str) -> Instruction:
    """Parses one."""
    assign = _ASSIGN.match(line)
    start = assign.end() if assign else 0
    stop = _closing(line, start) if line.startswith("(", start) else line.find(" ", start)
    opcode = _OPCODE.match(line, stop) if assign else None
    if not opcode:
        raise InputError(f"the HLO instruction {line.strip()[:80]!r} is not understood")
    end = _closing(line, opcode.end() - 1)
    inner = line[opcode.end() : end - 1]
    operands = (inner,) if opcode[1] == "constant" else tuple(_OPERAND.findall(inner))
    return Instruction(
        assign[2], opcode[1], line[start:stop], operands, line[end:], bool(assign[1])
    )


def _closing(text: str, start: int) -> int:
    """The place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    return len(text)


def _frames(text: str) -> dict[int, tuple[str, int, int]]:
    """The tables of sources in front of the computations, joined."""
    tables: dict[str, dict[int, str]] = {}
    name = ""
    for line in text[: text.find("\n%")].splitlines():
        number, _, rest = line.partition(" ")
        if number.isdigit():
            tables[name][int(number)] = rest
        elif line:
            name = line
            tables[name] = {}
    fields = functools.partial(re.findall, r"(\w+)=(\d+)")
    places = {key: dict(fields(rest)) for key, rest in tables.get("FileLocations", {}).items()}
    frames = {}
    for key, rest in tables.get("StackFrames", {}).items():
        frame = dict(fields(rest))
        place = places.get(int(frame["file_location_id"]), {})
        file = tables["FileNames"].get(int(place.get("file_name_id", 0)), "")
        # Parents are printed one too high; the outermost frame has 1, which is none.
        parent = int(frame.get("parent_frame_id", 1)) - 1
        frames[key] = file.strip('"'), int(place.get("line", 0)), parent
    return frames


def groups(instruction: Instruction, partitions: int) -> list[list[int]]:
    """The replica groups, or (source, target) pairs, as positions among the partitions.

    XLA writes them as lists, as a reshaped and transposed iota or as axes of a mesh.

    Raises:
      InputError: in a form that is not known.
    """
    pairs = instruction.attribute("source_target_pairs")
    text = pairs or instruction.attribute("replica_groups")
    if text in ("", "{}"):
        return [list(range(partitions))]
    if text.startswith("{"):
        return [[int(i) for i in one.split(",")] for one in re.findall(r"\{([\d, ]+)\}", text)]
    iota = re.fullmatch(r"\[([\d,]+)\]<=(.*)", text)
    if iota:
        return _order(iota[2]).reshape(_sizes(iota[1])).tolist()
    mesh = _MESH.search(instruction.attributes)
    if not mesh:
        raise InputError(f"the replica groups {text!r} of {instruction.name} are not understood")
    return _mesh_groups(*mesh.groups())


def _sizes(text: str) -> tuple[int, ...]:
    """'8,8' -> (8, 8)."""
    return tuple(map(int, text.split(",")))


def _order(text: str) -> np.ndarray:
    """'[8,8]T(1,0)', an iota of that shape with its axes exchanged, or '0,4,1' -> flat ids."""
    match = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not match:
        if not re.fullmatch(r"[\d,]+", text):
            raise InputError(f"the device order {text!r} of the HLO is not understood")
        return np.array(_sizes(text))
    ids = np.arange(math.prod(_sizes(match[1]))).reshape(_sizes(match[1]))
    return (ids.transpose(_sizes(match[2])) if match[2] else ids).reshape(-1)


def _mesh_groups(axes: str, order: str | None, used: str) -> list[list[int]]:
    """Groups over the axes `used` of a mesh; one may be a part of an axis, 'x':(before)size."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    ids = _order(order) if order else np.arange(math.prod(sizes.values()))
    shape, spans = [], []
    parts = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", used)
    for name, size in sizes.items():
        mine = [(int(before or 1), int(part or size)) for n, before, part in parts if n == name]
        done = 1
        for before, part in sorted(mine):
            shape += [before // done, part]
            spans.append(len(shape) - 1)
            done = before * part
        shape.append(size // done)
    ids = ids.reshape(shape)
    rest = [axis for axis in range(len(shape)) if axis not in spans]
    return ids.transpose(rest + spans).reshape(-1, math.prod(shape[s] for s in spans)).tolist()


def trip_count(module: Module, caller: str, loop: Instruction) -> int | None:
    """How often a while loop runs, None when that is not known before it does.

    libtpu leaves no count on its loops: it is found from the comparison in the condition, the
    counter's first value and what the body adds to it.
    """
    known = re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition, body = (loop.attribute(name).lstrip("%") for name in ("condition", "body"))
    test = module.root(condition)
    if test.opcode != "compare" or test.attribute("direction") not in ("LT", "LE"):
        return None
    counter = module.element(condition, test.operands[0])
    limit = module.constant(condition, test.operands[1])
    if counter is None or limit is None:
        return None
    start = module.constant(caller, module.initial(caller, loop, counter))
    after = module.strip(body, module.root(body).operands[counter])
    steps = [module.constant(body, one) for one in after.operands] if after.opcode == "add" else []
    step = next((value for value in steps if value), None)
    if start is None or not step:
        return None
    return max(0, math.ceil((limit - start + (test.attribute("direction") == "LE")) / step))


_NOISE = re.compile(r"^(while|body|cond|closed_call|checkpoint|jit\([^)]*\))$")


def shortened(scope: str) -> str:
    """A name stack without the parts that say only how JAX got there."""
    return "/".join(part for part in scope.split("/") if not _NOISE.match(part))


def splash_flops(name: str, operands: Sequence[Array], results: Sequence[Array], mxu: int) -> int:
    """FLOPs of a splash attention kernel from its shapes, heads filled up to the MXU's side.

    The masks are constants that the text leaves out. One that is computed in the kernel (causal or
    local) shows in a further operand, the positions of the queries, and is taken for causal: half
    of the blocks of scores, and the diagonal's, are computed.
    """
    q, k = [array for array in operands if array.dtype in ("bf16", "f32", "f16")][:2]
    *heads, length, size = q.dims
    keys = k.dims[-2]
    kind = next(kind for kind in ("dkv", "dq", "fwd") if f"_{kind}" in name)
    if kind == "dkv" and sum(len(array.dims) >= len(q.dims) for array in results) > 2:
        kind = "fused"
    whole = PRODUCTS[kind] * 2 * math.prod(heads) * length * keys * math.ceil(size / mxu) * mxu
    per_token = {(length, LANES), (keys, LANES), (8, length), (8, keys)}
    integers = sum(array.dtype == "s32" and array.dims[-2:] in per_token for array in operands)
    if integers <= (2 if "_segmented" in name else 0):
        return whole
    blocks = operands[0].dims[-1]  # along the keys: of the table of masks
    return whole * (blocks + 1) // (2 * blocks)
