"""The networks against other tools with the same random weights, the three resizes, and where weights are found."""

import hashlib
import json
import shutil
import sys
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import pytorch_fid.inception
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import fid
from fid.networks import inception
from fid.networks.extractor import fingerprint
from fid.networks.inception import WEIGHTS_FILES
from fid.networks.resize import clean_bicubic, half_pixel_bilinear, tf1_bilinear
from fid.training import _split, train_extractor
from vca_engine.precision import ieee_float32

torch.set_num_threads(1)


def random_images(num, height, width=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num, 3, height, width or height), generator=generator, dtype=torch.uint8)


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(scope="module")
def adm(inception_weights):
    return fid.Inception(inception_weights, size=75)


@pytest.fixture(scope="module")
def theirs(inception_weights):
    """torch-fidelity's network, with an input of 75 pixels."""
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    outputs = ["2048", "logits_unbiased"]
    network = theirs.FeatureExtractorInceptionV3("x", outputs, feature_extractor_weights_path=str(inception_weights))
    network.INPUT_IMAGE_SIZE = 75
    return network


# Resizes


def row(values, size, resize):
    """A resize of one row of pixels."""
    image = torch.tensor(values, dtype=torch.uint8).expand(1, 3, len(values), len(values))
    return resize(image, size)[0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("values", "size", "expected"),
    [
        ([0, 10], 4, [0, 5, 10, 10]),
        ([0, 10, 20, 30], 3, [0, 13.3333, 26.6667]),
        ([0, 1, 4, 9, 16], 7, [0, 0.71429, 2.28571, 4.71429, 8.28572, 13, 16]),
        ([0, 100, 50], 5, [0, 60, 90, 60, 50]),
    ],
)
def test_golden_rows_of_tensorflow(values, size, expected):
    assert row(values, size, tf1_bilinear) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("values", "size", "expected"), [([0, 10], 4, [0, 2.5, 7.5, 10]), ([0, 10, 20, 30], 3, [1.6667, 15, 28.3333])]
)
def test_golden_rows_with_half_pixels(values, size, expected):
    assert [255 * v for v in row(values, size, half_pixel_bilinear)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (256, 256), (299, 299), (300, 200), (512, 512)])
def test_tensorflow_resize_is_torch_fidelitys_to_the_bit(shape):
    theirs = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    images = random_images(1, *shape)
    expected = theirs.interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    assert torch.equal(tf1_bilinear(images, 299), expected)


def test_clean_resize_is_clean_fids():
    resizer = pytest.importorskip("cleanfid.resize").make_resizer("PIL", False, "bicubic", (75, 75))
    images = random_images(2, 60, 90)
    expected = torch.stack([torch.from_numpy(resizer(i.permute(1, 2, 0).numpy())) for i in images]).permute(0, 3, 1, 2)
    assert torch.equal(clean_bicubic(images, 75), expected)
    slow = Image.fromarray(images[0, 1].numpy().astype(np.float32)).resize((75, 75), Image.Resampling.BICUBIC)
    assert torch.equal(clean_bicubic(images, 75)[0, 1], torch.from_numpy(np.array(slow)).clamp(0, 255))
    assert clean_bicubic(images, 75).min() >= 0


# Inception


def test_features_and_logits_equal_torch_fidelity(adm, theirs):
    images = random_images(4, 64, seed=1)
    with torch.no_grad():
        features, logits = theirs(images)
        found = adm(images)
    assert relative(found["features"], features) < 1e-5
    assert relative(found["logits"], logits) < 1e-5
    assert (features[0] - features[1]).norm() > 0.01 * features.norm()  # images are told apart
    assert {name: rows.shape[1] for name, rows in found.items()} == adm.dims


def test_features_at_full_size_equal_torch_fidelity(inception_weights):
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    network = theirs.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(inception_weights))
    ours, images = fid.Inception(inception_weights), random_images(1, 256, seed=2)
    with torch.no_grad():
        found = ours(images)
        assert relative(found["features"], network(images)[0]) < 1e-5
    assert {name: rows.shape[1] for name, rows in found.items()} == {"features": 2048, "spatial": 2023, "logits": 1008}
    assert ours.dims == {"features": 2048, "spatial": 2023, "logits": 1008}


def test_features_equal_pytorch_fid(inception_weights):
    state = torch.load(inception_weights, weights_only=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: state)
        theirs = pytorch_fid.inception.InceptionV3([3], resize_input=False).eval()
    ours = fid.Inception(inception_weights, "pytorch-fid", size=75, channels_last=False)  # as theirs, to the last digit
    assert not ours.train().training  # has no effect
    assert not any(weight.requires_grad for weight in ours.parameters())
    images = random_images(2, 64)
    resized = torch.nn.functional.interpolate(images / 255, size=(75, 75), mode="bilinear", align_corners=False)
    with torch.no_grad():
        expected = theirs(resized)[0].flatten(1)
        with torch.autocast("cpu", torch.bfloat16):
            found = ours(images)["features"]
    assert found.dtype == torch.float32
    assert relative(found, expected) < 1e-6
    assert (ours.name.startswith("inception-pytorch-fid-"), ours.metrics) == (True, ("fid",))


def test_spatial_features_are_of_one_branch_after_its_relu_and_channels_come_last(inception_weights):
    """A slow way: all blocks before, one after the other, then that branch alone."""
    network = inception.inception_network().eval()
    network.load_state_dict(torch.load(inception_weights, weights_only=True))
    images = random_images(2, 75)
    with torch.no_grad():
        x = (images.float() - 128) / 128
        for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3"):
            x = getattr(network, name)(x)
        x = network.maxpool2(x)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"):
            x = getattr(network, name)(x)
        branch = network.Mixed_6d.branch1x1
        x = torch.relu(branch.bn(branch.conv(x)))[:, :7]  # (2, 7, 3, 3)
        found = fid.Inception(inception_weights, size=75, channels_last=False)(images)["spatial"]
    assert relative(found, x.permute(0, 2, 3, 1).flatten(1)) < 1e-5
    assert relative(found, x.flatten(1)) > 0.1
    assert found.min() == 0


def test_presets_differ_in_what_they_do(adm, inception_weights):
    images = random_images(2, 64)
    with torch.no_grad():
        expected = adm(images)["features"]
        for preset in ("pytorch-fid", "clean"):
            other = fid.Inception(inception_weights, preset, size=75)
            assert relative(other(images)["features"], expected) > 1e-3
            assert other.name.rsplit("-", 1)[1] == adm.name.rsplit("-", 1)[1]
    with pytest.raises(ValueError, match="preset is 'tf'; choose one of adm, pytorch-fid, clean"):
        fid.Inception(inception_weights, "tf")


def test_mixed_sizes_are_resized_one_by_one(adm):
    a, b = random_images(1, 64), random_images(1, 90, 80)
    with torch.no_grad():
        found = adm([a[0], b[0]])["features"]
        assert relative(found, torch.cat([adm(a)["features"], adm(b)["features"]])) < 1e-5
    with pytest.raises(ValueError, match=r"expected uint8 images in \[0,255\]; got float32 in \[0.00, 1.00\]"):
        adm([a[0], b[0] / 255])


@pytest.mark.parametrize("tf32", [False, True])
def test_what_is_set_around_does_not_reach_the_network(adm, monkeypatch, tf32):
    def look(module, inputs):
        seen.append(torch.is_autocast_enabled("cpu"))
        if hasattr(torch.backends.cudnn, "conv"):
            seen.append(torch.backends.cudnn.conv.fp32_precision)
            seen.append(torch.backends.cuda.matmul.fp32_precision)

    seen, images = [], random_images(1, 75)
    expected = adm(images)
    handle = adm.network.Mixed_7c.register_forward_pre_hook(look)
    monkeypatch.setattr(adm, "tf32", tf32)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = adm(images)
    finally:
        handle.remove()
    assert seen[0] is False
    assert set(seen[1:]) <= {"tf32" if tf32 else "ieee"}
    assert all(torch.equal(found[name], rows) for name, rows in expected.items())
    assert not any(rows.requires_grad for rows in found.values())


def test_memory_format_changes_nothing_but_rounding(adm, inception_weights):
    images = random_images(2, 64)
    plain = fid.Inception(inception_weights, size=75, channels_last=False)
    with torch.no_grad():
        assert relative(plain(images)["features"], adm(images)["features"]) < 1e-5
    assert plain.name == adm.name


def test_a_whole_evaluation_equals_torch_fidelity(adm, theirs, inception_weights, tmp_path):
    """FID, Inception Score, precision and recall of 40 images against 40, by both evaluators."""
    torch_fidelity = pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    assert torch_fidelity.__version__
    mine, real = random_images(40, 64, seed=1), random_images(40, 64, seed=2) // 2
    ev = fid.Evaluator(
        real, extractor=adm, metrics=("fid", "sfid", "is", "pr"), device="cpu", groups=0, pr_compat="fp32"
    )
    result = ev.update(mine).compute()
    rows, real_rows = ev.summary.rows, ev.reference_side.rows
    isc = isc_features_to_metric(rows["logits"])
    options = {"prc_neighborhood": 3, "prc_batch_size": 10_000, "save_cpu_ram": False, "verbose": False}
    prc = prc_features_to_metric(rows["features"], real_rows["features"], **options)
    sides = [fid_features_to_statistics(side["features"].double()) for side in (rows, real_rows)]
    assert result.inception_score_shuffled == pytest.approx(isc["inception_score_mean"], rel=1e-12)
    assert result.precision == pytest.approx(prc["precision"], abs=1e-7)
    assert result.recall == pytest.approx(prc["recall"], abs=1e-7)
    expected = fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]
    assert result.fid == pytest.approx(expected, rel=1e-5)  # fewer images than dimensions
    assert result.sfid > 0
    assert result.record["weights"]["published"] is False
    assert "other weights than the published ones" in " ".join(result.warnings)
    with torch.no_grad():
        assert relative(rows["features"], theirs(mine)[0]) < 1e-5


def test_statistics_files_keep_what_sfid_needs(adm, tmp_path):
    images = random_images(20, 64)
    made = fid.statistics(images, adm, device="cpu")
    assert sorted(made.statistics) == ["features", "spatial"]
    fid.save_reference(tmp_path / "x.npz", made)
    with np.load(tmp_path / "x.npz") as file:
        assert {"mu", "sigma", "mu_s", "sigma_s", "protocol", "num_images"} <= set(file.files)
    ev = fid.Evaluator(tmp_path / "x.npz", extractor=adm, device="cpu", groups=0)
    assert ev.metrics == ("fid", "sfid", "is")
    assert "P/R needs arr_0 (use VIRTUAL_imagenet256_labeled.npz). Continuing with fid, sfid, is." in ev.warnings[0]
    result = ev.update(images).compute()
    assert result.fid < 1e-6 * np.trace(made.statistics["features"].cov)
    assert result.sfid < 1e-6 * np.trace(made.statistics["spatial"].cov)


# Weights


def test_the_cache_is_searched_under_both_names_and_checked(inception_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.delenv("FID_INCEPTION_WEIGHTS", raising=False)
    (tmp_path / "checkpoints").mkdir()
    for name in reversed(WEIGHTS_FILES):
        shutil.copy(inception_weights, tmp_path / "checkpoints" / name)
        with pytest.raises(ValueError, match=rf"{name}' is damaged: its SHA-256 does not begin with 6726825d"):
            fid.Inception()
    digest = hashlib.sha256(inception_weights.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="is damaged"):  # named by the user, the name still says the hash
        fid.Inception(tmp_path / "checkpoints" / WEIGHTS_FILES[1])
    monkeypatch.setattr(inception, "PUBLISHED", digest[:8])
    found = fid.Inception()
    assert found.weights == {
        "path": str(tmp_path / "checkpoints" / WEIGHTS_FILES[0]),
        "sha256": digest,
        "published": True,
    }
    monkeypatch.setenv("FID_INCEPTION_WEIGHTS", str(inception_weights))
    assert fid.Inception().weights["path"] == str(inception_weights)
    assert fid.Inception(tmp_path / "checkpoints" / WEIGHTS_FILES[1]).name == found.name


def test_what_is_in_no_cache_is_downloaded_once(inception_weights, tmp_path, monkeypatch):
    def download(url, path, hash_prefix=None):
        assert url.endswith("/fid_weights/pt_inception-2015-12-05-6726825d.pth")
        assert hash_prefix == inception.PUBLISHED
        asked.append(path)
        shutil.copy(inception_weights, path)

    asked = []
    monkeypatch.delenv("FID_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(inception, "PUBLISHED", hashlib.sha256(inception_weights.read_bytes()).hexdigest()[:8])
    with ThreadPoolExecutor(4) as pool:  # as the processes of a node do
        found = set(pool.map(inception._find_weights, [None] * 4))
    assert len(found) == 1
    assert fid.Inception().weights == fid.Inception().weights
    assert asked == [str(tmp_path / "hub" / "checkpoints" / WEIGHTS_FILES[0])]


def test_inception_refuses(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route")

    def of_another_hash(*_, **__):
        raise RuntimeError('invalid hash value (expected "6726825d", got "0")')

    monkeypatch.delenv("FID_INCEPTION_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", of_another_hash)
    with pytest.raises(FileNotFoundError, match=r"not found \(invalid hash value .*Get pt_"):
        fid.Inception()
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(
        FileNotFoundError, match=rf"no route.*Tried: .*{WEIGHTS_FILES[0]}, .*{WEIGHTS_FILES[1]}\. Get pt_"
    ):
        fid.Inception()
    with pytest.raises(FileNotFoundError, match=r"no such file\)\. Tried: .*x\.pth\. Get"):
        fid.Inception(tmp_path / "x.pth")
    for content in (
        b"",
        b"nonsense",
        b"hello world\n",
        b"<!DOCTYPE html>",
        b"version https://git-lfs.github.com/spec/v1\n",
    ):
        (tmp_path / "x.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.pth' is not a PyTorch file"):
            fid.Inception(tmp_path / "x.pth")
    for state, sentence in (
        (
            {"weight": torch.zeros(1)},
            r"x\.pth' does not hold the FID's Inception: Missing key.*name it with --extractor\)\.$",
        ),
        ([1, 2], r"x\.pth' does not hold the FID's Inception"),
        (
            {"fc.weight": torch.zeros(1000, 1)},
            r"x\.pth' is torchvision's ImageNet Inception \(1000 classes\); FID needs the 2015 graph with 1008\.$",
        ),
    ):
        torch.save(state, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=sentence):
            fid.Inception(tmp_path / "x.pth")


def test_selfcheck_prints_what_can_be_compared(inception_weights, capsys):
    from fid.__main__ import main

    main(["selfcheck", "--weights", str(inception_weights), "--device", "cpu"])
    lines = capsys.readouterr().out
    assert "resize      ok" in lines
    assert "NOT the published ones" in lines
    assert all(f"{preset:<11} pool3" in lines for preset in fid.PRESETS)


def test_selfcheck_refuses_weights_that_give_zeros(inception_weights, tmp_path, capsys):
    from fid.__main__ import main

    state = torch.load(inception_weights, weights_only=True)
    dead = {key: value * 0 if key.startswith("Mixed_7c") else value for key, value in state.items()}
    torch.save(dead, tmp_path / "dead.pth")
    with pytest.raises(SystemExit) as ended:
        main(["selfcheck", "--weights", str(tmp_path / "dead.pth"), "--device", "cpu"])
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert "gives only zeros for the synthetic image and its negative: the weights in" in printed


def test_the_fingerprint_is_of_what_matters():
    a, b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    b.num_batches_tracked += 1
    assert fingerprint(a) == fingerprint(b)
    b.running_mean += 1
    assert fingerprint(a) != fingerprint(b)


@pytest.mark.parametrize("precision", ["high", "medium"])  # TF32; bfloat16, on some CPUs
def test_ieee_float32_puts_back_what_was_set(monkeypatch, precision):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    monkeypatch.setattr(cudnn, "benchmark", True)
    before = cudnn.allow_tf32
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            with ieee_float32():
                assert not torch.is_autocast_enabled("cpu")
                assert not cudnn.benchmark
                if hasattr(cudnn, "conv"):
                    assert cudnn.conv.fp32_precision == matmul.fp32_precision == "ieee"
                    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            assert torch.is_autocast_enabled("cpu")
        assert cudnn.benchmark
        assert matmul.allow_tf32
        assert cudnn.allow_tf32 == before
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_ieee_float32_leaves_what_follows_another_switch():
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch has one switch only")
    before = torch.backends.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "none"  # what another test has set
    try:
        for precision in ("tf32", "ieee", "tf32"):
            torch.backends.fp32_precision = precision
            with ieee_float32():
                assert torch.backends.cudnn.conv.fp32_precision == "ieee"
            assert torch.backends.cudnn.conv.fp32_precision == precision
            assert torch.backends.cuda.matmul.fp32_precision == precision
    finally:
        torch.backends.fp32_precision = before


# The other extractors


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    classifier = fid.Classifier(num_classes=10, image_size=16)
    with torch.no_grad():
        classifier(random_images(64, 16))  # batch statistics that are not 0 and 1
    return classifier.eval()


def test_classifier_round_trip(classifier, tmp_path):
    images = random_images(5, 16)
    classifier.save(tmp_path / "x.safetensors")
    found = fid.EXTRACTORS["classifier"].load(tmp_path / "x.safetensors")
    assert (found.num_classes, found.image_size, found.accuracy) == (10, 16, None)
    assert found.name == classifier.name
    assert torch.equal(found(images)["features"], classifier(images)["features"])
    mixed = found([images[0], random_images(1, 20)[0]])
    assert torch.equal(mixed["features"][:1], classifier(images[:1])["features"])
    assert {name: rows.shape[1] for name, rows in mixed.items()} == found.dims
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
def shapes(tmp_path_factory):
    """Folders of colour images, 12 pixels: a bar that lies and is red, stands and is red, or stands and is green."""
    folder, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for name in ("lies", "stands", "stands_green"):
        (folder / name).mkdir()
        for i in range(30):
            image, k = rng.integers(0, 60, (12, 12, 3), dtype=np.uint8), rng.integers(1, 10)
            image[k : k + 2, :, 0] = 255
            image = image if name == "lies" else image.swapaxes(0, 1)
            Image.fromarray(image[..., ::-1] if name.endswith("green") else image).save(folder / name / f"{i}.png")
    return folder


def run_fid(capsys, *words):
    from fid.__main__ import main

    main([str(word) for word in words])
    return capsys.readouterr().out


def test_an_extractor_is_trained_on_ones_own_classes(shapes, tmp_path, capsys):
    """It tells form and colour of images that it did not see, is the same again, and measures."""
    file, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    small = ["--steps", 120, "--held-out", 0.2, "--device", "cpu"]
    line = run_fid(capsys, "train-extractor", shapes, "--out", file, *small)
    assert "a.safetensors: 100.0% of 18 held-out images right (always the largest of 3 classes: 33.3%)" in line
    found = fid.Classifier.load(file)
    assert (found.channels, found.num_classes, found.image_size, found.accuracy) == (3, 3, 12, 1.0)
    assert found.made_of == f"72 images of {shapes}, 18 more held out, seed 0"
    state = torch.get_rng_state()
    run_fid(capsys, "train-extractor", shapes, "--out", again, *small)
    assert torch.equal(torch.get_rng_state(), state)  # whoever calls it goes on drawing as before
    assert fid.Classifier.load(again).name == found.name
    measured = ["--extractor", "classifier", "--weights", file, "--groups", 0, "--device", "cpu"]
    record = json.loads(run_fid(capsys, "eval", shapes, "--ref", shapes, *measured, "--json", "-"))
    assert record["fd"] < 1e-6
    assert record["weights"]["accuracy"] == 1.0
    assert record["weights"]["made_of"] == found.made_of


@pytest.mark.parametrize("size", [8, 12, 16, 64, 128])
def test_the_classifier_of_colours_takes_each_size_and_sees_colours(size, tmp_path):
    torch.manual_seed(0)
    classifier = fid.Classifier(4, size, channels=3).eval()
    images = random_images(2, size)
    features = classifier(images)["features"]
    assert features.shape == (2, 64)
    assert not torch.equal(features, classifier(images.flip(1))["features"])
    classifier.save(tmp_path / "x.safetensors")
    assert torch.equal(fid.Classifier.load(tmp_path / "x.safetensors")(images)["features"], features)


@pytest.mark.parametrize("num", [None, 60, 31])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_what_is_held_out_is_the_share_of_each_class(num, share):
    labels = np.repeat([0, 1, 2], [50, 30, 20])[np.random.default_rng(1).permutation(100)]
    chosen, held = _split(labels, num, share, seed=0)
    total = num or 100
    assert (np.diff(chosen) > 0).all()
    assert len(chosen) == total
    assert held.sum() == int(total * share)
    for k, part in enumerate((0.5, 0.3, 0.2)):  # every K-th of an order by classes: off by less than one at either end
        assert abs((labels[chosen] == k).sum() - part * total) <= 1
        assert abs((labels[chosen[held]] == k).sum() - part * total * share) <= 1


def test_what_an_extractor_cannot_be_trained_on(shapes, tmp_path):
    one = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "wide.npz", np.zeros((4, 8, 10, 3), dtype=np.uint8), np.arange(4) % 2)
    for images, options, sentence in (
        (fid.Images(one), {}, "has no classes to train on: give a folder or .zip with a folder for each class"),
        (fid.Images(shapes / "lies"), {}, "has no classes to train on"),
        (fid.Images(tmp_path / "wide.npz"), {"held_out": 0.5}, "10x8 pixels; the classifier takes squares"),
        (fid.Images(shapes), {"held_out": 0.9}, "held out is 0.9; choose one above 0, and at most 0.5"),
        (fid.Images(shapes), {"num": 91}, "--num is 91; choose at least 2, and at most the 90 images"),
        (fid.Images(shapes), {"num": 5}, "5 images of 3 classes are too few to hold 0.1 of them out"),
    ):
        with pytest.raises(ValueError, match=sentence):
            train_extractor(images, **options)


def test_an_extractor_is_trained_on_the_classes_of_a_labels_csv(shapes, tmp_path, capsys):
    """As train.py has them: the file is read, and not the folders, of which there is one."""
    lines, folder = [], tmp_path / "images" / "all"
    folder.mkdir(parents=True)
    for k, name in enumerate(("lies", "stands")):
        for i in range(10):
            shutil.copy(shapes / name / f"{i}.png", folder / f"{k}_{i}.png")
            lines.append(f"all/{k}_{i}.png,{name}")
    (tmp_path / "images" / "labels.csv").write_text("\n".join(lines))
    small = ["--steps", 2, "--held-out", 0.2, "--device", "cpu", "--quiet"]
    line = run_fid(capsys, "train-extractor", tmp_path / "images", "--out", tmp_path / "a.safetensors", *small)
    assert "of 4 held-out images right (always the largest of 2 classes: 50.0%)" in line
    (tmp_path / "images" / "labels.csv").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"labels.csv' gives 'all/1_9.png' no class"):
        fid.Images(tmp_path / "images").with_classes()
    (tmp_path / "images" / "labels.csv").unlink()
    with pytest.raises(ValueError, match=r"^'.*/all' holds images without a class, '0_0.png' and 19 more: put each"):
        fid.Images(folder).with_classes()


def test_pixels_are_means_over_cells():
    """Of 16 pixels over 8 cells, each the mean of 2 x 2; grey levels c everywhere are c / 255 everywhere."""
    images, pixels = random_images(3, 16), fid.build_extractor("pixels", None)
    expected = images.double().unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean(dim=(3, 5)) / 255  # (B, 3, 8, 8)
    torch.testing.assert_close(pixels(images)["features"].double(), expected.flatten(1), rtol=1e-6, atol=0)  # float32
    mixed = pixels([images[0], torch.full((3, 5, 7), 51, dtype=torch.uint8)])["features"]
    assert torch.equal(mixed[:1], pixels(images[:1])["features"])
    assert torch.allclose(mixed[1], torch.tensor(0.2), rtol=1e-6)


def test_the_distance_of_pixels_in_closed_form(tmp_path, capsys):
    """One-coloured images of levels x and x + 51 differ in the mean only: by 51 / 255 in each of 192 numbers."""
    levels = np.arange(10, 30, dtype=np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (20, 8, 8, 3))
    np.save(tmp_path / "a.npy", images)
    np.save(tmp_path / "b.npy", images + np.uint8(51))
    words = [tmp_path / "b.npy", "--ref", tmp_path / "a.npy", "--extractor", "pixels", "--device", "cpu", "--quiet"]
    line = run_fid(capsys, "eval", *words)
    assert line.startswith("Frechet distance 7.68")  # 192 x 0.2^2
    assert line.endswith("pixels-8x8, 20 samples; compares only with numbers by pixels-8x8)\n")
    record = json.loads(run_fid(capsys, "eval", *words, "--json", "-"))
    assert record["fd"] == pytest.approx(192 * 0.2**2, rel=1e-5)  # features are float32
    assert "fid" not in record
    named = [record[key] for key in ("label", "extractor", "protocol", "compares")]
    assert named == ["Frechet distance", "pixels-8x8", "pixels-8x8", "only with numbers by pixels-8x8"]


def test_random_inception_is_the_same_everywhere(inception_weights):
    """Its weights are those of numpy's generator, whatever torch drew before; its blocks are those of FID's network."""
    torch.manual_seed(1)
    found = fid.build_extractor("random-inception", None)
    assert found.name == "random-inception-37f903c0"
    assert (found.label, found.metrics, found.dims) == ("Frechet distance", ("fd",), {"features": 2048})
    weight = found.network.Conv2d_1a_3x3.conv.weight
    drawn = np.random.default_rng(0).standard_normal((32, 3, 3, 3), dtype=np.float32)
    assert np.allclose(weight.numpy(), drawn * (2 / 27) ** 0.5, rtol=1e-6)
    images = random_images(2, 32)
    features = found(images)["features"]
    assert found.train().training is False
    assert (features[0] - features[1]).norm() > 1e-3 * features.norm()  # a thousand times what `check_features` asks
    other = fid.Inception(inception_weights)
    found.network.load_state_dict(other.network.state_dict())  # with the other's weights it is the other
    assert torch.equal(found(images)["features"], other(images)["features"])


def cubic(distance):
    """Keys's kernel with a = -3/4."""
    d = abs(distance)
    return 1.25 * d**3 - 2.25 * d**2 + 1 if d <= 1 else -0.75 * (d**3 - 5 * d**2 + 8 * d - 4) * (d < 2)


def test_dinov2_is_timms_network_on_what_it_expects(tmp_path):
    """Positions are resized as in DINOv2's own code and images as in EDM2's, which made the published references."""
    timm = pytest.importorskip("timm")
    name = "vit_small_patch14_dinov2.lvd142m"
    network = timm.create_model(name, num_classes=0, global_pool="token").eval()
    nn.init.normal_(network.pos_embed, std=0.1)
    for block in network.blocks:  # as made, they add 1e-5 of what they compute: the class token would see no image
        nn.init.ones_(block.ls1.gamma)
        nn.init.ones_(block.ls2.gamma)
    save_file(network.state_dict(), tmp_path / "x.safetensors")
    ours = fid.DINOv2(tmp_path / "x.safetensors", model_name=name)

    matrix = np.zeros((16, 37))  # of the resize of one axis, border repeated
    for i in range(16):
        centre = (i + 0.5) * 37 / 16.1 - 0.5
        for k in range(int(centre) - 1, int(centre) + 3):
            matrix[i, min(max(k, 0), 36)] += cubic(centre - k)
    positions = network.pos_embed[0, 1:].detach().double().numpy().reshape(37, 37, 384)
    positions = np.einsum("ik,jl,kld->ijd", matrix, matrix, positions, optimize=True).reshape(256, 384)
    positions = torch.cat([network.pos_embed.detach()[:, :1], torch.from_numpy(positions).float()[None]], dim=1)
    network.set_input_size(img_size=(224, 224))
    assert relative(network.pos_embed.detach(), positions) > 0.1  # timm's own way is another
    network.pos_embed = nn.Parameter(positions)

    image = random_images(1, 300, 260)
    rows = [Image.fromarray(channel.numpy().astype(np.float32)) for channel in image[0]]
    rows = np.stack([np.array(channel.resize((224, 224), Image.Resampling.BICUBIC)) for channel in rows])
    assert rows.min() < 0  # neither clipped nor rounded
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = torch.from_numpy((rows / 255 - mean[:, None, None]) / std[:, None, None]).float()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            found = ours(image)["features"]
        assert relative(found, network(x[None])) < 1e-5
        assert relative(ours(image // 2)["features"], found) > 0.1
        assert torch.equal(ours([image[0]])["features"], found)
    assert (ours.dim, ours.dims, ours.label, ours.name[:7]) == (384, {"features": 384}, "FD-DINOv2", "dinov2-")
    assert not ours.train().training

    state = load_file(tmp_path / "x.safetensors")
    torch.save({**state, "mask_token": torch.zeros(1, 384)}, tmp_path / "x.pth")  # as in DINOv2's own file
    assert fid.DINOv2(tmp_path / "x.pth", model_name=name).name == ours.name


def test_dinov2_refuses(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    name = "vit_small_patch14_dinov2.lvd142m"
    with pytest.raises(FileNotFoundError, match="'nowhere' do not exist"):
        fid.DINOv2("nowhere", model_name=name)
    save_file({"weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="does not hold vit_small"):
        fid.DINOv2(tmp_path / "x.safetensors", model_name=name)
    for file in ("x.safetensors", "x.pth"):
        (tmp_path / file).write_bytes(b"nonsense")
        with pytest.raises(ValueError, match=rf"{file}' is not a file of weights, or is cut short"):
            fid.DINOv2(tmp_path / file, model_name=name)

    def offline(*_, **__):
        raise OSError("no route")

    with monkeypatch.context() as patch:
        patch.setattr(fid.networks.dinov2, "_ask_hub", offline)
        with pytest.raises(FileNotFoundError, match=r"from the Hugging Face hub \(no route\)\. Download them"):
            fid.DINOv2()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="needs timm; run `pip install timm`"):
        fid.DINOv2()
