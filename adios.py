#!/usr/bin/env python3
"""ADIOS in one file: learning what to hide, without labels.

Siamese self-supervised learning shows an encoder two random views of an image and asks for the same
representation of both. ADIOS ("Adversarial Masking for Self-Supervised Learning", Shi et al., ICML
2022, arXiv 2201.13100) lets a second network, the occluder, hide part of one view first. The two
play a min-max game over one loss L, any siamese method's:

    min over the encoder, max over the occluder:
        1/N Σ_n [ L(a, b ⊙ (1 − m_n)) − λ p_n ],     p_n = 1 / sin(π · mean(m_n))

a and b are the two views, m_1 … m_N soft masks that the occluder, a U-Net, paints on b. They sum to
1 at each pixel, and the penalty p_n keeps each from hiding nothing or everything. The occluder
gains by hiding what the encoder relies on, so its masks come to follow objects. One training step
of ADIOS-s, which uses one of the N masks per image (ADIOS takes the mean of L over all of them),
for a batch of B images; `embed` is the encoder with the heads that L needs:

    view_a, view_b = augment(images), augment(images)
    masks = occluder(view_b)                               # [B, N, H, W], a softmax over N
    mask = one of the N masks, at random for each image    # [B, 1, H, W]
    z_a = embed(view_a)

    loss = L(z_a, embed(view_b * (1 - mask.detach())))     # 0 is the mean colour
    minimise(loss)                                         # updates the encoder and its heads

    loss = L(z_a.detach(), embed(view_b * (1 - mask)))     # z_a from before: saves a pass
    penalty = λ * (1 / sin(pi * masks.mean((2, 3)))).mean()
    minimise(-(loss - penalty))                            # updates the occluder only

    python adios.py                                        # drawn shapes, minutes on a laptop
    python adios.py --dataset stl10                        # the real thing, on a GPU
    python adios.py --evaluate runs/…/checkpoint.pt        # --help lists all settings

Part one is the paper: occluder, objectives, masking schemes, the game. Part two is all else.
"""

import sys

if sys.version_info < (3, 10):
    sys.exit("adios: error: this needs Python 3.10 or newer")
import argparse
import contextlib
import copy
import glob
import io
import itertools
import json
import math
import os
import textwrap
import time
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from matplotlib import style
from matplotlib.colors import hsv_to_rgb, to_rgb
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch import distributed as dist
from torchvision.models.resnet import BasicBlock
from torchvision.ops import MLP, Conv2dNormActivation
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

# ==== Part one: the paper =========================================================================

# ---- The occluder --------------------------------------------------------------------------------
# A U-Net (paper, section 3.2 and appendix). By the softmax each pixel is divided among the masks:
# one that hides more of a thing leaves less of it to the others.


def conv_block(c_in, c_out):
    """3×3 convolution, norm of 8 groups, ReLU: [B, c_in, H, W] to [B, c_out, H, W]."""
    return Conv2dNormActivation(c_in, c_out, norm_layer=lambda c: nn.GroupNorm(8, c))


class Occluder(nn.Module):
    """Views [B, 3, H, H], H ≥ 32, to masks [B, N, H, H] in [0, 1] that sum to 1 over N. It has
    int(log2(H) − 1) stages, each at half the resolution of the one before; the last three have 2c
    channels, earlier ones c: at 96 pixels c, c, 2c, 2c, 2c. c, the width, is a multiple of 8."""

    def __init__(self, image_size, num_masks, width=32):
        super().__init__()
        depth = int(math.log2(image_size) - 1)
        channels = [width] * (depth - 3) + [2 * width] * 3
        self.down = nn.ModuleList(map(conv_block, [3, *channels], channels))
        back = channels[::-1]  # on the way up; with the skip connection twice as many go in
        self.up = nn.ModuleList(map(conv_block, [2 * c for c in back], [*back[1:], width]))
        flat = channels[-1] * math.ceil(image_size / 2**(depth - 1))**2
        self.mlp = MLP(flat, [128, 128, flat]).append(nn.ReLU())
        self.to_masks = nn.Conv2d(width, num_masks, 1)
        # Masks that start alike get like gradients and may never part. So at first logits have a
        # standard deviation of about 5 (N ≤ c) and, on noise, mean 0: masks differ, areas hardly.
        nn.init.orthogonal_(self.to_masks.weight, 10)
        with torch.no_grad():
            noise = torch.randn(2, 3, image_size, image_size)
            self.to_masks.bias -= self.logits(noise).mean((0, 2, 3))

    def forward(self, x):
        return self.logits(x).float().softmax(1)

    def logits(self, x):
        skips = []
        for block in self.down:
            x = block(x[:, :, ::2, ::2] if skips else x)  # nearest-neighbour downsampling
            skips.append(x)
        x = self.mlp(x.flatten(1)).view(x.shape)  # sees the whole image at once
        for block, skip in zip(self.up, skips[::-1]):
            x = block(torch.cat((F.interpolate(x, skip.shape[2:]), skip), 1))  # nearest upsampling
        return self.to_masks(x)


def sparsity_penalty(masks):
    """p = 1 / sin(π · mean(m)) of masks [B, N, H, W] in [0, 1]: [B, N], 1 to 3e4 (paper, section
    3.3). Areas are moved by up to 1e-5 towards a half, where value and gradient are finite."""
    area = 0.5 + (masks.float().mean((2, 3)) - 0.5) * (1 - 2e-5)
    return 1 / torch.sin(math.pi * area)


# ---- The objectives ------------------------------------------------------------------------------
# The loss L: how far two views are apart. SimCLR contrasts with the other images; BYOL and SimSiam
# predict the other view's embedding, to which no gradient goes.


class Embedding(NamedTuple):
    """A view as the loss sees it, [B, D] each."""
    prediction: Tensor  # of the other view's target; SimCLR predicts none: its projection
    target: Tensor      # the projection, for BYOL the target network's; SimCLR does not use it


def nt_xent(z_a, z_b, temperature):
    """NT-Xent (SimCLR, arXiv 2002.05709, equation 1) of embeddings [B, D], normalised here: mean
    cross-entropy of picking a view's counterpart among 2B − 1 others by cosine / temperature."""
    z = F.normalize(torch.cat((z_a, z_b)).float())
    similarity = (z @ z.T / temperature).fill_diagonal_(-math.inf)  # [2B, 2B]
    return F.cross_entropy(similarity, torch.arange(len(z), device=z.device).roll(len(z_a)))


def simsiam_loss(p, z):
    """SimSiam (arXiv 2011.10566, equation 1): the mean of −cos(p, stop-gradient(z)), in [−1, 1],
    over predictions and targets [B, D]."""
    return -F.cosine_similarity(p.float(), z.detach().float()).mean()


def byol_loss(p, z):
    """BYOL (arXiv 2006.07733, equation 2): the mean of 2 − 2 cos(p, stop-gradient(z)), 0 to 4."""
    return 2 + 2 * simsiam_loss(p, z)


OBJECTIVES = {  # the Embeddings of an unmasked view and of the other one, masked, to a scalar
    "simclr": lambda a, b, temperature: nt_xent(a.prediction, b.prediction, temperature),
    "byol": lambda a, b, _: byol_loss(a.prediction, b.target) + byol_loss(b.prediction, a.target),
    "simsiam": lambda a, b, _: simsiam_loss(b.prediction, a.target)}  # and see Game.loss


class Siamese(nn.Module):
    """An encoder, views [B, 3, H, H] to features [B, dim], and its heads, features to an Embedding;
    hidden layers are as wide as in the ADIOS paper or, for thin encoders, in proportion."""

    def __init__(self, settings):
        super().__init__()
        self.encoder, self.dim = make_encoder(settings)
        hidden = min(4 * self.dim, 2048)
        self.predictor = self.target_network = None
        if settings.ssl == "simclr":
            self.projector = MLP(self.dim, [hidden, 128])
        elif settings.ssl == "byol":
            self.projector = MLP(self.dim, [2 * hidden, 256], nn.BatchNorm1d)
            self.predictor = MLP(256, [4 * hidden, 256], nn.BatchNorm1d)
            self.target_network = copy.deepcopy(nn.Sequential(self.encoder, self.projector))
            self.target_network.requires_grad_(False)
        elif settings.ssl == "simsiam":
            self.projector = MLP(self.dim, [hidden] * 3, nn.BatchNorm1d)
            self.projector.append(nn.BatchNorm1d(hidden, affine=False))
            self.predictor = MLP(hidden, [hidden // 4, hidden], nn.BatchNorm1d)

    def forward(self, view):
        projection = self.projector(self.encoder(view))
        prediction = self.predictor(projection) if self.predictor else projection
        target = self.target_network(view.detach()) if self.target_network else projection
        return Embedding(prediction, target)

    @torch.no_grad()
    def update_target_network(self, rate):
        """BYOL: move the target network towards encoder and projector, by `rate` of the way."""
        if self.target_network:
            online = [*self.encoder.parameters(), *self.projector.parameters()]
            for slow, fast in zip(self.target_network.parameters(), online):
                slow.lerp_(fast, rate)


# ---- Masking schemes -----------------------------------------------------------------------------
# What is hidden of a view [B, 3, H, H]: K masks, [B, K, H, H] in [0, 1], over which the loss is
# averaged. K is N for `adios` and else 1. MAE's and BEiT's random masks are drawn in part two.


def pick_one(masks):
    """One of masks [B, N, H, H] at random for each image: [B, 1, H, H] (ADIOS-s, section 3.4)."""
    index = torch.randint(masks.shape[1], (len(masks), 1, 1, 1), device=masks.device)
    return masks.take_along_dim(index, 1)


# A scheme gets a view, its N masks (or None), the true one [B, 1, H, H] ([B, 0, H, H]: unknown).
SCHEMES = {
    "none": lambda view, masks, truth: torch.zeros_like(view[:, :1]),
    "mae": lambda view, masks, truth: hide_patches(view),
    "beit": lambda view, masks, truth: hide_blocks(view),
    "object": lambda view, masks, truth: pick_one(torch.cat((truth, 1 - truth), 1)),
    "object-shuffled": lambda view, masks, truth: SCHEMES["object"](view, masks, truth.roll(1, 0)),
    "adios": lambda view, masks, truth: masks,
    "adios-s": lambda view, masks, truth: pick_one(masks)}
LEARNED = ("adios", "adios-s")  # the schemes that need an occluder


# ---- The game ------------------------------------------------------------------------------------


class Game:
    """The two players, `model` (encoder and heads) and `occluder`, and a step of their game. Its
    helpers follow or are in part two; `gather` there joins the rows of several processes."""

    def step(self, images, occluder_learns):
        """Both moves on uint8 images [B, 3, H, H] ([B, 4, H, H] with true masks). Returns by name
        the loss L, the area of each mask and, where the occluder learns, its gain L − λp."""
        (view_a, view_b), (truth_a, truth_b) = self.two_views(images)
        views, anchors, truths = [view_b], [view_a], [truth_b]  # to mask; left whole; true masks
        if self.settings.ssl == "simsiam":  # masks both, and compares each with the other, whole
            views, anchors, truths = [view_b, view_a], [view_a, view_b], [truth_b, truth_a]
        scheme = SCHEMES[self.settings.masks]
        with torch.set_grad_enabled(occluder_learns):
            masks = [self.paint(view) for view in views]                      # [B, N, H, H] each
            selected = [scheme(*args) for args in zip(views, masks, truths)]  # [B, K, H, H] each
        embeddings = [self.embed(view) for view in anchors]

        if occluder_learns and self.settings.updates == "simultaneous":
            # Both moves by one backward pass. Gradient reversal: the value is the mask's, its
            # gradient −1, so a step down moves the occluder up on L (and down on the penalty).
            loss = self.loss(embeddings, views, [2 * mask.detach() - mask for mask in selected])
            penalty = self.penalty(masks)
            self.minimise(loss + penalty, self.model_optimizer, self.occluder_optimizer)
            self.model.update_target_network(self.target_rate)
            gain = loss - penalty
        else:
            # The encoder's move: down on the loss. `detach` makes the masks constants.
            loss = self.loss(embeddings, views, [mask.detach() for mask in selected])
            self.minimise(loss, self.model_optimizer)
            self.model.update_target_network(self.target_rate)

            # The occluder's move: up on the same loss less its penalty, hence the sign, through a
            # model that is held still. Only the masked views are encoded anew.
            if occluder_learns:
                embeddings = [Embedding(*map(Tensor.detach, z)) for z in embeddings]
                with frozen(self.model):  # while the graph is built; that is enough
                    gain = self.loss(embeddings, views, selected) - self.penalty(masks)
                self.minimise(-gain, self.occluder_optimizer)

        areas = torch.cat(masks if self.learned else selected).detach().mean((0, 2, 3))
        report = {"loss": loss.detach()} | {f"area_{n + 1}": area for n, area in enumerate(areas)}
        return ({"gain": gain.detach()} if occluder_learns else {}) | report

    def loss(self, embeddings, views, selected):
        """L, a scalar: the mean, over views [B, 3, H, H] and the masks selected for each
        [B, K, H, H], of the objective between its anchor's Embedding and its own, once masked."""
        objective, losses = OBJECTIVES[self.settings.ssl], []
        for n, view in enumerate(views):
            for mask in selected[n].to(view.dtype).split(1, 1):
                masked = self.embed(view * (1 - mask))  # what is hidden gets 0, the mean colour
                losses.append(objective(embeddings[n], masked, self.settings.temperature))
                if self.settings.ssl == "simsiam":  # half of its loss: the two anchors, unmasked
                    losses.append(objective(embeddings[n], embeddings[1 - n], None))
        return torch.stack(losses).mean()

    def penalty(self, masks):
        """λp, a scalar: the mean over all of the N masks of all processes' images."""
        return self.settings.sparsity * gather(sparsity_penalty(torch.cat(masks))).mean()

    def minimise(self, loss, *optimizers):
        """One step down on the loss by each optimizer."""
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        for optimizer in optimizers:
            for p in itertools.chain(*(group["params"] for group in optimizer.param_groups)):
                if WORLD > 1 and p.grad is not None:
                    dist.all_reduce(p.grad)  # the sum over all processes
            self.scaler.step(optimizer)
        self.scaler.update()

    def __init__(self, settings, mean, std, device):  # from here on: how the game is set up
        self.settings, self.device, self.dtype = settings, device, precision(device)
        self.learned = settings.masks in LEARNED
        self.mean, self.std = mean.to(device), std.to(device)
        self.model = Siamese(settings)
        if WORLD > 1 and device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.occluder = nn.Identity() if not self.learned else Occluder(
            settings.image_size, settings.num_masks, settings.occluder_width)
        self.memory_format = memory_format(device, settings.width)
        for network in (self.model, self.occluder):
            network.to(device, memory_format=self.memory_format)
        constant = {*self.model.predictor.parameters()} if settings.ssl == "simsiam" else ()
        self.model_optimizer = make_optimizer(self.model, settings, constant)
        self.occluder_optimizer = make_optimizer(self.occluder, settings)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.target_rate = torch.zeros((), device=device)
        self.fast_step = fastest_step(self)

    def play(self, images, progress):
        """Set the rates for `progress`, 0 to 1, of the run; then `step`, by the fastest way."""
        share = self.settings.occluder_share
        set_rate(self.model_optimizer, self.settings.lr, progress)
        set_rate(self.occluder_optimizer, self.settings.occluder_lr, min(1, progress / share))
        self.target_rate.fill_(0.01 * (1 + math.cos(math.pi * progress)) / 2)  # momentum 0.99 to 1
        return self.fast_step(images, self.learned and progress < share)

    def two_views(self, images):
        """Two random views of uint8 images [B, C, H, H]: a pair of normalised [B, 3, H, H], and a
        pair of the same crops of what further channels there are, [B, C − 3, H, H]."""
        views = augment(torch.cat((images, images)), self.settings)
        return self.normalise(views[:, :3]).chunk(2), views[:, 3:].chunk(2)

    def normalise(self, images):
        """Images [B, 3, H, H] in [0, 1] as the networks see them: 0 is the data's mean colour."""
        return ((images - self.mean) / self.std).to(self.dtype, memory_format=self.memory_format)

    def autocast(self):
        """A context for forward passes in the precision that suits the device."""
        return (contextlib.nullcontext() if self.dtype == torch.float32 else
                torch.autocast(self.device.type, self.dtype))

    def embed(self, view):
        """A view's Embedding, float32, with the rows of all processes."""
        with self.autocast():
            prediction, target = self.model(view)
        gathered = gather(prediction.float())
        return Embedding(gathered, gathered if target is prediction else gather(target.float()))

    def paint(self, view):
        """The occluder's masks on a view, float32 [B, N, H, H]; None where the scheme has none.
        All but the softmax runs in the view's precision; autocast would keep norms in float32."""
        if not self.learned:
            return None
        weights = {name: p.to(view.dtype) for name, p in self.occluder.named_parameters()}
        return torch.func.functional_call(self.occluder, weights, view)


@contextlib.contextmanager
def frozen(model):
    """Let gradients through a model but none into it: its weights and its batch and instance norms'
    running statistics stay as they are (batches are still normalised by their own statistics). What
    else a forward pass changes, such as spectral norm's vectors, is not covered."""
    weights = [p for p in model.parameters() if p.requires_grad]
    norms = [m for m in model.modules() if m.training and getattr(m, "track_running_stats", False)]
    momenta = [norm.momentum for norm in norms]
    try:
        for p in weights:
            p.requires_grad = False
        for norm in norms:  # batch norms heed the former, instance norms the latter
            norm.track_running_stats, norm.momentum = False, 0.0
        yield
    finally:
        for p in weights:
            p.requires_grad = True
        for norm, momentum in zip(norms, momenta):
            norm.track_running_stats, norm.momentum = True, momentum


# ==== Part two: what it takes to play =============================================================

# ---- Optimizers, CUDA graph, processes -----------------------------------------------------------


class CapturedStep:
    """Game.step as a CUDA graph. A GPU runs a step's thousands of small kernels faster than Python
    launches them. A graph records them once and replays them at one call, on the same memory: so
    images are copied in and results out, rates are tensors, and the host reads no number within a
    step. Random numbers are new in each replay."""

    def __init__(self, game):
        self.game, self.learns, self.stream = game, None, torch.cuda.Stream(game.device)

    def __call__(self, images, occluder_learns):
        if self.learns is not occluder_learns:  # at first, and when the occluder stops
            self.learns, self.graph, self.steps = occluder_learns, None, 0
        self.steps += 1
        if self.steps <= 3:  # plain ones, which make the optimizers' state and warm up the memory
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                report = self.game.step(images, occluder_learns)
            torch.cuda.current_stream().wait_stream(self.stream)
            return report
        if self.graph is None:
            self.images, self.graph = images.clone(), torch.cuda.CUDAGraph()
            self.game.model_optimizer.zero_grad()
            self.game.occluder_optimizer.zero_grad()
            with torch.cuda.graph(self.graph, stream=self.stream):  # records, computes nothing
                self.report = self.game.step(self.images, occluder_learns)
        self.images.copy_(images)
        self.graph.replay()
        return {name: value.clone() for name, value in self.report.items()}


def fastest_step(game):
    """Game.step, captured and with compiled networks where that is possible. Capturing needs
    bfloat16 (float16 needs loss scaling, for which the host reads numbers) and one process."""
    can_capture = game.device.type == "cuda" and game.dtype == torch.bfloat16 and WORLD == 1
    if game.settings.compile:  # in a copy: metrics and pictures are not worth the wait
        game = copy.copy(game)
        game.embed, game.paint = torch.compile(game.embed), torch.compile(game.paint)
    return CapturedStep(game) if can_capture and game.settings.cuda_graph else game.step


def make_optimizer(network, settings, constant=()):
    """AdamW, without weight decay of biases and norms; what is `constant` keeps its peak rate."""
    trained = [p for p in network.parameters() if p.requires_grad]
    cuda = any(p.is_cuda for p in trained)
    groups = [dict(params=[p for p in trained if (p.ndim > 1, p in constant) == (decays, stays)],
                   weight_decay=settings.weight_decay * decays, constant=stays,
                   lr=torch.zeros((), device=trained[0].device) if cuda else 0.0)
              for decays, stays in itertools.product((True, False), (False, True))]
    return torch.optim.AdamW(groups, fused=True, capturable=cuda)


def set_rate(optimizer, peak, progress):
    """Set the rate at `progress`, 0 to 1: from peak / 10 to the peak at 0.1, then a cosine to 0."""
    fall = (1 + math.cos(math.pi * (progress - 0.1) / 0.9)) / 2
    rate = peak * (0.1 + 9 * progress if progress < 0.1 else fall)
    for group in optimizer.param_groups:
        lr, value = group["lr"], peak if group["constant"] else rate
        group["lr"] = lr.fill_(value) if isinstance(lr, Tensor) else value  # captured steps read it


def precision(device):
    """bfloat16 on GPUs that have it natively, float16 on older ones, float32 elsewhere."""
    if device.type != "cuda":
        return torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def memory_format(device, width):
    """Channels-last, the faster one, where it is right: oneDNN's gradients of thin ResNets
    (uxlfoundation/oneDNN #6035) and PyTorch's on Apple's GPUs (#175189, #175190) are not."""
    right = device.type == "cuda" or (device.type == "cpu" and width >= 16)
    return torch.channels_last if right else torch.contiguous_format


# Under torchrun each process takes its share of every batch.
PROCESS = os.environ if dist.is_available() and dist.is_torchelastic_launched() else {}
RANK, WORLD = int(PROCESS.get("RANK", 0)), int(PROCESS.get("WORLD_SIZE", 1))


def gather(rows):
    """The rows of all processes, in their order. Gradients reach this process's own rows: the loss
    is the same in all of them, and `Game.minimise` adds up what each computes for its share."""
    if WORLD == 1:
        return rows
    parts = [torch.empty_like(rows, requires_grad=False) for _ in range(WORLD)]
    dist.all_gather(parts, rows.detach().contiguous())
    return torch.cat([*parts[:RANK], rows, *parts[RANK + 1:]])


# ---- Settings ------------------------------------------------------------------------------------
# One dataclass is the command line, the argument of `train` and the record in results.json. Where
# it gives no default (None), the data set does.

SHAPES = dict(image_size=32, width=16, small_stem=False, occluder_width=8, num_masks=2, lr=8e-3,
              occluder_lr=2e-3, sparsity=0.2, epochs=20, batch_size=128, min_crop=0.3, blur=0.0)
CIFAR = dict(image_size=32, width=64, small_stem=True, occluder_width=32, num_masks=4, lr=2e-3,
             occluder_lr=1e-3, sparsity=0.1, epochs=100, batch_size=256, min_crop=0.08, blur=0.0)
STL10 = CIFAR | dict(image_size=96, small_stem=False, num_masks=6, blur=0.5)
FOLDER = STL10 | dict(image_size=64, width=24, occluder_width=8, num_masks=4, epochs=20,
                      batch_size=128)
PRESETS = {"shapes": SHAPES, "stl10": STL10, "cifar10": CIFAR, "cifar100": CIFAR,
           "flowers102": STL10 | dict(batch_size=128), "folder": FOLDER}
OTHER_LR = {"byol": 2e-3, "simsiam": 2e-3, "vit_tiny": 5e-4}  # on any data set; the encoder's wins


class AdiosError(ValueError):
    """A mistake that the user can fix: shown as one line `adios: error: …`, exit code 2."""


def require(condition, problem):
    """Raise AdiosError, saying what the problem is, unless the condition holds."""
    if not condition:
        raise AdiosError(problem)


def option(help, default, *allowed):
    """A field of Settings; what is allowed: choices, or the least and the largest value."""
    return field(default=default, metadata=dict(help=help, allowed=allowed))


@dataclass
class Settings:
    """All that decides a run. Raises AdiosError where a value is out of range. For another data
    set, objective or encoder make new Settings: `replace` keeps the old one's rate and folder."""
    dataset: str = option("images to train on", "shapes", *PRESETS)
    data_dir: str = option("where data sets are, or are downloaded to", "data")
    image_size: int = option("pixels a side", None, 32, 1024)
    ssl: str = option("siamese objective", "simclr", *OBJECTIVES)
    masks: str = option("what is hidden; adios-s: one mask at random", "adios-s", *SCHEMES)
    num_masks: int = option("N, the masks that the occluder paints", None, 2, 64)
    updates: str = option("how the two move", "alternating", "alternating", "simultaneous")
    encoder: str = option("network to train", "resnet18", "resnet18", "resnet50", "vit_tiny")
    width: int = option("channels of resnet18's first stage", None, 1, 1024)
    small_stem: bool = option("3×3 stem without pooling, for small images", None)
    occluder_width: int = option("channels c of the occluder, a multiple of 8", None, 8, 1024)
    epochs: int = option("passes over the training images", None, 1, 10**6)
    batch_size: int = option("images a step, of all processes together", None, 2, 10**6)
    lr: float = option(f"peak learning rate (other defaults: {OTHER_LR})", None, 1e-9, 10)
    occluder_lr: float = option("peak learning rate of the occluder", None, 0, 10)
    occluder_share: float = option("share of the run in which the occluder learns", 1.0, 1e-3, 1)
    weight_decay: float = option("of both networks, biases and norms excepted", 1e-4, 0, 10)
    sparsity: float = option("λ (the authors' α is λ / N with adios-s)", None, 0, 1000)
    temperature: float = option("of NT-Xent", 0.2, 1e-3, 1000)
    min_crop: float = option("smallest share of an image that a crop covers", None, 1e-3, 1)
    jitter: float = option("colours change by up to 0.8 times this, hue by 0.2", 0.5, 0, 1.25)
    blur: float = option("probability of Gaussian blur", None, 0, 1)
    limit: int = option("training images to use, of shapes to draw (0: all)", 0, 0, 10**9)
    seed: int = option("of data, weights, order and crops", 0, 0, 2**12 - 1)
    device: str = option("cpu, cuda, cuda:1, mps or auto, the fastest there is", "auto")
    cuda_graph: bool = option("capture the step in a CUDA graph (bfloat16, one process)", True)
    compile: bool = option("torch.compile the networks: a minute's wait, then faster (GPUs)", False)
    out: str = option("folder for results (default: runs/<dataset>-<ssl>-<masks>)", "")
    resume: bool = option("go on from the checkpoint in --out", False)
    overwrite: bool = option("replace a run's files in --out", False)
    evaluate: str = option("score this checkpoint's or run's encoder; --dataset: on other data", "")
    finetune: bool = option("with --evaluate: fine-tune the encoder, too", False)
    bench: bool = option("time a training step on random images", False)

    def __post_init__(self):
        defaults = PRESETS.get(self.dataset, SHAPES) | {
            "lr": OTHER_LR[name] for name in (self.ssl, self.encoder) if name in OTHER_LR}
        for f in fields(self):
            value, allowed = getattr(self, f.name), f.metadata["allowed"]
            value = defaults.get(f.name) if value is None else value
            value = float(value) if f.type is float and type(value) is int else value
            valid, expected = type(value) is f.type, f.type.__name__
            if allowed and f.type is str:
                valid, expected = value in allowed, "one of " + ", ".join(allowed)
            elif allowed:
                valid = valid and allowed[0] <= value <= allowed[1]
                expected += f" from {allowed[0]} to {allowed[1]}"
            require(valid, f"{flag(f.name)} {value}: give {expected}")
            if value and f.name in ("data_dir", "out", "evaluate"):  # a path, in one spelling
                value = os.path.normpath(os.path.expanduser(value))
            setattr(self, f.name, value)
        if os.path.isdir(self.evaluate):  # a run's folder
            self.evaluate = os.path.join(self.evaluate, "checkpoint.pt")
        require(self.occluder_width % 8 == 0, "--occluder-width: give a multiple of 8")
        require(self.dataset == "shapes" or not self.masks.startswith("object") or self.evaluate,
                f"--masks {self.masks}: only shapes knows its objects' true masks")
        require(not (self.resume and self.overwrite), "--resume, --overwrite: drop one of them")
        require(not (self.evaluate and self.bench), "--evaluate, --bench: drop one of them")
        require(self.evaluate or not self.finetune, "--finetune needs --evaluate CHECKPOINT")
        self.out = self.out or f"runs/{self.dataset}-{self.ssl}-{self.masks}"


def flag(name):
    """The command-line spelling of a setting."""
    return "--" + name.replace("_", "-")


# ---- Encoders ------------------------------------------------------------------------------------
# Any encoder will do. ResNet-18 (arXiv 1512.03385) is here with a width, to thin it for small runs,
# under torchvision's parameter names, so that weights load both ways.


class ResNet18(nn.Module):
    """Images [B, 3, H, W] to features [B, 8 · width]; at width 64 torchvision's resnet18
    without its `fc`. `small_stem` keeps the resolution of small images (as is usual on CIFAR)."""

    def __init__(self, width=64, small_stem=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, *((3, 1, 1) if small_stem else (7, 2, 3)), bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, 2, 1)
        channels = width, width, 2 * width, 4 * width, 8 * width
        for stage, (c_in, c_out) in enumerate(itertools.pairwise(channels), 1):
            shortcut = None if stage == 1 else nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, 2, bias=False), nn.BatchNorm2d(c_out))
            first = BasicBlock(c_in, c_out, 2 if shortcut else 1, shortcut)
            self.add_module(f"layer{stage}", nn.Sequential(first, BasicBlock(c_out, c_out)))
        for kernel in (p for p in self.parameters() if p.ndim == 4):
            nn.init.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.maxpool(self.bn1(self.conv1(x))).relu_()  # in this order ReLU has less to do
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))


def make_encoder(settings):
    """The encoder of the settings, images [B, 3, H, H] to features [B, dim], and dim."""
    size = settings.image_size
    if settings.encoder == "resnet18":
        return ResNet18(settings.width, settings.small_stem), 8 * settings.width
    if settings.encoder == "resnet50":
        encoder = torchvision.models.resnet50()
        if settings.small_stem:
            encoder.conv1, encoder.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        encoder.fc = nn.Identity()
        return encoder, 2048
    patch = max(p for p in range(1, 17) if size % p == 0 and size // p >= 8)  # 64 patches or more
    require(patch >= 3, f"--image-size {size}: for vit_tiny give a multiple of 8")
    encoder = torchvision.models.VisionTransformer(size, patch, 12, 3, 192, 4 * 192)
    encoder.heads = nn.Identity()
    return encoder, 192


# ---- Two views and random masks ------------------------------------------------------------------
# SimCLR's augmentations (arXiv 2002.05709, appendix A) for a whole batch at once; but crops are not
# antialiased, and the jitter's order is fixed. Numbers are drawn on the images' device, and no
# shape depends on them: a factor of 1, a shift of 0 or the smallest blur leaves an image alone.


def uniform(low, high, *shape, device):
    """Uniform random numbers in [low, high), float32."""
    return low + (high - low) * torch.rand(*shape, device=device)


def random_boxes(count, size, min_crop, device):
    """Crops [count, 4] (top, left, height, width, in pixels) of images [size, size], drawn as by
    RandomResizedCrop: share of the area uniform in [min_crop, 1], log of the aspect ratio uniform
    in ± log 4/3, ten tries to fit into the image, else all of it."""
    area = size**2 * uniform(min_crop, 1, count, 10, device=device)
    ratio = uniform(-math.log(4 / 3), math.log(4 / 3), count, 10, device=device).exp()
    sides = torch.stack((area / ratio, area * ratio), 2).sqrt().round()  # [count, 10 tries, 2]
    fits = ((sides > 0) & (sides <= size)).all(2, keepdim=True)
    first = fits.int().argmax(1, keepdim=True)  # the first try that fits, or try 0
    sides = torch.where(fits, sides, size).take_along_dim(first, 1)[:, 0]
    corner = uniform(0, size - sides + 1, count, 2, device=device)
    return torch.cat((corner.floor(), sides), 1)


def crop_and_flip(images, boxes, flip):
    """Boxes [B, 4] of images [B, C, H, H], resized bilinearly to H × H, mirrored where flip [B]:
    one sampling grid, which does not look beyond the box."""
    size = images.shape[-1]
    start, sides = boxes[:, :, None].split(2, 1)  # [B, 2, 1] each, of y and x
    centres = (torch.arange(size, device=images.device) + 0.5) / size
    points = (start + sides * centres).clamp(start + 0.5, start + sides - 0.5)  # [B, 2, H], pixels
    y, x = (2 * points / size - 1).unbind(1)  # from −1 to 1
    x = torch.where(flip[:, None], x.flip(1), x)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), 3)
    return F.grid_sample(images, grid, align_corners=False)


def shift_hue_(images, shift):
    """Turn the hue of RGB images [B, 3, H, W] by shift [B, 1, 1], −1 to 1 turns, in place. On a
    circle of length 6 red is at 0, green at 2 and blue at 4. A channel is highest where the hue is
    up to 1 away from it, and lower by the chroma (highest − lowest) from a distance of 2 on."""
    red, green, blue = images.unbind(1)
    highest = images.amax(1)  # [B, H, W]
    chroma = highest - images.amin(1)
    sixths = torch.where(highest == red, green - blue, torch.where(  # of a turn, times chroma
        highest == green, blue - red + 2 * chroma, red - green + 4 * chroma))
    hue = sixths.div_(6 * chroma.clamp_min(1e-12)).add_(2 + shift).frac_().mul_(6)
    away = 3 - (hue - 3).abs_(), (hue - 2).abs_(), (hue - 4).abs_()  # from red, green and blue
    for channel, distance in zip((red, green, blue), away):
        torch.addcmul(highest, chroma, (distance - 1).clamp_(0, 1), value=-1, out=channel)


def colour_jitter_(images, factors):
    """Adjust RGB images [B, 3, H, W] in [0, 1] by factors [B, 4], in place: brightness, contrast
    and saturation (1 leaves alone) and hue (in turns; 0 leaves alone), in this order."""
    brightness, contrast, saturation, hue = factors[:, :, None, None, None].unbind(1)
    images.mul_(brightness).clamp_(0, 1)
    mean = TF.rgb_to_grayscale(images).mean((2, 3), keepdim=True)
    images.lerp_(mean, 1 - contrast).clamp_(0, 1)
    images.lerp_(TF.rgb_to_grayscale(images), 1 - saturation).clamp_(0, 1)
    shift_hue_(images, hue[:, 0])


def gaussian_blur(images, sigma):
    """Blur images [B, C, H, H] by sigma [B] pixels: reflected borders, a kernel H / 10 wide."""
    batch, channels, size, _ = images.shape
    radius = size // 20
    taps = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.softmax(-0.5 * (taps / sigma[:, None])**2, 1).repeat_interleave(channels, 0)
    kernel = F.threshold(kernel, 1e-7, 0)[:, None]  # CPUs are slow at products with less than that
    images = F.pad(images, (radius,) * 4, mode="reflect").flatten(0, 1)[None]  # [1, B·C, H', W']
    for weight in (kernel[:, :, None, :], kernel[:, :, :, None]):
        images = F.conv2d(images, weight, groups=batch * channels)
    return images.view(batch, channels, size, size)


def augment(images, settings):
    """One random view of each image: uint8 [B, C, H, H] to float32 [B, C, H, H] in [0, 1]. Random
    resized crop, flip (p 0.5), then, of the first three channels only (others are masks), colour
    jitter (p 0.8), grey (p 0.2) and Gaussian blur (p settings.blur, sigma 0.1 to 2 pixels)."""
    count, size, device = len(images), images.shape[-1], images.device

    def chance(probability):
        return torch.rand(count, device=device) < probability
    boxes = random_boxes(count, size, settings.min_crop, device)
    views = crop_and_flip(images / 255, boxes, chance(0.5))
    spread = settings.jitter * chance(0.8)  # [B], 0 where colours stay
    factors = torch.stack([base + reach * spread * uniform(-1, 1, count, device=device)
                           for base, reach in ((1, 0.8), (1, 0.8), (1, 0.8), (0, 0.2))], 1)
    colours = views[:, :3]  # changed in place from here on
    colour_jitter_(colours, factors)
    grey = chance(0.2)[:, None, None, None]
    torch.where(grey, TF.rgb_to_grayscale(colours), colours, out=colours)
    if settings.blur:
        sigma = uniform(0.1, 2, count, device=device)
        colours.copy_(gaussian_blur(colours, torch.where(chance(settings.blur), sigma, 1e-3)))
    return views


def hide_patches(view):
    """MAE (arXiv 2111.06377): 48 of the 64 cells of an 8 × 8 grid, 75 %, at random."""
    masked = torch.rand(len(view), 64, device=view.device).argsort(1) < 48
    return F.interpolate(masked.view(-1, 1, 8, 8).to(view.dtype), view.shape[2:])


def hide_blocks(view):
    """BEiT (arXiv 2106.08254, algorithm 1): up to twelve rectangles that cover 30 %, as the ADIOS
    paper has it, or a little less, since they overlap and sides are rounded down; each 8 % of the
    image or more while so much is missing, log aspect ratio uniform in ± log 0.3."""
    count, size, device = len(view), view.shape[-1], view.device
    masked = torch.zeros(count, size, size, dtype=torch.bool, device=device)
    line = torch.arange(size, device=device)
    for _ in range(12):
        missing = (0.3 * size**2 - masked.sum((1, 2))).clamp_min(0)  # [B], in pixels
        least = missing.clamp_max(0.08 * size**2)
        area = uniform(least, missing, count, device=device)
        ratio = uniform(math.log(0.3), -math.log(0.3), count, device=device).exp()
        sides = torch.stack((area * ratio, area / ratio)).sqrt().floor().clamp_max(size)  # [2, B]
        first = uniform(0, size - sides + 1, 2, count, device=device).floor()
        rows, columns = (line >= first[:, :, None]) & (line < (first + sides)[:, :, None])
        masked |= rows[:, :, None] & columns[:, None, :]
    return masked[:, None].to(view.dtype)


# ---- Data ----------------------------------------------------------------------------------------
# Images are one uint8 tensor, on the device when they fit: a batch is an index, and there are no
# loader processes. `shapes` is drawn, so that true masks are known. Its backgrounds are a shortcut
# to the class that hiding should cure. All have two tones, so that one colour is not an object.


@dataclass
class Data:
    """A data set: images uint8 [n, 3, H, W], labels int64 [n], object masks bool [n, H, W]."""
    images: Tensor                   # for training; [n, 4, H, W] with true masks, if needed
    labels: Tensor                   # −1 where unlabelled; such images are used in no metric
    test_images: Tensor
    test_labels: Tensor
    classes: list                    # their names
    backgrounds: dict                # test images and labels of the Backgrounds Challenge, by name
    test_masks: Tensor | None = None

    def statistics(self):
        """Mean and standard deviation, [1, 3, 1, 1], of channels in [0, 1]; of ≤ 2,000 images."""
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0))
        sample = self.images[order[:2000], :3].float() / 255
        std, mean = torch.std_mean(sample, dim=(0, 2, 3), keepdim=True)
        return mean, std.clamp_min(1e-3)


# Which points (x, y) are inside a shape, in units in which each has an area of about 3.
INSIDE = {
    "disc": lambda x, y: x**2 + y**2 < 0.98,
    "ring": lambda x, y: (x**2 + y**2 - 0.85).abs() < 0.45,
    "square": lambda x, y: x.abs().maximum(y.abs()) < 0.87,
    "triangle": lambda x, y: (y < 0.7) & (y > 1.732 * x.abs() - 1.4),
    "star": lambda x, y: (x**2 + y**2).sqrt() < 0.62 + 1.36 * (
        torch.atan2(y, x) / (0.4 * math.pi) % 1 - 0.5).abs(),
    "cross": lambda x, y: (x.abs().minimum(y.abs()) < 0.38) & (x.abs().maximum(y.abs()) < 1.12),
    "heart": lambda x, y: (x**2 + y**2 - 0.85)**3 < 1.3 * x**2 * y**3,
    "moon": lambda x, y: (x**2 + y**2 < 1.5) & ((x - 0.65)**2 + y**2 > 0.65),
    "bow tie": lambda x, y: (x.abs() < 1.2) & (y.abs() < 0.12 + 0.8 * x.abs()),
    "corner": lambda x, y: (x.abs().maximum(y.abs()) < 1.1) & (x.minimum(y) < -0.2)}


def two_tones(hue, value, step, darkest, *saturations):
    """RGB, int16 [2, n, 3, 1, 1] from 0 to 255: one hue at `value` (of HSV) and at value + step, or
    − step where + would leave `darkest` to 1 (by up to 0.05), each with its saturation. All but
    `darkest` are [n], hues in turns."""
    other = torch.where((value + step < darkest) | (value + step > 1), value - step, value + step)
    other = other.clamp(darkest - 0.05, 1)
    hsv = torch.stack((hue % 1, hue % 1, *saturations, value, other)).view(3, 2, -1).movedim(0, 2)
    return torch.from_numpy(255 * hsv_to_rgb(hsv.numpy())).round().short()[..., None, None]


def draw_shapes(count, size, seed):
    """Labels int64 [n], striped objects uint8 [n, 3, H, W], their coverage of each pixel, float64
    [n, 1, H, W] in [0, 1], and backgrounds uint8 [n, 3, H, W], lit on one side of a line. The class
    gives the shape, the stripes' hue and, nine times in ten, the background's, another one. Equal
    for a seed on every machine: the CPU draws, and float64 is rounded to 8 bits in the end."""
    rng, classes = torch.Generator().manual_seed(seed), len(INSIDE)

    def draw(low, high):
        return low + (high - low) * torch.rand(count, generator=rng, dtype=torch.float64)

    def draw_signed(low, high):
        return draw(low, high) * torch.where(draw(0, 1) < 0.5, 1, -1)

    def along(angle, x, y):  # the coordinate in the direction of the angle
        return angle.cos() * x + angle.sin() * y

    # Two colours of each background and each object. A change of order would change all images.
    labels = torch.arange(count) % classes
    hue = torch.where(draw(0, 1) < 0.9, labels, labels + 1 + draw(0, classes - 1).long()) / classes
    saturation = draw(0.3, 0.8)
    lights = two_tones(hue + draw(-0.02, 0.02), draw(0.35, 0.95), draw_signed(0.2, 0.45), 0.25,
                       saturation, saturation + draw(-0.2, 0.2))
    grain = torch.randint(-10, 11, (count, 1, size, size), generator=rng)
    noise, saturation = torch.randn(count, generator=rng, dtype=torch.float64), draw(0.4, 1)
    stripes = two_tones((3 * labels + 5) / classes + 0.03 * noise, draw(0.35, 0.95),
                        draw_signed(0.25, 0.5), 0.2, saturation, saturation)

    # Where they are. Lengths are in units of the image's side.
    turn, stripe_turn, edge_turn = draw(0, math.tau), draw(0, math.tau), draw(0, math.tau)
    radius, centre_x, centre_y = draw(0.30, 0.37), draw(0.4, 0.6), draw(0.4, 0.6)
    period, phase, edge = draw(0.16, 0.3), draw(0, 1), draw(-0.15, 0.15)
    points = (torch.arange(2 * size, dtype=torch.float64) + 0.5) / (2 * size)  # 2 × 2 a pixel
    pixels = (torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5  # from the middle
    objects, coverage, backgrounds = [], [], []
    for n, inside in zip(range(count), itertools.cycle(INSIDE.values())):
        x, y = (points - centre_x[n]) / radius[n], (points[:, None] - centre_y[n]) / radius[n]
        covered = inside(along(turn[n], x, y), along(turn[n], y, -x))
        coverage.append(F.avg_pool2d(covered.double()[None], 2))
        place = along(stripe_turn[n], pixels, pixels[:, None]) / period[n] + phase[n]
        objects.append(torch.where(place % 1 < 0.5, *stripes[:, n]).byte())
        lit = along(edge_turn[n], pixels, pixels[:, None]) < edge[n]
        backgrounds.append((torch.where(lit, *lights[:, n]) + grain[n]).clamp(0, 255).byte())
    return labels, *map(torch.stack, (objects, coverage, backgrounds))


def compose(objects, coverage, backgrounds):
    """Objects before backgrounds: uint8 [n, 3, H, W]. One by one, since float64 is large."""
    return torch.stack([(alpha * front + (1 - alpha) * back).round().byte()
                        for front, alpha, back in zip(objects, coverage, backgrounds)])


def load_shapes(settings):
    """4,000 images to train on (or `limit`) and 1,000 to test, these in five versions."""
    size, seed = settings.image_size, 2 * settings.seed
    labels, objects, coverage, background = draw_shapes(settings.limit or 4000, size, seed)
    images = compose(objects, coverage, background)
    if settings.masks.startswith("object"):
        images = torch.cat((images, 255 * (coverage >= 0.5).byte()), 1)
    test_labels, objects, coverage, background = draw_shapes(1000, size, seed + 1)
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
    backgrounds = {  # labels cycle: the next of a class is ten images on
        "original": background, "mixed_same": background.roll(len(INSIDE), 0),
        "mixed_rand": background[shuffled], "only_fg": torch.zeros_like(background)}
    tests = {name: (compose(objects, coverage, behind), test_labels)
             for name, behind in backgrounds.items()}
    tests["only_bg_t"] = background, test_labels
    test_images, truth = tests["original"][0], coverage[:, 0] >= 0.5
    return Data(images, labels, test_images, test_labels, list(INSIDE), tests, truth)


EXTENSIONS = {extension for extension, form in Image.registered_extensions().items()
              if form in {*Image.OPEN, "MPO"} and Image.MIME.get(form, "").startswith("image/")}


def is_picture(path):
    """Whether a file is named as an image that Pillow reads (MPO as a JPEG), and not hidden."""
    return os.path.basename(path)[0] != "." and Path(path).suffix.lower() in EXTENSIONS


def read_picture(path):
    """An image file, upright and in RGB; of an animation the first frame."""
    with Image.open(path) as image:
        require(image.mode[0] not in "IF", f"mode {image.mode}, not 8 bits a channel")
        picture = image.convert("RGB")
        picture.info.clear()  # one wrong tag must not cost a sound picture; the orientation stays
        with contextlib.suppress(Exception):  # of tags that cannot be read at all
            picture.getexif()[0x0112] = image.getexif().get(0x0112, 1)
        return ImageOps.exif_transpose(picture)


def find_left_out(folders, flat=False):
    """A line that counts the files, hidden ones aside, not named as images or not in place (in a
    class's folder or, if flat, not in one), or "". Raises AdiosError that names broken links."""
    paths = [Path(folder, name) for folder in folders
             for name in glob.glob("**", root_dir=folder, recursive=True)]
    unreadable = [str(path) for path in paths if (  # pictures are opened later
        path.is_dir() if is_picture(path) else not os.access(path, os.R_OK))]
    require(not unreadable, "links to nothing, or folders that cannot be entered or are named as "
                            f"images, mend or remove them: {', '.join(unreadable)}")
    left_out = [path for path in paths if not path.is_dir()
                and not (is_picture(path) and flat == (path.parent in folders))]
    endings = [path.suffix.lower() or "no extension" for path in left_out]
    counts = ", ".join(f"{ending} {endings.count(ending)}" for ending in sorted({*endings}))
    line = f"adios: left out files not named as images or not in place, {len(endings)}: {counts}\n"
    return line if endings and not RANK else ""


class Pictures(torchvision.datasets.ImageFolder):
    """A folder of classes, without hidden folders and files, made as torchvision's other sets."""

    def __init__(self, root, split, download=True):
        super().__init__(root / split, loader=read_picture, is_valid_file=lambda path: (
            is_picture(path) and f"{os.sep}." not in path.removeprefix(str(root))))

    def find_classes(self, directory):
        names = {folder: unicodedata.normalize("NFC", folder)  # ü may be spelt as u and ¨, too
                 for folder in super().find_classes(directory)[0] if folder[0] != "."}
        classes = sorted(set(names.values()))
        return classes, {folder: classes.index(name) for folder, name in names.items()}


FILES = {  # data sets: class, training images, test images, and the class's name for the labels
    "stl10": (torchvision.datasets.STL10, "train+unlabeled", "test", "labels"),
    "cifar10": (torchvision.datasets.CIFAR10, True, False, "targets"),
    "cifar100": (torchvision.datasets.CIFAR100, True, False, "targets"),
    "flowers102": (torchvision.datasets.Flowers102, "train", "test", "_labels"),
    "folder": (Pictures, "train", "val", "targets")}

# The Backgrounds Challenge (arXiv 2006.09994): test images with other backgrounds, or without.
CHALLENGE = "original mixed_same mixed_rand mixed_next only_fg no_fg only_bg_b only_bg_t".split()


def open_files(settings):
    """Torchvision's data sets by name, their images unread: "train", "val" and, of a `folder` with
    mixed_rand, what it has of the challenge, in <name>/<class>/ or <name>/val/<class>/. Raises
    AdiosError if they cannot be opened or have fewer than two classes or not all the same."""
    root, (make, *parts, _) = Path(settings.data_dir), FILES[settings.dataset]
    try:
        splits = dict(zip(("train", "val"), [make(root, part, download=True) for part in parts]))
        classes = splits["train"].classes
        places = {name: place for name in CHALLENGE for place in (f"{name}/val", name)
                  if {unicodedata.normalize("NFC", path.name) for path in
                      (root / place).glob("*/")} & {*classes}}
        if make is Pictures and "mixed_rand" in places:
            splits |= {name: Pictures(root, place) for name, place in places.items()}
    except (OSError, RuntimeError, ValueError) as error:
        needed = "a download needs a network" if make is not Pictures else (
            "a folder needs train/<class>/ and val/<class>/ with images or, to have masks painted "
            f"on them, images (read are {' '.join(sorted(EXTENSIONS))})")
        raise AdiosError(f"--data-dir {root}: {error}; {needed}") from error
    require(len(classes) > 1, f"--data-dir {root}: there must be two classes or more")
    for name, split in splits.items():
        others = ", ".join(sorted({*split.classes} ^ {*classes}))
        require(not others, f"--data-dir {root}: train and {name} have other classes: {others}")
    return splits


def load_files(settings):
    """Data of what `open_files` opens; `limit` images to train on, chosen by the seed."""
    splits, labels, items = open_files(settings), [], []
    is_folder, labels_name = settings.dataset == "folder", FILES[settings.dataset][-1]
    left_out = find_left_out([split.root for split in splits.values()]) if is_folder else ""
    for name, split in splits.items():
        count = settings.limit if name == "train" and settings.limit else len(split)
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(settings.seed))
        chosen = order[:count].sort().values
        labels.append(torch.as_tensor(getattr(split, labels_name))[chosen].long())
        items += [split.samples[n][0] if is_folder else (split, n) for n in chosen.tolist()]
    arrays = [torch.from_numpy(split.data) for split in splits.values() if hasattr(split, "data")]
    if arrays and settings.image_size == arrays[0].shape[2] and not settings.limit:
        # As they are in memory: STL10 has 3 GB. Its arrays are [n, 3, H, W], CIFAR's [n, H, W, 3].
        images = [array if array.shape[1] == 3 else array.permute(0, 3, 1, 2) for array in arrays]
    else:
        images = decode(items, settings.image_size).split([len(each) for each in labels])
    print(left_out, end="", file=sys.stderr)
    sets = dict(zip(splits, zip(images, labels)))
    return Data(*sets.pop("train"), *sets.pop("val"), splits["train"].classes, sets)


def decode(items, size):
    """The images of items, each a path or a data set and a number in it, uint8 [n, 3, size, size]:
    resized and centre-cropped, by threads. Raises AdiosError that names the unreadable ones."""
    images = torch.empty(len(items), 3, size, size, dtype=torch.uint8)

    def fill(n):
        item, is_path = items[n], isinstance(items[n], str)
        try:
            picture = read_picture(item) if is_path else item[0][item[1]][0]
            images[n] = TF.pil_to_tensor(TF.center_crop(TF.resize(picture, size), size))
        except Exception as error:  # Pillow raises nearly anything
            return f"{item if is_path else f'image {n}'} ({error})"

    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's of tags, which do not name the file
        done = tqdm(pool.map(fill, range(len(items))), "decoding", len(items), leave=False, delay=1)
        bad = list(filter(None, done))
    more = f" and {len(bad) - 10} more" * (len(bad) > 10)
    require(not bad, f"not readable as images: {', '.join(bad[:10])}{more}; repair or remove them")
    return images


def load_data(settings, device):
    """The data set of the settings, its images on the device unless they take half of a GPU's free
    memory or more; labels stay on the host. Raises AdiosError where it cannot be had."""
    data = (load_shapes if settings.dataset == "shapes" else load_files)(settings)
    count, memory = len(data.labels), data.images.nbytes + data.test_images.nbytes
    classes = len(data.labels[data.labels >= 0].unique())
    require(classes > 1, f"--limit {settings.limit} leaves no labels of two classes: give more")
    enough = settings.batch_size <= count or settings.evaluate
    require(enough, f"--batch-size {settings.batch_size}: give {count}, all images, or less")
    if device.type != "cuda" or memory < torch.cuda.mem_get_info(device)[0] / 2:
        data.images, data.test_images = data.images.to(device), data.test_images.to(device)
    return data


# ---- Metrics -------------------------------------------------------------------------------------
# Of frozen features of unmasked images, and of masks. These are computed during training, too.


def batches(game, images, indices=None):
    """Images uint8 [n, 3, H, W], all or those at `indices`, as the networks see them, by 512."""
    for batch in (torch.arange(len(images)) if indices is None else indices).split(512):
        yield game.normalise(images[batch, :3].to(game.device) / 255)


@torch.no_grad()
def extract_features(game, images, indices=None):
    """Features, float32 [n, dim], of uint8 images [n, 3, H, H], all or those at `indices`."""
    game.model.eval()
    with game.autocast():
        features = [game.model.encoder(batch).float() for batch in batches(game, images, indices)]
    game.model.train()
    return torch.cat(features)


@torch.no_grad()
def predict_masks(game, images, truth=None):
    """What is hidden of uint8 images [n, 3, H, H]: the occluder's masks [n, N, H, H] or, where none
    are learned, the scheme's [n, 1, H, H]. `truth` holds the objects' masks, bool [n, H, H]."""
    if game.learned:
        return torch.cat([game.paint(batch) for batch in batches(game, images)])
    truth = None if truth is None else truth[:, None].to(game.device).float()
    return SCHEMES[game.settings.masks](torch.cat([*batches(game, images)]), None, truth).float()


def evenly_spaced(count):
    """Twelve of the indices below `count` (all, if there are fewer), evenly spaced: int64."""
    return torch.linspace(0, count - 1, min(12, count)).round().long()


def shown_masks(game, data):
    """Twelve test images, uint8 [12, 3, H, H], and what is hidden of them, [12, N or 1, H, H]."""
    shown = evenly_spaced(len(data.test_images))
    truth = None if data.test_masks is None else data.test_masks[shown]
    return data.test_images[shown], predict_masks(game, data.test_images[shown], truth)


def nearest_neighbours(train_features, test_features, k):
    """Cosine similarities and indices, [m, k] each, of the k training features [n, D] (all, if
    there are fewer) nearest to each of the test features [m, D]."""
    bank = F.normalize(train_features)
    nearest = [(batch @ bank.T).topk(min(k, len(bank)))
               for batch in F.normalize(test_features).split(1024)]
    return tuple(map(torch.cat, zip(*nearest)))


def top(scores, labels, k=1):
    """Top-k accuracy, 0 to 1: how often the label [n] is among the k highest scores [n, C]."""
    best = scores.topk(min(k, scores.shape[1])).indices
    return (best == labels[:, None].to(best.device)).any(1).float().mean().item()


def knn_accuracy(train_features, train_labels, test_features, test_labels, k=20, temperature=0.07):
    """Accuracy, 0 to 1, of weighted k-NN (arXiv 1805.01978, section 3.4): the k training features
    [n, D] nearest to a test feature [m, D] vote by exp(cosine / temperature). Labels are int64."""
    similarity, nearest = nearest_neighbours(train_features, test_features, k)
    votes = similarity.new_zeros(len(similarity), int(train_labels.max()) + 1).scatter_add(
        1, train_labels.to(nearest.device)[nearest], ((similarity - 1) / temperature).exp())
    return top(votes, test_labels)


def object_iou(masks, truth):
    """Intersection over union, 0 to 1, of an object and the mask that fits it best, if each pixel
    goes to its largest mask: the mean over masks [n, N, H, W] and true ones, bool [n, H, W]."""
    hard = F.one_hot(masks.argmax(1), masks.shape[1]).movedim(3, 1).bool()  # [n, N, H, W]
    truth = truth[:, None].to(hard.device)
    iou = (hard & truth).sum((2, 3)) / (hard | truth).sum((2, 3)).clamp_min(1)
    return iou.amax(1).mean().item()


def masks_apart(masks):
    """The least mean of |m_i − m_j| of two of the masks [n, N, H, W], 0 to 2 / N."""
    return (F.pdist(masks.movedim(1, 0).flatten(1), 1).min() / masks[:, 0].numel()).item()


def embedding_spread(z):
    """Standard deviation of embeddings [n, D] once normalised, mean over the dimensions, times √D:
    1 where they are spread evenly over the sphere, 0 where they collapsed."""
    return F.normalize(z).std(0, correction=0).mean().item() * math.sqrt(z.shape[1])


METRICS = {"knn": "k-NN", "knn_shuffled_background": "k-NN, shuffled backgrounds",
           "object_iou": "object IoU of the masks", "masks_apart": "closest two masks apart",
           "embedding_spread": "embedding spread"}


@torch.no_grad()
def compute_metrics(game, data):
    """By name the METRICS, 0 to 1 each, that data set and scheme allow, on the test images."""
    labelled = (data.labels >= 0).nonzero()[:, 0]
    train_set = extract_features(game, data.images, labelled), data.labels[labelled]
    test_features = extract_features(game, data.test_images)
    metrics = {"knn": knn_accuracy(*train_set, test_features, data.test_labels)}
    if "mixed_rand" in data.backgrounds:
        images, labels = data.backgrounds["mixed_rand"]
        shuffled = knn_accuracy(*train_set, extract_features(game, images), labels)
        metrics["knn_shuffled_background"] = shuffled
    if game.learned:
        if (truth := data.test_masks) is not None:
            metrics["object_iou"] = object_iou(predict_masks(game, data.test_images), truth)
        metrics["masks_apart"] = masks_apart(shown_masks(game, data)[1].cpu())
    metrics["embedding_spread"] = embedding_spread(game.model.eval().projector(test_features))
    game.model.train()
    return metrics


# ---- Pictures ------------------------------------------------------------------------------------
# Okabe and Ito's colours, told apart by the colour-blind too; masks have them in turn everywhere.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")


def overlay(images, masks):
    """Masks [n, N, H, W] in their colours over grey uint8 images: [n, 3, H, W] in [0, 1]."""
    palette = torch.tensor([to_rgb(COLOURS[n % 8]) for n in range(masks.shape[1])])
    colours = torch.einsum("bnhw,nc->bchw", masks.cpu().float(), palette)
    return 0.35 * TF.rgb_to_grayscale(images.cpu(), 3) / 255 + 0.65 * colours


def plot_grid(rows, names, titles=None, colours=None):
    """A figure of rows of images [3 or 1, H, W] in [0, 1], with a name beside each row and, if
    given in the same layout, titles above the images and colours of titles and frames."""
    # Letters beyond ASCII may be twice as wide, and folders may have names that are no valid text.
    titles = [[textwrap.fill(title, 16 if title.isascii() else 8, max_lines=3, placeholder="…")
               .encode(errors="replace").decode() for title in row] for row in titles or ()]
    figure = Figure(figsize=(1.15 * len(rows[0]), 1.2 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for i, j in itertools.product(range(len(rows)), range(len(rows[0]))):
        colour, axis = colours[i][j] if colours else "black", axes[i][j]
        image = rows[i][j].expand(3, -1, -1).permute(1, 2, 0).cpu().clamp(0, 1).numpy()
        axis.imshow(image, interpolation="nearest")
        axis.set(xticks=[], yticks=[], ylabel="" if j else names[i])
        axis.set_title(titles[i][j] if titles else "", fontsize=8, color=colour, parse_math=False)
        axis.spines[:].set(color=colour, linewidth=0.5 if colour == "black" else 2.5)
    return figure


def plot_masks(images, masks):
    """A figure of images, uint8 [n, 3, H, W], a column each: the image, each of its masks
    [n, N, H, W], and all of them over it."""
    rows = [images / 255, *masks.split(1, 1), overlay(images, masks)]
    names = ["image", *(f"mask {n + 1}" for n in range(masks.shape[1])), "all masks"]
    colours = ["black", *(COLOURS[n % 8] for n in range(masks.shape[1])), "black"]
    return plot_grid(rows, names, colours=[[colour] * len(images) for colour in colours])


def film_frame(images, masks, epoch):
    """A frame of film.gif, uint8 [3, h, w]: images, uint8 [n, 3, H, W], above the same with their
    masks over them, in tiles of 64 px, and the epoch."""
    tiles = F.adaptive_avg_pool2d(torch.cat((images.cpu() / 255, overlay(images, masks))), 64)
    grid = TF.to_pil_image(torchvision.utils.make_grid(tiles, len(images), pad_value=1))
    frame = ImageOps.expand(grid, (0, 0, 0, 14), "white")
    ImageDraw.Draw(frame).text((3, grid.height), f"epoch {epoch}", "black")
    return TF.pil_to_tensor(frame)


def save_film(frames, file):
    """Write frames, uint8 [3, h, w], as an endless GIF; 64 colours, not dithered, keep it small."""
    images = [TF.to_pil_image(frame).quantize(64, dither=Image.Dither.NONE) for frame in frames]
    times = [200] * (len(frames) - 1) + [3000]  # ms: five a second, and then time to look
    images[0].save(file, "gif", save_all=True, append_images=images[1:], duration=times, loop=0)


def save_figure(path, plot, *arguments):
    """Write the figure plot(*arguments) as a PNG, whatever a user's style and font may lack."""
    with style.context("default"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(path, lambda file: plot(*arguments).savefig(file, format="png"))


def plot_neighbours(data, indices, train_features, test_features):
    """A figure of twelve test images, a row each, with the eight nearest of the training images at
    these indices, whose features are given, and their classes, green where it is the same."""
    tests = evenly_spaced(len(data.test_images))
    nearest = indices[nearest_neighbours(train_features, test_features[tests], 8)[1].cpu()]
    labels = torch.cat((data.test_labels[tests, None], data.labels[nearest]), 1).tolist()
    rows = [[data.test_images[test] / 255, *data.images[near, :3] / 255]
            for test, near in zip(tests, nearest)]
    titles = [[data.classes[label] for label in row] for row in labels]
    colours = [["black", *("#009E73" if label == row[0] else "#D55E00" for label in row[1:])]
               for row in labels]
    return plot_grid(rows, [""] * len(rows), titles, colours)


def plot_curves(log):
    """A figure of a log (a dict per epoch, as in log.csv): losses, mask areas and metrics."""
    areas = {name: f"mask {name[5:]}" for name in log[-1] if name.startswith("area")}
    losses = {"loss": "encoder's loss, L", "gain": "occluder's gain, L − λp"}
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    panels = {"losses": losses, "mask areas": areas, "metrics": METRICS}
    for axis, (title, curves) in zip(figure.subplots(1, 3), panels.items()):
        for colour, (name, label) in zip(itertools.cycle(COLOURS), curves.items()):
            if points := [(entry["epoch"], entry[name]) for entry in log if name in entry]:
                axis.plot(*zip(*points), "o-", color=colour, label=label, markersize=3)
        axis.set(title=title, xlabel="epoch", ylim=None if title == "losses" else (0, 1))
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return figure


# ---- Training ------------------------------------------------------------------------------------
# A run survives being cut off: no file is left incomplete, and order and crops follow from seed,
# epoch, kind of device and number of processes alone: `--resume` goes on as if nothing had been.

RUN_FILES = ("checkpoint.pt", "log.csv", "film.gif", "curves.png", "results.json", "encoder.pt")
EVALUATION_FILES = ("evaluation.json", "neighbours.png", "masks.png")
PARTS = ("model", "model_optimizer", "occluder", "occluder_optimizer", "scaler")
# The settings that decide which networks there are, which a checkpoint fixes.
NETWORKS = "image_size ssl encoder width small_stem masks num_masks occluder_width".split()
VERSION = 6  # of checkpoints: what another one wrote cannot be used


def pick_device(name, compile=False):
    """The torch device of that name, or for `auto` the fastest that there is. Raises AdiosError if
    it or, where wanted, torch.compile does not work here."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.cpu()  # `meta` is a device, too, but nothing comes back from it
        if probe.is_cuda:
            torch.cuda.set_device(probe.device)  # whose streams a captured step uses
        if compile:  # fails without a C compiler or Triton, and on old GPUs
            torch.compile(torch.sin)(probe)
    except (RuntimeError, AssertionError, ImportError) as error:
        given = f"--device {name}" + " with --compile" * compile
        reason = str(error).split("\n\n")[0]  # hints for developers follow
        raise AdiosError(f"{given} does not work here, leave it out: {reason}") from error
    return probe.device


def files_of_run(out):
    """The files in a folder that a run and later evaluations of its encoder leave there."""
    transfer = [path for dataset in PRESETS for name in EVALUATION_FILES
                for path in out.glob(f"{dataset}{'/*' * (dataset == 'folder')}/{name}")
                if not (path.parent / "log.csv").exists()]  # else they are another run's
    return [*filter(os.path.lexists, map(out.joinpath, RUN_FILES + EVALUATION_FILES)), *transfer]


def check_folder(out, files=(), fix="name another"):
    """Raise AdiosError if a folder cannot be written to or holds these files; `fix`: what to do."""
    place = next((path for path in (out, *out.parents) if os.path.lexists(path)), None)
    writable = place and place.is_dir() and os.access(place, os.W_OK)
    require(writable, f"--out {out} cannot be made or written to: name another")
    names = ", ".join(os.path.relpath(path, out) for path in files)
    require(not files, f"--out {out} holds {names}: {fix}")


def reserve(out, undo):
    """Reserve a folder for a new run by making its log.csv, which only one of several that start at
    once can. Closing `undo`, an ExitStack, takes that back. Raises AdiosError if it has a run."""
    fix = "its run ended, is starting or was killed: give --overwrite, --resume or another --out"
    check_folder(out, files_of_run(out), fix)
    made = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    undo.callback(lambda: [path.rmdir() for path in made if not any(path.iterdir())])
    try:
        (out / "log.csv").touch(exist_ok=False)
    except FileExistsError:  # another run was faster
        check_folder(out, [out / "log.csv"], fix)
    undo.callback((out / "log.csv").unlink)


def write(path, save):
    """Make a file as a whole or not at all: what save(file) writes goes to another file, which then
    takes its place. Raises AdiosError where that fails."""
    content, unfinished = io.BytesIO(), path.with_name(f"{path.name}.{os.getpid()}.part")
    save(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:  # a full disk does not say where
        unfinished.unlink(missing_ok=True)
        fix = "make room or name another --out"
        raise AdiosError(f"{path} cannot be written ({error.strerror}): {fix}") from error


def save_run(out, game, log, film):
    """Write log.csv and, in checkpoint.pt, the settings and all else that a run needs to go on."""
    names = dict.fromkeys(name for entry in log for name in entry)  # in order, once each
    table = [names, *([str(entry.get(name, "")) for name in names] for entry in log)]
    write(out / "log.csv", lambda file: file.write("\n".join([*map(",".join, table), ""]).encode()))
    state = {name: getattr(game, name).state_dict() for name in PARTS}
    for part in state.values():
        part.pop("param_groups", None)
    state |= dict(version=VERSION, settings=asdict(game.settings), processes=WORLD, log=log,
                  film=film, mean=game.mean.cpu(), std=game.std.cpu())
    write(out / "checkpoint.pt", lambda file: torch.save(state, file))


def draw_run(out, game, data, log, film):
    """Draw curves.png, masks.png and, where masks are learned, film.gif."""
    save_figure(out / "curves.png", plot_curves, log)
    save_figure(out / "masks.png", plot_masks, *shown_masks(game, data))
    if film:
        write(out / "film.gif", lambda file: save_film(film, file))


def read_checkpoint(path):
    """A checkpoint's content; runs no code from it. Raises AdiosError where it cannot be used."""
    require(os.path.exists(path), f"there is no checkpoint {path}: train first, or name another")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        known = state["settings"].keys() == {f.name for f in fields(Settings)}
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        raise AdiosError(f"{path} is damaged or no checkpoint: name another") from error
    require(known and state["version"] == VERSION, f"{path} is of another version: train anew")
    return state


def restore(game, state, parts=PARTS):
    """Give parts of the game their states from a checkpoint; what it lacks, as rates do, stays."""
    for name in parts:
        part = getattr(game, name)
        part.load_state_dict(part.state_dict() | state[name])
    for p, moments in (game.model_optimizer.state | game.occluder_optimizer.state).items():
        for moment in ("exp_avg", "exp_avg_sq"):  # fused AdamW needs its weights' memory format
            moments[moment] = torch.empty_like(p).copy_(moments[moment])


def check_finite(step, encoder, occluder):
    """Raise AdiosError unless a value of the encoder's and one of the occluder's (loss and a mask's
    area, or norms of weights) are finite at this step. The occluder's may spoil the encoder's."""
    for name, value, rate in (("occluder", occluder, "occluder-lr"), ("encoder", encoder, "lr")):
        problem = f"the {name}'s numbers are not finite at step {step}: try a smaller --{rate}"
        require(math.isfinite(value), problem)


def warn(entry, change, warned):
    """Say once each (`warned` remembers) what looks wrong in an epoch's entry of the log; `change`
    is the mean of |Δm|, 0 to 1, since metrics were last computed or the run resumed."""
    areas = [area for name, area in entry.items() if name.startswith("area_")]
    collapsed, stopped = entry["embedding_spread"] < 0.05, "gain" in entry and change < 1e-4
    full = len(areas) > 1 and max(areas) > 0.98
    empty = len(areas) > 1 and min(areas) < 0.1 / len(areas)
    alike = entry.get("masks_apart", 1) < 0.2 / len(areas)
    signs = {
        "the embeddings have collapsed: try a smaller --lr or another --ssl": collapsed,
        "a mask covers nearly everything: try a larger --sparsity": full,
        "a mask covers nearly nothing: try a larger --sparsity or a smaller --num-masks": empty,
        "two masks are alike: try a larger --occluder-lr or a smaller --num-masks": alike,
        "the occluder has stopped moving: try a larger --occluder-lr or another --seed": stopped}
    for text in (text for text, holds in signs.items() if holds and text not in warned):
        warned.add(text)
        tqdm.write(f"adios: warning: epoch {entry['epoch']}: {text}", file=sys.stderr)


def train_epoch(game, data, epoch, bar):
    """Play an epoch (from 1) and move a tqdm bar on; returns its entry of the log: epoch, the means
    of what steps report, and images_per_second. Raises AdiosError where numbers are not finite."""
    batch_size, epochs = game.settings.batch_size, game.settings.epochs
    torch.manual_seed(game.settings.seed * 2**20 + epoch)
    # [steps, batch size]; images that do not fill a batch are left out.
    order = torch.randperm(len(data.images)).unfold(0, batch_size, batch_size)
    if RANK:  # the same order as process 0's, but other crops
        torch.manual_seed(int(torch.randint(2**32, (RANK,))[-1]))
    start, reports, steps = time.perf_counter(), [], len(order)
    for i, batch in enumerate(order.to(data.images.device)):
        images = data.images[batch[RANK::WORLD]].to(game.device)
        reports.append(game.play(images, (epoch - 1 + i / steps) / epochs))
        bar.update(batch_size)
        if i % 10 == 9 or i == steps - 1:  # to read numbers is to wait for the device
            for n in range(i - i % 10, i + 1):
                reports[n] = {name: value.item() for name, value in reports[n].items()}
                check_finite((epoch - 1) * steps + n + 1, reports[n]["loss"], reports[n]["area_1"])
            values = ", ".join(f"{name} {value:.2f}" for name, value in reports[-1].items())
            bar.set_postfix_str(f"epoch {epoch}/{epochs}, {values}")
    check_finite(epoch * steps, *(  # the weights after the last step, which no report shows
        nn.utils.get_total_norm(net.parameters()).item() for net in (game.model, game.occluder)))
    means = {name: torch.tensor([r[name] for r in reports if name in r]).mean().item()
             for name in reports[-1] | reports[0]}  # the occluder may stop learning on the way
    speed = order.numel() / (time.perf_counter() - start)
    return {"epoch": epoch, **means, "images_per_second": speed}


def play_epochs(game, data, out, log, film):
    """Play what is left of the run after the epochs in `log` and the frames in `film`, which grow.
    Process 0 computes metrics, draws and saves on the way; the others wait in their next step."""
    epochs, warned = game.settings.epochs, set()
    count = len(data.images) - len(data.images) % game.settings.batch_size  # images an epoch
    shown, masks = shown_masks(game, data)
    if game.learned and not log:
        film.append(film_frame(shown[:8], masks[:8], 0))
    with tqdm(total=epochs * count, initial=len(log) * count, unit="img", disable=RANK > 0) as bar:
        for epoch in range(len(log) + 1, epochs + 1):
            start = time.perf_counter()
            entry = train_epoch(game, data, epoch, bar)
            if RANK:
                continue
            log.append(entry)
            if game.learned and (epoch % math.ceil(epochs / 39) == 0 or epoch == epochs):
                film.append(film_frame(shown[:8], predict_masks(game, shown[:8]), epoch))
            measure = epoch % max(1, min(10, epochs // 4)) == 0 or epoch == epochs
            if measure:
                entry |= compute_metrics(game, data)
                before, masks = masks, shown_masks(game, data)[1]
                warn(entry, (masks - before).abs().mean().item(), warned)
            entry["seconds"] = time.perf_counter() - start
            save_run(out, game, log, film)
            if measure and epoch < epochs:  # `train` draws the last
                draw_run(out, game, data, log, film)


def read_resumed(settings):
    """The checkpoint in settings.out. Raises AdiosError if settings that decide numbers changed."""
    state = read_checkpoint(Path(settings.out, "checkpoint.pt"))
    free = ("data_dir", "device", "cuda_graph", "compile", "out", "resume", "overwrite")
    different = [f"{flag(name)} {saved}" for name, saved in state["settings"].items()
                 if name not in free and saved != getattr(settings, name)]
    different += [f"{state['processes']} processes"] * (state["processes"] != WORLD)
    require(not different, f"--resume: the checkpoint has {', '.join(different)}: give the same")
    return state


def train(settings):
    """Play the whole game. Into settings.out go masks.png, film.gif (if masks are learned),
    curves.png, log.csv and checkpoint.pt, renewed on the way, and in the end encoder.pt and
    results.json, whose content process 0 returns. Raises AdiosError for what a user can fix."""
    device, out = pick_device(settings.device, settings.compile), Path(settings.out)
    fits = settings.batch_size % WORLD == 0 and settings.batch_size >= 2 * WORLD
    require(fits, f"--batch-size: give a multiple of {WORLD}, from {2 * WORLD} up")
    state = read_resumed(settings) if settings.resume else None
    with contextlib.ExitStack() as undo:  # takes back what `reserve` made, should anything fail
        if RANK:
            dist.barrier()  # until process 0 has the data, since only one may download them
        elif state or settings.overwrite:
            check_folder(out)
        else:
            reserve(out, undo)
        data = load_data(settings, device)
        if WORLD > 1 and RANK == 0:
            dist.barrier()  # lets the others load the data, too
        torch.manual_seed(settings.seed)
        mean, std = (state["mean"], state["std"]) if state else data.statistics()
        game = Game(settings, mean, std, device)
        untrained = compute_metrics(game, data)
        log, film = (state["log"], state["film"]) if state else ([], [])
        if state:
            restore(game, state)
        elif not RANK:
            for path in files_of_run(out):
                if path.name != "log.csv":  # which reserves the folder
                    path.unlink()
            save_run(out, game, log, film)
        undo.pop_all()  # now that there is a checkpoint to resume, nothing is taken back
    if not RANK:
        millions = sum(p.numel() for p in game.model.encoder.parameters()) / 1e6
        print(f"{settings.dataset}: {len(data.images):,} images of {settings.image_size} px in "
              f"{len(data.classes)} classes, on {data.images.device} | {settings.ssl}, "
              f"{settings.encoder} of {millions:.2f} M parameters | {settings.masks} | "
              f"{WORLD} × {device}, {str(game.dtype)[6:]}")
    play_epochs(game, data, out, log, film)
    if RANK:
        return None
    results = {name: log[-1][name] for name in untrained}
    results |= {f"{name}_untrained": value for name, value in untrained.items()}
    results |= {"seconds": sum(entry["seconds"] for entry in log), "settings": asdict(settings),
                "images_per_second": sum(entry["images_per_second"] for entry in log) / len(log)}
    encoder = {name: value.cpu() for name, value in game.model.encoder.state_dict().items()}
    write(out / "encoder.pt", lambda file: torch.save(encoder, file))
    write(out / "results.json", lambda file: file.write(json.dumps(results, indent=2).encode()))
    draw_run(out, game, data, log, film)  # last, since a picture must not cost a number
    return results


# ---- Evaluation and benchmark --------------------------------------------------------------------
# How the paper scores a trained encoder: classification, clustering, backgrounds, transfer. What
# scikit-learn does is imported where it is used, since that takes a second.


def linear_probe(features, labels, classes):
    """Logistic regression, with 1e-4 |W|² beside the mean loss, on standardised features [n, D] and
    labels int64 [n]. Returns a function from features [m, D] to probabilities [m, classes]."""
    from sklearn import linear_model, pipeline, preprocessing
    regression = linear_model.LogisticRegression(C=1 / (2e-4 * len(labels)), max_iter=1000)
    probe = pipeline.make_pipeline(preprocessing.StandardScaler(), regression).fit(
        features.cpu().numpy(), labels.numpy())

    def predict(features):
        known = torch.from_numpy(probe.predict_proba(features.cpu().numpy())).double()
        return known.new_zeros(len(known), classes).index_copy(1, labels.unique(), known)
    return predict


def finetune(game, data):
    """Scores [m, C] of the test images once encoder and a linear layer have learned the labels."""
    settings, labelled = game.settings, (data.labels >= 0).nonzero()[:, 0]
    layer = nn.Linear(game.model.dim, len(data.classes), device=game.device)
    network = nn.Sequential(game.model.encoder, layer)
    optimizer, count = make_optimizer(network, settings), min(settings.batch_size, len(labelled))
    for epoch in tqdm(range(settings.epochs), "fine-tuning", leave=False):
        order = labelled[torch.randperm(len(labelled))].unfold(0, count, count)  # full batches only
        for i, batch in enumerate(order):
            images, labels = data.images[batch].to(game.device), data.labels[batch].to(game.device)
            with game.autocast():
                scores = network(game.normalise(augment(images[:, :3], settings)))
            set_rate(optimizer, settings.lr, (epoch + i / len(order)) / settings.epochs)
            game.minimise(F.cross_entropy(scores.float(), labels), optimizer)
    return layer(extract_features(game, data.test_images)).detach()


def cluster_metrics(features, labels, classes, seed):
    """How well k-means clusters of features [n, D] agree with labels int64 [n]: normalised mutual
    information and Fowlkes-Mallows index, 0 to 1, and adjusted Rand index, −0.5 to 1."""
    from sklearn import cluster, metrics
    k_means = cluster.KMeans(min(classes, len(labels)), n_init=5, random_state=seed)
    clusters = k_means.fit_predict(F.normalize(features).cpu().numpy())
    return {"nmi": metrics.normalized_mutual_info_score(labels, clusters),
            "ari": metrics.adjusted_rand_score(labels, clusters),
            "fmi": metrics.fowlkes_mallows_score(labels, clusters)}


def colour_iou(images, truth, seed):
    """object_iou, by name, that colours alone reach on uint8 images [n, 3, H, W], true masks bool
    [n, H, W]: with each image split at its mean brightness, or by k-means of its colours."""
    from sklearn.cluster import KMeans
    grey, pixels = TF.rgb_to_grayscale(images.float()), images.flatten(2).mT.float().numpy()
    segments = {"threshold": (grey > grey.mean((2, 3), keepdim=True)).flatten(1).long()}  # [n, H·W]
    for k in (2, 3, 4):
        clusters = [KMeans(k, n_init=5, random_state=seed).fit_predict(image) for image in pixels]
        segments[f"{k}_means"] = torch.stack([*map(torch.from_numpy, clusters)]).long()
    return {f"iou_{name}": object_iou(F.one_hot(segment).mT.unflatten(2, truth.shape[1:]), truth)
            for name, segment in segments.items()}


def score(game, data, train_set, test_features):
    """The paper's scores of the encoder and of masks, by name: from 0 to 1, `ari` from −0.5 and
    `linear_background_gap` from −1. `train_set` is features [n, D] and labels int64 [n]."""
    settings, classes, labels = game.settings, len(data.classes), data.test_labels
    results = {"knn_top1": knn_accuracy(*train_set, test_features, labels)}
    results |= cluster_metrics(test_features, labels, classes, settings.seed)
    probe = linear_probe(*train_set, classes)
    for name, (images, challenge_labels) in data.backgrounds.items():
        results[f"linear_{name}"] = top(probe(extract_features(game, images)), challenge_labels)
    if {"mixed_same", "mixed_rand"} <= data.backgrounds.keys():
        same, random = results["linear_mixed_same"], results["linear_mixed_rand"]
        results["linear_background_gap"] = same - random
    if data.test_masks is not None:
        images, truth = data.test_images[:200], data.test_masks[:200]
        if game.learned:
            results["iou_masks"] = object_iou(predict_masks(game, images), truth)
        results |= colour_iou(images.cpu(), truth, settings.seed)
    predictions = {"linear": probe(test_features)}
    if settings.finetune:  # last, since it changes the encoder
        predictions["finetuned"] = finetune(game, data)
    for k in (1, 5) if classes > 10 else (1,):
        results |= {f"{name}_top{k}": top(p, labels, k) for name, p in predictions.items()}
    return results


def evaluate(settings):
    """Score the checkpoint settings.evaluate on its own or other data, or raise AdiosError. Into
    settings.out go evaluation.json, neighbours.png and, if masks are learned and it is not the
    run's folder, masks.png; of pictures without classes only that. Returns the scores."""
    device, state = pick_device(settings.device), read_checkpoint(settings.evaluate)
    out, run, root = Path(settings.out), Path(settings.evaluate).parent, Path(settings.data_dir)
    # In and below the run's folder evaluations replace its earlier ones, but nothing of other runs.
    replaces = out == run or (run in out.parents and not (out / "log.csv").exists())
    check_folder(out, () if replaces or settings.overwrite else files_of_run(out))
    torch.manual_seed(settings.seed)
    game = Game(settings, state["mean"], state["std"], device)
    restore(game, state, ("model", "occluder"))

    paths = sorted(filter(is_picture, root.glob("*")))
    if settings.dataset == "folder" and paths and not (root / "train").exists():
        require(game.learned, "--evaluate: this checkpoint has no masks to paint on pictures")
        left_out = find_left_out([root], flat=True)
        images = decode([str(paths[n]) for n in evenly_spaced(len(paths))], settings.image_size)
        print(left_out, end="", file=sys.stderr)
        save_figure(out / "masks.png", plot_masks, images, predict_masks(game, images))
        print(f"{root} has no train/<class>/: masks on its pictures are in {out / 'masks.png'}")
        return None

    data = load_data(settings, device)
    indices = (data.labels >= 0).nonzero()[:, 0]
    train_set = extract_features(game, data.images, indices), data.labels[indices]
    test_features = extract_features(game, data.test_images)
    results = score(game, data, train_set, test_features)
    content = json.dumps(results | {"settings": asdict(settings)}, indent=2)
    write(out / "evaluation.json", lambda file: file.write(content.encode()))
    print("\n".join(f"{name:24}{value:8.3f}" for name, value in results.items()))
    save_figure(out / "neighbours.png", plot_neighbours, data, indices, train_set[0], test_features)
    if out != run and game.learned:
        save_figure(out / "masks.png", plot_masks, *shown_masks(game, data))
    print(f"\nevaluation.json and pictures are in {out}")
    return results


def bench(settings):
    """Time steps on random images, in turn with plain SimCLR's with the same encoder. Prints and
    returns medians: ms a step, images/s and `simclr_steps`, its cost in steps of plain SimCLR."""
    device, grey = pick_device(settings.device, settings.compile), torch.full((1, 3, 1, 1), 0.5)
    plain = replace(settings, ssl="simclr", masks="none")
    games = [Game(each, grey, grey, device) for each in (settings, plain)]
    channels, size = 3 + settings.masks.startswith("object"), settings.image_size
    images = torch.randint(256, (settings.batch_size, channels, size, size), device=device).byte()
    repeats, times = 1 if device.type == "cpu" else 20, torch.empty(11, 2)  # seconds a step
    for seconds in tqdm(times, leave=False):
        for n, game in enumerate(games):
            start = time.perf_counter()
            losses = [game.play(images, 0.0)["loss"] for _ in range(repeats)]
            losses[-1].item()  # waits for the device
            seconds[n] = (time.perf_counter() - start) / repeats
    times = times[1:]  # the first round warms up
    step, plain_step = times.median(0).values.tolist()
    results = {"simclr_steps": (times[:, 0] / times[:, 1]).median().item(), "step, ms": 1000 * step,
               "step, images/s": len(images) / step, "plain SimCLR, ms": 1000 * plain_step}
    print("\n".join(f"{name:32}{value:10.2f}" for name, value in results.items()))
    return results


# ---- The command line ----------------------------------------------------------------------------


def parse(argv=None):
    """The command line as Settings; with --evaluate, what it leaves out is the checkpoint's."""
    parser = argparse.ArgumentParser("adios", description=__doc__.splitlines()[0],
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: require(False, f"{message}; --help lists all settings")
    for f in fields(Settings):
        presets = (f"{name} {values.get(f.name)}" for name, values in PRESETS.items())
        default = ", ".join(presets) if f.default is None else f.default
        choices = "|".join(f.metadata["allowed"]) if f.type is str else ""
        kind = (dict(action=argparse.BooleanOptionalAction) if f.type is bool else
                dict(type=f.type, metavar=choices or f.type.__name__))
        help = f.metadata["help"] + f" [{default}]" * bool(default)
        parser.add_argument(flag(f.name), help=help, **kind)
    given = vars(parser.parse_args(argv))
    settings = Settings(**given)
    if "evaluate" not in given:
        return settings
    saved, run = read_checkpoint(settings.evaluate)["settings"], Path(settings.evaluate).parent
    different = [name for name in given if getattr(settings, name) != saved[name]]
    fixed = [f"{flag(name)} {saved[name]}" for name in different if name in NETWORKS]
    require(not fixed, f"the checkpoint has {', '.join(fixed)}: leave that out")
    # What is given wins over these defaults, and they over what the checkpoint has.
    defaults = dict(device="auto", compile=False, resume=False, overwrite=False, out=str(run))
    dataset = given.get("dataset", saved["dataset"])
    if "dataset" in different or (dataset == "folder" and "data_dir" in different):
        name = Path(settings.data_dir).absolute().name if dataset == "folder" else ""
        defaults |= dict(limit=0, data_dir=settings.data_dir, out=str(run / dataset / name))
    return Settings(**saved | defaults | given)


def print_results(results):
    """Print what `train` returns: metrics after and before training, time and folder."""
    print(f"\n{'':28}  trained  untrained")
    for name, title in METRICS.items():
        if name in results:
            form = "9.1%" if name.startswith("knn") else "9.2f"
            print(f"{title:28}{results[name]:{form}}  {results[f'{name}_untrained']:{form}}")
    print(f"\n{results['seconds']:.0f} s, {results['images_per_second']:.0f} images/s in training; "
          f"masks.png, curves.png and the rest are in {results['settings']['out']}")


def main(argv=None):
    """Run the command line; returns the exit code: 2 after a user's mistake, 130 after Ctrl-C."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # they may be closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # letters that a terminal or pipe does not know
    warnings.filterwarnings("ignore", module="sklearn")  # one-colour images have too few clusters
    checkpoint = ""
    try:
        settings = parse(argv)
        if WORLD > 1:
            other = settings.bench or settings.evaluate
            require(not other, "torchrun is for training: give --bench and --evaluate to python")
            if settings.device in ("auto", "cuda") and torch.cuda.is_available():
                torch.cuda.set_device(int(PROCESS["LOCAL_RANK"]))  # `cuda` now means that one
            dist.init_process_group(timeout=timedelta(hours=12))  # for process 0's downloads
        if settings.bench:
            bench(settings)
        elif settings.evaluate:
            evaluate(settings)
        else:
            checkpoint = os.path.join(settings.out, "checkpoint.pt")
            if results := train(settings):
                print_results(results)
        return 0
    except KeyboardInterrupt:
        hint = "; --resume goes on from the last epoch" * os.path.exists(checkpoint)
        print(f"\nadios: stopped{hint}", file=sys.stderr)
        return 130
    except (AdiosError, OSError) as error:
        problem = " ".join(str(error).split())  # one line
    except (MemoryError, RuntimeError) as error:
        small = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not small and "allocate memory" not in str(error):
            time.sleep(5 * (WORLD > 1))  # torchrun ends this process if it was another that failed
            raise
        problem = "memory is too small: give a smaller --batch-size, --image-size or --limit"
    time.sleep(5 * (RANK > 0))  # all processes make the same mistake: the first one says so
    print(f"adios: error: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
