"""The estimate of programs that libtpu compiles, against what is known of them."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qk_jax import sharding
from qk_jax.bench.schedule import estimates, topologies, walk
from qk_jax.models.attention import attention


@pytest.fixture(autouse=True, scope="module")
def uncached(libtpu):
    """Programs for devices that are not here can be written to JAX's cache, but not read again."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    yield
    jax.config.update(name, before)


@functools.cache
def mesh_of(name, axes="data=-1", slices=1):
    """(slice, mesh)."""
    where = topologies.parse(name)
    across = {"data": slices} if slices > 1 else None
    return where, sharding.build_mesh(sharding.parse(axes), topologies.devices(where), across)


def shaped(mesh, shape, *spec, dtype=jnp.bfloat16):
    """An array to compile for."""
    sharding_ = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_)


def estimate(setup, function, *args):
    """The estimate of a function; every one must add up."""
    where, mesh = setup
    with jax.default_matmul_precision("default"), jax.set_mesh(mesh):
        module = jax.jit(function).lower(*args).compile().as_text()
    found = walk.estimate(module, mesh, where)
    parts = sum(op.seconds for op in found.ops)
    parts += sum(one.exposed_seconds for one in found.collectives)
    assert parts == pytest.approx(found.step_time_s)
    assert found.comm_s == pytest.approx(sum(one.seconds for one in found.collectives))
    assert not found.unpriced
    return found


GENERATIONS = ["v4-8", "v5e-1", "v5p-8", "v6e-1", "tpu7x-2"]


@pytest.mark.parametrize("name", GENERATIONS)
def test_large_matmul_against_the_roofline(name):
    where, mesh = mesh_of(name)
    found = estimate((where, mesh), jnp.dot, shaped(mesh, (8192, 4096)), shaped(mesh, (4096, 4096)))
    assert 0.8 <= 2 * 8192 * 4096**2 / where.spec.peak_flops / found.compute_s <= 1.01
    assert found.ops[0].kind == "convolution fusion" and found.ops[0].count == 1


@pytest.mark.parametrize("name", GENERATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_elementwise_op_against_the_bandwidth(name, dtype):
    where, mesh = mesh_of(name)
    x = shaped(mesh, (8192, 8192), dtype=dtype)
    found = estimate((where, mesh), lambda x: x * x * x + x, x)
    ideal = 2 * x.size * x.dtype.itemsize / where.spec.hbm_bandwidth
    assert 0.7 <= ideal / found.compute_s <= 1.01


def block(x, weights):
    """Attention and an MLP on tokens [T, D], no kernel."""
    qkv, out, up, down = weights
    q, k, v = jnp.split((x @ qkv).reshape(x.shape[0], -1, 384), 3, -1)
    scores = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k).astype(jnp.float32))
    mixed = jnp.einsum("hts,shd->thd", scores.astype(x.dtype), v).reshape(x.shape)
    x = x + mixed @ out
    return x + jax.nn.gelu(x @ up) @ down


def test_scan_of_blocks_is_so_many_blocks_and_no_faster_than_the_roofline():
    where, mesh = setup = mesh_of("v5e-1")
    d, tokens, layers = 1536, 1536, 8
    shapes = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
    x = shaped(mesh, (tokens, d))

    def scan(x, weights):
        return jax.lax.scan(lambda x, w: (block(x, w), None), x, weights)[0]

    one = estimate(setup, block, x, [shaped(mesh, shape) for shape in shapes])
    all_ = estimate(setup, scan, x, [shaped(mesh, (layers, *shape)) for shape in shapes])
    inside = sum(op.seconds for op in all_.ops if op.count % layers == 0)
    assert inside == pytest.approx(all_.step_time_s, rel=0.05)
    flops = 2 * tokens * 12 * d * d + 4 * tokens * tokens * d
    ideal = flops / where.spec.peak_flops
    for found, count in ((one, 1), (all_, layers)):
        assert count * ideal < found.step_time_s < 3 * count * ideal
    products = [op.seconds for op in all_.ops if op.kind == "convolution fusion"]
    assert layers * ideal < sum(products) < 1.6 * layers * ideal


def test_fsdp_gathers_weights_and_reduces_their_gradients():
    where, mesh = setup = mesh_of("v5p-8", "fsdp=4")
    layers, d = 4, 512
    weights = shaped(mesh, (layers, d, d), None, "fsdp", dtype=jnp.float32)
    x = shaped(mesh, (8192, d), "fsdp")

    def loss(weights, x):
        def body(x, w):
            return jnp.tanh(x @ w.astype(x.dtype)), None

        return jax.lax.scan(jax.checkpoint(body), x, weights)[0].astype(jnp.float32).sum()

    found = estimate(setup, jax.grad(loss), weights, x)
    whole = d * d * 2  # of a layer, in bfloat16
    gathers = [one for one in found.collectives if one.kind == "all-gather"]
    assert {(one.axes, one.group_size, one.nbytes) for one in gathers} == {(("fsdp",), 4, whole)}
    assert sum(one.count for one in gathers) == 2 * layers  # forward, and again for the backward
    (reduced,) = [one for one in found.collectives if "reduce" in one.kind]
    assert (reduced.axes, reduced.nbytes, reduced.count) == (("fsdp",), whole, layers)
    assert all(one.source.startswith("test_compiled.py:") for one in found.collectives)


@pytest.mark.parametrize("name", GENERATIONS)
@pytest.mark.parametrize("shape", [(2, 3584, 2, 128), (8, 4096, 1, 384)])
def test_attention_of_the_real_sizes_fits_into_vmem(name, shape):
    """Of stage 3's generator, and of the autoencoder with its one wide head."""
    where, mesh = setup = mesh_of(name)

    def loss(*taken):
        return jnp.sum(
            attention(*taken, activations=sharding.row("fsdp").activations), dtype="float32"
        )

    x = shaped(mesh, (mesh.size * shape[0], *shape[1:]), ("data", "fsdp"))
    found = estimate(setup, jax.grad(loss, argnums=(0, 1, 2)), x, x, x)
    assert found.attention_s > 0


def test_gathers_along_either_axis_of_a_transposed_mesh():
    where, mesh = setup = mesh_of("v5p-128", "data=4,fsdp=16")

    def both(x):
        x = jax.lax.all_gather(jnp.tanh(x), "data", tiled=True)
        return jnp.sin(jax.lax.all_gather(jnp.cos(x), "fsdp", tiled=True))

    rows = PartitionSpec(("fsdp", "data"))
    mapped = jax.shard_map(
        both, mesh=mesh, in_specs=rows, out_specs=PartitionSpec(), check_vma=False
    )
    found = estimate(setup, mapped, shaped(mesh, (4096, 1024), ("fsdp", "data")))
    assert {(one.kind, one.axes, one.group_size, one.nbytes) for one in found.collectives} == {
        ("all-gather", ("data",), 4, 4096 // 16 * 1024 * 2),
        ("all-gather", ("fsdp",), 16, 4096 * 1024 * 2),
    }


def test_tensor_parallel_mlp_sums_over_its_axis():
    where, mesh = setup = mesh_of("v5e-16", "fsdp=4,tensor=4")

    def mlp(x, up, down):
        return jax.lax.with_sharding_constraint(
            jnp.tanh(x @ up) @ down, NamedSharding(mesh, PartitionSpec("fsdp"))
        )

    args = (
        shaped(mesh, (4096, 512), "fsdp"),
        shaped(mesh, (512, 2048), None, "tensor"),
        shaped(mesh, (2048, 512), "tensor"),
    )
    (one,) = estimate(setup, mlp, *args).collectives
    assert (one.kind, one.axes, one.group_size) == ("all-reduce", ("tensor",), 4)
    assert (one.nbytes, one.count) == (1024 * 512 * 2, 1)


def test_all_to_all_and_permute():
    where, mesh = setup = mesh_of("v5e-16", "fsdp=4,tensor=4")

    def move(x):
        x = jax.lax.all_to_all(jnp.tanh(x), "tensor", 1, 0, tiled=True)
        return jnp.sin(jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]))

    spec = PartitionSpec(("fsdp", "tensor"))
    mapped = jax.shard_map(move, mesh=mesh, in_specs=spec, out_specs=spec)
    found = estimate(setup, mapped, shaped(mesh, (16384, 1024), ("fsdp", "tensor")))
    assert {(one.kind, one.axes, one.group_size, one.nbytes) for one in found.collectives} == {
        ("all-to-all", ("tensor",), 4, 1024 * 1024 * 2),
        ("collective-permute", ("fsdp",), 2, 1024 * 1024 * 2),
    }


def test_two_slices_reduce_over_dcn():
    where, mesh = setup = mesh_of("2x v5e-16", "fsdp=16", 2)

    def total(x):
        return jnp.sin(jax.lax.psum(jnp.tanh(x), "data"))

    mapped = jax.shard_map(
        total, mesh=mesh, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp")
    )
    found = estimate(setup, mapped, shaped(mesh, (16384, 1024), "fsdp"))
    (one,) = found.collectives
    assert (one.kind, one.axes, one.group_size) == ("all-reduce", ("data",), 2)
    assert one.seconds == pytest.approx(one.nbytes / where.spec.dcn_bandwidth)
    assert one.nbytes == 1024 * 1024 * 2


@pytest.mark.parametrize(
    "fused,products", [(True, 2 / 0.55 + 5 / 0.45), (False, 2 / 0.55 + 7 / 0.45)]
)
def test_splash_attention_forward_and_backward(fused, products):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    where, mesh = setup = mesh_of("v5p-8", "fsdp=4")
    heads, length = 4, 1024
    blocks = dict.fromkeys(
        ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")
        + ("block_kv_dkv_compute",) + (() if fused else ("block_q_dq", "block_kv_dq")),
        512,
    )  # fmt: skip
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask((length, length))] * heads),
        block_sizes=kernels.BlockSizes(**blocks, use_fused_bwd_kernel=fused),
        head_shards=1,
        q_seq_shards=1,
    )

    def loss(q, k, v, ids):
        one = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, kernels.SegmentIds(ids, ids)))
        rows = PartitionSpec("fsdp")
        mapped = jax.shard_map(one, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
        return mapped(q, k, v, ids).astype(jnp.float32).sum()

    heads_of = shaped(mesh, (8, heads, length, 128), "fsdp")
    ids = shaped(mesh, (8, length), "fsdp", dtype=jnp.int32)
    found = estimate(setup, jax.grad(loss, (0, 1, 2)), heads_of, heads_of, heads_of, ids)
    product = 2 * 2 * heads * length * length * 128
    assert found.attention_s == pytest.approx(products * product / where.spec.peak_flops, rel=1e-6)
    assert sum(op.count for op in found.ops if op.kind == estimates.PALLAS) == (2 if fused else 3)
