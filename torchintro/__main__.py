"""The command ``torchintro``, which is also ``python -m torchintro``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; without the packages that it needs, say in one sentence how to get them."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        print(f'torchintro: the command line needs {error.name}: pip install "torchintro[cli]"', file=sys.stderr)
        sys.exit(2)
    from .cli.app import app

    app(prog_name="torchintro")


if __name__ == "__main__":
    main()
