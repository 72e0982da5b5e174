"""Searching heads: it finds what was planted, goes on where it stopped, and refuses nonsense."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel import HeadPerturbation, set_guidance
from diffaccel.cli import main
from diffaccel.cli.heads import chosen_objective
from diffaccel.cli.options.heads_options import SearchOptions
from diffaccel.errors import InputError
from diffaccel.guidance.head_search.search import (
    SearchSettings,
    SearchState,
    held_out_scores,
    search_heads,
)
from diffaccel.pipelines import embedded
from diffaccel.quality.objectives import (
    Similarity,
    brightness,
    colourfulness,
    darkness,
    objective_named,
    saturation,
    sharpness,
)

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS, SEEDS = ("a", "b"), (0, 1)


@pytest.fixture
def tiny(tiny_pipelines):
    return tiny_pipelines.flux()


def drawing(tiny, log=None):
    """Draws with the tiny pipeline: the first three latent channels as a picture."""

    def draw(prompts, seeds):
        pictures = []
        for seed in seeds:
            if log is not None:
                log.append(seed)
            values = tiny.sample(seed).flatten()[: 16 * 12 * 3].sigmoid() * 255
            pixels = values.reshape(12, 16, 3).numpy().astype(np.uint8)
            pictures.append(Image.fromarray(pixels))
        return pictures

    return draw


def planted(tiny, heads):
    """An objective that is highest with some heads: the likeness of what they draw."""
    draw = drawing(tiny)
    with set_guidance(tiny.pipe, HeadPerturbation(heads=heads)):
        wanted = dict(zip(SEEDS, draw(PROMPTS, SEEDS), strict=True))

    def objective(pictures, prompts):
        pairs = zip(pictures, wanted.values(), strict=True)
        return [Similarity(reference)([picture], ["?"])[0] for picture, reference in pairs]

    return objective


def settings(**changes):
    return replace(SearchSettings("planted", PROMPTS, SEEDS, per_round=1), **changes)


@pytest.mark.parametrize("head", [(0, 1), (3, 0)])
@pytest.mark.slow
def test_it_finds_the_planted_head(tiny, head):
    state = search_heads(tiny.pipe, drawing(tiny), planted(tiny, (head,)), settings())
    assert state.chosen == [head]
    assert state.rounds[0][head] == 0.0 > state.unguided
    assert state.perturbation() == HeadPerturbation(heads=(head,))
    assert not tiny.pipe.transformer._forward_hooks


@pytest.mark.slow
def test_rounds_add_heads_and_never_pick_one_twice(tiny):
    state = search_heads(tiny.pipe, drawing(tiny), brightness, settings(rounds=3, per_round=2))
    assert len(set(state.chosen)) == 6
    assert [len(scores) for scores in state.rounds] == [8, 6, 4]


@pytest.mark.slow
def test_an_interrupted_search_goes_on(tiny, tmp_path):
    file, log = tmp_path / "heads.json", []

    def failing(pictures, prompts):
        if len(log) >= 9:
            raise KeyboardInterrupt
        return brightness(pictures, prompts)

    with pytest.raises(KeyboardInterrupt):
        search_heads(tiny.pipe, drawing(tiny, log), failing, settings(rounds=2), file=file)
    kept = SearchState.load(file)
    assert kept.unguided is not None and len(kept.rounds[0]) == 3
    again = []
    state = search_heads(
        tiny.pipe, drawing(tiny, again), brightness, settings(rounds=2), file=file
    )
    assert len(again) == 2 * (8 - 3 + 7)
    assert state == search_heads(tiny.pipe, drawing(tiny), brightness, settings(rounds=2))
    assert SearchState.load(file) == state
    assert HeadPerturbation.load(file) == state.perturbation()


def test_a_file_of_another_search_is_kept(tiny, tmp_path):
    file = tmp_path / "heads.json"
    search_heads(tiny.pipe, drawing(tiny), brightness, settings(layers=(1,)), file=file)
    before = file.read_text()
    with pytest.raises(InputError, match="another file"):
        search_heads(tiny.pipe, drawing(tiny), brightness, settings(layers=(2,)), file=file)
    assert file.read_text() == before


@pytest.mark.parametrize("scores", [[float("nan"), 1.0], [float("inf")] * 2, [1.0], []])
def test_objectives_must_return_numbers(tiny, tmp_path, scores):
    with pytest.raises(InputError, match="finite number"):
        search_heads(tiny.pipe, drawing(tiny), lambda *_: scores, settings())


def test_more_heads_than_there_are(tiny):
    with pytest.raises(InputError, match="can choose 2 heads here, got per_round"):
        search_heads(tiny.pipe, drawing(tiny), brightness, settings(layers=(0,), per_round=3))
    with pytest.raises(InputError, match="layers must lie in 0 to 3"):
        search_heads(tiny.pipe, drawing(tiny), brightness, settings(layers=(7,)))
    with pytest.raises(InputError, match="a seed for each"):
        SearchSettings("x", PROMPTS, (1,))


@pytest.mark.slow
def test_held_out_prompts_are_scored_with_and_without(tiny):
    state = search_heads(tiny.pipe, drawing(tiny), brightness, settings())
    plain, guided = held_out_scores(
        tiny.pipe, drawing(tiny), brightness, state, ("c", "d", "e"), (7, 8, 9)
    )
    assert len(plain) == len(guided) == 3 and plain != guided


# Objectives


def flat(*colour):
    return Image.new("RGB", (32, 32), colour)


def test_objectives_measure_what_they_say():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    assert sharpness([noise], [""])[0] > 0.2 > sharpness([flat(9, 9, 9)], [""])[0] == 0
    assert brightness([flat(255, 255, 255), flat(0, 0, 0)], ["", ""]) == pytest.approx([1, 0])
    assert darkness([flat(0, 0, 0)], [""]) == pytest.approx([1])
    assert saturation([flat(255, 0, 0), flat(90, 90, 90)], ["", ""]) == pytest.approx([1, 0])
    assert colourfulness([flat(90, 90, 90)], [""]) == pytest.approx([0])
    assert colourfulness([noise], [""])[0] > 0.3
    near = Similarity(flat(100, 0, 0))([flat(100, 0, 0), flat(200, 0, 0)], ["", ""])
    assert near[0] == 0 > near[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beauty", "must be one of"),
        ("similarity", "--reference"),
        ("prompt-match", "--scorer"),
    ],
)
def test_unknown_objectives_are_refused(name, message, monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "EMBEDDED_SCORER", tmp_path / "none")
    with pytest.raises(InputError, match=message):
        chosen_objective(SearchOptions(objective=name))


def test_prompt_match_is_the_cosine_of_a_clip_model(tmp_path):
    folder = tiny_clip(tmp_path)
    scores = objective_named("prompt-match", scorer=str(folder))(
        [flat(250, 0, 0), flat(0, 0, 250)], ["red", "a red thing"]
    )
    assert len(scores) == 2 and all(-1 <= score <= 1 for score in scores)
    with pytest.raises(InputError, match="CLIP model"):
        objective_named("prompt-match", scorer=str(tmp_path / "none"))


def test_prompt_match_takes_the_embedded_scorer_by_default(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "EMBEDDED_SCORER", tiny_clip(tmp_path))
    match = chosen_objective(SearchOptions(objective="prompt-match"))
    assert len(match([flat(250, 0, 0)], ["red"])) == 1


def tiny_clip(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[EOS]": 1, "[UNK]": 2, "red": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    small["num_attention_heads"] = 2
    config = CLIPConfig(
        text_config={**small, "vocab_size": 4, "max_position_embeddings": 8, "eos_token_id": 1},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    ).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


# Command line

FAST = ["--steps", "1", "--layers", "4", "--scale", "2"]


@pytest.mark.slow
def test_search_show_and_apply(tmp_path, capsys):
    file, picture = tmp_path / "heads.json", tmp_path / "out.png"
    words = ["a red apple", "--objective", "darkness", "--per-round", "2"]
    words += ["--held-out", "a rocket", "-o", str(file), *FAST]
    assert main(["heads", "search", *words]) == 0
    assert "held out: darkness" in capsys.readouterr().out
    assert main(["heads", "search", *words]) == 0  # finished: nothing is drawn again
    assert main(["heads", "show", str(file)]) == 0
    assert "chosen heads: 4." in capsys.readouterr().out
    apply = ["heads", "apply", str(file), "a rocket", "--steps", "1", "-o", str(picture)]
    assert main(apply) == 0
    assert "1 of 1 steps" in capsys.readouterr().out
    assert Image.open(picture).size == (256, 256)


@pytest.mark.slow
def test_a_sheet_shows_every_head(tmp_path):
    path = tmp_path / "sheet.png"
    words = ["--sheet", "a rocket", "--steps", "1", "--layers", "0", "-o", str(path)]
    assert main(["heads", "show", *words]) == 0
    assert Image.open(path).size == (5 * 256, 256 + 22)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search", "x", "--objective", "beauty"], "--objective must be one of"),
        (["search", " ", "--objective", "darkness"], "prompts must not be empty"),
        (["search", "x", "--objective", "darkness", "--layers", "a"], "--layers must be integers"),
        (["search", "x", "--objective", "darkness", "--layers", "99"], "layers must lie in 0"),
        (["search", "x", "--objective", "darkness", "--scale", "0"], "--scale must be above 0"),
        (["search", "x", "--objective", "darkness", "--strength", "2"], "must be in (0, 1]"),
        (["search", "x", "--objective", "similarity", "--reference", "no.png"], "--reference"),
        (["show"], "needs a FILE"),
        (["show", "missing.json"], "a head file must be JSON"),
        (["apply", "missing.json", "x"], "a head file must be JSON"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_words_get_one_sentence(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["heads", *words]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert error.count("diffaccel: ") == 1 and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_heads_of_another_model_are_refused(tmp_path, capsys):
    file = tmp_path / "heads.json"
    file.write_text(json.dumps({"perturbation": {"heads": [[40, 0]], "strength": 1.0}}))
    out = tmp_path / "out.png"
    assert main(["heads", "apply", str(file), "a rocket", "-o", str(out)]) == 2
    assert "does not fit the model" in capsys.readouterr().err
    assert not out.exists()
