"""Sanity checks that a reader can learn the method from. Each tests one property of Co-GRPO.

    pytest                     these and those of experiments/: no network, no data
    pytest test_cogrpo.py      these alone; on a GPU where there is one

The gradient itself is checked against enumeration in experiments/test_gradient.py.
"""
import copy
import itertools
import math
import re
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch.distributions import Categorical, Normal, kl_divergence

import cogrpo
import toy_reward as toy
from cogrpo import MDM, Schedule, Settings, Step, constrain, rollout, sample, train, update

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ------------------------------------------------------------------ small models to test on

def a_model(seq_len=6, vocab=5, num_conds=3, guided=True, seed=0, dtype=torch.float64, sharp=4.0):
    """A small untrained MDM, far from uniform, so that no term of a gradient vanishes."""
    torch.manual_seed(seed)
    model = MDM(seq_len, vocab, num_conds, dim=16, depth=1, heads=2).to(DEVICE, dtype)
    with torch.no_grad():
        for p in (model.token.weight, model.cond.weight, model.position):
            p.normal_()
        model.head.weight.mul_(sharp)
        for block in model.blocks:  # they start as the identity; here positions see each other
            block.proj.weight.normal_(std=0.25)
            block.mlp[2].weight.normal_(std=0.25)
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
    return Schedule(hand_made=function).to(DEVICE, dtype)


def conds(n, classes=3):
    return torch.arange(n, device=DEVICE) % classes


def likes_zeros(tokens, cond):
    """A reward: the share of tokens that are 0."""
    return (tokens == 0).double().mean(1)


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


def rescored(model, schedule, step, t, T, cond, likelihood="fill"):
    """log p of the model [B, L] and of the schedule [B], under the weights as they are now."""
    l_c, l_u = cogrpo.branches(model, step.canvas, cond)
    mean = schedule(cogrpo.canvas_statistics(l_c.log_softmax(2), step.masked), t, T)
    logits = cogrpo.guided_logits(l_c, l_u, constrain(step.action)[3])
    log_p = cogrpo.LOG_PROB[likelihood](logits, step)
    return log_p, schedule.log_prob(mean, step.action, step.acts)


def one_update(model, schedule, reference, which="joint", lr=0.0, advantage=None, parts=1, **more):
    """Roll out 48 samples and update once: (diagnostics, gradient of theta, gradient of phi)."""
    s = Settings(**{"grad_norm": 1e9, "steps": 3, **more})
    if advantage is None:
        torch.manual_seed(5)
        advantage = torch.randn(48, dtype=torch.float64)
    advantage = advantage.to(model.position)
    torch.manual_seed(3)
    _, trajectory = rollout(model, schedule, conds(48), s.steps, likelihood=s.likelihood)
    batch = split(trajectory, conds(48), advantage, parts)
    row = update(model, schedule, reference, plain(model, schedule, lr), batch, s, which)
    return {name: float(x) for name, x in row.items()}, *gradients(model, schedule)


def split(trajectory, cond, advantage, size):
    """A rollout in parts of `size` samples (1: in one part)."""
    size = len(cond) if size == 1 else size
    parts = []
    for rows in torch.arange(len(cond), device=cond.device).split(size):
        steps = [Step(*[getattr(step, f.name)[rows] for f in cogrpo.fields(Step)])
                 for step in trajectory]
        parts.append((steps, cond[rows], advantage[rows]))
    return parts


# ------------------------------------------------------------------ pretraining

class Recorder(nn.Module):
    """Copies what it can see, knows one number, how likely a hidden 0 is, and keeps its input."""

    def __init__(self, seq_len=10, vocab=4, null_cond=7):
        super().__init__()
        self.seq_len, self.mask_id, self.null_cond, self.vocab = seq_len, vocab, null_cond, vocab
        self.scale = nn.Parameter(torch.zeros(()))
        self.shown = []

    def forward(self, tokens, cond):
        self.shown.append((tokens.clone(), cond.clone()))
        seen = nn.functional.one_hot(tokens, self.vocab + 1)[:, :, :self.vocab]
        zero = torch.eye(self.vocab)[0]
        return 50.0 * seen + self.scale * zero * (tokens == self.mask_id)[:, :, None]


def test_pretraining_shows_masks_by_the_law_and_never_the_answer():
    """A share cos(pi U / 2) is hidden, 2 / pi on average, an exact count; the rest is the data."""
    torch.manual_seed(0)
    model, data = Recorder(), torch.randint(4, (300, 10))
    cogrpo.pretrain(model, data, torch.arange(300), steps=200, batch=32, drop=0.0)
    tokens = torch.cat([tokens for tokens, _ in model.shown])
    row = torch.cat([cond for _, cond in model.shown])  # the condition says which row it was
    hidden = tokens == model.mask_id
    assert torch.equal(tokens[~hidden], data[row][~hidden])
    count = torch.bincount(hidden.sum(1), minlength=11) / len(hidden)
    k = torch.arange(11)
    law = torch.zeros(11)  # P(ceil(10 cos(pi U / 2)) = k)
    law[1:] = (torch.acos((k[1:] - 1) / 10) - torch.acos(k[1:] / 10)) / (math.pi / 2)
    assert (count - law).abs().max() < 0.02 and count[0] == 0
    assert (hidden.float().mean(0) - hidden.float().mean()).abs().max() < 0.02  # anywhere alike
    assert len(row.unique()) == 300


def test_pretraining_drops_a_tenth_of_the_conditions():
    """They become the null condition, of any shape; a model without guidance keeps them all."""
    for null, shape in ((7, ()), (7, (3,)), (torch.tensor([7, 8, 9]), (3,)), (None, ())):
        torch.manual_seed(0)
        model = Recorder(null_cond=null)
        cond = torch.zeros(50, *shape, dtype=torch.long)
        cogrpo.pretrain(model, torch.randint(4, (50, 10)), cond, steps=100, batch=32)
        seen = torch.cat([cond for _, cond in model.shown]).reshape(3200, -1)
        dropped = (seen != 0).any(1)
        wanted = 0.0 if null is None else 0.1
        assert float(dropped.float().mean()) == pytest.approx(wanted, abs=0.02)
        assert null is None or (seen[dropped] == torch.as_tensor(null)).all()
        assert not cond.any()  # the data stay as they are


def test_pretraining_loss_and_gradient_are_of_this_batchs_hidden_tokens_alone():
    """What is visible is copied for nothing. At lr 0 every batch has the same loss and gradient."""
    for data, scale, loss, gradient in (
            (torch.zeros(64, 10), 0.0, math.log(4), 1 / 4 - 1),  # four equal guesses, one is right
            (torch.ones(64, 10), 3.0, 3.1393, 0.8700)):          # log(3 + e^3), e^3 / (3 + e^3)
        model = Recorder()
        nn.init.constant_(model.scale, scale)
        cond = torch.zeros(64).long()
        returned = cogrpo.pretrain(model, data.long(), cond, steps=5, batch=64, lr=0.0)
        assert returned == pytest.approx(loss, abs=1e-4)
        assert float(model.scale.grad) == pytest.approx(gradient, abs=1e-4)


def test_pretraining_learns_what_a_condition_means():
    """Condition c has c everywhere: with it the loss falls to 0, without it to a guess of three.

    The returned loss is the mean of the last 100 steps, and the learning rate has fallen to 0.
    """
    torch.manual_seed(0)
    model, cond = MDM(6, 3, 3, dim=32, depth=1), torch.arange(300) % 3
    rates = []
    model.register_forward_pre_hook(lambda *_: rates.append(model.head.weight.detach().clone()))
    loss = cogrpo.pretrain(model, cond[:, None].repeat(1, 6), cond, steps=300, batch=64, lr=1e-2)
    assert loss < 0.1
    moves = [float((a - b).abs().max()) for a, b in zip(rates, rates[1:])]
    assert max(moves[-5:]) < 0.02 * max(moves)
    canvas = torch.full((3, 6), model.mask_id)
    assert model(canvas, torch.arange(3)).softmax(2)[range(3), 0, range(3)].min() > 0.9
    null = model(canvas, torch.full((3,), model.null_cond)).softmax(2)
    assert (null - 1 / 3).abs().max() < 0.25  # dropped conditions were trained, too


# ------------------------------------------------------------------ schedule and rollout

@pytest.mark.parametrize("steps", [1, 3, 6])
def test_each_step_keeps_what_the_ratio_says_and_the_last_keeps_all(steps):
    """After a step floor(r L) tokens are masked, but one at least was filled. Filled ones stay."""
    model = a_model()
    tokens, trajectory = rollout(model, a_schedule(), conds(64), steps)
    canvases = [step.canvas for step in trajectory] + [tokens]
    for t, step in enumerate(trajectory):
        before, after = step.masked.sum(1), canvases[t + 1]
        left = (step.action[:, 0].sigmoid() * 6 + 1e-3).floor().long()
        wanted = torch.minimum(left, before - 1).clamp(min=0)
        if t == steps - 1:
            wanted = torch.zeros_like(before)
        assert torch.equal((after == model.mask_id).sum(1), wanted)
        assert torch.equal(after[~step.masked], step.canvas[~step.masked])
        assert torch.equal(after[step.filled], step.candidate[step.filled])
    assert (0 <= tokens).all() and (tokens < 5).all()


def test_the_surest_candidates_are_kept():
    """Without noise no candidate that stays masked was surer, at temperature 1, than a kept one."""
    schedule = by_hand(lambda t, T: (1 - (t + 1) / T, 2.0, 0.0, 0.5))
    _, trajectory = rollout(a_model(), schedule, conds(64), 3, explore=False)
    for step in trajectory[:-1]:
        l_c, l_u = cogrpo.branches(a_model(), step.canvas, conds(64))
        log_p = (l_c + 0.5 * (l_c - l_u)).log_softmax(2)
        sure = log_p.gather(2, step.candidate[:, :, None])[:, :, 0]
        lowest = sure.masked_fill(~step.filled, math.inf).amin(1)
        left = step.masked & ~step.filled
        assert (sure.masked_fill(~left, -math.inf).amax(1) <= lowest + 1e-4).all()


def test_a_linear_schedule_leaves_exactly_the_tokens_it_says():
    """r = 1 - u leaves L - L (t + 1) / T: no token more or less where that is an integer."""
    for L, T in ((16, 8), (64, 16), (49, 7), (4096, 64)):
        for t in range(T - 1):
            action = torch.tensor(cogrpo.unconstrain(1 - (t + 1) / T, 1, 1, 1))  # float32
            left = constrain(action)[0] * L + 1e-3
            assert int(left.floor()) == L - L * (t + 1) // T
    schedule = by_hand(lambda t, T: (1 - (t + 1) / T, 1.0, 1.0, 1.0), torch.float32)
    model = a_model(seq_len=16, dtype=torch.float32)
    _, trajectory = rollout(model, schedule, conds(4), 8, explore=False)
    assert [int(step.masked[0].sum()) for step in trajectory] == [16, 14, 12, 10, 8, 6, 4, 2]


def test_one_masked_token_or_none_left_before_the_last_step():
    """With r = 0 the first step fills all; the later ones find nothing to do, and say so."""
    schedule = by_hand(lambda t, T: (0.0, 1.0, 1.0, 1.0))
    tokens, trajectory = rollout(a_model(), schedule, conds(8), 3)
    assert [int(step.masked.sum()) for step in trajectory] == [48, 0, 0]
    assert not trajectory[1].acts.any() and not trajectory[1].filled.any()
    assert (trajectory[1].old_model == 0).all() and (trajectory[1].old_schedule == 0).all()
    given = torch.zeros(8, 6, dtype=torch.long, device=DEVICE)
    given[:, 2] = 5
    tokens, trajectory = rollout(a_model(), schedule, conds(8), 3, given)
    assert (tokens[:, [0, 1, 3, 4, 5]] == 0).all() and (tokens < 5).all()
    assert trajectory[0].acts[0].tolist() == [False, True, False, True]  # nothing to rank


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
            got = [x[0].item() for x in constrain(schedule(torch.rand(3, 5).double(), t, T))]
            u = (t + 1) / T
            wanted = math.cos(math.pi * u / 2), 1.0, 4.5 * (1 - u), 1.0
            assert got == pytest.approx(wanted, abs=2e-6)
    for values in ((0, 0, 0, 0), (1, 1e-3, 710, 1e5), (0.5, 1e3, 2.0, 0.1)):
        assert [float(x) for x in constrain(torch.tensor(cogrpo.unconstrain(*values)))] == (
            pytest.approx(values, rel=1e-4, abs=2e-6))


def test_the_schedule_knows_the_step_the_canvas_and_the_condition():
    """A table over t alone is not this method: other canvases and conditions, other actions."""
    model, schedule = a_model(), a_schedule()
    _, trajectory = rollout(model, schedule, torch.zeros_like(conds(16)), 4, explore=False)
    assert trajectory[2].mean.std(0).min() > 1e-3  # the canvases differ by then
    _, trajectory = rollout(model, schedule, conds(3), 4, explore=False)
    assert trajectory[0].mean.std(0).min() > 1e-3  # the conditions differ
    same = torch.rand(1, 5, dtype=torch.float64, device=DEVICE)
    early, late, half = [schedule(same, t, T) - schedule.prior(t, T, same)
                         for t, T in ((0, 4), (2, 4), (1, 8))]
    assert (early - late).abs().min() > 1e-3
    assert torch.allclose(early, half)             # step 0 of 4 and step 1 of 8 are one u, 1 / 4
    seen = []
    by_hand(lambda t, T: seen.append((t, T)) or (0.5, 1.0, 1.0, 1.0)).prior(2, 7, same)
    assert seen == [(2, 7)]


def test_statistics_look_at_masked_positions_only():
    """What is filled must not move the schedule. Uniform: entropy 1, confidence 1 / V."""
    logits = torch.randn(4, 6, 5, dtype=torch.float64)
    masked = torch.tensor([True, True, True, False, False, False]).expand(4, 6)
    changed = logits.clone()
    changed[:, 3:] += torch.randn(4, 3, 5, dtype=torch.float64)
    one, other = [cogrpo.canvas_statistics(x.log_softmax(2), masked) for x in (logits, changed)]
    assert torch.equal(one, other)
    p = logits[:, :3].softmax(2)
    assert torch.allclose(one[:, 1], p.amax(2).mean(1))
    assert torch.allclose(one[:, 3], Categorical(p).entropy().mean(1) / math.log(5))
    assert torch.allclose(one[:, 2], p.amax(2).std(1, unbiased=False), atol=1e-4)
    uniform = torch.full((1, 6, 5), 0.2).double().log()
    wanted = torch.tensor([0.5, 0.2, 1e-3, 1.0, 1e-3]).double()
    assert torch.allclose(cogrpo.canvas_statistics(uniform, masked[:1])[0], wanted, atol=1e-9)


def test_tokens_are_drawn_from_the_guided_tempered_distribution():
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


def test_exploration_is_gaussian_in_training_and_absent_in_sample(monkeypatch):
    _, trajectory = rollout(a_model(), a_schedule(spread=0.2), conds(3000), 3)
    noise = torch.stack([step.action - step.mean for step in trajectory])
    assert float(noise.std()) == pytest.approx(0.2, rel=0.03) and abs(float(noise.mean())) < 0.01
    steps = []
    monkeypatch.setattr(cogrpo, "Step", lambda *step: steps.append(Step(*step)) or steps[-1])
    sample(a_model(), a_schedule(), conds(8), 3)
    assert len(steps) == 3 and all(torch.equal(step.mean, step.action) for step in steps)


def test_schedule_log_prob_is_the_normals_over_the_parameters_that_act():
    """r and tau_r do nothing in the last step, w nothing without guidance: no part of p_phi."""
    for guided in (True, False):
        schedule = a_schedule(spread=0.2)
        _, trajectory = rollout(a_model(guided=guided), schedule, conds(8), 3)
        for t, step in enumerate(trajectory):
            columns = [1] if t == 2 else [0, 1, 2]
            columns += [3] if guided else []
            normal = Normal(step.mean, 0.2).log_prob(step.action)[:, columns].sum(1)
            assert torch.allclose(step.old_schedule, normal, rtol=0, atol=1e-10)


# ------------------------------------------------------------------ advantage, likelihood, KL

@pytest.mark.parametrize("likelihood", ["fill", "exact"])
@pytest.mark.parametrize("guided", [True, False])
def test_scoring_again_returns_the_stored_log_probs(likelihood, guided):
    """The ratio is exactly 1 while the weights are unchanged, so the clip measures their change."""
    model = a_model(guided=guided, dtype=torch.float32)
    schedule = a_schedule(dtype=torch.float32)
    _, trajectory = rollout(model, schedule, conds(32), 4, likelihood=likelihood)
    for t, step in enumerate(trajectory):
        log_theta, log_phi = rescored(model, schedule, step, t, 4, conds(32), likelihood)
        close = 1e-5 if DEVICE == "cpu" else 0.02  # bf16: kernels differ with the batch
        assert (log_theta - step.old_model).square().mean().sqrt() < close
        assert (log_phi - step.old_schedule).square().mean().sqrt() < close
        scored = step.filled if likelihood == "fill" else step.masked
        assert (step.old_model[scored] != 0).float().mean() > 0.98
        assert (step.old_model[~scored] == 0).all()


def test_fill_scores_the_filled_tokens_under_what_they_were_drawn_from():
    model, schedule = a_model(), a_schedule()
    tokens, trajectory = rollout(model, schedule, conds(8), 3)
    canvases = [step.canvas for step in trajectory] + [tokens]
    for t, step in enumerate(trajectory):
        _, tau_s, _, w = [x[:, None, None] for x in constrain(step.action)]
        l_c = model(step.canvas, conds(8))
        l_u = model(step.canvas, torch.full_like(conds(8), 3))
        p = ((l_c + w * (l_c - l_u)) / tau_s).softmax(2)
        for b, i in itertools.product(range(8), range(6)):
            filled = step.canvas[b, i] == 5 and canvases[t + 1][b, i] != 5
            wanted = p[b, i, canvases[t + 1][b, i]].log().item() if filled else 0.0
            assert float(step.old_model[b, i]) == pytest.approx(wanted, abs=1e-10)


def test_group_advantage_against_numbers():
    """The unbiased std, within the group of neighbours. All equal: exactly zero."""
    reward = torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0, 10.0]).double()
    wanted = [-1 / 1.0001, 0, 1 / 1.0001, 0, 0, 0]
    assert cogrpo.group_advantage(reward, 3).tolist() == pytest.approx(wanted, abs=1e-12)
    assert (cogrpo.group_advantage(torch.full((7,), 0.1), 7) == 0).all()
    low = torch.tensor([1.0, 1.0, 1.0, 1.0078125])
    for dtype in (torch.bfloat16, torch.float16):  # computed in float32, whatever the reward is
        assert torch.equal(cogrpo.group_advantage(low.to(dtype), 4), cogrpo.group_advantage(low, 4))


def test_dividing_by_the_std_forgets_the_scale_of_the_rewards():
    """At G = 2 only the sign of the difference survives."""
    pairs = cogrpo.group_advantage(torch.tensor([0.0, 1, 0, 100]), 2)
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


def test_both_kls_against_torch_distributions():
    """Values and gradients. The model's is on the un-tempered l_c, over the masked positions.

    The schedule's statistics depend on theta, and yet its KL sends nothing back there.
    """
    model, schedule, reference = a_model(), a_schedule(), a_model(seed=9)
    none = torch.zeros(48)
    row, theta, phi = one_update(model, schedule, reference, advantage=none, kl_model=0.7,
                                 kl_schedule=0.3)
    torch.manual_seed(3)
    _, trajectory = rollout(model, schedule, conds(48), 3)
    kl_model = kl_schedule = 0
    for t, step in enumerate(trajectory):
        l_c, l_ref = model(step.canvas, conds(48)), reference(step.canvas, conds(48))
        kl = kl_divergence(Categorical(logits=l_c), Categorical(logits=l_ref))
        kl_model += (kl * step.masked).sum() / (48 * 6)
        prior = torch.tensor(cogrpo.unconstrain(*cogrpo.hand_made(t, 3)), dtype=torch.float64)
        statistics = cogrpo.canvas_statistics(l_c.detach().log_softmax(2), step.masked)
        kl = kl_divergence(Normal(schedule(statistics, t, 3), 0.3), Normal(prior.to(l_c), 0.3))
        kl_schedule += (kl * step.acts).sum() / (48 * 3)
    assert row["kl_model"] == pytest.approx(kl_model.item(), 1e-6)
    assert row["kl_schedule"] == pytest.approx(kl_schedule.item(), 1e-6)
    for got, kl, part in ((theta / 0.7, kl_model, model), (phi / 0.3, kl_schedule, schedule)):
        wanted = flat(torch.autograd.grad(kl, list(part.parameters())))
        assert (got - wanted).norm() < 1e-9 * wanted.norm()


def test_the_models_kl_does_not_see_the_null_condition():
    """It is on l_c alone. A drift of l_u moves what is drawn and costs nothing: know it."""
    model, reference = a_model(), a_model()
    with torch.no_grad():
        model.cond.weight[model.null_cond] += torch.randn(16).to(model.position)
    row, _, _ = one_update(model, Schedule().to(DEVICE).double(), reference)
    assert row["kl_model"] == pytest.approx(0, abs=1e-12)
    canvas, w = torch.full((1, 6), 5, device=DEVICE), torch.ones(1, device=DEVICE)
    now, then = [cogrpo.guided_logits(*cogrpo.branches(m, canvas, conds(1)), w)
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
def test_each_update_moves_its_own_factor_only(which):
    model, schedule = a_model(), a_schedule()
    before = weights(model), weights(schedule)
    one_update(model, schedule, a_model(), which, lr=0.1)
    assert torch.equal(before[0], weights(model)) == (which == "schedule")
    assert torch.equal(before[1], weights(schedule)) == (which == "model")


@pytest.mark.parametrize("likelihood", ["fill", "exact"])
def test_joint_gives_either_factor_the_gradient_it_would_get_alone(likelihood):
    """And phi's is -(1 / B T) sum A-hat grad log Normal(a_t; mean, spread)."""
    more = {"likelihood": likelihood, "kl_schedule": 0}
    torch.manual_seed(5)
    advantage = torch.randn(48, dtype=torch.float64)
    _, _, phi = one_update(a_model(), a_schedule(), a_model(), "schedule", **more)
    _, theta, _ = one_update(a_model(), a_schedule(), a_model(), "model", **more)
    _, both_theta, both_phi = one_update(a_model(), a_schedule(), a_model(), **more)
    assert torch.allclose(both_phi, phi, rtol=1e-9, atol=1e-12)
    assert torch.allclose(both_theta, theta, rtol=1e-9, atol=1e-12)
    model, schedule = a_model(), a_schedule()
    torch.manual_seed(3)
    _, trajectory = rollout(model, schedule, conds(48), 3, likelihood=likelihood)
    gain = 0
    for t, step in enumerate(trajectory):
        log_p = model(step.canvas, conds(48)).detach().log_softmax(2)
        mean = schedule(cogrpo.canvas_statistics(log_p, step.masked), t, 3)
        log_p = (Normal(mean, 0.3).log_prob(step.action) * step.acts).sum(1)
        gain += (advantage.to(log_p) * log_p).sum() / (48 * 3)
    wanted = flat(torch.autograd.grad(-gain, list(schedule.parameters())))
    assert torch.allclose(phi, wanted, rtol=1e-9, atol=1e-12) and phi.norm() > 1e-3


def test_thetas_gradient_is_the_policy_gradient_of_the_filled_tokens():
    """-(1 / B L) sum A-hat grad log p(filled token), with the KL left out."""
    model, schedule = a_model(), a_schedule()
    _, theta, _ = one_update(model, schedule, a_model(), kl_model=0)
    torch.manual_seed(5)
    advantage = torch.randn(48, dtype=torch.float64).to(DEVICE)
    torch.manual_seed(3)
    _, trajectory = rollout(model, schedule, conds(48), 3)
    gain = 0
    for t, step in enumerate(trajectory):
        log_p, _ = rescored(model, schedule, step, t, 3, conds(48))
        gain += (advantage[:, None] * log_p).sum() / (48 * 6)
    wanted = flat(torch.autograd.grad(-gain, list(model.parameters())))
    assert (theta - wanted).norm() < 1e-9 * wanted.norm() and wanted.norm() > 1e-3


def test_a_second_epoch_measures_from_the_rollout():
    """In the second epoch the ratios have left 1: approx_kl and clip say how far."""
    once, _, _ = one_update(a_model(), a_schedule(), a_model(), lr=0.5)
    twice, _, _ = one_update(a_model(), a_schedule(), a_model(), lr=0.5, epochs=2)
    assert abs(once["approx_kl_model"]) < 1e-12 and once["clip_model"] == 0
    assert twice["approx_kl_model"] > 1e-5 and twice["approx_kl_schedule"] > 1e-5


@pytest.mark.parametrize("likelihood", ["fill", "exact"])
def test_ratios_clip_each_factor_against_the_rollouts_log_probs(likelihood):
    """Had all become e^0.5 times as likely, praise has no gradient left, and blame still has."""
    for sign in (1.0, -1.0):
        model, schedule = a_model(), a_schedule()
        _, trajectory = rollout(model, schedule, conds(16), 3, likelihood=likelihood)
        for step in trajectory:
            scored = step.filled if likelihood == "fill" else step.masked
            step.old_model = step.old_model - 0.5 * scored
            step.old_schedule = step.old_schedule - 0.5
        parts = [(trajectory, conds(16), torch.full((16,), sign).to(model.position))]
        s = Settings(likelihood=likelihood, kl_model=0, kl_schedule=0, grad_norm=1e9)
        row = update(model, schedule, model, plain(model, schedule), parts, s)
        assert float(row["clip_schedule"]) == 1
        assert likelihood == "exact" or float(row["clip_model"]) == pytest.approx(1)
        assert (row["grad_model"] == 0) == (row["grad_schedule"] == 0) == (sign > 0)


@pytest.mark.parametrize("likelihood", ["fill", "exact"])
@pytest.mark.parametrize("size", [5, 16])
def test_micro_batches_give_the_same_gradient(size, likelihood):
    """A larger model fits by fewer samples at a time. What it learns must not depend on them."""
    whole = one_update(a_model(), a_schedule(), a_model(seed=9), likelihood=likelihood, epochs=2)
    part = one_update(a_model(), a_schedule(), a_model(seed=9), likelihood=likelihood, epochs=2,
                      parts=size)
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
    model.norm.register_forward_hook(watch)  # the graph holds its output
    one_update(model, a_schedule(), a_model(), steps=6)
    assert len(alive) == 6 and max(alive) <= 1  # a name may still hold the last one's output


# ------------------------------------------------------------------ train passes on what it is told

def trained(model=None, hook=None, start=None, reward=likes_zeros, **more):
    """A short training: (model, schedule, log)."""
    model = model if model is not None else a_model()
    settings = Settings(**{"iters": 4, "steps": 2, "groups": 3, "group_size": 4, **more})
    return train(model, reward, conds(3), settings, hook, start)


@pytest.mark.parametrize("iters, more, touches", [
    (1, {"update": "model"}, "phi"), (1, {"update": "schedule"}, "theta"),
    (1, {"likelihood": "exact"}, "theta"), (1, {"lr": 5e-3}, "theta"),
    (1, {"schedule_lr": 5e-2}, "phi"), (2, {"kl_model": 50.0}, "theta"),
    (1, {"kl_schedule": 5.0}, "phi"), (1, {"grad_norm": 1e-9}, "theta phi"),
    (1, {"epochs": 2}, "theta phi"), (1, {"steps": 3}, "theta phi"),
    (1, {"groups": 6}, "theta phi"), (1, {"group_size": 6}, "theta phi"),
    (1, {"seed": 1}, "theta phi"), (2, {"update": "alternate"}, "theta phi"),
    (2, {"iters": 3}, "theta phi"), (1, {"epochs": 3, "clip": 1e-6}, "theta phi")])
def test_every_setting_reaches_what_it_names_and_nothing_else(iters, more, touches):
    base = {"epochs": 3} if "clip" in more else {}
    results = []
    for changed in ({}, more):
        model, schedule, _ = trained(start=a_schedule(), **{"iters": iters, **base, **changed})
        results.append((weights(model), weights(schedule)))
    (theta, phi), (new_theta, new_phi) = results
    assert torch.equal(theta, new_theta) == ("theta" not in touches)
    assert torch.equal(phi, new_phi) == ("phi" not in touches)


def test_the_spread_is_the_schedules():
    """That of the settings for a new schedule; one that is given keeps its own."""
    assert trained(spread=0.2)[1].spread == 0.2
    assert trained(spread=0.2, start=a_schedule(spread=0.4))[1].spread == 0.4


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
    """An iteration's gradient is of its own rollout, and one update uses it up.

    So a caller who zeroes all gradients after each iteration gets the same weights.
    """
    def forget(row, model, schedule, tokens, cond):
        for p in (*model.parameters(), *schedule.parameters()):
            p.grad = None
    assert torch.equal(weights(trained(hook=forget)[0]), weights(trained()[0]))


def test_the_learning_rates_fall_to_zero():
    """Adam moves a weight by about the learning rate, so the largest moves fall in a line."""
    seen = []
    trained(hook=lambda row, m, p, *_: seen.append((weights(m), weights(p))), iters=20,
            reward=lambda x, c: torch.rand(len(x)), lr=0.01, schedule_lr=0.02)
    for factor, lr in ((0, 0.01), (1, 0.02)):
        moves = [float((seen[i + 1][factor] - seen[i][factor]).abs().max()) for i in range(19)]
        assert all(moves[i] < 1.5 * lr * (1 - (i + 1) / 20) for i in range(19))
        first = seen[0][factor] - weights((a_model(), Schedule())[factor])
        assert factor or float(first.abs().max()) == pytest.approx(lr, rel=0.01)


def test_alternate_takes_turns_on_the_same_conditions():
    """The paper's: theta in even iterations, phi in odd ones, each for all conditions."""
    seen, conditions = [], {0: set(), 1: set()}

    def watch(row, model, schedule, tokens, cond):
        seen.append((weights(model), weights(schedule)))
        conditions[row["iter"] % 2].update(cond.tolist())
    settings = Settings(update="alternate", iters=4, groups=2, group_size=4, steps=2)
    train(a_model(), likes_zeros, conds(4, 4), settings, watch, a_schedule())
    turns = [[not torch.equal(a, b) for a, b in zip(seen[i], seen[i + 1])] for i in range(3)]
    assert turns == [[False, True], [True, False], [False, True]]
    assert conditions == {0: {0, 1, 2, 3}, 1: {0, 1, 2, 3}}


def test_groups_take_the_conditions_in_turn():
    """Neighbours share one, and over the iterations none is left out."""
    seen = []
    settings = Settings(iters=3, groups=2, group_size=3, steps=1)
    train(a_model(), likes_zeros, conds(3), settings, lambda *args: seen.append(args[4].tolist()))
    assert seen == [[0, 0, 0, 1, 1, 1], [2, 2, 2, 0, 0, 0], [1, 1, 1, 2, 2, 2]]


def test_the_advantage_of_a_sample_belongs_to_it():
    """In micro-batches of 5, which cut through groups, each sample keeps its advantage."""
    taken = []

    def spy(model, schedule, reference, optimizer, parts, s, which):
        taken.extend(parts)
        return real(model, schedule, reference, optimizer, parts, s, which)
    real, cogrpo.update = cogrpo.update, spy
    try:
        rows = []
        trained(iters=1, micro_batch=5, hook=lambda row, m, p, x, c: rows.append((x, c)))
    finally:
        cogrpo.update = real
    tokens, cond = rows[0]
    assert torch.equal(torch.cat([c for _, c, _ in taken]), cond)
    finished = [torch.where(steps[-1].filled, steps[-1].candidate, steps[-1].canvas)
                for steps, _, _ in taken]
    assert torch.equal(torch.cat(finished), tokens)
    wanted = cogrpo.group_advantage(likes_zeros(tokens, cond), 4)
    assert torch.equal(torch.cat([a for _, _, a in taken]), wanted) and len(taken) == 3


def test_the_log_is_of_the_rollout():
    log = []
    for likelihood in ("fill", "exact"):
        row = trained(iters=1, likelihood=likelihood)[2][0]
        assert abs(row["approx_kl_model"]) < 1e-9  # scored again as it was scored in the rollout
    trained(iters=2, hook=lambda row, m, p, x, c: log.append((dict(row), likes_zeros(x, c))))
    for i, (row, reward) in enumerate(log):
        assert row["iter"] == i and row["reward"] == pytest.approx(float(reward.mean()), rel=1e-5)
        std = reward.view(3, 4).std(1)
        assert row["group_std"] == pytest.approx(float(std.mean()), rel=1e-5)
        assert row["groups_equal"] == pytest.approx(float((std == 0).double().mean()))


def test_a_seed_decides_whatever_was_drawn_before_and_whatever_a_hook_does():
    """Each iteration seeds itself, so a hook may sample or seed; and no two are alike."""
    tokens = []

    def hook(row, model, schedule, x, cond):
        tokens.append(x)
        torch.manual_seed(0)
        sample(model, schedule, cond, 2)
    torch.manual_seed(1)
    one = trained(iters=3, reward=lambda x, c: (x == c[:, None]).double().mean(1))
    torch.manual_seed(2)
    other = trained(iters=3, reward=lambda x, c: (x == c[:, None]).double().mean(1), hook=hook)
    assert torch.equal(weights(one[0]), weights(other[0]))
    assert torch.equal(weights(one[1]), weights(other[1]))
    assert (tokens[0] == tokens[1]).double().mean() < 0.8


def test_the_callers_own_loop_may_stop_and_go_on():
    """`prepare`, then `iterate`: saved after the first half and loaded, it ends as `train` does."""
    whole_model, whole_schedule, _ = trained(iters=6)
    s = Settings(iters=6, steps=2, groups=3, group_size=4)
    parts = cogrpo.prepare(a_model(), s)
    for i in range(3):
        cogrpo.iterate(i, *parts, likes_zeros, conds(3), s)
    saved = copy.deepcopy([parts[k].state_dict() for k in (0, 1, 3)])
    torch.rand(7)
    parts = cogrpo.prepare(a_model(), s)
    for k, state in zip((0, 1, 3), saved):
        parts[k].load_state_dict(state)
    for i in range(3, 6):
        cogrpo.iterate(i, *parts, likes_zeros, conds(3), s)
    assert torch.equal(weights(parts[0]), weights(whole_model))
    assert torch.equal(weights(parts[1]), weights(whole_schedule))


@pytest.mark.parametrize("reward, words", [
    (lambda x, c: torch.zeros(len(x), 1), "[12, 1]"), (lambda x, c: [0.0] * len(x), "list"),
    (lambda x, c: torch.full((len(x),), math.nan), "NaN"), (lambda x, c: x.sum(1), "int64")])
def test_a_wrong_reward_is_refused(reward, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        trained(reward=reward)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match="1..6"):
        sample(a_model(), a_schedule(), conds(2), 7)
    with pytest.raises(ValueError, match="NaN or infinity"):
        trained(a_model(dtype=torch.float32), lr=1e6, reward=lambda x, c: torch.rand(len(x)))
    for name, value in (("steps", 0), ("group_size", 1), ("lr", math.nan), ("update", "both"),
                        ("likelihood", "full"), ("seed", -1), ("spread", 0.0), ("iters", -1)):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} {value}"):
            Settings(**{name: value})


# ------------------------------------------------------------------ the command line

TINY = toy.Size(train_images=2000, test_images=400, codebook_size=32, judge_epochs=3, dim=32,
                depth=1, pretrain_steps=30, pretrain_batch=32, eval_samples=200)
SMALL = ["--quick", "--data=drawn", "--device=cpu", "--iters=3", "--groups=2", "--group-size=4"]


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "QUICK", TINY)


def read(path):
    return [line.split(",") for line in Path(path).read_text("utf-8").splitlines()]


def test_the_pipeline_end_to_end(small, capsys, monkeypatch):
    """Every stage and file. A second run finds the world and prints the same figures."""
    command = [*SMALL, "--steps=3", "--seed=2"]
    cogrpo.main(command)
    first = capsys.readouterr().out
    files = {file.name for file in Path("out").iterdir()}
    assert files == {"results.csv", "log.csv", "samples.png", "decoding.gif", "schedule.png",
                     "curves.png", "cogrpo.pt"}
    names = [line.split("|")[1].strip() for line in first.splitlines() if line.startswith("| ")]
    assert names[1:] == ["base T=32", "base T=3", "Co-GRPO T=3", "real digits"]
    assert len(read("out/log.csv")) == 4
    results = read("out/results.csv")
    cogrpo.main(command)
    assert "from cache" in capsys.readouterr().out and read("out/results.csv") == results
    cogrpo.main(["--load=out/cogrpo.pt", "--device=cpu"])  # measured again, from the file alone
    assert read("out/T3/results.csv") == results and not Path("out/T3/log.csv").exists()
    cogrpo.main(["--load=out/cogrpo.pt", "--steps=8", "--out=é", "--device=cpu"])
    assert "Co-GRPO T=8" in capsys.readouterr().out and Path("é/decoding.gif").exists()
    assert read("é/results.csv")[1] == results[1]  # T = 32 is the base's, as before


def test_the_readmes_own_programs_run():
    """The blocks under "Bring your own" run, one after the other, in fewer iterations."""
    readme = Path(__file__).with_name("README.md").read_text("utf-8")
    readme = readme.replace("iters=200", "iters=9")
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", readme, re.S):
        exec(compile(block, "README.md", "exec"), namespace)
    assert "sample" in namespace
