"""Needs `--allow_execution`: the completions are programs, and they run in a sandbox.

hf-qst evaluate-code --model smollm2 --problems HumanEval.jsonl.gz --samples 15 --out samples.jsonl --allow_execution
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_qst_plugins.code_evaluation import SHIPPED, Limits, ProblemFileError, SamplesFileError, evaluate, read_problems

from .arguments import Arguments
from .errors import UsageError
from .folders import require_free
from .job import Job
from .loading import model_of, plan_of_model, tokenizer_of
from .measures import size
from .options import AdapterOptions, ModelOptions, OutputOptions
from .sampling import add_sampling, generate_arguments, processor_of


@dataclass
class ProblemOptions:
    """Which problems.

    Args:
        problems: JSON lines, plain or .gz, in HumanEval's or MBPP's format; by default those of this package.
        limit: only the first so many.
    """

    problems: str = str(SHIPPED)
    limit: int | None = None


_NOT_OPTIONS = {"model", "tokenizer", "problems", "generate_kwargs", "limits", "overwrite"}


def add_arguments(arguments: Arguments) -> None:
    arguments.add(ModelOptions)
    arguments.add(AdapterOptions)
    arguments.add(ProblemOptions)
    arguments.add(evaluate, skip=_NOT_OPTIONS)
    arguments.add(Limits, prefix="limits")
    add_sampling(arguments)
    arguments.add(OutputOptions)
    arguments.flag("overwrite", "Discard the samples in --out, and replace what is in --output_dir.")


def prepare(options) -> Job:
    require_free(options.output_dir, options.overwrite, required=False)
    if not options.allow_execution:
        raise UsageError("allow_execution", "it must be given: the completions are programs, which are executed")
    try:
        problems = read_problems(options.problems)[: options.limit]
    except (OSError, ProblemFileError) as error:
        raise UsageError("problems", error) from error
    limits = options.build(Limits)
    tokenizer = tokenizer_of(options)
    arguments = generate_arguments(options, processor_of(options, tokenizer))

    def work(record) -> None:
        model = model_of(options, options.adapter)
        record.content["before"] = {**size(model), "perplexity": {}, "completions": []}
        try:
            report = evaluate(
                model,
                tokenizer,
                problems,
                generate_kwargs=arguments,
                limits=limits,
                overwrite=options.overwrite,
                **options.values(evaluate),
            )
        except SamplesFileError as error:
            raise UsageError("out", error) from error
        print(report.summary())
        record.content["code"] = report.as_dict()

    def plan():
        return [
            plan_of_model(options),
            f"draws and executes: {options.samples} completions of {len(problems)} problems",
        ]

    return Job(plan, work, options.output_dir)
