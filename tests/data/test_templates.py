"""Prompt templates: what each part does to a sequence, and that runs keep theirs."""

import dataclasses

import numpy as np
import pytest

from qk_jax.base.errors import InputError
from qk_jax.data import prompts, templates
from qk_jax.experiment import config as config_lib
from qk_jax.pictures.roles import REFERENCE, SOURCE
from tests.painting.painters import TOKENIZER

SIZES = ((64, 64), (48, 80))
TEMPLATES = {
    "kept": templates.PromptTemplate(keep_pictures=True, keep_tail=True),
    "pictures": templates.PromptTemplate(keep_pictures=True, source="A much longer source: "),
    "tail": templates.PromptTemplate(
        keep_tail=True, system="Short.", system_pictures="A longer one."
    ),
    **templates.PRESETS,
}


def builder(template):
    return prompts.PromptBuilder(
        prompts.load_tokenizer(TOKENIZER), 12, 4, 112 * 112, template=template
    )


def words_of(builder, prompt):
    """(the whole conversation, the window's part of it) as text, a picture as one token."""
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    end = len(ids) - builder.queries
    whole = ids[:end][mask[:end]]
    end -= 0 if builder.template.keep_tail else builder.tail_tokens
    read = ids[end - len(prompt["text_mask"]) : end][prompt["text_mask"]]
    image = builder.tokenizer.decode([builder.image_token_id])

    def text(ids):
        repeated = (ids == builder.image_token_id) & (np.roll(ids, 1) == builder.image_token_id)
        return builder.tokenizer.decode(ids[~repeated]).replace(image, "*")

    return text(whole), text(read)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("roles", [(SOURCE, REFERENCE), (REFERENCE, REFERENCE)])
def test_the_window_is_what_the_template_keeps(name, roles):
    template = TEMPLATES[name]
    ours = builder(template)
    lengths = set()
    for shown in (True, False):
        prompt = ours.build("a blue kite", SIZES, roles, pictures=shown)
        lengths.add((len(prompt["input_ids"]), len(prompt["text_mask"])))
        pictures = [template.picture(n, role) for n, role in enumerate(roles, 1)] * shown
        pictures = "".join(pictures).replace("<|image_pad|>", "*")
        whole, read = words_of(ours, prompt)
        assert whole == f"{template.opening(shown)}{pictures}a blue kite{templates.TAIL}"
        kept = pictures if template.keep_pictures else ""
        assert read == kept + "a blue kite" + templates.TAIL * template.keep_tail
    assert lengths == {(len(prompt["input_ids"]), ours.window(SIZES))}
    other = ours.build("", SIZES, roles[::-1])
    assert lengths == {(len(other["input_ids"]), len(other["text_mask"]))}


def test_roles_are_told_apart_and_instructions_worded_by_kind():
    template = templates.PromptTemplate(
        text_to_image="paint {text}", editing="edit: {text}", references="with these: {text}"
    )
    ours = builder(template)
    for roles, words in (((), "paint x"), ((0, 1), "edit: x"), ((1, 1), "with these: x")):
        whole, read = words_of(ours, ours.build("x", SIZES[: len(roles)], roles))
        assert read == words and words in whole
    default = builder(templates.PRESETS["query_kontext"])
    texts = {words_of(default, default.build("x", SIZES[:1], (role,)))[0] for role in (0, 1)}
    assert len(texts) == 2


def test_braces_of_a_user_are_characters():
    whole, read = words_of(
        builder(TEMPLATES["kept"]), builder(TEMPLATES["kept"]).build("{number} {text}")
    )
    assert read.startswith("{number} {text}")


def test_a_template_without_the_instruction_is_refused():
    with pytest.raises(InputError, match="write {text}"):
        templates.PromptTemplate(editing="edit it")
    with pytest.raises(InputError, match="give one of query_kontext"):
        templates.preset("qwen")


def test_a_preset_by_name_and_a_run_that_names_none():
    config = config_lib.load(
        "configs/stage3.py:tiny", {"prompt": "qwen_image", "prompt.source": "S "}
    )
    assert config.prompt.keep_tail and config.prompt.source == "S "
    model = config_lib.model_config(config)
    assert model.keep_tail and model.picture_multiple == 32
    assert model.vision_grids([(64, 64)]) == ((10, 10),)  # 112 -> 128 -> 140
    old = config_lib.to_dict(config_lib.load("configs/stage3.py:tiny"))
    del old["prompt"]
    assert config_lib.to_dict(config_lib.from_dict(old))["prompt"] == dataclasses.asdict(
        templates.PRESETS["numbered"]
    )
