"""Finding the face that a crop is to keep, with OpenCV's Haar cascade for frontal faces."""

import threading
from typing import Any

import numpy as np
from PIL import Image

from fluxfast.config.face_detector import INSTALL, face_cascade

Box = tuple[int, int, int, int]

# images are searched at this size at most, which shows any face that a crop is made for
_LONGEST_EDGE = 1024
# each thread has a detector of its own, since one can't be used by two at a time
_of_thread = threading.local()


def largest_face(img: Image.Image) -> Box | None:
    """(left, top, right, bottom) in pixels of the largest face in an upright RGB image.

    None if no face is found; of equal faces the uppermost, leftmost counts. Raises ValueError if
    the detector is not installed.
    """
    scale = min(1.0, _LONGEST_EDGE / max(img.size))
    width, height = (max(1, round(edge * scale)) for edge in img.size)
    grey = img.convert("L").resize((width, height), Image.Resampling.BILINEAR)
    found = _detector().detectMultiScale(np.asarray(grey), scaleFactor=1.1, minNeighbors=5)
    boxes = [tuple(int(value) for value in box) for box in found]
    if not boxes:
        return None
    left, top, w, h = max(boxes, key=lambda box: (box[2] * box[3], -box[1], -box[0]))
    edges = (left, top, left + w, top + h)
    x, y = img.size[0] / width, img.size[1] / height
    return round(edges[0] * x), round(edges[1] * y), round(edges[2] * x), round(edges[3] * y)


def _detector() -> Any:
    if not hasattr(_of_thread, "detector"):
        path = face_cascade()
        if path is None:
            raise ValueError(f"crop_style face needs a face detector: {INSTALL}")
        import cv2

        _of_thread.detector = cv2.CascadeClassifier(str(path))
    return _of_thread.detector
