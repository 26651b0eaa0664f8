"""Query-Kontext: VLM, queries, connector, MMDiT and VAE composed; pure functions of one tree.

The tree holds `vlm`, `queries`, `connector`, `mmdit`, `vae` and, where a stage adapts a tower,
`lora/vlm` or `lora/mmdit`. Nothing here knows of stages or of what is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from qk_jax.base.types import Prompt, StepBatch, Tree
from qk_jax.models import layers, lora, mmdit, qwen_vl, rotary, vae
from qk_jax.models.connector import Connector, Queries, noisy
from qk_jax.pictures.grids import Grids, grid_of, vision_size
from qk_jax.sharding.rules import Activations


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the shapes and the laws of one Query-Kontext model.

    Attributes:
      vlm, mmdit, vae: configs of the towers.
      num_queries: K, kontext tokens.
      max_text: most text tokens of the context; a batch may have fewer.
      tail_tokens: tokens between text and queries (`<|im_end|>\\n<|im_start|>assistant\\n`).
      keep_tail: whether they belong to the context.
      picture_multiple: of the sides of a picture on its way to the VLM (`grids.vision_size`).
      vlm_pixels: area at which the VLM sees a condition picture.
      law: positions of target, sources and references in the generator.
      condition_latents: whether condition pictures also reach the generator as VAE tokens.
      query_std: standard deviation of fresh queries.
      query_noise: standard deviation of the noise on queries (`connector.noisy`).
      bidirectional_queries: whether queries see each other, not only those before them.
      vlm_layers: other layers of the VLM, numbered as transformers' `hidden_states`, whose states
        the connector reads beside the last ones.
      lora_scale: alpha / rank of the adapters in `lora`.
      remat: what the blocks keep for the backward pass (`layers.remat_policy`); None is all.
    """

    vlm: qwen_vl.VLMConfig
    mmdit: mmdit.MMDiTConfig
    vae: vae.AutoencoderKLConfig | vae.QwenImageVAEConfig
    num_queries: int = 128
    max_text: int = 256
    tail_tokens: int = 5
    keep_tail: bool = False
    picture_multiple: int = 0
    vlm_pixels: int = 392 * 392
    law: rotary.PositionLaw = rotary.PositionLaw()
    condition_latents: bool = False
    query_std: float = 0.02
    query_noise: float = 0.0
    bidirectional_queries: bool = False
    vlm_layers: tuple[int, ...] = ()
    lora_scale: float = 1.0
    remat: str | None = None

    def vision_grids(self, sizes: Sequence[tuple[int, int]]) -> Grids:
        """(rows, columns) in patches of pictures of (H, W) pixels as the VLM sees them."""
        area, multiple = self.vlm_pixels, self.picture_multiple
        return tuple(grid_of(*vision_size(*size, area, multiple)) for size in sizes)


class QueryKontext:
    """The model as pure functions; holds modules and configs, never parameters."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: Any = jnp.float32,
        activations: Mapping[str, Activations] | None = None,
    ):
        """`activations` has the sharding of each tower's; None leaves it to the compiler."""
        self.config = config
        self.dtype = dtype
        width, remat, of = config.vlm.text.hidden_size, config.remat, (activations or {}).get
        self.vlm = qwen_vl.QwenVL(
            config.vlm, dtype, remat, of("vision"), of("text"),
            config.bidirectional_queries, config.vlm_layers,
        )  # fmt: skip
        self.queries = Queries(config.num_queries, width, config.query_std)
        layers_read = len(config.vlm_layers)
        self.connector = Connector(config.mmdit.joint_attention_dim, layers_read, dtype)
        self.mmdit = mmdit.MMDiT(config.mmdit, dtype, remat, of("mmdit"))
        self.vae = vae.VAE(config.vae, dtype, of("vae"))

    def _modules(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """Per tower: its module, and arguments of a call that makes all its parameters."""
        config = self.config
        width = (1 + len(config.vlm_layers)) * config.vlm.text.hidden_size
        states = jnp.zeros((1, 1, width))
        return {
            "vlm": (self.vlm, self.vlm.example()),
            "queries": (self.queries, ()),
            "connector": (self.connector, (states,)),
            "mmdit": (self.mmdit, self.mmdit.example()),
            "vae": (self.vae, self.vae.example()),
        }

    def abstract(self, parts: tuple[str, ...] = ()) -> Tree:
        """Shapes of the named towers or of all, boxed with logical axes; computes nothing."""
        return {
            name: layers.abstract_params(module, *args)
            for name, (module, args) in self._modules().items()
            if name in parts or not parts
        }

    def init(
        self, rng: Key[Array, ""], parts: tuple[str, ...] = ("queries", "connector", "mmdit")
    ) -> Tree:
        """Fresh parameters of the named towers; each tower has its own key, whatever the others."""
        return {
            name: layers.init_params(module, jax.random.fold_in(rng, index), *args)
            for index, (name, (module, args)) in enumerate(self._modules().items())
            if name in parts
        }

    def _apply(self, tower: str, params: Tree, *args: Any, **kwargs: Any) -> Any:
        """Applies a tower to its parameters, with its adapter when there is one."""
        variables = {"params": params[tower]}
        if adapter := params.get("lora", {}).get(tower):
            variables["lora"] = lora.scaled(adapter, self.config.lora_scale)
        return getattr(self, tower).apply(variables, *args, **kwargs)

    def states(
        self, params: Tree, batch: Prompt | StepBatch, rng: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "B T states"], Float[Array, "B K states"]]:
        """VLM states of the window (`data.prompts`) and of the queries, the kontext.

        Sequences are left-padded, so both are static slices: the window ends right before the
        queries or before the assistant header, and the queries end the sequence. Its length T is
        the batch's own. The last states come first, those of `vlm_layers` follow along the last
        axis. The pictures of a padded batch are those of its `windows`. `rng` draws the noise of
        the queries, where there is one.
        """
        cfg, words = self.config, batch["text_mask"].shape[1]
        asked: Any = batch
        pictures = asked.get("windows")
        if pictures is None:
            pictures = cfg.vision_grids([x.shape[1:3] for x in asked["conditions"]])
        queries = params["queries"]["embedding"]
        if cfg.query_noise:
            queries = noisy(queries, cfg.query_noise, rng, len(batch["text_mask"]))
        hidden = self._apply(
            "vlm",
            params,
            batch["input_ids"],
            batch["position_ids"],
            batch["attention_mask"],
            batch["pixel_values"],
            pictures,
            queries=queries,
            features=asked.get("features"),
        )
        end = hidden.shape[1] - cfg.num_queries - (0 if cfg.keep_tail else cfg.tail_tokens)
        return hidden[:, end - words : end], hidden[:, -cfg.num_queries :]

    def connect(
        self,
        params: Tree,
        text: Float[Array, "B T states"],
        kontext: Float[Array, "B K states"],
        text_mask: Bool[Array, "B T"],
    ) -> tuple[Float[Array, "B T+K J"], Bool[Array, "B T+K"]]:
        """The generator's context and its mask from VLM states."""
        states = jnp.concatenate([text, kontext], axis=1)
        context = self._apply("connector", params, states)
        kontext_mask = jnp.ones(kontext.shape[:2], bool)
        return context, jnp.concatenate([text_mask, kontext_mask], axis=1)

    def context(
        self, params: Tree, batch: Prompt
    ) -> tuple[Float[Array, "B L J"], Bool[Array, "B L"]]:
        """The generator's context and its mask for a batch."""
        return self.connect(params, *self.states(params, batch), batch["text_mask"])

    def vision_features(
        self, params: Tree, pixel_values: Float[Array, "B P 1176"], grids: Grids
    ) -> Float[Array, "B tokens D"]:
        """The vision tower's features of pictures, those of every slot of these `grids`."""
        return self._apply("vlm", params, pixel_values, grids, method="features")

    def posterior(
        self, params: Tree, pictures: UInt8[Array, "B H W 3"]
    ) -> tuple[vae.Latents, vae.Latents]:
        """Mean and log variance of the latents of pictures, not yet normalised."""
        x = pictures.astype(jnp.float32) / 127.5 - 1.0
        return self._apply("vae", params, x, method="encode")

    def encode_pictures(self, params: Tree, pictures: UInt8[Array, "B H W 3"]) -> vae.Latents:
        """Normalised latents of pictures in float32: the mode of their posterior, as diffusers'
        pipelines take it for condition pictures."""
        return vae.normalize(self.posterior(params, pictures)[0], self.config.vae)

    def posterior_tokens(
        self, params: Tree, pictures: UInt8[Array, "B H W 3"], tokens: int
    ) -> tuple[Float[Array, "B tokens packed"], Float[Array, "B tokens packed"]]:
        """Mean and standard deviation of the normalised latents of pictures, packed and padded
        with zeros to so many tokens."""
        mean, logvar = self.posterior(params, pictures)
        mean = vae.normalize(mean, self.config.vae)
        deviation = jnp.exp(0.5 * logvar) * self.config.vae.shift_and_scale()[1]

        def padded(z: vae.Latents) -> Array:
            packed = mmdit.pack(z)
            return jnp.pad(packed, ((0, 0), (0, tokens - packed.shape[1]), (0, 0)))

        return padded(mean), padded(deviation)

    def decode(self, params: Tree, latents: vae.Latents) -> vae.Pictures:
        """Normalised latents -> pictures in [-1, 1], float32."""
        z = vae.denormalize(latents, self.config.vae)
        x = self._apply("vae", params, z, method="decode")
        return jnp.clip(x.astype(jnp.float32), -1.0, 1.0)

    def velocity(
        self,
        params: Tree,
        x_t: Float[Array, "B target packed"],
        t: Float[Array, " B"],
        context: Float[Array, "B L J"],
        mask: Bool[Array, "B L"],
        grid: tuple[int, int],
        latents: tuple[Float[Array, "B _h _w C"], ...] = (),
        roles: Int[Array, "B n"] | None = None,
        condition_mask: Bool[Array, " B"] | None = None,
    ) -> Float[Array, "B target packed"]:
        """The generator's velocity at the target tokens, float32.

        Args:
          params: the tree.
          x_t: packed noisy target.
          t: in [0, 1]; 1 is noise.
          context: from `context`.
          mask: False on padded text.
          grid: (rows, columns) of the packed target.
          latents: of the condition pictures, in their order.
          roles: SOURCE or REFERENCE for each of `latents`.
          condition_mask: False hides all condition tokens of a slot.
        """
        grids = np.array([grid, *((z.shape[1] // 2, z.shape[2] // 2) for z in latents)], np.int32)
        if roles is None or not latents:
            roles = jnp.zeros((x_t.shape[0], 0), jnp.int32)
        conditions = tuple(mmdit.pack(z) for z in latents)
        return self.velocity_of_tokens(
            params, x_t, t, context, mask, grids, conditions, roles, condition_mask
        )

    def velocity_of_tokens(
        self,
        params: Tree,
        x_t: Float[Array, "B target packed"],
        t: Float[Array, " B"],
        context: Float[Array, "B L J"],
        mask: Bool[Array, "B L"],
        grids: Int[Array | np.ndarray, "*B_or_none pictures 2"],
        conditions: tuple[Float[Array, "B _tokens packed"], ...],
        roles: Int[Array, "B n"],
        condition_mask: Bool[Array, " B"] | None = None,
    ) -> Float[Array, "B target packed"]:
        """`velocity` of pictures whose sizes are data; the result at padding is of no meaning.

        Args:
          params, t, context, mask, roles, condition_mask: as there.
          x_t: packed noisy target, with padding behind it.
          grids: (rows, columns) of the target and of the condition pictures in packed tokens, of
            all slots alike or of each. Tokens of a picture beyond its grid are padding.
          conditions: packed latents of the condition pictures, each with padding behind it.
        """
        law, tokens = self.config.law, tuple(x.shape[1] for x in (x_t, *conditions))
        shown = rotary.real_tokens(grids, tokens)
        if condition_mask is not None:
            is_target = jnp.arange(sum(tokens)) < tokens[0]
            shown = shown & (is_target | condition_mask[:, None])
        out = self._apply(
            "mmdit",
            params,
            jnp.concatenate([x_t, *conditions], axis=1),
            context,
            mask,
            t,
            rotary.padded_positions(law, grids, tokens, roles),
            rotary.text_positions_after(law, mask, grids),
            jnp.broadcast_to(shown, (x_t.shape[0], sum(tokens))),
            tokens[0],
        )
        return out[:, : tokens[0]].astype(jnp.float32)
