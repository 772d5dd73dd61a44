"""Sanity checks that a reader can learn the method from. Each tests one property of Co-GRPO.

    pytest                     these and those of experiments/: no network, no data
    pytest test_cogrpo.py      these alone; on a GPU where there is one

The gradient itself is checked against enumeration in experiments/test_gradient.py.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in cogrpo.py, before torch is imported
import copy
import itertools
import math
import weakref
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch.distributions import Categorical, Normal, kl_divergence

import cogrpo
import toy_reward as toy
from cogrpo import (MDM, Schedule, Settings, Step, UserError, constrain, iterate, observe, prepare,
                    rollout, sample, train, update)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# ------------------------------------------------------------------ small models to test on
def a_model(seq_len=6, vocab=5, num_conds=3, guided=True, seed=0, dtype=torch.float64, sharp=4.0):
    """A small untrained MDM, far from uniform, so that no term of a gradient vanishes."""
    torch.manual_seed(seed)
    model = MDM(seq_len, vocab, num_conds, dim=16, depth=1, heads=2).to(DEVICE, dtype).eval()
    with torch.no_grad():
        for p in (model.token.weight, model.cond.weight, model.position):
            p.normal_()
        model.head.weight.mul_(sharp)
        for block in model.blocks.layers:  # their output starts at 0; here positions see each other
            block.self_attn.out_proj.weight.normal_(std=0.25)
            block.linear2.weight.normal_(std=0.25)
    if not guided:
        model.null_cond = None
    return model


def a_schedule(seed=1, dtype=torch.float64, scale=0.3, **kwargs):
    """A schedule whose residual is random, not zero: it reacts to the canvas."""
    torch.manual_seed(seed)
    schedule = Schedule(**kwargs).to(DEVICE, dtype)
    nn.init.normal_(schedule.residual[2].weight, std=scale)
    return schedule


def by_hand(function, dtype=torch.float64):
    """A schedule that is hand-made and nothing else."""
    return Schedule(function).to(DEVICE, dtype)


def conds(n, classes=3):
    return torch.arange(n, device=DEVICE) % classes


def likes_large(tokens, cond):
    """A reward of either sign: the mean token, less 2."""
    return tokens.double().mean(1) - 2


def flat(tensors):
    return torch.cat([torch.zeros(0), *[x.detach().flatten().cpu() for x in tensors]]).double()


def weights(module):
    return flat(module.parameters())


def plain(model, schedule, lr=0.0):
    """Plain gradient steps, or none: what is looked at is the gradient."""
    parts = [{"params": list(part.parameters())} for part in (model, schedule)]
    return torch.optim.SGD(parts, lr)


def gradients(model, schedule):
    return [flat(torch.zeros_like(p) if p.grad is None else p.grad for p in part.parameters())
            for part in (model, schedule)]


@pytest.fixture
def unclipped(monkeypatch):
    """`update` leaves its gradients as they are."""
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: torch.zeros(()))


def an_advantage():
    torch.manual_seed(5)
    return torch.randn(48, dtype=torch.float64).to(DEVICE)


def a_rollout(model, schedule, T=3, parts=1, advantage=None):
    """48 samples in parts, as `update` takes them; always the same ones."""
    advantage = an_advantage() if advantage is None else advantage
    torch.manual_seed(3)
    tokens, trajectory = rollout(model, schedule, conds(48), T)
    rollouts = []
    for rows in torch.arange(48, device=DEVICE).chunk(parts):
        steps = [rows_of(step, rows) for step in trajectory]
        rollouts.append((tokens[rows], steps, conds(48)[rows], advantage[rows]))
    return rollouts


def rows_of(step, rows):
    """A Step of some of its samples."""
    values = [getattr(step, f.name) for f in fields(Step)]
    return Step(*[x[rows] if torch.is_tensor(x) and len(x) == len(step.canvas) else x
                  for x in values])


def one_update(model, schedule, reference, which="joint", lr=0.0, advantage=None, parts=1, **more):
    """Roll out 48 samples and update: (metrics, gradient of theta, gradient of phi)."""
    s = Settings(**{"steps": 3, **more})
    rollouts = a_rollout(model, schedule, s.steps, parts, advantage)
    metrics = update(model, schedule, reference, plain(model, schedule, lr), rollouts, s, which)
    return {name: float(x) for name, x in metrics.items()}, *gradients(model, schedule)


def log_theta(model, step, cond):
    """log p_theta of the filled tokens, else 0: [B, L]."""
    l_c, l_u = cogrpo.cond_uncond(model, step.canvas, cond)
    return cogrpo.model_likelihood(l_c, l_u, step) * step.filled


def log_phi(schedule, step):
    """log p_phi of the action by its definition: [B]."""
    p_phi, _ = schedule(step.observation, step.t, step.T)
    scored = [1, 3] if step.t == step.T - 1 else [0, 1, 2, 3]  # r and tau_r not in the last step
    return Normal(p_phi.mean, 0.3).log_prob(step.action)[:, scored].sum(1)

# ------------------------------------------------------------------ schedule and rollout
@pytest.mark.parametrize("T", [1, 3, 6])
def test_each_step_keeps_what_the_ratio_says_and_the_last_keeps_all(T):
    """After a step floor(r L) tokens are masked, but one at least was filled. Filled ones stay."""
    model = a_model()
    tokens, trajectory = rollout(model, a_schedule(), conds(64), T)
    canvases = [step.canvas for step in trajectory] + [tokens]
    for t, step in enumerate(trajectory):
        before, after = step.masked.sum(1), canvases[t + 1]
        left = (step.action[:, 0].sigmoid() * 6 + 1e-3).floor().long()
        wanted = torch.minimum(left, before - 1).clamp(min=0)
        if t == T - 1:
            wanted = torch.zeros_like(before)
        assert torch.equal((after == model.mask_id).sum(1), wanted)
        assert torch.equal(after[~step.masked], step.canvas[~step.masked])
        assert torch.equal(after[step.filled], step.candidate[step.filled])
        assert (step.t, step.T) == (t, T)
    assert (0 <= tokens).all() and (tokens < 5).all()


def test_the_most_confident_candidates_are_kept():
    """Without noise no candidate that stays masked had a higher log p, at temperature 1."""
    schedule = by_hand(lambda t, T: (1 - (t + 1) / T, 2.0, 0.0, 0.5))
    _, trajectory = rollout(a_model(), schedule, conds(64), 3, explore=False)
    for step in trajectory[:-1]:
        l_c, l_u = cogrpo.cond_uncond(a_model(), step.canvas, conds(64))
        log_p = (l_c + 0.5 * (l_c - l_u)).log_softmax(2)
        log_p = log_p.gather(2, step.candidate[:, :, None])[:, :, 0]
        lowest = log_p.masked_fill(~step.filled, math.inf).amin(1)
        left = step.masked & ~step.filled
        assert (log_p.masked_fill(~left, -math.inf).amax(1) <= lowest + 1e-4).all()


def test_a_linear_schedule_leaves_exactly_the_tokens_it_says():
    """r = 1 - u leaves L - L (t + 1) / T: no token more or less where that is an integer."""
    for L, T in ((16, 8), (64, 16), (49, 7), (4096, 64)):
        for t in range(T - 1):
            action = cogrpo.unconstrain((1 - (t + 1) / T, 1, 1, 1)).float()
            left = constrain(action)[0] * L + 1e-3
            assert int(left.floor()) == L - L * (t + 1) // T
    schedule = by_hand(lambda t, T: (1 - (t + 1) / T, 1.0, 1.0, 1.0), torch.float32)
    model = a_model(seq_len=16, dtype=torch.float32)
    _, trajectory = rollout(model, schedule, conds(4), 8, explore=False)
    assert [int(step.masked[0].sum()) for step in trajectory] == [16, 14, 12, 10, 8, 6, 4, 2]


def test_nothing_left_to_fill_before_the_last_step_is_no_trouble():
    """With r = 0 the first step fills all, and the later ones find nothing to do. T may be > L."""
    schedule = by_hand(lambda t, T: (0.0, 1.0, 1.0, 1.0))
    tokens, trajectory = rollout(a_model(), schedule, conds(8), 3)
    assert [int(step.masked.sum()) for step in trajectory] == [48, 0, 0]
    assert not trajectory[1].filled.any()
    given = torch.zeros(8, 6, dtype=torch.long, device=DEVICE)
    given[:, 2] = 5
    tokens = sample(a_model(), schedule, conds(8), 9, given)
    assert (tokens[:, [0, 1, 3, 4, 5]] == 0).all() and (tokens < 5).all()


def test_given_tokens_stay_and_the_ratio_counts_from_the_masked_ones():
    given = torch.full((32, 6), 5, device=DEVICE)
    given[:, 1], given[:, 4] = 2, 0
    schedule = by_hand(lambda t, T: (0.5, 1.0, 1.0, 1.0))
    tokens = sample(a_model(), schedule, conds(32), 2, given)
    assert (tokens[:, 1] == 2).all() and (tokens[:, 4] == 0).all() and (tokens != 5).all()
    _, trajectory = rollout(a_model(), schedule, conds(32), 2, given, explore=False)
    assert (trajectory[1].masked.sum(1) == 2).all()  # half of the four


def test_a_new_schedule_is_the_hand_made_one_at_any_T():
    """The residual's last layer starts at zero. Any value has a pre-image: 0 becomes 1e-6."""
    schedule = Schedule().double()
    for T in (1, 4, 8, 50):
        for t in range(T):
            p_phi, hand_made = schedule(torch.rand(3, 3).double(), t, T)
            u = (t + 1) / T
            wanted = math.cos(math.pi * u / 2), 1.0, 4.5 * (1 - u), 1.0
            assert constrain(p_phi.mean)[0].tolist() == pytest.approx(wanted, abs=2e-6)
            assert torch.equal(p_phi.mean, hand_made.mean)
    for values in ((0, 0, 0, 0), (1, 1e-3, 710, 1e5), (0.5, 1e3, 2.0, 0.1)):
        assert constrain(cogrpo.unconstrain(values)).tolist() == (
            pytest.approx(values, rel=1e-4, abs=2e-6))


def test_the_schedule_knows_the_step_the_canvas_and_the_condition():
    """A table over t alone is not this method: other canvases and conditions, other actions."""
    model, schedule = a_model(), a_schedule()
    _, trajectory = rollout(model, schedule, torch.zeros_like(conds(16)), 4, explore=False)
    assert trajectory[2].action.std(0).min() > 1e-3  # the canvases differ by then
    _, trajectory = rollout(model, schedule, conds(3), 4, explore=False)
    assert trajectory[0].action.std(0).min() > 1e-3  # the conditions differ
    same, means = torch.rand(1, 3, dtype=torch.float64, device=DEVICE), []
    for t, T in ((0, 4), (2, 4), (1, 8)):
        p_phi, hand_made = schedule(same, t, T)
        means.append(p_phi.mean - hand_made.mean)
    assert (means[0] - means[1]).abs().min() > 1e-3
    assert torch.allclose(means[0], means[2])      # step 0 of 4 and step 1 of 8 are one u, 1 / 4
    seen = []
    by_hand(lambda t, T: seen.append((t, T)) or (0.5, 1.0, 1.0, 1.0))(same, 2, 7)
    assert seen == [(2, 7)]


def test_the_observation_is_of_masked_positions_only():
    """What is filled must not move the schedule. Uniform: entropy 1, largest probability 1 / V."""
    logits = torch.randn(4, 6, 5, dtype=torch.float64)
    masked = torch.tensor([True, True, True, False, False, False]).expand(4, 6)
    changed = logits.clone()
    changed[:, 3:] += torch.randn(4, 3, 5, dtype=torch.float64)
    one, other = observe(logits, masked), observe(changed, masked)
    assert torch.equal(one, other)
    p = logits[:, :3].softmax(2)
    assert torch.allclose(one[:, 1], p.amax(2).mean(1))
    assert torch.allclose(one[:, 2], Categorical(p).entropy().mean(1) / math.log(5))
    uniform = observe(torch.zeros(1, 6, 5).double(), masked[:1])[0]
    assert uniform.tolist() == pytest.approx([0.5, 0.2, 1.0])
    assert observe(logits[:1], masked[:1] & False).tolist() == [[0, 0, 0]]


def test_candidates_are_drawn_from_the_guided_tempered_distribution():
    """Frequencies of 40,000 candidates against softmax((l_c + w (l_c - l_u)) / tau_s)."""
    model, n = a_model(sharp=1.0), 40000
    schedule = by_hand(lambda t, T: (0.5, 0.7, 1.0, 1.5))
    torch.manual_seed(0)
    _, (step,) = rollout(model, schedule, torch.zeros_like(conds(n)), 1, explore=False)
    canvas = torch.full((2, 6), 5, device=DEVICE)
    l_c, l_u = model(canvas, torch.tensor([0, 3], device=DEVICE))
    p = ((l_c + 1.5 * (l_c - l_u)) / 0.7).softmax(1)
    frequency = torch.nn.functional.one_hot(step.candidate, 5).double().mean(0)
    assert (frequency - p).abs().max() < 4 * 0.5 / n ** 0.5


def test_gumbel_noise_in_float32_reaches_the_tail():
    """One token of p = 0.5 and 100,000 of 5e-6 each: the tail is drawn half of the time.

    Given the tail's largest score m, the one token stays below it with probability exp(-0.5 / e^m).
    """
    torch.manual_seed(0)
    tail, chances = torch.full((25, 100000), math.log(5e-6), device=DEVICE), []
    for _ in range(100):
        noise = cogrpo.gumbel_like(tail)
        assert noise.isfinite().all()
        largest = (tail + noise).amax(1).double()
        chances.append((-0.5 * (-largest).exp()).exp())
    assert abs(float(torch.cat(chances).mean()) - 0.5) < 0.02


def test_exploration_is_gaussian_in_training_and_absent_in_sample(monkeypatch):
    schedule = a_schedule(std=0.2)
    _, trajectory = rollout(a_model(), schedule, conds(3000), 3)
    noise = flat(step.action - schedule(step.observation, step.t, 3)[0].mean for step in trajectory)
    assert float(noise.std()) == pytest.approx(0.2, rel=0.03) and abs(float(noise.mean())) < 0.01
    steps = []
    monkeypatch.setattr(cogrpo, "Step", lambda *step: steps.append(Step(*step)) or steps[-1])
    sample(a_model(), a_schedule(), conds(8), 3)
    assert len(steps) == 3 and all(torch.equal(
        step.action, a_schedule()(step.observation, step.t, 3)[0].mean) for step in steps)

# ------------------------------------------------------------------ advantage, likelihood, KL
def test_the_model_is_scored_under_what_its_tokens_were_drawn_from():
    model, schedule = a_model(), a_schedule()
    tokens, trajectory = rollout(model, schedule, conds(8), 3)
    canvases = [step.canvas for step in trajectory] + [tokens]
    for t, step in enumerate(trajectory):
        _, tau_s, _, w = constrain(step.action).T[:, :, None, None]
        l_c = model(step.canvas, conds(8))
        l_u = model(step.canvas, torch.full_like(conds(8), 3))
        p = ((l_c + w * (l_c - l_u)) / tau_s).softmax(2)
        got = log_theta(model, step, conds(8))
        for b, i in itertools.product(range(8), range(6)):
            filled = step.canvas[b, i] == 5 and canvases[t + 1][b, i] != 5
            wanted = p[b, i, canvases[t + 1][b, i]].log().item() if filled else 0.0
            assert got[b, i].item() == pytest.approx(wanted, abs=1e-10)


def test_the_schedule_is_scored_on_what_has_an_effect():
    """r and tau_r do nothing in the last step, w nothing without guidance: no part of p_phi."""
    for guided in (True, False):
        schedule = a_schedule(std=0.2)
        _, trajectory = rollout(a_model(guided=guided), schedule, conds(8), 3)
        for t, step in enumerate(trajectory):
            columns = [1] if t == 2 else [0, 1, 2]
            columns += [3] if guided else []
            p_phi, _ = schedule(step.observation, t, 3)
            normal = Normal(p_phi.mean, 0.2).log_prob(step.action)[:, columns].sum(1)
            assert torch.allclose(cogrpo.schedule_likelihood(p_phi, step), normal, atol=1e-10)


def test_group_advantage_against_numbers():
    """The unbiased std, within the group of neighbours. All equal, but for rounding: zero."""
    reward = torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0, 10.0])
    assert cogrpo.group_advantage(reward, 3).tolist() == pytest.approx([-1, 0, 1, 0, 0, 0])
    for nearly in ([0.1] * 7, [0.1, 0.1 + 1e-8] * 4, [0.0] * 5, [1e5, 1e5 + 0.01, 1e5]):
        equal = torch.tensor(nearly)
        assert (cogrpo.group_advantage(equal, len(nearly)) == 0).all()


@pytest.mark.parametrize("unit", [1e-6, 1e-3, 1e3, 1e6])
def test_the_advantage_does_not_depend_on_the_unit_of_the_reward(unit):
    """At G = 2 only the sign of the difference survives."""
    torch.manual_seed(0)
    reward = torch.randn(60) - 3
    wanted = cogrpo.group_advantage(reward, 12)
    assert (cogrpo.group_advantage(unit * reward, 12) - wanted).abs().max() < 1e-3
    pairs = cogrpo.group_advantage(torch.tensor([0.0, 1, 0, 100]) * unit, 2)
    assert pairs.tolist() == pytest.approx([-(0.5 ** 0.5), 0.5 ** 0.5] * 2, 1e-3)


def test_the_clip_takes_credit_only_on_the_side_that_would_gain():
    """None past 1 + clip for praise, none below 1 - clip for blame. The other sides keep theirs."""
    for ratio, advantage, value, gradient in (
            (1.5, 1.0, 1.2, 0.0), (0.5, 1.0, 0.5, 0.5), (1.5, -1.0, -1.5, -1.5),
            (0.5, -1.0, -0.8, 0.0), (1.1, 2.0, 2.2, 2.2)):
        new = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
        gain = cogrpo.surrogate(new, torch.tensor(0.0), advantage, 0.2)
        gain.backward()
        assert gain.item() == pytest.approx(value) and new.grad.item() == pytest.approx(gradient)


def test_both_kls_against_torch_distributions(unclipped):
    """Values and gradients. The model's is on the un-tempered l_c, over the masked positions."""
    model, schedule, reference = a_model(), a_schedule(), a_model(seed=9)
    metrics, theta, phi = one_update(model, schedule, reference, advantage=torch.zeros(48),
                                     beta=0.7, schedule_beta=0.3)
    (_, trajectory, cond, _), = a_rollout(model, schedule)
    kl_model = kl_schedule = 0
    for t, step in enumerate(trajectory):
        l_c, l_ref = model(step.canvas, cond), reference(step.canvas, cond)
        kl = kl_divergence(Categorical(logits=l_c), Categorical(logits=l_ref))
        kl_model += (kl * step.masked).sum() / (48 * 6)
        hand_made = cogrpo.unconstrain(cogrpo.hand_made(t, 3)).to(l_c)
        mean = schedule(step.observation, t, 3)[0].mean
        kl_schedule += kl_divergence(Normal(mean, 0.3), Normal(hand_made, 0.3)).sum() / (48 * 3)
    assert metrics["kl_model"] == pytest.approx(kl_model.item(), 1e-6)
    assert metrics["kl_schedule"] == pytest.approx(kl_schedule.item(), 1e-6)
    for got, kl, part in ((theta / 0.7, kl_model, model), (phi / 0.3, kl_schedule, schedule)):
        wanted = flat(torch.autograd.grad(kl, list(part.parameters())))
        assert (got - wanted).norm() < 1e-9 * wanted.norm()


def test_the_models_kl_does_not_see_the_null_condition():
    """It is on l_c alone. A drift of l_u moves what is drawn and costs nothing: know it."""
    model, reference = a_model(), a_model()
    with torch.no_grad():
        model.cond.weight[model.null_cond] += torch.randn(16).to(model.position)
    metrics, _, _ = one_update(model, Schedule().to(DEVICE), reference)
    assert metrics["kl_model"] == pytest.approx(0, abs=1e-12)
    canvas, w = torch.full((1, 6), 5, device=DEVICE), torch.ones(1, device=DEVICE)
    now, then = [cogrpo.guided_logits(*cogrpo.cond_uncond(m, canvas, conds(1)), w)
                 for m in (model, reference)]
    assert (now - then).abs().max() > 0.1


def test_equal_rewards_move_nothing():
    """No advantage and p = q: both KLs' gradients are exactly zero, which Adam cannot scale up."""
    model, start = a_model(dtype=torch.float32), a_schedule(dtype=torch.float32, scale=0.0)
    better, schedule, log = train(model, lambda x, c: torch.zeros(len(x)), conds(3),
                                  Settings(iters=4, steps=3, groups=3), schedule=start)
    close = 0.0 if DEVICE == "cpu" else 1e-3
    assert (weights(better) - weights(model)).abs().max() <= close
    assert (weights(schedule) - weights(start)).abs().max() <= close
    assert log[-1]["groups_equal"] == 1

# ------------------------------------------------------------------ the update
@pytest.mark.parametrize("which", ["joint", "model", "schedule"])
def test_each_update_moves_its_own_policy_only(which):
    model, schedule = a_model(), a_schedule()
    before = weights(model), weights(schedule)
    one_update(model, schedule, a_model(), which, lr=0.1)
    assert torch.equal(before[0], weights(model)) == (which == "schedule")
    assert torch.equal(before[1], weights(schedule)) == (which == "model")


def test_thetas_gradient_is_the_policy_gradient_of_the_filled_tokens(unclipped):
    """-(1 / B L) sum A-hat grad log p(filled token). Joint or alone: the same."""
    model, schedule = a_model(), a_schedule()
    _, theta, _ = one_update(model, schedule, a_model(), beta=0)
    _, alone, _ = one_update(a_model(), a_schedule(), a_model(), "model", beta=0)
    (_, trajectory, cond, advantage), = a_rollout(model, schedule)
    gain = sum((advantage[:, None] * log_theta(model, step, cond)).sum() for step in trajectory)
    wanted = flat(torch.autograd.grad(-gain / (48 * 6), list(model.parameters())))
    assert (theta - wanted).norm() < 1e-9 * wanted.norm() and wanted.norm() > 1e-3
    assert torch.allclose(theta, alone, rtol=1e-9, atol=1e-12)


def test_phis_gradient_is_the_policy_gradient_of_the_actions(unclipped):
    """-(1 / B T) sum A-hat grad log Normal(a_t; mean, std). Joint or alone: the same."""
    model, schedule = a_model(), a_schedule()
    _, _, phi = one_update(model, schedule, a_model(), schedule_beta=0)
    _, _, alone = one_update(a_model(), a_schedule(), a_model(), "schedule", schedule_beta=0)
    (_, trajectory, _, advantage), = a_rollout(model, schedule)
    gain = sum((advantage * log_phi(schedule, step)).sum() for step in trajectory)
    wanted = flat(torch.autograd.grad(-gain / (48 * 3), list(schedule.parameters())))
    assert torch.allclose(phi, wanted, rtol=1e-9, atol=1e-12) and phi.norm() > 1e-3
    assert torch.allclose(phi, alone, rtol=1e-9, atol=1e-12)


def test_a_second_epoch_measures_its_ratios_from_the_rollout(unclipped):
    """With plain steps: the second gradient is that of the surrogate, under the first's log p."""
    s = Settings(steps=3, epochs=2, beta=0, schedule_beta=0)
    model, schedule = a_model(), a_schedule()
    rollouts = a_rollout(model, schedule)
    (_, trajectory, cond, advantage), = rollouts
    old = [(log_theta(model, step, cond).detach(), log_phi(schedule, step).detach())
           for step in trajectory]
    update(model, schedule, a_model(), plain(model, schedule, lr=0.3), rollouts, s)
    theta, phi = gradients(model, schedule)  # of the second epoch
    model, schedule = a_model(), a_schedule()
    one_update(model, schedule, a_model(), lr=0.3, beta=0, schedule_beta=0)  # the first epoch
    gain_theta = gain_phi = 0
    for step, (old_theta, old_phi) in zip(trajectory, old):
        new_theta, new_phi = log_theta(model, step, cond), log_phi(schedule, step)
        assert (new_theta - old_theta).abs().max() > 1e-2 < (new_phi - old_phi).abs().max()
        gain_theta += (cogrpo.surrogate(new_theta, old_theta, advantage[:, None], 0.2)).sum()
        gain_phi += cogrpo.surrogate(new_phi, old_phi, advantage, 0.2).sum()
    for got, gain, part in ((theta, gain_theta / 6, model), (phi, gain_phi / 3, schedule)):
        wanted = flat(torch.autograd.grad(-gain / 48, list(part.parameters())))
        assert (got - wanted).norm() < 1e-9 * wanted.norm()


@pytest.mark.parametrize("which", ["model", "schedule"])
def test_ratios_clip_each_policy_against_the_rollouts_log_probs(which, unclipped):
    """Had all become e^0.5 times as likely, praise has no gradient left, and blame still has."""
    for sign in (1.0, -1.0):
        model, schedule = a_model(), a_schedule()
        rollouts = a_rollout(model, schedule, advantage=torch.full((48,), sign).to(DEVICE))
        for step in rollouts[0][1]:
            with torch.no_grad():
                step.old_log_theta = log_theta(model, step, conds(48)) - 0.5
                step.old_log_phi = log_phi(schedule, step) - 0.5
        s = Settings(beta=0, schedule_beta=0)
        update(model, schedule, model, plain(model, schedule), rollouts, s, which)
        theta, phi = gradients(model, schedule)
        assert ((theta if which == "model" else phi).norm() == 0) == (sign > 0)


def test_each_policys_gradient_is_clipped_to_norm_1_on_its_own():
    metrics, theta, phi = one_update(a_model(), a_schedule(), a_model(seed=9), beta=500.0,
                                     schedule_beta=500.0)
    assert metrics["grad_model"] > 1 < metrics["grad_schedule"]
    assert float(theta.norm()) == pytest.approx(1, rel=1e-4)
    assert float(phi.norm()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("parts", [3, 5])
def test_micro_batches_give_the_same_gradient(parts, unclipped):
    """A larger model fits by fewer samples at a time. What it learns must not depend on them."""
    whole = one_update(a_model(), a_schedule(), a_model(seed=9), epochs=2, lr=0.1)
    part = one_update(a_model(), a_schedule(), a_model(seed=9), epochs=2, lr=0.1, parts=parts)
    for one, other in zip(whole[1:], part[1:]):
        assert (one - other).norm() < 1e-9 * one.norm()
    assert part[0] == pytest.approx(whole[0], rel=1e-6, abs=1e-12)


def test_the_graph_of_a_step_is_freed_before_the_next():
    """Memory does not grow with T: when the model runs for a step, the last one's graph is gone."""
    model, alive, outputs = a_model(), [], []

    def watch(module, args, output):
        if output.requires_grad:
            alive.append(sum(ref() is not None for ref in outputs))
            outputs.append(weakref.ref(output))
    model.blocks.register_forward_hook(watch)  # the graph holds its output
    one_update(model, a_schedule(), a_model(), steps=6)
    assert len(alive) == 6 and max(alive) <= 1  # a name may still hold the last one's output

# ------------------------------------------------------------------ train passes on what it is told
def trained(model=None, hook=None, start=None, reward=likes_large, **more):
    """A short training: (model, schedule, log)."""
    model = model if model is not None else a_model()
    settings = Settings(**{"iters": 4, "steps": 2, "groups": 3, "group_size": 4, **more})
    return train(model, reward, conds(3), settings, on_iteration=hook, schedule=start)


@pytest.mark.parametrize("iters, more, touches", [
    (1, {"optimize": "model"}, "phi"), (1, {"optimize": "schedule"}, "theta"),
    (1, {"lr": 5e-3}, "theta"), (1, {"schedule_lr": 5e-2}, "phi"), (2, {"beta": 50.0}, "theta"),
    (1, {"schedule_beta": 5.0}, "phi"), (1, {"epochs": 2}, "theta phi"),
    (1, {"steps": 3}, "theta phi"), (1, {"groups": 6}, "theta phi"),
    (1, {"group_size": 6}, "theta phi"), (1, {"seed": 1}, "theta phi"),
    (2, {"optimize": "alternate"}, "theta phi"), (2, {"iters": 3}, "theta phi"),
    (1, {"epochs": 3, "clip": 1e-6}, "theta phi"), (1, {"micro_groups": 2}, "theta phi")])
def test_every_setting_reaches_what_it_names_and_nothing_else(iters, more, touches):
    base = {"epochs": 3} if "clip" in more else {}
    results = []
    for changed in ({}, more):
        model, schedule, _ = trained(start=a_schedule(), **{"iters": iters, **base, **changed})
        results.append((weights(model), weights(schedule)))
    (theta, phi), (new_theta, new_phi) = results
    assert torch.equal(theta, new_theta) == ("theta" not in touches)
    assert torch.equal(phi, new_phi) == ("phi" not in touches)


def test_the_std_of_the_actions_is_the_schedules():
    """That of the settings for a new schedule; one that is given keeps its own."""
    assert trained(action_std=0.2)[1].std == 0.2
    assert trained(action_std=0.2, start=a_schedule(std=0.4))[1].std == 0.4


def test_training_starts_at_what_it_is_given_and_leaves_it_alone():
    """The model stays as it was, as the KL's reference; the hand-made function comes along."""
    model, start = a_model(), a_schedule(hand_made=lambda t, T: (0.4, 0.9, 1.0, 0.5))
    before = weights(model), weights(start)
    better, schedule, log = trained(model, start=start, iters=5, lr=0.05)
    assert torch.equal(before[0], weights(model)) and torch.equal(before[1], weights(start))
    assert not torch.equal(weights(better), before[0]) and schedule.hand_made is start.hand_made
    assert abs(log[0]["kl_model"]) < 1e-6 < 1e-3 < log[-1]["kl_model"]
    idle = trained(model, start=start, lr=0.0, schedule_lr=0.0)
    assert torch.equal(weights(idle[0]), before[0]) and torch.equal(weights(idle[1]), before[1])


def test_gradients_do_not_add_up_over_iterations():
    """An iteration's gradient is of its own rollout, and one update uses it up."""
    def forget(metrics, model, schedule, rollouts):
        for p in (*model.parameters(), *schedule.parameters()):
            p.grad = None
    assert torch.equal(weights(trained(hook=forget)[0]), weights(trained()[0]))


def test_the_learning_rates_fall_to_zero():
    """Adam moves a weight by about the learning rate, so the largest moves fall in a line."""
    seen = []
    trained(hook=lambda metrics, m, p, _: seen.append((weights(m), weights(p))), iters=20,
            reward=lambda x, c: torch.rand(len(x)), lr=0.01, schedule_lr=0.02)
    for policy, lr in ((0, 0.01), (1, 0.02)):
        moves = [float((seen[i + 1][policy] - seen[i][policy]).abs().max()) for i in range(19)]
        assert all(moves[i] < 1.5 * lr * (1 - (i + 1) / 20) for i in range(19))
        first = seen[0][policy] - weights((a_model(), Schedule())[policy])
        assert policy or float(first.abs().max()) == pytest.approx(lr, rel=0.01)


def test_alternate_takes_turns_on_the_same_conditions():
    """The paper's: theta in even iterations, phi in odd ones, each for all conditions."""
    seen, conditions = [], {0: set(), 1: set()}

    def watch(metrics, model, schedule, rollouts):
        seen.append((weights(model), weights(schedule)))
        conditions[metrics["iter"] % 2].update(rollouts[0][2].tolist())
    settings = Settings(optimize="alternate", iters=4, groups=2, group_size=4, steps=2)
    train(a_model(num_conds=4), likes_large, conds(4, 4), settings, on_iteration=watch,
          schedule=a_schedule())
    turns = [[not torch.equal(a, b) for a, b in zip(seen[i], seen[i + 1])] for i in range(3)]
    assert turns == [[False, True], [True, False], [False, True]]
    assert conditions == {0: {0, 1, 2, 3}, 1: {0, 1, 2, 3}}


def test_groups_take_the_conditions_in_turn():
    """Neighbours share one, and over the iterations none is left out. A list of them will do."""
    seen = []
    settings = Settings(iters=3, groups=2, group_size=3, steps=1)
    train(a_model().cpu(), likes_large, [0, 1, 2], settings,
          on_iteration=lambda *args: seen.append(args[3][0][2].tolist()))
    assert seen == [[0, 0, 0, 1, 1, 1], [2, 2, 2, 0, 0, 0], [1, 1, 1, 2, 2, 2]]


def test_the_advantage_of_a_sample_belongs_to_it():
    """In parts of two groups each sample keeps its tokens, condition and advantage."""
    kept = []
    trained(iters=1, micro_groups=2, hook=lambda metrics, m, p, rollouts: kept.extend(rollouts))
    assert [len(tokens) for tokens, _, _, _ in kept] == [8, 4]
    for tokens, trajectory, cond, advantage in kept:
        last = trajectory[-1]
        assert torch.equal(tokens, torch.where(last.filled, last.candidate, last.canvas))
        reward = likes_large(tokens, cond).float()
        assert torch.equal(advantage, cogrpo.group_advantage(reward, 4))
    assert torch.cat([cond for _, _, cond, _ in kept]).tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_the_metrics_are_of_the_rollout():
    log = []

    def watch(metrics, model, schedule, rollouts):
        rewards = [likes_large(tokens, cond) for tokens, _, cond, _ in rollouts]
        log.append((metrics, torch.cat(rewards).view(3, 4)))
    trained(iters=2, hook=watch, micro_groups=2)
    for i, (metrics, reward) in enumerate(log):
        assert metrics["iter"] == i
        assert metrics["reward"] == pytest.approx(float(reward.mean()), rel=1e-5)
        assert metrics["group_std"] == pytest.approx(float(reward.std(1).mean()), rel=1e-5)
        equal = (reward.amax(1) == reward.amin(1)).double().mean()
        assert metrics["groups_equal"] == pytest.approx(float(equal))


def test_a_seed_decides_whatever_was_drawn_before_and_whatever_a_hook_does():
    """Each iteration seeds itself, so a hook may sample or seed; and no two are alike."""
    seen = []

    def hook(metrics, model, schedule, rollouts):
        tokens, _, cond, _ = rollouts[0]
        seen.append(tokens)
        torch.manual_seed(0)
        sample(model, schedule, cond, 2)
    torch.manual_seed(1)
    one = trained(iters=3, reward=lambda x, c: (x == c[:, None]).double().mean(1))
    torch.manual_seed(2)
    other = trained(iters=3, reward=lambda x, c: (x == c[:, None]).double().mean(1), hook=hook)
    assert torch.equal(weights(one[0]), weights(other[0]))
    assert torch.equal(weights(one[1]), weights(other[1]))
    assert (seen[0] == seen[1]).double().mean() < 0.8


def test_the_callers_own_loop_may_stop_and_go_on():
    """`prepare`, then `iterate`: saved after the first half and loaded, it ends as `train` does."""
    whole_model, whole_schedule, _ = trained(iters=6)
    s = Settings(iters=6, steps=2, groups=3, group_size=4)
    state = prepare(a_model(), conds(3), s)
    for i in range(3):
        iterate(i, state, likes_large, conds(3), s)
    saved = copy.deepcopy([state[k].state_dict() for k in (0, 1, 3)])
    torch.rand(7)
    state = prepare(a_model(), conds(3), s)
    for k, part in zip((0, 1, 3), saved):
        state[k].load_state_dict(part)
    for i in range(3, 6):
        iterate(i, state, likes_large, conds(3), s)
    assert torch.equal(weights(state[0]), weights(whole_model))
    assert torch.equal(weights(state[1]), weights(whole_schedule))
    with pytest.raises(UserError, match="iteration 6"):  # the learning rate would be negative
        iterate(6, state, likes_large, conds(3), s)

# ------------------------------------------------------------------ the command line
TINY = toy.Size(train_images=1000, test_images=300, codebook_size=32, reward_epochs=3, dim=32,
                depth=1, pretrain_steps=30, pretrain_batch=32, eval_samples=200)
SMALL = ["--quick", "--data=drawn", "--iters=3", "--groups=2", "--group-size=4"]


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "QUICK", TINY)


def read(path):
    return [line.split(",") for line in Path(path).read_text("utf-8").splitlines()]


def test_the_pipeline_end_to_end(small, capsys):
    """Every stage and file. A second run prints the same figures, and so does a loaded result."""
    cogrpo.main([*SMALL, "--steps=3", "--seed=2"])
    out = capsys.readouterr().out
    files = {file.name for file in Path("out-quick").iterdir()}
    assert files == {"base.pt", "cogrpo.pt", "results.csv", "log.csv", "samples.png",
                     "decoding.gif", "schedule.png", "curves.png"}
    names = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")]
    assert names[2:] == ["hand-made T=32", "hand-made T=3", "joint T=3", "real digits"]
    assert len(read("out-quick/log.csv")) == 4
    results = read("out-quick/results.csv")
    cogrpo.main([*SMALL[2:], "--steps=3", "--seed=2", "--load=out-quick/base.pt", "--out=again"])
    assert read("again/results.csv") == results
    measure = ["--iters=0", "--seed=2", "--load=out-quick/cogrpo.pt"]
    cogrpo.main([*measure, "--steps=3", "--out=measured"])
    measured = read("measured/results.csv")
    assert measured[3][0] == "loaded T=3" and measured[3][1:] == results[3][1:]
    assert not Path("measured/log.csv").exists()
    cogrpo.main([*measure, "--steps=8", "--out=é"])
    assert "loaded T=8" in capsys.readouterr().out and Path("é/decoding.gif").exists()
    assert read("é/results.csv")[1] == results[1]  # T = 32 is the base's, as before
