"""Query-Kontext in PyTorch: words and pictures in, a picture out.

    pipe = DiffusionPipeline.from_pretrained(DIR, custom_pipeline=DIR, trust_remote_code=True)
    pipe("make it blue", source=Image.open("fox.png")).images[0].save("out.png")

    python DIR/pipeline.py --prompt "make it blue" --source fox.png --out out.png

A vision-language model reads the words, the pictures and K learnable queries; a connector carries
its states of words and queries to a diffusion transformer, which also sees the pictures as latents
where it was trained to. Needs torch, transformers, diffusers of at least DIFFUSERS and Pillow.
"""

import inspect
import math
import pathlib
import runpy
from collections.abc import Callable, Sequence

import diffusers
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

DIFFUSERS = "0.37.0"  # the oldest that computes all that a folder may hold
PATCH, MERGE = 14, 2  # of the vision tower: pixels of a patch, patches of a token along a side
TOKEN = 16  # pixels of a transformer token along a side: 8x VAE, 2x2 packing
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
SOURCE, REFERENCE = 0, 1
SYSTEM = "You are a helpful assistant."
# What the text encoder reads: system prompts without and with pictures; the user's words without
# pictures, with a source and with references alone; the words before a picture; whether the
# transformer reads the states of pictures and of TAIL; and multiples of pixels that the sides of a
# picture have on its way to the text encoder, 0 for none.
PROMPT = {
    "system": SYSTEM, "system_pictures": SYSTEM,
    "text_to_image": "{text}", "editing": "{text}", "references": "{text}",
    "source": "Picture {number} (source): ", "reference": "Picture {number} (reference): ",
    "keep_pictures": False, "keep_tail": False, "picture_multiple": 0,
}  # fmt: skip
OUTPUTS = ("pil", "np", "pt", "latent")


def check_known(name: str, module) -> None:
    """Raises ValueError for a setting of a module that the installed diffusers does not know.

    diffusers drops such a setting with a log line at most, and computes something else.
    """
    known = inspect.signature(type(module).__init__).parameters
    for key, value in module.config.items():
        if value and key not in known and key[0] != "_" and key != "quantization_config":
            raise ValueError(
                f"diffusers {diffusers.__version__} does not know {key} = {value} of the {name} "
                f"and would paint wrong pictures; install diffusers>={DIFFUSERS}"
            )


def rounded_size(height: int, width: int, pixels: int, multiple: int) -> tuple[int, int]:
    """(height, width) in multiples of `multiple`, area near `pixels`."""
    ratio = width / height
    wide = math.sqrt(pixels * ratio)
    high = wide / ratio
    return max(1, round(high / multiple)) * multiple, max(1, round(wide / multiple)) * multiple


def vision_size(height: int, width: int, pixels: int, multiple: int = 0) -> tuple[int, int]:
    """The size at which the text encoder sees a picture: multiples of 28, area near `pixels`; with
    a multiple those nearest to `rounded_size`."""
    side = PATCH * MERGE
    if multiple:
        height, width = rounded_size(height, width, pixels, multiple)
        return max(1, round(height / side)) * side, max(1, round(width / side)) * side
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
        sides = (torch.arange(side) for side in (1, rows, columns))
        out[:, start:done] = cursor + torch.cartesian_prod(*sides).T
        cursor += max(rows, columns)
    out[:, done:] = cursor + torch.arange(len(is_picture) - done)
    return out[:, None]


def sizes_of(sizes: str) -> list[tuple[int, int]]:
    """(height, width) of each size of '64x64 80x48' (width x height)."""
    pairs = [size.split("x") for size in sizes.split()]
    return [(int(height), int(width)) for width, height in pairs]


def nearest(picture: Image.Image, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size (height, width) nearest to a picture in aspect; of several the squarest."""
    wanted = math.log(picture.height / picture.width)
    aspects = {size: math.log(size[0] / size[1]) for size in sizes}
    gaps = {size: round(abs(aspect - wanted), 9) for size, aspect in aspects.items()}
    return min(sizes, key=lambda size: (gaps[size], abs(aspects[size])))


def fit_source(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """The middle of a picture, scaled to cover (height, width): uint8 [height, width, 3]."""
    if picture.size == (width, height):
        return np.asarray(picture)
    scale = max(height / picture.height, width / picture.width)
    box_height, box_width = height / scale, width / scale
    left, top = (picture.width - box_width) / 2, (picture.height - box_height) / 2
    right, bottom = min(left + box_width, picture.width), min(top + box_height, picture.height)
    box = (max(left, 0.0), max(top, 0.0), right, bottom)  # rounding must not lead over the edge
    return np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS, box=box))


def fit_reference(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """A whole picture, scaled into a white one: uint8 [height, width, 3]."""
    if picture.size == (width, height):
        return np.asarray(picture)
    scale = min(height / picture.height, width / picture.width)
    columns = min(width, max(1, round(picture.width * scale)))
    rows = min(height, max(1, round(picture.height * scale)))
    out = Image.new("RGB", (width, height), "white")
    shown = picture.resize((columns, rows), Image.Resampling.LANCZOS)
    out.paste(shown, ((width - columns) // 2, (height - rows) // 2))
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
      reference_sizes: sizes of references, for one, two, ... and more of them: '512x512; 384x384'.
        Each is shown whole at the nearest in aspect.
      max_references: most references.
      condition_latents: whether the transformer sees the pictures as latents.
      law, source_mode, index_base: where tokens of pictures lie (see `kontext.places`).
      prompt: the words around prompt and pictures, and what of them the transformer reads: the
        entries of PROMPT.
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
        reference_sizes: str = "512x512",
        max_references: int = 0,
        condition_latents: bool = True,
        law: str = "shifted",
        source_mode: str = "reflect",
        index_base: int = 0,
        prompt: dict = PROMPT,  # diffusers up to 0.36 understands no `dict | None` here
    ):
        super().__init__()
        check_known("transformer", transformer)
        check_known("vae", vae)
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
            reference_sizes=reference_sizes,
            max_references=max_references,
            condition_latents=condition_latents,
            law=law,
            source_mode=source_mode,
            index_base=index_base,
            prompt=PROMPT | prompt,
        )
        transformer.pos_embed = self.kontext.rotary(transformer.config.axes_dims_rope)

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

    def _conversation(self, prompt: str, grids, roles) -> tuple[list[int], int, int]:
        """(ids up to the queries, where what the transformer reads begins, and where it ends)."""
        template = self.config.prompt
        kind = "text_to_image"
        if roles:
            kind = "editing" if SOURCE in roles else "references"
        system = template["system_pictures" if roles else "system"]
        ids = self._encode_template(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n")
        begin = len(ids)
        for number, (role, (rows, columns)) in enumerate(zip(roles, grids, strict=True), start=1):
            words = template["reference" if role == REFERENCE else "source"]
            slots = "<|image_pad|>" * (rows * columns // MERGE**2)
            words = words.replace("{number}", str(number))
            ids += self._encode_template(f"{words}<|vision_start|>{slots}<|vision_end|>")
        begin = begin if template["keep_pictures"] else len(ids)
        ids += self._encode_words(template[kind].replace("{text}", prompt))
        end = len(ids)
        ids += self._encode_template(TAIL)
        return ids, begin, len(ids) if template["keep_tail"] else end

    def _patches(self, picture: np.ndarray) -> torch.Tensor:
        """uint8 [h, w, 3] -> what the text encoder reads of it: [patches, 1176]."""
        (height, width), area = picture.shape[:2], self.config.vlm_pixels
        multiple = self.config.prompt["picture_multiple"]
        size = vision_size(height, width, area, multiple)
        if multiple:
            first = rounded_size(height, width, area, multiple)
            if first != (height, width):
                image = Image.fromarray(picture)
                picture = np.asarray(image.resize(first[::-1], Image.Resampling.LANCZOS))
        return patches(picture, *size)

    def encode_states(
        self, prompt: str, pictures: Sequence[np.ndarray], roles: Sequence[int]
    ) -> torch.Tensor:
        """The text encoder's states of what the transformer reads, and of the queries, [1,
        words + K, width] (`kontext.states`).

        Args:
          prompt: the words, at most `max_text` tokens.
          pictures: uint8 [h, w, 3], the source first.
          roles: SOURCE or REFERENCE for each of them.
        """
        model, device = self.text_encoder, self._execution_device
        area, multiple = self.config.vlm_pixels, self.config.prompt["picture_multiple"]
        sizes = [vision_size(*x.shape[:2], area, multiple) for x in pictures]
        grids = [(height // PATCH, width // PATCH) for height, width in sizes]
        ids, begin, end = self._conversation(prompt, grids, roles)
        queries = self.kontext.queries
        ids = torch.tensor([*ids, *[0] * len(queries)], device=device)
        embeds = model.get_input_embeddings()(ids)
        is_picture = ids == model.config.image_token_id
        is_picture[-len(queries) :] = False
        if grids:
            pixels = torch.cat([self._patches(x) for x in pictures]).to(device, embeds.dtype)
            features = model.model.visual(pixels, torch.tensor([[1, *g] for g in grids]).to(device))
            embeds[is_picture] = getattr(features, "pooler_output", features).to(embeds.dtype)
        embeds[-len(queries) :] = queries.to(embeds.dtype)
        positions = mrope_positions(is_picture.cpu(), grids).to(device)
        states = self.kontext.states(model.model.language_model, embeds[None], positions)
        return torch.cat([states[:, begin:end], states[:, -len(queries) :]], dim=1)

    def encode_context(
        self, prompt: str, pictures: Sequence[np.ndarray], roles: Sequence[int]
    ) -> torch.Tensor:
        """The transformer's context [1, words + K, J]; arguments as `encode_states`."""
        return self.kontext(self.encode_states(prompt, pictures, roles).to(self.kontext.dtype))

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

    def decode_latents(self, z: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, h, w] -> pictures, float32 [B, 3, 8 h, 8 w] in [0, 1]."""
        shift, scale = self._scales()
        z = (z / scale + shift).to(self.vae.dtype)
        has_frames = hasattr(self.vae.config, "temperal_downsample")
        x = self.vae.decode(z[:, :, None] if has_frames else z).sample.float()
        return ((x[:, :, 0] if has_frames else x).clamp(-1, 1) + 1) / 2

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
        config, rotary = self.config, self.transformer.pos_embed
        stream = torch.cat([x, *(pack(z) for z in latents)], dim=1)
        law = config.law, config.source_mode, config.index_base
        image, rotary.text = self.kontext.places(grids, roles, context.shape[1], *law)
        rotary.image = image[: stream.shape[1]]
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

    def _size(
        self, source: Image.Image | None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int]:
        """(height, width) as asked; `__call__` says what follows where a side is None."""
        sizes = sizes_of(self.config.sizes)
        rows, columns = sizes[0] if source is None else (source.height, source.width)
        if height is not None:
            if width is None:
                width = max(1, round(height * columns / rows / TOKEN)) * TOKEN
            return height, width
        if width is not None:
            return max(1, round(width * rows / columns / TOKEN)) * TOKEN, width
        return sizes[0] if source is None else nearest(source, sizes)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        source: Image.Image | None = None,
        references: Sequence[Image.Image] = (),
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        guidance: float = 4.0,
        image_guidance: float = 1.5,
        solver: str = "euler",
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        guidance_end: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        renormalize: bool | None = None,
        zero_init_steps: int = 0,
        symmetric_guidance: bool = False,
    ) -> ImagePipelineOutput:
        """Paints one picture for each prompt, in the order of the prompts.

        Args:
          prompt: what to paint, or what to do with the pictures; one, or a list.
          source: picture to edit.
          references: pictures of subjects.
          height: of the picture in pixels, a multiple of 16. With one side alone the other follows
            the aspect of the source, or without a source of the first trained size. With neither
            it is the trained size nearest to the source's aspect, or the first.
          width: see height.
          num_inference_steps: steps of the solver.
          guidance: weight of the words, 1 for none.
          image_guidance: weight of the pictures, 1 for none.
          solver: 'euler', or 'heun' (two evaluations a step, second order). The noise levels are
            those of the scheduler, a FlowMatchEulerDiscreteScheduler; with its stochastic_sampling
            every Euler step draws noise.
          generator: of the noise; one, or one for each prompt.
          latents: the noise itself, [prompts, C, height / 8, width / 8].
          output_type: 'pil', 'np' (float32 [prompts, H, W, 3] in [0, 1]), 'pt' (a tensor, float32
            [prompts, 3, H, W] in [0, 1]) or 'latent' (a tensor [prompts, C, h, w], normalised).
          guidance_end: weight of the words at the end, linear in the noise level; None is constant.
          guidance_interval: noise levels between which there is guidance.
          renormalize: keep the length of the unguided velocity; None for as the law's public
            pipeline does: on with 'qwen_image'.
          zero_init_steps: steps at the start that leave the noise as it is.
          symmetric_guidance: weigh the pictures against the words alone as well.
        """
        prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
        _check_pictures(source, references)
        source = None if source is None else self.kontext.picture(source)
        height, width = self._size(source, height, width)
        self._check(prompts, references, height, width, num_inference_steps, solver)
        self._check_scheduler(solver)
        if not 0 <= zero_init_steps < num_inference_steps:
            raise ValueError(f"zero_init_steps is {zero_init_steps}; give less than the steps")
        end = guidance if guidance_end is None else guidance_end
        scales = (guidance, end, image_guidance, *guidance_interval)
        if renormalize is None:
            renormalize = self.config.law == "qwen_image"
        own: list = [generator] * len(prompts)
        if isinstance(generator, list | tuple):
            own = list(generator)
        if len(own) != len(prompts):
            raise ValueError(f"{len(own)} generators are given for {len(prompts)} prompts")
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type is {output_type!r}; give one of {', '.join(OUTPUTS)}")
        pictures = [fit_source(source, height, width)] if source is not None else []
        tables = self.config.reference_sizes.split(";")
        known = sizes_of(tables[min(len(references), len(tables)) - 1])
        shown = map(self.kontext.picture, references)
        pictures += [fit_reference(x, *nearest(x, known)) for x in shown]
        roles = [SOURCE] * (source is not None) + [REFERENCE] * len(references)
        shape = (1, self.transformer.config.in_channels // 4, height // 8, width // 8)
        wanted = (len(prompts), *shape[1:])
        if latents is not None and tuple(latents.shape) != wanted:
            raise ValueError(f"latents have the shape {tuple(latents.shape)}, not {wanted}")
        painted = []
        for i, text in enumerate(prompts):
            contexts = self._contexts(text, pictures, roles, scales, symmetric_guidance)
            velocity = self._guided(contexts, roles, shape, scales, renormalize)
            noise = self._noise(shape, own[i]) if latents is None else latents[i : i + 1]
            x = pack(noise.to(self._execution_device, torch.float32))
            sigmas = self._sigmas(num_inference_steps, x.shape[1])[zero_init_steps:]
            x = self._integrate(velocity, x, sigmas, solver, own[i])
            z = unpack(x, *shape[2:])
            painted.append(z if output_type == "latent" else self.decode_latents(z))
        images = torch.cat(painted)
        if output_type in ("np", "pil"):
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = [Image.fromarray(x) for x in (images * 255).round().astype(np.uint8)]
        return ImagePipelineOutput(images=images)

    def _noise(self, shape: tuple, generator: torch.Generator | None) -> torch.Tensor:
        device = self._execution_device
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def _integrate(self, velocity: Callable, x, sigmas, solver: str, generator):
        """Tokens of noise -> tokens of a picture, along the noise levels."""
        is_stochastic = self._is_stochastic()
        for now, then in self.progress_bar(list(zip(sigmas[:-1], sigmas[1:], strict=True))):
            slope = velocity(x, now)
            if is_stochastic:  # to the end along the slope, and back with other noise
                x = (1 - then) * (x - now * slope) + then * self._noise(x.shape, generator)
                continue
            if solver == "heun" and then > 0:  # the model was not trained at 0
                slope = (slope + velocity(x + (then - now) * slope, then)) / 2
            x = x + (then - now) * slope
        return x

    def _is_stochastic(self) -> bool:
        return bool(self.scheduler.config.get("stochastic_sampling"))

    def _contexts(self, prompt, pictures, roles, scales, symmetric: bool) -> list:
        """(context, latents of pictures) of everything, and of what guidance compares it with."""
        shown = [self.encode_picture(x) for x in pictures if self.config.condition_latents]
        asked = [(prompt, pictures, roles, shown)]
        weighs_pictures = pictures and scales[2] != 1
        if weighs_pictures or scales[:2] != (1, 1):
            asked.append(("", pictures, roles, shown))
        if weighs_pictures:
            asked.append(("", [], [], []))
        if weighs_pictures and symmetric:
            asked.append((prompt, [], [], []))
        return [(self.encode_context(*given), latents) for *given, latents in asked]

    def _guided(self, contexts, roles, shape, scales, renormalize: bool) -> Callable:
        """velocity(x, sigma) with guidance over words and over pictures."""
        shown = contexts[0][1]
        grids = [(h // 2, w // 2) for *_, h, w in (shape, *(z.shape for z in shown))]

        def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            every = [self.velocity(x, sigma, *one, grids, roles[: len(shown)]) for one in contexts]
            return self.kontext.guided(every, sigma, scales, renormalize)

        return velocity

    def _check_scheduler(self, solver: str) -> None:
        """Raises ValueError for a scheduler, or a setting of it, that is not followed here."""
        kind = type(self.scheduler).__name__
        if type(self.scheduler) is not FlowMatchEulerDiscreteScheduler:
            raise ValueError(
                f"the scheduler is a {kind}; this pipeline takes the noise levels of a "
                "FlowMatchEulerDiscreteScheduler, and steps with solver='euler' or 'heun'"
            )
        if self.scheduler.config.get("invert_sigmas"):
            raise ValueError("invert_sigmas of the scheduler runs from pictures to noise; unset it")
        if self._is_stochastic() and solver != "euler":
            raise ValueError(f"stochastic_sampling of the scheduler needs 'euler', not {solver!r}")

    def _check(self, prompts, references, height, width, steps, solver) -> None:
        """Raises ValueError for what this model cannot paint."""
        if not prompts or not all(isinstance(text, str) and text.strip() for text in prompts):
            raise ValueError("there is no prompt; give a string, or a list of them")
        if steps < 1:
            raise ValueError(f"num_inference_steps is {steps}; give 1 or more")
        if height % TOKEN or width % TOKEN or min(height, width) < TOKEN:
            raise ValueError(f"the size {width}x{height} is no multiple of {TOKEN}")
        if solver not in ("euler", "heun"):
            raise ValueError(f"solver is {solver!r}; give 'euler' or 'heun'")
        if len(references) > self.config.max_references:
            most = self.config.max_references
            raise ValueError(f"{len(references)} references are given, the model knows {most}")


def _check_pictures(source, references) -> None:
    """Raises ValueError for what is no picture of PIL, or no list of them."""
    if not isinstance(references, list | tuple):
        raise ValueError("references is no list; give a list of pictures: [picture]")
    for one in (*references, *(() if source is None else (source,))):
        if not isinstance(one, Image.Image):
            raise ValueError(f"a picture is a {type(one).__name__}; open it with PIL.Image.open")


if __name__ == "__main__":
    runpy.run_path(str(pathlib.Path(__file__).with_name("paint.py")), run_name="__main__")
