"""qk_jax from Python: pretrained parts as functions of arrays, trained models as painters.

    vlm = qk_jax.load_vlm("Qwen/Qwen2.5-VL-7B-Instruct")
    states = vlm(input_ids, attention_mask, pixel_values, image_grid_thw)
    mmdit = qk_jax.load_mmdit("Qwen/Qwen-Image")
    velocity = mmdit(latents, context, context_mask, timestep, img_shapes)
    vae = qk_jax.load_vae("Qwen/Qwen-Image")
    pictures = vae.decode(vae.encode(pictures))
    model = qk_jax.load("W/stage3")  # without an argument the tiny model that is shipped
    pictures = model.generate("a red kite", height=64, width=64)

Published models are in `published`, trained ones in `trained`; the package `qk_jax` imports either
only when one of its functions is first asked for.
"""
