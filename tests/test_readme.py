"""README's example runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def example():
    """README's first example, on fewer rows."""
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL).group(1)
    return code.replace("60_000", "2_000")


def test_example(capsys):
    assert len(example().strip().splitlines()) <= 12
    exec(compile(example(), str(README), "exec"), {})
    assert "parafit: predicted" in capsys.readouterr().out
