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
    before, after, first, last = map(float, re.findall(r"[\d.]+", capsys.readouterr().out)[:4])
    said = re.search(r"`reward ([\d.]+) -> ([\d.]+), distinct strings (\d+) -> (\d+)`", readme)
    said = [float(x) for x in said.groups()]
    assert [before, after] == pytest.approx(said[:2], abs=0.05)
    assert [first, last] == pytest.approx(said[2:], rel=0.05)
