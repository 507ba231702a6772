"""(N, K) of the linear layers of the models that LLM-42 (arXiv 2601.17768) serves, weights as in nn.Linear."""

from __future__ import annotations

#: Model -> (hidden, rows of q, k and v together, columns of o, intermediate, vocabulary).
_MODELS = {
    "Llama-3-8B": (4096, 6144, 4096, 14336, 128256),
    "Llama-3-70B": (8192, 10240, 8192, 28672, 128256),
    "Qwen3-8B": (4096, 6144, 4096, 12288, 151936),
    "Qwen3-30B-A3B": (2048, 5120, 4096, 768, 151936),
}
#: Tensor-parallel degrees that are measured: N of qkv and gate-up, and K of o and down, are divided by them.
_DEGREES = {"Llama-3-8B": (1, 2, 4, 8), "Llama-3-70B": (1, 2, 4, 8)}
ROWS = tuple(2**exponent for exponent in range(14))
#: Router gates, LoRA and MLA projections: few columns, long K.
FEW_COLUMNS = tuple((n, k) for n in (128, 256, 512, 1024, 2048) for k in (4096, 8192, 16384))


def shapes() -> dict[tuple[int, int], str]:
    """(N, K) -> the first layer that has it, as "model layer TPdegree"."""
    found: dict[tuple[int, int], str] = {}
    for model, (hidden, qkv, heads, intermediate, vocabulary) in _MODELS.items():
        for degree in _DEGREES.get(model, (1,)):
            layers = {
                "qkv": (qkv // degree, hidden),
                "o": (hidden, heads // degree),
                "gate-up": (2 * intermediate // degree, hidden),
                "down": (hidden, intermediate // degree),
            }
            for layer, shape in layers.items():
                found.setdefault(shape, f"{model} {layer} TP{degree}")
        found.setdefault((vocabulary, hidden), f"{model} lm_head TP1")
    return found
