"""A user's model, reward and conditions: what works, and what is refused."""
import copy
import math
import random

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

import cogrpo
from cogrpo import (MDM, Schedule, Settings, UserError, constrain, iterate, prepare, rollout,
                    sample, train)
from test_cogrpo import (DEVICE, a_model, a_schedule, conds, flat, likes_large, trained, weights)

# ------------------------------------------------------------------ anyone's model

class BanningHead(nn.Module):
    """A model with [MASK] inside its vocabulary, as a BERT has, and a token that it bans."""

    def __init__(self, mask_logit, ban=None):
        super().__init__()
        self.body = MDM(6, 6, 3, dim=16, depth=1, heads=2)
        self.seq_len, self.mask_id, self.null_cond = 6, 5, 3
        self.mask_logit, self.ban = mask_logit, ban

    def forward(self, tokens, cond):
        logits = self.body(tokens, cond).clone()
        logits[:, :, self.mask_id] = self.mask_logit
        if self.ban is not None:
            logits[:, :, self.ban] = -math.inf
        return logits


@pytest.mark.parametrize("mask_logit", [3.0, -math.inf])
def test_mask_and_banned_tokens_are_never_drawn(mask_logit):
    """Whatever logit [MASK] has, it is no token. -inf bans any other, and all stays finite."""
    for null in (3, None):
        torch.manual_seed(0)
        model = BanningHead(mask_logit, ban=2)
        model.null_cond = null
        better, schedule, log = train(model, lambda x, c: (x == 0).float().mean(1),
                                      conds(3).cpu(), Settings(iters=3, steps=3, groups=3))
        tokens = sample(better, schedule, conds(300).cpu(), 3)
        assert (tokens != 5).all() and (tokens != 2).all() and weights(better).isfinite().all()
        assert log[-1]["kl_model"] > 0
    cogrpo.pretrain(model, torch.randint(2, (100, 6)), torch.zeros(100).long(), steps=5, batch=8)
    assert weights(model).isfinite().all()


@pytest.mark.parametrize("side", [0, 1])
def test_what_is_banned_on_one_side_of_guidance_is_banned(side):
    """l_c + w (l_c - l_u) is huge where l_u alone is -inf: the token would always be drawn."""
    class OneSided(BanningHead):
        def forward(self, tokens, cond):
            banned = torch.arange(6) == 2
            rows = (cond == self.null_cond) == bool(side)  # side 1: the null condition's rows
            return super().forward(tokens, cond).masked_fill(
                rows[:, None, None] & banned, -math.inf)
    torch.manual_seed(0)
    tokens = sample(OneSided(0.0).eval(), Schedule(), conds(300).cpu(), 3)
    assert (tokens != 2).all() and len(tokens.unique()) == 4


class Prompted(nn.Module):
    """Its conditions are prompts: int64 [B, P] tokens or float [B, P] embeddings."""

    def __init__(self, null_cond):
        super().__init__()
        self.body = MDM(6, 5, 1, dim=16, depth=1, heads=2)
        self.read = nn.Linear(4, 5)
        self.seq_len, self.mask_id, self.null_cond = 6, 5, null_cond

    def forward(self, tokens, cond):
        assert cond.shape == (len(tokens), 4)
        hint = self.read(cond.float())[:, None]
        return self.body(tokens, torch.zeros_like(tokens[:, 0])) + hint


@pytest.mark.parametrize("cond, null", [
    (torch.arange(12).view(3, 4), 5), (torch.rand(3, 4), torch.zeros(4)), (torch.rand(3, 4), None),
    (torch.rand(3, 4, requires_grad=True) * 2, torch.zeros(4).double())])
def test_conditions_may_be_prompts_or_embeddings(cond, null):
    """Also those of an encoder, which carry its graph, and a null condition of another dtype."""
    torch.manual_seed(0)
    model, seen = Prompted(null), []

    def reward(tokens, c):
        seen.append(c)
        return (tokens == 1).float().mean(1)
    cogrpo.pretrain(model, torch.randint(5, (3, 6)), cond.detach(), steps=3, batch=8)
    better, schedule, _ = train(model, reward, cond, Settings(iters=2, steps=2, groups=3,
                                                              group_size=4, micro_groups=1))
    assert torch.equal(torch.cat(seen[:3]), cond.repeat_interleave(4, 0))
    assert sample(better, schedule, cond, 2).shape == (3, 6)


def test_guidance_is_zero_on_a_null_condition():
    """l_u comes from the null condition of every row: where cond is null already, l_c = l_u."""
    model = a_model()
    l_c, l_u = cogrpo.cond_uncond(model, torch.full((4, 6), 5, device=DEVICE), conds(4) * 0 + 3)
    assert torch.allclose(l_c, l_u, atol=1e-12)
    assert cogrpo.guided_logits(l_c, None, None) is l_c


def test_no_dropout_in_training_whatever_a_hook_does():
    """Eval mode, in every iteration: else what is scored is not what was drawn."""
    model = a_model()
    model.blocks = nn.Sequential(model.blocks, nn.Dropout(0.5))
    modes = []
    model.head.register_forward_hook(lambda module, *_: modes.append(module.training))
    better, _, log = trained(model.train(), hook=lambda metrics, m, p, r: m.train(), iters=2)
    assert not any(modes) and abs(log[0]["kl_model"]) < 1e-9


def test_frozen_parameters_stay_and_are_shared():
    """A frozen backbone is in memory once, also in the copy that is trained (LoRA)."""
    model = a_model()
    model.token.requires_grad_(False)
    before = model.token.weight.clone()
    better, _, _ = trained(model)
    assert better.token.weight is model.token.weight and torch.equal(before, model.token.weight)
    assert not torch.equal(better.position, model.position)
    assert better.position is not model.position


def test_a_frozen_model_or_one_without_parameters_can_have_its_schedule_trained():
    frozen, start = a_model().requires_grad_(False), a_schedule()
    _, schedule, log = trained(frozen, start=start, optimize="schedule")
    assert not torch.equal(weights(schedule), weights(start)) and log[0]["grad_model"] == 0

    class Fixed(nn.Module):
        seq_len, mask_id, null_cond = 6, 5, None

        def forward(self, tokens, cond):
            return torch.linspace(0, 1, 5, device=tokens.device).expand(*tokens.shape, 5)
    _, schedule, _ = trained(Fixed(), optimize="schedule", start=a_schedule(dtype=torch.float32))
    assert weights(schedule).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_type_runs(dtype):
    """The logits are scored in float32 at least, and any schedule fits any model."""
    optimize = "schedule" if dtype == torch.float16 else "joint"  # Adam cannot do float16 weights
    model = a_model(dtype=dtype, sharp=1.0)
    better, schedule, _ = trained(model, iters=2, optimize=optimize,
                                  reward=lambda x, c: (x == 0).to(dtype).mean(1))
    assert weights(better).isfinite().all()
    assert next(schedule.parameters()).dtype == torch.float32
    assert sample(model, Schedule().to(DEVICE), conds(4), 2).shape == (4, 6)


def test_a_default_dtype_of_low_precision_does_not_reach_the_schedule():
    torch.set_default_dtype(torch.bfloat16)
    try:
        schedule = Schedule()
        tokens = sample(a_model(dtype=torch.bfloat16), schedule.to(DEVICE), conds(4), 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert next(schedule.parameters()).dtype == torch.float32 and (tokens < 5).all()


def test_rewards_may_be_any_sequence_of_numbers_on_any_device():
    """They are float32 where the conditions are, and carry no graph."""
    cond = torch.zeros(3, dtype=torch.long, device=DEVICE)
    for reward in ([1, 0, 2], (1.0, 0.0, 2.0), torch.tensor([1, 0, 2]),
                   torch.tensor([1.0, 0.0, 2.0], dtype=torch.bfloat16, requires_grad=True),
                   torch.tensor([1.0, 0.0, 2.0]).numpy()):
        R = cogrpo.evaluate(lambda x, c: reward, cond[:, None], cond)
        assert R.tolist() == [1, 0, 2] and R.dtype == torch.float32 and not R.requires_grad
        assert R.device == cond.device


def test_all_tensors_are_made_on_the_models_device():
    """Rollout and losses on the device without memory: shapes and devices only.

    A tensor made on the CPU by mistake cannot meet the model's.
    """
    s = Settings()
    with torch.device("meta"):
        model, schedule = MDM(6, 5, 3, dim=16, depth=1, heads=2).eval(), Schedule()
        cond = torch.zeros(6, dtype=torch.long)
    tokens, trajectory = rollout(model, schedule, cond, 3)
    advantage = cogrpo.group_advantage(torch.ones(6, device="meta"), 3)
    for step in trajectory:
        losses = [*cogrpo.model_loss(model, model, step, cond, advantage, s),
                  *cogrpo.schedule_loss(schedule, step, advantage, s)]
        assert {x.device.type for x in (tokens, *losses)} == {"meta"}


@pytest.mark.parametrize("guided", [True, False])
def test_another_domain_learns_through_the_same_seams(guided):
    """Strings of 8 letters: neighbours differ under condition 0 and are equal under 1."""
    def alternating(tokens, cond):
        differ = (tokens[:, 1:] != tokens[:, :-1]).float().mean(1)
        return torch.where(cond == 0, differ, 1 - differ)
    torch.manual_seed(0)
    model = MDM(8, 3, 2, dim=32, depth=1).to(DEVICE)
    model.null_cond = 2 if guided else None
    cogrpo.pretrain(model, torch.randint(3, (2000, 8), device=DEVICE), conds(2000, 2), steps=50)
    test = conds(400, 2)
    before = alternating(sample(model, Schedule().to(DEVICE), test, 2), test).mean()
    settings = Settings(steps=2, iters=60, groups=4, lr=3e-3, beta=0.05)
    better, schedule, log = train(model, alternating, conds(2, 2), settings)
    after = alternating(sample(better, schedule, test, 2), test).mean()
    assert before < 0.6 and after > before + 0.2 and len(log) == 60


# ------------------------------------------------------------------ what would fail in silence

def detached(tokens, cond, body):
    return body(tokens, cond).detach()


def without_grad(tokens, cond, body):
    with torch.no_grad():
        return body(tokens, cond)


def in_inference_mode(tokens, cond, body):
    with torch.inference_mode():
        return body(tokens, cond).clone()


def checkpointed_reentrant(tokens, cond, body):
    """Its only tensor input needs no gradient, so that reentrant checkpointing gives none."""
    return checkpoint(body, tokens, cond, use_reentrant=True)


class Wrapped(nn.Module):
    """A model whose forward is one of the above."""

    def __init__(self, how):
        super().__init__()
        self.body, self.how = a_model(dtype=torch.float32), how
        self.seq_len, self.mask_id, self.null_cond = 6, 5, 3

    def forward(self, tokens, cond):
        return self.how(tokens, cond, self.body)


@pytest.mark.parametrize("how", [detached, without_grad, in_inference_mode, checkpointed_reentrant])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_model_that_cannot_learn_is_refused(how):
    """Each of these runs to the end otherwise, prints rewards, and learns nothing."""
    with pytest.raises(UserError, match="no gradients: frozen"):
        trained(Wrapped(how))
    trained(Wrapped(how), optimize="schedule", iters=1)  # its schedule may learn


def test_a_frozen_model_is_refused_where_it_should_learn():
    for optimize in ("joint", "model", "alternate"):
        with pytest.raises(UserError, match="no gradients: frozen"):
            trained(a_model().requires_grad_(False), optimize=optimize)


def test_a_forward_that_keeps_the_originals_weights_is_refused():
    """deepcopy copies a bound method that was wrapped, but not what it is bound to."""
    model = a_model(dtype=torch.float32)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    with pytest.raises(UserError, match="another model's weights"):
        trained(model)


def test_autocast_around_the_loop_is_refused():
    """Cast weights are cached until the block ends, so that no pass would see an update."""
    model = a_model(dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        with pytest.raises(UserError, match="use it in forward"):
            trained(model)
        with pytest.raises(UserError, match="use it in forward"):
            cogrpo.pretrain(model, torch.zeros(9, 6).long().to(DEVICE), conds(9), steps=1)


def test_models_and_rewards_that_write_into_their_input_change_nothing():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = a_model(guided=False)
            self.seq_len, self.mask_id, self.null_cond = 6, 5, None

        def forward(self, tokens, cond):
            shown, under = tokens.clone(), cond.clone()
            tokens.masked_fill_(tokens == 5, 0)
            cond.zero_()
            return self.body(shown, under)

    def writes(tokens, cond):
        reward = likes_large(tokens, cond) * (1 + cond)
        tokens.zero_()
        cond.zero_()
        return reward
    one = trained(Writes(), reward=writes)
    other = trained(a_model(guided=False), reward=lambda x, c: likes_large(x, c) * (1 + c))
    assert torch.equal(weights(one[0]), weights(other[0]))
    assert torch.equal(weights(one[1]), weights(other[1]))


def test_rewards_run_without_gradients():
    seen = []
    trained(reward=lambda x, c: seen.append(torch.is_grad_enabled()) or likes_large(x, c))
    assert not any(seen)


@pytest.mark.parametrize("values", [
    (4, 1.0, 1.0, 1.0), (0.5, -1.0, 1.0, 1.0), (0.5, 1.0, 1.0, -0.1), (0.5, math.nan, 1.0, 1.0),
    (0.5, 1.0, math.inf, 1.0), (0.5, 1.0, 1.0)])
def test_a_hand_made_schedule_out_of_range_is_refused(values):
    with pytest.raises(UserError, match=r"hand_made\(0, 2\) = .*needs four, r in 0..1"):
        trained(start=Schedule(lambda t, T: values))
    trained(start=Schedule(lambda t, T: (0.0, 0.0, 0.0, 0.0)), iters=1)


def test_a_model_that_is_not_the_same_twice_is_refused():
    """Dropout that ignores eval mode."""
    model = a_model()
    model.head = nn.Sequential(model.head, nn.ReLU())
    model.head[1].forward = lambda x: nn.functional.dropout(x, 0.1, training=True)
    with pytest.raises(UserError, match="equal rows: dropout"):
        trained(model)


def returns(change):
    """A model whose logits are changed on their way out."""
    model = a_model(dtype=torch.float32)
    forward = MDM.forward
    model.__class__ = type("Changed", (MDM,), {
        "forward": lambda self, tokens, cond: change(forward(self, tokens, cond))})
    return model


@pytest.mark.parametrize("change, words", [
    (lambda x: (x,), "one tensor"), (lambda x: x[:, :1], "one tensor"),
    (lambda x: x.transpose(1, 2), "one tensor"), (lambda x: x[0], "one tensor"),
    (lambda x: x * math.nan, "NaN"), (lambda x: x + math.inf, "NaN")])
def test_a_model_that_breaks_the_contract_is_refused(change, words):
    with pytest.raises(UserError, match=words):
        trained(returns(change))


@pytest.mark.filterwarnings("ignore")
def test_ids_out_of_range_and_missing_conditions_are_refused():
    for name in ("mask_id", "null_cond"):
        for value in (99, "none"):
            model = a_model().cpu()
            setattr(model, name, value)
            with pytest.raises(UserError, match="are conds, seq_len, mask_id, null_cond right"):
                train(model, likes_large, torch.arange(3), Settings(iters=1))
    for wrong in ([], [0.0, 1.0], [[0], [1]], [0, 99], torch.arange(0)):
        with pytest.raises(UserError, match="are conds, seq_len, mask_id, null_cond right"):
            train(a_model().cpu(), likes_large, wrong, Settings(iters=1))
    with pytest.raises(UserError, match="conds: 3 is the null condition"):
        train(a_model().cpu(), likes_large, torch.arange(4), Settings(iters=1))


@pytest.mark.parametrize("reward", [
    lambda x, c: torch.zeros(len(x), 1), lambda x, c: torch.full((len(x),), math.nan),
    lambda x, c: [0.0] * (len(x) - 1), lambda x, c: 0.0])
def test_a_reward_that_is_not_one_finite_number_a_sample_is_refused(reward):
    with pytest.raises(UserError, match="reward_fn: needs 12 finite numbers, got"):
        trained(reward=reward)


def test_a_reward_that_is_not_numbers_is_named():
    """A forgotten return, and one that returns more than the reward."""
    with pytest.raises(UserError, match="reward_fn: returned a NoneType, not numbers"):
        trained(reward=lambda x, c: None)
    with pytest.raises(UserError, match="reward_fn: returned a tuple, not numbers"):
        trained(reward=lambda x, c: (likes_large(x, c), {}))


def test_settings_that_cannot_be_are_refused_by_name():
    for name, value in (("steps", 0), ("group_size", 1), ("lr", math.nan), ("optimize", "both"),
                        ("seed", -1), ("action_std", 0.0), ("iters", -1), ("lr", 1e3),
                        ("schedule_lr", math.inf), ("micro_groups", -1), ("steps", 2.5),
                        ("lr", "1")):
        with pytest.raises(ValueError, match=f"{name}='?{value}"):
            Settings(**{name: value})


def test_a_run_that_explodes_says_in_which_iteration():
    """In float16 Adam divides by 0."""
    with pytest.raises(UserError, match="iteration [1-3]: NaN or infinity; lower lr"):
        trained(a_model(dtype=torch.float16))


# ------------------------------------------------------------------ extreme, but legal

class InBf16(nn.Module):
    """A model whose forward runs under autocast."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.seq_len, self.mask_id, self.null_cond = body.seq_len, body.mask_id, body.null_cond

    def forward(self, tokens, cond):
        with torch.autocast(DEVICE, torch.bfloat16):
            return self.body(tokens, cond)


@pytest.mark.parametrize("seed", range(12))
def test_extreme_schedules_and_settings_stay_finite(seed):
    """Temperatures 1e-3 to 1e3, w to 100, r at both ends, T = 1 and L, V = 2, L = 1, bf16.

    What cannot be done ends in a UserError, never in NaN weights or a crash.
    """
    pick = random.Random(seed)
    L, V = pick.choice([1, 2, 9]), pick.choice([2, 7])
    values = (pick.choice([0.0, 1e-9, 0.5, 1.0]), pick.choice([1e-3, 1.0, 1e3]),
              pick.choice([0.0, 1e-3, 1.0, 1e3]), pick.choice([0.0, 1.0, 100.0]))
    dtype = pick.choice([torch.float32, torch.float64])
    model = a_model(L, V, 1, guided=pick.random() < 0.7, seed=seed, dtype=dtype, sharp=30.0)
    if pick.random() < 0.3:
        model = InBf16(model)
    settings = Settings(steps=pick.choice([1, L]), iters=2, groups=2, group_size=3,
                        epochs=pick.choice([1, 2]), optimize=pick.choice(["joint", "alternate"]),
                        seed=seed)
    start = Schedule(lambda t, T: values)
    try:
        better, schedule, log = train(model, lambda x, c: (x == 0).float().mean(1), conds(1, 1),
                                      settings, schedule=start)
    except UserError as error:
        assert "NaN" in str(error)
        return
    assert weights(better).isfinite().all() and weights(schedule).isfinite().all()
    tokens = sample(better, schedule, conds(5, 1), settings.steps)
    assert (0 <= tokens).all() and (tokens < V).all()


def test_seeds_never_share_their_draws():
    """Iteration 5 of seed 0 and iteration 0 of seed 1 are two rollouts."""
    seen = []
    for seed in (0, 1):
        s = Settings(iters=6, seed=seed, steps=2, groups=3, group_size=4)
        state = prepare(a_model(), conds(3), s)
        frozen = [copy.deepcopy(part.state_dict()) for part in state[:2]]
        for i in range(6):
            for part, weights_before in zip(state, frozen):
                part.load_state_dict(weights_before)
            _, rollouts = iterate(i, state, likes_large, conds(3), s)
            seen.append(flat(step.action for step in rollouts[0][1]))
    assert len({tuple(x.tolist()) for x in seen}) == 12


def test_the_last_step_fills_all_even_where_the_model_gives_nan():
    """So that a reward never sees [MASK], and the message about NaN comes, not a crash in it."""
    model = a_model()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    tokens = sample(model, a_schedule(), conds(4), 3)
    assert (tokens < model.mask_id).all()


def test_conditions_may_have_another_dtype_than_the_null_condition():
    model = a_model()
    model.null_cond = torch.tensor([3], device=DEVICE)
    model.cond.register_forward_pre_hook(lambda module, args: args[0].long())
    cogrpo.pretrain(model, torch.zeros(50, 6, dtype=torch.long, device=DEVICE),
                    torch.zeros(50, dtype=torch.int32, device=DEVICE), steps=2)


def test_what_the_schedule_does_can_be_looked_at():
    """constrain(action) of a rollout's steps: r, tau_s, tau_r, w, beside the hand-made ones."""
    _, trajectory = rollout(a_model(), Schedule().to(DEVICE), conds(4), 3, explore=False)
    seen = torch.stack([constrain(step.action) for step in trajectory]).cpu()
    hand_made = torch.tensor([cogrpo.hand_made(t, 3) for t in range(3)])
    assert (seen - hand_made[:, None]).abs().max() < 1e-5
