"""Sanity checks that a reader can learn the method from: each tests one property that Co-GRPO needs to be right.

    pytest                     all of them, on drawn digits: no network, no data
    pytest -k exact            the gradient against enumeration, on worlds of three tokens
"""
import itertools
import math
import re
import socket
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cogrpo
import toy_reward as toy
from cogrpo import MDM, Schedule, Settings, Step, log_prob, rollout, sample, train, update

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def a_model(seq_len=6, vocab=5, conds=3, guided=True, seed=0, dtype=torch.float64, sharp=4.0):
    """A small untrained MDM whose predictions are far from uniform, so that no term of a gradient vanishes."""
    torch.manual_seed(seed)
    model = MDM(seq_len, vocab, conds, dim=16, depth=1, heads=2).to(DEVICE, dtype)
    with torch.no_grad():
        for p in (model.token.weight, model.cond.weight, model.position):
            p.normal_()
        model.head.weight.mul_(sharp)
        for block in model.blocks:  # they start as the identity, but for a bias; here positions see each other
            for last in (block.proj, block.mlp[2]):
                last.weight.normal_(std=0.25)
    if not guided:
        model.null_cond = None
    return model


def a_schedule(seed=1, dtype=torch.float64, scale=0.3):
    """A schedule whose residual is random, not zero: it reacts to the canvas."""
    torch.manual_seed(seed)
    schedule = Schedule().to(DEVICE, dtype)
    torch.nn.init.normal_(schedule.residual[2].weight, std=scale)
    return schedule


def conds(n, classes=3):
    return torch.arange(n, device=DEVICE) % classes


def rescored(model, schedule, step, cond, likelihood):
    """What `log_prob` says of a step under the weights as they are now."""
    l_c, l_u = cogrpo.branches(model, step.canvas, cond)
    mean = schedule(cogrpo.canvas_statistics(l_c.log_softmax(2), step.masked), step.u)
    logits = cogrpo.guided_logits(l_c, l_u, cogrpo.constrain(step.action)[:, 3, None, None])
    return log_prob(schedule, mean, logits, step, likelihood)


# --------------------------------------------------------------------------------------------- rollout and schedule

@pytest.mark.parametrize("steps", [1, 3, 6])
def test_every_step_keeps_what_the_ratio_says_and_the_last_keeps_all(steps):
    """After a step floor(r n) tokens are masked, but at least one was filled; what is filled stays."""
    model, schedule = a_model(), a_schedule()
    tokens, trajectory = rollout(model, schedule, conds(64), steps)
    for step, after in zip(trajectory, [s.canvas for s in trajectory[1:]] + [tokens]):
        r = step.action[:, 0].sigmoid()
        before, left = step.masked.sum(1), (after == model.mask_id).sum(1)
        wanted = torch.zeros_like(before) if step is trajectory[-1] else torch.minimum((r * 6).floor(), before - 1)
        assert torch.equal(left, wanted.long().clamp(min=0))
        assert torch.equal(after[~step.masked], step.canvas[~step.masked])
        assert torch.equal(after[step.filled], step.candidate[step.filled])
    assert (tokens < model.vocab_size).all() and (tokens >= 0).all()


def test_the_last_step_fills_all_whatever_the_ratio_says():
    schedule = Schedule(hand_made=lambda u: (0.9, 1.0, 1.0, 1.0)).to(DEVICE, torch.float64)
    tokens, trajectory = rollout(a_model(), schedule, conds(16), 2)
    assert (trajectory[1].masked.sum(1) == 5).all() and (tokens != 5).all()


def test_given_tokens_stay_and_the_ratio_counts_from_the_masked_ones():
    model, given = a_model(), torch.full((32, 6), 5, device=DEVICE)
    given[:, 1], given[:, 4] = 2, 0
    tokens, trajectory = rollout(model, Schedule().to(given.device, torch.float64), conds(32), 2, given)
    assert (tokens[:, 1] == 2).all() and (tokens[:, 4] == 0).all() and (tokens != model.mask_id).all()
    r = trajectory[0].action[:, 0].sigmoid()
    assert torch.equal(trajectory[1].masked.sum(1), torch.minimum((r * 4).floor().long(), torch.tensor(3).to(r.device)))


def test_a_new_schedule_is_the_hand_made_one_at_any_T():
    """The residual's last layer starts at zero; pre-images have floors, since sigmoid never reaches 0."""
    schedule = Schedule().double()
    for T in (1, 4, 8, 50):
        for t in range(T):
            u = (t + 1) / T
            r, tau_s, tau_r, w = cogrpo.constrain(schedule(torch.rand(3, 5).double(), u))[0].tolist()
            assert r == pytest.approx(min(max(math.cos(math.pi * u / 2), 1e-3), 1 - 1e-3), abs=1e-9)
            assert (tau_s, w) == (pytest.approx(1), pytest.approx(1))
            assert tau_r == pytest.approx(max(4.5 * (1 - u), 0.05))


def test_the_schedule_sees_the_canvas_and_the_condition():
    """A table over t alone is not this method: other canvases, other conditions, other actions."""
    model, schedule = a_model(), a_schedule()
    _, trajectory = rollout(model, schedule, torch.zeros_like(conds(16)), 4, explore=False)
    assert trajectory[2].mean.std(0).min() > 1e-3
    first = rollout(model, schedule, conds(3), 4, explore=False)[1][0].mean
    assert first.std(0).min() > 1e-3
    same = torch.rand(1, 5, dtype=torch.float64, device=DEVICE)
    early, late = (schedule(same, u) - schedule.prior(u, same) for u in (0.25, 0.75))  # and it knows how late it is
    assert (early - late).abs().min() > 1e-3
    schedule.blind = True  # the ablation's: u and nothing else
    trajectory = rollout(model, schedule, conds(16), 4, explore=False)[1]
    assert all((step.mean == step.mean[0]).all() for step in trajectory)


def test_statistics_look_at_masked_positions_only():
    """What is already filled must not move the schedule; a uniform prediction has entropy 1 and confidence 1 / V."""
    logits = torch.randn(4, 6, 5, dtype=torch.float64)
    masked = torch.tensor([True, True, True, False, False, False]).expand(4, 6)
    changed = logits.clone()
    changed[:, 3:] += torch.randn(4, 3, 5, dtype=torch.float64)
    assert torch.equal(*(cogrpo.canvas_statistics(x.log_softmax(2), masked) for x in (logits, changed)))
    uniform = cogrpo.canvas_statistics(torch.full((1, 6, 5), 0.2).double().log(), masked[:1])[0]
    assert torch.allclose(uniform, torch.tensor([0.5, 0.2, 1e-3, 1.0, 1e-3]).double(), atol=1e-9)


def test_without_exploration_the_schedule_adds_no_noise():
    _, trajectory = rollout(a_model(), a_schedule(), conds(8), 3, explore=False)
    assert all(torch.equal(step.mean, step.action) for step in trajectory)


def test_schedule_log_prob_is_the_normals_over_the_parameters_that_act():
    """r and tau_r act on nothing at the last step, w on nothing without guidance: they are not part of the policy."""
    for guided in (True, False):
        schedule = a_schedule()
        _, trajectory = rollout(a_model(guided=guided), schedule, conds(8), 3)
        for step in trajectory:
            normal = torch.distributions.Normal(step.mean, schedule.spread)
            columns = [1] if step is trajectory[-1] else [0, 1, 2]
            columns += [3] if guided else []
            wanted = normal.log_prob(step.action)[:, columns].sum(1)
            assert torch.allclose(step.old_schedule, wanted, rtol=0, atol=1e-10)


# ----------------------------------------------------------------------------------------------- likelihoods and KLs

@pytest.mark.parametrize("likelihood", ["fill", "exact"])
@pytest.mark.parametrize("guided", [True, False])
def test_rescoring_returns_the_stored_log_probs(likelihood, guided):
    """The ratio is exactly 1 while the weights are unchanged, or the clip and approx_kl would be of something else."""
    model, schedule = a_model(guided=guided, dtype=torch.float32), a_schedule(dtype=torch.float32)
    close = 1e-5 if DEVICE == "cpu" else 0.05  # bf16
    _, trajectory = rollout(model, schedule, conds(32), 4, likelihood=likelihood)
    for step in trajectory:
        log_theta, exists, log_phi = rescored(model, schedule, step, conds(32), likelihood)
        assert (log_theta - step.old_model).abs().max() < close
        assert (log_phi - step.old_schedule).abs().max() < close
        assert (step.old_model[exists] != 0).double().mean() > 0.98 and (step.old_model[~exists] == 0).all()


def test_fill_scores_the_filled_tokens_under_the_guided_tempered_distribution():
    model, schedule = a_model(), a_schedule()
    tokens, trajectory = rollout(model, schedule, conds(8), 3)
    for step, after in zip(trajectory, [s.canvas for s in trajectory[1:]] + [tokens]):
        _, tau_s, _, w = cogrpo.constrain(step.action).T[:, :, None, None]
        l_c, l_u = model(step.canvas, conds(8)), model(step.canvas, torch.full_like(conds(8), 3))
        p = torch.softmax((l_c + w * (l_c - l_u)) / tau_s, 2)
        for b, i in itertools.product(range(8), range(6)):
            filled = step.canvas[b, i] == model.mask_id and after[b, i] != model.mask_id
            wanted = p[b, i, after[b, i]].log().item() if filled else 0.0
            assert float(step.old_model[b, i]) == pytest.approx(wanted, abs=1e-10)


def test_group_advantage_against_numbers():
    """Unbiased std, within the group of neighbours only; rewards all equal give exactly zero."""
    reward = torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0, 10.0, 0.1 + 0.2, 0.3, 0.3])
    advantage = cogrpo.group_advantage(reward.double()[:6], 3)
    assert advantage.tolist() == pytest.approx([-1 / 1.0001, 0, 1 / 1.0001, 0, 0, 0], abs=1e-12)
    assert (cogrpo.group_advantage(torch.full((7,), 0.1), 7) == 0).all()


def test_group_difference_against_a_double_loop():
    tokens = torch.randint(3, (8, 5))
    got = cogrpo.group_difference(tokens, 4)
    for i in range(8):
        others = [j for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]
        assert float(got[i]) == pytest.approx(np.mean([(tokens[i] != tokens[j]).float().mean() for j in others]))


def test_surrogate_is_clipped_on_the_side_that_would_gain_only():
    """PPO: for A > 0 no credit past 1 + clip, for A < 0 none below 1 - clip; the other sides keep their gradient."""
    for ratio, advantage, value, gradient in ((1.5, 1.0, 1.2, 0.0), (0.5, 1.0, 0.5, 0.5), (1.5, -1.0, -1.5, -1.5),
                                              (0.5, -1.0, -0.8, 0.0), (1.1, 2.0, 2.2, 2.2)):
        new = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
        gain = cogrpo.surrogate(new, torch.tensor(0.0), advantage, 0.2)
        gain.backward()
        assert (gain.item(), new.grad.item()) == (pytest.approx(value), pytest.approx(gradient))


def optimizers(model, schedule, lr=0.0):
    """Plain steps, or none: what is looked at is the gradient."""
    return torch.optim.SGD(model.parameters(), lr), torch.optim.SGD(schedule.parameters(), lr)


def one_update(model, schedule, reference, which="joint", lr=0.0, advantage=None, **settings):
    """Roll out, re-score and (lr > 0) update once; returns (diagnostics, theta's gradient, phi's gradient)."""
    s = Settings(**{"grad_norm": 1e9, "steps": 3} | settings)
    torch.manual_seed(3)
    cond = conds(48)
    _, trajectory = rollout(model, schedule, cond, s.steps, likelihood=s.likelihood)
    advantage = torch.randn(48, dtype=torch.float64, device=DEVICE) if advantage is None else advantage
    row = update(model, schedule, reference, optimizers(model, schedule, lr), trajectory, cond, advantage, s, which)
    gradients = [torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                            for p in part.parameters()]) for part in (model, schedule)]
    return row, *gradients


def test_both_kls_are_zero_at_the_start_and_pull_back_after_a_perturbation():
    """With no advantage only the leashes act: a step along the gradient must shrink the KL that it belongs to."""
    reference, none = a_model(), torch.zeros(48, dtype=torch.float64, device=DEVICE)
    row, theta, phi = one_update(a_model(), Schedule().to(DEVICE, torch.float64), reference, advantage=none)
    assert row["kl_model"] == pytest.approx(0, abs=1e-12) and row["kl_schedule"] == 0
    assert theta.abs().max() < 1e-12 and phi.abs().max() == 0
    model, schedule = a_model(), a_schedule()
    with torch.no_grad():
        model.head.weight.add_(0.3 * torch.randn_like(model.head.weight))
    before, _, _ = one_update(model, schedule, reference, lr=0.05, advantage=none)
    after, _, _ = one_update(model, schedule, reference, advantage=none)
    assert 0 < after["kl_model"] < before["kl_model"] and 0 < after["kl_schedule"] < before["kl_schedule"]


def test_kls_against_torch_distributions():
    """Values and gradients: KL(current || reference) on the un-tempered l_c, summed over the masked positions; and of
    two Gaussians, whose statistics send nothing back to theta."""
    model, schedule, reference = a_model(), a_schedule(), a_model(seed=9)
    none = torch.zeros(48, dtype=torch.float64, device=DEVICE)
    row, theta, phi = one_update(model, schedule, reference, advantage=none, kl_model=0.7, kl_schedule=0.3)
    torch.manual_seed(3)
    _, trajectory = rollout(model, schedule, conds(48), 3)
    kl_model = kl_schedule = 0
    for step in trajectory:
        l_c = model(step.canvas, conds(48))
        p, q = (torch.distributions.Categorical(logits=logits) for logits in (l_c, reference(step.canvas, conds(48))))
        kl_model += (torch.distributions.kl_divergence(p, q) * step.masked).sum() / (48 * 6)
        prior = torch.tensor(cogrpo.unconstrain(*cogrpo.hand_made(step.u)), dtype=torch.float64, device=DEVICE)
        mean = schedule(cogrpo.canvas_statistics(l_c.detach().log_softmax(2), step.masked), step.u)
        p, q = torch.distributions.Normal(mean, 0.3), torch.distributions.Normal(prior, 0.3)
        kl_schedule += (torch.distributions.kl_divergence(p, q) * step.acts).sum() / (48 * 3)
    assert row["kl_model"] == pytest.approx(kl_model.item(), 1e-9)
    assert row["kl_schedule"] == pytest.approx(kl_schedule.item(), 1e-9)
    for got, kl, part in ((theta / 0.7, kl_model, model), (phi / 0.3, kl_schedule, schedule)):
        wanted = flat(torch.autograd.grad(kl, list(part.parameters())))
        assert (got - wanted).norm() < 1e-9 * wanted.norm()


def test_the_models_kl_leaves_the_unconditional_branch_free():
    """The leash is on l_c alone (cheap: B rows): a drift of l_u moves what is drawn and costs nothing. Know it."""
    model, schedule, reference = a_model(), Schedule().to(DEVICE, torch.float64), a_model()
    with torch.no_grad():
        model.cond.weight[model.null_cond] += torch.randn(16, dtype=torch.float64, device=DEVICE)
    row, _, _ = one_update(model, schedule, reference)
    canvas, w = torch.full((1, 6), model.mask_id, device=DEVICE), torch.ones(1, device=DEVICE)
    now, then = (cogrpo.guided_logits(*cogrpo.branches(m, canvas, conds(1)), w) for m in (model, reference))
    assert row["kl_model"] == pytest.approx(0, abs=1e-12) and (now - then).abs().max() > 0.1


# --------------------------------------------------------------------------------------------------------- the update

@pytest.mark.parametrize("which, moves", [("joint", (True, True)), ("model", (True, False)),
                                          ("schedule", (False, True))])
def test_each_update_moves_its_own_factor_only(which, moves):
    model, schedule = a_model(), a_schedule()
    parts = [[p.clone() for p in part.parameters()] for part in (model, schedule)]
    one_update(model, schedule, a_model(), which, lr=0.1)
    assert tuple(any(not torch.equal(p, q) for p, q in zip(before, part.parameters()))
                 for before, part in zip(parts, (model, schedule))) == moves


@pytest.mark.parametrize("likelihood", ["fill", "exact"])
def test_phis_gradient_is_the_policy_gradient_and_stays_its_own(likelihood):
    """-(1 / B T) sum A grad log N(A | mean, spread), by torch.distributions; and under `joint` either factor gets the
    gradient that it would get alone."""
    torch.manual_seed(5)
    advantage = torch.randn(48, dtype=torch.float64, device=DEVICE)
    settings = dict(kl_schedule=0, likelihood=likelihood)
    model, schedule = a_model(), a_schedule()
    _, _, phi = one_update(model, schedule, a_model(), "schedule", advantage=advantage, **settings)
    torch.manual_seed(3)
    _, trajectory = rollout(model, schedule, conds(48), 3, likelihood=likelihood)
    gain = 0
    for step in trajectory:
        l_c = model(step.canvas, conds(48)).detach()
        statistics = cogrpo.canvas_statistics(l_c.log_softmax(2), step.masked)
        log_p = torch.distributions.Normal(schedule(statistics, step.u), 0.3).log_prob(step.action)
        gain += (advantage[:, None] * log_p * step.acts).sum() / (48 * 3)
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(-gain, list(schedule.parameters()))])
    assert torch.allclose(phi, wanted, rtol=1e-9, atol=1e-12) and phi.norm() > 1e-3
    _, theta, _ = one_update(a_model(), a_schedule(), a_model(), "model", advantage=advantage, **settings)
    _, both_theta, both_phi = one_update(a_model(), a_schedule(), a_model(), advantage=advantage, **settings)
    assert torch.allclose(both_phi, phi, rtol=1e-9, atol=1e-12)
    assert torch.allclose(both_theta, theta, rtol=1e-9, atol=1e-12)


def test_frozen_parameters_stay_frozen():
    """A frozen text encoder, or all but LoRA's matrices: what had no gradient before has none in `train`."""
    model = a_model()
    model.token.requires_grad_(False)
    trained = train(model, lambda x, c: (x == 0).double().mean(1), conds(3), Settings(iters=2, steps=2, groups=3))[0]
    assert torch.equal(trained.token.weight, model.token.weight) and not torch.equal(trained.position, model.position)


def test_alternate_takes_turns():
    """The paper's: even iterations theta, odd ones phi."""
    moved, last = [], None

    def watch(row, model, schedule, tokens, cond):
        nonlocal last
        now = [torch.cat([p.detach().flatten() for p in part.parameters()]) for part in (model, schedule)]
        moved.append(None if last is None else [not torch.equal(a, b) for a, b in zip(last, now)])
        last = now
    train(a_model(), lambda x, c: (x == 0).double().mean(1), conds(3), Settings(update="alternate", iters=4, steps=2,
          groups=3, rl_seed=0), watch)
    assert moved[1:] == [[False, True], [True, False], [False, True]]


def test_the_learning_rate_rises_and_falls_to_zero():
    """Adam moves a weight by its learning rate at first, whatever the gradient: there a warm-up must have begun."""
    phi, moves = [], []

    def watch(row, model, schedule, tokens, cond):
        phi.append(torch.cat([p.detach().flatten() for p in schedule.parameters()]))
        moves.append(float((phi[-1] - phi[-2]).abs().max()) if len(phi) > 1 else 0)
    train(a_model(), lambda x, c: (x == 0).double().mean(1), conds(3), Settings(
        iters=20, steps=2, groups=3, schedule_lr=0.01, warmup=4, rl_seed=0), watch, start := a_schedule())
    first = phi[0] - torch.cat([p.detach().flatten() for p in start.parameters()])
    assert first.abs().max() == pytest.approx(0.01 / 4, rel=1e-3) and moves[-1] < 0.01 / 10 < 0.005 < max(moves)


def test_epochs_reuse_a_rollout_against_the_stored_log_probs():
    """On the second epoch the ratio has left 1: approx_kl says how far, and it is measured from the rollout."""
    once, _, _ = one_update(a_model(), a_schedule(), a_model(), lr=0.5)
    twice, _, _ = one_update(a_model(), a_schedule(), a_model(), lr=0.5, epochs=2)
    assert once["approx_kl_model"] == pytest.approx(0, abs=1e-15) and once["clip_model"] == 0
    assert twice["approx_kl_model"] > 1e-5 and twice["approx_kl_schedule"] > 1e-5


@pytest.mark.parametrize("likelihood", ["fill", "exact"])
def test_ratios_are_to_the_rollouts_log_probs_and_clip_each_factor(likelihood):
    """Had every factor become e^0.5 times as likely since the rollout, praise has no gradient left, blame has."""
    s, cond = Settings(steps=3, likelihood=likelihood, kl_model=0, kl_schedule=0, grad_norm=1e9), conds(16)
    for advantage, silent in ((1.0, True), (-1.0, False)):
        model, schedule = a_model(), a_schedule()
        _, trajectory = rollout(model, schedule, cond, 3, likelihood=likelihood)
        for step in trajectory:
            step.old_model, step.old_schedule = step.old_model - 0.5, step.old_schedule - 0.5
        all_alike = torch.full_like(cond, advantage).double()
        row = update(model, schedule, model, optimizers(model, schedule), trajectory, cond, all_alike, s)
        assert row["clip_model"] == pytest.approx(1) and row["clip_schedule"] == pytest.approx(1)
        assert (row["grad_model"] == 0 and row["grad_schedule"] == 0) == silent


def test_one_steps_graph_is_freed_before_the_next():
    """Memory does not grow with T: when the model runs for the next step, the last one's logits are gone."""
    model, alive, outputs = a_model(), [], []

    def hook(module, args, output):
        if output.requires_grad:
            alive.append(sum(ref() is not None for ref in outputs))
            outputs.append(weakref.ref(output))
    model.register_forward_hook(hook)
    one_update(model, a_schedule(), a_model(), steps=6)
    assert len(alive) == 6 and max(alive) <= 1  # the loop's own names still hold the last one's output, no more


class Waits(TorchDispatchMode):
    """Collects the operations that make the host wait for a GPU, whatever the device is."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1])
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh"):
            self.seen.append(name)  # item and bool(); sizes that depend on data; and lift_fresh: a list made a tensor
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("likelihood", ["fill", "exact"])
def test_no_step_waits_for_the_device(likelihood):
    """A hidden .item() or boolean index stops a GPU in every step: the diagnostics, at the end, are all it waits for."""
    model, schedule, cond = a_model(), a_schedule(), conds(48)
    step, advantage = optimizers(model, schedule, 0.1), torch.randn(48, device=DEVICE).to(model.position)
    s = Settings(steps=3, likelihood=likelihood, micro_batch=16)
    with Waits() as waits:
        waits.seen = []
        _, trajectory = rollout(model, schedule, cond, 3, likelihood=likelihood)
        assert waits.seen == []
        row = update(model, schedule, model, step, trajectory, cond, advantage, s)
        assert waits.seen == ["_local_scalar_dense"] * len(row)


@pytest.mark.parametrize("micro_batch", [1, 5, 16, 48])
def test_micro_batches_give_the_same_gradient(micro_batch):
    """A larger model fits by fewer samples at a time; what it learns must not depend on how many."""
    whole, part = (one_update(a_model(), a_schedule(), a_model(seed=9), micro_batch=m) for m in (0, micro_batch))
    for one, other in zip(whole[1:], part[1:]):
        assert (one - other).norm() < 1e-9 * one.norm()
    assert part[0] == pytest.approx(whole[0], rel=1e-6, abs=1e-12)


def test_a_group_needs_one_pass_for_its_first_canvas():
    """It starts alike: the same log-probs and gradient from a twelfth of the rows, also where micro-batches cut through
    groups."""
    cond, results = conds(4).repeat_interleave(12), []
    for share, micro_batch in ((1, 0), (12, 0), (12, 8), (12, 5)):
        s = Settings(steps=3, grad_norm=1e9, micro_batch=micro_batch)
        model, schedule = a_model(), a_schedule()
        torch.manual_seed(3)
        tokens, trajectory = rollout(model, schedule, cond, 3, share=share)
        advantage = torch.linspace(-2, 1, 48).to(model.position)
        update(model, schedule, a_model(seed=9), optimizers(model, schedule), trajectory, cond, advantage, s)
        results.append((tokens, flat(p.grad for part in (model, schedule) for p in part.parameters())))
    for tokens, gradient in results[1:]:
        assert torch.equal(results[0][0], tokens)
        assert (results[0][1] - gradient).norm() < 1e-9 * gradient.norm()


def test_downsampling_keeps_the_extremes_of_every_group():
    """The two worst would say -2 and -1.5, and that all of it is bad; the worst and the best say what to do instead."""
    _, trajectory = rollout(a_model(), a_schedule(), conds(2).repeat_interleave(4), 2, share=4)
    advantage = torch.tensor([0.1, -2, -1.5, 0.5, 3, -0.2, 0.1, -4]).double().to(DEVICE)
    kept, cond, weighed = cogrpo.downsample(trajectory, conds(2).repeat_interleave(4), advantage, Settings(keep=0.5,
                                                                                                         group_size=4))
    assert weighed.tolist() == [-1, 0.25, -2, 1.5] and cond.tolist() == [0, 0, 1, 1]
    assert torch.equal(kept[1].canvas, trajectory[1].canvas[[1, 3, 7, 4]]) and [step.share for step in kept] == [2, 1]


@pytest.mark.parametrize("guided", [True, False])
def test_the_log_counts_the_rows_that_go_through_the_model(guided):
    """Forward 1, backward 2: the unit in which two settings can be compared, whatever the machine."""
    model, seen = a_model(guided=guided), []
    model.register_forward_hook(lambda _, args, output: seen.append(len(args[0]) * (3 if output.requires_grad else 1)))
    log = train(model, lambda x, c: torch.rand(len(x)), conds(3), Settings(iters=2, steps=3, groups=3, group_size=4,
                                                                         epochs=2, keep=0.5))[2]
    assert log[-1]["rows"] == sum(seen) and log[0]["rows"] == sum(seen) / 2


def a_batch(rank, ranks):
    """Every process makes the same rollout and takes its part of the samples."""
    model, schedule, part = a_model(), a_schedule(), torch.arange(48, device=DEVICE).chunk(ranks)[rank]
    torch.manual_seed(3)
    _, trajectory = rollout(model, schedule, conds(48), 3)
    advantage = torch.linspace(-2, 1, 48).to(model.position)[part]
    update(model, schedule, a_model(seed=9), optimizers(model, schedule), [step.take(part) for step in trajectory],
           conds(48)[part], advantage, Settings(steps=3, grad_norm=1e9))
    return flat(p.grad for module in (model, schedule) for p in module.parameters())


def one_of_two(rank, folder):
    globals()["DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(a_batch(rank, 2).cpu(), f"{folder}/gradient{rank}.pt")
    with pytest.raises(ValueError, match="--groups 3: must be a multiple"):
        train(a_model(), None, conds(3), Settings(groups=3))
    start = a_model(seed=rank)  # another one in each process: the first one's counts
    model, schedule, log = train(start, lambda x, c: (x == 0).double().mean(1), conds(4), Settings(
        iters=3, groups=4, group_size=4, steps=2))
    assert log[0]["kl_model"] < 1e-12  # and its reference is the first one's, too
    torch.save([p.cpu() for p in (*model.parameters(), *schedule.parameters())] + [log[-1]["reward"]],
               f"{folder}/trained{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_gradient_of_one(tmp_path, monkeypatch):
    """And after a few iterations of `train`, each on its own rollouts, both hold the same weights."""
    monkeypatch.setitem(globals(), "DEVICE", "cpu")
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    wanted = a_batch(0, 1).cpu()
    for rank in (0, 1):
        assert (torch.load(tmp_path / f"gradient{rank}.pt") - wanted).norm() < 1e-9 * wanted.norm()
    first, second = (torch.load(tmp_path / f"trained{rank}.pt") for rank in (0, 1))
    assert first[-1] == second[-1] and all(torch.equal(p, q) for p, q in zip(first[:-1], second[:-1]))


# ------------------------------------------------------------------------- the gradient against enumeration ("exact")

def ranked_in_every_order(model, schedule, canvas, action, t, T):
    """What a step can do to a canvas, by formulas written anew and knowing nothing of thresholds: a candidate for every
    masked position, then the kept ones one by one, each with odds exp(score) among those that remain (Plackett-Luce).

    Yields (probability with its graph, p_phi of the draw included; candidate [L], kept positions, last, threshold).
    """
    L, c, null = model.seq_len, torch.tensor([0]), torch.tensor([model.null_cond])
    masked = [i for i in range(L) if canvas[i] == model.mask_id]
    r, (tau_s, tau_r, w) = action[0].sigmoid(), torch.log1p(action[1:].exp())
    l_c, l_u = (model(torch.tensor([canvas]), k)[0] for k in (c, null))
    logits = (1 + w) * l_c - w * l_u
    p, score = torch.softmax(logits / tau_s, 1), torch.log_softmax(logits, 1) / tau_r
    left = 0 if t == T - 1 else min(math.floor(r * L), len(masked) - 1)
    statistics = cogrpo.canvas_statistics(l_c[None].log_softmax(2), torch.tensor([[i in masked for i in range(L)]]))
    mean = schedule(statistics, (t + 1) / T)[0]
    density = torch.distributions.Normal(mean, schedule.spread).log_prob(action)[who_acts(masked, t, T)].sum().exp()
    for tokens in itertools.product(range(model.vocab_size), repeat=len(masked)):
        candidate = dict(zip(masked, tokens))
        chance = density * math.prod(p[i, v] for i, v in candidate.items())
        for kept in itertools.permutations(masked, len(masked) - left) if left else [tuple(masked)]:
            odds, among = chance, list(masked)
            for i in kept if left else ():
                weight = {j: score[j, candidate[j]].exp() for j in among}
                odds = odds * weight[i] / sum(weight.values())
                among.remove(i)
            yield odds, [candidate.get(i, 0) for i in range(L)], kept, kept[-1], 0.0


def at_every_threshold(model, schedule, canvas, action, t, T):
    """The same step as `exact` sees it: the kept tokens, the last of them, and a threshold, each with the weight of its
    quadrature node: with threshold = tau_r (exp(-x) - x) an even grid of x is exact to nine digits."""
    masked = [i for i in range(model.seq_len) if canvas[i] == model.mask_id]
    left = 0 if t == T - 1 else min(math.floor(action[0].sigmoid() * model.seq_len), len(masked) - 1)
    tau_r = float(torch.log1p(action[2].exp()))
    grid = np.arange(-3.1, 4 + 4 / tau_r, 0.3)  # the colder the ranking, the further the scores are from 0
    nodes = [(tau_r * (math.exp(-x) - x), 0.3 * (1 + math.exp(-x))) for x in grid] if left else [(0.0, 1.0)]
    for kept in itertools.combinations(masked, len(masked) - left):
        for tokens in itertools.product(range(model.vocab_size), repeat=len(kept)):
            candidate = dict(zip(kept, tokens))
            for last, (node, weight) in itertools.product(kept if left else kept[:1], nodes):
                yield weight, [candidate.get(i, 0) for i in range(model.seq_len)], kept, last, node


def who_acts(masked, t, T):
    return [j in ((1, 3) if t == T - 1 or len(masked) == 1 else (0, 1, 2, 3)) for j in range(4)]


def every_trajectory(model, schedule, actions, transitions):
    """All trajectories of condition 0 under fixed draws A [T, 4]: (product of their transitions' weights [N], tokens
    [N, L], `Step`s with a row for each)."""
    L, T, known = model.seq_len, len(actions), {}
    paths = [(torch.ones((), dtype=torch.float64), (model.mask_id,) * L, [])]
    for t in range(T):
        longer = []
        for weight, canvas, path in paths:
            if (canvas, t) not in known:
                known[canvas, t] = list(transitions(model, schedule, canvas, actions[t], t, T))
            for odds, candidate, kept, *cut in known[canvas, t]:
                after = tuple(candidate[i] if i in kept else canvas[i] for i in range(L))
                longer.append((weight * odds, after, path + [(canvas, candidate, [i in kept for i in range(L)], *cut)]))
        paths = longer
    trajectory = []
    for t in range(T):
        canvas, candidate, filled, last, threshold = map(np.array, zip(*[path[t] for _, _, path in paths]))
        canvas, candidate, filled, last, threshold = map(torch.tensor, (canvas, candidate, filled, last, threshold))
        masked = canvas == model.mask_id
        acts = torch.tensor([who_acts([i for i in range(L) if row[i]], t, T) for row in masked.tolist()])
        trajectory.append(Step((t + 1) / T, canvas, masked, 1, acts, None, actions[t].expand(len(canvas), 4), candidate,
                               filled, last[:, None], threshold[:, None]))
    return torch.stack([w for w, _, _ in paths]), torch.tensor([after for _, after, _ in paths]), trajectory


def exact_world(seed, T=2, V=2, tau_r=1.0, reacts=0.3):
    """A random model, schedule, fixed draw A [T, 4] and reward table on L = 3 tokens, one token kept a step."""
    model, schedule = a_model(3, V, 1, seed=seed, sharp=1.5).cpu(), a_schedule(seed + 1, scale=reacts).cpu()
    schedule.hand_made = lambda u: (1 - u + 0.05, 0.8 + 0.1 * u, tau_r, 0.7)
    torch.manual_seed(seed + 2)
    actions = torch.stack([schedule.prior((t + 1) / T, model.position) for t in range(T)])
    actions += 0.2 * torch.randn(T, 4) * torch.tensor([0, 1, 0, 1])  # r as it is, so one token a step
    return model, schedule, actions, torch.randn(V, V, V, dtype=torch.float64)


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def true_gradient(model, schedule, actions, table):
    """(J = E[R], its gradient) under the draws A; times p_phi of the draws, for that depends on theta as well."""
    probability, tokens, _ = every_trajectory(model, schedule, actions, ranked_in_every_order)
    J = (probability * table[tuple(tokens.T)]).sum()
    return J.detach(), flat(torch.autograd.grad(J, list(model.parameters()))), probability.sum().detach()


def total_log_prob(model, schedule, trajectory, likelihood):
    """log p of each trajectory [N] through the code of the pipeline, and with `exact` log p_phi of its draws."""
    cond = torch.zeros(len(trajectory[0].canvas), dtype=torch.long)
    return sum(rescored(model, schedule, step, cond, likelihood)[0].sum(1) for step in trajectory)


def as_the_likelihood_sees_it(likelihood, model, schedule, actions):
    """All trajectories and their probabilities: (p [N] without graph, tokens [N, L], `Step`s)."""
    if likelihood == "fill":
        p, tokens, trajectory = every_trajectory(model, schedule, actions, ranked_in_every_order)
        return p.detach(), tokens, trajectory
    weight, tokens, trajectory = every_trajectory(model, schedule, actions, at_every_threshold)
    return weight * total_log_prob(model, schedule, trajectory, "exact").exp().detach(), tokens, trajectory


def updates_gradient(likelihood, model, schedule, actions, table):
    """The real update's own, summed over all trajectories with their probabilities."""
    p, tokens, trajectory = as_the_likelihood_sees_it(likelihood, model, schedule, actions)
    N, theta, cond = len(p), list(model.parameters()), torch.zeros(len(p), dtype=torch.long)
    with torch.no_grad():
        for step in trajectory:
            step.old_model, _, step.old_schedule = rescored(model, schedule, step, cond, likelihood)
    # The update's loss is -sum_i advantage_i log p_i / (N L): hand it the probability-weighted rewards.
    s = Settings(likelihood=likelihood, kl_model=0, grad_norm=1e99, steps=len(actions))
    weighted = p * table[tuple(tokens.T)] * N
    update(model, schedule, model, optimizers(model, schedule), trajectory, cond, weighted, s, "model")
    return -3 * flat(q.grad for q in theta)


def scores(model, schedule, trajectory, likelihood):
    """grad_theta log p of each trajectory, [N, parameters]; what happens in many trajectories is computed once."""
    total = 0
    for step in trajectory:
        did = torch.cat([step.canvas, step.candidate, step.filled, step.last, step.threshold], 1)
        _, which = did.unique(dim=0, return_inverse=True)
        ones = [step.take((which == k).nonzero()[0]) for k in range(int(which.max()) + 1)]
        total = total + torch.stack([flat(torch.autograd.grad(total_log_prob(model, schedule, [one], likelihood),
                                                              list(model.parameters()))) for one in ones])[which]
    return total


def bias_and_variance(likelihood, seed, tau_r):
    """Of the estimator (R - J) grad log p of one rollout, under a schedule that ignores the canvas: relative bias, and
    variance in units of the true gradient's squared norm."""
    world = model, schedule, actions, table = exact_world(seed, tau_r=tau_r, reacts=0)
    J, true, density = true_gradient(*world)  # the draws' density is one constant here
    p, tokens, trajectory = as_the_likelihood_sees_it(likelihood, model, schedule, actions)
    estimator = (table[tuple(tokens.T)] - J / density)[:, None] * scores(model, schedule, trajectory, likelihood)
    mean, square = p / density @ estimator, p / density @ estimator.square().sum(1)
    true = true / density
    return float((mean - true).norm() / true.norm()), float((square - mean.square().sum()) / true.square().sum())


@pytest.mark.parametrize("T, V", [(2, 2), (2, 3), (3, 2)])
def test_the_exact_likelihood_gives_the_true_gradient(T, V):
    """What each position did given the threshold, and the schedule's view of theta: with both, the score-function
    estimator of the real `update` is the gradient of the expected reward. The truth is enumerated another way."""
    for seed in range(3 if T == 2 else 1):
        world = exact_world(seed, T, V)
        _, true, _ = true_gradient(*world)
        assert (updates_gradient("exact", *world) - true).norm() < 1e-8 * true.norm()


def test_the_fill_likelihood_misses_it_less_so_the_hotter_the_ranking():
    """The paper's likelihood drops which candidates were kept: a bias that fades as tau_r grows. `exact` has none."""
    for tau_r, low, high in ((0.3, 0.25, 2.0), (3.0, 0.03, 0.2), (100.0, 0.0, 0.01)):
        assert low < np.mean([bias_and_variance("fill", seed, tau_r)[0] for seed in range(8)]) < high
    assert bias_and_variance("exact", 0, 0.3)[0] < 1e-8


def test_the_fill_likelihood_misses_the_schedules_view_too():
    """At a tau_r where ranking is pure noise what is left of the bias is p_phi's: its statistics depend on theta."""
    world = exact_world(0, tau_r=100.0)
    _, true, _ = true_gradient(*world)
    assert (updates_gradient("fill", *world) - true).norm() > 0.05 * true.norm()


def draw_as(monkeypatch, noise):
    """Let the schedule's exploration be `noise(like)`; the tokens' and the ranking's noise stays what it is."""
    monkeypatch.setattr(cogrpo.torch, "randn_like", noise)


def test_the_sampled_estimator_converges_to_the_true_gradient(monkeypatch):
    """20,000 real rollouts under the fixed draws, the real update: every component within its own standard error."""
    world = model, schedule, actions, table = exact_world(1, reacts=0)
    (J, true, density), draws, n = true_gradient(*world), iter(actions), 20000
    draw_as(monkeypatch, lambda mean: (next(draws) - mean) / schedule.spread)
    torch.manual_seed(1)
    tokens, drawn = rollout(model, schedule, torch.zeros(n, dtype=torch.long), 2, likelihood="exact")
    s = Settings(likelihood="exact", kl_model=0, grad_norm=1e99, steps=2)
    batch = drawn, torch.zeros(n, dtype=torch.long), table[tuple(tokens.T)] - J / density
    update(model, schedule, model, optimizers(model, schedule), *batch, s, "model")
    p, tokens, trajectory = as_the_likelihood_sees_it("exact", model, schedule, actions)
    estimator = (table[tuple(tokens.T)] - J / density)[:, None] * scores(model, schedule, trajectory, "exact")
    error = ((p / density @ estimator.square() - (true / density).square()) / n).sqrt()
    counts = error > 1e-9  # the null condition's unused rows and such have no gradient at all
    z = ((-3 * flat(q.grad for q in model.parameters()) - true / density) / error)[counts]
    assert counts.sum() > 500 and z.abs().max() < 4.5 and 0.2 < z.square().mean() < 3


def test_phis_estimator_converges_to_a_quadrature(monkeypatch):
    """T = 1, only tau_s random: J(phi) is an integral over one normal variable, its gradient goes through tau_s."""
    model, schedule = a_model(3, 3, 1, sharp=1.5).cpu(), a_schedule(4).cpu()
    reward, n = torch.randn(3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 60000
    draw_as(monkeypatch, lambda x: torch.normal(0.0, 1.0, x.shape, dtype=x.dtype) * torch.tensor([0, 1, 0, 0]))
    canvas, c = torch.full((1, 3), model.mask_id), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        l_c, l_u = cogrpo.branches(model, canvas, c)
    mean = schedule(cogrpo.canvas_statistics(l_c.log_softmax(2), canvas == model.mask_id), 1.0)[0]
    _, _, _, w = cogrpo.constrain(mean)
    nodes, weights = (torch.tensor(x) for x in np.polynomial.hermite_e.hermegauss(40))
    tau_s = torch.nn.functional.softplus(mean[1] + schedule.spread * nodes)
    p = torch.softmax((l_c + w.detach() * (l_c - l_u)) / tau_s[:, None, None], 2)
    value = torch.einsum("qi,qj,qk,ijk->q", p[:, 0], p[:, 1], p[:, 2], reward)
    J = (value * weights).sum() / weights.sum()
    true = flat(torch.autograd.grad(J, list(schedule.parameters()), retain_graph=True))
    # All rows share a canvas, so the gradient is one direction, d mean / d phi, times mean of A (A - mean) / spread^2.
    direction = flat(torch.autograd.grad(mean[1], list(schedule.parameters())))
    torch.manual_seed(0)
    cond = torch.zeros(n, dtype=torch.long)
    tokens, drawn = rollout(model, schedule, cond, 1)
    advantage = reward[tuple(tokens.T)] - J.detach()
    update(model, schedule, model, optimizers(model, schedule), drawn, cond, advantage,
           Settings(steps=1, kl_schedule=0, grad_norm=1e99), "schedule")
    weight = advantage * (drawn[0].action[:, 1] - mean[1].detach()) / schedule.spread ** 2
    got, wanted = (float(-flat(q.grad for q in schedule.parameters()) @ direction / direction.square().sum()),
                   float(true @ direction / direction.square().sum()))
    assert abs(got - wanted) < 4 * float(weight.std()) / n ** 0.5 < 0.7 * abs(wanted)


def test_the_groups_own_mean_as_a_baseline_shrinks_the_gradient_by_one_gth():
    """GRPO's mean contains the sample itself: over all pairs (G = 2) the estimator is half the true gradient."""
    world = model, schedule, actions, table = exact_world(2, reacts=0)
    _, true, density = true_gradient(*world)
    p, tokens, trajectory = as_the_likelihood_sees_it("exact", model, schedule, actions)
    R, p, S = table[tuple(tokens.T)], p / density, scores(model, schedule, trajectory, "exact")
    i, j = torch.meshgrid(torch.arange(len(R)), torch.arange(len(R)), indexing="ij")
    pair = torch.stack([R[i], R[j]], -1)
    advantage = pair - pair.mean(2, keepdim=True)
    estimate = (p[i] * p[j])[..., None] * advantage / 2
    got, wanted = estimate[..., 0].sum(1) @ S + estimate[..., 1].sum(0) @ S, true / density / 2
    assert (got - wanted).norm() < 1e-8 * wanted.norm()


def test_dividing_by_the_groups_std_forgets_the_scale_of_rewards():
    """At G = 2 only the sign of the difference survives; a large group's gradient is the true one over its own sigma,
    so conditions with little spread count as much as those with a lot."""
    pairs = cogrpo.group_advantage(torch.tensor([0.0, 1, 0, 100]), 2)
    assert pairs.tolist() == pytest.approx([-(0.5 ** 0.5), 0.5 ** 0.5] * 2, 1e-3)
    torch.manual_seed(0)
    R = torch.randn(2, 5000, dtype=torch.float64) * torch.tensor([[0.1], [10.0]])
    advantage = cogrpo.group_advantage(R.flatten(), 5000).view(2, -1)
    assert ((advantage * R).mean(1) / R.std(1)).tolist() == pytest.approx([1, 1], rel=5e-3)


@pytest.mark.parametrize("r", [0.7, 0.4])
def test_thresholds_and_orders_are_the_same_law(r):
    """A step's probabilities sum to one, and keeping given tokens is as likely by an integral over the threshold as by
    a sum over all Plackett-Luce orders and thrown-away candidates."""
    model, schedule = a_model(3, 2, 1, sharp=1.5).cpu(), Schedule(hand_made=lambda u: (r, 0.7, 1.2, 0.5)).double()
    actions = torch.stack([schedule.prior(u, model.position) for u in (0.5, 1.0)])
    laws = []
    for likelihood in ("fill", "exact"):  # fill: only for its enumeration of orders
        p, _, trajectory = as_the_likelihood_sees_it(likelihood, model, schedule, actions)
        after = torch.where(trajectory[0].filled, trajectory[0].candidate, model.mask_id)
        laws.append(torch.zeros(27).double().index_add(0, after @ torch.tensor([9, 3, 1]), p / p.sum()))
    assert (laws[0] - laws[1]).abs().max() < 1e-9 and (laws[0] > 0).sum() == (6 if r == 0.7 else 12)
    density = math.prod(torch.distributions.Normal(0.0, 0.3).log_prob(torch.zeros(k)).sum().exp() for k in (4, 2))
    assert float(p.sum() / density) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("r", [0.7, 0.4])
def test_the_rollout_has_the_law_that_is_enumerated(r):
    """Chi-squared of 40,000 rollouts against every trajectory's probability: the Gumbel scale, the confidence before
    tempering, the guidance and who of the top k comes last all change this law."""
    model, schedule = a_model(3, 3, 1, sharp=1.0).cpu(), Schedule(hand_made=lambda u: (r, 0.5, 2.0, 1.5)).double()
    actions = torch.stack([schedule.prior(u, model.position) for u in (0.5, 1.0)])
    probability, tokens, trajectory = every_trajectory(model, schedule, actions, ranked_in_every_order)
    probability = (probability / probability.sum()).detach()  # p_phi of the draws is the same constant for all

    def key(steps, tokens):  # which was kept last, the canvas after one step, and the end
        return (torch.cat([steps[0].last, steps[1].canvas, tokens], 1) * 4 ** torch.arange(7)).sum(1)
    n, cells = 40000, torch.zeros(4 ** 7, dtype=torch.float64)
    torch.manual_seed(0)
    drawn, steps = rollout(model, schedule, torch.zeros(n, dtype=torch.long), 2, explore=False)
    expected = cells.index_add(0, key(trajectory, tokens), n * probability)
    observed = torch.bincount(key(steps, drawn), minlength=len(cells))
    assert observed[expected == 0].sum() == 0 and expected.sum() == pytest.approx(n)
    often = expected >= 5
    chi2, freedom = ((observed - expected)[often].square() / expected[often]).sum(), int(often.sum()) - 1
    assert freedom > 30 and chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_exact_equals_fill_when_a_step_keeps_all():
    """At the last step nothing is ranked: the two likelihoods are the same numbers there, but for p_phi."""
    model, schedule, cond = a_model(), a_schedule(), conds(16)
    _, trajectory = rollout(model, schedule, cond, 3)
    fill, _, log_phi = rescored(model, schedule, trajectory[-1], cond, "fill")
    exact, exists, _ = rescored(model, schedule, trajectory[-1], cond, "exact")
    assert torch.equal(exact[:, :6], fill) and exists[:, 6].all() and torch.equal(exact[:, 6], log_phi)


# ------------------------------------------------------------------------------------------------------- the toy world

@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    settings = toy.WorldSettings(codebook_size=48, train_images=4000, test_images=1000, judge_epochs=6)
    train_set, test_set, _, _ = toy.load_digits("drawn", settings, 0)
    return toy.World.build(train_set, test_set, settings, DEVICE)[0]


def test_the_codebook_gives_the_nearest_patch():
    images = toy.drawn_digits(3, 1)[0].float() / 255
    codebook = toy.fit_codebook(toy.drawn_digits(300, 0)[0].float() / 255, 16)
    tokens = toy.encode(images, codebook)
    for n, row, column in itertools.product(range(3), range(7), range(7)):
        patch = images[n, 4 * row:4 * row + 4, 4 * column:4 * column + 4].flatten()
        distance = [float((patch - code).square().sum()) for code in codebook]
        assert distance[tokens[n, 7 * row + column]] == pytest.approx(min(distance), abs=1e-5)
    assert torch.equal(toy.encode(toy.decode(tokens, codebook), codebook), tokens)


def test_frechet_distance_against_the_closed_form():
    """Diagonal Gaussians: |m - n|^2 + sum (sqrt a - sqrt b)^2; and where the roots do not commute."""
    torch.manual_seed(0)
    white = torch.randn(4000, 3, dtype=torch.float64)
    white = (white - white.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(white.T))).T
    a, b = white * torch.tensor([1.0, 2, 3]), white * torch.tensor([2.0, 2, 1]) + torch.tensor([1.0, 0, 2])
    assert toy.frechet(a, b) == pytest.approx(1 + 4 + 1 + 0 + 4, rel=1e-9)
    c = white @ torch.randn(3, 3, dtype=torch.float64)
    root = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(c.T)).sqrt().real.sum()  # of a product that is not symmetric
    wanted = (a.mean(0) - c.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(c.T).trace() - 2 * root
    assert toy.frechet(a, c) == pytest.approx(wanted.item()) and toy.frechet(c, c) == pytest.approx(0, abs=1e-9)


def test_diversity_against_all_pairs():
    tokens, cond = torch.randint(4, (12, 6)), torch.arange(12) % 2
    pairs = [[(tokens[i] != tokens[j]).double().mean().item() for i, j in itertools.combinations(range(k, 12, 2), 2)]
             for k in (0, 1)]
    assert toy.diversity(tokens, cond) == pytest.approx(np.mean([np.mean(p) for p in pairs]))


def test_splices_mix_two_digits_of_one_class_and_lose_the_label_where_it_shows():
    labels = torch.arange(200) % 10
    tokens = labels[:, None] * 10 + (torch.arange(200) // 10 % 10)[:, None] + torch.zeros(1, 49, dtype=torch.long)
    codebook = torch.linspace(0, 1, 100)[:, None].expand(100, 16)  # neighbours differ by 0.01: nothing visible
    spliced, new = toy.splice(tokens, labels, codebook)
    assert torch.equal(spliced // 10, labels[:, None].expand(200, 49)) and torch.equal(new, labels)
    share = (spliced != tokens).float().mean(1)
    assert 0.2 < share.mean() < 0.32 and share.max() < 0.75
    shown = toy.splice(tokens, labels, torch.rand(100, 16))
    changed = (toy.decode(shown[0], torch.rand(100, 16)) >= 0).any() and (shown[0] != tokens).any(1)
    assert (shown[1][changed] == toy.NOT_A_DIGIT).float().mean() > 0.9
    assert torch.equal(shown[1][~changed], labels[~changed])


def test_the_judges_tell_digits_from_splices_and_share_no_training_digit(world, monkeypatch):
    real, spliced = world.measure_real(), world.measure_splices()
    assert min(real["reward"], real["held_out"]) > 0.45 > 0.35 > spliced and real["accuracy"] > 0.9
    seen = []
    monkeypatch.setattr(toy, "train_judge", lambda width, _, labels, *rest: seen.append(labels) or toy.Judge(width))
    images = torch.randint(256, (400, 28, 28), dtype=torch.uint8)
    toy.World.build((images, torch.arange(400)), (images[:50], torch.arange(50) % 10), toy.WorldSettings())
    assert len(seen[0]) == len(seen[1]) == 200 and not set(seen[0].tolist()) & set(seen[1].tolist())


def test_a_world_survives_a_file(world, tmp_path):
    torch.save(world.state(), tmp_path / "world.pt")
    again = toy.World.from_state(torch.load(tmp_path / "world.pt", weights_only=True), DEVICE)
    assert again.measure_real() == world.measure_real()


# -------------------------------------------------------------------------------------- the seams, and the command line

def alternating(tokens, cond):
    """A reward that knows no images: neighbours should differ under condition 0, be equal under condition 1."""
    differ = (tokens[:, 1:] != tokens[:, :-1]).float().mean(1)
    return torch.where(cond == 0, differ, 1 - differ)


@pytest.mark.parametrize("guided", [True, False])
def test_another_domain_through_the_seams(guided):
    """Strings, not digits: pretrain, train and sample know tokens and conditions only. Two steps decode eight tokens
    at once, so the model must learn to agree with itself."""
    torch.manual_seed(0)
    model = MDM(8, 3, 2, dim=32, depth=1).to(DEVICE)
    if not guided:
        model.null_cond = None
    data = torch.randint(3, (2000, 8), device=DEVICE)
    cogrpo.pretrain(model, data, conds(2000, 2), steps=50)
    test = conds(400, 2)
    before = alternating(sample(model, Schedule().to(DEVICE), test, 2), test).mean()
    weights = [p.clone() for p in model.parameters()]
    better, schedule, log = train(model, alternating, conds(2, 2), Settings(steps=2, iters=80, groups=4, lr=3e-3,
                                                                           kl_model=0.05, rl_seed=1))
    after = alternating(sample(better, schedule, test, 2), test).mean()
    assert before < 0.6 and after > before + 0.2 and len(log) == 80
    assert all(torch.equal(p, q) for p, q in zip(weights, model.parameters()))  # the model given is left as it was
    given = torch.full((400, 8), model.mask_id, device=DEVICE)
    given[:, 3] = 1
    assert (sample(better, schedule, test, 4, given)[:, 3] == 1).all()


def test_the_group_bonus_holds_against_narrowing():
    """A reward for one token narrows every sample to it, unless differing from the group counts as well."""
    left = {}
    for bonus in (0.0, 2.0):
        log = train(a_model(dtype=torch.float32, sharp=1.0), lambda x, c: (x == 0).float().mean(1), conds(3),
                    Settings(steps=2, iters=30, groups=3, lr=1e-2, kl_model=0, bonus=bonus, rl_seed=0))[2]
        left[bonus] = log[-1]["diversity"] / log[0]["diversity"]
    assert left[0.0] < 0.2 and left[2.0] > 0.5


@pytest.mark.parametrize("reward, word", [
    (lambda x, c: torch.zeros(len(x), 1), "shape"), (lambda x, c: torch.full((len(x),), math.nan), "NaN"),
    (lambda x, c: torch.zeros(len(x), dtype=torch.long), "float"), (lambda x, c: [0.0] * len(x), "list")])
def test_a_wrong_reward_is_refused(reward, word):
    with pytest.raises(ValueError, match=word):
        train(a_model(), reward, conds(3), Settings(iters=1, steps=2))


def test_a_diverging_update_is_stopped():
    with pytest.raises(ValueError, match="--lr 1e"):
        train(a_model(dtype=torch.float32), lambda x, c: torch.rand(len(x)), conds(3), Settings(lr=1e30, steps=2))


def test_alternating_updates_see_every_condition():
    """theta and phi take turns: if the conditions moved on at every iteration, each would only see half of them."""
    seen, settings = {0: set(), 1: set()}, Settings(update="alternate", iters=4, groups=2, steps=2)
    train(a_model(), lambda x, c: torch.rand(len(x)), conds(4, 4), settings,
          lambda row, model, schedule, tokens, cond: seen[row["iter"] % 2].update(cond.tolist()))
    assert seen == {0: {0, 1, 2, 3}, 1: {0, 1, 2, 3}}


def test_T_outside_the_sequence_is_refused():
    with pytest.raises(ValueError, match="1..6"):
        sample(a_model(), a_schedule(), conds(2), 7)


TINY = ["--quick", "--data=drawn", "--device=cpu", "--iters=12", "--groups=2", "--group-size=4", "--pretrain-steps=30",
        "--train-images=1000", "--test-images=300", "--judge-epochs=1", "--dim=32", "--depth=1", "--eval-samples=100"]


def test_the_pipeline_end_to_end(tmp_path, capsys, monkeypatch):
    """Every stage and file; a second run takes the world from the cache and gives the same figures; a changed setting
    is noticed; a checkpoint is measured at another T."""
    monkeypatch.chdir(tmp_path)
    cogrpo.main(TINY)
    first = capsys.readouterr().out
    files = {f.name for f in Path("out").iterdir()}
    assert files == {"results.csv", "log.csv", "samples.png", "decoding.gif", "schedule.png", "curves.png", "cogrpo.pt"}
    names = [line.split("|")[1].strip() for line in first.splitlines() if line.startswith("|")][2:]
    assert names == ["base T=4", "base T=32", "Co-GRPO T=4", "real digits"]
    assert len(Path("out/log.csv").read_text().splitlines()) == 13
    results = Path("out/results.csv").read_text()

    cogrpo.main(TINY)
    assert "from cache" in capsys.readouterr().out and Path("out/results.csv").read_text() == results
    cogrpo.main(TINY + ["--codebook-size=32", "--iters=0"])
    assert "from cache" not in capsys.readouterr().out and len(list(Path("cache").iterdir())) == 2

    cogrpo.main(["--load=out/cogrpo.pt", "--steps=8", "--out=other", "--device=cpu", "--eval-samples=100"])
    assert "Co-GRPO T=8" in capsys.readouterr().out and Path("other/decoding.gif").exists()


def test_the_ablation_goes_on_where_it_was_stopped(tmp_path, capsys, monkeypatch):
    """Two arms on one world; without the second arm's row that one alone is run again, to the same figures."""
    monkeypatch.chdir(tmp_path)
    cogrpo.main(TINY + ["--ablate"])
    first, path = capsys.readouterr().out, Path("ablation/ablation.csv")
    rows, table = path.read_text().splitlines(), Path("ablation/ablation.md").read_text()
    assert [row.split(",")[2] for row in rows[1:]] == ["hand-made"] * 4 + ["joint"] * 4 + ['"joint']
    assert "joint, no KL, T = 4" in table and {f.name for f in Path("ablation").iterdir()} == {
        "ablation.csv", "ablation.md", "frontier.png", "quality.png", "samples.png", "samples.pt"}
    path.write_text("\n".join(rows[:-1]) + "\n")
    cogrpo.main(TINY + ["--ablate"])
    assert "joint, no KL" in first and "seed 0: joint\n" not in capsys.readouterr().out
    assert Path("ablation/ablation.md").read_text() == table
    with pytest.raises(SystemExit) as stopped:
        cogrpo.main(TINY + ["--ablate", "--lr=0.1"])
    assert stopped.value.code == 2 and "--out ablation: its ablation.csv is of" in capsys.readouterr().err


def test_the_ablations_claims_against_numbers():
    """Two worlds that differ a lot, arms that differ by little: paired differences, the interaction and what a hand
    reaches at equal diversity (between two values of tau_s) do not see the worlds."""
    def row(held_out, diversity):
        return dict.fromkeys((*cogrpo.COLUMNS, "log_reward", "log_held_out"), held_out) | {"diversity": diversity}
    figures = {("joint", 4): {"0": row(0.30, 0.35), "1": row(0.62, 0.35)}}
    for arm, less in (("hand-made", 0.2), ("model only", 0.1), ("schedule only", 0.15)):
        figures[arm, 4] = {"0": row(0.30 - less, 0.40), "1": row(0.62 - less, 0.40)}
    figures["tau_s = 0.7", 4] = {"0": row(0.20, 0.30), "1": row(0.20, 0.30)}
    figures["hand-made", 32] = {"0": row(0.2, 0.34), "1": row(0.4, 0.34)}
    text = "\n".join(cogrpo.tables(figures, 4))
    assert "| model only, T = 4 | -0.100 ± 0.000 | -0.100" in text
    assert "gains, held_out: +0.050 ± 0.000" in text
    ratios = [0.30 / 0.15, 0.62 / 0.31]  # halfway between tau_s = 1 (0.1; 0.42) and 0.7 (0.2)
    assert f"by hand at T = 4 of equal diversity (ratio): {np.mean(ratios):.2f} ± 0.00, in 2 of 2 worlds" in text
    assert "by hand at T = 32 of equal diversity (ratio): -, in 0 of 2" in text  # the sweep does not reach 0.35 there


def test_intervals_against_numbers():
    """Student's t: for 1, 2, 3 it is 4.303 / sqrt(3); coverage of 95% over many samples of five."""
    assert cogrpo.interval([1.0, 2.0, 3.0]) == pytest.approx((2, 4.303 / 3 ** 0.5), rel=1e-3)
    draws = np.random.default_rng(0).normal(3, 2, (4000, 5))
    inside = [abs(mean - 3) < half for mean, half in map(cogrpo.interval, draws.tolist())]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.012)


def test_the_best_by_hand_is_found_within_one_runs_reward_calls():
    """A reward that likes cold draws; and where those are forbidden, for they all look alike, the search says so."""
    model, calls, s = a_model(conds=10, dtype=torch.float32), [], Settings(steps=2, rl_seed=0)
    likely = model(torch.full((1, 6), 5, device=DEVICE), torch.zeros(1, dtype=torch.long, device=DEVICE)).argmax(2)

    class Likes:
        def reward(tokens, cond):
            calls.append(len(cond))
            return (tokens == likely).float().mean(1)
    found, strict = (cogrpo.best_by_hand(model, Likes, s, floor, DEVICE).hand_made for floor in (0.0, 0.99))
    assert sum(calls) / 2 <= 80 * 10 * 12 and found(1.0)[1] < 0.8 and strict(1.0)[1] >= 1


def test_the_benchmark_runs(capsys):
    cogrpo.main("--bench --device=cpu --dim=16 --depth=1 --groups=2 --group-size=4 --bench-tokens=4".split())
    table = re.findall(r"^\| (.*?) \|(?: (\d+) \|){2} (\d+\.\d+) \|$", capsys.readouterr().out, re.M)
    assert [row[0] for row in table] == ["rollout", "re-scoring and its backward", "whole iteration"]
    assert all(float(row[2]) > 0 for row in table)


def test_interrupting_leaves_the_last_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls, reward = [], toy.World.reward

    def interrupted(self, tokens, cond):
        calls.append(None)
        if len(tokens) == 8 and sum(1 for _ in calls) > 16:  # the rollouts of TINY have eight samples
            raise KeyboardInterrupt
        return reward(self, tokens, cond)
    monkeypatch.setattr(toy.World, "reward", interrupted)
    with pytest.raises(SystemExit) as stopped:
        cogrpo.main(TINY + ["--iters=30"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 130 and "--load out/cogrpo.pt" in last
    assert cogrpo.load_checkpoint("out/cogrpo.pt")["iterations"] == 10


@pytest.mark.parametrize("flags, words", [
    (["--steps=0"], "--steps 0"), (["--steps=50"], "1..49"), (["--group-size=1"], "--group-size 1"),
    (["--lr=nan"], "--lr nan"), (["--update=both"], "--update"), (["--data=empty"], "--data empty: no MNIST"),
    (["--data=broken"], "train-\\*"), (["--out=file/x"], "--out file/x"), (["--load=file"], "--load file: not a"),
    (["--load=none.pt"], "--load none.pt: no such"), (["--load=file", "--lr=1"], "--lr"), (["--dim=30"], "--heads"),
    (["--frobnicate"], "--frobnicate"), (["--seed=-1"], "--seed -1"),
    (["--load=file", "--quick"], "--quick"), (["--eval-samples=3"], "--eval-samples 3"),
    (["--ablate", "--update=model"], "--update"), (["--ablate", "--iters=3"], "--iters 3"),
    (["--worlds=2"], "--worlds"), (["--ablate", "--bench"], "--bench"), (["--rl-seed=99999999999"], "--rl-seed 9")]
    + ([] if torch.cuda.is_available() else [(["--device=cuda"], "--device cuda")]))
def test_bad_input_ends_in_one_line_and_status_2(flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").write_text("not a checkpoint")
    raw = Path("broken/MNIST/raw")
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        header = (b"\0\0\x08\x03\0\0\0\x0a" + b"\0\0\0\x1c" * 2) if "images" in name else b"\0\0\x08\x01\0\0\0\x0a"
        (raw / f"{name}-ubyte").write_bytes(header + b"\0\0\0")  # says ten, holds none
    with pytest.raises(SystemExit) as stopped:
        cogrpo.main((["--data=drawn"] if not any("data" in f or "load" in f for f in flags) else []) + flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and re.search(words, error), error


def test_a_download_that_hangs_gives_way_to_drawn_digits(tmp_path, monkeypatch):
    """A server that accepts and says nothing: after DOWNLOAD_TIMEOUT without a byte the digits are drawn instead."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()  # an implicit ./data without MNIST is skipped
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(toy.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{silent.getsockname()[1]}/"])
        monkeypatch.setattr(toy, "DOWNLOAD_TIMEOUT", 0.3)
        settings = toy.WorldSettings(train_images=256, test_images=200)
        (images, _), _, source, _ = toy.load_digits(None, settings, 0)
    assert images.shape == (256, 28, 28) and "nothing came for 0.3 s" in source and "--data" in source
    assert [f.name for f in tmp_path.iterdir()] == ["data"]


def test_the_readmes_own_model_and_reward_run():
    """The block "bring your own" is a program: it runs as it stands."""
    readme = Path(__file__).with_name("README.md").read_text()
    block = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    exec(compile(block, "README.md", "exec"), {})


if __name__ == "__main__":
    print("L = 3, V = 2, T = 2, one token kept a step; means over 20 random models and rewards\n")
    print("| tau_r | bias of fill | bias of exact | variance of fill | variance of exact |", "|---" * 5 + "|", sep="\n")
    for tau in (0.3, 1.0, 3.0, 10.0):
        fill, exact = (np.mean([bias_and_variance(name, k, tau) for k in range(20)], 0) for name in ("fill", "exact"))
        print(f"| {tau:g} | {fill[0]:.3f} | {exact[0]:.0e} | {fill[1]:.1f} | {exact[1]:.1f} |")
