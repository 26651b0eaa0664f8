"""Keeps the jobs of a synthesis for which a Qwen2.5-VL answers a question with Yes.

    python -m qk_jax.data synthesize --kind customization --input CUTOUTS --backgrounds PHOTOS \\
        --out MADE --command "python -m qk_jax.api.paint {jobs} {results} --checkpoint W/stage3" \\
        --command "python -m qk_jax.api.judge {jobs} {results} --model Qwen/Qwen2.5-VL-7B-Instruct"

The model sees the condition pictures, then the target, then the question. Nothing is generated: the
probability of Yes is that among the tokens of Yes and No as the first of the answer.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qk_jax.base import cli, hub, runtime
from qk_jax.base.errors import BadRecord, InputError, exits
from qk_jax.base.types import Tree
from qk_jax.data import templates
from qk_jax.data.prompts import PromptBuilder, load_tokenizer, pixel_values
from qk_jax.data.synthesis import commands
from qk_jax.models import qwen_vl
from qk_jax.pictures.fitting import contain
from qk_jax.pictures.grids import FACTOR, Grids
from qk_jax.pictures.roles import SOURCE
from qk_jax.weights.read import import_model

QUESTIONS = {
    "subject": (
        "The last picture is new. Does it show the same subjects as the pictures before it? "
        "Answer Yes or No."
    ),
    "instruction": (
        "The last picture was made by this instruction: {instruction}\n"
        "Does it show what the instruction asks for? Answer Yes or No."
    ),
}
ABOUT_SUBJECTS = ("customization", "composition")  # tasks
_LONGEST = 1024  # tokens of a question
_ROUND = 32  # tokens to multiples of which questions are padded, so that few programs are compiled


class Question(NamedTuple):
    """A text about pictures, uint8 [h, w, 3] each."""

    text: str
    pictures: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """A VLM that answers with Yes or No.

    Attributes:
      module: the model.
      params: of it, with its `lm_head`.
      tokenizer: of it.
      side: pixels of the white square on which each picture is shown, a multiple of 28.
      batch: questions at once.
    """

    module: qwen_vl.QwenVL
    params: Tree
    tokenizer: Any
    side: int = 448
    batch: int = 4

    @functools.cached_property
    def prompts(self) -> PromptBuilder:
        """Of questions: without queries, behind which the answer begins."""
        numbered = templates.preset("numbered")
        return PromptBuilder(self.tokenizer, _LONGEST, 0, self.side**2, numbered)

    @functools.cached_property
    def answers(self) -> tuple[int, int]:
        """First tokens of Yes and No. Raises: InputError when they are the same."""
        yes, no = (int(self.prompts.encode_text(word)[0]) for word in ("Yes", "No"))
        if yes == no:
            raise InputError("the tokenizer begins Yes and No with the same token; take another")
        return yes, no

    def probabilities(self, questions: Sequence[Question]) -> np.ndarray:
        """Probability of Yes beside No as first token of each answer, float32 [N].

        Raises: InputError for a question that is too long.
        """
        found = np.zeros(len(questions), np.float32)
        for members in self._groups(questions):
            for start in range(0, len(members), self.batch):
                chunk = members[start : start + self.batch]
                filled = chunk + chunk[-1:] * (self.batch - len(chunk))
                found[chunk] = self._ask([questions[i] for i in filled])[: len(chunk)]
        return found

    def _groups(self, questions: Sequence[Question]) -> Iterator[list[int]]:
        """Numbers of questions with as many pictures and about as many words."""
        groups: dict[tuple[int, int], list[int]] = {}
        for number, question in enumerate(questions):
            words = len(self.prompts.encode_text(question.text, strict=True))
            key = len(question.pictures), -(-words // _ROUND)
            groups.setdefault(key, []).append(number)
        yield from groups.values()

    def _ask(self, questions: Sequence[Question]) -> np.ndarray:
        """float32 [B] of questions of one group."""
        words = max(len(self.prompts.encode_text(one.text)) for one in questions)
        prompts = dataclasses.replace(self.prompts, max_text=-(-words // _ROUND) * _ROUND)
        square = (self.side, self.side)
        shown = [[contain(picture, square) for picture in one.pictures] for one in questions]
        sizes = [square] * len(shown[0])
        roles = [SOURCE] * len(sizes)
        built = [prompts.build(one.text, sizes, roles) for one in questions]
        names = ("input_ids", "position_ids", "attention_mask")
        arrays = [np.stack([x[name] for x in built]) for name in names]
        pixels = np.stack([pixel_values(pictures, self.side**2) for pictures in shown])
        logits = _first_logits(
            self.params, *arrays, pixels, module=self.module, grids=prompts.grids(sizes)
        )
        yes, no = self.answers
        return np.asarray(jax.nn.sigmoid(logits[:, yes] - logits[:, no]))


@functools.partial(jax.jit, static_argnames=("module", "grids"))
def _first_logits(
    params: Tree,
    ids: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    pixels: jax.Array,
    *,
    module: qwen_vl.QwenVL,
    grids: Grids,
) -> jax.Array:
    """Logits of the token behind each sequence, which is padded on the left: float32 [B, vocab]."""
    run: Any = functools.partial(module.apply, {"params": params})
    hidden = run(ids, positions, mask, pixels, grids)
    logits: jax.Array = run(hidden[:, -1:], method="logits")
    return logits[:, 0].astype(jnp.float32)


def load(
    model: str, tokenizer: str = "", *, dtype: Any = None, side: int = 448, batch: int = 4
) -> Judge:
    """The judge of a Qwen2.5-VL.

    Args:
      model: its folder or its id on the Hub.
      tokenizer: a folder or an id; '' is the model's own.
      dtype: of parameters and computation; None for that of the files.
      side, batch: as of `Judge`.

    Raises:
      InputError: one of them is wrong, or cannot be read.
    """
    if side < FACTOR or side % FACTOR or batch < 1:
        raise InputError(f"--side {side} is no multiple of {FACTOR}, or --batch {batch} is below 1")
    folder = hub.component_folder(model, "vlm")
    words = load_tokenizer(hub.component_folder(tokenizer or model, "tokenizer"))
    config, params = import_model("vlm", folder, dtype)
    params = jax.device_put(params)
    compute = jnp.dtype(jnp.result_type(*jax.tree.leaves(params)))
    return Judge(qwen_vl.QwenVL(config, compute), params, words, side, batch)


def question_of(job: commands.Job, ask: str, text: str) -> Question:
    """The question about a job, its target last. Raises: BadRecord for a picture."""
    about = ask or ("subject" if job.task in ABOUT_SUBJECTS else "instruction")
    words = (text or QUESTIONS[about]).replace("{instruction}", job.instruction)
    paths = [*(path for _, path in job.pictures), job.target]
    return Question(words, tuple(commands.read_picture(path) for path in paths))


def judged(
    judge: Judge, jobs: Sequence[commands.Job], least: float, ask: str = "", text: str = ""
) -> list[dict[str, Any]]:
    """The results of jobs: kept where the probability of Yes is at least `least`."""
    results: list[dict[str, Any]] = []
    for start in range(0, len(jobs), 16 * judge.batch):  # pictures in memory
        part, asked = jobs[start : start + 16 * judge.batch], dict[str, Question]()
        bad = dict[str, str]()
        for job in part:
            try:
                asked[job.id] = question_of(job, ask, text)
                judge.prompts.encode_text(asked[job.id].text, strict=True)
            except (BadRecord, InputError) as error:
                asked.pop(job.id, None)
                bad[job.id] = str(error)
        scores = dict(zip(asked, judge.probabilities(list(asked.values())).tolist(), strict=True))
        for job in part:
            if job.id in bad:
                results.append({"id": job.id, "keep": False, "reason": bad[job.id]})
                continue
            score = scores[job.id]
            line = {"id": job.id, "keep": score >= least, "score": round(score, 6)}
            if score < least:
                line["reason"] = f"the probability of Yes is {score:.3f}"
            results.append(line)
    return results


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = cli.Parser(prog="python -m qk_jax.api.judge", description=__doc__)
    add = out.add_argument
    add("jobs", metavar="JOBS", help="folder that synthesize has written")
    add("results", metavar="RESULTS", help="folder to write")
    add("--model", required=True, metavar="M", help="a Qwen2.5-VL: its folder or its id on the Hub")
    add("--tokenizer", default="", metavar="M", help="likewise (default: the model's)")
    add("--ask", default="", choices=("", *QUESTIONS), metavar="WHAT",
        help="subject or instruction (default: by the task)")  # fmt: skip
    add("--question", default="", metavar="TEXT",
        help="another question; {instruction} stands for that of the job")  # fmt: skip
    add("--least", type=float, default=0.5, metavar="P",
        help="probability of Yes from which on a job is kept (default: %(default)s)")  # fmt: skip
    add("--side", type=int, default=448, metavar="N",
        help="pixels of the square on which a picture is shown (default: %(default)s)")  # fmt: skip
    add("--batch", type=int, default=4, metavar="N", help="questions at once (default: 4)")
    add("--dtype", help="of parameters and computation (default: the files')")
    return out


@exits
def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    args = parser().parse_args(argv)
    if not 0 <= args.least <= 1:
        raise InputError(f"--least {args.least:g} is no probability")
    runtime.start_logging()
    runtime.skip_absent_tpu()
    runtime.keep_programs()
    jobs = commands.read_jobs(args.jobs)
    judge = load(args.model, args.tokenizer, dtype=args.dtype, side=args.side, batch=args.batch)
    lines = judged(judge, jobs, args.least, args.ask, args.question)
    commands.write_results(args.results, lines)


if __name__ == "__main__":
    main(sys.argv[1:])
