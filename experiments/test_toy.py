"""The toy world's figures come from what their names say; the command line does what it is told."""
import itertools
import os
import re
import socket
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cogrpo
import toy_reward as toy
from cogrpo import Schedule, constrain, rollout, sample, train
from test_cogrpo import DEVICE, SMALL, TINY, read, small, weights  # noqa: F401, small: a fixture

# ------------------------------------------------------------------ the toy world

@pytest.fixture(scope="module")
def world():
    size = toy.Size(train_images=4000, test_images=1000, codebook_size=48, reward_epochs=6)
    train_set, test_set, _ = toy.load_digits("drawn", size, 0)
    torch.manual_seed(0)
    return toy.build_world(train_set, test_set, size, DEVICE)[0]


def write_mnist(root, n_train=300, n_test=250):
    """A small MNIST in its real file format: images of one grey, which says set and number."""
    raw = Path(root) / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, n, grey in (("train", n_train, 0), ("t10k", n_test, 100)):
        images = (np.arange(n) % 100 + grey).astype(np.uint8).repeat(784).tobytes()
        labels = (np.arange(n) % 10).astype(np.uint8).tobytes()
        header = struct.pack(">4i", 2051, n, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + images)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + labels)
    return raw


def test_mnist_is_read_from_its_files_and_split_as_they_are(tmp_path):
    """Training digits to train on, test digits to test on, each with its own label."""
    write_mnist(tmp_path)
    size = toy.Size(train_images=250, test_images=220)
    train_set, test_set, source = toy.load_digits(str(tmp_path), size, 0)
    for (images, labels), n, grey in ((train_set, 250, 0), (test_set, 220, 100)):
        assert images.dtype == torch.uint8 and images.shape == (n, 28, 28)
        assert torch.equal(images[:, 3, 5].long(), torch.arange(n) % 100 + grey)
        assert torch.equal(labels, torch.arange(n) % 10)
    assert str(tmp_path) in source
    stale = tmp_path / "MNIST" / "processed"  # torchvision's of long ago: not looked at
    stale.mkdir()
    for name in ("training.pt", "test.pt"):
        (stale / name).write_text("stale")
    for folder in ("MNIST", "MNIST/raw"):  # the folder itself, or that of the files
        again, _, _ = toy.load_digits(str(tmp_path / folder), size, 0)
        assert torch.equal(again[0], train_set[0])


def test_drawn_digits_can_be_told_apart_and_train_and_test_differ():
    size = toy.Size(train_images=600, test_images=300)
    (train_x, train_y), (test_x, _), _ = toy.load_digits("drawn", size, 0)
    assert train_x.shape == (600, 28, 28) and test_x.shape == (300, 28, 28)
    assert not (train_x[:, None] == test_x[None, :50]).flatten(2).all(2).any()
    means = torch.stack([train_x[train_y == c].float().mean(0) for c in range(10)])
    nearest = torch.cdist(train_x.float().flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == train_y).float().mean() > 0.8
    assert not torch.equal(toy.drawn_digits(5, 0)[0], toy.drawn_digits(5, 1)[0])


def test_the_codebook_gives_the_nearest_patch_and_k_means_brings_it_nearer():
    images = toy.drawn_digits(300, 0)[0].float() / 255
    torch.manual_seed(0)
    codebook = toy.fit_codebook(images, 16)
    tokens = toy.encode(images[:3], codebook)
    for n, row, column in itertools.product(range(3), range(7), range(7)):
        patch = images[n, 4 * row:4 * row + 4, 4 * column:4 * column + 4].flatten()
        distance = (codebook - patch).square().sum(1)
        assert distance[tokens[n, 7 * row + column]] < distance.min() + 1e-5
    assert torch.equal(toy.encode(toy.decode(tokens, codebook), codebook), tokens)
    torch.manual_seed(0)
    untrained = toy.fit_codebook(images, 16, rounds=0)
    errors = [(toy.decode(toy.encode(images, book), book) - images).square().mean()
              for book in (codebook, untrained)]
    assert errors[0] < 0.8 * errors[1]


def test_splices_mix_digits_of_a_class_and_lose_the_label_where_it_shows():
    labels = torch.arange(200) % 10
    tokens = (labels * 10 + torch.arange(200) // 10 % 10)[:, None].repeat(1, 49)  # class, which one
    alike = torch.linspace(0, 1, 100)[:, None].expand(100, 16)  # neighbours differ by 0.01
    torch.manual_seed(0)
    spliced, new = toy.splice(tokens, labels, alike)
    assert torch.equal(spliced // 10, labels[:, None].expand(200, 49)) and torch.equal(new, labels)
    share = (spliced != tokens).float().mean(1)
    assert 0.25 < share.mean() < 0.35 and share.max() < 0.75
    unlike = (torch.arange(100) % 2)[:, None].expand(100, 16).float()  # neighbours differ by 1
    spliced, new = toy.splice(tokens, labels, unlike)
    shows = (unlike[spliced, 0] != unlike[tokens, 0]).any(1)
    assert torch.equal(new, torch.where(shows, toy.NOT_A_DIGIT, labels)) and shows.any()


def test_both_nets_tell_digits_from_splices_and_share_no_training_digit(world, monkeypatch):
    real = world.measure_real()
    assert min(real["reward"], real["held_out"]) > 0.45 and real["accuracy"] > 0.9
    spliced, labels = toy.splice(world.test_tokens, world.test_labels, world.codebook)
    shows = labels == toy.NOT_A_DIGIT
    for model in (world.reward_model, world.held_out_model):
        log_p = world.log_prob(model, spliced[shows], world.test_labels[shows])
        assert log_p.exp().mean() < 0.35
    seen = []
    monkeypatch.setattr(toy, "train_reward_model", lambda net, x, y, *rest: seen.append(y))
    images = torch.randint(256, (400, 28, 28), dtype=torch.uint8)
    toy.build_world((images, torch.arange(400)), (images[:50], torch.arange(50) % 10), TINY)
    assert len(seen[0]) == len(seen[1]) == 200 and not set(seen[0].tolist()) & set(seen[1].tolist())


def test_each_figure_comes_from_the_net_and_the_samples_that_its_name_says(world):
    """Reward from one net, held-out and accuracy from the other; log p(c), p(c), its choice."""
    tokens, cond = world.test_tokens[:300], world.test_labels[:300]
    with torch.no_grad():
        first, second = [net(toy.decode(tokens, world.codebook)).log_softmax(1)
                         for net in (world.reward_model, world.held_out_model)]
    rows = torch.arange(300, device=DEVICE)
    row = world.measure(tokens, cond)
    assert torch.allclose(world.reward(tokens, cond), first[rows, cond], atol=1e-5)
    assert torch.allclose(world.held_out(tokens, cond), second[rows, cond].exp(), atol=1e-5)
    p = second[rows, cond].exp()
    for name, wanted in (("reward", first[rows, cond].exp().mean()), ("held_out", p.mean()),
                         ("log_reward", first[rows, cond].mean()),
                         ("accuracy", (second[:, :10].argmax(1) == cond).float().mean())):
        assert row[name] == pytest.approx(float(wanted), abs=1e-5)
    assert not torch.allclose(first, second, atol=0.1)


def test_frechet_distances_see_what_their_names_say(world):
    """Zero for the real digits, small from one half of them to the other; noise is far off."""
    real = world.measure(world.test_tokens, world.test_labels)
    halves = world.measure_real()
    half, rest = world.test_tokens[::2], world.test_tokens[1::2]  # they share no digit
    assert halves["frechet"] == world.measure(half, world.test_labels[::2], real=rest)["frechet"]
    random = torch.randint_like(world.test_tokens, 48)
    noise = world.measure(random, world.test_labels)
    for name in ("frechet", "pixel_frechet"):
        assert abs(real[name]) < 1e-3 < halves[name] < 0.2 * noise[name]
    made, kept = [toy.decode(x, world.codebook) for x in (random, world.test_tokens)]
    with torch.no_grad():
        seen = [world.held_out_model.features(images) for images in (made, kept)]
    assert noise["frechet"] == pytest.approx(toy.frechet(*seen), rel=1e-4)
    pixels = kept.flatten(1)
    centred = pixels - pixels.mean(0)
    assert (centred @ world.components).square().sum() > 0.7 * centred.square().sum()


def test_frechet_distance_against_the_closed_form():
    """Diagonal Gaussians: |m - n|^2 + sum (sqrt a - sqrt b)^2; and where roots do not commute."""
    torch.manual_seed(0)
    white = torch.randn(4000, 3, dtype=torch.float64)
    white = (white - white.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(white.T))).T
    a = white * torch.tensor([1.0, 2, 3])
    b = white * torch.tensor([2.0, 2, 1]) + torch.tensor([1.0, 0, 2])
    assert toy.frechet(a, b) == pytest.approx(1 + 4 + 1 + 0 + 4, rel=1e-9)
    c = white @ torch.randn(3, 3, dtype=torch.float64)
    A, C = torch.cov(a.T), torch.cov(c.T)
    wanted = A.trace() + C.trace() - 2 * torch.linalg.eigvals(A @ C).sqrt().real.sum()
    assert toy.frechet(a, c) == pytest.approx(wanted.item()) and abs(toy.frechet(c, c)) < 1e-6


def test_diversity_against_all_pairs():
    tokens, cond = torch.randint(4, (12, 6)), torch.arange(12) % 2
    means = []
    for k in (0, 1):
        pairs = itertools.combinations(range(k, 12, 2), 2)
        means.append(np.mean([(tokens[i] != tokens[j]).double().mean().item() for i, j in pairs]))
    assert toy.diversity(tokens, cond) == pytest.approx(np.mean(means))


# ------------------------------------------------------------------ the command line

def test_the_rows_are_of_the_model_and_the_schedule_that_they_name(small, capsys):
    """What the checkpoint holds, measured here, is what results.csv says; and at T = 1."""
    cogrpo.main([*SMALL, "--lr=0.1", "--schedule-lr=0.3", "--seed=3"])
    world, base, model, schedule = cogrpo.load(toy, "out-quick/cogrpo.pt", torch.device(DEVICE))
    assert world.size == TINY
    assert not torch.equal(weights(base), weights(model)) and weights(schedule).abs().max() > 0.1
    header, *rows = read("out-quick/results.csv")
    cond = torch.arange(200, device=DEVICE) % 10
    hand_made = Schedule().to(DEVICE)
    for row, (m, p, steps) in zip(rows, ((base, hand_made, 32), (base, hand_made, 4),
                                         (model, schedule, 4))):
        torch.manual_seed(3)
        tokens = torch.cat([sample(m, p, c, steps) for c in cond.split(50)])
        figures = world.measure(tokens, cond)
        row = dict(zip(header, row))
        assert float(row["reward"]) == pytest.approx(figures["reward"], rel=1e-6)
        assert float(row["frechet"]) == pytest.approx(figures["frechet"], rel=1e-6)
        assert row["passes"] == str(2 * steps)
    cogrpo.main(["--load=out-quick/cogrpo.pt", "--iters=0", "--steps=1", "--out=T1"])
    assert Path("T1/schedule.png").exists()  # where r and tau_r never act
    header, *log = read("out-quick/log.csv")
    assert {"iter", "reward", "held_out", "kl_model", "kl_schedule", "grad_model"} <= set(header)


def test_a_run_without_a_kl_of_the_model_in_each_row_has_its_curves(small):
    cogrpo.main([*SMALL, "--optimize=alternate"])
    header, *log = read("out-quick/log.csv")
    assert Path("out-quick/curves.png").exists() and len(log) == 3
    empty = [row[header.index("kl_model")] == "" for row in log]
    assert empty == [False, True, False]
    toy.draw_curves(Path("schedule.png"), [{"reward": 0.1, "kl_schedule": 0.2}] * 3)
    assert Path("schedule.png").exists()


def test_the_held_out_model_is_never_trained_on(small, monkeypatch):
    """Co-GRPO's reward is log p of the reward model; log.csv has p of the other."""
    calls = []
    real = train

    def spy(model, reward_fn, conds, settings, on_iteration):
        calls.append((reward_fn, conds))
        world = reward_fn.__self__

        def check(metrics, model, schedule, rollouts):
            on_iteration(metrics, model, schedule, rollouts)
            (tokens, _, cond, _), = rollouts
            p = world.log_prob(world.held_out_model, tokens, cond).exp()
            assert metrics["held_out"] == pytest.approx(float(p.mean()))
        return real(model, reward_fn, conds, settings, on_iteration=check)
    monkeypatch.setattr(cogrpo, "train", spy)
    cogrpo.main(SMALL)
    (reward_fn, given), world = calls[0], calls[0][0].__self__
    tokens, cond = world.test_tokens[:8], world.test_labels[:8]
    assert torch.equal(reward_fn(tokens, cond), world.log_prob(world.reward_model, tokens, cond))
    assert given.tolist() == list(range(10))


def test_every_size_reaches_what_it_names(small, monkeypatch):
    calls = []

    def spy(model, tokens, labels, steps, batch):
        calls.append((len(tokens), len(labels), steps, batch))
        return 0.0
    monkeypatch.setattr(cogrpo, "pretrain", spy)
    world, model = cogrpo.make_base(toy, "drawn", TINY, 0, torch.device("cpu"))
    n = TINY.train_images
    assert calls == [(n, n, TINY.pretrain_steps, TINY.pretrain_batch)]
    assert model.token.weight.shape == (TINY.codebook_size + 1, TINY.dim)
    assert len(model.blocks.layers) == TINY.depth and len(world.test_tokens) == TINY.test_images
    assert len(world.codebook) == TINY.codebook_size


def test_results_of_another_kind_of_run_are_not_overwritten():
    for flags, folder in (([], "out"), (["--quick"], "out-quick"), (["--load=a.pt"], "out-load"),
                          (["--load=a.pt", "--out=here"], "here")):
        assert cogrpo.parse(flags)[0].out == Path(folder)


def test_quick_alone_makes_the_world_small(monkeypatch, tmp_path):
    sizes = []

    def spy(toy, data, size, seed, device):
        sizes.append(size)
        raise cogrpo.UserError("enough")
    monkeypatch.setattr(cogrpo, "make_base", spy)
    for flags in ([], ["--quick"]):
        with pytest.raises(SystemExit):
            cogrpo.main(flags + ["--out", str(tmp_path)])
    assert sizes == [toy.Size(), toy.QUICK] and toy.Size() != toy.QUICK


def test_a_run_keeps_the_result_that_it_would_overwrite_and_saves_on_its_way(small, monkeypatch):
    """unfinished.pt is there after ten iterations, an older cogrpo.pt stays until the end."""
    Path("out-quick").mkdir()
    Path("out-quick/cogrpo.pt").write_text("an older result")
    seen = []

    def reward(world, tokens, cond):
        seen.append({file.name for file in Path("out-quick").iterdir()})
        if len(seen) == 12:
            raise KeyboardInterrupt
        return torch.rand(len(tokens))
    monkeypatch.setattr(toy.World, "reward", reward)
    with pytest.raises(SystemExit) as stopped:
        cogrpo.main([*SMALL, "--iters=20"])
    assert stopped.value.code == 130
    assert seen[0] == {"base.pt", "cogrpo.pt"}
    assert seen[11] == {"base.pt", "cogrpo.pt", "unfinished.pt"}
    assert Path("out-quick/cogrpo.pt").read_text() == "an older result"
    world, base, model, _ = cogrpo.load(toy, "out-quick/unfinished.pt", torch.device(DEVICE))
    assert not torch.equal(weights(base), weights(model))
    cogrpo.main([*SMALL, "--iters=1"])
    assert Path("out-quick/cogrpo.pt.old").read_text() == "an older result"
    assert not Path("out-quick/unfinished.pt").exists()


def test_what_is_given_counts_under_quick_too(monkeypatch):
    for flags, iters, out in (([], 50, "out"), (["--quick"], 10, "out-quick"),
                              (["--quick", "--iters=20", "--out=x"], 20, "x")):
        args, s = cogrpo.parse(flags)
        assert (s.iters, str(args.out)) == (iters, out)


@pytest.mark.parametrize("flags, words", [
    (["--steps=0"], "steps=0: must be int in 1"), (["--group-size=1"], "group_size=1"),
    (["--lr=nan"], "lr=nan"), (["--lr=x"], "--lr"), (["--lr=1e3"], "lr=1000.0"),
    (["--optimize=both"], "optimize=both"),
    (["--data=empty"], "--data empty: no MNIST"), (["--data=broken"], "train-\\*"),
    (["--data=swapped"], "train-\\*"), (["--data=html"], "train-\\*"),
    (["--data=sorted"], "train-\\* are not of MNIST .*of each digit"),
    (["--data=packed"], "unpacked"),
    (["--out=file/x"], "--out file/x"),
    (["--load="], "--load : no file"),
    (["--load=file"], "--load file: another file, or damaged"),
    (["--load=none.pt"], "--load none.pt: no file; give base.pt"),
    (["--load=other.pt"], "--load other.pt: another file"),
    (["--load=file", "--data=drawn"], "--data: not allowed with argument --load"),
    (["--frobnicate"], "--frobnicate"), (["--seed=-1"], "seed=-1"),
    (["--device=tpu"], "--device: invalid choice"), (["--micro-groups=-1"], "micro_groups=-1")])
def test_bad_input_ends_in_one_line_and_status_2(flags, words, small, capsys):
    """argparse puts its line of usage before."""
    Path("empty").mkdir()
    Path("file").write_text("not a checkpoint")
    torch.save({"some": torch.zeros(3)}, "other.pt")
    (write_mnist("broken") / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0\0\x0a")
    (write_mnist("html") / "train-labels-idx1-ubyte").write_text("<html>no such page</html>")
    raw = write_mnist("swapped")
    (raw / "train-images-idx3-ubyte").replace(raw / "x")
    (raw / "train-labels-idx1-ubyte").replace(raw / "train-images-idx3-ubyte")
    (raw / "x").replace(raw / "train-labels-idx1-ubyte")
    labels = write_mnist("sorted") / "train-labels-idx1-ubyte"
    header, values = labels.read_bytes()[:8], labels.read_bytes()[8:]
    labels.write_bytes(header + bytes(len(values)))  # none but 0
    for file in write_mnist("packed").iterdir():
        file.rename(f"{file}.gz")
    data = [] if any("data" in f or "load" in f for f in flags) else ["--data=drawn"]
    with pytest.raises(SystemExit) as stopped:
        cogrpo.main([*data, *flags])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("usage")]
    assert stopped.value.code == 2 and len(lines) == 1 and re.search(words, lines[0]), lines


def test_a_full_disk_ends_in_one_line_and_leaves_the_old_file(small, capsys, monkeypatch):
    """What cannot be written is named, and what was there is whole."""
    Path("results.csv").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ValueError, match="results.csv cannot be written .*No space left"):
        toy.write_csv(Path("results.csv"), [{"a": 1}])
    assert Path("results.csv").read_text() == "old" and len(list(Path(".").iterdir())) == 1
    with pytest.raises(SystemExit) as stopped:
        cogrpo.main(SMALL)
    assert stopped.value.code == 2 and "cannot be written" in capsys.readouterr().err


def test_a_file_is_whole_also_after_a_kill(tmp_path):
    """A process is killed when it has written half of a new file: the old one is there, whole."""
    (tmp_path / "x").write_text("old")
    code = """if True:
        from pathlib import Path
        import toy_reward
        def write_half(part):
            part.write_text("ne")
            print("half", flush=True)
            input()
        toy_reward.save_whole(Path("x"), write_half)"""
    env = {**os.environ, "PYTHONPATH": str(Path(toy.__file__).parent)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"half\n"
        process.kill()
    assert (tmp_path / "x").read_text() == "old"


def test_a_download_that_hangs_gives_way_to_drawn_digits(small, monkeypatch):
    """A server that accepts and says nothing: after DOWNLOAD_SECONDS the digits are drawn."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(toy, "FETCH", "import socket; socket.create_connection("
                            f"('127.0.0.1', {silent.getsockname()[1]})).recv(1)")
        monkeypatch.setattr(toy, "DOWNLOAD_SECONDS", 3)
        (images, _), _, source = toy.load_digits(None, TINY, 0)
        silent.settimeout(0)
        silent.accept()  # it was asked
    assert len(images) == TINY.train_images and "no MNIST within 3 s" in source
    assert list(Path(".").iterdir()) == []


def test_without_a_network_one_calm_sentence_says_so(small, monkeypatch):
    monkeypatch.setattr(toy, "FETCH", "raise SystemExit(1)")
    _, _, source = toy.load_digits(None, TINY, 0)
    assert source == ("digits: drawn with Pillow's font (no MNIST here, and none to be "
                      "downloaded); --data DIR takes MNIST")
    assert list(Path(".").iterdir()) == []


def test_a_download_arrives_whole(small, monkeypatch):
    """What torchvision fetches into a folder of its own ends up in data/."""
    write_mnist("mirror")
    monkeypatch.setattr(toy, "FETCH", "import shutil, sys; shutil.copytree('mirror', sys.argv[1], "
                        "dirs_exist_ok=True)")
    _, _, source = toy.load_digits(None, TINY, 0)
    assert source == "digits: MNIST in data/MNIST/raw"
    assert {file.name for file in Path(".").iterdir()} == {"data", "mirror"}


def test_pictures_at_any_T(world, tmp_path):
    """The gif ends within seconds, and its last frame is of finished digits; T = 1 has charts."""
    cond = torch.arange(50, device=DEVICE) % 10
    model = cogrpo.MDM(49, 48, 10, dim=16, depth=1).to(DEVICE).eval()
    for T in (1, 2, 49):
        films = []
        for name in ("hand-made T=32", f"hand-made T={T}", f"joint T={T}"):
            tokens, trajectory = rollout(model, Schedule().to(DEVICE), cond, T, explore=False)
            films.append((name, [step.canvas for step in trajectory] + [tokens]))
        toy.draw_samples(tmp_path / "samples.png", films, world)
        toy.draw_decoding(tmp_path / "decoding.gif", films[1:], world)
        learned = torch.stack([constrain(step.action) for step in trajectory]).cpu()
        toy.draw_schedule(tmp_path / "schedule.png", learned[:, 0], learned)
        with Image.open(tmp_path / "decoding.gif") as gif:
            frames, duration = [], 0
            for frame in range(gif.n_frames):
                gif.seek(frame)
                duration += gif.info["duration"]
                frames.append(np.asarray(gif.convert("RGB")).astype(int))
        blue = [((frame - 255 * np.array(toy.MASK_COLOUR)) ** 2).sum(2).min() < 300
                for frame in frames]
        assert len(frames) == T + 1 and duration <= 9000 and blue[0] and not blue[-1]
    toy.draw_curves(tmp_path / "curves.png", [{"reward": 1.0, "held_out": 0.5}])


def test_a_median_sample_is_shown_of_each_class(world, tmp_path, monkeypatch):
    """By held-out p, of five: a rule, so that nobody picks."""
    score = torch.rand(50, device=DEVICE)
    shown = []
    monkeypatch.setattr(world, "held_out", lambda tokens, cond: score)
    monkeypatch.setattr(toy, "canvas_picture", lambda tokens, *_: shown.append(tokens) or
                        Image.new("RGB", (9, 9)))
    film = [torch.arange(50, device=DEVICE)[:, None].expand(50, 49)] * 2
    toy.draw_decoding(tmp_path / "x.gif", [("a", film)], world)
    for c, row in enumerate(shown[0][:, 0].tolist()):
        assert row % 10 == c and score[row] == score[c::10].median()
