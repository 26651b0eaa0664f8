"""Plants bugs one at a time and says which of them the tests see. Run by hand:

    python tests/plant.py [--only TEXT ...] [--list] [--need COUNT]

A bug is one change of the text of one file, a slip that a reader could overlook, and the tests
that should see it. Everything happens in a copy of the repository's files in a temporary folder:
each bug is planted, its tests are run until one fails, and the file is put back. At the end every
test that failed must pass. The exit status is 1 when fewer than COUNT are caught, 2 when a bug does
not fit the files any more, or a test fails without it.

A bug that nobody sees asks for a test; one whose text has changed asks for a look at the new text.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
SECONDS = 1800  # for the tests of one bug; one that hangs is not caught


class Bug(NamedTuple):
    """A change of one file.

    Attributes:
      name: the room and what goes wrong.
      file: in the repository.
      old: text that the file has exactly once.
      new: what takes its place.
      tests: arguments of pytest.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


LAWS, RECIPE = "tests/training/test_laws.py", "tests/experiment/test_recipe.py"
PADDING = "tests/training/test_padding.py"

# fmt: off
BUGS = (
    # Each of these four once passed every test of its room.
    Bug("training: every step draws the same", "qk_jax/training/step.py",
        "jax.random.fold_in(jax.random.key(seed), state.step)",
        "jax.random.fold_in(jax.random.key(seed), 0)", f"{LAWS} -k steps"),
    Bug("training: micro-batches share their noise", "qk_jax/training/gradients.py",
        "jax.random.fold_in(rng, index)", "jax.random.fold_in(rng, 0 * index)",
        f"{LAWS} -k 'micro or share'"),
    Bug("training: the mode of the posterior is the target",
        "qk_jax/training/objectives/flow_matching.py",
        "x0 = mean + deviation * jax.random.normal(posterior_key, mean.shape, jnp.float32)",
        "x0 = mean",
        f"{LAWS} -k posterior"),
    Bug("configs: every leaf decays", "configs/common.py",
        '((r".*/(kernel|lora_a|lora_b)", 1.0), (r".*", 0.0))', '((r".*", 1.0),)',
        f"{RECIPE} -k decay"),
    # ---- base ----------------------------------------------------------------------------------
    Bug("base: a key twice in a JSON object passes", "qk_jax/base/files.py",
        "if len(found) < len(pairs):", "if len(found) > len(pairs):",
        "tests/weights/test_safetensors.py -k 'header or index'"),
    Bug("base: a failed write leaves its temporary file", "qk_jax/base/files.py",
        "part.unlink(missing_ok=True)", "pass",
        "tests/weights/test_safetensors.py -k 'failed_write or full_disk'"),
    Bug("base: wrong input ends with status 1", "qk_jax/base/errors.py",
        "1 if isinstance(error, Failure) else 2", "1", "tests/experiment/test_config.py -k status"),
    Bug("base: a rule that decides nothing passes", "qk_jax/base/trees.py",
        "    if idle:", "    if idle and missed:", "tests/experiment/test_stages.py -k decide"),
    Bug("base: options of the train step reach every program", "qk_jax/base/runtime.py",
        'table.get(f"{platform}_step", ()) if step else ()', 'table.get(f"{platform}_step", ())',
        "tests/training/test_step.py -k options"),
    Bug("base: a pipeline is taken for its part", "qk_jax/base/hub.py",
        "return inner if inner.is_dir() else folder", "return folder", "tests/base/test_hub.py"),
    # ---- pictures ------------------------------------------------------------------------------
    Bug("pictures: M-RoPE moves on by the rows of a wide picture", "qk_jax/pictures/grids.py",
        "cursor += max(rows, columns)", "cursor += rows", "tests/models/test_qwen.py -k positions"),
    Bug("pictures: a picture is cropped at its corner", "qk_jax/pictures/fitting.py",
        "left, top = (width - box_width) / 2, (height - box_height) / 2", "left, top = 0.0, 0.0",
        "tests/data/importers/test_record_files.py -k covering"),
    Bug("pictures: a box begins outside of the picture", "qk_jax/pictures/fitting.py",
        "np.maximum(left, 0.0), np.maximum(top, 0.0)", "left, top",
        "tests/pictures/test_fitting.py -k box"),
    Bug("pictures: what is transparent shows its hidden colours", "qk_jax/pictures/decoding.py",
        'over_white(image) if mode == "RGB" else image.convert(mode)', "image.convert(mode)",
        "tests/pictures/test_decoding.py -k shows"),
    Bug("pictures: a camera's turn is undone the wrong way", "qk_jax/pictures/decoding.py",
        "6: Image.Transpose.ROTATE_270", "6: Image.Transpose.ROTATE_90",
        "tests/pictures/test_decoding.py -k shows"),
    Bug("pictures: every profile is taken for sRGB's", "qk_jax/pictures/decoding.py",
        ".max() <= 2", ".max() >= 0", "tests/pictures/test_decoding.py -k shows"),
    Bug("pictures: the bound of pixels is one of the width", "qk_jax/pictures/decoding.py",
        "image.width * image.height > max_pixels", "image.width > max_pixels",
        "tests/data/test_pipeline.py -k counted"),
    Bug("pictures: width and height are swapped", "qk_jax/pictures/sizes.py",
        "int(match[2]), int(match[1])", "int(match[1]), int(match[2])",
        "tests/pictures/test_sizes.py"),
    # ---- sharding ------------------------------------------------------------------------------
    Bug("sharding: batches are replicated over fsdp", "qk_jax/sharding/mesh.py",
        "PartitionSpec(BATCH_AXES)", "PartitionSpec(BATCH_AXES[0])",
        "tests/sharding/test_sharding.py"),
    Bug("sharding: inner axes of kernels are replicated", "qk_jax/sharding/rules.py",
        'mlp_in: tuple[str, ...] = ("tensor", "fsdp", "context")',
        'mlp_in: tuple[str, ...] = ("tensor",)', "tests/bench/test_shardings.py -k reviewed"),
    Bug("sharding: any share may be replicated", "qk_jax/sharding/specs.py",
        "if share > limit:", "if share > 1:", "tests/sharding/test_sharding.py"),
    # ---- diffusion -----------------------------------------------------------------------------
    Bug("diffusion: the velocity points to the picture", "qk_jax/diffusion/flow.py",
        "noise.astype(jnp.float32) - x0.astype(jnp.float32)",
        "x0.astype(jnp.float32) - noise.astype(jnp.float32)",
        "tests/diffusion/test_flow.py -k path"),
    Bug("diffusion: times shift towards the picture", "qk_jax/diffusion/flow.py",
        "factor = jnp.exp(mu)", "factor = jnp.exp(-mu)", f"{LAWS} -k law_of_the_config"),
    Bug("diffusion: the last step of the schedule has no noise", "qk_jax/diffusion/sampler.py",
        "np.linspace(1.0, 1 / steps, steps)", "np.linspace(1.0, 0.0, steps)",
        "tests/diffusion/test_sampler.py -k schedule"),
    Bug("diffusion: the guidance of pictures has text in it", "qk_jax/diffusion/sampler.py",
        "pictures, text = without_text - without_both", "pictures, text = full - without_both",
        "tests/diffusion/test_sampler.py -k guidance"),
    # ---- models --------------------------------------------------------------------------------
    Bug("models: a causal mask counts queries from the first key", "qk_jax/models/flash.py",
        "k=span - length", "k=0", "tests/models/test_attention.py -k definition"),
    Bug("models: norms of the generator have another epsilon", "qk_jax/models/layers.py",
        "    epsilon: float = 1e-6\n    dtype", "    epsilon: float = 1e-5\n    dtype",
        "tests/models/test_mmdit.py -k epsilon"),
    Bug("models: the generator's last modulation is shift, then scale", "qk_jax/models/mmdit.py",
        "scale, shift = _modulations(linear, time, 2",
        "shift, scale = _modulations(linear, time, 2", "tests/models/test_mmdit.py -k forward"),
    Bug("models: the text window ends one token early", "qk_jax/models/query_kontext.py",
        "hidden[:, end - words : end]", "hidden[:, end - words - 1 : end - 1]",
        "tests/painting/test_qwen_image.py -k text_to_image"),
    Bug("models: dropped pictures are seen by the generator", "qk_jax/models/query_kontext.py",
        "shown = shown & (is_target | condition_mask[:, None])", "pass",
        "tests/export/test_pipeline.py -k 'same_noise'"),
    Bug("models: the connector's GELU is exact", "qk_jax/models/connector.py",
        "context = fc2(nn.gelu(fc1(states), approximate=True))",
        "context = fc2(nn.gelu(fc1(states), approximate=False))",
        "tests/export/test_pipeline.py -k verify_passes"),
    Bug("models: the connector reads the layer after the one that is named",
        "qk_jax/models/qwen_text.py", "x[i - 1] for x in read", "x[i % len(x)] for x in read",
        "tests/models/test_qwen.py -k other_layers"),
    Bug("models: bidirectional queries are causal", "qk_jax/models/qwen_text.py",
        "not (self.bidirectional and len(keys) > 1)", "True",
        "tests/models/test_qwen.py -k bidirectional"),
    Bug("models: all examples have the same noise on their queries", "qk_jax/models/connector.py",
        "jax.random.normal(rng, (examples, *queries.shape), jnp.float32)",
        "jax.random.normal(rng, (1, *queries.shape), jnp.float32)",
        "tests/models/test_connector.py -k noise"),
    Bug("models: padding of a picture is attended to", "qk_jax/models/query_kontext.py",
        "shown = rotary.real_tokens(grids, tokens)",
        "shown = jnp.ones((len(x_t), sum(tokens)), bool)", f"{PADDING} -k unpadded"),
    Bug("models: padding has a place in the windows", "qk_jax/models/qwen_vision.py",
        "constant_values=-1", "constant_values=0", f"{PADDING} -k unpadded"),
    Bug("training: the loss is of padding too", "qk_jax/training/objectives/flow_matching.py",
        "values = flow.loss(prediction, target, real)", "values = flow.loss(prediction, target)",
        f"{PADDING} -k unpadded"),
    Bug("training: t is shifted for the tokens of the padding",
        "qk_jax/training/objectives/flow_matching.py",
        'tokens = jnp.prod(batch["grids"][:, 0], axis=-1)', "tokens = x0.shape[1]",
        f"{PADDING} -k unpadded"),
    Bug("training: every size of references is a program", "qk_jax/training/padding.py",
        "return min(found, key=_most_tokens)", "return (size,)", f"{PADDING} -k programs"),
    Bug("objectives: references count as sources of an edit",
        "qk_jax/training/objectives/regions.py",
        'changed &= batch["roles"][:, :1] == SOURCE', "",
        "tests/training/objectives -k changed_tokens"),
    Bug("objectives: what is logged has the region weight",
        "qk_jax/training/objectives/flow_matching.py",
        '            values = flow.loss(prediction, target, batch["region"])',
        '            values = aux["flow"] = flow.loss(prediction, target, batch["region"])',
        "tests/training/objectives -k region_weight"),
    Bug("export: the connector's other layers are read after the last",
        "qk_jax/export/kontext.py", "layers[number - 1]", "layers[number]",
        "tests/export/test_pipeline.py -k layers_noise"),
    Bug("models: latents are scaled before they are shifted", "qk_jax/models/vae.py",
        "(z.astype(jnp.float32) - shift) * scale", "z.astype(jnp.float32) * scale - shift",
        "tests/models/test_vae.py -k normalisation"),
    Bug("models: a sample of the posterior has the variance as deviation", "qk_jax/models/vae.py",
        "jnp.exp(0.5 * logvar)", "jnp.exp(logvar)", f"{LAWS} -k posterior"),
    Bug("models: strided convolutions pad above and to the left", "qk_jax/models/vae_blocks.py",
        "(0, 1) if self.stride == 2", "(1, 0) if self.stride == 2",
        "tests/models/test_vae.py -k equals_diffusers"),
    Bug("models: references lie on the target", "qk_jax/models/rotary.py",
        "past_references, past_sources = grids[:, 0], jnp.zeros_like(grids[:, 0])",
        "past_references = past_sources = jnp.zeros_like(grids[:, 0])",
        "tests/models/test_rotary.py -k reference"),
    Bug("models: adapters are merged without their scale", "qk_jax/models/lora.py",
        "scale * delta", "delta", "tests/models/test_lora.py -k merge"),
    # ---- data ----------------------------------------------------------------------------------
    Bug("data: a whole batch is dropped or none of it", "qk_jax/data/pipeline.py",
        'hashed(self.seed, "dropout", step, slot)', 'hashed(self.seed, "dropout", step)',
        f"{RECIPE} -k dropped"),
    Bug("data: validation follows the seed of the training", "qk_jax/data/pipeline.py",
        'config["validation"]["seed"]', 'config["seed"]', f"{RECIPE} -k held_fixed"),
    Bug("data: every host has the slots of the first", "qk_jax/data/pipeline.py",
        "(index * batch // count, (index + 1) * batch // count)", "(0, batch // count)",
        "tests/data/test_pipeline.py -k hosts"),
    Bug("data: the mask of the text is left-aligned", "qk_jax/data/prompts.py",
        "np.arange(window) >= window - read",
        "np.arange(window) < read", "tests/data/test_prompts.py -k slices"),
    Bug("data: a file with other records than its index passes", "qk_jax/data/records.py",
        "if count != len(self):", "if count < len(self):",
        "tests/data/importers/test_record_files.py -k index_of_another"),
    Bug("data: a target is joined to another size for the sake of its references",
        "qk_jax/data/plan.py", "np.lexsort((gaps, near))", "np.lexsort((near, gaps))",
        "tests/data/test_plan.py"),
    Bug("data: wide pictures go to tall buckets", "qk_jax/data/buckets.py",
        "np.log([size[1] / size[0] for size in sizes])",
        "np.log([size[0] / size[1] for size in sizes])", "tests/data/test_buckets.py -k nearest"),
    Bug("data: a slot is dropped by the law of another task", "qk_jax/data/pipeline.py",
        "self._dropped(step, slot, self.groups[index].task)",
        "self._dropped(step, slot, self.groups[chosen[0][0]].task)",
        "tests/data/test_mixed_batches.py -k dropped"),
    Bug("data: a shape has a task's whole weight", "qk_jax/data/plan.py",
        "* Fraction(len(group.numbers), examples[group.label])", "",
        "tests/data/test_mixed_batches.py -k weights"),
    Bug("data: a phase is as long as the steps before its end", "qk_jax/data/plan.py",
        "[end - first for first, end", "[end for first, end",
        "tests/data/test_curriculum.py -k 'counts or sizes'"),
    Bug("data: a source makes references smaller", "qk_jax/data/importers/record_files.py",
        "known = (width > 0).sum(axis=1)", "known = self.pictures_of",
        "tests/data/importers/test_record_files.py -k number"),
    # ---- data/synthesis ------------------------------------------------------------------------
    Bug("synthesis: a mirrored picture is upside down", "qk_jax/data/synthesis/scenes.py",
        '"mirror": lambda x: np.ascontiguousarray(x[:, ::-1])',
        '"mirror": lambda x: np.ascontiguousarray(x[::-1])',
        "tests/data/synthesis/test_scenes.py -k changes"),
    Bug("synthesis: what should grow shrinks", "qk_jax/data/synthesis/tasks.py",
        'boxes if kind == "bigger" else', 'boxes if kind == "smaller" else',
        "tests/data/synthesis/test_tasks.py -k edits"),
    Bug("synthesis: both splits draw alike", "qk_jax/data/synthesis/task.py",
        "hashed(settings.seed, corpus.split, self.task)", "hashed(settings.seed, self.task)",
        "tests/data/synthesis/test_tasks.py -k pure"),
    Bug("synthesis: a move also goes where it is not told", "qk_jax/data/synthesis/boxes.py",
        "if place[not across] == end[not across]]", "if place]",
        "tests/data/synthesis/test_truth.py -k 'squares and editing'"),
    Bug("synthesis: a thing gets the colour of its background", "qk_jax/data/synthesis/tasks.py",
        "np.stack([a.colour, canvas[0, 0]])", "np.stack([a.colour, a.colour])",
        "tests/data/synthesis/test_truth.py -k 'squares and editing'"),
    Bug("training: a constant kontext gains the mean feature",
        "qk_jax/training/objectives/flow_matching.py",
        "x = x - jnp.mean(weights[:, None] * x, axis=0)", "x = x - 0.0 * weights[:, None]",
        "tests/training/objectives -k constant"),
    # ---- experiment and configs ----------------------------------------------------------------
    Bug("experiment: the first update has no rate", "qk_jax/experiment/optimizer.py",
        "optax.linear_schedule(lr / warmup, lr", "optax.linear_schedule(0.0, lr",
        "tests/experiment/test_optimizer.py -k warms"),
    Bug("experiment: both moments have one decay", "qk_jax/experiment/optimizer.py",
        'config["b1"], config["b2"]', 'config["b1"], config["b1"]', f"{RECIPE} -k betas"),
    Bug("experiment: adapters are scaled by rank / alpha", "qk_jax/experiment/config.py",
        'config["lora"]["alpha"] / rank', 'rank / config["lora"]["alpha"]', f"{RECIPE} -k adapted"),
    Bug("experiment: trained weights rest as they are computed with", "qk_jax/experiment/plan.py",
        'column(trained, "optimizer")', 'column(trained, "params")',
        "tests/bench/test_shardings.py -k reviewed"),
    Bug("configs: stage 2 averages over ten thousand steps at tiny size", "configs/stage2.py",
        "0.99 if tiny else 0.9999", "0.9999", f"{RECIPE} -k average"),
    Bug("configs: nothing is clipped", "configs/common.py",
        '"clip": 1.0', '"clip": 0.0', f"{RECIPE} -k clipped"),
    Bug("configs: adapters of stage 3 have a quarter of their scale", "configs/stage3.py",
        "config.lora.alpha = 64.0 if tiny else 256.0", "config.lora.alpha = 16.0 if tiny else 64.0",
        f"{RECIPE} -k adapted"),
    # ---- weights -------------------------------------------------------------------------------
    Bug("weights: convolutions leave with their sides swapped", "qk_jax/weights/tables.py",
        "lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1)",
        "lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 1, 0)",
        "tests/weights/test_tables.py -k 'walk or vae_computes'"),
    Bug("weights: shards of an earlier export stay", "qk_jax/weights/safetensors.py",
        "if stale.fullmatch(file.name):", 'if file.name == f"{base}.safetensors":',
        "tests/weights/test_safetensors.py -k takes_away"),
    Bug("weights: rank-stabilised adapters are read as plain ones", "qk_jax/weights/lora_files.py",
        'math.sqrt(rank) if config.get("use_rslora") else rank', "rank",
        "tests/weights/test_lora_files.py"),
    Bug("weights: a stack has its first layer's dtype", "qk_jax/weights/leaves.py",
        "widest({source.dtypes[name] for name in names})", "source.dtypes[names[0]]",
        "tests/weights/test_from_pytorch.py -k widest"),
    Bug("weights: what a vision section leaves out is what the 7b has",
        "qk_jax/weights/hub_configs.py", '"tokens_per_second": 4', '"tokens_per_second": 2',
        "tests/weights/test_hub_configs.py -k leaves_out"),
    Bug("weights: values beyond float16 become infinite", "qk_jax/weights/leaves.py",
        "if not np.isfinite(out).all():", "if np.isnan(out).any():",
        "tests/weights/test_tables.py -k float16"),
    # ---- checkpoints ---------------------------------------------------------------------------
    Bug("checkpoints: flipped bits are restored", "qk_jax/checkpoints/store.py",
        'if leaf["digest"] != found.meta["leaves"][item][name]["digest"]:',
        'if leaf["shape"] != found.meta["leaves"][item][name]["shape"]:',
        "tests/checkpoints/test_store.py -k flipped"),
    Bug("checkpoints: every step is kept", "qk_jax/checkpoints/store.py",
        "policies.LatestN(keep)", "policies.LatestN(keep + 9)", f"{RECIPE} -k checkpoints"),
    Bug("checkpoints: a lost process damages what it restored", "qk_jax/checkpoints/store.py",
        "except (InputError, MemoryError, jax.errors.JaxRuntimeError):",
        "except (InputError, MemoryError):", "tests/checkpoints/test_store.py -k fault"),
    Bug("checkpoints: what could not be saved fills the disk", "qk_jax/checkpoints/store.py",
        "files.remove_folder(left)", "pass", "tests/training/test_saving.py -k told_at_the_next"),
    Bug("checkpoints: prune trusts what stays", "qk_jax/checkpoints/tools.py",
        "        _whole(known[-1])", "        pass", "tests/checkpoints/test_tools.py -k prune"),
    Bug("checkpoints: an average is summed in the dtype of the leaf",
        "qk_jax/checkpoints/steps.py", "term = leaf.astype(jnp.float32)", "term = leaf",
        "tests/checkpoints/test_tools.py -k mean"),
    Bug("training: a failed save is told at the next one", "qk_jax/training/loop.py",
        "                self.saver.check()\n", "", "tests/training/test_run.py -k full_for"),
    Bug("checkpoints: the last weights are loaded for their average",
        "qk_jax/checkpoints/run_folder.py",
        'item = "ema" if ema and "ema" in found["leaves"] else "params"', 'item = "params"',
        "tests/training/test_run.py -k leaves_behind"),
    # ---- painting ------------------------------------------------------------------------------
    Bug("painting: pictures of one prompt have the same noise", "qk_jax/painting/painter.py",
        "jax.random.fold_in(jax.random.key(request.seed), request.number)",
        "jax.random.key(request.seed)", "tests/painting/test_painter.py -k noise"),
    Bug("painting: guidance starts from the full velocity", "qk_jax/painting/programs.py",
        "v[1] + scale * (v[0] - v[1])", "v[0] + scale * (v[0] - v[1])",
        "tests/export/test_pipeline.py -k same_noise"),
    Bug("painting: an export has the position law of the paper", "qk_jax/painting/exported.py",
        'rotary.PositionLaw(index["law"], index["source_mode"], index["index_base"])',
        "rotary.PositionLaw()", "tests/painting/test_exported.py -k again"),
    Bug("painting: pictures are rounded down", "qk_jax/painting/programs.py",
        "jnp.round((x + 1.0) * 127.5)", "jnp.floor((x + 1.0) * 127.5)",
        "tests/painting/test_painter.py -k rounded"),
    Bug("painting: a reference goes to the size of its transpose", "qk_jax/painting/painter.py",
        "buckets.nearest(x.shape[0], x.shape[1], known)",
        "buckets.nearest(x.shape[1], x.shape[0], known)",
        "tests/painting/test_painter.py -k aspect"),
    Bug("painting: a source chooses the size of its transpose", "qk_jax/painting/painter.py",
        "buckets.nearest(source.shape[0], source.shape[1]",
        "buckets.nearest(source.shape[1], source.shape[0]",
        "tests/painting/test_painter.py -k fit"),
    Bug("painting: a picture alone takes eight slots", "qk_jax/painting/painter.py",
        "self.batch or min(len(members), MOST_AT_ONCE)", "self.batch or MOST_AT_ONCE",
        "tests/painting/test_painter.py -k wasted"),
    Bug("data: a character that is one token is unknown", "qk_jax/data/prompts.py",
        "ends.issuperset(range(start, end + 1))", "ends.issuperset((start, end))",
        "tests/data/test_prompts.py -k tiny_tokenizer"),
    Bug("base: small programs are compiled anew", "qk_jax/base/runtime.py",
        '"jax_persistent_cache_min_compile_time_secs", 0.0',
        '"jax_persistent_cache_min_compile_time_secs", 1.0', "tests/base/test_runtime.py -k small"),
    # ---- training ------------------------------------------------------------------------------
    Bug("training: the shapes of a sheet differ", "qk_jax/training/evals.py",
        "numbers[kind == often.argmax()]", "numbers", "tests/training/test_evals.py -k one_shape"),
    Bug("training: the shift is that of the channels",
        "qk_jax/training/objectives/flow_matching.py",
        "(x0.shape[0],), law, tokens)", "(x0.shape[0],), law, x0.shape[2])",
        f"{LAWS} -k law_of_the_config"),
    Bug("training: noise has the key of the times", "qk_jax/training/objectives/flow_matching.py",
        "jax.random.normal(noise_key", "jax.random.normal(posterior_key", f"{LAWS} -k posterior"),
    Bug("training: validation draws by the seed of the training", "qk_jax/training/step.py",
        "plan.config.validation.seed", "plan.config.seed", f"{LAWS} -k validation"),
    Bug("training: gradients of micro-batches are summed", "qk_jax/training/gradients.py",
        "t + g / accumulation", "t + g", "tests/experiment/test_optimizer.py -k accumulated"),
    Bug("training: the average follows the old weights", "qk_jax/training/step.py",
        "optimizer.ema_update(ema, params, state.step",
        "optimizer.ema_update(ema, state.params, state.step", f"{RECIPE} -k average"),
    Bug("training: the last step is not evaluated", "qk_jax/training/evals.py",
        "(step % every == 0 or step == self.plan.config.steps)", "(step % every == 0)",
        f"{RECIPE} -k evaluates"),
    Bug("training: the metrics of the last step are dropped on resuming",
        "qk_jax/training/metrics.py",
        '["step"] <= step:', '["step"] < step:', "tests/training/test_metrics.py -k writers"),
    Bug("training: a LoRA file is scaled twice", "qk_jax/training/start.py",
        "1 / plan.model.config.lora_scale", "plan.model.config.lora_scale",
        "tests/training/test_start.py -k lora"),
    Bug("training: an unfinished stage is started from", "qk_jax/training/start.py",
        "if step < steps and not init.unfinished", "if step < 1 and not init.unfinished",
        "tests/training/test_run.py -k last_step"),
    Bug("training: what an origin lacks is drawn", "qk_jax/training/start.py",
        "fresh = tuple(part for part, word in words.items() if word == origins.FRESH)",
        "fresh = tuple(words)", "tests/training/test_start.py -k drawn"),
    Bug("experiment: a part may be without an origin", "qk_jax/experiment/origins.py",
        "        if not place:", "        if place is None:",
        "tests/experiment/test_origins.py -k without_an_origin"),
    Bug("experiment: a wrong name is answered by spelling alone", "qk_jax/experiment/glossary.py",
        "if _MEANT.get(word) in known:", "if word in known:",
        "tests/experiment/test_glossary.py -k meaning"),
    # ---- evaluation ----------------------------------------------------------------------------
    Bug("evaluation: equal pictures count for the truth", "qk_jax/evaluation/similarity.py",
        "np.sum(likeness >= own, axis=1) - 1", "np.sum(likeness > own, axis=1)",
        "tests/evaluation/test_similarity.py -k ranks"),
    Bug("evaluation: the worst copy is the one to beat", "qk_jax/evaluation/held_out.py",
        "best.append(max(", "best.append(min(", "tests/evaluation/test_held_out.py -k nearest"),
    # ---- export --------------------------------------------------------------------------------
    Bug("export: sources of the pipeline lie on each other", "qk_jax/export/kontext.py",
        "past_sources = past_sources + size", "past_sources = past_sources + 0 * size",
        "tests/export/test_pipeline.py -k shifted"),
    Bug("export: a width alone turns the source's aspect", "qk_jax/export/pipeline.py",
        "round(width * rows / columns / TOKEN)", "round(width * columns / rows / TOKEN)",
        "tests/export/test_arguments.py -k one_side"),
    Bug("export: an older diffusers paints on", "qk_jax/export/pipeline.py",
        "if value and key not in known and", "if not value and key not in known and",
        "tests/export/test_arguments.py -k older"),
    Bug("export: noise of a stochastic step is drawn apart from the seed",
        "qk_jax/export/pipeline.py", "then * self._noise(x.shape, generator)",
        "then * self._noise(x.shape, None)", "tests/export/test_arguments.py -k settings_are"),
    Bug("export: one good line makes an export good", "qk_jax/export/verify.py",
        "return all(line.is_good for line in lines)", "return any(line.is_good for line in lines)",
        "tests/export/test_pipeline.py -k verify_passes"),
    Bug("export: the processor shows pictures larger than in training", "qk_jax/export/folder.py",
        '"max_pixels": max(areas)', '"max_pixels": 4 * max(areas)',
        "tests/export/test_folder.py -k processor"),
    # ---- api -----------------------------------------------------------------------------------
    Bug("api: pictures of a batch are taken from the last", "qk_jax/api/published.py",
        "own.append(rest.pop(0))", "own.append(rest.pop())", "tests/api/test_api.py -k vlm_equals"),
    Bug("api: masks of zeros and ones are taken as they are", "qk_jax/api/published.py",
        "(pictured[row] & ~mask[row]).any()", "False",
        "tests/api/test_api.py -k arguments_are_named"),
    # ---- bench ---------------------------------------------------------------------------------
    Bug("bench: the moving average takes no memory", "qk_jax/bench/cost.py",
        "3 + bool(plan.config.optimizer.ema)", "3",
        "tests/bench/test_cost.py tests/bench/test_shardings.py -k 'parts or reviewed or bytes'"),
    Bug("bench: a search keeps meshes that do not fit", "qk_jax/bench/search.py",
        "nbytes > target.hbm_bytes", "nbytes > 2 * target.hbm_bytes",
        "tests/bench/test_layouts.py -k search"),
    Bug("bench: a torn line stays in the table", "qk_jax/bench/table.py",
        "if text != whole:", "if not whole:",
        "tests/bench/test_layouts.py -k 'interruption or goes_on'"),
    # ---- bench/schedule ------------------------------------------------------------------------
    Bug("schedule: a loop counts once", "qk_jax/bench/schedule/walk.py",
        "1 if times is None else times", "1", "tests/bench/schedule/test_walk.py -k loop"),
    Bug("schedule: hidden transfers take time", "qk_jax/bench/schedule/estimates.py",
        "sum(one.exposed_seconds for one in collectives)",
        "sum(one.seconds for one in collectives)",
        "tests/bench/schedule/test_walk.py -k asynchronous"),
    Bug("schedule: an all-reduce costs as much as a reduce-scatter",
        "qk_jax/bench/schedule/topologies.py",
        '2 * once if kind == "all-reduce" else once', "once",
        "tests/bench/schedule -k 'reduce or collective'"),
    # ---- mains ---------------------------------------------------------------------------------
    Bug("sample: the average is painted with when it is refused", "qk_jax/sample.py",
        "ema=not args.no_ema", "ema=args.no_ema", "tests/test_sample.py -k unless_refused"),
    Bug("convert: sizes are powers of 1024", "qk_jax/convert.py",
        "* 1000 **", "* 1024 **", "tests/weights/test_from_pytorch.py -k powers"),
    Bug("base: shells offer files where a folder is asked for", "qk_jax/base/cli.py",
        "= shtab.DIRECTORY", "= shtab.FILE", "tests/base/test_cli.py -k offers"),
    Bug("base: the first Ctrl-C ends a training unsaved", "qk_jax/base/runtime.py",
        "_patient = True", "_patient = False", "tests/base/test_stopping.py"),
    Bug("training: the bar names what is over", "qk_jax/training/phases.py",
        'self._open[-1].name if self._open else ""', "ended.name", "tests/training/test_phases.py"),
    Bug("docs: the site has links that lead nowhere", "launch/docs/mkdocs.yml",
        "anchors: warn", "anchors: info", "tests/test_site.py -k nowhere"),
    Bug("docs: search takes a field's name for one word", "launch/docs/mkdocs.yml",
        "|\\.(?!\\d)", "", "tests/test_site.py -k search"),
    Bug("launch: the image runs as root", "launch/docker/Dockerfile",
        "USER 1000\n", "", "tests/launch/test_image.py -k roots"),
)
# fmt: on


# ---- planting -----------------------------------------------------------------------------------


def copied(folder: pathlib.Path) -> None:
    """Copies what git tracks or does not ignore, as it is in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in sorted(set(listed.split("\0")) - {""}):
        if (ROOT / name).is_file():  # a tracked file may be gone
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


@contextlib.contextmanager
def planted(folder: pathlib.Path, bug: Bug) -> Iterator[None]:
    """The bug in the copy, while the block lasts."""
    file = folder / bug.file
    before = file.read_text()
    file.write_text(before.replace(bug.old, bug.new))
    try:
        yield
    finally:
        file.write_text(before)


def misfits(folder: pathlib.Path, bugs: list[Bug]) -> list[str]:
    """What is wrong with the table: files and texts that are not there, or not once."""
    found = []
    for bug in bugs:
        file = folder / bug.file
        count = file.read_text().count(bug.old) if file.is_file() else -1
        if count != 1:
            what = "there is no such file" if count < 0 else f"it has {bug.old!r} {count} times"
            found.append(f"{bug.name}: {bug.file}: {what}")
        for name in shlex.split(bug.tests):
            if name.startswith("tests/") and not (folder / name.partition("::")[0]).exists():
                found.append(f"{bug.name}: there is no {name}")
    return found


def run(folder: pathlib.Path, *words: str) -> tuple[int | None, str]:
    """(pytest's exit status, or None where it took too long; its output)."""
    # Without .pyc files, whose times could hide a change within one second.
    own = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *words]
    try:
        done = subprocess.run(
            command, cwd=folder, env=os.environ | own, timeout=SECONDS,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, "took too long"
    return done.returncode, done.stdout


def failed(output: str) -> list[str]:
    """The tests that a summary of pytest names, or files that cannot be collected."""
    return re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", output, re.MULTILINE)


def main(argv: list[str]) -> int:
    """The exit status; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="bugs with TEXT in their name")
    parser.add_argument("--list", action="store_true", help="name the bugs and check their texts")
    parser.add_argument("--need", type=int, metavar="COUNT", help="default: all but three")
    args = parser.parse_args(argv)
    bugs = [bug for bug in BUGS if not args.only or any(text in bug.name for text in args.only)]
    need = args.need if args.need is not None else max(1, len(bugs) - 3)
    with tempfile.TemporaryDirectory(prefix="plant-") as name:
        folder = pathlib.Path(name)
        copied(folder)
        wrong = misfits(folder, bugs)
        if args.list:
            print(*(bug.name for bug in bugs), sep="\n")
        print(*wrong, sep="\n", end="\n" if wrong else "")
        if wrong or args.list:
            return 2 if wrong else 0
        seen: list[str] = []  # the first test that failed of each bug
        lost: list[Bug] = []
        for number, bug in enumerate(bugs, start=1):
            start = time.perf_counter()
            with planted(folder, bug):
                status, output = run(folder, "-x", *shlex.split(bug.tests))
            tests = failed(output)[:1] if status in (1, 2) else []
            seconds = time.perf_counter() - start
            word = f"caught by {tests[0]}" if tests else f"MISSED, status {status}"
            print(f"{number:3}/{len(bugs)} {seconds:5.0f} s  {bug.name}: {word}", flush=True)
            seen += tests
            lost += [] if tests else [bug]
        broken = failed(run(folder, *dict.fromkeys(seen))[1]) if seen else []
    caught = len(bugs) - len(lost)
    print(f"\n{caught} of {len(bugs)} caught, {need} asked for")
    for bug in lost:
        print(f"missed: {bug.name} ({bug.file}; pytest {bug.tests})")
    for test in broken:
        print(f"fails without a bug: {test}")
    return 2 if broken else int(caught < need)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
