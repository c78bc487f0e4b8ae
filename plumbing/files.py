"""Files of data sets: where they lie, in folders or on the hub, and how each format is read.

    train.jsonl                               also .json, .csv, .parquet, .arrow, and .gz of text
    train-00000-of-00002.parquet ...          in shards; in data/, main/ or default/, as on the hub
    train/data-00000-of-00001.arrow           as `datasets` saves to disk

Each row comes with where it stood, for the message if it is a bad one.
"""

import csv
import gzip
import io
import json
import logging
import re
import sys
from pathlib import Path

from plumbing.commands import first_line
from plumbing.processes import rank

# .arrow before .json: beside what `save_to_disk` wrote lies a state.json.
SUFFIXES = (".jsonl", ".arrow", ".json", ".parquet", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz")


def warn(text):
    if rank() == 0:
        print(text, file=sys.stderr)


def suffix_of(path):
    return next((end for end in SUFFIXES[::-1] if str(path).lower().endswith(end)), "")


def is_hub_id(name):
    """OWNER/NAME, and no path that is there or looks like a file."""
    owner_and_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)
    return bool(owner_and_name) and not Path(name).exists() and not suffix_of(name)


def check_request(names, split, data_dir, made_here, datasets):
    """ValueError for what can be told before anything is read."""
    if split not in ("train", "test", "all"):
        raise ValueError(f"unknown split {split!r}: give train, test or all")
    if not all(names):
        raise ValueError(f"an empty name in --dataset {','.join(names)!r}: one comma too many")
    for name in names:
        has_name = name in made_here or name in datasets or is_hub_id(name)
        if not has_name and not Path(name).exists():
            path = "the path of a file or folder (without a comma, which separates data sets)"
            way_out = f"give {', '.join(made_here)}, {', '.join(datasets)}, OWNER/NAME, or {path}"
            raise ValueError(f"unknown data set {name!r}, and no such file: {way_out}")
        if name in datasets and split == "train" and datasets[name][2] is None:
            raise ValueError(f"{name} has no questions to train on: it is for evaluation")
    if data_dir is not None and not any(name in datasets or is_hub_id(name) for name in names):
        named = f"is for data sets with a name ({', '.join(datasets)}, OWNER/NAME)"
        raise ValueError(f"--data-dir {data_dir} {named}: leave it out with {','.join(names)!r}")


# --------------------------------------------------------------------------- where the files lie


def rows_of(name, known, parts, data_dir, alone):
    """([(where, row), ...], is it still to be split?) of parts (train, test) of a data set.
    known: its entry in `data.DATASETS`, or None. alone: no other data set is asked for, so that
    data_dir/train.jsonl can only be its own."""
    hub_id, configuration, train, test, _ = known or (name, None, "train", "test", None)
    if train is None:  # a data set for evaluation
        parts = ["test"]
    folder, wanted = Path(name), " and ".join(parts)
    places = [folder]
    if data_dir is not None and (known or is_hub_id(name)):
        folder, wanted = Path(data_dir), f"{name}/{wanted} or {name}"
        places = [folder / (name + suffix) for suffix in ("", *SUFFIXES)]
        places += [folder / hub_id] + [folder] * alone
    elif not folder.exists():
        return from_hub(name, hub_id, configuration, (train, test), parts), train == test
    for place in places:
        of_parts = [files_of(place, part, configuration) for part in parts]
        if all(of_parts):
            return read_all(sum(of_parts, [])), False
        # It may have no parts: a file, or what `save_to_disk` wrote of one split.
        files = [place] * place.is_file() or shards(place, "data")
        if configuration and not files:  # as OlympiadBench's only file is called on the hub
            files = shards(place / configuration, configuration)
        if train == test and not files:  # Open-Reasoner-Zero's
            files = shards(place, Path(test).stem)
        if files and known and train not in (None, test):
            check_part(name, files[0], parts)
        if files:
            return read_all(files), train == test or not known
    there = ", ".join(sorted(file.name for file in folder.glob("*"))[:9]) or "nothing"
    way_out = f"put one there; it has {there}"
    raise ValueError(f"{folder} has no {wanted} ({', '.join(SUFFIXES)}): {way_out}")


def read_all(files):
    return [row for file in files for row in read_rows(file)]


def check_part(name, file, parts):
    """One file of a data set that has a test split of its own: it could be either split."""
    suffix = suffix_of(file)
    way_out = f"call it {name}/train{suffix} or {name}/test{suffix}"
    if parts == ["train"]:
        which = f"{file} may be {name}'s train or its test split"
        way_out += f", or give --dataset {file}, of which a tenth is then for testing"
        raise ValueError(f"{which}: {way_out}")
    if parts == ["test"]:
        warn(f"all of {file} is taken for {name}'s test split (if it is not: {way_out})")


def files_of(folder, part, configuration):
    """The files of train or test in a folder, as the hub has it or as people do; or none."""
    for place in (folder, folder / "data", folder / (configuration or "main"), folder / "default"):
        files = shards(place, part) or shards(place / part, r"[^._].*?")
        if files:
            return files
    return []


def shards(place, stem):
    """stem.jsonl, or all of stem-00000-of-00002.parquet and its like; or none. stem: a pattern."""
    for suffix in SUFFIXES:
        if (place / (stem + suffix)).is_file():
            return [place / (stem + suffix)]
        name = re.compile(rf"{stem}([-_]\d+(-of-\d+)?(-\w+)?)?{re.escape(suffix)}")
        files = sorted(file for file in place.glob("*") if name.fullmatch(file.name))
        total = re.search(r"-of-(\d+)", files[0].name) if files else None
        if total and len(files) != int(total[1]):
            there = f"{len(files)} of the {int(total[1])} files that {files[0].name} is one of"
            raise ValueError(f"{place} has {there}: get the others")
        if files:
            return files
    return []


def from_hub(name, hub_id, configuration, splits, parts):
    """[('HUB_ID train, row 3', row), ...]"""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would bury our one line
    try:
        if splits[0] == splits[1]:  # one JSON file that `datasets` cannot read
            from huggingface_hub import hf_hub_download

            return read_rows(Path(hf_hub_download(hub_id, splits[0], repo_type="dataset")))
        from datasets import load_dataset  # here: slow to import

        rows = []
        for part in parts:
            split = splits[part == "test"]
            found = load_dataset(hub_id, configuration, split=split)
            rows += [(f"{hub_id} {split}, row {i}", row) for i, row in enumerate(found)]
        return rows
    except Exception as error:  # offline, a proxy, a full disk: one way out for all
        folder = f"a folder with {name}/train.jsonl and {name}/test.jsonl"
        way_out = f"give --data-dir {folder}, and --model a local folder"
        reason = f"cannot get {hub_id} from the hub ({first_line(error)})"
        raise ValueError(f"{reason}: {way_out}") from error


# --------------------------------------------------------------------------- formats


def read_rows(path):
    """[('FILE, line 3', row), ...] of a file. ValueError, one line, names file and line."""
    suffix = suffix_of(path)
    try:
        content = path.read_bytes()
        if content.startswith(b"version https://git-lfs"):
            raise ValueError("a git-lfs pointer, not the data: run git lfs pull")
        if suffix.endswith(".gz"):
            content = gzip.decompress(content)
        if suffix in (".parquet", ".arrow"):
            from pyarrow import ipc, parquet  # here: slow to import

            if suffix == ".parquet":
                table = parquet.read_table(io.BytesIO(content))
            else:
                table = ipc.open_stream(content).read_all()
            return [(f"{path}, row {i}", row) for i, row in enumerate(table.to_pylist())]
        if b"\0" in content[:4]:
            raise ValueError("UTF-16, not UTF-8: save it as UTF-8")
        content = content.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        if suffix.startswith(".csv"):
            reader = csv.DictReader(io.StringIO(content.decode(), newline=""), strict=True)
            rows = []
            for row in reader:
                if None in row:
                    raise ValueError(f"line {reader.line_num} has more fields than the header")
                rows.append((f"{path}, line {reader.line_num}", row))
            return rows
    except Exception as error:  # no such file, half a file: each format has its own
        raise ValueError(f"cannot read {path}: {first_line(error)}") from error

    is_list = content.lstrip().startswith(b"[")  # else an object a line, in a .json, too
    if is_list:
        if suffix.startswith(".jsonl"):
            raise ValueError(f"{path}, line 1: not a JSON object but a list: is it a .json file?")
        return [(f"{path}, entry {i}", row) for i, row in enumerate(parse_json(path, content))]
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        where = f"{path}, line {number}"
        if line.strip():
            rows.append((where, parse_json(where, line)))
    if not rows:
        raise ValueError(f"{path} is empty: it needs one JSON object a line")
    return rows


def parse_json(where, content):
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, a number of 10,000 digits
        raise ValueError(f"{where}: not JSON ({first_line(error)})") from error
