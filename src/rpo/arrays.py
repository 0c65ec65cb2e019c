"""Names for the tensors that cross a function boundary.

Axis legend (one letter, the same everywhere):

    b      samples of one network call       c h w  latent channels, height, width
    p      pairs                             l      tokens of a prompt
    n      draws of a pair                   d      width of a token's embedding
    t      timesteps of a noise schedule

Errors, losses and metrics are float32 whatever the network computes in.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

Latents = Float[Tensor, "b c h w"]
"""Latents, noise or a network's output, one row per sample."""
PairLatents = Float[Tensor, "p c h w"]
"""One latent-shaped tensor per pair."""
PairMaps = Float[Tensor, "p 1 h w"]
"""One number per place of a latent, per pair."""
Conditions = Mapping[str, Tensor]
"""What a network reads beside latents and noise level, by name, one row per sample. Of its prompts: `embeds` (b l d) and, where the family
has them, `pooled` (b d) and `mask` (b l). Of the image: `framing` (b 4), its own height and width and where it was cropped, top and left,
once it was resized; without it the image is taken to have always been of its size."""
Timesteps = Int[Tensor, " b"]
"""Integer timesteps, 0 = least noise."""
Levels = Int[Tensor, " b"] | Float[Tensor, " b"]
"""Noise levels as a network takes them: timesteps, or the noise's share of a mix, 0 to 1."""
PairTimesteps = Int[Tensor, " p"]
PerPair = Float[Tensor, " p"]
PairFlags = Bool[Tensor, " p"]
Schedule = Float[Tensor, " t"]
"""One value per timestep."""
Image = UInt8[np.ndarray, "h w 3"]
"""An RGB image."""
Images = UInt8[np.ndarray, "b h w 3"]
"""RGB images of one size."""
