"""`hf-qst COMMAND ...`: finds the command and loads nothing else.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

COMMANDS = {
    "finetune": "Fine-tune a frozen, quantised model through a side network (QST)",
    "prune": "Make a model physically smaller by learned widths (DISP) or by scores",
    "compress": "Replace weights by activation-aware low-rank factors (mixed rank)",
    "evaluate": "Perplexity on a text, or tasks of lm-evaluation-harness",
    "evaluate-code": "pass@k on programming problems; executes the completions in a sandbox",
    "generate": "Complete prompts, at one temperature or adaptively",
    "bench": "Speed and memory of a model",
    "plan": "What a run will take: parameters, bytes, an estimate of seconds",
    "cache": "Store a base's hidden states, so that fine-tuning runs it once",
    "export": "Write a model for other tools: a GGUF file for llama.cpp, or a plain folder",
    "models": "Which method works with which type of model",
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hf-qst COMMAND [options]",
            "",
            "Tune, shrink and decode large models on the hardware you have.",
            "",
            *lines,
            "",
            "hf-qst COMMAND --help lists the options; --config FILE reads them from YAML, --print-config writes them.",
            "Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else None
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        from hf_qst.version import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name or "", COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f", it must be one of {', '.join(COMMANDS)}"
        print(f"hf-qst: there is no command {name!r}{hint}" if name else usage(), file=sys.stderr)
        return 2
    try:
        import jsonargparse  # noqa: F401
    except ImportError:
        print(f"hf-qst {name}: it needs the package 'jsonargparse': pip install 'hf_qst[cli]'", file=sys.stderr)
        return 1
    from .frame import run

    return run(name, COMMANDS[name], argv[1:])


if __name__ == "__main__":
    sys.exit(main())
