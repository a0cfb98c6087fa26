"""Whether the face detector of `crop_style: face` is installed, without loading it."""

import importlib.util
from pathlib import Path

INSTALL = 'pip install "fluxfast[faces]"'


def face_cascade() -> Path | None:
    """OpenCV's description of frontal faces (a Haar cascade); None if no package brings it."""
    package = importlib.util.find_spec("cv2")
    if package is None or package.origin is None:
        return None
    # OpenCV 5 has neither the file nor the detector that reads it
    path = Path(package.origin).parent / "data" / "haarcascade_frontalface_default.xml"
    return path if path.is_file() else None
