"""The paper's tables: each row is a config, found by its name, and has the numbers of the papers."""

import pytest

from vca_engine import assemble
from vca_engine.config.cli import parse
from vca_engine.config.paper import TABLES, find_row, read_config, read_tables
from vca_engine.config.schema import Config

GENERATOR = """
run_dir: runs/{name}
data: {{name: folder, images: data/imagenet/train, image_size: 256}}
codec: {{name: vae, path: stabilityai/sd-vae-ft-mse}}
process: {{name: {process}}}
model:
  size: {size}
  attention: {{name: {attention}}}
train:
  checkpoint_every: 5000
  keep_checkpoints: 3
  keep_every: 50000  # kept for ever
"""
RECOGNISER = """
run_dir: runs/{name}
data: {{name: folder, images: data/imagenet/train, image_size: 224}}
codec: {{name: pixels}}
process: {{name: classify}}
model:
  name: {model}
{drop_path}
  attention: {{name: {attention}}}
train:
  num_steps: {num_steps}
  batch_size: 1024
  lr: 1.0e-3
  weight_decay: 0.05
  warmup_lr: {warmup_lr}
  warmup_steps: {warmup_steps}
  schedule: cosine
  min_lr: {min_lr}
{more}
  ema_stds: []
  num_workers: 8
  checkpoint_every: 12_510
  keep_checkpoints: 2
eval:
  data: {{images: data/imagenet/val}}
  every: 12_510
"""
RECIPES = {
    "deit_tiny": ("", "375_300", "5.0e-7", "25_020", "5.0e-6", "  max_grad_norm: 5.0"),
    "pvt_tiny": ("  drop_path: 0.1", "387_810", "1.0e-6", "6_255", "1.0e-5", "  cooldown_steps: 12_510"),
    "swin_tiny": ("  drop_path: 0.2", "375_300", "5.0e-7", "25_020", "5.0e-6", "  max_grad_norm: 5.0"),
    "cswin_tiny": (
        *("  drop_path: 0.2", "387_810", "5.0e-7", "25_020", "1.0e-5"),
        "  cooldown_steps: 12_510\n  ema_decay: 0.99984",
    ),
}


def files_of_the_first_version():
    """Name -> text, without its comments, of the 20 files of configs/ that rows have taken the place of."""
    texts = {}
    for short, process in (("dit", "diffusion"), ("sit", "flow")):
        for size in ("S/2", "B/2", "XL/2"):
            for attention in ("mhsa", "vca"):
                name = f"{short}_{size.lower().replace('/', '')}_{attention}"
                texts[name] = GENERATOR.format(name=name, process=process, size=size, attention=attention)
    for model, recipe in RECIPES.items():
        options = dict(
            zip(("drop_path", "num_steps", "warmup_lr", "warmup_steps", "min_lr", "more"), recipe, strict=True)
        )
        for attention in ("own", "vca"):
            name = f"{model}_{attention}"
            texts[name] = RECOGNISER.format(name=name, model=model, attention=attention, **options)
    return texts


FILES = files_of_the_first_version()
ROWS = {name: row for table in read_tables().values() for name, row in table.items()}


def config_of(name, *settings):
    return parse(Config, ["--config", name, *settings], prog="test", description="", parts=assemble.parts())


def sentence(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        parse(Config, argv, prog="test", description="", parts=assemble.parts())
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", FILES)
def test_a_command_with_a_file_of_the_first_version_means_the_same_settings(name, tmp_path):
    assert len(FILES) == 20
    (tmp_path / "old.yaml").write_text(FILES[name])
    old = config_of(str(tmp_path / "old.yaml"))
    assert config_of(f"configs/{name}.yaml") == config_of(f"/some/clone/configs/{name}.yaml") == config_of(name) == old


@pytest.mark.parametrize("name", ROWS)
def test_a_row_has_settings_of_its_own_that_its_process_has_a_use_for(name):
    config = config_of(name)
    assert config.run_dir == f"runs/{name}"
    for each in (config, tiny := config_of(f"{name}-tiny")):
        assemble.check_settings(each)
        assert each.model.attention == config.model.attention
        assert each.process["name"] == config.process["name"]
        assert each.model.size == config.model.size
    assert tiny.run_dir == f"runs/tiny/{name}"
    assert tiny.data["name"] in ("digits", "mnist")
    assert tiny.train.num_steps < 100


def test_no_two_rows_are_the_same():
    assert len({str(config_of(name)).replace(name, "") for name in ROWS}) == len(ROWS) == 73


def test_the_tables_have_the_rows_of_the_paper():
    sizes = [f"{size}{patch}" for size in "sb" for patch in (8, 4, 2)]
    both = ("mhsa", "vca")
    grid = {(p, size, name) for p in ("dit", "sit") for size in sizes for name in both}
    tables = read_tables()
    assert {tuple(name.split("_")) for name in tables["fid"]} == grid
    large = {(p, size, name) for p in ("dit", "sit") for size in ("l2", "xl2") for name in both}
    assert {tuple(name.split("_")) for name in tables["fid-large"]} == large
    at_512 = {(p, size, name, "512") for p in ("dit", "sit") for size in ("s2", "b2", "l2", "xl2") for name in both}
    assert {tuple(name.split("_")) for name in tables["fid-512"]} == at_512
    models = ("deit_tiny", "deit_small", "pvt_tiny", "swin_tiny", "cswin_tiny")
    assert {*tables["recognition"]} == {f"{m}_{a}" for m in models for a in ("own", "agent", "vca")}
    for table, variants in (("stages", "stage1 stage2 differential vca"), ("streams", "pool embed vca")):
        assert {*tables[f"ablation-{table}"]} == {f"{m}_{v}" for m in ("dit_s2", "deit_tiny") for v in variants.split()}


def test_the_ablations_differ_from_vca_in_their_attention_only():
    assert config_of("dit_s2_stage1").model.attention == {"name": "vca", "stages": ["differential", "plain"]}
    assert config_of("dit_s2_stage2").model.attention == {"name": "vca", "stages": ["plain", "differential"]}
    assert config_of("deit_tiny_embed").model.attention == {"name": "vca", "positive": "embed", "negative": "embed"}
    back = ["--model.attention", "vca", "--run_dir", "runs/x"]
    for model in ("dit_s2", "deit_tiny"):
        for variant in ("stage1", "stage2", "differential", "pool", "embed"):
            assert config_of(f"{model}_{variant}", "--model.attention", "{name: vca}", *back[2:]) == config_of(
                f"{model}_vca", *back[2:]
            )


def test_what_comes_after_a_row_overrides_it(tmp_path):
    (tmp_path / "more.yaml").write_text("data.images: /data\ntrain: {accumulate: 4}\n")
    config = config_of("sit_b2_vca_512", "--config", str(tmp_path / "more.yaml"), "--train.lr", "1e-3")
    assert config.data == {"name": "folder", "images": "/data", "image_size": 512}
    assert (config.train.accumulate, config.train.lr, config.train.keep_checkpoints) == (4, 1e-3, 3)
    assert config_of("sit_b2_vca").train.lr == 1e-4  # and the row stays as it was


def test_a_row_is_printed_with_what_is_known_of_it_and_can_be_read_back(tmp_path, capsys):
    for name, known in {"dit_s2_mhsa": "67.2, and 68.4 in the paper of the model", "dit_b4_vca": "not known"}.items():
        with pytest.raises(SystemExit) as stop:
            config_of(name, "--print_config")
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert "# DiT, " in text
        assert f"#   accelerate launch train.py --config {name} --data.images DIR" in text
        assert "Not yet run by us" in text
        assert known in text
        (tmp_path / "printed.yaml").write_text(text)
        assert config_of(str(tmp_path / "printed.yaml")) == config_of(name)


def test_a_file_of_the_name_of_a_row_is_a_file_and_a_folder_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "dit_s2_vca.yaml").write_text(FILES["sit_b2_vca"])
    (tmp_path / "dit_s2_vca").mkdir()
    assert config_of("configs/dit_s2_vca.yaml") == config_of("sit_b2_vca")
    assert config_of("dit_s2_vca").model.size == "S/2"


def test_an_unknown_name_is_told_with_the_nearest(capsys, tmp_path):
    text = sentence(capsys, "--config", "sit_b2_vcaa")
    assert "'sit_b2_vcaa', which is neither a file nor a row of configs/paper.yaml; did you mean 'sit_b2_vca'?" in text
    assert "did you mean 'deit_tiny_own'?" in sentence(capsys, "--config", "configs/deit_tiny_owm.yaml")
    assert "name one of its rows" in sentence(capsys, "--config", str(TABLES))
    missing = sentence(capsys, "--config", str(tmp_path / "dit_s2_vca.yaml"))
    assert "No such file" in missing
    assert "did you mean" not in missing
    for odd in ("a" * 300, "\udcff", "x\0y"):
        assert "test: " in sentence(capsys, "--config", odd)
    with pytest.raises(ValueError, match="is not a row of configs/paper.yaml; did you mean 'dit_s2_vca'"):
        find_row("dit_s2_vc")


def test_a_config_is_found_by_its_name_alone_and_the_nearest_is_named():
    assert read_config("folder32_sit") == read_config(str(TABLES.with_name("folder32_sit.yaml")))
    with pytest.raises(ValueError, match=r"directory; the nearest there is '.*configs/folder32_sit.yaml'\.$"):
        read_config(str(TABLES.with_name("folder33_sit.yaml")))
