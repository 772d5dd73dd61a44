"""How much of a difference between two runs is luck? One world, one setting, eight seeds.

    python -m experiments.noise --data DIR --seed 4 --runs 8      a table

The world (digits, codebook, reward models, pretrained model) and the samples' seed stay the same;
the seed of Co-GRPO alone differs.
"""
import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import torch

import toy_reward as toy
from cogrpo import Settings, train
from experiments.ablation import a_base, measure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="as for cogrpo.py: a folder with MNIST, or drawn")
    parser.add_argument("--out", default="ablation", help="where base-SEED.pt is, or will be")
    parser.add_argument("--seed", type=int, default=4, help="of the world")
    parser.add_argument("--runs", type=int, default=8, help="runs of Co-GRPO, at least 2")
    parser.add_argument("--quick", action="store_true", help="a small world, short trainings")
    args = parser.parse_args(argv)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    settings = Settings(iters=6, group_size=8) if args.quick else Settings()
    size = toy.QUICK if args.quick else toy.Size()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world, base = a_base(args.out, args.data, size, args.seed, device)
    conds = torch.arange(toy.CLASSES, device=device)
    rows = []
    for seed in range(args.runs):
        s = replace(settings, seed=seed)
        model, schedule, _ = train(base, world.reward, conds, s)
        figures = measure(world, model, schedule, s.steps, size.eval_samples, args.seed)
        rows.append(figures)
        print(f"seed {seed}: " + ", ".join(f"{name} {figures[name]:.3f}" for name in toy.FIGURES))
    print(f"\n| {args.runs} seeds of Co-GRPO in one world | mean | standard deviation |")
    print("|---|---|---|")
    for name in toy.FIGURES:
        values = [row[name] for row in rows]
        print(f"| {name} | {statistics.fmean(values):.3f} | {statistics.stdev(values):.3f} |")


if __name__ == "__main__":
    main()
