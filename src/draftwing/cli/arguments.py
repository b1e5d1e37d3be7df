"""Options that several commands share."""

import argparse


def positive(text: str) -> int:
    """An option's whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where the models run and in which dtype."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument(
        "--dtype", help="float32, bfloat16, float16 or float64 (default: the file's; float32 on a CPU without bf16)"
    )
