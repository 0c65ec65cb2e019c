"""The embedded architectures: every word is one token, a saved recogniser reads the same, training can be killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rpo.errors import RpoError
from rpo.shapes import networks
from rpo.shapes.recognition import CELL, Recogniser, decode, to_pixels
from rpo.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, VOCABULARY, caption, random_scene
from rpo.shapes.training.fit import fit
from rpo.shapes.training.recognizer import degrade, labelled_pictures, recogniser_loss


def test_every_word_is_one_token() -> None:
    words = networks.tokenizer()
    for word in VOCABULARY:
        assert len(words(word).input_ids) == 3, word
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = caption(random_scene(rng))
        assert len(words(text).input_ids) == len(text.split()) + 2
        assert words.decode(words(text).input_ids, skip_special_tokens=True).strip() == text


def test_a_network_begins_with_saved_weights_and_every_word_keeps_its_row(tmp_path: Path) -> None:
    words = networks.tokenizer()
    saved, begun = networks.text_encoder(words), networks.text_encoder(words)
    saved.save_pretrained(tmp_path)
    table = json.loads(words.backend_tokenizer.to_str())
    vocabulary = table["model"]["vocab"]  # as another world had it: "small" and "large" stood for each other, and "cyan" was unknown
    vocabulary["small</w>"], vocabulary["large</w>"] = vocabulary["large</w>"], vocabulary["small</w>"]
    vocabulary["teal</w>"] = vocabulary.pop("cyan</w>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    name = next(name for name in saved.state_dict() if name.endswith("token_embedding.weight"))
    rows, fresh = saved.state_dict()[name].clone(), begun.state_dict()[name].clone()
    networks.begin(begun, tmp_path, tmp_path)
    now, at = begun.state_dict()[name], words.get_vocab()
    assert torch.equal(now[at["small</w>"]], rows[at["large</w>"]]) and torch.equal(now[at["large</w>"]], rows[at["small</w>"]])
    assert torch.equal(now[at["blue</w>"]], rows[at["blue</w>"]]) and torch.equal(now[at["cyan</w>"]], fresh[at["cyan</w>"]])
    others = [key for key in saved.state_dict() if key != name]
    assert all(torch.equal(begun.state_dict()[key], saved.state_dict()[key]) for key in others)


def test_a_network_with_room_for_a_source_begins_as_one_without(tmp_path: Path) -> None:
    saved, begun = networks.unet(networks.LATENT_CHANNELS), networks.unet(2 * networks.LATENT_CHANNELS)
    saved.save_pretrained(tmp_path)
    networks.begin(begun, tmp_path)
    latents, words = torch.randn(2, networks.LATENT_CHANNELS, 8, 8), torch.randn(2, networks.MAX_TOKENS, 128)
    with torch.no_grad():
        wanted = saved.eval()(latents, 500, words).sample
        seen = torch.cat([latents, torch.randn_like(latents)], 1)
        assert torch.allclose(begun.eval()(seen, 500, words).sample, wanted, atol=1e-5)


def test_words_have_the_same_numbers_in_every_process() -> None:
    code = "from rpo.shapes.networks import tokenizer; print(sorted(tokenizer().get_vocab().items(), key=lambda item: item[1]))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    told = set()
    for seed in ("1", "2"):
        told.add(subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout)
    assert len(told) == 1


def test_unknown_words_are_spelled() -> None:
    assert len(networks.tokenizer()("zebra!").input_ids) > 5


def truth_as_output(count: int):
    """What a perfect recogniser would answer, as logits."""
    data = labelled_pictures(count, seed=3)
    heat = torch.full((count, 1, 8, 8), -9.0)
    out = {field: torch.zeros(count, n, 8, 8) for field, n in (("shape", 4), ("color", 6), ("size", 2), ("offset", 2))}
    for i in range(count):
        for x, y, shape, color, size, present in data.things[i].tolist():
            if not present:
                continue
            column, row = int(x // CELL), int(y // CELL)
            heat[i, 0, row, column] = 9.0
            for field, value in (("shape", shape), ("color", color), ("size", size)):
                out[field][i, int(value), row, column] = 9.0
            out["offset"][i, :, row, column] = torch.tensor([x / CELL - column - 0.5, y / CELL - row - 0.5])
    background = nn.functional.one_hot(data.background, 3) * 9.0
    return data, {"heat": heat, "background": background, **out}


def test_decode_reads_the_truth() -> None:
    data, out = truth_as_output(50)
    for i, view in enumerate(decode(out)):
        told = sorted((s.thing, round(s.x, 2), round(s.y, 2)) for s in view.things)
        rows = [row for row in data.things[i].tolist() if row[5]]
        drawn = sorted(((SIZES[int(r[4])], COLORS[int(r[3])], SHAPES[int(r[2])]), round(r[0], 2), round(r[1], 2)) for r in rows)
        assert [((t.size, t.color, t.shape), x, y) for t, x, y in told] == sorted(drawn)
        assert view.background == BACKGROUNDS[int(data.background[i])]


def test_the_loss_prefers_the_truth() -> None:
    data, out = truth_as_output(20)
    wrong = {**out, "shape": out["shape"].roll(1, 1)}
    assert recogniser_loss(out, data.things, data.background) < recogniser_loss(wrong, data.things, data.background)


@pytest.mark.parametrize("kind", ["plain", "residual", "depthwise"])
def test_a_saved_recogniser_reads_the_same(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Recogniser(kind, grades_quality=kind == "depthwise").eval()
    network.save(tmp_path)
    images = list(labelled_pictures(4, seed=0).images)
    loaded = Recogniser.load(tmp_path)
    with torch.no_grad():
        before, after = network(to_pixels(images)), loaded(to_pixels(images))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.allclose(value, after[key].float(), atol=0.05)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="64x64"):
        to_pixels([np.zeros((32, 32, 3), dtype=np.uint8)])


def test_no_strength_no_blemish() -> None:
    pixels = to_pixels(list(labelled_pictures(4, seed=0).images))
    clean = degrade(pixels, torch.zeros(4), torch.Generator().manual_seed(0))
    strong = degrade(pixels, torch.ones(4), torch.Generator().manual_seed(0))
    assert (clean - pixels).abs().mean() < 0.01 < (strong - pixels).abs().mean()


def lesson(network: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 4, generator=generator)
    return (network(x) - x.sum(1, keepdim=True)).square().mean()


def test_fit_resumes_to_the_same_bits(tmp_path: Path) -> None:
    def run(folder: Path, stop_at: int | None) -> nn.Linear:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        network = nn.Linear(4, 1)

        def loss(step: int) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            return lesson(network, step)

        fit("toy", {"network": network}, loss, steps=60, lr=0.2, warmup_steps=5, folder=folder, checkpoint_every_s=0.0)
        return network

    whole = run(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 33)
    resumed = run(tmp_path / "cut", None)
    assert torch.equal(whole.weight, resumed.weight) and torch.equal(whole.bias, resumed.bias)
    assert (whole.weight - 1).abs().max() < 0.3, "it learned the sum"


def test_fit_refuses_another_length(tmp_path: Path) -> None:
    network = nn.Linear(4, 1)
    fit("toy", {"network": network}, lambda step: lesson(network, step), steps=3, lr=0.05, folder=tmp_path)
    with pytest.raises(RpoError, match="3 steps"):
        fit("toy", {"network": network}, lambda step: lesson(network, step), steps=4, lr=0.05, folder=tmp_path)
