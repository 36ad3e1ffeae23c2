"""merge.py: the paper's closed form, held to what it promises, and the folder that comes out of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

import infer
import merge
from benchmarks.merge import main as measure_merging
from custom_diffusion.concept.closed_form import NEARNESS, merge_weights, merging_directions, weigh_weights
from custom_diffusion.concept.files import Concept, load_concept, save_concept
from custom_diffusion.concept.parts import Part, concept_prompts, free_name, prepare_parts
from custom_diffusion.concept.projections import original_projections
from custom_diffusion.concept.text_features import CAPTIONS, TextModels, read_captions
from custom_diffusion.errors import UserError
from custom_diffusion.models.base_model import BaseModel
from tests.conftest import flags, train
from tools import make_captions


def learn(base_model: Path, images: Path, folder: Path, what: str, seed: int) -> Path:
    prompt = f"photo of a <new1> {what}"
    train(flags(base_model, images, folder, instance_prompt=prompt, learning_rate=1e-2, seed=seed, max_train_steps=6))
    return folder


@pytest.fixture(scope="module")
def cat(base_model: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learn(base_model, images, tmp_path_factory.mktemp("cat"), "cat", 1)


@pytest.fixture(scope="module")
def pot(base_model: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second concept whose token has the name of the first one's."""
    return learn(base_model, images, tmp_path_factory.mktemp("pot"), "wooden pot", 2)


@pytest.fixture(scope="module")
def merged(cat: Path, pot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "both"
    merge.main(["--model_dir", str(cat), str(pot), "--output_dir", str(folder)])
    return folder


def models_with_tokens(base_model: Path, concept: Concept) -> TextModels:
    models = TextModels.load(BaseModel(str(base_model)))
    models.add_tokens([Part(concept, {})])
    return models


def relative(change: torch.Tensor, reference: torch.Tensor) -> float:
    return (change.norm() / reference.norm()).item()


# --- the closed form -----------------------------------------------------------------------------


def test_the_closed_form_is_the_constrained_minimum() -> None:
    # Against the textbook's solution of the same problem by Lagrange multipliers (KKT system), row by row.
    generator = torch.Generator().manual_seed(0)
    base, targets, values, captions = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(5, 8), (3, 8), (3, 5), (40, 8)]
    )
    weights = merge_weights(base, targets, values, merging_directions(targets, captions))
    gram = captions.T @ captions
    system = torch.cat([torch.cat([gram, targets.T], 1), torch.cat([targets, torch.zeros(3, 3)], 1)])
    expected = torch.linalg.solve(system, torch.cat([gram @ base.T, values]))[:8].T
    assert torch.allclose(weights, expected, rtol=1e-6)


def test_equal_words_that_want_different_things_are_refused() -> None:
    targets, captions = torch.ones(2, 4), torch.randn(20, 4)
    with pytest.raises(UserError, match="give other --class_words"):
        merge_weights(torch.eye(4), targets, torch.randn(2, 4), merging_directions(targets, captions))
    with pytest.raises(UserError, match="3 words, too few"):
        merging_directions(targets, captions[:3])


def test_weighing_is_the_minimum_of_what_it_says() -> None:
    generator = torch.Generator().manual_seed(1)
    base, *learned = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    *asked, captions = torch.randn(3, 40, 8, generator=generator, dtype=torch.float64)
    *targets, regularization = (features.T @ features / 40 for features in (*asked, captions))
    weights = weigh_weights(base, learned, targets, regularization, 0.5).requires_grad_()
    near = NEARNESS * sum(targets).diagonal().mean()
    all_learned = base + sum(own - base for own in learned)
    objective = (
        near * (weights - all_learned).square().sum() + 0.5 * ((weights - base) @ captions.T).square().sum() / 40
    )
    objective += sum(((weights - own) @ f.T).square().sum() / 40 for own, f in zip(learned, asked, strict=True))
    objective.backward()
    assert weights.grad.abs().max() < 1e-9
    alone = weigh_weights(base, learned[:1], targets[:1], regularization, 0.0)
    assert torch.allclose(alone, learned[0]), "nothing to weigh against: as it was learned"


# --- what the merged folder does -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "captions", "expected"),
    [
        (("cat", "plant"), ["a cat next to a plant", "a dog"], ["a <a> cat next to a <b> plant"]),
        (("cat", "cat"), ["cats", "a cat on the grass"], ["a <a> cat on the grass", "a <b> cat on the grass"]),
        (("cat", "cat face"), ["a cat face", "a cat"], ["a <b> cat face", "a <a> cat"]),
        (("", "c.t"), ["a cat", "a c.t"], ["a <b> c.t"]),
    ],
)
def test_every_concept_takes_the_place_of_its_class(
    words: tuple[str, str], captions: list[str], expected: list[str]
) -> None:
    tokens = {token: {"text_encoder": torch.zeros(1)} for token in ("<a>", "<b>")}
    part = Part(Concept({}, tokens), dict(zip(tokens, words, strict=True)))
    prompts = concept_prompts(part, captions)
    assert prompts[-len(expected) :] == expected
    assert set(prompts[: -len(expected)]) == set(concept_prompts(part, []))


def test_the_concepts_words_keep_their_keys_and_values(cat: Path, pot: Path, merged: Path, base_model: Path) -> None:
    both, first, second = load_concept(merged), load_concept(cat), load_concept(pot)
    assert list(both.tokens) == ["<new1>", "<new2>"]
    assert torch.equal(both.tokens["<new1>"]["text_encoder"], first.tokens["<new1>"]["text_encoder"])
    renamed = both.tokens["<new2>"]["text_encoder"]
    assert torch.equal(renamed, second.tokens["<new1>"]["text_encoder"]), "the second was renamed"
    models = models_with_tokens(base_model, both)
    tokenizer, encoder = models.tokenizers["text_encoder"], models.text_encoders["text_encoder"]
    originals = original_projections(BaseModel(str(base_model)), both.attention)
    for concept, words in ((first, "<new1> cat"), (second, "<new2> wooden pot")):
        # As infer.py sees it, with start token and padding around the words whose features count.
        in_prompt = models.features([f"photo of a {words}"], "photo of a")
        alone = models.features([words])
        ids = tokenizer(f"photo of a {words}", padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            padded = encoder(ids)[0][0]
        assert torch.allclose(padded[4 : 4 + len(in_prompt)], in_prompt, atol=1e-5)
        for features in (in_prompt, alone):
            for key, weight in both.attention.items():
                wanted = features @ concept.attention[key].T
                assert relative(features @ weight.T - wanted, wanted) < 1e-5, key
                assert relative(features @ originals[key].T - wanted, wanted) > 1e-2, (
                    "the concept had learned something"
                )


def test_unrelated_captions_move_less_than_in_either_parent(
    cat: Path, pot: Path, merged: Path, base_model: Path
) -> None:
    both, parents = load_concept(merged), (load_concept(cat), load_concept(pot))
    used = set(read_captions(CAPTIONS, 500))
    unseen = [caption for caption in read_captions(CAPTIONS, 10_000) if caption not in used][:200]
    features = models_with_tokens(base_model, both).features(unseen)
    for key, weight in original_projections(BaseModel(str(base_model)), both.attention).items():
        answers = features @ weight.T
        moved = relative(features @ both.attention[key].T - answers, answers)
        for parent in parents:
            assert moved < relative(features @ parent.attention[key].T - answers, answers), key


def test_one_concept_leaves_more_as_it_was_the_more_that_weighs(cat: Path, base_model: Path, tmp_path: Path) -> None:
    learned = load_concept(cat)
    originals = original_projections(BaseModel(str(base_model)), learned.attention)
    models = models_with_tokens(base_model, learned)
    unseen = models.mean_square(read_captions(CAPTIONS, 10_000)[1::2])
    own = models.mean_square(["photo of a <new1> cat at night"])
    moved, lost = [], []
    for weight in (0, 0.5, 5):
        folder = tmp_path / str(weight)
        merge.main(["--model_dir", str(cat), "--prior_weight", str(weight), "--output_dir", str(folder)])
        now = load_concept(folder)
        assert torch.equal(now.tokens["<new1>"]["text_encoder"], learned.tokens["<new1>"]["text_encoder"])
        moved.append(0.0)
        lost.append(0.0)
        for key, weights in originals.items():
            change, loss = now.attention[key] - weights, now.attention[key] - learned.attention[key]
            moved[-1] += ((change.double() @ unseen) * change).sum().item()
            lost[-1] += ((loss.double() @ own) * loss).sum().item()
    assert moved[0] > moved[1] > moved[2]
    assert lost[0] < 1e-6 * moved[0] and lost[0] < lost[1] < lost[2]


def test_infer_reads_it_and_the_card_says_what_it_is(merged: Path, base_model: Path, tmp_path: Path) -> None:
    data = ModelCard.load(merged / "README.md").data.to_dict()
    assert data["base_model"] == str(base_model)
    assert data["instance_prompt"] == "photo of a <new1> cat, photo of a <new2> wooden pot"
    argv = ["--model_dir", str(merged), "--prompt", "<new1> cat in a <new2> wooden pot", "--num_inference_steps", "2"]
    infer.main([*argv, "--output_dir", str(tmp_path)])
    assert len(list(tmp_path.glob("0*.png"))) == 1


def test_merging_again_and_by_the_saved_file(
    merged: Path, pot: Path, base_model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A merged concept is a concept; the third <new1> becomes <new3>, and its words are known from the card.
    dog = learn(base_model, images, tmp_path / "dog", "dog", 3)
    merge.main(["--model_dir", str(merged), str(dog), "--output_dir", str(tmp_path / "three"), "--num_captions=300"])
    assert f"<new1> of {dog} is now <new3>" in capsys.readouterr().out
    assert "two of the concepts are the same" in refused("--model_dir", merged, pot, "--output_dir", tmp_path / "x")
    assert list(load_concept(tmp_path / "three").tokens) == ["<new1>", "<new2>", "<new3>"]
    merge.main(["--config", str(tmp_path / "three" / "config.yaml"), "--output_dir", str(tmp_path / "again")])
    one, other = load_concept(tmp_path / "three"), load_concept(tmp_path / "again")
    assert all(torch.equal(one.attention[key], other.attention[key]) for key in one.attention)


@pytest.mark.parametrize(
    ("token", "taken", "name"),
    [("<new1>", {"<new1>"}, "<new2>"), ("<new1>", {"<new1>", "<new2>"}, "<new3>"), ("<cat>", {"<cat>"}, "<cat2>"),
     ("sks", {"sks"}, "sks2")],
)  # fmt: skip
def test_names_of_renamed_tokens(token: str, taken: set[str], name: str) -> None:
    assert free_name(token, taken) == name


def test_tokens_that_the_tokenizer_reads_alike_are_renamed(capsys: pytest.CaptureFixture[str]) -> None:
    attention = {"down_blocks.0.attn2.processor.to_k_custom_diffusion.weight": torch.ones(1, 1)}
    vector = {"text_encoder": torch.ones(1)}
    prompts = ("photo of a <NEW1> cat", "photo of a <New1> pot")
    one, other = (
        Concept(attention, {token: vector}, source=token, instance_prompt=prompt)
        for token, prompt in zip(("<new1>", "<New1>"), prompts, strict=True)
    )
    first, second = prepare_parts([one, other], None)
    assert (first.words, second.words) == ({"<new1>": "cat"}, {"<New2>": "pot"})
    assert second.concept.instance_prompt == "photo of a <New2> pot"
    assert "<New1> of <New1> is now <New2>" in capsys.readouterr().out


# --- mistakes ------------------------------------------------------------------------------------


def refused(*argv: object) -> str:
    with pytest.raises(UserError) as caught:
        merge.main([str(word) for word in argv])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_mistake_gets_one_line_and_leaves_no_folder(cat: Path, pot: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ["--output_dir", out, "--model_dir", cat]
    shutil.copytree(pot, tmp_path / "bare", ignore=shutil.ignore_patterns("README.md"))
    assert "--class_words cat" in refused(*common, tmp_path / "bare")
    assert "3 entries for 2 tokens" in refused(*common, pot, "--class_words", "a", "b", "c")
    assert "cannot be read" in refused(*common, pot, "--captions", tmp_path / "none.txt")
    (tmp_path / "few.txt").write_text("a dog\n")
    assert "there is no folder" in refused(*common, tmp_path / "nowhere")
    concept = load_concept(pot)
    other = {key.replace("to_k", "to_q"): value for key, value in concept.attention.items()}
    save_concept(Concept(concept.attention | other, concept.tokens), tmp_path / "faces")
    assert "--freeze_model crossattn" in refused(*common, tmp_path / "faces")
    assert not out.exists()
    assert "too few" in refused(*common, pot, "--captions", tmp_path / "few.txt")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "at least two concepts"),
        (["--prior_weight=-1"], "not a number from 0 on"),
        (["--prior_weight=nan"], "from 0"),
    ],
)
def test_one_concept_needs_a_prior_weight_from_zero_on(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        merge.parse_args(["--model_dir", "cat", *flags])
    assert caught.value.code == 2 and words in capsys.readouterr().err


def test_an_occupied_folder_and_another_base_model_are_refused(
    cat: Path, pot: Path, base_model_v: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds 'notes.txt' already" in refused("--model_dir", cat, pot, "--output_dir", tmp_path)
    argv = ["--model_dir", cat, pot, "--output_dir", tmp_path / "out"]
    assert "trained on" in refused(*argv, "--pretrained_model_name_or_path", base_model_v)


# --- captions ------------------------------------------------------------------------------------


def test_the_shipped_captions_are_many_and_varied() -> None:
    captions = CAPTIONS.read_text().splitlines()
    assert captions == make_captions.make_captions()
    assert len(set(captions)) == len(captions) >= 1000
    assert len({word for caption in captions for word in caption.split()}) > 600
    assert len({" ".join(caption.split()[:3]) for caption in captions}) > 400, "they begin in many ways"


@pytest.mark.long
def test_the_benchmark_runs(base_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure_merging(["--shape", "tiny", "--base_model_dir", str(base_model), "--repeats", "1"])
    assert "(median of 1)" in capsys.readouterr().out
