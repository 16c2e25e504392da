"""What sample.py writes: the same images whatever the batch, the form and the interruptions, or a sentence."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from conftest import new_process
from PIL import Image
from safetensors.torch import load_file, save_file

import fid
import sample
import train
from sit_vca import SiT
from vca_engine import signals as stop
from vca_engine.config.schema import SampleConfig
from vca_engine.files import checksum_of, hold, sha256_of_weights
from vca_engine.images.pictures import grid
from vca_engine.records import read_json
from vca_engine.sampling import tables, writers
from vca_engine.sampling.guidance import Guidance
from vca_engine.sampling.image_sampler import ImageSampler
from vca_engine.sampling.sample_record import add_to_record, require_same_settings
from vca_engine.sampling.sweep import swept
from vca_engine.training import reconstruct as ema
from vca_engine.weights.files import read_weights

SMALL = (
    "--data.name digits --codec.name pixels --process.name flow --model.hidden_size 16 --model.depth 2 --model.num_heads 2 "
    "--train.batch_size 8 --train.num_steps 30 --train.lr 1e-2 --train.num_workers 0 --train.ema_decay 0.5 "
    "--sample.sampler.name ode --sample.sampler.method euler --sample.sampler.num_steps 3 --sample.per_class 1"
)


pytestmark = pytest.mark.usefixtures("as_in_a_new_process")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder, which the tests only read."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    with new_process():
        train.main([*SMALL.split(), "--run_dir", str(folder)])
    return folder


@pytest.fixture
def draw(trained):
    """sample.py with more arguments."""
    return lambda *extra: sample.main(["--checkpoint", str(trained), *map(str, extra)])


@pytest.fixture
def sentence(draw, capsys):
    """What sample.py says of a mistake, after it ended with exit code 2 and without a traceback."""

    def said(*extra):
        with pytest.raises(SystemExit) as stop:
            draw(*extra)
        assert stop.value.code == 2
        (line,) = re.findall(r"sample\.py: .*", capsys.readouterr().err)
        return line

    return said


def read(npz):
    with np.load(npz) as arrays:
        assert set(arrays) == {"arr_0", "arr_1"}
        return arrays["arr_0"], arrays["arr_1"]


def pngs(folder):
    return {f.name: np.asarray(Image.open(f)) for f in sorted(folder.glob("*.png"))}


def apart(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()


def test_a_grid_has_a_row_a_class(draw, tmp_path, trained, capsys):
    draw("--out", tmp_path / "grid.png", "--classes", "[3,'7']", "--per_class", 3)
    cell, gap, text = 64, 4, 16
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    top, width = gap + text + 8, 3 * (cell + gap)
    assert picture.shape[0] == top + 2 * (cell + gap)
    inked = np.flatnonzero((picture[top:] < 250).any((0, 2)))  # a narrow picture is as wide as its title
    left = inked[-1] + 1 + gap - width
    assert 0 < left < 40
    assert (picture[top:, :left] < 128).any()  # labels
    assert "step 30, ode euler, 3 points, 2 steps, 2 evaluations, cfg 1, seed 0\n" in capsys.readouterr().out
    # image i of the grid is image i of the seed, enlarged: row 1, column 0 is number 3, of class 7
    draw("--num", 6, "--classes", "[7]", "--out", tmp_path / "six.npz")
    images, _ = read(tmp_path / "six.npz")
    tile = picture[top + cell + gap :, left:][:cell, :cell]
    assert apart(tile[::8, ::8], images[3]) <= 1
    assert (tile == tile[::8, ::8].repeat(8, axis=0).repeat(8, axis=1)).all()
    record = json.loads((tmp_path / "grid.json").read_text())
    assert (record["picture"], record["classes"], record["nfe"], record["num"]) == ("samples", [3, 7], 2.0, 6)
    assert json.loads(Image.open(tmp_path / "grid.png").text["samples"]) == record

    draw()
    assert Image.open(trained / "samples.png").size[1] == top + 10 * (cell + gap)
    for name in ("samples.png", "samples.json"):
        (trained / name).unlink()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "ode euler, 3 points, 2 steps, 2 evaluations, cfg 1, seed 0"),
        ("--cfg_scale 3", "ode euler, 3 points, 2 steps, 4 evaluations, cfg 3, seed 0"),
        ("--sampler.method heun --seed 4", "ode heun, 3 points, 2 steps, 4 evaluations, cfg 1, seed 4"),
        ("--sampler sde --sampler.num_steps 4", "sde, 4 points, 4 steps, 4 evaluations, cfg 1, seed 0"),
        (
            "--sampler sde --sampler.num_steps 4 --sampler.last_step none",
            "sde, 4 points, 3 steps, 3 evaluations, cfg 1, seed 0",
        ),
        (  # at noise levels 1 and 0.5, of which the interval holds the second
            "--cfg_scale 2 --guidance_interval [0,0.7]",
            "ode euler, 3 points, 2 steps, 3 evaluations, cfg 2, interval 0 to 0.7, seed 0",
        ),
        (
            "--cfg_scale 2 --guided_channels 1 --negative_class 5 --guide RUN --guide_weights ema-0.1",
            "ode euler, 3 points, 2 steps, 4 evaluations, cfg 2, first 1 channels guided, away from class 5, "
            "guide digits step 30 ema-0.1, seed 0",
        ),
    ],
)
def test_a_picture_says_how_it_was_made(trained, draw, tmp_path, capsys, monkeypatch, options, said):
    """On the terminal and above the picture; its record has the classes that nobody named."""
    titles = []
    monkeypatch.setattr(tables, "grid", lambda *args: titles.append(args[3]) or grid(*args))
    words = [str(trained) if word == "RUN" else word for word in options.split()]
    draw(*words, "--per_class", 1, "--out", tmp_path / "x.png")
    assert capsys.readouterr().out == f"wrote {tmp_path / 'x.png'}: step 30, {said}\n"
    assert titles == [f"step 30, {said}"]
    assert read_json(tmp_path / "x.json")["classes"] == list(range(10))


def test_a_title_takes_as_many_lines_as_it_needs():
    """A picture of 800 pixels at most is as wide as its title; beyond, the title has another line and loses nothing."""
    image = np.zeros((1, 1, 64, 64, 3), dtype=np.uint8)
    one, two = (grid(image, ["a"], title=" ".join(["words"] * n)) for n in (4, 30))
    assert two.shape[0] == one.shape[0] + 16 + 8  # a line is a quarter of the image, and 8 pixels
    assert two.shape[1] == 800
    text = (two[: 4 + 2 * 24] < 128).any(axis=(1, 2))
    assert text[:28].any()
    assert text[28:].any()


def test_the_checkpoint_may_stand_first(trained, tmp_path):
    sample.main([str(trained), "--num", "1", "--out", str(tmp_path / "a.npz")])
    assert len(read(tmp_path / "a.npz")[0]) == 1


def test_a_picture_does_not_take_the_place_of_another_record(draw, sentence, tmp_path):
    (tmp_path / "x.json").write_text('{"mine": 1}')
    assert "choose another --out" in sentence("--out", tmp_path / "x.png")
    assert [f.name for f in tmp_path.iterdir()] == ["x.json"]
    assert "a picture is a .png or a .gif" in sentence("--out", tmp_path / "x.jpg")


def test_an_npz_has_the_form_that_evaluators_read(draw, tmp_path):
    draw("--num", 7, "--out", tmp_path / "a.npz")
    images, labels = read(tmp_path / "a.npz")
    assert images.shape == (7, 8, 8, 3)
    assert images.dtype == np.uint8
    assert labels.shape == (7,)
    assert labels.dtype == np.int64
    assert set(labels) <= set(range(10))
    assert images.std() > 5
    assert (images[..., 0] == images[..., 2]).all()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.npz", "a.npz.json"]


SDE = ("--sampler.name", "sde", "--sampler.num_steps", 3)


@pytest.mark.parametrize("sampler", [(), SDE, ("--sampler.method", "dopri5", "--cfg_scale", 2)])
def test_neither_form_nor_batch_changes_an_image_by_a_bit(draw, tmp_path, sampler):
    draw("--num", 37, "--out", tmp_path / "a.npz", *sampler)
    images, labels = read(tmp_path / "a.npz")
    for batch_size in (1, 4, 20):
        draw("--num", 37, "--out", tmp_path / f"{batch_size}.npz", "--batch_size", batch_size, *sampler)
        assert (tmp_path / f"{batch_size}.npz").read_bytes() == (tmp_path / "a.npz").read_bytes()
    draw("--num", 37, "--out", tmp_path / "a.npy", "--batch_size", 5, *sampler)
    assert (np.load(tmp_path / "a.npy") == images).all()
    assert (np.load(tmp_path / "a.labels.npy") == labels).all()
    draw("--num", 37, "--out", tmp_path / "png", *sampler)
    files = pngs(tmp_path / "png")
    assert list(files) == [f"{i:06d}.png" for i in range(37)]
    assert (np.stack(list(files.values())) == images).all()
    draw("--num", 20, "--out", tmp_path / "fewer.npz", *sampler)  # the last group is drawn whole
    assert (read(tmp_path / "fewer.npz")[0] == images[:20]).all()
    assert len({image.tobytes() for image in images}) == 37


def test_the_record_says_how_images_were_made(draw, trained, tmp_path):
    draw("--num", 3, "--out", tmp_path / "png", "--cfg_scale", 2, "--guidance_interval", "[0.1,0.9]", *SDE)
    record = json.loads((tmp_path / "png" / "samples.json").read_text())
    network = read_weights(trained).tensors
    model = SiT(input_size=8, patch_size=2, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=10)
    model.load_state_dict(network)
    assert record["weights"] == {"sha256": sha256_of_weights(model), "part": "ema", "step": 30}
    assert record["checkpoint"]["path"].endswith("step-00000030")
    assert record["sampler"] == {
        **{"name": "sde", "method": "euler", "num_steps": 3, "time_shift": 1.0, "diffusion": "sigma"},
        **{"diffusion_norm": 1.0, "last_step": "mean", "last_step_size": 0.04},
    }
    assert record["process"]["prediction"] == "velocity"
    assert record["nfe"] == 1 + 2 + 1  # at noise levels 1, 0.52 and 0.04, of which only the second is guided
    expected = {"cfg_scale": 2.0, "guided_channels": None, "guidance_interval": [0.1, 0.9], "seed": 0, "group_size": 16}
    expected |= {"labels": "random", "classes": "all", "num": 3, "precision": "no", "tf32": False, "num_processes": 1}
    expected |= {"codec": {"name": "pixels"}, "guide": None, "negative_class": None, "drawn_by_this_command": 3}
    assert {key: record[key] for key in expected} == expected
    assert record["images_per_second"] > 0
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["device"].startswith("cpu")


def test_deleted_images_are_redrawn_exactly_and_a_folder_may_grow(draw, tmp_path):
    out = tmp_path / "png"
    draw("--num", 8, "--out", out)
    before = pngs(out)
    kept = (out / "000000.png").stat().st_mtime_ns
    for i in (2, 3, 7):
        (out / f"{i:06d}.png").unlink()
    (out / ".000002.png.partial").write_bytes(b"half")
    (out / "000005.png").write_bytes((out / "000005.png").read_bytes()[:-9])  # cut short
    draw("--num", 8, "--out", out)
    after = pngs(out)
    assert list(after) == list(before)
    assert all((before[k] == after[k]).all() for k in before)
    assert (out / "000000.png").stat().st_mtime_ns == kept
    assert not list(out.glob(".*"))
    draw("--num", 10, "--out", out)
    assert len(pngs(out)) == 10


@pytest.mark.parametrize("name", ["a.npz", "png"])
def test_an_interrupted_request_goes_on(draw, tmp_path, monkeypatch, name):
    few = ("--group_size", 2, "--batch_size")
    draw("--num", 9, "--out", tmp_path / f"whole_{name}", *few, 2)
    kind = writers.ArrayWriter if name == "a.npz" else writers.FolderWriter
    write, drawn = kind.write, []

    def killed(self, indices, images, labels):
        if len(drawn) >= 4:
            raise KeyboardInterrupt
        drawn.extend(indices)
        write(self, indices, images, labels)

    monkeypatch.setattr(kind, "write", killed)
    with pytest.raises(SystemExit) as ended:
        draw("--num", 9, "--out", tmp_path / name, *few, 2)
    assert ended.value.code == 130
    assert drawn == [0, 1, 2, 3]
    again = []
    monkeypatch.setattr(kind, "write", lambda self, i, *rest: (again.extend(i), write(self, i, *rest)))
    draw("--num", 9, "--out", tmp_path / name, *few, 4)
    assert again == [4, 5, 6, 7, 8]
    if name == "png":
        whole, parts = pngs(tmp_path / "whole_png"), pngs(tmp_path / "png")
        assert list(whole) == list(parts)
        assert all((whole[k] == parts[k]).all() for k in whole)
    else:
        assert (tmp_path / "whole_a.npz").read_bytes() == (tmp_path / "a.npz").read_bytes()
        assert not (tmp_path / "a.npz.partial").exists()


def test_a_complete_file_is_left_as_it_is(draw, tmp_path, capsys):
    draw("--num", 3, "--out", tmp_path / "a.npz")
    before = (tmp_path / "a.npz").read_bytes()
    draw("--num", 3, "--out", tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--cfg_scale", 2], "cfg_scale 1.0 (now 2.0)"),
        (["--seed", 1], "seed 0 (now 1)"),
        (["--classes", "[1]"], "classes 'all' (now [1])"),
        (["--labels", "balanced"], "labels 'random' (now 'balanced')"),
        (["--weights", "model"], "weights.part 'ema' (now 'model')"),
        (["--sampler.num_steps", 4], "sampler.num_steps 3 (now 4)"),
        (["--group_size", 4], "group_size 16 (now 4)"),
        (["--sampler.name", "sde"], "sampler.name 'ode' (now 'sde')"),
    ],
)
@pytest.mark.parametrize("name", ["png", "a.npz"])
def test_other_settings_into_the_same_place_are_refused(sentence, made, change, named, name):
    before = {f: f.read_bytes() for f in made.rglob("*") if f.is_file()}
    text = sentence("--num", 2, "--out", made / name, *change)
    assert "holds images made with" in text
    assert named in text
    assert "choose another --out" in text
    assert {f: f.read_bytes() for f in made.rglob("*") if f.is_file()} == before


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory):
    """Two images in either form, which the tests only read."""
    AcceleratorState._reset_state(True)
    folder = tmp_path_factory.mktemp("made")
    for name in ("png", "a.npz"):
        sample.main(["--checkpoint", str(trained), "--num", "2", "--out", str(folder / name)])
    return folder


def test_another_number_of_images_is_refused_in_a_file(sentence, made):
    assert "num 2 (now 3)" in sentence("--num", 3, "--out", made / "a.npz")


def test_what_sample_did_not_make_is_left_alone(sentence, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.png").write_bytes(b"x")
    assert "is there already and was not made by sample.py" in sentence("--num", 1, "--out", tmp_path / "photos")
    (tmp_path / "data.npz").write_bytes(b"x")
    assert "was not made by sample.py" in sentence("--num", 1, "--out", tmp_path / "data.npz")
    (tmp_path / "file").write_bytes(b"x")
    assert "is no folder; with --num, --out is a folder" in sentence("--num", 1, "--out", tmp_path / "file")
    assert (tmp_path / "data.npz").read_bytes() == (tmp_path / "photos" / "me.png").read_bytes() == b"x"


def test_a_damaged_record_of_the_settings_is_named(sentence, draw, tmp_path):
    draw("--num", 1, "--out", tmp_path / "png")
    (tmp_path / "png" / "samples.json").write_text("{")
    assert "samples.json" in sentence("--num", 2, "--out", tmp_path / "png")
    for record in ({"process": []}, {"process": {"num_timesteps": 1000}, "sampler": {"name": "ddim"}}):
        (tmp_path / "png" / "samples.json").write_text(json.dumps(record))
        assert "samples.json' is damaged" in sentence("--num", 2, "--out", tmp_path / "png")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--num", 0], "num is 0; choose at least 1, at most 10,000,000"),
        (["--num", 2, "--batch_size", 0], "batch_size is 0; choose at least 1"),
        (["--per_class", 0], "per_class is 0; choose at least 1"),
        (["--seed", -1], "seed is -1; choose"),
        (["--classes", "[1,10]"], "class 10 does not exist; this model has classes 0 ... 9"),
        (["--num", 2, "--classes", "[-1]"], "class -1 does not exist"),
        (["--sampler.name", "od"], "did you mean 'ode'?"),
        (["--sampler.name", "ddpm"], "choose one of ['ode', 'sde']"),
        (["--sampler.method", "eular"], "did you mean 'euler'?"),
        (["--sampler.steps", 5], "takes no 'steps'"),
        (["--sampler.num_steps", 1], "num_steps is 1"),
        (["--cfg_scale", 2, "--guided_channels", 2], "guided_channels is 2; the latents have 1"),
        (["--vae", "somewhere"], "vae is 'somewhere', but the codec of this model is 'pixels'; leave it out"),
        (["--classs", "[1]"], "did you mean --classes?"),
        (["--labels", "balance"], "did you mean 'balanced'?"),
        (["--device", "gpu"], "choose one of ['auto', 'cuda', 'cpu']"),
    ],
)
def test_a_mistake_is_a_sentence(sentence, trained, tmp_path, wrong, said):
    assert said in sentence("--out", tmp_path / "out", *wrong)
    assert not (tmp_path / "out").exists()


def test_a_run_that_has_diverged_ends_in_a_sentence(trained, sentence, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for file in run.glob("checkpoints/*/ema.safetensors"):
        save_file({k: v * torch.nan if k == "blocks.0.mlp.fc1.bias" else v for k, v in load_file(file).items()}, file)
    for extra in ((), ("--num", 2), ("--likelihood",), ("--weights", "ema")):
        text = sentence(
            "--checkpoint", run, "--out", tmp_path / ("x.json" if "--likelihood" in extra else "x.png"), *extra
        )
        assert (
            "ema.safetensors' holds values that are not finite in blocks.0.mlp.fc1.bias: the run has diverged" in text
        )
    sample.main(["--checkpoint", str(run), "--weights", "model", "--out", str(tmp_path / "whole.png")])


@pytest.mark.parametrize("extra", [("--num", 20), ("--trajectory",), ("--interpolate",), ()])
@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_images_that_are_not_finite_never_become_black(sentence, tmp_path, monkeypatch, extra, method):
    """Guidance that overflows float32: no file, but a sentence with the step and what to try."""
    out = tmp_path / ("many.npz" if "--num" in extra else "x.png")
    monkeypatch.setattr("vca_engine.sampling.pipeline.guidance_of", lambda sampling, **others: Guidance(1e38))
    text = sentence("--cfg_scale", 4, "--sampler.method", method, "--out", out, *extra)
    why = r"dopri5 (cannot|finds no step)" if method == "dopri5" else r"\d+ of \d+ images hold NaN or infinite values, "
    assert re.search(rf"^sample\.py: {why}", text)
    assert (
        "drawn with ema of step 30 and cfg_scale 1e+38; try an earlier checkpoint, other --weights, more steps" in text
    )
    assert not out.exists()


def test_images_that_an_older_version_began_are_filled_up_as_it_would_have(draw, tmp_path):
    """It wrote no word of how pixels are rounded; a likelihood has none."""
    draw("--num", 5, "--out", tmp_path / "whole")
    draw("--num", 3, "--out", tmp_path / "part")
    file = tmp_path / "part" / "samples.json"
    record = read_json(file)
    assert record.pop("quantize") == "dit"
    file.write_text(json.dumps(record))
    draw("--num", 5, "--out", tmp_path / "part")
    for i in range(5):
        assert (tmp_path / "part" / f"{i:06d}.png").read_bytes() == (tmp_path / "whole" / f"{i:06d}.png").read_bytes()
    draw("--likelihood", "--num", 2, "--out", tmp_path / "likelihood.json")
    assert "quantize" not in json.loads((tmp_path / "likelihood.json").read_text())


def test_images_begun_before_an_option_was_there_are_filled_up_at_its_default(tmp_path):
    (tmp_path / "samples.json").write_text(json.dumps({"seed": 3}))
    require_same_settings(tmp_path / "samples.json", {"seed": 3, "cfg_scale": 1.0}, tmp_path)
    with pytest.raises(ValueError, match=r"made with cfg_scale 1\.0 \(now 2\.0\)"):
        require_same_settings(tmp_path / "samples.json", {"seed": 3, "cfg_scale": 2.0}, tmp_path)


@pytest.mark.parametrize(("num_steps", "same"), [(250, True), (50, True), (21, False)])
def test_images_begun_with_other_steps_of_ddpm_are_not_filled_up(tmp_path, num_steps, same):
    """Before `spacing` was an option, 278 of the 999 numbers of steps had one step of another place."""
    old = {"process": {"num_timesteps": 1000}, "sampler": {"name": "ddpm", "num_steps": num_steps}}
    now = {**old, "sampler": {**old["sampler"], "spacing": "even"}, "quantize": "dit"}
    (tmp_path / "samples.json").write_text(json.dumps(old))
    with contextlib.nullcontext() if same else pytest.raises(ValueError, match="made with sampler.spacing None"):
        require_same_settings(tmp_path / "samples.json", now, tmp_path)


def test_a_picture_of_somebody_else_is_not_overwritten(draw, sentence, tmp_path):
    Image.new("RGB", (3, 3)).save(tmp_path / "photo.png")
    before = (tmp_path / "photo.png").read_bytes()
    assert "photo.png' is there already and was not made by sample.py" in sentence("--out", tmp_path / "photo.png")
    assert (tmp_path / "photo.png").read_bytes() == before
    for per_class in (1, 2):  # its own one is drawn again
        draw("--out", tmp_path / "grid.png", "--classes", "[1]", "--per_class", per_class)


def test_a_gpu_that_is_not_there_is_named(sentence, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "cuda" in sentence("--out", tmp_path / "out", "--device", "cuda")


def test_nothing_or_something_else_in_place_of_the_checkpoint(sentence, trained, tmp_path):
    where = tmp_path / "x"
    assert "there is no such file or folder" in sentence("--checkpoint", where)
    where.write_text("x")
    assert "is empty, or neither a safetensors nor a torch file" in sentence("--checkpoint", where)
    weights = trained / "checkpoints" / "step-00000030" / "ema.safetensors"
    assert "give the run's folder" in sentence("--checkpoint", weights)
    (tmp_path / "folder").mkdir()
    assert "holds no weights; give a run's folder" in sentence("--checkpoint", tmp_path / "folder")
    assert "says itself what it is; leave it out" in sentence("--process", "diffusion")


def test_one_checkpoint_of_a_run_and_its_last_weights(draw, trained, tmp_path):
    folder = trained / "checkpoints" / "step-00000030"
    draw("--num", 3, "--out", tmp_path / "run.npz")
    draw("--checkpoint", folder, "--num", 3, "--out", tmp_path / "step.npz")
    draw("--num", 3, "--out", tmp_path / "model.npz", "--weights", "model")
    run, step, model = (read(tmp_path / f"{name}.npz")[0] for name in ("run", "step", "model"))
    assert (run == step).all()
    assert apart(run, model) > 1


def test_averages_of_any_width_may_be_drawn(draw, sentence, trained, tmp_path):
    """The two that were kept, from checkpoint or snapshot; and one that is rebuilt, here from those two alone."""
    folder = trained / "snapshots" / "step-00000030"
    draw("--num", 3, "--out", tmp_path / "kept.npz", "--weights", "ema-0.1")
    draw("--checkpoint", folder, "--num", 3, "--out", tmp_path / "snapshot.npz", "--weights", "ema-0.1")
    ema.reconstruct(trained, 0.1, out=tmp_path / "wide")
    draw("--checkpoint", tmp_path / "wide", "--num", 3, "--out", tmp_path / "wide.npz")
    kept, snapshot, wide = (read(tmp_path / f"{name}.npz")[0] for name in ("kept", "snapshot", "wide"))
    assert (kept == snapshot).all()
    assert apart(kept, wide) <= 1
    said = sentence("--num", 3, "--out", tmp_path / "x.npz", "--weights", "ema-0.2")
    assert "weights is 'ema-0.2'" in said
    assert "has ['ema', 'ema-0.05', 'ema-0.1', 'model']" in said
    assert "has ['ema-0.05', 'ema-0.1']" in sentence("--checkpoint", folder)


def full():
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_a_sentence_and_keeps_what_was_drawn(draw, sentence, tmp_path, monkeypatch):
    save, saved = Image.Image.save, []

    def nearly_full(self, file, **options):
        saved.append(file)
        if len(saved) == 5:
            file.write_bytes(b"half")
            full()
        save(self, file, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", nearly_full)
        text = sentence("--num", 8, "--out", tmp_path / "png", "--batch_size", 2, "--group_size", 2)
    assert "No space left on device" in text
    assert "run the same command to go on" in text
    kept = pngs(tmp_path / "png")
    assert list(kept) == [f"{i:06d}.png" for i in range(4)]
    assert not list((tmp_path / "png").glob(".*"))
    draw("--num", 8, "--out", tmp_path / "png", "--group_size", 2)
    assert len(pngs(tmp_path / "png")) == 8

    with monkeypatch.context() as patch:
        patch.setattr(writers.os, "posix_fallocate", lambda *_: full())
        text = sentence("--num", 400, "--out", tmp_path / "a.npz")
    assert "400 images take 7.68e-05 GB: " in text
    assert "No space left on device" in text
    assert [f.name for f in tmp_path.iterdir()] == ["png"]
    with monkeypatch.context() as patch:
        patch.setattr(writers.os, "fsync", lambda *_: full())
        assert "run the same command to go on" in sentence("--num", 4, "--out", tmp_path / "a.npz")
    draw("--num", 4, "--out", tmp_path / "a.npz")
    assert len(read(tmp_path / "a.npz")[0]) == 4


def test_a_full_disk_is_a_sentence_for_a_grid_too(sentence, tmp_path, full_disk):
    """A real refusal by the system, inside Pillow: the file that is written aside is the full device."""
    full_disk(["grid.png"])
    assert "No space left on device" in sentence("--out", tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()


def test_a_full_disk_keeps_what_the_evaluator_had(draw, sentence, measure, tmp_path, full_disk, monkeypatch):
    """Saved before the images; where that fails, too, a sentence says so."""
    monkeypatch.setattr(writers.uuid, "uuid4", lambda: SimpleNamespace(hex="0" * 32))
    full_disk([f"state-{'0' * 32}.pt"])
    text = sentence("--num", 8, "--out", tmp_path / "r.json", *measure)
    assert "cannot write" in text
    assert "No space left on device" in text


OUTS = [
    ("a.npz", ["--num", 2], "a.npz.json"),
    ("a.npy", ["--num", 2], "a.npy.json"),
    ("png", ["--num", 2], "png/samples.json"),
    ("a.png", ["--classes", "[1]"], "a.json"),
    ("a.json", ["--likelihood", "--num", 2], "a.json"),
    ("r.json", ["--num", 12], "r.json"),  # with `measure`
]


@pytest.mark.parametrize(("name", "options", "record"), OUTS)
def test_one_program_at_a_time_writes_to_a_place(draw, sentence, measure, tmp_path, name, options, record):
    """The lock of one that was killed is free; what it left half written is removed, by earlier versions, too."""
    out, record = tmp_path / name, tmp_path / record
    lock = record.with_name(f".{record.name}.lock")
    options = [*options, "--out", out, *(measure if name == "r.json" else [])]
    with hold(lock, "busy"):
        said = sentence(*options)
    assert said == f"sample.py: another program is writing {str(out)!r}; wait for it, or choose another --out."
    for left in (lock.name, f".{record.name}.0123abcd.tmp", f".{record.name}.partial", f".4711.{record.name}"):
        lock.with_name(left).touch()
    theirs = tmp_path / ".other.npz.0123abcd.tmp"
    theirs.touch()
    draw(*options)
    assert [f for f in tmp_path.rglob("*") if f.name.startswith(".")] == [theirs]


def test_a_picture_never_stands_beside_the_record_of_another(draw, tmp_path, monkeypatch):
    """A kill at any renaming leaves no picture, or one that is as its record says; and it is drawn again."""
    picture, record = tmp_path / "a.png", tmp_path / "a.json"
    one = ("--classes", "[1]", "--per_class", 1, "--out", picture)
    replace = Path.replace
    for last in (0, 1):
        draw(*one)
        renamed = []

        def killed(self, target, last=last, renamed=renamed):
            if len(renamed) == last:
                raise KeyboardInterrupt
            renamed.append(target)
            return replace(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed)
            with pytest.raises(SystemExit):
                draw(*one, "--seed", 5)
        assert record.exists()
        assert not picture.exists()
        draw(*one, "--seed", 6)
        assert json.loads(Image.open(picture).text["samples"]) == json.loads(record.read_text())
        assert read_json(record)["seed"] == 6


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_reserves_no_space(draw, tmp_path, monkeypatch, error):
    def refuse(*_):
        raise OSError(error, os.strerror(error))

    draw("--num", 3, "--out", tmp_path / "a.npz")
    monkeypatch.setattr(writers.os, "posix_fallocate", refuse)
    draw("--num", 3, "--out", tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_endings_of_either_case(draw, sentence, measure, tmp_path):
    for name, options in (("a.NPZ", ["--num", 20]), ("a.NPY", ["--num", 20]), ("R.JSON", ["--num", 20, *measure])):
        draw("--out", tmp_path / name, *options)
        assert (tmp_path / name).is_file()
    assert (read(tmp_path / "a.NPZ")[0] == np.load(tmp_path / "a.NPY")).all()
    for name in ("g.PNG", "g.GIF"):
        draw("--out", tmp_path / name, "--classes", "[1]")
        assert Image.open(tmp_path / name).format == name[2:]
    assert "with --num, --out is a folder" in sentence("--num", 1, "--out", tmp_path / "x.PNG")


@pytest.mark.parametrize("options", [["--num", 1], ["--likelihood"], []])
@pytest.mark.parametrize("ending", ["", ".npz", ".png", ".json"])
def test_a_place_where_nothing_can_be_written(sentence, tmp_path, options, ending):
    (tmp_path / "file").write_bytes(b"mine")
    for out in (tmp_path / "file" / f"x{ending}", tmp_path / ("x" * 300 + ending)):
        sentence("--out", out, *options)
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_a_folder_whose_name_is_no_unicode(draw, measure, tmp_path, monkeypatch):
    folder = tmp_path / os.fsdecode(b"\xe9")
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name, options in (
        ("a.npz", ["--num", 2]),
        ("b", ["--num", 2]),
        ("c.png", []),
        ("d.json", ["--num", 4, *measure]),
    ):
        draw("--out", name, *options)
        assert Path(name).exists()


@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
def test_damage_of_complete_images_is_found(draw, sentence, tmp_path, name):
    draw("--num", 3, "--out", tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for place in (80, 200, 300, content.find(b"arr_1.npy") + 140):
        (tmp_path / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        said = sentence("--num", 3, "--out", tmp_path / name)
        assert f"{name}' is damaged: " in said
        assert "remove it to draw its images again" in said


@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
def test_damage_of_images_that_are_half_done_is_drawn_again(draw, tmp_path, monkeypatch, name):
    """Of an earlier version, too, which had a byte for each image."""
    draw("--num", 9, "--out", tmp_path / f"whole_{name}")
    with monkeypatch.context() as patch:
        patch.setattr(writers.ArrayWriter, "finish", lambda self, labels: None)
        draw("--num", 9, "--out", tmp_path / name)
    partial = tmp_path / f"{name}.partial"
    images, length = partial / f"images{name[1:]}", 8 * 8 * 3
    content = bytearray(images.read_bytes())
    content[-5 * length] ^= 1
    images.write_bytes(content)
    again = []
    write = writers.ArrayWriter.write
    monkeypatch.setattr(writers.ArrayWriter, "write", lambda self, i, *rest: (again.extend(i), write(self, i, *rest)))
    with monkeypatch.context() as patch:
        patch.setattr(writers.ArrayWriter, "finish", lambda self, labels: None)
        draw("--num", 9, "--out", tmp_path / name)
    assert again == [4]
    (partial / "checksums").unlink()
    (partial / "done").write_bytes(b"\1\1\1\0\1\1\1\1\1")
    draw("--num", 9, "--out", tmp_path / name)
    assert again == [4, 3]
    (partial / "done").parent.mkdir()
    (partial / "done").write_bytes(b"\1" * 9)  # of images that are no longer there
    (tmp_path / name).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(writers.ArrayWriter, "finish", lambda self, labels: None)
        draw("--num", 9, "--out", tmp_path / name)
    draw("--num", 9, "--out", tmp_path / name)
    assert (tmp_path / name).read_bytes() == (tmp_path / f"whole_{name}").read_bytes()


def test_names_of_classes_cannot_break_a_picture():
    images = np.zeros((1, 1, 8, 8, 3), np.uint8)
    shown = grid(images, ["a\nb\x1b[2J\udce9"], ["\u202ex"], "\r")
    assert (shown == grid(images, [r"a\nb\x1b[2J\udce9"], [r"\u202ex"], r"\r")).all()


def test_an_option_of_the_sampler_keeps_the_sampler_of_the_run(draw, tmp_path):
    draw("--num", 2, "--out", tmp_path / "a.npz", "--sampler.num_steps", 5)
    settings = json.loads((tmp_path / "a.npz.json").read_text())
    assert {"name": "ode", "method": "euler", "num_steps": 5}.items() <= settings["sampler"].items()
    draw("--num", 2, "--out", tmp_path / "b.npz", "--sampler.name", "sde", "--sampler.num_steps", 3)
    settings = json.loads((tmp_path / "b.npz.json").read_text())
    assert {"name": "sde", "num_steps": 3, "diffusion": "sigma"}.items() <= settings["sampler"].items()


def test_labels_are_random_over_the_classes_or_take_turns(draw, tmp_path):
    n, classes = 600, [2, 5, 9]
    draw("--num", n, "--out", tmp_path / "random.npz", "--classes", "[2,5,9]", "--batch_size", 300)
    labels = read(tmp_path / "random.npz")[1].tolist()
    counts = np.array([labels.count(k) for k in classes])
    assert counts.sum() == n
    assert ((counts - n / 3) ** 2 / (n / 3)).sum() < 13.8  # chi-square, 2 degrees: once in a thousand seeds
    assert labels != sorted(labels)
    draw("--num", 7, "--out", tmp_path / "turns.npz", "--classes", "[2,5,9]", "--labels", "balanced")
    assert read(tmp_path / "turns.npz")[1].tolist() == [2, 5, 9, 2, 5, 9, 2]
    draw("--num", 12, "--out", tmp_path / "all.npz", "--labels", "balanced")
    assert read(tmp_path / "all.npz")[1].tolist() == [*range(10), 0, 1]


@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
def test_a_file_is_filled_in_any_order_and_is_what_numpy_writes(tmp_path, name):
    images = np.random.default_rng(0).integers(0, 256, (6, 2, 2, 3), np.uint8)
    out = tmp_path / name

    def opened():
        writer = writers.writer_of(out, 6, PartialState(cpu=True), 2)
        writer.open({"seed": (0, 1)})
        return writer

    writer = opened()
    assert writer.missing() == list(range(6))
    size = sum(f.stat().st_size for f in writer.partial.iterdir())
    writer.write([4, 1], images[[4, 1]], [40, 10])
    writer.write([5, 3], images[[5, 3]], [50, 30])
    assert writer.missing() == [0, 2]
    with pytest.raises(OSError, match="lacks 2 of its images, 0 for one; run the same command again"):
        writer.finish([])
    assert not out.exists()
    again = opened()
    again.write([0, 2, 3], images[[0, 2, 3]], [0, 20, 30])
    assert again.missing() == []
    assert size == sum(f.stat().st_size for f in writer.partial.iterdir())  # they had their full size from the start
    if name == "a.npz":
        again._close_zip(np.zeros(6, np.int64))  # killed before the last line of finish
        again = opened()
        assert again.missing() == []
    add_to_record(out, {"nfe": 2})
    again.finish([0, 10, 20, 30, 40, 50])
    if name == "a.npz":
        stored, labels = read(out)
        np.savez(tmp_path / "b.npz", arr_0=images, arr_1=labels)
        with zipfile.ZipFile(out) as a, zipfile.ZipFile(tmp_path / "b.npz") as b:
            assert a.testzip() is None
            assert [(x.filename, x.CRC, x.compress_type) for x in a.infolist()] == [
                (x.filename, x.CRC, x.compress_type) for x in b.infolist()
            ]
    else:
        stored, labels = np.load(out), np.load(tmp_path / "a.labels.npy")
        np.save(tmp_path / "b.npy", images)
        assert out.read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert (stored == images).all()
    assert labels.tolist() == [0, 10, 20, 30, 40, 50]
    record = read_json(out.with_name(name + ".json"))
    assert record.pop("file_checksum", None) == (None if name == "a.npz" else checksum_of(out))
    assert record == {"seed": [0, 1], "num": 6, "nfe": 2}
    assert opened().missing() == []


def test_a_kill_after_the_last_image_never_makes_an_empty_file(draw, tmp_path, monkeypatch):
    """Between the name of the file and the end of its partial folder: nothing of that may be taken for other images."""
    out = tmp_path / "a.npz"
    with monkeypatch.context() as patch:
        patch.setattr(writers.shutil, "rmtree", lambda folder, **_: (folder / "samples.json").unlink())
        draw("--num", 5, "--out", out)
    before = out.read_bytes()
    assert (tmp_path / "a.npz.partial" / "checksums").exists()
    draw("--num", 5, "--out", out)
    assert out.read_bytes() == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.npz", "a.npz.json"]
    with monkeypatch.context() as patch:  # and where nobody looked at the complete file before it was removed
        patch.setattr(writers.shutil, "rmtree", lambda folder, **_: (folder / "samples.json").unlink(missing_ok=True))
        draw("--num", 4, "--out", tmp_path / "b.npz")
        (tmp_path / "b.npz").unlink()
        draw("--num", 4, "--out", tmp_path / "b.npz", "--seed", 5)
    draw("--num", 4, "--out", tmp_path / "c.npz", "--seed", 5)
    assert (tmp_path / "b.npz").read_bytes() == (tmp_path / "c.npz").read_bytes()


def test_the_same_command_again_leaves_the_record_as_it_was(draw, measure, tmp_path):
    for name in ("png", "a.npz"):
        draw("--num", 6, "--out", tmp_path / name)
        record = tmp_path / name / "samples.json" if name == "png" else tmp_path / "a.npz.json"
        before = read_json(record)
        assert before["nfe"] == 2
        draw("--num", 6, "--out", tmp_path / name)
        assert read_json(record) == before
        draw("--num", 6, "--out", tmp_path / name, *measure)  # later, as people do
        found = json.loads((tmp_path / f"{name}.fid.json").read_text())
        assert found["sample"] == before
    draw("--num", 4, "--out", tmp_path / "png")  # fewer are there, too
    assert json.loads((tmp_path / "png" / "samples.json").read_text())["num"] == 6
    labels = json.loads((tmp_path / "png" / "labels.json").read_text())["labels"]
    assert labels == [[f"{i:06d}.png", k] for i, k in enumerate(read(tmp_path / "a.npz")[1].tolist())]


def test_nothing_of_a_user_is_overwritten(draw, sentence, measure, tmp_path):
    for name, theirs in (("a.npz", "a.npz.json"), ("b.npy", "b.labels.npy")):
        (tmp_path / theirs).write_text("mine")
        assert f"{theirs}' is there already, and would be overwritten" in sentence("--num", 2, "--out", tmp_path / name)
        assert (tmp_path / theirs).read_text() == "mine"
    draw("--num", 20, "--out", tmp_path / "c.npz", *measure)
    before = (tmp_path / "c.npz.fid.json").read_bytes()
    np.savez(tmp_path / "other.npz", np.zeros((30, 8, 8, 3), np.uint8))
    other = ["--fid", tmp_path / "other.npz", *measure[2:]]
    assert "holds another measurement: reference differ" in sentence("--num", 20, "--out", tmp_path / "c.npz", *other)
    draw("--num", 20, "--out", tmp_path / "c.npz", *measure)
    assert (tmp_path / "c.npz.fid.json").read_bytes() == before


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--num", 2, "--per_class", 3], "--per_class is for a grid, which has a row for each class; leave it out"),
        (["--labels", "balanced"], "--labels is for --num N: a grid has a row for each class; leave it out"),
        (["--trajectory", "--per_class", 2], "--per_class is for a grid"),
        (["--columns", 5], "--columns is for --trajectory and --interpolate"),
        (["--likelihood", "--classes", "[1]"], "--classes is for drawing"),
        (["--guide_weights", "ema"], "--guide_weights is given, but no --guide"),
        (["--guidance_interval", "[0,0.5]"], "cfg_scale is 1.0, which is no guidance; leave"),
    ],
)
def test_an_option_without_effect_is_refused(sentence, wrong, said):
    assert said in sentence(*wrong)


def test_a_partial_file_that_is_cut_short_is_named(draw, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(writers.ArrayWriter, "finish", lambda self, labels: None)
    draw("--num", 3, "--out", tmp_path / "a.npz")
    os.truncate(tmp_path / "a.npz.partial" / "images.npz", 300)
    assert "is cut short; remove" in sentence("--num", 3, "--out", tmp_path / "a.npz")


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    """Options of sample.py that measure by a small classifier, against an .npz of random images."""
    folder = tmp_path_factory.mktemp("measure")
    torch.manual_seed(0)
    fid.Classifier(10, 8).eval().save(folder / "judge.safetensors")
    np.savez(folder / "real.npz", np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8))
    weights = ["--fid_extractor", "classifier", "--fid_weights", folder / "judge.safetensors"]
    return ["--fid", folder / "real.npz", *weights, "--fid_metrics", "[fd,pr,is]"]


NUMBERS = ("fd", "fd_se", "precision", "recall", "inception_score")


def numbers(path):
    record = json.loads(path.read_text())
    return [record[name] for name in NUMBERS]


def test_a_sweep_measures_each_value_once(trained, draw, measure, sentence, tmp_path, capsys, monkeypatch):
    """The number of a value is that of a command of its own, in the file of that command; what is there is not drawn."""
    drawn, group = [], ImageSampler.group
    monkeypatch.setattr(ImageSampler, "group", lambda self, i, *rest: drawn.append(i) or group(self, i, *rest))
    out, common = tmp_path / "cfg.png", ["--num", 20, *measure[:6]]  # two groups of 16
    draw(*common, "--sweep", "cfg=1,3", "--guidance_interval", "[0,0.7]", "--out", out)
    printed = capsys.readouterr().out
    files = {scale: tmp_path / f"fid-step-00000030-ode-euler-3-cfg-{scale}-num-20.json" for scale in (1, 2, 3)}
    assert {file.name for file in tmp_path.iterdir()} == {"cfg.png", files[1].name, files[3].name}
    distances = {scale: read_json(files[scale])["fd"] for scale in (1, 3)}
    lines = [line for line in printed.splitlines() if line.startswith("cfg ")]
    assert [
        line.startswith(f"cfg {k}  Frechet distance {distances[k]:.3g}") for k, line in zip((1, 3), lines, strict=True)
    ]
    assert [line.endswith("  least") for line in lines] == [distances[k] == min(distances.values()) for k in (1, 3)]
    assert drawn == [0, 1, 0, 1]

    draw(*common, "--sweep", "cfg=1:3", "--guidance_interval", "[0,0.7]", "--out", out)
    assert drawn == [0, 1] * 3
    draw(*common, "--cfg_scale", 2, "--guidance_interval", "[0,0.7]", "--out", tmp_path / "two.json")
    draw(*common, "--out", tmp_path / "one.json")  # at 1 there is no interval
    assert drawn == [0, 1] * 5
    for scale, own in ((1, "one.json"), (2, "two.json")):
        found = read_json(files[scale])
        assert found["fd"] == read_json(tmp_path / own)["fd"]
        settings = ("sampler", "cfg_scale", "guidance_interval", "seed", "weights", "labels", "num")
        for key in settings:
            assert found["sample"][key] == read_json(tmp_path / own)["sample"][key]
        draw(
            *common,
            *(["--cfg_scale", 2, "--guidance_interval", "[0,0.7]"] if scale == 2 else []),
            "--out",
            files[scale],
        )
    assert drawn == [0, 1] * 5
    assert "guidance_interval [0.0, 0.7] (now None)" in sentence(*common, "--sweep", "cfg=1,2", "--out", out)


def test_a_sweep_that_is_measured_names_its_records_by_the_value(draw, measure, sentence, tmp_path):
    draw("--num", 4, *measure[:6], "--sweep", "seed=5,6", "--out", tmp_path / "seed.png")
    names = [f"fid-step-00000030-ode-euler-3-cfg-1-num-4-seed-{seed}.json" for seed in (5, 6)]
    assert sorted(file.name for file in tmp_path.iterdir()) == [*names, "seed.png"]
    assert [read_json(tmp_path / name)["sample"]["seed"] for name in names] == [5, 6]
    draw("--num", 4, *measure[:6], "--weights", "ema-0.1", "--sweep", "sampler=ode,sde", "--out", tmp_path / "x.png")
    found = [file.name for file in tmp_path.glob("*ema-0.1*")]
    assert sorted(found) == [
        f"fid-step-00000030-ema-0.1-{kind}-cfg-1-num-4.json" for kind in ("ode-dopri5-50", "sde-250")
    ]
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    wrong = ["--num", 4, *measure[:6], "--sweep", "seed=5", "--out"]
    assert "photo.png' is there already, and is no picture of distances" in sentence(*wrong, tmp_path / "photo.png")
    assert "with --fid and --sweep it is a .png of the distances" in sentence(*wrong, tmp_path / "x.json")
    assert "choose one, or measure each value with --fid REF" in sentence("--num", 4, "--sweep", "cfg=1,2")


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("cfg=1:5", ["cfg 1", "cfg 2", "cfg 3", "cfg 4", "cfg 5"]),
        ("cfg=1:2:0.25,4", ["cfg 1", "cfg 1.25", "cfg 1.5", "cfg 1.75", "cfg 2", "cfg 4"]),
        ("steps=30:10:-10", ["steps 30", "steps 20", "steps 10"]),
        ("seed=7:7", ["seed 7"]),
        ("sampler.method=euler,heun", ["method euler", "method heun"]),
    ],
)
def test_values_of_a_sweep_may_be_counted(text, labels):
    found = swept(text, SampleConfig(sampler={"name": "ode"}), None)
    assert [label for label, _ in found] == labels
    if text == "cfg=1:2:0.25,4":
        assert [sampling.cfg_scale for _, sampling in found] == [1, 1.25, 1.5, 1.75, 2, 4]


@pytest.mark.parametrize("values", ["5:1", "1:5:0", "1:5:-1", "0:1000"])
def test_values_that_cannot_be_counted(values, sentence):
    assert f"--sweep has the values {values!r}; write FIRST:LAST or FIRST:LAST:STEP" in sentence(
        "--sweep", f"seed={values}"
    )


def test_images_are_measured_without_a_file_between(draw, measure, tmp_path, capsys):
    draw("--num", 40, "--out", tmp_path / "x.npz", *measure)
    expected = numbers(tmp_path / "x.npz.fid.json")
    classifier = fid.Classifier.load(measure[5])
    again = fid.evaluate(str(tmp_path / "x.npz"), measure[1], classifier, device="cpu").to_dict()
    record = read_json(tmp_path / "x.npz.json")
    assert (again["sample"], again["labels"]["mode"]) == (record, "random")  # of any evaluation, not only sample.py's
    draw("--num", 40, "--out", tmp_path / "png", "--batch_size", 7, *measure)
    assert numbers(tmp_path / "png.fid.json") == pytest.approx(expected, rel=1e-6)
    capsys.readouterr()
    draw("--num", 40, "--out", tmp_path / "r.json", "--batch_size", 9, *measure)
    assert numbers(tmp_path / "r.json") == pytest.approx(expected, rel=1e-6)
    out = capsys.readouterr().out
    assert out.startswith("Frechet distance ")
    assert f"40 random-label samples; compares only with numbers by {classifier.name})" in out
    left = {"x.npz", "x.npz.json", "x.npz.fid.json", "png", "png.fid.json", "r.json"}
    assert {f.name for f in tmp_path.iterdir()} == left
    record = json.loads((tmp_path / "r.json").read_text())
    assert (record["step"], record["sample"]["num"], record["labels"]["mode"]) == (30, 40, "random")
    drawn = record["sample"]
    assert (drawn["sampler"]["method"], drawn["nfe"], drawn["cfg_scale"], drawn["seed"]) == ("euler", 2, 1, 0)
    assert drawn["weights"]["sha256"] == json.loads((tmp_path / "x.npz.json").read_text())["weights"]["sha256"]
    draw("--num", 40, "--out", tmp_path / "r.json", *measure)  # done already: said again, not drawn again
    assert capsys.readouterr().out.splitlines()[0] == out.splitlines()[0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_measuring_goes_on_where_it_was_stopped(draw, measure, tmp_path, monkeypatch, number, code):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background process has not
    command = ["--num", 40, "--out", tmp_path / "r.json", "--batch_size", 5, "--group_size", 5, *measure]
    group, calls = ImageSampler.group, []

    def fail_at(last):
        def counted(self, k, *rest):
            calls.append(k)
            if len(calls) == last:
                os.kill(os.getpid(), number)
            return group(self, k, *rest)

        return counted

    monkeypatch.setattr(ImageSampler, "group", fail_at(4))
    with pytest.raises(SystemExit) as ended:
        draw(*command)
    assert ended.value.code == code
    calls.clear()
    monkeypatch.setattr(ImageSampler, "group", fail_at(100))
    draw(*command)
    assert calls == [3, 4, 5, 6, 7]
    draw("--num", 40, "--out", tmp_path / "once.json", "--group_size", 5, *measure)
    assert numbers(tmp_path / "r.json") == pytest.approx(numbers(tmp_path / "once.json"), rel=1e-6)
    assert {f.name for f in tmp_path.iterdir()} == {"r.json", "once.json"}


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_an_interruption_waits_for_what_is_being_written(number, error):
    stop.end_on_signals()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background process has not
    done, before = [], signal.getsignal(number)

    def write():
        with stop.uninterrupted():
            os.kill(os.getpid(), number)
            done.append(True)

    with pytest.raises(error):
        write()
    assert done == [True]
    assert signal.getsignal(number) == before
    with stop.uninterrupted():
        pass


class Numbers:
    """As an evaluator, but it only knows which images it has."""

    def __init__(self):
        self.seen = set()

    def update(self, images, index, labels):
        assert self.seen.isdisjoint(index)
        self.seen |= set(index)

    def state_dict(self):
        return {"index": torch.tensor(sorted(self.seen))}

    def load_state_dict(self, state):
        self.update(None, state["index"].tolist(), None)

    def images_in(self, state):
        return set(state["index"].tolist())


def test_any_number_of_processes_goes_on_after_a_kill_at_any_moment(tmp_path, monkeypatch):
    """Three, killed; one, killed between writing and removing; two, killed; three: each image is there once."""
    (tmp_path / "r.json.partial").mkdir()
    num, images = 90, np.zeros((1, 8, 8, 3), np.uint8)

    def processes(size, draw, kill=None):
        running, left = [], []
        for rank in range(size):
            state = SimpleNamespace(process_index=rank, num_processes=size)
            running.append(writers.EvaluatorWriter(tmp_path / "r.json", num, Numbers(), state))
            left.append(running[-1].missing())
        assert all(part == left[0] for part in left)
        for rank, writer in enumerate(running):
            for i in [i for i in left[0] if i % size == rank][:draw]:
                writer.write([i], images, [0])
            with monkeypatch.context() as patch:
                if kill == rank:
                    patch.setattr(Path, "unlink", lambda *_, **__: None)
                writer.save()
            if kill == rank:
                break
        return [writer.evaluator.seen for writer in running], left[0]

    processes(3, 5)
    _, left = processes(1, 10, kill=0)
    assert len(left) == 75
    assert len(list((tmp_path / "r.json.partial").iterdir())) == 4
    _, left = processes(2, 6, kill=0)  # the second one saves nothing
    assert len(left) == 65
    seen, left = processes(3, 30)
    assert len(left) == 59
    assert sorted(i for part in seen for i in part) == list(range(num))
    assert len(list((tmp_path / "r.json.partial").iterdir())) == 3


def test_mistakes_in_measuring(draw, sentence, measure, tmp_path):
    assert "say of how many images with --num" in sentence("--fid", "x.npz")
    assert "the reference 'nowhere.npz' does not exist" in sentence("--num", 4, "--fid", "nowhere.npz", *measure[2:])
    assert "no reference; name it with --fid" in sentence("--num", 4, "--fid_preset", "adm")
    assert "name the reference with --fid" in sentence("--num", 4, "--out", tmp_path / "r.json")
    draw("--num", 12, "--out", tmp_path / "r.json", *measure)
    other = [*measure[:-1], "[fd]"]
    assert "holds another measurement: metrics differ" in sentence("--num", 12, "--out", tmp_path / "r.json", *other)
    np.savez(tmp_path / "other.npz", np.zeros((30, 8, 8, 3), np.uint8))
    other = ["--fid", tmp_path / "other.npz", *measure[2:]]
    assert "holds another measurement: reference differ" in sentence("--num", 12, "--out", tmp_path / "r.json", *other)
    assert "holds a measurement made with cfg_scale 1.0 (now 2.0)" in sentence(
        "--num", 12, "--out", tmp_path / "r.json", "--cfg_scale", 2, *measure
    )
