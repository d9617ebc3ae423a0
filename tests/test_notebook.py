"""The tour in docs/notebook.md: its cells run as they stand, and print what stands below them."""

import io
import re
from contextlib import redirect_stdout
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from pathlib import Path

import pytest
from faulty import SOAK

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.md"


@pytest.mark.skipif(not SOAK, reason="one more run on the cluster: make soak")
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_cells_of_the_notebook_print_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", NOTEBOOK.read_text(), re.DOTALL | re.MULTILINE)
    assert {kind for kind, _ in blocks} == {"python", "text"}
    namespace, printed = {}, ""
    for number, (kind, text) in enumerate(blocks):
        if kind == "python":
            with redirect_stdout(io.StringIO()) as stdout:
                exec(compile(text, f"{NOTEBOOK.name}, block {number}", "exec"), namespace)
            printed = stdout.getvalue()
        else:
            fits = OutputChecker().check_output(text, printed, ELLIPSIS | NORMALIZE_WHITESPACE)
            assert fits, f"the notebook says\n{text}\nbut it prints\n{printed}"
