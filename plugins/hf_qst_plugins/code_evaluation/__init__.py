"""Evaluation of code models: pass@k by execution in a sandbox, and which tokens of code are hard to predict."""

from .completion import truncate
from .generated_problems import training_pairs
from .pass_at_k import Difference, paired_bootstrap, pass_at_k, task_pass_at_k
from .problems import SHIPPED, Problem, ProblemFileError, read_problems
from .report import Report, read_report
from .runner import evaluate
from .sampler import GENERATE_DEFAULTS, Sampler
from .samples_file import SamplesFile, SamplesFileError, read_samples
from .sandbox import OUTCOMES, ExecutionNotAllowedError, Limits, Outcome, Sandbox, SandboxError

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
    "paired_bootstrap",
    "pass_at_k",
    "read_problems",
    "read_report",
    "read_samples",
    "task_pass_at_k",
    "training_pairs",
    "truncate",
]
