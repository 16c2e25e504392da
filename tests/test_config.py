"""A run as data: what the files and the command line say is what the program gets, or a sentence says what is wrong."""

import dataclasses
import fractions
import re
from dataclasses import fields, is_dataclass

import pytest
import yaml

import cache_latents
import sample
import train
from demo import classifier, score
from runtime.config import (
    CacheConfig,
    Config,
    FidConfig,
    ModelConfig,
    SampleConfig,
    TrainConfig,
    differences,
    from_dict,
    keys,
    parse,
    report_errors,
    save_yaml,
    to_dict,
)

REQUIRED = {
    "run_dir": "runs/x",
    "process": {"name": "flow", "path": "linear"},
    "data": {"name": "digits"},
    "codec": {"name": "pixels"},
}


def read(*argv, cls=Config):
    return parse(cls, [str(a) for a in argv], prog="train.py", description="")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**REQUIRED, "train": {"num_steps": 7, "lr": 0.5}}))
    return path


def sentence(capsys, *argv, cls=Config):
    """What the program says of a mistake, after it ended with exit code 2 and without a traceback."""
    with pytest.raises(SystemExit) as stop:
        read(*argv, cls=cls)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("train.py: ")
    assert text.count("\n") == 1
    assert "Traceback" not in text
    return text


def test_the_file_overrides_the_defaults_and_the_command_line_overrides_the_file(file):
    config = read("--config", file, "--train.num_steps", 9, "--process.path", "gvp", "--sample.sampler.name", "sde")
    assert config.train.num_steps == 9
    assert config.train.lr == 0.5
    assert config.train.batch_size == TrainConfig.batch_size
    assert config.process == {"name": "flow", "path": "gvp"}
    assert config.sample.sampler == {"name": "sde"}
    assert config.model == ModelConfig()


def test_a_later_file_overrides_an_earlier_one(file, tmp_path):
    (tmp_path / "more.yaml").write_text("train: {lr: 0.25}\n")
    config = read("--config", file, "--config", tmp_path / "more.yaml")
    assert (config.train.num_steps, config.train.lr) == (7, 0.25)


@pytest.mark.parametrize("text", ["2e-4", "2.0e-4", "0.0002"])
def test_a_number_with_an_exponent_is_a_number_in_a_file_and_on_the_command_line(file, text):
    file.write_text(file.read_text().replace("lr: 0.5", f"lr: {text}"))
    assert read("--config", file).train.lr == 2e-4
    assert read("--config", file, "--train.lr", text).train.lr == 2e-4


def test_a_number_with_an_exponent_is_a_number_among_the_options_of_a_part(file):
    config = read("--config", file, "--sample.sampler.name", "ode", "--sample.sampler.rtol", "1e-4")
    assert config.sample.sampler["rtol"] == 1e-4


def test_options_of_parts_keep_their_types(file):
    contrast = ["--model.attention.name", "vca", "--model.attention.contrast_grid", "[2, 3]"]
    config = read("--config", file, *contrast, "--model.attention.dwc", "false", "--train.betas", "[0.8, 0.9]")
    assert config.model.attention == {"name": "vca", "contrast_grid": [2, 3], "dwc": False}
    assert config.train.betas == (0.8, 0.9)


def test_configs_cannot_be_changed(file):
    with pytest.raises(dataclasses.FrozenInstanceError):
        read("--config", file).train.lr = 1.0


@pytest.mark.parametrize(
    "main, cls",
    [(train.main, Config), (cache_latents.main, Config), (sample.main, sample.Arguments)]
    + [(classifier.main, classifier.Arguments), (score.main, score.Arguments)],
    ids=["train", "cache_latents", "sample", "classifier", "score"],
)
def test_help_describes_every_setting(main, cls, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for key, description in leaves(cls):
        assert f"--{key} " in text, f"{key} is missing"
        assert len(description) > 10, f"{key} is not described"
        # jsonargparse puts the type and the default after the description
        assert " ".join(description.rstrip(".").split()) in text, f"{key} is not described by {description!r}"


def leaves(cls, prefix=""):
    """Dotted key and its description in the class's docstring, read here by another rule than the parser's."""
    described = re.findall(r"^ {8}(\w+): ((?:.|\n {12})*)", cls.__doc__, re.MULTILINE)
    described = {name: " ".join(text.split()) for name, text in described}
    for f in fields(cls):
        assert f.name in described, f"{cls.__name__}.{f.name} has no line under Args"
        if is_dataclass(f.type):
            yield from leaves(f.type, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, described[f.name]


def test_the_printed_config_read_back_is_the_same_config(file, tmp_path, capsys):
    settings = ["--train.lr", "3e-5", "--train.betas", "[0.8, 0.9]", "--sample.classes", "[1, 2]", "--seed", "3"]
    settings += ["--model.attention", "{name: vca, contrast_grid: [2, 2]}", "--train.max_grad_norm", "1"]
    with pytest.raises(SystemExit) as stop:
        read("--config", file, *settings, "--print_config")
    assert stop.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert read("--config", tmp_path / "printed.yaml") == read("--config", file, *settings)


def test_dicts_and_yaml_files_round_trip(file, tmp_path):
    config = read("--config", file, "--train.betas", "[0.5, 0.6]", "--sample.sampler", "{name: ode, num_steps: 4}")
    assert from_dict(Config, to_dict(config), "here") == config
    save_yaml(config, tmp_path / "saved.yaml")
    assert yaml.safe_load((tmp_path / "saved.yaml").read_text()) == to_dict(config)
    assert read("--config", tmp_path / "saved.yaml") == config


def test_a_dict_with_an_unknown_key_says_where_it_stands(file):
    values = to_dict(read("--config", file))
    values["train"]["lrr"] = 1
    with pytest.raises(ValueError, match=r"^checkpoint\.json: 'train\.lrr' is not a setting; did you mean 'train\.lr'"):
        from_dict(Config, values, "checkpoint.json")


def test_keys_are_dotted():
    found = list(keys(Config))
    assert {"run_dir", "train", "train.lr", "model.attention", "sample.per_class"} <= set(found)
    assert len(found) == sum(
        len(fields(cls)) for cls in (Config, CacheConfig, ModelConfig, TrainConfig, SampleConfig, FidConfig)
    )


def test_differences_are_the_dotted_keys_whose_values_differ():
    old = {"a": 1, "b": {"c": 2, "d": [1, 2], "gone": 1}, "e": {"name": "x"}, "same": {"z": 0}}
    new = {"a": 1, "b": {"c": 3, "d": [1, 2], "come": 4}, "e": None, "same": {"z": 0}}
    assert differences(old, new) == {
        "b.c": (2, 3),
        "b.come": (None, 4),
        "b.gone": (1, None),
        "e": ({"name": "x"}, None),
    }
    assert differences(old, old) == {}


UNKNOWN = [
    ("train.lrr", "train.lr"),
    ("train.num_step", "train.num_steps"),
    ("run_dirr", "run_dir"),
    ("model.head", "model.depth"),
    ("modle", "model"),
]


@pytest.mark.parametrize("key, nearest", UNKNOWN[:3])
def test_an_unknown_key_on_the_command_line_names_the_nearest(file, capsys, key, nearest):
    text = sentence(capsys, "--config", file, f"--{key}", "3")
    assert repr(key) in text
    assert f"did you mean {nearest!r}?" in text


@pytest.mark.parametrize("key, nearest", [*UNKNOWN[:3], UNKNOWN[4]])
def test_an_unknown_key_in_a_file_names_the_nearest(file, capsys, key, nearest):
    values = yaml.safe_load(file.read_text())
    part = values
    *groups, last = key.split(".")
    for group in groups:
        part = part.setdefault(group, {})
    part[last] = 3
    file.write_text(yaml.safe_dump(values))
    text = sentence(capsys, "--config", file)
    assert repr(key) in text
    assert f"did you mean {nearest!r}?" in text


def test_an_abbreviated_option_is_not_accepted(file, capsys):
    assert "'train.num_step' is not a setting" in sentence(capsys, "--config", file, "--train.num_step", "3")
    assert "'see' is not a setting" in sentence(capsys, "--config", file, "--see", "3")


@pytest.mark.parametrize(
    "key, value, kind",
    [
        ("train.lr", "abc", "float"),
        ("train.num_steps", "2.5", "int"),
        ("train.num_steps", "true", "int"),
        ("train.ema_warmup", "maybe", "bool"),
        ("process", "3", "write process.name"),
        ("data", "5", "write data.name"),
        ("model.depth", "two", "int"),
    ],
)
def test_a_wrong_type_names_the_key_the_value_and_the_type(file, capsys, key, value, kind):
    text = sentence(capsys, "--config", file, f"--{key}", value)
    assert re.match(rf"train\.py: {re.escape(key)} is '?{value}'?; ", text, re.IGNORECASE)
    assert kind in text
    values = yaml.safe_load(file.read_text())
    part = values
    *groups, last = key.split(".")
    for group in groups:
        part = part.setdefault(group, {})
    part[last] = yaml.safe_load(value)
    file.write_text(yaml.safe_dump(values))
    text = sentence(capsys, "--config", file)
    assert key in text
    assert kind in text


def test_a_name_may_stand_for_itself_with_options_after_it(file):
    for words in (["--sample.sampler", "sde"], ["--sample.sampler=sde"], ["--sample.sampler.name", "sde"]):
        config = read("--config", file, *words, "--sample.sampler.num_steps", "3", "--model.attention", "mhsa")
        assert config.sample.sampler == {"name": "sde", "num_steps": 3}
        assert config.model.attention == {"name": "mhsa"}
    args = parse(sample.Arguments, ["run", "--sampler", "sde"], prog="", description="", first="checkpoint")
    assert (args.checkpoint, args.sampler) == ("run", {"name": "sde"})


def test_no_words_at_all_say_what_is_needed(capsys):
    assert "arguments are required" in sentence(capsys)
    assert "write --sampler.num_steps" in sentence(capsys, "--checkpoint", "x", "--steps", "10", cls=sample.Arguments)


def test_a_wrong_choice_names_the_nearest_and_all(file, capsys):
    text = sentence(capsys, "--config", file, "--train.schedule", "cosin")
    assert "train.schedule is 'cosin'; did you mean 'cosine'? choose one of ['constant', 'cosine']." in text
    text = sentence(capsys, "--checkpoint", "x", "--labels", "balance", cls=sample.Arguments)
    assert "labels is 'balance'; did you mean 'balanced'? choose one of ['random', 'balanced']." in text


def test_a_missing_setting_is_named(capsys):
    text = sentence(capsys, "--run_dir", "runs/x")
    assert "required: process, data, codec" in text


def test_a_missing_file_is_named(capsys):
    text = sentence(capsys, "--config", "configs/there_is_none.yaml")
    assert "configs/there_is_none.yaml" in text


@pytest.mark.parametrize("content", ["train: {lr: 1", "a: b: c", "- 1\n- 2\n", "\tx: 1"])
def test_a_broken_file_is_named(tmp_path, capsys, content):
    (tmp_path / "broken.yaml").write_text(content)
    assert "broken.yaml" in sentence(capsys, "--config", tmp_path / "broken.yaml")


@pytest.mark.parametrize(
    "key, value",
    [
        ("model.depth", 0),
        ("model.hidden_size", -4),
        ("model.mlp_ratio", -1),
        ("model.class_dropout_prob", 1.0),
        ("model.class_dropout_prob", -0.1),
        ("train.num_steps", 0),
        ("train.batch_size", 0),
        ("train.accumulate", 0),
        ("train.lr", 0),
        ("train.betas", "[2, 3]"),
        ("train.weight_decay", -1),
        ("train.warmup_steps", -1),
        ("train.max_grad_norm", 0),
        ("train.ema_decay", 1),
        ("train.num_workers", -1),
        ("train.log_every", 0),
        ("train.sample_every", 0),
        ("train.checkpoint_every", 0),
        ("train.keep_checkpoints", 0),
        ("sample.per_class", 0),
        ("sample.guided_channels", 0),
        ("sample.seed", -1),
        ("seed", -1),
    ],
)
def test_a_number_out_of_range_is_named_with_what_is_allowed(file, capsys, key, value):
    text = sentence(capsys, "--config", file, f"--{key}", value)
    assert re.match(rf"train\.py: {re.escape(key)} is .+; choose .+\.$", text.strip())


def test_only_mistakes_of_the_user_become_sentences(capsys):
    @report_errors("program")
    def of_the_user(argv):
        raise ValueError("x is 3; choose 4.")

    @report_errors("program")
    def of_the_program(argv):
        raise KeyError("x")

    @report_errors("program")
    def of_a_library(argv):
        fractions.Fraction("x")  # a ValueError of the standard library

    with pytest.raises(SystemExit) as stop:
        of_the_user([])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "program: x is 3; choose 4.\n"
    with pytest.raises(KeyError):
        of_the_program([])
    with pytest.raises(ValueError, match="Invalid literal"):
        of_a_library([])
