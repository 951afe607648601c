"""Argument types for `argparse`, so that values out of range raise an error before anything is loaded."""

import argparse
import json


def mapping(text: str) -> dict:
    """Parses a mapping as JSON.

    Raises:
        ArgumentTypeError: If the text is anything else.
    """
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a mapping as JSON")
    return found


def positive(text: str) -> int:
    """Parses an integer of at least 1.

    Raises:
        ArgumentTypeError: If the text is anything else.
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number from 1")
    return number


def positive_seconds(text: str) -> float:
    """Parses a number of seconds of at least 0.05.

    Raises:
        ArgumentTypeError: If the text is anything else.
    """
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.05 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted seconds from 0.05")
    return number
