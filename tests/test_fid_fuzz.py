"""`python -m fid`, whatever is typed and whatever has become of files: done, or a sentence; the rest is a fault of ours."""

import json
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from test_fuzz import ODD, bounded, break_file

import fid
from fid.__main__ import _parser, main

ODD = [*ODD, "9" * 20, "1000000", "65536", "99", "2", "x.NPZ", "x.json", "x.png", "folder.npz", "fifo.npz", "out/x.npz"]
JUDGE = ["--extractor", "classifier", "--weights", "judge.safetensors", "--device", "cpu", "--batch", "8", "--quiet"]
COMMANDS = {
    "stats": ["stats", "images.npz", "--out", "out/x.npz", *JUDGE],
    "eval": ["eval", "images.npz", "--ref", "ref.npz", *JUDGE],
    "compare": ["compare", "ref.npz", "adm.npz"],
    "curve": ["curve", "fid.jsonl", "--out", "out/x.png"],
}
FILES = {
    "images.npz": "eval images.npz --ref ref.npz",
    "images.npy": "eval images.npy --ref ref.npz",
    "images.zip": "eval images.zip --ref ref.npz",
    "ref.npz": "eval images.npz --ref ref.npz",
    "adm.npz": "compare ref.npz adm.npz --force",
    "edm2.pkl": "compare edm2.pkl adm.npz",
    "fidelity.pt": "compare fidelity.pt adm.npz",
    "judge.safetensors": "eval images.npz --ref ref.npz",
    "images.npz.json": "eval images.npz --ref ref.npz",
    "fid.jsonl": "curve fid.jsonl fid-step-9.json --out out/x.png",
    "fid-step-9.json": "curve fid.jsonl fid-step-9.json --out out/x.png",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a good file of each kind."""
    folder = tmp_path_factory.mktemp("fuzz") / "whole"
    (folder / "out").mkdir(parents=True)
    (folder / "folder.npz").mkdir()
    torch.manual_seed(0)
    judge = fid.Classifier(num_classes=10, image_size=8).eval()
    judge.save(folder / "judge.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images, np.arange(12) % 3)
    np.save(folder / "images.npy", images)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i, image in enumerate(images[:4]):
            with archive.open(f"{i}.png", "w") as file:
                Image.fromarray(image).save(file, "PNG")
    fid.save_reference(folder / "ref.npz", fid.statistics(images, judge, device="cpu"), images)
    cov = np.cov(np.random.default_rng(1).normal(size=(99, 64)), rowvar=False)
    np.savez(folder / "adm.npz", mu=np.ones(64), sigma=cov)
    moments = {"mu": np.ones(64), "sigma": cov}
    (folder / "edm2.pkl").write_bytes(pickle.dumps({"fid": moments, "num_images": 99}))
    torch.save(moments, folder / "fidelity.pt")
    sample = {"sampler": "ode", "seed": 0, "labels": "random", "num": 12}
    (folder / "images.npz.json").write_text(json.dumps(sample))
    result = fid.evaluate(images, folder / "ref.npz", judge, device="cpu", groups=0)
    lines = [{**result.to_dict(), "step": step} for step in (1, 2)]
    (folder / "fid.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fid.Result(result.values, {**result.record, "step": 9}).to_json(folder / "fid-step-9.json")
    return folder


@pytest.fixture
def place(whole, monkeypatch):
    """A copy of it, where the command runs; nothing is downloaded."""
    monkeypatch.setenv("FID_INCEPTION_WEIGHTS", "nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = whole.with_name("place")
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    return folder


def outcome(capsys, argv):
    """Run a command; return what it printed, or None where it was refused."""
    capsys.readouterr()
    try:
        main(argv)
    except SystemExit as stop:
        error = capsys.readouterr().err
        assert stop.code in (0, 2, 3), (argv, error)
        assert error.strip(), argv
        assert "Traceback" not in error
        return None
    return capsys.readouterr().out


def afresh(whole, place):
    """Put all files in their places again."""
    shutil.rmtree(place)
    shutil.copytree(whole, place)
    os.chdir(place)
    os.mkfifo("fifo.npz")


def options():
    """All options of all commands, with a value."""
    commands = next(action.choices for action in _parser()._actions if action.dest == "==SUPPRESS==")
    for command in COMMANDS:
        for action in commands[command]._actions:
            if action.option_strings and action.nargs is None:
                yield command, action.option_strings[-1]


@bounded(120)
@given(option=st.sampled_from(list(options())), value=st.sampled_from(ODD), second=st.sampled_from(ODD))
@example(option=("eval", "--neighbours"), value="2", second="x.png")
@example(option=("stats", "--keep-images"), value="9" * 9, second="")
def test_odd_options(whole, place, capsys, option, value, second):
    command, key = option
    also = {"--neighbours": [f"--picture={second}"], "--weights": ["--extractor=inception"]}
    afresh(whole, place)
    outcome(capsys, [*COMMANDS[command], f"{key}={value}", *also.get(key, [])])


@bounded(40)
@given(
    command=st.sampled_from(["eval {} --ref ref.npz", "eval images.npz --ref {}", "stats {} --out out/x.npz"]),
    name=st.sampled_from([*FILES, *ODD, "out"]),
)
def test_any_file_in_any_place(whole, place, capsys, command, name):
    afresh(whole, place)
    outcome(capsys, [*(word.replace("{}", name) for word in command.split()), *JUDGE])


@bounded(120)
@given(
    file=st.sampled_from(sorted(FILES)),
    damage=st.sampled_from(["bit", "bit", "bit", "cut", "zeros", "noise", "empty", "gone", "folder", "deep"]),
    place_of=st.integers(0, 2**20),
)
def test_damaged_files(whole, place, capsys, file, damage, place_of):
    """A flipped bit is seen, or is where it changes no number."""
    afresh(whole, place)
    argv = [*FILES[file].split(), *(JUDGE if FILES[file].startswith("eval") else [])]
    printed = outcome(capsys, argv)
    assert printed is not None
    break_file(place / file, damage, place_of)
    found = outcome(capsys, argv)
    if damage == "bit" and file in ("images.npz", "ref.npz", "adm.npz", "judge.safetensors", "fidelity.pt"):
        assert found is None or found.split("(")[0] == printed.split("(")[0]
