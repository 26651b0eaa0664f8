"""Exports painted with other versions of diffusers and transformers; run by hand:

    .venv/bin/python -m tests.export.elsewhere write DIR     # writes exports and what JAX paints
    V/bin/python tests/export/elsewhere.py compare DIR       # in any environment with PyTorch

`compare` needs nothing of qk_jax. It prints for each export the largest and the mean difference of
the pictures, of 255, or the refusal.
"""

import pathlib
import sys

import numpy as np

# Whether condition pictures are modulated as clean ones; of the nano model.
EXPORTS = {"clean": True, "plain": False}
STEPS = 4


def write(folder: pathlib.Path) -> None:
    """The exports, and for each request that `verify` knows its pictures, noise and result."""
    from qk_jax import painting
    from qk_jax.export import verify
    from qk_jax.export.folder import export_pipeline
    from tests.export import models

    for name, zero in EXPORTS.items():
        ours, found = models.painter(zero=zero), {}
        export_pipeline(models.loaded(zero=zero), folder / name, "float32")
        for case, request in verify.examples(ours).items():
            noise = ours.noise(request)
            (painted,) = ours.paint([request], painting.Settings(steps=STEPS), [noise])
            found |= {f"{case}/prompt": request.prompt, f"{case}/painted": painted}
            found[f"{case}/noise"] = noise.transpose(2, 0, 1)[None]
            shown = {"source": [] if request.source is None else [request.source]}
            for role, pictures in (shown | {"reference": request.references}).items():
                found |= {f"{case}/{role}{i}": x for i, x in enumerate(pictures)}
        np.savez(folder / f"{name}.npz", **found)


def compare(folder: pathlib.Path) -> None:
    """Prints what the installed versions paint."""
    import diffusers
    import torch
    import transformers
    from PIL import Image

    print(f"diffusers {diffusers.__version__}, transformers {transformers.__version__}")
    for name in EXPORTS:
        path, found = str(folder / name), np.load(folder / f"{name}.npz")
        try:
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                path, custom_pipeline=path, trust_remote_code=True
            )
        except Exception as error:
            print(f"  {name}: {type(error).__name__}: {error}")
            continue
        pipe.set_progress_bar_config(disable=True)
        for case in dict.fromkeys(key.partition("/")[0] for key in found):
            role = f"{case}/source", f"{case}/reference"
            source, references = (
                [Image.fromarray(found[key]) for key in found if key.startswith(one)]
                for one in role
            )
            wanted = found[f"{case}/painted"].astype(int)
            painted = pipe(
                str(found[f"{case}/prompt"]),
                source=source[0] if source else None,
                references=references,
                height=wanted.shape[0],
                width=wanted.shape[1],
                num_inference_steps=STEPS,
                latents=torch.from_numpy(found[f"{case}/noise"]),
            ).images[0]
            apart = np.abs(np.asarray(painted) - wanted)
            print(f"  {name}: {case}: at most {apart.max()}, mean {apart.mean():.2f} of 255")


if __name__ == "__main__":
    {"write": write, "compare": compare}[sys.argv[1]](pathlib.Path(sys.argv[2]))
