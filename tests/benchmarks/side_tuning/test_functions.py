"""Functions to complete are cut between their docstring and their body."""

from benchmarks.side_tuning.functions import documented_functions
from examples.corpus import SourceFile

SOURCE = '''
def plain(x):
    return x


def only_documented():
    """Nothing else."""


class Box:
    @property
    def size(self):
        """Number of things
        in the box.
        """
        # Counted each time.
        return len(self.things)
'''


def test_a_documented_function_is_split_after_its_docstring():
    assert list(documented_functions([SourceFile("box.py", SOURCE)])) == [
        (
            'def size(self):\n    """Number of things\n    in the box.\n    """\n',
            "    # Counted each time.\n    return len(self.things)\n",
        )
    ]
