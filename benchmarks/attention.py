"""Attention, bf16, 32 query heads, beside SDPA's flash and cuDNN kernels in one run.

    python benchmarks/attention.py --out benchmarks/results/attention.csv    # some minutes
    python benchmarks/attention.py --work training --groups 4 --rounds 10    # forward and backward alone, two minutes

``flash`` and ``cudnn`` are batchinv's time over theirs: below 1 is faster. Training has ``flash_deterministic``, too:
flash under ``torch.use_deterministic_algorithms``. ``floor_us`` is the larger of the products over the tensor cores'
rate and of one reading of q, k, v and one writing of the output over the memory's, both by the datasheet;
``of_floor`` is floor_us over batchinv's time.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import timing
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS = 32
#: Dense bf16 multiply-adds of an H100 or H200 SXM, in operations per second.
TENSOR_RATE = 989e12
DETERMINISTIC = "flash_deterministic"
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=True)


def training_step(attend: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, is_causal: bool) -> None:
    """Forward and backward; gradients go to ``.grad`` afresh."""
    for x in inputs:
        x.grad = None
    attend(*inputs, is_causal).backward(grad)


def prefill_cases() -> Iterator[dict[str, object]]:
    """Every length of one head dim, mask and group together: they share a compiled graph."""
    for head_dim, is_causal, group in itertools.product((64, 128), (True, False), (1, 4, 8)):
        for length in (2048, 512, 8192, 32768):
            yield {
                "work": "prefill", "batch": max(1, 8192 // length), "group": group, "head_dim": head_dim,
                "causal": is_causal, "queries": length, "keys": length,
            }  # fmt: skip


def decode_cases() -> Iterator[dict[str, object]]:
    for keys, batch in itertools.product((4096, 1024, 16384, 32768, 131072), (1, 4, 16, 64, 256)):
        if batch * keys <= 1 << 21:
            yield {
                "work": "decode", "batch": batch, "group": 4, "head_dim": 128, "causal": False, "queries": 1,
                "keys": keys,
            }  # fmt: skip


def training_cases() -> Iterator[dict[str, object]]:
    for group, head_dim, is_causal in itertools.product((4, 1), (128, 64), (True, False)):
        for length in (2048, 8192):
            yield {
                "work": "training", "batch": 8192 // length, "group": group, "head_dim": head_dim,
                "causal": is_causal, "queries": length, "keys": length,
            }  # fmt: skip


CASES = {"prefill": prefill_cases, "decode": decode_cases, "training": training_cases}


def inputs_of(case: dict[str, object]) -> list[Tensor]:
    """[B, H, L, D] views of [B, L, H, D], as a projection leaves them; caches are [B, H, S, D]."""
    torch.manual_seed(0)
    batch, heads, head_dim = case["batch"], HEADS, case["head_dim"]
    sizes = [(heads, case["queries"])] + [(heads // case["group"], case["keys"])] * 2
    options = {"device": "cuda", "dtype": torch.bfloat16}
    if case["work"] == "decode":
        return [torch.randn(batch, h, length, head_dim, **options) for h, length in sizes]
    return [torch.randn(batch, length, h, head_dim, **options).transpose(1, 2) for h, length in sizes]


def floor_us(case: dict[str, object]) -> float:
    """Microseconds that no kernel can beat."""
    batch, queries, keys, head_dim = (case[k] for k in ("batch", "queries", "keys", "head_dim"))
    pairs = batch * HEADS * queries * keys / (2 if case["causal"] else 1)
    bytes_moved = 2 * batch * head_dim * (2 * HEADS * queries + 2 * HEADS // case["group"] * keys)
    forward = max(4 * pairs * head_dim / TENSOR_RATE, bytes_moved / timing.memory_bandwidth()) * 1e6
    return forward * (3.5 if case["work"] == "training" else 1)


def candidates(case: dict[str, object], compiled: Callable[..., Tensor]) -> dict[str, Callable[[], object]]:
    inputs = inputs_of(case)
    is_training = case["work"] == "training"
    if is_training:
        grad = torch.randn_like(inputs[0])
        inputs = [x.requires_grad_() for x in inputs]

    def step(attend: Callable[..., Tensor]) -> object:
        if is_training:
            return training_step(attend, inputs, grad, case["causal"])
        return attend(*inputs, case["causal"])

    def stock(backend: SDPBackend) -> object:
        with sdpa_kernel(backend):
            return step(attention)

    def deterministic() -> object:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # would be timed, too
        try:
            return stock(BACKENDS["flash"])
        finally:
            torch.use_deterministic_algorithms(False)

    found = {"batchinv": partial(step, compiled), **{k: partial(stock, b) for k, b in BACKENDS.items()}}
    return found | ({DETERMINISTIC: deterministic} if is_training else {})


def measure(cases: Iterator[dict[str, object]], rounds: int) -> list[dict[str, object]]:
    """One record per case; a case that fails is printed and left out."""
    records: list[dict[str, object]] = []
    before, compiled = None, None
    for case in cases:
        kind = (case["work"], case["group"], case["head_dim"], case["causal"])
        if kind != before:
            torch._dynamo.reset()
            before, compiled = kind, torch.compile(attention, backend="batchinv", dynamic=True)
        fns = candidates(case, compiled)
        try:
            times = timing.interleaved_medians(fns, rounds)
        except Exception as error:
            print(case, "failed:", repr(error)[-300:], flush=True)
            continue
        record = {**case, **{f"{name}_us": round(us, 2) for name, us in times.items()}}
        record |= {name: round(times["batchinv"] / us, 3) for name, us in times.items() if name != "batchinv"}
        record["floor_us"] = round(floor_us(case), 2)
        record["of_floor"] = round(floor_us(case) / times["batchinv"], 3)
        records.append(record)
        print(*record.values(), flush=True)
    return records


def summarize(records: list[dict[str, object]]) -> None:
    for work, name in itertools.product(CASES, (*BACKENDS, DETERMINISTIC)):
        prices = [record[name] for record in records if record["work"] == work and name in record]
        if prices:
            geomean = math.exp(statistics.fmean(map(math.log, prices)))
            print(f"{work} against {name}: geomean {geomean:.3f}, {min(prices):.3f} to {max(prices):.3f}")


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", help="CSV file to write")
    parser.add_argument("--work", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--groups", nargs="+", type=int, default=[1, 4, 8], help="query heads per key head")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    began = time.perf_counter()
    records = []
    for work in arguments.work:
        cases = (case for case in CASES[work]() if case["group"] in arguments.groups)
        records += measure(cases, arguments.rounds)
    summarize(records)
    print(f"{timing.machine()} in {time.perf_counter() - began:.0f} s")
    if arguments.out:
        timing.write_csv(arguments.out, [{**r, **timing.machine()} for r in records], " ".join(sys.argv))


if __name__ == "__main__":
    main()
