"""Co-GRPO: a masked diffusion model and its inference schedule, optimised together by GRPO.

A masked diffusion model (MDM) is trained in one step: hide some tokens, guess them. It is used in
T steps: guess all [MASK] tokens, keep the surest guesses, and guess the rest again. How many are
kept and how boldly they are drawn is decided by a schedule that somebody made by hand. Co-GRPO
(arXiv 2512.22288) calls the T steps one Markov decision process in which the model and the
schedule both act, and trains both on the reward of the finished sample:

    canvas x_t ----> schedule p_phi ----> action a_t = (r, tau_s, tau_r, w)
     ^     |                                 |
     |     +-------> model p_theta <---------+
     |                     |
     +---- x_{t+1} <---- a token for every gap, of which the surest are kept

    x_T ----> reward R ----> advantage within a group of G samples ----> update of theta and phi

From PPO to GRPO: there is no value network. G samples of one condition form a group, and the
advantage of a sample is its z-score in the group, (R - mean) / std. The one reward at the end is
credited to every step and every token alike. From GRPO to Co-GRPO: the policy of a step is
p_phi(a_t | x_t, c) times p_theta(filled tokens | a_t, x_t, c), and both factors learn.

    c           the condition              B, G    samples in a rollout, and in a group
    x_t         the canvas at step t       L, V    tokens in a sample, and in the vocabulary
    a_t         the schedule's action      T, t    steps, and the step: 0 .. T-1
    r           re-mask ratio: after the step, floor(r L) of the L tokens are still masked
    tau_s       sampling temperature: tokens are drawn from softmax(logits / tau_s)
    tau_r       re-mask temperature: the noise in the ranking that says which tokens are kept
    w           guidance scale: logits = l_c + w (l_c - l_u)
    l_c, l_u    the model's logits under the condition, and under the null condition
    A-hat       the advantage              s, row  the Settings, and a row of the log

The paper's code is not public; this follows its abstract and project page. Ours are joint updates
as the default (the paper's take turns: --update alternate), the Gaussian's fixed spread, what the
schedule sees of the canvas, a ratio per token and one for the schedule, the KL on l_c, the exact
likelihood, and the toy world. The method ends with `train`.

    python cogrpo.py                                   pretrain, Co-GRPO, measure, draw
    python cogrpo.py --quick                           the same, small
    python cogrpo.py --load out/cogrpo.pt --steps 8    measure a result at another T
    torchrun --nproc_per_node=2 cogrpo.py              the groups split over two processes
"""
import argparse
import copy
import hashlib
import inspect
import math
import os
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# -------------------------------- settings

def setting(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    """Settings of Co-GRPO; each is a flag of the command line, too."""
    update: str = setting("joint", "what learns: joint, alternate (paper), model, schedule")
    likelihood: str = setting("fill", "fill (paper) or exact (ours, not for tau_r near 0)")
    steps: int = setting(4, "T, decoding steps of a sample")
    iters: int = setting(50, "iterations: one rollout and its update each")
    groups: int = setting(10, "groups in a rollout; a group shares its condition")
    group_size: int = setting(12, "G, samples in a group")
    epochs: int = setting(1, "updates on each rollout")
    lr: float = setting(2e-3, "learning rate of the model, falling to 0")
    schedule_lr: float = setting(2e-2, "learning rate of the schedule, falling to 0")
    clip: float = setting(0.2, "PPO: no gain from moving a ratio out of 1 - clip .. 1 + clip")
    kl_model: float = setting(4.0, "weight of KL(model || pretrained)")
    kl_schedule: float = setting(0.05, "weight of KL(schedule || hand-made)")
    grad_norm: float = setting(1.0, "the gradient of each factor is clipped to this norm")
    spread: float = setting(0.3, "standard deviation of the schedule's exploration")
    micro_batch: int = setting(0, "samples in one pass, to save memory (0: the whole rollout)")
    seed: int = setting(0, "seed of everything random")

    def __post_init__(self):
        if self.update not in ("joint", "alternate", "model", "schedule"):
            raise ValueError(f"--update {self.update}: must be joint, alternate, model or schedule")
        if self.likelihood not in ("fill", "exact"):
            raise ValueError(f"--likelihood {self.likelihood}: must be fill or exact")
        lowest = {"steps": 1, "iters": 1, "groups": 1, "epochs": 1, "group_size": 2, "spread": 1e-6}
        for f in fields(self)[2:]:  # the numbers
            value, low = getattr(self, f.name), lowest.get(f.name, 0)
            if not low <= value < 2 ** 32:  # NaN fails, too
                raise ValueError(f"--{f.name.replace('_', '-')} {value}: must be in {low}..2^32")


# -------------------------------- the masked diffusion model

class Block(nn.Module):
    """A pre-norm transformer block without a causal mask: x float [B, L, D] -> [B, L, D]."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        nn.init.zeros_(self.proj.weight)  # a block starts as the identity: faster to train
        nn.init.zeros_(self.mlp[2].weight)

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))  # [B, L, 3, H, D / H]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                             # each [B, H, L, D / H]
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class MDM(nn.Module):
    """A small masked diffusion model: tokens int64 [B, L], cond int64 [B] -> logits [B, L, V].

    Tokens are 0..V-1 and [MASK] is V. Conditions are 0..C-1 and the null condition is C.
    """

    def __init__(self, seq_len, vocab_size, num_conds, dim=96, depth=3, heads=4):
        super().__init__()
        self.seq_len, self.mask_id, self.null_cond = seq_len, vocab_size, num_conds
        self.token = nn.Embedding(vocab_size + 1, dim)
        self.cond = nn.Embedding(num_conds + 1, dim)
        self.position = nn.Parameter(0.02 * torch.randn(seq_len, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.cond.weight, std=0.02)

    def forward(self, tokens, cond):
        bf16 = tokens.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            x = self.token(tokens) + self.cond(cond)[:, None] + self.position  # [B, L, D]
            return self.head(self.norm(self.blocks(x)))


def logits_of(model, tokens, cond):
    """The model's logits [B, L, V], in float32 at least, and -1e30 for -inf and for [MASK].

    Every forward pass of every model goes through here. ValueError if the devices differ.
    """
    device = next(model.parameters(), tokens).device  # a model may have no parameters
    if not tokens.device == cond.device == device:
        raise ValueError(f"the model is on {device}, its tokens are on {tokens.device}, the "
                         f"conditions on {cond.device}: move them to one device")
    logits = model(tokens, cond)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    is_mask = torch.arange(logits.shape[2], device=logits.device) == model.mask_id
    # Some models have [MASK] among their V tokens. -1e30 bans as -inf does, but is finite.
    return logits.masked_fill(is_mask | (logits < -1e30), -1e30)


def pretrain(model, tokens, cond, steps=600, batch=128, lr=3e-3, drop=0.1):
    """Single-step masked prediction, as in BERT and MaskGIT. Trains `model` in place.

    A share cos(pi U / 2) of the tokens, U uniform, is hidden. A share `drop` of the conditions
    becomes the null condition, for the l_u of guidance.
    tokens int64 [N, L], cond [N, ...]. Returns the mean loss of the last 100 steps.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, cycle_momentum=False)
    device = tokens.device
    losses = []
    for _ in tqdm(range(steps), "pretraining", unit="step"):
        rows = torch.randint(len(tokens), (batch,), device=device)
        target, c = tokens[rows], cond[rows]  # [batch, L], [batch, ...]
        if model.null_cond is not None:
            null = torch.zeros_like(c) + model.null_cond
            dropped = torch.rand(batch, device=device) < drop
            c[dropped] = null[dropped].to(c)
        ratio = torch.cos(torch.rand(batch, 1, device=device) * math.pi / 2)
        rank = torch.rand(target.shape, device=device).argsort(1).argsort(1)  # random ranks
        masked = rank < (ratio * model.seq_len).ceil()  # an exact count, at least one
        logits = logits_of(model, target.masked_fill(masked, model.mask_id), c)
        loss = F.cross_entropy(logits[masked], target[masked])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        losses.append(loss.detach())
    return float(torch.stack(losses[-100:]).mean())


# -------------------------------- the schedule, p_phi

FLOOR = 1e-6  # sigmoid and softplus never reach 0: a hand-made 0 becomes this


def hand_made(t, T):
    """The usual schedule of MaskGIT-style samplers: (r, tau_s, tau_r, w) at step t = 0..T-1."""
    u = (t + 1) / T
    return math.cos(math.pi * u / 2), 1.0, 4.5 * (1 - u), 1.0


def constrain(action):
    """An unconstrained action [..., 4] -> (r, tau_s, tau_r, w), each [...]. (AdaNAT's choice)"""
    r = action[..., 0].sigmoid()
    tau_s, tau_r, w = F.softplus(action[..., 1:]).unbind(-1)
    return r, tau_s, tau_r, w


def unconstrain(r, tau_s, tau_r, w):
    """Four floats -> their pre-images under `constrain`, a list of four floats."""
    r = min(max(r, FLOOR), 1 - FLOOR)
    action = [math.log(r / (1 - r))]
    for x in (tau_s, tau_r, w):
        x = max(x, FLOOR)
        action.append(x + math.log(-math.expm1(-x)))  # log(e^x - 1) without overflow
    return action


def canvas_statistics(log_p, masked):
    """What the schedule sees of a canvas and its condition: float [B, 5]. (ours)

    The masked share, then mean and std over the masked positions of the confidence (the largest
    probability) and of the entropy / log V. Any MDM has these, whatever its L and V.
    log_p float [B, L, V] is log softmax(l_c); masked bool [B, L].
    """
    confidence = log_p.amax(2).exp()                                    # [B, L]
    entropy = -(log_p.exp() * log_p).sum(2) / math.log(log_p.shape[2])  # [B, L]
    count = masked.sum(1).clamp(min=1)                                  # [B]
    columns = [masked.to(log_p.dtype).mean(1)]
    for x in (confidence, entropy):
        mean = (x * masked).sum(1) / count
        variance = ((x - mean[:, None]).square() * masked).sum(1) / count
        columns += [mean, (variance + 1e-6).sqrt()]  # the root's gradient is infinite at 0
    return torch.stack(columns, 1)


class Schedule(nn.Module):
    """p_phi(a_t | x_t, c) = Normal(hand-made + residual, spread), in the unconstrained space.

    The residual's last layer starts at zero, so a new Schedule is the hand-made one. Its inputs
    are the statistics and u = (t + 1) / T, so a schedule trained at one T runs at any other.
    hand_made(t, T) returns four floats: r, tau_s, tau_r, w.
    """

    def __init__(self, spread=0.3, hidden=32, hand_made=hand_made):
        super().__init__()
        self.spread = spread
        self.hand_made = hand_made
        self.residual = nn.Sequential(nn.Linear(6, hidden), nn.SiLU(), nn.Linear(hidden, 4))
        nn.init.zeros_(self.residual[2].weight)
        nn.init.zeros_(self.residual[2].bias)

    def prior(self, t, T, like):
        """The hand-made action at step t, unconstrained: [4], dtype and device of `like`."""
        action = unconstrain(*self.hand_made(t, T))
        return torch.stack([like.new_full((), x) for x in action])  # no wait for a GPU

    def forward(self, statistics, t, T):
        """statistics float [B, 5] -> the mean of the action, unconstrained: [B, 4]."""
        u = torch.full_like(statistics[:, :1], (t + 1) / T)
        x = torch.cat([statistics, u], 1)  # [B, 6]
        return self.prior(t, T, x) + self.residual(x)

    def log_prob(self, mean, action, acts):
        """log Normal(action; mean, spread), summed where `acts` (see Step): [B]."""
        z = (action - mean) / self.spread
        log_p = -0.5 * z.square() - math.log(self.spread * math.sqrt(2 * math.pi))
        return (log_p * acts).sum(1)

    def kl(self, mean, prior, acts):
        """KL(p_phi || hand-made), likewise: [B]. Both have the same spread."""
        z = (mean - prior) / self.spread
        return (0.5 * z.square() * acts).sum(1)


# -------------------------------- the rollout

@dataclass
class Step:
    """One step of a rollout of B samples: all that scoring it again needs, without a graph."""
    canvas: torch.Tensor     # x_t, int64 [B, L]
    masked: torch.Tensor     # where x_t is [MASK], bool [B, L]
    acts: torch.Tensor       # which of r, tau_s, tau_r, w have an effect, bool [B, 4]
    mean: torch.Tensor       # of the schedule, unconstrained, [B, 4]
    action: torch.Tensor     # pre-image of a_t, [B, 4]
    candidate: torch.Tensor  # a token drawn for every position, int64 [B, L]
    score: torch.Tensor      # by which candidates are ranked, -inf where not masked, [B, L]
    filled: torch.Tensor     # where the candidate was kept, bool [B, L]
    old_model: torch.Tensor = None     # log-probs of the model at the rollout, [B, L]
    old_schedule: torch.Tensor = None  # log-prob of the schedule at the rollout, [B]


def branches(model, tokens, cond):
    """l_c and l_u, each [B, L, V], from one pass of 2B rows. Without guidance l_u is None."""
    if model.null_cond is None:
        return logits_of(model, tokens, cond), None
    null = torch.zeros_like(cond) + model.null_cond
    return logits_of(model, tokens.repeat(2, 1), torch.cat([cond, null])).chunk(2)


def guided_logits(l_c, l_u, w):
    """Classifier-free guidance: l_c + w (l_c - l_u), for w [B]."""
    if l_u is None:
        return l_c
    return l_c + w[:, None, None] * (l_c - l_u)


def draw(logits):
    """A token for every position from softmax(logits [B, L, V]), by inverting the CDF: [B, L]."""
    probs = logits.softmax(2)
    cdf = probs.cumsum(2)
    level = cdf[:, :, -1:] * torch.rand_like(cdf[:, :, -1:])  # [B, L, 1]
    token = torch.searchsorted(cdf, level, right=True).clamp(max=logits.shape[2] - 1)
    possible = probs.gather(2, token) > 0  # rounding can land on a token of probability 0
    return torch.where(possible, token, logits.argmax(2, keepdim=True))[:, :, 0]


@torch.no_grad()
def rollout(model, schedule, cond, steps, tokens=None, explore=True, likelihood="fill"):
    """Fill canvases in T steps. cond [B, ...] -> (tokens int64 [B, L], a list of T `Step`s).

    tokens: canvases to start from, int64 [B, L], with gaps of mask_id. r is a share of the gaps.
    explore: draw the schedule's action; otherwise take its mean, and keep no log-probs.
    ValueError if T is not in 1..L.
    """
    L, T = model.seq_len, steps
    if not 1 <= T <= L:
        raise ValueError(f"--steps {T}: must be in 1..{L}, the number of tokens")
    canvas = tokens
    if canvas is None:
        canvas = torch.full((len(cond), L), model.mask_id, device=cond.device)
    at_start = (canvas == model.mask_id).sum(1)  # [B]
    trajectory = []
    for t in range(T):
        masked = canvas == model.mask_id  # [B, L]
        count = masked.sum(1)             # [B]

        # 1. The schedule sees how sure the model is of the gaps, and chooses its action.
        l_c, l_u = branches(model, canvas, cond)
        mean = schedule(canvas_statistics(l_c.log_softmax(2), masked), t, T)
        action = mean
        if explore:
            action = mean + schedule.spread * torch.randn_like(mean)
        r, tau_s, tau_r, w = constrain(action)  # each [B]

        # 2. The model proposes a token for every gap.
        logits = guided_logits(l_c, l_u, w)
        candidate = draw(logits / tau_s[:, None, None])  # [B, L]

        # 3. The surest (at temperature 1) are kept, at least one. The last step keeps all.
        log_confidence = logits.log_softmax(2).gather(2, candidate[:, :, None])[:, :, 0]
        gumbel = -torch.empty_like(log_confidence).exponential_().log()  # -log Exp(1)
        score = (log_confidence + tau_r[:, None] * gumbel).masked_fill(~masked, -math.inf)
        left = (r * at_start + 1e-3).floor() if t < T - 1 else 0  # 2.99999 is 3
        keep = (count - left).clamp(min=1)[:, None]
        rank = score.argsort(1, descending=True).argsort(1)  # 0 is the surest
        filled = (rank < keep) & masked

        # Score only what can have an effect: not r and tau_r where the step must fill all.
        some = count > 0
        choice = (count > 1) & (t < T - 1)
        acts = torch.stack([choice, some, choice, some & (l_u is not None)], 1)

        step = Step(canvas, masked, acts, mean, action, candidate, score, filled)
        if explore:
            step.old_model = LOG_PROB[likelihood](logits, step)  # default: fill_log_prob
            step.old_schedule = schedule.log_prob(mean, action, acts)
        trajectory.append(step)
        canvas = torch.where(filled, candidate, canvas)
    return canvas, trajectory


def sample(model, schedule, cond, steps, tokens=None):
    """`rollout` with the schedule's mean action: samples int64 [B, L] for cond [B, ...]."""
    return rollout(model, schedule, cond, steps, tokens, explore=False)[0]


# -------------------------------- advantage, likelihood, update

# A-hat = (R - mean) / (std + 1e-4), of each group of G neighbours
def group_advantage(reward, group_size):
    """reward float [B] -> advantage [B]. Equal rewards give exactly 0, not their rounding noise."""
    R = reward.to(torch.promote_types(reward.dtype, torch.float32)).view(-1, group_size)
    advantage = (R - R.mean(1, keepdim=True)) / (R.std(1, keepdim=True) + 1e-4)
    equal = R.amax(1, keepdim=True) == R.amin(1, keepdim=True)
    return advantage.masked_fill(equal, 0).flatten()


# log p_theta(filled tokens | a_t, x_t, c) = sum of log softmax(logits / tau_s)[token]
def fill_log_prob(logits, step):
    """The paper's likelihood: guided logits [B, L, V] -> log p of each filled token, else 0 [B, L].

    Which tokens were kept depends on theta, too. The paper leaves that out, and so do we here:
    the gradient is biased. `exact_log_prob` has it all.
    """
    _, tau_s, _, _ = constrain(step.action)
    log_p = (logits / tau_s[:, None, None]).log_softmax(2)        # [B, L, V]
    log_p = log_p.gather(2, step.candidate[:, :, None])[:, :, 0]  # [B, L]
    return log_p * step.filled


# surrogate = min(ratio A-hat, clip(ratio, 1 - clip, 1 + clip) A-hat), ratio = p_now / p_rollout
def surrogate(log_p, old, advantage, clip):
    """PPO's clipped objective, elementwise.

    With one update per rollout (--epochs 1) the weights are still those of the rollout, so every
    ratio is exactly 1 and the clip does nothing. It is there for a second update.
    """
    ratio = (log_p - old).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.minimum(ratio * advantage, clipped * advantage)


# KL(p || q) = sum_v p(v) (log p(v) - log q(v))
def categorical_kl(log_p, log_q):
    """log_p, log_q [B, L, V] -> KL at every position [B, L].

    -1 and +1 cancel in the value. Without them the gradient in log p has a term p that softmax
    cancels up to rounding only, and where p = q, Adam would scale that rounding up.
    """
    return (log_p.exp() * (log_p - log_q - 1)).sum(2) + 1


# loss_theta = mean over samples of sum_t sum_tokens [-surrogate + kl_model KL(p || pretrained)] / L
def model_loss(l_c, l_u, reference_l_c, step, advantage, s, row):
    """One step's share of loss_theta, summed over the samples. Adds its diagnostics to row.

    Each token has a ratio of its own (ours): their product would leave the clip's range at once.
    Under `fill`, both log-probs are 0 where nothing was filled: a ratio of 1, and no gradient.
    The KL is on l_c, at the masked positions, so it does not see how l_u moves (ours).
    """
    _, _, _, w = constrain(step.action)
    log_p = LOG_PROB[s.likelihood](guided_logits(l_c, l_u, w), step)       # [B, L]
    gain = surrogate(log_p, step.old_model, advantage[:, None], s.clip)    # [B, L]
    kl = categorical_kl(l_c.log_softmax(2), reference_l_c.log_softmax(2))  # [B, L]
    kl = (kl * step.masked).sum()
    L = log_p.shape[1]
    add_diagnostics(row, "model", log_p, step.old_model, kl, s.clip, L)
    return (s.kl_model * kl - gain.sum()) / L


# loss_phi = mean over samples of sum_t [-surrogate + kl_schedule KL(p_phi || hand-made)] / T
def schedule_loss(schedule, statistics, t, T, step, advantage, s, row):
    """One step's share of loss_phi, summed over the samples. statistics [B, 5]."""
    mean = schedule(statistics, t, T)
    log_p = schedule.log_prob(mean, step.action, step.acts)        # [B]
    gain = surrogate(log_p, step.old_schedule, advantage, s.clip)  # [B]
    kl = schedule.kl(mean, schedule.prior(t, T, mean), step.acts).sum()
    add_diagnostics(row, "schedule", log_p, step.old_schedule, kl, s.clip, T)
    return (s.kl_schedule * kl - gain.sum()) / T


def add_diagnostics(row, name, log_p, old, kl, clip, n):
    """Add a step's KL, and how far its ratios are from 1, to row. n: the loss's divisor, L or T."""
    log_ratio = (log_p - old).detach()
    moved = log_ratio.expm1()  # ratio - 1
    row["kl_" + name] += kl.detach() / n
    row["approx_kl_" + name] += (moved - log_ratio).sum() / n  # estimates KL(old || new)
    row["clip_" + name] += (moved.abs() > clip).sum() / n


def update(model, schedule, reference, optimizer, micro_batches, s, which="joint"):
    """Score a rollout again, step by step, and take a gradient step: s.epochs times.

    No gradient goes through the generation. Each step's graph is freed before the next is made,
    so activations do not grow with T.
    micro_batches: a list of (trajectory, cond, advantage), the rollout in one part or more.
    which: joint, model or schedule. Returns diagnostics of the last epoch, a dict of tensors.
    """
    B = sum(len(cond) for _, cond, _ in micro_batches)
    for _ in range(s.epochs):
        optimizer.zero_grad()
        row = defaultdict(float)
        for trajectory, cond, advantage in micro_batches:
            T = len(trajectory)
            for t, step in enumerate(trajectory):
                with torch.set_grad_enabled(which != "schedule"):
                    l_c, l_u = branches(model, step.canvas, cond)
                with torch.no_grad():
                    reference_l_c = logits_of(reference, step.canvas, cond)
                statistics = canvas_statistics(l_c.log_softmax(2), step.masked)  # [B, 5]

                loss_theta = model_loss(l_c, l_u, reference_l_c, step, advantage, s, row)
                if s.likelihood == "exact":
                    loss_theta += schedule_share(schedule, statistics, t, T, step, advantage, s)
                seen = statistics.detach()  # the schedule's loss does not reach theta
                loss_phi = schedule_loss(schedule, seen, t, T, step, advantage, s, row)
                loss = {"joint": loss_theta + loss_phi, "model": loss_theta, "schedule": loss_phi}
                (loss[which] / B).backward()
        row = {name: value / B for name, value in row.items()}
        for name, factor in zip(("model", "schedule"), optimizer.param_groups):
            if which in ("joint", name):
                average_gradients(factor["params"])
                row["grad_" + name] = nn.utils.clip_grad_norm_(factor["params"], s.grad_norm)
        optimizer.step()  # a factor that does not learn has no gradients and stays
    return row


# ---------------- the exact likelihood: beyond the paper, skip it at the first reading

def exact_log_prob(logits, step):
    """log-probability of all that a step decided at each masked position, else 0: [B, L]. (ours)

    The threshold is the lowest score that was kept. Given it, positions are independent:
    kept, at the threshold   p(candidate) * density of its score there
    kept, above it           p(candidate) * P(score > threshold)
    still masked             sum over tokens v of p(v) * P(score of v < threshold)
    Gumbel: P(score < threshold) = exp(-rate), rate = exp((log-confidence - threshold) / tau_r).
    """
    _, tau_s, tau_r, _ = constrain(step.action)
    tau_r = tau_r.clamp(min=1e-3)[:, None, None]  # without noise there is no density
    candidate = step.candidate[:, :, None]  # [B, L, 1]
    log_p = (logits / tau_s[:, None, None]).log_softmax(2)  # [B, L, V]
    log_p_candidate = log_p.gather(2, candidate)[:, :, 0]  # [B, L]

    threshold, last = step.score.masked_fill(~step.filled, math.inf).min(1, keepdim=True)  # [B, 1]
    log_rate = (logits.log_softmax(2) - threshold[:, :, None]) / tau_r  # [B, L, V]
    log_rate = log_rate.clamp(-60, 60)  # so that exp stays finite
    below = (log_p - log_rate.exp()).logsumexp(2)  # over candidates: [B, L]
    log_rate = log_rate.gather(2, candidate)[:, :, 0]  # [B, L]
    above = (-(-log_rate.exp()).expm1()).log()  # log(1 - exp(-rate))
    at = log_rate - log_rate.exp()  # log density, less the constant -log tau_r
    kept = above.scatter(1, last, at.gather(1, last))  # `last` is at the threshold

    factor = torch.where(step.filled, log_p_candidate + kept, below)
    all_kept = (step.filled == step.masked).all(1, keepdim=True)  # then there is no threshold
    return torch.where(all_kept, log_p_candidate, factor) * step.masked


def schedule_share(schedule, statistics, t, T, step, advantage, s):
    """-surrogate of a_t for loss_theta: theta moves a_t's mean through the statistics."""
    frozen = copy.deepcopy(schedule).requires_grad_(False)  # phi does not learn from this
    log_p = frozen.log_prob(frozen(statistics, t, T), step.action, step.acts)  # [B]
    gain = surrogate(log_p, step.old_schedule, advantage, s.clip)
    return -gain.sum() / step.canvas.shape[1]  # / L, as all of loss_theta


LOG_PROB = {"fill": fill_log_prob, "exact": exact_log_prob}

# -------------------------------- training

def processes():
    """(rank, number of processes): (0, 1) without torchrun."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def average_gradients(parameters):
    """Each gradient becomes its mean over the processes."""
    _, ranks = processes()
    if ranks > 1:
        for p in parameters:
            if p.grad is None:  # no sample of this process needed it
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad)
            p.grad /= ranks


def check_reward(reward, cond):
    """The reward as float [B], in float32 at least, on the device of cond. ValueError if wrong."""
    is_float = torch.is_tensor(reward) and reward.is_floating_point()
    if not is_float or reward.shape != (len(cond),):
        got = f"{reward.dtype} {list(reward.shape)}" if torch.is_tensor(reward) else type(reward)
        raise ValueError(f"reward_fn returned {got}: it must be float [{len(cond)}], one a sample")
    reward = reward.detach().to(cond.device, torch.promote_types(reward.dtype, torch.float32))
    if not reward.isfinite().all():
        raise ValueError("reward_fn returned NaN or infinity: every reward must be finite")
    return reward


def prepare(model, s, schedule=None):
    """What the iterations start from: (model to train, schedule, reference, optimizer).

    The given model is put in eval mode and becomes the KL's reference. The one to train is a copy
    that shares its frozen parameters. schedule: one to start from, which keeps its own spread.
    Under torchrun all processes take the weights and buffers of rank 0.
    """
    _, ranks = processes()
    if s.groups % ranks:
        raise ValueError(f"--groups {s.groups}: must be a multiple of {ranks}, the processes")
    torch.manual_seed(s.seed)
    schedule = copy.deepcopy(schedule) if schedule else Schedule(s.spread)
    parameters = list(model.parameters())  # of which there may be none
    if parameters:
        schedule.to(parameters[0].device, torch.promote_types(parameters[0].dtype, torch.float32))
    if ranks > 1:
        for x in (*parameters, *model.buffers(), *schedule.parameters(), *schedule.buffers()):
            dist.broadcast(x.data, 0)
    reference = model.eval()
    frozen = {id(p): p for p in parameters if not p.requires_grad}
    model = copy.deepcopy(model, memo=frozen)  # shares what is in the memo
    theta = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam([{"params": theta}, {"params": list(schedule.parameters())}])
    return model, schedule, reference, optimizer


def iterate(i, model, schedule, reference, optimizer, reward_fn, conds, s):
    """Iteration i of Co-GRPO: (a row of the log, tokens int64 [B, L], cond [B, ...]).

    It seeds torch by s, i and rank, so that nothing drawn before matters and a run can resume.
    """
    rank, ranks = processes()
    torch.manual_seed((s.seed * s.iters + i) * ranks + rank)
    fade = 1 - i / s.iters  # so that the noise of the last updates counts little
    optimizer.param_groups[0]["lr"] = fade * s.lr
    optimizer.param_groups[1]["lr"] = fade * s.schedule_lr
    which, turn = s.update, i
    if s.update == "alternate":  # the paper: theta and phi in turns, on the same conditions
        which, turn = ("model", "schedule")[i % 2], i // 2

    mine = torch.arange(s.groups, device=conds.device).chunk(ranks)[rank]
    cond = conds[(turn * s.groups + mine) % len(conds)]  # one a group
    cond = cond.repeat_interleave(s.group_size, 0)       # [B, ...]
    micro = cond.split(s.micro_batch or len(cond))
    rollouts = [rollout(model, schedule, c, s.steps, likelihood=s.likelihood) for c in micro]
    tokens = torch.cat([tokens for tokens, _ in rollouts])

    reward = check_reward(reward_fn(tokens, cond), cond)
    advantage = group_advantage(reward, s.group_size).split(len(micro[0]))
    batches = [(steps, c, a) for (_, steps), c, a in zip(rollouts, micro, advantage)]
    row = update(model, schedule, reference, optimizer, batches, s, which)

    groups = reward.view(-1, s.group_size)
    row["reward"] = reward.mean()
    row["group_std"] = groups.std(1).mean()
    row["groups_equal"] = (groups.amax(1) == groups.amin(1)).to(reward).mean()
    values = torch.stack([x.to(reward) for x in row.values()])
    if ranks > 1:
        dist.all_reduce(values)
    row = dict(zip(row, (values / ranks).tolist()))  # syncs with a GPU
    if not all(map(math.isfinite, row.values())):
        raise ValueError(f"--lr {s.lr}, --schedule-lr {s.schedule_lr}: NaN or infinity in "
                         f"iteration {i}; lower them, and keep what learns in float32")
    row["iter"] = i
    return row, tokens, cond


def train(model, reward_fn, conds, settings=Settings(), on_iteration=None, schedule=None):
    """Co-GRPO: `settings.iters` iterations from a pretrained model.

    model(tokens int64 [B, L], cond [B, ...]) -> logits [B, L, V], with the attributes seq_len,
    mask_id and null_cond (None: no guidance). It is left as it is, but in eval mode.
    reward_fn(tokens int64 [B, L], cond [B, ...]) -> float [B], finite. It must not change them.
    conds [C, ...]: the conditions of the groups, taken in turn, on the model's device.
    on_iteration(row, model, schedule, tokens, cond): called after each; may add to the log's row.
    schedule: see `prepare`. Returns (model, schedule, log), log a list of dicts of floats.
    """
    state = model, schedule, _, _ = prepare(model, settings, schedule)
    log = []
    bar = tqdm(range(settings.iters), "Co-GRPO", unit="iter", disable=processes()[0] > 0)
    for i in bar:
        row, tokens, cond = iterate(i, *state, reward_fn, conds, settings)
        log.append(row)
        if on_iteration:
            on_iteration(row, model, schedule, tokens, cond)
        bar.set_postfix(R=f"{row['reward']:.2f}", KL=f"{row['kl_model']:.3f}")
    return model, schedule, log


# -------------------------------- main: toy digits

def parse(argv):
    """The command line -> (arguments, a dict of the fields of Settings that it gives)."""
    parser = argparse.ArgumentParser(description="Co-GRPO on toy digits", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"cogrpo.py: error: {message}; see --help\n")
    parser.add_argument("--data", help="folder with MNIST, or `drawn`: digits drawn by Pillow")
    parser.add_argument("--out", help="where results go (out, or T4 beside --load)")
    parser.add_argument("--cache", default="cache", help="where toy worlds are (cache)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (the first there is)")
    parser.add_argument("--quick", action="store_true", help="all of it, small (6 iterations)")
    parser.add_argument("--load", type=Path, help="a cogrpo.pt: measure and draw it, at --steps")
    for f in fields(Settings):
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} ({f.default})")
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if f.name in args}
    allowed = ("load", "steps", "seed", "out", "device")
    for name, value in vars(args).items():
        if args.load and name not in allowed and value != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} has no effect with --load: leave it out")
    return args, given


def pick_device(name):
    available = torch.cuda.is_available(), torch.backends.mps.is_available(), True
    for kind, there in zip(("cuda", "mps", "cpu"), available):
        if there and name in ("auto", kind):
            return torch.device(kind)
    raise ValueError(f"--device {name}: no such device here; leave it out to use what there is")


def build_world(toy, args, size, seed, device):
    """The toy world (codebook and judges) and its pretrained MDM, from the cache or made anew."""
    code = [inspect.getsource(x) for x in (Block, MDM, logits_of, pretrain, toy)]
    train_set, test_set, source, data_key = toy.load_digits(args.data, size, seed)
    print(source)
    torch.manual_seed(seed)
    model = MDM(toy.SEQ_LEN, size.codebook_size, toy.CLASSES, size.dim, size.depth).to(device)
    key = hashlib.sha256(repr([code, data_key, seed, size]).encode()).hexdigest()[:12]
    path = Path(args.cache) / f"world-{key}.pt"
    if path.exists():
        try:
            saved = torch.load(path, map_location=device, weights_only=True)
            model.load_state_dict(saved["model"])
            print(f"codebook, judges and pretrained model: from {path}")
            return toy.World.from_state(saved["world"]), model
        except Exception:  # a damaged cache costs a new world, not the run
            print(f"{path} cannot be read: making it anew")
    world, tokens, labels = toy.World.build(train_set, test_set, size, device)
    loss = pretrain(model, tokens, labels, size.pretrain_steps, size.pretrain_batch)
    print(f"pretraining loss {loss:.3f}")
    saved = {"world": world.state_dict(), "model": model.state_dict()}
    toy.save_whole(path, lambda part: torch.save(saved, part))
    return world, model


def train_toy(toy, args, settings, size, out, device):
    """A world, Co-GRPO on it, and what it leaves: out/cogrpo.pt, log.csv and curves.png."""
    rank, ranks = processes()
    for turn in range(ranks):  # rank 0 makes the world, the others find it in the cache
        if turn == rank:
            world, base = build_world(toy, args, size, settings.seed, device)
        if ranks > 1:
            dist.barrier()

    def add_held_out(row, model, schedule, tokens, cond):  # measured, and never trained on
        row["held_out"] = float(world.held_out(tokens, cond).mean())

    conds = torch.arange(toy.CLASSES, device=device)
    model, schedule, log = train(base, world.reward, conds, settings, add_held_out)
    if rank == 0:
        saved = {"settings": asdict(settings), "size": asdict(size), "world": world.state_dict(),
                 "base": base.state_dict(), "model": model.state_dict(),
                 "schedule": schedule.state_dict()}
        toy.save_whole(out / "cogrpo.pt", lambda part: torch.save(saved, part))
        toy.write_csv(out / "log.csv", log)
        toy.draw_curves(out / "curves.png", log)


def load_checkpoint(toy, path, device):
    """What a cogrpo.pt holds: (Size, world, base, model, schedule, Settings)."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        settings, size = Settings(**saved["settings"]), toy.Size(**saved["size"])
        base = MDM(toy.SEQ_LEN, size.codebook_size, toy.CLASSES, size.dim, size.depth).to(device)
        model, schedule = copy.deepcopy(base), Schedule(settings.spread).to(device)
        for name, module in (("base", base), ("model", model), ("schedule", schedule)):
            module.load_state_dict(saved[name])
        return size, toy.World.from_state(saved["world"]), base, model, schedule, settings
    except FileNotFoundError:
        raise ValueError(f"--load {path}: no such file; a run writes cogrpo.pt in --out") from None
    except Exception as error:  # torch.load fails in many ways, and all have one cure
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:80]
        raise ValueError(f"--load {path}: not a cogrpo.pt of this program ({reason})") from None


def report(toy, out, checkpoint, T, seed, device):
    """Measure before and after: the table, results.csv, samples.png, decoding.gif, schedule.png."""
    size, world, base, model, schedule, _ = load_checkpoint(toy, checkpoint, device)
    cond = torch.arange(size.eval_samples, device=device) % toy.CLASSES
    rows, films, curves = [], [], []
    for name, m, p, steps in (("base T=32", base, Schedule().to(device), 32),
                              (f"base T={T}", base, Schedule().to(device), T),
                              (f"Co-GRPO T={T}", model, schedule, T)):
        torch.manual_seed(seed)
        batches = tqdm(cond.split(50), f"measuring {name}", unit="batch")
        rollouts = [rollout(m, p, c, steps, explore=False) for c in batches]
        tokens = torch.cat([tokens for tokens, _ in rollouts])
        rows.append({"name": name, **world.measure(tokens, cond), "passes": 2 * steps})
        filled, film = rollouts[0]
        films.append((name, [step.canvas for step in film] + [filled]))  # each [50, 49]
    rows.append({"name": "real digits", **world.measure_real(), "passes": ""})
    toy.write_csv(out / "results.csv", rows)
    toy.draw_samples(out / "samples.png", films, world)
    toy.draw_decoding(out / "decoding.gif", films[1:], world)
    _, trajectory = rollouts[0]  # Co-GRPO's, the last in the loop
    for j, name in enumerate(("re-mask ratio r", "sampling temperature tau_s",
                              "re-mask temperature tau_r", "guidance scale w")):
        acting = [t for t, step in enumerate(trajectory) if step.acts[:, j].any()]
        learned = [constrain(trajectory[t].mean)[j].cpu() for t in acting]  # each [50]
        if acting:  # at T = 1, r and tau_r never act
            curves.append((name, acting, [hand_made(t, T)[j] for t in acting], learned))
    toy.draw_schedule(out / "schedule.png", curves)
    print(f"\n{toy.table(rows)}\n\nresults and pictures are in {out}/")


def run(argv):
    import toy_reward as toy  # here, so that the method needs neither torchvision nor Pillow
    args, given = parse(argv)
    device = pick_device(args.device)
    if "RANK" in os.environ:  # started by torchrun: rank 0 alone prints
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")
    size = toy.QUICK if args.quick else toy.Size()
    settings = Settings(iters=6, group_size=8) if args.quick else Settings()
    if args.load:
        settings = load_checkpoint(toy, args.load, device)[-1]
    settings = replace(settings, **given)
    T = settings.steps
    if T > toy.SEQ_LEN:
        raise ValueError(f"--steps {T}: must be in 1..{toy.SEQ_LEN}, the number of tokens")
    default = args.load.parent / f"T{T}" if args.load else "out"
    out = Path(args.out or default)
    folders = {"--out": out} if args.load else {"--out": out, "--cache": Path(args.cache)}
    for name, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(f"{name} {folder}: cannot write there ({error.strerror})") from None
    if not args.load:
        train_toy(toy, args, settings, size, out, device)
    if processes()[0] == 0:
        report(toy, out, args.load or out / "cogrpo.pt", T, settings.seed, device)


def main(argv=None):
    try:
        run(argv)
    except ValueError as error:
        if not str(error).startswith(("--", "reward_fn")):
            raise  # a bug, and a bug shows its traceback
        print(f"cogrpo.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
