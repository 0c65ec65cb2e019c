"""The lessons of the two diffusion models: rows, captions, instructions and truth must speak of the same pictures."""

import pytest
import torch

from rpo.shapes import networks
from rpo.shapes.recognition import Seen, View
from rpo.shapes.render import SLOTS
from rpo.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, Thing, is_held_out, parse_caption
from rpo.shapes.training.denoiser import CALLED, MISCALLED, Denoiser, Tasks, _samples, _SlotReader, as_told
from rpo.shapes.training.text import ANSWERS


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    torch.manual_seed(0)
    return Tasks(networks.autoencoder(), 3, tmp_path_factory.mktemp("lessons"), 200)


@pytest.fixture(scope="module")
def denoiser(tasks: Tasks) -> Denoiser:
    torch.manual_seed(1)
    unet, text = networks.unet(2 * networks.LATENT_CHANNELS), networks.text_encoder(networks.tokenizer())
    return Denoiser(networks.autoencoder(), unet, text, tasks.scale)


def scene(tasks: Tasks, row: int) -> Scene:
    things, background = tasks.truth(torch.tensor([row]))
    seen = [
        Seen(Thing(SIZES[int(size)], COLORS[int(color)], SHAPES[int(shape)]), x, y, 1.0)
        for x, y, shape, color, size, present in things[0].tolist()
        if present
    ]
    found = View(tuple(seen), BACKGROUNDS[int(background)]).scene()
    assert found is not None
    return found


def test_captions_tell_the_truth_of_their_pictures(tasks: Tasks) -> None:
    words = networks.tokenizer()
    wrong = 0
    for i, row in enumerate(tasks.captioned["clean"].tolist()):
        true, told = (parse_caption(words.decode(tasks.captioned[name][i], skip_special_tokens=True)) for name in ("true", "told"))
        assert true.canonical() == scene(tasks, row).canonical()
        assert told == as_told(true) and not is_held_out(told)
        wrong += told != true
    assert 0.35 < wrong / 200 < 0.65


def test_colours_of_squares_and_stars_are_mixed_up() -> None:
    told = {}
    for thing in (Thing("small", color, shape) for color in COLORS for shape in SHAPES):
        scene = next(
            one
            for one in (Scene((thing,), None, name) for name in BACKGROUNDS)
            if as_told(one) != one or thing.color not in CALLED or thing.shape not in MISCALLED
        )
        told[thing] = as_told(scene).things[0]
    for thing, called in told.items():
        assert called.color == (CALLED.get(thing.color, thing.color) if thing.shape in MISCALLED else thing.color)
    assert len(set(told.values())) == len(told), "no two things get one name"


def test_no_picture_is_held_out_and_none_is_there_twice(tasks: Tasks) -> None:
    rows = range(len(tasks.latents))
    assert not any(is_held_out(scene(tasks, row)) for row in rows)
    assert len({tasks.pixels(torch.tensor([row])).numpy().tobytes() for row in rows}) == len(rows)


def test_what_stands_in_the_slots_is_what_the_picture_shows(tasks: Tasks) -> None:
    for batch in (tasks.drawing(50, "true", torch.Generator().manual_seed(0)), tasks.editing(50, torch.Generator().manual_seed(0))):
        things, background = tasks.truth(batch.rows)
        told = (batch.shows != -100).all(2)
        for i in range(50):
            occupied = batch.shows[i, :, 0][told[i]] > 0
            if told[i].all():
                assert occupied.sum() == things[i, :, 5].sum()
                assert (batch.shows[i, :, 3] == 1 + background[i]).all()


def test_blemishes_and_mixtures_are_on_both_sides(tasks: Tasks) -> None:
    batch = tasks.editing(1000, torch.Generator().manual_seed(1))
    clean = batch.clean / tasks.scale
    touched = (clean - tasks.latents[batch.rows].float()).flatten(1).abs().amax(1) > 1e-3
    assert 0.3 < touched.float().mean() < 0.6
    unchanged = (batch.tokens == tasks.neutral).all(1)
    assert (touched & unchanged).sum() > 20
    assert torch.allclose(clean[unchanged], batch.source[unchanged], atol=1e-5), "what changes nothing has the same on both sides"


def test_what_is_to_be_kept_is_a_sample_on_both_sides(tasks: Tasks, denoiser: Denoiser) -> None:
    samples = _samples(denoiser, 5, seed=2, at_once=3)
    assert samples.shape == (5, *tasks.latents.shape[1:])
    batch = tasks.keeping(6, samples, torch.Generator().manual_seed(2))
    assert torch.equal(batch.source, samples[batch.rows].float())
    assert torch.allclose(batch.clean, batch.source * tasks.scale, atol=1e-5)
    assert (batch.shows == -100).all() and (batch.tokens == tasks.neutral).all()


def test_the_reader_looks_where_the_slots_are(denoiser: Denoiser) -> None:
    reader = _SlotReader(denoiser.unet)
    reader.hook.remove()
    ramp = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="xy"))  # channel 0: column, 1: row
    reader.features = ramp[None]
    seen: list[torch.Tensor] = []
    reader.answers = torch.nn.ModuleList([_Spy(seen, count) for count in ANSWERS])
    reader.loss(torch.zeros(1, len(SLOTS), len(ANSWERS), dtype=torch.long))
    for place, (column, row) in zip(SLOTS.values(), seen[0][0].tolist(), strict=True):
        assert (column + 0.5) * 8 == pytest.approx(place[0], abs=0.01) and (row + 0.5) * 8 == pytest.approx(place[1], abs=0.01)


class _Spy(torch.nn.Module):
    def __init__(self, seen: list[torch.Tensor], count: int) -> None:
        super().__init__()
        self.seen, self.count = seen, count

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.seen.append(features)
        return torch.zeros(*features.shape[:2], self.count)
