"""Co-GRPO: a masked diffusion model and its inference schedule, optimised together by GRPO. One file, top to bottom.

A masked diffusion model (MDM) is trained in a single step (fill in the masked tokens) but used in T steps: start from
[MASK] everywhere, and at every step guess all masked tokens, keep the most confident, mask the rest again. How many to
keep, how hot to draw, how much noise, how much guidance: a schedule made by hand decides. Co-GRPO (arXiv 2512.22288)
calls the T-step loop a Markov decision process and trains what acts in it, the model AND the schedule, on the reward
of the finished sample:

    state       V^(t)   the canvas (and the condition c)                         -> rollout
    action      A, V'   the schedule's parameters A = (r, tau_s, tau_r, w),
                        drawn from p_phi(A | V^(t), c), then the filled tokens,
                        drawn from p_theta(V' | A; V^(t), c)                     -> Schedule, MDM, guided_logits
    reward      R       on the last canvas only; G samples of one condition
                        form a group; advantage = (R - mean) / std of its group  -> group_advantage
    update              PPO's clipped surrogate and a KL leash for either
                        factor, every step re-scored alone                       -> downsample, log_prob, update

What is ours and not the paper's is marked (ours). l_c and l_u are the logits under the condition and under the null
condition; guidance goes from one beyond the other.
Left out: the paper's text-to-image backbone and reward models (bring yours: see `train`), any value function,
gradients through the generation, and which tokens were KEPT as part of the likelihood: the paper's approximation,
`--likelihood fill`. The likelihood that has it is `--likelihood exact` (ours).

    python cogrpo.py                  the whole pipeline on MNIST: pretrain, measure, Co-GRPO, measure, draw
    python cogrpo.py --quick          the same, small: a smoke test
    python cogrpo.py --load out/cogrpo.pt --steps 8       measure and draw a result at another T, in out/T8
    python cogrpo.py --ablate         is together better than either half? every arm on five worlds, with intervals
    python cogrpo.py --bench          what Co-GRPO costs on top of the model's own passes, and its memory
    torchrun --nproc_per_node=2 cogrpo.py                 the groups of every rollout split over two processes

Read down to `train`: there the method ends; what follows is the toy world's command line, benchmark and ablation.

As a library: `pretrain`, `train`, `sample`. A model is an nn.Module with `model(tokens int64 [B, L], cond int64 [B]) ->
logits [B, L, V]` (V tokens, never [MASK]) and the attributes seq_len, mask_id, null_cond (None: no guidance); a reward
is anything with `reward_fn(tokens [B, L], cond [B]) -> float [B]`.
"""
import argparse
import copy
import csv
import hashlib
import inspect
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


def setting(default, comment, low=None, high=None, choices=None):
    return field(default=default, metadata={"help": comment, "low": low, "high": high, "choices": choices})


def check_settings(settings):
    """ValueError, naming the flag, where a field of a settings dataclass is outside its limits."""
    for f in fields(settings):
        value, low, high, choices = getattr(settings, f.name), *map(f.metadata.get, ("low", "high", "choices"))
        if choices and value not in choices:
            raise ValueError(f"{flag(f.name)} {value}: must be one of {', '.join(choices)}")
        if None not in (low, value) and not (low <= value < math.inf and value <= (high or value)):  # NaN fails too
            raise ValueError(f"{flag(f.name)} {value}: must be at least {low}" + (f", at most {high}" if high else ""))


def flag(name):
    return "--" + name.replace("_", "-")


@dataclass
class Settings:
    """Co-GRPO's settings; each is a flag of the command line too."""
    update: str = setting("joint", "what learns: both at once, in turns (the paper), or one alone",
                          choices=("joint", "alternate", "model", "schedule"))
    likelihood: str = setting("fill", "the model's: of the filled tokens (the paper), or of all it decided (ours)",
                              choices=("fill", "exact"))
    steps: int = setting(4, "T, decoding steps of a sample", low=1)
    iters: int = setting(80, "iterations: one rollout and its update each", low=0)
    groups: int = setting(10, "groups in a rollout; a group shares its condition", low=1)
    group_size: int = setting(12, "G, samples in a group", low=2)
    epochs: int = setting(1, "updates on each rollout", low=1)
    lr: float = setting(1e-3, "peak learning rate of the model (theta), falling to 0", low=0)
    schedule_lr: float = setting(5e-3, "peak learning rate of the schedule (phi), falling to 0", low=0)
    warmup: int = setting(1, "iterations in which the learning rates rise to their peaks", low=1)
    clip: float = setting(0.2, "PPO: no credit for moving a ratio out of [1 - clip, 1 + clip]", low=0)
    kl_model: float = setting(0.4, "weight of KL(model || pretrained), on the conditional logits", low=0)
    kl_schedule: float = setting(0.1, "weight of KL(schedule || hand-made)", low=0)
    bonus: float = setting(0.0, "weight of an advantage for differing from one's group (ours)", low=0)
    grad_norm: float = setting(1.0, "each factor's gradient is clipped to this norm", low=0)
    keep: float = setting(0.5, "learn from this share of a group: its lowest and highest advantages",
                          low=1e-6, high=1)
    micro_batch: int = setting(0, "samples in memory at a time; the gradient is the same (0: the whole rollout)", low=0)
    spread: float = setting(0.3, "standard deviation of the schedule's exploration", low=1e-6)
    rl_seed: int = setting(None, "seed of Co-GRPO alone (default: --seed)", low=0, high=2 ** 32 - 1)

    __post_init__ = check_settings


# --------------------------------------------------------------------------- the masked diffusion model, pretrained

class Block(nn.Module):
    """Pre-norm transformer block, attention over all positions: x float [B, L, D] -> [B, L, D]. Starts as the identity
    but for a bias, which halves the pretraining that a given loss takes."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        for last in (self.proj, self.mlp[2]):
            nn.init.zeros_(last.weight)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class MDM(nn.Module):
    """A small masked diffusion model: tokens int64 [B, L], cond int64 [B] -> logits float [B, L, V].

    Tokens are 0..V-1, [MASK] is V; conditions are 0..C-1, the null condition of guidance is C.
    """

    def __init__(self, seq_len, vocab_size, num_conds, dim=96, depth=3, heads=4):
        super().__init__()
        self.seq_len, self.vocab_size, self.mask_id, self.null_cond = seq_len, vocab_size, vocab_size, num_conds
        self.token, self.cond = nn.Embedding(vocab_size + 1, dim), nn.Embedding(num_conds + 1, dim)
        self.position = nn.Parameter(0.02 * torch.randn(seq_len, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab_size)
        for embedding in (self.token, self.cond):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens, cond):
        bf16 = tokens.is_cuda and torch.cuda.is_bf16_supported()  # autocast leaves float64 as it is
        with torch.autocast("cuda", torch.bfloat16) if bf16 else nullcontext():
            x = self.token(tokens) + self.cond(cond)[:, None] + self.position
            return self.head(self.norm(self.blocks(x)))


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pretrain(model, tokens, cond, steps=600, batch=128, lr=3e-3, drop=0.1):
    """Single-step masked prediction (BERT, MaskGIT): hide a share cos(pi U / 2) of the tokens, U uniform, guess them.

    tokens int64 [N, L], cond int64 [N], both on the model's device. A share `drop` of the conditions becomes the null
    condition, so that guidance has its l_u. Trains `model` in place; returns the mean loss of the last 100 steps.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01, fused=tokens.is_cuda)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, cycle_momentum=False)
    losses = []
    bar = tqdm(range(steps), "pretraining", unit="step", mininterval=0.5)
    for step in bar:
        rows = torch.randint(len(tokens), (batch,), device=tokens.device)
        target, c = tokens[rows], cond[rows]
        if model.null_cond is not None:
            c = torch.where(torch.rand(batch, device=c.device) < drop, model.null_cond, c)
        ratio = torch.cos(torch.rand(batch, 1, device=c.device) * math.pi / 2)
        rank = torch.rand(target.shape, device=c.device).argsort(1).argsort(1)  # so the count is exact
        masked = rank < (ratio * model.seq_len).ceil()
        logits = at_least_float32(model(torch.where(masked, model.mask_id, target), c))
        loss = F.cross_entropy(logits.transpose(1, 2), torch.where(masked, target, -100))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        losses.append(loss.detach())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return float(torch.stack(losses[-100:]).mean())


# ------------------------------------------------------------------------------------------ the schedule, p_phi

NAMES = ("r", "tau_s", "tau_r", "w")  # re-mask ratio, sampling temperature, re-mask temperature, guidance scale


def hand_made(u):
    """The schedule that people use: (r, tau_s, tau_r, w) at u = (t + 1) / T, as MaskGIT-style samplers have it."""
    return math.cos(math.pi * u / 2), 1.0, 4.5 * (1 - u), 1.0


def unconstrain(r, tau_s, tau_r, w):
    """Pre-images under `constrain`, with floors, since sigmoid and softplus never reach 0."""
    r = min(max(r, 1e-3), 1 - 1e-3)
    return [math.log(r / (1 - r))] + [math.log(math.expm1(max(x, low)))
                                      for x, low in ((tau_s, 1e-3), (tau_r, 0.05), (w, 1e-3))]


def constrain(action):
    """float [..., 4] unconstrained -> (r, tau_s, tau_r, w): sigmoid for r, softplus for the rest (AdaNAT)."""
    return torch.cat([action[..., :1].sigmoid(), F.softplus(action[..., 1:])], -1)


def canvas_statistics(log_p, masked):
    """What the schedule sees of a canvas and its condition: float [B, 5], each of order one. (ours)

    The masked share, then mean and spread over the masked positions of the confidence (largest probability) and of
    the entropy / log V of softmax(l_c), log_p [B, L, V]. Any MDM of any length and vocabulary has these.
    """
    confidence = log_p.amax(2).exp()
    entropy = -(log_p.exp() * log_p).sum(2) / math.log(log_p.shape[2])
    count = masked.sum(1).clamp(min=1)
    columns = [masked.to(log_p.dtype).mean(1)]
    for x in (confidence, entropy):
        mean = (x * masked).sum(1) / count
        variance = ((x - mean[:, None]).square() * masked).sum(1) / count
        columns += [mean, (variance + 1e-6).sqrt()]
    return torch.stack(columns, 1)


class Schedule(nn.Module):
    """p_phi(A | V^(t), c): a Gaussian of fixed spread around hand-made functions plus a learned residual.

    The last layer starts at zero, so a new Schedule IS the hand-made one. It takes u = (t + 1) / T, no table over t:
    trained at one T, it runs at any. blind: it sees nothing but u (for the ablation).
    """

    def __init__(self, spread=0.3, hidden=32, hand_made=hand_made, blind=False):
        super().__init__()
        self.spread, self.hand_made, self.blind = spread, hand_made, blind
        self.residual = nn.Sequential(nn.Linear(6, hidden), nn.SiLU(), nn.Linear(hidden, 4))
        nn.init.zeros_(self.residual[2].weight)
        nn.init.zeros_(self.residual[2].bias)

    def prior(self, u, like):
        """The hand-made pre-images at u: [4], in the dtype and on the device of `like`."""
        return torch.stack([like.new_full((), x) for x in unconstrain(*self.hand_made(u))])  # made there, not copied

    def forward(self, statistics, u):
        """statistics float [B, 5], u float -> the mean of the unconstrained action, [B, 4]."""
        x = torch.cat([statistics * (not self.blind), torch.full_like(statistics[:, :1], u)], 1)
        return self.prior(u, x) + self.residual(x)

    def log_prob(self, mean, action, acts):
        """log N(action | mean, spread) [B], over the parameters that act on something (acts bool [B, 4])."""
        log_p = -0.5 * ((action - mean) / self.spread).square() - math.log(self.spread * math.sqrt(2 * math.pi))
        return (log_p * acts).sum(1)

    def kl(self, mean, u, acts):
        """KL(p_phi || hand-made) [B]: of two Gaussians of one spread, half the squared distance in spreads."""
        return (0.5 * ((mean - self.prior(u, mean)) / self.spread).square() * acts).sum(1)


# --------------------------------------------------------------------------------------------------- the rollout

@dataclass
class Step:
    """One step of a rollout of B samples: all that re-scoring needs, and no graph."""
    u: float                # (t + 1) / T
    canvas: torch.Tensor    # V^(t) int64 [B, L]
    masked: torch.Tensor    # where it is [MASK], bool [B, L]
    share: int              # so many neighbours have one canvas and one condition
    acts: torch.Tensor      # which of the four parameters act on something here, bool [B, 4]
    mean: torch.Tensor      # the schedule's mean, unconstrained, [B, 4]
    action: torch.Tensor    # A, unconstrained, [B, 4]
    candidate: torch.Tensor  # a token drawn for every position, int64 [B, L]
    filled: torch.Tensor    # where the candidate was kept, bool [B, L]
    last: torch.Tensor      # the position that was kept last, int64 [B, 1]
    threshold: torch.Tensor  # its score, the lowest of those kept, [B, 1]
    old_model: torch.Tensor = None     # log-probs at the time of the rollout: [B, K], see `log_prob`
    old_schedule: torch.Tensor = None  # [B]

    def take(self, rows, share=1):
        """The same step of some of the samples: rows int64 [n]."""
        return Step(**{name: x[rows] if torch.is_tensor(x) else x for name, x in vars(self).items()} | {"share": share})


def join(steps):
    """One step of several lots of samples -> the same step of all of them."""
    return Step(**{name: torch.cat([getattr(step, name) for step in steps]) if torch.is_tensor(x) else x
                   for name, x in vars(steps[0]).items()})


def branches(model, tokens, cond, share=1):
    """l_c and l_u, each [B, L, V], from one pass of 2B rows; l_u is None for a model without guidance (B rows).

    share: that many neighbours have one canvas and one condition, so one of them is computed for all.
    """
    tokens, cond = tokens[::share], cond[::share]
    if model.null_cond is None:
        return at_least_float32(model(tokens, cond)).repeat_interleave(share, 0), None
    both = model(torch.cat([tokens, tokens]), torch.cat([cond, torch.full_like(cond, model.null_cond)]))
    return at_least_float32(both).repeat_interleave(share, 0).chunk(2)


def guided_logits(l_c, l_u, w):
    """Classifier-free guidance: l_c + w (l_c - l_u); w [B, 1, 1]."""
    return l_c if l_u is None else l_c + w * (l_c - l_u)


def draw(logits):
    """A token for every position from softmax(logits [B, L, V]): int64 [B, L].

    By the cumulative distribution: one random number a position, where the usual Gumbel noise takes V.
    """
    cdf = logits.softmax(2).cumsum(2)
    u = cdf[:, :, -1:] * torch.rand_like(cdf[:, :, :1])
    return torch.searchsorted(cdf, u, right=True).clamp(max=logits.shape[2] - 1)[:, :, 0]


def gumbel_like(x):
    return -torch.empty_like(x).exponential_().log()


@torch.no_grad()
def rollout(model, schedule, cond, steps, tokens=None, explore=True, likelihood="fill", share=1):
    """Fill canvases in T steps. cond int64 [B]; returns (tokens int64 [B, L], the T `Step`s).

    tokens: canvases to start from, int64 [B, L] with mask_id where to fill (default: everywhere). explore: draw the
    schedule's parameters; else take their mean, and keep no log-probs. share: that many neighbours start alike (groups
    do, without a prompt), so their first step needs one model pass. ValueError for a T outside 1..L.
    """
    if not 1 <= steps <= model.seq_len:
        raise ValueError(f"--steps {steps}: T must be in 1..{model.seq_len}, the number of tokens")
    canvas = torch.full((len(cond), model.seq_len), model.mask_id, device=cond.device) if tokens is None else tokens
    at_start = (canvas == model.mask_id).sum(1)
    trajectory = []
    for t in range(steps):
        u, final = (t + 1) / steps, t == steps - 1
        masked = canvas == model.mask_id
        count = masked.sum(1)
        l_c, l_u = branches(model, canvas, cond, share)

        mean = schedule(canvas_statistics(l_c.log_softmax(2), masked), u)
        action = mean + schedule.spread * torch.randn_like(mean) if explore else mean
        r, tau_s, tau_r, w = constrain(action)[:, :, None, None].unbind(1)

        logits = guided_logits(l_c, l_u, w)
        candidate = draw(logits / tau_s)

        # Keep the most confident, by log-confidence (guided, un-tempered) + tau_r * Gumbel noise; mask the rest again,
        # but fill one at least. (Where nothing is masked that one is a given token: hence `& masked`.)
        confidence = logits.log_softmax(2).gather(2, candidate[:, :, None])[:, :, 0]
        score = (confidence + tau_r[:, 0] * gumbel_like(confidence)).masked_fill(~masked, -math.inf)
        left = torch.zeros_like(count) if final else (r[:, 0, 0] * at_start).floor().long()
        ranked, order = score.sort(1, descending=True)
        final_rank = (count - left - 1).clamp(min=0)[:, None]  # of the last to be kept: one at least
        threshold, last = ranked.gather(1, final_rank), order.gather(1, final_rank)
        filled = (order.argsort(1) <= final_rank) & masked

        ranks, some = (count > 1) & (not final), count > 0  # r and tau_r need a choice to act on, w needs guidance
        acts = torch.stack([ranks, some, ranks, some & (l_u is not None)], 1)
        step = Step(u, canvas, masked, share, acts, mean, action, candidate, filled, last, threshold)
        if explore:
            step.old_model, _, step.old_schedule = log_prob(schedule, mean, logits, step, likelihood)
        trajectory.append(step)
        canvas, share = torch.where(filled, candidate, canvas), 1
    return canvas, trajectory


def sample(model, schedule, cond, steps, tokens=None):
    """Samples int64 [B, L] for cond int64 [B], in T steps with the schedule's mean: no exploration at inference.

    tokens: canvases with some positions given, int64 [B, L], mask_id elsewhere.
    """
    return rollout(model, schedule, cond, steps, tokens, explore=False)[0]


# ------------------------------------------------------------------------- advantages, likelihoods and the update

def group_advantage(reward, group_size):
    """(R - mean) / (std + 1e-4) within each group of G neighbours: reward [B] -> [B]. All equal: exactly 0."""
    r = reward.view(-1, group_size)
    advantage = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
    return torch.where(r.amax(1, keepdim=True) == r.amin(1, keepdim=True), 0, advantage).flatten()


def group_difference(tokens, group_size):
    """How much a sample differs from the others of its group: mean share of differing tokens, [B, L] -> [B]. (ours)"""
    groups = tokens.view(-1, group_size, tokens.shape[1])
    return (groups[:, :, None] != groups[:, None]).float().mean(3).sum(2).flatten() / (group_size - 1)


def log_prob(schedule, mean, logits, step, likelihood):
    """Log-probability of what a step did, under a given mean of the schedule and guided logits [B, L, V]: (model
    [B, K], exists bool [B, K], schedule [B]).

    The model's comes in K factors, each with a ratio and a clip of its own, zero where it does not exist:
    fill   K = L: the filled tokens under the guided, tempered distribution that they were drawn from (the paper's)
    exact  K = L + 1 (ours): all that the step did at each masked position, and p_phi, whose statistics are functions of
           theta. Given the threshold c that the ranking came to, positions are independent: one is kept where its
           score exceeds c, sets c where it was the last, and is thrown away where it stays below, whatever its
           candidate was, so that one is summed over. A score is Gumbel: P(it stays below c) = exp(-rate) with
           rate = exp((log-confidence - c) / tau_r).
    """
    log_phi = schedule.log_prob(mean, step.action, step.acts)
    _, tau_s, tau_r, _ = constrain(step.action)[:, :, None, None].unbind(1)
    log_p = F.log_softmax(logits / tau_s, 2)
    chosen = step.candidate[:, :, None]
    token = log_p.gather(2, chosen)[:, :, 0]
    if likelihood == "fill":
        return token * step.filled, step.filled, log_phi

    log_rate = ((logits.log_softmax(2) - step.threshold[:, :, None]) / tau_r).clamp(-60, 60)  # exp stays finite
    below = (log_p - log_rate.exp()).logsumexp(2)
    log_rate = log_rate.gather(2, chosen)[:, :, 0]
    above, at = (-(-log_rate.exp()).expm1()).log(), log_rate - log_rate.exp()
    kept = token + above.scatter(1, step.last, at.gather(1, step.last))
    choice = (step.filled != step.masked).any(1, keepdim=True)  # a step that keeps all has no threshold
    factor = torch.where(choice, torch.where(step.filled, kept, below), token)
    exists = torch.cat([step.masked, torch.ones_like(choice)], 1)
    return torch.cat([factor, log_phi[:, None]], 1) * exists, exists, log_phi


def downsample(trajectory, cond, advantage, s):
    """A rollout's samples that say most: of every group the lowest and the highest advantages, as many of either, a
    share s.keep in all (of an odd number one more of the highest). (ours; the idea of PODS, arXiv 2504.13818, which
    seeks the split of largest variance)

    What they weigh together stays what it was among all: their advantages are scaled by the share.
    """
    count = max(1, round(s.keep * s.group_size))
    ranked = advantage.view(-1, s.group_size).argsort(1)
    most = torch.cat([ranked[:, :count // 2], ranked[:, count // 2 - count:]], 1)
    most = (most + s.group_size * torch.arange(len(most), device=most.device)[:, None]).flatten()
    kept = [step.take(most, count if step is trajectory[0] else 1) for step in trajectory]  # a group starts alike
    return kept, cond[most], advantage[most] * (count / s.group_size)


def surrogate(log_p, old, advantage, clip):
    """PPO's clipped surrogate: min(ratio A, clip(ratio) A)."""
    ratio = (log_p - old).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def learning(model):
    """The parameters that are not frozen."""
    return [p for p in model.parameters() if p.requires_grad]


def update(model, schedule, reference, optimizers, trajectory, cond, advantage, s, which="joint"):
    """Re-score a rollout step by step and take one step of theta and phi per epoch (or of one of them: `which`).

        loss_theta = mean over samples of sum_t [ -surrogate_theta,t / L + kl_model KL_model,t / L ]
        loss_phi   = mean over samples of (1/T) sum_t [ -surrogate_phi,t + kl_schedule KL_schedule,t ]

    theta has a ratio for each token, phi one for each step: a product over a step's tokens leaves [1 - clip, 1 + clip]
    for most samples after a single update (ours). Returns a dict of diagnostics, of the last epoch.
    """
    B, L, T = len(cond), model.seq_len, len(trajectory)
    chunks = torch.arange(B, device=cond.device).split(s.micro_batch or B)
    theta, phi = learning(model), list(schedule.parameters())
    with_theta, with_phi = which != "schedule", which != "model"
    for _ in range(s.epochs):
        sums = dict.fromkeys(("kl_model", "approx_kl_model", "clip_model", "kl_schedule", "approx_kl_schedule",
                              "clip_schedule"), 0.0)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for whole, rows in itertools.product(trajectory, chunks):
            share = math.gcd(whole.share, len(chunks[0]))  # a chunk may cut through a group
            step, c, A = whole.take(rows, share), cond[rows], advantage[rows]
            with torch.set_grad_enabled(with_theta):
                l_c, l_u = branches(model, step.canvas, c, step.share)
            with torch.no_grad():  # KL on l_c alone, un-tempered: B rows instead of 2B (ours)
                log_q = at_least_float32(reference(step.canvas[::step.share], c[::step.share])).log_softmax(2)
                log_q = log_q.repeat_interleave(step.share, 0)
            log_p = l_c.log_softmax(2)
            kl_model = ((log_p.exp() * (log_p - log_q)).sum(2) * step.masked).sum() / (B * L)

            mean = schedule(canvas_statistics(log_p, step.masked), step.u)
            logits = guided_logits(l_c, l_u, constrain(step.action)[:, 3, None, None])
            log_theta, exists, log_phi = log_prob(schedule, mean, logits, step, s.likelihood)
            gain = surrogate(log_theta, step.old_model, A[:, None], s.clip)
            loss_theta = -(gain * exists).sum() / (B * L) + s.kl_model * kl_model

            kl_schedule = schedule.kl(mean, step.u, step.acts).sum() / (B * T)
            gain = surrogate(log_phi, step.old_schedule, A, s.clip)
            loss_phi = -gain.sum() / (B * T) + s.kl_schedule * kl_schedule

            # Each loss reaches its own factor only; what the step's graph held is free again afterwards.
            if with_phi:
                loss_phi.backward(inputs=phi, retain_graph=with_theta)
            if with_theta:
                loss_theta.backward(inputs=theta)

            with torch.no_grad():
                per_factor = exists / exists.sum().clamp(min=1) * len(c) / (B * T)
                for name, new, old, weight in (("model", log_theta, step.old_model, per_factor),
                                               ("schedule", log_phi, step.old_schedule, 1 / (B * T))):
                    log_ratio = new - old  # ratio - 1 - log ratio estimates KL(old || new)
                    sums["approx_kl_" + name] += ((log_ratio.expm1() - log_ratio) * weight).sum()
                    sums["clip_" + name] += ((log_ratio.expm1().abs() > s.clip) * weight).sum()
                sums["kl_model"] += kl_model
                sums["kl_schedule"] += kl_schedule
        for learns, name, parameters, optimizer in ((with_theta, "grad_model", theta, optimizers[0]),
                                                    (with_phi, "grad_schedule", phi, optimizers[1])):
            if learns:
                average(p.grad for p in parameters if p.grad is not None)
                sums[name] = nn.utils.clip_grad_norm_(parameters, s.grad_norm)
                optimizer.step()
    return {name: float(value) for name, value in sums.items()}


# ------------------------------------------------------------------------- training, on one process or on several

def processes(groups):
    """(this process's rank, how many there are): (0, 1) where torchrun did not start it. ValueError where that many
    processes cannot share the groups."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if groups % ranks:
        raise ValueError(f"--groups {groups}: must be a multiple of the number of processes, {ranks}")
    return rank, ranks


def average(tensors):
    """Each becomes its mean over the processes, in place."""
    for x in tensors if dist.is_initialized() else ():
        dist.all_reduce(x)
        x /= dist.get_world_size()


def train(model, reward_fn, conds, settings=Settings(), on_iteration=None, schedule=None):
    """Co-GRPO: rollout, advantage, update, `settings.iters` times. Returns (model, schedule, log).

    model: pretrained; it is put in eval mode and else left as it is, serves as the KL's reference; a trained copy is
    returned, where what was frozen (requires_grad=False) is as before. schedule: a Schedule to start from, say one
    around other hand-made functions; its spread counts, not the settings' (default: a new one).
    reward_fn(tokens int64 [B, L], cond int64 [B]) -> float [B]. conds int64 [C]: the groups' conditions, taken in turn.
    on_iteration(row, model, schedule, tokens, cond) sees every iteration and may add to its row of the log.
    log: one dict of floats an iteration, `rows` among them: the rows that went through the model so far, a backward
    pass counted as two. ValueError where the reward has the wrong shape or is not finite. In a process group every
    process calls it and takes its share of the groups; gradients and log are averaged, the result is the same on all.
    """
    s, (rank, ranks) = settings, processes(settings.groups)
    if s.rl_seed is not None:
        torch.manual_seed(s.rl_seed)
    reference, model = model.eval(), copy.deepcopy(model).eval()
    weights = next(model.parameters())
    schedule = copy.deepcopy(schedule) if schedule else Schedule(s.spread)
    schedule.to(weights.device, torch.promote_types(weights.dtype, torch.float32))
    optimizers = (torch.optim.AdamW(learning(model), s.lr, weight_decay=0, fused=weights.is_cuda),
                  torch.optim.Adam(schedule.parameters(), s.schedule_lr, fused=weights.is_cuda))
    if ranks > 1:  # one start for all, then each its own rollouts
        for p in (*model.parameters(), *schedule.parameters()):
            dist.broadcast(p.data, 0)
        reference = copy.deepcopy(model).requires_grad_(False)
        torch.manual_seed(torch.initial_seed() + rank)
    log, rows = [], 0
    turns = ("model", "schedule") if s.update == "alternate" else (s.update,)
    micro_batch = s.micro_batch or s.groups * s.group_size
    share = math.gcd(s.group_size, micro_batch)  # of a group's samples that start together, in one row
    bar = tqdm(range(s.iters), "Co-GRPO", unit="iter", disable=rank > 0)
    for i in bar:
        rate = min(1, (i + 1) / s.warmup) * (1 - i / s.iters)  # down to zero: the result keeps no step's noise
        for optimizer, lr in zip(optimizers, (s.lr, s.schedule_lr)):
            optimizer.param_groups[0]["lr"] = lr * rate
        first = i // len(turns) * s.groups  # theta and phi take their turns on the same conditions
        of_groups = conds[torch.arange(first, first + s.groups, device=conds.device) % len(conds)]
        cond = of_groups.chunk(ranks)[rank].repeat_interleave(s.group_size)
        tokens, parts = zip(*[rollout(model, schedule, c, s.steps, likelihood=s.likelihood, share=share)
                              for c in cond.split(micro_batch)])
        tokens, trajectory = torch.cat(tokens), [join(steps) for steps in zip(*parts)]
        reward = check_reward(reward_fn(tokens, cond), len(cond))
        advantage = group_advantage(reward, s.group_size)
        difference = group_difference(tokens, s.group_size).to(reward)
        advantage += s.bonus * group_advantage(difference, s.group_size)
        which = turns[i % len(turns)]
        kept = downsample(trajectory, cond, advantage, s)
        row = describe(trajectory, reward, difference, s.group_size, schedule.spread) | update(
            model, schedule, reference, optimizers, *kept, s, which)

        drawn, scored = (sum(len(step.canvas) // step.share for step in steps) for steps in (trajectory, kept[0]))
        halves, backward = 1 if model.null_cond is None else 2, 0 if which == "schedule" else 2
        rows += ranks * (halves * drawn + s.epochs * (halves * (1 + backward) + 1) * scored)  # + 1: the reference
        values = reward.new_tensor(list(row.values()))
        average([values])
        row = dict(zip(row, values.tolist()))
        row = {"iter": i, "rows": rows} | row
        if not all(map(math.isfinite, row.values())):
            raise ValueError(f"--lr {s.lr}, --schedule-lr {s.schedule_lr}: the update left the finite numbers in "
                             f"iteration {i}; lower them (or the model's logits hold infinities: it must not)")
        log.append(row)
        if on_iteration:
            on_iteration(row, model, schedule, tokens, cond)
        bar.set_postfix({"R": f"{row['reward']:.2f}", "KL model": f"{row['kl_model']:.3f}",
                         "KL sched": f"{row['kl_schedule']:.2f}", "std": f"{row['group_std']:.2f}",
                         "equal": f"{row['groups_equal']:.0%}"})
    return model, schedule, log


def describe(trajectory, reward, difference, group_size, spread):
    """Diagnostics of a rollout: its rewards, the diversity within its groups, and the schedule's four parameters,
    averaged over the steps where they act, with how much each mean varies over canvases, in units of the spread."""
    groups = reward.view(-1, group_size)
    equal = (groups.amax(1) == groups.amin(1)).float().mean()
    mean = torch.stack([step.mean for step in trajectory])  # [T, B, 4]
    acting = torch.stack([step.acts.any(0) for step in trajectory]).to(mean)  # [T, 4]
    acting /= acting.sum(0).clamp(min=1)
    value, moves = (constrain(mean).mean(1) * acting).sum(0), (mean.std(1) * acting).sum(0) / spread
    return ({"reward": float(reward.mean()), "group_std": float(groups.std(1).mean()), "groups_equal": float(equal),
             "diversity": float(difference.mean())}
            | dict(zip(NAMES, value.tolist())) | dict(zip([n + "_over_canvases" for n in NAMES], moves.tolist())))


def check_reward(reward, batch):
    """The reward as float [B] without graph; ValueError where it is anything else."""
    if not torch.is_tensor(reward) or reward.shape != (batch,) or not reward.is_floating_point():
        got = f"{reward.dtype} {list(reward.shape)}" if torch.is_tensor(reward) else type(reward).__name__
        raise ValueError(f"reward_fn returned {got}: it must return a float tensor of shape [{batch}], one per sample")
    if not bool(reward.isfinite().all()):
        raise ValueError("reward_fn returned NaN or infinity: every sample needs a finite reward")
    return reward.detach()


# ----------------------------------------------------------------------------- the command line: the toy world's job

@dataclass
class ModelSettings:
    """The MDM of the toy world and its pretraining."""
    dim: int = setting(96, "width of the model, a transformer", low=1)
    depth: int = setting(3, "blocks of the model", low=1)
    heads: int = setting(4, "attention heads of the model", low=1)
    pretrain_steps: int = setting(600, "steps of single-step masked prediction", low=1)
    pretrain_batch: int = setting(128, "digits in a step", low=1)
    pretrain_lr: float = setting(3e-3, "peak learning rate, one cycle", low=0)

    def __post_init__(self):
        check_settings(self)
        if self.dim % self.heads:
            raise ValueError(f"--dim {self.dim}: must be a multiple of --heads {self.heads}")


@dataclass
class JobSettings:
    """What to do, and where."""
    data: str = setting(None, "folder with MNIST (torchvision's layout), or `drawn`: digits that Pillow draws; default: "
                              "./data, else download, else drawn")
    out: str = setting(None, "where results go (out; with --ablate: ablation; with --load: a folder T<steps> beside it)")
    cache: str = setting("cache", "where worlds are kept for next time")
    device: str = setting("auto", "auto: cuda, else mps, else cpu", choices=("auto", "cpu", "cuda", "mps"))
    seed: int = setting(0, "of data split, judges, pretraining, everything", low=0, high=2 ** 32 - 1)
    quick: bool = setting(False, "every stage and file, but small: a smoke test")
    load: str = setting(None, "a cogrpo.pt: measure and draw it, no training")
    bench: bool = setting(False, "time Co-GRPO against the model passes it needs; no data")
    bench_tokens: int = setting(49, "length of --bench's sequences", low=1)
    ablate: bool = setting(False, "every arm on several worlds, with intervals; goes on where it was stopped")
    worlds: int = setting(5, "worlds of --ablate: seeds --seed, --seed + 1, ...", low=1)
    eval_samples: int = setting(1000, "samples that each row is measured on", low=100)

    __post_init__ = check_settings


QUICK = dict(iters=6, group_size=8, dim=64, depth=2, pretrain_steps=250, pretrain_batch=64, codebook_size=64,
             train_images=6000, test_images=2000, judge_epochs=3, eval_samples=200, worlds=1)


def command_line(argv, world_settings):
    """Parse flags into (JobSettings, Settings, ModelSettings, world settings, the flags given as a dict)."""
    parser = argparse.ArgumentParser(
        usage="python cogrpo.py [--flag=value ...]", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=118),
        description="Co-GRPO on toy digits: train a masked diffusion model, optimise it together with its schedule.")
    parser.error = lambda message: stop(f"{message} (--help lists the flags)")
    owners = {"job": JobSettings, "Co-GRPO": Settings, "model and pretraining": ModelSettings,
              "toy world": world_settings}
    for title, owner in owners.items():
        group = parser.add_argument_group(title)
        for f in fields(owner):
            default = "" if f.default is None or f.type is bool else f" ({f.default})"
            metavar = "|".join(f.metadata.get("choices") or [{str: "PATH"}.get(f.type, f.type.__name__.upper())])
            kind = dict(action="store_true") if f.type is bool else dict(type=f.type, metavar=metavar)
            group.add_argument(flag(f.name), help=f.metadata["help"] + default, **kind)
    given = vars(parser.parse_args(argv))
    values = (QUICK if "quick" in given else {}) | given
    values.setdefault("rl_seed", values.get("seed", 0))
    job, s, m, w = (owner(**{f.name: values[f.name] for f in fields(owner) if f.name in values})
                    for owner in owners.values())
    check_settings(w)

    # Who gives a flag that has no effect expects something that will not happen.
    for name, mode in (("worlds", "ablate"), ("bench_tokens", "bench")):
        if name in given and mode not in given:
            raise ValueError(f"{flag(name)} is for --{mode} only: leave it out")
    modes = [name for name in ("load", "ablate", "bench") if name in given]
    if len(modes) > 1:
        raise ValueError(f"--{modes[0]} and --{modes[1]} are two jobs: give one")
    if modes and "RANK" in os.environ:
        raise ValueError(f"--{modes[0]} runs in one process: start it without torchrun")
    idle = {"load": set(given) - {"load", "steps", "out", "device", "seed", "eval_samples"},
            "ablate": {"update", "likelihood", "bonus", "rl_seed"} & set(given)}
    for name in sorted(idle.get(modes[0], ())) if modes else ():
        raise ValueError(f"{flag(name)} has no effect on --{modes[0]}: leave it out")
    if job.ablate and not job.quick and s.iters * s.groups * s.group_size < 3200:  # two of each digit a contender
        raise ValueError(f"--iters {s.iters}: --ablate needs iters * groups * group_size of at least 3200")
    return job, s, m, w, given


def stop(message):
    print(f"cogrpo.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def join_processes(device):
    """Under torchrun: find the others. Rank 0 alone prints and writes; where one dies, torchrun ends the rest."""
    if "RANK" in os.environ:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")


def pick_device(name):
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(n for n in ("cuda", "mps", "cpu") if there[n])
    if not there[name]:
        raise ValueError(f"--device {name}: there is none here; use "
                         f"{' or '.join(n for n in there if there[n])}, or auto")
    return torch.device(name)


def writable_folder(flag, path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot write there ({error.strerror}); name another folder") from None
    return Path(path)


def save_checkpoint(path, **content):
    """Tensors, dicts and numbers only, so that weights_only=True loads it; written whole or not at all."""
    import toy_reward as toy  # here and below, for as a library this file needs neither torchvision nor Pillow
    toy.save_whole(path, lambda part: torch.save(content, part))


def load_checkpoint(path, device="cpu"):
    """A cogrpo.pt -> dict with the models `model` and `base` (pretrained), `schedule`, `settings`, `world` (a state)
    and more. ValueError where the file is something else."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        settings = Settings(**content["settings"])
        parts = {"model": MDM(**content["mdm"]), "base": MDM(**content["mdm"]), "schedule": Schedule(settings.spread)}
        for name, part in parts.items():
            part.to(device).eval().load_state_dict(content[name])
    except FileNotFoundError:
        raise ValueError(f"--load {path}: no such file; a run writes cogrpo.pt into its --out folder") from None
    except Exception as error:  # torch.load's errors are of many kinds and have one cure
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:80]
        raise ValueError(f"--load {path}: not a cogrpo.pt of this program ({reason}); "
                         "give the file that a run wrote into its --out folder") from None
    return content | parts | {"settings": settings}


def get_world(job, model_settings, world_settings, device):
    """The toy world and its pretrained MDM, from the cache or made anew: (World, MDM, its arguments, facts)."""
    import toy_reward as toy
    train_set, test_set, source, data_key = toy.load_digits(job.data, world_settings, job.seed)
    print(source)
    # The code that makes a world counts as a setting: who edits it gets a new one.
    code = "".join(map(inspect.getsource, (
        Block, MDM, pretrain, toy.drawn_digits, toy.patches, toy.fit_codebook, toy.encode, toy.decode, toy.splice,
        toy.Judge, toy.train_judge, toy.World.build)))
    wanted = {"data": data_key, "seed": job.seed} | asdict(model_settings) | asdict(world_settings)
    key = hashlib.sha256(f"{sorted(wanted.items())}{code}".encode()).hexdigest()[:12]
    path = Path(job.cache) / f"world-{key}.pt"
    mdm = dict(seq_len=toy.SEQ_LEN, vocab_size=world_settings.codebook_size, num_conds=toy.CLASSES,
               dim=model_settings.dim, depth=model_settings.depth, heads=model_settings.heads)
    torch.manual_seed(job.seed)
    model = MDM(**mdm).to(device)
    if path.exists():
        try:
            saved = torch.load(path, map_location=device, weights_only=True)
            model.load_state_dict(saved["model"])
            print(f"codebook, judges and pretrained model: from {path} (same settings; delete it to make them anew)")
            return toy.World.from_state(saved["world"], device), model.eval(), mdm, saved["facts"]
        except Exception:  # a damaged cache costs a new world, not the run
            print(f"{path} cannot be read: making it anew")
    world, tokens, labels = toy.World.build(train_set, test_set, world_settings, device)
    loss = pretrain(model, tokens, labels, model_settings.pretrain_steps, model_settings.pretrain_batch,
                    model_settings.pretrain_lr)
    facts = {"pretraining loss (last 100 steps)": loss, "reward of splices": world.measure_splices()}
    save_checkpoint(path, world=world.state(), model=model.state_dict(), facts=facts)
    return world, model.eval(), mdm, facts


def watched(world):
    """An `on_iteration` that adds the held-out judge's view of the rollouts to the log; nothing trains on it."""
    def on_iteration(row, model, schedule, tokens, cond):
        row["held_out"] = float(world.held_out(tokens, cond).mean())
    return on_iteration


def evaluate(world, name, model, schedule, steps, job):
    """One row of the table: `--eval-samples` samples, the same classes and seed for every row."""
    import toy_reward
    device = next(model.parameters()).device
    torch.manual_seed(job.seed)
    cond = torch.arange(job.eval_samples, device=device) % toy_reward.CLASSES
    tokens = torch.cat([sample(model, schedule, c, steps)
                        for c in tqdm(cond.split(250), f"measuring {name}", unit="batch")])
    return {"name": name} | world.measure(tokens, cond) | {"passes": 2 * steps}  # l_c and l_u


def markdown(rows):
    """The table of results, ready to paste; +- is one standard error over samples."""
    lines = ["| | reward | held-out | accuracy | Fréchet | pixel Fréchet | diversity | passes |", "|---" * 8 + "|"]
    for row in rows:
        shares = [f"{row[k]:.3f} ± {row[k + '_se']:.3f}" for k in ("reward", "held_out", "accuracy")]
        lines.append(f"| {row['name']} | {' | '.join(shares)} | {row['frechet']:.1f} | {row['pixel_frechet']:.2f} | "
                     f"{row['diversity']:.3f} | {row['passes']} |")
    return "\n".join(lines)


def read_csv(path):
    return list(csv.DictReader(open(path, newline=""))) if path.exists() else []


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def draw_results(out, world, base, model, schedule, steps, seed, log):
    """samples.png, decoding.gif, schedule.png and, where there is a log, curves.png."""
    import toy_reward as toy
    device = next(model.parameters()).device
    cond = torch.arange(50, device=device) % toy.CLASSES
    runs, captions = [], (f"before: hand-made schedule, T = {steps}", f"after Co-GRPO, T = {steps}")
    for m, p in ((base, Schedule().to(device)), (model, schedule)):
        torch.manual_seed(seed)
        runs.append(rollout(m, p, cond, steps, explore=False))
    blocks = [(title, tokens) for title, (tokens, _) in zip(captions, runs)]
    real = ("real digits, seen through the codebook", world.examples(4))
    toy.draw_samples(out / "samples.png", [blocks, [real]], world.codebook)
    toy.draw_decoding(out / "decoding.gif", [(title, [step.canvas[:30] for step in trajectory] + [tokens[:30]])
                                             for title, (tokens, trajectory) in zip(captions, runs)], world.codebook)

    trajectory, panels = rollout(model, schedule, cond.repeat(6), steps, explore=False)[1], []
    for j, (name, title) in enumerate(zip(NAMES, ("re-mask ratio r", "sampling temperature tau_s",
                                                  "re-mask temperature tau_r", "guidance scale w"))):
        acting = [i for i, step in enumerate(trajectory) if bool(step.acts[:, j].any())]
        x = [i + 1 for i in acting]
        learned = [constrain(trajectory[i].mean)[:, j] for i in acting]
        low, high = ([float(v.quantile(q)) for v in learned] for q in (0.05, 0.95))
        panels.append(dict(title=title, xlabel="step", lines=[
            ("hand-made", x, [hand_made(trajectory[i].u)[j] for i in acting], toy.GREY, True),
            ("learned", x, [float(v.mean()) for v in learned], toy.BLUE, False),
            ("band: 5 to 95% of canvases", [], [], toy.BLUE, False)], bands=[(x, low, high, toy.BLUE)]))
    toy.draw_panels(out / "schedule.png", panels)
    if log:
        x = [row["iter"] for row in log]
        toy.draw_panels(out / "curves.png", [
            dict(title=title, xlabel="iteration", lines=[("", x, [row[key] for row in log], colour, False)])
            for title, key, colour in (
                ("mean reward of the rollouts, log p(c | x)", "reward", toy.BLUE),
                ("held-out p(c | x) of the rollouts, exploring", "held_out", toy.RED),
                ("KL(model || pretrained), on l_c, nats: sum over steps / L", "kl_model", toy.INK),
                ("KL(schedule || hand-made), nats a step", "kl_schedule", toy.INK))])


def bench_world(settings, model_settings, vocab_size, seq_len, device):
    """What `train` takes: a model with random weights, a reward, conditions, settings."""
    torch.manual_seed(0)
    m = model_settings
    model = MDM(seq_len, vocab_size, 10, m.dim, m.depth, m.heads).to(device)
    return model, lambda tokens, cond: torch.rand(len(cond), device=device), torch.arange(10, device=device), settings


def peak_memory(*world):
    """MB that an iteration needs on top of what there was before: on the CUDA device, else in this process (Linux)."""
    def used(name):
        status = open("/proc/self/status") if os.path.exists("/proc/self/status") else ()
        return next((int(line.split()[1]) / 2 ** 10 for line in status if line.startswith(name)), 0.0)

    cuda, arguments = world[-1].type == "cuda", bench_world(*world)
    before = torch.cuda.memory_allocated() / 2 ** 20 if cuda else used("VmRSS:")
    train(*arguments)
    return (torch.cuda.max_memory_allocated() / 2 ** 20 if cuda else used("VmHWM:")) - before


def bench(settings, model_settings, vocab_size, seq_len, device, repeats=8):
    """Print what Co-GRPO costs on top of the model's own passes, and how its memory grows with T."""
    s = replace(settings, iters=repeats)
    model, reward_fn, conds, _ = bench_world(s, model_settings, vocab_size, seq_len, device)
    schedule, share = Schedule(s.spread).to(device), s.group_size
    cond = conds[torch.arange(s.groups, device=device) % 10].repeat_interleave(share)
    _, trajectory = rollout(model, schedule, cond, s.steps, likelihood=s.likelihood, share=share)
    kept = downsample(trajectory, cond, torch.randn(len(cond), device=device), s)
    still = torch.optim.SGD(model.parameters(), 0.0), torch.optim.SGD(schedule.parameters(), 0.0)

    def bare(steps, c, halves, backward=False):
        for step in steps:
            with torch.set_grad_enabled(backward):
                logits = model(torch.cat([step.canvas[::step.share]] * halves), torch.cat([c[::step.share]] * halves))
            if backward:
                logits.sum().backward()

    timed = {"forward": lambda: bare(trajectory, cond, 2), "backward": lambda: bare(*kept[:2], 2, backward=True),
             "reference": lambda: bare(*kept[:2], 1), "update": lambda: update(model, schedule, model, still, *kept, s),
             "rollout": lambda: rollout(model, schedule, cond, s.steps, likelihood=s.likelihood, share=share)}
    times, left = {name: [] for name in ("iteration", *timed)}, []

    def on_iteration(*_):  # after each iteration of the real `train`, its parts and the passes that it needs, in turns
        times["iteration"] += [time.perf_counter() - start for start in left]
        for name, function in timed.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
        left[:] = [time.perf_counter()]

    train(model, reward_fn, conds, s, on_iteration)
    t = {name: 1e3 * statistics.median(values[1:]) for name, values in times.items()}
    print(f"T = {s.steps}, {s.groups} groups of {share}, {seq_len} tokens of {vocab_size}, dim {model_settings.dim}, "
          f"depth {model_settings.depth}, {device}; medians\n\n| | ms | bare passes, ms | ratio |\n|---|---|---|---|")
    rescoring = t["backward"] + t["reference"]
    for name, ours, passes in (("rollout", t["rollout"], t["forward"]),
                               ("re-scoring and its backward", t["update"], rescoring),
                               ("whole iteration", t["iteration"], t["forward"] + rescoring)):
        print(f"| {name} | {ours:.0f} | {passes:.0f} | {ours / passes:.2f} |")
    print(f"\n{1e3 * len(cond) / t['iteration']:.0f} images a second\n\n| T | peak memory, MB | to T = 4 |",
          "|---" * 3 + "|", sep="\n")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # glibc: freed is freed, or fragments would be counted as in use
    peaks = {}
    for T in (T for T in (4, 8, 16, 32) if T <= seq_len):
        world = replace(s, steps=T, iters=2), model_settings, vocab_size, seq_len, device
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a process's peak memory never falls
            peaks[T] = pool.submit(peak_memory, *world).result()
        print(f"| {T} | {peaks[T]:.0f} | {peaks[T] / (peaks[4] or 1):.2f} |")


# ------------------------------------------------------------- the ablation: is together better than either half?

# What each arm changes. All start from one pretrained model a world and call the reward equally often, but that "twice"
# doubles the iterations; "blind" hides the canvas from the schedule; "exact" has more factors, so a heavier leash.
TRAINED = {
    "joint": {}, "joint, bonus": {"bonus": 0.15}, "joint, exact": {"likelihood": "exact", "kl_model": 0.6},
    "joint, no KL": {"kl_model": 0.0, "kl_schedule": 0.0}, "model only": {"update": "model"},
    "schedule only": {"update": "schedule"}, "schedule only, blind": {"update": "schedule"},
    "alternate": {"update": "alternate"}, "alternate, twice the calls": {"update": "alternate"}}
QUICK_ARMS = ("hand-made", "joint", "joint, no KL")
BY_HAND = {"hand-made": (1, 1, 4.5, 1)} | {  # the arguments of `by_hand`
    f"tau_s = {tau_s}": (1, tau_s, 4.5, 1) for tau_s in (1.15, 0.85, 0.7, 0.55, 0.4)}
COLUMNS = {"reward": 3, "held_out": 3, "accuracy": 3, "frechet": 1, "pixel_frechet": 2, "diversity": 3}  # decimals


def by_hand(power, tau_s, tau_r, w):
    """A hand-made Schedule: r = cos(pi u / 2)^power, tau_s, tau_r falling to 0, w; (1, 1, 4.5, 1) is `hand_made`."""
    return Schedule(hand_made=lambda u: (math.cos(math.pi * u / 2) ** power, tau_s, tau_r * (1 - u), w))


def best_by_hand(base, world, s, floor, device, candidates=32):
    """The hand-made schedule of the largest mean reward, by successive halving within the reward calls of one run;
    who falls below the diversity `floor` is out."""
    import toy_reward as toy
    torch.manual_seed(s.rl_seed)
    U = torch.rand(candidates - 1, 4)  # power in 0.5 .. 2, tau_s in 0.5 .. 1.2, tau_r in 0 .. 15, w in 0 .. 3
    U = torch.stack([2 ** (2 * U[:, 0] - 1), 0.5 + 0.7 * U[:, 1], 15 * U[:, 2], 3 * U[:, 3]], 1)
    contenders, rounds = [BY_HAND["hand-made"], *map(tuple, U.tolist())], int(math.log2(candidates))
    while len(contenders) > 1:
        cond = torch.arange(s.iters * s.groups * s.group_size // rounds // len(contenders), device=device) % toy.CLASSES
        results = []
        for contender in contenders:
            tokens = sample(base, by_hand(*contender).to(device), cond, s.steps)
            if toy.diversity(tokens, cond) >= floor:
                results.append((float(world.reward(tokens, cond).mean()), contender))
        contenders = [c for _, c in sorted(results, reverse=True)][:len(contenders) // 2] or contenders[:1]
    print("best by hand: cos^{:.2f}, tau_s {:.2f}, tau_r {:.1f} (1 - u), w {:.2f}".format(*contenders[0]))
    return by_hand(*contenders[0])


def run_arm(arm, world, base, s, floor, device):
    """(model, schedule, log of the training) of one arm; floor: the least diversity of the best by hand."""
    import toy_reward as toy
    if arm == "best by hand":
        return base, best_by_hand(base, world, s, floor, device), []
    if arm not in TRAINED:
        return base, by_hand(*BY_HAND[arm]).to(device), []
    torch.manual_seed(s.rl_seed)
    blind = Schedule(s.spread, blind=True) if "blind" in arm else None
    return train(base, world.reward, torch.arange(toy.CLASSES, device=device), s, watched(world), blind)


def ablate(job, settings, model_settings, world_settings, device, progress):
    """Run the arms that ablation.csv does not have yet, a row for each arm and T; then tables and pictures, from
    that file."""
    import toy_reward as toy
    out, T = writable_folder("--out", job.out or "ablation"), settings.steps
    writable_folder("--cache", job.cache)
    path, samples = out / "ablation.csv", out / "samples.pt"
    progress["saved"] = f"what has ended is in {path}: the same command goes on"
    alike = [replace(settings, rl_seed=0), model_settings, world_settings, job.data, job.quick, job.eval_samples]
    key, first = hashlib.sha256(str(alike).encode()).hexdigest()[:12], job.seed
    for job in (replace(job, seed=seed) for seed in range(first, first + job.worlds)):
        done = read_csv(path)
        if any(row.get("settings") != key for row in done):
            raise ValueError(f"--out {out}: its ablation.csv is of other settings; name another folder")
        here = {row["arm"]: row for row in done if (row["seed"], row["T"]) == (str(job.seed), str(T))}
        arms = QUICK_ARMS if job.quick else (*BY_HAND, "best by hand", *TRAINED)
        missing = [arm for arm in arms if arm not in here]
        if missing:
            world, base, _, _ = get_world(job, model_settings, world_settings, device)
        for arm in missing:
            print(f"seed {job.seed}: {arm}")
            start, iters = time.perf_counter(), settings.iters * (2 if "twice" in arm else 1)
            s = replace(settings, rl_seed=job.seed, iters=iters, **TRAINED.get(arm, {}))
            floor = 0.85 * float(here["hand-made"]["diversity"]) if "hand-made" in here else 0
            model, schedule, log = run_arm(arm, world, base, s, floor, device)
            seconds = round(time.perf_counter() - start)
            at = {"hand-made": (T, 8, 16, 32), "joint": (T, 2, 8, 16)}.get(arm, (T, 32) if arm in BY_HAND else (T,))
            rows = [evaluate(world, arm, model, schedule, steps, job) for steps in dict.fromkeys(at)]
            here[arm], tenth = rows[0], max(1, len(log) // 10)
            course = [[statistics.fmean(row[name] for row in log[i:i + tenth]) for name in ("diversity", "held_out")]
                      for i in range(0, len(log), tenth)]
            calls = 0 if arm in BY_HAND else s.iters * s.groups * s.group_size
            rows = [{"settings": key, "seed": job.seed, "arm": arm, "T": row["passes"] // 2} | row | {
                "reward_calls": calls, "seconds": seconds, "course": json.dumps(course)} for row in rows]
            if job.seed == first and arm in QUICK_ARMS:  # four of each class, for the picture
                torch.manual_seed(job.seed)
                cond = torch.arange(40, device=device) % toy.CLASSES
                blocks = torch.load(samples, "cpu", weights_only=True) if samples.exists() else {}
                blocks |= {arm: sample(model, schedule, cond, T), "real digits": world.examples(4),
                           "codebook": world.codebook}
                toy.save_whole(samples, lambda part: torch.save(blocks, part))
            toy.save_whole(path, lambda part: write_csv(part, read_csv(path) + rows))
    figures = read_ablation(path)
    (out / "ablation.md").write_text("\n".join(lines := tables(figures, T)) + "\n")
    print("\n".join(lines))
    draw_ablation(out, figures, T)
    if samples.exists():
        blocks = torch.load(samples, "cpu", weights_only=True)
        codebook = blocks.pop("codebook")
        blocks = sorted(blocks.items(), key=lambda block: block[0] == "real digits")
        toy.draw_samples(out / "samples.png", [blocks[:2], blocks[2:]], codebook)
    print(f"tables and pictures are in {out}/")


T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 97.5%, for 1, 2, ... 9 and more degrees


def interval(values):
    """(mean, half the width of its 95% interval), by Student's t; the half is nan for a single value."""
    n = len(values)
    half = T95[min(n - 2, 8)] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return statistics.fmean(values), half


def in_words(values, decimals, sign=""):
    mean, half = interval(values)
    return f"{mean:{sign}.{decimals}f}" + (f" ± {half:.{decimals}f}" if len(values) > 1 else "")


def read_ablation(path):
    """(arm, T) -> seed -> the row's numbers and `course`, from ablation.csv."""
    figures = {}
    for row in read_csv(path):
        figures.setdefault((row["arm"], int(row["T"])), {})[row["seed"]] = {"course": json.loads(row["course"])} | {
            name: float(row[name]) for name in (*COLUMNS, "log_reward", "log_held_out")}
    return figures


def swept(figures, steps):
    """The sweep of tau_s by hand at one T, a row for each value."""
    return [row for (arm, at), row in figures.items() if arm in BY_HAND and at == steps]


def tables(figures, T):
    """Lines of markdown: means, paired differences, what a hand reaches at joint's diversity, the interaction."""
    joint, hand, lines = figures["joint", T], figures["hand-made", T], []
    for title, less in ((f"mean and 95% interval over {len(joint)} worlds", 0),
                        (f"difference to joint at T = {T}, paired", 1)):
        lines += [f"| {title} | reward | held-out | accuracy | Fréchet | pixel Fréchet | diversity |",
                  "|---" * 7 + "|"]
        for (arm, steps), row in figures.items():
            cells = [in_words([x[name] - less * joint[seed][name] for seed, x in row.items() if seed in joint],
                              decimals, "+" * less) for name, decimals in COLUMNS.items()]
            if row is not joint or not less:
                lines.append(f"| {arm}, T = {steps} | {' | '.join(cells)} |")
        lines.append("")
    for steps in dict.fromkeys((T, 32)):
        ratios = []
        for seed, row in joint.items():
            points = sorted((hand[seed]["diversity"], hand[seed]["held_out"]) for hand in swept(figures, steps))
            ratios.append(row["held_out"] / np.interp(row["diversity"], *zip(*points), left=math.nan, right=math.nan))
        within = [ratio for ratio in ratios if not math.isnan(ratio)]  # the sweep reaches that diversity
        lines.append(f"held-out, joint at T = {T} over tau_s by hand at T = {steps} of equal diversity (ratio): "
                     + (in_words(within, 2) if within else "-") + f", in {len(within)} of {len(joint)} worlds")
    halves = [figures.get((arm, T), {}) for arm in ("model only", "schedule only")]
    for name in ("reward", "log_reward", "held_out", "log_held_out") if all(halves) else ():
        more = [joint[seed][name] + hand[seed][name] - sum(half[seed][name] for half in halves) for seed in halves[1]]
        lines.append(f"joint's gain less the sum of the halves' gains, {name}: {in_words(more, 3, '+')}")
    if blind := figures.get(("schedule only, blind", T)):
        more = [halves[1][seed]["held_out"] - row["held_out"] for seed, row in blind.items()]
        lines.append(f"schedule only, what seeing the canvas adds, held_out: {in_words(more, 3, '+')}")
    return lines


def draw_ablation(out, figures, T):
    """quality.png and frontier.png."""
    import toy_reward as toy
    panels = []
    for name, title in (("held_out", "held-out p(c | x)"), ("frechet", "Frechet distance")):  # the font has no accents
        panels.append(dict(title=title, xlabel="steps T", lines=[], bands=[]))
        for arm, colour in (("hand-made", toy.GREY), ("joint", toy.BLUE)):
            at = sorted(steps for other, steps in figures if other == arm)
            means = [interval([row[name] for row in figures[arm, steps].values()]) for steps in at]
            panels[-1]["lines"].append((arm, at, [mean for mean, _ in means], colour, False))
            if len(means) > 1 and not math.isnan(means[0][1]):
                panels[-1]["bands"].append((at, *([m + sign * half for m, half in means] for sign in (-1, 1)), colour))
    toy.draw_panels(out / "quality.png", panels)

    def point(row):
        return [statistics.fmean(x[name] for x in row.values()) for name in ("diversity", "held_out")]

    sweeps = {steps: sorted(map(point, swept(figures, steps))) for steps in (T, 32)}
    lines = [(f"tau_s by hand, T = {steps}", *zip(*sweep), toy.GREY, len(sweep) > 1) for steps, sweep in sweeps.items()]
    for arm, colour in (("joint, no KL", toy.RED), ("joint", toy.BLUE)):
        course = np.mean([x["course"] for x in figures[arm, T].values()], 0)
        lines.append((f"{arm}: training, exploring", *course.T.tolist(), colour, True))
    lines += [(arm, *[[x] for x in point(row)], toy.BLUE if arm == "joint" else toy.INK, False)
              for (arm, steps), row in figures.items() if arm not in BY_HAND and steps == T]
    toy.draw_panels(out / "frontier.png", [
        dict(title="held-out p(c | x) against diversity; up and to the right is better", xlabel="diversity",
             lines=lines, beside=True, width=840, height=560)], columns=1)


def run(argv, progress):
    """The main job. `progress["saved"]` says which checkpoint a Ctrl-C leaves."""
    import toy_reward as toy
    job, settings, model_settings, world_settings, given = command_line(argv, toy.WorldSettings)
    seq_len = job.bench_tokens if job.bench else toy.SEQ_LEN
    if settings.steps > seq_len:
        raise ValueError(f"--steps {settings.steps}: T must be in 1..{seq_len}, the number of tokens")
    device, log = pick_device(job.device), []
    torch.set_float32_matmul_precision("high")  # TF32 where the card has it
    if job.bench:
        return bench(settings, model_settings, world_settings.codebook_size, job.bench_tokens, device)
    if job.ablate:
        return ablate(job, settings, model_settings, world_settings, device, progress)
    join_processes(device)
    rank, ranks = processes(settings.groups)
    if job.load:
        saved = load_checkpoint(job.load, device)
        print(f"{job.load}: {saved['iterations']} iterations at T = {saved['settings'].steps}")
        settings = replace(saved["settings"], steps=given.get("steps", saved["settings"].steps))
        out = writable_folder("--out", job.out or Path(job.load).parent / f"T{settings.steps}")
        world, base = toy.World.from_state(saved["world"], device), saved["base"]
    else:
        out = writable_folder("--out", job.out or "out")
        writable_folder("--cache", job.cache)
        if rank > 0:
            dist.barrier()  # rank 0 makes the world, the others find it in the cache
        world, base, mdm, facts = get_world(job, model_settings, world_settings, device)
        if rank > 0:
            return train(base, world.reward, torch.arange(toy.CLASSES, device=device), settings)
        if ranks > 1:
            dist.barrier()
        print(", ".join(f"{name} {value:.3f}" for name, value in facts.items()))

    T = settings.steps
    rows = [evaluate(world, f"base T={steps}", base, Schedule().to(device), steps, job)
            for steps in dict.fromkeys((T, 32))]

    def save(model, schedule):
        write_csv(out / "log.csv", log)
        save_checkpoint(out / "cogrpo.pt", settings=asdict(settings), mdm=mdm, model=model.state_dict(),
                        base=base.state_dict(), schedule=schedule.state_dict(), world=world.state(),
                        iterations=len(log))
        progress["saved"] = f"iteration {len(log)} is saved: python cogrpo.py --load {out / 'cogrpo.pt'}"

    def on_iteration(row, model, schedule, tokens, cond):
        watched(world)(row, model, schedule, tokens, cond)
        log.append(row)
        if len(log) % 10 == 0:
            save(model, schedule)

    if job.load:
        model, schedule = saved["model"], saved["schedule"]
    else:
        model, schedule, _ = train(base, world.reward, torch.arange(toy.CLASSES, device=device), settings, on_iteration)
        save(model, schedule)

    rows.append(evaluate(world, f"Co-GRPO T={T}", model, schedule, T, job))
    rows.append({"name": "real digits"} | world.measure_real() | {"passes": ""})
    write_csv(out / "results.csv", rows)
    draw_results(out, world, base, model, schedule, T, job.seed, log)
    print(f"\n{markdown(rows)}\n\nresults and pictures are in {out}/")


def main(argv=None):
    progress = {}
    try:
        run(argv, progress)
    except ValueError as error:
        if not str(error).startswith(("--", "reward_fn")):
            raise  # no flag is named: a bug, and a bug shows its traceback
        stop(error)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {progress.get('saved', 'no checkpoint was written yet')}", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
