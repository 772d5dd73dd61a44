"""The ablation does what its table says; its figures against numbers. And the benchmark runs."""
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import cogrpo
import toy_reward as toy
from cogrpo import Schedule, Settings, cond_uncond, constrain, rollout
from experiments import ablation, benchmark, exact, gradient, guidance, noise
from test_cogrpo import (DEVICE, TINY, a_model, a_schedule, conds, small,  # noqa: F401, a fixture
                         weights)

FIGURES = (*toy.FIGURES, "log_reward", "log_held_out")


class StubWorld:
    """Rewards zeros, and measures nothing but how many calls it had."""
    codebook = torch.zeros(5, 16, device=DEVICE)

    def reward(self, tokens, cond):
        return (tokens == 0).float().mean(1)

    def measure(self, tokens, cond):
        row = dict.fromkeys(FIGURES, float((tokens == 0).float().mean()))
        return {"name": "", "passes": "", **row}


@pytest.fixture
def stubs(small, monkeypatch):  # noqa: F811
    """`train` and `a_base` write down what they are given and train nothing."""
    calls = []

    def a_base(folder, data, size, seed, device):
        calls.append(("world", seed, size))
        return StubWorld(), a_model(num_conds=10, seed=seed, dtype=torch.float32)

    def train(base, reward_fn, given, s, schedule=None):
        is_exact = cogrpo.update is not exact.original_update
        calls.append(("train", s, base, schedule, given.tolist(), is_exact))
        return base, a_schedule(dtype=torch.float32), []
    monkeypatch.setattr(ablation, "a_base", a_base)
    monkeypatch.setattr(ablation, "train", train)
    monkeypatch.setattr(ablation, "EVERY_T", (2, 4))
    monkeypatch.setattr(ablation, "COLDER", (0.5,))
    monkeypatch.setattr(ablation, "draw_quality", lambda *_: None)
    monkeypatch.setattr(ablation, "draw_frontier", lambda *_: None)
    return calls


def test_each_arm_has_its_settings_and_its_start(stubs):
    """The same pretrained model and seed for all arms of a world; what differs is what it says."""
    ablation.main(["--data=drawn", "--quick", "--seed=7", "--worlds=1", "--arms",
                   *ablation.TRAINED])
    assert stubs[0] == ("world", 7, TINY)
    base = Settings(iters=6, group_size=8, seed=7)
    wanted = {"joint": {}, "joint, exact": {"beta": 6.0},
              "joint, no KL": {"beta": 0.0, "schedule_beta": 0.0},
              "model only": {"optimize": "model"}, "schedule only": {"optimize": "schedule"},
              "schedule only, blind": {"optimize": "schedule"},
              "alternate": {"optimize": "alternate"},
              "alternate, twice the calls": {"optimize": "alternate", "iters": 100}}
    for arm, (_, settings, model, schedule, given, is_exact) in zip(ablation.TRAINED, stubs[1:]):
        assert settings == replace(base, **wanted[arm]), arm
        assert model is stubs[1][2] and given == list(range(10))
        assert isinstance(schedule, ablation.Blind) == ("blind" in arm)
        assert is_exact == ("exact" in arm)


def test_a_base_is_made_once_and_kept(small, monkeypatch):  # noqa: F811
    device = torch.device(DEVICE)
    world, base = ablation.a_base(".", "drawn", TINY, 3, device)
    monkeypatch.setattr(cogrpo, "make_base", None)
    again, model = ablation.a_base(".", "drawn", TINY, 3, device)
    assert torch.equal(weights(base), weights(model)) and Path("base-3.pt").exists()
    assert torch.equal(world.codebook, again.codebook)


def test_a_blind_schedule_sees_the_step_and_nothing_else():
    blind = ablation.Blind().to(DEVICE).double()
    torch.nn.init.normal_(blind.residual[2].weight)
    _, trajectory = rollout(a_model(), blind, conds(16), 4, explore=False)
    assert all((step.action == step.action[0]).all() for step in trajectory)
    assert not torch.equal(trajectory[0].action[0], trajectory[1].action[0])


def test_a_colder_schedule_differs_in_tau_s_alone():
    schedule, seen = a_schedule(), torch.rand(4, 3, dtype=torch.float64, device=DEVICE)
    one, hand_made = schedule(seen, 1, 4)
    other, same = ablation.Colder(schedule, 0.7)(seen, 1, 4)
    wanted = constrain(one.mean) * torch.tensor([1, 0.7, 1, 1], device=DEVICE)
    assert torch.allclose(constrain(other.mean), wanted) and torch.equal(same.mean, hand_made.mean)


def test_the_best_by_hand_starts_from_the_hand_made_schedule():
    for t in range(4):
        ours = ablation.by_hand(1, 1, 4.5, 1).hand_made(t, 4)
        assert ours == pytest.approx(cogrpo.hand_made(t, 4))


def test_it_goes_on_where_it_was_stopped_and_keeps_settings_apart(stubs, capsys):
    """An arm whose rows are there does not run again; rows of other settings are refused."""
    command = ["--data=drawn", "--quick", "--seed=3", "--worlds=2", "--arms", "hand-made", "joint",
               "model only"]
    ablation.main(command)
    path = Path("ablation/ablation.csv")
    rows = ablation.read_csv(path)
    assert [(r["seed"], r["run"], r["arm"], r["T"]) for r in rows[:11]] == [
        ("3", "hand-made", "hand-made", "2"), ("3", "hand-made", "hand-made", "4"),
        ("3", "hand-made", "hand-made, tau_s x 0.5", "4"),
        ("3", "hand-made", "hand-made, tau_s x 0.5", "32"),
        ("3", "joint", "joint", "2"), ("3", "joint", "joint", "4"),
        ("3", "joint", "joint, its model alone", "2"),
        ("3", "joint", "joint, its model alone", "4"),
        ("3", "joint", "joint, tau_s x 0.5", "4"),
        ("3", "model only", "model only", "4"), ("3", "model only", "model only, tau_s x 0.5", "4")]
    assert [call[1] for call in stubs if call[0] == "world"] == [3, 4]
    toy.write_csv(path, rows[:-2])  # as if it had been stopped before the last arm
    before = len(stubs)
    ablation.main(command)
    again = [call for call in stubs[before:] if call[0] == "train"]
    assert len(again) == 1 and again[0][1].optimize == "model" and again[0][1].seed == 4
    assert ablation.read_csv(path)[-1]["reward"] == rows[-1]["reward"]
    with pytest.raises(SystemExit) as stopped:
        ablation.main(["--data=drawn", "--worlds=1"])
    assert stopped.value.code == 2 and "of other settings" in capsys.readouterr().err


def test_the_parts_of_joint_have_the_schedules_that_they_name():
    model, s = a_model(8, num_conds=10, dtype=torch.float32), Settings(iters=2, groups=2, steps=2)
    parts = ablation.run_arm("joint", StubWorld(), model, s, 0.0)
    whole, alone, cold = parts[0], parts[len(ablation.EVERY_T)], parts[-1]
    assert not torch.equal(weights(whole[1]), weights(model))
    assert alone[0].endswith("its model alone") and alone[1] is whole[1] is cold[1]
    assert weights(alone[2].residual[2]).abs().max() == 0
    assert weights(whole[2].residual[2]).abs().max() > 0
    assert cold[2].schedule is whole[2] and cold[0] == "joint, tau_s x 0.4"


def test_the_best_by_hand_is_found_within_one_runs_reward_calls():
    """A reward that likes cold draws; where those are too much alike, the floor forbids them."""
    model, calls, s = a_model(num_conds=10, dtype=torch.float32), [], Settings(steps=2)
    canvas = torch.full((1, 6), 5, device=DEVICE)
    likely = model(canvas, torch.zeros(1, dtype=torch.long, device=DEVICE)).argmax(2)

    class Likes:
        codebook = torch.zeros(1, device=DEVICE)

        def reward(tokens, cond):
            calls.append(len(cond))
            return (tokens == likely).float().mean(1)
    found = ablation.best_by_hand(model, Likes, s, 0.0).hand_made
    assert sum(calls) <= s.iters * s.groups * s.group_size and found(1, 2)[1] < 0.8
    assert ablation.best_by_hand(model, Likes, s, 0.99).hand_made(1, 2)[1] >= 1


def test_tables_against_numbers():
    """Two worlds that differ a lot and arms that differ by little: pairing does not see worlds."""
    def row(held_out, diversity):
        return {**dict.fromkeys(FIGURES, held_out), "diversity": diversity}
    figures = {("joint", 4): {"0": row(0.30, 0.35), "1": row(0.62, 0.35)}}
    for arm, less in (("hand-made", 0.2), ("model only", 0.1), ("schedule only", 0.15),
                      ("schedule only, blind", 0.16)):
        figures[arm, 4] = {"0": row(0.30 - less, 0.40), "1": row(0.62 - less, 0.40)}
    for factor in ablation.COLDER:
        figures[f"hand-made, tau_s x {factor}", 4] = {"0": row(0.20, 0.30), "1": row(0.20, 0.30)}
        figures[f"hand-made, tau_s x {factor}", 32] = {"0": row(0.2, 0.33), "1": row(0.4, 0.33)}
    figures["hand-made", 32] = {"0": row(0.2, 0.34), "1": row(0.4, 0.34)}
    text = "\n".join(ablation.tables(figures))
    assert "| model only, T = 4 | 2 | +0.100 ± 0.000 | +0.100" in text
    assert "| hand-made, tau_s x 0.7, T = 4 |" not in text  # the sweeps have a table of their own
    assert "| hand-made, T = 4 | 0.260 / 0.400 | 0.200 / 0.300 " in text
    assert "halves, held_out: +0.050 ± 0.000" in text
    assert "adds to the schedule, held_out: +0.010 ± 0.000" in text
    assert "| joint, T = 4 | 2 | 0.460 ± 2.034" in text
    ratios = [0.30 / 0.15, 0.62 / 0.31]  # halfway between tau_s x 1 (0.1 and 0.42) and x 0.4 (0.2)
    words = f"at equal diversity: {np.mean(ratios):.2f} ± 0.00, in 2 of 2 worlds"
    assert f"that of hand-made, made colder, at T = 4, {words}" in text
    assert "hand-made, made colder, at T = 32, at equal diversity: -, in 0 of 2" in text
    assert "model only, made colder, at T = 4, at equal diversity: -, in 0 of 2" in text


def test_intervals_against_numbers():
    """Student's t: for 1, 2, 3 it is 4.303 / sqrt(3); five draws cover the mean 95 times in 100."""
    assert ablation.interval([1.0, 2.0, 3.0]) == pytest.approx((2, 4.303 / 3 ** 0.5), rel=1e-3)
    draws = np.random.default_rng(0).normal(3, 2, (4000, 5))
    pairs = [ablation.interval(values) for values in draws.tolist()]
    assert np.mean([abs(mean - 3) < half for mean, half in pairs]) == pytest.approx(0.95, abs=0.012)


def test_the_whole_ablation_on_a_small_world(small, capsys, monkeypatch):  # noqa: F811
    """Nothing stubbed: two arms, the tables and the pictures."""
    monkeypatch.setattr(ablation, "EVERY_T", (2, 4))
    monkeypatch.setattr(ablation, "COLDER", (0.4,))
    ablation.main(["--data=drawn", "--quick", "--worlds=1", "--arms", "hand-made"])
    assert "run joint and hand-made" in capsys.readouterr().out
    ablation.main(["--data=drawn", "--quick", "--worlds=1", "--arms", "hand-made", "joint"])
    assert "| joint, T = 4 | 1 |" in capsys.readouterr().out
    assert {file.name for file in Path("ablation").iterdir()} == {
        "ablation.csv", "ablation.md", "base-4.pt", "quality.png", "frontier.png"}
    noise.main(["--data=drawn", "--quick", "--runs=2"])
    text = capsys.readouterr().out
    one, other = [float(x) for x in re.findall(r"seed \d: .* frechet (\d+\.\d+)", text)]
    table = dict(re.findall(r"\| (\w+) \| (\d+\.\d+) \|", text))
    assert one != other and float(table["frechet"]) == pytest.approx((one + other) / 2, abs=1e-2)


def test_the_benchmark_counts_rows_and_prints_ratios(monkeypatch):
    """A forward pass of a row counts one, with its backward three."""
    job = benchmark.a_job
    monkeypatch.setattr(benchmark, "a_job", lambda device: job(device, dim=16, depth=1, vocab=16))
    model = a_model()
    rows = benchmark.count_rows(model)
    rollout(model, Schedule().to(DEVICE), conds(5), 3)
    assert rows == [5 * 2 * 3]
    model(torch.zeros(4, 6, dtype=torch.long, device=DEVICE), conds(4)).sum().backward()
    assert rows == [30 + 12]
    device = torch.device(DEVICE)
    lines = benchmark.time_an_iteration(device, repeats=1)
    table = re.findall(r"^\| (\w+) \| \d+ \| \d+ \| (\d+\.\d+) \|$", "\n".join(lines), re.M)
    assert [name for name, _ in table] == ["rollout", "update", "iteration"]
    assert all(float(ratio) > 0.5 for _, ratio in table)
    with benchmark.Alive() as alive:
        x = torch.zeros(1000) + 1  # two tensors, of which one stays
        assert alive.peak == 8000 and alive.now == 4000
        del x
        assert alive.now == 0


def test_the_table_of_bias_and_variance_has_the_numbers_of_its_function():
    bias, variance = gradient.bias_and_variance("exact", 0, 3.0)
    assert bias < 1e-8 < 0.01 < gradient.bias_and_variance("fill", 0, 3.0)[0] and variance > 1


def test_each_half_of_guidance_is_that_of_the_model_that_its_row_names(monkeypatch, capsys):
    base, model, rows = a_model(seed=1), a_model(seed=2), []
    tokens = torch.full((3, 6), base.mask_id, device=DEVICE)
    halves = [cond_uncond(m, tokens, conds(3)) for m in (base, model)]

    def spy(world, model, schedule, steps, samples, seed):
        rows.append(cond_uncond(model, tokens, conds(3)))
        return dict.fromkeys(toy.FIGURES, 0.0)
    monkeypatch.setattr(guidance, "measure", spy)
    monkeypatch.setattr(cogrpo, "load", lambda *_: (None, base, model, Schedule()))
    guidance.main(["any.pt"])
    for row, (c, u) in zip(rows, ((1, 1), (0, 1), (1, 0), (0, 0)), strict=True):
        assert torch.equal(row[0], halves[c][0]) and torch.equal(row[1], halves[u][1])
    assert "|pretrained|learned|0.000|" in capsys.readouterr().out.splitlines()[3]
