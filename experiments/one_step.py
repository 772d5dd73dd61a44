"""One real step with numbers, and as a picture: what is drawn, what is kept, what is scored.

    python -m experiments.one_step out/base.pt      prints a table, draws one_step.png

out/base.pt is what `python cogrpo.py` leaves. It is step t = 1 of T = 4, of condition 3 and seed 0.
"""
import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import cogrpo
import toy_reward as toy
from cogrpo import constrain, rollout

CARD, SCORED, LINE = (247, 247, 244), (214, 110, 20), (120, 120, 120)


def the_step(path, t=1, T=4, c=3):
    """(world, that step of one sample, its log-probabilities [L] at temperature 1, next canvas)."""
    world, base, _, schedule = cogrpo.load(toy, path, torch.device("cpu"))
    cond = torch.tensor([c])
    torch.manual_seed(0)
    tokens, trajectory = rollout(base.eval(), schedule, cond, T)
    step = trajectory[t]
    with torch.no_grad():
        l_c, l_u = cogrpo.cond_uncond(base, step.canvas, cond)
    logits = cogrpo.guided_logits(l_c, l_u, constrain(step.action)[:, 3])
    log_p = logits.log_softmax(2).gather(2, step.candidate[:, :, None])[0, :, 0]
    return world, step, log_p, torch.where(step.filled, step.candidate, step.canvas)


def ranks(step):
    """(rank from 1, position) of four: the first, the last kept, the next, the last."""
    order = step.confidence[0].argsort(descending=True).tolist()
    kept, masked = int(step.filled.sum()), int(step.masked.sum())
    return [(rank, order[rank - 1]) for rank in (1, kept, kept + 1, masked)]


def table(step, log_p):
    """The four of `ranks`, a line each."""
    lines = ["|rank|ranking log p|+ tau_r * noise|= confidence|kept|", "|---" * 5 + "|"]
    for rank, i in ranks(step):
        confidence = round(float(step.confidence[0, i]), 2)
        noise = confidence - round(float(log_p[i]), 2)
        yes = "yes" if step.filled[0, i] else "no"
        lines.append(f"|{rank}|{log_p[i]:.2f}|{noise:+.2f}|{confidence:.2f}|{yes}|")
    return lines


# ------------------------------------------------------------------ the picture

def corners(where, scale):
    """[left, top, right, bottom] of the tokens `where` [49], in pixels."""
    side = 4 * scale
    for i in where.nonzero()[:, 0].tolist():
        x, y = i % 7 * side, i // 7 * side
        yield [x, y, x + side - 1, y + side - 1]


def dice(draw, x, y):
    """Where something is drawn at random."""
    draw.rounded_rectangle([x, y, x + 22, y + 22], 5, "white", LINE, 2)
    for px, py in ((6, 6), (11, 11), (16, 16)):
        draw.ellipse([x + px - 2, y + py - 2, x + px + 2, y + py + 2], LINE)


def outlined(picture, where, scale, color):
    """Frames around the tokens `where` [49]."""
    for box in corners(where, scale):
        ImageDraw.Draw(picture).rectangle(box, outline=color, width=2)
    return picture


def shades(values, where, scale):
    """values [49] as greys, where they count; crossed out elsewhere."""
    low, high = values[where].min(), values[where].max()
    grey = torch.where(where, 0.15 + 0.75 * (values - low) / (high - low), 1.0)
    page = Image.fromarray((grey.view(7, 7) * 255).byte().numpy()).convert("RGB")
    page = page.resize((28 * scale, 28 * scale), Image.Resampling.NEAREST)
    for box in corners(~where, scale):
        ImageDraw.Draw(page).line(box, LINE, 1)
    return page


def draw_step(path, world, step, after, scale=6):
    """canvas -> schedule -> draw -> rank -> canvas, from left to right."""
    masked, filled = step.masked[0], step.filled[0]
    before, drawn, then = [toy.canvas_picture(x, world.codebook, 1, scale) for x in (
        step.canvas, torch.where(step.masked, step.candidate, step.canvas), after)]
    ranked = shades(step.confidence[0], masked, scale)
    for rank, i in ranks(step):  # 4 * scale is the side of a token
        middle = (i % 7 + 0.5) * 4 * scale, (i // 7 + 0.5) * 4 * scale
        color = "white" if rank == masked.sum() else toy.INK
        toy.write_text(ImageDraw.Draw(ranked), middle, str(rank), 14, color, "mm")
    boxes = [("canvas x_t", before, "blue: [MASK]"), ("schedule p_phi", None, "a_t is scored"),
             ("candidates", drawn, "drawn from p_theta"),
             ("ranked", outlined(ranked, filled, scale, toy.INK),
              "rank by log p + tau_r * noise\nframed: kept   struck: not masked"),
             ("next canvas", outlined(then, filled, scale, SCORED), "filled tokens are scored")]
    w = 28 * scale + 56
    page = Image.new("RGB", (len(boxes) * w + 30, 28 * scale + 110), CARD)
    draw = ImageDraw.Draw(page)
    for k, (title, picture, caption) in enumerate(boxes):
        x, y = 30 + k * w, 50
        toy.write_text(draw, (x, 18), title, 16)
        toy.write_text(draw, (x, y + 28 * scale + 12), caption, 12,
                       SCORED if "scored" in caption else toy.INK)
        if picture:
            page.paste(picture, (x, y))
        else:
            draw.rounded_rectangle([x, y, x + 28 * scale, y + 28 * scale], 10, "white", SCORED, 3)
            values = constrain(step.action)[0].tolist()
            for j, (name, value) in enumerate(zip(("r", "tau_s", "tau_r", "w"), values)):
                toy.write_text(draw, (x + 32, y + 26 + 32 * j), f"{name} = {value:.3f}", 18)
        if k < len(boxes) - 1:
            arrow = x + 28 * scale + 6, y + 16 * scale
            draw.line([*arrow, arrow[0] + 34, arrow[1]], LINE, 3)
            draw.polygon([(arrow[0] + 38, arrow[1]), (arrow[0] + 28, arrow[1] - 6),
                          (arrow[0] + 28, arrow[1] + 6)], LINE)
        if k in (1, 2, 3):
            dice(draw, x + 28 * scale - 24, 18)
    toy.save_whole(path, page.save)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="a base.pt of cogrpo.py")
    parser.add_argument("--out", default="one_step.png", help="where the picture goes")
    args = parser.parse_args(argv)
    world, step, log_p, after = the_step(args.base)
    left = [int(cogrpo.hand_made(t, 4)[0] * 49 + 1e-3) for t in range(4)]
    print(f"masked after each step, by hand, of 49: {left}")
    print("a_t: " + ", ".join(f"{name} = {x:.3f}" for name, x in zip(
        ("r", "tau_s", "tau_r", "w"), constrain(step.action)[0].tolist())))
    print("\n".join(table(step, log_p)))
    draw_step(Path(args.out), world, step, after)


if __name__ == "__main__":
    main()
