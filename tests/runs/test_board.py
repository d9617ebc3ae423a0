"""What a run says on the way: what is told is heard once, what passes is shown for a while."""

from types import SimpleNamespace

import pytest

from raybrats import progress
from raybrats.progress import Display
from raybrats.runs.board import Board
from raybrats.runs.lead import Lead


class Told:
    """Stands where rank 0 has its log, its gauges and the board's handle: keeps what it is told."""

    def __init__(self):
        self.words, self.tell = [], SimpleNamespace(remote=lambda words: self.words.append(words))

    def log(self, *_):
        """Takes figures."""


def test_what_is_told_is_heard_once_and_in_order():
    board = Board()
    board.tell("resumed at step 40")
    board.post(41, "loss 0.5")
    _, _, first = board.read()
    board.tell("step 75: Dice mean 0.612")
    state, posts, second = board.read(len(first))
    assert (state, posts) == ((41, "loss 0.5"), 1)
    assert (first, second) == (["resumed at step 40"], ["step 75: Dice mean 0.612"])


def test_a_validation_ends_its_remark_and_tells_its_dice():
    lead, told = Lead.__new__(Lead), Told()
    lead.remark = "validating, case 1 of 1"
    lead._log = lead._board = told
    lead._learner = SimpleNamespace(step=75)
    lead.log({"val/dice_WT": 0.8, "val/dice_mean": 0.61239}, {})
    assert lead.remark == "validated: Dice WT 0.800, mean 0.612"
    assert told.words == ["step 75: Dice WT 0.800, mean 0.612"]


def test_lines_say_how_long_it_takes_at_the_pace_of_this_attempt(capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(progress, "_lines_wanted", True)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Display("training one", total=200) as display:
        # it goes on from step 100, once its workers have started: a step in 2 s
        for seconds, done in ((0, 100), (60, 100), (62, 101), (80, 110), (160, 150), (260, 200)):
            clock[0] = 1000.0 + seconds
            display.show(done, "loss 0.5")
        display.say("step 200: Dice mean 0.7")
    assert capsys.readouterr().err.splitlines() == [
        "training one: 100/200 loss 0.5",
        "training one: 100/200 loss 0.5",
        "training one: 110/200 loss 0.5 (3 min left)",
        "training one: 150/200 loss 0.5 (2 min left)",
        "training one: 200/200 loss 0.5",
        "training one: step 200: Dice mean 0.7",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"), [(7, "7 s"), (99, "99 s"), (100, "2 min"), (7300, "2 h 2 min")]
)
def test_durations_are_read_at_a_glance(seconds, words):
    assert progress._duration(seconds) == words
