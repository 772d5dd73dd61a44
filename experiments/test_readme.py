"""What README.md says is true of the code beside it."""
import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_readmes_own_programs_run(capsys, tmp_path, monkeypatch):
    """The blocks under "Your own model" run as they stand, and print what it says.

    Figures are of the CPU; on another one the last digits may differ.
    """
    readme = README.read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", readme, re.S):
        exec(compile(block, "README.md", "exec"), namespace)
    line = r"reward ([\d.]+), (\d+) distinct"
    printed, said = re.findall(line, capsys.readouterr().out), re.findall(line, readme)
    assert len(printed) == len(said) == 2  # before and after
    for (reward, distinct), (said_reward, said_distinct) in zip(printed, said):
        assert float(reward) == pytest.approx(float(said_reward), abs=0.05)
        assert float(distinct) == pytest.approx(float(said_distinct), rel=0.05)
