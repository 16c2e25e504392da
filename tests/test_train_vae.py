"""The autoencoder of one's own: its training goes on exactly after a kill, and its folder is a codec of scale 1."""

import colorsys
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_vae
from vca_engine import assemble
from vca_engine.images import from_uint8
from vca_engine.images.codecs import VAECodec

ROOT = Path(train_vae.__file__).parent
SMALL = "--widths [4,8] --batch_size 4 --num_steps 12 --checkpoint_every 4 --log_every 3 --picture_every 6 --device cpu"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 20 images of 16x16 pixels, each of one colour."""
    folder = tmp_path_factory.mktemp("data") / "images"
    (folder / "all").mkdir(parents=True)
    for i in range(20):
        colour = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(i / 20, 0.8, 0.9))
        Image.new("RGB", (16, 16), colour).save(folder / "all" / f"{i:02}.png")
    return folder


def words(images, out, *more):
    return [*SMALL.split(), "--data.images", str(images), "--out", str(out), *more]


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """Its folder, trained in one go."""
    out = tmp_path_factory.mktemp("trained") / "vae"
    train_vae.main(words(images, out))
    return out


def test_the_folder_is_a_codec_whose_latents_have_mean_0_and_deviation_1(trained, images):
    codec = VAECodec(3, path=str(trained))
    assert (codec.downsample, codec.channels) == (2, 4)
    x = torch.stack([from_uint8(np.asarray(Image.open(file))) for file in sorted(images.rglob("*.png"))])
    mean = codec.moments(x)[:, :4]
    torch.testing.assert_close(mean.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)  # sums of float32
    torch.testing.assert_close(mean.std((0, 2, 3)), torch.ones(4), rtol=0, atol=1e-4)
    assert codec.decode(mean).shape == x.shape


def test_the_block_of_the_page_measures_other_images(trained, images, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "vae").symlink_to(trained)
    (tmp_path / "others").symlink_to(images)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "autoencoder.md").read_text(), re.DOTALL)
    exec(block, {})
    shown = float(re.search(r"hues ([\d.]+) of the circle", capsys.readouterr().out)[1])
    assert 0 < shown < 0.5


def test_balance_draws_each_class_equally_often(tmp_path):
    """Of three white images and one black one, half of what it learns from is black; elsewhere it is refused."""
    for name, colour, num in (("white", 255, 3), ("black", 0, 1)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(num):
            Image.new("RGB", (16, 16), (colour,) * 3).save(tmp_path / "images" / name / f"{i}.png")
    args = train_vae.VaeArguments(
        out="vae", batch_size=8, data={"name": "folder", "images": str(tmp_path / "images"), "balance": "classes"}
    )
    batch = next(train_vae.batches_from(args, assemble.images(args), 0))
    assert batch.mean((1, 2, 3)).tolist().count(-1.0) == 4
    with pytest.raises(SystemExit, match="2"):
        train_vae.main(words(tmp_path / "images", tmp_path / "vae", "--data.balance", "sizes"))


def test_what_it_writes_of_the_training(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert lines[-1]["error"] < lines[0]["error"]
    pictures = sorted(file.name for file in (trained / "previews").glob("*.png"))
    assert pictures == ["step-00000006.png", "step-00000012.png"]
    assert Image.open(trained / "loss.png").size[0] > 100
    assert not (trained / "training.pt").exists()


def test_killed_it_goes_on_with_the_same_numbers(trained, images, tmp_path):
    out, program = tmp_path / "vae", [sys.executable, str(ROOT / "train_vae.py"), *words(images, tmp_path / "vae")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "training.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "config.json").exists()
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    assert "goes on after step " in done.stdout
    threads = torch.get_num_threads()
    for name in ("metrics.jsonl", "config.json", train_vae.WEIGHTS):
        assert threads > 1 or (out / name).read_bytes() == (trained / name).read_bytes()


def test_a_second_time_there_is_nothing_to_do_and_other_settings_are_refused(trained, images, capsys):
    train_vae.main(words(images, trained, "--picture_every", "5"))
    assert "is trained already; nothing to do." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train_vae.main(words(images, trained, "--lr", "0.1"))
    assert "holds another training, with lr 0.003 (you gave 0.1); choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--widths", "[6,8]"], "widths is [6, 8]; choose multiples of 4, e.g. [16,32,32]."),
        (["--widths", "[4,4,4,4,4,4]"], "images of 16x16 cannot be halved 5 times; choose --data.image_size with"),
        (["--levels", "3"], "'levels' is not a setting"),
    ],
)
def test_what_does_not_fit_is_a_sentence(images, tmp_path, capsys, more, said):
    with pytest.raises(SystemExit) as stop:
        train_vae.main(words(images, tmp_path / "vae", *more))
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_place_among_the_images_is_refused(images, capsys):
    with pytest.raises(SystemExit):
        train_vae.main(words(images, images / "vae"))
    assert "choose a place outside, --out FOLDER" in capsys.readouterr().err


def test_the_help_has_its_own_options_only(capsys):
    with pytest.raises(SystemExit):
        train_vae.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("data", "out", "widths", "latent_channels", "num_steps", "kl_weight"))
    assert not any(f"--{name}" in text for name in ("train.", "model.", "sample.", "fid.", "run_dir"))


def test_the_error_of_hues_is_the_angle_between_them():
    """Red to green is a third of the circle, also over 0; grey has no hue to lose, and counts nothing."""
    red, green, grey = ([255, 0, 0], [0, 255, 0], [90, 90, 90])
    as_image = lambda *pixels: np.array([[pixels]], dtype=np.uint8)  # noqa: E731
    assert train_vae.hue_error(as_image(red), as_image(green)) == pytest.approx(1 / 3, abs=1e-12)
    assert train_vae.hue_error(as_image([255, 0, 20]), as_image([255, 20, 0])) < 0.05
    assert train_vae.hue_error(as_image(red, grey), as_image(red, green)) == 0
    assert train_vae.hue_error(as_image(grey), as_image(grey)) == 0
    # Half as much chroma counts half: of weights 255 and 128, the second a third of the circle away.
    found = train_vae.hue_error(as_image(red, [128, 0, 0]), as_image(red, green))
    assert found == pytest.approx(128 / (255 + 128) / 3, abs=1e-12)
