"""The part of a Query-Kontext model that transformers and diffusers have no class for.

Exported pipelines carry this file as `kontext/kontext.py`; it needs torch and diffusers only.
"""

import contextlib
import functools
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from PIL import Image, ImageCms
from torch import nn

REFERENCE = 1  # role of a condition picture; 0 is a source
# What turns a picture upright, by its EXIF orientation.
TURNS: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# The transparent colour of samples that Pillow widens or narrows, by their form.
KEYS = {
    "L;2": lambda key: 85 * key, "L;4": lambda key: 17 * key,
    "RGB;16B": lambda key: tuple(part >> 8 for part in key),
}  # fmt: skip


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
    return torch.cartesian_prod(torch.arange(height), torch.arange(width))


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


def standard(image: Image.Image) -> Image.Image:
    """An image upright, in sRGB and 8 bits: RGB, or RGBA where it may be transparent."""
    tile = getattr(image, "tile", None)
    stored = str(tile[0][3]) if tile else ""  # form of the samples
    image.load()
    key, alpha, turn = image.info.get("transparency"), None, None
    with contextlib.suppress(Exception):  # of many classes, for damaged EXIF
        turn = TURNS.get(image.getexif().get(0x0112))
    if image.mode == "F":
        raise ValueError("floats have no known range")
    if image.mode.startswith("I"):
        grey, most = np.asarray(image).astype(np.int64), 4095 if "I;12" in stored else 65535
        if grey.min() < 0 or grey.max() > most:
            raise ValueError(f"integers from {grey.min()} to {grey.max()} have no known range")
        alpha = None if key is None else Image.fromarray(np.uint8(255) * (grey != key))
        pixels = Image.fromarray(((510 * grey + most) // (2 * most)).astype(np.uint8))
    elif image.has_transparency_data:
        if stored in KEYS:
            image.info["transparency"] = KEYS[stored](key)
        both = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        pixels, alpha = both.convert(both.mode[:-1]), both.getchannel("A")
    else:
        pixels = image.convert(image.mode if image.mode in ("L", "CMYK") else "RGB")
    mode, transform = to_srgb(image.info.get("icc_profile") or b"")
    if pixels.mode == mode or (pixels.mode, mode) == ("L", "RGB"):
        pixels = transform.apply(pixels.convert(mode))
    pixels = pixels.convert("RGB")
    if alpha is not None:
        pixels.putalpha(alpha)
    pixels = pixels if turn is None else pixels.transpose(turn)
    pixels.info = {}  # orientation and profile are applied
    return pixels


@functools.lru_cache(maxsize=16)
def to_srgb(profile: bytes) -> tuple[str, Any]:
    """(mode, transform) of an ICC profile; mode '' if it is broken or as good as sRGB's own."""
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
    try:
        given, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[given.profile.xcolor_space.strip()]
        relative, flags = (
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        transform = ImageCms.buildTransform(given, srgb, mode, "RGB", relative, flags)
        probe = Image.fromarray(cube).convert(mode)
        moved = np.asarray(transform.apply(probe), np.int16)
    except Exception:  # of many classes, for a broken profile
        return "", None
    is_srgb = np.abs(moved - np.asarray(probe.convert("RGB"))).max() <= 2
    return ("", None) if is_srgb else (mode, transform)


def over_white(image: Image.Image) -> Image.Image:
    """A `standard` image in RGB, white where it is transparent."""
    if image.mode == "RGB":
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


class Kontext(ModelMixin, ConfigMixin):
    """Learnable queries for the text encoder, the connector from it to the transformer, where
    tokens of the transformer lie, and what a picture shows.

    Args:
      num_queries: K, queries at the end of the text encoder's sequence.
      width: hidden size of the text encoder.
      features: `joint_attention_dim` of the transformer.
      layers: numbers of layers of the text encoder, from 1, that the connector reads beside the
        last states.
      bidirectional: whether queries see each other, not only those before them.
    """

    @register_to_config
    def __init__(
        self,
        num_queries: int,
        width: int,
        features: int,
        layers: Sequence[int] = (),
        bidirectional: bool = False,
    ):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(num_queries, width))
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, features)
        if layers:
            self.layers_norm = nn.ModuleList(nn.RMSNorm(width, eps=1e-6) for _ in layers)
            self.layers_fc1 = nn.Linear(len(layers) * width, 2 * width)
            self.layers_fc2 = nn.Linear(2 * width, features)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`states` of words and queries [B, L, (1 + layers) width] -> context [B, L, features]."""
        last, *others = states.split(self.config.width, dim=-1)
        context = self.fc2(nn.functional.gelu(self.fc1(last), approximate="tanh"))
        if not others:
            return context
        pairs = zip(self.layers_norm, others, strict=True)
        hidden = self.layers_fc1(torch.cat([norm(x) for norm, x in pairs], dim=-1))
        return context + self.layers_fc2(nn.functional.gelu(hidden, approximate="tanh"))

    def states(
        self, model: nn.Module, embeds: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """What the text encoder's language model makes of words, pictures and queries.

        Args:
          model: Qwen2_5_VLTextModel.
          embeds: [1, S, width], the queries at the end.
          positions: M-RoPE's, [3, 1, S].

        Returns:
          the last states and beside them those of `layers`, [1, S, (1 + layers) width].
        """
        mask, length = None, embeds.shape[1]
        if self.config.bidirectional:
            sees = torch.ones(length, length, dtype=torch.bool, device=embeds.device).tril()
            sees[-len(self.queries) :] = True
            mask = torch.zeros_like(sees, dtype=embeds.dtype)
            mask = mask.masked_fill(~sees, torch.finfo(embeds.dtype).min)[None, None]
        kept: dict[int, torch.Tensor] = {}

        def keep(number: int, output: Any) -> None:
            kept[number] = output[0] if isinstance(output, tuple) else output

        layers: Any = model.layers
        hooks = [  # what `output_hidden_states` holds differs between versions of transformers
            layers[number - 1].register_forward_hook(
                lambda module, given, output, number=number: keep(number, output)
            )
            for number in self.config.layers
        ]
        last = model(
            inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state
        for hook in hooks:
            hook.remove()
        return torch.cat([last, *(kept[number] for number in self.config.layers)], dim=-1)

    @staticmethod
    def picture(image: Image.Image) -> Image.Image:
        """What an image shows, in RGB: upright, in sRGB, on white where it is transparent."""
        return over_white(standard(image))

    @staticmethod
    def rotary(axes_dims: Sequence[int]) -> Positions:
        """What takes the place of the transformer's `pos_embed`."""
        return Positions(axes_dims)

    @staticmethod
    def guided(velocities, sigma, scales, renormalize: bool) -> torch.Tensor:
        """The velocity that guidance makes of those for everything, without words, without words
        and pictures, and without pictures, of which all but the first may be left out.

        Args:
          velocities: [B, tokens, channels] each.
          sigma: noise level.
          scales: weight of the words at sigma 1 and at 0, weight of the pictures, and the first
            and the last sigma at which there is guidance.
          renormalize: keep the length of the first velocity at every token.
        """
        full, *others = velocities
        if not others:
            return full
        start, end, image_scale, first, last = scales
        inside = first <= sigma <= last
        scale, image_scale = (end + (start - end) * sigma, image_scale) if inside else (1.0, 1.0)
        words, out = full - others[0], others[0]
        if len(others) > 1:
            pictures, out = others[0] - others[1], others[1]
            if len(others) > 2:  # the mean of both orders in which the two are added to nothing
                pictures = (pictures + full - others[2]) / 2
                words = (words + others[2] - others[1]) / 2
            out = out + image_scale * pictures
        out = out + scale * words
        if renormalize:
            length = out.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            out = out * (full.norm(dim=-1, keepdim=True) / length)
        return out

    @staticmethod
    def places(
        grids, roles, context: int, law: str, source_mode: str, index_base: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(frame, row, column) of all image tokens and of the context's, [tokens, 3] each.

        Args:
          grids: (rows, columns) of target and condition pictures.
          roles: of the condition pictures.
          context: tokens of the context.
          law: 'shifted' (see `shifted_positions`) or 'qwen_image' (see `centred_positions`).
          source_mode, index_base: of `shifted_positions`.
        """
        if law == "shifted":
            zero = torch.zeros(context, 3, dtype=torch.long)
            return shifted_positions(grids, roles, source_mode, index_base), zero
        first = max(side // 2 for grid in grids for side in grid)
        return centred_positions(grids), (first + torch.arange(context))[:, None].expand(-1, 3)
