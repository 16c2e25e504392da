"""A run that is killed at any of its operations on files, and started again, is the run that was not killed."""

import json
import os
import sys

import pytest
import torch
from PIL import Image, ImageSequence
from safetensors.torch import load_file
from test_train import judged, settings

import train
from vca_engine.training.log import read_metrics
from vca_engine.weights import checkpoint

pytestmark = [pytest.mark.usefixtures("as_in_a_new_process"), pytest.mark.drawn]
EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod"}  # and files opened to be written
OPTIONS = (
    "--train.tracker none --train.checkpoint_every 1 --train.keep_checkpoints 1 --train.snapshot_every 2 "
    "--train.sample_every 2"
)
AT = 5  # places of a kill, evenly over the run; with KILLS=all in the environment, all of them


def trained(folder, argv, kill_at=None):
    """Train in a child; kill it before its operation of this number. Return how many there were, and its exit code."""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        with os.fdopen(reading) as pipe:
            count = len(pipe.read())
        return count, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count, ours = 0, str(folder)

    def watch(event, args):
        nonlocal count
        written = event in EVENTS or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if not (written and isinstance(args[0], str | os.PathLike) and os.fspath(args[0]).startswith(ours)):
            return
        if count == kill_at:
            os._exit(9)
        count += 1
        os.write(writing, b".")

    code = 1
    try:
        os.close(reading)
        sys.addaudithook(watch)
        train.main(argv)
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        os._exit(code)


def content(folder):
    """All that a run owes: its tensors, logs, pictures, and the names of all files."""
    tensors = {
        f"{file.parent.name}/{file.stem} {key}": value
        for file in folder.rglob("*.safetensors")
        for key, value in load_file(file).items()
    }
    lines = read_metrics(folder / "metrics.jsonl")
    distances = read_metrics(folder / "fid.jsonl")
    frames = [
        frame.convert("RGB").tobytes() for frame in ImageSequence.Iterator(Image.open(folder / "previews/progress.gif"))
    ]
    return tensors, {
        "names": sorted(str(file.relative_to(folder)) for file in folder.rglob("*")),
        "metrics": [(line["step"], line["loss"], line["grad_norm"]) for line in lines],
        "distances": [(line["step"], line["fd"]) for line in distances],
        "best": json.loads((folder / "best.json").read_text()),
        "frames": frames,
        "fid.png": Image.open(folder / "fid.png").tobytes(),
        "loss.png": Image.open(folder / "loss.png").tobytes(),
    }


def test_a_run_killed_at_any_operation_is_the_run_that_was_not(tmp_path):
    extra = f"{OPTIONS} {judged(tmp_path)}"
    whole, folder = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    count, code = trained(whole, settings(whole, 4, extra))
    assert (code, count > 50) == (0, True)
    tensors, rest = content(whole)
    assert rest["best"]["fd-20"]["step"] in {int(f.name[5:]) for f in checkpoint.steps(whole)}
    for k in range(count) if os.environ.get("KILLS") == "all" else range(0, count, -(-count // AT)):
        place = folder.with_name(f"{k}") / "run"
        assert trained(place, settings(place, 4, extra), kill_at=k) == (k, 9)
        assert trained(place, settings(place, 4, extra))[1] == 0
        again, other = content(place)
        assert again.keys() == tensors.keys(), k
        assert all(torch.equal(again[key], value) for key, value in tensors.items()), k
        assert {name: (k, other[name]) for name in rest if other[name] != rest[name]} == {}
