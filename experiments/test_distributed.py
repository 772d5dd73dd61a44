"""Several processes do the work of one: same weights on all, disjoint work, averaged gradients."""
import copy

import pytest
import torch
import torch.nn as nn

from cogrpo import Settings, UserError
from experiments import distributed
from test_cogrpo import a_model, likes_large, weights


class Experts(nn.Module):
    """An MDM with a part that only condition 0 uses: other processes have no gradient for it."""

    def __init__(self):
        super().__init__()
        self.body = a_model(dtype=torch.float32).cpu()
        self.extra = nn.Parameter(torch.zeros(5))
        self.seq_len, self.mask_id, self.null_cond = 6, 5, None

    def forward(self, tokens, cond):
        logits = self.body(tokens, cond)
        return logits + self.extra if (cond == 0).all() else logits


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                                         world_size=2)
    with pytest.raises(UserError, match="must be a multiple"):
        distributed.train(a_model().cpu(), likes_large, torch.arange(4), Settings(groups=3))
    # other weights in each process, one a column slice, and an expanded buffer: rank 0's count
    model = a_model(num_conds=4, seed=rank).cpu()
    wide = torch.randn(16, 8, dtype=torch.float64)
    model.head.weight = nn.Parameter(wide.T[:5])
    model.register_buffer("noise", torch.full((1,), float(rank)).expand(3))
    first = copy.deepcopy(model)
    seen, conds = [], []

    def reward(tokens, cond):
        seen.append(tokens)
        conds.append(cond.tolist())
        return likes_large(tokens, cond)
    s = Settings(iters=3, groups=4, group_size=4, steps=2)
    learner, schedule, log = distributed.train(model, reward, torch.arange(4), s)
    experts, _, _ = distributed.train(Experts(), likes_large, torch.arange(2), s)
    torch.save({"weights": [weights(learner), weights(schedule), weights(experts)],
                "start": weights(model), "first": weights(first), "noise": model.noise.clone(),
                "extra": experts.extra.detach(), "seen": seen, "conds": conds},
               f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_end_with_equal_weights_from_disjoint_work(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    a, b = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert all(torch.equal(x, y) for x, y in zip(a["weights"], b["weights"]))
    assert torch.equal(b["start"], a["first"]) and not torch.equal(b["start"], b["first"])
    assert a["noise"].tolist() == b["noise"].tolist() == [0, 0, 0]
    assert not torch.equal(a["weights"][0], a["start"])
    assert sorted({*a["conds"][0]}) == [0, 2] and sorted({*b["conds"][0]}) == [1, 3]
    assert not torch.equal(a["seen"][0], b["seen"][0])
    assert a["extra"].abs().max() > 0  # rank 1 had no gradient for it, which counted as 0


def test_a_gradient_is_the_mean_over_the_processes(monkeypatch):
    """Two processes, the other of which has gradients of 3, and none for the second parameter."""
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = torch.ones(2), torch.ones(2)
    optimizer = torch.optim.SGD(parameters, 1.0)
    calls = iter([torch.tensor([1.0, 0.0, 0.0]), torch.full((2,), 3.0), torch.zeros(2)])
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda x: x.add_(next(calls)))
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    distributed.average_gradients(optimizer, (), {})
    assert parameters[0].grad.tolist() == [2, 2] and parameters[1].grad.tolist() == [0.5, 0.5]
    assert parameters[2].grad is None
