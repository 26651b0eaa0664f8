"""PyTorch's side of the comparison: diffusers' transformer, fused AdamW, compiled on a GPU."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Callable

import torch
from diffusers import QwenImageTransformer2DModel

from qk_jax.bench import peer_work
from qk_jax.bench.peer_work import ADAM, GUIDANCE, SIGMA_STEP, Built, Work

Arrays = dict[str, torch.Tensor]
# (x [B, N, C], t [B], text [B, T, J], mask [B, T] or None) -> float32 [B, N, C]
Velocity = Callable[..., torch.Tensor]


def build(folder: pathlib.Path, work: Work) -> Built:
    """See `peer_work.serve`."""
    on_gpu = work.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise peer_work.DeviceMissing("PyTorch finds no cuda device")
    torch.set_num_threads(work.threads)
    torch.set_float32_matmul_precision("high")  # as JAX does on a GPU; nothing on a CPU
    model = QwenImageTransformer2DModel.from_pretrained(
        folder, torch_dtype=getattr(torch, work.weights), local_files_only=True
    ).to(work.device)
    (block,) = model.transformer_blocks
    for _ in range(work.blocks - 1):
        model.transformer_blocks.append(copy.deepcopy(block))
    arrays = work.arrays(model.config.in_channels)
    batch = {name: torch.from_numpy(x).to(work.device) for name, x in arrays.items()}
    compute, dtype = torch.compile(model) if on_gpu else model, getattr(torch, work.dtype)

    def velocity(
        x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        with torch.autocast(work.device, dtype, enabled=work.weights != work.dtype):
            out = compute(
                hidden_states=x.to(dtype),
                encoder_hidden_states=text.to(dtype),
                # without a mask the attention has faster kernels
                encoder_hidden_states_mask=mask if work.padded else None,
                timestep=t,
                img_shapes=[[(1, work.side, work.side)]] * len(x),
                return_dict=False,
            )[0]
        return out.float()

    model.train()
    with torch.no_grad():
        before = velocity(batch["noise"], batch["t"], batch["text"], batch["mask"])
    train = work.what == "train"
    step = _train(velocity, model, batch) if train else _sample(velocity, batch)
    peak = torch.cuda.max_memory_allocated if on_gpu else peer_work.resident
    return before.cpu().numpy(), step, peak


def _train(velocity: Velocity, model: torch.nn.Module, batch: Arrays) -> Callable[[], float]:
    """A training step; its value is the loss."""
    adam = torch.optim.AdamW(
        model.parameters(), ADAM["lr"], (ADAM["b1"], ADAM["b2"]), ADAM["eps"],
        ADAM["weight_decay"], fused=True,
    )  # fmt: skip

    def step() -> float:
        x0, noise, t = batch["latents"], batch["noise"], batch["t"]
        amount = t[:, None, None]
        x = (1 - amount) * x0 + amount * noise
        prediction = velocity(x, t, batch["text"], batch["mask"])
        loss = torch.nn.functional.mse_loss(prediction, noise - x0)
        loss.backward()
        adam.step()
        adam.zero_grad()
        return loss.item()  # waits for the update too: a device works in order

    return step


def _sample(velocity: Velocity, batch: Arrays) -> Callable[[], float]:
    """A sampling step; its value is the mean square of the latents after it."""
    x = batch["noise"]

    @torch.no_grad()
    def step() -> float:
        nonlocal x
        inputs = [(x, x), (batch["t"],) * 2, (batch["text"], batch["empty"]), (batch["mask"],) * 2]
        prompted, empty = velocity(*map(torch.cat, inputs)).chunk(2)
        x = x + SIGMA_STEP * (empty + GUIDANCE * (prompted - empty))
        return x.square().mean().item()

    return step


if __name__ == "__main__":
    peer_work.serve(build)
