"""Trains one stage of Query-Kontext.

    python -m qk_jax.train --config configs/stage1.py:tiny --workdir runs/tiny
        [--config.optimizer.lr=3e-4 ...]

writes <workdir>/<stage>/: checkpoints/, frozen/, tokenizer/, metrics.jsonl, TensorBoard events,
config.json.
The same command again resumes after the last whole checkpoint, bit for bit. SIGTERM saves and
leaves with status 42, Ctrl-C with 130; wrong input ends with one line and status 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import pathlib
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import absl.logging
import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from qk_jax import errors, painting, sharding, sheets
from qk_jax.data import pipeline, prompts
from qk_jax.data.tasks import REFERENCE, SOURCE, TASKS, Example
from qk_jax.errors import InputError
from qk_jax.models.query_kontext import QueryKontext
from qk_jax.training import checkpoint, flops, initial, metrics, optimizer, stages
from qk_jax.training import config as config_lib
from qk_jax.training import state as state_lib
from qk_jax.training import step as step_lib
from qk_jax.training.state import Layout, TrainState

log = logging.getLogger("qk_jax")
PREEMPTED, INTERRUPTED = 42, 130
Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Moment:
    """What a hook gets to see: the model as it is after `step` updates.

    Attributes:
      step: finished updates.
      model: the model.
      params: all parameters in one tree, the moving average where there is one.
      config: the run's config.
      folder: the stage's folder.
      writers: for figures and pictures (`write`, `picture`).
    """

    step: int
    model: QueryKontext
    params: dict[str, Any]
    config: ConfigDict
    folder: pathlib.Path
    writers: metrics.Writers


Hook = Callable[[Moment], None]


def train(config: ConfigDict, workdir: str | os.PathLike, hooks: Sequence[Hook] = ()) -> None:
    """Runs the config's stage to its last step, from its start or from where it stopped.

    Args:
      config: of `config.load`.
      workdir: the stage's folder is made inside.
      hooks: called before the first step, every samples.every steps and at the end.

    Raises:
      InputError: anything wrong with config, folders, checkpoints or data, or a loss of NaN.
      SystemExit: 42 after SIGTERM, 130 after Ctrl-C; the state is saved.
    """
    folder = stage_folder(workdir, config.stage)
    if config.compilation_cache and not jax.config.jax_compilation_cache_dir:
        cache = pathlib.Path(workdir).resolve() / "compilation_cache"
        jax.config.update("jax_compilation_cache_dir", str(cache))

    # ---- model, mesh, optimizer: shapes and shardings only -------------------------------------
    mesh = sharding.build_mesh(config.mesh, slices=config.slices)
    with jax.set_mesh(mesh):
        model = state_lib.build_model(config)
        layout = Layout(model, config, mesh)
        adam = state_lib.build_optimizer(config, layout)
        check_rows(config, mesh)
        describe(config, layout)

        # ---- state: resumed, or as the stage starts --------------------------------------------
        store = checkpoint.Store(
            folder / initial.CHECKPOINTS,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
        )
        state, frozen, fingerprint = restore_or_start(store, model, config, layout, adam, folder)
        first = int(state.step)
        (folder / "config.json").write_text(config_lib.to_json(config), encoding="utf-8")
        if first >= config.steps:
            log.info("%s is done: %d of %d steps", folder, first, config.steps)
            return

        # ---- the run ---------------------------------------------------------------------------
        run = Run(model, config, layout, adam, store, frozen, fingerprint, folder, hooks)
        try:
            run.loop(state, first)
        finally:
            run.close()


def stage_folder(workdir: str | os.PathLike, stage: str) -> pathlib.Path:
    """Makes <workdir>/<stage>.

    Raises:
      InputError: it cannot be made or written.
    """
    folder = pathlib.Path(workdir) / stage
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be written: {error.strerror}") from error
    return folder


def check_rows(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raises InputError unless batch, accumulation and mesh divide."""
    count = config.optimizer.accumulation
    if count < 1 or config.data.batch % count:
        raise InputError(
            f"optimizer.accumulation {count} must divide data.batch {config.data.batch}"
        )
    towers = sharding.tables(config.sharding)
    sharding.check_batch(config.data.batch // count, mesh, towers)
    sharding.check_batch(config.validation.batch, mesh, towers)


def token_layout(config: ConfigDict, workdir: pathlib.Path) -> prompts.PromptLayout:
    """The layout of token rows, checked against the model.

    Where the config names no tokenizer it is the one of the stage before.

    Raises:
      InputError: there is no tokenizer, or it is not the VLM's.
    """
    kept = workdir / stages.get(config.stage).previous / initial.TOKENIZER
    if not (config.data.tokenizer or config.init.vlm) and kept.is_dir():
        config.data.tokenizer = str(kept)
    layout = pipeline.make_layout(config)
    pairs = {
        "tail_tokens": (layout.tail_tokens, config.model.tail_tokens),
        "vlm.image_token_id": (layout.image_token_id, config.model.vlm.image_token_id),
    }
    for name, (found, wanted) in pairs.items():
        if found != wanted:
            raise InputError(
                f"the tokenizer gives {name} = {found}, config.model.{name} is {wanted}; "
                "set data.tokenizer to the VLM's tokenizer, or the field"
            )
    return layout


def describe(config: ConfigDict, layout: Layout) -> None:
    """Logs what is trained and frozen, rule by rule."""
    tree = checkpoint.named(stages.join(layout.params, layout.frozen))
    sizes = {name: math.prod(leaf.shape) for name, leaf in tree.items()}
    for line in stages.report(sizes, state_lib.stage_rules(config)):
        log.info("%s", line)
    log.info(
        "mesh %s, %.1f%% of shardable bytes replicated",
        dict(layout.mesh.shape),
        100 * layout.unsharded,
    )


def restore_or_start(
    store: checkpoint.Store,
    model: QueryKontext,
    config: ConfigDict,
    layout: Layout,
    adam: optimizer.Optimizer,
    folder: pathlib.Path,
) -> tuple[TrainState, dict[str, Any], str]:
    """(state, frozen tree, fingerprint of the frozen tree) to go on from.

    Raises:
      InputError: checkpoints exist but none is whole, or they are of another stage or size.
    """
    target = layout.state(config, adam.tx)
    if not store.is_new():
        items = {"params": target.params, "optimizer": target.opt_state, "ema": target.ema}
        items = {name: tree for name, tree in items.items() if name != "ema" or tree}

        def wanted(found: checkpoint.Meta) -> checkpoint.Trees:
            initial.check_fits(found, config, store.root)
            return items

        got = store.restore(wanted)
        changed = config_lib.differences(got.meta["config"], json.loads(config_lib.to_json(config)))
        for line in changed:
            log.warning("config differs from the checkpoint's: %s", line)
        frozen = frozen_again(got.meta, model, config, layout, folder)
        log.info("resuming %s after step %d", folder, got.step)
        state = TrainState(
            step=jax.device_put(np.int32(got.step), sharding.replicated(layout.mesh)),
            params=got.items["params"],
            opt_state=got.items["optimizer"],
            ema=got.items.get("ema", {}),
        )
        return state, frozen, got.meta["frozen"]

    if jax.process_index() == 0:  # left by a run that was stopped before its first checkpoint
        shutil.rmtree(folder / initial.FROZEN, ignore_errors=True)
    params = initial.parameters(model, config, layout, folder.parent)
    trained, frozen = stages.split(params, state_lib.stage_rules(config))
    fingerprint = initial.save_frozen(folder, frozen, config)
    return state_lib.create(trained, adam.tx, target), frozen, fingerprint


def frozen_again(
    found: checkpoint.Meta,
    model: QueryKontext,
    config: ConfigDict,
    layout: Layout,
    folder: pathlib.Path,
) -> dict[str, Any]:
    """The frozen tree of a resumed run: from disk, or made anew from where the stage started.

    Raises:
      InputError: it is lost on disk and what it was made from is gone or has changed.
    """
    try:
        return initial.read_frozen(folder, found, lambda _: layout.frozen)
    except InputError as error:
        log.warning("%s; making it anew", error)
    if jax.process_index() == 0:
        shutil.rmtree(folder / initial.FROZEN, ignore_errors=True)
    params = initial.parameters(model, config, layout, folder.parent)
    frozen = stages.split(params, state_lib.stage_rules(config))[1]
    if initial.save_frozen(folder, frozen, config) != found["frozen"]:
        raise InputError(
            f"{folder / initial.FROZEN} is lost, and config.init no longer gives the same "
            "parameters; restore the folder from a copy"
        )
    return frozen


class Run:
    """One process's training loop and what hangs on it."""

    def __init__(
        self,
        model: QueryKontext,
        config: ConfigDict,
        layout: Layout,
        adam: optimizer.Optimizer,
        store: checkpoint.Store,
        frozen: dict[str, Any],
        fingerprint: str,
        folder: pathlib.Path,
        hooks: Sequence[Hook],
    ):
        self.model, self.config, self.layout, self.folder = model, config, layout, folder
        self.store, self.frozen, self.fingerprint = store, frozen, fingerprint
        self.hooks = tuple(hooks)
        self.train_step = step_lib.Compiled(model, config, layout, adam)
        self.eval_step = step_lib.make_eval_step(model, config, layout)
        tokens = token_layout(config, folder.parent)
        initial.keep_tokenizer(folder, tokens.tokenizer)
        self.data = pipeline.Pipeline(config, "train", layout=tokens)
        self.held_out = pipeline.Pipeline(config, "validation", layout=tokens)
        self.window, self.clock = metrics.Window(), metrics.Clock()
        self.peak = flops.peak(jax.devices()[0])
        self.signal = 0
        self.writers: metrics.Writers | None = None

    def loop(self, state: TrainState, first: int) -> None:
        """Steps first + 1 ... config.steps."""
        config, total = self.config, self.config.steps
        self.writers = metrics.Writers(self.folder, first, config)
        if first == 0:
            if config.validation.every:
                self.validate(state, 0)
            self.call_hooks(state, 0)
        bar = tqdm.tqdm(
            total=total, initial=first, desc=config.stage, unit="step", smoothing=0.1,
            disable=jax.process_index() != 0, mininterval=0.5 if sys.stderr.isatty() else 20,
        )  # fmt: skip
        pending: tuple[int, Any, int, int] | None = None
        with bar, self.signals():
            batches = self.data.batches(first)
            for step in range(first + 1, total + 1):
                self.clock.begin()
                batch = self.device(next(batches))
                self.clock.data_ready()
                state, values, work, compiled = self.train_step(state, self.frozen, batch)
                if pending:
                    self.record(pending, bar, counts=not compiled)
                pending = (step, values, batch["task"].shape[0], work)
                leave = self.asked_to_leave(step)
                if self.is_due(step, leave):
                    self.record(pending, bar, counts=False)
                    pending = None
                    self.between(state, step, leave)
                    self.clock.pause()
        log.info("%s: %d steps done", self.folder, total)

    def is_due(self, step: int, leave: int) -> bool:
        """Whether something besides training happens after `step`."""
        config = self.config
        every = (config.checkpoint.every, config.validation.every, config.samples.every)
        return bool(leave) or step == config.steps or any(n and step % n == 0 for n in every)

    def between(self, state: TrainState, step: int, leave: int) -> None:
        """Saving, validation and hooks after `step`; leaves when asked to."""
        config = self.config
        last = step == config.steps
        if last or leave or (config.checkpoint.every and step % config.checkpoint.every == 0):
            self.save(state, step)
        if leave:
            self.store.wait()
            log.info("stopped by a signal after step %d; run the same command to go on", step)
            raise SystemExit(leave)
        every = config.validation.every
        if every and (last or step % every == 0):
            self.validate(state, step)
        if last or (config.samples.every and step % config.samples.every == 0):
            self.call_hooks(state, step)

    def record(self, pending: tuple[int, Any, int, int], bar: tqdm.tqdm, counts: bool) -> None:
        """Fetches the metrics of a step (waiting for it) and logs when due.

        Raises:
          InputError: the loss is not finite; names the step.
        """
        step, values, rows, work = pending
        values = jax.device_get(values)
        self.clock.end(rows, work, counts)
        if not math.isfinite(values["loss"]):
            self.store.wait()
            known = [s for s in self.store.steps() if s < step]
            raise InputError(
                f"the loss is {values['loss']} at step {step} of {self.config.stage}; the last "
                f"checkpoint is of step {known[-1] if known else 'none'}: lower optimizer.lr or "
                "optimizer.clip and run again"
            )
        self.window.add(values)
        bar.update()
        if step % self.config.log.every == 0 or step == self.config.steps:
            row = self.window.take()
            row |= self.clock.take(self.peak, jax.device_count())
            self.writers.write(step, "train", row)
            speed = row.get("pictures_per_second")
            bar.set_postfix_str(
                f"loss {row['loss']:.4f}" + (f", {speed:.1f} pictures/s" if speed else "")
            )

    def device(self, batch: Batch) -> Batch:
        """This host's rows -> global arrays over (data, fsdp)."""
        place = sharding.batch_sharding(self.layout.mesh)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x), batch)

    def weights(self, state: TrainState) -> dict[str, Any]:
        """The trained leaves that validation and painting use."""
        if not state.ema:
            return state.params
        return jax.device_put(state.ema, step_lib.places(self.layout.params))

    def validate(self, state: TrainState, step: int) -> None:
        """Loss on the fixed validation batches, per task and per t-bin."""
        window = metrics.Window()
        for index, batch in enumerate(self.held_out.fixed()):
            place = sharding.replicated(self.layout.mesh)
            number = jax.device_put(np.int32(index), place)
            values = self.eval_step(self.weights(state), self.frozen, self.device(batch), number)
            window.add(jax.device_get(values))
        if window.steps:
            self.writers.write(step, "validation", window.take())

    def call_hooks(self, state: TrainState, step: int) -> None:
        """Hands the model to every hook."""
        if self.hooks:
            params = stages.join(self.weights(state), self.frozen)
            moment = Moment(step, self.model, params, self.config, self.folder, self.writers)
            for hook in self.hooks:
                hook(moment)

    def save(self, state: TrainState, step: int) -> None:
        """Starts writing a checkpoint."""
        items = {"params": state.params, "optimizer": state.opt_state}
        if state.ema:
            items["ema"] = state.ema
        self.store.save(step, items, initial.metadata(self.config) | {"frozen": self.fingerprint})

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Meanwhile SIGTERM and Ctrl-C only leave a note."""
        status = {signal.SIGTERM: PREEMPTED, signal.SIGINT: INTERRUPTED}

        def note(number: int, frame: Any) -> None:
            self.signal = status[number]

        old = {number: signal.signal(number, note) for number in status}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def asked_to_leave(self, step: int) -> int:
        """The exit status to leave with after `step`, or 0; the same on every host."""
        if jax.process_count() > 1:
            return PREEMPTED if multihost_utils.reached_preemption_sync_point(step) else 0
        return self.signal

    def close(self) -> None:
        """Waits for the last checkpoint and closes all files."""
        self.store.close()
        self.data.close()
        self.held_out.close()
        if self.writers is not None:
            self.writers.close()


def sheet_hook(config: ConfigDict) -> Hook:
    """Paints the same few validation records of every task of the run, beside their truth.

    Sheets go to <stage folder>/samples/ and to TensorBoard.

    Raises:
      InputError: the validation data is missing, or a setting of `samples` cannot be used.
    """
    section = config.samples
    settings = painting.Settings(section.steps, section.guidance, section.image_guidance)
    settings.check()
    names = [name for name in TASKS if config.data.tasks[name] > 0]
    held_out = pipeline.make_sources(config, "validation", config.validation.seed, names)
    shown = {
        name: [held_out[name][i] for i in range(min(section.records, len(held_out[name])))]
        for name in names
    }

    def request(example: Example, number: int) -> painting.Request:
        pictures = list(zip(example.pictures, example.roles, strict=True))
        source = next((picture for picture, role in pictures if role == SOURCE), None)
        references = tuple(picture for picture, role in pictures if role == REFERENCE)
        size = example.target.shape[:2]
        return painting.Request(example.instruction, source, references, size, section.seed, number)

    def paint(moment: Moment) -> None:
        painter = painting.of_params(moment.model.config, moment.params, moment.config)
        for name, examples in shown.items():
            requests = [request(example, i) for i, example in enumerate(examples)]
            rows = []
            painted = painter.paint(requests, settings)
            for example, picture in zip(examples, painted, strict=True):
                given = [("given", shown) for shown in example.pictures]
                cells = [*given, ("painted", picture), ("truth", example.target)]
                rows.append((example.instruction, cells))
            sheet = sheets.draw(f"{name}, {config.stage}, step {moment.step}", rows)
            sheets.save(sheet, moment.folder / "samples" / f"{name}_{moment.step:07d}.png")
            moment.writers.picture(moment.step, f"samples/{name}", np.asarray(sheet.convert("RGB")))

    return paint


def parse(argv: Sequence[str]) -> tuple[str, str, dict[str, str]]:
    """(config spec, workdir, overrides) of a command line.

    Raises:
      InputError: an unknown flag, a flag without a value, or a missing one.
      SystemExit: 0 after --help.
    """
    given: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        if word in ("-h", "--help"):
            print(__doc__)
            raise SystemExit(0)
        name, equals, value = word.partition("=")
        known = name in ("--config", "--workdir") or name.startswith("--config.")
        if not known:
            raise InputError(
                f"argument {word!r} is unknown; usage: --config FILE.py:SIZE --workdir DIR "
                "[--config.FIELD=VALUE ...]"
            )
        if not equals:
            value = next(words, None)
            if value is None:
                raise InputError(f"{name} needs a value: {name}=VALUE")
        given[name] = value
    for name in ("--config", "--workdir"):
        if not given.get(name):
            raise InputError(f"{name} is missing; usage: --config FILE.py:SIZE --workdir DIR")
    overrides = {
        k.removeprefix("--config."): v for k, v in given.items() if k.startswith("--config.")
    }
    return given["--config"], given["--workdir"], overrides


def start_logging() -> None:
    """Our own lines on stderr, with the time; of Orbax and its like only errors."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    absl.logging.set_verbosity(absl.logging.ERROR)


@errors.exits
def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    start_logging()
    spec, workdir, overrides = parse(argv)
    config = config_lib.load(spec, overrides)
    train(config, workdir, [sheet_hook(config)] if config.samples.every else ())


def run() -> None:
    """Entry point of the console script."""
    main(sys.argv[1:])


if __name__ == "__main__":
    run()
