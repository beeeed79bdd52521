"""What is known of other people's models: where their parts are, their linear layers, how their weights lie."""
