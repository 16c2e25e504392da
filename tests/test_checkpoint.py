"""Checkpoints: what comes back is what was saved, bit for bit, and a damaged or half-written one is never taken."""

import json
import shutil

import pytest
import torch
from torch import nn

from runtime import checkpoint
from runtime.ema import Ema


def network(width=6):
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.BatchNorm1d(width), nn.Linear(width, 2, bias=False))


def trained(model, steps=3):
    """An optimizer and an average with a state that is not their initial one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    ema = Ema(model, 0.9)
    for step in range(steps):
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step + 1)
    return optimizer, ema.model


def save(run, step, model=None, **given):
    model = model or network()
    optimizer, ema = trained(model)
    record = {"config": {"seed": 1}, "shape": {}, **given}
    return checkpoint.save(run, step, model=model, ema=ema, optimizer=optimizer, record=record)


def snapshot(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_model_average_and_optimizer_come_back_bit_for_bit(tmp_path):
    model = network()
    optimizer, ema = trained(model)
    folder = checkpoint.save(
        tmp_path, 3, model=model, ema=ema, optimizer=optimizer, record={"config": {"a": [1, "x"]}, "shape": {}}
    )
    assert folder == tmp_path / "checkpoints" / "step-00000003"
    assert {f.name for f in folder.iterdir()} == {f"{n}.safetensors" for n in ("model", "ema", "optimizer")} | {
        "checkpoint.json"
    }
    again, average = network(), network()
    other = torch.optim.AdamW(again.parameters(), lr=0.01, weight_decay=0.1)
    checkpoint.load_weights(folder, "model", again)
    checkpoint.load_weights(folder, "ema", average)
    checkpoint.load_optimizer(folder, again, other)
    assert equal(model.state_dict(), again.state_dict())
    assert equal(ema.state_dict(), average.state_dict())
    assert not equal(model.state_dict(), average.state_dict())
    old, new = optimizer.state_dict(), other.state_dict()
    assert old["param_groups"] == new["param_groups"]
    assert old["state"].keys() == new["state"].keys()
    assert all(equal(old["state"][i], new["state"][i]) for i in old["state"])
    read = checkpoint.read_record(folder)
    assert len(read.pop("id")) == 32
    assert read == {"shape": {}, **{"format": 1, "step": 3, "config": {"a": [1, "x"]}}}

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


@pytest.mark.parametrize("name", ["model", "ema", "optimizer"])
def test_a_truncated_file_is_named_at_whatever_length_it_was_cut(tmp_path, name):
    folder = save(tmp_path, 1)
    file = folder / f"{name}.safetensors"
    whole = file.read_bytes()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loads = {
        "model": lambda: checkpoint.load_weights(folder, "model", model),
        "ema": lambda: checkpoint.load_weights(folder, "ema", model),
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


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[1]", b'"text"', b'{"format": 1', b"{}", b'{"format": 2, "step": 1}', b"\xff\xfe"]
    + [b'{"format": 1}', b'{"format": 1, "step": 1}'],
)
def test_a_damaged_record_is_named(tmp_path, content):
    folder = save(tmp_path, 1)
    (folder / "checkpoint.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.json' is damaged or not a checkpoint's record"):
        checkpoint.read_record(folder)


def test_another_architecture_is_named_by_a_key_or_a_shape(tmp_path):
    folder = save(tmp_path, 1)
    with pytest.raises(
        ValueError, match=r"0\.weight of shape \(6, 3\) where \(7, 3\) is needed|0\.bias of shape \(6,\)"
    ):
        checkpoint.load_weights(folder, "model", network(width=7))
    deeper = nn.Sequential(*network(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"another architecture .*lacks 4\.bias, 4\.weight"):
        checkpoint.load_weights(folder, "model", deeper)
    with pytest.raises(ValueError, match=r"has 2\.bias, 2\.num_batches_tracked, 2\.running_mean and 3 more too many"):
        checkpoint.load_weights(folder, "model", nn.Sequential(*list(network())[:2]))


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
    unfinished = folder.with_name("step-00000008")
    shutil.copytree(folder, unfinished)
    (unfinished / "checkpoint.json").unlink()
    shutil.copytree(folder, folder.with_name("step-00000007.bak"))
    assert checkpoint.steps(tmp_path) == [folder]
    assert checkpoint.find(tmp_path) == folder
    with pytest.raises(ValueError, match="is not a checkpoint"):
        checkpoint.find(unfinished)


def test_a_step_saved_again_replaces_the_earlier_try(tmp_path):
    save(tmp_path, 4, config={"try": 1})
    folder = save(tmp_path, 4, config={"try": 2})
    assert checkpoint.read_record(folder)["config"] == {"try": 2}
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("keep, left", [(1, [4]), (2, [3, 4]), (4, [1, 2, 3, 4]), (9, [1, 2, 3, 4])])
def test_prune_keeps_the_newest(tmp_path, keep, left):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, keep)
    assert [json.loads((f / "checkpoint.json").read_text())["step"] for f in checkpoint.steps(tmp_path)] == left
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(left)


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_has_its_closed_form(warmup):
    """w_ema after k updates is the start times all decays, plus each w_j times (1 - d_j) and the decays after it."""
    model = nn.Linear(3, 2).double()
    ema = Ema(model, 0.9, warmup)
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert not ema.model.training
    weights, decays = [model.weight.detach().clone()], []
    for step in range(1, 200):
        with torch.no_grad():
            model.weight.normal_()
        ema.update(model, step)
        weights.append(model.weight.detach().clone())
        decays.append(min(0.9, (1 + step) / (10 + step)) if warmup else 0.9)
        if step in (1, 2, 100, 199):
            after = (
                torch.tensor([1.0, *decays[:0:-1]], dtype=torch.float64).cumprod(0).flip(0)
            )  # product of later decays
            expected = weights[0] * torch.tensor(decays, dtype=torch.float64).prod()
            for w, d, later in zip(weights[1:], decays, after, strict=True):
                expected = expected + (1 - d) * later * w
            torch.testing.assert_close(ema.model.weight.detach(), expected, rtol=1e-12, atol=1e-14)
