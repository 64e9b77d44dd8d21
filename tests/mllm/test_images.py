"""Untrusted pictures: every format from its bytes, every kind of damage with its own error, limits before decoding."""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safecode_mllm import images
from safecode_mllm.errors import ImageError
from safecode_mllm.images import load_image, sniff_format

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
RED, BLUE, GREEN, YELLOW = (230, 20, 20), (20, 20, 230), (20, 200, 20), (230, 230, 20)


def quadrants(size: int = 64) -> Image.Image:
    """Four colours, so that every rotation and reflection shows."""
    half = size // 2
    image = Image.new("RGB", (size, size + 16), YELLOW)
    for colour, box in ((RED, (0, 0, half, half)), (BLUE, (half, 0, size, half)), (GREEN, (0, half, half, size))):
        image.paste(colour, box)
    return image


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noisy(width: int = 80, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def difference(image: Image.Image, expected: Image.Image) -> int:
    assert image.size == expected.size
    return int(np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).max())


def mean_difference(image: Image.Image, expected: Image.Image) -> float:
    """For lossy formats, whose error peaks at edges; any wrong orientation of the quadrants gives over 50."""
    assert image.size == expected.size
    return float(np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).mean())


def png_header(width: int, height: int) -> bytes:
    """A well-formed PNG whose pixels are missing: only a reader of headers can refuse it for its size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_from_bytes_and_from_a_misnamed_file(kind: str, tmp_path: Path) -> None:
    picture = quadrants()
    data = encode(picture, kind, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))
    tolerance = 4 if kind in ("JPEG", "WEBP", "GIF") else 0
    path = tmp_path / "picture.txt"
    path.write_bytes(data)
    assert sniff_format(data) == kind
    for source in (data, bytearray(data), memoryview(data), path, str(path)):
        image = load_image(source)
        assert (type(image), image.mode) == (Image.Image, "RGB")
        assert mean_difference(image, picture) <= tolerance


def test_lossless_webp_and_big_endian_tiff() -> None:
    picture = noisy()
    assert difference(load_image(encode(picture, "WEBP", lossless=True)), picture) == 0
    assert difference(load_image(encode(picture, "TIFF", compression="tiff_lzw")), picture) == 0
    assert difference(load_image(encode(picture, "TIFF", big_tiff=True)), picture) == 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation(kind: str, orientation: int) -> None:
    upright = quadrants()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}
    data = encode(stored, kind, exif=exif, **options.get(kind, {}))
    for source in (data, Image.open(io.BytesIO(data))):
        assert mean_difference(load_image(source), upright) <= (4 if kind == "JPEG" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_block_does_not_hide_the_picture() -> None:
    picture = quadrants()
    data = encode(picture, "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert mean_difference(load_image(data), picture) <= 4


def test_transparency_goes_over_white() -> None:
    rgba = np.zeros((4, 4, 4), dtype=np.uint8)
    rgba[:2] = (255, 0, 0, 128)
    expected = np.full((4, 4, 3), 255)
    expected[:2] = (255, 127, 127)
    for source in (encode(Image.fromarray(rgba), "PNG"), Image.fromarray(rgba), rgba, rgba / 255.0):
        assert np.abs(np.asarray(load_image(source), dtype=int) - expected).max() <= 1
    grey = Image.merge("LA", [Image.new("L", (4, 4), 0), Image.new("L", (4, 4), 64)])
    assert np.asarray(load_image(encode(grey, "PNG"))) == pytest.approx(191, abs=1)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    assert np.asarray(load_image(encode(palette, "PNG", transparency=1))).min() == 255
    assert tuple(np.asarray(load_image(encode(palette, "PNG")))[0, 0]) == (0, 0, 255)
    gif = load_image(encode(palette, "GIF", transparency=1))
    assert np.asarray(gif).min() == 255
    keyed = Image.new("RGB", (4, 4), (9, 9, 9))
    assert np.asarray(load_image(encode(keyed, "PNG", transparency=(9, 9, 9)))).min() == 255


def test_deep_grey_is_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    expected = np.arange(256).reshape(16, 16)
    for data in (encode(Image.fromarray(ramp), "PNG"), encode(Image.fromarray(ramp), "TIFF")):
        assert (np.asarray(load_image(data))[..., 0] == expected).all()
    deep = Image.fromarray((np.arange(256).reshape(16, 16) * 257).astype(np.int32))
    assert (np.asarray(load_image(deep))[..., 1] == expected).all()
    floats = Image.fromarray((np.arange(256).reshape(16, 16) / 255).astype(np.float32))
    assert (np.asarray(load_image(encode(floats, "TIFF")))[..., 2] == expected).all()
    rounded = Image.fromarray(np.array([[128, 129, 65407]], dtype=np.uint16))
    assert np.asarray(load_image(rounded))[0, :, 0].tolist() == [0, 1, 255]
    with pytest.raises(ImageError, match="16 bits"):
        load_image(Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)))
    with pytest.raises(ImageError, match=r"\[0, 1\]"):
        load_image(Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)))


def test_other_colour_modes() -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert difference(load_image(encode(cmyk, "TIFF")), Image.new("RGB", (8, 8), (255, 0, 0))) == 0
    assert difference(load_image(encode(cmyk, "JPEG")), Image.new("RGB", (8, 8), (255, 0, 0))) <= 40
    bits = Image.new("1", (8, 8), 1)
    assert np.asarray(load_image(encode(bits, "PNG"))).min() == 255


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_first_frame_of_several(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE)]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    assert difference(load_image(data), frames[0]) <= 3


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_raises(kind: str, share: float) -> None:
    data = encode(noisy(), kind)
    with pytest.raises(ImageError, match=r"truncated|damaged"):
        load_image(data[: max(12, int(len(data) * share))])


def test_a_truncated_picture_that_pil_opened_raises() -> None:
    data = encode(noisy(), "PNG")
    with pytest.raises(ImageError, match="truncated"):
        load_image(Image.open(io.BytesIO(data[: len(data) // 2])))


@pytest.mark.parametrize("size", [(10_000, 6_000), (12_000, 10_000), (30_000, 30_000), (65_535, 65_535)])
def test_too_many_pixels_are_refused_from_the_header_alone(size: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        # PIL's own limit lies at 89 megapixels for the warning and 179 for the error.
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="50 megapixels"):
            load_image(png_header(*size))


def _patched(kind: str, width: int, height: int) -> bytes:
    """A real small file whose header announces another size."""
    if kind == "WEBP":
        data = bytearray(encode(noisy().convert("RGBA"), "WEBP", lossless=True))
        assert data[12:16] == b"VP8L"
        data[21:25] = ((width - 1) | (height - 1) << 14).to_bytes(4, "little")
        return bytes(data)
    data = bytearray(encode(noisy(), kind))
    if kind == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif kind == "JPEG":
        start = data.index(b"\xff\xc0")
        data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    else:
        for tag, value in ((256, width), (257, height)):
            start = data.index(struct.pack("<HH", tag, 4)) if struct.pack("<HH", tag, 4) in data else -1
            start = start if start >= 0 else data.index(struct.pack("<HH", tag, 3))
            data[start : start + 12] = struct.pack("<HHII", tag, 4, 1, value)
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_header_bombs_of_the_other_formats(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="50 megapixels"):
            load_image(_patched(kind, 12_000, 11_000))


def test_an_extended_webp_header_is_read_before_its_canvas_is_allocated() -> None:
    data = bytearray(encode(noisy(), "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"))
    assert data[12:16] == b"VP8X"
    data[24:30] = (16_000 - 1).to_bytes(3, "little") * 2
    with pytest.raises(ImageError, match="16000 x 16000"):
        load_image(bytes(data))
    assert images._webp_size(encode(noisy(), "WEBP")) == (80, 60)


def test_a_small_tiff_with_a_huge_tile_is_refused() -> None:
    def tiff(tile: int) -> bytes:
        entries = [(256, 16), (257, 16), (258, 8), (259, 1), (262, 1), (322, tile), (323, tile), (324, 8), (325, 256)]
        directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
        count = struct.pack("<H", len(entries))
        return b"II*\0" + struct.pack("<I", 8 + 256) + bytes(range(256)) + count + directory + b"\0\0\0\0"

    assert np.asarray(load_image(tiff(16)))[..., 0].flatten().tolist() == list(range(256))
    with pytest.raises(ImageError, match="20000 x 20000"):
        load_image(tiff(20_000))


def test_pils_process_wide_limit_neither_changes_nor_interferes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Image.MAX_IMAGE_PIXELS
    load_image(encode(noisy(), "PNG"))
    with pytest.raises(ImageError):
        load_image(png_header(10_000, 6_000))
    assert before == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(encode(noisy(), "PNG")).size == (80, 60)
        assert load_image(encode(noisy(), "JPEG")).size == (80, 60)


def test_limits_hold_in_threads() -> None:
    good, bomb = encode(noisy(), "PNG"), png_header(10_000, 6_000)
    refused: list[bool] = []

    def work() -> None:
        for _ in range(20):
            load_image(good)
            try:
                load_image(bomb)
            except ImageError:
                refused.append(True)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 80


def test_needle_shaped_pictures_are_refused() -> None:
    with pytest.raises(ImageError, match="200 : 1"):
        load_image(Image.new("RGB", (2010, 10)))
    assert load_image(Image.new("RGB", (2000, 10))).size == (2000, 10)


def test_file_size_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert images.MAX_BYTES == 64 * 1024**2
    assert images.MAX_PIXELS == 50_000_000
    monkeypatch.setattr(images, "MAX_BYTES", 4 * 1024**2)
    path = tmp_path / "big.png"
    with path.open("wb") as file:
        file.write(encode(noisy(), "PNG"))
        file.truncate(images.MAX_BYTES + 1)
    for source in (path, path.read_bytes()):
        with pytest.raises(ImageError, match="4 MiB"):
            load_image(source)
    os.truncate(path, images.MAX_BYTES)
    assert load_image(path).size == (80, 60)


@pytest.mark.parametrize(
    "address",
    ["http://host/a.png", "https://host/a.png", "file:///etc/passwd", "ftp://host/a", "data:image/png;base64,AAAA"],
)
def test_addresses_are_not_fetched(address: str) -> None:
    with pytest.raises(ImageError, match="nothing is fetched"):
        load_image(address)


def test_paths_that_are_no_picture(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="folder"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match=r"missing\.png.*does not exist"):
        load_image(tmp_path / "missing.png")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(ImageError, match="no regular file"):
        load_image(fifo)
    with pytest.raises(ImageError, match="does not exist"):
        load_image("picture\0.png")
    (tmp_path / "empty.png").write_bytes(b"")
    for source in (tmp_path / "empty.png", b""):
        with pytest.raises(ImageError, match="empty"):
            load_image(source)


@pytest.mark.parametrize(
    "data",
    [
        b"not a picture", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7\n", b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"P6 1 1 255\n\0\0\0", b"RIFF\0\0\0\0AVI ", b"\0\0\1\0\1\0", b"\x89PNG", b"GIF88a",
    ],
)  # fmt: skip
def test_other_formats_are_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match="none of the allowed formats PNG, JPEG, WEBP, GIF, BMP, TIFF"):
        load_image(data)


@pytest.mark.parametrize("kind", FORMATS)
def test_garbage_behind_a_right_start_is_damage(kind: str) -> None:
    data = encode(noisy(), kind)[:12] + b"\xa5" * 500
    with pytest.raises(ImageError, match="damaged"):
        load_image(data)


def test_arrays() -> None:
    pixels = np.asarray(noisy())
    assert difference(load_image(pixels), noisy()) == 0
    assert difference(load_image(pixels / 255.0), noisy()) == 0
    assert difference(load_image((pixels / 255).astype(np.float16)), noisy()) <= 1
    assert difference(load_image(pixels[:, ::-1]), noisy().transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0
    assert (np.asarray(load_image(pixels[..., 0])) == pixels[..., :1]).all()


def test_the_picture_shares_no_memory_with_an_array_or_image() -> None:
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    picture = Image.new("RGB", (4, 4))
    loaded = load_image(pixels), load_image(picture)
    pixels[:] = 255
    picture.putpixel((0, 0), (255, 255, 255))
    assert all(np.asarray(image).max() == 0 for image in loaded)


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.zeros((3, 8, 9), np.uint8), "channels come last"),
        (np.zeros((8, 9, 2), np.uint8), r"\[H, W, 3\]"),
        (np.zeros((2, 8, 9, 3), np.uint8), r"\[H, W, 3\]"),
        (np.zeros(8, np.uint8), r"\[H, W, 3\]"),
        (np.zeros((0, 9, 3), np.uint8), "at least one"),
        (np.zeros((8, 9, 3), np.int64), "dtype int64"),
        (np.zeros((8, 9, 3), bool), "dtype bool"),
        (np.full((8, 9, 3), 255.0), "divide by 255"),
        (np.full((8, 9, 3), -0.1), r"\[0, 1\]"),
        (np.full((8, 9, 3), np.nan), "NaN"),
        (np.broadcast_to(np.uint8(0), (10_000, 6_000, 3)), "50 megapixels"),
    ],
)
def test_arrays_that_are_no_picture(array: Any, text: str) -> None:
    with pytest.raises(ImageError, match=text):
        load_image(array)


@pytest.mark.parametrize("source", [None, 3, ["a.png"], {"url": "a.png"}])
def test_other_types_are_refused(source: Any) -> None:
    with pytest.raises(ImageError, match=type(source).__name__):
        load_image(source)


def test_errors_stay_on_one_short_line() -> None:
    with pytest.raises(ImageError) as caught:
        load_image("https://host/" + "a" * 10_000)
    assert len(str(caught.value)) < 300
