"""How instruction and condition pictures are worded for the VLM: the templates, and their presets.

A conversation has a system turn, a user turn that begins with the condition pictures and ends with
the instruction, and the opening of the assistant's turn (`TAIL`), behind which the queries stand.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence

from qk_jax.base.errors import InputError
from qk_jax.pictures.roles import REFERENCE, SOURCE

SYSTEM = "You are a helpful assistant."
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
SHOWN = "<|vision_start|><|image_pad|><|vision_end|>"  # one picture


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """The words around an instruction and its pictures.

    Attributes:
      system: system prompt without condition pictures.
      system_pictures: system prompt with them.
      text_to_image, editing, references: the instruction, as `{text}`, in the user's turn: without
        pictures, with a source, and with references alone.
      source, reference: before a picture of that role; `{number}` counts all pictures from 1.
      keep_pictures: whether the generator also reads the VLM's states of the pictures and of the
        words before them.
      keep_tail: whether it also reads those of `TAIL`.
      picture_multiple: sides of a picture are first rounded to multiples of it, in pixels, before
        they are brought to the multiples of 28 that the VLM reads; 0 goes there in one step.

    Raises:
      InputError: an instruction without `{text}`.
    """

    system: str = SYSTEM
    system_pictures: str = SYSTEM
    text_to_image: str = "{text}"
    editing: str = "{text}"
    references: str = "{text}"
    source: str = "Picture {number} (source): "
    reference: str = "Picture {number} (reference): "
    keep_pictures: bool = False
    keep_tail: bool = False
    picture_multiple: int = 0

    def __post_init__(self) -> None:
        for name in ("text_to_image", "editing", "references"):
            if "{text}" not in getattr(self, name):
                raise InputError(
                    f"prompt.{name} is {getattr(self, name)!r}; write {{text}} where the "
                    "instruction belongs"
                )

    def instruction(self, text: str, roles: Sequence[int]) -> str:
        """The user's words as the VLM reads them, for condition pictures of these roles."""
        kind = self.text_to_image
        if roles:
            kind = self.editing if SOURCE in roles else self.references
        return kind.replace("{text}", text)

    def opening(self, pictures: bool) -> str:
        """All that comes before the first condition picture, or before the instruction."""
        system = self.system_pictures if pictures else self.system
        return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"

    def picture(self, number: int, role: int) -> str:
        """Condition picture `number`, from 1, with one `<|image_pad|>` for all of its tokens."""
        words = self.reference if role == REFERENCE else self.source
        return words.replace("{number}", str(number)) + SHOWN


_QWEN_IMAGE = PromptTemplate(
    system=(
        "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial"
        " relationships of the objects and background:"
    ),
    system_pictures=(
        "Describe the key features of the input image (color, shape, size, texture, objects,"
        " background), then explain how the user's text instruction should alter or modify the"
        " image. Generate a new image that meets the user's requirements while maintaining"
        " consistency with the original input where appropriate."
    ),
    source="Picture {number}: ",
    reference="Picture {number}: ",
    keep_pictures=True,
    keep_tail=True,
    picture_multiple=32,
)
# Templates by name. 'numbered' is that of checkpoints which name none; the two of Qwen-Image are
# what its public weights were trained with (QwenImagePipeline and QwenImageEditPlusPipeline of
# diffusers, whose prompts without pictures differ).
PRESETS = {
    "query_kontext": PromptTemplate(),
    "numbered": PromptTemplate(source="Picture {number}: ", reference="Picture {number}: "),
    "qwen_image": _QWEN_IMAGE,
    "qwen_image_edit_plus": dataclasses.replace(_QWEN_IMAGE, system=_QWEN_IMAGE.system_pictures),
}


def preset(name: str) -> PromptTemplate:
    """The template called `name`.

    Raises:
      InputError: there is none.
    """
    if name not in PRESETS:
        raise InputError(f"prompt {name!r} is unknown; give one of {', '.join(PRESETS)}")
    return PRESETS[name]


# A conversation as in training. A picture of a chat may have a role of its own; a source is one
# that has none.
_CHAT = r"""{%- set shown = namespace(pictures=0, any=false) -%}
{%- for message in messages -%}
{%- if message.content is not string -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{%- set shown.any = true -%}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{ '<|im_start|>system\n' + (WITH if shown.any else WITHOUT) + '<|im_end|>\n' }}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{%- set shown.pictures = shown.pictures + 1 -%}
{%- set words = REFERENCE if part.role == 'reference' else SOURCE -%}
{{ words.replace('{number}', shown.pictures ~ '') + SHOWN }}
{%- elif part.type == 'text' -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- endif -%}
"""


def chat_template(template: PromptTemplate) -> str:
    """The template as Jinja for transformers' chats; what it puts around the text is left out."""
    words = {
        "WITHOUT": template.system,
        "WITH": template.system_pictures,
        "SOURCE": template.source,
        "REFERENCE": template.reference,
        "SHOWN": SHOWN,
    }
    quoted = {name: json.dumps(text, ensure_ascii=False) for name, text in words.items()}
    return re.sub("|".join(quoted), lambda found: quoted[found[0]], _CHAT)
