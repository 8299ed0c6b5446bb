#!/usr/bin/env python3
"""ADIOS in one file: learning what to hide, without labels.

Siamese self-supervised learning shows an encoder two views of an image and asks for the same
representation of both. ADIOS ("Adversarial Masking for Self-Supervised Learning", Shi et al., ICML
2022, arXiv 2201.13100) lets a second network hide part of one view first. The two play a min-max
game over one loss:

    I*, M* = argmin_I max_M  1/N Σ_n [ L_n(x; I, M) − λ p_n ]

    I    the inference model, an encoder and its heads: it makes the loss small
    M    the occlusion model, a U-Net that paints N soft masks, Σ_n m_n = 1 at each pixel:
         it makes the loss large
    L_n  an SSL method's loss between view A, whole, and view B behind mask n: B ⊙ (1 − m_n)
    p_n  1 / sin(π · mean(m_n)), the price of a mask that hides nothing or everything

M gains by hiding what the encoder relies on, so its masks come to follow objects.

    python adios.py                       drawn shapes, three minutes on a laptop
    python adios.py --dataset stl10       the real thing, on a GPU
    python adios.py --help                every setting

In the order of reading: settings, data, views, encoder, occluder, objectives, masking schemes,
the game, the judges, the pictures, training, evaluation, the benchmark, the command line.
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import hashlib
import io
import itertools
import json
import math
import os
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib.colors import hsv_to_rgb, to_rgb
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF
from tqdm.auto import tqdm

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither: no lock on the folder of a run, no peak memory there
    fcntl = resource = None

# ---- Settings ------------------------------------------------------------------------------------
# One dataclass is the command line, the argument of `train` and the record in results.json. Where
# it gives no default, the data set does.

SHAPES = dict(image_size=32, width=16, small_stem=False, occluder_width=8, num_masks=2, lr=8e-3,
              occluder_lr=2e-3, occluder_share=0.2, sparsity=0.2, epochs=50, batch_size=128,
              min_crop=0.3, jitter=0.2, blur=0.0)
CIFAR = dict(image_size=32, width=64, small_stem=True, occluder_width=32, num_masks=4, lr=2e-3,
             occluder_lr=1e-3, occluder_share=1.0, sparsity=0.1, epochs=100, batch_size=256,
             min_crop=0.08, jitter=0.5, blur=0.0)
STL10 = CIFAR | dict(image_size=96, small_stem=False, num_masks=6, blur=0.5)
FLOWERS = STL10 | dict(batch_size=128)
FOLDER = FLOWERS | dict(image_size=64, width=24, occluder_width=8, num_masks=4, occluder_share=0.5,
                        epochs=20)
PRESETS = dict(shapes=SHAPES, stl10=STL10, cifar10=CIFAR, cifar100=CIFAR, flowers102=FLOWERS,
               folder=FOLDER)
SSL = dict(simclr={}, byol=dict(lr=1e-3), simsiam=dict(lr=1e-3))  # what they change in a preset
ENCODERS = dict(resnet18={}, resnet50={}, vit_tiny=dict(lr=5e-4))


class AdiosError(ValueError):
    """A mistake that the user can mend: shown as one line `adios: error: …`, exit code 2."""


def option(help, default=None, choices=None, low=None, high=None):
    """A field of Settings: its help, its default (None: the data set's), what it may be."""
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high))


@dataclass
class Settings:
    """All that decides a run; raises AdiosError where a value is out of range. `replace` keeps
    what the data set or the method filled in, as the rate, and the name of the folder."""

    dataset: str = option("images to train on", "shapes", tuple(PRESETS))
    data_dir: str = option("where data sets are or are downloaded to; for `folder` the one with "
                           "train/<class>/ and val/<class>/ in it", "data")
    image_size: int = option("pixels a side", low=32, high=1024)
    ssl: str = option("siamese objective", "simclr", tuple(SSL))
    masks: str = option("what is hidden: nothing, random patches (mae) or blocks (beit), the true "
                        "object or its background, another image's, each of the N learned masks in "
                        "turn (adios) or one of them per image (adios-s)", "adios-s",
                        ("none", "mae", "beit", "object", "object-shuffled", "adios", "adios-s"))
    num_masks: int = option("N, the masks that the occluder paints", low=2, high=64)
    updates: str = option("both players move in turn, or at once by one backward pass",
                          "alternating", ("alternating", "simultaneous"))
    encoder: str = option("what learns to represent images", "resnet18", tuple(ENCODERS))
    width: int = option("channels of resnet18's first stage", low=1, high=1024)
    small_stem: bool = option("3×3 stem without pooling, for small images")
    occluder_width: int = option("channels c of the occluder's first stage, a multiple of 8",
                                 low=8, high=1024)
    epochs: int = option("passes over the training images", low=1, high=10**6)
    batch_size: int = option("images a step, of all processes together", low=2, high=10**6)
    lr: float = option("peak learning rate of the encoder (AdamW); with byol and simsiam 1e-3, "
                       "with vit_tiny 5e-4, else", low=1e-9, high=10)
    occluder_lr: float = option("peak learning rate of the occluder (AdamW)", low=0, high=10)
    occluder_share: float = option("share of the run in which the occluder learns; its masks then "
                                   "stay as they are", low=1e-3, high=1)
    weight_decay: float = option("of both players, biases and norms excepted", 1e-4, low=0, high=10)
    sparsity: float = option("λ, weight of the sparsity penalty", low=0, high=1000)
    temperature: float = option("of NT-Xent", 0.2, low=1e-3, high=1000)
    min_crop: float = option("smallest share of an image that a crop covers", low=1e-3, high=1)
    jitter: float = option("colour jitter s: brightness, contrast and saturation ± 0.8 s, hue "
                           "± 0.2 s", low=0, high=1.25)
    blur: float = option("probability of Gaussian blur", low=0, high=1)
    limit: int = option("training images to use, of shapes to draw (0: all)", 0, low=0, high=10**9)
    seed: int = option("of data, weights, order and crops", 0, low=0, high=2**12 - 1)
    device: str = option("cpu, cuda, cuda:1, mps or auto, the fastest there is", "auto")
    compile: bool = option("torch.compile the networks: a minute's wait at the start", False)
    out: str = option("folder for results (default: runs/<dataset>-<ssl>-<masks>)", "")
    resume: bool = option("go on from the checkpoint in --out", False)
    overwrite: bool = option("replace the run in --out", False)
    evaluate: str = option("judge the encoder of this checkpoint, with --dataset on other data", "")
    finetune: bool = option("with --evaluate: fine-tune the encoder, too", False)
    bench: bool = option("time the parts of a step, on random images", False)

    def __post_init__(self):
        for f in fields(self):
            value, choices, low = getattr(self, f.name), f.metadata["choices"], f.metadata["low"]
            if value is None and self.dataset in PRESETS:
                value = (PRESETS[self.dataset] | SSL.get(self.ssl, {})
                         | ENCODERS.get(self.encoder, {})).get(f.name)
            if f.type is float and type(value) is int:
                value = float(value)
            right = ("one of " + ", ".join(choices) if choices else
                     f"a value of type {f.type.__name__}")
            if low is not None:
                right += f" from {low} to {f.metadata['high']}"
            if (type(value) is not f.type or choices and value not in choices
                    or low is not None and not low <= value <= f.metadata["high"]):
                raise AdiosError(f"{flag(f.name)} {value}: give {right}")
            setattr(self, f.name, value)
        if self.occluder_width % 8:
            raise AdiosError(f"--occluder-width {self.occluder_width}: give a multiple of 8")
        if self.masks.startswith("object") and self.dataset != "shapes" and not self.evaluate:
            raise AdiosError(f"--masks {self.masks}: only shapes knows its objects' true masks")
        if self.resume and self.overwrite or self.bench and self.evaluate:
            both = ("--bench and --evaluate" if self.bench and self.evaluate else
                    "--resume and --overwrite")
            raise AdiosError(f"{both} exclude each other: drop one of them")
        if self.finetune and not self.evaluate:
            raise AdiosError("--finetune is a part of --evaluate CHECKPOINT: give that, too")
        self.out = self.out or f"runs/{self.dataset}-{self.ssl}-{self.masks}"


def flag(name):
    """The command-line spelling of a setting."""
    return "--" + name.replace("_", "-")


def one_line(error):
    """An exception's message on one line."""
    return " ".join(str(error).split())


# ---- Data ----------------------------------------------------------------------------------------
# Images live as one uint8 tensor: on the device when they fit, else in memory, else in a file that
# is mapped into it. There are no loader processes, a batch is an index. `shapes` is drawn here, so
# that the true masks are known and learned masks can be judged. Its backgrounds tell the class nine
# times in ten: the shortcut that hiding should cure.


@dataclass
class Data:
    """A data set: images uint8 [n, 3, H, W], labels int64 [n], object masks bool [n, H, W]."""

    images: Tensor                     # for pre-training
    labels: Tensor                     # −1 where unlabelled; such images reach no judge
    test_images: Tensor
    test_labels: Tensor
    classes: list                      # their names
    masks: Tensor | None = None        # the objects in the training images
    test_masks: Tensor | None = None
    # test images of the Backgrounds Challenge (arXiv 2006.09994) and their labels, by its names
    backgrounds: dict = field(default_factory=dict)
    place: str = "memory"              # where the images are

    def statistics(self):
        """Mean and standard deviation of the channels, [1, 3, 1, 1] each, of values in [0, 1]; of
        2,000 images at most, the same ones always."""
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0))
        sample = self.images[order[:2000]].float() / 255
        std, mean = torch.std_mean(sample, dim=(0, 2, 3), keepdim=True)
        return mean, std.clamp_min(1e-3)

    def to(self, device):
        """Itself, with the images moved to a GPU if they take less than half of its free memory,
        or to mps, which shares the host's. Labels stay on the host: row numbers made from them can
        index images anywhere."""
        size = self.images.nbytes + self.test_images.nbytes
        if device.type == "mps" or (
                device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 2):
            self.images, self.test_images = self.images.to(device), self.test_images.to(device)
            self.place = str(device)
        return self


# A shape says which points (x, y) are in it, in units in which each has an area of about 3.
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
    "corner": lambda x, y: (x.abs().maximum(y.abs()) < 1.1) & (x.minimum(y) < -0.2),
}


def draw_shapes(count, size, seed):
    """Draw objects and backgrounds, to be composed: the same for a seed on every machine, since
    random numbers are the CPU generator's and the arithmetic, in float64, ends in 8 bits. Returns
    labels int64 [n], object colours uint8 [n, 3, 1, 1], the objects' coverage of each pixel,
    float64 [n, 1, H, W] in [0, 1], and backgrounds uint8 [n, 3, H, W]."""
    rng = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return low + (high - low) * torch.rand(count, generator=rng, dtype=torch.float64)

    def colours(hue, saturation, value):
        rgb = hsv_to_rgb(torch.stack((hue % 1, saturation, value), 1).numpy())
        return (255 * torch.from_numpy(rgb)).round()[:, :, None, None]

    labels = torch.arange(count) % len(INSIDE)
    turn, radius = draw(0, 2 * math.pi), size * draw(0.30, 0.37)
    centre_x, centre_y = size * draw(0.4, 0.6), size * draw(0.4, 0.6)
    deep = draw(0, 1) < 0.5  # objects are deep or pale, backgrounds in between
    objects = colours(draw(0, 1), torch.where(deep, draw(0.6, 1), draw(0, 0.35)),
                      torch.where(deep, draw(0.1, 0.4), draw(0.9, 1)))
    tells = draw(0, 1) < 0.9  # whether the background's hue goes with the class
    hue = torch.where(tells, labels, (draw(0, 1) * len(INSIDE)).long()) / len(INSIDE)
    backgrounds = colours(hue + draw(-0.02, 0.02), draw(0.5, 0.6), draw(0.65, 0.75))
    grain = torch.randint(-10, 11, (count, 1, size, size), generator=rng)

    points = (torch.arange(2 * size, dtype=torch.float64) + 0.5) / 2  # 2 × 2 samples a pixel
    coverage = torch.empty(count, 1, size, size, dtype=torch.float64)
    for label, inside in enumerate(INSIDE.values()):
        for rows in (labels == label).nonzero()[:, 0].split(256):
            x = (points - centre_x[rows, None])[:, None, :]  # [n, 1, 2W]
            y = (points - centre_y[rows, None])[:, :, None]  # [n, 2H, 1]
            cos, sin = (f(turn[rows])[:, None, None] / radius[rows, None, None]
                        for f in (torch.cos, torch.sin))
            hit = inside(cos * x + sin * y, cos * y - sin * x).double()
            coverage[rows] = F.avg_pool2d(hit[:, None], 2)
    return labels, objects.byte(), coverage, (backgrounds + grain).clamp(0, 255).byte()


def compose(objects, coverage, backgrounds):
    """Objects before backgrounds: uint8 [n, 3, H, W]."""
    pieces = zip(objects.split(256), coverage.split(256), backgrounds.split(256))
    return torch.cat([(alpha * front + (1 - alpha) * back).round().byte()
                      for front, alpha, back in pieces])


def load_shapes(settings):
    """4,000 images to train on (or `limit`) and 1,000 to test."""
    size, seed = settings.image_size, 2 * settings.seed
    labels, objects, coverage, grounds = draw_shapes(settings.limit or 4000, size, seed)
    images, masks = compose(objects, coverage, grounds), coverage[:, 0] >= 0.5
    test_labels, objects, coverage, grounds = draw_shapes(1000, size, seed + 1)
    deal = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
    behind = {"original": grounds, "mixed_same": grounds.roll(len(INSIDE), 0),  # labels take turns
              "mixed_rand": grounds[deal], "only_fg": torch.zeros_like(grounds)}
    tests = {name: compose(objects, coverage, ground) for name, ground in behind.items()}
    tests["only_bg_t"] = grounds
    return Data(images, labels, tests["original"], test_labels, list(INSIDE), masks=masks,
                test_masks=coverage[:, 0] >= 0.5,
                backgrounds={name: (test, test_labels) for name, test in tests.items()})


CHALLENGE = ("original", "mixed_same", "mixed_rand", "mixed_next", "only_fg", "no_fg", "only_bg_b",
             "only_bg_t")


def open_split(name, root, split):
    """Images [n, 3, H, W] or their paths, labels and the names of the classes of a data set's
    split: train, val or, of `folder`, a part of the Backgrounds Challenge."""
    train = split == "train"
    if name == "folder":
        data = datasets.ImageFolder(root / split)
        return [path for path, _ in data.samples], data.targets, data.classes
    if name == "flowers102":
        data = datasets.Flowers102(root, "train" if train else "test", download=True)
        return data._image_files, data._labels, data.classes
    if name == "stl10":
        data = datasets.STL10(root, "train+unlabeled" if train else "test", download=True)
        return torch.from_numpy(data.data), data.labels, data.classes
    data = getattr(datasets, name.upper())(root, train, download=True)
    return torch.from_numpy(data.data).permute(0, 3, 1, 2), data.targets, data.classes


def load_files(settings):
    """What torchvision downloads and checks, and `folder`: ImageNet's layout and, beside train and
    val, the Backgrounds Challenge's folders where they are there."""
    size, root, name = settings.image_size, Path(settings.data_dir), settings.dataset
    places = {split: split for split in ("train", "val")}
    for part in CHALLENGE if name == "folder" else ():
        for place in (part, f"{part}/val"):  # the latter as in its archive
            if os.path.isdir(root / place):
                places[part] = place
    splits = {}
    for split, place in places.items():
        try:
            images, labels, classes = open_split(name, root, place)
        except (OSError, RuntimeError) as error:
            need = ("it must hold train/<class>/ and val/<class>/ with images in them"
                    if name == "folder" else "mend the network, or put its files there by hand")
            raise AdiosError(f"--data-dir {root}: {one_line(error)}; {need}") from error
        if isinstance(images, list):
            images = decode(images, size)
        elif images.shape[2] != size:
            images = torch.cat([TF.resize(part, [size, size]) for part in images.split(1000)])
        splits[split] = images.contiguous(), torch.as_tensor(labels).long(), classes
        odd = sorted(set(classes) ^ set(splits["train"][2]))
        if odd or len(classes) < 2:
            problem = (f"train and {split} must have the same classes; only one has "
                       f"{', '.join(odd)}" if odd else "there must be two classes or more")
            raise AdiosError(f"--data-dir {root}: {problem}")
    data = Data(*splits["train"][:2], *splits["val"][:2], splits["train"][2], place=(
        "a file mapped into memory" if name in ("folder", "flowers102") else "memory"))
    data.backgrounds = {part: splits[part][:2] for part in splits if part in CHALLENGE}
    return data


def read_boxes(path, images, size):
    """Where the objects are in image files, bool [n, size, size], resized and cropped with them.
    The file `path`, a table split,class,file,xmin,ymin,xmax,ymax, has a line for each; coordinates
    are pixels of the image as it is on the disk, from 0, the last ones included."""
    inside = torch.zeros(len(images), size, size, dtype=torch.bool)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            boxes = {(row["split"], row["class"], row["file"]): row for row in csv.DictReader(file)}
        for image, found in zip(images, inside):
            left, top, right, bottom = (float(boxes[Path(image).parts[-3:]][side])
                                        for side in ("xmin", "ymin", "xmax", "ymax"))
            with Image.open(image) as opened:
                width, height = opened.size
            if not (0 <= right >= left < width and 0 <= bottom >= top < height):
                raise ValueError(f"no part of {image} is in its box")
            scale, pixels = min(width, height) / size, torch.arange(size) - size / 2 + 0.5
            x, y = width / 2 + scale * pixels, height / 2 + scale * pixels[:, None]
            found |= (left <= x) & (x < right + 1) & (top <= y) & (y < bottom + 1)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise AdiosError(f"{path}: {one_line(error)}; mend it or take it away: it must have the "
                         "columns split,class,file,xmin,ymin,xmax,ymax and a line per image"
                         ) from error
    return inside


def read_image(path, size):
    """The bytes of an image file as RGB [3, size, size], the short side resized to `size` and
    centre-cropped; of an animation the first image."""
    try:
        with Image.open(path) as image:
            if image.mode == "F":
                raise ValueError("its pixels are of floating point")
            if image.mode.startswith("I;") or image.mode == "I" and image.getextrema()[1] > 255:
                # 16 bits a pixel, which Pillow would cut off at 255
                image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
            image = TF.center_crop(TF.resize(image.convert("RGB"), size), size)
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        raise AdiosError(f"{path} cannot be read as an image ({one_line(error)}): repair it or "
                         "take it away") from error
    return TF.pil_to_tensor(image).numpy().tobytes()


def decode(paths, size):
    """Image files as uint8 [n, 3, size, size], decoded on all cores (Pillow works outside Python's
    lock) into a file under $XDG_CACHE_HOME or ~/.cache, named after their names, lengths and times:
    the next run maps it into memory at once, and it is made anew when one of them changes."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adios"
    half, length = home / f"half-{os.getpid()}", len(paths) * 3 * size**2
    try:
        paths = [Path(path).absolute() for path in paths]
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        place, state = (hashlib.sha256(repr(value).encode()).hexdigest()[:16]
                        for value in ((files[0][0], size), files))
        cache = home / f"{place}-{state}"
        if not cache.exists() or cache.stat().st_size != length:
            home.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(os.cpu_count()) as pool, open(half, "wb") as file, tqdm(
                    total=len(paths), unit="img", desc="decoding", delay=1, leave=False) as bar:
                for start in range(0, len(paths), 256):  # piece by piece: memory stays flat
                    for image in pool.map(read_image, paths[start:start + 256], [size] * 256):
                        file.write(image)
                        bar.update()
            for old in set(home.glob(f"{place}-*")) - {cache}:
                old.unlink(missing_ok=True)
            half.replace(cache)
        pixels = torch.from_file(str(cache), shared=True, size=length, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:  # shared, a file may be larger than the memory
        raise AdiosError(f"{home}: {one_line(error)}; mend that, or set XDG_CACHE_HOME to a folder "
                         "with room for a cache") from error
    finally:
        with contextlib.suppress(OSError):  # after a success it has got its name
            half.unlink()
    return pixels.view(-1, 3, size, size)


def load_data(settings):
    """The data set of the settings as `Data`; raises AdiosError where it is not to be had."""
    data = (load_shapes if settings.dataset == "shapes" else load_files)(settings)
    if 0 < settings.limit < len(data.images):
        rng = torch.Generator().manual_seed(settings.seed)
        keep = torch.randperm(len(data.images), generator=rng)[:settings.limit].sort().values
        data.images, data.labels, data.place = data.images[keep], data.labels[keep], "memory"
    if (data.labels >= 0).sum() < 2:
        raise AdiosError(f"--limit {settings.limit}: fewer than two of these images have a label "
                         "to judge by; give more")
    if settings.batch_size > len(data.images) and not settings.evaluate:
        raise AdiosError(f"--batch-size {settings.batch_size}: there are {len(data.images)} "
                         "training images; make the batch smaller")
    return data


# ---- Two views -----------------------------------------------------------------------------------
# SimCLR's augmentations (arXiv 2002.05709, appendix A) in torchvision's distributions. What is
# random is drawn per image, on the host; the pixels are worked on in batches, on the device.


def send(tensor, device):
    """Copy a tensor to a device without waiting for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def uniform(low, high, *shape):
    """Uniform random numbers in [low, high), float32 on the CPU."""
    return torch.empty(*shape).uniform_(low, high)


def random_boxes(count, size, min_crop):
    """Crops [count, 4] (top, left, height, width, in pixels) of images [size, size], drawn as by
    RandomResizedCrop: share of the area uniform in [min_crop, 1], log of the aspect ratio uniform
    in ± log 4/3, ten tries to fit into the image, else the whole of it."""
    area = size**2 * uniform(min_crop, 1, count, 10)
    ratio = uniform(-math.log(4 / 3), math.log(4 / 3), count, 10).exp()
    shape = torch.stack((area / ratio, area * ratio), 2).sqrt().round()  # [count, 10, 2]
    fits = ((shape > 0) & (shape <= size)).all(2)
    shape = shape[torch.arange(count), fits.int().argmax(1)]
    shape[~fits.any(1)] = size
    return torch.cat(((torch.rand(count, 2) * (size - shape + 1)).floor(), shape), 1)


def crop_and_flip(images, boxes, flip):
    """Boxes [B, 4] of images [B, C, H, H], resized bilinearly to H × H, mirrored where flip [B]:
    one sampling grid, which does not look beyond the box."""
    size, device = images.shape[-1], images.device
    top, left, height, width = send(boxes, device)[:, :, None].unbind(1)  # [B, 1] each
    centres = (torch.arange(size, device=device) + 0.5) / size
    rows = (top + height * centres).clamp(top + 0.5, top + height - 0.5)  # [B, H]
    columns = (left + width * centres).clamp(left + 0.5, left + width - 0.5)
    columns = torch.where(send(flip, device)[:, None], columns.flip(1), columns)
    grid = torch.stack((columns[:, None, :].expand(-1, size, -1),
                        rows[:, :, None].expand(-1, -1, size)), 3)
    return F.grid_sample(images, 2 * grid / size - 1, align_corners=False)


def shift_hue(images, shift):
    """Turn the hue of RGB images [B, 3, H, W] by shift [B, 1, 1, 1] (in turns), through HSV."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)  # [B, H, W]
    chroma = value - images.amin(1)
    scaled = torch.lerp(green - blue, torch.lerp(  # chroma × hue in sixths of a turn; sign: 0 or 1
        blue - red + 2 * chroma, red - green + 4 * chroma, (value - green).sign()),
        (value - red).sign())
    hue = 6 * (scaled / (6 * chroma).clamp_min(1e-12) + 1 + shift[:, 0]).frac()
    waves = 2 - (hue - 3).abs(), (hue - 2).abs() - 1, (hue - 4).abs() - 1
    return torch.stack([value - chroma * wave.clamp(0, 1) for wave in waves], 1)


def colour_jitter_(images, factors, order):
    """Adjust images [B, 3, H, W] in [0, 1] in place by factors [B, 4] (brightness, contrast,
    saturation, hue), each image in its own order [B, 4] of the four; −1 there adjusts nothing.
    The first three scale a colour's distance from black, from the image's mean grey and from the
    pixel's grey: one blend does them all, and four are cheaper than sorting images by turn."""
    turns = (order[:, :, None] == torch.arange(4)).float()  # [B, 4 steps, 4 adjustments]
    towards = (turns * (1 - factors)[:, None])[:, :, :3].sum(2)
    blends = send(torch.cat((turns[:, :, 1:3], towards[:, :, None]), 2), images.device)
    shift = send(factors[:, 3, None, None, None], images.device)
    for step, blend in zip(order.T, blends[..., None, None, None].unbind(1)):
        mean, own, weight = blend.unbind(1)  # [B, 1, 1, 1] each
        grey = TF.rgb_to_grayscale(images)
        grey = mean * grey.mean((2, 3), keepdim=True) + own * grey
        images.lerp_(grey, weight).clamp_(0, 1)
        rows = send((step == 3).nonzero()[:, 0], images.device)
        images[rows] = shift_hue(images[rows], shift[rows])


def gaussian_blur(images, sigma):
    """Blur images [B, C, H, W] by sigma [B] pixels: reflected borders, and a kernel as wide as a
    tenth of the image, which is SimCLR's choice."""
    batch, channels, size, _ = images.shape
    radius = size // 20
    kernel = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (kernel / send(sigma, images.device)[:, None])**2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None]
    images = F.pad(images, (radius,) * 4, mode="reflect").flatten(0, 1)[None]  # [1, B·C, H', W']
    for weight in (kernel[:, :, None, :], kernel[:, :, :, None]):
        images = F.conv2d(images, weight, groups=batch * channels)
    return images.view(batch, channels, size, size)


def augment(images, settings):
    """One random view of each image: uint8 [B, C, H, H] to float32 [B, C, H, H] in [0, 1]. The
    first three channels are colours; others, such as masks, are cropped and flipped with them.
    Random resized crop, flip (p 0.5), colour jitter (p 0.8), grey (p 0.2) and Gaussian blur
    (p settings.blur, sigma 0.1 to 2 pixels), drawn from torch's global CPU generator."""
    count, size, device = len(images), images.shape[-1], images.device
    boxes = random_boxes(count, size, settings.min_crop)
    views = crop_and_flip(images.float().div_(255), boxes, torch.rand(count) < 0.5)
    colours = views[:, :3]
    factors = settings.jitter * torch.tensor((0.8, 0.8, 0.8, 0.2)) * uniform(-1, 1, count, 4)
    order = torch.rand(count, 4).argsort(1)
    order[torch.rand(count) >= 0.8] = -1
    colour_jitter_(colours, factors + torch.tensor((1, 1, 1, 0)), order)
    rows = send((torch.rand(count) < 0.2).nonzero()[:, 0], device)
    colours[rows] = TF.rgb_to_grayscale(colours[rows], 3)
    rows = send((torch.rand(count) < settings.blur).nonzero()[:, 0], device)
    if len(rows):
        colours[rows] = gaussian_blur(colours[rows], uniform(0.1, 2, len(rows)))
    return views


# ---- The encoder ---------------------------------------------------------------------------------
# ResNet-18 (arXiv 1512.03385) as in torchvision, under the same parameter names, so that weights
# load both ways; `width` thins it for small runs. The larger encoders are torchvision's own.


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut: [B, inner, H, W] to [B, outer, H/s, W/s]."""

    def __init__(self, inner, outer, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.downsample = nn.Identity() if stride == 1 and inner == outer else nn.Sequential(
            nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu_()
        return (self.bn2(self.conv2(y)) + self.downsample(x)).relu_()


class ResNet18(nn.Module):
    """Images [B, 3, H, W] to features [B, 8 · width]; at width 64 torchvision's resnet18
    without its `fc`. `small_stem` keeps the resolution of small images (as is usual on CIFAR)."""

    def __init__(self, width=64, small_stem=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, *((3, 1, 1) if small_stem else (7, 2, 3)), bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, 2, 1)
        for stage, (inner, outer) in enumerate(((1, 1), (1, 2), (2, 4), (4, 8)), 1):
            self.add_module(f"layer{stage}", nn.Sequential(
                BasicBlock(inner * width, outer * width, 1 if stage == 1 else 2),
                BasicBlock(outer * width, outer * width, 1)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stem(self, x):
        """conv1. Where a gradient goes on to the images, as in M's move, a stride of 2 is computed
        on blocks of 2 × 2 pixels as 12 channels: the same function with a cheaper gradient."""
        if not x.requires_grad or self.conv1.stride != (2, 2):
            return self.conv1(x)
        odd = x.shape[-1] % 2
        weight = F.pixel_unshuffle(F.pad(self.conv1.weight, (1, 0, 1, 0)), 2)
        blocks = F.pixel_unshuffle(F.pad(x, (4, 2 + odd, 4, 2 + odd)), 2)
        return F.conv2d(blocks.contiguous(memory_format=torch.channels_last), weight)

    def forward(self, x):
        x = self.maxpool(self.bn1(self.stem(x)).relu_())
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))


def make_encoder(settings):
    """The encoder of the settings, images [B, 3, H, H] to features [B, D], and D."""
    size = settings.image_size
    if settings.encoder == "resnet18":
        return ResNet18(settings.width, settings.small_stem), 8 * settings.width
    if settings.encoder == "resnet50":
        encoder = torchvision.models.resnet50()
        if settings.small_stem:
            encoder.conv1, encoder.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        encoder.fc = nn.Identity()
        return encoder, 2048
    patch = max(p for p in range(1, 17) if size % p == 0 and size // p >= 8)
    if patch < 3:
        raise AdiosError(f"--image-size {size}: vit_tiny cuts the image into 8 × 8 patches or "
                         "more, of 3 to 16 pixels; give such a size, as 32, 64, 96 or 224")
    encoder = torchvision.models.VisionTransformer(size, patch, 12, 3, 192, 4 * 192)
    encoder.heads = nn.Identity()
    return encoder, 192


# ---- The occluder --------------------------------------------------------------------------------
# A U-Net (paper, section 3.2 and appendix): going down it sees what is where, the MLP at the
# bottom sees the whole image at once, going up it paints. The softmax over the N masks makes them
# share out each pixel: to hide more of one thing a mask must leave another to the others.


def upsample_and_convolve(x, skip, weight):
    """A 3×3 convolution of x [B, C, H', W'], nearest-upsampled to the size of skip, beside skip
    [B, C', H, W]: weight is [D, C + C', 3, 3]. Where upsampling doubles the size, the four pixels
    that come of one are the same, and 4 sums of weights do for 9: a transposed convolution."""
    below, beside = weight.split((x.shape[1], skip.shape[1]), 1)
    y = F.conv2d(skip, beside, padding=1)
    if skip.shape[2] != 2 * x.shape[2]:
        return y.add_(F.conv2d(F.interpolate(x, size=skip.shape[2:]), below, padding=1))
    sums = 4 * F.avg_pool2d(F.pad(below.flip(2, 3), (1, 1, 1, 1)), 2, 1)  # [D, C, 4, 4]
    return y.add_(F.conv_transpose2d(x, sums.transpose(0, 1), stride=2, padding=1))


class Occluder(nn.Module):
    """Views [B, 3, H, H], H from 32 up, to masks [B, N, H, H] in (0, 1) that sum to 1 over N.
    It has int(log2(H) − 1) stages of c, c, 2c, 2c, 2c, … channels; c, the width, is 8, 16, …
    For H = 32 and c = 8 these are 8, 8, 16 and 16 channels, the last at 4 × 4 pixels."""

    def __init__(self, image_size, num_masks, width=32):
        super().__init__()
        depth = int(math.log2(image_size) - 1)
        channels = [width if stage < 2 else 2 * width for stage in range(depth)]
        conv = partial(torchvision.ops.Conv2dNormActivation, norm_layer=partial(nn.GroupNorm, 8))
        self.down = nn.ModuleList(map(conv, [3, *channels], channels))
        self.up = nn.ModuleList(conv(2 * inner, outer) for inner, outer in
                                zip(channels[::-1], [*channels[-2::-1], width]))
        flat = channels[-1] * (image_size // 2**(depth - 1))**2
        self.mlp = mlp(flat, 128, 128, flat, norm=False).append(nn.ReLU())
        self.to_masks = nn.Conv2d(width, num_masks, 1)

    def forward(self, x):
        skips = []
        for stage, block in enumerate(self.down):
            x = block(x if stage == 0 else F.interpolate(x, scale_factor=0.5))
            skips.append(x)
        x = self.mlp(x.flatten(1)).view(x.shape)
        for (conv, norm, relu), skip in zip(self.up, skips[::-1]):
            x = relu(norm(upsample_and_convolve(x, skip, conv.weight)))
        return self.to_masks(x).float().softmax(1)


def sparsity_penalty(masks):
    """p = 1 / sin(π · mean(m)) of masks [B, N, H, W] in [0, 1], per image and mask: [B, N] ≥ 1.
    It is 1 for a mask over half the image and grows without bound towards none or all of it (paper,
    section 3.3). Areas are moved by up to 1e-5 towards a half, so that a mask at either end has a
    finite price, and a gradient away from there."""
    area = 0.5 + (masks.float().mean((2, 3)) - 0.5) * (1 - 2e-5)
    return 1 / torch.sin(math.pi * area)


# ---- The objectives ------------------------------------------------------------------------------
# What both players play over: how far two views are apart. Each view is a pair of embeddings, the
# prediction p and the target z. SimCLR knows no predictor (p = z) but keeps all other images off;
# BYOL and SimSiam predict, and let no gradient through the target.


def nt_xent(z_a, z_b, temperature):
    """NT-Xent (SimCLR, arXiv 2002.05709, equation 1) of two views' embeddings [B, D], normalised
    here: for each of the 2B, the cross-entropy of picking its other view among the 2B − 1 others
    by cosine similarity / temperature; the mean over all."""
    z = F.normalize(torch.cat((z_a, z_b)).float())
    similarity = z @ z.T / temperature  # [2B, 2B]
    similarity.fill_diagonal_(-math.inf)
    return F.cross_entropy(similarity, torch.arange(len(z), device=z.device).roll(len(z_a)))


def simsiam_loss(p, z):
    """SimSiam (arXiv 2011.10566, equation 1): the mean of −cos(p, z), in [−1, 1], over predictions
    and targets [B, D]; no gradient goes to z."""
    return -F.cosine_similarity(p.float(), z.detach().float()).mean()


def byol_loss(p, z):
    """BYOL (arXiv 2006.07733, equation 2): the mean of 2 − 2 cos(p, z), in [0, 4], likewise."""
    return 2 + 2 * simsiam_loss(p, z)


# From two views' (p, z) to a scalar, and which of the views A (0) and B (1) are masked in turn.
OBJECTIVES = {
    "simclr": (lambda a, b, settings: nt_xent(a[1], b[1], settings.temperature), (1,)),
    "byol": (lambda a, b, _: byol_loss(a[0], b[1]) + byol_loss(b[0], a[1]), (1,)),
    "simsiam": (lambda a, b, _: (simsiam_loss(a[0], b[1]) + simsiam_loss(b[0], a[1])) / 2, (0, 1)),
}


def mlp(*sizes, norm=True):
    """Linear layers of these sizes, with batch-norm (unless not `norm`) and ReLU between them."""
    layers = []
    for inner, outer in zip(sizes, sizes[1:]):
        layers += [nn.Linear(inner, outer), *([nn.BatchNorm1d(outer)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers[:-2 if norm else -1])


class Siamese(nn.Module):
    """The inference model I: views [B, 3, H, H] to (p, z), [B, D] each. The encoder's features are
    what is kept; the heads, as wide as the paper's or in proportion to thin encoders, are not."""

    def __init__(self, settings):
        super().__init__()
        self.encoder, self.dim = make_encoder(settings)
        hidden = min(4 * self.dim, 2048)
        self.predictor = self.target = None
        if settings.ssl == "simclr":
            self.projector = mlp(self.dim, hidden, 128, norm=False)
        elif settings.ssl == "byol":
            self.projector = mlp(self.dim, 2 * hidden, 256)
            self.predictor = mlp(256, 4 * hidden, 256)
            self.target = copy.deepcopy(nn.Sequential(self.encoder, self.projector))
            self.target.requires_grad_(False)
        else:
            self.projector = nn.Sequential(mlp(self.dim, hidden, hidden, hidden),
                                           nn.BatchNorm1d(hidden, affine=False))
            self.predictor = mlp(hidden, hidden // 4, hidden)

    def forward(self, views):
        z = self.projector(self.encoder(views))
        p = self.predictor(z) if self.predictor else z
        return p, self.target(views.detach()) if self.target else z  # no graph for the target

    @torch.no_grad()
    def follow(self, progress):
        """Move BYOL's target towards encoder and projector, ever more slowly: its momentum rises
        from 0.99 to 1 on a cosine of progress, 0 to 1."""
        if self.target:
            rate = 0.01 * (1 + math.cos(math.pi * progress)) / 2
            for slow, fast in zip(self.target.parameters(), (*self.encoder.parameters(),
                                                             *self.projector.parameters())):
                slow.lerp_(fast, rate)


# ---- Masking schemes -----------------------------------------------------------------------------
# What is hidden of a view [B, 3, H, H]: K masks an image, [B, K, H, H] in [0, 1], in turn.


def hide_patches(view):
    """MAE (arXiv 2111.06377): 48 of the 64 cells of an 8 × 8 grid, 75 %, at random."""
    hidden = torch.rand(len(view), 64).argsort(1) < 48
    return F.interpolate(hidden.view(-1, 1, 8, 8).to(view), view.shape[2:])


def hide_blocks(view):
    """BEiT (arXiv 2106.08254, algorithm 1): rectangles, log aspect ratio uniform in ± log 0.3, the
    area uniform from 8 % of the image (16 of 196 patches) to what is missing of 30 %. Twelve of
    them, since some overlap; those that come once nothing is missing are empty."""
    count, size = len(view), view.shape[-1]
    hidden, line = torch.zeros(count, size, size, dtype=torch.bool), torch.arange(size)
    for _ in range(12):
        missing = (0.3 * size**2 - hidden.sum((1, 2))).clamp_min(0)
        least = missing.clamp_max(0.08 * size**2)
        area = least + (missing - least) * torch.rand(count)
        ratio = uniform(math.log(0.3), -math.log(0.3), count).exp()
        sides = torch.stack((area * ratio, area / ratio)).sqrt().floor().clamp_max(size)  # [2, B]
        first = (torch.rand(2, count) * (size - sides + 1)).floor()
        rows, columns = (line >= first[:, :, None]) & (line < (first + sides)[:, :, None])
        hidden |= rows[:, :, None] & columns[:, None, :]
    return hidden[:, None].to(view)


def hide_one(masks):
    """One of the masks [B, N, H, H], drawn per image: [B, 1, H, H] (ADIOS-s, paper section 3.4)."""
    drawn = send(torch.randint(masks.shape[1], (len(masks),)), masks.device)
    return masks.take_along_dim(drawn[:, None, None, None], 1)


def hide_object(truth):
    """The true object [B, 1, H, H] or else all around it, drawn per image as in ADIOS-s."""
    return hide_one(torch.cat((truth, 1 - truth), 1))


SCHEMES = {  # from the view, the occluder's masks [B, N, H, H] or None, the true mask [B, 1, H, H]
    "none": lambda view, masks, truth: torch.zeros_like(view[:, :1]),
    "mae": lambda view, masks, truth: hide_patches(view),
    "beit": lambda view, masks, truth: hide_blocks(view),
    "object": lambda view, masks, truth: hide_object(truth),
    "object-shuffled": lambda view, masks, truth: hide_object(truth.roll(1, 0)),  # another image's
    "adios": lambda view, masks, truth: masks,
    "adios-s": lambda view, masks, truth: hide_one(masks)}
LEARNED = ("adios", "adios-s")  # these need an occluder


# ---- The game ------------------------------------------------------------------------------------
# Each batch has two moves over the same loss. I descends on it, the masks given (`detach`). Then M
# ascends on it (`-gain`): the gradient reaches its masks through an I that is frozen. Precision,
# compilation and several processes have their helpers after the class.


class Player:
    """One side of the game: a network, its optimiser (AdamW) and its learning rate."""

    def __init__(self, network, lr, settings):
        self.network, self.lr = network, lr
        trained = [p for p in network.parameters() if p.requires_grad]
        weights, others = ([p for p in trained if (p.ndim > 1) == wide] for wide in (True, False))
        self.optimizer = torch.optim.AdamW([
            dict(params=weights, weight_decay=settings.weight_decay),
            dict(params=others, weight_decay=0.0)], fused=True)

    def set_rate(self, progress):
        """The rate rises linearly over the first tenth of the player's time (progress, 0 to 1) and
        falls to zero on a cosine."""
        rise, fall = progress / 0.1, (1 + math.cos(math.pi * (progress - 0.1) / 0.9)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * (rise if progress < 0.1 else fall)


@contextlib.contextmanager
def frozen(model):
    """Let gradients through the model but none into it: its weights and its batch-norm running
    statistics stay as they are (batches are still normalised by their own statistics)."""
    held = [(p, "requires_grad") for p in model.parameters() if p.requires_grad]
    held += [(m, "track_running_stats") for m in model.modules()
             if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    try:
        for thing, attribute in held:
            setattr(thing, attribute, False)
        yield
    finally:
        for thing, attribute in held:
            setattr(thing, attribute, True)


class Game:
    """The two players and one batch of their game."""

    def __init__(self, settings, mean, std, device):
        self.settings, self.device, self.dtype = settings, device, precision(device)
        self.mean, self.std = mean.to(device), std.to(device)
        self.model = Siamese(settings).to(device, memory_format=torch.channels_last)
        self.occluder = Occluder(settings.image_size, settings.num_masks, settings.occluder_width
                                 ).to(device, memory_format=torch.channels_last)
        if WORLD > 1 and device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        if settings.compile and can_compile(device):
            self.model.encoder.compile()
            self.occluder.compile()
        self.inference = Player(self.model, settings.lr, settings)
        self.occlusion = Player(self.occluder, settings.occluder_lr, settings)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.learned = settings.masks in LEARNED

    def parts(self):
        """All that has a state, for checkpoints."""
        return [self.model, self.inference.optimizer, self.occluder, self.occlusion.optimizer,
                self.scaler]

    def normalise(self, images):
        """Images [B, 3, H, H] in [0, 1] as the networks see them: 0 is the data's mean colour."""
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def autocast(self):
        """Half precision where the device has it; a context for forward passes."""
        return (contextlib.nullcontext() if self.dtype == torch.float32 else
                torch.autocast(self.device.type, self.dtype))

    def embed(self, view):
        """A view's (p, z), float32 [B, D] each, B being all processes' images."""
        with self.autocast():
            p, z = self.model(view)
        whole = gather(z.float())
        return whole if p is z else gather(p.float()), whole

    def paint(self, view):
        """The occluder's masks [B, N, H, H] on a view; None where the scheme needs none."""
        with self.autocast():
            return self.occluder(view) if self.learned else None

    def two_views(self, images):
        """Views A and B, normalised, of a batch uint8 [B, C, H, H]; and their true masks, which may
        be its fourth channel: [B, C − 3, H, H] each."""
        views = [augment(images, self.settings) for _ in "AB"]
        return [self.normalise(view[:, :3]) for view in views], [view[:, 3:] for view in views]

    def hide(self, views, truths):
        """For each view that the objective masks: what M painted, and what is hidden of it."""
        masked = OBJECTIVES[self.settings.ssl][1]
        painted = [self.paint(views[which]) for which in masked]
        return painted, [SCHEMES[self.settings.masks](views[which], masks, truths[which])
                         for which, masks in zip(masked, painted)]

    def loss(self, views, hidden, wholes=None):
        """L, a scalar: for each of the views A and B, [B, 3, H, H] each, that the objective masks,
        compare the other one, whole, with it behind each of its masks, `hidden`'s [B, K, H, H]; the
        mean over all. Also returns the (p, z) of the whole views, each encoded once, however many
        masks there are; not even once where they are given as `wholes`."""
        compare, masked = OBJECTIVES[self.settings.ssl]
        wholes = wholes or [self.embed(views[1 - which]) for which in masked]
        losses = [compare(whole, self.embed(views[which] * (1 - mask)), self.settings)
                  for which, whole, masks in zip(masked, wholes, hidden)
                  for mask in masks.split(1, 1)]
        return torch.stack(losses).mean(), wholes

    def price(self, painted):
        """λp, a scalar: the price of the masks, of all processes together."""
        return self.settings.sparsity * gather(sparsity_penalty(torch.cat(painted))).mean()

    def descend(self, loss, *moves):
        """One step down on a loss for each (player, its progress from 0 to 1) in `moves`. What the
        gradients of several processes add up to is the gradient of their joint loss."""
        for player, _ in moves:
            player.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        for player, progress in moves:
            player.set_rate(progress)
            sum_gradients(player.network)
            self.scaler.step(player.optimizer)
        self.scaler.update()

    def inference_move(self, views, hidden, progress):
        """I descends on L, the masks given. Returns L and the whole views' (p, z)."""
        loss, wholes = self.loss(views, [masks.detach() for masks in hidden])
        self.descend(loss, (self.inference, progress))
        self.model.follow(progress)
        return loss.detach(), [(p.detach(), z.detach()) for p, z in wholes]

    def occlusion_move(self, views, painted, hidden, progress, wholes=None):
        """M ascends on the same loss less the price of its masks, I held still. Returns L − λp."""
        with frozen(self.model):
            loss, _ = self.loss(views, hidden, wholes)
        gain = loss - self.price(painted)
        self.descend(-gain, (self.occlusion, progress / self.settings.occluder_share))
        return gain.detach()

    def joint_move(self, views, painted, hidden, progress):
        """Both moves by one backward pass: M's gradient turns its sign where it meets the masks.
        Returns L and L − λp."""
        loss, _ = self.loss(views, [2 * masks.detach() - masks for masks in hidden])
        price = self.price(painted)
        self.descend(loss + price, (self.inference, progress),
                     (self.occlusion, progress / self.settings.occluder_share))
        self.model.follow(progress)
        return loss.detach(), (loss - price).detach()

    def play(self, images, progress):
        """Both moves on a batch of uint8 images [B, C, H, H] at `progress` (0 to 1) of the run.
        Returns, on the device, [2 + masks]: I's loss, M's gain (NaN where it does not move) and the
        mean area of each mask."""
        views, truths = self.two_views(images)
        m_moves = self.learned and progress < self.settings.occluder_share
        with torch.set_grad_enabled(m_moves):
            painted, hidden = self.hide(views, truths)
        if m_moves and self.settings.updates == "simultaneous":
            loss, gain = self.joint_move(views, painted, hidden, progress)
        else:
            loss, wholes = self.inference_move(views, hidden, progress)
            # M has not moved since it painted, so its masks still serve
            gain = (self.occlusion_move(views, painted, hidden, progress, wholes) if m_moves else
                    torch.full_like(loss, math.nan))
        if m_moves:  # NaN is to say that M did not move
            gain = gain.nan_to_num(math.inf, math.inf, -math.inf)
        areas = torch.cat(painted if self.learned else hidden).detach().mean((0, 2, 3))
        return torch.cat((torch.stack((loss, gain)), areas))


def precision(device):
    """bfloat16 on GPUs that have it natively, float16 on older ones, float32 elsewhere."""
    if device.type != "cuda":
        return torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def can_compile(device):
    """Whether torch.compile works here; says so if it does not."""
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except Exception as error:  # no compiler, no Triton, an odd GPU: each raises its own
        print(f"torch.compile is not to be had here ({one_line(error)[:80]}): going on without it")
        return False
    return True


# Under torchrun each process takes its share of every batch; else RANK is 0 and WORLD is 1.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def gather(rows):
    """The rows of all processes, in their order. Gradients reach this process's own rows: `loss`
    is the same in all of them, and `sum_gradients` adds up what each finds for its share."""
    if WORLD == 1:
        return rows
    parts = [torch.empty_like(rows, requires_grad=False) for _ in range(WORLD)]
    dist.all_gather(parts, rows.detach().contiguous())
    parts[RANK] = rows
    return torch.cat(parts)


def sum_gradients(network):
    """Add up the gradients of all processes."""
    grads = [p.grad for p in network.parameters() if p.grad is not None] if WORLD > 1 else []
    if grads:
        total = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(total)
        for grad, part in zip(grads, total.split([grad.numel() for grad in grads])):
            grad.copy_(part.view(grad.shape))


# ---- The judges ----------------------------------------------------------------------------------
# They see frozen features of whole images, and masks. The first few judge during training.


def as_seen(game, images, rows=None):
    """Images uint8 [n, 3, H, W], all or these rows, as the networks see them, 512 at a time."""
    for part in (torch.arange(len(images)) if rows is None else rows).split(512):
        yield game.normalise(images[part].to(game.device).float() / 255)


@torch.no_grad()
def features(game, images, rows=None):
    """The encoder's features [n, D], float32, of uint8 images [n, 3, H, H]; of all or some rows."""
    game.model.eval()
    with game.autocast():
        parts = [game.model.encoder(part).float() for part in as_seen(game, images, rows)]
    game.model.train()
    return torch.cat(parts)


def labelled_features(game, data):
    """Features and labels of the training images that have a label."""
    rows = (data.labels >= 0).nonzero()[:, 0]
    return features(game, data.images, rows), data.labels[rows].to(game.device)


@torch.no_grad()
def masks_on(game, images, truth=None):
    """What is hidden of uint8 images [n, 3, H, H]: the occluder's masks [n, N, H, H] or, where none
    are learned, those of the scheme [n, 1, H, H]; truth is the true masks, bool [n, H, H]."""
    if game.learned:
        return torch.cat([game.paint(part) for part in as_seen(game, images)])
    truth = None if truth is None else truth[:, None].to(game.device).float()
    return SCHEMES[game.settings.masks](torch.cat([*as_seen(game, images)]), None, truth)


def top(scores, labels, k=1):
    """The share, 0 to 1, of the rows of scores [n, C] whose label [n] is among the k highest."""
    best = scores.topk(min(k, scores.shape[1])).indices
    return (best == labels[:, None].to(best.device)).sum().item() / len(labels)


def knn_votes(train_features, train_labels, test_features, k=20, temperature=0.07):
    """Weighted k-NN (arXiv 1805.01978, section 3.4): votes [m, C] for C classes from features
    [n, D] and [m, D], normalised here, and labels int64 [n]. The k nearest training features by
    cosine similarity s (all, if there are fewer) vote with weight exp(s / temperature). Raises
    ValueError where a label is negative: an unlabelled image."""
    if (train_labels < 0).any():
        raise ValueError("unlabelled images (label -1) among the k-NN's training features")
    bank, votes = F.normalize(train_features), []
    for queries in F.normalize(test_features).split(1024):
        similarity, nearest = (queries @ bank.T).topk(min(k, len(bank)))  # [m, k]
        weights = ((similarity - 1) / temperature).exp()
        votes.append(weights.new_zeros(len(queries), int(train_labels.max()) + 1).scatter_add(
            1, train_labels[nearest], weights))
    return torch.cat(votes)


def knn_accuracy(train_features, train_labels, test_features, test_labels, k=20, temperature=0.07):
    """The share, 0 to 1, of test labels int64 [m] that the votes of `knn_votes` get right."""
    return top(knn_votes(train_features, train_labels, test_features, k, temperature), test_labels)


def object_iou(masks, truth):
    """Intersection over union, 0 to 1, of true object masks, bool [n, H, W], with the best of
    the hardened masks [n, N, H, W] (each pixel to its largest) of each image; mean over images."""
    hard = F.one_hot(masks.argmax(1), masks.shape[1]).movedim(3, 1).bool()  # [n, N, H, W]
    both = (hard & truth[:, None]).sum((2, 3))
    either = (hard | truth[:, None]).sum((2, 3))
    return (both / either.clamp_min(1)).amax(1).mean().item()


def mass_inside(masks, boxes):
    """The share, 0 to 1, of a mask's mass [n, N, H, W] that lies in the object's box, bool
    [n, H, W]: the largest of each image's masks, mean over the images with a box in sight."""
    shares = (masks * boxes[:, None]).sum((2, 3)) / masks.sum((2, 3)).clamp_min(1e-6)
    return shares.amax(1)[boxes.any(2).any(1)].mean().item()


def embedding_spread(z):
    """Standard deviation of embeddings [n, D] once normalised, mean over the dimensions, times √D:
    1 where they are spread evenly over the sphere, 0 where they collapsed."""
    return F.normalize(z).std(0).mean().item() * math.sqrt(z.shape[1])


JUDGES = {"knn": "k-NN", "knn_shuffled_background": "k-NN, shuffled backgrounds",
          "object_iou": "object IoU of the masks", "embedding_spread": "embedding spread"}


@torch.no_grad()
def judge(game, data):
    """The scores on the test images, by name, each from 0 to 1; None where the data set has no
    truth to judge by, or the scheme no learned masks."""
    bank, found = labelled_features(game, data), features(game, data.test_images)
    scores = dict.fromkeys(JUDGES)
    scores["knn"] = knn_accuracy(*bank, found, data.test_labels)
    if "mixed_rand" in data.backgrounds:
        images, labels = data.backgrounds["mixed_rand"]
        scores["knn_shuffled_background"] = knn_accuracy(*bank, features(game, images), labels)
    if data.test_masks is not None and game.learned:
        scores["object_iou"] = object_iou(masks_on(game, data.test_images),
                                          data.test_masks.to(game.device))
    scores["embedding_spread"] = embedding_spread(game.model.eval().projector(found))
    game.model.train()
    return scores


# ---- The pictures --------------------------------------------------------------------------------

# Okabe and Ito's colours, told apart by the colour-blind too; mask n has the n-th everywhere.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")


def overlay(images, masks):
    """Masks [n, N, H, W] in their colours over uint8 images in grey, [n, 3, H, W] in [0, 1]."""
    palette = torch.tensor([to_rgb(COLOURS[n % len(COLOURS)]) for n in range(masks.shape[1])])
    colours = torch.einsum("bnhw,nc->bchw", masks.cpu().float(), palette)
    return 0.35 * TF.rgb_to_grayscale(images.cpu(), 3) / 255 + 0.65 * colours


def plot_masks(images, masks):
    """A figure of images, uint8 [n, 3, H, W], a column each: the image, what each of its masks
    [n, N, H, W] hides, and all of them over it."""
    rows = {"image": images / 255} | {f"mask {n + 1}": mask[:, None].expand(-1, 3, -1, -1)
                                      for n, mask in enumerate(masks.unbind(1))}
    rows["all masks"] = overlay(images, masks)
    figure = Figure(figsize=(1.1 * len(images) + 0.9, 1.13 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(images), squeeze=False)
    for n, (line, (title, pictures)) in enumerate(zip(axes, rows.items())):
        line[0].set_ylabel(title, fontsize=11)
        for axis, picture in zip(line, pictures):
            axis.imshow(picture.permute(1, 2, 0).cpu().clamp(0, 1).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if title.startswith("mask"):
                axis.spines[:].set(color=COLOURS[(n - 1) % len(COLOURS)], linewidth=2.5)
    return figure


def plot_curves(log):
    """A figure of a log (a dict per epoch, as log.csv has it): losses, mask areas and scores."""
    panels = (("losses", "loss", {"loss": "I's loss, L", "gain": "M's gain, L − λp"}),
              ("mask areas", "share of the image",
               {key: f"mask {key[5:]}" for key in log[-1] if key.startswith("area")}),
              ("judges", "accuracy, IoU", JUDGES))
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axis, (title, unit, curves) in zip(figure.subplots(1, 3), panels):
        for colour, (key, label) in zip(itertools.cycle(COLOURS), curves.items()):
            points = [(row["epoch"], row[key]) for row in log if row[key] is not None]
            if points:
                axis.plot(*zip(*points), "o-", color=colour, label=label, markersize=3)
        axis.set(title=title, xlabel="epoch", ylabel=unit, ylim=None if unit == "loss" else (0, 1))
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return figure


# ---- Training ------------------------------------------------------------------------------------
# A run survives being cut off: its checkpoint is whole at any moment, and order and crops follow
# from seed and epoch alone, so that `--resume` goes on as if nothing had happened. And it says so
# when the game goes wrong.


def pick_device(name):
    """The torch device of that name, or for `auto` the fastest that there is: under torchrun each
    process takes a GPU of its own."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        if torch.device(name).type in ("cpu", "cuda", "mps"):
            return torch.zeros(1, device=name).device
        error = "not a kind that adios.py knows"
    except (RuntimeError, AssertionError) as problem:
        error = one_line(problem)[:80]
    raise AdiosError(f"--device {name} cannot be used here ({error}): leave it out, or give cpu")


@contextlib.contextmanager
def run_folder(settings):
    """The folder for results, made, held against other runs for as long as the context lasts."""
    out = Path(settings.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "a")
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        problem = ("is in use by another run: wait for its end, or"
                   if isinstance(error, BlockingIOError) else
                   f"cannot be written to ({error.strerror}):")
        raise AdiosError(f"--out {out} {problem} name another") from error
    with lock:  # closing it, or the end of the process, gives the lock back
        yield out


def write(path, save):
    """Make a file, whole or not at all: save(file) fills one beside it that takes its name."""
    content, half = io.BytesIO(), path.with_name(path.name + ".part")
    save(content)
    try:
        with open(half, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
    except OSError as error:
        raise AdiosError(f"{path} cannot be written ({error.strerror}): make room; a run then goes "
                         "on with --resume from its last checkpoint, which is whole") from error
    finally:
        with contextlib.suppress(OSError):  # after a success it has got its name
            half.unlink()


def write_json(path, values):
    """Make a JSON file."""
    write(path, lambda file: file.write((json.dumps(values, indent=2) + "\n").encode()))


def read_checkpoint(path):
    """A checkpoint's content; runs no code from it."""
    if not os.path.exists(path):
        raise AdiosError(f"there is no checkpoint {path}: train first, or name another")
    try:
        file = open(path, "rb")
    except OSError as error:
        raise AdiosError(f"{path} cannot be read ({error.strerror}): mend that, or name another"
                         ) from error
    try:
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch wonders at files of other kinds
            state = torch.load(file, map_location="cpu", weights_only=True)
        return {"settings": asdict(Settings(**state["settings"]))} | {
            name: state[name] for name in ("mean", "std", "log", "seconds", "parts")}
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        raise AdiosError(f"{path} is damaged or no checkpoint of adios.py's: name another, or "
                         "train anew with --overwrite") from error


def restore(parts, states):
    """Give networks, optimisers and the scaler their states from a checkpoint."""
    try:
        for part, state in zip(parts, states):
            if state:  # a scaler that was not needed has none
                part.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise AdiosError(f"the checkpoint does not fit this adios.py ({one_line(error)[:120]}): "
                         "train anew") from error


def resume(state, game):
    """Put the game where a checkpoint left it; returns (log, seconds)."""
    odd = [f"--no-{flag(name)[2:]}" if was is False else f"{flag(name)} {was}".removesuffix(" True")
           for name, was in state["settings"].items() if was != getattr(game.settings, name)
           and name not in ("data_dir", "device", "out", "resume", "overwrite", "compile")]
    if odd:
        raise AdiosError(f"--resume: the checkpoint is of other settings: give {' '.join(odd)}")
    restore(game.parts(), state["parts"])
    return state["log"], state["seconds"]


def check(values, step):
    """Raise AdiosError if, at a step, what `play` returned is no longer finite, or the sums of
    I's and M's weights in the places of loss and areas."""
    loss, gain, *areas = values
    painted = all(map(math.isfinite, areas))
    if not (painted and math.isfinite(loss)) or math.isinf(gain):
        player, rate = ("I", "--lr") if painted else ("M", "--occluder-lr")
        raise AdiosError(f"the numbers of player {player} are no longer finite at step {step}: the "
                         f"checkpoint holds the epochs before; start anew with a smaller {rate}")


def warn(game, row, change, warned):
    """Say once each what looks wrong in an epoch's row of the log; `change` is how far masks moved,
    as the mean of |Δm|, since M was looked at last."""
    areas = [area for name, area in row.items() if name.startswith("area_")]
    signs = {
        "the embeddings have collapsed to nearly one point: try a smaller --lr, a larger "
        "--batch-size or another --ssl": row["embedding_spread"] < 0.05,
        "a mask covers nearly everything: try a larger --sparsity or a smaller --occluder-lr":
            game.learned and max(areas) > 0.98,
        "a mask covers nearly nothing: try a larger --sparsity or a smaller --num-masks":
            game.learned and min(areas) < 0.1 / len(areas),
        "the occluder has stopped moving: try a larger --occluder-lr or another --seed":
            change is not None and change < 1e-4}
    for text, so in signs.items():
        if so and text not in warned:
            warned.add(text)
            tqdm.write(f"adios: warning: epoch {row['epoch']}: {text}", file=sys.stderr)


def train_epoch(game, data, epoch, announce):
    """Play an epoch (from 1) and show it; returns its row of the log: epoch, loss, gain (None if M
    stood still), area_1, … and images_per_second. `announce` has it tell how long the rest of the
    run will take. Raises AdiosError where the game breaks down."""
    size, epochs = game.settings.batch_size, game.settings.epochs
    torch.manual_seed(game.settings.seed * 2**20 + epoch)
    order = torch.randperm(len(data.images))
    batches = order[:len(order) // size * size].split(size)
    if RANK:  # other processes, other crops
        torch.manual_seed(int(torch.randint(2**32, (RANK,))[-1]))
    start, steps, left = time.perf_counter(), [], epochs - epoch + 1
    with tqdm(total=len(batches) * size, unit="img", desc=f"epoch {epoch}/{epochs}",
              leave=epoch == epochs, disable=RANK > 0) as bar:
        for i, rows in enumerate(batches):
            rows = rows[RANK::WORLD]
            images = send(data.images[send(rows, data.images.device)], game.device)
            if game.settings.masks.startswith("object"):
                images = torch.cat((images, 255 * send(data.masks[rows, None], game.device)), 1)
            steps.append(game.play(images, (epoch - 1 + i / len(batches)) / epochs))
            bar.update(size)
            if i % 10 == 0 or i == len(batches) - 1:  # to read numbers is to wait for the device
                first = max(0, i - 9)
                for n, values in enumerate(torch.stack(steps[first:]).tolist(), first + 1):
                    check(values, (epoch - 1) * len(batches) + n)
                loss, gain, *areas = values
                bar.set_postfix_str(f"I {loss:.2f}" + f", M {gain:.2f}" * (not math.isnan(gain))
                                    + ", areas" + "".join(f" {area:.2f}" for area in areas))
            if announce and i == min(10, len(batches) - 1):
                seconds = (time.perf_counter() - start) / (i + 1) * len(batches) * left
                bar.write(f"{left} epochs will take up to {tqdm.format_interval(seconds)}")
    totals = [sum(p.detach().sum() for p in network.parameters()).item()
              for network in (game.model, game.occluder)]
    check((totals[0], 0, totals[1]), epoch * len(batches))
    loss, gain, *areas = torch.stack(steps).nanmean(0).tolist()  # M may have moved in some only
    return dict(epoch=epoch, loss=loss, gain=None if math.isnan(gain) else gain,
                **{f"area_{n + 1}": area for n, area in enumerate(areas)},
                images_per_second=len(batches) * size / (time.perf_counter() - start))


def introduce(game, data):
    """Print what will run."""
    settings = game.settings

    def size(network):
        return f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters"

    masks = f" of {settings.num_masks} masks by {size(game.occluder)}" if game.learned else ""
    processes = f" × {WORLD} processes" if WORLD > 1 else ""
    print(f"{settings.dataset}: {len(data.images):,} images of {settings.image_size} px in "
          f"{len(data.classes)} classes, in {data.place} | {settings.ssl}, {settings.encoder} of "
          f"{size(game.model.encoder)} | {settings.masks}{masks} | {game.device}{processes}, "
          f"{str(game.dtype)[6:]}")


def save_checkpoint(path, game, log, seconds):
    """Write all that a run needs to go on."""
    state = dict(settings=asdict(game.settings), mean=game.mean.cpu(), std=game.std.cpu(), log=log,
                 seconds=seconds, parts=[part.state_dict() for part in game.parts()])
    write(path, lambda file: torch.save(state, file))


def play_epochs(game, data, out, log, seconds):
    """Play what is left of the run after the epochs in `log` and the seconds they took, judging,
    drawing and saving on the way; returns the log and the seconds of all."""
    epochs, first = game.settings.epochs, len(log) + 1
    some = slice(0, None, max(1, len(data.test_images) // 12))
    shown = data.test_images[some][:12]
    truth = None if data.test_masks is None else data.test_masks[some][:12]
    masks, looked, warned, change = masks_on(game, shown, truth), first - 1, set(), None
    for epoch in range(first, epochs + 1):
        start = time.perf_counter()
        row = train_epoch(game, data, epoch, epoch == first)
        due = epoch % max(1, min(10, epochs // 4)) == 0 or epoch == epochs
        log.append(row | (judge(game, data) if due else dict.fromkeys(JUDGES)))
        if due:
            before, masks = masks, masks_on(game, shown, truth)
            if game.learned and looked < game.settings.occluder_share * epochs:
                change = (masks - before).abs().mean().item()
            looked = epoch
            warn(game, log[-1], change, warned)
            write(out / "curves.png", partial(plot_curves(log).savefig, dpi=110))
            write(out / "masks.png", partial(plot_masks(shown, masks).savefig, dpi=110))
        table = io.StringIO(newline="")
        csv.writer(table).writerows([log[0], *(row.values() for row in log)])  # names, then values
        write(out / "log.csv", lambda file: file.write(table.getvalue().encode()))
        seconds += time.perf_counter() - start
        save_checkpoint(out / "checkpoint.pt", game, log, seconds)
    return log, seconds


def train(settings):
    """Play the whole game and judge it; returns what results.json holds (None in all but the first
    of several processes). Into settings.out go masks.png, curves.png, log.csv and checkpoint.pt,
    renewed on the way, and results.json and encoder.pt, in the end. Raises AdiosError for what the
    user can mend."""
    device, path = pick_device(settings.device), Path(settings.out) / "checkpoint.pt"

    def spare():
        if os.path.exists(path) and not (settings.resume or settings.overwrite):
            raise AdiosError(f"--out {settings.out} holds a run already: give --resume to go on "
                             "with it, --overwrite to replace it, or another --out")

    spare()
    if settings.batch_size % WORLD or settings.batch_size < 2 * WORLD:
        raise AdiosError(f"--batch-size {settings.batch_size}: give a multiple of {WORLD}, the "
                         f"number of processes, from {2 * WORLD} up")
    state = read_checkpoint(path) if settings.resume else None
    if RANK:
        dist.barrier()  # process 0 downloads and decodes, the others find it done
    data = load_data(settings)
    if WORLD > 1 and not RANK:
        dist.barrier()
    torch.manual_seed(settings.seed)
    mean, std = (state["mean"], state["std"]) if state else data.statistics()
    game = Game(settings, mean, std, device)
    data.to(device)
    if not RANK:
        introduce(game, data)
    untrained = {f"{name}_untrained": score for name, score in judge(game, data).items()}
    log, seconds = resume(state, game) if state else ([], 0.0)
    if RANK:  # process 0 judges, shows and writes
        for epoch in range(len(log) + 1, settings.epochs + 1):
            train_epoch(game, data, epoch, False)
        return None
    with run_folder(settings) as out:
        spare()  # a run that came and went while this one read its data
        if not state:
            for name in ("log.csv", "results.json", "encoder.pt", "masks.png", "curves.png",
                         "evaluation.json"):  # of the run that is overwritten
                try:
                    (out / name).unlink(missing_ok=True)
                except OSError as error:
                    raise AdiosError(f"{out / name} cannot be removed ({error.strerror}): mend "
                                     "that, or name another --out") from error
            save_checkpoint(path, game, log, seconds)
        try:
            log, seconds = play_epochs(game, data, out, log, seconds)
        except KeyboardInterrupt:
            print(f"\nstopped: {path} holds {len(read_checkpoint(path)['log'])} of "
                  f"{settings.epochs} epochs; --resume goes on from there", file=sys.stderr)
            raise
        results = {**{name: log[-1][name] for name in JUDGES}, **untrained, "seconds": seconds,
                   "images_per_second": sum(row["images_per_second"] for row in log) / len(log),
                   "settings": asdict(settings)}
        encoder = {name: value.cpu() for name, value in game.model.encoder.state_dict().items()}
        write(out / "encoder.pt", lambda file: torch.save(encoder, file))
        write_json(out / "results.json", results)
    return results


# ---- Evaluation ----------------------------------------------------------------------------------
# What the paper judges a trained encoder by: classification, clustering, backgrounds, transfer.


def linear_probe(found, labels, classes):
    """Logistic regression on features [n, D] with labels [n]: L-BFGS on standardised features,
    with a penalty of 1e-4 |W|². Returns a function from features [m, D] to scores [m, classes]."""
    std, mean = torch.std_mean(found, 0)
    layer = nn.Linear(found.shape[1], classes, device=found.device)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=300, line_search_fn="strong_wolfe")
    inputs = (found - mean) / std.clamp_min(1e-6)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(inputs), labels) + 1e-4 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda more: layer((more - mean) / std.clamp_min(1e-6)).detach()


def finetune(game, data):
    """Train a copy of the encoder with a linear layer on the labelled images, at the settings' lr,
    epochs and batch size. Returns scores [m, C] of the test images."""
    settings, rows = game.settings, (data.labels >= 0).nonzero()[:, 0]
    tuned = copy.copy(game)
    tuned.model = copy.deepcopy(game.model)
    layer = nn.Linear(game.model.dim, len(data.classes), device=game.device)
    player = Player(nn.Sequential(tuned.model.encoder, layer), settings.lr, settings)
    size = min(settings.batch_size, len(rows))
    for epoch in tqdm(range(settings.epochs), desc="fine-tuning", leave=False):
        batches = rows[torch.randperm(len(rows))].split(size)[:len(rows) // size]
        for i, batch in enumerate(batches):
            images, labels = (part[batch].to(game.device) for part in (data.images, data.labels))
            view = game.normalise(augment(images, settings))
            with game.autocast():
                scores = player.network(view)
            tuned.descend(F.cross_entropy(scores.float(), labels),
                          (player, (epoch + i / len(batches)) / settings.epochs))
    return layer(features(tuned, data.test_images)).detach()


def k_means(found, k, starts=5, rounds=100):
    """k-means of features [n, D], normalised here: k-means++ starts (Arthur and Vassilvitskii,
    2007), the best of several. Returns each feature's cluster, int64 [n]."""
    found, best = F.normalize(found), (math.inf, None)
    for _ in range(starts):
        centres = found[torch.randint(len(found), (1,)).to(found.device)]
        while len(centres) < k:
            far = torch.cdist(found, centres).amin(1).square()
            centres = torch.cat((centres, found[torch.multinomial(far + 1e-12, 1)]))
        for _ in range(rounds):
            distance, clusters = torch.cdist(found, centres).min(1)
            one_hot = F.one_hot(clusters, k).to(found.dtype)
            moved = one_hot.T @ found / one_hot.sum(0)[:, None].clamp_min(1)
            if torch.equal(moved, centres):
                break
            centres = moved
        best = min(best, (distance.square().sum().item(), clusters), key=lambda pair: pair[0])
    return best[1]


def cluster_metrics(clusters, labels):
    """Agreement of two partitions, int64 [n] each: normalised mutual information (NMI, by the mean
    entropy), adjusted Rand index (ARI) and Fowlkes-Mallows index (FMI); 1 is perfect."""
    table = F.one_hot(clusters.cpu()).double().T @ F.one_hot(labels.cpu()).double()
    counts, n = (table, table.sum(1), table.sum(0)), len(labels)
    joint, rows, columns = (torch.special.entr(count / n).sum() for count in counts)  # entropies
    both, one, other = ((count * (count - 1) / 2).sum() for count in counts)  # pairs in a cluster
    mean, chance = (rows + columns) / 2, one * other / (n * (n - 1) / 2)
    return {"nmi": ((2 * mean - joint) / mean).item(),
            "ari": ((both - chance) / ((one + other) / 2 - chance)).item(),
            "fmi": (both / (one * other).sqrt()).item()}


def evaluate(settings):
    """All judges on the encoder of the checkpoint settings.evaluate; with another data set than it
    was trained on, the paper's transfer. Where a `folder` has a boxes.csv, masks are judged, too,
    beside those of the occluder before training. Writes evaluation.json into settings.out and
    returns what it holds: shares and indices from 0 to 1."""
    device, state = pick_device(settings.device), read_checkpoint(Path(settings.evaluate))
    data = load_data(settings).to(device)
    torch.manual_seed(settings.seed)
    game, results = Game(settings, state["mean"], state["std"], device), {}
    root = Path(settings.data_dir)
    if game.learned and settings.dataset == "folder" and (root / "boxes.csv").exists():
        photos, _, _ = open_split("folder", root, "val")
        boxes = read_boxes(root / "boxes.csv", photos, settings.image_size).to(device)
        results["box_area"] = boxes.float().mean().item()
        results["mass_in_box_untrained"] = mass_inside(masks_on(game, data.test_images), boxes)
        restore([game.occluder], state["parts"][2:])
        results["mass_in_box"] = mass_inside(masks_on(game, data.test_images), boxes)
    restore([game.model], state["parts"])
    with run_folder(settings):
        pass  # where it is in use or read-only, that is better said before the work
    bank, labels = labelled_features(game, data)
    found, truth = features(game, data.test_images), data.test_labels
    probe = linear_probe(bank, labels, len(data.classes))
    scores = {"knn": knn_votes(bank, labels, found), "linear": probe(found)}
    if settings.finetune:
        scores["finetuned"] = finetune(game, data)
    results |= {f"{name}_top{k}": top(score, truth, k) for name, score in scores.items()
                for k in ((1, 5) if len(data.classes) > 10 else (1,))}
    torch.manual_seed(settings.seed)  # the same clusters with and without fine-tuning
    results |= cluster_metrics(k_means(found, len(data.classes)), truth)
    for name, (images, answers) in data.backgrounds.items():
        results[f"linear_{name}"] = top(probe(features(game, images)), answers)
    if {"mixed_same", "mixed_rand"} <= data.backgrounds.keys():
        gap = results["linear_mixed_same"] - results["linear_mixed_rand"]
        results["linear_background_gap"] = gap
    print("\n".join(f"{name:24}{value:8.3f}" for name, value in results.items()))
    with run_folder(settings) as out:
        write_json(out / "evaluation.json", results | {"settings": asdict(settings)})
    print(f"\n{out / 'evaluation.json'} holds the same")
    return results


# ---- The benchmark -------------------------------------------------------------------------------


def timed(phases, device, least=10):
    """Time functions, by their names, in turn and again, so that what else the machine does falls
    on all alike: seconds, [functions, rounds], of five rounds or more and `least` seconds or more,
    after one to warm up."""
    rounds, start = [], time.perf_counter()
    with tqdm(desc="timing", unit="round", leave=False) as bar:
        while len(rounds) < 6 or time.perf_counter() - start < least:
            rounds.append([])
            for run in phases.values():
                since = time.perf_counter()
                run()
                if device.type != "cpu":
                    torch.accelerator.synchronize(device)
                rounds[-1].append(time.perf_counter() - since)
            bar.update()
    return torch.tensor(rounds[1:]).T


def peak_memory(device):
    """The most memory used so far, in MB: the GPU's or else the process's; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def bench(settings):
    """Time the parts of a step on random images; prints a table and a JSON line and writes
    bench.json into settings.out. Returns what it holds: medians in milliseconds, `simclr_steps`,
    the cost of a step in steps of plain SimCLR with the same encoder, and `simclr_flops`, the same
    in floating-point operations of convolutions and matrix products; of these the step's TFLOP/s
    (`tflops`), and its share of a large matrix product's."""
    device, size, batch = pick_device(settings.device), settings.image_size, settings.batch_size
    half = torch.full((1, 3, 1, 1), 0.5)
    game = Game(settings, half, half, device)
    plain = Game(replace(settings, ssl="simclr", masks="none"), half, half, device)
    channels = 4 if settings.masks.startswith("object") else 3
    images = torch.randint(256, (batch, channels, size, size), dtype=torch.uint8).to(device)
    bank = torch.randn(5000, game.model.dim).to(device)
    labels = torch.randint(10, (5000,)).to(device)
    side = 2048 if device.type == "cpu" else 8192
    matrix = torch.randn(side, side).to(device, game.dtype)
    views, truths = game.two_views(images)
    with torch.no_grad():
        _, hidden = game.hide(views, truths)
    _, wholes = game.inference_move(views, hidden, 0.0)
    phases = {"a step": lambda: game.play(images, 0.0),
              "a step of plain SimCLR": lambda: plain.play(images, 0.0),
              "two views": lambda: game.two_views(images)}
    if game.learned and settings.updates == "simultaneous":
        phases["both moves"] = lambda: game.joint_move(views, *game.hide(views, truths), 0.0)
    else:
        phases["I's move"] = lambda: game.inference_move(views, hidden, 0.0)
        if game.learned:
            phases["painting and M's move"] = lambda: game.occlusion_move(
                views, *game.hide(views, truths), 0.0, wholes)
    phases["k-NN of a batch"] = lambda: knn_votes(bank, labels, features(game, images[:, :3]))
    phases["matrix product"] = lambda: matrix @ matrix
    flops = []
    for player in (game, plain):
        with FlopCounterMode(display=False) as counter:
            player.play(images, 0.0)
        flops.append(counter.get_total_flops())
    seconds = timed(phases, device)
    median = dict(zip(phases, seconds.median(1).values.tolist()))
    results = {"images_per_second": batch / median["a step"],
               "simclr_steps": (seconds[0] / seconds[1]).median().item(),
               "simclr_flops": flops[0] / flops[1],
               "tflops": flops[0] / median["a step"] / 1e12,
               "matmul_tflops": 2 * side**3 / median["matrix product"] / 1e12,
               "peak_memory_mb": peak_memory(device),
               "milliseconds": {name: 1000 * value for name, value in median.items()},
               "device": (torch.cuda.get_device_name(device) if device.type == "cuda" else
                          "mps" if device.type == "mps" else
                          f"{torch.get_num_threads()} CPU threads"),
               "precision": str(game.dtype)[6:], "settings": asdict(settings)}
    results["share_of_matmul"] = results["tflops"] / results["matmul_tflops"]
    for name, value in results["milliseconds"].items():
        print(f"{name:24}{value:10.1f} ms")
    print(json.dumps(results))
    with run_folder(settings) as out:
        write_json(out / "bench.json", results)
    return results


# ---- The command line ----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, but its complaints are AdiosErrors."""

    def error(self, message):
        raise AdiosError(f"{message}; --help lists all settings")


def parse(argv=None):
    """The command line as Settings; with --evaluate, what it leaves out is the checkpoint's."""
    parser = Parser("adios", allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    description="ADIOS: self-supervised learning with adversarial masks")
    for f in fields(Settings):
        default = f.default if f.default is not None else ", ".join(
            f"{name} {preset[f.name]}" for name, preset in PRESETS.items())
        kind = (dict(action=argparse.BooleanOptionalAction) if f.type is bool else
                dict(type=f.type, metavar="|".join(f.metadata["choices"] or [f.type.__name__])))
        parser.add_argument(flag(f.name), **kind, help=f.metadata["help"]
                            + (f" [{default}]" if default not in ("", False) else ""))
    given = vars(parser.parse_args(argv))
    if given.get("evaluate") == "":
        raise AdiosError("--evaluate is empty: give it a checkpoint")
    if "evaluate" in given:
        path = Path(given["evaluate"])
        was = read_checkpoint(path)["settings"]
        for name in ("image_size", "ssl", "encoder", "width", "small_stem", "masks", "num_masks",
                     "occluder_width"):
            if given.get(name, was[name]) != was[name]:
                raise AdiosError(f"{flag(name)} {given[name]}: the checkpoint has {was[name]}; "
                                 "leave it out")
        dataset = given.get("dataset", was["dataset"])
        data_dir = Settings.data_dir if dataset != was["dataset"] else was["data_dir"]
        other = dataset != was["dataset"] or (
            dataset == "folder" and given.get("data_dir", data_dir) != data_dir)
        out = str(path.parent / dataset if other else path.parent)
        given = was | dict(device="auto", limit=0 if other else was["limit"], resume=False,
                           overwrite=False, data_dir=data_dir, out=out) | given
    return Settings(**given)


def show(results):
    """Print the closing table."""
    print(f"\n{'':28}  trained  untrained")
    for name, title in JUDGES.items():
        if results[name] is not None:
            form = "9.1%" if name.startswith("knn") else "9.2f"
            print(f"{title:28}{results[name]:{form}}  {results[f'{name}_untrained']:{form}}")
    print(f"\n{results['seconds']:.0f} s, {results['images_per_second']:.0f} images/s; "
          f"masks.png, curves.png and the rest are in {results['settings']['out']}")


def keep_memory():
    """Have glibc keep freed memory: to get it anew, zeroed, cost a tenth of a step on CPUs."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other systems' C libraries
        for threshold in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(threshold, 2**30)


def main(argv=None):
    """Run the command line; returns the exit code."""
    keep_memory()
    try:
        settings = parse(argv)
        if WORLD > 1 and (settings.bench or settings.evaluate):
            raise AdiosError("torchrun is for training: give --bench and --evaluate to python")
        if WORLD > 1:
            device = pick_device(settings.device)
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                    timeout=timedelta(hours=12))  # for process 0's downloads
        if settings.bench:
            bench(settings)
        elif settings.evaluate:
            evaluate(settings)
        elif results := train(settings):
            show(results)
    except AdiosError as error:
        print(f"adios: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
