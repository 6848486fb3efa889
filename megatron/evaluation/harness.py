"""The one file that imports lm_eval: our model as its language model, and its tasks by name, pattern or YAML file.

lm-eval sees one process (see megatron.evaluation.team) and gives prompts; this file turns them into tokens and rows, in
an order that batches well, and gives back scores in the order asked.
Invariant: nothing here runs on a rank other than 0.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import functools
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron.common.errors import ConfigError, DataError, MegatronError
from megatron.evaluation.generation import Request, Requests
from megatron.evaluation.scoring import Continuation, Score
from megatron.inference.decode import DecodeSettings
from megatron.inference.sampling import Sampling
from megatron.tokenizer.base import Tokenizer

try:
    import lm_eval
    import lm_eval.api.task
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict
    from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window
except ModuleNotFoundError as missing:
    raise MegatronError(
        f"evaluation needs the package {missing.name}. Install it: pip install -r requirements/requirements-eval.txt"
    ) from missing

OUR_TASKS = Path(__file__).with_name("tasks")
DEFAULT_NEW_TOKENS = 256
FEWSHOT_SEED = 1234
_WILDCARDS = frozenset("*?[")

Map = Callable[[str, Sequence[Any], Callable[[int], None]], list[Any]]


class HarnessModel(TemplateLM):
    """What lm-eval calls. Scores and texts come from `do`, the `map` of a Team.

    Kinds of work: "score", list[Continuation] -> list[Score]; "generate", Requests -> list[str].
    """

    def __init__(
        self,
        do: Map,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        batch_size: int,
        device: torch.device,
        info: Mapping[str, Any] | None = None,
        is_quiet: bool = False,
    ) -> None:
        super().__init__()
        self._do, self._tokenizer = do, tokenizer
        self.max_length, self.batch_size = max_length, batch_size
        self._device = device
        self.info, self._is_quiet = info or {}, is_quiet

    @property
    def eot_token_id(self) -> int:
        """The token that stands before a text without context. Raises: DataError where the tokenizer has none."""
        if self._tokenizer.eod_id is None:
            raise DataError(
                "the tokenizer has no end-of-document token, which evaluation puts before a text that has no context. "
                "Add <|endoftext|> to its vocabulary."
            )
        return self._tokenizer.eod_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; our tokenizers add no special tokens of their own."""
        return self._tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if not continuation_ids:
            # A token reached over the seam and the pair has no more tokens than the context alone.
            continuation_ids = self.tok_encode(continuation)
        return context_ids, continuation_ids

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, is it the greedy choice) of each (context, continuation)."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows: dict[int, Continuation] = {}
        num_cut = 0
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise DataError(
                    f"a continuation of {len(continuation)} tokens is longer than the longest row of {self.max_length} "
                    "(seq_length). Leave this task out, or use a model that was trained on longer sequences."
                )
            if continuation:
                tokens = (context + continuation)[-(self.max_length + 1) :]
                num_cut += len(tokens) < len(context) + len(continuation)
                rows[index] = Continuation(tokens, len(continuation))
        if num_cut:
            self._warn(
                f"{num_cut} of {len(rows)} requests are longer than {self.max_length} tokens; their beginnings are cut"
            )
        scores: list[Score] = self._in_batches("score", rows, lambda row: len(row.tokens), list, "Scoring")
        by_index = dict(zip(rows, scores, strict=True))
        answers = []
        for index, (key, _, _) in enumerate(requests):
            score = by_index.get(index, Score(0.0, True))
            answers.append((score.logprob, score.is_greedy))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole documents, cut into windows of the model's length that do not overlap."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, the end-of-document token or the token limit, as each request wants."""
        by_settings: dict[tuple[DecodeSettings, tuple[str, ...]], dict[int, Request]] = {}
        for index, request in enumerate(requests):
            context, kwargs = request.args
            settings, stops = self._settings(kwargs)
            room = self.max_length - settings.max_new_tokens
            if room < 1:
                raise DataError(
                    f"a task asks for {settings.max_new_tokens} new tokens, and the longest row is {self.max_length} "
                    "(seq_length). Lower the task's max_gen_toks, or use a model that was trained on longer sequences."
                )
            prompt = self.tok_encode(context) or [self.eot_token_id]
            by_settings.setdefault((settings, stops), {})[index] = Request(prompt[-room:], index)
        texts = [""] * len(requests)
        for (settings, stops), chosen in by_settings.items():
            pack = functools.partial(Requests, settings=settings, stops=stops)
            made = self._in_batches("generate", chosen, lambda request: len(request.prompt), pack, "Generating")
            for index, text in zip(chosen, made, strict=True):
                texts[index] = postprocess_generated_text(text, list(stops), None)
                self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        return texts

    def _settings(self, kwargs: Mapping[str, Any]) -> tuple[DecodeSettings, tuple[str, ...]]:
        known = normalize_gen_kwargs(dict(kwargs), DEFAULT_NEW_TOKENS)
        unknown = sorted(set(known) - {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"})
        if unknown:
            raise ConfigError(
                f"a task's generation_kwargs hold {', '.join(unknown)}, which this program does not know. Remove them."
            )
        sampling = Sampling()
        if known["do_sample"]:
            sampling = Sampling(float(known["temperature"]), int(known.get("top_k", 0)), float(known.get("top_p", 0.0)))
        settings = DecodeSettings(known["max_gen_toks"], sampling, self._tokenizer.eod_id)
        return settings, tuple(stop for stop in known["until"] if stop)

    def _in_batches(
        self,
        kind: str,
        items: Mapping[int, Any],
        length: Callable[[Any], int],
        pack: Callable[[list[Any]], Any],
        title: str,
    ) -> list[Any]:
        # The longest first: running out of memory shows at once, and rows of like length stand together.
        order = sorted(items, key=lambda index: -length(items[index]))
        chunks = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        hidden = True if self._is_quiet else None  # None: shown on a terminal only
        with tqdm(total=len(chunks), desc=title, unit="batch", leave=False, disable=hidden) as bar:
            done = self._do(kind, [pack([items[index] for index in chunk]) for chunk in chunks], bar.update)
        by_index = dict(zip(order, chain.from_iterable(done), strict=True))
        return [by_index[index] for index in items]

    @staticmethod
    def _warn(text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)


def select_tasks(wanted: Sequence[str], data_dir: str | None = None) -> TaskDict:
    """Load the tasks of these names, patterns and YAML files.

    A plain name is a task, group or tag; a pattern selects tasks. lm-eval's own tasks are indexed only if ours do not
    suffice. data_dir: the folder that our own tasks read from.
    Raises: ConfigError for an unknown name, with what is close to it; DataError if a task's data cannot be had.
    """
    manager = _task_manager(data_dir, has_defaults=False)
    if any(_WILDCARDS & set(name) or not _matches(name, manager) for name in wanted):
        manager = _task_manager(data_dir, has_defaults=True)
    names: dict[str, None] = {}
    for name in wanted:
        found = _matches(name, manager)
        if not found:
            raise ConfigError(_unknown(name, manager))
        names.update(dict.fromkeys(found))
    try:
        with _muted("lm_eval.api.task"):
            loaded = manager.load(list(names))
    except MegatronError:
        raise
    except ValueError as error:
        if "Duplicate task" not in str(error):
            raise
        raise ConfigError(f"eval_tasks names a task twice. {error}. Name the group or the task, not both.") from error
    except Exception as error:
        raise DataError(_unavailable(list(names), error)) from error
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


@functools.cache
def _task_manager(data_dir: str | None, has_defaults: bool) -> TaskManager:
    if has_defaults:
        print("Indexing lm-eval's tasks ...", file=sys.stderr)
    metadata = {"data_dir": data_dir} if data_dir else {}
    return TaskManager(include_path=str(OUR_TASKS), include_defaults=has_defaults, metadata=metadata)


def _matches(name: str, manager: TaskManager) -> list[str]:
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ConfigError(
                f"eval_tasks: {name}: no such file (working directory {Path.cwd()}). Give the path of a task's YAML."
            )
        return [str(Path(name).resolve())]
    if _WILDCARDS & set(name):
        return sorted(fnmatch.filter(manager.all_subtasks, name))
    return [name] if name in manager.task_index else []


def _unknown(name: str, manager: TaskManager) -> str:
    close = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return (
        f"eval_tasks: no task is called {name!r}.{hint} Ours is stdlib_completion; `lm-eval ls tasks` lists lm-eval's."
    )


def _unavailable(names: list[str], error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [""])[0][:300]
    how = "Data on the Hugging Face hub must be reachable, or in the cache from an earlier run"
    if any(os.environ.get(name, "0") not in ("", "0") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")):
        how += " (HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set, so nothing is downloaded now)"
    return (
        f"the data of the tasks {', '.join(names)} cannot be loaded: {type(error).__name__}: {reason}\n"
        f"{how}. stdlib_completion needs no network."
    )


@contextlib.contextmanager
def _muted(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def run(model: HarnessModel, tasks: TaskDict, *, limit: int | None, bootstrap_iters: int) -> dict[str, Any]:
    """lm-eval's results dictionary with upstream's "config" beside it, made of plain JSON values.

    Not lm_eval.simple_evaluate, which would seed this process's generators and spend seconds on describing the machine.
    """
    started = time.time()
    # Its bootstrap would fork this process, which may hold a GPU and collective communication.
    with _environment("DISABLE_MULTIPROC", "1"), _without_bars(lm_eval.api.task):
        results: Any = lm_eval.evaluate(
            lm=model, task_dict=tasks, limit=limit, bootstrap_iters=bootstrap_iters, log_samples=False
        )
    results["config"] = {
        "model": "megatron",
        "model_args": dict(model.info),
        "batch_size": model.batch_size,
        "max_length": model.max_length,
        "device": str(model.device),
        "use_cache": None,
        "limit": limit,
        "bootstrap_iters": bootstrap_iters,
        "fewshot_seed": FEWSHOT_SEED,
    }
    results |= {
        "git_hash": _git_hash(),
        "date": started,
        "lm_eval_version": importlib.metadata.version("lm_eval"),
        "total_evaluation_time_seconds": time.time() - started,
    }
    plain: dict[str, Any] = json.loads(json.dumps(results, default=handle_non_serializable))
    return plain


def _git_hash() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


@contextlib.contextmanager
def _without_bars(module: Any) -> Iterator[None]:
    """lm-eval shows how it builds prompts, which takes a moment, on terminals and in log files alike."""
    original, module.tqdm = module.tqdm, functools.partial(tqdm, disable=True)
    try:
        yield
    finally:
        module.tqdm = original


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    previous = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if previous is not None:
            os.environ[name] = previous
