"""Images between the disk and a batch: one reader of files and one conversion of pixels, for all who need them.

Training, the cache of latents and the evaluator read the same files to the same pixels, because they read them here.
Uses the standard library, numpy, torch and Pillow, and no other package of this repository.
"""

from vca_engine.images.arrays import ArrayFile, ArrayInMemory, as_nchw, check_uint8, uint8_batches
from vca_engine.images.files import LABEL_FILES, SUFFIXES, ImageFiles, UnreadableImageError, is_image
from vca_engine.images.pixels import (
    FORMATS,
    NonFiniteError,
    centre_crop,
    check_side,
    from_uint8,
    on_white,
    open_image,
    quantize,
    read_image,
    to_uint8,
)

__all__ = [
    "FORMATS",
    "LABEL_FILES",
    "SUFFIXES",
    "ArrayFile",
    "ArrayInMemory",
    "ImageFiles",
    "NonFiniteError",
    "UnreadableImageError",
    "as_nchw",
    "centre_crop",
    "check_side",
    "check_uint8",
    "from_uint8",
    "is_image",
    "on_white",
    "open_image",
    "quantize",
    "read_image",
    "to_uint8",
    "uint8_batches",
]
