"""The demo from end to end: its commands in turn, in this process, in an empty folder, with a small model."""

import json
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

import demo.__main__
from vca_engine.signals import SIGNALS

ROOT = Path(demo.__file__).parent.parent
SMALL = (
    f"--config {ROOT}/configs/digits_sit.yaml --run_dir runs/small --train.num_steps 20 --model.hidden_size 16 "
    "--model.depth 2 --model.num_heads 2 --sample.sampler.num_steps 3 --sample.per_class 1"
).split()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """An empty folder to run in, where subprocess.run runs Python programs in this process, and keeps their names."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        commands, plain = [], subprocess.run

        def run(command, **options):
            if command[0] != sys.executable:
                return plain(command, **options)
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
            argv = list(command[1:])
            module = argv.pop(0) == "-m"
            name = argv.pop(0) if module else command[1]
            commands.append(name)
            patch.setattr(sys, "argv", [name, *argv])
            try:
                if module:
                    runpy.run_module(name, run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(str(ROOT / name), run_name="__main__")
            except SystemExit as stop:
                return subprocess.CompletedProcess(command, stop.code)
            return subprocess.CompletedProcess(command, 0)

        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(demo.__main__.subprocess, "run", run)
        demo.__main__.main(SMALL)
        yield folder, commands
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_the_demo_trains_samples_and_scores(workplace):
    folder, commands = workplace
    assert commands[:5] == ["train.py", "sample.py", "sample.py", "demo.classifier", "demo.score"]
    run = folder / "runs" / "small"
    assert Image.open(run / "samples.png").size[1] == 28 + 10 * (64 + 4)
    assert Image.open(run / "loss.png").size[0] > 100
    with np.load(run / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (1000, 8, 8, 3)
        assert np.bincount(arrays["arr_1"]).tolist() == [100] * 10

    rows = json.loads((run / "score.json").read_text())["rows"]
    assert list(rows) == ["samples", "real, training (floor)", "noise (ceiling)"]
    samples, floor, noise = rows.values()
    assert [row["num_images"] for row in rows.values()] == [1000] * 3
    assert floor["accuracy"] > 0.9
    assert noise["accuracy"] < 0.3
    assert 0 < floor["frechet_distance"] < samples["frechet_distance"]
    assert floor["frechet_distance"] < 0.1 * noise["frechet_distance"]
    text = (run / "score.txt").read_text()
    assert text.startswith("Digits score (not FID-50K)")
    for name, row in rows.items():
        assert f"{name:<26}" in text
        assert f"{row['frechet_distance']:.2f}" in text


def test_a_second_run_repeats_nothing(workplace, capsys):
    folder, commands = workplace
    made = [*folder.rglob("*.safetensors"), *folder.rglob("samples.npz*"), folder / "runs" / "small" / "metrics.jsonl"]
    assert len(made) == 12
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in made}
    commands.clear()
    demo.__main__.main(SMALL)
    assert commands == ["train.py", "sample.py", "sample.py", "demo.score"]  # train.py finds nothing to do
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in made} == before
    assert re.findall(r"# done before: \$ python (\S+ \S+)", capsys.readouterr().out) == ["-m demo.classifier"]


def test_other_settings_in_the_same_run_folder_are_not_passed_over(workplace, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.__main__.main([*SMALL, "--train.lr", "0.5"])
    assert stop.value.code == 2
    assert "holds another run, with train.lr 0.003 (you gave 0.5)" in capsys.readouterr().err


def test_other_data_is_sent_to_train(workplace, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.__main__.main([*SMALL, "--data", "{name: folder, images: images}"])
    assert stop.value.code == 2
    assert "data.name is 'folder'; the demo knows ['digits', 'mnist']" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        demo.__main__.main([*SMALL, "--data", "{split: train}"])
    assert stop.value.code == 2
    assert "it needs a name" in capsys.readouterr().err
