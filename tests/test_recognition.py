"""Recognisers are trained as generators are: one step, one checkpoint, exact resume; timm's recipe without its state."""

import copy
import itertools
import json
import random
import re

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy

import export
import sample
import train
from classify import Classification, create
from classify.block import DropPath, draw_paths
from vca import VisualContrastAttention
from vca_engine import assemble
from vca_engine.config.cli import parse
from vca_engine.config.schema import Config, TrainConfig
from vca_engine.images import from_uint8
from vca_engine.images.datasets import Digits, ImageDataset
from vca_engine.images.labels import DataInfo
from vca_engine.training import reconstruct
from vca_engine.training.dry_run import count_saved
from vca_engine.training.step import learning_rate
from vca_engine.weights import checkpoint
from vca_engine.weights.recogniser import initialise_recogniser

pytestmark = pytest.mark.usefixtures("as_in_a_new_process")
SMALL = (
    "--process.name classify --process.min_area 0.5 --data.name digits --codec.name pixels --model.name deit_tiny "
    "--model.patch_size 2 --model.hidden_size 12 --model.depth 2 --model.num_heads 2 --model.drop_path 0.3 "
    "--train.batch_size 8 --train.lr 1e-2 --train.weight_decay 0.1 --train.num_workers 0 --train.log_every 1 "
    "--train.ema_decay 0.9 --train.tracker none --train.max_grad_norm 1 --eval.data.split test --eval.crop 1"
)


def settings(folder, num_steps, extra=""):
    return [*SMALL.split(), "--run_dir", str(folder), "--train.num_steps", str(num_steps), *extra.split()]


def run(folder, num_steps, extra=""):
    train.main(settings(folder, num_steps, extra))
    return folder


def sentence(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2
    (line,) = re.findall(r"train\.py: .*", capsys.readouterr().err)
    return line


def tensors(folder):
    newest = checkpoint.find(folder)
    return {f"{f.stem} {k}": v for f in newest.glob("*.safetensors") for k, v in load_file(f).items()}


def metrics(folder):
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "memory_gib")} for line in lines]


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


@pytest.mark.parametrize("extra", ["", "--train.accumulate 2 --train.num_workers 1"], ids=["", "accumulated"])
def test_n_and_n_steps_are_2n_steps_bit_for_bit(tmp_path, extra):
    """Views, mixtures, dropped branches, averages, optimizer, losses and accuracies."""
    a, b = run(tmp_path / "whole", 6, extra), run(tmp_path / "parts", 3, extra)
    random.seed(5)  # whatever else draws from the global generators
    np.random.seed(5)
    torch.manual_seed(5)
    run(b, 6, extra)
    assert_same(tensors(a), tensors(b))
    assert {k.split()[0] for k in tensors(a)} == {"model", "ema", "ema-0.05", "ema-0.1", "optimizer", "meter"}
    assert metrics(a) == metrics(b)
    assert [line["step"] for line in metrics(a)] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "grad_norm", "lr"} <= metrics(a)[0].keys()
    assert "loss_by_t" not in metrics(a)[0]
    first, second = ((folder / "eval.jsonl").read_text().splitlines()[-1] for folder in (a, b))
    assert first == second
    assert json.loads(first)["num_samples"] == 500


def test_accumulation_changes_the_run_by_rounding_only(tmp_path):
    a, b = run(tmp_path / "a", 3), run(tmp_path / "b", 3, "--train.accumulate 4")
    for one, other in zip(metrics(a), metrics(b), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


class TestMixing:
    @pytest.mark.parametrize("options", [{"mixup": 0.8, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}, {}])
    def test_a_pair_is_mixed_as_timm_does(self, options):
        """timm mixes a batch with its reverse, which of two images is the other."""
        process, theirs = Classification(**options), {"mixup": 0.8, "cutmix": 1.0, **options}
        mixer = Mixup(theirs["mixup"], theirs["cutmix"], label_smoothing=0.1, num_classes=5)
        x, y = torch.randn(2, 3, 16, 16), torch.tensor([1, 4])
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 5))
        for step in range(12):
            lam, rectangle = process.draw_mixing(x.shape, 1000 + step)
            mixer._params_per_batch = lambda lam=lam, cut=rectangle is not None: (lam, cut)
            with pytest.MonkeyPatch.context() as patch:
                top, bottom, left, right = rectangle or (0, 0, 0, 0)
                found = (top, bottom, left, right), lam
                patch.setattr("timm.data.mixup.cutmix_bbox_and_lam", lambda *_, found=found, **__: found)
                mixed, target = mixer(x.clone(), y)
            seen = []
            process.draw_mixing = lambda *_, lam=lam, rectangle=rectangle: (lam, rectangle)
            losses = process.loss(lambda x, seen=seen: seen.append(x) or network(x), x, y, seed=0, step=step)
            del process.draw_mixing
            torch.testing.assert_close(seen[0], mixed)
            torch.testing.assert_close(losses.mean(), SoftTargetCrossEntropy()(network(mixed), target))

    def test_lam_and_the_kind_are_drawn_as_timm_says(self):
        """Beta(0.8, 0.8) in mixup: mean 1/2, variance 1 / (4 (2 0.8 + 1)); half of the steps are cutmix."""
        drawn = [Classification().draw_mixing(torch.Size([2, 3, 224, 224]), seed) for seed in range(2000)]
        mixup = np.array([lam for lam, rectangle in drawn if rectangle is None])
        assert len(mixup) == pytest.approx(1000, abs=4 * 500**0.5)
        assert mixup.mean() == pytest.approx(0.5, abs=4 * (0.0962 / len(mixup)) ** 0.5)
        assert mixup.var() == pytest.approx(1 / (4 * 2.6), rel=0.15)
        for lam, rectangle in drawn:
            if rectangle:
                top, bottom, left, right = rectangle
                assert lam == pytest.approx(1 - (bottom - top) * (right - left) / 224**2)

    def test_without_mixing_it_is_the_smoothed_cross_entropy(self):
        process = Classification(mixup=0.0, cutmix=0.0, smoothing=0.2)
        logits, y = torch.randn(3, 5), torch.tensor([0, 4, 2])
        losses = process.loss(lambda x: logits, torch.randn(3, 1, 4, 4), y, seed=0, step=0)
        target = 0.8 * F.one_hot(y, 5) + 0.2 / 5
        torch.testing.assert_close(losses, -(target * logits.log_softmax(1)).sum(1))


class TestDropPath:
    def test_a_branch_is_left_out_as_a_function_of_seed_and_position(self):
        model = create("deit_tiny", num_classes=3, image_size=32, drop_path_rate=0.9).train()
        paths = [m for m in model.modules() if isinstance(m, DropPath)]
        assert len(paths) == 22  # of 12 blocks all but the first, whose rate is 0
        assert not any(isinstance(m, timm.layers.DropPath) for m in model.modules())
        x = torch.randn(4, 3, 32, 32)
        draw_paths(model, 1, torch.arange(4))
        whole = model(x)
        torch.manual_seed(3)
        torch.testing.assert_close(model(x), whole)
        draw_paths(model, 1, torch.arange(2, 4))
        torch.testing.assert_close(model(x[2:]), whole[2:])
        draw_paths(model, 2, torch.arange(4))
        assert (model(x) - whole).abs().max() > 1e-3

    @pytest.mark.parametrize("name", ["deit_tiny", "pvt_tiny", "swin_tiny", "cswin_tiny"])
    @pytest.mark.parametrize("attention", ["own", "vca"])
    def test_the_rates_grow_linearly_over_all_blocks(self, name, attention):
        with torch.device("meta"):
            model = create(name, attention, drop_path_rate=0.2)
        rates = [m.rate for m in model.modules() if isinstance(m, DropPath) and m.rate]
        num = {"deit_tiny": 12, "pvt_tiny": 8, "swin_tiny": 12, "cswin_tiny": 25}[name]
        assert rates == pytest.approx([0.2 * i / (num - 1) for i in range(1, num) for _ in range(2)])

    def test_the_mean_is_kept(self):
        path = DropPath(0.25).train()
        x = torch.ones(20_000, 1)
        assert path(x).mean() == pytest.approx(1, abs=4 * (0.25 / 0.75 / 20_000) ** 0.5)
        assert path(x).unique().tolist() == pytest.approx([0, 4 / 3])
        assert torch.equal(path.eval()(x), x)


class TestGradientCheckpointing:
    """The backward pass computes each block again, with the same branches left out."""

    @staticmethod
    def gradients(network, x, changed=lambda network: None):
        """Those of the squares of the logits, and the bytes that were kept for them."""
        network = copy.deepcopy(network)
        changed(network)
        draw_paths(network, 1, torch.arange(2))
        paths = [m for m in network.modules() if isinstance(m, DropPath) and m.rate]
        assert any((path.u < path.rate).any() for path in paths)
        with count_saved(network) as saved:
            loss = network(x).square().sum()
        loss.backward()
        return {name: p.grad for name, p in network.named_parameters()}, saved.num_bytes

    @pytest.mark.parametrize("attention", ["own", "vca"])
    @pytest.mark.parametrize("name", ["deit_tiny", "pvt_tiny", "swin_tiny", "cswin_tiny"])
    def test_it_changes_the_memory_and_no_bit_of_a_gradient(self, name, attention):
        """The same operations on the same numbers."""
        size = 224 if (name, attention) == ("swin_tiny", "own") else 32
        network = create(name, attention, num_classes=3, image_size=size, drop_path_rate=0.3)
        x = torch.randn(2, 3, size, size)
        expected, all_kept = self.gradients(network, x)
        found, kept = self.gradients(network, x, assemble.recompute_blocks)
        assert_same(found, expected)
        assert kept < all_kept / 3

    def test_torch_compile_sees_the_blocks(self):
        """All of them in a few graphs; gradients to 1e-5 of the largest, since sums may run in another order."""
        torch._dynamo.reset()
        graphs = torch._dynamo.utils.counters["stats"]
        before = graphs["unique_graphs"]

        def changed(network):
            assemble.recompute_blocks(network)
            for block in assemble.blocks(network):
                block.compile(backend="aot_eager")

        sizes = {"patch_size": 4, "depth": 5, "hidden_size": 24, "num_heads": 2}
        network = create("deit_tiny", num_classes=3, image_size=32, drop_path_rate=0.3, **sizes)
        x = torch.randn(2, 3, 32, 32)
        expected, all_kept = self.gradients(network, x)
        found, kept = self.gradients(network, x, changed)
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())
        assert kept < all_kept / 3
        assert 1 <= graphs["unique_graphs"] - before <= 3  # of five; the first has no drop path

    def test_a_run_with_it_is_the_run_without_it(self, tmp_path, monkeypatch):
        """And each of its two layers is computed once more in each of three steps."""
        calls, forward = [], VisualContrastAttention.forward
        monkeypatch.setattr(
            VisualContrastAttention, "forward", lambda *given, **more: calls.append(1) or forward(*given, **more)
        )
        a, without = run(tmp_path / "a", 3), len(calls)
        b = run(tmp_path / "b", 3, "--train.grad_checkpointing true")
        assert_same(tensors(a), tensors(b))
        assert len(calls) == 2 * without + 2 * 3


class TestViews:
    def test_a_view_is_a_function_of_seed_and_position(self):
        views = Classification(min_area=0.3, augment="none").training_views(Digits(), seed=1)
        again = Classification(min_area=0.3, augment="none").training_views(Digits(), seed=2)
        before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
        x, y = views[(5, False, 77)]
        assert x.shape == (1, 8, 8)
        assert torch.equal(x, views[(5, False, 77)][0])
        assert not torch.equal(x, views[(5, False, 78)][0])
        assert not torch.equal(x, again[(5, False, 77)][0])
        assert y == Digits().labels[5]
        assert random.getstate() == before[0]
        assert np.array_equal(np.random.get_state()[1], before[1])
        assert torch.equal(torch.get_rng_state(), before[2])

    def test_all_of_an_image_is_the_image(self):
        process = Classification(min_area=1.0, augment="none", colour_jitter=0.0, erasing=0.0)
        expected = Digits()[(3, False)][0]
        for views in (process.training_views(Digits(), seed=0), process.evaluation_views(Digits(), 1.0)):
            torch.testing.assert_close(views[3][0], expected, atol=1e-6, rtol=0)

    def test_an_image_is_seen_whole_not_as_the_crop_of_the_generators(self, tmp_path):
        """The right third of a wide image is beyond a centre crop, and in some of the views."""
        (tmp_path / "a").mkdir()
        wide = np.zeros((24, 72, 3), dtype=np.uint8)
        wide[:, 50:] = 255
        Image.fromarray(wide).save(tmp_path / "a" / "wide.png")
        from vca_engine.images.datasets import Folder

        data = Folder(images=str(tmp_path), image_size=24)
        assert data[(0, False)][0].max() == -1
        views = Classification(augment="none", colour_jitter=0, erasing=0).training_views(data, seed=0)
        assert max(float(views[(0, False, p)][0].max()) for p in range(20)) > 2  # white, normalised


def test_weights_decay_and_gains_and_biases_do_not(tmp_path):
    """One step with a gradient of zero: what is decayed shrinks by lr times weight_decay."""
    folder = run(tmp_path / "run", 1, "--train.warmup_steps 0")
    config = checkpoint.read_record(checkpoint.find(folder))["config"]
    assert config["model"]["attention"]["softmax"] == "joint"
    assert "contrast_grid" not in config["model"]["attention"]

    from vca_engine.config.reading import from_dict
    from vca_engine.training.run import Run, make_accelerator

    config = from_dict(Config, config, "test")
    made = Run(config, make_accelerator(config), checkpoint.find(folder))
    decays = {id(p): g["weight_decay"] for g in made.optimizer.param_groups for p in g["params"]}
    for name, p in made.network.named_parameters():
        assert decays[id(p)] == (0.1 if p.ndim > 1 else 0.0), name
        state = made.optimizer.state[p]
        assert state["exp_avg"].shape == p.shape  # found by its name, not by the order of the model
        saved = load_file(checkpoint.find(folder) / "optimizer.safetensors")
        assert torch.equal(state["exp_avg_sq"], saved[f"{name}/exp_avg_sq"])
    assert made.network.get_parameter("blocks.0.attn.positive_embed").ndim == 3


def test_the_best_accuracy_is_kept(tmp_path, monkeypatch):
    counts = iter([[300, 400, 500], [100, 450, 500], [200, 400, 500], [250, 400, 500]])
    monkeypatch.setattr("vca_engine.training.outputs.count_correct", lambda *_: torch.tensor(next(counts)))
    folder = run(tmp_path / "run", 4, "--eval.every 1 --train.checkpoint_every 1 --train.keep_checkpoints 1")
    assert json.loads((folder / "best.json").read_text()) == {"top1-500": {"value": 60.0, "step": 1}}
    assert [f.name for f in checkpoint.steps(folder)] == ["step-00000001", "step-00000004"]
    lines = [json.loads(text) for text in (folder / "eval.jsonl").read_text().splitlines()]
    assert [(line["step"], line["top1"], line["top5"]) for line in lines] == [
        (1, 60.0, 80.0),
        (2, 20.0, 90.0),
        (3, 40.0, 80.0),
        (4, 50.0, 80.0),
    ]


def test_an_evaluation_that_is_missing_is_made_up_for(tmp_path):
    folder = run(tmp_path / "run", 2)
    text = (folder / "eval.jsonl").read_text()
    (folder / "eval.jsonl").unlink()
    run(folder, 2)
    assert (folder / "eval.jsonl").read_text() == text


def test_the_schedule_of_pvt():
    """Warm-up from a rate, cosine to a rate, which the cool-down keeps."""
    cfg = TrainConfig(
        num_steps=100, lr=1.0, schedule="cosine", warmup_lr=0.1, warmup_steps=10, min_lr=0.2, cooldown_steps=20
    )
    rates = [learning_rate(cfg, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 + 0.09 * k for k in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[45] == pytest.approx(0.6)  # in the middle of 10 and 80
    assert rates[80:] == pytest.approx([0.2] * 20)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_a_recogniser_learns_the_digits(tmp_path):
    plain = "--process.mixup 0 --process.cutmix 0 --process.augment none --process.colour_jitter 0 --process.erasing 0 "
    plain += "--model.hidden_size 64 --model.num_heads 4 --model.drop_path 0 --process.min_area 1 "
    plain += (
        "--train.batch_size 64 --train.lr 5e-3 --train.warmup_steps 10 --train.schedule cosine --train.log_every 20"
    )
    folder = run(tmp_path / "run", 80, plain)
    assert json.loads((folder / "eval.jsonl").read_text())["top1"] > 50  # by chance it is 10


def test_a_dry_run_keeps_one_picture(tmp_path, capsys):
    run(tmp_path / "run", 50, "--dry-run --train.schedule cosine --train.cooldown_steps 5")
    said = capsys.readouterr().out
    assert "every step works; nothing was kept" in said
    assert "VisionTransformer" in said
    assert "previews" not in said
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == ["run", "run/data.png"]


def test_views_as_pixels_are_the_images_that_timm_normalised():
    """Without augmentation they are the images themselves, to the rounding of float32 (numbers up to 3)."""
    pixels = np.random.default_rng(0).integers(256, size=(2, 16, 16, 3), dtype=np.uint8)

    class Pair(ImageDataset):
        def pixels(self, index):
            return pixels[index]

    images = Pair([0, 1], ["a", "b"], image_size=16, channels=3, flip=False)
    views = Classification(mixup=0, cutmix=0, augment="none", colour_jitter=0, erasing=0, min_area=1)
    views = views.training_views(images, seed=0)
    x = torch.stack([views[k, False, k][0] for k in range(2)])
    torch.testing.assert_close(views.to_pixels(x), from_uint8(pixels), atol=1e-5, rtol=0)


MISTAKES = [
    ("--model.name deit_tny", "model is 'deit_tny'; did you mean 'deit_tiny'?"),
    ("--model.size B/2", "model.size is 'B/2', for which process classify has no use; leave it out."),
    ("--sample.cfg_scale 4", "sample.cfg_scale is 4.0, for which process classify has no use; leave it out."),
    ("--fid.reference x.npz --fid.every 5", "fid.every is 5, for which process classify has no use; leave it out."),
    ("--latents lat", "latents is 'lat', for which process classify has no use; leave it out."),
    ("--cache.batch_size 3", "cache.batch_size is 3, for which process classify has no use; leave it out."),
    ("--train.preload true", "train.preload is True, for which process classify has no use; leave it out."),
    ("--codec.name vae --codec.path x", "codec.name is 'vae'; a recogniser looks at pixels, so choose pixels."),
    ("--model.patch_size 3", "image_size is 8, which the patches of deit_tiny with attention vca do not divide"),
    ("--model.name swin_tiny", "swin_tiny takes no patch_size; only a deit_tiny, deit_small or deit_base does."),
    ("--process.mixup -1", "process.mixup is -1.0; choose at least 0"),
    ("--process.min_area 0", "process.min_area is 0; choose above 0"),
    ("--process.augment rnd-m9", "process.augment is 'rnd-m9', which timm does not know"),
    ("--train.accumulate 8", "a process has 1 images at a time, of which mixup and cutmix mix two neighbours"),
    ("--eval.data.split train", "eval.data is data itself, which tells nothing"),
    ("--eval.data.name mnist", "eval.data has image_size 32, and the network takes 8; choose the same."),
    ("--train.min_lr 1e-3", "train.min_lr is of the cosine schedule"),
    ("--train.warmup_lr 1e-3", "train.warmup_lr is given, but no train.warmup_steps"),
    ("--train.warmup_lr 1 --train.warmup_steps 2", "train.warmup_lr is 1.0; choose at most train.lr, 0.01."),
    (
        "--train.schedule cosine --train.cooldown_steps 2",
        "train.cooldown_steps is 2; warm-up and cool-down have to leave",
    ),
]


@pytest.mark.parametrize(("extra", "said"), MISTAKES)
def test_a_mistake_is_a_sentence(tmp_path, capsys, extra, said):
    assert said in sentence(capsys, settings(tmp_path / "run", 2, extra))
    assert not (tmp_path / "run").exists()


def test_a_generator_refuses_what_is_of_recognisers(tmp_path, capsys):
    argv = ["--process.name", "flow", "--data.name", "digits", "--codec.name", "pixels", "--train.num_steps", "1"]
    for extra, said in [
        ("--model.name deit_tiny", "model.name is 'deit_tiny', for which process flow has no use; leave it out."),
        ("--eval.data.split test", "eval.data is {'split': 'test'}, for which process flow has no use; leave it out."),
    ]:
        assert said in sentence(capsys, [*argv, "--run_dir", str(tmp_path / "run"), *extra.split()])


def test_evaluation_every_so_often_needs_images(tmp_path, capsys):
    argv = [word for word in settings(tmp_path / "run", 2) if word not in ("--eval.data.split", "test")]
    assert "eval.every is given, but no eval.data" in sentence(capsys, [*argv, "--eval.every", "2"])


TABLES = ("positive_embed", "negative_embed", "relative_position_bias_table")


class TestInit:
    """Weights of another image size, attention, or other classes."""

    @pytest.fixture
    def save(self, tmp_path):
        def save(model, name="weights.safetensors"):
            save_file(model.state_dict(), tmp_path / name)
            return str(tmp_path / name)

        return save

    @pytest.mark.parametrize("name", ["deit_tiny", "pvt_tiny", "swin_tiny", "cswin_tiny"])
    @pytest.mark.parametrize("attention", ["own", "vca"])
    def test_another_image_size_gives_nearly_the_same_features(self, save, name, attention):
        """And the tables that depend on the size are interpolated: that of a constant is that constant."""
        small, large = (64, 96) if name in ("deit_tiny", "pvt_tiny") else (32, 64)
        if attention == "own" and name == "swin_tiny":
            small, large = 224, 448
        old, new = (create(name, attention, num_classes=3, image_size=size) for size in (small, large))
        for key, tensor in old.state_dict().items():
            if key.endswith(TABLES) or "pos_embed" in key:
                tensor.fill_(0.25)
        result = initialise_recogniser(new, save(old), ["a", "b", "c"])
        assert result.missing == result.unused == []
        for key, tensor in new.state_dict().items():
            if key.endswith(TABLES) or "pos_embed" in key:
                assert tensor.allclose(torch.tensor(0.25)), key
            else:
                assert torch.equal(tensor, old.state_dict()[key]), key

    def test_positions_go_where_they_were(self, save):
        """A linear table stays linear inside, and the class token's row stays."""
        old, new = (create("deit_tiny", "own", num_classes=3, image_size=size) for size in (64, 128))
        ramp = torch.arange(4.0).repeat(4)[:, None].expand(16, 192)
        old.pos_embed.data = torch.cat([torch.full((1, 192), 7.0), ramp])[None]
        initialise_recogniser(new, save(old), ["a", "b", "c"])
        assert torch.equal(new.pos_embed[0, 0], torch.full((192,), 7.0))
        row = new.pos_embed[0, 1:].unflatten(0, (8, 8))[3, :, 0]
        assert row[2:6].tolist() == pytest.approx([0.75, 1.25, 1.75, 2.25], abs=0.05)

    def test_timms_weights_start_a_deit_with_vca(self, save):
        theirs = timm.create_model("deit_tiny_patch16_224", num_classes=1000)
        new = create("deit_tiny", num_classes=7)
        head = new.head.weight.clone()
        result = initialise_recogniser(new, save(theirs), [str(k) for k in range(7)])
        assert torch.equal(new.blocks[3].attn.qkv.weight, theirs.blocks[3].attn.qkv.weight)
        assert torch.equal(new.head.weight, head)
        said = str(result)
        assert "head.weight (0 of 1000 classes; 7 keep their initial values)" in said
        assert "blocks.*.attn.positive_embed" in said
        same = create("deit_tiny", "own")
        initialise_recogniser(same, save(theirs), [str(k) for k in range(1000)])
        x = torch.randn(1, 3, 224, 224)
        assert torch.equal(same.eval()(x), theirs.eval()(x))

    def test_rows_of_the_head_go_by_the_names_of_the_classes(self, tmp_path):
        folder = run(tmp_path / "run", 1)
        new = create(
            "deit_tiny", num_classes=2, image_size=8, in_channels=1, patch_size=2, hidden_size=12, depth=2, num_heads=2
        )
        initial = new.head.weight.clone()
        result = initialise_recogniser(new, str(folder), ["7", "cat"])
        old = load_file(checkpoint.find(folder) / "ema.safetensors")["head.weight"]
        assert torch.equal(new.head.weight[0], old[7])
        assert torch.equal(new.head.weight[1], initial[1])
        assert result.changed["head.weight"] == "1 of 10 classes; 1 keep their initial values"

    def test_a_run_says_what_it_starts_from(self, tmp_path, capsys):
        folder = run(tmp_path / "run", 1)
        capsys.readouterr()
        run(tmp_path / "next", 1, f"--init {folder} --model.attention.name own")
        assert (
            "not in the model, so unused: blocks.*.attn.dwc.bias, blocks.*.attn.dwc.weight" in capsys.readouterr().out
        )

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"depth": 3}, "blocks.2.mlp.fc1.weight is in the model only; weights of another depth cannot be fitted."),
            ({"hidden_size": 24}, "only another image size or number of classes can be fitted."),
            ({"patch_size": 4}, "only another image size or number of classes can be fitted."),
        ],
    )
    def test_weights_of_another_network_are_refused(self, save, options, said):
        sizes = {"patch_size": 2, "hidden_size": 12, "depth": 2, "num_heads": 2}
        old = create("deit_tiny", num_classes=3, image_size=8, **sizes)
        new = create("deit_tiny", num_classes=3, image_size=8, **sizes | options)
        with pytest.raises(ValueError, match=re.escape(said)):
            initialise_recogniser(new, save(old), ["a", "b", "c"])

    def test_other_files_are_refused(self, tmp_path, capsys, save):
        other = save(torch.nn.Linear(2, 2))
        assert "holds no state dict" in sentence(capsys, settings(tmp_path / "run", 2, f"--init {other}"))
        pvt = save(create("pvt_tiny", num_classes=10, image_size=32))
        said = sentence(capsys, settings(tmp_path / "run", 2, f"--init {pvt}"))
        assert "it holds another network, without blocks.0.mlp.fc1.weight." in said


class TestOtherPrograms:
    def test_who_draws_images_refuses_a_recogniser(self, tmp_path, capsys):
        folder = run(tmp_path / "run", 1)
        for main, words in ((sample.main, [str(folder)]), (export.main, [str(folder), str(tmp_path / "out")])):
            with pytest.raises(SystemExit) as stop:
                main(words)
            assert stop.value.code == 2
            said = capsys.readouterr().err
            assert "holds a recogniser, deit_tiny, which draws no images; use python -m classify." in said
        assert not (tmp_path / "out").exists()

    def test_another_width_of_the_average_can_be_made(self, tmp_path, capsys):
        folder = run(tmp_path / "run", 4, "--train.snapshot_every 1")
        reconstruct.main([str(folder), "--std", "0.08"])
        (made,) = (folder / "reconstructed").iterdir()
        assert f"Recognise with: python -m classify predict {made} IMAGE ..." in capsys.readouterr().out


class TestFolders:
    @pytest.fixture
    def root(self, tmp_path):
        rng = np.random.default_rng(0)
        for part, classes in (("train", "abc"), ("val", "ca")):
            for k in classes:
                (tmp_path / part / k).mkdir(parents=True)
                for i in range(4):
                    pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(tmp_path / part / k / f"{i}.png")
        return tmp_path

    def settings(self, root, extra=""):
        text = "--process.name classify --data.name folder --data.image_size 16 --codec.name pixels --model.name deit_tiny "
        text += "--model.patch_size 8 --model.hidden_size 12 --model.depth 1 --model.num_heads 2 --train.batch_size 4 "
        text += "--train.num_steps 2 --train.num_workers 0 --train.tracker none --train.log_every 1 "
        text += f"--data.images {root}/train --run_dir {root}/run --eval.data.images {root}/val {extra}"
        return text.split()

    def test_classes_go_by_their_names(self, root):
        """val lacks one of the classes, so its numbers are others than those of train."""
        config = parse(Config, self.settings(root), prog="", description="")
        found = assemble.images_to_evaluate(assemble.spec_to_evaluate(config), DataInfo(16, 3, ["a", "b", "c"]))
        assert found.class_names == ["a", "b", "c"]
        assert sorted(found.labels.tolist()) == [0] * 4 + [2] * 4
        train.main(self.settings(root))
        assert json.loads((root / "run" / "eval.jsonl").read_text())["num_samples"] == 8

    def test_mistakes_in_the_images_to_evaluate_on(self, root, capsys):
        (root / "val" / "a").rename(root / "val" / "dog")
        assert "eval.data does not fit the classes of the network: the class 'dog' is none of 3, e.g. 'a'." in sentence(
            capsys, self.settings(root)
        )
        said = sentence(capsys, self.settings(root, f"--eval.data.images {root}/nothing"))
        assert f"eval.data.images '{root}/nothing' " in said
        assert "eval.data is data itself" in sentence(capsys, self.settings(root, f"--eval.data.images {root}/train"))

    def test_a_damaged_image_is_named(self, root, capsys):
        for file in (root / "train" / "b").iterdir():
            file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 50)
        said = sentence(capsys, self.settings(root))
        assert "cannot be read as an image" in said
        assert said.endswith("put another image of its class in its place, and run the same command again.")
