"""The house itself: who imports whom, that every config builds, and that everything public says what it is."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

import dit_vca
import fid
import sit_vca
import vca
from vca_engine import assemble
from vca_engine.config.cli import parse
from vca_engine.config.paper import TABLES, read_config, read_tables
from vca_engine.config.schema import Config
from vca_engine.images import codecs, datasets
from vca_engine.images.labels import DataInfo

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vca", "dit_vca", "sit_vca", "vca_engine", "fid", "classify", "demo", "benchmarks")
SCRIPTS = ("train", "sample", "visualise", "export", "app", "cache_latents", "train_vae", "reproduce")
OURS = {*PACKAGES, *SCRIPTS}
FILES = [f for name in PACKAGES for f in sorted((ROOT / name).rglob("*.py"))] + [ROOT / f"{s}.py" for s in SCRIPTS]
CONFIGS = sorted(f for f in (ROOT / "configs").glob("*.yaml") if f != TABLES)
ROWS = sorted({name for table in read_tables().values() for name in table})


def name_of(file):
    return str(file.relative_to(ROOT))


def modules(file):
    """Names of all modules that a file imports, wherever in it; `from a import b` may be of a module a.b."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield file.relative_to(ROOT).parts[0]


def imports(file):
    """Their top-level names."""
    return {name.split(".")[0] for name in modules(file)}


# Of vca_engine, what several rooms use and none owns.
SMALL = ("files", "hub", "records", "terminal", "seeds", "signals", "distributed", "precision")
NETWORKS = {"vca", "dit_vca", "sit_vca"}
PEERS = {"vca_engine.config", "vca_engine.images", "vca_engine.weights"}
MAY_IMPORT = {  # room -> rooms; all may import themselves and, but for the networks, the small files
    "vca": set(),
    "dit_vca": {"vca"},
    "sit_vca": {"vca"},
    "vca_engine": set(),  # the small files
    "vca_engine.config": {"vca"},
    "vca_engine.images": {"vca_engine.config"},
    "vca_engine.weights": {"vca_engine.config", "vca_engine.images", *NETWORKS},
    "classify": {"vca"},
    "vca_engine.assemble": PEERS | NETWORKS | {"classify"},
    "vca_engine.sampling": PEERS | NETWORKS | {"vca_engine.assemble"},
    "vca_engine.training": PEERS | NETWORKS | {"vca_engine.assemble", "vca_engine.sampling"},
    "fid": {"vca_engine.images"},
}
# Files of that folder; they use what uses the rest of it.
OF_CLASSIFY_PROGRAM = ("__main__", "recogniser", "published", "evaluation", "pictures", "compare")
PROGRAMS_MAY = {*MAY_IMPORT, "demo"}
MAY_IMPORT["benchmarks"] = PROGRAMS_MAY | {*SCRIPTS}


def room_of(name):
    """The room of a module, by its dotted name: a folder, or `vca_engine.assemble`, or a program."""
    parts = name.split(".")
    if parts[0] == "classify" and parts[-1] in OF_CLASSIFY_PROGRAM:
        return "classify.__main__"
    if parts[0] != "vca_engine" or len(parts) == 1:
        return parts[0]
    return "vca_engine" if parts[1] in SMALL else ".".join(parts[:2])


def module_of(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_the_arrows(file):
    own = room_of(module_of(file))
    found = {room_of(name) for name in modules(file) if name.split(".")[0] in OURS} - {own}
    if own in NETWORKS:
        assert found <= MAY_IMPORT[own]
    else:
        assert found <= MAY_IMPORT.get(own, PROGRAMS_MAY) | {"vca_engine"}


def test_no_circle_between_files():
    names = {module_of(file): file for file in FILES}
    arrows = {}
    for name, file in names.items():
        arrows[name] = set()
        for found in modules(file):
            while found and found not in names:
                found = found.rpartition(".")[0]
            arrows[name] |= {found} - {"", name, name.split(".")[0]}
    left = dict(arrows)
    while leaves := [name for name, to in left.items() if not to & left.keys()]:
        for name in leaves:
            del left[name]
    assert left == {}


def test_the_network_imports_torch_only():
    found = {name for file in (ROOT / "vca").glob("*.py") for name in imports(file)}
    assert found - set(sys.stdlib_module_names) == {"torch", "vca"}


def test_the_evaluator_imports_of_the_engine_its_images_and_the_small_files_only():
    found = {name for file in (ROOT / "fid").rglob("*.py") for name in modules(file) if name.startswith("vca_engine")}
    assert {room_of(name) for name in found} == {"vca_engine.images", "vca_engine"}


def test_the_reader_of_images_imports_numpy_torch_and_pillow_only():
    files = [ROOT / "vca_engine" / "images" / name for name in ("__init__.py", "arrays.py", "files.py", "pixels.py")]
    found = {name for file in files for name in modules(file)}
    assert {name.split(".")[0] for name in found} - set(sys.stdlib_module_names) == {
        "numpy",
        "torch",
        "PIL",
        "vca_engine",
    }
    assert all(f"{name}.".startswith("vca_engine.images.") for name in found if name.startswith("vca_engine"))


def test_every_file_is_looked_at():
    there = {f.relative_to(ROOT).parts[0] for f in ROOT.glob("*/__init__.py")} | {f.stem for f in ROOT.glob("*.py")}
    assert there == OURS
    assert len(FILES) > 25


def test_the_wheel_holds_every_package_but_the_demo_and_the_benchmarks():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {f.parent for f in FILES if f.name == "__init__.py"}
    found = {".".join(f.relative_to(ROOT).parts) for f in folders} - {"demo", "benchmarks"}
    assert {*listed} == found | {"vca_engine.configs"}  # which is the folder configs, with no module in it


def test_container_and_workflow_call_targets_that_the_makefile_has():
    """Neither can be run here: a container needs a daemon, and the workflow GitHub."""
    targets = {*re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)}
    container = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    built, started = re.findall(r"^RUN make (\w+)$|^CMD \[\"make\", \"(\w+)\"\]$", container, re.MULTILINE)
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
    commands = [step["run"].split() for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert {words[0] for words in commands} == {"make"}
    assert {words[1] for words in commands} == {"lint", "docs", "test"}
    assert {"lint", "docs", "test", built[0], started[1]} <= targets


@pytest.mark.parametrize("uv", ["", "/bin/uv"])
def test_make_installs_by_uv_where_it_is_there(uv, tmp_path):
    if shutil.which("make") is None:
        pytest.skip("needs make")
    command = ["make", "--dry-run", "install", f"UV={uv}", f"VENV={tmp_path}", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    by_uv = f"/bin/uv pip install --python {tmp_path}/bin/python --editable '.[dev]'"
    by_pip = f"{tmp_path}/bin/python -m pip install --progress-bar on --editable '.[dev]'"
    assert (by_uv in done.stdout, by_pip in done.stdout) == (bool(uv), not uv)


WALKS = (
    (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Two walks")[2].partition("\n## ")[0]
)
STEPS = re.findall(r"`([\w/]+\.py)`((?:, `[\w.]+`)+)", WALKS)


@pytest.mark.parametrize(("file", "names"), STEPS)
def test_the_walks_of_the_architecture_lead_past_functions_that_are_there(file, names):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    there = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for name in re.findall(r"`([\w.]+)`", names):
        owner, _, method = name.partition(".")
        assert owner in there, f"{file} has no {owner}"
        assert not method or method in {n.name for n in there[owner].body if isinstance(n, ast.FunctionDef)}


def test_there_are_two_walks():
    assert len(STEPS) > 15


@pytest.mark.parametrize("file", CONFIGS, ids=name_of)
def test_every_file_of_settings_says_what_it_is_and_has_a_folder_of_its_own(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert len(lines[0]) > 20
    config = parse(Config, ["--config", str(file)], prog="test", description="")
    assert config.run_dir == f"runs/{file.stem}" or config.run_dir == "runs/demo"


@pytest.mark.parametrize("path", [*(str(f) for f in CONFIGS), *ROWS])
def test_every_config_builds_its_model_process_and_sampler(path):
    config = parse(Config, ["--config", path], prog="test", description="", parts=assemble.parts())
    name = config.data["name"]
    size, channels, classes = {
        "digits": (8, 1, 10),
        "mnist": (32, 1, 10),
        "folder": (config.data.get("image_size", 256), 3, 1000),
    }[name]
    assert set(config.data) - {"name"} <= set(vca.options_of(datasets.DATASETS[name]))
    if config.codec["name"] == "pixels":
        codec = assemble.codec(config, channels)
    else:
        assert config.codec["path"]
        codec = SimpleNamespace(downsample=8 if name == "folder" else 4, channels=4)
    shape = DataInfo(size, channels, [str(k) for k in range(classes)])
    process = assemble.process(config)
    assemble.check_settings(config)
    if not assemble.is_generator(config):
        with torch.device("meta"):
            model = assemble.network(config, shape, codec)
            assert model(torch.empty(2, channels, size, size)).shape == (2, classes)
        return
    assemble.sampler(config, process)
    with torch.device("meta"):
        model = assemble.network(config, shape, codec)
        x = torch.empty(2, codec.channels, *model.input_size)
        y = torch.zeros(2, dtype=torch.long)
        t = torch.zeros(2)
        assert model(x, t, y).shape == (2, model.out_channels, *model.input_size)
    assert model.num_classes == classes
    learned_variance = isinstance(model, dit_vca.DiT)
    assert learned_variance == (config.process["name"] == "diffusion")
    assert model.out_channels == codec.channels * (1 + learned_variance)


def test_configs_have_names_of_their_own():
    names = [*map(str, CONFIGS), *ROWS]
    folders = [parse(Config, ["--config", name], prog="", description="").run_dir for name in names]
    assert len(set(folders)) == len(folders) > 70


REGISTRIES = {
    "ATTENTIONS": vca.ATTENTIONS,
    "PATHS": sit_vca.PATHS,
    "PREDICTIONS": sit_vca.PREDICTIONS,
    "WEIGHTS": sit_vca.WEIGHTS,
    "flow SAMPLERS": sit_vca.SAMPLERS,
    "diffusion SAMPLERS": dit_vca.SAMPLERS,
    "BETAS": dit_vca.BETAS,
    "DATASETS": datasets.DATASETS,
    "CODECS": codecs.CODECS,
    "EXTRACTORS": fid.EXTRACTORS,
    "METRICS": {name: metric.compute for name, metric in fid.METRICS.items()},
    "PROCESSES": assemble.parts()["process"],
}
ENTRIES = [(registry, name) for registry, entries in REGISTRIES.items() for name in entries]


@pytest.mark.parametrize(("registry", "name"), ENTRIES)
def test_every_entry_of_every_registry_says_what_it_is_and_what_it_takes(registry, name):
    entry = REGISTRIES[registry][name]
    text = vars(entry).get("__doc__") if isinstance(entry, type) else entry.__doc__  # its own, not an inherited one
    assert text
    if isinstance(entry, type):
        for option in vca.options_of(entry):
            assert f"\n        {option}: " in text, f"{name} does not describe its option {option}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_everything_public_has_a_docstring(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{file} has none"

    def undocumented(node, where):
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and child.name[0] != "_":
                if not ast.get_docstring(child):
                    yield f"{where}{child.name}"
                if isinstance(child, ast.ClassDef):
                    yield from undocumented(child, f"{child.name}.")

    assert list(undocumented(tree, "")) == []


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=name_of)
def test_every_file_for_accelerate_is_one_that_it_reads(file, monkeypatch):
    """And its first comment says the command; FSDP cuts at a class that exists."""
    lines = file.read_text(encoding="utf-8").splitlines()
    command = " ".join(line.lstrip("# ").rstrip("\\") for line in lines if line.startswith("#   "))
    assert command.startswith(f"accelerate launch --config_file configs/accelerate/{file.name} ")
    args = launch_command_parser().parse_args(command.replace("HOST0", "127.0.0.1").split()[2:])
    args, defaults, _ = _validate_launch_command(args)
    assert defaults is not None
    kinds = {"cpu": 1, "gpu1": 1, "gpu8": 8, "nodes2": 16, "fsdp8": 8}
    assert args.num_processes == kinds[file.stem]
    assert read_config(args.training_script_args[1])
    if file.stem == "fsdp8":
        environment = prepare_multi_gpu_env(args)
        assert environment["FSDP_VERSION"] == "2"
        for key, value in environment.items():
            if key.startswith(("FSDP", "ACCELERATE")):
                monkeypatch.setenv(key, value)
        plugin = FullyShardedDataParallelPlugin()
        plugin.set_auto_wrap_policy(vca.Transformer(input_size=4, hidden_size=8, depth=1, num_heads=1))
        assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {vca.transformer.Block}
