"""The image zoo, decoding against Pillow, geometry against a literal reading of torchvision and timm."""

import io
import math
import pickle
import struct
import warnings
import zlib
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from heatmill.models import preprocess
from heatmill.models.preprocess import ImageRefused, decode, denormalise, normalise, view
from heatmill.models.spec import CHOICES, IMAGENET_MEAN, IMAGENET_STD, ModelSpec

SPEC = ModelSpec(input_size=(3, 224, 224), mean=IMAGENET_MEAN, std=IMAGENET_STD)


def photograph(height, width, channels=3, seed=0):
    """Smooth waves with noise: compresses like a photograph and has no symmetry. uint8 (h, w, c)."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([120 + 70 * np.sin(x / 9 + k) + 40 * np.cos(y / (7 + k)) for k in range(channels)], -1)
    return np.clip(waves + np.random.default_rng(seed).normal(0, 9, waves.shape), 0, 255).astype(np.uint8)


PIXELS = photograph(45, 61)
GREY = PIXELS[..., 0]
ALPHA = photograph(45, 61, 1, seed=3)[..., 0]
PALETTE = np.random.default_rng(4).integers(0, 256, (256, 3), dtype=np.uint8)


def encode(image, kind, **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def paletted(indices):
    image = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    image.putpalette(PALETTE.tobytes())
    return image


def by_pillow(data, mode="RGB"):
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image.convert(mode))
    return pixels if mode == "RGB" else pixels[..., None]


def status(data, **options):
    try:
        decode(data, **options)
    except ImageRefused as refusal:
        return refusal.status
    return "ok"


def grey_as_rgb(grey):
    return np.stack([grey] * 3, axis=-1)


def png(width, height, bits, color_type, rows):
    """A PNG by hand; `rows` is the bytes before compression, or None for a header with hardly any data."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows if rows is not None else bytes(64)))
        + chunk(b"IEND", b"")
    )


def tiff(width, height, bits, photometric, sample_format, raster):
    """A little-endian, uncompressed, one-strip grey TIFF by hand."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    tags += [(278, height), (279, len(raster)), (339, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return struct.pack("<2sHI", b"II", 42, 8 + len(raster)) + raster + directory


def jpeg_claiming(width, height):
    data = bytearray(encode(PIXELS, "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_claiming(side):
    """WEBP headers of the three kinds that claim side x side pixels, with nothing behind."""
    simple = b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", side, side)
    lossless = b"\x2f" + struct.pack("<I", (side - 1) | (side - 1) << 14)
    extended = bytes(4) + (side - 1).to_bytes(3, "little") * 2
    for name, body in ((b"VP8 ", simple), (b"VP8L", lossless), (b"VP8X", extended)):
        chunk = name + struct.pack("<I", len(body)) + body
        yield b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def damaged(data, seed=0):
    middle = len(data) // 2
    return data[:middle] + np.random.default_rng(seed).bytes(64) + data[middle + 64 :]


def exif(orientation):
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0) + bytes(4)


def adobe_transform(data, transform):
    """The CMYK JPEG relabelled: 0 CMYK, 2 YCCK, None without the Adobe marker."""
    start = data.index(b"\xff\xee\x00\x0eAdobe")
    if transform is None:
        return data[:start] + data[start + 16 :]
    return data[: start + 15] + bytes([transform]) + data[start + 16 :]


def frames(kind, **options):
    first, second = Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)
    return encode(first, kind, save_all=True, append_images=[second], **options)


JPEG = encode(PIXELS, "JPEG", quality=90)
BIG_JPEG = encode(photograph(375, 500), "JPEG", quality=90)
CMYK_JPEG = encode(Image.fromarray(PIXELS).convert("CMYK"), "JPEG")
DEEP = np.random.default_rng(5).integers(0, 65536, (45, 61), dtype=np.uint16)
DEEP[0, :4] = 0, 128, 32768, 65535
DEEP_AS_8 = np.array([[round(int(value) / 257) for value in row] for row in DEEP], np.uint8)

# name -> (file, the golden status or pixels)
ZOO = {
    "zero bytes": (b"", "empty"),
    "html named jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
    "text that begins as a BMP does": (b"BMW, a list of cars\n" * 9, "not_an_image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
    "zeros": (bytes(4096), "not_an_image"),
    "half the mark of a jpeg": (b"\xff\xd8" + bytes(99), "not_an_image"),
    "jpeg half": (BIG_JPEG[: len(BIG_JPEG) // 2], "truncated"),
    "jpeg without its last 2 bytes": (BIG_JPEG[:-2], "truncated"),
    "jpeg header only": (BIG_JPEG[:20], "truncated"),
    "jpeg with random bytes inside": (damaged(BIG_JPEG), "truncated"),
    "cmyk jpeg with random bytes inside": (damaged(encode(Image.new("CMYK", (200, 200), "red"), "JPEG")), "truncated"),
    "png half": (encode(PIXELS, "PNG")[:2000], "truncated"),
    "png with random bytes inside": (damaged(encode(PIXELS, "PNG")), "truncated"),
    "gif half": (encode(paletted(GREY), "GIF")[:1500], "truncated"),
    "bmp half": (encode(PIXELS, "BMP")[:4000], "truncated"),
    "webp half": (encode(PIXELS, "WEBP")[:300], "truncated"),
    "tiff half": (encode(PIXELS, "TIFF")[:4000], "truncated"),
    "webp of an unknown kind": (b"RIFF" + struct.pack("<I", 99) + b"WEBPVP8?" + bytes(99), "truncated"),
    "float tiff": (encode(Image.fromarray(np.float32(GREY) / 255), "TIFF"), "unsupported_mode"),
    "32-bit integer tiff": (encode(Image.fromarray(np.int32(GREY)), "TIFF"), "unsupported_mode"),
    "12-bit tiff": (tiff(2, 1, 12, 1, 1, b"\xff\xff\xff"), "unsupported_mode"),
    "16-bit tiff, white at zero": (tiff(1, 1, 16, 0, 1, b"\xff\xff"), "unsupported_mode"),
    "64-bit tiff": (tiff(1, 1, 64, 1, 3, bytes(8)), "unsupported_mode"),
    "jpeg with 12-bit samples": (JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"), "unsupported_mode"),
    "12000 x 12000 1-bit png": (png(12000, 12000, 1, 0, bytes(12000 * 1501)), "too_large"),
    "30000 x 30000 png": (png(30000, 30000, 8, 2, None), "too_large"),
    "jpeg claiming 65000 x 65000": (jpeg_claiming(65000, 65000), "too_large"),
    "gif claiming 65000 x 65000": (
        b"GIF89a" + struct.pack("<HH", 65000, 65000) + encode(paletted(GREY), "GIF")[10:],
        "too_large",
    ),
    "tiff claiming 65000 x 65000": (tiff(65000, 65000, 8, 1, 1, bytes(64)), "too_large"),
    **{f"webp claiming 9000 x 9000, {data[12:16]}": (data, "too_large") for data in webp_claiming(9000)},
    "jpeg": (JPEG, by_pillow(JPEG)),
    "progressive jpeg": (encode(PIXELS, "JPEG", quality=90, progressive=True), by_pillow(JPEG)),
    "jpeg with trailing junk": (JPEG + b"junk" * 999, by_pillow(JPEG)),
    "grey jpeg": (encode(GREY, "JPEG"), grey_as_rgb(by_pillow(encode(GREY, "JPEG"), "L")[..., 0])),
    "cmyk jpeg": (CMYK_JPEG, by_pillow(CMYK_JPEG)),
    "ycck jpeg": (adobe_transform(CMYK_JPEG, 2), by_pillow(adobe_transform(CMYK_JPEG, 2))),
    "cmyk jpeg without the Adobe marker": (adobe_transform(CMYK_JPEG, None), by_pillow(CMYK_JPEG)),
    "cmyk tiff": (encode(Image.fromarray(255 - grey_as_rgb(GREY)).convert("CMYK"), "TIFF"), 255 - grey_as_rgb(GREY)),
    "png": (encode(PIXELS, "PNG"), PIXELS),
    "png with trailing junk": (encode(PIXELS, "PNG") + b"junk", PIXELS),
    "grey png": (encode(GREY, "PNG"), grey_as_rgb(GREY)),
    "png with alpha": (encode(np.dstack([PIXELS, ALPHA]), "PNG"), PIXELS),
    "grey png with alpha": (encode(np.dstack([GREY, ALPHA]), "PNG"), grey_as_rgb(GREY)),
    "rgb png with a transparent colour": (encode(PIXELS, "PNG", transparency=tuple(PIXELS[0, 0].tolist())), PIXELS),
    "palette png": (encode(paletted(GREY), "PNG"), PALETTE[GREY]),
    "palette png with alpha": (encode(paletted(GREY), "PNG", transparency=bytes(range(256))), PALETTE[GREY]),
    "1-bit png": (
        encode(Image.fromarray(GREY > 120), "PNG"),
        grey_as_rgb(np.where(GREY > 120, 255, 0).astype(np.uint8)),
    ),
    "16-bit grey png": (encode(DEEP, "PNG"), grey_as_rgb(DEEP_AS_8)),
    "16-bit grey tiff": (encode(DEEP, "TIFF"), grey_as_rgb(DEEP_AS_8)),
    "16-bit grey tiff, big-endian": (encode(Image.fromarray(DEEP.astype(">u2")), "TIFF"), grey_as_rgb(DEEP_AS_8)),
    "16-bit rgb png": (png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 0, 32768, 65535)), np.uint8([[[0, 128, 255]]])),
    "animated gif": (frames("GIF"), by_pillow(encode(PIXELS, "GIF"))),
    "animated webp": (frames("WEBP", lossless=True), PIXELS),
    "animated png": (frames("PNG"), PIXELS),
    "two-page tiff": (frames("TIFF"), PIXELS),
    "bmp": (encode(PIXELS, "BMP"), PIXELS),
    "lossless webp": (encode(PIXELS, "WEBP", lossless=True), PIXELS),
    "tiff": (encode(PIXELS, "TIFF"), PIXELS),
    "compressed tiff": (encode(PIXELS, "TIFF", compression="tiff_lzw"), PIXELS),
    "1 x 1": (encode(PIXELS[:1, :1], "PNG"), PIXELS[:1, :1]),
    "1 x 20000": (encode(photograph(20000, 1), "PNG"), photograph(20000, 1)),
}


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    data, golden = ZOO[name]
    if isinstance(golden, str):
        with pytest.raises(ImageRefused) as refused:
            decode(data)
        assert refused.value.status == golden
        assert refused.value.reason
        assert "\n" not in str(refused.value)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = decode(data)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, golden)


@pytest.mark.parametrize("name", ZOO)
def test_zoo_as_grey(name):
    data, golden = ZOO[name]
    if isinstance(golden, str):
        with pytest.raises(ImageRefused, match=golden):
            decode(data, color="L")
        return
    grey = decode(data, color="L")
    assert grey.shape == (*golden.shape[:2], 1)
    if (golden == golden[..., :1]).all():
        np.testing.assert_array_equal(grey, golden[..., :1])
    else:
        luma = golden @ np.array([0.299, 0.587, 0.114])
        assert np.abs(grey[..., 0] - luma).max() <= 1


@pytest.mark.parametrize(
    "name", [name for name, (_, golden) in ZOO.items() if isinstance(golden, str) and golden == "too_large"]
)
def test_a_huge_image_is_refused_before_a_decoder_runs(name, monkeypatch):
    def decoder(*args, **kwargs):
        pytest.fail("a decoder was called")

    monkeypatch.setattr(preprocess.simplejpeg, "decode_jpeg", decoder)
    monkeypatch.setattr(ImageFile.ImageFile, "load", decoder)
    with pytest.raises(ImageRefused, match="too_large"):
        decode(ZOO[name][0])


def test_size_limits_are_inclusive():
    data = encode(PIXELS, "PNG")
    assert decode(data, max_pixels=45 * 61, min_side=45).shape == (45, 61, 3)
    with pytest.raises(ImageRefused, match="too_large: 61x45"):
        decode(data, max_pixels=45 * 61 - 1)
    with pytest.raises(ImageRefused, match="too_small: 61x45"):
        decode(data, min_side=46)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
def test_our_limit_and_not_the_hosts_pillow_limit_decides(kind, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(encode(PIXELS, kind)).shape == PIXELS.shape
    assert Image.MAX_IMAGE_PIXELS == 10


def test_decode_leaves_no_global_state():
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)
    for data, golden in ZOO.values():
        if not isinstance(golden, str):
            decode(data)
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before


@pytest.mark.parametrize("arguments", [{"exif": "maybe"}, {"color": "CMYK"}])
def test_decode_knows_its_settings(arguments):
    with pytest.raises(ValueError, match="use one of"):
        decode(JPEG, **arguments)


def test_a_refusal_travels_between_processes():
    refusal = pickle.loads(pickle.dumps(ImageRefused("truncated", "two\nlines")))
    assert (refusal.status, refusal.reason, str(refusal)) == ("truncated", "two lines", "truncated: two lines")


# --- JPEG: simplejpeg is Pillow, bit for bit ---------------------------------------------------------------


@pytest.mark.parametrize("size", [(375, 500), (373, 499), (8, 8), (17, 1), (1, 17)])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_equals_pillow(size, subsampling, progressive, monkeypatch):
    data = encode(photograph(*size), "JPEG", quality=85, subsampling=subsampling, progressive=progressive)
    expected = by_pillow(data)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("Pillow decoded"))
    np.testing.assert_array_equal(decode(data), expected)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    mode=st.sampled_from(["L", "RGB", "CMYK"]),
    quality=st.integers(1, 100),
    subsampling=st.sampled_from([0, 1, 2]),
    restart=st.integers(0, 2),
    color=st.sampled_from(["RGB", "L"]),
)
def test_any_jpeg_equals_pillow(size, mode, quality, subsampling, restart, color):
    image = Image.fromarray(photograph(*size)).convert(mode)
    data = encode(image, "JPEG", quality=quality, subsampling=subsampling, restart_marker_rows=restart)
    np.testing.assert_array_equal(decode(data, color=color), by_pillow(data, color))


def test_a_jpeg_that_stores_rgb_equals_pillow():
    data = encode(PIXELS, "JPEG", keep_rgb=True)
    np.testing.assert_array_equal(decode(data), by_pillow(data))


def unknown_jfif_version(data):
    return data[:11] + b"\x03" + data[12:]


def junk_between_markers(data):
    tables = data.index(b"\xff\xdb")
    return data[:tables] + b"abcde" + data[tables:]


def odd_scan_parameters(data):
    scan = data.index(b"\xff\xda")
    end = scan + 2 + struct.unpack(">H", data[scan + 2 : scan + 4])[0]
    return data[: end - 3] + bytes(3) + data[end:]


@pytest.mark.parametrize("oddity", [unknown_jfif_version, junk_between_markers, odd_scan_parameters])
def test_a_warning_about_the_header_is_no_damage(oddity):
    np.testing.assert_array_equal(decode(oddity(JPEG)), by_pillow(JPEG))


def test_pillow_decides_where_the_two_headers_differ(monkeypatch):
    monkeypatch.setattr(preprocess.simplejpeg, "decode_jpeg_header", lambda data: (65000, 65000, "YCbCr", "420"))
    monkeypatch.setattr(preprocess.simplejpeg, "decode_jpeg", lambda *args, **kwargs: pytest.fail("it allocates"))
    np.testing.assert_array_equal(decode(JPEG), by_pillow(JPEG))


def test_damage_that_pillow_shows_is_refused():
    data = damaged(BIG_JPEG)
    assert by_pillow(data).shape == (375, 500, 3)
    with pytest.raises(ImageRefused, match="truncated: Corrupt JPEG data"):
        decode(data)


def test_most_damage_is_noticed():
    # some leaves a stream that libjpeg finds in order
    outcomes = [status(damaged(BIG_JPEG, seed)) for seed in range(20)]
    assert set(outcomes) <= {"ok", "truncated"}
    assert outcomes.count("truncated") >= 15


# --- hostile bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF"])
@pytest.mark.filterwarnings("ignore")
def test_every_prefix_is_refused_or_complete(kind):
    data = encode(paletted(GREY[:9, :9]) if kind == "GIF" else PIXELS[:9, :9], kind)
    outcomes = [status(data[:length]) for length in range(len(data))]
    assert set(outcomes) <= {"ok", "empty", "truncated", "not_an_image", "unsupported_mode"}
    assert outcomes.count("ok") <= 21  # a PNG's last checksum and end mark, which hold no pixel
    whole = by_pillow(data)
    for length in (length for length, outcome in enumerate(outcomes) if outcome == "ok"):
        np.testing.assert_array_equal(decode(data[:length]), whole)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF"]),
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
    exif=st.sampled_from(CHOICES["exif"]),
)
def test_nothing_but_a_refusal_comes_out(kind, edits, exif):
    data = bytearray(encode(PIXELS[:9, :11], kind))
    for where, value in edits:
        data[where % min(len(data), 200)] = value
    try:
        pixels = decode(bytes(data), exif=exif, max_pixels=10**6)
    except ImageRefused:
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3


# --- orientation -------------------------------------------------------------------------------------------

UPRIGHT = ["abc", "def"]
# what the EXIF standard says of row 0 and column 0 of the stored image, spelled out
STORED = {
    1: ["abc", "def"],  # row 0 is the top, column 0 the left
    2: ["cba", "fed"],  # top, right
    3: ["fed", "cba"],  # bottom, right
    4: ["def", "abc"],  # bottom, left
    5: ["ad", "be", "cf"],  # left, top
    6: ["cf", "be", "ad"],  # right, top
    7: ["fc", "eb", "da"],  # right, bottom
    8: ["da", "eb", "fc"],  # left, bottom
}


def blocks(letters, size):
    levels = np.array([[40 * "abcdef".index(letter) for letter in row] for row in letters], np.uint8)
    return grey_as_rgb(np.kron(levels, np.ones((size, size), np.uint8)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_orientation(kind, orientation):
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = encode(blocks(STORED[orientation], 16), kind, exif=exif(orientation), **options)
    assert np.abs(decode(data).astype(int) - blocks(UPRIGHT, 16)).max() <= 2
    assert np.abs(decode(data, exif="ignore").astype(int) - blocks(STORED[orientation], 16)).max() <= 2


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("mode", CHOICES["exif"])
def test_tiff_is_turned_once(orientation, compression, mode):
    data = encode(blocks(STORED[orientation], 4), "TIFF", compression=compression, tiffinfo={274: orientation})
    np.testing.assert_array_equal(decode(data, exif=mode), blocks(UPRIGHT, 4))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "block", [exif(0), exif(9), b"Exif\0\0", b"Exif\0\0nonsense", exif(6)[:20], b"Exif\0\0II.\0" + exif(6)[10:]]
)
def test_unreadable_orientation_means_none(kind, block):
    bare, marked = encode(PIXELS, kind), encode(PIXELS, kind, exif=block)
    np.testing.assert_array_equal(decode(marked), decode(bare, exif="ignore"))


# --- geometry ----------------------------------------------------------------------------------------------


def as_timm(pixels, spec):
    """timm's transforms_imagenet_eval with torchvision's Resize and CenterCrop, read literally."""
    image = Image.fromarray(pixels if spec.color != "L" else pixels[..., 0])
    size = spec.input_size[1:]
    scale = tuple(math.floor(side / spec.crop_pct) for side in size)
    filter_ = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}[spec.interpolation]
    source = image.height, image.width

    if spec.crop_mode == "squash":
        image = image.resize((scale[1], scale[0]), filter_)
    elif spec.crop_mode == "center" and scale[0] == scale[1]:
        short, long = min(source), max(source)
        new_short, new_long = scale[0], int(scale[0] * long / short)
        width, height = (new_short, new_long) if image.width <= image.height else (new_long, new_short)
        image = image.resize((width, height), filter_)
    else:
        longest = 1.0 if spec.crop_mode == "border" else 0.0
        ratio_h, ratio_w = source[0] / scale[0], source[1] / scale[1]
        ratio = max(ratio_h, ratio_w) * longest + min(ratio_h, ratio_w) * (1.0 - longest)
        height, width = (round(side * 1.0 / ratio) for side in source)
        image = image.resize((width, height), filter_)

    crop_height, crop_width = size
    if crop_width > image.width or crop_height > image.height:
        left, right = [(crop_width - image.width + odd) // 2 if crop_width > image.width else 0 for odd in (0, 1)]
        top, bottom = [(crop_height - image.height + odd) // 2 if crop_height > image.height else 0 for odd in (0, 1)]
        mean = spec.mean[::-1] if spec.color == "BGR" else spec.mean
        fill = tuple(round(255 * value) for value in mean)
        image = ImageOps.expand(image, (left, top, right, bottom), fill if len(fill) > 1 else fill[0])
    crop_top = int(round((image.height - crop_height) / 2.0))  # noqa: RUF046
    crop_left = int(round((image.width - crop_width) / 2.0))  # noqa: RUF046
    image = image.crop((crop_left, crop_top, crop_left + crop_width, crop_top + crop_height))
    return np.asarray(image).reshape(crop_height, crop_width, -1)


SIZES = [(375, 500), (500, 375), (333, 777), (31, 30), (224, 224), (256, 256), (7, 90), (101, 100), (1, 1)]


@pytest.mark.parametrize("crop_mode", CHOICES["crop_mode"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.965, 1.0])
@pytest.mark.parametrize("size", [(64, 64), (57, 57), (40, 72), (65, 33)])
def test_view_equals_timm(crop_mode, crop_pct, size):
    spec = replace(SPEC, input_size=(3, *size), crop_mode=crop_mode, crop_pct=crop_pct)
    for shape in SIZES:
        pixels = photograph(*shape)
        seen, _ = view(pixels, spec)
        assert seen.dtype == np.uint8
        np.testing.assert_array_equal(seen, as_timm(pixels, spec), err_msg=f"a photograph of {shape}")


@pytest.mark.parametrize("interpolation", CHOICES["interpolation"])
@pytest.mark.parametrize("crop_mode", CHOICES["crop_mode"])
@pytest.mark.parametrize("color", CHOICES["color"])
def test_view_equals_timm_for_every_filter_and_color(interpolation, crop_mode, color):
    channels = 1 if color == "L" else 3
    spec = replace(
        SPEC,
        input_size=(channels, 48, 48),
        mean=IMAGENET_MEAN[:channels],
        std=IMAGENET_STD[:channels],
        interpolation=interpolation,
        crop_mode=crop_mode,
        color=color,
    )
    pixels = photograph(70, 101, channels)
    np.testing.assert_array_equal(view(pixels, spec)[0], as_timm(pixels, spec))


def test_crop_box_by_hand():
    # 500x375 -> int(256 * 500 / 375) = 341 x 256; (341 - 224) / 2 = 58.5 rounds to 58, (256 - 224) / 2 = 16
    box = view(photograph(375, 500), SPEC)[1]
    assert box == pytest.approx((58 * 500 / 341, 16 * 375 / 256, 282 * 500 / 341, 240 * 375 / 256))
    squash = replace(SPEC, crop_mode="squash", crop_pct=1.0)
    assert view(photograph(375, 500), squash)[1] == (0, 0, 500, 375)
    # 500x375 -> 224x168, 28 rows of padding above and below
    border = replace(SPEC, crop_mode="border", crop_pct=1.0)
    assert view(photograph(375, 500), border)[1] == pytest.approx((0, -62.5, 500, 437.5))


@pytest.mark.parametrize("crop_mode", CHOICES["crop_mode"])
@pytest.mark.parametrize("shape", [(240, 180), (181, 243), (600, 97)])
def test_crop_box_says_where_a_view_pixel_comes_from(crop_mode, shape):
    spec = replace(SPEC, input_size=(3, 64, 48), crop_mode=crop_mode, interpolation="bilinear")
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]] / 4.0
    ramps = np.stack([x, y, np.full(shape, 255.0)], axis=-1).round().astype(np.uint8)
    seen, (x0, y0, x1, y1) = view(ramps, spec)
    rows, columns = y0 + (np.arange(64) + 0.5) * (y1 - y0) / 64, x0 + (np.arange(48) + 0.5) * (x1 - x0) / 48
    margin = 2 * max(shape[0] / 64, shape[1] / 48)
    inside_x = (columns > margin) & (columns < shape[1] - margin)
    inside_y = (rows > margin) & (rows < shape[0] - margin)
    inside = inside_y[:, None] & inside_x & (seen[..., 2] == 255)
    assert inside.sum() > 200
    expected_x = np.broadcast_to((columns - 0.5) / 4, (64, 48))
    expected_y = np.broadcast_to((rows[:, None] - 0.5) / 4, (64, 48))
    assert np.abs(seen[..., 0] - expected_x)[inside].max() <= 1
    assert np.abs(seen[..., 1] - expected_y)[inside].max() <= 1


@pytest.mark.parametrize("interpolation", [name for name in CHOICES["interpolation"] if name != "nearest"])
@pytest.mark.parametrize("shape", [(375, 500), (640, 31), (1, 300)])
def test_a_view_that_skips_the_full_resize_is_the_same_to_rounding(interpolation, shape, monkeypatch):
    spec = replace(SPEC, input_size=(3, 56, 56), interpolation=interpolation)
    pixels = photograph(*shape)
    full, box = view(pixels, spec)
    monkeypatch.setattr(preprocess, "_MAX_RESIZED", 0)
    fused, same_box = view(pixels, spec)
    difference = np.abs(fused.astype(int) - full)
    assert difference.max() <= 2
    assert difference.mean() < 0.5
    assert same_box == box


@pytest.mark.parametrize("crop_mode", CHOICES["crop_mode"])
def test_a_strip_is_seen_without_gigabytes(crop_mode):
    strip = np.repeat(np.arange(20000) // 80, 3).astype(np.uint8).reshape(20000, 1, 3)
    spec = replace(SPEC, crop_mode=crop_mode)
    seen, box = view(strip, spec)
    assert seen.shape == (224, 224, 3)
    middle = seen[112, 111].tolist()
    assert all(123 <= level <= 126 for level in middle)
    assert view(strip.swapaxes(0, 1), spec)[1] == (box[1], box[0], box[3], box[2])


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    crop_mode=st.sampled_from(CHOICES["crop_mode"]),
    crop_pct=st.floats(0.5, 1.0),
)
def test_view_properties(shape, size, crop_mode, crop_pct):
    spec = replace(SPEC, input_size=(3, *size), crop_mode=crop_mode, crop_pct=crop_pct)
    seen, (x0, y0, x1, y1) = view(np.full((*shape, 3), 77, np.uint8), spec)
    assert seen.shape == (*size, 3)
    assert x0 < x1
    assert y0 < y1
    if crop_mode == "border":
        mean = np.array([round(255 * value) for value in IMAGENET_MEAN])
        assert ((seen == 77).all(-1) | (seen == mean).all(-1)).all()
    else:
        assert (seen == 77).all()
        assert x0 >= 0
        assert y0 >= 0
        assert x1 <= shape[1]
        assert y1 <= shape[0]


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 1), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_view_refuses_other_arrays(pixels):
    with pytest.raises(ValueError, match="not uint8"):
        view(pixels, SPEC)


# --- normalise and back ------------------------------------------------------------------------------------

SMALL = {
    (layout, color): ModelSpec(
        input_size=(1 if color == "L" else 3, 5, 4),
        mean=IMAGENET_MEAN[: 1 if color == "L" else 3],
        std=IMAGENET_STD[: 1 if color == "L" else 3],
        layout=layout,
        color=color,
    )
    for layout, color in product(CHOICES["layout"], CHOICES["color"])
}


def literal(seen, spec):
    """(v / 255 - mean) / std, one number at a time, in double precision."""
    channels, height, width = spec.input_size
    result = np.empty((channels, height, width) if spec.layout == "NCHW" else (height, width, channels))
    for k, y, x in np.ndindex(channels, height, width):
        value = float(seen[y, x, channels - 1 - k if spec.color == "BGR" else k])
        value = (value / 255 - spec.mean[k]) / spec.std[k]
        result[(k, y, x) if spec.layout == "NCHW" else (y, x, k)] = value
    return result


@pytest.mark.parametrize("key", SMALL)
def test_normalise(key):
    spec = SMALL[key]
    seen = photograph(5, 4, spec.input_size[0])
    exact = literal(seen, spec)
    single = normalise(seen, spec, np.float32)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, exact, rtol=1e-6, atol=1e-6)
    half = normalise(seen, spec, "float16")
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, single.astype(np.float16))
    raw = normalise(seen, spec, np.uint8)
    assert raw.dtype == np.uint8
    identity = replace(spec, mean=(0.0,) * len(spec.mean), std=(1 / 255,) * len(spec.std))
    np.testing.assert_array_equal(raw, literal(seen, identity).round())
    for array in (single, half, raw):
        assert array.flags.c_contiguous


def test_normalise_is_torchvision_to_the_bit():
    seen = photograph(224, 224)
    tensor = seen.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    for channel in range(3):
        tensor[channel] -= np.float32(IMAGENET_MEAN[channel])
        tensor[channel] /= np.float32(IMAGENET_STD[channel])
    np.testing.assert_array_equal(normalise(seen, SPEC, np.float32), tensor)


@settings(max_examples=60, deadline=None)
@given(
    key=st.sampled_from(list(SMALL)),
    dtype=st.sampled_from(["float32", "float16", "uint8"]),
    mean=st.floats(0, 1),
    std=st.floats(0.05, 1),
    seed=st.integers(0, 99),
)
def test_denormalise_undoes_normalise(key, dtype, mean, std, seed):
    channels = SMALL[key].input_size[0]
    spec = replace(SMALL[key], mean=(mean,) * channels, std=(std,) * channels)
    seen = np.random.default_rng(seed).integers(0, 256, (5, 4, channels), dtype=np.uint8)
    shown = denormalise(normalise(seen, spec, dtype), spec)
    assert shown.dtype == np.uint8
    np.testing.assert_array_equal(shown, seen)


def test_denormalise_clips():
    spec = SMALL["NCHW", "L"]
    values = np.zeros((1, 5, 4), np.float32)
    values[0, 0] = np.nan, np.inf, -np.inf, 1e9
    assert denormalise(values, spec)[0, :, 0].tolist() == [0, 255, 0, 255]


def test_wrong_arrays_are_refused():
    seen = np.zeros((5, 4, 3), np.uint8)
    spec = SMALL["NCHW", "RGB"]
    with pytest.raises(ValueError, match="view is uint8"):
        normalise(seen.swapaxes(0, 1), spec, np.float32)
    with pytest.raises(ValueError, match="view is float32"):
        normalise(seen.astype(np.float32), spec, np.float32)
    with pytest.raises(ValueError, match="float64"):
        normalise(seen, spec, np.float64)
    with pytest.raises(ValueError, match="input is"):
        denormalise(seen, spec)
