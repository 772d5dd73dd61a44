"""Proofs on worlds small enough to enumerate: what each likelihood's gradient is, and is not."""
import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import cogrpo
from cogrpo import Schedule, Settings, cond_uncond, constrain, observe, rollout
from experiments import exact, gradient
from experiments.gradient import (UPDATES, a_model, a_schedule, a_world, as_seen_by,
                                  bias_and_variance, every_trajectory, flat, gradient_of_update,
                                  in_every_order, no_step, scores, step_log_prob, true_gradient,
                                  unclipped)


@pytest.mark.parametrize("T, V, seed, spacing, error", [
    (2, 2, 0, 0.3, 1e-8), (2, 2, 1, 0.3, 1e-8), (2, 3, 0, 0.3, 1e-8), (3, 2, 0, 0.6, 1e-4)])
def test_the_exact_likelihood_gives_the_true_gradient(T, V, seed, spacing, error, monkeypatch):
    """All that a step decided, and the schedule's view of theta: then the estimator of the real
    update is the gradient of the expected reward, but for the quadrature over thresholds."""
    monkeypatch.setattr(gradient, "SPACING", spacing)
    world = a_world(seed, T, V)
    _, true, _ = true_gradient(*world)
    assert (gradient_of_update("exact", *world) - true).norm() < error * true.norm()


def test_the_fill_likelihood_misses_it_less_so_the_hotter_the_ranking():
    """The paper's drops which candidates were kept: a bias that fades as tau_r grows."""
    for tau_r, low, high in ((0.3, 0.15, 2.0), (3.0, 0.02, 0.2), (100.0, 0.0, 0.01)):
        bias = np.mean([bias_and_variance("fill", seed, tau_r)[0] for seed in range(4)])
        assert low < bias < high


def test_the_fill_likelihood_misses_the_schedules_view_too():
    """Where ranking is pure noise, what is left of the bias is p_phi's: it sees theta."""
    world = a_world(0, tau_r=100.0)
    _, true, _ = true_gradient(*world)
    assert (gradient_of_update("fill", *world) - true).norm() > 0.05 * true.norm()


@pytest.mark.parametrize("likelihood", ["fill", "exact"])
def test_the_real_update_is_the_gradient_of_that_log_prob(likelihood):
    """On a real rollout: -(1 / B L) sum A-hat grad log p, with `observed_log_prob` under exact."""
    model, schedule, cond = a_model(3, 0), a_schedule(1), torch.zeros(24, dtype=torch.long)
    torch.manual_seed(0)
    tokens, trajectory = rollout(model, schedule, cond, 3)
    advantage = torch.randn(24).double()
    with unclipped():
        UPDATES[likelihood](model, schedule, model, no_step(model, schedule),
                            [(tokens, trajectory, cond, advantage)], Settings(beta=0), "model")
    got = gradient.gradient(model)
    gain = sum((advantage * step_log_prob(likelihood, model, schedule, step)).sum()
               for step in trajectory)
    wanted = flat(torch.autograd.grad(-gain / (24 * 3), list(model.parameters())))
    assert (got - wanted).norm() < 1e-9 * wanted.norm()
    assert all(p.grad is None for p in schedule.parameters())  # phi does not learn from it


def explore_by(monkeypatch, noise):
    """Let the schedule's exploration be `noise(p_phi.mean)`; all other noise stays what it is."""
    monkeypatch.setattr(Normal, "sample", lambda self: self.mean + noise(self.mean))


def test_the_sampled_estimator_converges_to_the_true_gradient(monkeypatch):
    """20,000 real rollouts and the real update: each component within its standard error."""
    world = model, schedule, actions, table = a_world(1, reacts=0)
    J, true, density = true_gradient(*world)
    draws, n = iter(actions), 20000
    explore_by(monkeypatch, lambda mean: next(draws) - mean)
    torch.manual_seed(1)
    cond = torch.zeros(n, dtype=torch.long)
    tokens, drawn = rollout(model, schedule, cond, 2)
    rollouts = [(tokens, drawn, cond, table[tuple(tokens.T)] - J / density)]
    with unclipped():
        exact.update(model, schedule, model, no_step(model, schedule), rollouts, Settings(beta=0),
                     "model")
    got = -3 * gradient.gradient(model)
    p, tokens, trajectory = as_seen_by("exact", model, schedule, actions)
    advantage = table[tuple(tokens.T)] - J / density
    estimator = advantage[:, None] * scores("exact", model, schedule, trajectory)
    error = ((p / density @ estimator.square() - (true / density).square()) / n).sqrt()
    counts = error > 1e-9  # the embedding of a token that is never seen has no gradient
    z = ((got - true / density) / error)[counts]
    assert counts.sum() > 500 and z.abs().max() < 4.5 and 0.2 < z.square().mean() < 3


def test_phis_estimator_converges_to_a_quadrature(monkeypatch):
    """T = 1, only tau_s random: J(phi) is an integral over one normal variable."""
    model, schedule, n = a_model(3, 0), a_schedule(4), 60000
    torch.manual_seed(0)
    table = torch.randn(3, 3, 3, dtype=torch.float64)
    only = torch.tensor([0, 1, 0, 0])
    explore_by(monkeypatch, lambda x: 0.3 * torch.normal(0.0, 1.0, x.shape, dtype=x.dtype) * only)
    canvas = torch.full((1, 3), model.mask_id)
    with torch.no_grad():
        l_c, l_u = cond_uncond(model, canvas, torch.zeros(1, dtype=torch.long))
    mean = schedule(observe(l_c, canvas == model.mask_id), 0, 1)[0].mean[0]
    w = constrain(mean)[3].detach()
    x, weight = [torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(40)]
    tau_s = torch.nn.functional.softplus(mean[1] + schedule.std * x)
    p = ((l_c + w * (l_c - l_u)) / tau_s[:, None, None]).softmax(2)
    value = torch.einsum("qi,qj,qk,ijk->q", p[:, 0], p[:, 1], p[:, 2], table)
    J = (value * weight).sum() / weight.sum()
    phi = list(schedule.parameters())
    true = flat(torch.autograd.grad(J, phi, retain_graph=True))
    # All rows share a canvas, so the gradient is along d mean / d phi, whatever was drawn.
    direction = flat(torch.autograd.grad(mean[1], phi))
    cond = torch.zeros(n, dtype=torch.long)
    tokens, drawn = rollout(model, schedule, cond, 1)
    advantage = table[tuple(tokens.T)] - J.detach()
    with unclipped():
        cogrpo.update(model, schedule, model, no_step(model, schedule),
                      [(tokens, drawn, cond, advantage)], Settings(schedule_beta=0), "schedule")
    got = -flat(q.grad for q in phi) @ direction / direction.square().sum()
    wanted = true @ direction / direction.square().sum()
    each = advantage * (drawn[0].action[:, 1] - mean[1].detach()) / schedule.std ** 2
    assert abs(got - wanted) < 4 * each.std() / n ** 0.5 < 0.7 * abs(wanted)


def test_the_groups_own_mean_as_a_baseline_shrinks_the_gradient_by_one_gth():
    """GRPO's mean has the sample itself in it: at G = 2 the gradient is half the true one."""
    world = model, schedule, actions, table = a_world(2, reacts=0)
    _, true, density = true_gradient(*world)
    p, tokens, trajectory = as_seen_by("exact", model, schedule, actions)
    R, p = table[tuple(tokens.T)], p / density
    S = scores("exact", model, schedule, trajectory)
    i, j = torch.meshgrid(torch.arange(len(R)), torch.arange(len(R)), indexing="ij")
    pair = torch.stack([R[i], R[j]], -1)
    weighted = (p[i] * p[j])[..., None] * (pair - pair.mean(2, keepdim=True)) / 2
    got = weighted[..., 0].sum(1) @ S + weighted[..., 1].sum(0) @ S
    wanted = true / density / 2
    assert (got - wanted).norm() < 1e-8 * wanted.norm()


@pytest.mark.parametrize("r", [0.7, 0.4])
def test_thresholds_and_orders_are_the_same_law(r):
    """A step's probabilities sum to one, and keeping given tokens is as likely by an integral
    over the threshold as by a sum over all orders and thrown-away candidates."""
    model, schedule = a_model(2, 0), Schedule(lambda t, T: (r, 0.7, 1.2, 0.5)).double()
    actions = cogrpo.unconstrain((r, 0.7, 1.2, 0.5)).expand(2, 4)
    laws = []
    for likelihood in ("fill", "exact"):  # fill: for its enumeration of orders
        p, _, trajectory = as_seen_by(likelihood, model, schedule, actions)
        after = torch.where(trajectory[0].filled, trajectory[0].candidate, model.mask_id)
        law = torch.zeros(27).double()
        laws.append(law.index_add(0, after @ torch.tensor([9, 3, 1]), p / p.sum()))
    assert (laws[0] - laws[1]).abs().max() < 1e-9
    assert (laws[0] > 0).sum() == (6 if r == 0.7 else 12)
    density = math.prod(Normal(0.0, 0.3).log_prob(torch.zeros(k)).sum().exp() for k in (4, 2))
    assert float(p.sum() / density) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("r", [0.7, 0.4])
def test_the_rollout_has_the_law_that_is_enumerated(r):
    """Chi-squared of 40,000 rollouts against every trajectory: the Gumbel noise, the confidence
    before tempering, the guidance, and who of the kept comes last all change this law."""
    values, n = (r, 0.5, 2.0, 1.5), 40000
    model, schedule = a_model(3, 0, sharp=1.0), Schedule(lambda t, T: values).double()
    actions = cogrpo.unconstrain(values).expand(2, 4)
    p, tokens, trajectory = every_trajectory(model, schedule, actions, in_every_order)
    p = (p / p.sum()).detach()  # the density of the actions is the same constant for all

    def key(steps, tokens):  # which was kept last, the canvas after a step, and the end
        kept = steps[0].confidence.masked_fill(~steps[0].filled, math.inf)
        last = kept.argmin(1, keepdim=True)
        return (torch.cat([last, steps[1].canvas, tokens], 1) * 4 ** torch.arange(7)).sum(1)
    torch.manual_seed(0)
    drawn, steps = rollout(model, schedule, torch.zeros(n, dtype=torch.long), 2, explore=False)
    expected = torch.zeros(4 ** 7).double().index_add(0, key(trajectory, tokens), n * p)
    observed = torch.bincount(key(steps, drawn), minlength=4 ** 7)
    assert observed[expected == 0].sum() == 0 and expected.sum() == pytest.approx(n)
    often = expected >= 5
    chi2 = ((observed - expected)[often].square() / expected[often]).sum()
    freedom = int(often.sum()) - 1
    assert freedom > 30 and chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_exact_equals_fill_where_a_step_keeps_all():
    """In the last step nothing is ranked: the two likelihoods are the same numbers there."""
    model, schedule, cond = a_model(3, 0), a_schedule(1), torch.zeros(16, dtype=torch.long)
    _, trajectory = rollout(model, schedule, cond, 3)
    last = trajectory[-1]
    l_c, l_u = cond_uncond(model, last.canvas, cond)
    logits = cogrpo.guided_logits(l_c, l_u, constrain(last.action)[:, 3])
    wanted = cogrpo.model_likelihood(l_c, l_u, last) * last.masked
    assert torch.equal(exact.exact_log_prob(logits, last), wanted)


def test_exact_is_in_use_within_its_context_and_nowhere_else():
    model, conds = a_model(3, 0), torch.zeros(1, dtype=torch.long)
    s = Settings(iters=1, groups=1, steps=2)
    results = []
    for context in (exact.exact(), None, None):
        if context:
            with context:
                learner, _, _ = cogrpo.train(model, lambda x, c: x.sum(1), conds, s)
        else:
            learner, _, _ = cogrpo.train(model, lambda x, c: x.sum(1), conds, s)
        results.append(flat(learner.parameters()))
    assert torch.equal(results[1], results[2]) and not torch.equal(results[0], results[1])
