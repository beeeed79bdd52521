"""Perplexity needs `--data`; tasks need lm-evaluation-harness, `pip install lm-eval`.

hf-qst evaluate --model smollm2 --adapter tuned --data held_out.txt
hf-qst evaluate --model smaller --tasks '[hellaswag, wikitext]' --output_dir figures
hf-qst evaluate --model smaller --tasks '[my_task]' --task_folder tasks/
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_qst.extras import require

from .arguments import Arguments
from .errors import UsageError
from .folders import require_free
from .job import Job
from .loading import evenly, model_of, plan_of_model, rows_of, tokenizer_of
from .measures import measure
from .options import AdapterOptions, DataOptions, ModelOptions, OutputOptions, SampleOptions


@dataclass
class EvaluationOptions:
    """What is measured.

    Args:
        data: text whose perplexity is measured; see --text_field for the fields of JSON lines.
        tasks: names of tasks of lm-evaluation-harness.
        task_folder: a folder with YAML files of tasks of your own.
        num_fewshot: examples in the prompt of a task; by default the task's.
        limit: only so many examples of each task.
    """

    data: str | None = None
    tasks: list[str] = field(default_factory=list)
    task_folder: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None


def add_arguments(arguments: Arguments) -> None:
    arguments.add(ModelOptions)
    arguments.add(AdapterOptions)
    arguments.add(EvaluationOptions)
    arguments.add(DataOptions, skip={"data", "evaluation_data", "other_data"})
    arguments.add(SampleOptions)
    arguments.add(OutputOptions)
    arguments.flag("overwrite", "Replace what is in --output_dir.")


def prepare(options) -> Job:
    require_free(options.output_dir, options.overwrite, required=False)
    if options.data is None and not options.tasks:
        raise UsageError("data", "it must be given, or --tasks")
    if options.tasks:
        try:
            require("lm_eval", "a task")
        except ImportError as error:
            raise UsageError("tasks", error) from error
    tokenizer = tokenizer_of(options)
    texts = {}
    if options.data is not None:
        texts["in_domain"] = evenly(rows_of("data", options, tokenizer), options.evaluation_rows)
    manager = _tasks(options) if options.tasks else None

    def work(record) -> None:
        model = model_of(options, options.adapter)
        record.content["before"] = measure(model, tokenizer, texts, options)
        for figures in record.content["before"]["perplexity"].values():
            print(f"perplexity {figures['perplexity']:.4f} (loss {figures['loss']:.6f}, {figures['tokens']:,} tokens)")
        if options.tasks:
            record.content["tasks"] = _run_tasks(model, tokenizer, manager, options)

    def plan():
        rows = [f"perplexity on: {len(part):,} rows of {options.data}" for part in texts.values()]
        return [plan_of_model(options), *rows, f"tasks: {', '.join(options.tasks) or 'none'}"]

    return Job(plan, work, options.output_dir)


def _tasks(options):
    """lm-evaluation-harness's index of tasks, in which those asked for are.

    Raises:
        UsageError: a task is unknown.
    """
    from lm_eval.tasks import TaskManager

    if options.task_folder is not None:
        # The index of the harness's own thousands of tasks takes a quarter of a minute.
        own = TaskManager(include_path=options.task_folder, include_defaults=False)
        if set(options.tasks) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=options.task_folder)
    unknown = [name for name in options.tasks if name not in manager.all_tasks]
    if unknown:
        raise UsageError("tasks", f"there is no task {unknown[0]!r} in lm-evaluation-harness or --task_folder")
    return manager


def _run_tasks(model, tokenizer, manager, options) -> dict:
    """Metrics by task."""
    from lm_eval import simple_evaluate

    from hf_qst_plugins.lm_evaluation import HFQSTModel

    found = simple_evaluate(
        HFQSTModel(model, tokenizer=tokenizer, batch_size=options.evaluation_batch_size),
        tasks=options.tasks,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        task_manager=manager,
        bootstrap_iters=1000,
        log_samples=False,
    )
    results = {}
    for task, metrics in found["results"].items():
        results[task] = {
            name.partition(",")[0]: value for name, value in metrics.items() if isinstance(value, (int, float))
        }
        print(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in results[task].items()))
    return results
