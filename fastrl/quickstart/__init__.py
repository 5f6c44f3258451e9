"""The first run: data, model and command of `fastrl quickstart`."""

from fastrl.quickstart.run import main

__all__ = ["main"]
