"""Pixels, datasets, and the endless order: each image once an epoch, whatever the processes and the start."""

import io
import itertools
import math
import re
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vca_engine.images import (
    NonFiniteError,
    UnreadableImageError,
    centre_crop,
    datasets,
    from_uint8,
    read_image,
    to_uint8,
)
from vca_engine.images.datasets import DATASETS, Folder, ImageDataset
from vca_engine.images.order import EndlessBatches
from vca_engine.seeds import mix, normal, uniform


def test_the_two_pixel_conversions_are_inverse_for_all_256_values():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    x = from_uint8(pixels)
    assert (x.min(), x.max()) == (-1, 1)
    assert (to_uint8(x[None])[0] == pixels).all()


def test_pixels_are_the_published_floor_clamped_and_repeated():
    """floor(127.5 x + 128): so 0 is 128, not 127, and halves go up."""
    x = torch.tensor([-1.5, -1.0, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1, 0.0, 1.0, 7.0]).reshape(1, 1, 1, 7)
    assert to_uint8(x)[0, 0].tolist() == [[v] * 3 for v in (0, 0, 1, 0, 128, 255, 255)]
    assert from_uint8(np.zeros((2, 3, 1), np.uint8)).shape == (1, 2, 3)
    assert from_uint8(torch.zeros(5, 2, 3, 1, dtype=torch.uint8)).shape == (5, 1, 2, 3)
    halves = torch.arange(255, dtype=torch.float64) / 127.5 - 1 + 0.5 / 127.5  # in the middle of two levels, to 1e-14
    x = torch.cat([halves - 1e-9, halves + 1e-9])[None, None, None]
    assert to_uint8(x)[0, 0, :, 0].tolist() == [*range(255), *range(1, 256)]
    x = torch.linspace(-1.2, 1.2, 10_001)
    expected = np.floor(127.5 * x.numpy() + np.float32(128)).clip(0, 255)  # all in float32
    assert (to_uint8(x[None, None, None])[0, 0, :, 1] == expected).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_pixels(value):
    x = torch.zeros(4, 3, 2, 2)
    x[1, 2, 0, 1] = x[3, 0, 0, 0] = value
    with pytest.raises(NonFiniteError, match="2 of 4 images hold NaN or infinite values"):
        to_uint8(x)


def test_mix_gives_distinct_seeds_that_torch_takes():
    seeds = [mix(*parts) for parts in itertools.product(range(10), repeat=3)]
    assert len(set(seeds)) == 1000
    assert 0 <= min(seeds) <= max(seeds) < 2**63
    assert len({seed % 1024 for seed in seeds}) > 550  # no pattern in the low bits: 639 are expected
    assert mix(3, 4) == mix(3, 4)


def test_mix_distinguishes_the_uses_by_their_number_of_parts():
    """The order of epoch k, the noise of image k and the noise of step k on rank 0 are three streams, not one."""
    assert len({mix(7, 5), mix(7, 5, 0), mix(7, 5, 0, 0)}) == 3


def splitmix64(state):
    """The published generator, one number at a time, in Python's integers."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        yield z ^ (z >> 31)


def test_normal_against_a_plain_version():
    """Box-Muller of the generator's halves; the state of a position is its own number of a first generator, and so on."""
    for seed, position in ((0, 0), (3, 1), (3, 12345)):
        start = position * 0x9E3779B97F4A7C15 % 2**64
        start = next(splitmix64((start - 0x9E3779B97F4A7C15) % 2**64))
        start = next(splitmix64((start + mix(seed) - 0x9E3779B97F4A7C15) % 2**64))
        bits = list(itertools.islice(splitmix64(start), 4))
        u, v = (np.array([((b >> shift) % 2**32 + 0.5) / 2**32 for b in bits]) for shift in (0, 32))
        radius = np.sqrt(-2 * np.log(u))
        expected = np.concatenate([radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v)])[:7]
        found = normal(seed, torch.tensor([position]), (7,))
        np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5)


def test_normal_is_a_function_of_seed_and_position_and_is_normal():
    positions = torch.tensor([0, 7, 10**12, 3])
    x = normal(5, positions, (4, 8, 8))
    assert x.shape == (4, 4, 8, 8)
    assert torch.equal(normal(5, positions[[2]], (4, 8, 8)), x[[2]])
    assert not torch.equal(normal(6, positions, (4, 8, 8)), x)
    z = normal(1, torch.arange(2000), (3, 41)).double()
    n = z.numel()
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    share = [float((z < edge).double().mean()) for edge in (-2, -1, 0, 1, 2)]
    assert share == pytest.approx([0.02275, 0.15866, 0.5, 0.84134, 0.97725], abs=5 * (0.25 / n) ** 0.5)
    correlation = np.corrcoef(z.flatten(1)[:100].numpy())  # positions beside each other
    assert np.abs(correlation - np.eye(100)).max() < 5.5 / 123**0.5


def test_uniform_is_a_function_of_seed_and_position_and_is_uniform():
    positions = torch.tensor([0, 7, 10**12, 3])
    u = uniform(5, positions, 3)
    assert (u.shape, u.dtype) == ((4, 3), torch.float64)
    assert torch.equal(uniform(5, positions[[2]], 3), u[[2]])
    assert torch.equal(uniform(5, positions, 2), u[:, :2])
    assert not torch.equal(uniform(6, positions, 3), u)
    many = uniform(1, torch.arange(20000), 2)
    assert many.min() > 0
    assert many.max() < 1
    counts = (many[:, :, None] * 10).long().eq(torch.arange(10)).double().mean(0)
    assert (counts - 0.1).abs().max() < 5 * (0.09 / 20000) ** 0.5
    assert abs(np.corrcoef(many.T.numpy())[0, 1]) < 5 / 20000**0.5
    assert abs(np.corrcoef(many[:-1, 0].numpy(), many[1:, 0].numpy())[0, 1]) < 5 / 20000**0.5


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
    data = Folder(images=str(folder), image_size=32)
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
    white = (gradient(64, 80).astype(float) * 7 + 255.0 * 248) / 255  # alpha is 7
    white = centre_crop(Image.fromarray(white.round().astype(np.uint8)), 32)
    assert np.abs(data.pixels(1).astype(int) - white).max() <= 1


def test_flipped_is_the_mirror_image(folder):
    data = Folder(images=str(folder), image_size=32)
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


# One image


def as_read(image, suffix="png", **options):
    file = io.BytesIO()
    image.save(file, format=suffix, **options)
    file.seek(0)
    return np.asarray(read_image(file))


def test_sixteen_bits_are_scaled_to_eight():
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = (values / 257).round()
    for suffix in ("png", "tiff"):
        assert (as_read(Image.fromarray(values), suffix) == expected[..., None]).all()


def test_what_is_transparent_is_laid_on_white():
    image = Image.fromarray(np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 100, 200, 51]]], np.uint8))
    assert as_read(image)[0].tolist() == [[10, 20, 30], [255, 255, 255], [204, 224, 244]]
    grey = Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA")
    assert as_read(grey)[0].tolist() == [[10] * 3, [255] * 3]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([1, 2, 3, 4, 5, 6])
    assert as_read(palette)[0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert as_read(palette, transparency=1)[0].tolist() == [[1, 2, 3], [255, 255, 255]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_camera_says(orientation):
    """What was stored, turned back by the tag, is the scene; each of the eight turns by hand."""
    scene = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    flips = {1: scene, 2: scene[:, ::-1], 3: scene[::-1, ::-1], 4: scene[::-1], 5: scene.T, 6: np.rot90(scene)}
    stored = {**flips, 7: scene[::-1, ::-1].T, 8: np.rot90(scene, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = as_read(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert found[..., 0].tolist() == scene.tolist()


def test_a_damaged_exif_does_no_harm():
    image = Image.fromarray(gradient(8, 8))
    assert (as_read(image, exif=b"Exif\0\0II*\0nonsense") == gradient(8, 8)).all()


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_an_animation_is_no_image(suffix):
    frames = [Image.fromarray(gradient(16, 16, shift)) for shift in (0, 90)]
    with pytest.raises(ValueError, match=r"it is animated, or has several pages \(2\)"):
        as_read(frames[0], suffix, save_all=True, append_images=frames[1:])


def test_numbers_without_a_range_are_no_image():
    with pytest.raises(ValueError, match="floating-point"):
        as_read(Image.fromarray(np.zeros((4, 4), np.float32)), "tiff")
    with pytest.raises(ValueError, match="numbers of 32 bits, whose range is not known"):
        as_read(Image.fromarray(np.array([[0, 200]], np.int32)), "tiff")


# Folders, .zip files and labels


def write(root, names):
    """A small image of its own for each name."""
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(gradient(16, 16, shift=20 * k)).save(root / name)
    return root


def zip_of(folder, prefix=""):
    file = folder.with_name(f"{folder.name}{len(prefix)}.zip")
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, prefix + path.relative_to(folder).as_posix())
    return file


def encrypt(file):
    """Says of the first member of a .zip that it has a password."""
    content = bytearray(file.read_bytes())
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(signature) + offset] |= 1
    file.write_bytes(content)


def content(data):
    return [(data.pixels(i).tobytes(), data.class_names[data.labels[i]]) for i in range(len(data))]


def test_a_zip_holds_what_the_folder_holds(tmp_path):
    root = write(tmp_path / "x", ["cat/1.png", "cat/deep/2.PNG", "dog/1.png", "__MACOSX/cat/1.png", ".hidden/1.png"])
    (root / "cat" / "notes.txt").touch()
    folder = Folder(images=str(root), image_size=16)
    assert [label for _, label in content(folder)] == ["cat", "cat", "dog"]
    for prefix in ("", "x/"):  # zipped inside the folder, or from outside
        assert content(Folder(images=str(zip_of(root, prefix)), image_size=16)) == content(folder)
    (tmp_path / "linked").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "linked" / name).symlink_to(root / name)
    (tmp_path / "linked" / "cat" / "up").symlink_to(tmp_path / "linked")  # leads back, and is not followed
    assert content(Folder(images=str(tmp_path / "linked"), image_size=16)) == content(folder)


@pytest.mark.parametrize(
    "names, classes",
    [
        (["a/1.png", "b/1.png"], ["a", "b"]),
        (["ds/a/1.png", "ds/b/1.png", "README"], ["a", "b"]),  # one folder that holds the class folders
        (["ds/a/1.png"], ["ds"]),  # one class
        (["cat/1.png", "cat/deep/2.png"], ["cat"]),
    ],
)
def test_where_the_classes_are(tmp_path, names, classes):
    root = write(tmp_path / "x", [name for name in names if name != "README"])
    (root / "README").touch()
    for source in (root, zip_of(root)):
        assert Folder(images=str(source), image_size=16).class_names == classes


def test_a_zip_of_windows_and_one_with_a_password(tmp_path):
    root = write(tmp_path / "x", ["a/1.png", "b/1.png"])
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("a", "b"):
            archive.write(root / name / "1.png", f"{name}\\1.png")
    assert Folder(images=str(tmp_path / "x.zip"), image_size=16).class_names == ["a", "b"]
    encrypt(tmp_path / "x.zip")
    with pytest.raises(ValueError, match=r"data\.images '.*x\.zip' is encrypted \('a/1\.png' for one\); unpack it"):
        Folder(images=str(tmp_path / "x.zip"), image_size=16)


def test_a_failing_disk_is_no_unreadable_image(tmp_path):
    data = Folder(images=str(write(tmp_path, ["a/1.png", "b/1.png"])), image_size=16)
    (tmp_path / "a" / "1.png").unlink()
    with pytest.raises(OSError, match="a/1.png' cannot be read: "):
        data.pixels(0)


def test_the_fingerprint_is_of_names_labels_and_contents(tmp_path):
    root = write(tmp_path / "x", ["a/1.png", "b/1.png"])
    before = Folder(images=str(root), image_size=16).fingerprint
    assert Folder(images=str(root), image_size=8).fingerprint == before
    Image.fromarray(gradient(30, 30)).save(root / "b" / "1.png")
    changed = Folder(images=str(root), image_size=16).fingerprint
    (root / "b" / "1.png").rename(root / "b" / "2.png")
    assert len({before, changed, Folder(images=str(root), image_size=16).fingerprint}) == 3


def test_workers_read_a_zip_each_for_itself(tmp_path):
    names = [f"{c}/{i}.png" for c in "ab" for i in range(20)]
    data = Folder(images=str(zip_of(write(tmp_path / "x", names))), image_size=16)
    alone = content(data)
    loader = DataLoader(data, batch_sampler=[[(i, False)] for i in range(40)], num_workers=2)
    assert [(to_uint8(x)[0].tobytes(), data.class_names[y]) for x, y in loader] == alone


FLAT = ["0.png", "1.png", "sub/2.png"]


@pytest.mark.parametrize(
    "file, text, labels, names",
    [
        ("labels.json", '{"0.png": 1, "1.png": 0, "sub/2.png": 1}', [1, 0, 1], ["0", "1"]),
        ("labels.json", '{"0.png": "dog", "1.png": "cat", "sub/2.png": "dog"}', [1, 0, 1], ["cat", "dog"]),
        ("labels.json", '{"labels": [["1.png", 0], ["sub/2.png", 1], ["0.png", 1]]}', [1, 0, 1], ["0", "1"]),
        (
            "labels.json",
            '{"labels": [["1.png", 0], ["sub/2.png", 1], ["0.png", 1]], "class_names": ["dog", "cat", "emu"]}',
            [1, 0, 1],
            ["dog", "cat", "emu"],
        ),
        (
            "labels.json",
            '{"class_names": ["dog", "cat"], "0.png": "dog", "1.png": "cat", "sub/2.png": "dog"}',
            [0, 1, 0],
            ["dog", "cat"],
        ),
        ("labels.csv", "0.png,1\n1.png,0\nsub/2.png,1\n", [1, 0, 1], ["0", "1"]),
        (
            "labels.csv",
            '\ufefffile,label\r\n0.png, "big, dog"\r\n1.png,cat\r\nsub/2.png,cat',
            [0, 1, 1],
            ["big, dog", "cat"],
        ),
        ("labels.csv", "0.png,-1\n1.png,cat\nsub/2.png,cat\n", [0, 1, 1], ["-1", "cat"]),
        ("labels.csv", "0.png,007\n1.png,010\nsub/2.png,007\n", [0, 1, 0], ["007", "010"]),  # names
        ("labels.csv", "0.png,00\n1.png,01\nsub/2.png,01\n", [0, 1, 1], ["0", "1"]),  # numbers, as ever
        ("labels.csv", "0.png,no\n1.png,null\nsub/2.png,1e3\n", [1, 2, 0], ["1e3", "no", "null"]),
    ],
)
def test_classes_of_a_file_of_labels(tmp_path, file, text, labels, names):
    root = write(tmp_path / "x", FLAT)
    (root / file).write_text(text, encoding="utf-8")
    for source in (root, zip_of(root), zip_of(root, "x/")):
        data = Folder(images=str(source), image_size=16)
        assert (data.labels.tolist(), data.class_names) == (labels, names)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ('{"0.png": 0, "1.png": 1}', r"gives 'sub/2\.png' no class \(1 of 3 images have none\)"),
        (
            '{"0.png": 0, "1.png": 1, "sub/2.png": 1, "cat/3.png": 1}',
            r"names 'cat/3\.png', which is not there \(1 of 4",
        ),
        ('{"0.png": 0, "1.png": "a", "sub/2.png": 1}', "neither all whole numbers nor all names"),
        ('{"0.png": 0, "1.png": -1, "sub/2.png": 1}', "image 1 has label -1, but there are 2 classes"),
        (
            '{"labels": [["0.png", 2], ["1.png", 0], ["sub/2.png", 1]], "class_names": ["a", "b"]}',
            "image 0 has label 2, but there are 2 classes",
        ),
        (
            '{"labels": [["0.png", "c"], ["1.png", "a"], ["sub/2.png", "b"]], "class_names": ["a", "b"]}',
            "has the class 'c', which is not one of its class_names",
        ),
        ('{"labels": [["0.png", 0], ["0.png", 1], ["1.png", 0], ["sub/2.png", 0]]}', "names an image twice"),
        ('{"0.png": 0, "1.png": 300000000, "sub/2.png": 1}', "class numbers up to 300000000 with gaps"),
        (
            '{"0.png": 1, "1.png": 2, "sub/2.png": 1}',
            "class numbers up to 2 with gaps; number them from 0, or give names",
        ),
        (f'{{"0.png": 0, "1.png": {2**70}, "sub/2.png": 1}}', "with gaps"),
        ('{"0.png": "", "1.png": "a", "sub/2.png": "b"}', "neither all whole numbers nor all names"),
        ('{"class_names": ["a", "a"], "0.png": "a", "1.png": "a", "sub/2.png": "a"}', "has a class name twice"),
        ('{"class_names": "ab", "0.png": "a", "1.png": "a", "sub/2.png": "a"}', "class_names is no list"),
        ('{"0.png": "a", "0.png": "b", "1.png": "a", "sub/2.png": "a"}', "names an image twice"),
        ('{"class_names": [{"a": 1}], "0.png": 0, "1.png": 0, "sub/2.png": 0}', "class_names is no list of names"),
        ('{"class_names": [], "0.png": 0, "1.png": 0, "sub/2.png": 0}', "class_names is no list of names"),
        ("[1, 2]", "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_file_of_labels_that_does_not_fit(tmp_path, text, sentence):
    (write(tmp_path, FLAT) / "labels.json").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        Folder(images=str(tmp_path), image_size=16)


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.images '.*nowhere' is neither a folder nor a \.zip"):
        Folder(images=str(tmp_path / "nowhere"))
    (tmp_path / "x.zip").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"x\.zip' is not a \.zip file, or is cut short"):
        Folder(images=str(tmp_path / "x.zip"))


def test_a_folder_without_classes_or_with_an_empty_one(tmp_path):
    with pytest.raises(ValueError, match=r"holds no images \(looked for \.png, .* in any letter case"):
        Folder(images=str(tmp_path))
    Image.new("RGB", (8, 8)).save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"images without a class, 'loose.png' and 0 more: .*or write a labels.csv"):
        Folder(images=str(tmp_path))
    (tmp_path / "loose.png").unlink()
    write(tmp_path, ["full/1.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"the class folder '.*empty' holds no images"):
        Folder(images=str(tmp_path))


@pytest.mark.parametrize("size", [0, -3, "abc", 2.5, 100_000])
def test_a_wrong_image_size(folder, size):
    with pytest.raises(ValueError, match=r"data\.image_size is .*; choose a whole number, at least 1"):
        Folder(images=str(folder), image_size=size)


def of_sizes(folder, *sizes):
    (folder / "a").mkdir(parents=True)
    for i, size in enumerate(sizes):
        Image.new("RGB", size).save(folder / "a" / f"{i}.png")
    return folder


def test_without_image_size_it_is_that_of_the_images(tmp_path):
    root = of_sizes(tmp_path / "x", (12, 12), (12, 12), (12, 12))
    for source in (root, zip_of(root)):
        data = Folder(images=str(source))
        assert (data.image_size, data.pixels(2).shape, list(data.notes)) == (12, (12, 12, 3), [])
    (root / "a" / "0.png").write_bytes(b"no image")  # is named when it is read, as ever
    assert Folder(images=str(root)).image_size == 12


@pytest.mark.parametrize(
    "sizes, sentence",
    [
        ([(40, 30)] * 2, "all 2 images have 40x30 pixels, which is no square; give .* --data.image_size 16."),
        (
            [(70, 90), (8, 9), (70, 90), (300, 200)],
            r"4 images have 3 sizes, from 8x9 to 300x200 pixels, most often 70x90 \(2\); .* --data.image_size 64.",
        ),
    ],
)
def test_where_sizes_differ_image_size_has_to_be_given(tmp_path, sizes, sentence):
    root = str(of_sizes(tmp_path / "x", *sizes))
    with pytest.raises(ValueError, match="^data.image_size is not given, and " + sentence):
        Folder(images=root)
    assert Folder(images=root, image_size=16).pixels(0).shape == (16, 16, 3)


def test_of_very_many_images_some_are_looked_at_and_a_note_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "MOST_OPENED", 4)
    data = Folder(images=str(of_sizes(tmp_path / "x", *[(12, 12)] * 10)))
    assert data.notes == ["data.image_size is 12, the size of the 4 of 10 images looked at"]


def test_images_that_are_enlarged_are_warned_of(tmp_path):
    (tmp_path / "a").mkdir()
    for name, size in {"big": (40, 32), "small": (40, 20), "smaller": (18, 19), "broken": None}.items():
        file = tmp_path / "a" / f"{name}.png"
        Image.new("RGB", size).save(file) if size else file.write_bytes(b"no image")
    assert Folder(images=str(tmp_path), image_size=18).notes == []
    (text,) = Folder(images=str(tmp_path), image_size=32).notes
    assert text.startswith("warning: 2 of 3 images looked at are enlarged to data.image_size 32")
    assert text.endswith(f"the smallest has 18x19 pixels, '{tmp_path}/a/smaller.png'")


@pytest.mark.parametrize("name", ["text.jpg", "nothing.png", "tiny.png"])
def test_what_is_no_image_is_named(tmp_path, name):
    root = write(tmp_path, ["a/good.png", f"b/{name}"])
    if name == "tiny.png":
        Image.new("RGB", (1, 1)).save(root / "b" / name)
    else:
        (root / "b" / name).write_bytes(b"hello" if name == "text.jpg" else b"")
    data = Folder(images=str(root), image_size=16)
    assert data.pixels(0).shape == (16, 16, 3)
    with pytest.raises(UnreadableImageError, match=f"b/{name}' cannot be read as an image: "):
        data.pixels(1)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_corrupt_image_is_named(tmp_path, suffix):
    """Cut at every tenth of its length, or with a byte of its body changed: read, or a ValueError with the name."""
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / f"broken.{suffix}"
    Image.fromarray(gradient(64, 64)).save(file)
    whole = file.read_bytes()
    data = Folder(images=str(tmp_path), image_size=32)
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


@pytest.mark.parametrize("processes", [1, 2])
def test_positions_are_where_the_images_stand(processes):
    options = {"num_images": 10, "seed": 3, "flip": True, "start": 2}
    alone = EndlessBatches(batch_size=1, **{**options, "start": 0}, rank=0, num_processes=1)
    order = [batch[0] for batch in itertools.islice(alone, 60)]
    seen = []
    for rank in range(processes):
        batches_of_rank = EndlessBatches(batch_size=4, **options, rank=rank, num_processes=processes)
        for number, batch in zip(range(2, 8), batches_of_rank, strict=False):
            assert batch == [order[p] for p in batches_of_rank.positions(number)]
            seen += batches_of_rank.positions(number)
    assert sorted(seen) == list(range(8, 32))


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
        ImageDataset(np.array([0, label, 2]), ["a", "b", "c"], image_size=8, channels=1, flip=False)
    with pytest.raises(ValueError, match="holds no images"):
        ImageDataset(np.array([]), ["a"], image_size=8, channels=1, flip=False)


# Balanced classes


LABELS = np.repeat([0, 2, 3], [7, 2, 19])  # there is no image of class 1


def test_balanced_classes_are_drawn_equally_often_and_each_image_of_one_too():
    """In 3 r positions each class has r, exactly; and of n images that r draws are of, each has r / n, rounded."""
    rounds = 133
    keys = batches(1, num_images=28, batch_size=3 * rounds, seed=5, flip=True, start=0, labels=LABELS)[0]
    drawn = np.bincount([index for index, _ in keys], minlength=28)
    assert [int(drawn[k == LABELS].sum()) for k in range(4)] == [rounds, 0, rounds, rounds]
    for k in (0, 2, 3):
        each = rounds / (k == LABELS).sum()
        assert {*drawn[k == LABELS]} <= {math.floor(each), math.ceil(each)}
    classes = LABELS[[index for index, _ in keys]].reshape(rounds, 3)
    assert (np.sort(classes, axis=1) == [0, 2, 3]).all()
    assert len({tuple(row) for row in classes.tolist()}) == 6  # in every order
    flips = sum(mirrored for _, mirrored in keys)
    assert abs(flips - 1.5 * rounds) < 4 * math.sqrt(0.75 * rounds)  # 4 deviations of a binomial


def test_balanced_batches_are_a_function_of_seed_and_position():
    options = {"num_images": 28, "seed": 5, "flip": True, "labels": LABELS}
    whole = batches(50, batch_size=4, start=0, **options)
    assert batches(13, batch_size=4, start=37, **options) == whole[37:]
    pairs = zip(*(batches(50, batch_size=4, start=0, rank=r, num_processes=2, **options) for r in (0, 1)), strict=True)
    assert [a + b for a, b in pairs] == whole
    assert batches(50, batch_size=4, start=0, **{**options, "seed": 6}) != whole
