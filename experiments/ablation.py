"""Is together better than either half? Every arm on several worlds, with intervals.

    python -m experiments.ablation --data DIR --seed 4 --worlds 6      tables, pictures: ablation/

A world is a seed: data split, codebook, reward models, pretrained model and Co-GRPO all differ. The
arms of a world start from one pretrained model, kept as base-SEED.pt, and call the reward equally
often, but for "twice". Each finished arm is rows of ablation.csv, so that the same command goes on
where it was stopped, and tables and pictures come from that file alone. To use two processes, give
each a folder and seeds of its own, put the rows of one file behind the other's, and run the command
once more.
"""
import argparse
import contextlib
import csv
import hashlib
import math
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.distributions import Normal
from tqdm import tqdm

import cogrpo
import toy_reward as toy
from cogrpo import Schedule, Settings, constrain, sample, train
from experiments.exact import exact

T = 4                                  # at which the arms train
EVERY_T = (2, 4, 8, 16, 32)            # at which the main arms are measured
COLDER = (0.85, 0.7, 0.55, 0.4)        # factors of tau_s: the sweep
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t for 1, 2, .. degrees

TRAINED = {  # what an arm changes in the settings
    "joint": {},
    "model only": {"optimize": "model"},
    "schedule only": {"optimize": "schedule"},
    "schedule only, blind": {"optimize": "schedule"},
    "alternate": {"optimize": "alternate"},
    "alternate, twice the calls": {"optimize": "alternate", "iters": 2 * Settings().iters},
    "joint, exact": {"beta": 6.0},
    "joint, no KL": {"beta": 0.0, "schedule_beta": 0.0},
}
ARMS = ("hand-made", "best by hand", *TRAINED)


class Blind(Schedule):
    """A schedule that sees u and not the canvas."""

    def forward(self, observation, t, T):
        return super().forward(torch.zeros_like(observation), t, T)


class Colder(nn.Module):
    """Another schedule with its tau_s times a factor."""

    def __init__(self, schedule, factor):
        super().__init__()
        self.schedule, self.factor = schedule, factor

    def forward(self, observation, t, T):
        p_phi, by_hand = self.schedule(observation, t, T)
        mean = p_phi.mean.clone()
        tau_s = constrain(mean)[:, 1] * self.factor
        mean[:, 1] = tau_s + (-torch.expm1(-tau_s)).log()  # the inverse of softplus
        return Normal(mean, self.schedule.std), by_hand


def by_hand(power, tau_s, tau_r, w):
    """A hand-made schedule: r = cos(pi u / 2)^power, tau_s, tau_r falling to 0, w."""
    def hand_made(t, T):
        u = (t + 1) / T
        return math.cos(math.pi * u / 2) ** power, tau_s, tau_r * (1 - u), w
    return Schedule(hand_made)


def best_by_hand(base, world, s, floor, candidates=32):
    """Of 32 hand-made schedules the one of largest mean reward whose diversity is above `floor`.

    By successive halving, within the reward calls of one training.
    """
    device = world.codebook.device
    torch.manual_seed(s.seed)
    u = torch.rand(candidates - 1, 4)
    contenders = [(1.0, 1.0, 4.5, 1.0)]
    for a, b, c, d in u.tolist():  # power 0.5 .. 2, tau_s 0.5 .. 1.2, tau_r 0 .. 15, w 0 .. 3
        contenders.append((2 ** (2 * a - 1), 0.5 + 0.7 * b, 15 * c, 3 * d))
    calls = s.iters * s.groups * s.group_size // int(math.log2(candidates))  # of each round
    while len(contenders) > 1:
        cond = torch.arange(calls // len(contenders), device=device) % toy.CLASSES
        results = []
        for contender in contenders:
            tokens = sample(base, by_hand(*contender).to(device), cond, s.steps)
            if toy.diversity(tokens, cond) >= floor:
                results.append((float(world.reward(tokens, cond).mean()), contender))
        best_first = [contender for _, contender in sorted(results, reverse=True)]
        contenders = best_first[:len(contenders) // 2] or contenders[:1]
    print("best by hand: cos^{:.2f}, tau_s {:.2f}, tau_r {:.1f}, w {:.2f}".format(*contenders[0]))
    return by_hand(*contenders[0])


def run_arm(arm, world, base, s, floor):
    """One arm: [(its name, or that of a part of it, model, schedule, T to measure at)]."""
    device = world.codebook.device
    hand_made = Schedule().to(device)
    if arm == "best by hand":
        return [(arm, base, best_by_hand(base, world, s, floor).to(device), s.steps)]
    model, schedule = base, hand_made
    if arm in TRAINED:
        torch.manual_seed(s.seed)
        start = Blind(std=s.action_std) if "blind" in arm else None
        conds = torch.arange(toy.CLASSES, device=device)
        with exact() if "exact" in arm else contextlib.nullcontext():
            model, schedule, _ = train(base, world.reward, conds, s, schedule=start)
    parts = [(arm, model, schedule, s.steps)]
    if arm in ("hand-made", "joint"):
        parts = [(arm, model, schedule, at) for at in EVERY_T]
    if arm == "joint":
        parts += [("joint, its model alone", model, hand_made, at) for at in EVERY_T]
    if arm in ("hand-made", "joint", "model only", "schedule only"):
        parts += [(colder(arm, factor), model, Colder(schedule, factor), at) for factor in COLDER
                  for at in ((s.steps, 32) if arm == "hand-made" else (s.steps,))]
    return parts


def colder(arm, factor):
    return arm if factor == 1 else f"{arm}, tau_s x {factor}"


def a_base(folder, data, size, seed, device):
    """(world, base) of a seed, from folder/base-SEED.pt or made and kept there."""
    path = Path(folder) / f"base-{seed}.pt"
    if path.exists():
        return cogrpo.load(toy, path, device)[:2]
    world, base = cogrpo.make_base(toy, data, size, seed, device)
    cogrpo.save(toy, path, world, base, base, Schedule().to(device))
    return world, base


def measure(world, model, schedule, steps, samples, seed):
    """The figures of `samples` samples, the same classes and seed for each arm of a world."""
    torch.manual_seed(seed)
    cond = torch.arange(samples, device=world.codebook.device) % toy.CLASSES
    batches = tqdm(cond.split(25), f"measuring at T = {steps}", unit="batch", disable=None)
    return world.measure(torch.cat([sample(model, schedule, c, steps) for c in batches]), cond)


def run_world(args, seed, size, device, path, key):
    """Run the arms of a world that the file lacks, and append their rows."""
    settings = Settings(iters=6, group_size=8) if args.quick else Settings()
    here = {row["arm"]: row for row in read_csv(path)
            if row["seed"] == str(seed) and row["T"] == str(T)}
    finished = {row["run"] for row in read_csv(path) if row["seed"] == str(seed)}
    missing = [arm for arm in args.arms if arm not in finished]
    if missing:
        world, base = a_base(args.out, args.data, size, seed, device)
    for arm in missing:
        print(f"seed {seed}: {arm}", flush=True)
        start = time.perf_counter()
        s = replace(settings, seed=seed, **TRAINED.get(arm, {}))
        floor = 0.85 * float(here["hand-made"]["diversity"]) if "hand-made" in here else 0.0
        rows = []
        for name, model, schedule, at in run_arm(arm, world, base, s, floor):
            calls = 0 if arm == "hand-made" else s.iters * s.groups * s.group_size
            row = {"settings": key, "seed": seed, "run": arm, "arm": name, "T": at,
                   "reward_calls": calls}
            row.update(measure(world, model, schedule, at, size.eval_samples, seed))
            del row["name"], row["passes"]
            rows.append(row)
            if at == T:
                here[name] = row
        rows[0]["seconds"] = round(time.perf_counter() - start)
        toy.write_csv(path, [*read_csv(path), *rows])


def read_csv(path):
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------ tables and pictures

def interval(values):
    """(mean, half the width of its 95% interval by Student's t; 0 for a single value)."""
    n = len(values)
    if n < 2:
        return values[0], 0.0
    return statistics.fmean(values), T95[min(n - 2, 8)] * statistics.stdev(values) / math.sqrt(n)


def in_words(values, decimals, sign=""):
    mean, half = interval(values)
    return f"{mean:{sign}.{decimals}f} ± {half:.{decimals}f}"


def read_figures(path):
    """(arm, T) -> {seed: {figure: number}}, from ablation.csv."""
    figures = {}
    for row in read_csv(path):
        numbers = {name: float(row[name]) for name in (*toy.FIGURES, "log_reward", "log_held_out")}
        figures.setdefault((row["arm"], int(row["T"])), {})[row["seed"]] = numbers
    return figures


def differences(figures, arm, other, name):
    """One figure of an arm (name, T) less another's, in each world that has both."""
    ours, theirs = figures.get(arm, {}), figures.get(other, {})
    return [ours[seed][name] - theirs[seed][name] for seed in ours if seed in theirs]


def tables(figures):
    """Lines of markdown: means, differences within a world, and what else the claim needs."""
    joint = "joint", T
    header = "worlds | reward | held-out | accuracy | Fréchet | pixel Fréchet | diversity |"
    rows = [key for key in figures if "tau_s x" not in key[0]]  # those have a table of their own
    lines = [f"| mean ± 95% | {header}", "|---" * 8 + "|"]
    for arm, at in rows:
        worlds = figures[arm, at].values()
        cells = [in_words([row[name] for row in worlds], decimals)
                 for name, decimals in toy.FIGURES.items()]
        lines.append(f"| {arm}, T = {at} | {len(worlds)} | {' | '.join(cells)} |")
    lines += ["", f"| joint at T = {T} less this, paired | {header}", "|---" * 8 + "|"]
    for arm, at in rows:
        shared = len(differences(figures, joint, (arm, at), "reward"))
        if shared and (arm, at) != joint and (at == T or arm == "hand-made"):
            cells = [in_words(differences(figures, joint, (arm, at), name), decimals, "+")
                     for name, decimals in toy.FIGURES.items()]
            lines.append(f"| {arm}, T = {at} | {shared} | {' | '.join(cells)} |")
    lines += ["", *sweep_table(figures), ""]
    for arm, at in (("hand-made", T), ("hand-made", 32), ("model only", T), ("schedule only", T)):
        ratios = at_equal_diversity(figures, joint, (arm, at))
        words = in_words(ratios, 2) if ratios else "-"
        lines.append(f"held-out of joint at T = {T} over that of {arm}, made colder, at T = {at}, "
                     f"at equal diversity: {words}, in {len(ratios)} of {len(figures[joint])} "
                     "worlds")
    for name in ("reward", "log_reward", "held_out", "log_held_out"):
        more = interaction(figures, name)
        if more:
            lines.append(f"gain of joint less the gains of the halves, {name}: "
                         f"{in_words(more, 3, '+')}")
    seeing = differences(figures, ("schedule only", T), ("schedule only, blind", T), "held_out")
    if seeing:
        lines.append(f"what seeing the canvas adds to the schedule, held_out: "
                     f"{in_words(seeing, 3, '+')}")
    return lines


def sweeps(figures):
    """{(arm, T): its (arm at each factor of tau_s, T) that were measured}."""
    found = {}
    for arm, at in (("hand-made", T), ("hand-made", 32), ("model only", T), ("schedule only", T),
                    ("joint", T)):
        keys = [(colder(arm, factor), at) for factor in (1, *COLDER)]
        if all(key in figures for key in keys):
            found[arm, at] = keys
    return found


def sweep_table(figures):
    """Held-out / diversity where tau_s is multiplied by a factor."""
    factors = " | ".join(f"x {factor}" for factor in COLDER)
    lines = [f"| held-out / diversity | tau_s as it is | {factors} |", "|---" * 6 + "|"]
    for (arm, at), keys in sweeps(figures).items():
        cells = [" / ".join(f"{mean_of(figures[key], name):.3f}"
                            for name in ("held_out", "diversity")) for key in keys]
        lines.append(f"| {arm}, T = {at} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def at_equal_diversity(figures, arm, other):
    """In each world, held-out over that of the other's sweep where its diversity is the same."""
    ratios = []
    keys = sweeps(figures).get(other, [])
    for seed, row in figures[arm].items():
        sweep = sorted((figures[key][seed]["diversity"], figures[key][seed]["held_out"])
                       for key in keys if seed in figures[key])
        if sweep and sweep[0][0] <= row["diversity"] <= sweep[-1][0]:
            diversity, held_out = np.array(sweep).T
            ratios.append(row["held_out"] / np.interp(row["diversity"], diversity, held_out))
    return ratios


def interaction(figures, name):
    """In each world, joint + hand-made - model only - schedule only."""
    arms = [figures.get((arm, T), {}) for arm in ("joint", "hand-made", "model only",
                                                  "schedule only")]
    more = []
    for seed in arms[0]:
        if all(seed in arm for arm in arms):
            both, none, model, schedule = [arm[seed][name] for arm in arms]
            more.append(both + none - model - schedule)
    return more


def mean_of(worlds, name):
    return statistics.fmean(row[name] for row in worlds.values())


def draw_quality(path, figures):
    """Held-out and Fréchet against T, on a log axis: hand-made and joint, with intervals."""
    charts = {}
    for name, title in (("held_out", "held-out p(c | image)"), ("frechet", "Frechet distance")):
        lines = []
        for arm, colour in (("hand-made", toy.GREY), ("joint", toy.BLUE)):
            steps = sorted(at for other, at in figures if other == arm)
            x = [math.log2(at) for at in steps]
            pairs = [interval([row[name] for row in figures[arm, at].values()]) for at in steps]
            if arm == "joint":
                low, high = zip(*[(mean - half, mean + half) for mean, half in pairs])
                lines.insert(0, (x + x[::-1], low + high[::-1], toy.PALE, 0))
            lines.append((x, [mean for mean, _ in pairs], colour, 2))
        ticks = {math.log2(at): str(at) for at in EVERY_T}
        charts[title] = toy.chart("steps T", lines, low=0, ticks=ticks)
    legend = f"grey: hand-made      blue: joint, trained at T = {T}      pale: its 95% interval"
    toy.save_whole(path, toy.page_of(charts, 2, legend).save)


def draw_frontier(path, figures):
    """Held-out against diversity: each sweep of tau_s a line, joint's in blue."""
    lines, labels = [], []
    for (arm, at), keys in sweeps(figures).items():
        points = sorted((mean_of(figures[key], "diversity"), mean_of(figures[key], "held_out"))
                        for key in keys)
        x, y = [point[0] for point in points], [point[1] for point in points]
        colour = {("joint", T): toy.BLUE, ("hand-made", 32): toy.INK}.get((arm, at), toy.GREY)
        lines.append((x, y, colour, 2))
        labels.append((x[-1], y[-1], f"{arm}, T = {at}"))
        if at == 32:  # below its third point, to the left
            labels.append((x[2] - 0.0145, y[2] + 0.002, f"T = 32, x {COLDER[1]}"))
        if arm == "joint":  # above the line, from the left: the coldest first
            labels += [(a, b + 0.03, f"x {factor}") for a, b, factor in zip(x, y, sorted(COLDER))]
            lines.append(([x[-1]] * 20, list(np.linspace(0, y[-1], 20)), toy.PALE, 1))  # vertical
            labels.append((x[-1], 0.05, "equal diversity"))
    if lines:
        picture = toy.chart("diversity", lines, labels=labels, width=840, height=500)
        title = "held-out p(c | image), every tau_s multiplied by 1 to 0.4: up and right is better"
        toy.save_whole(path, toy.page_of({title: picture}, 1).save)


def main(argv=None):
    sys.stdout.reconfigure(errors="replace")  # a terminal without ± shows ? in its place
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="as for cogrpo.py: a folder with MNIST, or drawn")
    parser.add_argument("--out", default="ablation", help="where ablation.csv is, or will be")
    parser.add_argument("--seed", type=int, default=4, help="of the first world")
    parser.add_argument("--worlds", type=int, default=6)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, metavar="ARM",
                        help="some of the arms: " + "; ".join(ARMS))
    parser.add_argument("--quick", action="store_true", help="small worlds, short trainings")
    args = parser.parse_args(argv)
    size = toy.QUICK if args.quick else toy.Size()
    out, path = Path(args.out), Path(args.out) / "ablation.csv"
    out.mkdir(parents=True, exist_ok=True)
    kind = "drawn" if args.data == "drawn" else "mnist"
    alike = repr([kind, Settings(), size, args.quick, TRAINED, COLDER])
    key = hashlib.sha256(alike.encode()).hexdigest()[:12]
    if any(row["settings"] != key for row in read_csv(path)):
        parser.error(f"--out {out}: its ablation.csv is of other settings; name another folder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for seed in range(args.seed, args.seed + args.worlds):
        run_world(args, seed, size, device, path, key)
    figures = read_figures(path)
    if not {("joint", T), ("hand-made", T)} <= set(figures):
        print(f"{path} has what was run; for tables and pictures, run joint and hand-made, too")
        return
    text = "\n".join(tables(figures))
    (out / "ablation.md").write_text(text + "\n", encoding="utf-8")
    draw_quality(out / "quality.png", figures)
    draw_frontier(out / "frontier.png", figures)
    print(f"{text}\n\ntables and pictures are in {out}/")


if __name__ == "__main__":
    main()
