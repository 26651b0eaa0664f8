"""The part of a Query-Kontext model that transformers and diffusers have no class for.

Exported pipelines carry this file as `kontext/kontext.py`; it needs torch and diffusers only.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class Kontext(ModelMixin, ConfigMixin):
    """Learnable queries for the text encoder, and the connector from it to the transformer.

    Args:
      num_queries: K, queries at the end of the text encoder's sequence.
      width: hidden size of the text encoder.
      features: `joint_attention_dim` of the transformer.
    """

    @register_to_config
    def __init__(self, num_queries: int, width: int, features: int):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(num_queries, width))
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, features)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """States of words and queries [B, L, width] -> context [B, L, features]."""
        return self.fc2(nn.functional.gelu(self.fc1(states), approximate="tanh"))
