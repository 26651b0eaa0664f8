"""What every field of a config means, in a line each, and what other projects call it.

`configs/` holds the values, this table the words: `train --help` prints both, and a wrong name is
answered from here. A new field gets its line here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

# Field or pattern -> its line. A capital word stands for any one name.
MEANINGS = {
    "stage": "name of the stage: stage1, stage2, stage3, highres",
    "size": "name of the size",
    "seed": "of everything random",
    "steps": "updates of the whole stage",
    "rules": "(regex, 'train' or 'freeze') over parameter names; the first that matches decides",
    "compilation_cache": "keep compiled programs in WORKDIR/compilation_cache",
    "programs.at_once": "programs that are compiled at once before the first step",
    "programs.folder": "folder of `bench precompile` whose programs are used where they fit",
    "distributed.timeout_s": "seconds that the hosts may take to find each other",
    "watchdog.floor_s": "no phase of a run is a hang before so many seconds; 0 watches nothing",
    "watchdog.factor": "times the median of its earlier durations that a phase may take",
    "watchdog.first_s": "seconds that the first phase of a kind may take",
    "sharding_limit": "largest share of shardable parameter bytes that may stay replicated",
    # ---- model ---------------------------------------------------------------------------------
    "model.num_queries": "K, kontext tokens",
    "model.max_text": "T, most text tokens; longer instructions are cut",
    "model.tail_tokens": "tokens between text and queries",
    "model.vlm_pixels": "area at which the VLM sees a picture",
    "model.query_std": "standard deviation of fresh queries",
    "model.query_noise": "standard deviation of noise on the queries, drawn anew at every step",
    "model.bidirectional_queries": "queries see each other, not only those before them",
    "model.vlm_layers": "other VLM layers that the connector reads, such as 7,14,21",
    "model.law.kind": "position law: 'shifted' (the paper's) or 'qwen_image'",
    "model.law.source_mode": "where a source is: 'reflect', 'reflect_minus_one' or 'translate'",
    "model.law.index_base": "first row and column index of a picture, 0 or 1",
    "model.condition_latents": "condition pictures also reach the generator as VAE tokens",
    "model.remat": "what a block keeps for its backward pass: '' all, 'full' nothing, or names",
    "model.vlm.image_token_id": "token that stands for a picture's patches",
    "model.vlm.video_token_id": "token that stands for a video's patches",
    "model.vlm.vision_start_token_id": "token before a picture",
    "model.vlm.vision_end_token_id": "token after a picture",
    "model.vlm.tie_word_embeddings": "whether the output layer is the embedding",
    "model.vlm.text.vocab_size": "rows of the embedding",
    "model.vlm.text.hidden_size": "D, width of the language model",
    "model.vlm.text.intermediate_size": "width of its MLPs",
    "model.vlm.text.num_hidden_layers": "its blocks",
    "model.vlm.text.num_attention_heads": "its heads",
    "model.vlm.text.num_key_value_heads": "heads of its keys and values",
    "model.vlm.text.rms_norm_eps": "epsilon of its norms",
    "model.vlm.text.rope_theta": "base of its rotary angles",
    "model.vlm.text.mrope_section": "rotary channels of (time, row, column)",
    "model.vlm.text.max_position_embeddings": "longest sequence",
    "model.vlm.text.bos_token_id": "first token of a text, as published",
    "model.vlm.text.eos_token_id": "last token of a text, as published",
    "model.vlm.vision.depth": "blocks of the vision tower",
    "model.vlm.vision.hidden_size": "its width",
    "model.vlm.vision.intermediate_size": "width of its MLPs",
    "model.vlm.vision.num_heads": "its heads",
    "model.vlm.vision.out_hidden_size": "width of what it gives, that of the language model",
    "model.vlm.vision.window_size": "side of an attention window, in pixels",
    "model.vlm.vision.fullatt_block_indexes": "blocks that attend to the whole picture",
    "model.vlm.vision.tokens_per_second": "time step of videos, as published",
    "model.mmdit.patch_size": "side of a packed patch, in latent pixels",
    "model.mmdit.in_channels": "channels of a packed token",
    "model.mmdit.out_channels": "latent channels",
    "model.mmdit.num_layers": "double-stream blocks of the generator",
    "model.mmdit.attention_head_dim": "channels of a head, the sum of axes_dims_rope",
    "model.mmdit.num_attention_heads": "heads; the width is heads x attention_head_dim",
    "model.mmdit.joint_attention_dim": "J, channels of the context",
    "model.mmdit.axes_dims_rope": "rotary channels of (frame, row, column)",
    "model.mmdit.zero_cond_t": "condition pictures are modulated at t = 0 (Qwen-Image-Edit-2511)",
    "model.vae.kind": "class of the autoencoder: AutoencoderKL or AutoencoderKLQwenImage",
    "model.vae.NAME": "architecture, named as in diffusers' config.json",
    "prompt.system": "system prompt of an example without condition pictures",
    "prompt.system_pictures": "system prompt of an example with condition pictures",
    "prompt.text_to_image": "the user's turn without pictures; {text} is the instruction",
    "prompt.editing": "the user's turn with a source",
    "prompt.references": "the user's turn with references alone",
    "prompt.source": "words before a source; {number} is the picture's",
    "prompt.reference": "words before a reference",
    "prompt.keep_pictures": "whether the generator reads the VLM's states of the pictures",
    "prompt.keep_tail": "whether the generator reads the end of the user's turn",
    "prompt.picture_multiple": "a picture's sides are first rounded to multiples of it; 0 is off",
    # ---- where parts come from -----------------------------------------------------------------
    "lora.pattern": "regex over module paths: what is adapted",
    "lora.rank": "rank of the adapter",
    "lora.alpha": "the adapter is multiplied by alpha / rank",
    "init.vlm": "stage 1: folder or Hub id of the VLM, or 'fresh' for random parameters",
    "init.vae": "stage 1: folder or Hub id of the autoencoder, or 'fresh'",
    "init.mmdit": "stage 2: folder or Hub id of the generator, or 'fresh'",
    "init.lora": "stage 3: an adapter of the generator to start from; '' draws a fresh one",
    "init.checkpoint": "folder of the stage before; '' is WORKDIR/STAGE_BEFORE",
    "init.ema": "start from the moving average of the stage before",
    "init.unfinished": "start although the stage before has not taken its last step",
    # ---- optimizer, time, loss, alignment ------------------------------------------------------
    "optimizer.lr": "peak learning rate",
    "optimizer.schedule": "'cosine' or 'constant', after the warm-up",
    "optimizer.lr_end": "last rate of the cosine, as a part of lr",
    "optimizer.warmup": "steps of linear rise",
    "optimizer.b1": "decay of Adam's first moment",
    "optimizer.b2": "decay of Adam's second moment",
    "optimizer.eps": "epsilon of Adam",
    "optimizer.weight_decay": "decoupled decay",
    "optimizer.clip": "most global norm of the gradient; 0 is off",
    "optimizer.max_skipped": "updates that are not finite, in a row, after which a run stops",
    "optimizer.accumulation": "micro-batches of a step; must divide the batch",
    "optimizer.ema": "decay of the moving average of the weights; 0 is off",
    "optimizer.offload": "keep moments and average in the host's memory between updates",
    "optimizer.decay": "(regex, factor) of the decay by parameter name; the first that matches",
    "optimizer.rates": "(regex, factor) of the rate by parameter name; the first that matches",
    "time.distribution": "how t is drawn: 'logit_normal' or 'uniform'",
    "time.mean": "mean of the normal",
    "time.std": "standard deviation of the normal",
    "time.base_shift": "resolution shift at base_tokens",
    "time.max_shift": "resolution shift at max_tokens, linear between",
    "time.base_tokens": "packed target tokens of base_shift",
    "time.max_tokens": "packed target tokens of max_shift",
    "loss.region_weight": "1 weighs the tokens that an edit changed as UniWorld-V1 does; 0 is off",
    "alignment.weight": "weight of aligning the kontext with the vision tower; 0 is off",
    "alignment.kind": "'cosine', or 'infonce' against the other targets of the batch",
    "alignment.temperature": "of infonce",
    # ---- data ----------------------------------------------------------------------------------
    "data.records": "DIR of records, tar:DIR or tfds:NAME; '' makes the tasks from data.corpus",
    "data.sources": "several sources: ({'path': P, 'tasks': T, 'weight': 1}, ..); see docs/data.md",
    "data.cache": "folder of `data encode`, whose rows stand for the frozen towers; '' runs them",
    "data.corpus": "folder of cut-outs from which the tasks are made; '' is the embedded one",
    "data.tfds_image": "feature of tfds:NAME with the picture",
    "data.tfds_text": "feature of tfds:NAME with the caption",
    "data.tokenizer": "folder or Hub id; '' is the VLM's, or that of the stage before",
    "data.batch": "targets of a step over all devices",
    "data.tokens": "most tokens of a step, for which batches of many pictures are halved; 0: none",
    "data.tasks.NAME": "weight of the task in the mixture",
    "data.sizes": "target sizes, width x height; a picture goes to the nearest in aspect ratio",
    "data.curriculum": "(step, sizes, sides of references) or (step, {task: weight}): before it",
    "data.reference_size": "a reference is shown whole at about the square of this side, in pixels",
    "data.reference_sizes_by_number": "its side for 1, 2, ... references, the last for more",
    "data.reference_ratios": "aspect ratios of references, and mirrors; () is the square alone",
    "data.text_tokens": "text tokens by number of condition pictures; () is model.max_text for all",
    "data.dropout.text": "probability that an example loses its text",
    "data.dropout.pictures": "probability that an example loses its pictures",
    "data.dropout.both": "probability that an example loses both",
    "data.mixed_batches": "a batch holds examples of several tasks, of one shape",
    "data.task_dropout.NAME": "(text, pictures, both) of one task; () is data.dropout",
    "data.max_groups": "shapes of one task; rarer ones are merged",
    "data.max_pixels": "a larger picture is a bad record; 0 for no bound",
    "data.max_bad_share": "bad records among those read, above which the run stops",
    "data.workers": "worker processes of each host; 0 for none",
    "data.threads": "threads in each of them",
    "data.prefetch": "batches made ahead",
    # ---- devices -------------------------------------------------------------------------------
    "dtype.compute": "of the forward and backward pass: float32, bfloat16 or float16",
    "dtype.frozen": "in which frozen parameters are held",
    "dtype.gradients": "in which devices sum gradients: float32, or as dtype.compute",
    "mesh.data": "devices of a slice along this axis, which shards the batch; one may be -1",
    "mesh.fsdp": "along this axis, which shards batch and parameters",
    "mesh.context": "along this axis, which shards the tokens",
    "mesh.tensor": "along this axis, which shards heads, MLPs and vocabulary",
    "slices.data": "slices that the axis data spans",
    "slices.fsdp": "slices that the axis fsdp spans",
    "sharding.TOWER.COLUMN.AXIS": "mesh axes over which this logical axis is sharded",
    "compiler.cpu": "options of XLA on CPUs, 'name=value'",
    "compiler.gpu": "the same on GPUs",
    "compiler.tpu": "the same on TPUs",
    "compiler.tpu_step": "besides, of the train step alone",
    # ---- what is kept and measured -------------------------------------------------------------
    "checkpoint.every": "steps between checkpoints; 0 keeps the last alone",
    "checkpoint.minutes": "minutes between checkpoints, besides those by steps; 0 is off",
    "checkpoint.keep": "newest checkpoints that are kept",
    "checkpoint.keep_every": "steps divisible by it are kept for good; 0 for none",
    "checkpoint.max_failures": "saves that fail in a row before the run stops",
    "checkpoint.grace_s": "seconds from SIGTERM to the end of a host; 0 where it never comes",
    "spike.zscore": "a loss that is more deviations above the usual is a spike; 0 is off",
    "spike.window": "last losses of each task that say what is usual",
    "spike.max_rollbacks": "spikes that a run goes back from before it stops",
    "evals.NAME.type": "which evaluator an entry is: 'loss' or 'sheets'",
    "evals.NAME.every": "steps between its runs; 0 is off",
    "evals.NAME.records": "validation examples of each task that are painted",
    "evals.NAME.steps": "sampler steps",
    "evals.NAME.guidance": "weight of the text; 1 is off",
    "evals.NAME.image_guidance": "weight of the pictures; 1 is off",
    "evals.NAME.seed": "of the noise",
    "validation.batches": "number of the fixed validation batches; at least one for each task",
    "validation.batch": "examples of each",
    "validation.max_groups": "shapes of one task",
    "validation.seed": "of their choice and noise",
    "log.every": "steps between lines of metrics",
    "log.t_bins": "equal parts of [0, 1] in t whose loss is logged",
    "profile.steps": "the first and the last step that are traced for a profiler; () for none",
    "wandb.project": "of Weights & Biases; '' is off",
    "wandb.name": "of the run there",
}  # fmt: skip

# What other projects call a field.
SYNONYMS = {
    "steps": "max_steps num_steps total_steps train_steps num_train_steps max_train_steps "
    "training_steps iterations num_iterations epochs num_epochs num_train_epochs",
    "seed": "random_seed rng_seed",
    "optimizer.lr": "learning_rate lr_rate peak_lr base_lr max_lr",
    "optimizer.lr_end": "min_lr lr_min final_lr end_lr",
    "optimizer.schedule": "lr_schedule lr_scheduler lr_scheduler_type scheduler",
    "optimizer.warmup": "warmup_steps lr_warmup_steps num_warmup_steps lr_warmup",
    "optimizer.b1": "beta1 adam_beta1 adam_b1",
    "optimizer.b2": "beta2 adam_beta2 adam_b2",
    "optimizer.eps": "epsilon adam_epsilon adam_eps",
    "optimizer.weight_decay": "wd adam_weight_decay l2",
    "optimizer.clip": "grad_clip gradient_clip grad_clip_norm clip_norm max_grad_norm clip_grad "
    "clip_grad_norm gradient_clipping gradient_clip_val max_norm",
    "optimizer.accumulation": "gradient_accumulation gradient_accumulation_steps grad_accum "
    "grad_accum_steps accumulate_grad_batches accum_steps micro_batches",
    "optimizer.ema": "ema_decay ema_rate use_ema ema_beta",
    "optimizer.offload": "cpu_offload offload_optimizer optimizer_offload",
    "time.distribution": "timestep_sampling weighting_scheme t_distribution",
    "time.mean": "logit_mean",
    "time.std": "logit_std",
    "time.base_shift": "shift timestep_shift flow_shift",
    "data.batch": "batch_size global_batch_size train_batch_size total_batch_size bs "
    "per_device_train_batch_size per_device_batch_size",
    "data.records": "dataset data_dir data_path dataset_name train_data_dir train_data",
    "data.tokenizer": "tokenizer_path tokenizer_name",
    "data.sizes": "resolution resolutions image_size img_size buckets",
    "data.dropout.text": "caption_dropout text_dropout cfg_dropout cond_dropout uncond_prob",
    "data.workers": "num_workers dataloader_num_workers",
    "model.max_text": "max_length max_seq_length max_sequence_length max_prompt_length",
    "model.num_queries": "num_query_tokens query_tokens num_kontext kontext_tokens",
    "model.remat": "gradient_checkpointing activation_checkpointing rematerialization remat_policy",
    "prompt.system": "system_prompt system_message",
    "lora.rank": "lora_rank lora_r lora_dim",
    "lora.alpha": "lora_alpha network_alpha",
    "lora.pattern": "target_modules lora_target_modules lora_modules",
    "rules": "freeze trainable trainable_params",
    "init.vlm": "pretrained model_name_or_path pretrained_model_name_or_path text_encoder",
    "init.mmdit": "transformer dit pretrained_transformer",
    "init.checkpoint": "load_from init_from resume resume_from resume_from_checkpoint",
    "dtype.compute": "dtype precision mixed_precision compute_dtype bf16 fp16",
    "mesh.tensor": "tp tensor_parallel tensor_parallelism",
    "mesh.fsdp": "fsdp_size zero dp_shard",
    "mesh.data": "dp data_parallel",
    "mesh.context": "cp sp sequence_parallel context_parallel",
    "checkpoint.every": "save_every save_steps save_interval checkpoint_every checkpointing_steps "
    "checkpoint_interval checkpoint_steps",
    "checkpoint.keep": "save_total_limit max_to_keep keep_checkpoints checkpoints_total_limit",
    "evals.loss.every": "eval_every eval_steps eval_interval validation_steps validation_every",
    "evals.sheets.every": "sample_every sample_steps samples_every",
    "evals.sheets.guidance": "guidance_scale cfg_scale cfg",
    "log.every": "log_every log_steps logging_steps log_interval",
    "wandb.project": "wandb_project",
}
_MEANT = {name: field for field, names in SYNONYMS.items() for name in names.split()}


def meaning(name: str) -> str:
    """The line of a field ('optimizer.lr'), '' where there is none."""
    if name in MEANINGS:
        return MEANINGS[name]
    for pattern, text in MEANINGS.items():
        parts = (r"\w+" if part.isupper() else re.escape(part) for part in pattern.split("."))
        if re.fullmatch(r"\.".join(parts), name):
            return text
    return ""


def nearest(name: str, known: Sequence[str]) -> str:
    """The known field that a wrong `name` most likely means: by meaning, then by spelling."""
    name = name.lower().replace("-", "_")
    last = name.rsplit(".", 1)[-1]
    for word in (name, name.replace(".", "_"), last):
        if _MEANT.get(word) in known:
            return _MEANT[word]
    meant = {word: field for word, field in _MEANT.items() if field in known}
    slips = difflib.get_close_matches(last, meant, n=1, cutoff=0.85)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.9) or [meant[s] for s in slips]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    near = near or [k for k in known if k.rsplit(".", 1)[-1] == last]
    if near:
        return near[0]
    ends = meant | {k.rsplit(".", 1)[-1]: k for k in known}
    return ends[difflib.get_close_matches(last, ends, n=1, cutoff=0.0)[0]]
