"""What both sides of the comparison with PyTorch compute, and how a side is talked to.

A side is a process of its own, so that neither library's threads nor memory burden the other. It
reads numbers of steps from its standard input, a line each, and answers each with a line of JSON.
This file imports neither JAX nor PyTorch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

GUIDANCE = 4.0
SIGMA_STEP = -0.02  # of 50 sampling steps
# AdamW of both sides; each decays all parameters.
ADAM = {"lr": 1e-4, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.05}
MODEL, WORK = "transformer", "work.json"  # in the folder given to both
# (velocity of the batch before any step, float32 [B, N, C]; a step -> a number that depends on all
# that it computed; peak bytes)
Built = tuple[np.ndarray, Callable[[], float], Callable[[], int]]


class DeviceMissing(Exception):
    """The library of a side finds no device of the kind that was asked for."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What is computed.

    Attributes:
      what: 'train' is forward, backward and AdamW of all parameters on one flow-matching batch;
        'sample' one Euler step of the velocity with classifier-free guidance, without gradients.
      device: 'cpu' computes in float32; 'cuda' in bfloat16, with float32 weights and moments in
        training (torch.autocast on the other side) and bfloat16 weights in sampling.
      blocks: double-stream blocks; all begin with the weights of one.
      heads: of the attention.
      head_dim: channels of a head.
      context: channels of a text token.
      side: of the square of image tokens.
      text: text tokens.
      batch: examples; guidance runs twice as many.
      padded: texts have from half of `text` to all of it, and a mask hides the rest.
      threads: of each side, on the CPU.
    """

    what: str
    device: str
    blocks: int
    heads: int
    head_dim: int
    context: int
    side: int
    text: int
    batch: int
    padded: bool = True
    threads: int = 2

    @property
    def dtype(self) -> str:
        """Compute dtype."""
        return "bfloat16" if self.device == "cuda" else "float32"

    @property
    def weights(self) -> str:
        """Dtype of the parameters."""
        return self.dtype if self.what == "sample" else "float32"

    def arrays(self, channels: int) -> dict[str, np.ndarray]:
        """One batch: latents and noise [B, N, channels], text [B, T, J], its mask [B, T], t [B].

        'empty' [B, T, J] is the text of the other half of guidance. Times are multiples of 1/128,
        which bfloat16 holds exactly: diffusers rounds them to the compute dtype.
        """
        rng = np.random.default_rng(0)

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal((self.batch, *shape), np.float32)

        least = self.text // 2 if self.padded else self.text
        lengths = np.linspace(least, self.text, self.batch).round()
        out = {
            "latents": normal(self.side**2, channels),
            "noise": normal(self.side**2, channels),
            "text": normal(self.text, self.context),
            "mask": np.arange(self.text) < lengths[:, None],
            "t": rng.integers(1, 128, self.batch).astype(np.float32) / 128,
        }
        if self.what == "sample":
            out["empty"] = normal(self.text, self.context)
            out["t"][:] = out["t"][0]  # all examples are at the same step
        return out


def resident() -> int:
    """Peak resident bytes of this process."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def serve(build: Callable[[pathlib.Path, Work], Built]) -> None:
    """The process of a side: answers until its standard input ends.

    The first line says that the side is ready, or {'error': ...} that it cannot be. A number n is
    answered by n steps: {'seconds': [...], 'values': [...], 'peak_bytes': ...}.

    Args:
      build: (folder of the model, work) -> the side; raises DeviceMissing.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not look like an answer

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
    work = Work(**json.loads((folder / WORK).read_text()))
    try:
        velocity, step, peak = build(folder / MODEL, work)
    except DeviceMissing as error:
        answer(error=str(error))
        return
    np.save(folder / f"{name}.npy", velocity)
    answer(ready=True)
    for line in sys.stdin:
        seconds, values = [], []
        for _ in range(int(line)):
            start = time.perf_counter()
            values.append(step())
            seconds.append(time.perf_counter() - start)
        answer(seconds=seconds, values=values, peak_bytes=peak())
