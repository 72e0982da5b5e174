"""The embedded scorer, untrained: pictures, captions, training, the folder; and trained."""

import random
from dataclasses import replace

import pytest
import torch
from PIL import Image

from diffaccel.pipelines import embedded
from diffaccel.quality.objectives import PromptMatch, objective_named


@pytest.fixture(scope="module")
def vocabulary(cast):
    """Five objects, of two drawings."""
    rocket, apple = (actor.thing for actor in cast)
    others = [replace(rocket, names=(name,)) for name in ("star", "key", "cat")]
    return (rocket, apple, *others)


@pytest.fixture
def scorer(vocabulary):
    from embedded.image.train import words_of
    from embedded.scorer.model import Scorer

    torch.manual_seed(0)
    return Scorer(words_of(vocabulary)).eval()


def test_four_scenes_differ_in_one_respect_or_two(vocabulary):
    from embedded.scorer.pictures import scenes_in_fours

    for seed in range(30):
        first, second, third, fourth = scenes_in_fours(random.Random(seed), vocabulary)
        shown = [[p.thing for p in scene.objects] for scene in (first, second, third, fourth)]
        places = [[(p.x, p.y, p.size) for p in s.objects] for s in (first, second, third, fourth)]
        assert all(place == places[0] for place in places)
        assert second.background == first.background != fourth.background
        assert fourth.background.names != first.background.names and shown[3] == shown[0]
        if len(shown[0]) == 1:
            assert shown[1] == shown[2] != shown[0] and third.background == fourth.background
        else:
            assert shown[1] == shown[0][::-1] and third.background == first.background
            assert sum(a != b for a, b in zip(shown[0], shown[2], strict=True)) == 1


def test_captions_say_something_and_whether_they_tell_the_ground(vocabulary):
    from embedded.scorer.pictures import fitting, scenes_in_fours, told_caption

    rng = random.Random(1)
    scenes = list(scenes_in_fours(rng, vocabulary))
    told = [told_caption(rng, vocabulary, scene) for scene in scenes * 10]
    assert all(text for text, _ in told)
    grounds = [any(name in text for name in s.background.names)
               for (text, _), s in zip(told, scenes * 10, strict=True)]  # fmt: skip
    assert grounds == [tells for _, tells in told] and 0 < sum(grounds) < 40

    fits = fitting(scenes, [True] * 4)
    assert torch.equal(fits, torch.eye(4, dtype=torch.bool))
    assert fitting(scenes, [False] * 4)[0, 3]  # the same objects elsewhere


def test_loss_leaves_out_other_fitting_pairs(embedded):
    from embedded.scorer.train import contrastive_loss

    logits = torch.tensor([[4.0, 9.0], [9.0, 4.0]])
    apart = contrastive_loss(logits, torch.eye(2, dtype=torch.bool))
    torch.testing.assert_close(apart, torch.nn.functional.softplus(torch.tensor(5.0)))
    assert contrastive_loss(logits, torch.ones(2, 2, dtype=torch.bool)) == 0


def test_worn_pictures_keep_range_and_content(embedded):
    from embedded.scorer.pictures import worn

    torch.manual_seed(0)
    pictures = torch.rand(40, 3, 1, 1).expand(40, 3, 64, 64) * 2 - 1
    changed = worn(pictures)
    assert changed.abs().max() <= 1 and (changed != pictures).any()
    assert (changed.mean((2, 3)) - pictures[..., 0, 0]).abs().max() < 0.35


@pytest.mark.slow
def test_steps_lower_the_loss_of_a_batch(scorer, vocabulary):
    from embedded.scenes import render
    from embedded.scorer.pictures import scenes_in_fours
    from embedded.scorer.train import ScorerTraining, optimisers_of, train_on

    rng = random.Random(2)
    scenes = [scene for _ in range(3) for scene in scenes_in_fours(rng, vocabulary)]
    pictures = torch.stack([torch.tensor(render(vocabulary, s, 64)) for s in scenes])
    optimisers = optimisers_of(scorer, ScorerTraining(minutes=1.0))
    trained = {id(w) for o in optimisers for group in o.param_groups for w in group["params"]}
    assert trained == {id(weight) for weight in scorer.parameters()}
    losses = []
    for _ in range(12):
        torch.manual_seed(0)
        scorer.zero_grad(set_to_none=True)
        losses.append(train_on(scorer, random.Random(0), vocabulary, pictures, scenes)["loss"])
        for optimiser in optimisers:
            optimiser.step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_training_resumes_from_its_checkpoint(vocabulary, tmp_path):
    from embedded.scorer.pictures import draw_pictures
    from embedded.scorer.train import ScorerTraining, train_scorer

    draw_pictures(vocabulary, 0, tmp_path, groups=3)
    steps = []
    for minutes in (0.004, 0.012):
        settings = ScorerTraining(minutes, chunks=1, groups=3, batch_groups=2, save_every=1)
        weights = train_scorer(vocabulary, settings, tmp_path)
        steps.append(torch.load(weights, weights_only=True)["step"])
        weights.unlink()
    assert 1 <= steps[0] < steps[1]


def test_export_loads_as_a_scorer(scorer, vocabulary, tmp_path):
    from embedded.scorer.evaluate import evaluate_scorer
    from embedded.scorer.export import export_scorer, write_scorer_card

    export_scorer(scorer, tmp_path)
    match = PromptMatch(tmp_path)
    assert match._model.dtype == torch.float32
    pictures = [Image.new("RGB", (256, 256), colour) for colour in ("red", "blue")]
    prompts = ["a rocket on a red background", "a red apple"]
    values = torch.tensor([[1.0, -1, -1], [-1, -1, 1.0]])[..., None, None].expand(-1, -1, 64, 64)
    with torch.no_grad():
        expected = scorer(values, prompts) / scorer.clip.logit_scale.exp()
    found = torch.tensor(match(pictures, prompts))
    torch.testing.assert_close(found, expected.diagonal(), atol=5e-3, rtol=2e-2)

    figures = evaluate_scorer(match, vocabulary, tmp_path / "out", count=4)
    assert figures["prompts"] == 4 and (tmp_path / "out" / "scorer.json").exists()
    assert all(0 <= value <= 1 for name, value in figures.items() if name != "prompts")
    training = {"minutes": 1.0, "step": 5, "batch": 8, "pictures": 12, "objects": 5}
    write_scorer_card(tmp_path, scorer, figures, training)
    card = (tmp_path / "README.md").read_text()
    assert "{" not in card and "5 steps of 8 pairs" in card


@pytest.mark.skipif(
    not embedded.EMBEDDED_SCORER.is_dir(), reason="the embedded scorer is not made"
)
def test_embedded_scorer_knows_colours():
    match = objective_named("prompt-match", scorer=embedded.EMBEDDED_SCORER)
    pictures = [Image.new("RGB", (256, 256), colour) for colour in ("#d63031", "#427cde")]
    prompts = ["a red background", "a blue background"]
    right, wrong = match(pictures, prompts), match(pictures, prompts[::-1])
    assert sum(right) > sum(wrong)
