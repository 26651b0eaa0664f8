"""Query-Kontext in PyTorch: words and pictures in, a picture out.

    pipe = DiffusionPipeline.from_pretrained(DIR, custom_pipeline=DIR, trust_remote_code=True)
    pipe("make it blue", source=Image.open("fox.png")).images[0].save("out.png")

    python DIR/pipeline.py --prompt "make it blue" --source fox.png --out out.png

A vision-language model reads the words, the pictures and K learnable queries; a connector carries
its states of words and queries to a diffusion transformer, which also sees the pictures as latents
where it was trained to. Needs torch, transformers, diffusers and Pillow.
"""

import argparse
import math
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    QwenImageTransformer2DModel,
)
from diffusers.loaders import QwenImageLoraLoaderMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

PATCH, MERGE = 14, 2  # of the vision tower: pixels of a patch, patches of a token along a side
TOKEN = 16  # pixels of a transformer token along a side: 8x VAE, 2x2 packing
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
SOURCE, REFERENCE = 0, 1
ADAPTER = "pytorch_lora_weights.safetensors"  # in the folder when it is not merged


class Positions(nn.Module):
    """Takes the place of the transformer's `pos_embed`: rotary tables for positions set before.

    The transformer's own module derives positions from the sizes of the pictures, by the law of
    Qwen-Image; here any law can say where tokens are.
    """

    def __init__(self, axes_dims: Sequence[int], theta: float = 10000.0):
        super().__init__()
        self.axes_dims, self.theta = tuple(axes_dims), theta
        self.image = self.text = torch.zeros(0, 3)

    def forward(self, *args, device=None, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """(image, text) tables: complex64 [tokens, head_dim / 2]."""
        return self.rotations(self.image, device), self.rotations(self.text, device)

    def rotations(self, positions: torch.Tensor, device=None) -> torch.Tensor:
        """Positions [tokens, 3] -> unit complex numbers, the axes side by side."""
        angles = []
        for axis, dim in enumerate(self.axes_dims):
            steps = torch.arange(0, dim, 2, dtype=torch.float64) / dim
            frequency = torch.exp(-math.log(self.theta) * steps).float()
            angles.append(positions[:, axis, None].float() * frequency)
        angle = torch.cat(angles, dim=-1)
        return torch.polar(torch.ones_like(angle), angle).to(device)


def cells(height: int, width: int) -> torch.Tensor:
    """(row, column) of every token of a grid, row by row: [height * width, 2]."""
    rows, columns = torch.arange(height), torch.arange(width)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)


def shifted_positions(grids, roles, source_mode: str, index_base: int) -> torch.Tensor:
    """Query-Kontext's law: the target from 0 on, sources at negative places, references beyond.

    Args:
      grids: (rows, columns) of target and condition pictures.
      roles: SOURCE or REFERENCE of each condition picture.
      source_mode: 'reflect' (-i, -j), 'reflect_minus_one' (-1-i, -1-j) or 'translate'.
      index_base: first index of a picture.

    Returns:
      (frame, row, column) of all image tokens, [tokens, 3].
    """
    parts = [cells(*grids[0]) + index_base]
    past_references, past_sources = torch.tensor(grids[0]), torch.zeros(2, dtype=torch.long)
    for grid, role in zip(grids[1:], roles, strict=True):
        place, size = cells(*grid) + index_base, torch.tensor(grid)
        if role == REFERENCE:
            parts.append(place + past_references)
            past_references = past_references + size
            continue
        negative = {"reflect": -place, "reflect_minus_one": -1 - place, "translate": place - size}
        parts.append(negative[source_mode] - past_sources)
        past_sources = past_sources + size
    return nn.functional.pad(torch.cat(parts), (1, 0))


def centred_positions(grids) -> torch.Tensor:
    """Qwen-Image's law: each picture centred on zero, its number as frame: [tokens, 3]."""
    parts = []
    for number, grid in enumerate(grids):
        half = torch.tensor([side - side // 2 for side in grid])
        parts.append(nn.functional.pad(cells(*grid) - half, (1, 0), value=number))
    return torch.cat(parts)


def vision_size(height: int, width: int, pixels: int) -> tuple[int, int]:
    """The size at which the text encoder sees a picture: multiples of 28, area near `pixels`."""
    side = PATCH * MERGE
    scale = math.sqrt(pixels / (height * width)) / side
    return max(1, round(height * scale)) * side, max(1, round(width * scale)) * side


def patches(picture: np.ndarray, height: int, width: int) -> torch.Tensor:
    """uint8 [h, w, 3] -> what the vision tower reads at (height, width): [patches, 1176]."""
    if picture.shape[:2] != (height, width):
        shown = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
        picture = np.asarray(shown)
    x = (picture.astype(np.float32) * np.float32(1 / 255) - CLIP_MEAN) / CLIP_STD
    rows, columns = height // PATCH, width // PATCH
    x = x.reshape(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    x = x.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, 3, 1, PATCH * PATCH)
    return torch.from_numpy(np.repeat(x, 2, axis=2).reshape(rows * columns, -1))


def mrope_positions(is_picture: torch.Tensor, grids) -> torch.Tensor:
    """Qwen2.5-VL's (time, row, column) of each token of one sequence: [3, 1, S].

    transformers derives these only when it is told which tokens are pictures, and falls back to
    plain 0, 1, 2, ... without a word, so they are always given.

    Args:
      is_picture: bool [S].
      grids: (rows, columns) in patches of the pictures, in order.
    """
    out = torch.zeros(3, len(is_picture), dtype=torch.long)
    starts = torch.nonzero(is_picture).flatten().tolist()
    cursor = done = used = 0
    for rows, columns in grids:
        rows, columns = rows // MERGE, columns // MERGE
        start = starts[used]
        out[:, done:start] = cursor + torch.arange(start - done)
        cursor += start - done
        used, done = used + rows * columns, start + rows * columns
        out[:, start:done] = cursor + nn.functional.pad(cells(rows, columns), (1, 0)).T
        cursor += max(rows, columns)
    out[:, done:] = cursor + torch.arange(len(is_picture) - done)
    return out[:, None]


def on_white(picture: Image.Image) -> Image.Image:
    """A picture without alpha; what was transparent is white."""
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def fit_source(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """The middle of a picture, scaled to cover (height, width): uint8 [height, width, 3]."""
    picture = on_white(picture)
    if picture.size == (width, height):
        return np.asarray(picture)
    scale = max(height / picture.height, width / picture.width)
    box_height, box_width = height / scale, width / scale
    left, top = (picture.width - box_width) / 2, (picture.height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    return np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS, box=box))


def fit_reference(picture: Image.Image, side: int) -> np.ndarray:
    """A whole picture, scaled into a white square: uint8 [side, side, 3]."""
    picture = on_white(picture)
    if picture.size == (side, side):
        return np.asarray(picture)
    scale = side / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    out = Image.new("RGB", (side, side), "white")
    place = ((side - size[0]) // 2, (side - size[1]) // 2)
    out.paste(picture.resize(size, Image.Resampling.LANCZOS), place)
    return np.asarray(out)


def pack(z: torch.Tensor) -> torch.Tensor:
    """Latents [1, C, h, w] -> tokens [1, h/2 * w/2, 4 C]."""
    _, c, h, w = z.shape
    z = z.reshape(1, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return z.reshape(1, (h // 2) * (w // 2), 4 * c)


def unpack(x: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """Tokens [1, h/2 * w/2, 4 C] -> latents [1, C, h, w]."""
    x = x.reshape(1, h // 2, w // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(1, -1, h, w)


class QueryKontextPipeline(DiffusionPipeline, QwenImageLoraLoaderMixin):
    """Paints from words, an optional picture to edit and optional pictures of subjects.

    Adapters of the transformer are loaded as for Qwen-Image: `load_lora_weights`, `fuse_lora`.
    The settings, which the folder's `model_index.json` holds, are those of the training:

      max_text: most tokens of a prompt.
      vlm_pixels: area at which the text encoder sees a picture.
      sizes: trained sizes, '64x64 80x48' (width x height).
      reference_size: side of the square on which a reference is shown.
      max_references: most references.
      condition_latents: whether the transformer sees the pictures as latents.
      law, source_mode, index_base: where tokens of pictures lie (see `shifted_positions`).
      system: system prompt of the text encoder.
    """

    def __init__(
        self,
        text_encoder: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        kontext: nn.Module,
        transformer: QwenImageTransformer2DModel,
        vae: nn.Module,
        scheduler: FlowMatchEulerDiscreteScheduler,
        max_text: int = 256,
        vlm_pixels: int = 448 * 448,
        sizes: str = "512x512",
        reference_size: int = 512,
        max_references: int = 0,
        condition_latents: bool = True,
        law: str = "shifted",
        source_mode: str = "reflect",
        index_base: int = 0,
        system: str = "You are a helpful assistant.",
    ):
        super().__init__()
        self.register_modules(
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            kontext=kontext,
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
        )
        self.register_to_config(
            max_text=max_text,
            vlm_pixels=vlm_pixels,
            sizes=sizes,
            reference_size=reference_size,
            max_references=max_references,
            condition_latents=condition_latents,
            law=law,
            source_mode=source_mode,
            index_base=index_base,
            system=system,
        )
        transformer.pos_embed = Positions(transformer.config.axes_dims_rope)

    def _encode_template(self, text: str) -> list[int]:
        """Ids of our own text, in which special tokens count."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _encode_words(self, prompt: str) -> list[int]:
        """Ids of a user's text, to which `<|im_end|>` and the like are ordinary characters."""
        whole = self.tokenizer.backend_tokenizer
        plain = Tokenizer(whole.model)
        plain.normalizer, plain.pre_tokenizer = whole.normalizer, whole.pre_tokenizer
        ids = plain.encode(prompt).ids
        if len(ids) > self.config.max_text:
            raise ValueError(f"the prompt has {len(ids)} tokens, over {self.config.max_text}")
        return ids

    def encode_states(self, prompt: str, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        """The text encoder's last states of words and queries, [1, words + K, width].

        Args:
          prompt: the words, at most `max_text` tokens.
          pictures: uint8 [h, w, 3], the source first.
        """
        model, device = self.text_encoder, self._execution_device
        sizes = [vision_size(*x.shape[:2], self.config.vlm_pixels) for x in pictures]
        grids = [(height // PATCH, width // PATCH) for height, width in sizes]
        system = self.config.system
        ids = self._encode_template(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n")
        for number, (rows, columns) in enumerate(grids, start=1):
            slots = "<|image_pad|>" * (rows * columns // MERGE**2)
            ids += self._encode_template(f"Picture {number}: <|vision_start|>{slots}<|vision_end|>")
        words, tail = self._encode_words(prompt), self._encode_template(TAIL)
        queries = self.kontext.queries
        ids = torch.tensor([*ids, *words, *tail, *[0] * len(queries)], device=device)
        embeds = model.get_input_embeddings()(ids)
        is_picture = ids == model.config.image_token_id
        is_picture[-len(queries) :] = False
        if grids:
            shown = [patches(x, *size) for x, size in zip(pictures, sizes, strict=True)]
            pixels = torch.cat(shown).to(device, embeds.dtype)
            features = model.model.visual(pixels, torch.tensor([[1, *g] for g in grids]).to(device))
            embeds[is_picture] = getattr(features, "pooler_output", features).to(embeds.dtype)
        embeds[-len(queries) :] = queries.to(embeds.dtype)
        states = model.model.language_model(
            inputs_embeds=embeds[None],
            position_ids=mrope_positions(is_picture.cpu(), grids).to(device),
            use_cache=False,
        ).last_hidden_state
        end = len(ids) - len(queries) - len(tail)
        return torch.cat([states[:, end - len(words) : end], states[:, -len(queries) :]], dim=1)

    def encode_context(self, prompt: str, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        """The transformer's context [1, words + K, J]; arguments as `encode_states`."""
        return self.kontext(self.encode_states(prompt, pictures).to(self.kontext.dtype))

    def _scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(shift, scale) [C, 1, 1]: the transformer works on (z - shift) * scale."""
        config = self.vae.config
        if getattr(config, "latents_mean", None) is not None:
            shift = torch.tensor(config.latents_mean)
            scale = getattr(config, "scaling_factor", 1.0) / torch.tensor(config.latents_std)
        else:
            shift = torch.tensor([config.shift_factor or 0.0])
            scale = torch.tensor([config.scaling_factor])
        device = self._execution_device
        return shift.view(-1, 1, 1).to(device), scale.view(-1, 1, 1).to(device)

    def encode_picture(self, picture: np.ndarray) -> torch.Tensor:
        """uint8 [h, w, 3] -> latents [1, C, h/8, w/8], the posterior's mode, float32."""
        x = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].to(self._execution_device)
        x = (x.float() / 127.5 - 1).to(self.vae.dtype)
        has_frames = hasattr(self.vae.config, "temperal_downsample")
        z = self.vae.encode(x[:, :, None] if has_frames else x).latent_dist.mode().float()
        shift, scale = self._scales()
        return ((z[:, :, 0] if has_frames else z) - shift) * scale

    def decode_latents(self, z: torch.Tensor) -> np.ndarray:
        """Latents [1, C, h, w] -> uint8 [8 h, 8 w, 3]."""
        shift, scale = self._scales()
        z = (z / scale + shift).to(self.vae.dtype)
        has_frames = hasattr(self.vae.config, "temperal_downsample")
        x = self.vae.decode(z[:, :, None] if has_frames else z).sample.float()
        x = (x[:, :, 0] if has_frames else x).clamp(-1, 1)
        return ((x[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()

    def velocity(self, x, sigma, context, latents, grids, roles) -> torch.Tensor:
        """The transformer's velocity of the target tokens, float32 [1, N, 4 C].

        Args:
          x: noisy target tokens [1, N, 4 C].
          sigma: noise level in [0, 1]; 1 is noise.
          context: of `encode_context`.
          latents: [1, C, h, w] of each condition picture. It may be empty while `grids` names
            their sizes: then pictures are hidden, and all else stays where it would be with them.
          grids: (rows, columns) of the tokens of target and condition pictures.
          roles: SOURCE or REFERENCE of each condition picture.
        """
        config, places = self.config, self.transformer.pos_embed
        stream = torch.cat([x, *(pack(z) for z in latents)], dim=1)
        count = self.kontext.config.num_queries + config.max_text
        if config.law == "shifted":
            image = shifted_positions(grids, roles, config.source_mode, config.index_base)
            text = torch.zeros(count, 3, dtype=torch.long)
        else:
            image = centred_positions(grids)
            first = max(side // 2 for grid in grids for side in grid)
            text = (first + torch.arange(count))[:, None].expand(-1, 3)
        # Words are right-aligned in a window of max_text, so that they count from its end.
        places.image, places.text = image[: stream.shape[1]], text[-context.shape[1] :]
        dtype = self.transformer.dtype
        out = self.transformer(
            hidden_states=stream.to(dtype),
            encoder_hidden_states=context.to(dtype),
            encoder_hidden_states_mask=torch.ones(context.shape[:2], device=x.device).bool(),
            timestep=torch.full((1,), float(sigma), device=x.device),
            img_shapes=[[(1, *grid) for grid in grids[: 1 + len(latents)]]],
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]].float()

    def _sigmas(self, steps: int, tokens: int) -> torch.Tensor:
        """Noise levels [steps + 1] from 1 to 0, shifted for the target's number of tokens."""
        if steps == 1:  # no range is left for the scheduler to shift and stretch
            return torch.tensor([1.0, 0.0])
        config = self.scheduler.config
        slope = (config.max_shift - config.base_shift) / (
            config.max_image_seq_len - config.base_image_seq_len
        )
        mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        return self.scheduler.sigmas.float()

    def _size(self, source: Image.Image | None) -> tuple[int, int]:
        """(height, width) of the training: the first, or the nearest to the source in aspect."""
        sizes = [tuple(map(int, size.split("x")))[::-1] for size in self.config.sizes.split()]
        if source is None:
            return sizes[0]
        wanted = math.log(source.height / source.width)
        aspects = {size: math.log(size[0] / size[1]) for size in sizes}
        gaps = {size: round(abs(aspect - wanted), 9) for size, aspect in aspects.items()}
        return min(sizes, key=lambda size: (gaps[size], abs(aspects[size])))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        source: Image.Image | None = None,
        references: Sequence[Image.Image] = (),
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        guidance: float = 4.0,
        image_guidance: float = 1.5,
        solver: str = "euler",
        generator: torch.Generator | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Paints one picture.

        Args:
          prompt: what to paint, or what to do with the pictures.
          source: picture to edit.
          references: pictures of subjects.
          height: of the picture in pixels, a multiple of 16; None for a trained size.
          width: see height.
          num_inference_steps: steps of the solver.
          guidance: weight of the words, 1 for none.
          image_guidance: weight of the pictures, 1 for none.
          solver: 'euler', or 'heun' (two evaluations a step, second order).
          generator: of the noise.
          latents: the noise itself, [1, C, height / 8, width / 8].
          output_type: 'pil', 'np' (uint8 [1, H, W, 3]) or 'latent' ([1, C, h, w], normalised).
        """
        if height is None or width is None:
            height, width = self._size(source)
        self._check(prompt, references, height, width, num_inference_steps, solver)
        pictures = [fit_source(source, height, width)] if source is not None else []
        pictures += [fit_reference(x, self.config.reference_size) for x in references]
        roles = [SOURCE] * (source is not None) + [REFERENCE] * len(references)
        shape = (1, self.transformer.config.in_channels // 4, height // 8, width // 8)
        device = self._execution_device
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents have the shape {tuple(latents.shape)}, not {shape}")
        velocity = self._guided(prompt, pictures, roles, shape, guidance, image_guidance)
        x = pack(latents.to(device, torch.float32))
        sigmas = self._sigmas(num_inference_steps, x.shape[1])
        for now, then in self.progress_bar(list(zip(sigmas[:-1], sigmas[1:], strict=True))):
            slope = velocity(x, now)
            if solver == "heun" and then > 0:  # the model was not trained at 0
                slope = (slope + velocity(x + (then - now) * slope, then)) / 2
            x = x + (then - now) * slope
        z = unpack(x, *shape[2:])
        if output_type == "latent":
            return ImagePipelineOutput(images=z)
        picture = self.decode_latents(z)
        is_pil = output_type == "pil"
        return ImagePipelineOutput(images=[Image.fromarray(picture)] if is_pil else picture[None])

    def _guided(self, prompt, pictures, roles, shape, guidance, image_guidance) -> Callable:
        """velocity(x, sigma) with guidance over words and over pictures."""
        shown = []
        if self.config.condition_latents:
            shown = [self.encode_picture(x) for x in pictures]
        roles = roles[: len(shown)]
        grids = [(h // 2, w // 2) for *_, h, w in (shape, *(z.shape for z in shown))]
        full, no_text, none = (self.encode_context(prompt, pictures), shown), None, None
        if pictures and image_guidance != 1:
            none = (self.encode_context("", []), [])
        if guidance != 1 or none is not None:
            no_text = (self.encode_context("", pictures), shown)

        def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            v = self.velocity(x, sigma, *full, grids, roles)
            if no_text is None:
                return v
            v_no_text = self.velocity(x, sigma, *no_text, grids, roles)
            guided = v_no_text + guidance * (v - v_no_text)
            if none is None:
                return guided
            v_none = self.velocity(x, sigma, *none, grids, roles)
            return guided + (image_guidance - 1) * (v_no_text - v_none)

        return velocity

    def _check(self, prompt, references, height, width, steps, solver) -> None:
        """Raises ValueError for what this model cannot paint."""
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError("there is no prompt; give a string")
        if steps < 1:
            raise ValueError(f"num_inference_steps is {steps}; give 1 or more")
        if height % TOKEN or width % TOKEN or min(height, width) < TOKEN:
            raise ValueError(f"the size {width}x{height} is no multiple of {TOKEN}")
        if solver not in ("euler", "heun"):
            raise ValueError(f"solver is {solver!r}; give 'euler' or 'heun'")
        if len(references) > self.config.max_references:
            most = self.config.max_references
            raise ValueError(f"{len(references)} references are given, the model knows {most}")


def size_of(text: str) -> tuple[int, int]:
    """(width, height) of 'WIDTHxHEIGHT'."""
    width, height = map(int, text.split("x"))
    return width, height


def main() -> None:
    """Paints with the model of the folder that this file lies in.

    The arguments are those of the sampler of the training; the noise of a seed is PyTorch's.
    """
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
