"""Hugging Face targets: a saved directory loads with inputs made from its configuration."""

from __future__ import annotations

import socket

import pytest
import torch

from kernel_pytorch.core import model_sources
from kernel_pytorch.core.targets import load_target
from kernel_pytorch.errors import TargetError

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
]

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
VISION = {"image_size": 32, "patch_size": 8, **SMALL}
MODELS = {
    "encoder": ("BertForSequenceClassification", "BertConfig", {"vocab_size": 100, "max_position_embeddings": 40}),
    "offset positions": ("RobertaModel", "RobertaConfig", {"vocab_size": 100, "max_position_embeddings": 34}),
    "decoder": ("LlamaForCausalLM", "LlamaConfig", {"vocab_size": 100}),
    "vision": ("ViTForImageClassification", "ViTConfig", {"image_size": 32, "patch_size": 8}),
    "convolution": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    ),
    "two towers": (
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {"vocab_size": 100, "max_position_embeddings": 20, "projection_dim": 16, **SMALL},
            "vision_config": {"projection_dim": 16, **VISION},
        },
    ),
    "waveform": (
        "Wav2Vec2Model",
        "Wav2Vec2Config",
        {
            "vocab_size": 20,
            "conv_dim": (16,) * 7,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2,
        },
    ),
    "spectrogram": ("ASTForAudioClassification", "ASTConfig", {"max_length": 64, "num_mel_bins": 32, "patch_size": 8}),
    "encoder-decoder": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4},
    ),
    "speech": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": 100,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_source_positions": 50,
            "max_target_positions": 30,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_model_runs_on_inputs_made_from_its_configuration(tmp_path, kind):
    model_name, config_name, fields = MODELS[kind]
    sizes = {} if kind in ("convolution", "two towers", "encoder-decoder", "speech") else SMALL
    model_class = getattr(transformers, model_name)
    saved = model_class(getattr(transformers, config_name)(**{**sizes, **fields}))
    saved.save_pretrained(tmp_path)
    workload = load_target(f"hf:{tmp_path}")
    model, call = workload.model(), workload.call("main", 0)
    assert type(model) is model_class
    assert not model.training
    name, tensor = next(iter(saved.state_dict().items()))
    assert torch.equal(model.state_dict()[name], tensor)
    with torch.no_grad():
        out = model(*call.args, **call.kwargs)
    assert all(torch.isfinite(x).all() for x in out.to_tuple() if isinstance(x, torch.Tensor))
    again, other = workload.call("main", 0), workload.call("main", 1)
    for name, x in call.kwargs.items():
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, again.kwargs[name])
            assert name == "attention_mask" or not torch.equal(x, other.kwargs[name])


def test_without_architectures_the_base_model_is_taken(tmp_path):
    config = transformers.BertConfig(vocab_size=100, **SMALL)
    transformers.BertModel(config).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"BertModel"', '"NoSuchModel"'))
    assert isinstance(load_target(f"hf:{tmp_path}").model(), transformers.BertModel)


@pytest.mark.parametrize(
    ("text", "says"), [("nonsense", "cannot be read"), ('{"model_type": "no_such_kind"}', "cannot be read")]
)
def test_a_directory_that_holds_no_model_is_told(tmp_path, text, says):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TargetError, match=says) as caught:
        load_target(f"hf:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_missing_weights_are_told_with_the_librarys_traceback(tmp_path):
    transformers.BertConfig(vocab_size=100, architectures=["BertModel"], **SMALL).save_pretrained(tmp_path)
    with pytest.raises(TargetError, match=r"loading hf:.* raised OSError"):
        load_target(f"hf:{tmp_path}").model()


def test_code_that_comes_with_a_model_needs_trust(tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "code.py").write_text(
        f"import pathlib\npathlib.Path({str(ran)!r}).write_text('')\n"
        "from transformers import PretrainedConfig\n"
        "class Mine(PretrainedConfig):\n    model_type = 'mine'\n"
    )
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}')
    with pytest.raises(TargetError, match="brings its own code") as caught:
        load_target(f"hf:{tmp_path}")
    assert "--trust-remote-code" in caught.value.fix
    assert not ran.exists()


def test_pickled_objects_in_weights_do_not_run(tmp_path):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (ran.write_text, ("ran",))

    transformers.BertConfig(vocab_size=100, architectures=["BertModel"], **SMALL).save_pretrained(tmp_path)
    torch.save({"embeddings": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(TargetError, match="loading hf:"):
        load_target(f"hf:{tmp_path}").model()
    assert not ran.exists()


def test_an_unreachable_hub_is_told_at_once(monkeypatch):
    def unresolved(*_args, **_kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(model_sources.socket, "getaddrinfo", unresolved)
    with pytest.raises(TargetError, match="cannot be reached") as caught:
        load_target("hf:nobody/no-such-model")
    assert "hf:DIR" in caught.value.fix
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TargetError, match="HF_HUB_OFFLINE is set"):
        load_target("hf:nobody/no-such-model")
