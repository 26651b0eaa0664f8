"""Query-Kontext: VLM, queries, connector, MMDiT and VAE composed; pure functions of one tree.

The tree holds `vlm`, `queries`, `connector`, `mmdit`, `vae` and, where a stage adapts a tower,
`lora/vlm` or `lora/mmdit`. Nothing here knows of stages: what is trained is the trainer's matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qk_jax.models import layers, lora, mmdit, qwen_vl, rotary, vae
from qk_jax.models.connector import Connector, Queries
from qk_jax.pictures.grids import PATCH_DIM, grid_of, vision_size
from qk_jax.sharding.rules import Activations

Params = dict[str, Any]
PACKED = 16  # pixels along a side of one packed token: 8x VAE, 2x2 packing


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the shapes and the laws of one Query-Kontext model.

    Attributes:
      vlm, mmdit, vae: configs of the towers.
      num_queries: K, kontext tokens.
      max_text: most text tokens of the context; a batch may have fewer.
      tail_tokens: tokens between text and queries (`<|im_end|>\\n<|im_start|>assistant\\n`).
      vlm_pixels: area at which the VLM sees a condition picture.
      law: positions of target, sources and references in the generator.
      condition_latents: whether condition pictures also reach the generator as VAE tokens.
      query_std: standard deviation of fresh queries.
      lora_scale: alpha / rank of the adapters in `lora`.
      remat: what the blocks keep for the backward pass (`layers.remat_policy`); None is all.
    """

    vlm: qwen_vl.VLMConfig
    mmdit: mmdit.MMDiTConfig
    vae: vae.AutoencoderKLConfig | vae.QwenImageVAEConfig
    num_queries: int = 128
    max_text: int = 256
    tail_tokens: int = 5
    vlm_pixels: int = 392 * 392
    law: rotary.PositionLaw = rotary.PositionLaw()
    condition_latents: bool = False
    query_std: float = 0.02
    lora_scale: float = 1.0
    remat: str | None = None


class QueryKontext:
    """The model as pure functions; holds modules and configs, never parameters."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: Any = jnp.float32,
        places: Mapping[str, Activations] | None = None,
    ):
        """`places` says by tower where activations lie; None leaves that to the compiler."""
        self.config = config
        self.dtype = dtype
        width, remat, places = config.vlm.text.hidden_size, config.remat, places or {}
        vision, text = places.get("vision"), places.get("text")
        self.vlm = qwen_vl.QwenVL(config.vlm, dtype, remat, vision, text)
        self.queries = Queries(config.num_queries, width, config.query_std)
        self.connector = Connector(config.mmdit.joint_attention_dim, dtype=dtype)
        self.mmdit = mmdit.MMDiT(config.mmdit, dtype, remat, places.get("mmdit"))
        self.vae = vae.VAE(config.vae, dtype, places.get("vae"))

    def _inits(self) -> dict[str, tuple[Any, tuple, dict]]:
        """Per tower: module, example arguments and keywords that touch every parameter."""
        ids = jnp.zeros((1, 8), jnp.int32)
        positions = jnp.zeros((1, 3, 8), jnp.int32)
        pixels = jnp.zeros((1, 16, PATCH_DIM))
        cfg = self.config.mmdit
        context = jnp.zeros((1, 2, cfg.joint_attention_dim))
        tokens = jnp.zeros((1, 4, cfg.in_channels))

        def autoencode(module, x):
            return module.decode(module.encode(x)[0])

        return {
            "vlm": (self.vlm, (ids, positions, ids == 0, pixels, ((4, 4),)), {}),
            "queries": (self.queries, (), {}),
            "connector": (
                self.connector,
                (jnp.zeros((1, 1, self.config.vlm.text.hidden_size)),),
                {},
            ),
            "mmdit": (
                self.mmdit,
                (
                    tokens,
                    context,
                    jnp.ones((1, 2), bool),
                    jnp.zeros((1,)),
                    jnp.zeros((1, 4, 3), jnp.int32),
                    jnp.zeros((2, 3), jnp.int32),
                ),
                {},
            ),
            "vae": (self.vae, (jnp.zeros((1, 32, 32, 3)),), {"method": autoencode}),
        }

    def abstract(self) -> Params:
        """Shapes of all towers, boxed with logical axes; computes nothing."""
        return {
            name: layers.abstract_params(module, *args, **kwargs)
            for name, (module, args, kwargs) in self._inits().items()
        }

    def init(
        self, rng: jax.Array, parts: tuple[str, ...] = ("queries", "connector", "mmdit")
    ) -> Params:
        """Fresh parameters of the named towers; each tower has its own key, whatever the others."""
        inits = self._inits()
        fresh = {}
        for index, name in enumerate(inits):
            if name in parts:
                module, args, kwargs = inits[name]
                key = jax.random.fold_in(rng, index)
                fresh[name] = layers.init_params(module, key, *args, **kwargs)
        return fresh

    def _variables(self, params: Params, tower: str) -> dict[str, Params]:
        """Variables of `tower`, with its adapter when there is one."""
        adapter = params.get("lora", {}).get(tower)
        if not adapter:
            return {"params": params[tower]}
        return {"params": params[tower], "lora": lora.scaled(adapter, self.config.lora_scale)}

    def states(self, params: Params, batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        """VLM states of the text window [B, T, D] and of the queries, the kontext [B, K, D].

        Rows are left-padded, so both windows are static slices: the text ends right before the
        assistant header, and the queries end the row. T is the batch's own, `text_mask`'s width.
        """
        cfg, words = self.config, batch["text_mask"].shape[1]
        sizes = [picture.shape[1:3] for picture in batch["conditions"]]
        grids = tuple(grid_of(*vision_size(*size, cfg.vlm_pixels)) for size in sizes)
        hidden = self.vlm.apply(
            self._variables(params, "vlm"),
            batch["input_ids"],
            batch["position_ids"],
            batch["attention_mask"],
            batch["pixel_values"],
            grids,
            queries=params["queries"]["embedding"],
        )
        end = hidden.shape[1] - cfg.num_queries - cfg.tail_tokens
        return hidden[:, end - words : end], hidden[:, -cfg.num_queries :]

    def connect(
        self, params: Params, text: jax.Array, kontext: jax.Array, text_mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The generator's context [B, T + K, J] and its mask from VLM states."""
        states = jnp.concatenate([text, kontext], axis=1)
        context = self.connector.apply({"params": params["connector"]}, states)
        kontext_mask = jnp.ones(kontext.shape[:2], bool)
        return context, jnp.concatenate([text_mask, kontext_mask], axis=1)

    def context(self, params: Params, batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        """The generator's context [B, T + K, J] and its mask [B, T + K] for a batch."""
        return self.connect(params, *self.states(params, batch), batch["text_mask"])

    def posterior(self, params: Params, pictures: jax.Array) -> tuple[jax.Array, jax.Array]:
        """uint8 pictures [B, H, W, 3] -> mean and log variance of latents [B, H/8, W/8, C]."""
        x = pictures.astype(jnp.float32) / 127.5 - 1.0
        return self.vae.apply({"params": params["vae"]}, x, method="encode")

    def encode_pictures(self, params: Params, pictures: jax.Array) -> jax.Array:
        """uint8 pictures [B, H, W, 3] -> normalised latents [B, H/8, W/8, C] in float32: the mode
        of their posterior, as diffusers' pipelines take it for condition pictures."""
        return vae.normalize(self.posterior(params, pictures)[0], self.config.vae)

    def encode(self, params: Params, batch: dict[str, Any]) -> dict[str, Any]:
        """What the autoencoder makes of a batch, all that `loss` needs of its pixels.

        Returns:
          `posterior`, (mean, log variance) of the target [B, H/8, W/8, C], not yet normalised, and
          `latents` of the condition pictures.
        """
        return {
            "posterior": self.posterior(params, batch["target"]),
            "latents": self.condition_latents(params, batch),
        }

    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """Normalised latents [B, h, w, C] -> pictures [B, 8 h, 8 w, 3] in [-1, 1], float32."""
        z = vae.denormalize(latents, self.config.vae)
        x = self.vae.apply({"params": params["vae"]}, z, method="decode")
        return jnp.clip(x.astype(jnp.float32), -1.0, 1.0)

    def condition_latents(self, params: Params, batch: dict[str, Any]) -> tuple[jax.Array, ...]:
        """Latents of the condition pictures, or () for a model without VAE tokens."""
        if not self.config.condition_latents:
            return ()
        return tuple(self.encode_pictures(params, picture) for picture in batch["conditions"])

    def velocity(
        self,
        params: Params,
        x_t: jax.Array,
        t: jax.Array,
        context: jax.Array,
        mask: jax.Array,
        grid: tuple[int, int],
        latents: tuple[jax.Array, ...] = (),
        roles: jax.Array | None = None,
        condition_mask: jax.Array | None = None,
    ) -> jax.Array:
        """The generator's velocity at the target tokens, float32.

        Args:
          params: the tree.
          x_t: packed noisy target [B, N, 4 C].
          t: [B] in [0, 1]; 1 is noise.
          context: [B, T + K, J]; mask [B, T + K] hides padded text.
          mask: see context.
          grid: (rows, columns) of the packed target, rows * columns = N.
          latents: condition latents [B, h, w, C] each, in the order of the pictures.
          roles: int32 [B, n]; 0 a source, 1 a reference.
          condition_mask: bool [B]; False hides all condition tokens of a row.
        """
        law = self.config.law
        grids = tuple((z.shape[1] // 2, z.shape[2] // 2) for z in latents)
        if roles is None or not latents:
            roles = jnp.zeros((x_t.shape[0], 0), jnp.int32)
        stream = jnp.concatenate([x_t, *(mmdit.pack(z) for z in latents)], axis=1)
        hidden_mask = None
        if latents and condition_mask is not None:
            is_target = jnp.arange(stream.shape[1]) < x_t.shape[1]
            hidden_mask = is_target[None, :] | condition_mask[:, None]
        out = self.mmdit.apply(
            self._variables(params, "mmdit"),
            stream,
            context,
            mask,
            t,
            rotary.image_positions(law, grid, grids, roles),
            rotary.text_positions(law, context.shape[1], grid, grids),
            hidden_mask,
            x_t.shape[1],
        )
        return out[:, : x_t.shape[1]].astype(jnp.float32)
