"""The evaluator against closed forms, numpy, and pytorch-fid; every kind of input, and every sentence."""

import json
import subprocess
import sys
import urllib.error

import numpy as np
import pytest
import pytorch_fid.inception
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import fid
from fid import features
from fid.__main__ import main
from fid.features import WEIGHTS_FILES, fingerprint, ieee_float32
from fid.images import SUFFIXES

torch.set_num_threads(1)


def gaussian(dim, num, seed=0):
    """A random (mean, covariance), of `num` samples with correlated dimensions."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num, dim)) @ rng.normal(size=(dim, dim)) + rng.normal(size=dim)
    return x.mean(0), np.cov(x, rowvar=False), x


def random_images(num, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num, size, size, 3), dtype=np.uint8)


def write_pngs(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:04}.png")
    return folder


def read_all(source, num=None, batch_size=4):
    return torch.cat(list(fid.Images(source, num).batches(batch_size))).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    classifier = fid.Classifier(num_classes=10, image_size=16)
    with torch.no_grad():
        classifier(torch.from_numpy(random_images(64)).permute(0, 3, 1, 2))  # batch statistics that are not 0 and 1
    return classifier.eval()


@pytest.fixture(scope="module")
def files(classifier, tmp_path_factory):
    """Weights, two folders of 100 and 70 images, and the first one's statistics made by the command line."""
    root = tmp_path_factory.mktemp("fid")
    classifier.save(root / "judge.safetensors")
    write_pngs(root / "a", random_images(100, seed=1))
    write_pngs(root / "b", random_images(70, seed=2) // 2)
    main(["stats", str(root / "a"), "--out", str(root / "a.npz"), *judge(root)])
    return root


def judge(root):
    return ["--extractor", "classifier", "--weights", str(root / "judge.safetensors"), "--device", "cpu"]


# Frechet distance


def test_one_dimension():
    assert fid.frechet_distance([1.0], [[4.0]], [3.0], [[9.0]]) == pytest.approx(5.0, abs=1e-12)


def test_two_dimensions():
    a, b = np.array([[2, 0.5], [0.5, 1]]), np.array([[1, -0.3], [-0.3, 3]])
    assert fid.frechet_distance([0, 0], a, [0, 0], b) == pytest.approx(0.9293118549677732, abs=1e-12)


def test_commuting_covariances_with_zero_eigenvalues():
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    w1, w2 = rng.uniform(1, 2, (2, 20))
    w1[:5], w2[3:8] = 0, 0
    expected = np.square(np.sqrt(w1) - np.sqrt(w2)).sum()
    found = fid.frechet_distance(np.zeros(20), q * w1 @ q.T, np.zeros(20), q * w2 @ q.T)
    assert found == pytest.approx(expected, abs=1e-6)


def test_is_a_symmetric_distance_that_no_rotation_changes():
    (m1, c1, _), (m2, c2, _) = gaussian(12, 100), gaussian(12, 100, seed=1)
    q = np.linalg.qr(np.random.default_rng(2).normal(size=(12, 12)))[0]
    distance = fid.frechet_distance(m1, c1, m2, c2)
    assert 0 <= fid.frechet_distance(m1, c1, m1, c1) < 1e-8
    assert fid.frechet_distance(m1, c1, m1 + 1, c1) == pytest.approx(12, abs=1e-8)  # nothing is hidden by the clip at 0
    assert fid.frechet_distance(m2, c2, m1, c1) == pytest.approx(distance, rel=1e-10)
    rotated = fid.frechet_distance(q @ m1, q @ c1 @ q.T, q @ m2, q @ c2 @ q.T)
    assert rotated == pytest.approx(distance, rel=1e-10)


def test_fewer_images_than_dimensions_against_the_nuclear_norm():
    (m1, c1, x), (m2, c2, y) = gaussian(64, 20), gaussian(64, 30, seed=1)
    nuclear = np.linalg.norm((x - m1) @ (y - m2).T, "nuc") / np.sqrt((20 - 1) * (30 - 1))
    expected = np.square(m1 - m2).sum() + np.trace(c1) + np.trace(c2) - 2 * nuclear
    assert fid.frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([0], [[1]], [0, 0], np.eye(2)), "first Gaussian is 1-d, the second 2-d"),
        (([0, 0], [[1]], [0], [[1]]), r"first Gaussian has a mean \(2,\) and a covariance \(1, 1\)"),
        (([0], [[1]], [np.nan], [[1]]), "second Gaussian has NaN"),
        (([0, 0], [[1, 2], [0, 1]], [0, 0], np.eye(2)), "not symmetric"),
    ],
)
def test_frechet_refuses(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        fid.frechet_distance(*arguments)


# Moments and statistics


@pytest.mark.parametrize("batch_size", [1, 7, 64, 600, 1300])
@pytest.mark.parametrize("offset", [0, 1000])
def test_moments_equal_numpy_under_any_split(batch_size, offset):
    x = gaussian(8, 1300)[2] + offset
    moments = fid.Moments(8)
    for batch in torch.from_numpy(x).split(batch_size):
        moments.update(batch)
    cov = np.cov(x, rowvar=False)
    assert moments.num == 1300
    assert np.abs(moments.mean - x.mean(0)).max() <= 1e-12 * np.abs(x).max()
    assert np.abs(moments.cov - cov).max() <= 1e-12 * np.abs(cov).max()


def test_moments_may_be_read_on_the_way():
    x = torch.from_numpy(gaussian(4, 50)[2])
    moments = fid.Moments(4)
    for batch in x.split(10):
        moments.update(batch)
        if moments.num >= 20:
            np.testing.assert_allclose(moments.cov, np.cov(x[: moments.num].numpy(), rowvar=False), rtol=1e-11)


def test_moments_refuse():
    moments = fid.Moments(3)
    moments.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least 2 images; got 1"):
        _ = moments.cov
    with pytest.raises(ValueError, match=r"shape \(2, 4\); expected \(B, 3\)"):
        moments.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="image 2 are not finite"):
        moments.update(torch.tensor([[0, 0, 0], [0, torch.inf, 0]]))


def test_statistics_round_trip(tmp_path):
    mean, cov, _ = gaussian(5, 20)
    fid.Statistics(mean, cov, 20, "judge-12345678").save(tmp_path / "x.npz")
    found = fid.load_statistics(tmp_path / "x.npz")
    assert np.array_equal(found.mean, mean)
    assert np.array_equal(found.cov, cov)
    assert (found.num, found.extractor, found.dim) == (20, "judge-12345678", 5)
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]  # nothing temporary is left

    np.savez(tmp_path / "foreign.npz", mu=mean, sigma=cov)
    foreign = fid.load_statistics(tmp_path / "foreign.npz")
    assert (foreign.num, foreign.extractor) == (None, None)


def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    statistics = fid.Statistics(np.zeros(1), np.eye(1), 2)
    statistics.save(tmp_path / "x.npz")
    before = (tmp_path / "x.npz").read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(KeyboardInterrupt):
        statistics.save(tmp_path / "x.npz")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"arr_0": np.zeros((1, 8, 8, 3), np.uint8)}, "holds images: run `python -m fid stats`"),
        ({"mu": np.zeros(2)}, r"no mu and sigma, but \['mu'\]"),
        ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"a mean \(2,\) and a covariance \(3, 3\)"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.inf)}, "NaN or infinite"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 1], [0, 1]])}, "not symmetric"),
        ({"mu": np.array([None]), "sigma": np.eye(1)}, "cannot be read"),
    ],
)
def test_load_statistics_refuses(arrays, sentence, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=sentence):
        fid.load_statistics(tmp_path / "x.npz")


def test_load_statistics_refuses_what_is_no_npz(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.npz' do not exist"):
        fid.load_statistics(tmp_path / "x.npz")
    (tmp_path / "x.npz").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"x\.npz' is not an \.npz"):
        fid.load_statistics(tmp_path / "x.npz")


# Images


def test_every_input_holds_the_same_images(tmp_path):
    images = random_images(10)
    np.save(tmp_path / "x.npy", images)
    np.savez(tmp_path / "x.npz", images, np.arange(10))
    np.savez_compressed(tmp_path / "y.npz", images)
    write_pngs(tmp_path / "folder" / "b", images[5:])
    write_pngs(tmp_path / "folder" / "a", images[:5])
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    for source in (tmp_path / "x.npy", tmp_path / "x.npz", str(tmp_path / "y.npz"), tmp_path / "folder", tensor):
        assert np.array_equal(read_all(source), images)
        assert np.array_equal(read_all(source, num=7), images[:7])
    assert [len(batch) for batch in fid.Images(tensor).batches(4)] == [4, 4, 2]


@pytest.mark.parametrize("suffix", [*SUFFIXES, "PNG", "JPEG"])
def test_every_suffix_in_any_letter_case(suffix, tmp_path):
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / f"x.{suffix}")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "._x.png").touch()  # what some archives leave behind
    assert np.abs(read_all(tmp_path).astype(int) - 200).max() <= 2


def test_grey_is_read_as_rgb(tmp_path):
    grey = random_images(3)[..., :1]
    np.savez(tmp_path / "x.npz", grey)
    write_pngs(tmp_path / "folder", grey[..., 0])
    for source in (tmp_path / "x.npz", tmp_path / "folder"):
        assert np.array_equal(read_all(source), grey.repeat(3, axis=3))


@pytest.mark.parametrize("num", [0, -1, 4])
def test_num_out_of_range(num):
    with pytest.raises(ValueError, match=f"cannot take {num} images of a tensor, which holds 3"):
        fid.Images(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), num)


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        fid.Images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="found no files"):
        fid.Images(tmp_path)
    np.save(tmp_path / "x.npy", 0)
    with pytest.raises(ValueError, match=r"looked for png, .*any letter case, recursively\); found 1 \*\.npy"):
        fid.Images(tmp_path)
    (tmp_path / "x.txt").touch()
    with pytest.raises(ValueError, match="neither a folder of images nor"):
        fid.Images(tmp_path / "x.txt")


def test_image_files_that_are_refused(tmp_path):
    folder = write_pngs(tmp_path / "sizes", random_images(2))
    Image.new("RGB", (8, 12)).save(folder / "odd.png")
    with pytest.raises(ValueError, match=r"0000\.png' is 16x16, '.*odd\.png' is 8x12"):
        read_all(folder)

    folder = write_pngs(tmp_path / "damaged", random_images(2))
    whole = (folder / "0001.png").read_bytes()
    (folder / "0001.png").write_bytes(whole[:200])
    with pytest.raises(ValueError, match=r"0001\.png' is not a readable image"):
        read_all(folder)
    (folder / "0001.png").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"0001\.png' is not a readable image"):
        read_all(folder)

    (tmp_path / "alpha").mkdir()
    Image.new("RGBA", (8, 8)).save(tmp_path / "alpha" / "x.png")
    with pytest.raises(ValueError, match=r"x\.png' has Pillow's mode RGBA"):
        read_all(tmp_path / "alpha")


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.linspace(-1, 1, 192, dtype=np.float32).reshape(1, 8, 8, 3), r"got float32 .*in \[-1, 1\]"),
        (np.zeros((2, 8, 8, 3), np.int64), "got int64"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"got uint8 \(2, 3, 8, 8\)"),
        (np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8)), "Fortran order"),
        (np.zeros((0, 8, 8, 3), np.uint8), "which holds 0"),
        (np.array([None]), "got object"),
    ],
)
def test_arrays_that_are_refused(array, sentence, tmp_path):
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", array)
    for name in ("x.npy", "x.npz"):
        with pytest.raises(ValueError, match=sentence):
            fid.Images(tmp_path / name)


def test_array_files_that_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", random_images(4))
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(whole[:-800])
    with pytest.raises(ValueError, match=r"x\.npy' is damaged at image 2 of 4"):
        read_all(tmp_path / "x.npy")
    np.savez(tmp_path / "x.npz", random_images(40))  # longer than what a zip reads ahead with the header
    whole = bytearray((tmp_path / "x.npz").read_bytes())
    whole[20_000] ^= 255
    (tmp_path / "x.npz").write_bytes(whole)
    with pytest.raises(ValueError, match=r"x\.npz' is damaged"):
        read_all(tmp_path / "x.npz")
    for name in ("x.npy", "x.npz"):
        (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(ValueError, match="is not"):
            fid.Images(tmp_path / name)
    np.savez(tmp_path / "x.npz", images=random_images(4))
    with pytest.raises(ValueError, match=r"no arr_0, .* but \['images'\]"):
        fid.Images(tmp_path / "x.npz")


def test_a_tensor_must_be_uint8():
    with pytest.raises(ValueError, match=r"expected uint8 .*got float32 \(2, 3, 8, 8\) in \[-1, 1\]"):
        fid.Images(torch.stack([torch.ones(3, 8, 8), -torch.ones(3, 8, 8)]))


# Extractors


@pytest.mark.parametrize(("built_for", "given"), [(8, 8), (15, 15), (28, 28), (32, 32), (28, 8), (28, 40)])
def test_classifier_takes_any_size(built_for, given):
    classifier = fid.Classifier(num_classes=7, image_size=built_for)
    out = classifier(torch.from_numpy(random_images(3, given)).permute(0, 3, 1, 2))
    assert out["features"].shape == (3, classifier.dim)
    assert out["logits"].shape == (3, 7)
    out["logits"].sum().backward()  # it can be trained
    assert all(parameter.grad is not None for parameter in classifier.parameters())


def test_classifier_round_trip(classifier, tmp_path):
    images = torch.from_numpy(random_images(5)).permute(0, 3, 1, 2)
    classifier.save(tmp_path / "x.safetensors")
    found = fid.EXTRACTORS["classifier"](tmp_path / "x.safetensors")
    assert (found.num_classes, found.image_size, found.accuracy) == (10, 16, None)
    assert found.name == classifier.name
    assert torch.equal(found(images)["features"], classifier(images)["features"])
    found.accuracy = 0.97
    found.save(tmp_path / "x.safetensors")
    assert fid.Classifier.load(tmp_path / "x.safetensors").accuracy == 0.97
    with torch.no_grad():
        found.head.bias += 1
    assert found.name != classifier.name


def test_classifier_refuses(classifier, tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="no published weights"):
        fid.Classifier.load(None)
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors' do not exist"):
        fid.Classifier.load(path)
    classifier.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut short"):
        fid.Classifier.load(path)
    for metadata in (None, {"num_classes": "10", "image_size": "16"}):
        save_file({"weight": torch.zeros(1)}, path, metadata)
        with pytest.raises(ValueError, match="does not hold a classifier"):
            fid.Classifier.load(path)
    with pytest.raises(ValueError, match="image_size is 7"):
        fid.Classifier(image_size=7)
    with pytest.raises(ValueError, match="expected uint8"):
        classifier(torch.zeros(1, 3, 16, 16))


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Our Inception and pytorch-fid's, with the same random weights, and the file that holds them."""
    torch.manual_seed(0)
    network = features._inception_network()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # keeps the signal alive through 90 layers
            nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
    path = tmp_path_factory.mktemp("inception") / WEIGHTS_FILES[0]
    torch.save(network.state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: network.state_dict())
        theirs = pytorch_fid.inception.InceptionV3([3]).eval()
    return fid.Inception(path), theirs, path


def test_inception_equals_pytorch_fid(inception):
    ours, theirs, _ = inception
    images = torch.from_numpy(random_images(2, 75)).permute(0, 3, 1, 2)
    ours.train()  # has no effect
    with torch.no_grad():
        expected = theirs(images / 255)[0].flatten(1)
        with torch.autocast("cpu", torch.bfloat16):
            found = ours(images)["features"]
    assert found.shape == (2, ours.dim)
    assert found.dtype == torch.float32
    assert (expected[0] - expected[1]).norm() > 1e-3 * expected.norm()
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert ours.name.startswith("inception-pytorch-fid-")


def test_inception_finds_its_weights(inception, tmp_path, monkeypatch):
    state = {"fc.weight": torch.zeros(1000, 1)}  # torchvision's classes tell it apart from the one wanted
    found = []
    monkeypatch.setattr(features.torch, "load", lambda path, **_: found.append(path) or state)
    monkeypatch.setattr(features.torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.delenv("FID_INCEPTION_WEIGHTS", raising=False)
    (tmp_path / "checkpoints").mkdir()
    for name in reversed(WEIGHTS_FILES):
        (tmp_path / "checkpoints" / name).touch()
        assert features._inception_weights(None)[0].name == name
    monkeypatch.setenv("FID_INCEPTION_WEIGHTS", str(inception[2]))
    assert features._inception_weights(None)[0] == inception[2]
    assert features._inception_weights(tmp_path / "checkpoints" / WEIGHTS_FILES[1])[0].name == WEIGHTS_FILES[1]
    with pytest.raises(ValueError, match="torchvision's ImageNet network"):
        fid.Inception()


def test_inception_refuses(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.delenv("FID_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(FileNotFoundError, match=rf"no route.*{WEIGHTS_FILES[0]}, .*{WEIGHTS_FILES[1]}\. Get pt_"):
        fid.Inception()
    with pytest.raises(FileNotFoundError, match=r"no such file\); tried .*x\.pth\. Get"):
        fid.Inception(tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"x\.pth' is not a PyTorch file"):
        fid.Inception(tmp_path / "x.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth' does not hold the FID's Inception"):
        fid.Inception(tmp_path / "x.pth")


def test_the_fingerprint_is_of_what_matters():
    a, b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    b.num_batches_tracked += 1
    assert fingerprint(a) == fingerprint(b)
    b.running_mean += 1
    assert fingerprint(a) != fingerprint(b)


def test_ieee_float32_puts_back_what_was_set(monkeypatch):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    monkeypatch.setattr(cudnn, "benchmark", True)
    before = cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            with ieee_float32():
                assert not torch.is_autocast_enabled("cpu")
                assert not cudnn.benchmark
                if hasattr(cudnn, "conv"):
                    assert cudnn.conv.fp32_precision == matmul.fp32_precision == "ieee"
            assert torch.is_autocast_enabled("cpu")
        assert cudnn.benchmark
        assert matmul.allow_tf32
        assert cudnn.allow_tf32 == before
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


# From images to a distance


def test_statistics_do_not_depend_on_the_batch_size(classifier):
    images = torch.from_numpy(random_images(100)).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = classifier(images)["features"].double().numpy()
    for batch_size in (1, 32, 128):
        found = fid.statistics(images, classifier, batch_size)
        np.testing.assert_allclose(found.mean, expected.mean(0), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found.cov, np.cov(expected, rowvar=False), rtol=1e-6, atol=1e-6)
    assert (found.num, found.extractor) == (100, classifier.name)


def test_every_batch_is_full_and_the_mode_comes_back(classifier):
    class Spy(nn.Module):
        dim, name = 3, "spy-0"

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.seen = []

        def forward(self, images):
            self.seen.append((len(images), self.training, torch.is_grad_enabled()))
            return {"features": images.float().mean((2, 3)) * self.weight}

    spy = Spy()
    images = torch.from_numpy(random_images(10)).permute(0, 3, 1, 2)
    found = fid.statistics(images, spy, batch_size=4)
    assert spy.seen == [(4, False, False)] * 3
    assert spy.training
    np.testing.assert_allclose(found.mean, images.double().mean((0, 2, 3)).numpy(), rtol=1e-6)
    with pytest.raises(ValueError, match="batch_size is 0"):
        fid.statistics(images, spy, batch_size=0)


def test_evaluate_by_images_or_statistics(files, classifier):
    by_images = fid.evaluate(files / "b", files / "a", classifier)
    by_statistics = fid.evaluate(fid.statistics(files / "b", classifier), files / "a.npz")
    assert by_images.value == pytest.approx(by_statistics.value, rel=1e-9)
    assert by_images.value > 0
    assert fid.evaluate(files / "a", files / "a.npz", classifier, batch_size=7).value < 1e-6
    assert fid.evaluate(files / "a", files / "a", classifier, num=80).num_images == 80


def test_the_name_says_what_it_is():
    mean, cov, _ = gaussian(4, 20)
    names = {50_000: "FID", 1000: "FID-1000", None: "FID"}
    for num, name in names.items():
        made = fid.Statistics(mean, cov, num, "inception-pytorch-fid-0")
        assert fid.evaluate(made, fid.Statistics(mean, cov)).name == name
    assert fid.evaluate(fid.Statistics(mean, cov), fid.Statistics(mean, cov)).name == "Frechet distance"


def test_evaluate_refuses(files, classifier):
    other = fid.Statistics(np.zeros(64), np.eye(64), 100, "classifier-00000000", "other.npz")
    with pytest.raises(ValueError, match=rf"{classifier.name} \(64-d\), 'other.npz' of classifier-00000000 \(64-d\)"):
        fid.evaluate(files / "a", other, classifier)
    with pytest.raises(ValueError, match=r"\(64-d\), 'statistics' of an extractor without a name \(2-d\)"):
        fid.evaluate(files / "a.npz", fid.Statistics(np.zeros(2), np.eye(2)))
    with pytest.raises(ValueError, match="an extractor is needed"):
        fid.evaluate(files / "a", files / "a.npz")
    with pytest.raises(ValueError, match=r"a\.npz' holds statistics, of which one cannot take the first 5"):
        fid.evaluate(files / "a.npz", files / "a.npz", num=5)


# Command line


def test_command_line(files, classifier, capsys):
    out = files / "result.json"
    main(["eval", str(files / "b"), "--ref", str(files / "a.npz"), *judge(files), "--json", str(out)])
    expected = fid.evaluate(files / "b", files / "a", classifier)
    record = json.loads(out.read_text())
    assert record.pop("value") == pytest.approx(expected.value, rel=1e-6)
    assert record == {
        "name": "Frechet distance",
        "extractor": classifier.name,
        "dim": 64,
        "num_images": 70,
        "reference": str(files / "a.npz"),
        "reference_num_images": 100,
    }
    printed = capsys.readouterr()
    assert printed.out == (
        f"Frechet distance {expected.value:.2f}  ({classifier.name} features, 64-d; "
        f"70 images against {files / 'a.npz'}, 100 images)\n"
    )
    assert "biased" not in printed.err

    main(["eval", str(files / "b"), "--ref", str(files / "a"), *judge(files), "--num", "50", "--batch_size", "16"])
    printed = capsys.readouterr()
    assert "; 50 images against" in printed.out
    assert f"warning: 50 images of {files / 'b'} in 64 dimensions: the distance is biased" in printed.err


def test_command_line_with_two_statistics_needs_no_network(tmp_path, capsys):
    mean, cov, _ = gaussian(4, 20)
    fid.Statistics(mean, cov, 1000, "inception-pytorch-fid-0").save(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", mu=mean + 1, sigma=cov)
    main(["eval", str(tmp_path / "x.npz"), "--ref", str(tmp_path / "y.npz")])
    out = capsys.readouterr().out
    assert out.startswith("FID-1000 4.00 by the protocol of pytorch-fid  (inception-pytorch-fid-0 features, 4-d; 1000")
    assert out.endswith("y.npz, an unknown number of images)\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["stats", "a", "--out", "x.txt"], "cannot write 'x.txt': it must end in .npz"),
        (["stats", "a", "--out", "nowhere/x.npz"], "in a folder that exists"),
        (["stats", "a.npz", "--out", "x.npz"], "has no arr_0"),
        (["stats", "a", "--out", "x.npz", "--num", "1"], "at least 2 images; got 1"),
        (["stats", "a", "--out", "x.npz", "--batch_size", "0"], "batch_size is 0"),
        (["eval", "nowhere", "--ref", "a.npz"], "'nowhere' does not exist"),
        (["eval", "a", "--ref", "a.npz", "--weights", "nowhere"], "'nowhere' do not exist"),
        (["eval", "a", "--ref", "a.npz", "--json", "nowhere/x.json"], "cannot write"),
        (["eval", "a.npz", "--ref", "a.npz", "--num", "5"], "cannot take the first 5"),
    ],
)
def test_a_wrong_command_ends_in_a_sentence(arguments, sentence, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    with pytest.raises(SystemExit) as ended:
        main([arguments[0], *arguments[1:2], *judge(files), *arguments[2:]])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (files / "x.npz").exists()


def test_as_a_process(files):
    command = [sys.executable, "-m", "fid", "eval", str(files / "nowhere"), "--ref", str(files / "a.npz")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == f"'{files / 'nowhere'}' does not exist.\n"


@pytest.mark.parametrize("command", ["stats", "eval"])
def test_help_documents_every_option(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for option in ("--extractor", "--weights", "--num", "--batch_size", "--device"):
        assert option in text
