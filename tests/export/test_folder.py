"""What an exported folder holds beside the pipeline's weights, and what export refuses."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qk_jax import painting
from qk_jax.base import files
from qk_jax.base.errors import InputError
from qk_jax.data import prompts
from qk_jax.export import verify
from qk_jax.export.folder import export_pipeline
from qk_jax.pictures.grids import grid_of, picture_tokens, vision_size
from qk_jax.pictures.roles import SOURCE
from qk_jax.weights import hub_configs, safetensors
from tests.painting import painters
from tests.weights import nano


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    export_pipeline(painters.loaded("stage3", revision="0123abc"), folder)
    return folder


def test_the_folder_says_what_it_is(folder):
    card = (folder / "README.md").read_text()
    tasks = painters.config("stage3").data.tasks
    for part in (
        "stage3, after 7 steps", f"composition ({tasks.composition:g})", "64x64 80x48 48x80",
        "git revision 0123abc", "corpus that qk_jax carries", "are merged into the weights",
        "from_pretrained(folder, custom_pipeline=folder", "in float32",
        "transformers>=4.57.0, diffusers>=0.37.0",
    ):  # fmt: skip
        assert part in card
    assert "load_lora_weights" not in card and "{" not in card
    for file in ("pipeline.py", "paint.py", "kontext/kontext.py"):
        assert "jax" not in (folder / file).read_text().lower()
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "kontext", "model_index.json", "paint.py", "pipeline.py", "processor",
        "scheduler", "text_encoder", "tokenizer", "transformer", "vae",
    ]  # fmt: skip
    index = files.read_json(folder / "model_index.json")
    assert "processor" not in index and index["text_encoder"][0] == "transformers"


def test_the_text_encoder_is_readable_by_transformers_4_and_5(folder):
    config = files.read_json(folder / "text_encoder" / "config.json")
    text, ours = config["text_config"], painters.config("stage3").model.vlm.text
    sections = list(ours.mrope_section)
    assert text["rope_theta"] == ours.rope_theta
    wanted = {"type": "mrope", "rope_type": "default", "mrope_section": sections}
    assert text["rope_scaling"] == wanted
    assert config["vision_config"]["model_type"] == "qwen2_5_vl_vision"
    assert config["dtype"] == "float32"
    for name in ("tokenizer", "processor"):  # where 4 expects a dictionary
        tokenizer = files.read_json(folder / name / "tokenizer_config.json")
        assert "extra_special_tokens" not in tokenizer
        assert "<|image_pad|>" in tokenizer["additional_special_tokens"]


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (80, 48)])
def test_the_processor_shows_pictures_as_the_training_does(folder, size):
    ours = painters.painter("stage3")
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder / "processor")
    seen = vision_size(*size, ours.config.vlm_pixels)
    for picture in (painters.picture(0, *size), painters.picture(1, *seen)):
        got = processor(Image.fromarray(picture), return_tensors="np")
        assert got["image_grid_thw"].tolist() == [[1, *grid_of(*seen)]]
        wanted = prompts.patches(picture, seen)
        np.testing.assert_allclose(got["pixel_values"], wanted, atol=1e-6)


def test_the_processor_bounds_a_picture_as_the_training_does(folder):
    ours = painters.painter("stage3")
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder / "processor")
    got = processor(Image.fromarray(painters.picture(0, 300, 400)), return_tensors="np")
    area = 14 * 14 * int(got["image_grid_thw"].prod())
    most = [math.prod(vision_size(*size, ours.config.vlm_pixels)) for size in ours.limits.sizes]
    assert area <= max(most)


def test_the_chat_template_is_that_of_the_training(folder):
    builder = painters.painter("stage3").prompts
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "processor")
    picture = {"type": "image"}
    content = [picture, picture, {"type": "text", "text": "both of them"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    grids = builder.grids([(64, 64), (48, 80)])
    for grid in grids:
        slots = "<|image_slot|>" * picture_tokens((grid,))
        text = text.replace("<|image_pad|>", slots, 1)
    ids = tokenizer.encode(text.replace("slot", "pad"), add_special_tokens=False)
    row = builder.build("both of them", [(64, 64), (48, 80)], (SOURCE, SOURCE))
    assert ids == row["input_ids"][row["attention_mask"]][: -builder.queries].tolist()
    with_system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    text = tokenizer.apply_chat_template(with_system, tokenize=False)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na")


def test_a_separate_adapter_is_a_file_and_the_card_says_so(folder, tmp_path):
    export_pipeline(painters.loaded("stage3"), tmp_path / "model", lora="separate")
    adapter = safetensors.TensorFolder(tmp_path / "model" / "pytorch_lora_weights.safetensors")
    rank = painters.config("stage3").lora.rank
    assert all(name.startswith("transformer.transformer_blocks.") for name in adapter.shapes)
    assert {s[0] for n, s in adapter.shapes.items() if n.endswith("lora_A.weight")} == {rank}
    card = (tmp_path / "model" / "README.md").read_text()
    assert "pipe.load_lora_weights(folder)" in card and "not the trained" in card
    for name in ("vae", "kontext"):
        file = f"{name}/diffusion_pytorch_model.safetensors"
        assert (folder / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("stage1", "stage1 trained its adapter on the text encoder"),
        ("stage2", "stage2 trained no adapter"),
    ],
)
def test_other_stages_have_no_separate_adapter(stage, message, tmp_path):
    with pytest.raises(InputError, match=message):
        export_pipeline(painters.loaded(stage), tmp_path / "model", lora="separate")
    assert not (tmp_path / "model").exists()
    export_pipeline(painters.loaded(stage), tmp_path / "model")
    word = {"stage1": "are merged into the weights", "stage2": "trained no adapter"}[stage]
    assert word in (tmp_path / "model" / "README.md").read_text()


def test_a_vae_of_videos_keeps_what_the_original_folder_has(tmp_path):
    kind, got = nano.KINDS["qwen_vae"], painters.loaded("stage2")
    values = {k: v for k, v in hub_configs.to_hf(kind.config).items() if not k.startswith("_")}
    original = kind.torch_class(**values)
    original.save_pretrained(tmp_path / "original")
    config, params = kind.read(tmp_path / "original")
    model = copy.copy(got.plan.model)
    model.config = dataclasses.replace(model.config, vae=config)
    for name, is_whole in (("original", True), ("gone", False)):
        run = got.plan.config.copy_and_resolve_references()
        run.init.vae = str(tmp_path / name)
        plan = dataclasses.replace(got.plan, model=model, config=run)
        ours = dataclasses.replace(got, plan=plan, params=got.params | {"vae": params})
        export_pipeline(ours, tmp_path / "model")
        copied = nano.load(kind, tmp_path / "model" / "vae").state_dict()
        for tensor, weight in original.state_dict().items():
            if not is_whole and "time_conv" in tensor:
                assert not copied[tensor].any()
            elif not is_whole and weight.ndim == 5:
                assert torch.equal(copied[tensor][:, :, -1], weight[:, :, -1])
            else:
                assert torch.equal(copied[tensor], weight), tensor
        word = "is whole" if is_whole else "good for pictures only"
        assert word in (tmp_path / "model" / "README.md").read_text()
        assert all(
            line.is_good
            for line in verify.tensors(painting.of_loaded(ours, batch=1), tmp_path / "model")
        )
