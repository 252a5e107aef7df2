"""Photographs to network inputs: decode, orient, resize, crop, normalise; and the inverse for display.

Pixels and views are always display-ready: RGB (or one grey channel), top row first. The channel order and
the layout of the network appear in `normalise` and vanish in `denormalise`, nowhere else.
"""

from __future__ import annotations

import io
import math
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import DTypeLike, NDArray
from PIL import ExifTags, Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from .spec import CHOICES, ModelSpec

Array = NDArray[Any]


class ImageRefused(Exception):
    """One image cannot be explained; a row of the results with a status, never the end of a run.

    `status` is the word stored in that row. Decoding gives `empty`, `truncated`, `not_an_image`,
    `unsupported_mode`, `too_large` and `too_small`; reading the file (`engine.jobs.sources.read`) gives
    `missing`, `io_error` and `changed`. `reason` is one line for people.
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(status, reason)
        self.status = status
        self.reason = " ".join(reason.split())

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}"


# The plugin classes are called directly: Image.open would bring its global pixel limit, which warns where we
# refuse and refuses where a caller has raised our limit, and the parsers of formats that are not allowed here.
_FORMATS: tuple[tuple[re.Pattern[bytes], Callable[[io.BytesIO], ImageFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), WebPImageFile),
    (re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL), BmpImageFile),
    (re.compile(rb"GIF8[79]a"), GifImageFile),
    (re.compile(rb"II\x2a\0|MM\0\x2a|II\x2b\0|MM\0\x2b"), TiffImageFile),
)

_UNSUPPORTED = re.compile(r"unsupported|not supported|cannot handle|unknown pixel mode|unknown data organization", re.I)

# EXIF orientation -> the pixels turned upright; 1 and anything unknown leave them alone.
_UPRIGHT: dict[object, Callable[[Array], Array]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}

_JPEG_COLORSPACE = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}

# Above this many pixels the resized photograph is not made in full, only the part that the crop keeps: a
# 1x20000 strip would need gigabytes. Pillow then rounds its weights elsewhere: a grey level or two.
_MAX_RESIZED = 1 << 24


def decode(
    data: bytes, *, exif: str = "apply", color: str = "RGB", max_pixels: int = 64_000_000, min_side: int = 1
) -> Array:
    """The pixels of an encoded JPEG, PNG, WEBP, BMP, GIF or TIFF image, as Pillow's `convert` gives them.

    The format is read from the content, the size from the header, before a decoder allocates anything. The
    first frame counts, alpha is dropped, 16-bit grey is scaled (not clipped) to 8 bits. A JPEG in which libjpeg
    notices damage is refused, although many decoders would show it; what no checksum guards can pass unnoticed.

    Args:
        data: the whole file.
        exif: "apply" turns the image upright, "ignore" leaves it as stored. Pillow turns TIFF in both cases.
        color: the spec's color. "L" gives one channel; "RGB" and "BGR" both give RGB (see `normalise`).
        max_pixels: the largest accepted width x height.
        min_side: the smallest accepted width or height, in pixels.

    Returns:
        uint8 (h, w, 3), or (h, w, 1) for "L".

    Raises:
        ImageRefused: `empty`, `truncated` (incomplete or damaged), `not_an_image`, `unsupported_mode`,
            `too_large` or `too_small`.
    """
    if exif not in CHOICES["exif"] or color not in CHOICES["color"]:
        raise ValueError(f"exif {exif!r}, color {color!r}: use one of {CHOICES['exif']} and {CHOICES['color']}")
    if not data:
        raise ImageRefused("empty", "the file has no bytes")
    plugin = next((plugin for magic, plugin in _FORMATS if magic.match(data)), None)
    if plugin is None:
        raise ImageRefused("not_an_image", f"not JPEG, PNG, WEBP, BMP, GIF or TIFF (begins with {data[:8]!r})")

    def bound(width: int, height: int) -> None:
        if width * height > max_pixels:
            raise ImageRefused("too_large", f"{width}x{height} pixels, {max_pixels} allowed")
        if min(width, height) < min_side:
            raise ImageRefused("too_small", f"{width}x{height} pixels, a side of {min_side} needed")

    try:
        if plugin is WebPImageFile and (canvas := _webp_canvas(data)):
            bound(*canvas)
        image = plugin(io.BytesIO(data))
        bound(*image.size)
        pixels = _pixels(image, data, "L" if color == "L" else "RGB")
    except (ImageRefused, MemoryError):
        raise
    except Image.DecompressionBombError as err:
        raise ImageRefused("too_large", str(err)) from None
    except Exception as err:  # parsers of hostile files raise anything, and one file must not end a run
        reason = str(err) or type(err).__name__
        raise ImageRefused("unsupported_mode" if _UNSUPPORTED.search(reason) else "truncated", reason) from None
    if exif == "apply" and (upright := _UPRIGHT.get(_orientation(image))):
        pixels = upright(pixels)
    return np.ascontiguousarray(pixels)


def _webp_canvas(data: bytes) -> tuple[int, int] | None:
    """Width and height that a WEBP header claims; Pillow's constructor already allocates the canvas."""
    chunk, head = data[12:16], data[20:30]
    if chunk == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        width, height = struct.unpack("<HH", head[6:10])
        return width & 0x3FFF, height & 0x3FFF
    return None


def _pixels(image: ImageFile, data: bytes, mode: str) -> Array:
    """The decoded image in Pillow mode `mode`, uint8 (h, w, c), as stored."""
    if image.mode in ("I", "F"):
        raise ImageRefused(
            "unsupported_mode", f"{image.format} with 32-bit samples (mode {image.mode}) has no known range"
        )
    if isinstance(image, JpegImageFile) and (native := _simplejpeg(image, data)) is not None:
        if image.mode == mode:
            return native
        stored = Image.frombytes(image.mode, image.size, native.tobytes())
    elif image.mode.startswith("I;16"):
        stored = Image.fromarray(_eight_bits(image))
    else:
        image.load()
        # without it convert() drops alpha in silence; with it, it warns
        image.info.pop("transparency", None)
        stored = image
    converted = np.asarray(stored if stored.mode == mode else stored.convert(mode))
    return converted[..., None] if mode == "L" else converted


def _simplejpeg(image: JpegImageFile, data: bytes) -> Array | None:
    """The JPEG's pixels in the mode Pillow would give, bit for bit; None leaves the file to Pillow.

    libjpeg repairs damage and goes on with a warning, which Pillow drops and simplejpeg reports. A warning
    about the header is no damage to the pixels, and only the first warning is ever reported: Pillow decides.
    """
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if (width, height) != image.size:
        return None
    try:
        native: Array = simplejpeg.decode_jpeg(data, colorspace=_JPEG_COLORSPACE[image.mode])
    except ValueError as err:
        if str(err).startswith(("Corrupt", "Premature")):
            raise ImageRefused("truncated", str(err)) from None
        return None
    return 255 - native if image.mode == "CMYK" else native  # Adobe's polarity, which Pillow assumes


def _eight_bits(image: ImageFile) -> Array:
    """16-bit grey scaled to uint8 (h, w); Pillow's own conversion clips at 255."""
    if isinstance(image, TiffImageFile):
        tags = image.tag_v2
        if (tags.get(ExifTags.Base.BitsPerSample), tags.get(ExifTags.Base.PhotometricInterpretation)) != ((16,), 1):
            raise ImageRefused("unsupported_mode", "TIFF with deep grey that is not 16 bits, black at zero")
    scaled: Array = (np.asarray(image).astype(np.uint32) + 128) // 257
    return scaled.astype(np.uint8)


def _orientation(image: ImageFile) -> object:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # unreadable EXIF says nothing about the picture
        return None


def view(pixels: Array, spec: ModelSpec) -> tuple[Array, tuple[float, float, float, float]]:
    """What the model sees of a photograph: resized by Pillow and cropped as the spec says, as timm does.

    `center` scales the shorter side to floor(size / crop_pct), `squash` both sides, `border` the longer one;
    then the centre is cropped, and what lies outside the photograph gets the mean colour. Unlike timm, a
    `center` view that is not square uses the spec's interpolation too, not always bilinear.

    Args:
        pixels: uint8 (h, w, c), upright, as `decode` gives them for `spec.color`.

    Returns:
        the view, uint8 (H, W, c) in RGB or grey, and its box (x0, y0, x1, y1) in pixels of the photograph,
        which reaches outside of it where `border` padded.

    Raises:
        ValueError: `pixels` is not uint8 (h, w, c) with the spec's channel count.
    """
    channels, height, width = spec.input_size
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels or not pixels.size:
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}, not uint8 (h, w, {channels})")
    full_height, full_width = pixels.shape[:2]
    resized_height, resized_width = _resized(full_height, full_width, spec)
    top, left = _offset(resized_height, height), _offset(resized_width, width)
    box = (
        left * full_width / resized_width,
        top * full_height / resized_height,
        (left + width) * full_width / resized_width,
        (top + height) * full_height / resized_height,
    )
    photograph = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    interpolation = Image.Resampling[spec.interpolation.upper()]
    if resized_height * resized_width > _MAX_RESIZED:
        canvas = photograph.resize((width, height), interpolation, box=box)
    else:
        canvas = Image.new(photograph.mode, (width, height), mean_color(spec))
        canvas.paste(photograph.resize((resized_width, resized_height), interpolation), (-left, -top))
    return np.asarray(canvas).reshape(height, width, channels), box


def _resized(height: int, width: int, spec: ModelSpec) -> tuple[int, int]:
    """Height and width to which a photograph is scaled before the crop."""
    target_height, target_width = (math.floor(side / spec.crop_pct) for side in spec.input_size[1:])
    if spec.crop_mode == "squash":
        return target_height, target_width
    if spec.crop_mode == "center" and target_height == target_width:
        if height <= width:
            return target_height, int(target_height * width / height)
        return int(target_height * height / width), target_height
    ratios = height / target_height, width / target_width
    ratio = max(ratios) if spec.crop_mode == "border" else min(ratios)
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def _offset(resized: int, size: int) -> int:
    """Where a centred crop of `size` begins; negative where the image is padded. Rounding as in torchvision."""
    return round((resized - size) / 2) if resized >= size else -((size - resized) // 2)


def mean_color(spec: ModelSpec) -> int | tuple[int, ...]:
    """The colour that the network sees as zero: RGB, or one grey level."""
    color = tuple(min(255, max(0, round(255 * mean))) for mean in spec.mean)
    if spec.color == "L":
        return color[0]
    return color[::-1] if spec.color == "BGR" else color


def normalise(view: Array, spec: ModelSpec, dtype: DTypeLike) -> Array:
    """The network's input for one view, without the batch axis.

    Args:
        view: uint8 (H, W, c), RGB or grey, as `view` gives it.
        dtype: float32 or float16 give (view / 255 - mean) / std, computed in float32; uint8 gives the pixels.

    Returns:
        `dtype` (c, H, W) or (H, W, c) as `spec.layout` says, channels in the order of `spec.color`.

    Raises:
        ValueError: the view has another shape than the spec's input or is not uint8, or `dtype` is another one.
    """
    channels, height, width = spec.input_size
    kind = np.dtype(dtype)
    if view.dtype != np.uint8 or view.shape != (height, width, channels):
        raise ValueError(f"view is {view.dtype} {view.shape}, not uint8 {(height, width, channels)}")
    if kind not in (np.float32, np.float16, np.uint8):
        raise ValueError(f"input type {kind}: float32, float16 and uint8 are known")
    ordered = view[..., ::-1] if spec.color == "BGR" else view
    if kind == np.uint8:
        return np.ascontiguousarray(ordered.transpose(2, 0, 1) if spec.layout == "NCHW" else ordered)
    mean, std = _statistics(spec)
    table = ((np.arange(256, dtype=np.float32) / np.float32(255) - mean[:, None]) / std[:, None]).astype(kind)
    result = np.empty((channels, height, width) if spec.layout == "NCHW" else (height, width, channels), kind)
    planes = result if spec.layout == "NCHW" else result.transpose(2, 0, 1)
    for channel in range(channels):
        np.take(table[channel], ordered[..., channel], out=planes[channel], mode="clip")
    return result


def denormalise(array: Array, spec: ModelSpec) -> Array:
    """The picture that a network input shows: the inverse of `normalise`, clipped to 0..255.

    Args:
        array: one input without the batch axis, in `spec.layout` and `spec.color`; uint8 is taken as pixels.

    Returns:
        uint8 (H, W, c) in RGB or grey.

    Raises:
        ValueError: the array has another shape than the spec's input.
    """
    channels, height, width = spec.input_size
    expected = (channels, height, width) if spec.layout == "NCHW" else (height, width, channels)
    if array.shape != expected:
        raise ValueError(f"input is {array.shape}, not {expected}")
    pixels = array.transpose(1, 2, 0) if spec.layout == "NCHW" else array
    if pixels.dtype != np.uint8:
        mean, std = _statistics(spec)
        scaled = (pixels.astype(np.float32) * std + mean) * np.float32(255)
        pixels = np.nan_to_num(scaled).round().clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels[..., ::-1] if spec.color == "BGR" else pixels)


def _statistics(spec: ModelSpec) -> tuple[Array, Array]:
    return np.asarray(spec.mean, dtype=np.float32), np.asarray(spec.std, dtype=np.float32)
