"""Which layers each pipeline stage gets: DeepSpeed's division, worked out without DeepSpeed.

Invariant: the same bounds as `PipelineModule` finds for the same layer list, also where several are equally good (the
last cut that is no worse). Its methods: uniform; parameters and type:<regex>, balanced so that the largest part exceeds
the smallest by the least (the linear partition problem).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

from megatron.config.plan.architecture import Layer


def stage_layers(layers: Sequence[Layer], num_stages: int, method: str, tp: int) -> list[list[Layer]]:
    """The layers of every stage. On a stage without the embedding, a tied head carries a copy of its table."""
    bounds = [0, len(layers)]
    if num_stages > 1:
        bounds = stage_bounds(layers, num_stages, method, tp)
    stages = [list(layers[start:stop]) for start, stop in pairwise(bounds)]
    for stage in stages:
        if stage and stage[-1].ties and all(layer is not layers[0] for layer in stage):
            stage[-1] = replace(stage[-1], parameters=layers[0].parameters)
    return stages


def stage_bounds(layers: Sequence[Layer], num_stages: int, method: str, tp: int) -> list[int]:
    """The index of the first layer of every stage, and the number of layers."""
    method = method.lower()
    if method == "uniform":
        return _uniform(len(layers), num_stages)
    if method == "parameters":
        table = layers[0].numel_on_rank(tp)
        weights = tuple(table if layer.ties else layer.numel_on_rank(tp) for layer in layers)
    else:
        pattern = re.compile(method.split(":", 1)[1], re.IGNORECASE)
        weights = tuple(int(pattern.search(layer.kind) is not None) for layer in layers)
    return _balanced(weights, num_stages)


def _uniform(count: int, parts: int) -> list[int]:
    if count <= parts:
        return [min(part, count) for part in range(parts + 1)]
    size, rest = divmod(count, parts)
    return [part * size + min(part, rest) for part in range(parts + 1)]


def _balanced(weights: tuple[int, ...], parts: int) -> list[int]:
    if len(weights) <= parts:
        return _uniform(len(weights), parts)
    # One table serves every smaller number of parts: a search over layouts asks for many.
    width = max(parts, min(len(weights), 16))
    cuts = _cuts(weights, width)
    bounds = [len(weights)]
    for part in range(parts, 0, -1):
        bounds.append(cuts[bounds[-1]][part])
    return bounds[::-1]


@lru_cache(maxsize=32)
def _cuts(weights: tuple[int, ...], parts: int) -> list[list[int]]:
    """cuts[i][j]: where the last of j parts of the first i layers begins, so that largest - smallest part is least."""
    count, inf = len(weights), math.inf
    sums = [0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    cuts = [[0] * (parts + 1) for _ in range(count + 1)]
    # By number of parts: the largest and the smallest part of the first i layers.
    most, least = [inf] * (count + 1), [inf] * (count + 1)
    most[0] = 0
    for part in range(1, parts + 1):
        next_most, next_least = [inf] * (count + 1), [inf] * (count + 1)
        for end in range(part, count + 1):
            best, total = inf, sums[end]
            for start in range(part - 1, end):
                high, low = most[start], least[start]
                if high == inf:
                    continue
                size = total - sums[start]
                high, low = max(high, size), min(low, size)
                if high - low <= best:
                    best, cuts[end][part] = high - low, start
                    next_most[end], next_least[end] = high, low
        most, least = next_most, next_least
    return cuts
