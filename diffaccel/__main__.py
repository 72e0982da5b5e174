"""`python -m diffaccel` is the command line."""

from diffaccel.cli import run

if __name__ == "__main__":
    run()
