"""Processes of tests that begin clean, and quickly.

They are children of a server that has imported the libraries and done nothing else. A fork of the test process itself has
what hundreds of tests before it left: threads that are gone in the child, and locks that they held. It hung now and then.
"""

import multiprocessing

CHILD = multiprocessing.get_context("forkserver")
CHILD.set_forkserver_preload(["tests.conformance.methods", "tests.trainers", "hf_qst_plugins.code_evaluation"])
