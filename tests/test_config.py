"""A run as data: what the files and the command line say is what the program gets, or a sentence says what is wrong."""

import contextlib
import dataclasses
import fractions
import json
import os
import re
from dataclasses import fields, is_dataclass
from typing import get_args, get_origin

import pytest
import yaml
from ruamel.yaml import YAML

import app
import cache_latents
import dit_vca
import sample
import train
from demo import classifier, score
from dit_vca import Diffusion
from sit_vca import Transport
from vca import annotations_of, create, defaults_of
from vca import members_of as members
from vca_engine import assemble
from vca_engine.config.cli import parse, report_errors
from vca_engine.config.reading import Word, as_type, bounds_of, from_dict, is_path
from vca_engine.config.reading import leaves as settings
from vca_engine.config.schema import (
    CacheConfig,
    Config,
    EvalConfig,
    FidConfig,
    ModelConfig,
    SampleConfig,
    TrainConfig,
    save_yaml,
    to_dict,
)
from vca_engine.config.yamlfile import Plain, parse_yaml, write_yaml
from vca_engine.images import datasets
from vca_engine.records import differences

REQUIRED = {
    "run_dir": "runs/x",
    "process": {"name": "flow", "path": "linear"},
    "data": {"name": "digits"},
    "codec": {"name": "pixels"},
}


def read(*argv, cls=Config):
    return parse(cls, [str(a) for a in argv], prog="train.py", description="", parts=assemble.parts())


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
    [(train.main, Config), (cache_latents.main, Config), (sample.main, sample.SampleArguments)]
    + [(classifier.main, classifier.ClassifierArguments), (score.main, score.ScoreArguments)],
    ids=["train", "cache_latents", "sample", "classifier", "score"],
)
def test_help_describes_every_setting(main, cls, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main(["--help", "all"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("`", "").split())
    for key, description in leaves(cls):
        assert f"--{key} " in text, f"{key} is missing"
        assert len(description) > 10, f"{key} is not described"
        # the type and the default come after the description
        assert " ".join(description.rstrip(".").replace("`", "").split()) in text, (
            f"{key} is not described by {description!r}"
        )


def test_the_first_screen_of_train_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 50
    assert max(map(len, text.splitlines())) <= 100
    assert "--help [all]" in text
    assert "python train.py --config" in text  # an example
    assert re.search(r"--train.lr X +Learning rate of AdamW \(0.0001\)\n", text)
    assert re.search(r"--data.images PATH +The folder", text)


def test_help_lists_what_a_program_uses_of_a_config_and_all_of_it_where_asked(capsys):
    used, not_used = ["data.flip", "codec.path", "cache.shard_size"], ["train.lr", "model.size", "sample.seed"]
    for words in ["--help"], ["--help", "all"]:
        with pytest.raises(SystemExit):
            cache_latents.main(words)
        text = capsys.readouterr().out
        assert [name for name in used if f"\n  --{name}" not in text] == []
        assert [name for name in not_used if f"\n  --{name}" in text] == (not_used if "all" in words else [])


@pytest.mark.parametrize("program", ["train", "sample"])
def test_help_says_what_each_option_of_each_part_means(program, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        {"train": train, "sample": sample}[program].main(["--help", "all"])
    text = capsys.readouterr().out
    for part, key in {"data": "data", "sampler": "sample.sampler" if program == "train" else "sampler"}.items():
        for name, entry in assemble.parts()[part].items():
            section = re.split(r"\n+\w", text.partition(f"\n{key}.name {name}:\n")[2])[0]
            section = f"{section.rstrip()}\n  --end"
            for option, default in defaults_of(entry).items():
                known = "not given" if default is None else str(default).lower()
                line = re.search(rf"\n  --{key}\.{option} [^ ]+\s+(\w.+?)\n  --", section, re.DOTALL)
                assert line, f"{key}.name {name}: {option}"
                assert line[1].endswith(f"default {known})")
    assert ("\nprocess.name classify:\n" in text) == (program == "train")  # sample.py draws
    assert "\ndata.name digits:\n  scikit-learn's 1,797 handwritten digits of 8x8 pixels" in text


def test_an_option_that_somebody_enters_is_in_the_help(capsys, monkeypatch):
    class Mine(datasets.Digits):
        """My own digits.

        Args:
            tilt: Degrees that they are turned by.
        """

        def __init__(self, *, tilt: float = 5.0) -> None:
            super().__init__()

    monkeypatch.setitem(datasets.DATASETS, "mine", Mine)
    with pytest.raises(SystemExit):
        train.main(["--help", "all"])
    text = " ".join(capsys.readouterr().out.split())
    assert "data.name mine: My own digits. --data.tilt TILT Degrees that they are turned by." in text


def leaves(cls, prefix=""):
    """Dotted key and its description in the class's docstring, read here by another rule than the parser's."""
    texts = "\n".join(c.__doc__ for c in reversed(cls.__mro__) if is_dataclass(c))  # of those that it extends, too
    described = re.findall(r"^ {8}(\w+): ((?:.|\n {12})*)", texts, re.MULTILINE)
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
    found = [key for key, _ in settings(Config)]
    assert {"run_dir", "train", "train.lr", "model.attention", "sample.per_class"} <= set(found)
    assert len(found) == sum(
        len(fields(cls)) for cls in (Config, CacheConfig, ModelConfig, TrainConfig, SampleConfig, FidConfig, EvalConfig)
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
    assert f"did you mean --{nearest}?" in text


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


TYPED = [
    ("lr", "--train.lr", None),
    ("learning_rate", "--train.lr", None),
    ("learning-rate", "--train.lr", None),
    ("train.learning_rate", "--train.lr", None),
    ("batch", "--train.batch_size or --cache.batch_size", "--batch_size"),
    ("batch_size", "--train.batch_size or --cache.batch_size", None),
    ("batch_sze", "--train.batch_size or --cache.batch_size", "--batch_size"),
    ("precison", "--train.precision or --cache.precision", "--precision"),
    ("steps", "--train.num_steps", "--sampler.num_steps"),
    ("num_steps", "--train.num_steps", "--sampler.num_steps"),
    ("cfg", "--sample.cfg_scale", "--cfg_scale"),
    ("guidance_scale", "--sample.cfg_scale", "--cfg_scale"),
    ("output", "--run_dir", "--out"),
    ("image_size", "--data.image_size", None),
    ("images", "--data.images", "--data.images"),
    ("train.seed", "--seed or --sample.seed", "--seed"),
]


@pytest.mark.parametrize("word, in_training, in_drawing", TYPED)
def test_a_word_that_people_type_is_answered_with_the_setting(file, capsys, word, in_training, in_drawing):
    """By all that it may stand for, as these are typed, and nothing is taken for granted."""
    for cls, needed, meant in (
        (train.TrainArguments, ("--config", file), in_training),
        (sample.SampleArguments, ("--checkpoint", "x"), in_drawing),
    ):
        if meant:
            text = sentence(capsys, *needed, f"--{word}", "3", cls=cls)
            assert f" is not a setting; did you mean {meant}? see --help all." in text


def test_epochs_are_answered_with_the_number_of_steps_that_they_are(file, capsys):
    text = sentence(capsys, "--config", file, "--epochs", "90")
    assert "E epochs of M images are E * M / train.batch_size steps. Give --train.num_steps." in text
    assert "'train.epochs' is not a setting; training counts steps" in sentence(capsys, "--train.epochs", "90")
    assert "counts steps" not in sentence(capsys, "x", "--epochs", "90", cls=sample.SampleArguments)


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
    args = parse(sample.SampleArguments, ["run", "--sampler", "sde"], prog="", description="", first="checkpoint")
    assert (args.checkpoint, args.sampler) == ("run", {"name": "sde"})


def test_no_words_at_all_say_what_is_needed(capsys):
    assert "arguments are required" in sentence(capsys)


def test_a_wrong_choice_names_the_nearest_and_all(file, capsys):
    text = sentence(capsys, "--config", file, "--train.schedule", "cosin")
    assert "train.schedule is 'cosin'; did you mean 'cosine'? choose one of ['constant', 'cosine']." in text
    text = sentence(capsys, "--checkpoint", "x", "--labels", "balance", cls=sample.SampleArguments)
    assert "labels is 'balance'; did you mean 'balanced'? choose one of ['random', 'balanced']." in text


def test_a_missing_setting_is_named(capsys):
    text = sentence(capsys, "--run_dir", "runs/x")
    assert "required: process, data, codec" in text
    assert "type --config FILE" in text
    text = sentence(capsys, cls=sample.SampleArguments)
    assert "required: checkpoint. Type the folder of a run, e.g. runs/demo" in text


def test_a_word_without_the_name_of_its_setting_is_named(file, capsys):
    text = sentence(capsys, "configs/mine.yaml")
    assert "'configs/mine.yaml' stands without the name of a setting; write --config configs/mine.yaml" in text
    text = sentence(capsys, "--config", file, "--data", "{name:", "folder}")
    assert "--data is '{name:', which cannot be read" in text
    assert "in quotes: --data '{KEY: VALUE, ...}'" in text


@pytest.mark.parametrize(
    "words, meant",
    [
        (
            "--sample.classes cat dog bird --seed 3",
            "'dog' stands.* if it is of --sample.classes, write .*[cat,dog,bird].",
        ),
        ("--sample.classes=cat dog", "--sample.classes [cat,dog]."),
        ("--train.betas [0.8, 0.9]", "--train.betas [0.8,0.9]."),
        ("--seed 3 x", "'x' stands without the name of a setting; write --OPTION x."),
    ],
)
def test_one_more_word_of_a_list_is_answered_with_the_brackets(file, capsys, words, meant):
    assert re.search(re.escape(meant).replace(r"\.\*", ".*"), sentence(capsys, "--config", file, *words.split()))


def test_a_folder_as_the_name_of_data_is_answered_with_the_option_for_it(file, capsys, tmp_path, monkeypatch):
    (tmp_path / "pets").mkdir()
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    said = "data.name is 'pets', which is a folder; name images by --data.images pets."
    assert said in sentence(capsys, "--config", file, "--data", "pets")
    said = "eval.data.name is './run.yaml', which is a file; name images by --eval.data.images ./run.yaml."
    assert said in sentence(capsys, "--config", file, "--eval.data", "./run.yaml")
    assert read("--config", file, "--data", "digits").data == {"name": "digits"}


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


# What no number can be, and what no text should be; the last three take a setting back, or are text where text is meant.
NONSENSE = ("nan", "inf", "-inf", "1e400", "1e38", "-1e38", "-1", str(10**30), "9" * 5000, '""', "''", "null", "~")


def numbers(value):
    """The numbers in a value, which may be a list of them."""
    values = value if isinstance(value, list | tuple) else [value]
    return [each for each in values if isinstance(each, int | float) and not isinstance(each, bool)]


@pytest.mark.parametrize("cls", [Config, sample.SampleArguments, app.AppArguments], ids=lambda cls: cls.__name__)
def test_every_number_has_a_range_that_is_stated_and_kept(cls, tmp_path, capsys, monkeypatch):
    """Whatever is given, in a file or typed: a value in the range of the setting's type, or one sentence."""
    path, checked = tmp_path / "x.yaml", 0
    for key, kind in settings(cls):
        if is_dataclass(kind):
            continue
        bounds, is_number = bounds_of(kind), bool({int, float} & {*members(kind), *map(first, members(kind))})
        assert bool(bounds) == is_number, f"{key} has no range"
        many = {list, tuple} & {*map(get_origin, members(kind))}
        for word in NONSENSE:
            typed = (word, f"[{word},{word}]") if many else (word,)
            path.write_text("".join(f"{'  ' * k}{name}:\n" for k, name in enumerate(key.split(".")[:-1])))
            with path.open("a") as file:
                file.write(f"{'  ' * key.count('.')}{key.rpartition('.')[2]}: {typed[-1]}\n")
            for argv in (["--config", path], *([f"--{key}={each}"] for each in typed)):
                try:
                    found = at(given(cls, *ALSO.get(key, ()), *argv), key)
                except SystemExit as stop:
                    text = capsys.readouterr().err
                    assert stop.code == 2
                    assert text.startswith("train.py: ")
                    assert text.count("\n") == 1
                    checked += 1
                    continue
                assert found != "", (key, argv)
                for number in numbers(found):
                    assert within(number, bounds), (key, argv, bounds)
    assert checked > 100 or cls is app.AppArguments


def first(kind):
    """The type of the items of a list or pair, without its range."""
    return members(get_args(kind)[0])[0] if get_origin(kind) in (list, tuple) else None


def within(number, bounds):
    """Whether a number is in a range as the messages and --help write it."""
    holds = {"at least": number.__ge__, "above": number.__gt__, "at most": number.__le__, "below": number.__lt__}
    parts = [re.fullmatch(r"(at least|above|at most|below) (\S+)", part).groups() for part in bounds.split(", ")]
    return len(parts) == 2 and all(holds[name](type(number)(end.replace(",", ""))) for name, end in parts)


@pytest.mark.parametrize("make", [lambda v: TrainConfig(lr=v), lambda v: SampleConfig(cfg_scale=v)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e38, 10**30])
def test_a_number_out_of_range_is_refused_whoever_makes_the_object(make, value):
    with pytest.raises(
        ValueError, match=r"^(lr|cfg_scale) is .*; (choose (above|at least)|it must be a finite number)"
    ):
        make(value)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("sample.sampler.rtol", "nan", "sample.sampler.rtol is nan; choose at least -1,000,000, at most 1,000,000."),
        ("sample.sampler.rtol", "1e400", "sample.sampler.rtol is inf; "),
        ("sample.sampler.num_steps", 10**30, f"sample.sampler.num_steps is {10**30}; "),
        ("process.path.beta_max", "1e38", "process.path.beta_max is 1e+38; "),
        ("model.attention.contrast_grid", f"[{10**9},2]", f"model.attention.contrast_grid is [{10**9}, 2]; "),
        ("process.path", "''", "process.path is ''"),
        ("data.images", "", "data.images is "),
    ],
)
def test_an_option_of_a_part_is_finite_and_no_option_is_huge(file, capsys, option, value, said):
    if said.endswith("''"):
        value, said = "", "process.path is empty, as of a variable that is not set"
    if option == "data.images":
        file.write_text(file.read_text() + "data.images: ''\n")
        assert "data.images is empty, as of a variable" in sentence(capsys, "--config", file)
    else:
        assert said in sentence(capsys, "--config", file, f"--{option}={value}")


@pytest.mark.parametrize("key", ["run_dir", "init", "latents", "fid.weights", "train.precision", "sample.classes"])
def test_a_text_that_is_empty_in_a_file_is_a_variable_that_was_not_set(file, capsys, key):
    last = key.rpartition(".")[2]
    text = f"{last}: ''\n" if "." not in key else f"{key.partition('.')[0]}: {{{last}: ''}}\n"
    file.write_text("".join(yaml.safe_dump({k: v}) for k, v in REQUIRED.items() if k != key) + text)
    assert re.search(rf"{key}(\.0)? is empty, as of a variable that is not set", sentence(capsys, "--config", file))


def test_the_home_folder_may_be_written_as_a_tilde_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    paths = [(cls, key) for cls, key, kind in TEXTS if is_path(kind)]
    assert {"run_dir", "init", "latents", "resume", "checkpoint", "vae", "out", "guide", "fid.reference"} <= {
        key for _, key in paths
    }
    for cls, key in paths:
        assert at(given(cls, *ALSO.get(key, ()), f"--{key}=~/x/y"), key) == str(tmp_path / "home/x/y")
    for part, option in (("data", "images"), ("codec", "path")):
        name = "folder" if part == "data" else "vae"
        found = given(Config, f"--{part}={{name: {name}, {option}: ~/x}}")
        assert getattr(found, part)[option] == str(tmp_path / "home/x")
    (tmp_path / "~").mkdir()  # of an earlier version, which took it as it was written
    assert given(Config, "--run_dir=~").run_dir == "~"
    assert given(Config, "--run_dir=~/x").run_dir == str(tmp_path / "home/x")


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


# What a person types where text is meant stays text; YAML 1.1 made numbers, truth values, times, dates and nothing of these.
WORDS = [
    "010",
    "0x10",
    "no",
    "off",
    "null",
    "~",
    "1e3",
    "1_000",
    "12:30:45",
    "2020-01-01",
    "#x",
    "true",
    "-1",
    ".nan",
    "=",
]
PROGRAMS = (
    train.TrainArguments,
    sample.SampleArguments,
    app.AppArguments,
    classifier.ClassifierArguments,
    score.ScoreArguments,
)


TEXTS = [(cls, key, kind) for cls in PROGRAMS for key, kind in settings(cls) if {str, list[str]} & {*members(kind)}]
TEXTS = [text for text in TEXTS if text[1] != "sweep"]  # KEY=VALUES, of which the values are words of their settings
HOME = os.path.expanduser("~")


ALSO = {
    "guide_weights": ["--guide=x"],
    "fid": ["--num=2"],
    "fid_extractor": ["--fid=x", "--num=2"],
    "fid_preset": ["--fid=x", "--num=2"],
    "fid_weights": ["--fid=x", "--num=2"],
    "fid_metrics": ["--fid=x", "--num=2"],
}  # what some settings of sample.py want beside them


def given(cls, *argv):
    """The words with what the program cannot do without, which they may say, too."""
    needed = {f.name: "x" for f in fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    needed = {
        name: "digits" if name == "data" else "pixels" if name == "codec" else value for name, value in needed.items()
    }
    needed = {name: "flow" if name == "process" else value for name, value in needed.items()}
    return read(*(f"--{name}={value}" for name, value in needed.items()), *argv, cls=cls)


def at(config, key):
    for name in key.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    return config


def nested(key, value):
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


@pytest.mark.parametrize("word", WORDS)
def test_text_on_the_command_line_stays_text(word):
    for cls, key, kind in TEXTS:
        many = str not in members(kind)
        for typed in (f"[{word}]", f"[x, {word}]", f"['{word}']", f'["{word}"]') if many else ():
            assert at(given(cls, *ALSO.get(key, ()), f"--{key}={typed}"), key)[-1] == word, (cls, key, typed)
        if cls in (Config, train.TrainArguments) and key == "sample.classes":
            assert at(given(cls, *ALSO.get(key, ()), f"--{key}={word}"), key) == [word]
        if not many:
            meant = HOME if word == "~" and is_path(kind) else word
            assert at(given(cls, *ALSO.get(key, ()), f"--{key}={word}"), key) == meant, (cls, key)
            assert at(given(cls, *ALSO.get(key, ()), f"--{key}", word), key) == meant, (cls, key)


@pytest.mark.parametrize("word", WORDS)
def test_text_in_a_file_stays_text(tmp_path, word):
    """All but what YAML itself says: a comment, and null where a setting may be left out."""
    path = tmp_path / "x.yaml"
    for cls, key, kind in TEXTS:
        many = str not in members(kind)
        for quote in ('"', "'", ""):
            if not quote and word in ("#x", "="):
                continue
            value = f"[{quote}{word}{quote}]" if many else f"{quote}{word}{quote}"
            *groups, last = key.split(".")
            path.write_text(
                "".join(f"{'  ' * k}{name}:\n" for k, name in enumerate(groups))
                + f"{'  ' * len(groups)}{last}: {value}"
            )
            found = at(given(cls, *ALSO.get(key, ()), "--config", path), key)
            optional = type(None) in get_args(kind) and not many and not quote and word in ("null", "~")
            meant = HOME if word == "~" and is_path(kind) else word
            assert (found[0] if many else found) == (None if optional else meant), (cls, key, value)


@pytest.mark.parametrize(
    "word, whole, number, truth",
    [
        ("3", 3, 3.0, None),
        ("-1", -1, -1.0, None),
        ("2.5", None, 2.5, None),
        ("1e3", 1000, 1000.0, None),
        ("2e-4", None, 2e-4, None),
        ("1_000", 1000, 1000.0, None),
        ("0x10", 16, None, None),
        ("010", None, None, None),  # has been 8, and is 10 in YAML 1.2
        ("0", 0, 0.0, None),
        ("12:30:45", None, None, None),
        ("2020-01-01", None, None, None),
        ("no", None, None, False),
        ("off", None, None, False),
        ("yes", None, None, True),
        ("True", None, None, True),
        ("#x", None, None, None),
        ("", None, None, None),
    ],
)
def test_a_word_is_a_number_or_a_truth_value_where_that_is_meant(word, whole, number, truth):
    for kind, value in ((int, whole), (float, number), (bool, truth)):
        for of in (Plain, Word, str):
            found = as_type(of(word), kind)
            if value is None:
                assert type(found) is not kind  # it is left for the check, which refuses it
            else:
                assert (found, type(found)) == (value, kind)
    assert as_type(Plain("null"), int | None) is as_type(Word("~"), float | None) is None


def test_every_option_of_every_part_has_a_type_and_keeps_its_words(tmp_path):
    """Text as it was typed, numbers and truth values as those, or the word as it is, to be refused."""
    of_config = {
        "attention": "model.attention",
        "sampler": "sample.sampler",
        "path": "process.path",
        "time": "process.time",
    }
    for part, registry in assemble.parts().items():
        key = of_config.get(part, part)
        for name, entry in registry.items():
            for option, kind in annotations_of(entry).items():
                assert not isinstance(kind, str), f"{name}.{option} has its annotation as text"
                for word in WORDS:
                    expected = HOME if word == "~" and is_path(kind) else word
                    if str not in members(kind):
                        expected = as_type(Plain(word), kind)
                    quote = "'" if isinstance(expected, str) else ""
                    for argv in (
                        [f"--{key}.name={name}", f"--{key}.{option}={word}"],
                        [f"--{key}={{name: {name}, {option}: {quote}{word}{quote}}}"],
                    ):
                        found = at(given(Config, "--process.name", "flow", *argv), key)[option]
                        if type(expected) in members(kind):
                            assert found == expected, (key, name, option, word)
                        else:  # to be refused
                            assert found in (word, expected), (key, name, option, word)


@pytest.mark.parametrize("key", ["run_dir", "data.images"])
def test_what_is_left_empty_is_not_the_folder_that_one_is_in(tmp_path, capsys, key):
    needed = {"run_dir": "x", "process": "flow", "data": "{name: folder, images: x}", "codec": "pixels"}
    text = "".join(f"{name}: {value}\n" for name, value in needed.items() if name != key)
    (tmp_path / "x.yaml").write_text(text.replace("images: x", "images: ") if "." in key else f"{text}run_dir:\n")
    if key == "run_dir":
        assert "run_dir is null; it must be text" in sentence(capsys, "--config", tmp_path / "x.yaml")
        assert "run_dir is null; it must be text" in sentence(capsys, "--config", tmp_path / "x.yaml", "--run_dir=")
    else:
        with pytest.raises(ValueError, match="images is None; it must be text"):
            assemble.images(read("--config", tmp_path / "x.yaml"))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--process.name", "3"], "process.name is '3'; choose one of ['classify', 'diffusion', 'flow']"),
        (["--data", "5"], "data.name is '5'; choose one of ['digits', 'folder', 'mnist']"),
        (["--sample.sampler", "ddpm"], "sample.sampler.name is 'ddpm'; choose one of ['ode', 'sde']"),
        (["--lr", "3"], "'lr' is not a setting; did you mean --train.lr?"),
        (["--train.ema_stds", "[0.05,x]"], "train.ema_stds is [0.05, 'x']; it must be a list of numbers (float)"),
        (["--print_config=no"], "'print_config' is not a setting"),
    ],
)
def test_a_mistake_names_what_is_right(file, capsys, argv, said):
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", str(file), *argv])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def executed(marker):
    """Values that would leave `marker` behind if any of them were called."""
    command = f"touch {marker}"
    return [
        {"class_path": "os.system", "init_args": {"command": command}},
        {"class_path": "os.system", "init_args": [command]},
        {"class_path": "subprocess.call", "init_args": {"args": ["touch", str(marker)]}},
        {"_target_": "os.system", "command": command},
        {"name": "os.system", "command": command},
        {"__class__": "os.system", "args": [command]},
    ]


def test_no_value_in_a_config_or_a_checkpoint_is_called(tmp_path, capsys):
    """A mapping that names a function is refused as a setting, or as an option when its part is built; and nothing runs."""
    marker = tmp_path / "executed"
    spec_args = {"attention": (16, 2, (4, 4)), "codec": (1,)}
    plain = to_dict(given(Config))
    for evil in executed(marker):
        for key, kind in settings(Config):
            values = json.loads(json.dumps(plain))
            owner = at(values, key.rpartition(".")[0]) if "." in key else values
            owner[key.rpartition(".")[2]] = evil
            (tmp_path / "evil.yaml").write_text(json.dumps(nested(key, evil)))
            is_part = key in ("process", "data", "codec", "model.attention", "sample.sampler", "eval.data")
            for argv in (["--config", tmp_path / "evil.yaml"], [f"--{key}={json.dumps(evil)}"]):
                if is_part:  # its name and options are checked when it is built, below
                    with contextlib.suppress(SystemExit):
                        given(Config, *argv)
                    capsys.readouterr()
                elif {str, list[str]} & {*members(kind)}:  # text, and so on a command line text
                    if argv[0] == "--config":
                        assert key in sentence(
                            capsys, "--run_dir=x", "--process=flow", "--data=digits", "--codec=pixels", *argv
                        )
                else:
                    sentence(capsys, "--run_dir=x", "--process=flow", "--data=digits", "--codec=pixels", *argv)
            if not is_part:
                with pytest.raises(ValueError, match="here: "):
                    from_dict(Config, values, "here")
        for part, registry in assemble.parts().items():
            for name, entry in registry.items():
                args = spec_args.get(part, ())
                if part == "sampler":
                    args = (Diffusion() if name in dit_vca.SAMPLERS else Transport(),)
                for option in annotations_of(entry):
                    with pytest.raises(ValueError, match=rf"{option}|is 'os.system'|needs a name"):
                        create(registry, {"name": name, option: evil}, part, *args)
            with pytest.raises(ValueError, match="needs a name|choose one of"):
                create(registry, evil, part, *spec_args.get(part, ()))
    assert not marker.exists()


@pytest.mark.parametrize(
    "text, said",
    [
        ("process: !!python/object/apply:os.system ['touch x']", "line 1: '!!python/object/apply:os.system' is a tag"),
        ("seed: !!python/name:os.system ''", "is a tag"),
        ("seed: !run x", "line 1: '!run' is a tag"),
        ("run_dir: a\nrun_dir: b", "line 2: 'run_dir' stands twice"),
        (
            "a: &a [x, x]\nb: &b [*a, *a]\n"
            + "\n".join(f"c{i}: &c{i} [{', '.join(['*b' if i == 0 else f'*c{i - 1}'] * 20)}]" for i in range(9)),
            "more than 100,000",
        ),
        ("a: &a [*a]", "it holds itself"),
        ("- 1", "it is a list, not lines of KEY: VALUE"),
        ("cat", "it is a word, not lines of KEY: VALUE"),
        ("run_dir: [#x]", "expected"),
    ],
)
def test_a_file_that_is_no_settings_says_where(tmp_path, capsys, text, said):
    (tmp_path / "x.yaml").write_text(text)
    message = sentence(capsys, "--config", tmp_path / "x.yaml")
    assert "x.yaml is not a YAML file of settings" in message
    assert said in message


def test_files_of_other_versions_of_yaml_are_read_as_they_were_meant(tmp_path):
    """Numbers with underscores, yes and no for truth values, quoted numbers, empty groups, a byte order mark, aliases."""
    text = "seed: &s 1_000\ntrain: {tf32: no, lr: '2e-4', batch_size: 0x10}\nmodel:\nsample: {seed: *s, classes: [3, 007]}\n"
    (tmp_path / "x.yaml").write_text("\ufeff" + text, encoding="utf-8")
    config = given(Config, "--config", tmp_path / "x.yaml")
    assert (config.seed, config.sample.seed, config.train.tf32, config.train.lr) == (1000, 1000, False, 2e-4)
    assert (config.train.batch_size, config.sample.classes, config.model) == (16, ["3", "007"], ModelConfig())


@pytest.mark.parametrize("name", [{"class_path": "os.system"}, ["os.system"], None])
def test_the_name_of_a_part_is_a_word(name):
    values = {**to_dict(given(Config)), "process": {"name": name}}
    with pytest.raises(ValueError, match=r"^here: process.name is .*; it must be a word\.$"):
        from_dict(Config, values, "here")
    with pytest.raises(ValueError, match="^here: the settings are"):
        from_dict(Config, [values], "here")


def test_a_checkpoint_of_an_earlier_version_whose_words_were_numbers_is_read(file):
    values = to_dict(read("--config", file))
    values["sample"]["classes"] = [3, "cat"]
    values["run_dir"] = 7
    config = from_dict(Config, values, "here")
    assert (config.sample.classes, config.run_dir) == (["3", "cat"], "7")


def test_written_yaml_is_read_as_the_same_text_by_every_version_of_yaml(tmp_path):
    values = {
        "words": [*WORDS, "", "a: b", "- x", "a #b", "it's", 'a "b"', "über", "日本", "a\nb", " x ", "x:", "@x", "[a]"]
    }
    text = write_yaml({**values, "none": None, "flag": True, "float": 1e-5, "whole": 3})
    assert yaml.safe_load(text) == {**values, "none": None, "flag": True, "float": 1e-5, "whole": 3}  # YAML 1.1
    assert YAML(typ="safe", pure=True).load(text)["words"] == values["words"]  # YAML 1.2
    assert parse_yaml(text)["words"] == values["words"]


def test_an_option_after_a_name_belongs_to_it_and_a_whole_spec_replaces(file):
    config = read("--config", file, "--process.path", "vp", "--process.path.beta_max", "10")
    assert config.process == {"name": "flow", "path": {"name": "vp", "beta_max": 10.0}}
    config = read("--config", file, "--sample.sampler", "{name: sde, num_steps: 5}", "--sample.sampler", "{name: ode}")
    assert config.sample.sampler == {"name": "ode"}
    assert read("--config", file, "--sample.sampler.num_steps", "4").sample.sampler == {"num_steps": 4}
    assert read("--config", file, "--model.attention.dwc", "false").model.attention == {"name": "vca", "dwc": False}


def test_a_flag_needs_no_value_and_a_word_alone_is_the_first_setting():
    def parsed(*argv):
        return parse(sample.SampleArguments, argv, prog="", description="", first="checkpoint", parts=assemble.parts())

    for argv in (
        ["--trajectory", "run"],
        ["run", "--trajectory"],
        ["run", "--trajectory", "true"],
        ["--trajectory=yes", "run"],
    ):
        args = parsed(*argv)
        assert (args.checkpoint, args.trajectory) == ("run", True)
    assert not parsed("run", "--trajectory", "no").trajectory
    assert parsed("run", "--num=2", "--fid=x", "--fid-metrics", "[fid, is]").fid_metrics == ["fid", "is"]


def test_a_setting_is_taken_back_but_not_by_a_variable_that_is_empty(file, capsys):
    file.write_text(
        file.read_text() + "init: runs/y\nfid: {weights: x}\nsample: {classes: [a], sampler: {name: sde}}\n"
    )
    config = read("--config", file, "--init=", "--sample.classes=", "--sample.sampler=", "--fid.weights=")
    assert (config.init, config.sample.classes, config.sample.sampler, config.fid.weights) == (None, None, None, None)
    assert "--init is empty" in sentence(capsys, "--config", file, "--init", "")


def test_a_dotted_name_may_stand_in_a_file(file):
    file.write_text(file.read_text() + "train.batch_size: 3\nprocess.path: vp\nmodel.attention.dwc: false\n")
    config = read("--config", file)
    assert (config.train.num_steps, config.train.batch_size) == (7, 3)
    assert config.process == {"name": "flow", "path": "vp"}
    assert config.model.attention == {"name": "vca", "dwc": False}


def test_a_group_that_is_a_value_is_refused(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("train: 3\n")
    for argv in ((), ("--train.lr", "1")):
        said = sentence(capsys, "--config", tmp_path / "x.yaml", *argv)
        assert "train is '3'; it is a group of settings, such as train.num_steps." in said
    for argv in (["--fid", "null"], ["--fid=null"]):
        assert "fid is 'null'; it is a group of settings, such as fid.reference." in sentence(capsys, *argv)


def test_a_group_may_be_given_as_a_whole(file, tmp_path):
    (tmp_path / "train.yaml").write_text("lr: 0.25\nnum_steps: 3\n")
    assert read("--config", file, "--train", "{lr: 0.125}").train == TrainConfig(num_steps=7, lr=0.125)
    assert read("--config", file, "--train", tmp_path / "train.yaml").train == TrainConfig(num_steps=3, lr=0.25)


@pytest.mark.parametrize(("text", "key"), [('run_dir: "a\\0b"', "run_dir"), ('codec: {path: "a\\0b"}', "codec.path")])
def test_a_path_without_meaning_is_refused_by_the_name_of_its_setting(file, tmp_path, capsys, text, key):
    (tmp_path / "odd.yaml").write_text(text)
    for words in (["--config", str(tmp_path / "odd.yaml")], [f"--{key}", "a\udcffb"]):
        with pytest.raises(SystemExit, match="2"):
            train.main(["--config", str(file), *words])
        assert f"train.py: {key} is " in capsys.readouterr().err


def test_a_size_on_the_command_line_takes_the_place_of_the_numbers_of_the_file(tmp_path):
    """What is typed beside it stays, before it or after it; and a file that says both means both."""
    for name, depth in (("a", 4), ("b", 5)):
        text = f"size: S/2\n  hidden_size: 128\n  depth: {depth}\n  mlp_ratio: 3"
        (tmp_path / f"{name}.yaml").write_text(f"model:\n  {text}\n")
    need = ["--run_dir", "r", "--process.name", "flow", "--data.name", "digits", "--codec.name", "pixels", "--config"]

    def model(*words):
        return parse(Config, [*need, str(tmp_path / "a.yaml"), *words], prog="p", description="").model

    assert (model().size, model().hidden_size, model().depth) == ("S/2", 128, 4)
    for words in (["--model.size", "B/4"], ["--model", "{size: B/4}"]):
        found = model(*words)
        assert (found.size, found.hidden_size, found.depth, found.mlp_ratio) == ("B/4", None, None, 3)
    for words in ("--model.size B/4 --model.depth 6", "--model.depth 6 --model.size B/4"):
        found = model(*words.split())
        assert (found.size, found.hidden_size, found.depth) == ("B/4", None, 6)
    found = model("--model.size", "B/4", "--config", str(tmp_path / "b.yaml"))
    assert (found.size, found.hidden_size, found.depth) == ("S/2", 128, 5)
