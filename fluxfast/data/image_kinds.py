"""Which files are images, by their names: kinds that can be read here, and kinds that can't.

Pillow is asked what it can read: AVIF, WebP and JPEG 2000 are options of its build, HEIC and JPEG
XL come with packages that are used where they are installed. PostScript and PDF are never read,
since reading them would start another program.
"""

import contextlib
import functools
import importlib
import mimetypes
from pathlib import Path

from PIL import Image, features

# Pillow's formats, and the suffixes of their files
_SUFFIXES = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "TGA": (".tga",),
    "QOI": (".qoi",),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif", ".hif"),
    "JXL": (".jxl",),
}
# Pillow registers these formats even where it can't read them; the feature tells
_FEATURES = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}
# formats that a package brings: (its module, its name for pip)
_PACKAGES = {"HEIF": ("pillow_heif", "pillow-heif"), "JXL": ("pillow_jxl", "pillow-jxl-plugin")}
# further decoders of Pillow's that belong to one of these formats
_SUBFORMATS = {"BMP": ("DIB",)}

# what follows "ftyp" in HEIF files of every kind
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")

_CAMERA_RAW = frozenset(
    [
        ".3fr",
        ".ari",
        ".arw",
        ".bay",
        ".cr2",
        ".cr3",
        ".crw",
        ".dcr",
        ".dcs",
        ".dng",
        ".erf",
        ".fff",
        ".gpr",
        ".iiq",
        ".k25",
        ".kdc",
        ".mdc",
        ".mef",
        ".mos",
        ".mrw",
        ".nef",
        ".nrw",
        ".orf",
        ".pef",
        ".raf",
        ".raw",
        ".rw2",
        ".rwl",
        ".rwz",
        ".sr2",
        ".srf",
        ".srw",
        ".x3f",
    ]
)
_OTHERS = frozenset(
    [
        ".ai",
        ".blp",
        ".bpg",
        ".cin",
        ".clip",
        ".cur",
        ".dds",
        ".djvu",
        ".dpx",
        ".emf",
        ".eps",
        ".exr",
        ".fits",
        ".flif",
        ".fpx",
        ".hdp",
        ".hdr",
        ".heics",
        ".heifs",
        ".avifs",
        ".icns",
        ".ico",
        ".jls",
        ".jng",
        ".jph",
        ".jps",
        ".jxr",
        ".kra",
        ".ktx",
        ".ktx2",
        ".mng",
        ".ora",
        ".pcx",
        ".pct",
        ".pict",
        ".psb",
        ".psd",
        ".ras",
        ".rgb",
        ".rgba",
        ".sgi",
        ".svg",
        ".svgz",
        ".wdp",
        ".wmf",
        ".xbm",
        ".xcf",
        ".xpm",
    ]
)


@functools.cache
def readable() -> dict[str, str]:
    """Pillow's format for each suffix that can be read here."""
    for module, _ in _PACKAGES.values():
        with contextlib.suppress(ImportError):
            package = importlib.import_module(module)
            if module == "pillow_heif":
                package.register_heif_opener()
    Image.init()
    have = [
        kind
        for kind in _SUFFIXES
        if kind in Image.OPEN and (kind not in _FEATURES or features.check(_FEATURES[kind]))
    ]
    return {suffix: kind for kind in have for suffix in _SUFFIXES[kind]}


def decoders(path: Path) -> tuple[str, ...]:
    """The formats to try for a file.

    A name may be wrong, so decoders go by content. The list keeps Pillow from starting Ghostscript
    on a renamed EPS file. Only TGA, whose files have no signature at the beginning, is tried by
    name.
    """
    known = dict.fromkeys(readable().values())
    formats = [name for kind in known for name in (kind, *_SUBFORMATS.get(kind, ()))]
    return tuple(name for name in formats if name != "TGA" or path.suffix.lower() == ".tga")


def is_readable(path: Path) -> bool:
    return path.suffix.lower() in readable()


def looks_like_an_image(path: Path) -> bool:
    """Whether the name is that of an image, of whatever kind."""
    suffix = path.suffix.lower()
    if (
        suffix in _CAMERA_RAW
        or suffix in _OTHERS
        or any(suffix in suffixes for suffixes in _SUFFIXES.values())
    ):
        return True
    return (mimetypes.guess_type(f"a{suffix}")[0] or "").startswith("image/")


def how_to_read(suffix: str) -> str | None:
    """What to install to read files that end in `suffix`; None if nothing helps."""
    kind = next((kind for kind, suffixes in _SUFFIXES.items() if suffix in suffixes), None)
    if kind in _PACKAGES:
        return f"pip install {_PACKAGES[kind][1]}"
    return f"a build of Pillow with {kind}" if kind else None


def holds_other_kind(start: bytes) -> str | None:
    """The suffix that fits a file's first bytes, if a package is needed to read that kind.

    Such files often have a JPEG's name. None for any other content.
    """
    if start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS:
        return ".heic"
    if start[4:12] == b"ftypavif":
        return ".avif"
    if start.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return ".jxl"
    return ".psd" if start.startswith(b"8BPS") else None
