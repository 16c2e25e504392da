"""The study: its statistics against numbers worked by hand, its parts, and what it does with results that are there."""

import math
import signal
import sys

import numpy as np
import pytest

from benchmarks import study as program
from benchmarks.comparisons import (
    PAIRS,
    bootstrap_interval,
    compare,
    holm,
    paired_t,
    report_of,
    write_report,
)
from benchmarks.study import ARMS, SEEDS, STAGES, TUNING_SEEDS, Study, Training, all_trainings, in_part, part_of
from vca_engine.records import write_json


def result(arm, seed, fd, failed=None, **values):
    """A result of the stage digits-sit, as `Study.do` writes it, with made-up numbers."""
    values = {
        "fd": fd,
        "fd_interval": [fd - 1, fd + 1],
        "loss": fd / 100,
        "accuracy_cfg1": 90.0,
        "accuracy_cfg2": 99.0,
        "parameters": 1234,
    } | values
    settings = {"stage": "digits-sit", "arm": arm, "seed": seed, "rate": 0.01, "command": []}
    return {
        "settings": settings,
        "failed": failed,
        "values": {} if failed else values,
        "seconds": {"train": 9.0, "train_cpu": 8.0, "evaluate": 1.0},
        "cpu": "a",
    }


def test_the_paired_t_test():
    # Differences 1, 2, 3: mean 2, standard deviation 1, so t = 2 sqrt 3 with 2 degrees of freedom, for which
    # p = 1 - t / sqrt(t^2 + 2) = 1 - sqrt(12 / 14), and the 97.5 % quantile is 4.30265.
    found = paired_t([1, 2, 3])
    assert found.n == 3
    assert found.mean == 2
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-9)
    assert (found.low, found.high) == pytest.approx(
        (2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)), abs=1e-5
    )  # digits of the table
    assert paired_t([-1, -2, -3]).p == found.p


def test_differences_without_spread_or_number():
    assert paired_t([0, 0, 0]).p == 1
    assert paired_t([0.5, 0.5]).p == 0
    assert math.isnan(paired_t([1.0]).p)
    assert paired_t([]).n == 0


def test_holm():
    # The textbook's example: sorted .005, .01, .03, .04 times 4, 3, 2, 1 is .02, .03, .06, .04; made monotone, .06 stays.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1, 1])
    found = holm([0.01, np.nan, 0.02])  # two tests were made, not three
    assert found[[0, 2]] == pytest.approx([0.02, 0.02])
    assert math.isnan(found[1])


def test_the_bootstrap_covers_the_mean_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for seed in range(200):
        low, high = bootstrap_interval(np.mean, rng.normal(3.0, 2.0, size=50), seed)
        hits += low <= 3.0 <= high
    assert 180 <= hits <= 198  # 95 % of 200 is 190, with a standard deviation of 3; of 50 rows it is a little less
    rows = rng.normal(size=(50,))
    assert bootstrap_interval(np.mean, rows, 7) == bootstrap_interval(np.mean, rows, 7)
    assert bootstrap_interval(np.mean, rows, 7) != bootstrap_interval(np.mean, rows, 8)


def test_parts_are_disjoint_and_complete():
    trainings = all_trainings()
    assert len({one.name for one in trainings}) == len(trainings)
    for parts in (1, 3, 7, 1000):
        found = [one for k in range(parts) for one in in_part(trainings, k + 1, parts)]
        assert sorted(one.name for one in found) == sorted(one.name for one in trainings)
        units = {(one.stage, one.arm, k) for k in range(parts) for one in in_part(trainings, k + 1, parts)}
        assert len(units) == len(STAGES) * len(ARMS)  # who trains an arm has tuned it


def test_every_arm_is_tuned_as_much_as_every_other():
    for name, stage in STAGES.items():
        for arm in ARMS:
            own = [one for one in all_trainings([name]) if one.arm == arm]
            assert len(own) == len(stage.rates) * len(TUNING_SEEDS) + len(SEEDS)
    assert not {*TUNING_SEEDS} & {*SEEDS}


def test_parts_as_typed():
    assert part_of("2/4") == (2, 4)
    for wrong in ("0/4", "5/4", "2", "a/b"):
        with pytest.raises(Exception, match="write k/n with k from 1 to n"):
            part_of(wrong)


def test_every_pair_is_of_arms():
    assert {arm for pair in PAIRS for arm in pair} == {*ARMS}


def write_tuning(study, arm, losses):
    """Write the results of tuning: rates -> losses of the two seeds; None failed."""
    for rate, of_seeds in zip(STAGES["digits-sit"].rates, losses, strict=True):
        for seed, loss in zip(TUNING_SEEDS, of_seeds, strict=True):
            one = Training("digits-sit", arm, seed, rate)
            found = {
                "settings": study.settings(one),
                "failed": None if loss else "not finite",
                "values": {"loss_tuning": loss},
            }
            write_json(study.file(one), found)


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A study whose arm mhsa is tuned: the first rate failed once, so the second is the better. No run may begin."""
    study = Study(tmp_path / "results", tmp_path / "work")
    write_tuning(study, "mhsa", [(0.1, None), (0.5, 0.3)])
    monkeypatch.setattr(program.train, "main", lambda argv: pytest.fail("a run began"))
    return study


def test_the_rate_is_that_of_the_lowest_mean_loss(tuned):
    assert tuned.rate_of(Training("digits-sit", "mhsa", SEEDS[0])) == STAGES["digits-sit"].rates[1]
    with pytest.raises(program.NotYetError, match="digits-sit/vca-seed-20 needs digits-sit/vca-tuning"):
        tuned.rate_of(Training("digits-sit", "vca", 20))


def test_a_finished_run_is_skipped_and_one_of_other_settings_refused(tuned):
    one = Training("digits-sit", "mhsa", 0)
    settings = tuned.settings(one)
    write_json(tuned.file(one), {"settings": settings})
    assert tuned.do(one) is False
    write_json(tuned.file(one), {"settings": settings | {"rate": 0.5}})
    with pytest.raises(ValueError, match=r"rate 0.5 \(now 0.016\); move it"):
        tuned.do(one)


def test_two_processes_do_not_do_the_same_run(tuned, capsys):
    one = Training("digits-sit", "mhsa", 0)
    lock = program.hold(tuned.work / f"{one.name}.lock", "busy")
    assert tuned.do(one) is False
    assert "another process is at it" in capsys.readouterr().out
    lock.release()


def test_equal_seconds_are_steps_by_the_median_of_measured_ones(tuned):
    for arm, seconds in (("mhsa", 10.0), ("vca", 12.5)):
        write_tuning(tuned, arm, [(0.5, 0.5), (0.3, 0.4)])
        for seed in SEEDS:
            one = Training("digits-sit", arm, seed)
            write_json(
                tuned.file(one),
                {
                    "settings": tuned.settings(one),
                    "seconds": {"train_cpu": seconds + 100 * (seed == SEEDS[0])},
                    "cpu": "a",
                },
            )
    num_steps = STAGES["digits-sit"].num_steps
    assert tuned.steps_of(Training("digits-sit-seconds", "mhsa", 0)) == num_steps
    assert tuned.steps_of(Training("digits-sit-seconds", "vca", 0)) == num_steps * 10 / 12.5
    with pytest.raises(program.NotYetError, match="needs all seeds of digits-sit"):
        tuned.steps_of(Training("digits-sit-seconds", "agent", 0))


def test_the_report_of_results(tmp_path):
    # mhsa+conv is 10 better than mhsa, give or take 1; vca and vca-noconv are the same but for noise; agent failed once.
    runs = []
    for seed, noise in enumerate((-1.0, 0.0, 1.0)):
        runs += [
            result("mhsa", seed, 30.0),
            result("mhsa+conv", seed, 20.0 + noise),
            result("vca", seed, 20.0 + noise),
            result("vca-noconv", seed, 20.0),
        ]
    runs += [result("agent", 0, 20.0), result("agent", 1, 0.0, failed="the loss was not finite")]
    found = compare(runs, "fd")
    assert {pair: (one.mean, one.n) for pair, one in found.items()} == {
        ("mhsa+conv", "mhsa"): (-10, 3),
        ("vca", "vca-noconv"): (0, 3),
        ("vca", "mhsa"): (-10, 3),
        ("vca", "mhsa+conv"): (0, 3),
    }
    alone = paired_t([-11, -10, -9]).p
    assert found["mhsa+conv", "mhsa"].holm == pytest.approx(4 * alone)  # the smallest of four
    text = report_of({"digits-sit": runs, "mnist-sit": []})
    assert (
        "| `mhsa+conv` | 1,234 | 0.01 | 3 | 20.00 ± 1.00 | 0.2000 ± 0.0100 | 90.0 ± 0.0 | 99.0 ± 0.0 | 1.00 | 8.0 |"
        in text
    )
    assert "| `agent` | 1,234 | 0.01 | 1, 1 failed | 20.00 |" in text
    assert (
        "* The convolution: `mhsa+conv` is better than `mhsa` (-10.00, p .013); `vca` and `vca-noconv` cannot be told apart (-2.48 to +2.48)."
        in text
    )
    assert "In 2 of 4 comparisons nothing can be said of Frechet distance." in text
    assert "Not complete. `python -m benchmarks.study --part 1/1 --stages mnist-sit`" in text

    page = tmp_path / "study.md"
    page.write_text("# A\n<!-- results: written by --table -->\nold\n<!-- end of the results -->\nB\n")
    for _ in range(2):  # written again, it is the same
        write_report({"digits-sit": runs, "mnist-sit": []}, page)
        assert (
            page.read_text() == f"# A\n<!-- results: written by --table -->\n\n{text}\n<!-- end of the results -->\nB\n"
        )
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_results_in_other_features_are_refused():
    runs = [result("mhsa", 0, 1.0, classifier="a"), result("mhsa", 1, 1.0, classifier="b")]
    with pytest.raises(ValueError, match="2 different values of classifier"):
        report_of({"digits-sit": runs})


def test_a_signal_after_a_program_is_not_that_programs(tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    def main(argv):
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        print(*argv)

    assert program.call(main, ["a", "b"], tmp_path / "log.txt") is None
    assert (tmp_path / "log.txt").read_text() == "a b\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_training_that_is_not_finite_fails_and_any_other_mistake_ends_the_study(tmp_path):
    def main(argv):
        print(argv[0], file=sys.stderr)
        raise SystemExit(2)

    sentence = "train.py: the loss or its gradient was not finite in 10 steps in a row"
    assert program.call(main, [sentence], tmp_path / "log.txt") == sentence
    with pytest.raises(ValueError, match="no such folder"):
        program.call(main, ["no such folder"], tmp_path / "log.txt")
