"""Reads the scheduled HLO that libtpu prints: computations, instructions, sources, trip counts.

It is one pass over the lines, since a real step is tens of megabytes. Nothing here knows about
time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

from qk_jax.base.errors import InputError

# Bytes of an element by HLO's name of its type; what is not listed (tokens, opaque) has none.
ELEMENT_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
    "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3b11fnuz": 1, "f4e2m1fn": 0.5,
}  # fmt: skip
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# Kinds of transfers between slices, by libtpu's names.
MEGASCALE = {kind.upper().replace("-", "_"): kind for kind in COLLECTIVES}
MEGASCALE["ONE_TO_ONE"] = "collective-permute"
# These take no time: they name, or address, what exists.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id "
    "opt-barrier add-dependency domain send-done".split()
)
FREE_TARGETS = frozenset(
    "AllocateBuffer ConcatBitcast SliceId PrepareAsyncCallStart PrepareAsyncCallDone Sharding "
    "AssumeGatherIndicesInBound GatherScatterIndicesBitpacked".split()
)
# These move or map elements, so that their bytes tell the time of those without an estimate.
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
# Files that every layer calls, so that their caller tells more.
HELPERS = ("qk_jax/models/layers.py", "qk_jax/sharding/specs.py")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\]")
_HEADER = re.compile(r"(ENTRY )?%(\S+) \(")
_ASSIGN = re.compile(r"\s+(ROOT )?%(\S+) = ")
_OPCODE = re.compile(r"\s*([a-z][a-z0-9-]*)\(")
_OPERAND = re.compile(r"%([^\s,()]+)")
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|branch_computations|true_computation|false_computation|"
    r"called_computations)=(?:%([^\s,{}]+)|\{([^}]*)\})"
)
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_METADATA = re.compile(r'(?<!\w)metadata=\{(?:op_type="[^"]*" )?(?:op_name="([^"]*)")?[^}]*\}')
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(((?:[^()]|\([^()]*\))*)\))? ?\{([^}]*)\}"
)
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_FILE = re.compile(r'source_file="([^"]*)" source_line=(\d+)')
_BRACKETS = re.compile(r"[\[({\])},]")
_SCOPE_NOISE = re.compile(r"^(while|body|cond|closed_call|checkpoint|eval_jaxpr|jit\([^)]*\))$")


@dataclasses.dataclass(frozen=True, slots=True)
class Array:
    """One array of a shape; `dtype` is HLO's name of the element type."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes without the padding of tiles."""
        return math.ceil(ELEMENT_BYTES.get(self.dtype, 0) * math.prod(self.dims))


@functools.lru_cache(maxsize=1 << 16)
def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape as it is printed, a tuple's in order."""
    return tuple(
        Array(dtype, tuple(map(int, dims.split(","))) if dims else ())
        for dtype, dims in _ARRAY.findall(shape)
    )


@dataclasses.dataclass(slots=True)
class Instruction:
    """One scheduled instruction.

    Attributes:
      computation: that it is part of.
      name: without the '%'.
      opcode: 'fusion', 'all-gather', ...
      shape: of the result, as it is printed.
      operands: names; of a constant, the literal.
      attributes: the text after the operands.
      root: whether it is its computation's result.
    """

    computation: str
    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return sum(array.nbytes for array in arrays(self.shape))

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate of one execution, None without one."""
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
        """JAX's name stack, '' without one."""
        match = _METADATA.search(self.attributes)
        return (match[1] or "") if match else ""

    @property
    def short_scope(self) -> str:
        """The name stack without the parts that say only how JAX got there."""
        return "/".join(part for part in self.scope.split("/") if not _SCOPE_NOISE.match(part))

    @property
    def target(self) -> str:
        """The target of a custom call."""
        return self.attribute("custom_call_target").strip('"')

    @property
    def rendezvous(self) -> str:
        """The name that a send between slices shares with its receive."""
        match = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', self.attributes)
        return match[1] if match else self.name

    def attribute(self, name: str) -> str:
        """The text of `name=...` up to the next comma outside brackets, '' if it is absent."""
        _, found, rest = self.attributes.partition(f", {name}=")
        return rest[: _end(rest, 0, ",")] if found else ""

    @property
    def body(self) -> str:
        """The computation that a loop runs."""
        return self.attribute("body").removeprefix("%")


def _end(text: str, start: int, stop: str) -> int:
    """The position of the first `stop` outside of the brackets that open after `start`."""
    depth = 0
    for match in _BRACKETS.finditer(text, start):
        if match[0] == stop and not depth:
            return match.start()
        depth += (match[0] in "[({") - (match[0] in "])}")
    return len(text)


@dataclasses.dataclass(frozen=True)
class Module:
    """A scheduled module.

    Attributes:
      entry: name of the computation that runs.
      computations: instructions of each by name, in the order of the schedule.
      partitions: devices that it runs on; for several slices, those of one.
      frames: (file, line, parent's id) by stack_frame_id.
    """

    entry: str
    computations: dict[str, dict[str, Instruction]]
    partitions: int
    frames: dict[int, tuple[str, int, int]]

    @functools.cached_property
    def loops(self) -> dict[str, Instruction]:
        """The while instruction that runs each loop's body or condition."""
        return {
            called: one
            for instructions in self.computations.values()
            for one in instructions.values()
            if one.opcode == "while"
            for called in one.called
        }

    def root(self, computation: str) -> Instruction:
        """The instruction whose result a computation returns."""
        return next(one for one in self.computations[computation].values() if one.root)

    def operand(self, one: Instruction, index: int) -> Instruction:
        """The instruction whose result an instruction reads as one of its operands."""
        return self.computations[one.computation][one.operands[index]]

    def operands(self, one: Instruction) -> list[Instruction]:
        """All of them that are instructions."""
        here = self.computations[one.computation]
        return [here[name] for name in one.operands if name in here]

    def operand_bytes(self, one: Instruction) -> int:
        """Bytes of all operands."""
        return sum(operand.nbytes for operand in self.operands(one))

    def strip(self, one: Instruction) -> Instruction:
        """The instruction that another is a copy or a bitcast of."""
        while one.opcode in ("copy", "bitcast", "copy-done", "copy-start", "convert"):
            one = self.operand(one, 0)
        return one

    def element(self, one: Instruction) -> int | None:
        """The index of a value in the state of its loop, None if it is none of its elements."""
        one = self.strip(one)
        if one.opcode != "get-tuple-element" or self.operand(one, 0).opcode != "parameter":
            return None
        return int(one.attribute("index"))

    def initial(self, loop: Instruction, element: int) -> Instruction:
        """The initial value of an element of a loop's state."""
        return self.operand(self.operand(loop, 0), element)

    def constant(self, one: Instruction) -> int | None:
        """The integer that a value always is, also if loops pass it on; None otherwise."""
        one = self.strip(one)
        if one.opcode == "constant":
            return int(one.operands[0]) if re.fullmatch(r"-?\d+", one.operands[0]) else None
        element, loop = self.element(one), self.loops.get(one.computation)
        if element is None or loop is None:
            return None
        if self.element(self.operand(self.root(loop.body), element)) != element:
            return None
        return self.constant(self.initial(loop, element))

    def width(self, op: Instruction) -> float:
        """Bytes of an op's operands and results over those that its estimate is for.

        Outside of matrix products libtpu 0.0.42 estimates narrow elements as if they had 32 bits:
        x * x * x + x of 16384 x 16384 is 1.07 ms on v5p and 1.62 ms on v6e in float32, bfloat16
        and int8 alike. In float32 that is 0.72 and 0.81 of the bandwidth of HBM.
        """
        largest = max((math.prod(array.dims) for array in arrays(op.shape)), default=0)
        slices = "dynamic-slice" in self._opcodes(op)
        nbytes = words = 0.0
        for one in (op, *self.operands(op)):
            for array in arrays(one.shape):
                count = math.prod(array.dims)
                # An op reads no more of what it slices than it writes.
                count = min(count, largest) if slices else count
                size = ELEMENT_BYTES.get(array.dtype, 0)
                nbytes += size * count
                words += max(size, 4) * count if size else 0
        return nbytes / words if words else 1.0

    def started(self, one: Instruction) -> Instruction:
        """The start that an update goes on with or a done waits for."""
        while not one.opcode.endswith("-start"):
            one = self.operand(one, 0)
        return one

    def collective(self, computation: str) -> Instruction | None:
        """The collective of a computation that a fusion or an asynchronous op calls."""
        inside = self.computations[computation].values()
        return next((one for one in inside if one.opcode in COLLECTIVES), None)

    def kind(self, one: Instruction) -> str:
        """The opcode; of fusions 'convolution fusion', 'copy fusion' (moves only) or 'fusion'."""
        if one.opcode != "fusion":
            return one.opcode
        opcodes = self._opcodes(one)
        if opcodes & {"convolution", "dot"}:
            return "convolution fusion"
        return "copy fusion" if opcodes <= FREE | MOVES | {"convert"} else "fusion"

    def _opcodes(self, one: Instruction) -> set[str]:
        """Its own, or those of the computation that it fuses."""
        if one.opcode != "fusion":
            return {one.opcode}
        inside = self.computations[one.called[0]].values()
        return set().union(*map(self._opcodes, inside))

    def origin(self, one: Instruction, hops: int = 8) -> Instruction:
        """The instruction whose metadata tells where another comes from.

        For a fusion around a matrix product it is the product; for one that the compiler inserted,
        such as a copy, the producer of its operand, in a loop that of the iteration before.
        """
        if one.opcode == "fusion":
            inside = [part for part in self.computations[one.called[0]].values() if part.scope]
            products = [part for part in inside if part.opcode in ("convolution", "dot")]
            if products or (inside and not one.scope):
                return products[0] if products else inside[-1]
        if one.scope or not hops:
            return one
        element, loop = self.element(one), self.loops.get(one.computation)
        if element is not None and loop is not None:
            before = self.operand(self.root(loop.body), element)
            if self.element(before) != element:
                return self.origin(before, hops - 1)
        index = 1 if "update" in one.opcode else 0  # the part, not the buffer or the start
        name = "".join(one.operands[index : index + 1])
        producer = self.computations[one.computation].get(name)
        return one if producer is None else self.origin(producer, hops - 1)

    def source(self, instruction: Instruction) -> str:
        """'file.py:123', the innermost line outside of packages and helpers; '' if unknown."""
        plain = _FILE.search(instruction.attributes)
        if plain:
            return f"{plain[1].rsplit('/', 1)[-1]}:{plain[2]}"
        match = _FRAME.search(instruction.attributes)
        frame = int(match[1]) if match else 0
        inner = ""
        while frame in self.frames:
            file, line, frame = self.frames[frame]
            here = f"{file.rsplit('/', 1)[-1]}:{line}"
            if "site-packages/" not in file and not file.endswith(HELPERS):
                return here
            inner = inner or here
        return inner


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`.

    Raises:
      InputError: it is no scheduled module.
    """
    head = text[:200_000].partition("\n")[0]
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
    entry = ""
    computations: dict[str, dict[str, Instruction]] = {}
    for lines in _logical_lines(text):
        header = _HEADER.match(lines)
        if header:
            name = header[2]
            computations[name] = {}
            entry = name if header[1] else entry
        else:
            one = _instruction(name, lines)
            computations[name][one.name] = one
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


def _instruction(computation: str, line: str) -> Instruction:
    assign = _ASSIGN.match(line)
    start = assign.end() if assign else 0
    stop = _end(line, start + 1, ")") + 1 if line.startswith("(", start) else line.find(" ", start)
    opcode = _OPCODE.match(line, stop)
    if not assign or not opcode:
        raise InputError(f"the HLO instruction {line.strip()[:80]!r} is not understood")
    end = _end(line, opcode.end(), ")")
    inner = line[opcode.end() : end]
    operands = (inner,) if opcode[1] == "constant" else tuple(_OPERAND.findall(inner))
    return Instruction(
        computation, assign[2], opcode[1], line[start:stop], operands, line[end + 1 :],
        bool(assign[1]),
    )  # fmt: skip


def _frames(text: str) -> dict[int, tuple[str, int, int]]:
    """The tables of sources that precede the computations, joined."""
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
    locations = {key: dict(fields(rest)) for key, rest in tables.get("FileLocations", {}).items()}
    frames = {}
    for key, rest in tables.get("StackFrames", {}).items():
        frame = dict(fields(rest))
        at = locations.get(int(frame["file_location_id"]), {})
        file = tables["FileNames"].get(int(at.get("file_name_id", 0)), "")
        # Parents are printed one too high; the outermost frame has 1, which is none.
        parent = int(frame.get("parent_frame_id", 1)) - 1
        frames[key] = file.strip('"'), int(at.get("line", 0)), parent
    return frames


def groups(instruction: Instruction, partitions: int) -> list[list[int]]:
    """The replica groups, or (source, target) pairs, as positions among the partitions.

    XLA writes them as lists, as a reshaped and transposed iota or as axes of a mesh.

    Raises:
      InputError: they have another form.
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


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How often a while loop runs, None if that is unknown before it does.

    libtpu leaves no count on its loops: it follows from the comparison in the condition, the
    counter's first value and what the body adds to it.
    """
    known = re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    test = module.root(loop.attribute("condition").removeprefix("%"))
    direction = test.attribute("direction")
    if test.opcode != "compare" or direction not in ("LT", "LE"):
        return None
    counter = module.element(module.operand(test, 0))
    limit = module.constant(module.operand(test, 1))
    if counter is None or limit is None:
        return None
    start = module.constant(module.initial(loop, counter))
    after = module.strip(module.operand(module.root(loop.body), counter))
    steps = map(module.constant, module.operands(after)) if after.opcode == "add" else ()
    step = next(filter(None, steps), None)
    if start is None or not step:
        return None
    return max(0, math.ceil((limit - start + (direction == "LE")) / step))
