"""The words of captions and titles."""

from __future__ import annotations

import pytest

from custom_diffusion.retrieval.local_files import LocalFiles
from custom_diffusion.retrieval.words import caption_of_title, has_words, query_words
from custom_diffusion.text import one_line


@pytest.mark.parametrize(
    ("title", "caption"),
    [
        ("My cats at home", "My cats at home"),
        ("Whiskers", "cat, Whiskers"),
        ("IMG_2034.JPG", "cat"),
        ("DSC00123", "cat"),
        ("", "cat"),
        ("2019-04-01 12.30", "cat"),
        ("category theory", "cat, category theory"),
    ],
)
def test_titles_become_captions(title, caption):
    assert caption_of_title(title, "cat") == caption


def test_words_are_whole_words():
    assert has_words("Three Cats!", query_words("a cat")) and has_words("wooden pots", query_words("wooden pot"))
    assert has_words("pets/cat007.jpg", query_words("cat"))
    assert not has_words("category", query_words("cat")) and not has_words("a wooden spoon", query_words("wooden pot"))
    assert has_words("一只猫在睡觉", query_words("猫"))
    assert LocalFiles(".").left_out == {}


def test_a_caption_is_one_line():
    assert one_line("a\u2028b\x85c\r\nd\x00e\ttab \ud800 \u200d") == "a b c d e tab \u200d"
