"""Pixels, datasets, and the endless order: each image once an epoch, whatever the processes and the start."""

import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.data import DATASETS, EndlessBatches, Folder, Images, centre_crop
from runtime.images import from_uint8, to_uint8
from runtime.seeds import mix


def test_the_two_pixel_conversions_are_inverse_for_all_256_values():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    x = from_uint8(pixels)
    assert (x.min(), x.max()) == (-1, 1)
    assert (to_uint8(x[None])[0] == pixels).all()


def test_pixels_are_rounded_clamped_and_repeated():
    x = torch.tensor([-1.5, -1.0, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1, 1.0, 7.0]).reshape(1, 1, 1, 6)
    assert to_uint8(x)[0, 0].tolist() == [[v] * 3 for v in (0, 0, 1, 0, 255, 255)]
    assert from_uint8(np.zeros((2, 3, 1), np.uint8)).shape == (1, 2, 3)


def test_mix_gives_distinct_seeds_that_torch_takes():
    seeds = [mix(*parts) for parts in itertools.product(range(10), repeat=3)]
    assert len(set(seeds)) == 1000
    assert 0 <= min(seeds) <= max(seeds) < 2**63
    assert len({seed % 1024 for seed in seeds}) > 550  # no pattern in the low bits: 639 are expected
    assert mix(3, 4) == mix(3, 4)


def test_mix_distinguishes_the_uses_by_their_number_of_parts():
    """The order of epoch k, the noise of image k and the noise of step k on rank 0 are three streams, not one."""
    assert len({mix(7, 5), mix(7, 5, 0), mix(7, 5, 0, 0)}) == 3


def keys_of(dataset):
    """Each image with its label as bytes."""
    return [dataset.pixels(i).tobytes() + bytes([dataset.labels[i]]) for i in range(len(dataset))]


@pytest.fixture(scope="module")
def packed():
    """name -> (train, test)."""
    return {name: [DATASETS[name](split=s) for s in ("train", "test")] for name in ("digits", "mnist")}


@pytest.mark.parametrize("name, counts, side", [("digits", (1297, 500), 8), ("mnist", (4000, 1000), 32)])
def test_the_splits_are_disjoint_complete_and_reproducible(packed, name, counts, side):
    train, test = packed[name]
    assert (len(train), len(test)) == counts
    assert train.class_names == [str(d) for d in range(10)]
    assert (train.channels, train.image_size, train.flip) == (1, side, False)
    image, label = train[5, False]
    assert image.shape == (1, side, side)
    assert label == train.labels[5]
    assert (image.min(), image.max()) >= (-1, 0.9)
    in_train, in_test = Counter(keys_of(train)), Counter(keys_of(test))
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        source = Counter(
            (x * 255 / 16).round().astype(np.uint8).tobytes() + bytes([y])
            for x, y in zip(digits.images, digits.target, strict=True)
        )
        assert in_train + in_test == source
        assert keys_of(DATASETS["digits"](split="train")) == keys_of(train)
    assert not in_train & in_test


def test_mnist_has_500_images_a_class_in_a_black_frame(packed):
    train, test = packed["mnist"]
    labels = np.concatenate([train.labels, test.labels])
    assert np.bincount(labels).tolist() == [500] * 10
    images = np.concatenate([train.images, test.images])
    frame = np.ones((32, 32), bool)
    frame[2:-2, 2:-2] = False
    assert (images[:, frame] == 0).all()
    assert images.max() == 255
    assert np.bincount(test.labels, minlength=10).min() > 60  # shuffled, not the last classes


def test_a_wrong_split_is_named():
    with pytest.raises(ValueError, match=r"data\.split is 'val'; choose 'train' or 'test'"):
        DATASETS["digits"](split="val")


def gradient(width, height, shift=0):
    """Every pixel different from its mirror image."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    image = np.stack([x * 7 + shift, y * 5 + x, (x * y) // 3 + 40], axis=2) % 256
    return image.astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Three classes, out of order on disk, in the modes and sizes that folders hold."""
    for name in ("zebra", "ant", "mole"):
        (tmp_path / "images" / name).mkdir(parents=True)
    root = tmp_path / "images"
    Image.fromarray(gradient(300, 200)).save(root / "zebra" / "wide.png")
    Image.fromarray(gradient(20, 45)).save(root / "zebra" / "small.png")
    Image.fromarray(gradient(64, 64)[..., 0]).save(root / "ant" / "grey.png")
    alpha = np.dstack([gradient(64, 80), np.full((80, 64), 7, np.uint8)])
    Image.fromarray(alpha).save(root / "ant" / "rgba.png")
    Image.fromarray(gradient(70, 64)).convert("CMYK").save(root / "mole" / "cmyk.jpg")
    Image.fromarray(gradient(70, 64)).save(root / "mole" / "rgb.jpg")
    Image.fromarray(gradient(40, 40)).convert("P").save(root / "mole" / "palette.png")
    return root


def test_a_folder_has_its_classes_in_alphabetical_order_and_reads_every_mode(folder):
    data = Folder(path=str(folder), image_size=32)
    assert data.class_names == ["ant", "mole", "zebra"]
    assert data.labels.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert (data.num_classes, data.channels, data.flip) == (3, 3, True)
    for i in range(len(data)):
        image, label = data[i, False]
        assert image.shape == (3, 32, 32)
        assert label == data.labels[i]
        assert -1 <= image.min() < image.max() <= 1
    grey = data[0, False][0]
    assert torch.equal(grey[0], grey[1])
    rgba = centre_crop(Image.fromarray(gradient(64, 80)), 32)
    assert (data.pixels(1) == rgba).all()  # alpha is dropped


def test_flipped_is_the_mirror_image(folder):
    data = Folder(path=str(folder), image_size=32)
    for i in range(len(data)):
        plain, mirrored = data[i, False][0], data[i, True][0]
        assert torch.equal(mirrored, plain[:, :, range(31, -1, -1)])
    assert not torch.equal(data[6, False][0], data[6, True][0])


def box(x):
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def bicubic(x, a=-0.5):
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resample(image, width, height, kernel, support):
    """Across, then down; each output is a weighted mean under the kernel, widened when the image shrinks, and rounded."""

    def across(values, size):  # (H, W, C)
        scale = values.shape[1] / size
        wide = max(scale, 1)
        columns = []
        for i in range(size):
            centre = (i + 0.5) * scale
            low = max(0, int(centre - support * wide + 0.5))
            high = min(values.shape[1], int(centre + support * wide + 0.5))
            weights = np.array([kernel((k - centre + 0.5) / wide) for k in range(low, high)])
            columns.append(np.einsum("hkc,k->hc", values[:, low:high], weights / weights.sum()))
        return np.clip(np.floor(np.stack(columns, axis=1) + 0.5), 0, 255)

    return across(across(image.astype(float), width).transpose(1, 0, 2), height).transpose(1, 0, 2)


@pytest.mark.parametrize("width, height", [(160, 96), (96, 130), (41, 47), (20, 31), (24, 24)])
def test_centre_crop_is_box_then_bicubic_then_crop(width, height):
    size = 24
    pixels = gradient(width, height)
    smooth = np.asarray(Image.fromarray(pixels).resize((6, 6)).resize((width, height), Image.Resampling.BILINEAR))
    expected = smooth
    while min(expected.shape[:2]) >= 2 * size:
        expected = resample(expected, expected.shape[1] // 2, expected.shape[0] // 2, box, 0.5)
    scale = size / min(expected.shape[:2])
    new_height, new_width = (round(n * scale) for n in expected.shape[:2])
    expected = resample(expected, new_width, new_height, bicubic, 2)
    top, left = (new_height - size) // 2, (new_width - size) // 2
    expected = expected[top : top + size, left : left + size]
    actual = centre_crop(Image.fromarray(smooth), size)
    assert actual.shape == (size, size, 3)
    assert actual.dtype == np.uint8
    assert np.abs(actual - expected).max() <= 1  # Pillow computes in fixed point


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.path '.*nowhere' is not a folder"):
        Folder(path=str(tmp_path / "nowhere"))


def test_a_folder_without_classes_or_with_an_empty_one(tmp_path):
    with pytest.raises(ValueError, match=r"holds no class folders with images: expected .*/CLASS/IMAGE"):
        Folder(path=str(tmp_path))
    Image.new("RGB", (8, 8)).save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match="holds no class folders with images"):
        Folder(path=str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        Folder(path=str(tmp_path))


@pytest.mark.parametrize("size", [0, -3, "abc", 2.5])
def test_a_wrong_image_size(folder, size):
    with pytest.raises(ValueError, match=r"data\.image_size is .*; choose a whole number, at least 1"):
        Folder(path=str(folder), image_size=size)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_corrupt_image_is_named(tmp_path, suffix):
    """Cut at every tenth of its length, or with a byte of its body changed: read, or a ValueError with the name."""
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / f"broken.{suffix}"
    Image.fromarray(gradient(64, 64)).save(file)
    whole = file.read_bytes()
    data = Folder(path=str(tmp_path), image_size=32)
    damaged = [whole[: len(whole) * k // 10] for k in range(10)]
    damaged += [whole[:k] + bytes([whole[k] ^ 0xFF]) + whole[k + 1 :] for k in range(0, len(whole), len(whole) // 80)]
    sentences = []
    for content in damaged:
        file.write_bytes(content)
        try:
            data.pixels(0)
        except ValueError as error:
            sentences.append(str(error))
    assert len(sentences) >= 10
    assert all(re.search(rf"broken\.{suffix}' cannot be read as an image: ", text) for text in sentences)
    file.write_bytes(whole)
    assert data.pixels(0).shape == (32, 32, 3)


def batches(count, **given):
    options = {"seed": 3, "flip": False, "start": 0, "rank": 0, "num_processes": 1, **given}
    return list(
        itertools.islice(EndlessBatches(options.pop("num_images", 10), options.pop("batch_size", 4), **options), count)
    )


def test_every_epoch_visits_every_image_once_in_another_order():
    order = [index for batch in batches(15, num_images=10, batch_size=4) for index, _ in batch]
    epochs = [order[k : k + 10] for k in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert epochs[0] != sorted(epochs[0])


def test_a_batch_may_be_larger_than_the_data():
    order = [index for batch in batches(3, num_images=3, batch_size=7) for index, _ in batch]
    assert Counter(order) == Counter({0: 7, 1: 7, 2: 7})


@pytest.mark.parametrize("start", [1, 2, 3, 7])
def test_a_later_start_continues_exactly(start):
    everything = batches(12, num_images=10, batch_size=4, flip=True)
    assert batches(12 - start, num_images=10, batch_size=4, flip=True, start=start) == everything[start:]


@pytest.mark.parametrize("processes", [2, 4])
def test_the_shares_of_the_processes_are_the_order_of_one(processes):
    alone = batches(9, batch_size=8, flip=True)
    shares = [batches(9, batch_size=8, flip=True, rank=r, num_processes=processes) for r in range(processes)]
    assert [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == alone


def test_flips_are_half_and_a_function_of_seed_and_position():
    n = 4000
    one = [flip for batch in batches(20, num_images=200, batch_size=200, flip=True) for _, flip in batch]
    assert abs(sum(one) - n / 2) < 5 * math.sqrt(n) / 2  # five standard deviations
    other = [flip for batch in batches(500, num_images=200, batch_size=8, flip=True) for _, flip in batch]
    assert one == other
    assert one[:200] != one[200:400]
    seeded = [flip for batch in batches(20, num_images=200, batch_size=200, flip=True, seed=4) for _, flip in batch]
    assert one != seeded
    assert not any(flip for batch in batches(20) for _, flip in batch)


def test_the_order_is_the_same_with_and_without_flips():
    def indices(flip):
        return [[index for index, _ in batch] for batch in batches(8, flip=flip)]

    assert indices(True) == indices(False)
    assert batches(3, seed=1) != batches(3, seed=2)


def test_a_batch_that_the_processes_cannot_share_is_named():
    with pytest.raises(ValueError, match=r"is 10, which 4 processes cannot share evenly; choose a multiple of 4"):
        batches(1, batch_size=10, num_processes=4)


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_out_of_range_is_named(label):
    with pytest.raises(ValueError, match=rf"image 1 has label {label}, but there are 3 classes, 0 \.\.\. 2"):
        Images(np.array([0, label, 2]), ["a", "b", "c"], image_size=8, channels=1, flip=False)
    with pytest.raises(ValueError, match="holds no images"):
        Images(np.array([]), ["a"], image_size=8, channels=1, flip=False)
