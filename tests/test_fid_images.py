"""Every kind of input, by its content; statistics of every tool; and the sentence for each mistake."""

import io
import math
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fid
from fid.references import holds_statistics
from vca_engine.images import SUFFIXES, as_nchw, centre_crop, check_uint8
from vca_engine.images import datasets as data


def random_images(num, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num, size, size, 3), dtype=np.uint8)


def write_pngs(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:04}.png")
    return folder


def read_all(source, num=None, batch_size=4, **options):
    batches = [batch for _, batch in fid.Images(source, num, **options).batches(batch_size)]
    return torch.cat(batches).permute(0, 2, 3, 1).numpy()


def zip_of(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder))
    return path


# Images


def test_every_input_holds_the_same_images(tmp_path):
    images = random_images(10)
    np.save(tmp_path / "x.npy", images)
    np.savez(tmp_path / "x.npz", images, np.arange(10))
    np.savez_compressed(tmp_path / "y.npz", images)
    write_pngs(tmp_path / "folder" / "b", images[5:])
    write_pngs(tmp_path / "folder" / "a", images[:5])
    zipped = zip_of(tmp_path / "folder", tmp_path / "x.zip")
    sources = [tmp_path / "x.npy", tmp_path / "x.npz", str(tmp_path / "y.npz"), tmp_path / "folder", zipped]
    (tmp_path / "links").mkdir()
    for name in ("a", "b"):
        (tmp_path / "links" / name).symlink_to(tmp_path / "folder" / name)
    sources.append(tmp_path / "links")
    sources += [images, torch.from_numpy(images), torch.from_numpy(images).permute(0, 3, 1, 2)]
    for source in sources:
        assert np.array_equal(read_all(source), images)
        assert np.array_equal(read_all(source, num=7), images[:7])
        again = fid.Images(source)
        assert np.array_equal(torch.stack(again.take([3, 8])).permute(0, 2, 3, 1).numpy(), images[[3, 8]])
        assert np.array_equal(torch.stack(again.take([0])).permute(0, 2, 3, 1).numpy(), images[:1])
    kinds = ["npy", "npz", "npz", "folder", "zip", "folder", "tensor", "tensor", "tensor"]
    assert [fid.Images(source).kind for source in sources] == kinds
    assert [len(batch) for _, batch in fid.Images(images).batches(4)] == [4, 4, 2]


@pytest.mark.parametrize("kind", ["folder", "zip", "npz", "tensor"])
def test_two_processes_share_the_batches(kind, tmp_path):
    images = random_images(11)
    write_pngs(tmp_path / "folder", images)
    np.savez_compressed(tmp_path / "x.npz", images)
    zip_of(tmp_path / "folder", tmp_path / "x.zip")
    source = {"folder": tmp_path / "folder", "zip": tmp_path / "x.zip", "npz": tmp_path / "x.npz", "tensor": images}[
        kind
    ]
    seen = {}
    for rank in range(2):
        for index, batch in fid.Images(source).batches(3, rank, 2):
            assert int(index[0]) // 3 % 2 == rank
            seen |= dict(zip(index.tolist(), batch.permute(0, 2, 3, 1).numpy(), strict=True))
    assert sorted(seen) == list(range(11))
    assert all(np.array_equal(seen[i], images[i]) for i in seen)


def test_labels_of_class_folders_and_of_npz(tmp_path):
    images = random_images(6)
    np.savez(tmp_path / "x.npz", images, np.array([2, 0, 1, 2, 2, 1]))
    assert fid.Images(tmp_path / "x.npz", 4).labels.tolist() == [2, 0, 1, 2]
    for name, part in (("cat", images[:2]), ("dog", images[2:])):
        write_pngs(tmp_path / "classes" / name, part)
    assert fid.Images(tmp_path / "classes").labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert fid.Images(zip_of(tmp_path / "classes", tmp_path / "x.zip")).labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert fid.Images(tmp_path / "classes").first(3).warnings() == []
    assert "the first 2 images of" in fid.Images(tmp_path / "classes").first(2).warnings()[0]
    assert "are of 1 of its 2 classes only" in fid.Images(tmp_path / "classes").first(2).warnings()[0]
    assert fid.Images(tmp_path / "classes" / "cat").labels is None
    np.savez(tmp_path / "x.npz", images, np.array([{}] * 6, dtype=object))
    assert fid.Images(tmp_path / "x.npz").labels is None
    Image.fromarray(images[0]).save(tmp_path / "classes" / "dog" / "z.jpg")
    assert [fid.Images(tmp_path / "classes").first(n).lossy for n in (6, 7)] == [False, True]
    assert fid.Images(images).labels is None


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".PNG", ".JPEG"])
def test_every_suffix_in_any_letter_case(suffix, tmp_path):
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / f"x{suffix}")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "._x.png").touch()  # what some archives leave behind
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "y.png").touch()
    assert np.abs(read_all(tmp_path).astype(int) - 200).max() <= 2
    images = fid.Images(tmp_path)
    assert images.lossy == (suffix.lower() in (".jpg", ".jpeg", ".jfif", ".webp"))


def test_grey_is_read_as_rgb_and_said(tmp_path):
    grey = random_images(3)[..., :1]
    np.savez(tmp_path / "x.npz", grey)
    write_pngs(tmp_path / "folder", grey[..., 0])
    for source in (tmp_path / "x.npz", tmp_path / "folder"):
        images = fid.Images(source)
        found = torch.cat([batch for _, batch in images.batches(2)]).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(found, grey.repeat(3, axis=3))
        assert "grey; they were taken as RGB" in " ".join(images.warnings())


def test_mixed_sizes_when_they_are_asked_for(tmp_path):
    write_pngs(tmp_path, random_images(3))
    Image.new("RGB", (8, 12)).save(tmp_path / "odd.png")
    (index, batch), *_ = fid.Images(tmp_path, mixed_sizes=True).batches(8)
    assert index.tolist() == [0, 1, 2, 3]
    assert [tuple(image.shape) for image in batch] == [(3, 16, 16)] * 3 + [(3, 12, 8)]


@pytest.mark.parametrize("shape", [(40, 30), (200, 65), (33, 32), (17, 90), (32, 32)])
def test_crop_is_that_of_training(shape, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = centre_crop(Image.fromarray(pixels), 32)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    np.save(tmp_path / "x.npy", pixels[None])
    for source in (tmp_path, tmp_path / "x.npy", pixels[None]):
        assert np.array_equal(read_all(source, crop=32)[0], expected)


def test_with_a_crop_files_are_read_as_in_training(tmp_path):
    """Turned by the camera, 16 bits, transparent, CMYK: the pixels of training's own reader, whatever the file."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "x").mkdir()
    Image.fromarray(pixels[..., :3]).save(tmp_path / "x" / "a.jpg", exif=exif)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "x" / "b.png")
    Image.fromarray(pixels).save(tmp_path / "x" / "c.png")
    Image.fromarray(pixels[..., :3]).convert("CMYK").save(tmp_path / "x" / "d.jpg")
    Image.fromarray(pixels[..., :3]).convert("P").save(tmp_path / "x" / "e.png", transparency=3)
    Image.fromarray(pixels[..., :2], "LA").save(tmp_path / "x" / "f.png")
    trained = data.Folder(images=str(tmp_path), image_size=32)
    expected = np.stack([trained.pixels(i) for i in range(6)])
    assert np.array_equal(read_all(tmp_path / "x", crop=32), expected)
    assert np.array_equal(read_all(zip_of(tmp_path / "x", tmp_path / "x.zip"), crop=32), expected[[1, 2, 4, 5]])


def test_quantize_is_the_rule_of_dit():
    x = torch.tensor([-1.0039, -1, -0.5, 0, 0.5, 1, 1.0039])
    assert fid.quantize(x).tolist() == [0, 0, 64, 128, 191, 255, 255]
    assert fid.quantize(x.numpy()).tolist() == fid.quantize(x).tolist()
    steps = torch.arange(256) / 127.5 - 1
    for dtype in (torch.float32, torch.float64):
        assert fid.quantize(steps.to(dtype)).tolist() == list(range(256))
    assert fid.quantize(torch.empty(0, 3, 8, 8)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ([math.nan, 0], r"\[nan, nan\]\. They hold NaN or infinite values"),
        ([0, math.inf], r"\[0, inf\]\. They hold NaN or infinite values"),
        ([-1.004, 0], r"\[-1\.004, 0\]\. No convention .* clamp: fid\.quantize\(x\.clamp\(-1, 1\)\)"),
        ([-0.5, 1.004], r"\[-0\.5, 1\.004\]\. No convention .* fid\.quantize\(x\.clamp\(-1, 1\)\)"),
        ([0.0, 254.7], r"\[0, 254\.7\]\. Convert with x\.round\(\)\.to\(torch\.uint8\)"),
    ],
)
def test_quantize_refuses_what_it_would_clamp(wrong, sentence):
    """That is below -1 - 1/255 = -1.00392, and from 1 + 1/255 on, where there is no level of uint8."""
    with pytest.raises(ValueError, match=f"fid.quantize takes images in .-1, 1.; got float32 in {sentence}"):
        fid.quantize(torch.tensor(wrong))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_quantize_is_for_floating_point(dtype):
    with pytest.raises(ValueError, match=rf"floating-point images in \[-1, 1\]; got {str(dtype)[6:]}"):
        fid.quantize(torch.ones(2, dtype=dtype))


RANGES = [
    (-1, 1, "Convert with fid.quantize(x), which"),
    (-0.2, 0.7, "Convert with fid.quantize(x), which"),
    (0, 1, "Convert with fid.quantize(2 * x - 1), if"),
    (0.1, 0.9, "Convert with fid.quantize(2 * x - 1), if"),
    (0, 255, "Convert with x.round().{}, if"),
    (3, 90, "Convert with x.round().{}, if"),
    (0, 1.3, "No convention of images with this range is known"),
    (-2.1, 2.6, "No convention of images with this range is known"),
    (-128, 127, "No convention of images with this range is known"),
    (0, 256, "No convention of images with this range is known"),
    (0, math.nan, "They hold NaN or infinite values"),
    (-math.inf, 0, "They hold NaN or infinite values"),
]


@pytest.mark.parametrize(("low", "high", "sentence"), RANGES)
def test_advice_is_by_the_range_and_followed_gives_the_image(low, high, sentence, tmp_path):
    """A tensor and an array, in memory, in a batch for the evaluator, and in a file."""
    pixels = np.arange(192).reshape(1, 8, 8, 3)
    x = np.linspace(0, 1, 192, dtype=np.float32).reshape(1, 8, 8, 3) * (high - low if math.isfinite(high - low) else 1)
    x += low if math.isfinite(low) else 0
    x[0, 0, 0, 0], x[0, -1, -1, -1] = low, high
    np.save(tmp_path / "x.npy", x)
    for source in (torch.from_numpy(x), x, tmp_path / "x.npy"):
        form = "to(torch.uint8)" if isinstance(source, torch.Tensor) else "astype(np.uint8)"
        for take in [fid.Images] if isinstance(source, Path) else [fid.Images, as_nchw]:
            with pytest.raises(ValueError, match=r"expected uint8 images .* got float32") as said:
                take(source)
            assert sentence.format(form) in str(said.value)
            if "Convert" in sentence:
                code = str(said.value).partition("Convert with ")[2].partition(", ")[0]
                x_of = {"x": torch.from_numpy(x) if isinstance(source, torch.Tensor) else x}
                found = np.asarray(eval(code, {"fid": fid, "torch": torch, "np": np, **x_of}))
                least = {-1: -1, -0.2: -1, 0: 0, 0.1: 0, 3: 0}[low]
                exact = 127.5 * (x + 1) if least else 255 * x if high <= 1 else x
                assert found.dtype == np.uint8
                assert np.abs(found - exact.astype(np.float64)).max() <= 0.5 + 1e-4  # to the nearest; float32 rounds
                assert found.shape == pixels.shape


@pytest.mark.parametrize("num", [0, -1, 4])
def test_num_out_of_range(num):
    with pytest.raises(ValueError, match=f"cannot take {num} images of a tensor, which holds 3"):
        fid.Images(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), num)


def test_what_is_no_uint8():
    with pytest.raises(ValueError, match=r"got float32 in \[-1\.00, 1\.00\]\. Convert with fid\.quantize\(x\)"):
        check_uint8(torch.tensor([-1.0, 1.0]).expand(1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"got int64 in \[3\.00, 7\.00\]\. .* convert with x\.to\(torch\.uint8\)"):
        check_uint8(torch.tensor([3, 7]).expand(1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"got uint16 in \[0\.00, 300\.00\]\.$"):
        as_nchw(np.array([[[[0, 300]]]], np.uint16))
    with pytest.raises(ValueError, match=r"expected uint8 images \(B, 3, H, W\); got \(1, 4, 2, 2\)"):
        check_uint8(torch.zeros(1, 4, 2, 2, dtype=torch.uint8))


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        fid.Images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="found no files"):
        fid.Images(tmp_path)
    np.save(tmp_path / "x.npy", 0)
    with pytest.raises(
        ValueError,
        match=r"looked for \.png, .*any letter case, recursively\); found 1 \*\.npy. Did you mean an .npz with",
    ):
        fid.Images(tmp_path)
    (tmp_path / "x.txt").touch()
    with pytest.raises(ValueError, match="neither a folder or .zip of images nor"):
        fid.Images(tmp_path / "x.txt")
    (tmp_path / "x.zip").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is not a .zip file"):
        fid.Images(tmp_path / "x.zip")


def test_transparent_images_are_laid_on_white_as_in_training(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGBA", (8, 8), (10, 20, 30, 40)).save(tmp_path / "a" / "x.png")  # 40 of 255 parts colour, the rest white
    images = fid.Images(tmp_path)
    ((_, batch),) = images.batches(8)
    assert batch[0, :, 0, 0].tolist() == [217, 218, 220]
    assert np.array_equal(batch[0].permute(1, 2, 0), data.Folder(images=str(tmp_path), image_size=8).pixels(0))
    assert "are transparent; they were laid on white, as training does" in images.warnings()[0]
    assert read_all(tmp_path, drop_alpha=True)[0, 0, 0].tolist() == [10, 20, 30]


def test_image_files_that_are_refused(tmp_path):
    folder = write_pngs(tmp_path / "sizes", random_images(2))
    Image.new("RGB", (8, 12)).save(folder / "odd.png")
    with pytest.raises(ValueError, match=r"0000\.png' is 16x16, '.*odd\.png' is 8x12. Pass --mixed-sizes"):
        read_all(folder)

    folder = write_pngs(tmp_path / "damaged", random_images(2))
    whole = (folder / "0001.png").read_bytes()
    for broken in (whole[:200], b"nonsense", b""):
        (folder / "0001.png").write_bytes(broken)
        with pytest.raises(ValueError, match=r"0001\.png' cannot be read as an image: "):
            read_all(folder)

    (tmp_path / "deep").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep" / "x.png")
    with pytest.raises(ValueError, match=r"has mode I;16; convert it to 8-bit"):
        read_all(tmp_path / "deep")


def test_links_that_lead_back_are_not_followed(tmp_path):
    folder = write_pngs(tmp_path / "x" / "c", random_images(2))
    (folder / "up").symlink_to(tmp_path / "x")
    (folder / "me").symlink_to(folder)
    (tmp_path / "x" / "twice").symlink_to(folder)  # another name of the same folder holds its images once more
    assert fid.Images(tmp_path / "x").num == 4
    other = tmp_path / "other"
    other.mkdir()
    (other / "back").symlink_to(tmp_path / "x")
    (folder / "round").symlink_to(other)  # a circle through two links
    assert fid.Images(tmp_path / "x").num == 4


def test_zips_of_every_make(tmp_path):
    """Names as some tools write them."""
    folder = write_pngs(tmp_path / "x", random_images(3))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, kind in (("./a/0.png", 0), ("a//1.png", 8), ("b\\2.png", 14)):
            archive.write(folder / f"000{name[-5]}.png", name, compress_type=kind)
    images = fid.Images(tmp_path / "x.zip")
    assert np.array_equal(read_all(tmp_path / "x.zip"), random_images(3))
    assert images.labels.tolist() == [0, 0, 1]


def test_a_folder_that_changes_while_it_is_read(tmp_path):
    folder = write_pngs(tmp_path / "x", random_images(6))
    images = fid.Images(folder)
    assert images.warnings() == []
    Image.fromarray(random_images(1)[0]).save(folder / "later.png")
    assert "changed while it was read: 1 images came and 0 went" in images.warnings()[0]
    os.remove(folder / "0003.png")
    with pytest.raises(OSError, match=r"0003\.png' cannot be read: No such file"):
        list(images.batches(2))


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (
            np.zeros((2, 8, 8, 3), np.float32),
            r"got float32 \(2, 8, 8, 3\), the first in \[0.00, 0.00\]. Convert with fid.quantize",
        ),
        (np.zeros((2, 3, 8, 8), np.uint8), r"got uint8 \(2, 3, 8, 8\)\. The channels come last: transpose it"),
        (np.zeros((2, 8, 8, 4), np.uint8), r"got uint8 \(2, 8, 8, 4\)"),
        (np.zeros((8, 8, 3), np.uint8), r"got uint8 \(8, 8, 3\)"),
        (np.asfortranarray(random_images(2)), r"got uint8 \(2, 16, 16, 3\) in Fortran order"),
    ],
)
def test_arrays_that_are_refused(array, sentence, tmp_path):
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", array)
    for name in ("x.npy", "x.npz"):
        with pytest.raises(ValueError, match=rf"expected uint8 images \(N, H, W, 3\).*{name}'; {sentence}"):
            fid.Images(tmp_path / name)


def test_array_files_that_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", mu=0, sigma=1)
    with pytest.raises(ValueError, match=r"has no arr_0, where images are looked for, but \['mu', 'sigma'\]"):
        fid.Images(tmp_path / "x.npz")
    for name in ("x.npz", "x.npy"):
        (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(ValueError, match="is not an .npz file|is not in numpy's format"):
            fid.Images(tmp_path / name)
    np.save(tmp_path / "cut.npy", random_images(4))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-10])
    with pytest.raises(ValueError, match="cut.npy' is cut short: its 4 images take 3,200 bytes, and there are 3,190"):
        fid.Images(tmp_path / "cut.npy")


@pytest.mark.parametrize("shape", [(10**9, 8, 8, 3), (10**9, 0, 8, 3), (2, 0, 8, 3), (2, 8, 0, 1), (-1, 8, 8, 3)])
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_an_array_that_is_not_what_its_header_claims_is_refused_at_once(tmp_path, shape, kind):
    """A file of 128 bytes, of which none but the header is read."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    (tmp_path / "x.npy").write_bytes(header.getvalue())
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.write(tmp_path / "x.npy", "arr_0.npy")
    with pytest.raises(
        ValueError, match=r"is cut short: its 1,000,000,000 images|expected uint8 images \(N, H, W, 3\)"
    ):
        fid.Images(tmp_path / f"x.{kind}")


def test_labels_of_another_size_than_their_header_claims_are_not_read(tmp_path):
    header, images = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (2,)})
    np.save(images, np.zeros((2, 4, 4, 3), np.uint8))
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", images.getvalue())
        archive.writestr("arr_1.npy", header.getvalue() + bytes(10**8))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"arr_1 of '.*' take 144 bytes, and there are 100,000,128"):
        fid.Images(tmp_path / "x.npz")
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


def test_images_in_memory_without_pixels_are_refused():
    for shape in ((2, 3, 0, 8), (2, 3, 8, 0)):
        with pytest.raises(ValueError, match="expected uint8 images"):
            fid.Images(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize("damage", ["checksum", "password"])
@pytest.mark.parametrize("name", ["arr_0", "arr_1"])
def test_a_damaged_npz_ends_in_a_sentence(tmp_path, damage, name):
    file = tmp_path / "x.npz"
    np.savez(file, random_images(2), np.arange(2))
    content = bytearray(file.read_bytes())
    at = content.index(b"PK\1\2", content.index(b"PK\1\2") + (name == "arr_1"))  # its entry in the directory
    content[at + (16 if damage == "checksum" else 8)] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.npz' (cannot be unpacked|is not in numpy's format): .*(CRC|encrypted)"):
        read_all(file)


# References


def moments(dim=5, seed=0):
    x = np.random.default_rng(seed).normal(size=(20, dim))
    return x.mean(0), np.cov(x, rowvar=False)


def test_our_own_file(tmp_path):
    (mean, cov), (mean_s, cov_s) = moments(), moments(7, seed=1)
    parts = {"features": fid.Statistics(mean, cov, 20), "spatial": fid.Statistics(mean_s, cov_s, 20)}
    made = fid.Reference("made here", "fid", parts, 20, None, "judge-12345678", "adm", 16)
    fid.save_reference(tmp_path / "x.npz", made, random_images(3))
    found = fid.load_ref(tmp_path / "x.npz")
    assert np.array_equal(found.statistics["features"].cov, cov)
    assert np.array_equal(found.statistics["spatial"].mean, mean_s)
    assert (found.kind, found.num_images, found.extractor, found.preset) == ("fid", 20, "judge-12345678", "adm")
    assert found.crop == 16
    assert np.array_equal(torch.stack(found.images.take([1])).permute(0, 2, 3, 1).numpy(), random_images(3)[1:2])
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]  # nothing temporary is left
    assert len(found.sha256) == 64


def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    parts = {"features": fid.Statistics(*moments())}
    made = fid.Reference("made here", "fid", parts, 2)
    fid.save_reference(tmp_path / "x.npz", made)
    before = (tmp_path / "x.npz").read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="cannot write '.*x.npz': no space left"):
        fid.save_reference(tmp_path / "x.npz", made)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]


def test_files_of_other_tools(tmp_path):
    mean, cov = moments()
    single = {"mu": mean.astype(np.float32), "sigma": cov.astype(np.float32)}
    np.savez_compressed(tmp_path / "pytorch_fid.npz", mu=mean, sigma=cov)
    np.savez(tmp_path / "meanflow.npz", ref_mu=mean, ref_sigma=cov)
    np.savez(tmp_path / "adm.npz", **single, mu_s=mean, sigma_s=cov, arr_0=random_images(4))
    torch.save({"mu": mean, "sigma": cov}, tmp_path / "torch_fidelity.pt")
    edm2 = {"num_images": 9, "fid": {"mu": mean, "sigma": cov}, "fd_dinov2": {"mu": mean + 1, "sigma": cov}}
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps(edm2))
    kinds = {"pytorch_fid.npz": "npz", "meanflow.npz": "npz", "adm.npz": "adm", "torch_fidelity.pt": "torch-fidelity"}
    for name, kind in {**kinds, "edm2.pkl": "edm2"}.items():
        assert holds_statistics(tmp_path / name)
        found = fid.load_ref(tmp_path / name)
        np.testing.assert_allclose(found.statistics["features"].mean, mean, rtol=1e-6)
        assert found.statistics["features"].cov.dtype == np.float64
        assert (found.kind, found.extractor, found.num_images) == (kind, None, 9 if kind == "edm2" else None)
    assert fid.load_ref(tmp_path / "adm.npz").images.num == 4
    assert "spatial" in fid.load_ref(tmp_path / "adm.npz").statistics
    other = fid.load_ref(tmp_path / "edm2.pkl", "FD-DINOv2").statistics["features"]
    np.testing.assert_allclose(other.mean, mean + 1)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "edm2.pkl").write_bytes(pickle.dumps(edm2, protocol))
        assert fid.load_ref(tmp_path / "edm2.pkl").num_images == 9


class Malicious:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_code_in_a_file_is_run(tmp_path):
    bad = Malicious()
    bad.path = str(tmp_path / "harm")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"fid": bad}))
    torch.save({"mu": bad}, tmp_path / "x.pt")
    np.savez(tmp_path / "x.npz", mu=np.array([bad]), sigma=np.eye(1))
    for name, sentence in (
        ("x.pkl", "nothing in it was run: it names posix.mkdir"),
        ("x.pt", "nothing in it"),
        ("x.npz", "be read"),
    ):
        with pytest.raises(ValueError, match=sentence):
            fid.load_ref(tmp_path / name)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"arr_0": np.zeros((1, 8, 8, 3), np.uint8)}, "holds images: run `python -m fid stats`"),
        ({"reps": np.zeros((3, 4))}, "holds features, not statistics"),
        ({"mu": np.zeros(2)}, r"no mu and sigma, but \['mu'\]"),
        ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"a mean \(2,\) and a covariance \(3, 3\)"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.inf)}, "NaN or infinite"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 1], [0, 1]])}, "not symmetric"),
    ],
)
def test_load_ref_refuses(arrays, sentence, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=sentence):
        fid.load_ref(tmp_path / "x.npz")


def test_load_ref_refuses_what_is_no_statistics(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.npz' do not exist"):
        fid.load_ref(tmp_path / "x.npz")
    for name, sentence in (
        ("x.npz", "is not an .npz"),
        ("x.pkl", "not a file of statistics"),
        ("x.pt", "not a PyTorch file"),
    ):
        (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(ValueError, match=sentence):
            fid.load_ref(tmp_path / name)
    for content in ({"fd_dinov2": {}}, {"fid": 3}, {"fid": None}):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match="has no 'fid' with mu and sigma, but"):
            fid.load_ref(tmp_path / "x.pkl")
    for content in (b"", b"hello world\n", b"<!DOCTYPE html>", pickle.dumps([1])):
        for name in ("x.pkl", "x.pt"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match="not a file of|not a PyTorch file|holds a list"):
                fid.load_ref(tmp_path / name)


class Called:
    """Pickled, it is a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


RECORD = Called(np.dtype, ("V8", False, True), (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0))
FROMBUFFER = np.zeros(1).__reduce_ex__(5)[0]


@pytest.mark.parametrize(
    "harm",
    [
        Called(np.ndarray, ((1,), "O", b"A" * 8)),  # an object at the address AAAAAAAA
        Called(FROMBUFFER, (b"A" * 8, np.dtype("O"), (1,), "C")),
        Called(FROMBUFFER, (b"A" * 8, RECORD, (1,), "C")),
        Called(type(np.float64(1)).__reduce__(np.float64(1))[0], (np.dtype("O"), b"A" * 8)),
        np.array([{}], dtype=object),
        np.zeros(1, dtype=[("a", "f8")]),
        np.array(["text"]),
    ],
)
def test_no_address_in_a_file_is_followed(tmp_path, harm):
    """In a process of its own: what follows one is killed by the system."""
    content = {"fid": {"mu": harm, "sigma": np.eye(1)}}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, 2))
    torch.save(content["fid"], tmp_path / "x.pt")
    for name in ("x.pkl", "x.pt"):
        child = os.fork()
        if child == 0:
            try:
                fid.load_ref(tmp_path / name)
            except ValueError as error:
                os._exit(0 if "nothing in it was run" in str(error) else 2)
            os._exit(3)
        assert os.waitpid(child, 0)[1] == 0
