"""What Co-GRPO costs on top of the model's own passes: time, memory, rows to a quality.

    python -m experiments.benchmark                    time and memory; no data
    python -m experiments.benchmark --rows             rows of the model to a held-out of 0.30

On a GPU where there is one.

Times are of a random model of the toy job's size, against the bare passes of the same model with
the same shapes, taken in turns: the ratio is the figure, for an absolute time is of this machine.
"""
import argparse
import os
import statistics
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import toy_reward as toy
from cogrpo import MDM, Schedule, Settings, iterate, prepare, rollout, sample, train, update
from experiments.ablation import a_base


def a_job(device, dim=96, depth=3, vocab=128, seq_len=49):
    """A model with random weights, a reward and ten conditions."""
    torch.manual_seed(0)
    model = MDM(seq_len, vocab, 10, dim, depth).to(device)
    return model, lambda x, c: torch.rand(len(c), device=device), torch.arange(10, device=device)


def clock(function, device):
    """Milliseconds that it takes."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def in_turns(functions, device, repeats):
    """Median milliseconds of each function, called in turns; the first turn does not count."""
    times = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            times[name].append(clock(function, device))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def time_an_iteration(device, repeats=8):
    """Lines: rollout, re-scoring and iteration against the passes that they need."""
    model, reward_fn, conds = a_job(device)
    s = Settings(iters=1000)
    state = trained, schedule, reference, _ = prepare(model, conds, s)
    cond = conds.repeat_interleave(s.group_size)
    tokens, trajectory = rollout(trained, schedule, cond, s.steps)
    rollouts = [(tokens, trajectory, cond, torch.randn(len(cond), device=device))]
    still = torch.optim.SGD([{"params": list(p.parameters())} for p in (trained, schedule)], 0.0)
    twice = torch.cat([cond, cond])

    def forward():
        with torch.no_grad():
            for step in trajectory:
                trained(step.canvas.repeat(2, 1), twice)

    def backward():
        for step in trajectory:
            with torch.no_grad():
                reference(step.canvas, cond)
            trained(step.canvas.repeat(2, 1), twice).sum().backward()

    ms = in_turns({
        "rollout": lambda: rollout(trained, schedule, cond, s.steps),
        "forward": forward,
        "update": lambda: update(trained, schedule, reference, still, rollouts, s),
        "backward": backward,
        "iteration": lambda: iterate(1, state, reward_fn, conds, s)}, device, repeats)
    lines = [f"T = {s.steps}, {s.groups} groups of {s.group_size}, 49 tokens of 128, {device}", "",
             "| | ms | bare passes, ms | ratio |", "|---" * 4 + "|"]
    for name, ours, bare in (("rollout", ms["rollout"], ms["forward"]),
                             ("update", ms["update"], ms["backward"]),
                             ("iteration", ms["iteration"], ms["forward"] + ms["backward"])):
        lines.append(f"| {name} | {ours:.0f} | {bare:.0f} | {ours / bare:.2f} |")
    return lines


def time_a_sampler(device, steps=8, repeats=8):
    """What `sample` adds to the model's passes, in ms an image."""
    model, _, conds = a_job(device)
    cond = conds.repeat(12)
    schedule = Schedule().to(device)
    canvas = torch.full((len(cond), model.seq_len), model.mask_id, device=device).repeat(2, 1)
    twice = torch.cat([cond, cond])

    @torch.no_grad()
    def bare():
        for _ in range(steps):
            model(canvas, twice)

    ms = in_turns({"sample": lambda: sample(model, schedule, cond, steps), "bare": bare}, device,
                  repeats)
    each = (ms["sample"] - ms["bare"]) / len(cond)
    return [f"sampling at T = {steps}: {ms['sample'] / ms['bare']:.2f} of the bare passes, "
            f"{each:.2f} ms an image on top of {ms['bare'] / len(cond):.2f}"]


def peak_memory(device, s):
    """MB that two iterations need beyond what was there: of the GPU, or of this process (Linux)."""
    def used(name):
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2 ** 20
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) / 2 ** 10

    model, reward_fn, conds = a_job(device)
    before = used("VmRSS:")
    train(model, reward_fn, conds, s)
    return used("VmHWM:") - before


def measure_memory(device):
    """Lines: peak memory over T, and over the size of the micro-batches."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # glibc: what is freed is given back
    lines = ["| T | micro_groups | peak memory, MB |", "|---" * 3 + "|"]
    for T, size in ((4, 0), (8, 0), (16, 0), (32, 0), (4, 5), (4, 2), (4, 1)):
        s = replace(Settings(iters=2), steps=T, micro_groups=size)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a process's peak never falls
            lines.append(f"| {T} | {size} | {pool.submit(peak_memory, device, s).result():.0f} |")
    return lines


class Alive(TorchDispatchMode):
    """Bytes of all tensors that were made in it and are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if torch.is_tensor(x) and x.untyped_storage()._cdata not in self.sizes:
                storage = x.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return result

    def free(self, key):
        self.now -= self.sizes.pop(key)


def count_logits(B=16, L=8, V=16384):
    """Lines: the peak of a rollout and of an update, in tensors of [B, L, V]."""
    lines = [f"| V = {V:,} | rollout | update |", "|---" * 3 + "|"]
    for guided in (False, True):
        model, _, conds = a_job(torch.device("cpu"), dim=8, depth=1, vocab=V, seq_len=L)
        if not guided:
            model.null_cond = None
        s = Settings()
        trained, schedule, reference, optimizer = prepare(model, conds, s)
        cond = conds[torch.arange(B) % 10]
        with Alive() as first:
            tokens, trajectory = rollout(trained, schedule, cond, s.steps)
        rollouts = [(tokens, trajectory, cond, torch.randn(B))]
        with Alive() as second:
            update(trained, schedule, reference, optimizer, rollouts, s)
        tensors = [alive.peak / (4 * B * L * V) for alive in (first, second)]
        name = f"{'with' if guided else 'no'} guidance"
        lines.append(f"| {name} | {tensors[0]:.1f} | {tensors[1]:.1f} |")
    return lines


def count_rows(model):
    """A list whose only number counts the rows through a model, a backward pass counted twice."""
    rows = [0]

    def hook(module, args, output):
        rows[0] += len(args[0]) * (3 if output.requires_grad else 1)
    model.register_forward_hook(hook)
    return rows


def rows_to(target, args, seed, device):
    """A line: rows until the mean held-out of five iterations reaches the target."""
    world, base = a_base(args.out, args.data, toy.Size(), seed, device)
    s = Settings(seed=seed)
    conds = torch.arange(toy.CLASSES, device=device)
    state = prepare(base, conds, s)
    both = count_rows(state[0]), count_rows(state[2])
    held_out = []
    for i in range(s.iters):
        _, rollouts = iterate(i, state, world.reward, conds, s)
        held_out += [float(world.held_out(tokens, cond).mean()) for tokens, _, cond, _ in rollouts]
        if statistics.fmean(held_out[-5:]) >= target:
            return f"seed {seed}: {i + 1} iterations, {both[0][0] + both[1][0]} rows"
    return f"seed {seed}: not within {s.iters} iterations"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", action="store_true", help="rows to a held-out of 0.30 instead")
    parser.add_argument("--data", help="for --rows, as for cogrpo.py")
    parser.add_argument("--out", default="ablation", help="for --rows: where base-SEED.pt is kept")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.rows:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        lines = [rows_to(0.30, args, seed, device) for seed in range(3)]
    else:
        lines = [*time_an_iteration(device), "", *time_a_sampler(device), "",
                 *measure_memory(device), "", *count_logits()]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
