"""A run that was stopped and resumed is the run that was not; what cannot work is said before the first step."""

import dataclasses
import errno
import itertools
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image, ImageSequence
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import cache_latents
import fid
import sample
import train
from sit_vca import Transport
from vca import VisualContrastAttention, defaults_of
from vca_engine import assemble
from vca_engine.config.cli import parse
from vca_engine.config.schema import Config, TrainConfig
from vca_engine.images import to_uint8
from vca_engine.images.files import naming
from vca_engine.images.loader import DeadWorkerError, load
from vca_engine.records import read_json
from vca_engine.sampling.guidance import Guidance
from vca_engine.sampling.pipeline import Pipeline
from vca_engine.signals import SIGNALS, STOPPED, GivenUpError, StopSignal
from vca_engine.training import log as logs
from vca_engine.training.log import Log, plot_losses, read_metrics, smooth
from vca_engine.training.meter import Meter
from vca_engine.training.outputs import draw_first_batch
from vca_engine.training.run import Run, make_accelerator
from vca_engine.training.step import learning_rate
from vca_engine.weights import checkpoint

ROOT = Path(train.__file__).parent
FLOW = "--process.name flow --sample.sampler.name ode --sample.sampler.method euler --sample.sampler.num_steps 3"
DIFFUSION = "--process.name diffusion --sample.sampler.name ddpm --sample.sampler.num_steps 3"
SMALL = (
    "--data.name digits --codec.name pixels --model.hidden_size 16 --model.depth 2 --model.num_heads 2 --sample.per_class 1 "
    "--train.batch_size 8 --train.lr 1e-2 --train.num_workers 0 --train.log_every 1 --train.ema_decay 0.9 "
    "--train.ema_warmup false"
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


def stopped(folder, num_steps, extra="", process=FLOW):
    """A run that a signal stops: it ends with an exit code of its own."""
    with pytest.raises(SystemExit) as stop:
        run(folder, num_steps, extra, process)
    assert stop.value.code == STOPPED == 75
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
    parts = {file.stem: load_file(file) for file in newest.glob("*.safetensors")}
    assert parts.keys() == {"model", "ema", "ema-0.05", "ema-0.1", "optimizer", "meter"}
    return {f"{part} {k}": v for part, tensors in parts.items() for k, v in tensors.items()}


def metrics(folder):
    """(step, loss, learning rate, images, loss by t) of every line."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[k] for k in ("step", "loss", "lr", "images", "loss_by_t", "grad_norm")) for line in lines]


def pictures(folder):
    """Name -> bytes of the previews."""
    return {f.name: f.read_bytes() for f in (folder / "previews").iterdir()}


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


@pytest.mark.drawn
def test_previews_and_checkpoints_change_nothing(tmp_path):
    plain = run(tmp_path / "plain", 4)
    busy = run(tmp_path / "busy", 4, "--train.sample_every 1 --train.checkpoint_every 2 --sample.cfg_scale 2")
    assert_same(tensors(plain), tensors(busy))
    assert len(list((busy / "previews").glob("*.png"))) == 4
    assert len(checkpoint.steps(busy)) == 2


def test_worker_processes_change_nothing(tmp_path):
    assert_same(tensors(run(tmp_path / "none", 3)), tensors(run(tmp_path / "two", 3, "--train.num_workers 2")))


def test_the_seed_is_that_of_everything(tmp_path):
    first, again, other = (run(tmp_path / name, 2, f"--seed {s}") for name, s in (("a", 1), ("b", 1), ("c", 2)))
    assert_same(tensors(first), tensors(again))
    assert not torch.equal(
        tensors(first)["model x_embedder.proj.weight"], tensors(other)["model x_embedder.proj.weight"]
    )


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_gives_the_step_up_and_leaves_a_checkpoint(tmp_path, capsys, monkeypatch, number):
    """In the second half of the fourth step, of which nothing is left."""
    plain, calls = Transport.loss, []

    def interrupted(self, model, x, y, **draws):
        calls.append(0)
        if len(calls) == 8:
            os.kill(os.getpid(), number)
        return plain(self, model, x, y, **draws)

    monkeypatch.setattr(Transport, "loss", interrupted)
    options = "--train.schedule cosine --train.warmup_steps 2 --train.log_every 2 --train.accumulate 2"
    folder = stopped(tmp_path / "cut", 6, options)
    assert len(calls) == 8
    assert "stopped at step 3, with a checkpoint; run the same command to go on." in capsys.readouterr().out
    assert checkpoint.read_record(checkpoint.find(folder))["step"] == 3
    assert [line[0] for line in metrics(folder)] == [2]
    whole = run(tmp_path / "whole", 6, options)
    assert_same(tensors(run(folder, 6, options)), tensors(whole))
    assert metrics(folder) == metrics(whole)  # the line of step 4 knows of step 3, which was before the stop
    assert pictures(folder) == pictures(whole)


def test_a_signal_in_the_first_step_leaves_nothing_to_go_on_from(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Transport, "loss", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    folder = stopped(tmp_path / "run", 2)
    assert "stopped at step 0, before anything was to be saved; run the same" in capsys.readouterr().out
    monkeypatch.undo()
    assert_same(tensors(run(folder, 2)), tensors(run(tmp_path / "whole", 2)))


def test_a_signal_while_an_image_is_read_is_no_fault_of_the_image():
    stop = StopSignal()
    stop.num_processes = 1
    with pytest.raises(GivenUpError), stop.giving_up(), naming("cat.png"):
        signal.raise_signal(signal.SIGTERM)
    assert stop.requested


def test_what_nohup_began_outlives_its_terminal():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    StopSignal()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN


def children(pid):
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs the list of processes of Linux")
def test_a_signal_to_every_process_and_the_same_command_again(tmp_path):
    """As schedulers do: data workers get it, too. Where it lands is not known: a cosine shows a step too many."""
    options = "--train.schedule cosine --train.warmup_steps 5"
    steps = 80
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
            workers = children(process.pid)
            assert len(workers) >= 2
            for pid in (*workers, process.pid):
                os.kill(pid, signal.SIGTERM)
            out, err = (text.decode() for text in process.communicate(timeout=60))
        finally:
            process.kill()
    assert process.returncode == STOPPED, err
    stopped = checkpoint.read_record(checkpoint.find(tmp_path / "cut"))["step"]
    assert 0 < stopped < steps
    assert f"stopped at step {stopped}, with a checkpoint; run the same command to go on." in out
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    run(tmp_path / "cut", steps, options)
    run(tmp_path / "whole", steps, options)
    assert_same(tensors(tmp_path / "cut"), tensors(tmp_path / "whole"))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    """Times, noise and dropped labels are functions of the image, so the two halves of a batch make its step."""
    options = "--model.class_dropout_prob 0.5 --train.max_grad_norm 0.1 --train.checkpoint_every 1 --train.accumulate"
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
    for line, other in zip(metrics(one), metrics(two), strict=True):
        assert line[1] == pytest.approx(other[1], rel=1e-4)
        assert [v is None for v in line[4]] == [v is None for v in other[4]]
        assert [v for v in line[4] if v] == pytest.approx([v for v in other[4] if v], rel=1e-3)
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


def test_a_batch_that_is_more_than_the_images_is_noted(tmp_path, capsys):
    run(tmp_path / "all", 1, "--train.batch_size 1297")
    assert "epochs" not in capsys.readouterr().out
    run(tmp_path / "more", 1, "--train.batch_size 1946")
    assert "note: train.batch_size 1946 is more than the 1,297 images; a step is 1.50 epochs" in capsys.readouterr().out


def exploding(monkeypatch, bad, value=math.nan):
    """Make the losses of the calls in `bad` not finite."""
    plain, calls = Transport.loss, []

    def explode(self, model, x, y, **draws):
        calls.append(0)
        return plain(self, model, x, y, **draws) * (value if len(calls) in bad else 1)

    monkeypatch.setattr(Transport, "loss", explode)


@pytest.mark.parametrize("fused", ["true", "false"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, capsys, monkeypatch, value, fused):
    """In whichever part of the batch it is; weights and the optimizer's state are those of the step before."""
    options = f"--train.accumulate 2 --train.checkpoint_every 1 --train.log_every 2 --train.fused {fused}"
    with monkeypatch.context() as patch:
        exploding(patch, {5}, value)
        folder = run(tmp_path / "run", 4, options)
    before, after = tensors(folder, 2), tensors(folder, 3)
    kept = [k for k in before if k.split()[0] in ("model", "optimizer")]
    assert kept
    assert all(torch.equal(before[k], after[k]) for k in kept)
    assert all(v.isfinite().all() for k, v in tensors(folder).items() if k.split()[0] != "meter")
    assert any(not torch.equal(after[k], v) for k, v in tensors(folder, 4).items())
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 1]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert "1 of the steps up to 4 skipped, since the loss or its gradient was not finite" in capsys.readouterr().out
    assert {float(v) for k, v in tensors(folder).items() if k.endswith("/step")} == {3.0}


def test_a_gradient_that_is_not_finite_is_skipped_too(tmp_path, monkeypatch):
    """sqrt at 0 has a finite value and an infinite slope."""
    plain, calls = Transport.loss, []

    def steep(self, model, x, y, **draws):
        calls.append(0)
        loss = plain(self, model, x, y, **draws)
        return loss + (model(x, y * 0.0, y) * 0).abs().sum().sqrt() if len(calls) == 2 else loss

    monkeypatch.setattr(Transport, "loss", steep)
    folder = run(tmp_path / "run", 3, "--train.checkpoint_every 1")
    a, b = tensors(folder, 1), tensors(folder, 2)
    assert all(torch.equal(a[k], b[k]) for k in a if k.startswith("model "))
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["skipped"], line["loss"] is None) for line in lines] == [(0, False), (1, True), (1, False)]


def test_many_skipped_steps_in_a_row_stop_the_run_and_name_the_good_checkpoint(tmp_path, capsys, monkeypatch):
    options = "--train.checkpoint_every 2 --train.log_every 2 --train.max_skipped 3"
    with monkeypatch.context() as patch:
        exploding(patch, {3, 4, 6, 7})
        run(tmp_path / "luck", 8, options)  # two and two
    with monkeypatch.context() as patch:
        exploding(patch, {4, 5, 6})
        text = sentence(capsys, settings(tmp_path / "run", 20, options))
    assert "not finite in 3 steps in a row, up to step 6 (train.max_skipped 3)" in text
    assert "step-00000004, is good" in text
    assert "--init" in text
    assert checkpoint.read_record(checkpoint.find(tmp_path / "run"))["skipped"] == [1, 1]
    assert all(v.isfinite().all() for k, v in tensors(tmp_path / "run").items() if k[:5] != "meter")
    with monkeypatch.context() as patch:
        exploding(patch, {1, 2})  # steps 5 and 6 again, after the one that the checkpoint counts
        assert "not finite in 3 steps in a row" in sentence(capsys, settings(tmp_path / "run", 20, options))
    run(tmp_path / "run", 6, options)
    assert [line[0] for line in metrics(tmp_path / "run")] == [2, 4, 6]


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


@pytest.mark.drawn
def test_a_full_disk_stops_nothing_and_is_said(tmp_path, capsys, monkeypatch, full_disk):
    full_disk(["step-00000002.png", "loss.png", "progress.gif"])
    write, saves = checkpoint.save_file, []

    def full(values, file):
        saves.append(file.parent.name[1:14])
        if saves[-1] == "step-00000002":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(values, file)

    monkeypatch.setattr(checkpoint, "save_file", full)
    folder = run(tmp_path / "run", 4, "--train.checkpoint_every 1 --train.sample_every 2 --train.keep_checkpoints 2")
    out = capsys.readouterr().out
    assert "warning: the checkpoint could not be written, training goes on: the checkpoint of step 2" in out
    for name in ("step-00000002.png", "loss.png", "progress.gif"):
        assert f"warning: {name} could not be written, training goes on: " in out
    assert [f.name for f in checkpoint.steps(folder)] == ["step-00000003", "step-00000004"]
    monkeypatch.setattr(checkpoint, "save_file", write)
    assert_same(tensors(folder), tensors(run(tmp_path / "whole", 4)))


def test_what_the_disk_did_not_take_at_the_last_step_is_owed(tmp_path, capsys, monkeypatch):
    """The run says so and ends with another code than 0; the same command makes up for it."""
    options = f"{judged(tmp_path)} --train.snapshot_every 4"
    whole, save = run(tmp_path / "whole", 4, options), checkpoint.save

    def full(folder, *rest):
        if folder.parent.name == "snapshots":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(folder, *rest)

    monkeypatch.setattr(checkpoint, "save", full)
    text = sentence(capsys, settings(tmp_path / "run", 4, options))
    assert "all 4 steps are done, but not the snapshot of the last" in text
    monkeypatch.setattr(checkpoint, "save", save)
    folder = run(tmp_path / "run", 4, options)
    assert {f.name for f in checkpoint.steps(folder, "snapshots")} == {"step-00000004"}
    assert_same(tensors(folder), tensors(whole))
    assert "done already" not in capsys.readouterr().out
    run(folder, 4, options)
    assert "done already" in capsys.readouterr().out


def test_a_damaged_line_of_a_log_costs_that_line(tmp_path):
    folder = run(tmp_path / "run", 4)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text(
        "\n".join([lines[0], "null", lines[1][:40], "[1]", '{"loss": 3}', *lines[2:]])
    )
    assert [line[0] for line in metrics(run(folder, 5, "--train.schedule constant"))] == [1, 3, 4, 5]


def test_a_run_whose_checkpoints_are_elsewhere_does_not_begin_anew(tmp_path, capsys):
    """As after a restart of the machine, whose other disk is not mounted yet."""
    folder = run(tmp_path / "run", 3, "--train.checkpoint_every 2")
    before = (folder / "metrics.jsonl").read_bytes()
    (folder / "checkpoints").rename(tmp_path / "disk")
    (folder / "checkpoints").symlink_to("/nowhere")
    again = settings(folder, 3, "--train.checkpoint_every 2")
    assert "is a link to '/nowhere', which is not there; mount its disk" in sentence(capsys, again)
    (folder / "checkpoints").unlink()
    assert "has come to step 3, but holds no checkpoint; put its folder 'checkpoints' back" in sentence(capsys, again)
    assert (folder / "metrics.jsonl").read_bytes() == before
    (folder / "checkpoints").symlink_to(tmp_path / "disk")
    run(folder, 3, "--train.checkpoint_every 2")
    assert "done already" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"given": 1, "checkpoint": "x", "id": "y"}'])
def test_a_damaged_record_of_where_a_run_goes_on_from_is_named(tmp_path, capsys, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "resumed_from.json").write_text(content)
    assert "resumed_from.json' is damaged" in sentence(capsys, settings(tmp_path / "run", 1))


def test_a_line_that_the_disk_did_not_take_is_written_with_the_next(tmp_path, capsys, monkeypatch):
    log = Log(tmp_path, 0)
    append = Log._append

    def full(self):
        self.whole = False
        with open(self.file, "a") as file:
            file.write('{"step": 2, "lo')
        raise OSError(errno.ENOSPC, "No space left on device")

    log.add(1, {"loss": 0.5})
    monkeypatch.setattr(Log, "_append", full)
    log.add(2, {"loss": 0.25})
    assert "warning: metrics.jsonl could not be written" in capsys.readouterr().out
    monkeypatch.setattr(Log, "_append", append)
    log.add(3, {"loss": 0.125})
    log.add(4, {"loss": 0.0625})
    assert [(line["step"], line["loss"]) for line in read_metrics(log.file)] == [(k, 2.0**-k) for k in (1, 2, 3, 4)]


def test_a_run_whose_last_checkpoint_cannot_be_written_fails(tmp_path, capsys, monkeypatch):
    def full(values, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    text = sentence(capsys, settings(tmp_path / "run", 2))
    assert "No space left on device" in text


def test_the_lines_after_the_resumed_step_are_replaced(tmp_path):
    folder = run(tmp_path / "run", 2)
    file = folder / "metrics.jsonl"
    before = metrics(folder)
    lost = [
        json.dumps({"step": s, "loss": 99.0, "lr": 1.0, "images": 0, "loss_by_t": [], "grad_norm": 1}) for s in (3, 4)
    ]
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


@pytest.mark.drawn
def test_the_pictures_exist_and_have_the_size_of_their_grid(tmp_path):
    folder = run(tmp_path / "run", 2, "--train.sample_every 1 --sample.classes [1,4,7] --sample.per_class 2")
    loss = np.asarray(Image.open(folder / "loss.png").convert("L"))
    assert loss.std() > 5
    names = ["progress.gif", "step-00000001.png", "step-00000002.png"]
    assert [f.name for f in sorted((folder / "previews").iterdir())] == names
    picture = Image.open(folder / "previews" / "step-00000002.png")
    cell, gap, text = 64, 4, 16  # 8x8 images are enlarged to 64, a quarter of it is the text
    assert picture.size[1] == gap + text + 8 + 3 * (cell + gap)
    assert 2 * (cell + gap) < picture.size[0] < 3 * (cell + gap)  # with the names of the classes at the left
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
            if k.startswith("ema "):  # not those of a width
                expected = 0.9 * before[k] + 0.1 * after["model" + k.removeprefix("ema")]
                torch.testing.assert_close(v, expected, rtol=1e-5, atol=1e-7)


def test_the_learning_rate_warms_up_and_stays_or_falls_by_a_cosine():
    constant = TrainConfig(num_steps=100, lr=2.0, warmup_steps=10)
    assert [learning_rate(constant, k) for k in (0, 4, 9, 10, 99)] == [0.2, 1.0, 2.0, 2.0, 2.0]
    assert learning_rate(TrainConfig(lr=2.0), 0) == 2.0
    cosine = TrainConfig(num_steps=110, lr=2.0, warmup_steps=10, schedule="cosine")
    values = [learning_rate(cosine, k) for k in range(111)]
    assert values[4] == 1.0
    assert values[10] == 2.0
    assert values[10 + 25] == pytest.approx(1 + math.cos(math.pi / 4))
    assert values[60] == pytest.approx(1.0)
    assert 0 < values[109] < 1e-3
    assert values[110] == pytest.approx(0.0, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(values[10:]))
    short = TrainConfig(num_steps=5, lr=2.0, warmup_steps=9, schedule="cosine")
    assert [learning_rate(short, k) for k in range(5)] == pytest.approx([2 * k / 9 for k in range(1, 6)])


def test_the_learning_rate_is_the_one_that_is_logged(tmp_path):
    lines = metrics(run(tmp_path / "run", 4, "--train.schedule cosine --train.warmup_steps 2"))
    cfg = TrainConfig(num_steps=4, lr=1e-2, warmup_steps=2, schedule="cosine")
    assert [line[2] for line in lines] == [learning_rate(cfg, k) for k in range(4)]
    assert lines[-1][2] > 0


def judged(tmp_path, metrics="[fd]"):
    """Options to measure with a small classifier."""
    torch.manual_seed(0)
    fid.Classifier(10, 8).eval().save(tmp_path / "judge.safetensors")
    np.savez(tmp_path / "real.npz", np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8))
    return (
        f"--fid.reference {tmp_path / 'real.npz'} --fid.extractor classifier --fid.weights "
        f"{tmp_path / 'judge.safetensors'} --fid.metrics {metrics} --fid.num 20 --fid.every 2"
    )


def test_the_distance_is_measured_as_training_goes_on(tmp_path):
    judge = f"--fid.extractor classifier --fid.weights {tmp_path / 'judge.safetensors'}"
    options = f"{judged(tmp_path)} --train.checkpoint_every 2"
    run(tmp_path / "run", 3, options)
    run(tmp_path / "run", 5, options)  # resumed
    records = [json.loads(line) for line in (tmp_path / "run" / "fid.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [2, 3, 4, 5]
    assert all(r["num_samples"] == 20 and r["sample"]["weights"] == {"part": "ema", "step": r["step"]} for r in records)
    assert Image.open(tmp_path / "run" / "fid.png").size[0] > 800
    names = judge.replace("fid.", "fid_").split()
    found = tmp_path / "r.json"
    command = ["--num", "20", "--fid", str(tmp_path / "real.npz"), *names, "--fid_metrics", "[fd]", "--out", str(found)]
    sample.main(["--checkpoint", str(tmp_path / "run"), *command])
    assert json.loads(found.read_text())["fd"] == pytest.approx(records[-1]["fd"], rel=1e-6)


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_a_preview_and_a_distance_that_cannot_be_had_are_said_and_training_goes_on(
    tmp_path, capsys, monkeypatch, method
):
    """Guidance that overflows spoils what is drawn, and not what is learned."""
    options = f"{judged(tmp_path)} --train.sample_every 2 --train.checkpoint_every 2 --sample.sampler.method {method}"
    monkeypatch.setattr("vca_engine.training.run.guidance_of", lambda sampling: Guidance(1e38))
    folder = run(tmp_path / "run", 4, options)
    out = capsys.readouterr().out
    for step in (2, 4):
        for what in (f"step-{step:08d}.png", f"the FID of step {step}"):
            (line,) = [line for line in out.splitlines() if line.startswith(f"warning: {what} could not be written")]
            assert ("images hold NaN or infinite values" if method == "euler" else ": dopri5 ") in line
            assert f"drawn with ema of step {step} and cfg_scale 1e+38; try" in line
    assert not (folder / "fid.jsonl").exists()
    assert not list((folder / "previews").glob("*.png"))
    assert_same(tensors(folder), tensors(run(tmp_path / "plain", 4)))


def test_measuring_needs_a_reference(capsys, tmp_path):
    assert "no fid.reference; name the file" in sentence(capsys, settings(tmp_path, 2, "--fid.every 2"))
    missing = settings(tmp_path, 2, "--fid.every 2 --fid.reference nowhere.npz --fid.extractor classifier")
    assert "the reference 'nowhere.npz' does not exist" in sentence(capsys, missing)


def test_a_distance_names_its_number_of_images_and_the_best_step_is_kept(tmp_path, monkeypatch):
    options = f"{judged(tmp_path)} --fid.every 1 --train.checkpoint_every 1"
    shown, plain = [], fid.Result.to_dict
    values = iter([5.0, 3.0, 4.0, 6.0])
    monkeypatch.setattr(fid.Result, "to_dict", lambda self: {**plain(self), "fd": next(values)})
    monkeypatch.setattr(Log, "add_scalars", lambda self, step, numbers: shown.append((step, set(numbers))))
    folder = run(tmp_path / "run", 4, f"{options} --train.keep_checkpoints 1")
    assert json.loads((folder / "best.json").read_text()) == {"fd-20": {"value": 3.0, "step": 2}}
    assert [f.name for f in checkpoint.steps(folder)] == ["step-00000002", "step-00000004"]  # the best, and the newest
    assert [step for step, names in shown if "fd-20" in names] == [1, 2, 3, 4]


@pytest.mark.parametrize("steps", [2, 4])
def test_a_signal_while_the_distance_is_measured_leaves_a_checkpoint_and_is_made_good(
    tmp_path, capsys, monkeypatch, steps
):
    """At a step without one, and at the last step."""
    options, measure = judged(tmp_path), train.Outputs.measure
    whole = run(tmp_path / "whole", 4, options)
    said = [(r["step"], r["fd"]) for r in read_metrics(whole / "fid.jsonl")]

    def interrupted(self, stop):
        if self.run.step == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, stop)

    with monkeypatch.context() as patch:
        patch.setattr(train.Outputs, "measure", interrupted)
        folder = stopped(tmp_path / "run", 4, options)
    assert f"stopped at step {steps}, with a checkpoint" in capsys.readouterr().out
    assert checkpoint.read_record(checkpoint.find(folder))["step"] == steps
    run(folder, 4, options)
    assert [(r["step"], r["fd"]) for r in read_metrics(folder / "fid.jsonl")] == said
    assert_same(tensors(folder), tensors(whole))


def test_other_metrics_than_a_distance_are_measured_without_a_curve(tmp_path):
    folder = run(tmp_path / "run", 2, judged(tmp_path, "[pr]"))
    (record,) = read_metrics(folder / "fid.jsonl")
    assert 0 <= record["precision"] <= 1
    assert not (folder / "fid.png").exists()


@pytest.mark.parametrize(
    ("model", "said"), [({}, "holds another run"), ("x", "model is 'x'; it is a group of settings")]
)
def test_a_record_that_does_not_say_the_attention_is_named(tmp_path, capsys, model, said):
    folder = run(tmp_path / "run", 1)
    file = checkpoint.find(folder) / "checkpoint.json"
    record = read_json(file)
    file.write_text(json.dumps({**record, "config": {**record["config"], "model": model}}))
    assert said in sentence(capsys, settings(folder, 2))


def test_an_attention_without_a_name_is_named_before_it_is_compared_with_the_run(tmp_path, capsys):
    folder = run(tmp_path / "run", 1)
    text = sentence(capsys, [*settings(folder, 2), "--model.attention", "{num_tokens: 4}"])
    assert "holds another run" in text
    assert "model.attention.name" in text


def test_other_data_or_another_autoencoder_is_refused(tmp_path, capsys):
    folder = run(tmp_path / "run", 1)
    file = checkpoint.find(folder) / "checkpoint.json"
    record = read_json(file)
    cases = [
        ("num_images", 7, "num_images 7 (now 1297)"),
        ("codec", {"name": "vae"}, "codec.name 'vae' (now 'pixels')"),
    ]
    for key, value, named in cases:
        file.write_text(json.dumps({**record, key: value}))
        text = sentence(capsys, settings(folder, 2))
        assert "was trained on other data, or through another autoencoder" in text
        assert named in text


def test_settings_may_change_before_the_first_checkpoint(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "take_step", killed)
        with pytest.raises(SystemExit):
            run(tmp_path / "run", 4)
    assert (tmp_path / "run" / "config.yaml").is_file()
    run(tmp_path / "run", 1, "--train.batch_size 4")


def test_the_last_line_of_a_run_goes_on_if_the_run_does(tmp_path):
    """A line is the mean of its steps, wherever a run was cut."""
    whole = run(tmp_path / "whole", 6, "--train.log_every 2")
    parts = run(tmp_path / "parts", 3, "--train.log_every 2")
    assert [line["step"] for line in read_metrics(parts / "metrics.jsonl")] == [2, 3]
    run(parts, 6, "--train.log_every 2")
    assert metrics(parts) == metrics(whole)


def test_what_a_killed_run_owed_is_made_by_the_next(tmp_path, monkeypatch):
    options = "--train.sample_every 2 --train.checkpoint_every 2"
    whole = run(tmp_path / "whole", 4, options)

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.Outputs, "preview", killed)
        with pytest.raises(SystemExit) as stop:
            run(tmp_path / "run", 4, options)
    assert stop.value.code == 130
    assert checkpoint.steps(tmp_path / "run")[-1].name == "step-00000002"
    assert pictures(run(tmp_path / "run", 4, options)) == pictures(whole)
    (whole / "previews" / "step-00000004.png").unlink()  # of a run that is done
    assert pictures(run(whole, 4, options)) == pictures(tmp_path / "run")


def test_no_step_waits_for_the_device(tmp_path, monkeypatch):
    """Reading a number off a tensor is what makes the program wait for a GPU: none is read between two lines."""
    reads, plain = [], train.take_step

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
                reads.append(len(steps))
            return func(*args, **(kwargs or {}))

    steps = []
    monkeypatch.setattr(train, "take_step", lambda run, *rest: (plain(run, *rest), steps.append(run.step)))
    options = "--train.max_grad_norm 0.5 --train.accumulate 2 --train.log_every 4 --model.class_dropout_prob 0.5"
    with Watch():
        run(tmp_path / "run", 6, options, DIFFUSION)
        slow = set(reads)
        reads.clear(), steps.clear()
        run(tmp_path / "other", 6, f"{options} --train.fused false", DIFFUSION)
    assert not slow & {1, 2, 3, 5}  # after 4 and 6 steps a line is printed
    assert slow & {4, 6}
    assert set(reads) >= {1, 2, 3, 5}  # what is not fused has to ask


def test_the_losses_of_a_line_are_those_of_its_bins(tmp_path):
    """Of uniform times each bin has about as many; the mean of all is the mean of the bins, weighted by their counts."""
    folder = run(tmp_path / "run", 20, "--train.log_every 20 --train.batch_size 64")
    (line,) = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(line["loss_by_t"]) == 10
    assert np.mean(line["loss_by_t"]) == pytest.approx(line["loss"], rel=0.1)
    meter = Meter(SimpleNamespace(device=torch.device("cpu"), reduce=lambda t, reduction: t))
    meter.add(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 0.05, 1.0]))
    meter.add(torch.tensor([8.0]), torch.tensor([0.31]))
    meter.end_step(torch.tensor(3.0), torch.tensor(False))
    meter.add(torch.tensor([math.nan]), torch.tensor([0.5]))
    meter.end_step(torch.tensor(math.nan), torch.tensor(True))
    line = meter.line()
    assert line["loss_by_t"] == [1.5, None, None, 8.0, *[None] * 5, 4.0]
    assert (line["loss"], line["grad_norm"], line["skipped"], line["most_in_a_row"]) == (3.75, 3.0, 1, 1)
    assert meter.rows().shape == (0, 22)


# Where a run begins


def test_resume_none_auto_and_a_path(tmp_path, capsys):
    whole = run(tmp_path / "whole", 4, "--train.checkpoint_every 1")
    second = whole / "checkpoints" / "step-00000002"
    text = sentence(capsys, settings(whole, 6, "--resume none"))
    assert "--resume is none, but run_dir" in text
    assert "step-00000004; choose another --run_dir" in text
    branch = run(tmp_path / "branch", 4, f"--resume {second} --train.checkpoint_every 1")
    assert f"resumes {second}" in capsys.readouterr().out
    assert_same(tensors(branch), tensors(whole))
    assert [f.name for f in checkpoint.steps(branch)] == ["step-00000003", "step-00000004"]
    assert [line[0] for line in metrics(branch)] == [3, 4]
    shutil.rmtree(branch / "checkpoints" / "step-00000004")
    hidden = second.rename(tmp_path / "moved")
    run(branch, 4, f"--resume {second}")  # the same command again goes on with its own, whatever became of the other
    hidden.rename(second)
    assert_same(tensors(branch), tensors(whole))
    assert [line[0] for line in metrics(branch)] == [3, 4]
    assert "holds other checkpoints, up to step-00000004" in sentence(capsys, settings(whole, 6, f"--resume {second}"))
    assert "no checkpoint at 'nowhere'" in sentence(capsys, settings(tmp_path / "x", 6, "--resume nowhere"))
    text = sentence(capsys, settings(tmp_path / "x", 6, f"--resume {second} --train.lr 1"))
    assert "train.lr 0.01 (you gave 1.0)" in text
    assert f"or --init {second} and another --run_dir" in text
    shutil.rmtree(branch / "checkpoints")  # killed before its own first one
    run(branch, 4)
    assert_same(tensors(branch), tensors(whole))
    run(branch, 5, f"--resume {second}")  # still the same command
    assert not (tmp_path / "x").exists()
    run(tmp_path / "new", 1, "--resume none")


def test_a_run_may_start_from_weights(tmp_path, finished, capsys):
    options = "--model.attention.name mhsa --train.lr 1e-9"
    folder = run(tmp_path / "run", 1, f"--init {finished} {options}")
    out = capsys.readouterr().out
    assert f"starts from {finished}: " in out
    assert "blocks.*.attn.positive_embed" in out  # which mhsa has not
    before, after = tensors(finished), tensors(folder)
    for key in ("x_embedder.proj.weight", "blocks.0.attn.qkv.weight"):
        torch.testing.assert_close(after[f"model {key}"], before[f"ema {key}"], rtol=0, atol=1e-6)
    assert "init None" not in sentence(capsys, settings(tmp_path / "x", 1, "--init nowhere"))
    text = sentence(capsys, settings(folder, 2, f"{options} --init {tmp_path}"))
    assert f"init '{finished}' (you gave '{tmp_path}')" in text


def test_two_programs_never_write_into_one_folder(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        assert "another train.py is at work in run_dir" in sentence(capsys, settings(tmp_path / "run", 2))
    run(tmp_path / "run", 1)
    run(tmp_path / "run", 2)


def test_a_dry_run_says_what_a_run_takes_and_keeps_one_picture(tmp_path, capsys):
    options = "--train.checkpoint_every 10 --train.snapshot_every 50 --train.keep_checkpoints 2 --train.keep_every 40"
    train.main(settings(tmp_path / "run", 100, f"--dry-run {options} --train.accumulate 2"))
    out = capsys.readouterr().out
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["data.png"]
    assert f"nothing was kept but {tmp_path}/run/data.png, what the first step sees" in out
    parameters = int(re.search(r"SiT, ([\d,]+) parameters", out)[1].replace(",", ""))
    assert "100 steps of 8 images (1 processes x 2 x 4): 800 images, 0.6 epochs" in out
    assert "1,297 images of 8x8 pixels, 10 classes (0: 123, 1: 139, " in out
    assert "; 16 tokens, patches of 2x2 pixels\n" in out
    assert re.search(r"in the second step: \d+ seconds, and previews", out)
    folder = run(tmp_path / "run", 1)
    assert parameters == sum(v.numel() for k, v in tensors(folder).items() if k[:6] == "model ") - 16 * 16  # pos_embed
    mib = sum(f.stat().st_size for f in checkpoint.find(folder).iterdir()) / 2**20
    count, size = re.search(r"disk +(\d+) checkpoints of ([\d.]+) MiB, 2 snapshots", out).groups()
    assert int(count) == 4 + 1  # 40, 80, 90, 100, and the one that is written before another goes
    assert float(size) == pytest.approx(mib, rel=0.1)


def test_a_dry_run_refuses_a_step_that_does_not_fit_into_the_memory(tmp_path, capsys):
    """Before it is tried: 16 tokens of 256 channels in float32 have 16 KiB, of which each of 4 blocks keeps more than 16."""
    options = "--dry-run --train.batch_size 1000000 --model.hidden_size 256 --model.depth 4"  # 1 TB
    text = sentence(capsys, settings(tmp_path / "run", 2, options))
    assert re.search(
        r"1,000,000 images at a time take about [\d,]{4,}\.\d GiB, and [\d.,]+ GiB are free\. No step", text
    )
    assert list(tmp_path.iterdir()) == []


def test_the_picture_of_the_first_batch_shows_what_the_first_step_sees(tmp_path):
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for k in range(6):
            Image.fromarray(rng.integers(256, size=(24, 40, 3), dtype=np.uint8)).save(folder / name / f"{k}.png")
    options = f"--data.name folder --data.images {folder} --data.image_size 16 --train.batch_size 4"
    config = parse(Config, settings(tmp_path / "run", 1, options), prog="", description="", parts=assemble.parts())
    made = Run(config, make_accelerator(config))
    x, y, positions = next(made.batches())
    shown, labels, places = made.first_images(24)
    assert torch.equal(shown, x)
    assert (labels.tolist(), places.tolist()) == (y.tolist(), positions.tolist())
    picture = draw_first_batch(made)
    zoom, gap, text = 8, 6, 13  # 16 pixels in 128
    for k, image in enumerate(to_uint8(x)):
        top, left = 2 * gap + text, gap + k * (128 + gap)
        cell = picture[top : top + 128, left : left + 128]
        assert np.array_equal(cell, image.repeat(zoom, 0).repeat(zoom, 1))
    run(tmp_path / "run", 1, options)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "run" / "data.png")), picture)


def test_a_dry_run_finds_what_would_stop_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    text = sentence(capsys, settings(tmp_path / "run", 100, "--dry-run --train.checkpoint_every 1"))
    assert "the checkpoints do not fit on the disk of" in text
    assert "give train.keep_checkpoints" in text
    assert "class 17 does not exist" in sentence(
        capsys, settings(tmp_path / "run", 2, "--dry-run --sample.classes [17]")
    )

    def full(values, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert "No space left on device" in sentence(capsys, settings(tmp_path / "run", 2, "--dry-run"))
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == ["run", "run/data.png"]


# Processes that load data


class Troubled(torch.utils.data.Dataset):
    """Its worker dies at image 5, or hangs there: a pipe that nobody writes to is a disk that does not answer."""

    collate = None

    def __init__(self, pipe=None):
        self.pipe = pipe

    def __getitem__(self, index):
        if index == 5 and self.pipe:
            self.pipe.read_bytes()
        elif index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_worker_that_dies_ends_the_run_with_a_sentence():
    batches = load(Troubled(), [[k] for k in range(8)], num_workers=1, minutes=1, pin=False)
    with pytest.raises(DeadWorkerError, match=r"a process that loads data died: .*memory enough"):
        list(batches)


def test_a_worker_that_hangs_ends_the_run_with_a_sentence(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    batches = load(Troubled(tmp_path / "pipe"), [[k] for k in range(8)], num_workers=1, minutes=1 / 60, pin=False)
    with pytest.raises(DeadWorkerError, match=r"have given nothing for 0\.0166667 minutes"):
        list(batches)


def test_a_worker_that_dies_while_a_step_is_computed_is_found_at_the_next_batch():
    """Not in the middle of whatever is computed then, where nobody could tell what it was."""
    batches = load(Troubled(), [[k] for k in range(6)], num_workers=1, minutes=1, pin=False)
    first = [int(next(batches)[0])]
    (worker,) = active_children()
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(30)
    assert not worker.is_alive()
    sum(range(100_000))  # Python handles signals between its instructions
    with pytest.raises(DeadWorkerError, match="died"):
        first += [int(batch[0]) for batch in batches]
    assert first[0] == 0


def test_latents_may_be_preloaded(tmp_path):
    argv = f"--latents {tmp_path / 'latents'}"
    cache_latents.main(
        [*FLOW.split(), "--run_dir", "-", "--data.name", "digits", "--codec.name", "pixels", *argv.split()]
    )
    plain = run(tmp_path / "plain", 3, argv)
    loaded = run(tmp_path / "loaded", 3, f"{argv} --train.preload")
    assert_same(tensors(plain), tensors(loaded))


def test_preloading_needs_latents_and_no_workers(tmp_path, capsys):
    assert "train.preload is for cached latents" in sentence(capsys, settings(tmp_path, 2, "--train.preload"))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named(tmp_path, capsys, name, monkeypatch):
    monkeypatch.setattr(logs, "find_spec", lambda package: None)
    text = sentence(capsys, settings(tmp_path, 2, f"--train.tracker {name}"))
    assert f"train.tracker is '{name}', which is not installed; run: pip install {name}" in text


def test_the_film_shows_the_previews_in_their_order(tmp_path):
    folder = run(tmp_path / "run", 3, "--train.sample_every 1 --sample.classes [1,4]")
    film = Image.open(folder / "previews" / "progress.gif")
    frames = [np.asarray(f.convert("RGB")).astype(int) for f in ImageSequence.Iterator(film)]
    files = sorted((folder / "previews").glob("*.png"))
    assert len(frames) == len(files) == 3
    for frame, file in zip(frames, files, strict=True):
        apart = [np.abs(frame - np.asarray(Image.open(f)).astype(int)).mean() for f in files]
        assert int(np.argmin(apart)) == files.index(file)
        assert min(apart) < 4  # a palette of 256 colours


SEPARATE = (
    "--model.attention.softmax separate --model.attention.contrast_grid half --model.attention.embed_std 0.02"
    " --train.schedule constant"
)


def written_before_the_joint_softmax(folder):
    """The run with records as they were when there was no such option."""
    for file in folder.glob("*/*/checkpoint.json"):
        record = read_json(file)
        record["format"], record["config"]["model"]["attention"] = 3, {"name": "vca"}
        file.write_text(json.dumps(record))
    return folder


def test_a_run_from_before_the_joint_softmax_goes_on_with_two_by_the_same_command(tmp_path, capsys):
    whole = run(tmp_path / "whole", 4, SEPARATE)
    part = written_before_the_joint_softmax(run(tmp_path / "part", 2, SEPARATE))
    run(part, 4, "--train.schedule constant")
    for (name, a), b in zip(tensors(whole).items(), tensors(part).values(), strict=True):
        assert torch.equal(a, b), name
    given = {"softmax": "separate", "contrast_grid": "half", "embed_std": 0.02}
    config = checkpoint.read_record(checkpoint.find(part))["config"]
    assert given.items() <= config["model"]["attention"].items()
    text = sentence(capsys, settings(part, 5, "--train.schedule constant --model.attention.softmax joint"))
    assert "model.attention.softmax 'separate' (you gave 'joint')" in text


def test_weights_from_before_the_joint_softmax_are_drawn_from_and_started_from_as_they_were_trained(tmp_path):
    """Bit for bit: the network of the record computes what the layer with two softmaxes does."""
    old = written_before_the_joint_softmax(run(tmp_path / "old", 2, SEPARATE))
    pipe = Pipeline.from_pretrained(old)
    network = assemble.network(
        dataclasses.replace(
            pipe.config, model=dataclasses.replace(pipe.config.model, attention={"name": "vca", "softmax": "separate"})
        ),
        pipe.info,
        pipe.codec,
    )
    network.load_state_dict(pipe.network.state_dict())
    x, t, y = torch.randn(3, *[1, 8, 8]), torch.rand(3), torch.tensor([1, 2, 3])
    assert torch.equal(pipe.network(x, t, y), network.eval()(x, t, y))
    new = run(tmp_path / "new", 1, f"--init {old} --train.lr 1e-12 --train.schedule constant")
    attention = checkpoint.read_record(checkpoint.find(new))["config"]["model"]["attention"]
    assert (attention["softmax"], attention["contrast_grid"]) == ("separate", None)
    new = run(tmp_path / "joint", 1, f"--init {old} --model.attention.softmax joint")
    assert checkpoint.read_record(checkpoint.find(new))["config"]["model"]["attention"]["softmax"] == "joint"


def test_a_run_says_every_option_of_its_attention(tmp_path):
    """So that another version, with other defaults, goes on with the same layer."""
    folder = run(tmp_path / "run", 1)
    written = checkpoint.read_record(checkpoint.find(folder))["config"]["model"]["attention"]
    defaults = defaults_of(VisualContrastAttention)
    assert written.keys() == {"name", *defaults} - {"num_prefix_tokens"}
    assert (written["softmax"], written["embed_std"]) == ("joint", 1.0)


def test_the_running_mean_of_fewer_values_than_its_window_is_of_all_near_ones():
    assert smooth(np.array([5.0]), 3).tolist() == [5]
    assert smooth(np.array([1.0, 2.0]), 5).tolist() == [1.5, 1.5]
    assert smooth(np.array([1.0, 2.0, 6.0]), 3).tolist() == [1.5, 3, 4]


def test_the_loss_is_drawn_of_what_is_a_number(tmp_path):
    """As many lines as take a running mean, a bin of t that few have, and values that no version of ours wrote."""
    lines = [{"step": k, "loss": 1.0, "loss_by_t": [1.0, 2.0 if k == 3 else None]} for k in range(60)]
    odd = [{"loss": 1.0, "loss_by_t": by_t} for by_t in (3, ["x", float("inf"), 1.0])]
    odd += [{"loss": loss} for loss in (float("nan"), float("inf"), "x", None)]
    plot_losses([*lines, *({"step": 60 + k, **line} for k, line in enumerate(odd))], tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size[0] > 100


@pytest.mark.parametrize(("scale", "kind"), [(0.02, "linear"), (0.3, "linear"), (1.0, "log"), (40.0, "log")])
def test_the_loss_by_t_says_where_noise_is_and_has_ticks(scale, kind, tmp_path, monkeypatch):
    """Whatever the size of the loss, there are two numbers or more at its axis."""
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    spread = 2 if kind == "linear" else 6
    row = [scale * spread ** (k / 9) for k in range(10)]
    plot_losses([{"step": k, "loss": 1.0, "loss_by_t": row} for k in (1, 2)], tmp_path / "loss.png", ("noise", "data"))
    (figure,) = figures
    right = figure.axes[1]
    assert right.get_yscale() == kind
    low, high = right.get_ylim()
    shown = [label.get_text() for label in right.get_yticklabels() if label.get_text()]
    places = [place for place in right.get_yticks() if low <= place <= high]
    assert len(places) >= 2
    assert len(shown) >= len(places)
    names = [text.get_text() for text in right.get_legend().get_texts()]
    assert (names[0], names[1], names[9]) == ("t 0 to 0.1: noise", "t 0.1 to 0.2", "t 0.9 to 1: data")


@pytest.mark.parametrize(
    ("process", "ends"),
    [("flow", ("noise", "data")), ("diffusion", ("data", "noise")), ("classify", ("", ""))],
)
def test_the_ends_of_time(process, ends):
    assert assemble.ends_of_time(SimpleNamespace(process={"name": process})) == ends


def without_image_size(folder):
    """Leave it out of the checkpoints, as of versions in which it had a default."""
    for file in folder.glob("checkpoints/*/checkpoint.json"):
        record = json.loads(file.read_text())
        record["config"]["data"].pop("image_size", None)
        record.pop("checksum", None)
        file.write_text(json.dumps(record))


def test_a_run_knows_the_size_of_its_images_and_goes_on_with_it(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / name / f"{i}.png")
    extra = f"--data.name folder --data.images {tmp_path}/images"
    folder = run(tmp_path / "run", 1, extra)
    assert "image_size: 8" in (folder / "config.yaml").read_text()
    assert checkpoint.read_record(checkpoint.find(folder))["config"]["data"]["image_size"] == 8
    without_image_size(folder)
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "a" / "0.png")  # it is asked for no more
    run(folder, 2, extra)
    run(folder, 3, f"{extra} --data.image_size 8")
    without_image_size(folder)
    assert "data.image_size 8 (you gave 4)" in sentence(capsys, settings(folder, 4, f"{extra} --data.image_size 4"))
