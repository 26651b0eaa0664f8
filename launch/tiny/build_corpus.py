"""Builds the embedded corpus from two tars of captioned cut-outs.

    python launch/tiny/build_corpus.py --emoji emoji.tar --clipart clipart.tar \
        --out qk_jax/assets/corpus

Each tar holds `KEY.png` (RGBA) beside `KEY.json` (caption, keywords, ...). What comes out: cut-outs
with a longest side of at most 64 pixels, captions as short lower-case English phrases, one side of
the split for every subject, and a README with counts. The result depends on the tars alone.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
import tarfile
import unicodedata
from collections import Counter
from typing import NamedTuple

import common  # beside this file
import numpy as np
from PIL import Image

from qk_jax.base import cli, files
from qk_jax.base.errors import InputError, exits
from qk_jax.data.records import Entry, write_records
from qk_jax.pictures.decoding import over_white

LONGEST_SIDE = 64
VALIDATION_SHARE = 0.08
TONES_PER_BASE = 1
PER_CAPTION = 4  # clip art has long series of the same title
LIMIT_BYTES = 12_000_000

# Words of a caption that name a variant, not another subject: they do not keep two pictures apart
# when subjects are assigned to a side of the split.
VARIANT_WORDS = frozenset(
    "a an the of in on with and by at for to from i ii one two three another new old simple color "
    "colour crystal cartoon stylized symbol sign icon small big little black white red green blue "
    "yellow purple orange grey gray pink brown seagreen left right up down upper lower corner "
    "horizontal vertical man men woman women person people male female boy boys girl girls light "
    "medium medium-light medium-dark dark skin tone hair curly bald beard blond picture".split()
)
# Six bits a channel (white and black stay exact): no visible difference, two thirds of the bytes.
_LEVELS = [round(round(v * 63 / 255) * 255 / 63) for v in range(256)]
_LEFT_OUT = ("middle finger",)  # emoji nobody wants to meet in a sample
_IRREGULAR = {"men": "man", "women": "woman", "mice": "mouse", "leaves": "leaf", "knives": "knife"}


class Picture(NamedTuple):
    """One candidate: cleaned caption, the split's subject key, and the cut-out."""

    key: str
    caption: str
    keywords: list[str]
    group: str
    subject: str
    source: str
    license: str
    image: Image.Image


def read_tar(path: str) -> dict[str, tuple[dict, bytes]]:
    """All (json, png) pairs of a tar by key.

    Raises:
      InputError: the tar is missing or damaged.
    """
    parts: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isfile():
                    key, _, suffix = member.name.rpartition(".")
                    parts.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"cannot read {path} ({error}); give the whole tar") from None
    whole = {key: part for key, part in parts.items() if {"json", "png"} <= part.keys()}
    return {key: (json.loads(part["json"]), part["png"]) for key, part in sorted(whole.items())}


def plain(text: str) -> str:
    """Lower case, ASCII, no brackets, quotes, digits after a hash, or doubled blanks."""
    text = unicodedata.normalize("NFKD", text.replace("\u2019", "'"))
    text = text.encode("ascii", "ignore").decode()
    text = re.sub(r"&\w+;|&#\d+;", " ", text.lower())
    text = re.sub(r"\([^)]*\)|#\s*\d+|\.svg\b", " ", text)
    text = re.sub(r"[^a-z0-9' ,:!?*#-]+", " ", text)
    return re.sub(r"\s+", " ", re.sub(r"\s+,", ",", text)).strip(" ,:-'")


def emoji_caption(name: str, group: str) -> str:
    """'waving hand: dark skin tone' -> 'waving hand with dark skin tone', and so on."""
    head, colon, tail = plain(name).partition(": ")
    if not colon:
        return head
    if head == "flag":
        return f"flag of {tail}"
    if head == "keycap":
        return f"keycap {tail}"
    *most, last = tail.split(", ")
    tail = f"{', '.join(most)} and {last}" if most else last
    return f"{head} {'of' if head in ('family', 'kiss') else 'with'} {tail}"


def clipart_caption(title: str, lexicon: frozenset[str], dropped: frozenset[str]) -> str | None:
    """The cleaned title, or None when it is no English phrase (unknown or foreign words, names)."""
    text = re.sub(r"[_\-/.,:;!]+", " ", re.sub(r"\bb\s*(and|&amp;|&)\s*w\b", "", plain(title)))
    text = re.sub(r"\b\d+\b|\b(bw|aj|svg|openclipart|pattern\w*)\b", " ", text)
    text = re.sub(r"'s?\b", "", text)
    words = text.split()
    if not words or len(words) > 7 or " ".join(words) in dropped:
        return None
    if all(len(word) == 1 for word in words):
        return None
    if not all(word in lexicon or stem(word) in lexicon for word in words):
        return None
    words = words[1:] if words[0] in ("a", "an", "the") else words
    if words[1:] and " ".join(words).endswith((" body part", " clothing")):
        words = words[:-1] if words[-1] == "clothing" else words[:-2]
    return " ".join(words)


def stem(word: str) -> str:
    """A plural's singular, as far as the split needs it."""
    word = _IRREGULAR.get(word, word)
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    return word


def subject_of(caption: str) -> str:
    """What the picture is of: the caption's words without variants, singular and in order."""
    words = re.findall(r"[a-z0-9*#]+(?:-[a-z]+)*", caption)
    kept = [stem(word) for word in words if word not in VARIANT_WORDS]
    return " ".join(sorted(kept)) or " ".join(words)


def cut_out(png: bytes) -> Image.Image | None:
    """The visible part, longest side at most LONGEST_SIDE; None when blank on white.

    Pillow resizes RGBA with premultiplied alpha, so no colour bleeds in from transparent pixels.
    """
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    scale = LONGEST_SIDE / max(image.size)
    if scale < 1:
        size = tuple(max(1, round(side * scale)) for side in image.size)
        image = image.resize(size, Image.Resampling.LANCZOS)
    if min(image.size) < 8:
        return None
    image = image.point(_LEVELS * 4)
    seen = np.abs(np.asarray(over_white(image), np.int16) - 255).max(-1) > 24
    return image if seen.mean() > 0.03 else None


def emoji_pictures(path: str) -> list[Picture]:
    """Emoji: every base without tone, and TONES_PER_BASE single tones chosen by a hash."""
    plain_keys, by_base = [], {}
    tar = read_tar(path)
    for key, (meta, _) in tar.items():
        if not meta["skin_tones"]:
            plain_keys.append(key)
        elif len(meta["skin_tones"]) == 1:
            by_base.setdefault(meta["base"], []).append(key)
    toned = [sorted(by_base[base], key=_hash)[:TONES_PER_BASE] for base in sorted(by_base)]
    pictures = []
    for key in itertools.chain(plain_keys, *toned):
        meta, png = tar[key]
        image, caption = cut_out(png), emoji_caption(meta["caption"], meta["group"])
        named = re.search("[a-z]", caption) and not caption.startswith(_LEFT_OUT)
        if image is not None and named:
            group = meta["group"].lower()
            pictures.append(picture(f"emoji/{key}", caption, meta["keywords"], group, meta, image))
    return pictures


def clipart_pictures(path: str, emoji_words: frozenset[str]) -> list[Picture]:
    """Clip art whose title is a short English phrase."""
    words = json.loads((common.HERE / "clipart_words.json").read_text())
    lexicon = (emoji_words | frozenset(words["english"])) - frozenset(words["not_english"])
    dropped = frozenset(words["dropped_captions"])
    counts: Counter[str] = Counter()
    pictures = []
    for key, (meta, png) in read_tar(path).items():
        if not isinstance(meta.get("caption"), str):
            continue
        caption = clipart_caption(meta["caption"], lexicon, dropped)
        image = cut_out(png) if caption else None
        if image is not None and counts[caption] < PER_CAPTION:
            counts[caption] += 1
            keywords = [plain(str(word)) for word in meta.get("keywords") or []]
            keywords = [word for word in keywords if set(word.split()) <= lexicon]
            pictures.append(picture(f"clipart/{key}", caption, keywords, "clip art", meta, image))
    return pictures


def picture(
    key: str, caption: str, keywords: list[str], group: str, meta: dict, image: Image.Image
) -> Picture:
    source = meta["source"], meta["license"]
    return Picture(key, caption, keywords, group, subject_of(caption), *source, image)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def distinct(pictures: list[Picture]) -> list[Picture]:
    """Without near-duplicates: mean difference on white under 1 level (same subject: under 8)."""
    small = np.stack([_thumbnail(picture.image) for picture in pictures])
    subjects = np.unique([picture.subject for picture in pictures], return_inverse=True)[1]
    toned = np.array(["skin tone" in picture.caption for picture in pictures])
    kept = np.zeros(len(pictures), bool)
    for i in range(len(pictures)):
        before = np.flatnonzero(kept)
        same = (subjects[before] == subjects[i]) & ~toned[before] & ~toned[i]
        gaps = np.abs(small[before] - small[i]).mean(1)
        kept[i] = not (gaps < np.where(same, 8.0, 1.0)).any()
    return [picture for picture, keep in zip(pictures, kept, strict=True) if keep]


def _thumbnail(image: Image.Image) -> np.ndarray:
    canvas = Image.new("RGBA", (LONGEST_SIDE, LONGEST_SIDE), "white")
    canvas.alpha_composite(image, tuple((LONGEST_SIDE - side) // 2 for side in image.size))
    small = canvas.convert("RGB").resize((16, 16), Image.Resampling.BOX)
    return np.asarray(small, np.float32).ravel()


def split(pictures: list[Picture]) -> dict[str, list[Picture]]:
    """Sides of the split by subject; a subject's hash alone decides, so additions move nothing."""
    sides: dict[str, list[Picture]] = {"train": [], "validation": []}
    for picture in sorted(pictures, key=lambda picture: _hash(picture.key)):
        held_out = _hash(picture.subject) % 10_000 < VALIDATION_SHARE * 10_000
        sides["validation" if held_out else "train"].append(picture)
    subjects = [{picture.subject for picture in side} for side in sides.values()]
    if subjects[0] & subjects[1]:
        raise AssertionError(f"subjects on both sides: {sorted(subjects[0] & subjects[1])}")
    return sides


def entry(picture: Picture) -> Entry:
    """The record of a picture, WebP (lossless)."""
    buffer = io.BytesIO()
    picture.image.save(buffer, "WEBP", lossless=True, quality=80, method=4)
    width, height = picture.image.size
    header = {name: value for name, value in picture._asdict().items() if name != "image"}
    header |= {"keywords": picture.keywords[:8], "width": width, "height": height}
    return Entry(header, {"image": buffer.getvalue()}, width, height)


def table_row(side: str, pictures: list[Picture]) -> str:
    """A line of the README's table."""
    kinds = Counter(picture.key.partition("/")[0] for picture in pictures)
    subjects, captions = ({getattr(p, n) for p in pictures} for n in ("subject", "caption"))
    counts = (len(pictures), len(subjects), kinds["emoji"], kinds["clipart"], len(captions))
    return f"| {side} | {' | '.join(f'{count:,}' for count in counts)} |"


@exits
def main() -> None:
    """Command line: see the module's docstring."""
    parser = cli.Parser(prog="launch/tiny/build_corpus.py", description=__doc__)
    parser.add_argument("--emoji", required=True, help="emoji.tar")
    parser.add_argument("--clipart", required=True, help="clipart.tar")
    parser.add_argument("--out", required=True, type=files.Path, help="folder of the corpus")
    args = parser.parse_args()
    emoji = emoji_pictures(args.emoji)
    texts = [t for p in emoji if p.group != "flags" for t in (p.caption, *p.keywords)]
    words = frozenset(re.findall("[a-z]+", " ".join(texts).lower()))
    sides = split(distinct(emoji + clipart_pictures(args.clipart, words)))
    for side, pictures in sides.items():
        write_records(args.out / f"{side}.array_record", map(entry, pictures))
    rows = "\n".join(table_row(side, pictures) for side, pictures in sides.items())
    text = common.card("corpus", side=LONGEST_SIDE, rows=rows, tones=TONES_PER_BASE)
    files.write_text(args.out / "README.md", text)
    size = sum(file.stat().length for file in args.out.iterdir())
    if size > LIMIT_BYTES:
        raise InputError(
            f"the corpus has {size:,} bytes, more than {LIMIT_BYTES:,}; lower "
            "LONGEST_SIDE or TONES_PER_BASE"
        )
    print(f"{rows}\n{size:,} bytes in {args.out}")


if __name__ == "__main__":
    main()
