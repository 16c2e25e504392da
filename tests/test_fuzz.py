"""Whatever is typed, and whatever has become of files: it is done, or a sentence says why not. The rest is a fault of ours.

Seeded and bounded; HYPOTHESIS_MAX_EXAMPLES in the environment asks for more.
"""

import json
import os
import shutil

import pytest
import torch
from conftest import new_process
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_train import SMALL
from test_train import settings as options_of

import cache_latents
import export
import train
from vca_engine.config.reading import leaves
from vca_engine.config.schema import Config
from vca_engine.weights import checkpoint

pytestmark = pytest.mark.usefixtures("as_in_a_new_process")
ODD = [
    "",
    "nan",
    "-inf",
    "1e400",
    "1e38",
    "-1",
    "0",
    "0.5",
    "1" + "0" * 30,
    "null",
    "~",
    "[",
    "[1, a]",
    "{a: 1}",
    "true",
]
ODD += [
    "/dev/null",
    "/nowhere/x",
    ".",
    "-",
    "a\udcff",
    "é\u2028",
    "n" * 300,
    "{name: 3}",
    "{name: [}",
    "no/such",
    "--x",
]
TOO_LONG = {"train.num_steps", "train.timeout"}  # what the tests need themselves
KEYS = sorted({key for key, _ in leaves(train.TrainArguments)} - TOO_LONG)


def bounded(num):
    """Run so many examples, the same in every run."""
    return settings(
        max_examples=int(os.environ.get("HYPOTHESIS_MAX_EXAMPLES", num)),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def outcome(capsys, main, argv):
    """Whether a program did its work; a sentence and exit code 2 is the only other end that is allowed."""
    capsys.readouterr()
    try:
        main(list(map(str, argv)))
    except SystemExit as stop:
        error = capsys.readouterr().err
        assert stop.code in (0, 2), (argv, error)
        assert "Traceback" not in error, error
        if stop.code == 2:
            assert error.strip().split("\n")[-1].split(": ")[0].endswith(".py"), error
        return stop.code == 0
    return True


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@bounded(60)
@given(words=st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(ODD)), min_size=1, max_size=2))
def test_odd_settings(place, capsys, words):
    shutil.rmtree("runs", ignore_errors=True)
    begin = [*SMALL.split(), "--run_dir", "runs/a", "--train.tracker", "none", "--train.num_steps", "1"]
    outcome(capsys, train.main, [*begin, *(f"--{key}={value}" for key, value in words)])


@bounded(30)
@given(
    key=st.sampled_from(
        sorted({k for k, _ in leaves(Config) if k.split(".")[0] in ("data", "cache", "codec", "latents")})
    ),
    value=st.sampled_from(ODD),
)
def test_odd_settings_of_a_cache(place, capsys, key, value):
    shutil.rmtree("cache", ignore_errors=True)
    begin = [*SMALL.split(), "--run_dir", "runs/a", "--process.name", "flow", "--latents", "cache"]
    outcome(capsys, cache_latents.main, [*begin, f"--{key}={value}"])


@bounded(15)
@given(words=st.lists(st.sampled_from([*ODD, "--out", "--vae", "--weights", "--force"]), max_size=3))
def test_odd_words_of_the_export(place, capsys, words):
    outcome(capsys, export.main, words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps, and the tensors that it has after three."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    for number in (2, 3):
        with new_process():
            train.main(options_of(folder, number, "--train.tracker none --train.sample_every 1"))
        if number == 2:
            shutil.copytree(folder, folder.with_name("two"))
    return folder.with_name("two"), tensors_of(folder)


def tensors_of(folder):
    newest = checkpoint.find(folder)
    return {f"{file.stem} {k}": v for file in newest.glob("*.safetensors") for k, v in load_file(file).items()}


FILES = ["checkpoint.json", "model.safetensors", "ema.safetensors", "ema-0.05.safetensors", "optimizer.safetensors"]
FILES = [f"checkpoints/step-00000002/{name}" for name in [*FILES, "meter.safetensors"]]
FILES += ["metrics.jsonl", "config.yaml", "previews/progress.gif", "previews/step-00000001.png"]


@bounded(60)
@given(
    file=st.sampled_from(FILES),
    damage=st.sampled_from(["bit", "cut", "zeros", "noise", "empty", "gone", "folder", "deep"]),
    place_of=st.integers(0, 2**20),
)
@example(file=FILES[1], damage="bit", place_of=7)
def test_damaged_files_of_a_run(trained, capsys, file, damage, place_of):
    """The run goes on as if nothing were, or is refused; it never comes to other weights."""
    run, expected = trained
    folder = run.with_name("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run, folder)
    break_file(folder / file, damage, place_of)
    with new_process():
        done = outcome(capsys, train.main, options_of(folder, 3, "--train.tracker none --train.sample_every 1"))
    if done:
        found = tensors_of(folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def break_file(file, damage, place_of):
    """Do to a file what disks and hands do."""
    data = bytearray(file.read_bytes())
    file.unlink()
    where = place_of % len(data)
    if damage == "folder":
        file.mkdir()
    elif damage != "gone":
        data = {
            "bit": lambda: data[:where] + bytes([data[where] ^ 1 << place_of % 8]) + data[where + 1 :],
            "cut": lambda: data[:where],
            "zeros": lambda: data[:where] + bytes(len(data) - where),
            "noise": lambda: bytes((place_of * k * k + k) % 251 for k in range(100)),
            "empty": lambda: b"",
            "deep": lambda: json.dumps({"step": 1}).encode() + b"[" * 100_000,
        }[damage]()
        file.write_bytes(bytes(data))
