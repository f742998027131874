"""At least 40 architectures with tiny random weights: what "any model" is held to.

Each entry is a function without arguments that returns `(model, example_inputs)`, so that every one is also a
target: `kpt optimize benchmarks/architectures.py:bert`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ARCHITECTURES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {}


def listed(factory: Callable[[], tuple[nn.Module, Any]]) -> Callable[[], tuple[nn.Module, Any]]:
    """Add a factory to the suite under its own name."""
    ARCHITECTURES[factory.__name__] = factory
    return factory


# --- Hugging Face transformers -----------------------------------------------------------------------------------

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
DECODER = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0}
PATCHES = {
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def tokens(batch: int = 4, length: int = 16, vocab: int = 99) -> torch.Tensor:
    return torch.randint(3, vocab, (batch, length))


def images(batch: int = 2, size: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, size, size)


def from_config(kind: str, auto: str = "AutoModel", /, **settings: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **settings)
    return getattr(transformers, auto).from_config(config).eval()


def encoder(kind: str, **settings: Any) -> tuple[nn.Module, Any]:
    ids = tokens()
    return from_config(kind, **{**TEXT, **settings}), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def decoder(kind: str, auto: str = "AutoModelForCausalLM", **settings: Any) -> tuple[nn.Module, Any]:
    return from_config(kind, auto, **{**DECODER, **settings}), {"input_ids": tokens(), "use_cache": False}


@listed
def bert() -> tuple[nn.Module, Any]:
    return encoder("bert")


@listed
def roberta() -> tuple[nn.Module, Any]:
    return encoder("roberta")


@listed
def distilbert() -> tuple[nn.Module, Any]:
    return encoder("distilbert", dim=32, n_layers=2, n_heads=4, hidden_dim=64)


@listed
def albert() -> tuple[nn.Module, Any]:
    return encoder("albert", embedding_size=16)


@listed
def electra() -> tuple[nn.Module, Any]:
    return encoder("electra", embedding_size=16)


@listed
def deberta_v2() -> tuple[nn.Module, Any]:
    return encoder("deberta-v2", relative_attention=True, pos_att_type=["p2c", "c2p"])


@listed
def mpnet() -> tuple[nn.Module, Any]:
    return encoder("mpnet")


@listed
def modernbert() -> tuple[nn.Module, Any]:
    return encoder("modernbert", pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)


@listed
def gpt2() -> tuple[nn.Module, Any]:
    return decoder("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64)


@listed
def gpt_neox() -> tuple[nn.Module, Any]:
    return decoder("gpt_neox")


@listed
def opt() -> tuple[nn.Module, Any]:
    return decoder("opt", ffn_dim=64, word_embed_proj_dim=32)


@listed
def bloom() -> tuple[nn.Module, Any]:
    return decoder("bloom", n_layer=2, n_head=4)


@listed
def llama() -> tuple[nn.Module, Any]:
    return decoder("llama")


@listed
def mistral() -> tuple[nn.Module, Any]:
    return decoder("mistral", sliding_window=8)


@listed
def qwen2() -> tuple[nn.Module, Any]:
    return decoder("qwen2")


@listed
def qwen3() -> tuple[nn.Module, Any]:
    return decoder("qwen3", head_dim=8)


@listed
def gemma2() -> tuple[nn.Module, Any]:
    return decoder("gemma2", head_dim=8, query_pre_attn_scalar=8)


@listed
def phi() -> tuple[nn.Module, Any]:
    return decoder("phi")


@listed
def falcon() -> tuple[nn.Module, Any]:
    return decoder("falcon")


@listed
def mixtral_moe() -> tuple[nn.Module, Any]:
    return decoder("mixtral", num_local_experts=4, num_experts_per_tok=2)


@listed
def qwen2_moe() -> tuple[nn.Module, Any]:
    return decoder(
        "qwen2_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )


@listed
def mamba() -> tuple[nn.Module, Any]:
    return decoder("mamba", state_size=8, time_step_rank=4)


@listed
def mamba2() -> tuple[nn.Module, Any]:
    return decoder("mamba2", state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8)


@listed
def t5() -> tuple[nn.Module, Any]:
    model = from_config(
        "t5", vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return model, {"input_ids": tokens(), "decoder_input_ids": tokens(length=8), "use_cache": False}


@listed
def bart() -> tuple[nn.Module, Any]:
    model = from_config(
        "bart",
        vocab_size=99,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
    )
    return model, {"input_ids": tokens(), "decoder_input_ids": tokens(length=8), "use_cache": False}


@listed
def vit() -> tuple[nn.Module, Any]:
    return from_config("vit", **PATCHES), {"pixel_values": images()}


@listed
def beit() -> tuple[nn.Module, Any]:
    return from_config("beit", **PATCHES), {"pixel_values": images()}


@listed
def dinov2() -> tuple[nn.Module, Any]:
    return from_config("dinov2", **PATCHES), {"pixel_values": images()}


@listed
def swin() -> tuple[nn.Module, Any]:
    model = from_config(
        "swin", image_size=32, patch_size=2, embed_dim=16, depths=[1, 2], num_heads=[2, 2], window_size=4
    )
    return model, {"pixel_values": images()}


@listed
def convnext() -> tuple[nn.Module, Any]:
    return from_config("convnext", hidden_sizes=[16, 32], depths=[1, 1], num_stages=2), {"pixel_values": images()}


@listed
def resnet_hf() -> tuple[nn.Module, Any]:
    model = from_config("resnet", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    return model, {"pixel_values": images()}


@listed
def segformer() -> tuple[nn.Module, Any]:
    model = from_config(
        "segformer",
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        num_attention_heads=[1, 2],
        patch_sizes=[3, 3],
        strides=[2, 2],
        mlp_ratios=[2, 2],
    )
    return model, {"pixel_values": images()}


@listed
def whisper() -> tuple[nn.Module, Any]:
    model = from_config(
        "whisper",
        vocab_size=99,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=16,
        max_source_positions=32,
        max_target_positions=32,
        pad_token_id=0,
        decoder_start_token_id=1,
        bos_token_id=1,
        eos_token_id=2,
    )
    features = torch.randn(2, 16, 64)
    return model, {"input_features": features, "decoder_input_ids": tokens(2, 8), "use_cache": False}


@listed
def wav2vec2() -> tuple[nn.Module, Any]:
    model = from_config(
        "wav2vec2",
        **TEXT,
        conv_dim=[16, 16],
        conv_stride=[5, 4],
        conv_kernel=[10, 8],
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2,
        feat_extract_norm="layer",
    )
    return model, {"input_values": torch.randn(2, 800)}


@listed
def clip() -> tuple[nn.Module, Any]:
    text = {**TEXT, "projection_dim": 16, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    model = from_config("clip", text_config=text, vision_config={**PATCHES, "projection_dim": 16}, projection_dim=16)
    ids = tokens(2, 12)
    ids[:, -1] = 2
    return model, {"input_ids": ids, "pixel_values": images(), "attention_mask": torch.ones_like(ids)}


@listed
def siglip() -> tuple[nn.Module, Any]:
    text = {**TEXT, "projection_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = from_config("siglip", text_config=text, vision_config=PATCHES)
    return model, {"input_ids": tokens(2, 12), "pixel_values": images()}


@listed
def timm_resnet() -> tuple[nn.Module, Any]:
    import timm

    torch.manual_seed(0)
    return timm.create_model("resnet18", pretrained=False).eval(), images(2, 64)


@listed
def timm_mobilenet() -> tuple[nn.Module, Any]:
    import timm

    torch.manual_seed(0)
    return timm.create_model("mobilenetv3_small_050", pretrained=False).eval(), images(2, 64)


# --- plain torch.nn ----------------------------------------------------------------------------------------------


@dataclass
class Parts:
    """A dataclass output."""

    scores: torch.Tensor
    label: str


class Lambda(nn.Module):
    """A module that applies layers through a function."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def plain(function: Callable[..., Any], inputs: Any, **layers: nn.Module) -> tuple[nn.Module, Any]:
    return Lambda(function, **layers).eval(), inputs


@listed
def mlp() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 8)).eval(), torch.randn(32, 64)


@listed
def convolution_2d() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    block = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*block, nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(), images(4)


@listed
def convolution_1d() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(8, 16, 5), nn.GroupNorm(4, 16), nn.SiLU()).eval(), torch.randn(4, 8, 64)


@listed
def convolution_3d() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(2, 8, 3), nn.InstanceNorm3d(8), nn.ELU()).eval(), torch.randn(2, 2, 8, 8, 8)


@listed
def u_net() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        down = self.down(x).relu()
        inner = self.inner(nn.functional.max_pool2d(down, 2)).relu()
        return self.out(torch.cat([down, self.up(inner)], dim=1))

    return plain(
        forward,
        images(2),
        down=nn.Conv2d(3, 8, 3, padding=1),
        inner=nn.Conv2d(8, 16, 3, padding=1),
        up=nn.ConvTranspose2d(16, 8, 2, stride=2),
        out=nn.Conv2d(16, 1, 1),
    )


@listed
def lstm() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return nn.LSTM(16, 32, num_layers=2, batch_first=True, bidirectional=True).eval(), torch.randn(4, 12, 16)


@listed
def gru() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return plain(
        lambda self, ids: self.out(self.rnn(self.embed(ids))[0][:, -1]),
        tokens(),
        embed=nn.Embedding(99, 16),
        rnn=nn.GRU(16, 32, batch_first=True),
        out=nn.Linear(32, 5),
    )


@listed
def transformer_encoder() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(4, 10, 32)


@listed
def multihead_attention() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    x = torch.randn(4, 10, 32)
    return nn.MultiheadAttention(32, 4, batch_first=True).eval(), (x, x, x)


@listed
def embedding_bag() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return plain(
        lambda self, ids, offsets: self.out(self.bag(ids, offsets)),
        (torch.randint(0, 50, (20,)), torch.tensor([0, 5, 9, 14])),
        bag=nn.EmbeddingBag(50, 16, mode="sum"),
        out=nn.Linear(16, 3),
    )


@listed
def complex_spectrum() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return plain(lambda self, x: torch.fft.rfft(self.inner(x)), torch.randn(4, 32), inner=nn.Linear(32, 32))


@listed
def integer_output() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)

    def forward(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.inner(x)
        return scores, scores.argmax(-1)

    return plain(forward, torch.randn(16, 32), inner=nn.Linear(32, 10))


@listed
def no_parameters() -> tuple[nn.Module, Any]:
    return plain(lambda self, x: (x * 2).softmax(-1).cumsum(-1), torch.randn(8, 64))


@listed
def in_place_operations() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return plain(
        lambda self, x: self.out(self.inner(x).add_(1.0).clamp_(min=0.0).mul_(0.5)),
        torch.randn(8, 32),
        inner=nn.Linear(32, 64),
        out=nn.Linear(64, 4),
    )


@listed
def data_dependent_control_flow() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        steps = 0
        while y.norm() > 1.0 and steps < 8:
            y = y * 0.5
            steps += 1
        return y if y.sum() > 0 else -y

    return plain(forward, torch.randn(8, 32), inner=nn.Linear(32, 32))


@listed
def non_tensor_outputs() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return plain(
        lambda self, x: {"scores": self.inner(x), "count": x.shape[0], "name": "linear", "nothing": None},
        torch.randn(8, 32),
        inner=nn.Linear(32, 4),
    )


@listed
def dataclass_output() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return plain(lambda self, x: Parts(self.inner(x), "scores"), torch.randn(8, 32), inner=nn.Linear(32, 4))


@listed
def tied_weights() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model, inputs = plain(
        lambda self, ids: self.out(self.embed(ids).mean(1)),
        tokens(),
        embed=nn.Embedding(99, 32),
        out=nn.Linear(32, 99, bias=False),
    )
    model.out.weight = model.embed.weight
    return model, inputs


@listed
def weight_norm() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    norm = torch.nn.utils.parametrizations.weight_norm
    return nn.Sequential(norm(nn.Linear(32, 64)), nn.ReLU(), norm(nn.Linear(64, 8))).eval(), torch.randn(8, 32)


@listed
def random_output() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return plain(lambda self, x: self.inner(x) + 0.01 * torch.rand_like(x), torch.randn(8, 32), inner=nn.Linear(32, 32))


@listed
def graph_convolution() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)

    def forward(self: Any, nodes: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        messages = self.message(nodes)[edges[0]]
        gathered = torch.zeros_like(nodes).index_add(0, edges[1], messages)
        return self.out((nodes + gathered).relu())

    return plain(
        forward,
        (torch.randn(20, 16), torch.randint(0, 20, (2, 60))),
        message=nn.Linear(16, 16),
        out=nn.Linear(16, 4),
    )


@listed
def float64_model() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 2)).double().eval(), torch.randn(8, 16).double()


@listed
def bfloat16_model() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).bfloat16().eval(), torch.randn(
        8, 32
    ).bfloat16()
