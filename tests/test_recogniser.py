"""`python -m classify`: what it says of images is what the network says, and the sums and shares are right."""

import csv
import json
import re
import time
from functools import partialmethod
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image

import train
from classify import Recogniser, create
from classify import __main__ as program
from classify.evaluation import Evaluation, evaluate
from vca_engine.images.datasets import Digits
from vca_engine.records import read_json

SETTINGS = (
    "--config configs/digits_deit.yaml --model.hidden_size 24 --model.depth 1 --model.num_heads 2 --train.num_steps 60 "
    "--train.lr 2e-2 --train.warmup_steps 0 --train.ema_decay 0.8 --train.log_every 60 --train.tracker none"
)
DEVICE = ["--device", "cpu"]
ALONE = [*DEVICE, "--num_workers", "0"]  # a fork of a process with the threads of onnxruntime may hang


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of a small DeiT with VCA on digits, which is right more often than chance."""
    from conftest import new_process

    place = tmp_path_factory.mktemp("recogniser") / "run"
    with new_process():
        train.main([*SETTINGS.split(), "--run_dir", str(place)])
    return place


@pytest.fixture(autouse=True)
def _as_in_a_new_process(as_in_a_new_process):
    pass


def sentence(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        program.main(list(map(str, words)))
    assert stop.value.code == 2
    return capsys.readouterr().err.strip()


def rows_of(file):
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def by_hand(folder):
    """Logits of the 500 test images: of pixels in [-1, 1], with the averaged weights."""
    network = Recogniser.from_pretrained(folder, device="cpu").network
    pixels = np.stack([Digits(split="test").pixels(i)[..., 0] for i in range(500)])  # (500, 8, 8)
    with torch.no_grad():
        return network(torch.from_numpy(pixels)[:, None].float() / 127.5 - 1)


def test_numbers_of_a_small_case():
    """Two classes: of the first 2 of 3 are right and the other is not finite; of the second 1 of 2."""
    labels, best = np.array([0, 0, 0, 1, 1]), np.array([[0, 1], [0, 1], [-1, -1], [0, 1], [1, 0]])
    evaluation = Evaluation(["a", "b", "none"], labels, best, np.full(5, 0.5, np.float32), 1.0)
    found = evaluation.accuracies()
    assert found["top1"] == 60
    assert found["top5"] == 80
    assert found["top1_se"] == round(100 * (0.6 * 0.4 / 5) ** 0.5, 4)
    assert found["mean_class_top1"] == round((200 / 3 + 50) / 2, 4)
    assert found["not_finite"] == 1
    assert evaluation.confusion().tolist() == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]
    first, second, none = evaluation.classes()
    assert first == {"class": "a", "images": 3, "top1": 66.67, "top5": 66.67, "taken_for": None, "so_often": None}
    assert second == {"class": "b", "images": 2, "top1": 50, "top5": 100, "taken_for": "a", "so_often": 1}
    assert none["images"] == 0
    assert none["top1"] is None


def test_an_evaluation_is_what_the_network_says(folder, capsys):
    logits, labels = by_hand(folder), torch.from_numpy(Digits(split="test").labels)
    program.main(["eval", str(folder), *ALONE])
    out = folder / "eval-step-00000060"
    record, said = read_json(out / "eval.json"), capsys.readouterr().out
    best = logits.topk(5, dim=1).indices
    top1 = 100 * (best[:, 0] == labels).float().mean().item()
    assert record["top1"] == pytest.approx(top1, abs=1e-4)  # it has four digits
    assert record["top5"] == pytest.approx(100 * (best == labels[:, None]).any(1).float().mean().item(), abs=1e-4)
    assert len(best[:, 0].unique()) > 3  # it has learned something
    assert f"top-1 {top1:.2f} ± " in said
    last = json.loads((folder / "eval.jsonl").read_text().splitlines()[-1])  # of training itself
    assert (record["top1"], record["top5"], record["num_samples"]) == (last["top1"], last["top5"], 500)
    assert record["views"] == {
        **{"image_size": 8, "channels": 1, "crop": 1, "interpolation": "bicubic"},
        **{"mean": [0.5], "std": [0.5]},
    }
    assert record["images_per_second"] > 0
    predictions, classes = rows_of(out / "predictions.csv"), rows_of(out / "classes.csv")
    assert [row["taken_for"] for row in predictions] == [str(k) for k in best[:, 0].tolist()]
    assert [row["class"] for row in predictions] == [str(k) for k in labels.tolist()]
    assert float(predictions[3]["probability"]) == pytest.approx(logits[3].softmax(0).max().item(), abs=1e-4)
    assert [int(row["images"]) for row in classes] == torch.bincount(labels).tolist()
    with Image.open(out / "confusion.png") as picture:
        assert min(picture.size) > 500


def test_what_warms_up_or_is_compiled_anew_is_not_in_the_images_per_second(folder):
    """500 images in batches of 150, of which the first and the last, of 50, take a second: 350 images/s at most if so."""
    seen = []

    class Warming(Recogniser):
        def logits(self, x):
            time.sleep(len(x) not in seen)
            seen.append(len(x))
            return super().logits(x)

    evaluation = evaluate(Warming.from_pretrained(folder, device="cpu"), Digits(split="test"), batch_size=150)
    assert seen == [150, 150, 150, 50]
    assert evaluation.images_per_second > 350


def test_the_same_again_is_done_again_and_another_is_refused(folder, tmp_path, capsys):
    out = tmp_path / "out"
    for _ in range(2):
        program.main(["eval", str(folder), "--out", str(out), *ALONE])
    said = sentence(capsys, "eval", folder, "--out", out, "--data.split", "train", *ALONE)
    assert "holds an evaluation with" in said
    assert "data.split 'test' (now 'train'); choose another --out." in said
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "classes.csv").write_text("mine")
    said = sentence(capsys, "eval", folder, "--out", tmp_path / "mine" / "classes.csv", *ALONE)
    assert "classes.csv', which is a file; choose a folder." in said
    assert "classes.csv' is there already" in sentence(capsys, "eval", folder, "--out", tmp_path / "mine", *ALONE)


class TestPredict:
    @pytest.fixture
    def images(self, tmp_path):
        """Three test digits: two in a folder, and one beside it."""
        (tmp_path / "some").mkdir()
        for i, name in enumerate(("some/a.png", "some/b.png", "c.png")):
            Image.fromarray(Digits(split="test").pixels(i)[..., 0]).save(tmp_path / name)
        return tmp_path

    def test_probabilities_are_those_of_the_network(self, folder, images, capsys):
        words = [str(images / "c.png"), str(images / "some"), "--top", "3", "--batch_size", "2"]
        program.main(["predict", str(folder), *words, "--json", str(images / "found.json"), *DEVICE])
        found, expected = read_json(images / "found.json")["predictions"], by_hand(folder)[:3].softmax(dim=1)
        assert [row["image"] for row in found] == [str(images / name) for name in ("c.png", "some/a.png", "some/b.png")]
        for row, p in zip(found, expected[[2, 0, 1]], strict=True):
            assert list(row["classes"]) == [str(k) for k in p.topk(3).indices.tolist()]
            assert list(row["classes"].values()) == pytest.approx(p.topk(3).values.tolist(), rel=1e-5)  # float32
        best = expected[2].max().item()
        assert f"c.png: {expected[2].argmax()} {100 * best:.1f} %, " in capsys.readouterr().out

    @pytest.mark.parametrize("kind", ["transparent", "16 bits", "turned"])
    def test_an_opened_image_is_seen_as_its_file_is(self, kind, folder, tmp_path):
        values = np.random.default_rng(0).integers(0, 65536, (12, 20, 4), dtype=np.uint16)
        pixels = {"transparent": values.astype(np.uint8), "16 bits": values[..., 0]}
        image = Image.fromarray(pixels.get(kind, values[..., :3].astype(np.uint8)))
        exif = image.getexif()
        exif[0x0112] = 6 if kind == "turned" else 1  # orientation: a quarter turn
        image.save(tmp_path / "x.png", exif=exif)
        recogniser = Recogniser.from_pretrained(folder, device="cpu")
        with Image.open(tmp_path / "x.png") as opened:
            assert torch.equal(recogniser([opened]), recogniser([tmp_path / "x.png"]))

    def test_the_lines_of_the_docs_run(self, folder, images):
        text = Path("docs/classify.md").read_text(encoding="utf-8")
        (block,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "Recogniser" in block)
        for there, here in {
            "runs/deit_tiny_vca": folder,
            "cat.jpg": images / "c.png",
            "dog.jpg": images / "some/a.png",
        }.items():
            block = block.replace(there, str(here))
        names = {}
        exec(block, names)
        torch.testing.assert_close(names["probabilities"], by_hand(folder)[[2, 0]].softmax(dim=1))

    def test_an_output_that_is_not_finite_is_no_class(self, folder, images, monkeypatch, capsys):
        logits = Recogniser.logits
        broken = torch.tensor([1])  # the second image
        monkeypatch.setattr(Recogniser, "logits", lambda self, x: logits(self, x).index_fill(0, broken, torch.nan))
        words = [str(images / "c.png"), str(images / "some"), "--json", str(images / "found.json"), *DEVICE]
        program.main(["predict", str(folder), *words])
        assert "a.png: the output of the network is not finite\n" in capsys.readouterr().out
        assert [len(row["classes"]) for row in read_json(images / "found.json")["predictions"]] == [5, 0, 5]

    def test_what_cannot_be_read_is_named_and_the_others_are_done(self, folder, images, capsys):
        (images / "some" / "aa.png").write_bytes(b"text")
        (images / "some" / "photo.heic").write_bytes(b"")
        words = [images / "some", "--json", images / "found.json", "--batch_size", "1", *DEVICE]
        said = sentence(capsys, "predict", folder, *words).splitlines()
        assert said[0].startswith("note:")
        assert "1 files are left out, whose format cannot be read: 1 *.heic" in said[0]
        assert "aa.png' cannot be read as an image" in said[1]
        assert said[1].endswith(" The other 2 of 3 images are done.")
        record = read_json(images / "found.json")
        assert [Path(row["image"]).name for row in record["predictions"]] == ["a.png", "b.png"]
        (reason,) = record["left_out"]
        assert "aa.png' cannot be read" in reason

    def test_mistakes(self, folder, images, capsys):
        (images / "d.png").write_bytes(b"text")
        assert "some', which is a folder; name a file." in sentence(
            capsys, "predict", folder, images / "c.png", "--json", images / "some", *DEVICE
        )
        assert "d.png' cannot be read as an image" in sentence(capsys, "predict", folder, images / "d.png", *DEVICE)
        assert "there is no image 'none.png'" in sentence(capsys, "predict", folder, "none.png", *DEVICE)
        assert "required: images" in sentence(capsys, "predict", folder)
        assert "did you mean 'predict'" in sentence(capsys, "predikt", folder)
        assert "some' holds no weights" in sentence(capsys, "predict", images / "some", images / "c.png")


def test_compiled_it_says_the_same(folder, monkeypatch):
    """To 1e-5: float32, whose sums run in another order; logits are a few units. Without the slow compiler at the end."""
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    x = torch.randn(3, 1, 8, 8)
    plain, compiled = (Recogniser.from_pretrained(folder, device="cpu", compile=c).logits(x) for c in (False, True))
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)
    assert graphs["unique_graphs"] > before  # it was compiled


def test_onnx_says_the_same(folder, tmp_path, capsys):
    """For any number of images, to 1e-5: float32, whose sums run in another order; logits are a few units."""
    file = tmp_path / "model.onnx"
    program.main(["export", str(folder), "--out", str(file)])
    assert "onnxruntime's logits differ by at most" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    recogniser = Recogniser.from_pretrained(folder, device="cpu")
    for num in (1, 5):
        x = torch.randn(num, 1, 8, 8)
        (found,) = session.run(None, {"image": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), recogniser.logits(x), rtol=0, atol=1e-5)
    facts = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert facts["class_names"] == [str(k) for k in range(10)]
    assert (facts["crop"], facts["mean"], facts["sha256"]) == (1, [0.5], recogniser.sha256)
    assert "is there already" in sentence(capsys, "export", folder, "--out", file)
    assert "an export is a .onnx file" in sentence(capsys, "export", folder, "--out", tmp_path / "model.pt")


def test_a_saved_recogniser_is_the_same(folder, tmp_path):
    """Without the folders of this machine; and it begins another training."""
    recogniser, saved = Recogniser.from_pretrained(folder, device="cpu"), tmp_path / "saved"
    recogniser.save_pretrained(saved)
    again, x = Recogniser.from_pretrained(saved, device="cpu"), torch.randn(2, 1, 8, 8)
    assert torch.equal(again.logits(x), recogniser.logits(x))
    assert again.class_names == recogniser.class_names
    card = (saved / "README.md").read_text()
    assert 'recogniser = Recogniser.from_pretrained("saved")' in card
    assert "image-classification" in card
    assert "image-generation" not in card
    assert str(folder.parent) not in card + (saved / "checkpoint.json").read_text()
    program.main(["eval", str(saved), "--out", str(tmp_path / "eval"), *ALONE])
    assert read_json(tmp_path / "eval" / "eval.json")["weights"]["sha256"] == recogniser.sha256


class TestPublished:
    """Weights with timm's or the published keys, random ones: they say themselves which network they are of."""

    @pytest.fixture
    def images(self, tmp_path):
        """Two folders of colour images, each in another size than the network's."""
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 256, (300, 260, 3), dtype=np.uint8)
            (tmp_path / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "images" / "ab"[i % 2] / f"{i}.png")
        return tmp_path / "images"

    @pytest.mark.parametrize(
        ("name", "side", "theirs"),
        [("deit_tiny", 384, "deit_tiny_patch16_224"), ("swin_tiny", 224, "swin_tiny_patch4_window7_224")],
    )
    def test_timm_weights_give_timm_outputs(self, name, side, theirs, tmp_path, images):
        """To 1e-6: the same operations; float32 softmax of views that timm's own transform makes."""
        network = timm.create_model(theirs, num_classes=2, img_size=side).eval()
        state = network.state_dict()
        if name == "swin_tiny":
            state["layers.0.blocks.1.attn_mask"] = torch.zeros(1)  # as in files of old
        torch.save({"model": state}, tmp_path / "weights.pth")
        recogniser = Recogniser.from_pretrained(tmp_path / "weights.pth", crop=0.9, device="cpu")
        assert (recogniser.config.model.name, recogniser.info.image_size) == (name, side)
        transform = timm.data.create_transform(side, interpolation="bicubic", crop_pct=0.9)
        files = sorted(images.rglob("*.png"))
        x = torch.stack([transform(Image.open(file)) for file in files])
        with torch.no_grad():
            expected = network(x).softmax(dim=1)
        torch.testing.assert_close(recogniser(files), expected, rtol=0, atol=1e-6)

    def test_images_that_are_not_read_are_counted(self, tmp_path, images, capsys):
        torch.save(create("pvt_tiny", "own", num_classes=2, image_size=224).state_dict(), tmp_path / "pvt.pth")
        assert "pvt.pth' has no eval.data; name images" in sentence(capsys, "eval", tmp_path / "pvt.pth", *ALONE)
        (images / "a" / "photo.heic").write_bytes(b"")
        words = ["--data.images", str(images), "--out", str(tmp_path / "out"), *ALONE]
        program.main(["eval", str(tmp_path / "pvt.pth"), *words])
        assert "1 files are left out, whose format cannot be read: 1 *.heic (1 in 'a')" in capsys.readouterr().err

    def test_classes_go_in_order(self, tmp_path, images, capsys):
        torch.save(create("pvt_tiny", "own", num_classes=2).state_dict(), tmp_path / "pvt.pth")
        words = ["--data.images", str(images), "--out", str(tmp_path / "out"), *ALONE]
        program.main(["eval", str(tmp_path / "pvt.pth"), *words])
        assert [row["class"] for row in rows_of(tmp_path / "out" / "classes.csv")] == ["a", "b"]
        torch.save(create("pvt_tiny", "own", num_classes=3).state_dict(), tmp_path / "pvt.pth")
        said = sentence(capsys, "eval", tmp_path / "pvt.pth", *words)
        assert "data has 2 classes, and the network 3." in said
        torch.save(create("pvt_tiny", "vca", num_classes=3).state_dict(), tmp_path / "pvt.pth")
        said = sentence(capsys, "eval", tmp_path / "pvt.pth", *words)
        assert "with its own attention" in said
        assert "pvt_tiny is nearest" in said
