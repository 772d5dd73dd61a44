"""Is together better than either half? Every arm on several worlds, with intervals.

    python -m experiments.ablation --data DIR --seed 4 --worlds 6      tables, pictures: ablation/

A world is a seed: data split, codebook, judges, pretrained model and Co-GRPO all differ. The arms
of a world start from one pretrained model and call the reward equally often, but for "twice".
Each finished arm is rows of ablation.csv, so that the same command goes on where it was stopped,
and tables and pictures come from that file alone. To use two processes, give each a folder and
seeds of its own, put the rows of one file behind the other's, and run the command once more.
"""
import argparse
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
from tqdm import tqdm

import cogrpo
import toy_reward as toy
from cogrpo import Schedule, Settings, iterate, prepare, sample, train

T = 4                             # at which the arms train, where nothing else is said
EVERY_T = (2, 4, 8, 16, 32)       # at which the main arms are measured
FIGURES = {"reward": 3, "held_out": 3, "accuracy": 3, "frechet": 1, "pixel_frechet": 2,
           "diversity": 3}        # and their decimals
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t for 1, 2, .. degrees

TRAINED = {  # what an arm changes in the settings
    "joint": {},
    "joint, exact": {"likelihood": "exact", "kl_model": 6.0},
    "joint, no KL": {"kl_model": 0.0, "kl_schedule": 0.0},
    "model only": {"update": "model"},
    "model only, no exploration": {"update": "model", "spread": 1e-6},
    "schedule only": {"update": "schedule"},
    "schedule only, blind": {"update": "schedule"},
    "alternate": {"update": "alternate"},
    "alternate, twice the calls": {"update": "alternate", "iters": 2 * Settings().iters},
    "joint at T = 2": {"steps": 2},
    "joint at T = 8": {"steps": 8},
    "joint at T = 2, 4, 8 in turn": {},
}
BY_HAND = {  # power of the cosine, tau_s, tau_r, w: the first is `cogrpo.hand_made`
    "hand-made": (1, 1, 4.5, 1),
    "tau_s = 0.85": (1, 0.85, 4.5, 1),
    "tau_s = 0.7": (1, 0.7, 4.5, 1),
    "tau_s = 0.55": (1, 0.55, 4.5, 1),
    "tau_s = 0.4": (1, 0.4, 4.5, 1),
}
ARMS = (*BY_HAND, "best by hand", *TRAINED)


class Blind(Schedule):
    """A schedule that sees u and not the canvas."""

    def forward(self, statistics, t, T):
        return super().forward(torch.zeros_like(statistics), t, T)


def by_hand(power, tau_s, tau_r, w):
    """A hand-made schedule: r = cos(pi u / 2)^power, tau_s, tau_r falling to 0, w."""
    def hand_made(t, T):
        u = (t + 1) / T
        return math.cos(math.pi * u / 2) ** power, tau_s, tau_r * (1 - u), w
    return Schedule(hand_made=hand_made)


def best_by_hand(base, world, s, floor, candidates=32):
    """Of 32 hand-made schedules the one of largest mean reward whose diversity is above `floor`.

    By successive halving, within the reward calls of one training.
    """
    device = world.codebook.device
    torch.manual_seed(s.seed)
    u = torch.rand(candidates - 1, 4)
    contenders = [BY_HAND["hand-made"]]
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
    """One arm: [(its name, or that of a part of it, model, schedule, steps to measure at)]."""
    device = world.codebook.device
    if arm in BY_HAND:
        steps = EVERY_T if arm == "hand-made" else (s.steps, 32)
        return [(arm, base, by_hand(*BY_HAND[arm]).to(device), steps)]
    if arm == "best by hand":
        return [(arm, base, best_by_hand(base, world, s, floor).to(device), (s.steps,))]
    torch.manual_seed(s.seed)
    start = Blind(s.spread) if "blind" in arm else None
    conds = torch.arange(toy.CLASSES, device=device)
    if "in turn" in arm:
        state = model, schedule, _, _ = prepare(base, s)
        for i in tqdm(range(s.iters), "Co-GRPO", unit="iter"):
            iterate(i, *state, world.reward, conds, replace(s, steps=(2, 4, 8)[i % 3]))
    else:
        model, schedule, _ = train(base, world.reward, conds, s, schedule=start)
    if arm != "joint" and "at T" not in arm:
        return [(arm, model, schedule, (s.steps,))]
    hand_made = Schedule().to(device)
    return [(arm, model, schedule, EVERY_T),
            (f"{arm}, its model alone", model, hand_made, EVERY_T)]


def measure(world, model, schedule, steps, samples, seed):
    """The figures of `samples` samples, the same classes and seed for each arm of a world."""
    torch.manual_seed(seed)
    cond = torch.arange(samples, device=world.codebook.device) % toy.CLASSES
    batches = tqdm(cond.split(25), f"measuring at T = {steps}", unit="batch")
    tokens = torch.cat([sample(model, schedule, c, steps) for c in batches])
    return world.measure(tokens, cond)


def run_world(args, seed, size, device, path, key):
    """Run the arms of a world that the file lacks, and append their rows."""
    settings = Settings(iters=6, group_size=8) if args.quick else Settings()
    done = read_csv(path)
    here = {row["arm"]: row for row in done if row["seed"] == str(seed) and row["T"] == str(T)}
    finished = {row["run"] for row in done if row["seed"] == str(seed)}
    missing = [arm for arm in args.arms if arm not in finished]
    if missing:
        world, base = cogrpo.build_world(toy, args, size, seed, device)
    for arm in missing:
        print(f"seed {seed}: {arm}")
        start = time.perf_counter()
        s = replace(settings, seed=seed, **TRAINED.get(arm, {}))
        floor = 0.85 * float(here["hand-made"]["diversity"]) if "hand-made" in here else 0.0
        rows = []
        for name, model, schedule, steps in run_arm(arm, world, base, s, floor):
            for at in steps:
                row = {"settings": key, "seed": seed, "run": arm, "arm": name, "T": at,
                       "reward_calls": 0 if arm in BY_HAND else s.iters * s.groups * s.group_size}
                row.update(measure(world, model, schedule, at, size.eval_samples, seed))
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
        numbers = {name: float(row[name]) for name in (*FIGURES, "log_reward", "log_held_out")}
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
    rows = [key for key in figures if "at T" not in key[0]]  # those have a table of their own
    lines = [f"| mean ± 95% | {header}", "|---" * 8 + "|"]
    for arm, steps in rows:
        worlds = figures[arm, steps].values()
        cells = [in_words([row[name] for row in worlds], FIGURES[name]) for name in FIGURES]
        lines.append(f"| {arm}, T = {steps} | {len(worlds)} | {' | '.join(cells)} |")
    lines += ["", f"| joint at T = {T} less this, paired | {header}", "|---" * 8 + "|"]
    for arm, steps in rows:
        shared = len(differences(figures, joint, (arm, steps), "reward"))
        if shared and (arm, steps) != joint and (steps == T or arm in BY_HAND):
            cells = [in_words(differences(figures, joint, (arm, steps), name), FIGURES[name], "+")
                     for name in FIGURES]
            lines.append(f"| {arm}, T = {steps} | {shared} | {' | '.join(cells)} |")
    lines += ["", *over_steps(figures), ""]
    for steps in (T, 32):
        ratios = at_equal_diversity(figures, joint, steps)
        words = in_words(ratios, 2) if ratios else "-"
        lines.append(f"held-out of joint at T = {T} over that of tau_s by hand at T = {steps}, at "
                     f"equal diversity: {words}, in {len(ratios)} of {len(figures[joint])} worlds")
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


def over_steps(figures):
    """A table of held-out / diversity at every T, of the worlds in which joint learned at T = 2."""
    seeds = figures.get(("joint at T = 2", T), {})
    lines = []
    for arm in dict.fromkeys(arm for arm, steps in figures if steps == EVERY_T[-1]):
        worlds = [figures.get((arm, steps), {}) for steps in EVERY_T]
        if seeds and all(seed in world for world in worlds for seed in seeds):
            cells = [" / ".join(f"{statistics.fmean(world[seed][name] for seed in seeds):.3f}"
                                for name in ("held_out", "diversity")) for world in worlds]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    if not lines:
        return []
    steps = " | ".join(f"T = {steps}" for steps in EVERY_T)
    header = f"| held-out / diversity, {len(seeds)} worlds | {steps} |"
    return [header, "|---" * (1 + len(EVERY_T)) + "|", *lines]


def at_equal_diversity(figures, arm, steps):
    """In each world, held-out over that of the sweep of tau_s where its diversity is the same."""
    ratios = []
    for seed, row in figures[arm].items():
        sweep = sorted((figures[hand, steps][seed]["diversity"],
                        figures[hand, steps][seed]["held_out"])
                       for hand in BY_HAND if seed in figures.get((hand, steps), {}))
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
    panels = []
    for name, title in (("held_out", "held-out p(c | image)"), ("frechet", "Frechet distance")):
        lines, band = [], None
        for arm, colour in (("hand-made", toy.GREY), ("joint", toy.BLUE)):
            steps = sorted(at for other, at in figures if other == arm)
            x = [math.log2(at) for at in steps]
            pairs = [interval([row[name] for row in figures[arm, at].values()]) for at in steps]
            lines.append((x, [mean for mean, _ in pairs], colour, 2))
            if arm == "joint":
                band = (x, [mean - half for mean, half in pairs],
                        [mean + half for mean, half in pairs])
        ticks = {math.log2(at): str(at) for at in EVERY_T}
        panels.append(toy.panel(title, "steps T", lines, band, low=0, ticks=ticks))
    legend = [("hand-made", toy.GREY), (f"joint, trained at T = {T}", toy.BLUE),
              ("95% interval of joint", toy.PALE)]
    toy.draw_panels(path, panels, legend)


def draw_frontier(path, figures):
    """Held-out against diversity: the sweep of tau_s by hand as lines, each arm as a point."""
    lines, points, labels = [], [], []
    for steps in (T, 32):
        sweep = sorted([mean_of(figures[arm, steps], name) for name in ("diversity", "held_out")]
                       for arm in BY_HAND if (arm, steps) in figures)
        x, y = [point[0] for point in sweep], [point[1] for point in sweep]
        lines.append((x, y, toy.GREY, 2))
        labels.append((x[0], y[0] + 0.02, f"tau_s by hand, T = {steps}"))
    for arm in (*TRAINED, "best by hand"):
        worlds = figures.get((arm, T), {})
        # Without the KL there is no diversity to show. Without exploration it is model only again.
        hidden = "no KL" in arm or "no exploration" in arm or "at T" in arm
        # Fewer worlds would be another comparison.
        if len(worlds) == len(figures["joint", T]) and not hidden:
            points.append((mean_of(worlds, "diversity"), mean_of(worlds, "held_out"), arm))
    for x, y, arm in sorted(points):
        lines.append(([x], [y], toy.BLUE, 2))
        others = [(left, low, "") for left, low, _ in points if (left, low) != (x, y)]
        labels.append((x, free_height(x, y, arm, [*labels, *others]), arm))
    title = "held-out p(c | image) against diversity: up and to the right is better"
    picture = toy.panel(title, "diversity", lines, labels=labels, width=840, height=520)
    toy.save_whole(path, lambda part: picture.save(part, format="PNG"))


def free_height(x, y, text, taken):
    """Where near y a label that starts at x covers none of `taken`: [(x, y, text)]."""
    letter, line = 0.0009, 0.015  # the size of a letter, about, in diversity and in held-out
    for shift in (0, 1, -1, 2, -2, 3, -3):
        low = y + shift * line
        if all(abs(low - height) >= line or left > x + letter * len(text)
               or x > left + letter * len(other) for left, height, other in taken):
            return low
    return y


def main(argv=None):
    sys.stdout.reconfigure(errors="replace")  # a terminal without ± shows ? in its place
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="as for cogrpo.py: a folder with MNIST, or drawn")
    parser.add_argument("--out", default="ablation", help="where ablation.csv is, or will be")
    parser.add_argument("--cache", default="cache", help="where worlds are kept")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu")
    parser.add_argument("--seed", type=int, default=4, help="of the first world")
    parser.add_argument("--worlds", type=int, default=6)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, metavar="ARM",
                        help="some of the arms: " + "; ".join(ARMS))
    parser.add_argument("--quick", action="store_true", help="small worlds, short trainings")
    args = parser.parse_args(argv)
    size = toy.QUICK if args.quick else toy.Size()
    out, path = Path(args.out), Path(args.out) / "ablation.csv"
    for folder in (out, Path(args.cache)):
        folder.mkdir(parents=True, exist_ok=True)
    kind = "drawn" if args.data == "drawn" else "mnist"
    alike = repr([kind, Settings(), size, args.quick, TRAINED, BY_HAND])
    key = hashlib.sha256(alike.encode()).hexdigest()[:12]
    if any(row["settings"] != key for row in read_csv(path)):
        parser.error(f"--out {out}: its ablation.csv is of other settings; name another folder")
    device = cogrpo.pick_device(args.device)
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
