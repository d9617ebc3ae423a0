"""Tables in plain text: aligned, whatever their cells are."""

import pytest

from raybrats.table import table


def test_numbers_stand_to_the_right_and_words_to_the_left():
    lines = table(("case", "dice", "cases"), [("a", 0.5, 3), ("longer", 0.25, 10)]).splitlines()
    assert lines == ["case     dice  cases", "a       0.500      3", "longer  0.250     10"]


def test_a_column_with_a_word_among_its_numbers_stands_to_the_left():
    assert table(("dice",), [(0.5,), ("none",)]).splitlines() == ["dice", "0.500", "none"]


def test_without_rows_only_the_names_of_the_columns_are_left():
    assert table(("case", "reason"), []) == "case  reason"


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="zip"):
        table(("case", "reason"), [("a",)])
