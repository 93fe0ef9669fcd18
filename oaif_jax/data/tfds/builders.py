"""TFDS builders that prepare array_record from a directory of the original files, by the readers of this package.

    builder = OaifHh(config="helpful_base", data_dir="OUT", file_format="array_record")
    prepare(builder, pathlib.Path("hh-rlhf"))
    tfds.data_source("oaif_hh/helpful_base", data_dir="OUT", split="train")

Nothing is downloaded, and TensorFlow is needed neither to prepare nor to read.
"""

import contextlib
import dataclasses
import io
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import ClassVar

import tensorflow_datasets as tfds

from oaif_jax.base.errors import UserError
from oaif_jax.base.phases import phase
from oaif_jax.data import readers
from oaif_jax.data.readers import ultrafeedback
from oaif_jax.data.records import Counts, Example
from oaif_jax.data.tfds.source import features, stored


@dataclasses.dataclass(frozen=True)
class Files:
    """Where a config's files are in the manual directory, and what reads them."""

    format: str
    folder: str
    splits: Callable[[pathlib.Path], list[str]]


class FilesBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Prepares what a reader finds. Order and duplicates are the reader's: prepared = read."""

    VERSION = tfds.core.Version("1.0.0")
    FILES: ClassVar[dict[str, Files]]  # by the config's name, "" where there are no configs
    ABOUT: ClassVar[str]
    HOMEPAGE: ClassVar[str]

    # Of downloads, of which there are none. To look for their checksums TFDS 4.9.10 needs importlib_resources, and
    # doesn't say so in its requirements.
    url_infos = None

    on_error = "raise"  # or "skip": see readers.read; set on the builder before it prepares

    @property
    def files(self) -> Files:
        return self.FILES[self.builder_config.name if self.builder_config else ""]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.ABOUT,
            homepage=self.HOMEPAGE,
            features=features(),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        folder = pathlib.Path(dl_manager.manual_dir) / self.files.folder
        loaded = {
            split: readers.read(self.files.format, folder, split, self.on_error) for split in self.files.splits(folder)
        }
        self.counts: dict[str, Counts] = {split: each.counts for split, each in loaded.items()}
        assert self.info.metadata is not None
        self.info.metadata["counts"] = {split: str(counts) for split, counts in self.counts.items()}
        return {split: self._generate_examples(split, each.examples) for split, each in loaded.items()}

    def _generate_examples(self, split: str, examples: list[Example]) -> Iterator[tuple[int, dict]]:
        with phase(f"writing {split}", len(examples)) as under_way:
            for number, example in enumerate(examples):
                under_way.at(number)
                yield number, stored(example)


class OaifTldr(FilesBuilder):
    """TL;DR; see readers.tldr."""

    FILES: ClassVar = {
        "posts": Files("tldr_posts", "tldr_3_filtered", lambda _: ["train", "valid", "test"]),
        "comparisons": Files("tldr_comparisons", "comparisons", lambda _: ["train", "valid"]),
    }
    ABOUT = "Reddit posts with their authors' summaries, and pairs of summaries that raters compared."
    HOMEPAGE = "https://github.com/openai/summarize-from-feedback"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "From the links in the README of the homepage, put train.jsonl, valid.jsonl and test.jsonl of the filtered TL;DR "
        "data into tldr_3_filtered/, and the batch*.json of the comparisons into comparisons/."
    )
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name="posts", description="Posts with a reference summary."),
        tfds.core.BuilderConfig(name="comparisons", description="Pairs of summaries; valid is valid1 and valid2."),
    ]


class OaifHh(FilesBuilder):
    """Anthropic HH; see readers.hh."""

    FILES: ClassVar = {
        "helpful_base": Files("hh", "helpful-base", lambda _: ["train", "test"]),
        "harmless_base": Files("hh", "harmless-base", lambda _: ["train", "test"]),
    }
    ABOUT = "Dialogues with two last turns, of which raters chose the more helpful or the more harmless one."
    HOMEPAGE = "https://github.com/anthropics/hh-rlhf"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Clone the repository of the homepage: it has helpful-base/ and harmless-base/ with train.jsonl.gz and "
        "test.jsonl.gz."
    )
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name="helpful_base", description="Which one is more helpful."),
        tfds.core.BuilderConfig(name="harmless_base", description="Which one is more harmless."),
    ]


class OaifUltrafeedback(FilesBuilder):
    """UltraFeedback, binarized; see readers.ultrafeedback. Its splits are those of the files there."""

    FILES: ClassVar = {"": Files("ultrafeedback", "", ultrafeedback.splits)}
    ABOUT = "Instructions with a better and a worse answer, rated by GPT-4."
    HOMEPAGE = "https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put the parquet files of the homepage's data/ (train_prefs-00000-of-00001.parquet, ...), or train_prefs.jsonl and "
        "the like, into the directory itself or its data/."
    )


BUILDERS: tuple[type[FilesBuilder], ...] = (OaifTldr, OaifHh, OaifUltrafeedback)


def builders_for(format: str, path: pathlib.Path, data_dir: pathlib.Path) -> list[FilesBuilder]:
    """The builders of a reader's format whose folders are in `path`; UserError if there are none, or no such format."""
    fitting = [
        (builder, name, files)
        for builder in BUILDERS
        for name, files in builder.FILES.items()
        if files.format == format
    ]
    if not fitting:
        known = {files.format for builder in BUILDERS for files in builder.FILES.values()}
        raise UserError(f"format={format!r} can't be prepared, wanted one of {', '.join(sorted(known))}")
    there = [(builder, name) for builder, name, files in fitting if (path / files.folder).is_dir()]
    if not there:
        folders = " or ".join(str(path / files.folder) for _, _, files in fitting)
        raise UserError(f"data {path}: wanted the directory {folders}. {fitting[0][0].MANUAL_DOWNLOAD_INSTRUCTIONS}")
    return [builder(config=name or None, data_dir=data_dir, file_format="array_record") for builder, name in there]


def prepare(builder: FilesBuilder, path: pathlib.Path) -> pathlib.Path:
    """Writes a builder's array_record files from the originals in `path`; the directory to read them from.

    UserError when they are there already, or when an original can't be read; then nothing is left behind.
    """
    target = pathlib.Path(builder.data_path)
    if target.exists():
        raise UserError(f"--out: {target} is there already, wanted another --out, or that directory removed")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {target.parent} can't be made ({error.strerror}), wanted another --out") from error
    # TFDS talks of downloading whatever it does, and makes a directory for it; its bars would be control characters in a log.
    tfds.disable_progress_bar()
    with phase("writing"), tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
            download_dir=downloads, download_config=tfds.download.DownloadConfig(manual_dir=path)
        )
    return target
