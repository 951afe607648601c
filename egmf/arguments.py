"""Types of command-line arguments, for `argparse`: what is out of range is an error before anything is loaded."""

import argparse


def positive(text: str) -> int:
    """A whole number from 1.

    Raises:
        ArgumentTypeError: If it is none.
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number from 1")
    return number
