"""The models of ``models.py``: toy sizes, random weights, from transformers, torchvision and timm; no downloads."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BATCHES = (1, 2, 7)
Case = tuple[nn.Module, tuple[Tensor, ...], Callable[..., Any]]
MODELS: dict[str, Callable[[], Case]] = {}


def model(needs: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Register a case under its function's name, if the library it ``needs`` is installed."""

    def register(make: Callable[[], Case]) -> Callable[[], Case]:
        if importlib.util.find_spec(needs) is not None:
            MODELS[make.__name__.replace("_", "-")] = make
        return make

    return register


def _tokens(length: int = 12, vocabulary: int = 96) -> Tensor:
    return torch.randint(3, vocabulary, (max(BATCHES), length))


def _sequence(tokens: Tensor, prefix: str = "") -> dict[str, Tensor]:
    """``tokens`` [batch, length], or [batch, length, width] embedded, under their name in transformers."""
    return {prefix + ("inputs_embeds" if tokens.is_floating_point() else "input_ids"): tokens}


def _logits(module: nn.Module) -> Callable[..., Tensor]:
    return lambda tokens: module(**_sequence(tokens), use_cache=False).logits


_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@model("transformers")
def bert() -> Case:
    from transformers import BertConfig, BertModel

    module = BertModel(BertConfig(**_SMALL))
    tokens = _tokens()
    mask = torch.arange(12) < torch.tensor([12, 5, 9, 12, 1, 7, 3])[:, None]
    return module, (tokens, mask), lambda t, m: module(**_sequence(t), attention_mask=m).last_hidden_state


@model("transformers")
def gpt2() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    module = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    return module, (_tokens(),), _logits(module)


@model("transformers")
def llama() -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    module = LlamaForCausalLM(LlamaConfig(**_SMALL, num_key_value_heads=2))
    return module, (_tokens(),), _logits(module)


@model("transformers")
def qwen3() -> Case:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    module = Qwen3ForCausalLM(Qwen3Config(**_SMALL, num_key_value_heads=2, head_dim=8))
    return module, (_tokens(),), _logits(module)


@model("transformers")
def mixtral() -> Case:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**_SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    module = MixtralForCausalLM(config)
    return module, (_tokens(),), _logits(module)


@model("transformers")
def t5() -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    module = T5ForConditionalGeneration(config)

    def call(tokens: Tensor, target: Tensor) -> Tensor:
        return module(**_sequence(tokens), **_sequence(target, "decoder_"), use_cache=False).logits

    return module, (_tokens(), _tokens(5)), call


@model("transformers")
def whisper() -> Case:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=96,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=16,
        max_source_positions=20,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    module = WhisperForConditionalGeneration(config)

    def call(features: Tensor, target: Tensor) -> Tensor:
        return module(input_features=features, **_sequence(target, "decoder_"), use_cache=False).logits

    return module, (torch.randn(max(BATCHES), 16, 40), _tokens(5)), call


@model("transformers")
def mamba() -> Case:
    from transformers import MambaConfig, MambaForCausalLM

    module = MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, state_size=4, num_hidden_layers=2))
    return module, (_tokens(),), _logits(module)


@model("transformers")
def vit_of_transformers() -> Case:
    from transformers import ViTConfig, ViTModel

    sizes = {k: v for k, v in _SMALL.items() if k != "vocab_size"}
    module = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False)
    return module, (_images(32),), lambda x: module(x).last_hidden_state


def _images(side: int) -> Tensor:
    return torch.randn(max(BATCHES), 3, side, side)


@model("torchvision")
def resnet18() -> Case:
    from torchvision.models import resnet18

    module = resnet18(num_classes=10)
    return module, (_images(64),), module


@model("torchvision")
def resnet50() -> Case:
    from torchvision.models import resnet50

    module = resnet50(num_classes=10)
    return module, (_images(64),), module


@model("torchvision")
def vit() -> Case:
    from torchvision.models import VisionTransformer

    module = VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10)
    return module, (_images(32),), module


@model("torchvision")
def convnext() -> Case:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    module = ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=10)
    return module, (_images(32),), module


@model("torchvision")
def mobilenet() -> Case:
    from torchvision.models import mobilenet_v3_small

    module = mobilenet_v3_small(num_classes=10)
    return module, (_images(64),), module


@model("torchvision")
def efficientnet() -> Case:
    from torchvision.models import efficientnet_b0

    module = efficientnet_b0(num_classes=10)
    return module, (_images(64),), module


@model("torchvision")
def swin() -> Case:
    from torchvision.models import SwinTransformer

    module = SwinTransformer([4, 4], 16, [1, 1], [2, 4], [4, 4], num_classes=10)
    return module, (_images(32),), module


@model("torchvision")
def densenet() -> Case:
    from torchvision.models import DenseNet

    module = DenseNet(8, (2, 2), 16, num_classes=10)
    return module, (_images(32),), module


def _timm(name: str, side: int = 64, **sizes: Any) -> Callable[[], Case]:
    """A model of timm on images of ``side``**2 pixels; with ``out_indices`` it ends after the last of those stages."""

    def make() -> Case:
        import timm

        if "out_indices" in sizes:
            module = timm.create_model(name, pretrained=False, features_only=True, **sizes)
            return module, (_images(side),), lambda x: module(x)[-1]
        module = timm.create_model(name, pretrained=False, num_classes=10, **sizes)
        return module, (_images(side),), module

    return make


#: One small member of each family, chosen for its ops, with what makes it cheap to compile.
_TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("deit_tiny_patch16_224", {"img_size": 64, "depth": 2}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4)},
    ),
    "xcit": ("xcit_nano_12_p16_224", {"img_size": 64, "depth": 1}),
    "eva02": ("eva02_tiny_patch14_224", {"side": 56, "img_size": 56, "depth": 1}),
    "beit": ("beit_base_patch16_224", {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 4}),
    "sequencer": (
        "sequencer2d_s",
        {
            "img_size": 64,
            "layers": (1, 1),
            "embed_dims": (32, 64),
            "hidden_sizes": (8, 16),
            "mlp_ratios": (3, 3),
            "patch_sizes": (7, 2),
        },
    ),
    "davit": ("davit_tiny", {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2)}),
    "pvt": ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}),
    "cait": ("cait_xxs24_224", {"img_size": 64, "depth": 1}),
    "edgenext": ("edgenext_xx_small", {"depths": (1, 2, 1, 1)}),
    "inception-next": ("inception_next_atto", {"depths": (1, 1, 1, 1)}),
    "fastvit": ("fastvit_t8", {"layers": (1, 1, 1, 1)}),
    "regnety": ("regnety_002", {"out_indices": (1, 2)}),
    "efficientnet": ("tf_efficientnet_b0", {"out_indices": (0, 1)}),
    "mobilenetv3": ("mobilenetv3_small_050", {"out_indices": (0, 1, 2)}),
    "ghostnet": ("ghostnet_100", {"out_indices": (0, 1)}),
    "mobileone": ("mobileone_s0", {"out_indices": (0, 1)}),
    "mobilevit": ("mobilevit_xxs", {"out_indices": (2, 3)}),
    "resnest": ("resnest14d", {"out_indices": (0, 1)}),
    "res2net": ("res2net50_14w_8s", {"layers": (1, 1, 1, 1), "out_indices": (0, 1, 2)}),
    "skresnet": ("skresnet18", {"layers": (1, 1, 1, 1), "out_indices": (0, 1, 2)}),
    "gcresnet": ("gcresnext26ts", {"out_indices": (0, 1)}),
    "halonet": ("halonet26t", {"side": 256, "out_indices": (2, 3)}),
    "lambda": ("lambda_resnet26t", {"out_indices": (2, 3)}),
    "nfnet": ("nfnet_l0", {"out_indices": (0, 1)}),
    "dpn": ("dpn48b", {"out_indices": (0, 1)}),
}
if importlib.util.find_spec("timm") is not None:
    MODELS |= {f"timm-{family}": _timm(name, **sizes) for family, (name, sizes) in _TIMM.items()}


@model("timm")
def timm_mixer() -> Case:
    from timm.models.mlp_mixer import MlpMixer

    module = MlpMixer(num_classes=10, img_size=64, patch_size=16, num_blocks=2, embed_dim=32)
    return module, (_images(64),), module


@model("timm")
def timm_convmixer() -> Case:
    from timm.models.convmixer import ConvMixer

    module = ConvMixer(32, 2, kernel_size=7, patch_size=7, num_classes=10)
    return module, (_images(56),), module


@model("timm")
def timm_poolformer() -> Case:
    from timm.models.metaformer import MetaFormer, Pooling

    module = MetaFormer(num_classes=10, depths=(1, 1), dims=(16, 32), token_mixers=Pooling)
    return module, (_images(32),), module


@model("timm")
def timm_volo() -> Case:
    from timm.models.volo import VOLO

    module = VOLO(
        [1, 1],
        img_size=64,
        num_classes=10,
        embed_dims=[32, 64],
        num_heads=[2, 4],
        downsamples=(True, False),
        outlook_attention=(True, False),
        mlp_ratio=2.0,
        stem_hidden_dim=16,
    )
    return module, (_images(64),), module


@model("timm")
def timm_focalnet() -> Case:
    from timm.models.focalnet import FocalNet

    module = FocalNet(num_classes=10, embed_dim=16, depths=(1, 1), focal_levels=(2, 2), focal_windows=(3, 3))
    return module, (_images(32),), module
