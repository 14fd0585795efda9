"""Look into a cache, in Python: `python docs/examples/read_a_cache.py CACHE`. It needs neither torch nor the teacher."""

import sys

from teachercache import Cache


def main(location: str) -> None:
    cache = Cache.open(location)  # a folder, or a URL such as s3://BUCKET/PREFIX
    manifest = cache.manifest
    print(f"{manifest.teacher['model']}: {manifest.rows:,} rows, {manifest.positions:,} positions")
    print("bytes a position:", manifest.bytes_per_position())

    stored = cache.read_row("train", 0)
    targets = cache.kind.decoded(stored.targets)
    for temperature in (1.0, 2.0):  # any T >= 1; of kinds with a grid, one of it
        softened = cache.kind.softened(targets, temperature)
        ids, probabilities = softened.topk(3)  # [positions, 3]
        print(f"T = {temperature:g}: the teacher's first choices at the first position")
        for token, probability in zip(ids[0], probabilities[0], strict=True):
            print(f"  token {int(token):>6}  {float(probability):.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
