"""A run that was stopped and resumed is the run that was not; what cannot work is said before the first step."""

import itertools
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fid
import sample
import train
from runtime import checkpoint
from runtime.config import TrainConfig
from sit_vca import Transport

ROOT = Path(train.__file__).parent
FLOW = "--process.name flow --sample.sampler.name ode --sample.sampler.method euler --sample.sampler.num_steps 3"
DIFFUSION = "--process.name diffusion --sample.sampler.name ddpm --sample.sampler.num_steps 3"
SMALL = (
    "--data.name digits --codec.name pixels --model.hidden_size 16 --model.depth 2 --model.num_heads 2 --sample.rows 1 "
    "--train.batch_size 8 --train.lr 1e-2 --train.num_workers 0 --train.log_every 1 --train.ema_decay 0.9"
)


pytestmark = pytest.mark.usefixtures("as_in_a_new_process")


def settings(run, num_steps, extra="", process=FLOW):
    return [
        *process.split(),
        *SMALL.split(),
        "--run_dir",
        str(run),
        "--train.num_steps",
        str(num_steps),
        *extra.split(),
    ]


def run(folder, num_steps, extra="", process=FLOW):
    train.main(settings(folder, num_steps, extra, process))
    return folder


def sentence(capsys, *args, main=train.main):
    """What the program says of a mistake, after it ended with exit code 2 and without a traceback."""
    with pytest.raises(SystemExit) as stop:
        main(*args)
    assert stop.value.code == 2
    (line,) = re.findall(r"(?:train|sample)\.py: .*", capsys.readouterr().err)
    return line


def tensors(folder, step=None):
    """All tensors of a checkpoint, of the newest if no step is given."""
    newest = checkpoint.find(folder if step is None else folder / "checkpoints" / f"step-{step:08d}")
    return {
        f"{part} {k}": v
        for part in ("model", "ema", "optimizer")
        for k, v in load_file(newest / f"{part}.safetensors").items()
    }


def metrics(folder):
    """(step, loss, learning rate) of every line."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["lr"], line["images"]) for line in lines]


def assert_same(a, b):
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different


@pytest.mark.parametrize("process", [FLOW, DIFFUSION], ids=["flow", "diffusion"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_n_and_n_steps_are_2n_steps_bit_for_bit(tmp_path, process, accumulate):
    options = f"--train.accumulate {accumulate} --model.class_dropout_prob 0.5 --train.warmup_steps 4 "
    options += "--train.ema_warmup true --train.weight_decay 0.01 --train.max_grad_norm 0.5"
    whole = run(tmp_path / "whole", 6, options, process)
    run(tmp_path / "parts", 3, options, process)
    half = tensors(tmp_path / "parts")
    parts = run(tmp_path / "parts", 6, options, process)
    assert_same(tensors(whole), tensors(parts))
    assert metrics(whole) == metrics(parts)
    assert [line[0] for line in metrics(parts)] == [1, 2, 3, 4, 5, 6]
    assert any(not torch.equal(half[k], v) for k, v in tensors(parts).items())


def test_previews_and_checkpoints_change_nothing(tmp_path):
    plain = run(tmp_path / "plain", 4)
    busy = run(tmp_path / "busy", 4, "--train.sample_every 1 --train.checkpoint_every 2 --sample.cfg_scale 2")
    assert_same(tensors(plain), tensors(busy))
    assert len(list((busy / "previews").iterdir())) == 4
    assert len(checkpoint.steps(busy)) == 2


def test_worker_processes_change_nothing(tmp_path):
    assert_same(tensors(run(tmp_path / "none", 3)), tensors(run(tmp_path / "two", 3, "--train.num_workers 2")))


def test_the_seed_is_that_of_everything(tmp_path):
    first, again, other = (run(tmp_path / name, 2, f"--seed {s}") for name, s in (("a", 1), ("b", 1), ("c", 2)))
    assert_same(tensors(first), tensors(again))
    assert not torch.equal(
        tensors(first)["model x_embedder.proj.weight"], tensors(other)["model x_embedder.proj.weight"]
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_with_a_checkpoint(tmp_path, capsys, monkeypatch, number):
    plain, calls = Transport.loss, []

    def interrupted(self, model, x, y):
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return plain(self, model, x, y)

    monkeypatch.setattr(Transport, "loss", interrupted)
    options = "--train.schedule cosine --train.warmup_steps 2 --train.log_every 2"
    folder = run(tmp_path / "cut", 6, options)
    assert "stopped at step 3, with a checkpoint; run the same command to go on." in capsys.readouterr().out
    assert checkpoint.read_record(checkpoint.find(folder))["step"] == 3
    assert [line[0] for line in metrics(folder)] == [2, 3]
    assert_same(tensors(run(folder, 6, options)), tensors(run(tmp_path / "whole", 6, options)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_and_the_same_command_again(tmp_path, number):
    """Ctrl-C and launchers signal the data workers, too. Where it lands is not known: a cosine shows a step too many."""
    options = "--train.schedule cosine --train.warmup_steps 5"
    steps = 150
    command = [sys.executable, "train.py", *settings(tmp_path / "cut", steps, f"{options} --train.num_workers 2")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            file = tmp_path / "cut" / "metrics.jsonl"
            while not file.is_file() or file.stat().st_size == 0:  # each round waits for a line of the progress bar
                assert select.select([process.stderr], [], [], 60)[0], "the run said nothing for a minute"
                assert os.read(process.stderr.fileno(), 4096), "the run ended before its first step"
            os.killpg(process.pid, number)
            out, err = (text.decode() for text in process.communicate(timeout=60))
        finally:
            process.kill()
    assert process.returncode == 0, err
    stopped = checkpoint.read_record(checkpoint.find(tmp_path / "cut"))["step"]
    assert 0 < stopped < steps
    assert f"stopped at step {stopped}, with a checkpoint; run the same command to go on." in out
    run(tmp_path / "cut", steps, options)
    run(tmp_path / "whole", steps, options)
    assert_same(tensors(tmp_path / "cut"), tensors(tmp_path / "whole"))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, monkeypatch):
    """With times and noise that are functions of the image, the two halves of a batch make the step of the batch."""
    plain = Transport.loss

    def fixed(self, model, x, y):
        t = (0.05 + 0.9 * y / 10).to(x)
        return plain(self, model, x, y, t=t, noise=x.flip(0).flip(-1) * 0 + torch.ones_like(x) * 0.3)

    monkeypatch.setattr(Transport, "loss", fixed)
    options = "--model.class_dropout_prob 0 --train.max_grad_norm 0.1 --train.checkpoint_every 1 --train.accumulate"
    one, two = (run(tmp_path / str(n), 3, f"{options} {n}") for n in (1, 2))
    a, b = tensors(one, 1), tensors(two, 1)
    moments = [k for k in a if k.endswith("exp_avg")]
    assert moments
    for k in moments:  # (1 - beta1) times the clipped gradient of the first step
        torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-7)
    assert max(a[k].abs().max() for k in moments) > 1e-4
    norm = math.sqrt(sum(float(a[k].square().sum()) for k in moments)) / (1 - 0.9)
    assert norm == pytest.approx(0.1, rel=1e-3)
    steps = {float(v) for k, v in tensors(two).items() if k.endswith("/step")}
    assert steps == {3.0}
    losses = [[loss for _, loss, *_ in metrics(folder)] for folder in (one, two)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert [line[3] for line in metrics(two)] == [8, 16, 24]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--train.lr 1", "train.lr 0.01 (you gave 1.0)"),
        ("--seed 5", "seed 0 (you gave 5)"),
        ("--model.attention.name mhsa", "model.attention.name 'vca' (you gave 'mhsa')"),
        ("--process.path gvp", "process.path None (you gave 'gvp')"),
        ("--train.schedule cosine", "train.schedule 'constant' (you gave 'cosine')"),
    ],
)
def test_a_folder_that_holds_another_run_is_refused(finished, capsys, change, named):
    before = tensors(finished)
    text = sentence(capsys, settings(finished, 2, change))
    assert "holds another run, with" in text
    assert named in text
    assert_same(before, tensors(finished))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 2 steps, which the tests only read."""
    return run(tmp_path_factory.mktemp("runs") / "finished", 2)


def test_what_no_step_depends_on_may_change(finished, capsys):
    before = tensors(finished)
    extra = "--train.log_every 7 --train.keep_checkpoints 3 --sample.cfg_scale 3 --train.sample_every 9"
    run(finished, 2, extra)
    assert re.search(r"done.*: 2 steps", capsys.readouterr().out)
    assert_same(before, tensors(finished))


def test_the_number_of_steps_may_grow_under_a_constant_schedule_only(tmp_path, capsys):
    run(tmp_path / "constant", 1)
    run(tmp_path / "constant", 2)
    assert checkpoint.read_record(checkpoint.find(tmp_path / "constant"))["step"] == 2
    run(tmp_path / "cosine", 1, "--train.schedule cosine")
    text = sentence(capsys, settings(tmp_path / "cosine", 2, "--train.schedule cosine"))
    assert "train.num_steps 1 (you gave 2)" in text


def test_a_loss_that_is_not_finite_stops_with_its_step_and_keeps_the_last_checkpoint(tmp_path, capsys, monkeypatch):
    plain, calls = Transport.loss, []

    def explode(self, model, x, y):
        calls.append(0)
        return plain(self, model, x, y) * (math.nan if len(calls) == 2 * 4 - 1 else 1)

    monkeypatch.setattr(Transport, "loss", explode)
    options = "--train.accumulate 2 --train.checkpoint_every 2 --train.log_every 50"
    text = sentence(capsys, settings(tmp_path, 20, options))
    assert "the loss is nan at step 4" in text
    assert "step-00000002, is untouched" in text
    assert [f.name for f in checkpoint.steps(tmp_path)] == ["step-00000002"]
    assert all(v.isfinite().all() for v in tensors(tmp_path).values())
    monkeypatch.setattr(Transport, "loss", plain)
    run(tmp_path, 4, options)
    assert [line[0] for line in metrics(tmp_path)] == [2, 4]


MISTAKES = [
    ("--model.patch_size 3", "images of 8x8 cannot be cut into patches"),
    ("--model.attention.contrast_grid [5,4]", "contrast_grid 5x4 is larger than the 4x4 grid"),
    ("--model.attention.name vc", "did you mean 'vca'?"),
    ("--model.attention.dwcc true", "'vca' takes no 'dwcc'; did you mean 'dwc'?"),
    ("--model.num_heads 3", "hidden_size 16 is not a multiple of num_heads 3"),
    ("--model.hidden_size 18", "hidden_size is 18"),
    ("--model.size XXL/2", "model.size is 'XXL'"),
    ("--process.name flwo", "did you mean 'flow'?"),
    ("--process.path liner", "did you mean 'linear'?"),
    ("--process.weight velocty", "did you mean 'velocity'?"),
    ("--sample.sampler.name od", "did you mean 'ode'?"),
    ("--sample.sampler.name ddpm", "choose one of ['ode', 'sde']"),
    ("--sample.sampler.num_steps 1", "num_steps is 1"),
    ("--sample.sampler.num_steps abc", "num_steps is 'abc'"),
    ("--sample.sampler.num_steps 3.5", "num_steps is 3.5"),
    ("--sample.classes [3,17]", "class 17 does not exist"),
    ("--sample.cfg_scale 2 --model.class_dropout_prob 0", "no null class"),
    ("--sample.cfg_scale 2 --sample.guided_channels 2", "guided_channels is 2"),
    ("--data.name digit", "did you mean 'digits'?"),
    ("--data.split validation", "data.split is 'validation'"),
    ("--codec.name pixel", "did you mean 'pixels'?"),
    ("--train.accumulate 3", "train.batch_size 8 is not a multiple of train.accumulate 3"),
    ("--latents nowhere", "latents 'nowhere' is not a folder; make it with: python cache_latents.py"),
]


@pytest.mark.parametrize(("mistake", "said"), MISTAKES)
def test_a_mistake_is_said_before_the_first_step(tmp_path, capsys, monkeypatch, mistake, said):
    def started(*args):
        raise AssertionError("training began")

    monkeypatch.setattr(train, "train", started)
    assert said in sentence(capsys, settings(tmp_path / "run", 2, mistake))
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_is_a_file_or_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert "is a file; choose a folder" in sentence(capsys, settings(tmp_path / "file", 2))
    assert "file/inside" in sentence(capsys, settings(tmp_path / "file" / "inside", 2))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the full device of Linux")
@pytest.mark.parametrize("file", ["previews/.step-00000002.png.partial", ".loss.png.partial"])
def test_a_full_disk_is_a_sentence_for_pictures_too(tmp_path, capsys, file):
    (tmp_path / "run" / "previews").mkdir(parents=True)
    (tmp_path / "run" / file).symlink_to("/dev/full")
    assert "No space left on device" in sentence(capsys, settings(tmp_path / "run", 2))
    assert [f.name for f in checkpoint.steps(tmp_path / "run")] == ["step-00000002"]


def test_two_processes_make_one_run_and_the_samples_of_one(tmp_path):
    """Each rank draws its own noise, so weights are not compared with those of one process; samples are."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]

    def two(script, *args):
        command = [*launch, script, *args]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    out = two("train.py", *settings(tmp_path / "run", 3, "--train.checkpoint_every 2"))
    assert "2 x cpu" in out
    assert out.count("done: 3 steps") == 1
    assert [f.name for f in checkpoint.steps(tmp_path / "run")] == ["step-00000002", "step-00000003"]
    assert [(step, images) for step, _, _, images in metrics(tmp_path / "run")] == [(1, 8), (2, 16), (3, 24)]
    assert all(math.isfinite(loss) for _, loss, _, _ in metrics(tmp_path / "run"))
    assert all(v.isfinite().all() for v in tensors(tmp_path / "run").values())

    request = ["--checkpoint", str(tmp_path / "run"), "--num", "10", "--batch_size", "3", "--out"]
    two("sample.py", *request, str(tmp_path / "two.npz"))
    sample.main([*request, str(tmp_path / "one.npz")])
    one, both = (np.load(tmp_path / f"{n}.npz") for n in ("one", "two"))
    assert (one["arr_1"] == both["arr_1"]).all()
    assert np.abs(one["arr_0"].astype(int) - both["arr_0"]).max() <= 1
    assert one["arr_0"].std() > 1
    assert not (tmp_path / "two.npz.partial").exists()


def test_the_lines_after_the_resumed_step_are_replaced(tmp_path):
    folder = run(tmp_path / "run", 2)
    file = folder / "metrics.jsonl"
    before = metrics(folder)
    lost = [json.dumps({"step": s, "loss": 99.0, "lr": 1.0, "images": 0}) for s in (3, 4)]
    file.write_text(file.read_text() + "\n".join(lost) + '\n{"step": 5, "lo')
    run(folder, 4)
    lines = metrics(folder)
    assert [line[0] for line in lines] == [1, 2, 3, 4]
    assert lines[:2] == before
    assert all(line[1] < 99 for line in lines)


def test_a_logged_loss_is_the_mean_since_the_line_before(tmp_path):
    each = metrics(run(tmp_path / "each", 5))
    pairs = metrics(run(tmp_path / "pairs", 5, "--train.log_every 2"))
    assert [line[0] for line in pairs] == [2, 4, 5]
    means = [(each[0][1] + each[1][1]) / 2, (each[2][1] + each[3][1]) / 2, each[4][1]]
    assert [line[1] for line in pairs] == pytest.approx(means, rel=1e-12)


def test_the_pictures_exist_and_have_the_size_of_their_grid(tmp_path):
    folder = run(tmp_path / "run", 2, "--train.sample_every 1 --sample.classes [1,4,7] --sample.rows 2")
    loss = np.asarray(Image.open(folder / "loss.png").convert("L"))
    assert loss.std() > 5
    assert [f.name for f in sorted((folder / "previews").iterdir())] == ["step-00000001.png", "step-00000002.png"]
    picture = Image.open(folder / "previews" / "step-00000002.png")
    cell, gap, text = 64, 4, 16  # 8x8 images are enlarged to 64, a quarter of it is the text
    assert picture.size == (gap + 3 * (cell + gap), 2 * (text + 12) + 2 * (cell + gap))
    assert len(list((folder / "tensorboard").iterdir())) == 1


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    folder = run(tmp_path / "run", 5, "--train.checkpoint_every 1 --train.keep_checkpoints 2")
    assert [f.name for f in checkpoint.steps(folder)] == ["step-00000004", "step-00000005"]
    assert len(list((folder / "checkpoints").iterdir())) == 2


def test_the_average_of_the_weights_is_that_of_the_checkpoints(tmp_path):
    folder = run(tmp_path / "run", 4, "--train.checkpoint_every 1")
    parts = [tensors(folder, step) for step in (1, 2, 3, 4)]
    for before, after in itertools.pairwise(parts):
        for k, v in after.items():
            if k.startswith("ema "):
                expected = 0.9 * before[k] + 0.1 * after["model" + k.removeprefix("ema")]
                torch.testing.assert_close(v, expected, rtol=1e-5, atol=1e-7)


def test_the_learning_rate_warms_up_and_stays_or_falls_by_a_cosine():
    constant = TrainConfig(num_steps=100, lr=2.0, warmup_steps=10)
    assert [train.learning_rate(constant, k) for k in (0, 4, 9, 10, 99)] == [0.2, 1.0, 2.0, 2.0, 2.0]
    assert train.learning_rate(TrainConfig(lr=2.0), 0) == 2.0
    cosine = TrainConfig(num_steps=110, lr=2.0, warmup_steps=10, schedule="cosine")
    values = [train.learning_rate(cosine, k) for k in range(111)]
    assert values[4] == 1.0
    assert values[10] == 2.0
    assert values[10 + 25] == pytest.approx(1 + math.cos(math.pi / 4))
    assert values[60] == pytest.approx(1.0)
    assert 0 < values[109] < 1e-3
    assert values[110] == pytest.approx(0.0, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(values[10:]))
    short = TrainConfig(num_steps=5, lr=2.0, warmup_steps=9, schedule="cosine")
    assert [train.learning_rate(short, k) for k in range(5)] == pytest.approx([2 * k / 9 for k in range(1, 6)])


def test_the_learning_rate_is_the_one_that_is_logged(tmp_path):
    lines = metrics(run(tmp_path / "run", 4, "--train.schedule cosine --train.warmup_steps 2"))
    cfg = TrainConfig(num_steps=4, lr=1e-2, warmup_steps=2, schedule="cosine")
    assert [line[2] for line in lines] == [train.learning_rate(cfg, k) for k in range(4)]
    assert lines[-1][2] > 0


def test_the_distance_is_measured_as_training_goes_on(tmp_path):
    torch.manual_seed(0)
    fid.Classifier(10, 8).eval().save(tmp_path / "judge.safetensors")
    np.savez(tmp_path / "real.npz", np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8))
    judge = f"--fid.extractor classifier --fid.weights {tmp_path / 'judge.safetensors'}"
    options = f"--fid.reference {tmp_path / 'real.npz'} {judge} --fid.metrics [fd] --fid.every 2 --fid.num 20"
    options += " --train.checkpoint_every 2"
    run(tmp_path / "run", 3, options)
    run(tmp_path / "run", 5, options)  # resumed
    records = [json.loads(line) for line in (tmp_path / "run" / "fid.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [2, 3, 4, 5]
    assert all(r["num_samples"] == 20 and r["sample"]["weights"] == "ema" for r in records)
    assert Image.open(tmp_path / "run" / "fid.png").size[0] > 800
    names = judge.replace("fid.", "fid_").split()
    found = tmp_path / "r.json"
    command = ["--num", "20", "--fid", str(tmp_path / "real.npz"), *names, "--fid_metrics", "[fd]", "--out", str(found)]
    sample.main(["--checkpoint", str(tmp_path / "run"), *command])
    assert json.loads(found.read_text())["fd"] == pytest.approx(records[-1]["fd"], rel=1e-6)


def test_measuring_needs_a_reference(capsys, tmp_path):
    assert "no fid.reference; name the file" in sentence(capsys, settings(tmp_path, 2, "--fid.every 2"))
    missing = settings(tmp_path, 2, "--fid.every 2 --fid.reference nowhere.npz --fid.extractor classifier")
    assert "the reference 'nowhere.npz' does not exist" in sentence(capsys, missing)
