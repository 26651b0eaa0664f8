"""The recipe: what each default of the configs does, at the tiny and at the paper's sizes.

Real sizes are planned abstractly; where a default acts on arrays, on leaves of the real names.
"""

import dataclasses
import functools
import pathlib
import types
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from qk_jax import sharding
from qk_jax.base import trees
from qk_jax.checkpoints.store import Store
from qk_jax.data import pipeline, prompts
from qk_jax.data.example import TASKS, Example, TaskSettings, reference_sizes
from qk_jax.data.synthesis import corpus
from qk_jax.diffusion import flow
from qk_jax.experiment import config as config_lib
from qk_jax.experiment import plan as plan_lib
from qk_jax.experiment.plan import Plan
from qk_jax.models import rotary
from qk_jax.pictures.grids import vision_size
from qk_jax.training import evals, gradients, loop, saving
from qk_jax.training import step as step_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]
NANO = ROOT / "tests/training/nano.py"
TOKENIZER = corpus.EMBEDDED.parent / "tiny" / "tokenizer"
STAGES = ("stage1", "stage2", "stage3", "highres")
SIZES = ("tiny", "20b")
EVERYWHERE = [(stage, size) for stage in STAGES for size in SIZES]


def config_of(stage, size, **changes):
    overrides = {name.replace("__", "."): str(value) for name, value in changes.items()}
    return config_lib.load(f"{ROOT}/configs/{stage}.py:{size}", overrides)


@functools.cache
def planned(stage, size):
    """The plan over 64 devices that are not here."""
    mesh = sharding.abstract_mesh({"fsdp": 64})
    return Plan.build(config_of(stage, size), mesh, check=False)


# ---- the optimizer, in one real step -----------------------------------------------------------

LR = 0.1


class Recipe:
    """The compiled train step of a stage with a loss whose gradient is given.

    The rate is large and there at once, so that float32 shows the decay.
    """

    def __init__(self, stage, size):
        plan = planned(stage, size)
        config = config_of(stage, size, optimizer__lr=LR, optimizer__warmup=1)
        mesh = sharding.build_mesh({}, jax.devices()[:1])
        where = sharding.replicated(mesh)

        def cut(leaf):
            shape = (leaf.shape[0],) + (1,) * (len(leaf.shape) - 1)
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=where)

        params = jax.tree.map(cut, plan.params)
        everywhere = jax.tree.map(lambda leaf: where, params)
        self.plan = dataclasses.replace(
            plan, config=config, mesh=mesh, params=params, frozen={"gradient": params},
            weights=everywhere, gradients=everywhere,
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step_lib, "loss_fn", lambda plan: self.loss)
            self.step = step_lib.make_train_step(self.plan)

    @staticmethod
    def loss(params, batch, rng):
        trained = {name: leaf for name, leaf in params.items() if name != "gradient"}
        parts = jax.tree.map(lambda p, g: jnp.sum(p * g), trained, params["gradient"])
        values = jnp.full(batch["task"].shape, sum(jax.tree.leaves(parts)))
        return values, {"t": jnp.zeros_like(values), "flow": values}

    def filled(self, value):
        return jax.tree.map(lambda x: np.full(x.shape, value, np.float32), self.plan.params)

    def __call__(self, params, gradient, step=0):
        """(new state, metrics) from fresh moments, with the old parameters as average."""
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.plan.state)
        state = state.replace(step=np.int32(step), params=params, ema=params)
        with jax.set_mesh(self.plan.mesh):
            state = jax.device_put(state, trees.shardings(self.plan.state))
            task = np.zeros(2, np.int32)
            return self.step(state, {"gradient": gradient}, {"task": task})


recipe = functools.cache(Recipe)


def moments(state):
    (adam,) = (part for part in state.opt_state if hasattr(part, "mu"))
    return adam


def norm(tree):
    return float(np.linalg.norm([np.linalg.norm(leaf) for leaf in jax.tree.leaves(tree)]))


def kind(name):
    return name.rsplit("/", 1)[-1]


# Learning rate, warm-up and steps; the rate falls to a tenth but for highres.
RATES = {
    ("stage1", "tiny"): (1e-3, 20, 150), ("stage1", "20b"): (1e-4, 2000, 72_000),
    ("stage2", "tiny"): (3e-4, 20, 150), ("stage2", "20b"): (5e-5, 2000, 420_000),
    ("stage3", "tiny"): (2e-3, 20, 750), ("stage3", "20b"): (1e-4, 500, 30_000),
    ("highres", "tiny"): (2e-4, 10, 100), ("highres", "20b"): (1e-5, 100, 3000),
}  # fmt: skip


@pytest.mark.parametrize(("stage", "size"), EVERYWHERE)
def test_kernels_and_adapters_decay_and_nothing_else(stage, size):
    """Without a gradient a step multiplies them by 1 - rate * 0.05; all else keeps its bits."""
    made, seen = recipe(stage, size), set()
    state, _ = made(made.filled(2.0), made.filled(0.0))
    for name, leaf in trees.named(state.params).items():
        seen.add(kind(name))
        change = (np.asarray(leaf, np.float64) - 2.0) / 2.0
        if kind(name) not in ("kernel", "lora_a", "lora_b"):
            assert not change.any(), f"{name} decays"
            continue
        if "to_add_out" in name or "txt_mlp" in name:
            assert not change[-1].any(), name  # has no gradient in the last block
            change = change[:-1]
        wanted = -LR * 0.05 * multiplier(stage, size, name)
        np.testing.assert_allclose(change, wanted, rtol=2e-3, err_msg=name)
    whole = {"kernel", "bias", "scale", "embedding"}
    adapted = {"kernel", "bias", "embedding", "lora_a", "lora_b"}
    assert seen == {"stage1": whole | adapted, "stage2": whole}.get(stage, adapted)


def multiplier(stage, size, name):
    """Stage 1 spares the connector, the later tiny stages what they do not teach."""
    if stage == "stage1":
        return 0.1 if name.startswith("connector/") else 1.0
    if size == "tiny" and stage in ("stage3", "highres"):
        return 1.0 if name.startswith("lora/") else 0.05
    return 1.0


@pytest.mark.parametrize(("stage", "size"), EVERYWHERE)
def test_the_first_update_is_the_rate_of_each_leaf(stage, size):
    """From zeros, where nothing decays, Adam's first update has size 1."""
    made = recipe(stage, size)
    state, metrics = made(made.filled(0.0), made.filled(1.0))
    np.testing.assert_allclose(metrics["lr"], LR, rtol=1e-6)
    for name, leaf in trees.named(state.params).items():
        wanted = -LR * multiplier(stage, size, name)
        np.testing.assert_allclose(leaf, wanted, rtol=2e-3, err_msg=name)


@pytest.mark.parametrize(("stage", "size"), EVERYWHERE)
def test_the_rate_rises_and_falls(stage, size):
    lr, warmup, steps = RATES[stage, size]
    plan = planned(stage, size)
    assert plan.config.steps == steps
    at = lambda step: float(plan.optimizer.rate(step)) / lr  # noqa: E731
    got = [at(0), at(warmup // 2 - 1), at(warmup - 1), at((warmup + steps) / 2), at(steps)]
    constant = stage == "highres"
    wanted = [1 / warmup, 0.5, 1.0, 1.0 if constant else 0.55, 1.0 if constant else 0.1]
    np.testing.assert_allclose(got, wanted, rtol=1e-3)


def test_gradients_are_clipped_to_norm_one():
    made = recipe("stage2", "tiny")
    large, small = made.filled(3.0), made.filled(1e-4)
    assert norm(large) > 1 > norm(small)
    for gradient in (large, small):
        state, metrics = made(made.filled(0.0), gradient)
        np.testing.assert_allclose(metrics["grad_norm"], norm(gradient), rtol=1e-4)
        wanted = min(1.0, norm(gradient))
        np.testing.assert_allclose(norm(moments(state).mu), 0.1 * wanted, rtol=1e-4)


def test_adam_has_the_betas_and_the_epsilon():
    made = recipe("stage2", "tiny")
    state, _ = made(made.filled(0.0), made.filled(1e-4))
    for mu, nu in zip(*map(jax.tree.leaves, moments(state)[1:3]), strict=True):
        np.testing.assert_allclose(mu, (1 - 0.9) * 1e-4, rtol=1e-4)
        np.testing.assert_allclose(nu, (1 - 0.95) * 1e-8, rtol=1e-3)
    # a gradient as small as eps = 1e-8 moves half as far
    state, _ = made(made.filled(0.0), made.filled(1e-8))
    for leaf in jax.tree.leaves(state.params):
        np.testing.assert_allclose(leaf, -0.5 * LR, rtol=1e-3)


@pytest.mark.parametrize(("stage", "size"), EVERYWHERE)
def test_the_average_follows_by_its_decay(stage, size):
    """At first quickly, later by 0.01 (tiny) or 0.0001 of the way per step."""
    made = recipe(stage, size)
    for step, way in ((0, 0.9), (10**7, 0.01 if size == "tiny" else 0.0001)):
        state, _ = made(made.filled(0.0), made.filled(1.0), step)
        for ema, leaf in zip(*map(jax.tree.leaves, (state.ema, state.params)), strict=True):
            np.testing.assert_allclose(ema, way * np.asarray(leaf), rtol=2e-3)


@pytest.mark.parametrize(("stage", "size"), EVERYWHERE)
def test_the_state_is_kept_in_float32_on_the_device(stage, size):
    state = planned(stage, size).state
    for tree in (state.params, state.ema, moments(state).mu, moments(state).nu):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)} <= {None, "device"}


# ---- what is trained, and in which type --------------------------------------------------------

VLM = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ATTENTION = {"to_q", "to_k", "to_v", "to_out_0", "add_q_proj", "add_k_proj", "add_v_proj"}
MMDIT = ATTENTION | {"to_add_out", "net_0_proj", "net_2"}
TRAINED = {  # parts of the tree; the others are frozen
    "stage1": {"queries", "connector", "mmdit", "lora"},
    "stage2": {"queries", "connector", "mmdit"},
    "stage3": {"queries", "connector", "lora"},
    "highres": {"queries", "connector", "lora"},
}
RANKS = {
    ("stage1", "tiny"): 16, ("stage1", "20b"): 128, ("stage3", "tiny"): 64, ("stage3", "20b"): 256,
    ("highres", "tiny"): 64, ("highres", "20b"): 256,
}  # fmt: skip


@pytest.mark.parametrize(("stage", "size"), EVERYWHERE)
def test_what_a_stage_trains(stage, size):
    plan = planned(stage, size)
    assert set(plan.params) == TRAINED[stage]
    assert set(plan.frozen) == {"vlm", "vae", "mmdit"} - TRAINED[stage]
    compute = jnp.dtype("float32" if size == "tiny" else "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(plan.frozen)} == {compute}
    assert plan.model.dtype == compute
    # whole towers are trained, to the last leaf of the model
    shapes = plan.model.abstract()
    for tower in TRAINED[stage] - {"lora"}:
        assert trees.named(plan.params[tower]).keys() == trees.flatten(shapes[tower]).keys()


@pytest.mark.parametrize(("stage", "size"), RANKS)
def test_what_is_adapted_and_by_which_rank(stage, size):
    plan, rank = planned(stage, size), RANKS[stage, size]
    (tower,) = plan.params["lora"]
    assert tower == ("vlm" if stage == "stage1" else "mmdit")
    adapters = trees.named(plan.params["lora"])
    assert {name.split("/")[-2] for name in adapters} == (VLM if tower == "vlm" else MMDIT)
    assert len(adapters) == 2 * (len(VLM) if tower == "vlm" else len(MMDIT) + 2)  # two MLPs
    for name, leaf in adapters.items():
        assert leaf.shape[-1 if kind(name) == "lora_a" else -2] == rank
    assert plan.model.config.lora_scale == 1.0
    section = {"lora__alpha": float(4 * rank)}
    assert config_lib.model_config(config_of(stage, size, **section)).lora_scale == 4.0


def test_where_each_part_comes_from():
    origins = {stage: dict(planned(stage, "20b").stage.parts) for stage in STAGES}
    same = dict.fromkeys(("vlm", "vae", "queries", "connector", "mmdit"), "previous")
    assert origins == {
        "stage1": {
            "vlm": "pretrained", "vae": "pretrained", "queries": "fresh", "connector": "fresh",
            "mmdit": "fresh", "lora/vlm": "fresh",
        },
        "stage2": same | {"vlm": "merged", "mmdit": "pretrained"} ,
        "stage3": same | {"lora/mmdit": "fresh"},
        "highres": same | {"lora/mmdit": "previous"},
    }  # fmt: skip
    before = [planned(stage, "20b").stage.previous for stage in STAGES]
    assert before == ["", *STAGES[:-1]]
    for stage in STAGES:  # tiny weights are shipped
        for name, folder in config_of(stage, "tiny").init.items():
            is_path = isinstance(folder, str) and folder
            assert not is_path or pathlib.Path(folder, "config.json").is_file(), name
    assert config_of("stage1", "tiny").init.vlm and config_of("stage1", "tiny").init.vae
    assert config_of("stage2", "tiny").init.mmdit


def test_fresh_queries_have_the_spread_of_the_config():
    for size, count in (("tiny", 16), ("20b", 128)):
        plan = planned("stage1", size)
        queries = plan_lib.fresh(plan, jax.random.key(0), ("queries",))["queries"]["embedding"]
        assert queries.shape[0] == count
        assert float(queries.std()) == pytest.approx(0.02, rel=0.05)


# ---- the model ---------------------------------------------------------------------------------


def traced(plan):
    """The shapes of the VLM's states and of the velocity for one slot without pictures, and the
    program as text."""
    model, words = plan.model, 4
    length = words + plan.config.model.tail_tokens + plan.config.model.num_queries
    spec = jax.ShapeDtypeStruct
    batch = {
        "input_ids": spec((1, length), jnp.int32),
        "position_ids": spec((1, 3, length), jnp.int32),
        "attention_mask": spec((1, length), bool),
        "text_mask": spec((1, words), bool),
        "pixel_values": spec((1, 0, 1176), jnp.float32),
        "conditions": (),
    }
    x_t = spec((1, 4, model.config.mmdit.in_channels), jnp.float32)

    def both(params, batch, x_t):
        text, kontext = model.states(params, batch)
        context, mask = model.connect(params, text, kontext, batch["text_mask"])
        return kontext, context, model.velocity(params, x_t, jnp.ones(1), context, mask, (2, 2))

    one = sharding.build_mesh({}, jax.devices()[:1])
    everything = jax.tree.map(lambda x: spec(x.shape, x.dtype), plan.everything)
    with jax.set_mesh(one):
        program, shapes = jax.make_jaxpr(both, return_shape=True)(everything, batch, x_t)
    return shapes, str(program)


@pytest.mark.parametrize("size", SIZES)
def test_compute_type_and_what_is_recomputed(size):
    """Real towers compute in bfloat16 and keep the input of a block only; velocity is float32."""
    (kontext, context, velocity), program = traced(planned("stage2", size))
    compute = "float32" if size == "tiny" else "bfloat16"
    assert (kontext.dtype, context.dtype, velocity.dtype) == (compute, compute, "float32")
    # the blocks of both towers; no policy means that nothing but the input is kept
    assert program.count("remat") >= 2 if size != "tiny" else "remat" not in program
    assert "policy=None" in program or size == "tiny"


@pytest.mark.parametrize(("stage", "size"), EVERYWHERE)
def test_condition_pictures_reach_the_generator_from_stage_3_on(stage, size, monkeypatch):
    monkeypatch.setattr(Plan, "compiler_options", lambda self: {})  # those of real devices
    plan = planned(stage, size)
    picture = jax.ShapeDtypeStruct((1, 64, 48, 3), jnp.uint8)
    batch = {"target": picture, "conditions": (picture,)}
    encoded = [picture for picture, _ in step_lib.Encoder(plan).pictures(batch)]
    assert len(encoded) == (2 if stage in ("stage3", "highres") else 1)


def test_positions_of_a_source():
    """At its own place on the next frame; at tiny size moved by a constant offset."""
    sides = ((2, 3),)
    for size in SIZES:
        law = planned("stage3", size).model.config.law
        found = rotary.image_positions(law, sides[0], sides, jnp.zeros((1, 1), jnp.int32))[0]
        target, source = np.split(np.asarray(found), 2)
        wanted = target - [0, 2, 3] if size == "tiny" else target + [1, 0, 0]
        np.testing.assert_array_equal(source, wanted)
        text = rotary.text_positions(law, np.ones((1, 5), bool), sides[0], sides)
        assert text.any() == (size != "tiny")  # shifted: all at zero


def test_how_large_a_picture_is_for_the_language_model():
    tiny, real = (config_of("stage3", size).model.vlm_pixels for size in SIZES)
    assert vision_size(64, 64, tiny) == (112, 112)
    assert vision_size(512, 512, real) == vision_size(1024, 1024, real) == (448, 448)


def test_text_of_a_slot():
    tiny, real = config_of("stage3", "tiny"), config_of("stage3", "20b")
    assert [prompts.text_tokens(tiny, n) for n in range(5)] == [24, 32, 40, 40, 40]
    assert [prompts.text_tokens(real, n) for n in range(5)] == [384] * 5
    assert real.model.max_text + real.model.num_queries == 512
    assert tiny.model.max_text >= 40


@pytest.mark.parametrize(("stage", "size"), EVERYWHERE)
def test_sizes_of_pictures(stage, size):
    data = config_of(stage, size).data
    side = {"tiny": 64, "20b": 512}[size] * (2 if stage == "highres" else 1)
    sizes, (shown,) = TaskSettings.from_config(data, 0).sizes, reference_sizes(data)
    assert data.reference_size == side and sizes[0] == shown[0] == (side, side)
    assert (len(sizes), len(shown)) == ((3, 1) if size == "tiny" else (13, 3))
    for height, width in (*sizes, *shown):
        assert height % 16 == width % 16 == 0 and (width, height) in (*sizes, *shown)
        assert height * width == pytest.approx(side**2, rel=0.1)


@pytest.mark.parametrize(("stage", "size"), EVERYWHERE)
def test_times_are_drawn_as_qwen_image_samples(stage, size):
    """SD3's logit-normal law, moved by a shift that grows from 0.5 to 0.9."""
    law = config_lib.time_law(config_of(stage, size))
    assert law.distribution == "logit_normal"
    for tokens, mu in ((256, 0.5), (1024, 0.53871), (4096, 0.69355), (8192, 0.9)):
        assert law.mu(tokens) == pytest.approx(mu, abs=1e-5)
    t = flow.sample_timesteps(jax.random.key(0), (20_000,), law, 8192)
    logits = np.log(t / (1 - t)) - 0.9
    np.testing.assert_allclose([logits.mean(), logits.std()], [0.0, 1.0], atol=0.03)


# ---- data --------------------------------------------------------------------------------------


class Source:
    """Records without pictures, in the three tiny sizes."""

    def __init__(self, task, settings):
        self.task, self.settings = task, settings
        self.size_of, self.pictures_of = np.arange(6000) % len(settings.sizes), np.zeros(6000, int)
        self.references_of = np.zeros((6000, 0), int)

    def __len__(self):
        return len(self.size_of)

    def __getitem__(self, number):
        return Example("", np.zeros((1, 1, 3), np.uint8), (), (), self.task, number)


@pytest.fixture
def pipe(monkeypatch):
    """Makes the real pipeline of a config, of records that cost nothing; `batch(step)` says which
    text and which pictures were dropped."""

    def sources(config, split, seed, names):
        settings = TaskSettings.from_config(config["data"], seed)
        return {name: Source(name, settings) for name in names}

    def collate(examples, dropped, builder, targets=False):
        text, pictures = np.transpose(dropped)
        record = np.array([example.record for example in examples])
        task = np.array([TASKS.index(example.task) for example in examples])
        return {"record": record, "task": task, "text": text, "pictures": pictures}

    monkeypatch.setattr(pipeline, "make_sources", sources)
    monkeypatch.setattr(pipeline, "collate", collate)
    tokenizer = prompts.load_tokenizer(TOKENIZER)

    def make(config, split="train"):
        builder = prompts.PromptBuilder(tokenizer, config.model.max_text, 1, 1)
        return pipeline.Pipeline(config, split, 0, 1, builder)

    return make


SHARES = {
    "stage1": {"text_to_image": 0.4, "reconstruction": 0.3, "transformation": 0.3},
    "stage2": {"text_to_image": 0.7, "reconstruction": 0.3},
    "stage3": {
        "text_to_image": 0.1, "reconstruction": 0.05, "transformation": 0.2, "editing": 0.3,
        "customization": 0.15, "composition": 0.2,
    },
}  # fmt: skip
SHARES["highres"] = SHARES["stage3"]


@pytest.mark.parametrize(("stage", "size"), EVERYWHERE)
def test_tasks_come_by_the_shares_of_the_stage(stage, size, pipe):
    made = pipe(config_of(stage, size, data__batch=4))
    found = Counter(made.groups[made.plan[step][0, 0]].task for step in range(1000))
    assert {task: count / 1000 for task, count in found.items()} == pytest.approx(
        SHARES[stage], abs=0.01
    )


BATCHES = {
    ("stage1", "tiny"): 16, ("stage1", "20b"): 512,
    ("stage2", "tiny"): 16, ("stage2", "20b"): 1024,
    ("stage3", "tiny"): 16, ("stage3", "20b"): 512,
    ("highres", "tiny"): 16, ("highres", "20b"): 256,
}  # fmt: skip


@pytest.mark.parametrize(("stage", "size"), EVERYWHERE)
def test_batch_and_what_is_dropped(stage, size, pipe):
    """A few thousand slots: the shares of slots without text, without pictures, without both."""
    config = config_of(stage, size)
    made = pipe(config)
    assert len(made.batch(0)["record"]) == BATCHES[stage, size]
    batches = [made.batch(step) for step in range(16_000 // BATCHES[stage, size])]
    text = np.concatenate([batch["text"] for batch in batches])
    pictures = np.concatenate([batch["pictures"] for batch in batches])
    shares = [np.mean(text & ~pictures), np.mean(pictures & ~text), np.mean(text & pictures)]
    wanted = [0.05, 0.02, 0.05] if size == "tiny" else [0.1, 0.1, 0.1]
    np.testing.assert_allclose(shares, wanted, atol=0.008)
    # each slot by itself
    together = np.mean(text[:-1] & text[1:])
    assert together == pytest.approx(text.mean() ** 2, abs=0.008)


@pytest.mark.parametrize("size", SIZES)
def test_shapes_of_a_task_are_bounded(size, pipe):
    made = pipe(config_of("stage2", size, data__batch=4))
    found = Counter(group.task for group in made.groups)
    assert set(found.values()) == {2 if size == "tiny" else 13}  # all targets


def test_validation_is_held_fixed(pipe):
    """Whatever the training's seed: as many batches as the config says, at least one of a task."""
    counts = (("stage2", "tiny", 4, 16), ("stage2", "20b", 2, 64), ("stage3", "20b", 6, 64))
    for stage, size, count, batch_size in counts:
        config = config_of(stage, size)
        first = list(pipe(config, "validation").fixed())
        assert [len(batch["record"]) for batch in first] == [batch_size] * count
        assert not any(batch["text"].any() or batch["pictures"].any() for batch in first)
        again = list(pipe(config_of(stage, size, seed=1), "validation").fixed())
        other = list(pipe(config_of(stage, size, validation__seed=18), "validation").fixed())
        for a, b, c in zip(first, again, other, strict=True):
            np.testing.assert_array_equal(a["record"], b["record"])
            assert a["record"].tolist() != c["record"].tolist()
    assert config_of("stage1", "tiny").validation.seed == 17


def test_a_few_bad_records_are_suffered(pipe):
    made = pipe(config_of("stage1", "tiny"))
    assert made.config.data.max_bad_share == 0.01  # its effect: tests/data/test_pipeline.py
    assert made.config.data.max_pixels == 64_000_000
    tiny, real = (config_of("stage1", size).data for size in SIZES)
    assert not tiny.workers and real.workers > 1 and real.prefetch >= 1 <= real.threads


# ---- the run -----------------------------------------------------------------------------------


def test_two_checkpoints_are_kept(tmp_path, monkeypatch):
    """What the trainer asks of the store, and what the store then keeps."""
    asked = {}

    def note(root, **settings):
        asked.update(settings)
        raise LookupError  # all that is wanted is known

    monkeypatch.setattr(loop, "Store", note)
    with pytest.raises(LookupError):
        loop.train(config_lib.load(f"{NANO}:stage2"), tmp_path / "run")
    for stage, size in EVERYWHERE:
        section = config_of(stage, size).checkpoint
        assert (section.keep, section.keep_every) == (asked["keep"], asked["keep_every"])
    store = Store(tmp_path / "store", **asked)
    for step in (1, 2, 3):
        store.save(step, {"params": {"a": jnp.zeros(2)}}, {"stage": "stage1"})
    store.wait()
    assert store.steps() == [2, 3]
    store.close()


@pytest.mark.parametrize(("size", "every", "due"), [("tiny", 50, 250), ("20b", 1000, (2000, 5000))])
def test_when_it_saves_and_evaluates(size, every, due):
    config, steps = config_of("stage3", size, steps=2023), range(2024)
    saver, plan = saving.Saver(None, config), types.SimpleNamespace(config=config)
    saved = [step for step in steps[1:] if saver.is_due(step)]
    assert saved == [*range(every, 2023, every), 2023]  # the last step too
    for name, interval in zip(("loss", "sheets"), np.broadcast_to(due, 2), strict=True):
        section = types.SimpleNamespace(section=config.evals[name], plan=plan)
        found = [step for step in steps if evals.Evaluator.is_due(section, step)]
        assert found == [*range(0, 2023, interval), 2023]


@pytest.mark.parametrize(("stage", "size"), EVERYWHERE)
def test_towers_are_sharded_whole_and_computed_in_one_micro_batch(stage, size):
    """ZeRO-3 over all devices; gradients are summed in float32, and the alignment term is off."""
    plan = planned(stage, size)
    config = plan.config
    assert (config.mesh.fsdp, config.optimizer.accumulation) == (-1, 1)
    assert config.optimizer.offload is False
    assert config.sharding_limit == 0.02 and (size == "tiny" or plan.replicated_share < 0.02)
    assert "alignment" not in plan.stage.parts
    for tower in config.sharding:
        assert config.sharding[tower].to_dict() == dataclasses.asdict(sharding.row("fsdp"))
    one = ConfigDict({"dtype": config.dtype.to_dict()})
    # weights that lie where they are computed with are not rounded before
    leaf = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=plan.replicated)
    little = types.SimpleNamespace(
        model=plan.model, config=one, params={"a": leaf}, weights={"a": plan.replicated}
    )
    gathered = jax.eval_shape(gradients.gatherer(little), {"a": leaf})
    assert gathered["a"].dtype == jnp.float32


def test_every_field_has_its_test():
    """A new field of the configs needs a line here, and a test of what it does."""
    here = """
        steps seed model.num_queries model.max_text model.tail_tokens model.vlm_pixels
        model.query_std model.law model.condition_latents model.remat rules lora init.vlm init.vae
        init.mmdit init.lora init.checkpoint init.ema init.unfinished optimizer time alignment
        data.batch data.tasks data.sizes data.reference_size data.reference_ratios data.text_tokens
        data.dropout data.max_groups data.max_pixels data.max_bad_share data.workers data.threads
        data.prefetch dtype.compute dtype.frozen dtype.gradients mesh sharding sharding_limit
        checkpoint evals.loss.every evals.sheets.every validation
    """
    elsewhere = """
        stage size model.vlm model.mmdit model.vae data.corpus data.records data.tfds_image
        data.tfds_text data.tokenizer slices compilation_cache compiler evals.loss.type evals.sheets
        log wandb prompt data.task_dropout data.mixed_batches data.tokens data.cache
        data.curriculum data.reference_sizes_by_number loss model.query_noise model.vlm_layers
        model.bidirectional_queries distributed watchdog profile programs spike data.sources
    """
    known = tuple(f"{name}." for name in (here + elsewhere).split())
    names = {name for where in EVERYWHERE for name, _ in config_lib.fields(config_of(*where))}
    assert not [name for name in names if not f"{name}.".startswith(known)]
