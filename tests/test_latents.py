"""Codecs and the cache: one scale, read from the autoencoder's config, and latents on disk that are those of the images."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

import build
import cache_latents
import sample
import train
from runtime.config import Config, parse
from runtime.data import DATASETS
from runtime.latents import CachedLatents, PixelCodec, VAECodec, draw, write_cache

pytestmark = pytest.mark.usefixtures("as_in_a_new_process")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def autoencoder(channels=3, **scale):
    """Random weights; 2x smaller latents of 4 channels."""
    torch.manual_seed(1)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        mid_block_add_attention=False,
        **scale,
    ).eval()


SCALES = {
    "scaling_factor": {"scaling_factor": 0.3},
    "shift_factor": {"scaling_factor": 0.4, "shift_factor": 0.25},
    "latents_mean": {
        "scaling_factor": 0.5,
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [1.0, 2.0, 0.5, 0.25],
    },
}


@pytest.mark.parametrize("name", SCALES)
def test_the_scale_of_latents_is_that_of_the_config(tmp_path, name):
    """mean = (z - shift) scale, std = std scale; decoding undoes it."""
    config = SCALES[name]
    vae = autoencoder(**config)
    vae.save_pretrained(tmp_path)
    codec = VAECodec(3, path=str(tmp_path))
    assert (codec.channels, codec.image_channels, codec.downsample) == (4, 3, 2)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        z = vae.encode(images).latent_dist
        shift = torch.tensor(config.get("latents_mean", [config.get("shift_factor", 0.0)] * 4)).reshape(1, 4, 1, 1)
        std = torch.tensor(config.get("latents_std", [1.0] * 4)).reshape(1, 4, 1, 1)
        moments = codec.moments(images)
        assert moments.shape == (2, 8, 4, 4)
        mean = (z.mean - shift) * config["scaling_factor"] / std
        torch.testing.assert_close(moments[:, :4], mean)
        torch.testing.assert_close(moments[:, 4:], z.std * config["scaling_factor"] / std)
        torch.testing.assert_close(codec.decode(moments[:, :4]), vae.decode(z.mean).sample)
        any_z = torch.randn(2, 4, 4, 4)
        normalised = (any_z - shift) * config["scaling_factor"] / std
        torch.testing.assert_close(codec.decode(normalised), vae.decode(any_z).sample)
    assert not any(p.requires_grad for p in codec.parameters())


def test_draws_have_the_moments():
    mean, std = torch.tensor([0.5, -1.0]), torch.tensor([0.1, 2.0])
    n = 20_000
    moments = torch.cat([mean, std]).reshape(1, 4, 1, 1).expand(n, 4, 1, 1)
    z = draw(moments).flatten(1)
    assert z.shape == (n, 2)
    assert ((z.mean(0) - mean).abs() < 5 * std / n**0.5).all()
    assert ((z.std(0) - std).abs() < 5 * std / (2 * n) ** 0.5).all()
    assert abs(np.corrcoef(z.T)[0, 1]) < 5 / n**0.5


def test_pixels_are_their_own_latents():
    codec, images = PixelCodec(3), torch.rand(2, 3, 4, 4)
    assert (codec.channels, codec.downsample) == (3, 1)
    assert torch.equal(draw(codec.moments(images)), images)
    assert torch.equal(codec.decode(images), images)


def test_images_of_other_channels_are_named(tmp_path):
    autoencoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the images have 1 channel\(s\), the autoencoder .* takes 3"):
        VAECodec(1, path=str(tmp_path))


@pytest.mark.parametrize("what", ["nothing", "an empty folder", "no weights", "cut weights", "a damaged config"])
def test_an_autoencoder_that_cannot_be_read_is_named(tmp_path, what):
    folder = tmp_path / "vae"
    if what != "nothing":
        folder.mkdir()
    if what in ("no weights", "cut weights", "a damaged config"):
        autoencoder().save_pretrained(folder)
        weights = folder / "diffusion_pytorch_model.safetensors"
        if what == "no weights":
            weights.unlink()
        elif what == "cut weights":
            weights.write_bytes(weights.read_bytes()[:1000])
        else:
            (folder / "config.json").write_text("{")
    with pytest.raises((FileNotFoundError, ValueError), match=rf"codec\.path '{folder}' is neither a folder saved by"):
        VAECodec(3, path=str(folder))


@pytest.fixture
def images(tmp_path):
    """Four classes of three 32x32 gradients, none its own mirror image."""
    x, y = np.meshgrid(np.arange(32), np.arange(32))
    for k, name in enumerate(("up", "down", "left", "right")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            channels = [x * (k + 1) + 9 * i, y * (4 - k), (x + y) * 2 + 20 * i]
            pixels = np.stack(channels, axis=2).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def vae(tmp_path):
    autoencoder(scaling_factor=0.7).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def settings(tmp_path, *extra, flip=True):
    small = "--process.name flow --model.hidden_size 16 --model.depth 1 --model.num_heads 2 --model.patch_size 2 "
    small += "--train.num_steps 4 --train.batch_size 4 --train.num_workers 0 --sample.rows 1 "
    small += "--sample.sampler.name ode --sample.sampler.method euler --sample.sampler.num_steps 3"
    data = f"{{name: folder, path: {tmp_path / 'images'}, image_size: 16, flip: {str(flip).lower()}}}"
    codec = f"{{name: vae, path: {tmp_path / 'vae'}}}"
    parts = ["--run_dir", str(tmp_path / "run"), "--data", data, "--codec", codec]
    return [*small.split(), *parts, *map(str, extra)]


def sentence(capsys, main, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("flip", [True, False])
def test_the_cache_holds_what_encoding_gives(tmp_path, images, vae, flip, capsys):
    where = tmp_path / "cache"
    argv = settings(tmp_path, "--latents", where, flip=flip)
    cache_latents.main(argv)
    assert f"wrote 12 latents{' and their mirror images' * flip} to" in capsys.readouterr().out
    config = parse(Config, argv, prog="", description="")
    cached, direct = build.build_latents(config), build.build_images(config)
    codec = build.build_codec(config, 3)
    assert (len(cached), cached.flip, cached.image_size, cached.channels) == (12, flip, 16, 3)
    assert cached.class_names == direct.class_names == ["down", "left", "right", "up"]
    assert build.shape_of(cached) == build.shape_of(direct)
    for mirrored in (False, True)[: 1 + flip]:
        for i in range(12):
            moments, label = cached[i, mirrored]
            image, same = direct[i, mirrored]
            assert label == same
            torch.testing.assert_close(moments, codec.moments(image[None])[0], rtol=1e-4, atol=1e-5)
    if flip:
        assert (cached[0, False][0] - cached[0, True][0]).abs().max() > 1e-3
    assert not (tmp_path / "cache.partial").exists()

    written = (where / "latents.npy").stat().st_mtime_ns
    cache_latents.main(argv)
    assert "nothing to do" in capsys.readouterr().out
    assert (where / "latents.npy").stat().st_mtime_ns == written


def test_a_cache_of_something_else_is_refused(tmp_path, images, vae, capsys):
    argv = settings(tmp_path, "--latents", tmp_path / "cache")
    cache_latents.main(argv)
    for other in (["--data.image_size", 32], ["--codec.path", tmp_path / "another"]):
        for main in (train.main, cache_latents.main):
            text = sentence(capsys, main, [*argv, *map(str, other)])
            assert "were made from" in text
            assert "choose another folder and run cache_latents.py again" in text
    assert not (tmp_path / "run").exists()


def test_the_cache_needs_a_name(tmp_path, images, vae, capsys):
    assert "name the folder to write, --latents FOLDER" in sentence(capsys, cache_latents.main, settings(tmp_path))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("script", [train, cache_latents], ids=["train", "cache_latents"])
def test_a_corrupt_image_is_named_whoever_reads_it(tmp_path, images, vae, capsys, script, workers):
    (images / "up" / "1.png").write_bytes(b"no image")
    argv = settings(tmp_path, "--train.num_workers", workers)
    argv += ["--latents", str(tmp_path / "cache")] if script is cache_latents else []
    text = sentence(capsys, script.main, argv)
    assert "up/1.png' cannot be read as an image" in text
    assert f"{script.__name__}.py: " in text


def test_an_interrupted_cache_is_not_there(tmp_path, images):
    """Encoding stops half-way: no cache, nothing that could be taken for one; the next try begins anew."""
    data = DATASETS["folder"](path=str(images), image_size=16)
    codec, calls = PixelCodec(3), []

    def stops(x):
        calls.append(len(x))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return codec.moments(x)

    where = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        write_cache(str(where), data, stops, {}, batch_size=5, workers=0)
    assert not where.exists()
    with pytest.raises(FileNotFoundError, match="make it with: python cache_latents"):
        CachedLatents(str(where), {})
    with pytest.raises(ValueError, match=r"is not a folder made by cache_latents\.py"):
        CachedLatents(f"{where}.partial", {})
    write_cache(str(where), data, codec.moments, {}, batch_size=5, workers=0)
    assert len(CachedLatents(str(where), {})) == 12


@pytest.mark.parametrize("missing", ["cache.json", "labels.npy", "latents.npy", "flipped.npy"])
@pytest.mark.parametrize("how", ["missing", "empty", "cut"])
def test_an_incomplete_cache_is_named(tmp_path, images, missing, how):
    data = DATASETS["folder"](path=str(images), image_size=8)
    where = tmp_path / "cache"
    write_cache(str(where), data, PixelCodec(3).moments, {}, batch_size=5, workers=0)
    file = where / missing
    content = file.read_bytes()
    file.unlink() if how == "missing" else file.write_bytes(b"" if how == "empty" else content[: len(content) - 10])
    with pytest.raises(ValueError, match=r"is not a folder made by cache_latents\.py"):
        CachedLatents(str(where), {})


@pytest.mark.parametrize("content", ["[]", "{}", '{"arrays": ["latents"]}'])
def test_a_folder_with_another_record_is_not_a_cache(tmp_path, images, content):
    data = DATASETS["folder"](path=str(images), image_size=8)
    write_cache(str(tmp_path / "cache"), data, PixelCodec(3).moments, {}, batch_size=5, workers=0)
    (tmp_path / "cache" / "cache.json").write_text(content)
    with pytest.raises(ValueError, match=r"is not a folder made by cache_latents\.py"):
        CachedLatents(str(tmp_path / "cache"), {})


@pytest.mark.parametrize("cached", [True, False])
def test_from_a_folder_of_images_to_samples(tmp_path, images, vae, cached):
    argv = settings(tmp_path, *(["--latents", tmp_path / "cache"] if cached else []))
    if cached:
        cache_latents.main(argv)
        shutil.move(images, tmp_path / "moved")  # training from the cache needs no image
    train.main(argv)
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(lines[-1]["loss"])
    request = ["--checkpoint", str(tmp_path / "run"), "--num", "5", "--out", str(tmp_path / "a.npz")]
    sample.main(request)
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["arr_0"].shape == (5, 16, 16, 3)  # 8x8 latents, decoded
        assert arrays["arr_0"].std() > 1
        assert set(arrays["arr_1"].tolist()) <= set(range(4))
        images_before = arrays["arr_0"]
    if not cached:
        shutil.move(vae, tmp_path / "elsewhere")
        request[-1] = str(tmp_path / "b.npz")
        sample.main([*request, "--vae", str(tmp_path / "elsewhere")])
        with np.load(tmp_path / "b.npz") as arrays:
            assert (arrays["arr_0"] == images_before).all()


def test_the_same_run_with_and_without_the_cache(tmp_path, images, vae):
    """The cache changes the rounding of the encoder only: batches of 64 at once, not of 4."""
    losses = []
    for name, extra in (("direct", []), ("cached", ["--latents", tmp_path / "cache"])):
        argv = settings(tmp_path, "--train.log_every", 1, *extra, "--run_dir", tmp_path / name)
        if extra:
            cache_latents.main(argv)
        train.main(argv)
        text = (tmp_path / name / "metrics.jsonl").read_text()
        losses.append([json.loads(line)["loss"] for line in text.splitlines()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
