"""Tests of adios.py: `python -m pytest`. They use nothing outside the repository."""

import csv
import errno
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import hypothesis
import nbclient
import nbformat
import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import strategies
from PIL import Image
from sklearn import cluster, linear_model, metrics, preprocessing
from torchvision.transforms import v2

import adios
from adios import Settings

HERE = Path(__file__).parent
SMALL = dict(limit=64, epochs=1, batch_size=32, width=8, device="cpu")


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """Each test from the same random state, in a folder and with a cache of its own."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A finished run of SMALL settings and 3 epochs: its folder and its results."""
    out = tmp_path_factory.mktemp("whole")
    return out, adios.train(Settings(**SMALL | dict(epochs=3), out=str(out)))


def run(*arguments, **more):
    """adios.py as a user starts it."""
    return subprocess.run([sys.executable, HERE / "adios.py", *arguments], capture_output=True,
                          text=True, timeout=300, **more)


def make_game(**changes):
    settings = Settings(**{**SMALL, "batch_size": 16, **changes})
    mean, std = torch.full((1, 3, 1, 1), 0.5), torch.full((1, 3, 1, 1), 0.25)
    return adios.Game(settings, mean, std, torch.device("cpu"))


def make_views(game, count=16):
    images = adios.load_data(Settings(**SMALL)).images[:count]
    return [game.normalise(adios.augment(images, game.settings)) for _ in range(2)]


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(module, before):
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# ---- The objective and the penalty ---------------------------------------------------------------


def test_nt_xent_is_the_written_out_sum():
    z_a, z_b, temperature = torch.randn(5, 7), torch.randn(5, 7), 0.2
    z, total = torch.cat((z_a, z_b)), 0
    cosine = [[F.cosine_similarity(p, q, dim=0).item() for q in z] for p in z]
    for i in range(10):
        others = sum(math.exp(cosine[i][k] / temperature) for k in range(10) if k != i)
        total -= math.log(math.exp(cosine[i][(i + 5) % 10] / temperature) / others)
    assert adios.nt_xent(z_a, z_b, temperature).item() == pytest.approx(total / 10, abs=1e-5)


def test_sparsity_penalty_is_its_formula_per_image_and_mask():
    masks = torch.rand(4, 3, 8, 8).softmax(1)
    penalty = adios.sparsity_penalty(masks)
    assert penalty.shape == (4, 3)
    for b in range(4):
        for n in range(3):
            area = masks[b, n].sum().item() / 64
            assert penalty[b, n].item() == pytest.approx(1 / math.sin(math.pi * area), rel=1e-5)


def test_sparsity_penalty_grows_to_both_sides_and_stays_finite():
    areas = torch.tensor([0.0, 0.01, 0.2, 0.5, 0.8, 0.99, 1.0])
    penalty = adios.sparsity_penalty(areas[None, :, None, None].expand(1, 7, 4, 4))[0]
    assert penalty[3].item() == pytest.approx(1)
    assert (penalty[:3].diff() < 0).all() and (penalty[4:].diff() > 0).all()
    assert penalty.isfinite().all() and penalty[0] > 100
    masks = torch.zeros(1, 2, 4, 4, requires_grad=True)
    adios.sparsity_penalty(masks).sum().backward()
    assert (masks.grad < 0).all() and masks.grad.isfinite().all()  # collapsed masks are drawn back


# ---- The models ----------------------------------------------------------------------------------


def test_resnet18_is_torchvisions():
    theirs, ours = torchvision.models.resnet18(), adios.ResNet18(64)
    for source, target in ((theirs, ours), (ours, theirs)):
        for p in source.parameters():
            torch.nn.init.normal_(p, 0.02, 0.05)
        missing, unexpected = target.load_state_dict(source.state_dict(), strict=False)
        assert {name.split(".")[0] for name in (*missing, *unexpected)} == {"fc"}
        theirs.fc = torch.nn.Identity()
        x = torch.randn(2, 3, 64, 64)
        for mode in (True, False):
            torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x))
        theirs.fc = torch.nn.Linear(512, 1000)


@pytest.mark.parametrize("size", [32, 45, 96])
def test_the_stem_is_the_same_where_a_gradient_goes_on_to_the_images(size):
    net, image = adios.ResNet18(8).double(), torch.randn(2, 3, size, size, dtype=torch.float64)
    results = []
    for forward in (net.stem, net.conv1):
        x = image.clone().requires_grad_()
        y = forward(x)
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, net.conv1.weight))))
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain)


def test_small_stem_keeps_the_resolution():
    small, usual = adios.ResNet18(8, small_stem=True), adios.ResNet18(8)
    x = torch.randn(2, 3, 32, 32)
    sizes = []
    for net in (small, usual):
        net.layer1.register_forward_hook(lambda _, __, out: sizes.append(out.shape[-1]))
        assert net(x).shape == (2, 64)
    assert sizes == [32, 8]


@pytest.mark.parametrize("size, stages", [(32, 4), (50, 4), (64, 5), (96, 5), (224, 6)])
def test_masks_share_out_every_pixel(size, stages):
    occluder = adios.Occluder(size, 5, 8)
    masks = occluder(torch.randn(2, 3, size, size))
    assert masks.shape == (2, 5, size, size) and len(occluder.down) == stages
    assert masks.min() > 0 and masks.max() < 1
    torch.testing.assert_close(masks.sum(1), torch.ones(2, size, size))


@pytest.mark.parametrize("small, large", [(6, 12), (6, 13), (5, 5)])
def test_upsampling_within_the_convolution_is_upsampling_before_it(small, large):
    x, skip = torch.randn(2, 3, small, small), torch.randn(2, 4, large, large)
    weight = torch.randn(5, 7, 3, 3)
    both = torch.cat((F.interpolate(x, size=skip.shape[2:]), skip), 1)
    torch.testing.assert_close(adios.upsample_and_convolve(x, skip, weight),
                               F.conv2d(both, weight, padding=1), atol=1e-5, rtol=1e-5)


def test_every_part_of_the_occluder_reaches_its_masks():
    occluder = adios.Occluder(32, 2, 8)
    occluder(torch.randn(4, 3, 32, 32))[:, 0].square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in occluder.parameters())


# ---- The game ------------------------------------------------------------------------------------


def test_moves_leave_the_other_player_untouched():
    for ssl in ("simclr", "byol", "simsiam"):
        game = make_game(ssl=ssl)
        views = make_views(game)
        painted = [game.paint(views[which]) for which in adios.OBJECTIVES[ssl][1]]
        hidden = [adios.hide_one(masks) for masks in painted]
        model, occluder = snapshot(game.model), snapshot(game.occluder)

        game.inference_move(views, hidden, 0.1)
        assert same(game.occluder, occluder) and not same(game.model, model)
        assert all(p.grad is None for p in game.occluder.parameters())

        model = snapshot(game.model)  # the batch-norm statistics among it
        trained = [p for p in game.model.parameters() if p.requires_grad]
        gradients = [p.grad.clone() for p in trained]
        game.occlusion_move(views, painted, hidden, 0.1)
        assert same(game.model, model) and not same(game.occluder, occluder)
        assert all(torch.equal(p.grad, g) for p, g in zip(trained, gradients))
        assert trained == [p for p in game.model.parameters() if p.requires_grad]


def test_frozen_puts_back_what_was_there():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4).requires_grad_(False),
                                torch.nn.BatchNorm1d(4, track_running_stats=False),
                                torch.nn.BatchNorm1d(4))
    for _ in range(2):
        assert [p.requires_grad for p in model.parameters()] == [False] * 2 + [True] * 4
        assert [norm.track_running_stats for norm in model[1:]] == [False, True]
        with adios.frozen(model):
            assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("ssl", ["simclr", "byol", "simsiam"])
@pytest.mark.parametrize("scheme", ["adios", "adios-s"])
def test_a_small_step_of_i_lowers_the_loss_and_one_of_m_raises_it(scheme, ssl):
    game = make_game(masks=scheme, ssl=ssl, lr=1e-4, occluder_lr=1e-4, sparsity=0, weight_decay=0)
    views = make_views(game)

    def hide():
        torch.manual_seed(1)
        painted = [game.paint(views[which]) for which in adios.OBJECTIVES[ssl][1]]
        return painted, [adios.SCHEMES[scheme](None, masks, None) for masks in painted]

    before = game.loss(views, hide()[1])[0].item()
    game.inference_move(views, hide()[1], 0.1)
    between = game.loss(views, hide()[1])[0].item()
    painted, hidden = hide()
    game.occlusion_move(views, painted, hidden, 0.1)
    after = game.loss(views, hide()[1])[0].item()
    assert between < before - 1e-5 and after > between + 1e-6


def test_m_pays_for_its_masks():
    """With a large λ the occluder evens its areas out, whatever the loss says."""
    game = make_game(sparsity=1000, occluder_lr=3e-3)
    views = make_views(game)
    with torch.no_grad():
        game.occluder.to_masks.bias[0] = 3
        before = adios.sparsity_penalty(game.paint(views[1])).mean()
    for _ in range(10):
        masks = game.paint(views[1])
        game.occlusion_move(views, [masks], [adios.hide_one(masks)], 0.1)
    assert adios.sparsity_penalty(game.paint(views[1])).mean() < 0.7 * before


def test_m_gains_the_loss_less_the_price_of_all_masks():
    game = make_game(masks="adios", sparsity=0.7)
    views = make_views(game)
    masks = game.paint(views[1])
    loss = game.loss(views, [masks])[0].item()
    price = adios.sparsity_penalty(masks).mean().item()
    gain = game.occlusion_move(views, [masks], [masks], 0.1).item()
    assert gain == pytest.approx(loss - 0.7 * price, abs=1e-4)


@pytest.mark.parametrize("ssl, encodings, paintings", [("simclr", 7, 1), ("simsiam", 14, 2)])
def test_whole_views_are_encoded_once(ssl, encodings, paintings):
    game, calls = make_game(masks="adios", num_masks=3, ssl=ssl), []
    game.model.encoder.register_forward_hook(lambda *_: calls.append("encode"))
    game.occluder.register_forward_hook(lambda *_: calls.append("paint"))
    game.play(adios.load_data(Settings(**SMALL)).images[:16], 0.1)
    assert calls == paintings * ["paint"] + encodings * ["encode"]


def test_the_loss_is_the_mean_over_the_masks_of_a_against_masked_b():
    game = make_game(masks="adios", num_masks=3)
    view_a, view_b = make_views(game)
    masks = game.paint(view_b)
    z_a, *z_b = (game.model(view)[1] for view in (
        view_a, *(view_b - view_b * masks[:, n:n + 1] for n in range(3))))
    parts = [adios.nt_xent(z_a, z, game.settings.temperature).item() for z in z_b]
    assert game.loss((view_a, view_b), [masks])[0].item() == pytest.approx(
        sum(parts) / 3, abs=1e-4)


def test_simsiam_masks_both_views_in_turn():
    game = make_game(ssl="simsiam")
    view_a, view_b = make_views(game)
    masks_a, masks_b = torch.rand(2, 16, 1, 32, 32)

    def distance(one, other):
        (p, z), (q, y) = game.model(one), game.model(other)
        return (adios.simsiam_loss(p, y) + adios.simsiam_loss(q, z)).item() / 2

    expected = (distance(view_a * (1 - masks_a), view_b) + distance(view_a, view_b * (1 - masks_b)))
    assert game.loss((view_a, view_b), [masks_a, masks_b])[0].item() == pytest.approx(
        expected / 2, abs=1e-5)


@pytest.mark.parametrize("ssl", adios.OBJECTIVES)
def test_one_backward_pass_has_the_gradients_of_both_moves(ssl):
    game = make_game(ssl=ssl, masks="adios", updates="simultaneous", sparsity=0.3)
    views, truths = game.two_views(adios.load_data(Settings(**SMALL)).images[:16])
    painted, hidden = game.hide(views, truths)
    loss, _ = game.loss(views, hidden)
    ours = [p for p in game.model.parameters() if p.requires_grad]
    descent = torch.autograd.grad(loss, ours, retain_graph=True)
    ascent = torch.autograd.grad(loss - 0.3 * adios.sparsity_penalty(torch.cat(painted)).mean(),
                                 [*game.occluder.parameters()])
    painted, hidden = game.hide(views, truths)
    shown = game.joint_move(views, painted, hidden, 0.1)
    assert shown[0].item() == pytest.approx(loss.item(), abs=1e-5) and shown[1] < shown[0]
    for p, gradient in zip(ours, descent):
        torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-3)
    for p, gradient in zip(game.occluder.parameters(), ascent):
        torch.testing.assert_close(p.grad, -gradient, atol=1e-5, rtol=1e-3)


def test_simultaneous_updates_move_both_players():
    game = make_game(updates="simultaneous")
    occluder, model = snapshot(game.occluder), snapshot(game.model)
    loss, gain, *_ = game.play(adios.load_data(Settings(**SMALL)).images[:16], 0.1).tolist()
    assert math.isfinite(gain) and gain < loss
    assert not same(game.occluder, occluder) and not same(game.model, model)


def test_without_learned_masks_only_i_moves():
    for scheme in ("none", "mae", "beit"):
        game = make_game(masks=scheme)
        occluder, model = snapshot(game.occluder), snapshot(game.model)
        loss, gain, area = game.play(adios.load_data(Settings(**SMALL)).images[:16], 0.1).tolist()
        assert same(game.occluder, occluder) and not same(game.model, model)
        assert math.isnan(gain) and math.isfinite(loss)
        assert area == pytest.approx({"none": 0, "mae": 0.75, "beit": 0.3}[scheme], abs=0.02)


def test_byols_target_gets_no_gradient_and_follows_the_schedule():
    game = make_game(ssl="byol", lr=1e-2)
    views = make_views(game)
    hidden = [torch.zeros(16, 1, 32, 32)]
    for progress in (0, 0.25, 1):
        before = [p.clone() for p in game.model.target.parameters()]
        game.inference_move(views, hidden, progress)
        online = [*game.model.encoder.parameters(), *game.model.projector.parameters()]
        momentum = 1 - 0.01 * (math.cos(math.pi * progress) + 1) / 2
        for slow, was, fast in zip(game.model.target.parameters(), before, online):
            assert slow.grad is None and not slow.requires_grad
            torch.testing.assert_close(slow, momentum * was + (1 - momentum) * fast)
    assert not torch.equal(before[0], online[0])


def test_predicted_losses_are_the_written_out_ones_and_stop_at_the_target():
    p, z = torch.randn(6, 9, requires_grad=True), torch.randn(6, 9, requires_grad=True)
    cosines = [sum(a * b for a, b in zip(x, y)) / math.hypot(*x) / math.hypot(*y)
               for x, y in zip(p.tolist(), z.tolist())]
    for loss, expected in ((adios.byol_loss, 2 - 2 * sum(cosines) / 6),
                           (adios.simsiam_loss, -sum(cosines) / 6)):
        assert loss(p, z).item() == pytest.approx(expected, abs=1e-5)
        loss(p, z).backward()
        assert z.grad is None and p.grad.abs().sum() > 0


# ---- Masking schemes -----------------------------------------------------------------------------


def test_mae_hides_three_quarters_in_patches():
    masks = adios.hide_patches(torch.zeros(300, 3, 32, 32))
    assert masks.shape == (300, 1, 32, 32)
    patches = masks.view(300, 8, 4, 8, 4)
    assert (patches == patches[:, :, :1, :, :1]).all() and (masks.mean((1, 2, 3)) == 0.75).all()
    assert (masks.mean((0, 1)) - 0.75).abs().max() < 0.12
    assert adios.hide_patches(torch.zeros(2, 3, 50, 50)).shape == (2, 1, 50, 50)


def test_beit_hides_three_tenths_in_blocks(monkeypatch):
    view = torch.zeros(400, 3, 64, 64)
    masks = adios.hide_blocks(view)
    share = masks.mean((1, 2, 3))
    assert set(masks.unique().tolist()) == {0, 1}
    assert share.max() <= 0.3 and share.mean().item() == pytest.approx(0.29, abs=0.015)
    # the first block alone: a rectangle of 8 to 30 %, aspect ratio 0.3 to 1 / 0.3
    monkeypatch.setattr(adios, "range", lambda n: (0,), raising=False)
    first = adios.hide_blocks(view)[:, 0]
    height, width = (first.amax(axis).sum(1) for axis in (2, 1))
    assert torch.equal(first.sum((1, 2)), height * width)
    area, aspect = height * width / 64**2, height / width
    assert 0.07 < area.min() < 0.1 and 0.27 < area.max() <= 0.3
    assert 0.25 < aspect.min() < 0.4 and 2.6 < aspect.max() < 3.8
    assert aspect.log().mean().abs() < 0.15


def test_true_masks_hide_the_object_or_all_else():
    truth = torch.zeros(200, 1, 4, 4)
    truth[:, 0, :2] = 1
    masks = adios.hide_object(truth)
    is_object = (masks == truth).flatten(1).all(1)
    assert (is_object | (masks == 1 - truth).flatten(1).all(1)).all()
    assert is_object.float().mean().item() == pytest.approx(0.5, abs=0.12)
    truth = torch.arange(8.)[:, None, None, None].expand(8, 1, 2, 2) / 8
    dealt = adios.SCHEMES["object-shuffled"](None, None, truth)
    assert (torch.minimum((dealt - truth).abs(), (1 - dealt - truth).abs()) > 0.01).any(1).all()


def test_true_masks_are_cropped_and_flipped_with_their_image():
    data = adios.load_data(Settings(**SMALL))
    images = torch.cat((data.masks[:, None].expand(-1, 3, -1, -1) * 255,
                        data.masks[:, None] * 255), 1).byte()  # pictures of the masks themselves
    views = adios.augment(images, Settings(jitter=0))
    assert views.shape[1] == 4
    torch.testing.assert_close(views[:, 0], views[:, 3], atol=1e-3, rtol=0)


def test_hide_one_deals_each_image_one_of_its_masks():
    masks = torch.rand(3000, 3, 1, 1)
    hidden = adios.hide_one(masks)
    which = (hidden == masks).float()
    assert hidden.shape == (3000, 1, 1, 1) and (which.sum(1) == 1).all()
    assert (which.mean((0, 2, 3)) - 1 / 3).abs().max() < 0.04


@pytest.mark.parametrize("encoder", ["resnet18", "vit_tiny"])
@pytest.mark.parametrize("masks", adios.SCHEMES)
@pytest.mark.parametrize("ssl", adios.OBJECTIVES)
def test_every_combination_trains(ssl, masks, encoder):
    settings = Settings(**SMALL | dict(batch_size=8, lr=1e-3), ssl=ssl, masks=masks,
                        encoder=encoder)
    data = adios.load_data(settings)
    game = adios.Game(settings, *data.statistics(), torch.device("cpu"))
    players = [game.model.encoder, game.model.projector]
    players += [game.occluder] if masks in adios.LEARNED else []
    before = [snapshot(player) for player in players]
    for step in range(2):
        images = torch.cat((data.images[:8], 255 * data.masks[:8, None]), 1)
        loss, gain, *areas = game.play(images, 0.05 + step / 20).tolist()
        assert math.isfinite(loss) and math.isfinite(gain) == (masks in adios.LEARNED)
        assert all(0 <= area <= 1 for area in areas)
    assert not any(same(player, was) for player, was in zip(players, before))
    assert all(p.isfinite().all() for player in players for p in player.parameters())


@pytest.mark.parametrize("size, patches", [(32, 8), (64, 8), (96, 8), (224, 14), (50, 10)])
def test_vit_tiny_is_192_wide_and_12_deep(size, patches):
    encoder, width = adios.make_encoder(Settings(encoder="vit_tiny", image_size=size))
    assert encoder(torch.randn(2, 3, size, size)).shape == (2, width) == (2, 192)
    assert len(encoder.encoder.layers) == 12
    assert encoder.encoder.layers[0].self_attention.num_heads == 3
    assert encoder.seq_length == patches**2 + 1


def test_vit_tiny_refuses_sizes_without_patches():
    with pytest.raises(adios.AdiosError, match="--image-size 37"):
        adios.make_encoder(Settings(encoder="vit_tiny", image_size=37))


def test_resnet50_is_torchvisions():
    encoder, width = adios.make_encoder(Settings(encoder="resnet50", small_stem=False))
    missing, _ = torchvision.models.resnet50().load_state_dict(encoder.state_dict(), strict=False)
    assert width == 2048 and missing == ["fc.weight", "fc.bias"]
    encoder, _ = adios.make_encoder(Settings(encoder="resnet50", small_stem=True))
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 2048)


# ---- Both players --------------------------------------------------------------------------------


def test_the_occluder_stops_at_its_share_of_the_run():
    game = make_game(occluder_share=0.5, occluder_lr=1.0)
    images = adios.load_data(Settings(**SMALL)).images[:16]
    rates = []
    for progress in (0.025, 0.05, 0.499):
        assert game.play(images, progress)[1].isfinite()
        rates.append(game.occlusion.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5, 1, 0], abs=1e-3)
    before, model = snapshot(game.occluder), snapshot(game.model)
    assert game.play(images, 0.5)[1].isnan()
    assert same(game.occluder, before) and not same(game.model, model)


def test_learning_rate_rises_then_falls_to_zero():
    game = make_game(lr=1.0, occluder_lr=0.5)
    rates = []
    for progress in (0, 0.05, 0.1, 0.55, 1):
        game.descend(sum(p.sum() for p in game.model.parameters()), (game.inference, progress))
        rates.append(game.inference.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_weight_decay_spares_biases_and_norms():
    game = make_game(weight_decay=0.3)
    decay = {p: group["weight_decay"] for group in game.inference.optimizer.param_groups
             for p in group["params"]}
    assert len(decay) == len(list(game.model.parameters()))
    assert all(value == (0.3 if p.ndim > 1 else 0) for p, value in decay.items())


@pytest.mark.parametrize("native, dtype", [(True, torch.bfloat16), (False, torch.float16)])
def test_precision_asks_for_native_bfloat16(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or native)
    assert adios.precision(torch.device("cuda")) == dtype
    assert adios.precision(torch.device("cpu")) == torch.float32
    assert adios.precision(torch.device("mps")) == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_default_game_is_won_on_a_gpu(monkeypatch, dtype):
    monkeypatch.setattr(adios, "precision", lambda device: dtype)
    results = adios.train(Settings(epochs=4, device="cuda"))
    assert results["knn"] > 0.6 and results["object_iou"] > 0.5


# ---- The views, against torchvision --------------------------------------------------------------


def photos(count=8, size=32):
    """Smooth random colours, bytes [n, 3, size, size]."""
    return F.interpolate(torch.rand(count, 3, 6, 6), size=size, mode="bicubic").mul(255).clamp(
        0, 255).byte()


def test_crop_and_flip_is_torchvisions():
    images = photos(64, 40).float() / 255
    boxes, flip = adios.random_boxes(64, 40, 0.08), torch.arange(64) % 2 == 0
    views = adios.crop_and_flip(images, boxes, flip)
    for image, view, box, mirrored in zip(images, views, boxes.int().tolist(), flip):
        theirs = v2.functional.resized_crop(image, *box, [40, 40], antialias=False)
        theirs = v2.functional.horizontal_flip(theirs) if mirrored else theirs
        torch.testing.assert_close(view, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("min_crop", [0.08, 0.3, 0.9, 1.0])
def test_boxes_are_distributed_as_torchvisions(min_crop):
    ours = adios.random_boxes(4000, 32, min_crop)
    image = torch.empty(3, 32, 32)
    theirs = torch.tensor([torchvision.transforms.RandomResizedCrop.get_params(
        image, (min_crop, 1), (3 / 4, 4 / 3)) for _ in range(4000)]).float()
    assert (ours == ours.int()).all()
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= 32).all()
    for column in range(4):  # two-sample Kolmogorov-Smirnov: 0.0428 is p = 0.001
        grid = torch.arange(33)
        cdf = [(boxes[:, column, None] <= grid).float().mean(0) for boxes in (ours, theirs)]
        assert (cdf[0] - cdf[1]).abs().max() < 0.0428
    together = [torch.corrcoef(boxes.T + 1e-3 * torch.randn(4, 4000)) for boxes in (ours, theirs)]
    assert (together[0] - together[1]).abs().max() < 0.1


def test_colour_jitter_is_torchvisions_in_each_images_own_order():
    images = photos(64).float() / 255
    images[0] = 0.5                     # grey: no hue
    images[1] = torch.eye(3).repeat_interleave(11, 1)[:, :32, None]  # pure colours
    factors = torch.stack((*(torch.rand(3, 64) * 1.6 + 0.2), torch.rand(64) - 0.5), 1)
    order = torch.rand(64, 4).argsort(1)
    order[5] = -1
    views = images.clone()
    adios.colour_jitter_(views, factors, order)
    adjust = (v2.functional.adjust_brightness, v2.functional.adjust_contrast,
              v2.functional.adjust_saturation, v2.functional.adjust_hue)
    for i in range(64):
        theirs = images[i]
        for which in order[i].tolist():
            if which >= 0:
                theirs = adjust[which](theirs, factors[i, which].item())
        torch.testing.assert_close(views[i], theirs, atol=1e-4, rtol=0)


def test_blur_is_torchvisions():
    images, sigma = photos(6, 96).float() / 255, torch.linspace(0.1, 2, 6)
    for image, view, s in zip(images, adios.gaussian_blur(images, sigma), sigma.tolist()):
        theirs = v2.functional.gaussian_blur(image, [9, 9], [s, s])
        torch.testing.assert_close(view, theirs, atol=1e-5, rtol=0)


def test_views_are_drawn_with_the_stated_probabilities(monkeypatch):
    drawn = {}
    jitter, crop, blur = adios.colour_jitter_, adios.crop_and_flip, adios.gaussian_blur
    monkeypatch.setattr(adios, "crop_and_flip", lambda images, boxes, flip: drawn.update(
        flip=flip.float().mean()) or crop(images, boxes, flip))
    monkeypatch.setattr(adios, "colour_jitter_", lambda images, factors, order: drawn.update(
        factors=factors, order=order) or jitter(images, factors, order))
    monkeypatch.setattr(adios, "gaussian_blur", lambda images, sigma: drawn.update(
        sigma=sigma) or blur(images, sigma))
    views = adios.augment(photos(4000), Settings(jitter=0.5, blur=0.3))
    assert views.shape == (4000, 3, 32, 32) and 0 <= views.min() and views.max() < 1 + 1e-5
    grey = (views.amax(1) - views.amin(1)).amax((1, 2)) < 1e-4
    assert grey.float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert drawn["flip"].item() == pytest.approx(0.5, abs=0.04)
    assert len(drawn["sigma"]) / 4000 == pytest.approx(0.3, abs=0.04)
    assert drawn["sigma"].min() > 0.1 and drawn["sigma"].max() < 2
    assert drawn["sigma"].mean().item() == pytest.approx(1.05, abs=0.1)
    theirs = torchvision.transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    ranges = [theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue]
    for column, (low, high) in zip(drawn["factors"].T, ranges):
        assert low <= column.min() < low + 0.01 and high - 0.01 < column.max() <= high
        assert column.mean().item() == pytest.approx((low + high) / 2, abs=0.02)
    order = drawn["order"]
    moved = order[order[:, 0] >= 0]
    assert len(moved) / 4000 == pytest.approx(0.8, abs=0.03)
    assert (moved.sort(1).values == torch.arange(4)).all()
    assert (F.one_hot(moved).float().mean(0) - 0.25).abs().max() < 0.04


def test_two_views_of_an_image_differ():
    images, grey = photos(4), v2.functional.rgb_to_grayscale
    assert not torch.equal(adios.augment(images, Settings()), adios.augment(images, Settings()))
    plain = Settings(jitter=0, min_crop=1)
    torch.manual_seed(3)
    views = adios.augment(images, plain)  # jitter 0 and whole crops leave flips and greys
    assert all(min((view - other).abs().max() for other in (
        image, image.flip(2), grey(image, 3), grey(image.flip(2), 3)))
               < 1e-5 for view, image in zip(views, images.float() / 255))


# ---- The data ------------------------------------------------------------------------------------


def test_shapes_are_the_same_everywhere_for_a_seed():
    data = adios.load_data(Settings(limit=200, seed=3))
    pixels = b"".join(t.numpy().tobytes() for t in (data.images, data.test_images,
                                                data.backgrounds["mixed_rand"][0]))
    assert hashlib.sha256(pixels).hexdigest()[:16] == "008cd1f8f5d32d10"
    assert not torch.equal(data.images, adios.load_data(Settings(limit=200, seed=4)).images)
    assert not torch.equal(data.images, data.test_images[:200])


def class_colours():
    """The backgrounds' colours by class, [10, 3], 0 to 255."""
    return 255 * torch.from_numpy(adios.hsv_to_rgb(np.stack(
        (np.arange(10) / 10, np.full(10, 0.55), np.full(10, 0.7)), 1))).float()


def test_shapes_are_as_described():
    data = adios.load_data(Settings())
    assert data.images.shape == (4000, 3, 32, 32) and data.images.dtype == torch.uint8
    assert data.labels.bincount().tolist() == [400] * 10 == [
        4 * n for n in data.test_labels.bincount().tolist()]
    areas = data.test_masks.float().mean((1, 2))
    assert areas.mean().item() == pytest.approx(1 / 3, abs=0.03)
    assert (torch.stack([areas[data.test_labels == c].mean() for c in range(10)]) > 0.28).all()
    # backgrounds: almost flat, grained, their hue that of the class nine times in ten
    outside = data.test_images.float().masked_fill(data.test_masks[:, None], float("nan"))
    mean = outside.flatten(2).nanmean(2)
    spread = (outside - mean[:, :, None, None]).nan_to_num().abs()
    assert 1 < spread.mean() < 10
    nearest = torch.cdist(mean, class_colours()).argmin(1)
    telling = (nearest == data.test_labels).float().mean().item()
    assert telling == pytest.approx(0.91, abs=0.03)


def test_backgrounds_are_changed_behind_the_same_objects():
    data = adios.load_data(Settings())
    images = {name: pair[0] for name, pair in data.backgrounds.items()}
    assert all(torch.equal(labels, data.test_labels) for _, labels in data.backgrounds.values())
    assert torch.equal(images["original"], data.test_images)
    inside = F.max_pool2d(1 - data.test_masks[:, None].float(), 3, 1, 1) == 0  # off the rim
    inside = inside.expand(-1, 3, -1, -1)
    outside = ~F.max_pool2d(data.test_masks[:, None].float(), 3, 1, 1).bool()
    ground = data.test_images.float() * outside

    def hue_class(pictures):
        mean = (pictures * outside).sum((2, 3)) / outside.sum((2, 3)).clamp_min(1)
        return torch.cdist(mean, class_colours()).argmin(1)

    for name in ("mixed_same", "mixed_rand", "only_fg"):
        assert (images[name] == data.test_images)[inside].float().mean() > 0.998
        assert ((images[name].float() * outside - ground).abs().amax((1, 2, 3)) > 5).float(
            ).mean() > 0.9
    match = {name: (hue_class(pictures) == data.test_labels).float().mean().item()
             for name, pictures in images.items()}
    assert match["mixed_same"] > 0.87 and match["mixed_rand"] < 0.2 and match["only_bg_t"] > 0.87
    assert (images["only_fg"] * outside == 0).all()
    spread = images["only_bg_t"].float().std((2, 3)).max()
    assert spread < 10  # nothing but background


def write_stl10(root, count=40):
    """A small STL10 in the files' own format: column-major images, labels from 1."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("train", "test", "unlabeled"):
        images = rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        images[:, 0, 0, :] = 7  # the first column in the file is the first row of the picture
        images.tofile(folder / f"{name}_X.bin")
        (np.arange(count, dtype=np.uint8) % 10 + 1).tofile(folder / f"{name}_y.bin")
    (folder / "unlabeled_y.bin").unlink()
    (folder / "class_names.txt").write_text("\n".join(f"class{i}" for i in range(10)))
    (folder / "fold_indices.txt").write_text("0\n")


def test_stl10_trains_on_the_unlabelled_and_judges_on_the_labelled(monkeypatch, tmp_path):
    write_stl10(tmp_path / "d")
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    data = adios.load_data(Settings(dataset="stl10", data_dir="d", batch_size=16))
    assert data.images.shape == (80, 3, 96, 96) and data.images.dtype == torch.uint8
    assert (data.images[:, 0, :, 0] == 7).all()
    assert sorted(data.labels.tolist()) == [-1] * 40 + sorted(list(range(10)) * 4)
    assert data.test_images.shape == (40, 3, 96, 96) and data.test_labels.min() == 0
    assert len(data.classes) == 10

    banks = []
    knn = adios.knn_accuracy
    monkeypatch.setattr(adios, "knn_accuracy", lambda *a: banks.append(a[1]) or knn(*a))
    results = adios.train(Settings(dataset="stl10", data_dir="d", out="o", **SMALL | dict(
        image_size=32, limit=0)))
    assert banks and all(len(labels) == 40 and labels.min() == 0 for labels in banks)
    assert results["object_iou"] is None and results["knn_shuffled_background"] is None


@pytest.mark.parametrize("name, folder, key", [
    ("cifar10", "cifar-10-batches-py", "labels"), ("cifar100", "cifar-100-python", "fine_labels")])
def test_cifar_is_read(monkeypatch, tmp_path, name, folder, key):
    make = getattr(torchvision.datasets, name.upper())
    (tmp_path / "d" / folder).mkdir(parents=True)
    classes = 10 if name == "cifar10" else 100
    for split in make.train_list + make.test_list:
        rows = np.arange(20 * 3072).reshape(20, 3072).astype(np.uint8)
        content = {"data": rows, key: [i % classes for i in range(20)]}
        (tmp_path / "d" / folder / split[0]).write_bytes(pickle.dumps(content))
    meta = {make.meta["key"]: [f"class{i}" for i in range(classes)]}
    (tmp_path / "d" / folder / make.meta["filename"]).write_bytes(pickle.dumps(meta))
    monkeypatch.setattr(make, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *a: True)
    data = adios.load_data(Settings(dataset=name, data_dir="d", batch_size=16))
    assert len(data.images) == 20 * len(make.train_list) and len(data.test_images) == 20
    assert torch.equal(data.images[1].flatten(), torch.arange(3072, 6144).to(torch.uint8))
    assert data.labels[:20].tolist() == [i % classes for i in range(20)]
    assert len(data.classes) == classes


def write_folder(root, classes=("cat", "dog"), count=8):
    for split in ("train", "val"):
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((60 + 5 * i, 80, 3), (200, 40 * c, 10 * i), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")


def folder_settings(**changes):
    return Settings(**SMALL | dict(dataset="folder", data_dir="d", batch_size=8, limit=0) | changes)


def test_folder_is_resized_cropped_and_labelled(tmp_path):
    write_folder(tmp_path / "d")
    tall = np.zeros((200, 100, 3), np.uint8)
    tall[50:150] = 255  # the middle square
    Image.fromarray(tall).save(tmp_path / "d/val/cat/0.png")
    Image.fromarray(tall[..., 0]).save(tmp_path / "d/val/cat/1.png")  # grey
    data = adios.load_data(folder_settings())
    assert data.images.shape == (16, 3, 64, 64) and data.classes == ["cat", "dog"]
    assert data.labels.tolist() == [0] * 8 + [1] * 8
    assert [tuple(image[:, 30, 30].tolist()) for image in data.images] == [
        (200, 40 * c, 10 * i) for c in range(2) for i in range(8)]
    for image in data.test_images[:2]:
        assert (image[:, 2:-2] == 255).all()


def test_images_of_all_kinds_are_read(tmp_path):
    """Palette, grey, CMYK, 16 bits, transparent, animated; names with spaces and umlauts."""
    write_folder(tmp_path / "d", ("cat", "Bär und Öl"), 7)
    grey = np.full((64, 64), 100, np.uint8)
    place = tmp_path / "d/train/Bär und Öl"
    for path in place.iterdir():
        path.unlink()
    images = {"a.png": Image.fromarray(np.uint16(grey) * 257), "b ü.png": Image.fromarray(grey),
              "c.bmp": Image.fromarray(grey).convert("P"),
              "d.tif": Image.fromarray(grey).convert("CMYK"),
              "e.png": Image.fromarray(grey).convert("RGBA"),
              "f.png": Image.fromarray(grey).convert("1", dither=Image.Dither.NONE)}
    images["g.webp"] = images["b ü.png"].convert("RGB")
    for name, image in images.items():
        more = dict(save_all=True, append_images=[Image.new("RGB", (64, 64))], lossless=True)
        image.save(place / name, **more if name == "g.webp" else {})  # animated
    data = adios.load_data(folder_settings(batch_size=2))
    found = data.images[:7].float().mean((2, 3))
    assert data.classes == ["Bär und Öl", "cat"] and (data.labels == 0).sum() == 7
    assert (found[[0, 1, 2, 3, 4, 6]] - 100).abs().max() <= 2
    assert found[5].tolist() == [0, 0, 0]


def test_folder_is_cached_until_a_file_changes(monkeypatch, tmp_path):
    write_folder(tmp_path / "d")
    first, decoded = adios.load_data(folder_settings()), []
    to_tensor = adios.TF.pil_to_tensor
    monkeypatch.setattr(adios.TF, "pil_to_tensor", lambda x: decoded.append(1) or to_tensor(x))
    assert torch.equal(adios.load_data(folder_settings()).images, first.images) and not decoded
    Image.new("RGB", (70, 70), (1, 2, 3)).save(tmp_path / "d/train/dog/7.png")
    second = adios.load_data(folder_settings())
    assert len(decoded) == 16 and second.images[15, :, 0, 0].tolist() == [1, 2, 3]
    assert adios.load_data(folder_settings(image_size=32)).images.shape[-1] == 32
    assert len(list((tmp_path / "cache/adios").iterdir())) == 4  # two splits at two sizes
    assert torch.equal(adios.load_data(folder_settings()).images, second.images)
    assert len(decoded) == 16 + 32


def test_a_full_disk_under_the_cache_is_one_line(monkeypatch, capsys, tmp_path):
    write_folder(tmp_path / "d")
    before = sorted(tmp_path.rglob("*"))

    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    opened = open

    def full(path, mode="r", *more):
        opened(path, mode, *more).close()
        return Full()

    monkeypatch.setattr(adios, "open", full, raising=False)
    assert adios.main(["--dataset", "folder", "--data-dir", "d", "--batch-size", "8"]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("adios: error: ") and "No space left" in line
    assert [path for path in sorted(tmp_path.rglob("*")) if path.is_file()] == [
        path for path in before if path.is_file()]


def test_a_damaged_cache_is_made_anew(monkeypatch, tmp_path):
    write_folder(tmp_path / "d")
    images = adios.load_data(folder_settings()).images.clone()
    for path in (tmp_path / "cache/adios").iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    assert torch.equal(adios.load_data(folder_settings()).images, images)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(adios.AdiosError, match="XDG_CACHE_HOME"):
        adios.load_data(folder_settings())


def test_limit_takes_a_seeded_part_of_all_classes(tmp_path):
    write_folder(tmp_path / "d")
    data = adios.load_data(folder_settings(limit=10))
    assert len(data.images) == len(data.labels) == 10 and set(data.labels.tolist()) == {0, 1}
    assert all(image[1, 0, 0] == 40 * label for image, label in zip(data.images, data.labels))


def test_statistics_are_of_images_of_all_kinds():
    """Where labels take turns, to take every n-th image would be to take some labels only."""
    images = torch.arange(0, 250, 25, dtype=torch.uint8).repeat(2000)[:, None, None, None]
    mean, _ = adios.Data(images.expand(-1, 3, 2, 2), *[None] * 4).statistics()
    assert mean.flatten().tolist() == pytest.approx([112.5 / 255] * 3, abs=0.02)


def test_statistics_are_those_of_the_pixels():
    data = adios.load_data(Settings(limit=100, batch_size=10))
    mean, std = data.statistics()
    pixels = data.images.double().div(255).transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.flatten(), pixels.mean(1).float())
    torch.testing.assert_close(std.flatten(), pixels.std(1).float())


# ---- The judges ----------------------------------------------------------------------------------


def test_knn_by_hand():
    """Two training features point to 10° and 30°, class 0; one to 90°, class 1. At 45°, the one
    near neighbour is of class 0; at 75° it is of class 1, but with k 3 and a mild temperature the
    two of class 0 outvote it, and with a sharp one they do not."""
    def at(*degrees):
        angles = torch.tensor(degrees) * math.pi / 180
        return 5 * torch.stack((angles.cos(), angles.sin()), 1)

    bank, labels = at(10, 30, 90), torch.tensor([0, 0, 1])

    def knn(degrees, truth, k, temperature):
        return adios.knn_accuracy(bank, labels, at(degrees), torch.tensor([truth]), k, temperature)

    assert knn(45, 0, 1, 0.07) == 1 and knn(75, 1, 1, 0.07) == 1
    votes = [math.exp(math.cos(math.radians(75 - x)) / 1) for x in (10, 30, 90)]
    assert votes[0] + votes[1] > votes[2] and knn(75, 0, 3, 1) == 1
    votes = [math.exp(math.cos(math.radians(75 - x)) / 0.07) for x in (10, 30, 90)]
    assert votes[0] + votes[1] < votes[2] and knn(75, 1, 3, 0.07) == 1
    two = adios.knn_accuracy(bank, labels, at(20, 85, 85, 85), torch.tensor([0, 1, 0, 1]), 20, 0.07)
    assert two == 0.75


def test_knn_refuses_unlabelled_images():
    with pytest.raises(ValueError, match="unlabelled"):
        adios.knn_accuracy(torch.eye(2), torch.tensor([0, -1]), torch.eye(2), torch.tensor([0, 1]))


def test_object_iou_by_hand():
    truth = torch.zeros(2, 4, 4, dtype=torch.bool)
    truth[0, :2] = True              # 8 pixels
    truth[1, 0, 0] = True            # 1 pixel
    masks = torch.full((2, 2, 4, 4), 0.5)
    masks[0, 1] = torch.tensor([0.6, 0.6, 0.6, 0.4])[:, None]  # 12 pixels, 8 of them right
    masks[1, 0] = torch.tensor([0.6, 0.6, 0.4, 0.4])[:, None]  # 8 pixels, 1 of them right
    assert adios.object_iou(masks, truth) == pytest.approx((8 / 12 + 1 / 8) / 2)


def test_features_are_those_of_whole_images_in_evaluation():
    game = make_game()
    images = adios.load_data(Settings(**SMALL)).images
    before = snapshot(game.model)
    found = adios.features(game, images)
    assert same(game.model, before) and game.model.training
    encoder = game.model.encoder.eval()
    torch.testing.assert_close(found, encoder((images / 255 - 0.5) / 0.25), atol=1e-5, rtol=1e-4)


def clustered(count=600, classes=12, scale=0.5):
    """Features in clusters, with labels."""
    torch.manual_seed(1)
    centres, labels = torch.randn(classes, 16), torch.arange(count) % classes
    return centres[labels] + scale * torch.randn(count, 16), labels


def test_cluster_metrics_are_scikit_learns():
    for a, b in ((torch.randint(7, (500,)), torch.randint(5, (500,))),
                 (torch.arange(500) % 7, (torch.arange(500) % 7 + torch.randint(2, (500,))) % 7),
                 (torch.arange(500) % 3, torch.arange(500) % 3)):
        ours = adios.cluster_metrics(a, b)
        assert ours["nmi"] == pytest.approx(metrics.normalized_mutual_info_score(b, a), abs=1e-6)
        assert ours["ari"] == pytest.approx(metrics.adjusted_rand_score(b, a), abs=1e-6)
        assert ours["fmi"] == pytest.approx(metrics.fowlkes_mallows_score(b, a), abs=1e-6)


def test_k_means_is_as_good_as_scikit_learns():
    found, _ = clustered(scale=1.0)
    found = F.normalize(found)
    clusters = adios.k_means(found, 12)
    ours = sum((found[clusters == c] - found[clusters == c].mean(0)).square().sum().item()
               for c in range(12))
    theirs = cluster.KMeans(12, n_init=5, random_state=0).fit(found.numpy()).inertia_
    assert ours < 1.05 * theirs and len(clusters.unique()) == 12


def test_linear_probe_is_logistic_regression():
    found, labels = clustered(scale=1.5)
    found = found * torch.logspace(-2, 2, 16) + 5  # a probe must not mind scales
    train, test = slice(0, 400), slice(400, None)
    ours = adios.linear_probe(found[train], labels[train], 12)(found[test])
    scaler = preprocessing.StandardScaler().fit(found[train])
    theirs = linear_model.LogisticRegression(C=1 / (2 * 1e-4 * 400), max_iter=1000).fit(
        scaler.transform(found[train]), labels[train])
    assert adios.top(ours, labels[test]) == pytest.approx(
        theirs.score(scaler.transform(found[test]), labels[test]), abs=0.015)
    assert adios.top(ours, labels[test]) > 0.6


def test_top_k_by_hand():
    scores = torch.tensor([[0.1, 0.5, 0.4], [0.6, 0.3, 0.1], [0.2, 0.3, 0.5]])
    assert adios.top(scores, torch.tensor([1, 1, 0])) == pytest.approx(1 / 3)
    assert adios.top(scores, torch.tensor([1, 1, 0]), 2) == pytest.approx(2 / 3)


def test_embedding_spread_tells_collapse():
    assert adios.embedding_spread(5 * torch.randn(2000, 64)) == pytest.approx(1, abs=0.05)
    assert adios.embedding_spread(torch.ones(2000, 64)) == 0
    half = torch.cat((torch.randn(2000, 32), torch.zeros(2000, 32)), 1)
    assert adios.embedding_spread(half) == pytest.approx(0.5 ** 0.5, abs=0.05)


def test_evaluation_of_a_trained_encoder(tmp_path):
    """On its own data, the Backgrounds Challenge among it, and transferred to a folder."""
    settings = Settings(limit=1280, epochs=2, out="o", device="cpu")
    trained = adios.train(settings)
    assert adios.main(["--evaluate", "o/checkpoint.pt", "--finetune", "--epochs", "8"]) == 0
    found = json.loads((tmp_path / "o/evaluation.json").read_text())
    assert found["knn_top1"] == trained["knn"] and "knn_top5" not in found
    assert found["linear_top1"] > 0.4 and found["finetuned_top1"] > 0.4
    assert found["linear_original"] == found["linear_top1"]
    assert found["linear_mixed_same"] > found["linear_mixed_rand"] + 0.2
    assert found["linear_background_gap"] == pytest.approx(
        found["linear_mixed_same"] - found["linear_mixed_rand"])
    assert found["linear_only_fg"] < found["linear_original"]
    assert 0 < found["ari"] < found["nmi"] < 1 and 0 < found["fmi"] < 1

    encoder = adios.ResNet18(16)
    encoder.load_state_dict(torch.load(tmp_path / "o/encoder.pt", weights_only=True))

    write_folder(tmp_path / "d", [f"class{n}" for n in range(12)])
    for name in ("original", "mixed_same/val", "mixed_rand"):
        shutil.copytree(tmp_path / "d/val", tmp_path / "d" / name)
    checkpoint = (tmp_path / "o/checkpoint.pt").read_bytes()
    assert adios.main(["--evaluate", "o/checkpoint.pt", "--dataset", "folder",
                       "--data-dir", "d"]) == 0
    found = json.loads((tmp_path / "o/folder/evaluation.json").read_text())
    assert found["settings"]["image_size"] == 32
    for judge in ("knn", "linear"):
        assert found[f"{judge}_top1"] <= found[f"{judge}_top5"] <= 1
    assert found["linear_background_gap"] == 0 and found["linear_original"] == found["linear_top1"]
    assert (tmp_path / "o/checkpoint.pt").read_bytes() == checkpoint


def test_mass_inside_by_hand():
    masks, box = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool)
    box[0, :, :2] = True
    masks[0, 0, 0, 1], masks[0, 0, 0, 2:] = 0.6, 0.2  # 0.6 of 1 inside
    masks[0, 1, 2] = 0.5  # half
    assert adios.mass_inside(masks, box) == pytest.approx(0.6)


def write_boxes(root, box):
    lines = [f"val,{path.parent.name},{path.name},{box}" for path in root.glob("val/*/*")]
    (root / "boxes.csv").write_text("\n".join(["split,class,file,xmin,ymin,xmax,ymax", *lines]))


def test_boxes_are_resized_and_cropped_with_their_images(tmp_path):
    """A white box on black, in photos of several shapes, is where its line in boxes.csv says."""
    for n, (width, height) in enumerate([(64, 64), (100, 64), (64, 160), (33, 50)]):
        pixels = np.zeros((height, width, 3), np.uint8)
        left, top, right, bottom = width // 3, height // 4, width // 3 + 20, height // 4 + 17
        pixels[top:bottom + 1, left:right + 1] = 255
        (tmp_path / f"{n}/val/class").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / f"{n}/val/class/a.png")
        write_boxes(tmp_path / str(n), f"{left},{top},{right},{bottom}")
        path = tmp_path / f"{n}/val/class/a.png"
        for size in (32, 64):
            found = adios.read_boxes(tmp_path / f"{n}/boxes.csv", [path], size)[0]
            image = torch.frombuffer(bytearray(adios.read_image(path, size)), dtype=torch.uint8)
            white = image.view(3, size, size)[0] > 127
            assert found.sum() > 0 and (found ^ white).float().mean() < 0.03, (n, size)


def test_learned_masks_are_judged_by_boxes(tmp_path, refused):
    write_folder(tmp_path / "d", ["one", "two"])
    settings = Settings(dataset="folder", data_dir="d", image_size=32, width=8, epochs=1, out="o",
                        batch_size=2, device="cpu")
    adios.train(settings)
    write_boxes(tmp_path / "d", "0,0,10000,10000")
    adios.main(["--evaluate", "o/checkpoint.pt"])
    found = json.loads((tmp_path / "o/evaluation.json").read_text())
    assert found["box_area"] == 1
    assert found["mass_in_box"] == pytest.approx(1) == found["mass_in_box_untrained"]
    write_boxes(tmp_path / "d", "0,0,5,5")
    adios.main(["--evaluate", "o/checkpoint.pt"])
    found = json.loads((tmp_path / "o/evaluation.json").read_text())
    assert 0 < found["mass_in_box"] < 0.9 and found["mass_in_box"] != found["mass_in_box_untrained"]
    for box in ("5,0,0,5", "0,nan,5,5", "400,0,500,5", "0,-9,5,-1"):
        write_boxes(tmp_path / "d", box)
        refused("--evaluate", "o/checkpoint.pt", says="is in its box")
    (tmp_path / "d/boxes.csv").write_text("split,class,file\n")
    refused("--evaluate", "o/checkpoint.pt", says="boxes.csv")


def test_depths_of_pixels(tmp_path):
    """Whole numbers of 8 bits in 32 are taken as they are, floating point is refused in words."""
    Image.fromarray(np.full((32, 32), 100, np.int32)).save(tmp_path / "a.tif")
    assert set(adios.read_image(tmp_path / "a.tif", 32)) == {100}
    Image.fromarray(np.full((32, 32), 0.5, np.float32)).save(tmp_path / "b.tif")
    with pytest.raises(adios.AdiosError, match="b.tif cannot be read .* floating point"):
        adios.read_image(tmp_path / "b.tif", 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fine_tuning_in_half_precision(monkeypatch, dtype):
    """Views are made in single precision, whatever the networks compute in."""
    monkeypatch.setattr(adios, "precision", lambda device: dtype)
    game = make_game(blur=1.0)
    scores = adios.finetune(game, adios.load_data(game.settings))
    assert scores.shape == (1000, 10) and scores.isfinite().all()


def test_evaluation_is_of_the_run_that_is_there(refused, whole, monkeypatch):
    shutil.copytree(whole[0], "o")
    flags = ["--limit=64", "--epochs=3", "--batch-size=32", "--width=8", "--device=cpu", "--out=o"]
    assert adios.main(["--evaluate", "o/checkpoint.pt"]) == 0
    before = json.loads(Path("o/evaluation.json").read_text())
    refused("--evaluate", "o/checkpoint.pt", "--masks=none", says="the checkpoint has adios-s")
    refused("--evaluate", "", says="--evaluate is empty")
    refused("--evaluate", "o/checkpoint.pt", "--limit=1", says="fewer than two")
    refused("--evaluate", "x" * 300, says="there is no checkpoint")
    refused("--out", "x" * 300, *flags[:-1], says="cannot be written to")
    with adios.run_folder(Settings(out="o")):
        refused("--evaluate", "o/checkpoint.pt", says="in use")
    assert adios.main(["--evaluate", "o/checkpoint.pt", "--finetune"]) == 0
    after = json.loads(Path("o/evaluation.json").read_text())
    assert all(before[name] == after[name] for name in ("nmi", "ari", "fmi", "linear_top1"))
    assert adios.main([*flags, "--overwrite"]) == 0
    assert not Path("o/evaluation.json").exists()

    load, elsewhere = adios.load_data, whole[0] / "checkpoint.pt"

    def slowly(settings):  # and meanwhile another run comes and goes
        Path("p").mkdir()
        shutil.copy(elsewhere, "p")
        return load(settings)

    monkeypatch.setattr(adios, "load_data", slowly)
    assert adios.main([*flags[:-1], "--out=p"]) == 2
    assert Path("p/checkpoint.pt").read_bytes() == elsewhere.read_bytes()


def test_flowers102_is_read(monkeypatch, tmp_path):
    folder = tmp_path / "d/flowers-102"
    (folder / "jpg").mkdir(parents=True)
    for n in range(1, 25):
        Image.new("RGB", (80, 70), (10 * n, 0, 0)).save(folder / f"jpg/image_{n:05}.jpg")
    ids = {"trnid": np.arange(1, 13), "valid": np.arange(13, 15), "tstid": np.arange(15, 25)}
    scipy.io.savemat(folder / "setid.mat", {name: value[None] for name, value in ids.items()})
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.arange(1, 25)[None]})
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_check_integrity", lambda self: True)
    data = adios.load_data(Settings(dataset="flowers102", data_dir="d", batch_size=8))
    assert data.images.shape == (12, 3, 96, 96) and data.test_images.shape == (10, 3, 96, 96)
    assert data.labels.tolist() == list(range(12))
    assert data.test_labels.tolist() == list(range(14, 24))
    reds = data.test_images[:, 0, 40, 40].int() - torch.arange(150, 250, 10)
    assert reds.abs().max() <= 3 and len(data.classes) == 102


# ---- Pictures ------------------------------------------------------------------------------------


def test_plot_masks_shows_what_it_is_given():
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    images[:, 0] = 255
    masks = torch.zeros(3, 2, 8, 8)
    masks[:, 0, :4], masks[:, 1, 4:] = 1, 1
    figure = adios.plot_masks(images, masks)
    shown = [axis.images[0].get_array() for axis in figure.axes]
    assert len(shown) == 4 * 3
    assert (shown[0] == [1, 0, 0]).all()
    assert (shown[3][:4] == 1).all() and (shown[3][4:] == 0).all() and (shown[6][4:] == 1).all()
    top, bottom = (np.array(adios.to_rgb(colour)) for colour in adios.COLOURS[:2])
    grey = 0.35 * 76 / 255  # of red
    assert np.allclose(shown[9][0, 0], grey + 0.65 * top, atol=1e-6)
    assert np.allclose(shown[9][7, 0], grey + 0.65 * bottom, atol=1e-6)


# ---- Several processes ---------------------------------------------------------------------------

PROCESS = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import adios, test_adios
dist.init_process_group("gloo")
mine = slice(8 * dist.get_rank(), 8 * dist.get_rank() + 8)
given = torch.load("given.pt")
z = [part[mine].requires_grad_() for part in given["z"]]
loss = adios.nt_xent(*(adios.gather(part) for part in z), 0.2)
loss.backward()
torch.manual_seed(0)
game = test_adios.make_game(ssl=sys.argv[2], masks="adios")
torch.manual_seed(dist.get_rank())
shown = [game.play(torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), 0.1) for _ in range(3)]
exact = test_adios.gradients_of_a_step([view[mine] for view in given["views"]])
torch.save(dict(loss=loss.detach(), grads=[part.grad for part in z], shown=shown,
                players=[dict(game.model.named_parameters()), game.occluder.state_dict()],
                exact=exact),
           f"{dist.get_rank()}.pt")
"""


def gradients_of_a_step(views):
    """Of a game without batch-norm, which would see each process's images only."""
    torch.manual_seed(0)
    game = make_game(encoder="vit_tiny", masks="adios", lr=1e-9)
    painted, hidden = game.hide(views, [None, None])
    game.inference_move(views, hidden, 0.1)
    game.occlusion_move(views, painted, hidden, 0.1)
    return [p.grad for network in (game.model, game.occluder) for p in network.parameters()]


def torchrun(*arguments):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node=2", *map(str, arguments)], capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_each_process_draws_crops_of_its_own(monkeypatch):
    game, drawn = make_game(), []
    data = adios.load_data(game.settings)

    def play(*_):
        drawn.append(torch.rand(1).item())
        return torch.zeros(4)

    monkeypatch.setattr(adios.Game, "play", play)
    monkeypatch.setattr(adios, "WORLD", 4)
    for rank in range(4):
        monkeypatch.setattr(adios, "RANK", rank)
        adios.train_epoch(game, data, 1, False)
    assert len(drawn) == len(set(drawn)) == 16


@pytest.mark.parametrize("ssl", adios.OBJECTIVES)
def test_two_processes_play_one_game(tmp_path, ssl):
    """NT-Xent and its gradients are those of the joined batch; the players stay equal in both."""
    z = [torch.randn(16, 5, requires_grad=True) for _ in range(2)]
    views = torch.randn(2, 16, 3, 32, 32)
    torch.save(dict(z=[part.detach() for part in z], views=views), "given.pt")
    (tmp_path / "process.py").write_text(PROCESS)
    torchrun("process.py", HERE, ssl)
    loss = adios.nt_xent(*z, 0.2)
    loss.backward()
    expected = gradients_of_a_step(list(views))
    first, second = (torch.load(f"{rank}.pt") for rank in range(2))
    for found in (first, second):
        assert found["loss"].item() == pytest.approx(loss.item(), abs=1e-5)
        assert [steps[0] for steps in found["shown"]] == [steps[0] for steps in first["shown"]]
        for ours, theirs in zip(found["exact"], expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)
    for whole, *parts in zip(z, first["grads"], second["grads"]):
        torch.testing.assert_close(torch.cat(parts), whole.grad)
    for ours, theirs in zip(first["players"], second["players"]):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_processes_play_a_run(tmp_path):
    """Process 0 alone shows and writes."""
    done = torchrun(HERE / "adios.py", "--limit", "1280", "--epochs", "2", "--out", "o")
    assert "cpu × 2 processes" in done.stdout and done.stdout.count("1,280 images") == 1
    results = json.loads((tmp_path / "o/results.json").read_text())
    assert results["knn"] > 0.4 and (tmp_path / "o/encoder.pt").exists()


def test_what_several_processes_cannot_do_is_refused(monkeypatch, refused):
    monkeypatch.setattr(adios, "WORLD", 3)
    with pytest.raises(adios.AdiosError, match="multiple of 3"):
        adios.train(Settings(**SMALL, out="o"))
    refused("--bench", says="torchrun is for training")


# ---- The benchmark -------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [("--masks", "adios"), ("--updates", "simultaneous"),
                                  ("--masks", "object"), ("--ssl", "simsiam", "--masks", "none")])
def test_bench_says_what_a_step_costs(capsys, tmp_path, monkeypatch, more):
    def timed(phases, device):
        for run in phases.values():
            run()
        return torch.arange(1.0, len(phases) + 1)[:, None].repeat(1, 3)  # phase n takes n seconds

    monkeypatch.setattr(adios, "timed", timed)
    assert adios.main(["--bench", "--batch-size", "8", "--width", "8", "--out", "o", *more]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found == json.loads((tmp_path / "o/bench.json").read_text())
    assert found["images_per_second"] == 8 and found["simclr_steps"] == 0.5
    assert found["milliseconds"]["a step"] == 1000 and "two views" in found["milliseconds"]
    assert ("both moves" in found["milliseconds"]) == ("simultaneous" in more)
    assert found["matmul_tflops"] == pytest.approx(
        2 * 2048**3 / len(found["milliseconds"]) / 1e12)
    assert found["share_of_matmul"] == pytest.approx(found["tflops"] / found["matmul_tflops"])
    assert 100 < found["peak_memory_mb"] < 1e5 and len(table) == len(found["milliseconds"])


def test_bench_counts_the_products_of_a_step(monkeypatch):
    """Plain SimCLR: every layer's products forward once and backward twice, for two views, but no
    gradient for the images; and NT-Xent's similarities."""
    monkeypatch.setattr(adios, "timed", lambda phases, device: torch.ones(len(phases), 3))
    settings = Settings(masks="none", batch_size=4, width=8, out="o", device="cpu")
    found, products = adios.bench(settings)["tflops"] * 1e12, []
    game = make_game(masks="none")

    def count(layer, inputs, output):
        inner = layer.weight[0].numel()
        products.append((output.numel() * inner, inputs[0].shape[1] == 3))

    for layer in game.model.modules():
        if hasattr(layer, "weight") and layer.weight.ndim > 1:
            layer.register_forward_hook(count)
    game.model(torch.randn(4, 3, 32, 32))
    expected = 2 * sum(2 * n * (2 if stem else 3) for n, stem in products) + 3 * 2 * 8 * 8 * 128
    assert found == pytest.approx(expected, rel=1e-3)
    found = adios.bench(replace(settings, masks="adios-s"))
    assert found["simclr_flops"] == pytest.approx(1e12 * found["tflops"] / expected, rel=1e-3)
    assert found["simclr_flops"] > 1.1


def test_timing_takes_turns(monkeypatch):
    calls = []
    phases = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = adios.timed(phases, torch.device("cpu"), least=0)
    assert seconds.shape == (2, 5) and (seconds >= 0).all() and calls == ["a", "b"] * 6


def test_bench_two_views_against_pillow(request, capsys):
    """Not part of the default run: `python -m pytest -k bench_two_views`. Both on one thread."""
    if "bench" not in request.config.getoption("keyword"):
        pytest.skip("a benchmark: pytest -k bench")
    size, count = 96, 32  # the shape of `--bench` in the README
    settings = Settings(dataset="stl10")
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)
    pillow = v2.Compose([
        v2.RandomResizedCrop(size, (settings.min_crop, 1)), v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(9, (0.1, 2))], settings.blur),
        v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    pictures = [v2.functional.to_pil_image(image) for image in images]
    adios.keep_memory()  # as `main` does
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rates = adios.timed({
            "ours": lambda: [adios.augment(images, settings) for _ in "AB"],
            "Pillow": lambda: torch.stack([pillow(p) for p in pictures for _ in "AB"])},
            torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)
    ours, theirs = (count / rates.median(1).values).tolist()
    with capsys.disabled():
        print(f"\ntwo views at 96 px, images/s on one thread: {ours:.0f}; torchvision's transforms "
              f"of Pillow images: {theirs:.0f}; {ours / theirs:.1f} times")
    assert ours > 3 * theirs


# ---- Runs ----------------------------------------------------------------------------------------


def test_a_short_game_is_learned():
    """The occluder finds objects and the encoder improves in a fortieth of the default run."""
    results = adios.train(Settings(limit=1280, epochs=2, occluder_share=1, out="o", device="cpu"))
    assert results["object_iou"] > results["object_iou_untrained"] + 0.1
    assert results["settings"]["limit"] == 1280


def test_command_line_end_to_end(tmp_path):
    done = run("--limit", "96", "--epochs", "2", "--batch-size", "32", "--masks", "adios",
               "--num-masks", "3", "--width", "8", "--occluder-share", "0.4", "--out", "o")
    assert done.returncode == 0, done.stderr
    assert "96 images of 32 px in 10 classes, in memory | simclr, resnet18 of" in done.stdout
    assert "adios of 3 masks" in done.stdout
    assert "2 epochs will take up to" in done.stdout + done.stderr
    results = json.loads((tmp_path / "o/results.json").read_text())
    for name in ("knn", "knn_untrained", "knn_shuffled_background", "object_iou",
                 "object_iou_untrained"):
        assert 0 <= results[name] <= 1
    assert f"{results['knn']:.1%}" in done.stdout and f"{results['object_iou']:.2f}" in done.stdout
    assert results["seconds"] > 0 and results["images_per_second"] > 0
    assert Settings(**results["settings"]).num_masks == 3
    with open(tmp_path / "o/log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for row in rows:
        assert sum(float(row[f"area_{n}"]) for n in (1, 2, 3)) == pytest.approx(1, abs=1e-4)
        assert 0 < float(row["loss"]) < 10
    assert 0 < float(rows[0]["gain"]) < 10 and rows[1]["gain"] == ""  # M learns in the first only
    assert float(rows[-1]["knn"]) == results["knn"]
    assert Image.open(tmp_path / "o/masks.png").size[1] > 300
    assert Image.open(tmp_path / "o/curves.png").size[0] > 600


def test_a_run_goes_on_at_another_precision(monkeypatch):
    """A checkpoint of a machine without loss scaling is taken up by one with it."""
    adios.train(Settings(**SMALL, out="o"))
    state = adios.read_checkpoint("o/checkpoint.pt")
    game = make_game(batch_size=32)
    game.scaler = torch.amp.GradScaler("cpu", enabled=True)
    assert adios.resume(state | {"settings": adios.asdict(game.settings)}, game)[0]
    assert same(game.model, state["parts"][0])


def test_every_setting_is_a_flag_with_help():
    text = " ".join(run("--help").stdout.split())
    for name in Settings.__dataclass_fields__:
        assert f" --{name.replace('_', '-')}" in text
    assert "images a step, of all processes together [shapes 128, stl10 256" in text


def test_presets():
    stl10 = Settings(dataset="stl10")
    assert (stl10.image_size, stl10.width, stl10.num_masks, stl10.batch_size, stl10.epochs,
            stl10.masks) == (96, 64, 6, 256, 100, "adios-s")
    assert Settings().image_size == 32 and Settings(width=32).width == 32
    for name, preset in adios.PRESETS.items():
        assert preset.keys() == adios.SHAPES.keys(), name


def weights(folder):
    state = torch.load(Path(folder) / "checkpoint.pt", weights_only=True)
    return [value for part in state["parts"] for value in part.values()
            if isinstance(value, torch.Tensor)], state


def test_a_stopped_run_goes_on_as_if_it_had_not_been(monkeypatch, capsys, whole):
    epoch = adios.train_epoch

    def interrupted(game, data, number, announce):
        if number == 3:
            signal.raise_signal(signal.SIGINT)
        return epoch(game, data, number, announce)

    settings = Settings(**SMALL | dict(epochs=3), out="parts")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(adios, "train_epoch", interrupted)
        adios.train(settings)
    assert "holds 2 of 3 epochs" in capsys.readouterr().err
    adios.train(adios.replace(settings, resume=True))
    equal_runs(whole[0], "parts")


class Cut(BaseException):
    """What ends a run at once, as the loss of power does."""


@pytest.mark.parametrize("function, call", [
    ("judge", 3), ("plot_masks", 2), ("save_checkpoint", 3), ("augment", 5), ("augment", 8),
    ("write", 1), ("write", 5), ("write_json", 1)])
def test_a_run_cut_anywhere_goes_on_as_if_it_had_not_been(monkeypatch, whole, function, call):
    """In the judge, while drawing or writing, between epochs and in the midst of one."""
    calls, original = [], getattr(adios, function)

    def cut(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise Cut
        return original(*arguments, **options)

    settings = Settings(**SMALL | dict(epochs=3), out="parts")
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(adios, function, cut)
        adios.train(settings)
    kept = Path("parts/checkpoint.pt").exists()
    assert kept == ((function, call) != ("write", 1))
    parts = adios.train(adios.replace(settings, resume=kept))
    equal_runs(whole[0], "parts")
    assert {**parts, "seconds": 0, "images_per_second": 0, "settings": 0} == {
        **whole[1], "seconds": 0, "images_per_second": 0, "settings": 0}


def equal_runs(one, other):
    """Whether two finished runs have the same weights, encoder and log, speeds aside."""
    (ours, state), (theirs, other_state) = weights(one), weights(other)
    assert ours and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    logs = [[{**row, "images_per_second": 0} for row in s["log"]] for s in (state, other_state)]
    assert logs[0] == logs[1] and len(logs[0]) == state["settings"]["epochs"]
    tables = [(Path(folder) / "log.csv").read_text().splitlines() for folder in (one, other)]
    assert len(tables[0]) == len(tables[1]) == 1 + len(logs[0])
    encoders = [torch.load(Path(folder) / "encoder.pt") for folder in (one, other)]
    assert all(torch.equal(encoders[0][name], encoders[1][name]) for name in encoders[0])


def test_two_runs_of_one_seed_agree_to_the_bit():
    for out in ("one", "two"):
        adios.train(Settings(**SMALL | dict(epochs=2), out=out))
    equal_runs("one", "two")


def test_killed_runs_go_on(request, tmp_path):
    """Twenty runs, each killed at a random moment (kill -9) and resumed to the very end. Not part
    of the default run, since it takes minutes: `python -m pytest -k killed`."""
    if "killed" not in request.config.getoption("keyword"):
        pytest.skip("takes minutes: pytest -k killed")
    settings = [*(f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()
                  if name != "epochs"), "--epochs=12"]
    start = time.perf_counter()
    assert run(*settings, "--out", "whole").returncode == 0
    seconds = time.perf_counter() - start
    for n, moment in enumerate(torch.rand(20).tolist()):
        out = f"run{n}"
        child = subprocess.Popen([sys.executable, HERE / "adios.py", *settings, "--out", out],
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moment * seconds)
        child.kill()
        child.wait()
        kept = (tmp_path / out / "checkpoint.pt").exists()
        done = run(*settings, "--out", out, *["--resume"] * kept)
        assert done.returncode == 0, (moment, done.stderr)
        equal_runs("whole", out)


@pytest.mark.parametrize("call", [1, 4, 9])
def test_a_full_disk_ends_the_run_in_one_line(monkeypatch, capsys, whole, call):
    flags = ["--limit=64", "--epochs=3", "--batch-size=32", "--width=8", "--device=cpu"]
    calls, fsync = [], os.fsync

    def full(file):
        calls.append(1)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert adios.main([*flags, "--out=o"]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("adios: error: o") and "No space left on device" in line
    assert not list(Path("o").glob("*.part"))
    assert adios.main([*flags, "--out=o", *["--resume"] * (call > 1)]) == 0
    equal_runs(whole[0], "o")


@pytest.mark.parametrize("player, network", [("I", "model"), ("M", "occluder")])
def test_numbers_that_are_not_finite_end_the_run(monkeypatch, capsys, player, network):
    play, steps = adios.Game.play, []

    def poisoned(game, *arguments):
        steps.append(1)
        if len(steps) == 6:
            next(getattr(game, network).parameters()).data[0] = math.nan
        return play(game, *arguments)

    monkeypatch.setattr(adios.Game, "play", poisoned)
    assert adios.main(["--limit=96", "--epochs=3", "--batch-size=32", "--width=8", "--out=o",
                       "--occluder-share=1", "--device=cpu"]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert f"player {player} are no longer finite at step 6" in line
    assert line.startswith("adios: error: ")
    values, state = weights("o")
    assert len(state["log"]) == 1 and all(value.isfinite().all() for value in values)


@pytest.mark.parametrize("values, player", [
    ((1.0, math.nan, 0.5), None), ((math.nan, math.inf, 0.5), "I"), ((math.inf, 1.0, 0.5), "I"),
    ((1.0, math.inf, 0.5), "I"), ((1.0, 1.0, math.nan), "M"),
    ((math.nan, math.inf, math.nan), "M")])
def test_which_player_went_wrong(values, player):
    if player is None:
        return adios.check(values, 1)
    with pytest.raises(adios.AdiosError, match=f"player {player} .* at step 7:"):
        adios.check(values, 7)


def test_the_game_warns_once_of_each_thing_that_goes_wrong(capsys):
    game, warned = make_game(), set()
    well = dict(epoch=1, embedding_spread=0.9, area_1=0.4, area_2=0.6)
    adios.warn(game, well, 0.01, warned)
    assert capsys.readouterr().err == "" and not warned
    for change, moved, says in (({"embedding_spread": 0.0}, 0.01, "collapsed"),
                                ({"area_1": 0.99, "area_2": 0.3}, 0.01, "covers nearly everything"),
                                ({"area_1": 0.01}, 0.01, "covers nearly nothing"),
                                ({}, 0.0, "stopped moving")):
        for _ in range(2):
            adios.warn(game, well | change, moved, warned)
        line, = capsys.readouterr().err.splitlines()
        assert line.startswith("adios: warning: epoch 1: ") and says in line and "try" in line


def test_an_occluder_that_stands_still_is_told_of_once(capsys):
    adios.train(Settings(**SMALL | dict(epochs=3), occluder_lr=0.0, occluder_share=0.3, out="o"))
    assert capsys.readouterr().err.count("the occluder has stopped moving") == 1
    adios.train(Settings(**SMALL | dict(epochs=3), occluder_share=1.0, out="p"))
    assert "warning" not in capsys.readouterr().err


def test_one_folder_takes_one_run_at_a_time(refused):
    with adios.run_folder(Settings(out="o")):
        refused("--limit=64", "--batch-size=32", "--out=o", says="--out o is in use by another run")
    with adios.run_folder(Settings(out="o")) as out:
        assert out == Path("o")


def test_without_a_compiler_the_run_goes_on(monkeypatch, capsys):
    def broken(_):
        raise RuntimeError("no\ncompiler")

    monkeypatch.setattr(torch, "compile", broken)
    adios.train(Settings(**SMALL, compile=True, out="o"))
    assert "torch.compile is not to be had here (no compiler): going on" in capsys.readouterr().out


@pytest.mark.parametrize("moment", ["o/log.csv", "o/checkpoint.pt.part"])
def test_ctrl_c_leaves_a_checkpoint(tmp_path, moment):
    """Also while one is being written."""
    child = subprocess.Popen([sys.executable, HERE / "adios.py", "--out", "o", "--limit", "512"],
                             stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (tmp_path / moment).exists() or not (tmp_path / "o/log.csv").exists():
        assert child.poll() is None
    child.send_signal(signal.SIGINT)
    error = child.communicate(timeout=60)[1]
    assert child.returncode == 130, error
    assert "--resume goes on" in error and "Traceback" not in error
    assert weights("o")[0]


# ---- What users get wrong ------------------------------------------------------------------------


@pytest.fixture
def refused(capsys):
    """A function: this command line is refused by one line that says so, and nothing is written."""
    def check(*arguments, says):
        def files():
            return {path: path.lstat().st_mtime_ns for path in Path().rglob("*")
                    if path.parts[0] != "cache"}
        before = files()
        capsys.readouterr()
        assert adios.main(list(arguments)) == 2
        line, = capsys.readouterr().err.splitlines()
        assert line.startswith("adios: error: ") and says in line
        assert files() == before
    return check


def test_an_error_is_one_line_and_exit_code_2():
    done = run("--epochs", "0")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "adios: error: --epochs 0: give a value of type int from 1 to 1000000\n"


@pytest.mark.parametrize("arguments, says", [
    (["--dataset", "mnist"], "give one of shapes, stl10"),
    (["--masks", "random"], "give one of"),
    (["--ssl", "moco"], "give one of"),
    (["--encoder", "resnet19"], "give one of"),
    (["--colour", "red"], "unrecognized arguments: --colour red"),
    (["--epochs", "many"], "invalid int value: 'many'"),
    (["--num-masks", "1"], "from 2 to"),
    (["--image-size", "31"], "from 32 to"),
    (["--lr", "nan"], "--lr nan: give a value of type float from"),
    (["--epochs", "0"], "from 1 to"),
    (["--batch-size", "64", "--limit", "63"], "63 training images"),
    (["--occluder-width", "12"], "multiple of 8"),
    (["--device", "abacus"], "--device abacus"),
    (["--device", "meta"], "--device meta"),
    (["--out", "/proc/self", "--limit", "64", "--batch-size", "32"], "--out /proc/self"),
    (["--dataset", "folder", "--data-dir", "nowhere"], "nowhere"),
    (["--resume"], "there is no checkpoint runs"),
    (["--evaluate", "nothing.pt"], "there is no checkpoint nothing.pt"),
    (["--masks", "object", "--dataset", "cifar10"], "only shapes"),
    (["--resume", "--overwrite"], "drop one"),
    (["--finetune"], "--finetune is a part of --evaluate"),
])
def test_bad_arguments(refused, arguments, says):
    refused(*arguments, says=says)


def test_settings_refuse_wrong_types():
    for wrong in (dict(epochs=1.5), dict(epochs="3"), dict(lr=True), dict(out=None),
                  dict(bench=True, evaluate="o/checkpoint.pt")):
        with pytest.raises(ValueError):
            Settings(**wrong)
    assert isinstance(Settings(lr=1).lr, float)


def test_bad_folders(refused, tmp_path):
    args = ("--dataset", "folder", "--data-dir", "d", "--batch-size", "8")
    (tmp_path / "d").mkdir()
    refused(*args, says="train")
    write_folder(tmp_path / "d")
    (tmp_path / "d/train/cat/3.png").write_bytes(b"not a picture")
    refused(*args, says=str(Path("train/cat/3.png")))
    picture = (tmp_path / "d/train/dog/3.png").read_bytes()
    (tmp_path / "d/train/cat/3.png").write_bytes(picture[:len(picture) // 2])
    refused(*args, says=str(Path("train/cat/3.png")))
    (tmp_path / "d/train/cat/3.png").unlink()
    (tmp_path / "d/train/cat/3.png").symlink_to("nowhere")
    refused(*args, says=str(Path("train/cat/3.png")))
    (tmp_path / "d/train/cat/3.png").unlink()
    (tmp_path / "d/train/cat/3.png").write_bytes(picture)
    shutil.copytree(tmp_path / "d/val/cat", tmp_path / "d/original/cow")
    refused(*args, says="train and original must have the same classes; only one has cat")
    (tmp_path / "d/val/cat").rename(tmp_path / "d/val/cow")
    refused(*args, says="cat, cow")
    for path in (tmp_path / "d/val/cow").iterdir():
        path.unlink()
    refused(*args, says="cow")


def test_runs_are_not_overwritten_and_odd_checkpoints_not_resumed(refused, tmp_path):
    arguments = ("--limit", "64", "--epochs", "1", "--batch-size", "32", "--width", "8",
                 "--out", "o")
    assert adios.main(list(arguments)) == 0
    content = {path: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    refused(*arguments, says="--overwrite")
    refused(*arguments, "--resume", "--seed", "1", says="give --seed 0")
    (tmp_path / "o/checkpoint.pt").write_bytes(content[tmp_path / "o/checkpoint.pt"][:5000])
    refused(*arguments, "--resume", says="damaged")
    (tmp_path / "o/checkpoint.pt").write_bytes(pickle.dumps(os.getcwd))
    refused(*arguments, "--resume", says="damaged")
    state = torch.load(io.BytesIO(content[tmp_path / "o/checkpoint.pt"]), weights_only=True)
    for change in (dict(settings={}), dict(settings=dict(colour="red")), dict(parts=[{"a": 1}])):
        torch.save(state | change, tmp_path / "o/checkpoint.pt")
        refused(*arguments, "--resume", says="checkpoint")
    torch.save({"log": []}, tmp_path / "o/checkpoint.pt")
    refused(*arguments, "--resume", says="damaged")
    for path, value in content.items():
        assert path.name == "checkpoint.pt" or path.read_bytes() == value
    assert adios.main([*arguments, "--overwrite"]) == 0
    (tmp_path / "file").write_text("")
    refused(*arguments[:-1], "file/o", says="--out file/o")


def test_more_bad_folders(refused, tmp_path):
    args = ("--dataset", "folder", "--data-dir", "d", "--batch-size", "2")
    write_folder(tmp_path / "d", ("cat",))
    refused(*args, says="two classes or more")
    write_folder(tmp_path / "e")
    args = (*args[:3], "e", *args[4:])
    (tmp_path / "e/train/cat/2.png").write_bytes(b"")
    refused(*args, says=str(Path("train/cat/2.png")))
    for path in (tmp_path / "e/train/cat").iterdir():
        path.unlink()
    refused(*args, says="cat")


def test_a_truncated_stl10_file_is_refused(refused, tmp_path, monkeypatch):
    place = tmp_path / "d/stl10_binary"
    place.mkdir(parents=True)
    for name, _ in (*torchvision.datasets.STL10.train_list, *torchvision.datasets.STL10.test_list):
        (place / name).write_bytes(b"half")
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", lambda *a, **k: 1 / 0)

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.stl10, "download_and_extract_archive", offline)
    refused("--dataset", "stl10", "--data-dir", "d", says="no network")


ANY = dict(
    ssl=[*adios.OBJECTIVES, "moco"], masks=[*adios.SCHEMES],
    updates=["alternating", "simultaneous"],
    encoder=["resnet18", "resnet18", "vit_tiny"], image_size=[31, 32, 33, 40, 50],
    num_masks=[1, 2, 3, 5], width=[0, 4, 8], occluder_width=[8, 12, 16],
    small_stem=[True, False], batch_size=[1, 2, 7, 16, 25], limit=[12, 24], lr=[0, 1e-9, 1e-3],
    occluder_lr=[0, 1e-3], sparsity=[-1, 0, 0.1, 1000], occluder_share=[0, 0.001, 0.5, 1],
    temperature=[0.001, 0.2, 1000], min_crop=[0, 0.001, 0.5, 1], jitter=[0, 0.5, 1.25, 2],
    blur=[0, 1], weight_decay=[0, 1e-4], seed=[0, 2**12 - 1], epochs=[1])


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[
    hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(chosen=strategies.fixed_dictionaries(
    {}, optional={name: strategies.sampled_from(values) for name, values in ANY.items()}))
def test_any_settings_train_or_are_refused_in_one_line(chosen, capsys):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()
             if name != "small_stem"]
    flags += ["--small-stem" if chosen.get("small_stem") else "--no-small-stem", "--overwrite",
              "--device=cpu", "--out=o"]
    flags += ["--limit=24"] * ("limit" not in chosen) + ["--epochs=1"] * ("epochs" not in chosen)
    flags += ["--batch-size=12"] * ("batch_size" not in chosen)
    flags += ["--width=8"] * ("width" not in chosen)
    code = adios.main(flags)
    out, err = capsys.readouterr()
    if code == 0:
        values, state = weights("o")
        assert math.isfinite(state["log"][0]["loss"]) and "images/s" in out
        assert all(value.isfinite().all() for value in values)
    else:
        line, = err.splitlines()
        assert code == 2 and line.startswith("adios: error: --") and out == ""


# ---- The README and the notebook -----------------------------------------------------------------


def test_the_map_in_the_readme_points_at_the_sections():
    lines = (HERE / "adios.py").read_text(encoding="utf-8").splitlines()
    sections = {name.strip("# -"): number for number, name in enumerate(lines, 1)
                if name.startswith("# ----")}
    links = re.findall(r"\[(.*?)\]\(adios.py#L(\d+)\)", (HERE / "README.md").read_text("utf-8"))
    assert {name: int(number) for name, number in links} == sections


def test_the_flags_in_the_readme_are_there():
    text = (HERE / "README.md").read_text("utf-8")
    own = set(re.findall(r"--[a-z][a-z-]+", text)) - {"--nproc-per-node"}
    assert own <= {adios.flag(f.name) for f in adios.fields(Settings)} | {"--help"}


def test_the_notebook_runs(tmp_path):
    """From a clean kernel in another folder, with the cell tagged `settings` made small."""
    shutil.copy(HERE / "adios.py", tmp_path)
    book = nbformat.read(HERE / "notebook.ipynb", as_version=4)
    cell, = (c for c in book.cells if "settings" in c.metadata.get("tags", []))
    cell.source += """
settings = Settings(limit=64, epochs=2, batch_size=32, width=8, device="cpu")
short = dict(limit=64, epochs=1)
"""
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}},
                            kernel_name="python3").execute()
    figures = [output for c in book.cells for output in c.get("outputs", [])
               if "image/png" in output.get("data", {})]
    assert len(figures) >= 12
    assert not any(output.output_type == "error" or output.get("name") == "stderr" and
                   "Warning" in output.text for c in book.cells for output in c.get("outputs", []))


def test_the_saved_notebook_is_of_this_version():
    """It has the outputs of a whole run, no errors, and was run with the public names of today."""
    assert (HERE / "notebook.ipynb").stat().st_size < 2e6
    book = nbformat.read(HERE / "notebook.ipynb", as_version=4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 12
    assert not any(output.output_type == "error" for output in outputs)
    names = sorted(name for name, value in vars(adios).items()
                   if getattr(value, "__module__", None) == "adios")
    assert book.metadata["adios"] == names
