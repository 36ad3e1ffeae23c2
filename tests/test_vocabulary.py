"""New words: compared, found and cut as the tokenizer does it, not as they are typed."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from custom_diffusion import UserError
from custom_diffusion.models.vocabulary import (
    add_words,
    check_new_words,
    cut_off,
    embedding_table,
    limit_length,
    names_word,
    put_words,
)
from tests.conftest import ROOT


@pytest.fixture
def tokenizer() -> CLIPTokenizer:
    """The small base model's: it reads 32 tokens."""
    return CLIPTokenizer.from_pretrained(ROOT / "base" / "tokenizer")


def message(words: list[str], tokenizer: CLIPTokenizer, whose: str = "") -> str:
    with pytest.raises(UserError) as caught:
        check_new_words(words, tokenizer, whose)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("word", "form"), [("cat", ""), ("Cat", ", as 'cat'"), ("CAT", ", as 'cat'"), ("TION", ", as 'tion'")]
)
def test_a_word_of_the_language_in_any_case(word: str, form: str, tokenizer: CLIPTokenizer) -> None:
    # "cat</w>" is a word and "tion" an end of words: both would be replaced in every prompt.
    said = message(["<new1>", word], tokenizer, " of 'my-model'")
    assert f"the modifier token {word!r} of 'my-model' is in the tokenizer's vocabulary already{form};" in said


@pytest.mark.parametrize(
    ("one", "other"), [("<new1>", "<New1>"), ("<NEW1>", "<new1>"), ("<é>", "<e\u0301>"), ("<Ä>", "<ä>")]
)
def test_two_words_that_the_tokenizer_reads_alike(one: str, other: str, tokenizer: CLIPTokenizer) -> None:
    said = message([one, other], tokenizer)
    assert repr(one) in said and repr(other) in said and "are the same word to the tokenizer" in said
    add_words(tokenizer, [one])
    message([other], tokenizer)


def test_words_that_are_new(tokenizer: CLIPTokenizer) -> None:
    words = ["<new1>", "<new2>", "<New>", "zzqx", "sks1", "<cat>"]
    check_new_words(words, tokenizer)
    add_words(tokenizer, words)
    for word in words:
        assert names_word(f"a photo of {word}, at night", word, tokenizer)


def test_a_word_is_found_by_its_id(tokenizer: CLIPTokenizer) -> None:
    add_words(tokenizer, ["<new1>", "<new11>"])
    for prompt in ("a <new1> cat", "a <NEW1> cat", "a<New1>cat", "<new1>, sitting"):
        assert names_word(prompt, "<new1>", tokenizer)
        assert not names_word(prompt, "<new11>", tokenizer)
    for prompt in ("a <new11> cat", "a <new 1> cat", "a cat", "", "a < new1 > cat", "a <new2> cat"):
        assert not names_word(prompt, "<new1>", tokenizer)
    assert not names_word("a <new3> cat", "<new3>", tokenizer), "it was never added"


def test_what_is_cut_off_is_known(tokenizer: CLIPTokenizer) -> None:
    add_words(tokenizer, ["<new1>"])
    room = tokenizer.model_max_length - 2
    fits = " ".join(["cat"] * (room - 1)) + " <new1>"
    assert cut_off(fits, tokenizer) == ""
    assert names_word(fits, "<new1>", tokenizer, cut=True)
    over = " ".join(["cat"] * room) + " <New1> on a Hill"
    assert cut_off(over, tokenizer) == "<New1> on a Hill"
    assert names_word(over, "<new1>", tokenizer)
    assert not names_word(over, "<new1>", tokenizer, cut=True)
    assert cut_off("", tokenizer) == ""


def test_a_tokenizer_that_knows_no_length_gets_the_text_encoders(tokenizer: CLIPTokenizer) -> None:
    tokenizer.model_max_length = int(1e30)
    limit_length(tokenizer, small_text_encoder(tokenizer, positions=20).config)
    assert tokenizer.model_max_length == 20
    limit_length(tokenizer, small_text_encoder(tokenizer, positions=77).config)
    assert tokenizer.model_max_length == 20, "it never grows"


def small_text_encoder(tokenizer: CLIPTokenizer, positions: int = 32) -> CLIPTextModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    return CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=positions))


@pytest.mark.parametrize("spare", [0, 1, 2, 7])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_words_come_out_in_any_order(spare: int, order: tuple[int, int], tokenizer: CLIPTokenizer) -> None:
    encoder = small_text_encoder(tokenizer)
    encoder.resize_token_embeddings(len(tokenizer) + spare)
    before, table = tokenizer.backend_tokenizer.to_str(), embedding_table(encoder).clone()
    added = [
        put_words(tokenizer, encoder, {"<a>": torch.ones(4), "<b>": 2 * torch.ones(4)}),
        put_words(tokenizer, encoder, {"<c>": 3 * torch.ones(4)}),
    ]
    added[order[0]].remove()
    for word, value in {"<a>": 1, "<b>": 2, "<c>": 3}.items():
        if word not in added[order[0]].words:
            row = embedding_table(encoder)[tokenizer.convert_tokens_to_ids(word)]
            assert names_word(f"a {word}", word, tokenizer) and torch.equal(row, torch.full((4,), float(value)))
    added[order[1]].remove()
    assert tokenizer.backend_tokenizer.to_str() == before
    assert torch.equal(embedding_table(encoder)[: len(tokenizer)], table[: len(tokenizer)])
    if spare == 0 or order == (1, 0):
        assert torch.equal(embedding_table(encoder), table)
    rows = len(embedding_table(encoder))
    added[0].remove()
    assert len(embedding_table(encoder)) == rows, "removing twice does nothing"
