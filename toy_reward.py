"""The toy world of Co-GRPO: digits as tokens, and a reward that leaves room to rise.

    data      MNIST from --data DIR, ./data or torchvision's download; else digits drawn by Pillow
    codebook  28x28 pixels are 49 patches of 4x4, and k-means turns each patch into one of V tokens
    reward    log p(c | image) of a small convolutional net with ELEVEN classes: ten digits and "not
              a digit". Its negatives are splices: real digits with some patches of another digit of
              their class. Every token is plausible, but the strokes do not join. That is what
              few-step decoding gets wrong, and it takes no sample of the model to make one.
    measures  p(c | image), accuracy and features of a held-out net that saw the other half of the
              digits and only measures; pixels; diversity. A hacked reward shows in them.
Both nets see digits as they see samples, through the codebook. cogrpo.py knows none of this.
"""
import csv
import io
import itertools
import math
import subprocess
import sys
import tempfile
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
NOT_A_DIGIT = CLASSES           # the eleventh class
DOWNLOAD_SECONDS = 15           # after which the digits are drawn instead


@dataclass
class Size:
    """How large the toy job is: edit it at will."""
    train_images: int = 60000
    test_images: int = 10000
    codebook_size: int = 128    # V
    reward_epochs: int = 2
    dim: int = 96               # of the model
    depth: int = 3
    pretrain_steps: int = 600
    pretrain_batch: int = 128
    eval_samples: int = 1000    # for a row of the table


QUICK = Size(train_images=6000, test_images=2000, codebook_size=64, reward_epochs=3, dim=64,
             depth=2, pretrain_steps=250, pretrain_batch=64, eval_samples=200)

# ------------------------------------------------------------------ data
class UserError(ValueError):
    """What the user can put right. The command line prints it without a traceback."""


def load_digits(data, size, seed):
    """Digits, from the first of: `data`, ./data, torchvision's download, Pillow's font.

    data: a folder with MNIST, "drawn", or None to search. Returns (images uint8 [N, 28, 28], labels
    int64 [N]) to train on, the same to test on, and a sentence that says the source.
    UserError where `data` holds no MNIST, or a damaged one.
    """
    raw, why = None, "--data drawn"
    if data != "drawn":
        raw = find_mnist(data or "data")
        if data is not None and raw is None:
            raise UserError(f"--data {data}: no MNIST there; give the folder that holds MNIST/raw "
                            "with its four idx-ubyte files (unpacked), or --data drawn")
    if data is None and raw is None:
        why = download("data")
        raw = find_mnist("data")
    if raw is not None:
        train_set = read_mnist(raw, "train", size.train_images)
        return train_set, read_mnist(raw, "t10k", size.test_images), f"digits: MNIST in {raw}"
    images, labels = drawn_digits(size.train_images + size.test_images, seed)
    n = size.train_images
    source = f"digits: drawn with Pillow's font ({why}); --data DIR takes MNIST"
    return (images[:n], labels[:n]), (images[n:], labels[n:]), source


def find_mnist(folder):
    """Where MNIST's four files are: in `folder`, its raw or its MNIST/raw. None if nowhere."""
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k")
             for kind in ("images-idx3", "labels-idx1")]
    for raw in (Path(folder) / "MNIST" / "raw", Path(folder) / "raw", Path(folder)):
        if all((raw / name).is_file() for name in names):
            return raw


def read_mnist(raw, part, limit):
    """The first `limit` images uint8 [N, 28, 28] and labels int64 [N] of train or t10k."""
    try:
        images = datasets.mnist.read_image_file(raw / f"{part}-images-idx3-ubyte")[:limit]
        labels = datasets.mnist.read_label_file(raw / f"{part}-labels-idx1-ubyte")[:limit]
        count = labels.bincount(minlength=CLASSES)
        if images.shape != (len(labels), SIDE, SIDE) or len(count) > CLASSES or count.min() < 4:
            raise ValueError(f"{list(images.shape)} images, {count.tolist()} of each digit")
    except (RuntimeError, ValueError, TypeError, AssertionError, LookupError) as error:
        raise UserError(f"--data: {raw}/{part}-* are not of MNIST ({str(error) or 'damaged'}): "
                        "fetch them again, or use --data drawn") from None
    return images, labels


FETCH = "import sys; from torchvision import datasets; datasets.MNIST(sys.argv[1], download=True)"


def download(root):
    """torchvision's download into root, whole or not at all. Returns None, or what went wrong.

    It runs in a process of its own, because a look-up that hangs obeys no timeout.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".mnist-", dir=".") as folder:
            subprocess.run([sys.executable, "-c", FETCH, folder], capture_output=True, check=True,
                           timeout=DOWNLOAD_SECONDS)
            Path(root).mkdir(parents=True, exist_ok=True)
            (Path(folder) / "MNIST").replace(Path(root) / "MNIST")
    except subprocess.TimeoutExpired:
        return f"no MNIST within {DOWNLOAD_SECONDS} s"
    except (subprocess.CalledProcessError, OSError):
        return "no MNIST here, and none to be downloaded"


def drawn_digits(n, seed=0):
    """n digits of Pillow's font under a random linear map, stroke width and position.

    Returns images uint8 [n, 28, 28] and labels int64 [n], as MNIST has: light strokes on black.
    """
    rng = np.random.default_rng(seed)
    font = ImageFont.load_default(size=64)
    masters = {}
    for digit, width in itertools.product(range(CLASSES), range(4)):
        masters[digit, width] = Image.new("L", (96, 96))
        ImageDraw.Draw(masters[digit, width]).text((48, 48), str(digit), 255, font, anchor="mm",
                                                   stroke_width=width, stroke_fill=255)
    labels = rng.integers(0, CLASSES, n)
    images = np.zeros((n, SIDE, SIDE), np.uint8)
    for i, digit in enumerate(labels.tolist()):
        linear = 96 / SIDE * (0.75 * np.eye(2) + rng.normal(0, 0.11, (2, 2)))  # to the master
        offset = 48 - linear @ (SIDE / 2 + rng.uniform(-1.5, 1.5, 2))
        affine = (*linear[0], offset[0], *linear[1], offset[1])
        master = masters[digit, int(rng.integers(4))]
        images[i] = master.transform((SIDE, SIDE), Image.Transform.AFFINE, affine,
                                     Image.Resampling.BICUBIC)
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
    codebook = distinct[torch.randperm(len(distinct))[:size]].to(flat.device)
    for _ in tqdm(range(rounds), "codebook", unit="round", disable=None):
        nearest = torch.cdist(flat, codebook).argmin(1)
        total = torch.zeros_like(codebook).index_add_(0, nearest, flat)
        count = torch.bincount(nearest, minlength=size)[:, None]
        codebook = torch.where(count > 0, total / count.clamp(min=1), codebook)
    return codebook


def encode(images, codebook):
    """images float [B, 28, 28] -> tokens int64 [B, 49]: the nearest entry for each patch."""
    return torch.cat([torch.cdist(patches(x), codebook[None]).argmin(2) for x in images.split(500)])


def decode(tokens, codebook):
    """tokens int64 [B, 49] -> images float [B, 28, 28]."""
    cut = codebook[tokens].unflatten(2, (PATCH, PATCH)).unflatten(1, (-1, SIDE // PATCH))
    return cut.transpose(2, 3).flatten(3).flatten(1, 2)

# ------------------------------------------------------------------ reward model, held-out model
class RewardModel(nn.Module):
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

    tokens int64 [N, 49], labels int64 [N]. Returns spliced tokens, and labels that say
    NOT_A_DIGIT. Where no pixel changed by 0.3 nobody could see it, and the label stays.
    """
    donor = torch.empty_like(tokens)
    for c in range(CLASSES):
        rows = (labels == c).nonzero()[:, 0]
        donor[rows] = tokens[rows[torch.randperm(len(rows), device=rows.device)]]
    share = 0.1 + 0.4 * torch.rand(len(tokens), 1, device=tokens.device)
    spliced = torch.where(torch.rand_like(tokens, dtype=torch.float32) < share, donor, tokens)
    change = (decode(spliced, codebook) - decode(tokens, codebook)).abs().flatten(1).amax(1)
    return spliced, torch.where(change >= 0.3, NOT_A_DIGIT, labels)


def train_reward_model(model, tokens, labels, codebook, epochs, batch=128):
    """Train on digits and as many splices, both seen through the codebook."""
    optimizer = torch.optim.Adam(model.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs=epochs,
                                               steps_per_epoch=math.ceil(len(tokens) / batch))
    for epoch in range(epochs):
        false, false_labels = splice(tokens, labels, codebook)
        shuffled = torch.randperm(len(tokens), device=tokens.device)
        for rows in tqdm(shuffled.split(batch), f"classifier, epoch {epoch}", disable=None):
            images = decode(torch.cat([tokens[rows], false[rows]]), codebook)
            target = torch.cat([labels[rows], false_labels[rows]])
            loss = F.cross_entropy(model(images), target)
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
    """The fraction of tokens that two samples of one class differ in: a mean over classes."""
    alike = []
    for c in cond.unique():
        counts = F.one_hot(tokens[cond == c].cpu()).sum(0).double()  # [L, V]
        n = counts[0].sum()
        alike.append((counts * (counts - 1)).sum(1).mean() / (n * (n - 1)))
    return 1 - float(torch.stack(alike).mean())


class World(nn.Module):
    """Codebook, both nets and test digits: the reward, and all that measures a sample."""

    def __init__(self, size, codebook, test_tokens, test_labels):
        super().__init__()
        self.size = size
        self.reward_model, self.held_out_model = RewardModel(width=16), RewardModel(width=24)
        self.register_buffer("codebook", codebook)
        self.register_buffer("test_tokens", test_tokens)
        self.register_buffer("test_labels", test_labels)
        pixels = decode(test_tokens, codebook).flatten(1)
        directions = torch.linalg.eigh(torch.cov(pixels.T.cpu().double()))[1]  # largest last
        self.register_buffer("components", directions[:, -32:].to(pixels))
        self.to(codebook.device)

    @torch.no_grad()
    def log_prob(self, model, tokens, cond):
        """log p(cond | image) of one of the two: [B]. tokens int64 [B, 49], cond int64 [B]."""
        return model(decode(tokens, self.codebook)).log_softmax(1).gather(1, cond[:, None])[:, 0]

    def reward(self, tokens, cond):
        """What Co-GRPO maximises: log p(cond | image) of the reward model, [B]."""
        return self.log_prob(self.reward_model, tokens, cond)

    def held_out(self, tokens, cond):
        """p(cond | image) of the held-out model, [B]: for measuring only."""
        return self.log_prob(self.held_out_model, tokens, cond).exp()

    @torch.no_grad()
    def measure(self, tokens, cond, name="", passes="", real=None):
        """A row of the table, a dict: name, passes of the model, and all FIGURES of samples.

        tokens int64 [N, 49], cond int64 [N]. "log_" is a mean log p, the others are a mean p. The
        distances are to the tokens `real` (test digits).
        """
        real = self.test_tokens if real is None else real
        log_reward = self.reward(tokens, cond)
        log_held_out = self.log_prob(self.held_out_model, tokens, cond)
        images, real_images = decode(tokens, self.codebook), decode(real, self.codebook)
        digit = self.held_out_model(images)[:, :CLASSES].argmax(1)
        features = [self.held_out_model.features(x) for x in (images, real_images)]
        pixels = [x.flatten(1) @ self.components for x in (images, real_images)]
        return {"name": name, "passes": passes, "log_reward": float(log_reward.mean()),
                "log_held_out": float(log_held_out.mean()),
                "reward": float(log_reward.exp().mean()),
                "held_out": float(log_held_out.exp().mean()),
                "accuracy": float((digit == cond).float().mean()), "frechet": frechet(*features),
                "pixel_frechet": frechet(*pixels), "diversity": diversity(tokens, cond)}

    def measure_real(self):
        """The row of every other test digit; the distances are to the rest of them."""
        return self.measure(self.test_tokens[::2], self.test_labels[::2], "real digits", "-",
                            self.test_tokens[1::2])


def build_world(train_set, test_set, size, device="cpu"):
    """(images uint8, labels) twice -> (world, train tokens, train labels). Seed torch before."""
    images, labels = train_set[0].to(device) / 255, train_set[1].to(device)
    codebook = fit_codebook(images, size.codebook_size)
    tokens = encode(images, codebook)
    test_tokens = encode(test_set[0].to(device) / 255, codebook)
    world = World(size, codebook, test_tokens, test_set[1].to(device))
    halves = torch.randperm(len(tokens), device=device).chunk(2)
    for model, half in zip((world.reward_model, world.held_out_model), halves):
        train_reward_model(model, tokens[half], labels[half], codebook, size.reward_epochs)
    return world, tokens, labels

# ------------------------------------------------------------------ files and tables
def make_folder(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"--out {path}: cannot write there ({error.strerror})") from None


def save_whole(path, write):
    """write(temporary path), then rename: nobody ever sees half a file."""
    try:
        with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as folder:
            part = Path(folder) / path.name
            write(part)
            part.replace(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        raise UserError(f"--out: {path} cannot be written ({error})") from None


def write_csv(path, rows):
    """Dicts as a CSV file; a column that a row lacks stays empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    save_whole(path, lambda part: part.write_bytes(text.getvalue().encode()))


FIGURES = {"reward": 3, "held_out": 3, "accuracy": 3, "frechet": 1, "pixel_frechet": 2,
           "diversity": 3}  # and their decimals


def table(rows):
    """Rows of `World.measure` as markdown whose columns are aligned."""
    lines = [["", *FIGURES, "passes"]]
    for row in rows:
        figures = [f"{row[name]:.{decimals}f}" for name, decimals in FIGURES.items()]
        lines.append([row["name"], *figures, str(row["passes"])])
    widths = [max(len(line[j]) for line in lines) for j in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)

# ------------------------------------------------------------------ pictures
INK, GREY, BLUE, PALE = (30, 30, 30), (140, 140, 140), (40, 100, 200), (185, 205, 240)
MASK_COLOUR = 0.27, 0.35, 0.51


def write_text(draw, xy, text, size=13, fill=INK, anchor="la"):
    draw.text(xy, text, fill, ImageFont.load_default(size=size), anchor=anchor)


def canvas_picture(tokens, codebook, columns, scale):
    """Canvases int64 [N, 49] in a grid. [MASK], the token after the codebook's, is blue."""
    books = [torch.cat([codebook, codebook.new_full((1, PATCH ** 2), c)]) for c in MASK_COLOUR]
    images = torch.stack([decode(tokens, book) for book in books], 1)  # [N, 3, 28, 28]
    grid = make_grid(images.clamp(0, 1).cpu(), nrow=columns, padding=2, pad_value=1.0)
    picture = Image.fromarray((grid * 255).byte().permute(1, 2, 0).numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def page_of(pictures, columns, legend=""):
    """{caption: picture}, all of one size, in a grid, and a legend below all."""
    first = next(iter(pictures.values()))
    w, h = first.width + 10, first.height + 34
    bottom = math.ceil(len(pictures) / columns) * h + 10
    page = Image.new("RGB", (columns * w + 10, bottom + (24 if legend else 0)), "white")
    draw = ImageDraw.Draw(page)
    write_text(draw, (14, bottom), legend)
    for i, (caption, picture) in enumerate(pictures.items()):
        x, y = 10 + i % columns * w, 10 + i // columns * h
        page.paste(picture, (x, y + 24))
        write_text(draw, (x + 4, y), caption, 15)
    return page


def draw_samples(path, films, world):
    """The last two films in pairs of rows of equal seeds, then the first, then real digits."""
    many, few, ours = [film[-1][:20].view(2, CLASSES, -1) for _, film in films]
    above = f"above: {films[1][0]}, below: {films[2][0]}, same seeds"
    one, other = torch.stack([few, ours], 1)  # each [2, C, 49]
    real = [world.test_tokens[world.test_labels == c][:2] for c in range(CLASSES)]
    blocks = {above + ": do strokes join?": one, above: other, films[0][0]: many,
              "real digits, through the codebook": torch.stack(real, 1)}
    pictures = {caption: canvas_picture(tokens.reshape(-1, SEQ_LEN), world.codebook, CLASSES, 2)
                for caption, tokens in blocks.items()}
    save_whole(path, page_of(pictures, 1).save)


def draw_decoding(path, films, world):
    """Canvases that fill up, animated: of five seeds of a class the one of median held-out p.

    films: [(name, [canvas [N, 49] after 0..T steps])], the classes 0..9 in turn.
    """
    frames, T = [], len(films[0][1]) - 1
    digits = torch.arange(CLASSES, device=world.codebook.device)
    p = sum(world.held_out(film[-1][:50], digits.repeat(5)) for _, film in films)
    rows = p.view(5, CLASSES).median(0).indices * CLASSES + digits
    for t in range(T + 1):
        pictures = {f"{name}, step {t} of {T} (blue: [MASK])":
                    canvas_picture(film[t][rows], world.codebook, 5, 3)
                    for name, film in films}
        rule = "same seeds; of five samples a digit, the one of median held-out p, over both sides"
        frames.append(page_of(pictures, len(films), rule).quantize(64))
    duration = [min(1000, max(100, 4000 // T))] * T + [4000]  # milliseconds
    save_whole(path, lambda part: frames[0].save(part, save_all=True, loop=0, duration=duration,
                                                 append_images=frames[1:]))


def round_numbers(low, high):
    """About four round numbers from low to high, or to the next one above."""
    step = 10 ** math.floor(math.log10((high - low) / 2))
    for factor in (2, 2.5):
        if (high - low) / step > 5:
            step *= factor
    return [i * step for i in range(math.ceil(low / step), math.ceil(high / step - 1e-9) + 1)]


def chart(xlabel, lines, low=None, ticks=None, labels=(), width=420, height=230):
    """lines: [(x, y, colour, thickness)], thickness 0 for a filled outline; low: of the y axis
    (default: below the data); ticks: {x: label}; labels beside points: [(x, y, text)]."""
    page = Image.new("RGB", (width * 2, height * 2), "white")  # halved later, for smooth lines
    draw = ImageDraw.Draw(page)
    left, right, top, bottom = 104, 2 * width - 32, 10, 2 * height - 72
    xs, ys = [sum((list(line[k]) for line in lines), []) for k in (0, 1)]
    xs += ticks or ()
    room = 0.08 * (max(ys) - min(ys)) or max(0.1 * abs(ys[0]), 0.001)
    low = min(ys) - room if low is None else low
    numbers = round_numbers(low, max(ys))
    high = max(numbers[-1], max(ys) + room)
    wide = (max(xs) - min(xs)) * (1.2 if labels else 1) or 1  # room for the labels

    def at(x, y):
        return (left + (right - left) * (x - min(xs)) / wide,
                bottom - (bottom - top) * (y - low) / (high - low))

    for y in numbers:
        draw.line([left, at(0, y)[1], right, at(0, y)[1]], (230, 230, 230), 2)
        write_text(draw, (left - 12, at(0, y)[1]), f"{y:.4g}", 22, GREY, "rm")
    end = min(xs) + wide
    ticks = ticks or {x: f"{x:.4g}" for x in round_numbers(min(xs), end) if x <= end}
    for x, label in ticks.items():
        write_text(draw, (at(x, low)[0], bottom + 8), label, 22, GREY, "ma")
    write_text(draw, (right, bottom + 36), xlabel, 22, GREY, "ra")
    for x, y, colour, thickness in lines:
        points = [at(*point) for point in zip(x, y)]
        if thickness == 0 and len(points) > 2:
            draw.polygon(points, colour)
        draw.line(points, colour, thickness * 2, joint="curve")
        for px, py in points if thickness and len(points) <= 16 else ():
            size = thickness + 4
            draw.ellipse([px - size, py - size, px + size, py + size], colour)
    for x, y, text in labels:
        write_text(draw, (at(x, y)[0] + 12, at(x, y)[1] + 8), text, 24, INK)
    draw.line([left, top, left, bottom, right, bottom], GREY, 2)
    return page.resize((width, height), Image.Resampling.LANCZOS)


def draw_schedule(path, by_hand, learned):
    """by_hand [T, 4] and learned [T, N, 4]: r, tau_s, tau_r, w of each step, for N canvases."""
    names = ("re-mask ratio r (the last step fills all)", "sampling temperature tau_s",
             "re-mask temperature tau_r (no effect in the last step)", "guidance scale w")
    charts, T = {}, len(by_hand)
    for j in range(4) if T > 1 else (1, 3):  # no effect in the last step: r and tau_r
        steps = list(range(T - 1 if j in (0, 2) else T))
        low, mid, high = [learned[steps, :, j].quantile(q, 1).tolist() for q in (.05, .5, .95)]
        lines = [(steps + steps[::-1], low + high[::-1], PALE, 0),
                 (steps, by_hand[steps, j].tolist(), GREY, 6), (steps, mid, BLUE, 2)]
        charts[names[j]] = chart("t", lines, 0, {t: str(t) for t in range(0, T, 1 + T // 13)})
    legend = "grey: hand-made      blue: learned (median)      pale: 5 to 95% of the canvases"
    save_whole(path, page_of(charts, 2, legend).save)


CURVES = {"reward": "mean reward of the rollouts, log p(c | image)",
          "held_out": "held-out p(c | image) of the rollouts",
          "kl_model": "KL(l_c || pretrained l_c), nats per token, all steps",
          "kl_schedule": "KL(schedule || hand-made), nats per step"}


def draw_curves(path, log):
    """log: dicts with some of CURVES."""
    charts = {}
    for name, caption in CURVES.items():
        x = [i for i, row in enumerate(log) if name in row]
        y = [log[i][name] for i in x]
        if x:
            near = np.exp(-np.square(np.subtract.outer(x, x) / (0.5 + len(x) / 25)))
            bold = y if name.startswith("kl") else list(near @ y / near.sum(1))
            charts[caption] = chart("iteration", [(x, y, GREY, 1), (x, bold, BLUE, 3)])
    save_whole(path, page_of(charts, 2, "grey: each iteration    blue: smoothed (KLs: raw)").save)
