"""README's example runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_example(capsys):
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL).group(1)
    assert len(code.strip().splitlines()) <= 12
    exec(compile(code.replace("60_000", "2_000"), str(README), "exec"), {})
    assert "parafit: predicted" in capsys.readouterr().out
