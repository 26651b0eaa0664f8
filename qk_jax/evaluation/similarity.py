"""How alike two pictures are: in pixels, contours and embeddings. Host code in numpy."""

from __future__ import annotations

import numpy as np

COARSE = 8  # side of the grid in which `coarse` compares pictures
BLUR = 5  # pixels of the box blur that makes edges of neighbouring pixels overlap


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of uint8 pictures [..., H, W, 3]: float64 [...].

    Equal pictures give 99 dB instead of infinity, so that means stay finite.
    """
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2, axis=(-3, -2, -1))
    return np.minimum(99.0, 10.0 * np.log10(255.0**2 / np.maximum(error, 1e-12)))


def coarse(pictures: np.ndarray) -> np.ndarray:
    """Colours of an 8 x 8 grid of box means: uint8 [N, H, W, 3] -> float64 [N, 192].

    Sides are cut to multiples of 8.
    """
    count, height, width, channels = pictures.shape
    rows, columns = height // COARSE, width // COARSE
    cut = pictures[:, : rows * COARSE, : columns * COARSE].astype(np.float64) / 255.0
    boxes = cut.reshape(count, COARSE, rows, COARSE, columns, channels)
    return boxes.mean(axis=(2, 4)).reshape(count, -1)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine similarity of every vector of a [N, D] with every one of b [M, D]: [N, M]."""
    unit = [x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (a, b)]
    return unit[0] @ unit[1].T


def ranks(painted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Rank (0 is best) of `truth[i]` among all of them, for `painted[i]`: int [N].

    Features [N, D] each, centred by the mean over their own set (what all pictures share, such as a
    white ground, tells nothing), compared by cosine. Equal similarities count against the truth.
    """
    likeness = cosine(painted - painted.mean(axis=0), truth - truth.mean(axis=0))
    own = np.diagonal(likeness)[:, None]
    return np.sum(likeness >= own, axis=1) - 1


def edges(pictures: np.ndarray) -> np.ndarray:
    """Where things end: blurred gradient magnitude of the grey value, zero mean and unit norm.

    uint8 [N, H, W, 3] -> float64 [N, H, W]; a picture of one colour gives zeros.
    """
    grey = pictures.astype(np.float64).mean(axis=-1) / 255.0
    down, right = np.gradient(grey, axis=(-2, -1))
    magnitude = np.hypot(down, right)
    for axis in (-2, -1):
        pad = [(0, 0)] * 3
        pad[axis] = (BLUR // 2, BLUR // 2)
        padded = np.pad(magnitude, pad)
        windows = np.lib.stride_tricks.sliding_window_view(padded, BLUR, axis=axis)
        magnitude = windows.mean(axis=-1)
    magnitude -= magnitude.mean(axis=(-2, -1), keepdims=True)
    norm = np.linalg.norm(magnitude, axis=(-2, -1), keepdims=True)
    return magnitude / np.maximum(norm, 1e-9) * (norm > 1e-9)


def border(picture: np.ndarray, width: int = 2) -> np.ndarray:
    """The pixels at most `width` from an edge of a picture [H, W, 3]: float64 [n, 3]."""
    inside = np.zeros(picture.shape[:2], bool)
    inside[width:-width, width:-width] = True
    return picture[~inside].astype(np.float64)


def layout_change(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """1 - correlation of the edge maps of pictures [N, H, W, 3] of one size: float64 [N].

    0 when every contour is where it was, about 1 when their positions are unrelated. Colours and
    textures without contours do not count, so this is not identity.
    """
    return 1.0 - np.sum(edges(before) * edges(after), axis=(-2, -1))


def displacement(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """How far `after` must be shifted to fit `before` best, in picture diagonals: float64 [N].

    The shift with the largest (circular) correlation of the edge maps; pictures [N, H, W, 3].
    """
    a, b = (np.fft.rfft2(edges(x)) for x in (before, after))
    height, width = before.shape[1:3]
    surface = np.fft.irfft2(np.conj(a) * b, s=(height, width)).reshape(len(before), -1)
    rows, columns = np.divmod(np.argmax(surface, axis=1), width)
    rows, columns = np.minimum(rows, height - rows), np.minimum(columns, width - columns)
    return np.hypot(rows, columns) / np.hypot(height, width)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of [N] values and its standard error (0 for a single value)."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), float(error)
