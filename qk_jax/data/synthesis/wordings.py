"""The words of instructions: several wordings for each kind, with gaps that a task fills."""

from __future__ import annotations

# Gaps: {a}, {b}, {c} captions; {colour}; {ground} a background with its article; {where} 'on the
# left'; {to} 'to the left'; {beside} 'to the left of'; {x} a thing with its article.
WORDINGS: dict[str, tuple[str, ...]] = {
    # text to image
    "plain": ("{a}", "a picture of {a}", "draw {a}", "paint {a}", "an image of {a}"),
    "grounded": (
        "{a} on {ground}",
        "a picture of {a} on {ground}",
        "draw {a} on {ground}",
        "paint {a} on {ground}",
    ),
    # reconstruction
    "copy": (
        "reproduce this picture",
        "copy the picture",
        "paint the same picture again",
        "give back the picture unchanged",
        "draw exactly this picture",
    ),
    # transformation
    "greyscale": (
        "make it greyscale",
        "turn the picture into black and white",
        "remove all colour",
        "show it in shades of grey",
    ),
    "mirror": (
        "mirror the picture",
        "flip it horizontally",
        "swap left and right of the whole picture",
        "show its mirror image",
    ),
    "upside down": (
        "turn the picture upside down",
        "flip it vertically",
        "swap top and bottom of the whole picture",
        "show it upside down",
    ),
    "turn left": (
        "rotate it by 90 degrees to the left",
        "turn the picture a quarter to the left",
        "rotate it counterclockwise",
        "tip the picture onto its left side",
    ),
    "turn right": (
        "rotate it by 90 degrees to the right",
        "turn the picture a quarter to the right",
        "rotate it clockwise",
        "tip the picture onto its right side",
    ),
    "negative": (
        "invert the colours",
        "make it a negative",
        "show the picture in opposite colours",
        "invert it",
    ),
    "darker": (
        "make it darker",
        "darken the picture",
        "show it with less light",
        "reduce the brightness",
    ),
    "brighter": (
        "make it brighter",
        "brighten the picture",
        "show it with more light",
        "raise the brightness",
    ),
    "red and blue": (
        "exchange red and blue",
        "swap the red and blue channels",
        "make red things blue and blue things red",
        "trade red for blue",
    ),
    "tile": (
        "tile it two by two",
        "repeat the picture in a 2x2 grid",
        "show it four times",
        "make four small copies of the picture",
    ),
    "zoom": (
        "zoom in",
        "zoom into the middle",
        "enlarge the centre of the picture",
        "show the middle twice as large",
    ),
    "coarse": (
        "make it coarse pixels",
        "pixelate the picture",
        "turn it into a mosaic of squares",
        "show it with very few pixels",
    ),
    "blur": ("blur the picture", "make it blurry", "show it out of focus", "soften the picture"),
    "tint": (
        "show it in shades of {colour}",
        "tint the picture {colour}",
        "recolour everything in {colour}",
        "make the whole picture {colour}",
    ),
    "silhouette": (
        "show only the black silhouette",
        "make it a silhouette",
        "paint the subject black",
        "turn it into a shadow figure",
    ),
    # editing
    "background": (
        "set everything on {ground}",
        "replace the background with {ground}",
        "put it on {ground}",
        "give the picture {ground}",
    ),
    "recolour": (
        "make the {a} {colour}",
        "change the colour of the {a} to {colour}",
        "paint the {a} {colour}",
        "recolour the {a} in {colour}",
    ),
    "remove": (
        "remove the {a}",
        "take the {a} away",
        "delete the {a}",
        "erase the {a} from the picture",
    ),
    "add": (
        "add {x} {beside} the {a}",
        "put {x} {beside} the {a}",
        "place {x} {beside} the {a}",
        "{beside} the {a}, add {x}",
    ),
    "swap": (
        "swap the {a} and the {b}",
        "exchange the {a} and the {b}",
        "let the {a} and the {b} change places",
        "switch the places of the {a} and the {b}",
    ),
    "move": (
        "move the {a} {to}",
        "shift the {a} {to}",
        "bring the {a} {to}",
        "push the {a} {to}",
    ),
    "bigger": (
        "make the {a} bigger",
        "enlarge the {a}",
        "show the {a} twice as large",
        "let the {a} grow",
    ),
    "smaller": (
        "make the {a} smaller",
        "shrink the {a}",
        "show the {a} half as large",
        "reduce the {a} in size",
    ),
    "replace": (
        "replace the {a} with {x}",
        "turn the {a} into {x}",
        "put {x} in place of the {a}",
        "exchange the {a} for {x}",
    ),
    # customization
    "centre": (
        "this {a} on {ground}",
        "show this {a} on {ground}",
        "put the {a} of picture 1 on {ground}",
        "the same {a} on {ground}",
    ),
    "placed": (
        "this {a} {where} on {ground}",
        "show this {a} {where} on {ground}",
        "put the {a} of picture 1 {where} on {ground}",
        "on {ground}, the same {a} {where}",
    ),
    "small": (
        "this {a} very small {where} on {ground}",
        "show a small version of this {a} {where} on {ground}",
        "put the {a} of picture 1 small {where} on {ground}",
        "on {ground}, the same {a}, small, {where}",
    ),
    # composition
    "row of 2": (
        "the {a} and the {b} from left to right on {ground}",
        "the {a} on the left and the {b} on the right, on {ground}",
        "put the {a} to the left of the {b} on {ground}",
        "the {b} to the right of the {a} on {ground}",
    ),
    "column of 2": (
        "the {a} above the {b} on {ground}",
        "the {a} at the top and the {b} at the bottom, on {ground}",
        "put the {b} below the {a} on {ground}",
        "the {a} and the {b} from top to bottom on {ground}",
    ),
    "row of 3": (
        "the {a}, the {b} and the {c} from left to right on {ground}",
        "the {a} on the left, the {b} in the middle, the {c} on the right, on {ground}",
        "put the {a}, the {b} and the {c} side by side in this order on {ground}",
        "on {ground}: the {b} between the {a} on the left and the {c} on the right",
    ),
    "column of 3": (
        "the {a}, the {b} and the {c} from top to bottom on {ground}",
        "the {a} at the top, the {b} in the middle, the {c} at the bottom, on {ground}",
        "stack the {a}, the {b} and the {c} from the top down on {ground}",
        "on {ground}: the {b} between the {a} above and the {c} below",
    ),
}

BESIDE = {"left": "to the left of", "right": "to the right of", "top": "above", "bottom": "below"}
WHERE = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
    "top left": "in the top left corner",
    "top right": "in the top right corner",
    "bottom left": "in the bottom left corner",
    "bottom right": "in the bottom right corner",
}
TO = {
    "left": "to the left",
    "right": "to the right",
    "top": "to the top",
    "bottom": "to the bottom",
    "middle": "to the middle",
    "top left": "to the top left corner",
    "top right": "to the top right corner",
    "bottom left": "to the bottom left corner",
    "bottom right": "to the bottom right corner",
}


def with_article(phrase: str) -> str:
    """'a red circle', 'an orange background'; a plural stays alone."""
    head = phrase.split(" of ")[0].split(" with ")[0]
    if head.endswith("s") and not head.endswith(("ss", "us")):
        return phrase
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


# Other words for colours in captions; the fruit of that name has the colour.
_NEAR = {
    "gold": "yellow", "golden": "yellow", "lime": "green", "rose": "pink", "violet": "purple",
    "gray": "grey",
}  # fmt: skip


def colours_in(caption: str) -> set[str]:
    """The colours that a caption names, as words of `scenes.COLOURS` where it has them."""
    words = caption.replace("-", " ").replace(",", " ").split()
    return {_NEAR.get(word, word) for word in words}


def alike(one: str, other: str) -> bool:
    """Whether a caption might name the thing of the other: 'apple' names a 'green apple' too.

    Of texts in a script without spaces one is looked for within the other.
    """
    a, b = one.casefold(), other.casefold()
    if not (a.isascii() and b.isascii()) and (a in b or b in a):
        return True
    words, others = set(a.split()), set(b.split())
    return words <= others or others <= words
