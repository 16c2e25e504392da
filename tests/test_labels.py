"""Which class each image is of: label files of every origin, names however they are written, and nothing left unsaid."""

import json
import os
import unicodedata
import zipfile

import numpy as np
import pytest
from PIL import Image

import fid
from vca_engine import assemble
from vca_engine.config.cli import parse
from vca_engine.config.schema import Config
from vca_engine.images import SUFFIXES, files
from vca_engine.images.datasets import Folder
from vca_engine.sampling.classes import find_class

NFC, NFD = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")


def make(root, names, texts=()):
    """Small images of these names, and files of these texts."""
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 9 * k, np.uint8)).save(root / name)
    for name, text in dict(texts).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8", newline="")
    return root


def zipped(root):
    file = root.with_suffix(".zip")
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(root.rglob("*")):
            if path.is_file():  # as StyleGAN's tool does, which writes no folders
                archive.write(path, path.relative_to(root).as_posix())
    return file


STORED = ["00000/img0.png", "00000/img1.png", "00001/img2.png"]  # StyleGAN's and EDM's storage
FLAT = ["a.png", "b.png", "c.png"]
PAIRS = json.dumps({"labels": [["00000/img0.png", 1], ["00000/img1.png", 0], ["00001/img2.png", 1]]})


@pytest.mark.parametrize(
    ("names", "texts", "labels", "classes"),
    [
        (STORED, {"dataset.json": PAIRS}, [1, 0, 1], ["0", "1"]),
        (STORED, {"dataset.json": '{"labels": null}'}, [0, 0, 0], ["all"]),
        (["ds/00000/a.png"], {"ds/dataset.json": '{"labels": [["00000/a.png", 0]]}'}, [0], ["0"]),
        (
            FLAT,
            {"metadata.csv": "file_name,text,label\na.png,x,dog\nb.png,y,cat\nc.png,z,dog\n"},
            [1, 0, 1],
            ["cat", "dog"],
        ),
        (FLAT, {"metadata.csv": "\ufeffLabel,file_name\r\n1,a.png\r\n0,b.png\r\n1,c.png"}, [1, 0, 1], ["0", "1"]),
        (
            FLAT,
            {
                "metadata.jsonl": "".join(
                    f'{{"file_name": "{n}", "label": {k}}}\n' for n, k in zip(FLAT, (0, 1, 1), strict=True)
                )
            },
            [0, 1, 1],
            ["0", "1"],
        ),
        (
            ["x/1.png", "y/1.png"],
            {"x/metadata.csv": "file_name,label\n1.png,dog\n", "y/metadata.csv": "file_name,label\n1.png,cat\n"},
            [1, 0],
            ["cat", "dog"],
        ),
        (["x/1.png", "y/1.png"], {"metadata.csv": "file_name,text\nx/1.png,a dog\n"}, [0, 1], ["x", "y"]),
        (["x/1.png", "y/1.png"], {"dataset.json": '{"labels": {"background": 0}}'}, [0, 1], ["x", "y"]),
        (["x/1.png", "y/1.png"], {"LABELS.CSV": "x/1.png,1\ny/1.png,0\n"}, [1, 0], ["0", "1"]),
        (
            ["train/1.png", "test/1.png"],
            {"labels.csv": "train/1.png,train\ntest/1.png,test\n"},
            [0, 1],
            ["test", "train"],
        ),
        (["x/1.jpg", "y/a.PNG"], {"labels.csv": "./X\\1.JPG,0\n/y//A.png ,1\n"}, [0, 1], ["0", "1"]),
        (["x/1.png", "X/1.png"], {"labels.csv": "x/1.png,0\nX/1.png,1\n"}, [1, 0], ["0", "1"]),
        (["a\u2028b.png", "c.png"], {"labels.csv": "a\u2028b.png,0\nc.png,1\n"}, [0, 1], ["0", "1"]),
        (["a\u2028b.png"], {"metadata.jsonl": '{"file_name": "a\u2028b.png", "label": "x"}\n'}, [0], ["x"]),
        ([f"{NFD}.png", "z.png"], {"labels.csv": f"{NFC}.png,1\nz.png,0\n"}, [1, 0], ["0", "1"]),
        (FLAT, {"labels.csv": f"a.png,{NFC}\nb.png,{NFD}\nc.png,x\n"}, [0, 0, 1], [NFD, "x"]),
        (FLAT, {"labels.json": json.dumps({"class_names": [NFC], **dict.fromkeys(FLAT, NFD)})}, [0, 0, 0], [NFC]),
    ],
)
def test_label_files_of_every_origin(tmp_path, names, texts, labels, classes):
    root = make(tmp_path / "x", names, texts)
    for source in (root, zipped(root)):
        data = Folder(images=str(source), image_size=8)
        assert data.labels.tolist() == labels  # in the order of the names
        assert data.class_names == classes
        assert len(data.notes) == (not any(name.lower().startswith("labels.") for name in texts))


@pytest.mark.parametrize(
    ("names", "texts", "sentence"),
    [
        (
            ["train/x/1.png", "val/x/1.png"],
            {},
            r"holds the folders train, val, .*: name one, --data\.images .*/x/train\. If",
        ),
        (["d/Train/1.png", "d/TEST/1.png", "d/other/1.png"], {}, r"folders TEST, Train.* --data\.images .*/x/d/Train"),
        (
            ["train/1.png", "test/1.png"],
            {f"{part}/metadata.csv": "file_name,label\n1.png,x\n" for part in ("train", "test")},
            "look like the parts of a data set and not like classes",
        ),
        (
            FLAT,
            {"labels.csv": "a.png,1\nb.png,2\nc.png,3\n"},
            r"with gaps; number them from 0, or give names.*begin at 1",
        ),
        (FLAT, {"dataset.json": json.dumps({"labels": [[n, k + 1] for k, n in enumerate(FLAT)]})}, "begin at 1"),
        (
            STORED,
            {"dataset.json": '{"labels": []}'},
            "no class .3 of 3.*If the folders are the classes, remove this file",
        ),
        (STORED, {"dataset.json": "{"}, "dataset.json' cannot be read"),
        (STORED, {"dataset.json": "[" * 100_000}, "dataset.json' cannot be read"),
        (["A.png", "a.png"], {"labels.csv": "a.PNG,0\nA.png,1\n"}, r"'a\.PNG' may be 'A\.png' or 'a\.png'"),
        (FLAT, {"labels.csv": "a.png,0\nA.PNG,0\nb.png,0\nc.png,0\n"}, r"names an image twice, 'A\.PNG'"),
        ([f"{NFC}/1.png", f"{NFD}/1.png"], {}, r"has a class name twice, .*written '\S+' and '\S+'; make them one"),
        (
            ["a.png"],
            {"metadata.csv": "file_name,text\na.png,x\n"},
            "without a class.*but not one of label, labels, class",
        ),
        ([os.fsdecode(b"caf\xe9/1.png"), "b/1.png"], {}, "is not text in UTF-8; give it another"),
    ],
)
def test_what_is_asked_about_or_refused(tmp_path, names, texts, sentence):
    with pytest.raises(ValueError, match=sentence):
        Folder(images=str(make(tmp_path / "x", names, texts)), image_size=8)


def test_of_two_label_files_one_counts_and_that_is_said(tmp_path):
    root = make(tmp_path, FLAT, {"labels.json": json.dumps(dict.fromkeys(FLAT, "x")), "labels.csv": "a.png,1\n"})
    data = Folder(images=str(root), image_size=8)
    assert data.class_names == ["x"]
    assert "the classes are those of '" in data.notes[0]
    assert "labels.csv' is not read." in data.notes[0]


def test_typed_class_names_are_compared_as_they_look():
    assert find_class(f"Caf{NFD}", ["tea", f"caf{NFC}"]) == find_class(f"caf{NFC}", ["tea", f"caf{NFD}"]) == 1


@pytest.mark.parametrize("name", ["x.heic", "x.jxl", "x.psd", "x.JPG ", "x"])
def test_images_that_are_left_out_are_counted(tmp_path, name):
    root = make(tmp_path / "x", ["cat/1.png", "dog/1.png"])
    (root / "cat" / name).write_bytes(b"x")
    (root / "cat" / "notes.txt").write_bytes(b"x")
    for found in (Folder(images=str(root), image_size=8).notes, fid.Images(root).warnings()):
        assert len(found) == 1
        assert "1 files are left out, whose format cannot be read: 1 " in found[0]
        assert "(1 in 'cat')" in found[0]
    (root / "cat" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"class folder '.*cat' holds no images that can be read \(1 "):
        Folder(images=str(root), image_size=8)


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix in (".avif", ".jp2")])
def test_formats_that_pillow_reads_are_read_whatever_their_ending(tmp_path, suffix):
    picture = Image.fromarray(np.full((16, 16, 3), 90, np.uint8))
    (tmp_path / "cat").mkdir()
    picture.save(tmp_path / "cat" / f"x{suffix}")
    (tmp_path / "cat" / "y.jpg").write_bytes((tmp_path / "cat" / f"x{suffix}").read_bytes())
    data = Folder(images=str(tmp_path), image_size=8)
    assert len(data) == 2
    for i in range(2):
        assert np.abs(data.pixels(i).astype(int) - 90).max() <= 2


def test_class_folders_that_are_called_as_files(tmp_path):
    root = make(tmp_path / "x", ["dog.jpg/1.png", "cat.zip/1.png", "emu.npz/1.png"])
    for source in (root, zipped(root)):
        assert Folder(images=str(source), image_size=8).class_names == ["cat.zip", "dog.jpg", "emu.npz"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    root, scandir = make(tmp_path, ["cat/1.png", "dog/1.png"]), os.scandir

    def refuse(path):
        if str(path).rstrip("/").endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(files.os, "scandir", refuse)
    with pytest.raises(OSError, match="dog/?' cannot be listed: Permission denied"):
        Folder(images=str(root), image_size=8)


@pytest.mark.parametrize("option", ["run_dir", "latents"])
def test_outputs_do_not_lie_among_the_images(tmp_path, option):
    root = make(tmp_path / "images", ["cat/1.png"])
    places = {"run_dir": tmp_path / "run", "latents": tmp_path / "latents", option: root / "out"}
    argv = ["--process.name=flow", "--codec.name=pixels", f"--data={{name: folder, images: {root}, image_size: 8}}"]
    argv += [f"--{name}={place}" for name, place in places.items()]
    with pytest.raises(
        ValueError, match=rf"{option} '.*out' lies in data\.images .* choose a place outside, --{option}"
    ):
        assemble.images(parse(Config, argv, prog="", description=""))


@pytest.mark.parametrize("size", [0, 100_000, 10**20])
def test_sides_that_no_image_has(tmp_path, size):
    make(tmp_path, ["cat/1.png"])
    for read, name in (
        (lambda: Folder(images=str(tmp_path), image_size=size), "data.image_size"),
        (lambda: fid.Images(tmp_path, crop=size), "crop"),
    ):
        with pytest.raises(
            ValueError, match=rf"{name} is {size}; choose a whole number, at least 1 and at most 13,377"
        ):
            read()


@pytest.mark.parametrize(
    ("encoding", "name", "read"),
    [("utf-8", "Äpfel", "Äpfel"), ("utf-8", f"{NFD}日", f"{NFD}日"), ("cp437", "Äpfel", "Äpfel")],
)
def test_names_in_a_zip_that_does_not_say_that_they_are_utf_8(tmp_path, encoding, name, read):
    """As macOS packs it; whatever is no UTF-8 is read as the format says, in cp437."""

    class Member(zipfile.ZipInfo):
        def _encodeFilenameFlags(self):  # noqa: N802, of zipfile
            return self.filename.encode(encoding), 0

    image = (make(tmp_path / "x", ["1.png"]) / "1.png").read_bytes()
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for folder in ("0", name):
            archive.writestr(Member(f"{folder}/1.png"), image)
    data = Folder(images=str(tmp_path / "x.zip"), image_size=8)
    assert data.class_names == ["0", read]
    assert data.pixels(1).shape == (8, 8, 3)


def test_the_parts_of_a_data_set_with_a_year(tmp_path):
    with pytest.raises(ValueError, match=r"holds the folders train2017, val-2017, .*--data\.images .*/train2017\."):
        Folder(images=str(make(tmp_path / "x", ["train2017/1.png", "val-2017/1.png"])), image_size=8)
    classes = ["devil", "trainer", "valley"]  # these only begin so
    assert (
        Folder(images=str(make(tmp_path / "y", [f"{c}/1.png" for c in classes])), image_size=8).class_names == classes
    )


def test_a_class_folder_on_a_disk_that_is_not_there(tmp_path):
    root = make(tmp_path / "x", ["cat/1.png", "dog/1.png"])
    (root / "emu").symlink_to("/nowhere")
    with pytest.raises(ValueError, match=r"data\.images '.*/x/emu' is a link that leads nowhere"):
        Folder(images=str(root), image_size=8)
