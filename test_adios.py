"""Tests of adios.py: `python -m pytest`; on demand `-k killed`, `-k two_views_against_pillow`."""

import contextlib
import errno
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import timeit
import tracemalloc
from dataclasses import fields, replace
from functools import cache, partial
from itertools import product
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
import torchvision
from hypothesis.strategies import fixed_dictionaries, sampled_from
from matplotlib.colors import rgb_to_hsv, to_rgb
from PIL import Image
from sklearn import linear_model, preprocessing
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torchvision import datasets
from torchvision.transforms import v2

import adios
from adios import AdiosError, Settings

HERE, CPU, DEVICE = Path(__file__).parent, torch.device("cpu"), adios.pick_device("auto")
SMALL = dict(limit=64, epochs=3, batch_size=32, width=8, device="cpu")
FOLDER = SMALL | dict(dataset="folder", data_dir="d", batch_size=8, limit=0)
PYTHON, ADIOS = sys.executable, (sys.executable, HERE / "adios.py")
TORCHRUN = PYTHON, *"-m torch.distributed.run --standalone --nproc-per-node=2".split()
approx, parametrize, skipif = pytest.approx, pytest.mark.parametrize, pytest.mark.skipif
needs_gpu = skipif(not torch.cuda.is_available(), reason="needs a GPU")

@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """Each test from the same random state and in a folder of its own."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    for module in (datasets.stl10, datasets.cifar, datasets.flowers102):  # nothing is downloaded
        monkeypatch.setattr(module, "check_integrity", lambda path, md5: True)

@cache
def shapes(**changes):
    return adios.load_data(Settings(**SMALL | changes), CPU)

def make_game(device=CPU, **changes):
    mean, std = torch.full((1, 3, 1, 1), 0.5), torch.full((1, 3, 1, 1), 0.25)
    return adios.Game(Settings(**SMALL | dict(batch_size=16) | changes), mean, std, device)

def fix_views(game):
    """Let each step see the same two views; returns the pairs of one to leave and one to mask."""
    images, dtype = shapes().images[:16].to(game.device), next(game.model.parameters()).dtype
    view_a, view_b = [game.normalise(adios.augment(images, game.settings)).to(dtype) for _ in "AB"]
    game.two_views = lambda images: ((view_a, view_b), (None, None))
    return [(view_a, view_b), (view_b, view_a)][:1 + (game.settings.ssl == "simsiam")]

def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}

def same(module, before):
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

def gradients(module):
    return [p.grad.clone() for p in module.parameters() if p.requires_grad]

def flags(**changes):
    """The command line of SMALL settings with these changes."""
    return [adios.flag(name) if value is True else f"--no-{adios.flag(name)[2:]}" if value is False
            else f"{adios.flag(name)}={value}" for name, value in (SMALL | changes).items()]

def lighten(monkeypatch):
    """Make runs quick: 60 test images and empty pictures."""
    def load_less(*arguments, load=adios.load_data):
        data = load(*arguments)
        return replace(data, test_images=data.test_images[:60], test_labels=data.test_labels[:60],
                       test_masks=None if data.test_masks is None else data.test_masks[:60],
                       backgrounds={k: (x[:60], y[:60]) for k, (x, y) in data.backgrounds.items()})
    monkeypatch.setattr(adios, "load_data", load_less)
    for name in ("plot_masks", "plot_curves", "plot_neighbours"):
        monkeypatch.setattr(adios, name, lambda *_: adios.Figure((1, 1)))

light = pytest.fixture(lighten)

@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The folder of a finished light run of SMALL settings."""
    out = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        lighten(patch)
        adios.train(Settings(**SMALL, out=str(out)))
    return out

@pytest.fixture
def refused(capsys):
    """A function: this command line is refused by one line that says so, and nothing is written."""
    def check(*arguments, says):
        before, _ = [(p, p.lstat().st_mtime_ns) for p in Path().rglob("*")], capsys.readouterr()
        assert adios.main(list(arguments)) == 2
        out, err = capsys.readouterr()
        line, = err.splitlines()
        assert line.startswith("adios: error: ") and says in line and out == "", line
        assert [(p, p.lstat().st_mtime_ns) for p in Path().rglob("*")] == before
    return check

def launch(*command, code=0, timeout=300, **environment):
    """Another process, which finds this file and no GPU; the exit code is as expected."""
    environment = os.environ | dict(PYTHONPATH=str(HERE), CUDA_VISIBLE_DEVICES="") | environment
    done = subprocess.run(command, capture_output=True, timeout=timeout, env=environment,
                          encoding=environment.get("PYTHONIOENCODING", "utf-8"))
    assert done.returncode == code, done.stderr
    return done

# ---- Objectives, penalty and networks ------------------------------------------------------------
def test_nt_xent_is_the_written_out_sum():
    z_a, z_b, temperature = torch.randn(5, 7), torch.randn(5, 7), 0.2
    z, total = torch.cat((z_a, z_b)), 0
    cosine = [[F.cosine_similarity(p, q, dim=0).item() for q in z] for p in z]
    for i in range(10):
        others = sum(math.exp(cosine[i][k] / temperature) for k in range(10) if k != i)
        total -= math.log(math.exp(cosine[i][(i + 5) % 10] / temperature) / others)
    assert adios.nt_xent(z_a, z_b, temperature).item() == approx(total / 10, abs=1e-5)

def test_predicted_losses_are_the_written_out_ones_and_stop_at_the_target():
    a, b = (adios.Embedding(*torch.randn(2, 6, 9).requires_grad_().unbind()) for _ in "AB")
    cosine = [sum(sum(x * y for x, y in zip(p, z)) / math.hypot(*p) / math.hypot(*z) / 6
                  for p, z in zip(p.tolist(), z.tolist()))
              for p, z in ((a.prediction, b.target), (b.prediction, a.target))]
    assert adios.simsiam_loss(a.prediction, b.target).item() == approx(-cosine[0], abs=1e-5)
    assert adios.byol_loss(a.prediction, b.target).item() == approx(2 - 2 * cosine[0], abs=1e-5)
    for ssl, expected in (("simsiam", -cosine[1]), ("byol", 4 - 2 * sum(cosine))):
        loss = adios.OBJECTIVES[ssl](a, b, 0.3)
        p, z = torch.autograd.grad(loss, (b.prediction, a.target), allow_unused=True)
        assert loss.item() == approx(expected, abs=1e-5) and z is None and p.abs().sum() > 0
    assert adios.OBJECTIVES["simclr"](a, b, 1) == adios.nt_xent(a.prediction, b.prediction, 1)

def test_sparsity_penalty_is_its_formula_and_finite_at_both_ends():
    masks = torch.rand(4, 3, 8, 8).softmax(1)
    assert_close(adios.sparsity_penalty(masks), 1 / (math.pi * masks.mean((2, 3))).sin())
    areas = torch.tensor([0.0, 0.01, 0.2, 0.5, 0.8, 0.99, 1.0])
    penalty = adios.sparsity_penalty(areas[None, :, None, None].expand(1, 7, 4, 4))[0]
    assert penalty[3].item() == approx(1) and penalty.isfinite().all() and penalty[0] > 100
    assert (penalty[:4].diff() < 0).all() and (penalty[3:].diff() > 0).all()
    adios.sparsity_penalty(empty := torch.zeros(1, 2, 4, 4, requires_grad=True)).sum().backward()
    assert (empty.grad < 0).all() and empty.grad.isfinite().all()  # collapsed masks are drawn back

def test_resnet18_is_torchvisions():
    theirs, ours, x = torchvision.models.resnet18(), adios.ResNet18(64), torch.randn(2, 3, 64, 64)
    theirs.fc = torch.nn.Identity()
    for source, target in ((theirs, ours), (ours, theirs)):
        for p in source.parameters():
            torch.nn.init.normal_(p, 0.02, 0.05)
        target.load_state_dict(source.state_dict())
        for mode in (True, False):
            assert_close(ours.train(mode)(x), theirs.train(mode)(x))

def compare_formats():
    """Wrong code dies or is off by 0.6 of the norm and more, a ReLU that flips by up to 0.08."""
    for width, size, threads in product(range(1, 25), (32, 64), (1, 2)):
        torch.set_num_threads(threads)
        found = []
        for form in torch.contiguous_format, adios.memory_format(CPU, width):
            torch.manual_seed(0)
            network = adios.ResNet18(width).to(memory_format=form)
            images = torch.randn(16, 3, size, size).contiguous(memory_format=form)
            (network(images) * torch.randn(8 * width)).sum().backward()
            found.append(gradients(network))
        assert all((a - b).norm() < 0.1 * a.norm() for a, b in zip(*found)), (width, size, threads)

@parametrize("isa", ["AVX2", "DEFAULT"])
def test_gradients_are_right_in_the_memory_format_of_each_width(isa):
    launch(PYTHON, "-c", "import test_adios as t; t.compare_formats()", ONEDNN_MAX_CPU_ISA=isa)

@parametrize("size, plan", [(32, "1222"), (50, "1222"), (64, "11222"), (96, "11222"),
                            (128, "111222"), (224, "111222")])
def test_masks_share_out_every_pixel_and_start_apart(size, plan):
    for count, width in ((2, 8), (6, 8), (4, 32)):
        occluder = adios.Occluder(size, count, width)
        assert [block[0].out_channels for block in occluder.down] == [width * int(n) for n in plan]
        masks = occluder(F.interpolate(torch.randn(4, 3, 9, 9), size))
        assert masks.shape == (4, count, size, size) and masks.min() >= 0 and masks.max() <= 1
        assert_close(masks.sum(1), torch.ones(4, size, size))
        apart, least = adios.masks_apart(masks.detach()), masks.mean((0, 2, 3)).min()
        assert apart > 0.3 * 2 / count and least > 0.2 / count  # of at most 2 / N and 1 / N
    masks[:, 0].square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in occluder.parameters())

@parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_the_occluder_in_half_precision(device):
    game, seen = make_game(torch.device(device)), []
    game.dtype = torch.bfloat16
    for part in [*game.occluder.down.modules(), *game.occluder.up.modules(), game.occluder.mlp]:
        part.register_forward_hook(lambda _, inputs, output: seen.append(
            (inputs[0].dtype, output.dtype, torch.is_autocast_enabled(device))))
    assert all(v.isfinite() for v in game.play(shapes().images[:16].to(device), 0.1).values())
    assert len(seen) > 30 and set(seen) == {(torch.bfloat16, torch.bfloat16, False)}
    (_, view), = fix_views(game)
    assert_close(game.paint(view), game.occluder(view.float()), atol=2e-2, rtol=0)  # float32
    game.learned, game.settings = False, replace(game.settings, masks="mae")
    assert adios.predict_masks(game, shapes().images[:4]).dtype == torch.float32  # for pictures

# ---- The game ------------------------------------------------------------------------------------
@parametrize("ssl", adios.OBJECTIVES)
def test_each_move_leaves_the_other_network_untouched(ssl, monkeypatch):
    game, states, calls, frozen = make_game(ssl=ssl), [], [], adios.frozen
    (_, view), *_ = fix_views(game)
    monkeypatch.setattr(adios, "frozen", lambda model: states.append(
        (snapshot(model), snapshot(game.occluder), gradients(model))) or frozen(model))
    before, occluder_before = snapshot(game.model), snapshot(game.occluder)
    game.play(None, 0.05)
    (model, occluder, model_gradients), = states  # between the two moves
    assert_close(occluder, occluder_before, atol=0, rtol=0)
    assert not same(game.occluder, occluder) and not same(game.model, before)
    assert_close(snapshot(game.model), model, atol=0, rtol=0)
    assert_close(gradients(game.model), model_gradients, atol=0, rtol=0)
    monkeypatch.setattr(adios, "gather", lambda rows: calls.append(rows) or rows)
    assert torch.equal(*game.embed(view)) == (ssl == "simclr") == (len(calls) == 1)  # one of its

def test_frozen_puts_back_what_was_there():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4).requires_grad_(False), torch.nn.BatchNorm1d(
        4, track_running_stats=False), torch.nn.BatchNorm1d(4), torch.nn.Unflatten(1, (2, 2)),
        torch.nn.InstanceNorm1d(2, track_running_stats=True), torch.nn.Flatten())
    before, x = snapshot(model), torch.randn(8, 4, requires_grad=True)
    for _ in range(2):
        with pytest.raises(KeyError), adios.frozen(model):
            model(x)[:, 0].square().sum().backward()
            assert x.grad.abs().sum() > 0 and same(model, before)
            assert all(p.grad is None for p in model.parameters())
            raise KeyError
        assert [p.requires_grad for p in model.parameters()] == [False] * 2 + [True] * 4
        assert [norm.track_running_stats for norm in model[1:3]] == [False, True]
        assert model[4].track_running_stats and model[4].momentum == 0.1

@parametrize("updates", ["alternating", "simultaneous"])
@parametrize("scheme", adios.LEARNED)
@parametrize("ssl", adios.OBJECTIVES)
def test_a_step_written_out(ssl, scheme, updates):
    game, calls = make_game(ssl=ssl, masks=scheme, sparsity=0.7, num_masks=3, updates=updates), []
    game.model.double(), game.occluder.double()  # batch norms of 16 images magnify float32's noise
    pairs, count = fix_views(game), 3 if scheme == "adios" else 1
    torch.manual_seed(1)
    painted = [game.paint(view) for _, view in pairs]
    masks = [adios.SCHEMES[scheme](None, each, None) for each in painted]
    losses = [adios.OBJECTIVES[ssl](game.model(a), game.model(b - b * m[:, n:n + 1]), 0.2)
              for (a, b), m in zip(pairs, masks) for n in range(count)]
    if ssl == "simsiam":  # four terms: b masked to a, a masked to b, and b to a, a to b as they are
        losses += count * [adios.simsiam_loss(game.model(b).prediction, game.model(a).target)
                           for a, b in pairs]
    loss = torch.stack(losses).mean()
    gain = loss - 0.7 * adios.sparsity_penalty(torch.cat(painted)).mean()
    loss.backward(retain_graph=True)
    descent, ascent = gradients(game.model), torch.autograd.grad(gain, game.occluder.parameters())
    game.model.encoder.register_forward_hook(lambda *_: calls.append("encode"))
    game.occluder.register_forward_hook(lambda *_: calls.append("paint"))
    torch.manual_seed(1)
    report = game.step(None, True)  # at learning rate 0
    areas = torch.cat(painted).mean((0, 2, 3))
    expected = dict(loss=loss, gain=gain) | {f"area_{n + 1}": area for n, area in enumerate(areas)}
    assert_close(report, expected, atol=1e-4, rtol=0)
    assert_close(gradients(game.model), descent, atol=1e-5, rtol=1e-3)
    assert_close(gradients(game.occluder), [-g for g in ascent], atol=1e-5, rtol=1e-3)
    encodings = len(pairs) * (1 + count * (2 if updates == "alternating" else 1))
    assert calls == len(pairs) * ["paint"] + encodings * ["encode"]

def test_the_occluder_stops_at_its_share_of_the_run():
    game, images = make_game(occluder_share=0.5, occluder_lr=1.0), shapes().images[:16]
    for progress, rate in ((0.025, 0.55), (0.05, 1), (0.4999, 0)):
        assert game.play(images, progress)["gain"].isfinite()
        assert game.occluder_optimizer.param_groups[0]["lr"] == approx(rate, abs=1e-3)
    before, model = snapshot(game.occluder), snapshot(game.model)
    assert "gain" not in game.play(images, 0.5)
    assert same(game.occluder, before) and not same(game.model, model)

def test_rates_weight_decay_and_byols_target_are_as_scheduled():
    game = make_game(ssl="byol", lr=1e-2, weight_decay=0.3)
    for part in ("model", "occluder"):  # biases, norms and the target have no weight decay
        groups = getattr(game, f"{part}_optimizer").param_groups
        decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
        learned = [p for p in getattr(game, part).parameters() if p.requires_grad]
        assert decay == {p: 0.3 * (p.ndim > 1) for p in learned}
    for progress, rate in ((0, 0.2), (0.05, 1.1), (0.1, 2), (0.55, 1), (1, 0)):
        adios.set_rate(game.occluder_optimizer, 2.0, progress)
        assert [g["lr"] for g in groups if g["params"]] == approx([rate] * 2)
    simsiam = make_game(ssl="simsiam", lr=0.5)
    simsiam.play(shapes().images[:16], 0.7)
    rates = {p: g["lr"] for g in simsiam.model_optimizer.param_groups for p in g["params"]}
    assert rates.keys() == {*simsiam.model.parameters()}  # the predictor's rate is constant
    assert {*simsiam.model.predictor.parameters()} == {p for p in rates if rates[p] == 0.5}
    for progress in (0, 0.25, 1):
        before = [p.clone() for p in game.model.target_network.parameters()]
        game.play(shapes().images[:16], progress)
        online = [*game.model.encoder.parameters(), *game.model.projector.parameters()]
        momentum = 1 - 0.01 * (math.cos(math.pi * progress) + 1) / 2
        for slow, was, fast in zip(game.model.target_network.parameters(), before, online, strict=True):
            assert slow.grad is None and not slow.requires_grad
            assert_close(slow, momentum * was + (1 - momentum) * fast)

def test_precision_and_memory_format_suit_the_device(monkeypatch):
    for device, width, fast in (("cuda", 8, True), ("cpu", 16, True), ("cpu", 15, False),
                                ("mps", 64, False), ("xpu", 64, False)):
        form = adios.memory_format(torch.device(device), width)
        assert form == (torch.channels_last if fast else torch.contiguous_format)
    for native, dtype in ((False, torch.float16), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
        assert adios.precision(torch.device("cuda")) == dtype
    assert adios.precision(CPU) == adios.precision(torch.device("mps")) == torch.float32

class HostTensors(TorchDispatchMode):
    """Notes lines of adios.py that work on tensors of one dimension or more on the host."""
    lines = ()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.is_cpu and leaf.dim()
               for leaf in tree_leaves((args, kwargs, results))):
            frame, calls = sys._getframe(), []
            while frame := frame.f_back:
                calls.append((Path(frame.f_code.co_filename), frame.f_lineno))
            if not any("optim" in file.parts for file, _ in calls):  # AdamW keeps its steps there
                self.lines += tuple(n for file, n in calls if file.name == "adios.py")[:1]
        return results

@parametrize("ssl", adios.OBJECTIVES)
def test_a_step_stays_on_its_device(ssl, monkeypatch):
    """On `meta`, where tensors have no numbers, all fails that a CUDA graph cannot capture."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, adam=torch.optim.AdamW, **options:
        adam(parameters, **options | dict(fused=False, foreach=False, capturable=False)))
    for masks in adios.SCHEMES:
        for updates in ("alternating", "simultaneous")[:1 + (masks in adios.LEARNED)]:
            game = make_game(torch.device("meta"), masks=masks, updates=updates, ssl=ssl, blur=0.5)
            images = torch.empty(16, 4, 32, 32, dtype=torch.uint8, device="meta")
            with HostTensors() as host:
                report = game.play(images, 0.05)
            assert not host.lines, (masks, updates, f"adios.py, lines {host.lines}")
            assert all(value.is_meta for value in report.values())

def test_mae_hides_three_quarters_in_patches_and_beit_three_tenths_in_blocks(monkeypatch):
    masks = adios.hide_patches(torch.zeros(300, 3, 32, 32, device=DEVICE))
    patches = masks.view(300, 8, 4, 8, 4)
    assert (patches == patches[:, :, :1, :, :1]).all() and (masks.mean((1, 2, 3)) == 0.75).all()
    assert (masks.mean((0, 1)) - 0.75).abs().max() < 0.12
    view = torch.zeros(400, 3, 64, 64, device=DEVICE)
    share = adios.hide_blocks(view).mean((1, 2, 3))
    assert share.max() <= 0.3 and share.mean().item() == approx(0.29, abs=0.015)
    # the first block alone: a rectangle of 8 to 30 %, aspect ratio 0.3 to 1 / 0.3
    monkeypatch.setattr(adios, "range", lambda n: (0,), raising=False)
    first = adios.hide_blocks(view)[:, 0]
    height, width = (first.amax(axis).sum(1) for axis in (2, 1))
    assert set(first.unique().tolist()) == {0, 1} and (first.sum((1, 2)) == height * width).all()
    area, ratio = height * width / 64**2, height / width
    assert 0.07 < area.min() < 0.1 and 0.27 < area.max() <= 0.3
    assert 0.25 < ratio.min() < 0.4 and 2.6 < ratio.max() < 3.8 and ratio.log().mean().abs() < 0.15

def test_one_mask_is_dealt_to_each_image():
    masks = torch.rand(3000, 3, 1, 1, device=DEVICE)
    which = (adios.pick_one(masks) == masks).float()
    assert (which.sum(1) == 1).all() and (which.mean((0, 2, 3)) - 1 / 3).abs().max() < 0.04
    truth = torch.rand(3000, 1, 1, 1)  # of true masks: the object or all else
    masks = adios.SCHEMES["object"](None, None, truth)
    assert torch.equal(masks, torch.where(masks == truth, truth, 1 - truth))
    assert (masks == truth).float().mean().item() == approx(0.5, abs=0.04)
    masks = adios.SCHEMES["object-shuffled"](None, None, truth)
    assert (torch.minimum((masks - truth).abs(), (1 - masks - truth).abs()) > 1e-6).all()

def test_true_masks_are_cropped_and_flipped_with_their_image():
    truth = shapes(masks="object").images[:, 3:]
    assert set(truth.unique().tolist()) == {0, 255} and shapes().images.shape[1] == 3
    assert torch.equal(truth[:, 0] > 0, adios.draw_shapes(64, 32, 0)[2][:, 0] >= 0.5)
    images = truth.expand(-1, 4, -1, -1).to(DEVICE)  # pictures of the masks themselves
    views = adios.augment(images, Settings(jitter=0))
    assert_close(views[:, 0], views[:, 3], atol=1e-3, rtol=0)

@parametrize("encoder", ["resnet18", "vit_tiny", "resnet50"])
@parametrize("ssl", adios.OBJECTIVES)
def test_every_combination_trains(ssl, encoder):
    images = shapes(masks="object").images[:4].to(DEVICE)
    for masks in adios.SCHEMES if encoder != "resnet50" else ["adios-s"] * (ssl == "simclr"):
        game = make_game(DEVICE, ssl=ssl, masks=masks, encoder=encoder)
        learns = masks in adios.LEARNED
        networks = [game.model.encoder, game.model.projector, game.occluder]
        before = [snapshot(network) for network in networks]
        report = game.play(images, 0.05)
        assert report.keys() == {"loss", "area_1", *["gain", "area_2"] * learns}, masks
        assert all(value.isfinite() for value in report.values()), masks
        assert [same(*pair) for pair in zip(networks, before)] == [False, False, not learns], masks
        assert any(True for _ in game.occluder.parameters()) == learns, masks  # else there is none
        area = dict(none=0, mae=0.75, beit=0.29).get(masks, report["area_1"].item())
        assert report["area_1"].item() == approx(area, abs=0.04)
        assert all(p.isfinite().all() for network in networks for p in network.parameters())

# ---- Two views, against torchvision --------------------------------------------------------------
def photos(count=8, size=32):
    smooth = F.interpolate(torch.rand(count, 3, 6, 6), size=size, mode="bicubic")
    return smooth.mul(255).clamp(0, 255).byte()

@parametrize("min_crop", [0.08, 0.3, 0.9, 1.0])
def test_boxes_are_distributed_as_torchvisions(min_crop):
    ours, image = adios.random_boxes(4000, 32, min_crop, DEVICE).cpu(), torch.empty(3, 32, 32)
    theirs = torch.tensor([torchvision.transforms.RandomResizedCrop.get_params(
        image, (min_crop, 1), (3 / 4, 4 / 3)) for _ in range(4000)]).float()
    assert (ours == ours.int()).all() and ours.min() >= 0 and ours.view(-1, 2, 2).sum(1).max() <= 32
    cdf = [(boxes[:, :, None] <= torch.arange(33)).float().mean(0) for boxes in (ours, theirs)]
    assert (cdf[0] - cdf[1]).abs().max() < 0.0428  # Kolmogorov-Smirnov's, at p = 0.001
    together = [torch.corrcoef(boxes.T + 1e-3 * torch.randn(4, 4000)) for boxes in (ours, theirs)]
    assert (together[0] - together[1]).abs().max() < 0.1

def test_augmentations_are_torchvisions():
    images, f = photos(64, 96).float() / 255, v2.functional
    images[0] = 0.5                                      # grey: no hue
    images[1] = torch.eye(3).repeat_interleave(32, 1)[:, :, None]  # pure colours
    boxes, flip = adios.random_boxes(64, 96, 0.08, CPU), torch.arange(64) % 2 == 0
    factors = torch.stack((*(torch.rand(3, 64) * 1.6 + 0.2), torch.rand(64) - 0.5), 1)
    sigma = torch.linspace(0.1, 2, 64)
    factors[2], sigma[2] = torch.tensor([1, 1, 1, 0]), 1e-3  # which leave alone
    crops = adios.crop_and_flip(images.to(DEVICE), boxes.to(DEVICE), flip.to(DEVICE)).cpu()
    adios.colour_jitter_(jittered := images.to(DEVICE, copy=True), factors.to(DEVICE))
    blurred = adios.gaussian_blur(images, sigma)
    for left_alone in (jittered[2].cpu(), blurred[2]):
        assert_close(left_alone, images[2], atol=1e-5, rtol=0)
    for n, (image, s) in enumerate(zip(images, sigma.tolist())):
        crop = f.resized_crop(image, *boxes[n].int().tolist(), [96, 96], antialias=False)
        assert_close(crops[n], crop.flip(2) if flip[n] else crop, atol=1e-4, rtol=0)
        if n != 2:
            assert_close(blurred[n], f.gaussian_blur(image, [9, 9], [s, s]), atol=1e-5, rtol=0)
        for name, factor in zip(("brightness", "contrast", "saturation", "hue"), factors[n]):
            image = getattr(f, f"adjust_{name}")(image, factor.item())
        assert_close(jittered[n].cpu(), image, atol=1e-4, rtol=0)

def test_views_are_drawn_with_the_stated_probabilities(monkeypatch):
    drawn = {}
    for function in ("crop_and_flip", "colour_jitter_", "gaussian_blur"):
        monkeypatch.setattr(adios, function, lambda *a, name=function, run=getattr(
            adios, function): drawn.update({name: a[-1].cpu()}) or run(*a))
    views = adios.augment(photos(4000).to(DEVICE), Settings(jitter=0.5, blur=0.3))
    assert views.shape == (4000, 3, 32, 32) and 0 <= views.min() and views.max() < 1 + 1e-5
    sigma = drawn["gaussian_blur"][drawn["gaussian_blur"] > 1e-2]
    assert len(sigma) / 4000 == approx(0.3, abs=0.04) and sigma.min() > 0.1 and sigma.max() < 2
    alone = (drawn["colour_jitter_"] == torch.tensor([1, 1, 1, 0])).all(1)
    grey = (views.amax(1) - views.amin(1)).amax((1, 2)).cpu() < 1e-4
    shares = [part.float().mean().item() for part in (grey, alone, drawn["crop_and_flip"], sigma)]
    assert shares == approx([0.2, 0.2, 0.5, 1.05], abs=0.04)
    moved = drawn["colour_jitter_"][~alone]
    for column, (low, high) in zip(moved.T, [(0.6, 1.4)] * 3 + [(-0.1, 0.1)]):
        assert low <= column.min() < low + 0.01 and high - 0.01 < column.max() <= high
        assert column.mean().item() == approx((low + high) / 2, abs=0.02)
    assert (torch.corrcoef(moved.T) - torch.eye(4)).abs().max() < 0.08  # each drawn for itself
    views = adios.augment(images := photos(4), Settings(jitter=0, min_crop=1))  # flips and greys
    others = torch.stack((images / 255, v2.functional.rgb_to_grayscale(images / 255, 3)))
    others = torch.cat((others, others.flip(4)))
    assert (views - others).abs().amax((2, 3, 4)).amin(0).max() < 1e-5

@skipif("'two_views_against_pillow' not in config.option.keyword", reason="a benchmark")
def test_two_views_against_pillow(capsys):
    settings, images, rates = Settings(dataset="stl10"), photos(32, 96), []
    pictures = [v2.functional.to_pil_image(image) for image in images]
    pillow = v2.Compose([
        v2.RandomResizedCrop(96, (settings.min_crop, 1)), v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(9, (0.1, 2))], 0.5), v2.ToImage()])
    torch.set_num_threads(1)
    for make in [lambda: [adios.augment(images, settings) for _ in "AB"],
                 lambda: torch.stack([pillow(p) for p in pictures for _ in "AB"]) / 255] * 20:
        rates.append(len(images) / timeit.timeit(make, number=1))
    ours, theirs = torch.tensor(rates).view(20, 2)[1:].median(0).values.tolist()
    with capsys.disabled():
        print(f"\ntwo views at 96 px, one thread: {ours:.0f} images/s; torchvision's: {theirs:.0f}")

# ---- Data ----------------------------------------------------------------------------------------
def test_shapes_are_as_described_and_the_same_everywhere_for_a_seed():
    data = shapes(limit=200, seed=3)
    parts = torch.cat((data.images, data.test_images, data.backgrounds["mixed_rand"][0])).numpy()
    assert hashlib.sha256(parts.tobytes()).hexdigest()[:16] == "f813e4c0edf6b4de"
    assert not torch.equal(data.images, shapes(limit=200, seed=4).images)
    assert not torch.equal(data.images, data.test_images[:200])
    data = shapes(limit=0)
    assert data.images.shape == (4000, 3, 32, 32) and data.labels.bincount().tolist() == [400] * 10
    truth, (labels, objects, coverage, behind) = data.test_masks, adios.draw_shapes(1000, 32, 1)
    assert torch.equal(data.test_labels, labels) and torch.equal(truth, coverage[:, 0] >= 0.5)
    areas = torch.stack([truth[labels == c].float().mean() for c in range(10)])
    assert areas.mean().item() == approx(1 / 3, abs=0.03) and areas.min() > 0.28
    tones = rgb_to_hsv(np.stack([x.flatten(1).unique(dim=1).T / 255 for x in objects]))
    assert tones.shape == (1000, 2, 3)  # stripes of the class's hue
    shift = (torch.tensor(tones[..., 0]) - (3 * labels[:, None] + 5) / 10 + 0.5) % 1 - 0.5
    assert shift.std().item() == approx(0.03, abs=0.003) and -shift.diff().min() < 0.02
    assert 0.24 < np.ptp(tones[..., 2], 1).min() and np.ptp(tones[..., 2], 1).max() < 0.51
    value = behind.amax(1).flatten(1).float()  # of two levels, each ± 10
    low, high = value.amin(1, keepdim=True) + 10, value.amax(1, keepdim=True) - 10
    assert (((value - low).abs() <= 11) | ((value - high).abs() <= 20)).all()
    assert 40 < (high - low).min() and (high - low).max() < 0.46 * 255
    assert ((value > (low + high) / 2).float().mean(1) - 0.5).abs().max() < 0.2  # the lit part
    outside, tells = F.max_pool2d(truth[:, None].float(), 3, 1, 1) == 0, {}
    inside = (F.max_pool2d(1 - truth[:, None].float(), 3, 1, 1) == 0).expand(-1, 3, -1, -1)
    for name, (images, same_labels) in data.backgrounds.items():
        mean = (images / 255 * outside).sum((2, 3)) / outside.sum((2, 3)).clamp_min(1)
        hue = 10 * rgb_to_hsv(mean)[:, 0]
        tells[name] = (hue.round() % 10 == labels.numpy()).mean()
        assert name == "only_bg_t" or (images == data.test_images)[inside].float().mean() > 0.998
        change = ((images.float() - data.test_images).abs() * outside).amax((1, 2, 3)) > 5
        assert change.float().mean() > 0.9 or name in ("original", "only_bg_t") and not change.any()
        assert torch.equal(same_labels, labels)
    assert tells["original"] == approx(0.9, abs=0.03) and tells["mixed_same"] > 0.87
    assert tells["mixed_rand"] < 0.2 and tells["only_bg_t"] > 0.87
    assert not (data.backgrounds["only_fg"][0] * outside).any()

def test_statistics_are_of_images_of_all_kinds():
    images = torch.arange(0, 250, 25, dtype=torch.uint8).repeat(2000)[:, None, None, None]
    mean, _ = adios.Data(images.expand(-1, 3, 2, 2), *[None] * 5).statistics()  # labels take turns
    assert mean.flatten().tolist() == approx([112.5 / 255] * 3, abs=0.02)
    images = shapes(masks="object").images
    std, mean = torch.std_mean(images[:, :3].double() / 255, (0, 2, 3), keepdim=True)
    assert_close(adios.Data(images, *[None] * 5).statistics(), (mean.float(), std.float()))

def load(**changes):
    return adios.load_data(Settings(**FOLDER | changes), CPU)

def write_stl10(root, **counts):
    """A small STL10 in the files' own format: column-major images, labels from 1."""
    folder, rng = Path(root, "stl10_binary"), np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, count in (dict(train=40, test=40, unlabeled=40) | counts).items():
        images = rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        images[:, 0, 0, :] = 7  # the first column in the file is the first row of the picture
        images.tofile(folder / f"{name}_X.bin")
        (np.arange(count, dtype=np.uint8) % 10 + 1).tofile(folder / f"{name}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"class{i}" for i in range(10)))

def test_stl10_trains_on_the_unlabelled_and_scores_on_the_labelled(monkeypatch, light):
    write_stl10("d")
    made, banks, make, knn = [], [], datasets.STL10.__init__, adios.knn_accuracy
    monkeypatch.setattr(datasets.STL10, "__init__", lambda self, *a, **k: made.append(self) or make(
        self, *a, **k))
    tracemalloc.start()
    data = load(dataset="stl10")
    peak, _ = tracemalloc.get_traced_memory()[1], tracemalloc.stop()
    assert peak < 2.2 * data.images.nbytes + data.test_images.nbytes  # torchvision's, and no copy
    assert [part.data.ctypes.data for part in made] == [
        data.images.data_ptr(), data.test_images.data_ptr()]
    assert load(dataset="stl10", limit=30).images.untyped_storage().nbytes() == 70 * 3 * 96**2
    assert data.images.shape == (80, 3, 96, 96) and (data.images[:, 0, :, 0] == 7).all()
    assert sorted(data.labels.tolist()) == [-1] * 40 + sorted([*range(10)] * 4)
    assert data.test_images.shape == (40, 3, 96, 96) and data.test_labels[9:11].tolist() == [9, 0]
    write_stl10("e", train=1, unlabeled=60)
    with pytest.raises(AdiosError, match="--limit 2 leaves no labels of two classes"):
        load(dataset="stl10", data_dir="e", batch_size=2, limit=2)
    monkeypatch.setattr(adios, "knn_accuracy", lambda *a: banks.append(a[1]) or knn(*a))
    results = adios.train(Settings(**FOLDER | dict(dataset="stl10", image_size=32, epochs=1)))
    assert banks and all(len(labels) == 40 and labels.min() == 0 for labels in banks)
    assert "knn" in results and not {"object_iou", "knn_shuffled_background"} & results.keys()

@parametrize("name, key, classes", [("cifar10", "labels", 10), ("cifar100", "fine_labels", 100)])
def test_cifar_is_read(name, key, classes):
    kind, rows = getattr(datasets, name.upper()), np.arange(20 * 3072).reshape(20, 3072)
    batch = {"data": rows.astype(np.uint8), key: [i % classes for i in range(20)]}
    files = {file: batch for file, _ in kind.train_list + kind.test_list}
    files[kind.meta["filename"]] = {kind.meta["key"]: [f"class{i}" for i in range(classes)]}
    Path("d", kind.base_folder).mkdir(parents=True)
    for file, content in files.items():
        Path("d", kind.base_folder, file).write_bytes(pickle.dumps(content))
    data = load(dataset=name)
    assert len(data.images) == 20 * len(kind.train_list) and len(data.test_images) == 20
    assert torch.equal(data.images[1].flatten(), torch.arange(3072, 6144).to(torch.uint8))
    assert data.labels[9:12].tolist() == [9, 10 % classes, 11 % classes]

def test_flowers102_is_read():
    os.makedirs("d/flowers-102/jpg")
    for n in range(1, 25):
        Image.new("RGB", (80, 70), (10 * n, 0, 0)).save(f"d/flowers-102/jpg/image_{n:05}.jpg")
    ids = {"trnid": range(1, 13), "valid": range(13, 15), "tstid": range(15, 25)}
    scipy.io.savemat("d/flowers-102/setid.mat", {name: [[*rows]] for name, rows in ids.items()})
    scipy.io.savemat("d/flowers-102/imagelabels.mat", {"labels": [[*range(1, 25)]]})
    data = load(dataset="flowers102")
    assert data.images.shape == (12, 3, 96, 96) and data.test_images.shape == (10, 3, 96, 96)
    assert data.labels.tolist() == [*range(12)] and data.test_labels.tolist() == [*range(14, 24)]
    assert (data.test_images[:, 0, 40, 40].int() - torch.arange(150, 250, 10)).abs().max() <= 3

def write_folder(root, classes=("cat", "dog"), count=8):
    for split, (c, name), i in product(("train", "val"), enumerate(classes), range(count)):
        Path(root, split, name).mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (80, 60 + 5 * i), (200, 40 * c, 10 * i))
        picture.save(Path(root, split, name, f"{i}.png"))

def test_a_folder_and_its_backgrounds_are_resized_cropped_and_labelled(capsys):
    write_folder("d")
    tall = np.zeros((200, 100, 3), np.uint8)
    tall[50:150] = 255  # the middle square
    Image.fromarray(tall).save("d/val/cat/0.png")
    for name in (".ipynb_checkpoints", "._cat", "dog/.thumbs"):  # what systems leave there
        shutil.copytree("d/train/cat", f"d/train/{name}")
    for name in ("train/.DS_Store", "train/cat/._photo.jpg", "val/dog/.DS_Store", "val/a.txt",
                 "train/cat/b.HEIC", "train/dog/c.heic", "train/montage.jpg", "val/cat/README"):
        Path("d", name).write_bytes(b"not a picture")
    data = load()
    assert capsys.readouterr().err.endswith(": .heic 2, .jpg 1, .txt 1, no extension 1\n")
    assert data.images.shape == (16, 3, 64, 64) and data.classes == ["cat", "dog"]
    assert data.labels.tolist() == data.test_labels.tolist() == [0] * 8 + [1] * 8
    assert [tuple(image[:, 30, 30].tolist()) for image in data.images] == [
        (200, 40 * c, 10 * i) for c in range(2) for i in range(8)]
    assert (data.test_images[0, :, 2:-2] == 255).all()
    Path("d/original").mkdir()  # of raw photos: not a part of the Backgrounds Challenge
    Image.new("RGB", (70, 70)).save("d/original/photo.jpg")
    for place in ("only_fg", "mixed_same/val", "mixed_rand"):
        assert not load().backgrounds
        shutil.copytree("d/val", Path("d", place))
    os.remove("d/mixed_rand/dog/0.png")
    backgrounds = load().backgrounds
    assert backgrounds.keys() == {"only_fg", "mixed_same", "mixed_rand"}
    assert torch.equal(backgrounds["mixed_same"][0], data.test_images)
    assert backgrounds["mixed_rand"][1].tolist() == [0] * 8 + [1] * 7

@pytest.mark.filterwarnings("error")
def test_images_of_all_kinds_are_read(refused):
    write_folder("d", ("cat",), 7)
    shutil.copytree("d/val/cat", "d/val/Ba\u0308r und O\u0308l")  # as macOS writes it
    place, grey = Path("d/train/Bär und Öl"), Image.new("L", (64, 64), 100)
    photo, exif = Image.new("RGB", (64, 64)), Image.Exif()
    image_width, resolution_unit, orientation = 0x100, 0x128, 0x112
    modes = {"0.png": "L", "1.png": "P", "2.tif": "CMYK", "3.png": "RGBA", "4.png": "1"}
    place.mkdir()
    for name, mode in modes.items():
        grey.convert(mode, dither=0).save(place / name)
    for kind in ("avif", "gif", "jfif"):
        photo.save(f"d/val/cat/7.{kind}")
    grey.save(place / "5.webp", save_all=True, lossless=True, append_images=[photo])
    photo.paste((255, 255, 255), (0, 0, 64, 32))  # its upper part is white
    exif[orientation] = 6  # to be turned clockwise: its right part is white
    photo.save(place / "6 ü.jpg", exif=exif)
    data = load(batch_size=2)
    means = data.images[:6].float().mean((2, 3))
    assert data.classes == ["Bär und Öl", "cat"] and (data.labels == 0).sum() == 7
    assert data.test_labels.tolist() == [0] * 7 + [1] * 10
    assert (means[[0, 1, 2, 3, 5]] - 100).abs().max() <= 2 and means[4].tolist() == [0, 0, 0]
    assert data.images[6, :, :, 40:].min() > 200 and data.images[6, :, :, :24].max() < 50
    odd = ({image_width: -5, orientation: 6}, {resolution_unit: 90000}, {})
    for n, tags in enumerate(odd):  # which are not to cost sound pixels
        entries = b"".join(struct.pack("<HHIi", tag, 9, 1, tags[tag]) for tag in sorted(tags))
        exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries
        photo.save(f"d/val/cat/{n}.jpg", exif=exif if tags else b"Exif\0\0nonsense")
    for place in product(("train", "val", "mixed_rand"), ("a\u0308", "o\u0308")):
        shutil.copytree("d/val/cat", Path("e", *place))
    assert load(data_dir="e").backgrounds.keys() == {"mixed_rand"}
    turned, *others = load(batch_size=2).test_images[[7, 9, 11]]  # 0.jpg, 1.jpg, 2.jpg of cat
    assert turned[:, :, 40:].min() > 200 and all(other[:, :24].min() > 200 for other in others)
    for mode in ("I", "I;16", "F"):
        Image.new(mode, (64, 64), 100).save(f"d/val/cat/{mode[-1]}.tif")
        refused(*flags(**FOLDER), says=f"{Path('d/val/cat', mode[-1])}.tif (mode {mode},")

def test_limit_takes_a_seeded_part_and_decodes_nothing_else(monkeypatch):
    write_folder("d")
    opened, read = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(Path(path)) or read(path))
    data, again, other = (load(limit=10, seed=seed) for seed in (0, 0, 1))
    assert len(opened) == 3 * (10 + 16) and sum("train" in path.parts for path in opened) == 3 * 10
    assert torch.equal(data.images[:, 1, 0, 0], 40 * data.labels) and len(data.labels) == 10
    assert torch.equal(data.images, again.images) and not torch.equal(data.images, other.images)

def test_lost_and_damaged_files_are_named_at_once(refused, monkeypatch):
    write_folder("d", count=12)
    first, *bad = Path("d/train/cat/2.png"), *(Path(f"d/val/dog/{n}.png") for n in range(12))
    link, lost = partial(os.symlink, "nowhere"), Path("d/train/dog/a")
    for path, make, undo in ((Path("d/val/cow"), link, os.remove), (lost, link, os.remove),
                             (Path("d/train/dog/99.png"), os.mkdir, os.rmdir)):
        make(path)
        refused(*flags(**FOLDER), says=f"mend or remove them: {path}")
        undo(path)
    first.unlink()
    link(first)
    for path, content in zip(bad, [b"", b"not a picture", bad[0].read_bytes()[:60]] * 4):
        path.write_bytes(content)
    for says in (*map(str, [first, *bad[:3]]), " and 3 more"):
        refused(*flags(**FOLDER), says=says)
    lost.mkdir()  # a folder that may not be entered
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != lost)
    refused(*flags(**FOLDER), says=f"mend or remove them: {lost}")

def test_what_is_wrong_with_a_folder_is_said_before_it_is_decoded(refused, monkeypatch):
    monkeypatch.setattr(adios, "decode", None)
    Path("mine/empty").mkdir(parents=True)
    assert adios.main([*flags(**FOLDER), "--out=mine/empty/a/o"]) == 2
    assert Path("mine/empty").is_dir() and not any(Path("mine/empty").iterdir())
    args = flags(**FOLDER)
    write_folder("e", ("cat",))
    refused(*args, "--data-dir=e", says="two classes or more")
    Path("d").mkdir()
    refused(*args, says="train")
    for name in ("train/cat", "train/dog", "mixed_rand/cat", "mixed_rand/cow"):
        shutil.copytree("e/train/cat", Path("d", name))
    refused(*args, says="val")
    shutil.copytree("d/train", "d/val")
    refused(*args, says="mixed_rand have other classes: cow, dog")
    refused(*args, "--out=d/val/cat/0.png/o", says="--out d/val/cat/0.png/o")
    Path("d/val/cow").mkdir()
    refused(*args, says="file for the classes cow")
    shutil.copy("d/val/cat/0.png", "d/val/cow")
    refused(*args, says="train and val have other classes: cow")

# ---- Metrics and evaluation ----------------------------------------------------------------------
def test_metrics_by_hand():
    def at(*degrees):
        return torch.tensor([(math.cos(a), math.sin(a)) for a in map(math.radians, degrees)])
    bank, labels = at(10, 30, 90), torch.tensor([0, 0, 1])  # to 75° class 1 is the nearest
    for tests, k, temperature, truth, share in (
            ([45], 1, 0.07, [0], 1), ([75], 1, 0.07, [1], 1), ([75], 3, 1, [0], 1),  # outvoted
            ([75], 3, 0.07, [1], 1), ([20, 85, 85, 85], 20, 0.07, [0, 1, 0, 1], 0.75)):
        truth = torch.tensor(truth)
        assert adios.knn_accuracy(bank, labels, at(*tests), truth, k, temperature) == share
    truth, masks = torch.zeros(2, 4, 4, dtype=torch.bool), torch.full((2, 2, 4, 4), 0.5)
    truth[0, :2] = truth[1, 0, 0] = True  # 8 pixels and one
    masks[0, 1] = torch.tensor([0.6, 0.6, 0.6, 0.4])[:, None]  # 12 pixels, 8 of them right
    masks[1, 0] = torch.tensor([0.6, 0.6, 0.4, 0.4])[:, None]  # 8 pixels, 1 of them right
    assert adios.object_iou(masks, truth) == approx((8 / 12 + 1 / 8) / 2)
    masks = torch.tensor([[[0.5, 0.5], [0.3, 0.0], [0.2, 0.5]], [[1, 0.4], [0, 0.2], [0, 0.4]]])
    assert adios.masks_apart(masks[..., None]) == approx((0.1 + 0.5 + 0 + 0.2) / 4)  # last two
    scores = torch.tensor([[0.1, 0.5, 0.4], [0.6, 0.3, 0.1], [0.2, 0.3, 0.5]])
    for k, share in ((1, 1 / 3), (2, 2 / 3), (9, 1)):
        assert adios.top(scores, torch.tensor([1, 1, 0]), k) == approx(share)
    flat = torch.cat((torch.randn(2000, 32), torch.zeros(2000, 32)), 1)
    for z, spread in ((5 * torch.randn(2000, 64), 1), (torch.ones(9, 64), 0), (flat, 0.5**0.5)):
        assert adios.embedding_spread(z) == approx(spread, abs=0.05)
    # a black and white object before greys, and a bright one, of two tones, before dark ones
    images = torch.tensor([[0, 255, 120, 140], [255, 250, 0, 20]], dtype=torch.uint8)
    images = images.repeat_interleave(2, 1)[:, None, :, None].expand(-1, 3, -1, 8)
    truth = (torch.arange(8) < 4)[None, :, None].expand(2, 8, 8)
    assert adios.colour_iou(images, truth, 0) == approx(dict(
        iou_threshold=2 / 3, iou_2_means=3 / 4, iou_3_means=3 / 4, iou_4_means=1 / 2))

def test_features_and_masks_are_of_unmasked_images_in_evaluation():
    game, images = make_game(), shapes(masks="object").images[:40]
    before, seen = snapshot(game.model), (images[:, :3] / 255 - 0.5) / 0.25
    features, rows = adios.extract_features(game, images), torch.tensor([9, 3])
    assert same(game.model, before) and game.model.training
    assert_close(features, game.model.encoder.eval()(seen), atol=1e-5, rtol=1e-4)
    assert_close(adios.extract_features(game, images, rows), features[rows], atol=1e-5, rtol=1e-4)
    assert_close(adios.predict_masks(game, images), game.occluder(seen))
    truth = images[:, 3:] / 255
    masks = adios.predict_masks(make_game(masks="object"), images, truth[:, 0] > 0)
    assert ((masks == truth).all((1, 2, 3)) | (masks == 1 - truth).all((1, 2, 3))).all()

def test_cluster_metrics_and_linear_probe():
    labels = torch.arange(600) % 12
    features, noise = torch.randn(12, 16)[labels] + 0.1 * torch.randn(600, 16), torch.randn(600, 16)
    clear, none, few = (adios.cluster_metrics(*data, 12, 0).values() for data in (
        (features, labels), (noise, labels), (features[:5], labels[:5])))
    assert min(clear) > 0.9 and max(none) < 0.2 and all(map(math.isfinite, few))
    features = (features + 1.5 * noise) * torch.logspace(-2, 2, 16) + 5
    train, known = (torch.arange(600) < 400) & (labels != 7), torch.arange(12) != 7
    ours = adios.linear_probe(features[train], labels[train], 12)(features[400:])
    scaled = preprocessing.StandardScaler().fit(features[train]).transform(features)
    theirs = linear_model.LogisticRegression(C=1 / (2e-4 * int(train.sum())), max_iter=1000).fit(
        scaled[train], labels[train]).predict_proba(scaled[400:])
    assert_close(ours[:, known].double(), torch.tensor(theirs).double(), atol=1e-3, rtol=0)
    assert not ours[:, 7].any() and adios.top(ours, labels[400:]) > 0.5

def files_in(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}

def scores_in(folder):
    scores = json.loads(Path(folder, "evaluation.json").read_text())
    assert scores.pop("settings") and all(-1 <= value <= 1 for value in scores.values())  # no NaN
    return scores

def test_a_short_run_is_learned_and_evaluated(capsys):
    trained = adios.train(Settings(limit=1280, epochs=4, batch_size=32, out="o"))
    assert trained["object_iou"] > trained["object_iou_untrained"] + 0.1
    assert trained["knn"] > 0.4 and trained["embedding_spread"] > 0.4
    Path("o/masks.png").write_text("the run's own")
    before = files_in("o")
    assert adios.main(["--evaluate", "o/checkpoint.pt", "--finetune", "--epochs", "3"]) == 0
    scores, now = scores_in("o"), files_in("o")
    assert now | before == now and now.keys() - before == {"evaluation.json", "neighbours.png"}
    assert scores["knn_top1"] == approx(trained["knn"], abs=0.005) and "knn_top5" not in scores
    gap = scores["linear_mixed_same"] - scores["linear_mixed_rand"]
    assert scores["linear_original"] == scores["linear_top1"] > scores["linear_only_fg"]
    assert scores["linear_background_gap"] == approx(gap) and gap > 0.2
    assert 0 < scores["ari"] < scores["nmi"] < 1 and 0 < scores["fmi"] < 1
    assert scores["linear_top1"] > 0.4 and scores["finetuned_top1"] > 0.4
    assert scores["iou_masks"] == approx(trained["object_iou"], abs=0.03)  # on 200 images
    assert f"{scores['linear_top1']:.3f}\n" in capsys.readouterr().out
    adios.ResNet18(16).load_state_dict(torch.load("o/encoder.pt", weights_only=True))

@pytest.mark.filterwarnings("error")
def test_evaluation_on_other_data(reference, refused, capsys, light):
    shutil.copytree(reference, "o")
    write_folder("d", [f"class{n:02}" for n in range(12)], 1)
    for name in ("original", "mixed_same/val", "mixed_rand"):
        shutil.copytree("d/val", Path("d", name))
    for path in ("mine/masks.png", "e/._0.jpg"):
        Path(path).parent.mkdir()
        Path(path).write_text("not a picture")
    before, args = files_in("o"), ["--evaluate=o/checkpoint.pt", "--dataset=folder"]
    refused(*args, "--data-dir=d", "--out=mine", says="holds masks.png: name another")
    refused(*args, "--data-dir=e", says=" .avif ")  # what could be read
    assert adios.main([*args, "--data-dir=d", "--device=cpu"]) == 0
    assert files_in("o/folder/d").keys() == {"evaluation.json", "neighbours.png", "masks.png"}
    assert adios.main([*args, "--data-dir=d", "--finetune", "--epochs=1", "--batch-size=8"]) == 0
    scores, earlier = scores_in("o/folder/d"), files_in("o/folder/d")
    assert scores["linear_original"] == scores["linear_top1"] <= scores["linear_top5"]
    assert scores["linear_background_gap"] == 0 and "finetuned_top5" in scores
    Image.new("RGB", (50, 40)).save("e/0.jpg")
    assert adios.main([*args, "--data-dir=e/"]) == 0
    assert files_in("o") == before and files_in("o/folder/e").keys() == {"masks.png"}
    assert files_in("o/folder/d") == earlier
    assert f"{Path('o/folder/e/masks.png')}" in capsys.readouterr().out
    assert adios.main(["--evaluate=o"]) == 0 and scores_in("o")  # a run's folder
    assert adios.parse(["--evaluate=o", "--data-dir=./data/"]).out == "o"  # its own data
    write_folder("f", ("of one", "colour"), 9)
    for path in Path("f").rglob("*.png"):
        Image.new("RGB", (40, 40)).save(path)
    assert adios.main([*args, "--data-dir=f"]) == 0
    shutil.copytree(reference, "o/shapes")  # a run of its own
    for mine in ("o/folder/e/notes.txt", "o/folder/masks.png", "o/shapes/cifar10/masks.png"):
        Path(mine).parent.mkdir(exist_ok=True)
        Path(mine).write_text("mine")
    refused(*flags(out="o"), says="folder/e/masks.png")
    assert adios.main(flags(out="o", epochs=1, masks="mae", overwrite=True)) == 0
    assert not {"evaluation.json", "neighbours.png", "film.gif"} & files_in("o").keys()
    assert not files_in("o/folder/d") and files_in("o/folder/e").keys() == {"notes.txt"}
    assert files_in("o/shapes") == files_in(reference)
    assert Path("o/folder/masks.png").exists() and Path("o/shapes/cifar10/masks.png").exists()
    refused(*args, "--data-dir=e", "--out=p", says="masks")
    refused("--evaluate=o/checkpoint.pt", "--masks=none", says="the checkpoint has")

def test_fine_tuning_in_half_precision(monkeypatch):
    """Views are made in single precision, whatever the networks compute in."""
    for dtype in (torch.bfloat16, torch.float16):
        monkeypatch.setattr(adios, "precision", lambda device: dtype)
        assert adios.finetune(make_game(blur=1.0, epochs=1), shapes()).isfinite().all()

def test_pictures_show_what_they_are_given():
    for count in (1, 12, 13, 23, 24, 1000):  # evenly spaced
        rows = adios.evenly_spaced(count)
        assert len(rows) == min(count, 12) and rows[0] == 0 and rows[-1] == count - 1
        assert count == 1 or 0 < rows.diff().max() <= rows.diff().min() + 1
    images, masks = torch.zeros(3, 3, 8, 8).byte(), torch.zeros(3, 2, 8, 8)
    images[:, 0], masks[:, 0, :4], masks[:, 1, 4:] = 255, 1, 1
    shown = [axis.images[0].get_array() for axis in adios.plot_masks(images, masks).axes]
    assert len(shown) == 4 * 3 and (shown[0] == [1, 0, 0]).all()
    assert (shown[3][:4] == 1).all() and (shown[3][4:] == 0).all() and (shown[6][4:] == 1).all()
    log = [dict(epoch=1, loss=3.0, gain=2.5, area_1=0.4), dict(epoch=2, loss=2.0, area_1=0.3)]
    losses, areas, _ = ([line.get_xydata().tolist() for line in axis.lines]
                        for axis in adios.plot_curves(log).axes)
    assert losses == [[[1, 3], [2, 2]], [[1, 2.5]]] and areas == [[[1, 0.4], [2, 0.3]]]
    frame = adios.film_frame(images, masks, 7)  # tiles of 64 pixels, 2 apart
    assert frame[:, 30, 30].tolist() == frame[:, 30, 160].tolist() == [255, 0, 0]
    for n, colour in enumerate(adios.COLOURS[:2]):
        over_grey = 0.35 * 76 / 255 + 0.65 * torch.tensor(to_rgb(colour))
        assert np.allclose(shown[9][7 * n, 0], over_grey)
        assert_close(frame[:, 78 + 50 * n, 10].float(), 255 * over_grey, atol=1, rtol=0)
    noise = torch.randint(256, (39, *frame.shape), dtype=torch.uint8)
    for frames in ([frame, frame.flip(0)], [frame, *noise]):
        adios.save_film(frames, "film.gif")
        assert (film := Image.open("film.gif")).n_frames == len(frames)
        assert_close(v2.functional.pil_to_tensor(film.convert("RGB")), frame, atol=20, rtol=0)

@pytest.mark.filterwarnings("error")
def test_pictures_are_the_same_whatever_a_user_set():
    names, figures = ["a$%$b", "\udcff", "漢字", "001.Black_footed_Albatross_of_the_North", "x"], []
    data = adios.Data(*[torch.zeros(12, 3, 8, 8).byte(), torch.arange(12) % 5] * 2, names, {})
    def draw():
        figures.append(adios.plot_neighbours(data, torch.arange(12), torch.eye(12), torch.eye(12)))
        return figures[-1]
    adios.save_figure(Path("a.png"), draw)
    with adios.style.context({"savefig.format": "pdf", "text.usetex": True, "font.size": 40,
                              "image.origin": "lower"}):
        adios.save_figure(Path("b.png"), draw)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    adios.read_picture("a.png")
    boxes = [axis.title.get_window_extent() for axis in figures[0].axes]
    assert not any(a.x1 > b.x0 for n, (a, b) in enumerate(zip(boxes, boxes[1:])) if n % 9 < 8)

def play_one():
    """A process of the two of the test below."""
    assert adios.main(flags(epochs=1, out="o")) == 0
    kept, views = {}, torch.load("views.pt")[:, 8 * adios.RANK:8 * adios.RANK + 8]
    for ssl in adios.OBJECTIVES:
        torch.manual_seed(0)
        game = make_game(ssl=ssl, masks="adios")
        torch.manual_seed(adios.RANK)
        loss = game.play(torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), 0.1)["loss"]
        kept[ssl] = ([loss, *game.model.parameters(), *game.occluder.parameters()],
                     loss_and_gradients(views, ssl))
    torch.save(kept, f"{adios.RANK}.pt")

def loss_and_gradients(views, ssl):
    torch.manual_seed(0)
    game = make_game(ssl=ssl, encoder="vit_tiny", masks="adios")
    for layer in game.model.modules():
        if isinstance(layer, torch.nn.BatchNorm1d):
            layer.eval()  # else it would see each process's images only
    game.two_views = lambda images: (views, [None, None])
    loss = game.step(None, True)["loss"]  # at learning rate 0
    return [loss, *gradients(game.model), *gradients(game.occluder)]

def test_two_processes_play_one_game():
    views = torch.randn(2, 16, 3, 32, 32)
    torch.save(views, "views.pt")
    done = launch(*TORCHRUN, "--no-python", PYTHON, "-c", "import test_adios as t; t.play_one()")
    first, second = (torch.load(f"{rank}.pt", weights_only=False) for rank in range(2))
    for ssl in adios.OBJECTIVES:
        assert_close(first[ssl][0], second[ssl][0], atol=0, rtol=0)
        joined = loss_and_gradients(views, ssl)
        for kept in (first, second):
            assert_close(kept[ssl][1], joined, atol=1e-5, rtol=1e-3)
    assert done.stdout.count("64 images of 32 px") == 1 and "results.json" in files_in("o")

@parametrize("wrong", ["--out=taken/o", "--epochs=0"])
def test_one_process_of_several_says_what_is_wrong(wrong):
    Path("taken").write_text("")
    launch(*TORCHRUN, "--redirects=3", "--log-dir=logs", ADIOS[1], *flags(), wrong, code=1)
    first, second = (next(Path("logs").rglob(f"{n}/stderr.log")).read_text() for n in range(2))
    assert second == "" and re.fullmatch("adios: error: --.*\n", first)

def test_each_process_draws_crops_of_its_own(monkeypatch, refused):
    drawn, seen = set(), set()
    monkeypatch.setattr(adios, "WORLD", 4)
    monkeypatch.setattr(adios.Game, "play", lambda game, images, progress: (
        drawn.add(torch.rand(1).item()), seen.update(map(bytes, images.flatten(1).numpy())),
        dict.fromkeys(("loss", "area_1"), torch.zeros(())))[2])
    for rank in range(4):
        monkeypatch.setattr(adios, "RANK", rank)
        adios.train_epoch(make_game(), shapes(), 1, adios.tqdm(disable=True))
    assert len(drawn) == 4 * 4 and len(seen) == 64  # each image once
    refused("--bench", says="torchrun is for training")
    with pytest.raises(AdiosError, match="multiple of 4"):
        adios.train(Settings(**SMALL | dict(batch_size=30)))

def test_bench_says_what_a_step_costs(capsys, monkeypatch):
    """By a clock on which a step takes three seconds, and one of plain SimCLR takes one."""
    clock = [0.0]
    def play(game, images, progress):
        clock[0] += 3 if game.settings.masks == "adios" and len(images) == 8 else 1
        return {"loss": torch.zeros(())}
    monkeypatch.setattr(adios.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(adios.Game, "play", play)
    assert adios.main(flags(batch_size=8, masks="adios", ssl="byol", bench=True)) == 0
    numbers = dict(re.findall(r"^(.+?)  +([\d.]+)$", capsys.readouterr().out, re.MULTILINE))
    assert float(numbers["simclr_steps"]) == 3 and not any(Path().iterdir())
    assert float(numbers["step, ms"]) == 3000 and float(numbers["step, images/s"]) == 2.67

# ---- Runs ----------------------------------------------------------------------------------------
def weights(folder):
    """All tensors of a run's checkpoint, and the checkpoint."""
    state = torch.load(Path(folder, "checkpoint.pt"), weights_only=True)
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)], state

def equal_runs(one, other):
    """Whether two finished runs have the same weights, results and log, speeds aside."""
    (ours, state), (theirs, other_state) = weights(one), weights(other)
    assert len(ours) > 100 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    times = r"'(seconds|images_per_second)': [\d.e-]+|'settings': {.*?}"
    results = [re.sub(times, "", str([s["log"], json.loads(Path(out, "results.json").read_text())]))
               for s, out in ((state, one), (other_state, other))]
    assert results[0] == results[1]
    rows = Path(other, "log.csv").read_text().splitlines()[1:]
    assert len(state["log"]) == state["settings"]["epochs"] == len(rows)
    assert_close(*(torch.load(Path(out, "encoder.pt")) for out in (one, other)), atol=0, rtol=0)

def test_command_line_end_to_end():
    """From a terminal that lacks the folder's letters, where torchrun's variables are left over."""
    run = partial(launch, *ADIOS, PYTHONIOENCODING="cp1252", WORLD_SIZE="2", RANK="1")
    out = Path("Ω漢")
    done = run(*flags(epochs=2, masks="adios", num_masks=3, occluder_share=0.4, out=out))
    assert "64 images of 32 px in 10 classes" in done.stdout
    results = json.loads((out / "results.json").read_text())
    assert all(0 <= results[key + end] <= 1 for key in adios.METRICS for end in ("", "_untrained"))
    assert f"{results['knn']:.1%}" in done.stdout and f"{results['object_iou']:.2f}" in done.stdout
    names, *rows = [line.split(",") for line in (out / "log.csv").read_text().splitlines()]
    first, last = (dict(zip(names, row, strict=True)) for row in rows)
    assert [last["epoch"], last["knn"], last["gain"]] == ["2", str(results["knn"]), ""]
    assert 0 < float(last["loss"]) < 10 and float(first["gain"]) < 10  # it learned
    assert sum(float(last[f"area_{n}"]) for n in (1, 2, 3)) == approx(1)
    assert Image.open(out / "masks.png").size[1] > 300 and files_in(out).keys() == set(
        "checkpoint.pt log.csv masks.png film.gif curves.png results.json encoder.pt".split())
    assert Image.open(out / "film.gif").n_frames == 3  # untrained and after each epoch
    text = " ".join(run("--help").stdout.split())
    known = {adios.flag(f.name) for f in fields(Settings)}
    assert all(f" {name}" in text for name in known)
    named = re.findall(r"--[a-z][a-z-]+", (HERE / "README.md").read_text("utf-8"))
    assert set(named) <= known | {"--help", "--nproc-per-node", "--no-cuda-graph"}
    assert "images a step, of all processes together [shapes 128, stl10 256" in text
    assert "k-NN" in launch("sh", "-c", 'exec "$0" "$@" 2>&-', *ADIOS, *flags(epochs=1)).stdout
    assert run("--blur=2", code=2).stderr == "adios: error: --blur 2.0: give float from 0 to 1\n"

def test_a_run_of_one_step_learns(light, capsys):
    game = make_game()  # from seed 0, too
    assert adios.main(flags(limit=32, epochs=1, out="o")) == 0
    state = weights("o")[1]
    assert len(state["log"]) == 1 and "gain" in state["log"][0]
    assert not any(torch.equal(p, state[name][key]) for name in ("model", "occluder")
                   for key, p in getattr(game, name).named_parameters() if p.ndim > 1)
    assert "warning" not in capsys.readouterr().err
    assert not re.search(r"'(param_groups|lr)'", str(state | dict(settings=0)))  # no rates

class Cut(BaseException):
    """The loss of power."""

def cut_at(patch, owner, name, call, error):
    """Raise the error at this call of owner.name."""
    def counted(*arguments, calls=iter(range(1, 10**6)), original=getattr(owner, name)):
        if next(calls) == call:
            raise error
        return original(*arguments)
    patch.setattr(owner, name, counted)

@parametrize("owner, name, call, error", [*((adios, name, call, Cut) for name, call in (
        ("compute_metrics", 3), ("plot_masks", 2), ("save_run", 3), ("augment", 3),
        ("augment", 5), ("write", 1), ("write", 5), ("write", 14))),
    *((os, "fsync", call, OSError(errno.ENOSPC, "No space left on device")) for call in (1, 4, 9)),
    (adios, "train_epoch", 3, KeyboardInterrupt), (os, "fsync", 9, KeyboardInterrupt),
    (adios, "load_data", 1, KeyboardInterrupt)])
def test_runs_cut_anywhere_go_on(monkeypatch, capsys, light, reference, owner, name, call, error):
    with monkeypatch.context() as patch, contextlib.suppress(Cut):
        cut_at(patch, owner, name, call, error)
        assert adios.main(flags(out="o")) == (130 if error is KeyboardInterrupt else 2)
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("adios: ") and error is not Cut
        assert ("--resume" in line) == (call > 1) if error is KeyboardInterrupt else (
            f"error: {Path('o')}" in line and str(error.strerror) in line)
        assert error is KeyboardInterrupt or not [*Path("o").glob("*.part")]
    if name == "train_epoch":  # a GPU's checkpoints hold tensors in another memory format
        state = tree_map_only(torch.Tensor, lambda tensor: tensor if tensor.ndim != 4 else
                              tensor.contiguous(memory_format=torch.channels_last), weights("o")[1])
        torch.save(state, "o/checkpoint.pt")
    assert adios.main(flags(out="o", resume=call > 1)) == 0  # after the first write, resumed
    equal_runs(reference, "o")

@skipif("'killed' not in config.option.keyword", reason="takes minutes: pytest -k killed")
def test_killed_runs_go_on():
    """Twenty runs, each killed at a random moment (kill -9) and resumed to the very end."""
    run = partial(launch, *ADIOS, *flags(epochs=12))
    seconds = timeit.timeit(lambda: run("--out=reference"), number=1)
    for n, moment in enumerate(torch.rand(20).tolist()):
        with contextlib.suppress(subprocess.TimeoutExpired):  # which kills
            run(f"--out={n}", timeout=moment * seconds)
        again = "--resume" if Path(f"{n}/checkpoint.pt").exists() else "--overwrite"
        run(f"--out={n}", again)
        equal_runs("reference", f"{n}")

@parametrize("step, name", [(3, "encoder"), (4, "encoder"), (3, "occluder")])
def test_numbers_that_are_not_finite_end_the_run(monkeypatch, capsys, light, step, name):
    """They are seen at the fourth step, the last of an epoch, or in the weights that it leaves."""
    steps = iter(range(1, 9))
    def poisoned(game, *arguments, play=adios.Game.play):
        report = play(game, *arguments)
        if next(steps) == step:
            next(getattr(game, name, game.model).parameters()).data[0] = math.nan
        return report
    monkeypatch.setattr(adios.Game, "play", poisoned)
    assert adios.main(flags(occluder_share=1, out="o")) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"adios: error: the {name}'s numbers") and "at step 4" in line
    values, state = weights("o")
    assert len(state["log"]) == 1 and all(value.isfinite().all() for value in values)

def test_warnings_are_said_once_each(capsys, light):
    well, warned = dict(epoch=1, embedding_spread=0.9, area_1=0.4, area_2=0.6, gain=1.0), set()
    adios.warn(well, 0.01, warned)
    adios.warn(dict(epoch=1, embedding_spread=0.9, area_1=0.0), 0.0, warned)  # no learned masks
    assert capsys.readouterr().err == "" and not warned
    for change, moved, says in ((dict(embedding_spread=0.0), 0.01, "collapsed"),
                                (dict(area_1=0.99, area_2=0.3), 0.01, "covers nearly everything"),
                                (dict(area_1=0.01), 0.01, "covers nearly nothing"),
                                (dict(masks_apart=0.05), 0.01, "are alike"),
                                ({}, 0.0, "stopped moving")):
        for _ in range(2):
            adios.warn(well | change, moved, warned)
        line, = capsys.readouterr().err.splitlines()
        assert line.startswith("adios: warning: epoch 1: ") and says in line and "try" in line
    for rate, count in ((0.0, 1), (2e-3, 0)):
        adios.train(Settings(**SMALL, occluder_lr=rate, occluder_share=1, out=f"{rate}"))
        assert capsys.readouterr().err.count("the occluder has stopped moving") == count

# ---- What users get wrong ------------------------------------------------------------------------
@parametrize("arguments, says", [
    ("--dataset mnist", "one of shapes, stl10"), ("--masks random", "one of"),
    ("--colour red", "unrecognized arguments: --colour red"),
    ("--epochs many", "invalid int value: 'many'"), ("--num-masks 1", "from 2 to"),
    ("--image-size 31", "from 32 to"), ("--lr nan", "--lr nan: give float from"),
    ("--encoder vit_tiny --image-size 37 --limit 128", "--image-size 37"),
    ("--batch-size 64 --limit 63", "--batch-size 64"), ("--occluder-width 12", "multiple of 8"),
    ("--batch-size 2 --limit 1", "--limit 1"), ("--device abacus", "--device abacus"),
    ("--device meta", "--device meta"), ("--device hpu", "--device hpu"),
    (f"--out {'x' * 300}", "x" * 300), ("--out /proc/self --limit 128", "--out /proc/self"),
    ("--resume --overwrite", "drop one"), ("--dataset folder --data-dir nowhere", "nowhere"),
    ("--resume", "no checkpoint runs"), ("--dataset stl10", "--data-dir data: "),
    ("--evaluate .", "."), ("--evaluate nothing.pt", "there is no checkpoint nothing.pt"),
    (f"--evaluate {'x' * 300}", "there is no checkpoint"),
    ("--masks object --dataset cifar10", "only shapes"), ("--finetune", "--evaluate")])
def test_bad_arguments(refused, arguments, says):
    refused(*arguments.split(), says=says)

def test_settings_are_checked_and_filled_in():
    for wrong in (dict(epochs=1.5), dict(lr=True), dict(out=None), dict(bench=True, evaluate="o")):
        with pytest.raises(AdiosError):
            Settings(**wrong)
    assert isinstance(Settings(lr=1).lr, float) and Settings(dataset="stl10").image_size == 96
    assert Settings(ssl="byol").lr < Settings().lr and Settings(ssl="byol", lr=0.1).lr == 0.1

def test_runs_are_neither_overwritten_nor_mixed(refused, reference, light, monkeypatch):
    shutil.copytree(reference, "o")
    monkeypatch.setattr(torch, "compile", lambda function: function)
    elsewhere = dict(cuda_graph=False, compile=True, data_dir="e", device="auto", resume=True)
    assert adios.main(flags(out="o", **elsewhere)) == 0  # with nothing left to do
    equal_runs(reference, "o")
    monkeypatch.setattr(adios, "load_data", None)  # all this is said before
    refused(*flags(out="o"), says="--overwrite")
    for says in ("--seed 0", "--masks adios-s", "small-stem"):
        refused(*flags(out="o", resume=True, seed=1, masks="adios", small_stem=True), says=says)
    torch.save(weights("o")[1] | dict(processes=4), "o/checkpoint.pt")
    refused(*flags(out="o", resume=True), says="the checkpoint has 4 processes: give the same")
    os.remove("o/checkpoint.pt")
    refused(*flags(out="o"), says="results.json")
    monkeypatch.setenv("HOME", str(Path.cwd()))
    refused(*flags(out="~/o"), says="o holds")
    refused("--evaluate=~/o/", says=f"no checkpoint {Path.cwd()}/o/checkpoint.pt")
    os.symlink("nowhere", "link")
    refused(*flags(out="link/o"), says="--out link/o cannot be made or written to")
    for name in ("results.json", "log.csv"):
        Path(name).write_text("mine")
        refused(*flags(out="."), says=name)
    monkeypatch.setattr(os.path, "lexists", lambda path: False)  # a drive that is not there
    refused(*flags(out="p"), says="--out p cannot be made or written to")

def test_two_runs_started_at_once_do_not_share_a_folder(monkeypatch, refused, light):
    parts = []
    def start_another(*arguments, load=adios.load_data):
        monkeypatch.setattr(adios, "load_data", None)  # the other is refused before
        for found in (adios.files_of_run, lambda out: []):  # also at the very same moment
            monkeypatch.setattr(adios, "files_of_run", found)
            refused(*flags(out="a/o"), says="o holds log.csv: its run ended, is starting or was")
        return load(*arguments)
    monkeypatch.setattr(adios, "load_data", start_another)
    monkeypatch.setattr(os, "fsync", lambda number: parts.extend(Path("a/o").glob("*.part")))
    assert adios.main(flags(out="a/o", epochs=1)) == 0 and Path("a/o/results.json").exists()
    assert parts and all(str(os.getpid()) in part.name for part in parts)

def test_a_picture_never_costs_numbers(monkeypatch, capsys, light):
    monkeypatch.setattr(adios, "Figure", None)
    for epochs in (2, 1):  # on the way and in the end
        with pytest.raises(TypeError):
            adios.main(flags(out=f"{epochs}", epochs=epochs))
        assert len(weights(f"{epochs}")[1]["log"]) == 1
        assert len(Path(f"{epochs}/log.csv").read_text().splitlines()) == 2
    assert {"results.json", "encoder.pt"} <= files_in("1").keys()
    with pytest.raises(TypeError):
        adios.main(["--evaluate=1"])
    assert scores_in("1") and "knn_top1" in capsys.readouterr().out

class Payload:
    def __reduce__(self):  # what a checkpoint must not be able to do
        return Path.touch, (Path("ran"),)

def test_odd_checkpoints(refused, reference):
    (_, state), path = weights(reference), Path("o/checkpoint.pt")
    shutil.copytree(reference, "o")
    other = state | dict(settings=state["settings"] | dict(colour=True))
    for bad, says in ((path.read_bytes()[:5000], "damaged"), (b"", "damaged"),
                      (pickle.dumps(Payload(), 2), "damaged"), (pickle.dumps([], 2), "damaged"),
                      (dict(model=Payload()), "damaged"), (dict(log=[]), "damaged"),
                      (state | dict(version=1), "another version"), (other, "another version")):
        path.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, path)
        refused(*flags(out="o", resume=True), says=says)
        refused("--evaluate=o/checkpoint.pt", says=says)
    assert not Path("ran").exists()

@parametrize("error, says", [
    (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), "--batch-size"),
    (PermissionError(errno.EACCES, "Permission denied", "a/b"), "Permission denied"),
    (MemoryError(), "memory is too small"), (OSError("no network\nat all"), "no network at all"),
    (RuntimeError("alloc_cpu.cpp: DefaultCPUAllocator: can't allocate memory"), "--limit"),
    (ZeroDivisionError(), None), (RuntimeError("wrong shapes"), None)])
def test_errors_from_outside_are_one_line(monkeypatch, refused, error, says):
    cut_at(monkeypatch, adios, "train", 1, error)
    if says:
        return refused(*flags(), says=says)
    with pytest.raises(type(error)):  # a mistake of the program's own keeps its traceback
        adios.main(flags())

ANY = dict(ssl=[*adios.OBJECTIVES, "moco"], masks=[*adios.SCHEMES], seed=[0, 2**12 - 1],
           updates=["alternating", "simultaneous"], encoder=["resnet18", "resnet18", "vit_tiny"],
           image_size=[31, 32, 33, 40, 50], num_masks=[1, 2, 3, 5], width=[0, 4, 8],
           occluder_width=[8, 12, 16], small_stem=[True, False], batch_size=[1, 2, 7, 16, 25],
           limit=[12, 24], lr=[0, 1e-9, 1e-3], occluder_lr=[0, 1e-3], sparsity=[-1, 0, 0.1, 1000],
           occluder_share=[0, 0.001, 0.5, 1], temperature=[0.001, 0.2, 1000], blur=[0, 1],
           min_crop=[0, 0.001, 0.5, 1], jitter=[0, 0.5, 1.25, 2], weight_decay=[0, 1e-4])

@hypothesis.settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[
    hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(fixed_dictionaries({}, optional={k: sampled_from(v) for k, v in ANY.items()}))
def test_any_settings_train_or_are_refused_in_one_line(capsys, light, chosen):
    code = adios.main(flags(**dict(limit=24, batch_size=12, small_stem=False) | chosen, epochs=1,
                            overwrite=True, out="o"))
    out, err = capsys.readouterr()
    if code:
        assert code == 2 and out == "" and re.fullmatch("adios: error: --.*\n", err), err
    else:
        assert all(value.isfinite().all() for value in weights("o")[0]) and "images/s" in out

# ---- Compiled steps, and those on a GPU ----------------------------------------------------------
def test_a_compiled_step_is_the_plain_one(monkeypatch):
    """As far as Python goes: what was traced, all of both networks in a step, runs as it is."""
    traced, games, reports = [], [], []
    def replay(graph, inputs):
        names = [getattr(node.target, "__name__", "") for node in graph.graph.nodes]
        traced.append((names.count("group_norm"), names.count("batch_norm")))
        return graph.forward
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=replay, fullgraph=True))
    for compiled in (False, True):
        torch.manual_seed(0)
        games.append(game := make_game(compile=compiled, masks="adios", ssl="byol"))
        game.model.double(), game.occluder.double()  # Adam magnifies float32's noise
        fix_views(game.fast_step.__self__)
        reports.append([game.play(None, 0.1) for _ in range(3)])
        assert bool(traced) == compiled
    masks, *views = traced  # views without and with a gradient
    assert masks == (8, 0) and len(views) == 2 and len(set(views)) == 1 and views[0][1] >= 20
    assert_close(*reports)
    for network in ("model", "occluder"):
        assert_close(*[snapshot(getattr(game, network)) for game in games], rtol=1e-5, atol=1e-6)
    adios.compute_metrics(make_game(compile=True), shapes())
    assert len(traced) == 3

def test_what_cannot_be_compiled_is_said_before_anything_is_loaded(refused, monkeypatch):
    monkeypatch.setattr(adios, "load_data", None)
    for command in ((), ("--bench",)):
        cut_at(monkeypatch, torch, "compile", 1, RuntimeError("no C++\ncompiler\n\nset THIS"))
        refused("--compile", *command, says="--compile does not work here, leave it out: no C++ c")

def play_steps(count, stop=math.inf, **changes):
    """A game from one seed, what its steps report, and the networks' states before each."""
    torch.manual_seed(0)
    game = make_game(torch.device("cuda"), width=16, lr=3e-4, occluder_share=0.5, **changes)
    images, states, reports = shapes(masks="object").images[:16].cuda(), [], []
    for n in range(count):
        states.append((snapshot(game.model), snapshot(game.occluder)))
        reports.append(game.play(images, 0.1 if n < stop else 0.6))
    return game, [{k: v.item() for k, v in report.items()} for report in reports], states

@needs_gpu
@parametrize("masks", adios.SCHEMES)
@parametrize("ssl", adios.OBJECTIVES)
def test_a_captured_step_is_the_plain_one(ssl, masks):
    """The same numbers from the same seed, step by step; in bfloat16 they drift apart a little."""
    variants = [{}] + [dict(updates="simultaneous")] * (masks == "adios-s")
    variants += [dict(compile=True)] * (masks == "adios-s" and ssl == "simclr")
    for changes in variants:
        args = dict(ssl=ssl, masks=masks, blur=0.5) | changes
        plain, expected, _ = play_steps(10, **args, cuda_graph=False)
        game, reports, _ = play_steps(10, **args)
        _, (first,), _ = play_steps(1, **args | dict(cuda_graph=False, compile=False))
        assert not hasattr(plain.fast_step, "graph") and game.fast_step.graph is not None
        assert reports[0] == approx(first, rel=2e-2, abs=2e-2)  # compilation rounds otherwise
        for n, (ours, theirs) in enumerate(zip(reports, expected)):
            close = 5e-3 if n < 4 else 2e-2
            assert ours == approx(theirs, rel=close, abs=close), (changes, n)
        assert len({report["loss"] for report in reports[4:]}) > 3  # new crops in each replay

@needs_gpu
def test_another_capture_follows_when_the_occluder_stops():
    game, reports, states = play_steps(17, stop=8)
    assert ["gain" in report for report in reports] == [True] * 8 + [False] * 9
    assert game.fast_step.graph is not None and not same(game.model, states[16][0])
    assert same(game.occluder, states[8][1]) and not same(game.occluder, states[7][1])
    assert all(math.isfinite(report["loss"]) for report in reports)

@needs_gpu
@parametrize("device", ["cpu", "cuda"])
def test_a_run_goes_on_on_another_device(monkeypatch, light, device):
    games, losses, args = [], [], dict(limit=256, epochs=2)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        cut_at(patch, adios, "train_epoch", 2, Cut)
        adios.main(flags(**args, device=device, out="o"))
    monkeypatch.setattr(adios, "play_epochs", lambda game, *rest, play=adios.play_epochs: (
        games.append(game), play(game, *rest))[1])
    for n, (other, graph) in enumerate((("cuda", True), ("cuda", False), ("cpu", True))):
        shutil.copytree("o", f"{n}")
        adios.main(flags(**args, resume=True, device=other, cuda_graph=graph, out=n))
        (values, state), game = weights(f"{n}"), games[n]
        assert len(state["log"]) == 2 and all(value.isfinite().all() for value in values)
        assert (getattr(game.fast_step, "graph", None) is not None) == (n == 0)
        for group in game.model_optimizer.param_groups:
            assert group["fused"] and group["capturable"] == (other == "cuda")
            assert isinstance(group["lr"], torch.Tensor) == (other == "cuda")
        assert {s["step"].item() for s in game.model_optimizer.state.values()} == {16}
        losses.append(state["log"][1]["loss"])
    assert losses[1] == approx(losses[0], rel=2e-2) and losses[2] == approx(losses[0], rel=0.2)

@needs_gpu
def test_float16_trains_and_is_not_captured(monkeypatch):
    monkeypatch.setattr(adios, "precision", lambda device: torch.float16)
    game, reports, states = play_steps(20, masks="adios")
    assert game.scaler.is_enabled() and game.fast_step == game.step
    assert all(math.isfinite(value) for report in reports for value in report.values())
    assert not same(game.model, states[0][0]) and not same(game.occluder, states[0][1])

@needs_gpu
def test_data_are_learned_on_a_gpu():
    write_stl10("d", train=500, test=200, unlabeled=1500)
    assert adios.main("--dataset=stl10 --data-dir=d --epochs=3 --out=o".split()) == 0
    log = weights("o")[1]["log"]
    assert all(0 < row["loss"] < 10 for row in log) and 0 < log[2]["knn"] < 0.4  # of pure noise
    results = adios.train(Settings(epochs=4, device="cuda", out="p"))
    assert results["knn"] > 0.6 and results["knn"] > results["knn_shuffled_background"]

# ---- The README and the notebook -----------------------------------------------------------------
def test_the_readmes_code_runs_as_it_stands(monkeypatch):
    """Also where its run's files are a GPU's and there is none."""
    text = (HERE / "README.md").read_text("utf-8")
    _, take_away, own_loop = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    network, mean = adios.ResNet18(64), torch.full((1, 3, 1, 1), 0.5)
    os.makedirs("runs/stl10-simclr-adios-s")
    torch.save(network.state_dict(), "runs/stl10-simclr-adios-s/encoder.pt")
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(dict(mean=mean, std=mean / 2), "runs/stl10-simclr-adios-s/checkpoint.pt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 96**2, 8))
    names = dict(torch=torch, torchvision=torchvision, images=torch.rand(2, 3, 64, 64), model=model,
                 view_a=torch.randn(4, 3, 96, 96), view_b=torch.randn(4, 3, 96, 96),
                 optimizer=torch.optim.SGD(model.parameters(), 0.1), ssl_loss=F.mse_loss)
    exec(take_away, names)
    assert_close(names["features"], network.eval()((names["images"] - 0.5) / 0.25))
    before = snapshot(model)
    exec(own_loop, names)
    assert names["gain"].isfinite() and not same(model, before)
    assert all(p.grad.abs().sum() > 0 for p in names["occluder"].parameters())

@parametrize("which", ["saved", "run"])
def test_the_notebook(tmp_path, which):
    nbclient, nbformat, _ = map(pytest.importorskip, ("nbclient", "nbformat", "ipykernel"))
    notebook = nbformat.read(HERE / "notebook.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if which == "run":
        shutil.copy(HERE / "adios.py", tmp_path)
        cell, = (cell for cell in cells if "settings" in cell.metadata.get("tags", []))
        cell.source += f"\nsettings = Settings(**{SMALL})\nshort = dict(limit=64, epochs=1)\n"
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={
            "metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 10
    assert not re.search(r"'output_type': 'error'|Warning", str(outputs))
