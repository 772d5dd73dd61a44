"""The exact likelihood: also which candidates were kept, and what the schedule saw. (ours)

cogrpo.py scores the filled tokens and the action, as the paper's figure does. Two more things
depend on theta: the ranking of the candidates, and p_phi through its observation. With both, the
gradient of the update is that of the expected reward (gradient.py). It learns no more on the toy
world. It needs noise in the ranking: below tau_r = 1e-3 it is no longer the law of the rollout.

    with exact():
        learner, schedule, log = train(model, reward_fn, conds, settings)
"""
import contextlib
import copy
import functools
import math
from unittest import mock

import torch

import cogrpo
from cogrpo import (categorical_kl, cond_uncond, constrain, guided_logits, logits_of, observe,
                    schedule_likelihood, surrogate)

original_update = cogrpo.update


def exact_log_prob(logits, step):
    """Log-probability of all that a step decided at each masked position, else 0: [B, L].

    The threshold is the lowest confidence that was kept. Given it, positions are independent:
    kept, at the threshold   p(candidate) * density of its confidence there
    kept, above it           p(candidate) * P(confidence > threshold)
    still masked             sum over tokens v of p(v) * P(confidence of v < threshold)
    Gumbel: P(confidence < threshold) = exp(-rate), rate = exp((log p - threshold) / tau_r).
    """
    _, tau_s, tau_r, _ = constrain(step.action).unbind(1)
    tau_r = tau_r.clamp(min=1e-3)[:, None, None]  # without noise there is no density
    candidate = step.candidate[:, :, None]                         # [B, L, 1]
    log_p = (logits / tau_s[:, None, None]).log_softmax(2)         # [B, L, V]
    log_p_candidate = log_p.gather(2, candidate)[:, :, 0]          # [B, L]

    kept = step.confidence.masked_fill(~step.filled, math.inf)
    threshold, last = kept.min(1, keepdim=True)                    # [B, 1]
    log_rate = (logits.log_softmax(2) - threshold[:, :, None]) / tau_r  # [B, L, V]
    log_rate = log_rate.clamp(-60, 60)                             # so that exp stays finite
    below = (log_p - log_rate.exp()).logsumexp(2)                  # over candidates: [B, L]
    log_rate = log_rate.gather(2, candidate)[:, :, 0]              # [B, L]
    above = (-(-log_rate.exp()).expm1()).log()                     # log(1 - exp(-rate))
    at = log_rate - log_rate.exp()         # log density, less the constant -log tau_r
    kept = above.scatter(1, last, at.gather(1, last))              # `last` is at the threshold

    factor = torch.where(step.filled, log_p_candidate + kept, below)
    all_kept = (step.filled == step.masked).all(1, keepdim=True)   # then there is no threshold
    return torch.where(all_kept, log_p_candidate, factor) * step.masked


def observed_log_prob(schedule, l_c, step):
    """log p_phi(a_t | x_t, c) as a function of theta, which moves the observation: [B]."""
    frozen = copy.deepcopy(schedule).requires_grad_(False)  # phi does not learn from this
    p_phi, _ = frozen(observe(l_c, step.masked), step.t, step.T)
    return schedule_likelihood(p_phi, step)


def model_loss(schedule, model, reference, step, cond, advantage, s):
    """`cogrpo.model_loss`, with a ratio for each masked position and one for the action."""
    L = model.seq_len
    l_c, l_u = cond_uncond(model, step.canvas, cond)
    w = constrain(step.action)[:, 3]
    log_theta = exact_log_prob(guided_logits(l_c, l_u, w), step)  # [B, L]
    log_phi = observed_log_prob(schedule, l_c, step)              # [B]
    log_p = torch.cat([log_theta, log_phi[:, None]], 1)           # [B, L + 1]
    if step.old_log_theta is None:
        step.old_log_theta = log_p.detach()
    gain = surrogate(log_p, step.old_log_theta, advantage[:, None], s.clip)
    with torch.no_grad():
        reference_l_c = logits_of(reference, step.canvas, cond)
    kl = categorical_kl(l_c, reference_l_c) * step.masked
    return (s.beta * kl.sum() - gain.sum()) / L, kl.detach().sum() / L


def update(model, schedule, reference, optimizer, rollouts, s, which="joint"):
    """`cogrpo.update` with the exact likelihood."""
    loss = functools.partial(model_loss, schedule)
    with mock.patch.object(cogrpo, "model_loss", loss):
        return original_update(model, schedule, reference, optimizer, rollouts, s, which)


@contextlib.contextmanager
def exact():
    """Within it, `train` and `iterate` use the exact likelihood."""
    with mock.patch.object(cogrpo, "update", update):
        yield
