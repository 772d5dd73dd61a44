"""The toy world of Co-GRPO: digits as tokens, and a judge whose reward leaves room to rise.

    data      real MNIST from --data DIR, ./data or torchvision's download; else digits that Pillow draws
    codebook  28x28 pixels = 49 patches of 4x4; k-means turns each patch into one of K tokens (a VQ tokenizer)
    judges    small convolutional nets with ELEVEN classes: ten digits and "not a digit". The negatives are splices,
              real digits with some patches taken from another digit of the same class: every token plausible, the
              strokes do not join. That is what few-step parallel decoding gets wrong, and no model sample is needed.
    reward    log p(c | image) of the reward judge, which saw one half of the training set. The held-out judge saw the
              other half and is used for measuring only. Both see digits through the codebook, as samples are seen.
    measure   held-out probability, accuracy, two Frechet distances, diversity: reward hacking shows in them.

cogrpo.py knows none of this: it sees tokens, conditions and `reward(tokens, cond)`. Bring your own in its place.
"""
import math
import os
import shutil
import tempfile
import threading
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision import datasets
from torchvision.utils import make_grid
from tqdm import tqdm

SIDE, PATCH = 28, 4
SEQ_LEN = (SIDE // PATCH) ** 2  # 49 tokens an image
CLASSES = 10
NOT_A_DIGIT = CLASSES           # the judges' eleventh class
DOWNLOAD_TIMEOUT = 10.0         # seconds without a new byte after which a download is given up


def _setting(default, comment, low=1):
    return field(default=default, metadata={"help": comment, "low": low})


@dataclass
class WorldSettings:
    """What the toy world depends on, beside the data and the seed."""
    codebook_size: int = _setting(128, "K: patches in the codebook, so tokens in the vocabulary", low=2)
    train_images: int = _setting(60000, "digits to learn from, at most; each judge sees one half", low=256)
    test_images: int = _setting(10000, "digits to measure against, at most", low=200)
    judge_epochs: int = _setting(2, "epochs of each judge")


# ---------------------------------------------------------------------------------------------------- data

def load_digits(data, settings, seed):
    """Digits, from the first of: `data`, ./data, torchvision's download, Pillow's font.

    data: a torchvision root (it holds MNIST/raw), "drawn", or None to search.
    Returns ((images uint8 [N, 28, 28], labels int64 [N]) to train on, the same to test on, a line saying the source,
    a key that changes with the data). Raises ValueError where `data` holds no MNIST or a file of it is damaged.
    """
    if data == "drawn":
        return (*_drawn(settings, seed), "digits: drawn with Pillow's font (--data drawn)", "drawn")
    if data is not None and not _has_mnist(data):
        raise ValueError(f"--data {data}: no MNIST there; give a folder that holds MNIST/raw/ with the four "
                         "idx-ubyte files (as torchvision lays them out), or --data drawn")
    root = data or "data"
    source = f"digits: MNIST in {root}"
    if not _has_mnist(root):
        problem = _download(root)
        if problem:
            return (*_drawn(settings, seed), f"digits: drawn with Pillow's font, for MNIST could not be downloaded "
                    f"({problem}); with a copy of it: --data DIR", "drawn")
        source = f"digits: MNIST, downloaded into {root}"
    parts, key = [], 0
    for train, limit in ((True, settings.train_images), (False, settings.test_images)):
        try:
            mnist = datasets.MNIST(root, train=train)
            images, labels = mnist.data, mnist.targets.long()
            if images.shape[1:] != (SIDE, SIDE) or len(images) != len(labels) or len(images) < limit // 100:
                raise ValueError(f"{tuple(images.shape)} images, {len(labels)} labels")
            if not 0 <= int(labels.min()) <= int(labels.max()) < CLASSES:
                raise ValueError(f"labels outside 0..{CLASSES - 1}")
        except (RuntimeError, ValueError, AssertionError, IndexError, OSError) as error:
            files = "train-*" if train else "t10k-*"
            raise ValueError(f"--data {root}: MNIST/raw/{files} is damaged or cut short ({error}); "
                             "delete it and fetch it again, or use --data drawn") from None
        key = zlib.crc32(labels.numpy().tobytes(), zlib.crc32(images.numpy().tobytes(), key))
        parts.append((images[:limit], labels[:limit]))
    return (*parts, source, f"mnist-{key:08x}")


def _has_mnist(root):
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    return all((Path(root) / "MNIST" / "raw" / name).is_file() for name in names)


def _download(root):
    """torchvision's download into `root`, whole or not at all. Returns None, or what went wrong, in a few words."""
    try:
        part = Path(tempfile.mkdtemp(prefix=".mnist-", dir="."))
    except OSError as error:
        return f"this folder is not writable: {error.strerror}"
    problem = []

    def work():
        try:
            datasets.MNIST(part, train=True, download=True)
        except Exception as error:  # any failure here has the same cure: drawn digits
            problem.append(" ".join(str(error).split())[:120])

    # A thread, because a name look-up that hangs obeys no socket timeout; a daemon, so that it holds nothing up.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    size, since = -1, time.monotonic()
    while thread.is_alive() and time.monotonic() - since < DOWNLOAD_TIMEOUT:
        thread.join(0.1)
        now = sum(f.stat().st_size for f in part.rglob("*") if f.is_file())
        if now != size:
            size, since = now, time.monotonic()
    if thread.is_alive():
        problem.append(f"nothing came for {DOWNLOAD_TIMEOUT:g} s")
    elif not problem:
        shutil.copytree(part / "MNIST", Path(root) / "MNIST", dirs_exist_ok=True)
    shutil.rmtree(part, ignore_errors=True)
    return problem[0] if problem else None


def _drawn(settings, seed):
    train, test = settings.train_images, settings.test_images
    images, labels = drawn_digits(train + test, seed)
    return (images[:train], labels[:train]), (images[train:], labels[train:])


def drawn_digits(n, seed=0):
    """n digits from Pillow's bundled font under random scale, shear, rotation, stroke width and position.

    Returns images uint8 [n, 28, 28] and labels int64 [n], like MNIST's: light strokes on black.
    """
    rng, size, widths = np.random.default_rng(seed), 96, 4
    font = ImageFont.load_default(size=64)
    masters = {}
    for digit in range(CLASSES):
        for width in range(widths):
            masters[digit, width] = image = Image.new("L", (size, size))
            ImageDraw.Draw(image).text((size / 2, size / 2), str(digit), 255, font, anchor="mm", stroke_width=width,
                                       stroke_fill=255)
    labels = rng.integers(0, CLASSES, n)
    images = np.zeros((n, SIDE, SIDE), np.uint8)
    for i, digit in enumerate(labels):
        angle, shear = rng.normal(0, 0.15), rng.normal(0, 0.2)
        scale = rng.uniform(0.8, 1.15, 2) * size / SIDE * 0.75
        inverse = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        inverse = inverse @ np.array([[1, shear], [0, 1]]) @ np.diag(scale)
        offset = size / 2 - inverse @ (SIDE / 2 + rng.uniform(-1.5, 1.5, 2))
        image = masters[int(digit), int(rng.integers(widths))].transform(
            (SIDE, SIDE), Image.Transform.AFFINE, (*inverse[0], offset[0], *inverse[1], offset[1]),
            Image.Resampling.BICUBIC)
        images[i] = np.asarray(image)
    return torch.from_numpy(images), torch.from_numpy(labels)


# ------------------------------------------------------------------------------------------------ codebook

def patches(images):
    """Cut images float [B, 28, 28] into patches [B, 49, 16], row by row."""
    return F.unfold(images[:, None], PATCH, stride=PATCH).transpose(1, 2)


def fit_codebook(images, size, rounds=15, sample=60000):
    """k-means (Lloyd) on random patches of images float [N, 28, 28]; returns the codebook [size, 16]."""
    picked = images[torch.randint(len(images), (sample // SEQ_LEN * 4,))]
    flat = patches(picked).flatten(0, 1)
    flat = flat[torch.randperm(len(flat))[:sample].to(flat.device)]
    distinct = flat.unique(dim=0)  # most patches are the same black one: start from different ones
    codebook = distinct[torch.randperm(len(distinct))[:size].to(flat.device)]
    if len(codebook) < size:
        raise ValueError(f"--codebook-size {size}: the digits have only {len(codebook)} different patches")
    bar = tqdm(range(rounds), "codebook", unit="round")
    for _ in bar:
        distance, nearest = torch.cdist(flat, codebook).min(1)
        bar.set_postfix(loss=f"{distance.square().mean():.4f}")
        total = torch.zeros_like(codebook).index_add_(0, nearest, flat)
        count = torch.bincount(nearest, minlength=size)[:, None]
        codebook = torch.where(count > 0, total / count.clamp(min=1), codebook)
    return codebook


def encode(images, codebook):
    """Tokens int64 [B, 49] of images float [B, 28, 28]: the nearest patch of the codebook [K, 16] for each patch."""
    return torch.cat([torch.cdist(patches(chunk), codebook[None]).argmin(2) for chunk in images.split(1000)])


def decode(tokens, codebook):
    """Images float [B, 28, 28] of tokens int64 [B, 49]; the inverse of `encode` up to quantisation."""
    return F.fold(codebook[tokens].transpose(1, 2), (SIDE, SIDE), PATCH, stride=PATCH)[:, 0]


# -------------------------------------------------------------------------------------------------- judges

class Judge(nn.Module):
    """images float [B, 28, 28] -> logits [B, 11]; `features` gives the 64 numbers before the last layer."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2 * width * 16, 64), nn.ReLU())
        self.head = nn.Linear(64, CLASSES + 1)
        for layer in self.body:
            if hasattr(layer, "weight"):  # torch's default starts so small that the first epoch is lost
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def features(self, images):
        return self.body((images[:, None] - 0.13) / 0.31)  # MNIST's mean and spread

    def forward(self, images):
        return self.head(self.features(images))


def splice(tokens, labels, codebook):
    """Negatives made of data alone: 10 to 50% of each digit's patches replaced by another digit's of its class.

    tokens int64 [B, 49], labels int64 [B]. Returns spliced tokens, and labels that say NOT_A_DIGIT except where no
    pixel changed by 0.3 or more: there the splice cannot be seen and the digit keeps its label.
    """
    by_class = torch.argsort(labels + torch.rand(len(labels), device=labels.device))  # each class in random order
    start = torch.searchsorted(labels[by_class].contiguous(), labels)
    count = torch.bincount(labels, minlength=CLASSES)[labels]
    rank = torch.empty_like(by_class)
    rank[by_class] = torch.arange(len(labels), device=labels.device)
    donor = tokens[by_class[start + (rank - start + 1) % count]]
    share = 0.1 + 0.4 * torch.rand(len(tokens), 1, device=tokens.device)
    spliced = torch.where(torch.rand(tokens.shape, device=tokens.device) < share, donor, tokens)
    changed = (decode(spliced, codebook) - decode(tokens, codebook)).abs().flatten(1).amax(1) >= 0.3
    return spliced, torch.where(changed, NOT_A_DIGIT, labels)


def train_judge(width, tokens, labels, codebook, epochs, name, batch=128):
    """A judge from digits and as many splices, both seen through the codebook. Returns it in eval mode."""
    judge = Judge(width).to(tokens.device)
    steps = epochs * (len(tokens) // batch)
    optimizer = torch.optim.Adam(judge.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    bar = tqdm(range(steps), name, unit="step", mininterval=0.5)
    for step in bar:
        if step % (len(tokens) // batch) == 0:
            shuffled = torch.randperm(len(tokens), device=tokens.device)
            false, false_labels = splice(tokens, labels, codebook)
        rows = shuffled[step % (len(tokens) // batch) * batch:][:batch]
        images = decode(torch.cat([tokens[rows], false[rows]]), codebook)
        loss = F.cross_entropy(judge(images), torch.cat([labels[rows], false_labels[rows]]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return judge.eval()


def frechet(a, b):
    """Frechet distance between two Gaussians fitted to a [N, D] and b [M, D]: |mean difference|^2 +
    tr(A + B - 2 (A B)^1/2). In float64, on the CPU."""
    a, b = a.cpu().double(), b.cpu().double()
    values, vectors = torch.linalg.eigh(torch.cov(a.T))
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # tr (A B)^1/2 = tr (A^1/2 B A^1/2)^1/2, and that one is symmetric
    cross = torch.linalg.eigvalsh(root @ torch.cov(b.T) @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + values.sum() + torch.cov(b.T).trace() - 2 * cross)


def diversity(tokens, cond):
    """Share of tokens that differ between two different samples of one class, averaged over the classes."""
    shares = []
    for c in cond.unique():
        counts = F.one_hot(tokens[cond == c].cpu()).sum(0).double()  # [L, V]: how often each token stands at each place
        n = counts[0].sum()
        shares.append(1 - (counts * (counts - 1)).sum(1).mean() / (n * (n - 1)))
    return float(torch.stack(shares).mean())


class World:
    """Codebook, judges and test digits: the reward, and everything that measures a sample.

    Build one with `World.build`; `state` and `World.from_state` carry it through a file (tensors and numbers only).
    """

    def __init__(self, codebook, reward_judge, held_out_judge, test_tokens, test_labels):
        self.codebook, self.judge, self.held_out_judge = codebook, reward_judge, held_out_judge
        self.test_tokens, self.test_labels = test_tokens, test_labels
        pixels = decode(test_tokens, codebook).flatten(1)
        self.components = torch.linalg.eigh(torch.cov(pixels.T.cpu().double()))[1][:, -32:].to(pixels)  # largest last
        self.real = self._features(test_tokens)

    @classmethod
    def build(cls, train, test, settings, device="cpu"):
        """train, test: (images uint8, labels) as `load_digits` gives them. Returns the world, train tokens, labels.

        Takes its randomness from torch's global generator: seed it before.
        """
        (images, labels), (test_images, test_labels) = [(x.to(device) / 255, y.to(device)) for x, y in (train, test)]
        codebook = fit_codebook(images, settings.codebook_size)
        tokens, test_tokens = encode(images, codebook), encode(test_images, codebook)
        halves = torch.randperm(len(tokens), device=device).chunk(2)
        judges = [train_judge(width, tokens[half], labels[half], codebook, settings.judge_epochs, name)
                  for half, width, name in zip(halves, (16, 24), ("reward judge", "held-out judge"))]
        return cls(codebook, *judges, test_tokens, test_labels), tokens, labels

    def state(self):
        return {"codebook": self.codebook, "judge": self.judge.state_dict(),
                "held_out_judge": self.held_out_judge.state_dict(),
                "test_tokens": self.test_tokens, "test_labels": self.test_labels}

    @classmethod
    def from_state(cls, state, device="cpu"):
        judges = []
        for name in ("judge", "held_out_judge"):
            judge = Judge(state[name]["body.0.weight"].shape[0])
            judge.load_state_dict(state[name])
            judges.append(judge.to(device).eval())
        codebook, tokens, labels = (state[name].to(device) for name in ("codebook", "test_tokens", "test_labels"))
        return cls(codebook, *judges, tokens, labels)

    @torch.no_grad()
    def log_prob(self, judge, tokens, cond):
        """log p(cond | image) [B] of a judge, for tokens int64 [B, 49]."""
        return judge(decode(tokens, self.codebook)).log_softmax(1).gather(1, cond[:, None])[:, 0]

    def reward(self, tokens, cond):
        """The reward that Co-GRPO maximises: log p(cond | image) [B] of the reward judge."""
        return self.log_prob(self.judge, tokens, cond)

    def held_out(self, tokens, cond):
        """p(cond | image) [B] of the held-out judge: for measuring only."""
        return self.log_prob(self.held_out_judge, tokens, cond).exp()

    @torch.no_grad()
    def _features(self, tokens):
        images = decode(tokens, self.codebook)
        return self.held_out_judge.features(images), images.flatten(1) @ self.components

    @torch.no_grad()
    def measure(self, tokens, cond):
        """All figures of a set of samples against the test digits, as a dict: "reward" is the mean p, "log_reward" what
        training maximises; the `_se` are standard errors over samples. tokens int64 [N, 49], cond int64 [N]."""
        logs = {"reward": self.reward(tokens, cond), "held_out": self.log_prob(self.held_out_judge, tokens, cond)}
        digit = self.held_out_judge(decode(tokens, self.codebook))[:, :CLASSES].argmax(1)
        shares = {name: values.exp() for name, values in logs.items()} | {"accuracy": (digit == cond).float()}
        row = {}
        for name, values in shares.items():
            row |= {name: float(values.mean()), f"{name}_se": float(values.std() / len(values) ** 0.5)}
        row |= {"log_" + name: float(values.mean()) for name, values in logs.items()}
        for name, a, b in zip(("frechet", "pixel_frechet"), self._features(tokens), self.real):
            row[name] = frechet(a, b)
        return row | {"diversity": diversity(tokens, cond)}

    @torch.no_grad()
    def measure_real(self):
        """The same figures for the test digits themselves; the two distances are of one half to the other."""
        row = self.measure(self.test_tokens, self.test_labels)
        halves = zip(self._features(self.test_tokens[::2]), self._features(self.test_tokens[1::2]))
        return row | {name: frechet(a, b) for name, (a, b) in zip(("frechet", "pixel_frechet"), halves)}

    def examples(self, n):
        """n test digits of each class, tokens int64 [10 n, 49], the classes in turn."""
        return torch.stack([self.test_tokens[self.test_labels == c][:n] for c in range(CLASSES)], 1).flatten(0, 1)

    def measure_splices(self):
        """Mean reward p(c | image) of spliced test digits: low, or the reward does not see what it is for."""
        spliced, labels = splice(self.test_tokens, self.test_labels, self.codebook)
        seen = labels == NOT_A_DIGIT
        return float(self.reward(spliced[seen], self.test_labels[seen]).exp().mean())


# ------------------------------------------------------------------------------------------------ pictures

INK, GREY, BLUE, RED, HIDDEN = (30, 30, 30), (140, 140, 140), (40, 100, 200), (210, 70, 40), (70, 90, 130)


def save_whole(path, write):
    """Write a file beside `path` by write(temporary path), then rename: no reader ever sees half of it."""
    part = Path(path).with_name(".part-" + Path(path).name)
    write(part)
    os.replace(part, path)


def _text(draw, xy, text, size=13, fill=INK, anchor="la"):
    draw.text(xy, text, fill, ImageFont.load_default(size=size), anchor=anchor)


def _canvas_picture(tokens, codebook, columns, scale=2):
    """One picture of canvases int64 [N, 49], `columns` in a row; [MASK] (any token past the codebook) is blue."""
    hidden = tokens >= len(codebook)
    images = decode(tokens.masked_fill(hidden, 0), codebook).clamp(0, 1)[:, None].repeat(1, 3, 1, 1)
    solid = torch.tensor([0.0, 1.0], device=tokens.device)[:, None].expand(2, PATCH ** 2)
    where = decode(hidden.long(), solid)[:, None]
    colour = torch.tensor(HIDDEN, device=tokens.device)[None, :, None, None] / 255
    grid = make_grid(torch.where(where > 0, colour, images).cpu(), nrow=columns, padding=2, pad_value=1.0)
    picture = Image.fromarray((grid * 255).byte().permute(1, 2, 0).numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _beside(titled):
    """Pictures side by side with a caption above each; titled: [(caption, picture)]."""
    pad, caption = 12, 24
    widths = [max(p.width, 10 + 7 * len(t)) + pad for t, p in titled]
    page = Image.new("RGB", (sum(widths) + pad, max(p.height for _, p in titled) + caption + 2 * pad), "white")
    draw, x = ImageDraw.Draw(page), pad
    for (title, picture), width in zip(titled, widths):
        _text(draw, (x + 4, pad), title, 15)
        page.paste(picture, (x, pad + caption))
        x += width
    return page


def draw_samples(path, rows, codebook):
    """Blocks of samples; rows: lists of (caption, tokens). Two in a row are ten digits wide, one alone is twenty."""
    strips = [_beside([(caption, _canvas_picture(tokens, codebook, CLASSES * (2 if len(row) == 1 else 1)))
                       for caption, tokens in row]) for row in rows]
    page = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    for i, strip in enumerate(strips):
        page.paste(strip, (0, sum(s.height for s in strips[:i])))
    save_whole(path, page.save)


def draw_decoding(path, runs, codebook):
    """An animation of canvases filling up; runs: [(caption, [canvas int64 [N, 49] after 0, 1, ... T steps])]."""
    count = max(len(canvases) for _, canvases in runs)
    frames = []
    for t in range(count):
        frame = _beside([(title, _canvas_picture(canvases[min(t, len(canvases) - 1)], codebook, CLASSES))
                         for title, canvases in runs])
        _text(ImageDraw.Draw(frame), (frame.width - 16, 14), f"step {t} of {count - 1}", 13, GREY, "ra")
        frames.append(frame.quantize(64))
    save_whole(path, lambda part: frames[0].save(part, save_all=True, append_images=frames[1:], loop=0,
                                                 duration=[900] * (count - 1) + [3000]))


def _panel(title, lines, bands=(), xlabel="", beside=False, width=420, height=260):
    """A line chart. lines: [(label, x, y, colour, dashed)]; bands: [(x, low, high, colour)]; labels become a legend, or
    stand beside the last point."""
    big = 2  # drawn twice as large and halved: smooth lines
    page = Image.new("RGB", (width * big, height * big), "white")
    draw = ImageDraw.Draw(page)
    left, right, top, bottom = 52 * big, (width - 22) * big, 30 * big, (height - 40) * big
    xs = [x for line in lines for x in line[1]]
    ys = [y for line in lines for y in line[2]] + [y for band in bands for side in band[1:3] for y in side]
    low, high = (min(ys), max(ys)) if ys else (0, 1)
    room = max(0.08 * (high - low), 0.02 * abs(high)) or 1.0  # a flat line is drawn flat
    low, high = low - room, high + room
    x0, x1 = (min(xs), max(xs)) if xs else (0, 1)

    def at(x, y):
        return (left + (right - left) * (x - x0) / ((x1 - x0) or 1), bottom - (bottom - top) * (y - low) / (high - low))

    def ticks(a, b):
        step = 10 ** math.floor(math.log10((b - a) / 2))
        step *= next(m for m in (1, 2, 5, 10) if (b - a) / (step * m) <= 5)
        return [i * step for i in range(math.ceil(a / step), math.floor(b / step) + 1)]

    for y in ticks(low, high):
        draw.line([at(x0, y), at(x1, y)], (230, 230, 230), big)
        _text(draw, (left - 6 * big, at(x0, y)[1]), f"{y:.4g}", 11 * big, GREY, "rm")
    for x in ticks(x0, x1) if x1 > x0 else [x0]:
        _text(draw, (at(x, low)[0], bottom + 5 * big), f"{x:.4g}", 11 * big, GREY, "ma")
    for x, lower, upper, colour in bands:
        outline = [at(*p) for p in zip(x, upper)] + [at(*p) for p in reversed(list(zip(x, lower)))]
        if len(x) > 1:
            draw.polygon(outline, tuple(255 - (255 - c) // 4 for c in colour))
    labels = []  # where those beside a point stand: none shall cover another
    for i, (label, x, y, colour, dashed) in enumerate(lines):
        points = [at(*p) for p in zip(x, y)]
        for a, b in zip(points, points[1:]):
            pieces = max(1, int(math.dist(a, b) / (5 * big))) if dashed else 1
            for j in range(0, pieces, 2):
                (ax, ay), (bx, by) = ([p + (q - p) * s / pieces for p, q in zip(a, b)] for s in (j, j + 1))
                draw.line([ax, ay, bx, by], colour, 2 * big)
        if len(x) <= 40 and not dashed:
            for px, py in points:
                draw.ellipse([px - 3 * big, py - 3 * big, px + 3 * big, py + 3 * big], colour)
        if beside:
            (px, py), wide = points[-1], draw.textlength(label, ImageFont.load_default(size=12 * big))
            px += 7 * big if px + 9 * big + wide < page.width else -7 * big - wide
            py = next(y for d in range(height * big) for y in (py - d, py + d) if not any(
                abs(y - other) < 13 * big and px < x + w + 9 and x < px + wide + 9 for x, other, w in labels))
            labels.append((px, py, wide))
            _text(draw, (px, py), label, 12 * big, colour, "lm")
        else:
            _text(draw, (left + 80 * big * i, bottom + 22 * big), label, 12 * big, colour)
    draw.line([left, top, left, bottom, right, bottom], GREY, big)
    _text(draw, (left, 8 * big), title, 14 * big)
    _text(draw, (right, bottom + 22 * big), xlabel, 11 * big, GREY, "ra")
    return page.resize((width, height), Image.Resampling.LANCZOS)


def draw_panels(path, panels, columns=2):
    """Charts in a grid; panels: dicts of `_panel`'s arguments."""
    drawn = [_panel(**panel) for panel in panels]
    w, h = drawn[0].size
    page = Image.new("RGB", (w * columns, h * math.ceil(len(drawn) / columns)), "white")
    for i, picture in enumerate(drawn):
        page.paste(picture, (i % columns * w, i // columns * h))
    save_whole(path, page.save)
