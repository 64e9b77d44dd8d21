"""Untrusted pictures in, RGB pictures out: what a file is, and how large, is known before a pixel is decoded."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from safecode_mllm.errors import ImageError

# A 50-megapixel camera picture is 150 MB once decoded; nothing a model is shown needs more.
MAX_PIXELS = 50_000_000
MAX_BYTES = 64 * 1024**2
# Processors scale the shorter side to a fixed length, so a 1 x 50000 picture would grow to gigabytes in there.
MAX_ASPECT_RATIO = 200

ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray

_URL = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.\-]*://|data:)")
_OPENERS: dict[str, type[ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
FORMATS = tuple(_OPENERS)
_TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH = 322, 323
_TIFF_STARTS = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")


def load_image(source: ImageSource) -> Image.Image:
    """Return any supported picture as upright RGB, transparency over white, first frame.

    Args:
        source: a path; the bytes of a PNG, JPEG, WEBP, GIF, BMP or TIFF file (told by content, not by name); a PIL
            image; or an array, uint8 in [0, 255] or floating in [0, 1], [H, W], [H, W, 3] or [H, W, 4].

    Returns:
        A PIL image of mode RGB that shares no memory with `source`.

    Raises:
        ImageError: no such file, a folder, an address on the network, an empty or truncated file, a format that is
            not allowed, more than 64 MiB, more than 50 megapixels, sides further apart than 200 : 1, or an array of
            another shape or range. A limit is checked before anything is decoded.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "image")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_bytes(bytes(source), "image")
    if isinstance(source, (str, os.PathLike)):
        return _from_path(os.fspath(source))
    raise ImageError(
        f"image is a {type(source).__name__}: pass a path, the bytes of a picture file, a PIL image or a numpy array"
    )


def _from_path(name: str) -> Image.Image:
    if _URL.match(name):
        raise ImageError(f"image={_shorten(name)!r} is an address: nothing is fetched; pass a local path or the bytes")
    path = Path(name)
    try:
        if path.is_dir():
            raise ImageError(f"image={name!r} is a folder: pass a picture file")
        if not path.exists():
            raise ImageError(f"image={name!r} does not exist: check the path")
        if not path.is_file():
            raise ImageError(f"image={name!r} is no regular file: pass a picture file")
        with path.open("rb") as file:
            # One byte over the limit is enough to know, also if the file grows while it is read.
            data = file.read(MAX_BYTES + 1)
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        raise ImageError(f"image={_shorten(name)!r} cannot be read: {error}") from error
    return _from_bytes(data, name)


def _from_bytes(data: bytes, name: str) -> Image.Image:
    if not data:
        raise ImageError(f"{_shorten(name)}: the picture file is empty")
    if len(data) > MAX_BYTES:
        raise ImageError(f"{_shorten(name)}: the file has more than {MAX_BYTES // 1024**2} MiB; pass a smaller one")
    kind = sniff_format(data)
    if kind is None:
        raise ImageError(f"{_shorten(name)}: the content is none of the allowed formats {', '.join(_OPENERS)}")
    if kind == "WEBP" and (size := _webp_size(data)):
        # PIL's decoder allocates the whole canvas when it is created, so this header is read by hand.
        check_size(*size, name)
    try:
        # The format's own class instead of Image.open: no other format is tried, and PIL's process-wide pixel limit,
        # which would warn between its limit and ours, stays out of it without being changed.
        image = _OPENERS[kind](io.BytesIO(data))
    except Exception as error:
        raise ImageError(f"{_shorten(name)}: the {kind} header cannot be read ({error}); is it damaged?") from error
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiff_tile(image, name)
    return _to_rgb(image, name)


def sniff_format(data: bytes) -> str | None:
    """Return the allowed format that the first bytes of a file show, or None."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"BM"):
        return "BMP"
    return "TIFF" if data.startswith(_TIFF_STARTS) else None


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    check_size(*image.size, name)
    try:
        image.load()
        return _over_white(_to_eight_bits(_upright(image), name))
    except ImageError:
        raise
    except Exception as error:
        text = f"{_shorten(name)}: the pixels cannot be decoded ({error}); the file is truncated or damaged"
        raise ImageError(text) from error


def check_size(width: int, height: int, name: str) -> None:
    """Raise ImageError, naming the picture, unless its sides are within the limits."""
    if width < 1 or height < 1:
        raise ImageError(f"{_shorten(name)}: {width} x {height} pixels; a picture needs at least one")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{_shorten(name)}: {width} x {height} pixels are more than {MAX_PIXELS // 10**6} megapixels; scale it down"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(f"{_shorten(name)}: {width} x {height} is thinner than {MAX_ASPECT_RATIO} : 1; crop it")


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of the canvas, or None if the header is cut off or unknown."""
    if len(data) < 30:
        return None

    def little(start: int, stop: int) -> int:
        return int.from_bytes(data[start:stop], "little")

    if data[12:16] == b"VP8X":
        return little(24, 27) + 1, little(27, 30) + 1
    if data[12:16] == b"VP8L":
        return (little(21, 25) & 0x3FFF) + 1, (little(21, 25) >> 14 & 0x3FFF) + 1
    return (little(26, 28) & 0x3FFF, little(28, 30) & 0x3FFF) if data[12:16] == b"VP8 " else None


def _check_tiff_tile(image: TiffImagePlugin.TiffImageFile, name: str) -> None:
    """A small picture may announce one huge tile, which is what the decoder would allocate."""
    width, height = image.tag_v2.get(_TIFF_TILE_WIDTH), image.tag_v2.get(_TIFF_TILE_LENGTH)
    if isinstance(width, int) and isinstance(height, int):
        check_size(width, height, name)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # Cameras and editors write broken EXIF blocks; the picture itself is sound.
        return image


def _to_eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Scale the deep grey modes, which PIL's own conversion would clip to white."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F":
        return Image.fromarray(_unit_to_bytes(values, name))
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ImageError(f"{_shorten(name)}: pixels beyond 16 bits cannot be shown; scale them to [0, 65535]")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    canvas = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(canvas, rgba).convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (3, 4):
        raise ImageError(f"image has shape {array.shape}: channels come last; transpose it to [H, W, C]")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageError(f"image has shape {array.shape}: pass [H, W], [H, W, 3] or [H, W, 4]")
    check_size(array.shape[1], array.shape[0], "image")
    if np.issubdtype(array.dtype, np.floating):
        array = _unit_to_bytes(array, "image")
    elif array.dtype != np.uint8:
        raise ImageError(f"image has dtype {array.dtype}: pass uint8 in [0, 255] or floats in [0, 1]")
    return _over_white(Image.fromarray(np.ascontiguousarray(array)))


def _unit_to_bytes(values: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    # The comparison is written so that NaN fails it.
    if not (values.min() >= 0 and values.max() <= 1):
        raise ImageError(
            f"{_shorten(name)}: floating pixels must be in [0, 1] without NaN, "
            f"found [{float(values.min()):g}, {float(values.max()):g}]; divide by 255 or pass uint8"
        )
    return (values.astype(np.float32) * 255).round().astype(np.uint8)


def _shorten(name: str) -> str:
    """Return a name fit for one line of an error: an address or a base64 text can be megabytes long."""
    return name if len(name) <= 120 else name[:117] + "..."
