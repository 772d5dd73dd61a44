"""Several processes: each makes rollouts of its own, and the gradients are averaged.

    torchrun --nproc_per_node=2 -m experiments.distributed      a small example, on CPU or CUDA

cogrpo.py has no line of it: a hook averages the gradients before each step of the optimizer. Each
process clips its own gradient before that. The conditions are dealt out to the processes, and the
groups of an iteration are divided among them. For DDP or FSDP, wrap the backbone inside your model.
"""
import os
from dataclasses import replace

import torch
import torch.distributed as dist

from cogrpo import MDM, Settings, UserError, iterate, prepare


def broadcast(module):
    """All processes take the parameters and buffers of rank 0."""
    for x in (*module.parameters(), *module.buffers()):
        x = x.detach()
        for dimension, stride in enumerate(x.stride()):
            if stride == 0:  # an expanded tensor has one element there
                x = x.narrow(dimension, 0, 1)
        whole = x.contiguous().clone()  # of a slice, whose memory has gaps
        dist.broadcast(whole, 0)
        x.copy_(whole)


def average_gradients(optimizer, args, kwargs):
    """Before a step: each gradient becomes its mean over the processes; a missing one counts as 0.

    Parameters that no process has a gradient for keep none: their policy does not learn now.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    count = torch.tensor([float(p.grad is not None) for p in parameters])
    count = count.to(parameters[0].device)
    dist.all_reduce(count)
    for p, n in zip(parameters, count.tolist()):
        if n > 0:
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            gradient = gradient.contiguous()
            dist.all_reduce(gradient)
            p.grad = gradient / dist.get_world_size()


def train(model, reward_fn, conds, s):
    """`cogrpo.train` over all processes of the group: (learner, schedule, log of this process).

    conds and s are those of the whole job, the same on all processes. UserError if they cannot be
    divided: groups must be a multiple of the processes, and conds no fewer than them.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if s.groups % ranks or len(conds) < ranks:
        raise UserError(f"{ranks} processes: groups={s.groups} must be a multiple of that, and the "
                        f"{len(conds)} conds at least as many")
    broadcast(model)
    mine = conds[rank::ranks]
    state = learner, schedule, _, optimizer = prepare(model, mine, s)
    optimizer.register_step_pre_hook(average_gradients)
    my_settings = replace(s, groups=s.groups // ranks, seed=s.seed * ranks + rank)
    log = []
    for i in range(s.iters):
        metrics, _ = iterate(i, state, reward_fn, mine, my_settings)
        log.append(metrics)
    return learner, schedule, log


def neighbours(tokens, cond):
    """The reward of the README's example: neighbours differ under 0, are equal under 1."""
    differ = (tokens[:, 1:] != tokens[:, :-1]).float().mean(1)
    return torch.where(cond == 0, differ, 1 - differ)


def main():
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    # gloo also where there is a card for each: two processes may share one
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    model = MDM(seq_len=8, vocab_size=3, num_conds=2, dim=32, depth=1).to(device)
    s = Settings(iters=60, groups=2 * dist.get_world_size(), lr=3e-3, beta=0.2)
    conds = torch.arange(2, device=device).repeat_interleave(dist.get_world_size())
    learner, _, log = train(model, neighbours, conds, s)
    weights = torch.cat([p.detach().flatten() for p in learner.parameters()])
    first = weights.clone()
    dist.broadcast(first, 0)
    print(f"rank {dist.get_rank()}: reward {log[0]['reward']:.2f} -> {log[-1]['reward']:.2f}, "
          f"weights differ from rank 0's by {float((weights - first).abs().max()):g}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
