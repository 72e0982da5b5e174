"""Judges drawn compositions: `python -m tests.compositions.run --seed 7` or `--count 300`."""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter, defaultdict

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.compositions.judge import judged  # noqa: E402


def main() -> None:
    """Prints a line for each seed, and a summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1, help="how many seeds")
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    words: dict[str, list[int]] = defaultdict(list)
    for seed in range(options.seed, options.seed + options.count):
        started = time.perf_counter()
        verdict = judged(seed)
        outcomes[verdict.outcome] += 1
        seconds = time.perf_counter() - started
        print(
            f"{seed} {verdict.outcome} off {verdict.error:.1e} of {verdict.limit:.1e} "
            f"in {seconds:.1f} s: {verdict.composition}",
            flush=True,
        )
        if verdict.words:
            print(f"    {verdict.words}", flush=True)
            words[f"{verdict.outcome}: {verdict.words.strip().splitlines()[-1]}"].append(seed)
    print(", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    for sentence, seeds in sorted(words.items()):
        print(f"{sentence} ({len(seeds)}: {', '.join(map(str, seeds))})")


if __name__ == "__main__":
    main()
