"""Models as people compile them, at toy sizes with random weights: do they compile, near eager, row for row?

    python benchmarks/models.py --csv benchmarks/results/models.csv [--only NAME ...] [--device cuda] [--stock]

For every model: the largest difference from eager (over the largest value), and how many rows change when the same
rows are computed at batch 1, 2 and 7 instead of 7 at once. What is refused is named. Transformers and torchvision
are used where they are installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timing import write_csv
from torch import Tensor, nn

from bi_inductor.testing import changed_rows_over_batches

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


def _first_output(module: nn.Module, **fixed: Any) -> Callable[..., Tensor]:
    return lambda *inputs: module(*inputs, **fixed)[0]


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
    mask = (torch.arange(12) < torch.tensor([12, 5, 9, 12, 1, 7, 3])[:, None]).long()
    return module, (tokens, mask), lambda t, m: module(t, attention_mask=m).last_hidden_state


@model("transformers")
def gpt2() -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    module = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    return module, (_tokens(),), _first_output(module, use_cache=False)


@model("transformers")
def llama() -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    module = LlamaForCausalLM(LlamaConfig(**_SMALL, num_key_value_heads=2))
    return module, (_tokens(),), _first_output(module, use_cache=False)


@model("transformers")
def qwen3() -> Case:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    module = Qwen3ForCausalLM(Qwen3Config(**_SMALL, num_key_value_heads=2, head_dim=8))
    return module, (_tokens(),), _first_output(module, use_cache=False)


@model("transformers")
def mixtral() -> Case:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**_SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "batched_mm"  # the default on a CPU is a custom op of the library
    module = MixtralForCausalLM(config)
    return module, (_tokens(),), _first_output(module, use_cache=False)


@model("transformers")
def t5() -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    module = T5ForConditionalGeneration(config)
    inputs = (_tokens(), _tokens(5))
    return module, inputs, lambda t, d: module(input_ids=t, decoder_input_ids=d, use_cache=False).logits


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
    inputs = (torch.randn(max(BATCHES), 16, 40), _tokens(5))
    return module, inputs, lambda f, d: module(input_features=f, decoder_input_ids=d, use_cache=False).logits


@model("transformers")
def mamba() -> Case:
    from transformers import MambaConfig, MambaForCausalLM

    module = MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, state_size=4, num_hidden_layers=2))
    return module, (_tokens(),), lambda t: module(t, use_cache=False).logits


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


def _timm(name: str, **sizes: Any) -> Callable[[], Case]:
    def make() -> Case:
        import timm

        module = timm.create_model(name, pretrained=False, num_classes=10, **sizes)
        return module, (_images(sizes.get("img_size", 64)),), module

    return make


if importlib.util.find_spec("timm") is not None:
    MODELS |= {
        f"timm-{name}": _timm(name)
        for name in ("resnet26d", "regnety_002", "tf_efficientnet_b0", "ghostnet_100", "mobileone_s0")
    }
    MODELS["timm-mixer"] = _timm("mixer_s32_224", img_size=64, num_blocks=2)
    MODELS["timm-deit"] = _timm("deit_tiny_patch16_224", img_size=64, depth=2)


@contextlib.contextmanager
def _seconds(result: dict[str, object]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    result["seconds"] = round(time.perf_counter() - start, 1)


def measure(name: str, device: str = "cpu", backend: str = "batchinv") -> dict[str, object]:
    """One row of the table: model, backend, difference from eager, rows compared, rows changed, refusal."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    result: dict[str, object] = dict.fromkeys(
        ("model", "backend", "device", "difference", "rows", "changed", "seconds", "refused"), ""
    )
    result |= {"model": name, "backend": backend, "device": device, "torch": torch.__version__}
    with _seconds(result):
        try:
            result |= _compare(name, device, backend)
        except Exception as error:
            result["refused"] = f"{type(error).__name__}: {error}"
            if not result["refused"].startswith("BatchInvariance"):  # type: ignore[attr-defined]
                traceback.print_exc()
    return result


@torch.no_grad()
def _compare(name: str, device: str, backend: str) -> dict[str, object]:
    module, inputs, call = MODELS[name]()
    for parameter in module.parameters():  # some heads start at zero, and would show nothing
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    module.eval().to(device)
    inputs = tuple(x.to(device) for x in inputs)
    expected = call(*inputs)
    compiled = torch.compile(call, backend=backend, dynamic=True)
    actual = compiled(*inputs)
    changed = changed_rows_over_batches(compiled, inputs, BATCHES)
    difference = (actual - expected).abs().max() / expected.abs().max()
    return {"difference": f"{difference:.1e}", "rows": sum(changed), "changed": sum(changed.values())}


def main() -> int:
    """1 if any model was refused, or any of its rows changed, under our backend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=list(MODELS), help="names of models")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stock", action="store_true", help="stock Inductor beside ours")
    parser.add_argument("--csv")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only:
        for backend in ("batchinv", "inductor") if arguments.stock else ("batchinv",):
            rows.append(measure(name, arguments.device, backend))
            print({k: str(v)[:400] for k, v in rows[-1].items()}, flush=True)
    if arguments.csv:
        write_csv(arguments.csv, rows, f"python benchmarks/models.py --csv {arguments.csv}")
    return int(any(row["refused"] or row["changed"] for row in rows if row["backend"] == "batchinv"))


if __name__ == "__main__":
    sys.exit(main())
