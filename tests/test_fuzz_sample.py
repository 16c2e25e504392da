"""Any arguments and any damage: sample.py and visualise.py do what they should, or say one sentence, exit code 2."""

import contextlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import new_process
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz import bounded

import fid
import sample
import train
import visualise
from vca_engine.sampling import writers

SMALL = (
    "--data.name digits --codec.name pixels --process.name flow --model.hidden_size 16 --model.depth 2 --model.num_heads 2 "
    "--train.batch_size 8 --train.num_steps 2 --train.num_workers 0 --train.tracker none --sample.per_class 1 "
    "--sample.sampler.name ode --sample.sampler.method euler --sample.sampler.num_steps 3 --sample.group_size 4"
)

pytestmark = pytest.mark.usefixtures("as_in_a_new_process")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, what measures its images, and one of each thing that sample.py and visualise.py make of it."""
    folder = tmp_path_factory.mktemp("made")
    with new_process():
        train.main([*SMALL.split(), "--run_dir", str(folder / "run")])
    torch.manual_seed(0)
    fid.Classifier(10, 8).eval().save(folder / "judge.safetensors")
    np.savez(folder / "real.npz", np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8))
    with new_process():
        for _, command in commands(folder):
            if command[-1] == "--interrupted":
                with pytest.MonkeyPatch.context() as patch:
                    kind = writers.EvaluatorWriter if "r.json" in str(command) else writers.ArrayWriter
                    patch.setattr(kind, "finish", stop)
                    with pytest.raises(SystemExit):
                        sample.main(command[:-1])
            else:
                (visualise if "--maps" in command else sample).main(command)
    return folder


def stop(*_):
    raise KeyboardInterrupt


def commands(folder):
    """What is made, and by which command; of those that were interrupted something half full is left."""
    out = folder / "out"
    judge = f"--fid_extractor classifier --fid_weights {folder}/judge.safetensors --fid_metrics [fd]".split()
    measured = ["--num", "6", "--fid", str(folder / "real.npz"), *judge]
    found = {
        "a.npz": ["--num", "5"],
        "a.npy": ["--num", "5"],
        "png": ["--num", "5"],
        "g.png": ["--classes", "[1,2]"],
        "t.gif": ["--trajectory"],
        "l.json": ["--likelihood", "--num", "2"],
        "m.json": measured,
        "maps": ["--maps", "--times", "[0.5]"],
        "half.npz": ["--num", "5", "--interrupted"],
        "half.npy": ["--num", "5", "--interrupted"],
        "r.json": [*measured, "--interrupted"],
    }
    return [(name, [str(folder / "run"), "--out", str(out / name), *options]) for name, options in found.items()]


def outcome(main, words):
    """`done`, or the sentence; all else is a fault of ours, and raises."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            main(words)
    except SystemExit as end:
        assert end.code == 2, (words, said.getvalue())
        lines = [line for line in said.getvalue().splitlines() if line.startswith(("sample.py: ", "visualise.py: "))]
        assert len(lines) == 1, (words, said.getvalue())
        assert "Traceback" not in said.getvalue()
        return lines[0]
    finally:
        AcceleratorState._reset_state(True)
    return "done"


NONSENSE = ["", "null", "nan", "-1", "0", "1e400", "[", "{}", "[]", "x=y", "~", "\u202e", "9" * 21, "1.5"]
VALUES = {
    "num": ["1", "2", "7"],
    "out": ["a.npz", "a.NPY", "png", "g.PNG", "f.gif", "x.json", "file/x.npz", "file/x", "x" * 300, ".", "run"],
    "classes": ["[1,2]", "[3]", "[1,1]", "['7']"],
    "cfg_scale": ["1", "2.5", "-3"],
    "guided_channels": ["1", "3"],
    "guidance_interval": ["[0,0.5]", "[0.9,0.1]"],
    "negative_class": ["3"],
    "seed": ["5", "18446744073709551615"],
    "group_size": ["1", "5"],
    "per_class": ["1", "2"],
    "labels": ["random", "balanced"],
    "batch_size": ["1", "100"],
    "trajectory": ["true", "false"],
    "interpolate": ["true"],
    "columns": ["2", "5"],
    "sweep": ["cfg=1,2", "steps=2,3", "seed=0,1", "sampler=ode,sde", "sampler.method=euler,heun", "classes=1", "cfg="],
    "likelihood": ["true"],
    "sampler.name": ["ode", "sde", "ddpm"],
    "sampler.method": ["euler", "heun", "dopri5"],
    "sampler.num_steps": ["1", "2", "4"],
    "sampler.last_step": ["mean", "tweedie"],
    "weights": ["ema", "model", "ema-0.1"],
    "precision": ["no", "bf16"],
    "fid": ["real.npz", "file", "run"],
    "fid_metrics": ["[fd]", "[is]"],
    "data.split": ["test", "train"],
}
OF_VISUALISE = {
    "out": ["maps", "file", "file/x", "x" * 300, "."],
    "classes": VALUES["classes"],
    "blocks": ["[0]", "[0,1]", "[2]"],
    "heads": ["[1]", "[0,0]", "[5]"],
    "times": ["[0.5]", "[1,0]", "[0.5,0.51]", "[nan]", "[2]"],
    "query": ["[0,0]", "[3,3]", "[9,9]", "[1]"],
    "seed": VALUES["seed"],
    "cfg_scale": VALUES["cfg_scale"],
    "sampler.num_steps": VALUES["sampler.num_steps"],
    "weights": VALUES["weights"],
}


def arguments(values):
    """Up to four options, each once, of which one in three has a nonsense value."""
    pairs = [st.tuples(st.just(name), st.sampled_from(some * 2 + NONSENSE)) for name, some in values.items()]
    return st.lists(st.one_of(pairs), max_size=4, unique_by=lambda pair: pair[0])


@contextlib.contextmanager
def new_folder(made):
    """Work in a folder with a run, a reference and a file that is nothing."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(made / "run", Path(folder) / "run", ignore=shutil.ignore_patterns(".lock"))
        shutil.copy(made / "real.npz", folder)
        Path(folder, "file").write_bytes(b"mine")
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


@bounded(60)
@given(arguments(VALUES))
def test_any_arguments_of_sample(made, pairs):
    with new_folder(made) as folder:
        outcome(sample.main, ["run", *(f"--{name}={value}" for name, value in pairs)])
        assert (folder / "file").read_bytes() == b"mine"
        assert not list(folder.rglob(".*"))


@bounded(10)
@given(arguments(OF_VISUALISE))
def test_any_arguments_of_visualise(made, pairs):
    with new_folder(made) as folder:
        outcome(visualise.main, ["run", "--maps", *(f"--{name}={value}" for name, value in pairs)])
        assert (folder / "file").read_bytes() == b"mine"
        assert not list(folder.rglob(".*"))


def damaged(content, draw):
    """Bits flipped, a part missing, filled with zeros, or something else in the place of all."""
    if not content:
        return b"x"
    place = draw(st.integers(0, len(content) - 1))
    kind = draw(st.sampled_from(["bit", "bit", "bit", "cut", "zeros", "other"]))
    if kind == "bit":
        return content[:place] + bytes([content[place] ^ 1 << draw(st.integers(0, 7))]) + content[place + 1 :]
    if kind == "cut":
        return content[:place]
    if kind == "zeros":
        return content[:place] + bytes(len(content) - place)
    return draw(st.sampled_from([b"", b"null", b"3", b"[1]", b"{}", b'{"num": "x"}', b"[" * 10**4, b"\xff\xfe"]))


def images_in(file):
    found = np.load(file)
    return found if file.suffix == ".npy" else found["arr_0"]


def number_in(file):
    return json.loads(file.read_text())["fd"]


@bounded(120)
@given(st.data())
def test_damage_of_any_file_is_repaired_named_or_of_no_effect(made, data):
    """Afterwards the command is done, and images and distances are those without damage; or it says why not."""
    name, command = data.draw(st.sampled_from([pair for pair in commands(made) if pair[0] not in ("maps", "t.gif")]))
    command = [word for word in command if word != "--interrupted"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        shutil.copytree(made / "out", out)
        files = sorted(f for f in out.rglob("*") if f.is_file() and f.relative_to(out).parts[0].startswith(name[:-4]))
        file = data.draw(st.sampled_from(files))
        file.write_bytes(damaged(file.read_bytes(), data.draw))
        said = outcome(sample.main, [str(out / name) if word == str(made / "out" / name) else word for word in command])
        if said != "done":
            assert str(folder) in said, said
        elif name.endswith((".npz", ".npy")):
            assert np.array_equal(images_in(out / name), images_in(made / "out" / name.replace("half", "a")))
        elif name in ("r.json", "m.json"):
            assert number_in(out / name) == pytest.approx(number_in(made / "out" / "m.json"), rel=1e-6)
