"""Weights in the wrappings of training scripts: the right network is found among all that was saved, and no code runs."""

import argparse
import collections
import datetime
import os
import pathlib
import random
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sit_vca import SiT
from vca_engine.weights.diffusers import to_diffusers
from vca_engine.weights.files import HARMLESS, read_weights
from vca_engine.weights.published import read_published
from vca_engine.weights.wrappings import find_networks

TINY = {"input_size": 8, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 10, "attention": "mhsa"}
OPTIMIZER = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}


def state_dict(seed):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(value.shape, generator=generator) for key, value in SiT(**TINY).state_dict().items()}


RAW, AVERAGE, OTHER = state_dict(0), state_dict(1), state_dict(2)
SMALLER = {key: value for key, value in OTHER.items() if not key.startswith("blocks.1.")}


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def in_blocks(wrapper, state):
    """The keys as of a network whose blocks are wrapped one by one."""
    return {key.replace("blocks.0.", f"blocks.0.{wrapper}.").replace("blocks.1.", f"blocks.1.{wrapper}."): value
            for key, value in state.items()}  # fmt: skip


SHADOW = {"decay": 0.999, "num_updates": 5, "shadow_params": list(AVERAGE.values()), "collected_params": None}
FLATTENED = {f"model_ema.{key.replace('.', '')}": value for key, value in AVERAGE.items()}
WRAPPED = {  # what a script has saved, and which weights are meant
    "published": ({"model": RAW, "ema": AVERAGE, "opt": OPTIMIZER, "args": argparse.Namespace(lr=1e-4)}, AVERAGE),
    "blocks compiled one by one": ({"model": in_blocks("_orig_mod", RAW)}, RAW),
    "fsdp": ({"state_dict": under("_fsdp_wrapped_module.", in_blocks("_fsdp_wrapped_module", RAW))}, RAW),
    "module.model._orig_mod": (under("module.model._orig_mod.", RAW), RAW),
    "net": ({"state_dict": under("net.", RAW), "epoch": 3}, RAW),
    "under module": ({"module": RAW, "global_steps": 3, "dp_world_size": 1}, RAW),
    "two prefixes": ({"state_dict": {**under("model.", RAW), **under("ema_model.", AVERAGE), "w": torch.ones(1)}}, AVERAGE),
    "online and average in one": ({"ema": {**under("online_model.", RAW), **under("ema_model.", AVERAGE), "step": torch.ones(1)}}, AVERAGE),
    "ema_model": ({"model": RAW, "ema_model": under("module.", AVERAGE)}, AVERAGE),
    "params_ema": ({"params": RAW, "params_ema": AVERAGE}, AVERAGE),
    "state_dict_ema": ({"state_dict": RAW, "state_dict_ema": AVERAGE, "arch": "dit"}, AVERAGE),
    "ema_state_dict": ({"model_state_dict": RAW, "ema_state_dict": AVERAGE, "optimizer_state_dict": OPTIMIZER}, AVERAGE),
    "averaged by torch": ({"model": RAW, "averaged_model": {**under("module.", AVERAGE), "n_averaged": torch.tensor(3)}}, AVERAGE),
    "heads of an alignment": ({"ema": {**AVERAGE, "projectors.0.0.weight": torch.ones(2, 2)}, "steps": 4}, AVERAGE),
    "beside names without dots": ({"state_dict": {**under("model.", RAW), **FLATTENED}}, RAW),
    "an optimizer of the same names": ({"optimizer": {"exp_avg": OTHER}, "net_state_dict": RAW}, RAW),
    "deep": ({"trainer": {"parts": [{"x": {"model": under("module.net.", RAW)}}]}}, RAW),
    "a smaller one first": ({"ema_of_guide": SMALLER, "model": RAW}, RAW),
    "a word with ema in it": ({"schema": OTHER, "ema": AVERAGE}, AVERAGE),
    "keys of diffusers": ({"ema": under("module.", to_diffusers(AVERAGE)), "model": to_diffusers(RAW)}, AVERAGE),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", WRAPPED)
def test_the_weights_are_found_in_what_a_script_has_saved(tmp_path, name, zipped):
    content, meant = WRAPPED[name]
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = read_weights(tmp_path / "w.pt").tensors
    meant = {key: meant[key] for key in meant.keys() - ({"pos_embed"} if "diffusers" in name else set())}
    assert tensors.keys() == meant.keys()
    assert all(torch.equal(tensors[key], meant[key]) for key in meant)


@pytest.mark.parametrize("state", [under("module.", in_blocks("_orig_mod", RAW)), under("ema.", RAW)])
def test_wrappers_are_left_out_of_safetensors_too(tmp_path, state):
    save_file(state, tmp_path / "w")
    tensors = read_weights(tmp_path / "w").tensors
    assert tensors.keys() == RAW.keys()
    assert all(torch.equal(tensors[key], RAW[key]) for key in RAW)


def test_several_averages_and_one_without_names_are_told(tmp_path):
    torch.save({"ema1": AVERAGE, "ema2": OTHER}, tmp_path / "two.pt")
    with pytest.warns(UserWarning, match=r"two.pt' holds several networks of one size; ema1 is taken, not ema2\.$"):
        assert torch.equal(read_weights(tmp_path / "two.pt").tensors["pos_embed"], AVERAGE["pos_embed"])
    torch.save({"model": RAW, "ema": SHADOW}, tmp_path / "list.pt")
    with pytest.warns(UserWarning, match=r"averaged weights as a list without names, .*; model is taken, which is not"):
        assert torch.equal(read_weights(tmp_path / "list.pt").tensors["pos_embed"], RAW["pos_embed"])


def harmless():
    """What scripts keep beside the weights: a value each of the types that are left unread."""
    logs = collections.defaultdict(list)
    logs["loss"].append(np.float64(1.0))
    return {
        "logs": logs,
        "counts": collections.defaultdict(dict, a={"b": 1}),
        "epoch": np.int64(3),
        "metric": np.float32(0.5),
        "table": np.arange(6.0).reshape(2, 3),
        "words": np.array(["a", "b"]),
        "objects": np.array([None, {"a": 1}], dtype=object),
        "where": pathlib.Path("/data/x"),
        "windows": pathlib.PureWindowsPath("C:/x"),
        "when": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        "order": collections.OrderedDict(a=1),
        "rng": {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()},
    }


@pytest.mark.parametrize("name", [*harmless(), "all"])
def test_harmless_values_beside_the_weights_are_no_hindrance(tmp_path, name):
    beside = harmless() if name == "all" else {name: harmless()[name]}
    weights = collections.defaultdict(dict, RAW)
    args = argparse.Namespace(model="SiT-B/2", results_dir=pathlib.Path("x"), lr=np.float64(1e-4))
    torch.save({**beside, "model": weights, "args": args}, tmp_path / "w.pt")
    found = read_weights(tmp_path / "w.pt")
    assert found.options == {"model": "SiT-B/2"}
    assert all(torch.equal(found.tensors[key], RAW[key]) for key in RAW)


class Call:
    """Pickled, a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["beside", "within", "in an array", "as a factory"])
@pytest.mark.parametrize("function", [os.system, exec, eval, __import__, getattr, open], ids=lambda f: f.__name__)
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, function, place):
    fired = tmp_path / "fired"
    words = {"system": f"touch {fired}", "open": str(fired), "__import__": "this", "getattr": "x"}
    bomb = Call(function, words.get(function.__name__, f"open({str(fired)!r}, 'w')"), *["w"] * (function is open))
    content = {
        "beside": {"model": RAW, "x": bomb},
        "within": {"model": {**RAW, "x": bomb}},
        "in an array": {"model": RAW, "x": np.array([bomb, None], dtype=object)},
        "as a factory": {"model": RAW, "x": Call(collections.defaultdict, bomb)},
    }[place]
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w.pt' holds a \S*(system|exec|eval|__import__|getattr|open), and loading"):
        read_weights(tmp_path / "w.pt")
    assert not fired.exists()


def test_nothing_that_is_let_through_can_do_anything():
    modules = {name.split(".")[0] for name in HARMLESS}
    assert modules == {"builtins", "datetime", "numpy", "pathlib"}
    called = {"eval", "exec", "getattr", "open", "compile", "type", "map", "object"}
    assert not called & {name.rpartition(".")[2] for name in HARMLESS}


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ({"cls_token": torch.zeros(1), "blocks.0.attn.qkv.weight": torch.zeros(3)}, "cls_token, blocks.0.attn.qkv.weight"),
        ({"model": {f"layer{i}": torch.zeros(1) for i in range(9)}}, "model.layer0, .*, model.layer4 and 4 more"),
        ({"config": {"a": 1}, "epoch": 3}, "config, epoch"),
        ([1, 2], "no names"),
    ],
)  # fmt: skip
def test_what_holds_no_dit_names_what_it_holds(tmp_path, content, keys):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=rf"w.pt' holds no state dict, .*, of a DiT or SiT: .* It holds {keys}\. Give"):
        read_weights(tmp_path / "w.pt")


def test_a_single_file_of_diffusers_is_not_drawn_from(tmp_path):
    torch.save({"model": to_diffusers(RAW)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w.pt' holds a DiT under diffusers' keys, .*; give the whole folder"):
        read_published(tmp_path / "w.pt")


def test_what_holds_itself_is_searched_once():
    content = {"model": RAW}
    content["self"] = content
    inner = []
    for _ in range(100_000):
        inner = [inner]
    assert [str(found) for found in find_networks({**content, "deep": inner})] == ["model"]
