"""Checkpoints: what comes back is what was saved, bit for bit, and a damaged or half-written one is never taken."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vca_engine.config.schema import TrainConfig
from vca_engine.files import checksum_of
from vca_engine.records import read_json
from vca_engine.training.ema import Ema, constant
from vca_engine.weights import checkpoint


def network(width=6):
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.BatchNorm1d(width), nn.Linear(width, 2, bias=False))


def trained(model, steps=3):
    """The tensors of a checkpoint whose optimizer and average have a state that is not their initial one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    ema = Ema(model, constant(0.9, False))
    for step in range(steps):
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step + 1)
    average = {**model.state_dict(), **ema.weights}
    return optimizer, {
        "model": model.state_dict(),
        "ema": average,
        "optimizer": checkpoint.optimizer_tensors(model, optimizer),
    }


def save(run, step, model=None, **given):
    _, parts = trained(model or network())
    folder = checkpoint.folder_of(run, step)
    checkpoint.save(folder, step, parts, {"config": {"seed": 1}, "shape": {}, **given})
    return folder


def snapshot(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_model_average_and_optimizer_come_back_bit_for_bit(tmp_path):
    model = network()
    optimizer, parts = trained(model)
    folder = checkpoint.folder_of(tmp_path, 3)
    checkpoint.save(folder, 3, parts, {"config": {"a": [1, "x"]}, "shape": {}})
    assert folder == tmp_path / "checkpoints" / "step-00000003"
    assert {f.name for f in folder.iterdir()} == {f"{n}.safetensors" for n in ("model", "ema", "optimizer")} | {
        "checkpoint.json"
    }
    again, average = network(), network()
    other = torch.optim.AdamW(again.parameters(), lr=0.01, weight_decay=0.1)
    checkpoint.load_exactly(again, checkpoint.read(folder, "model"), folder)
    checkpoint.load_exactly(average, checkpoint.read(folder, "ema"), folder)
    checkpoint.load_optimizer(folder, again, other)
    assert equal(model.state_dict(), again.state_dict())
    assert equal(parts["ema"], average.state_dict())
    assert not equal(model.state_dict(), average.state_dict())
    old, new = optimizer.state_dict(), other.state_dict()
    assert old["param_groups"] == new["param_groups"]
    assert old["state"].keys() == new["state"].keys()
    assert all(equal(old["state"][i], new["state"][i]) for i in old["state"])
    read = checkpoint.read_record(folder)
    assert len(read.pop("id")) == 32
    assert read.pop("files") == {f.name: checksum_of(f) for f in folder.glob("*.safetensors")}
    assert read == {"shape": {}, **{"format": 4, "step": 3, "config": {"a": [1, "x"]}}}

    x = torch.randn(5, 3)
    for m, o in ((model, optimizer), (again, other)):
        m(x).square().mean().backward()
        o.step()
    assert equal(model.state_dict(), again.state_dict())


def test_find_takes_a_run_or_one_of_its_checkpoints(tmp_path):
    run = tmp_path / "run"
    first, last = save(run, 900), save(run, 1000)
    assert checkpoint.steps(run) == [first, last]
    assert checkpoint.find(run) == last
    assert checkpoint.find(str(first)) == first


def test_find_says_what_is_there_instead(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere.*: there is no such file or folder"):
        checkpoint.find(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"is not a checkpoint; give a run's folder, or one of its checkpoints/step-\*"
    ):
        checkpoint.find(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        checkpoint.find(tmp_path / "file")


def test_find_names_the_run_that_is_meant(tmp_path):
    """The nearest name beside a path that is not there, and the runs in a folder of runs."""
    for name in ("mini", "other", ".hidden"):
        save(tmp_path / name, 1)
    (tmp_path / "notes").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no such file or folder; the nearest there is '.*/mini'; name a run"):
        checkpoint.find(tmp_path / "min")
    with pytest.raises(ValueError, match=r"holds the runs mini, other; name one, e.g. .*/mini\.$"):
        checkpoint.find(tmp_path)
    for i in range(5):
        save(tmp_path / f"many-{i}", 1)
    assert "runs many-0, many-1, many-2, many-3, many-4 and 2 more; name" in checkpoint.runs_in(tmp_path)
    assert checkpoint.runs_in(tmp_path / "notes") == checkpoint.runs_in(tmp_path / "nowhere") == ""


@pytest.mark.parametrize("name", ["model", "ema", "optimizer"])
def test_a_truncated_file_is_named_at_whatever_length_it_was_cut(tmp_path, name):
    folder = save(tmp_path, 1)
    file = folder / f"{name}.safetensors"
    whole = file.read_bytes()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loads = {
        "model": lambda: checkpoint.load_exactly(model, checkpoint.read(folder, "model"), folder),
        "ema": lambda: checkpoint.load_exactly(model, checkpoint.read(folder, "ema"), folder),
        "optimizer": lambda: checkpoint.load_optimizer(folder, model, optimizer),
    }
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{name}\.safetensors' is truncated or not a safetensors file"):
            loads[name]()
    assert equal(before, model.state_dict())
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks .*{name}\.safetensors"):
        loads[name]()


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("name", ["model", "ema", "optimizer"])
def test_a_checkpoint_of_a_run_that_has_diverged_is_refused(tmp_path, name, value):
    """By the file and the tensor, and only if that part is read; the meter says which losses were not finite."""
    folder = save(tmp_path, 1)
    file = folder / f"{name}.safetensors"
    tensors = load_file(file)
    key = sorted(key for key, tensor in tensors.items() if tensor.ndim)[1]
    tensors[key].view(-1)[-1] = value
    save_file(tensors, file)
    with pytest.raises(
        ValueError, match=rf"{name}\.safetensors' holds values that are not finite in {key}: .* Name an ear"
    ):
        checkpoint.read(folder, name)
    assert set(checkpoint.read(folder, "ema" if name == "model" else "model")) >= {"0.weight"}
    save_file({"rows": torch.tensor([value])}, folder / "meter.safetensors")
    assert not checkpoint.read(folder, "meter")["rows"].isfinite().any()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[1]", b'"text"', b'{"format": 1', b"{}", b'{"format": 3, "step": 1}', b"\xff\xfe"]
    + [b'{"format": 1}', b'{"format": 1, "step": 1}'],
)
def test_a_damaged_record_is_named(tmp_path, content):
    folder = save(tmp_path, 1)
    (folder / "checkpoint.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"checkpoint\.json' is damaged.* Remove its folder to use the checkpoint before it\.$"
    ):
        checkpoint.read_record(folder)


def test_a_checkpoint_of_the_format_before_is_read_and_one_of_a_later_is_not_called_damaged(tmp_path):
    folder = save(tmp_path, 1)
    record = read_json(folder / "checkpoint.json")
    mhsa = {"attention": {"name": "mhsa"}}
    old = {**record, "format": 2, "config": {"sample": {"rows": 5}, "model": mhsa}}
    (folder / "checkpoint.json").write_text(json.dumps(old))
    assert checkpoint.read_record(folder)["config"] == {"sample": {"per_class": 5}, "model": mhsa}
    (folder / "checkpoint.json").write_text(json.dumps({**record, "format": 5}))
    with pytest.raises(ValueError, match="is of format 5, and this program reads 2 to 4; use the version"):
        checkpoint.read_record(folder)


SEPARATE = {"contrast_grid": "half", "embed_std": 0.02, "softmax": "separate"}


@pytest.mark.parametrize(
    ("version", "written", "meant"),
    [
        (3, {"name": "vca"}, {"name": "vca", **SEPARATE}),
        (2, {"name": "vca", "dwc": False}, {"name": "vca", "dwc": False, **SEPARATE}),
        (3, {"name": "vca", "contrast_grid": [2, 2]}, {"name": "vca", **SEPARATE, "contrast_grid": [2, 2]}),
        (3, {"name": "vca", "contrast_grid": None}, {"name": "vca", **SEPARATE}),
        (3, None, {"name": "vca", **SEPARATE}),  # it was the default
        (3, {"name": "mhsa"}, {"name": "mhsa"}),
        (4, {"name": "vca"}, {"name": "vca"}),
        (4, {"name": "vca", "softmax": "joint"}, {"name": "vca", "softmax": "joint"}),
    ],
)
def test_a_checkpoint_from_before_the_joint_softmax_means_two(tmp_path, version, written, meant):
    folder = save(tmp_path, 1)
    record = read_json(folder / "checkpoint.json")
    record |= {"format": version, "config": {"model": {"attention": written} if written else {}}}
    (folder / "checkpoint.json").write_text(json.dumps(record))
    assert checkpoint.read_record(folder)["config"]["model"]["attention"] == meant


def test_another_architecture_is_named_by_a_key_or_a_shape(tmp_path):
    folder = save(tmp_path, 1)
    with pytest.raises(
        ValueError, match=r"0\.weight of shape \(6, 3\) where \(7, 3\) is needed|0\.bias of shape \(6,\)"
    ):
        checkpoint.load_exactly(network(width=7), checkpoint.read(folder, "model"), folder)
    deeper = nn.Sequential(*network(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"another network than expected: it lacks 4\.bias, 4\.weight"):
        checkpoint.load_exactly(deeper, checkpoint.read(folder, "model"), folder)
    with pytest.raises(ValueError, match=r"has 2\.bias, 2\.num_batches_tracked, 2\.running_mean and 3 more too many"):
        checkpoint.load_exactly(nn.Sequential(*list(network())[:2]), checkpoint.read(folder, "model"), folder)


@pytest.mark.parametrize("failing", ["ema", "optimizer"])
def test_a_write_that_fails_leaves_nothing_and_keeps_the_earlier_checkpoint(tmp_path, monkeypatch, failing):
    earlier = save(tmp_path, 1)
    before = snapshot(tmp_path)
    write = checkpoint.save_file

    def full(tensors, file):
        if failing in file.name:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"checkpoint of step 2 could not be written to .*No space left on device"):
        save(tmp_path, 2)
    assert snapshot(tmp_path) == before
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == [earlier.name]
    assert checkpoint.find(tmp_path) == earlier
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 1)
    assert snapshot(tmp_path) == before


def test_leftovers_of_a_killed_process_are_not_checkpoints(tmp_path):
    folder = save(tmp_path, 1)
    shutil.copytree(folder, folder.with_name(".step-00000009-0a1b2c3d"))
    shutil.copytree(folder, folder.with_name("step-00000007.bak"))
    assert checkpoint.steps(tmp_path) == [folder]
    assert checkpoint.find(tmp_path) == folder


def test_a_checkpoint_without_its_record_is_not_passed_over(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "checkpoint.json").unlink()
    with pytest.raises(ValueError, match=r"step-00000002' lacks checkpoint\.json\. Remove its folder to use the check"):
        checkpoint.read_record(checkpoint.find(tmp_path))


DAMAGE = {
    "one bit": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "zeros": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "all zeros": lambda data: bytes(len(data)),
    "longer": lambda data: data + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", ["model", "ema", "optimizer"])
def test_a_damaged_file_is_not_believed(tmp_path, name, damage):
    folder = save(tmp_path, 1)
    file = folder / f"{name}.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"{name}\.safetensors' (is|holds) .* (before it|is taken)\.$"):
        checkpoint.read(folder, name)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "checkpoint.json"])
def test_a_file_of_another_step_is_not_believed(tmp_path, name):
    other, folder = save(tmp_path, 1), save(tmp_path, 2)
    shutil.copy(other / name, folder)
    with pytest.raises(ValueError, match=rf"{name}'.* (of another checkpoint|it is of step 1)"):
        checkpoint.read(folder, "model" if name == "checkpoint.json" else name.removesuffix(".safetensors"))


def test_files_of_a_checkpoint_from_before_checksums_are_read(tmp_path):
    folder = save(tmp_path, 1)
    record = read_json(folder / "checkpoint.json")
    del record["files"]
    (folder / "checkpoint.json").write_text(json.dumps(record))
    assert equal(checkpoint.read(folder, "model"), load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("link", ["run", "run/checkpoints"])
def test_a_link_to_a_disk_that_is_not_mounted_is_no_empty_folder(tmp_path, link):
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to("/nowhere")
    with pytest.raises(OSError, match=rf"{link}' is a link to '/nowhere', which is not there; mount its disk, or remo"):
        checkpoint.steps(tmp_path / "run")


def test_a_step_saved_again_replaces_the_earlier_try(tmp_path):
    save(tmp_path, 4, config={"try": 1})
    folder = save(tmp_path, 4, config={"try": 2})
    assert checkpoint.read_record(folder)["config"] == {"try": 2}
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]


def test_a_kill_between_the_two_renames_of_a_step_loses_nothing(tmp_path, monkeypatch):
    """A step that is saved again makes room for itself first; whoever dies there leaves the old one, which comes back."""
    folder = save(tmp_path, 4, config={"try": 1})
    rename, calls = checkpoint.os.rename, []

    def killed(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 4, config={"try": 2})
    monkeypatch.setattr(checkpoint.os, "rename", rename)
    assert checkpoint.steps(tmp_path) == []
    checkpoint.recover(tmp_path)
    assert checkpoint.steps(tmp_path) == [folder]
    assert checkpoint.read_record(folder)["config"] == {"try": 1}
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]


def test_a_kill_while_a_checkpoint_is_deleted_leaves_no_half_one(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)

    def killed(folder, ignore_errors):
        (folder / "model.safetensors").unlink()
        raise KeyboardInterrupt

    rmtree = shutil.rmtree
    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.prune(tmp_path, 1)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", rmtree)
    assert [f.name for f in checkpoint.steps(tmp_path)] == ["step-00000002"]
    checkpoint.recover(tmp_path)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


KEPT = [
    ({"newest": 1}, [6]),
    ({"newest": 2}, [5, 6]),
    ({"newest": 9}, [1, 2, 3, 4, 5, 6]),
    ({"newest": 1, "every": 2}, [2, 4, 6]),
    ({"newest": 2, "every": 3}, [3, 5, 6]),
    ({"newest": 1, "every": 4, "spare": {1, 9}}, [1, 4, 6]),
]


@pytest.mark.parametrize("options, left", KEPT)
def test_prune_keeps_the_newest_and_every_mth_and_the_spared(tmp_path, options, left):
    for step in range(1, 7):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, **options)
    assert [read_json(f / "checkpoint.json")["step"] for f in checkpoint.steps(tmp_path)] == left
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(left)


def test_what_was_to_be_kept_for_ever_is_kept_when_the_setting_goes(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, config={"train": {"keep_every": 2}})
    save(tmp_path, 5)
    checkpoint.prune(tmp_path, 1)
    assert [f.name[-1] for f in checkpoint.steps(tmp_path)] == ["2", "4", "5"]


def test_the_number_of_kept_checkpoints_is_known_beforehand(tmp_path):
    cfg = TrainConfig(num_steps=7, checkpoint_every=2, keep_checkpoints=2, keep_every=4)
    for step in (2, 4, 6, 7):
        save(tmp_path, step)
        checkpoint.prune(tmp_path, cfg.keep_checkpoints, cfg.keep_every)
    assert [int(f.name[5:]) for f in checkpoint.steps(tmp_path)] == cfg.kept() == [4, 6, 7]
    assert TrainConfig(num_steps=7, checkpoint_every=2).kept() == [2, 4, 6, 7]
