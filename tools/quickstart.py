"""`make quickstart`: from nothing to a trained, sampled, evaluated and exported model, by everyday commands.

Every command is printed before it runs and runs as printed, so that reading along teaches the tool.
Invariant: a step is left out only if its results are there and no older than what they came from.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from megatron.common.errors import MegatronError, run_main
from megatron.common.files import atomic_write_text
from megatron.observe.metrics_log import read_metrics
from megatron.observe.progress import format_duration

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/quickstart.yml"
DATA = Path("data/stdlib")
CHECKPOINTS = Path("checkpoints/quickstart")
LOG = Path("logs/quickstart/metrics.jsonl")
OUT = Path("quickstart")
PROMPTS = ("def main(", "import os", "class Queue:", "for name in ", "if __name__ ==", "    def __init__(self, ")


@dataclass(frozen=True)
class Step:
    """One command: what it is for, what it reads (`inputs`), and what it leaves (`outputs`; patterns are allowed).

    replaces: a folder that the command refuses to overwrite, removed first when it is out of date.
    is_complete: asked as well, where results may be there before all is done.
    """

    title: str
    command: str
    inputs: Sequence[Path]
    outputs: Sequence[Path]
    replaces: Path | None = None
    is_complete: Callable[[], bool] = lambda: True

    def is_done(self) -> bool:
        """Whether all results are there and no older than any input."""
        made = [_newest(path) for path in self.outputs]
        needed = [_newest(path) for path in self.inputs]
        return all(made) and all(needed) and min(made) >= max(needed, default=0.0) and self.is_complete()


def _is_trained() -> bool:
    wanted = yaml.safe_load(Path(CONFIG).read_text())["train_iters"]
    reached = re.search(r"\d+", (CHECKPOINTS / "latest").read_text())
    return reached is not None and int(reached.group()) >= wanted


STEPS = (
    Step(
        "Get text: the Python sources of this interpreter's standard library, no network needed",
        "python prepare_data.py stdlib -d data",
        [],
        [DATA / "stdlib.jsonl", DATA / "stdlib_heldout.jsonl"],
    ),
    Step(
        "Train a tokenizer: byte-level BPE",
        f"python megatron/tokenizer/train_tokenizer.py --json_input_dir {DATA}/stdlib.jsonl "
        f"--tokenizer_output_path {DATA}/tokenizer.json --vocab_size 4096",
        [DATA / "stdlib.jsonl"],
        [DATA / "tokenizer.json"],
    ),
    Step(
        "Tokenise: the text becomes one mapped file of token ids",
        f"python tools/datasets/preprocess_data.py --input {DATA}/stdlib.jsonl --output-prefix {DATA}/stdlib "
        f"--tokenizer-type HFTokenizer --vocab-file {DATA}/tokenizer.json --append-eod --workers 2",
        [DATA / "stdlib.jsonl", DATA / "tokenizer.json"],
        [DATA / "stdlib_text_document.bin", DATA / "stdlib_text_document.idx"],
    ),
    Step(
        "Train: a GPT-NeoX of a few million parameters, on two processes with ZeRO stage 1",
        f"./deepy.py train.py {CONFIG}",
        [DATA / "stdlib_text_document.bin", DATA / "stdlib_text_document.idx"],
        [CHECKPOINTS / "latest"],
        is_complete=_is_trained,
    ),
    Step(
        "Generate: let it continue some beginnings",
        f"./deepy.py generate.py {CONFIG} -i {OUT}/prompts.txt -o {OUT}/samples.txt",
        [CHECKPOINTS / "latest", OUT / "prompts.txt"],
        [OUT / "samples.txt"],
    ),
    Step(
        "Evaluate: lm-eval tasks over source files that it was not trained on",
        f"./deepy.py evaluate.py {CONFIG} --eval_tasks stdlib_completion --eval_results_prefix {OUT}/stdlib",
        [CHECKPOINTS / "latest", DATA / "stdlib_heldout.jsonl"],
        [OUT / "stdlib_eval_results_*.json"],
    ),
    Step(
        "Export: a folder that Hugging Face transformers loads, checked by comparing logits",
        f"python tools/ckpts/convert_neox_to_hf.py --input_dir {CHECKPOINTS} --config_file {CONFIG} "
        f"--output_dir {OUT}/huggingface",
        [CHECKPOINTS / "latest"],
        [OUT / "huggingface/config.json"],
        replaces=OUT / "huggingface",
    ),
    Step(
        "Plot: training and validation loss as a picture",
        f"python tools/plot_losses.py {LOG} -o {OUT}/losses.png",
        [LOG],
        [OUT / "losses.png"],
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps that are not done, and sum up; the exit code is that of the first command that fails."""
    parser = argparse.ArgumentParser(description="Run the whole road once, on a small model.")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    if parser.parse_args(arguments).list:
        print("\n".join(step.command for step in STEPS))
        return 0
    os.chdir(ROOT)
    # The commands say `python`: let that be the interpreter that runs this, in an activated environment or not.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if not (OUT / "prompts.txt").exists():
        atomic_write_text(OUT / "prompts.txt", "\n".join(PROMPTS) + "\n")
    return run_steps(STEPS) or _summarise()


def run_steps(steps: Sequence[Step]) -> int:
    """Run the steps that are not done, in order, until one fails; returns the exit code."""
    started = time.monotonic()
    for number, step in enumerate(steps, start=1):
        print(f"\n[{number}/{len(steps)}] {step.title}")
        if step.is_done():
            print(f"  already done: {', '.join(map(str, step.outputs))}", flush=True)
            continue
        if step.replaces is not None and step.replaces.exists():
            print(f"$ rm -r {step.replaces}", flush=True)
            shutil.rmtree(step.replaces)
        print(f"$ {step.command}", flush=True)
        begun = time.monotonic()
        code = subprocess.run(shlex.split(step.command), check=False).returncode
        if code != 0:
            # A shell reports a death by signal as 128 + its number.
            code = code if code > 0 else 128 - code
            print(f"\nstopped: exit code {code} from\n$ {step.command}")
            print("Mend what it says, then repeat `make quickstart`; what is done is not done again.", flush=True)
            return code
        print(f"  took {format_duration(time.monotonic() - begun)}", flush=True)
    print(f"\nall steps: {format_duration(time.monotonic() - started)}")
    return 0


def _newest(pattern: Path) -> float:
    """When the newest file that matches was changed; 0 if there is none."""
    return max((path.stat().st_mtime for path in pattern.parent.glob(pattern.name)), default=0.0)


def _summarise() -> int:
    reached = list(_reached())
    files = {
        "checkpoints": CHECKPOINTS,
        "metrics of every step": LOG,
        "samples": OUT / "samples.txt",
        "scores": max(OUT.glob("stdlib_eval_results_*.json"), key=lambda path: path.stat().st_mtime),
        "for transformers": OUT / "huggingface",
        "losses": OUT / "losses.png",
    }
    print("\nWhat was reached")
    print("\n".join(f"  {name:<26}{value}" for name, value in reached))
    print("\nA sample")
    print("\n".join(f"  | {line}" for line in _sample().splitlines()[:12]))
    print("\nWhere it lies")
    print("\n".join(f"  {name:<26}{path}" for name, path in files.items()))
    print(
        "\nWhat to try next\n"
        f"  write your own beginnings into {OUT}/prompts.txt, and run the generate command again\n"
        f"  change a copy of {CONFIG}: longer (train_iters), larger (hidden_size), in another folder (save)\n"
        "  train on your own text: see README.md\n"
        "  ./deepy.py --plan train.py configs/20B.yml   what a large model needs, without training it"
    )
    return 0


def _reached() -> Iterator[tuple[str, str]]:
    steps = read_metrics(LOG)
    for name, metric in (("training loss", "train/lm_loss"), ("validation loss", "validation/lm_loss")):
        values = [values[metric] for values in steps.values() if metric in values]
        if not values:
            raise MegatronError(f"{LOG} holds no {metric}: remove {LOG.parent} and {CHECKPOINTS}, then start again")
        yield name, f"{values[-1]:.3f} after {max(steps)} steps (it began at {values[0]:.3f})"
    speeds = sorted(values["runtime/tokens_per_sec"] for values in steps.values() if "runtime/tokens_per_sec" in values)
    if speeds:
        yield "speed", f"{speeds[len(speeds) // 2]:,.0f} tokens/s"
    newest = max(OUT.glob("stdlib_eval_results_*.json"), key=lambda path: path.stat().st_mtime)
    for task, values in json.loads(newest.read_text())["results"].items():
        for key, value in values.items():
            metric = key.partition(",")[0]
            if "," in key and isinstance(value, float) and not metric.endswith("_stderr"):
                yield task, f"{metric} {value:,.3f}"


def _sample() -> str:
    """The longest of the samples, as it would stand in a file."""
    lines = (OUT / "samples.txt").read_text().splitlines()
    samples = [json.loads(line) for line in lines if line.strip()]
    texts = [f"{sample.get('context', '')}{sample.get('text', '')}" for sample in samples]
    return max(texts, key=len, default="")


if __name__ == "__main__":
    run_main(main)
