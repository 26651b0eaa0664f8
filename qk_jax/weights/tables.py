"""How PyTorch tensors map to our trees: one table per model, read in both directions.

A table row is (torch name, our path, transform). `{i}` stands for a number. Where our path repeats
it, the number is part of the path; where it does not, our leaf stacks all layers along its leading
axis. Names on disk are the Hub's; `aliases` rewrite other spellings on import.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from qk_jax.models import vae
from qk_jax.models.mmdit import MMDiTConfig
from qk_jax.models.qwen_vl import VLMConfig
from qk_jax.pictures.grids import PATCH

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Transform:
    """A pair of inverse maps between a torch tensor and our leaf (one layer of it).

    Attributes:
      take: torch array -> ours.
      give: ours -> torch array. For a transform that drops taps the dropped ones are zero.
      taps: whether `take` keeps only the last temporal tap of a causal convolution.
      axes: for a transform that only reorders axes: a tuple with one entry per axis of our leaf
        (sizes, slices) -> the same for the torch tensor and back; so a part of our leaf can be
        read as a part of the file.
    """

    take: Callable[[Array], Array]
    give: Callable[[Array], Array]
    taps: bool = False
    axes: Callable[[tuple], tuple] | None = None

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the torch tensor that becomes ours of `shape`."""
        return self.give(np.broadcast_to(np.zeros((), np.bool_), shape)).shape


class Row(NamedTuple):
    """A table row."""

    torch: str
    path: str
    transform: Transform


class Target(NamedTuple):
    """What a torch tensor becomes: a leaf, or the layer of one, and how."""

    path: str
    layer: int | None
    transform: Transform


def _pattern(template: str) -> re.Pattern[str]:
    """A full-match regex for a name with {placeholders}; a repeated one must agree."""
    regex, *rest = map(re.escape, re.split(r"\{\w+\}", template))
    seen: set[str] = set()
    for field, text in zip(re.findall(r"\{(\w+)\}", template), rest, strict=True):
        number = f"(?P={field})" if field in seen else rf"(?P<{field}>0|[1-9]\d{{0,5}})"
        regex += number + text
        seen.add(field)
    return re.compile(regex)


@dataclasses.dataclass(frozen=True)
class Table:
    """The mapping of one model.

    Attributes:
      rows: see Row.
      aliases: (regex, replacement) pairs applied in order to names on import.
      ignored: regexes of torch tensors that have no counterpart here; why that is right is said
        where the table is built.
    """

    rows: tuple[Row, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    @functools.cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], re.Pattern[str], str | None, Row]]:
        """(of the torch name, of the path, the placeholder of stacked layers, row) of each row."""
        found = []
        for row in self.rows:
            torch, path = _pattern(row.torch), _pattern(row.path)
            stacked = torch.groupindex.keys() - path.groupindex.keys()
            found.append((torch, path, next(iter(stacked), None), row))
        return found

    def _usual(self, name: str) -> str:
        """`name` in the spelling of the rows."""
        for regex, replacement in self.aliases:
            name = re.sub(regex, replacement, name)
        return name

    def locate(self, name: str) -> Target | None:
        """What the torch tensor `name` becomes; None when no row knows it."""
        name = self._usual(name)
        for torch, _, stacked, row in self._patterns:
            if match := torch.fullmatch(name):
                layer = int(match[stacked]) if stacked else None
                return Target(row.path.format(**match.groupdict()), layer, row.transform)
        return None

    def is_ignored(self, name: str) -> bool:
        """Whether `name` is a tensor that this model rightly leaves out."""
        return any(re.fullmatch(regex, self._usual(name)) for regex in self.ignored)

    def names(self, path: str, shape: tuple[int, ...]) -> Iterator[tuple[str, int | None, Row]]:
        """The torch tensors of the leaf `path`: (name, layer or None, row) for each.

        Raises:
          KeyError: no row has this path.
        """
        for _, pattern, stacked, row in self._patterns:
            if match := pattern.fullmatch(path):
                values = match.groupdict()
                if stacked is None:
                    yield row.torch.format(**values), None, row
                else:
                    for layer in range(shape[0]):
                        yield row.torch.format(**values, **{stacked: layer}), layer, row
                return
        raise KeyError(path)


def _same(value: Any) -> Any:
    return value


def _reshape(*shape: int) -> Callable[[Array], Array]:
    return lambda array: array.reshape(shape)


SAME = Transform(_same, _same, axes=_same)
# [out, in] <-> [in, out]
LINEAR = Transform(np.transpose, np.transpose, axes=lambda axes: axes[::-1])
# OIHW <-> HWIO
CONV = Transform(lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))
# [C, 1, 1] or [C, 1, 1, 1] <-> [C]
VECTOR3 = Transform(_reshape(-1), _reshape(-1, 1, 1))
VECTOR4 = Transform(_reshape(-1), _reshape(-1, 1, 1, 1))


def _causal(taps: int) -> Transform:
    """A causal 3-D kernel OITHW whose last tap is all that a single frame meets (HWIO)."""

    def give(w: Array) -> Array:
        full = np.zeros((w.shape[3], w.shape[2], taps, *w.shape[:2]), w.dtype)
        full[:, :, -1] = w.transpose(3, 2, 0, 1)
        return full

    return Transform(lambda w: w[:, :, -1].transpose(2, 3, 1, 0), give, taps > 1)


CAUSAL3, CAUSAL1 = _causal(3), _causal(1)
# The vision tower's Conv3d over whole patches (3 channels, 2 frames) is one matmul on the patch.
PATCHES = Transform(
    lambda w: w.reshape(len(w), -1).T, lambda w: w.T.reshape(-1, 3, 2, PATCH, PATCH)
)


def _linear(torch: str, path: str, bias: bool = True) -> list[Row]:
    rows = [Row(f"{torch}.weight", f"{path}/kernel", LINEAR)]
    return [*rows, Row(f"{torch}.bias", f"{path}/bias", SAME)] if bias else rows


def _convolution(torch: str, path: str, transform: Transform = CONV) -> list[Row]:
    return [
        Row(f"{torch}.weight", f"{path}/kernel", transform),
        Row(f"{torch}.bias", f"{path}/bias", SAME),
    ]


def _scale(torch: str, path: str) -> Row:
    return Row(f"{torch}.weight", f"{path}/scale", SAME)


def of(config: VLMConfig | MMDiTConfig | vae.VAEConfig) -> Table:
    """The table of the model that `config` describes."""
    if isinstance(config, VLMConfig):
        return vlm(config.tie_word_embeddings)
    if isinstance(config, MMDiTConfig):
        return mmdit()
    is_video = isinstance(config, vae.QwenImageVAEConfig)
    return autoencoder_kl_qwen_image() if is_video else autoencoder_kl()


def vlm(tied: bool = False) -> Table:
    """Qwen2.5-VL (`Qwen2_5_VLForConditionalGeneration`).

    With `tied`, logits use the embedding table, and a stored copy of it is left out.
    """
    rows = [
        Row("model.embed_tokens.weight", "language_model/embed_tokens/embedding", SAME),
        _scale("model.norm", "language_model/norm"),
        Row("visual.patch_embed.proj.weight", "visual/patch_embed/proj/kernel", PATCHES),
        _scale("visual.merger.ln_q", "visual/merger/ln_q"),
        *_linear("visual.merger.mlp.0", "visual/merger/mlp_0"),
        *_linear("visual.merger.mlp.2", "visual/merger/mlp_2"),
    ]
    if not tied:
        rows += _linear("lm_head", "lm_head", bias=False)
    layer, ours = "model.layers.{i}", "language_model/layers"
    for name in ("input_layernorm", "post_attention_layernorm"):
        rows.append(_scale(f"{layer}.{name}", f"{ours}/{name}"))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        bias = name != "o_proj"
        rows += _linear(f"{layer}.self_attn.{name}", f"{ours}/self_attn/{name}", bias)
    for name in ("gate_proj", "up_proj", "down_proj"):
        rows += _linear(f"{layer}.mlp.{name}", f"{ours}/mlp/{name}", bias=False)
        rows += _linear(f"visual.blocks.{{i}}.mlp.{name}", f"visual/blocks/mlp/{name}")
    for name in ("norm1", "norm2"):
        rows.append(_scale(f"visual.blocks.{{i}}.{name}", f"visual/blocks/{name}"))
    for name in ("qkv", "proj"):
        rows += _linear(f"visual.blocks.{{i}}.attn.{name}", f"visual/blocks/attn/{name}")
    aliases = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))
    return Table(tuple(rows), aliases, (r"lm_head\.weight",) if tied else ())


def mmdit() -> Table:
    """`QwenImageTransformer2DModel`."""
    rows = [_scale("txt_norm", "txt_norm")]
    for name in (
        "img_in", "txt_in", "proj_out", "norm_out.linear",
        "time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2",
    ):  # fmt: skip
        rows += _linear(name, name.replace(".", "/"))
    block, ours = "transformer_blocks.{i}", "transformer_blocks"
    for name in (
        "img_mod.1", "txt_mod.1", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj",
        "txt_mlp.net.2", "attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj",
        "attn.add_k_proj", "attn.add_v_proj", "attn.to_out.0", "attn.to_add_out",
    ):  # fmt: skip
        rows += _linear(f"{block}.{name}", f"{ours}/{_module_path(name)}")
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        rows.append(_scale(f"{block}.attn.{name}", f"{ours}/attn/{name}"))
    return Table(tuple(rows))


def _module_path(name: str) -> str:
    """A PyTorch module name as our path: `a.b.0.c` -> `a/b_0_c`; numbers join their neighbours.

    A number cannot name a module of ours, so that `img_mlp.net.0.proj` is `img_mlp/net_0_proj`.
    """
    name = re.sub(r"\.(\d+)\.", r"_\1_", name)
    return re.sub(r"\.(\d+)$", r"_\1", name).replace(".", "/")


def _residual(torch: str, path: str, norm: Callable, convolution: Callable) -> list[Row]:
    rows = []
    for number in (1, 2):
        rows += norm(f"{torch}.norm{number}", f"{path}/norm{number}")
        rows += convolution(f"{torch}.conv{number}", f"{path}/conv{number}")
    return rows


def _group_norm(torch: str, path: str) -> list[Row]:
    return [_scale(torch, path), Row(f"{torch}.bias", f"{path}/bias", SAME)]


def autoencoder_kl() -> Table:
    """`AutoencoderKL` of SD3, FLUX.1 and SDXL; the attention's old names are accepted."""
    rows = []
    for half, blocks, resampler in (
        ("encoder", "down_blocks", "downsamplers"),
        ("decoder", "up_blocks", "upsamplers"),
    ):
        for name in ("conv_in", "conv_out"):
            rows += _convolution(f"{half}.{name}", f"{half}/{name}")
        rows += _group_norm(f"{half}.conv_norm_out", f"{half}/conv_norm_out")
        middle = f"{half}.mid_block.resnets.{{j}}", f"{half}/mid_block/resnets_{{j}}"
        level = f"{half}.{blocks}.{{i}}.resnets.{{j}}", f"{half}/{blocks}_{{i}}/resnets_{{j}}"
        for torch, path in (middle, level):
            rows += _residual(torch, path, _group_norm, _convolution)
        rows += _convolution(f"{level[0]}.conv_shortcut", f"{level[1]}/conv_shortcut")
        torch, path = f"{half}.mid_block.attentions.0", f"{half}/mid_block/attentions_0"
        rows += _group_norm(f"{torch}.group_norm", f"{path}/group_norm")
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            rows += _linear(f"{torch}.{name}", f"{path}/{_module_path(name)}")
        rows += _convolution(
            f"{half}.{blocks}.{{i}}.{resampler}.0.conv", f"{half}/{blocks}_{{i}}/{resampler}_0/conv"
        )
    for name in ("quant_conv", "post_quant_conv"):
        rows += _convolution(name, name)
    old = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
    aliases = tuple((rf"(attentions\.0)\.{a}\.", rf"\1.{b}.") for a, b in old)
    return Table(tuple(rows), aliases)


def _channel_norm(torch: str, path: str) -> list[Row]:
    """Row of QwenImageRMS_norm over [C, T, H, W]."""
    return [Row(f"{torch}.gamma", f"{path}/scale", VECTOR4)]


def _causal3(torch: str, path: str) -> list[Row]:
    return _convolution(torch, path, CAUSAL3)


def autoencoder_kl_qwen_image() -> Table:
    """`AutoencoderKLQwenImage`, of which a single frame meets the last taps only.

    The `time_conv`s are ignored: a single frame never reaches them. `weights.write` puts them and
    the dropped taps back, from the original weights where it has them.
    """
    rows = []
    for half in ("encoder", "decoder"):
        for name in ("conv_in", "conv_out"):
            rows += _causal3(f"{half}.{name}", f"{half}/{name}")
        rows += _channel_norm(f"{half}.norm_out", f"{half}/norm_out")
        middle = f"{half}.mid_block.resnets.{{j}}", f"{half}/mid_block/resnets_{{j}}"
        level = "encoder.down_blocks.{i}", "encoder/down_blocks_{i}"
        if half == "decoder":
            level = "decoder.up_blocks.{i}.resnets.{j}", "decoder/up_blocks_{i}/resnets_{j}"
        for torch, path in (middle, level):
            rows += _residual(torch, path, _channel_norm, _causal3)
        rows += _convolution(f"{level[0]}.conv_shortcut", f"{level[1]}/conv_shortcut", CAUSAL1)
        torch, path = f"{half}.mid_block.attentions.0", f"{half}/mid_block/attentions_0"
        rows.append(Row(f"{torch}.norm.gamma", f"{path}/norm/scale", VECTOR3))
        for name in ("to_qkv", "proj"):
            rows += _convolution(f"{torch}.{name}", f"{path}/{name}")
    rows += _convolution("encoder.down_blocks.{i}.resample.1", "encoder/down_blocks_{i}/resample_1")
    rows += _convolution(
        "decoder.up_blocks.{i}.upsamplers.0.resample.1",
        "decoder/up_blocks_{i}/upsamplers_0/resample_1",
    )
    for name in ("quant_conv", "post_quant_conv"):
        rows += _convolution(name, name, CAUSAL1)
    return Table(tuple(rows), ignored=(r".*\.time_conv\.(weight|bias)",))


def glue() -> Table:
    """Queries and connector, named as in `export.kontext.Kontext`."""
    rows = [Row("queries", "queries/embedding", SAME)]
    for name in ("fc1", "fc2", "layers_fc1", "layers_fc2"):
        rows += _linear(name, f"connector/{name}")
    rows.append(Row("layers_norm.{i}.weight", "connector/layers_norm_{i}/scale", SAME))
    return Table(tuple(rows))


# What LoRA files may adapt: {tower: (what their keys begin with, its table)}.
ADAPTED = {"mmdit": ("transformer.", mmdit), "vlm": ("text_encoder.", vlm)}


def lora(tower: str = "mmdit") -> Table:
    """Adapters of the Linear layers of a tower, with the names that diffusers gives the keys of
    LoRA files: `transformer.` or `text_encoder.`, the module, `lora_A.weight` or `lora_B.weight`.

    Args:
      tower: 'mmdit' or 'vlm'.
    """
    rows, (prefix, table) = [], ADAPTED[tower]
    for row in table().rows:
        if row.transform is LINEAR:
            torch, path = row.torch.removesuffix(".weight"), row.path.removesuffix("/kernel")
            for half in "AB":
                name = f"{prefix}{torch}.lora_{half}.weight"
                rows.append(Row(name, f"{path}/lora_{half.lower()}", LINEAR))
    return Table(tuple(rows))
