"""`fastrl bench`: the LM head against bare GEMMs and against whatever rivals are installed."""


def main(argv: list[str]) -> int:
    from fastrl.bench.command import main as run

    return run(argv)


__all__ = ["main"]
