"""Argument types for `argparse`, so that values out of range raise an error before anything is loaded."""

import argparse


def positive(text: str) -> int:
    """Parses an integer of at least 1.

    Raises:
        ArgumentTypeError: If the text is anything else.
    """
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """Parses an integer of at least 0.

    Raises:
        ArgumentTypeError: If the text is anything else.
    """
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number from {least}")
    return number
