"""The package as `pip install .` puts it: a wheel is built of the clone, unpacked, and used from another folder."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_pipeline import EULER, small

import fid
from vca_engine.config.cli import PACKAGES
from vca_engine.config.paper import read_config

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"  # as pip does, without it


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A function that runs Python in an empty folder, with the unpacked wheel before everything else; gives its end."""
    pytest.importorskip("setuptools", minversion="77", reason="a wheel is built by setuptools: pip install setuptools")
    root = tmp_path_factory.mktemp("installed")
    ignored = shutil.ignore_patterns(
        ".*", "runs", "build", "dist", "site", "docs", "tests", "*.egg-info", "__pycache__"
    )
    shutil.copytree(ROOT, root / "clone", ignore=ignored)
    built = [sys.executable, "-c", BUILD, str(root)]
    subprocess.run(built, cwd=root / "clone", check=True, capture_output=True, text=True)
    shutil.rmtree(root / "clone")
    (wheel,) = root.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(root / "site-packages")
    (root / "elsewhere").mkdir()

    def run(*words):
        environment = os.environ | {"PYTHONPATH": str(root / "site-packages"), "OMP_NUM_THREADS": "1"}
        command, place = [sys.executable, *map(str, words)], root / "elsewhere"
        return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)

    return run


def test_the_layer(installed):
    code = "import torch, vca; layer = vca.VisualContrastAttention(16, 2, (4, 4), layer_index=0)\n"
    done = installed("-c", f"{code}print(tuple(layer(torch.ones(2, 16, 16)).shape), vca.__file__)")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\(2, 16, 16\) .*/site-packages/vca/__init__.py\n", done.stdout)


def test_a_saved_model_draws_what_it_draws_in_the_clone(installed, tmp_path):
    pipe = small(tmp_path, sampler=EULER)
    pipe.save_pretrained(tmp_path / "model")
    call = 'pipe([1, "class 0"], num_images_per_class=2, num_inference_steps=3, output_type="np")'
    loaded = f"pipe = Pipeline.from_pretrained({str(tmp_path / 'model')!r}).to('cpu')"
    code = f"from vca_engine import Pipeline\n{loaded}\noutput = {call}\nprint(output.images.tolist(), output.record)"
    done = installed("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(eval(call).images.tolist()))
    assert "'revision': None" in done.stdout  # of the code: no repository is around it


def test_the_evaluator(installed, tmp_path):
    torch.manual_seed(0)
    fid.Classifier(num_classes=3, image_size=8).eval().save(tmp_path / "judge.safetensors")
    rng = np.random.default_rng(0)
    for name in "a", "b":
        (tmp_path / name).mkdir()
        for i in range(12):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    words = ["--extractor", "classifier", "--weights", tmp_path / "judge.safetensors", "--device", "cpu"]
    done = installed("-m", "fid", "eval", tmp_path / "a", "--ref", tmp_path / "b", *words)
    assert done.returncode == 0, done.stderr
    assert re.search(r"12 samples", done.stdout)


@pytest.mark.parametrize("words", ["fid eval . --ref .", "classify eval ."])
def test_a_mistake_is_one_sentence_there_too(words, installed):
    done = installed("-m", *words.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"(python -m fid|classify): '.' holds no .+\n", done.stderr)


def test_rows_of_the_paper_are_found_and_an_error_of_a_library_keeps_its_traceback(installed):
    rows = "from vca_engine.config.paper import read_config\nprint(read_config('sit_b2_vca'))\n"
    beside = "from pathlib import Path\nimport vca\nfile = Path(vca.__file__).parents[1] / 'of_others.py'\n"
    library = f"{beside}file.write_text('def fail(argv):\\n    raise ValueError(argv)')\nfrom of_others import fail\n"
    decorated = "from vca_engine.config.cli import report_errors\nreport_errors('program')(fail)('of a library')"
    done = installed("-c", rows + library + decorated)
    assert done.stdout == f"{read_config('sit_b2_vca')}\n", done.stderr
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("\nValueError: of a library\n")


def test_the_packages_whose_errors_are_sentences_are_those_of_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert {name.partition(".")[0] for name in listed} == PACKAGES
