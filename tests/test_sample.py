"""What sample.py writes: the same images whatever the batch, the form and the interruptions, or a sentence."""

import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image

import fid
import sample
import train
from runtime import ema, stop
from runtime import sink as sinks

SMALL = (
    "--data.name digits --codec.name pixels --process.name flow --model.hidden_size 16 --model.depth 2 --model.num_heads 2 "
    "--train.batch_size 8 --train.num_steps 30 --train.lr 1e-2 --train.num_workers 0 --train.ema_decay 0.5 "
    "--sample.sampler.name ode --sample.sampler.method euler --sample.sampler.num_steps 3 --sample.rows 1"
)


pytestmark = pytest.mark.usefixtures("as_in_a_new_process")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder, which the tests only read."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    folder = tmp_path_factory.mktemp("runs") / "digits"
    train.main([*SMALL.split(), "--run_dir", str(folder)])
    for number, handler in handlers.items():
        signal.signal(number, handler)
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


def test_a_grid_has_a_column_a_class(draw, tmp_path, trained, capsys):
    draw("--out", tmp_path / "grid.png", "--classes", "[3,7]", "--rows", 3)
    cell, gap, text = 64, 4, 16
    picture = Image.open(tmp_path / "grid.png")
    assert picture.size == (gap + 2 * (cell + gap), 2 * (text + 12) + 3 * (cell + gap))
    assert "step 30, cfg 1, seed 0" in capsys.readouterr().out
    # image i of the grid is image i of the seed, enlarged: row 1, column 1 is number 3, of class 7
    draw("--num", 6, "--classes", "[3,7]", "--labels", "balanced", "--out", tmp_path / "six.npz")
    images, labels = read(tmp_path / "six.npz")
    left, top = gap + cell + gap, 2 * (text + 12) + cell + gap
    tile = np.asarray(picture)[top : top + cell, left : left + cell]
    assert labels[3] == 7
    assert apart(tile[::8, ::8], images[3]) <= 1
    assert (tile == tile[::8, ::8].repeat(8, axis=0).repeat(8, axis=1)).all()

    draw()
    assert Image.open(trained / "samples.png").size[0] == gap + 10 * (cell + gap)
    (trained / "samples.png").unlink()


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


def test_the_form_the_batch_and_the_process_of_drawing_change_no_image(draw, tmp_path):
    draw("--num", 11, "--out", tmp_path / "eleven.npz")
    images, labels = read(tmp_path / "eleven.npz")
    for batch_size in (1, 4):
        draw("--num", 11, "--out", tmp_path / f"{batch_size}.npz", "--batch_size", batch_size)
        others, same = read(tmp_path / f"{batch_size}.npz")
        assert apart(images, others) <= 1
        assert (labels == same).all()
    draw("--num", 11, "--out", tmp_path / "png", "--batch_size", 5)
    files = pngs(tmp_path / "png")
    assert list(files) == [f"{i:06d}.png" for i in range(11)]
    assert apart(np.stack(list(files.values())), images) <= 1
    assert len({image.tobytes() for image in images}) == 11


def test_deleted_images_are_redrawn_exactly_and_a_folder_may_grow(draw, tmp_path):
    out = tmp_path / "png"
    draw("--num", 8, "--out", out)
    before = pngs(out)
    kept = (out / "000000.png").stat().st_mtime_ns
    for i in (2, 3, 7):
        (out / f"{i:06d}.png").unlink()
    (out / ".000002.png.partial").write_bytes(b"half")
    draw("--num", 8, "--out", out)
    after = pngs(out)
    assert list(after) == list(before)
    assert all(apart(before[k], after[k]) <= 1 for k in before)
    assert (out / "000000.png").stat().st_mtime_ns == kept
    assert not list(out.glob(".*"))
    draw("--num", 10, "--out", out)
    assert len(pngs(out)) == 10


@pytest.mark.parametrize("name", ["a.npz", "png"])
def test_an_interrupted_request_goes_on(draw, tmp_path, monkeypatch, name):
    draw("--num", 9, "--out", tmp_path / f"whole_{name}", "--batch_size", 2)
    kind = sinks.NpzSink if name == "a.npz" else sinks.FolderSink
    write, drawn = kind.write, []

    def killed(self, indices, images, labels):
        if len(drawn) >= 4:
            raise KeyboardInterrupt
        drawn.extend(indices)
        write(self, indices, images, labels)

    monkeypatch.setattr(kind, "write", killed)
    with pytest.raises(SystemExit) as ended:
        draw("--num", 9, "--out", tmp_path / name, "--batch_size", 2)
    assert ended.value.code == 130
    assert drawn == [0, 1, 2, 3]
    again = []
    monkeypatch.setattr(kind, "write", lambda self, i, *rest: (again.extend(i), write(self, i, *rest)))
    draw("--num", 9, "--out", tmp_path / name, "--batch_size", 3)
    assert again == [4, 5, 6, 7, 8]
    if name == "png":
        whole, parts = pngs(tmp_path / "whole_png"), pngs(tmp_path / "png")
        assert list(whole) == list(parts)
        assert all(apart(whole[k], parts[k]) <= 1 for k in whole)
    else:
        (images, labels), (others, same) = read(tmp_path / "whole_a.npz"), read(tmp_path / "a.npz")
        assert apart(images, others) <= 1
        assert (labels == same).all()
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
        (["--weights", "model"], "'weights': 'ema'"),
        (["--sampler.num_steps", 4], "'num_steps': 4"),
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


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--num", 0], "num is 0; choose at least 1 image"),
        (["--num", 2, "--batch_size", 0], "batch_size is 0; choose at least 1"),
        (["--rows", 0], "rows is 0; choose at least 1"),
        (["--seed", -1], "seed is -1; choose"),
        (["--classes", "[1,10]"], "class 10 does not exist; this model has classes 0 ... 9"),
        (["--num", 2, "--classes", "[-1]"], "class -1 does not exist"),
        (["--sampler.name", "od"], "did you mean 'ode'?"),
        (["--sampler.name", "ddpm"], "choose one of ['ode', 'sde']"),
        (["--sampler.method", "eular"], "did you mean 'euler'?"),
        (["--sampler.steps", 5], "takes no 'steps'"),
        (["--sampler.num_steps", 1], "num_steps is 1"),
        (["--cfg_scale", 2, "--guided_channels", 2], "guided_channels is 2; the latents have 1"),
        (["--vae", "somewhere"], "--vae is given, but this run's codec is 'pixels'"),
        (["--classs", "[1]"], "did you mean 'classes'?"),
        (["--labels", "balance"], "did you mean 'balanced'?"),
        (["--device", "gpu"], "choose one of ['auto', 'cuda', 'cpu']"),
    ],
)
def test_a_mistake_is_a_sentence(sentence, trained, tmp_path, wrong, said):
    assert said in sentence("--out", tmp_path / "out", *wrong)
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_not_there_is_named(sentence, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "cuda" in sentence("--out", tmp_path / "out", "--device", "cuda")


def test_nothing_or_something_else_in_place_of_the_checkpoint(sentence, trained, tmp_path):
    where = tmp_path / "x"
    assert "there is no such file or folder" in sentence("--checkpoint", where)
    where.write_text("x")
    assert "is not a checkpoint; give a run's folder" in sentence("--checkpoint", where)
    weights = trained / "checkpoints" / "step-00000030" / "ema.safetensors"
    assert "is not a checkpoint; give a run's folder" in sentence("--checkpoint", weights)


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
    assert "--weights is 'ema-0.2'" in said
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
        text = sentence("--num", 8, "--out", tmp_path / "png", "--batch_size", 2)
    assert "No space left on device" in text
    assert "run the same command to go on" in text
    kept = pngs(tmp_path / "png")
    assert list(kept) == [f"{i:06d}.png" for i in range(4)]
    assert not list((tmp_path / "png").glob(".*"))
    draw("--num", 8, "--out", tmp_path / "png")
    assert len(pngs(tmp_path / "png")) == 8

    with monkeypatch.context() as patch:
        patch.setattr(sinks.np, "savez", lambda f, **arrays: (f.write(b"half"), full()))
        assert "No space left on device" in sentence("--num", 4, "--out", tmp_path / "a.npz", "--batch_size", 2)
    assert not (tmp_path / "a.npz").exists()
    assert [f.name for f in (tmp_path / "a.npz.partial").iterdir()] == ["samples.json"]
    draw("--num", 4, "--out", tmp_path / "a.npz")
    assert len(read(tmp_path / "a.npz")[0]) == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the full device of Linux")
def test_a_full_disk_is_a_sentence_for_a_grid_too(sentence, tmp_path):
    """A real refusal by the system, inside Pillow: the file that is written aside is the full device."""
    (tmp_path / ".grid.png.partial").symlink_to("/dev/full")
    assert "No space left on device" in sentence("--out", tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()


def test_an_option_of_the_sampler_keeps_the_sampler_of_the_run(draw, tmp_path):
    draw("--num", 2, "--out", tmp_path / "a.npz", "--sampler.num_steps", 5)
    settings = json.loads((tmp_path / "a.npz.json").read_text())
    assert settings["sampler"] == {"name": "ode", "method": "euler", "num_steps": 5}
    draw("--num", 2, "--out", tmp_path / "b.npz", "--sampler.name", "sde", "--sampler.num_steps", 3)
    settings = json.loads((tmp_path / "b.npz.json").read_text())
    assert settings["sampler"] == {"name": "sde", "num_steps": 3}


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


def test_the_parts_of_an_npz_may_overlap_and_come_in_any_order(tmp_path):
    images = np.arange(6 * 4, dtype=np.uint8).reshape(6, 2, 2, 1).repeat(3, axis=3)
    sink = sinks.open_sink(tmp_path / "a.npz", 6, {"seed": 0}, PartialState(cpu=True))
    assert sink.missing() == list(range(6))
    sink.write([4, 1], images[[4, 1]], [40, 10])
    sink.write([5, 3], images[[5, 3]], [50, 30])
    assert sink.missing() == [0, 2]
    again = sinks.open_sink(tmp_path / "a.npz", 6, {"seed": 0}, PartialState(cpu=True))
    again.write([0, 2, 3], images[[0, 2, 3]], [0, 20, 30])
    assert again.missing() == []
    assert again.finish() == tmp_path / "a.npz"
    stored, labels = read(tmp_path / "a.npz")
    assert (stored == images).all()
    assert labels.tolist() == [0, 10, 20, 30, 40, 50]


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


def test_images_are_measured_without_a_file_between(draw, measure, tmp_path, capsys):
    draw("--num", 40, "--out", tmp_path / "x.npz", *measure)
    expected = numbers(tmp_path / "x.npz.fid.json")
    draw("--num", 40, "--out", tmp_path / "png", "--batch_size", 7, *measure)
    assert numbers(tmp_path / "png.fid.json") == pytest.approx(expected, rel=1e-6)
    capsys.readouterr()
    draw("--num", 40, "--out", tmp_path / "r.json", "--batch_size", 9, *measure)
    assert numbers(tmp_path / "r.json") == pytest.approx(expected, rel=1e-6)
    out = capsys.readouterr().out
    assert out.startswith("Frechet distance ")
    assert "40 random-label samples)" in out
    left = {"x.npz", "x.npz.json", "x.npz.fid.json", "png", "png.fid.json", "r.json"}
    assert {f.name for f in tmp_path.iterdir()} == left
    record = json.loads((tmp_path / "r.json").read_text())
    assert (record["step"], record["sample"]["num"], record["labels"]["mode"]) == (30, 40, "random")
    assert record["sample"]["sampler"]["method"] == "euler"
    draw("--num", 40, "--out", tmp_path / "r.json", *measure)  # done already: said again, not drawn again
    assert capsys.readouterr().out.splitlines()[0] == out.splitlines()[0]


def test_measuring_goes_on_where_it_was_stopped(draw, measure, tmp_path, monkeypatch):
    command = ["--num", 40, "--out", tmp_path / "r.json", "--batch_size", 5, *measure]
    generate, calls = sample.generate, []

    def fail_at(number):
        def counted(*args, **options):
            calls.append(args[4])
            if len(calls) == number:
                raise KeyboardInterrupt
            return generate(*args, **options)

        return counted

    monkeypatch.setattr(sample, "generate", fail_at(4))
    with pytest.raises(SystemExit) as ended:
        draw(*command)
    assert ended.value.code == 130
    calls.clear()
    monkeypatch.setattr(sample, "generate", fail_at(100))
    draw(*command)
    assert [c[0] for c in calls] == [15, 20, 25, 30, 35]
    draw("--num", 40, "--out", tmp_path / "once.json", *measure)
    assert numbers(tmp_path / "r.json") == pytest.approx(numbers(tmp_path / "once.json"), rel=1e-6)
    assert {f.name for f in tmp_path.iterdir()} == {"r.json", "once.json"}


def test_an_interruption_waits_for_what_is_being_written():
    done, before = [], signal.getsignal(signal.SIGINT)

    def write():
        with stop.uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        write()
    assert done == [True]
    assert signal.getsignal(signal.SIGINT) == before
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
            running.append(sinks.EvaluatorSink(tmp_path / "r.json", num, Numbers(), state))
            left.append(running[-1].missing())
        assert all(part == left[0] for part in left)
        for rank, sink in enumerate(running):
            for i in [i for i in left[0] if i % size == rank][:draw]:
                sink.write([i], images, [0])
            with monkeypatch.context() as patch:
                if kill == rank:
                    patch.setattr(Path, "unlink", lambda *_, **__: None)
                sink.save()
            if kill == rank:
                break
        return [sink.evaluator.seen for sink in running], left[0]

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
    assert "holds a measurement of images made with cfg_scale 1.0 (now 2.0)" in sentence(
        "--num", 12, "--out", tmp_path / "r.json", "--cfg_scale", 2, *measure
    )
