"""Pretraining: what is masked, what is learned, and under which conditions."""
import math

import pytest
import torch
import torch.nn as nn

import cogrpo
from cogrpo import MDM

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
    """With p = cos(pi U / 2) for each row, any position alike; what is not masked is the data."""
    torch.manual_seed(0)
    model, data = Recorder(null_cond=300), torch.randint(4, (300, 10))
    cogrpo.pretrain(model, data, torch.arange(300), steps=200, batch=64, drop=0.0)
    tokens = torch.cat([tokens for tokens, _ in model.shown])
    row = torch.cat([cond for _, cond in model.shown])  # the condition says which row it was
    masked = tokens == model.mask_id
    assert torch.equal(tokens[~masked], data[row][~masked])
    count = torch.bincount(masked.sum(1), minlength=11) / len(masked)
    p = torch.cos((torch.arange(4000) + 0.5) / 4000 * math.pi / 2)[:, None]
    k = torch.arange(11)
    law = torch.distributions.Binomial(10, p).log_prob(k.float()).exp().mean(0)
    assert (count - law).abs().max() < 0.015
    assert (masked.float().mean(0) - 2 / math.pi).abs().max() < 0.02
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
    for vocab, rows in ((5, 8), (4, 7)):  # 4 is mask_id
        tokens, cond = torch.arange(80).view(8, 10) % vocab, torch.zeros(rows)
        with pytest.raises(cogrpo.UserError, match="mask_id 4, or with unequal rows"):
            cogrpo.pretrain(Recorder(), tokens, cond, steps=1)


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

    The learning rate falls to 0.
    """
    torch.manual_seed(0)
    model, cond = MDM(6, 3, 3, dim=32, depth=1), torch.arange(300) % 3
    rates = []
    model.register_forward_pre_hook(lambda *_: rates.append(model.head.weight.detach().clone()))
    loss = cogrpo.pretrain(model, cond[:, None].repeat(1, 6), cond, steps=300, batch=64, lr=1e-2)
    assert loss < 0.3
    moves = [float((a - b).abs().max()) for a, b in zip(rates, rates[1:])]
    assert max(moves[-5:]) < 0.02 * max(moves)
    canvas = torch.full((3, 6), model.mask_id)
    assert model(canvas, torch.arange(3)).softmax(2)[range(3), 0, range(3)].min() > 0.9
    null = model(canvas, torch.full((3,), model.null_cond)).softmax(2)
    assert (null - 1 / 3).abs().max() < 0.25  # dropped conditions were trained, too
