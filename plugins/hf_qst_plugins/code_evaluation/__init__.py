"""Evaluation of code models.

`hf-qst evaluate-code` measures pass@k; `python -m hf_qst_plugins.code_evaluation.difficulty` shows
which tokens of code are hard to predict. The guide is `docs/code_evaluation.md`.

- `runner`: `evaluate`, which draws completions, executes them and reports.
- `together`: `evaluate_together`, the same for several settings in one batch, about three times as fast on a CPU.
- `judging`: `judge_samples`, which executes completions that were drawn without being executed.
- `report`, `pass_at_k`: the figures of an evaluation, and the comparison of two.
- `samples_file`, `run_settings`: the file of samples, which a run can resume.
- `problems`: problem files, and the project's own generated problems.
- `sampling`: completions from a model.
- `sandbox`: execution of one untrusted program.
- `difficulty`: losses of a model over source files by class of token.
"""

from .judging import judge_samples
from .pass_at_k import Difference, paired_bootstrap, pass_at_k, task_pass_at_k
from .problems import SHIPPED, Problem, ProblemFileError, read_problems
from .problems.generated import training_pairs
from .report import Report, read_report
from .runner import evaluate
from .samples_file import SamplesFile, SamplesFileError, read_samples
from .sampling.completion import truncate
from .sampling.sampler import GENERATE_DEFAULTS, Sampler
from .sandbox import OUTCOMES, ExecutionNotAllowedError, Limits, Outcome, Sandbox, SandboxError
from .together import evaluate_together

__all__ = [
    "GENERATE_DEFAULTS",
    "OUTCOMES",
    "SHIPPED",
    "Difference",
    "ExecutionNotAllowedError",
    "Limits",
    "Outcome",
    "Problem",
    "ProblemFileError",
    "Report",
    "Sampler",
    "SamplesFile",
    "SamplesFileError",
    "Sandbox",
    "SandboxError",
    "evaluate",
    "evaluate_together",
    "judge_samples",
    "paired_bootstrap",
    "pass_at_k",
    "read_problems",
    "read_report",
    "read_samples",
    "task_pass_at_k",
    "training_pairs",
    "truncate",
]
