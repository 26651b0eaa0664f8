"""Neural networks: Qwen2.5-VL, connector, MMDiT, VAE, LoRA and their composition."""
