"""`python -m megdet`, the form in which torchrun starts it."""

from megdet.cli.main import run

if __name__ == "__main__":
    run()
