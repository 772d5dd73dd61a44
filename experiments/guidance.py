"""What did the model learn: the logits under the condition, l_c, or those without it, l_u?

    python -m experiments.guidance out/cogrpo.pt      a table

Guidance samples from l_c + w (l_c - l_u). The KL holds l_c to the pretrained model, and nothing
holds l_u. Here either half is put back to the pretrained one, under the learned schedule.
"""
import argparse

import torch
import torch.nn as nn

import cogrpo
import toy_reward as toy
from experiments.ablation import measure


class Halves(nn.Module):
    """A model whose l_c is that of one model, and whose l_u is that of another."""

    def __init__(self, conditional, unconditional):
        super().__init__()
        self.conditional, self.unconditional = conditional, unconditional
        self.seq_len, self.mask_id = conditional.seq_len, conditional.mask_id
        self.null_cond = conditional.null_cond

    def forward(self, tokens, cond):
        null = (cond == self.null_cond)[:, None, None]
        return torch.where(null, self.unconditional(tokens, cond), self.conditional(tokens, cond))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trained", help="a cogrpo.pt of cogrpo.py")
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args(argv)
    world, base, model, schedule = cogrpo.load(toy, args.trained, torch.device("cpu"))
    print("|l_c|l_u|" + "|".join(toy.FIGURES) + "|\n|---|---" + "|---" * len(toy.FIGURES) + "|")
    for name, halves in (("learned|learned", Halves(model, model)),
                         ("pretrained|learned", Halves(base, model)),
                         ("learned|pretrained", Halves(model, base)),
                         ("pretrained|pretrained", Halves(base, base))):
        row = measure(world, halves.eval(), schedule, 4, args.samples, seed=0)
        print(f"|{name}|" + "|".join(f"{row[figure]:.3f}" for figure in toy.FIGURES) + "|")


if __name__ == "__main__":
    main()
