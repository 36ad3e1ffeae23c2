"""The Markdown cards that lie beside a concept: how it was made, and how to use it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from custom_diffusion.concept.files import CARD_KEYS, WEIGHTS_STEM, Concept
from custom_diffusion.concept.parts import Part
from custom_diffusion.concept.prompts import replace_words
from custom_diffusion.models.families import FAMILIES, Family, family_with

# What reads a word's file where diffusers does not by itself.
FILE_IMPORT = "from safetensors.torch import load_file\n"
# Diffusers alone would take the first new word for the end, see vocabulary.pool_at_the_end.
END_OF_PROMPT = """# What sums up the prompt is its end, not the first new word in it.
pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id
"""
PATH = "the path of this folder, or what huggingface_hub.snapshot_download gives"


def model_card(
    concept: Concept,
    prompts: Sequence[str],
    settings: Mapping[str, Any],
    sample_prompt: str | None = None,
    sample_images: Sequence[str] = (),
    origin: str = "trained",
    ending: str = "safetensors",
) -> str:
    """The text of ``README.md``: base model, tokens, prompts, licence, how to load, sample images.

    Args:
        concept: its base model is named where there is one, with all that it takes to load it.
        prompts: the instance prompts of the training run.
        settings: what to tell about the run, for a table; must hold no secret.
        sample_prompt, sample_images: prompt and file names (beside the card) of images to show.
        origin: how the weights were made, ``trained`` or ``merged``.
        ending: of the files beside the card, ``safetensors`` or ``bin``; those are what its Python loads.
    """
    words = ", ".join(f"`{token}`" for token in concept.tokens) or "no new word"
    prompt = sample_prompt or prompts[0]
    data = _metadata(
        concept,
        ["custom-diffusion", "diffusers-training"],
        ", ".join(prompts),
        # What the Hub's page shows and lets visitors try.
        [{"text": prompt, "output": {"url": name}} for name in sample_images] or [{"text": prompt}],
    )
    return f"""{data}
# Custom Diffusion: {words}

Cross-attention weights and new words for {concept.base_model or "a Stable Diffusion model that is not public"},
{origin} with [Custom Diffusion](https://www.cs.cmu.edu/~custom-diffusion/), for:

{_lines(f"- `{prompt}`" for prompt in prompts)}

{_lines(f"![{sample_prompt}](./{name})" for name in sample_images)}

{_how_to_use(concept, prompt, ending)}
## How it was {origin}

| setting | value |
|---|---|
{_lines(f"| {name} | {value} |" for name, value in settings.items())}

The licence of the base model holds for these weights too.
"""


def _how_to_use(concept: Concept, prompt: str, ending: str) -> str:
    """The section of a model card that shows how to load the concept."""
    return f"""## Use it

With the project that made it, in its folder; the path of this one, or its name on the Hub, for `this-folder`:

```bash
python infer.py --model_dir this-folder --prompt "{prompt}"
```

{_use_in_python(concept, prompt, ending)}
`cross_attention_kwargs={{"scale": ...}}` has no effect on these weights: it is for LoRAs. `infer.py --scale` blends
them with the base model's.
"""


def _use_in_python(concept: Concept, prompt: str, ending: str) -> str:
    if concept.gates:
        return _gated_use(concept, prompt)
    return _low_rank_use(concept, prompt) if concept.differences else _use_of_whole_projections(concept, prompt, ending)


def _gated_use(concept: Concept, prompt: str) -> str:
    """How Python loads a concept that acts only at its own words."""
    return f"""The attention weights act at the concept's own words alone (`--token_gate`), and prompts without them
give the base model's images:

{_lines(f"- {gate.words}" for gate in concept.gates)}

diffusers' `load_attn_procs` and other programs' loaders cannot express that, and do not read the file. In Python, with
the project's package (`pip install .` in its folder):

{_python_use(concept, prompt)}
Several such concepts are applied together without merging: `apply_concepts(pipeline, one, another)`.
"""


def _use_of_whole_projections(concept: Concept, prompt: str, ending: str) -> str:
    """How diffusers alone loads a concept with whole projections."""
    family = _family_of(concept)
    load_tokens = "".join(
        f'pipeline.load_textual_inversion(model, weight_name="{token}.{ending}")\n' for token in concept.tokens
    )
    imports, options = _loading(concept, ", dtype=torch.float16")
    where = "the path of this folder, or its name on the Hub"
    if len(family.text_encoders) > 1:
        load_tokens = "".join(_load_word("model", token, f"{token}.{ending}", family) for token in concept.tokens)
        load_tokens += END_OF_PROMPT
        imports, where = imports + FILE_IMPORT, PATH
    return f"""With diffusers alone (`load_attn_procs` silently loads nothing unless it is given `_pipeline`):

```python
import torch
from diffusers import DiffusionPipeline
{imports}
model = "."  # {where}
base_model = "{concept.base_model or "the model above"}"
pipeline = DiffusionPipeline.from_pretrained(base_model, dtype=torch.float16{options}).to("cuda")
pipeline.unet.load_attn_procs(model, weight_name="{WEIGHTS_STEM}.{ending}", _pipeline=pipeline)
{load_tokens}image = pipeline("{prompt}", num_inference_steps=100, guidance_scale=6.0, eta=1.0).images[0]
```
"""


def _python_use(concept: Concept, prompt: str) -> str:
    """Python that loads a concept with the project's package."""
    imports, options = _loading(concept, ", dtype=torch.float16")
    return f"""```python
import torch
from diffusers import DiffusionPipeline
{imports}
from custom_diffusion import apply_concepts, load_concept

model = "."  # the path of this folder, or its name on the Hub
base_model = "{concept.base_model or "the model above"}"
pipeline = DiffusionPipeline.from_pretrained(base_model, dtype=torch.float16{options}).to("cuda")
apply_concepts(pipeline, load_concept(model))
image = pipeline("{prompt}", num_inference_steps=100, guidance_scale=6.0, eta=1.0).images[0]
```
"""


def _low_rank_use(concept: Concept, prompt: str) -> str:
    """How Python loads a concept with low-rank factors, which diffusers' own loaders do not read."""
    return f"""The attention weights are factors of a low-rank change (`--rank`), which diffusers' `load_attn_procs`
does not read. In Python, with the project's package (`pip install .` in its folder):

{_python_use(concept, prompt)}
For diffusers alone, ComfyUI, AUTOMATIC1111 and other programs, make a LoRA of it; nothing is lost:

```bash
python export.py --model_dir this-folder --format lora
```
"""


def _load_word(folder: str, token: str, file: str, family: Family) -> str:
    """Lines of Python that load a word with a vector for each of several text encoders.

    Args:
        folder: the variable with the path of the files.
        file: the word's.
    """
    reader = 'torch.load(f"{%s}/%s", weights_only=True)' if file.endswith(".bin") else 'load_file(f"{%s}/%s")'
    lines = [f"word = {reader % (folder, file)}"]
    lines += [
        f'pipeline.load_textual_inversion(word["{part.token_key}"], token="{token}", '
        f"text_encoder=pipeline.{part.name}, tokenizer=pipeline.{part.tokenizer})"
        for part in family.text_encoders
    ]
    return "".join(f"{line}\n" for line in lines)


def _family_of(concept: Concept) -> Family:
    """The family that a concept's words are for; without words, the oldest."""
    return family_with(next(iter(concept.tokens.values()), {})) or FAMILIES[0]


def _loading(concept: Concept, dtype: str = "") -> tuple[str, str]:
    """What Python needs to load the base model as it was trained: lines of imports, and more arguments.

    Args:
        dtype: the argument that all parts are loaded with, if any.
    """
    options = {"revision": concept.base_revision, "variant": concept.base_variant}
    given = "".join(f', {name}="{value}"' for name, value in options.items() if value is not None)
    imports = ""
    if concept.base_vae is not None:
        imports += "from diffusers import AutoencoderKL\n"
        given += f', vae=AutoencoderKL.from_pretrained("{concept.base_vae}"{dtype})'
    if concept.base_tokenizer is not None:
        imports += "from transformers import CLIPTokenizer\n"
        several = len(_family_of(concept).text_encoders) > 1
        for part in _family_of(concept).text_encoders:
            folder = f', subfolder="{part.tokenizer}"' if several else ""
            given += f', {part.tokenizer}=CLIPTokenizer.from_pretrained("{concept.base_tokenizer}"{folder})'
    return imports, given


def _metadata(concept: Concept, tags: Sequence[str], instance_prompt: str | None, widget: list[Any]) -> str:
    """The YAML header of a card, which the Hub and our own commands read."""
    data = ModelCardData(
        # Which licence that is depends on the base model; the Hub wants a name for what is on none of its lists.
        license="other",
        license_name="as-the-base-model",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", _family_of(concept).tag, *tags],
        instance_prompt=instance_prompt,
        widget=widget,
        **{CARD_KEYS[name]: getattr(concept, name) for name in CARD_KEYS if name != "instance_prompt"},
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)


def lora_card(
    concept: Concept, name: str, embeddings: Mapping[str, str], is_bundle: bool = False, lost: str = ""
) -> str:
    """How to use an exported LoRA, program by program.

    Args:
        name: of the LoRA's file.
        embeddings: token to the name of its embedding's file, without ending.
        is_bundle: the embeddings are in the LoRA's file.
        lost: of a concept that was gated, see :func:`ungated_card`.
    """
    words = ", ".join(f"`{token}`" for token in concept.tokens)
    prompt = (concept.instance_prompt or " ".join(concept.tokens)).split(", ")[0]
    tags = ["lora", "textual_inversion", "custom-diffusion"]
    # The Hub refuses a card whose base model is no model of its own, such as a local folder.
    data = _metadata(concept.without_local_paths(), tags, concept.instance_prompt, [{"text": prompt}])
    write = _bundle_in_programs if is_bundle else _lora_in_programs
    return f"""{data}
# LoRA and embeddings of {words}

For {concept.base_model or "the base model"}. {write(concept, prompt, name, embeddings)}{_lost_gate(lost)}"""


def ungated_card(concept: Concept, lost: str) -> str:
    """The card of an export of a concept that was gated, where the format has no card of its own.

    Args:
        lost: how far it is from the gated concept, a sentence of :meth:`ungating.Ungated.loss`.
    """
    data = _metadata(concept.without_local_paths(), ["custom-diffusion"], concept.instance_prompt, [])
    words = ", ".join(f"`{token}`" for token in concept.tokens)
    return f"""{data}
# {words}, for other programs
{_lost_gate(lost)}"""


def _lost_gate(lost: str) -> str:
    """The section of a card that says what an export lacks of a gated concept; nothing where nothing is lost."""
    if not lost:
        return ""
    return f"""
## Not the concept itself

This was exported from a concept that acts only at its own words (`--token_gate`). No format of other programs can
express that, so these weights act everywhere (`export.py --ungate`). They come as near to the concept as such weights
can: {lost}.

Whatever loads them, `load_attn_procs` and `load_lora_weights` included, shows something other than the concept. For
that, give `infer.py` or `apply_concepts` the folder that was exported.
"""


def _bundle_in_programs(concept: Concept, prompt: str, name: str, embeddings: Mapping[str, str]) -> str:
    names = ", ".join(f"`{stem}` for `{token}`" for token, stem in embeddings.items())
    plain, lora = replace_words(prompt, embeddings), name.removesuffix(".safetensors")
    return f"""`{name}` has all that was learned, the words too.

| program | where it goes | prompt |
|---|---|---|
| AUTOMATIC1111, Forge | `models/Lora` | `{plain} <lora:{lora}:1>` |
| OneTrainer | a LoRA to start from | `{plain}` |

In these programs the words are: {names}. Diffusers, ComfyUI and InvokeAI read words from files of their own: export
without `--bundle` for these.
"""


def _lora_in_programs(concept: Concept, prompt: str, name: str, embeddings: Mapping[str, str]) -> str:
    comfy = replace_words(prompt, {token: f"embedding:{stem}" for token, stem in embeddings.items()})
    plain = replace_words(prompt, embeddings)
    invoke = replace_words(prompt, {token: f"<{stem}>" for token, stem in embeddings.items()})
    lora = name.removesuffix(".safetensors")
    family = _family_of(concept)
    imports, options = _loading(concept)
    loads = [
        f'pipeline.load_textual_inversion(folder, weight_name="{stem}.safetensors", token="{token}")\n'
        for token, stem in embeddings.items()
    ]
    if len(family.text_encoders) > 1:
        loads = [_load_word("folder", token, f"{stem}.safetensors", family) for token, stem in embeddings.items()]
        loads.append(END_OF_PROMPT)
        imports += FILE_IMPORT
    where = "or the name on the Hub" if len(family.text_encoders) == 1 else PATH
    names = ", ".join(f"`{stem}` for `{token}`" for token, stem in embeddings.items())
    return f"""`{name}` has what was learned of the attention, each other `.safetensors` one word. Both are needed.

| program | `{name}` goes to | the words go to | prompt |
|---|---|---|---|
| ComfyUI | `models/loras` (node Load LoRA; only the model's strength matters) | `models/embeddings` | `{comfy}` |
| AUTOMATIC1111, Forge | `models/Lora` | `embeddings` | `{plain} <lora:{lora}:1>` |
| InvokeAI | add both in the model manager | | `{invoke}`, with the LoRA switched on |

In these programs a word is called like its file: {names}. You may rename the files, but not to common words,
which would then always mean your concept, nor to names that end in anything but a letter or digit.

In Python, with `pip install peft`:

```python
from diffusers import DiffusionPipeline
{imports}
folder = "."  # {where}
pipeline = DiffusionPipeline.from_pretrained("{concept.base_model or "the base model"}"{options})
pipeline.load_lora_weights(folder, weight_name="{name}")
{"".join(loads)}image = pipeline("{prompt}", guidance_scale=6.0).images[0]
```
"""


def merged_card(merged: Concept, parts: Sequence[Part], settings: Mapping[str, object]) -> str:
    """The model card of the merged concept; ``settings`` are those of merging."""
    prompts = [f"photo of a {phrase}" for part in parts for phrase in part.phrases()]
    together = " and a ".join(phrase for part in parts for phrase in part.phrases())
    settings = {"concepts": ", ".join(Path(part.concept.source).name for part in parts), **settings}
    return model_card(merged, prompts, settings, f"a {together}", origin="merged")
