"""Codecs and the cache: one scale, read from the autoencoder's config, and latents on disk that are those of the images."""

import errno
import fcntl
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import cache_latents
import fid.__main__
import sample
import train
from vca_engine import assemble
from vca_engine.config.cli import parse
from vca_engine.files import sha256_of, sha256_of_weights
from vca_engine.images import encode
from vca_engine.images.codecs import PixelCodec, VAECodec, sample_posterior
from vca_engine.images.labels import DataInfo
from vca_engine.images.latents import LatentDataset
from vca_engine.records import read_json, write_json
from vca_engine.weights import checkpoint

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
    z = sample_posterior(moments, 2, 0, torch.arange(n)).flatten(1)
    assert z.shape == (n, 2)
    assert ((z.mean(0) - mean).abs() < 5 * std / n**0.5).all()
    assert ((z.std(0) - std).abs() < 5 * std / (2 * n) ** 0.5).all()
    assert abs(np.corrcoef(z.T)[0, 1]) < 5 / n**0.5


def test_a_draw_is_a_function_of_seed_position_and_moments():
    moments = torch.rand(6, 8, 3, 3).half()
    z = sample_posterior(moments, 4, 7, torch.arange(10, 16))
    assert torch.equal(sample_posterior(moments[2:5], 4, 7, torch.arange(12, 15)), z[2:5])
    assert not torch.equal(sample_posterior(moments, 4, 8, torch.arange(10, 16)), z)
    assert not torch.equal(sample_posterior(moments, 4, 7, torch.arange(6)), z)
    assert z.dtype == torch.float32


def test_a_tiny_autoencoder_has_no_posterior(tmp_path):
    torch.manual_seed(0)
    sizes = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    blocks = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    tiny = AutoencoderTiny(**sizes, **blocks, scaling_factor=0.5, shift_factor=0.1).eval()
    tiny.save_pretrained(tmp_path)
    codec = VAECodec(3, path=str(tmp_path))
    assert (codec.channels, codec.downsample, codec.posterior, codec.identity["kind"]) == (
        4,
        4,
        False,
        "AutoencoderTiny",
    )
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        z = tiny.encode(images).latents
        latents = codec.moments(images)
        torch.testing.assert_close(latents, (z - 0.1) * 0.5)
        torch.testing.assert_close(codec.decode(latents), tiny.decode(z).sample)
    assert torch.equal(sample_posterior(latents, 4, 0, torch.arange(2)), latents)


def test_codecs_know_themselves(tmp_path):
    autoencoder(scaling_factor=0.7).save_pretrained(tmp_path / "a")
    autoencoder(scaling_factor=0.7).save_pretrained(tmp_path / "moved")
    autoencoder(scaling_factor=0.8).save_pretrained(tmp_path / "scaled")
    other = autoencoder(scaling_factor=0.7)
    other.encoder.conv_in.bias.data += 1e-6
    other.save_pretrained(tmp_path / "other")
    a, moved, scaled, other = (VAECodec(3, path=str(tmp_path / n)).identity for n in ("a", "moved", "scaled", "other"))
    assert a == moved
    assert a["weights"] == scaled["weights"] != other["weights"]
    assert a["scale"] != scaled["scale"]


def test_another_kind_of_autoencoder_is_named(tmp_path):
    autoencoder().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderDC"}))
    with pytest.raises(FileNotFoundError, match="it is a AutoencoderDC, not one of AutoencoderKL, AutoencoderTiny"):
        VAECodec(3, path=str(tmp_path))


def test_pixels_are_their_own_latents():
    codec, images = PixelCodec(3), torch.rand(2, 3, 4, 4)
    assert (codec.channels, codec.downsample, codec.posterior) == (3, 1, False)
    assert torch.equal(sample_posterior(codec.moments(images), 3, 0, torch.arange(2)), images)
    assert torch.equal(codec.decode(images), images)


def test_images_of_other_channels_are_named(tmp_path):
    autoencoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the images have 1 channel\(s\), the autoencoder .* takes 3"):
        VAECodec(1, path=str(tmp_path))


def test_an_autoencoder_is_on_the_hub_by_the_rule_of_weights(tmp_path, monkeypatch):
    """owner/name where there is no folder of the owner's name, and asked once; .bin only where there is no other."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    asked = []

    def download(name, allow_patterns):
        asked.append(allow_patterns)
        if name == "owner/far":
            raise LocalEntryNotFoundError("Cannot find the files.") from OSError("no route to host")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("vca_engine.hub.snapshot_download", download)
    for path in ("configs/vae", "./x/y", "vae", "/nowhere/vae", "a/b/c", ""):
        with pytest.raises(
            FileNotFoundError, match=rf"codec\.path '{path}' is neither a folder .*: there is no such f"
        ):
            VAECodec(3, path=path)
    assert asked == []
    with pytest.raises(
        FileNotFoundError, match=r"codec\.path 'owner/far' .* cannot be reached, .*: no route to host\. "
    ):
        VAECodec(3, path="owner/far")
    assert asked == [["config.json", "diffusion_pytorch_model.safetensors"]]
    for safe in (True, False):
        asked.clear()
        shutil.rmtree(tmp_path / "snapshot", ignore_errors=True)
        vae = autoencoder()
        vae.save_pretrained(tmp_path / "snapshot", safe_serialization=safe)
        assert VAECodec(3, path="owner/vae").identity["weights"] == sha256_of_weights(vae)
        assert [patterns[1] for patterns in asked] == [
            f"diffusion_pytorch_model{ending}" for ending in (".safetensors", ".bin")[: 1 if safe else 2]
        ]


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
    small += "--train.num_steps 4 --train.batch_size 4 --train.num_workers 0 --sample.per_class 1 --cache.shard_size 5 "
    small += "--sample.sampler.name ode --sample.sampler.method euler --sample.sampler.num_steps 3 --cache.batch_size 3"
    data = f"{{name: folder, images: {tmp_path / 'images'}, image_size: 16, flip: {str(flip).lower()}}}"
    codec = f"{{name: vae, path: {tmp_path / 'vae'}}}"
    parts = ["--run_dir", str(tmp_path / "run"), "--data", data, "--codec", codec]
    return [*small.split(), *parts, *map(str, extra)]


def sentence(capsys, main, argv):
    with pytest.raises(SystemExit) as stop:
        main([*map(str, argv)])
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def files_of(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# What a cache holds


@pytest.mark.parametrize("flip", [True, False])
def test_the_cache_holds_what_encoding_gives(tmp_path, images, vae, flip, capsys):
    where = tmp_path / "cache"
    argv = settings(tmp_path, "--latents", where, flip=flip)
    cache_latents.main(argv)
    printed = capsys.readouterr().out
    assert f"wrote 12 latents{' and their mirror images' * flip} to" in printed
    assert "3 shards" in printed
    config = parse(cache_latents.CacheArguments, argv, prog="", description="")
    cached, direct = LatentDataset(str(where)), assemble.images(config)
    codec = assemble.codec(config, 3)
    assert (len(cached), cached.flip, cached.image_size, cached.channels) == (12, flip, 16, 3)
    assert cached.class_names == direct.class_names == ["down", "left", "right", "up"]
    assert DataInfo.of(cached) == DataInfo.of(direct)
    total = []
    for mirrored in (False, True)[: 1 + flip]:
        for i in range(12):
            moments, label = cached[i, mirrored]
            image, same = direct[i, mirrored]
            assert label == same
            assert moments.dtype == torch.float16
            expected = codec.moments(image[None])[0]
            torch.testing.assert_close(moments.float(), expected, rtol=1e-3, atol=1e-4)
            total.append(expected)
    if flip:
        assert (cached[0, False][0] - cached[0, True][0]).abs().max() > 1e-3
    assert not (tmp_path / "cache.partial").exists()
    assert set(files_of(where)) == {"labels.npy", "manifest.json", *(f"shard-{k:05d}.npy" for k in range(3))}

    mean, std = torch.stack(total).chunk(2, dim=1)  # (N, C, h, w)
    manifest = cached.manifest
    variance = mean.var(dim=(0, 2, 3), correction=0) + std.square().mean(dim=(0, 2, 3))  # of a draw
    np.testing.assert_allclose(manifest["mean"], mean.mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(manifest["std"], variance.sqrt(), rtol=1e-3)
    assert manifest["class_counts"] == dict.fromkeys(cached.class_names, 3)
    assert [shard["num_images"] for shard in manifest["shards"]] == [5, 5, 2]

    before = files_of(where)
    cache_latents.main(argv)
    assert "nothing to do" in capsys.readouterr().out
    assert files_of(where) == before


def test_one_draw_for_ever_where_moments_are_not_kept(tmp_path, images, vae):
    argv = settings(tmp_path)
    cache_latents.main([*argv, "--latents", str(tmp_path / "moments")])
    cache_latents.main([*argv, "--latents", str(tmp_path / "drawn"), "--cache.moments", "false", "--seed", "3"])
    moments, drawn = (LatentDataset(str(tmp_path / name)) for name in ("moments", "drawn"))
    for i, flip in ((0, False), (0, True), (11, True)):
        expected = sample_posterior(moments[i, flip][0][None], 4, 3, torch.tensor([2 * i + flip]))[0]
        assert drawn[i, flip][0].shape == (4, 8, 8)
        torch.testing.assert_close(drawn[i, flip][0].float(), expected, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(drawn.manifest["std"], moments.manifest["std"], rtol=0.05)
    train.main([*argv, "--latents", str(tmp_path / "drawn")])


def test_a_packaged_data_set_without_an_autoencoder(tmp_path, capsys):
    argv = ["--process.name", "flow", "--data.name", "digits", "--codec.name", "pixels", "--cache.shard_size", "500"]
    argv += ["--run_dir", str(tmp_path / "run"), "--latents", str(tmp_path / "cache")]
    cache_latents.main(argv)
    cached = LatentDataset(str(tmp_path / "cache"))
    config = parse(cache_latents.CacheArguments, argv, prog="", description="")
    digits = assemble.images(config)
    assert len(cached) == len(digits) == 1297
    for i in (0, 499, 500, 1296):
        torch.testing.assert_close(cached[i, False][0].float(), digits[i, False][0], atol=5e-4, rtol=0)
        assert cached[i, False][1] == digits[i, False][1]
    cache_latents.main([*argv, "--check"])
    assert "0.0 grey levels apart" in capsys.readouterr().out


def test_two_processes_write_the_bytes_of_one(tmp_path, images, vae):
    (images / "left" / "1.png").write_bytes(b"no image")
    argv = settings(tmp_path, "--cache.on_error", "skip")
    cache_latents.main([*argv, "--latents", str(tmp_path / "one")])
    script = [str(Path(cache_latents.__file__)), *argv, "--latents", str(tmp_path / "two")]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", *script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


# Reading


def test_workers_map_the_file_and_get_no_copy_of_it(tmp_path, images, vae):
    cache_latents.main(settings(tmp_path, "--latents", tmp_path / "cache"))
    cached = LatentDataset(str(tmp_path / "cache"))
    alone = [cached[i, bool(i % 2)] for i in range(12)]
    assert len(pickle.dumps(cached)) < 5000  # not what it has mapped
    order = [[(i, bool(i % 2)) for i in range(k, k + 4)] for k in (0, 4, 8)]
    for context in ("fork", "spawn"):
        workers = {"num_workers": 2, "multiprocessing_context": context}
        loader = DataLoader(cached, batch_sampler=order, collate_fn=cached.collate, **workers)
        batches = list(loader)
        assert torch.equal(torch.cat([x for x, _ in batches]), torch.stack([x for x, _ in alone]))
        assert torch.cat([y for _, y in batches]).tolist() == [y for _, y in alone]
    cached[3, False][0].zero_()  # a copy
    assert LatentDataset(str(tmp_path / "cache"))[3, False][0].abs().sum() > 0


def test_the_same_run_with_and_without_the_cache(tmp_path, images):
    """The cache changes rounding only: that of float16, and of the encoder in other batches. The encoder is so wide that its
    output may come in another memory format.
    """
    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    wide = AutoencoderKL(
        **blocks, block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8
    )
    wide.save_pretrained(tmp_path / "vae")
    losses = []
    for name, extra in (("direct", []), ("cached", ["--latents", tmp_path / "cache"])):
        argv = settings(tmp_path, "--train.log_every", 1, *extra, "--run_dir", tmp_path / name)
        if extra:
            cache_latents.main(argv)
        train.main(argv)
        text = (tmp_path / name / "metrics.jsonl").read_text()
        losses.append([json.loads(line)["loss"] for line in text.splitlines()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


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


def test_balanced_classes_go_on_exactly_from_images_and_from_a_cache_of_them(tmp_path, images, vae, capsys):
    """3 + 2 steps are 5 bit for bit; the cache was made without a word of balance, which no latent depends on."""
    for k in (0, 1):
        (images / "up" / f"{k}.png").unlink()
    cache_latents.main(settings(tmp_path, "--latents", tmp_path / "cache"))
    balanced = ["--data.balance", "classes", "--train.log_every", 1]
    for cached in ([], ["--latents", tmp_path / "cache"]):
        found = []
        for name, steps in (("whole", [5]), ("parts", [3, 5])):
            folder = tmp_path / f"{name}{len(cached)}"
            for num in steps:
                extra = [*balanced, *cached, "--run_dir", folder, "--train.num_steps", num]
                train.main(settings(tmp_path, *extra))
            found.append(load_file(checkpoint.find(folder) / "ema.safetensors"))
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
        assert "(down: 3, left: 3, right: 3, up: 1), each class drawn equally often" in capsys.readouterr().out
    text = sentence(capsys, train.main, [*settings(tmp_path, "--run_dir", folder, *cached), "--train.num_steps", "6"])
    assert "data.balance classes" in text.replace("'", "")
    text = sentence(capsys, train.main, settings(tmp_path, "--data.balance", "class", "--run_dir", tmp_path / "new"))
    assert "data.balance is 'class'; choose classes, or leave it out." in text


def test_a_cache_and_an_autoencoder_may_move(tmp_path, images, vae):
    cache_latents.main(settings(tmp_path, "--latents", tmp_path / "cache"))
    shutil.move(tmp_path / "cache", tmp_path / "elsewhere")
    shutil.copytree(vae, tmp_path / "copy")
    argv = settings(tmp_path, "--latents", tmp_path / "elsewhere", "--codec.path", tmp_path / "copy")
    train.main([*map(str, argv)])


# What is refused


def test_images_that_the_latents_were_not_made_of_are_refused_and_never_recorded(tmp_path, images, vae, capsys):
    argv = settings(tmp_path, "--latents", tmp_path / "cache")
    cache_latents.main(argv)
    others = shutil.copytree(images, tmp_path / "others")
    train.main([*argv, "--data.images", others, "--run_dir", tmp_path / "moved"])  # the same images elsewhere
    next(others.glob("up/*.png")).unlink()
    for folder, found in (
        (others, "holds 11 images of 4 classes, which are not those"),
        (tmp_path / "gone", "is not there"),
    ):
        text = sentence(capsys, train.main, [*argv, "--data.images", folder, "--run_dir", tmp_path / "new"])
        assert f"data.images '{folder}' {found}" in text
        assert f"were made of, 12 images of 4 classes in '{images}'. Leave data.images out" in text
        assert not (tmp_path / "new").exists()


def test_one_pass_lists_all_images_that_cannot_be_read(tmp_path, images, capsys):
    argv = [*map(str, settings(tmp_path, "--codec", "{name: pixels}"))]
    cache_latents.main([*argv, "--check-images"])
    assert "all 12 images can be read: 4 classes (down: 3, left: 3, right: 3, up: 3)" in capsys.readouterr().out
    (images / "up" / "0.png").write_bytes(b"no image")
    (images / "left" / "2.png").write_bytes((images / "left" / "2.png").read_bytes()[:80])
    with pytest.raises(SystemExit) as stop:
        cache_latents.main([*argv, "--check-images", "--train.num_workers", "2"])
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert "2 of 12 images cannot be read; mend or remove those" in said.err
    for name, why in (("up/0.png", "it is in none of the formats"), ("left/2.png", "image file is truncated")):
        assert f"'{images}/{name}' cannot be read as an image: {why}" in said.out
    assert "--check-images, lists all such files" in sentence(capsys, train.main, argv)


def test_a_run_from_latents_goes_on_whatever_has_become_of_its_images(tmp_path, images, vae, capsys):
    """It goes on with what it recorded, also if that is of before images were compared; other images are refused."""
    argv = settings(tmp_path, "--latents", tmp_path / "cache")
    cache_latents.main(argv)
    train.main(argv)
    next(images.glob("up/*.png")).unlink()
    more = [*argv, "--train.num_steps", "5"]
    others = shutil.copytree(images, tmp_path / "others")
    assert "which are not those" in sentence(capsys, train.main, [*more, "--data.images", others])
    train.main(more)
    assert checkpoint.find(tmp_path / "run").name == "step-00000005"


def test_the_cache_needs_a_name(tmp_path, images, vae, capsys):
    assert "name the folder to write, --latents FOLDER" in sentence(capsys, cache_latents.main, settings(tmp_path))


@pytest.mark.parametrize(
    "other, text",
    [
        (["--data.image_size", 32], "data.image_size 16 (needed: 32)"),
        (["--data.flip", "false"], "data.flip True (needed: False)"),
        (["--codec.path", "other"], "codec.weights "),
        (["--codec.path", "scaled"], "codec.scale [0.69"),
    ],
)
def test_a_cache_of_something_else_is_refused(tmp_path, images, vae, capsys, monkeypatch, other, text):
    monkeypatch.chdir(tmp_path)
    argv = settings(tmp_path, "--latents", tmp_path / "cache")
    cache_latents.main(argv)
    another = autoencoder(scaling_factor=0.7)
    another.encoder.conv_in.bias.data += 1
    another.save_pretrained("other")
    autoencoder(scaling_factor=0.3).save_pretrained("scaled")
    for main in (train.main, cache_latents.main):
        found = sentence(capsys, main, [*argv, *other])
        assert f"were made with {text}" in found
        assert "choose another folder and run cache_latents.py again" in found
    assert not (tmp_path / "run").exists()


def test_images_that_were_added_are_seen(tmp_path, images, vae, capsys):
    argv = settings(tmp_path, "--latents", tmp_path / "cache")
    cache_latents.main(argv)
    shutil.copy(images / "up" / "1.png", images / "up" / "9.png")
    assert "were made with images " in sentence(capsys, cache_latents.main, argv)
    assert "which are not those that latents" in sentence(capsys, train.main, argv)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("script", [train, cache_latents], ids=["train", "cache_latents"])
def test_a_corrupt_image_is_named_whoever_reads_it(tmp_path, images, vae, capsys, script, workers):
    (images / "up" / "1.png").write_bytes(b"no image")
    argv = settings(tmp_path, "--train.num_workers", workers)
    argv += ["--latents", str(tmp_path / "cache")] if script is cache_latents else []
    text = sentence(capsys, script.main, argv)
    assert "up/1.png' cannot be read as an image" in text
    assert f"{script.__name__}.py: " in text


def test_unreadable_images_are_left_out_where_that_is_asked_for(tmp_path, images, vae, capsys):
    for name in ("down/0.png", "up/2.png"):  # the first and the last
        (images / name).write_bytes(b"no image")
    for name in (f"right/{i}.png" for i in range(3)):  # a whole class
        (images / name).write_bytes(b"")
    argv = settings(tmp_path, "--latents", tmp_path / "cache", "--cache.on_error", "skip")
    cache_latents.main(argv)
    assert "5 skipped" in capsys.readouterr().out
    cached = LatentDataset(str(tmp_path / "cache"))
    assert Counter(cached.labels.tolist()) == {0: 2, 1: 3, 3: 2}
    assert cached.manifest["class_counts"] == {"down": 2, "left": 3, "right": 0, "up": 2}
    assert [skip["index"] for skip in cached.manifest["skipped"]] == [0, 6, 7, 8, 11]
    assert "down/0.png' cannot be read" in cached.manifest["skipped"][0]["why"]
    codec = VAECodec(3, path=str(vae))
    config = parse(cache_latents.CacheArguments, argv, prog="", description="")
    direct = assemble.images(config)
    for j, i in enumerate((1, 2, 3, 4, 5, 9, 10)):
        expected = codec.moments(direct[i, True][0][None])[0]
        torch.testing.assert_close(cached[j, True][0].float(), expected, rtol=1e-3, atol=1e-4)
    cache_latents.main([*argv, "--check"])
    assert "7 latents of 4 classes, 3 shards, 5 images skipped" in capsys.readouterr().out


def test_no_readable_image_at_all(tmp_path, images, vae, capsys):
    for file in images.rglob("*.png"):
        file.write_bytes(b"")
    argv = settings(tmp_path, "--latents", tmp_path / "cache", "--cache.on_error", "skip")
    assert "none of the 12 images could be read" in sentence(capsys, cache_latents.main, argv)
    assert not (tmp_path / "cache").exists()


def test_a_shard_without_a_readable_image(tmp_path, images, vae, capsys):
    whole, argv = tmp_path / "whole", settings(tmp_path, "--cache.shard_size", "2")
    cache_latents.main([*argv, "--latents", str(whole)])
    names = sorted(file.relative_to(images) for file in images.rglob("*.png"))
    for name in names[2:4]:
        (images / name).write_bytes(b"")
    argv += ["--cache.on_error", "skip", "--latents", str(tmp_path / "cache")]
    cache_latents.main(argv)
    cache_latents.main([*argv, "--check"])
    capsys.readouterr()
    cache_latents.main(argv)
    assert "nothing to do" in capsys.readouterr().out
    cache, all_of = LatentDataset(str(tmp_path / "cache")), LatentDataset(str(whole))
    kept = [k for k in range(len(names)) if k not in (2, 3)]
    for read in (lambda: None, lambda: cache.preload(torch.device("cpu"))):
        read()
        found, expected = (
            data.__getitems__([(k, True) for k in part]) for data, part in ((cache, range(len(kept))), (all_of, kept))
        )
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["manifest.json", "labels.npy"])
def test_a_fifo_in_a_cache_does_not_hang(tmp_path, images, vae, capsys, name):
    argv = settings(tmp_path, "--latents", tmp_path / "cache")
    cache_latents.main(argv)
    (tmp_path / "cache" / name).unlink()
    os.mkfifo(tmp_path / "cache" / name)
    text = {"manifest.json": "it has no manifest.json", "labels.npy": "labels.npy is missing"}[name]
    assert text in sentence(capsys, train.main, argv)


def test_a_link_to_a_disk_that_is_not_there_is_found_before_the_work(tmp_path, images, vae, capsys):
    (tmp_path / "cache").symlink_to("/nowhere")
    assert "leads nowhere" in sentence(capsys, cache_latents.main, settings(tmp_path, "--latents", tmp_path / "cache"))
    assert not (tmp_path / "cache.partial").exists()


def test_a_damaged_cache_stays_as_it_is_while_another_folder_is_in_its_way(tmp_path, images, vae, capsys):
    argv = settings(tmp_path, "--latents", tmp_path / "cache")
    cache_latents.main(argv)
    (tmp_path / "cache" / "shard-00001.npy").unlink()
    before = files_of(tmp_path / "cache")
    (tmp_path / "cache.partial").mkdir()
    (tmp_path / "cache.partial" / "mine").touch()
    assert "cache.partial' is there already; choose another" in sentence(capsys, cache_latents.main, argv)
    assert files_of(tmp_path / "cache") == before


def test_one_class_is_said(tmp_path, images, vae, capsys):
    for name in ("down", "left", "right"):
        shutil.rmtree(images / name)
    cache_latents.main(settings(tmp_path, "--latents", tmp_path / "cache"))
    assert "note: there is one class only, 'up'" in capsys.readouterr().err
    train.main(settings(tmp_path, "--latents", tmp_path / "cache"))


@pytest.mark.parametrize("what", ["a size that does not fit", "a file in the way", "too small a disk"])
def test_what_stops_it_before_the_work(tmp_path, images, vae, capsys, monkeypatch, what):
    argv, text = settings(tmp_path, "--latents", tmp_path / "cache"), "choose a multiple"
    if what == "a size that does not fit":
        argv += ["--data.image_size", "17"]
    elif what == "a file in the way":
        argv[-1], text = str(vae / "config.json" / "cache"), "cannot make the folder"
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 5000))
        text = "where 0.0 GB are free"
    monkeypatch.setattr(encode.CacheWriter, "run", None)
    assert text in sentence(capsys, cache_latents.main, argv)


# Interruptions and damage


def stop_after(monkeypatch, num, error):
    """The next cache stops with `error` after `num` shards."""
    sync, done = os.fsync, []

    def fsync(file):
        if len(done) == num:
            raise error
        done.append(file)
        sync(file)

    monkeypatch.setattr(encode.os, "fsync", fsync)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_cache_goes_on_at_the_first_missing_shard(tmp_path, images, vae, capsys, monkeypatch, error):
    argv = settings(tmp_path)
    cache_latents.main([*argv, "--latents", str(tmp_path / "whole")])
    where, partial = tmp_path / "cache", tmp_path / "cache.partial"
    argv += ["--latents", str(where)]
    with monkeypatch.context() as patch:
        stop_after(patch, 2, error)
        if isinstance(error, OSError):
            assert "cannot write '" in sentence(capsys, cache_latents.main, argv)
        else:
            with pytest.raises(SystemExit) as ended:
                cache_latents.main(argv)
            assert ended.value.code == 130
    assert not where.exists()
    assert {file.name for file in partial.iterdir()} == {
        "settings.json",
        *(f"shard-0000{k}.{suffix}" for k in (0, 1) for suffix in ("npy", "json")),
    }
    with pytest.raises(ValueError, match=r"is not a folder made by cache_latents\.py"):
        LatentDataset(str(partial))
    assert "holds unfinished latents made with" in sentence(capsys, cache_latents.main, [*argv, "--data.flip", "false"])
    before = (partial / "shard-00001.npy").stat().st_mtime_ns
    cache_latents.main(argv)
    assert (where / "shard-00001.npy").stat().st_mtime_ns == before
    assert files_of(where) == files_of(tmp_path / "whole")


def test_a_folder_that_is_something_else_is_not_touched(tmp_path, images, vae, capsys):
    (tmp_path / "cache.partial").mkdir()
    (tmp_path / "cache.partial" / "mine").touch()
    argv = settings(tmp_path, "--latents", tmp_path / "cache")
    assert "is there already and was not made by cache_latents.py" in sentence(capsys, cache_latents.main, argv)
    (tmp_path / "cache").mkdir()
    assert "is not a folder made by cache_latents.py" in sentence(capsys, cache_latents.main, argv)
    assert (tmp_path / "cache.partial" / "mine").exists()


def test_two_at_a_time_are_one_too_many(tmp_path, images, vae, capsys, monkeypatch):
    monkeypatch.setattr(encode, "PATIENCE", 0.2)
    with open(tmp_path / ".cache.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # as a process that a killed launcher left behind
        argv = settings(tmp_path, "--latents", tmp_path / "cache")
        assert "another cache_latents.py is writing" in sentence(capsys, cache_latents.main, argv)
        assert not (tmp_path / "cache.partial").exists()
    cache_latents.main(argv)


def test_after_an_unreadable_image_it_goes_on_with_or_without_it(tmp_path, images, vae, capsys):
    good = (images / "up" / "1.png").read_bytes()
    for name, mend in (("mended", ["again"]), ("skipped", ["--cache.on_error", "skip"])):
        (images / "up" / "1.png").write_bytes(b"x" * len(good))  # of the same size
        argv = [*map(str, settings(tmp_path, "--latents", tmp_path / name))]
        assert "or give --cache.on_error skip, which leaves it out" in sentence(capsys, cache_latents.main, argv)
        before = (tmp_path / f"{name}.partial" / "shard-00000.npy").stat().st_mtime_ns
        if mend == ["again"]:
            (images / "up" / "1.png").write_bytes(good)
        cache_latents.main(argv if mend == ["again"] else argv + mend)
        assert (tmp_path / name / "shard-00000.npy").stat().st_mtime_ns == before
        assert len(LatentDataset(str(tmp_path / name))) == 12 - (name == "skipped")


def test_a_missing_shard_is_made_anew(tmp_path, images, vae, capsys):
    argv = settings(tmp_path, "--latents", tmp_path / "cache")
    cache_latents.main(argv)
    before = files_of(tmp_path / "cache")
    (tmp_path / "cache" / "shard-00001.npy").unlink()
    (tmp_path / "cache" / "shard-00002.npy").write_bytes(b"cut")
    assert "shard-00001.npy is missing; cache_latents.py makes it anew" in sentence(capsys, train.main, argv)
    damaged = files_of(tmp_path / "cache")
    assert "were made with data.flip True (needed: False)" in sentence(
        capsys, cache_latents.main, [*argv, "--data.flip", "false"]
    )
    assert files_of(tmp_path / "cache") == damaged
    cache_latents.main(argv)
    assert files_of(tmp_path / "cache") == before


def changed(file, place):
    """Flip a bit of a file; its size stays."""
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("damage", ["data", "header", "record", "a record of before", "the shard is gone"])
def test_a_damaged_shard_of_an_unfinished_cache_is_made_anew(tmp_path, images, vae, capsys, monkeypatch, damage):
    argv = settings(tmp_path)
    cache_latents.main([*argv, "--latents", str(tmp_path / "whole")])
    argv, partial = [*argv, "--latents", str(tmp_path / "cache")], tmp_path / "cache.partial"
    with monkeypatch.context() as patch:
        stop_after(patch, 2, OSError(errno.ENOSPC, "No space left on device"))
        sentence(capsys, cache_latents.main, argv)
    record = read_json(partial / "shard-00001.json")
    if damage == "a record of before":  # none: it has the checksum of the shard, but none of itself
        for k in range(2):
            before = read_json(partial / f"shard-0000{k}.json")
            (partial / f"shard-0000{k}.json").write_text(json.dumps(before))
    elif damage == "record":
        text = (partial / "shard-00001.json").read_text()
        (partial / "shard-00001.json").write_text(text.replace('"num_images": 5', '"num_images": 4'))
    elif damage == "the shard is gone":
        (partial / "shard-00001.npy").unlink()
    else:
        changed(partial / "shard-00001.npy", -100 if damage == "data" else 40)
    (partial / ".shard-00002.npy.0123abcd.tmp").touch()  # of a program that was killed
    cache_latents.main(argv)
    said = "note: '" + str(partial / "shard-00001.npy") + "' is damaged; it is made anew." in capsys.readouterr().err
    assert said == (damage != "a record of before")
    assert files_of(tmp_path / "cache") == files_of(tmp_path / "whole")
    assert record["num_images"] == 5


@pytest.mark.parametrize("place", [10, 40, 100, 127])
@pytest.mark.parametrize("part", ["labels.npy", "shard-00001.npy"])
def test_a_damaged_header_is_found_when_a_cache_is_opened(tmp_path, images, vae, capsys, part, place):
    argv = settings(tmp_path, "--latents", tmp_path / "cache")
    cache_latents.main(argv)
    before = files_of(tmp_path / "cache")
    changed(tmp_path / "cache" / part, place)
    text = f"are damaged: {part} has another {'checksum' if part == 'labels.npy' else 'header'}; cache_latents.py makes"
    assert text in sentence(capsys, train.main, argv)
    cache_latents.main(argv)
    assert files_of(tmp_path / "cache") == before


def test_a_damaged_manifest_is_not_believed_and_one_of_before_is_read(tmp_path, images, vae, capsys):
    argv, file = settings(tmp_path, "--latents", tmp_path / "cache"), tmp_path / "cache" / "manifest.json"
    cache_latents.main(argv)
    text = file.read_text()
    file.write_text(text.replace('"up"', '"uq"'))
    assert "manifest.json' is damaged, or was changed by hand" in sentence(capsys, train.main, argv)
    file.write_text(json.dumps(read_json_of(text)))
    assert len(LatentDataset(str(tmp_path / "cache"))) == 12


def read_json_of(text):
    """Leave out what earlier versions did not write."""
    return {key: value for key, value in json.loads(text).items() if key not in ("checksum", "labels_sha256")}


@pytest.mark.parametrize("when", ["before its records go", "while it is opened again"])
def test_a_cache_killed_at_its_end_is_whole_with_the_next_command(tmp_path, images, vae, capsys, monkeypatch, when):
    argv, where = settings(tmp_path, "--latents", tmp_path / "cache"), tmp_path / "cache"
    cache_latents.main(argv)
    before = files_of(where)
    with monkeypatch.context() as patch:
        if when == "before its records go":
            shutil.rmtree(where)
            patch.setattr(encode, "tidy", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        else:
            (where / "shard-00001.npy").unlink()
            patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            cache_latents.main(argv)
    cache_latents.main(argv)
    assert files_of(where) == before
    assert [file.name for file in tmp_path.iterdir() if "cache" in file.name] == ["cache"]


def test_the_lock_of_a_killed_program_is_waited_for(tmp_path, images, vae, capsys, monkeypatch):
    with open(tmp_path / ".cache.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        monkeypatch.setattr(encode.time, "sleep", lambda _: fcntl.flock(other, fcntl.LOCK_UN))
        cache_latents.main(settings(tmp_path, "--latents", tmp_path / "cache"))
    assert "perhaps one of a program that was killed; waiting for it, 15 s at most" in capsys.readouterr().err
    assert len(LatentDataset(str(tmp_path / "cache"))) == 12


def test_a_batch_that_no_memory_holds_is_refused(tmp_path, images, vae, capsys, monkeypatch):
    monkeypatch.setattr(encode.os, "sysconf", lambda name: 10_000)  # pages, and bytes of a page: 100 MB
    argv = settings(tmp_path, "--latents", tmp_path / "cache", "--cache.batch_size", 60_000)
    found = sentence(capsys, cache_latents.main, argv)  # 60,000 x 16 x 16 x 3, in uint8 and in float32
    assert (
        "a batch of 60,000 images takes 0.2 GB, and this machine has 0.1; choose a smaller --cache.batch_size" in found
    )


def test_labels_are_checked_too(tmp_path, images, vae, capsys):
    argv = [*map(str, settings(tmp_path, "--latents", tmp_path / "cache"))]
    cache_latents.main(argv)
    np.save(tmp_path / "cache" / "labels.npy", np.zeros(12, np.int64))
    assert "labels.npy has another checksum" in sentence(capsys, cache_latents.main, [*argv, "--check"])


def test_a_run_is_not_gone_on_with_on_other_classes(tmp_path, images, vae, capsys):
    argv = [*map(str, settings(tmp_path, "--latents", tmp_path / "cache"))]
    cache_latents.main(argv)
    train.main(argv)
    (images / "up").rename(images / "above")
    other = [*argv, "--latents", str(tmp_path / "other"), "--train.num_steps", "6"]
    cache_latents.main(other)
    found = sentence(capsys, train.main, other)
    assert "was trained on other data, or through another autoencoder: shape.class_names ['down', 'left'," in found
    assert "(now ['above'," in found


def test_check_reads_everything(tmp_path, images, vae, capsys):
    where = tmp_path / "cache"
    argv = [*map(str, settings(tmp_path, "--latents", where))]
    cache_latents.main(argv)
    cache_latents.main([*argv, "--check"])
    printed = capsys.readouterr().out
    assert "12 latents of 4 classes, 3 shards, 0 images skipped; checksums and counts are right" in printed
    with Image.open(where / "check.png") as picture:
        assert picture.size[0] > 8 * 64
    assert LatentDataset(str(where))[0, False]  # the picture does no harm
    shutil.move(images, tmp_path / "away")
    cache_latents.main([*argv, "--check"])
    printed = capsys.readouterr()
    assert "checksums and counts are right" in printed.out
    assert "no picture, since what it needs is not there" in printed.err
    shutil.move(tmp_path / "away", images)
    shard = where / "shard-00001.npy"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1000] + bytes([content[-1000] ^ 1]) + content[-999:])
    assert "shard-00001.npy has another checksum" in sentence(capsys, cache_latents.main, [*argv, "--check"])
    array = np.load(shard)
    array[2, 0, 0, 0, 0] = np.nan
    np.save(shard, array)
    manifest = read_json(where / "manifest.json")
    manifest["shards"][1]["sha256"] = sha256_of(shard)
    write_json(where / "manifest.json", manifest)
    assert "numbers that are not finite" in sentence(capsys, cache_latents.main, [*argv, "--check"])


@pytest.mark.parametrize("part", ["manifest.json", "labels.npy", "shard-00001.npy"])
@pytest.mark.parametrize("how", ["missing", "empty", "cut"])
def test_an_incomplete_cache_is_named(tmp_path, images, vae, part, how):
    cache_latents.main(settings(tmp_path, "--latents", tmp_path / "cache"))
    file = tmp_path / "cache" / part
    content = file.read_bytes()
    file.unlink() if how == "missing" else file.write_bytes(b"" if how == "empty" else content[: len(content) - 10])
    with pytest.raises(
        ValueError, match=r"is not a folder made by cache_latents\.py|are damaged: (shard-00001|labels).npy"
    ):
        LatentDataset(str(tmp_path / "cache"))


@pytest.mark.parametrize("content", ["[]", "{}", '{"settings": {"class_names": []}}'])
def test_a_folder_with_another_manifest_is_not_a_cache(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"is not a folder made by cache_latents\.py"):
        LatentDataset(str(tmp_path))


# Your own images, from the folder to the distance


def test_the_recipe_for_ones_own_images(tmp_path, vae, monkeypatch, capsys):
    """Seven classes of different counts and sizes -> cache -> training -> grid -> reference -> distance."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    counts = {"ant": 5, "bee": 9, "cat": 3, "dog": 12, "emu": 7, "fox": 4, "gnu": 10}
    for name, count in counts.items():
        Path("images", name).mkdir(parents=True)
        for i in range(count):
            size = rng.integers(20, 90, 2)
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(
                f"images/{name}/{i}.{'png' if i % 2 else 'jpg'}"
            )
    fid.Classifier(num_classes=7, image_size=16).eval().save("judge.safetensors")
    argv = [*settings(tmp_path), "--latents", "latents"]
    cache_latents.main(argv)
    assert LatentDataset("latents").manifest["class_counts"] == counts
    train.main(argv)
    with Image.open("run/previews/step-00000004.png") as picture:
        assert picture.size[1] > 7 * 64  # a row a class
    judge = ["--extractor", "classifier", "--weights", "judge.safetensors"]
    fid.__main__.main(["stats", "images", "--crop", "16", "--out", "ref.npz", *judge, "--quiet"])
    names = ["--fid_extractor", "classifier", "--fid_weights", "judge.safetensors"]
    sample.main(["--checkpoint", "run", "--num", "20", "--fid", "ref.npz", *names])
    assert "Frechet distance" in capsys.readouterr().out
    record = json.loads(next(Path("run").glob("fid-step-*.json")).read_text())
    assert record["reference"]["num_images"] == sum(counts.values())
    assert record["num_samples"] == 20
