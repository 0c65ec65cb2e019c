"""Rewards as judges."""

import numpy as np

from rpo.evaluate.judges import ScorerJudge


class Bright:
    def score(self, images: list[np.ndarray], prompts: list[str]) -> list[float]:
        return [float(image.mean()) for image in images]


class Embedding(Bright):
    def features(self, images: list[np.ndarray]) -> np.ndarray:
        return np.stack([image.mean((0, 1)) for image in images])


def test_a_reward_that_embeds_images_has_features_and_another_none() -> None:
    images = [np.full((4, 4, 3), level, dtype=np.uint8) for level in (10, 20)]
    assert ScorerJudge("bright", Bright()).measure(images, ["a", "b"]) == [{"bright": 10.0}, {"bright": 20.0}]
    assert ScorerJudge("bright", Bright()).features(images).shape == (2, 0)
    assert ScorerJudge("bright", Embedding()).features(images).tolist() == [[10.0] * 3, [20.0] * 3]
