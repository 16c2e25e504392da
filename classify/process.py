"""Recognition as a process: the views of images that a network learns from, and its loss. timm's recipe, without state.

All that is random is a function of (seed, step) or of (seed, position of the image in the run). timm draws from the
global generators, so they are seeded for the one call, and are as before after it.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from classify.block import draw_paths
from vca_engine.seeds import mix


class Classification:
    """Names the class of an image, learned from mixed views of images and smoothed labels.

        x~ = lam x + (1 - lam) x'  (mixup),  or x with a rectangle of x', of which lam is the share left  (cutmix)
        loss = -sum_k target_k log softmax(model(x~))_k,   target = lam onehot(y) + (1 - lam) onehot(y'), smoothed

    x' is the other of two neighbours in the order of the run, so that neither accumulation nor the number of processes
    changes it. lam, the rectangle, and which of the two it is are drawn once a step, as timm does once a batch.

    Args:
        mixup: lam is drawn from Beta(mixup, mixup); 0 means no mixup.
        cutmix: The same for the rectangles; 0 means none.
        switch: Share of the steps with cutmix, where there are both.
        smoothing: Share of the target that is spread over all classes.
        augment: timm's name of an augmentation of each view, e.g. rand-m9-mstd0.5-inc1; none means none.
        colour_jitter: Change brightness, contrast and saturation by up to this factor; only where augment is none, as
            in timm.
        erasing: Share of the views of which a rectangle is replaced by noise.
        min_area: Least share of an image that its view shows; 1 means all of a square image.

    Source: Zhang et al. 2018, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899; Touvron et al. 2021, DeiT,
    arXiv:2012.12877; timm for all details.
    """

    def __init__(
        self,
        *,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        switch: float = 0.5,
        smoothing: float = 0.1,
        augment: str = "rand-m9-mstd0.5-inc1",
        colour_jitter: float = 0.4,
        erasing: float = 0.25,
        min_area: float = 0.08,
    ) -> None:
        shares = {"switch": switch, "smoothing": smoothing, "erasing": erasing, "min_area": min_area}
        for name, value in {"mixup": mixup, "cutmix": cutmix, "colour_jitter": colour_jitter, **shares}.items():
            highest = 1 if name in shares else 100
            if not 0 <= value <= highest:
                raise ValueError(f"process.{name} is {value!r}; choose at least 0, at most {highest}.")
        if min_area == 0:
            raise ValueError("process.min_area is 0; choose above 0, at most 1, which means all of the image.")
        self.mixup, self.cutmix, self.switch, self.smoothing = mixup, cutmix, switch, smoothing
        self.augment, self.colour_jitter, self.erasing, self.min_area = augment, colour_jitter, erasing, min_area

    def training_views(self, images: Any, seed: int) -> "Views":
        """View each image of a dataset anew at each position of the run."""
        options = {
            "is_training": True,
            "scale": (self.min_area, 1.0),
            "ratio": (3 / 4, 4 / 3) if self.min_area < 1 else (1.0, 1.0),
            "hflip": 0.5 if images.flip else 0.0,
            "auto_augment": None if self.augment == "none" else self.augment,
            "color_jitter": self.colour_jitter or None,
            "re_prob": self.erasing,
            "re_mode": "pixel",
        }
        try:
            return Views(images, seed, **options)
        except (AssertionError, ValueError, KeyError) as error:
            raise ValueError(
                f"process.augment is {self.augment!r}, which timm does not know ({error}); choose e.g. "
                "'rand-m9-mstd0.5-inc1', or 'none'."
            ) from None

    @staticmethod
    def evaluation_views(images: Any, crop: float) -> "Views":
        """View the middle of each image of a dataset: `crop` of the shorter side, as a square of the dataset's size."""
        return Views(images, is_training=False, crop_pct=crop)

    def check_batch(self, num: int) -> None:
        """Raise ValueError unless so many images that go through the network together are whole pairs of neighbours."""
        if num % 2 and (self.mixup or self.cutmix):
            raise ValueError(
                f"a process has {num} images at a time, of which mixup and cutmix mix two neighbours: choose "
                "train.batch_size as a multiple of twice train.accumulate times the number of processes, or "
                "process.mixup 0 and process.cutmix 0."
            )

    @staticmethod
    def draw_paths(network: nn.Module, seed: int, positions: Tensor) -> None:
        """Draw which branches of the network images at these positions (B,) of the run leave out; see `draw_paths`."""
        draw_paths(network, seed, positions)

    def loss(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, seed: int, step: int) -> Tensor:
        """Compute the losses (B,) of images (B, C, H, W) with labels (B,), mixed as of this step, smoothed."""
        lam, rectangle = self.draw_mixing(x.shape, mix(seed, 3, step))
        if lam == 1:
            return F.cross_entropy(model(x), y, reduction="none", label_smoothing=self.smoothing)
        if rectangle:
            top, bottom, left, right = rectangle
            other = x.clone()
            other[..., top:bottom, left:right] = _swapped(x)[..., top:bottom, left:right]
            x = other
        else:
            x = lam * x + (1 - lam) * _swapped(x)
        logits = model(x)  # (B, K)
        target = F.one_hot(y, logits.shape[1]).to(logits)  # (B, K)
        target = lam * target + (1 - lam) * _swapped(target)
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=self.smoothing)

    @staticmethod
    def best_classes(logits: Tensor) -> Tensor:
        """Find the five best classes by logits (B, K), fewer of fewer: (B, 5), the best first; -1 where not finite."""
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        return best.masked_fill(~logits.isfinite().all(dim=1, keepdim=True), -1)

    @classmethod
    def count_correct(cls, logits: Tensor, y: Tensor) -> Tensor:
        """Count images by their logits (B, K) and labels (B,); what is not finite is wrong.

        Returns:
            (3,) int64: those whose class is the first, those whose class is among the first five, and all.
        """
        right = cls.best_classes(logits) == y[:, None]  # (B, 5)
        return torch.stack([right[:, 0].sum(), right.sum(), torch.tensor(len(y), device=y.device)])

    def draw_mixing(self, shape: torch.Size, seed: int) -> tuple[float, tuple[int, int, int, int] | None]:
        """Draw lam, and the rectangle (top, bottom, left, right) of images (..., H, W) to replace; None in mixup.

        Source: timm, `Mixup` in its mode batch.
        """
        if not (self.mixup or self.cutmix):
            return 1.0, None
        from timm.data.mixup import cutmix_bbox_and_lam  # slow to import: see docs/architecture.md, start-up

        with seeded(seed):
            cut = not self.mixup or bool(self.cutmix and np.random.rand() < self.switch)
            alpha = self.cutmix if cut else self.mixup
            lam = float(np.random.beta(alpha, alpha))
            if not cut:
                return lam, None
            rectangle, lam = cutmix_bbox_and_lam(shape, lam)
        return float(lam), tuple(map(int, rectangle))


class Views(Dataset):
    """Images of a dataset as a network sees them: timm's transform of each, normalised, with the label.

    A key is the index of an image, or in training (index, flip, position), of which flip is not used: timm's transform
    mirrors by itself. Colours are normalised by the mean and deviation of ImageNet, as timm's weights expect; grey
    images to [-1, 1].

    Args:
        images: A `vca_engine.images.datasets.ImageDataset`.
        seed: Of the views, in training.
        options: Of `timm.data.create_transform`.
    """

    collate = None  # of a DataLoader: its own

    def __init__(self, images: Any, seed: int = 0, **options: Any) -> None:
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform  # slow to import

        mean, std = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if images.channels == 3 else ((0.5,), (0.5,))
        size = {"input_size": (images.channels, images.image_size, images.image_size), "interpolation": "bicubic"}
        self.transform = create_transform(**size, mean=mean, std=std, **options)
        self.images, self.seed = images, seed
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))  # (C, 1, 1)

    def to_pixels(self, x: Tensor) -> Tensor:
        """Turn views (B, C, H, W) into images in [-1, 1], where an erased part, which is noise, may leave that."""
        return 2 * (x * self.std.to(x) + self.mean.to(x)) - 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, bool, int]) -> tuple[Tensor, int]:
        """View an image: (C, image_size, image_size) float32, and its label."""
        index, _, position = (key, False, 0) if isinstance(key, int) else key
        picture = self.images.picture(index)
        with seeded(mix(self.seed, 4, position)):
            return self.transform(picture), int(self.images.labels[index])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of Python, numpy and torch's CPU for the block; after it they are as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _swapped(x: Tensor) -> Tensor:
    """Swap neighbours: (2n, ...) -> (2n, ...), 1, 0, 3, 2, ..."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
