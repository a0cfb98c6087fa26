"""Which files are images, by their names: those that can be read here, and those that can't, with
what would help.

Pillow is asked for what it has: AVIF, WebP and JPEG 2000 are options of its build; HEIC and JPEG XL
come with packages that are used where they are installed. PostScript and PDF are never read, since
that would start another program.
"""

import contextlib
import functools
import importlib
import mimetypes
from pathlib import Path

from PIL import Image, features

# Pillow's formats, and how their files' names end
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
# formats of which Pillow knows the name whether or not it can read them
_FEATURES = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}
# formats that a package brings: (its module, its name for pip)
_PACKAGES = {"HEIF": ("pillow_heif", "pillow-heif"), "JXL": ("pillow_jxl", "pillow-jxl-plugin")}
# beside one of these, Pillow's name of a decoder that belongs to it
_SUBFORMATS = {"BMP": ("DIB",)}

_CAMERA_RAW = (
    ".3fr", ".ari", ".arw", ".bay", ".cr2", ".cr3", ".crw", ".dcr", ".dcs", ".dng", ".erf", ".fff", ".gpr", ".iiq", ".k25",
    ".kdc", ".mdc", ".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".rwz", ".sr2",
    ".srf", ".srw", ".x3f",
)  # fmt: skip
_OTHERS = (
    ".ai", ".blp", ".bpg", ".cin", ".clip", ".cur", ".dds", ".djvu", ".dpx", ".emf", ".eps", ".exr", ".fits", ".flif", ".fpx",
    ".hdp", ".hdr", ".heics", ".heifs", ".avifs", ".icns", ".ico", ".jls", ".jng", ".jph", ".jps", ".jxr", ".kra", ".ktx",
    ".ktx2", ".mng", ".ora", ".pcx", ".pct", ".pict", ".psb", ".psd", ".ras", ".rgb", ".rgba", ".sgi", ".svg", ".svgz", ".wdp",
    ".wmf", ".xbm", ".xcf", ".xpm",
)  # fmt: skip


@functools.cache
def readable() -> dict[str, str]:
    """Suffix to Pillow's format, of what can be read here."""
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
    """The formats to try for a file. Decoders go by content, and a name may be wrong; without a
    list a renamed EPS file would start Ghostscript. Only TGA, whose files begin with nothing of
    their own, is tried by name.
    """
    known = dict.fromkeys(readable().values())
    formats = [name for kind in known for name in (kind, *_SUBFORMATS.get(kind, ()))]
    return tuple(name for name in formats if name != "TGA" or path.suffix.lower() == ".tga")


def is_readable(path: Path) -> bool:
    return path.suffix.lower() in readable()


def looks_like_an_image(path: Path) -> bool:
    """Whether the name says that it is an image, of whatever kind."""
    suffix = path.suffix.lower()
    if (
        suffix in _CAMERA_RAW
        or suffix in _OTHERS
        or any(suffix in suffixes for suffixes in _SUFFIXES.values())
    ):
        return True
    return (mimetypes.guess_type(f"a{suffix}")[0] or "").startswith("image/")


def how_to_read(suffix: str) -> str | None:
    """What to install for files that end in `suffix`, where a package reads them."""
    kind = next((kind for kind, suffixes in _SUFFIXES.items() if suffix in suffixes), None)
    if kind in _PACKAGES:
        return f"pip install {_PACKAGES[kind][1]}"
    return f"a build of Pillow with {kind}" if kind else None


def holds_other_kind(start: bytes) -> str | None:
    """The kind that a file's first bytes tell, of those that only a package reads: they often come
    under a name of JPEG's.
    """
    if start[4:8] == b"ftyp" and start[8:12] in (
        b"heic",
        b"heix",
        b"hevc",
        b"heim",
        b"heis",
        b"mif1",
        b"msf1",
    ):
        return ".heic"
    if start[4:12] == b"ftypavif":
        return ".avif"
    if start.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return ".jxl"
    return ".psd" if start.startswith(b"8BPS") else None
