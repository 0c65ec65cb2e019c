"""Start of `rpo train` on a large foreign set: reading it the first time, and again with its index beside the cache.

    python benchmarks/foreign_start.py --pairs 100000

Writes a Pick-a-Pic file of random 16-pixel PNGs in a temporary folder and prints seconds. The first read decodes every image; the
second opens the set's footer and the index.
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rpo.data.readers import load_pairs

SCHEMA = pa.schema([("caption", pa.string()), ("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("label_0", pa.float64())])
ROWS = 1000


def png(rng: np.random.Generator) -> bytes:
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(out, "PNG", compress_level=0)
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    count = parser.parse_args().pairs
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path, cache = Path(folder) / "set.parquet", Path(folder) / "cache"
        with pq.ParquetWriter(path, SCHEMA) as writer:
            for start in range(0, count, ROWS):
                rows = range(start, min(start + ROWS, count))
                columns = [[f"prompt {row}" for row in rows], [png(rng) for _ in rows], [png(rng) for _ in rows], [1.0] * len(rows)]
                writer.write_table(pa.table(columns, schema=SCHEMA))
        for name in ("first read", "with its index"):
            began = time.monotonic()
            pairs, dropped = load_pairs(path, cache)
            print(f"{name}: {len(pairs):,} pairs, {sum(dropped.values())} dropped, {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
