"""Models small enough to convert in a blink, with random weights, and their PyTorch classes."""

import dataclasses
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from qk_jax.base.trees import flatten as flat
from qk_jax.base.trees import unflatten
from qk_jax.models import mmdit, qwen_vl, vae
from qk_jax.models.qwen_text import TextConfig
from qk_jax.models.qwen_vision import VisionConfig
from qk_jax.weights import read, tables, write

VLM = qwen_vl.VLMConfig(
    text=TextConfig(
        vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, mrope_section=(1, 1, 2),
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    ),
    vision=VisionConfig(
        depth=2, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32,
        window_size=56, fullatt_block_indexes=(1,),
    ),
    image_token_id=50, video_token_id=51, vision_start_token_id=52, vision_end_token_id=53,
)  # fmt: skip
MMDIT = mmdit.MMDiTConfig(
    in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
KL = vae.AutoencoderKLConfig(
    block_out_channels=(8, 8, 16, 16), latent_channels=4, norm_num_groups=4, shift_factor=0.1
)
QWEN_VAE = vae.QwenImageVAEConfig(
    base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=(0.1, -0.2, 0.3, 0.0),
    latents_std=(1.1, 0.9, 2.0, 0.5),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kind:
    """One model: its part and config, and the class that loads it."""

    part: str
    config: Any
    torch_class: Any

    @property
    def shapes(self):
        return read.shapes(self.config)

    @property
    def table(self):
        return tables.of(self.config)

    def write(self, params, folder, *args, **kwargs):
        write.export_model(params, self.config, folder, *args, **kwargs)

    def read(self, folder, *args, **kwargs):
        return read.import_model(self.part, folder, *args, **kwargs)


def _vlm(config):
    return Kind("vlm", config, transformers.Qwen2_5_VLForConditionalGeneration)


def _vae(config):
    return Kind("vae", config, getattr(diffusers, vae.kind(config)))


KINDS = {
    "vlm": _vlm(VLM),
    "vlm_tied": _vlm(dataclasses.replace(VLM, tie_word_embeddings=True)),
    "mmdit": Kind("mmdit", MMDIT, diffusers.QwenImageTransformer2DModel),
    "kl": _vae(KL),
    "kl_plain": _vae(dataclasses.replace(KL, use_quant_conv=False, use_post_quant_conv=False)),
    "qwen_vae": _vae(QWEN_VAE),
}


def random_tree(shapes, seed=0):
    """Random float32 parameters: scales about one, matrices about variance-preserving."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for path, shape in shapes.items():
        noise = rng.standard_normal(shape).astype(np.float32)
        if path.endswith("scale"):
            leaves[path] = 1 + 0.2 * noise
        elif path.endswith(("kernel", "lora_a", "lora_b")):
            leaves[path] = noise / np.float32(np.sqrt(np.prod(shape[:-1][-3:])))
        else:
            leaves[path] = 0.2 * noise
    return unflatten(leaves)


def assert_same(tree, other):
    """Bit-equal leaves under the same names."""
    tree, other = flat(tree), flat(other)
    assert tree.keys() == other.keys()
    for path in tree:
        np.testing.assert_array_equal(tree[path], other[path], err_msg=path)


def load(kind, folder, dtype=torch.float32):
    """The PyTorch model of a folder; every tensor must be used and filled."""
    model, info = kind.torch_class.from_pretrained(folder, output_loading_info=True, dtype=dtype)
    assert not any(info.values()), info
    return model.eval()
