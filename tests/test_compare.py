"""Runs of recognisers beside each other: means, deviations and differences against numbers worked out by hand."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from classify.__main__ import main
from classify.compare import compare, name_groups, read_run
from vca_engine.config.cli import parse
from vca_engine.config.schema import Config, save_yaml, to_dict
from vca_engine.records import read_json
from vca_engine.weights import checkpoint

DIGITS = ["--config", str(Path(__file__).resolve().parents[1] / "configs" / "digits_deit.yaml")]
ALL_FIVE = "--train.num_steps 200 --eval.every 100"


def make_run(folder, extra="", top1=(50.0, 90.0), *, num_samples=500, crop="crop 1, bicubic", classes=10):
    """A folder as train.py leaves it, with these accuracies at steps 100, 200, ..., of `num_steps` 200."""
    words = [*DIGITS, *ALL_FIVE.split(), *extra.split(), "--run_dir", str(folder)]
    config = parse(Config, words, prog="", description="")
    save_yaml(config, folder / "config.yaml")
    lines = []
    for number, value in enumerate(top1, 1):
        line = {"step": 100 * number, "top1": value, "top5": 99.0, "num_samples": num_samples, "weights": "ema"}
        lines.append({**line, "reference": {"split": "test"}, "protocol": crop})
        record = {"config": to_dict(config), "shape": {"class_names": [str(k) for k in range(classes)]}}
        record["num_parameters"] = 213_578
        place = checkpoint.folder_of(folder, 100 * number)
        checkpoint.save(place, 100 * number, {"model": {"x": torch.zeros(1)}}, record)
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


OWN = "--model.attention.name own"


@pytest.fixture
def two_groups(tmp_path):
    """Own: 90, 92, 94; vca: 93, 94, 98; so the differences are 3, 2, 4."""
    own = [make_run(tmp_path / f"own-{k}", f"{OWN} --seed {k}", (50, 90 + 2 * k)) for k in range(3)]
    vca = [make_run(tmp_path / f"vca-{k}", f"--seed {k}", (70, v)) for k, v in enumerate((93, 94, 98))]
    return [*own, *vca]


def test_mean_deviation_and_the_paired_difference(two_groups, tmp_path):
    """Of own 92 and 2, of vca 95 and sqrt((2^2 + 1^2 + 3^2) / 2) = 2.65; of 3, 2, 4: 3, and 1 / sqrt(3) = 0.58.

    Student's t with 2 degrees of freedom has its 97.5 % quantile at 4.3027: 3 -+ 2.484.
    """
    text = compare(two_groups, tmp_path / "out" / "accuracy.png")
    rows = [re.split(r"\s{2,}", line) for line in text.splitlines()]
    header = ["", "parameters", "seeds", "step", "top-1", "top-5", "top-1 of each seed"]
    own = ["attention own", "213,578", "3", "200", "92.00 ± 2.00", "99.00 ± 0.00", "90.00 (0), 92.00 (1), 94.00 (2)"]
    vca = ["attention vca", "213,578", "3", "200", "95.00 ± 2.65", "99.00 ± 0.00", "93.00 (0), 94.00 (1), 98.00 (2)"]
    assert [header, own, vca] == rows[2:5]
    assert (
        "attention vca minus attention own: +3.00 points, standard error 0.58 (3 seeds, paired); 95 % t interval +0.52 to "
        "+5.48: it can be told from 0."
    ) in text
    assert "500 images (digits, split test; crop 1, bicubic; weights ema)" in text
    found = read_json(tmp_path / "out" / "accuracy.json")
    assert [group["name"] for group in found["groups"]] == ["attention own", "attention vca"]
    assert found["groups"][1]["top1"] == pytest.approx({"mean": 95, "sd": 7**0.5})
    assert [run["top1"] for run in found["groups"][1]["runs"]] == [93, 94, 98]
    (pair,) = found["paired_differences"]
    assert (pair["of"], pair["minus"], pair["num_seeds"]) == ("attention vca", "attention own", 3)
    assert pair["top1"] == pytest.approx(3)
    assert pair["standard_error"] == pytest.approx(3**-0.5)
    assert pair["interval"] == pytest.approx([3 - 2.48414, 3 + 2.48414], abs=1e-5)  # of t's table: five digits
    assert Image.open(tmp_path / "out" / "accuracy.png").size == (1050, 675)


def test_a_difference_that_seeds_hide_is_said_to_be_none(two_groups, tmp_path):
    """3, -1, 4: 2 with sqrt(7 / 3) = 1.53; 4.3027 times that is more than 2."""
    make_run(tmp_path / "vca-1", "--seed 1", (70, 91))
    text = compare(two_groups, tmp_path / "accuracy.png")
    assert "+2.00 points, standard error 1.53" in text
    assert "95 % t interval -4.57 to +8.57: it cannot be told from 0." in text


def test_equal_differences_have_no_interval(two_groups, tmp_path):
    """3 with each seed, to less than one of 500 images: the interval would have no width after three seeds."""
    for seed, top1 in enumerate((93, 95.0001, 97)):
        make_run(tmp_path / f"vca-{seed}", f"--seed {seed}", (70, top1))
    text = compare(two_groups, tmp_path / "accuracy.png")
    assert "attention own: +3.00 points with each of 3 seeds, so no spread is known, and no interval." in text
    assert "told from 0" not in text
    assert read_json(tmp_path / "accuracy.json")["paired_differences"][0]["interval"] is None


def test_only_numbers_of_a_comparison_are_replaced(tmp_path):
    run, mine = make_run(tmp_path / "run"), tmp_path / "accuracy.json"
    mine.write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=r"accuracy.json', where .* is there already and holds no comparison; choose"):
        compare([run], tmp_path / "accuracy.png")
    assert mine.read_text() == '{"mine": 1}'
    assert not (tmp_path / "accuracy.png").exists()
    mine.unlink()
    for _ in range(2):
        compare([run], tmp_path / "accuracy.png")
    assert read_json(mine)["paired_differences"] == []


def test_seeds_are_found_in_whatever_order_the_runs_are_given(two_groups, tmp_path):
    text = compare(two_groups, tmp_path / "a.png")
    a, b, c, d, e, f = two_groups
    assert compare([b, f, a, d, c, e], tmp_path / "b.png") == text


def test_one_seed_has_no_spread(tmp_path):
    runs = [make_run(tmp_path / "own", OWN, (50, 90)), make_run(tmp_path / "vca", "", (60, 91))]
    text = compare(runs, tmp_path / "accuracy.png")
    assert "±" not in text
    assert "minus" not in text
    assert text.endswith("One seed, so no spread is known: attention own; attention vca.")
    assert read_json(tmp_path / "accuracy.json")["groups"][0]["top1"] == {"mean": 90, "sd": None}


def test_other_seeds_make_no_pairs(two_groups, tmp_path):
    text = compare(two_groups[:-1], tmp_path / "accuracy.png")
    assert "minus" not in text
    assert "There is no paired difference where the seeds are not the same" in text


def test_with_five_classes_there_is_no_top5(tmp_path):
    text = compare([make_run(tmp_path / "run", classes=5)], tmp_path / "accuracy.png")
    assert "top-5" not in text
    assert "deit_tiny, attention vca" in text


def test_a_run_that_is_not_finished_is_named_and_its_group_stands_where_all_of_it_were_evaluated(two_groups, tmp_path):
    make_run(tmp_path / "vca-1", "--seed 1", (72,))
    text = compare(two_groups, tmp_path / "accuracy.png")
    assert "attention vca     213,578      3   100  70.67 ± 1.15" in text  # 70, 72, 70
    assert f"Not finished: '{tmp_path}/vca-1' is at step 100 of 200." in text
    assert "The groups stand at different steps: attention own at 200; attention vca at 100." in text
    assert "minus" not in text


def test_lines_that_are_damaged_or_of_another_crop_before_do_not_count(tmp_path):
    file = make_run(tmp_path / "run", top1=(50, 90)) / "eval.jsonl"
    first, second = file.read_text().splitlines()
    other = first.replace("crop 1", "crop 0.875")
    file.write_text(f'{other}\n{{"step": 150, "top1": "many"}}\n{{"step": 1\n{second}\n')
    assert [*read_run(tmp_path / "run").lines] == [200]


class TestNames:
    def names(self, *changes):
        settings = []
        for change in changes:
            config = to_dict(parse(Config, [*DIGITS, *change.split()], prog="", description=""))
            settings.append({key: value for key, value in config.items() if key not in ("seed", "run_dir")})
        return name_groups(settings)

    def test_options_that_follow_from_a_name_are_left_out(self):
        """Of vca every option is in the record of a run."""
        vca = "--model.attention.dwc true --model.attention.softmax joint"
        assert self.names(OWN, vca) == ["attention own", "attention vca"]

    def test_options_that_do_not_are_there(self):
        found = self.names(OWN, "", "--model.attention.contrast_grid [2,2]")
        assert found == ["attention own", "attention vca", "attention vca, attention.contrast_grid [2, 2]"]

    def test_what_changes_with_the_attention_is_not_hidden(self):
        assert self.names(f"{OWN} --train.lr 1e-3", "") == [
            "attention own, train.lr 0.001",
            "attention vca, train.lr 0.003",
        ]

    def test_nothing_counts_as_a_value(self):
        assert self.names("--train.max_grad_norm=", "") == ["train.max_grad_norm null", "train.max_grad_norm 1.0"]


class TestRefusals:
    def sentence(self, capsys, *words):
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, words)))
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    def test_what_is_no_run(self, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        (tmp_path / "begun").mkdir()
        (tmp_path / "begun" / "config.yaml").touch()
        for name, said in {
            "none": f"the run '{tmp_path}/none' does not exist; name folders of train.py, e.g. python -m classify compare",
            "empty": f"'{tmp_path}/empty' is no run of train.py: it has no config.yaml; name the run_dir of a training.",
            "begun": f"'{tmp_path}/begun' has no checkpoint yet; let its training come to the first evaluation.",
        }.items():
            assert said in self.sentence(capsys, "compare", tmp_path / name)
        assert not (Path.cwd() / "accuracy.png").exists()

    def test_a_run_without_evaluations_says_how_to_have_them(self, tmp_path, capsys):
        (make_run(tmp_path / "run") / "eval.jsonl").unlink()
        said = self.sentence(capsys, "compare", tmp_path / "run")
        assert f"'{tmp_path}/run' has no evaluations" in said
        assert "Train it with --eval.data.images DIR" in said

    def test_a_generator_has_no_accuracy(self, tmp_path, capsys):
        folder = tmp_path / "run"
        make_run(folder)
        record = json.loads((folder / "checkpoints/step-00000200/checkpoint.json").read_text())
        record["config"] |= {"process": {"name": "flow"}, "eval": {}}
        del record["checksum"]
        (folder / "checkpoints/step-00000200/checkpoint.json").write_text(json.dumps(record))
        assert "is of a generator, process flow" in self.sentence(capsys, "compare", folder)

    @pytest.mark.parametrize(
        "extra, options, said",
        [
            ("", {"num_samples": 400}, "num_samples 500 (the other 400)"),
            ("", {"crop": "crop 0.875, bicubic"}, "protocol 'crop 1, bicubic' (the other 'crop 0.875, bicubic')"),
            ("--eval.data.images val", {}, "eval.data.images None (the other 'val')"),
            ("--data.name mnist", {}, "eval.data.name 'digits' (the other 'mnist')"),
        ],
    )
    def test_what_was_evaluated_on_something_else_is_named(self, tmp_path, capsys, extra, options, said):
        runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", extra, **options)]
        found = self.sentence(capsys, "compare", *runs)
        assert f"'{tmp_path}/a' and '{tmp_path}/b' were not evaluated on the same: {said}." in found

    def test_a_run_given_twice_is_no_second_seed(self, tmp_path, capsys):
        run = make_run(tmp_path / "a", "--seed 7")
        assert "have the same settings and the same seed, 7" in self.sentence(capsys, "compare", run, run)

    def test_no_step_in_common(self, tmp_path, capsys):
        file = make_run(tmp_path / "a", "--seed 1", (50,)) / "eval.jsonl"
        file.write_text(file.read_text().replace('"step": 100', '"step": 99'))
        said = self.sentence(capsys, "compare", tmp_path / "a", make_run(tmp_path / "b"))
        assert "were evaluated at no step in common" in said

    def test_words(self, tmp_path, capsys):
        assert "there is nothing to compare; name the folders" in self.sentence(capsys, "compare")
        said = self.sentence(capsys, "compare", make_run(tmp_path / "a"), "--out", "a.jpeg2")
        assert "the picture 'a.jpeg2' has to end in one of .png, .pdf, .svg." in said


def test_folders_may_stand_before_and_after_options(two_groups, tmp_path, capsys):
    first, *others = map(str, two_groups)
    main(["compare", first, "--out", str(tmp_path / "x.pdf"), *others])
    printed = capsys.readouterr().out
    assert "attention own     213,578      3" in printed
    assert printed.endswith(f"wrote {tmp_path}/x.pdf and {tmp_path}/x.json\n")
    assert (tmp_path / "x.pdf").read_bytes()[:4] == b"%PDF"


@pytest.mark.usefixtures("as_in_a_new_process")
def test_runs_of_train_py(tmp_path, capsys):
    """Parameters of a DiT of width C, depth L, patches of p pixels, 16 of them, K classes: by hand."""
    words = "--train.num_steps 2 --train.warmup_steps 0 --eval.every 1 --train.batch_size 4 --train.tracker none "
    words += "--model.hidden_size 12 --model.depth 2 --model.num_heads 2 --model.attention.name own --seed"
    for seed in (0, 1):
        train.main([*DIGITS, *words.split(), str(seed), "--run_dir", str(tmp_path / str(seed))])
    text = compare([tmp_path / "0", tmp_path / "1"], tmp_path / "accuracy.png")
    block = 2 * 2 * 12 + (12 * 36 + 36) + (12 * 12 + 12) + (12 * 48 + 48) + (48 * 12 + 12)
    number = 2 * block + (4 * 12 + 12) + 12 + 17 * 12 + 2 * 12 + (12 * 10 + 10)
    last = [json.loads((tmp_path / str(k) / "eval.jsonl").read_text().splitlines()[-1])["top1"] for k in (0, 1)]
    assert re.search(rf"deit_tiny, attention own +{number:,} +2 +2 +{sum(last) / 2:.2f} ± ", text)
    assert text.count("(0), ") == 1
