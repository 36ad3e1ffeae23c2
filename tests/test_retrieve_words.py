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


PLURALS = """
cat cats, bus buses, bus busses, tomato tomatoes, person people, knife knives, wolf wolves, leaf leaves, glove gloves,
mouse mice, child children, grandchild grandchildren, man men, woman women, fireman firemen, foot feet, tooth teeth,
goose geese, ox oxen, die dice, box boxes, axe axes, oasis oases, watch watches, cache caches, dish dishes,
glass glasses, horse horses, vase vases, quiz quizzes, lens lenses, princess princesses, puppy puppies,
cookie cookies, movie movies, shoe shoes, hero heroes, piano pianos, cactus cacti, cactus cactuses,
chateau chateaux, taxi taxis, menu menus, kiwi kiwis, dwarf dwarfs, scarf scarves, gas gases, sheep sheep, elf elves,
eye eyes, pie pies, key keys, class classes, house houses
"""


@pytest.mark.parametrize(("one", "many"), [pair.split() for pair in PLURALS.replace("\n", " ").split(",")])
def test_plurals_are_found_by_their_singulars_and_the_other_way_round(one, many):
    assert has_words(f"Two {many.upper()}.", query_words(f"photo of a {one}"))
    assert has_words(f"One {one}.", query_words(many))


@pytest.mark.parametrize(
    ("one", "other"),
    [("cat", "category"), ("bus", "bush"), ("prince", "princess"), ("car", "care"), ("pot", "spot"), ("men", "menu"),
     ("ship", "sheep"), ("moss", "moose"), ("person", "personal"), ("ant", "pants"), ("bass", "base")],
)  # fmt: skip
def test_other_words_are_not_taken_for_plurals(one, other):
    assert not has_words(one, query_words(other)) and not has_words(other, query_words(one))


def test_letters_with_marks_are_found_in_both_forms():
    assert has_words("a cafe\u0301 in Paris", query_words("caf\u00e9"))
    assert has_words("ＣＡＴ", query_words("cat"))


def test_words_that_say_nothing_are_left_out_in_the_plural_too():
    assert query_words("photos of cats") == ["cats"] and query_words("photo") == ["photo"]


def test_a_caption_is_one_line():
    assert one_line("a\u2028b\x85c\r\nd\x00e\ttab \ud800 \u200d") == "a b c d e tab \u200d"
