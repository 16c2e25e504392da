"""Two processes train as one does, stopped or not, whole or sharded. One torchrun does all of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

import cache_latents
import fid
import sample
import train
from classify import __main__ as classify
from vca_engine.sampling.image_sampler import ImageSampler
from vca_engine.signals import SIGNALS
from vca_engine.weights import checkpoint

ROOT = Path(train.__file__).parent
SETTINGS = (
    "--process.name flow --sample.sampler.name ode --sample.sampler.method euler --sample.sampler.num_steps 3 "
    "--data.name folder --data.image_size 16 --data.images {root}/images --model.hidden_size 16 --model.depth 2 "
    "--model.num_heads 2 --sample.per_class 1 --train.batch_size 8 --train.lr 1e-2 --train.num_workers 0 "
    "--train.max_grad_norm 0.5 --train.accumulate 2 --train.log_every 2 --train.checkpoint_every 3 --train.tracker none "
    "--model.class_dropout_prob 0.3"
)
DATA = {
    "images": "--codec.name pixels",
    "latents": "--codec.name vae --codec.path {root}/vae --latents {root}/latents",
}
RECOGNISER = (
    "--process.name classify --data.name folder --data.image_size 16 --data.images {root}/images --codec.name pixels "
    "--eval.data.images {root}/others --eval.every 3 --model.name deit_tiny --model.patch_size 4 --model.hidden_size 16 --model.depth 2 "
    "--model.num_heads 2 --model.drop_path 0.3 --train.batch_size 8 --train.accumulate 2 --train.lr 1e-2 "
    "--train.weight_decay 0.1 --train.max_grad_norm 0.5 --train.num_workers 0 --train.log_every 2 "
    "--train.checkpoint_every 3 --train.tracker none"
)
STEPS = 6  # of 8 of 11 images: the third step is in the middle of an epoch


def argv(root, run, data, num_steps, extra=""):
    what = RECOGNISER if data == "recogniser" else f"{SETTINGS} {DATA[data]}"
    text = f"{what} --run_dir {root}/{run} --train.num_steps {num_steps} {extra}"
    return text.format(root=root).split()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs with one process, with two, and with two that share the weights; each whole, and of two parts."""
    root = tmp_path_factory.mktemp("processes")
    rng, state = np.random.default_rng(0), torch.get_rng_state()
    for i in range(11):
        folder = root / "images" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    shutil.copytree(root / "images", root / "others")
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        latent_channels=4,
        norm_num_groups=2,
        mid_block_add_attention=False,
    ).save_pretrained(root / "vae")
    torch.set_rng_state(state)
    fid.Classifier(3, 16).eval().save(root / "judge.safetensors")

    todo = {kind: [] for kind in ("one", "two", "sharded")}
    for kind, jobs in todo.items():
        for data in [*DATA, "recogniser"] if kind != "sharded" else ["images", "recogniser"]:
            for name, steps in (("whole", STEPS), ("parts", 3), ("parts", STEPS)):
                jobs.append(argv(root, f"{kind}-{data}-{name}", data, steps))
    measured = f"--fid.every 3 --fid.num 23 --fid.reference {root}/images --fid.extractor classifier "
    measured += f"--fid.weights {root}/judge.safetensors --fid.metrics [fd]"
    for kind, jobs in todo.items():
        jobs.append(argv(root, f"{kind}-measured", "images", 4, measured))
    for kind in ("two", "sharded"):
        todo[kind].append(argv(root, f"{kind}-bf16", "images", 2, "--train.precision bf16"))
        todo[kind].append(argv(root, f"{kind}-dry", "images", 50, "--dry-run"))
    # A run of one process that two go on with, and one of two that one does, both without accumulation from there.
    todo["one"].append(argv(root, "moved-up", "images", 3))
    todo["two"].append(argv(root, "moved-down", "images", 3))
    todo["two"].append(argv(root, "moved-up", "images", STEPS, "--train.accumulate 1"))
    moved_down = argv(root, "moved-down", "images", STEPS, "--train.accumulate 1")
    drawn = f"{root}/one-images-whole --sampler sde --sampler.num_steps 4 --num 37 --group_size 4 --out {root}".split()

    cache_latents.main(argv(root, "-", "latents", 1))
    in_one_process(train.main, todo["one"])
    jobs = [["train", a] for a in todo["two"]] + [["sharded", a] for a in todo["sharded"]]
    jobs += [["sample", [*drawn[:-1], f"{root}/two.npz", "--batch_size", "7"]]]
    jobs += [["sample", [*drawn[:-1], f"{root}/parts.npz"]]]
    interrupted([*drawn[:-1], f"{root}/parts.npz"])
    measured = f"eval {root}/one-recogniser-whole --batch_size 2 --num_workers 0 --device cpu --out {root}/eval".split()
    jobs += [["classify", [*measured[:-1], f"{root}/eval-two"]]]
    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += ["tests/processes.py", str(root / "jobs.json")]
    shutil.copytree(root, before := tmp_path_factory.mktemp("before") / "root")
    try:
        output = finish(command, environment, seconds=150)
    except subprocess.TimeoutExpired:  # gloo of torch 2.14 was seen to spin in ~UnboundBuffer after all had arrived
        shutil.rmtree(root)
        shutil.copytree(before, root)
        output = finish(command, environment, seconds=250)
    assert output.count("done: 6 steps") == 11  # said once, not by each process
    assert output.count("every step works; nothing was kept but") == 2
    assert not list(root.glob(".dry-run-*"))
    for kind in ("two", "sharded"):
        assert [file.name for file in (root / f"{kind}-dry").iterdir()] == ["data.png"]
    in_one_process(train.main, [moved_down])
    in_one_process(sample.main, [[*drawn[:-1], f"{root}/one.npz"]])
    in_one_process(classify.main, [measured])
    return root


def finish(command, environment, seconds):
    """Run a command in so many seconds, and return what it prints; if it takes longer, nothing of it lives on."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes) as running:
        try:
            output, errors = running.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            for process in [*psutil.Process(running.pid).children(recursive=True), running]:
                process.kill()
            raise
    assert running.returncode == 0, errors[-5000:]
    return output


def interrupted(drawn):
    """Draws three groups of the images in one process."""
    group, groups = ImageSampler.group, []

    def until_the_fourth(self, number, *rest):
        groups.append(number)
        if len(groups) == 4:
            raise KeyboardInterrupt
        return group(self, number, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageSampler, "group", until_the_fourth)
        with pytest.raises(SystemExit):
            in_one_process(sample.main, [[*drawn, "--batch_size", "1"]])


def in_one_process(main, commands):
    """Without what accelerate keeps, and with the handlers of signals as they were."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for command in commands:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        main(command)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def tensors(root, run):
    newest = checkpoint.find(root / run)
    return {f"{f.stem} {k}": v for f in newest.glob("*.safetensors") for k, v in load_file(f).items()}


def lines(root, run):
    found = [json.loads(text) for text in (root / run / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        del line["images_per_second"], line["memory_gib"]
    return {line.pop("step"): line for line in found}


CASES = [(kind, data) for kind in ("one", "two") for data in (*DATA, "recogniser")]
CASES += [("sharded", "images"), ("sharded", "recogniser")]


@pytest.mark.parametrize("kind, data", CASES)
def test_n_and_n_steps_are_2n_steps_bit_for_bit(root, kind, data):
    """Mid-epoch, with accumulation: weights, averages, optimizer, losses, gradients' norms, previews."""
    whole, parts = (f"{kind}-{data}-{name}" for name in ("whole", "parts"))
    a, b = tensors(root, whole), tensors(root, parts)
    assert a.keys() == b.keys()
    assert {k.split()[0] for k in a} == {"model", "ema", "ema-0.05", "ema-0.1", "optimizer", "meter"}
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    expected, found = lines(root, whole), lines(root, parts)
    assert list(expected) == [2, 4, 6]
    assert expected == found
    made = "eval.jsonl" if data == "recogniser" else f"previews/step-{STEPS:08d}.png"
    assert (root / whole / made).read_bytes() == (root / parts / made).read_bytes()


@pytest.mark.parametrize("data", [*DATA, "recogniser"])
def test_two_processes_make_the_run_of_one(root, data):
    """The same data order, times, noise, dropped labels: the same losses, to rounding, and the same files."""
    check_close(root, f"one-{data}-whole", f"two-{data}-whole")
    files = [
        sorted(str(f.relative_to(root / r)) for f in (root / r).rglob("*"))
        for r in (f"one-{data}-whole", f"two-{data}-whole")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("data", ["images", "recogniser"])
def test_sharded_weights_make_the_run_of_whole_ones(root, data):
    check_close(root, f"one-{data}-whole", f"sharded-{data}-whole")
    assert checkpoint.read_record(checkpoint.find(root / f"sharded-{data}-whole"))["step"] == STEPS


def test_shards_change_no_precision(root):
    """In bf16, too, weights, times and exchanged gradients are float32, and only the network's products are not."""
    a, b = (lines(root, f"{kind}-bf16")[2] for kind in ("two", "sharded"))
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    exact = lines(root, "one-images-whole")[2]["loss"]
    assert 1e-6 < abs(a["loss"] / exact - 1) < 0.02


@pytest.mark.parametrize("run", ["moved-up", "moved-down"])
def test_a_run_moves_to_another_number_of_processes(root, run):
    check_close(root, "one-images-whole", run, steps=[2, 6])


def test_the_distance_is_the_same_from_any_number_of_processes(root):
    """Of 23 images, so that the shares of two are not equal."""
    found = {}
    for kind in ("one", "two", "sharded"):
        records = [json.loads(text) for text in (root / f"{kind}-measured" / "fid.jsonl").read_text().splitlines()]
        assert [(r["step"], r["num_samples"]) for r in records] == [(3, 23), (4, 23)]
        found[kind] = [r["fd"] for r in records]
        best = json.loads((root / f"{kind}-measured" / "best.json").read_text())["fd-23"]
        assert best == {"value": min(found[kind]), "step": 3 + found[kind].index(min(found[kind]))}
    assert found["one"] == pytest.approx(found["two"], rel=1e-3)
    assert found["one"] == pytest.approx(found["sharded"], rel=1e-3)


def test_two_processes_draw_the_images_of_one(root):
    """Bit for bit: with another batch size, and when one process has begun what two go on with."""
    assert np.load(root / "one.npz")["arr_0"].std() > 1
    for name, drawn_now in (("two", 37), ("parts", 25)):
        assert (root / "one.npz").read_bytes() == (root / f"{name}.npz").read_bytes()
        record = json.loads((root / f"{name}.npz.json").read_text())
        assert (record["num_processes"], record["drawn_by_this_command"], record["nfe"]) == (2, drawn_now, 4)
        assert not (root / f"{name}.npz.partial").exists()


def check_close(root, one, two, steps=(2, 4, 6)):
    """Losses and weights to rounding; other noise would change the losses by some 10 %, and the weights altogether."""
    a, b = lines(root, one), lines(root, two)
    assert a.keys() == b.keys()
    for step in a:
        for key in ("loss", "grad_norm"):
            assert a[step][key] == pytest.approx(b[step][key], rel=1e-4)
        for x, y in zip(a[step].get("loss_by_t", []), b[step].get("loss_by_t", []), strict=True):
            assert x == pytest.approx(y, rel=1e-3) if x is not None else y is None
    a, b = tensors(root, one), tensors(root, two)
    assert a.keys() == b.keys()
    for k in a:
        if k.startswith(("model ", "ema")) and k.split()[1] != "pos_embed":
            if k.endswith("qkv.bias"):  # that of the keys changes no softmax, so its gradient is rounding alone
                a[k], b[k] = (torch.cat([z.chunk(3)[0], z.chunk(3)[2]]) for z in (a[k], b[k]))
            assert (a[k] - b[k]).norm() <= 2e-3 * a[k].norm() + 1e-5, k


def test_an_evaluation_is_shared(root):
    """11 images, of which one process gets 6 and the other 5; probabilities to the four digits that are written."""
    one, two = root / "eval", root / "eval-two"
    for name in ("classes.csv", "predictions.csv"):
        assert (one / name).read_text() == (two / name).read_text()
    assert len((one / "predictions.csv").read_text().splitlines()) == 12
