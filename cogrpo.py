"""Co-GRPO: a masked diffusion model and its inference schedule, optimised together by GRPO.

A masked diffusion model (MDM) learns to predict hidden tokens in one step, but generates in T:
predict every [MASK], keep the most confident predictions, repeat. How many are kept, and how boldly
they are drawn, is up to a schedule that training never sees. Co-GRPO (arXiv 2512.22288) calls the T
steps one Markov decision process, and trains model and schedule on the reward of the sample:

    canvas x_t ----> model p_theta ----> l_c, l_u ----> schedule p_phi
     ^                                     |               |
     |          a candidate for every [MASK] <---- a_t = (r, tau_s, tau_r, w)
     |                                     |
     +---- x_{t+1} <---- the most confident are kept

    x_T ----> reward R ----> advantage within its group ----> update of theta and phi

    maximise    J(theta, phi) = E[R(x_T, c)]
    policy      pi_t = p_phi(a_t | x_t, c) * product over filled tokens of p_theta(token | ...)
    gradient    E[sum_t A-hat grad log pi_t]: not quite grad J. What is kept, and what the schedule
                sees, also depend on theta. The paper's figure leaves that out, and so do we.

    c         the condition            B, G  samples in a rollout, and in a group
    x_t       the canvas at step t     L, V  tokens in a sample, and in the vocabulary
    a_t       the schedule's action    T, t  steps, and the step: 0 .. T-1
    r         re-mask ratio: after the step, floor(r L) of the L tokens are still masked
    tau_s     sampling temperature: candidates are drawn from softmax(logits / tau_s)
    tau_r     re-mask temperature: scale of the noise in the ranking of the candidates
    w         guidance scale: logits = l_c + w (l_c - l_u)
    l_c, l_u  the model's logits under the condition, and under the null condition

From the paper's abstract, page and figure: the decision process, the two policies and their
likelihoods, the four numbers of a_t, the group advantage, updates of theta and phi in turns.
From AdaNAT and AdaGen: sigmoid and softplus, a residual that starts at 0.
Ours: joint updates (the page calls them unstable), a fixed std, what the schedule
observes, one ratio a token and one an action, both KLs, the scale of the losses, the toy world.
The page links the authors' code, which we could not reach: nothing was checked against it.
"""
import argparse
import copy
import math
import os
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads free their core
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence
from tqdm import tqdm

BANNED = -1e30  # logit of a token that is never drawn: finite, since 0 * -inf is NaN

# ------------ settings
class UserError(ValueError):
    """What the user can put right. main prints it without a traceback."""


def setting(default, help, low=0, high=10 ** 9):
    """A field of Settings with its help text and its range."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True)
class Settings:
    """Settings of Co-GRPO; each is a flag of the command line."""
    optimize: str = setting("joint", "joint, alternate (paper), model or schedule")
    steps: int = setting(4, "T, decoding steps of a sample", low=1)
    iters: int = setting(50, "iterations: a rollout and its updates; 0 only measures")
    groups: int = setting(10, "groups in a rollout; a group shares its condition", low=1)
    group_size: int = setting(12, "G, samples in a group", low=2)
    epochs: int = setting(1, "updates on each rollout", low=1)
    lr: float = setting(2e-3, "learning rate of the model, falling to 0", high=1)
    schedule_lr: float = setting(2e-2, "the schedule's learning rate", high=1)
    clip: float = setting(0.2, "PPO: no gain from ratios outside 1 - clip .. 1 + clip", high=1)
    beta: float = setting(4.0, "weight of KL(model || pretrained)")
    schedule_beta: float = setting(0.05, "weight of KL(schedule || hand-made)")
    action_std: float = setting(0.3, "std of a_t before sigmoid and softplus", low=1e-6)
    micro_groups: int = setting(0, "groups in one pass, to save memory (0: all)")
    seed: int = setting(0, "seed of everything random", high=10 ** 12)

    def __post_init__(self):
        if self.optimize not in ("joint", "alternate", "model", "schedule"):
            raise UserError(f"optimize={self.optimize}: joint, alternate, model or schedule?")
        for f in fields(self)[1:]:  # not optimize
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            if not isinstance(value, (f.type, int)) or not low <= value <= high:
                raise UserError(f"{f.name}={value!r}: must be {f.type.__name__} in {low}..{high}")


# ------------ the masked diffusion model, p_theta
class MDM(nn.Module):
    """A small MDM: tokens int64 [B, L], cond int64 [B] -> logits [B, L, V].

    Tokens are 0..V-1 and [MASK] is V. Conditions are 0..C-1 and the null condition is C.
    """

    def __init__(self, seq_len, vocab_size, num_conds, dim=96, depth=3, heads=4):
        super().__init__()
        self.seq_len, self.mask_id, self.null_cond = seq_len, vocab_size, num_conds
        self.token = nn.Embedding(vocab_size + 1, dim)
        self.cond = nn.Embedding(num_conds + 1, dim)
        self.position = nn.Parameter(0.02 * torch.randn(seq_len, dim))
        # With biases, no_grad has a kernel that rounds differently: KL(model || its copy) > 0.
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True, bias=False)
        nn.init.zeros_(layer.self_attn.out_proj.weight)  # A block changes nothing at first:
        nn.init.zeros_(layer.linear2.weight)             # this is faster to train.
        self.blocks = nn.TransformerEncoder(layer, depth, nn.LayerNorm(dim),
                                            enable_nested_tensor=False)
        self.head = nn.Linear(dim, vocab_size)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.cond.weight, std=0.02)

    def forward(self, tokens, cond):
        x = self.token(tokens) + self.cond(cond)[:, None] + self.position  # [B, L, D]
        return self.head(self.blocks(x))


def logits_of(model, tokens, cond):
    """Any model's logits [B, L, V] in float32 at least. [MASK] and tokens at -inf are BANNED."""
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        raise UserError("torch.autocast around the loop misses updates: use it in forward")
    logits = model(tokens.clone(), cond.clone())  # the model may write into them
    if not torch.is_tensor(logits) or logits.shape[:-1] != tokens.shape:
        raise UserError("model: must return its logits, one tensor [B, L, V]")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits.masked_fill(logits < BANNED, BANNED)
    if model.mask_id < logits.shape[2]:  # [MASK] is one of the V tokens
        logits[:, :, model.mask_id] = BANNED
    return logits


def pretrain(model, tokens, cond, steps=600, batch=128, lr=3e-3, drop=0.1):
    """Single-step masked prediction, as in BERT and MaskGIT. Trains `model` in place.

    tokens int64 [N, L], cond [N, ...]. A row's tokens are masked with probability
    cos(pi U / 2), U uniform. A fraction `drop` of cond becomes null, for guidance.
    """
    if len(tokens) != len(cond) or (tokens == model.mask_id).any():
        raise UserError(f"pretrain: data with mask_id {model.mask_id}, or with unequal rows")
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, cycle_momentum=False)
    for _ in tqdm(range(steps), "pretraining", disable=None):
        rows = torch.randint(len(tokens), (batch,), device=tokens.device)
        target, c = tokens[rows], cond[rows]  # [batch, L], [batch, ...]
        if model.null_cond is not None:
            dropped = torch.rand(batch, device=tokens.device) < drop
            c[dropped] = torch.as_tensor(model.null_cond).to(c)
        ratio = torch.cos(torch.rand(batch, 1, device=tokens.device) * math.pi / 2)
        masked = torch.rand(target.shape, device=tokens.device) < ratio  # [batch, L]
        logits = logits_of(model, target.masked_fill(masked, model.mask_id), c)
        loss = F.cross_entropy(logits[masked], target[masked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return loss.item()


# ------------ the scheduling policy, p_phi
def hand_made(t, T):
    """MaskGIT's usual schedule: (r, tau_s, tau_r, w) at step t = 0..T-1."""
    u = (t + 1) / T
    return math.cos(math.pi * u / 2), 1.0, 4.5 * (1 - u), 1.0


def constrain(action):
    """Unconstrained [..., 4] -> r (sigmoid), tau_s, tau_r, w (softplus): [..., 4]. (AdaNAT)"""
    return torch.cat([action[..., :1].sigmoid(), F.softplus(action[..., 1:])], -1)


def unconstrain(values):
    """The inverse of `constrain`, of four floats: [4]. 0 and r = 1 have none: moved by 1e-6."""
    x = torch.tensor(values, dtype=torch.float64)
    r, positive = x[:1].logit(eps=1e-6), x[1:].clamp(min=1e-6)
    return torch.cat([r, positive + (-torch.expm1(-positive)).log()])  # log(e^x - 1)


def observe(l_c, masked):
    """What the schedule sees of a canvas and its condition: float [B, 3]. (ours)

    The masked fraction, and two means over masked positions: the largest probability and the
    entropy / log V. l_c float [B, L, V], masked bool [B, L].
    """
    log_p = l_c.log_softmax(2)     # [B, L, V]
    largest = log_p.amax(2).exp()  # [B, L]
    entropy = -(log_p.exp() * log_p).sum(2) / math.log(log_p.shape[2])  # [B, L]
    count = masked.sum(1)          # [B]
    means = [(x * masked).sum(1) / count.clamp(min=1) for x in (largest, entropy)]
    return torch.stack([count / masked.shape[1], *means], 1)


class Schedule(nn.Module):
    """p_phi(a_t | x_t, c) = Normal(hand-made + residual, std), in the unconstrained space.

    The residual's last layer starts at zero, so a new Schedule is the hand-made one. Its inputs
    are the observation and u = (t + 1) / T, so a schedule trained at one T runs at any other.
    hand_made(t, T) returns r, tau_s, tau_r, w. It and std are not in the state_dict.
    """

    def __init__(self, hand_made=hand_made, std=0.3, hidden=32):
        super().__init__()
        self.hand_made, self.std = hand_made, std
        self.residual = nn.Sequential(nn.Linear(4, hidden), nn.SiLU(), nn.Linear(hidden, 4))
        self.float()  # even if torch's default is bfloat16
        nn.init.zeros_(self.residual[2].weight)
        nn.init.zeros_(self.residual[2].bias)

    def forward(self, observation, t, T):
        """observation [B, 3] -> p_phi and the hand-made policy, two Normals over [B, 4]."""
        values = self.hand_made(t, T)
        if not (len(values) == 4 and values[0] <= 1 and all(0 <= x < math.inf for x in values)):
            raise UserError(f"hand_made({t}, {T}) = {values}: needs four, r in 0..1, others >= 0")
        u = torch.full_like(observation[:, :1], (t + 1) / T)
        residual = self.residual(torch.cat([observation, u], 1).to(self.residual[0].weight))
        by_hand = unconstrain(values).to(residual).expand_as(residual)  # [B, 4]
        p_phi = Normal(by_hand + residual, self.std, validate_args=False)  # `iterate` checks
        return p_phi, Normal(by_hand, self.std, validate_args=False)


# ------------ trajectory collection
@dataclass
class Step:
    """What happened to B samples in step t of T."""
    t: int
    T: int
    canvas: torch.Tensor       # x_t, int64 [B, L]
    masked: torch.Tensor       # where x_t is [MASK], bool [B, L]
    observation: torch.Tensor  # what the schedule saw, [B, 3]
    action: torch.Tensor       # a_t, unconstrained, [B, 4]
    has_effect: torch.Tensor   # which of r, tau_s, tau_r, w did something, bool [4]
    candidate: torch.Tensor    # a token drawn for every position, int64 [B, L]
    confidence: torch.Tensor   # what ranks the candidates, [B, L]
    filled: torch.Tensor       # where the candidate was kept, bool [B, L]
    # Log-probs under the rollout's weights. The first epoch of `update` fills them in.
    old_log_theta: torch.Tensor = None  # [B, L]
    old_log_phi: torch.Tensor = None    # [B]


def cond_uncond(model, tokens, cond):
    """l_c and l_u, each [B, L, V], from one call with 2B rows. Without guidance l_u is None."""
    if model.null_cond is None:
        return logits_of(model, tokens, cond), None
    null = torch.as_tensor(model.null_cond).to(cond).expand_as(cond)  # [B, ...]
    return logits_of(model, tokens.repeat(2, 1), torch.cat([cond, null])).chunk(2)


def guided_logits(l_c, l_u, w):
    """Classifier-free guidance: l_c + w (l_c - l_u), for w [B]. Without guidance l_c."""
    if l_u is None:
        return l_c
    logits = l_c + w[:, None, None] * (l_c - l_u)
    # Where only l_u is BANNED, l_c - l_u is +1e30, and would always be drawn.
    return logits.masked_fill_(l_u <= BANNED, BANNED)


def gumbel_like(x):
    """Standard Gumbel noise. argmax(logits + noise) is a draw from softmax(logits)."""
    return -(-torch.rand_like(x).clamp(min=1e-20).log()).log()


@torch.no_grad()
def rollout(model, schedule, cond, T, tokens=None, explore=True):
    """Fill canvases in T steps: cond [B, ...] -> (tokens int64 [B, L], a list of T `Step`s).

    tokens: canvases to start from, int64 [B, L]. Only positions at mask_id are filled, and r is a
    fraction of these, not of L. explore: draw the action; otherwise take its mean.
    """
    if tokens is None:
        tokens = torch.full((len(cond), model.seq_len), model.mask_id, device=cond.device)
    masked_at_start = (tokens == model.mask_id).sum(1)  # [B]
    trajectory = []
    for t in range(T):
        masked = tokens == model.mask_id  # [B, L]

        # 1. The schedule observes how confident the model is, and chooses its action.
        l_c, l_u = cond_uncond(model, tokens, cond)
        observation = observe(l_c, masked)
        p_phi, _ = schedule(observation, t, T)
        action = p_phi.sample() if explore else p_phi.mean
        r, tau_s, tau_r, w = constrain(action).unbind(1)  # each [B]

        # 2. The model draws a candidate for every position.
        logits = guided_logits(l_c, l_u, w)
        tempered = logits / tau_s[:, None, None]
        candidate = (tempered + gumbel_like(tempered)).argmax(2)  # [B, L]

        # 3. Masked positions are ranked by log-probability (without tau_s) plus noise.
        log_p = logits.log_softmax(2).gather(2, candidate[:, :, None])[:, :, 0]  # [B, L]
        confidence = (log_p + tau_r[:, None] * gumbel_like(log_p)).masked_fill(~masked, -math.inf)
        rank = confidence.argsort(1, descending=True).argsort(1)

        # 4. The best are kept, at least one, until a fraction r is masked. The last step keeps all.
        left = (r * masked_at_start + 1e-3).floor()  # 2.9999 is 3
        keep = (masked.sum(1) - left).clamp(min=1)  # [B]
        last = t == T - 1
        filled = masked if last else masked & (rank < keep[:, None])

        # 5. What happened is stored. In the last step, r and tau_r had no effect.
        has_effect = cond.new_tensor([not last, True, not last, l_u is not None], dtype=bool)
        trajectory.append(Step(t, T, tokens, masked, observation, action, has_effect, candidate,
                               confidence, filled))
        tokens = torch.where(filled, candidate, tokens)
    return tokens, trajectory


def sample(model, schedule, cond, T, tokens=None):
    """`rollout` with the mean action: samples int64 [B, L] for cond [B, ...]."""
    return rollout(model, schedule, torch.as_tensor(cond), T, tokens, explore=False)[0]


# ------------ group advantage
@torch.no_grad()
def evaluate(reward_fn, tokens, cond):
    """R of each sample, float32 [B], on cond's device. UserError if not B numbers."""
    reward = reward_fn(tokens.clone(), cond.clone())
    try:
        R = torch.as_tensor(reward, dtype=torch.float32, device=cond.device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"reward_fn: returned a {type(reward).__name__}, not numbers") from error
    if R.shape != cond.shape[:1] or not R.isfinite().all():
        got = f"{R.isfinite().sum()} in {list(R.shape)}"
        raise UserError(f"reward_fn: needs {len(cond)} finite numbers, got {got}")
    return R.detach()


def group_advantage(reward, group_size):
    """A-hat = (R - mean) / std in each group of G neighbours, 0 if all are equal: [B] -> [B]."""
    R = reward.view(-1, group_size)  # [B / G, G]
    std = R.std(1, keepdim=True)
    equal = std <= 1e-6 * R.abs().amax(1, keepdim=True)  # up to rounding
    return ((R - R.mean(1, keepdim=True)) / std).masked_fill(equal, 0).flatten()


# ------------ policy likelihood
def model_likelihood(l_c, l_u, step):
    """log p_theta(candidate | a_t, x_t, c) = log softmax(logits / tau_s)[candidate]: [B, L]."""
    _, tau_s, _, w = constrain(step.action).unbind(1)
    tempered = guided_logits(l_c, l_u, w) / tau_s[:, None, None]
    return tempered.log_softmax(2).gather(2, step.candidate[:, :, None])[:, :, 0]


def schedule_likelihood(p_phi, step):
    """log p_phi(a_t | x_t, c): [B], of what has an effect. The rest would only add noise."""
    return (p_phi.log_prob(step.action) * step.has_effect).sum(1)


# ------------ policy optimization (s: Settings)
def surrogate(log_p, old_log_p, advantage, clip):
    """PPO: min(ratio A-hat, clip(ratio, 1 - clip, 1 + clip) A-hat)."""
    ratio = (log_p - old_log_p).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def categorical_kl(l_p, l_q):
    """KL(p || q) = 1 + sum_v p (log(p / q) - 1), of two logits [B, L, V]: [B, L]."""
    # The 1s cancel. Without them the gradient at p = q is noise, which Adam enlarges.
    log_p, log_q = l_p.log_softmax(2), l_q.log_softmax(2)
    return 1 + (log_p.exp() * (log_p - log_q - 1)).sum(2)


def model_loss(model, reference, step, cond, advantage, s):
    """Model policy optimization: a step's loss_theta, summed over samples, and its KL.

        loss_theta = [ sum over filled of -surrogate + beta sum over masked of KL ] / L

    Each token has its own ratio. The KL is on l_c, to the pretrained model; nothing holds l_u.
    """
    L = model.seq_len
    l_c, l_u = cond_uncond(model, step.canvas, cond)
    log_p = model_likelihood(l_c, l_u, step)  # [B, L]
    if step.old_log_theta is None:
        step.old_log_theta = log_p.detach()
    gain = surrogate(log_p, step.old_log_theta, advantage[:, None], s.clip) * step.filled
    with torch.no_grad():
        reference_l_c = logits_of(reference, step.canvas, cond)
    kl = categorical_kl(l_c, reference_l_c) * step.masked  # [B, L]
    return (s.beta * kl - gain).sum() / L, kl.detach().sum() / L


def schedule_loss(schedule, step, advantage, s):
    """Scheduling policy optimization: a step's loss_phi, summed over samples, and its KL.

        loss_phi = [ -surrogate + schedule_beta KL(p_phi || hand-made) ] / T
    """
    p_phi, by_hand = schedule(step.observation, step.t, step.T)
    log_p = schedule_likelihood(p_phi, step)  # [B]
    if step.old_log_phi is None:
        step.old_log_phi = log_p.detach()
    gain = surrogate(log_p, step.old_log_phi, advantage, s.clip)  # [B]
    kl = kl_divergence(p_phi, by_hand).sum(1)  # [B], also of what has no effect
    return (s.schedule_beta * kl - gain).sum() / step.T, kl.detach().sum() / step.T


def update(model, schedule, reference, optimizer, rollouts, s, which="joint"):
    """Update theta, phi or both (which: model, schedule, joint), s.epochs times.

        loss = mean over samples of sum_t [ loss_theta + loss_phi ]

    Each step is scored on its own, and its graph freed before the next. rollouts: the samples in
    parts, each a tuple (tokens, trajectory, cond, advantage). Returns metrics of the last epoch.
    """
    B = sum(len(tokens) for tokens, _, _, _ in rollouts)
    for _ in range(s.epochs):
        optimizer.zero_grad()
        metrics = defaultdict(float)
        for _, trajectory, cond, advantage in rollouts:
            for step in trajectory:
                if which != "schedule":
                    loss, kl = model_loss(model, reference, step, cond, advantage, s)
                    (loss / B).backward()
                    metrics["kl_model"] += kl / B
                if which != "model":
                    loss, kl = schedule_loss(schedule, step, advantage, s)
                    (loss / B).backward()
                    metrics["kl_schedule"] += kl / B
        for name, group in zip(("model", "schedule"), optimizer.param_groups):
            metrics["grad_" + name] = nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
    return metrics


# ------------ training
def prepare(model, conds, s, schedule=None):
    """What the iterations start from: (learner, schedule, reference, optimizer).

    The model becomes the KL's reference and does not change. The learner is a copy of it that
    shares its frozen parameters. schedule: one to start from, with its own std. `iterate` sets lr.
    To resume, load the saved state_dicts of learner, schedule and optimizer.
    """
    torch.manual_seed(s.seed)
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    learner = copy.deepcopy(model, memo=shared).eval()  # memo: not copied
    theta = [p for p in learner.parameters() if p.requires_grad]
    check_model(learner, theta, conds, s)
    schedule = copy.deepcopy(schedule or Schedule(std=s.action_std)).to(conds.device)
    optimizer = torch.optim.Adam([{"params": theta}, {"params": list(schedule.parameters())}])
    return learner, schedule, model, optimizer


def check_model(model, theta, conds, s):
    """Refuse a model whose logits differ for two equal rows, or do not reach its weights."""
    try:
        if conds.dim() == 1 and model.null_cond in conds.tolist():
            raise UserError(f"conds: {model.null_cond} is the null condition")
        cond = torch.cat([conds[[0]], conds[:s.groups]])  # the first twice
        tokens = torch.full((len(cond), model.seq_len), model.mask_id, device=conds.device)
        l_c, l_u = cond_uncond(model, tokens, cond)
        logits = guided_logits(l_c, l_u, l_c.new_ones(len(cond)))
    except (AttributeError, LookupError, RuntimeError, TypeError, AssertionError) as error:
        raise UserError(f"model: {error}; are conds, seq_len, mask_id, null_cond right?") from error
    if not torch.allclose(logits[0], logits[1], 1e-3, 1e-3):
        raise UserError("model: its logits are NaN, or differ for equal rows: dropout?")
    if logits.requires_grad:  # do gradients reach the weights?
        logits.sum().backward()
    if s.optimize != "schedule" and all(p.grad is None for p in theta):
        raise UserError("model: no gradients: frozen, detached, or another model's weights?")


def iterate(i, state, reward_fn, conds, s):
    """Iteration i, on a state of `prepare`. Returns metrics, and rollouts as in `update`."""
    if i >= s.iters:
        raise UserError(f"iteration {i}: the last one is {s.iters - 1}")
    learner, schedule, reference, optimizer = state
    learner.eval()
    reference.eval()
    torch.manual_seed(10 ** 6 * s.seed + i)  # to resume
    for group, lr in zip(optimizer.param_groups, (s.lr, s.schedule_lr)):
        group["lr"] = lr * (1 - i / s.iters)
    which, batch = s.optimize, i
    if s.optimize == "alternate":  # in turns, on the same conditions
        which, batch = ("model", "schedule")[i % 2], i // 2
    picked = (torch.arange(s.groups) + batch * s.groups) % len(conds)
    rollouts, rewards = [], []
    for c in conds[picked].split(s.micro_groups or s.groups):
        cond = c.detach().repeat_interleave(s.group_size, 0)  # [B, ...]
        tokens, trajectory = rollout(learner, schedule, cond, s.steps)
        reward = evaluate(reward_fn, tokens, cond)
        rollouts.append((tokens, trajectory, cond, group_advantage(reward, s.group_size)))
        rewards.append(reward)
    metrics = update(learner, schedule, reference, optimizer, rollouts, s, which)
    reward = torch.cat(rewards).view(-1, s.group_size)
    metrics["iter"], metrics["reward"] = i, reward.mean()
    metrics["group_std"] = reward.std(1).mean()
    metrics["groups_equal"] = (reward.amax(1) == reward.amin(1)).to(reward).mean()
    metrics = {name: float(x) for name, x in metrics.items()}
    if not all(map(math.isfinite, metrics.values())):
        raise UserError(f"iteration {i}: NaN or infinity; lower lr, schedule_lr, beta? std?")
    return metrics, rollouts


def train(model, reward_fn, conds, settings=Settings(), *, on_iteration=None, schedule=None):
    """Co-GRPO: `settings.iters` iterations from a pretrained model.

    model(tokens int64 [B, L], cond [B, ...]) -> logits [B, L, V], with seq_len,
    mask_id and null_cond (None: no guidance). It is not changed, only put in eval mode.
    reward_fn(tokens int64 [B, L], cond [B, ...]) -> B numbers.
    conds [C, ...]: the conditions of the groups, in turn, on the model's device.
    on_iteration(metrics, learner, schedule, rollouts): called after each. schedule: see `prepare`.
    Returns (learner, schedule, log), log a list of metrics.
    """
    conds = torch.as_tensor(conds)
    state = prepare(model, conds, settings, schedule)
    learner, schedule, _, _ = state
    log = []
    bar = tqdm(range(settings.iters), "Co-GRPO", disable=None)
    for i in bar:
        metrics, rollouts = iterate(i, state, reward_fn, conds, settings)
        if on_iteration:
            on_iteration(metrics, learner, schedule, rollouts)
        log.append(metrics)
        bar.set_postfix(reward=f"{metrics['reward']:.2f}")
    return learner, schedule, log


# ------------ main: toy digits (toy: toy_reward.py)
def parse(argv):
    """The command line -> (arguments, Settings)."""
    parser = argparse.ArgumentParser(
        usage="cogrpo.py [flags], --help", formatter_class=argparse.RawTextHelpFormatter,
        epilog="train again:     cogrpo.py --load out/base.pt --lr 1e-3 --out lr\n"
               "measure, T = 8:  cogrpo.py --load out/cogrpo.pt --iters 0 --steps 8 --out T8")
    toy = parser.add_argument_group("toy and files")
    source = toy.add_mutually_exclusive_group()
    source.add_argument("--data", metavar="DIR", help="MNIST's folder, or: drawn")
    source.add_argument("--load", metavar="FILE", help="trains its base model, to out-load")
    toy.add_argument("--out", metavar="DIR", default="out", type=Path, help="default: out")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    toy.add_argument("--device", choices=devices, default=devices[0])
    toy.add_argument("--quick", action="store_true", help="a small world, to out-quick")
    method = parser.add_argument_group("Co-GRPO")
    for f in fields(Settings):
        method.add_argument("--" + f.name.replace("_", "-"), type=f.type, default=f.default,
                            metavar="", help=f"{f.metadata['help']} ({f.default})")
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(iters=10, out="out-quick")
    if args.load:
        parser.set_defaults(out="out-load")
    args = parser.parse_args(argv)  # again
    return args, Settings(**{f.name: getattr(args, f.name) for f in fields(Settings)})


def make_base(toy, data, size, seed, device):
    """A toy world (codebook, classifiers, test digits), and a model pretrained on its digits."""
    train_set, test_set, source = toy.load_digits(data, size, seed)
    print(source, flush=True)
    torch.manual_seed(seed)
    world, tokens, labels = toy.build_world(train_set, test_set, size, device)
    base = MDM(toy.SEQ_LEN, size.codebook_size, toy.CLASSES, size.dim, size.depth).to(device)
    pretrain(base, tokens, labels, size.pretrain_steps, size.pretrain_batch)
    return world, base


def save(toy, path, world, base, model, schedule):
    """Write a whole file or none."""
    saved = {"size": asdict(world.size), "world": world.state_dict(), "base": base.state_dict(),
             "model": model.state_dict(), "schedule": schedule.state_dict()}
    toy.save_whole(path, lambda temporary: torch.save(saved, temporary))


def load(toy, path, device):
    """(world, base, model, schedule) of a saved file. Training needs base alone."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        size, state = toy.Size(**saved["size"]), saved["world"]
        world = toy.World(size, state["codebook"], state["test_tokens"], state["test_labels"])
        base = MDM(toy.SEQ_LEN, size.codebook_size, toy.CLASSES, size.dim, size.depth).to(device)
        modules = world, base, copy.deepcopy(base), Schedule().to(device)
        for module, name in zip(modules, ("world", "base", "model", "schedule")):
            module.load_state_dict(saved[name])
        return modules
    except Exception:  # torch.load fails in many ways
        why = "another file, or damaged" if os.path.isfile(path) else "no file"
        raise UserError(f"--load {path}: {why}; give base.pt, cogrpo.pt, unfinished.pt") from None


def report(toy, out, world, base, model, schedule, s):
    """Measure before and after: the table, results.csv and the pictures."""
    T, device = s.steps, world.codebook.device
    by_hand = Schedule().to(device)
    cond = torch.arange(world.size.eval_samples, device=device) % toy.CLASSES
    arms = [("hand-made T=32", base, by_hand, 32), (f"hand-made T={T}", base, by_hand, T),
            (f"{s.optimize if s.iters else 'loaded'} T={T}", model, schedule, T)]
    rows, films = [], []
    for name, m, p, steps in arms:
        torch.manual_seed(s.seed)
        batches = tqdm(cond.split(50), f"measuring {name}", disable=None)
        results = [rollout(m, p, c, steps, explore=False) for c in batches]
        tokens = torch.cat([tokens for tokens, _ in results])
        rows.append(world.measure(tokens, cond, name, passes=2 * steps))
        first_tokens, trajectory = results[0]
        films.append((name, [step.canvas for step in trajectory] + [first_tokens]))
    rows.append(world.measure_real())
    toy.write_csv(out / "results.csv", rows)
    toy.draw_samples(out / "samples.png", films, world)
    toy.draw_decoding(out / "decoding.gif", films[1:], world)
    before = torch.tensor([hand_made(t, T) for t in range(T)])  # [T, 4]
    after = torch.stack([constrain(step.action) for step in trajectory])  # [T, 50, 4]
    toy.draw_schedule(out / "schedule.png", before, after.cpu())
    print(f"\n{toy.table(rows)}\n\nFrechet: less is better; passes: two a step, with and without c"
          "\n\nr, tau_s, tau_r, w, hand-made -> learned:")
    for t, (old, new) in enumerate(zip(before.tolist(), after.mean(1).tolist())):
        print(f"t = {t}:", ",  ".join(f"{a:.2f} -> {b:.2f}" for a, b in zip(old, new)))


def run(toy, args, s):
    out, device, start = args.out, args.device, time.time()
    toy.make_folder(out)
    if args.load is None:
        print(f"to {out}/: 1. pretraining, 2. Co-GRPO, 3. measuring:", "half a minute"
              if args.quick else "five minutes on two cores, eight on one", flush=True)
        size = toy.QUICK if args.quick else toy.Size()
        world, base = make_base(toy, args.data, size, s.seed, device)
        model, schedule = base, Schedule().to(device)
        save(toy, out / "base.pt", world, base, model, schedule)
    else:
        world, base, model, schedule = load(toy, args.load, device)

    def on_iteration(metrics, learner, schedule, rollouts):
        p = torch.cat([world.held_out(tokens, cond) for tokens, _, cond, _ in rollouts])
        metrics["held_out"] = float(p.mean())
        if metrics["iter"] % 10 == 0 or metrics["iter"] == s.iters - 1:
            save(toy, out / "unfinished.pt", world, base, learner, schedule)
    if s.iters > 0:
        print(f"2. Co-GRPO from the base model, after {time.time() - start:.0f} s", flush=True)
        conds = torch.arange(toy.CLASSES, device=device)
        model, schedule, log = train(base, world.reward, conds, s, on_iteration=on_iteration)
        if (out / "cogrpo.pt").exists():
            os.replace(out / "cogrpo.pt", out / "cogrpo.pt.old")
        os.replace(out / "unfinished.pt", out / "cogrpo.pt")
        toy.write_csv(out / "log.csv", log)
        toy.draw_curves(out / "curves.png", log)
    print(f"3. measuring, after {time.time() - start:.0f} s", flush=True)
    report(toy, out, world, base, model, schedule, s)
    if world.size == toy.QUICK:
        print("\nThe figures of a small world mean nothing.")
    print(f"\nsee samples.png and decoding.gif in {out}/, after {time.time() - start:.0f} s")


def main(argv=None):
    import toy_reward as toy  # the method does not need it
    args = None
    try:
        args, s = parse(argv)
        run(toy, args, s)
    except KeyboardInterrupt:
        print("\nstopped; files:", *sorted(args.out.glob("*.pt")) if args else "", file=sys.stderr)
        sys.exit(130)
    except (UserError, toy.UserError) as error:
        print(f"cogrpo.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
