"""The flags of ``gale chat`` and ``gale complete``; nothing heavy is imported."""

import argparse


def add_arguments(parser: argparse.ArgumentParser, *, chat: bool) -> None:
    """Every flag of the command."""
    if chat:
        parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    else:
        parser.add_argument(
            "prompt", metavar="PROMPT", nargs="*", help="complete this and end; '-' reads it from standard input"
        )
    parser.add_argument("--base-url", metavar="URL", default="http://127.0.0.1:8000", help="[%(default)s]")
    parser.add_argument("--model", metavar="NAME", help="default: what /v1/models lists first")
    parser.add_argument("--max-tokens", metavar="N", type=int, default=256, help="of each answer [256]")
    parser.add_argument("--temperature", metavar="X", type=float, help="default: the server's")
    parser.add_argument("--top-p", metavar="X", type=float, help="default: the server's")
    parser.add_argument("--seed", metavar="N", type=int)
    parser.add_argument("--stop", metavar="TEXT", action="append", help="ends an answer; repeatable")
    parser.add_argument("--load", metavar="NAME", help="go on from a state that is saved in the server (Gale)")
    parser.add_argument("--save", metavar="NAME", help="save the state at the end, under this name (Gale)")
