"""Processes of tests that begin clean, and quickly.

They are children of a server that has imported the libraries and done nothing else. A fork of the test process itself has
what the tests before it left, and hung for ever: OpenMP counts on threads that a fork does not have, and a semaphore of a
progress bar may be held by a child that was killed.
"""

import multiprocessing

CHILD = multiprocessing.get_context("forkserver")
CHILD.set_forkserver_preload(["tests.conformance.methods", "tests.trainers", "hf_qst_plugins.code_evaluation"])
