"""The command line `hf-qst`: the package's functions for the shell. The guide is `docs/command_line.md`.

- `__main__`: the list of commands, exit codes.
- `arguments`: options from configuration classes; `options`: those that several commands share.
- `frame`: runs a command; `job`: what a command hands over after its checks.
- `loading`: models and data by option; `folders`: where results go; `training`: the Trainer.
- `record`, `measures`: the JSON of what a command did.
- one file for each command.
"""
