"""Pictures inside an HTML page, pixel for pixel."""

from __future__ import annotations

import base64
import html
import io

import numpy as np
from PIL import Image

SMALL = 192  # pixels; a shorter picture is enlarged without smoothing


def image(pixels: np.ndarray, alt: str) -> str:
    """An `img` element of uint8 [H, W, 3] that holds its picture; `alt` is escaped.

    Lossless, which WebP is in fewer bytes than PNG.
    """
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "WEBP", lossless=True, quality=50, method=2)
    text = base64.b64encode(data.getvalue()).decode()
    height, width = pixels.shape[:2]
    small = ' class="small"' if min(height, width) < SMALL else ""
    return (
        f'<img{small} width="{width}" height="{height}" loading="lazy" decoding="async" '
        f'alt="{html.escape(alt)}" src="data:image/webp;base64,{text}">'
    )
