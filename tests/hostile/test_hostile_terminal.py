"""Names that a terminal would obey, outputs that take nothing, errors that nobody foresaw."""

import io
import json
import logging
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from faulty import SOAK
from hypothesis import given
from hypothesis import strategies as st

from raybrats import cli, progress, terminal
from raybrats.errors import DataError
from raybrats.progress import Display
from raybrats.table import shown, table
from raybrats.terminal import Answer, complain, messages_shown, show

RAYBRATS = Path(sys.executable).with_name("raybrats")
HOSTILE = "case\x1b[31m\x9b2J\u202e\u2028[red]7[/red]:skull:\nraybrats: all is well\udc80\x7f"
SELDOM = pytest.mark.skipif(not SOAK, reason="a driver more: make soak")
ESCAPED = r"case\x1b[31m\x9b2J\u202e\u2028[red]7[/red]:skull:\nraybrats: all is well\udc80\x7f"


def run(words, **environment):
    """One line of a shell: exit code, what it wrote."""
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words}"],
        env={**os.environ, "RAYBRATS": str(RAYBRATS), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


@given(st.text(st.characters()))
def test_what_is_shown_is_printable_and_printable_text_is_shown_as_it_is(text):
    assert shown(text).isprintable()
    assert shown(shown(text)) == shown(text)
    if text.isprintable():
        assert shown(text) == text


def on_terminal(action):
    """What an action writes, without the escapes that are the program's own."""
    out = io.StringIO()
    action(out)
    return out.getvalue()


def test_titles_and_cells_are_shown_escaped():
    answer = Answer({}, HOSTILE, (HOSTILE,), [(HOSTILE,)], (HOSTILE,))
    text = on_terminal(lambda out: show(answer, out, as_json=False))
    assert text.count(ESCAPED) == 4
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", text)
    assert ESCAPED in table((HOSTILE,), [(HOSTILE,)])
    assert len(table((HOSTILE,), [(HOSTILE,)]).splitlines()) == 2


def test_json_stays_the_document():
    out = on_terminal(lambda out: show(Answer({"id": HOSTILE}, "", (), []), out, as_json=True))
    assert json.loads(out) == {"id": HOSTILE}
    assert out.isascii()


def test_messages_and_complaints_are_one_line_each(capsys):
    with messages_shown():
        logging.getLogger("raybrats.data").warning("left out: %s", HOSTILE)
    complain(f"{HOSTILE} at http://me:hush@host")
    assert capsys.readouterr().err.splitlines() == [
        f"left out: {ESCAPED}",
        f"raybrats: {ESCAPED} at http://***@host",
    ]


@pytest.mark.parametrize("terminal_there", [False, True])
def test_progress_is_escaped(terminal_there, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_lines_wanted", True)
    if terminal_there:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "400")
    with Display(f"training {HOSTILE}", total=1) as display:
        display.show(1, HOSTILE)
    said = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert f"training {ESCAPED}" in said
    assert said.count(ESCAPED) >= 2
    assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u202e]", said)


def test_words_of_the_command_line_are_escaped():
    code, out, err = run(r"$RAYBRATS $'tr\x1b]0;x\x07[red]\nain'")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert r"\x1b]0;x\x07[red]\n" in err


PHANTOM = "$RAYBRATS phantom $TREE --cases 1 --shape 16 16 16"
MODELS = "$RAYBRATS train tiny --help"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (f"{PHANTOM} --json | true", 0, []),
        (f"{MODELS} | head -1 >/dev/null", 0, []),
        (f"{PHANTOM} >/dev/full", 1, ["stdout: No space left on device"]),
        (f"{MODELS} >/dev/full", 1, ["stdout: No space left on device"]),
        (f"{PHANTOM} --json >&-", 0, []),
        (f"{MODELS} >&-", 0, []),
        (f"{PHANTOM} <&-", 0, []),
        (f"{PHANTOM} <&- >&- 2>&-", 0, []),
        ("$RAYBRATS trian 2>&-", 2, []),
        ("$RAYBRATS trian 2>/dev/full", 2, []),
        ("$RAYBRATS trian 2>&1 >/dev/null | true", 2, []),
    ],
)
def test_an_output_that_takes_nothing_ends_nothing(words, code, said, tmp_path):
    got, _, err = run(words, TREE=str(tmp_path / "tree"))
    assert got == code, err
    assert len(err.splitlines()) == len(said), err
    assert all(word in err for word in said)
    if "phantom" in words:
        assert len([*(tmp_path / "tree").rglob("*.nii.gz")]) == 5


def test_a_closed_stdout_is_not_the_next_file_that_is_opened(tmp_path):
    script = (
        "from raybrats import terminal\nterminal.secure()\n"
        f"file = open({str(tmp_path / 'x')!r}, 'w')\nassert file.fileno() > 2\nprint('to nobody')"
    )
    code, _, err = run(f"{sys.executable} -c '{script.replace(chr(39), chr(34))}' <&- >&-")
    assert (code, err) == (0, "")
    assert (tmp_path / "x").read_text() == ""


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONWARNINGS": "error", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        *([{"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}] if SOAK else []),
    ],
)
def test_no_environment_of_python_breaks_a_verb(environment, tmp_path):
    tree = f"{tmp_path}/Köpfe-脑"
    code, out, err = run(f"{PHANTOM} --seed 3", TREE=tree, **environment)
    assert (code, err) == (0, "")
    assert "1 cases in" in out
    assert len([*Path(tree).rglob("*.nii.gz")]) == 5
    code, _, err = run("$RAYBRATS segment $TREE --flair $TREE/ä.nii", TREE=tree, **environment)
    assert (code, err.count("\n")) == (3, 1), err


def test_an_error_that_nobody_foresaw_is_one_line_and_a_file(capfd, monkeypatch, tmp_path):
    def broken(args):
        raise KeyError(f"mean of http://me:hush@host/\n{args}")

    monkeypatch.setattr(cli, "VERBS", {"models": broken})
    with monkeypatch.context() as patch:
        patch.setattr(terminal.tempfile, "tempdir", str(tmp_path))
        code = cli.main(["models"])
    out, err = capfd.readouterr()
    (path,) = tmp_path.iterdir()
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("raybrats: unexpected KeyError: ")
    assert str(path) in err
    assert "hush" not in err + path.read_text()
    assert "in broken" in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(KeyError):
        cli.main(["models", "--debug"])


def test_an_error_within_another_is_told_by_its_own_words(capfd, monkeypatch):
    def broken(args):
        raise RuntimeError("a task failed") from DataError(f"case 7: truncated {args}")

    monkeypatch.setattr(cli, "VERBS", {"models": broken})
    assert cli.main(["models"]) == DataError.exit_code
    assert capfd.readouterr().err == "raybrats: case 7: truncated []\n"


def test_a_traceback_that_cannot_be_kept_is_no_second_error(capfd, monkeypatch, tmp_path):
    def broken(args):
        raise KeyError(args)

    monkeypatch.setattr(cli, "VERBS", {"models": broken})
    with monkeypatch.context() as patch:
        patch.setattr(terminal.tempfile, "tempdir", str(tmp_path / "none"))
        assert cli.main(["models"]) == 1
    assert "could not be kept (No such file or directory); --debug" in capfd.readouterr().err


@pytest.mark.ray
@pytest.mark.parametrize("verbose", [False, pytest.param(True, marks=SELDOM)])
def test_what_nodes_say_of_themselves_is_shown_only_where_it_is_asked_for(verbose, ray_cluster):
    program = (
        "import time\n"
        "from raybrats import cluster\n"
        f"cluster.connect(verbose={verbose})\n"
        "from ray._private import utils, worker\n"
        "utils.push_error_to_driver(worker.global_worker, 'worker_pool_large', 'nine started')\n"
        "time.sleep(3)\n"
    )
    environment = os.environ | ray_cluster.environment
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ("nine started" in ended.stdout + ended.stderr) == verbose


@pytest.mark.ray
def test_of_several_tasks_that_fail_one_is_told(ray_cluster):
    program = (
        "import time\n"
        "from raybrats import cluster, storage\n"
        "from raybrats.errors import StorageError\n"
        "try:\n"
        "    names = [f'/nowhere/{n}' for n in range(4)]\n"
        "    list(cluster.each(storage.read_bytes, names, num_cpus=0.5, memory=2**20))\n"
        "except StorageError as error:\n"
        "    print(error)\n"
        "time.sleep(3)\n"
    )
    environment = os.environ | ray_cluster.environment
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("/nowhere/")
    assert ended.stderr == ""
