"""Paints with the model of the folder that this file lies in: `python DIR/pipeline.py --help`."""

import argparse
import pathlib

import torch
from diffusers import DiffusionPipeline
from PIL import Image

ADAPTER = "pytorch_lora_weights.safetensors"  # in the folder when it is not merged


def size_of(text: str) -> tuple[int, int]:
    """(width, height) of 'WIDTHxHEIGHT'."""
    width, height = map(int, text.split("x"))
    return width, height


def main() -> None:
    """Paints; the arguments are those of the sampler of the training, the noise is PyTorch's."""
    parser = argparse.ArgumentParser(description="Paints with the model of this folder.")
    add = parser.add_argument
    add("--prompt", required=True, help="what to paint, or what to do with the pictures")
    add("--source", metavar="PNG", help="picture to edit")
    add("--reference", metavar="PNG", action="append", default=[], help="subject; may be repeated")
    add("--out", metavar="PNG", required=True, help="file to write")
    add("--size", type=size_of, default=(None, None), metavar="WxH", help="multiples of 16")
    add("--steps", type=int, default=30)
    add("--guidance", type=float, default=4.0, help="weight of the words, 1 for none")
    add("--image-guidance", type=float, default=1.5, help="weight of the pictures, 1 for none")
    add("--seed", type=int, default=0)
    add("--solver", default="euler", choices=("euler", "heun"))
    args = parser.parse_args()
    folder = pathlib.Path(__file__).resolve().parent
    pipe = DiffusionPipeline.from_pretrained(
        str(folder), custom_pipeline=str(folder), trust_remote_code=True
    )
    if (folder / ADAPTER).is_file():
        pipe.load_lora_weights(str(folder))
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    painted = pipe(
        args.prompt,
        source=Image.open(args.source) if args.source else None,
        references=[Image.open(path) for path in args.reference],
        width=args.size[0],
        height=args.size[1],
        num_inference_steps=args.steps,
        guidance=args.guidance,
        image_guidance=args.image_guidance,
        solver=args.solver,
        generator=torch.Generator().manual_seed(args.seed),
    )
    painted.images[0].save(args.out)


if __name__ == "__main__":
    main()
