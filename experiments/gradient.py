"""The gradient against enumeration: worlds so small that every trajectory can be written down.

    python -m experiments.gradient     bias and variance of the two likelihoods, as a table

Three tokens of two or three values, one token kept a step, a random model, a random table of
rewards, and fixed actions a_t. The true gradient of E[R] comes from all trajectories, by formulas
that know nothing of thresholds. test_gradient.py holds the real `update` against it.
"""
import itertools
import math

import numpy as np
import torch
from torch.distributions import Normal

import cogrpo
from cogrpo import Settings, Step, update
from test_cogrpo import a_model, a_schedule, flat, plain, rescored


def a_world(seed, T=2, V=2, tau_r=1.0, reacts=0.3):
    """A random model, schedule, actions [T, 4] and table of rewards [V, V, V].

    reacts: how much the schedule's mean depends on the canvas, and so on theta.
    """
    model = a_model(3, V, 1, seed=seed, sharp=1.5).cpu()
    schedule = a_schedule(seed + 1, scale=reacts, hand_made=lambda t, T: (
        1.05 - (t + 1) / T, 0.8 + 0.1 * (t + 1) / T, tau_r, 0.7)).cpu()
    torch.manual_seed(seed + 2)
    actions = torch.stack([schedule.prior(t, T, model.position) for t in range(T)])
    actions += 0.2 * torch.randn(T, 4) * torch.tensor([0, 1, 0, 1])  # r stays: one token a step
    return model, schedule, actions, torch.randn(V, V, V, dtype=torch.float64)


def acting(count, t, T):
    """Which of r, tau_s, tau_r, w act, where `count` tokens are masked."""
    choice = count > 1 and t < T - 1
    return [choice, True, choice, True]


def kept_count(model, canvas, action, t, T):
    """(masked positions, how many of them are kept)."""
    masked = [i for i in range(model.seq_len) if canvas[i] == model.mask_id]
    left = math.floor(float(action[0].sigmoid()) * model.seq_len)
    return masked, len(masked) if t == T - 1 else max(1, len(masked) - left)


def in_every_order(model, schedule, canvas, action, t, T):
    """All that a step can do to a canvas, by Plackett-Luce: no threshold in sight.

    A candidate for every masked position, then the kept ones one by one, each with odds
    exp(score) among those that remain. Yields (probability with its graph and the density of the
    action, candidate [L], kept positions, the last of them, 0).
    """
    masked, keep = kept_count(model, canvas, action, t, T)
    all_kept = keep == len(masked)
    tau_s, tau_r, w = torch.log1p(action[1:].exp())
    tokens = torch.tensor([canvas])
    l_c = model(tokens, torch.tensor([0]))[0]
    l_u = model(tokens, torch.tensor([model.null_cond]))[0]
    logits = (1 + w) * l_c - w * l_u
    p = (logits / tau_s).softmax(1)
    score = logits.log_softmax(1) / tau_r
    is_masked = torch.tensor([[i in masked for i in range(model.seq_len)]])
    mean = schedule(cogrpo.canvas_statistics(l_c[None].log_softmax(2), is_masked), t, T)[0]
    acts = acting(len(masked), t, T)
    density = Normal(mean, schedule.spread).log_prob(action)[acts].sum().exp()
    for values in itertools.product(range(l_c.shape[1]), repeat=len(masked)):
        candidate = dict(zip(masked, values))
        chance = density * math.prod(p[i, v] for i, v in candidate.items())
        orders = [tuple(masked)] if all_kept else itertools.permutations(masked, keep)
        for kept in orders:
            odds, among = chance, list(masked)
            for i in () if all_kept else kept:
                weight = {j: score[j, candidate[j]].exp() for j in among}
                odds = odds * weight[i] / sum(weight.values())
                among.remove(i)
            yield odds, [candidate.get(i, 0) for i in range(model.seq_len)], kept, kept[-1], 0.0


SPACING = 0.3  # of the grid below


def at_every_threshold(model, schedule, canvas, action, t, T):
    """The same step as `exact` sees it: kept tokens, the last of them, and the threshold.

    The probability is the weight of a quadrature node alone: with threshold = tau_r (exp(-x) - x)
    an even grid of x is exact to nine digits.
    """
    masked, keep = kept_count(model, canvas, action, t, T)
    all_kept = keep == len(masked)
    tau_r = float(torch.log1p(action[2].exp()))
    grid = np.arange(-3.1, 4 + 4 / tau_r, SPACING)  # the colder the ranking, the further scores go
    nodes = [(tau_r * (math.exp(-x) - x), SPACING * (1 + math.exp(-x))) for x in grid]
    for kept in itertools.combinations(masked, keep):
        for values in itertools.product(range(model.mask_id), repeat=keep):
            candidate = dict(zip(kept, values))
            tokens = [candidate.get(i, 0) for i in range(model.seq_len)]
            if all_kept:
                yield 1.0, tokens, kept, kept[-1], 0.0
                continue
            for last, (node, weight) in itertools.product(kept, nodes):
                yield weight, tokens, kept, last, node


def every_trajectory(model, schedule, actions, transitions):
    """(product of the probabilities [N], tokens [N, L], `Step`s with a row for each trajectory)."""
    L, T, known = model.seq_len, len(actions), {}
    paths = [(torch.ones((), dtype=torch.float64), (model.mask_id,) * L, [])]
    for t in range(T):
        longer = []
        for weight, canvas, path in paths:
            if (canvas, t) not in known:
                known[canvas, t] = list(transitions(model, schedule, canvas, actions[t], t, T))
            for odds, candidate, kept, last, threshold in known[canvas, t]:
                after = tuple(candidate[i] if i in kept else canvas[i] for i in range(L))
                score = [-math.inf] * L
                for i in kept:
                    score[i] = threshold + 1.0
                score[last] = threshold
                did = canvas, candidate, [i in kept for i in range(L)], score
                longer.append((weight * odds, after, path + [did]))
        paths = longer
    trajectory = []
    for t in range(T):
        canvas = torch.tensor([path[t][0] for _, _, path in paths])
        candidate = torch.tensor([path[t][1] for _, _, path in paths])
        filled = torch.tensor([path[t][2] for _, _, path in paths])
        score = torch.tensor([path[t][3] for _, _, path in paths], dtype=torch.float64)
        masked = canvas == model.mask_id
        acts = torch.tensor([acting(count, t, T) for count in masked.sum(1).tolist()])
        action = actions[t].expand(len(paths), 4)
        trajectory.append(Step(canvas, masked, acts, None, action, candidate, score, filled))
    tokens = torch.tensor([after for _, after, _ in paths])
    return torch.stack([weight for weight, _, _ in paths]), tokens, trajectory


def true_gradient(model, schedule, actions, table):
    """(E[R] and its gradient under the actions, each times their density; the density).

    The density of the actions depends on theta as well, through the schedule's statistics.
    """
    probability, tokens, _ = every_trajectory(model, schedule, actions, in_every_order)
    J = (probability * table[tuple(tokens.T)]).sum()
    gradient = flat(torch.autograd.grad(J, list(model.parameters())))
    return J.detach(), gradient, probability.sum().detach()


def total_log_prob(model, schedule, trajectory, likelihood):
    """log p of each trajectory [N] by the code of cogrpo.py; `exact` has that of the actions."""
    cond = torch.zeros(len(trajectory[0].canvas), dtype=torch.long)
    total = 0
    for t, step in enumerate(trajectory):
        log_theta, log_phi = rescored(model, schedule, step, t, len(trajectory), cond, likelihood)
        total = total + log_theta.sum(1)
        if likelihood == "exact":
            total = total + log_phi
    return total


def as_seen_by(likelihood, model, schedule, actions):
    """All trajectories, (probability [N] without graph, tokens [N, L], `Step`s)."""
    if likelihood == "fill":
        p, tokens, trajectory = every_trajectory(model, schedule, actions, in_every_order)
        return p.detach(), tokens, trajectory
    weight, tokens, trajectory = every_trajectory(model, schedule, actions, at_every_threshold)
    log_p = total_log_prob(model, schedule, trajectory, "exact")
    return weight * log_p.exp().detach(), tokens, trajectory


def gradient_of_update(likelihood, model, schedule, actions, table):
    """What the real `update` does, summed over all trajectories with their probabilities."""
    p, tokens, trajectory = as_seen_by(likelihood, model, schedule, actions)
    N, L = tokens.shape
    cond = torch.zeros(N, dtype=torch.long)
    with torch.no_grad():
        for t, step in enumerate(trajectory):
            step.old_model, step.old_schedule = rescored(model, schedule, step, t, len(actions),
                                                         cond, likelihood)
    # The loss of `update` is -sum_i advantage_i log p_i / (N L): give it weighted rewards.
    weighted = p * table[tuple(tokens.T)] * N * L
    s = Settings(likelihood=likelihood, kl_model=0, grad_norm=1e9)
    parts = [(trajectory, cond, weighted)]
    update(model, schedule, model, plain(model, schedule), parts, s, "model")
    return -flat(torch.zeros_like(q) if q.grad is None else q.grad for q in model.parameters())


def scores(model, schedule, trajectory, likelihood):
    """grad log p of each trajectory: [N, parameters]. What many share is computed once."""
    theta, T, total = list(model.parameters()), len(trajectory), 0
    cond = torch.zeros(1, dtype=torch.long)
    for t, step in enumerate(trajectory):
        did = torch.cat([step.canvas, step.candidate, step.filled,
                         step.score.masked_fill(~step.filled, 0)], 1)
        _, which = did.unique(dim=0, return_inverse=True)
        rows = []
        for k in range(int(which.max()) + 1):
            i = int((which == k).nonzero()[0])
            one = Step(step.canvas[i:i + 1], step.masked[i:i + 1], step.acts[i:i + 1], None,
                       step.action[i:i + 1], step.candidate[i:i + 1], step.score[i:i + 1],
                       step.filled[i:i + 1])
            log_theta, log_phi = rescored(model, schedule, one, t, T, cond, likelihood)
            log_p = log_theta.sum() + (log_phi.sum() if likelihood == "exact" else 0)
            rows.append(flat(torch.autograd.grad(log_p, theta)))
        total = total + torch.stack(rows)[which]
    return total


def bias_and_variance(likelihood, seed, tau_r):
    """Of the estimator (R - E[R]) grad log p of one rollout: its relative bias, and its variance
    in units of the true gradient's squared norm. The schedule does not react to the canvas."""
    world = model, schedule, actions, table = a_world(seed, tau_r=tau_r, reacts=0)
    J, true, density = true_gradient(*world)  # the density is one constant here
    J, true = J / density, true / density
    p, tokens, trajectory = as_seen_by(likelihood, model, schedule, actions)
    p = p / density
    advantage = table[tuple(tokens.T)] - J
    estimator = advantage[:, None] * scores(model, schedule, trajectory, likelihood)
    mean, square = p @ estimator, p @ estimator.square().sum(1)
    bias = (mean - true).norm() / true.norm()
    return float(bias), float((square - mean.square().sum()) / true.square().sum())


def main():
    print("L = 3, V = 2, T = 2, one token kept a step; means over 20 random worlds\n")
    print("| tau_r | bias of fill | bias of exact | variance of fill | variance of exact |")
    print("|---" * 5 + "|")
    for tau_r in (0.3, 1.0, 3.0, 10.0):
        fill = np.mean([bias_and_variance("fill", seed, tau_r) for seed in range(20)], 0)
        exact = np.mean([bias_and_variance("exact", seed, tau_r) for seed in range(20)], 0)
        print(f"| {tau_r:g} | {fill[0]:.3f} | {exact[0]:.0e} | {fill[1]:.1f} | {exact[1]:.1f} |")


if __name__ == "__main__":
    main()
