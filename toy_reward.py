"""The toy world of Co-GRPO: digits as tokens, and a judge whose reward leaves room to rise.

    data      MNIST from --data DIR, ./data or torchvision's download; else digits drawn by Pillow
    codebook  28x28 pixels are 49 patches of 4x4, and k-means turns each patch into one of V tokens
    judges    small convolutional nets with ELEVEN classes: ten digits and "not a digit". Negatives
              are splices: real digits with some patches of another digit of their class. Every
              token is plausible, but the strokes do not join. That is what few-step decoding gets
              wrong, and it takes no sample of the model to make one.
    reward    log p(c | image) of the reward judge, which saw one half of the training set. The
              held-out judge saw the other half and only measures. Both see digits as they see
              samples, through the codebook.
    measures  held-out probability, accuracy, two Fréchet distances, diversity: a hacked reward
              shows in them

cogrpo.py knows none of this: it sees tokens, conditions and `reward(tokens, cond)`.
"""
import csv
import io
import math
import os
import shutil
import tempfile
import threading
import zlib
from dataclasses import dataclass
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
WIDTHS = 16, 24                 # of the reward judge and the held-out judge
DOWNLOAD_SECONDS = 15           # after which the digits are drawn instead


@dataclass
class Size:
    """How large the toy job is: edit it at will."""
    train_images: int = 60000
    test_images: int = 10000
    codebook_size: int = 128    # V
    judge_epochs: int = 2
    dim: int = 96               # of the model
    depth: int = 3
    pretrain_steps: int = 600
    pretrain_batch: int = 128
    eval_samples: int = 1000    # for a row of the table


QUICK = Size(train_images=6000, test_images=2000, codebook_size=64, judge_epochs=3, dim=64,
             depth=2, pretrain_steps=250, pretrain_batch=64, eval_samples=200)

# ------------------------------------------------------------------ data

def load_digits(data, size, seed):
    """Digits, from the first of: `data`, ./data, torchvision's download, Pillow's font.

    data: a torchvision root (a folder with MNIST/raw), "drawn", or None to search.
    Returns (images uint8 [N, 28, 28], labels int64 [N]) to train on, the same to test on, a
    sentence that says the source, and a key that changes with the data.
    ValueError where `data` holds no MNIST, or a file of it is damaged.
    """
    why = "--data drawn"
    if data != "drawn":
        root = data or "data"
        if data is not None and not has_mnist(root):
            raise ValueError(f"--data {root}: no MNIST there; give the folder that holds MNIST/raw "
                             "with its four idx-ubyte files, or --data drawn")
        why = None if has_mnist(root) else download(root)
    if why is None:
        train_set = read_mnist(root, True, size.train_images)
        test_set = read_mnist(root, False, size.test_images)
        key = 0
        for x in (*train_set, *test_set):
            key = zlib.crc32(x.numpy().tobytes(), key)
        return train_set, test_set, f"digits: MNIST in {root}", f"mnist-{key:08x}"
    images, labels = drawn_digits(size.train_images + size.test_images, seed)
    train_set = images[:size.train_images], labels[:size.train_images]
    test_set = images[size.train_images:], labels[size.train_images:]
    return train_set, test_set, f"digits: drawn with Pillow's font ({why})", "drawn"


def has_mnist(root):
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k")
             for kind in ("images-idx3", "labels-idx1")]
    return all((Path(root) / "MNIST" / "raw" / name).is_file() for name in names)


def read_mnist(root, train, limit):
    """The first `limit` images uint8 [N, 28, 28] and labels int64 [N] of a part of MNIST."""
    try:
        mnist = datasets.MNIST(root, train=train)
        images, labels = mnist.data, mnist.targets.long()
        if images.shape != (len(labels), SIDE, SIDE) or len(labels) < 200 or labels.max() > 9:
            raise ValueError(f"{list(images.shape)} images, {len(labels)} labels up to 9 wanted")
        return images[:limit], labels[:limit]
    except (RuntimeError, ValueError, AssertionError, IndexError, OSError) as error:
        files = "train-*" if train else "t10k-*"
        raise ValueError(f"--data {root}: MNIST/raw/{files} is damaged or cut short ({error}); "
                         "fetch it again, or use --data drawn") from None


def download(root):
    """torchvision's download into root, whole or not at all. Returns None, or what went wrong."""
    problem = [f"no MNIST within {DOWNLOAD_SECONDS} s"]

    def work(folder):
        try:
            datasets.MNIST(folder, download=True)
            problem.clear()
        except Exception as error:  # any failure has the same cure: drawn digits
            problem[0] = "no MNIST: " + " ".join(str(error).split())[:120]

    try:
        folder = Path(tempfile.mkdtemp(prefix=".mnist-", dir="."))
        # A thread, because a look-up that hangs obeys no timeout. A daemon, so none waits for it.
        thread = threading.Thread(target=work, args=[folder], daemon=True)
        thread.start()
        thread.join(DOWNLOAD_SECONDS)
        outcome = list(problem)  # the thread may still be at it
        if not outcome:
            raw = Path(root) / "MNIST" / "raw"
            raw.mkdir(parents=True, exist_ok=True)
            for file in (folder / "MNIST" / "raw").glob("*-ubyte"):
                os.replace(file, raw / file.name)
        shutil.rmtree(folder, ignore_errors=True)
        return outcome[0] if outcome else None
    except OSError as error:
        return f"cannot write there: {error.strerror}"


def drawn_digits(n, seed=0):
    """n digits of Pillow's font in random scale, shear, rotation, stroke width and position.

    Returns images uint8 [n, 28, 28] and labels int64 [n], as MNIST has: light strokes on black.
    """
    rng = np.random.default_rng(seed)
    size, widths = 96, 4
    font = ImageFont.load_default(size=64)
    masters = {}
    for digit in range(CLASSES):
        for width in range(widths):
            master = Image.new("L", (size, size))
            ImageDraw.Draw(master).text((size / 2, size / 2), str(digit), 255, font, anchor="mm",
                                        stroke_width=width, stroke_fill=255)
            masters[digit, width] = master
    labels = rng.integers(0, CLASSES, n)
    images = np.zeros((n, SIDE, SIDE), np.uint8)
    for i, digit in enumerate(labels):
        angle, shear = rng.normal(0, 0.15), rng.normal(0, 0.2)
        scale = rng.uniform(0.8, 1.15, 2) * size / SIDE * 0.75
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        inverse = turn @ np.array([[1, shear], [0, 1]]) @ np.diag(scale)  # of picture to master
        offset = size / 2 - inverse @ (SIDE / 2 + rng.uniform(-1.5, 1.5, 2))
        master = masters[int(digit), int(rng.integers(widths))]
        affine = (*inverse[0], offset[0], *inverse[1], offset[1])
        images[i] = np.asarray(master.transform((SIDE, SIDE), Image.Transform.AFFINE, affine,
                                                Image.Resampling.BICUBIC))
    return torch.from_numpy(images), torch.from_numpy(labels)

# ------------------------------------------------------------------ codebook

def patches(images):
    """images float [B, 28, 28] -> their patches [B, 49, 16], row by row."""
    cut = images.unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH))  # [B, 7, 4, 7, 4]
    return cut.transpose(2, 3).flatten(3).flatten(1, 2)


def fit_codebook(images, size, rounds=15, sample=60000):
    """k-means (Lloyd) on random patches of images float [N, 28, 28]: the codebook [size, 16]."""
    picked = images[torch.randint(len(images), (sample // SEQ_LEN * 4,))]
    flat = patches(picked).flatten(0, 1)
    flat = flat[torch.randperm(len(flat))[:sample].to(flat.device)]
    distinct = flat.cpu().unique(dim=0)  # most patches are the same black one: start from others
    if len(distinct) < size:
        raise ValueError(f"codebook_size {size}: there are only {len(distinct)} different patches")
    codebook = distinct[torch.randperm(len(distinct))[:size]].to(flat.device)
    for _ in tqdm(range(rounds), "codebook", unit="round"):
        nearest = torch.cdist(flat, codebook).argmin(1)
        total = torch.zeros_like(codebook).index_add_(0, nearest, flat)
        count = torch.bincount(nearest, minlength=size)[:, None]
        codebook = torch.where(count > 0, total / count.clamp(min=1), codebook)
    return codebook


def encode(images, codebook):
    """images float [B, 28, 28] -> tokens int64 [B, 49]: the nearest entry for each patch."""
    chunks = images.split(1000)
    return torch.cat([torch.cdist(patches(chunk), codebook[None]).argmin(2) for chunk in chunks])


def decode(tokens, codebook):
    """tokens int64 [B, 49] -> images float [B, 28, 28]."""
    side = SIDE // PATCH
    cut = codebook[tokens].unflatten(2, (PATCH, PATCH)).unflatten(1, (side, side))
    return cut.transpose(2, 3).flatten(3).flatten(1, 2)


# ------------------------------------------------------------------ judges

class Judge(nn.Module):
    """images float [B, 28, 28] -> logits [B, 11]; `features` are the 64 numbers before them."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(2 * width * 16, 64), nn.ReLU())
        self.head = nn.Linear(64, CLASSES + 1)
        for layer in self.body:
            if hasattr(layer, "weight"):  # torch's default starts so small that an epoch is lost
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def features(self, images):
        return self.body((images[:, None] - 0.13) / 0.31)  # MNIST's mean and spread

    def forward(self, images):
        return self.head(self.features(images))


def splice(tokens, labels, codebook):
    """Negatives from data alone: 10 to 50% of a digit's patches become another's of its class.

    tokens int64 [B, 49], labels int64 [B]. Returns spliced tokens, and labels that say
    NOT_A_DIGIT. Where no pixel changed by 0.3 nobody could see it, and the label stays.
    """
    B, device = len(tokens), tokens.device
    by_class = torch.argsort(labels + torch.rand(B, device=device))  # each class in random order
    rank = torch.empty_like(by_class)
    rank[by_class] = torch.arange(B, device=device)
    start = torch.searchsorted(labels[by_class].contiguous(), labels)
    count = torch.bincount(labels, minlength=CLASSES)[labels]
    donor = tokens[by_class[start + (rank - start + 1) % count]]  # the next of the same class
    share = 0.1 + 0.4 * torch.rand(B, 1, device=device)
    spliced = torch.where(torch.rand(tokens.shape, device=device) < share, donor, tokens)
    change = (decode(spliced, codebook) - decode(tokens, codebook)).abs().flatten(1).amax(1)
    return spliced, torch.where(change >= 0.3, NOT_A_DIGIT, labels)


def train_judge(judge, tokens, labels, codebook, epochs, batch=128):
    """Train a judge on digits and as many splices, both seen through the codebook."""
    optimizer = torch.optim.Adam(judge.parameters())
    steps = epochs * math.ceil(len(tokens) / batch)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for epoch in range(epochs):
        false, false_labels = splice(tokens, labels, codebook)
        shuffled = torch.randperm(len(tokens), device=tokens.device)
        for rows in tqdm(shuffled.split(batch), f"judge, epoch {epoch + 1}", unit="step"):
            images = decode(torch.cat([tokens[rows], false[rows]]), codebook)
            target = torch.cat([labels[rows], false_labels[rows]])
            loss = F.cross_entropy(judge(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()


# ------------------------------------------------------------------ the world: reward and measures

def frechet(a, b):
    """|mean difference|^2 + tr(A + B - 2 (A B)^1/2) of Gaussians fitted to a [N, D], b [M, D]."""
    a, b = a.cpu().double(), b.cpu().double()
    values, vectors = torch.linalg.eigh(torch.cov(a.T))
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # A^1/2
    # tr (A B)^1/2 = tr (A^1/2 B A^1/2)^1/2, and that one is symmetric.
    cross = torch.linalg.eigvalsh(root @ torch.cov(b.T) @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum()
    return float(distance + values.sum() + torch.cov(b.T).trace() - 2 * cross)


def diversity(tokens, cond):
    """Share of tokens that differ between two samples of one class, a mean over the classes."""
    shares = []
    for c in cond.unique():
        counts = F.one_hot(tokens[cond == c].cpu()).sum(0).double()  # [L, V]
        n = counts[0].sum()
        alike = (counts * (counts - 1)).sum(1).mean() / (n * (n - 1))
        shares.append(1 - alike)
    return float(torch.stack(shares).mean())


class World(nn.Module):
    """Codebook, judges and test digits: the reward, and all that measures a sample."""

    def __init__(self, codebook, reward_judge, held_out_judge, test_tokens, test_labels):
        super().__init__()
        self.reward_judge, self.held_out_judge = reward_judge, held_out_judge
        self.register_buffer("codebook", codebook)
        self.register_buffer("test_tokens", test_tokens)
        self.register_buffer("test_labels", test_labels)
        pixels = decode(test_tokens, codebook).flatten(1)
        directions = torch.linalg.eigh(torch.cov(pixels.T.cpu().double()))[1]  # largest last
        self.register_buffer("components", directions[:, -32:].to(pixels))

    @classmethod
    def build(cls, train_set, test_set, size, device="cpu"):
        """(images uint8, labels) twice -> (world, train tokens, train labels). Seed it before."""
        images, labels = train_set[0].to(device) / 255, train_set[1].to(device)
        codebook = fit_codebook(images, size.codebook_size)
        tokens = encode(images, codebook)
        halves = torch.randperm(len(tokens), device=device).chunk(2)
        judges = [Judge(width).to(device) for width in WIDTHS]
        for judge, half in zip(judges, halves):
            train_judge(judge, tokens[half], labels[half], codebook, size.judge_epochs)
        test_tokens = encode(test_set[0].to(device) / 255, codebook)
        return cls(codebook, *judges, test_tokens, test_set[1].to(device)), tokens, labels

    @classmethod
    def from_state(cls, state):
        """The world that had this state_dict, on the device of its tensors."""
        judges = [Judge(width) for width in WIDTHS]
        world = cls(state["codebook"], *judges, state["test_tokens"], state["test_labels"])
        world.load_state_dict(state)
        return world.to(state["codebook"].device)

    @torch.no_grad()
    def log_prob(self, judge, tokens, cond):
        """log p(cond | image) of a judge: [B]. tokens int64 [B, 49], cond int64 [B]."""
        return judge(decode(tokens, self.codebook)).log_softmax(1).gather(1, cond[:, None])[:, 0]

    def reward(self, tokens, cond):
        """What Co-GRPO maximises: log p(cond | image) of the reward judge, [B]."""
        return self.log_prob(self.reward_judge, tokens, cond)

    def held_out(self, tokens, cond):
        """p(cond | image) of the held-out judge, [B]: for measuring only."""
        return self.log_prob(self.held_out_judge, tokens, cond).exp()

    @torch.no_grad()
    def features(self, tokens):
        """What the two Fréchet distances compare: [N, 64] of the judge, [N, 32] of the pixels."""
        images = decode(tokens, self.codebook)
        return self.held_out_judge.features(images), images.flatten(1) @ self.components

    @torch.no_grad()
    def measure(self, tokens, cond):
        """All figures of samples, a dict of floats; "_se" is a standard error over the samples.

        tokens int64 [N, 49], cond int64 [N]. "reward" is the mean p, "log_reward" the mean log p.
        """
        log_reward = self.reward(tokens, cond)
        log_held_out = self.log_prob(self.held_out_judge, tokens, cond)
        digit = self.held_out_judge(decode(tokens, self.codebook))[:, :CLASSES].argmax(1)
        row = {"log_reward": float(log_reward.mean()), "log_held_out": float(log_held_out.mean())}
        for name, x in (("reward", log_reward.exp()), ("held_out", log_held_out.exp()),
                        ("accuracy", (digit == cond).float())):
            row[name], row[name + "_se"] = float(x.mean()), float(x.std() / len(x) ** 0.5)
        features, pixels = self.features(tokens)
        real_features, real_pixels = self.features(self.test_tokens)
        row["frechet"] = frechet(features, real_features)
        row["pixel_frechet"] = frechet(pixels, real_pixels)
        row["diversity"] = diversity(tokens, cond)
        return row

    def measure_real(self):
        """The same figures of the test digits; the distances are of one half to the other."""
        row = self.measure(self.test_tokens, self.test_labels)
        features, pixels = self.features(self.test_tokens)
        row["frechet"] = frechet(features[::2], features[1::2])
        row["pixel_frechet"] = frechet(pixels[::2], pixels[1::2])
        return row


# ------------------------------------------------------------------ files and tables

def save_whole(path, write):
    """write(temporary path), then rename: nobody ever sees half a file."""
    part = Path(path).with_name(f".part-{os.getpid()}-{Path(path).name}")
    try:
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        raise ValueError(f"--out, --cache: {path} cannot be written ({error})") from None
    finally:
        part.unlink(missing_ok=True)


def write_csv(path, rows):
    """Dicts as a CSV file; a column that a row lacks stays empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    save_whole(path, lambda part: part.write_bytes(text.getvalue().encode()))


def table(rows):
    """Rows of `World.measure` as markdown; ± is one standard error over the samples."""
    lines = ["| | reward | held-out | accuracy | Frechet | pixel Frechet | diversity | passes |",
             "|---" * 8 + "|"]
    for row in rows:
        cells = [row["name"]]
        for name in ("reward", "held_out", "accuracy"):
            cells.append(f"{row[name]:.3f} ± {row[name + '_se']:.3f}")
        cells += [f"{row['frechet']:.1f}", f"{row['pixel_frechet']:.2f}",
                  f"{row['diversity']:.3f}", str(row["passes"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------ pictures

INK, GREY, BLUE, PALE = (30, 30, 30), (140, 140, 140), (40, 100, 200), (185, 205, 240)
HIDDEN = (70, 90, 130)  # the colour of [MASK]


def write_text(draw, xy, text, size=13, fill=INK, anchor="la"):
    draw.text(xy, text, fill, ImageFont.load_default(size=size), anchor=anchor)


def canvas_picture(tokens, codebook, columns, scale):
    """Canvases int64 [N, 49] in a grid. [MASK], a token beyond the codebook, is blue."""
    tokens, codebook = tokens.cpu(), codebook.cpu()
    hidden = tokens >= len(codebook)
    images = decode(tokens.masked_fill(hidden, 0), codebook).clamp(0, 1)[:, None]
    where = decode(hidden.long(), torch.tensor([[0.0], [1.0]]).expand(2, PATCH ** 2))[:, None]
    colour = torch.tensor(HIDDEN)[:, None, None] / 255
    images = torch.where(where > 0, colour, images)  # [N, 3, 28, 28]
    grid = make_grid(images, nrow=columns, padding=2, pad_value=1.0)
    picture = Image.fromarray((grid * 255).byte().permute(1, 2, 0).numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def page_of(pictures, columns, captions=None):
    """Pictures of one size in a grid, each with its caption above."""
    gap = 10
    top = 24 if captions else 0
    w, h = pictures[0].width + gap, pictures[0].height + gap + top
    rows = math.ceil(len(pictures) / columns)
    page = Image.new("RGB", (columns * w + gap, rows * h + gap), "white")
    for i, picture in enumerate(pictures):
        x, y = gap + i % columns * w, gap + i // columns * h
        page.paste(picture, (x, y + top))
        if captions:
            write_text(ImageDraw.Draw(page), (x + 4, y), captions[i], 15)
    return page


def draw_samples(path, films, world):
    """The finished samples of each film, and real digits, one block above the other."""
    blocks = [(caption, canvases[-1][:4 * CLASSES]) for caption, canvases in films]
    by_class = [world.test_tokens[world.test_labels == c][:4] for c in range(CLASSES)]
    blocks.append(("real digits, through the codebook", torch.stack(by_class, 1).flatten(0, 1)))
    pictures = [canvas_picture(tokens, world.codebook, CLASSES, 2) for _, tokens in blocks]
    save_whole(path, page_of(pictures, 1, [caption for caption, _ in blocks]).save)


def draw_decoding(path, films, world):
    """Canvases that fill up, animated. films: [(caption, [canvas [N, 49] after 0..T steps])]."""
    frames, T = [], len(films[0][1]) - 1
    for t in range(T + 1):
        pictures = [canvas_picture(canvases[t][:10], world.codebook, 5, 3) for _, canvases in films]
        captions = [f"{caption}, step {t} of {T}" for caption, _ in films]
        frames.append(page_of(pictures, len(films), captions).quantize(64))
    duration = [1000] * T + [4000]
    save_whole(path, lambda part: frames[0].save(part, format="GIF", save_all=True, loop=0,
                                                 append_images=frames[1:], duration=duration))


def round_numbers(low, high):
    """About four round numbers between low and high."""
    step = 10 ** math.floor(math.log10((high - low) / 2))
    for factor in (5, 2):
        if (high - low) / step > 5:
            step *= factor
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def panel(title, xlabel, lines, band=None, low=None, ticks=None, labels=(), width=420, height=250):
    """A line chart. lines: [(x, y, colour, thickness)]; band: (x, lower, upper); low: of the y
    axis (default: below the data); ticks: {x: label}; labels beside points: [(x, y, text)]."""
    big = 2  # drawn twice as large and halved, for smooth lines
    page = Image.new("RGB", (width * big, height * big), "white")
    draw = ImageDraw.Draw(page)
    left, right, top, bottom = 52 * big, (width - 16) * big, 30 * big, (height - 36) * big
    xs = [x for line in lines for x in line[0]]
    ys = [y for line in lines for y in line[1]] + ([*band[1], *band[2]] if band else [])
    room = 0.08 * (max(ys) - min(ys)) or 0.1 * abs(ys[0]) or 1.0
    high = max(ys) + room
    low = min(ys) - room if low is None else low
    wide = (max(xs) - min(xs)) or 1

    def at(x, y):
        return (left + (right - left) * (x - min(xs)) / wide,
                bottom - (bottom - top) * (y - low) / (high - low))

    for y in round_numbers(low, high):
        draw.line([left, at(0, y)[1], right, at(0, y)[1]], (230, 230, 230), big)
        write_text(draw, (left - 6 * big, at(0, y)[1]), f"{y:.4g}", 11 * big, GREY, "rm")
    for x in ticks or round_numbers(min(xs), min(xs) + wide):
        label = ticks[x] if ticks else f"{x:.4g}"
        write_text(draw, (at(x, low)[0], bottom + 4 * big), label, 11 * big, GREY, "ma")
    if band:
        upper = [at(x, y) for x, y in zip(band[0], band[2])]
        lower = [at(x, y) for x, y in zip(band[0], band[1])]
        draw.polygon([*upper, *reversed(lower), upper[0]], PALE)
    for x, y, colour, thickness in lines:
        points = [at(*point) for point in zip(x, y)]
        draw.line(points, colour, thickness * big, joint="curve")
        for px, py in points if len(points) <= 16 else ():
            draw.ellipse([px - 3 * big, py - 3 * big, px + 3 * big, py + 3 * big], colour)
    for x, y, text in labels:
        write_text(draw, (at(x, y)[0] + 8 * big, at(x, y)[1]), text, 12 * big, INK, "lm")
    draw.line([left, top, left, bottom, right, bottom], GREY, big)
    write_text(draw, (left, 8 * big), title, 14 * big)
    write_text(draw, (right, bottom + 18 * big), xlabel, 11 * big, GREY, "ra")
    return page.resize((width, height), Image.Resampling.LANCZOS)


def draw_panels(path, panels, legend, columns=2):
    """Charts in a grid, and one legend below for all. legend: [(label, colour)]."""
    charts = page_of(panels, columns)
    page = Image.new("RGB", (charts.width, charts.height + 24), "white")
    page.paste(charts)
    draw = ImageDraw.Draw(page)
    x, y = 60, charts.height + 8
    for label, colour in legend:
        draw.line([x, y, x + 24, y], colour, 4)
        write_text(draw, (x + 32, y), label, 13, INK, "lm")
        x += 60 + int(draw.textlength(label, ImageFont.load_default(size=13)))
    save_whole(path, page.save)


def draw_schedule(path, parameters):
    """parameters: [(name, steps, the hand-made value at each, the learned ones [N] at each)]."""
    panels = []
    for name, x, by_hand, learned in parameters:
        mean = [float(values.mean()) for values in learned]
        band = x, *[[float(values.quantile(q)) for values in learned] for q in (0.05, 0.95)]
        lines = [(x, by_hand, GREY, 2), (x, mean, BLUE, 2)]
        panels.append(panel(name, "step", lines, band, low=0, ticks={t: str(t) for t in x}))
    draw_panels(path, panels, [("hand-made", GREY), ("learned", BLUE),
                               ("5 to 95% of the canvases", PALE)])


def draw_curves(path, log):
    """log: dicts with "iter" and the four figures below."""
    x = [row["iter"] for row in log]
    reach, panels = max(1, len(log) // 10), []
    for name, title in (("reward", "mean reward of the rollouts, log p(c | image)"),
                        ("held_out", "the held-out judge's p(c | image)"),
                        ("kl_model", "KL(model || pretrained), nats per token"),
                        ("kl_schedule", "KL(schedule || hand-made), nats per step")):
        y = [row[name] for row in log]
        near = [min(reach, i, len(y) - 1 - i) for i in x]  # as far to the left as to the right
        mean = [float(np.mean(y[i - k:i + k + 1])) for i, k in zip(x, near)]
        panels.append(panel(title, "iteration", [(x, y, PALE, 1), (x, mean, BLUE, 3)]))
    draw_panels(path, panels, [("each iteration", PALE), ("smoothed", BLUE)])
