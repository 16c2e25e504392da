"""reproduce.py: the paper's tables from the commands to the numbers, at a tiny scale; and what they cost at full scale."""

import contextlib
import functools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

import pytest
from conftest import new_process

import fid
import reproduce
from vca import parse_size
from vca_engine import assemble
from vca_engine.config.cli import parse
from vca_engine.config.paper import find_row, read_tables
from vca_engine.config.schema import Config
from vca_engine.files import hold
from vca_engine.records import read_json, read_lines, write_json
from vca_engine.signals import STOPPED, run_logged
from vca_engine.training import log, outputs
from vca_engine.training.cost import cost_of, disk_of, flops_of_training, memory_of_weights

ROOT = Path(reproduce.__file__).parent
ROWS = "[dit_s2_vca,deit_tiny_vca]"
TINY = ("ablation-stages", "--scale", "tiny", "--rows")
GENERATOR, RECOGNISER = Path("runs/tiny/dit_s2_vca"), Path("runs/tiny/deit_tiny_vca")
RECORD, TABLE = GENERATOR / "fid-64.json", Path("runs/tiny/ablation-stages.md")


@functools.cache
def config_of(name):
    return parse(Config, ["--config", name], prog="test", description="", parts=assemble.parts())


@functools.cache
def cost(name):
    return cost_of(config_of(name))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which two rows were done, where programs run in this process, and the list of those that ran."""
    ran = []

    def run(command, file):
        """Run a program of this repository as `run_logged` does, but in this process: imports cost more than the work."""
        words = command[2:] if command[1] == "-m" else [Path(command[1]).stem, *command[2:]]
        ran.append(words[0])
        file.parent.mkdir(parents=True, exist_ok=True)
        with (
            file.open("a") as opened,
            contextlib.redirect_stdout(opened),
            contextlib.redirect_stderr(opened),
            new_process(),
        ):
            try:
                import_module(words[0]).main(words[1:])
            except SystemExit as stop:
                return stop.code
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("reproduce"))
        patch.setattr(reproduce, "run_logged", run)
        for module in (log, outputs):
            patch.setattr(module, "plot_losses", lambda *given: None)
        fid.Classifier(10, 8).save("runs/tiny/digits.safetensors")  # of random weights; training one takes long
        reproduce.main([*TINY, ROWS])
        yield ran


def reproduced(*words, code=0):
    """What a command runs and prints; `code` is the one that it ends with."""
    if not code:
        reproduce.main([*words])
        return
    with pytest.raises(SystemExit) as stop:
        reproduce.main([*words])
    assert stop.value.code == code or (code == 1 and isinstance(stop.value.code, str))
    return stop.value.code


def table():
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    return {cells[1].strip(" `"): [c.strip() for c in cells[2:-1]] for cells in (line.split("|") for line in lines)}


def test_two_rows_go_from_the_commands_to_the_table(workplace):
    assert workplace[:4] == ["cache_latents", "train", "sample", "train"]
    text, rows = TABLE.read_text(), table()
    assert "NOT the paper's numbers" in text
    assert list(rows) == [f"{name}-tiny" for name in read_tables()["ablation-stages"]]
    record, line = read_json(RECORD), read_lines(RECOGNISER / "eval.jsonl")[-1]
    assert (record["step"], record["num_samples"], line["step"], line["num_samples"]) == (40, 64, 60, 500)
    number, error, published = rows["dit_s2_vca-tiny"][2:5]
    assert (number, error, published) == (f"{record['fd']:.2f}", f"{record['fd_se']:.2f}", "-")
    share = line["top1"] / 100
    number, error = rows["deit_tiny_vca-tiny"][2:4]
    assert (number, error) == (f"{line['top1']:.2f}", f"{100 * (share * (1 - share) / 500) ** 0.5:.2f}")  # binomial
    assert rows["dit_s2_stage1-tiny"][2] == "not yet run"
    for name in ("latents", "train", "sample"):
        assert (GENERATOR / f"{name}.log").stat().st_size > 0
    assert "Frechet distance" in (GENERATOR / "sample.log").read_text()
    for ending in ("png", "pdf"):
        assert TABLE.with_suffix(f".{ending}").stat().st_size > 1000


def test_a_tiny_row_has_the_size_that_arithmetic_says(workplace):
    config = config_of("dit_s2_vca-tiny")
    memory = memory_of_weights(config, cost("dit_s2_vca-tiny").parameters)
    files = {f.stem: f.stat().st_size for f in (GENERATOR / "checkpoints" / "step-00000040").glob("*.safetensors")}
    # Beside the weights: the table of positions, keys, and of the optimizer its counters; all small.
    assert sum(files.values()) == pytest.approx(sum(memory.values()) - memory["gradients"], rel=0.1)


def test_a_second_command_makes_nothing_again(workplace, capsys):
    files = {f: f.stat().st_mtime_ns for f in Path("runs").rglob("*") if f.is_file() and f.parent != TABLE.parent}
    workplace.clear()
    reproduced(*TINY, ROWS)
    assert workplace == []
    assert {f: f.stat().st_mtime_ns for f in files} == files
    printed = capsys.readouterr().out
    assert "[1/2] dit_s2_vca-tiny: sample was done before" in printed
    assert re.search(r"\[2/2\] deit_tiny_vca-tiny: top1 \d", printed)


def test_an_interrupted_row_goes_on_and_gets_the_same_number(workplace, capsys):
    before = read_json(RECORD)["fd"]
    shutil.rmtree(GENERATOR / "checkpoints" / "step-00000040")
    RECORD.unlink()
    workplace.clear()
    reproduced(*TINY, "[dit_s2_vca]")
    assert workplace == ["train", "sample"]
    assert read_json(RECORD)["fd"] == before  # bit for bit, on a CPU
    printed = capsys.readouterr().out
    assert "$ python train.py --config dit_s2_vca-tiny\n" in printed
    assert f"$ python sample.py {GENERATOR} --num 64 --fid runs/tiny/digits.npy --out {RECORD}\n" in printed


def test_what_was_made_with_other_settings_is_refused_by_name(workplace, capsys):
    other = GENERATOR.with_name("dit_s2_stage1")
    shutil.copytree(GENERATOR, other)
    reproduced(*TINY, "[dit_s2_stage1]", code=1)
    said = capsys.readouterr().out
    assert "'runs/tiny/dit_s2_stage1' has other settings than the row: model.attention.stages" in said
    assert table()["dit_s2_stage1-tiny"][2] == "refused"
    assert "* `dit_s2_stage1-tiny` is refused: 'runs/tiny/dit_s2_stage1' has other settings" in TABLE.read_text()
    shutil.rmtree(other)

    record = read_json(RECORD)
    write_json(RECORD, {**record, "sample": {**record["sample"], "cfg_scale": 4.0}})
    reproduced(*TINY, "[dit_s2_vca]", code=1)
    assert f"'{RECORD}' was drawn with other settings than the row's: sample.cfg_scale 1.0" in capsys.readouterr().out
    write_json(RECORD, record)


def test_settings_of_the_user_may_not_change_a_number(workplace, capsys):
    Path("mine.yaml").write_text("train: {log_every: 20, accumulate: 2}\n")
    workplace.clear()
    reproduced(*TINY, "[dit_s2_vca]", "--settings", "mine.yaml")
    assert workplace == []
    for setting in ("train: {lr: 0.5}", "sample: {cfg_scale: 2}", "run_dir: runs/x"):
        Path("mine.yaml").write_text(f"{setting}\n")
        reproduced(*TINY, "[dit_s2_vca]", "--settings", "mine.yaml", code=1)
        assert re.search(r"'mine.yaml' has .*(train.lr|sample.cfg_scale|run_dir)", capsys.readouterr().out)


def test_a_row_that_fails_says_where_its_output_is_and_stops_no_other(workplace, capsys):
    broken = GENERATOR.with_name("deit_tiny_stage1")
    broken.mkdir()
    (broken / "metrics.jsonl").write_text('{"step": 50}\n')  # of a run whose checkpoints are gone
    workplace.clear()
    said = reproduced(*TINY, "[deit_tiny_stage1,deit_tiny_vca]", code=1)
    assert "not done: deit_tiny_stage1-tiny; the same command tries again" in said
    printed = capsys.readouterr().out
    assert f"train failed with exit code 2: train.py: run_dir '{broken}' has come to step 50" in printed
    assert f"See '{broken / 'train.log'}'." in printed
    assert "[2/2] deit_tiny_vca-tiny: top1" in printed
    assert workplace == ["train"]
    shutil.rmtree(broken)


def test_a_row_that_is_running_elsewhere_is_left_alone(workplace, capsys):
    workplace.clear()
    with hold(GENERATOR / ".reproduce.lock", ""):
        reproduced(*TINY, ROWS, code=1)
    printed = capsys.readouterr().out
    assert f"[1/2] dit_s2_vca-tiny: another reproduce.py is at work in '{GENERATOR}'" in printed
    assert "[2/2] deit_tiny_vca-tiny: top1" in printed
    assert workplace == []


def test_a_signal_ends_all_with_the_code_by_which_a_job_is_requeued(workplace, monkeypatch):
    monkeypatch.setattr(reproduce, "run_logged", lambda command, file: STOPPED)
    assert reproduced(*TINY, "[deit_tiny_stage2,deit_tiny_vca]", code=STOPPED) == STOPPED


def test_a_program_that_is_run_gets_the_signals_and_its_output_is_kept(tmp_path):
    program = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\nprint('ready', flush=True)\n"
    )
    file = tmp_path / "x" / "out.log"
    assert run_logged([sys.executable, "-c", program + "sys.exit(7)"], file) == 7
    assert run_logged([sys.executable, "-c", "import os; os.kill(os.getpid(), 10)"], file) == STOPPED  # SIGUSR1

    def end():
        while file.read_text().count("ready") < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=end).start()
    assert run_logged([sys.executable, "-c", program + "time.sleep(60)"], file) == STOPPED
    assert signal.getsignal(signal.SIGTERM) is handler
    with pytest.raises(OSError, match="no-such-program"):
        run_logged(["no-such-program"], file)


# Of the tables of arXiv:2212.09748: multiply-adds (10^9) and parameters (10^6).
PUBLISHED = {"s2": (6.06, 33), "b2": (23.01, 130), "l2": (80.71, 458), "xl2": (118.64, 675)}
GENERATORS = [n for t in ("fid", "fid-large", "fid-512") for n in read_tables()[t] if not re.match("sit_(l|xl)2", n)]


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_cost_of_the_published_sizes(size):
    found, (products, parameters) = cost(f"dit_{size}_mhsa"), PUBLISHED[size]
    assert found.multiply_adds / 1e9 == pytest.approx(products, rel=1e-3)  # half of a digit of 6.06
    assert round(found.parameters / 1e6) == parameters
    assert found.contrast_tokens == []


def formula(config, side, contrast):
    """Multiply-adds of a DiT or SiT with latents of side x side x 4, by hand; of VCA with so many contrast tokens."""
    sizes = parse_size(config.model.size)
    c, depth, p = sizes["hidden_size"], sizes["depth"], sizes["patch_size"]
    n = (side // p) ** 2
    out = 8 if config.process["name"] == "diffusion" else 4  # a DiT learns a variance, too
    attention = 8 * n * contrast * c + 9 * n * c if contrast else 2 * n**2 * c  # with its convolution
    block = 12 * n * c**2 + 6 * c**2 + attention  # qkv, projection and MLP; adaLN
    return n * 4 * p**2 * c + 256 * c + c**2 + depth * block + 2 * c**2 + n * c * p**2 * out


@pytest.mark.parametrize("name", GENERATORS)
def test_torch_counts_the_multiply_adds_of_the_formula(name):
    config = config_of(name)
    found, side = cost(name), config.data["image_size"] // 8
    tokens = (side // parse_size(config.model.size)["patch_size"]) ** 2
    contrast = min(64, tokens // 4) if "vca" in name else 0
    assert found.contrast_tokens == ([contrast] if contrast else [])
    assert found.multiply_adds == formula(config, side, contrast)


@pytest.mark.parametrize("name", ["dit_s8", "dit_s4", "dit_s2", "sit_b2", "dit_l2", "sit_xl2"])
def test_at_256_pixels_vca_costs_nothing_more_than_its_convolution(name):
    """With n = N / 4, 8 N n C is 2 N^2 C."""
    full, vca = cost(f"{name}_mhsa"), cost(f"{name}_vca")
    sizes = parse_size(config_of(f"{name}_vca").model.size)
    tokens = (32 // sizes["patch_size"]) ** 2
    assert vca.multiply_adds - full.multiply_adds == sizes["depth"] * 9 * tokens * sizes["hidden_size"]


def test_the_parameters_that_vca_adds():
    """Embeddings, eight lambda vectors and two gains of a head each, and the convolution of each layer."""
    added = {
        n: cost(f"{n}_vca").parameters - cost(f"{n}_{b}").parameters
        for n, b in (("dit_s2", "mhsa"), ("sit_b2", "mhsa"), ("deit_tiny", "own"), ("deit_small", "own"))
    }
    expected = {
        (384, 12, 6, 64): "dit_s2",
        (768, 12, 12, 64): "sit_b2",
        (192, 12, 3, 49): "deit_tiny",
        (384, 12, 6, 49): "deit_small",
    }
    for (dim, depth, heads, n), name in expected.items():
        assert added[name] == depth * (2 * n * dim + 10 * dim // heads + 10 * dim)
    assert (added["dit_s2"], added["deit_tiny"]) == (643_584, 256_512)


def test_the_list_has_the_numbers_of_its_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reproduce.main(["--list", "--rows", "[dit_s2_mhsa,dit_s2_vca,dit_b4_vca,deit_tiny_vca]"])
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    # 32,865,056 parameters x 4 bytes x (weights, gradients, two moments, three averages)
    assert lines["dit_s2_mhsa"] == ["32,865,056", "6.06", "-", "877.6", "MiB", "67.2", "not", "yet", "run"]
    assert lines["dit_s2_vca"] == ["33,508,640", "6.07", "64", "894.8", "MiB", "62.3", "not", "yet", "run"]
    assert lines["dit_b4_vca"][-5:] == ["not", "known", "not", "yet", "run"]
    assert lines["deit_tiny_vca"][:3] == ["5,973,928", "1.26", "49"]


def test_the_estimate_is_the_arithmetic_that_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reproduce.main(
        ["fid", "--estimate", "--rows", "[dit_s2_mhsa]", "--tflops", "100", "--utilisation", "0.5", "--price", "2"]
    )
    text = capsys.readouterr().out
    found = cost("dit_s2_mhsa")
    operations = found.multiply_adds * 2 * (3 * 400_000 * 256 + 50_000 * 250)
    hours = operations / (50e12 * 3600)
    cells = next(line for line in text.splitlines() if line.startswith("dit_s2_mhsa")).split()
    assert (cells[1], cells[-1]) == (f"{hours:,.1f}", f"{2 * hours:,.0f}")
    assert "50% of 100 TFLOP/s, assumed" in text
    latents = 1_281_167 * 2 * 8 * 32 * 32 * 2  # mirrored, mean and deviation of 4 channels, float16
    assert f"{latents / 2**30:,.1f} GiB" in text
    # Ten checkpoints at the end, 50,000 to 350,000 and the last three, and one more while it is written, of weights,
    # three averages and two moments; and 20 snapshots of two averages.
    assert disk_of(config_of("dit_s2_mhsa"), found.parameters) == 4 * found.parameters * (6 * 11 + 2 * 20)

    reproduce.main(
        ["recognition", "--estimate", "--rows", "[deit_tiny_vca,deit_small_vca]", "--images_per_second", "1000"]
    )
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["deit_tiny_vca"][1] == f"{375_300 * 1024 / 1000 / 3600:,.1f}"
    ratio = flops_of_training(config_of("deit_small_vca"), cost("deit_small_vca"))
    ratio /= flops_of_training(config_of("deit_tiny_vca"), cost("deit_tiny_vca"))
    assert lines["deit_small_vca"][1] == f"{375_300 * 1024 / 1000 / 3600 * ratio:,.1f}"


def test_jobs_for_slurm(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Path("ref.npz").touch()
    given = ["fid", "--data.images", "images", "--fid.reference", "ref.npz", "--rows", "[dit_s2_vca,sit_s2_vca]"]
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    reproduce.main([*given, "--submit"])
    assert "type where there is: sbatch results/fid.sh" in capsys.readouterr().out
    text = Path("results/fid.sh").read_text()
    assert "#SBATCH --array=0-1\n" in text
    assert "#SBATCH --signal=USR1@300\n" in text
    # The script runs: with a python that says its words, and an scontrol that says what is requeued.
    for name, body in (
        ("python", 'echo "$@"; exit 75'),
        ("scontrol", 'echo "scontrol $*"'),
        ("sbatch", 'echo "$@" > given'),
    ):
        Path(name).write_text(f"#!/bin/bash\n{body}\n")
        Path(name).chmod(0o755)
    places = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "17"}
    done = subprocess.run(["bash", "results/fid.sh"], env=places, capture_output=True, text=True)
    assert done.returncode == 75
    assert "scontrol requeue 17" in done.stdout
    words = next(line for line in done.stdout.splitlines() if line.startswith("reproduce.py "))
    assert "--submit false --rows [sit_s2_vca] --launcher srun " in words
    launcher = shlex.split(words.partition("--launcher ")[2])
    assert launcher[-3:] == [
        "-c",
        'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec python "$@"',
        "python",
    ]
    monkeypatch.setenv("PATH", places["PATH"])
    reproduce.main([*given, "--submit"])
    assert Path("given").read_text() == "results/fid.sh\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "no table is named; choose one of"),
        ("fids", "table is 'fids'; did you mean 'fid'?"),
        ("fid --rows [dit_s2_vc]", "did you mean 'dit_s2_vca'?"),
        ("fid", "the reference of the FID is not given; type --fid.reference VIRTUAL_imagenet256_labeled.npz"),
        (
            "fid-512 --fid.reference x",
            "the reference of the FID 'x' is not there; type --fid.reference VIRTUAL_imagenet512",
        ),
        ("fid --fid.reference ref.npz", "'data/imagenet/train', are not there; type --data.images DIR"),
        ("recognition --data.images .", "'data/imagenet/val', are not there; type --eval.data.images DIR"),
        ("fid --scale tiny --data.images .", "--scale tiny has images and a reference of its own"),
        ("fid --price 2", "--price is for --estimate"),
        ("fid --scale tiny --estimate", "--estimate is for the paper's scale"),
        ("fid --no_such 1", "no_such"),
    ],
)
def test_a_mistake_is_told_before_anything_is_done(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("ref.npz").touch()
    assert reproduced(*words.split(), code=2) == 2
    assert expected in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["ref.npz"]


def test_the_commands_of_the_full_scale(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["fid", "--data.images", "images", "--fid.reference", "ref.npz", "--fid.weights", "w.pth", "--launcher"]
    args = parse(reproduce.ReproduceArguments, [*words, "accelerate launch"], prog="", description="", first="table")
    plan = reproduce.plan_of(find_row("sit_b2_vca"), args)
    same = "--config sit_b2_vca --data.images images --latents runs/latents_256"
    assert {name: (shlex.join(command), done) for name, (command, done) in plan.steps.items()} == {
        "latents": (f"accelerate launch cache_latents.py {same}", False),
        "train": (f"accelerate launch train.py {same}", False),
        "sample": (
            "accelerate launch sample.py runs/sit_b2_vca --num 50000 --fid ref.npz --fid_weights w.pth --out "
            "runs/sit_b2_vca/fid-50000.json",
            False,
        ),
    }
    words = ["recognition", "--data.images", "train", "--eval.data.images", "val"]
    args = parse(reproduce.ReproduceArguments, words, prog="", description="", first="table")
    [(command, done)] = reproduce.plan_of(find_row("deit_small_agent"), args).steps.values()
    assert shlex.join(command) == "python train.py --config deit_small_agent --data.images train --eval.data.images val"
    assert not done


def test_a_row_that_does_not_fit_the_tiny_scale_is_not_begun():
    args = parse(reproduce.ReproduceArguments, ["--scale", "tiny"], prog="", description="", first="table")
    with pytest.raises(
        ValueError, match="image_size is 32, which the windows or stripes of swin_tiny with attention own"
    ):
        reproduce.plan_of(find_row("swin_tiny_own-tiny"), args)


def test_a_network_that_tiny_images_do_not_fit_is_left_out(capsys):
    """Of the recognisers it is Swin-T with its own windows of 7x7 tokens; 32 pixels are 8x8 tokens."""
    left_out = [name for name in read_tables()["recognition"] if not reproduce.fits(find_row(f"{name}-tiny"))]
    assert left_out == ["swin_tiny_own"]
    assert "swin_tiny_own-tiny: left out: image_size is 32, which the windows" in capsys.readouterr().out


def test_the_study_is_a_table_too(monkeypatch):
    done = []
    ended = subprocess.CompletedProcess([], returncode=2)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: done.append(command) or ended)
    with pytest.raises(SystemExit) as end:
        reproduce.main(["study", "--part", "3/2"])
    assert end.value.code == 2
    assert done == [[sys.executable, "-m", "benchmarks.study", "--part", "3/2"]]
