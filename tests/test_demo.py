"""The demo from end to end: its commands in turn, in this process, in an empty folder, with a small model."""

import contextlib
import io
import json
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import new_process
from PIL import Image

import demo.__main__
import train_vae
from demo.__main__ import Step, run_together
from vca_engine import assemble
from vca_engine.config.cli import parse
from vca_engine.config.schema import Config
from vca_engine.records import differences
from vca_engine.weights import checkpoint

ROOT = Path(demo.__file__).parent.parent
SMALL = (
    f"--config {ROOT}/configs/digits_sit.yaml --run_dir runs/small --train.num_steps 20 --model.hidden_size 16 "
    "--model.depth 2 --model.num_heads 2 --sample.sampler.num_steps 3 --sample.per_class 1"
).split()


RECOGNISER = (
    f"--config {ROOT}/configs/digits_deit.yaml --run_dir runs/few --train.num_steps 4 --train.warmup_steps 0 "
    "--eval.every 4 --train.batch_size 8 --model.hidden_size 12 --model.depth 2 --model.num_heads 2"
).split()


class Ended:
    """A process that has ended."""

    def __init__(self, code):
        self.returncode = code

    def poll(self):
        return self.returncode

    terminate = wait = poll


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """An empty folder to run in, where the demo's commands run in this process, and their names are kept."""
    found = []

    def begin(command, stdout=None, stderr=None):
        argv = list(command[1:])
        module = argv.pop(0) == "-m"
        name = argv.pop(0) if module else command[1]
        found.append(name)
        code = 0
        with contextlib.ExitStack() as stack:
            stack.enter_context(new_process())
            # That another test has imported one of the programs.
            stack.enter_context(warnings.catch_warnings(action="ignore", category=RuntimeWarning))
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(sys, "argv", [name, *argv])
            if stdout:
                stack.enter_context(contextlib.redirect_stdout(stdout))
                stack.enter_context(contextlib.redirect_stderr(stdout))
            try:
                if module:
                    runpy.run_module(name, run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(str(ROOT / name), run_name="__main__")
            except SystemExit as stop:
                code = stop.code
        return Ended(code)

    with new_process(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("demo"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(demo.__main__, "subprocess", SimpleNamespace(Popen=begin, STDOUT=subprocess.STDOUT))
        yield found


@pytest.fixture(scope="module")
def workplace(commands):
    """Where the demo of a generator has run, and its commands."""
    demo.__main__.main(SMALL)
    return Path.cwd(), commands


@pytest.fixture(scope="module")
def recognised(commands):
    """What the demo of a recogniser has printed, and its commands."""
    commands.clear()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        demo.__main__.main(RECOGNISER)
    return printed.getvalue(), list(commands)


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


def test_the_demo_of_latents_trains_its_autoencoder_first(tmp_path, monkeypatch):
    """On the images and with the seed of its config, until its folder is complete."""
    monkeypatch.chdir(tmp_path)
    words = ["--config", f"{ROOT}/configs/mnist_sit.yaml", "--seed", "3", "--codec.path", "vae"]
    config = parse(Config, words, prog="demo", description="", parts=assemble.parts())
    (step,), (caching,) = demo.__main__.generation(config, words)[0][:2]
    assert (step.words[0], caching.words[0], step.done) == ("train_vae.py", "cache_latents.py", False)
    args = parse(train_vae.VaeArguments, step.words[1:], prog="train_vae.py", description="", parts=assemble.parts())
    assert (args.data, args.seed, args.out, args.widths) == (config.data, 3, "vae", [8, 16, 16])
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "training.pt").touch()
    assert not demo.__main__.generation(config, words)[0][0][0].done
    (tmp_path / "vae" / "config.json").touch()
    assert demo.__main__.generation(config, words)[0][0][0].done


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


def test_the_demo_of_a_recogniser_trains_six_times_and_compares(recognised):
    printed, commands = recognised
    assert commands == ["train.py"] * 6 + ["classify"]
    folder = Path("runs/few")
    runs = [folder / f"{name}-{seed}" for name in ("own", "vca") for seed in range(3)]
    found = json.loads((folder / "accuracy.json").read_text())
    assert [group["name"] for group in found["groups"]] == ["attention own", "attention vca"]
    assert [run["folder"] for group in found["groups"] for run in group["runs"]] == list(map(str, runs))
    for run in (run for group in found["groups"] for run in group["runs"]):
        last = json.loads((Path(run["folder"]) / "eval.jsonl").read_text().splitlines()[-1])
        assert (run["step"], run["top1"]) == (4, last["top1"])
        assert "done: 4 steps" in (Path(run["folder"]) / "log.txt").read_text()
        assert f"step 4, 500 images: top1 {last['top1']:.2f} %" in printed
    assert "attention vca minus attention own" in printed
    assert printed.rstrip().endswith("The picture:  runs/few/accuracy.png")
    assert Image.open(folder / "accuracy.png").size[0] > 800
    assert "\r" not in printed
    assert "50%|" not in printed  # of the bars their ends only
    for text in re.findall(r"^  (python .*)$", printed, re.MULTILINE):
        assert f"$ {text}\n" in printed


def test_its_trainings_differ_in_attention_and_seed_only(recognised):
    first, *others = [
        checkpoint.read_record(checkpoint.find(f"runs/few/{name}-{seed}"))["config"]
        for name in ("own", "vca")
        for seed in range(3)
    ]
    keys = {key for other in others for key in differences(first, other)}
    assert {key for key in keys if not key.startswith("model.attention.")} == {"seed", "run_dir"}


def test_the_demo_of_a_recogniser_trains_nothing_twice(recognised, capsys):
    files = [*Path("runs/few").rglob("*.safetensors"), *Path("runs/few").rglob("*.jsonl")]
    before = {file: file.stat().st_mtime_ns for file in files}
    demo.__main__.main(RECOGNISER)
    assert {file: file.stat().st_mtime_ns for file in files} == before
    assert capsys.readouterr().out.count("done already: 4 steps") == 6


def test_a_step_that_fails_is_named_with_its_exit_code_and_what_it_printed(recognised, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.__main__.main([*RECOGNISER, "--train.lr", "0.5"])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert "holds another run, with train.lr 0.003 (you gave 0.5)" in printed.out
    assert re.search(r"^demo: this command ended with exit code 2: python train.py .*--train.lr 0.5 ", printed.err)


def test_the_demo_of_a_recogniser_needs_another_attention_and_images_to_evaluate_on(capsys):
    for words, said in {
        ("--model.attention.name", "own"): "model.attention.name is 'own', with which the demo compares another",
        ("--eval.data=", "--eval.every="): "eval.data is not given, and the demo compares accuracies",
    }.items():
        with pytest.raises(SystemExit) as stop:
            demo.__main__.main([*RECOGNISER, *words])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err


class TestRunTogether:
    """With programs of a line, in processes of their own."""

    @pytest.fixture(autouse=True)
    def _two_cores(self, monkeypatch):
        monkeypatch.setattr("os.cpu_count", lambda: 2)
        monkeypatch.setattr(demo.__main__, "subprocess", subprocess)

    def test_two_run_at_the_same_time(self, tmp_path):
        """Each waits for a file that the other makes."""
        program = (
            "import pathlib, sys, time; mine, other = map(pathlib.Path, sys.argv[1:]); mine.touch()\n"
            "while not other.exists(): time.sleep(0.01)"
        )
        files = [str(tmp_path / "a"), str(tmp_path / "b")]
        run_together([Step(["-c", program, *pair], log=tmp_path / "log.txt") for pair in (files, files[::-1])])

    def test_of_progress_bars_their_end_is_printed_and_logs_go_on(self, tmp_path, capsys):
        program = r"import sys; sys.stdout.write('\r 0%\r 50%\r      \rnow\n'); sys.stderr.write('\r100%\n')"
        step = Step(["-c", program], log=tmp_path / "run" / "log.txt")
        run_together([step])
        lines = capsys.readouterr().out.splitlines()
        assert {line.strip() for line in lines} == {"", f"$ {step}", f"{step.log}:", "now", "100%"}
        run_together([step])
        assert step.log.read_bytes().count(b"now") == 2

    def test_where_one_fails_the_other_is_stopped_and_no_more_begin(self, tmp_path, capsys):
        ended = tmp_path / "ended"
        waits = (
            "import pathlib, signal, sys, time\n"
            "def end(*_): pathlib.Path(sys.argv[1]).touch(); raise SystemExit(75)\n"
            "signal.signal(signal.SIGTERM, end); pathlib.Path(sys.argv[2]).touch()\n"
            "while True: time.sleep(1)"
        )
        fails = "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.01)\nsys.exit(3)"
        ready = str(tmp_path / "ready")
        steps = [
            Step(["-c", waits, str(ended), ready], log=tmp_path / "a.txt"),
            Step(["-c", fails, ready], log=tmp_path / "b.txt"),
            Step(["-c", "print('third')"], log=tmp_path / "c.txt"),
        ]
        with pytest.raises(SystemExit) as stop:
            run_together(steps)
        assert stop.value.code == 3
        assert ended.exists()
        assert not (tmp_path / "c.txt").exists()
        assert "ended with exit code 3" in capsys.readouterr().err
