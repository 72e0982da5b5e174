"""Makes the embedded image model: fetches the data, trains, evaluates and writes the folder."""

import argparse
from pathlib import Path

import torch
from train_vae import VaeTraining, train_vae
from vocabulary import fetch_packages, load_vocabulary


def main() -> None:
    """Runs every stage that has not been finished in the work folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/embedded"))
    parser.add_argument("--packages", type=Path, help="folder of the npm archives")
    parser.add_argument("--vocabulary", choices=("curated", "all"), default="curated")
    parser.add_argument("--vae-minutes", type=float, default=22.0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    packages = args.packages or args.work / "packages"
    fetch_packages(packages)
    vocabulary = load_vocabulary(packages, args.vocabulary)
    args.work.mkdir(parents=True, exist_ok=True)
    train_vae(vocabulary, VaeTraining(minutes=args.vae_minutes), args.work)


if __name__ == "__main__":
    main()
