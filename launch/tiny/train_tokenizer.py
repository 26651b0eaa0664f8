"""Trains the tiny tokenizer: a small vocabulary inside Qwen2.5-VL's own tokenizer design.

    python launch/tiny/train_tokenizer.py [--corpus DIR] [--out DIR]

Byte-level BPE over NFC text with Qwen2's splitting rule and special tokens, learnt from the
captions of the corpus's training side and the wordings of the instructions. Writes a Hugging Face
folder that transformers opens as Qwen2Tokenizer. Takes a few seconds.
"""

from __future__ import annotations

from collections.abc import Iterator

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from qk_jax.base import cli, files
from qk_jax.base.errors import InputError, exits
from qk_jax.data import prompts, records, templates
from qk_jax.data.synthesis import corpus, tasks

WORDS = 2026  # + 22 special tokens = 2048, the vocabulary of the tiny models
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
ORDINARY = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip


def training_texts(folder: files.Path) -> Iterator[str]:
    """Captions with keywords, wordings of instructions, and the words of the chat format.

    Wordings and format stand in every prompt, so they are repeated until they merge well.
    """
    file = records.RecordFile(folder / "train.array_record")
    for number in range(len(file)):
        header = file[number].header
        yield header["caption"]
        yield " ".join(header.get("keywords", ()))
    for _ in range(20):
        yield from tasks.template_texts()
        yield from ("system", "user", "assistant", templates.SYSTEM, "Picture 1: ")


def train(texts: Iterator[str]) -> tokenizers.Tokenizer:
    """The tokenizer, its special tokens after the learnt ones as in Qwen's.

    Raises:
      InputError: the texts hold too little for the vocabulary.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(PRETOKENIZE_REGEX), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != WORDS:
        raise InputError(
            f"the texts give {tokenizer.get_vocab_size()} tokens, {WORDS} are needed; "
            "give a larger corpus"
        )
    added = [AddedToken(t, special=True, normalized=False) for t in SPECIAL]
    added += [AddedToken(t, special=False, normalized=False) for t in ORDINARY]
    tokenizer.add_tokens(added)
    return tokenizer


def save(tokenizer: tokenizers.Tokenizer, out: files.Path) -> None:
    """Writes the Hugging Face folder."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "unk_token": None,
        "chat_template": templates.chat_template(templates.PRESETS["query_kontext"]),
    }
    files.write_json(out / "tokenizer_config.json", config)


@exits
def main() -> None:
    """Reads the corpus, trains, writes, and opens what it wrote."""
    parser = cli.Parser(prog="launch/tiny/train_tokenizer.py", description=__doc__)
    folder, out = files.Path(corpus.EMBEDDED), files.Path(corpus.EMBEDDED).parent / "tiny/tokenizer"
    parser.add_argument("--corpus", type=files.Path, default=folder)
    parser.add_argument("--out", type=files.Path, default=out)
    args = parser.parse_args()
    save(train(training_texts(args.corpus)), args.out)
    tokenizer = prompts.load_tokenizer(args.out)
    print(f"{len(tokenizer)} tokens in {args.out}")


if __name__ == "__main__":
    main()
