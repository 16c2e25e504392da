"""Every command of the pages is one that its program reads; those that need neither ImageNet nor a GPU are run, small."""

import argparse
import ast
import functools
import importlib
import importlib.util
import itertools
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import nbformat
import numpy as np
import pytest
import torch
import torch.distributed.run
from accelerate.commands.launch import launch_command_parser
from conftest import new_process
from diffusers import AutoencoderKL
from nbclient import NotebookClient
from PIL import Image

from dit_vca import DiT
from fid import Classifier
from vca_engine.training import log, outputs

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "AGENTS")] + sorted((ROOT / "docs").rglob("*.md"))
STARTS = ("python", "accelerate", "torchrun", "sbatch", "make", "pip", "conda", "pre-commit")
# What `...` stands for after a program, where it is not just more options.
REST = {
    "train": "--config configs/sit_b2_vca.yaml",
    "cache_latents": "--config configs/sit_b2_vca.yaml --latents latents",
    "sample": "runs/demo --num 8",
    "fid": "50k.npz",
    "classify": "runs/deit_tiny_vca",
    "demo.score": "--checkpoint runs/demo --samples samples.npz --classifier classifier.safetensors",
}
SUBCOMMANDS = {"eval", "stats", "compare", "curve", "train-extractor", "predict", "export"}
VALUES = {"CONFIG": "configs/sit_b2_vca.yaml", "K": "1", "N": "8", "SEED": "1"}


class Command(NamedTuple):
    """A program of ours, or a module that can be run, with its words."""

    program: str
    words: tuple[str, ...]


def code_of(page):
    """Lines of code, whole, and spans of code in a text."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language != "python":
            yield from block.splitlines()
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for line in text.splitlines():
        if line.startswith("    "):
            yield re.split(r" {3,}", line.strip())[0]  # what follows far behind says what the command does
        else:
            yield from re.findall(r"`([^`]+)`", line)


def commands_of(page):
    """Commands of a page as lists of words, those after && and of a loop, too, without a variable before them."""
    lines = list(code_of(page))
    variables = {"attention": "vca", "seed": "0"}  # of loops
    variables |= dict(match.groups() for line in lines if (match := re.fullmatch(r'([A-Z]+)="(.*)"', line)))
    for line in lines:
        line = re.sub(r"\$(\w+)", lambda found: variables.get(found[1], found[0]), line)
        for part in re.split(r"&&|;", line):
            part = re.sub(r"^\s*(do |\$ )?\s*([A-Z_]+=\S+ )?(\.venv/bin/)?", "", part)
            if part.partition(" ")[0] in STARTS:
                yield shlex.split(part, comments=True)


COMMANDS = {page: list(commands_of(page)) for page in PAGES}
ALL = sorted({tuple(words) for commands in COMMANDS.values() for words in commands})


def program_of(words):
    """Find the program that a command runs, and its words, out of what launches it; None if it is none of ours."""
    launcher, words = words[0], [VALUES.get(word, word) for word in words[1:]]
    if launcher == "accelerate":
        args = launch_command_parser().parse_args(words[1:])
        launched, rest = args.training_script, args.training_script_args
    elif launcher == "torchrun":
        args = torch.distributed.run.get_args_parser().parse_args(words)
        launched, rest = args.training_script, args.training_script_args
    elif launcher == "sbatch":
        script = next(word for word in words if not word.startswith("-"))
        assert (ROOT / script).is_file()
        return Command("train", tuple(words[words.index(script) + 1 :]))
    elif launcher == "python":
        launched, rest = (words[1], words[2:]) if words[:1] == ["-m"] else (words[0], words[1:])
    else:
        return None
    if launched == "...":
        return None
    rest, program = rest[rest[:1] == ["--"] :], launched.removesuffix(".py").replace("/", ".")
    if rest[-1:] == ["..."] and any(word.startswith("--") for word in rest):
        rest.pop()  # more options
    elif "..." in rest:
        at = rest.index("...")
        rest[at : at + 1] = REST[program].split()
    return Command(program, tuple(rest))


class ReadError(Exception):
    """Ends a program when it has read its command line."""


def module_of(program):
    found = importlib.util.find_spec(program)
    assert found, f"there is no program {program}"
    return f"{program}.__main__" if found.submodule_search_locations else program


def stop_after(read):
    @functools.wraps(read)
    def wrapped(*args, **options):
        read(*args, **options)
        raise ReadError

    return wrapped


def check_that_a_program_reads(command, monkeypatch, capsys):
    """Call the program, which ends as soon as it has read its words; its own error is shown if it does not."""
    program = importlib.import_module(module_of(command.program))
    if hasattr(program, "parse"):
        monkeypatch.setattr(program, "parse", stop_after(program.parse))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after(argparse.ArgumentParser.parse_args))
    monkeypatch.setattr(sys, "argv", [command.program, *command.words])
    try:
        program.main()
    except ReadError:
        return
    except SystemExit as stop:
        assert stop.code in (None, 0), capsys.readouterr().err


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_command_is_one_that_its_program_reads(words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    name, *rest = words
    if name == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(word for word in rest if "=" not in word) <= {*targets}
        assert all((ROOT / word.partition("=")[2]).is_file() for word in rest if "=" in word)
    elif name == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\[(\w+)\]", " ".join(rest))) <= {*extras}
    elif name == "conda":
        assert all((ROOT / word).is_file() for word in rest if word.endswith(".yml"))
    elif (name == "python" and rest[:1] != ["-m"] and "/" in rest[0]) or rest[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).is_file() for word in rest if word.endswith(".py"))
    elif rest and words != ("accelerate", "launch") and (command := program_of(words)):
        if {*command.words} <= SUBCOMMANDS:  # a mention of a program
            assert importlib.util.find_spec(module_of(command.program))
        else:
            check_that_a_program_reads(command, monkeypatch, capsys)


def test_the_pages_have_commands():
    assert len(ALL) > 80
    assert {page.name for page, commands in COMMANDS.items() if commands} >= {"README.md", "recipes.md", "training.md"}


# The commands that are run: those of README and docs/, but with a network of 10,000 weights, in two steps, on 40 small
# images. Only what makes them small is changed or added.

NETWORK = ["--model.hidden_size", "16", "--model.depth", "4", "--model.num_heads", "2"]
STEPS = [
    "--train.num_steps",
    "2",
    "--train.batch_size",
    "16",
    "--train.num_workers",
    "0",
    "--train.tracker",
    "none",
    "--sample.per_class",
    "1",
]
STEPS += ["--sample.sampler.num_steps", "8"]
JUDGED = ["--fid.extractor", "classifier", "--fid.weights", "judge.safetensors"]
LATENT = ["--codec.path", "vae", "--data.image_size", "16"]
SMALL = {"200": "4", "1000": "4", "10000": "4", "50000": "4", "20_000": "2", "256": "16", "512": "16"}
IMAGES = {
    "/data/imagenet/train",
    "/data/mine/train",
    "DIR",
    "IMAGES",
    "SAMPLES",
    "50k.npz",
    "pets",
    "emoji",
    "samples/",
}
COVERED = {  # by a word of the command -> what runs it, or what it needs
    "--help": "tests/test_startup.py",
    "--print_config": "tests/test_config.py",
    "--dry-run": "tests/test_train.py",
    "--device": "a GPU",
    "dinov2": "weights of DINOv2",
    "random-inception": "tests/test_fid_network.py",
    "fid-step-*.json": "tests/test_fid.py",
    "selfcheck": "weights of Inception",
    "admnet_guided_upsampled_imagenet256.npz": "samples of ADM",
    "VIRTUAL_imagenet256_labeled.npz --metrics is": "weights of Inception",
    "sample.py DiT-XL-2": "tests/test_pipeline.py",
    "path quadratic": "tests/test_extending.py",
    "runs/swapped": "tests/test_recipes.py",
    "deit": "tests/test_recognition.py and tests/test_recogniser.py",
    "reconstructed/": "tests/test_ema.py",
}
PROGRAMS = (
    "train",
    "train_vae",
    "cache_latents",
    "sample",
    "fid",
    "vca_engine.training.reconstruct",
)  # visualise: its own tests


def made_small(command):
    """Change the words that name something large, and add what makes the rest small."""
    words = [SMALL.get(word, word) for word in command.words]
    for i, word in enumerate(words):
        of = words[i - 1] if i else ""
        if word in IMAGES and of != "--out":
            words[i] = "images"
        elif of in ("--ref", "--fid", "--fid.reference"):
            words[i] = "images" if "pixels" in words else "reference.npz"
        elif of == "--latents":
            words[i] = "new" if command.program == "cache_latents" and "--check" not in words else "latents"
        elif of == "--run_dir":
            words[i] = "new"
        elif (word.startswith("runs/") and of != "--out") or word in ("RUN", "$step"):
            words[i] = "run"
    imagenet = not any(f"configs/{name}" in " ".join(words) for name in ("digits", "folder"))
    if command.program == "train":
        words += [*NETWORK, *STEPS, "--run_dir", "new", *(LATENT if imagenet else [])]
        words += [] if "--fid.extractor" in words else JUDGED
        words += ["--train.accumulate", "2"] if "--train.accumulate" in words else []
    elif command.program == "cache_latents":
        words += LATENT if imagenet else []
    elif command.program == "train_vae":
        words += ["--data.image_size", "16", "--num_steps", "2", "--batch_size", "2"]
    elif command.program == "fid" and words[0] == "train-extractor":
        words += ["--crop", "16", "--steps", "4", "--held-out", "0.3", "--quiet"]
    elif command.program == "fid" and words[0] != "curve" and "--extractor" not in words:
        words += ["--extractor", "classifier", "--weights", "judge.safetensors", "--quiet"]
    elif command.program == "sample" and "--sampler" in words:
        words += ["--sampler.num_steps", "3"]
    return Command(command.program, tuple(words))


def commands_to_run():
    """List them as printed -> made small, each small one once."""
    found = {}
    for page, commands in COMMANDS.items():
        for words in commands:
            text = " ".join(words)
            if page.parent == ROOT / "docs" or page.name == "README.md":
                known = any(word in text for word in COVERED) or words[:2] == ["accelerate", "launch"] == words
                command = None if known or len(words) < 3 else program_of(tuple(words))
                if command and command.program in PROGRAMS and not {*command.words} <= SUBCOMMANDS:
                    found.setdefault(made_small(command), text)
    return found


RUN = commands_to_run()


def call(command):
    """Run a program as a new process would."""
    with pytest.MonkeyPatch.context() as patch, new_process():
        for module in (log, outputs):
            patch.setattr(module, "plot_losses", lambda *given: None)  # takes as long as all the rest
        patch.setattr(sys, "argv", [command.program, *command.words])
        importlib.import_module(module_of(command.program)).main()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the commands need, and a run of the small network in it."""
    folder, rng = tmp_path_factory.mktemp("docs"), np.random.default_rng(0)
    (folder / "configs").symlink_to(ROOT / "configs")
    for i in range(40):
        place = folder / "images" / str(i % 10)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(place / f"{i}.png")
    (folder / "data" / "imagenet").mkdir(parents=True)
    (folder / "data" / "imagenet" / "train").symlink_to(folder / "images")
    torch.manual_seed(0)
    sizes = {"block_out_channels": (4, 8), "norm_num_groups": 2, "mid_block_add_attention": False}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(**blocks, **sizes, latent_channels=4).save_pretrained(folder / "vae")
    Classifier(10, 16).eval().save(folder / "judge.safetensors")
    published = DiT(input_size=8, patch_size=2, hidden_size=16, depth=4, num_heads=2, attention={"name": "mhsa"})
    torch.nn.init.normal_(published.final_layer.linear.weight)  # all zero is taken for a network without training
    torch.save(published.state_dict(), folder / "DiT-XL-2-256x256.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        of_images = ["--config", "configs/sit_b2_vca.yaml", "--data.images", "images"]
        judged = ["--extractor", "classifier", "--weights", "judge.safetensors", "--quiet"]
        call(Command("cache_latents", (*of_images, *LATENT, "--latents", "latents")))
        measured = ["--train.snapshot_every", "1", "--fid.reference", "images", "--fid.every", "2", "--fid.num", "4"]
        call(Command("train", (*of_images, *LATENT, *NETWORK, *STEPS, *JUDGED, *measured, "--run_dir", "run")))
        call(
            Command("fid", ("stats", "images", "--crop", "16", "--keep-images", "8", "--out", "reference.npz", *judged))
        )
        yield folder


@pytest.mark.parametrize("command", RUN, ids=RUN.values())
def test_a_command_runs(command, workplace, monkeypatch, tmp_path):
    shutil.copytree(workplace, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    call(command)


# What the pages quote of the code


def texts_of_programs():
    """Texts in the code of the programs and packages, each piece of an f-string by itself."""
    for file in itertools.chain(
        ROOT.glob("*.py"), *(ROOT.glob(f"{name}/**/*.py") for name in ("fid", "vca*", "*_vca"))
    ):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_errors_in_troubleshooting_are_what_programs_say():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## What programs say")[2]
    quoted = [piece.strip() for text in re.findall(r"^\| `([^`]+)`", page, re.MULTILINE) for piece in text.split("…")]
    assert len(quoted) > 12
    texts = [*texts_of_programs()]
    assert [piece for piece in quoted if not any(piece in text for text in texts)] == []


def test_the_lines_beside_the_formulas_are_those_of_the_layer():
    page = (ROOT / "docs" / "layer.md").read_text(encoding="utf-8").partition("## Formulas")[2].partition("\n## ")[0]
    lines = re.findall(r"^\|.*\| `([^`]+)` \|$", page, re.MULTILINE)
    code = [line.strip() for line in (ROOT / "vca" / "attention.py").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 8
    assert [line for line in lines if not any(each.partition("  #")[0] == line for each in code)] == []


def script_of(name):
    """Import docs/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_pictures_of_the_concepts_are_those_that_their_script_draws(tmp_path):
    script = script_of("draw_figures")
    script.FOLDER = tmp_path
    script.main()
    shown = re.findall(r"\]\((\w+\.png)\)", (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(file.name for file in tmp_path.iterdir())
    for name in shown:
        assert Image.open(tmp_path / name).size == Image.open(ROOT / "docs" / name).size


def test_the_exact_network_of_the_picture_of_guidance_draws_the_class_that_is_asked_for():
    script = script_of("draw_figures")
    process = script.Transport()
    y = torch.arange(3).repeat_interleave(3000)
    predict = script.guided(script.ExactVelocity(process), y, script.Guidance(1.0), null_class=3, channels=2)
    points = script.ODE(process, method="euler", num_steps=101)(predict, torch.randn(9000, 2, 1, 1)).flatten(1)
    for k, centre in enumerate(script.CENTRES):
        # Four standard errors, 4 * 0.5 / sqrt(3000) = 0.037, and what Euler's 100 steps leave, some 0.005.
        assert torch.allclose(points[y == k].mean(0), centre, atol=0.045, rtol=0)
        assert torch.allclose(points[y == k].std(0), torch.tensor(script.WIDTH), atol=0.045, rtol=0)


def test_the_table_of_gpus_is_what_its_script_counts(capsys):
    """Of the smallest network, which takes a second."""
    script = script_of("count_memory")
    script.MODELS = script.MODELS[:1]
    script.main()
    table = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert all(line in table for line in capsys.readouterr().out.splitlines())


def test_the_notebook_runs_and_its_digits_are_recognised(tmp_path):
    """As a user runs it, in a folder with all that a clone has; some 20 s of one core."""
    for each in ROOT.iterdir():
        if each.name not in ("runs", "docs", ".git", "site"):
            (tmp_path / each.name).symlink_to(each)
    notebook = nbformat.read(ROOT / "docs" / "demo.ipynb", as_version=4)
    # Twenty times what it takes: the machine may be busy.
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(o.text for c in notebook.cells for o in c.get("outputs", []) if o.get("name") == "stdout")
    # 97.6 % here; a network that draws the wrong digits gets 10 %, one that was trained for half as long some 50 %.
    assert float(re.search(r"intended digit in ([\d.]+)%", printed)[1]) > 85
    assert sum("image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", [])) == 4
