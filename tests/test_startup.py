"""A mistake is told at once: nothing is imported before it that takes about as long to import as torch."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {
    "diffusers",
    "gradio",
    "matplotlib",
    "pytorch_fid",
    "scipy",
    "tensorboard",
    "timm",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torchdiffeq",
    "torchvision",
    "transformers",
}
CHILD = """
import contextlib, importlib, sys
for word in "--help", "--no_such_setting=1":
    with contextlib.suppress(SystemExit):
        importlib.import_module(sys.argv[1]).main([word])
print("imported:", *sys.modules)
"""
PROGRAMS = (
    *("train", "sample", "visualise", "export", "cache_latents", "train_vae", "reproduce"),
    *("fid.__main__", "classify.__main__"),
)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_and_a_mistake_import_nothing_slow(program):
    done = subprocess.run([sys.executable, "-c", CHILD, program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text, _, imported = done.stdout.partition("imported: ")
    assert "usage" in text
    assert done.stderr  # of the mistake
    assert set(imported.split()) & HEAVY == set()
