"""Proofs on worlds small enough to enumerate: what each likelihood's gradient is, and is not."""
import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import cogrpo
from cogrpo import Schedule, Settings, rollout, update
from experiments import gradient
from experiments.gradient import (a_world, as_seen_by, bias_and_variance, every_trajectory,
                                  gradient_of_update, in_every_order, scores, true_gradient)
from test_cogrpo import a_model, a_schedule, conds, flat, plain, rescored


@pytest.mark.parametrize("T, V, seed, spacing, error", [
    (2, 2, 0, 0.3, 1e-8), (2, 2, 1, 0.3, 1e-8), (2, 3, 0, 0.3, 1e-8), (3, 2, 0, 0.6, 1e-4)])
def test_the_exact_likelihood_gives_the_true_gradient(T, V, seed, spacing, error, monkeypatch):
    """All that a step decided, and the schedule's view of theta: then the estimator of the real
    `update` is the gradient of the expected reward, but for the quadrature over thresholds."""
    monkeypatch.setattr(gradient, "SPACING", spacing)
    world = a_world(seed, T, V)
    _, true, _ = true_gradient(*world)
    assert (gradient_of_update("exact", *world) - true).norm() < error * true.norm()


def test_the_fill_likelihood_misses_it_less_so_the_hotter_the_ranking():
    """The paper's drops which candidates were kept: a bias that fades as tau_r grows."""
    for tau_r, low, high in ((0.3, 0.2, 2.0), (3.0, 0.02, 0.2), (100.0, 0.0, 0.01)):
        bias = np.mean([bias_and_variance("fill", seed, tau_r)[0] for seed in range(4)])
        assert low < bias < high
    assert bias_and_variance("exact", 0, 0.3)[0] < 1e-6


def test_the_fill_likelihood_misses_the_schedules_view_too():
    """Where ranking is pure noise, what is left of the bias is p_phi's: it sees theta."""
    world = a_world(0, tau_r=100.0)
    _, true, _ = true_gradient(*world)
    assert (gradient_of_update("fill", *world) - true).norm() > 0.05 * true.norm()


@pytest.mark.parametrize("likelihood", ["fill", "exact"])
def test_a_second_epoch_sees_the_schedule_as_it_is_by_then(likelihood):
    """theta's part in p_phi is taken through the schedule's present weights, in each epoch."""
    s = Settings(likelihood=likelihood, epochs=2, kl_model=0, kl_schedule=0, grad_norm=1e9)
    model, schedule, cond = a_model(), a_schedule(), conds(24)
    torch.manual_seed(0)
    _, trajectory = rollout(model, schedule, cond, 3, likelihood=likelihood)
    advantage = torch.randn(24).to(model.position)
    optimizer = plain(model, schedule)
    optimizer.param_groups[1]["lr"] = 0.1  # after the first epoch the schedule is another
    update(model, schedule, model, optimizer, [(trajectory, cond, advantage)], s)
    got = flat(p.grad for p in model.parameters())
    gain = 0
    schedule = a_schedule()  # what it was in the second epoch, before that one's step
    step = plain(model, schedule)
    step.param_groups[1]["lr"] = 0.1
    update(model, schedule, model, step, [(trajectory, cond, advantage)],
           cogrpo.replace(s, epochs=1))
    for t, one in enumerate(trajectory):
        log_theta, log_phi = rescored(model, schedule, one, t, 3, cond, likelihood)
        gain += cogrpo.surrogate(log_theta, one.old_model, advantage[:, None], s.clip).sum()
        if likelihood == "exact":
            gain += cogrpo.surrogate(log_phi, one.old_schedule, advantage, s.clip).sum()
    wanted = flat(torch.autograd.grad(-gain / (24 * 6), list(model.parameters())))
    assert (got - wanted).norm() < 1e-9 * wanted.norm()


def draw_as(monkeypatch, noise):
    """Let the schedule's exploration be `noise(mean)`; all other noise stays what it is."""
    monkeypatch.setattr(cogrpo.torch, "randn_like", noise)


def test_the_sampled_estimator_converges_to_the_true_gradient(monkeypatch):
    """20,000 real rollouts and the real `update`: each component within its standard error."""
    world = model, schedule, actions, table = a_world(1, reacts=0)
    J, true, density = true_gradient(*world)
    draws, n = iter(actions), 20000
    draw_as(monkeypatch, lambda mean: (next(draws) - mean) / schedule.spread)
    torch.manual_seed(1)
    cond = torch.zeros(n, dtype=torch.long)
    tokens, drawn = rollout(model, schedule, cond, 2, likelihood="exact")
    s = Settings(likelihood="exact", kl_model=0, grad_norm=1e9)
    parts = [(drawn, cond, table[tuple(tokens.T)] - J / density)]
    update(model, schedule, model, plain(model, schedule), parts, s, "model")
    got = -3 * flat(torch.zeros_like(q) if q.grad is None else q.grad for q in model.parameters())
    p, tokens, trajectory = as_seen_by("exact", model, schedule, actions)
    advantage = table[tuple(tokens.T)] - J / density
    estimator = advantage[:, None] * scores(model, schedule, trajectory, "exact")
    error = ((p / density @ estimator.square() - (true / density).square()) / n).sqrt()
    counts = error > 1e-9  # the embedding of a token that is never seen has no gradient
    z = ((got - true / density) / error)[counts]
    assert counts.sum() > 500 and z.abs().max() < 4.5 and 0.2 < z.square().mean() < 3


def test_phis_estimator_converges_to_a_quadrature(monkeypatch):
    """T = 1, only tau_s random: J(phi) is an integral over one normal variable."""
    model, schedule, n = a_model(3, 3, 1, sharp=1.5).cpu(), a_schedule(4).cpu(), 60000
    torch.manual_seed(0)
    table = torch.randn(3, 3, 3, dtype=torch.float64)
    only = torch.tensor([0, 1, 0, 0])
    draw_as(monkeypatch, lambda x: torch.normal(0.0, 1.0, x.shape, dtype=x.dtype) * only)
    canvas = torch.full((1, 3), model.mask_id)
    with torch.no_grad():
        l_c, l_u = cogrpo.branches(model, canvas, torch.zeros(1, dtype=torch.long))
    statistics = cogrpo.canvas_statistics(l_c.log_softmax(2), canvas == model.mask_id)
    mean = schedule(statistics, 0, 1)[0]
    w = cogrpo.constrain(mean)[3].detach()
    x, weight = [torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(40)]
    tau_s = torch.nn.functional.softplus(mean[1] + schedule.spread * x)
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
    s = Settings(steps=1, kl_schedule=0, grad_norm=1e9)
    parts = [(drawn, cond, advantage)]
    update(model, schedule, model, plain(model, schedule), parts, s, "schedule")
    got = -flat(q.grad for q in phi) @ direction / direction.square().sum()
    wanted = true @ direction / direction.square().sum()
    each = advantage * (drawn[0].action[:, 1] - mean[1].detach()) / schedule.spread ** 2
    assert abs(got - wanted) < 4 * each.std() / n ** 0.5 < 0.7 * abs(wanted)


def test_the_groups_own_mean_as_a_baseline_shrinks_the_gradient_by_one_gth():
    """GRPO's mean has the sample itself in it: at G = 2 the gradient is half the true one."""
    world = model, schedule, actions, table = a_world(2, reacts=0)
    _, true, density = true_gradient(*world)
    p, tokens, trajectory = as_seen_by("exact", model, schedule, actions)
    R, p = table[tuple(tokens.T)], p / density
    S = scores(model, schedule, trajectory, "exact")
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
    model = a_model(3, 2, 1, sharp=1.5).cpu()
    schedule = Schedule(hand_made=lambda t, T: (r, 0.7, 1.2, 0.5)).double()
    actions = torch.stack([schedule.prior(t, 2, model.position) for t in (0, 1)])
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
    model, n = a_model(3, 3, 1, sharp=1.0).cpu(), 40000
    schedule = Schedule(hand_made=lambda t, T: (r, 0.5, 2.0, 1.5)).double()
    actions = torch.stack([schedule.prior(t, 2, model.position) for t in (0, 1)])
    p, tokens, trajectory = every_trajectory(model, schedule, actions, in_every_order)
    p = (p / p.sum()).detach()  # the density of the actions is the same constant for all

    def key(steps, tokens):  # which was kept last, the canvas after a step, and the end
        last = steps[0].score.masked_fill(~steps[0].filled, math.inf).argmin(1, keepdim=True)
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
    model, schedule = a_model(), a_schedule()
    _, trajectory = rollout(model, schedule, conds(16), 3)
    fill, exact = [rescored(model, schedule, trajectory[-1], 2, 3, conds(16), likelihood)[0]
                   for likelihood in ("fill", "exact")]
    assert torch.equal(exact, fill)
