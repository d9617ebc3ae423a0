"""CPU-seconds a case, from files to cropped, normalisable integers, beside MONAI and the limit.

    .venv/bin/python tests/bench/decode.py [--cases TREE] [--rounds 3] [--json]

Rounds are interleaved in one process and thread, so the ratios hold on a noisy machine. Without
--cases, phantoms of three sizes show how the cost grows with voxels.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import deflate
import torch
from monai.transforms import Compose, CropForegroundd, LoadImaged, NormalizeIntensityd

from raybrats.brats import MODALITIES
from raybrats.data.cohort import Case, find_cases, prepare_case
from raybrats.data.phantom import write_phantoms

SHAPES = ((60, 60, 40), (120, 120, 78), (240, 240, 155))


def monai_chain(case: Case) -> object:
    keys = [*MODALITIES, "labels"]
    load = Compose(
        [
            LoadImaged(keys, ensure_channel_first=True),
            CropForegroundd(keys, source_key="flair"),
            NormalizeIntensityd(MODALITIES, nonzero=True),
        ]
    )
    return load(dict(zip(keys, (*case.image_uris, case.label_uri), strict=True)))


def raybrats_chain(case: Case) -> object:
    return prepare_case(case, MODALITIES, "zscore")


def inflate_alone(case: Case) -> object:
    files = [Path(uri).read_bytes() for uri in (*case.image_uris, case.label_uri)]
    return [deflate.gzip_decompress(f, int.from_bytes(f[-4:], "little")) for f in files]


PEERS: dict[str, Callable[[Case], object]] = {
    "MONAI load + crop + normalise": monai_chain,
    "raybrats prepare_case": raybrats_chain,
    "limit: libdeflate alone": inflate_alone,
}


def measure(cases: list[Case], rounds: int) -> dict[str, float]:
    """Median CPU-seconds a case of each peer."""
    seconds: dict[str, list[float]] = {name: [] for name in PEERS}
    for peer in PEERS.values():
        peer(cases[0])
    for _ in range(rounds):
        for case in cases:
            for name, peer in PEERS.items():
                began = time.process_time()
                peer(case)
                seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", help="a tree of 3-D cases (any BraTS layout of .nii.gz files)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        if options.cases:
            tables[options.cases] = measure(find_cases(options.cases), options.rounds)
        for shape in () if options.cases else SHAPES:
            name = "x".join(map(str, shape))
            write_phantoms(f"{folder}/{name}", num_cases=2, shape=shape)
            tables[name] = measure(find_cases(f"{folder}/{name}"), options.rounds)
    if options.json:
        json.dump(tables, sys.stdout, indent=1)
        return
    for name, table in tables.items():
        own = table["raybrats prepare_case"]
        print(f"\n{name}\n{'':32} CPU-s a case   x raybrats")
        for peer, seconds in table.items():
            print(f"{peer:32} {seconds:12.4f} {seconds / own:12.2f}")


if __name__ == "__main__":
    main()
