"""The estimate: its reading of HLO, and its figures, on small texts."""

import dataclasses
import pathlib
import types

import numpy as np
import pytest

import qk_jax
from qk_jax.base.errors import InputError
from qk_jax.bench.schedule import hlo_text, kernels, topologies, walk

V5E = topologies.parse("v5e-16")
SPEC = V5E.spec
CYCLES = round(SPEC.clock_hz / 1000)  # a millisecond
HEAD = (
    "HloModule jit_f, is_scheduled=true, entry_computation_layout={{()->f32[]}}, num_partitions={}"
)


@dataclasses.dataclass
class Chip:
    """A device as far as prices go."""

    coords: tuple[int, int, int]
    core_on_chip: int = 0
    slice_index: int = 0


def chips(shape, axes, count=1):
    """A mesh over the 4 x 4 chips of `count` v5e slices."""
    one = [[Chip((x, y, 0), 0, part) for y in range(4) for x in range(4)] for part in range(count)]
    devices = np.empty(16 * count, dtype=object)
    devices[:] = sum(one, [])
    return types.SimpleNamespace(devices=devices.reshape(shape), axis_names=axes, size=devices.size)


FSDP = chips((1, 16), ("data", "fsdp"))
BOTH = chips((4, 4), ("data", "fsdp"))


def cost(cycles=CYCLES):
    """backend_config of an op with an estimate."""
    return 'backend_config={"window_config":{"estimated_cycles":"' + str(cycles) + '"}}'


def text(*entry, before="", partitions=16, tables=""):
    """A module whose entry has these instructions."""
    lines = "\n".join(f"  {line}" for line in entry)
    return (
        f"{HEAD.format(partitions)}\n\n{tables}\n{before}\n"
        f"ENTRY %main (p: f32[256,128]) -> f32[256,128] {{\n"
        f"  %p = f32[256,128]{{1,0:T(8,128)}} parameter(0)\n{lines}\n}}\n"
    )


def work(name, operand="p", cycles=CYCLES):
    """An op of so many cycles."""
    return f"%{name} = f32[256,128]{{1,0}} exponential(%{operand}), {cost(cycles)}"


def loop(trip=4, start=0, step=1, known="", body=()):
    """Computations and instructions of a while loop."""
    state = "(s32[], f32[256,128]{1,0:T(8,128)})"
    lines = "\n".join(f"  {line}" for line in body)
    before = f"""
%body (s: {state}) -> {state} {{
  %s = {state} parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%s), index=0
  %p = f32[256,128]{{1,0}} get-tuple-element(%s), index=1
  %copy.1 = s32[]{{:T(128)S(6)}} copy(%i)
  %by = s32[] constant({step})
  %next = s32[]{{:T(128)}} add(%copy.1, %by)
{lines}
  ROOT %out = {state} tuple(%next, %p)
}}

%condition (s: {state}) -> pred[] {{
  %s = {state} parameter(0)
  %limit = s32[] constant({trip})
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}}
"""
    return before, (
        f"%first = s32[] constant({start})",
        f"%init = {state} tuple(%first, %p)",
        f"%while.1 = {state} while(%init), condition=%condition, body=%body{known}",
    )


def ms(count):
    """So many milliseconds, in seconds."""
    return pytest.approx(count * 1e-3, rel=1e-3)


# --- reading ------------------------------------------------------------------------------------


def test_shapes_attributes_and_lines():
    module = hlo_text.parse(
        text(
            "%t = (bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[]{:T(128)}) custom-call(%p), "
            'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={',
            '"a":"(x, y)"',
            '}}, metadata={op_name="jit(f)/mul" stack_frame_id=2}, backend_config={"a":[1,2]}',
            "ROOT %r = f32[] get-tuple-element(%t), index=1",
        )
    )
    call, root = module.computations["main"]["t"], module.root("main")
    assert (call.opcode, call.operands, call.target) == ("custom-call", ("p",), "tpu_custom_call")
    assert call.scope == "jit(f)/mul" and call.nbytes == 2 * 3 * 2 + 4
    assert (root.name, root.attribute("index"), root.attribute("missing")) == ("r", "1", "")
    assert module.partitions == 16 and module.entry == "main"


@pytest.mark.parametrize(
    "attribute,expected",
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", [[3, 2], [1, 0]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_replica_groups(attribute, expected):
    line = f"%c = f32[8] all-reduce(%p), channel_id=1, {attribute}, use_global_device_ids=true"
    one = hlo_text.parse(text(line)).computations["main"]["c"]
    assert hlo_text.groups(one, 4) == expected


def test_source_is_the_callers_outside_of_packages_and_helpers():
    root = pathlib.Path(qk_jax.__file__).parent.parent
    assert all((root / name).is_file() for name in hlo_text.HELPERS)
    tables = """FileNames
1 "/home/me/qk_jax/models/mmdit.py"
2 "/home/me/qk_jax/models/layers.py"
3 "/venv/lib/python3.11/site-packages/flax/linen/linear.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=10 end_line=10 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=20 end_line=20 column=1 end_column=2}
3 {file_name_id=3 function_name_id=1 line=30 end_line=30 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
"""
    line = work("a") + ', metadata={op_name="jit(f)/while/body/mlp/dot" stack_frame_id=3}'
    (op,) = walk.estimate(text(line, tables=tables), FSDP, V5E).ops
    assert (op.source, op.scope, op.kind) == ("mmdit.py:10", "mlp/dot", "exponential")


def test_copy_of_the_compilers_is_its_producers():
    named = work("a") + ', metadata={op_name="jit(f)/exp" source_file="x/y.py" source_line=7}'
    copied = f"%b = f32[256,128]{{0,1}} copy(%a), {cost()}"
    ops = walk.estimate(text(named, copied), FSDP, V5E).ops
    assert {op.source for op in ops} == {"y.py:7"}


@pytest.mark.parametrize(
    "given,message",
    [
        ("Hello", "'Hello' is no HLO module"),
        ("HloModule jit_f, num_partitions=16\n", "jit_f is not scheduled"),
        (HEAD.format(16), "has no ENTRY"),
        (text("%a = f32[8] copy(%p)"), "no estimated_cycles"),
        (text(work("a"), partitions=8), "runs on 8 devices, the mesh has 16"),
        (text(work("a"), "%b = oops"), "'%b = oops' is not understood"),
        (
            text(work("a"), "%c = f32[8] all-reduce(%p), channel_id=1, replica_groups=new"),
            "'new' of c are not understood",
        ),
    ],
)
def test_what_is_no_module_of_this_mesh_is_an_error(given, message):
    with pytest.raises(InputError, match=message):
        walk.estimate(given, FSDP, V5E)


# --- time of ops --------------------------------------------------------------------------------


def test_op_is_its_cycles_and_a_fusion_is_not_counted_twice():
    before = f"""
%inside (q: f32[256,128]) -> f32[256,128] {{
  %q = f32[256,128]{{1,0}} parameter(0)
  ROOT %e = f32[256,128]{{1,0}} exponential(%q), {cost(9 * CYCLES)}
}}
"""
    fusion = f"%f = f32[256,128]{{1,0}} fusion(%p), kind=kLoop, calls=%inside, {cost()}"
    found = walk.estimate(text(fusion, work("a"), before=before), FSDP, V5E)
    assert found.compute_s == ms(2) and found.step_time_s == found.compute_s
    assert sorted(op.kind for op in found.ops) == ["exponential", "fusion"]


def test_bytes_of_narrow_elements_are_put_right():
    narrow = f"%a = bf16[256,128]{{1,0}} copy(%q), {cost()}"
    stack = f"%c = bf16[256,128]{{1,0}} dynamic-slice(%s, %i), {cost()}"
    found = walk.estimate(
        text(
            "%q = bf16[256,128]{1,0} parameter(1)",
            "%s = f32[60,256,128]{1,0} parameter(2)",
            "%i = s32[] parameter(3)",
            narrow,
            stack,
        ),
        FSDP,
        V5E,
    )
    assert {op.kind: round(op.seconds * 1e3, 4) for op in found.ops} == {
        "copy": 0.5,
        "dynamic-slice": 0.75,
    }


@pytest.mark.parametrize(
    "keywords,times",
    [
        ({}, 4),
        ({"start": 1}, 3),
        ({"trip": 8, "step": 2}, 4),
        ({"known": ', backend_config={"known_trip_count":{"n":"7"}}'}, 7),
    ],
)
def test_loop_counts_as_often_as_it_runs(keywords, times):
    before, entry = loop(body=(work("a"),), **keywords)
    found = walk.estimate(text(*entry, before=before), FSDP, V5E)
    assert found.compute_s == ms(times)
    assert {op.count for op in found.ops if op.kind == "exponential"} == {times}
    assert not found.unpriced


def test_nested_loops_multiply():
    before, entry = loop(body=(work("a"),))
    inner = "\n".join(f"  {line}" for line in entry)
    outer, entry = loop(trip=3, body=(inner.replace("while.1", "while.2"),))
    for name in ("body", "condition"):
        outer = outer.replace(f"%{name} (", f"%outer_{name} (")
        entry = tuple(line.replace(f"={'%'}{name}", f"=%outer_{name}") for line in entry)
    found = walk.estimate(text(*entry, before=before + outer), FSDP, V5E)
    assert found.compute_s == ms(12)


def test_unknown_trip_count_is_said():
    before, entry = loop(body=(work("a"),))
    before = before.replace("constant(4)", "parameter(1)")
    found = walk.estimate(text(*entry, before=before), FSDP, V5E)
    assert found.unpriced == ("while.1 (runs an unknown number of times; counted once)",)


def test_most_expensive_branch_counts():
    before = "".join(
        f"%branch_{i} (p: f32[256,128]) -> f32[256,128] {{\n"
        f"  %p = f32[256,128]{{1,0}} parameter(0)\n  ROOT {work('a', cycles=n * CYCLES)}\n}}\n\n"
        for i, n in enumerate((1, 5))
    )
    entry = (
        "%i = s32[] constant(0)",
        "%c = f32[256,128] conditional(%i, %p, %p), branch_computations={%branch_0, %branch_1}",
    )
    assert walk.estimate(text(*entry, before=before), FSDP, V5E).compute_s == ms(5)


def test_ops_without_an_estimate():
    found = walk.estimate(
        text(
            work("a"),
            "%scalar = f32[] multiply(%x, %x)",
            "%big = f32[1024,1024,128] copy(%huge)",
            "%sorted = f32[256,128] sort(%p), dimensions={0}",
            "%huge = f32[1024,1024,128] parameter(1)",
        ),
        FSDP,
        V5E,
    )
    assert found.unpriced == ("sorted",)
    by_name = {op.name: op.seconds for op in found.ops}
    assert by_name["scalar"] < 1e-9
    assert by_name["big"] == pytest.approx(2 * 2**29 / SPEC.hbm_bandwidth, rel=1e-3)


def test_copies_hide_and_what_is_waited_for_counts():
    start = "%s = (f32[1024,1024,128]{2,1,0S}, f32[1024,1024,128]{2,1,0}, u32[]) copy-start(%h)"
    done = "%d = f32[1024,1024,128]{2,1,0S} copy-done(%s)"
    huge = "%h = f32[1024,1024,128]{2,1,0} parameter(1)"
    whole = 2**29 / SPEC.hbm_bandwidth
    chip = text(huge, start.replace("0S", "0:S(1)"), work("a"), done)
    assert walk.estimate(chip, FSDP, V5E).compute_s == pytest.approx(max(whole, 1e-3), rel=1e-3)
    host = text(huge, start.replace("0S", "0:S(5)"), work("a"), done)
    found = walk.estimate(host, FSDP, V5E)
    assert found.compute_s == pytest.approx(2**29 / walk.HOST_BANDWIDTH, rel=1e-3)
    assert found.ops[0].kind == "async copy"


def test_update_of_a_buffer_on_the_host_costs_the_update():
    entry = (
        "%h = f32[60,256,128]{2,1,0:S(5)} parameter(1)",
        work("a"),
        "%s = ((f32[60,256,128]{2,1,0:S(5)}, f32[256,128]{1,0}, s32[]), "
        "f32[60,256,128]{2,1,0:S(5)}, u32[]) dynamic-update-slice-start(%h, %a, %i)",
        "%d = f32[60,256,128]{2,1,0:S(5)} dynamic-update-slice-done(%s)",
    )
    waited = walk.estimate(text(*entry), FSDP, V5E).step_time_s - 1e-3
    assert waited == pytest.approx(256 * 128 * 4 / walk.HOST_BANDWIDTH, rel=1e-3)


# --- collectives --------------------------------------------------------------------------------

ALONG = "replica_groups=mesh['a'=4,'b'=4] {'b'}"  # 'fsdp' of BOTH
ACROSS = "replica_groups=mesh['a'=4,'b'=4] {'a'}"  # 'data' of BOTH
GATHERED = 256 * 128 * 4 * 4


def gather(number, groups=ALONG):
    """(start, done) of an all-gather over four chips."""
    shape = "f32[1024,128]{1,0}"
    return (
        f"%g.{number} = (f32[256,128]{{1,0}}, {shape}) all-gather-start(%p), "
        f"channel_id={number}, {groups}, dimensions={{0}}, use_global_device_ids=true",
        f"%gd.{number} = {shape} all-gather-done(%g.{number})",
    )


def seconds(kind="all-gather", nbytes=GATHERED, group=range(4), mesh=BOTH):
    return topologies.collective_seconds(kind, nbytes, [mesh.devices.flat[i] for i in group], V5E)


def test_asynchronous_collective_hides_behind_what_is_scheduled():
    start, done = gather(1)
    half = int(seconds() / 2 * SPEC.clock_hz)
    found = walk.estimate(text(start, work("a", cycles=half), done), BOTH, V5E)
    (one,) = found.collectives
    assert (one.kind, one.axes, one.group_size) == ("all-gather", ("fsdp",), 4)
    assert (one.nbytes, one.count, one.asynchronous) == (GATHERED, 1, True)
    assert one.seconds == pytest.approx(seconds())
    assert one.exposed_seconds == pytest.approx(seconds() / 2, rel=1e-3)
    hidden = walk.estimate(text(start, work("a"), done), BOTH, V5E)
    assert hidden.exposed_comm_s == 0 and hidden.step_time_s == ms(1)
    assert hidden.comm_s == pytest.approx(seconds())


def test_start_with_nothing_before_its_done_is_synchronous():
    found = walk.estimate(text(*gather(1), work("a")), BOTH, V5E)
    assert not found.collectives[0].asynchronous
    assert found.exposed_comm_s == pytest.approx(seconds())


@pytest.mark.parametrize("groups,factor", [(ALONG, 2), (ACROSS, 1)])
def test_collectives_share_the_links_of_their_mesh_axes(groups, factor):
    first, second = gather(1), gather(2, groups)
    entry = (first[0], second[0], work("a", cycles=1), first[1], second[1])
    found = walk.estimate(text(*entry), BOTH, V5E)
    assert found.exposed_comm_s == pytest.approx(factor * seconds(), rel=1e-2)
    assert sum(one.count for one in found.collectives) == 2


def test_permutes_the_two_ways_around_a_ring_do_not_share():
    def permute(number, step):
        pairs = ",".join(f"{{{i},{(i + step) % 4}}}" for i in range(4))
        shape = "f32[256,128]{1,0}"
        return (
            f"%c.{number} = ({shape}, {shape}, u32[], u32[]) collective-permute-start(%p), "
            f"channel_id={number}, source_target_pairs={{{pairs}}}",
            f"%cd.{number} = {shape} collective-permute-done(%c.{number})",
        )

    once = seconds("collective-permute", GATHERED // 4, (0, 1))
    for steps, factor in (((1, 3), 1), ((1, 1), 2)):
        (a, da), (b, db) = permute(1, steps[0]), permute(2, steps[1])
        found = walk.estimate(text(a, b, work("w", cycles=1), da, db), BOTH, V5E)
        assert found.exposed_comm_s == pytest.approx(factor * once, rel=1e-2)
        assert {one.group_size for one in found.collectives} == {2}


def test_collectives_of_a_loop_hold_up_one_outside():
    line = f"%r = f32[256,128]{{1,0}} all-reduce(%p), channel_id=3, {ALONG}, to_apply=%add"
    before, entry = loop(body=(line,))
    start, done = gather(1)
    found = walk.estimate(text(work("a", cycles=1), start, *entry, done, before=before), BOTH, V5E)
    inner = seconds("all-reduce", 256 * 128 * 4)
    assert found.exposed_comm_s == pytest.approx(4 * inner + seconds(), rel=1e-2)
    assert found.collectives[0].count == 4


def test_async_collective_fusion_is_one_collective():
    shape = "f32[1024,128]{1,0}"
    body = (
        f"  %q = f32[256,128]{{1,0}} parameter(0)\n  %g = {shape} all-gather(%q), channel_id=5, "
        f'{ALONG}, dimensions={{0}}, frontend_attributes={{chain_id="2"}}\n'
    )
    before = "\n".join(
        f"%{name} (q: f32[256,128]) -> {shape} {{\n{body}{root}\n}}\n"
        for name, root in (
            (
                "begin",
                f'  ROOT %s = {shape} custom-call(%g), custom_call_target="AsyncCollectiveStart"',
            ),
            ("beside", f"  ROOT %e = {shape} exponential(%g)"),
            (
                "end",
                f'  ROOT %d = {shape} custom-call(%g), custom_call_target="AsyncCollectiveDone"',
            ),
        )
    )
    entry = (
        f"%acs = {shape} fusion(%p), kind=kCustom, calls=%begin",
        f"%acf = {shape} fusion(%acs), kind=kCustom, calls=%beside, {cost()}",
        f"%acd = {shape} fusion(%acf), kind=kCustom, calls=%end",
    )
    found = walk.estimate(text(*entry, before=before), BOTH, V5E)
    (one,) = found.collectives
    assert (one.count, one.asynchronous, one.exposed_seconds) == (1, True, 0.0)
    assert found.step_time_s == ms(1) and not found.unpriced


def test_fusion_of_an_all_reduce_and_a_slice_is_a_reduce_scatter():
    before = f"""
%all-reduce-scatter (q: bf16[1024,128]) -> bf16[256,128] {{
  %q = bf16[1024,128]{{1,0}} parameter(0)
  %r = bf16[1024,128]{{1,0}} all-reduce(%q), channel_id=1, {ALONG}, to_apply=%add
  ROOT %s = bf16[256,128]{{1,0}} dynamic-slice(%r, %i), dynamic_slice_sizes={{256,128}}
}}
"""
    line = "%f = bf16[256,128]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter"
    found = walk.estimate(text(line, work("a"), before=before), BOTH, V5E)
    (one,) = found.collectives
    assert (one.kind, one.nbytes, one.asynchronous) == ("reduce-scatter", 1024 * 128 * 2, False)
    assert one.exposed_seconds == pytest.approx(seconds("reduce-scatter", 2**18))
    assert found.compute_s == ms(1) and not found.unpriced


def test_collective_on_another_core():
    before = f"""
%called (q: bf16[1024,128]) -> bf16[256,128] {{
  %q = bf16[1024,128]{{1,0}} parameter(0)
  ROOT %s = bf16[256,128]{{1,0}} reduce-scatter(%q), channel_id=1, {ALONG}, to_apply=%add
}}, execution_thread="sparsecore"
"""
    entry = (
        "%c = ((bf16[1024,128]), bf16[256,128]) call-start(%p), "
        'async_execution_thread="sparsecore", to_apply=%called',
        work("a"),
        "%d = bf16[256,128] call-done(%c)",
    )
    (one,) = walk.estimate(text(*entry, before=before), BOTH, V5E).collectives
    assert (one.kind, one.nbytes, one.asynchronous) == ("reduce-scatter", 1024 * 128 * 2, True)


def test_collective_that_gets_its_operand_after_its_start():
    """As libtpu 0.0.50 offloads collectives: the data comes with an update of the call."""
    before = f"""
%called (q: bf16[1024,128]) -> bf16[256,128] {{
  %q = bf16[1024,128]{{1,0}} parameter(0)
  ROOT %s = bf16[256,128]{{1,0}} reduce-scatter(%q), channel_id=1, {ALONG}, to_apply=%add
}}, execution_thread="sparsecore"
"""
    shape = "((bf16[1024,128]), bf16[256,128])"
    entry = (
        '%c = ((), (), (s32[1])) call-start(), async_execution_thread="sparsecore", '
        "to_apply=%called",
        work("a"),
        f"%u = {shape} call-update(%c, %p)",
        work("b", cycles=10),
        "%d = bf16[256,128] call-done(%u)",
    )
    found = walk.estimate(text(*entry, before=before), BOTH, V5E)
    (one,) = found.collectives
    assert (one.kind, one.count, one.asynchronous) == ("reduce-scatter", 1, True)
    assert one.exposed_seconds == pytest.approx(one.seconds, rel=1e-2) and not found.unpriced
    assert found.compute_s == ms(1)


def test_sends_between_slices_are_collectives_over_dcn():
    mesh = chips((2, 16), ("data", "fsdp"), 2)
    names = (
        'frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",'
        '_xla_megascale_target="{1,2}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    shape = "(f32[256,128]{1,0}, u32[], token[])"
    whole = "replica_groups={{0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}}"
    entry = (
        "%t = token[] after-all()",
        f"%s = {shape} send(%p, %t), channel_id=2, is_host_transfer=true, {names}",
        f"%r = {shape} recv(%t), channel_id=1, is_host_transfer=true, {names}",
        f"%g = f32[4096,128]{{1,0}} all-gather(%p), channel_id=3, {whole}, dimensions={{0}}",
        work("a", cycles=1),
        "%sd = token[] send-done(%s), channel_id=2, is_host_transfer=true",
        "%rd = (f32[256,128], token[]) recv-done(%r), channel_id=1, is_host_transfer=true",
    )
    where = topologies.parse("2x v5e-16")
    found = walk.estimate(text(*entry), mesh, where)
    dcn, ici = sorted(found.collectives, key=lambda one: one.kind, reverse=True)
    assert (dcn.kind, dcn.axes, dcn.group_size, dcn.nbytes) == ("all-reduce", ("data",), 2, 2**17)
    assert dcn.seconds == pytest.approx(2**17 / SPEC.dcn_bandwidth)
    assert (ici.kind, ici.axes, ici.group_size) == ("all-gather", ("fsdp",), 16)
    # They use other links: the longer hides the shorter.
    assert found.exposed_comm_s == pytest.approx(max(dcn.seconds, ici.seconds), rel=1e-2)


# --- attention kernels --------------------------------------------------------------------------

FULL = 2 * 2 * 16 * 2048 * 2048 * 128  # of one product: 2 rows, 16 heads


@pytest.mark.parametrize(
    "name,results,extra,mxu,products",
    [
        ("fwd_segmented_residuals.1", 1, "", 128, 2),
        ("fwd_segmented_residuals.1", 1, "s32[2048,128]", 128, 2 * 5 / 8),  # causal, 4 x 4 blocks
        ("dq_segmented_no_residuals.1", 1, "", 128, 3),
        ("dkv_segmented_no_residuals.1", 2, "", 128, 4),
        ("dkv_segmented_no_residuals.1", 3, "", 128, 5),
        ("fwd_segmented_residuals.1", 1, "", 256, 4),
    ],
)
def test_flops_of_splash_kernels(name, results, extra, mxu, products):
    heads = "bf16[2,16,2048,128]"
    operands = f"s8[1,4,4] s8[1,4,4] {heads} {heads} {heads} s32[2,2048,128] s32[2,8,2048] {extra}"
    found = kernels.splash_flops(
        f"splash_mha_{name}",
        hlo_text.arrays(operands),
        hlo_text.arrays("f32[2,512,128] " + results * f"{heads} "),
        mxu,
    )
    assert found == products * FULL


def test_pallas_call_that_states_its_flops():
    flops = int(1e-3 * kernels.FORWARD_EFFICIENCY * SPEC.peak_flops)
    config = f'"custom_call_config":{{"body":"x","cost_estimate":{{"flops":"{flops}"}}}}'
    call = 'f32[256,128] custom-call(%p), custom_call_target="tpu_custom_call"'
    entry = (
        f"%mine = {call}, backend_config={{{config}}}",
        f"%unknown = {call}, {cost()}",
    )
    found = walk.estimate(text(*entry), BOTH, V5E)
    assert found.attention_s == ms(1) and found.compute_s == 0
    assert found.unpriced == ("unknown",)
