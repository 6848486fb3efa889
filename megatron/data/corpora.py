"""The corpora that `prepare_data.py` knows by name, and where they come from.

Several hosts of upstream's list are gone; the names stay so that commands keep their meaning, and a dead link says so.
Invariant: after `download`, every raw file of the corpus is complete in its folder.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.common.errors import DataError
from megatron.common.files import atomic_write
from megatron.data.download import fetch

_PILE = "https://the-eye.eu/public/AI/pile"
_PARTS = "https://the-eye.eu/public/AI/pile_preliminary_components"
_C4 = "https://the-eye.eu/eleuther_staging/c4"
_GPT2 = "https://s3.amazonaws.com/models.huggingface.co/bert"


@dataclass(frozen=True)
class Corpus:
    """A corpus to fetch: its folder under the data folder, its files, and how many documents it has where known."""

    folder: str
    urls: tuple[str, ...]
    num_docs: int | None = None


# Source: upstream facts 1.4.
CORPORA: dict[str, Corpus] = {
    "enron": Corpus("enron", ("http://eaidata.bmk.sh/data/enron_emails.jsonl.zst",), 517401),
    "pile_subset": Corpus("pile_00", (f"{_PILE}/train/00.jsonl.zst",)),
    "pile": Corpus("pile", tuple(f"{_PILE}/train/{i:02}.jsonl.zst" for i in range(30))),
    "github": Corpus("github", ("http://eaidata.bmk.sh/data/github_small.jsonl.zst",)),
    "arxiv": Corpus("arxiv", (f"{_PARTS}/2020-09-08-arxiv-extracts-nofallback-until-2007-068.tar.gz",)),
    "europarl": Corpus("europarl", (f"{_PARTS}/EuroParliamentProceedings_1996_2011.jsonl.zst",)),
    "freelaw": Corpus("freelaw", (f"{_PARTS}/FreeLaw_Opinions.jsonl.zst",)),
    "nih": Corpus("nih", (f"{_PARTS}/NIH_ExPORTER_awarded_grant_text.jsonl.zst",)),
    "pubmed": Corpus("pubmed", (f"{_PARTS}/PMC_extracts.tar.gz",)),
    "books1": Corpus("books1", (f"{_PARTS}/books1.tar.gz",)),
    "books3": Corpus("books3", (f"{_PARTS}/books3.tar.gz",)),
    "hackernews": Corpus("hackernews", (f"{_PARTS}/hn.tar.gz",), 373000),
    "openwebtext2": Corpus("openwebtext2", (f"{_PARTS}/openwebtext2.jsonl.zst.tar",), 17103000),
    "stackexchange": Corpus("stackexchange", (f"{_PARTS}/stackexchange_dataset.tar",)),
    "ubuntu_irc": Corpus("ubuntu_irc", (f"{_PARTS}/ubuntu_irc_until_2020_9_1.jsonl.zst",)),
    "youtube_subtitles": Corpus("youtube_subtitles", (f"{_PARTS}/yt_subs.jsonl.zst",)),
    "c4": Corpus("c4", tuple(f"{_C4}/en/c4-train.{i:05}-of-01024.json.gz" for i in range(1024))),
    "c4_openwebtext": Corpus(
        "c4_openwebtext", tuple(f"{_C4}/realnewslike/c4-train.{i:05}-of-00512.json.gz" for i in range(512))
    ),
    "enwik8": Corpus("enwik8", ("http://mattmahoney.net/dc/enwik8.zip",)),
}

GPT2_FILES = {
    "gpt2-vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "gpt2-merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def download(name: str, data_dir: Path, force: bool = False, report: Callable[[str], None] = print) -> list[Path]:
    """Fetch a corpus and give the files to tokenise, in order."""
    corpus = CORPORA[name]
    folder = data_dir / corpus.folder
    files = [fetch(url, folder / url.rsplit("/", 1)[1], force=force, report=report) for url in corpus.urls]
    if name == "enwik8":
        return [_cut_enwik8(files[0], folder / "enwik8.jsonl", force)]
    return files


def fetch_gpt2_files(data_dir: Path, report: Callable[[str], None] = print) -> tuple[Path, Path]:
    """Bring GPT-2's vocabulary and merges into the data folder, as upstream does for GPT2BPETokenizer."""
    vocab, merges = (
        fetch(f"{_GPT2}/{name}", data_dir / name, sha256=checksum, report=report)
        for name, checksum in GPT2_FILES.items()
    )
    return vocab, merges


def _cut_enwik8(archive: Path, target: Path, force: bool) -> Path:
    """Write one document per wiki page; joined, they are the original file.

    Upstream makes the 100 MB one single document, which leaves nothing for validation.
    """
    if target.is_file() and not force:
        return target
    try:
        with zipfile.ZipFile(archive) as opened, opened.open("enwik8") as stream, atomic_write(target) as out:
            for page in _pages(line.decode("utf-8") for line in stream):
                out.write(json.dumps({"text": page}, ensure_ascii=False) + "\n")
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DataError(
            f"{archive} is not the enwik8 archive ({error}). Run again with -f to fetch it anew."
        ) from error
    return target


def _pages(lines: Iterator[str]) -> Iterator[str]:
    page: list[str] = []
    for line in lines:
        if line == "  <page>\n" and page:
            yield "".join(page)
            page = []
        page.append(line)
    if page:
        yield "".join(page)
