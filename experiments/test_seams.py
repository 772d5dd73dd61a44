"""Anyone's model, reward and conditions through the seams of cogrpo.py, and several processes."""
import collections
import copy
import itertools
import math
import random

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

import cogrpo
from cogrpo import MDM, Schedule, Settings, rollout, sample, train, update
from test_cogrpo import (DEVICE, a_model, a_schedule, conds, gradients, likes_large, plain, split,
                         trained, weights)

# ------------------------------------------------------------------ anyone's model

class BanningHead(nn.Module):
    """A model with [MASK] inside its vocabulary, as a BERT has, and a token that it bans."""

    def __init__(self, mask_logit, ban=None):
        super().__init__()
        self.body = MDM(6, 6, 3, dim=16, depth=1, heads=2)
        self.seq_len, self.mask_id, self.null_cond = 6, 5, 3
        self.mask_logit, self.ban = mask_logit, ban

    def forward(self, tokens, cond):
        logits = self.body(tokens, cond)
        logits[:, :, self.mask_id] = self.mask_logit
        if self.ban is not None:
            logits[:, :, self.ban] = -math.inf
        return logits


@pytest.mark.parametrize("likelihood", ["fill", "exact"])
@pytest.mark.parametrize("mask_logit", [3.0, -math.inf])
def test_mask_and_banned_tokens_are_never_drawn(mask_logit, likelihood):
    """Whatever logit [MASK] has, it is no token. -inf bans any other, and all stays finite."""
    for null in (3, None):
        torch.manual_seed(0)
        model = BanningHead(mask_logit, ban=2)
        model.null_cond = null
        better, schedule, log = train(model, lambda x, c: (x == 0).float().mean(1),
                                      conds(3).cpu(), Settings(iters=3, steps=3, groups=3,
                                                               likelihood=likelihood))
        tokens = sample(better, schedule, conds(300).cpu(), 3)
        assert (tokens != 5).all() and (tokens != 2).all() and weights(better).isfinite().all()
        assert log[-1]["kl_model"] > 0
    cogrpo.pretrain(model, torch.randint(2, (100, 6)), torch.zeros(100).long(), steps=5, batch=8)
    assert weights(model).isfinite().all()


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
    (torch.arange(12).view(3, 4), 5), (torch.rand(3, 4), torch.zeros(4)), (torch.rand(3, 4), None)])
def test_conditions_may_be_prompts_or_embeddings(cond, null):
    torch.manual_seed(0)
    model, seen = Prompted(null), []

    def reward(tokens, c):
        seen.append(c)
        return (tokens == 1).float().mean(1)
    cogrpo.pretrain(model, torch.randint(5, (3, 6)), cond, steps=3, batch=8)
    better, schedule, _ = train(model, reward, cond, Settings(iters=2, steps=2, groups=3,
                                                              group_size=4, micro_batch=5))
    assert torch.equal(seen[0], cond.repeat_interleave(4, 0))
    assert sample(better, schedule, cond, 2).shape == (3, 6)


def test_guidance_is_zero_on_a_null_condition():
    """l_u comes from the null condition of every row: where cond is null already, l_c = l_u."""
    model = a_model()
    l_c, l_u = cogrpo.branches(model, torch.full((4, 6), 5, device=DEVICE), conds(4) * 0 + 3)
    assert torch.allclose(l_c, l_u, atol=1e-12)
    assert cogrpo.guided_logits(l_c, None, None) is l_c


def test_no_dropout_in_training():
    """Eval mode: with dropout the ratios would not be 1 at the first update."""
    model = a_model()
    model.norm = nn.Sequential(model.norm, nn.Dropout(0.5))
    better, _, log = trained(model.train(), iters=1)
    assert not better.training and not model.training and abs(log[0]["approx_kl_model"]) < 1e-9


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
    _, schedule, log = trained(frozen, start=start, update="schedule")
    assert not torch.equal(weights(schedule), weights(start)) and "grad_model" not in log[0]

    class Fixed(nn.Module):
        seq_len, mask_id, null_cond = 6, 5, None

        def forward(self, tokens, cond):
            return torch.linspace(0, 1, 5, device=tokens.device).expand(*tokens.shape, 5)
    _, schedule, _ = trained(Fixed(), update="schedule", start=a_schedule(dtype=torch.float32))
    assert weights(schedule).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_type_runs(dtype):
    """The logits are scored in float32 at least, and a reward of low precision is no trouble."""
    update = "schedule" if dtype == torch.float16 else "joint"  # Adam cannot do float16 weights
    better, schedule, _ = trained(a_model(dtype=dtype, sharp=1.0), iters=2, update=update,
                                  reward=lambda x, c: (x == 0).to(dtype).mean(1))
    assert weights(better).isfinite().all()
    assert next(schedule.parameters()).dtype == torch.promote_types(dtype, torch.float32)


def test_rewards_may_come_from_another_device():
    """float32 at least, and where the conditions are: here the device without memory."""
    cond = torch.zeros(4, dtype=torch.long, device=DEVICE)
    reward = torch.tensor([1.0, 1.0, 1.0, 1.0078125], dtype=torch.bfloat16)
    checked = cogrpo.check_reward(reward, cond)
    assert checked.device == cond.device and checked.dtype == torch.float32
    wanted = [-0.49, -0.49, -0.49, 1.46]  # the group's std is 0.0039, and 1e-4 is added to it
    assert cogrpo.group_advantage(reward, 4).tolist() == pytest.approx(wanted, abs=0.01)
    with pytest.raises(RuntimeError, match="meta"):  # it was moved, and then cannot be looked at
        cogrpo.check_reward(reward, cond.to("meta"))


@pytest.mark.parametrize("likelihood", ["fill", "exact"])
def test_all_tensors_are_made_on_the_models_device(likelihood):
    """Rollout and losses on CUDA as far as that goes without one: shapes and devices only.

    A tensor made on the CPU by mistake cannot meet the model's.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    s = Settings(likelihood=likelihood)
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            model, schedule = MDM(6, 5, 3, dim=16, depth=1, heads=2), Schedule()
            cond = torch.zeros(6, dtype=torch.long)
        tokens, trajectory = rollout(model, schedule, cond, 3, likelihood=likelihood)
        advantage = cogrpo.group_advantage(torch.ones(6).to(cond.device), 3)
        for t, step in enumerate(trajectory):
            row = collections.defaultdict(float)
            l_c, l_u = cogrpo.branches(model, step.canvas, cond)
            seen = cogrpo.canvas_statistics(l_c.log_softmax(2), step.masked)
            losses = [cogrpo.model_loss(l_c, l_u, l_c, step, advantage, s, row),
                      cogrpo.schedule_loss(schedule, seen, t, 3, step, advantage, s, row)]
            assert {x.device.type for x in (tokens, *losses, *row.values())} == {"cuda"}


def test_devices_that_differ_are_named():
    cond = torch.zeros(2, dtype=torch.long, device="meta")
    with pytest.raises(ValueError, match="the conditions on meta"):
        sample(a_model(), a_schedule(), cond, 2)
    with pytest.raises(ValueError, match="its tokens are on meta"):
        tokens = torch.zeros(9, 6, dtype=torch.long, device="meta")
        cogrpo.logits_of(a_model(), tokens, conds(9))


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
    settings = Settings(steps=2, iters=60, groups=4, lr=3e-3, kl_model=0.05)
    better, schedule, log = train(model, alternating, conds(2, 2), settings)
    after = alternating(sample(better, schedule, test, 2), test).mean()
    assert before < 0.6 and after > before + 0.2 and len(log) == 60


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

    What cannot be done ends in a ValueError that names a flag, never in NaN weights or a crash.
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
                        likelihood=pick.choice(["fill", "exact"]), epochs=pick.choice([1, 2]),
                        update=pick.choice(["joint", "alternate"]), seed=seed)
    start = Schedule(hand_made=lambda t, T: values)
    try:
        better, schedule, log = train(model, lambda x, c: (x == 0).float().mean(1), conds(1, 1),
                                      settings, schedule=start)
    except ValueError as error:
        assert str(error).startswith("--lr")
        return
    assert weights(better).isfinite().all() and weights(schedule).isfinite().all()
    tokens = sample(better, schedule, conds(5, 1), settings.steps)
    assert (0 <= tokens).all() and (tokens < V).all()


# ------------------------------------------------------------------ devices

def test_a_token_of_probability_0_is_never_drawn_also_where_sums_are_rounded(monkeypatch):
    """A GPU sums in blocks, and its cumsum may rise where nothing was added: here by a lot."""
    real = torch.Tensor.cumsum
    leak = torch.tensor([0, 0.0, 0.3, 0.3], device=DEVICE)
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: real(x, dim) + leak)
    logits = torch.tensor([0.0, 1.0, -1e30, 0.0], device=DEVICE).expand(400, 2, 4)
    assert set(cogrpo.draw(logits).flatten().tolist()) == {0, 1, 3}


class Waits(TorchDispatchMode):
    """Collects the operations that make the host wait for a GPU, whatever the device is."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        mask = name in ("index", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1])
        if mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal",
                            "lift_fresh", "is_nonzero"):
            self.seen.append(name)  # item, bool, sizes that depend on data, a list made a tensor
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("likelihood", ["fill", "exact"])
def test_an_iteration_waits_for_the_device_twice(likelihood):
    """A hidden .item() or boolean index would stop a GPU in every step.

    What is waited for: the reward's check, and the numbers of the log.
    """
    s = Settings(steps=3, groups=3, group_size=4, likelihood=likelihood, micro_batch=5)
    model, schedule, reference, _ = cogrpo.prepare(a_model(), s)
    parts = model, schedule, reference, plain(model, schedule)  # Adam has waits of its own
    with Waits() as waits:
        cogrpo.iterate(1, *parts, lambda x, c: (x == 0).float().mean(1), conds(3), s)
    assert waits.seen == ["_local_scalar_dense"]  # tolist, the other one, does not show


# ------------------------------------------------------------------ several processes

def a_batch(rank, ranks):
    """Every process makes the same rollout and updates on its share of the samples."""
    model, schedule = a_model().cpu(), a_schedule().cpu()
    torch.manual_seed(3)
    _, trajectory = rollout(model, schedule, torch.arange(48) % 3, 3)
    parts = split(trajectory, torch.arange(48) % 3, torch.linspace(-2, 1, 48).double(), 48 // ranks)
    s = Settings(steps=3, grad_norm=1e9)
    update(model, schedule, a_model(seed=9).cpu(), plain(model, schedule), [parts[rank]], s)
    return torch.cat(gradients(model, schedule))


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                                         world_size=2)
    gradient = a_batch(rank, 2)
    with pytest.raises(ValueError, match="--groups 3: must be a multiple"):
        train(a_model(), None, torch.arange(3), Settings(groups=3))
    start = a_model(seed=rank).cpu()  # another one in each process: rank 0's counts
    start.register_buffer("noise", torch.full((1,), float(rank)))
    seen = []
    runs = []
    for _ in range(2):
        model, schedule, log = train(
            copy.deepcopy(start), likes_large, torch.arange(4), Settings(iters=3, groups=4,
                                                                         group_size=4, steps=2),
            lambda row, m, p, x, c: seen.append((x, c.tolist())))
        runs.append((weights(model), weights(schedule), [row["reward"] for row in log]))
    torch.save({"gradient": gradient, "seen": seen, "runs": runs, "noise": model.noise,
                "kl": log[0]["kl_model"]}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_do_the_work_of_one(tmp_path):
    """The gradient of all samples; disjoint groups; draws that differ; the same result on both."""
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    a, b = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    wanted = a_batch(0, 1)
    for one in (a, b):
        assert (one["gradient"] - wanted).norm() < 1e-9 * wanted.norm()
        assert torch.equal(one["runs"][0][0], one["runs"][1][0])  # a second run is the same
    for k in (0, 1):
        assert torch.equal(a["runs"][0][k], b["runs"][0][k])
    assert a["runs"][0][2] == b["runs"][0][2]
    assert a["noise"] == b["noise"] == 0 and abs(a["kl"]) < 1e-6
    (tokens_a, cond_a), (tokens_b, cond_b) = a["seen"][0], b["seen"][0]
    assert sorted(set(cond_a)) == [0, 1] and sorted(set(cond_b)) == [2, 3]
    assert not torch.equal(tokens_a, tokens_b)
    mean = torch.cat([likes_large(x, None) for x in (tokens_a, tokens_b)]).mean()
    assert a["runs"][0][2][0] == pytest.approx(float(mean), rel=1e-5)


def test_processes_and_seeds_never_share_their_draws():
    """Rank 0 of seed 1 and rank 1 of seed 0 drew the same rollouts once."""
    seeds = set()
    for seed, i, rank in itertools.product(range(3), range(5), range(2)):
        seen = []
        cogrpo_processes, cogrpo.processes = cogrpo.processes, lambda: (rank, 2)
        manual, torch.manual_seed = torch.manual_seed, lambda x: seen.append(x)
        try:
            cogrpo.iterate(i, None, None, None, None, None, None, Settings(iters=5, seed=seed))
        except AttributeError:
            pass  # there is no optimizer: what we want has happened
        finally:
            cogrpo.processes, torch.manual_seed = cogrpo_processes, manual
        seeds.update(seen)
    assert len(seeds) == 30


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
