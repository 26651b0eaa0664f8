"""The words of examples made from records, in English and in Chinese.

Gaps are those of `wordings`, and {scene}, the caption of a background.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from qk_jax.data.synthesis import wordings
from qk_jax.data.synthesis.wordings import with_article

_WHOLE = (
    "copy", "greyscale", "mirror", "upside down", "turn left", "turn right", "negative", "darker",
    "brighter", "red and blue", "tile", "zoom", "coarse", "blur", "tint",
)  # fmt: skip
_KEPT = (*_WHOLE, "move", "remove", "bigger", "smaller")
ENGLISH: dict[str, tuple[str, ...]] = {
    **{kind: wordings.WORDINGS[kind] for kind in _KEPT},
    "add": (
        "add {x} {where} of the picture",
        "put {x} {where} of the picture",
        "place {x} {where} of the picture",
        "{where} of the picture, add {x}",
    ),
    "add shown": (
        "add the {a} of picture 2 {where} of the picture",
        "put this {a} {where} of the picture",
        "insert the {a} from picture 2 {where} of the picture",
        "{where} of the picture, add the {a} of picture 2",
    ),
    "add beside": wordings.WORDINGS["add"],
    "placed": (
        "{scene}, with this {a} {where} of the picture",
        "show this {a} {where} of the picture; the scene: {scene}",
        "put the {a} of picture 1 {where} of the picture; the background: {scene}",
        "background: {scene}; the same {a} is {where} of the picture",
    ),
    "row of 2": (
        "{scene}, with the {a} on the left and the {b} on the right",
        "put the {a} and the {b} from left to right into this scene: {scene}",
        "background: {scene}; the {a} is to the left of the {b}",
        "the {b} to the right of the {a}; the scene: {scene}",
    ),
    "column of 2": (
        "{scene}, with the {a} at the top and the {b} at the bottom",
        "put the {a} and the {b} from top to bottom into this scene: {scene}",
        "background: {scene}; the {a} is above the {b}",
        "the {b} below the {a}; the scene: {scene}",
    ),
    "row of 3": (
        "{scene}, with the {a} on the left, the {b} in the middle and the {c} on the right",
        "put the {a}, the {b} and the {c} from left to right into this scene: {scene}",
        "background: {scene}; the {b} is between the {a} on the left and the {c} on the right",
        "the {a}, the {b} and the {c} side by side in this order; the scene: {scene}",
    ),
    "column of 3": (
        "{scene}, with the {a} at the top, the {b} in the middle and the {c} at the bottom",
        "put the {a}, the {b} and the {c} from top to bottom into this scene: {scene}",
        "background: {scene}; the {b} is between the {a} above and the {c} below",
        "the {a}, the {b} and the {c} from the top down; the scene: {scene}",
    ),
}
CHINESE: dict[str, tuple[str, ...]] = {
    "copy": ("复制这张图片", "原样画出这张图", "再画一张同样的图", "不作改动地给出这张图片"),
    "greyscale": ("把图片变成灰度图", "去掉所有颜色", "把图片转换成黑白的", "用灰色的深浅来表现"),
    "mirror": ("左右翻转图片", "水平翻转这张图", "把整张图的左右对调", "给出它的镜像"),
    "upside down": ("上下翻转图片", "垂直翻转这张图", "把整张图的上下对调"),
    "turn left": ("把图片逆时针旋转90度", "向左旋转90度", "把图片逆时针转四分之一圈"),
    "turn right": ("把图片顺时针旋转90度", "向右旋转90度", "把图片顺时针转四分之一圈"),
    "negative": ("反转颜色", "把图片变成负片", "把所有颜色换成相反的颜色"),
    "darker": ("把图片变暗", "降低亮度", "让画面暗一些", "减少光线"),
    "brighter": ("把图片变亮", "提高亮度", "让画面亮一些", "增加光线"),
    "red and blue": ("交换红色和蓝色", "把红色通道和蓝色通道对调", "红色变蓝色，蓝色变红色"),
    "tile": ("按两行两列平铺图片", "把图片重复成2x2的网格", "把图片缩小后重复四次"),
    "zoom": ("放大图片的中央", "把画面的中间放大两倍", "向图片中间拉近"),
    "coarse": ("把图片像素化", "把图片变成粗大的像素", "把图片变成方块马赛克"),
    "blur": ("把图片变模糊", "让图片失焦", "柔化图片"),
    "tint": ("把整张图片染成{colour}", "用{colour}的深浅来表现图片", "把图片改成{colour}调"),
    "add": ("在{where}添加{x}", "在{where}放上{x}", "往{where}加上{x}"),
    "add shown": ("把图2中的{a}加到{where}", "把这个{a}放到{where}", "在{where}添加图2中的{a}"),
    "add beside": ("在{a}的{beside}添加{x}", "在{a}的{beside}放上{x}", "往{a}的{beside}加上{x}"),
    "remove": ("去掉{a}", "删除{a}", "把{a}移除", "从图片中擦除{a}"),
    "move": ("把{a}移到{where}", "将{a}挪到{where}", "把{a}移动到{where}"),
    "bigger": ("把{a}放大", "让{a}变大", "把{a}放大一倍"),
    "smaller": ("把{a}缩小", "让{a}变小", "把{a}缩小一半"),
    "placed": (
        "{scene}，{where}是这个{a}",
        "以{scene}为背景，把这个{a}放在{where}",
        "把图1中的{a}放在{where}，背景：{scene}",
        "背景：{scene}；{where}是同一个{a}",
    ),
    "row of 2": (
        "{scene}，左边是{a}，右边是{b}",
        "以{scene}为背景，从左到右放上{a}和{b}",
        "背景：{scene}；{a}在{b}的左边",
        "把{b}放在{a}的右边，背景：{scene}",
    ),
    "column of 2": (
        "{scene}，上方是{a}，下方是{b}",
        "以{scene}为背景，从上到下放上{a}和{b}",
        "背景：{scene}；{a}在{b}的上方",
        "把{b}放在{a}的下方，背景：{scene}",
    ),
    "row of 3": (
        "{scene}，左边是{a}，中间是{b}，右边是{c}",
        "以{scene}为背景，从左到右放上{a}、{b}和{c}",
        "背景：{scene}；{b}在左边的{a}和右边的{c}之间",
    ),
    "column of 3": (
        "{scene}，上方是{a}，中间是{b}，下方是{c}",
        "以{scene}为背景，从上到下放上{a}、{b}和{c}",
        "背景：{scene}；{b}在上方的{a}和下方的{c}之间",
    ),
}
_COLOURS = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "purple": "紫色", "orange": "橙色",
    "yellow": "黄色", "pink": "粉色",
}  # fmt: skip
_WHERE = {
    "left": "画面左边", "right": "画面右边", "top": "画面上方", "bottom": "画面下方",
    "middle": "画面中间", "top left": "画面左上角", "top right": "画面右上角",
    "bottom left": "画面左下角", "bottom right": "画面右下角",
}  # fmt: skip
_BESIDE = {"left": "左边", "right": "右边", "top": "上方", "bottom": "下方"}
_ARTICLES = ("a ", "an ", "the ")


def is_chinese(text: str) -> bool:
    """Whether a text has Chinese characters."""
    return any("\u4e00" <= character <= "\u9fff" for character in text)


def language(wanted: str, rng: Random, captions: list[str]) -> str:
    """'en' or 'zh': the wanted one, or for 'both' that of the captions, by chance without any."""
    if wanted != "both":
        return wanted
    if not captions:
        return rng.choice(("en", "zh"))
    return "zh" if is_chinese(captions[0]) else "en"


def instruction(rng: Random, tongue: str, kind: str, gaps: Mapping[str, str]) -> str:
    """One of the wordings of a kind.

    Args:
      rng: by which it is drawn.
      tongue: 'en' or 'zh'.
      kind: a key of ENGLISH.
      gaps: captions `a`, `b`, `c`, `x` and `scene`; `colour`, `where` and `beside` by their English
        names.
    """
    if tongue == "zh":
        tables = {"colour": _COLOURS, "where": _WHERE, "beside": _BESIDE}
        filled = {gap: tables.get(gap, {}).get(text, text) for gap, text in gaps.items()}
        filled = {gap: text.rstrip(".。 ") for gap, text in filled.items()}
        return rng.choice(CHINESE[kind]).format(**filled)
    filled = {gap: phrase(text) if gap in "abcx" else text for gap, text in gaps.items()}
    if "x" in filled:
        filled["x"] = with_article(filled["x"])
    if "where" in gaps:
        filled |= {"where": wordings.WHERE[gaps["where"]], "to": wordings.TO[gaps["where"]]}
    if "beside" in gaps:
        filled["beside"] = wordings.BESIDE[gaps["beside"]]
    if "scene" in gaps:
        filled["scene"] = gaps["scene"].rstrip(". ")
    return rng.choice(ENGLISH[kind]).format(**filled)


def phrase(caption: str) -> str:
    """A caption without its article, so that another may come before it, and its full stop."""
    article = next((x for x in _ARTICLES if caption.lower().startswith(x)), "")
    return caption[len(article) :].rstrip(". ")
