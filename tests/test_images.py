"""The one reader of images: what training takes, the evaluator's reference takes, to the same pixels, and nothing else."""

import io
import os
import pickle
import socket
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

import fid
from vca_engine.images import FORMATS, ImageFiles, UnreadableImageError, files, open_image, read_image
from vca_engine.images.datasets import Folder

SIZE = 32


def noise(width=40, height=36, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, kind, **options):
    file, more = io.BytesIO(), [other.copy() for other in options.pop("append_images", ())]
    image.copy().save(file, kind, append_images=more, **options)  # Pillow leaves its notes in what it saves
    return file.getvalue()


def oriented(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def odd_files():
    """Name -> content: what folders of photographs hold, and what is not to be trained on."""
    rgb, other = Image.fromarray(noise()), Image.fromarray(noise(seed=1))
    frames = {"save_all": True, "append_images": [other]}
    deep, alpha = noise(channels=1).astype(np.uint16) * 257, Image.fromarray(noise(channels=4))
    jpeg = encoded(rgb, "JPEG")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 36\n%%EndComments\nshowpage\n"
    good = {
        "rgb.png": encoded(rgb, "PNG"),
        "UPPER.PNG": encoded(rgb, "PNG"),
        "a.jpg": jpeg,
        "a.JPeG": jpeg,
        "a.jfif": jpeg,
        "a.webp": encoded(rgb, "WEBP", lossless=True),
        "a.bmp": encoded(rgb, "BMP"),
        "a.ppm": encoded(rgb, "PPM"),
        "a.pgm": encoded(rgb.convert("L"), "PPM"),
        "a.tif": encoded(rgb, "TIFF"),
        "a.tiff": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "a.gif": encoded(rgb, "GIF"),
        "grey.png": encoded(rgb.convert("L"), "PNG"),
        "one_bit.png": encoded(rgb.convert("1"), "PNG"),
        "palette.png": encoded(rgb.quantize(16), "PNG", transparency=3),
        "grey_alpha.png": encoded(rgb.convert("LA"), "PNG"),
        "alpha.png": encoded(alpha, "PNG"),
        "deep.png": encoded(Image.fromarray(deep), "PNG"),
        "deep.tiff": encoded(Image.fromarray(deep), "TIFF"),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "turned.jpg": encoded(rgb, "JPEG", exif=oriented(6)),
        "no_turn.jpg": encoded(rgb, "JPEG", exif=oriented(99)),
        "bad_exif.jpg": encoded(rgb, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
        "preview.jpg": encoded(rgb, "MPO", **frames),
        "png_called.jpg": encoded(rgb, "PNG"),
        "wide.png": encoded(Image.fromarray(noise(width=200)), "PNG"),
        "least.png": encoded(Image.fromarray(noise(width=2, height=3)), "PNG"),
    }
    bad = {
        "moving.gif": encoded(rgb, "GIF", **frames),
        "moving.webp": encoded(rgb, "WEBP", **frames),
        "moving.png": encoded(rgb, "PNG", **frames),
        "pages.tiff": encoded(rgb, "TIFF", **frames),
        "one_pixel.png": encoded(Image.fromarray(noise(1, 1)), "PNG"),
        "one_line.png": encoded(Image.fromarray(noise(300, 1)), "PNG"),
        "float.tiff": encoded(Image.fromarray(noise(channels=1).astype(np.float32)), "TIFF"),
        "32_bits.tiff": encoded(Image.fromarray(noise(channels=1).astype(np.int32)), "TIFF"),
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "empty.png": b"",
        "page.jpg": b"<html>404</html>",
        "postscript.png": eps,
        "icon.png": encoded(rgb, "ICO"),
        "huge.png": encoded(Image.new("1", (20_000, 10_000)), "PNG"),
    }
    return good, bad


LEFT_OUT = {
    "notes.txt": b"x",
    "a.heic": b"x",
    "b.png.tmp": b"x",
    ".c.png": b"x",
    "__MACOSX/d.png": b"x",
    "e.jpg~": b"x",
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder and a .zip of all of them, in one class."""
    root, (good, bad) = tmp_path_factory.mktemp("odd"), odd_files()
    for name, content in {**good, **bad, **LEFT_OUT}.items():
        file = root / "x" / "cat" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (root / "x" / "cat" / "linked.png").symlink_to(root / "x" / "cat" / "rgb.png")
    (root / "x" / "cat" / "folder.png").mkdir()  # no image, whatever it is called
    with zipfile.ZipFile(root / "x.zip", "w") as archive:
        for file in sorted((root / "x").rglob("*")):
            archive.write(file, file.relative_to(root / "x"))
    return root


def outcome(read):
    """Pixels, or the sentence of the refusal."""
    try:
        return read()
    except ValueError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", ["x", "x.zip"])
def test_the_reference_is_of_the_training_set(odd, name):
    """Both ways: what is trained on is measured, to the last bit, and what is refused here is refused there."""
    good, bad = odd_files()
    trained, reference = Folder(images=str(odd / name), image_size=SIZE), fid.Images(odd / name, crop=SIZE)
    expected = sorted(f"cat/{file}" for file in (*good, *bad, "linked.png"))
    assert reference._reader.names == expected
    assert trained.names == expected
    for i, file in enumerate(file.removeprefix("cat/") for file in expected):
        mine, theirs = outcome(lambda i=i: trained.pixels(i)), outcome(lambda i=i: reference.take([i])[0])
        if file in bad:
            assert mine == theirs, file
            assert f"cat/{file}' cannot be read as an image: " in mine
        else:
            assert mine.shape == (SIZE, SIZE, 3), mine
            assert np.array_equal(mine, theirs.permute(1, 2, 0).numpy()), file


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_zip_is_read_to_the_pixels_of_its_folder(odd):
    folder, packed = (fid.Images(odd / name, crop=SIZE) for name in ("x", "x.zip"))
    good, _ = odd_files()
    for i, name in enumerate(folder._reader.names):
        if name.removeprefix("cat/") in good:
            assert np.array_equal(folder.take([i])[0], packed.take([i])[0]), name


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_samples_are_taken_as_they_are_or_refused(odd):
    """Without a crop nothing is turned or scaled; what no image is, is none here, too."""
    samples, (good, bad) = fid.Images(odd / "x", mixed_sizes=True), odd_files()
    found = {
        n.removeprefix("cat/"): outcome(lambda i=i: samples.take([i])[0]) for i, n in enumerate(samples._reader.names)
    }
    refused = {name for name, what in found.items() if isinstance(what, str)}
    small = {"one_pixel.png", "one_line.png"}  # of their own size they are images
    assert refused == (set(bad) - small) | {"deep.png", "deep.tiff"}
    assert np.array_equal(found["a.gif"].permute(1, 2, 0), Image.open(io.BytesIO(good["a.gif"])).convert("RGB"))
    assert found["turned.jpg"].shape == (3, 36, 40)
    for name in ("moving.gif", "moving.png", "pages.tiff"):
        assert "it is animated, or has several pages (2)" in found[name]
    for name in ("palette.png", "alpha.png"):  # laid on white, as training does
        assert np.array_equal(found[name].permute(1, 2, 0), read_image(io.BytesIO(good[name]))), name


def test_no_format_of_pillow_that_runs_a_program_is_opened(monkeypatch):
    """Ghostscript would be started for an EPS, whatever the file is called."""
    _, bad = odd_files()
    Image.init()
    for kind in set(Image.OPEN) - {*FORMATS, "MPO"}:
        monkeypatch.setitem(Image.OPEN, kind, (lambda *_: pytest.fail("opened"), None))
    for name in ("postscript.png", "icon.png"):
        with pytest.raises(ValueError, match="it is in none of the formats PNG, JPEG"):
            open_image(io.BytesIO(bad[name]))


def test_a_strip_that_would_fill_the_memory_is_refused(tmp_path):
    Image.new("1", (2_000_000, 20)).save(tmp_path / "x.png")  # 256 x 25,600,000 pixels when it is brought to 256
    with pytest.raises(UnreadableImageError, match=r"x\.png' cannot be read as an image: .* too long a strip for 256"):
        ImageFiles(tmp_path).pixels("x.png", 256)


def special(path, kind):
    """A file that cannot be read to its end, or does not begin."""
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path)
    elif kind == "device":
        os.symlink("/dev/zero", path)
    elif kind == "link":
        os.mkfifo("pipe")
        os.symlink(os.path.abspath("pipe"), path)
    else:
        os.mkfifo(path)


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "link"])
def test_special_files_are_refused_when_the_folder_is_listed(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket has at most 108 bytes
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save("a/good.png")
    special("a/x.png", kind)
    for read in (lambda: Folder(images="."), lambda: fid.Images(".", crop=8), lambda: fid.Images(".")):
        with pytest.raises(
            ValueError, match=r"a/x\.png' is no file but a FIFO, a device or a socket, or a link to one"
        ):
            read()
    os.rename("a/x.png", "a/x")  # what is not called as an image is nobody's business
    assert ImageFiles(".").names == ["a/good.png"]
    os.rename("a/x", "labels.csv")
    with pytest.raises(ValueError, match="labels.csv' is no file"):
        Folder(images=".")
    for name in ("pipe.zip", "pipe.npz"):
        os.mkfifo(name)
        with pytest.raises(ValueError, match="is neither a folder or .zip of images nor"):
            fid.Images(name)
        with pytest.raises(FileNotFoundError, match="is neither a folder nor a .zip file"):
            Folder(images=name)


def test_links_that_lead_nowhere_are_taken_and_named_when_they_are_read(tmp_path):
    """As a file that has gone: its disk may be away for now, which is no damage of an image."""
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "dead.png").symlink_to("/nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    found = ImageFiles(tmp_path)
    assert found.names == ["dead.png", "good.png", "loop.png"]
    for name in ("dead.png", "loop.png"):
        with pytest.raises(OSError, match=f"{name}' cannot be read: "):
            found.pixels(name, 8)


def test_an_ordinary_file_is_not_asked_for_more_than_its_folder_says(tmp_path, monkeypatch):
    """A million calls of stat take minutes on a network's disk."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(20):
            (tmp_path / name / f"{i}.png").touch()
    stat, asked = os.stat, []
    monkeypatch.setattr(
        os, "stat", lambda path, *rest, **options: (asked.append(path), stat(path, *rest, **options))[1]
    )
    assert len(files._walk(str(tmp_path))) == 42
    assert sorted(asked) == [str(tmp_path), f"{tmp_path}/a", f"{tmp_path}/b"]


def test_files_of_gigabytes_are_refused_and_not_read(tmp_path):
    (tmp_path / "x").mkdir()
    with (tmp_path / "x" / "a.png").open("wb") as file:
        file.truncate(3 * 2**30)  # takes no room
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", b"x")
        archive.writestr("b.png", encoded(Image.new("RGB", (8, 8)), "PNG"))
    content = bytearray((tmp_path / "x.zip").read_bytes())
    at = content.index(b"PK\1\2") + 24
    content[at : at + 4] = (3 * 2**30).to_bytes(4, "little")  # what the directory says that it unpacks to
    (tmp_path / "x.zip").write_bytes(content)
    for name in ("x", "x.zip"):
        found = ImageFiles(tmp_path / name)
        with pytest.raises(UnreadableImageError, match=r"a\.png' has 3\.0 GiB; no image file has more than 1"):
            found.read("a.png")
    assert found.pixels("b.png", 8).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["a/1.png", "../2.png"], r"holds '\.\./2\.png', which leads out of its folder"),
        (["a/1.png", "b/../../2.png"], "which leads out of its folder"),
        (["a/1.png", "/etc/2.png"], r"holds '/etc/2\.png', which leads out of its folder"),
        (["a/1.png", "C:\\b\\2.png"], "which leads out of its folder"),
        (["a/1.png", "a/1.png"], r"holds 'a/1\.png' twice"),
        (["a/1.png", "a\\1.png"], r"holds 'a/1\.png' twice"),
        (["a/1.png", "./a//1.png"], r"holds 'a/1\.png' twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zips_whose_names_no_folder_can_have_are_refused(tmp_path, names, sentence):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for k, name in enumerate(names):
            archive.writestr(name, encoded(Image.new("RGB", (8, 8), (k, 0, 0)), "PNG"))
    for read in (lambda: Folder(images=str(tmp_path / "x.zip")), lambda: fid.Images(tmp_path / "x.zip")):
        with pytest.raises(ValueError, match=sentence):
            read()


def test_it_may_be_handed_to_another_process(odd):
    for name in ("x", "x.zip"):
        here = ImageFiles(odd / name)
        here.pixels("cat/rgb.png", SIZE)
        there = pickle.loads(pickle.dumps(here))
        assert there.names == here.names
        assert np.array_equal(there.pixels("cat/rgb.png", SIZE), here.pixels("cat/rgb.png", SIZE))


def test_a_large_file_that_is_no_image_is_not_read(tmp_path):
    """Half a gibibyte of zeros, in a folder and in a .zip of 64 KB, is refused by its first bytes."""
    with (tmp_path / "zeros.png").open("wb") as file:
        file.truncate(2**29)
    with (
        zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("zeros.png", "w") as member,
    ):
        for _ in range(64):
            member.write(bytes(2**20))
    for root in (tmp_path, tmp_path / "x.zip"):
        tracemalloc.start()
        with pytest.raises(UnreadableImageError, match="zeros.png' cannot be read as an image: it is in none"):
            ImageFiles(root).pixels("zeros.png", 16)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**22
