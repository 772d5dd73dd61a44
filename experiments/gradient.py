"""The gradient against enumeration: worlds so small that every trajectory can be written down.

    python -m experiments.gradient     bias and variance of the two likelihoods, as a table

Three tokens of two or three values, one token kept a step, a random model, a random table of
rewards, and fixed actions a_t. The true gradient of E[R] comes from all trajectories, by formulas
that know nothing of thresholds. test_gradient.py holds the real updates against it. "fill" is the
likelihood of cogrpo.py, "exact" that of exact.py.
"""
import itertools
import math

import numpy as np
import torch
import torch.nn as nn

import cogrpo
from cogrpo import MDM, Schedule, Settings, Step, constrain, observe, unconstrain
from experiments import exact

UPDATES = {"fill": cogrpo.update, "exact": exact.update}


def a_model(V, seed, sharp=1.5):
    """A random MDM of three tokens in float64, far from uniform, so that no term vanishes."""
    torch.manual_seed(seed)
    model = MDM(3, V, 1, dim=16, depth=1, heads=2).double().eval()
    with torch.no_grad():
        for p in (model.token.weight, model.cond.weight, model.position):
            p.normal_()
        model.head.weight.mul_(sharp)
        for block in model.blocks.layers:  # its output starts at 0: let positions see each other
            block.self_attn.out_proj.weight.normal_(std=0.25)
            block.linear2.weight.normal_(std=0.25)
    return model


def a_schedule(seed, reacts=0.3, hand_made=cogrpo.hand_made):
    """A schedule whose mean depends on the canvas, and so on theta."""
    torch.manual_seed(seed)
    schedule = Schedule(hand_made).double()
    nn.init.normal_(schedule.residual[2].weight, std=reacts)
    return schedule


def a_world(seed, T=2, V=2, tau_r=1.0, reacts=0.3):
    """A random model, schedule, actions [T, 4] and table of rewards [V, V, V]."""
    def hand_made(t, T):
        return 1.05 - (t + 1) / T, 0.8 + 0.1 * (t + 1) / T, tau_r, 0.7
    model, schedule = a_model(V, seed), a_schedule(seed + 1, reacts, hand_made)
    torch.manual_seed(seed + 2)
    actions = torch.stack([unconstrain(hand_made(t, T)) for t in range(T)])
    actions += 0.2 * torch.randn(T, 4) * torch.tensor([0, 1, 0, 1])  # r stays: one token a step
    return model, schedule, actions, torch.randn(V, V, V, dtype=torch.float64)


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


def gradient(module):
    return flat(torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters())


def no_step(model, schedule):
    """An optimizer of learning rate 0: what is looked at is the gradient."""
    return torch.optim.SGD([{"params": list(part.parameters())} for part in (model, schedule)], 0.0)


def has_effect(t, T):
    return torch.tensor([t < T - 1, True, t < T - 1, True])


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
    _, tau_s, tau_r, w = constrain(action)
    tokens = torch.tensor([canvas])
    l_c = model(tokens, torch.tensor([0]))[0]
    l_u = model(tokens, torch.tensor([model.null_cond]))[0]
    logits = (1 + w) * l_c - w * l_u
    p = (logits / tau_s).softmax(1)
    score = logits.log_softmax(1) / tau_r
    p_phi, _ = schedule(observe(l_c[None], tokens == model.mask_id), t, T)
    density = p_phi.log_prob(action)[0][has_effect(t, T)].sum().exp()
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
    tau_r = float(constrain(action)[2])
    grid = np.arange(-3.1, 4 + 4 / tau_r, SPACING)  # the colder the ranking, the further it goes
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
                confidence = [-math.inf] * L
                for i in kept:
                    confidence[i] = threshold + 1.0
                confidence[last] = threshold
                did = canvas, candidate, [i in kept for i in range(L)], confidence
                longer.append((weight * odds, after, path + [did]))
        paths = longer
    trajectory = []
    for t in range(T):
        canvas = torch.tensor([path[t][0] for _, _, path in paths])
        candidate = torch.tensor([path[t][1] for _, _, path in paths])
        filled = torch.tensor([path[t][2] for _, _, path in paths])
        confidence = torch.tensor([path[t][3] for _, _, path in paths], dtype=torch.float64)
        unseen = torch.zeros(len(paths), 3, dtype=torch.float64)  # theta's update does not use it
        trajectory.append(Step(t, T, canvas, canvas == model.mask_id, unseen,
                               actions[t].expand(len(paths), 4), has_effect(t, T), candidate,
                               confidence, filled))
    tokens = torch.tensor([after for _, after, _ in paths])
    return torch.stack([weight for weight, _, _ in paths]), tokens, trajectory


def true_gradient(model, schedule, actions, table):
    """(E[R] and its gradient under the actions, each times their density; the density).

    The density of the actions depends on theta as well, through the schedule's observation.
    """
    probability, tokens, _ = every_trajectory(model, schedule, actions, in_every_order)
    J = (probability * table[tuple(tokens.T)]).sum()
    gradient = flat(torch.autograd.grad(J, list(model.parameters())))
    return J.detach(), gradient, probability.sum().detach()


def step_log_prob(likelihood, model, schedule, step):
    """log p of a step [B] as the update sees it: under `exact` with that of the action."""
    cond = torch.zeros(len(step.canvas), dtype=torch.long)
    l_c, l_u = cogrpo.cond_uncond(model, step.canvas, cond)
    if likelihood == "fill":
        return (cogrpo.model_likelihood(l_c, l_u, step) * step.filled).sum(1)
    logits = cogrpo.guided_logits(l_c, l_u, constrain(step.action)[:, 3])
    log_theta = exact.exact_log_prob(logits, step).sum(1)
    return log_theta + exact.observed_log_prob(schedule, l_c, step)


def as_seen_by(likelihood, model, schedule, actions):
    """All trajectories: (probability [N] without graph, tokens [N, L], `Step`s)."""
    if likelihood == "fill":
        p, tokens, trajectory = every_trajectory(model, schedule, actions, in_every_order)
        return p.detach(), tokens, trajectory
    weight, tokens, trajectory = every_trajectory(model, schedule, actions, at_every_threshold)
    log_p = sum(step_log_prob("exact", model, schedule, step) for step in trajectory)
    return weight * log_p.exp().detach(), tokens, trajectory


def gradient_of_update(likelihood, model, schedule, actions, table):
    """What the real update does, summed over all trajectories with their probabilities."""
    p, tokens, trajectory = as_seen_by(likelihood, model, schedule, actions)
    N, L = tokens.shape
    # The loss of `update` is -sum_i advantage_i log p_i / (N L): give it weighted rewards.
    weighted = p * table[tuple(tokens.T)] * N * L
    rollouts = [(tokens, trajectory, torch.zeros(N, dtype=torch.long), weighted)]
    optimizer, s = no_step(model, schedule), Settings(beta=0)
    with unclipped():
        UPDATES[likelihood](model, schedule, model, optimizer, rollouts, s, "model")
    return -gradient(model)


def unclipped():
    """Within it, `update` does not clip its gradients."""
    return exact.mock.patch.object(nn.utils, "clip_grad_norm_", lambda *_: torch.zeros(()))


def scores(likelihood, model, schedule, trajectory):
    """grad log p of each trajectory: [N, parameters]. What many share is computed once."""
    theta, total = list(model.parameters()), 0
    for step in trajectory:
        did = torch.cat([step.canvas, step.candidate, step.filled,
                         step.confidence.masked_fill(~step.filled, 0)], 1)
        _, which = did.unique(dim=0, return_inverse=True)
        first = torch.zeros(int(which.max()) + 1, dtype=torch.long)
        first[which] = torch.arange(len(which))  # a row of each kind
        rows = []
        for i in first.split(32):
            one = Step(step.t, step.T, step.canvas[i], step.masked[i], step.observation[i],
                       step.action[i], step.has_effect, step.candidate[i], step.confidence[i],
                       step.filled[i])
            log_p = step_log_prob(likelihood, model, schedule, one)
            rows += [flat(torch.autograd.grad(x, theta, retain_graph=True)) for x in log_p]
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
    estimator = advantage[:, None] * scores(likelihood, model, schedule, trajectory)
    mean, square = p @ estimator, p @ estimator.square().sum(1)
    bias = (mean - true).norm() / true.norm()
    return float(bias), float((square - mean.square().sum()) / true.square().sum())


def main():
    print("L = 3, V = 2, T = 2, one token kept a step; means over 20 random worlds\n")
    print("| tau_r | bias of fill | bias of exact | variance of fill | variance of exact |")
    print("|---" * 5 + "|")
    for tau_r in (0.3, 1.0, 3.0, 10.0):
        fill = np.mean([bias_and_variance("fill", seed, tau_r) for seed in range(20)], 0)
        exact_ = np.mean([bias_and_variance("exact", seed, tau_r) for seed in range(20)], 0)
        print(f"| {tau_r:g} | {fill[0]:.3f} | {exact_[0]:.0e} | {fill[1]:.1f} | {exact_[1]:.1f} |")


if __name__ == "__main__":
    main()
