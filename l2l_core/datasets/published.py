"""The published RefCOCO, RefCOCO+ and RefCOCOg: addresses and counts.

The checksums of the archives are not public, so counts identify the published files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from l2l_core.config import PublishedName
from l2l_core.core.images import project_path, visible
from l2l_core.datasets.refcoco import load_refs, refs_files, split_by_of
from l2l_core.errors import InputError


class Rows(NamedTuple):
    """Counts of one split."""

    refs: int
    sentences: int


SPLITS: Mapping[tuple[str, str], Mapping[str, Rows]] = {
    ("refcoco", "unc"): {
        "train": Rows(42_404, 120_624),
        "val": Rows(3_811, 10_834),
        "testA": Rows(1_975, 5_657),
        "testB": Rows(1_810, 5_095),
    },
    ("refcoco+", "unc"): {
        "train": Rows(42_278, 120_191),
        "val": Rows(3_805, 10_758),
        "testA": Rows(1_975, 5_726),
        "testB": Rows(1_798, 4_889),
    },
    ("refcocog", "umd"): {
        "train": Rows(42_226, 80_512),
        "val": Rows(2_573, 4_896),
        "test": Rows(5_023, 9_602),
    },
    ("refcocog", "google"): {  # its test set was never published
        "train": Rows(44_822, 85_474),
        "val": Rows(5_000, 9_536),
    },
}
"""(name, split_by) -> split -> rows. RefCOCO's google split is left out: its number of sentences is not published."""

INSTANCES = "instances.json"


@dataclass(frozen=True)
class Archive:
    """A published zip file and the target folder of its files."""

    name: PublishedName
    """Name of the file at a mirror, without .zip, and of the folder."""
    urls: tuple[str, ...]
    """Tried in this order."""
    inside: str
    """Folder of the zip file to unpack; the others are skipped."""
    into: str
    """Target subfolder; `` for the folder itself."""
    splits: Mapping[str, Mapping[str, Rows]]
    """split_by -> expected counts of refs(<split_by>).p; empty for photos."""
    photos: int = 0
    """Number of JPEGs; 0 for annotations."""

    def problems(self, folder: Path) -> list[str]:
        """Differences of a folder from the published files, one line each; empty if none."""
        files = folder / self.into
        found = []
        if self.photos and (photos := len(visible(files.glob("*.jpg")))) != self.photos:
            found.append(f"{files.name} has {photos:,} photos, published are {self.photos:,}")
        if self.splits and not (files / INSTANCES).is_file():
            found.append(f"{INSTANCES} is missing")
        for split_by, expected in self.splits.items():
            path = files / f"refs({split_by}).p"
            try:
                found += _differences(path.name, expected, _count(load_refs(path)))
            except InputError as error:
                found.append(f"{path.name}: {error}")
        return found


def _annotations(name: PublishedName, archived: str) -> Archive:
    """A set of lichengunc/refer; archived: the Internet Archive's timestamp of the file, as in its address."""
    url = f"https://bvisionweb1.cs.unc.edu/licheng/referit/data/{name}.zip"
    splits = {split_by: rows for (owner, split_by), rows in SPLITS.items() if owner == name}
    return Archive(name, (url, f"https://web.archive.org/web/{archived}/{url}"), inside=name, into="", splits=splits)


ARCHIVES: Mapping[str, Archive] = {
    archive.name: archive
    for archive in (
        _annotations("refcoco", "20220413011718"),
        _annotations("refcoco+", "20220413011656"),
        _annotations("refcocog", "20220413012904"),
        Archive(
            name="images",
            urls=("http://images.cocodataset.org/zips/train2014.zip",),
            inside="train2014",
            into="train2014",
            splits={},
            photos=82_783,
        ),
    )
}
"""Archives to fetch, by name: three sets of annotations and their shared photos."""


def warnings(dataset: str | Path, split_by: str, refs: pa.Table) -> list[str]:
    """Differences of a dataset from the published one of the same name, one line each.

    refs: records.REFS. A difference is not an error: every row has passed its checks, and a subset or a corrected
    edition may keep the old name. Its scores are not comparable with published ones.
    """
    folder = Path(dataset)
    found = [path for path in refs_files(folder) if split_by in ("auto", split_by_of(path))]
    if len(found) != 1:
        return []
    edition = (folder.name, split_by_of(found[0]))
    if edition not in SPLITS:
        return []
    counted = refs.group_by("split").aggregate([("ref_id", "count_distinct"), ("sent_id", "count")]).to_pylist()
    rows = {row["split"]: Rows(row["ref_id_count_distinct"], row["sent_id_count"]) for row in counted}
    where = project_path(found[0])
    return [f"{line}; scores will not compare" for line in _differences(where, SPLITS[edition], rows)]


def _count(refs: Sequence[Any]) -> dict[str, Rows]:
    """Rows per split of a refs file. Raises InputError if rows have another form."""
    counts: Counter[str] = Counter()
    sentences: Counter[str] = Counter()
    try:
        for ref in refs:
            counts[ref["split"]] += 1
            sentences[ref["split"]] += len(ref["sentences"])
    except (KeyError, TypeError):
        raise InputError("its rows are not refs with split and sentences") from None
    return {split: Rows(count, sentences[split]) for split, count in counts.items()}


def _differences(where: str, expected: Mapping[str, Rows], found: Mapping[str, Rows]) -> list[str]:
    splits = [*expected, *(split for split in found if split not in expected)]
    nothing = Rows(0, 0)
    return [
        f"{where}: {split} has {have.refs:,} refs with {have.sentences:,} sentences, "
        f"published are {want.refs:,} with {want.sentences:,}"
        for split in splits
        if (have := found.get(split, nothing)) != (want := expected.get(split, nothing))
    ]
