"""The architectures of the embedded world: small, but of the same classes as the big ones."""

import json
from graphlib import TopologicalSorter
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rpo.shapes.render import SIDE
from rpo.shapes.scenes import VOCABULARY

LATENT_CHANNELS = 8
MAX_TOKENS = 32
"""Room for the longest pair of instructions, with its start and end; captions need less."""
_START, _END = "<|startoftext|>", "<|endoftext|>"


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows every word of the world as one token, and any other text by its letters."""
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    tokens = letters + [f"{letter}</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    # A word whose first two letters stand inside another word would break that one up, unless its merges come later.
    # Lists, not sets: the order of a set of strings is another one in every process, and so would the numbers of the words be.
    before = {word: [other for other in VOCABULARY if word[:2] in other[1:] and len(word) > 1] for word in VOCABULARY}
    for word in TopologicalSorter(before).static_order():
        parts = [*word[:-1], f"{word[-1]}</w>"]
        for i in range(1, len(parts)):
            merge = ("".join(parts[:i]), parts[i])
            if merge not in merges:
                merges.append(merge)
                tokens.append("".join(merge))
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, _START, _END]))}
    return CLIPTokenizer(
        vocab=vocab, merges=merges, bos_token=_START, eos_token=_END, unk_token=_END, pad_token=_END, model_max_length=MAX_TOKENS
    )


def text_config(words: CLIPTokenizer, layers: int = 2, width: int = 128) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=words.model_max_length,
        projection_dim=width,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def text_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(text_config(words))


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)


def unet(in_channels: int) -> UNet2DConditionModel:
    """`in_channels` is the latent's own for a generator, twice that for an InstructPix2Pix editor.

    The words also reach every block pooled, beside the timestep, which makes them felt early in training.
    """
    return UNet2DConditionModel(
        sample_size=SIDE // 8,
        in_channels=in_channels,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(96,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=128,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        attention_head_dim=4,
        norm_num_groups=16,
    ).to(memory_format=torch.channels_last)


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule with v-prediction, which has no division by almost nothing at the noisy end."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def begin(network: nn.Module, folder: Path, words: Path | None = None) -> None:
    """Gives a network the weights saved in `folder`.

    With the folder of their tokenizer, each word keeps its row, wherever the tokenizer has it now. Input channels that the saved
    network did not have begin at zero.
    """
    saved = {name: tensor.float() for name, tensor in load_file(next(folder.glob("*.safetensors"))).items()}
    for name, tensor in network.state_dict().items():
        if words is not None and name.endswith("token_embedding.weight"):
            was, rows = json.loads((words / "tokenizer.json").read_text())["model"]["vocab"], tensor.clone()
            for word, row in tokenizer().get_vocab().items():
                if word in was:
                    rows[row] = saved[name][was[word]]
            saved[name] = rows
        elif name.endswith("conv_in.weight") and tensor.shape[1] > saved[name].shape[1]:
            saved[name] = torch.cat([saved[name], torch.zeros_like(tensor[:, saved[name].shape[1] :])], 1)
    network.load_state_dict(saved)
